/*
 * Metrics in Prometheus' text format 0.0.4; docs/http.md lists them.
 *
 * A family is one HELP and TYPE line and its samples, in one piece. Of commands that no client of a
 * volume has used there are no samples.
 */
#include <dirent.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

#include "server/http_body.h"

#define REPORT_WAIT_MS 500u
#define PROBE_WAIT_MS 500u
#define SPACE_WAIT_MS 200u
/* Of the buckets in memory every second one is shown, from 1 us to 67 s. */
#define BUCKET_STEP 2u

struct metrics_out {
    struct http_source *source;
    struct http_text *text;
    const struct report_total *volumes;
    size_t n_volumes;
    const char *name; /* of the family */
};

static void family(struct metrics_out *m, const char *name, const char *type, const char *help)
{
    m->name = name;
    http_text_add(m->text, "# HELP fdbnbd_%s %s\n# TYPE fdbnbd_%s %s\n", name, help, name, type);
}

static void sample(struct metrics_out *m, uint64_t value)
{
    http_text_add(m->text, "fdbnbd_%s %" PRIu64 "\n", m->name, value);
}

static void sample_of(struct metrics_out *m, const char *label, const char *of, uint64_t value)
{
    http_text_add(m->text, "fdbnbd_%s{%s=\"%s\"} %" PRIu64 "\n", m->name, label, of, value);
}

static void sample_seconds(struct metrics_out *m, uint64_t ns)
{
    http_text_add(m->text, "fdbnbd_%s %.9g\n", m->name, (double)ns / 1e9);
}

static void gauge(struct metrics_out *m, const char *name, const char *help, uint64_t value)
{
    family(m, name, "gauge", help);
    sample(m, value);
}

static void count(struct metrics_out *m, const char *name, const char *help, uint64_t value)
{
    family(m, name, "counter", help);
    sample(m, value);
}

/* `labels` end with a comma where there are any. */
static void histogram(struct metrics_out *m, const char *labels, const struct histogram *h)
{
    uint64_t below = 0;
    size_t len = strlen(labels);
    for (unsigned i = 0; i < HISTOGRAM_BUCKETS - 1; i++) {
        below += h->buckets[i];
        if (i % BUCKET_STEP == 0)
            http_text_add(m->text, "fdbnbd_%s_bucket{%sle=\"%.9g\"} %" PRIu64 "\n", m->name, labels,
                          (double)(1u << i) / 1e6, below);
    }
    below += h->buckets[HISTOGRAM_BUCKETS - 1];
    http_text_add(m->text, "fdbnbd_%s_bucket{%sle=\"+Inf\"} %" PRIu64 "\n", m->name, labels, below);
    http_text_add(m->text, "fdbnbd_%s_sum{%.*s} %.9g\n", m->name, (int)(len ? len - 1 : 0), labels,
                  (double)h->sum_ns / 1e9);
    http_text_add(m->text, "fdbnbd_%s_count{%.*s} %" PRIu64 "\n", m->name, (int)(len ? len - 1 : 0),
                  labels, below);
}

/* --- requests -------------------------------------------------------------------------------- */

/* Calls `show` for each command that was used. Names of volumes need no escapes (name_valid). */
static void each_command(struct metrics_out *m,
                         void (*show)(struct metrics_out *m, const char *labels,
                                      const struct metrics_command *c))
{
    char labels[NAME_BYTES_MAX + 64];
    for (size_t i = 0; i < m->n_volumes; i++)
        for (unsigned k = 0; k < METRICS_COMMANDS; k++) {
            const struct metrics_command *c = &m->volumes[i].commands[k];
            if (!histogram_count(&c->latency))
                continue;
            snprintf(labels, sizeof labels, "volume=\"%s\",command=\"%s\"", m->volumes[i].name,
                     metrics_command_names[k]);
            show(m, labels, c);
        }
}

static void show_requests(struct metrics_out *m, const char *labels,
                          const struct metrics_command *c)
{
    http_text_add(m->text, "fdbnbd_%s{%s} %" PRIu64 "\n", m->name, labels,
                  histogram_count(&c->latency));
}

static void show_errors(struct metrics_out *m, const char *labels, const struct metrics_command *c)
{
    http_text_add(m->text, "fdbnbd_%s{%s} %" PRIu64 "\n", m->name, labels, c->errors);
}

static void show_bytes(struct metrics_out *m, const char *labels, const struct metrics_command *c)
{
    http_text_add(m->text, "fdbnbd_%s{%s} %" PRIu64 "\n", m->name, labels, c->bytes);
}

static void show_latency(struct metrics_out *m, const char *labels, const struct metrics_command *c)
{
    char with_comma[NAME_BYTES_MAX + 72];
    snprintf(with_comma, sizeof with_comma, "%s,", labels);
    histogram(m, with_comma, &c->latency);
}

static void requests(struct metrics_out *m)
{
    family(m, "requests_total", "counter", "Requests answered, with an error or without.");
    each_command(m, show_requests);
    family(m, "request_errors_total", "counter", "Requests answered with an error.");
    each_command(m, show_errors);
    family(m, "request_bytes_total", "counter", "Bytes that requests without an error were about.");
    each_command(m, show_bytes);
    family(m, "request_duration_seconds", "histogram",
           "Time from when a request was parsed until its answer was sent.");
    each_command(m, show_latency);
}

/* --- volumes --------------------------------------------------------------------------------- */

struct volume_family {
    const char *name, *type, *help;
    bool open_only; /* of volumes that are open just now */
    uint64_t (*value)(const struct report_total *t);
};

static uint64_t hits(const struct report_total *t)
{
    return t->sum.stats.cache_hits;
}
static uint64_t misses(const struct report_total *t)
{
    return t->sum.stats.cache_misses;
}
static uint64_t mismatches(const struct report_total *t)
{
    return t->sum.stats.hash_errors;
}
static uint64_t retries(const struct report_total *t)
{
    return t->sum.stats.commit_retries;
}
static uint64_t conflicts(const struct report_total *t)
{
    return t->sum.stats.conflicts;
}
static uint64_t fencings(const struct report_total *t)
{
    return t->sum.stats.fencings;
}
static uint64_t timeouts(const struct report_total *t)
{
    return t->sum.stats.timeouts;
}
static uint64_t cached(const struct report_total *t)
{
    return t->sum.stats.cached_bytes;
}
static uint64_t dirty(const struct report_total *t)
{
    return t->sum.stats.dirty_bytes;
}
static uint64_t size(const struct report_total *t)
{
    return t->sum.size;
}
static uint64_t clients(const struct report_total *t)
{
    return t->sum.n_clients;
}
static uint64_t owned(const struct report_total *t)
{
    return t->sum.owned;
}

static const struct volume_family volume_families[] = {
    {"cache_hits_total", "counter", "Reads answered from the cache at once.", false, hits},
    {"cache_misses_total", "counter", "Reads that had to wait for the store, or for a commit.",
     false, misses},
    {"hash_mismatches_total", "counter", "Blocks and index rows that were damaged or missing.",
     false, mismatches},
    {"commit_retries_total", "counter", "Commits that failed and were tried again.", false,
     retries},
    {"commit_conflicts_total", "counter",
     "Commits refused because another server owned the volume by then.", false, conflicts},
    {"fencings_total", "counter", "Sessions of silent servers that were fenced for the volume.",
     false, fencings},
    {"store_timeouts_total", "counter",
     "Requests answered with an error because the store took too long.", false, timeouts},
    {"volume_cached_bytes", "gauge", "Bytes of the volume in the cache.", true, cached},
    {"volume_dirty_bytes", "gauge", "Bytes of these that the store has not committed.", true,
     dirty},
    {"volume_size_bytes", "gauge", "Size of the volume.", true, size},
    {"volume_clients", "gauge", "Connections to the volume or its snapshots.", false, clients},
    {"volume_owned", "gauge", "1 while this server owns the volume.", true, owned},
};

static void volumes(struct metrics_out *m)
{
    char labels[NAME_BYTES_MAX + 16];
    uint64_t now_ns = report_now_ns(m->source->report);
    for (size_t f = 0; f < sizeof volume_families / sizeof *volume_families; f++) {
        const struct volume_family *x = &volume_families[f];
        family(m, x->name, x->type, x->help);
        for (size_t i = 0; i < m->n_volumes; i++)
            if (!x->open_only || m->volumes[i].sum.open)
                sample_of(m, "volume", m->volumes[i].name, x->value(&m->volumes[i]));
    }
    family(m, "volume_generation_age_seconds", "gauge",
           "Age of the oldest change that the store has not committed; 0: there is none.");
    for (size_t i = 0; i < m->n_volumes; i++) {
        uint64_t since_ns = m->volumes[i].sum.stats.dirty_since_ns;
        if (m->volumes[i].sum.open)
            http_text_add(m->text, "fdbnbd_%s{volume=\"%s\"} %.9g\n", m->name, m->volumes[i].name,
                          since_ns ? (double)(now_ns - since_ns) / 1e9 : 0);
    }
    family(m, "commit_duration_seconds", "histogram", "Time the store took for a commit.");
    for (size_t i = 0; i < m->n_volumes; i++) {
        snprintf(labels, sizeof labels, "volume=\"%s\",", m->volumes[i].name);
        if (histogram_count(&m->volumes[i].sum.stats.commit_time))
            histogram(m, labels, &m->volumes[i].sum.stats.commit_time);
    }
}

/* --- connections, memory, store, process ---------------------------------------------------------
 */

static void connections(struct metrics_out *m)
{
    static const char *const results[METRICS_HANDSHAKES] = {
        [METRICS_ENTERED] = "entered", [METRICS_LEFT] = "left", [METRICS_FAILED] = "failed"};
    struct server *server = m->source->server;
    uint64_t accepted = 0, turned_away = 0, handshakes[METRICS_HANDSHAKES] = {0}, slow = 0;
    for (unsigned i = 0; i < server->n_lanes; i++) {
        const struct metrics_lane *ml = &server->lanes[i].metrics;
        accepted += counter_get(&ml->accepted);
        turned_away += counter_get(&ml->turned_away);
        slow += counter_get(&ml->n_slow);
        for (unsigned k = 0; k < METRICS_HANDSHAKES; k++)
            handshakes[k] += counter_get(&ml->handshakes[k]);
    }
    gauge(m, "connections", "Connections of NBD clients.", atomic_load(&server->n_conns));
    gauge(m, "connections_max", "The most there may be.", server->limits.connections_max);
    count(m, "connections_accepted_total", "Connections accepted.", accepted);
    count(m, "connections_turned_away_total",
          "Connections refused because there were too many, or the server was stopping.",
          turned_away);
    family(m, "handshakes_total", "counter",
           "Handshakes that ended: in an export, without one, by a failure.");
    for (unsigned k = 0; k < METRICS_HANDSHAKES; k++)
        sample_of(m, "result", results[k], handshakes[k]);
    count(m, "slow_requests_total", "Requests that took longer than --slow-ms.", slow);
}

static void memory(struct metrics_out *m)
{
    struct shard_memory all = {0};
    unsigned n_owned = 0, n_open = 0;
    for (unsigned i = 0; i < m->source->server->n_lanes; i++) {
        const struct report_lane *l = report_lane(m->source->report, i);
        all.used_bytes += l->memory.used_bytes;
        all.dirty_bytes += l->memory.dirty_bytes;
        all.limit_bytes += l->memory.limit_bytes;
        n_owned += l->n_owned;
        n_open += l->n_open;
    }
    gauge(m, "cache_limit_bytes", "The most the cache may take (--cache-size).", all.limit_bytes);
    gauge(m, "cache_used_bytes", "What it takes.", all.used_bytes);
    gauge(m, "cache_dirty_bytes",
          "Part of that which holds changes not committed, or being received.", all.dirty_bytes);
    gauge(m, "volumes_open", "Volumes that are open here.", n_open);
    gauge(m, "volumes_owned", "Volumes that this server owns.", n_owned);
}

static void store(struct metrics_out *m)
{
    struct http_source *s = m->source;
    struct store_info info;
    uint64_t silent_ms = inquiry_silent_ms(s->inquiry, PROBE_WAIT_MS);
    gauge(m, "store_up", "1 while the store answers.", silent_ms == 0);
    family(m, "store_silent_seconds", "gauge",
           "For how long a question to the store has been without an answer.");
    sample_seconds(m, silent_ms * 1000000);
    count(m, "store_retries_total", "Attempts on the store that were made again.",
          counter_get(&s->server->store->counters.retries));
    count(m, "sessions_ended_total",
          "Times that others fenced this server, which lost its volumes with that.",
          atomic_load(&s->server->session->n_ended));
    if (!inquiry_space(s->inquiry, silent_ms ? 0 : SPACE_WAIT_MS, &info))
        return;
    gauge(m, "store_used_bytes", "Space in the store that holds something.", info.bytes_used);
    gauge(m, "store_free_bytes", "Space inside the store's files that can be used again.",
          info.bytes_free);
    if (info.bytes_available != STORE_BYTES_UNKNOWN)
        gauge(m, "store_available_bytes", "By so much the store could still grow.",
              info.bytes_available);
}

static unsigned open_files(void)
{
    unsigned n = 0;
    DIR *dir = opendir("/proc/self/fd");
    if (!dir)
        return 0;
    for (const struct dirent *e; (e = readdir(dir));)
        n += e->d_name[0] != '.';
    closedir(dir);
    return n - 1; /* that of the folder itself */
}

/* By the names that all of Prometheus' clients use. */
static void process(struct metrics_out *m)
{
    struct rusage usage;
    struct rlimit files;
    unsigned long pages = 0;
    getrusage(RUSAGE_SELF, &usage);
    getrlimit(RLIMIT_NOFILE, &files);
    FILE *f = fopen("/proc/self/statm", "re");
    if (f) {
        if (fscanf(f, "%*u %lu", &pages) != 1)
            pages = 0;
        fclose(f);
    }
    double cpu = (double)(usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) +
                 (double)(usage.ru_utime.tv_usec + usage.ru_stime.tv_usec) / 1e6;
    static const char format[] =
        "# HELP process_cpu_seconds_total CPU time the process has used.\n"
        "# TYPE process_cpu_seconds_total counter\nprocess_cpu_seconds_total %.6f\n"
        "# HELP process_resident_memory_bytes Memory of the process.\n"
        "# TYPE process_resident_memory_bytes gauge\nprocess_resident_memory_bytes %lu\n"
        "# HELP process_open_fds Files and sockets it has open.\n"
        "# TYPE process_open_fds gauge\nprocess_open_fds %u\n"
        "# HELP process_max_fds The most it may open.\n"
        "# TYPE process_max_fds gauge\nprocess_max_fds %" PRIu64 "\n"
        "# HELP process_start_time_seconds When it was started, in seconds since 1970.\n"
        "# TYPE process_start_time_seconds gauge\nprocess_start_time_seconds %.3f\n";
    http_text_add(m->text, format, cpu, pages * (unsigned long)sysconf(_SC_PAGESIZE), open_files(),
                  (uint64_t)files.rlim_cur, (double)m->source->started_ns / 1e9);
}

void http_metrics_text(struct http_source *s, struct http_text *out)
{
    struct metrics_out m = {.source = s, .text = out};
    unsigned answering = 0;
    report_ask(s->report, REPORT_WAIT_MS);
    for (unsigned i = 0; i < s->server->n_lanes; i++)
        answering += report_lane(s->report, i)->there;
    m.volumes = report_totals(s->report, &m.n_volumes);

    family(&m, "build_info", "gauge", "1; the version is in its label.");
    sample_of(&m, "version", FDB_NBD_VERSION, 1);
    gauge(&m, "reactors", "Reactors (--threads).", s->server->n_lanes);
    gauge(&m, "reactors_answering", "Reactors that turn.", answering);
    gauge(&m, "draining", "1 once the server was asked to give all volumes back.",
          atomic_load(&s->server->draining));
    connections(&m);
    requests(&m);
    volumes(&m);
    memory(&m);
    store(&m);
    process(&m);
}
