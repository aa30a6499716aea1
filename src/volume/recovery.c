#include "volume/recovery.h"

#include <stdlib.h>

#include "volume/catalog.h"
#include "volume/internal.h"

#define SESSIONS_MAX 4096u
#define CLEARS_PER_SWEEP 100u

struct recover {
    struct recovery *op;
    struct shard *shard;
    struct catalog_op list;
    struct catalog_entry *entries;
    size_t n_entries, at;
    struct volume_open open;
    struct volume *vol;
    struct vol_io sync;
    struct key begin, end;
    struct store_range range;
    struct store_read read;
    struct store_mutation *clears;
    struct key *keys;
    size_t n_clears;
    struct store_commit commit;
    uint64_t *needed;
    size_t n_needed, cap_needed;
    struct env_work work;
    struct err err;
    enum status st;
    struct session_sweep sweep;
};

static void next_volume(struct recover *r);

static void finish(struct recover *r, enum status st)
{
    struct recovery *op = r->op;
    op->st = st;
    op->err = r->err;
    free(r->entries);
    free(r->clears);
    free(r->keys);
    free(r->needed);
    free(r);
    op->done(op);
}

static bool owner_dead(const struct recover *r, const struct owner_record *o)
{
    static const uint8_t none[SESSION_ID_BYTES];
    const struct shard *s = r->shard;
    return memcmp(o->session, none, sizeof none) != 0 &&
           memcmp(o->session, s->session->id, SESSION_ID_BYTES) != 0 &&
           store_session_probe(s->store, o->session) == STORE_SESSION_DEAD;
}

static void logs_removed(struct env_work *work)
{
    struct recover *r = container_of(work, struct recover, work);
    if (r->st != ST_OK)
        log_warning("write logs of ended servers stay: %s", r->err.text);
    finish(r, ST_OK);
}

static void remove_logs(struct env_work *work)
{
    struct recover *r = container_of(work, struct recover, work);
    r->st = store_log_remove_unused(r->shard->store, r->needed, r->n_needed, &r->err);
}

static void needed_listed(struct catalog_op *op)
{
    struct recover *r = container_of(op, struct recover, list);
    if (op->st != ST_OK || !r->shard->store->limits.has_log) {
        enum status st = op->st;
        r->err = op->err;
        catalog_op_free(op);
        finish(r, st);
        return;
    }
    for (size_t i = 0; i < op->n_entries; i++) {
        const struct state_record *st = &op->entries[i].state;
        for (uint32_t k = 0; k < st->n_logs; k++) {
            mem_grow(&r->needed, &r->cap_needed, r->n_needed + 1, sizeof *r->needed);
            r->needed[r->n_needed++] = st->logs[k].log_id;
        }
    }
    catalog_op_free(op);
    r->work.work = remove_logs;
    r->work.done = logs_removed;
    env_work(r->shard->env, &r->work);
}

static void sessions_cleared(struct store_commit *commit, enum status st)
{
    struct recover *r = container_of(commit, struct recover, commit);
    if (st == ST_OK)
        r->op->sessions = (unsigned)r->n_clears;
    /* Which logs are still needed must be asked after the sessions were found dead: dead ones
     * add none. */
    r->list = (struct catalog_op){.done = needed_listed};
    catalog_list(&r->list, r->shard->store, r->shard->env);
}

static void sessions_read(struct store_read *read, enum status st)
{
    struct recover *r = container_of(read, struct recover, read);
    struct shard *s = r->shard;
    uint32_t n = st == ST_OK ? r->range.n_pairs : 0;
    r->clears = mem_zalloc((n + 1) * sizeof *r->clears);
    r->keys = mem_zalloc((n + 1) * sizeof *r->keys);
    for (uint32_t i = 0; i < n; i++) {
        uint8_t id[SESSION_ID_BYTES];
        struct slice key = r->range.pairs[i].key;
        if (!key_parse_session(key, id) || !memcmp(id, s->session->id, sizeof id) ||
            store_session_probe(s->store, id) != STORE_SESSION_DEAD)
            continue;
        key_session(&r->keys[r->n_clears], id);
        r->clears[r->n_clears] = (struct store_mutation){
            .kind = STORE_CLEAR, .key = key_slice(&r->keys[r->n_clears])};
        r->n_clears++;
    }
    store_read_release(read);
    r->commit = (struct store_commit){
        .mutations = r->clears, .n_mutations = r->n_clears, .done = sessions_cleared};
    store_commit(s->store, s->env, &r->commit);
}

static void clear_sessions(struct recover *r)
{
    key_prefix(&r->begin, 's');
    r->end = r->begin;
    key_prefix_end(&r->end);
    r->range = (struct store_range){
        .begin = key_slice(&r->begin), .end = key_slice(&r->end), .limit = SESSIONS_MAX};
    r->read = (struct store_read){.ranges = &r->range, .n_ranges = 1, .done = sessions_read};
    store_read(r->shard->store, r->shard->env, &r->read);
}

static void volume_closed(void *arg)
{
    next_volume(arg);
}

static void volume_taken(struct vol_io *io)
{
    struct recover *r = container_of(io, struct recover, sync);
    if (io->st == ST_OK)
        r->op->volumes++;
    volume_close(r->vol, volume_closed, r);
}

static void volume_opened(struct volume_open *open)
{
    struct recover *r = container_of(open, struct recover, open);
    if (open->st != ST_OK) {
        log_error("%s", open->err.text);
        next_volume(r);
        return;
    }
    r->vol = open->vol;
    r->sync = (struct vol_io){.done = volume_taken};
    volume_sync(r->vol, &r->sync);
}

static void next_volume(struct recover *r)
{
    while (r->at < r->n_entries) {
        const struct catalog_entry *e = &r->entries[r->at++];
        if (!owner_dead(r, &e->owner))
            continue;
        r->open = (struct volume_open){.branch = e->branch, .done = volume_opened};
        memcpy(r->open.name, e->name, sizeof e->name);
        volume_open(r->shard, &r->open);
        return;
    }
    clear_sessions(r);
}

static void volumes_listed(struct catalog_op *op)
{
    struct recover *r = container_of(op, struct recover, list);
    enum status st = op->st;
    r->err = op->err;
    r->entries = op->entries;
    r->n_entries = op->n_entries;
    op->entries = NULL;
    op->n_entries = 0;
    catalog_op_free(op);
    if (st != ST_OK)
        finish(r, st);
    else
        next_volume(r);
}

static void swept(struct session_sweep *sweep)
{
    struct recover *r = container_of(sweep, struct recover, sweep);
    r->op->sessions = sweep->n_cleared;
    session_sweep_free(sweep);
    finish(r, ST_OK);
}

void recover_dead_sessions(struct recovery *op, struct shard *shard)
{
    struct recover *r = mem_zalloc(sizeof *r);
    op->volumes = op->sessions = 0;
    op->err.text[0] = 0;
    r->op = op;
    r->shard = shard;
    if (shard->session->timed) {
        r->sweep.done = swept;
        session_sweep_run(&r->sweep, shard->session);
        return;
    }
    r->list = (struct catalog_op){.done = volumes_listed};
    catalog_list(&r->list, shard->store, shard->env);
}

/* --- sweeping ---------------------------------------------------------------------------- */

static void sweep_finish(struct session_sweep *w, unsigned n_cleared)
{
    free(w->checks);
    free(w->clears);
    w->checks = NULL;
    w->clears = NULL;
    w->n_cleared = n_cleared;
    w->done(w);
}

/* Where one of them changed after all, none is cleared, and the next sweep tries again. */
static void sweep_cleared(struct store_commit *commit, enum status st)
{
    struct session_sweep *w = container_of(commit, struct session_sweep, commit);
    sweep_finish(w, st == ST_OK ? (unsigned)w->n_clears : 0);
}

static struct session_sight *sight_of(struct session_sweep *w, size_t n_before,
                                      const uint8_t id[SESSION_ID_BYTES])
{
    struct key key;
    key_session(&key, id);
    for (size_t i = 0; i < n_before; i++)
        if (!memcmp(w->sights[i].key.bytes, key.bytes, key.len))
            return &w->sights[i];
    return NULL;
}

static void sweep_read(struct store_read *read, enum status st)
{
    struct session_sweep *w = container_of(read, struct session_sweep, read);
    struct session *s = w->session;
    uint32_t n = st == ST_OK ? w->range.n_pairs : 0;
    size_t n_sights = 0, n_before = w->n_sights;
    struct session_sight *sights = mem_zalloc((n + 1) * sizeof *sights);
    w->checks = mem_zalloc((n + 1) * sizeof *w->checks);
    w->clears = mem_zalloc((n + 1) * sizeof *w->clears);
    w->n_checks = w->n_clears = 0;
    w->n_suspects = 0;
    for (uint32_t i = 0; i < n; i++) {
        uint8_t id[SESSION_ID_BYTES];
        const struct store_pair *pair = &w->range.pairs[i];
        struct store_get get = {.key = pair->key, .st = ST_OK, .head = pair->head};
        if (!key_parse_session(pair->key, id) || !memcmp(id, s->id, sizeof id))
            continue;
        struct session_sight *sight = &sights[n_sights++];
        const struct session_sight *before = sight_of(w, n_before, id);
        if (before)
            *sight = *before;
        session_sight_begin(sight, id);
        enum session_verdict verdict = session_judge(sight, &get, s->env, s->host);
        if (verdict == SESSION_MAYBE)
            w->n_suspects += session_is_suspect(sight);
        if (verdict == SESSION_MAYBE || w->n_clears == CLEARS_PER_SWEEP)
            continue;
        /* No record says the same as a fenced one: what it owned is free. */
        w->clears[w->n_clears++] =
            (struct store_mutation){.kind = STORE_CLEAR, .key = key_slice(&sight->key)};
        w->checks[w->n_checks++] = (struct store_check){.kind = STORE_CHECK_VALUE,
                                                        .key = key_slice(&sight->key),
                                                        .value = {sight->bytes, sight->len}};
    }
    store_read_release(read);
    free(w->sights);
    w->sights = sights;
    w->n_sights = n_sights;
    if (!w->n_clears) {
        sweep_finish(w, 0);
        return;
    }
    w->commit = (struct store_commit){.checks = w->checks,
                                      .n_checks = w->n_checks,
                                      .mutations = w->clears,
                                      .n_mutations = w->n_clears,
                                      .wake_watchers = true,
                                      .reserved = true,
                                      .background = true,
                                      .done = sweep_cleared};
    store_commit(s->store, s->env, &w->commit);
}

void session_sweep_run(struct session_sweep *w, struct session *session)
{
    w->session = session;
    key_prefix(&w->begin, 's');
    w->end = w->begin;
    key_prefix_end(&w->end);
    w->range = (struct store_range){
        .begin = key_slice(&w->begin), .end = key_slice(&w->end), .limit = SESSIONS_MAX};
    w->read = (struct store_read){
        .ranges = &w->range, .n_ranges = 1, .background = true, .done = sweep_read};
    store_read(session->store, session->env, &w->read);
}

void session_sweep_free(struct session_sweep *w)
{
    free(w->sights);
    w->sights = NULL;
    w->n_sights = 0;
}
