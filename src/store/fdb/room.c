/*
 * Room: what the store takes in the cluster, and the quota on it.
 *
 * FoundationDB has no limit of its own that could be asked for in advance, and a
 * full cluster stalls instead of refusing. A quota is measured with the
 * cluster's estimate of the size of all keys under the prefix, now and then, and
 * with what was reserved here since; so several gateways see each other's use.
 */
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include "store/fdb/engine.h"

#define KEY_COST_BYTES 64u
#define MEASURE_WAIT_MS 10000u
#define HEALTH_WAIT_MS 2000u
/* What others write is seen after so long. */
#define MEASURE_AGE_NS 2000000000ull

struct room {
    _Atomic uint64_t used_bytes;     /* as of the last measurement */
    _Atomic uint64_t reserved_bytes; /* given out and not returned */
    _Atomic uint64_t given_bytes;    /* given out ever */
    _Atomic uint64_t measured_bytes; /* of these, before the last measurement */
    _Atomic uint64_t measured_ns;    /* when that was; 0: never */
};

/* A measurement under way for those who wait. */
struct measure {
    struct fr *fr;
    FDBTransaction *tr;
    FDBFuture *future;
    struct fd_wait wait;
    struct fd_retry retry;
    uint64_t given_before;
};

static void measure_start(struct measure *m);

void fd_room_open(struct fd *fd)
{
    fd->room = mem_zalloc(sizeof *fd->room);
}

void fd_room_close(struct fd *fd)
{
    free(fd->room);
}

uint64_t fd_body_cost(const struct store *store, uint64_t body_len)
{
    (void)store;
    return body_len;
}

static uint64_t bytes_of(struct store_reservation r)
{
    return r.body_bytes + r.keys * KEY_COST_BYTES;
}

static uint64_t coarse_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC_COARSE, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static bool fits(struct fd *fd, uint64_t want)
{
    const struct room *room = fd->room;
    uint64_t quota = fd->options.quota_bytes, measured = atomic_load(&room->measured_bytes);
    uint64_t since = atomic_load(&room->given_bytes) - measured;
    uint64_t measured_ns = atomic_load(&room->measured_ns);
    return measured_ns && coarse_ns() - measured_ns < MEASURE_AGE_NS &&
           atomic_load(&room->used_bytes) + max_u64(since, atomic_load(&room->reserved_bytes)) +
                   want <=
               quota;
}

bool fd_reserve(struct store *store, struct store_reservation want)
{
    struct fd *fd = fd_of(store);
    if (!fd->options.quota_bytes)
        return true;
    uint64_t bytes = bytes_of(want);
    if (!fits(fd, bytes))
        return false;
    atomic_fetch_add(&fd->room->reserved_bytes, bytes);
    atomic_fetch_add(&fd->room->given_bytes, bytes);
    return true;
}

void fd_unreserve(struct store *store, struct store_reservation what)
{
    struct fd *fd = fd_of(store);
    if (fd->options.quota_bytes)
        atomic_fetch_sub(&fd->room->reserved_bytes, bytes_of(what));
}

static FDBFuture *ask_size(struct fd *fd, FDBTransaction *tr, const struct fd_key *begin,
                           const struct fd_key *end)
{
    (void)fd;
    return fdb.transaction_get_estimated_range_size_bytes(tr, begin->bytes, begin->len, end->bytes,
                                                          end->len);
}

static void answer_waits(struct fr *fr)
{
    struct fd *fd = fr->fd;
    struct list waits = LIST_INIT(waits);
    list_splice_tail(&waits, &fr->room_waits);
    struct list *l;
    while ((l = list_pop(&waits))) {
        struct store_reserve_wait *wait = container_of(l, struct store_reserve_wait, link);
        wait->done(wait, fd_reserve(&fd->base, wait->want) ? ST_OK : ST_NOSPC);
    }
}

static void measure_again(struct fd_retry *retry, bool lasting)
{
    struct measure *m = container_of(retry, struct measure, retry);
    if (lasting) {
        fdb.transaction_destroy(m->tr);
        m->tr = NULL;
    }
    measure_start(m);
}

static void measure_done(struct fd_wait *wait)
{
    struct measure *m = container_of(wait, struct measure, wait);
    struct fr *fr = m->fr;
    struct room *room = fr->fd->room;
    int64_t bytes = 0;
    int code = fdb.future_get_int64(m->future, &bytes);
    fdb.future_destroy(m->future);
    if (code) {
        fd_retry(fr, &m->retry, m->tr, code, measure_again);
        return;
    }
    atomic_store(&room->used_bytes, (uint64_t)bytes);
    /* Other reactors measure too; it only grows. */
    uint64_t measured = atomic_load(&room->measured_bytes);
    while (measured < m->given_before &&
           !atomic_compare_exchange_weak(&room->measured_bytes, &measured, m->given_before))
        ;
    atomic_store(&room->measured_ns, coarse_ns());
    fdb.transaction_destroy(m->tr);
    free(m);
    answer_waits(fr);
}

static void measure_start(struct measure *m)
{
    struct fd *fd = m->fr->fd;
    struct fd_key begin, end;
    fd_transaction(fd, &m->tr, false, 0);
    fd_key_bounds(fd, &begin, &end);
    m->future = ask_size(fd, m->tr, &begin, &end);
    fd_wait_one(m->fr, &m->wait, m->future, measure_done);
}

static void no_quota(struct env_task *task)
{
    struct store_reserve_wait *wait = container_of(task, struct store_reserve_wait, task);
    wait->done(wait, ST_OK);
}

void fd_reserve_wait(struct store *store, struct env *env, struct store_reserve_wait *wait)
{
    struct fd *fd = fd_of(store);
    struct fr *fr = fd_reactor(fd, env);
    wait->store = store;
    wait->env = env;
    if (!fd->options.quota_bytes || !fdb.transaction_get_estimated_range_size_bytes) {
        wait->task.run = no_quota;
        env_post(env, &wait->task);
        return;
    }
    bool first = list_empty(&fr->room_waits);
    list_add_tail(&fr->room_waits, &wait->link);
    if (!first)
        return;
    struct measure *m = mem_zalloc(sizeof *m);
    m->fr = fr;
    m->given_before = atomic_load(&fd->room->given_bytes);
    measure_start(m);
}

/* The estimate of [begin, end), for people. */
static enum status estimate(struct fd *fd, const struct fd_key *begin, const struct fd_key *end,
                            uint64_t *bytes, struct err *e)
{
    int64_t n = 0;
    if (!fdb.transaction_get_estimated_range_size_bytes) {
        *bytes = 0;
        return fail(e, ST_UNSUP, "FoundationDB's client library %s can't tell sizes", fdb.client);
    }
    for (unsigned tries = 0; tries < 10; tries++) {
        FDBTransaction *tr = NULL;
        fd_transaction(fd, &tr, false, 0);
        FDBFuture *future = ask_size(fd, tr, begin, end);
        bool ready = fd_block(future, MEASURE_WAIT_MS);
        int code = ready ? fdb.future_get_int64(future, &n) : FDB_TIMED_OUT;
        fdb.future_destroy(future);
        fdb.transaction_destroy(tr);
        *bytes = (uint64_t)n;
        if (!code)
            return ST_OK;
        if (!ready)
            break;
    }
    return fail(e, ST_UNAVAIL, "FoundationDB does not answer: fdbcli --exec status tells more");
}

/* Only what limits clients is worth a line. */
static void ask_health(struct fd *fd, char *out, size_t size)
{
    FDBTransaction *tr = NULL;
    int present = 0, len = 0;
    const uint8_t *value = NULL;
    char text[200];
    int code = fdb.database_create_transaction(fd->db, &tr);
    CHECK(code == 0);
    FDBFuture *future = fdb.transaction_get(tr, (const uint8_t *)fd_health_key,
                                            (int)strlen(fd_health_key), 1);
    if (fd_block(future, HEALTH_WAIT_MS) &&
        fdb.future_get_value(future, &present, &value, &len) == 0 && present &&
        fd_health_describe(value, len, text, sizeof text))
        snprintf(out, size, "the FoundationDB cluster is overloaded: %s", text);
    fdb.future_destroy(future);
    fdb.transaction_destroy(tr);
}

enum status fd_info(struct store *store, struct store_info *info, struct err *e)
{
    struct fd *fd = fd_of(store);
    struct fd_key begin, end;
    memset(info, 0, sizeof *info);
    snprintf(info->uri, sizeof info->uri, "%s", fd->uri);
    snprintf(info->engine, sizeof info->engine, "fdb (client library %.20s, API %d)", fdb.client,
             fdb.version);
    pthread_mutex_lock(&fd->state_lock);
    snprintf(info->state, sizeof info->state, "%s", fd->state);
    pthread_mutex_unlock(&fd->state_lock);
    info->bytes_available = STORE_BYTES_UNKNOWN;
    /* Messages want the name alone, also where nothing answers. */
    if (!e)
        return ST_OK;
    if (!*info->state)
        ask_health(fd, info->state, sizeof info->state);
    fd_key_bounds(fd, &begin, &end);
    enum status st = estimate(fd, &begin, &end, &info->bytes_used, e);
    if (st == ST_OK && fd->options.quota_bytes)
        info->bytes_available = fd->options.quota_bytes > info->bytes_used
                                    ? fd->options.quota_bytes - info->bytes_used
                                    : 0;
    return st;
}

enum status fd_usage(struct store *store, struct slice begin, struct slice end, uint64_t *keys,
                     uint64_t *bytes, struct err *e)
{
    struct fd *fd = fd_of(store);
    struct fd_key b, n;
    *keys = 0; /* not known without reading them all */
    fd_key_make(fd, &b, begin);
    fd_key_make(fd, &n, end);
    return estimate(fd, &b, &n, bytes, e);
}
