/*
 * The stored form of a value and the ways to find one.
 *
 * LMDB does not hash its pages, so every value carries a hash over itself, bound
 * to its key. A flipped bit in a key would make the key vanish without any hash
 * to fail; therefore absence is believed only where the neighbours of the place
 * are whole and in order, which a key that changed in place can't be.
 */
#include <string.h>

#include "base/hash.h"
#include "store/lmdb/engine.h"

#define VALUE_PLAIN 1u
#define VALUE_BODY 2u
#define VALUE_HEADER_BYTES 16u
#define KEY_SEED 0x4c4d4b45u

uint64_t lm_key_hash(const void *key, size_t len)
{
    return hash64(key, len, KEY_SEED);
}

enum status lm_value_parse(const MDB_val *key, const MDB_val *data, struct lm_value *v)
{
    /* A damaged length must not lead out of the map, so it is limited before it is used. */
    if (key->mv_size == 0 || key->mv_size > STORE_KEY_BYTES_MAX ||
        data->mv_size < VALUE_HEADER_BYTES || data->mv_size > LM_VALUE_BYTES_MAX)
        return ST_IO;
    const uint8_t *p = data->mv_data;
    uint64_t seed = lm_key_hash(key->mv_data, key->mv_size);
    if (get_le64(p) != hash64(p + 8, data->mv_size - 8, seed))
        return ST_IO;
    unsigned kind = p[8];
    v->n_pieces = get_le16(p + 10);
    v->body_len = get_le32(p + 12);
    size_t before = VALUE_HEADER_BYTES + (kind == VALUE_PLAIN ? 8u : 8u * v->n_pieces);
    if ((kind != VALUE_PLAIN && kind != VALUE_BODY) || before > data->mv_size)
        return ST_IO;
    v->pieces = p + VALUE_HEADER_BYTES;
    v->head = (struct slice){p + before, data->mv_size - before};
    return ST_OK;
}

size_t lm_value_build(uint8_t *out, const MDB_val *key, uint64_t txn_id, struct slice head,
                      uint32_t body_len, const uint64_t *pieces, uint32_t n_pieces)
{
    size_t at = VALUE_HEADER_BYTES;
    out[8] = n_pieces ? VALUE_BODY : VALUE_PLAIN;
    out[9] = 0;
    put_le16(out + 10, (uint16_t)n_pieces);
    put_le32(out + 12, body_len);
    if (n_pieces == 0) {
        /* So that a value set again differs from the one before, for watches. */
        put_le64(out + at, txn_id);
        at += 8;
    }
    for (uint32_t i = 0; i < n_pieces; i++, at += 8)
        put_le64(out + at, pieces[i]);
    if (head.len)
        memcpy(out + at, head.data, head.len);
    at += head.len;
    put_le64(out, hash64(out + 8, at - 8, lm_key_hash(key->mv_data, key->mv_size)));
    return at;
}

static int key_compare(const MDB_val *a, struct slice b)
{
    int c = memcmp(a->mv_data, b.data, a->mv_size < b.len ? a->mv_size : b.len);
    return c ? c : a->mv_size < b.len ? -1 : a->mv_size > b.len;
}

/* Whether the entry before the cursor's, or the last one (`at_end`), is whole and lies
 * before `key`. Leaves the cursor there. */
static enum status check_before(MDB_cursor *cursor, struct slice key, bool at_end, bool *failed)
{
    MDB_val k, data;
    struct lm_value v;
    int rc = mdb_cursor_get(cursor, &k, &data, at_end ? MDB_LAST : MDB_PREV);
    if (rc == MDB_NOTFOUND)
        return ST_OK;
    if (rc) {
        *failed = true;
        return ST_IO;
    }
    if (lm_value_parse(&k, &data, &v) || key_compare(&k, key) >= 0)
        return ST_IO;
    return ST_OK;
}

enum status lm_seek(MDB_cursor *cursor, struct slice key, MDB_val *k, MDB_val *data, bool *failed)
{
    *k = (MDB_val){key.len, (void *)(uintptr_t)key.data};
    int rc = mdb_cursor_get(cursor, k, data, key.len ? MDB_SET_RANGE : MDB_FIRST);
    if (rc && rc != MDB_NOTFOUND) {
        *failed = true;
        return ST_IO;
    }
    bool at_end = rc == MDB_NOTFOUND;
    struct lm_value v;
    if (!at_end && (lm_value_parse(k, data, &v) || (key.len && key_compare(k, key) < 0)))
        return ST_IO;
    if (key.len == 0)
        return at_end ? ST_NOTFOUND : ST_OK;
    enum status st = check_before(cursor, key, at_end, failed);
    if (st)
        return st;
    if (at_end)
        return ST_NOTFOUND;
    /* Back to the entry found; where nothing was before it, it is the first. */
    *k = (MDB_val){key.len, (void *)(uintptr_t)key.data};
    rc = mdb_cursor_get(cursor, k, data, MDB_SET_RANGE);
    if (rc) {
        *failed = true;
        return ST_IO;
    }
    return ST_OK;
}

enum status lm_lookup(MDB_cursor *cursor, struct slice key, struct lm_value *v, bool *failed)
{
    if (key.len == 0 || key.len > STORE_KEY_BYTES_MAX)
        return ST_NOTFOUND;
    MDB_val k = {key.len, (void *)(uintptr_t)key.data}, data;
    int rc = mdb_cursor_get(cursor, &k, &data, MDB_SET_RANGE);
    if (rc && rc != MDB_NOTFOUND) {
        *failed = true;
        return ST_IO;
    }
    if (!rc) {
        int c = key_compare(&k, key);
        if (lm_value_parse(&k, &data, v) || c < 0)
            return ST_IO;
        if (c == 0)
            return ST_OK;
    }
    enum status st = check_before(cursor, key, rc == MDB_NOTFOUND, failed);
    return st ? st : ST_NOTFOUND;
}
