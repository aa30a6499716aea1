/*
 * Flatten: a clone takes over all that it still has from its parent, and then has none.
 *
 * Piece by piece, what the index names of other branches is read into the cache and made dirty as it
 * is, so that its generation stores it as the volume's own. That is no write: no client's write can
 * be overtaken by it, because a block that changed meanwhile is dirty already and is left
 * alone; nothing of it is logged, and what dies with the process is done again. Index rows that
 * are the parent's and name no data are stored anew, too. Behind the last piece comes a
 * generation that forgets the parent.
 *
 * Nothing new is ever inherited, so one way through the volume is enough; how far it came is kept as
 * long as this process owns the volume.
 */
#include <stdlib.h>

#include "volume/internal.h"

#define PIECE_BYTES VOLUME_READ_BYTES_MAX /* read at once */
#define CALL_BYTES (8ull << 20)           /* copied by one call, or so ... */
#define CALL_ROWS 4096u                   /* ... or so many rows looked at */

struct flatten {
    struct volume *vol;
    struct vol_history_op *op;
    struct row_wait wait;
    struct vol_io room, read; /* what a piece may use up; its contents */
    struct vol_seg segs[VOL_SEGS(PIECE_BYTES, BLOCK_SIZE_MIN)];
    uint64_t at, end;         /* the piece: blocks */
    uint64_t bytes;           /* copied so far */
    unsigned rows;            /* looked at so far */
};

static void walk(struct flatten *f);

static uint64_t blocks_of(const struct volume *vol)
{
    return (vol->size + vol->block_size - 1) >> vol->block_shift;
}

/* Answers for what was done. */
static void finish(struct flatten *f, enum status st)
{
    struct volume *vol = f->vol;
    struct vol_history_op *op = f->op;
    if (st != ST_OK && !op->err.text[0])
        fail(&op->err, st, "%s", status_text(st));
    vol->flatten_upto = f->at;
    op->io.offset = min_u64(f->at << vol->block_shift, vol->size);
    free(f);
    io_finish_soon(vol, &op->io, st);
}

/* --- a piece ------------------------------------------------------------------------- */

/* Whether the block is another branch's and will stay that. Its rows are in memory. */
static bool is_inherited(struct volume *vol, uint64_t no)
{
    const struct blk *e = blocks_find(&vol->shard->blocks, vol->tag, no);
    struct row_source src;
    return index_lookup(vol, no, &src) == SOURCE_FIRST && src.branch != vol->branch &&
           !(e && e->gen) && overlay_lookup(vol, no) < 0;
}

/* The piece is in the cache. False: its rows have to be loaded again. */
static bool take_over(struct flatten *f)
{
    struct volume *vol = f->vol;
    struct blocks *t = &vol->shard->blocks;
    if (!index_have(vol, f->at, f->end, &f->wait))
        return false;
    gen_make_fit(vol, f->room.held_bytes, weight_of_write(vol, f->at, f->end));
    for (uint64_t no = f->at; no < f->end; no++) {
        if (!is_inherited(vol, no))
            continue;
        struct blk *e = blocks_find(t, vol->tag, no);
        CHECK(e && e->full && e->buf);
        gen_touch(vol, e, &f->room);
        f->bytes += vol->block_size;
    }
    f->at = f->end;
    return true;
}

/* What the read brought. True: on with the walk. */
static bool piece_read(struct flatten *f)
{
    struct volume *vol = f->vol;
    enum status st = f->read.st;
    bool taken = st == ST_OK && !vol->lost && take_over(f);
    bool waits = st == ST_OK && !vol->lost && !taken;
    if (st == ST_OK)
        volume_release_segs(&f->read);
    volume_write_abort(vol, &f->room); /* gives back what was not used */
    if (waits)
        return false;
    if (taken)
        return true;
    if (st == ST_IO)
        fail(&f->op->err, st,
             "the %llu bytes at %llu of volume %s can't all be read, so its parent is still needed; "
             "what is lost there has to be written anew or trimmed first",
             (unsigned long long)f->read.length, (unsigned long long)f->read.offset, vol->name);
    finish(f, st == ST_OK ? ST_PERM : st);
    return false;
}

static void piece_came(struct vol_io *io)
{
    struct flatten *f = container_of(io, struct flatten, read);
    if (piece_read(f))
        walk(f);
}

/* There is room for the piece, or none. True: on with the walk. */
static bool room_given(struct flatten *f)
{
    struct volume *vol = f->vol;
    if (f->room.st != ST_OK) {
        finish(f, f->room.st);
        return false;
    }
    f->read = (struct vol_io){.done = piece_came,
                              .offset = f->room.offset,
                              .length = f->room.length,
                              .segs = f->segs,
                              .segs_cap = sizeof f->segs / sizeof f->segs[0]};
    return volume_read(vol, &f->read) && piece_read(f);
}

static void room_came(struct vol_io *io)
{
    struct flatten *f = container_of(io, struct flatten, room);
    if (room_given(f))
        walk(f);
}

/* True: on with the walk. */
static bool copy(struct flatten *f)
{
    struct volume *vol = f->vol;
    uint64_t offset = f->at << vol->block_shift;
    f->room = (struct vol_io){
        .granted = room_came,
        .offset = offset,
        .length = min_u64(f->end << vol->block_shift, vol->size) - offset,
        .flags = IO_BY_COMMAND,
    };
    return volume_write_begin(vol, &f->room) && room_given(f);
}

/* --- the walk ------------------------------------------------------------------------ */

/* A snapshot would keep what is inherited. */
static enum status refuse_snapshots(const struct volume *vol, struct err *e)
{
    if (!vol->snapshots_unbuilt && !history_newest_live(&vol->history))
        return ST_OK;
    return fail(e, ST_BUSY,
                "volume %s has snapshots, and what they have from its parent stays: remove them first",
                vol->name);
}

/* The parent is not needed any more. */
static void detach(struct flatten *f)
{
    struct volume *vol = f->vol;
    struct vol_history_op *op = f->op;
    /* One may have been made on the way. And the header is written, which has the size. */
    enum status st = refuse_snapshots(vol, &op->err);
    if (st == ST_OK && volume_is_resizing(vol))
        st = fail(&op->err, ST_BUSY, "volume %s is being resized: try again", vol->name);
    if (st != ST_OK) {
        finish(f, st);
        return;
    }
    uint64_t weight = weight_of_record() + weight_of_clears(1);
    vol->flatten_upto = f->at;
    free(f);
    op->io.offset = vol->size;
    gen_make_fit(vol, 0, weight);
    vol->open->weight += weight;
    vol->open->detach = vol->open->force = true;
    list_add_tail(&vol->open->waiters, &op->io.link);
    gen_seal(vol, true);
}

/* Of one level-1 row: finds the next piece, from f->at on; false: there is none. Its rows are in
 * memory. */
static bool find_piece(struct flatten *f, uint64_t row_end)
{
    struct volume *vol = f->vol;
    uint64_t stop = min_u64(row_end, blocks_of(vol));
    while (f->at < stop && !is_inherited(vol, f->at))
        f->at++;
    if (f->at >= stop)
        return false;
    f->end = f->at + 1;
    stop = min_u64(stop, f->at + (PIECE_BYTES >> vol->block_shift));
    for (uint64_t no = f->end; no < stop; no++)
        if (is_inherited(vol, no))
            f->end = no + 1;
    return true;
}

/* (What lies behind the end counts no more.) */
static bool names_others(const struct volume *vol, const struct row1 *row, uint64_t row1)
{
    uint64_t first = row1 << INDEX_SHIFT;
    for (unsigned i = 0; i < INDEX_FANOUT && first + i < blocks_of(vol); i++)
        if (row1_data(row, i) && row1_data(row, i)->branch != vol->branch)
            return true;
    return false;
}

/* One level-1 row, or all of a level-2 row that has none; false where something has to come first. */
static bool walk_row(struct flatten *f)
{
    struct volume *vol = f->vol;
    uint64_t row2 = f->at >> (2 * INDEX_SHIFT), row1 = f->at >> INDEX_SHIFT;
    uint64_t end_row2 = ((blocks_of(vol) - 1) >> (2 * INDEX_SHIFT)) + 1;
    if (!index_have_row2(vol, row2, end_row2, &f->wait))
        return false;
    const struct row_slot *r2 = index_row2(vol, row2);
    const struct row2_entry *entry = &r2->row2.entry[row1 & (INDEX_FANOUT - 1)];
    bool begins = f->at == row2 << (2 * INDEX_SHIFT);
    if (begins && r2->branch && r2->branch != vol->branch)
        gen_adopt(vol, 2, row2);
    f->rows += begins;
    if (entry->kind != ROW2_ROW) {
        f->at = (row1 + 1) << INDEX_SHIFT;
        return true;
    }
    if (!index_have(vol, f->at, f->at + 1, &f->wait))
        return false;
    if (find_piece(f, (row1 + 1) << INDEX_SHIFT))
        return copy(f);
    /* A row without data, or whose data is about to be its own. */
    const struct row_slot *r1 = index_row1(vol, row1);
    if (row2_branch(vol, entry) != vol->branch && !names_others(vol, &r1->row1, row1))
        gen_adopt(vol, 1, row1);
    f->rows++;
    f->at = (row1 + 1) << INDEX_SHIFT;
    return true;
}

static void walk(struct flatten *f)
{
    struct volume *vol = f->vol;
    uint64_t unit = 1ull << (2 * INDEX_SHIFT);
    for (;;) {
        if (vol->lost) {
            finish(f, ST_PERM);
            return;
        }
        if (f->at >= (blocks_of(vol) + unit - 1) / unit * unit) {
            detach(f);
            return;
        }
        if (f->bytes >= CALL_BYTES || f->rows >= CALL_ROWS) {
            finish(f, ST_OK);
            return;
        }
        if (!walk_row(f))
            return;
    }
}

static void rows_came(struct row_wait *wait)
{
    walk(container_of(wait, struct flatten, wait));
}

/* --- begin and end ------------------------------------------------------------------- */

static void begin(struct volume *vol, struct vol_history_op *op)
{
    if (vol->read_only || vol->view_epoch) {
        fail(&op->err, ST_PERM, "%s can't be changed", vol->name);
        io_finish_soon(vol, &op->io, ST_PERM);
        return;
    }
    if (!vol->header.parent_branch) {
        op->io.offset = vol->size;
        io_finish_soon(vol, &op->io, ST_OK);
        return;
    }
    if (refuse_snapshots(vol, &op->err) != ST_OK) {
        io_finish_soon(vol, &op->io, ST_BUSY);
        return;
    }
    if (vol->flatten_taken != vol->times_taken) {
        vol->flatten_taken = vol->times_taken;
        vol->flatten_upto = 0;
    }
    struct flatten *f = mem_zalloc(sizeof *f);
    f->vol = vol;
    f->op = op;
    f->wait.ready = rows_came;
    f->at = min_u64(vol->flatten_upto, op->io.offset >> vol->block_shift);
    walk(f);
}

void volume_flatten(struct volume *vol, struct vol_history_op *op)
{
    op->io.kind = IO_FLATTEN;
    op->err.text[0] = '\0';
    volume_begin_io(vol, &op->io);
    if (owner_ready(vol, &op->io))
        begin(vol, op);
}

void flatten_resume(struct volume *vol, struct vol_io *io)
{
    begin(vol, container_of(io, struct vol_history_op, io));
}
