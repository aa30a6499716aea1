/*
 * The limits of a shard, and the batch.
 *
 * Memory is divided once: half of the budget for writes (dirty blocks and
 * payloads being received), a quarter for reads under way; the encoded blocks of
 * two generations fit the rest, and clean blocks use whatever is not in use.
 * Requests that find their part used up wait in order of arrival.
 */
#include <stdlib.h>

#include "volume/internal.h"

#define LOG_BYTES_MIN (16ull << 20)
#define LOG_BYTES_MAX (128ull << 20)
#define DOUBT_LOOK_MS 10u
/* Enough for a commit of its own while another is under way. */
#define SEAL_AHEAD_BYTES (1u << 20)
/* So much, where the store has nothing to do, is committed at this age already: a snapshot, a
 * flush without a log and whoever takes over wait for all that is not committed. */
#define SEAL_EARLY_MS 100u
#define UNREAD_LINES_MAX 50u /* in LOG_LIMIT_WINDOW_NS */

static bool is_old(const struct shard *s, const struct volume *vol)
{
    uint64_t age_ms = (env_now_ns(s->env) - vol->open->opened_ns) / 1000000;
    return age_ms >= s->seal_age_ms || (age_ms >= SEAL_EARLY_MS && !vol->gens_queued &&
                                        vol->open->dirty_bytes >= SEAL_AHEAD_BYTES);
}

static void age_fire(struct env_timer *timer)
{
    struct shard *s = container_of(timer, struct shard, age_timer);
    bool more = false;
    s->age_running = false;
    list_for_each_safe(l, next, &s->volumes)
    {
        struct volume *vol = container_of(l, struct volume, link);
        if (vol->ownership != VOL_OWNED || gen_empty(vol->open))
            continue;
        if (is_old(s, vol))
            gen_seal(vol, false);
        else
            more = true;
    }
    if (more)
        shard_age_start(s);
}

void shard_age_start(struct shard *s)
{
    if (s->age_running)
        return;
    s->age_running = true;
    env_timer_start(s->env, &s->age_timer, (uint32_t)min_u64(s->seal_age_ms, SEAL_EARLY_MS));
}

static unsigned session_lost(void *arg)
{
    struct shard *s = arg;
    s->adrift = true;
    s->in_doubt = false;
    env_timer_stop(s->env, &s->doubt_timer);
    return volume_lose_all(s);
}

static void session_begun(void *arg)
{
    struct shard *s = arg;
    s->adrift = false;
    s->incarnation++;
}

bool shard_has_session(struct shard *s, uint64_t incarnation)
{
    return !s->member ||
           (!s->adrift && s->incarnation == incarnation && session_holds(s->session, s->env));
}

/* Looked at again now and then, which is simpler than being told, and rare. */
static void doubt_fire(struct env_timer *timer)
{
    struct shard *s = container_of(timer, struct shard, doubt_timer);
    if (!session_holds(s->session, s->env)) {
        env_timer_start(s->env, &s->doubt_timer, DOUBT_LOOK_MS);
        return;
    }
    s->in_doubt = false;
    list_for_each_safe(l, next, &s->volumes)
        owner_resume(container_of(l, struct volume, link));
}

bool shard_may_answer(struct shard *s)
{
    /* Adrift, what it had is lost and its connections are gone: nothing left to be kept back. */
    if (!s->member || s->adrift)
        return true;
    if (!s->in_doubt && session_holds(s->session, s->env))
        return true;
    if (!s->in_doubt) {
        s->in_doubt = true;
        session_notice(s->member);
        env_timer_start(s->env, &s->doubt_timer, DOUBT_LOOK_MS);
    }
    return false;
}

enum status shard_new(const struct shard_config *config, struct shard **out, struct err *e)
{
    *out = NULL;
    if (config->cache_bytes < VOLUME_CACHE_BYTES_MIN)
        return fail(e, ST_INVAL, "a cache of %llu bytes is too small: at least %llu MiB",
                    (unsigned long long)config->cache_bytes, VOLUME_CACHE_BYTES_MIN >> 20);
    struct shard *s = mem_zalloc(sizeof *s);
    s->store = config->store;
    s->env = config->env;
    s->session = config->session;
    s->background = config->background;
    s->seal_age_ms = config->seal_age_ms ? config->seal_age_ms : 1000;
    s->owner_wait_ms = config->owner_wait_ms;
    s->write_bytes_max = config->cache_bytes / 2;
    s->read_bytes_max = config->cache_bytes / 4;
    s->generation_bytes_max =
        min_u64(s->store->limits.batch_bytes_max, config->cache_bytes / 8);
    s->commit_bytes_max = s->store->limits.commit_bytes_max;
    CHECK(s->commit_bytes_max >= COMMIT_BYTES_MIN);
    s->rows.bytes_max = max_u64(config->cache_bytes / 16, 2u << 20);
    s->unread = (struct log_limit){.what = "blocks that can't be read",
                                   .level = LOG_LEVEL_ERROR,
                                   .lines_max = UNREAD_LINES_MAX};
    list_init(&s->rows.lru);
    list_init(&s->volumes);
    list_init(&s->write_waiters);
    list_init(&s->read_waiters);
    list_init(&s->submitted);
    list_init(&s->fetches);
    list_init(&s->walks);
    s->store_timeout_ms = config->store_timeout_ms;
    s->age_timer.fire = age_fire;
    s->doubt_timer.fire = doubt_fire;
    if (s->store->limits.has_log && !config->no_log) {
        uint64_t bytes = config->log_bytes;
        if (!bytes)
            bytes = min_u64(max_u64(config->cache_bytes / 2, LOG_BYTES_MIN), LOG_BYTES_MAX);
        enum status st = store_log_open(s->store, s->env, s->session->id, bytes, &s->log, e);
        if (st != ST_OK) {
            free(s);
            return st;
        }
        s->log_synced_seq = s->log_submitted_seq = store_log_next_seq(s->log);
    }
    s->pool = buf_pool_new(config->cache_bytes);
    blocks_init(&s->blocks, s->pool);
    if (s->session->timed)
        s->member = session_join(s->session, s->env, session_lost, session_begun, s);
    *out = s;
    return ST_OK;
}

void shard_free(struct shard *s)
{
    CHECK(list_empty(&s->volumes));
    CHECK(list_empty(&s->write_waiters) && list_empty(&s->read_waiters));
    env_timer_stop(s->env, &s->age_timer);
    env_timer_stop(s->env, &s->doubt_timer);
    if (s->member)
        session_leave(s->member);
    env_timer_stop(s->env, &s->tick_timer);
    store_unreserve(s->store, s->credit);
    /* Every volume was committed and given back, so no record is needed any more. */
    if (s->log)
        store_log_close(s->log, true);
    blocks_destroy(&s->blocks);
    buf_pool_free(s->pool);
    free(s);
}

void shard_tell_left_out(struct shard *s)
{
    log_limit_tick(&s->unread, env_now_ns(s->env));
}

void shard_wait_no_more(struct shard *s)
{
    s->owner_wait_ms = 0;
    s->leaving = true;
    list_for_each (l, &s->volumes) {
        struct volume *vol = container_of(l, struct volume, link);
        if (vol->ownership != VOL_OWNED)
            volume_fail_parked_soon(vol);
    }
}

void shard_log_gave_up(struct shard *s)
{
    if (s->log_failed)
        return;
    s->log_failed = true;
    log_error("the write log can't be written or synced any more: writes are answered when they "
              "are committed to the store; check the disk and restart the server");
    list_for_each_safe(l, next, &s->volumes)
    {
        struct volume *vol = container_of(l, struct volume, link);
        gen_seal(vol, false);
    }
}

void shard_submit(struct shard *s)
{
    if (s->log_dirty) {
        s->log_dirty = false;
        enum status st = s->log_failed ? ST_IO : store_log_submit(s->log);
        struct list batch = LIST_INIT(batch);
        list_splice_tail(&batch, &s->submitted);
        if (st == ST_OK)
            s->log_submitted_seq = store_log_next_seq(s->log);
        else
            shard_log_gave_up(s);
        struct list *l;
        while ((l = list_pop(&batch))) {
            struct vol_io *io = container_of(l, struct vol_io, link);
            if (st == ST_OK) {
                write_logged(io->vol, io);
            } else {
                volume_release_segs(io);
                flush_by_commit(io->vol, io);
            }
        }
    }
    if (s->seal_wanted) {
        s->seal_wanted = false;
        list_for_each_safe(l, next, &s->volumes)
        {
            struct volume *vol = container_of(l, struct volume, link);
            /* The next one is made ready while one commits: clients with a limit on what they have
             * in flight never fill it, and its encoding would come on top of each commit. */
            if (vol->ownership == VOL_OWNED &&
                (!vol->gens_queued ||
                 (vol->gens_queued == 1 && vol->open->dirty_bytes >= SEAL_AHEAD_BYTES)))
                gen_seal(vol, false);
        }
    }
    if (!list_empty(&s->write_waiters))
        shard_wake_writers(s);
}

uint64_t shard_log_keep(struct shard *s, const struct gen *done)
{
    uint64_t keep = s->log_submitted_seq;
    list_for_each(l, &s->volumes)
    {
        const struct volume *vol = container_of(l, struct volume, link);
        list_for_each(m, &vol->gens)
        {
            const struct gen *g = container_of(m, struct gen, link);
            if (g->first_seq && (vol != done->vol || g->no > done->no)) {
                keep = min_u64(keep, g->first_seq);
                break;
            }
        }
    }
    return keep;
}

void shard_seal_for_room(struct shard *s)
{
    if (s->space_waiting)
        return;
    list_for_each_safe(l, next, &s->volumes)
    {
        struct volume *vol = container_of(l, struct volume, link);
        if (vol->ownership == VOL_OWNED && !vol->gens_queued)
            gen_seal(vol, false);
    }
}

/* Whether all writes of a volume wait for something of its own: a read, or its commits. Those may
 * fail for as long as what is damaged of it is. */
static bool waits_for_itself(const struct volume *vol)
{
    return (vol->reads_first || vol->gens_queued >= GENERATIONS_QUEUED_MAX) && !vol->lost;
}

/* Whose turn it is. Writes that wait for their own volume hold nobody else up. */
static struct vol_io *next_writer(struct shard *s, bool needs_no_space)
{
    list_for_each(l, &s->write_waiters)
    {
        struct vol_io *io = container_of(l, struct vol_io, link);
        if (!waits_for_itself(io->vol) && (!needs_no_space || write_needs_no_space(io)))
            return io;
    }
    return NULL;
}

/* In order of arrival; but where the first waits for space, a trim goes ahead, which gives some. */
void shard_wake_writers(struct shard *s)
{
    struct vol_io *io;
    while ((io = next_writer(s, false))) {
        if (!write_try_grant(io->vol, io)) {
            io = shard_lacks_space(s) ? next_writer(s, true) : NULL;
            if (!io || !write_try_grant(io->vol, io)) {
                shard_seal_for_room(s);
                return;
            }
        }
        list_remove(&io->link);
        write_granted(io->vol, io);
    }
}

bool shard_writers_wait(const struct shard *s)
{
    return !list_empty(&s->write_waiters);
}

void shard_wake_readers(struct shard *s)
{
    while (!list_empty(&s->read_waiters)) {
        struct vol_io *io = container_of(s->read_waiters.next, struct vol_io, link);
        if (!fetch_try_grant(io->vol, io))
            return;
    }
}

void shard_look(const struct shard *s, void (*look)(void *arg, const struct volume *vol), void *arg)
{
    list_for_each(l, &s->volumes)
        look(arg, container_of(l, struct volume, link));
}

void shard_get_memory(const struct shard *s, struct shard_memory *memory)
{
    *memory = (struct shard_memory){.used_bytes = buf_pool_used(s->pool),
                                    .dirty_bytes = s->write_bytes,
                                    .limit_bytes = buf_pool_budget(s->pool)};
}
