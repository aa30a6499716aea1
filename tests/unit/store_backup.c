/*
 * Copies of an embedded store: what is in them, also while others write, what of the
 * logs, and what becomes of the folder when something is in the way.
 */
#include <errno.h>
#include <fcntl.h>
#include <sys/statvfs.h>
#include <sys/uio.h>

#include "store_test.h"

#define KEYS 300u
#define LOG_BYTES (12u << 20) /* longer than what is read at once */

/* A double for the disk: while set, file systems have no more than this available. */
static _Atomic uint64_t available_max;

int fstatvfs(int fd, struct statvfs *vfs)
{
    char path[40];
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    int rc = statvfs(path, vfs);
    uint64_t max = available_max;
    if (rc == 0 && max && vfs->f_bavail > max / vfs->f_frsize)
        vfs->f_bavail = max / vfs->f_frsize;
    return rc;
}

/* A double for a machine that is busy elsewhere: while set, every other read of a write log comes
 * late. */
static _Atomic uint64_t late_logs_us;
static _Atomic unsigned log_reads;

static ssize_t read_late(int fd, void *data, size_t len, off_t at)
{
    char link[40], path[400];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = late_logs_us ? readlink(link, path, sizeof path - 1) : 0;
    path[n > 0 ? n : 0] = '\0';
    if (strstr(path, "/log/") && log_reads++ % 2)
        usleep((useconds_t)late_logs_us);
    struct iovec iov = {data, len};
    return preadv(fd, &iov, 1, at);
}

/* Labels, for the headers rename pread where file offsets have 64 bits. */
ssize_t double_pread(int fd, void *data, size_t len, off_t at) __asm__("pread");
ssize_t double_pread64(int fd, void *data, size_t len, off_t at) __asm__("pread64");

ssize_t double_pread(int fd, void *data, size_t len, off_t at)
{
    return read_late(fd, data, len, at);
}

ssize_t double_pread64(int fd, void *data, size_t len, off_t at)
{
    return read_late(fd, data, len, at);
}

static const uint8_t session[16] = "a test's session";

struct backup_test {
    struct test_store store; /* first: the fixtures of test_store.h are used on it */
    char to[200], partial[220];
    struct chance chance;
};

static int begin(void **state)
{
    struct backup_test *t = mem_zalloc(sizeof *t);
    test_store_begin(&t->store, NULL);
    snprintf(t->to, sizeof t->to, "%.180s-copy", t->store.dir);
    snprintf(t->partial, sizeof t->partial, "%s.partial", t->to);
    t->chance = chance_begin("store_backup");
    available_max = 0;
    *state = t;
    return 0;
}

static int end(void **state)
{
    struct backup_test *t = *state;
    test_folder_remove(t->to);
    test_folder_remove(t->partial);
    test_store_end(&t->store);
    free(t);
    return 0;
}

/* ---- a backup on a thread of its own ---- */

struct backing {
    struct store_backup backup;
    struct store *store;
    pthread_t thread;
    _Atomic bool done;
    enum status st;
    struct err err;
    void (*pause)(struct backing *b); /* between two batches */
    bool stop;
    void *arg;
};

static bool backing_progress(struct store_backup *backup)
{
    struct backing *b = container_of(backup, struct backing, backup);
    if (b->pause)
        b->pause(b);
    return !b->stop;
}

static void *backing_run(void *arg)
{
    struct backing *b = arg;
    b->backup.progress = backing_progress;
    b->st = store_backup(b->store, &b->backup, &b->err);
    b->done = true;
    return NULL;
}

static void backing_start(struct backup_test *t, struct backing *b)
{
    b->store = t->store.store;
    b->backup.to = t->to;
    assert_int_equal(pthread_create(&b->thread, NULL, backing_run, b), 0);
}

static enum status backup(struct backup_test *t, struct backing *b)
{
    backing_start(t, b);
    pthread_join(b->thread, NULL);
    return b->st;
}

static void expect_backup(struct backup_test *t)
{
    struct backing b = {0};
    if (backup(t, &b))
        fail_msg("store_backup: %s: %s", status_text(b.st), b.err.text);
    assert_int_equal(b.backup.n_damaged, 0);
}

static bool is_there(const char *path)
{
    return access(path, F_OK) == 0;
}

/* The copy as a store of its own; test_copy_end() removes it. */
static void copy_open(struct backup_test *t, struct test_store *copy)
{
    assert_false(is_there(t->partial));
    snprintf(copy->dir, sizeof copy->dir, "%s", t->to);
    snprintf(copy->uri, sizeof copy->uri, "lmdb:%s", t->to);
    test_env_start(&copy->env);
    struct err e = {0};
    /* Not created: it is there, or it is not. */
    enum status st =
        store_open(copy->uri, &(struct store_options){.lease_ms = LEASE_MS}, &copy->store, &e);
    if (st)
        fail_msg("store_open: %s", e.text);
}

/* ---- keys and bodies ---- */

/* A body that can be told from its key and version. */
static uint32_t body_make(uint32_t key, uint64_t version, uint8_t *out)
{
    struct chance c = {key * 1000003ull + version};
    static const uint32_t lengths[] = {0, 1, 100, 4096, 5000, 16384, 65536, 200000};
    uint32_t len = lengths[chance_below(&c, 8)];
    for (uint32_t i = 0; i < len; i += 8) {
        uint64_t v = chance_u64(&c);
        memcpy(out + i, &v, len - i < 8 ? len - i : 8);
    }
    return len;
}

/* Version 0: the key is not there. */
static void commit_versions(struct test_store *t, const uint32_t *keys, size_t n, uint64_t version,
                            uint64_t *model)
{
    static uint8_t bodies[8][200008];
    char names[8][24], head[32];
    struct store_mutation m[9];
    snprintf(head, sizeof head, "%llu", (unsigned long long)version);
    for (size_t i = 0; i < n; i++) {
        snprintf(names[i], sizeof names[i], "k%05u", keys[i]);
        bool clear = (keys[i] + version) % 7 == 0;
        model[keys[i]] = clear ? 0 : version;
        m[i] = (struct store_mutation){
            .kind = clear ? STORE_CLEAR : STORE_SET, .key = text(names[i]), .head = text(head)};
        if (!clear)
            m[i].body = (struct slice){bodies[i], body_make(keys[i], version, bodies[i])};
    }
    m[n] = (struct store_mutation){.kind = STORE_SET, .key = text("version"), .head = text(head)};
    assert_int_equal(test_commit(t, NULL, 0, m, n + 1), ST_OK);
}

static uint64_t number_at(struct test_store *t, const char *key)
{
    struct store_get get = {.key = text(key)};
    struct test_read r = {.read = {.gets = &get, .n_gets = 1}};
    assert_int_equal(test_read(t, &r), ST_OK);
    assert_int_equal(get.st, ST_OK);
    char digits[32] = "";
    memcpy(digits, get.head.data, get.head.len);
    store_read_release(&r.read);
    return strtoull(digits, NULL, 10);
}

static void expect_model(struct test_store *t, const uint64_t *model)
{
    static uint8_t want[200008], got[200008];
    for (uint32_t i = 0; i < KEYS; i++) {
        char name[24], head[32];
        snprintf(name, sizeof name, "k%05u", i);
        struct store_get get = {.key = text(name), .body = got, .body_cap = sizeof got};
        struct test_read r = {.read = {.gets = &get, .n_gets = 1}};
        assert_int_equal(test_read(t, &r), ST_OK);
        assert_int_equal(get.st, model[i] ? ST_OK : ST_NOTFOUND);
        if (model[i]) {
            snprintf(head, sizeof head, "%llu", (unsigned long long)model[i]);
            assert_int_equal(get.head.len, strlen(head));
            assert_memory_equal(get.head.data, head, strlen(head));
            uint32_t len = body_make(i, model[i], want);
            assert_int_equal(get.body_len, len);
            assert_memory_equal(got, want, len);
        }
        store_read_release(&r.read);
    }
}

static void change_some(struct backup_test *t, uint64_t version, uint64_t *model)
{
    uint32_t keys[8];
    for (int i = 0; i < 8; i++) {
        keys[i] = (uint32_t)chance_below(&t->chance, KEYS);
        for (int j = 0; j < i; j++)
            if (keys[j] == keys[i])
                keys[i--] = KEYS; /* drawn again */
    }
    commit_versions(&t->store, keys, 8, version, model);
}

static uint64_t allocated(const char *dir, const char *name)
{
    char path[300];
    struct stat sb;
    snprintf(path, sizeof path, "%s/%s", dir, name);
    assert_int_equal(stat(path, &sb), 0);
    return (uint64_t)sb.st_blocks * 512;
}

static void test_contents(void **state)
{
    struct backup_test *t = *state;
    uint64_t model[KEYS] = {0}, version = 0;
    for (int i = 0; i < 400; i++)
        change_some(t, ++version, model);
    expect_backup(t);
    struct test_store copy = {0};
    copy_open(t, &copy);
    expect_model(&copy, model);
    assert_int_equal(number_at(&copy, "version"), version);
    /* No room for what is not there any more. */
    struct store_info info;
    struct err e = {0};
    assert_int_equal(store_info(copy.store, &info, &e), ST_OK);
    assert_int_equal(info.bytes_free, 0);
    assert_true(allocated(copy.dir, "blocks") <= info.bytes_used);
    /* It goes on as a store, the one copied knows nothing of it. */
    uint64_t theirs[KEYS];
    memcpy(theirs, model, sizeof theirs);
    for (uint64_t v = version + 1; v < version + 200; v++) {
        uint32_t keys[2] = {(uint32_t)chance_below(&t->chance, KEYS / 2),
                            KEYS / 2 + (uint32_t)chance_below(&t->chance, KEYS / 2)};
        commit_versions(&copy, keys, 2, v, theirs);
    }
    expect_model(&copy, theirs);
    store_close(copy.store);
    test_store_reopen(&copy);
    expect_model(&copy, theirs);
    test_store_end(&copy);
    expect_model(&t->store, model);
}

/* Between its first batches the backup waits here until everything was replaced several times. */
static _Atomic uint64_t versions_done;

static void wait_for_versions(struct backing *b)
{
    uint64_t until = *(uint64_t *)b->arg;
    while (versions_done < until)
        usleep(1000);
}

/* The copy is what one commit left, whatever came behind it, and space is used again afterwards. */
static void test_while_written(void **state)
{
    struct backup_test *t = *state;
    enum { ROUNDS = 3, BEFORE = 300, WHILE = 600 };
    uint64_t model[KEYS] = {0}, version = 0;
    uint64_t(*history)[KEYS] = mem_zalloc((BEFORE + WHILE) * (ROUNDS + 2) * sizeof *history);
    for (int round = 0; round < ROUNDS; round++) {
        for (int i = 0; i < BEFORE; i++) {
            change_some(t, ++version, model);
            memcpy(history[version], model, sizeof model);
        }
        versions_done = version;
        uint64_t asked = version, until = version + WHILE;
        struct backing b = {.pause = wait_for_versions, .arg = &until};
        backing_start(t, &b);
        while (!b.done) {
            if (version >= until) {
                usleep(1000);
                continue;
            }
            change_some(t, ++version, model);
            memcpy(history[version], model, sizeof model);
            versions_done = version;
        }
        pthread_join(b.thread, NULL);
        if (b.st)
            fail_msg("store_backup: %s", b.err.text);
        struct test_store copy = {0};
        copy_open(t, &copy);
        uint64_t found = number_at(&copy, "version");
        assert_in_range(found, asked, until - 1);
        expect_model(&copy, history[found]);
        test_store_end(&copy);
    }
    /* Without a reader the space of what is replaced is used again. */
    uint64_t before = allocated(t->store.dir, "blocks");
    for (int i = 0; i < 2 * WHILE; i++)
        change_some(t, ++version, model);
    assert_true(allocated(t->store.dir, "blocks") <= before + (64u << 20));
    expect_model(&t->store, model);
    free(history);
}

/* ---- logs ---- */

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

struct taken {
    uint64_t next;
    bool wrong;
};

static bool take(void *arg, const struct store_log_record *rec)
{
    struct taken *taken = arg;
    static uint8_t want[200008];
    payload_make(want, rec->seq, payload_len(rec->seq));
    taken->wrong |= rec->seq != taken->next || rec->payload_len != payload_len(rec->seq) ||
                    memcmp(rec->payload, want, rec->payload_len) != 0;
    taken->next = rec->seq + 1;
    return true;
}

struct appending {
    struct test_store *store;
    struct store_log *log;
    struct test_commit commit;
    struct store_mutation m;
    char head[32];
    struct store_log_sync sync;
    bool committing, syncing;
    uint8_t *memory; /* payloads until they are submitted */
};

/* Says in a commit that all records so far are applied, as a generation does. */
static void apply_start(struct appending *a)
{
    uint64_t seq = store_log_next_seq(a->log) - 1;
    snprintf(a->head, sizeof a->head, "%llu", (unsigned long long)seq);
    a->m =
        (struct store_mutation){.kind = STORE_SET, .key = text("applied"), .head = text(a->head)};
    a->commit = (struct test_commit){
        .commit = {.mutations = &a->m, .n_mutations = 1, .log = a->log, .log_keep_from = seq + 1}};
    test_commit_start(a->store, &a->commit);
    a->committing = true;
}

static void sync_answered(struct store_log_sync *sync, enum status st)
{
    assert_int_equal(st, ST_OK);
    container_of(sync, struct appending, sync)->syncing = false;
}

static void sync_start(struct appending *a)
{
    a->sync = (struct store_log_sync){.done = sync_answered};
    a->syncing = true;
    store_log_sync(a->log, &a->sync);
}

/* Appends some records and submits them; a sync is always under way, and a commit where
 * `commits`. */
static void append_some(struct appending *a, struct chance *c, bool commits)
{
    size_t at = 0;
    uint64_t n = 1 + chance_below(c, 6);
    for (uint64_t i = 0; i < n; i++) {
        uint64_t seq = store_log_next_seq(a->log);
        uint32_t len = payload_len(seq);
        if (store_log_record_bytes(len) > store_log_room(a->log))
            break;
        uint8_t meta[32] = {0};
        payload_make(a->memory + at, seq, len);
        struct iovec iov = {a->memory + at, len};
        assert_int_equal(store_log_append(a->log, 5, meta, &iov, 1, len), seq);
        at += len;
    }
    assert_int_equal(store_log_submit(a->log), ST_OK);
    if (!a->syncing)
        sync_start(a);
    if (a->committing && a->commit.done) {
        assert_int_equal(a->commit.st, ST_OK);
        a->committing = false;
    }
    if (!a->committing && commits)
        apply_start(a);
    while (test_env_step(&a->store->env, 0))
        ;
}

/* The keys and the log of the copy together have every record that was submitted before the copy
 * was asked for, and no later one without those before it, while the ring goes round and round. */
static void test_log_in_use(void **state)
{
    struct backup_test *t = *state;
    struct err e = {0};
    assert_int_equal(store_session_begin(t->store.store, session, &e), ST_OK);
    struct appending a = {.store = &t->store, .memory = mem_alloc(2u << 20)};
    assert_int_equal(
        store_log_open(t->store.store, &t->store.env.env, session, LOG_BYTES, &a.log, &e), ST_OK);
    assert_int_equal(test_set(&t->store, "applied", "0"), ST_OK);
    uint64_t replayed = 0; /* where nothing was committed meanwhile */
    for (int round = 0; round < 40; round++) {
        for (uint64_t i = chance_below(&t->chance, 100); i > 0; i--)
            append_some(&a, &t->chance, true);
        uint64_t asked = store_log_next_seq(a.log) - 1;
        bool commits = round % 4 != 0;
        late_logs_us = round % 2 ? chance_below(&t->chance, 30000) : 0;
        struct backing b = {0};
        backing_start(t, &b);
        while (!b.done)
            append_some(&a, &t->chance, commits);
        pthread_join(b.thread, NULL);
        late_logs_us = 0;
        if (b.st)
            fail_msg("store_backup: %s", b.err.text);
        assert_int_equal(b.backup.n_damaged, 0);
        struct test_store copy = {0};
        copy_open(t, &copy);
        assert_int_equal(store_session_probe(copy.store, session), STORE_SESSION_DEAD);
        uint64_t applied = number_at(&copy, "applied");
        struct taken taken = {.next = applied + 1};
        enum status st =
            store_log_replay(copy.store, store_log_id(a.log), 5, applied, take, &taken, &e);
        if (st)
            fail_msg("replay of the copy: %s", e.text);
        assert_false(taken.wrong);
        assert_true(taken.next > asked);
        replayed += commits ? 0 : taken.next - applied - 1;
        test_store_end(&copy);
    }
    assert_true(replayed > 0);
    while (a.syncing || (a.committing && !a.commit.done))
        test_env_step(&t->store.env, 20);
    store_log_close(a.log, true);
    store_session_end(t->store.store, session);
    free(a.memory);
}

/* A record that is damaged after it was synced: no replay of the copy may pass for whole. */
static void test_damaged_log(void **state)
{
    struct backup_test *t = *state;
    struct err e = {0};
    struct store_log *log;
    assert_int_equal(store_session_begin(t->store.store, session, &e), ST_OK);
    assert_int_equal(
        store_log_open(t->store.store, &t->store.env.env, session, LOG_BYTES, &log, &e), ST_OK);
    uint8_t memory[600], meta[32] = {0};
    for (uint64_t seq = 1; seq <= 12; seq++) {
        payload_make(memory, seq, 500);
        struct iovec iov = {memory, 500};
        assert_int_equal(store_log_append(log, 5, meta, &iov, 1, 500), seq);
        assert_int_equal(store_log_submit(log), ST_OK);
        struct appending a = {.log = log};
        sync_start(&a);
        while (a.syncing)
            test_env_step(&t->store.env, 20);
    }
    uint64_t id = store_log_id(log);
    store_log_close(log, false);
    store_session_end(t->store.store, session);
    char path[300];
    snprintf(path, sizeof path, "%s/log/%016llx", t->store.dir, (unsigned long long)id);
    int fd = open(path, O_RDWR);
    uint8_t byte;
    off_t at = 4096 + 5 * (off_t)store_log_record_bytes(500) + 8;
    assert_int_equal(pread(fd, &byte, 1, at), 1);
    byte ^= 1;
    assert_int_equal(pwrite(fd, &byte, 1, at), 1);
    close(fd);
    struct backing b = {0};
    assert_int_equal(backup(t, &b), ST_OK);
    assert_true(b.backup.n_damaged > 0);
    struct test_store copy = {0};
    copy_open(t, &copy);
    struct taken taken = {.next = 1};
    assert_int_equal(store_log_replay(copy.store, id, 5, 0, take, &taken, &e), ST_IO);
    assert_int_equal(taken.next, 6);
    test_store_end(&copy);
}

/* ---- folders ---- */

static void make_file(const char *dir, const char *name)
{
    char path[320];
    snprintf(path, sizeof path, "%s/%s", dir, name);
    int fd = open(path, O_CREAT | O_WRONLY, 0600);
    assert_true(fd >= 0);
    close(fd);
}

static void expect_refused(struct backup_test *t, enum status want, const char *words)
{
    struct backing b = {0};
    assert_int_equal(backup(t, &b), want);
    if (!strstr(b.err.text, words))
        fail_msg("\"%s\" does not say \"%s\"", b.err.text, words);
}

static void test_folders(void **state)
{
    struct backup_test *t = *state;
    assert_int_equal(test_set(&t->store, "key", "value"), ST_OK);
    /* Something is there. */
    assert_int_equal(mkdir(t->to, 0700), 0);
    make_file(t->to, "file");
    expect_refused(t, ST_EXISTS, "something");
    assert_false(is_there(t->partial));
    test_folder_remove(t->to);
    make_file("/", t->to);
    expect_refused(t, ST_EXISTS, "no folder");
    unlink(t->to);
    /* Somebody's own folder of that name. */
    assert_int_equal(mkdir(t->partial, 0700), 0);
    make_file(t->partial, "data.mdb");
    expect_refused(t, ST_EXISTS, "no unfinished backup");
    char file[300];
    snprintf(file, sizeof file, "%s/data.mdb", t->partial);
    assert_true(is_there(file));
    test_folder_remove(t->partial);
    /* An unfinished one with something of somebody's. */
    assert_int_equal(mkdir(t->partial, 0700), 0);
    make_file(t->partial, "backup");
    make_file(t->partial, "blocks");
    make_file(t->partial, "letter");
    expect_refused(t, ST_EXISTS, "belongs to no backup");
    snprintf(file, sizeof file, "%s/letter", t->partial);
    assert_true(is_there(file));
    test_folder_remove(t->partial);
    /* An unfinished one; into an empty folder. */
    assert_int_equal(mkdir(t->to, 0700), 0);
    assert_int_equal(mkdir(t->partial, 0700), 0);
    make_file(t->partial, "backup");
    make_file(t->partial, "blocks");
    snprintf(file, sizeof file, "%s/log", t->partial);
    assert_int_equal(mkdir(file, 0700), 0);
    make_file(file, "0123456789abcdef");
    expect_backup(t);
    snprintf(file, sizeof file, "%s/log/0123456789abcdef", t->to);
    assert_false(is_there(file));
    snprintf(file, sizeof file, "%s/backup", t->to);
    assert_false(is_there(file));
    struct test_store copy = {0};
    copy_open(t, &copy);
    test_expect(&copy, "key", "value");
    test_store_end(&copy);
}

static void second_at_once(struct backing *b)
{
    struct err e = {0};
    struct store_backup second = {.to = b->backup.to};
    enum status *st = b->arg;
    *st = store_backup(b->store, &second, &e);
}

static void test_two_at_once(void **state)
{
    struct backup_test *t = *state;
    enum status st = ST_OK;
    assert_int_equal(test_set(&t->store, "key", "value"), ST_OK);
    struct backing b = {.pause = second_at_once, .arg = &st};
    assert_int_equal(backup(t, &b), ST_OK);
    assert_int_equal(st, ST_BUSY);
    struct test_store copy = {0};
    copy_open(t, &copy);
    test_expect(&copy, "key", "value");
    test_store_end(&copy);
}

static void test_interrupted(void **state)
{
    struct backup_test *t = *state;
    assert_int_equal(test_set(&t->store, "key", "value"), ST_OK);
    struct backing b = {.stop = true};
    assert_int_equal(backup(t, &b), ST_SHUTDOWN);
    assert_false(is_there(t->to));
    assert_false(is_there(t->partial));
    expect_backup(t);
}

/* The disk of the store runs full: its users need the space more. */
static void run_full(struct backing *b)
{
    (void)b;
    available_max = 8u << 20;
}

static void test_disk_runs_full(void **state)
{
    struct backup_test *t = *state;
    uint64_t model[KEYS] = {0};
    for (uint64_t v = 1; v < 200; v++)
        change_some(t, v, model);
    available_max = 1u << 20;
    expect_refused(t, ST_NOSPC, "has room for");
    available_max = 200u << 20;
    struct backing b = {.pause = run_full};
    assert_int_equal(backup(t, &b), ST_NOSPC);
    if (!strstr(b.err.text, "given up"))
        fail_msg("\"%s\"", b.err.text);
    assert_false(is_there(t->to));
    assert_false(is_there(t->partial));
    available_max = 0;
    expect_backup(t);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_contents, begin, end),
        cmocka_unit_test_setup_teardown(test_while_written, begin, end),
        cmocka_unit_test_setup_teardown(test_log_in_use, begin, end),
        cmocka_unit_test_setup_teardown(test_damaged_log, begin, end),
        cmocka_unit_test_setup_teardown(test_folders, begin, end),
        cmocka_unit_test_setup_teardown(test_two_at_once, begin, end),
        cmocka_unit_test_setup_teardown(test_interrupted, begin, end),
        cmocka_unit_test_setup_teardown(test_disk_runs_full, begin, end),
    };
    return cmocka_run_group_tests_name("store_backup", tests, NULL, NULL);
}
