/*
 * The stores of the simulator: what store.h promises holds on both kinds while processes on them
 * are cut off, stand still and die, everything is answered in the end, and a seed replays exactly.
 *
 * Every seed runs in a process of its own, and twice. Processes of its world have two reactors with
 * a few workers each, which go on asking until the end:
 *
 *   counters  are read, and raised by a commit that checks what was read
 *   data      is written by whoever the owner key names, under a check of that key; now and then
 *             somebody else puts itself there
 *   an own key is written by one worker only, which reads it as its own
 *   watches   on counters are armed before the counter is read
 */
#include "test.h"

#include <stdio.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include "../sim/seeds.h"
#include "../sim/stores.h"
#include "base/log.h"
#include "base/mem.h"

#define COUNTERS 4u
#define PROCESSES 3u
#define REACTORS 2u
#define WORKERS 3u /* of a reactor */
#define COUNTS_MAX 1000000u
#define NS_PER_MS 1000000ull
#define PATIENCE_MS 600000u

enum fate { FATE_SENT, FATE_DONE, FATE_REFUSED };

/* A value that somebody asked to have written. */
struct written {
    uint32_t number; /* of a counter: the count */
    enum fate fate;
};

struct proc;

struct worker {
    struct proc *p;
    struct sim_env *env;
    bool busy;
    unsigned kind, counter;
    uint64_t own; /* its own key holds this number, which is no other worker's */
    uint8_t own_key[10];
    /* one request */
    struct store_read read;
    struct store_get gets[2];
    struct store_commit commit;
    struct store_check check;
    struct store_mutation mutation;
    uint8_t old[16], new[16], body[2][3000];
    uint64_t id, floor;
    /* its watch */
    struct store_watch watch;
    unsigned watched;
    bool armed;
};

struct proc {
    struct sim_env *env[REACTORS];
    struct store *store;
    bool dead, paused, cut;
    struct worker *workers;
};

struct world {
    struct sim *sim;
    struct simstore *ss;
    uint64_t seed;
    bool log_kind, ended;
    struct proc *procs[PROCESSES];
    struct written *ids; /* by id */
    size_t n_ids, cap_ids;
    uint64_t counts[COUNTERS]; /* the highest that is known to have happened */
    bool winner[COUNTERS][COUNTS_MAX];
    uint64_t fired, ops, owners_seen;
    uint64_t last_owner, last_data; /* data of an older owner, as seen under the last one */
    uint64_t hash;
};

static struct world w;

static _Noreturn void wrong(const char *what, uint64_t a, uint64_t b)
{
    fprintf(stderr, "seed %llu at %llu us: %s (%llu, %llu)\n", (unsigned long long)w.seed,
            (unsigned long long)sim_now_ns(w.sim) / 1000, what, (unsigned long long)a,
            (unsigned long long)b);
    exit(1);
}

static void note(uint64_t a, uint64_t b)
{
    uint64_t mix[] = {sim_now_ns(w.sim), a, b};
    for (size_t i = 0; i < 3; i++)
        w.hash = (w.hash ^ mix[i]) * 0x9e3779b97f4a7c15u + 0x7f4a7c15u;
}

static uint64_t below(uint64_t n)
{
    return sim_below(w.sim, n);
}

static uint64_t new_id(uint32_t number)
{
    mem_grow(&w.ids, &w.cap_ids, w.n_ids + 1, sizeof *w.ids);
    w.ids[w.n_ids] = (struct written){number, FATE_SENT};
    return w.n_ids++;
}

/* --- keys and values ------------------------------------------------------------------- */

static struct slice counter_key(unsigned i)
{
    static const char *const names[COUNTERS] = {"\x02k0", "\x02k1", "\x02k2", "\x02k3"};
    return (struct slice){names[i], 3};
}

static struct slice text(const char *s)
{
    return (struct slice){s, strlen(s)};
}

/* A head: the id of who wrote it, and a number. */
static void put(uint8_t out[16], uint64_t id, uint64_t number)
{
    put_le64(out, id);
    put_le64(out + 8, number);
}

static uint64_t id_of(const struct store_get *get)
{
    if (get->st == ST_NOTFOUND)
        return 0;
    if (get->st != ST_OK || get->head.len != 16)
        wrong("a value of another form", get->st, get->head.len);
    uint64_t id = get_le64(get->head.data);
    if (id >= w.n_ids)
        wrong("a value that nobody wrote", id, w.n_ids);
    if (w.ids[id].fate == FATE_REFUSED)
        wrong("a value whose commit was refused", id, 0);
    const uint8_t *body = get->body;
    for (uint32_t i = 0; body && i < get->body_len; i++)
        if (body[i] != (uint8_t)(id + i))
            wrong("a body that is not its head's", id, i);
    return id;
}

/* --- workers --------------------------------------------------------------------------- */

static void turn(void *arg);

static void next(struct worker *k)
{
    k->busy = false;
    w.ops++;
    if (!w.ended)
        sim_at(k->env, below(2000000), turn, k);
}

static void send_commit(struct worker *k, struct slice key, struct slice check_key,
                        struct slice expected, bool with_body,
                        void (*done)(struct store_commit *commit, enum status st))
{
    uint32_t len = with_body ? (uint32_t)below(sizeof k->body[0]) : 0;
    for (uint32_t i = 0; i < len; i++)
        k->body[1][i] = (uint8_t)(k->id + i);
    k->mutation = (struct store_mutation){.kind = STORE_SET,
                                          .key = key,
                                          .head = {k->new, sizeof k->new},
                                          .body = {k->body[1], len}};
    k->check = (struct store_check){expected.len ? STORE_CHECK_VALUE : STORE_CHECK_ABSENT,
                                    check_key, expected};
    k->commit = (struct store_commit){.checks = &k->check,
                                      .mutations = &k->mutation,
                                      .n_checks = check_key.len ? 1 : 0,
                                      .n_mutations = 1,
                                      .tag = 1 + (uint64_t)k->counter,
                                      .done = done};
    store_commit(k->p->store, &k->env->base, &k->commit);
}

static void send_read(struct worker *k, struct slice a, struct slice b, bool own,
                      void (*done)(struct store_read *read, enum status st))
{
    k->gets[0] = (struct store_get){.key = a, .body = k->body[0], .body_cap = sizeof k->body[0]};
    k->gets[1] = (struct store_get){.key = b};
    k->read = (struct store_read){
        .gets = k->gets, .n_gets = b.len ? 2 : 1, .own = own, .done = done};
    store_read(k->p->store, &k->env->base, &k->read);
}

/* What became of the commit of k->id. */
static bool committed(struct worker *k, enum status st)
{
    note(k->id, st);
    if (st != ST_OK && st != ST_CONFLICT && !(st == ST_IO && w.log_kind))
        wrong("a commit's status", st, 0);
    w.ids[k->id].fate = st == ST_OK ? FATE_DONE : FATE_REFUSED;
    return st == ST_OK;
}

static void raised(struct store_commit *commit, enum status st)
{
    struct worker *k = container_of(commit, struct worker, commit);
    uint64_t number = w.ids[k->id].number;
    if (committed(k, st)) {
        if (number >= COUNTS_MAX || w.winner[k->counter][number])
            wrong("a count that somebody else had already", number, k->id);
        w.winner[k->counter][number] = true;
        if (number > w.counts[k->counter])
            w.counts[k->counter] = number;
    }
    next(k);
}

static bool read_failed(struct worker *k, enum status st)
{
    note(k->kind, st);
    if (st != ST_OK)
        wrong("a read's status", st, 0);
    return false;
}

static void counter_read(struct store_read *read, enum status st)
{
    struct worker *k = container_of(read, struct worker, read);
    read_failed(k, st);
    uint64_t id = id_of(&k->gets[0]), number = id ? w.ids[id].number : 0;
    note(id, number);
    if (number < k->floor)
        wrong("a read older than what was answered before it", number, k->floor);
    if (id)
        put(k->old, id, number);
    store_read_release(read);
    if (below(3) == 0) {
        next(k);
        return;
    }
    k->id = new_id((uint32_t)number + 1);
    put(k->new, k->id, number + 1);
    send_commit(k, counter_key(k->counter), counter_key(k->counter),
                (struct slice){k->old, id ? 16 : 0}, true, raised);
}

static void own_read(struct store_read *read, enum status st)
{
    struct worker *k = container_of(read, struct worker, read);
    read_failed(k, st);
    uint64_t id = id_of(&k->gets[0]);
    if (id != k->own)
        wrong("an own read that is not of the last own commit", id, k->own);
    store_read_release(read);
    next(k);
}

static void own_written(struct store_commit *commit, enum status st)
{
    struct worker *k = container_of(commit, struct worker, commit);
    if (committed(k, st))
        k->own = k->id;
    send_read(k, (struct slice){k->own_key, sizeof k->own_key}, (struct slice){NULL, 0}, true,
              own_read);
}

static void data_written(struct store_commit *commit, enum status st)
{
    struct worker *k = container_of(commit, struct worker, commit);
    committed(k, st);
    if (st == ST_OK && below(4)) {
        /* The same owner again, at once: that goes a shorter way. */
        uint32_t owner = w.ids[k->id].number;
        k->id = new_id(owner);
        put(k->new, k->id, owner);
        send_commit(k, text("\x02" "data"), text("\x02" "owner"), (struct slice){k->old, 16}, true,
                    data_written);
        return;
    }
    next(k);
}

static void owner_written(struct store_commit *commit, enum status st)
{
    struct worker *k = container_of(commit, struct worker, commit);
    if (!committed(k, st)) {
        next(k);
        return;
    }
    uint64_t owner = k->id;
    memcpy(k->old, k->new, 16);
    k->id = new_id((uint32_t)owner);
    put(k->new, k->id, owner);
    send_commit(k, text("\x02" "data"), text("\x02" "owner"), (struct slice){k->old, 16}, true,
                data_written);
}

/* Both at one version. Under one owner the data of an older one is always the same. */
static void owner_read(struct store_read *read, enum status st)
{
    struct worker *k = container_of(read, struct worker, read);
    read_failed(k, st);
    uint64_t data = id_of(&k->gets[0]), owner = id_of(&k->gets[1]);
    note(data, owner);
    store_read_release(read);
    if (data && w.ids[data].number != owner) {
        if (w.last_owner == owner && w.last_data != data)
            wrong("an owner that was replaced has written", data, w.last_data);
        w.owners_seen += w.last_owner != owner;
        w.last_owner = owner;
        w.last_data = data;
    }
    k->id = new_id(0);
    if (owner)
        put(k->old, owner, 0);
    put(k->new, k->id, 0);
    send_commit(k, text("\x02" "owner"), text("\x02" "owner"),
                (struct slice){k->old, owner ? 16 : 0}, false, owner_written);
}

static void fired(struct store_watch *watch)
{
    struct worker *k = container_of(watch, struct worker, watch);
    note(k->watched, 77);
    w.fired++;
    k->armed = false;
}

static void turn(void *arg)
{
    struct worker *k = arg;
    if (w.ended)
        return;
    k->busy = true;
    k->kind = (unsigned)below(8);
    k->counter = (unsigned)below(COUNTERS);
    switch (k->kind) {
    case 0:
        if (!k->armed) {
            k->watched = k->counter;
            k->armed = true;
            k->watch = (struct store_watch){.key = counter_key(k->watched), .fired = fired};
            store_watch(k->p->store, &k->env->base, &k->watch);
        } else if (below(2)) {
            store_watch_stop(&k->watch);
            k->armed = false;
        }
        next(k);
        return;
    case 1:
        k->id = new_id(0);
        put(k->new, k->id, 0);
        send_commit(k, (struct slice){k->own_key, sizeof k->own_key}, (struct slice){NULL, 0},
                    (struct slice){NULL, 0}, true, own_written);
        return;
    case 2:
        send_read(k, text("\x02" "data"), text("\x02" "owner"), false, owner_read);
        return;
    default:
        k->floor = w.counts[k->counter];
        send_read(k, counter_key(k->counter), (struct slice){NULL, 0}, false, counter_read);
        return;
    }
}

/* --- processes ------------------------------------------------------------------------- */

static struct proc *proc_start(void)
{
    static unsigned n_workers;
    struct proc *p = mem_zalloc(sizeof *p);
    for (unsigned i = 0; i < REACTORS; i++)
        p->env[i] = sim_env_new(w.sim);
    p->store = simstore_attach(w.ss, p->env[0]);
    p->workers = mem_zalloc(REACTORS * WORKERS * sizeof *p->workers);
    for (unsigned i = 0; i < REACTORS * WORKERS; i++) {
        struct worker *k = &p->workers[i];
        k->p = p;
        k->env = p->env[i % REACTORS];
        memcpy(k->own_key, "\x02own", 4);
        put_be32(k->own_key + 4, n_workers++);
        sim_at(k->env, below(2000000), turn, k);
    }
    return p;
}

static void proc_pause(struct proc *p, bool paused)
{
    if (p->paused == paused)
        return;
    p->paused = paused;
    for (unsigned i = 0; i < REACTORS; i++) {
        if (paused)
            sim_env_pause(p->env[i]);
        else
            sim_env_resume(p->env[i]);
    }
    simstore_paused(w.ss, p->store, paused);
}

static void proc_cut(struct proc *p, bool cut)
{
    p->cut = cut;
    if (!w.log_kind)
        simstore_cut(w.ss, p->store, cut);
}

/* Its reactors never run again. */
static void proc_die(struct proc *p)
{
    p->dead = true;
    for (unsigned i = 0; i < REACTORS; i++)
        sim_env_kill(p->env[i]);
    simstore_died(w.ss, p->store);
}

static void something(void)
{
    struct proc **p = &w.procs[below(PROCESSES)];
    switch (below(6)) {
    case 0:
    case 1:
        proc_pause(*p, !(*p)->paused);
        break;
    case 2:
    case 3:
        proc_cut(*p, !(*p)->cut);
        break;
    case 4:
        proc_die(*p);
        *p = proc_start();
        break;
    default:
        simstore_down(w.ss, below(4) == 0);
        break;
    }
}

static void run_until(uint64_t until_ns)
{
    while (sim_now_ns(w.sim) < until_ns)
        sim_step_by(w.sim, until_ns);
}

static bool all_idle(void)
{
    for (unsigned i = 0; i < PROCESSES; i++)
        for (unsigned k = 0; k < REACTORS * WORKERS; k++)
            if (w.procs[i]->workers[k].busy)
                return false;
    return true;
}

static bool none_armed(void)
{
    for (unsigned i = 0; i < PROCESSES; i++)
        for (unsigned k = 0; k < REACTORS * WORKERS; k++)
            if (w.procs[i]->workers[k].armed)
                return false;
    return true;
}

static void wait_for(bool (*condition)(void), const char *what)
{
    uint64_t until_ns = sim_now_ns(w.sim) + PATIENCE_MS * NS_PER_MS;
    while (!condition()) {
        if (sim_now_ns(w.sim) >= until_ns)
            wrong(what, 0, 0);
        sim_step_by(w.sim, until_ns);
    }
}

static bool last_answered;

static void last_done(struct store_commit *commit, enum status st)
{
    (void)commit;
    if (st != ST_OK)
        wrong("the last commit's status", st, 0);
    last_answered = true;
}

static bool is_last_answered(void)
{
    return last_answered;
}

/* --- a seed ---------------------------------------------------------------------------- */

struct outcome {
    uint64_t hash, ops, fired, owners_seen;
    uint64_t at_once, later, never; /* of commits around a cut, a pause, a death */
    struct simstore_counts counts;
};

struct job {
    void (*run)(const struct job *job, struct outcome *out);
    enum simstore_kind kind;
    uint64_t seed, ms;
    bool faults;
};

static void world_begin(const struct job *job)
{
    w.seed = job->seed;
    w.log_kind = job->kind == SIMSTORE_LOG;
    w.sim = sim_new(w.seed);
    w.ss = simstore_new(w.sim, job->kind, w.seed);
    new_id(0); /* none */
}

static void run_all(const struct job *job, struct outcome *out)
{
    uint64_t ms = job->ms;
    bool faults = job->faults;
    world_begin(job);
    uint32_t often = 5 + (uint32_t)below(40);
    if (faults)
        simstore_set_faults(w.ss, &(struct simstore_faults){
            .commit_slow = often, .slow_ms = 30, .commit_fails = often, .commit_unknown = often,
            .late_ms_max = 1 + (uint32_t)below(60), .read_fails = often * 4});
    for (unsigned i = 0; i < PROCESSES; i++)
        w.procs[i] = proc_start();
    uint64_t end_ns = sim_now_ns(w.sim) + ms * NS_PER_MS;
    while (sim_now_ns(w.sim) < end_ns) {
        run_until(sim_now_ns(w.sim) + below(faults ? 60 * NS_PER_MS : ms * NS_PER_MS));
        if (faults)
            something();
    }
    simstore_down(w.ss, false);
    for (unsigned i = 0; i < PROCESSES; i++) {
        proc_pause(w.procs[i], false);
        proc_cut(w.procs[i], false);
    }
    w.ended = true;
    simstore_set_faults(w.ss, &(struct simstore_faults){0});
    wait_for(all_idle, "requests are never answered");
    /* Whatever is still watched changes once more. */
    uint8_t head[16];
    struct store_mutation m[COUNTERS];
    struct store_commit last = {.mutations = m, .n_mutations = COUNTERS, .done = last_done};
    for (unsigned i = 0; i < COUNTERS; i++) {
        struct slice got = {NULL, 0};
        if (simstore_peek(w.ss, counter_key(i), &got)) {
            struct store_get get = {.st = ST_OK, .head = got};
            if (w.ids[id_of(&get)].number < w.counts[i])
                wrong("a count that was answered is lost", w.counts[i], i);
        } else if (w.counts[i]) {
            wrong("a counter is lost", w.counts[i], i);
        }
        put(head, UINT64_MAX, 0);
        m[i] = (struct store_mutation){
            .kind = STORE_SET, .key = counter_key(i), .head = {head, sizeof head}};
    }
    store_commit(w.procs[0]->store, &w.procs[0]->env[0]->base, &last);
    wait_for(is_last_answered, "the last commit is not answered");
    wait_for(none_armed, "a watch does not fire");
    for (unsigned i = 0; i < PROCESSES; i++)
        simstore_detach(w.ss, w.procs[i]->store);
    sim_run_idle(w.sim, 1000000);
    note(w.ops, w.n_ids);
    *out = (struct outcome){
        .hash = w.hash, .ops = w.ops, .fired = w.fired, .owners_seen = w.owners_seen};
    simstore_counts(w.ss, &out->counts);
    if (out->counts.violations)
        wrong("rules were broken", out->counts.violations, 0);
}

static struct outcome in_child(const struct job *job)
{
    struct outcome out = {0};
    int p[2], status;
    fflush(stdout);
    assert_int_equal(pipe(p), 0);
    pid_t pid = fork();
    assert_true(pid >= 0);
    if (pid == 0) {
        log_set_level(LOG_LEVEL_ERROR);
        job->run(job, &out);
        _exit(write(p[1], &out, sizeof out) == sizeof out ? 0 : 1);
    }
    close(p[1]);
    bool told = read(p[0], &out, sizeof out) == sizeof out;
    close(p[0]);
    assert_int_equal(waitpid(pid, &status, 0), pid);
    if (!told || status)
        fail_msg("to replay: SEED=%llu SEEDS=1\n", (unsigned long long)job->seed);
    return out;
}

static void add(struct outcome *sum, const struct outcome *one)
{
    const uint64_t *from = (const uint64_t *)(const void *)one;
    for (size_t i = 0; i < sizeof *one / sizeof *from; i++)
        ((uint64_t *)(void *)sum)[i] += from[i];
}

static void seeds(const char *what, enum simstore_kind kind)
{
    struct seeds s = seeds_begin(what, 60, 1000);
    struct outcome sum = {0};
    for (uint64_t i = 0; i < s.count; i++) {
        struct job job = {run_all, kind, s.first + i, s.steps, true};
        struct outcome one = in_child(&job), two = in_child(&job);
        if (memcmp(&one, &two, sizeof one) != 0)
            fail_msg("seed %llu does not replay\n", (unsigned long long)(s.first + i));
        add(&sum, &one);
    }
    print_message("# hash %016llx\n", (unsigned long long)sum.hash);
    print_message("# %llu requests, %llu watches fired, %llu new owners; %llu commits happened, "
                  "%llu refused, %llu reads\n",
                  (unsigned long long)sum.ops, (unsigned long long)sum.fired,
                  (unsigned long long)sum.owners_seen, (unsigned long long)sum.counts.commits,
                  (unsigned long long)sum.counts.conflicts, (unsigned long long)sum.counts.reads);
    print_message("# unknown outcomes %llu, late commits %llu (refused %llu), of those away "
                  "%llu, in others' batches %llu\n",
                  (unsigned long long)sum.counts.unknown_outcomes,
                  (unsigned long long)sum.counts.late_commits,
                  (unsigned long long)sum.counts.late_refused,
                  (unsigned long long)sum.counts.away_commits,
                  (unsigned long long)sum.counts.batched);
    assert_true(sum.ops && sum.fired && sum.owners_seen && sum.counts.commits &&
                sum.counts.conflicts && sum.counts.reads);
    if (kind == SIMSTORE_FDB && s.count >= 20)
        assert_true(sum.counts.unknown_outcomes && sum.counts.late_commits &&
                    sum.counts.late_refused && sum.counts.away_commits && sum.counts.batched);
}

static void the_log_store(void **state)
{
    (void)state;
    seeds("log store", SIMSTORE_LOG);
}

static void the_fdb_store(void **state)
{
    (void)state;
    seeds("FoundationDB's engine", SIMSTORE_FDB);
}

/* --- a commit around a cut, a pause, a death --------------------------------------------- */

enum { CUT, PAUSE, DEATH };

static bool is_there(void)
{
    struct slice head;
    return simstore_peek(w.ss, counter_key(0), &head);
}

/* Of one process a commit is under way when it is cut off, stands still or dies. */
static void run_link(const struct job *job, struct outcome *out)
{
    static const uint8_t head[16] = {1};
    struct store_mutation m = {
        .kind = STORE_SET, .key = counter_key(0), .head = {head, sizeof head}};
    struct store_commit c = {.mutations = &m, .n_mutations = 1, .done = last_done};
    world_begin(job);
    w.ended = true; /* the workers rest */
    struct proc *p = proc_start(), *other = proc_start();
    store_commit(p->store, &p->env[0]->base, &c);
    run_until(sim_now_ns(w.sim) + below(NS_PER_MS << below(3)));
    if (last_answered)
        return;
    bool before = is_there();
    if (job->ms == CUT)
        proc_cut(p, true);
    else if (job->ms == PAUSE)
        proc_pause(p, true);
    else
        proc_die(p);
    run_until(sim_now_ns(w.sim) + 8000 * NS_PER_MS);
    bool meanwhile = is_there();
    if (last_answered && job->ms != CUT)
        wrong("an answer to a process that does not run", job->ms, 0);
    if (last_answered && !meanwhile)
        wrong("an answer before it happened", job->ms, 0);
    out->at_once += !before && meanwhile;
    /* Others are not touched by it. */
    bool answered = last_answered;
    struct store_mutation n = {
        .kind = STORE_SET, .key = counter_key(1), .head = {head, sizeof head}};
    struct store_commit d = {.mutations = &n, .n_mutations = 1, .done = last_done};
    last_answered = false;
    store_commit(other->store, &other->env[0]->base, &d);
    wait_for(is_last_answered, "another process is held up");
    if (job->ms == DEATH) {
        out->never += !is_there();
        return;
    }
    last_answered = answered;
    proc_cut(p, false);
    proc_pause(p, false);
    wait_for(is_last_answered, "no answer after all");
    if (!is_there())
        wrong("an answered commit did not happen", job->ms, 0);
    out->later += !meanwhile;
}

static void one_process_alone(void **state)
{
    (void)state;
    static const char *const whats[] = {"cut off", "standing still", "dying"};
    struct seeds s = seeds_begin("one process alone", 40, 0);
    for (unsigned what = CUT; what <= DEATH; what++) {
        struct outcome sum = {0};
        bool all = false;
        for (uint64_t i = 0; i < s.count || (!all && i < 20 * s.count); i++) {
            struct outcome one = in_child(
                &(struct job){run_link, SIMSTORE_FDB, s.first + i, what, false});
            add(&sum, &one);
            all = sum.at_once && (what == DEATH ? sum.never : sum.later);
        }
        print_message("# %s: happened meanwhile %llu, later %llu, never %llu\n", whats[what],
                      (unsigned long long)sum.at_once, (unsigned long long)sum.later,
                      (unsigned long long)sum.never);
        if (s.count >= 40)
            assert_true(all);
    }
}

static double cpu_of_children(void)
{
    struct rusage r;
    assert_int_equal(getrusage(RUSAGE_CHILDREN, &r), 0);
    return (double)(r.ru_utime.tv_sec + r.ru_stime.tv_sec) +
           (double)(r.ru_utime.tv_usec + r.ru_stime.tv_usec) / 1e6;
}

/* Only with SPEED=seconds of the world: how many requests one second of CPU can do. */
static void speed(void **state)
{
    (void)state;
    uint64_t ms = seeds_env("SPEED", 0) * 1000;
    for (int kind = SIMSTORE_LOG; kind <= SIMSTORE_FDB; kind++) {
        double before = cpu_of_children();
        struct outcome o = in_child(&(struct job){run_all, (enum simstore_kind)kind, 3, ms, false});
        double s = cpu_of_children() - before;
        print_message("# %s: %llu commits and %llu reads in %.2f s of CPU: %.0f a second\n",
                      kind == SIMSTORE_LOG ? "log" : "fdb", (unsigned long long)o.counts.commits,
                      (unsigned long long)o.counts.reads, s,
                      (double)(o.counts.commits + o.counts.reads) / s);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(the_log_store),
        cmocka_unit_test(the_fdb_store),
        cmocka_unit_test(one_process_alone),
    };
    const struct CMUnitTest measured[] = {cmocka_unit_test(speed)};
    if (seeds_env("SPEED", 0))
        return cmocka_run_group_tests(measured, NULL, NULL);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
