/* The store whose process can die; mortal_store.h says what it is for. */
#include "mortal_store.h"

#include <stdlib.h>
#include <string.h>

#include "base/check.h"
#include "base/mem.h"
#include "base/process.h"

struct mortal {
    struct store base; /* first */
    struct list link;  /* graveyard.stores */
    struct graveyard *g;
    struct store *engine;
    struct env *env;
    bool dead, closed;
    size_t asked;  /* jobs not answered to the process */
    size_t given;  /* jobs the engine has not answered */
    struct list jobs, watches, sessions;
    struct store_reservation reserved;
    uint64_t number; /* of the process */
};

enum job_kind { JOB_READ, JOB_COMMIT, JOB_WAIT };

/* A request as the engine has it. */
struct job {
    struct list link;
    struct mortal *m;
    enum job_kind kind;
    bool given, asked, released;
    struct env_task task; /* answers the process when it died */
    struct env_work work;
    struct store_read read, *outer_read;
    struct store_get *gets;
    struct store_range *ranges;
    struct store_commit commit, *outer_commit;
    struct store_check *checks;
    struct store_mutation *mutations;
    struct store_reserve_wait wait, *outer_wait;
    uint8_t *bytes;
};

struct watching {
    struct list link;
    struct store_watch watch, *outer;
};

struct session_id {
    struct list link;
    uint8_t id[STORE_ID_BYTES];
    uint64_t number;
};

/* The world that runs now, and its newest process. Real start times are far below. */
static struct graveyard *current;
static uint64_t newest_number = 1ull << 60;

void __real_process_self(struct process_id *id);
bool __real_process_ended(const struct process_id *id);
void __wrap_process_self(struct process_id *id);
bool __wrap_process_ended(const struct process_id *id);

void __wrap_process_self(struct process_id *id)
{
    __real_process_self(id);
    if (current)
        id->start_ticks = newest_number;
}

bool __wrap_process_ended(const struct process_id *id)
{
    if (id->start_ticks < 1ull << 60)
        return __real_process_ended(id);
    if (!current || current->deaths_unknown)
        return false;
    list_for_each (l, &current->sessions)
        if (container_of(l, struct session_id, link)->number == id->start_ticks)
            return true;
    return false;
}

static struct mortal *mortal_of(struct store *store)
{
    return container_of(store, struct mortal, base);
}

static const struct mortal *mortal_of_const(const struct store *store)
{
    return (const struct mortal *)(const void *)store; /* its first member */
}

/* --- the life of a job --------------------------------------------------------------- */

static struct job *job_new(struct mortal *m, enum job_kind kind)
{
    struct job *j = mem_zalloc(sizeof *j);
    j->m = m;
    j->kind = kind;
    j->given = j->asked = true;
    j->released = kind != JOB_READ;
    m->given++;
    m->asked++;
    list_add_tail(&m->jobs, &j->link);
    return j;
}

static void mortal_settle(struct mortal *m)
{
    if (!m->closed || m->given)
        return;
    list_for_each_safe (l, next, &m->sessions) {
        struct session_id *s = container_of(l, struct session_id, link);
        store_session_end(m->engine, s->id);
        list_remove(&s->link);
        free(s);
    }
    store_close(m->engine);
    list_remove(&m->link);
    free(m);
}

static void job_settle(struct job *j)
{
    if (j->given || j->asked || !j->released)
        return;
    list_remove(&j->link);
    if (j->kind == JOB_READ)
        for (uint32_t i = 0; i < j->read.n_gets; i++)
            free(j->gets[i].body);
    free(j->gets);
    free(j->ranges);
    free(j->checks);
    free(j->mutations);
    free(j->bytes);
    free(j);
}

/* The engine's answer has come. */
static void job_returned(struct job *j)
{
    struct mortal *m = j->m;
    j->given = false;
    m->given--;
    if (j->kind == JOB_READ && j->released)
        store_read_release(&j->read);
    job_settle(j);
    mortal_settle(m);
}

static void job_answered(struct job *j)
{
    j->asked = false;
    j->m->asked--;
}

/* Puts a copy of `s` into the job's bytes. */
static struct slice keep(uint8_t **at, struct slice s)
{
    struct slice copy = {*at, s.len};
    if (s.len)
        memcpy(*at, s.data, s.len);
    *at += s.len;
    return copy;
}

/* --- reads --------------------------------------------------------------------------- */

static void read_answer(struct job *j, enum status st)
{
    struct store_read *outer = j->outer_read;
    job_answered(j);
    outer->result = st;
    outer->done(outer, st);
}

static void digest_work(struct env_work *work)
{
    struct job *j = container_of(work, struct job, work);
    j->outer_read->digest(j->outer_read);
}

static void digest_done(struct env_work *work)
{
    struct job *j = container_of(work, struct job, work);
    /* (Counted as the engine's meanwhile.) */
    j->given = false;
    j->m->given--;
    read_answer(j, j->m->dead ? ST_IO : ST_OK);
}

static void read_returned(struct store_read *read, enum status st)
{
    struct job *j = container_of(read, struct job, read);
    struct store_read *outer = j->outer_read;
    if (j->m->dead) {
        job_returned(j);
        return;
    }
    for (uint32_t i = 0; i < read->n_gets && st == ST_OK; i++) {
        const struct store_get *from = &j->gets[i];
        struct store_get *to = &outer->gets[i];
        to->st = from->st;
        to->head = from->head;
        to->body_len = from->body_len;
        if (to->body && from->st == ST_OK && from->body_len)
            memcpy(to->body, from->body, from->body_len);
    }
    for (uint32_t i = 0; i < read->n_ranges && st == ST_OK; i++) {
        outer->ranges[i].pairs = j->ranges[i].pairs;
        outer->ranges[i].n_pairs = j->ranges[i].n_pairs;
        outer->ranges[i].more = j->ranges[i].more;
    }
    if (st == ST_OK && outer->digest) {
        j->work = (struct env_work){.work = digest_work, .done = digest_done};
        env_work(j->m->env, &j->work);
        return;
    }
    j->given = false;
    j->m->given--;
    read_answer(j, st);
}

static void mortal_read_release(struct store_read *outer)
{
    struct job *j = outer->arena;
    outer->arena = NULL;
    if (!j)
        return;
    j->released = true;
    j->outer_read = NULL;
    if (!j->given && j->read.store)
        store_read_release(&j->read);
    job_settle(j);
}

static void task_died(struct env_task *task)
{
    struct job *j = container_of(task, struct job, task);
    switch (j->kind) {
    case JOB_READ:
        read_answer(j, ST_IO);
        return; /* freed with its release */
    case JOB_COMMIT:
        job_answered(j);
        j->outer_commit->done(j->outer_commit, ST_CONFLICT);
        break;
    case JOB_WAIT:
        job_answered(j);
        j->outer_wait->done(j->outer_wait, ST_NOSPC);
        break;
    }
    job_settle(j);
}

static void answer_dead(struct job *j)
{
    j->task.run = task_died;
    env_post(j->m->env, &j->task);
}

/* A job of a process that is dead: the engine never hears of it. */
static bool refused(struct job *j)
{
    if (!j->m->dead)
        return false;
    j->given = false;
    j->m->given--;
    answer_dead(j);
    return true;
}

static void mortal_read(struct store *store, struct env *env, struct store_read *outer)
{
    struct mortal *m = mortal_of(store);
    struct job *j = job_new(m, JOB_READ);
    size_t bytes = 1;
    outer->store = store;
    outer->arena = j;
    j->outer_read = outer;
    j->read = (struct store_read){.n_gets = outer->n_gets,
                                  .n_ranges = outer->n_ranges,
                                  .own = outer->own,
                                  .background = outer->background,
                                  .tag = outer->tag,
                                  .done = read_returned};
    for (uint32_t i = 0; i < outer->n_gets; i++)
        bytes += outer->gets[i].key.len;
    for (uint32_t i = 0; i < outer->n_ranges; i++)
        bytes += outer->ranges[i].begin.len + outer->ranges[i].end.len;
    uint8_t *at = j->bytes = mem_alloc(bytes);
    j->read.gets = j->gets = mem_zalloc((outer->n_gets + 1) * sizeof *j->gets);
    j->read.ranges = j->ranges = mem_zalloc((outer->n_ranges + 1) * sizeof *j->ranges);
    for (uint32_t i = 0; i < outer->n_gets; i++) {
        const struct store_get *from = &outer->gets[i];
        j->gets[i] = (struct store_get){.key = keep(&at, from->key), .body_cap = from->body_cap};
        if (from->body)
            j->gets[i].body = mem_alloc(from->body_cap + 1);
    }
    for (uint32_t i = 0; i < outer->n_ranges; i++) {
        const struct store_range *from = &outer->ranges[i];
        j->ranges[i] = (struct store_range){.begin = keep(&at, from->begin),
                                            .end = keep(&at, from->end),
                                            .limit = from->limit,
                                            .reverse = from->reverse};
    }
    if (refused(j))
        return;
    j->read.store = m->engine; /* it must be released; see mortal_read_release */
    store_read(m->engine, env, &j->read);
}

/* --- commits ------------------------------------------------------------------------- */

static void commit_returned(struct store_commit *commit, enum status st)
{
    struct job *j = container_of(commit, struct job, commit);
    struct graveyard *g = j->m->g;
    struct store_commit *outer = j->outer_commit;
    if (!j->m->dead) {
        job_answered(j);
        job_returned(j);
        outer->done(outer, st);
        return;
    }
    g->late_landed += st == ST_OK;
    g->late_refused += st == ST_CONFLICT;
    g->late_failed += st != ST_OK && st != ST_CONFLICT;
    job_returned(j);
}

static void mortal_commit(struct store *store, struct env *env, struct store_commit *outer)
{
    struct mortal *m = mortal_of(store);
    struct job *j = job_new(m, JOB_COMMIT);
    size_t bytes = 1;
    CHECK(!outer->log);
    outer->store = store;
    outer->env = env;
    j->outer_commit = outer;
    for (size_t i = 0; i < outer->n_checks; i++)
        bytes += outer->checks[i].key.len + outer->checks[i].value.len;
    for (size_t i = 0; i < outer->n_mutations; i++) {
        const struct store_mutation *mu = &outer->mutations[i];
        bytes += mu->key.len + mu->head.len + mu->body.len;
    }
    uint8_t *at = j->bytes = mem_alloc(bytes);
    j->checks = mem_zalloc((outer->n_checks + 1) * sizeof *j->checks);
    j->mutations = mem_zalloc((outer->n_mutations + 1) * sizeof *j->mutations);
    for (size_t i = 0; i < outer->n_checks; i++) {
        const struct store_check *from = &outer->checks[i];
        j->checks[i] =
            (struct store_check){from->kind, keep(&at, from->key), keep(&at, from->value)};
    }
    for (size_t i = 0; i < outer->n_mutations; i++) {
        const struct store_mutation *from = &outer->mutations[i];
        j->mutations[i] = (struct store_mutation){from->kind, keep(&at, from->key),
                                                  keep(&at, from->head), keep(&at, from->body)};
    }
    j->commit = (struct store_commit){.checks = j->checks,
                                      .mutations = j->mutations,
                                      .n_checks = outer->n_checks,
                                      .n_mutations = outer->n_mutations,
                                      .wake_watchers = outer->wake_watchers,
                                      .background = outer->background,
                                      .tag = outer->tag,
                                      .reserved = outer->reserved,
                                      .done = commit_returned};
    if (!refused(j))
        store_commit(m->engine, env, &j->commit);
}

/* --- watches ------------------------------------------------------------------------- */

static struct watching *watching_of(const struct store_watch *outer)
{
    return (struct watching *)(uintptr_t)outer->seen;
}

static void watch_fired(struct store_watch *watch)
{
    struct watching *w = container_of(watch, struct watching, watch);
    struct store_watch *outer = w->outer;
    list_remove(&w->link);
    free(w);
    outer->seen = 0;
    outer->fired(outer);
}

static void mortal_watch(struct store *store, struct env *env, struct store_watch *outer)
{
    struct mortal *m = mortal_of(store);
    outer->store = store;
    outer->env = env;
    outer->seen = 0;
    if (m->dead)
        return;
    struct watching *w = mem_zalloc(sizeof *w);
    w->outer = outer;
    w->watch = (struct store_watch){.key = outer->key, .fired = watch_fired};
    outer->seen = (uint64_t)(uintptr_t)w;
    list_add_tail(&m->watches, &w->link);
    store_watch(m->engine, env, &w->watch);
}

static void mortal_watch_stop(struct store_watch *outer)
{
    struct watching *w = watching_of(outer);
    outer->seen = 0;
    if (!w)
        return;
    store_watch_stop(&w->watch);
    list_remove(&w->link);
    free(w);
}

/* --- space --------------------------------------------------------------------------- */

static bool mortal_reserve(struct store *store, struct store_reservation want)
{
    struct mortal *m = mortal_of(store);
    if (m->dead || !store_reserve(m->engine, want))
        return false;
    m->reserved.body_bytes += want.body_bytes;
    m->reserved.keys += want.keys;
    return true;
}

static void wait_returned(struct store_reserve_wait *wait, enum status st)
{
    struct job *j = container_of(wait, struct job, wait);
    struct mortal *m = j->m;
    struct store_reserve_wait *outer = j->outer_wait;
    if (m->dead) {
        if (st == ST_OK)
            store_unreserve(m->engine, wait->want);
        job_returned(j);
        return;
    }
    if (st == ST_OK) {
        m->reserved.body_bytes += wait->want.body_bytes;
        m->reserved.keys += wait->want.keys;
    }
    job_answered(j);
    job_returned(j);
    outer->done(outer, st);
}

static void mortal_reserve_wait(struct store *store, struct env *env,
                                struct store_reserve_wait *outer)
{
    struct mortal *m = mortal_of(store);
    struct job *j = job_new(m, JOB_WAIT);
    outer->store = store;
    outer->env = env;
    j->outer_wait = outer;
    j->wait = (struct store_reserve_wait){.want = outer->want, .done = wait_returned};
    if (!refused(j))
        store_reserve_wait(m->engine, env, &j->wait);
}

static void mortal_unreserve(struct store *store, struct store_reservation what)
{
    struct mortal *m = mortal_of(store);
    if (m->dead)
        return;
    CHECK(what.body_bytes <= m->reserved.body_bytes && what.keys <= m->reserved.keys);
    m->reserved.body_bytes -= what.body_bytes;
    m->reserved.keys -= what.keys;
    store_unreserve(m->engine, what);
}

static uint64_t mortal_body_cost(const struct store *store, uint64_t len)
{
    return store_body_cost(mortal_of_const(store)->engine, len);
}

/* --- sessions ------------------------------------------------------------------------ */

static bool is_buried(const struct graveyard *g, const uint8_t id[STORE_ID_BYTES])
{
    list_for_each (l, &g->sessions)
        if (!memcmp(container_of(l, struct session_id, link)->id, id, STORE_ID_BYTES))
            return true;
    return false;
}

static struct session_id *remember(struct list *list, const uint8_t id[STORE_ID_BYTES])
{
    struct session_id *s = mem_zalloc(sizeof *s);
    memcpy(s->id, id, STORE_ID_BYTES);
    list_add_tail(list, &s->link);
    return s;
}

static enum status mortal_session_begin(struct store *store, const uint8_t id[STORE_ID_BYTES],
                                        struct err *e)
{
    struct mortal *m = mortal_of(store);
    enum status st = store_session_begin(m->engine, id, e);
    if (st == ST_OK)
        remember(&m->sessions, id);
    return st;
}

static void mortal_session_end(struct store *store, const uint8_t id[STORE_ID_BYTES])
{
    struct mortal *m = mortal_of(store);
    if (m->dead)
        return;
    list_for_each_safe (l, next, &m->sessions) {
        struct session_id *s = container_of(l, struct session_id, link);
        if (memcmp(s->id, id, STORE_ID_BYTES) != 0)
            continue;
        list_remove(&s->link);
        free(s);
    }
    store_session_end(m->engine, id);
}

static enum store_liveness mortal_session_probe(struct store *store,
                                                const uint8_t id[STORE_ID_BYTES])
{
    struct mortal *m = mortal_of(store);
    if (!m->g->deaths_unknown && is_buried(m->g, id))
        return STORE_SESSION_DEAD;
    return store_session_probe(m->engine, id);
}

static enum status mortal_session_kill(struct store *store, const uint8_t id[STORE_ID_BYTES],
                                       struct err *e)
{
    return store_session_kill(mortal_of(store)->engine, id, e);
}

/* --- the rest ------------------------------------------------------------------------ */

static enum status mortal_info(struct store *store, struct store_info *info, struct err *e)
{
    return store_info(mortal_of(store)->engine, info, e);
}

static enum status mortal_usage(struct store *store, struct slice begin, struct slice end,
                                uint64_t *keys, uint64_t *bytes, struct err *e)
{
    return store_usage(mortal_of(store)->engine, begin, end, keys, bytes, e);
}

static void mortal_close(struct store *store)
{
    struct mortal *m = mortal_of(store);
    CHECK(!m->asked && list_empty(&m->watches));
    CHECK(m->dead || (!m->reserved.body_bytes && !m->reserved.keys));
    m->closed = true;
    mortal_settle(m);
}

static const struct store_ops ops = {
    .close = mortal_close,
    .read = mortal_read,
    .read_release = mortal_read_release,
    .commit = mortal_commit,
    .watch = mortal_watch,
    .watch_stop = mortal_watch_stop,
    .reserve = mortal_reserve,
    .reserve_wait = mortal_reserve_wait,
    .unreserve = mortal_unreserve,
    .body_cost = mortal_body_cost,
    .session_begin = mortal_session_begin,
    .session_end = mortal_session_end,
    .session_probe = mortal_session_probe,
    .session_kill = mortal_session_kill,
    .info = mortal_info,
    .usage = mortal_usage,
};

struct store *mortal_store_new(struct graveyard *g, struct store *engine, struct env *env)
{
    CHECK(!engine->limits.has_log);
    struct mortal *m = mem_zalloc(sizeof *m);
    m->base.ops = &ops;
    m->base.limits = engine->limits;
    m->g = g;
    m->engine = engine;
    m->env = env;
    list_init(&m->jobs);
    list_init(&m->watches);
    list_init(&m->sessions);
    list_add_tail(&g->stores, &m->link);
    m->number = ++newest_number;
    return &m->base;
}

void mortal_store_kill(struct store *store)
{
    struct mortal *m = mortal_of(store);
    CHECK(!m->dead);
    m->dead = true;
    m->g->deaths++;
    list_for_each_safe (l, next, &m->watches) {
        struct watching *w = container_of(l, struct watching, link);
        mortal_watch_stop(w->outer);
    }
    list_for_each (l, &m->sessions)
        remember(&m->g->sessions, container_of(l, struct session_id, link)->id)->number = m->number;
    store_unreserve(m->engine, m->reserved);
    m->reserved = (struct store_reservation){0, 0};
    list_for_each (l, &m->jobs) {
        struct job *j = container_of(l, struct job, link);
        /* A read that is being digested, or was answered and not released, goes on. */
        if (!j->asked || !j->given || (j->kind == JOB_READ && j->work.work))
            continue;
        if (j->kind == JOB_READ)
            j->outer_read->result = ST_IO;
        answer_dead(j);
    }
}

void graveyard_init(struct graveyard *g)
{
    *g = (struct graveyard){0};
    list_init(&g->stores);
    list_init(&g->sessions);
    current = g;
}

bool graveyard_is_quiet(const struct graveyard *g)
{
    list_for_each (l, &g->stores)
        if (container_of(l, struct mortal, link)->dead)
            return false;
    return true;
}

void graveyard_destroy(struct graveyard *g)
{
    CHECK(list_empty(&g->stores));
    if (current == g)
        current = NULL;
    list_for_each_safe (l, next, &g->sessions) {
        struct session_id *s = container_of(l, struct session_id, link);
        list_remove(&s->link);
        free(s);
    }
}
