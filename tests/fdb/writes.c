/*
 * What a transaction has written, as its own reads see it: a sorted array of keys, each
 * with what holds for it and for the gap up to the next, so that clearing a range of any
 * size is two entries. Transactions write their keys mostly in order, which makes most
 * insertions go to the end.
 */
#include "inside.h"

#include <stdlib.h>

bool writes_empty(const struct writes *w)
{
    return w->n == 0 && w->n_stamped == 0;
}

static void forget_value(struct write *e)
{
    blob_unref(e->value);
    e->value = NULL;
    for (size_t i = 0; i < e->n_ops; i++)
        blob_unref(e->ops[i].operand);
    free(e->ops);
    e->ops = NULL;
    e->n_ops = 0;
}

/* The last entry at or before `key`; there is one once there is any. */
static size_t find(const struct writes *w, const uint8_t *key, size_t len)
{
    size_t low = 0, high = w->n;
    while (low < high) {
        size_t mid = (low + high) / 2;
        if (bytes_compare(w->items[mid].key->data, w->items[mid].key->len, key, len) <= 0)
            low = mid + 1;
        else
            high = mid;
    }
    CHECK(low);
    return low - 1;
}

/* The entry of this very key, made where there is none. Takes the reference. */
static size_t split(struct writes *w, struct blob *key)
{
    if (!w->n) {
        mem_grow(&w->items, &w->cap, 2, sizeof *w->items);
        w->items[w->n++] = (struct write){.key = blob_new(NULL, 0)};
    }
    size_t i = find(w, key->data, key->len);
    if (blob_compare(w->items[i].key, key) == 0) {
        blob_unref(key);
        return i;
    }
    mem_grow(&w->items, &w->cap, w->n + 1, sizeof *w->items);
    i++;
    memmove(w->items + i + 1, w->items + i, (w->n - i) * sizeof *w->items);
    w->n++;
    const struct write *gap = &w->items[i - 1];
    w->items[i] = (struct write){
        .key = key,
        .at = gap->gap_cleared ? W_CLEARED : W_NOT,
        .gap_cleared = gap->gap_cleared,
        .at_conflicts = gap->gap_conflicts,
        .gap_conflicts = gap->gap_conflicts,
    };
    return i;
}

void writes_set(struct writes *w, struct blob *key, struct blob *value, bool conflicts)
{
    size_t i = split(w, key);
    struct write *e = &w->items[i];
    forget_value(e);
    e->at = W_SET;
    e->value = value;
    e->at_conflicts |= conflicts;
}

void writes_atomic(struct writes *w, enum mutation_type type, struct blob *key,
                   struct blob *operand, bool conflicts)
{
    if (type == M_VERSIONSTAMPED_KEY) {
        mem_grow(&w->stamped, &w->stamped_cap, w->n_stamped + 1, sizeof *w->stamped);
        w->stamped[w->n_stamped++] = (struct mutation){type, key, operand};
        return;
    }
    size_t i = split(w, key);
    struct write *e = &w->items[i];
    struct atomic_op op = {type, operand};
    e->at_conflicts |= conflicts;
    if (type == M_VERSIONSTAMPED_VALUE) {
        forget_value(e);
        e->at = W_UNREADABLE;
    } else if (e->at == W_SET || e->at == W_CLEARED) {
        /* Its outcome is known already. */
        struct blob *value = atomic_apply(&op, e->value);
        forget_value(e);
        blob_unref(operand);
        e->at = value ? W_SET : W_CLEARED;
        e->value = value;
        return;
    } else if (e->at == W_NOT) {
        e->at = W_ATOMIC;
    }
    e->ops = mem_realloc(e->ops, (e->n_ops + 1) * sizeof *e->ops);
    e->ops[e->n_ops++] = op;
}

void writes_clear(struct writes *w, struct blob *begin, struct blob *end, bool conflicts)
{
    size_t i = split(w, begin);
    size_t j = split(w, end); /* behind i, which stays where it is */
    for (size_t k = i; k < j; k++) {
        forget_value(&w->items[k]);
        w->items[k].at = W_CLEARED;
        w->items[k].gap_cleared = true;
        if (conflicts)
            w->items[k].at_conflicts = w->items[k].gap_conflicts = true;
    }
    if (!conflicts)
        return;
    for (size_t k = i + 1; k < j; k++)
        blob_unref(w->items[k].key);
    memmove(w->items + i + 1, w->items + j, (w->n - j) * sizeof *w->items);
    w->n -= j - (i + 1);
}

void writes_conflict(struct writes *w, struct blob *begin, struct blob *end)
{
    size_t i = split(w, begin);
    size_t j = split(w, end);
    for (size_t k = i; k < j; k++)
        w->items[k].at_conflicts = w->items[k].gap_conflicts = true;
}

void writes_copy(struct writes *to, const struct writes *from)
{
    *to = (struct writes){.n = from->n, .cap = from->n};
    if (!from->n)
        return;
    to->items = mem_alloc(from->n * sizeof *to->items);
    memcpy(to->items, from->items, from->n * sizeof *to->items);
    for (size_t i = 0; i < to->n; i++) {
        struct write *e = &to->items[i];
        blob_ref(e->key);
        blob_ref(e->value);
        if (!e->n_ops)
            continue;
        e->ops = mem_alloc(e->n_ops * sizeof *e->ops);
        memcpy(e->ops, from->items[i].ops, e->n_ops * sizeof *e->ops);
        for (size_t k = 0; k < e->n_ops; k++)
            blob_ref(e->ops[k].operand);
    }
}

void writes_free(struct writes *w)
{
    for (size_t i = 0; i < w->n; i++) {
        forget_value(&w->items[i]);
        blob_unref(w->items[i].key);
    }
    for (size_t i = 0; i < w->n_stamped; i++) {
        blob_unref(w->stamped[i].key);
        blob_unref(w->stamped[i].value);
    }
    free(w->items);
    free(w->stamped);
    *w = (struct writes){0};
}

const struct write *writes_find(const struct writes *w, const uint8_t *key, size_t len, bool *exact)
{
    if (!w || !w->n)
        return NULL;
    const struct write *e = &w->items[find(w, key, len)];
    *exact = bytes_compare(e->key->data, e->key->len, key, len) == 0;
    return e;
}

static void send_mutation(struct mutation **mutations, size_t *n, size_t *cap,
                          enum mutation_type type, struct blob *key, struct blob *value)
{
    mem_grow(mutations, cap, *n + 1, sizeof **mutations);
    (*mutations)[(*n)++] = (struct mutation){type, key, value};
}

void writes_send(const struct writes *w, struct mutation **mutations, size_t *n,
                 struct ranges *conflicts)
{
    size_t cap = 0;
    *mutations = NULL;
    *n = 0;
    struct blob *cleared_from = NULL, *conflicts_from = NULL;
    /* One past the last: whatever is open there ends with all keys; that entry is never
     * needed, as a range has an end that was split off. */
    for (size_t i = 0; i < w->n; i++) {
        const struct write *e = &w->items[i];
        if (cleared_from && e->at != W_CLEARED) {
            send_mutation(mutations, n, &cap, M_CLEAR_RANGE, cleared_from, blob_ref(e->key));
            cleared_from = NULL;
        }
        if (!cleared_from && e->at == W_CLEARED)
            cleared_from = blob_ref(e->key);
        if (cleared_from && !e->gap_cleared) {
            send_mutation(mutations, n, &cap, M_CLEAR_RANGE, cleared_from, blob_after(e->key));
            cleared_from = NULL;
        }
        if (!cleared_from && e->gap_cleared)
            cleared_from = blob_after(e->key);
        if (e->at == W_SET)
            send_mutation(mutations, n, &cap, M_SET, blob_ref(e->key), blob_ref(e->value));
        for (size_t k = 0; k < e->n_ops; k++)
            send_mutation(mutations, n, &cap, e->ops[k].type, blob_ref(e->key),
                          blob_ref(e->ops[k].operand));
        if (conflicts_from && !e->at_conflicts) {
            ranges_add(conflicts, conflicts_from, blob_ref(e->key));
            conflicts_from = NULL;
        }
        if (!conflicts_from && e->at_conflicts)
            conflicts_from = blob_ref(e->key);
        if (conflicts_from && !e->gap_conflicts) {
            ranges_add(conflicts, conflicts_from, blob_after(e->key));
            conflicts_from = NULL;
        }
        if (!conflicts_from && e->gap_conflicts)
            conflicts_from = blob_after(e->key);
    }
    CHECK(!cleared_from && !conflicts_from);
    for (size_t i = 0; i < w->n_stamped; i++)
        send_mutation(mutations, n, &cap, M_VERSIONSTAMPED_KEY, blob_ref(w->stamped[i].key),
                      blob_ref(w->stamped[i].value));
}

void writes_unwritten(const struct writes *w, struct blob *begin, struct blob *end,
                      struct ranges *reads)
{
    if (blob_compare(begin, end) >= 0)
        return;
    if (!w || !w->n) {
        ranges_add(reads, blob_ref(begin), blob_ref(end));
        return;
    }
    struct blob *from = NULL;
    size_t i = find(w, begin->data, begin->len);
    bool inside = blob_compare(w->items[i].key, begin) == 0;
    if (!inside && !w->items[i].gap_cleared)
        from = blob_ref(begin);
    for (i = inside ? i : i + 1; i < w->n && blob_compare(w->items[i].key, end) < 0; i++) {
        const struct write *e = &w->items[i];
        bool known = e->at == W_SET || e->at == W_CLEARED || e->at == W_UNREADABLE;
        if (known && from) {
            ranges_add(reads, from, blob_ref(e->key));
            from = NULL;
        }
        if (!known && !from)
            from = blob_ref(e->key);
        if (e->gap_cleared && from) {
            ranges_add(reads, from, blob_after(e->key));
            from = NULL;
        }
        if (!e->gap_cleared && !from)
            from = blob_after(e->key);
    }
    if (!from)
        return;
    if (blob_compare(from, end) < 0)
        ranges_add(reads, from, blob_ref(end));
    else
        blob_unref(from);
}

/* --- atomic operations ----------------------------------------------------------------- */

/* `old`, cut or filled with zeros to the operand's length. */
static struct blob *fitted(struct blob *old, size_t len)
{
    struct blob *b = blob_new(NULL, len);
    size_t n = old ? (old->len < len ? old->len : len) : 0;
    if (n)
        memcpy(b->data, old->data, n);
    if (len > n)
        memset(b->data + n, 0, len - n);
    return b;
}

/* As little-endian numbers of one length. */
static int number_order(const struct blob *a, const struct blob *b)
{
    for (size_t i = a->len; i-- > 0;)
        if (a->data[i] != b->data[i])
            return a->data[i] < b->data[i] ? -1 : 1;
    return 0;
}

struct blob *atomic_apply(const struct atomic_op *op, struct blob *old)
{
    struct blob *operand = op->operand, *b;
    size_t len = operand->len;
    switch (op->type) {
    case M_ADD: {
        b = fitted(old, len);
        unsigned carry = 0;
        for (size_t i = 0; i < len; i++) {
            unsigned sum = carry + b->data[i] + operand->data[i];
            b->data[i] = (uint8_t)sum;
            carry = sum >> 8;
        }
        return b;
    }
    case M_AND:
        if (!old)
            return blob_ref(operand);
        b = fitted(old, len);
        for (size_t i = 0; i < len; i++)
            b->data[i] &= operand->data[i];
        return b;
    case M_OR:
        b = fitted(old, len);
        for (size_t i = 0; i < len; i++)
            b->data[i] |= operand->data[i];
        return b;
    case M_XOR:
        b = fitted(old, len);
        for (size_t i = 0; i < len; i++)
            b->data[i] ^= operand->data[i];
        return b;
    case M_MAX:
    case M_MIN:
        if (!old)
            return blob_ref(operand);
        b = fitted(old, len);
        if ((number_order(b, operand) > 0) == (op->type == M_MAX))
            return b;
        blob_unref(b);
        return blob_ref(operand);
    case M_BYTE_MIN:
        return blob_ref(old && blob_compare(old, operand) < 0 ? old : operand);
    case M_BYTE_MAX:
        return blob_ref(old && blob_compare(old, operand) > 0 ? old : operand);
    case M_APPEND_IF_FITS: {
        size_t old_len = old ? old->len : 0;
        if (old && old_len + len > VALUE_BYTES_MAX)
            return blob_ref(old);
        b = blob_new(NULL, old_len + len);
        if (old_len)
            memcpy(b->data, old->data, old_len);
        memcpy(b->data + old_len, operand->data, len);
        return b;
    }
    case M_COMPARE_AND_CLEAR:
        return old && blob_compare(old, operand) != 0 ? blob_ref(old) : NULL;
    default:
        return blob_ref(operand);
    }
}

struct blob *atomic_apply_all(const struct write *w, struct blob *old)
{
    struct blob *value = blob_ref(old);
    for (size_t i = 0; i < w->n_ops; i++) {
        struct blob *next = atomic_apply(&w->ops[i], value);
        blob_unref(value);
        value = next;
    }
    return value;
}

/* --- the merged view ------------------------------------------------------------------- */

/* What the view holds for `key`; `stored` is the cluster's value. False: no such key. */
static bool resolve(const struct write *e, bool exact, const struct blob *key, struct blob *stored,
                    struct seen *out, bool *unreadable)
{
    struct blob *value;
    if (!e || (!exact && !e->gap_cleared) || (exact && e->at == W_NOT)) {
        value = blob_ref(stored);
    } else if (!exact || e->at == W_CLEARED) {
        value = NULL;
    } else if (e->at == W_SET) {
        value = blob_ref(e->value);
    } else {
        *unreadable |= e->at == W_UNREADABLE;
        value = atomic_apply_all(e, stored);
    }
    if (!value)
        return false;
    *out = (struct seen){key, value};
    return true;
}

bool view_at_or_after(const struct view *v, const uint8_t *key, size_t len, struct seen *out,
                      bool *unreadable)
{
    const struct node *n = map_seek(key, len);
    const struct writes *w = v->writes && v->writes->n ? v->writes : NULL;
    size_t i = 0;
    if (w) {
        i = find(w, key, len);
        if (bytes_compare(w->items[i].key->data, w->items[i].key->len, key, len) < 0)
            i++;
    }
    for (;;) {
        /* Which comes first: a key of the cluster, one that was written, or both at once. */
        const struct write *e = w && i < w->n ? &w->items[i] : NULL;
        if (!n && !e)
            return false;
        int c = !e ? -1 : !n ? 1 : blob_compare(map_key(n), e->key);
        struct blob *stored = c <= 0 ? map_value(n, v->version) : NULL;
        const struct blob *at = c <= 0 ? map_key(n) : e->key;
        const struct write *holds = c >= 0 ? e : w && i ? &w->items[i - 1] : NULL;
        if (resolve(holds, c >= 0, at, stored, out, unreadable))
            return true;
        if (c >= 0)
            i++;
        if (c <= 0) {
            n = map_next(n);
            /* A long run of cleared keys is jumped over, not walked. */
            if (w && i && i < w->n && n && w->items[i - 1].gap_cleared &&
                blob_compare(map_key(n), w->items[i].key) < 0)
                n = map_seek(w->items[i].key->data, w->items[i].key->len);
        }
    }
}

bool view_before(const struct view *v, const uint8_t *key, size_t len, struct seen *out,
                 bool *unreadable)
{
    const struct writes *w = v->writes && v->writes->n ? v->writes : NULL;
    const struct node *n = map_before(key, len);
    size_t i = 0; /* the entries below i lie before */
    if (w) {
        i = find(w, key, len);
        if (bytes_compare(w->items[i].key->data, w->items[i].key->len, key, len) < 0)
            i++;
    }
    for (;;) {
        const struct write *e = w && i ? &w->items[i - 1] : NULL;
        if (!n && !e)
            return false;
        int c = !e ? 1 : !n ? -1 : blob_compare(map_key(n), e->key);
        struct blob *stored = c >= 0 ? map_value(n, v->version) : NULL;
        const struct blob *at = c >= 0 ? map_key(n) : e->key;
        if (resolve(e, c <= 0, at, stored, out, unreadable))
            return true;
        if (c >= 0)
            n = map_before(map_key(n)->data, map_key(n)->len);
        if (c <= 0)
            i--;
    }
}
