/*
 * Verifying a volume; verify.h says what that is.
 *
 * First the index is walked (walk.h) and what each state names for the first time is read. What
 * could not be read is a problem from that state on, up to the last one that names it, and is told
 * then. Then what is stored is compared with what was named (verify_unnamed.c), and the counts of
 * the records with the rows'.
 */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/hash.h"
#include "volume/codec.h"
#include "volume/mask.h"
#include "volume/verify_internal.h"

#define NONE UINT32_MAX

/* ---- telling ---- */

void verify_key_text(const struct thing *t, char out[VERIFY_KEY_BYTES])
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

void verify_tell(struct verify_run *vr, const struct verify_finding *f)
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
void verify_tell_thing(struct verify_run *vr, const struct thing *t, const struct verdict *verdict,
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
    verify_key_text(t, f->key);
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
    verify_tell_thing(vr, &p->thing, &p->verdict, p->first_state, last_state, false);
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

void verify_thing_key(const struct thing *t, struct key *key)
{
    if (t->level)
        key_row(key, t->at.branch, t->level, t->no, t->at.epoch);
    else
        key_block(key, t->at.branch, t->at.epoch, t->no);
}

/* ---- reading blocks ---- */

void verify_suspect_add(struct verify_run *vr, const struct suspect *s)
{
    mem_grow(&vr->suspects, &vr->cap_suspects, vr->n_suspects + 1, sizeof *vr->suspects);
    vr->suspects[vr->n_suspects++] = *s;
}

/* On a worker thread. */
static void batch_digest(struct store_read *read)
{
    struct batch *b = container_of(read, struct batch, read);
    for (uint32_t i = 0; i < b->n; i++)
        b->verdicts[i] = judge_block(&b->blocks[i].thing, &b->gets[i], b->vr->v->header.block_size);
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
            verify_suspect_add(vr, &b->blocks[i]);
    vr->v->n_blocks += b->n;
    vr->v->n_bytes += (uint64_t)b->n * vr->v->header.block_size;
    b->n = 0;
    b->busy = false;
}

static void batch_start(struct verify_run *vr, struct batch *b)
{
    uint32_t block_size = vr->v->header.block_size;
    for (uint32_t i = 0; i < b->n; i++) {
        verify_thing_key(&b->blocks[i].thing, &b->keys[i]);
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

enum status verify_read_wait(struct verify_run *vr, struct walk_read *r)
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

bool verify_owner_stands(const struct verify_run *vr, const struct store_get *get)
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
        if (!verify_owner_stands(vr, get) && vr->st == ST_OK)
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
        verify_thing_key(&s[i].thing, &b->keys[i]);
        gets[i] = (struct store_get){.key = key_slice(&b->keys[i])};
        if (s[i].thing.level == 0) {
            gets[i].body = b->data + i * block_size;
            gets[i].body_cap = block_size;
        }
    }
    stands_key(vr, s[0].state, &stands_at);
    gets[n] = (struct store_get){.key = key_slice(&stands_at)};
    struct walk_read r = {.read = {.gets = gets, .n_gets = (uint32_t)n + 1}};
    enum status st = verify_read_wait(vr, &r);
    if (st != ST_OK) {
        if (vr->st == ST_OK)
            vr->st = fail(vr->e, st, "cannot read blocks: %s", status_text(st));
    } else if (stands(vr, s[0].state, &gets[n])) {
        for (size_t i = 0; i < n; i++) {
            struct verdict verdict = s[i].thing.level
                                         ? judge_row(&s[i].thing, &gets[i])
                                         : judge_block(&s[i].thing, &gets[i], block_size);
            if (!verdict.good)
                problem_add(vr, &s[i], &verdict);
        }
    }
    store_read_release(&r.read);
}

/* ---- the walk ---- */

static bool walk_go_on(struct walk *w)
{
    struct verify_run *vr = verify_run_of(w);
    return vr->st == ST_OK && vr->v->go_on(vr->v);
}

static void walk_row2(struct walk *w, size_t state, uint64_t no, struct row_source at,
                      enum row_found found)
{
    struct verify_run *vr = verify_run_of(w);
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
        verify_suspect_add(vr, &s);
    else
        problem_add(vr, &s, &unreadable);
}

/* Own things of epochs that no older state can have: counted, to be compared with what is stored.
 */
static bool only_of(const struct verify_run *vr, size_t state, struct row_source at)
{
    uint64_t before = state ? vr->v->states[state - 1].epoch : 0;
    return at.branch == vr->v->branch && at.epoch > before;
}

void verify_sum_add(struct sum *sum, uint64_t epoch, uint64_t no)
{
    sum->n++;
    sum->hashes += hash_mix(hash_mix(0x76657266u, epoch), no);
}

static void walk_row1(struct walk *w, size_t state, uint64_t no, const struct walk_row *before,
                      const struct walk_row *now)
{
    struct verify_run *vr = verify_run_of(w);
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
        verify_sum_add(&vr->rows_named[state], now->at.epoch, no);
    if (now->found != ROW_THERE) {
        verify_suspect_add(vr, &(struct suspect){{1, no, now->at}, state});
        return;
    }
    for (unsigned i = 0; i < INDEX_FANOUT; i++) {
        const struct row_source *src = row1_data(now->row, i), *was = row1_data(before->row, i);
        if (!src || (was && was->branch == src->branch && was->epoch == src->epoch))
            continue;
        struct thing block = {0, (no << INDEX_SHIFT) + i, *src};
        if (only_of(vr, state, *src))
            verify_sum_add(&vr->blocks_named[state], src->epoch, block.no);
        block_add(vr, state, &block);
    }
}

static void walk_state_over(struct walk *w, size_t state, uint64_t no)
{
    struct verify_run *vr = verify_run_of(w);
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
    struct verify_run *vr = verify_run_of(w);
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

bool verify_repair(struct verify_run *vr, const struct store_check *check,
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
    return verify_repair(vr, &check, &set, 1);
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
    if (verify_read_wait(vr, &r) == ST_OK && get.st == ST_OK &&
        row2_decode(row, get.key, get.head)) {
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
    struct verify_run *vr = verify_run_of(w);
    struct thing row2 = {2, no >> INDEX_SHIFT, at}, row1 = {1, no, at};
    struct verify_finding f = {.what = VERIFY_ROW_COUNT,
                               .first_state = state,
                               .last_state = state,
                               .offset = offset_of(vr, &row1),
                               .length = (uint64_t)vr->v->header.block_size << INDEX_SHIFT,
                               .n_keys = 1,
                               .said = said,
                               .is = is};
    verify_key_text(&row2, f.key);
    /* Another volume's is for a verification of that one. */
    if (vr->v->repair && vr->st == ST_OK && at.branch == vr->v->branch)
        f.repaired = repair_row2(vr, no, at, is);
    verify_tell(vr, &f);
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
    enum status st = verify_read_wait(vr, &r);
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
        f.repaired = verify_repair(vr, NULL, &m, 1);
    }
    verify_tell(vr, &f);
}

/* What there is of the volume under a tag. */
struct records {
    struct key begin, end;
    struct store_range range;
    struct walk_read r;
};

/* Waits for it; store_read_release(&all->r.read) gives it back, in any case. */
static enum status read_records(struct verify_run *vr, char tag, struct records *all)
{
    key_prefix_branch(&all->begin, tag, vr->v->branch);
    all->end = all->begin;
    key_prefix_end(&all->end);
    all->range = (struct store_range){
        .begin = key_slice(&all->begin), .end = key_slice(&all->end), .limit = RECORDS_MAX};
    all->r = (struct walk_read){.read = {.ranges = &all->range, .n_ranges = 1}};
    return verify_read_wait(vr, &all->r);
}

static void trash_look(struct verify_run *vr)
{
    struct verify *v = vr->v;
    struct records all;
    enum status st = read_records(vr, 't', &all);
    if (st != ST_OK && vr->st == ST_OK)
        vr->st = fail(vr->e, st, "cannot read the trash records: %s", status_text(st));
    for (uint32_t i = 0; i < all.range.n_pairs && st == ST_OK; i++) {
        char text[VERIFY_KEY_BYTES];
        uint64_t branch, n = 0;
        bool whole = verify_reason_trash(&vr->reasons, &all.range.pairs[i]);
        key_parse_trash(all.range.pairs[i].key, &branch, &n);
        snprintf(text, sizeof text, "(\"t\", %" PRIu64 ", %" PRIu64 ")", v->branch, n);
        /* (An owner may have written newer ones than the state record that was read.) */
        bool ahead = !v->upto && n >= vr->state.trash_next;
        if (whole && !ahead)
            continue;
        if (whole)
            vr->reasons.n_trash--;
        tell_record(vr, all.range.pairs[i].key, text, true);
    }
    store_read_release(&all.r.read);
}

/* Records of clones that are not there would keep a snapshot for ever. */
static void children_look(struct verify_run *vr)
{
    struct records all;
    enum status st = read_records(vr, 'd', &all);
    for (uint32_t i = 0; i < all.range.n_pairs && st == ST_OK && vr->st == ST_OK; i++) {
        uint64_t branch, epoch, child;
        struct key header;
        if (!key_parse_child(all.range.pairs[i].key, &branch, &epoch, &child))
            continue;
        key_header(&header, child);
        struct store_get gets[2] = {{.key = key_slice(&header)}, {.key = all.range.pairs[i].key}};
        struct walk_read again = {.read = {.gets = gets, .n_gets = 2}};
        struct header_record rec;
        enum status st2 = verify_read_wait(vr, &again);
        bool is_clone = gets[0].st == ST_OK && header_decode(gets[0].key, gets[0].head, &rec) &&
                        rec.parent_branch == branch && rec.parent_epoch == epoch;
        bool gone = gets[0].st == ST_NOTFOUND;
        bool there = gets[1].st == ST_OK;
        store_read_release(&again.read);
        if (st2 == ST_OK && there && !is_clone) {
            char text[VERIFY_KEY_BYTES];
            snprintf(text, sizeof text, "(\"d\", %" PRIu64 ", %" PRIu64 ", %" PRIu64 ")", branch,
                     epoch, child);
            tell_record(vr, all.range.pairs[i].key, text, gone);
        }
    }
    store_read_release(&all.r.read);
}

/* ---- all of it ---- */

static void state_take(struct verify_run *vr, const struct store_pair *pair)
{
    struct verify *v = vr->v;
    struct verify_state s = {0};
    if (!verify_reason_snapshot(&vr->reasons, pair, &s.rec, &s.epoch)) {
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
    enum status st = verify_read_wait(vr, &r);
    if (st == ST_IO)
        fail(vr->e, st, "cannot read the records of its snapshots: %s", status_text(st));
    if (st == ST_OK && gets[0].st == ST_NOTFOUND)
        st = fail(vr->e, ST_NOTFOUND, "it was removed meanwhile");
    if (st == ST_OK &&
        (gets[0].st != ST_OK || !header_decode(gets[0].key, gets[0].head, &v->header)))
        st = fail(vr->e, ST_IO, "its header is damaged");
    if (st == ST_OK &&
        (gets[1].st != ST_OK || !state_decode(gets[1].key, gets[1].head, &vr->state)))
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
                             .unseen = verify_walk_unseen,
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
        verify_tell(vr, &f);
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
    vr->rows.ready = verify_rows_answered;
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
        verify_leaks_find(vr, 'i', vr->rows_named);
        verify_leaks_find(vr, 'b', vr->blocks_named);
        counts_tell(vr);
        st = vr->st;
    }
    finding_end(vr);
    for (size_t i = 0; i < BATCHES; i++)
        free(vr->batches[i].data);
    row_reader_free(&vr->rows);
    verify_reasons_free(&vr->reasons);
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
