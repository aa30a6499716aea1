/*
 * Leases (G4, and "Ownership" in docs/architecture.md): several gateways on a store that knows
 * dead ones by their silence only.
 *
 * While the simulated world runs, it is checked after every event that at most one gateway may
 * answer for the volume, and that the owner key names that one. What a server would do between
 * looking up and replying is done by ask().
 */
#include "test.h"

#include <sys/wait.h>
#include <unistd.h>

#include "../sim/driver.h"
#include "../sim/seeds.h"
#include "volume/internal.h"
#include "volume/recovery.h"

#define LEASE_MS 3000u
#define SILENCE_MS (LEASE_MS + LEASE_MS / 8 + 100)
#define GATEWAYS_MAX 4u
#define NS_PER_MS 1000000ull

struct scene {
    struct drv *d;
    struct process *p[GATEWAYS_MAX];
    unsigned n;
    bool by_force; /* a volume may be taken before its owner's lease is over */
};

static struct sim_env *sim_env_of(const struct process *p)
{
    return container_of(p->env, struct sim_env, base);
}

static uint64_t now_ms(const struct scene *s)
{
    return sim_now_ns(s->d->sim) / NS_PER_MS;
}

static void begin_waiting(struct scene *s, uint64_t seed, unsigned n, uint32_t owner_wait_ms)
{
    struct drv_config config = {.seed = seed,
                                .size = 1u << 20,
                                .block_size = 4096,
                                .codec = -1,
                                .owner_wait_ms = owner_wait_ms,
                                .store = {.needs_heartbeat = true}};
    *s = (struct scene){.d = drv_new(&config)};
    while (s->n < n) {
        s->p[s->n] = process_start(s->d);
        process_open(s->d, s->p[s->n++]);
    }
}

static void begin(struct scene *s, uint64_t seed, unsigned n)
{
    begin_waiting(s, seed, n, 0);
}

static void end(struct scene *s)
{
    for (unsigned i = 0; i < s->n; i++)
        if (s->p[i])
            process_stop(s->d, s->p[i]);
    if (!s->d->violated)
        drv_check_store(s->d);
    uint64_t seed = s->d->c.seed;
    if (!drv_free(s->d))
        fail_msg("to replay: SEED=%llu\n", (unsigned long long)seed);
}

/* --- what is stored ----------------------------------------------------------------- */

static struct owner_record owner_of(struct scene *s, uint64_t branch)
{
    struct key key;
    struct slice head, body;
    struct owner_record rec = {0};
    key_owner(&key, branch);
    if (mem_store_peek(s->d->db, key_slice(&key), &head, &body) &&
        !owner_decode(key_slice(&key), head, &rec))
        drv_violation(s->d, "the owner record does not decode");
    return rec;
}

/* False where there is none. */
static bool session_of(struct scene *s, const uint8_t *id, struct session_record *rec)
{
    struct key key;
    struct slice head, body;
    key_session(&key, id);
    if (!mem_store_peek(s->d->db, key_slice(&key), &head, &body))
        return false;
    if (!session_decode(key_slice(&key), head, rec))
        drv_violation(s->d, "a session record does not decode");
    return true;
}

static bool owns_in_store(struct scene *s, uint64_t branch, const struct process *p)
{
    struct owner_record rec = owner_of(s, branch);
    return memcmp(rec.session, p->session.id, SESSION_ID_BYTES) == 0;
}

/* --- running ------------------------------------------------------------------------ */

static bool may_answer(struct process *p)
{
    return p->vol && volume_is_owned(p->vol) && !p->vol->lost &&
           session_holds(&p->session, p->env);
}

/* G4: at most one may answer, and it is the one that the store names. */
static void check(struct scene *s)
{
    unsigned n = 0;
    for (unsigned i = 0; i < s->n && !s->by_force; i++) {
        struct process *p = s->p[i];
        if (!p || !may_answer(p))
            continue;
        n++;
        if (!owns_in_store(s, s->d->branch, p))
            drv_violation(s->d, "gateway %u may answer, and the store names another", i);
    }
    if (n > 1)
        drv_violation(s->d, "%u gateways may answer for one volume", n);
}

static bool step(struct scene *s, uint64_t limit_ns)
{
    bool went = sim_step_by(s->d->sim, limit_ns);
    check(s);
    return went;
}

static void run_ms(struct scene *s, uint64_t ms)
{
    uint64_t until = sim_now_ns(s->d->sim) + ms * NS_PER_MS;
    while (!s->d->violated && sim_now_ns(s->d->sim) < until)
        step(s, until);
}

static bool run_while(struct scene *s, const bool *what, uint64_t ms)
{
    uint64_t until = sim_now_ns(s->d->sim) + ms * NS_PER_MS;
    while (*what && !s->d->violated && sim_now_ns(s->d->sim) < until)
        step(s, until);
    return !*what;
}

static void assert_sound(struct scene *s)
{
    if (s->d->violated)
        fail_msg("%s; to replay: SEED=%llu\n", s->d->what, (unsigned long long)s->d->c.seed);
}

/* --- requests ----------------------------------------------------------------------- */

/* A request of one block by a client of some gateway. */
struct ask {
    struct vol_io io;
    struct vol_seg segs[4];
    bool waits; /* for its answer, or for the grant of a write */
    struct process *p;
    uint8_t byte;
};

static void answered(struct vol_io *io)
{
    struct ask *a = container_of(io, struct ask, io);
    a->waits = false;
    if (io->kind != IO_READ || io->st != ST_OK)
        return;
    a->byte = io->segs[0].buf ? io->segs[0].buf->data[io->segs[0].offset] : 0;
    volume_release_segs(io);
}

static void read_begins(struct ask *a, struct process *p, uint64_t off)
{
    *a = (struct ask){.io = {.done = answered, .offset = off, .length = 4096, .segs_cap = 4},
                      .waits = true,
                      .p = p};
    a->io.segs = a->segs;
    if (volume_read(p->vol, &a->io)) {
        a->io.kind = IO_READ;
        answered(&a->io);
    }
}

static void write_begins_by(struct scene *s, struct ask *a, struct process *p,
                            struct vol_writer *writer, uint64_t off, uint8_t byte)
{
    *a = (struct ask){.io = {.done = answered,
                             .granted = answered,
                             .offset = off,
                             .length = 4096,
                             .writer = writer,
                             .segs_cap = 4},
                      .waits = true,
                      .p = p,
                      .byte = byte};
    a->io.segs = a->segs;
    if (volume_write_begin(p->vol, &a->io))
        a->waits = false;
    run_while(s, &a->waits, 60000);
}

static void write_begins(struct scene *s, struct ask *a, struct process *p, uint64_t off,
                         uint8_t byte)
{
    write_begins_by(s, a, p, NULL, off, byte);
}

/* Its payload has come. */
static void write_goes_on(struct ask *a)
{
    a->waits = true;
    volume_write_buffers(a->p->vol, &a->io);
    memset(a->segs[0].buf->data + a->segs[0].offset, a->byte, 4096);
    volume_write_commit(a->p->vol, &a->io, NULL);
    shard_submit(a->p->shard);
}

/* What the client hears. As a server does, keeps what the volume answered back while the session
 * is in doubt; nothing (ST_SHUTDOWN) where its connection is gone. */
static enum status heard(struct scene *s, struct ask *a, uint64_t ms)
{
    uint64_t until = now_ms(s) + ms;
    run_while(s, &a->waits, ms);
    while (!a->waits && !shard_may_answer(a->p->shard) && !a->p->lost && now_ms(s) < until)
        run_ms(s, 1);
    if (a->waits || now_ms(s) >= until) {
        drv_violation(s->d, "a request is not answered in %llu ms", (unsigned long long)ms);
        return ST_SHUTDOWN;
    }
    return a->p->lost ? ST_SHUTDOWN : a->io.st;
}

static enum status get(struct scene *s, struct process *p, uint64_t off, uint8_t *byte)
{
    struct ask a;
    read_begins(&a, p, off);
    enum status st = heard(s, &a, 60000);
    *byte = a.byte;
    return st;
}

static enum status put_by(struct scene *s, struct process *p, struct vol_writer *writer,
                          uint64_t off, uint8_t byte)
{
    struct ask a;
    write_begins_by(s, &a, p, writer, off, byte);
    if (a.io.st == ST_OK)
        write_goes_on(&a);
    return heard(s, &a, 60000);
}

static enum status put(struct scene *s, struct process *p, uint64_t off, uint8_t byte)
{
    return put_by(s, p, NULL, off, byte);
}

static enum status zero_by(struct scene *s, struct process *p, struct vol_writer *writer,
                           uint64_t off, bool trim)
{
    struct ask a = {.io = {.done = answered, .offset = off, .length = 4096, .writer = writer},
                    .waits = true,
                    .p = p};
    if (trim)
        volume_trim(p->vol, &a.io);
    else
        volume_zero(p->vol, &a.io);
    shard_submit(p->shard);
    return heard(s, &a, 60000);
}

static enum status resize(struct scene *s, struct process *p, uint64_t size)
{
    struct ask a = {.io = {.done = answered}, .waits = true, .p = p};
    volume_resize(p->vol, &a.io, size, false);
    return heard(s, &a, 60000);
}

/* The client comes back after it was cut off. */
static void reconnect(struct scene *s, struct process *p)
{
    process_close(s->d, p);
    process_open(s->d, p);
}

/* --- heartbeats --------------------------------------------------------------------- */

/* One that lives keeps its session and its volume for as long as it likes, at three heartbeats
 * a lease. */
static void heartbeats_keep_a_session_alive(void **state)
{
    (void)state;
    struct seeds seeds = seeds_begin("heartbeats", 5, 0);
    for (uint64_t i = 0; i < seeds.count; i++) {
        struct scene s;
        struct session_record rec;
        uint8_t id[SESSION_ID_BYTES];
        begin(&s, seeds.first + i, 1);
        struct process *p = s.p[0];
        assert_int_equal(put(&s, p, 0, 1), ST_OK);
        memcpy(id, p->session.id, sizeof id);
        for (unsigned ms = 0; ms < 20 * LEASE_MS; ms += 7) {
            run_ms(&s, 7);
            assert_sound(&s);
            assert_true(session_holds(&p->session, p->env));
        }
        assert_true(may_answer(p));
        assert_memory_equal(p->session.id, id, sizeof id);
        assert_true(session_of(&s, id, &rec));
        assert_int_equal(rec.state, SESSION_LIVE);
        assert_in_range(rec.counter, 55, 65);
        assert_int_equal(atomic_load(&p->session.n_ended), 0);
        end(&s);
    }
}

/* "Counted from the sending": an answer that comes late does not make the lease longer. */
static void lease_is_counted_from_the_sending(void **state)
{
    (void)state;
    struct scene s;
    struct session_record rec;
    begin(&s, 1, 1);
    struct process *p = s.p[0];
    assert_int_equal(put(&s, p, 0, 1), ST_OK);
    mem_store_late_answers(p->store, 800 * NS_PER_MS);
    for (unsigned beat = 0; beat < 4; beat++) {
        assert_true(session_of(&s, p->session.id, &rec));
        uint64_t counter = rec.counter, stored_ns;
        while (rec.counter == counter && session_of(&s, p->session.id, &rec))
            run_ms(&s, 1);
        /* It was committed just now, so it was sent before. */
        stored_ns = sim_now_ns(s.d->sim);
        run_ms(&s, 900);
        assert_true(atomic_load(&p->session.valid_until_ns) <= stored_ns + LEASE_MS * NS_PER_MS);
        assert_true(atomic_load(&p->session.valid_until_ns) >
                    stored_ns + (LEASE_MS - 10) * NS_PER_MS);
    }
    mem_store_late_answers(p->store, 0);
    run_ms(&s, 2000);
    end(&s);
}

/* A store that stands still puts no session in doubt before its lease is over, and every one
 * then: nothing is answered until a heartbeat tells that nobody took anything. */
static void slow_store_makes_clients_wait(void **state)
{
    (void)state;
    struct seeds seeds = seeds_begin("slow store", 10, 0);
    for (uint64_t i = 0; i < seeds.count; i++) {
        struct scene s;
        struct session_record rec;
        uint8_t id[SESSION_ID_BYTES], byte;
        begin(&s, seeds.first + i, 1);
        struct process *p = s.p[0];
        assert_int_equal(put(&s, p, 0, 1), ST_OK);
        memcpy(id, p->session.id, sizeof id);
        for (unsigned round = 0; round < 5; round++) {
            run_ms(&s, drv_below(s.d, LEASE_MS));
            /* What is left of a lease when the next heartbeat is due, and a bit less. */
            mem_store_stall(s.d->db, NULL, (LEASE_MS * 2 / 3 - 20) * NS_PER_MS);
            for (unsigned ms = 0; ms < LEASE_MS; ms += 5) {
                run_ms(&s, 5);
                assert_true(session_holds(&p->session, p->env));
            }
        }
        assert_memory_equal(p->session.id, id, sizeof id);
        assert_false(p->lost);
        assert_int_equal(get(&s, p, 0, &byte), ST_OK);

        uint64_t until = atomic_load(&p->session.valid_until_ns);
        uint64_t back_ms = now_ms(&s) + 3 * LEASE_MS;
        struct ask a;
        mem_store_stall(s.d->db, NULL, 3 * LEASE_MS * NS_PER_MS);
        while (sim_now_ns(s.d->sim) + 5 * NS_PER_MS < until) {
            run_ms(&s, 1);
            assert_true(session_holds(&p->session, p->env));
        }
        run_ms(&s, 10 + drv_below(s.d, LEASE_MS));
        assert_false(session_holds(&p->session, p->env));
        /* A block that lies in its cache. */
        read_begins(&a, p, 0);
        assert_int_equal(heard(&s, &a, 60000), ST_OK);
        assert_int_equal(a.byte, 1);
        assert_true(now_ms(&s) >= back_ms);
        assert_in_range(now_ms(&s), back_ms, back_ms + 100);
        assert_false(p->lost);
        assert_memory_equal(p->session.id, id, sizeof id);
        assert_int_equal(atomic_load(&p->session.n_ended), 0);
        assert_true(session_of(&s, id, &rec));
        run_ms(&s, 3 * LEASE_MS);
        assert_true(may_answer(p));
        assert_sound(&s);
        end(&s);
    }
}

/* One that was stopped past its lease and that nobody missed goes on, once a heartbeat told so,
 * and no sooner, also where the answer to an old one comes first. */
static void stopped_owner_whom_nobody_missed_goes_on(void **state)
{
    (void)state;
    struct seeds seeds = seeds_begin("not missed", 20, 0);
    for (uint64_t i = 0; i < seeds.count; i++) {
        struct scene s;
        struct session_record rec;
        struct ask a;
        uint8_t id[SESSION_ID_BYTES];
        begin(&s, seeds.first + i, 1);
        struct process *p = s.p[0];
        assert_int_equal(put(&s, p, 0, 1), ST_OK);
        memcpy(id, p->session.id, sizeof id);
        run_ms(&s, 2100);
        mem_store_late_answers(p->store, 20 * NS_PER_MS);
        assert_true(session_of(&s, id, &rec));
        for (uint64_t counter = rec.counter; rec.counter == counter; session_of(&s, id, &rec))
            run_ms(&s, 1);
        uint64_t counter = rec.counter, committed_ns = sim_now_ns(s.d->sim);
        sim_env_pause(sim_env_of(p));
        mem_store_late_answers(p->store, 0);
        run_ms(&s, LEASE_MS * 2 / 3 + drv_below(s.d, 3 * LEASE_MS));
        sim_env_resume(sim_env_of(p));
        read_begins(&a, p, 0);
        assert_int_equal(heard(&s, &a, 60000), ST_OK);
        assert_int_equal(a.byte, 1);
        assert_true(session_of(&s, id, &rec));
        /* The heartbeat from before holds for a lease after its commit at most. */
        if (sim_now_ns(s.d->sim) >= committed_ns + LEASE_MS * NS_PER_MS)
            assert_true(rec.counter > counter);
        assert_false(p->lost);
        assert_memory_equal(p->session.id, id, sizeof id);
        assert_int_equal(atomic_load(&p->session.n_ended), 0);
        assert_sound(&s);
        end(&s);
    }
}

/* --- taking over -------------------------------------------------------------------- */

/* G4: one that was stopped for longer than a lease is replaced, after a whole lease and not
 * sooner, and when it runs again it neither commits nor answers, and goes on under a new
 * incarnation. */
static void stopped_owner_is_replaced(void **state)
{
    (void)state;
    struct seeds seeds = seeds_begin("stopped owner", 25, 0);
    for (uint64_t i = 0; i < seeds.count; i++) {
        struct scene s;
        struct ask early, sent, read;
        struct session_record rec;
        uint8_t byte, id[SESSION_ID_BYTES];
        begin(&s, seeds.first + i, 2);
        struct process *a = s.p[0], *b = s.p[1];
        assert_int_equal(put(&s, a, 0, 1), ST_OK);
        assert_int_equal(put(&s, a, 4096, 1), ST_OK);
        run_ms(&s, drv_below(s.d, 5000));
        memcpy(id, a->session.id, sizeof id);
        /* One write half received, one sent to the store, perhaps. */
        write_begins(&s, &early, a, 0, 0xaa);
        write_begins(&s, &sent, a, 8192, 0xbb);
        write_goes_on(&sent);
        run_ms(&s, drv_below(s.d, 2));
        uint64_t until = atomic_load(&a->session.valid_until_ns);
        sim_env_pause(sim_env_of(a));
        if (drv_one_in(s.d, 2))
            run_ms(&s, drv_below(s.d, 2 * LEASE_MS));
        uint64_t asked = now_ms(&s);
        assert_int_equal(get(&s, b, 0, &byte), ST_OK);
        assert_sound(&s);
        assert_int_equal(byte, 1);
        assert_true(sim_now_ns(s.d->sim) > until);
        assert_in_range(now_ms(&s) - asked, SILENCE_MS, SILENCE_MS + 200);
        assert_true(session_of(&s, id, &rec));
        assert_int_equal(rec.state, SESSION_FENCED);
        assert_int_equal(put(&s, b, 0, 2), ST_OK);

        sim_env_resume(sim_env_of(a));
        bool asks_at_once = drv_one_in(s.d, 2);
        if (asks_at_once) {
            /* A client's read finds the block in its cache before anything else happens. */
            read_begins(&read, a, 0);
            assert_int_equal(heard(&s, &read, 60000), ST_SHUTDOWN);
        } else {
            run_ms(&s, drv_below(s.d, 50));
        }
        if (early.io.stage == IO_GRANTED)
            write_goes_on(&early);
        assert_int_not_equal(heard(&s, &early, 60000), ST_OK);
        run_while(&s, &sent.waits, 60000);
        assert_true(a->lost);
        run_ms(&s, 1000);
        assert_sound(&s);
        assert_int_equal(get(&s, b, 0, &byte), ST_OK);
        assert_int_equal(byte, 2);

        assert_memory_not_equal(a->session.id, id, sizeof id);
        assert_true(session_of(&s, a->session.id, &rec));
        assert_int_equal(rec.state, SESSION_LIVE);
        assert_int_equal(rec.counter >= 1, 1);
        reconnect(&s, a);
        run_ms(&s, 500);
        assert_int_equal(get(&s, a, 0, &byte), ST_OK);
        assert_int_equal(byte, 2);
        assert_int_equal(put(&s, a, 0, 3), ST_OK);
        end(&s);
    }
}

/* A challenger that asked for long before does not count that time: only silence counts. */
static void living_owner_is_not_replaced(void **state)
{
    (void)state;
    struct seeds seeds = seeds_begin("living owner", 10, 0);
    for (uint64_t i = 0; i < seeds.count; i++) {
        struct scene s;
        struct ask knock;
        begin(&s, seeds.first + i, 2);
        struct process *a = s.p[0], *b = s.p[1];
        assert_int_equal(put(&s, a, 0, 1), ST_OK);
        read_begins(&knock, b, 0);
        /* In use all the time: it is refused, however often it asks. */
        for (unsigned tries = 0; tries < 3 * LEASE_MS / 20; tries++) {
            assert_int_equal(put(&s, a, 0, (uint8_t)tries), ST_OK);
            run_ms(&s, 20);
            if (!knock.waits) {
                assert_int_equal(knock.io.st, ST_PERM);
                read_begins(&knock, b, 0);
            }
        }
        assert_false(a->lost);
        /* Idle now: handed over. */
        if (heard(&s, &knock, 60000) != ST_OK) {
            read_begins(&knock, b, 0);
            assert_int_equal(heard(&s, &knock, 60000), ST_OK);
        }
        assert_sound(&s);
        end(&s);
    }
}

/* With time given to an owner that is busy: whoever waits has the volume soon after that fell
 * idle, or is refused when the time is over and not sooner, with a sentence that says by whom. */
static void busy_owner_is_waited_for(void **state)
{
    (void)state;
    struct seeds seeds = seeds_begin("busy owner", 10, 0);
    for (uint64_t i = 0; i < seeds.count; i++) {
        enum { WAIT_MS = 5000 };
        struct scene s;
        struct ask knock, other;
        begin_waiting(&s, seeds.first + i, 2, WAIT_MS);
        struct process *a = s.p[0], *b = s.p[1];
        assert_int_equal(put(&s, a, 0, 1), ST_OK);
        uint64_t asked = now_ms(&s), busy_ms = 1 + drv_below(s.d, 2 * WAIT_MS);
        bool reads = drv_one_in(s.d, 3); /* out of the cache */
        uint8_t byte;
        read_begins(&knock, b, 0);
        read_begins(&other, b, 4096);
        while (now_ms(&s) - asked < busy_ms && knock.waits) {
            if (reads)
                assert_int_equal(get(&s, a, 0, &byte), ST_OK);
            else
                assert_int_equal(put(&s, a, 0, 2), ST_OK);
            run_ms(&s, 20);
        }
        enum status st = heard(&s, &knock, 60000);
        uint64_t took_ms = now_ms(&s) - asked;
        assert_sound(&s);
        /* The wait and a question, which takes 100 ms of the owner's, and again after 200. */
        if (busy_ms < WAIT_MS - 300)
            assert_int_equal(st, ST_OK);
        if (st == ST_OK) {
            assert_in_range(took_ms, busy_ms, busy_ms + 700);
            assert_int_equal(knock.byte, reads ? 1 : 2);
        } else {
            char pid[32];
            assert_int_equal(st, ST_PERM);
            assert_in_range(took_ms, WAIT_MS, WAIT_MS + 500);
            snprintf(pid, sizeof pid, "process %u on ", a->session.pid);
            assert_non_null(strstr(volume_refusal(b->vol), pid));
            assert_non_null(strstr(volume_refusal(b->vol), " since 2"));
            /* Whoever waited with it is refused with it. */
            assert_false(other.waits);
            assert_int_equal(other.io.st, ST_PERM);
        }
        heard(&s, &other, 60000);
        assert_false(a->lost || b->lost);
        end(&s);
    }
}

/* Gateways hand the volume over as their clients like. One that has written goes on until clients of
 * another gateway changed something; from then on it reads, and never writes again. What commands
 * and clean-up do, and reads, wherever, do not count. */
static void old_writer_is_refused_when_others_changed_something(void **state)
{
    (void)state;
    enum { GATEWAYS = 3, WRITERS = 3, TURNS = 150 };
    struct seeds seeds = seeds_begin("old writers", 15, 0);
    unsigned refused = 0;
    for (uint64_t i = 0; i < seeds.count; i++) {
        struct scene s;
        struct vol_writer writers[GATEWAYS][WRITERS];
        uint64_t wrote[GATEWAYS][WRITERS] = {0}; /* turn of its last write; 0: none */
        uint64_t changed[GATEWAYS] = {0};        /* ... of anybody there */
        uint64_t size = 1u << 20;
        for (unsigned k = 0; k < GATEWAYS * WRITERS; k++)
            writers[k / WRITERS][k % WRITERS] = (struct vol_writer){.name = "old"};
        begin_waiting(&s, seeds.first + i, GATEWAYS, 5000);
        for (uint64_t turn = 1; turn <= TURNS && !s.d->violated; turn++) {
            unsigned g = (unsigned)drv_below(s.d, GATEWAYS), w = (unsigned)drv_below(s.d, WRITERS);
            uint64_t off = 4096 * drv_below(s.d, 64), what = drv_below(s.d, 10), others = 0;
            struct vol_writer *writer = &writers[g][w];
            uint8_t byte;
            for (unsigned k = 0; k < GATEWAYS; k++)
                if (k != g && changed[k] > others)
                    others = changed[k];
            bool may = !wrote[g][w] || wrote[g][w] > others;
            if (what == 0) {
                /* It connects again. */
                *writer = (struct vol_writer){.name = "again"};
                wrote[g][w] = 0;
            } else if (what == 1) {
                assert_int_equal(resize(&s, s.p[g], size += 4096), ST_OK);
            } else if (what <= 3) {
                assert_int_equal(get(&s, s.p[g], off, &byte), ST_OK);
            } else {
                enum status st = what <= 6 ? put_by(&s, s.p[g], writer, off, (uint8_t)turn)
                                           : zero_by(&s, s.p[g], writer, off, what == 7);
                if (st != (may ? ST_OK : ST_PERM))
                    drv_violation(s.d, "turn %llu: a write at gateway %u gave %s",
                                  (unsigned long long)turn, g, status_text(st));
                if (may)
                    wrote[g][w] = changed[g] = turn;
                else if (!strstr(volume_refusal(s.p[g]->vol), "connect again"))
                    drv_violation(s.d, "refused with: %s", volume_refusal(s.p[g]->vol));
                refused += !may;
            }
        }
        assert_sound(&s);
        end(&s);
    }
    assert_true(refused > seeds.count);
}

/* Its clients' last requests take their time: whoever asks has the volume when they are over,
 * however little time he gives an owner. */
static void owner_that_ends_is_waited_for(void **state)
{
    (void)state;
    struct seeds seeds = seeds_begin("owner that ends", 10, 0);
    for (uint64_t i = 0; i < seeds.count; i++) {
        struct scene s;
        struct ask knock, last;
        begin(&s, seeds.first + i, 2);
        struct process *a = s.p[0], *b = s.p[1];
        assert_int_equal(put(&s, a, 0, 1), ST_OK);
        uint64_t busy_ms = drv_below(s.d, 3000);
        write_begins_by(&s, &last, a, NULL, 0, 2);
        shard_wait_no_more(a->shard);
        read_begins(&knock, b, 0);
        run_ms(&s, busy_ms);
        assert_true(knock.waits);
        write_goes_on(&last);
        assert_int_equal(heard(&s, &last, 60000), ST_OK);
        uint64_t over = now_ms(&s);
        assert_int_equal(heard(&s, &knock, 60000), ST_OK);
        assert_int_equal(knock.byte, 2);
        assert_in_range(now_ms(&s) - over, 0, 500);
        assert_sound(&s);
        assert_false(a->lost || b->lost);
        end(&s);
    }
}

/* Something lies in the mailbox that its owner can't make out, so nobody else gets through. */
static void set_deaf(struct scene *s, bool deaf)
{
    struct key key;
    key_mailbox(&key, s->d->branch);
    if (deaf)
        mem_store_poke(s->d->db, key_slice(&key), (struct slice){"?", 1});
    else
        mem_store_damage(s->d->db, key_slice(&key), MEM_REMOVE);
}

/* An owner whose mailbox is dead but whose heart beats is not replaced, however long it takes. */
static void heartbeat_alone_keeps_a_volume(void **state)
{
    (void)state;
    struct scene s;
    uint8_t byte;
    begin(&s, 3, 2);
    struct process *a = s.p[0], *b = s.p[1];
    assert_int_equal(put(&s, a, 0, 1), ST_OK);
    set_deaf(&s, true);
    assert_int_equal(get(&s, b, 0, &byte), ST_PERM);
    assert_sound(&s);
    assert_false(a->lost);
    set_deaf(&s, false);
    end(&s);
}

/* Of two that wait for the same dead owner one gets the volume, the other asks that one. */
static void one_of_two_challengers_wins(void **state)
{
    (void)state;
    struct seeds seeds = seeds_begin("two challengers", 20, 0);
    for (uint64_t i = 0; i < seeds.count; i++) {
        struct scene s;
        struct ask b, c;
        begin(&s, seeds.first + i, 3);
        assert_int_equal(put(&s, s.p[0], 0, 1), ST_OK);
        sim_env_pause(sim_env_of(s.p[0]));
        read_begins(&b, s.p[1], 0);
        if (drv_one_in(s.d, 2))
            run_ms(&s, drv_below(s.d, drv_one_in(s.d, 2) ? 100 : LEASE_MS));
        read_begins(&c, s.p[2], 0);
        uint64_t asked = now_ms(&s);
        while ((b.waits || c.waits) && now_ms(&s) < asked + 60000)
            run_ms(&s, 1);
        assert_sound(&s);
        assert_false(b.waits || c.waits);
        assert_int_equal(b.io.st, ST_OK);
        assert_int_equal(c.io.st, ST_OK);
        assert_true(b.byte == 1 && c.byte == 1);
        assert_in_range(now_ms(&s) - asked, 0, SILENCE_MS + 1500);
        assert_true(volume_is_owned(s.p[1]->vol) != volume_is_owned(s.p[2]->vol));
        sim_env_resume(sim_env_of(s.p[0]));
        run_ms(&s, 100);
        end(&s);
    }
}

/* Fenced once, all its volumes are free. */
static void fenced_sessions_other_volumes_are_free(void **state)
{
    (void)state;
    struct scene s;
    uint64_t other = 0;
    uint8_t byte;
    begin(&s, 5, 2);
    struct process *a = s.p[0], *b = s.p[1];
    struct process *a2 = process_beside(s.d, a, &other), *b2 = process_beside(s.d, b, &other);
    assert_int_equal(put(&s, a, 0, 1), ST_OK);
    assert_int_equal(put(&s, a2, 0, 7), ST_OK);
    sim_env_pause(sim_env_of(a));
    assert_int_equal(get(&s, b, 0, &byte), ST_OK);
    uint64_t began = now_ms(&s);
    assert_int_equal(get(&s, b2, 0, &byte), ST_OK);
    assert_int_equal(byte, 7);
    assert_in_range(now_ms(&s) - began, 0, 20);
    sim_env_resume(sim_env_of(a));
    run_ms(&s, 100);
    assert_true(a->lost && a2->lost);
    assert_sound(&s);
    end(&s);
}

/* --- a commit that lands late ------------------------------------------------------- */

struct late {
    struct scene *s;
    struct process *from, *to;
    bool done;
};

/* The old owner's commit gets through just before that of the one who takes over. */
static void lands_before(void *arg, struct store *handle, const struct store_commit *commit)
{
    struct late *l = arg;
    struct key key;
    key_owner(&key, l->s->d->branch);
    if (l->done || handle != l->to->store)
        return;
    for (size_t i = 0; i < commit->n_mutations; i++) {
        const struct store_mutation *m = &commit->mutations[i];
        if (m->key.len == key.len && !memcmp(m->key.data, key.bytes, key.len)) {
            l->done = true;
            mem_store_let_through(l->from->store);
            return;
        }
    }
}

/* A commit of the old owner between the read of the state and the take-over: what it brought
 * is known to the new owner, in the contents and in the books. */
static void late_commit_of_the_old_owner_counts(void **state)
{
    (void)state;
    struct seeds seeds = seeds_begin("late commit", 10, 0);
    for (uint64_t i = 0; i < seeds.count; i++) {
        struct scene s;
        struct ask w;
        uint8_t byte;
        begin(&s, seeds.first + i, 2);
        struct late late = {.s = &s, .from = s.p[0], .to = s.p[1]};
        assert_int_equal(put(&s, s.p[0], 0, 1), ST_OK);
        write_begins(&s, &w, s.p[0], 65536, 9);
        run_ms(&s, 1100);
        mem_store_stall(s.d->db, s.p[0]->store, 3600000 * NS_PER_MS);
        write_goes_on(&w);
        run_ms(&s, 50); /* on its way */
        sim_env_pause(sim_env_of(s.p[0]));
        mem_store_before_commit(s.d->db, lands_before, &late);
        assert_int_equal(get(&s, s.p[1], 65536, &byte), ST_OK);
        mem_store_before_commit(s.d->db, NULL, NULL);
        assert_true(late.done);
        assert_int_equal(byte, 9);
        assert_int_equal(put(&s, s.p[1], 131072, 5), ST_OK);
        sim_env_resume(sim_env_of(s.p[0]));
        run_while(&s, &w.waits, 60000);
        run_ms(&s, 100);
        assert_sound(&s);
        end(&s); /* looks at the books */
    }
}

/* A heartbeat in the moment of the take-over: the check of the session record refuses it. */
static void late_heartbeat_stops_a_take_over(void **state)
{
    (void)state;
    struct seeds seeds = seeds_begin("late heartbeat", 10, 0);
    for (uint64_t i = 0; i < seeds.count; i++) {
        struct scene s;
        struct ask a;
        begin(&s, seeds.first + i, 2);
        struct late late = {.s = &s, .from = s.p[0], .to = s.p[1]};
        assert_int_equal(put(&s, s.p[0], 0, 1), ST_OK);
        run_ms(&s, drv_below(s.d, LEASE_MS));
        mem_store_stall(s.d->db, s.p[0]->store, 3600000 * NS_PER_MS);
        run_ms(&s, LEASE_MS / 2); /* a heartbeat is on its way */
        sim_env_pause(sim_env_of(s.p[0]));
        mem_store_before_commit(s.d->db, lands_before, &late);
        read_begins(&a, s.p[1], 0);
        uint64_t until = sim_now_ns(s.d->sim) + 60000 * NS_PER_MS;
        while (!late.done && sim_now_ns(s.d->sim) < until)
            step(&s, until);
        mem_store_before_commit(s.d->db, NULL, NULL);
        assert_true(late.done);
        assert_false(owns_in_store(&s, s.d->branch, s.p[1]));
        uint64_t began = now_ms(&s);
        assert_int_equal(heard(&s, &a, 60000), ST_OK);
        assert_true(now_ms(&s) - began >= SILENCE_MS);
        sim_env_resume(sim_env_of(s.p[0]));
        run_ms(&s, 100);
        assert_sound(&s);
        end(&s);
    }
}

/* Taking was under way when the session ended: it is not ours under the old name. */
static void acquire_of_an_ended_session_starts_over(void **state)
{
    (void)state;
    struct seeds seeds = seeds_begin("acquire and loss", 10, 0);
    for (uint64_t i = 0; i < seeds.count; i++) {
        struct scene s;
        struct ask a;
        uint8_t id[SESSION_ID_BYTES], byte;
        begin(&s, seeds.first + i, 2);
        struct process *p = s.p[0];
        memcpy(id, p->session.id, sizeof id);
        bool fenced = drv_one_in(s.d, 2);
        if (fenced) {
            /* Its commit happens, and is answered when others have long fenced the session. */
            mem_store_late_answers(p->store, 3 * LEASE_MS * NS_PER_MS);
            read_begins(&a, p, 0);
            while (!owns_in_store(&s, s.d->branch, p))
                run_ms(&s, 1);
            mem_store_late_answers(p->store, 0);
            mem_store_stall(s.d->db, p->store, 3 * LEASE_MS * NS_PER_MS);
            assert_int_equal(get(&s, s.p[1], 0, &byte), ST_OK);
        } else {
            mem_store_stall(s.d->db, NULL, 2 * LEASE_MS * NS_PER_MS);
            read_begins(&a, p, 0);
        }
        assert_int_equal(heard(&s, &a, 60000), ST_OK);
        assert_sound(&s);
        assert_int_equal(atomic_load(&p->session.n_ended), fenced);
        assert_int_equal(memcmp(p->session.id, id, sizeof id) != 0, fenced);
        assert_true(owns_in_store(&s, s.d->branch, p));
        assert_false(p->lost);
        end(&s);
    }
}

/* --- the same machine --------------------------------------------------------------- */

/* A gateway that crashed and was started again on its machine: nobody waits for a lease. */
static void dead_process_of_this_machine_is_replaced_at_once(void **state)
{
    (void)state;
    struct scene s;
    struct key key;
    struct slice head, body;
    struct session_record rec;
    uint8_t byte, bytes[RECORD_BYTES_MAX];
    begin(&s, 6, 2);
    s.by_force = true; /* it is not really gone */
    struct process *a = s.p[0], *b = s.p[1];
    assert_int_equal(put(&s, a, 0, 1), ST_OK);
    sim_env_pause(sim_env_of(a));
    run_ms(&s, 10);

    /* The record says what one of a process would that is gone by now. */
    int fds[2];
    struct process_id gone;
    assert_int_equal(pipe(fds), 0);
    pid_t child = fork();
    if (child == 0) {
        process_self(&gone);
        _exit(write(fds[1], &gone, sizeof gone) != sizeof gone);
    }
    assert_int_equal(read(fds[0], &gone, sizeof gone), sizeof gone);
    assert_int_equal(waitpid(child, NULL, 0), child);
    close(fds[0]);
    close(fds[1]);
    key_session(&key, a->session.id);
    assert_true(mem_store_peek(s.d->db, key_slice(&key), &head, &body));
    assert_true(session_decode(key_slice(&key), head, &rec));
    rec.process = gone;
    size_t len = session_encode(&rec, key_slice(&key), bytes);
    mem_store_poke(s.d->db, key_slice(&key), (struct slice){bytes, len});

    uint64_t began = now_ms(&s);
    assert_int_equal(get(&s, b, 0, &byte), ST_OK);
    assert_int_equal(byte, 1);
    assert_in_range(now_ms(&s) - began, 0, 50);
    assert_true(session_of(&s, a->session.id, &rec));
    assert_int_equal(rec.state, SESSION_FENCED);
    sim_env_resume(sim_env_of(a));
    run_ms(&s, LEASE_MS / 3 + 100); /* its next heartbeat is refused */
    assert_true(a->lost);
    assert_sound(&s);
    end(&s);
}

/* --- commands ----------------------------------------------------------------------- */

static void asked(struct catalog_op *op)
{
    op->meta.format = 77;
}

/* Asks as a command does; gives the answer and how long it took. */
static enum status command_asks(struct scene *s, struct process *p, uint32_t wait_ms, bool fence,
                                uint64_t *took_ms)
{
    struct catalog_entry entry = {.name = "v", .branch = s->d->branch};
    struct mail_record mail = {.kind = MAIL_SYNC};
    struct catalog_op op = {.done = asked};
    uint64_t began = now_ms(s);
    entry.owner = owner_of(s, s->d->branch);
    catalog_ask_owner(&op, p->store, p->env, &entry, &mail, wait_ms, NULL, fence);
    while (op.meta.format != 77 && now_ms(s) < began + 120000)
        run_ms(s, 1);
    *took_ms = now_ms(s) - began;
    enum status st = op.st;
    catalog_op_free(&op);
    return st;
}

/* A command asks an owner that lives, waits for the silence of one that does not, and fences it
 * only then, and only where it may. */
static void commands_ask_and_fence(void **state)
{
    (void)state;
    struct scene s;
    struct session_record rec;
    uint64_t ms;
    begin(&s, 7, 2);
    struct process *a = s.p[0], *b = s.p[1];
    assert_int_equal(put(&s, a, 0, 1), ST_OK);
    assert_int_equal(command_asks(&s, b, 30000, true, &ms), ST_OK);
    assert_in_range(ms, 0, 20);
    /* Alive, but deaf: a sign of life is all it takes not to be fenced. */
    set_deaf(&s, true);
    assert_int_equal(command_asks(&s, b, 5000, true, &ms), ST_UNAVAIL);
    assert_in_range(ms, 4999, 6000);
    set_deaf(&s, false);
    sim_env_pause(sim_env_of(a));
    assert_int_equal(command_asks(&s, b, 2 * SILENCE_MS, false, &ms), ST_UNAVAIL);
    assert_true(session_of(&s, a->session.id, &rec));
    assert_int_equal(rec.state, SESSION_LIVE);
    assert_int_equal(command_asks(&s, b, 500, true, &ms), ST_NOTFOUND);
    assert_in_range(ms, SILENCE_MS, SILENCE_MS + 1000);
    assert_true(session_of(&s, a->session.id, &rec));
    assert_int_equal(rec.state, SESSION_FENCED);
    assert_int_equal(command_asks(&s, b, 500, true, &ms), ST_NOTFOUND);
    assert_in_range(ms, 0, 20);
    sim_env_resume(sim_env_of(a));
    run_ms(&s, 100);
    assert_true(a->lost);
    assert_sound(&s);
    end(&s);
}

/* --- keeping house ------------------------------------------------------------------ */

static uint64_t count_sessions(struct scene *s)
{
    struct key from, to;
    key_prefix(&from, 's');
    to = from;
    key_prefix_end(&to);
    return mem_store_keys_in(s->d->db, key_slice(&from), key_slice(&to));
}

static void swept(struct session_sweep *sweep)
{
    sweep->done = NULL;
}

static unsigned sweep_once(struct scene *s, struct session_sweep *w, struct process *p)
{
    w->done = swept;
    session_sweep_run(w, &p->session);
    while (w->done)
        run_ms(s, 1);
    return w->n_cleared;
}

#define SWEEP_MS 30000u

/* Records of the dead do not pile up, those of the living stay; a clean end leaves none. */
static void dead_sessions_are_swept(void **state)
{
    (void)state;
    struct scene s;
    struct session_sweep w = {0};
    uint8_t byte;
    begin(&s, 8, 3);
    struct process *a = s.p[0];
    assert_int_equal(put(&s, a, 0, 1), ST_OK);
    assert_int_equal(count_sessions(&s), 3);
    s.p[0] = NULL;
    process_crash(s.d, a);
    assert_int_equal(sweep_once(&s, &w, s.p[1]), 0);
    /* As a server does: now and then, and soon again where one may be dead. */
    run_ms(&s, SWEEP_MS);
    assert_int_equal(sweep_once(&s, &w, s.p[1]), 0);
    uint64_t looked = now_ms(&s);
    do {
        assert_int_equal(w.n_suspects, 1);
        run_ms(&s, SESSION_LOOK_MS);
    } while (!sweep_once(&s, &w, s.p[1]) && now_ms(&s) - looked < 10 * LEASE_MS);
    assert_in_range(now_ms(&s) - looked, SILENCE_MS, SILENCE_MS + SESSION_LOOK_MS + 100);
    assert_int_equal(w.n_cleared, 1);
    assert_int_equal(w.n_suspects, 0);
    assert_int_equal(count_sessions(&s), 2);
    /* And without a record it owns nothing. */
    uint64_t began = now_ms(&s);
    assert_int_equal(get(&s, s.p[1], 0, &byte), ST_OK);
    assert_int_equal(byte, 1);
    assert_in_range(now_ms(&s) - began, 0, 20);
    process_stop(s.d, s.p[2]);
    s.p[2] = NULL;
    assert_int_equal(count_sessions(&s), 1);
    session_sweep_free(&w);
    assert_sound(&s);
    end(&s);
}

/* An outage in which nobody reaches the store proves nothing against an owner: whoever waits for
 * it, or cleans up, does not take it for dead when the store comes back, although its
 * heartbeat comes after their look. One that is dead is replaced all the same, in as much time
 * as ever, not counting the outage. */
static void outage_is_not_silence(void **state)
{
    (void)state;
    struct seeds seeds = seeds_begin("outage", 20, 0);
    for (uint64_t i = 0; i < seeds.count; i++) {
        struct scene s;
        struct ask knock;
        struct session_sweep w = {0};
        struct session_record rec;
        uint8_t id[SESSION_ID_BYTES];
        begin_waiting(&s, seeds.first + i, 3, 600000);
        struct process *a = s.p[0], *b = s.p[1];
        bool dies = drv_one_in(s.d, 3);
        assert_int_equal(put(&s, a, 0, 1), ST_OK);
        memcpy(id, a->session.id, sizeof id);
        sweep_once(&s, &w, s.p[2]);
        /* Deaf, or it would simply let go. */
        set_deaf(&s, true);
        read_begins(&knock, b, 0);
        run_ms(&s, drv_below(s.d, 3 * LEASE_MS));
        uint64_t outage_ms = LEASE_MS * 3 / 2 + drv_below(s.d, 4 * LEASE_MS);
        mem_store_stall(s.d->db, NULL, outage_ms * NS_PER_MS);
        mem_store_stall(s.d->db, a->store, (outage_ms + 400) * NS_PER_MS);
        if (dies)
            sim_env_pause(sim_env_of(a));
        uint64_t began = now_ms(&s);
        run_ms(&s, outage_ms + 1);
        assert_int_equal(sweep_once(&s, &w, s.p[2]), 0);
        if (dies) {
            set_deaf(&s, false);
            assert_int_equal(heard(&s, &knock, 60000), ST_OK);
            assert_in_range(now_ms(&s) - began, outage_ms + SILENCE_MS * 2 / 3 - LEASE_MS / 2,
                            outage_ms + SILENCE_MS + 1000);
            sim_env_resume(sim_env_of(a));
            run_ms(&s, 100);
        } else {
            run_ms(&s, 2 * LEASE_MS);
            assert_int_equal(sweep_once(&s, &w, s.p[2]), 0);
            assert_true(session_of(&s, id, &rec));
            assert_int_equal(rec.state, SESSION_LIVE);
            assert_memory_equal(a->session.id, id, sizeof id);
            assert_false(a->lost);
            set_deaf(&s, false);
            assert_int_equal(heard(&s, &knock, 60000), ST_OK);
        }
        assert_int_equal(knock.byte, 1);
        session_sweep_free(&w);
        assert_sound(&s);
        end(&s);
    }
}

/* However many volumes: one heartbeat, and nothing else that comes again and again. */
static void idle_volumes_cost_one_heartbeat(void **state)
{
    (void)state;
    enum { VOLUMES = 1000, LEASES = 30 };
    struct scene s;
    struct mem_counts before, after;
    begin(&s, 9, 1);
    struct process *p = s.p[0];
    struct volume *volumes[VOLUMES];
    for (unsigned i = 0; i < VOLUMES; i++) {
        struct ask a;
        struct process view = {.env = p->env, .store = p->store, .shard = p->shard};
        char name[16];
        uint64_t own = s.d->branch;
        snprintf(name, sizeof name, "idle%u", i);
        s.d->branch = drv_make_volume(s.d, name);
        process_open(s.d, &view);
        s.d->branch = own;
        volume_unwatch_loss(&view.watcher);
        volumes[i] = view.vol;
        read_begins(&a, &view, 0);
        assert_int_equal(heard(&s, &a, 1000), ST_OK);
    }
    run_ms(&s, 5000);
    mem_store_counts(s.d->db, &before);
    run_ms(&s, LEASES * LEASE_MS);
    mem_store_counts(s.d->db, &after);
    assert_in_range(after.commits - before.commits, 3 * LEASES - 3, 3 * LEASES + 3);
    assert_int_equal(after.reads - before.reads, 0);
    for (unsigned i = 0; i < VOLUMES; i++)
        volume_close(volumes[i], NULL, NULL);
    run_ms(&s, 1000);
    assert_sound(&s);
    end(&s);
}

static bool anybodys(struct vol_io *io, const void *arg)
{
    (void)io;
    (void)arg;
    return true;
}

/* A gateway takes a volume, hears of it when its session is in doubt, and by then its client has left:
 * the owner key must not go on naming it, for it would answer nobody who wants the volume. */
static void volume_taken_for_nobody_is_given_back(void **state)
{
    (void)state;
    struct scene s;
    struct knock k;
    static const uint8_t nobody[SESSION_ID_BYTES];
    begin(&s, 21, 2);
    struct process *a = s.p[0];
    mem_store_late_answers(a->store, (LEASE_MS + 1000) * NS_PER_MS);
    drv_knock(a, &k);
    while (!owns_in_store(&s, s.d->branch, a))
        assert_true(sim_step(s.d->sim));
    mem_store_late_answers(a->store, 0);
    volume_withdraw(a->vol, anybodys, NULL);
    assert_true(k.answered);
    assert_int_equal(k.st, ST_SHUTDOWN);
    /* What a server does before it takes requests: it notices the doubt. */
    run_ms(&s, LEASE_MS + 100);
    shard_may_answer(a->shard);
    process_close(s.d, a);
    assert_false(s.d->violated);
    assert_memory_equal(owner_of(&s, s.d->branch).session, nobody, sizeof nobody);
    end(&s);
}

/* The hook of tests: two gateways on one volume by force. Nothing but the owner key stands
 * between them, and that suffices: the loser's next commit is refused. */
static void by_force_the_owner_key_decides(void **state)
{
    (void)state;
    struct scene s;
    struct session_record rec;
    struct ask w;
    uint8_t byte;
    begin(&s, 10, 2);
    s.by_force = true;
    struct process *a = s.p[0], *b = s.p[1];
    assert_int_equal(put(&s, a, 0, 1), ST_OK);
    b->session.skip_lease = true;
    uint64_t began = now_ms(&s);
    assert_int_equal(get(&s, b, 0, &byte), ST_OK);
    assert_in_range(now_ms(&s) - began, 0, 20);
    assert_true(session_of(&s, a->session.id, &rec));
    assert_int_equal(rec.state, SESSION_LIVE);
    assert_int_equal(put(&s, b, 0, 2), ST_OK);
    write_begins(&s, &w, a, 0, 3);
    write_goes_on(&w);
    assert_int_not_equal(heard(&s, &w, 60000), ST_OK);
    assert_true(a->lost);
    assert_int_equal(get(&s, b, 0, &byte), ST_OK);
    assert_int_equal(byte, 2);
    assert_int_equal(atomic_load(&a->session.n_ended), 0);
    end(&s);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(heartbeats_keep_a_session_alive),
        cmocka_unit_test(lease_is_counted_from_the_sending),
        cmocka_unit_test(slow_store_makes_clients_wait),
        cmocka_unit_test(stopped_owner_whom_nobody_missed_goes_on),
        cmocka_unit_test(stopped_owner_is_replaced),
        cmocka_unit_test(living_owner_is_not_replaced),
        cmocka_unit_test(busy_owner_is_waited_for),
        cmocka_unit_test(owner_that_ends_is_waited_for),
        cmocka_unit_test(old_writer_is_refused_when_others_changed_something),
        cmocka_unit_test(heartbeat_alone_keeps_a_volume),
        cmocka_unit_test(one_of_two_challengers_wins),
        cmocka_unit_test(fenced_sessions_other_volumes_are_free),
        cmocka_unit_test(late_commit_of_the_old_owner_counts),
        cmocka_unit_test(late_heartbeat_stops_a_take_over),
        cmocka_unit_test(acquire_of_an_ended_session_starts_over),
        cmocka_unit_test(dead_process_of_this_machine_is_replaced_at_once),
        cmocka_unit_test(commands_ask_and_fence),
        cmocka_unit_test(dead_sessions_are_swept),
        cmocka_unit_test(outage_is_not_silence),
        cmocka_unit_test(idle_volumes_cost_one_heartbeat),
        cmocka_unit_test(volume_taken_for_nobody_is_given_back),
        cmocka_unit_test(by_force_the_owner_key_decides),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
