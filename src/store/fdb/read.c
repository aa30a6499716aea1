/*
 * Reads: gets and ranges in one transaction at one version.
 *
 * Gets of keys that follow each other (the blocks of a sequential read) become a
 * range read, which costs the cluster about as much as one get; runs are cut so
 * that several go in parallel. Heads stay where the library put them until the
 * read is released; bodies are copied to where the caller wants them by the
 * worker that also decodes them.
 */
#include <stdlib.h>
#include <string.h>

#include "base/log.h"
#include "store/fdb/engine.h"

#define RUN_BYTES_MAX (64u << 10) /* what a range reply brings at most, about */
#define RUN_GETS_MAX 64u

/* One future: a get, a run of gets, or a piece of a range. */
struct part {
    FDBFuture *future;
    struct store_range *range; /* NULL: gets */
    uint32_t first, n;         /* gets */
};

/* Keys and heads of one piece of a range; bodies that came with it are not kept. */
struct piece {
    struct piece *next;
    uint8_t bytes[];
};

struct fd_read {
    struct list link; /* fr->reads */
    struct store_read *read;
    struct fr *fr;
    struct fd_version_wait version_wait;
    bool waits_version, expired, failed;
    bool no_runs; /* one did not come whole */
    int64_t version;
    FDBTransaction *tr;
    struct fd_wait wait;
    struct fd_retry retry;
    uint64_t started_ns;
    struct part *parts;
    uint32_t n_parts;
    struct piece *pieces;
    struct store_pair **pairs; /* of each range */
    size_t *cap;
    unsigned tries;
};

static void read_start(struct fd_read *r);
static void read_ready(struct fd_wait *wait);

static void parts_drop(struct fd_read *r)
{
    for (uint32_t i = 0; i < r->n_parts; i++)
        if (r->parts[i].future)
            fdb.future_destroy(r->parts[i].future);
    r->n_parts = 0;
    while (r->pieces) {
        struct piece *p = r->pieces;
        r->pieces = p->next;
        free(p);
    }
    for (uint32_t i = 0; i < r->read->n_ranges; i++)
        r->read->ranges[i].n_pairs = 0;
}

static void read_answered(struct env_work *work)
{
    struct store_read *read = container_of(work, struct store_read, work);
    read->done(read, read->result);
}

/* Takes what one get found; `value` NULL: nothing. */
static void get_fill(struct store_get *get, const uint8_t *value, int len)
{
    struct slice body;
    get->head = (struct slice){NULL, 0};
    get->body_len = 0;
    get->st = ST_NOTFOUND;
    if (!value)
        return;
    get->st = ST_IO;
    if (!fd_value_parse(value, len, &get->head, &body))
        return;
    get->body_len = (uint32_t)body.len;
    if (get->body && body.len > get->body_cap)
        return;
    if (get->body && body.len)
        memcpy(get->body, body.data, body.len);
    get->st = ST_OK;
}

static int compare(const uint8_t *a, size_t a_len, const uint8_t *b, size_t b_len)
{
    int c = memcmp(a, b, a_len < b_len ? a_len : b_len);
    return c ? c : a_len < b_len ? -1 : a_len > b_len;
}

static void run_fill(struct fd_read *r, const struct part *part)
{
    const struct fdb_key_value *kv;
    int count = 0, more, at = 0;
    int code = fdb.future_get_keyvalue_array(part->future, &kv, &count, &more);
    CHECK(code == 0);
    for (uint32_t i = 0; i < part->n; i++) {
        struct store_get *get = &r->read->gets[part->first + i];
        size_t prefix_len = (size_t)r->fr->fd->prefix_len;
        int c = -1;
        while (at < count &&
               (c = compare(kv[at].key + prefix_len, (size_t)kv[at].key_length - prefix_len,
                            get->key.data, get->key.len)) < 0)
            at++;
        bool found = at < count && c == 0;
        get_fill(get, found ? kv[at].value : NULL, found ? kv[at].value_length : 0);
    }
}

static void fill(struct env_work *work)
{
    struct store_read *read = container_of(work, struct store_read, work);
    struct fd_read *r = read->arena;
    for (uint32_t i = 0; i < r->n_parts; i++) {
        const struct part *part = &r->parts[i];
        int present = 0, len = 0;
        const uint8_t *value = NULL;
        if (part->range)
            continue;
        if (part->n > 1) {
            run_fill(r, part);
            continue;
        }
        int code = fdb.future_get_value(part->future, &present, &value, &len);
        CHECK(code == 0);
        get_fill(&read->gets[part->first], present ? value : NULL, len);
    }
    if (read->digest)
        read->digest(read);
}

static void read_finish(struct fd_read *r, enum status st)
{
    struct store_read *read = r->read;
    list_remove(&r->link);
    if (r->tr)
        fdb.transaction_destroy(r->tr);
    r->tr = NULL;
    read->result = st;
    bool bodies = st == ST_OK && read->digest;
    if (bodies) {
        read->work.work = fill;
        read->work.done = read_answered;
        read->work.env = r->fr->env;
        env_work(r->fr->env, &read->work);
        return;
    }
    if (st == ST_OK)
        fill(&read->work);
    read->done(read, st);
}

/* --- sending --------------------------------------------------------------------------- */

/* Whether `b` is the key right behind `a`: the same but for the last bytes, which count one
 * up, so that nothing of the layout stands between them. */
static bool follows(struct slice a, struct slice b)
{
    if (a.len != b.len || a.len < 3)
        return false;
    const uint8_t *x = a.data, *y = b.data;
    size_t n = a.len;
    if (memcmp(x, y, n - 2) != 0)
        return false;
    return get_be16(y + n - 2) == get_be16(x + n - 2) + 1;
}

static struct part *part_add(struct fd_read *r)
{
    struct part *p = &r->parts[r->n_parts++];
    *p = (struct part){NULL};
    return p;
}

static void plan(struct fd_read *r)
{
    const struct store_read *read = r->read;
    uint32_t i = 0;
    while (i < read->n_gets) {
        uint32_t n = 1;
        uint64_t bytes = read->gets[i].body_cap;
        while (!r->no_runs && i + n < read->n_gets && n < RUN_GETS_MAX && read->gets[i].body &&
               read->gets[i + n].body && bytes + read->gets[i + n].body_cap <= RUN_BYTES_MAX &&
               follows(read->gets[i + n - 1].key, read->gets[i + n].key)) {
            bytes += read->gets[i + n].body_cap;
            n++;
        }
        struct part *p = part_add(r);
        p->first = i;
        p->n = n;
        i += n;
    }
    for (i = 0; i < read->n_ranges; i++)
        part_add(r)->range = &read->ranges[i];
}

static FDBFuture *get_range(struct fd_read *r, const struct fd_key *begin, bool behind,
                            const struct fd_key *end, int limit, bool reverse)
{
    /* As selectors: (>= key) is or_equal 0, offset 1; (> key) is or_equal 1, offset 1. */
    return fdb.transaction_get_range(r->tr, begin->bytes, begin->len, behind, 1, end->bytes,
                                     end->len, 0, 1, limit, 0, FDB_STREAMING_WANT_ALL, 0, 1,
                                     reverse);
}

static void part_send(struct fd_read *r, struct part *p)
{
    const struct fd *fd = r->fr->fd;
    struct fd_key begin, end;
    if (!p->range) {
        fd_key_make(fd, &begin, r->read->gets[p->first].key);
        if (p->n == 1) {
            p->future = fdb.transaction_get(r->tr, begin.bytes, begin.len, 1);
            return;
        }
        fd_key_make(fd, &end, r->read->gets[p->first + p->n - 1].key);
        end.bytes[end.len++] = 0;
        p->future = get_range(r, &begin, false, &end, 0, false);
        return;
    }
    struct store_range *range = p->range;
    fd_key_make(fd, &begin, range->begin);
    fd_key_make(fd, &end, range->end);
    bool behind = false;
    if (range->n_pairs && range->reverse) {
        fd_key_make(fd, &end, range->pairs[range->n_pairs - 1].key);
    } else if (range->n_pairs) {
        fd_key_make(fd, &begin, range->pairs[range->n_pairs - 1].key);
        behind = true;
    }
    /* One more than asked for tells whether there is more. */
    p->future = get_range(r, &begin, behind, &end, (int)(range->limit + 1 - range->n_pairs),
                          range->reverse);
}

static void read_send(struct fd_read *r)
{
    const struct store_read *read = r->read;
    struct fr *fr = r->fr;
    fd_transaction(fr->fd, &r->tr, read->background, read->tag);
    fdb.transaction_set_read_version(r->tr, r->version);
    plan(r);
    fd_wait_begin(fr, &r->wait, r->n_parts, read_ready);
    for (uint32_t i = 0; i < r->n_parts; i++) {
        part_send(r, &r->parts[i]);
        fd_wait_add(&r->wait, r->parts[i].future);
    }
}

static void version_came(struct fd_version_wait *w, int64_t version)
{
    struct fd_read *r = container_of(w, struct fd_read, version_wait);
    r->waits_version = false;
    r->version = version;
    read_send(r);
}

static void read_again(struct fd_retry *retry, bool lasting)
{
    struct fd_read *r = container_of(retry, struct fd_read, retry);
    if (r->expired) {
        read_finish(r, ST_UNAVAIL);
        return;
    }
    if (lasting) {
        fdb.transaction_destroy(r->tr);
        r->tr = NULL;
    }
    read_start(r);
}

static void read_failed(struct fd_read *r, int code)
{
    parts_drop(r);
    if (r->expired) {
        read_finish(r, ST_UNAVAIL);
        return;
    }
    r->tries++;
    if (!fdb.error_predicate(FDB_PREDICATE_RETRYABLE, code) && code != FDB_DATABASE_LOCKED) {
        log_error("FoundationDB refuses a read: %s (%d)", fdb.get_error(code), code);
        read_finish(r, ST_IO);
        return;
    }
    fd_retry(r->fr, &r->retry, r->tr, code, read_again);
}

static struct slice keep(struct piece *piece, size_t *used, const void *data, size_t len)
{
    uint8_t *at = piece->bytes + *used;
    if (len)
        memcpy(at, data, len);
    *used += len;
    return (struct slice){at, len};
}

/* Takes a piece of a range; true: another one is needed. */
static bool range_piece(struct fd_read *r, struct part *p)
{
    struct store_range *range = p->range;
    const struct fdb_key_value *kv;
    int count = 0, more = 0;
    size_t at = (size_t)(range - r->read->ranges), prefix_len = (size_t)r->fr->fd->prefix_len;
    size_t bytes = 0, used = 0;
    struct slice head, body;
    int code = fdb.future_get_keyvalue_array(p->future, &kv, &count, &more);
    CHECK(code == 0);
    mem_grow(&r->pairs[at], &r->cap[at], range->n_pairs + (size_t)count + 1, sizeof **r->pairs);
    range->pairs = r->pairs[at];
    for (int i = 0; i < count; i++) {
        if (!fd_value_parse(kv[i].value, kv[i].value_length, &head, &body))
            head.len = 0;
        bytes += (size_t)kv[i].key_length + head.len;
    }
    struct piece *piece = mem_alloc(sizeof *piece + bytes);
    piece->next = r->pieces;
    r->pieces = piece;
    for (int i = 0; i < count && range->n_pairs <= range->limit; i++) {
        struct store_pair *pair = &range->pairs[range->n_pairs++];
        if (!fd_value_parse(kv[i].value, kv[i].value_length, &head, &body)) {
            r->failed = true;
            head.len = body.len = 0;
        }
        pair->key = keep(piece, &used, kv[i].key + prefix_len,
                         (size_t)kv[i].key_length - prefix_len);
        pair->head = keep(piece, &used, head.data, head.len);
        pair->body_len = (uint32_t)body.len;
    }
    fdb.future_destroy(p->future);
    p->future = NULL;
    range->more = range->n_pairs > range->limit;
    if (range->more)
        range->n_pairs = range->limit;
    return more && count > 0 && !range->more;
}

/* Whether a run of gets came back cut off before its end. */
static bool run_cut(const struct part *p)
{
    const struct fdb_key_value *kv;
    int count = 0, more = 0;
    if (p->range || p->n == 1)
        return false;
    int code = fdb.future_get_keyvalue_array(p->future, &kv, &count, &more);
    CHECK(code == 0);
    return more;
}

static void read_ready(struct fd_wait *wait)
{
    struct fd_read *r = container_of(wait, struct fd_read, wait);
    int failure = 0;
    bool cut = false;
    for (uint32_t i = 0; i < r->n_parts && !failure; i++)
        if (r->parts[i].future) {
            failure = fdb.future_get_error(r->parts[i].future);
            cut = cut || (!failure && run_cut(&r->parts[i]));
        }
    if (failure) {
        read_failed(r, failure);
        return;
    }
    r->fr->heard_ns = env_now_ns(r->fr->env);
    if (cut) {
        parts_drop(r);
        r->no_runs = true;
        /* One that has read takes no options and no version any more. */
        fdb.transaction_reset(r->tr);
        read_send(r);
        return;
    }
    struct part *again[STORE_RANGES_MAX];
    uint32_t n = 0;
    for (uint32_t i = 0; i < r->n_parts; i++)
        if (r->parts[i].range && r->parts[i].future && range_piece(r, &r->parts[i]))
            again[n++] = &r->parts[i];
    if (!n) {
        read_finish(r, r->failed ? ST_IO : ST_OK);
        return;
    }
    fd_wait_begin(r->fr, &r->wait, n, read_ready);
    for (uint32_t i = 0; i < n; i++) {
        part_send(r, again[i]);
        fd_wait_add(wait, again[i]->future);
    }
}

static void read_start(struct fd_read *r)
{
    /* A version that was refused once is not tried again. */
    r->version = r->read->own && !r->tries ? fd_version_own(r->fr) : 0;
    if (r->version) {
        read_send(r);
        return;
    }
    r->waits_version = true;
    r->version_wait.ready = version_came;
    fd_version_get(r->fr, r->read->background, &r->version_wait);
}

void fd_read(struct store *store, struct env *env, struct store_read *read)
{
    struct fr *fr = fd_reactor(fd_of(store), env);
    struct fd_read *r = mem_zalloc(sizeof *r);
    read->store = store;
    read->arena = r;
    r->read = read;
    r->fr = fr;
    r->started_ns = env_now_ns(env);
    r->parts = mem_alloc((read->n_gets + read->n_ranges + 1) * sizeof *r->parts);
    r->pairs = mem_zalloc((read->n_ranges + 1) * sizeof *r->pairs);
    r->cap = mem_zalloc((read->n_ranges + 1) * sizeof *r->cap);
    for (uint32_t i = 0; i < read->n_ranges; i++) {
        CHECK(read->ranges[i].limit > 0 && read->ranges[i].limit <= 65536);
        read->ranges[i].n_pairs = 0;
        read->ranges[i].more = false;
    }
    list_add_tail(&fr->reads, &r->link);
    /* It may join a question that was asked long ago, and nothing is sent for it. */
    fd_health_watch(fr);
    read_start(r);
}

void fd_read_release(struct store_read *read)
{
    struct fd_read *r = read->arena;
    parts_drop(r);
    for (uint32_t i = 0; i < read->n_ranges; i++)
        free(r->pairs[i]);
    free(r->pairs);
    free(r->cap);
    free(r->parts);
    free(r);
    read->arena = NULL;
}

uint64_t fd_reads_oldest_ns(const struct fr *fr)
{
    if (list_empty(&fr->reads))
        return UINT64_MAX;
    return container_of(fr->reads.next, struct fd_read, link)->started_ns;
}

void fd_reads_expire(struct fr *fr, uint64_t now_ns)
{
    uint64_t limit_ns = fr->fd->options.timeout_ms * 1000000ull;
    list_for_each_safe (l, next, &fr->reads) {
        struct fd_read *r = container_of(l, struct fd_read, link);
        if (!limit_ns || now_ns - r->started_ns < limit_ns)
            return;
        if (r->expired)
            continue;
        r->expired = true;
        if (r->waits_version) {
            fd_version_stop(&r->version_wait);
            r->waits_version = false;
            read_finish(r, ST_UNAVAIL);
        } else if (r->tr) {
            /* Its futures fail at once, and it ends with them. */
            fdb.transaction_cancel(r->tr);
        }
    }
}
