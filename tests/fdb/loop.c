/*
 * Events and futures. An event is something the network thread does at a time: the arrival
 * of a request in the cluster, an answer, the end of a delay. Futures become ready, and
 * callbacks are called, on the network thread alone.
 */
#include "inside.h"

#include <stdlib.h>
#include <time.h>

#define FUTURE_MAGIC 0x46757475u
#define DEAD_MAGIC 0xdeadf00du
#define GRAVES 4096u

static struct event **heap;
static size_t heap_n, heap_cap;
static struct event **held; /* in order: the cluster does not answer them now */
static size_t held_n, held_cap;
static struct event **instants; /* in order: they run before the call that made them returns */
static size_t instants_first, instants_n, instants_cap;
static uint64_t event_seq;
static struct list fires = LIST_INIT(fires); /* futures whose callbacks are due */

uint64_t now_ns(void)
{
    struct timespec t;
    if (g.manual)
        return g.clock(g.clock_arg);
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* --- events ---------------------------------------------------------------------------- */

struct event *event_new(enum way way, void (*run)(struct event *e), FDBFuture *f,
                        FDBTransaction *t)
{
    struct event *e = mem_zalloc(sizeof *e);
    FDBDatabase *db = t ? t->db : f ? f->db : NULL;
    e->way = way;
    e->run = run;
    e->f = f ? future_ref(f) : NULL;
    e->t = t ? txn_ref(t) : NULL;
    e->db = db ? db_ref(db) : NULL;
    e->gen = t ? t->gen : 0;
    return e;
}

void event_free(struct event *e)
{
    if (e->f)
        future_unref(e->f);
    if (e->t)
        txn_unref(e->t);
    if (e->db)
        db_unref(e->db);
    free(e);
}

static bool earlier(const struct event *a, const struct event *b)
{
    return a->due_ns != b->due_ns ? a->due_ns < b->due_ns : a->seq < b->seq;
}

static void heap_up(size_t i)
{
    struct event *e = heap[i];
    for (; i && earlier(e, heap[(i - 1) / 2]); i = (i - 1) / 2)
        heap[i] = heap[(i - 1) / 2];
    heap[i] = e;
}

static void heap_down(size_t i)
{
    struct event *e = heap[i];
    for (size_t child; (child = 2 * i + 1) < heap_n; i = child) {
        if (child + 1 < heap_n && earlier(heap[child + 1], heap[child]))
            child++;
        if (!earlier(heap[child], e))
            break;
        heap[i] = heap[child];
    }
    heap[i] = e;
}

static void heap_push(struct event *e)
{
    mem_grow(&heap, &heap_cap, heap_n + 1, sizeof *heap);
    heap[heap_n++] = e;
    heap_up(heap_n - 1);
    if (heap[0] != e)
        return;
    if (!g.manual)
        pthread_cond_signal(&g.work);
    else if (!g.manual_running && g.wake)
        g.wake(g.clock_arg, e->due_ns);
}

static struct event *heap_pop(void)
{
    struct event *e = heap[0];
    heap[0] = heap[--heap_n];
    if (heap_n)
        heap_down(0);
    return e;
}

void event_post(struct event *e, uint64_t delay_ns)
{
    e->seq = event_seq++;
    e->due_ns = now_ns() + delay_ns;
    if (g.instant && !e->idle) {
        mem_grow(&instants, &instants_cap, instants_first + instants_n + 1, sizeof *instants);
        instants[instants_first + instants_n++] = e;
    } else {
        heap_push(e);
    }
}

static bool is_held(const struct event *e)
{
    if (e->way != WAY_LOCAL &&
        (g.config.down || g.config.incompatible || g.config.stalled || (e->batch && g.config.batch_stopped)))
        return true;
    if (!e->db)
        return false;
    if (e->db->cut && !e->through && (e->way == WAY_REQUEST || e->way == WAY_ANSWER))
        return true;
    return e->db->paused && (e->way == WAY_LOCAL || e->way == WAY_ANSWER || e->unsent);
}

void events_release_held(void)
{
    size_t kept = 0;
    for (size_t i = 0; i < held_n; i++) {
        if (is_held(held[i]))
            held[kept++] = held[i];
        else
            heap_push(held[i]);
    }
    held_n = kept;
}

static size_t look(struct event **events, size_t n, FDBDatabase *db,
                   bool (*see)(struct event *e, uint64_t now))
{
    uint64_t now = now_ns();
    size_t kept = 0;
    for (size_t i = 0; i < n; i++) {
        if (events[i]->db != db || see(events[i], now))
            events[kept++] = events[i];
        else
            event_free(events[i]);
    }
    return kept;
}

static int order(const void *a, const void *b)
{
    return earlier(*(struct event *const *)a, *(struct event *const *)b) ? -1 : 1;
}

void events_each(FDBDatabase *db, bool (*see)(struct event *e, uint64_t now))
{
    /* In their order, so that chance falls the same way every time. What is sorted is a heap, and
     * is again after times were changed. */
    if (heap_n)
        qsort(heap, heap_n, sizeof *heap, order);
    heap_n = look(heap, heap_n, db, see);
    if (heap_n)
        qsort(heap, heap_n, sizeof *heap, order);
    held_n = look(held, held_n, db, see);
    events_release_held();
    if (heap_n && g.manual && g.wake)
        g.wake(g.clock_arg, heap[0]->due_ns);
}

bool events_pending(void)
{
    for (size_t i = 0; i < heap_n; i++)
        if (!heap[i]->idle)
            return true;
    return g.dispatching || !list_empty(&fires);
}

/* --- futures --------------------------------------------------------------------------- */

static void *graves[GRAVES];
static size_t graves_at;

void bury(void *object)
{
    void *old = graves[graves_at];
    graves[graves_at] = object;
    graves_at = (graves_at + 1) % GRAVES;
    free(old);
}

void graves_free(void)
{
    for (size_t i = 0; i < GRAVES; i++) {
        free(graves[i]);
        graves[i] = NULL;
    }
}

FDBFuture *future_new(enum future_kind kind, FDBDatabase *db)
{
    FDBFuture *f = mem_zalloc(sizeof *f);
    f->db = db ? db_ref(db) : NULL;
    f->magic = FUTURE_MAGIC;
    f->refs = 1;
    f->kind = kind;
    list_init(&f->fire_link);
    list_init(&f->txn_link);
    g.counts.futures_alive++;
    return f;
}

FDBFuture *future_ref(FDBFuture *f)
{
    f->refs++;
    return f;
}

/* What a caller may have kept a pointer to is spoiled, so that a use of it shows. */
static void future_drop_result(FDBFuture *f)
{
    if (f->bytes)
        memset(f->bytes, 0xdb, f->bytes_len);
    free(f->bytes);
    free(f->pairs);
    free(f->keys);
    f->bytes = NULL;
    f->pairs = NULL;
    f->keys = NULL;
}

static void future_drop_operation(FDBFuture *f)
{
    writes_free(&f->writes);
    blob_unref(f->key);
    blob_unref(f->range.begin.key);
    blob_unref(f->range.end.key);
    f->key = f->range.begin.key = f->range.end.key = NULL;
}

void future_unref(FDBFuture *f)
{
    if (--f->refs)
        return;
    CHECK(f->destroyed && !f->txn);
    future_drop_result(f);
    future_drop_operation(f);
    if (f->db)
        db_unref(f->db);
    f->magic = DEAD_MAGIC;
    bury(f);
}

static void future_show(FDBFuture *f)
{
    f->ready = true;
    if (f->callback) {
        future_ref(f);
        list_add_tail(&fires, &f->fire_link);
    }
}

static void show_later(struct event *e)
{
    future_show(e->f);
}

void future_settle(FDBFuture *f, fdb_error_t error)
{
    if (f->settled)
        return;
    f->settled = true;
    f->error = error;
    if (error)
        future_drop_result(f);
    if (f->txn)
        txn_settled(f);
    future_drop_operation(f);
    if (on_network_thread())
        future_show(f);
    else
        event_post(event_new(WAY_LOCAL, show_later, f, NULL), 0);
}

/* --- what programs call ---------------------------------------------------------------- */

/* Whether this is a future that lives. The lock is held. */
static bool alive(FDBFuture *f, const char *what)
{
    /* One that is destroyed before it is ready still calls back, with itself. */
    if (f && f->magic == FUTURE_MAGIC && (!f->destroyed || f->calling))
        return true;
    violation("%s of a future that was destroyed", what);
    return false;
}

EXPORT void fdb_future_destroy(FDBFuture *f)
{
    lock();
    if (alive(f, "fdb_future_destroy") && f->destroyed) {
        violation("fdb_future_destroy in the callback of a future that was destroyed");
    } else if (f->magic == FUTURE_MAGIC && !f->destroyed) {
        f->destroyed = true;
        g.counts.futures_alive--;
        future_settle(f, E_CANCELLED);
        future_unref(f);
    }
    unlock();
}

EXPORT void fdb_future_cancel(FDBFuture *f)
{
    lock();
    if (alive(f, "fdb_future_cancel"))
        future_settle(f, E_CANCELLED);
    unlock();
}

EXPORT void fdb_future_release_memory(FDBFuture *f)
{
    lock();
    if (alive(f, "fdb_future_release_memory")) {
        future_drop_result(f);
        f->released = true;
    }
    unlock();
}

EXPORT fdb_bool_t fdb_future_is_ready(FDBFuture *f)
{
    lock();
    bool ready = alive(f, "fdb_future_is_ready") && f->ready;
    unlock();
    return ready;
}

EXPORT fdb_error_t fdb_future_block_until_ready(FDBFuture *f)
{
    fdb_error_t error = 0;
    lock();
    if (!alive(f, "fdb_future_block_until_ready")) {
        error = E_INVALID;
    } else if (!f->ready && on_network_thread()) {
        violation("fdb_future_block_until_ready in a callback");
        error = E_BLOCKED;
    } else if (!f->ready && g.manual) {
        violation("fdb_future_block_until_ready without a network thread");
        error = E_BLOCKED;
    } else {
        while (!f->ready)
            pthread_cond_wait(&g.ready, &g.lock);
    }
    unlock();
    return error;
}

EXPORT fdb_error_t fdb_future_set_callback(FDBFuture *f, FDBCallback callback, void *arg)
{
    lock();
    if (!alive(f, "fdb_future_set_callback")) {
        unlock();
        return E_INVALID;
    }
    bool ready = f->ready;
    if (!ready) {
        if (f->callback)
            violation("fdb_future_set_callback twice");
        f->callback = callback;
        f->callback_arg = arg;
    }
    unlock();
    if (ready)
        callback(f, arg);
    return 0;
}

/* 0: a result of this kind is there. */
static fdb_error_t result(FDBFuture *f, enum future_kind kind, const char *what)
{
    if (!alive(f, what))
        return E_INVALID;
    if (!f->ready)
        return E_NOT_SET;
    if (f->error)
        return f->error;
    if (f->released)
        return E_RELEASED;
    if (f->kind != kind) {
        violation("%s of a future of another kind", what);
        return E_INVALID;
    }
    return 0;
}

EXPORT fdb_error_t fdb_future_get_error(FDBFuture *f)
{
    lock();
    fdb_error_t error = !alive(f, "fdb_future_get_error") ? E_INVALID
                        : !f->ready                       ? E_NOT_SET
                        : f->error                        ? f->error
                        : f->released                     ? E_RELEASED
                                                          : 0;
    unlock();
    return error;
}

EXPORT fdb_error_t fdb_future_get_int64(FDBFuture *f, int64_t *out)
{
    lock();
    fdb_error_t error = result(f, F_INT64, "fdb_future_get_int64");
    if (!error)
        *out = f->number;
    unlock();
    return error;
}

EXPORT fdb_error_t fdb_future_get_uint64(FDBFuture *f, uint64_t *out)
{
    lock();
    fdb_error_t error = result(f, F_UINT64, "fdb_future_get_uint64");
    if (!error)
        *out = (uint64_t)f->number;
    unlock();
    return error;
}

EXPORT fdb_error_t fdb_future_get_value(FDBFuture *f, fdb_bool_t *present, const uint8_t **value,
                                        int *value_len)
{
    lock();
    fdb_error_t error = result(f, F_VALUE, "fdb_future_get_value");
    if (!error) {
        *present = f->present;
        if (f->present) {
            *value = f->bytes;
            *value_len = (int)f->bytes_len;
        }
    }
    unlock();
    return error;
}

EXPORT fdb_error_t fdb_future_get_keyvalue_array(FDBFuture *f, const FDBKeyValue **pairs, int *n,
                                                 fdb_bool_t *more)
{
    lock();
    fdb_error_t error = result(f, F_RANGE, "fdb_future_get_keyvalue_array");
    if (!error) {
        *pairs = f->pairs;
        *n = f->n;
        *more = f->more;
    }
    unlock();
    return error;
}

EXPORT fdb_error_t fdb_future_get_key_array(FDBFuture *f, const FDBKey **keys, int *n)
{
    lock();
    fdb_error_t error = result(f, F_KEYS, "fdb_future_get_key_array");
    if (!error) {
        *keys = f->keys;
        *n = f->n;
    }
    unlock();
    return error;
}

/* --- the network thread ---------------------------------------------------------------- */

/* Calls back for all that became ready. The lock is held, and not while calling. */
static void fire(void)
{
    for (struct list *l; (l = list_pop(&fires));) {
        FDBFuture *f = container_of(l, FDBFuture, fire_link);
        FDBCallback callback = f->callback;
        if (f->db && f->db->dead) {
            future_unref(f);
            continue;
        }
        f->callback = NULL;
        g.dispatching = f->calling = true;
        unlock();
        callback(f, f->callback_arg);
        lock();
        g.dispatching = f->calling = false;
        future_unref(f);
    }
}

static void run(struct event *e)
{
    e->run(e);
    event_free(e);
    fire();
}

static bool manual_begin(void)
{
    CHECK(g.manual);
    bool was = g.manual_running;
    g.manual_running = true;
    return was;
}

void events_run_due(void)
{
    bool was = manual_begin();
    CHECK(!was);
    uint64_t now = now_ns();
    while (heap_n && heap[0]->due_ns <= now) {
        struct event *e = heap_pop();
        if (e->db && e->db->dead && e->way != WAY_REQUEST) {
            event_free(e);
        } else if (is_held(e)) {
            mem_grow(&held, &held_cap, held_n + 1, sizeof *held);
            held[held_n++] = e;
        } else {
            run(e);
        }
    }
    g.manual_running = false;
}

uint64_t events_next_due_ns(void)
{
    return heap_n ? heap[0]->due_ns : UINT64_MAX;
}

void events_instant(void)
{
    if (!instants_n || g.manual_running)
        return;
    manual_begin();
    while (instants_n) {
        struct event *e = instants[instants_first++];
        if (!--instants_n)
            instants_first = 0;
        run(e);
    }
    g.manual_running = false;
}

EXPORT fdb_error_t fdb_run_network(void)
{
    lock();
    fdb_error_t error = !g.network_setup ? E_NO_NETWORK : g.network_ran ? E_RESTARTED : 0;
    if (error) {
        unlock();
        return error;
    }
    g.network_ran = true;
    if (g.manual) {
        unlock();
        return 0;
    }
    g.network_running = true;
    g.network_thread = pthread_self();
    while (!g.network_stop) {
        uint64_t now = now_ns();
        if (heap_n && heap[0]->due_ns <= now) {
            struct event *e = heap_pop();
            if (is_held(e)) {
                mem_grow(&held, &held_cap, held_n + 1, sizeof *held);
                held[held_n++] = e;
                continue;
            }
            e->run(e);
            event_free(e);
            pthread_cond_broadcast(&g.ready);
            fire();
            continue;
        }
        pthread_cond_broadcast(&g.ready);
        if (!heap_n) {
            pthread_cond_wait(&g.work, &g.lock);
            continue;
        }
        uint64_t due = heap[0]->due_ns;
        struct timespec until = {.tv_sec = (time_t)(due / 1000000000u),
                                 .tv_nsec = (long)(due % 1000000000u)};
        pthread_cond_timedwait(&g.work, &g.lock, &until);
    }
    g.network_running = false;
    unlock();
    return 0;
}

EXPORT fdb_error_t fdb_stop_network(void)
{
    lock();
    fdb_error_t error = g.network_setup ? 0 : E_NO_NETWORK;
    if (!error)
        g.network_stop = true;
    pthread_cond_signal(&g.work);
    unlock();
    return error;
}
