/*
 * Whether the cluster answers. While anything is under way a slow tick looks for
 * what has been waiting too long; then the cluster is asked what limits it, a
 * line is logged and the state can be read by people (store_info). Nothing
 * fails by that: requests wait, unless a timeout was set for reads.
 */
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>

#include "base/log.h"
#include "store/fdb/engine.h"

#define TICK_MS 1000u
#define SILENT_NS 5000000000ull
#define CAUSE_WAIT_NS 3000000000ull
#define SAY_AGAIN_NS 60000000000ull
/* A cluster that limits nothing says some large number. */
#define TPS_UNLIMITED 100000.0

struct health {
    struct fr *fr;
    uint64_t since_ns; /* silent since then; 0: it answers */
    uint64_t noticed_ns;
    uint64_t said_ns;
    bool asking, given_up;
    uint64_t asked_ns;
    FDBTransaction *tr;
    FDBFuture *future;
    struct fd_wait wait;
};

const char fd_health_key[] = "\xff\xff/metrics/health/aggregate";

static void state_set(struct fd *fd, const char *text)
{
    pthread_mutex_lock(&fd->state_lock);
    snprintf(fd->state, sizeof fd->state, "%s", text);
    pthread_mutex_unlock(&fd->state_lock);
}

static double number(const json_t *o, const char *name)
{
    const json_t *v = json_object_get(o, name);
    return v && json_is_number(v) ? json_number_value(v) : 0;
}

bool fd_health_describe(const uint8_t *value, int len, char *out, size_t size)
{
    json_t *o = json_loadb((const char *)value, (size_t)len, 0, NULL);
    double tps = number(o, "tps_limit");
    bool batch = json_is_true(json_object_get(o, "batch_limited"));
    bool limits = batch || (json_object_get(o, "tps_limit") && tps < TPS_UNLIMITED);
    if (!limits)
        snprintf(out, size, "it reports no overload, but does not go on: locked, or replacing one of "
                            "its processes? fdbcli --exec status tells more");
    else
        snprintf(out, size,
                 "it limits clients to %.0f transactions a second (batch: %s; worst log queue %.0f "
                 "MiB, worst storage queue %.0f MiB, storage %.1f s behind)",
                 tps, batch ? "held back" : "not held back",
                 number(o, "worst_log_queue") / 1048576,
                 number(o, "worst_storage_queue") / 1048576,
                 number(o, "worst_storage_durability_lag") / 1e6);
    json_decref(o);
    return limits;
}

static void say(struct health *h, const char *cause)
{
    struct fd *fd = h->fr->fd;
    uint64_t now = env_now_ns(h->fr->env);
    char text[256];
    snprintf(text, sizeof text, "FoundationDB has not answered for %llu s: %s",
             (unsigned long long)((now - h->since_ns) / 1000000000), cause);
    state_set(fd, text);
    log_warning("%s; requests wait", text);
    h->said_ns = now;
}

static void health_answered(struct fd_wait *wait)
{
    struct health *h = container_of(wait, struct health, wait);
    int present = 0, len = 0;
    const uint8_t *value = NULL;
    char cause[200] = "the cluster can't be reached, or has not enough of its processes; "
                      "fdbcli --exec status tells more";
    int code = fdb.future_get_value(h->future, &present, &value, &len);
    if (!code && present)
        fd_health_describe(value, len, cause, sizeof cause);
    fdb.future_destroy(h->future);
    fdb.transaction_destroy(h->tr);
    h->future = NULL;
    h->tr = NULL;
    h->asking = false;
    if (h->since_ns)
        say(h, cause);
}

static void ask_cause(struct health *h)
{
    struct fr *fr = h->fr;
    int code = fdb.database_create_transaction(fr->fd->db, &h->tr);
    CHECK(code == 0);
    h->asking = true;
    h->given_up = false;
    h->asked_ns = env_now_ns(fr->env);
    h->future = fdb.transaction_get(h->tr, (const uint8_t *)fd_health_key,
                                 sizeof fd_health_key - 1, 1);
    fd_wait_one(fr, &h->wait, h->future, health_answered);
}

static void silent(struct health *h, uint64_t now_ns)
{
    if (h->asking) {
        if (now_ns - h->asked_ns >= CAUSE_WAIT_NS && !h->given_up) {
            h->given_up = true;
            fdb.transaction_cancel(h->tr);
        }
    } else if (!h->said_ns || now_ns - h->said_ns >= SAY_AGAIN_NS) {
        ask_cause(h);
    }
}

static void answers(struct health *h, uint64_t now_ns)
{
    struct fd *fd = h->fr->fd;
    uint64_t since = h->since_ns;
    h->since_ns = 0;
    h->said_ns = 0;
    atomic_store(&fd->silent_since_ns, 0);
    state_set(fd, "");
    log_info("FoundationDB answers again after %llu s",
             (unsigned long long)((now_ns - since) / 1000000000));
}

static uint32_t tick_ms(const struct fr *fr)
{
    uint32_t timeout_ms = fr->fd->options.timeout_ms;
    return timeout_ms && timeout_ms / 4 < TICK_MS ? timeout_ms / 4 + 1 : TICK_MS;
}

static void tick(struct env_timer *timer)
{
    struct fr *fr = container_of(timer, struct fr, tick);
    struct health *h = fr->health;
    uint64_t now = env_now_ns(fr->env);
    fr->ticking = false;
    fd_reads_expire(fr, now);
    uint64_t oldest = min_u64(fd_reads_oldest_ns(fr), fd_commits_oldest_ns(fr));
    bool waits = oldest != UINT64_MAX;
    if (waits && now - oldest >= SILENT_NS) {
        uint64_t none = 0;
        /* One reactor speaks for all. */
        if (!h->since_ns &&
            atomic_compare_exchange_strong(&fr->fd->silent_since_ns, &none, oldest)) {
            h->since_ns = oldest;
            h->noticed_ns = now;
        }
    } else if (h->since_ns && fr->heard_ns > h->noticed_ns) {
        /* (That nothing waits any more may be because it was given up.) */
        answers(h, now);
    }
    if (h->since_ns)
        silent(h, now);
    if (waits || h->asking)
        fd_health_watch(fr);
}

void fd_health_watch(struct fr *fr)
{
    if (!fr->health) {
        fr->health = mem_zalloc(sizeof *fr->health);
        fr->health->fr = fr;
    }
    if (fr->ticking)
        return;
    fr->ticking = true;
    fr->tick.fire = tick;
    env_timer_start(fr->env, &fr->tick, tick_ms(fr));
}

static void freed_late(struct fd_wait *wait)
{
    free(container_of(wait, struct health, wait));
}

void fd_health_close(struct fr *fr)
{
    struct health *h = fr->health;
    fr->health = NULL;
    if (h && h->asking) {
        h->wait.ready = freed_late;
        fd_wait_abandon(&h->wait, h->future);
        fdb.transaction_destroy(h->tr);
    } else {
        free(h);
    }
}
