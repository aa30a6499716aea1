/*
 * Verifying a volume; verify.h says what that is.
 *
 * First the index is walked (walk.h) and what each state names for the first time is read. What could
 * not be read is a problem from that state on, up to the last one that names it, and is told then.
 * Then the branch's keys are listed and compared with what was named: by count and sum of
 * hashes for each state, so that nothing needs to be remembered; only where these differ each
 * key is looked for in the index.
 *
 * A block of epoch x is named, if at all, by the oldest state of epoch x or later: whatever came later
 * can only have it from there. The same is true of rows.
 */
#include "volume/verify.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/check.h"
#include "base/hash.h"
#include "base/mem.h"
#include "volume/codec.h"
#include "volume/mask.h"

#define BATCHES 4u
#define BATCH_BLOCKS 64u
#define KEYS_PER_READ 4096u
/* Where reading keys reads their bodies. */
#define LIST_PARTS 16u
#define KEYS_PER_PART 32u
#define LEAKS_PER_LOOK 256u
#define RECORDS_MAX 65536u
#define NONE UINT32_MAX

/* A block or row, as somebody names it. */
struct thing {
    unsigned level; /* 0: block; 1, 2: row */
    uint64_t no;
    struct row_source at;
};

struct verdict {
    bool good;
    enum verify_what what;
    uint32_t from, to; /* bytes of the block that are lost */
};

struct suspect {
    struct thing thing;
    size_t state;
};

/* What is wrong from `first_state` on. */
struct problem {
    struct thing thing;
    struct verdict verdict;
    size_t first_state;
    uint32_t next; /* of the same level-1 row; NONE: the last one */
};

struct batch {
    struct verify_run *vr;
    struct store_read read;
    struct store_get gets[BATCH_BLOCKS];
    struct key keys[BATCH_BLOCKS];
    struct suspect blocks[BATCH_BLOCKS];
    struct verdict verdicts[BATCH_BLOCKS];
    uint8_t *data;
    uint32_t n;
    bool busy;
};

struct sum {
    uint64_t n, hashes;
};

struct trash {
    struct trash_record rec;
    uint64_t n;
};

/* What may explain that nothing names a key. */
struct reasons {
    struct ancestry_record ancestry;
    struct trash *trash;
    size_t n_trash, cap_trash;
    uint64_t *removed, *live; /* epochs of snapshots, rising */
    size_t n_removed, cap_removed, n_live, cap_live;
    uint64_t unknown_upto; /* epochs up to here are not judged: a snapshot's record is damaged */
};

struct verify_run {
    struct verify *v;
    struct err *e;
    enum status st; /* what ended it */
    struct ancestry_record ancestry;
    struct state_record state;
    struct reasons reasons;
    struct key owner_key;
    uint8_t *owner_bytes; /* NULL: there is no such record */
    size_t owner_len;

    struct walk walk;
    struct walk_state *walked;
    struct batch batches[BATCHES];
    struct batch *filling;
    struct suspect *suspects;
    size_t n_suspects, cap_suspects;
    struct problem *problems; /* below the level-2 row at hand */
    size_t n_problems, cap_problems;
    uint32_t first_problem[INDEX_FANOUT]; /* by level-1 row */
    uint32_t row2_problem;
    struct sum *blocks_named, *rows_named; /* by state: own ones of epochs that are only its */
    bool index_lost;                       /* some row, or a whole part, could not be read */
    bool counts_differ;
    uint64_t n_leaks;

    struct row_reader rows;
    bool rows_answered;
    enum status rows_st;
    size_t rows_state; /* whose rows `rows` reads */

    /* The finding at hand, while others may still belong to it. */
    struct verify_finding finding;
    struct thing last;
    bool have_finding;
};

/* ---- telling ---- */

static void key_text(const struct thing *t, char out[VERIFY_KEY_BYTES])
{
    if (t->level)
        snprintf(out, VERIFY_KEY_BYTES, "(\"i\", %" PRIu64 ", %u, %" PRIu64 ", %" PRIu64 ")",
                 t->at.branch, t->level, t->no, t->at.epoch);
    else
        snprintf(out, VERIFY_KEY_BYTES, "(\"b\", %" PRIu64 ", %" PRIu64 ", %" PRIu64 ")",
                 t->at.branch, t->at.epoch, t->no);
}

static void finding_end(struct verify_run *vr)
{
    if (!vr->have_finding)
        return;
    vr->have_finding = false;
    vr->v->found(vr->v, &vr->finding);
}

static void tell(struct verify_run *vr, const struct verify_finding *f)
{
    finding_end(vr);
    vr->v->n_wrong++;
    vr->v->n_repaired += f->repaired;
    vr->v->found(vr->v, f);
}

/* Bytes of the volume that a thing covers. */
static uint64_t offset_of(const struct verify_run *vr, const struct thing *t)
{
    return (t->no << t->level * INDEX_SHIFT) * vr->v->header.block_size;
}

/* Tells of a block or row, together with those before and behind it of which the same is true. */
static void tell_thing(struct verify_run *vr, const struct thing *t, const struct verdict *verdict,
                       size_t first_state, size_t last_state, bool repaired)
{
    struct verify *v = vr->v;
    struct verify_finding *f = &vr->finding;
    v->n_wrong++;
    v->n_repaired += repaired;
    uint64_t span = (uint64_t)v->header.block_size << t->level * INDEX_SHIFT;
    if (vr->have_finding && f->what == verdict->what && verdict->what != VERIFY_BYTES_LOST &&
        f->first_state == first_state && f->last_state == last_state && f->repaired == repaired &&
        vr->last.level == t->level && vr->last.at.branch == t->at.branch &&
        vr->last.at.epoch == t->at.epoch && vr->last.no + 1 == t->no) {
        f->length += span;
        f->n_keys++;
        vr->last = *t;
        return;
    }
    finding_end(vr);
    *f = (struct verify_finding){.what = verdict->what,
                                 .first_state = first_state,
                                 .last_state = last_state,
                                 .offset = offset_of(vr, t),
                                 .length = span,
                                 .n_keys = 1,
                                 .repaired = repaired};
    if (verdict->what == VERIFY_BYTES_LOST) {
        f->offset += verdict->from;
        f->length = verdict->to - verdict->from;
    }
    key_text(t, f->key);
    vr->last = *t;
    vr->have_finding = true;
}

/* ---- problems: from the state that sees one to the last one that does ---- */

static void problem_add(struct verify_run *vr, const struct suspect *s,
                        const struct verdict *verdict)
{
    CHECK(vr->n_problems < NONE);
    mem_grow(&vr->problems, &vr->cap_problems, vr->n_problems + 1, sizeof *vr->problems);
    struct problem *p = &vr->problems[vr->n_problems];
    *p = (struct problem){
        .thing = s->thing, .verdict = *verdict, .first_state = s->state, .next = NONE};
    uint32_t *at = &vr->row2_problem;
    if (s->thing.level < 2) {
        uint64_t row1 = s->thing.no >> (1 - s->thing.level) * INDEX_SHIFT;
        at = &vr->first_problem[row1 & (INDEX_FANOUT - 1)];
    }
    while (s->thing.level < 2 && *at != NONE)
        at = &vr->problems[*at].next;
    *at = (uint32_t)vr->n_problems++;
    vr->index_lost |= s->thing.level > 0;
}

static void problem_over(struct verify_run *vr, const struct problem *p, size_t last_state)
{
    tell_thing(vr, &p->thing, &p->verdict, p->first_state, last_state, false);
}

/* Whether a row still names what could not be read. */
static bool still_named(const struct problem *p, const struct walk_row *now)
{
    if (p->thing.level == 1)
        return p->thing.at.branch == now->at.branch && p->thing.at.epoch == now->at.epoch;
    const struct row_source *src = row1_data(now->row, p->thing.no & (INDEX_FANOUT - 1));
    return src && src->branch == p->thing.at.branch && src->epoch == p->thing.at.epoch;
}

/* ---- judging a block or row ---- */

/* The bytes of a block that a mask leaves out, from the first to the last. */
static void lost_bytes(const struct mask *m, uint32_t block_size, struct verdict *out)
{
    uint32_t at = 0, begin, end;
    out->from = block_size;
    out->to = 0;
    while (mask_next_run(m, block_size, at, &begin, &end)) {
        if (begin > at) {
            out->from = out->from < at ? out->from : at;
            out->to = begin;
        }
        at = end;
    }
    if (at < block_size) {
        out->from = out->from < at ? out->from : at;
        out->to = block_size;
    }
}

static struct verdict judge_block(const struct thing *t, const struct store_get *get,
                                  uint32_t block_size)
{
    struct verdict out = {.what = VERIFY_BLOCK_DAMAGED};
    if (get->st == ST_NOTFOUND)
        out.what = VERIFY_BLOCK_MISSING;
    if (get->st != ST_OK)
        return out;
    struct block_place place = {t->at.branch, t->at.epoch, t->no};
    struct slice stored;
    if (!block_decode(&place, get->head, get->body, get->body_len, block_size, &stored))
        return out;
    out.good = stored.len == 0;
    if (out.good)
        return out;
    struct mask mask;
    mask_init(&mask);
    if (mask_decode(&mask, block_size, stored)) {
        out.what = VERIFY_BYTES_LOST;
        lost_bytes(&mask, block_size, &out);
        out.good = out.from >= out.to;
    }
    mask_free(&mask);
    return out;
}

static struct verdict judge_row(const struct thing *t, const struct store_get *get)
{
    struct verdict out = {.what = get->st == ST_NOTFOUND ? VERIFY_ROW_MISSING : VERIFY_ROW_DAMAGED};
    if (get->st != ST_OK)
        return out;
    if (t->level == 1) {
        struct row1 row;
        row1_init(&row);
        out.good = row1_decode(&row, get->key, get->head);
        row1_free(&row);
    } else {
        struct row2 *row = mem_alloc(sizeof *row);
        out.good = row2_decode(row, get->key, get->head);
        free(row);
    }
    return out;
}

static void thing_key(const struct thing *t, struct key *key)
{
    if (t->level)
        key_row(key, t->at.branch, t->level, t->no, t->at.epoch);
    else
        key_block(key, t->at.branch, t->at.epoch, t->no);
}

/* ---- reading blocks ---- */

static void suspect_add(struct verify_run *vr, const struct suspect *s)
{
    mem_grow(&vr->suspects, &vr->cap_suspects, vr->n_suspects + 1, sizeof *vr->suspects);
    vr->suspects[vr->n_suspects++] = *s;
}

/* On a worker thread. */
static void batch_digest(struct store_read *read)
{
    struct batch *b = container_of(read, struct batch, read);
    for (uint32_t i = 0; i < b->n; i++)
        b->verdicts[i] =
            judge_block(&b->blocks[i].thing, &b->gets[i], b->vr->v->header.block_size);
}

static void batch_done(struct store_read *read, enum status st)
{
    struct batch *b = container_of(read, struct batch, read);
    struct verify_run *vr = b->vr;
    store_read_release(read);
    if (st != ST_OK && vr->st == ST_OK)
        vr->st = fail(vr->e, st, "cannot read blocks: %s", status_text(st));
    for (uint32_t i = 0; i < b->n && st == ST_OK; i++)
        if (!b->verdicts[i].good)
            suspect_add(vr, &b->blocks[i]);
    vr->v->n_blocks += b->n;
    vr->v->n_bytes += (uint64_t)b->n * vr->v->header.block_size;
    b->n = 0;
    b->busy = false;
}

static void batch_start(struct verify_run *vr, struct batch *b)
{
    uint32_t block_size = vr->v->header.block_size;
    for (uint32_t i = 0; i < b->n; i++) {
        thing_key(&b->blocks[i].thing, &b->keys[i]);
        b->gets[i] = (struct store_get){.key = key_slice(&b->keys[i]),
                                        .body = b->data + (size_t)i * block_size,
                                        .body_cap = block_size};
    }
    b->read = (struct store_read){.gets = b->gets,
                                  .n_gets = b->n,
                                  .background = true,
                                  .tag = vr->v->branch,
                                  .digest = batch_digest,
                                  .done = batch_done};
    b->busy = true;
    store_read(vr->v->store, vr->v->env, &b->read);
}

static void block_add(struct verify_run *vr, size_t state, const struct thing *t)
{
    while (!vr->filling) {
        for (size_t i = 0; i < BATCHES && !vr->filling; i++)
            if (!vr->batches[i].busy)
                vr->filling = &vr->batches[i];
        if (!vr->filling)
            vr->v->run_once(vr->v->env);
    }
    struct batch *b = vr->filling;
    b->blocks[b->n++] = (struct suspect){*t, state};
    if (b->n == BATCH_BLOCKS) {
        vr->filling = NULL;
        batch_start(vr, b);
    }
}

static void batches_wait(struct verify_run *vr)
{
    if (vr->filling && vr->filling->n)
        batch_start(vr, vr->filling);
    vr->filling = NULL;
    for (size_t i = 0; i < BATCHES; i++)
        while (vr->batches[i].busy)
            vr->v->run_once(vr->v->env);
}

static enum status read_wait(struct verify_run *vr, struct walk_read *r)
{
    r->read.tag = vr->v->branch;
    enum status st = walk_read(r, vr->v->store, vr->v->env, vr->v->run_once);
    if (st != ST_OK && st != ST_IO)
        fail(vr->e, st, "cannot read the store: %s", status_text(st));
    return st;
}

/* ---- looking again ---- */

/* The key that says whether a state still is what it was, and whether it does. */
static void stands_key(const struct verify_run *vr, size_t state, struct key *key)
{
    if (vr->v->states[state].is_volume)
        *key = vr->owner_key;
    else
        key_snapshot(key, vr->v->branch, vr->v->states[state].epoch);
}

static bool owner_stands(const struct verify_run *vr, const struct store_get *get)
{
    if (get->st != ST_OK)
        return get->st == ST_NOTFOUND && !vr->owner_bytes;
    return vr->owner_bytes && get->head.len == vr->owner_len &&
           memcmp(get->head.data, vr->owner_bytes, vr->owner_len) == 0;
}

static bool stands(struct verify_run *vr, size_t state, const struct store_get *get)
{
    struct verify *v = vr->v;
    struct snapshot_record rec;
    if (v->states[state].gone)
        return false;
    if (v->states[state].is_volume) {
        if (!owner_stands(vr, get) && vr->st == ST_OK)
            vr->st = fail(vr->e, ST_BUSY, "somebody has taken the volume in use meanwhile");
        return vr->st == ST_OK;
    }
    if (get->st == ST_OK && snapshot_decode(get->key, get->head, &rec) && !rec.removed)
        return true;
    v->states[state].gone = true;
    if (v->upto && v->states[state].epoch == v->upto && vr->st == ST_OK)
        vr->st = fail(vr->e, ST_BUSY, "the snapshot that was made for this was removed");
    return false;
}

/* Looks again at up to BATCH_BLOCKS suspects, which all are of one state. */
static void suspects_look(struct verify_run *vr, const struct suspect *s, size_t n)
{
    struct batch *b = &vr->batches[0];
    struct store_get gets[BATCH_BLOCKS + 1];
    struct key stands_at;
    uint32_t block_size = vr->v->header.block_size;
    for (size_t i = 0; i < n; i++) {
        thing_key(&s[i].thing, &b->keys[i]);
        gets[i] = (struct store_get){.key = key_slice(&b->keys[i])};
        if (s[i].thing.level == 0) {
            gets[i].body = b->data + i * block_size;
            gets[i].body_cap = block_size;
        }
    }
    stands_key(vr, s[0].state, &stands_at);
    gets[n] = (struct store_get){.key = key_slice(&stands_at)};
    struct walk_read r = {.read = {.gets = gets, .n_gets = (uint32_t)n + 1}};
    enum status st = read_wait(vr, &r);
    if (st != ST_OK) {
        if (vr->st == ST_OK)
            vr->st = fail(vr->e, st, "cannot read blocks: %s", status_text(st));
    } else if (stands(vr, s[0].state, &gets[n])) {
        for (size_t i = 0; i < n; i++) {
            struct verdict verdict = s[i].thing.level ? judge_row(&s[i].thing, &gets[i])
                                                      : judge_block(&s[i].thing, &gets[i], block_size);
            if (!verdict.good)
                problem_add(vr, &s[i], &verdict);
        }
    }
    store_read_release(&r.read);
}

/* ---- the walk ---- */

static struct verify_run *run_of(struct walk *w)
{
    return container_of(w, struct verify_run, walk);
}

static bool walk_go_on(struct walk *w)
{
    struct verify_run *vr = run_of(w);
    return vr->st == ST_OK && vr->v->go_on(vr->v);
}

static void walk_row2(struct walk *w, size_t state, uint64_t no, struct row_source at,
                      enum row_found found)
{
    struct verify_run *vr = run_of(w);
    if (vr->row2_problem != NONE) {
        problem_over(vr, &vr->problems[vr->row2_problem], state - 1);
        vr->problems[vr->row2_problem].first_state = VERIFY_NOBODY;
        vr->row2_problem = NONE;
    }
    if (found != ROW_DAMAGED)
        return;
    struct suspect s = {{2, no, at}, state};
    struct verdict unreadable = {.what = VERIFY_UNREADABLE};
    if (at.epoch)
        suspect_add(vr, &s);
    else
        problem_add(vr, &s, &unreadable);
}

/* Own things of epochs that no older state can have: counted, to be compared with what is stored. */
static bool only_of(const struct verify_run *vr, size_t state, struct row_source at)
{
    uint64_t before = state ? vr->v->states[state - 1].epoch : 0;
    return at.branch == vr->v->branch && at.epoch > before;
}

static void sum_add(struct sum *sum, uint64_t epoch, uint64_t no)
{
    sum->n++;
    sum->hashes += hash_mix(hash_mix(0x76657266u, epoch), no);
}

static void walk_row1(struct walk *w, size_t state, uint64_t no, const struct walk_row *before,
                      const struct walk_row *now)
{
    struct verify_run *vr = run_of(w);
    uint32_t *at = &vr->first_problem[no & (INDEX_FANOUT - 1)];
    while (*at != NONE) {
        struct problem *p = &vr->problems[*at];
        if (still_named(p, now)) {
            at = &p->next;
            continue;
        }
        problem_over(vr, p, state - 1);
        p->first_state = VERIFY_NOBODY;
        *at = p->next;
    }
    if (now->at.epoch && only_of(vr, state, now->at))
        sum_add(&vr->rows_named[state], now->at.epoch, no);
    if (now->found != ROW_THERE) {
        suspect_add(vr, &(struct suspect){{1, no, now->at}, state});
        return;
    }
    for (unsigned i = 0; i < INDEX_FANOUT; i++) {
        const struct row_source *src = row1_data(now->row, i), *was = row1_data(before->row, i);
        if (!src || (was && was->branch == src->branch && was->epoch == src->epoch))
            continue;
        struct thing block = {0, (no << INDEX_SHIFT) + i, *src};
        if (only_of(vr, state, *src))
            sum_add(&vr->blocks_named[state], src->epoch, block.no);
        block_add(vr, state, &block);
    }
}

static void walk_state_over(struct walk *w, size_t state, uint64_t no)
{
    struct verify_run *vr = run_of(w);
    (void)state;
    (void)no;
    batches_wait(vr);
    for (size_t i = 0; i < vr->n_suspects && vr->st == ST_OK;) {
        size_t n = 1;
        while (n < BATCH_BLOCKS && i + n < vr->n_suspects)
            n++;
        suspects_look(vr, &vr->suspects[i], n);
        i += n;
    }
    vr->n_suspects = 0;
}

static void walk_row2_over(struct walk *w, uint64_t no)
{
    struct verify_run *vr = run_of(w);
    (void)no;
    for (size_t i = 0; i < vr->n_problems; i++)
        if (vr->problems[i].first_state != VERIFY_NOBODY)
            problem_over(vr, &vr->problems[i], vr->v->n_states - 1);
    vr->n_problems = 0;
    vr->row2_problem = NONE;
    memset(vr->first_problem, 0xff, sizeof vr->first_problem);
}

/* ---- repairs ---- */

struct committing {
    struct store_commit commit;
    enum status st;
    bool done;
};

static void committed(struct store_commit *commit, enum status st)
{
    struct committing *c = container_of(commit, struct committing, commit);
    c->st = st;
    c->done = true;
}

/* Changes something while nobody owns the volume. False: it could not be done. */
static bool repair(struct verify_run *vr, const struct store_check *check,
                   const struct store_mutation *mutations, size_t n)
{
    struct store_check checks[2] = {
        {.kind = vr->owner_bytes ? STORE_CHECK_VALUE : STORE_CHECK_ABSENT,
         .key = key_slice(&vr->owner_key),
         .value = {vr->owner_bytes, vr->owner_len}}};
    if (check)
        checks[1] = *check;
    struct committing c = {.commit = {.checks = checks,
                                      .n_checks = check ? 2 : 1,
                                      .mutations = mutations,
                                      .n_mutations = n,
                                      .background = true,
                                      .tag = vr->v->branch,
                                      .done = committed}};
    store_commit(vr->v->store, vr->v->env, &c.commit);
    while (!c.done)
        vr->v->run_once(vr->v->env);
    if (c.st == ST_CONFLICT && vr->st == ST_OK)
        vr->st = fail(vr->e, ST_BUSY, "somebody has taken the volume in use meanwhile");
    else if (c.st != ST_OK && vr->st == ST_OK)
        vr->st = fail(vr->e, c.st, "cannot repair: %s", status_text(c.st));
    return c.st == ST_OK;
}

/* Puts another value in the place of the one that was read. */
static bool repair_value(struct verify_run *vr, const struct key *key, struct slice was,
                         const uint8_t *bytes, size_t len)
{
    struct store_check check = {.kind = STORE_CHECK_VALUE, .key = key_slice(key), .value = was};
    struct store_mutation set = {.kind = STORE_SET, .key = key_slice(key), .head = {bytes, len}};
    return repair(vr, &check, &set, 1);
}

/* Makes level 2 say how many data blocks a level-1 row has. */
static bool repair_row2(struct verify_run *vr, uint64_t no, struct row_source at, unsigned is)
{
    struct key key;
    key_row(&key, at.branch, 2, no >> INDEX_SHIFT, at.epoch);
    struct store_get get = {.key = key_slice(&key)};
    struct walk_read r = {.read = {.gets = &get, .n_gets = 1}};
    bool done = false;
    struct row2 *row = mem_alloc(sizeof *row);
    uint8_t *bytes = mem_alloc(ROW_BYTES_MAX);
    if (read_wait(vr, &r) == ST_OK && get.st == ST_OK && row2_decode(row, get.key, get.head)) {
        row->entry[no & (INDEX_FANOUT - 1)].n_data = (uint16_t)is;
        size_t len = row2_encode(row, key_slice(&key), bytes);
        done = repair_value(vr, &key, get.head, bytes, len);
    }
    store_read_release(&r.read);
    free(bytes);
    free(row);
    return done;
}

static void walk_miscount(struct walk *w, size_t state, uint64_t no, struct row_source at,
                          unsigned said, unsigned is)
{
    struct verify_run *vr = run_of(w);
    struct thing row2 = {2, no >> INDEX_SHIFT, at}, row1 = {1, no, at};
    struct verify_finding f = {.what = VERIFY_ROW_COUNT,
                               .first_state = state,
                               .last_state = state,
                               .offset = offset_of(vr, &row1),
                               .length = (uint64_t)vr->v->header.block_size << INDEX_SHIFT,
                               .n_keys = 1,
                               .said = said,
                               .is = is};
    key_text(&row2, f.key);
    /* Another volume's is for a verification of that one. */
    if (vr->v->repair && vr->st == ST_OK && at.branch == vr->v->branch)
        f.repaired = repair_row2(vr, no, at, is);
    tell(vr, &f);
}

/* Makes a state say how many data blocks it has. */
static bool repair_count(struct verify_run *vr, size_t state)
{
    const struct verify_state *s = &vr->v->states[state];
    struct key key;
    if (s->is_volume)
        key_state(&key, vr->v->branch);
    else
        key_snapshot(&key, vr->v->branch, s->epoch);
    struct store_get get = {.key = key_slice(&key)};
    struct walk_read r = {.read = {.gets = &get, .n_gets = 1}};
    uint8_t bytes[RECORD_BYTES_MAX];
    size_t len = 0;
    enum status st = read_wait(vr, &r);
    if (st == ST_OK && get.st == ST_OK) {
        struct state_record state_rec;
        struct snapshot_record snapshot_rec;
        if (s->is_volume && state_decode(get.key, get.head, &state_rec)) {
            state_rec.data_blocks = vr->walked[state].n_data;
            len = state_encode(&state_rec, get.key, bytes);
        } else if (!s->is_volume && snapshot_decode(get.key, get.head, &snapshot_rec)) {
            snapshot_rec.data_blocks = vr->walked[state].n_data;
            len = snapshot_encode(&snapshot_rec, get.key, bytes);
        }
    }
    bool done = len && repair_value(vr, &key, get.head, bytes, len);
    store_read_release(&r.read);
    return done;
}

/* ---- reasons ---- */

static void reasons_free(struct reasons *why)
{
    free(why->trash);
    free(why->removed);
    free(why->live);
    *why = (struct reasons){0};
}

/* Takes in a trash record; false: it is none. */
static bool reason_trash(struct reasons *why, const struct store_pair *pair)
{
    struct trash t;
    uint64_t branch;
    if (!key_parse_trash(pair->key, &branch, &t.n) || !trash_decode(pair->key, pair->head, &t.rec))
        return false;
    mem_grow(&why->trash, &why->cap_trash, why->n_trash + 1, sizeof *why->trash);
    why->trash[why->n_trash++] = t;
    return true;
}

/* Takes in a snapshot's record; false: it is damaged. */
static bool reason_snapshot(struct reasons *why, const struct store_pair *pair,
                            struct snapshot_record *rec, uint64_t *epoch)
{
    uint64_t branch;
    if (!key_parse_snapshot(pair->key, &branch, epoch))
        return false;
    if (!snapshot_decode(pair->key, pair->head, rec)) {
        why->unknown_upto = max_u64(why->unknown_upto, *epoch);
        return false;
    }
    if (rec->removed) {
        mem_grow(&why->removed, &why->cap_removed, why->n_removed + 1, sizeof *why->removed);
        why->removed[why->n_removed++] = *epoch;
    } else {
        mem_grow(&why->live, &why->cap_live, why->n_live + 1, sizeof *why->live);
        why->live[why->n_live++] = *epoch;
    }
    return true;
}

/* Where the first of some rising epochs stands that is not below `epoch`. */
static size_t place_of(const uint64_t *epochs, size_t n, uint64_t epoch)
{
    size_t low = 0, high = n;
    while (low < high) {
        size_t middle = low + (high - low) / 2;
        if (epochs[middle] < epoch)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

/* Whether it is known that nothing may name what stands there in that epoch, in blocks [first,
 * end): somebody is about to clear it, or what may name it can't be told. */
static bool explained(const struct verify_run *vr, const struct reasons *why, uint64_t epoch,
                      uint64_t first, uint64_t end)
{
    if (epoch <= why->unknown_upto || !walk_epoch_counts(&why->ancestry, vr->v->branch, epoch))
        return true;
    for (size_t i = 0; i < why->n_trash; i++) {
        const struct trash_record *t = &why->trash[i].rec;
        if (epoch > t->after && epoch <= t->epoch && t->first_block < end && first < t->end_block)
            return true;
    }
    /* The oldest snapshot that could name it is removed: then what was only its is being cleared. */
    size_t removed = place_of(why->removed, why->n_removed, epoch);
    size_t live = place_of(why->live, why->n_live, epoch);
    return removed < why->n_removed &&
           (live == why->n_live || why->removed[removed] < why->live[live]);
}

/* ---- what nothing names ---- */

/* The oldest state that can name what is of `epoch`; n_states: there is none. */
static size_t state_of(const struct verify_run *vr, uint64_t epoch)
{
    size_t low = 0, high = vr->v->n_states;
    while (low < high) {
        size_t middle = low + (high - low) / 2;
        if (vr->v->states[middle].epoch < epoch)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

static void rows_answered(struct row_reader *rows, enum status st)
{
    struct verify_run *vr = container_of(rows, struct verify_run, rows);
    vr->rows_answered = true;
    vr->rows_st = st;
}

static bool rows_wait(struct verify_run *vr)
{
    while (!vr->rows_answered)
        vr->v->run_once(vr->v->env);
    vr->rows_answered = false;
    if (vr->rows_st != ST_OK && vr->st == ST_OK)
        vr->st = fail(vr->e, vr->rows_st, "cannot read the index: %s", status_text(vr->rows_st));
    return vr->rows_st == ST_OK;
}

/* Whether a state names a row or block of its own branch, or may, for its index can't be read. */
static bool names(struct verify_run *vr, size_t state, const struct thing *t)
{
    struct row_reader *rows = &vr->rows;
    if (vr->rows_state != state) {
        struct ancestry_record where;
        if (!ancestry_of_snapshot(&vr->ancestry, vr->v->branch, vr->v->states[state].epoch, &where))
            return true;
        row_reader_look_at(rows, &where);
        vr->rows_state = state;
    }
    uint64_t row1 = t->level ? t->no : t->no >> INDEX_SHIFT;
    uint64_t row2 = t->level == 2 ? t->no : row1 >> INDEX_SHIFT;
    if (!row_reader_row2(rows, row2) && !rows_wait(vr))
        return true;
    if (rows->row2_found == ROW_DAMAGED)
        return true;
    if (t->level == 2)
        return rows->row2_at.branch == t->at.branch && rows->row2_at.epoch == t->at.epoch;
    const struct row2_entry *e = &rows->row2.entry[row1 & (INDEX_FANOUT - 1)];
    if (e->kind != ROW2_ROW)
        return false;
    struct row_source at = {e->branch ? e->branch : rows->row2_at.branch, e->epoch};
    if (t->level == 1)
        return at.branch == t->at.branch && at.epoch == t->at.epoch;
    const struct row_reader_row *row = row_reader_row1(rows, row1, at);
    if (!row) {
        row_reader_want(rows, row1, at);
        if (!row_reader_start(rows) || !rows_wait(vr))
            return true;
        row = row_reader_row1(rows, row1, at);
    }
    if (!row || row->found != ROW_THERE)
        return true;
    const struct row_source *src = row1_data(&row->row, t->no & (INDEX_FANOUT - 1));
    return src && src->branch == t->at.branch && src->epoch == t->at.epoch;
}

static uint64_t first_block(const struct thing *t)
{
    return t->no << t->level * INDEX_SHIFT;
}

static uint64_t end_block(const struct thing *t)
{
    return (t->no + 1) << t->level * INDEX_SHIFT;
}

/* Looks again at keys that seem to be named by nothing, together with what may explain them. */
static void leaks_look(struct verify_run *vr)
{
    struct verify *v = vr->v;
    static const enum verify_what whats[] = {VERIFY_BLOCK_UNNAMED, VERIFY_ROW_UNNAMED,
                                             VERIFY_ROW_UNNAMED};
    struct key keys[LEAKS_PER_LOOK], trash[2], snapshots[2], ancestry;
    struct store_get gets[LEAKS_PER_LOOK + 2];
    struct store_range ranges[2];
    size_t n = vr->n_suspects;
    for (size_t i = 0; i < n; i++) {
        thing_key(&vr->suspects[i].thing, &keys[i]);
        gets[i] = (struct store_get){.key = key_slice(&keys[i])};
    }
    key_ancestry(&ancestry, v->branch);
    gets[n] = (struct store_get){.key = key_slice(&ancestry)};
    gets[n + 1] = (struct store_get){.key = key_slice(&vr->owner_key)};
    key_prefix_branch(&trash[0], 't', v->branch);
    key_prefix_branch(&snapshots[0], 'v', v->branch);
    trash[1] = trash[0];
    snapshots[1] = snapshots[0];
    key_prefix_end(&trash[1]);
    key_prefix_end(&snapshots[1]);
    ranges[0] = (struct store_range){
        .begin = key_slice(&trash[0]), .end = key_slice(&trash[1]), .limit = RECORDS_MAX};
    ranges[1] = (struct store_range){
        .begin = key_slice(&snapshots[0]), .end = key_slice(&snapshots[1]), .limit = RECORDS_MAX};
    struct walk_read r = {
        .read = {.gets = gets, .n_gets = (uint32_t)n + 2, .ranges = ranges, .n_ranges = 2}};
    struct reasons why = {0};
    enum status st = read_wait(vr, &r);
    bool known = st == ST_OK && !ranges[0].more && !ranges[1].more;
    if (!known && vr->st == ST_OK)
        vr->st = fail(vr->e, ST_IO, "cannot read the trash records and snapshots");
    struct snapshot_record rec;
    uint64_t epoch;
    for (uint32_t i = 0; i < ranges[0].n_pairs && known; i++)
        reason_trash(&why, &ranges[0].pairs[i]);
    for (uint32_t i = 0; i < ranges[1].n_pairs && known; i++)
        reason_snapshot(&why, &ranges[1].pairs[i], &rec, &epoch);
    if (known && gets[n].st == ST_OK)
        known = ancestry_decode(gets[n].key, gets[n].head, &why.ancestry);
    if (!v->upto && known && !owner_stands(vr, &gets[n + 1]) && vr->st == ST_OK)
        vr->st = fail(vr->e, ST_BUSY, "somebody has taken the volume in use meanwhile");
    struct store_mutation clears[LEAKS_PER_LOOK];
    size_t n_clears = 0, leaks[LEAKS_PER_LOOK];
    for (size_t i = 0; i < n && known && vr->st == ST_OK; i++) {
        const struct thing *t = &vr->suspects[i].thing;
        /* Snapshots that were removed since the beginning, and are cleared already. */
        size_t state = state_of(vr, t->at.epoch);
        bool moved = false;
        if (state < v->n_states && !v->states[state].is_volume) {
            moved = true;
            for (size_t k = 0; k < why.n_live && moved; k++)
                moved = why.live[k] != v->states[state].epoch;
        }
        if (gets[i].st == ST_NOTFOUND || moved ||
            explained(vr, &why, t->at.epoch, first_block(t), end_block(t)))
            continue;
        leaks[n_clears] = i;
        clears[n_clears++] = (struct store_mutation){.kind = STORE_CLEAR, .key = gets[i].key};
    }
    /* Where a part of the index may be lost, what it named is worth keeping. */
    bool repaired = false;
    if (v->repair && n_clears && !vr->index_lost && !vr->counts_differ && vr->st == ST_OK)
        repaired = repair(vr, NULL, clears, n_clears);
    for (size_t i = 0; i < n_clears; i++) {
        const struct thing *t = &vr->suspects[leaks[i]].thing;
        struct verdict verdict = {.what = whats[t->level]};
        tell_thing(vr, t, &verdict, VERIFY_NOBODY, VERIFY_NOBODY, repaired);
        vr->n_leaks++;
    }
    store_read_release(&r.read);
    reasons_free(&why);
    vr->n_suspects = 0;
}

static void leak_suspect(struct verify_run *vr, const struct thing *t)
{
    if (explained(vr, &vr->reasons, t->at.epoch, first_block(t), end_block(t)))
        return;
    suspect_add(vr, &(struct suspect){*t, 0});
    if (vr->n_suspects == LEAKS_PER_LOOK)
        leaks_look(vr);
}

static void walk_unseen(struct walk *w, uint64_t no, uint64_t epoch)
{
    struct verify_run *vr = run_of(w);
    struct thing t = {2, no, {vr->v->branch, epoch}};
    /* Judged at once: the suspects of the walk are others. */
    if (explained(vr, &vr->reasons, epoch, first_block(&t), end_block(&t)))
        return;
    struct suspect *kept = vr->suspects;
    size_t n_kept = vr->n_suspects, cap_kept = vr->cap_suspects;
    vr->suspects = NULL;
    vr->n_suspects = vr->cap_suspects = 0;
    suspect_add(vr, &(struct suspect){t, 0});
    leaks_look(vr);
    free(vr->suspects);
    vr->suspects = kept;
    vr->n_suspects = n_kept;
    vr->cap_suspects = cap_kept;
}

/* Keys of blocks or rows of this branch, [begin, end). */
struct listing {
    struct key begin, end;
    struct thing last; /* that was listed */
    bool any, over;
};

typedef void (*each_key)(struct verify_run *vr, const struct thing *t, void *arg);

/* The keys from this one on can't be read. */
static void tell_unreadable(struct verify_run *vr, const struct listing *l)
{
    struct verify_finding f = {.what = VERIFY_UNREADABLE,
                               .first_state = VERIFY_NOBODY,
                               .last_state = VERIFY_NOBODY};
    if (l->any)
        key_text(&l->last, f.key);
    else
        snprintf(f.key, sizeof f.key, "(\"%c\", %" PRIu64 ")", l->begin.bytes[1], vr->v->branch);
    tell(vr, &f);
}

/* Takes in what a read found of a part, which goes on behind that. */
static void listing_take(struct verify_run *vr, struct listing *l, const struct store_range *range,
                         each_key each, void *arg)
{
    for (uint32_t i = 0; i < range->n_pairs && vr->st == ST_OK; i++) {
        struct slice key = range->pairs[i].key;
        struct thing t = {0};
        if (!key_parse_row(key, &t.at.branch, &t.level, &t.no, &t.at.epoch) &&
            !key_parse_block(key, &t.at.branch, &t.at.epoch, &t.no))
            continue;
        l->last = t;
        l->any = true;
        each(vr, &t, arg);
    }
    l->over = !range->more;
    if (l->over)
        return;
    struct slice key = range->pairs[range->n_pairs - 1].key;
    memcpy(l->begin.bytes, key.data, key.len);
    l->begin.len = key.len;
    l->begin.bytes[l->begin.len++] = 0;
}

/* Goes through the keys of all parts, which are read side by side. */
static void listings_run(struct verify_run *vr, struct listing *parts, size_t n, uint32_t limit,
                         each_key each, void *arg)
{
    struct verify *v = vr->v;
    while (vr->st == ST_OK) {
        struct store_range ranges[LIST_PARTS];
        struct listing *of[LIST_PARTS];
        uint32_t n_ranges = 0;
        for (size_t i = 0; i < n; i++) {
            if (parts[i].over)
                continue;
            of[n_ranges] = &parts[i];
            ranges[n_ranges++] = (struct store_range){.begin = key_slice(&parts[i].begin),
                                                      .end = key_slice(&parts[i].end),
                                                      .limit = limit};
        }
        if (n_ranges == 0)
            return;
        struct walk_read r = {.read = {.ranges = ranges, .n_ranges = n_ranges}};
        enum status st = read_wait(vr, &r);
        if (st != ST_OK && st != ST_IO && vr->st == ST_OK)
            vr->st = st;
        for (uint32_t i = 0; i < n_ranges && st == ST_OK; i++)
            listing_take(vr, of[i], &ranges[i], each, arg);
        store_read_release(&r.read);
        if (st == ST_IO) {
            tell_unreadable(vr, of[0]);
            return;
        }
        if (vr->st == ST_OK && !v->go_on(v))
            vr->st = fail(vr->e, ST_SHUTDOWN, "interrupted");
    }
}

/* The oldest epoch from *epoch on that has blocks. */
static bool next_epoch(struct verify_run *vr, uint64_t *epoch)
{
    struct key begin, end;
    key_prefix_blocks(&begin, vr->v->branch, *epoch);
    key_prefix_branch(&end, 'b', vr->v->branch);
    key_prefix_end(&end);
    struct store_range range = {
        .begin = key_slice(&begin), .end = key_slice(&end), .limit = 1};
    struct walk_read r = {.read = {.ranges = &range, .n_ranges = 1}};
    enum status st = read_wait(vr, &r);
    uint64_t branch, no;
    bool found = st == ST_OK && range.n_pairs &&
                 key_parse_block(range.pairs[0].key, &branch, epoch, &no);
    store_read_release(&r.read);
    if (st != ST_OK && vr->st == ST_OK)
        vr->st = fail(vr->e, st, "cannot list the blocks: %s", status_text(st));
    return found;
}

/* Goes through all keys of blocks ('b') or rows ('i'). Where reading keys brings their bodies along,
 * piece after piece would take a round trip for each few of them: parts are read side by side. */
static void keys_list(struct verify_run *vr, char tag, each_key each, void *arg)
{
    struct verify *v = vr->v;
    if (tag == 'i' || !v->store->limits.clears_ranges) {
        struct listing all = {0};
        key_prefix_branch(&all.begin, tag, v->branch);
        all.end = all.begin;
        key_prefix_end(&all.end);
        listings_run(vr, &all, 1, KEYS_PER_READ, each, arg);
        return;
    }
    for (uint64_t epoch = 0; vr->st == ST_OK && next_epoch(vr, &epoch); epoch++) {
        struct listing parts[LIST_PARTS] = {0};
        for (uint64_t i = 0; i < LIST_PARTS; i++) {
            key_block(&parts[i].begin, v->branch, epoch, vr->walk.n_blocks * i / LIST_PARTS);
            if (i > 0)
                parts[i - 1].end = parts[i].begin;
        }
        key_prefix_blocks(&parts[LIST_PARTS - 1].end, v->branch, epoch + 1);
        listings_run(vr, parts, LIST_PARTS, KEYS_PER_PART, each, arg);
    }
}

static void sum_key(struct verify_run *vr, const struct thing *t, void *arg)
{
    struct sum *sums = arg;
    size_t state = state_of(vr, t->at.epoch);
    if (state == vr->v->n_states && !vr->v->upto)
        leak_suspect(vr, t); /* of an epoch that has not begun */
    else if (state < vr->v->n_states && t->level < 2)
        sum_add(&sums[state], t->at.epoch, t->no);
}

/* Of the states in which something is stored that is not named, or the other way round. */
static void search_key(struct verify_run *vr, const struct thing *t, void *arg)
{
    const bool *differs = arg;
    size_t state = state_of(vr, t->at.epoch);
    if (t->level == 2 || state == vr->v->n_states || !differs[state])
        return;
    if (!names(vr, state, t))
        leak_suspect(vr, t);
}

/* Finds what of blocks ('b') or rows ('i') is stored and named by nothing. */
static void leaks_find(struct verify_run *vr, char tag, const struct sum *named)
{
    struct verify *v = vr->v;
    struct sum *stored = mem_zalloc(v->n_states * sizeof *stored);
    bool *differs = mem_zalloc(v->n_states * sizeof *differs), any = false;
    keys_list(vr, tag, sum_key, stored);
    for (size_t i = 0; i < v->n_states; i++) {
        differs[i] = stored[i].n != named[i].n || stored[i].hashes != named[i].hashes;
        any |= differs[i];
    }
    if (any)
        keys_list(vr, tag, search_key, differs);
    if (vr->n_suspects && vr->st == ST_OK)
        leaks_look(vr);
    free(stored);
    free(differs);
}

/* ---- records ---- */

/* A record that is damaged or of something that is not there. */
static void tell_record(struct verify_run *vr, struct slice key, const char *text, bool clear)
{
    struct verify_finding f = {.what = VERIFY_RECORD,
                               .first_state = VERIFY_NOBODY,
                               .last_state = VERIFY_NOBODY,
                               .n_keys = 1};
    snprintf(f.key, sizeof f.key, "%s", text);
    if (clear && vr->v->repair) {
        struct store_mutation m = {.kind = STORE_CLEAR, .key = key};
        f.repaired = repair(vr, NULL, &m, 1);
    }
    tell(vr, &f);
}

static void trash_look(struct verify_run *vr)
{
    struct verify *v = vr->v;
    struct key begin, end;
    key_prefix_branch(&begin, 't', v->branch);
    end = begin;
    key_prefix_end(&end);
    struct store_range range = {
        .begin = key_slice(&begin), .end = key_slice(&end), .limit = RECORDS_MAX};
    struct walk_read r = {.read = {.ranges = &range, .n_ranges = 1}};
    enum status st = read_wait(vr, &r);
    if (st != ST_OK && vr->st == ST_OK)
        vr->st = fail(vr->e, st, "cannot read the trash records: %s", status_text(st));
    for (uint32_t i = 0; i < range.n_pairs && st == ST_OK; i++) {
        char text[VERIFY_KEY_BYTES];
        uint64_t branch, n = 0;
        bool whole = reason_trash(&vr->reasons, &range.pairs[i]);
        key_parse_trash(range.pairs[i].key, &branch, &n);
        snprintf(text, sizeof text, "(\"t\", %" PRIu64 ", %" PRIu64 ")", v->branch, n);
        /* (An owner may have written newer ones than the state record that was read.) */
        bool ahead = !v->upto && n >= vr->state.trash_next;
        if (whole && !ahead)
            continue;
        if (whole)
            vr->reasons.n_trash--;
        tell_record(vr, range.pairs[i].key, text, true);
    }
    store_read_release(&r.read);
}

/* Records of clones that are not there would keep a snapshot for ever. */
static void children_look(struct verify_run *vr)
{
    struct verify *v = vr->v;
    struct key begin, end;
    key_prefix_branch(&begin, 'd', v->branch);
    end = begin;
    key_prefix_end(&end);
    struct store_range range = {
        .begin = key_slice(&begin), .end = key_slice(&end), .limit = RECORDS_MAX};
    struct walk_read r = {.read = {.ranges = &range, .n_ranges = 1}};
    enum status st = read_wait(vr, &r);
    for (uint32_t i = 0; i < range.n_pairs && st == ST_OK && vr->st == ST_OK; i++) {
        uint64_t branch, epoch, child;
        struct key header;
        if (!key_parse_child(range.pairs[i].key, &branch, &epoch, &child))
            continue;
        key_header(&header, child);
        struct store_get gets[2] = {{.key = key_slice(&header)}, {.key = range.pairs[i].key}};
        struct walk_read again = {.read = {.gets = gets, .n_gets = 2}};
        struct header_record rec;
        enum status st2 = read_wait(vr, &again);
        bool is_clone = gets[0].st == ST_OK && header_decode(gets[0].key, gets[0].head, &rec) &&
                        rec.parent_branch == branch && rec.parent_epoch == epoch;
        bool gone = gets[0].st == ST_NOTFOUND;
        bool there = gets[1].st == ST_OK;
        store_read_release(&again.read);
        if (st2 == ST_OK && there && !is_clone) {
            char text[VERIFY_KEY_BYTES];
            snprintf(text, sizeof text,
                     "(\"d\", %" PRIu64 ", %" PRIu64 ", %" PRIu64 ")", branch, epoch, child);
            tell_record(vr, range.pairs[i].key, text, gone);
        }
    }
    store_read_release(&r.read);
}

/* ---- all of it ---- */

static void state_take(struct verify_run *vr, const struct store_pair *pair)
{
    struct verify *v = vr->v;
    struct verify_state s = {0};
    if (!reason_snapshot(&vr->reasons, pair, &s.rec, &s.epoch)) {
        char text[VERIFY_KEY_BYTES];
        snprintf(text, sizeof text, "(\"v\", %" PRIu64 ", %" PRIu64 ")", v->branch, s.epoch);
        tell_record(vr, pair->key, text, false);
        return;
    }
    if (!s.rec.removed && (!v->upto || s.epoch <= v->upto))
        v->states[v->n_states++] = s;
}

/* Reads the records, and what states there are. */
static enum status records_read(struct verify_run *vr)
{
    struct verify *v = vr->v;
    struct key header, state, ancestry, snapshots, end;
    key_header(&header, v->branch);
    key_state(&state, v->branch);
    key_ancestry(&ancestry, v->branch);
    key_owner(&vr->owner_key, v->branch);
    key_prefix_branch(&snapshots, 'v', v->branch);
    end = snapshots;
    key_prefix_end(&end);
    struct store_get gets[] = {{.key = key_slice(&header)},
                               {.key = key_slice(&state)},
                               {.key = key_slice(&ancestry)},
                               {.key = key_slice(&vr->owner_key)}};
    struct store_range range = {
        .begin = key_slice(&snapshots), .end = key_slice(&end), .limit = RECORDS_MAX};
    struct walk_read r = {.read = {.gets = gets, .n_gets = 4, .ranges = &range, .n_ranges = 1}};
    enum status st = read_wait(vr, &r);
    if (st == ST_IO)
        fail(vr->e, st, "cannot read the records of its snapshots: %s", status_text(st));
    if (st == ST_OK && gets[0].st == ST_NOTFOUND)
        st = fail(vr->e, ST_NOTFOUND, "it was removed meanwhile");
    if (st == ST_OK && (gets[0].st != ST_OK || !header_decode(gets[0].key, gets[0].head, &v->header)))
        st = fail(vr->e, ST_IO, "its header is damaged");
    if (st == ST_OK && (gets[1].st != ST_OK || !state_decode(gets[1].key, gets[1].head, &vr->state)))
        st = fail(vr->e, ST_IO, "its state record is damaged");
    if (st == ST_OK && gets[2].st != ST_NOTFOUND &&
        (gets[2].st != ST_OK || !ancestry_decode(gets[2].key, gets[2].head, &vr->ancestry)))
        st = fail(vr->e, ST_IO, "the record of its ancestry is damaged");
    if (st == ST_OK && gets[3].st != ST_OK && gets[3].st != ST_NOTFOUND)
        st = fail(vr->e, ST_IO, "its owner record is damaged");
    if (st == ST_OK && gets[3].st == ST_OK) {
        vr->owner_len = gets[3].head.len;
        vr->owner_bytes = mem_alloc(vr->owner_len + 1);
        memcpy(vr->owner_bytes, gets[3].head.data, vr->owner_len);
    }
    if (st == ST_OK) {
        vr->reasons.ancestry = vr->ancestry;
        v->states = mem_zalloc((range.n_pairs + 1) * sizeof *v->states);
        for (uint32_t i = 0; i < range.n_pairs; i++)
            state_take(vr, &range.pairs[i]);
        if (!v->upto) {
            struct verify_state *s = &v->states[v->n_states++];
            *s = (struct verify_state){.epoch = v->header.epoch, .is_volume = true};
            s->rec.size = v->header.size;
            s->rec.data_blocks = vr->state.data_blocks;
        } else if (!v->n_states || v->states[v->n_states - 1].epoch != v->upto) {
            st = fail(vr->e, ST_BUSY, "the snapshot that was made for this was removed");
        }
    }
    store_read_release(&r.read);
    return st;
}

static enum status walk(struct verify_run *vr)
{
    struct verify *v = vr->v;
    uint64_t size = 0;
    vr->walked = mem_zalloc(v->n_states * sizeof *vr->walked);
    for (size_t i = 0; i < v->n_states; i++) {
        vr->walked[i].epoch = v->states[i].epoch;
        size = max_u64(size, v->states[i].rec.size);
    }
    vr->walk = (struct walk){.store = v->store,
                             .env = v->env,
                             .run_once = v->run_once,
                             .branch = v->branch,
                             .ancestry = &vr->ancestry,
                             .n_blocks = (size + v->header.block_size - 1) / v->header.block_size,
                             .states = vr->walked,
                             .n_states = v->n_states,
                             .go_on = walk_go_on,
                             .row2 = walk_row2,
                             .unseen = walk_unseen,
                             .row1 = walk_row1,
                             .miscount = walk_miscount,
                             .state_over = walk_state_over,
                             .row2_over = walk_row2_over};
    struct err e = {0};
    enum status st = walk_run(&vr->walk, &e);
    batches_wait(vr);
    v->n_rows = vr->walk.n_rows;
    if (vr->st == ST_OK && st != ST_OK)
        vr->st = fail(vr->e, st, "%s", e.text);
    return vr->st;
}

/* Whether a state's count is known, and is another than it says. */
static bool count_differs(const struct verify_run *vr, size_t i)
{
    const struct verify_state *s = &vr->v->states[i];
    return !s->gone && !vr->walked[i].uncertain && vr->walked[i].n_data != s->rec.data_blocks;
}

static void counts_tell(struct verify_run *vr)
{
    struct verify *v = vr->v;
    for (size_t i = 0; i < v->n_states && vr->st == ST_OK; i++) {
        if (!count_differs(vr, i))
            continue;
        struct verify_finding f = {.what = VERIFY_COUNT,
                                   .first_state = i,
                                   .last_state = i,
                                   .n_keys = 1,
                                   .said = v->states[i].rec.data_blocks,
                                   .is = vr->walked[i].n_data};
        if (v->states[i].is_volume)
            snprintf(f.key, sizeof f.key, "(\"a\", %" PRIu64 ")", v->branch);
        else
            snprintf(f.key, sizeof f.key, "(\"v\", %" PRIu64 ", %" PRIu64 ")", v->branch,
                     v->states[i].epoch);
        /* Blocks that nothing names, and a count that has them: then it is a row that is lost. */
        if (v->repair && !vr->index_lost && !vr->n_leaks)
            f.repaired = repair_count(vr, i);
        tell(vr, &f);
    }
}

enum status verify_run(struct verify *v, struct err *e)
{
    struct verify_run *vr = v->run = mem_zalloc(sizeof *vr);
    vr->v = v;
    vr->e = e;
    vr->rows_state = SIZE_MAX;
    vr->row2_problem = NONE;
    memset(vr->first_problem, 0xff, sizeof vr->first_problem);
    row_reader_init(&vr->rows, v->store, v->env);
    vr->rows.how = (struct store_read){.background = true, .tag = v->branch};
    vr->rows.ready = rows_answered;
    v->states = NULL;
    v->n_states = 0;
    v->n_blocks = v->n_bytes = v->n_rows = v->n_wrong = v->n_repaired = 0;
    enum status st = records_read(vr);
    if (st == ST_OK) {
        for (size_t i = 0; i < BATCHES; i++) {
            vr->batches[i].vr = vr;
            vr->batches[i].data = mem_alloc((size_t)BATCH_BLOCKS * v->header.block_size);
        }
        vr->blocks_named = mem_zalloc(v->n_states * sizeof *vr->blocks_named);
        vr->rows_named = mem_zalloc(v->n_states * sizeof *vr->rows_named);
        trash_look(vr);
        children_look(vr);
        st = vr->st != ST_OK ? vr->st : walk(vr);
    }
    if (st == ST_OK) {
        for (size_t i = 0; i < v->n_states; i++)
            vr->counts_differ |= count_differs(vr, i);
        leaks_find(vr, 'i', vr->rows_named);
        leaks_find(vr, 'b', vr->blocks_named);
        counts_tell(vr);
        st = vr->st;
    }
    finding_end(vr);
    for (size_t i = 0; i < BATCHES; i++)
        free(vr->batches[i].data);
    row_reader_free(&vr->rows);
    reasons_free(&vr->reasons);
    free(vr->owner_bytes);
    free(vr->walked);
    free(vr->suspects);
    free(vr->problems);
    free(vr->blocks_named);
    free(vr->rows_named);
    free(vr);
    v->run = NULL;
    return st;
}

void verify_free(struct verify *v)
{
    free(v->states);
    v->states = NULL;
    v->n_states = 0;
}
