/*
 * Scenarios; scenario.h says how they go.
 *
 * Everything here is either an event of the world's own reactor (the storm: faults begin and
 * end) or the outer loop that runs events until something is so, and looks at the world after
 * each of them.
 */
#include "scenario.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/check.h"
#include "base/hash.h"
#include "base/mem.h"
#include "client.h"
#include "command.h"
#include "gateway.h"
#include "history.h"
#include "net.h"
#include "stores.h"
#include "trace.h"
#include "volume/catalog.h"
#include "volume/volume.h"

#define MS 1000000ull
#define PLACES_MAX CLIENT_GATEWAYS_MAX
#define GATEWAYS_MAX 64u
#define CLIENTS_MAX 96u
#define COMMANDS_MAX 64u
#define WORDS_MAX 8u
#define NAME_BYTES 24u
#define REQUESTS 1000u
/* Gateways look so often (500 ms) for connections that they had to leave waiting for too long, and
 * their clocks differ. */
#define STALE_MORE_MS 700u
#define EVENTS_MAX 5000000u
/* Longest time without any progress once everything is healed: dead connections are noticed after
 * 30 s, dead owners after the lease of a command (10 s) and a bit, and one may wait for another. */
#define HANG_NS (120000 * MS)
/* Longer than a connection without a peer lasts. */
#define LEFT_OVER_MS 35000u
/* Of the seeds on stores with heartbeats. */
#define FORCE_PERCENT 5u
#define VOLUME_NAME "disk"
#define OTHER_NAME "renamed"
#define SPARE_NAME "spare"
#define SECOND_NAME "second" /* of the other volume, which is there in some seeds */
#define SECOND_PERCENT 40u
#define SECOND_BLOCKS 24u
#define KEPT_MAX 12u   /* snapshots that are made */
#define VIEWERS_MAX 8u /* that look at them during the storm */
#define VIEWS_MAX 4u   /* snapshots that are looked at in the end */

enum {
    HOST_GATEWAYS = 1,
    HOST_VMS = 10,
    HOST_READERS = 20,
    HOST_VIEWERS = 25,
    HOST_SECOND = 26,
    HOST_LAST = 30
};

/* An address where one gateway process after another serves. */
struct place {
    unsigned index, host, lanes;
    int clock_ppm;
    struct gateway *gateway; /* the one that was started last; NULL: none yet */
};

enum fault {
    FAULT_CRASH,
    FAULT_PAUSE,
    FAULT_STORE_CUT,
    FAULT_STORE_DOWN,
    FAULT_CLIENT_CUT,
    FAULT_REPLACE,
    FAULT_CLIENT_DEATH,
    FAULT_CONNECTION,
    FAULT_DEAF,
    FAULT_ADDRESS,
    FAULT_MIGRATION,
    FAULT_COMMAND,
    FAULT_HISTORY,
    FAULT_SQUEEZE,
    FAULT_LATE_ANSWERS,
    FAULT_HELD_COMMITS,
    FAULT_AIMED_PAUSE,
    FAULT_KINDS,
    FAULT_FORCE = FAULT_KINDS, /* in seeds that are for it */
    FAULT_KINDS_ALL,
};

struct running_command {
    struct command *command;
    char name[NAME_BYTES];
    struct run *run;
};

/* A snapshot that was asked for, of the volume and perhaps of the second one too. */
struct kept {
    struct run *run;
    char name[NAME_BYTES], clone_name[NAME_BYTES];
    char full[2][2 * NAME_BYTES]; /* under both names of the volume */
    char second[2 * NAME_BYTES];
    uint32_t no, second_no; /* in the histories; second_no 0: not of that one */
    unsigned made_by, removed_by, cloned_by; /* commands, from 1; 0: none */
    bool noted, is_there;   /* that it was made: the command said so */
    /* From here on it stays what it is: of several volumes, when the command is over, which removes
     * what it has made where it can't make them all. */
    uint64_t settled_ns;
    bool cloned, compared;
};

struct run {
    struct scenario_options o;
    struct scenario_result *result;
    struct sim *sim;
    struct sim_env *env; /* the world's own: faults */
    struct net *net;
    struct simstore *store;
    struct history *history;
    struct clients clients;
    /* The second volume, with a small machine of its own; NULL: there is none. */
    struct history *second_history;
    struct clients second_clients;
    struct client *second;
    struct kept kept[KEPT_MAX];
    unsigned n_kept, n_viewers;

    enum simstore_kind kind;
    uint32_t lease_ms, owner_wait_ms, pause_close_ms, store_timeout_ms, block_size, requests;
    uint64_t data_bytes, tail_bytes, branch;
    uint64_t storm_ns;
    unsigned n_places;
    struct place places[PLACES_MAX];
    unsigned weights[FAULT_KINDS_ALL];
    bool by_force; /* volumes are taken from owners that live: see draw_force() */
    unsigned n_faults; /* left */
    bool healing, finishing, stopping;

    /* All there ever were. */
    struct gateway *gateways[GATEWAYS_MAX];
    char gateway_names[GATEWAYS_MAX][NAME_BYTES];
    unsigned n_gateways;
    struct client *all_clients[CLIENTS_MAX];
    char client_names[CLIENTS_MAX][NAME_BYTES];
    unsigned n_clients;
    struct client_config vm_config, reader_config;
    struct client *vm;     /* who writes; NULL or gone: nobody just now */
    struct client *vm_next; /* who is about to */
    bool vm_flushes;
    unsigned vm_host;
    uint64_t vm_waits_until_ns; /* its last one may not be known to be gone before */
    struct client *readers[2];
    unsigned n_readers;
    struct running_command commands[COMMANDS_MAX];
    unsigned n_commands;
    bool large; /* the volume has its tail, as far as was asked for */

    /* What was seen last. */
    uint64_t seen_commits, seen_answered, progress_ns;
    struct gateway *answering;
    uint8_t owner[RECORD_BYTES_MAX];
    size_t owner_len;
    struct owner_record owner_record;
    struct key owner_key, state_key;
    uint64_t state_hash;
    bool has_owner;
};

static uint64_t below(struct run *r, uint64_t n)
{
    return sim_below(r->sim, n);
}

static bool percent(struct run *r, unsigned p)
{
    return below(r, 100) < p;
}

__attribute__((format(printf, 2, 3))) static void wrong(struct run *r, const char *format, ...)
{
    if (r->result->failed)
        return;
    r->result->failed = true;
    va_list args;
    va_start(args, format);
    vsnprintf(r->result->what, sizeof r->result->what, format, args);
    va_end(args);
    trace("simulator", "VIOLATION: %s", r->result->what);
}

/* --- looking at the world after each event ---------------------------------------------- */

static const char *gateway_name(const struct run *r, const struct gateway *g)
{
    for (unsigned i = 0; i < r->n_gateways; i++)
        if (r->gateways[i] == g)
            return r->gateway_names[i];
    return "nobody";
}

static bool owned(const struct owner_record *o)
{
    static const uint8_t nobody[SESSION_ID_BYTES];
    return memcmp(o->session, nobody, sizeof nobody) != 0;
}

/* Something was committed that left the owner key as it was: was it data of who had the volume
 * before? Who takes it commits nothing more until it has it. (Where there is a log, it does, from
 * that.) No client need ever see this: whoever takes a volume has seen its last state. */
static void look_at_state(struct run *r, bool same_owner)
{
    struct slice head;
    if (r->kind != SIMSTORE_FDB || !r->branch ||
        !simstore_peek(r->store, key_slice(&r->state_key), &head))
        return;
    uint64_t hash = hash64(head.data, head.len, 0);
    bool changed = hash != r->state_hash;
    r->state_hash = hash;
    for (unsigned i = 0; changed && same_owner && i < r->n_gateways; i++)
        if (gateway_wants(r->gateways[i], r->branch) &&
            gateway_owns_in_store(r->gateways[i], r->branch))
            wrong(r, "the store took data from an owner after the owner key was %s's (G4)",
                  r->gateway_names[i]);
}

/* Something was committed: whose is the volume now? */
static void look_at_owner(struct run *r)
{
    struct slice head;
    if (!r->branch || !simstore_peek(r->store, key_slice(&r->owner_key), &head))
        return;
    bool same = head.len == r->owner_len && memcmp(head.data, r->owner, head.len) == 0;
    if (same) {
        look_at_state(r, true);
        return;
    }
    struct owner_record now;
    if (head.len > sizeof r->owner || !owner_decode(key_slice(&r->owner_key), head, &now)) {
        wrong(r, "the owner record is damaged");
        return;
    }
    if (owned(&now) && r->has_owner && owned(&r->owner_record))
        r->result->counts.takeovers++;
    else if (owned(&now) && r->has_owner)
        r->result->counts.handovers++;
    trace("store", owned(&now) ? "the volume's owner is process %u on %s now (token %llu)"
                               : "the volume is free now (it was process %u's on %s, token %llu)",
          now.pid, now.host, (unsigned long long)now.token);
    memcpy(r->owner, head.data, head.len);
    r->owner_len = head.len;
    r->owner_record = now;
    r->has_owner = true;
    look_at_state(r, false);
}

static void look_at_answering(struct run *r, bool committed)
{
    struct gateway *who = NULL;
    if (r->by_force) {
        /* (What was taken by force is still answered for by who had it, until its next commit.) */
        for (unsigned i = 0; committed && i < r->n_gateways; i++)
            if (gateway_owns_in_store(r->gateways[i], r->branch))
                r->answering = r->gateways[i];
        return;
    }
    for (unsigned i = 0; i < r->n_gateways; i++) {
        struct gateway *g = r->gateways[i];
        if (!gateway_may_answer(g, r->branch))
            continue;
        if (who)
            wrong(r, "%s and %s may both answer for the volume (G4)", gateway_name(r, who),
                  gateway_name(r, g));
        who = g;
    }
    if (who && (who != r->answering || committed) && !gateway_owns_in_store(who, r->branch))
        wrong(r, "%s may answer for the volume, and the store names another owner (G4)",
              gateway_name(r, who));
    r->answering = who;
}

/* Commands that make snapshots and have said so by now. */
static void look_at_snapshots(struct run *r)
{
    for (unsigned i = 0; i < r->n_kept; i++) {
        struct kept *k = &r->kept[i];
        struct command *made_by = r->commands[k->made_by - 1].command;
        if (k->noted || !command_is_over(made_by))
            continue;
        k->noted = true;
        if (k->second_no)
            k->settled_ns = sim_now_ns(r->sim);
        if (command_status(made_by) != 0)
            continue;
        k->is_there = true;
        r->result->counts.snapshots++;
        history_snapshot_made(r->history, sim_now_ns(r->sim), k->no);
        if (k->second_no)
            history_snapshot_made(r->second_history, sim_now_ns(r->sim), k->second_no);
    }
}

static void look(struct run *r)
{
    struct simstore_counts counts;
    simstore_counts(r->store, &counts);
    bool committed = counts.commits != r->seen_commits;
    r->seen_commits = counts.commits;
    if (committed)
        look_at_owner(r);
    look_at_answering(r, committed);
    look_at_snapshots(r);
    if (counts.violations)
        wrong(r, "the store was asked for what must not be asked for");
    if (r->clients.violation[0])
        wrong(r, "%s", r->clients.violation);
    if (r->second_clients.violation[0])
        wrong(r, "%s", r->second_clients.violation);
    const char *impossible = history_violation(r->history);
    if (impossible)
        wrong(r, "%s", impossible);
    impossible = r->second_history ? history_violation(r->second_history) : NULL;
    if (impossible)
        wrong(r, "the second volume: %s", impossible);
    r->result->hash = hash_mix(r->result->hash, sim_now_ns(r->sim));
    if (++r->result->counts.events > EVENTS_MAX)
        wrong(r, "it runs in a circle: %u events", EVENTS_MAX);
}

/* Runs the world until `cond` holds (NULL: never) or the clock shows `limit_ns`; true where it
 * holds. */
static bool run_until(struct run *r, bool (*cond)(struct run *r), uint64_t limit_ns)
{
    while (!r->result->failed) {
        if (cond && cond(r))
            return true;
        if (!sim_step_by(r->sim, limit_ns))
            return false;
        look(r);
    }
    return false;
}

static void describe_hang(struct run *r, const char *what)
{
    char text[300] = "";
    for (unsigned i = 0; i < r->n_clients && !text[0]; i++)
        if (!client_is_gone(r->all_clients[i]) && !client_is_idle(r->all_clients[i]))
            client_describe(r->all_clients[i], text, sizeof text);
    wrong(r, "nothing moves any more: %s%s%s", what, text[0] ? "; " : "", text);
}

/* Goes up with every answer. */
static uint64_t progress(const struct run *r)
{
    return r->clients.counts.answered + r->clients.counts.snapshot_reads +
           r->second_clients.counts.answered + r->second_clients.counts.snapshot_reads;
}

/* The same, once everything is healed: time passes only as long as clients get answers. */
static bool must_come(struct run *r, bool (*cond)(struct run *r), const char *what)
{
    uint64_t seen = progress(r);
    while (!run_until(r, cond, sim_now_ns(r->sim) + HANG_NS)) {
        if (r->result->failed)
            return false;
        if (progress(r) == seen) {
            describe_hang(r, what);
            return false;
        }
        seen = progress(r);
    }
    return true;
}

/* --- gateways --------------------------------------------------------------------------- */

static bool runs(const struct gateway *g)
{
    return g && (gateway_state(g) == GATEWAY_STARTING || gateway_state(g) == GATEWAY_UP);
}

static void start_gateway(struct run *r, struct place *p)
{
    if (r->n_gateways == GATEWAYS_MAX)
        return;
    char *name = r->gateway_names[r->n_gateways];
    unsigned nth = 1;
    for (unsigned i = 0; i < r->n_gateways; i++)
        nth += r->gateway_names[i][8] == (char)('1' + p->index);
    snprintf(name, NAME_BYTES, nth > 1 ? "gateway %u (%u)" : "gateway %u", p->index + 1, nth);
    struct gateway_config config = {.net = r->net,
                                    .store = r->store,
                                    .host = p->host,
                                    .lanes = p->lanes,
                                    .lease_ms = r->lease_ms,
                                    .store_timeout_ms = r->store_timeout_ms,
                                    .owner_wait_ms = r->owner_wait_ms,
                                    .pause_close_ms = r->pause_close_ms,
                                    .cache_bytes = (uint64_t)p->lanes * VOLUME_CACHE_BYTES_MIN,
                                    .clock_ppm = p->clock_ppm};
    p->gateway = r->gateways[r->n_gateways++] = gateway_start(&config, name);
}

static bool all_up(struct run *r)
{
    for (unsigned i = 0; i < r->n_places; i++)
        if (!r->places[i].gateway || gateway_state(r->places[i].gateway) != GATEWAY_UP)
            return false;
    return true;
}

static bool all_ended(struct run *r)
{
    for (unsigned i = 0; i < r->n_gateways; i++) {
        enum gateway_state st = gateway_state(r->gateways[i]);
        if (st != GATEWAY_ENDED && st != GATEWAY_DEAD)
            return false;
    }
    return true;
}

/* --- clients ---------------------------------------------------------------------------- */

static struct client *start_client(struct run *r, struct client_config config, const char *what,
                                   bool quiet)
{
    CHECK(r->n_clients < CLIENTS_MAX);
    char *name = r->client_names[r->n_clients];
    snprintf(name, NAME_BYTES, "%s %u", what, r->n_clients + 1);
    config.name = name;
    return r->all_clients[r->n_clients++] = client_start(&config, quiet);
}

/* A client that may write, on the machine where the disk is used now or on another one. */
static struct client *start_vm(struct run *r, unsigned host, bool quiet)
{
    struct client_config config = r->vm_config;
    config.host = host;
    config.gateway = (unsigned)below(r, r->n_places);
    config.n_connections = 1 + (unsigned)below(r, CLIENT_CONNECTIONS_MAX);
    config.structured = (uint8_t)below(r, 8);
    return start_client(r, config, "client", quiet);
}

static bool lives(const struct client *c)
{
    return c && !client_is_gone(c);
}

static unsigned other_vm_host(struct run *r)
{
    return r->vm_host == HOST_VMS ? HOST_VMS + 1 : HOST_VMS;
}

static void vm_returns(void *arg)
{
    struct run *r = arg;
    if (r->finishing || lives(r->vm) || lives(r->vm_next) || r->n_clients >= CLIENTS_MAX - 8)
        return;
    if (sim_now_ns(r->sim) < r->vm_waits_until_ns) {
        sim_at(r->env, r->vm_waits_until_ns - sim_now_ns(r->sim), vm_returns, r);
        return;
    }
    if (percent(r, 25))
        r->vm_host = other_vm_host(r);
    r->vm = start_vm(r, r->vm_host, false);
}

/* The second volume's: it stays all the time. */
static void start_second(struct run *r)
{
    struct client_config config = r->vm_config;
    config.all = &r->second_clients;
    config.host = HOST_SECOND;
    config.gateway = (unsigned)below(r, r->n_places);
    config.n_connections = 1;
    config.structured = (uint8_t)below(r, 2);
    config.depth = 1 + (unsigned)below(r, 4);
    config.burst_max = 1 + (uint32_t)below(r, 20);
    r->second = start_client(r, config, "second", false);
}

/* --- migrations --------------------------------------------------------------------------- */

static void source_leaves(void *arg)
{
    struct client *source = arg;
    if (lives(source) && client_is_idle(source))
        client_leave(source);
}

/* The source stops and has its answers, flushes, and has that answered; then the destination goes
 * on, which was there before the flush, and the source leaves. */
static void migration_step(void *arg)
{
    struct run *r = arg;
    struct client *from = r->vm, *to = r->vm_next;
    uint64_t now = sim_now_ns(r->sim);
    if (!to)
        return;
    if (!lives(to)) {
        r->vm_next = NULL;
        if (lives(from))
            client_go(from);
        else
            vm_returns(r);
        return;
    }
    bool ready = lives(from) ? client_is_idle(from) : now >= r->vm_waits_until_ns;
    if (ready && lives(from) && !r->vm_flushes) {
        ready = false;
        r->vm_flushes = client_is_connected(to);
        if (r->vm_flushes)
            client_flush(from);
    }
    if (!ready) {
        sim_at(r->env, 5 * MS, migration_step, r);
        return;
    }
    trace("simulator", "the virtual machine goes on at %s", client_name(to));
    r->vm = to;
    r->vm_next = NULL;
    r->vm_host = client_host(to);
    r->result->counts.migrations++;
    client_go(to);
    if (lives(from))
        sim_at(r->env, below(r, 2) ? below(r, 100 * MS) : below(r, 5000 * MS), source_leaves,
               from);
}

static void source_stops(void *arg)
{
    struct run *r = arg;
    if (lives(r->vm))
        client_stop(r->vm);
    migration_step(r);
}

static void begin_migration(struct run *r)
{
    if (!lives(r->vm) || r->vm_next || r->n_clients >= CLIENTS_MAX - 8)
        return;
    trace("simulator", "a migration from %s begins", client_name(r->vm));
    r->vm_flushes = false;
    r->vm_next = start_vm(r, other_vm_host(r), true);
    sim_at(r->env, below(r, 300 * MS), source_stops, r);
}

/* --- commands ------------------------------------------------------------------------------ */

static void command_dies(void *arg)
{
    struct running_command *c = arg;
    if (command_is_over(c->command))
        return;
    command_kill(c->command);
    c->run->result->counts.commands_killed++;
}

/* Starts it; it may be killed half way. */
static void run_command(struct run *r, const char *const *words, unsigned kill_percent)
{
    struct running_command *c = &r->commands[r->n_commands++];
    c->run = r;
    snprintf(c->name, sizeof c->name, "%s (%u)", words[0], r->n_commands);
    c->command = command_start(r->sim, r->store, c->name, words);
    if (percent(r, kill_percent))
        sim_at(r->env, below(r, 30 * MS), command_dies, c);
}

static void begin_command(struct run *r)
{
    if (r->n_commands == COMMANDS_MAX)
        return;
    const char *name = r->clients.names[r->clients.name];
    const char *words[WORDS_MAX] = {NULL};
    char size[24];
    unsigned n = 0;
    switch (below(r, 8)) {
    case 0:
        words[n++] = "list";
        break;
    case 1:
        words[n++] = "owner";
        words[n++] = "show";
        words[n++] = name;
        break;
    case 2:
        words[n++] = "owner";
        words[n++] = "evict";
        words[n++] = "--yes";
        words[n++] = name;
        break;
    case 3:
        words[n++] = "rename";
        words[n++] = name;
        words[n++] = r->clients.names[!r->clients.name];
        break;
    case 4:
        words[n++] = "remove";
        words[n++] = "--yes";
        words[n++] = SPARE_NAME;
        break;
    case 5:
        words[n++] = "create";
        words[n++] = SPARE_NAME;
        words[n++] = "1M";
        break;
    default:
        r->large = !r->large;
        snprintf(size, sizeof size, "%llu",
                 (unsigned long long)(r->data_bytes + (r->large ? r->tail_bytes : 0)));
        words[n++] = "resize";
        words[n++] = "--shrink";
        words[n++] = "--yes";
        words[n++] = name;
        words[n++] = size;
    }
    run_command(r, words, 10);
}

/* --- snapshots ------------------------------------------------------------------------------- */

static void begin_snapshot(struct run *r)
{
    if (r->n_kept == KEPT_MAX || r->n_commands == COMMANDS_MAX)
        return;
    struct kept *k = &r->kept[r->n_kept++];
    const char *words[WORDS_MAX] = {"snapshot", "create"};
    *k = (struct kept){.run = r, .made_by = r->n_commands + 1};
    snprintf(k->name, sizeof k->name, "s%u", r->n_kept);
    snprintf(k->clone_name, sizeof k->clone_name, "clone%u", r->n_kept);
    for (unsigned i = 0; i < 2; i++)
        snprintf(k->full[i], sizeof k->full[i], "%s@s%u", r->clients.names[i], r->n_kept);
    snprintf(k->second, sizeof k->second, SECOND_NAME "@s%u", r->n_kept);
    k->no = history_snapshot(r->history, sim_now_ns(r->sim));
    words[2] = k->full[r->clients.name];
    if (r->second && percent(r, 60)) {
        k->second_no = history_snapshot(r->second_history, sim_now_ns(r->sim));
        k->settled_ns = UINT64_MAX;
        words[3] = k->second;
    }
    run_command(r, words, 10);
}

/* One that may be there; NULL: there is none. */
static struct kept *any_kept(struct run *r)
{
    struct kept *k = r->n_kept ? &r->kept[below(r, r->n_kept)] : NULL;
    return k && !k->removed_by ? k : NULL;
}

static void begin_removal(struct run *r, struct kept *k)
{
    const char *words[WORDS_MAX] = {"snapshot", "remove", k->full[r->clients.name]};
    if (k->cloned_by || r->n_commands == COMMANDS_MAX)
        return;
    k->removed_by = r->n_commands + 1;
    run_command(r, words, 10);
}

static void begin_clone(struct run *r, struct kept *k)
{
    const char *words[WORDS_MAX] = {"clone", k->full[r->clients.name], k->clone_name};
    if (k->cloned_by || r->n_commands == COMMANDS_MAX)
        return;
    k->cloned_by = r->n_commands + 1;
    run_command(r, words, 10);
}

/* Somebody who reads all of a snapshot once: as a view, or, under `name`, as a volume that holds the
 * same. */
static struct client *start_viewer(struct run *r, struct kept *k, const char *name)
{
    struct client_config config = r->reader_config;
    config.host = HOST_VIEWERS;
    config.gateway = (unsigned)below(r, r->n_places);
    config.snapshot = k->no;
    config.settled_ns = &k->settled_ns;
    config.names[0] = name ? name : k->full[r->clients.name];
    config.names[1] = name ? name : k->full[!r->clients.name];
    config.read_only = !name;
    config.n_connections = 1 + (unsigned)below(r, 2);
    config.structured = (uint8_t)below(r, 4);
    config.depth = CLIENT_DEPTH_MAX;
    struct client *c = start_client(r, config, "viewer", true);
    client_read_all(c);
    return c;
}

static struct client *start_second_viewer(struct run *r, struct kept *k)
{
    struct client_config config = r->reader_config;
    config.all = &r->second_clients;
    config.host = HOST_VIEWERS;
    config.gateway = (unsigned)below(r, r->n_places);
    config.snapshot = k->second_no;
    config.settled_ns = &k->settled_ns;
    config.names[0] = config.names[1] = k->second;
    config.read_only = true;
    config.n_connections = 1;
    config.structured = (uint8_t)below(r, 2);
    struct client *c = start_client(r, config, "viewer", true);
    client_read_all(c);
    return c;
}

static void begin_view(struct run *r, struct kept *k)
{
    if (r->n_viewers++ < VIEWERS_MAX)
        start_viewer(r, k, NULL);
}

static void begin_history(struct run *r)
{
    struct kept *k = any_kept(r);
    uint64_t what = below(r, 100);
    if (!k || what < 50)
        begin_snapshot(r);
    else if (what < 65)
        begin_removal(r, k);
    else if (what < 75)
        begin_clone(r, k);
    else
        begin_view(r, k);
}

static void history_event(void *arg)
{
    struct run *r = arg;
    if (!r->finishing)
        begin_history(r);
}

static bool commands_over(struct run *r)
{
    for (unsigned i = 0; i < r->n_commands; i++)
        if (!command_is_over(r->commands[i].command))
            return false;
    return true;
}

/* --- the storm ------------------------------------------------------------------------------- */

/* Something that lasts, and its end. */
struct spell {
    struct run *r;
    struct place *place;
    struct gateway *gateway;
    unsigned host;
    uint32_t ms;
    uint64_t since_ns;
};

static struct spell *spell(struct run *r, struct place *p)
{
    struct spell *s = mem_alloc(sizeof *s);
    *s = (struct spell){.r = r, .place = p, .gateway = p ? p->gateway : NULL,
                          .since_ns = sim_now_ns(r->sim)};
    return s;
}

/* Short, or about as long as a lease, or long enough to be fenced meanwhile: others wait for an
 * eighth more, from when they look for the first time. */
static uint64_t duration_ns(struct run *r)
{
    uint64_t lease_ns = r->lease_ms * MS;
    switch (below(r, 5)) {
    case 0:
        return lease_ns / 50 + below(r, lease_ns / 2);
    case 1:
        return below(r, 3 * lease_ns);
    case 2:
        return lease_ns * 7 / 8 + below(r, lease_ns / 2);
    default:
        return lease_ns * 9 / 8 + below(r, lease_ns);
    }
}

static void move_address(struct run *r, unsigned to)
{
    trace("simulator", "the service address moves to gateway %u", to + 1);
    for (unsigned i = 0; i < r->n_clients; i++) {
        if (client_is_gone(r->all_clients[i]))
            continue;
        client_turn_to(r->all_clients[i], to);
        if (percent(r, 70))
            client_lose_connection(r->all_clients[i]);
    }
}

static void flee(void *arg)
{
    struct spell *s = arg;
    if (!s->r->healing)
        move_address(s->r, (s->place->index + 1) % s->r->n_places);
}

/* A gateway that does not serve may be seen, and its clients sent elsewhere. */
static void may_flee(struct run *r, struct place *p)
{
    if (percent(r, 60))
        sim_at(r->env, below(r, (below(r, 2) ? 100 : r->lease_ms / 2) * MS), flee, spell(r, p));
}

static void gateway_returns(void *arg)
{
    struct spell *s = arg;
    if (!s->r->healing && !runs(s->place->gateway))
        start_gateway(s->r, s->place);
}

/* A gateway that ended for whatever reason (another one may have ended it) is started again
 * sooner or later. */
static void supervise(void *arg)
{
    struct run *r = arg;
    for (unsigned i = 0; i < r->n_places && !r->stopping; i++)
        if (r->places[i].gateway && !runs(r->places[i].gateway) &&
            (r->healing || percent(r, 10)))
            start_gateway(r, &r->places[i]);
    if (!r->stopping)
        sim_at(r->env, 250 * MS, supervise, r);
}

static void begin_crash(struct run *r, struct place *p)
{
    bool host_too = r->kind == SIMSTORE_FDB && percent(r, 25);
    trace("simulator", "%s dies%s", gateway_name(r, p->gateway), host_too ? " with its host" : "");
    gateway_crash(p->gateway, host_too);
    r->result->counts.crashes++;
    r->result->counts.host_deaths += host_too;
    sim_at(r->env, below(r, 2) ? below(r, 500 * MS) : duration_ns(r), gateway_returns,
           spell(r, p));
}

static void end_pause(void *arg)
{
    struct spell *s = arg;
    if (gateway_state(s->gateway) == GATEWAY_DEAD || !gateway_is_paused(s->gateway))
        return;
    trace("simulator", "%s goes on", gateway_name(s->r, s->gateway));
    s->r->result->counts.long_pauses +=
        sim_now_ns(s->r->sim) - s->since_ns > s->r->lease_ms * MS;
    gateway_resume(s->gateway);
}

static void begin_pause(struct run *r, struct place *p)
{
    if (gateway_is_paused(p->gateway))
        return;
    uint64_t ns = duration_ns(r);
    trace("simulator", "%s stands still for %llu ms", gateway_name(r, p->gateway),
          (unsigned long long)(ns / MS));
    gateway_pause(p->gateway);
    r->result->counts.pauses++;
    sim_at(r->env, ns, end_pause, spell(r, p));
    may_flee(r, p);
}

static void end_store_cut(void *arg)
{
    struct spell *s = arg;
    if (gateway_state(s->gateway) == GATEWAY_DEAD || gateway_state(s->gateway) == GATEWAY_ENDED)
        return;
    trace("simulator", "%s reaches the store again", gateway_name(s->r, s->gateway));
    gateway_cut_store(s->gateway, false);
}

static void begin_store_cut(struct run *r, struct place *p)
{
    uint64_t ns = duration_ns(r);
    trace("simulator", "%s is cut off from the store for %llu ms", gateway_name(r, p->gateway),
          (unsigned long long)(ns / MS));
    gateway_cut_store(p->gateway, true);
    r->result->counts.store_cuts++;
    sim_at(r->env, ns, end_store_cut, spell(r, p));
    may_flee(r, p);
}

static void end_store_down(void *arg)
{
    struct run *r = arg;
    trace("simulator", "the store answers again");
    simstore_down(r->store, false);
}

static void begin_store_down(struct run *r)
{
    uint64_t ns = duration_ns(r);
    trace("simulator", "the store answers nobody for %llu ms", (unsigned long long)(ns / MS));
    simstore_down(r->store, true);
    r->result->counts.store_downs++;
    sim_at(r->env, ns, end_store_down, r);
}

/* How long others wait at most until they fence a gateway that is silent. */
static uint32_t fence_ms(const struct run *r)
{
    return r->lease_ms * 9 / 8 + 100;
}

/* Who writes goes to another gateway, if it may. */
static void lure(void *arg)
{
    struct spell *s = arg;
    struct run *r = s->r;
    if (r->healing || !lives(r->vm))
        return;
    client_turn_to(r->vm, (s->place->index + 1 + (unsigned)below(r, r->n_places - 1)) % r->n_places);
    client_lose_connection(r->vm);
}

static void lure_within(struct run *r, struct place *p, uint32_t ms)
{
    sim_at(r->env, below(r, ms * MS), lure, spell(r, p));
}

static void end_slow_store(void *arg)
{
    struct spell *s = arg;
    gateway_slow_store(s->gateway, 0, 0);
}

static void begin_cut_among_late_answers(void *arg)
{
    struct spell *s = arg;
    if (s->r->healing || !runs(s->gateway))
        return;
    trace("simulator", "%s is cut off from the store", gateway_name(s->r, s->gateway));
    gateway_cut_store(s->gateway, true);
    s->r->result->counts.store_cuts++;
    sim_at(s->r->env, (fence_ms(s->r) + below(s->r, s->r->lease_ms)) * MS, end_store_cut,
           spell(s->r, s->place));
    lure_within(s->r, s->place, 100);
}

/* Its commits happen at once, and it hears of them late, of heartbeats above all: by more than
 * others wait beyond its lease, and by less than the lease. Then often it hears nothing. */
static void begin_late_answers(struct run *r, struct place *p)
{
    uint32_t more_ms = fence_ms(r) - r->lease_ms;
    uint32_t late_ms = more_ms + (uint32_t)below(r, r->lease_ms - more_ms);
    uint64_t ns = (r->lease_ms / 2 + below(r, 2 * r->lease_ms)) * MS;
    trace("simulator", "commits of %s are answered %u ms late for %llu ms",
          gateway_name(r, p->gateway), late_ms, (unsigned long long)(ns / MS));
    gateway_slow_store(p->gateway, 0, late_ms);
    r->result->counts.late_answers++;
    if (percent(r, 75))
        sim_at(r->env, ns, begin_cut_among_late_answers, spell(r, p));
    sim_at(r->env, ns, end_slow_store, spell(r, p));
}

/* What it commits just now arrives when others have fenced it, who write the same blocks. */
static void begin_held_commits(struct run *r, struct place *p)
{
    uint32_t held_ms = fence_ms(r) + (uint32_t)below(r, r->lease_ms / 2);
    trace("simulator", "commits of %s are %u ms on their way", gateway_name(r, p->gateway),
          held_ms);
    gateway_slow_store(p->gateway, held_ms, 0);
    r->result->counts.held_commits++;
    lure_within(r, p, 300);
    sim_at(r->env, duration_ns(r), end_slow_store, spell(r, p));
}

/* It has shown that it lives; what it does next comes late: it gives nothing back at once. */
static void begin_slow_store(void *arg)
{
    struct spell *s = arg;
    if (s->r->healing)
        return;
    gateway_slow_store(s->gateway, s->ms, 0);
    sim_at(s->r->env, s->ms * MS, end_slow_store, s);
}

/* Others have seen its last sign of life now: when their time is over, it goes on, while they fence
 * it. What they commit is on its way for as long as there is doubt about when that is. */
static void take_aim(struct run *r, struct place *p)
{
    uint32_t doubt_ms = 30 + (uint32_t)below(r, r->lease_ms / 8);
    uint64_t ns = (fence_ms(r) + below(r, doubt_ms)) * MS;
    trace("simulator", "%s is about to be fenced: it goes on in %llu ms", gateway_name(r, p->gateway),
          (unsigned long long)(ns / MS));
    r->result->counts.aimed_pauses++;
    r->result->counts.long_pauses++;
    sim_at(r->env, ns, end_pause, spell(r, p));
    struct spell *slow = spell(r, p);
    slow->ms = 2 * doubt_ms;
    sim_at(r->env, ns + below(r, 10 * MS), begin_slow_store, slow);
    for (unsigned i = 0; i < r->n_places; i++) {
        struct place *other = &r->places[i];
        if (other == p || !runs(other->gateway))
            continue;
        gateway_slow_store(other->gateway, doubt_ms, 0);
        sim_at(r->env, ns + doubt_ms * MS, end_slow_store, spell(r, other));
    }
}

static void wait_for_challenger(void *arg)
{
    struct spell *s = arg;
    struct run *r = s->r;
    if (r->healing || !runs(s->gateway) || !gateway_is_paused(s->gateway))
        return;
    for (unsigned i = 0; i < r->n_places; i++)
        if (r->places[i].gateway != s->gateway && gateway_wants(r->places[i].gateway, r->branch)) {
            take_aim(r, s->place);
            return;
        }
    if (s->ms-- > 0)
        sim_at(r->env, MS, wait_for_challenger, s);
    else
        end_pause(s);
}

/* Who owns the volume stands still, and nobody has work for it meanwhile. */
static void begin_aimed_pause(struct run *r, struct place *p)
{
    if (!r->answering || p->gateway != r->answering || gateway_is_paused(p->gateway))
        return;
    trace("simulator", "%s stands still until it is about to be fenced",
          gateway_name(r, p->gateway));
    gateway_pause(p->gateway);
    r->result->counts.pauses++;
    struct spell *s = spell(r, p);
    s->ms = r->lease_ms;
    wait_for_challenger(s);
    lure_within(r, p, 20);
}

static void end_force(void *arg)
{
    struct spell *s = arg;
    if (runs(s->gateway))
        gateway_use_force(s->gateway, false);
}

/* Some of the writer's connections stay with the owner, which goes on committing; one comes here. */
static void begin_force(struct run *r, struct place *p)
{
    if (p->gateway == r->answering)
        p = &r->places[(p->index + 1) % r->n_places];
    if (!runs(p->gateway) || !lives(r->vm))
        return;
    gateway_use_force(p->gateway, true);
    r->result->counts.forced++;
    client_turn_to(r->vm, p->index);
    if (percent(r, 60))
        client_lose_connection(r->vm);
    sim_at(r->env, below(r, 300 * MS), end_force, spell(r, p));
}

/* For a while, so that blocks go soon after they were committed, and come back. */
struct squeezing {
    struct run *r;
    struct gateway *gateway;
    unsigned left;
};

static void squeeze(void *arg)
{
    struct squeezing *s = arg;
    if (s->r->healing || !runs(s->gateway))
        return;
    gateway_squeeze(s->gateway);
    if (s->left-- > 0)
        sim_at(s->r->env, below(s->r, 60 * MS), squeeze, s);
}

static void begin_squeezing(struct run *r, struct place *p)
{
    struct squeezing *s = mem_alloc(sizeof *s);
    *s = (struct squeezing){.r = r, .gateway = p->gateway, .left = (unsigned)below(r, 60)};
    r->result->counts.squeezes++;
    squeeze(s);
}

static void cut_client(struct run *r, const struct place *p, unsigned host, bool cut)
{
    net_cut(r->net, p->host, host, cut);
    r->clients.cut[p->index][host] = r->second_clients.cut[p->index][host] = cut;
}

static void end_client_cut(void *arg)
{
    struct spell *s = arg;
    trace("simulator", "host %u and gateway %u reach each other again", s->host,
          s->place->index + 1);
    cut_client(s->r, s->place, s->host, false);
}

static void begin_client_cut(struct run *r, struct place *p)
{
    struct spell *s = spell(r, p);
    uint64_t ns = duration_ns(r);
    s->host = r->n_readers && percent(r, 25) ? client_host(r->readers[0]) : r->vm_host;
    trace("simulator", "host %u and gateway %u are cut off from each other for %llu ms", s->host,
          p->index + 1, (unsigned long long)(ns / MS));
    cut_client(r, p, s->host, true);
    r->result->counts.client_cuts++;
    sim_at(r->env, ns, end_client_cut, s);
}

static void begin_replacement(struct run *r, struct place *p)
{
    struct gateway *old = p->gateway;
    bool overlap = percent(r, 50);
    trace("simulator", "%s is replaced, %s", gateway_name(r, old),
          overlap ? "by one that serves already" : "after it has ended");
    r->result->counts.replacements++;
    if (overlap)
        start_gateway(r, p);
    gateway_stop(old);
    if (!overlap)
        sim_at(r->env, below(r, 1000 * MS), gateway_returns, spell(r, p));
}

static void begin_client_death(struct run *r)
{
    struct client *c = r->vm;
    if (r->vm_next && percent(r, 50))
        c = r->vm_next;
    if (!lives(c))
        return;
    static const enum client_death deaths[] = {CLIENT_KILLED, CLIENT_KILLED_HALF,
                                               CLIENT_KILLED_HALF, CLIENT_VANISHED};
    uint64_t ns = client_die(c, deaths[below(r, 4)]) * MS;
    if (c != r->vm)
        return;
    r->vm_waits_until_ns = sim_now_ns(r->sim) + ns;
    ns += below(r, 2) ? below(r, 50 * MS) : below(r, 3000 * MS);
    if (!r->vm_next)
        sim_at(r->env, ns, vm_returns, r);
}

static void begin_fault(struct run *r, enum fault fault)
{
    struct place *p = &r->places[below(r, r->n_places)];
    /* Who owns the volume is more interesting. */
    for (unsigned i = 0; i < r->n_places && percent(r, 60); i++)
        if (r->answering && r->places[i].gateway == r->answering)
            p = &r->places[i];
    bool needs_gateway = fault == FAULT_CRASH || fault == FAULT_PAUSE || fault == FAULT_STORE_CUT ||
                         fault == FAULT_REPLACE || fault >= FAULT_SQUEEZE;
    if (needs_gateway && !runs(p->gateway))
        return;
    switch (fault) {
    case FAULT_CRASH:
        begin_crash(r, p);
        break;
    case FAULT_PAUSE:
        begin_pause(r, p);
        break;
    case FAULT_STORE_CUT:
        begin_store_cut(r, p);
        break;
    case FAULT_STORE_DOWN:
        begin_store_down(r);
        break;
    case FAULT_CLIENT_CUT:
        begin_client_cut(r, p);
        break;
    case FAULT_REPLACE:
        begin_replacement(r, p);
        break;
    case FAULT_CLIENT_DEATH:
        begin_client_death(r);
        break;
    case FAULT_CONNECTION:
        if (lives(r->vm))
            client_lose_connection(r->vm);
        break;
    case FAULT_DEAF:
        if (lives(r->vm))
            client_do_not_read(r->vm, (uint32_t)(duration_ns(r) / MS));
        break;
    case FAULT_ADDRESS:
        move_address(r, (unsigned)below(r, r->n_places));
        break;
    case FAULT_MIGRATION:
        begin_migration(r);
        break;
    case FAULT_COMMAND:
        begin_command(r);
        break;
    case FAULT_HISTORY:
        begin_history(r);
        break;
    case FAULT_SQUEEZE:
        begin_squeezing(r, p);
        break;
    case FAULT_LATE_ANSWERS:
        begin_late_answers(r, p);
        break;
    case FAULT_HELD_COMMITS:
        begin_held_commits(r, p);
        break;
    case FAULT_AIMED_PAUSE:
        begin_aimed_pause(r, p);
        break;
    case FAULT_FORCE:
        begin_force(r, p);
        break;
    case FAULT_KINDS_ALL:
        break;
    }
}

static void next_fault(void *arg);

static void plan_fault(struct run *r)
{
    if (!r->n_faults || r->healing)
        return;
    uint64_t mean = r->storm_ns / (r->n_faults + 1);
    /* Now and then close upon the one before. */
    uint64_t ns = percent(r, 25) ? below(r, 200 * MS) : below(r, mean * 2);
    sim_at(r->env, ns, next_fault, r);
}

static void next_fault(void *arg)
{
    struct run *r = arg;
    unsigned total = 0, kind = 0;
    if (r->healing || !r->n_faults)
        return;
    r->n_faults--;
    for (unsigned i = 0; i < FAULT_KINDS_ALL; i++)
        total += r->weights[i];
    for (unsigned at = (unsigned)below(r, total); at >= r->weights[kind]; kind++)
        at -= r->weights[kind];
    begin_fault(r, (enum fault)kind);
    plan_fault(r);
}

/* All faults end; what is down comes back. */
static void heal(struct run *r)
{
    static const struct simstore_faults none;
    trace("simulator", "everything is healed");
    r->healing = true;
    simstore_set_faults(r->store, &none);
    simstore_down(r->store, false);
    for (unsigned host = HOST_VMS; host < HOST_LAST; host++)
        for (unsigned i = 0; i < r->n_places; i++)
            cut_client(r, &r->places[i], host, false);
    for (unsigned i = 0; i < r->n_gateways; i++) {
        struct gateway *g = r->gateways[i];
        enum gateway_state st = gateway_state(g);
        if (st == GATEWAY_DEAD || st == GATEWAY_ENDED)
            continue;
        if (r->kind == SIMSTORE_FDB)
            gateway_cut_store(g, false);
        gateway_slow_store(g, 0, 0);
        if (gateway_is_paused(g))
            gateway_resume(g);
    }
    for (unsigned i = 0; i < r->n_places && r->by_force; i++)
        if (runs(r->places[i].gateway))
            begin_crash(r, &r->places[i]);
    if (!lives(r->vm) && !lives(r->vm_next))
        vm_returns(r);
}

/* --- the beginning ------------------------------------------------------------------------- */

struct setting_up {
    struct catalog_op op;
    struct run *r;
    bool done;
};

static void set_up_step(struct catalog_op *op)
{
    container_of(op, struct setting_up, op)->done = true;
}

static struct setting_up *set_up;

static bool set_up_done(struct run *r)
{
    (void)r;
    return set_up->done;
}

static bool set_up_wait(struct run *r, struct setting_up *s, const char *what)
{
    set_up = s;
    if (!run_until(r, set_up_done, sim_now_ns(r->sim) + HANG_NS))
        wrong(r, "nothing moves: %s", what);
    else if (s->op.st != ST_OK)
        wrong(r, "%s: %s", what, s->op.err.text);
    return !r->result->failed;
}

/* Makes the store and the volume, as `fdb-nbd create` does. */
static void make_volumes(struct run *r)
{
    struct sim_env *env = sim_env_new(r->sim);
    struct store *store = simstore_attach(r->store, env);
    struct setting_up *s = mem_zalloc(sizeof *s);
    struct volume_spec spec = {.name = VOLUME_NAME,
                               .size = r->data_bytes,
                               .block_size = r->block_size,
                               .codec = percent(r, 90) ? CODEC_NONE : CODEC_LZ4};
    s->op.done = set_up_step;
    catalog_prepare(&s->op, store, &env->base, true);
    if (!set_up_wait(r, s, "making the store"))
        return;
    catalog_op_free(&s->op);
    *s = (struct setting_up){.op = {.done = set_up_step}};
    catalog_create(&s->op, store, &env->base, &spec);
    if (!set_up_wait(r, s, "making the volume"))
        return;
    catalog_op_free(&s->op);
    *s = (struct setting_up){.op = {.done = set_up_step}};
    catalog_find(&s->op, store, &env->base, VOLUME_NAME);
    if (!set_up_wait(r, s, "finding the volume"))
        return;
    r->branch = s->op.entries[0].branch;
    key_owner(&r->owner_key, r->branch);
    key_state(&r->state_key, r->branch);
    catalog_op_free(&s->op);
    if (r->second_history) {
        snprintf(spec.name, sizeof spec.name, SECOND_NAME);
        spec.size = (uint64_t)SECOND_BLOCKS * r->block_size;
        *s = (struct setting_up){.op = {.done = set_up_step}};
        catalog_create(&s->op, store, &env->base, &spec);
        if (!set_up_wait(r, s, "making the second volume"))
            return;
        catalog_op_free(&s->op);
    }
    simstore_detach(r->store, store);
}

/* Which faults, and how many. */
static void draw_weights(struct run *r)
{
    bool fdb = r->kind == SIMSTORE_FDB;
    unsigned theme = (unsigned)below(r, 100);
    r->n_faults = 2 + (unsigned)below(r, 14);
    if (theme < 8) {
        r->n_faults = (unsigned)below(r, 2);
        r->weights[FAULT_CONNECTION] = 1;
    } else if (theme < 40) {
        r->weights[below(r, FAULT_KINDS)] = 1;
    } else if (theme < 60) {
        /* Two kinds that meet. */
        r->weights[below(r, FAULT_KINDS)] += 1;
        r->weights[below(r, FAULT_KINDS)] += 1;
    } else {
        for (unsigned i = 0; i < FAULT_KINDS; i++)
            r->weights[i] = 1 + (unsigned)below(r, 8);
    }
    if (!fdb) {
        /* (The embedded store has no network to it, and is not shared by machines.) */
        r->weights[FAULT_CRASH] += r->weights[FAULT_STORE_CUT];
        r->weights[FAULT_PAUSE] += r->weights[FAULT_STORE_DOWN];
        r->weights[FAULT_SQUEEZE] += r->weights[FAULT_LATE_ANSWERS] + r->weights[FAULT_HELD_COMMITS];
        r->weights[FAULT_PAUSE] += r->weights[FAULT_AIMED_PAUSE];
        r->weights[FAULT_STORE_CUT] = r->weights[FAULT_STORE_DOWN] = 0;
        r->weights[FAULT_LATE_ANSWERS] = r->weights[FAULT_HELD_COMMITS] = 0;
        r->weights[FAULT_AIMED_PAUSE] = 0;
    }
}

/* One in `n_min` to `n_max`, or never. */
static uint32_t rate(struct run *r, unsigned likely, uint32_t n_min, uint32_t n_max)
{
    return percent(r, likely) ? n_min + (uint32_t)below(r, n_max - n_min + 1) : 0;
}

static void set_store_faults(struct run *r)
{
    bool fdb = r->kind == SIMSTORE_FDB;
    struct simstore_faults f = {
        .commit_slow = rate(r, 40, 5, 200),
        .slow_ms = 1 + (uint32_t)below(r, percent(r, 20) ? 4000 : 200),
        .commit_fails = rate(r, 30, 5, 200),
        .commit_unknown = fdb ? rate(r, 70, 2, 50) : 0,
        .late_ms_max = 1 + (uint32_t)below(r, percent(r, 50) ? 6000 : 100),
        .read_fails = fdb ? rate(r, 30, 5, 200) : 0,
    };
    simstore_set_faults(r->store, &f);
}

static void draw_clients(struct run *r)
{
    struct client_config *c = &r->vm_config;
    uint32_t requests_in_storm = r->requests + r->requests / 4;
    *c = (struct client_config){
        .all = &r->clients,
        .by_offset = percent(r, 50),
        .mixes_gateways = percent(r, 25),
        .depth = percent(r, 30) ? 1 + (unsigned)below(r, 3)
                                : 1 + (unsigned)below(r, CLIENT_DEPTH_MAX),
        .mix = {.writes = (uint8_t)(25 + below(r, 40)),
                .zeros = (uint8_t)below(r, 8),
                .trims = (uint8_t)below(r, 10),
                .flushes = (uint8_t)below(r, 4),
                .statuses = (uint8_t)below(r, 3),
                .fua = (uint8_t)(percent(r, 50) ? below(r, 30) : 0),
                .large = (uint8_t)(percent(r, 50) ? below(r, 3) : 0),
                .hot = (uint8_t)below(r, 80)},
        .burst_max = percent(r, 30) ? 1 : 1 + (uint32_t)below(r, 80),
        .timeout_ms = r->clients.stale_ms + (uint32_t)below(r, 8000),
        .gives_up = (uint8_t)(percent(r, 50) ? below(r, 50) : 0),
    };
    /* So that about enough is asked for while the storm lasts. */
    uint64_t pause_ms = (c->burst_max + 1) * (r->storm_ns / MS) / requests_in_storm;
    c->pause_ms_max = (uint32_t)pause_ms + 1;
    r->reader_config = *c;
    r->reader_config.mix = (struct client_mix){.statuses = 2, .hot = c->mix.hot};
    r->reader_config.depth = 1 + (unsigned)below(r, 4);
    r->reader_config.burst_max = 4;
    r->reader_config.pause_ms_max = 100 + (uint32_t)below(r, 2000);
    r->n_readers = percent(r, 40) ? 1 + (unsigned)below(r, 2) : 0;
    if (r->by_force) {
        c->mix = (struct client_mix){.writes = 100, .large = c->mix.large, .hot = c->mix.hot};
        c->mixes_gateways = c->only_writes = true;
        c->depth = CLIENT_DEPTH_MAX;
        c->burst_max = 1 + (uint32_t)below(r, 10);
        c->pause_ms_max = 1 + (uint32_t)below(r, 10);
        r->reader_config.only_writes = true;
        r->n_readers = 0;
    }
    /* Where several want the volume at once, or may be taken for several. */
    r->clients.refusals = r->n_readers || c->mixes_gateways || r->store_timeout_ms ||
                          r->weights[FAULT_MIGRATION] || r->weights[FAULT_CLIENT_DEATH] ||
                          r->weights[FAULT_ADDRESS] || r->weights[FAULT_LATE_ANSWERS] || r->weights[FAULT_HELD_COMMITS] ||
                          r->weights[FAULT_AIMED_PAUSE];
}

/* Takeovers by force: nothing but the owner key stands between an owner that lives and commits and
 * the one that takes the volume. Reads at the old one are not fenced then, nor what changes nothing
 * there; so clients just write while that goes on, and gateways are new before somebody reads. */
static void draw_force(struct run *r)
{
    r->by_force = r->kind == SIMSTORE_FDB && percent(r, FORCE_PERCENT);
    if (!r->by_force)
        return;
    memset(r->weights, 0, sizeof r->weights);
    r->weights[FAULT_FORCE] = 8;
    r->weights[FAULT_CONNECTION] = 1;
    r->weights[FAULT_SQUEEZE] = 1;
    r->n_faults = 10 + (unsigned)below(r, 30);
    r->storm_ns = (2000 + below(r, 4000)) * MS;
}

static void draw_second(struct run *r)
{
    uint32_t n_sectors = SECOND_BLOCKS * r->block_size / HISTORY_SECTOR;
    if (r->by_force || !percent(r, SECOND_PERCENT))
        return;
    r->second_history = history_new(n_sectors);
    clients_init(&r->second_clients, r->sim, r->net, r->second_history, n_sectors);
    struct clients *all = &r->second_clients;
    all->stale_ms = r->clients.stale_ms;
    all->names[0] = all->names[1] = SECOND_NAME;
    all->n_gateways = r->n_places;
    memcpy(all->gateways, r->clients.gateways, sizeof all->gateways);
    all->refusals = true;
}

static void draw(struct run *r)
{
    r->kind = r->o.engine == SCENARIO_LOG   ? SIMSTORE_LOG
              : r->o.engine == SCENARIO_FDB ? SIMSTORE_FDB
              : below(r, 2)                 ? SIMSTORE_FDB
                                            : SIMSTORE_LOG;
    r->requests = r->o.requests ? r->o.requests : REQUESTS;
    r->lease_ms = SESSION_LEASE_MS_MIN;
    r->pause_close_ms = 1000 + (uint32_t)below(r, 2000);
    r->store_timeout_ms = percent(r, 20) ? 500 + (uint32_t)below(r, 4000) : 0;
    r->owner_wait_ms = percent(r, 30) ? 0 : 500 + (uint32_t)below(r, 10000);
    r->block_size = percent(r, 75) ? 4096 : 8192u << below(r, 2);
    r->data_bytes = r->block_size * (16ull + below(r, percent(r, 50) ? 48 : 1000));
    if (r->data_bytes > 4 << 20)
        r->data_bytes = 4 << 20;
    r->tail_bytes = r->block_size * (1 + below(r, 64));
    r->storm_ns = (5000 + below(r, 30000)) * MS;
    r->n_places = 2 + (unsigned)below(r, 2);
    int ppm = percent(r, 50) ? 50000 : 0;
    for (unsigned i = 0; i < r->n_places; i++)
        r->places[i] = (struct place){
            .index = i,
            .host = HOST_GATEWAYS + i,
            .lanes = 1 + (unsigned)below(r, 2),
            .clock_ppm = (int)below(r, (uint64_t)(2 * ppm + 1)) - ppm,
        };
    draw_weights(r);
    draw_force(r);
}

/* --- the end ------------------------------------------------------------------------------ */

static bool enough(struct run *r)
{
    return r->clients.counts.answered >= r->requests && lives(r->vm) && !r->vm_next;
}

static unsigned n_served(const struct run *r)
{
    unsigned n = 0;
    for (unsigned i = 0; i < r->n_places; i++)
        n += r->clients.served[i] > 0;
    return n;
}

static bool two_served(struct run *r)
{
    return n_served(r) >= 2;
}

/* Sends everybody to a gateway that has served nobody yet. */
static void show_another(struct run *r)
{
    unsigned to = 0;
    while (r->clients.served[to])
        to++;
    for (unsigned i = 0; i < r->n_clients; i++)
        if (!client_is_gone(r->all_clients[i]))
            client_move(r->all_clients[i], to);
}

static bool all_clients_idle(struct run *r)
{
    for (unsigned i = 0; i < r->n_clients; i++)
        if (!client_is_gone(r->all_clients[i]) && !client_is_idle(r->all_clients[i]))
            return false;
    return commands_over(r);
}

/* Everybody reads everything back and leaves. */
static void finish_clients(struct run *r)
{
    r->finishing = true;
    for (unsigned i = 0; i < r->n_clients; i++)
        if (lives(r->all_clients[i])) {
            client_stop(r->all_clients[i]);
            client_read_all(r->all_clients[i]);
        }
    if (!must_come(r, all_clients_idle, "the clients read everything back"))
        return;
    for (unsigned i = 0; i < r->n_clients; i++)
        if (lives(r->all_clients[i]))
            client_leave(r->all_clients[i]);
}

/* A last client reads everything through one gateway. */
static void read_through(struct run *r, struct clients *all, unsigned place)
{
    struct client_config config = r->reader_config;
    config.all = all;
    config.host = HOST_LAST - 1;
    config.gateway = place;
    config.stays = true;
    config.n_connections = 1 + (unsigned)below(r, 2);
    config.structured = (uint8_t)below(r, 4);
    config.depth = CLIENT_DEPTH_MAX;
    struct client *c = start_client(r, config, "last client", true);
    client_read_all(c);
    if (must_come(r, all_clients_idle, "the last client reads everything"))
        client_leave(c);
}

/* --- snapshots, in the end ------------------------------------------------------------------ */

/* Whether it must be there. */
static bool must_be_there(const struct kept *k)
{
    return k->is_there && !k->removed_by;
}

/* Waits for a viewer; false: there was nothing to be seen. */
static bool viewed(struct run *r, struct client *c, const struct kept *k)
{
    if (!must_come(r, all_clients_idle, "a snapshot is read"))
        return false;
    if (client_found_nothing(c)) {
        if (must_be_there(k))
            wrong(r, "G7: no gateway knows snapshot %s, which was made", k->name);
        return false;
    }
    client_leave(c);
    return true;
}

static bool command_worked(struct run *r, const char *const *words)
{
    run_command(r, words, 0);
    struct command *c = r->commands[r->n_commands - 1].command;
    if (!must_come(r, commands_over, words[0]))
        return false;
    if (command_status(c) != 0)
        wrong(r, "%s %s fails although all is well: %s", words[0], words[1], command_said(c));
    return !r->result->failed;
}

/* A clone that nobody has written to holds the same. */
static void look_at_clone(struct run *r, struct kept *k)
{
    const char *words[WORDS_MAX] = {"clone", k->full[r->clients.name], k->clone_name};
    if (!k->cloned_by) {
        k->cloned_by = r->n_commands + 1;
        if (!command_worked(r, words))
            return;
    }
    struct client *c = start_viewer(r, k, k->clone_name);
    if (!must_come(r, all_clients_idle, "a clone is read"))
        return;
    bool made = command_status(r->commands[k->cloned_by - 1].command) == 0;
    if (client_found_nothing(c) && made)
        wrong(r, "no gateway knows %s, which was made", k->clone_name);
    if (client_found_nothing(c))
        return;
    client_leave(c);
    r->result->counts.clones++;
}

static void look_at_second(struct run *r, struct kept *k)
{
    struct client *c = start_second_viewer(r, k);
    if (!viewed(r, c, k))
        return;
    history_snapshots_together(r->history, k->no, r->second_history, k->second_no);
    r->result->counts.groups++;
}

/* One that is there; but where clones are, one that is in the way may have one. */
static struct kept *rollback_to(struct run *r)
{
    struct kept *to = NULL;
    for (unsigned i = 0; i < r->n_kept; i++) {
        struct kept *k = &r->kept[i];
        if (k->cloned_by)
            return NULL;
        if (must_be_there(k) && k->compared && (!to || percent(r, 50)))
            to = k;
    }
    return to;
}

static void roll_back(struct run *r, struct kept *k)
{
    const char *full = k->full[r->clients.name];
    const char *words[WORDS_MAX] = {"snapshot", "rollback", "--destroy-newer", "--yes", full};
    if (!command_worked(r, words))
        return;
    struct client *c = start_viewer(r, k, r->clients.names[r->clients.name]);
    if (!must_come(r, all_clients_idle, "what was rolled back is read"))
        return;
    client_leave(c);
    r->result->counts.rollbacks++;
}

/* All clients have left: snapshots hold what they must hold, and what they held before. */
static void look_back(struct run *r)
{
    unsigned first = r->n_kept ? (unsigned)below(r, r->n_kept) : 0, n = 0;
    bool clones = percent(r, 50);
    for (unsigned i = 0; i < r->n_kept && n < VIEWS_MAX && !r->result->failed; i++) {
        struct kept *k = &r->kept[(first + i) % r->n_kept];
        if (k->removed_by)
            continue;
        n++;
        struct client *c = start_viewer(r, k, NULL);
        k->compared = viewed(r, c, k);
        if (k->compared && k->second_no && k->is_there)
            look_at_second(r, k);
        if (k->compared && !r->result->failed && (k->cloned_by || clones))
            look_at_clone(r, k);
    }
    struct kept *to = r->result->failed ? NULL : rollback_to(r);
    if (to)
        roll_back(r, to);
}

static void add_counts(struct run *r)
{
    struct scenario_counts *n = &r->result->counts;
    const struct client_counts *c = &r->clients.counts;
    struct simstore_counts s;
    struct history_counts h;
    simstore_counts(r->store, &s);
    history_counts(r->history, &h);
    n->seeds_log = r->kind == SIMSTORE_LOG;
    n->seeds_fdb = r->kind == SIMSTORE_FDB;
    n->requests = c->requests;
    n->resends = c->resends;
    n->connections = c->connections;
    n->connections_lost = c->connections_lost;
    n->timeouts = c->timeouts;
    n->client_deaths = c->deaths;
    n->half_sent = c->half_sent;
    n->given_up = c->given_up;
    n->given_up_there = h.given_up_there;
    n->given_up_gone = h.given_up_gone;
    n->snapshots_whole = h.snapshots_whole;
    n->snapshot_reads = h.snapshot_reads;
    for (unsigned i = 0; i < r->n_kept; i++) {
        unsigned by = r->kept[i].removed_by;
        n->snapshots_removed += by && command_status(r->commands[by - 1].command) == 0;
    }
    n->refused = c->refused;
    n->errors = c->errors;
    n->commits = s.commits;
    n->conflicts = s.conflicts;
    n->unknown_outcomes = s.unknown_outcomes;
    n->late_commits = s.late_commits;
    n->late_refused = s.late_refused;
    n->simulated_ms = sim_now_ns(r->sim) / MS;
    n->commands = r->n_commands;
    for (unsigned i = 0; i < r->n_commands; i++)
        n->commands_failed += command_is_over(r->commands[i].command) &&
                              command_status(r->commands[i].command) > 0;
    for (unsigned i = 0; i < r->n_gateways; i++) {
        n->fenced += gateway_sessions_ended(r->gateways[i]);
        n->ended += gateway_state(r->gateways[i]) == GATEWAY_DEAD;
    }
    n->ended -= n->crashes;
}

static void tell(struct run *r)
{
    trace("simulator", "seed %llu: %s, %u gateways, volume of %llu bytes in blocks of %u",
          (unsigned long long)r->o.seed,
          r->kind == SIMSTORE_LOG ? "log store" : "FoundationDB engine", r->n_places,
          (unsigned long long)r->data_bytes, r->block_size);
}

static void play(struct run *r)
{
    make_volumes(r);
    if (r->result->failed)
        return;
    for (unsigned i = 0; i < r->n_places; i++)
        start_gateway(r, &r->places[i]);
    if (!must_come(r, all_up, "the gateways start"))
        return;
    supervise(r);
    set_store_faults(r);
    r->vm_host = HOST_VMS;
    r->vm = start_vm(r, r->vm_host, false);
    for (unsigned i = 0; i < r->n_readers; i++) {
        struct client_config config = r->reader_config;
        config.host = HOST_READERS + i;
        config.gateway = (unsigned)below(r, r->n_places);
        config.n_connections = 1;
        config.structured = (uint8_t)below(r, 2);
        r->readers[i] = start_client(r, config, "reader", false);
    }
    if (r->second_history)
        start_second(r);
    for (uint64_t i = !r->by_force && percent(r, 70) ? 1 + below(r, 5) : 0; i > 0; i--)
        sim_at(r->env, below(r, r->storm_ns), history_event, r);
    plan_fault(r);
    run_until(r, NULL, sim_now_ns(r->sim) + r->storm_ns);

    heal(r);
    if (!must_come(r, all_up, "all gateways are up again"))
        return;
    /* (Readers elsewhere leave it its chance: who is never idle lets nobody have the volume.) */
    if (lives(r->vm))
        client_hurry(r->vm);
    if (!must_come(r, enough, "the clients go on"))
        return;
    for (unsigned i = 0; i < 10 && !two_served(r); i++) {
        show_another(r);
        run_until(r, two_served, sim_now_ns(r->sim) + 10000 * MS);
    }
    if (!two_served(r))
        wrong(r, "only %u gateway served requests", n_served(r));
    finish_clients(r);
    /* Whatever is left over somewhere has its chance to do harm. */
    run_until(r, NULL, sim_now_ns(r->sim) + LEFT_OVER_MS * MS);
    unsigned first = (unsigned)below(r, r->n_places);
    for (unsigned i = 0; i < 2 && !r->result->failed; i++)
        read_through(r, &r->clients, (first + i) % r->n_places);
    if (r->second && !r->result->failed)
        read_through(r, &r->second_clients, first);
    if (!r->by_force && !r->result->failed)
        look_back(r);
    r->stopping = true;
    for (unsigned i = 0; i < r->n_gateways; i++)
        if (runs(r->gateways[i]))
            gateway_stop(r->gateways[i]);
    must_come(r, all_ended, "the gateways end");
}

void scenario_run(const struct scenario_options *options, struct scenario_result *result)
{
    static struct run run;
    struct run *r = &run;
    memset(result, 0, sizeof *result);
    r->o = *options;
    r->result = result;
    r->sim = sim_new(options->seed);
    r->env = sim_env_new(r->sim);
    trace_begin(r->sim, options->trace);
    draw(r);
    r->net = net_new(r->sim);
    net_set_delays(r->net, 20000ull << below(r, 6), 0);
    r->store = simstore_new(r->sim, r->kind, sim_random(r->sim));
    r->history = history_new(r->data_bytes / HISTORY_SECTOR);
    clients_init(&r->clients, r->sim, r->net, r->history,
                 (uint32_t)(r->data_bytes / HISTORY_SECTOR));
    r->clients.stale_ms = r->pause_close_ms + STALE_MORE_MS;
    r->clients.names[0] = VOLUME_NAME;
    r->clients.names[1] = OTHER_NAME;
    r->clients.n_gateways = r->n_places;
    r->clients.tail_bytes = r->tail_bytes;
    for (unsigned i = 0; i < r->n_places; i++)
        r->clients.gateways[i] = r->places[i].host;
    draw_clients(r);
    draw_second(r);
    tell(r);
    play(r);
    const char *impossible = result->failed ? NULL : history_check(r->history);
    if (impossible)
        wrong(r, "%s", impossible);
    impossible = result->failed || !r->second ? NULL : history_check(r->second_history);
    if (impossible)
        wrong(r, "the second volume: %s", impossible);
    add_counts(r);
    result->hash = hash_mix(result->hash, r->clients.hash);
}
