/*
 * Reports of the lanes; report.h says what for.
 *
 * Each lane has two copies: one is the reader's, the other is being filled while the lane is asked,
 * and they change places when it has answered.
 */
#include "server/report.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "base/bytes.h"
#include "base/mem.h"

/* Lanes are not asked more often, nor for more than so little of their time: their clients wait
 * while they tell, and telling of thousands of clients takes long. */
#define ASK_EVERY_NS 10000000u
#define ASK_TIME_PART 200u
#define ASK_EVERY_MAX_NS 250000000u

struct asked {
    struct report *report;
    struct lane *lane;
    struct env_task task;
    struct report_lane front, back; /* the reader's; the lane's while it is asked */
    uint64_t took_ns;               /* telling; under the lock */
    bool is_asked, answered;        /* reader's; under the lock */
};

struct report {
    struct server *server;
    struct env *env;
    pthread_mutex_t lock;
    pthread_cond_t cond;
    atomic_bool stopped;
    uint64_t asked_ns, rest_ns; /* last, and from then until it is asked again */
    struct report_total *totals;
    struct asked lanes[SERVER_THREADS_MAX];
};

/* --- on the lane -------------------------------------------------------------------------- */

static struct report_volume *volume_of(struct report_lane *out, const struct metrics_volume *mv)
{
    return mv ? &out->volumes[mv->report_no] : NULL;
}

static void look_at(void *arg, const struct volume *vol)
{
    struct report_lane *out = arg;
    struct volume_stats *closed = volume_counts_into(vol), stats;
    bool is_view = volume_epoch(vol) != 0;
    out->n_open += !is_view;
    out->n_owned += !is_view && volume_is_owned(vol);
    /* (One that a lookup is opening for its own purposes counts nowhere.) */
    if (!closed)
        return;
    struct report_volume *v = volume_of(out, container_of(closed, struct metrics_volume, closed));
    volume_get_stats(vol, &stats);
    volume_stats_add(&v->stats, &stats);
    v->stats.dirty_bytes += stats.dirty_bytes;
    v->stats.cached_bytes += stats.cached_bytes;
    if (stats.dirty_since_ns &&
        (!v->stats.dirty_since_ns || stats.dirty_since_ns < v->stats.dirty_since_ns))
        v->stats.dirty_since_ns = stats.dirty_since_ns;
    if (is_view)
        return;
    v->open = true;
    v->owned = volume_is_owned(vol);
    v->branch = volume_branch(vol);
    v->size = volume_size(vol);
    v->block_size = volume_block_size(vol);
}

static void look_at_conn(struct report_lane *out, const struct conn *c)
{
    mem_grow(&out->clients, &out->cap_clients, out->n_clients + 1, sizeof *out->clients);
    struct report_client *r = &out->clients[out->n_clients++];
    *r = (struct report_client){.id = c->id,
                                .begun_ns = c->begun_ns,
                                .read_only = c->session.read_only,
                                .in_flight = c->n_requests,
                                .requests = c->metrics.requests,
                                .errors = c->metrics.errors,
                                .read_bytes = c->metrics.read_bytes,
                                .written_bytes = c->metrics.written_bytes};
    r->peer = c->peer;
    if (c->phase != CONN_SERVING)
        return;
    memcpy(r->export, c->client.export->name, sizeof r->export);
    volume_of(out, c->metrics.vol)->n_clients++;
}

static void fill(struct lane *lane, struct report_lane *out)
{
    out->n_volumes = out->n_clients = 0;
    out->n_owned = out->n_open = 0;
    for (struct metrics_volume *mv = lane->metrics.volumes; mv; mv = mv->next) {
        mem_grow(&out->volumes, &out->cap_volumes, out->n_volumes + 1, sizeof *out->volumes);
        mv->report_no = out->n_volumes;
        struct report_volume *v = &out->volumes[out->n_volumes++];
        *v = (struct report_volume){.counters = mv, .stats = mv->closed};
    }
    shard_look(lane->shard, look_at, out);
    list_for_each (l, &lane->conns) {
        const struct conn *c = container_of(l, struct conn, link);
        if (c->phase != CONN_DEAD)
            look_at_conn(out, c);
    }
    shard_get_memory(lane->shard, &out->memory);
}

static void tell(struct env_task *task)
{
    struct asked *a = container_of(task, struct asked, task);
    struct report *r = a->report;
    if (atomic_load(&r->stopped))
        return;
    uint64_t began_ns = env_now_ns(a->lane->env);
    fill(a->lane, &a->back);
    pthread_mutex_lock(&r->lock);
    a->took_ns = env_now_ns(a->lane->env) - began_ns;
    a->answered = true;
    pthread_cond_signal(&r->cond);
    pthread_mutex_unlock(&r->lock);
}

/* --- on the thread that asks ----------------------------------------------------------------- */

uint64_t report_now_ns(const struct report *r)
{
    return env_now_ns(r->env);
}

/* Takes what has been answered over; how many lanes have not. Under the lock. */
static unsigned take_answers(struct report *r)
{
    unsigned missing = 0;
    for (unsigned i = 0; i < r->server->n_lanes; i++) {
        struct asked *a = &r->lanes[i];
        if (a->is_asked && a->answered) {
            struct report_lane front = a->front;
            a->front = a->back;
            a->back = front;
            a->front.there = true;
            a->is_asked = a->answered = false;
            if (a->took_ns * ASK_TIME_PART > r->rest_ns)
                r->rest_ns = min_u64(a->took_ns * ASK_TIME_PART, ASK_EVERY_MAX_NS);
        }
        missing += a->is_asked;
    }
    return missing;
}

bool report_ask(struct report *r, unsigned wait_ms)
{
    uint64_t since_ns = report_now_ns(r) - r->asked_ns;
    if (since_ns < r->rest_ns) {
        struct timespec rest = {.tv_nsec = (long)(r->rest_ns - since_ns)};
        nanosleep(&rest, NULL);
    }
    r->asked_ns = report_now_ns(r);
    r->rest_ns = ASK_EVERY_NS;
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_sec += wait_ms / 1000;
    until.tv_nsec += (long)(wait_ms % 1000) * 1000000;
    until.tv_sec += until.tv_nsec / 1000000000;
    until.tv_nsec %= 1000000000;

    pthread_mutex_lock(&r->lock);
    /* What was asked for long ago and is told only now says nothing about now. */
    bool late = take_answers(r) > 0;
    for (unsigned i = 0; i < r->server->n_lanes; i++) {
        struct asked *a = &r->lanes[i];
        if (a->is_asked)
            continue;
        a->is_asked = true;
        env_post(a->lane->env, &a->task);
    }
    unsigned missing;
    while ((missing = take_answers(r)) > 0 && !late)
        if (pthread_cond_timedwait(&r->cond, &r->lock, &until) == ETIMEDOUT)
            break;
    for (unsigned i = 0; i < r->server->n_lanes; i++)
        r->lanes[i].front.there = !r->lanes[i].is_asked;
    pthread_mutex_unlock(&r->lock);
    return missing == 0;
}

const struct report_lane *report_lane(const struct report *r, unsigned no)
{
    return &r->lanes[no].front;
}

/* The rest is not called as any volume, and comes behind all of them. */
static int compare_names(const void *a, const void *b)
{
    const char *x = (*(const struct report_volume *const *)a)->counters->name;
    const char *y = (*(const struct report_volume *const *)b)->counters->name;
    bool x_rest = strcmp(x, METRICS_REST) == 0, y_rest = strcmp(y, METRICS_REST) == 0;
    return x_rest != y_rest ? x_rest - y_rest : strcmp(x, y);
}

static void add_volume(struct report_total *t, const struct report_volume *v)
{
    struct report_volume *sum = &t->sum;
    for (unsigned i = 0; i < METRICS_COMMANDS; i++) {
        const struct metrics_command *c = &v->counters->commands[i];
        histogram_gather(&t->commands[i].latency, &c->latency);
        t->commands[i].bytes += counter_get(&c->bytes);
        t->commands[i].errors += counter_get(&c->errors);
    }
    volume_stats_add(&sum->stats, &v->stats);
    sum->stats.dirty_bytes += v->stats.dirty_bytes;
    sum->stats.cached_bytes += v->stats.cached_bytes;
    if (v->stats.dirty_since_ns &&
        (!sum->stats.dirty_since_ns || v->stats.dirty_since_ns < sum->stats.dirty_since_ns))
        sum->stats.dirty_since_ns = v->stats.dirty_since_ns;
    sum->n_clients += v->n_clients;
    if (!v->open)
        return;
    sum->open = true;
    sum->owned = v->owned;
    sum->branch = v->branch;
    sum->size = v->size;
    sum->block_size = v->block_size;
}

const struct report_total *report_totals(struct report *r, size_t *n)
{
    size_t count = 0, at = 0;
    for (unsigned i = 0; i < r->server->n_lanes; i++)
        count += r->lanes[i].front.n_volumes;
    const struct report_volume **sorted = mem_alloc((count + 1) * sizeof *sorted);
    for (unsigned i = 0; i < r->server->n_lanes; i++)
        for (size_t k = 0; k < r->lanes[i].front.n_volumes; k++)
            sorted[at++] = &r->lanes[i].front.volumes[k];
    qsort(sorted, count, sizeof *sorted, compare_names);
    free(r->totals);
    r->totals = mem_zalloc((count + 1) * sizeof *r->totals);
    *n = 0;
    for (size_t i = 0; i < count; i++) {
        const char *name = sorted[i]->counters->name;
        if (*n == 0 || strcmp(r->totals[*n - 1].name, name) != 0)
            r->totals[(*n)++].name = name;
        add_volume(&r->totals[*n - 1], sorted[i]);
    }
    free(sorted);
    return r->totals;
}

struct report *report_new(struct server *s)
{
    struct report *r = mem_zalloc(sizeof *r);
    pthread_condattr_t attr;
    r->server = s;
    r->env = s->lanes[0].env;
    pthread_mutex_init(&r->lock, NULL);
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_cond_init(&r->cond, &attr);
    pthread_condattr_destroy(&attr);
    for (unsigned i = 0; i < s->n_lanes; i++)
        r->lanes[i] = (struct asked){.report = r, .lane = &s->lanes[i], .task.run = tell};
    return r;
}

void report_stop(struct report *r)
{
    atomic_store(&r->stopped, true);
}

void report_free(struct report *r)
{
    if (!r)
        return;
    for (unsigned i = 0; i < SERVER_THREADS_MAX; i++) {
        struct asked *a = &r->lanes[i];
        free(a->front.volumes);
        free(a->front.clients);
        free(a->back.volumes);
        free(a->back.clients);
    }
    free(r->totals);
    pthread_cond_destroy(&r->cond);
    pthread_mutex_destroy(&r->lock);
    free(r);
}
