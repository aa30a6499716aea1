/*
 * What FoundationDB itself gives, as a measure for the server: nothing but
 * libfdb_c, writing and reading incompressible values with several pieces of
 * work in flight. There are no checks, no order, no hashes and no clients; it is
 * what a program could at most do that stores blocks under keys.
 *
 *   fdb_bare write|gets|ranges [key=value ...]
 *     cluster=FILE   as every FoundationDB tool finds it
 *     name=TEXT      of the keys, so that runs do not meet (bare)
 *     value=BYTES    of a value (16384)
 *     piece=BYTES    a commit, or what is read at once (1048576)
 *     request=BYTES  keys in a row behind each other; a range read (131072)
 *     keys=N         that are written and read, as a volume has blocks (65536)
 *     inflight=LIST  pieces in flight, each number measured by itself (1,2,...,8)
 *     seconds=S      for each of them (2)
 *     bytes=N        stop after so many (no limit)
 *     random=0|1     whether requests lie one behind the other (0)
 *     keep=0|1       leave the keys for the next run (0: clear them at the end)
 *
 * Prints a line of JSON for each point. "cpu_s" is of this process, all threads.
 */
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "base/mem.h"
#include "measure.h"
#include "store/fdb/api.h"

#define INFLIGHT_MAX 64u
#define POOL_BYTES (64u << 20)
#define KEY_BYTES_MAX 64u
/* A read transaction is good for 5 s. */
#define READ_AGE_MAX_S 1.0

enum kind { WRITE, GETS, RANGES };

/* One commit, or one set of reads, and the futures it waits for. */
struct piece {
    struct piece *next; /* in `ready` */
    FDBTransaction *tr;
    double begun_s; /* of the transaction */
    FDBFuture **futures;
    uint32_t n_futures;
    _Atomic uint32_t left;
    uint64_t bytes;
    bool retrying;
};

static struct {
    enum kind kind;
    const char *cluster, *name;
    uint32_t value_bytes, piece_bytes, request_bytes;
    uint64_t n_keys, bytes_max;
    unsigned inflight[INFLIGHT_MAX], n_inflight;
    double seconds;
    bool random, keep;
} want = {.name = "bare",
          .value_bytes = 16384,
          .piece_bytes = 1u << 20,
          .request_bytes = 128u << 10,
          .n_keys = 65536,
          .bytes_max = UINT64_MAX,
          .inflight = {1, 2, 3, 4, 5, 6, 7, 8},
          .n_inflight = 8,
          .seconds = 2};

static FDBDatabase *db;
static uint8_t *pool, *sink;
static uint64_t chance = 0x9e3779b97f4a7c15, next_request;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t some_ready = PTHREAD_COND_INITIALIZER;
static struct piece *ready;
static uint64_t n_errors;

static uint64_t random_u64(void)
{
    chance ^= chance << 13;
    chance ^= chance >> 7;
    chance ^= chance << 17;
    return chance;
}

static void give_up(const char *what, int code)
{
    fprintf(stderr, "fdb_bare: %s: %s (%d)\n", what, fdb.get_error(code), code);
    exit(1);
}

/* As the server's keys are: a text, then a number that sorts. */
static int key_make(uint8_t *key, uint64_t no)
{
    int n = snprintf((char *)key, KEY_BYTES_MAX, "\x02%.40s", want.name) + 1;
    put_be64(key + n, no);
    return n + 8;
}

static void count_down(FDBFuture *future, void *arg)
{
    struct piece *p = arg;
    (void)future;
    if (atomic_fetch_sub(&p->left, 1) != 1)
        return;
    pthread_mutex_lock(&lock);
    p->next = ready;
    ready = p;
    pthread_cond_signal(&some_ready);
    pthread_mutex_unlock(&lock);
}

static struct piece *wait_ready(void)
{
    pthread_mutex_lock(&lock);
    while (!ready)
        pthread_cond_wait(&some_ready, &lock);
    struct piece *p = ready;
    ready = p->next;
    pthread_mutex_unlock(&lock);
    return p;
}

static void await(struct piece *p)
{
    atomic_store(&p->left, p->n_futures);
    for (uint32_t i = 0, n = p->n_futures; i < n; i++)
        if (fdb.future_set_callback(p->futures[i], count_down, p))
            abort();
}

static void transaction(struct piece *p)
{
    if (p->tr)
        return;
    int code = fdb.database_create_transaction(db, &p->tr);
    if (code)
        give_up("a transaction", code);
    fdb.transaction_set_option(p->tr, FDB_TR_READ_YOUR_WRITES_DISABLE, NULL, 0);
    p->begun_s = now_s();
}

/* The first key of a request: behind the last one, or anywhere. */
static uint64_t place_request(uint32_t per_request)
{
    uint64_t n = want.n_keys / per_request;
    return (want.random ? random_u64() % n : next_request++ % n) * per_request;
}

static void send_write(struct piece *p)
{
    uint8_t key[KEY_BYTES_MAX];
    uint32_t per_request = want.request_bytes / want.value_bytes;
    for (uint32_t at = 0; at < want.piece_bytes; at += want.request_bytes) {
        uint64_t first = place_request(per_request);
        for (uint32_t i = 0; i < per_request; i++) {
            int len = key_make(key, first + i);
            uint64_t from = random_u64() % ((POOL_BYTES - want.value_bytes) / 64) * 64;
            fdb.transaction_set(p->tr, key, len, pool + from, (int)want.value_bytes);
        }
    }
    p->n_futures = 1;
    p->futures[0] = fdb.transaction_commit(p->tr);
}

static void send_reads(struct piece *p)
{
    uint8_t key[KEY_BYTES_MAX], end[KEY_BYTES_MAX];
    uint32_t per_request = want.request_bytes / want.value_bytes;
    p->n_futures = 0;
    for (uint32_t at = 0; at < want.piece_bytes; at += want.request_bytes) {
        uint64_t first = place_request(per_request);
        if (want.kind == RANGES) {
            int len = key_make(key, first), end_len = key_make(end, first + per_request);
            p->futures[p->n_futures++] = fdb.transaction_get_range(
                p->tr, key, len, 0, 1, end, end_len, 0, 1, 0, 0, FDB_STREAMING_WANT_ALL, 0, 1, 0);
            continue;
        }
        for (uint32_t i = 0; i < per_request; i++) {
            int len = key_make(key, first + i);
            p->futures[p->n_futures++] = fdb.transaction_get(p->tr, key, len, 1);
        }
    }
}

static void start(struct piece *p)
{
    if (want.kind != WRITE && p->tr && now_s() - p->begun_s > READ_AGE_MAX_S) {
        fdb.transaction_destroy(p->tr);
        p->tr = NULL;
    }
    transaction(p);
    p->bytes = 0;
    want.kind == WRITE ? send_write(p) : send_reads(p);
    await(p);
}

/* Copies what came, as whoever reads has to. */
static int take_reads(FDBFuture *future, uint64_t *bytes)
{
    int present = 0, len = 0, count = 0, more = 0, code;
    const uint8_t *value;
    const struct fdb_key_value *kv;
    if (want.kind == GETS) {
        code = fdb.future_get_value(future, &present, &value, &len);
        if (!code && present) {
            memcpy(sink + *bytes, value, (size_t)len);
            *bytes += (uint64_t)len;
        }
        return code;
    }
    code = fdb.future_get_keyvalue_array(future, &kv, &count, &more);
    for (int i = 0; i < count && !code; i++) {
        memcpy(sink + *bytes, kv[i].value, (size_t)kv[i].value_length);
        *bytes += (uint64_t)kv[i].value_length;
    }
    return code;
}

/* Takes in what is ready; true: it is done and counts. */
static bool finish(struct piece *p)
{
    int code = 0;
    if (p->retrying) {
        code = fdb.future_get_error(p->futures[0]);
        fdb.future_destroy(p->futures[0]);
        if (code)
            give_up("not to be tried again", code);
        p->retrying = false;
        p->bytes = 0;
        return true;
    }
    for (uint32_t i = 0; i < p->n_futures; i++) {
        int one = want.kind == WRITE ? fdb.future_get_error(p->futures[i])
                                     : take_reads(p->futures[i], &p->bytes);
        if (one)
            code = one;
        fdb.future_destroy(p->futures[i]);
    }
    if (code) {
        n_errors++;
        p->retrying = true;
        p->n_futures = 1;
        p->futures[0] = fdb.transaction_on_error(p->tr, code);
        await(p);
        return false;
    }
    if (want.kind == WRITE) {
        p->bytes = want.piece_bytes;
        fdb.transaction_destroy(p->tr);
        p->tr = NULL;
    }
    return true;
}

static void measure(unsigned inflight)
{
    struct piece *pieces = mem_zalloc(inflight * sizeof *pieces);
    uint32_t futures_max = want.piece_bytes / want.value_bytes;
    uint64_t bytes = 0, n = 0;
    n_errors = 0;
    double begin = now_s(), cpu = cpu_s();
    for (unsigned i = 0; i < inflight; i++) {
        pieces[i].futures = mem_alloc(futures_max * sizeof(FDBFuture *));
        start(&pieces[i]);
    }
    unsigned running = inflight;
    while (running) {
        struct piece *p = wait_ready();
        if (!finish(p))
            continue;
        bytes += p->bytes;
        n++;
        if (now_s() - begin < want.seconds && bytes < want.bytes_max)
            start(p);
        else
            running--;
    }
    double took = now_s() - begin;
    static const char *const kinds[] = {"write", "gets", "ranges"};
    printf("{\"what\": \"%s\", \"inflight\": %u, \"mb_per_s\": %.1f, \"pieces\": %llu, "
           "\"errors\": %llu, \"bytes\": %llu, \"seconds\": %.3f, \"cpu_s\": %.3f}\n",
           kinds[want.kind], inflight, (double)bytes / 1e6 / took, (unsigned long long)n,
           (unsigned long long)n_errors, (unsigned long long)bytes, took, cpu_s() - cpu);
    fflush(stdout);
    for (unsigned i = 0; i < inflight; i++) {
        if (pieces[i].tr)
            fdb.transaction_destroy(pieces[i].tr);
        free(pieces[i].futures);
    }
    free(pieces);
}

static void clear_keys(void)
{
    uint8_t begin[KEY_BYTES_MAX], end[KEY_BYTES_MAX];
    FDBFuture *future;
    struct piece p = {.futures = &future, .n_futures = 1};
    int begin_len = key_make(begin, 0), end_len = key_make(end, UINT64_MAX), code;
    do {
        transaction(&p);
        fdb.transaction_clear_range(p.tr, begin, begin_len, end, end_len);
        future = fdb.transaction_commit(p.tr);
        await(&p);
        wait_ready();
        code = fdb.future_get_error(future);
        fdb.future_destroy(future);
        if (!code)
            break;
        future = fdb.transaction_on_error(p.tr, code);
        await(&p);
        wait_ready();
        code = fdb.future_get_error(future);
        fdb.future_destroy(future);
    } while (!code);
    fdb.transaction_destroy(p.tr);
}

static bool option(const char *word)
{
    const char *value = strchr(word, '=');
    if (!value)
        return false;
    size_t n = (size_t)(value++ - word);
    unsigned long long number = strtoull(value, NULL, 0);
#define IS(name) (n == sizeof name - 1 && memcmp(word, name, n) == 0)
    if (IS("cluster"))
        want.cluster = value;
    else if (IS("name"))
        want.name = value;
    else if (IS("value"))
        want.value_bytes = (uint32_t)number;
    else if (IS("piece"))
        want.piece_bytes = (uint32_t)number;
    else if (IS("request"))
        want.request_bytes = (uint32_t)number;
    else if (IS("keys"))
        want.n_keys = number;
    else if (IS("seconds"))
        want.seconds = strtod(value, NULL);
    else if (IS("bytes"))
        want.bytes_max = number;
    else if (IS("random"))
        want.random = number;
    else if (IS("keep"))
        want.keep = number;
    else if (IS("inflight")) {
        char *end = (char *)(uintptr_t)value;
        want.n_inflight = 0;
        do {
            number = strtoull(end, &end, 10);
            if (number < 1 || number > INFLIGHT_MAX || want.n_inflight == INFLIGHT_MAX)
                return false;
            want.inflight[want.n_inflight++] = (unsigned)number;
        } while (*end++ == ',');
    } else
        return false;
#undef IS
    return true;
}

static bool options(int argc, char **argv)
{
    if (argc < 2)
        return false;
    if (strcmp(argv[1], "write") == 0)
        want.kind = WRITE;
    else if (strcmp(argv[1], "gets") == 0)
        want.kind = GETS;
    else if (strcmp(argv[1], "ranges") == 0)
        want.kind = RANGES;
    else
        return false;
    for (int i = 2; i < argc; i++)
        if (!option(argv[i]))
            return false;
    return want.value_bytes >= 64 && want.value_bytes <= 100000 &&
           want.request_bytes >= want.value_bytes && want.piece_bytes >= want.request_bytes &&
           want.piece_bytes <= 8u << 20 && want.n_keys >= want.request_bytes / want.value_bytes;
}

int main(int argc, char **argv)
{
    if (!options(argc, argv)) {
        fprintf(stderr, "usage: fdb_bare write|gets|ranges [cluster=FILE] [name=TEXT] "
                        "[value=BYTES] [piece=BYTES] [request=BYTES] [keys=N] [inflight=LIST] "
                        "[seconds=S] [bytes=N] [random=0|1] [keep=0|1]\n");
        return 2;
    }
    struct err e = {ST_OK, ""};
    if (fdb_api_start(&e) != ST_OK) {
        fprintf(stderr, "fdb_bare: %s\n", e.text);
        return 1;
    }
    int code = fdb.create_database(want.cluster, &db);
    if (code)
        give_up("the cluster", code);
    pool = mem_alloc(POOL_BYTES);
    sink = mem_alloc(want.piece_bytes);
    for (size_t i = 0; i < POOL_BYTES; i += 8)
        put_le64(pool + i, random_u64());
    /* Another order of places and bytes each time. */
    chance ^= (uint64_t)time(NULL) * 0x2545f4914f6cdd1d;
    for (unsigned i = 0; i < want.n_inflight; i++)
        measure(want.inflight[i]);
    if (!want.keep)
        clear_keys();
    fdb.database_destroy(db);
    fdb_api_stop();
    free(pool);
    free(sink);
    return 0;
}
