/* The catalog and the session over a store in memory: what they leave in it, races, refusals. */
#include "test.h"

#include "memory_store.h"
#include "volume/catalog.h"
#include "volume/session.h"

struct waited {
    struct catalog_op op;
    bool done;
};

static void op_done(struct catalog_op *op)
{
    container_of(op, struct waited, op)->done = true;
}

static struct catalog_op *fresh(struct waited *w)
{
    *w = (struct waited){.op = {.done = op_done}};
    return &w->op;
}

static enum status wait_for(struct memory_store *m, struct waited *w)
{
    while (!w->done)
        assert_true(memory_turn_once(m));
    if (w->op.st != ST_OK)
        assert_true(w->op.err.text[0] != '\0');
    assert_null(w->op.state);
    return w->op.st;
}

static struct volume_spec spec_of(const char *name, uint64_t size)
{
    struct volume_spec spec = {.size = size, .codec = -1};
    snprintf(spec.name, sizeof spec.name, "%s", name);
    return spec;
}

static enum status create(struct memory_store *m, const char *name)
{
    struct waited w;
    struct volume_spec spec = spec_of(name, 1 << 20);
    catalog_create(fresh(&w), &m->store, &m->env, &spec);
    return wait_for(m, &w);
}

static struct catalog_entry find(struct memory_store *m, const char *name)
{
    struct waited w;
    catalog_find(fresh(&w), &m->store, &m->env, name);
    assert_int_equal(wait_for(m, &w), ST_OK);
    assert_int_equal(w.op.n_entries, 1);
    struct catalog_entry entry = w.op.entries[0];
    catalog_op_free(&w.op);
    return entry;
}

static struct err find_fails(struct memory_store *m, const char *name)
{
    struct waited w;
    catalog_find(fresh(&w), &m->store, &m->env, name);
    assert_int_equal(wait_for(m, &w), ST_NOTFOUND);
    assert_non_null(strstr(w.op.err.text, "memory:test"));
    return w.op.err;
}

static void preparing(void **state)
{
    (void)state;
    struct memory_store m;
    struct waited w;
    memory_store_init(&m, "prepare");
    catalog_prepare(fresh(&w), &m.store, &m.env, false);
    assert_int_equal(wait_for(&m, &w), ST_NOTFOUND);
    assert_int_equal(m.n_pairs, 0);

    /* Two at once: both find it prepared, by one of them. */
    struct waited w2;
    catalog_prepare(fresh(&w), &m.store, &m.env, true);
    catalog_prepare(fresh(&w2), &m.store, &m.env, true);
    assert_int_equal(wait_for(&m, &w), ST_OK);
    assert_int_equal(wait_for(&m, &w2), ST_OK);
    assert_int_equal(m.commits, 1);
    assert_memory_equal(w.op.meta.uuid, w2.op.meta.uuid, 16);
    catalog_prepare(fresh(&w), &m.store, &m.env, false);
    assert_int_equal(wait_for(&m, &w), ST_OK);
    assert_true(catalog_may_write(&w.op.meta));

    struct key key;
    uint8_t bytes[RECORD_BYTES_MAX];
    key_store_meta(&key);
    struct meta_record meta = w.op.meta;
    meta.features.compat = 1ull << 63;
    size_t len = meta_encode(&meta, key_slice(&key), bytes);
    memory_set(&m, key_slice(&key), (struct slice){bytes, len});
    catalog_prepare(fresh(&w), &m.store, &m.env, false);
    assert_int_equal(wait_for(&m, &w), ST_OK);
    meta.features.ro_compat = 1ull << 63;
    len = meta_encode(&meta, key_slice(&key), bytes);
    memory_set(&m, key_slice(&key), (struct slice){bytes, len});
    catalog_prepare(fresh(&w), &m.store, &m.env, false);
    assert_int_equal(wait_for(&m, &w), ST_OK);
    assert_false(catalog_may_write(&w.op.meta));
    meta.features.incompat = 1ull << 63;
    len = meta_encode(&meta, key_slice(&key), bytes);
    memory_set(&m, key_slice(&key), (struct slice){bytes, len});
    catalog_prepare(fresh(&w), &m.store, &m.env, false);
    assert_int_equal(wait_for(&m, &w), ST_FORMAT);
    bytes[len - 1] ^= 1;
    memory_set(&m, key_slice(&key), (struct slice){bytes, len});
    catalog_prepare(fresh(&w), &m.store, &m.env, true);
    assert_int_equal(wait_for(&m, &w), ST_IO);
    memory_store_free(&m);
}

static void creating(void **state)
{
    (void)state;
    struct memory_store m;
    memory_store_init(&m, "create");
    assert_int_equal(create(&m, "one"), ST_OK);
    assert_int_equal(create(&m, "one"), ST_EXISTS);
    m.conflicts = 5;
    assert_int_equal(create(&m, "two"), ST_OK);
    m.conflicts = 1000000;
    assert_int_equal(create(&m, "three"), ST_BUSY);
    m.conflicts = 0;
    struct catalog_entry one = find(&m, "one"), two = find(&m, "two");
    assert_int_equal(one.branch, 1);
    assert_int_equal(two.branch, 2);
    assert_string_equal(two.name, "two");
    assert_int_equal(two.header.size, 1 << 20);
    assert_int_equal(two.header.block_size, 32768); /* best on this store */
    assert_int_equal(two.header.codec, CODEC_LZ4);
    assert_int_equal(two.header.epoch, 1);
    assert_int_equal(two.owner.token, 0);

    /* At once: of one name one gets through, of two names both, with two branches. */
    struct waited w[4];
    struct volume_spec a = spec_of("a", 512), b = spec_of("b", 512);
    for (int i = 0; i < 4; i++)
        catalog_create(fresh(&w[i]), &m.store, &m.env, i % 2 ? &a : &b);
    int made = 0;
    for (int i = 0; i < 4; i++) {
        enum status st = wait_for(&m, &w[i]);
        assert_true(st == ST_OK || st == ST_EXISTS);
        made += st == ST_OK;
    }
    assert_int_equal(made, 2);
    assert_true(find(&m, "a").branch != find(&m, "b").branch);
    m.read_status = ST_UNAVAIL;
    assert_int_equal(create(&m, "c"), ST_UNAVAIL);
    memory_store_free(&m);
}

static void bad_specifications_are_refused(void **state)
{
    (void)state;
    struct memory_store m;
    memory_store_init(&m, "specifications");
    for (int wrong = 0; wrong < 14; wrong++) {
        struct volume_spec spec = spec_of("good", 1ull << 62);
        switch (wrong) {
        case 0:
            break;
        case 1:
            spec.name[0] = '.';
            break;
        case 2:
            spec.name[0] = '\0';
            break;
        case 3:
            spec.size = 0;
            break;
        case 4:
            spec.size = 1000;
            break;
        case 5:
            spec.size += 512;
            break;
        case 6:
            spec.block_size = 2048;
            break;
        case 7:
            spec.block_size = 12288;
            break;
        case 8:
            spec.block_size = 131072;
            break;
        case 9:
            spec.codec = 3;
            break;
        case 10:
            spec.codec_level = 3;
            break;
        case 11:
            spec.codec = CODEC_ZSTD;
            spec.codec_level = 20;
            break;
        case 12:
            strcpy(spec.description, "\x1b[2J");
            break;
        default:
            strcpy(spec.description, "\xc0\xaf");
        }
        struct waited w;
        catalog_create(fresh(&w), &m.store, &m.env, &spec);
        assert_false(w.done);
        assert_int_equal(wait_for(&m, &w), wrong ? ST_INVAL : ST_OK);
    }
    struct volume_spec spec = spec_of("utf-8", 512);
    strcpy(spec.description, "h\xc3\xa9 \xe2\x82\xac \xf0\x9f\x98\x80");
    struct waited w;
    catalog_create(fresh(&w), &m.store, &m.env, &spec);
    assert_int_equal(wait_for(&m, &w), ST_OK);
    assert_string_equal(find(&m, "utf-8").header.description, spec.description);
    memory_store_free(&m);
}

static void near_names_are_suggested(void **state)
{
    (void)state;
    struct memory_store m;
    memory_store_init(&m, "find");
    assert_non_null(strstr(find_fails(&m, "x").text, "no volumes"));
    static const char *const names[] = {"example", "Backup", "database-1", "database-2", "zz"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        assert_int_equal(create(&m, names[i]), ST_OK);
    assert_non_null(strstr(find_fails(&m, "exmaple").text, "did you mean \"example\"?"));
    assert_non_null(strstr(find_fails(&m, "backup").text, "\"Backup\""));
    struct err e = find_fails(&m, "database");
    assert_non_null(strstr(e.text, "\"database-1\" or \"database-2\"?"));
    assert_null(strstr(find_fails(&m, "qqqq").text, "mean"));
    assert_non_null(strstr(find_fails(&m, "not a name").text, "not a name"));
    char long_name[1000];
    memset(long_name, 'e', sizeof long_name);
    long_name[sizeof long_name - 1] = '\0';
    find_fails(&m, long_name);
    memory_store_free(&m);
}

static void listing_many(void **state)
{
    (void)state;
    struct memory_store m;
    struct waited w;
    enum { N = 2345 };
    memory_store_init(&m, "list");
    catalog_list(fresh(&w), &m.store, &m.env);
    assert_int_equal(wait_for(&m, &w), ST_OK);
    assert_int_equal(w.op.n_entries, 0);
    for (int i = 0; i < N; i++) {
        char name[32];
        snprintf(name, sizeof name, "v%05d", (i * 11) % N);
        assert_int_equal(create(&m, name), ST_OK);
    }
    catalog_list(fresh(&w), &m.store, &m.env);
    assert_int_equal(wait_for(&m, &w), ST_OK);
    assert_int_equal(w.op.n_entries, N);
    for (int i = 0; i < N; i++) {
        char name[32];
        snprintf(name, sizeof name, "v%05d", i);
        assert_string_equal(w.op.entries[i].name, name);
        assert_int_equal(w.op.entries[i].header.size, 1 << 20);
    }

    /* One damaged header hides itself only; looking it up says so. */
    struct key key;
    key_header(&key, w.op.entries[1500].branch);
    memory_find(&m, key_slice(&key))->value[20] ^= 1;
    catalog_op_free(&w.op);
    catalog_list(fresh(&w), &m.store, &m.env);
    assert_int_equal(wait_for(&m, &w), ST_OK);
    assert_int_equal(w.op.n_entries, N - 1);
    assert_string_equal(w.op.entries[1500].name, "v01501");
    catalog_op_free(&w.op);
    catalog_find(fresh(&w), &m.store, &m.env, "v01500");
    assert_int_equal(wait_for(&m, &w), ST_IO);
    memory_store_free(&m);
}

static void renaming(void **state)
{
    (void)state;
    struct memory_store m;
    struct waited w;
    memory_store_init(&m, "rename");
    create(&m, "a");
    create(&m, "b");
    uint64_t branch = find(&m, "a").branch;
    static const struct {
        const char *from, *to;
        enum status st;
    } tries[] = {{"a", "b", ST_EXISTS}, {"a", "a", ST_EXISTS},  {"x", "y", ST_NOTFOUND},
                 {"a", "-", ST_INVAL},  {"a", "", ST_INVAL},    {"/", "y", ST_NOTFOUND},
                 {"a", "c", ST_OK},     {"a", "d", ST_NOTFOUND}};
    for (size_t i = 0; i < sizeof tries / sizeof *tries; i++) {
        m.conflicts = 2;
        catalog_rename(fresh(&w), &m.store, &m.env, tries[i].from, tries[i].to);
        assert_int_equal(wait_for(&m, &w), tries[i].st);
    }
    assert_int_equal(find(&m, "c").branch, branch);
    memory_store_free(&m);
}

static void own(struct memory_store *m, uint64_t branch, uint64_t token, uint8_t who)
{
    struct key key;
    uint8_t bytes[RECORD_BYTES_MAX];
    struct owner_record owner = {.token = token, .pid = 7, .host = "elsewhere"};
    owner.session[0] = who;
    key_owner(&key, branch);
    size_t len = owner_encode(&owner, key_slice(&key), bytes);
    memory_set(m, key_slice(&key), (struct slice){bytes, len});
}

static void taken_at_last_moment(struct memory_store *m)
{
    own(m, 1, 1, 9);
}

static void removing(void **state)
{
    (void)state;
    struct memory_store m;
    struct waited w;
    memory_store_init(&m, "remove");
    create(&m, "a");
    create(&m, "keep");
    size_t before = m.n_pairs;
    create(&m, "b");
    struct catalog_entry a = find(&m, "a"), b = find(&m, "b"), old = a;

    m.before_commit = taken_at_last_moment;
    catalog_remove(fresh(&w), &m.store, &m.env, &a, false);
    assert_int_equal(wait_for(&m, &w), ST_BUSY);
    assert_non_null(strstr(w.op.err.text, "elsewhere"));
    a = find(&m, "a");
    catalog_remove(fresh(&w), &m.store, &m.env, &old, false);
    assert_int_equal(wait_for(&m, &w), ST_BUSY);

    /* Its blocks, rows and trash, more than one batch, and neighbours that must stay. */
    struct key key;
    for (uint64_t i = 0; i < 5000; i++) {
        key_block(&key, b.branch, 1 + i % 3, i);
        memory_set(&m, key_slice(&key), (struct slice){"x", 1});
    }
    for (uint64_t i = 0; i < 50; i++) {
        key_row(&key, b.branch, 1, i, 1);
        memory_set(&m, key_slice(&key), (struct slice){"x", 1});
        key_trash(&key, b.branch, i);
        memory_set(&m, key_slice(&key), (struct slice){"x", 1});
    }
    key_block(&key, b.branch + 1, 1, 1);
    memory_set(&m, key_slice(&key), (struct slice){"x", 1});
    key_block(&key, b.branch - 1, UINT64_MAX, UINT64_MAX);
    memory_set(&m, key_slice(&key), (struct slice){"x", 1});
    m.conflicts = 1;
    catalog_remove(fresh(&w), &m.store, &m.env, &b, false);
    assert_int_equal(wait_for(&m, &w), ST_OK);
    find_fails(&m, "b");
    catalog_remove(fresh(&w), &m.store, &m.env, &b, false);
    assert_int_equal(wait_for(&m, &w), ST_NOTFOUND);
    int rounds = 0;
    for (bool more = true; more; rounds++) {
        catalog_clear_removed(fresh(&w), &m.store, &m.env, &more);
        assert_int_equal(wait_for(&m, &w), ST_OK);
        assert_true(rounds < 10);
    }
    assert_true(rounds >= 3);
    assert_int_equal(m.n_pairs, before + 2);
    bool more = true;
    catalog_clear_removed(fresh(&w), &m.store, &m.env, &more);
    assert_int_equal(wait_for(&m, &w), ST_OK);
    assert_false(more);
    assert_int_equal(find(&m, "keep").branch, 2);
    create(&m, "later");
    assert_int_equal(find(&m, "later").branch, 4);
    memory_store_free(&m);
}

/* --- history ------------------------------------------------------------------------- */

static void put_header(struct memory_store *m, uint64_t branch, const struct header_record *header)
{
    struct key key;
    uint8_t bytes[RECORD_BYTES_MAX];
    key_header(&key, branch);
    size_t len = header_encode(header, key_slice(&key), bytes);
    memory_set(m, key_slice(&key), (struct slice){bytes, len});
}

static void put_snapshot(struct memory_store *m, uint64_t branch, uint64_t epoch, const char *name,
                         bool removed)
{
    struct key key;
    uint8_t bytes[RECORD_BYTES_MAX];
    struct snapshot_record rec = {.removed = removed,
                                  .size = (1 << 20) + epoch * 512,
                                  .data_blocks = 10 * epoch,
                                  .created_ns = epoch};
    snprintf(rec.name, sizeof rec.name, "%s", name);
    key_snapshot(&key, branch, epoch);
    size_t len = snapshot_encode(&rec, key_slice(&key), bytes);
    memory_set(m, key_slice(&key), (struct slice){bytes, len});
}

/* What an owner's commit makes of a volume. */
static uint64_t snapshot(struct memory_store *m, const char *volume, const char *name)
{
    struct catalog_entry entry = find(m, volume);
    uint64_t epoch = entry.header.epoch++;
    entry.header.features.incompat |= FEATURE_INCOMPAT_HISTORY;
    put_header(m, entry.branch, &entry.header);
    put_snapshot(m, entry.branch, epoch, name, false);
    return epoch;
}

static void clear_snapshot(struct memory_store *m, uint64_t branch, uint64_t epoch)
{
    struct key key;
    key_snapshot(&key, branch, epoch);
    size_t at = memory_lower(m, key_slice(&key));
    assert_non_null(memory_find(m, key_slice(&key)));
    memory_clear_range(m, at, at + 1);
}

static enum status clone(struct memory_store *m, const char *from, const char *to, struct err *e)
{
    struct waited w;
    struct volume_spec spec = spec_of(to, 0);
    struct catalog_entry entry = find(m, from);
    catalog_clone(fresh(&w), &m->store, &m->env, &entry, &spec);
    enum status st = wait_for(m, &w);
    if (e)
        *e = w.op.err;
    return st;
}

static enum status roll_back(struct memory_store *m, const char *to, bool destroy_newer,
                             struct err *e)
{
    struct waited w;
    struct catalog_entry entry = find(m, to);
    catalog_rollback(fresh(&w), &m->store, &m->env, &entry, destroy_newer);
    enum status st = wait_for(m, &w);
    if (e)
        *e = w.op.err;
    return st;
}

static enum status remove_volume(struct memory_store *m, const char *name, bool with_snapshots,
                                 struct err *e)
{
    struct waited w;
    struct catalog_entry entry = find(m, name);
    catalog_remove(fresh(&w), &m->store, &m->env, &entry, with_snapshots);
    enum status st = wait_for(m, &w);
    if (e)
        *e = w.op.err;
    return st;
}

static bool ancestry_of(struct memory_store *m, uint64_t branch, struct ancestry_record *out)
{
    struct key key;
    key_ancestry(&key, branch);
    const struct memory_pair *p = memory_find(m, key_slice(&key));
    if (!p)
        return false;
    assert_true(ancestry_decode(key_slice(&key), (struct slice){p->value, p->value_len}, out));
    return true;
}

static bool is_child(struct memory_store *m, uint64_t branch, uint64_t epoch, uint64_t child)
{
    struct key key;
    key_child(&key, branch, epoch, child);
    return memory_find(m, key_slice(&key)) != NULL;
}

static void snapshots_are_listed_and_found(void **state)
{
    (void)state;
    struct memory_store m;
    struct waited w;
    enum { N = 2100 }; /* several pages */
    memory_store_init(&m, "snapshots");
    create(&m, "v");
    create(&m, "other");
    assert_non_null(strstr(find_fails(&m, "v@x").text, "it has none"));
    for (int i = 1; i <= N; i++) {
        char name[32];
        snprintf(name, sizeof name, "day-%d", i);
        assert_int_equal(snapshot(&m, "v", name), i);
    }
    put_snapshot(&m, 1, 7, "day-7", true);
    catalog_snapshots(fresh(&w), &m.store, &m.env, 1);
    assert_int_equal(wait_for(&m, &w), ST_OK);
    assert_int_equal(w.op.n_snapshots, N - 1);
    for (int i = 0; i < N - 1; i++) {
        assert_int_equal(w.op.snapshots[i].epoch, i + (i < 6 ? 1 : 2));
        assert_int_equal(w.op.snapshots[i].rec.data_blocks, 10 * w.op.snapshots[i].epoch);
    }
    catalog_op_free(&w.op);
    catalog_snapshots(fresh(&w), &m.store, &m.env, 2);
    assert_int_equal(wait_for(&m, &w), ST_OK);
    assert_int_equal(w.op.n_snapshots, 0);
    snapshot(&m, "other", "same");
    catalog_snapshots(fresh(&w), &m.store, &m.env, 0);
    assert_int_equal(wait_for(&m, &w), ST_OK);
    assert_int_equal(w.op.n_snapshots, N);
    assert_int_equal(w.op.snapshots[N - 2].branch, 1);
    assert_int_equal(w.op.snapshots[N - 1].branch, 2);
    catalog_op_free(&w.op);

    struct catalog_entry entry = find(&m, "v@day-2000");
    assert_string_equal(entry.name, "v");
    assert_int_equal(entry.branch, 1);
    assert_int_equal(entry.snapshot.epoch, 2000);
    assert_string_equal(entry.snapshot.rec.name, "day-2000");
    assert_int_equal(find(&m, "v").snapshot.epoch, 0);
    assert_non_null(
        strstr(find_fails(&m, "v@day-7").text, "no snapshot \"day-7\" of volume \"v\""));
    assert_non_null(strstr(find_fails(&m, "v@DAY-9").text, "did you mean \"v@day-9\" or"));
    assert_non_null(strstr(find_fails(&m, "w@day-9").text, "no volume \"w\""));
    assert_non_null(strstr(find_fails(&m, "v@").text, "no volume \"v@\""));
    assert_non_null(strstr(find_fails(&m, "v@a b").text, "\"v@a b\""));
    assert_non_null(strstr(find_fails(&m, "v@day-1@day-2").text, "no volume"));

    /* A damaged record hides itself only. */
    struct key key;
    key_snapshot(&key, 1, 3);
    memory_find(&m, key_slice(&key))->value[9] ^= 1;
    catalog_snapshots(fresh(&w), &m.store, &m.env, 1);
    assert_int_equal(wait_for(&m, &w), ST_OK);
    assert_int_equal(w.op.n_snapshots, N - 2);
    catalog_op_free(&w.op);
    memory_store_free(&m);
}

static uint64_t race_branch, race_epoch;

static void snapshot_goes_at_last_moment(struct memory_store *m)
{
    clear_snapshot(m, race_branch, race_epoch);
}

static void snapshot_is_removed_at_last_moment(struct memory_store *m)
{
    put_snapshot(m, race_branch, race_epoch, "s", true);
}

static void snapshot_comes_at_last_moment(struct memory_store *m)
{
    struct key key;
    struct header_record header;
    key_header(&key, race_branch);
    const struct memory_pair *p = memory_find(m, key_slice(&key));
    assert_true(header_decode(key_slice(&key), (struct slice){p->value, p->value_len}, &header));
    put_snapshot(m, race_branch, header.epoch++, "late", false);
    put_header(m, race_branch, &header);
}

static void cloning(void **state)
{
    (void)state;
    struct memory_store m;
    struct waited w;
    struct err e;
    memory_store_init(&m, "clone");
    create(&m, "a");
    uint64_t one = snapshot(&m, "a", "one"), two = snapshot(&m, "a", "two");
    assert_int_equal(clone(&m, "a@two", "b", NULL), ST_OK);
    struct catalog_entry a = find(&m, "a"), b = find(&m, "b");
    assert_int_equal(b.header.features.incompat, FEATURE_INCOMPAT_HISTORY);
    assert_int_equal(b.header.size, (1 << 20) + two * 512);
    assert_int_equal(b.header.block_size, a.header.block_size);
    assert_int_equal(b.header.codec, a.header.codec);
    assert_int_equal(b.header.epoch, 1);
    assert_int_equal(b.header.parent_branch, a.branch);
    assert_int_equal(b.header.parent_epoch, two);
    assert_int_equal(b.state.data_blocks, 10 * two);
    assert_int_equal(b.owner.token, 0);
    assert_true(is_child(&m, a.branch, two, b.branch));
    assert_false(is_child(&m, a.branch, one, b.branch));
    struct ancestry_record line;
    assert_true(ancestry_of(&m, b.branch, &line));
    assert_int_equal(line.after, 0);
    assert_int_equal(line.n_segments, 1);
    assert_memory_equal(&line.segments[0], (&(struct ancestry_segment){a.branch, 0, two}),
                        sizeof line.segments[0]);

    /* A clone of a clone sees its own line first. */
    assert_int_equal(snapshot(&m, "b", "s"), 1);
    m.conflicts = 3;
    assert_int_equal(clone(&m, "b@s", "c", NULL), ST_OK);
    struct catalog_entry c = find(&m, "c");
    assert_true(ancestry_of(&m, c.branch, &line));
    assert_int_equal(line.n_segments, 2);
    assert_int_equal(line.segments[0].branch, b.branch);
    assert_int_equal(line.segments[0].upto, 1);
    assert_int_equal(line.segments[1].branch, a.branch);
    assert_int_equal(line.segments[1].upto, two);

    /* Who is whose. */
    assert_int_equal(clone(&m, "a@two", "a2", NULL), ST_OK);
    catalog_clones(fresh(&w), &m.store, &m.env, a.branch, two);
    assert_int_equal(wait_for(&m, &w), ST_OK);
    assert_int_equal(w.op.n_entries, 2);
    assert_string_equal(w.op.entries[0].name, "a2");
    assert_string_equal(w.op.entries[1].name, "b");
    assert_int_equal(w.op.entries[1].branch, b.branch);
    assert_int_equal(w.op.entries[1].snapshot.epoch, two);
    catalog_op_free(&w.op);
    catalog_clones(fresh(&w), &m.store, &m.env, a.branch, one);
    assert_int_equal(wait_for(&m, &w), ST_OK);
    assert_int_equal(w.op.n_entries, 0);
    assert_int_equal(clone(&m, "a@one", "z", NULL), ST_OK);
    catalog_clones(fresh(&w), &m.store, &m.env, a.branch, 0);
    assert_int_equal(wait_for(&m, &w), ST_OK);
    assert_int_equal(w.op.n_entries, 3);
    catalog_op_free(&w.op);
    catalog_parent(fresh(&w), &m.store, &m.env, &c);
    assert_int_equal(wait_for(&m, &w), ST_OK);
    assert_string_equal(w.op.entries[0].name, "b");
    assert_string_equal(w.op.entries[0].snapshot.rec.name, "s");
    catalog_op_free(&w.op);
    catalog_parent(fresh(&w), &m.store, &m.env, &a);
    assert_int_equal(wait_for(&m, &w), ST_NOTFOUND);

    assert_int_equal(clone(&m, "a@one", "b", &e), ST_EXISTS);
    assert_non_null(strstr(e.text, "\"b\""));
    assert_int_equal(clone(&m, "a@one", "no name", NULL), ST_INVAL);

    /* Something came in between. */
    race_branch = a.branch;
    race_epoch = one;
    m.before_commit = snapshot_comes_at_last_moment;
    assert_int_equal(clone(&m, "a@one", "d", NULL), ST_OK);
    put_snapshot(&m, a.branch, one, "s", false);
    m.before_commit = snapshot_is_removed_at_last_moment;
    size_t before = m.n_pairs;
    assert_int_equal(clone(&m, "a@s", "e", &e), ST_NOTFOUND);
    assert_non_null(strstr(e.text, "a@s"));
    put_snapshot(&m, a.branch, one, "s", false);
    m.before_commit = snapshot_goes_at_last_moment;
    assert_int_equal(clone(&m, "a@s", "e", NULL), ST_NOTFOUND);
    assert_int_equal(m.n_pairs, before - 1);
    find_fails(&m, "e");
    memory_store_free(&m);
}

static void chains_of_clones_have_an_end(void **state)
{
    (void)state;
    struct memory_store m;
    struct err e;
    memory_store_init(&m, "chain");
    create(&m, "v0");
    enum status st = ST_OK;
    unsigned n = 0;
    while (st == ST_OK) {
        char from[32], volume[32], to[32];
        snprintf(volume, sizeof volume, "v%u", n);
        snprintf(from, sizeof from, "v%u@s", n);
        snprintf(to, sizeof to, "v%u", n + 1);
        snapshot(&m, volume, "s");
        size_t before = m.n_pairs;
        st = clone(&m, from, to, &e);
        if (st == ST_OK)
            n++;
        else
            assert_int_equal(m.n_pairs, before);
    }
    assert_int_equal(st, ST_NOSPC);
    assert_non_null(strstr(e.text, "flatten"));
    assert_int_equal(n, ANCESTRY_STORED_MAX);
    memory_store_free(&m);
}

static void removing_what_has_history(void **state)
{
    (void)state;
    struct memory_store m;
    struct waited w;
    struct err e;
    memory_store_init(&m, "remove history");
    create(&m, "a");
    snapshot(&m, "a", "one");
    uint64_t two = snapshot(&m, "a", "two");
    assert_int_equal(remove_volume(&m, "a", false, &e), ST_EXISTS);
    assert_non_null(strstr(e.text, "\"one\" and \"two\""));
    assert_non_null(strstr(e.text, "--snapshots"));
    clone(&m, "a@two", "b", NULL);
    clone(&m, "a@two", "c", NULL);
    for (int with = 0; with < 2; with++) {
        assert_int_equal(remove_volume(&m, "a", with, &e), ST_EXISTS);
        assert_non_null(strstr(e.text, "\"a@two\" has clones: \"b\" and \"c\""));
    }

    /* A clone is its parent's no more when its name is gone, though its keys are still there. */
    uint64_t b = find(&m, "b").branch;
    assert_int_equal(remove_volume(&m, "b", false, NULL), ST_OK);
    assert_false(is_child(&m, 1, two, b));
    catalog_clones(fresh(&w), &m.store, &m.env, 1, 0);
    assert_int_equal(wait_for(&m, &w), ST_OK);
    assert_int_equal(w.op.n_entries, 1);
    catalog_op_free(&w.op);
    assert_int_equal(remove_volume(&m, "a", true, &e), ST_EXISTS);
    assert_non_null(strstr(e.text, "has a clone: \"c\""));
    assert_int_equal(remove_volume(&m, "c", false, NULL), ST_OK);

    /* A snapshot or a clone that comes at the last moment. */
    create(&m, "fresh");
    race_branch = find(&m, "fresh").branch;
    m.before_commit = snapshot_comes_at_last_moment;
    assert_int_equal(remove_volume(&m, "fresh", false, &e), ST_EXISTS);
    assert_non_null(strstr(e.text, "\"late\""));
    /* One that is removed and being cleared is in nobody's way. */
    put_snapshot(&m, race_branch, 1, "late", true);
    assert_int_equal(remove_volume(&m, "fresh", false, NULL), ST_OK);

    /* Clearing: its snapshots before anything that they need. */
    struct key key;
    for (uint64_t i = 0; i < 3000; i++) {
        key_block(&key, 1, 1, i);
        memory_set(&m, key_slice(&key), (struct slice){"x", 1});
    }
    create(&m, "keep");
    snapshot(&m, "keep", "s");
    clone(&m, "keep@s", "kept", NULL);
    size_t others = m.n_pairs;
    assert_int_equal(remove_volume(&m, "a", true, NULL), ST_OK);
    for (bool more = true; more;) {
        catalog_clear_removed(fresh(&w), &m.store, &m.env, &more);
        assert_int_equal(wait_for(&m, &w), ST_OK);
        key_block(&key, 1, 1, 0);
        bool blocks = memory_find(&m, key_slice(&key)) != NULL;
        key_snapshot(&key, 1, 1);
        bool snapshots = memory_find(&m, key_slice(&key)) != NULL;
        assert_true(blocks || !snapshots);
    }
    assert_true(others > m.n_pairs);
    for (uint64_t branch = 1; branch <= 4; branch++) {
        for (const char *tag = "vdlhoatqrbig"; *tag; tag++) {
            struct key end;
            key_prefix_branch(&key, *tag, branch);
            end = key;
            key_prefix_end(&end);
            assert_int_equal(memory_lower(&m, key_slice(&key)), memory_lower(&m, key_slice(&end)));
        }
    }
    assert_true(find(&m, "keep@s").snapshot.epoch == 1);
    assert_int_equal(remove_volume(&m, "keep", true, NULL), ST_EXISTS);
    memory_store_free(&m);
}

static void rolling_back(void **state)
{
    (void)state;
    struct memory_store m;
    struct waited w;
    struct err e;
    struct ancestry_record line;
    memory_store_init(&m, "rollback");
    create(&m, "a");
    uint64_t one = snapshot(&m, "a", "one");
    own(&m, 1, 5, 9);
    struct catalog_entry was = find(&m, "a");
    assert_int_equal(roll_back(&m, "a@one", false, NULL), ST_OK);
    struct catalog_entry a = find(&m, "a");
    assert_int_equal(a.header.epoch, was.header.epoch + 1);
    assert_int_equal(a.header.size, (1 << 20) + one * 512);
    assert_int_equal(a.state.data_blocks, 10 * one);
    assert_int_equal(a.state.generation, was.state.generation + 1);
    assert_int_equal(a.state.changed, a.state.generation);
    assert_int_equal(a.state.n_logs, 0);
    assert_int_equal(a.owner.token, 6);
    static const uint8_t nobody[SESSION_ID_BYTES];
    assert_memory_equal(a.owner.session, nobody, sizeof nobody);
    assert_true(ancestry_of(&m, 1, &line));
    assert_int_equal(line.after, was.header.epoch);
    assert_int_equal(line.n_segments, 1);
    assert_int_equal(line.segments[0].branch, 1);
    assert_int_equal(line.segments[0].upto, one);
    assert_true(find(&m, "a@one").snapshot.epoch == one);

    /* Newer ones, living and removed. */
    snapshot(&m, "a", "two");
    snapshot(&m, "a", "three");
    put_snapshot(&m, 1, snapshot(&m, "a", "gone"), "gone", true);
    assert_int_equal(roll_back(&m, "a@one", false, &e), ST_EXISTS);
    assert_non_null(strstr(e.text, "\"two\" and \"three\";"));
    assert_non_null(strstr(e.text, "--destroy-newer"));
    clone(&m, "a@two", "b", NULL);
    assert_int_equal(roll_back(&m, "a@one", true, &e), ST_EXISTS);
    assert_non_null(strstr(e.text, "\"a@two\" has a clone: \"b\""));
    assert_int_equal(roll_back(&m, "a@three", false, NULL), ST_OK);
    find_fails(&m, "a@gone");
    assert_int_equal(remove_volume(&m, "b", false, NULL), ST_OK);
    m.conflicts = 2;
    assert_int_equal(roll_back(&m, "a@one", true, NULL), ST_OK);
    catalog_snapshots(fresh(&w), &m.store, &m.env, 1);
    assert_int_equal(wait_for(&m, &w), ST_OK);
    assert_int_equal(w.op.n_snapshots, 1);
    catalog_op_free(&w.op);

    /* Somebody was faster: a new owner, a new snapshot, the snapshot removed. */
    create(&m, "c");
    uint64_t c = find(&m, "c").branch;
    snapshot(&m, "c", "s");
    struct catalog_entry to = find(&m, "c@s");
    own(&m, c, 1, 9);
    catalog_rollback(fresh(&w), &m.store, &m.env, &to, true);
    assert_int_equal(wait_for(&m, &w), ST_BUSY);
    assert_non_null(strstr(w.op.err.text, "elsewhere"));
    race_branch = c;
    race_epoch = 1;
    m.before_commit = snapshot_comes_at_last_moment;
    assert_int_equal(roll_back(&m, "c@s", false, &e), ST_EXISTS);
    assert_non_null(strstr(e.text, "\"late\""));
    assert_int_equal(roll_back(&m, "c@s", true, NULL), ST_OK);
    find_fails(&m, "c@late");
    /* Only what the caller knew is taken away. */
    m.before_commit = snapshot_comes_at_last_moment;
    assert_int_equal(roll_back(&m, "c@s", true, NULL), ST_BUSY);
    find(&m, "c@late");
    m.before_commit = snapshot_is_removed_at_last_moment;
    assert_int_equal(roll_back(&m, "c@s", true, NULL), ST_NOTFOUND);
    put_snapshot(&m, c, 1, "s", false);
    to = find(&m, "c@s");
    catalog_rename(fresh(&w), &m.store, &m.env, "c", "d");
    assert_int_equal(wait_for(&m, &w), ST_OK);
    catalog_rollback(fresh(&w), &m.store, &m.env, &to, true);
    assert_int_equal(wait_for(&m, &w), ST_NOTFOUND);

    /* As often as can be noted. */
    enum status st = ST_OK;
    unsigned n = 0;
    create(&m, "often");
    while (st == ST_OK && n <= ANCESTRY_STORED_MAX) {
        char name[32], path[40];
        snprintf(name, sizeof name, "s%u", n);
        snprintf(path, sizeof path, "often@s%u", n++);
        snapshot(&m, "often", name);
        st = roll_back(&m, path, false, &e);
    }
    assert_int_equal(st, ST_NOSPC);
    assert_int_equal(n, ANCESTRY_STORED_MAX + 1);
    memory_store_free(&m);
}

static enum status replace(struct memory_store *m, const struct catalog_entry *old, const char *by,
                           struct err *e)
{
    struct waited w;
    catalog_replace(fresh(&w), &m->store, &m->env, old, by);
    enum status st = wait_for(m, &w);
    if (e)
        *e = w.op.err;
    return st;
}

static void replacing(void **state)
{
    (void)state;
    struct memory_store m;
    struct waited w;
    struct err e;
    memory_store_init(&m, "replace");
    create(&m, "a");
    create(&m, "new");
    snapshot(&m, "a", "s");
    uint64_t branch = find(&m, "new").branch;
    struct catalog_entry a = find(&m, "a");
    assert_int_equal(replace(&m, &a, "none", NULL), ST_NOTFOUND);
    assert_int_equal(clone(&m, "a@s", "c", NULL), ST_OK);
    assert_int_equal(replace(&m, &a, "new", &e), ST_EXISTS);
    assert_non_null(strstr(e.text, "\"c\""));
    assert_int_equal(remove_volume(&m, "c", false, NULL), ST_OK);
    m.before_commit = taken_at_last_moment;
    assert_int_equal(replace(&m, &a, "new", NULL), ST_BUSY);
    assert_int_equal(find(&m, "a").branch, a.branch);
    assert_int_equal(find(&m, "new").branch, branch);

    /* In one commit: the name is never nobody's. */
    a = find(&m, "a");
    m.conflicts = 1;
    assert_int_equal(replace(&m, &a, "new", NULL), ST_OK);
    assert_int_equal(find(&m, "a").branch, branch);
    find_fails(&m, "new");
    find_fails(&m, "a@s");
    assert_int_equal(replace(&m, &a, "new", NULL), ST_NOTFOUND);
    bool more = true;
    while (more) {
        catalog_clear_removed(fresh(&w), &m.store, &m.env, &more);
        assert_int_equal(wait_for(&m, &w), ST_OK);
    }
    struct key key;
    key_snapshot(&key, a.branch, 1);
    assert_null(memory_find(&m, key_slice(&key)));
    memory_store_free(&m);
}

static enum status mark(struct memory_store *m, const struct catalog_entry *entry, uint64_t base)
{
    struct waited w;
    catalog_mark_import(fresh(&w), &m->store, &m->env, entry, base);
    return wait_for(m, &w);
}

static void marking_an_import(void **state)
{
    (void)state;
    struct memory_store m;
    memory_store_init(&m, "mark");
    create(&m, "a");
    uint64_t s = snapshot(&m, "a", "s");
    struct catalog_entry a = find(&m, "a"), old = a;
    m.conflicts = 1;
    assert_int_equal(mark(&m, &a, s), ST_OK);
    assert_int_equal(find(&m, "a").header.import_base, s);
    /* Somebody else has marked it, taken it, or made a snapshot since it was looked up. */
    assert_int_equal(mark(&m, &old, s), ST_BUSY);
    a = find(&m, "a");
    own(&m, a.branch, 1, 9);
    assert_int_equal(mark(&m, &a, 0), ST_BUSY);
    a = find(&m, "a");
    snapshot(&m, "a", "later");
    assert_int_equal(mark(&m, &a, 0), ST_BUSY);
    a = find(&m, "a");
    assert_int_equal(mark(&m, &a, 0), ST_OK);
    assert_int_equal(find(&m, "a").header.import_base, 0);
    /* Going back takes the mark away. */
    a = find(&m, "a");
    assert_int_equal(mark(&m, &a, s), ST_OK);
    assert_int_equal(roll_back(&m, "a@s", true, NULL), ST_OK);
    assert_int_equal(find(&m, "a").header.import_base, 0);
    memory_store_free(&m);
}

/* A clone against the removal of what it is made from, and against a rollback to before it, each
 * begun at each moment of the other: one of them gets through, and what is left fits. */
static void clones_against_removals(void **state)
{
    (void)state;
    for (int turns = 0; turns < 30; turns++) {
        for (int kind = 0; kind < 4; kind++) {
            bool rollback = kind & 1, clone_first = kind & 2;
            struct memory_store m;
            struct waited cloned, other;
            memory_store_init(&m, "against");
            create(&m, "a");
            uint64_t old = snapshot(&m, "a", "old"), s = snapshot(&m, "a", "s");
            struct catalog_entry entry = find(&m, "a@s"), to = find(&m, "a@old");
            struct volume_spec spec = spec_of("clone", 0);
            for (int i = 0; i < 2; i++) {
                if ((i == 0) == clone_first)
                    catalog_clone(fresh(&cloned), &m.store, &m.env, &entry, &spec);
                else if (rollback)
                    catalog_rollback(fresh(&other), &m.store, &m.env, &to, true);
                else
                    catalog_remove(fresh(&other), &m.store, &m.env, &entry, true);
                for (int n = 0; i == 0 && n < turns; n++)
                    memory_turn_once(&m);
            }
            enum status clone_st = wait_for(&m, &cloned), other_st = wait_for(&m, &other);
            if (clone_st == ST_OK) {
                assert_int_equal(other_st, ST_EXISTS);
                assert_non_null(strstr(other.op.err.text, "\"clone\""));
                assert_true(is_child(&m, entry.branch, s, find(&m, "clone").branch));
                assert_int_equal(find(&m, "a@s").snapshot.epoch, s);
            } else {
                assert_int_equal(clone_st, ST_NOTFOUND);
                assert_int_equal(other_st, ST_OK);
                find_fails(&m, "clone");
                if (rollback)
                    assert_int_equal(find(&m, "a@old").snapshot.epoch, old);
            }
            memory_store_free(&m);
        }
    }
}

/* The other end of the mailbox. */
struct server {
    struct memory_store *m;
    uint64_t branch;
    uint64_t seen_id;
};

static bool take_mail(struct server *s, struct mail_record *mail)
{
    struct key key;
    key_mailbox(&key, s->branch);
    const struct memory_pair *p = memory_find(s->m, key_slice(&key));
    return p && mail_decode(key_slice(&key), (struct slice){p->value, p->value_len}, mail);
}

static void put_answer(struct server *s, uint64_t id, enum status st, const char *text)
{
    struct key key;
    uint8_t bytes[RECORD_BYTES_MAX];
    struct answer_record rec = {.id = id, .status = (uint8_t)st, .number = id + 1};
    snprintf(rec.text, sizeof rec.text, "%s", text);
    key_answer(&key, s->branch);
    size_t len = answer_encode(&rec, key_slice(&key), bytes);
    memory_set(s->m, key_slice(&key), (struct slice){bytes, len});
}

static void take_question(struct server *s)
{
    struct key key;
    key_mailbox(&key, s->branch);
    size_t at = memory_lower(s->m, key_slice(&key));
    assert_non_null(memory_find(s->m, key_slice(&key)));
    memory_clear_range(s->m, at, at + 1);
}

static void wake_askers(struct server *s)
{
    struct key key;
    key_answer(&key, s->branch);
    memory_wake(s->m, key_slice(&key));
}

static void answer(struct server *s, uint64_t id, enum status st, const char *text)
{
    take_question(s);
    put_answer(s, id, st, text);
    wake_askers(s);
}

static void assert_mailbox_empty(struct server *s)
{
    struct key key;
    key_mailbox(&key, s->branch);
    assert_null(memory_find(s->m, key_slice(&key)));
    key_answer(&key, s->branch);
    assert_null(memory_find(s->m, key_slice(&key)));
}

static void asking(void **state)
{
    (void)state;
    struct memory_store m;
    struct waited w;
    struct mail_record mail = {.kind = MAIL_RESIZE, .size = 4096}, got;
    memory_store_init(&m, "ask");
    create(&m, "a");
    struct catalog_entry a = find(&m, "a");
    struct server s = {&m, a.branch, 0};

    catalog_ask_owner(fresh(&w), &m.store, &m.env, &a, &mail, 5000, NULL, false);
    assert_int_equal(wait_for(&m, &w), ST_NOTFOUND);
    own(&m, a.branch, 1, 9);
    a = find(&m, "a");
    m.probe = STORE_SESSION_DEAD;
    catalog_ask_owner(fresh(&w), &m.store, &m.env, &a, &mail, 5000, NULL, false);
    assert_int_equal(wait_for(&m, &w), ST_NOTFOUND);
    assert_mailbox_empty(&s);
    m.probe = STORE_SESSION_ALIVE;

    /* Answered, well and badly, with an old answer still lying there. */
    static const enum status said[] = {ST_OK, ST_BUSY, ST_INVAL, ST_NOTFOUND};
    for (size_t i = 0; i < sizeof said / sizeof *said; i++) {
        put_answer(&s, 1234, ST_OK, "to somebody else");
        uint64_t began = m.now_ns;
        catalog_ask_owner(fresh(&w), &m.store, &m.env, &a, &mail, 30000, NULL, false);
        while (!take_mail(&s, &got))
            assert_true(memory_turn_once(&m));
        assert_int_equal(got.size, 4096);
        assert_true(m.now_ns - began < 4000000000ull);
        put_answer(&s, got.id ^ 1, ST_OK, "to somebody else");
        wake_askers(&s);
        for (int n = 0; n < 20; n++)
            assert_true(memory_turn_once(&m));
        assert_false(w.done);
        answer(&s, got.id, said[i], "so it is");
        assert_int_equal(wait_for(&m, &w), said[i] == ST_NOTFOUND ? ST_BUSY : said[i]);
        assert_string_equal(w.op.err.text, "so it is");
        assert_int_equal(w.op.number, got.id + 1);
        assert_mailbox_empty(&s);
    }

    /* Nobody answers: the request is taken back. */
    uint64_t began = m.now_ns;
    catalog_ask_owner(fresh(&w), &m.store, &m.env, &a, &mail, 5000, NULL, false);
    assert_int_equal(wait_for(&m, &w), ST_UNAVAIL);
    assert_true(m.now_ns - began >= 5000000000ull && m.now_ns - began < 7000000000ull);
    assert_mailbox_empty(&s);

    /* The owner dies, or gives the volume up, while we wait. */
    catalog_ask_owner(fresh(&w), &m.store, &m.env, &a, &mail, 60000, NULL, false);
    while (!take_mail(&s, &got))
        assert_true(memory_turn_once(&m));
    m.probe = STORE_SESSION_DEAD;
    assert_int_equal(wait_for(&m, &w), ST_NOTFOUND);
    assert_mailbox_empty(&s);
    m.probe = STORE_SESSION_ALIVE;
    catalog_ask_owner(fresh(&w), &m.store, &m.env, &a, &mail, 60000, NULL, false);
    while (!take_mail(&s, &got))
        assert_true(memory_turn_once(&m));
    own(&m, a.branch, 2, 0);
    assert_int_equal(wait_for(&m, &w), ST_NOTFOUND);
    assert_mailbox_empty(&s);
    memory_store_free(&m);
}

static struct server *late_server;

/* The answer comes between the look that found none and the withdrawal. */
static void answers_at_last_moment(struct memory_store *m)
{
    struct mail_record got;
    (void)m;
    assert_true(take_mail(late_server, &got));
    answer(late_server, got.id, ST_OK, "just in time");
}

static void asking_at_the_limits(void **state)
{
    (void)state;
    struct memory_store m;
    struct waited w, w2;
    struct mail_record mail = {.kind = MAIL_EVICT}, got;
    memory_store_init(&m, "ask at the limits");
    create(&m, "a");
    own(&m, 1, 1, 9);
    struct catalog_entry a = find(&m, "a");
    struct server s = {&m, a.branch, 0};
    m.probe = STORE_SESSION_ALIVE;

    catalog_ask_owner(fresh(&w), &m.store, &m.env, &a, &mail, 2000, NULL, false);
    while (!take_mail(&s, &got))
        assert_true(memory_turn_once(&m));
    for (int i = 0; i < 10; i++)
        assert_true(memory_turn_once(&m));
    late_server = &s;
    m.before_commit = answers_at_last_moment;
    assert_int_equal(wait_for(&m, &w), ST_OK);
    assert_string_equal(w.op.err.text, "just in time");
    assert_mailbox_empty(&s);

    /* Two at once: one after the other. */
    catalog_ask_owner(fresh(&w), &m.store, &m.env, &a, &mail, 20000, NULL, false);
    catalog_ask_owner(fresh(&w2), &m.store, &m.env, &a, &mail, 20000, NULL, false);
    uint64_t last = 0;
    while (!w.done || !w2.done) {
        assert_true(memory_turn_once(&m));
        if (take_mail(&s, &got) && got.id != last) {
            last = got.id;
            answer(&s, got.id, ST_OK, "done");
        }
    }
    assert_int_equal(w.op.st, ST_OK);
    assert_int_equal(w2.op.st, ST_OK);
    assert_mailbox_empty(&s);

    /* The answer to one is there, and the other one looks first. */
    catalog_ask_owner(fresh(&w), &m.store, &m.env, &a, &mail, 20000, NULL, false);
    while (!take_mail(&s, &got))
        assert_true(memory_turn_once(&m));
    uint64_t begun = m.now_ns;
    m.now_ns += 100000000u;
    catalog_ask_owner(fresh(&w2), &m.store, &m.env, &a, &mail, 20000, NULL, false);
    while (m.now_ns < begun + 500000000u || m.first_task)
        assert_true(memory_turn_once(&m));
    uint64_t first = got.id;
    take_question(&s);
    put_answer(&s, first, ST_OK, "to the first");
    assert_int_equal(wait_for(&m, &w), ST_OK);
    assert_string_equal(w.op.err.text, "to the first");
    while (!take_mail(&s, &got))
        assert_true(memory_turn_once(&m));
    assert_true(m.now_ns < begun + 2000000000u);
    answer(&s, got.id, ST_OK, "to the second");
    assert_int_equal(wait_for(&m, &w2), ST_OK);
    assert_mailbox_empty(&s);

    /* A request that a dead command left is in nobody's way for long. */
    struct key key;
    uint8_t bytes[RECORD_BYTES_MAX];
    struct mail_record left = {.id = 1, .kind = MAIL_SYNC};
    key_mailbox(&key, a.branch);
    size_t len = mail_encode(&left, key_slice(&key), bytes);
    memory_set(&m, key_slice(&key), (struct slice){bytes, len});
    catalog_ask_owner(fresh(&w), &m.store, &m.env, &a, &mail, 5000, NULL, false);
    assert_int_equal(wait_for(&m, &w), ST_BUSY);
    catalog_ask_owner(fresh(&w), &m.store, &m.env, &a, &mail, 30000, NULL, false);
    while (!take_mail(&s, &got) || got.id == 1)
        assert_true(memory_turn_once(&m));
    answer(&s, got.id, ST_OK, "done");
    assert_int_equal(wait_for(&m, &w), ST_OK);
    assert_mailbox_empty(&s);
    memory_store_free(&m);
}

static struct memory_store *session_store;

static void turn(struct env *env)
{
    (void)env;
    assert_true(memory_turn_once(session_store));
}

static void sessions(void **state)
{
    (void)state;
    struct memory_store m;
    memory_store_init(&m, "session");
    session_store = &m;
    struct session s;
    struct err e = {0};
    assert_int_equal(session_begin(&s, &m.store, &m.env, turn, 10000, "here", &e), ST_OK);
    assert_int_equal(m.n_pairs, 1);
    struct session_record rec;
    uint8_t id[16];
    struct slice key = {m.pairs[0].key, m.pairs[0].key_len};
    assert_true(key_parse_session(key, id));
    assert_memory_equal(id, s.id, 16);
    assert_true(session_decode(key, (struct slice){m.pairs[0].value, m.pairs[0].value_len}, &rec));
    assert_int_equal(rec.state, SESSION_LIVE);
    assert_int_equal(rec.lease_ms, 10000);
    assert_string_equal(rec.address, "here");
    assert_true(rec.host[0] != '\0');
    session_end(&s, &m.env, turn);
    assert_int_equal(m.n_pairs, 0);
    m.conflicts = 1;
    assert_int_equal(session_begin(&s, &m.store, &m.env, turn, 10000, "here", &e), ST_CONFLICT);
    assert_non_null(strstr(e.text, "memory:test"));
    memory_store_free(&m);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(preparing),
        cmocka_unit_test(creating),
        cmocka_unit_test(bad_specifications_are_refused),
        cmocka_unit_test(near_names_are_suggested),
        cmocka_unit_test(listing_many),
        cmocka_unit_test(renaming),
        cmocka_unit_test(removing),
        cmocka_unit_test(snapshots_are_listed_and_found),
        cmocka_unit_test(cloning),
        cmocka_unit_test(chains_of_clones_have_an_end),
        cmocka_unit_test(removing_what_has_history),
        cmocka_unit_test(rolling_back),
        cmocka_unit_test(replacing),
        cmocka_unit_test(marking_an_import),
        cmocka_unit_test(clones_against_removals),
        cmocka_unit_test(asking),
        cmocka_unit_test(asking_at_the_limits),
        cmocka_unit_test(sessions),
    };
    return cmocka_run_group_tests_name("catalog", tests, NULL, NULL);
}
