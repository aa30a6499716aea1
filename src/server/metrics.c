/*
 * Counting requests; metrics.h says how.
 */
#include "server/metrics.h"

#include <stdlib.h>
#include <string.h>

#include "base/check.h"
#include "base/log.h"
#include "base/mem.h"

/* Lines about slow requests, of each lane. */
#define SLOW_SHOWN_MAX 10u

const char *const metrics_command_names[METRICS_COMMANDS] = {
    [NBD_CMD_READ] = "read",         [NBD_CMD_WRITE] = "write",         [METRICS_OTHER] = "other",
    [NBD_CMD_FLUSH] = "flush",       [NBD_CMD_TRIM] = "trim",           [NBD_CMD_CACHE] = "cache",
    [NBD_CMD_WRITE_ZEROES] = "zero", [NBD_CMD_BLOCK_STATUS] = "status",
};

void metrics_lane_init(struct metrics_lane *ml, struct metrics *all, struct env *env)
{
    memset(ml, 0, sizeof *ml);
    ml->all = all;
    ml->env = env;
    ml->slow_lines = (struct log_limit){.what = "slow requests",
                                        .level = LOG_LEVEL_WARNING,
                                        .lines_max = SLOW_SHOWN_MAX};
}

void metrics_lane_free(struct metrics_lane *ml)
{
    while (ml->volumes) {
        struct metrics_volume *mv = ml->volumes;
        ml->volumes = mv->next;
        free(mv);
    }
}

/* --- volumes and clients ---------------------------------------------------------------- */

static struct metrics_volume *add_volume(struct metrics_lane *ml, const char *name)
{
    struct metrics_volume *mv = mem_zalloc(sizeof *mv);
    memcpy(mv->name, name, strlen(name) + 1);
    mv->next = ml->volumes;
    __atomic_store_n(&ml->volumes, mv, __ATOMIC_RELEASE);
    return mv;
}

struct metrics_volume *metrics_volume(struct metrics_lane *ml, const char *export)
{
    char name[NAME_BYTES_MAX + 1];
    size_t len = strcspn(export, "@");
    CHECK(len < sizeof name);
    memcpy(name, export, len);
    name[len] = '\0';
    for (struct metrics_volume *mv = ml->volumes; mv; mv = mv->next)
        if (strcmp(mv->name, name) == 0)
            return mv;
    if (atomic_fetch_add(&ml->all->n_volumes, 1) < METRICS_VOLUMES_MAX)
        return add_volume(ml, name);
    atomic_fetch_sub(&ml->all->n_volumes, 1);
    if (!ml->rest)
        ml->rest = add_volume(ml, METRICS_REST);
    return ml->rest;
}

void metrics_client_enter(struct metrics_lane *ml, struct metrics_client *mc, const char *who,
                          const char *export, bool is_snapshot, uint64_t size)
{
    *mc = (struct metrics_client){.vol = metrics_volume(ml, export), .who = who, .export = export};
    mc->has_heat = !is_snapshot && mc->vol != ml->rest;
    metrics_client_resized(mc, size);
}

void metrics_client_resized(struct metrics_client *mc, uint64_t size)
{
    struct metrics_volume *mv = mc->vol;
    uint32_t shift = 12;
    if (!mc->has_heat || size == mv->heat_bytes)
        return;
    while ((size - 1) >> shift >= METRICS_HEAT_CELLS)
        shift++;
    mv->heat_bytes = size;
    __atomic_store_n(&mv->heat_shift, shift, __ATOMIC_RELAXED);
}

void metrics_client_leave(struct metrics_lane *ml)
{
    if (ml->n_ended)
        metrics_mark(ml, env_now_ns(ml->env));
}

/* --- slow requests ---------------------------------------------------------------------- */

/* Whether `n` more may be shown, as one line. */
static bool may_show(struct metrics_lane *ml, uint64_t now_ns, uint64_t n)
{
    counter_add(&ml->n_slow, n);
    return log_limit_may(&ml->slow_lines, now_ns, n);
}

void metrics_tick(struct metrics_lane *ml, uint64_t now_ns)
{
    log_limit_tick(&ml->slow_lines, now_ns);
}

static bool is_slow(const struct metrics_lane *ml, uint64_t took_ns)
{
    return ml->all->slow_ns && took_ns > ml->all->slow_ns;
}

static void tell_slow(struct metrics_lane *ml, const struct metrics_ended *r, uint64_t now_ns)
{
    if (may_show(ml, now_ns, 1))
        log_client_warning(
            r->client->who, r->client->export,
            "slow request: client %s, export %s: %s of %llu bytes at %llu took %llu ms",
            r->client->who, r->client->export, metrics_command_names[r->command],
            (unsigned long long)r->length, (unsigned long long)r->offset,
            (unsigned long long)((now_ns - r->begun_ns) / 1000000));
}

/* What was answered at once, and yet so late: this process, or its machine, stood still. */
static void tell_slow_batch(struct metrics_lane *ml, const struct metrics_volume *mv,
                            unsigned command, uint64_t took_ns, uint64_t now_ns)
{
    if (may_show(ml, now_ns, mv->fresh[command]))
        log_volume_warning(
            mv->name, "slow request: volume %s: %u of %s took %llu ms, all of it in this server",
            mv->name, mv->fresh[command], metrics_command_names[command],
            (unsigned long long)(took_ns / 1000000));
}

/* --- counting --------------------------------------------------------------------------- */

void metrics_book(struct metrics_lane *ml, uint64_t now_ns)
{
    uint64_t took_ns = now_ns - ml->mark_ns;
    struct metrics_volume *mv;
    while ((mv = ml->touched)) {
        ml->touched = mv->next_touched;
        mv->touched = false;
        while (mv->fresh_mask) {
            unsigned command = (unsigned)__builtin_ctz(mv->fresh_mask);
            mv->fresh_mask &= mv->fresh_mask - 1;
            histogram_add(&mv->commands[command].latency, took_ns, mv->fresh[command]);
            counter_add(&mv->booked, mv->fresh[command]);
            if (is_slow(ml, took_ns))
                tell_slow_batch(ml, mv, command, took_ns, now_ns);
            mv->fresh[command] = 0;
        }
    }
    for (unsigned i = 0; i < ml->n_ended; i++) {
        const struct metrics_ended *r = &ml->ended[i];
        histogram_add(&r->client->vol->commands[r->command].latency, now_ns - r->begun_ns, 1);
        counter_add(&r->client->vol->booked, 1);
        if (is_slow(ml, now_ns - r->begun_ns))
            tell_slow(ml, r, now_ns);
    }
    ml->n_ended = 0;
}

void metrics_answered_later(struct metrics_lane *ml, const struct metrics_client *mc,
                            uint16_t command, uint64_t begun_ns, uint64_t offset, uint64_t length)
{
    if (ml->n_ended == METRICS_ENDED_MAX)
        metrics_mark(ml, env_now_ns(ml->env));
    ml->ended[ml->n_ended++] = (struct metrics_ended){
        .client = mc, .begun_ns = begun_ns, .offset = offset, .length = length, .command = command};
}
