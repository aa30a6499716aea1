/*
 * The store timeout: requests of clients that the store keeps waiting too long are answered
 * with an error, and nothing else changes.
 *
 * A write that took effect stays where it is, dirty and in its place in the order, and holds
 * its memory until it is committed: only who waits for it is told (G1, G2, G6). What was sent
 * to the store is not cancelled. A flush is refused as long as such a write is not in
 * (flush_begin() in write.c). A load goes on without the request that asked for it.
 *
 * Time is counted in ticks of a timer that runs while requests are under way, so a request
 * costs no look at a clock. Requests of commands (sync, resize) and of the replay wait.
 */
#include "volume/internal.h"

#define TICKS 8u /* that a timeout has */
#define TICK_MS_MIN 10u

static bool late(const struct shard *s, const struct vol_io *io)
{
    /* It came at some time in its tick, so that one does not count. */
    return io->kind != IO_SYNC && io->kind != IO_RESIZE && s->tick - io->tick > TICKS;
}

static void collect(struct shard *s, struct list *from, struct list *to)
{
    list_for_each_safe(l, next, from)
    {
        struct vol_io *io = container_of(l, struct vol_io, link);
        if (late(s, io)) {
            list_remove(l);
            list_add_tail(to, l);
        }
    }
}

static void collect_commits(struct volume *vol, struct list *to)
{
    list_for_each(l, &vol->gens)
    {
        struct gen *g = container_of(l, struct gen, link);
        struct list told = LIST_INIT(told);
        collect(vol->shard, &g->waiters, &told);
        list_for_each(m, &told)
            gen_owes(g, container_of(m, struct vol_io, link));
        list_splice_tail(to, &told);
    }
}

static void answer_late(struct list *told)
{
    struct list *l;
    while ((l = list_pop(told))) {
        struct vol_io *io = container_of(l, struct vol_io, link);
        struct volume *vol = io->vol;
        bool undecided = io->stage == IO_PARKED || io->stage == IO_WAITING;
        vol->stats.timeouts++;
        if (io->kind == IO_WRITE && undecided) {
            io->st = ST_IO;
            write_granted(vol, io);
        } else {
            volume_end_io(vol, io, ST_IO);
        }
    }
}

static void tick(struct env_timer *timer)
{
    struct shard *s = container_of(timer, struct shard, tick_timer);
    struct list told = LIST_INIT(told);
    bool busy = false;

    s->tick++;
    s->tick_running = false;
    collect(s, &s->write_waiters, &told);
    collect(s, &s->read_waiters, &told);
    list_for_each(l, &s->volumes)
    {
        struct volume *vol = container_of(l, struct volume, link);
        collect(s, &vol->parked, &told);
        collect_commits(vol, &told);
        busy |= vol->busy != 0;
    }
    fetch_collect(s, late, &told);
    extents_collect(s, late, &told);
    if (busy)
        timeout_start(s);
    if (list_empty(&told))
        return;
    if (!s->timeout_told)
        log_warning("the store has not answered for %u ms: requests that wait longer are "
                    "answered with errors; what was written stays and is committed when the "
                    "store answers again",
                    s->store_timeout_ms);
    s->timeout_told = true;
    answer_late(&told);
    shard_wake_writers(s);
    shard_wake_readers(s);
}

void timeout_start(struct shard *s)
{
    if (!s->store_timeout_ms || s->tick_running)
        return;
    s->tick_running = true;
    s->tick_timer.fire = tick;
    env_timer_start(s->env, &s->tick_timer, max_u64(s->store_timeout_ms / TICKS, TICK_MS_MIN));
}
