/*
 * The cluster's keys: a skip list whose nodes hold the values of one key by version, newest
 * first. A value that was superseded stays for readers of older versions; the order in which
 * values were superseded is kept, so that forgetting takes no walk over all keys.
 *
 * Beside it, for conflicts: which ranges each of the latest commits wrote.
 */
#include "inside.h"

#include <stdlib.h>

#define LEVELS 18u

struct version {
    int64_t version;
    struct blob *value; /* NULL: the key was removed */
    struct version *older;
};

struct node {
    struct blob *key;
    struct version *newest;
    uint32_t levels;
    uint32_t queued; /* entries of `superseded` that name this node */
    int64_t forgot;  /* it has no values that only versions before this can see */
    struct node *next[];
};

/* At `version` something in `node` was superseded, or removed. */
struct superseded {
    int64_t version;
    struct node *node;
    uint64_t bytes;
};

static struct node *head;
static struct superseded *superseded;
static size_t superseded_first, superseded_n, superseded_cap;
static uint64_t superseded_bytes;
static uint64_t level_state = 88172645463325252u;

int bytes_compare(const void *a, size_t a_len, const void *b, size_t b_len)
{
    size_t n = a_len < b_len ? a_len : b_len;
    int c = n ? memcmp(a, b, n) : 0;
    return c ? c : a_len < b_len ? -1 : a_len > b_len;
}

int blob_compare(const struct blob *a, const struct blob *b)
{
    return a == b ? 0 : bytes_compare(a->data, a->len, b->data, b->len);
}

struct blob *blob_new(const void *data, size_t len)
{
    struct blob *b = mem_alloc(sizeof *b + len);
    b->refs = 1;
    b->len = (uint32_t)len;
    if (data && len)
        memcpy(b->data, data, len);
    g.counts.bytes_held += len;
    return b;
}

struct blob *blob_ref(struct blob *b)
{
    if (b)
        b->refs++;
    return b;
}

void blob_unref(struct blob *b)
{
    if (!b || --b->refs)
        return;
    g.counts.bytes_held -= b->len;
    free(b);
}

struct blob *blob_after(const struct blob *b)
{
    struct blob *after = blob_new(NULL, b->len + 1u);
    memcpy(after->data, b->data, b->len);
    after->data[b->len] = 0;
    return after;
}

/* --- keys ------------------------------------------------------------------------------ */

static struct node *node_new(struct blob *key, uint32_t levels)
{
    struct node *n = mem_zalloc(sizeof *n + levels * sizeof n->next[0]);
    n->key = key;
    n->levels = levels;
    return n;
}

static struct node *list_head(void)
{
    if (!head)
        head = node_new(NULL, LEVELS);
    return head;
}

static uint32_t random_levels(void)
{
    level_state ^= level_state << 13;
    level_state ^= level_state >> 7;
    level_state ^= level_state << 17;
    return 1 + (uint32_t)__builtin_ctzll(level_state | 1ull << (LEVELS - 1) * 2) / 2;
}

static struct node *seek(const uint8_t *key, size_t len, struct node *before[LEVELS])
{
    struct node *at = list_head();
    for (uint32_t l = LEVELS; l-- > 0;) {
        while (at->next[l] &&
               bytes_compare(at->next[l]->key->data, at->next[l]->key->len, key, len) < 0)
            at = at->next[l];
        if (before)
            before[l] = at;
    }
    return at->next[0];
}

struct node *map_seek(const uint8_t *key, size_t len)
{
    return seek(key, len, NULL);
}

struct node *map_before(const uint8_t *key, size_t len)
{
    struct node *before[LEVELS];
    seek(key, len, before);
    return before[0] == head ? NULL : before[0];
}

struct node *map_next(const struct node *n)
{
    return n->next[0];
}

const struct blob *map_key(const struct node *n)
{
    return n->key;
}

struct blob *map_value(const struct node *n, int64_t version)
{
    const struct version *v = n->newest;
    while (v && v->version > version)
        v = v->older;
    return v ? v->value : NULL;
}

static uint64_t version_bytes(const struct version *v)
{
    return v && v->value ? v->value->len : 0;
}

static void supersede(struct node *n, int64_t version, uint64_t bytes)
{
    if (superseded_first + superseded_n == superseded_cap && superseded_first > superseded_n) {
        memmove(superseded, superseded + superseded_first, superseded_n * sizeof *superseded);
        superseded_first = 0;
    }
    mem_grow(&superseded, &superseded_cap, superseded_first + superseded_n + 1, sizeof *superseded);
    superseded[superseded_first + superseded_n++] =
        (struct superseded){.version = version, .node = n, .bytes = bytes};
    superseded_bytes += bytes;
    n->queued++;
}

static void node_put(struct node *n, struct blob *value, int64_t version)
{
    struct version *newest = n->newest;
    g.counts.keys += (value != NULL) - (uint64_t)(newest && newest->value);
    if (newest && newest->version == version) {
        /* The same commit again: nobody can have seen what was there. */
        blob_unref(newest->value);
        newest->value = blob_ref(value);
        if (!value && !n->queued)
            supersede(n, version, 0);
        return;
    }
    struct version *v = mem_alloc(sizeof *v);
    *v = (struct version){.version = version, .value = blob_ref(value), .older = newest};
    n->newest = v;
    if (newest || !value)
        supersede(n, version, version_bytes(newest));
}

void map_set(struct blob *key, struct blob *value, int64_t version)
{
    struct node *before[LEVELS];
    struct node *n = seek(key->data, key->len, before);
    if (!n || blob_compare(n->key, key) != 0) {
        if (!value)
            return;
        uint32_t levels = random_levels();
        n = node_new(blob_ref(key), levels);
        for (uint32_t l = 0; l < levels; l++) {
            n->next[l] = before[l]->next[l];
            before[l]->next[l] = n;
        }
    } else if (!value && !(n->newest && n->newest->value)) {
        return;
    }
    node_put(n, value, version);
}

void map_clear(const struct blob *begin, const struct blob *end, int64_t version)
{
    for (struct node *n = map_seek(begin->data, begin->len); n && blob_compare(n->key, end) < 0;
         n = n->next[0])
        if (n->newest && n->newest->value)
            node_put(n, NULL, version);
}

static void versions_free(struct version *v)
{
    while (v) {
        struct version *older = v->older;
        blob_unref(v->value);
        free(v);
        v = older;
    }
}

static void node_free(struct node *n)
{
    versions_free(n->newest);
    blob_unref(n->key);
    free(n);
}

static void node_remove(struct node *n)
{
    struct node *before[LEVELS];
    CHECK(seek(n->key->data, n->key->len, before) == n);
    for (uint32_t l = 0; l < n->levels; l++)
        before[l]->next[l] = n->next[l];
    node_free(n);
}

void map_forget(int64_t oldest)
{
    while (superseded_n && superseded[superseded_first].version <= oldest) {
        struct superseded s = superseded[superseded_first++];
        superseded_n--;
        superseded_bytes -= s.bytes;
        struct node *n = s.node;
        n->queued--;
        if (n->forgot < oldest) {
            struct version *v = n->newest;
            while (v && v->version > oldest)
                v = v->older;
            if (v) {
                versions_free(v->older);
                v->older = NULL;
            }
            n->forgot = oldest;
        }
        if (!n->queued && !n->newest->value && n->newest->version <= oldest)
            node_remove(n);
    }
    if (!superseded_n)
        superseded_first = 0;
}

int64_t map_superseded_version(void)
{
    return superseded_n ? superseded[superseded_first].version : 0;
}

uint64_t map_superseded_bytes(void)
{
    return superseded_bytes;
}

void map_free(void)
{
    for (struct node *n = head ? head->next[0] : NULL; n;) {
        struct node *next = n->next[0];
        node_free(n);
        n = next;
    }
    free(head);
    head = NULL;
    free(superseded);
    superseded = NULL;
    superseded_first = superseded_n = superseded_cap = 0;
    superseded_bytes = 0;
    g.counts.keys = 0;
}

/* --- ranges ---------------------------------------------------------------------------- */

void ranges_add(struct ranges *rs, struct blob *begin, struct blob *end)
{
    struct range *last = rs->n ? &rs->items[rs->n - 1] : NULL;
    if (last && blob_compare(last->end, begin) == 0) {
        blob_unref(last->end);
        last->end = end;
        blob_unref(begin);
        return;
    }
    mem_grow(&rs->items, &rs->cap, rs->n + 1, sizeof *rs->items);
    rs->items[rs->n++] = (struct range){begin, end};
}

static int range_order(const void *a, const void *b)
{
    return blob_compare(((const struct range *)a)->begin, ((const struct range *)b)->begin);
}

void ranges_tidy(struct ranges *rs)
{
    if (rs->n < 2)
        return;
    qsort(rs->items, rs->n, sizeof *rs->items, range_order);
    size_t n = 1;
    for (size_t i = 1; i < rs->n; i++) {
        struct range *last = &rs->items[n - 1], r = rs->items[i];
        if (blob_compare(r.begin, last->end) > 0) {
            rs->items[n++] = r;
            continue;
        }
        blob_unref(r.begin);
        if (blob_compare(r.end, last->end) > 0) {
            blob_unref(last->end);
            last->end = r.end;
        } else {
            blob_unref(r.end);
        }
    }
    rs->n = n;
}

bool ranges_meet(const struct ranges *tidy, const struct range *r)
{
    /* The first that ends behind the start of r. */
    size_t low = 0, high = tidy->n;
    while (low < high) {
        size_t mid = (low + high) / 2;
        if (blob_compare(tidy->items[mid].end, r->begin) > 0)
            high = mid;
        else
            low = mid + 1;
    }
    return low < tidy->n && blob_compare(tidy->items[low].begin, r->end) < 0;
}

uint64_t ranges_bytes(const struct ranges *rs)
{
    uint64_t bytes = rs->n * RANGE_BYTES;
    for (size_t i = 0; i < rs->n; i++)
        bytes += rs->items[i].begin->len + rs->items[i].end->len;
    return bytes;
}

void ranges_free(struct ranges *rs)
{
    for (size_t i = 0; i < rs->n; i++) {
        blob_unref(rs->items[i].begin);
        blob_unref(rs->items[i].end);
    }
    free(rs->items);
    *rs = (struct ranges){0};
}

/* --- who wrote where ------------------------------------------------------------------- */

struct record {
    int64_t version;
    struct ranges writes;
};

static struct record *records;
static size_t records_first, records_n, records_cap;

void history_add(int64_t version, struct ranges *rs)
{
    ranges_tidy(rs);
    if (records_first + records_n == records_cap && records_first > records_n) {
        memmove(records, records + records_first, records_n * sizeof *records);
        records_first = 0;
    }
    mem_grow(&records, &records_cap, records_first + records_n + 1, sizeof *records);
    records[records_first + records_n++] = (struct record){version, *rs};
    *rs = (struct ranges){0};
}

bool history_meets(int64_t after, const struct ranges *reads)
{
    for (size_t i = records_n; i-- > 0;) {
        const struct record *r = &records[records_first + i];
        if (r->version <= after)
            return false;
        for (size_t k = 0; k < reads->n; k++)
            if (ranges_meet(&r->writes, &reads->items[k]))
                return true;
    }
    return false;
}

void history_forget(int64_t oldest)
{
    while (records_n && records[records_first].version <= oldest) {
        ranges_free(&records[records_first++].writes);
        records_n--;
    }
    if (!records_n) {
        records_first = 0;
        free(records);
        records = NULL;
        records_cap = 0;
    }
}
