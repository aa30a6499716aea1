/*
 * The judge of the simulator: for every promise of history.h, histories that break it and their
 * nearest neighbours that do not; then a small model of a server that keeps all promises,
 * whose histories must be possible, and the same with planted faults. SEED, SEEDS as elsewhere;
 * STEPS: what happens per seed.
 */
#include "test.h"

#include "../sim/history.h"
#include "../sim/seeds.h"
#include "base/bytes.h"
#include "base/mem.h"
#include "chance.h"

/* --- histories by hand ------------------------------------------------------------------------ */

#define SCENE_SECTORS 4

struct scene {
    struct history *h;
    uint64_t now;
};

static struct scene scene(void)
{
    return (struct scene){.h = history_new(SCENE_SECTORS)};
}

static uint32_t begun(struct scene *s, enum history_kind kind, uint64_t first, uint32_t n,
                      uint32_t connection)
{
    uint32_t op = history_begin(s->h, ++s->now, kind, first, n);
    history_sent(s->h, ++s->now, op, connection);
    return op;
}

static uint32_t writes(struct scene *s, uint64_t first, uint32_t n, uint32_t connection)
{
    return begun(s, HISTORY_WRITE, first, n, connection);
}

static uint32_t zeroes(struct scene *s, uint64_t first, uint32_t n, uint32_t connection)
{
    return begun(s, HISTORY_ZERO, first, n, connection);
}

static uint32_t reads(struct scene *s, uint64_t first, uint32_t n)
{
    return begun(s, HISTORY_READ, first, n, 1000);
}

static void sent_again(struct scene *s, uint32_t op, uint32_t connection)
{
    history_sent(s->h, ++s->now, op, connection);
}

static void answered(struct scene *s, uint32_t op)
{
    history_answered(s->h, ++s->now, op, NULL);
}

static void failed(struct scene *s, uint32_t op)
{
    history_failed(s->h, ++s->now, op);
}

static void given_up(struct scene *s, uint32_t op)
{
    history_given_up(s->h, ++s->now, op);
}

/* A read is answered with what these operations put there (0: zeros), one for each sector. */
static void shows(struct scene *s, uint32_t read, uint64_t first, uint32_t n, const uint32_t *ops)
{
    uint8_t *data = mem_zalloc(n * HISTORY_SECTOR);
    for (uint32_t i = 0; i < n; i++)
        if (ops[i])
            history_fill(ops[i], first + i, data + i * HISTORY_SECTOR);
    history_answered(s->h, ++s->now, read, data);
    free(data);
}

#define OPS(...) ((const uint32_t[]){__VA_ARGS__})

/* A read of its own of some sectors; of one; the last one of all of them. */
static void read_shows(struct scene *s, uint64_t first, uint32_t n, const uint32_t *ops)
{
    shows(s, reads(s, first, n), first, n, ops);
}

static void sector_shows(struct scene *s, uint64_t sector, uint32_t op)
{
    read_shows(s, sector, 1, &op);
}

static void in_the_end(struct scene *s, uint32_t a, uint32_t b, uint32_t c, uint32_t d)
{
    read_shows(s, 0, SCENE_SECTORS, OPS(a, b, c, d));
}

static void possible_so_far(const struct scene *s)
{
    if (history_violation(s->h))
        fail_msg("called impossible: %s\n", history_violation(s->h));
}

static void possible(struct scene *s)
{
    const char *what = history_check(s->h);
    if (what)
        fail_msg("called impossible: %s\n", what);
    history_free(s->h);
}

/* The sentence begins with the broken guarantees and has these words. */
static void refused(struct scene *s, const char *guarantees, const char *words)
{
    const char *what = history_violation(s->h);
    if (!what)
        what = history_check(s->h);
    if (!what)
        fail_msg("taken as possible, expected: %s: ...%s...\n", guarantees, words);
    if (strncmp(what, guarantees, strlen(guarantees)) != 0 || !strstr(what, words))
        fail_msg("expected %s: ...%s..., it says: %s\n", guarantees, words, what);
    history_free(s->h);
}

static void answered_changes_are_seen(void **state)
{
    (void)state;
    struct scene s = scene();
    uint32_t w = writes(&s, 1, 1, 1);
    answered(&s, w);
    sector_shows(&s, 1, 0);
    refused(&s, "G1, G4: sector 1",
            "shows zeros, but newer is write #1 (sectors 1..1, connection 1");

    /* Sent before the answer: either. */
    for (int there = 0; there < 2; there++) {
        s = scene();
        w = writes(&s, 1, 1, 1);
        uint32_t r = reads(&s, 1, 1);
        answered(&s, w);
        shows(&s, r, 1, 1, OPS(there ? w : 0));
        in_the_end(&s, 0, w, 0, 0);
        possible(&s);
    }

    /* It was sent again after the answer. */
    s = scene();
    w = writes(&s, 1, 1, 1);
    uint32_t r = reads(&s, 1, 1);
    answered(&s, w);
    sent_again(&s, r, 1001);
    shows(&s, r, 1, 1, OPS(0));
    refused(&s, "G1, G4", "which had been answered");

    /* An older change, and the one between. */
    s = scene();
    w = writes(&s, 0, 1, 1);
    answered(&s, w);
    uint32_t w2 = writes(&s, 0, 1, 1);
    r = reads(&s, 0, 1);
    answered(&s, w2);
    shows(&s, r, 0, 1, OPS(w));
    sector_shows(&s, 0, w2);
    in_the_end(&s, w2, 0, 0, 0);
    possible(&s);
    s = scene();
    w = writes(&s, 0, 1, 1);
    answered(&s, w);
    w2 = writes(&s, 0, 1, 1);
    answered(&s, w2);
    sector_shows(&s, 0, w);
    refused(&s, "G1, G4: sector 0", "possible: write #2");

    /* Lost only at the end. */
    s = scene();
    w = writes(&s, 0, 4, 1);
    r = reads(&s, 0, 4);
    answered(&s, w);
    shows(&s, r, 0, 4, OPS(0, 0, 0, 0));
    in_the_end(&s, w, w, 0, w);
    refused(&s, "G1, G4: sector 2", "zeros");
}

static void nothing_is_seen_before_it_is_sent(void **state)
{
    (void)state;
    struct scene s = scene();
    uint32_t w = history_begin(s.h, ++s.now, HISTORY_WRITE, 0, 1);
    sector_shows(&s, 0, w);
    refused(&s, "G3, G5: sector 0", "which was never sent");
    s = scene();
    sector_shows(&s, 0, 7);
    refused(&s, "G3, G5: sector 0", "unknown");
    /* Given up without having been sent. */
    s = scene();
    w = history_begin(s.h, ++s.now, HISTORY_WRITE, 0, 1);
    given_up(&s, w);
    in_the_end(&s, 0, 0, 0, 0);
    possible(&s);
}

static void reads_do_not_go_back(void **state)
{
    (void)state;
    struct scene s = scene();
    uint32_t w = writes(&s, 2, 1, 1);
    sector_shows(&s, 2, w);
    sector_shows(&s, 2, 0);
    refused(&s, "G1, G4: sector 2", "which had been shown in sector 2 by read #2");

    /* At the same time they may differ, and one that began before that too. */
    s = scene();
    w = writes(&s, 2, 1, 1);
    uint32_t a = reads(&s, 2, 1), b = reads(&s, 2, 1);
    shows(&s, a, 2, 1, OPS(w));
    shows(&s, b, 2, 1, OPS(0));
    answered(&s, w);
    in_the_end(&s, 0, 0, w, 0);
    possible(&s);

    /* Forward is fine. */
    s = scene();
    w = writes(&s, 2, 1, 1);
    sector_shows(&s, 2, 0);
    sector_shows(&s, 2, w);
    answered(&s, w);
    in_the_end(&s, 0, 0, w, 0);
    possible(&s);

    /* What was shown stays, also where its change is given up. */
    s = scene();
    w = writes(&s, 2, 1, 1);
    sector_shows(&s, 2, w);
    given_up(&s, w);
    in_the_end(&s, 0, 0, 0, 0);
    refused(&s, "G1, G4: sector 2", "given up unanswered");
}

static void given_up_changes_may_be_there(void **state)
{
    (void)state;
    for (int there = 0; there < 2; there++) {
        struct scene s = scene();
        uint32_t w = writes(&s, 0, 1, 1);
        given_up(&s, w);
        in_the_end(&s, there ? w : 0, 0, 0, 0);
        possible(&s);
    }
    /* Later, too; not away again. */
    struct scene s = scene();
    uint32_t w = writes(&s, 0, 1, 1);
    given_up(&s, w);
    sector_shows(&s, 0, 0);
    sector_shows(&s, 0, w);
    possible_so_far(&s);
    sector_shows(&s, 0, 0);
    refused(&s, "G1, G4: sector 0", "which had been shown");
    /* An error is no more than that. */
    s = scene();
    w = writes(&s, 0, 1, 1);
    failed(&s, w);
    given_up(&s, w);
    sector_shows(&s, 0, 0);
    in_the_end(&s, w, 0, 0, 0);
    possible(&s);
}

static void ghosts_are_refused(void **state)
{
    (void)state;
    /* Given up, and a newer one answered. */
    struct scene s = scene();
    uint32_t old = writes(&s, 0, 1, 1);
    given_up(&s, old);
    uint32_t w = writes(&s, 0, 1, 2);
    answered(&s, w);
    sector_shows(&s, 0, old);
    refused(&s, "G1, G4, G8: sector 0", "write #1 (sectors 0..0, connection 1");
    /* Before that, while the newer one is under way, and not after it was shown. */
    s = scene();
    old = writes(&s, 0, 1, 1);
    given_up(&s, old);
    w = writes(&s, 0, 1, 2);
    sector_shows(&s, 0, old);
    sector_shows(&s, 0, w);
    possible_so_far(&s);
    sector_shows(&s, 0, old);
    refused(&s, "G1, G4, G8", "shown");
    /* The newer one given up as well: both may come, in their order. */
    s = scene();
    old = writes(&s, 0, 1, 1);
    given_up(&s, old);
    w = writes(&s, 0, 1, 2);
    given_up(&s, w);
    sector_shows(&s, 0, 0);
    sector_shows(&s, 0, old);
    in_the_end(&s, w, 0, 0, 0);
    possible(&s);

    /* A copy of what was answered on another connection. */
    s = scene();
    old = writes(&s, 0, 1, 1);
    sent_again(&s, old, 2);
    answered(&s, old);
    w = writes(&s, 0, 1, 2);
    answered(&s, w);
    in_the_end(&s, old, 0, 0, 0);
    refused(&s, "G1, G4, G8: sector 0", "connection 1, then 2");
    /* Nobody can tell where nothing newer came. */
    s = scene();
    old = writes(&s, 0, 1, 1);
    sent_again(&s, old, 2);
    sector_shows(&s, 0, old);
    answered(&s, old);
    in_the_end(&s, old, 0, 0, 0);
    possible(&s);

    /* Seen in a sector of its own, after a newer one was answered in another. */
    s = scene();
    old = writes(&s, 0, 2, 1);
    given_up(&s, old);
    w = writes(&s, 0, 1, 2);
    answered(&s, w);
    sector_shows(&s, 1, 0);
    sector_shows(&s, 1, old);
    refused(&s, "G8, G3", "showed that it was not there in sector 1");
    s = scene();
    uint32_t first = writes(&s, 0, 2, 1);
    answered(&s, first);
    old = writes(&s, 0, 2, 1);
    given_up(&s, old);
    w = writes(&s, 0, 1, 2);
    answered(&s, w);
    sector_shows(&s, 1, first);
    sector_shows(&s, 1, old);
    refused(&s, "G8, G3", "showed that it was not there in sector 1");
    /* The read that lacked it was sent before that. */
    s = scene();
    old = writes(&s, 0, 2, 1);
    given_up(&s, old);
    w = writes(&s, 0, 1, 2);
    uint32_t r = reads(&s, 1, 1);
    answered(&s, w);
    shows(&s, r, 1, 1, OPS(0));
    sector_shows(&s, 1, old);
    in_the_end(&s, w, old, 0, 0);
    possible(&s);
    /* Two reads at once that contradict each other after that. */
    s = scene();
    old = writes(&s, 0, 3, 1);
    given_up(&s, old);
    w = writes(&s, 0, 1, 2);
    answered(&s, w);
    uint32_t a = reads(&s, 1, 1), b = reads(&s, 2, 1);
    shows(&s, a, 1, 1, OPS(old));
    shows(&s, b, 2, 1, OPS(0));
    refused(&s, "G3, G8: sector 2", "can't have come later");
    /* And before that. */
    s = scene();
    old = writes(&s, 0, 3, 1);
    given_up(&s, old);
    w = writes(&s, 0, 1, 2);
    a = reads(&s, 1, 1), b = reads(&s, 2, 1);
    answered(&s, w);
    shows(&s, a, 1, 1, OPS(old));
    shows(&s, b, 2, 1, OPS(0));
    in_the_end(&s, w, old, old, 0);
    possible(&s);
}

static void changes_are_whole(void **state)
{
    (void)state;
    struct scene s = scene();
    uint32_t w = writes(&s, 0, 3, 1);
    given_up(&s, w);
    sector_shows(&s, 1, w);
    sector_shows(&s, 2, 0);
    refused(&s, "G3: sector 2", "which had been shown in sector 1");

    /* The other way round it came in between. */
    s = scene();
    w = writes(&s, 0, 3, 1);
    given_up(&s, w);
    sector_shows(&s, 2, 0);
    sector_shows(&s, 1, w);
    in_the_end(&s, w, w, w, 0);
    possible(&s);

    /* One read may come in the middle, but the last one may not. */
    s = scene();
    w = writes(&s, 0, 3, 1);
    read_shows(&s, 0, 3, OPS(w, 0, w));
    answered(&s, w);
    in_the_end(&s, w, w, w, 0);
    possible(&s);
    s = scene();
    w = writes(&s, 0, 3, 1);
    given_up(&s, w);
    in_the_end(&s, w, 0, w, 0);
    refused(&s, "G3: sector 1", "zeros");
    s = scene();
    w = writes(&s, 0, 3, 1);
    given_up(&s, w);
    in_the_end(&s, 0, w, w, 0);
    refused(&s, "G3: sector 0", "zeros");

    /* But for what changed since. */
    s = scene();
    w = writes(&s, 0, 3, 1);
    given_up(&s, w);
    uint32_t w2 = writes(&s, 1, 1, 2);
    answered(&s, w2);
    in_the_end(&s, w, w2, w, 0);
    possible(&s);
    s = scene();
    w = writes(&s, 0, 3, 1);
    given_up(&s, w);
    w2 = writes(&s, 1, 1, 2);
    answered(&s, w2);
    in_the_end(&s, w, w2, 0, 0);
    refused(&s, "G3, G8: sector 2", "can't have come later");
    for (int there = 0; there < 2; there++) {
        s = scene();
        w = writes(&s, 0, 3, 1);
        given_up(&s, w);
        w2 = writes(&s, 1, 1, 2);
        given_up(&s, w2);
        in_the_end(&s, w, there ? w2 : w, w, 0);
        possible(&s);
    }
}

static void connections_have_an_order(void **state)
{
    (void)state;
    /* The later one was answered. */
    struct scene s = scene();
    uint32_t a = writes(&s, 0, 1, 1), b = writes(&s, 1, 1, 1);
    given_up(&s, a);
    answered(&s, b);
    sector_shows(&s, 0, 0);
    refused(&s, "G2: sector 0", "which was sent before write #2");
    /* It was shown: the answer of the first, that it is refused, may have been lost. */
    s = scene();
    a = writes(&s, 0, 1, 1), b = writes(&s, 1, 1, 1);
    given_up(&s, a);
    given_up(&s, b);
    sector_shows(&s, 1, b);
    sector_shows(&s, 0, 0);
    in_the_end(&s, 0, b, 0, 0);
    possible(&s);
    /* Only in the end. */
    s = scene();
    a = writes(&s, 0, 1, 1), b = writes(&s, 1, 1, 1);
    given_up(&s, a);
    answered(&s, b);
    in_the_end(&s, 0, b, 0, 0);
    refused(&s, "G2: sector 0", "which had been answered");
    /* The earlier one alone, both, none. */
    for (int n = 0; n < 3; n++) {
        s = scene();
        a = writes(&s, 0, 1, 1), b = writes(&s, 1, 1, 1);
        given_up(&s, a);
        given_up(&s, b);
        in_the_end(&s, n > 0 ? a : 0, n > 1 ? b : 0, 0, 0);
        possible(&s);
    }
    /* On two connections. */
    s = scene();
    a = writes(&s, 0, 1, 1), b = writes(&s, 1, 1, 2);
    given_up(&s, a);
    answered(&s, b);
    in_the_end(&s, 0, b, 0, 0);
    possible(&s);
    /* The first one was refused: that says so. But not given up only. */
    s = scene();
    a = writes(&s, 0, 1, 1), b = writes(&s, 1, 1, 1);
    failed(&s, a);
    answered(&s, b);
    given_up(&s, a);
    in_the_end(&s, 0, b, 0, 0);
    possible(&s);
    /* Its answer may still come and say that. */
    s = scene();
    a = writes(&s, 0, 1, 1), b = writes(&s, 1, 1, 1);
    answered(&s, b);
    sector_shows(&s, 0, 0);
    failed(&s, a);
    given_up(&s, a);
    in_the_end(&s, 0, b, 0, 0);
    possible(&s);
    /* It does not come. */
    s = scene();
    a = writes(&s, 0, 1, 1), b = writes(&s, 1, 1, 1);
    answered(&s, b);
    given_up(&s, a);
    sector_shows(&s, 0, 0);
    refused(&s, "G2: sector 0", "zeros");
    /* It is sent again, so the first connection is gone. */
    s = scene();
    a = writes(&s, 0, 1, 1), b = writes(&s, 1, 1, 1);
    answered(&s, b);
    sent_again(&s, a, 2);
    sector_shows(&s, 0, 0);
    refused(&s, "G2: sector 0", "zeros");
    /* One that failed and was sent again on the same connection has a new place there. */
    s = scene();
    a = writes(&s, 0, 1, 1), b = writes(&s, 1, 1, 1);
    failed(&s, a);
    sent_again(&s, a, 1);
    answered(&s, b);
    given_up(&s, a);
    in_the_end(&s, 0, b, 0, 0);
    possible(&s);
    s = scene();
    a = writes(&s, 0, 1, 1);
    failed(&s, a);
    sent_again(&s, a, 1);
    b = writes(&s, 1, 1, 1);
    answered(&s, b);
    given_up(&s, a);
    in_the_end(&s, 0, b, 0, 0);
    refused(&s, "G2: sector 0", "zeros");

    /* Overwritten since. */
    s = scene();
    a = writes(&s, 0, 1, 1), b = writes(&s, 1, 1, 1);
    given_up(&s, a);
    answered(&s, b);
    uint32_t c = writes(&s, 0, 1, 2);
    answered(&s, c);
    in_the_end(&s, c, b, 0, 0);
    possible(&s);
    /* It can't be there, and the one behind it is. */
    s = scene();
    a = writes(&s, 0, 2, 1), b = writes(&s, 3, 1, 1);
    given_up(&s, a);
    c = writes(&s, 0, 1, 2);
    answered(&s, c);
    sector_shows(&s, 1, 0);
    answered(&s, b);
    refused(&s, "G8, G3", "which was sent before write #2");
}

/* Two changes on two connections: in the order a, b on the first, and in either on the second. */
static void sent_twice(bool same_order, bool answer_b, bool b_alone_on_first, const char *guarantee)
{
    struct scene s = scene();
    uint32_t a = 0, b;
    if (b_alone_on_first) {
        b = writes(&s, 1, 1, 1);
        a = writes(&s, 0, 1, 1);
    } else {
        a = writes(&s, 0, 1, 1);
        b = writes(&s, 1, 1, 1);
    }
    sent_again(&s, same_order ? a : b, 2);
    sent_again(&s, same_order ? b : a, 2);
    if (answer_b)
        answered(&s, b);
    else
        given_up(&s, b);
    given_up(&s, a);
    in_the_end(&s, 0, b, 0, 0);
    if (guarantee)
        refused(&s, guarantee, "zeros");
    else
        possible(&s);
}

static void changes_sent_twice_are_answered_on_the_last_connection(void **state)
{
    (void)state;
    sent_twice(true, false, false, NULL);
    sent_twice(false, false, false, NULL);
    /* The answer came on the second. */
    sent_twice(true, true, false, "G2: sector 0");
    sent_twice(false, true, false, NULL);
    sent_twice(true, true, true, "G2: sector 0");
}

static void bytes_violated(uint64_t sector, const uint8_t *bytes, const char *words)
{
    struct scene s = scene();
    uint32_t a = writes(&s, 0, 2, 1);
    answered(&s, a);
    uint32_t b = writes(&s, 0, 2, 1);
    uint32_t r = reads(&s, sector, 1);
    history_answered(s.h, ++s.now, r, bytes);
    given_up(&s, b);
    refused(&s, "G3, G5: sector", words);
}

static void sectors_are_whole(void **state)
{
    (void)state;
    uint8_t a[HISTORY_SECTOR], b[HISTORY_SECTOR];
    history_fill(1, 0, a);
    history_fill(2, 0, b);
    memcpy(a + 256, b + 256, 256);
    bytes_violated(0, a, "bytes 0..255 of #1, bytes 256..511 of #2");
    history_fill(1, 0, a);
    memset(a + 500, 0, 12);
    bytes_violated(0, a, "bytes 0..495 of #1, bytes 496..503 unknown, bytes 504..511 zeros");
    history_fill(1, 0, a);
    a[511] ^= 1;
    bytes_violated(0, a, "bytes 0..503 of #1, bytes 504..511 unknown");
    history_fill(1, 1, a);
    bytes_violated(0, a, "what belongs into sector 1, of write #1");
    history_fill(1, 3, a);
    bytes_violated(3, a, "which is not for this sector");
    memset(a, 0, sizeof a);
    a[9] = 1;
    bytes_violated(0, a, "bytes 0..7 zeros, bytes 8..15 unknown");
}

static void zeros_are_anybodys(void **state)
{
    (void)state;
    /* Only one can have made them. */
    struct scene s = scene();
    uint32_t w = writes(&s, 0, 3, 1);
    answered(&s, w);
    uint32_t z = zeroes(&s, 0, 2, 1);
    given_up(&s, z);
    sector_shows(&s, 0, 0);
    sector_shows(&s, 0, w);
    refused(&s, "G1, G4", "zero #2 (sectors 0..1, connection 1");
    s = scene();
    w = writes(&s, 0, 3, 1);
    answered(&s, w);
    z = zeroes(&s, 0, 2, 1);
    given_up(&s, z);
    in_the_end(&s, 0, w, w, 0);
    refused(&s, "G3: sector 1", "but newer is zero #2");
    s = scene();
    w = writes(&s, 0, 3, 1);
    answered(&s, w);
    z = zeroes(&s, 0, 2, 1);
    given_up(&s, z);
    in_the_end(&s, 0, 0, 0, 0);
    refused(&s, "G1, G4: sector 2", "zeros");
    for (int there = 0; there < 2; there++) {
        s = scene();
        w = writes(&s, 0, 3, 1);
        answered(&s, w);
        z = zeroes(&s, 0, 2, 1);
        given_up(&s, z);
        in_the_end(&s, there ? 0 : w, there ? 0 : w, w, 0);
        possible(&s);
    }
    /* Answered. */
    s = scene();
    w = writes(&s, 0, 1, 1);
    answered(&s, w);
    z = zeroes(&s, 0, 1, 1);
    answered(&s, z);
    sector_shows(&s, 0, w);
    refused(&s, "G1, G4", "zero #2");
    /* One that was given up came back. */
    s = scene();
    z = zeroes(&s, 0, 1, 1);
    given_up(&s, z);
    w = writes(&s, 0, 1, 2);
    answered(&s, w);
    sector_shows(&s, 0, 0);
    refused(&s, "G1, G4, G8: sector 0", "shows zeros, maybe of zero #1");
    /* Two can have: nothing is known of either, but that it is no write of before. */
    s = scene();
    w = writes(&s, 0, 2, 1);
    answered(&s, w);
    z = zeroes(&s, 0, 2, 1);
    given_up(&s, z);
    uint32_t w2, z2 = zeroes(&s, 0, 1, 2);
    given_up(&s, z2);
    sector_shows(&s, 0, 0);
    sector_shows(&s, 1, w);
    possible_so_far(&s);
    sector_shows(&s, 0, w);
    refused(&s, "G1, G4", "the oldest that can have made zeros");
    s = scene();
    w = writes(&s, 0, 2, 1);
    answered(&s, w);
    z = zeroes(&s, 0, 2, 1);
    given_up(&s, z);
    z2 = zeroes(&s, 0, 1, 2);
    given_up(&s, z2);
    in_the_end(&s, 0, w, 0, 0);
    possible(&s);
    /* It came, because a write behind the one before it did: then it is the zeros in sector 1,
     * and would be in sector 3. */
    for (int there = 0; there < 2; there++) {
        s = scene();
        uint32_t kept = writes(&s, 3, 1, 1);
        answered(&s, kept);
        uint32_t before = writes(&s, 1, 1, 1);
        given_up(&s, before);
        z = zeroes(&s, 1, 3, 2);
        given_up(&s, z);
        uint32_t behind = writes(&s, 0, 1, there ? 1 : 3);
        uint32_t r = reads(&s, 1, 2);
        answered(&s, behind);
        shows(&s, r, 1, 2, OPS(0, 0));
        sector_shows(&s, 0, behind);
        sector_shows(&s, 3, kept);
        read_shows(&s, 1, 2, OPS(0, 0));
        if (there)
            refused(&s, "G", "but newer is zero #3");
        else
            possible(&s);
    }
    /* Never sent; or known to be gone. */
    s = scene();
    w = writes(&s, 0, 1, 1);
    answered(&s, w);
    (void)history_begin(s.h, ++s.now, HISTORY_ZERO, 0, 1);
    sector_shows(&s, 0, 0);
    refused(&s, "G1, G4", "shows zeros, but newer is write #1");
    s = scene();
    w = writes(&s, 0, 3, 1);
    answered(&s, w);
    z = zeroes(&s, 0, 3, 1);
    given_up(&s, z);
    w2 = writes(&s, 0, 1, 2);
    answered(&s, w2);
    sector_shows(&s, 1, w);
    sector_shows(&s, 2, 0);
    refused(&s, "G1, G4", "shows zeros, but newer is write #1");
    /* A write behind zeros: they can't be of before. */
    s = scene();
    z = zeroes(&s, 0, 1, 1);
    answered(&s, z);
    w = writes(&s, 0, 1, 1);
    answered(&s, w);
    sector_shows(&s, 0, 0);
    refused(&s, "G1, G4", "shows zeros");
}

static void reads_without_an_answer_prove_nothing(void **state)
{
    (void)state;
    struct scene s = scene();
    uint32_t w = writes(&s, 0, 1, 1);
    answered(&s, w);
    uint32_t a = reads(&s, 0, 1), b = reads(&s, 0, 1);
    failed(&s, a);
    sent_again(&s, a, 1);
    shows(&s, a, 0, 1, OPS(w));
    failed(&s, b);
    given_up(&s, b);
    b = reads(&s, 0, 1);
    given_up(&s, b);
    in_the_end(&s, w, 0, 0, 0);
    struct history_counts counts;
    history_counts(s.h, &counts);
    assert_int_equal(counts.reads, 4);
    assert_int_equal(counts.writes, 1);
    assert_int_equal(counts.zeros, 0);
    assert_int_equal(counts.answered, 3);
    assert_int_equal(counts.failed, 2);
    assert_int_equal(counts.sent_again, 1);
    assert_int_equal(counts.given_up, 0);
    possible(&s);
}

static void every_sector_is_read_in_the_end(void **state)
{
    (void)state;
    struct scene s = scene();
    read_shows(&s, 0, 3, OPS(0, 0, 0));
    refused(&s, "sector 3 was not read", "after the last change");
    s = scene();
    read_shows(&s, 0, 4, OPS(0, 0, 0, 0));
    uint32_t w = writes(&s, 1, 1, 1);
    answered(&s, w);
    sector_shows(&s, 1, w);
    refused(&s, "sector 0 was not read", "after the last change");
}

static uint32_t snapshot_of(struct scene *s)
{
    return history_snapshot(s->h, ++s->now);
}

static void snapshot_is_made(struct scene *s, uint32_t snapshot)
{
    history_snapshot_made(s->h, ++s->now, snapshot);
}

static void snapshot_shows(struct scene *s, uint32_t snapshot, uint32_t a, uint32_t b, uint32_t c,
                           uint32_t d)
{
    const uint32_t ops[SCENE_SECTORS] = {a, b, c, d};
    uint8_t data[SCENE_SECTORS * HISTORY_SECTOR] = {0};
    for (uint32_t i = 0; i < SCENE_SECTORS; i++)
        if (ops[i])
            history_fill(ops[i], i, data + i * HISTORY_SECTOR);
    history_snapshot_shown(s->h, ++s->now, snapshot, 0, SCENE_SECTORS, data);
}

/* A write answered before the snapshot, one under way with it, one sent behind it: in all four
 * sectors. */
struct instant {
    struct scene s;
    uint32_t snapshot, before, with, behind;
};

static struct instant instant(bool known)
{
    struct instant i = {.s = scene()};
    i.before = writes(&i.s, 0, 2, 1);
    answered(&i.s, i.before);
    i.with = writes(&i.s, 2, 1, 1);
    i.snapshot = snapshot_of(&i.s);
    answered(&i.s, i.with);
    if (known)
        snapshot_is_made(&i.s, i.snapshot);
    i.behind = writes(&i.s, 3, 1, 1);
    answered(&i.s, i.behind);
    return i;
}

static void snapshots_hold_what_was_answered(void **state)
{
    (void)state;
    struct instant i = instant(true);
    snapshot_shows(&i.s, i.snapshot, i.before, i.before, 0, 0);
    in_the_end(&i.s, i.before, i.before, i.with, i.behind);
    possible(&i.s);
    i = instant(true);
    snapshot_shows(&i.s, i.snapshot, i.before, i.before, i.with, 0);
    in_the_end(&i.s, i.before, i.before, i.with, i.behind);
    possible(&i.s);

    i = instant(true);
    snapshot_shows(&i.s, i.snapshot, i.before, 0, 0, 0);
    refused(&i.s, "G7", "sector 1: snapshot 1 shows zeros, and not write #1");
    i = instant(true);
    snapshot_shows(&i.s, i.snapshot, i.before, i.before, i.with, i.behind);
    refused(&i.s, "G7", "sent after the snapshot had been made");
    /* Where nobody knows when it was made, it may. */
    i = instant(false);
    snapshot_shows(&i.s, i.snapshot, i.before, i.before, i.with, i.behind);
    in_the_end(&i.s, i.before, i.before, i.with, i.behind);
    possible(&i.s);
    /* But not this one without those answered before it was sent. */
    i = instant(false);
    snapshot_shows(&i.s, i.snapshot, i.before, i.before, 0, i.behind);
    refused(&i.s, "G2", "sector 2: snapshot 1 shows zeros, and not write #2");
}

static void snapshots_hold_whole_changes(void **state)
{
    (void)state;
    struct scene s = scene();
    uint32_t a = writes(&s, 0, 2, 1), snapshot = snapshot_of(&s);
    snapshot_shows(&s, snapshot, a, 0, 0, 0);
    refused(&s, "G3", "sector 1: snapshot 1 shows zeros, and not write #1");
    s = scene();
    a = writes(&s, 0, 2, 1);
    snapshot = snapshot_of(&s);
    uint8_t data[HISTORY_SECTOR] = {1};
    history_snapshot_shown(s.h, ++s.now, snapshot, 0, 1, data);
    refused(&s, "G3, G5", "no operation put there");
}

static void snapshots_stay(void **state)
{
    (void)state;
    struct instant i = instant(false);
    snapshot_shows(&i.s, i.snapshot, i.before, i.before, 0, 0);
    assert_true(history_snapshot_is_whole(i.s.h, i.snapshot));
    snapshot_shows(&i.s, i.snapshot, i.before, i.before, 0, 0);
    snapshot_shows(&i.s, i.snapshot, i.before, i.before, i.with, 0);
    refused(&i.s, "G7", "and showed before zeros");
}

/* What a snapshot shows was there before it. */
static void reads_do_not_show_less_than_snapshots(void **state)
{
    (void)state;
    for (unsigned k = 0; k < 2; k++) {
        struct scene s = scene();
        uint32_t a = writes(&s, 0, 1, 1), snapshot = snapshot_of(&s);
        given_up(&s, a);
        snapshot_shows(&s, snapshot, a, 0, 0, 0);
        if (k == 0) {
            in_the_end(&s, a, 0, 0, 0);
            possible(&s);
        } else {
            sector_shows(&s, 0, 0);
            refused(&s, "G1, G4", "which had been shown in sector 0 by snapshot 1");
        }
    }
}

static void snapshots_show_zeros_that_were_there(void **state)
{
    (void)state;
    struct scene s = scene();
    uint32_t w = writes(&s, 0, 1, 1);
    answered(&s, w);
    uint32_t snapshot = snapshot_of(&s), z = zeroes(&s, 0, 1, 1);
    answered(&s, z);
    snapshot_shows(&s, snapshot, 0, 0, 0, 0);
    in_the_end(&s, 0, 0, 0, 0);
    possible(&s);
    s = scene();
    w = writes(&s, 0, 1, 1);
    answered(&s, w);
    snapshot = snapshot_of(&s);
    snapshot_is_made(&s, snapshot);
    z = zeroes(&s, 0, 1, 1);
    answered(&s, z);
    snapshot_shows(&s, snapshot, 0, 0, 0, 0);
    refused(&s, "G7", "shows zeros, and not write #1");
}

/* A write of `b` that was sent after one of `a` had been answered. */
static void snapshots_are_of_one_instant(void **state)
{
    (void)state;
    for (unsigned k = 0; k < 4; k++) {
        struct scene a = scene(), b = scene();
        uint32_t sa = snapshot_of(&a), sb = snapshot_of(&b);
        uint32_t wa = writes(&a, 0, 1, 1);
        answered(&a, wa);
        b.now = a.now;
        uint32_t wb = writes(&b, 3, 1, 1);
        answered(&b, wb);
        snapshot_shows(&a, sa, k & 1 ? wa : 0, 0, 0, 0);
        snapshot_shows(&b, sb, 0, 0, 0, k & 2 ? wb : 0);
        history_snapshots_together(b.h, sb, a.h, sa);
        in_the_end(&a, wa, 0, 0, 0);
        in_the_end(&b, 0, 0, 0, wb);
        possible(&b);
        if (k == 2)
            refused(&a, "G7, of several volumes at one instant", "and not write #1");
        else
            possible(&a);
    }
}

static void given_up_changes_are_counted(void **state)
{
    (void)state;
    struct scene s = scene();
    uint32_t a = writes(&s, 0, 1, 1), b = writes(&s, 1, 1, 2), c = writes(&s, 2, 1, 3);
    given_up(&s, a);
    given_up(&s, b);
    given_up(&s, c);
    uint32_t over = writes(&s, 2, 1, 4);
    answered(&s, over);
    uint32_t w = writes(&s, 1, 1, 5);
    given_up(&s, w);
    in_the_end(&s, a, b, over, 0);
    struct history_counts counts;
    history_counts(s.h, &counts);
    assert_int_equal(counts.given_up, 4);
    assert_int_equal(counts.given_up_there, 2);
    assert_int_equal(counts.given_up_gone, 1);
    possible(&s);
}

/* --- a model of a server -------------------------------------------------------------- */

/*
 * What a volume holds is the effect of a journal; its first part is durable. Connections bring
 * requests in order; each takes effect at once and is answered when durable. When the server
 * dies, some first part of what was not durable is there, and the next one goes on. Connections
 * are lost, with their answers; what was not read of them may still be taken, but not behind
 * anything newer.
 */
#define SECTORS 40
#define CLIENTS 3
#define OPS_MAX 600
#define CONNECTIONS_MAX 600
#define SENT_MAX 400

enum fault {
    NO_FAULT,
    LOSES_ANSWERED, /* a crash takes more than it may */
    READS_OLD,      /* a read shows what was there some changes ago */
    TAKES_GHOSTS,   /* what was left of a dead connection is taken, whatever came since */
    TEARS_CHANGES,  /* a crash leaves a part of the last change that is there */
    SKIPS_CHANGES,  /* changes are durable and answered before older ones are */
    TAKES_HALVES,   /* a write that was sent in part takes effect in part */
    TEARS_SECTORS,  /* ... and in part of a sector */
    N_FAULTS,
};

struct change {
    uint32_t op;
    uint32_t first, n;
    uint32_t value; /* 0: zeros */
    bool half;      /* of a sector */
    bool early;     /* SKIPS_CHANGES: durable before those before it */
};

enum mop_state { WAITS, TAKEN, OVER };

struct mop {
    enum history_kind kind;
    enum mop_state state;
    uint32_t first, n, client;
    size_t journal; /* TAKEN: so much has to be durable before the answer */
    uint32_t shown[SECTORS];
    bool shown_half[SECTORS];
};

struct mconnection {
    bool dead;
    uint32_t queue[SENT_MAX];
    size_t at, n;
};

struct model {
    struct chance c;
    enum fault fault;
    bool planted; /* it did happen */
    struct history *h;
    uint64_t now;
    struct mop ops[OPS_MAX + 1];
    uint32_t n_ops;
    struct mconnection connections[CONNECTIONS_MAX];
    uint32_t n_connections, n_clients, of_client[CLIENTS];
    struct change journal[20 * OPS_MAX];
    size_t n_journal, durable, promised; /* `promised`: shown or answered */
    uint32_t now_there[SECTORS], newest[SECTORS];
    bool half_there[SECTORS];
};

static uint64_t later(struct model *m)
{
    return m->now += chance_below(&m->c, 3);
}

static bool one_in(struct model *m, uint64_t n)
{
    return chance_below(&m->c, n) == 0;
}

static void effect(struct model *m, const struct change *c)
{
    for (uint32_t i = c->first; i < c->first + c->n; i++) {
        m->now_there[i] = c->value;
        m->half_there[i] = c->half;
        if (c->op > m->newest[i])
            m->newest[i] = c->op;
    }
}

static void take_change(struct model *m, uint32_t no, uint32_t first, uint32_t n, bool half)
{
    struct change c = {.op = no, .first = first, .n = n, .half = half,
                       .value = m->ops[no].kind == HISTORY_WRITE ? no : 0};
    assert_true(m->n_journal < sizeof m->journal / sizeof *m->journal);
    m->journal[m->n_journal++] = c;
    effect(m, &c);
}

/* The volume as of a part of the journal. */
static void there_at(const struct model *m, size_t n, uint32_t *there)
{
    memset(there, 0, SECTORS * sizeof *there);
    for (size_t i = 0; i < n; i++)
        for (uint32_t k = 0; k < m->journal[i].n; k++)
            there[m->journal[i].first + k] = m->journal[i].value;
}

static void look(struct model *m, struct mop *op, uint32_t from, uint32_t to)
{
    for (uint32_t i = from; i < to; i++) {
        op->shown[i] = m->now_there[op->first + i];
        op->shown_half[i] = m->half_there[op->first + i];
    }
}

static void look_back(struct model *m, struct mop *op)
{
    uint32_t there[SECTORS];
    size_t back = 1 + chance_below(&m->c, 30);
    there_at(m, m->n_journal - min_u64(back, m->n_journal), there);
    for (uint32_t i = 0; i < op->n; i++) {
        m->planted |= op->shown[i] != there[op->first + i];
        op->shown[i] = there[op->first + i];
    }
}

/* --- clients ---------------------------------------------------------- */

static void send_op(struct model *m, uint32_t no)
{
    uint32_t i = m->of_client[m->ops[no].client];
    struct mconnection *c = &m->connections[i];
    m->ops[no].state = WAITS;
    history_sent(m->h, later(m), no, i);
    assert_true(c->n < SENT_MAX);
    c->queue[c->n++] = no;
}

static bool free_to_change(const struct model *m, uint32_t first, uint32_t n)
{
    for (uint32_t i = 1; i <= m->n_ops; i++) {
        const struct mop *op = &m->ops[i];
        if (op->state != OVER && op->kind != HISTORY_READ && op->first < first + n &&
            first < op->first + op->n)
            return false;
    }
    return true;
}

static void ask(struct model *m)
{
    if (m->n_ops == OPS_MAX)
        return;
    enum history_kind kind = one_in(m, 2) ? HISTORY_READ : one_in(m, 5) ? HISTORY_ZERO
                                                                        : HISTORY_WRITE;
    uint32_t first = (uint32_t)chance_below(&m->c, SECTORS);
    uint32_t n = 1 + (uint32_t)chance_below(&m->c, min_u64(SECTORS - first, one_in(m, 3) ? 30 : 4));
    if (kind != HISTORY_READ && !free_to_change(m, first, n))
        return;
    uint32_t no = history_begin(m->h, later(m), kind, first, n);
    m->ops[no] = (struct mop){.kind = kind, .first = first, .n = n,
                              .client = (uint32_t)chance_below(&m->c, m->n_clients)};
    m->n_ops = no;
    send_op(m, no);
}

static void connect_client(struct model *m, uint32_t client)
{
    assert_true(m->n_connections < CONNECTIONS_MAX);
    m->of_client[client] = m->n_connections++;
}

static void lose_op(struct model *m, uint32_t no, bool again)
{
    if (again) {
        send_op(m, no);
    } else {
        history_given_up(m->h, later(m), no);
        m->ops[no].state = OVER;
    }
}

/* The client goes on with another connection, and sends again what was not answered, or not. */
static void reconnect(struct model *m, uint32_t client)
{
    bool all = one_in(m, 2), none = one_in(m, 3), backwards = one_in(m, 8);
    if (m->fault >= TEARS_CHANGES) {
        /* What is sent again covers up what was wrong with it. */
        all = false;
        none = !one_in(m, 4);
    }
    connect_client(m, client);
    uint32_t n = m->n_ops;
    for (uint32_t k = 1; k <= n; k++) {
        uint32_t no = backwards ? n + 1 - k : k;
        if (m->ops[no].state != OVER && m->ops[no].client == client)
            lose_op(m, no, all || (!none && one_in(m, 2)));
    }
}

/* --- the server ------------------------------------------------------- */

static void fail_op(struct model *m, uint32_t no)
{
    history_failed(m->h, later(m), no);
    lose_op(m, no, one_in(m, 2));
}

static bool is_old(const struct model *m, const struct mop *op, uint32_t no)
{
    for (uint32_t i = 0; i < op->n; i++)
        if (m->newest[op->first + i] > no)
            return true;
    return false;
}

/* Takes in the next request of a connection. */
static void take(struct model *m, struct mconnection *c)
{
    uint32_t no = c->queue[c->at++];
    struct mop *op = &m->ops[no];
    if (op->kind == HISTORY_READ) {
        if (c->dead)
            return;
        look(m, op, 0, op->n);
        op->state = TAKEN;
        op->journal = m->n_journal;
        if (m->fault == READS_OLD && one_in(m, 10))
            look_back(m, op);
        return;
    }
    if (c->dead && is_old(m, op, no)) {
        if (m->fault != TAKES_GHOSTS) {
            c->at = c->n;
            return;
        }
        m->planted = true;
    }
    bool refused = !c->dead && one_in(m, 60);
    if (refused && one_in(m, 2)) {
        fail_op(m, no);
        return;
    }
    take_change(m, no, op->first, op->n, false);
    if (refused) {
        fail_op(m, no);
    } else if (!c->dead) {
        op->state = TAKEN;
        op->journal = m->n_journal;
    }
}

static void take_any(struct model *m)
{
    struct mconnection *c =
        one_in(m, 10) ? &m->connections[chance_below(&m->c, m->n_connections)]
                      : &m->connections[m->of_client[chance_below(&m->c, CLIENTS)]];
    if (c->at < c->n)
        take(m, c);
}

static void answer(struct model *m, uint32_t no)
{
    struct mop *op = &m->ops[no];
    if (op->state != TAKEN)
        return;
    if (op->journal > m->durable && m->fault == SKIPS_CHANGES && op->kind != HISTORY_READ &&
        one_in(m, 4))
        m->journal[op->journal - 1].early = true;
    else if (op->journal > m->durable && m->fault != LOSES_ANSWERED)
        return;
    uint8_t *data = NULL;
    if (op->kind == HISTORY_READ && one_in(m, 3) && m->fault != READS_OLD) {
        /* Part of it was looked up later, which has to be durable as well. */
        look(m, op, 0, (uint32_t)chance_below(&m->c, op->n));
        op->journal = m->durable = m->n_journal;
    }
    if (op->kind == HISTORY_READ) {
        data = mem_zalloc(op->n * HISTORY_SECTOR);
        for (uint32_t i = 0; i < op->n; i++) {
            uint8_t *at = data + i * HISTORY_SECTOR;
            if (op->shown[i])
                history_fill(op->shown[i], op->first + i, at);
            if (op->shown_half[i])
                memset(at + 128, 0, 128);
        }
    }
    op->state = OVER;
    if (op->journal > m->promised)
        m->promised = op->journal;
    history_answered(m->h, later(m), no, data);
    free(data);
}

static void answer_any(struct model *m)
{
    uint32_t from = 1 + (uint32_t)chance_below(&m->c, m->n_ops);
    for (uint32_t i = 0; i < m->n_ops; i++) {
        uint32_t no = 1 + (from + i) % m->n_ops;
        if (m->ops[no].state == TAKEN) {
            answer(m, no);
            return;
        }
    }
}

static void lose_connection(struct model *m, uint32_t client)
{
    struct mconnection *c = &m->connections[m->of_client[client]];
    bool half = c->n && one_in(m, 2);
    if (half && (m->fault == TAKES_HALVES || m->fault == TEARS_SECTORS)) {
        /* The last one is cut off in the middle, and taken for whole. */
        uint32_t no = c->queue[c->n - 1];
        const struct mop *op = &m->ops[no];
        if (c->at < c->n && op->kind == HISTORY_WRITE) {
            c->n--;
            while (c->at < c->n)
                take(m, c);
            bool sector = m->fault == TEARS_SECTORS;
            if (op->n > 1 || sector) {
                take_change(m, no, op->first, sector ? 1 : op->n / 2, sector);
                m->planted = true;
            }
        }
    }
    c->dead = true;
    reconnect(m, client);
}

static void crash(struct model *m)
{
    size_t first = m->fault == LOSES_ANSWERED ? m->durable - min_u64(m->durable, 3) : m->durable;
    size_t keep = first + chance_below(&m->c, m->n_journal - first + 1);
    m->planted |= keep < m->promised && m->fault == LOSES_ANSWERED;
    bool skipped = false;
    for (size_t i = m->durable; m->fault == SKIPS_CHANGES && i < m->n_journal; i++) {
        /* Only what is durable. */
        if (m->journal[i].early) {
            keep = max_u64(keep, i + 1);
            m->planted |= skipped;
        } else {
            m->journal[i].n = 0;
            skipped = true;
        }
    }
    if (m->fault == TEARS_CHANGES && keep > m->durable && m->journal[keep - 1].n > 1) {
        m->journal[keep - 1].n /= 2;
        m->planted = true;
    }
    m->n_journal = m->durable = keep;
    memset(m->now_there, 0, sizeof m->now_there);
    memset(m->half_there, 0, sizeof m->half_there);
    for (size_t i = 0; i < keep; i++)
        effect(m, &m->journal[i]);
    for (uint32_t i = 0; i < m->n_connections; i++) {
        m->connections[i].dead = true;
        m->connections[i].at = m->connections[i].n;
    }
    for (uint32_t i = 0; i < CLIENTS; i++)
        reconnect(m, i);
}

static bool all_over(const struct model *m)
{
    for (uint32_t i = 1; i <= m->n_ops; i++)
        if (m->ops[i].state != OVER)
            return false;
    return true;
}

static void end(struct model *m)
{
    for (uint32_t i = 0; i < m->n_connections; i++)
        if (m->connections[i].dead)
            m->connections[i].at = m->connections[i].n;
    while (!all_over(m)) {
        m->durable = m->n_journal;
        take_any(m);
        answer_any(m);
    }
    uint32_t n;
    for (uint32_t at = 0; at < SECTORS; at += n) {
        n = 1 + (uint32_t)chance_below(&m->c, SECTORS - at);
        uint32_t no = history_begin(m->h, later(m), HISTORY_READ, at, n);
        history_sent(m->h, later(m), no, CONNECTIONS_MAX);
        m->n_ops = no;
        m->ops[no] = (struct mop){.kind = HISTORY_READ, .state = TAKEN, .first = at, .n = n};
        look(m, &m->ops[no], 0, n);
        m->durable = m->n_journal;
        answer(m, no);
    }
}

/* The sentence that refuses it, or NULL. A copy, for the caller to free. */
static char *run_model(uint64_t seed, uint64_t steps, enum fault fault, bool *planted)
{
    struct model *m = mem_zalloc(sizeof *m);
    m->c = (struct chance){seed};
    m->fault = fault;
    m->h = history_new(SECTORS);
    for (uint32_t i = 0; i < CLIENTS; i++)
        connect_client(m, i);
    uint64_t answers = 1 + chance_below(&m->c, 6), commits = 1 + chance_below(&m->c, 6);
    m->n_clients = CLIENTS;
    if (fault == SKIPS_CHANGES) {
        /* Only the order of one connection is known. */
        m->n_clients = 1;
        commits = 20;
    }
    for (uint64_t i = 0; i < steps && m->n_ops < OPS_MAX - SECTORS &&
                         m->n_connections < CONNECTIONS_MAX - CLIENTS; i++) {
        uint64_t what = chance_below(&m->c, 200);
        if (what < 60)
            ask(m);
        else if (what < 130)
            take_any(m);
        else if (what < 196)
            for (uint64_t k = 0; m->n_ops && k < answers; k++)
                answer_any(m);
        else if (what < 198)
            lose_connection(m, (uint32_t)chance_below(&m->c, CLIENTS));
        else if (fault == SKIPS_CHANGES || one_in(m, 3))
            crash(m);
        if (one_in(m, commits))
            m->durable += chance_below(&m->c, m->n_journal - m->durable + 1);
    }
    end(m);
    const char *what = history_check(m->h);
    char *copy = what ? mem_strdup(what) : NULL;
    *planted = m->planted;
    history_free(m->h);
    free(m);
    return copy;
}

static void a_good_server_is_possible(void **state)
{
    (void)state;
    struct seeds s = seeds_begin("good server", 3000, 1000);
    for (uint64_t i = 0; i < s.count; i++) {
        bool planted;
        char *what = run_model(s.first + i, s.steps, NO_FAULT, &planted);
        if (what)
            fail_msg("SEED=%llu is called impossible: %s\n", (unsigned long long)(s.first + i),
                     what);
    }
}

/* `share`: of a hundred runs that contain the fault, so many are refused at least. */
static void faults_are_found(const char *name, enum fault fault, uint64_t share)
{
    struct seeds s = seeds_begin(name, 300, 1000);
    uint64_t n_planted = 0, n_found = 0;
    for (uint64_t i = 0; i < s.count; i++) {
        bool planted;
        char *what = run_model(s.first + i, s.steps, fault, &planted);
        if (what && !n_found)
            printf("# %s\n", what);
        if (what && !planted)
            fail_msg("SEED=%llu, nothing was planted: %s\n", (unsigned long long)(s.first + i),
                     what);
        n_planted += planted;
        n_found += what != NULL;
        free(what);
    }
    printf("# %s: of %llu runs with it %llu were refused\n", name, (unsigned long long)n_planted,
           (unsigned long long)n_found);
    assert_true(n_planted > 0 && n_found * 100 >= n_planted * share);
}

static void planted_faults_are_found(void **state)
{
    (void)state;
    faults_are_found("answered changes are lost", LOSES_ANSWERED, 70);
    faults_are_found("reads show the past", READS_OLD, 90);
    faults_are_found("ghosts", TAKES_GHOSTS, 60);
    faults_are_found("changes are torn in a crash", TEARS_CHANGES, 20);
    faults_are_found("older changes are not there after a crash", SKIPS_CHANGES, 5);
    faults_are_found("half a write is taken", TAKES_HALVES, 30);
    faults_are_found("half a sector is taken", TEARS_SECTORS, 55);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(answered_changes_are_seen),
        cmocka_unit_test(nothing_is_seen_before_it_is_sent),
        cmocka_unit_test(reads_do_not_go_back),
        cmocka_unit_test(given_up_changes_may_be_there),
        cmocka_unit_test(ghosts_are_refused),
        cmocka_unit_test(changes_are_whole),
        cmocka_unit_test(connections_have_an_order),
        cmocka_unit_test(changes_sent_twice_are_answered_on_the_last_connection),
        cmocka_unit_test(sectors_are_whole),
        cmocka_unit_test(zeros_are_anybodys),
        cmocka_unit_test(reads_without_an_answer_prove_nothing),
        cmocka_unit_test(every_sector_is_read_in_the_end),
        cmocka_unit_test(given_up_changes_are_counted),
        cmocka_unit_test(snapshots_hold_what_was_answered),
        cmocka_unit_test(snapshots_hold_whole_changes),
        cmocka_unit_test(snapshots_stay),
        cmocka_unit_test(reads_do_not_show_less_than_snapshots),
        cmocka_unit_test(snapshots_show_zeros_that_were_there),
        cmocka_unit_test(snapshots_are_of_one_instant),
        cmocka_unit_test(a_good_server_is_possible),
        cmocka_unit_test(planted_faults_are_found),
    };
    return cmocka_run_group_tests_name("history", tests, NULL, NULL);
}
