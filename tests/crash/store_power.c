/*
 * Loss of the machine, for the embedded store by itself. Everything the store,
 * its logs and LMDB write is recorded by doubles of the system calls, with every
 * sync and every answer among it. Then the machine dies at many places of that
 * record: what was not synced by then is kept, dropped or kept in part, sector by
 * sector, and the store that is left must open and hold a prefix of the commits
 * that reaches at least as far as the answers did (G1, G2, G3), and the log all
 * records that a sync was answered for.
 */
#include <fcntl.h>
#include <stdarg.h>
#include <sys/uio.h>

#include "../unit/aio_double.h"
#include "../unit/double.h"
#include "../unit/store_test.h"

#define COMMITS 60
#define KEYS 40
#define LOG_BYTES (4u << 20)
#define SECTOR 512u

/* Of the data file; little more than what lives and what is pending at a time. */
#define FREE_BYTES (1600u << 10)

enum { FILE_INDEX, FILE_BLOCKS, FILE_LOG, FILES };
enum kind { OP_WRITE, OP_SYNC, OP_SIZE, OP_COMMITTED, OP_SYNCED };

struct op {
    enum kind kind;
    int file;
    uint64_t at; /* offset; or the number of a commit or record that was answered */
    size_t len;
    size_t covers; /* of a sync: the operations that had ended when it began */
    bool through;  /* a write that is its own sync */
    uint8_t *data;
};

static struct {
    pthread_mutex_t lock;
    bool on, ignore_blocks_sync;
    _Atomic unsigned n_at_once;
    char dir[200];
    char names[FILES][300];
    struct op *ops;
    size_t n, cap;
} trace = {.lock = PTHREAD_MUTEX_INITIALIZER};

static int file_of(int fd)
{
    if (!trace.on)
        return -1;
    char link[40], path[400];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    if (n <= 0)
        return -1;
    path[n] = '\0';
    for (int i = 0; i < FILES; i++)
        if (strcmp(path, trace.names[i]) == 0)
            return i;
    return -1;
}

/* Under trace.lock. */
static void record(struct op op)
{
    mem_grow(&trace.ops, &trace.cap, trace.n + 1, sizeof *trace.ops);
    trace.ops[trace.n++] = op;
}

static void record_answer(enum kind kind, uint64_t number)
{
    pthread_mutex_lock(&trace.lock);
    if (trace.on)
        record((struct op){.kind = kind, .at = number});
    pthread_mutex_unlock(&trace.lock);
}

/* ---- the doubles ---- */

static void record_write(int fd, const struct iovec *iov, int n_iov, off_t at, ssize_t written)
{
    int file = file_of(fd);
    if (file < 0 || written <= 0)
        return;
    struct op op = {.kind = OP_WRITE,
                    .file = file,
                    .at = (uint64_t)at,
                    .len = (size_t)written,
                    .through = fcntl(fd, F_GETFL) & O_DSYNC,
                    .data = mem_alloc((size_t)written)};
    size_t used = 0;
    for (int i = 0; i < n_iov && used < op.len; i++) {
        size_t part = min_u64(iov[i].iov_len, op.len - used);
        memcpy(op.data + used, iov[i].iov_base, part);
        used += part;
    }
    pthread_mutex_lock(&trace.lock);
    record(op);
    pthread_mutex_unlock(&trace.lock);
}

ssize_t double_pwritev(int fd, const struct iovec *iov, int n, off_t at) __asm__("pwritev");
ssize_t double_pwritev64(int fd, const struct iovec *iov, int n, off_t at) __asm__("pwritev64");
ssize_t double_pwrite(int fd, const void *data, size_t len, off_t at) __asm__("pwrite");
ssize_t double_pwrite64(int fd, const void *data, size_t len, off_t at) __asm__("pwrite64");
ssize_t double_writev(int fd, const struct iovec *iov, int n) __asm__("writev");
int double_fdatasync(int fd) __asm__("fdatasync");
int double_fallocate(int fd, int mode, off_t at, off_t len) __asm__("fallocate");
int double_fallocate64(int fd, int mode, off_t at, off_t len) __asm__("fallocate64");

ssize_t double_pwritev(int fd, const struct iovec *iov, int n, off_t at)
{
    ssize_t (*real_pwritev)(int, const struct iovec *, int, off_t);
    real("pwritev", &real_pwritev);
    ssize_t written = real_pwritev(fd, iov, n, at);
    record_write(fd, iov, n, at, written);
    return written;
}

ssize_t double_pwritev64(int fd, const struct iovec *iov, int n, off_t at)
{
    return double_pwritev(fd, iov, n, at);
}

long syscall(long number, ...)
{
    long (*real_syscall)(long, ...);
    real("syscall", &real_syscall);
    long a[6], result;
    va_list args;
    va_start(args, number);
    aio_double_arguments(a, args);
    va_end(args);
    if (aio_double_call(number, a, double_pwritev, &result)) {
        trace.n_at_once += number == SYS_io_getevents;
        return result;
    }
    return real_syscall(number, a[0], a[1], a[2], a[3], a[4], a[5]);
}

ssize_t double_pwrite(int fd, const void *data, size_t len, off_t at)
{
    struct iovec iov = {(void *)(uintptr_t)data, len};
    return double_pwritev(fd, &iov, 1, at);
}

ssize_t double_pwrite64(int fd, const void *data, size_t len, off_t at)
{
    return double_pwrite(fd, data, len, at);
}

ssize_t double_writev(int fd, const struct iovec *iov, int n)
{
    off_t at = lseek(fd, 0, SEEK_CUR);
    ssize_t (*real_writev)(int, const struct iovec *, int);
    real("writev", &real_writev);
    ssize_t written = real_writev(fd, iov, n);
    record_write(fd, iov, n, at, written);
    return written;
}

int double_fdatasync(int fd)
{
    int file = file_of(fd);
    pthread_mutex_lock(&trace.lock);
    size_t covers = trace.n;
    pthread_mutex_unlock(&trace.lock);
    /* The real disk need not be waited for: the record is what survives. */
    if (file >= 0 && !(file == FILE_BLOCKS && trace.ignore_blocks_sync)) {
        pthread_mutex_lock(&trace.lock);
        record((struct op){.kind = OP_SYNC, .file = file, .covers = covers});
        pthread_mutex_unlock(&trace.lock);
    }
    return 0;
}

int double_fallocate(int fd, int mode, off_t at, off_t len)
{
    int (*real_fallocate)(int, int, off_t, off_t);
    real("fallocate", &real_fallocate);
    int rc = real_fallocate(fd, mode, at, len);
    int file = file_of(fd);
    if (rc == 0 && file >= 0 && mode == 0) {
        pthread_mutex_lock(&trace.lock);
        record((struct op){.kind = OP_SIZE, .file = file, .at = (uint64_t)(at + len)});
        pthread_mutex_unlock(&trace.lock);
    }
    return rc;
}

int double_fallocate64(int fd, int mode, off_t at, off_t len)
{
    return double_fallocate(fd, mode, at, len);
}

/* ---- the work that is recorded ---- */

static const uint8_t session[16] = "a session's name";
static int writer_of[COMMITS + 1][KEYS]; /* which commit last wrote a key, as of a commit */
static uint64_t keep_of[COMMITS + 1];    /* first record needed as of a commit */

static size_t body_len(int commit, int key)
{
    struct chance c = {(uint64_t)(commit * 1000 + key)};
    return 1 + chance_below(&c, 20000);
}

static void body_make(uint8_t *out, int commit, int key)
{
    struct chance c = {(uint64_t)(commit * 7919 + key)};
    for (size_t i = 0; i < body_len(commit, key); i++)
        out[i] = (uint8_t)(i % 512 ? out[i - 1] * 5 + 1 : (uint8_t)chance_u64(&c));
}

static size_t record_len(uint64_t seq)
{
    struct chance c = {seq};
    return chance_below(&c, 12000);
}

struct power_sync {
    struct store_log_sync sync;
    uint64_t below;
    bool done;
};

static void synced(struct store_log_sync *sync, enum status st)
{
    struct power_sync *s = container_of(sync, struct power_sync, sync);
    CHECK(st == ST_OK);
    record_answer(OP_SYNCED, s->below);
    s->done = true;
}

static void append_some(struct store_log *log, struct chance *chance, uint8_t *memory)
{
    for (uint64_t n = chance_below(chance, 5); n > 0; n--) {
        uint64_t seq = store_log_next_seq(log);
        uint8_t meta[32] = {0};
        size_t len = record_len(seq);
        if (store_log_room(log) < store_log_record_bytes(len))
            break;
        memset(memory, (int)seq, len);
        struct iovec iov = {memory, len};
        store_log_append(log, 1, meta, &iov, 1, (uint32_t)len);
        memory += len;
    }
    CHECK(store_log_submit(log) == ST_OK);
}

/* Two commits at a time, as generations overlap, with log records between them. */
static void work(struct test_store *t, struct store_log *log, struct chance *chance)
{
    static struct store_mutation m[2][KEYS + 1];
    static struct test_commit c[2];
    static uint8_t heads[2][8], gen[2][8];
    static char names[KEYS][8];
    uint8_t *bodies = mem_alloc(2 * KEYS * 20001), *memory = mem_alloc(5 * 12000);
    for (int k = 0; k < KEYS; k++)
        snprintf(names[k], sizeof names[k], "key%02d", k);
    keep_of[0] = 1;
    for (int i = 1; i <= COMMITS; i += 2) {
        append_some(log, chance, memory);
        struct power_sync s = {.sync.done = synced, .below = store_log_next_seq(log)};
        bool sync = chance_below(chance, 2);
        if (sync)
            store_log_sync(log, &s.sync);
        for (int j = 0; j < 2; j++) {
            int commit = i + j;
            size_t n = 0;
            memcpy(writer_of[commit], writer_of[commit - 1], sizeof writer_of[0]);
            put_le64(heads[j], (uint64_t)commit);
            put_le64(gen[j], (uint64_t)commit);
            m[j][n++] =
                (struct store_mutation){.kind = STORE_SET, .key = text("gen"), .head = {gen[j], 8}};
            for (int k = 0; k < KEYS; k++) {
                if (chance_below(chance, 3))
                    continue;
                uint8_t *body = bodies + (size_t)(j * KEYS + k) * 20001;
                body_make(body, commit, k);
                writer_of[commit][k] = commit;
                m[j][n++] = (struct store_mutation){
                    STORE_SET, text(names[k]), {heads[j], 8}, {body, body_len(commit, k)}};
            }
            uint64_t next = store_log_next_seq(log);
            keep_of[commit] = next - chance_below(chance, next - keep_of[commit - 1] + 1);
            c[j].commit = (struct store_commit){
                .mutations = m[j], .n_mutations = n, .log = log, .log_keep_from = keep_of[commit]};
            test_commit_start(t, &c[j]);
        }
        for (int j = 0; j < 2; j++) {
            test_env_until(&t->env, &c[j].done);
            CHECK(c[j].st == ST_OK);
            record_answer(OP_COMMITTED, (uint64_t)(i + j));
        }
        if (sync)
            test_env_until(&t->env, &s.done);
    }
    free(bodies);
    free(memory);
}

/* ---- death ---- */

static void file_copy(const char *from, const char *to)
{
    char command[700];
    snprintf(command, sizeof command, "cp -a --sparse=always '%s' '%s'", from, to);
    CHECK(system(command) == 0);
}

/* Puts what is left of the writes before `cut` into the files of `dir`. */
static void apply(const char *dir, const char *log_name, size_t cut, struct chance *chance)
{
    int fds[FILES];
    const char *names[FILES] = {"data.mdb", "blocks", log_name};
    for (int i = 0; i < FILES; i++) {
        char path[600];
        snprintf(path, sizeof path, "%s/%s", dir, names[i]);
        fds[i] = open(path, O_RDWR);
        CHECK(fds[i] >= 0);
    }
    size_t synced_below[FILES] = {0};
    for (size_t i = 0; i < cut; i++)
        if (trace.ops[i].kind == OP_SYNC)
            synced_below[trace.ops[i].file] = trace.ops[i].covers;
    uint64_t mode = chance_below(chance, 4); /* lose all, keep all, by write, by sector */
    for (size_t i = 0; i < cut; i++) {
        struct op *op = &trace.ops[i];
        if (op->kind == OP_SIZE) {
            struct stat sb;
            CHECK(fstat(fds[op->file], &sb) == 0);
            if ((uint64_t)sb.st_size < op->at)
                CHECK(ftruncate(fds[op->file], (off_t)op->at) == 0);
        }
        if (op->kind != OP_WRITE)
            continue;
        bool safe = op->through || i < synced_below[op->file];
        bool keep_all = safe || mode == 1 || (mode == 2 && chance_below(chance, 2));
        for (size_t at = 0; at < op->len;) {
            size_t part = min_u64(op->len - at, SECTOR - (op->at + at) % SECTOR);
            if (keep_all)
                part = op->len - at;
            if (keep_all || (mode == 3 && chance_below(chance, 2)))
                CHECK(pwrite(fds[op->file], op->data + at, part, (off_t)(op->at + at)) ==
                      (ssize_t)part);
            at += part;
        }
    }
    for (int i = 0; i < FILES; i++)
        close(fds[i]);
}

struct replayed {
    uint64_t next;
    bool wrong;
};

static bool take(void *arg, const struct store_log_record *rec)
{
    struct replayed *r = arg;
    const uint8_t *p = rec->payload;
    r->wrong |= (r->next && rec->seq != r->next) || rec->payload_len != record_len(rec->seq);
    for (uint32_t i = 0; i < rec->payload_len; i++)
        r->wrong |= p[i] != (uint8_t)rec->seq;
    r->next = rec->seq + 1;
    return true;
}

/* Opens what is left; returns what is wrong with it, or NULL. */
static const char *judge(const char *dir, uint64_t log_id, uint64_t acked, uint64_t synced_to)
{
    static char text_of[600];
    struct test_store t = {0};
    struct err e = {0};
    char uri[300];
    snprintf(uri, sizeof uri, "lmdb:%s", dir);
    enum status st = store_open(uri, &(struct store_options){.lease_ms = LEASE_MS}, &t.store, &e);
    if (st) {
        snprintf(text_of, sizeof text_of, "does not open: %.500s", e.text);
        return text_of;
    }
    test_env_start(&t.env);
    const char *wrong = NULL;
    static uint8_t bodies[KEYS][20001], want[20001];
    char names[KEYS][8];
    struct store_get gets[KEYS + 1];
    for (int k = 0; k < KEYS; k++) {
        snprintf(names[k], sizeof names[k], "key%02d", k);
        gets[k] = (struct store_get){.key = text(names[k]), .body = bodies[k], .body_cap = 20001};
    }
    gets[KEYS] = (struct store_get){.key = text("gen")};
    struct test_read r = {.read = {.gets = gets, .n_gets = KEYS + 1}};
    if (test_read(&t, &r))
        wrong = "does not read";
    uint64_t n = !wrong && gets[KEYS].st == ST_OK ? get_le64(gets[KEYS].head.data) : 0;
    if (n < acked)
        wrong = "an answered commit is gone";
    if (n > COMMITS)
        wrong = "a commit nobody made";
    for (int k = 0; k < KEYS && !wrong; k++) {
        int writer = writer_of[n][k];
        if (writer == 0) {
            if (gets[k].st != ST_NOTFOUND)
                wrong = "a key of a later commit";
            continue;
        }
        body_make(want, writer, k);
        if (gets[k].st != ST_OK || get_le64(gets[k].head.data) != (uint64_t)writer)
            wrong = "a key does not fit the last commit";
        else if (gets[k].body_len != body_len(writer, k) ||
                 memcmp(bodies[k], want, gets[k].body_len))
            wrong = "a body is not the one that was committed";
    }
    store_read_release(&r.read);
    struct replayed replayed = {0};
    if (!wrong && store_log_replay(t.store, log_id, 1, keep_of[n] - 1, take, &replayed, &e))
        wrong = "the log does not replay";
    if (!wrong && replayed.wrong)
        wrong = "a record that was not appended";
    if (!wrong && keep_of[n] < synced_to && replayed.next < synced_to)
        wrong = "a record that was synced is gone";
    /* And it goes on: everything is overwritten once, and read again. */
    for (int k = 0; k < KEYS && !wrong; k++) {
        struct store_mutation m = {STORE_SET, text(names[k]), text("new"), {want, 9000}};
        if (test_commit(&t, NULL, 0, &m, 1))
            wrong = "does not take a commit";
    }
    store_close(t.store);
    test_env_stop(&t.env);
    return wrong;
}

/* Leaves little free space in the data file, so that the work goes through it many times and
 * space freed by one commit is wanted by one soon after. */
static void fill_up(struct test_store *t)
{
    struct store_info info;
    struct err e = {0};
    uint8_t *zeros = mem_zalloc(1u << 16);
    assert_int_equal(test_set(t, "first", ""), ST_OK);
    for (int i = 0; i < 5000; i++) {
        assert_int_equal(store_info(t->store, &info, &e), ST_OK);
        if (i > 0 && info.bytes_free < FREE_BYTES)
            break;
        char name[16];
        snprintf(name, sizeof name, "fill%04d", i);
        struct store_mutation m = {STORE_SET, text(name), text(""), {zeros, 1u << 16}};
        assert_int_equal(test_commit(t, NULL, 0, &m, 1), ST_OK);
    }
    assert_true(info.bytes_free < FREE_BYTES);
    free(zeros);
}

/* Records a run and lets the machine die `cuts` times; returns how often that did harm. */
static int power_cuts(int cuts, bool ignore_blocks_sync, struct chance *chance)
{
    struct test_store t = {0};
    struct err e = {0};
    struct store_log *log;
    test_store_begin(&t, access("/dev/shm", W_OK) == 0 ? "/dev/shm" : NULL);
    fill_up(&t);
    assert_int_equal(store_log_open(t.store, &t.env.env, session, LOG_BYTES, &log, &e), ST_OK);
    uint64_t log_id = store_log_id(log);
    char log_name[40], base[240], image[240];
    snprintf(log_name, sizeof log_name, "log/%016llx", (unsigned long long)log_id);
    snprintf(base, sizeof base, "%s.base", t.dir);
    snprintf(image, sizeof image, "%s.image", t.dir);
    file_copy(t.dir, base);
    snprintf(trace.names[FILE_INDEX], 300, "%s/data.mdb", t.dir);
    snprintf(trace.names[FILE_BLOCKS], 300, "%s/blocks", t.dir);
    snprintf(trace.names[FILE_LOG], 300, "%s/%s", t.dir, log_name);
    trace.ignore_blocks_sync = ignore_blocks_sync;
    trace.on = true;
    work(&t, log, chance);
    trace.on = false;
    store_log_close(log, false);

    int harm = 0;
    for (int i = 0; i < cuts; i++) {
        size_t cut = chance_below(chance, trace.n + 1);
        uint64_t acked = 0, synced_to = 0;
        for (size_t j = 0; j < cut; j++) {
            if (trace.ops[j].kind == OP_COMMITTED)
                acked = trace.ops[j].at;
            if (trace.ops[j].kind == OP_SYNCED)
                synced_to = trace.ops[j].at;
        }
        file_copy(base, image);
        apply(image, log_name, cut, chance);
        const char *wrong = judge(image, log_id, acked, synced_to);
        if (wrong && !ignore_blocks_sync)
            print_message("# dead after %d of %d operations, %d commits answered: %s\n", (int)cut,
                          (int)trace.n, (int)acked, wrong);
        harm += wrong != NULL;
        test_folder_remove(image);
    }
    for (size_t i = 0; i < trace.n; i++)
        free(trace.ops[i].data);
    trace.n = 0;
    test_folder_remove(base);
    test_store_end(&t);
    return harm;
}

static void test_power_cuts(void **state)
{
    (void)state;
    const char *given = getenv("POWER_CUTS");
    struct chance chance = chance_begin("power cuts");
    assert_int_equal(power_cuts(given ? atoi(given) : 100, false, &chance), 0);
}

/* The test must notice when bodies are not synced before their commit. */
static void test_notices_a_missing_sync(void **state)
{
    (void)state;
    struct chance chance = chance_begin("missing sync");
    assert_true(power_cuts(40, true, &chance) > 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_power_cuts),
        cmocka_unit_test(test_notices_a_missing_sync),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
