/*
 * The cleaner: gives back, in the background, what nobody names any more.
 *
 * It works while the volume is owned, as a part of its owner: it reads what there is, adds keys to be
 * cleared to the open generation, a batch at a time, and goes on when they are committed. What it
 * works on stands in the store (a gap in the ancestry, a removed snapshot's record, a trash
 * record) and goes with the commit that finishes it, so a crash at any point leaves it to
 * be gone through again, which finds less.
 */
#include "volume/cleaner.h"

#include <stdlib.h>

#define RETRY_MS 1000u
#define RETRY_MS_MAX 60000u
#define FAILURES_HOPELESS 3u

/* Generations that were sealed before what the history is now became known are to be committed
 * first: they may hold a snapshot's rows, or let go of something because they took it for
 * a snapshot's. */
static bool settled(struct cleaner *c)
{
    const struct volume *vol = c->vol;
    if (c->changes != vol->history_changes) {
        c->changes = vol->history_changes;
        c->settled_gen = vol->open->no - 1;
    }
    return vol->committed_gen >= c->settled_gen;
}

static bool may_go(struct cleaner *c)
{
    return !c->stopped && c->vol->ownership == VOL_OWNED && !c->reading && !c->waits_rows &&
           !c->wait_gen && !c->retrying && settled(c);
}

static bool begin(struct cleaner *c)
{
    return clean_gap_begin(c) || clean_snapshot_begin(c) || clean_trash_begin(c);
}

static void rows_came(struct row_wait *wait)
{
    struct cleaner *c = container_of(wait, struct cleaner, row_wait);
    c->waits_rows = false;
    cleaner_read_over(c);
}

/* What it was at is forgotten; it stands in the store. */
static void forget(struct cleaner *c)
{
    struct volume *vol = c->vol;
    clean_snapshot_drop(c);
    clean_trash_drop(c);
    *c = (struct cleaner){.vol = vol};
    c->row_wait.ready = rows_came;
}

void cleaner_run(struct cleaner *c)
{
    if (c->running)
        return;
    /* Stopped during a read, and meanwhile the volume was taken again. */
    if (c->stopped && !c->reading && c->vol->ownership == VOL_OWNED)
        forget(c);
    c->running = true;
    while (may_go(c)) {
        if (c->what == CLEAN_NOTHING && !begin(c))
            break;
        if (!may_go(c))
            break;
        switch (c->what) {
        case CLEAN_GAP:
            clean_gap_step(c);
            break;
        case CLEAN_SNAPSHOT:
            clean_snapshot_step(c);
            break;
        case CLEAN_TRASH:
            clean_trash_step(c);
            break;
        case CLEAN_NOTHING:
            break;
        }
    }
    c->running = false;
}

void cleaner_read(struct cleaner *c, uint32_t n, void (*done)(struct store_read *read, enum status st))
{
    struct volume *vol = c->vol;
    for (uint32_t i = 0; i < n; i++) {
        c->ranges[i].begin = key_slice(&c->begin[i]);
        c->ranges[i].end = key_slice(&c->end[i]);
    }
    c->read = owner_read(vol);
    c->read.background = true;
    c->read.ranges = c->ranges;
    c->read.n_ranges = n;
    c->read.done = done;
    c->reading++;
    store_read(vol->shard->store, vol->shard->env, &c->read);
}

static void retry(struct env_timer *timer)
{
    struct cleaner *c = container_of(timer, struct cleaner, retry);
    c->retrying = false;
    cleaner_run(c);
}

void cleaner_read_over(struct cleaner *c)
{
    struct volume *vol = c->vol;
    cleaner_run(c);
    volume_progress(vol);
}

bool cleaner_answered(struct cleaner *c, enum status st)
{
    struct volume *vol = c->vol;
    CHECK(c->reading > 0);
    c->reading--;
    if (c->stopped || vol->ownership != VOL_OWNED)
        return false;
    if (st == ST_OK) {
        c->failures = 0;
        return true;
    }
    if (c->failures++ % 30 == 0)
        log_volume_warning(vol->name,
                           "volume %s: clean-up can't read the store: %s; it is tried again",
                           vol->name, status_text(st));
    if (!c->retrying) {
        c->retrying = true;
        c->retry.fire = retry;
        env_timer_start(vol->shard->env, &c->retry,
                        min_u64(RETRY_MS * (uint64_t)c->failures, RETRY_MS_MAX));
    }
    return false;
}

struct gen *cleaner_room(struct cleaner *c, uint64_t weight)
{
    struct volume *vol = c->vol;
    /* What is not cleared any more is no place for new. */
    if (vol->open->unsure && vol->open->unsure_changes != c->trash.changes)
        gen_seal(vol, false);
    gen_make_fit(vol, 0, weight);
    vol->open->weight += weight;
    return vol->open;
}

void cleaner_wait(struct cleaner *c)
{
    struct volume *vol = c->vol;
    /* An empty one is not committed before somebody else puts something into it. */
    uint64_t last = vol->open->no - gen_empty(vol->open);
    gen_seal(vol, false);
    if (vol->committed_gen >= last)
        c->batch = 0;
    else
        c->wait_gen = last;
}

void cleaner_added(struct cleaner *c, uint64_t n)
{
    struct volume *vol = c->vol;
    struct gen *g = vol->open;
    if (!g->opened_ns)
        g->opened_ns = env_now_ns(vol->shard->env);
    shard_age_start(vol->shard);
    c->batch += n;
    if (c->batch >= CLEAN_BATCH_KEYS)
        cleaner_wait(c);
}

void cleaner_unsure(struct cleaner *c)
{
    struct gen *g = c->vol->open;
    CHECK(!g->unsure || g->unsure_changes == c->trash.changes);
    g->unsure = true;
    g->unsure_changes = c->trash.changes;
}

void cleaner_add_clear(struct cleaner *c, struct gen_clear clear)
{
    struct gen *g = c->vol->open;
    if (!clear.certain)
        cleaner_unsure(c);
    mem_grow(&g->clears, &g->cap_clears, g->n_clears + 1, sizeof *g->clears);
    g->clears[g->n_clears++] = clear;
}

bool cleaner_own_segments(const struct volume *vol, uint64_t epoch, uint64_t above,
                          struct ancestry_record *out)
{
    struct ancestry_record own = vol->ancestry, all;
    *out = (struct ancestry_record){0};
    ancestry_forget_parents(&own, vol->branch);
    if (!ancestry_of_snapshot(&own, vol->branch, epoch, &all))
        return false;
    for (uint32_t i = 0; i < all.n_segments; i++) {
        struct ancestry_segment s = all.segments[i];
        s.after = max_u64(s.after, above);
        if (s.after < s.upto)
            out->segments[out->n_segments++] = s;
    }
    return true;
}

/* Whether there is something to do, as far as is known. */
static bool has_work(const struct cleaner *c)
{
    const struct volume *vol = c->vol;
    uint64_t after, upto;
    if (c->stopped || c->what != CLEAN_NOTHING || c->wait_gen ||
        ancestry_gap(&vol->ancestry, vol->branch, &after, &upto))
        return true;
    for (size_t i = 0; i < vol->history.n; i++)
        if (vol->history.v[i].rec.removed && !vol->history.v[i].cleared)
            return true;
    return clean_trash_wanted(c);
}

bool cleaner_kick(struct volume *vol, bool urgent)
{
    if (vol->ownership != VOL_OWNED || vol->read_only)
        return false;
    struct cleaner *c = vol->cleaner;
    if (!c) {
        c = vol->cleaner = mem_zalloc(sizeof *c);
        c->vol = vol;
        forget(c);
    }
    c->urgent = urgent;
    if (!has_work(c))
        return false;
    cleaner_run(c);
    /* Where the store can't be read for a while, nobody should wait for what it would bring. */
    return c->failures < FAILURES_HOPELESS;
}

void cleaner_committed(struct volume *vol, struct gen *g)
{
    struct cleaner *c = vol->cleaner;
    if (!c || vol->ownership != VOL_OWNED)
        return;
    if (c->wait_gen && g->no >= c->wait_gen) {
        c->wait_gen = 0;
        c->batch = 0;
    }
    cleaner_run(c);
}

bool cleaner_busy(const struct volume *vol)
{
    return vol->cleaner && vol->cleaner->reading;
}

bool volume_is_clean(const struct volume *vol)
{
    const struct cleaner *c = vol->cleaner;
    if (vol->ownership != VOL_OWNED || !c || has_work(c) || vol->n_ranges_uncommitted)
        return false;
    /* What was found is gone when it is committed. */
    list_for_each(l, &vol->gens)
    {
        const struct gen *g = container_of(l, struct gen, link);
        if (g->n_clears || g->n_trash_done || g->n_snapshots_done)
            return false;
    }
    return true;
}

void cleaner_stop(struct volume *vol)
{
    struct cleaner *c = vol->cleaner;
    if (!c)
        return;
    c->stopped = true;
    env_timer_stop(vol->shard->env, &c->retry);
    if (c->waits_rows)
        index_wait_stop(&c->row_wait);
    if (c->reading)
        return; /* it is called again before the volume goes */
    forget(c);
    vol->cleaner = NULL;
    free(c);
}
