/*
 * Verifying volumes: stores made by hand, with one thing broken at a time.
 *
 * A volume of three level-1 rows with two snapshots, and a clone of the older one. What each
 * state holds stands in an array; rows, blocks and records are made from that.
 */
#include "store_test.h"

#include "volume/ancestry.h"
#include "volume/codec.h"
#include "volume/mask.h"
#include "volume/verify.h"

#define VOLUME 7u
#define CLONE 8u
#define BS 4096u
#define BLOCKS 3000u
#define ROWS ((BLOCKS + INDEX_FANOUT - 1) / INDEX_FANOUT)
#define FINDINGS_MAX 32u

/* Where a block of a state is; epoch 0: never written, or zeros. */
struct source {
    uint64_t branch, epoch;
};

struct verify_test {
    struct test_store store;
    struct verify verify;
    struct verify_finding found[FINDINGS_MAX];
    size_t n_found;
    void (*meanwhile)(struct verify_test *t); /* called once, at this look around */
    unsigned at_look, looks;
    uint64_t data_blocks[3];
};

/* ---- making ---- */

static void set_body(struct verify_test *t, const struct key *key, struct slice head,
                     struct slice body)
{
    struct store_mutation m = {
        .kind = STORE_SET, .key = key_slice(key), .head = head, .body = body};
    assert_int_equal(test_commit(&t->store, NULL, 0, &m, 1), ST_OK);
}

static void set(struct verify_test *t, const struct key *key, const uint8_t *bytes, size_t len)
{
    set_body(t, key, (struct slice){bytes, len}, (struct slice){NULL, 0});
}

static void clear(struct verify_test *t, const struct key *key)
{
    struct store_mutation m = {.kind = STORE_CLEAR, .key = key_slice(key)};
    assert_int_equal(test_commit(&t->store, NULL, 0, &m, 1), ST_OK);
}

/* `lost`: that many bytes in the middle are left out by a mask. */
static void put_block(struct verify_test *t, uint64_t branch, uint64_t epoch, uint64_t no,
                      uint32_t lost)
{
    struct block_place place = {branch, epoch, no};
    uint8_t data[BS], out[BS], head[BLOCK_HEAD_BYTES_MAX + 600], *stored = NULL;
    struct mask mask;
    struct slice body, mask_bytes = {NULL, 0};
    struct key key;
    for (uint32_t i = 0; i < BS; i++)
        data[i] = (uint8_t)(no * 31 + epoch * 7 + i);
    mask_init(&mask);
    if (lost) {
        mask_add(&mask, BS, 0, 1024);
        mask_add(&mask, BS, 1024 + lost, BS);
        mask_bytes.len = mask_encode(&mask, BS, &stored);
        mask_bytes.data = stored;
    }
    size_t len = block_encode((struct codec){CODEC_NONE, 0}, &place, 1, data, BS, BS, mask_bytes,
                              out, head, &body);
    key_block(&key, branch, epoch, no);
    set_body(t, &key, (struct slice){head, len}, body);
    mask_free(&mask);
    free(stored);
}

static bool same(struct source a, struct source b)
{
    return a.branch == b.branch && a.epoch == b.epoch;
}

/* Stores what a state of `epoch` has that the one before it (NULL: none) has not. `row_at`: where
 * the level-1 rows are that count for it. */
static uint64_t put_state(struct verify_test *t, uint64_t branch, uint64_t epoch,
                          const struct source *before, const struct source *now,
                          struct source row_at[ROWS])
{
    static uint8_t bytes[ROW_BYTES_MAX];
    struct row2 *row2 = mem_alloc(sizeof *row2);
    struct key key;
    uint64_t n_data = 0;
    row2_init(row2);
    for (uint64_t r = 0; r < ROWS; r++) {
        struct row1 row;
        row1_init(&row);
        bool changed = false;
        for (uint64_t i = 0; i < INDEX_FANOUT && r * INDEX_FANOUT + i < BLOCKS; i++) {
            uint64_t no = r * INDEX_FANOUT + i;
            struct source was = before ? before[no] : (struct source){0, 0};
            changed |= !same(was, now[no]);
            if (now[no].epoch)
                row1_set_data(&row, (unsigned)i, now[no].branch, now[no].epoch);
            if (now[no].branch == branch && now[no].epoch == epoch && !same(was, now[no]))
                put_block(t, branch, epoch, no, 0);
        }
        if (changed) {
            row_at[r] = (struct source){branch, epoch};
            key_row(&key, branch, 1, r, epoch);
            set(t, &key, bytes, row1_encode(&row, key_slice(&key), bytes));
        }
        if (row_at[r].epoch)
            row2->entry[r] =
                (struct row2_entry){.kind = ROW2_ROW,
                                    .epoch = row_at[r].epoch,
                                    .branch = row_at[r].branch == branch ? 0 : row_at[r].branch,
                                    .n_data = (uint16_t)row.n_data};
        n_data += row.n_data;
        row1_free(&row);
    }
    key_row(&key, branch, 2, 0, epoch);
    set(t, &key, bytes, row2_encode(row2, key_slice(&key), bytes));
    free(row2);
    return n_data;
}

static void put_snapshot(struct verify_test *t, uint64_t epoch, const char *name, bool removed,
                         uint64_t data_blocks)
{
    struct key key;
    uint8_t bytes[RECORD_BYTES_MAX];
    struct snapshot_record rec = {
        .removed = removed, .size = BLOCKS * BS, .data_blocks = data_blocks};
    snprintf(rec.name, sizeof rec.name, "%s", name);
    key_snapshot(&key, VOLUME, epoch);
    set(t, &key, bytes, snapshot_encode(&rec, key_slice(&key), bytes));
}

static void put_state_record(struct verify_test *t, uint64_t branch, uint64_t data_blocks)
{
    struct key key;
    uint8_t bytes[RECORD_BYTES_MAX];
    struct state_record rec = {.generation = 5, .data_blocks = data_blocks, .trash_next = 3};
    key_state(&key, branch);
    set(t, &key, bytes, state_encode(&rec, key_slice(&key), bytes));
}

static void put_owner(struct verify_test *t, uint64_t branch, uint64_t token)
{
    struct key key;
    uint8_t bytes[RECORD_BYTES_MAX];
    struct owner_record rec = {.token = token};
    key_owner(&key, branch);
    set(t, &key, bytes, owner_encode(&rec, key_slice(&key), bytes));
}

static void put_ancestry(struct verify_test *t, uint64_t branch, const struct ancestry_record *rec)
{
    struct key key;
    uint8_t bytes[RECORD_BYTES_MAX];
    key_ancestry(&key, branch);
    set(t, &key, bytes, ancestry_encode(rec, key_slice(&key), bytes));
}

static void put_branch(struct verify_test *t, uint64_t branch, uint64_t epoch, uint64_t parent,
                       uint64_t data_blocks)
{
    struct key key;
    uint8_t bytes[RECORD_BYTES_MAX];
    struct header_record rec = {.features.incompat = FEATURE_INCOMPAT_HISTORY,
                                .size = BLOCKS * BS,
                                .block_size = BS,
                                .epoch = epoch,
                                .parent_branch = parent,
                                .parent_epoch = parent ? 2 : 0};
    key_header(&key, branch);
    set(t, &key, bytes, header_encode(&rec, key_slice(&key), bytes));
    put_state_record(t, branch, data_blocks);
    put_owner(t, branch, 4);
}

static void put_trash(struct verify_test *t, uint64_t n, uint64_t after, uint64_t epoch,
                      uint64_t first, uint64_t end)
{
    struct key key;
    uint8_t bytes[RECORD_BYTES_MAX];
    struct trash_record rec = {
        .after = after, .epoch = epoch, .first_block = first, .end_block = end};
    key_trash(&key, VOLUME, n);
    set(t, &key, bytes, trash_encode(&rec, key_slice(&key), bytes));
}

static void put_child(struct verify_test *t, uint64_t child)
{
    struct key key;
    uint8_t bytes[RECORD_BYTES_MAX];
    struct child_record rec = {1};
    key_child(&key, VOLUME, 2, child);
    set(t, &key, bytes, child_encode(&rec, key_slice(&key), bytes));
}

/*
 * Snapshot "old" of epoch 2: blocks 0 to 9, 1500 and 2100, of epochs 1 and 2.
 * Snapshot "new" of epoch 3: 3 and 2000 are others.
 * The volume, epoch 5: 4 is another, 0 and 1500 are not there.
 * The clone of "old": 5 is another.
 */
static void make(struct verify_test *t)
{
    static struct source old[BLOCKS], new[BLOCKS], volume[BLOCKS], clone[BLOCKS];
    struct source rows[ROWS] = {{0, 0}}, clone_rows[ROWS];
    memset(old, 0, sizeof old);
    for (uint64_t no = 0; no < 10; no++)
        old[no] = (struct source){VOLUME, 2};
    old[1500] = old[2100] = (struct source){VOLUME, 2};
    old[8] = old[9] = (struct source){VOLUME, 1};
    put_block(t, VOLUME, 1, 8, 0);
    put_block(t, VOLUME, 1, 9, 0);
    t->data_blocks[0] = put_state(t, VOLUME, 2, NULL, old, rows);
    memcpy(clone_rows, rows, sizeof rows);
    memcpy(new, old, sizeof old);
    new[3] = new[2000] = (struct source){VOLUME, 3};
    t->data_blocks[1] = put_state(t, VOLUME, 3, old, new, rows);
    memcpy(volume, new, sizeof new);
    volume[4] = (struct source){VOLUME, 5};
    volume[0] = volume[1500] = (struct source){0, 0};
    t->data_blocks[2] = put_state(t, VOLUME, 5, new, volume, rows);
    put_snapshot(t, 2, "old", false, t->data_blocks[0]);
    put_snapshot(t, 3, "new", false, t->data_blocks[1]);
    put_branch(t, VOLUME, 5, 0, t->data_blocks[2]);

    memcpy(clone, old, sizeof old);
    clone[5] = (struct source){CLONE, 1};
    uint64_t n = put_state(t, CLONE, 1, old, clone, clone_rows);
    put_branch(t, CLONE, 1, VOLUME, n);
    struct ancestry_record none = {0}, a;
    assert_true(ancestry_of_snapshot(&none, VOLUME, 2, &a));
    put_ancestry(t, CLONE, &a);
    put_child(t, CLONE);
}

/* ---- running ---- */

static void run_once(struct env *env)
{
    test_env_step(test_env_of(env), 1000);
}

static struct verify_test *test_of(struct verify *v)
{
    return container_of(v, struct verify_test, verify);
}

static bool go_on(struct verify *v)
{
    struct verify_test *t = test_of(v);
    if (t->meanwhile && ++t->looks == t->at_look)
        t->meanwhile(t);
    return true;
}

static void found(struct verify *v, const struct verify_finding *f)
{
    struct verify_test *t = test_of(v);
    assert_true(t->n_found < FINDINGS_MAX);
    t->found[t->n_found++] = *f;
}

static enum status verify(struct verify_test *t, uint64_t branch, uint64_t upto, bool repair)
{
    struct err e = {0};
    verify_free(&t->verify);
    t->verify = (struct verify){.store = t->store.store,
                                .env = &t->store.env.env,
                                .run_once = run_once,
                                .branch = branch,
                                .upto = upto,
                                .repair = repair,
                                .go_on = go_on,
                                .found = found};
    t->n_found = t->looks = 0;
    return verify_run(&t->verify, &e);
}

static int begin(void **state)
{
    struct verify_test *t = mem_zalloc(sizeof *t);
    test_store_begin(&t->store, NULL);
    make(t);
    *state = t;
    return 0;
}

static int end(void **state)
{
    struct verify_test *t = *state;
    verify_free(&t->verify);
    test_store_end(&t->store);
    free(t);
    return 0;
}

static void show(const struct verify_test *t)
{
    for (size_t i = 0; i < t->n_found; i++) {
        const struct verify_finding *f = &t->found[i];
        print_message("# what %d states %zd..%zd bytes %llu+%llu %s n %llu said %llu is %llu%s\n",
                      f->what, (ssize_t)f->first_state, (ssize_t)f->last_state,
                      (unsigned long long)f->offset, (unsigned long long)f->length, f->key,
                      (unsigned long long)f->n_keys, (unsigned long long)f->said,
                      (unsigned long long)f->is, f->repaired ? " repaired" : "");
    }
}

static void expect_count(struct verify_test *t, uint64_t branch, size_t n)
{
    assert_int_equal(verify(t, branch, 0, false), ST_OK);
    if (t->n_found != n)
        show(t);
    assert_int_equal(t->n_found, n);
}

/* One thing is wrong, as seen by the volume itself. */
static const struct verify_finding *expect_one(struct verify_test *t, uint64_t branch,
                                               enum verify_what what, size_t first, size_t last,
                                               uint64_t block, uint64_t n_blocks, const char *key)
{
    expect_count(t, branch, 1);
    const struct verify_finding *f = &t->found[0];
    if (f->what != what || f->first_state != first || f->last_state != last)
        show(t);
    assert_int_equal(f->what, what);
    assert_int_equal(f->first_state, first);
    assert_int_equal(f->last_state, last);
    assert_int_equal(f->offset, block * BS);
    assert_int_equal(f->length, n_blocks * BS);
    assert_string_equal(f->key, key);
    assert_false(f->repaired);
    return f;
}

/* Flips a bit of a stored head, or where `body` of the body. */
static void flip(struct verify_test *t, const struct key *key, bool body)
{
    static uint8_t head[ROW_BYTES_MAX], bytes[BS];
    struct store_get get = {.key = key_slice(key), .body = bytes, .body_cap = sizeof bytes};
    struct test_read r = {.read = {.gets = &get, .n_gets = 1}};
    assert_int_equal(test_read(&t->store, &r), ST_OK);
    assert_int_equal(get.st, ST_OK);
    memcpy(head, get.head.data, get.head.len);
    size_t head_len = get.head.len, body_len = get.body_len;
    store_read_release(&r.read);
    (body ? bytes : head)[(body ? body_len : head_len) / 2] ^= 4;
    set_body(t, key, (struct slice){head, head_len}, (struct slice){bytes, body_len});
}

static bool is_there(struct verify_test *t, const struct key *key)
{
    struct store_get get = {.key = key_slice(key)};
    struct test_read r = {.read = {.gets = &get, .n_gets = 1}};
    assert_int_equal(test_read(&t->store, &r), ST_OK);
    store_read_release(&r.read);
    return get.st == ST_OK;
}

/* ---- tests ---- */

static void nothing_is_wrong(void **state)
{
    struct verify_test *t = *state;
    expect_count(t, VOLUME, 0);
    assert_int_equal(t->verify.n_states, 3);
    /* Each block once, whoever names it: 12, 2, 1. */
    assert_int_equal(t->verify.n_blocks, 15);
    assert_int_equal(t->verify.n_bytes, 15 * BS);
    expect_count(t, CLONE, 0);
    assert_int_equal(t->verify.n_states, 1);
    assert_int_equal(t->verify.n_blocks, 12);
    /* At a snapshot: nothing of what came later is looked at. */
    struct key key;
    key_block(&key, VOLUME, 5, 4);
    flip(t, &key, true);
    key_block(&key, VOLUME, 4, 999);
    set(t, &key, (const uint8_t *)"x", 1);
    assert_int_equal(verify(t, VOLUME, 3, false), ST_OK);
    assert_int_equal(t->n_found, 0);
    assert_int_equal(t->verify.n_states, 2);
    assert_int_equal(t->verify.n_blocks, 14);
    assert_int_equal(verify(t, VOLUME, 4, false), ST_BUSY); /* there is none */
    assert_int_equal(verify(t, 99, 0, false), ST_NOTFOUND);
}

static void damaged_blocks(void **state)
{
    struct verify_test *t = *state;
    struct key key;
    /* Of the oldest snapshot alone, for the next one has another; body, then head. */
    for (int body = 0; body < 2; body++) {
        key_block(&key, VOLUME, 2, 3);
        flip(t, &key, body);
        expect_one(t, VOLUME, VERIFY_BLOCK_DAMAGED, 0, 0, 3, 1, "(\"b\", 7, 2, 3)");
        flip(t, &key, body);
    }
    /* Of all three; the clone has another. */
    key_block(&key, VOLUME, 2, 5);
    flip(t, &key, true);
    expect_one(t, VOLUME, VERIFY_BLOCK_DAMAGED, 0, 2, 5, 1, "(\"b\", 7, 2, 5)");
    expect_count(t, CLONE, 0);
    flip(t, &key, true);
    /* Inherited. */
    key_block(&key, VOLUME, 2, 2100);
    flip(t, &key, true);
    expect_one(t, CLONE, VERIFY_BLOCK_DAMAGED, 0, 0, 2100, 1, "(\"b\", 7, 2, 2100)");
    flip(t, &key, true);
    /* Of both snapshots: the volume has let go of it. */
    key_block(&key, VOLUME, 2, 1500);
    flip(t, &key, true);
    expect_one(t, VOLUME, VERIFY_BLOCK_DAMAGED, 0, 1, 1500, 1, "(\"b\", 7, 2, 1500)");
    /* What a repair can't bring back stays. */
    assert_int_equal(verify(t, VOLUME, 0, true), ST_OK);
    assert_int_equal(t->verify.n_wrong, 1);
    assert_int_equal(t->verify.n_repaired, 0);
    assert_true(is_there(t, &key));
}

static void missing_blocks(void **state)
{
    struct verify_test *t = *state;
    struct key key;
    for (uint64_t no = 6; no < 8; no++) {
        key_block(&key, VOLUME, 2, no);
        clear(t, &key);
    }
    const struct verify_finding *f =
        expect_one(t, VOLUME, VERIFY_BLOCK_MISSING, 0, 2, 6, 2, "(\"b\", 7, 2, 6)");
    assert_int_equal(f->n_keys, 2);
    /* Another one's place is no better. */
    put_block(t, VOLUME, 2, 6, 0);
    key_block(&key, VOLUME, 3, 3);
    clear(t, &key);
    expect_count(t, VOLUME, 2);
}

static void lost_bytes(void **state)
{
    struct verify_test *t = *state;
    put_block(t, VOLUME, 3, 2000, 512);
    expect_count(t, VOLUME, 1);
    assert_int_equal(t->found[0].what, VERIFY_BYTES_LOST);
    assert_int_equal(t->found[0].first_state, 1);
    assert_int_equal(t->found[0].last_state, 2);
    assert_int_equal(t->found[0].offset, 2000 * BS + 1024);
    assert_int_equal(t->found[0].length, 512);
}

static void damaged_rows(void **state)
{
    struct verify_test *t = *state;
    struct key key;
    /* Level 1, of the snapshot "new" alone: the volume has another. Its count can't be known. */
    key_row(&key, VOLUME, 1, 0, 3);
    flip(t, &key, false);
    expect_one(t, VOLUME, VERIFY_ROW_DAMAGED, 1, 1, 0, 1024, "(\"i\", 7, 1, 0, 3)");
    flip(t, &key, false);
    clear(t, &key);
    expect_one(t, VOLUME, VERIFY_ROW_MISSING, 1, 1, 0, 1024, "(\"i\", 7, 1, 0, 3)");
    assert_int_equal(verify(t, VOLUME, 0, true), ST_OK);
    assert_int_equal(t->verify.n_repaired, 0);
    /* Level 2. Nothing below it is taken for unnamed, and nothing is repaired away. */
    key_row(&key, VOLUME, 2, 0, 2);
    flip(t, &key, false);
    assert_int_equal(verify(t, VOLUME, 0, true), ST_OK);
    assert_int_equal(t->n_found, 2);
    assert_int_equal(t->found[0].what, VERIFY_ROW_DAMAGED);
    assert_string_equal(t->found[0].key, "(\"i\", 7, 2, 0, 2)");
    assert_int_equal(t->found[0].first_state, 0);
    assert_int_equal(t->found[0].last_state, 0);
    assert_int_equal(t->found[0].length, (uint64_t)BS << 20);
    assert_int_equal(t->verify.n_repaired, 0);
}

/* A level-2 row that is gone does not show by itself: an older one counts in its place. What it
 * named is worth keeping. */
static void lost_row2(void **state)
{
    struct verify_test *t = *state;
    struct key row, block;
    key_row(&row, VOLUME, 2, 0, 5);
    key_block(&block, VOLUME, 5, 4);
    clear(t, &row);
    assert_int_equal(verify(t, VOLUME, 0, true), ST_OK);
    bool counted = false, unnamed = false;
    for (size_t i = 0; i < t->n_found; i++) {
        counted |= t->found[i].what == VERIFY_COUNT && t->found[i].first_state == 2;
        unnamed |= t->found[i].what == VERIFY_BLOCK_UNNAMED;
    }
    if (!counted || !unnamed || t->verify.n_repaired)
        show(t);
    assert_true(counted);
    assert_true(unnamed);
    assert_int_equal(t->verify.n_repaired, 0);
    assert_true(is_there(t, &block));
}

static void wrong_counts(void **state)
{
    struct verify_test *t = *state;
    struct key key;
    uint8_t bytes[ROW_BYTES_MAX];
    put_state_record(t, VOLUME, t->data_blocks[2] + 1);
    expect_count(t, VOLUME, 1);
    assert_int_equal(t->found[0].what, VERIFY_COUNT);
    assert_int_equal(t->found[0].said, t->data_blocks[2] + 1);
    assert_int_equal(t->found[0].is, t->data_blocks[2]);
    put_snapshot(t, 2, "old", false, 3);
    /* And level 2 of the volume. */
    struct row2 *row = mem_alloc(sizeof *row);
    struct store_get get = {.key = key_slice(&key)};
    struct test_read r = {.read = {.gets = &get, .n_gets = 1}};
    key_row(&key, VOLUME, 2, 0, 5);
    get.key = key_slice(&key);
    assert_int_equal(test_read(&t->store, &r), ST_OK);
    assert_true(row2_decode(row, key_slice(&key), get.head));
    store_read_release(&r.read);
    row->entry[0].n_data++;
    set(t, &key, bytes, row2_encode(row, key_slice(&key), bytes));
    free(row);
    assert_int_equal(verify(t, VOLUME, 0, false), ST_OK);
    assert_int_equal(t->verify.n_wrong, 3);
    assert_int_equal(t->verify.n_repaired, 0);
    assert_int_equal(verify(t, VOLUME, 0, true), ST_OK);
    assert_int_equal(t->verify.n_wrong, 3);
    assert_int_equal(t->verify.n_repaired, 3);
    expect_count(t, VOLUME, 0);
}

static void unnamed_keys(void **state)
{
    struct verify_test *t = *state;
    struct key keys[5];
    static uint8_t bytes[ROW_BYTES_MAX];
    /* Of a snapshot's epoch, of one between (it is the volume's then), of one that has not begun.
     */
    put_block(t, VOLUME, 3, 77, 0);
    put_block(t, VOLUME, 4, 78, 0);
    put_block(t, VOLUME, 9, 79, 0);
    key_block(&keys[0], VOLUME, 3, 77);
    key_block(&keys[1], VOLUME, 4, 78);
    key_block(&keys[2], VOLUME, 9, 79);
    struct row1 row1;
    struct row2 *row2 = mem_alloc(sizeof *row2);
    row1_init(&row1);
    row2_init(row2);
    key_row(&keys[3], VOLUME, 1, 2, 3);
    set(t, &keys[3], bytes, row1_encode(&row1, key_slice(&keys[3]), bytes));
    key_row(&keys[4], VOLUME, 2, 0, 4);
    set(t, &keys[4], bytes, row2_encode(row2, key_slice(&keys[4]), bytes));
    row1_free(&row1);
    free(row2);
    expect_count(t, VOLUME, 5);
    for (size_t i = 0; i < 5; i++) {
        assert_true(t->found[i].what == VERIFY_BLOCK_UNNAMED ||
                    t->found[i].what == VERIFY_ROW_UNNAMED);
        assert_int_equal(t->found[i].first_state, VERIFY_NOBODY);
        assert_true(is_there(t, &keys[i]));
    }
    /* At a snapshot, what is of later epochs is not judged. */
    assert_int_equal(verify(t, VOLUME, 3, false), ST_OK);
    assert_int_equal(t->n_found, 2);
    assert_int_equal(verify(t, VOLUME, 0, true), ST_OK);
    assert_int_equal(t->verify.n_wrong, 5);
    assert_int_equal(t->verify.n_repaired, 5);
    for (size_t i = 0; i < 5; i++)
        assert_false(is_there(t, &keys[i]));
    expect_count(t, VOLUME, 0);
}

/* What somebody is about to clear is not wrong. */
static void explained_keys(void **state)
{
    struct verify_test *t = *state;
    struct key key;
    put_block(t, VOLUME, 3, 77, 0);
    expect_count(t, VOLUME, 1);
    put_trash(t, 1, 2, 3, 70, 78);
    expect_count(t, VOLUME, 0);
    put_trash(t, 1, 1, 2, 70, 78); /* another epoch */
    expect_count(t, VOLUME, 1);
    put_trash(t, 1, 2, 3, 70, 77); /* another place */
    expect_count(t, VOLUME, 1);
    key_trash(&key, VOLUME, 1);
    clear(t, &key);
    /* The snapshot it belonged to is removed; it is the volume's neighbour then. */
    put_snapshot(t, 3, "new", true, t->data_blocks[1]);
    expect_count(t, VOLUME, 0);
    assert_int_equal(t->verify.n_states, 2);
    put_snapshot(t, 3, "new", false, t->data_blocks[1]);
    expect_count(t, VOLUME, 1);
    key_block(&key, VOLUME, 3, 77);
    clear(t, &key);
    /* Rolled back to epoch 3: what is of epoch 4 is being cleared. */
    put_block(t, VOLUME, 4, 78, 0);
    expect_count(t, VOLUME, 1);
    put_ancestry(
        t, VOLUME,
        &(struct ancestry_record){.after = 4, .n_segments = 1, .segments = {{VOLUME, 0, 3}}});
    expect_count(t, VOLUME, 0);
}

static void bad_records(void **state)
{
    struct verify_test *t = *state;
    struct key key;
    /* A clone that is not there; a trash record that is none. */
    put_child(t, 55);
    expect_one(t, VOLUME, VERIFY_RECORD, VERIFY_NOBODY, VERIFY_NOBODY, 0, 0, "(\"d\", 7, 2, 55)");
    put_trash(t, 1, 2, 3, 70, 78);
    key_trash(&key, VOLUME, 1);
    flip(t, &key, false);
    put_trash(t, 3, 2, 3, 70, 78); /* its number is not given away yet */
    expect_count(t, VOLUME, 3);
    assert_int_equal(verify(t, VOLUME, 0, true), ST_OK);
    assert_int_equal(t->verify.n_repaired, 3);
    assert_false(is_there(t, &key));
    key_child(&key, VOLUME, 2, CLONE);
    assert_true(is_there(t, &key));
    expect_count(t, VOLUME, 0);
    /* A snapshot nobody can read: what it names is not judged. */
    key_snapshot(&key, VOLUME, 3);
    flip(t, &key, false);
    expect_one(t, VOLUME, VERIFY_RECORD, VERIFY_NOBODY, VERIFY_NOBODY, 0, 0, "(\"v\", 7, 3)");
    key_state(&key, VOLUME);
    flip(t, &key, false);
    assert_int_equal(verify(t, VOLUME, 0, false), ST_IO);
}

/* The oldest snapshot is removed while it is read, and its blocks are cleared. */
static void remove_old(struct verify_test *t)
{
    struct key key;
    put_snapshot(t, 2, "old", true, t->data_blocks[0]);
    key_block(&key, VOLUME, 2, 3);
    clear(t, &key);
}

static void snapshots_removed_meanwhile(void **state)
{
    struct verify_test *t = *state;
    struct key key;
    key_block(&key, VOLUME, 2, 3);
    clear(t, &key);
    expect_count(t, VOLUME, 1);
    t->meanwhile = remove_old;
    t->at_look = 1;
    assert_int_equal(verify(t, VOLUME, 3, false), ST_OK);
    if (t->n_found)
        show(t);
    assert_int_equal(t->n_found, 0);
    assert_true(t->verify.states[0].gone);
}

static void clear_leak(struct verify_test *t)
{
    struct key key;
    key_block(&key, VOLUME, 3, 77);
    clear(t, &key);
}

/* Seen in a listing, and cleared by the time it is looked at again. */
static void cleared_meanwhile(void **state)
{
    struct verify_test *t = *state;
    put_block(t, VOLUME, 3, 77, 0);
    unsigned looks = 0;
    t->meanwhile = clear_leak;
    for (t->at_look = 100; t->at_look > 0; t->at_look = looks) {
        put_block(t, VOLUME, 3, 77, 0);
        assert_int_equal(verify(t, VOLUME, 3, false), ST_OK);
        if (t->at_look == 100) {
            /* Never reached: it is found. The last look is the one after the second listing. */
            assert_int_equal(t->n_found, 1);
            looks = t->looks;
            continue;
        }
        assert_int_equal(t->n_found, 0);
        looks--;
    }
}

static void take_volume(struct verify_test *t)
{
    put_owner(t, VOLUME, 5);
}

/* Somebody takes the volume: nothing is repaired under its hands. */
static void taken_meanwhile(void **state)
{
    struct verify_test *t = *state;
    struct key key;
    put_block(t, VOLUME, 3, 77, 0);
    t->meanwhile = take_volume;
    t->at_look = 1;
    assert_int_equal(verify(t, VOLUME, 0, true), ST_BUSY);
    key_block(&key, VOLUME, 3, 77);
    assert_true(is_there(t, &key));
    put_owner(t, VOLUME, 4);
    clear(t, &key);
    put_state_record(t, VOLUME, 1);
    assert_int_equal(verify(t, VOLUME, 0, true), ST_BUSY);
    assert_int_equal(t->verify.n_repaired, 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(nothing_is_wrong, begin, end),
        cmocka_unit_test_setup_teardown(damaged_blocks, begin, end),
        cmocka_unit_test_setup_teardown(missing_blocks, begin, end),
        cmocka_unit_test_setup_teardown(lost_bytes, begin, end),
        cmocka_unit_test_setup_teardown(damaged_rows, begin, end),
        cmocka_unit_test_setup_teardown(lost_row2, begin, end),
        cmocka_unit_test_setup_teardown(wrong_counts, begin, end),
        cmocka_unit_test_setup_teardown(unnamed_keys, begin, end),
        cmocka_unit_test_setup_teardown(explained_keys, begin, end),
        cmocka_unit_test_setup_teardown(bad_records, begin, end),
        cmocka_unit_test_setup_teardown(snapshots_removed_meanwhile, begin, end),
        cmocka_unit_test_setup_teardown(cleared_meanwhile, begin, end),
        cmocka_unit_test_setup_teardown(taken_meanwhile, begin, end),
    };
    return cmocka_run_group_tests_name("verify", tests, NULL, NULL);
}
