/*
 * The stored form of a value and the ways to find one.
 *
 * Every value carries a hash over itself, bound to its key: it covers what is too
 * large for a page, and all values of a store whose pages have no seals. There a
 * flipped bit in a key would make the key vanish without any hash to fail;
 * therefore absence is believed only where the neighbours of the place are whole
 * and in order, which a key that changed in place can't be.
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

/* Whether an entry of LM_DB_KEYS is whole and lies where it should. */
static bool entry_fits(const MDB_val *k, const MDB_val *data, struct slice key, bool before)
{
    struct lm_value v;
    int order = lm_key_compare(k, key);
    return lm_value_parse(k, data, &v) == ST_OK && (before ? order < 0 : order >= 0);
}

enum status lm_seek(struct lm_cursor *c, struct slice key, MDB_val *k, MDB_val *data)
{
    enum status st = key.len ? lm_cursor_seek(c, key, k, data) : lm_cursor_first(c, k, data);
    if (st && st != ST_NOTFOUND)
        return st;
    if (!st && !entry_fits(k, data, key, false))
        return ST_IO;
    if (key.len == 0 || c->tree->lm->sealed)
        return st;
    struct lm_cursor before = *c;
    MDB_val bk, bdata;
    enum status before_st = st ? lm_cursor_last(&before, &bk, &bdata)
                               : lm_cursor_prev(&before, &bk, &bdata);
    if (before_st ? before_st != ST_NOTFOUND : !entry_fits(&bk, &bdata, key, true))
        return ST_IO;
    return st;
}

enum status lm_lookup(struct lm_tree *tree, struct slice key, struct lm_value *v)
{
    if (key.len == 0 || key.len > STORE_KEY_BYTES_MAX)
        return ST_NOTFOUND;
    MDB_val k = {key.len, (void *)(uintptr_t)key.data}, data;
    enum status st = lm_tree_get(tree, LM_DB_KEYS, key, &data);
    if (!st)
        return lm_value_parse(&k, &data, v);
    if (st != ST_NOTFOUND || tree->lm->sealed)
        return st;
    struct lm_cursor c = lm_cursor(tree, LM_DB_KEYS);
    st = lm_seek(&c, key, &k, &data);
    return st == ST_OK ? ST_NOTFOUND : st;
}
