/*
 * Changes of a volume's history, by its owner: making, removing and renaming snapshots, and the
 * freeze under which several volumes are snapshotted at one instant.
 *
 * Making one belongs to the order of writes, so it is part of a generation: the open one is sealed
 * with it, and its commit stores the snapshot's record and the next epoch together with the
 * last writes of the old one. Removing and renaming only change the record.
 */
#include <stdio.h>
#include <stdlib.h>

#include "volume/internal.h"

static struct vol_history_op *op_of(struct vol_io *io)
{
    return container_of(io, struct vol_history_op, io);
}

static void refuse(struct volume *vol, struct vol_history_op *op, enum status st)
{
    if (!op->err.text[0])
        fail(&op->err, st, "%s", status_text(st));
    io_finish_soon(vol, &op->io, st);
}

/* ST_OK: the name is one, and free. */
static enum status name_is_free(const struct volume *vol, const char *name, struct err *e)
{
    if (!name_valid(name))
        return fail(e, ST_INVAL,
                    "\"%.140s\" is not a snapshot name: 1 to 128 of A-Z a-z 0-9 . _ -, the first a "
                    "letter or digit",
                    name);
    if (history_find_name(&vol->history, name))
        return fail(e, ST_EXISTS, "volume %s has a snapshot \"%s\" already", vol->name, name);
    list_for_each(l, &vol->gens)
    {
        const struct gen *g = container_of(l, struct gen, link);
        if (g->snapshot && strcmp(g->snapshot->name, name) == 0)
            return fail(e, ST_EXISTS, "volume %s has a snapshot \"%s\" already", vol->name, name);
    }
    return ST_OK;
}

/* --- making -------------------------------------------------------------------------- */

static void create_begin(struct volume *vol, struct vol_history_op *op)
{
    struct gen *g = vol->open;
    const struct history_entry *same = history_find_name(&vol->history, op->name);
    if (same && same->epoch <= vol->committed_epoch &&
        memcmp(same->rec.id, op->id, sizeof op->id) == 0) {
        /* It was made when this was asked for the first time, and the answer got lost. */
        op->epoch = same->epoch;
        io_finish_soon(vol, &op->io, ST_OK);
        return;
    }
    enum status st = vol->read_only ? ST_PERM : name_is_free(vol, op->name, &op->err);
    if (st == ST_OK && volume_is_resizing(vol))
        st = fail(&op->err, ST_BUSY, "volume %s is being resized: try again", vol->name);
    if (st == ST_OK && vol->history.n + vol->snapshots_unbuilt >= SNAPSHOTS_MAX)
        st = fail(&op->err, ST_NOSPC, "volume %s has %u snapshots, and more there can't be: remove "
                                      "some", vol->name, SNAPSHOTS_MAX);
    if (st == ST_OK && op->token && (!vol->frozen || vol->freeze_token != op->token))
        st = fail(&op->err, ST_BUSY, "volume %s could not be held still for long enough", vol->name);
    if (st != ST_OK) {
        refuse(vol, op, st);
        return;
    }
    struct snapshot_record *rec = g->snapshot = mem_zalloc(sizeof *rec);
    memcpy(rec->name, op->name, sizeof rec->name);
    memcpy(rec->id, op->id, sizeof rec->id);
    rec->created_ns = op->created_ns ? op->created_ns : env_realtime_ns(vol->shard->env);
    g->force = true;
    vol->snapshots_unbuilt++;
    list_add_tail(&g->waiters, &op->io.link);
    gen_seal(vol, true);
}

void snapshot_built(struct gen *g)
{
    struct volume *vol = g->vol;
    CHECK(vol->snapshots_unbuilt > 0);
    vol->snapshots_unbuilt--;
    g->snapshot_epoch = vol->header.epoch;
    history_add(&vol->history, vol->header.epoch, g->snapshot);
    vol->history_changes++;
    vol->protected_epoch = vol->header.epoch;
    vol->header.epoch++;
    vol->header.features.incompat |= FEATURE_INCOMPAT_HISTORY;
}

void volume_snapshot_create(struct volume *vol, struct vol_history_op *op)
{
    op->io.kind = IO_SNAPSHOT;
    op->err.text[0] = '\0';
    volume_begin_io(vol, &op->io);
    if (owner_ready(vol, &op->io))
        create_begin(vol, op);
}

/* --- changing a record --------------------------------------------------------------- */

static void record_changed(struct store_commit *commit, enum status st);

static void record_commit(struct volume *vol, struct vol_history_op *op,
                          const struct history_entry *was, const struct snapshot_record *rec)
{
    struct shard *s = vol->shard;
    size_t n_checks = 2;
    op->epoch = was->epoch;
    key_snapshot(&op->key, vol->branch, was->epoch);
    size_t was_len = snapshot_encode(&was->rec, key_slice(&op->key), op->was);
    size_t len = snapshot_encode(rec, key_slice(&op->key), op->bytes);
    op->checks[0] = (struct store_check){.kind = STORE_CHECK_VALUE,
                                         .key = key_slice(&vol->owner_key),
                                         .value = {vol->owner_bytes, vol->owner_len}};
    op->checks[1] = (struct store_check){
        .kind = STORE_CHECK_VALUE, .key = key_slice(&op->key), .value = {op->was, was_len}};
    if (rec->removed) {
        key_prefix_children(&op->children, vol->branch, was->epoch);
        op->children_end = op->children;
        key_prefix_end(&op->children_end);
        op->checks[n_checks++] = (struct store_check){.kind = STORE_CHECK_EMPTY,
                                                      .key = key_slice(&op->children),
                                                      .value = key_slice(&op->children_end)};
    }
    op->mutation = (struct store_mutation){
        .kind = STORE_SET, .key = key_slice(&op->key), .head = {op->bytes, len}};
    op->commit = (struct store_commit){.checks = op->checks,
                                       .n_checks = n_checks,
                                       .mutations = &op->mutation,
                                       .n_mutations = 1,
                                       .wake_watchers = true,
                                       .reserved = true,
                                       .done = record_changed};
    store_commit(s->store, s->env, &op->commit);
}

static void end(struct volume *vol, struct vol_history_op *op, enum status st)
{
    if (st != ST_OK && !op->err.text[0])
        fail(&op->err, st, "%s", status_text(st));
    volume_end_io(vol, &op->io, st);
}

/* A check failed: the snapshot has clones, or the volume is not ours any more. */
static void conflict_looked(struct store_read *read, enum status st)
{
    struct vol_history_op *op = container_of(read, struct vol_history_op, read);
    struct volume *vol = op->io.vol;
    bool ours = op->get.st == ST_OK && op->get.head.len == vol->owner_len &&
                memcmp(op->get.head.data, vol->owner_bytes, vol->owner_len) == 0;
    bool clones = op->range.n_pairs > 0;
    store_read_release(read);
    if (st == ST_OK && ours && clones) {
        st = fail(&op->err, ST_BUSY, "snapshot \"%s\" of volume %s has clones", op->name, vol->name);
    } else if (st == ST_OK && ours) {
        st = fail(&op->err, ST_BUSY, "snapshot \"%s\" of volume %s was changed meanwhile: try again",
                  op->name, vol->name);
    } else if (st == ST_OK) {
        volume_lose(vol, "another server owns it now");
        st = ST_PERM;
    }
    end(vol, op, st);
}

static void look_into_conflict(struct volume *vol, struct vol_history_op *op)
{
    key_prefix_children(&op->children, vol->branch, op->epoch);
    op->children_end = op->children;
    key_prefix_end(&op->children_end);
    op->get = (struct store_get){.key = key_slice(&vol->owner_key)};
    op->range = (struct store_range){.begin = key_slice(&op->children),
                                     .end = key_slice(&op->children_end),
                                     .limit = 1};
    op->read = (struct store_read){.gets = &op->get,
                                   .n_gets = 1,
                                   .ranges = &op->range,
                                   .n_ranges = 1,
                                   .done = conflict_looked};
    store_read(vol->shard->store, vol->shard->env, &op->read);
}

static void record_changed(struct store_commit *commit, enum status st)
{
    struct vol_history_op *op = container_of(commit, struct vol_history_op, commit);
    struct volume *vol = op->io.vol;
    if (vol->lost) {
        end(vol, op, ST_PERM);
        return;
    }
    if (st == ST_CONFLICT) {
        look_into_conflict(vol, op);
        return;
    }
    if (st == ST_OK) {
        struct history_entry *entry = history_find(&vol->history, op->epoch);
        bool decoded = snapshot_decode(key_slice(&op->key), op->mutation.head, &entry->rec);
        CHECK(decoded);
        vol->protected_epoch = history_newest_live(&vol->history);
        if (entry->rec.removed)
            cleaner_kick(vol, false);
    }
    end(vol, op, st);
}

static void change_begin(struct volume *vol, struct vol_history_op *op)
{
    const struct history_entry *entry = history_find_name(&vol->history, op->name);
    bool removes = op->io.kind == IO_SNAPSHOT_REMOVE;
    enum status st = ST_OK;
    if (vol->read_only)
        st = ST_PERM;
    else if (!entry)
        st = fail(&op->err, ST_NOTFOUND, "volume %s has no snapshot \"%.140s\"", vol->name, op->name);
    else if (entry->epoch > vol->committed_epoch)
        st = fail(&op->err, ST_BUSY, "snapshot \"%s\" of volume %s is still being made", op->name,
                  vol->name);
    else if (!removes)
        st = name_is_free(vol, op->to, &op->err);
    if (st != ST_OK) {
        refuse(vol, op, st);
        return;
    }
    struct snapshot_record rec = entry->rec;
    if (removes)
        rec.removed = 1;
    else
        memcpy(rec.name, op->to, sizeof rec.name);
    record_commit(vol, op, entry, &rec);
}

static void change(struct volume *vol, struct vol_history_op *op, enum io_kind kind)
{
    op->io.kind = (uint8_t)kind;
    op->err.text[0] = '\0';
    volume_begin_io(vol, &op->io);
    if (owner_ready(vol, &op->io))
        change_begin(vol, op);
}

void volume_snapshot_remove(struct volume *vol, struct vol_history_op *op)
{
    change(vol, op, IO_SNAPSHOT_REMOVE);
}

void volume_snapshot_rename(struct volume *vol, struct vol_history_op *op)
{
    change(vol, op, IO_SNAPSHOT_RENAME);
}

void volume_history(struct volume *vol, struct vol_history_op *op, const struct mail_record *mail)
{
    *op = (struct vol_history_op){.io = {.done = op->io.done}, .token = mail->token};
    memcpy(op->name, mail->name, sizeof op->name);
    memcpy(op->to, mail->to, sizeof op->to);
    memcpy(op->id, mail->snapshot_id, sizeof op->id);
    switch (mail->kind) {
    case MAIL_SNAPSHOT_CREATE:
        volume_snapshot_create(vol, op);
        break;
    case MAIL_SNAPSHOT_REMOVE:
        volume_snapshot_remove(vol, op);
        break;
    case MAIL_SNAPSHOT_RENAME:
        volume_snapshot_rename(vol, op);
        break;
    default:
        CHECK(mail->kind == MAIL_FLATTEN);
        op->io.offset = mail->number;
        volume_flatten(vol, op);
    }
}

void snapshot_resume(struct volume *vol, struct vol_io *io)
{
    if (vol->lost)
        end(vol, op_of(io), ST_PERM);
    else if (io->kind == IO_SNAPSHOT)
        create_begin(vol, op_of(io));
    else
        change_begin(vol, op_of(io));
}

void snapshot_answer(struct vol_io *io, uint64_t epoch, enum status st)
{
    struct vol_history_op *op = op_of(io);
    op->epoch = epoch;
    end(io->vol, op, st);
}

/* --- the freeze ---------------------------------------------------------------------- */

void freeze_end(struct volume *vol)
{
    vol->frozen = false;
    env_timer_stop(vol->shard->env, &vol->freeze_timer);
}

static void thaw(struct volume *vol)
{
    freeze_end(vol);
    owner_resume(vol);
}

static void freeze_fire(struct env_timer *timer)
{
    struct volume *vol = container_of(timer, struct volume, freeze_timer);
    log_volume_warning(vol->name,
                       "volume %s: the freeze for a snapshot of several volumes has lasted too "
                       "long and is over", vol->name);
    thaw(vol);
}

bool volume_freeze(struct volume *vol, uint64_t token, uint32_t ms)
{
    struct shard *s = vol->shard;
    if (vol->frozen && vol->freeze_token != token)
        return false;
    freeze_end(vol);
    vol->frozen = true;
    vol->freeze_token = token;
    vol->freeze_timer.fire = freeze_fire;
    env_timer_start(s->env, &vol->freeze_timer, ms);
    return true;
}

void volume_thaw(struct volume *vol, uint64_t token)
{
    if (vol->frozen && vol->freeze_token == token)
        thaw(vol);
}
