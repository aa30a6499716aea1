/*
 * Watches: FoundationDB's own, each in a small transaction.
 *
 * A watch compares with the value at its transaction's read version. That version
 * is one known before, or asked for now, so it is not newer than what any read
 * begun later sees: a change in between fires. Whatever else goes wrong with a
 * watch fires it too, after a pause: its owner looks again and arms a new one.
 */
#include <stdlib.h>

#include "store/fdb/engine.h"

#define FAILED_PAUSE_MS 1000u

struct fd_watch {
    struct list link; /* fr->watches */
    struct store_watch *watch; /* NULL: stopped */
    struct fr *fr;
    struct fd_version_wait version_wait;
    bool waits_version;
    FDBTransaction *tr;
    FDBFuture *commit, *future;
    struct fd_wait commit_wait, wait;
    struct env_timer timer;
    bool pausing;
    unsigned pending; /* callbacks that will come */
};

static void drop(struct fd_watch *w)
{
    if (w->pending)
        return;
    if (w->waits_version)
        fd_version_stop(&w->version_wait);
    env_timer_stop(w->fr->env, &w->timer);
    if (w->commit)
        fdb.future_destroy(w->commit);
    if (w->future)
        fdb.future_destroy(w->future);
    if (w->tr)
        fdb.transaction_destroy(w->tr);
    list_remove(&w->link);
    free(w);
}

static void fire(struct fd_watch *w)
{
    struct store_watch *watch = w->watch;
    w->watch = NULL;
    drop(w);
    if (!watch)
        return;
    watch->seen = 0;
    watch->fired(watch);
}

static void pause_over(struct env_timer *timer)
{
    struct fd_watch *w = container_of(timer, struct fd_watch, timer);
    w->pausing = false;
    fire(w);
}

static void failed(struct fd_watch *w)
{
    if (!w->watch) {
        drop(w);
    } else if (!w->pausing) {
        w->pausing = true;
        w->timer.fire = pause_over;
        env_timer_start(w->fr->env, &w->timer, FAILED_PAUSE_MS);
    }
}

static void watch_ready(struct fd_wait *wait)
{
    struct fd_watch *w = container_of(wait, struct fd_watch, wait);
    w->pending--;
    if (w->pausing && w->watch)
        return;
    if (fdb.future_get_error(w->future))
        failed(w);
    else
        fire(w);
}

static void committed(struct fd_wait *wait)
{
    struct fd_watch *w = container_of(wait, struct fd_watch, commit_wait);
    w->pending--;
    int code = fdb.future_get_error(w->commit);
    fdb.future_destroy(w->commit);
    w->commit = NULL;
    if (!code && w->watch) {
        /* The watch lives on without it. */
        fdb.transaction_destroy(w->tr);
        w->tr = NULL;
        return;
    }
    if (code)
        failed(w);
    else
        drop(w);
}

static void version_came(struct fd_version_wait *v, int64_t version)
{
    struct fd_watch *w = container_of(v, struct fd_watch, version_wait);
    struct fr *fr = w->fr;
    struct fd_key key;
    w->waits_version = false;
    /* Without fd_transaction(): one that does not read its writes may not watch (1034). */
    int code = fdb.database_create_transaction(fr->fd->db, &w->tr);
    CHECK(code == 0);
    fdb.transaction_set_read_version(w->tr, version);
    fd_key_make(fr->fd, &key, w->watch->key);
    w->future = fdb.transaction_watch(w->tr, key.bytes, key.len);
    w->commit = fdb.transaction_commit(w->tr);
    w->pending = 2;
    fd_wait_one(fr, &w->wait, w->future, watch_ready);
    fd_wait_one(fr, &w->commit_wait, w->commit, committed);
}

void fd_watch(struct store *store, struct env *env, struct store_watch *watch)
{
    struct fr *fr = fd_reactor(fd_of(store), env);
    struct fd_watch *w = mem_zalloc(sizeof *w);
    watch->store = store;
    watch->seen = (uint64_t)(uintptr_t)w;
    w->watch = watch;
    w->fr = fr;
    list_add_tail(&fr->watches, &w->link);
    w->version_wait.ready = version_came;
    int64_t version = fd_version_own(fr);
    if (version) {
        version_came(&w->version_wait, version);
    } else {
        w->waits_version = true;
        fd_version_get(fr, false, &w->version_wait);
    }
}

void fd_watch_stop(struct store_watch *watch)
{
    struct fd_watch *w = (struct fd_watch *)(uintptr_t)watch->seen;
    if (!w)
        return; /* it fired */
    watch->seen = 0;
    w->watch = NULL;
    if (w->future && w->pending)
        fdb.future_cancel(w->future);
    drop(w);
}

/* Those that were stopped and whose callbacks have not run; their tasks may still lie in the
 * reactor's queue, so the memory goes with the last of them. */
static void closed(struct fd_watch *w)
{
    if (--w->pending == 0)
        free(w);
}

static void wait_closed(struct fd_wait *wait)
{
    closed(container_of(wait, struct fd_watch, wait));
}

static void commit_closed(struct fd_wait *wait)
{
    closed(container_of(wait, struct fd_watch, commit_wait));
}

void fd_watches_close(struct fr *fr)
{
    struct list *l;
    while ((l = list_pop(&fr->watches))) {
        struct fd_watch *w = container_of(l, struct fd_watch, link);
        CHECK(!w->watch && w->pending);
        w->wait.ready = wait_closed;
        w->commit_wait.ready = commit_closed;
        if (w->commit)
            fd_wait_abandon(&w->commit_wait, w->commit);
        fd_wait_abandon(&w->wait, w->future);
        if (w->tr)
            fdb.transaction_destroy(w->tr);
        env_timer_stop(fr->env, &w->timer);
    }
}
