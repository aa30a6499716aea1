/*
 * The minder, a thread that does what must not wait for the commit thread: it
 * ends a process that keeps the writer lock and stands still, and looks after
 * watches when the bell was rung by another process. Once a second it looks at
 * what LMDB's map takes of this process's memory.
 */
#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/inotify.h>
#include <unistd.h>

#include "base/log.h"
#include "store/lmdb/engine.h"

#define TICK_MS_MAX 1000u
#define TICK_MS_MIN 20u
#define TRIM_NS 1000000000u

/* Who was seen with the lock, and since when it has not moved. */
struct suspicion {
    bool any;
    struct lm_holder holder;
    uint64_t since_ns;
};

static bool same_holder(const struct lm_holder *a, const struct lm_holder *b)
{
    return a->slot == b->slot && a->pid == b->pid && a->start_time == b->start_time &&
           a->turn == b->turn && a->progress == b->progress;
}

/* A process in the D state waits for a disk, which killing does not make faster. */
static bool waits_for_disk(const struct lm_holder *h)
{
    char state = 0;
    return lm_process_start_time(h->pid, &state) == h->start_time && state == 'D';
}

static void mind_lock(struct lm *lm, struct suspicion *s)
{
    uint64_t now = lm_now_ns();
    struct lm_holder holder;
    if (atomic_load(&lm->lock_wait_since_ns) == 0 || !lm_lock_holder(lm, &holder)) {
        s->any = false;
        return;
    }
    if (!s->any || !same_holder(&s->holder, &holder) || waits_for_disk(&holder)) {
        *s = (struct suspicion){true, holder, now};
        return;
    }
    if (now - s->since_ns < (uint64_t)lm->lease_ms * 1000000u)
        return;
    struct err e = {0};
    enum status st = lm_process_kill(lm, holder.pid, holder.start_time, &e);
    if (st == ST_OK)
        log_warning("store %s: process %d held the writer lock for %u ms without doing anything "
                    "and was killed",
                    lm->dir, (int)holder.pid, lm->lease_ms);
    else if (st != ST_NOTFOUND)
        log_error("store %s: process %d holds the writer lock and does nothing: %s", lm->dir,
                  (int)holder.pid, e.text);
    s->any = false;
}

static void bell_drain(struct lm *lm)
{
    _Alignas(struct inotify_event) char buf[4096];
    while (read(lm->inotify_fd, buf, sizeof buf) > 0)
        ;
}

static void *minder_thread(void *arg)
{
    struct lm *lm = arg;
    struct suspicion suspicion = {0};
    uint64_t trimmed_ns = 0;
    unsigned tick_ms = lm->lease_ms / 4;
    if (tick_ms > TICK_MS_MAX)
        tick_ms = TICK_MS_MAX;
    if (tick_ms < TICK_MS_MIN)
        tick_ms = TICK_MS_MIN;
    struct pollfd fds[2] = {{.fd = lm->minder_stop_fd, .events = POLLIN},
                            {.fd = lm->inotify_fd, .events = POLLIN}};
    for (;;) {
        if (poll(fds, 2, (int)tick_ms) < 0 && errno != EINTR)
            usleep(tick_ms * 1000);
        if (fds[0].revents)
            return NULL;
        if (fds[1].revents)
            bell_drain(lm);
        mind_lock(lm, &suspicion);
        lm_watch_recheck(lm);
        uint64_t now = lm_now_ns();
        if (now - trimmed_ns >= TRIM_NS) {
            trimmed_ns = now;
            lm_map_trim(lm);
        }
    }
}

enum status lm_minder_start(struct lm *lm, struct err *e)
{
    lm->minder_stop_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (lm->minder_stop_fd < 0)
        return fail(e, ST_UNAVAIL, "cannot make an event descriptor: %s", strerror(errno));
    /* Without inotify (too many in use) the tick alone notices changes, a little later. */
    lm->inotify_fd = inotify_init1(IN_CLOEXEC | IN_NONBLOCK);
    char bell[sizeof lm->dir + 8];
    snprintf(bell, sizeof bell, "%s/bell", lm->dir);
    if (lm->inotify_fd >= 0 && inotify_add_watch(lm->inotify_fd, bell, IN_MODIFY) < 0)
        log_warning("store %s: cannot watch %s: %s", lm->dir, bell, strerror(errno));
    int rc = pthread_create(&lm->minder_thread, NULL, minder_thread, lm);
    if (rc)
        return fail(e, ST_UNAVAIL, "cannot start a thread: %s", strerror(rc));
    lm->minder_runs = true;
    return ST_OK;
}

void lm_minder_stop(struct lm *lm)
{
    if (lm->minder_runs) {
        uint64_t one = 1;
        (void)!write(lm->minder_stop_fd, &one, sizeof one);
        pthread_join(lm->minder_thread, NULL);
        lm->minder_runs = false;
    }
    if (lm->minder_stop_fd >= 0)
        close(lm->minder_stop_fd);
    if (lm->inotify_fd >= 0)
        close(lm->inotify_fd);
    lm->minder_stop_fd = lm->inotify_fd = -1;
}
