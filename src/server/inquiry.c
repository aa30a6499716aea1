/*
 * Questions to the store for people; inquiry.h says which.
 */
#include "server/inquiry.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "base/log.h"
#include "base/mem.h"
#include "base/size.h"
#include "server/connection.h"
#include "volume/catalog.h"
#include "volume/keys.h"

#define SPACE_EVERY_MS 5000u
#define SPACE_AGE_MS 1000u /* where somebody asks */
#define LIST_LONG 5000u
#define LIST_LONG_FACTOR 10u
/* Of all there is room for, in per mille: space is short, very short, and no more so again. */
#define SPACE_SHORT 100u
#define SPACE_VERY_SHORT 50u
#define SPACE_MARGIN 20u

enum { ASK_PROBE = 1, ASK_LIST = 2, ASK_SPACE = 4 };

struct inquiry {
    struct lane *lane;
    struct env *env;
    struct env_task task;
    atomic_uint wanted; /* ASK_* */
    atomic_bool posted;

    pthread_mutex_t lock;
    pthread_cond_t cond;
    /* Under the lock. When each was asked that is not answered (0: none is), and answered last. */
    uint64_t probe_asked_ns, probe_answered_ns;
    uint64_t probe_failing_ns; /* since then there were only errors; 0: no */
    uint64_t list_asked_ns;
    struct inquiry_list list;
    uint64_t space_asked_ns, space_answered_ns;
    bool space_known;
    struct store_info space;

    /* Lane 0's. */
    bool stopped;
    struct key probe_key;
    struct store_get probe_get;
    struct store_read probe;
    struct catalog_op op;
    struct env_work space_work;
    struct store_info space_new;
    enum status space_st;
    struct env_timer space_timer;
    unsigned space_level; /* 0: enough; 1: short; 2: very short */
};

static uint64_t now_ns(const struct inquiry *q)
{
    return env_now_ns(q->env);
}

static void asked(struct inquiry *q, uint64_t *when)
{
    lane_work_begun(q->lane);
    pthread_mutex_lock(&q->lock);
    *when = now_ns(q);
    pthread_mutex_unlock(&q->lock);
}

/* --- whether it answers ------------------------------------------------------------------ */

static void probe_done(struct store_read *read, enum status st)
{
    struct inquiry *q = container_of(read, struct inquiry, probe);
    store_read_release(read);
    pthread_mutex_lock(&q->lock);
    if (st == ST_OK) {
        q->probe_answered_ns = now_ns(q);
        q->probe_failing_ns = 0;
    } else if (!q->probe_failing_ns) {
        q->probe_failing_ns = q->probe_asked_ns;
    }
    q->probe_asked_ns = 0;
    pthread_cond_broadcast(&q->cond);
    pthread_mutex_unlock(&q->lock);
    lane_work_ended(q->lane);
}

static void ask_probe(struct inquiry *q)
{
    if (q->probe_asked_ns)
        return;
    asked(q, &q->probe_asked_ns);
    key_store_meta(&q->probe_key);
    q->probe_get = (struct store_get){.key = key_slice(&q->probe_key)};
    q->probe = (struct store_read){.gets = &q->probe_get, .n_gets = 1, .done = probe_done};
    store_read(q->lane->server->store, q->env, &q->probe);
}

/* --- volumes ------------------------------------------------------------------------------ */

void inquiry_list_free(struct inquiry_list *list)
{
    for (size_t i = 0; i < list->n; i++)
        free(list->volumes[i].description);
    free(list->volumes);
    *list = (struct inquiry_list){0};
}

static bool is_zero(const uint8_t *bytes, size_t n)
{
    while (n > 0 && bytes[n - 1] == 0)
        n--;
    return n == 0;
}

static void keep_entry(const struct inquiry *q, const struct catalog_entry *e,
                       struct inquiry_volume *v)
{
    const struct session *session = q->lane->server->session;
    memcpy(v->name, e->name, sizeof v->name);
    v->description = mem_strdup(e->header.description);
    v->branch = e->branch;
    v->size = e->header.size;
    v->block_size = e->header.block_size;
    v->used_bytes = e->state.data_blocks * e->header.block_size;
    v->owned = !is_zero(e->owner.session, sizeof e->owner.session);
    v->ours = v->owned && memcmp(e->owner.session, session->id, sizeof session->id) == 0;
    v->owner = e->owner;
}

static void list_done(struct catalog_op *op)
{
    struct inquiry *q = container_of(op, struct inquiry, op);
    struct inquiry_list list = {.total = op->n_entries};
    if (op->st == ST_OK) {
        list.n = min_u64(op->n_entries, INQUIRY_VOLUMES_MAX);
        list.volumes = mem_alloc((list.n + 1) * sizeof *list.volumes);
        for (size_t i = 0; i < list.n; i++)
            keep_entry(q, &op->entries[i], &list.volumes[i]);
    }
    bool ok = op->st == ST_OK;
    catalog_op_free(op);
    pthread_mutex_lock(&q->lock);
    if (ok) {
        inquiry_list_free(&q->list);
        q->list = list;
        q->list.asked_ns = q->list_asked_ns;
    }
    q->list_asked_ns = 0;
    pthread_cond_broadcast(&q->cond);
    pthread_mutex_unlock(&q->lock);
    lane_work_ended(q->lane);
}

static void ask_list(struct inquiry *q)
{
    if (q->list_asked_ns)
        return;
    asked(q, &q->list_asked_ns);
    memset(&q->op, 0, sizeof q->op);
    q->op.done = list_done;
    catalog_list(&q->op, q->lane->server->store, q->env);
}

/* --- space -------------------------------------------------------------------------------- */

/* Says so when space has become shorter than before by a step; goes back only when there is clearly
 * more, so that a store on the edge does not fill the log. */
static void judge_space(struct inquiry *q, const struct store_info *info)
{
    char left[24], used[24];
    uint64_t available = info->bytes_available, all = info->bytes_used + available;
    if (available == STORE_BYTES_UNKNOWN || all == 0)
        return;
    /* Free room inside the store's files counts: it is used first. */
    available += info->bytes_free;
    all += info->bytes_free;
    uint64_t per_mille = (uint64_t)((double)available / (double)all * 1000.0);
    unsigned level = per_mille < SPACE_VERY_SHORT ? 2 : per_mille < SPACE_SHORT ? 1 : 0;
    if (level < q->space_level) {
        if (per_mille >= (q->space_level == 2 ? SPACE_VERY_SHORT : SPACE_SHORT) + SPACE_MARGIN)
            q->space_level = level;
        return;
    }
    if (level == q->space_level)
        return;
    q->space_level = level;
    log_warning(
        "the store %s is filling up: room for %s is left (%llu.%llu%%), %s are in use; when "
        "there is none, writes fail with \"no space left on device\": make room, or remove "
        "what is not needed (fdb-nbd usage)",
        info->uri, size_format(available, left), (unsigned long long)(per_mille / 10),
        (unsigned long long)(per_mille % 10), size_format(info->bytes_used, used));
}

static void space_work(struct env_work *work)
{
    struct inquiry *q = container_of(work, struct inquiry, space_work);
    struct err e = {0};
    q->space_st = store_info(q->lane->server->store, &q->space_new, &e);
}

static void space_done(struct env_work *work)
{
    struct inquiry *q = container_of(work, struct inquiry, space_work);
    bool ok = q->space_st == ST_OK;
    if (ok)
        judge_space(q, &q->space_new);
    pthread_mutex_lock(&q->lock);
    if (ok) {
        q->space = q->space_new;
        q->space_known = true;
    }
    q->space_answered_ns = now_ns(q);
    q->space_asked_ns = 0;
    bool limited = !ok || q->space_new.bytes_available != STORE_BYTES_UNKNOWN;
    pthread_cond_broadcast(&q->cond);
    pthread_mutex_unlock(&q->lock);
    if (limited && !q->stopped)
        env_timer_start(q->env, &q->space_timer, SPACE_EVERY_MS);
    lane_work_ended(q->lane);
}

static void ask_space(struct inquiry *q)
{
    if (q->space_asked_ns)
        return;
    asked(q, &q->space_asked_ns);
    q->space_work = (struct env_work){.work = space_work, .done = space_done};
    env_work(q->env, &q->space_work);
}

static void space_due(struct env_timer *timer)
{
    struct inquiry *q = container_of(timer, struct inquiry, space_timer);
    if (!q->stopped)
        ask_space(q);
}

/* --- asking ------------------------------------------------------------------------------- */

static void ask(struct env_task *task)
{
    struct inquiry *q = container_of(task, struct inquiry, task);
    atomic_store(&q->posted, false);
    unsigned wanted = atomic_exchange(&q->wanted, 0);
    if (q->stopped)
        return;
    if (wanted & ASK_PROBE)
        ask_probe(q);
    if (wanted & ASK_LIST)
        ask_list(q);
    if (wanted & ASK_SPACE)
        ask_space(q);
}

static void want(struct inquiry *q, unsigned what)
{
    atomic_fetch_or(&q->wanted, what);
    if (!atomic_exchange(&q->posted, true))
        env_post(q->env, &q->task);
}

static struct timespec deadline(unsigned wait_ms)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    t.tv_sec += wait_ms / 1000;
    t.tv_nsec += (long)(wait_ms % 1000) * 1000000;
    if (t.tv_nsec >= 1000000000) {
        t.tv_nsec -= 1000000000;
        t.tv_sec++;
    }
    return t;
}

/* Waits, under the lock, until something has been answered at or after `since_ns`. */
static bool wait_for(struct inquiry *q, const uint64_t *answered_ns, uint64_t since_ns,
                     unsigned wait_ms)
{
    struct timespec until = deadline(wait_ms);
    while (*answered_ns < since_ns)
        if (pthread_cond_timedwait(&q->cond, &q->lock, &until) != 0)
            break;
    return *answered_ns >= since_ns;
}

/* Since when questions are without a good answer; 0: none is. Under the lock. */
static uint64_t oldest_ns(const struct inquiry *q)
{
    return q->probe_failing_ns ? q->probe_failing_ns : q->probe_asked_ns;
}

uint64_t inquiry_silent_ms(struct inquiry *q, unsigned wait_ms)
{
    uint64_t began_ns = now_ns(q), silent_ms = 0;
    want(q, ASK_PROBE);
    pthread_mutex_lock(&q->lock);
    /* One that is without an answer for so long already is not waited for again. */
    uint64_t asked_ns = oldest_ns(q);
    bool waits = !asked_ns || began_ns - asked_ns < (uint64_t)wait_ms * 1000000;
    if (!wait_for(q, &q->probe_answered_ns, began_ns, waits ? wait_ms : 0)) {
        asked_ns = oldest_ns(q) ? oldest_ns(q) : began_ns;
        silent_ms = (now_ns(q) - asked_ns) / 1000000;
        silent_ms = silent_ms ? silent_ms : 1;
    }
    pthread_mutex_unlock(&q->lock);
    return silent_ms;
}

void inquiry_volumes(struct inquiry *q, unsigned age_ms, unsigned wait_ms, struct inquiry_list *out)
{
    uint64_t began_ns = now_ns(q);
    pthread_mutex_lock(&q->lock);
    uint64_t age_ns = (uint64_t)age_ms * 1000000;
    if (q->list.total > LIST_LONG)
        age_ns *= LIST_LONG_FACTOR;
    if (!q->list.asked_ns || began_ns - q->list.asked_ns > age_ns) {
        bool open = q->list_asked_ns && began_ns - q->list_asked_ns > (uint64_t)wait_ms * 1000000;
        want(q, ASK_LIST);
        wait_for(q, &q->list.asked_ns, began_ns - age_ns, open ? 0 : wait_ms);
    }
    *out = q->list;
    out->volumes = mem_alloc((out->n + 1) * sizeof *out->volumes);
    for (size_t i = 0; i < out->n; i++) {
        out->volumes[i] = q->list.volumes[i];
        out->volumes[i].description = mem_strdup(q->list.volumes[i].description);
    }
    pthread_mutex_unlock(&q->lock);
}

bool inquiry_space(struct inquiry *q, unsigned wait_ms, struct store_info *out)
{
    pthread_mutex_lock(&q->lock);
    uint64_t began_ns = now_ns(q);
    if (!q->space_answered_ns ||
        began_ns - q->space_answered_ns > (uint64_t)SPACE_AGE_MS * 1000000) {
        bool open = q->space_asked_ns;
        want(q, ASK_SPACE);
        wait_for(q, &q->space_answered_ns, q->space_answered_ns + 1, open ? 0 : wait_ms);
    }
    bool known = q->space_known;
    if (known)
        *out = q->space;
    pthread_mutex_unlock(&q->lock);
    return known;
}

/* --- life --------------------------------------------------------------------------------- */

struct inquiry *inquiry_new(struct server *s)
{
    struct inquiry *q = mem_zalloc(sizeof *q);
    pthread_condattr_t attr;
    q->lane = &s->lanes[0];
    q->env = q->lane->env;
    q->task.run = ask;
    q->space_timer.fire = space_due;
    pthread_mutex_init(&q->lock, NULL);
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_cond_init(&q->cond, &attr);
    pthread_condattr_destroy(&attr);
    env_timer_start(q->env, &q->space_timer, 0);
    return q;
}

void inquiry_stop(struct inquiry *q)
{
    q->stopped = true;
    env_timer_stop(q->env, &q->space_timer);
}

void inquiry_free(struct inquiry *q)
{
    if (!q)
        return;
    inquiry_list_free(&q->list);
    pthread_cond_destroy(&q->cond);
    pthread_mutex_destroy(&q->lock);
    free(q);
}
