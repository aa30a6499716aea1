/*
 * fdb-nbd bench: how quick an NBD server is, any server (src/bench/).
 *
 * It has to do with no store and no volume of ours: it is a client.
 */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/hash.h"
#include "base/mem.h"
#include "base/clock.h"
#include "bench/load.h"
#include "cli/cli.h"
#include "cli/describe.h"
#include "cli/progress.h"

#define SECONDS_MAX 1e6
#define PID_MAX (1u << 22) /* the kernel's limit on a machine of 64 bits */

enum {
    WORKLOAD = 1,
    READS,
    BLOCK_SIZE,
    DEPTH,
    CONNECTIONS,
    FLUSH_EVERY,
    FUA,
    COMPRESSIBLE,
    TIME,
    BYTES,
    START,
    SIZE,
    PID,
    SEED,
    TIMEOUT,
    OVERWRITE
};

static const struct cli_option options[] = {
    {WORKLOAD, "workload", "W",
     "randread, randwrite, randrw, read, write or rw (default: randread)"},
    {READS, "reads", "PERCENT", "share of reads in rw and randrw (default: 70)"},
    {BLOCK_SIZE, "block-size", "SIZE", "of a request, 512 to 32M (default: 4K)"},
    {DEPTH, "depth", "N", "requests in flight on each connection, 1 to 1024 (default: 32)"},
    {CONNECTIONS, "connections", "N", "1 to 256 (default: 1)"},
    {FLUSH_EVERY, "flush-every", "N",
     "FLUSH after N writes of a connection, between them and the next (default: 0, never)"},
    {FUA, "fua", NULL, "each write carries FUA"},
    {COMPRESSIBLE, "compressible", "P", "percent of what is written that compress (default: 0)"},
    {TIME, "time", "SECONDS", "ends after that time (default: 10)"},
    {BYTES, "bytes", "SIZE", "ends after so many bytes, if that is sooner (default: no limit)"},
    {START, "start", "OFFSET", "uses the export from there on (default: 0)"},
    {SIZE, "size", "SIZE", "uses only so many bytes of the export (default: all)"},
    {PID, "pid", "PID", "reports the CPU time of that process, the server (default: none)"},
    {SEED, "seed", "N", "of places and data (default: from the clock; it is reported)"},
    {TIMEOUT, "timeout", "SECONDS",
     "gives up when the server answers nothing for so long (default: 60)"},
    {OVERWRITE, "overwrite", NULL, "needed to write: what the export holds is lost"},
    {0, NULL, NULL, NULL},
};

static const struct workload {
    const char *name;
    bool sequential, reads, writes;
} workloads[] = {
    {"randread", false, true, false}, {"randwrite", false, false, true},
    {"randrw", false, true, true},    {"read", true, true, false},
    {"write", true, false, true},     {"rw", true, true, true},
};

struct bench_options {
    const struct workload *workload;
    struct load_options load;
    unsigned reads_percent;
    bool overwrite, seeded;
};

static enum status parse_seconds(const char *text, uint64_t *ns, struct err *e)
{
    char *end;
    double s = strtod(text, &end);
    if (text[0] < '0' || text[0] > '9' || *end || !(s >= 0.001 && s <= SECONDS_MAX))
        return fail(e, ST_INVAL, "\"%.64s\" is not a number of seconds from 0.001 to %g", text,
                    SECONDS_MAX);
    *ns = (uint64_t)(s * (double)NS_PER_S);
    return ST_OK;
}

static enum status parse_u32(const char *text, uint32_t min, uint32_t max, uint32_t *out,
                             struct err *e)
{
    uint64_t v = 0;
    enum status st = cli_parse_number(text, min, max, &v, e);
    *out = (uint32_t)v;
    return st;
}

static enum status parse_workload(const char *text, const struct workload **out, struct err *e)
{
    for (size_t i = 0; i < sizeof workloads / sizeof *workloads; i++) {
        if (strcmp(text, workloads[i].name) == 0) {
            *out = &workloads[i];
            return ST_OK;
        }
    }
    return fail(e, ST_INVAL,
                "\"%.64s\" is not a workload (randread, randwrite, randrw, read, write, rw)", text);
}

static enum status parse_block_size(const char *text, uint32_t *out, struct err *e)
{
    uint64_t bytes = 0;
    enum status st = cli_parse_size(text, &bytes, e);
    if (st == ST_OK && (bytes < LOAD_BLOCK_BYTES_MIN || bytes > LOAD_BLOCK_BYTES_MAX))
        return fail(e, ST_INVAL, "\"%.64s\" is not from 512 to 32M", text);
    *out = (uint32_t)bytes;
    return st;
}

/* Zero would mean something else. */
static enum status parse_some(const char *text, uint64_t *out, struct err *e)
{
    enum status st = cli_parse_size(text, out, e);
    return st == ST_OK && *out == 0 ? fail(e, ST_INVAL, "it can't be 0") : st;
}

static enum status take(void *arg, int code, const char *value, struct err *e)
{
    struct bench_options *o = arg;
    switch (code) {
    case WORKLOAD:
        return parse_workload(value, &o->workload, e);
    case READS:
        return parse_u32(value, 0, 100, &o->reads_percent, e);
    case BLOCK_SIZE:
        return parse_block_size(value, &o->load.block_size, e);
    case DEPTH:
        return parse_u32(value, 1, LOAD_DEPTH_MAX, &o->load.depth, e);
    case CONNECTIONS:
        return parse_u32(value, 1, LOAD_CONNECTIONS_MAX, &o->load.n_connections, e);
    case FLUSH_EVERY:
        return cli_parse_number(value, 0, UINT32_MAX, &o->load.flush_every, e);
    case FUA:
        o->load.fua = true;
        return ST_OK;
    case COMPRESSIBLE:
        return parse_u32(value, 0, 100, &o->load.compressible, e);
    case TIME:
        return parse_seconds(value, &o->load.time_ns, e);
    case BYTES:
        return parse_some(value, &o->load.bytes_max, e);
    case START:
        return cli_parse_size(value, &o->load.start, e);
    case SIZE:
        return parse_some(value, &o->load.size, e);
    case PID:
        return parse_u32(value, 1, PID_MAX, &o->load.server_pid, e);
    case SEED:
        o->seeded = true;
        return cli_parse_number(value, 0, INT64_MAX, &o->load.seed, e);
    case TIMEOUT:
        return parse_seconds(value, &o->load.timeout_ns, e);
    default:
        o->overwrite = true;
        return ST_OK;
    }
}

/* --- while it runs ------------------------------------------------------------------------- */

struct live {
    struct progress progress;
    const struct bench_options *o;
    uint64_t at_ns, n_requests; /* of the last tick */
};

static bool tick(void *arg, uint64_t now_ns, uint64_t n_requests)
{
    struct live *live = arg;
    uint64_t ns = now_ns - live->at_ns;
    if (live->at_ns > 0 && ns > 0)
        snprintf(live->progress.what, sizeof live->progress.what, "%s: %.0f IOPS",
                 live->o->workload->name,
                 (double)(n_requests - live->n_requests) * (double)NS_PER_S / (double)ns);
    live->at_ns = now_ns;
    live->n_requests = n_requests;
    live->progress.done = n_requests * live->o->load.block_size;
    progress_draw(&live->progress, now_ns);
    return !interrupted();
}

/* --- the report ---------------------------------------------------------------------------- */

static double per_s(uint64_t n, const struct load_result *r)
{
    return r->elapsed_ns ? (double)n * (double)NS_PER_S / (double)r->elapsed_ns : 0;
}

static double mb_per_s(uint64_t n, const struct bench_options *o, const struct load_result *r)
{
    return per_s(n, r) * o->load.block_size / 1e6;
}

static uint64_t n_requests(const struct load_result *r)
{
    return r->op[LOAD_READ].count + r->op[LOAD_WRITE].count;
}

static double us_per_request(uint64_t ns, const struct load_result *r)
{
    uint64_t n = n_requests(r);
    return n ? (double)ns / 1e3 / (double)n : 0;
}

static json_t *latency_json(const struct latency *l)
{
    return json_pack("{s:f, s:f, s:f, s:f, s:f, s:f}", "mean", latency_mean_ns(l) / 1e3, "p50",
                     latency_percentile_ns(l, 50) / 1e3, "p90", latency_percentile_ns(l, 90) / 1e3,
                     "p99", latency_percentile_ns(l, 99) / 1e3, "p99_9",
                     latency_percentile_ns(l, 99.9) / 1e3, "max", (double)l->max_ns / 1e3);
}

static json_t *op_json(enum load_op op, const struct bench_options *o, const struct load_result *r)
{
    const struct latency *l = &r->op[op];
    if (l->count == 0)
        return json_null();
    json_t *json =
        json_pack("{s:I, s:o}", "requests", (json_int_t)l->count, "latency_us", latency_json(l));
    if (op != LOAD_FLUSH) {
        json_object_set_new(json, "iops", json_real(per_s(l->count, r)));
        json_object_set_new(json, "mb_per_s", json_real(mb_per_s(l->count, o, r)));
    }
    return json;
}

static void print_json(const char *uri, const struct bench_options *o, const struct load_result *r)
{
    const struct load_options *load = &o->load;
    json_t *json =
        json_pack("{s:s, s:s, s:I, s:I, s:I, s:I, s:b, s:I, s:I, s:I}", "uri", uri, "workload",
                  o->workload->name, "block_size", (json_int_t)load->block_size, "depth",
                  (json_int_t)load->depth, "connections", (json_int_t)load->n_connections,
                  "flush_every", (json_int_t)load->flush_every, "fua", load->fua,
                  "compressible_percent", (json_int_t)load->compressible, "size",
                  (json_int_t)r->size, "seed", (json_int_t)load->seed);
    json_t *figures = json_pack(
        "{s:f, s:I, s:I, s:f, s:f, s:o, s:o, s:o, s:o, s:f, s:o}", "seconds",
        (double)r->elapsed_ns / (double)NS_PER_S, "requests", (json_int_t)n_requests(r), "errors",
        (json_int_t)r->n_errors, "iops", per_s(n_requests(r), r), "mb_per_s",
        mb_per_s(n_requests(r), o, r), "read", op_json(LOAD_READ, o, r), "write",
        op_json(LOAD_WRITE, o, r), "flush", op_json(LOAD_FLUSH, o, r), "final_flush_ms",
        r->flushed ? json_real((double)r->final_flush_ns / 1e6) : json_null(),
        "client_cpu_us_per_request", us_per_request(r->client_cpu_ns, r),
        "server_cpu_us_per_request",
        r->server_cpu_known && n_requests(r) ? json_real(us_per_request(r->server_cpu_ns, r))
                                             : json_null());
    json_object_update_new(json, figures);
    describe_print(json);
}

static void print_line(const char *name, enum load_op op, const struct bench_options *o,
                       const struct load_result *r)
{
    const struct latency *l = &r->op[op];
    if (l->count == 0)
        return;
    char mb[24] = "";
    if (op != LOAD_FLUSH)
        snprintf(mb, sizeof mb, "%.1f", mb_per_s(l->count, o, r));
    printf("%-5s %11" PRIu64 " %9.0f %9s %9.1f %9.1f %9.1f %9.1f %9.1f %9.1f\n", name, l->count,
           per_s(l->count, r), mb, latency_mean_ns(l) / 1e3, latency_percentile_ns(l, 50) / 1e3,
           latency_percentile_ns(l, 90) / 1e3, latency_percentile_ns(l, 99) / 1e3,
           latency_percentile_ns(l, 99.9) / 1e3, (double)l->max_ns / 1e3);
}

static void print_report(const char *uri, const struct bench_options *o,
                         const struct load_result *r)
{
    char block[24], size[24];
    printf("%s of %s on %s of %s: %u in flight on %u connection%s, seed %" PRIu64 "\n",
           o->workload->name, cli_size(o->load.block_size, block), cli_size(r->size, size), uri,
           o->load.depth, o->load.n_connections, o->load.n_connections == 1 ? "" : "s",
           o->load.seed);
    printf("%-5s %11s %9s %9s %9s %9s %9s %9s %9s %9s\n", "", "requests", "IOPS", "MB/s", "mean us",
           "p50", "p90", "p99", "p99.9", "max");
    print_line("read", LOAD_READ, o, r);
    print_line("write", LOAD_WRITE, o, r);
    print_line("flush", LOAD_FLUSH, o, r);
    printf("%.2f s", (double)r->elapsed_ns / (double)NS_PER_S);
    if (r->flushed)
        printf("; final FLUSH %.1f ms", (double)r->final_flush_ns / 1e6);
    else if (o->workload->writes && r->n_errors == 0)
        printf("; no final FLUSH: the server does not offer it");
    printf("; CPU us per request: client %.2f", us_per_request(r->client_cpu_ns, r));
    if (r->server_cpu_known)
        printf(", server %.2f", us_per_request(r->server_cpu_ns, r));
    putchar('\n');
}

/* --- the command --------------------------------------------------------------------------- */

static uint64_t seed_from_clock(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_REALTIME, &ts);
    /* Short, because it may be typed again. */
    return hash_mix((uint64_t)ts.tv_sec, (uint64_t)ts.tv_nsec) & 0xffffffffu;
}

static int run(struct cli *cli, int argc, char **argv)
{
    struct bench_options o = {.workload = &workloads[0],
                              .reads_percent = 70,
                              .load = {.block_size = 4096,
                                       .depth = 32,
                                       .n_connections = 1,
                                       .time_ns = 10 * NS_PER_S,
                                       .timeout_ns = 60 * NS_PER_S}};
    struct nbd_uri uri;
    struct err e = {0};
    int first = cli_parse(cli, argc, argv, take, &o);
    if (first < 0)
        return cli->status;
    if (nbd_uri_parse(argv[first], &uri, &e) != ST_OK)
        return cli_usage_error(cli, "%s", e.text);
    const struct workload *w = o.workload;
    if (w->writes && !o.overwrite) {
        cli_error("the workload \"%s\" overwrites what the export holds: add --overwrite to say "
                  "that you mean it",
                  w->name);
        return CLI_FAILED;
    }
    if (!w->writes && (o.load.flush_every || o.load.fua))
        return cli_usage_error(cli,
                               "the workload \"%s\" writes nothing: --flush-every and --fua "
                               "are of no use",
                               w->name);
    o.load.sequential = w->sequential;
    o.load.reads_percent = !w->writes ? 100 : !w->reads ? 0 : o.reads_percent;
    if (!o.seeded)
        o.load.seed = seed_from_clock();
    struct live live = {.o = &o};
    o.load.tick = tick;
    o.load.arg = &live;
    struct load_result *r = mem_zalloc(sizeof *r);
    interrupt_catch();
    progress_begin(&live.progress, NULL, o.load.bytes_max, "%s", w->name);
    enum status st = load_run(&uri, &o.load, r, &e);
    progress_end(&live.progress);
    if (st == ST_OK || r->n_errors > 0) {
        if (cli->json)
            print_json(argv[first], &o, r);
        else
            print_report(argv[first], &o, r);
    }
    free(r);
    return st == ST_OK ? CLI_DONE : cli_failed(&e);
}

const struct cli_command bench_command = {
    .name = "bench",
    .args = "URI",
    .summary = "measure how quick an NBD server is, this or any other",
    .details =
        "The URI is nbd://HOST[:PORT][/EXPORT] or nbd+unix:///[EXPORT]?socket=PATH.\n"
        "Latencies are in microseconds. Requests, IOPS and MB/s (10^6 bytes) count reads and\n"
        "writes. A workload that writes ends with a FLUSH, which is part of the time. What is\n"
        "written does not compress, unless --compressible says so, and no two blocks are the\n"
        "same. read, write and rw go through the export in sequence, each connection through\n"
        "its own part, and begin again at the end. Ctrl-C ends it early, with a report. A\n"
        "request that is answered with an error ends it with exit status 1.",
    .options = options,
    .args_min = 1,
    .args_max = 1,
    .run = run,
};
