/*
 * The session: registering this process with the engine and in the store, and
 * showing that it lives where the store needs that.
 *
 * With the engine first: by the time others can read the record, the engine can tell
 * them whether we live. Ended in the opposite order, so that a record is never there
 * without somebody who can be asked about it, short of a crash, after which the engine
 * says "dead", or the record stands still.
 */
#include "volume/session.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/check.h"
#include "base/log.h"
#include "base/mem.h"

#define NS_PER_MS 1000000u
/* Two heartbeats may be late or fail before the third would come too late. */
#define BEATS_PER_LEASE 3u
/* How often a new incarnation is tried again whose record can't be written. */
#define BEGIN_AGAIN_MS 1000u
/* What a challenger waits beyond the lease: an eighth of it, because clocks run at nearly the
 * same rate only, and a moment for timers that come late. */
#define MARGIN_PART 8u
#define MARGIN_MS 100u
/* Looks that lie this near to each other count, however short a lease is. (Shorter ones than twice
 * this are for tests.) */
#define LOOKS_APART_MS_MAX (2 * SESSION_LOOK_MS)
/* A record that can't be read does not say its lease: the longest there is. */
#define LEASE_MS_UNKNOWN 600000u

/* Tasks may still lie in the queue of a reactor that stopped when the member has left, and even
 * when the session is gone: so it lives until the last of them ran. */
struct session_member {
    struct list link;
    struct session *session;
    struct env *env;
    unsigned (*lost)(void *arg);
    void (*begun)(void *arg);
    void *arg;
    bool left;    /* set while no reactor runs */
    bool holding; /* home: it has not let go */
    unsigned n_volumes;
    atomic_uint posted;
    atomic_bool noticed;
    struct env_task lose_task, gone_task, begin_task, notice_task;
};

static void tick(struct env_timer *timer);
static void beat(struct session *s);
static void begin_again(struct session *s);

/* --- the first record, and the last ------------------------------------------------- */

struct written {
    struct store_commit commit;
    bool done;
    enum status st;
};

static void written_done(struct store_commit *commit, enum status st)
{
    struct written *w = container_of(commit, struct written, commit);
    w->done = true;
    w->st = st;
}

static enum status write_one(struct store *store, struct env *env,
                             void (*run_once)(struct env *env), const struct store_check *check,
                             const struct store_mutation *mutation)
{
    struct written w = {.commit = {.checks = check,
                                   .mutations = mutation,
                                   .n_checks = check ? 1 : 0,
                                   .n_mutations = 1,
                                   .wake_watchers = true,
                                   .done = written_done}};
    store_commit(store, env, &w.commit);
    while (!w.done)
        run_once(env);
    return w.st;
}

void session_host_name(char host[HOST_BYTES_MAX + 1])
{
    /* A longer name than fits, here or from the system, is cut. */
    if (gethostname(host, HOST_BYTES_MAX + 1) != 0)
        snprintf(host, HOST_BYTES_MAX + 1, "unknown");
    host[HOST_BYTES_MAX] = '\0';
}

static uint64_t lease_ns(const struct session *s)
{
    return (uint64_t)s->lease_ms * NS_PER_MS;
}

/* When home looks again: for the next heartbeat, or the end of the lease where that is sooner. */
static void tick_at(struct session *s, uint64_t at_ns)
{
    uint64_t until = atomic_load(&s->valid_until_ns), now = env_now_ns(s->env);
    if (until < at_ns)
        at_ns = until;
    env_timer_start(s->env, &s->timer, at_ns > now ? (at_ns - now) / NS_PER_MS + 1 : 0);
}

static uint64_t beat_ns(const struct session *s)
{
    return lease_ns(s) / BEATS_PER_LEASE;
}

static void read_environment(struct session *s)
{
    const char *skip = getenv("FDB_NBD_TEST_SKIP_LEASE");
    s->skip_lease = s->timed && skip && strcmp(skip, "1") == 0;
    if (s->skip_lease)
        log_warning("FDB_NBD_TEST_SKIP_LEASE=1: THIS PROCESS TAKES VOLUMES FROM SERVERS THAT LIVE, "
                    "which cuts off their clients; for tests only, unset it everywhere else");
}

enum status session_begin(struct session *s, struct store *store, struct env *env,
                          void (*run_once)(struct env *env), uint32_t lease_ms, const char *address,
                          struct err *e)
{
    *s = (struct session){.store = store,
                          .env = env,
                          .lease_ms = lease_ms,
                          .pid = (uint32_t)getpid(),
                          .timed = store->limits.needs_heartbeat,
                          .timer = {.fire = tick}};
    /* A log may be replayed only when its writer is known to be dead, not just silent. */
    CHECK(!s->timed || !store->limits.has_log);
    list_init(&s->members);
    env_random(env, s->id, sizeof s->id);
    session_host_name(s->host);
    snprintf(s->address, sizeof s->address, "%s", address);
    read_environment(s);

    enum status st = store_session_begin(store, s->id, e);
    if (st != ST_OK)
        return st;

    s->rec = (struct session_record){.state = SESSION_LIVE,
                                     .counter = 1,
                                     .lease_ms = lease_ms,
                                     .started_ns = env_realtime_ns(env)};
    process_self(&s->rec.process);
    memcpy(s->rec.host, s->host, sizeof s->rec.host);
    memcpy(s->rec.address, s->address, sizeof s->rec.address);
    key_session(&s->key, s->id);
    s->len = session_encode(&s->rec, key_slice(&s->key), s->bytes);
    struct store_check absent = {.kind = STORE_CHECK_ABSENT, .key = key_slice(&s->key)};
    struct store_mutation set = {
        .kind = STORE_SET, .key = key_slice(&s->key), .head = {s->bytes, s->len}};
    s->sent_ns = env_now_ns(env);
    st = write_one(store, env, run_once, &absent, &set);
    if (st != ST_OK) {
        store_session_end(store, s->id);
        struct store_info info;
        if (store_info(store, &info, NULL) != ST_OK)
            snprintf(info.uri, sizeof info.uri, "the store");
        return fail(e, st, "cannot register this process in %s: %s", info.uri, status_text(st));
    }
    if (s->timed) {
        atomic_store(&s->valid_until_ns, s->sent_ns + lease_ns(s));
        tick_at(s, s->sent_ns + beat_ns(s));
    }
    return ST_OK;
}

void session_stop(struct session *s)
{
    s->stopped = true;
    env_timer_stop(s->env, &s->timer);
}

void session_end(struct session *s, struct env *env, void (*run_once)(struct env *env))
{
    CHECK(list_empty(&s->members));
    session_stop(s);
    while (s->committing)
        run_once(env);
    struct store_mutation clear = {.kind = STORE_CLEAR, .key = key_slice(&s->key)};
    /* A record that can't be removed is one of a dead session from now on; whoever comes
     * next clears it. */
    write_one(s->store, env, run_once, NULL, &clear);
    store_session_end(s->store, s->id);
}

/* --- members ------------------------------------------------------------------------ */

static void member_free(struct session_member *m)
{
    if (m->left && atomic_load(&m->posted) == 0)
        free(m);
}

static void post(struct session_member *m, struct env *env, struct env_task *task,
                 void (*run)(struct env_task *task))
{
    task->run = run;
    atomic_fetch_add(&m->posted, 1);
    env_post(env, task);
}

/* A task of a member began to run; false where there is nothing left to be done. */
static bool arrived(struct session_member *m)
{
    atomic_fetch_sub(&m->posted, 1);
    if (!m->left)
        return true;
    member_free(m);
    return false;
}

struct session_member *session_join(struct session *s, struct env *env,
                                    unsigned (*lost)(void *arg), void (*begun)(void *arg),
                                    void *arg)
{
    struct session_member *m = mem_zalloc(sizeof *m);
    CHECK(s->timed);
    m->session = s;
    m->env = env;
    m->lost = lost;
    m->begun = begun;
    m->arg = arg;
    list_add_tail(&s->members, &m->link);
    return m;
}

static void let_go(struct session_member *m)
{
    struct session *s = m->session;
    if (!m->holding)
        return;
    m->holding = false;
    s->n_holding--;
    s->n_volumes_lost += m->n_volumes;
    if (s->stage == SESSION_LETTING_GO && !s->n_holding && !s->committing)
        begin_again(s);
}

void session_leave(struct session_member *m)
{
    list_remove(&m->link);
    m->n_volumes = 0;
    let_go(m);
    m->left = true;
    member_free(m);
}

static void member_let_go(struct env_task *task)
{
    struct session_member *m = container_of(task, struct session_member, gone_task);
    if (arrived(m))
        let_go(m);
}

static void member_loses(struct env_task *task)
{
    struct session_member *m = container_of(task, struct session_member, lose_task);
    if (!arrived(m))
        return;
    m->n_volumes = m->lost(m->arg);
    post(m, m->session->env, &m->gone_task, member_let_go);
}

static void member_begins(struct env_task *task)
{
    struct session_member *m = container_of(task, struct session_member, begin_task);
    if (arrived(m))
        m->begun(m->arg);
}

static void noticed(struct env_task *task)
{
    struct session_member *m = container_of(task, struct session_member, notice_task);
    if (!arrived(m))
        return;
    atomic_store(&m->noticed, false);
    if (!m->session->stopped && m->session->stage == SESSION_ON)
        tick(&m->session->timer);
}

void session_notice(struct session_member *m)
{
    if (!atomic_exchange(&m->noticed, true))
        post(m, m->session->env, &m->notice_task, noticed);
}

/* --- heartbeats --------------------------------------------------------------------- */

/* The incarnation is over. */
static void end_incarnation(struct session *s, const char *why)
{
    atomic_store(&s->valid_until_ns, 0);
    atomic_fetch_add(&s->n_ended, 1);
    s->stage = SESSION_LETTING_GO;
    snprintf(s->why, sizeof s->why, "%s", why);
    s->n_holding = s->n_volumes_lost = 0;
    env_timer_stop(s->env, &s->timer);
    list_for_each (l, &s->members) {
        struct session_member *m = container_of(l, struct session_member, link);
        m->holding = true;
        s->n_holding++;
        post(m, m->env, &m->lose_task, member_loses);
    }
    if (!s->n_holding && !s->committing)
        begin_again(s);
}

/* From now on nothing is answered, until a heartbeat tells. */
static void doubt(struct session *s)
{
    if (s->stage == SESSION_IN_DOUBT)
        return;
    s->stage = SESSION_IN_DOUBT;
    log_warning("the store took no heartbeat of this server for %u ms: its clients wait until one "
                "tells whether others have taken its volumes",
                s->lease_ms);
}

/* A heartbeat succeeded: it holds again, or still. Counted from the sending: the commit happened
 * at some time after that, and others count from when they saw it. */
static void extend(struct session *s)
{
    uint64_t until = s->sent_ns + lease_ns(s);
    if (env_now_ns(s->env) >= until) {
        /* Nobody has fenced it, but the answer took a lease to come. */
        doubt(s);
        beat(s);
        return;
    }
    atomic_store(&s->valid_until_ns, until);
    if (s->stage == SESSION_IN_DOUBT) {
        s->stage = SESSION_ON;
        log_info("this server goes on: nobody took its volumes meanwhile");
    }
    tick_at(s, s->sent_ns + beat_ns(s));
}

static void beat_answered(struct store_commit *commit, enum status st)
{
    struct session *s = container_of(commit, struct session, commit);
    s->committing = false;
    if (s->stopped)
        return;
    if (s->stage == SESSION_LETTING_GO) {
        if (!s->n_holding)
            begin_again(s);
        return;
    }
    if (st == ST_CONFLICT) {
        end_incarnation(s, "others took its silence for its end and fenced it");
        return;
    }
    if (st == ST_OK) {
        s->rec.counter++;
        s->len = s->next_len;
        memcpy(s->bytes, s->next_bytes, s->len);
        extend(s);
        return;
    }
    log_warning("a heartbeat of this server failed: %s; it is tried again", status_text(st));
    env_timer_start(s->env, &s->timer, beat_ns(s) / 4 / NS_PER_MS + 1);
}

static void beat(struct session *s)
{
    struct session_record next = s->rec;
    next.counter++;
    s->next_len = session_encode(&next, key_slice(&s->key), s->next_bytes);
    s->check = (struct store_check){
        .kind = STORE_CHECK_VALUE, .key = key_slice(&s->key), .value = {s->bytes, s->len}};
    s->mutations[0] = (struct store_mutation){
        .kind = STORE_SET, .key = key_slice(&s->key), .head = {s->next_bytes, s->next_len}};
    s->commit = (struct store_commit){.checks = &s->check,
                                      .n_checks = 1,
                                      .mutations = s->mutations,
                                      .n_mutations = 1,
                                      .reserved = true,
                                      .done = beat_answered};
    s->committing = true;
    s->sent_ns = env_now_ns(s->env);
    store_commit(s->store, s->env, &s->commit);
}

static void tick(struct env_timer *timer)
{
    struct session *s = container_of(timer, struct session, timer);
    if (s->stage == SESSION_BEGINNING) {
        begin_again(s);
        return;
    }
    bool holds = session_holds(s, s->env);
    if (!holds)
        doubt(s);
    /* One at a time: what became of the last one must be known before the next. */
    if (!s->committing)
        beat(s);
    if (holds)
        tick_at(s, UINT64_MAX);
}

/* --- a new incarnation -------------------------------------------------------------- */

static void begun_again(struct store_commit *commit, enum status st)
{
    struct session *s = container_of(commit, struct session, commit);
    s->committing = false;
    if (st != ST_OK) {
        store_session_end(s->store, s->next_id);
        if (s->stopped)
            return;
        log_warning("this server can't register again: %s; trying again", status_text(st));
        env_timer_start(s->env, &s->timer, BEGIN_AGAIN_MS);
        return;
    }
    store_session_end(s->store, s->id);
    memcpy(s->id, s->next_id, sizeof s->id);
    s->key = s->next_key;
    s->len = s->next_len;
    memcpy(s->bytes, s->next_bytes, s->len);
    s->rec.counter = 1;
    if (s->stopped)
        return;
    if (env_now_ns(s->env) >= s->sent_ns + lease_ns(s)) {
        /* The store took longer than the lease: nobody need rely on this one. */
        begin_again(s);
        return;
    }
    atomic_store(&s->valid_until_ns, s->sent_ns + lease_ns(s));
    s->stage = SESSION_ON;
    log_info("this server goes on under a new session");
    list_for_each (l, &s->members) {
        struct session_member *m = container_of(l, struct session_member, link);
        post(m, m->env, &m->begin_task, member_begins);
    }
    tick_at(s, s->sent_ns + beat_ns(s));
}

/* All have let go of the old incarnation: takes its record away, whatever it says by now, and
 * writes one for the new. */
static void begin_again(struct session *s)
{
    struct err e = {0};
    if (s->stopped)
        return;
    if (s->stage == SESSION_LETTING_GO)
        log_error("the session of this server ended: %s. %u volume%s it owned %s given up, their "
                  "connections closed without answers (%llu sessions of it ended so by now)",
                  s->why, s->n_volumes_lost, s->n_volumes_lost == 1 ? "" : "s",
                  s->n_volumes_lost == 1 ? "was" : "were",
                  (unsigned long long)atomic_load(&s->n_ended));
    s->stage = SESSION_BEGINNING;
    env_random(s->env, s->next_id, sizeof s->next_id);
    if (store_session_begin(s->store, s->next_id, &e) != ST_OK) {
        log_warning("this server can't register again: %s; trying again", e.text);
        env_timer_start(s->env, &s->timer, BEGIN_AGAIN_MS);
        return;
    }
    struct session_record next = s->rec;
    next.counter = 1;
    next.started_ns = env_realtime_ns(s->env);
    key_session(&s->next_key, s->next_id);
    s->next_len = session_encode(&next, key_slice(&s->next_key), s->next_bytes);
    s->check =
        (struct store_check){.kind = STORE_CHECK_ABSENT, .key = key_slice(&s->next_key)};
    s->mutations[0] =
        (struct store_mutation){.kind = STORE_CLEAR, .key = key_slice(&s->key)};
    s->mutations[1] = (struct store_mutation){
        .kind = STORE_SET, .key = key_slice(&s->next_key), .head = {s->next_bytes, s->next_len}};
    s->commit = (struct store_commit){.checks = &s->check,
                                      .n_checks = 1,
                                      .mutations = s->mutations,
                                      .n_mutations = 2,
                                      .reserved = true,
                                      .done = begun_again};
    s->committing = true;
    s->sent_ns = env_now_ns(s->env);
    store_commit(s->store, s->env, &s->commit);
}

/* --- the sessions of others --------------------------------------------------------- */

void session_sight_begin(struct session_sight *sight, const uint8_t id[SESSION_ID_BYTES])
{
    struct key key;
    key_session(&key, id);
    if (sight->key.len == key.len && !memcmp(sight->key.bytes, key.bytes, key.len))
        return;
    sight->key = key;
    sight->len = 0;
    sight->n_changes = 0;
    sight->readable = false;
}

static uint64_t lease_ms_of(const struct session_sight *sight)
{
    return sight->readable ? sight->rec.lease_ms : LEASE_MS_UNKNOWN;
}

uint64_t session_silence_ns(const struct session_sight *sight)
{
    uint64_t lease_ms = lease_ms_of(sight);
    return (lease_ms + lease_ms / MARGIN_PART + MARGIN_MS) * NS_PER_MS;
}

uint64_t session_silence_left_ns(const struct session_sight *sight)
{
    uint64_t all = session_silence_ns(sight);
    return sight->silent_ns < all ? all - sight->silent_ns : 0;
}

bool session_is_suspect(const struct session_sight *sight)
{
    return sight->looked_ns - sight->since_ns >= lease_ms_of(sight) * NS_PER_MS;
}

enum session_verdict session_judge(struct session_sight *sight, const struct store_get *get,
                                   struct env *env, const char *here)
{
    if (get->st == ST_NOTFOUND)
        return SESSION_ENDED;
    if (get->st != ST_OK || get->head.len > sizeof sight->bytes)
        return SESSION_MAYBE;
    /* The read was answered just now and the record committed before that: it can't have been
     * sent later than this. */
    uint64_t now = env_now_ns(env);
    if (sight->len != get->head.len || memcmp(sight->bytes, get->head.data, sight->len) != 0) {
        sight->n_changes += sight->len != 0;
        sight->len = get->head.len;
        memcpy(sight->bytes, get->head.data, sight->len);
        sight->since_ns = now;
        sight->silent_ns = 0;
        sight->readable = session_decode(key_slice(&sight->key), get->head, &sight->rec);
    } else if (now - sight->looked_ns <=
               max_u64(lease_ms_of(sight) / 2, LOOKS_APART_MS_MAX) * NS_PER_MS) {
        sight->silent_ns += now - sight->looked_ns;
    }
    sight->looked_ns = now;
    if (sight->readable && sight->rec.state == SESSION_FENCED)
        return SESSION_ENDED;
    /* (Copies of one virtual machine share a boot, but hardly a name.) */
    if (sight->readable && !strcmp(sight->rec.host, here) && process_ended(&sight->rec.process))
        return SESSION_GONE;
    return session_silence_left_ns(sight) ? SESSION_MAYBE : SESSION_SILENT;
}

size_t session_fenced_bytes(const struct session_sight *sight, uint8_t out[RECORD_BYTES_MAX])
{
    struct session_record rec = sight->rec;
    if (!sight->readable)
        memset(&rec, 0, sizeof rec);
    rec.state = SESSION_FENCED;
    return session_encode(&rec, key_slice(&sight->key), out);
}
