/*
 * JSON about the server; docs/http.md describes each field.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/date.h"
#include "base/mem.h"
#include "server/http_body.h"

#define REPORT_WAIT_MS 500u
#define PROBE_WAIT_MS 1000u
#define LIST_AGE_MS 2000u
#define LIST_WAIT_MS 500u
#define SPACE_WAIT_MS 200u
#define VOLUMES_MAX 1000u
#define CLIENTS_MAX 4096u
#define WITH_SERIES_MAX 100u
#define NS_PER_MS 1000000u

/* --- small parts ---------------------------------------------------------------------------- */

static json_t *number(uint64_t n)
{
    return json_integer((json_int_t)n);
}

static void set(json_t *object, const char *key, json_t *value)
{
    json_object_set_new(object, key, value);
}

static json_t *date(uint64_t ns)
{
    char text[DATE_BYTES];
    return json_string(date_format(ns, text));
}

static uint64_t now_ns(const struct http_source *s)
{
    return env_realtime_ns(s->server->lanes[0].env);
}

static json_t *strings(const char *const *texts, size_t n)
{
    json_t *list = json_array();
    for (size_t i = 0; i < n; i++)
        json_array_append_new(list, json_string(texts[i]));
    return list;
}

static json_t *time_us(uint32_t us)
{
    return us == SERIES_NO_TIME ? json_null() : number(us);
}

static json_t *command(const struct metrics_command *c, bool has_bytes)
{
    json_t *o = json_object();
    set(o, "requests", number(histogram_count(&c->latency)));
    if (has_bytes)
        set(o, "bytes", number(c->bytes));
    set(o, "errors", number(c->errors));
    return o;
}

/* --- the last seconds ------------------------------------------------------------------------ */

static const char *const directions[SERIES_DIRECTIONS] = {
    [SERIES_READ] = "read", [SERIES_WRITE] = "write"};

static const char *key(char out[32], unsigned direction, const char *what)
{
    snprintf(out, 32, "%s_%s", directions[direction], what);
    return out;
}

static json_t *rates(const struct http_source *s, const struct series_volume *v)
{
    static const struct series_point nothing = {
        .of = {{.p50_us = SERIES_NO_TIME, .p99_us = SERIES_NO_TIME},
               {.p50_us = SERIES_NO_TIME, .p99_us = SERIES_NO_TIME}}};
    const struct series_point *p =
        v && series_n(&s->series) ? series_point(&s->series, v, 0) : &nothing;
    json_t *o = json_object();
    char k[32];
    for (unsigned d = 0; d < SERIES_DIRECTIONS; d++) {
        set(o, key(k, d, "requests"), number(p->of[d].requests));
        set(o, key(k, d, "bytes"), number(p->of[d].bytes));
        set(o, key(k, d, "p50_us"), time_us(p->of[d].p50_us));
        set(o, key(k, d, "p99_us"), time_us(p->of[d].p99_us));
    }
    return o;
}

static json_t *series(const struct http_source *s, const struct series_volume *v)
{
    json_t *o = json_object();
    char k[32];
    set(o, "step_s", number(1));
    set(o, "end", date(now_ns(s)));
    for (unsigned d = 0; d < SERIES_DIRECTIONS; d++) {
        json_t *requests = json_array(), *bytes = json_array();
        json_t *p50 = json_array(), *p99 = json_array();
        for (size_t back = v ? series_n(&s->series) : 0; back > 0; back--) {
            const struct series_point *p = series_point(&s->series, v, back - 1);
            json_array_append_new(requests, number(p->of[d].requests));
            json_array_append_new(bytes, number(p->of[d].bytes));
            json_array_append_new(p50, time_us(p->of[d].p50_us));
            json_array_append_new(p99, time_us(p->of[d].p99_us));
        }
        set(o, key(k, d, "requests"), requests);
        set(o, key(k, d, "bytes"), bytes);
        set(o, key(k, d, "p50_us"), p50);
        set(o, key(k, d, "p99_us"), p99);
    }
    return o;
}

/* --- the server ------------------------------------------------------------------------------ */

void http_reasons(struct http_source *s, struct http_text *out)
{
    struct server *server = s->server;
    if (__atomic_load_n(&s->stopping, __ATOMIC_RELAXED)) {
        http_text_add(out, "stopping: the process is about to end\n");
        return;
    }
    if (atomic_load(&server->draining))
        http_text_add(out, "draining: it was asked to give its volumes back and take no clients\n");
    if (!report_ask(s->report, REPORT_WAIT_MS)) {
        http_text_add(out, "reactor: one does not answer within %u ms\n", REPORT_WAIT_MS);
        return;
    }
    uint64_t silent_ms = inquiry_silent_ms(s->inquiry, PROBE_WAIT_MS);
    s->silent_ms = silent_ms;
    if (silent_ms)
        http_text_add(out, "store: it has not answered for %llu ms\n",
                      (unsigned long long)silent_ms);
    if (server->session->timed && !session_holds(server->session, server->lanes[0].env))
        http_text_add(out, "store: it took no heartbeat of this server for a lease\n");
}

static json_t *store_json(struct http_source *s, uint64_t silent_ms)
{
    struct store_info info;
    bool known = inquiry_space(s->inquiry, silent_ms ? 0 : SPACE_WAIT_MS, &info);
    json_t *o = json_object();
    set(o, "uri", json_string(s->server->config->store_uri));
    set(o, "engine", known ? json_string(info.engine) : json_null());
    set(o, "reachable", json_boolean(silent_ms == 0));
    set(o, "silent_ms", number(silent_ms));
    set(o, "used_bytes", known ? number(info.bytes_used) : json_null());
    set(o, "free_bytes", known ? number(info.bytes_free) : json_null());
    set(o, "available_bytes",
        known && info.bytes_available != STORE_BYTES_UNKNOWN ? number(info.bytes_available)
                                                             : json_null());
    return o;
}

json_t *http_server_json(struct http_source *s)
{
    struct server *server = s->server;
    struct shard_memory memory = {0};
    struct metrics_command read = {0}, write = {0};
    struct http_text reasons = {0};
    unsigned owned = 0, open = 0;
    size_t n;
    http_reasons(s, &reasons);
    bool ready = reasons.len == 0;
    free(reasons.bytes);
    uint64_t silent_ms = s->silent_ms;
    report_ask(s->report, REPORT_WAIT_MS);
    for (unsigned i = 0; i < server->n_lanes; i++) {
        const struct report_lane *l = report_lane(s->report, i);
        memory.used_bytes += l->memory.used_bytes;
        memory.dirty_bytes += l->memory.dirty_bytes;
        memory.limit_bytes += l->memory.limit_bytes;
        owned += l->n_owned;
        open += l->n_open;
    }
    const struct report_total *t = report_totals(s->report, &n);
    for (size_t i = 0; i < n; i++) {
        histogram_gather(&read.latency, &t[i].commands[NBD_CMD_READ].latency);
        histogram_gather(&write.latency, &t[i].commands[NBD_CMD_WRITE].latency);
        read.bytes += t[i].commands[NBD_CMD_READ].bytes;
        read.errors += t[i].commands[NBD_CMD_READ].errors;
        write.bytes += t[i].commands[NBD_CMD_WRITE].bytes;
        write.errors += t[i].commands[NBD_CMD_WRITE].errors;
    }
    json_t *o = json_object();
    set(o, "version", json_string(FDB_NBD_VERSION));
    set(o, "pid", number((uint64_t)getpid()));
    set(o, "host", json_string(server->session->host));
    set(o, "started", date(s->started_ns));
    set(o, "uptime_s", number((report_now_ns(s->report) - s->started_boot_ns) / 1000000000u));
    set(o, "now", date(now_ns(s)));
    set(o, "store", store_json(s, silent_ms));
    set(o, "listen", strings(s->listen, s->n_listen));
    set(o, "http", strings(s->http, s->n_http));
    set(o, "control", s->control ? json_string(s->control) : json_null());
    set(o, "threads", number(server->n_lanes));
    set(o, "read_only", json_boolean(server->config->read_only));
    set(o, "ready", json_boolean(ready));
    set(o, "draining", json_boolean(atomic_load(&server->draining)));
    set(o, "drained", json_boolean(atomic_load(&server->drained)));
    set(o, "stopping", json_boolean(__atomic_load_n(&s->stopping, __ATOMIC_RELAXED)));
    set(o, "cache",
        json_pack("{s:o, s:o, s:o}", "limit_bytes", number(memory.limit_bytes), "used_bytes",
                  number(memory.used_bytes), "dirty_bytes", number(memory.dirty_bytes)));
    set(o, "connections", number(atomic_load(&server->n_conns)));
    set(o, "connections_max", number(server->limits.connections_max));
    set(o, "volumes_owned", number(owned));
    set(o, "volumes_open", number(open));
    set(o, "read", command(&read, true));
    set(o, "write", command(&write, true));
    set(o, "rates", rates(s, &s->series.all));
    set(o, "series", series(s, &s->series.all));
    return o;
}

/* --- volumes --------------------------------------------------------------------------------- */

static json_t *owner_json(const struct http_source *s, const struct inquiry_volume *stored,
                          const struct report_total *here)
{
    const struct session *session = s->server->session;
    bool ours = here && here->sum.owned;
    /* The list may be a moment older than what the reactors say. */
    bool agrees = stored && stored->owned && stored->ours == ours;
    if (!ours && !agrees)
        return json_null();
    json_t *o = json_object();
    set(o, "ours", json_boolean(ours));
    if (agrees) {
        set(o, "host", json_string(stored->owner.host));
        set(o, "pid", number(stored->owner.pid));
        set(o, "address", json_string(stored->owner.address));
        set(o, "since", date(stored->owner.since_ns));
        return o;
    }
    set(o, "host", json_string(session->host));
    set(o, "pid", number(session->pid));
    set(o, "address", json_string(session->address));
    set(o, "since", json_null());
    return o;
}

static json_t *volume_json(const struct http_source *s, const char *name,
                           const struct inquiry_volume *stored, const struct report_total *here)
{
    static const struct report_total none;
    const struct report_total *t = here ? here : &none;
    const struct volume_stats *stats = &t->sum.stats;
    json_t *o = json_object();
    bool known = t->sum.open || stored;
    set(o, "name", json_string(name));
    set(o, "size_bytes", known ? number(t->sum.open ? t->sum.size : stored->size) : json_null());
    set(o, "used_bytes", stored ? number(stored->used_bytes) : json_null());
    set(o, "block_size_bytes",
        known ? number(t->sum.open ? t->sum.block_size : stored->block_size) : json_null());
    set(o, "description", json_string(stored ? stored->description : ""));
    set(o, "owner", owner_json(s, stored, here));
    set(o, "open", json_boolean(t->sum.open));
    set(o, "clients", number(t->sum.n_clients));
    for (unsigned i = 0; i < METRICS_COMMANDS; i++)
        set(o, metrics_command_names[i],
            command(&t->commands[i],
                    i != NBD_CMD_FLUSH && i != NBD_CMD_BLOCK_STATUS && i != METRICS_OTHER));
    set(o, "rates", rates(s, series_find(&s->series, name)));
    set(o, "cache_hits", number(stats->cache_hits));
    set(o, "cache_misses", number(stats->cache_misses));
    set(o, "cached_bytes", number(stats->cached_bytes));
    set(o, "dirty_bytes", number(stats->dirty_bytes));
    set(o, "generation_age_ms",
        stats->dirty_since_ns
            ? number((report_now_ns(s->report) - stats->dirty_since_ns) / NS_PER_MS)
            : json_null());
    return o;
}

/* The volumes of the store beside those that were open here: both by name. */
struct all_volumes {
    struct inquiry_list stored;
    const struct report_total *here;
    size_t n_here;
};

static void look(struct http_source *s, struct all_volumes *all)
{
    report_ask(s->report, REPORT_WAIT_MS);
    inquiry_volumes(s->inquiry, LIST_AGE_MS, LIST_WAIT_MS, &all->stored);
    all->here = report_totals(s->report, &all->n_here);
    if (all->n_here && strcmp(all->here[all->n_here - 1].name, METRICS_REST) == 0)
        all->n_here--;
}

static int compare_here(const void *name, const void *here)
{
    return strcmp(name, ((const struct report_total *)here)->name);
}

static const struct report_total *find_here(const struct all_volumes *all, const char *name)
{
    return bsearch(name, all->here, all->n_here, sizeof *all->here, compare_here);
}

static const struct inquiry_volume *find_stored(const struct all_volumes *all, const char *name)
{
    for (size_t i = 0; i < all->stored.n; i++)
        if (strcmp(all->stored.volumes[i].name, name) == 0)
            return &all->stored.volumes[i];
    return NULL;
}

json_t *http_volumes_json(struct http_source *s, bool with_series)
{
    struct all_volumes all;
    look(s, &all);
    json_t *list = json_array(), *o = json_object();
    unsigned n_series = 0;
    /* Those open here, then the others that the store names. */
    for (size_t i = 0; i < all.n_here && json_array_size(list) < VOLUMES_MAX; i++) {
        const struct report_total *t = &all.here[i];
        if (!t->sum.open)
            continue;
        json_t *v = volume_json(s, t->name, find_stored(&all, t->name), t);
        if (with_series && n_series++ < WITH_SERIES_MAX)
            set(v, "series", series(s, series_find(&s->series, t->name)));
        json_array_append_new(list, v);
    }
    size_t n_open = json_array_size(list);
    for (size_t i = 0; i < all.stored.n && json_array_size(list) < VOLUMES_MAX; i++) {
        const char *name = all.stored.volumes[i].name;
        const struct report_total *t = find_here(&all, name);
        if (!t || !t->sum.open)
            json_array_append_new(list, volume_json(s, name, &all.stored.volumes[i], t));
    }
    uint64_t total = max_u64(all.stored.total, n_open);
    set(o, "now", date(now_ns(s)));
    set(o, "total", number(total));
    set(o, "truncated", json_boolean(json_array_size(list) < total));
    set(o, "age_ms",
        all.stored.asked_ns ? number((report_now_ns(s->report) - all.stored.asked_ns) / NS_PER_MS)
                            : json_null());
    set(o, "volumes", list);
    inquiry_list_free(&all.stored);
    return o;
}

json_t *http_volume_json(struct http_source *s, const char *name)
{
    struct all_volumes all;
    look(s, &all);
    const struct report_total *here = find_here(&all, name);
    const struct inquiry_volume *stored = find_stored(&all, name);
    json_t *o = NULL;
    if (stored || (here && here->sum.open)) {
        o = volume_json(s, name, stored, here);
        set(o, "now", date(now_ns(s)));
        set(o, "series", series(s, series_find(&s->series, name)));
    }
    inquiry_list_free(&all.stored);
    return o;
}

json_t *http_heat_json(struct http_source *s, const char *name)
{
    static const char *const keys[SERIES_DIRECTIONS] = {
        [SERIES_READ] = "reads", [SERIES_WRITE] = "writes"};
    struct all_volumes all;
    look(s, &all);
    const struct report_total *here = find_here(&all, name);
    const struct inquiry_volume *stored = find_stored(&all, name);
    const struct series_volume *v = series_find(&s->series, name);
    json_t *o = NULL;
    if (stored || (here && here->sum.open)) {
        uint64_t size = here && here->sum.open ? here->sum.size : stored->size;
        uint32_t shift = v && v->heat_shift ? v->heat_shift : 12;
        while ((size - 1) >> shift >= METRICS_HEAT_CELLS)
            shift++;
        bool has = v && v->heat_shift == shift;
        size_t cells = ((size - 1) >> shift) + 1;
        float left = has ? series_heat_left(&s->series, v) : 0;
        o = json_object();
        set(o, "name", json_string(name));
        set(o, "size_bytes", number(size));
        set(o, "cell_bytes", number(1ull << shift));
        set(o, "half_life_s", number(SERIES_HEAT_HALF_LIFE_S));
        for (unsigned d = 0; d < SERIES_DIRECTIONS; d++) {
            json_t *list = json_array();
            for (size_t i = 0; i < cells; i++) {
                /* Two digits are enough, and short. */
                float heat = has ? v->heat[d][i] * left : 0;
                json_array_append_new(list, json_real((double)(uint64_t)(heat * 100 + 0.5f) / 100));
            }
            set(o, keys[d], list);
        }
    }
    inquiry_list_free(&all.stored);
    return o;
}

/* --- clients --------------------------------------------------------------------------------- */

/* Who a client is known to be; text that is no UTF-8 is not shown. */
static json_t *peer_json(const struct peer *p)
{
    json_t *name = NULL;
    if (*p->tls_name)
        name = json_string(p->tls_name);
    else if (p->has_uid)
        name = json_sprintf("uid %lu", (unsigned long)p->uid);
    return name ? name : json_null();
}

json_t *http_clients_json(struct http_source *s)
{
    json_t *list = json_array(), *o = json_object();
    size_t total = 0;
    report_ask(s->report, REPORT_WAIT_MS);
    for (unsigned i = 0; i < s->server->n_lanes; i++) {
        const struct report_lane *l = report_lane(s->report, i);
        total += l->n_clients;
        for (size_t k = 0; k < l->n_clients && json_array_size(list) < CLIENTS_MAX; k++) {
            const struct report_client *c = &l->clients[k];
            json_t *v = json_object();
            set(v, "id", number(c->id));
            set(v, "address", json_string(c->peer.address));
            set(v, "peer", peer_json(&c->peer));
            set(v, "tls", json_boolean(c->peer.tls != PEER_PLAIN));
            set(v, "export", *c->export ? json_string(c->export) : json_null());
            set(v, "phase", json_string(*c->export ? "serving" : "handshake"));
            set(v, "since", date(c->begun_ns));
            set(v, "read_only", json_boolean(c->read_only));
            set(v, "requests", number(c->requests));
            set(v, "read_bytes", number(c->read_bytes));
            set(v, "written_bytes", number(c->written_bytes));
            set(v, "errors", number(c->errors));
            set(v, "in_flight", number(c->in_flight));
            json_array_append_new(list, v);
        }
    }
    set(o, "now", date(now_ns(s)));
    set(o, "total", number(total));
    set(o, "clients", list);
    return o;
}
