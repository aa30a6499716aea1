/*
 * fdb-nbd import: a volume from a file.
 *
 * An image, and a stream that begins from nothing, make a new volume. It is filled under a name of
 * its own and gets the right one when it is complete; what an import that died left under such a
 * name is removed by the next one.
 *
 * A stream that goes on from a snapshot changes a volume that has that snapshot as its newest, and
 * nothing newer. For as long as that takes the volume is marked: nobody opens it, and if this
 * process dies, the next import into it first takes it back to that snapshot. The mark goes when
 * all is complete, which makes everything visible with one commit.
 */
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/mem.h"
#include "cli/audit.h"
#include "cli/progress.h"
#include "cli/source.h"
#include "cli/view.h"
#include "server/reactor.h"

/* A server whose last client has just left commits what it holds before it lets go. */
#define LEAVING_MS_MAX 5000u
#define LOOK_AGAIN_MS 100u
#define WRITINGS_MAX 512u /* under way */
/* The first size of a volume from a pipe, which does not say how much it will bring. */
#define GROWING_BYTES (64ull << 20)
#define SECTOR_BYTES 512u
#define HIDDEN_NAME "%.100s.importing-"
#define HIDDEN_DIGITS 8u

enum { STREAM = 1, FORCE, YES };

static const struct cli_option options[] = {
    {STREAM, "stream", NULL, "FILE must be a stream: anything else is refused, not an image"},
    {FORCE, "force", NULL, "replace a volume of that name, with its snapshots"},
    {YES, "yes", NULL, "do not ask (nobody is asked where there is no terminal)"},
    {0, NULL, NULL, NULL},
};

struct import_options {
    bool stream, force, yes;
};

struct import {
    struct run *run;
    const struct import_options *o;
    const char *name;
    char hidden[NAME_BYTES_MAX + 1]; /* the volume is called so until it is complete; or "" */
    struct source source;
    struct catalog_entry entry; /* of the volume that is written */
    struct catalog_snapshot base;
    struct run_owned owned;
    struct volume_watcher watcher;
    struct progress progress;
    unsigned n_writings; /* under way */
    enum status st;     /* of the first that failed */
    uint64_t data_bytes;
    unsigned n_states;
    struct stream_section section; /* of a stream: the state in progress */
};

static enum status take(void *arg, int code, const char *value, struct err *e)
{
    struct import_options *o = arg;
    (void)value;
    (void)e;
    *(code == STREAM ? &o->stream : code == FORCE ? &o->force : &o->yes) = true;
    return ST_OK;
}

/* --- writing ------------------------------------------------------------------------------- */

struct writing {
    struct import *m;
    struct vol_io io;
    bool granted;
};

static void writing_done(struct vol_io *io)
{
    struct writing *c = container_of(io, struct writing, io);
    c->m->n_writings--;
    if (io->st != ST_OK && c->m->st == ST_OK)
        c->m->st = io->st;
    free(c);
}

static void writing_granted(struct vol_io *io)
{
    container_of(io, struct writing, io)->granted = true;
}

/* Waits until at most `n` changes are under way. */
static void writings_wait(struct import *m, unsigned n)
{
    shard_submit(m->owned.shard);
    while (m->n_writings > n)
        reactor_run_once(m->run->env);
}

static struct writing *writing_new(struct import *m, const struct source_item *item)
{
    if (m->n_writings >= WRITINGS_MAX)
        writings_wait(m, WRITINGS_MAX / 2);
    struct writing *c = mem_alloc(sizeof *c);
    *c = (struct writing){.m = m,
                         .io = {.done = writing_done,
                                .granted = writing_granted,
                                .offset = item->offset,
                                .length = item->length}};
    m->n_writings++;
    return c;
}

static void write_data(struct import *m, const struct source_item *item)
{
    struct writing *c = writing_new(m, item);
    if (!volume_write_begin(m->owned.vol, &c->io)) {
        shard_submit(m->owned.shard);
        run_until(m->run, &c->granted);
    }
    m->data_bytes += item->length;
    if (c->io.st == ST_OK)
        volume_write_commit(m->owned.vol, &c->io, item->bytes);
    else
        writing_done(&c->io);
}

static void write_zeros(struct import *m, const struct source_item *item)
{
    struct writing *c = writing_new(m, item);
    if (item->hole) {
        volume_trim(m->owned.vol, &c->io);
    } else {
        c->io.flags = VOL_NO_HOLE;
        volume_zero(m->owned.vol, &c->io);
    }
}

/* Somebody took the volume away, and may have changed it: nothing more is written. */
static void volume_lost(struct volume_watcher *w, const char *why)
{
    struct import *m = container_of(w, struct import, watcher);
    (void)why;
    if (m->st == ST_OK)
        m->st = ST_PERM;
}

/* The sentence about what a change of the volume failed with. */
static enum status cannot_write(struct import *m, enum status st, struct err *e)
{
    return fail(e, st, "cannot write volume \"%s\" in %s: %s", m->name, m->run->cli->store_uri,
                st == ST_PERM ? "it was taken from this command" : status_text(st));
}

static enum status settle(struct import *m, struct err *e)
{
    writings_wait(m, 0);
    return m->st == ST_OK ? ST_OK : cannot_write(m, m->st, e);
}

struct waiting {
    struct vol_history_op op;
    bool done;
};

static void waited(struct vol_io *io)
{
    struct vol_history_op *op = container_of(io, struct vol_history_op, io);
    container_of(op, struct waiting, op)->done = true;
}

static enum status resize(struct import *m, uint64_t size, struct err *e)
{
    struct waiting w = {.op = {.io = {.done = waited}}};
    if (volume_size(m->owned.vol) == size)
        return ST_OK;
    enum status st = settle(m, e);
    if (st != ST_OK)
        return st;
    volume_resize(m->owned.vol, &w.op.io, size, true);
    shard_submit(m->owned.shard);
    run_until(m->run, &w.done);
    return w.op.io.st == ST_OK ? ST_OK : cannot_write(m, w.op.io.st, e);
}

static enum status make_snapshot(struct import *m, struct err *e)
{
    const struct stream_section *s = &m->section;
    struct waiting w = {.op = {.io = {.done = waited}, .created_ns = s->created_ns}};
    memcpy(w.op.name, s->name, sizeof w.op.name);
    memcpy(w.op.id, s->id, sizeof w.op.id);
    volume_snapshot_create(m->owned.vol, &w.op);
    shard_submit(m->owned.shard);
    run_until(m->run, &w.done);
    if (w.op.io.st == ST_OK)
        return ST_OK;
    *e = w.op.err;
    return w.op.io.st;
}

/* Has room for an image that turns out to be longer. */
static enum status grow(struct import *m, const struct source_batch *b, struct err *e)
{
    uint64_t size = volume_size(m->owned.vol);
    if (m->source.is_stream || b->n == 0)
        return ST_OK;
    const struct source_item *last = &b->items[b->n - 1];
    while (size < last->offset + last->length)
        size *= 2;
    return resize(m, size, e);
}

/* Writes all that the source gives. */
static enum status fill(struct import *m, struct err *e)
{
    const struct source_batch *b;
    enum status st;
    /* A source that is slow does not make it idle. */
    volume_keep(m->owned.vol, true);
    m->watcher.lost = volume_lost;
    volume_watch_loss(m->owned.vol, &m->watcher);
    do {
        st = source_next(&m->source, &b, e);
        if (st == ST_OK && interrupted())
            st = fail(e, ST_SHUTDOWN, "interrupted");
        if (st == ST_OK)
            st = grow(m, b, e);
        for (unsigned i = 0; st == ST_OK && i < b->n; i++)
            (b->items[i].bytes ? write_data : write_zeros)(m, &b->items[i]);
        /* What was given to the volume must be taken before the batch is filled again. */
        shard_submit(m->owned.shard);
        if (st == ST_OK && m->st != ST_OK)
            st = cannot_write(m, m->st, e);
        if (st != ST_OK)
            break;
        m->progress.done = b->position;
        if (b->event == SOURCE_SECTION) {
            m->section = b->section;
            st = resize(m, m->section.size, e);
        } else if (b->event == SOURCE_SECTION_END) {
            m->n_states++;
            st = settle(m, e);
            if (st == ST_OK && m->section.snapshot)
                st = make_snapshot(m, e);
        }
    } while (st == ST_OK && b->event != SOURCE_END);
    if (st == ST_OK)
        st = settle(m, e);
    if (st == ST_OK && !m->source.is_stream)
        st = resize(m, round_up_u64(max_u64(m->source.position, 1), SECTOR_BYTES), e);
    writings_wait(m, 0);
    volume_unwatch_loss(&m->watcher);
    volume_keep(m->owned.vol, false);
    return st;
}

/* --- volumes that are in use ----------------------------------------------------------------- */

/* Finds a volume that nobody has in use. Waits a while for one who is about to let go. */
static int find_free(struct run *run, const char *name, struct catalog_entry *entry)
{
    bool called = false;
    for (uint64_t waited_ms = 0;; waited_ms += LOOK_AGAIN_MS) {
        int status = run_find(run, name, entry);
        if (status != CLI_DONE)
            return status;
        enum run_owner state = run_owner_state(run, &entry->owner);
        if (state == OWNER_NONE || state == OWNER_DEAD)
            return CLI_DONE;
        if (state == OWNER_UNKNOWN && !called) {
            /* Whether it is there: one that is not is fenced on the way. */
            called = true;
            if (run_ask(run, entry, MAIL_SYNC) == ST_NOTFOUND)
                continue;
        }
        if (waited_ms >= LEAVING_MS_MAX) {
            cli_error("volume \"%s\" in %s is in use by %s (pid %u on %s): end that first", name,
                      run->cli->store_uri, entry->owner.address, entry->owner.pid,
                      entry->owner.host);
            return CLI_FAILED;
        }
        run_pause(run, LOOK_AGAIN_MS);
    }
}

static int remove_volume(struct run *run, const char *name)
{
    struct catalog_entry entry;
    int status = find_free(run, name, &entry);
    if (status != CLI_DONE)
        return status;
    catalog_remove(run_op(run), run->store, run->env, &entry, true);
    if (run_wait(run) != ST_OK)
        return cli_failed(&run->op.err);
    return run_clear_removed(run);
}

/* Removes what imports of this name left that died. */
static int remove_leftovers(struct run *run, const char *name)
{
    char prefix[NAME_BYTES_MAX + 1];
    size_t len = (size_t)snprintf(prefix, sizeof prefix, HIDDEN_NAME, name);
    catalog_list(run_op(run), run->store, run->env);
    if (run_wait(run) != ST_OK)
        return cli_failed(&run->op.err);
    size_t n = 0;
    char(*names)[NAME_BYTES_MAX + 1] = mem_alloc((run->op.n_entries + 1) * sizeof *names);
    for (size_t i = 0; i < run->op.n_entries; i++) {
        const char *found = run->op.entries[i].name;
        if (strncmp(found, prefix, len) == 0 && strlen(found) == len + HIDDEN_DIGITS &&
            strspn(found + len, "0123456789abcdef") == HIDDEN_DIGITS)
            strcpy(names[n++], found);
    }
    int status = CLI_DONE;
    for (size_t i = 0; status == CLI_DONE && i < n; i++) {
        struct catalog_entry entry;
        status = run_find(run, names[i], &entry);
        if (status != CLI_DONE)
            break;
        enum run_owner state = run_owner_state(run, &entry.owner);
        if (state == OWNER_UNKNOWN && run_ask(run, &entry, MAIL_SYNC) == ST_NOTFOUND)
            state = OWNER_DEAD;
        /* One that lives is another import, which will see for itself that the name is taken. */
        if (state == OWNER_NONE || state == OWNER_DEAD)
            status = remove_volume(run, names[i]);
    }
    free(names);
    return status;
}

/* --- a new volume ---------------------------------------------------------------------------- */

/* Whether the volume that stands under the name may go. It is looked at before anything is read, and
 * again when it is replaced. */
static int may_replace(struct import *m)
{
    struct run *run = m->run;
    struct catalog_entry old;
    char size[24], used[24], what[NAME_BYTES_MAX + 160];
    int status = find_free(run, m->name, &old);
    if (status != CLI_DONE)
        return status;
    catalog_clones(run_op(run), run->store, run->env, old.branch, 0);
    if (run_wait(run) != ST_OK)
        return cli_failed(&run->op.err);
    if (run->op.n_entries > 0) {
        cli_error("volume \"%s\" in %s has clones, \"%s\" for one: remove or flatten them first",
                  m->name, run->cli->store_uri, run->op.entries[0].name);
        return CLI_FAILED;
    }
    catalog_snapshots(run_op(run), run->store, run->env, old.branch);
    if (run_wait(run) != ST_OK)
        return cli_failed(&run->op.err);
    size_t n = run->op.n_snapshots;
    snprintf(what, sizeof what,
             "replaces volume \"%s\" (%s, %s of data, %zu snapshot%s): all of that is lost", m->name,
             cli_size(old.header.size, size),
             cli_size(old.state.data_blocks * old.header.block_size, used), n, n == 1 ? "" : "s");
    bool asks = !m->o->yes && isatty(STDIN_FILENO) && isatty(STDERR_FILENO);
    return cli_confirm(!asks, what) ? CLI_DONE : CLI_FAILED;
}

static int name_is_free(struct import *m, bool *replaces)
{
    struct run *run = m->run;
    *replaces = false;
    catalog_find(run_op(run), run->store, run->env, m->name);
    enum status st = run_wait(run);
    if (st == ST_NOTFOUND)
        return CLI_DONE;
    if (st != ST_OK)
        return cli_failed(&run->op.err);
    if (!m->o->force) {
        cli_error("there is a volume \"%s\" in %s already: --force replaces it, with its snapshots",
                  m->name, run->cli->store_uri);
        return CLI_FAILED;
    }
    *replaces = true;
    return may_replace(m);
}

static enum status create_hidden(struct import *m, struct err *e)
{
    struct run *run = m->run;
    const struct source *s = &m->source;
    struct volume_spec spec = {.codec = -1, .size = GROWING_BYTES};
    uint32_t number;
    if (s->is_stream) {
        spec.size = m->section.size;
        spec.block_size = s->volume.block_size;
        spec.codec = s->volume.codec;
        spec.codec_level = s->volume.codec_level;
        memcpy(spec.description, s->volume.description, sizeof spec.description);
    } else if (s->image_bytes != UINT64_MAX) {
        spec.size = round_up_u64(s->image_bytes, SECTOR_BYTES);
    }
    env_random(run->env, &number, sizeof number);
    snprintf(spec.name, sizeof spec.name, HIDDEN_NAME "%08" PRIx32, m->name, number);
    catalog_create(run_op(run), run->store, run->env, &spec);
    enum status st = run_wait(run);
    if (st == ST_OK) {
        strcpy(m->hidden, spec.name);
        catalog_find(run_op(run), run->store, run->env, m->hidden);
        st = run_wait(run);
    }
    if (st == ST_OK) {
        m->entry = run->op.entries[0];
        st = run_own_marked(run, &m->entry, &m->owned);
    }
    if (st != ST_OK)
        *e = run->op.err;
    return st;
}

/* Gives the complete volume its name. */
static int show(struct import *m, bool replaces)
{
    struct run *run = m->run;
    struct catalog_entry old;
    if (replaces) {
        int status = find_free(run, m->name, &old);
        if (status != CLI_DONE)
            return status;
        catalog_replace(run_op(run), run->store, run->env, &old, m->hidden);
    } else {
        catalog_rename(run_op(run), run->store, run->env, m->hidden, m->name);
    }
    if (run_wait(run) != ST_OK)
        return cli_failed(&run->op.err);
    m->hidden[0] = '\0';
    return CLI_DONE;
}

static int import_new(struct import *m)
{
    struct run *run = m->run;
    struct err e = {0};
    bool replaces;
    int status = name_is_free(m, &replaces);
    if (status == CLI_DONE)
        status = remove_leftovers(run, m->name);
    if (status != CLI_DONE)
        return status;
    enum status st = create_hidden(m, &e);
    if (st == ST_OK) {
        progress_begin(&m->progress, run->env, m->source.file_bytes, "importing %s", m->name);
        st = fill(m, &e);
        progress_end(&m->progress);
    }
    if (st == ST_OK)
        /* Still its owner: nobody takes it for a leftover. */
        status = show(m, replaces);
    else
        status = interrupted() ? interrupt_status() : cli_failed(&e);
    if (m->owned.shard)
        run_disown(run, &m->owned);
    if (m->hidden[0])
        remove_volume(run, m->hidden);
    else if (replaces && status == CLI_DONE)
        status = run_clear_removed(run);
    return status;
}

/* --- a volume that is gone on with ------------------------------------------------------------ */

/* Takes the volume back to the snapshot from which an import began. */
static int take_back(struct import *m, struct catalog_entry *entry)
{
    struct run *run = m->run;
    catalog_snapshots(run_op(run), run->store, run->env, entry->branch);
    if (run_wait(run) != ST_OK)
        return cli_failed(&run->op.err);
    for (size_t i = 0; i < run->op.n_snapshots; i++)
        if (run->op.snapshots[i].epoch == entry->header.import_base)
            entry->snapshot = run->op.snapshots[i];
    catalog_rollback(run_op(run), run->store, run->env, entry, true);
    if (run_wait(run) != ST_OK)
        return cli_failed(&run->op.err);
    return CLI_DONE;
}

/* Finds the volume, as it was before an import that died, and whether the stream fits behind
 * its newest snapshot. */
static int find_base(struct import *m)
{
    const struct stream_section *first = &m->section;
    struct run *run = m->run;
    struct catalog_entry *entry = &m->entry;
    int status = find_free(run, m->name, entry);
    if (status == CLI_DONE && entry->header.import_base) {
        status = take_back(m, entry);
        if (status == CLI_DONE)
            status = run_find(run, m->name, entry);
    }
    if (status != CLI_DONE)
        return status;
    catalog_snapshots(run_op(run), run->store, run->env, entry->branch);
    if (run_wait(run) != ST_OK)
        return cli_failed(&run->op.err);
    const struct catalog_snapshot *all = run->op.snapshots;
    size_t n = run->op.n_snapshots;
    if (n > 0 && memcmp(all[n - 1].rec.id, first->base, SNAPSHOT_ID_BYTES) == 0) {
        m->base = all[n - 1];
        return CLI_DONE;
    }
    for (size_t i = 0; first->snapshot && i < n; i++)
        if (memcmp(all[i].rec.id, first->id, SNAPSHOT_ID_BYTES) == 0) {
            cli_error("volume \"%s\" in %s has what the stream brings already: it is snapshot \"%s\"",
                      m->name, run->cli->store_uri, all[i].rec.name);
            return CLI_FAILED;
        }
    for (size_t i = 0; i < n; i++)
        if (memcmp(all[i].rec.id, first->base, SNAPSHOT_ID_BYTES) == 0) {
            cli_error("the stream goes on from snapshot \"%s\" of volume \"%s\" in %s, which has "
                      "newer ones: roll it back to that first",
                      all[i].rec.name, m->name, run->cli->store_uri);
            return CLI_FAILED;
        }
    cli_error("the stream goes on from snapshot \"%s\" of volume \"%s\", which volume \"%s\" in %s "
              "has not got: import what comes before first",
              first->base_name, m->source.volume.name, m->name, run->cli->store_uri);
    return CLI_FAILED;
}

static int mark(struct import *m, uint64_t epoch)
{
    struct run *run = m->run;
    catalog_mark_import(run_op(run), run->store, run->env, &m->entry, epoch);
    if (run_wait(run) != ST_OK)
        return cli_failed(&run->op.err);
    return CLI_DONE;
}

/* Whether the volume, now ours, is what it was at its newest snapshot. */
static enum status check_unchanged(struct import *m, struct err *e)
{
    struct run *run = m->run;
    struct volume *view = NULL;
    struct extents *walk = mem_alloc(sizeof *walk);
    struct extent found = {0, 0, 0};
    enum status st = view_open(run, m->owned.shard, &m->entry, &m->base, &view);
    if (st == ST_OK) {
        extents_begin(walk, run, m->owned.vol, view, 0);
        st = extents_next(walk, &found);
        view_close(run, view);
    }
    free(walk);
    if (st != ST_OK) {
        *e = run->op.err;
        return st;
    }
    if (found.length == 0 && volume_size(m->owned.vol) == m->base.rec.size)
        return ST_OK;
    return fail(e, ST_CONFLICT,
                "volume \"%s\" in %s was changed since its snapshot \"%s\": roll it back to that "
                "first, or import into another",
                m->name, run->cli->store_uri, m->base.rec.name);
}

/* Ends it: the volume is as the stream says, or as it was. */
static int unmark(struct import *m, bool complete)
{
    struct catalog_entry entry;
    int status = find_free(m->run, m->name, &entry);
    if (status != CLI_DONE)
        return status;
    if (!entry.header.import_base && !complete)
        return CLI_FAILED; /* done already, by hand */
    if (!entry.header.import_base) {
        cli_error("volume \"%s\" in %s was taken back to a snapshot by somebody else", m->name,
                  m->run->cli->store_uri);
        return CLI_FAILED;
    }
    m->entry = entry;
    return complete ? mark(m, 0) : take_back(m, &entry);
}

static int import_into(struct import *m)
{
    struct run *run = m->run;
    struct err e = {0};
    int status = find_base(m);
    if (status == CLI_DONE)
        status = mark(m, m->base.epoch);
    if (status != CLI_DONE)
        return status;
    bool touched = false;
    enum status st = run_own_marked(run, &m->entry, &m->owned);
    if (st != ST_OK)
        e = run->op.err;
    if (st == ST_OK)
        st = check_unchanged(m, &e);
    if (st == ST_OK) {
        touched = true;
        progress_begin(&m->progress, run->env, m->source.file_bytes, "importing into %s", m->name);
        st = resize(m, m->section.size, &e);
        if (st == ST_OK)
            st = fill(m, &e);
        progress_end(&m->progress);
    }
    if (m->owned.shard)
        run_disown(run, &m->owned);
    status = st == ST_OK     ? CLI_DONE
             : interrupted() ? interrupt_status()
                             : cli_failed(&e);
    int ended = unmark(m, st == ST_OK || !touched);
    return status == CLI_DONE ? ended : status;
}

/* --- the command ------------------------------------------------------------------------------ */

static int import_stream(struct import *m)
{
    const struct source_batch *b;
    struct err e = {0};
    if (source_next(&m->source, &b, &e) != ST_OK)
        return interrupted() ? interrupt_status() : cli_failed(&e);
    /* The first thing behind the beginning of a stream is the beginning of a state. */
    m->section = b->section;
    if (stream_no_id(m->section.base))
        return import_new(m);
    if (m->o->force) {
        cli_error("--force replaces a volume, and this stream changes one");
        return CLI_USAGE;
    }
    return import_into(m);
}

static int import(struct import *m, const char *file)
{
    struct err e = {0};
    char data[24], states[48] = "";
    if (source_open(&m->source, m->run, file, &e) != ST_OK)
        return interrupted() ? interrupt_status() : cli_failed(&e);
    if (m->o->stream && !m->source.is_stream) {
        cli_error("%s does not begin as a stream of export", m->source.name);
        return CLI_FAILED;
    }
    int status = m->source.is_stream ? import_stream(m) : import_new(m);
    if (m->n_states > 0)
        snprintf(states, sizeof states, " in %u state%s", m->n_states,
                 m->n_states == 1 ? "" : "s");
    if (status == CLI_DONE)
        audit_changed(m->run->cli, "imported %s to volume \"%s\" in %s: %s of data%s",
                      m->source.is_stream ? "a stream" : "an image", m->name,
                      m->run->cli->store_uri, cli_size(m->data_bytes, data), states);
    return status;
}

static int run_import(struct cli *cli, int argc, char **argv)
{
    struct import_options o = {0};
    int first = cli_parse(cli, argc, argv, take, &o);
    if (first < 0)
        return cli->status;
    const char *name = argv[first + 1];
    if (!name_valid(name))
        return cli_usage_error(cli, "\"%.140s\" is not the name of a volume", name);
    struct run run;
    interrupt_catch();
    int status = run_begin(&run, cli, RUN_CREATE);
    if (status == CLI_DONE) {
        struct import *m = mem_zalloc(sizeof *m);
        m->run = &run;
        m->o = &o;
        m->name = name;
        status = import(m, argv[first]);
        source_close(&m->source);
        free(m);
    }
    run_end(&run);
    return status;
}

const struct cli_command import_command = {
    .name = "import",
    .args = "FILE|- NAME",
    .summary = "make a volume from an image, or from a stream of export",
    .details =
        "FILE is an image (anything), or what export wrote with --since, --all-snapshots or\n"
        "--stream, which it is known by; - is standard input. The volume is there when it is complete, not before. A\n"
        "stream of --since changes a volume that has that snapshot as its newest and was not\n"
        "changed since. An import that was interrupted has no effect: run it again.",
    .options = options,
    .args_min = 2,
    .args_max = 2,
    .run = run_import,
};
