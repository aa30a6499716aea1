/*
 * How a history is judged.
 *
 * The changes of one sector follow each other, because no two are under way at once, and
 * operations are numbered as they begin: so of two changes of a sector the one with the higher
 * number is the newer. What is known of a sector is then one number, its floor: the newest
 * change that has certainly taken effect. A read takes down the floors when it is sent and
 * may show these or anything newer that was sent, and nothing else.
 *
 * A change has certainly taken effect when it was answered, when a read that was answered has shown
 * it in any of its sectors (G3), or when one that was sent behind it was answered (G2). Then it
 * raises the floors of all its sectors. That is done once for each change, so the whole
 * judgement takes a few steps for each sector of each operation.
 *
 * What became of a change that was given up is settled when a newer one of any of its sectors
 * is answered (G8): a read sent after that which does not show it proves that it is gone, in its
 * other sectors too.
 *
 * Zeros tell nothing of who wrote them. Where only one change can have, it was that one.
 *
 * A snapshot takes down the floors when it is asked for. When all of it was shown, its floors
 * are raised by what it shows (G3) and by what must have come before that (G2).
 */
#include "history.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "base/check.h"
#include "base/hash.h"
#include "base/mem.h"

/* How a change is known to have taken effect. */
enum why { NOT_KNOWN, WAS_ANSWERED, WAS_SHOWN, CAME_BEFORE, IN_SNAPSHOT };

/* Moments are counted in calls, because many of these may come at one time of the world. */
struct op {
    uint8_t kind, why;
    bool answered, given_up, failed; /* `failed`: as it was sent last */
    bool gone;
    uint32_t n;
    uint64_t first;
    uint64_t begun_ns, sent_ns, ended_ns; /* `sent_ns`: last */
    uint64_t first_sent_ns;
    uint64_t sent, settled;               /* moments; 0: not */
    uint64_t first_sent, ended;
    uint32_t copies, last_copy;           /* 0: none */
    uint32_t by;      /* WAS_SHOWN: the read, CAME_BEFORE: the change behind it, IN_SNAPSHOT: that */
    uint32_t gone_by; /* the read that did not show it */
    uint64_t by_sector, gone_sector, settled_sector;
    uint32_t settled_by;
    uint32_t *floors; /* of a read under way */
};

/* One sending of a change. */
struct copy {
    uint32_t op, next; /* the same change sent again; 0: no */
    uint32_t connection, place;
    bool failed;
    bool due; /* it was taken, unless it fails: one behind it was */
};

struct connection {
    uint32_t number;
    uint32_t *copies; /* in the order of sending */
    size_t n, cap;
    size_t taken; /* so many of these have been taken */
};

/* A change of a sector and the one before it. */
struct link {
    uint32_t op, before; /* 0: none */
};

/* What the last read of a sector showed. */
struct shown {
    uint32_t read, op; /* `op` 0: zeros */
};

/* `shown`: per sector the write that it shows, or zeros (SHOWS_ZEROS), or nothing yet (0). */
struct snapshot {
    uint64_t made; /* the moment; 0: not known */
    uint32_t *floors; /* when it was asked for; raised by what it shows */
    uint32_t *shown;
    uint64_t n_shown;
};
#define SHOWS_ZEROS UINT32_MAX

struct history {
    uint64_t n_sectors, moment, now_ns;
    struct op *ops; /* from 1 */
    size_t n_ops, cap_ops;
    struct copy *copies; /* from 1 */
    size_t n_copies, cap_copies;
    struct connection *connections;
    size_t n_connections, cap_connections;
    struct link *links; /* from 1 */
    size_t n_links, cap_links;
    uint32_t *newest; /* of each sector: its links' head */
    uint32_t *floor;
    struct shown *shown;
    struct snapshot *snapshots; /* from 1 */
    size_t n_snapshots, cap_snapshots;
    uint64_t quiet; /* the moment after which no change was under way */
    struct history_counts counts;
    bool violated;
    char what[3000];
};

struct history *history_new(uint64_t n_sectors)
{
    struct history *h = mem_zalloc(sizeof *h);
    CHECK(n_sectors > 0);
    h->n_sectors = n_sectors;
    h->newest = mem_zalloc(n_sectors * sizeof *h->newest);
    h->floor = mem_zalloc(n_sectors * sizeof *h->floor);
    h->shown = mem_zalloc(n_sectors * sizeof *h->shown);
    return h;
}

void history_free(struct history *h)
{
    for (size_t i = 1; i <= h->n_ops; i++)
        free(h->ops[i].floors);
    for (size_t i = 0; i < h->n_connections; i++)
        free(h->connections[i].copies);
    for (size_t i = 1; i <= h->n_snapshots; i++) {
        free(h->snapshots[i].floors);
        free(h->snapshots[i].shown);
    }
    free(h->snapshots);
    free(h->ops);
    free(h->copies);
    free(h->connections);
    free(h->links);
    free(h->newest);
    free(h->floor);
    free(h->shown);
    free(h);
}

/* --- what is in a sector ----------------------------------------------------------------- */

#define WORDS (HISTORY_SECTOR / 8)

/* The first word names the operation and the sector; the others follow from it and their place. */
static uint64_t name_word(uint32_t op, uint64_t sector)
{
    return (uint64_t)op << 32 | (uint32_t)sector;
}

static uint64_t body_word(uint64_t hash, unsigned i)
{
    return hash + i * 0x9e3779b97f4a7c15u;
}

void history_fill(uint32_t op, uint64_t sector, uint8_t out[HISTORY_SECTOR])
{
    uint64_t words[WORDS];
    uint64_t hash = hash_mix(op, sector);
    words[0] = name_word(op, sector);
    for (unsigned i = 1; i < WORDS; i++)
        words[i] = body_word(hash, i);
    memcpy(out, words, HISTORY_SECTOR);
}

static bool is_zeros(const uint8_t *data)
{
    static const uint8_t zeros[HISTORY_SECTOR];
    return memcmp(data, zeros, HISTORY_SECTOR) == 0;
}

static bool is_of(const uint8_t *data, uint32_t op, uint64_t sector)
{
    uint8_t bytes[HISTORY_SECTOR];
    history_fill(op, sector, bytes);
    return memcmp(data, bytes, HISTORY_SECTOR) == 0;
}

/* --- what to say ------------------------------------------------------------------------- */

static void say(struct history *h, const char *format, ...)
    __attribute__((format(printf, 2, 3)));

static void say(struct history *h, const char *format, ...)
{
    size_t len = strlen(h->what);
    va_list args;
    va_start(args, format);
    vsnprintf(h->what + len, sizeof h->what - len, format, args);
    va_end(args);
}

static double seconds(uint64_t ns)
{
    return (double)ns / 1e9;
}

static void say_op(struct history *h, uint32_t no)
{
    static const char *const kinds[] = {"read", "write", "zero"};
    if (!no) {
        say(h, "the zeros of the beginning");
        return;
    }
    const struct op *op = &h->ops[no];
    say(h, "%s #%u (sectors %llu..%llu", kinds[op->kind], no, (unsigned long long)op->first,
        (unsigned long long)(op->first + op->n - 1));
    const char *word = ", connection";
    for (uint32_t c = op->copies; c; c = h->copies[c].next) {
        say(h, "%s %u", word, h->connections[h->copies[c].connection].number);
        word = ", then";
    }
    say(h, "; begun %.6f s", seconds(op->begun_ns));
    if (op->sent)
        say(h, ", sent %.6f s", seconds(op->sent_ns));
    if (op->answered)
        say(h, ", answered %.6f s)", seconds(op->ended_ns));
    else if (op->given_up)
        say(h, ", %s %.6f s)", op->failed ? "failed and given up" : "given up unanswered",
            seconds(op->ended_ns));
    else
        say(h, ", not answered)");
}

/* How it is known that a change took effect. */
static void say_why(struct history *h, uint32_t no)
{
    for (unsigned depth = 0; no && depth < 4; depth++) {
        const struct op *op = &h->ops[no];
        if (op->why == WAS_ANSWERED) {
            say(h, ", which had been answered");
            return;
        }
        if (op->why == WAS_SHOWN) {
            say(h, ", which had been shown in sector %llu by ", (unsigned long long)op->by_sector);
            say_op(h, op->by);
            return;
        }
        if (op->why == NOT_KNOWN) {
            say(h, ", which is the oldest that can have made zeros that a read had shown");
            return;
        }
        if (op->why == IN_SNAPSHOT) {
            say(h, ", which had been shown in sector %llu by snapshot %u",
                (unsigned long long)op->by_sector, op->by);
            return;
        }
        say(h, ", which was sent before ");
        say_op(h, op->by);
        no = op->by;
    }
}

/* All that a read which took down `floor` could have shown. */
static void say_possible(struct history *h, uint64_t sector, uint32_t floor)
{
    say(h, "; possible:");
    unsigned n = 0;
    for (uint32_t l = h->newest[sector]; l && n < 4; l = h->links[l].before) {
        const struct op *op = &h->ops[h->links[l].op];
        if (h->links[l].op < floor)
            break;
        if (!op->sent || op->gone)
            continue;
        say(h, n++ ? ", or " : " ");
        say_op(h, h->links[l].op);
    }
    if (!floor)
        say(h, n ? ", or zeros" : " zeros");
}

/* Begins a sentence; false where there is one already. */
static bool violate(struct history *h)
{
    if (h->violated)
        return false;
    h->violated = true;
    return true;
}

/* --- what is known to have taken effect -------------------------------------------------- */

static void establish(struct history *h, uint32_t no, enum why why, uint32_t by, uint64_t sector)
{
    struct op *op = &h->ops[no];
    if (op->why != NOT_KNOWN)
        return;
    op->why = (uint8_t)why;
    op->by = by;
    op->by_sector = sector;
    for (uint64_t s = op->first; s < op->first + op->n; s++)
        if (h->floor[s] < no)
            h->floor[s] = no;
    if (op->gone && violate(h)) {
        say(h, "G8, G3: ");
        say_op(h, no);
        say_why(h, no);
        say(h, ", took effect after ");
        say_op(h, op->settled_by);
        say(h, ", which is newer in sector %llu, was answered: a read sent after that, ",
            (unsigned long long)op->settled_sector);
        say_op(h, op->gone_by);
        say(h, ", showed that it was not there in sector %llu",
            (unsigned long long)op->gone_sector);
    }
}

/* Of the changes sent before `place` on a connection, all were taken (G2), because the one there
 * was answered: had one of them been refused, that answer would have come before this one. */
static void taken_to(struct history *h, struct connection *c, size_t place, uint32_t by)
{
    for (; c->taken < place; c->taken++) {
        struct copy *copy = &h->copies[c->copies[c->taken]];
        const struct op *op = &h->ops[copy->op];
        if (copy->failed)
            continue;
        /* While its answer may come it can still be one that says it failed. */
        if (!op->answered && !op->given_up && op->last_copy == c->copies[c->taken]) {
            copy->due = true;
            h->ops[copy->op].by = by;
        } else {
            establish(h, copy->op, CAME_BEFORE, by, 0);
        }
    }
}

/* A copy whose answer will not come any more. */
static void copy_over(struct history *h, const struct op *op)
{
    struct copy *copy = &h->copies[op->last_copy];
    if (copy->due && !copy->failed)
        establish(h, copy->op, CAME_BEFORE, op->by, 0);
    copy->due = false;
}

/* --- clients ----------------------------------------------------------------------------- */

static struct op *op_at(struct history *h, uint64_t now_ns, uint32_t no)
{
    CHECK(no > 0 && no <= h->n_ops && now_ns >= h->now_ns);
    struct op *op = &h->ops[no];
    CHECK(!op->answered && !op->given_up);
    h->now_ns = now_ns;
    h->moment++;
    return op;
}

uint32_t history_begin(struct history *h, uint64_t now_ns, enum history_kind kind,
                       uint64_t first_sector, uint32_t n_sectors)
{
    CHECK(n_sectors > 0 && first_sector < h->n_sectors && n_sectors <= h->n_sectors - first_sector);
    CHECK(now_ns >= h->now_ns && (kind == HISTORY_READ || n_sectors <= HISTORY_SECTORS_MAX));
    h->now_ns = now_ns;
    h->moment++;
    mem_grow(&h->ops, &h->cap_ops, h->n_ops + 2, sizeof *h->ops);
    uint32_t no = (uint32_t)++h->n_ops;
    h->ops[no] = (struct op){
        .kind = (uint8_t)kind, .first = first_sector, .n = n_sectors, .begun_ns = now_ns};
    if (kind == HISTORY_READ) {
        h->counts.reads++;
        return no;
    }
    kind == HISTORY_WRITE ? h->counts.writes++ : h->counts.zeros++;
    mem_grow(&h->links, &h->cap_links, h->n_links + n_sectors + 1, sizeof *h->links);
    for (uint64_t s = first_sector; s < first_sector + n_sectors; s++) {
        uint32_t before = h->newest[s];
        /* The rule of the clients. */
        CHECK(!before || h->ops[h->links[before].op].answered ||
              h->ops[h->links[before].op].given_up);
        h->links[++h->n_links] = (struct link){no, before};
        h->newest[s] = (uint32_t)h->n_links;
    }
    return no;
}

static uint32_t connection_of(struct history *h, uint32_t number)
{
    for (size_t i = h->n_connections; i > 0; i--)
        if (h->connections[i - 1].number == number)
            return (uint32_t)(i - 1);
    mem_grow(&h->connections, &h->cap_connections, h->n_connections + 1, sizeof *h->connections);
    h->connections[h->n_connections] = (struct connection){.number = number};
    return (uint32_t)h->n_connections++;
}

void history_sent(struct history *h, uint64_t now_ns, uint32_t no, uint32_t connection)
{
    struct op *op = op_at(h, now_ns, no);
    h->counts.sent_again += op->sent != 0;
    op->sent_ns = now_ns;
    if (op->last_copy)
        copy_over(h, op);
    op->sent = h->moment;
    op->failed = false;
    if (!op->first_sent) {
        op->first_sent = h->moment;
        op->first_sent_ns = now_ns;
    }

    mem_grow(&h->copies, &h->cap_copies, h->n_copies + 2, sizeof *h->copies);
    uint32_t i = (uint32_t)++h->n_copies;
    struct copy *copy = &h->copies[i];
    *copy = (struct copy){.op = no, .connection = connection_of(h, connection)};
    if (op->copies)
        h->copies[op->last_copy].next = i;
    else
        op->copies = i;
    op->last_copy = i;
    if (op->kind == HISTORY_READ) {
        if (!op->floors)
            op->floors = mem_alloc(op->n * sizeof *op->floors);
        memcpy(op->floors, h->floor + op->first, op->n * sizeof *op->floors);
        return;
    }
    struct connection *c = &h->connections[copy->connection];
    copy->place = (uint32_t)c->n;
    mem_grow(&c->copies, &c->cap, c->n + 1, sizeof *c->copies);
    c->copies[c->n++] = i;
}

void history_failed(struct history *h, uint64_t now_ns, uint32_t no)
{
    struct op *op = op_at(h, now_ns, no);
    CHECK(op->sent && !op->failed);
    op->failed = true;
    op->ended_ns = now_ns;
    h->copies[op->last_copy].failed = true;
    h->copies[op->last_copy].due = false;
    h->counts.failed++;
}

void history_given_up(struct history *h, uint64_t now_ns, uint32_t no)
{
    struct op *op = op_at(h, now_ns, no);
    op->given_up = true;
    op->ended_ns = now_ns;
    free(op->floors);
    op->floors = NULL;
    if (op->kind == HISTORY_READ)
        return;
    h->counts.given_up++;
    h->quiet = h->moment;
    if (op->last_copy)
        copy_over(h, op);
}

/* A change was answered: it is there, and what became of those before it that were given up is
 * settled. */
static void change_answered(struct history *h, uint32_t no)
{
    const struct op *op = &h->ops[no];
    h->quiet = h->moment;
    establish(h, no, WAS_ANSWERED, 0, 0);
    const struct copy *last = &h->copies[op->last_copy];
    taken_to(h, &h->connections[last->connection], last->place, no);
    for (uint64_t s = op->first; s < op->first + op->n; s++) {
        for (uint32_t l = h->links[h->newest[s]].before; l; l = h->links[l].before) {
            struct op *older = &h->ops[h->links[l].op];
            if (older->answered)
                break;
            if (!older->settled) {
                older->settled = h->moment;
                older->settled_by = no;
                older->settled_sector = s;
            }
        }
    }
}

/* --- reads ------------------------------------------------------------------------------- */

static void say_read(struct history *h, uint64_t sector, uint32_t read)
{
    say(h, "sector %llu: ", (unsigned long long)sector);
    say_op(h, read);
    say(h, " shows ");
}

/* The sector's bytes are nothing that can stand there. */
static void bytes_violate(struct history *h, uint64_t sector, uint32_t read, const uint8_t *data)
{
    if (!violate(h))
        return;
    uint64_t words[WORDS];
    memcpy(words, data, sizeof words);
    say(h, "G3, G5: ");
    say_read(h, sector, read);
    uint32_t no = (uint32_t)(words[0] >> 32), at = (uint32_t)words[0];
    if (no && no <= h->n_ops && h->ops[no].kind == HISTORY_WRITE && is_of(data, no, at)) {
        if (at != (uint32_t)sector)
            say(h, "what belongs into sector %u, of ", at);
        say_op(h, no);
        if (at == (uint32_t)sector)
            say(h, h->ops[no].sent ? ", which is not for this sector" : ", which was never sent");
    } else {
        say(h, "what no operation put there:");
        unsigned from = 0;
        uint32_t last = UINT32_MAX;
        /* Who may have written which part: of those that changed this sector. */
        for (unsigned i = 0; i < WORDS; i++) {
            uint32_t who = words[i] ? UINT32_MAX - 1 : 0;
            for (uint32_t l = h->newest[sector]; l && who; l = h->links[l].before) {
                uint32_t op = h->links[l].op;
                if (words[i] == (i ? body_word(hash_mix(op, sector), i) : name_word(op, sector))) {
                    who = op;
                    break;
                }
            }
            if (i && who == last)
                continue;
            if (i)
                say(h, " bytes %u..%u", from, i * 8 - 1);
            if (last == UINT32_MAX - 1)
                say(h, " unknown,");
            else if (i)
                say(h, last ? " of #%u," : " zeros,", last);
            from = i * 8;
            last = who;
        }
        say(h, " bytes %u..%u", from, HISTORY_SECTOR - 1);
        if (last == UINT32_MAX - 1)
            say(h, " unknown (at first %016llx)", (unsigned long long)words[from / 8]);
        else
            say(h, last ? " of #%u" : " zeros", last);
    }
    say_possible(h, sector, h->ops[read].floors ? h->ops[read].floors[sector - h->ops[read].first]
                                                : h->floor[sector]);
}

/* The newest change before `floor` that may have come back as zeros, or 0. */
static uint32_t old_zero(const struct history *h, uint64_t sector, uint32_t floor)
{
    for (uint32_t l = h->newest[sector]; l; l = h->links[l].before) {
        const struct op *op = &h->ops[h->links[l].op];
        if (h->links[l].op < floor && op->kind == HISTORY_ZERO && op->sent)
            return h->links[l].op;
    }
    return 0;
}

/* It shows `op` (or zeros), which is older than `floor`. */
static void old_violates(struct history *h, uint64_t sector, uint32_t read, uint32_t op,
                         bool is_zero, uint32_t floor)
{
    if (!violate(h))
        return;
    const struct op *f = &h->ops[floor];
    if (is_zero)
        op = old_zero(h, sector, floor);
    bool back = op && (h->ops[op].given_up || h->ops[op].copies != h->ops[op].last_copy);
    say(h, "%s%s: ", f->why == CAME_BEFORE ? "G2"
                     : f->why == WAS_SHOWN && f->by_sector != sector ? "G3"
                                                                     : "G1, G4",
        back ? ", G8" : "");
    say_read(h, sector, read);
    if (is_zero)
        say(h, "zeros");
    if (is_zero && op)
        say(h, ", maybe of ");
    if (op)
        say_op(h, op);
    say(h, ", but newer is ");
    say_op(h, floor);
    say_why(h, floor);
    say_possible(h, sector, floor);
}

/* Who can have made zeros in a sector, none older than `floor`: how many, the oldest and the
 * newest of them. */
static unsigned zeros_of(const struct history *h, uint64_t sector, uint32_t floor,
                         uint32_t *oldest, uint32_t *newest)
{
    unsigned n = 0;
    *oldest = *newest = 0;
    for (uint32_t l = h->newest[sector]; l && h->links[l].op >= floor; l = h->links[l].before) {
        const struct op *op = &h->ops[h->links[l].op];
        if (op->kind != HISTORY_ZERO || !op->sent || op->gone)
            continue;
        *oldest = h->links[l].op;
        if (!n++)
            *newest = h->links[l].op;
    }
    if (!floor) {
        *oldest = 0;
        n++;
    }
    return n;
}

/* The read showed nothing newer than `newest`: of those that were given up, what could only have
 * come before the read was sent did not come. */
static void newer_are_gone(struct history *h, uint64_t sector, uint32_t read, uint32_t newest)
{
    for (uint32_t l = h->newest[sector]; l && h->links[l].op > newest; l = h->links[l].before) {
        struct op *op = &h->ops[h->links[l].op];
        if (!op->settled || op->settled > h->ops[read].sent || op->gone)
            continue;
        op->gone = true;
        op->gone_by = read;
        op->gone_sector = sector;
        if (op->why == NOT_KNOWN || !violate(h))
            continue;
        say(h, "G3, G8: sector %llu: ", (unsigned long long)sector);
        say_op(h, read);
        say(h, " does not show ");
        say_op(h, h->links[l].op);
        say_why(h, h->links[l].op);
        say(h, "; and it can't have come later, because in sector %llu newer is ",
            (unsigned long long)op->settled_sector);
        say_op(h, op->settled_by);
        say(h, ", which was answered before that read was sent");
    }
}

/* One sector of a read by itself; what it tells of the rest is in *seen: the change that was
 * shown, or 0. */
static void judge(struct history *h, uint32_t read, uint64_t sector, const uint8_t *data,
                  uint32_t *seen)
{
    uint32_t floor = h->ops[read].floors[sector - h->ops[read].first];
    uint32_t oldest, newest;
    *seen = 0;
    h->shown[sector] = (struct shown){.read = read};
    if (is_zeros(data)) {
        unsigned n = zeros_of(h, sector, floor, &oldest, &newest);
        if (!n) {
            old_violates(h, sector, read, 0, true, floor);
            return;
        }
        newer_are_gone(h, sector, read, newest);
        if (n == 1)
            *seen = oldest;
        else if (h->floor[sector] < oldest)
            h->floor[sector] = oldest;
        return;
    }
    uint64_t word;
    memcpy(&word, data, sizeof word);
    uint32_t no = (uint32_t)(word >> 32);
    const struct op *op = no && no <= h->n_ops ? &h->ops[no] : NULL;
    if (!op || op->kind != HISTORY_WRITE || !op->sent || sector < op->first ||
        sector >= op->first + op->n || !is_of(data, no, sector)) {
        bytes_violate(h, sector, read, data);
        return;
    }
    h->shown[sector].op = no;
    if (no < floor) {
        old_violates(h, sector, read, no, false, floor);
        return;
    }
    newer_are_gone(h, sector, read, no);
    *seen = no;
}

static void read_answered(struct history *h, uint32_t no, const uint8_t *data)
{
    const struct op *op = &h->ops[no];
    uint32_t seen, last = 0;
    CHECK(data);
    for (uint32_t i = 0; i < op->n && !h->violated; i++) {
        judge(h, no, op->first + i, data + (size_t)i * HISTORY_SECTOR, &seen);
        if (seen && seen != last && !h->violated)
            establish(h, seen, WAS_SHOWN, no, op->first + i);
        last = seen;
    }
}

void history_answered(struct history *h, uint64_t now_ns, uint32_t no, const uint8_t *data)
{
    struct op *op = op_at(h, now_ns, no);
    CHECK(op->sent && !op->failed);
    op->answered = true;
    op->ended_ns = now_ns;
    op->ended = h->moment;
    h->counts.answered++;
    if (h->violated)
        return;
    if (op->kind == HISTORY_READ) {
        read_answered(h, no, data);
        free(op->floors);
        op->floors = NULL;
    } else {
        change_answered(h, no);
    }
}

/* --- snapshots --------------------------------------------------------------------------- */

uint32_t history_snapshot(struct history *h, uint64_t now_ns)
{
    CHECK(now_ns >= h->now_ns);
    h->now_ns = now_ns;
    h->moment++;
    mem_grow(&h->snapshots, &h->cap_snapshots, h->n_snapshots + 2, sizeof *h->snapshots);
    struct snapshot *s = &h->snapshots[++h->n_snapshots];
    *s = (struct snapshot){.floors = mem_alloc(h->n_sectors * sizeof *s->floors),
                           .shown = mem_zalloc(h->n_sectors * sizeof *s->shown)};
    memcpy(s->floors, h->floor, h->n_sectors * sizeof *s->floors);
    return (uint32_t)h->n_snapshots;
}

static struct snapshot *snapshot_at(struct history *h, uint64_t now_ns, uint32_t snapshot)
{
    CHECK(snapshot > 0 && snapshot <= h->n_snapshots && now_ns >= h->now_ns);
    h->now_ns = now_ns;
    h->moment++;
    return &h->snapshots[snapshot];
}

void history_snapshot_made(struct history *h, uint64_t now_ns, uint32_t snapshot)
{
    struct snapshot *s = snapshot_at(h, now_ns, snapshot);
    CHECK(!s->made);
    s->made = h->moment;
}

bool history_snapshot_is_whole(const struct history *h, uint32_t snapshot)
{
    return h->snapshots[snapshot].n_shown == h->n_sectors;
}

/* Begins a sentence about what it shows in a sector. */
static bool snapshot_violates(struct history *h, uint32_t snapshot, uint64_t sector,
                              const char *guarantees)
{
    if (!violate(h))
        return false;
    uint32_t no = h->snapshots[snapshot].shown[sector];
    say(h, "%s: sector %llu: snapshot %u shows ", guarantees, (unsigned long long)sector, snapshot);
    if (no == SHOWS_ZEROS)
        say(h, "zeros");
    else
        say_op(h, no);
    return true;
}

/* Whether zeros may be of its instant: somebody has sent them, or they were there at first. */
static bool snapshot_may_show_zeros(const struct history *h, const struct snapshot *s,
                                    uint64_t sector)
{
    for (uint32_t l = h->newest[sector]; l && h->links[l].op >= s->floors[sector];
         l = h->links[l].before) {
        const struct op *op = &h->ops[h->links[l].op];
        if (op->kind == HISTORY_ZERO && op->sent && (!s->made || op->first_sent < s->made))
            return true;
    }
    return !s->floors[sector];
}

/* What it shows in a sector is not older than what it must have. */
static void judge_floor(struct history *h, uint32_t snapshot, uint64_t sector,
                        const char *guarantees)
{
    const struct snapshot *s = &h->snapshots[snapshot];
    uint32_t no = s->shown[sector], floor = s->floors[sector];
    bool fits = no == SHOWS_ZEROS ? snapshot_may_show_zeros(h, s, sector) : no >= floor;
    if (fits || !snapshot_violates(h, snapshot, sector, guarantees))
        return;
    say(h, ", and not ");
    say_op(h, floor);
    say_why(h, floor);
}

/* All sectors of a change are in it, or what changed them since. */
static void snapshot_has(struct snapshot *s, const struct op *op, uint32_t no)
{
    for (uint64_t i = op->first; i < op->first + op->n; i++)
        if (s->floors[i] < no)
            s->floors[i] = no;
}

static void judge_floors(struct history *h, uint32_t snapshot, const char *guarantees)
{
    for (uint64_t i = 0; i < h->n_sectors && !h->violated; i++)
        judge_floor(h, snapshot, i, guarantees);
}

/* The one of the writes it shows that was sent last; NULL: it shows none. */
static const struct op *snapshot_newest(const struct history *h, const struct snapshot *s)
{
    const struct op *newest = NULL;
    for (uint64_t i = 0; i < h->n_sectors; i++) {
        const struct op *op = s->shown[i] != SHOWS_ZEROS ? &h->ops[s->shown[i]] : NULL;
        if (op && (!newest || op->first_sent > newest->first_sent))
            newest = op;
    }
    return newest;
}

/* All of it was shown: whole changes (G3), and a prefix (G2). */
static void judge_whole(struct history *h, uint32_t snapshot)
{
    struct snapshot *s = &h->snapshots[snapshot];
    const struct op *newest = snapshot_newest(h, s);
    h->counts.snapshots_whole++;
    for (uint64_t i = 0; i < h->n_sectors; i++)
        if (s->shown[i] != SHOWS_ZEROS)
            snapshot_has(s, &h->ops[s->shown[i]], s->shown[i]);
    judge_floors(h, snapshot, "G3");
    for (uint32_t no = 1; newest && no <= h->n_ops; no++) {
        const struct op *op = &h->ops[no];
        if (op->kind != HISTORY_READ && op->answered && op->ended < newest->first_sent)
            snapshot_has(s, op, no);
    }
    judge_floors(h, snapshot, "G2");
}

static void snapshot_sector(struct history *h, uint32_t snapshot, uint64_t sector,
                            const uint8_t *data)
{
    struct snapshot *s = &h->snapshots[snapshot];
    uint32_t had = s->shown[sector], no = SHOWS_ZEROS;
    if (!is_zeros(data)) {
        uint64_t word;
        memcpy(&word, data, sizeof word);
        no = (uint32_t)(word >> 32);
        const struct op *op = no && no <= h->n_ops ? &h->ops[no] : NULL;
        if (!op || op->kind != HISTORY_WRITE || !op->sent || sector < op->first ||
            sector >= op->first + op->n || !is_of(data, no, sector)) {
            if (violate(h))
                say(h, "G3, G5: sector %llu: snapshot %u shows what no operation put there "
                       "(first word %016llx)",
                    (unsigned long long)sector, snapshot, (unsigned long long)word);
            return;
        }
    }
    s->shown[sector] = no;
    if (had && had != no) {
        if (snapshot_violates(h, snapshot, sector, "G7")) {
            say(h, ", and showed before ");
            had == SHOWS_ZEROS ? say(h, "zeros") : say_op(h, had);
        }
        return;
    }
    if (had)
        return;
    s->n_shown++;
    judge_floor(h, snapshot, sector, "G7");
    if (no == SHOWS_ZEROS || h->violated)
        return;
    if (s->made && h->ops[no].first_sent > s->made) {
        if (snapshot_violates(h, snapshot, sector, "G7"))
            say(h, ", which was sent after the snapshot had been made");
        return;
    }
    establish(h, no, IN_SNAPSHOT, snapshot, sector);
}

void history_snapshot_shown(struct history *h, uint64_t now_ns, uint32_t snapshot,
                            uint64_t first_sector, uint32_t n_sectors, const uint8_t *data)
{
    struct snapshot *s = snapshot_at(h, now_ns, snapshot);
    CHECK(first_sector < h->n_sectors && n_sectors <= h->n_sectors - first_sector);
    bool was_whole = s->n_shown == h->n_sectors;
    h->counts.snapshot_reads++;
    for (uint32_t i = 0; i < n_sectors && !h->violated; i++)
        snapshot_sector(h, snapshot, first_sector + i, data + (size_t)i * HISTORY_SECTOR);
    if (!h->violated && !was_whole && s->n_shown == h->n_sectors)
        judge_whole(h, snapshot);
}

/* What was answered in `h` before `op`, a change of another volume, was sent. */
static void snapshot_has_until(struct history *h, uint32_t snapshot, const struct op *other)
{
    struct snapshot *s = &h->snapshots[snapshot];
    for (uint32_t no = 1; other && no <= h->n_ops; no++) {
        const struct op *op = &h->ops[no];
        if (op->kind != HISTORY_READ && op->answered && op->ended_ns < other->first_sent_ns)
            snapshot_has(s, op, no);
    }
    judge_floors(h, snapshot, "G7, of several volumes at one instant");
}

void history_snapshots_together(struct history *a, uint32_t snapshot_a, struct history *b,
                                uint32_t snapshot_b)
{
    CHECK(history_snapshot_is_whole(a, snapshot_a) && history_snapshot_is_whole(b, snapshot_b));
    if (a->violated || b->violated)
        return;
    const struct op *newest_a = snapshot_newest(a, &a->snapshots[snapshot_a]);
    const struct op *newest_b = snapshot_newest(b, &b->snapshots[snapshot_b]);
    snapshot_has_until(a, snapshot_a, newest_b);
    snapshot_has_until(b, snapshot_b, newest_a);
}

/* --- the end ----------------------------------------------------------------------------- */

const char *history_violation(const struct history *h)
{
    return h->violated ? h->what : NULL;
}

/* Judges what a sector holds in the end; true where that told something new. */
static bool judge_last(struct history *h, uint64_t sector)
{
    const struct shown *shown = &h->shown[sector];
    uint32_t floor = h->floor[sector], oldest, newest;
    if (shown->op) {
        if (shown->op < floor)
            old_violates(h, sector, shown->read, shown->op, false, floor);
        return false;
    }
    unsigned n = zeros_of(h, sector, floor, &oldest, &newest);
    if (!n)
        old_violates(h, sector, shown->read, 0, true, floor);
    if (n != 1 || !oldest || h->ops[oldest].why != NOT_KNOWN)
        return false;
    establish(h, oldest, WAS_SHOWN, shown->read, sector);
    return true;
}

const char *history_check(struct history *h)
{
    for (size_t i = 1; i <= h->n_ops; i++)
        CHECK(h->ops[i].answered || h->ops[i].given_up);
    for (uint64_t s = 0; s < h->n_sectors && !h->violated; s++) {
        uint32_t read = h->shown[s].read;
        if ((!read || h->ops[read].sent < h->quiet) && violate(h))
            say(h, "sector %llu was not read after the last change of the volume was over",
                (unsigned long long)s);
    }
    bool more = true;
    while (more && !h->violated) {
        more = false;
        for (uint64_t s = 0; s < h->n_sectors && !h->violated; s++)
            more |= judge_last(h, s);
    }
    return history_violation(h);
}

void history_counts(const struct history *h, struct history_counts *counts)
{
    *counts = h->counts;
    for (size_t i = 1; i <= h->n_ops; i++) {
        const struct op *op = &h->ops[i];
        if (op->kind == HISTORY_READ || !op->given_up)
            continue;
        counts->given_up_there += op->why != NOT_KNOWN;
        bool gone = op->gone;
        for (uint64_t s = op->first; s < op->first + op->n && op->why == NOT_KNOWN && !gone; s++)
            gone = h->shown[s].read && h->shown[s].op && h->shown[s].op < i;
        counts->given_up_gone += op->why == NOT_KNOWN && gone;
    }
}
