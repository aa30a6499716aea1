/* A command's store and reactor; see run.h. */
#include "cli/run.h"

#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "cli/audit.h"
#include "server/reactor.h"
#include "volume/volume.h"

#define LOOK_AGAIN_MS 200u
#define LEAVING_MS_MAX 5000u
#define LEAVING_LOOK_MS 100u
#define LOOK_KEPT_MS 100u
#define SIGN_WAIT_MS 15000u

static void op_done(struct catalog_op *op)
{
    struct run *run = container_of(op, struct run, op);
    run->answered = true;
}

struct catalog_op *run_op(struct run *run)
{
    catalog_op_free(&run->op);
    run->op = (struct catalog_op){.done = op_done};
    run->answered = false;
    return &run->op;
}

void run_until(struct run *run, const bool *done)
{
    while (!*done)
        reactor_run_once(run->env);
}

struct aside {
    struct env_work work;
    void (*run)(void *arg);
    void *arg;
    bool over;
};

static void aside_work(struct env_work *work)
{
    struct aside *a = container_of(work, struct aside, work);
    a->run(a->arg);
}

static void aside_over(struct env_work *work)
{
    container_of(work, struct aside, work)->over = true;
}

void run_aside(struct run *run, void (*work)(void *arg), void *arg)
{
    struct aside aside = {.work = {.work = aside_work, .done = aside_over}, .run = work, .arg = arg};
    env_work(run->env, &aside.work);
    run_until(run, &aside.over);
}

int run_clear_removed(struct run *run)
{
    bool more = true;
    while (more) {
        catalog_clear_removed(run_op(run), run->store, run->env, &more);
        if (run_wait(run) != ST_OK)
            return cli_failed(&run->op.err);
    }
    return CLI_DONE;
}

struct pause {
    struct env_timer timer;
    bool over;
};

static void pause_over(struct env_timer *timer)
{
    container_of(timer, struct pause, timer)->over = true;
}

void run_pause(struct run *run, uint32_t ms)
{
    struct pause pause = {.timer = {.fire = pause_over}};
    env_timer_start(run->env, &pause.timer, ms);
    run_until(run, &pause.over);
}

enum status run_wait(struct run *run)
{
    run_until(run, &run->answered);
    return run->op.st;
}

void run_keep(struct run *run, struct catalog_op *to)
{
    *to = run->op;
    run->op.entries = NULL;
    run->op.snapshots = NULL;
    run->op.n_entries = run->op.n_snapshots = 0;
}

int run_begin(struct run *run, struct cli *cli, enum run_mode mode)
{
    struct err e = {0};
    *run = (struct run){.cli = cli};
    if (reactor_new(&run->reactor, &e) != ST_OK)
        return cli_failed(&e);
    run->env = reactor_env(run->reactor);
    struct store_options options = {.flags = (mode == RUN_CREATE ? STORE_CREATE : 0u) |
                                             (cli->wait_for_store ? STORE_WAIT : 0u),
                                    .lease_ms = cli->lease_ms,
                                    .timeout_ms = cli->store_timeout_ms,
                                    .own_cache = cli->own_cache,
                                    .quota_bytes = cli->quota_bytes};
    enum status st = store_open(cli->store_uri, &options, &run->store, &e);
    if (st != ST_OK) {
        cli_failed(&e);
        return st == ST_INVAL ? CLI_USAGE : CLI_STORE;
    }
    catalog_prepare(run_op(run), run->store, run->env, mode == RUN_CREATE);
    st = run_wait(run);
    if (st != ST_OK) {
        cli_failed(&run->op.err);
        return CLI_STORE;
    }
    run->meta = run->op.meta;
    if (mode != RUN_READ && !catalog_may_write(&run->meta)) {
        cli_error("%s has features that this version must not write to: use a newer fdb-nbd",
                  cli->store_uri);
        return CLI_STORE;
    }
    return CLI_DONE;
}

void run_end(struct run *run)
{
    catalog_op_free(&run->op);
    if (run->store)
        store_close(run->store);
    if (run->reactor)
        reactor_free(run->reactor);
}

int run_find_either(struct run *run, const char *name, struct catalog_entry *entry)
{
    catalog_find(run_op(run), run->store, run->env, name);
    if (run_wait(run) != ST_OK)
        return cli_failed(&run->op.err);
    *entry = run->op.entries[0];
    return CLI_DONE;
}

int run_find(struct run *run, const char *name, struct catalog_entry *entry)
{
    if (!strchr(name, '@'))
        return run_find_either(run, name, entry);
    return cli_usage_error(run->cli, "\"%.300s\" names a snapshot, where a volume is needed", name);
}

int run_find_snapshot(struct run *run, const char *name, struct catalog_entry *entry)
{
    if (strchr(name, '@'))
        return run_find_either(run, name, entry);
    return cli_usage_error(run->cli,
                           "\"%.300s\" names no snapshot, where one is needed: VOLUME@SNAPSHOT",
                           name);
}

struct looking {
    struct store_read read;
    struct store_get get;
    struct run *run;
    char here[HOST_BYTES_MAX + 1];
    enum session_verdict verdict;
    bool done;
};

static void looked(struct store_read *read, enum status st)
{
    struct looking *l = container_of(read, struct looking, read);
    l->verdict = SESSION_MAYBE;
    if (st == ST_OK)
        l->verdict = session_judge(&l->run->sight, &l->get, l->run->env, l->here);
    store_read_release(read);
    l->done = true;
}

/* Looks at the record of a session, on a store with heartbeats. */
static enum run_owner look(struct run *run, const struct owner_record *owner)
{
    struct looking l = {.run = run, .read = {.n_gets = 1, .done = looked}};
    session_sight_begin(&run->sight, owner->session);
    /* Lists name the same session again and again. */
    if (run->sight.len && env_now_ns(run->env) - run->sighted_ns < LOOK_KEPT_MS * 1000000ull)
        return run->sighted;
    session_host_name(l.here);
    l.get.key = key_slice(&run->sight.key);
    l.read.gets = &l.get;
    store_read(run->store, run->env, &l.read);
    run_until(run, &l.done);
    run->sighted_ns = env_now_ns(run->env);
    run->sighted = l.verdict != SESSION_MAYBE    ? OWNER_DEAD
                   : run->sight.n_changes > 0 ? OWNER_ALIVE
                                              : OWNER_UNKNOWN;
    return run->sighted;
}

enum run_owner run_owner_state(struct run *run, const struct owner_record *owner)
{
    static const uint8_t nobody[SESSION_ID_BYTES];
    if (memcmp(owner->session, nobody, sizeof nobody) == 0)
        return OWNER_NONE;
    if (run->store->limits.needs_heartbeat)
        return look(run, owner);
    switch (store_session_probe(run->store, owner->session)) {
    case STORE_SESSION_ALIVE:
        return OWNER_ALIVE;
    case STORE_SESSION_DEAD:
        return OWNER_DEAD;
    case STORE_SESSION_UNKNOWN:
        break;
    }
    return OWNER_UNKNOWN;
}

enum run_owner run_owner_wait(struct run *run, const struct owner_record *owner)
{
    enum run_owner state = run_owner_state(run, owner);
    if (!run->store->limits.needs_heartbeat || !run->sight.readable)
        return state;
    /* One that lives gives a heartbeat in half a lease for sure. */
    uint64_t wait_ns = min_u64(session_silence_ns(&run->sight) / 2, SIGN_WAIT_MS * 1000000ull);
    uint64_t until = env_now_ns(run->env) + wait_ns;
    while (state == OWNER_UNKNOWN && env_now_ns(run->env) < until) {
        run_pause(run, LOOK_AGAIN_MS);
        state = run_owner_state(run, owner);
    }
    return state;
}

struct mail_record run_mail(enum mail_kind kind)
{
    struct mail_record mail = {.kind = (uint8_t)kind};
    char host[HOST_BYTES_MAX - 20 - AUDIT_USER_BYTES] = "", user[AUDIT_USER_BYTES];
    if (gethostname(host, sizeof host - 1) != 0)
        host[0] = '\0';
    snprintf(mail.from, sizeof mail.from, "%s pid %d user %s", host, (int)getpid(),
             audit_user(user));
    return mail;
}

enum status run_ask(struct run *run, const struct catalog_entry *entry, enum mail_kind kind)
{
    struct mail_record mail = run_mail(kind);
    catalog_ask_owner(run_op(run), run->store, run->env, entry, &mail, RUN_ASK_WAIT_MS, NULL, true);
    return run_wait(run);
}

bool run_wait_leaving(struct run *run, const struct catalog_entry *entry, enum run_owner state,
                      struct run_patience *patience, const char *advice)
{
    const struct owner_record *o = &entry->owner;
    if (state == OWNER_UNKNOWN && !patience->called) {
        /* Nothing is asked of it that its clients would feel, only whether it is there. */
        patience->called = true;
        if (run_ask(run, entry, MAIL_SYNC) == ST_NOTFOUND)
            return true;
    }
    if (patience->waited_ms >= LEAVING_MS_MAX) {
        cli_error("volume \"%s\" in %s is in use by a client of the server at %s (pid %u on %s): "
                  "disconnect it first%s",
                  entry->name, run->cli->store_uri, o->address, o->pid, o->host, advice);
        return false;
    }
    run_pause(run, LEAVING_LOOK_MS);
    patience->waited_ms += LEAVING_LOOK_MS;
    return true;
}

enum status run_evict(struct run *run, const struct catalog_entry *entry)
{
    const struct owner_record *o = &entry->owner;
    struct err e = {0};
    enum status st = run_ask(run, entry, MAIL_EVICT);
    if (st != ST_UNAVAIL)
        return st;
    /* It lives and does not answer. */
    st = store_session_kill(run->store, o->session, &e);
    if (st != ST_OK)
        return fail(&run->op.err, st,
                    "the server that has volume \"%s\" in use (pid %u on %s) %s, and cannot be ended "
                    "from here: %s",
                    entry->name, o->pid, o->host,
                    run->store->limits.needs_heartbeat ? "gives signs of life but no answer"
                                                       : "does not answer",
                    run->store->limits.needs_heartbeat ? "stop it on its host"
                    : e.text[0]                        ? e.text
                                                       : status_text(e.st));
    printf("ended the server that had volume \"%s\" in use (pid %u on %s): it did not answer\n",
           entry->name, o->pid, o->host);
    return ST_NOTFOUND;
}

struct opening {
    struct volume_open open;
    bool done;
};

static void opened(struct volume_open *op)
{
    container_of(op, struct opening, open)->done = true;
}

static enum status open_volume(struct run *run, struct shard *shard,
                               const struct catalog_entry *entry, bool importing,
                               struct volume **vol)
{
    struct opening opening = {.open = {.branch = entry->branch,
                                       .epoch = entry->snapshot.epoch,
                                       .importing = importing,
                                       .done = opened}};
    snprintf(opening.open.name, sizeof opening.open.name, "%s%s%s", entry->name,
             entry->snapshot.epoch ? "@" : "",
             entry->snapshot.epoch ? entry->snapshot.rec.name : "");
    volume_open(shard, &opening.open);
    run_until(run, &opening.done);
    *vol = opening.open.vol;
    if (opening.open.st != ST_OK)
        run->op.err = opening.open.err;
    return opening.open.st;
}

enum status run_open(struct run *run, struct shard *shard, const struct catalog_entry *entry,
                     struct volume **vol)
{
    return open_volume(run, shard, entry, false, vol);
}

static void closed(void *arg)
{
    *(bool *)arg = true;
}

void run_close(struct run *run, struct volume *vol)
{
    bool done = false;
    volume_close(vol, closed, &done);
    run_until(run, &done);
}

static enum status own(struct run *run, const struct catalog_entry *entry, bool importing,
                       struct run_owned *owned)
{
    struct err *e = &run->op.err;
    memset(owned, 0, sizeof *owned);
    enum status st = session_begin(&owned->session, run->store, run->env, reactor_run_once,
                                   run->cli->lease_ms, run->cli->command->name, e);
    if (st != ST_OK) {
        owned->session.store = NULL;
        return st;
    }
    struct shard_config config = {.store = run->store,
                                  .env = run->env,
                                  .session = &owned->session,
                                  .cache_bytes = VOLUME_CACHE_BYTES_MIN,
                                  .background = run->background,
                                  .no_log = true};
    st = shard_new(&config, &owned->shard, e);
    if (st == ST_OK && entry)
        st = open_volume(run, owned->shard, entry, importing, &owned->vol);
    if (st != ST_OK)
        run_disown(run, owned);
    return st;
}

enum status run_own(struct run *run, const struct catalog_entry *entry, struct run_owned *owned)
{
    return own(run, entry, false, owned);
}

enum status run_own_marked(struct run *run, const struct catalog_entry *entry,
                           struct run_owned *owned)
{
    return own(run, entry, true, owned);
}

void run_disown(struct run *run, struct run_owned *owned)
{
    if (owned->vol)
        run_close(run, owned->vol);
    if (owned->shard)
        shard_free(owned->shard);
    if (owned->session.store)
        session_end(&owned->session, run->env, reactor_run_once);
    memset(owned, 0, sizeof *owned);
}
