/*
 * The stores of a simulated world; stores.h says what they are.
 *
 * On the double of libfdb_c there is no network thread: whenever something of it is due, an event
 * of this world runs it, so callbacks come from there, and what the engine then posts to a reactor
 * is an event of that reactor. Opening and closing, which block in the program, are answered at
 * once ("instant").
 */
#include "stores.h"

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "../fdb/double.h"
#include "base/check.h"
#include "base/mem.h"
#include "mem_store.h"
#include "store/fdb/engine.h"

#define PREFIX "sim"
/* Beside what was configured: where things go wrong at all, this also happens. */
#define RANGE_SHORT_ONE_IN 20
#define GRV_DELAY_MS 20

struct simstore {
    struct sim *sim;
    enum simstore_kind kind;
    /* SIMSTORE_LOG */
    struct mem_store *db;
    void (*kill)(void *arg, struct store *store);
    void *kill_arg;
    /* SIMSTORE_FDB */
    const struct fdb_double *d;
    struct sim_env *cluster; /* where its events happen */
    uint64_t pump_ns;        /* when the next is to run; UINT64_MAX: none is */
    char uri[64];
    struct fd keys; /* for fd_key_make() */
    void *peeked;
    uint64_t told; /* violations */
};

/* --- the double ------------------------------------------------------------------------ */

static void set(const struct fdb_double *d, const char *name, uint64_t value)
{
    bool known = d->set(name, (int64_t)value);
    CHECK(known);
}

/* Where the build puts it: at SIM_FDB_DOUBLE, seen from the folder of this program. */
static void name_library(void)
{
    char path[1000];
    const char *named = getenv("FDB_NBD_LIBFDB_C");
    if (named && *named)
        return;
    ssize_t n = readlink("/proc/self/exe", path, sizeof path - sizeof SIM_FDB_DOUBLE - 1);
    CHECK(n > 0);
    path[n] = 0;
    char *slash = strrchr(path, '/');
    CHECK(slash);
    memcpy(slash + 1, SIM_FDB_DOUBLE, sizeof SIM_FDB_DOUBLE);
    setenv("FDB_NBD_LIBFDB_C", path, 1);
}

static const struct fdb_double *load(void)
{
    name_library();
    void *library = dlopen(getenv("FDB_NBD_LIBFDB_C"), RTLD_NOW | RTLD_LOCAL);
    const struct fdb_double *d = library ? dlsym(library, FDB_DOUBLE_SYMBOL) : NULL;
    if (!d) {
        fprintf(stderr, "the simulator needs the double of libfdb_c, and %s is not it: %s\n",
                getenv("FDB_NBD_LIBFDB_C"), library ? "no such symbol" : dlerror());
        exit(2);
    }
    return d;
}

static uint64_t clock_of(void *arg)
{
    const struct simstore *ss = arg;
    return sim_now_ns(ss->sim);
}

static void pump(void *arg);

static void pump_at(void *arg, uint64_t due_ns)
{
    struct simstore *ss = arg;
    uint64_t now = sim_now_ns(ss->sim);
    if (due_ns >= ss->pump_ns)
        return;
    ss->pump_ns = due_ns;
    sim_at(ss->cluster, due_ns > now ? due_ns - now : 0, pump, ss);
}

static void pump(void *arg)
{
    struct simstore *ss = arg;
    if (ss->pump_ns > sim_now_ns(ss->sim))
        return; /* an earlier one has done it */
    ss->pump_ns = UINT64_MAX;
    ss->d->run_due();
    uint64_t due_ns = ss->d->next_due_ns();
    if (due_ns != UINT64_MAX)
        pump_at(ss, due_ns);
}

static void cluster_begin(struct simstore *ss, uint64_t seed)
{
    static bool begun;
    static const unsigned delays_us[] = {50, 300, 1500}, batches_us[] = {0, 300, 3000};
    CHECK(!begun);
    begun = true;
    ss->d = load();
    ss->cluster = sim_env_new(ss->sim);
    ss->pump_ns = UINT64_MAX;
    ss->d->manual(clock_of, pump_at, ss);
    ss->d->reset();
    set(ss->d, "seed", seed);
    set(ss->d, "delay_us_max", delays_us[seed % 3]);
    set(ss->d, "batch_us", batches_us[seed / 3 % 3]);
    set(ss->d, "grv_delay_ms", GRV_DELAY_MS);
    /* A cluster file that can be read; nothing looks for what it names. */
    static const char text[] = "sim:sim@127.0.0.1:4500\n";
    int file = memfd_create("fdb.cluster", 0);
    CHECK(file >= 0 && write(file, text, sizeof text - 1) == sizeof text - 1);
    snprintf(ss->uri, sizeof ss->uri, "fdb:/proc/self/fd/%d?prefix=" PREFIX, file);
    ss->keys.prefix[0] = 2;
    memcpy(ss->keys.prefix + 1, PREFIX, sizeof PREFIX);
    ss->keys.prefix_len = 1 + (int)sizeof PREFIX;
}

static void *database_of(struct store *store)
{
    return fd_of(store)->db;
}

/* --- processes ------------------------------------------------------------------------- */

struct simstore *simstore_new(struct sim *sim, enum simstore_kind kind, uint64_t seed)
{
    struct simstore *ss = mem_zalloc(sizeof *ss);
    ss->sim = sim;
    ss->kind = kind;
    if (kind == SIMSTORE_FDB)
        cluster_begin(ss, seed);
    else
        ss->db = mem_store_new(sim, &(struct mem_config){.has_log = true,
                                                         .read_ns_max = 100000 << seed % 3,
                                                         .commit_ns_max = 300000 << seed / 3 % 5,
                                                         .sync_ns_max = 100000 << seed / 15 % 4});
    return ss;
}

enum simstore_kind simstore_kind(const struct simstore *ss)
{
    return ss->kind;
}

struct store *simstore_attach(struct simstore *ss, struct sim_env *env)
{
    if (ss->kind == SIMSTORE_LOG)
        return mem_store_attach(ss->db, env);
    struct err e = {0};
    struct store *store;
    ss->d->instant(true);
    struct store_options options = {.flags = STORE_CREATE};
    enum status st = store_open(ss->uri, &options, &store, &e);
    ss->d->instant(false);
    if (st != ST_OK)
        fprintf(stderr, "the simulated store can't be opened: %s\n", e.text);
    CHECK(st == ST_OK);
    fd_reactor(fd_of(store), &env->base);
    return store;
}

void simstore_detach(struct simstore *ss, struct store *store)
{
    if (ss->kind == SIMSTORE_FDB)
        ss->d->instant(true);
    store_close(store);
    if (ss->kind == SIMSTORE_FDB)
        ss->d->instant(false);
}

void simstore_died(struct simstore *ss, struct store *store)
{
    if (ss->kind == SIMSTORE_FDB)
        ss->d->die(database_of(store));
    else
        mem_store_crash_process(store);
}

static void killed(void *arg, struct store *store)
{
    struct simstore *ss = arg;
    ss->kill(ss->kill_arg, store);
}

void simstore_on_kill(struct simstore *ss, void (*kill)(void *arg, struct store *store), void *arg)
{
    if (ss->kind != SIMSTORE_LOG)
        return;
    ss->kill = kill;
    ss->kill_arg = arg;
    mem_store_on_kill(ss->db, killed, ss);
}

/* --- what goes wrong ------------------------------------------------------------------- */

void simstore_cut(struct simstore *ss, struct store *store, bool cut)
{
    CHECK(ss->kind == SIMSTORE_FDB);
    ss->d->cut(database_of(store), cut);
}

void simstore_slow(struct simstore *ss, struct store *store, uint32_t commit_ms,
                   uint32_t answer_ms)
{
    CHECK(ss->kind == SIMSTORE_FDB);
    ss->d->slow(database_of(store), commit_ms, answer_ms);
}

void simstore_paused(struct simstore *ss, struct store *store, bool paused)
{
    if (ss->kind == SIMSTORE_FDB)
        ss->d->pause(database_of(store), paused);
}

void simstore_down(struct simstore *ss, bool down)
{
    if (ss->kind == SIMSTORE_FDB)
        set(ss->d, "down", down);
    else
        mem_store_stop(ss->db, down);
}

void simstore_set_faults(struct simstore *ss, const struct simstore_faults *f)
{
    static const char *const unknown[] = {"unknown_happened", "unknown_lost", "changed_happened",
                                          "changed_lost",     "timeout_late", "cancelled_late"};
    static const char *const reads[] = {"read_too_old",    "read_future",  "read_behind",
                                        "watch_cancelled", "watch_future", "watch_spurious"};
    const uint32_t n_unknown = sizeof unknown / sizeof unknown[0];
    if (ss->kind == SIMSTORE_LOG) {
        mem_store_set_faults(ss->db, (struct mem_faults){.commit_fails = f->commit_fails,
                                                         .commit_slow = f->commit_slow,
                                                         .slow_ms_max = f->slow_ms});
        return;
    }
    for (uint32_t i = 0; i < n_unknown; i++)
        set(ss->d, unknown[i], (uint64_t)f->commit_unknown * n_unknown);
    for (size_t i = 0; i < sizeof reads / sizeof reads[0]; i++)
        set(ss->d, reads[i], (uint64_t)f->read_fails * 3);
    set(ss->d, "range_short", f->read_fails ? RANGE_SHORT_ONE_IN : 0);
    set(ss->d, "grv_delayed", f->read_fails);
    set(ss->d, "conflict", f->commit_fails);
    set(ss->d, "commit_slow", f->commit_slow);
    set(ss->d, "slow_ms_max", f->slow_ms);
    set(ss->d, "late_ms_max", f->late_ms_max);
}

/* --- looking --------------------------------------------------------------------------- */

void simstore_counts(struct simstore *ss, struct simstore_counts *counts)
{
    struct mem_counts m;
    struct fdb_double_counts c;
    if (ss->kind == SIMSTORE_LOG) {
        mem_store_counts(ss->db, &m);
        *counts = (struct simstore_counts){.commits = m.commits,
                                           .conflicts = m.conflicts,
                                           .reads = m.reads,
                                           .violations = m.broken_promises};
        return;
    }
    ss->d->counts(&c);
    *counts = (struct simstore_counts){.commits = c.commits_happened,
                                       .conflicts = c.commits_refused,
                                       .reads = c.gets + c.ranges,
                                       .unknown_outcomes = c.unknown_answers,
                                       .late_commits = c.late_landed,
                                       .late_refused = c.late_refused,
                                       .away_commits = c.away_landed,
                                       .batched = c.batched,
                                       .violations = c.violations};
    if (c.violations > ss->told)
        fprintf(stderr, "libfdb_c is not used as it must be: %s\n", ss->d->violation());
    ss->told = c.violations;
}

bool simstore_peek(struct simstore *ss, struct slice key, struct slice *head)
{
    struct slice body;
    if (ss->kind == SIMSTORE_LOG)
        return mem_store_peek(ss->db, key, head, &body);
    struct fd_key k;
    size_t len;
    fd_key_make(&ss->keys, &k, key);
    free(ss->peeked);
    ss->peeked = NULL;
    if (!ss->d->get(k.bytes, (size_t)k.len, &ss->peeked, &len))
        return false;
    bool whole = fd_value_parse(ss->peeked, (int)len, head, &body);
    CHECK(whole);
    return true;
}
