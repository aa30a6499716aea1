/*
 * fdb-nbd export: a volume as it was at one moment, into a file.
 *
 * What is read are snapshots, so it does not matter who has the volume in use. One that is exported
 * as it is now gets a snapshot for that time, which goes when the export is over.
 *
 * Up to PIECES reads are under way; what they bring is packed, or written into its place in a
 * file, on worker threads; what has an order (a pipe, the stream) is put in order again behind
 * them. The stream is stated in docs/stream.md.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

#include "base/mem.h"
#include "cli/outfile.h"
#include "cli/progress.h"
#include "cli/stream.h"
#include "cli/view.h"
#include "server/reactor.h"

#define PIECES 8u
#define PIECE_BYTES VOLUME_READ_BYTES_MAX
#define BLOCK_BYTES_MIN 4096u

_Static_assert(PIECE_BYTES <= STREAM_DATA_BYTES_MAX, "a piece is one frame");

enum { SINCE = 1, ALL_SNAPSHOTS, STREAM, FORCE };

static const struct cli_option options[] = {
    {SINCE, "since", "SNAP", "only what changed since that snapshot, as a stream for import"},
    {ALL_SNAPSHOTS, "all-snapshots", NULL, "with all its snapshots, as a stream for import"},
    {STREAM, "stream", NULL, "this state alone, but as a stream for import"},
    {FORCE, "force", NULL, "overwrite FILE"},
    {0, NULL, NULL, NULL},
};

struct export_options {
    const char *since; /* NULL: from nothing */
    bool all_snapshots, stream, force;
};

struct export;

/* A range on its way from the volume to the file. */
struct piece {
    struct export *x;
    struct extent extent; /* VOL_EXTENT_ZERO: nothing is read */
    struct vol_io io;
    struct vol_seg segs[VOL_SEGS(PIECE_BYTES, BLOCK_BYTES_MIN)];
    struct env_work work;
    uint8_t *bytes, *packed; /* of PIECE_BYTES, where they are needed */
    size_t packed_len;       /* 0: not packed */
    enum status st;          /* of the reading */
    int error;               /* of the writing: errno */
    bool ready;
};

struct export {
    struct run *run;
    const struct export_options *o;
    struct catalog_entry entry; /* with the last state as its snapshot */
    bool temporary;             /* that one was made for this, and stands for the volume itself */
    struct catalog_snapshot base, *states; /* base.epoch 0: from nothing; oldest first */
    size_t n_states;
    struct run_owned reader;
    struct outfile file;
    struct progress progress;
    bool streams;
    struct stream_writer writer;
    uint64_t data_bytes; /* of data that was written */
    struct volume *vol;  /* the state that is being read */
    struct piece pieces[PIECES];
    unsigned first, n_pieces; /* under way, in order */
};

static enum status take(void *arg, int code, const char *value, struct err *e)
{
    struct export_options *o = arg;
    switch (code) {
    case SINCE:
        if (strchr(value, '@'))
            return fail(e, ST_INVAL,
                        "export --since takes the name of a snapshot of the same volume, without @, "
                        "not \"%.300s\" (what a clone has changed since then lists diff)",
                        value);
        if (!name_valid(value))
            return fail(e, ST_INVAL, "\"%.140s\" is not the name of a snapshot", value);
        o->since = value;
        break;
    case ALL_SNAPSHOTS:
        o->all_snapshots = true;
        break;
    case STREAM:
        o->stream = true;
        break;
    default:
        o->force = true;
    }
    return ST_OK;
}

/* --- pieces -------------------------------------------------------------------------------- */

/* Puts what was read into one run of bytes. */
static void gather(struct piece *p)
{
    uint8_t *to = p->bytes;
    for (uint32_t i = 0; i < p->io.n_segs; i++) {
        const struct vol_seg *seg = &p->segs[i];
        if (seg->buf)
            memcpy(to, seg->buf->data + seg->offset, seg->len);
        else
            memset(to, 0, seg->len);
        to += seg->len;
    }
}

/* On a worker thread. */
static void piece_work(struct env_work *work)
{
    struct piece *p = container_of(work, struct piece, work);
    struct export *x = p->x;
    if (p->extent.flags & VOL_EXTENT_ZERO) {
        p->error = outfile_zero(&x->file, p->extent.offset, p->extent.length);
        return;
    }
    gather(p);
    if (x->streams) {
        p->packed_len = stream_pack(p->bytes, p->extent.length, p->packed);
    } else if (x->file.kind != OUTFILE_PIPE) {
        struct iovec part = {p->bytes, p->extent.length};
        p->error = outfile_write(&x->file, p->extent.offset, &part, 1);
    }
}

static void piece_worked(struct env_work *work)
{
    struct piece *p = container_of(work, struct piece, work);
    if (!(p->extent.flags & VOL_EXTENT_ZERO))
        volume_release_segs(&p->io);
    p->ready = true;
}

static void piece_start_work(struct piece *p)
{
    p->work = (struct env_work){.work = piece_work, .done = piece_worked};
    env_work(p->x->run->env, &p->work);
}

static void piece_read(struct vol_io *io)
{
    struct piece *p = container_of(io, struct piece, io);
    p->st = io->st;
    if (io->st == ST_OK)
        piece_start_work(p);
    else
        p->ready = true;
}

static void piece_start(struct export *x, const struct extent *extent)
{
    struct piece *p = &x->pieces[(x->first + x->n_pieces++) % PIECES];
    p->x = x;
    p->extent = *extent;
    p->st = ST_OK;
    p->error = 0;
    p->packed_len = 0;
    p->ready = false;
    if (extent->flags & VOL_EXTENT_ZERO) {
        /* (A file is empty already; of a pipe and a stream only the order matters.) */
        if (!x->streams && x->file.kind == OUTFILE_DEVICE)
            piece_start_work(p);
        else
            p->ready = true;
        return;
    }
    if (!p->bytes)
        p->bytes = mem_alloc(PIECE_BYTES);
    if (!p->packed && x->streams)
        p->packed = mem_alloc(PIECE_BYTES);
    p->io = (struct vol_io){.done = piece_read,
                            .offset = extent->offset,
                            .length = extent->length,
                            .segs = p->segs,
                            .segs_cap = sizeof p->segs / sizeof *p->segs};
    if (volume_read(x->vol, &p->io))
        piece_read(&p->io);
}

static enum status put_stream(struct export *x, struct piece *p, struct err *e)
{
    uint8_t head[STREAM_HEAD_BYTES];
    const struct extent *t = &p->extent;
    if (t->flags & VOL_EXTENT_ZERO) {
        stream_put_zero(&x->writer, t->offset, t->length, t->flags & VOL_EXTENT_HOLE, head);
        return outfile_put(&x->file, head, sizeof head, e);
    }
    const uint8_t *body = p->packed_len ? p->packed : p->bytes;
    size_t len = p->packed_len ? p->packed_len : t->length;
    stream_put_data(&x->writer, t->offset, (uint32_t)t->length, body, len, head);
    enum status st = outfile_put(&x->file, head, sizeof head, e);
    return st == ST_OK ? outfile_put(&x->file, body, len, e) : st;
}

/* Waits for the oldest piece, and puts it where it belongs. */
static enum status piece_end(struct export *x, struct err *e)
{
    struct piece *p = &x->pieces[x->first];
    const struct extent *t = &p->extent;
    bool zero = t->flags & VOL_EXTENT_ZERO;
    enum status st = ST_OK;
    run_until(x->run, &p->ready);
    if (p->st != ST_OK)
        st = fail(e, p->st, "cannot read %llu bytes of \"%s@%s\" from byte %llu on: %s",
                  (unsigned long long)t->length, x->entry.name, x->entry.snapshot.rec.name,
                  (unsigned long long)t->offset,
                  p->st == ST_PERM ? "the snapshot was removed, or the store is lost"
                                   : status_text(p->st));
    else if (p->error)
        st = outfile_failed(&x->file, p->error, e);
    else if (x->streams)
        st = put_stream(x, p, e);
    else if (x->file.kind == OUTFILE_PIPE)
        st = zero ? outfile_put_zeros(&x->file, t->length, e)
                  : outfile_put(&x->file, p->bytes, t->length, e);
    x->first = (x->first + 1) % PIECES;
    x->n_pieces--;
    if (!zero)
        x->data_bytes += t->length;
    if (!zero || (!x->streams && x->file.kind == OUTFILE_PIPE))
        x->progress.done += t->length;
    return st;
}

/* --- states -------------------------------------------------------------------------------- */

/* Reads one extent, in pieces. */
static enum status export_extent(struct export *x, struct extent t, struct err *e)
{
    enum status st = ST_OK;
    while (st == ST_OK && t.length > 0) {
        struct extent part = t;
        if (!(t.flags & VOL_EXTENT_ZERO))
            part.length = min_u64(t.length, PIECE_BYTES - t.offset % PIECE_BYTES);
        if (interrupted())
            return fail(e, ST_SHUTDOWN, "interrupted");
        if (x->n_pieces == PIECES)
            st = piece_end(x, e);
        if (st == ST_OK)
            piece_start(x, &part);
        t.offset += part.length;
        t.length -= part.length;
    }
    return st;
}

/* Walks along a state, or along what changed since the one before, and exports it, or counts. */
static enum status export_extents(struct export *x, struct volume *since, bool count, struct err *e)
{
    /* Behind nothing, a hole says nothing. */
    bool skips_holes = x->streams && !since;
    struct extents *walk = mem_alloc(sizeof *walk);
    struct extent t;
    enum status st;
    extents_begin(walk, x->run, x->vol, since,
                  x->streams ? VOL_EXTENT_ZERO | VOL_EXTENT_HOLE : VOL_EXTENT_ZERO);
    while ((st = extents_next(walk, &t)) == ST_OK && t.length > 0 && !interrupted()) {
        if (skips_holes && (t.flags & VOL_EXTENT_HOLE))
            continue;
        if (!count && (st = export_extent(x, t, e)) != ST_OK)
            break;
        if (count && !(t.flags & VOL_EXTENT_ZERO))
            x->progress.total += t.length;
    }
    if (st != ST_OK && e->st == ST_OK)
        *e = x->run->op.err;
    if (st == ST_OK && interrupted())
        st = fail(e, ST_SHUTDOWN, "interrupted");
    free(walk);
    return st;
}

static enum status put_section(struct export *x, const struct catalog_snapshot *state,
                               const struct catalog_snapshot *base, struct err *e)
{
    uint8_t out[STREAM_RECORD_BYTES_MAX];
    const struct snapshot_record *rec = &state->rec;
    struct stream_section section = {.size = rec->size};
    if (base->epoch) {
        memcpy(section.base, base->rec.id, sizeof section.base);
        memcpy(section.base_name, base->rec.name, sizeof section.base_name);
    }
    if (!x->temporary || state->epoch != x->entry.snapshot.epoch) {
        section.snapshot = true;
        section.created_ns = rec->created_ns;
        memcpy(section.id, rec->id, sizeof section.id);
        memcpy(section.name, rec->name, sizeof section.name);
    }
    return outfile_put(&x->file, out, stream_put_section(&x->writer, &section, out), e);
}

/* Exports the states one after the other, or counts their bytes. */
static enum status export_states(struct export *x, bool count, struct err *e)
{
    struct volume *since = NULL;
    const struct catalog_snapshot *base = &x->base;
    uint8_t out[STREAM_RECORD_BYTES_MAX];
    enum status st = ST_OK;
    if (base->epoch)
        st = view_open(x->run, x->reader.shard, &x->entry, base, &since);
    for (size_t i = 0; st == ST_OK && i < x->n_states; i++) {
        const struct catalog_snapshot *state = &x->states[i];
        st = view_open(x->run, x->reader.shard, &x->entry, state, &x->vol);
        if (st != ST_OK)
            break;
        if (x->streams && !count)
            st = put_section(x, state, base, e);
        if (st == ST_OK)
            st = export_extents(x, since, count, e);
        while (x->n_pieces > 0) {
            struct err later = {0};
            enum status piece = piece_end(x, st == ST_OK ? e : &later);
            st = st == ST_OK ? piece : st;
        }
        if (st == ST_OK && x->streams && !count)
            st = outfile_put(&x->file, out, stream_put_section_end(&x->writer, out), e);
        view_close(x->run, since);
        since = x->vol;
        base = state;
        x->vol = NULL;
    }
    view_close(x->run, x->vol);
    view_close(x->run, since);
    x->vol = NULL;
    if (st != ST_OK && e->st == ST_OK)
        *e = x->run->op.err;
    return st;
}

static enum status put_begin(struct export *x, struct err *e)
{
    uint8_t out[STREAM_RECORD_BYTES_MAX];
    const struct header_record *h = &x->entry.header;
    struct stream_volume volume = {.n_sections = x->n_states,
                                   .block_size = h->block_size,
                                   .codec = h->codec,
                                   .codec_level = h->codec_level,
                                   .created_ns = h->created_ns};
    memcpy(volume.name, x->entry.name, sizeof volume.name);
    memcpy(volume.description, h->description, sizeof volume.description);
    enum status st = outfile_put(&x->file, out, stream_put_begin(&x->writer, out), e);
    if (st == ST_OK)
        st = outfile_put(&x->file, out, stream_put_volume(&x->writer, &volume, out), e);
    return st;
}

static enum status export_all(struct export *x, struct err *e)
{
    uint8_t out[STREAM_RECORD_BYTES_MAX];
    uint64_t size = x->entry.snapshot.rec.size;
    enum status st = ST_OK;
    bool pipe = x->file.kind == OUTFILE_PIPE;
    if (x->file.kind == OUTFILE_DEVICE && !x->streams && x->file.device_bytes < size)
        return fail(e, ST_NOSPC, "%s has %llu bytes, and the volume %llu", x->file.name,
                    (unsigned long long)x->file.device_bytes, (unsigned long long)size);
    progress_begin(&x->progress, x->run->env, pipe && !x->streams ? size : 0, "exporting %s",
                   x->entry.name);
    if (x->progress.shown && x->progress.total == 0)
        st = export_states(x, true, e);
    if (st == ST_OK)
        st = x->streams                         ? put_begin(x, e)
             : x->file.kind == OUTFILE_FILE ? outfile_set_size(&x->file, size, e)
                                                : ST_OK;
    if (st == ST_OK)
        st = export_states(x, false, e);
    if (st == ST_OK && x->streams)
        st = outfile_put(&x->file, out, stream_put_end(&x->writer, out), e);
    if (st == ST_OK)
        st = outfile_finish(&x->file, e);
    progress_end(&x->progress);
    return st;
}

/* --- what is exported ---------------------------------------------------------------------- */

/* Chooses the states, of which x->entry.snapshot is the last. */
static int choose_states(struct export *x)
{
    const struct catalog_snapshot *last = &x->entry.snapshot;
    catalog_snapshots(run_op(x->run), x->run->store, x->run->env, x->entry.branch);
    if (run_wait(x->run) != ST_OK)
        return cli_failed(&x->run->op.err);
    const struct catalog_op *op = &x->run->op;
    x->states = mem_alloc((op->n_snapshots + 1) * sizeof *x->states);
    for (size_t i = 0; x->o->since && i < op->n_snapshots; i++)
        if (strcmp(op->snapshots[i].rec.name, x->o->since) == 0)
            x->base = op->snapshots[i];
    if (x->o->since && !x->base.epoch) {
        cli_error("volume \"%s\" in %s has no snapshot \"%s\"", x->entry.name,
                  x->run->cli->store_uri, x->o->since);
        return CLI_NOTFOUND;
    }
    if (x->base.epoch >= last->epoch) {
        cli_error("snapshot \"%s\" of volume \"%s\" is not older than \"%s\"", x->o->since,
                  x->entry.name, last->rec.name);
        return CLI_FAILED;
    }
    for (size_t i = 0; x->o->all_snapshots && i < op->n_snapshots; i++)
        if (op->snapshots[i].epoch > x->base.epoch && op->snapshots[i].epoch < last->epoch)
            x->states[x->n_states++] = op->snapshots[i];
    x->states[x->n_states++] = *last;
    return CLI_DONE;
}

static int export(struct export *x, const char *name, const char *file)
{
    struct run *run = x->run;
    struct err e = {0};
    char size[24], data[24];
    enum status st = outfile_open(&x->file, run, file, x->o->force, &e);
    if (st != ST_OK)
        /* (Somebody who is to read a named pipe may never come.) */
        return interrupted() ? interrupt_status() : cli_failed(&e);
    int status = run_find_either(run, name, &x->entry);
    if (status == CLI_DONE && !x->entry.snapshot.epoch) {
        status = view_snapshot(run, &x->entry);
        x->temporary = status == CLI_DONE;
    }
    if (status == CLI_DONE)
        status = choose_states(x);
    if (status != CLI_DONE)
        return status;
    run->background = true;
    if (run_own(run, NULL, &x->reader) != ST_OK)
        return cli_failed(&run->op.err);
    st = export_all(x, &e);
    run_disown(run, &x->reader);
    run->background = false;
    if (st != ST_OK)
        return interrupted() ? interrupt_status() : cli_failed(&e);
    if (x->file.kind != OUTFILE_PIPE)
        printf("exported %s to %s: %zu state%s, the last of %s, %s of data\n", name, file,
               x->n_states, x->n_states == 1 ? "" : "s",
               cli_size(x->entry.snapshot.rec.size, size), cli_size(x->data_bytes, data));
    return CLI_DONE;
}

static int run_export(struct cli *cli, int argc, char **argv)
{
    struct export_options o = {0};
    int first = cli_parse(cli, argc, argv, take, &o);
    if (first < 0)
        return cli->status;
    struct run run;
    interrupt_catch();
    bool changes = !strchr(argv[first], '@');
    int status = run_begin(&run, cli, changes ? RUN_WRITE : RUN_READ);
    if (status == CLI_DONE) {
        struct export *x = mem_zalloc(sizeof *x);
        x->run = &run;
        x->o = &o;
        x->streams = o.since || o.all_snapshots || o.stream;
        status = export(x, argv[first], argv[first + 1]);
        if (x->temporary) {
            int dropped = view_drop_snapshot(&run, &x->entry);
            status = status == CLI_DONE ? dropped : status;
        }
        outfile_close(&x->file);
        for (unsigned i = 0; i < PIECES; i++) {
            free(x->pieces[i].bytes);
            free(x->pieces[i].packed);
        }
        free(x->states);
        free(x);
    }
    run_end(&run);
    return status;
}

const struct cli_command export_command = {
    .name = "export",
    .args = "VOLUME[@SNAP] FILE|-",
    .summary = "write a volume, or a snapshot of it, into a file",
    .details =
        "FILE becomes an image of the volume, holes and all; - is standard output. It is there\n"
        "under its name when it is complete, not before; a block device is overwritten in place.\n"
        "With --since, --all-snapshots or --stream it is a stream that import understands. A volume\n"
        "that is in use is exported as it was when the command was started.",
    .options = options,
    .args_min = 2,
    .args_max = 2,
    .run = run_export,
};
