/*
 * Read versions. One question to the cluster serves everybody who asked before it
 * was sent, and the next is sent when the answer to the one before is there: so
 * versions never go back from one call to the next, which is what "arm a watch,
 * then read" needs, and a cluster that throttles (it does so by answering these
 * late) throttles all of a reactor's work.
 *
 * Owners' reads use a version that is known already, as long as it is not older
 * than their own last commit. It is renewed ahead of need while it is used.
 */
#include <stdlib.h>

#include "store/fdb/engine.h"

static void ask(struct fd_grv *g);

static void ask_again(struct fd_retry *retry, bool lasting)
{
    struct fd_grv *g = container_of(retry, struct fd_grv, retry);
    if (lasting) {
        fdb.transaction_destroy(g->tr);
        g->tr = NULL;
    }
    ask(g);
}

static void answered(struct fd_wait *wait)
{
    struct fd_grv *g = container_of(wait, struct fd_grv, wait);
    struct fr *fr = g->fr;
    int64_t version = 0;
    int code = fdb.future_get_error(g->future);
    if (!code)
        code = fdb.future_get_int64(g->future, &version);
    fdb.future_destroy(g->future);
    g->future = NULL;
    if (code) {
        fd_retry(fr, &g->retry, g->tr, code, ask_again);
        return;
    }
    g->flying = false;
    fr->heard_ns = env_now_ns(fr->env);
    fdb.transaction_reset(g->tr);
    if (version > fr->version && g->asked_ns > fr->version_floor_ns) {
        fr->version = version;
        fr->version_ns = g->asked_ns;
    }
    struct list served = LIST_INIT(served);
    list_splice_tail(&served, &g->served);
    struct list *l;
    while ((l = list_pop(&served))) {
        struct fd_version_wait *w = container_of(l, struct fd_version_wait, link);
        w->ready(w, version);
    }
    if (!g->flying && !list_empty(&g->waiting))
        ask(g);
}

/* Whoever joins before the future exists is served by it. */
static void ask(struct fd_grv *g)
{
    struct fr *fr = g->fr;
    g->flying = true;
    list_splice_tail(&g->served, &g->waiting);
    g->asked_ns = env_now_ns(fr->env);
    fd_transaction(fr->fd, &g->tr, g->background, 0);
    g->future = fdb.transaction_get_read_version(g->tr);
    fd_wait_one(fr, &g->wait, g->future, answered);
}

void fd_versions_init(struct fr *fr)
{
    for (int i = 0; i < 2; i++) {
        struct fd_grv *g = fr->grv[i] = mem_zalloc(sizeof *g);
        g->fr = fr;
        g->background = i == 1;
        list_init(&g->waiting);
        list_init(&g->served);
    }
}

static void freed_late(struct fd_wait *wait)
{
    free(container_of(wait, struct fd_grv, wait));
}

static void retry_freed_late(struct fd_wait *wait)
{
    free(container_of(wait, struct fd_grv, retry.wait));
}

void fd_versions_close(struct fr *fr)
{
    for (int i = 0; i < 2; i++) {
        struct fd_grv *g = fr->grv[i];
        CHECK(list_empty(&g->waiting) && list_empty(&g->served));
        /* A renewal may be under way: its task comes, now or when the reactor is freed. */
        bool pending = g->future != NULL;
        if (pending) {
            g->wait.ready = freed_late;
            fd_wait_abandon(&g->wait, g->future);
        } else if (g->retry.future) {
            pending = true;
            g->retry.wait.ready = retry_freed_late;
            fd_wait_abandon(&g->retry.wait, g->retry.future);
        }
        env_timer_stop(fr->env, &g->retry.timer);
        if (g->tr)
            fdb.transaction_destroy(g->tr);
        if (!pending)
            free(g);
    }
}

void fd_version_get(struct fr *fr, bool background, struct fd_version_wait *w)
{
    struct fd_grv *g = fr->grv[background];
    list_add_tail(&g->waiting, &w->link);
    if (!g->flying)
        ask(g);
}

void fd_version_stop(struct fd_version_wait *w)
{
    list_remove(&w->link);
}

int64_t fd_version_own(struct fr *fr)
{
    uint64_t now = env_now_ns(fr->env);
    if (!fr->version || now - fr->version_ns > FD_VERSION_AGE_MAX_NS)
        return 0;
    if (now - fr->version_ns > FD_VERSION_AGE_RENEW_NS && !fr->grv[0]->flying)
        ask(fr->grv[0]);
    return fr->version;
}

void fd_version_committed(struct fr *fr, int64_t version, uint64_t asked_ns)
{
    if (!version) {
        fr->version = 0;
        fr->version_floor_ns = env_now_ns(fr->env);
    } else if (!fr->version && asked_ns <= fr->version_floor_ns) {
        /* Sent before the one whose version is not known was answered: this may be the older
         * one of the two. Whatever is asked for from now on shows both. */
        fr->version_floor_ns = env_now_ns(fr->env);
    } else if (version > fr->version) {
        fr->version = version;
        fr->version_ns = asked_ns;
    }
}
