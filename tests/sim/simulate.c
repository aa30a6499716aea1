/*
 * Runs seeds of the simulator (scenario.h), each in a process of its own, so that nothing of one
 * is left for the next, a crash is a failed seed, and any seed runs again exactly as it did.
 *
 * A run that was green says how much there was of what; one in which something never happened
 * that it is meant to show (takeovers, unknown outcomes, ...) has failed, too.
 */
#include <errno.h>
#include <getopt.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "base/check.h"
#include "scenario.h"
#include "seeds.h"

#define JOBS_MAX 64u
#define SEED_LIMIT_S 60
#define SEEDS 1000u
#define TAP_SEEDS 300u
#define TAP_SEEDS_LONG 20000u
#define SAID_BYTES_MAX 1000u

struct options {
    uint64_t first, seeds, jobs, failures_max, limit_s;
    struct scenario_options scenario;
    bool replay_check, tap;
};

struct job {
    bool runs;
    pid_t pid;
    int result, said; /* a pipe; the child's stderr */
    uint64_t seed;
    unsigned time; /* 0: the first; 1: the second one of the same seed, to be compared */
    time_t deadline;
};

struct totals {
    struct scenario_counts counts;
    uint64_t seeds, failures;
};

static const char *program;

static time_t now_s(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec;
}

static void add(struct scenario_counts *to, const struct scenario_counts *from)
{
#define ADD(name, text, needed) to->name += from->name;
    SCENARIO_COUNTS(ADD)
#undef ADD
}

/* --- one seed ----------------------------------------------------------------------------- */

static void child(const struct options *o, uint64_t seed, int result_fd, int said_fd)
{
    struct scenario_result result;
    struct scenario_options scenario = o->scenario;
    scenario.seed = seed;
    if (said_fd >= 0)
        dup2(said_fd, STDERR_FILENO);
    scenario_run(&scenario, &result);
    fflush(stdout);
    fflush(stderr);
    _exit(write(result_fd, &result, sizeof result) == (ssize_t)sizeof result ? 0 : 1);
}

static void start(const struct options *o, struct job *j, uint64_t seed, unsigned nth)
{
    int fds[2];
    if (pipe(fds) != 0) {
        perror("pipe");
        exit(1);
    }
    if (j->said < 0 && !o->scenario.trace)
        j->said = memfd_create("said", MFD_CLOEXEC);
    if (j->said >= 0 && (ftruncate(j->said, 0) != 0 || lseek(j->said, 0, SEEK_SET) != 0))
        perror("memfd");
    fflush(stdout);
    j->pid = fork();
    if (j->pid < 0) {
        perror("fork");
        exit(1);
    }
    if (j->pid == 0) {
        close(fds[0]);
        child(o, seed, fds[1], j->said);
    }
    close(fds[1]);
    j->result = fds[0];
    j->seed = seed;
    j->time = nth;
    j->deadline = now_s() + (time_t)o->limit_s;
    j->runs = true;
}

/* Takes what a child that has ended left, or ends one that takes too long. */
static void finish(const struct options *o, struct job *j, struct scenario_result *result)
{
    int status;
    ssize_t n = 0;
    bool late = now_s() >= j->deadline;
    if (late)
        kill(j->pid, SIGKILL);
    else
        n = read(j->result, result, sizeof *result);
    close(j->result);
    waitpid(j->pid, &status, 0);
    j->runs = false;
    if (n == (ssize_t)sizeof *result)
        return;
    memset(result, 0, sizeof *result);
    result->failed = true;
    if (late)
        snprintf(result->what, sizeof result->what, "took longer than %llu s",
                 (unsigned long long)o->limit_s);
    else if (WIFSIGNALED(status))
        snprintf(result->what, sizeof result->what, "ended by signal %d (%s)", WTERMSIG(status),
                 strsignal(WTERMSIG(status)));
    else
        snprintf(result->what, sizeof result->what, "ended with status %d without a result",
                 WEXITSTATUS(status));
}

static void report(const struct options *o, const struct job *j,
                   const struct scenario_result *result)
{
    char said[SAID_BYTES_MAX + 1];
    ssize_t n = 0;
    if (j->said >= 0) {
        off_t end = lseek(j->said, 0, SEEK_END);
        off_t from = end > (off_t)SAID_BYTES_MAX ? end - (off_t)SAID_BYTES_MAX : 0;
        n = pread(j->said, said, SAID_BYTES_MAX, from);
    }
    const char *engine = o->scenario.engine == SCENARIO_LOG   ? " --log-only"
                         : o->scenario.engine == SCENARIO_FDB ? " --fdb-only"
                                                              : "";
    char requests[40] = "";
    if (o->scenario.requests)
        snprintf(requests, sizeof requests, " --requests %u", o->scenario.requests);
    printf("# seed %llu: %s\n", (unsigned long long)j->seed, result->what);
    if (n > 0) {
        said[n] = '\0';
        for (char *line = strtok(said, "\n"); line; line = strtok(NULL, "\n"))
            printf("#   %s\n", line);
    }
    printf("#   again: %s --first %llu --trace%s%s\n", program, (unsigned long long)j->seed, engine,
           requests);
}

/* --- many --------------------------------------------------------------------------------- */

static void wait_for_some(const struct options *o, struct job *jobs)
{
    struct pollfd fds[JOBS_MAX];
    nfds_t n = 0;
    for (unsigned i = 0; i < o->jobs; i++)
        if (jobs[i].runs)
            fds[n++] = (struct pollfd){.fd = jobs[i].result, .events = POLLIN};
    if (poll(fds, n, 1000) < 0 && errno != EINTR)
        perror("poll");
}

static bool has_ended(const struct job *j)
{
    struct pollfd fd = {.fd = j->result, .events = POLLIN};
    return poll(&fd, 1, 0) == 1 || now_s() >= j->deadline;
}

/* Runs seeds; with o->replay_check each twice, one after the other. */
static void run_seeds(const struct options *o, struct totals *totals)
{
    struct job jobs[JOBS_MAX];
    struct scenario_result first_result[JOBS_MAX], result;
    uint64_t next = 0;
    unsigned running = 0;
    for (unsigned i = 0; i < JOBS_MAX; i++)
        jobs[i] = (struct job){.said = -1};
    for (;;) {
        for (unsigned i = 0; i < o->jobs; i++)
            if (!jobs[i].runs && next < o->seeds && totals->failures < o->failures_max) {
                start(o, &jobs[i], o->first + next++, 0);
                running++;
            }
        if (!running)
            break;
        wait_for_some(o, jobs);
        for (unsigned i = 0; i < o->jobs; i++) {
            struct job *j = &jobs[i];
            if (!j->runs || !has_ended(j))
                continue;
            finish(o, j, &result);
            if (o->replay_check && j->time == 0 && !result.failed) {
                first_result[i] = result;
                start(o, j, j->seed, 1);
                continue;
            }
            running--;
            if (!result.failed && j->time == 1 &&
                (result.hash != first_result[i].hash ||
                 memcmp(&result.counts, &first_result[i].counts, sizeof result.counts) != 0)) {
                result.failed = true;
                snprintf(result.what, sizeof result.what,
                         "the second time it was not as the first time");
            }
            totals->seeds++;
            add(&totals->counts, &result.counts);
            if (result.failed) {
                totals->failures++;
                report(o, j, &result);
            }
        }
    }
    for (unsigned i = 0; i < JOBS_MAX; i++)
        if (jobs[i].said >= 0)
            close(jobs[i].said);
}

/* Prints what there was; returns how many things there should have been and were not. */
static unsigned summarise(const struct totals *t, bool complain)
{
    unsigned missing = 0;
    printf("# %llu seeds, %llu failed\n", (unsigned long long)t->seeds,
           (unsigned long long)t->failures);
#define LINE(name, text, needed)                                                                   \
    printf("# %14llu %s\n", (unsigned long long)t->counts.name, text);                             \
    if (complain && t->counts.name == 0 &&                                                         \
        (needed == NEEDED || (needed == NEEDED_FDB && t->counts.seeds_fdb))) {                     \
        printf("# there were no \"%s\": nothing is shown about them\n", text);                     \
        missing++;                                                                                 \
    }
    SCENARIO_COUNTS(LINE)
#undef LINE
    fflush(stdout);
    return missing;
}

/* One group of the test run. */
static bool tap_group(struct options o, unsigned number, const char *name)
{
    struct totals totals = {.seeds = 0};
    printf("# %s: --first %llu --seeds %llu\n", name, (unsigned long long)o.first,
           (unsigned long long)o.seeds);
    run_seeds(&o, &totals);
    bool good = totals.failures == 0 && summarise(&totals, !o.replay_check) == 0;
    printf("%sok %u - simulate: %s\n", good ? "" : "not ", number, name);
    fflush(stdout);
    return good;
}

static int tap(const struct options *options)
{
    struct options o = *options;
    bool good = true;
    printf("1..3\n");
    o.seeds = options->seeds / 2;
    o.scenario.engine = SCENARIO_LOG;
    good &= tap_group(o, 1, "log store");
    o.scenario.engine = SCENARIO_FDB;
    good &= tap_group(o, 2, "FoundationDB engine");
    o.scenario.engine = SCENARIO_ANY;
    o.seeds = options->seeds / 30 + 1;
    o.replay_check = true;
    good &= tap_group(o, 3, "replays exactly");
    return good ? 0 : 1;
}

static void usage(void)
{
    printf("usage: %s [options]\n\n"
           "  --seeds N          so many seeds (default: the environment's SEEDS, or %u)\n"
           "  --first SEED       ... from this one on (default: SEED, or from the clock)\n"
           "  --jobs N           at once (default: 2)\n"
           "  --trace            one seed, and what happened in it, in words\n"
           "  --log-only, --fdb-only  one kind of store (default: each seed chooses)\n"
           "  --requests N       of clients in a seed, at least (default: 1000)\n"
           "  --replay-check     each seed twice, which has to be the same\n"
           "  --max-failures N   stop after so many (default: 5)\n"
           "  --limit SECONDS    a seed that takes longer has failed (default: %u)\n"
           "  --tap              as a test of the test run (default: %u seeds; with LONG=1 %u)\n",
           program, SEEDS, SEED_LIMIT_S, TAP_SEEDS, TAP_SEEDS_LONG);
}

static uint64_t number(const char *text)
{
    char *end;
    uint64_t n = strtoull(text, &end, 0);
    if (end == text || *end) {
        fprintf(stderr, "%s: \"%s\" is not a number\n", program, text);
        exit(2);
    }
    return n;
}

static void parse(int argc, char **argv, struct options *o)
{
    enum { FIRST = 1, N_SEEDS, JOBS, TRACE, LOG_ONLY, FDB_ONLY, REQUESTS, REPLAY, FAILURES, LIMIT,
           TAP, HELP };
    static const struct option table[] = {{"first", required_argument, NULL, FIRST},
                                          {"seeds", required_argument, NULL, N_SEEDS},
                                          {"jobs", required_argument, NULL, JOBS},
                                          {"trace", no_argument, NULL, TRACE},
                                          {"log-only", no_argument, NULL, LOG_ONLY},
                                          {"fdb-only", no_argument, NULL, FDB_ONLY},
                                          {"requests", required_argument, NULL, REQUESTS},
                                          {"replay-check", no_argument, NULL, REPLAY},
                                          {"max-failures", required_argument, NULL, FAILURES},
                                          {"limit", required_argument, NULL, LIMIT},
                                          {"tap", no_argument, NULL, TAP},
                                          {"help", no_argument, NULL, HELP},
                                          {0}};
    int code;
    while ((code = getopt_long(argc, argv, "", table, NULL)) != -1) {
        switch (code) {
        case FIRST:
            o->first = number(optarg);
            break;
        case N_SEEDS:
            o->seeds = number(optarg);
            break;
        case JOBS:
            o->jobs = number(optarg);
            break;
        case TRACE:
            o->scenario.trace = true;
            o->seeds = o->jobs = 1;
            break;
        case LOG_ONLY:
            o->scenario.engine = SCENARIO_LOG;
            break;
        case FDB_ONLY:
            o->scenario.engine = SCENARIO_FDB;
            break;
        case REQUESTS:
            o->scenario.requests = (uint32_t)number(optarg);
            break;
        case REPLAY:
            o->replay_check = true;
            break;
        case FAILURES:
            o->failures_max = number(optarg);
            break;
        case LIMIT:
            o->limit_s = number(optarg);
            break;
        case TAP:
            o->tap = true;
            break;
        case HELP:
            usage();
            exit(0);
        default:
            exit(2);
        }
    }
    if (optind != argc || o->jobs < 1 || o->jobs > JOBS_MAX || o->failures_max < 1) {
        fprintf(stderr, "%s: see --help\n", program);
        exit(2);
    }
}

int main(int argc, char **argv)
{
    struct seeds seeds = seeds_begin("simulate", SEEDS, 0);
    struct options o = {.first = seeds.first,
                        .seeds = seeds.count,
                        .jobs = 2,
                        .failures_max = 5,
                        .limit_s = SEED_LIMIT_S * seeds_env("SLOW", 1),
                        .scenario = {.requests = (uint32_t)seeds.steps}};
    program = argv[0];
    parse(argc, argv, &o);
    if (o.tap) {
        if (o.seeds == SEEDS)
            o.seeds = seeds_env("LONG", 0) ? TAP_SEEDS_LONG : TAP_SEEDS;
        return tap(&o);
    }
    struct totals totals = {.seeds = 0};
    printf("# --first %llu --seeds %llu\n", (unsigned long long)o.first,
           (unsigned long long)o.seeds);
    time_t begun = now_s();
    run_seeds(&o, &totals);
    unsigned missing = summarise(&totals, o.seeds > 1 && !o.replay_check);
    printf("# %lld s\n", (long long)(now_s() - begun));
    return totals.failures || missing ? 1 : 0;
}
