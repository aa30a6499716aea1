/*
 * What double.h promises.
 */
#include "inside.h"

#include <stdio.h>
#include <stdlib.h>
#include <time.h>

static const char default_health[] =
    "{\"batch_limited\":false,\"limiting_storage_durability_lag\":5000000,"
    "\"limiting_storage_queue\":1000000,\"tps_limit\":100000.0,\"worst_log_queue\":1000000,"
    "\"worst_storage_durability_lag\":5000000,\"worst_storage_queue\":1000000}";

static void health_set(const char *json)
{
    free(g.health);
    g.health = mem_strdup(json);
}

static void config_default(void)
{
    int64_t api = g.api_selected ? g.config.api : 730;
#define X(name, value) g.config.name = value;
    FDB_DOUBLE_CONFIG(X)
#undef X
    g.config.api = api;
    g.random = (uint64_t)g.config.seed;
}

void config_changed(void)
{
    events_release_held();
    pthread_cond_signal(&g.work);
}

bool config_set_by_name(const char *name, size_t len, int64_t value)
{
#define X(field, unused)                                                                           \
    if (len == sizeof #field - 1 && memcmp(name, #field, len) == 0) {                              \
        g.config.field = value;                                                                    \
        if (&g.config.field == &g.config.seed)                                                     \
            g.random = (uint64_t)value;                                                            \
        return true;                                                                               \
    }
    FDB_DOUBLE_CONFIG(X)
#undef X
    return false;
}

static bool set_many_locked(const char *text)
{
    bool all = true;
    while (*text) {
        size_t len = strcspn(text, ",");
        const char *equals = memchr(text, '=', len);
        if (equals)
            all &= config_set_by_name(text, (size_t)(equals - text), strtoll(equals + 1, NULL, 0));
        else
            all &= len == 0;
        text += len + (text[len] == ',');
    }
    return all;
}

__attribute__((constructor)) static void load(void)
{
    pthread_condattr_t monotonic;
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(&g.work, &monotonic);
    pthread_condattr_destroy(&monotonic);
    config_default();
    health_set(default_health);
    g.version_base = 100000000;
    g.version_base_ns = now_ns();
    g.version_last = g.version_oldest = g.version_forgot = g.version_base;
    const char *env = getenv("FDB_DOUBLE");
    if (env && !set_many_locked(env))
        fprintf(stderr, "FDB_DOUBLE has a name that is not known: %s\n", env);
}

/* --- settings and counters ------------------------------------------------------------- */

static void control_reset(void)
{
    lock();
    config_default();
    cluster_reset();
    health_set(default_health);
    struct fdb_double_counts old = g.counts;
    g.counts = (struct fdb_double_counts){
        .futures_alive = old.futures_alive,
        .transactions_alive = old.transactions_alive,
        .databases_alive = old.databases_alive,
        .watches_alive = old.watches_alive,
        .bytes_held = old.bytes_held,
    };
    g.violation[0] = 0;
    for (size_t i = 0; i < g.n_tags; i++)
        blob_unref(g.tags[i].tag);
    free(g.tags);
    g.tags = NULL;
    g.n_tags = g.tags_cap = 0;
    graves_free();
    config_changed();
    unlock();
}

static void control_config_get(struct fdb_double_config *config)
{
    lock();
    *config = g.config;
    unlock();
}

static void control_config_set(const struct fdb_double_config *config)
{
    lock();
    bool seed = config->seed != g.config.seed;
    g.config = *config;
    if (seed)
        g.random = (uint64_t)config->seed;
    config_changed();
    unlock();
}

static bool control_set(const char *name, int64_t value)
{
    lock();
    bool known = config_set_by_name(name, strlen(name), value);
    config_changed();
    unlock();
    return known;
}

static bool control_set_many(const char *text)
{
    lock();
    bool known = set_many_locked(text);
    config_changed();
    unlock();
    return known;
}

static void control_counts(struct fdb_double_counts *counts)
{
    lock();
    *counts = g.counts;
    counts->late_alive = 0;
    list_for_each (l, &g.commits) {
        const struct commit *c = container_of(l, struct commit, link);
        counts->late_alive += c->given_up || (c->f && c->f->settled);
    }
    unlock();
}

static int64_t control_count(const char *name)
{
    struct fdb_double_counts counts;
    control_counts(&counts);
#define X(field)                                                                                   \
    if (strcmp(name, #field) == 0)                                                                 \
        return (int64_t)counts.field;
    FDB_DOUBLE_COUNTS(X)
#undef X
    return -1;
}

static uint64_t control_tag_count(const char *tag)
{
    uint64_t n = 0;
    lock();
    for (size_t i = 0; i < g.n_tags; i++)
        if (bytes_compare(g.tags[i].tag->data, g.tags[i].tag->len, tag, strlen(tag)) == 0)
            n = g.tags[i].n;
    unlock();
    return n;
}

static const char *control_violation(void)
{
    return g.violation;
}

static void control_set_health(const char *json)
{
    lock();
    health_set(json);
    unlock();
}

/* --- another client -------------------------------------------------------------------- */

static bool control_commit(const struct fdb_double_change *changes, size_t n)
{
    for (size_t i = 0; i < n; i++)
        if (changes[i].key_len > KEY_BYTES_MAX || changes[i].end_len > KEY_BYTES_MAX + 1 ||
            (!changes[i].end && changes[i].value_len > VALUE_BYTES_MAX))
            return false;
    lock();
    struct commit *c = mem_zalloc(sizeof *c);
    list_add_tail(&g.commits, &c->link);
    c->mutations = mem_zalloc((n ? n : 1) * sizeof *c->mutations);
    c->read_version = version_now();
    for (size_t i = 0; i < n; i++) {
        const struct fdb_double_change *change = &changes[i];
        struct mutation *m = &c->mutations[c->n_mutations++];
        m->key = blob_new(change->key, change->key_len);
        m->type = change->value && !change->end ? M_SET : M_CLEAR_RANGE;
        m->value = change->end     ? blob_new(change->end, change->end_len)
                   : change->value ? blob_new(change->value, change->value_len)
                                   : blob_after(m->key);
        c->bytes += m->key->len + m->value->len;
        ranges_add(&c->writes, blob_ref(m->key),
                   m->type == M_SET ? blob_after(m->key) : blob_ref(m->value));
    }
    int64_t version;
    fdb_error_t error = commit_decide(c, &version);
    CHECK(!error);
    batch_end();
    commit_free(c);
    unlock();
    return true;
}

static bool control_put(const void *key, size_t key_len, const void *value, size_t value_len)
{
    return control_commit(
        &(struct fdb_double_change){
            .key = key, .key_len = key_len, .value = value ? value : "", .value_len = value_len},
        1);
}

static void control_clear(const void *begin, size_t begin_len, const void *end, size_t end_len)
{
    if (bytes_compare(begin, begin_len, end, end_len) < 0)
        control_commit(
            &(struct fdb_double_change){
                .key = begin, .key_len = begin_len, .end = end, .end_len = end_len},
            1);
}

static bool control_get(const void *key, size_t key_len, void **value, size_t *value_len)
{
    lock();
    const struct node *n = map_seek(key, key_len);
    const struct blob *v = NULL;
    if (n && bytes_compare(map_key(n)->data, map_key(n)->len, key, key_len) == 0)
        v = map_value(n, INT64_MAX);
    if (v) {
        *value = mem_alloc(v->len ? v->len : 1);
        memcpy(*value, v->data, v->len);
        *value_len = v->len;
    }
    unlock();
    return v != NULL;
}

static void control_each(const void *begin, size_t begin_len, const void *end, size_t end_len,
                         void (*see)(void *arg, const void *key, size_t key_len, const void *value,
                                     size_t value_len),
                         void *arg)
{
    lock();
    for (const struct node *n = map_seek(begin, begin_len);
         n && bytes_compare(map_key(n)->data, map_key(n)->len, end, end_len) < 0; n = map_next(n)) {
        const struct blob *v = map_value(n, INT64_MAX);
        if (v)
            see(arg, map_key(n)->data, map_key(n)->len, v->data, v->len);
    }
    unlock();
}

static int64_t control_version(void)
{
    lock();
    int64_t version = version_now();
    unlock();
    return version;
}

static void control_forget_versions(void)
{
    lock();
    batch_end();
    version_now();
    cluster_forget(++g.version_last);
    unlock();
}

static bool control_settle(unsigned timeout_ms)
{
    struct timespec until;
    if (g.manual)
        return !events_pending();
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += timeout_ms / 1000;
    until.tv_nsec += (long)(timeout_ms % 1000) * 1000000;
    if (until.tv_nsec >= 1000000000) {
        until.tv_sec++;
        until.tv_nsec -= 1000000000;
    }
    lock();
    bool pending;
    while ((pending = events_pending()))
        if (pthread_cond_timedwait(&g.ready, &g.lock, &until))
            break;
    unlock();
    return !pending;
}

static void control_manual(uint64_t (*now)(void *arg), void (*wake)(void *arg, uint64_t due_ns),
                           void *arg)
{
    lock();
    CHECK(!g.network_running);
    int64_t version = version_now();
    g.manual = true;
    g.clock = now;
    g.wake = wake;
    g.clock_arg = arg;
    /* Versions go on from where they were, with the new clock. */
    g.version_base = version;
    g.version_base_ns = now_ns();
    unlock();
}

static void control_run_due(void)
{
    lock();
    events_run_due();
    unlock();
}

static uint64_t control_next_due_ns(void)
{
    lock();
    uint64_t due_ns = events_next_due_ns();
    unlock();
    return due_ns;
}

static void control_instant(bool on)
{
    lock();
    CHECK(g.manual);
    g.instant = on;
    unlock();
}

static void control_cut(void *db, bool cut)
{
    lock();
    link_cut(db, cut);
    pthread_cond_signal(&g.work);
    unlock();
}

static void control_slow(void *db, uint64_t commit_ms, uint64_t answer_ms)
{
    FDBDatabase *d = db;
    lock();
    d->commit_ns = commit_ms * 1000000u;
    d->answer_ns = answer_ms * 1000000u;
    unlock();
}

static void control_pause(void *db, bool paused)
{
    lock();
    CHECK(g.manual);
    link_pause(db, paused);
    unlock();
}

static void control_die(void *db)
{
    lock();
    CHECK(g.manual);
    link_die(db);
    unlock();
}

EXPORT const struct fdb_double fdb_double = {
    .reset = control_reset,
    .config_get = control_config_get,
    .config_set = control_config_set,
    .set = control_set,
    .set_many = control_set_many,
    .counts = control_counts,
    .count = control_count,
    .tag_count = control_tag_count,
    .violation = control_violation,
    .set_health = control_set_health,
    .commit = control_commit,
    .put = control_put,
    .clear = control_clear,
    .get = control_get,
    .each = control_each,
    .version = control_version,
    .forget_versions = control_forget_versions,
    .settle = control_settle,
    .manual = control_manual,
    .run_due = control_run_due,
    .next_due_ns = control_next_due_ns,
    .instant = control_instant,
    .cut = control_cut,
    .slow = control_slow,
    .pause = control_pause,
    .die = control_die,
};
