/* The write log: append, submit, sync, room, wrap, replay, damage, reuse of files. */
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>

#include "store_test.h"

#define LOG_BYTES (4u << 20)

/* A double for the disk: this test's own fdatasync, which LMDB and the store call too.
 * While `fail_sync_size` is set, syncs of files of that size fail. */
static _Atomic int64_t fail_sync_size;

int fdatasync(int fd)
{
    struct stat sb;
    int64_t size = fail_sync_size;
    if (size && fstat(fd, &sb) == 0 && sb.st_size == size) {
        errno = EIO;
        return -1;
    }
    return fsync(fd);
}

static const uint8_t session[16] = "a test's session";

static int begin(void **state)
{
    struct test_store *t = mem_zalloc(sizeof *t);
    test_store_begin(t, NULL);
    struct err e = {0};
    assert_int_equal(store_session_begin(t->store, session, &e), ST_OK);
    fail_sync_size = 0;
    *state = t;
    return 0;
}

static int end(void **state)
{
    struct test_store *t = *state;
    if (t->store)
        store_session_end(t->store, session);
    test_store_end(t);
    free(t);
    return 0;
}

static struct store_log *log_begin(struct test_store *t)
{
    struct err e = {0};
    struct store_log *log;
    enum status st = store_log_open(t->store, &t->env.env, session, LOG_BYTES, &log, &e);
    if (st)
        fail_msg("store_log_open: %s", e.text);
    return log;
}

/* A payload that can be told from its number and length. */
static void payload_make(uint8_t *out, uint64_t seq, uint32_t len)
{
    struct chance c = {seq * 1000003u + len};
    for (uint32_t i = 0; i < len; i += 8) {
        uint64_t v = chance_u64(&c);
        memcpy(out + i, &v, len - i < 8 ? len - i : 8);
    }
}

static uint32_t payload_len(uint64_t seq)
{
    struct chance c = {seq};
    return (uint32_t)(chance_below(&c, 4) ? chance_below(&c, 9000) : chance_below(&c, 200000));
}

static uint64_t append(struct store_log *log, uint64_t stream, uint8_t *memory, uint32_t len)
{
    uint8_t meta[32];
    uint64_t seq = store_log_next_seq(log);
    memset(meta, (int)seq, sizeof meta);
    payload_make(memory, seq, len);
    /* In pieces of odd size, as they come from a socket. */
    struct iovec iov[64];
    int n = 0;
    uint32_t at = 0;
    while (at < len) {
        uint32_t part = n == 63 ? len - at : 4093;
        if (part > len - at)
            part = len - at;
        iov[n++] = (struct iovec){memory + at, part};
        at += part;
    }
    assert_int_equal(store_log_append(log, stream, meta, iov, n, len), seq);
    return seq;
}

struct test_sync {
    struct store_log_sync sync;
    bool done;
    enum status st;
};

static void sync_done(struct store_log_sync *sync, enum status st)
{
    struct test_sync *s = container_of(sync, struct test_sync, sync);
    s->done = true;
    s->st = st;
}

static enum status sync_log(struct test_store *t, struct store_log *log)
{
    struct test_sync s = {.sync.done = sync_done};
    store_log_sync(log, &s.sync);
    test_env_until(&t->env, &s.done);
    return s.st;
}

static enum status keep_from(struct test_store *t, struct store_log *log, uint64_t seq)
{
    struct test_commit c = {.commit = {.log = log, .log_keep_from = seq}};
    test_commit_start(t, &c);
    test_env_until(&t->env, &c.done);
    return c.st;
}

struct taken {
    uint64_t stream, next, count, stop_after, last;
    uint32_t (*len)(uint64_t seq);
    bool gaps; /* other streams' records lie between */
};

static bool take(void *arg, const struct store_log_record *rec)
{
    struct taken *t = arg;
    uint8_t *want = mem_alloc(rec->payload_len + 8u);
    uint8_t meta[32];
    memset(meta, (int)rec->seq, sizeof meta);
    payload_make(want, rec->seq, rec->payload_len);
    if (!t->gaps)
        assert_int_equal(rec->seq, t->next);
    assert_true(rec->seq >= t->next);
    assert_int_equal(rec->stream, t->stream);
    assert_memory_equal(rec->meta, meta, sizeof meta);
    if (t->len)
        assert_int_equal(rec->payload_len, t->len(rec->seq));
    if (rec->payload_len)
        assert_memory_equal(rec->payload, want, rec->payload_len);
    free(want);
    t->next = rec->seq + 1;
    t->last = rec->seq;
    t->count++;
    return t->stop_after == 0 || t->count < t->stop_after;
}

static enum status replay(struct test_store *t, uint64_t id, uint64_t after, struct taken *taken)
{
    struct err e = {0};
    return store_log_replay(t->store, id, taken->stream, after, take, taken, &e);
}

static void test_append_submit_replay(void **state)
{
    struct test_store *t = *state;
    struct store_log *log = log_begin(t);
    uint8_t *memory = mem_alloc(8u << 20);
    assert_int_equal(store_log_capacity(log), LOG_BYTES);
    assert_int_equal(store_log_room(log), LOG_BYTES);
    assert_int_equal(store_log_next_seq(log), 1);
    uint64_t used = 0;
    size_t at = 0;
    for (int i = 0; i < 40; i++) {
        uint32_t len = payload_len(store_log_next_seq(log)) % 30000;
        append(log, (uint64_t)(i % 2) + 7, memory + at, len);
        at += len;
        used += store_log_record_bytes(len);
        assert_int_equal(store_log_room(log), LOG_BYTES - used);
        if (i % 7 == 0)
            assert_int_equal(store_log_submit(log), ST_OK);
    }
    assert_int_equal(store_log_submit(log), ST_OK);
    assert_int_equal(sync_log(t, log), ST_OK);
    assert_int_equal(sync_log(t, log), ST_OK);
    uint64_t id = store_log_id(log);
    store_log_close(log, false);

    struct taken a = {.stream = 7, .next = 1, .gaps = true};
    assert_int_equal(replay(t, id, 0, &a), ST_OK);
    assert_int_equal(a.count, 20);
    struct taken b = {.stream = 8, .next = 12, .gaps = true};
    assert_int_equal(replay(t, id, 11, &b), ST_OK);
    assert_int_equal(b.count, 15);
    struct taken c = {.stream = 8, .next = 1, .gaps = true, .stop_after = 3};
    assert_int_equal(replay(t, id, 0, &c), ST_OK);
    assert_int_equal(c.count, 3);
    assert_int_equal(replay(t, id + 1, 0, &c), ST_NOTFOUND);
    free(memory);
}

/* Many times round the ring; after each turn the replay yields exactly what is kept. */
static void test_wrap(void **state)
{
    struct test_store *t = *state;
    struct store_log *log = log_begin(t);
    uint8_t *memory = mem_alloc(64u << 20);
    uint64_t kept = 1;
    for (int turn = 0; turn < 60; turn++) {
        size_t at = 0;
        for (;;) {
            uint32_t len = payload_len(store_log_next_seq(log));
            if (store_log_record_bytes(len) > store_log_room(log))
                break;
            append(log, 5, memory + at, len);
            at += len;
            if (store_log_next_seq(log) % 9 == 0)
                assert_int_equal(store_log_submit(log), ST_OK);
        }
        assert_int_equal(store_log_submit(log), ST_OK);
        if (turn % 8 == 0)
            assert_int_equal(sync_log(t, log), ST_OK);
        struct taken all = {.stream = 5, .next = kept, .len = payload_len};
        assert_int_equal(replay(t, store_log_id(log), kept - 1, &all), ST_OK);
        assert_int_equal(all.next, store_log_next_seq(log));
        uint64_t room = store_log_room(log);
        kept = turn % 5 == 4 ? store_log_next_seq(log)
                             : kept + (store_log_next_seq(log) - kept) * 2 / 3;
        assert_int_equal(keep_from(t, log, kept), ST_OK);
        assert_true(store_log_room(log) > room);
        if (turn % 5 == 4)
            assert_int_equal(store_log_room(log), LOG_BYTES);
    }
    store_log_close(log, false);
    free(memory);
}

/* The largest record, in the most pieces, straddling the end of the ring. */
static void test_largest_records(void **state)
{
    struct test_store *t = *state;
    struct err e = {0};
    struct store_log *log;
    assert_int_equal(store_log_open(t->store, &t->env.env, session, 10u << 20, &log, &e), ST_OK);
    uint8_t *memory = mem_alloc(STORE_LOG_PAYLOAD_MAX), meta[32] = {0};
    for (int i = 0; i < 12; i++) {
        uint64_t seq = store_log_next_seq(log);
        payload_make(memory, seq, STORE_LOG_PAYLOAD_MAX);
        memset(meta, (int)seq, sizeof meta);
        struct iovec iov[1100];
        size_t at = 0;
        for (int p = 0; p < 1100; p++) {
            size_t part = p == 1099 ? STORE_LOG_PAYLOAD_MAX - at : 3801;
            iov[p] = (struct iovec){memory + at, part};
            at += part;
        }
        assert_int_equal(store_log_append(log, 1, meta, iov, 1100, STORE_LOG_PAYLOAD_MAX), seq);
        assert_int_equal(store_log_submit(log), ST_OK);
        struct taken one = {.stream = 1, .next = seq};
        assert_int_equal(replay(t, store_log_id(log), seq - 1, &one), ST_OK);
        assert_int_equal(one.count, 1);
        assert_int_equal(keep_from(t, log, seq + 1), ST_OK);
    }
    store_log_close(log, true);
    free(memory);
}

static void log_path(struct test_store *t, uint64_t id, char path[300])
{
    snprintf(path, 300, "%s/log/%016" PRIx64, t->dir, id);
}

static void flip(const char *path, uint64_t at)
{
    int fd = open(path, O_RDWR);
    uint8_t byte;
    assert_true(fd >= 0);
    assert_int_equal(pread(fd, &byte, 1, (off_t)at), 1);
    byte ^= 0x10;
    assert_int_equal(pwrite(fd, &byte, 1, (off_t)at), 1);
    close(fd);
}

/* A record that is torn or flipped ends the log, if the machine may have died before it was
 * synced; where it had been synced the damage is reported. */
static void test_torn_and_damaged(void **state)
{
    struct test_store *t = *state;
    uint8_t memory[12][512];
    for (int synced = 0; synced < 2; synced++) {
        struct store_log *log = log_begin(t);
        uint64_t place[13];
        for (int i = 0; i < 12; i++) {
            place[i] = 4096 + (LOG_BYTES - store_log_room(log));
            append(log, 3, memory[i], 500);
            assert_int_equal(store_log_submit(log), ST_OK);
            if (synced && i == 8)
                assert_int_equal(sync_log(t, log), ST_OK);
        }
        uint64_t id = store_log_id(log);
        store_log_close(log, false);
        char path[300];
        log_path(t, id, path);
        /* Every byte of the sixth record and its header. */
        for (uint64_t at = place[5]; at < place[5] + 80 + 500; at += at < place[5] + 80 ? 1 : 37) {
            flip(path, at);
            struct taken taken = {.stream = 3, .next = 1};
            assert_int_equal(replay(t, id, 0, &taken), synced ? ST_IO : ST_OK);
            assert_int_equal(taken.last, 5);
            flip(path, at);
        }
        struct taken whole = {.stream = 3, .next = 1};
        assert_int_equal(replay(t, id, 0, &whole), ST_OK);
        assert_int_equal(whole.last, 12);
        flip(path, 20);
        assert_int_equal(replay(t, id, 0, &whole), ST_IO);
    }
}

/* Nothing was written after the last sync that succeeded, and its records are known to be synced
 * all the same; those written since may be missing. */
static void test_damaged_after_the_last_sync(void **state)
{
    struct test_store *t = *state;
    uint8_t memory[12][4096];
    /* The last record ends in the midst of a page, or 40 bytes before its end. */
    for (int lengths = 0; lengths < 2; lengths++) {
        struct store_log *log = log_begin(t);
        uint64_t place[13];
        for (int i = 0; i < 12; i++) {
            place[i] = 4096 + (LOG_BYTES - store_log_room(log));
            uint64_t to_border = (2 * 4096 - 40 - 80 - place[i] % 4096) % 4096;
            uint32_t len = lengths == 0 || i < 8 ? 500 : (uint32_t)to_border;
            append(log, 3, memory[i], len);
            /* The ninth is synced when the tenth is on its way, which says nothing of that. */
            if (i == 9)
                assert_int_equal(sync_log(t, log), ST_OK);
            assert_int_equal(store_log_submit(log), ST_OK);
            if (i == 9) {
                char path[300];
                log_path(t, store_log_id(log), path);
                flip(path, place[8]);
                struct taken taken = {.stream = 3, .next = 1};
                assert_int_equal(replay(t, store_log_id(log), 0, &taken), ST_IO);
                flip(path, place[8]);
            }
        }
        place[12] = 4096 + (LOG_BYTES - store_log_room(log));
        uint64_t id = store_log_id(log);
        char path[300];
        log_path(t, id, path);
        for (int synced = 0; synced < 2; synced++) {
            if (synced)
                assert_int_equal(sync_log(t, log), ST_OK);
            for (int i = 8; i < 12; i++) {
                for (uint64_t at = place[i]; at < place[i + 1] - 8; at += at < place[i] + 80 ? 7 : 97) {
                    flip(path, at);
                    struct taken taken = {.stream = 3, .next = 1};
                    enum status want = synced || i == 8 ? ST_IO : ST_OK;
                    assert_int_equal(replay(t, id, 0, &taken), want);
                    assert_int_equal(taken.last, i);
                    flip(path, at);
                }
            }
            struct taken whole = {.stream = 3, .next = 1};
            assert_int_equal(replay(t, id, 0, &whole), ST_OK);
            assert_int_equal(whole.last, 12);
        }
        /* The next record takes the place of what said so. */
        append(log, 3, memory[0], 300);
        assert_int_equal(store_log_submit(log), ST_OK);
        struct taken whole = {.stream = 3, .next = 1};
        assert_int_equal(replay(t, id, 0, &whole), ST_OK);
        assert_int_equal(whole.last, 13);
        store_log_close(log, false);
    }
}

/* Damage in another stream's payload is not this stream's; a file cut short is an error. */
static void test_damage_of_another_stream(void **state)
{
    struct test_store *t = *state;
    struct store_log *log = log_begin(t);
    uint8_t memory[12][512];
    uint64_t place[12];
    for (int i = 0; i < 12; i++) {
        place[i] = 4096 + (LOG_BYTES - store_log_room(log));
        append(log, (uint64_t)(i % 2) + 7, memory[i], 500);
        assert_int_equal(store_log_submit(log), ST_OK);
    }
    assert_int_equal(sync_log(t, log), ST_OK);
    append(log, 7, memory[0], 500);
    assert_int_equal(store_log_submit(log), ST_OK);
    uint64_t id = store_log_id(log);
    store_log_close(log, false);
    char path[300];
    log_path(t, id, path);
    flip(path, place[5] + 80 + 100); /* record 6, of stream 8 */
    struct taken whole = {.stream = 7, .next = 1, .gaps = true};
    assert_int_equal(replay(t, id, 0, &whole), ST_OK);
    assert_int_equal(whole.count, 7);
    struct taken hit = {.stream = 8, .next = 1, .gaps = true};
    assert_int_equal(replay(t, id, 0, &hit), ST_IO);
    assert_int_equal(hit.last, 4);
    assert_int_equal(truncate(path, 4096 + 3000), 0);
    struct err e = {0};
    struct taken cut = {.stream = 7, .next = 1, .gaps = true};
    assert_int_equal(store_log_replay(t->store, id, 7, 0, take, &cut, &e), ST_IO);
    assert_non_null(strstr(e.text, "shorter than its header says"));
}

/* A recycled file is full of the records of another log: none of them is ever taken. */
static void test_recycled_file(void **state)
{
    struct test_store *t = *state;
    struct store_log *log = log_begin(t);
    uint8_t memory[1000];
    for (int i = 0; i < 500; i++) {
        append(log, 1, memory, 1000);
        assert_int_equal(store_log_submit(log), ST_OK);
    }
    uint64_t id = store_log_id(log);
    store_log_close(log, true);
    struct taken none = {.stream = 1, .next = 1};
    assert_int_equal(replay(t, id, 0, &none), ST_NOTFOUND);
    char spare[300];
    snprintf(spare, sizeof spare, "%s/log/spare", t->dir);
    assert_int_equal(access(spare, F_OK), 0);
    log = log_begin(t);
    assert_int_not_equal(access(spare, F_OK), 0);
    assert_int_equal(replay(t, store_log_id(log), 0, &none), ST_OK);
    assert_int_equal(none.count, 0);
    append(log, 1, memory, 1000);
    assert_int_equal(store_log_submit(log), ST_OK);
    assert_int_equal(replay(t, store_log_id(log), 0, &none), ST_OK);
    assert_int_equal(none.count, 1);
    store_log_close(log, true);
}

static void test_failed_sync_is_final(void **state)
{
    struct test_store *t = *state;
    struct store_log *log = log_begin(t);
    uint8_t memory[100];
    append(log, 1, memory, 100);
    assert_int_equal(store_log_submit(log), ST_OK);
    fail_sync_size = 4096 + LOG_BYTES;
    assert_int_equal(sync_log(t, log), ST_IO);
    fail_sync_size = 0;
    assert_int_equal(sync_log(t, log), ST_IO);
    append(log, 1, memory, 100);
    assert_int_equal(store_log_submit(log), ST_IO);
    store_log_close(log, true);
}

/* Logs of sessions that live, or that are needed, stay. */
static void test_remove_unused(void **state)
{
    struct test_store *t = *state;
    struct err e = {0};
    uint8_t dead[16] = "a dead session..";
    assert_int_equal(store_session_begin(t->store, dead, &e), ST_OK);
    struct store_log *live = log_begin(t), *gone[2];
    uint64_t ids[2];
    for (int i = 0; i < 2; i++) {
        assert_int_equal(store_log_open(t->store, &t->env.env, dead, LOG_BYTES, &gone[i], &e),
                         ST_OK);
        ids[i] = store_log_id(gone[i]);
        store_log_close(gone[i], false);
    }
    struct taken none = {.stream = 1, .next = 1};
    assert_int_equal(store_log_remove_unused(t->store, NULL, 0, &e), ST_OK);
    assert_int_equal(replay(t, ids[1], 0, &none), ST_OK);
    store_session_end(t->store, dead);
    assert_int_equal(store_log_remove_unused(t->store, ids, 1, &e), ST_OK);
    assert_int_equal(replay(t, ids[0], 0, &none), ST_OK);
    assert_int_equal(replay(t, ids[1], 0, &none), ST_NOTFOUND);
    assert_int_equal(replay(t, store_log_id(live), 0, &none), ST_OK);
    assert_int_equal(store_log_remove_unused(t->store, NULL, 0, &e), ST_OK);
    assert_int_equal(replay(t, ids[0], 0, &none), ST_NOTFOUND);
    store_log_close(live, true);
}

/* A commit that is refused does not move the start of the log. */
static void test_refused_commit_keeps_log(void **state)
{
    struct test_store *t = *state;
    struct store_log *log = log_begin(t);
    uint8_t memory[100];
    append(log, 1, memory, 100);
    assert_int_equal(store_log_submit(log), ST_OK);
    uint64_t room = store_log_room(log);
    struct store_check check = {STORE_CHECK_VALUE, text("owner"), text("me")};
    struct test_commit c = {
        .commit = {.checks = &check, .n_checks = 1, .log = log, .log_keep_from = 2}};
    test_commit_start(t, &c);
    test_env_until(&t->env, &c.done);
    assert_int_equal(c.st, ST_CONFLICT);
    assert_int_equal(store_log_room(log), room);
    struct taken one = {.stream = 1, .next = 1};
    assert_int_equal(replay(t, store_log_id(log), 0, &one), ST_OK);
    assert_int_equal(one.count, 1);
    assert_int_equal(keep_from(t, log, 2), ST_OK);
    assert_int_equal(store_log_room(log), LOG_BYTES);
    store_log_close(log, true);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_append_submit_replay, begin, end),
        cmocka_unit_test_setup_teardown(test_wrap, begin, end),
        cmocka_unit_test_setup_teardown(test_largest_records, begin, end),
        cmocka_unit_test_setup_teardown(test_torn_and_damaged, begin, end),
        cmocka_unit_test_setup_teardown(test_damaged_after_the_last_sync, begin, end),
        cmocka_unit_test_setup_teardown(test_damage_of_another_stream, begin, end),
        cmocka_unit_test_setup_teardown(test_recycled_file, begin, end),
        cmocka_unit_test_setup_teardown(test_failed_sync_is_final, begin, end),
        cmocka_unit_test_setup_teardown(test_remove_unused, begin, end),
        cmocka_unit_test_setup_teardown(test_refused_commit_keeps_log, begin, end),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
