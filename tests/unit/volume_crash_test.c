/*
 * Deaths of processes and of the machine, and owners that change, under simulation: what was
 * answered is there (G1), what is there is the effect of a prefix (G2) of whole requests (G3),
 * and of two owners never both write (G4). At the end the test of the test: a store that
 * breaks its promises is found out. SEED, SEEDS, STEPS as in the model test.
 */
#include "test.h"

#include "../sim/driver.h"
#include "../sim/seeds.h"
#include "base/mem.h"
#include "volume/internal.h"

static uint64_t pick(uint64_t *state, uint64_t n)
{
    *state = *state * 6364136223846793005u + 1442695040888963407u;
    return (*state >> 33) % n;
}

static struct drv_config any_config(uint64_t seed, uint64_t *c)
{
    *c = seed * 2654435761u + 777;
    (void)pick(c, 2);
    struct drv_config config = {
        .seed = seed,
        .block_size = 4096u << pick(c, 5),
        .codec = (int)pick(c, 3),
        .size = 512 * (1 + pick(c, pick(c, 4) ? 12000 : 60)),
        .no_log = pick(c, 6) == 0,
        .seal_age_ms = pick(c, 2) ? 0 : 3,
        .write_bytes_max = pick(c, 2) ? 0 : 300000,
        .store = {.has_log = pick(c, 5) != 0, .batch_bytes_max = pick(c, 2) ? 0 : 1u << 20,
                  .clears_ranges = seed % 3 == 0},
    };
    if (pick(c, 3) == 0)
        config.log_bytes = 8u << 20;
    if (seed % 2)
        config.store.commit_bytes_max = COMMIT_BYTES_MIN;
    return config;
}

static void end(struct drv *d)
{
    uint64_t seed = d->c.seed;
    if (!d->violated)
        drv_verify_all(d);
    if (!d->violated)
        drv_close(d);
    if (!drv_free(d))
        fail_msg("to replay: SEED=%llu\n", (unsigned long long)seed);
}

/* One life after the other, each ended by a death of the process or a loss of power, now and
 * then one in the middle of the recovery from the one before. */
static void lives(struct drv *d, uint64_t n, uint64_t steps)
{
    drv_open(d);
    for (uint64_t life = 0; life < n && !d->violated; life++) {
        bool power = drv_one_in(d, 2);
        drv_steps(d, drv_below(d, steps));
        drv_moment(d, drv_below(d, 40));
        /* What was just answered is what is the easiest to lose. */
        if (!d->violated && drv_one_in(d, 3))
            drv_flush(d);
        if (d->violated)
            break;
        drv_crash(d, power);
        while (!d->violated && drv_one_in(d, 3)) {
            /* The next one dies while it takes over. */
            bool again = drv_one_in(d, 2);
            drv_open(d);
            drv_request_ownership(d);
            drv_moment(d, drv_below(d, 120));
            drv_crash(d, again);
            power |= again;
        }
        if (!d->violated)
            drv_recover(d, power);
    }
}

static void crashes(void **state)
{
    (void)state;
    struct seeds s = seeds_begin("crashes", 25, 150);
    for (uint64_t i = 0; i < s.count; i++) {
        uint64_t c;
        struct drv_config config = any_config(s.first + i, &c);
        struct drv *d = drv_new(&config);
        lives(d, 8, s.steps);
        end(d);
    }
}

/* Commits fail for a while: flushes may fail, data stays and gets there in the end. */
static void failing_commits(void **state)
{
    (void)state;
    struct seeds s = seeds_begin("failing commits", 12, 150);
    for (uint64_t i = 0; i < s.count; i++) {
        uint64_t c;
        struct drv_config config = any_config(s.first + i, &c);
        config.faults = true;
        struct drv *d = drv_new(&config);
        drv_open(d);
        for (unsigned round = 0; round < 6 && !d->violated; round++) {
            drv_steps(d, s.steps / 4);
            mem_store_set_faults(
                d->db, (struct mem_faults){.commit_fails = 2 + (uint32_t)drv_below(d, 3),
                                           .commit_status = drv_one_in(d, 3) ? ST_NOSPC : ST_IO});
            /* Writes wait for memory or a place in line while nothing commits; the clock of
             * the simulation runs through the retries. */
            drv_steps(d, drv_below(d, s.steps / 2));
            if (!d->violated && drv_one_in(d, 2)) {
                bool power = drv_one_in(d, 2);
                drv_crash(d, power);
                if (drv_one_in(d, 3))
                    mem_store_set_faults(d->db, (struct mem_faults){0});
                drv_recover(d, power);
            }
            mem_store_set_faults(d->db, (struct mem_faults){0});
            /* The first one may still hear of a commit that failed before. */
            if (!d->violated && drv_drain(d) && drv_sync(d) != ST_OK && drv_sync(d) != ST_OK)
                drv_violation(d, "a sync fails although the store works again");
        }
        end(d);
    }
}

/* A store that is out of reach for a while, and single reads that fail: errors perhaps, but
 * nothing is lost and nothing is wrong afterwards. */
static void failing_reads(void **state)
{
    (void)state;
    struct seeds s = seeds_begin("failing reads", 15, 250);
    for (uint64_t i = 0; i < s.count; i++) {
        uint64_t c;
        struct drv_config config = any_config(s.first + i, &c);
        config.faults = true;
        struct drv *d = drv_new(&config);
        drv_open(d);
        for (unsigned round = 0; round < 4 && !d->violated; round++) {
            drv_steps(d, s.steps / 4);
            mem_store_set_faults(d->db, (struct mem_faults){.reads_unavailable = 3});
            drv_steps(d, s.steps / 4);
            mem_store_set_faults(d->db, (struct mem_faults){0});
            drv_verify_all(d);
            if (!d->violated)
                drv_reopen(d, drv_one_in(d, 2));
        }
        end(d);
    }
}

/* Single blocks can't be read: errors, but never other bytes than were written. (What was
 * partly overwritten meanwhile is lost, so the rest is not read back.) */
static void failing_blocks(void **state)
{
    (void)state;
    struct seeds s = seeds_begin("failing blocks", 15, 400);
    uint64_t errors = 0;
    for (uint64_t i = 0; i < s.count; i++) {
        uint64_t c;
        struct drv_config config = any_config(s.first + i, &c);
        config.faults = true;
        config.size += 1u << 20;
        struct drv *d = drv_new(&config);
        drv_open(d);
        drv_steps(d, s.steps / 4);
        for (unsigned round = 0; round < 3 && !d->violated; round++) {
            /* So that there is something to read from the store. */
            drv_reopen(d, drv_one_in(d, 2));
            mem_store_set_faults(d->db, (struct mem_faults){.get_fails = 6});
            drv_steps(d, s.steps / 4);
            mem_store_set_faults(d->db, (struct mem_faults){0});
        }
        errors += d->seen_io;
        if (!d->violated)
            drv_close(d);
        if (!drv_free(d))
            fail_msg("to replay: SEED=%llu\n", (unsigned long long)config.seed);
    }
    assert_true(errors > 0 || s.count < 10);
}

/* The log can't be written, or can't be synced: writes go on, answered at their commit. */
static void failing_log(void **state)
{
    (void)state;
    struct seeds s = seeds_begin("failing log", 20, 200);
    for (uint64_t i = 0; i < s.count; i++) {
        uint64_t c;
        struct drv_config config = any_config(s.first + i, &c);
        config.store.has_log = true;
        config.no_log = false;
        struct drv *d = drv_new(&config);
        drv_open(d);
        for (unsigned round = 0; round < 3 && !d->violated; round++) {
            drv_steps(d, s.steps / 4);
            if (drv_one_in(d, 2))
                mem_store_set_faults(d->db, (struct mem_faults){.log_submit_fails = 5});
            else
                mem_store_set_faults(d->db, (struct mem_faults){.log_sync_fails = 2});
            drv_steps(d, drv_below(d, s.steps));
            bool power = drv_one_in(d, 2);
            if (!d->violated)
                drv_crash(d, power);
            mem_store_set_faults(d->db, (struct mem_faults){0});
            if (!d->violated)
                drv_recover(d, power);
        }
        end(d);
    }
}

/* --- owners ------------------------------------------------------------------------------ */

/* An idle owner hands the volume over when another process needs it, and gets it back. */
static void idle_owner_hands_over(void **state)
{
    (void)state;
    struct seeds s = seeds_begin("hand-over", 10, 60);
    for (uint64_t i = 0; i < s.count; i++) {
        uint64_t c;
        struct drv_config config = any_config(s.first + i, &c);
        struct drv *d = drv_new(&config);
        drv_open(d);
        struct process *a = d->p, *b = process_start(d);
        process_open(d, b);
        for (unsigned round = 0; round < 6 && !d->violated; round++) {
            drv_steps(d, s.steps);
            if (!drv_drain(d))
                break;
            /* From here on the other one works; what it does first asks for the volume. */
            d->p = d->p == a ? b : a;
            drv_verify_all(d);
            if (!d->violated && (a->lost || b->lost))
                drv_violation(d, "a volume that was handed over counts as lost");
        }
        if (!d->violated)
            process_stop(d, d->p == a ? b : a);
        end(d);
    }
}

/* An owner in use does not hand over; the other one is told so. */
static void busy_owner_keeps_it(void **state)
{
    (void)state;
    struct seeds s = seeds_begin("busy owner", 6, 400);
    for (uint64_t i = 0; i < s.count; i++) {
        uint64_t c;
        struct drv_config config = any_config(s.first + i, &c);
        struct drv *d = drv_new(&config);
        drv_open(d);
        assert_int_equal(drv_write(d, 0, 512, 0), ST_OK);
        struct process *a = d->p, *b = process_start(d);
        process_open(d, b);
        struct knock k;
        drv_knock(b, &k);
        /* Requests all the time, a millisecond apart. */
        for (unsigned step = 0; step < 2000 && !k.answered && !d->violated; step++) {
            drv_request(d);
            drv_wait_ms(d, 1);
        }
        if (!d->violated && (!k.answered || k.st != ST_PERM))
            drv_violation(d, "a second process was answered %d, not refused", (int)k.st);
        if (!d->violated && a->lost)
            drv_violation(d, "an owner in use lost its volume");
        drv_drain(d);
        if (!d->violated)
            process_stop(d, b);
        end(d);
    }
}

/* An owner that stands still is ended and its log replayed; once it is dead, whatever it still
 * had under way changes nothing. */
static void dead_owner_is_replaced(void **state)
{
    (void)state;
    struct seeds s = seeds_begin("dead owner", 12, 120);
    for (uint64_t i = 0; i < s.count; i++) {
        uint64_t c;
        struct drv_config config = any_config(s.first + i, &c);
        struct drv *d = drv_new(&config);
        drv_open(d);
        for (unsigned round = 0; round < 4 && !d->violated; round++) {
            struct process *b = process_start(d);
            process_open(d, b);
            drv_steps(d, drv_below(d, s.steps));
            if (d->violated)
                break;
            drv_crash(d, false);
            d->p = b;
            drv_recover(d, false);
        }
        end(d);
    }
}

/* A write of whole blocks by any process, outside of the driver's books. */
struct raw {
    struct vol_io io;
    struct vol_seg segs[VOL_SEGS(65536, 4096)];
    bool granted, answered;
};

static void raw_granted(struct vol_io *io)
{
    container_of(io, struct raw, io)->granted = true;
}

static void raw_done(struct vol_io *io)
{
    container_of(io, struct raw, io)->answered = true;
}

static bool raw_is_granted(void *arg)
{
    return ((struct raw *)arg)->granted;
}

static bool raw_is_answered(void *arg)
{
    return ((struct raw *)arg)->answered;
}

static enum status raw_begin(struct drv *d, struct process *p, struct raw *r, uint64_t off,
                             uint64_t len)
{
    *r = (struct raw){.io = {.done = raw_done,
                             .granted = raw_granted,
                             .offset = off,
                             .length = len,
                             .segs_cap = sizeof r->segs / sizeof r->segs[0]}};
    r->io.segs = r->segs;
    if (volume_write_begin(p->vol, &r->io))
        r->granted = true;
    if (!sim_run_until(d->sim, raw_is_granted, r, 100000))
        drv_violation(d, "a write is never granted");
    return r->io.st;
}

static enum status raw_commit(struct drv *d, struct process *p, struct raw *r)
{
    volume_write_buffers(p->vol, &r->io);
    for (uint32_t i = 0; i < r->io.n_segs; i++)
        memset(r->segs[i].buf->data + r->segs[i].offset, 0xee, r->segs[i].len);
    volume_write_commit(p->vol, &r->io, NULL);
    shard_submit(p->shard);
    if (!sim_run_until(d->sim, raw_is_answered, r, 100000))
        drv_violation(d, "a write is never answered");
    return r->io.st;
}

/* One that lost its volume without knowing it commits nothing and answers no write (G4). */
static void stale_owner_is_fenced(void **state)
{
    (void)state;
    struct seeds s = seeds_begin("stale owner", 10, 100);
    for (uint64_t i = 0; i < s.count; i++) {
        uint64_t c;
        struct drv_config config = any_config(s.first + i, &c);
        config.size = 4u << 20;
        config.no_log = true; /* with a log the stale one is dead, not fenced */
        struct drv *d = drv_new(&config);
        drv_open(d);
        drv_steps(d, s.steps);
        drv_verify_all(d);
        struct process *a = d->p, *b = process_start(d);
        process_open(d, b);
        struct raw early, late;
        if (!d->violated && raw_begin(d, a, &early, 0, 4096) != ST_OK)
            drv_violation(d, "a write was refused");
        mem_store_believe_dead(d->db, a->session.id);
        d->p = b;
        drv_verify_all(d);
        drv_steps(d, s.steps / 2);
        drv_verify_all(d);
        if (!d->violated) {
            enum status st = raw_begin(d, a, &late, 8192, 4096);
            if (st == ST_OK)
                st = raw_commit(d, a, &late);
            if (st == ST_OK)
                drv_violation(d, "a stale owner answered a write");
            if (!a->lost)
                drv_violation(d, "a stale owner does not know that it lost the volume");
            if (raw_commit(d, a, &early) != ST_PERM)
                drv_violation(d, "a stale owner answered a write that was under way");
        }
        drv_verify_all(d);
        if (!d->violated)
            process_stop(d, a);
        end(d);
    }
}

static void on_kill(void *arg, struct store *handle)
{
    *(struct store **)arg = handle;
    mem_store_crash_process(handle);
}

/* An owner that stands still and does not answer for a lease is ended by who needs the volume. */
static void silent_owner_is_ended(void **state)
{
    (void)state;
    struct seeds s = seeds_begin("silent owner", 8, 100);
    for (uint64_t i = 0; i < s.count; i++) {
        uint64_t c;
        struct drv_config config = any_config(s.first + i, &c);
        struct drv *d = drv_new(&config);
        struct store *killed = NULL;
        mem_store_on_kill(d->db, on_kill, &killed);
        drv_open(d);
        drv_steps(d, s.steps);
        struct process *a = d->p, *b = process_start(d);
        process_open(d, b);
        if (d->violated) {
            end(d);
            continue;
        }
        drv_stop_process(d, a);
        d->p = b;
        drv_recover(d, false);
        if (!d->violated && drv_write(d, 0, 512, 0) != ST_OK)
            drv_violation(d, "the volume can't be written after its owner was ended");
        if (!d->violated && killed != a->store)
            drv_violation(d, "the silent owner was not ended");
        if (!d->violated)
            process_crash(d, a);
        end(d);
    }
}

/* Two volumes on one log: what commits of the one give back may hold records of the other. */
static void volumes_share_a_log(void **state)
{
    (void)state;
    struct seeds s = seeds_begin("shared log", 12, 0);
    for (uint64_t i = 0; i < s.count; i++) {
        struct drv_config config = {.seed = s.first + i,
                                    .size = 4u << 20,
                                    .block_size = 16384,
                                    .log_bytes = 4u << 20,
                                    .seal_age_ms = 100000,
                                    .store = {.has_log = true}};
        struct drv *d = drv_new(&config);
        struct raw r;
        uint64_t other = 0;
        drv_open(d);
        struct process *q = process_beside(d, d->p, &other);
        uint64_t n = 1 + drv_below(d, 20);
        for (uint64_t k = 0; k < n && !d->violated; k++) {
            if (raw_begin(d, q, &r, k * 32768, 32768) != ST_OK || raw_commit(d, q, &r) != ST_OK)
                drv_violation(d, "a write to the second volume failed");
            for (uint64_t m = drv_below(d, 12); m > 0 && !d->violated; m--) {
                drv_write(d, drv_below(d, 64) * 16384, 16384 * (1 + drv_below(d, 16)), 0);
                if (drv_one_in(d, 3))
                    drv_sync(d);
            }
        }
        if (!d->violated) {
            drv_crash(d, false);
            drv_recover(d, false);
        }
        if (!d->violated) {
            struct process *p = d->p;
            q = process_beside(d, p, &other);
            struct volume *own = p->vol;
            uint8_t *got = mem_alloc(32768);
            p->vol = q->vol;
            for (uint64_t k = 0; k < n && !d->violated; k++) {
                bool right = drv_read(d, k * 32768, 32768, got) == ST_OK;
                for (unsigned at = 0; at < 32768 && right; at++)
                    right = got[at] == 0xee;
                if (!right)
                    drv_violation(d, "the second volume lost an answered write");
            }
            p->vol = own;
            free(got);
        }
        end(d);
    }
}

/* A write that was begun, and then the volume was made smaller. */
static void shrinking_meets_a_write_under_way(void **state)
{
    (void)state;
    for (unsigned has_log = 0; has_log < 2; has_log++) {
        struct drv_config config = {.seed = 1 + has_log,
                                    .size = 1u << 20,
                                    .block_size = 4096,
                                    .store = {.has_log = has_log}};
        struct drv *d = drv_new(&config);
        struct raw r;
        drv_open(d);
        drv_write(d, 0, 1u << 20, 0);
        assert_int_equal(raw_begin(d, d->p, &r, (1u << 20) - 8192, 8192), ST_OK);
        assert_int_equal(drv_resize(d, (1u << 20) - 4096), ST_OK);
        assert_int_equal(raw_commit(d, d->p, &r), ST_NOSPC);
        assert_int_equal(drv_resize(d, 1u << 20), ST_OK);
        drv_verify_all(d);
        drv_reopen(d, true);
        drv_verify_all(d);
        end(d);
    }
}

/* --- the test of the test ---------------------------------------------------------------- */

static bool finds(enum mem_lie lie, bool has_log, uint64_t seed)
{
    uint64_t c;
    struct drv_config config = any_config(seed, &c);
    config.size = 512 * (400 + pick(&c, 8000));
    config.store.has_log = has_log;
    config.no_log = false;
    config.store.lie = lie;
    config.seal_age_ms = has_log ? 0 : 3;
    config.faults = lie == MEM_IGNORES_CHECKS;
    struct drv *d = drv_new(&config);
    d->quiet = true;
    if (lie == MEM_IGNORES_CHECKS) {
        /* A second owner comes although the first lives, because nothing stops it. */
        drv_open(d);
        drv_steps(d, 60);
        if (!d->violated)
            drv_two_owners(d);
    } else {
        lives(d, 6, 120);
    }
    bool found = d->violated;
    if (found)
        print_message("# %s\n", d->what);
    if (!found) {
        /* Lies may leave anything behind. */
        d->violated = true;
    }
    drv_free(d);
    return found;
}

static void lies_are_found_out(void **state)
{
    (void)state;
    static const struct {
        enum mem_lie lie;
        bool has_log;
        const char *what;
    } lies[] = {
        {MEM_LOSES_SUBMITS, true, "answered before the log record survives the process"},
        {MEM_IGNORES_SYNC, true, "a flush that does nothing"},
        {MEM_REPLAYS_OVER_HOLES, true, "a log replayed over a hole"},
        {MEM_ACKS_EARLY, false, "answered before the commit"},
        {MEM_SWAPS_COMMITS, false, "commits swapped"},
        {MEM_TEARS_COMMITS, false, "a commit that happens in part"},
        {MEM_LOSES_MUTATIONS, true, "a block that was not stored"},
        {MEM_IGNORES_CHECKS, true, "the owner is not checked"},
    };
    for (size_t i = 0; i < sizeof lies / sizeof lies[0]; i++) {
        unsigned tries = 0;
        while (tries < 40 && !finds(lies[i].lie, lies[i].has_log, 1000 + tries))
            tries++;
        if (tries == 40)
            fail_msg("nothing noticed: %s\n", lies[i].what);
        print_message("# seed %u finds out: %s\n", 1000 + tries, lies[i].what);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(crashes),
        cmocka_unit_test(failing_commits),
        cmocka_unit_test(failing_reads),
        cmocka_unit_test(failing_blocks),
        cmocka_unit_test(failing_log),
        cmocka_unit_test(idle_owner_hands_over),
        cmocka_unit_test(busy_owner_keeps_it),
        cmocka_unit_test(dead_owner_is_replaced),
        cmocka_unit_test(stale_owner_is_fenced),
        cmocka_unit_test(silent_owner_is_ended),
        cmocka_unit_test(volumes_share_a_log),
        cmocka_unit_test(shrinking_meets_a_write_under_way),
        cmocka_unit_test(lies_are_found_out),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
