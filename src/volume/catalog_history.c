/*
 * The catalog: snapshots and clones as they stand in the store, and the two changes of history
 * that need no owner: a clone, which changes nothing of the volume it is made from, and a
 * rollback, which leaves the volume without an owner.
 *
 * What keeps them apart from others at the same moment: a clone's commit checks the record of its
 * snapshot, whose removal checks that there are no children; a rollback checks the header, which
 * every new snapshot changes, and that there are no children of what it takes away.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/log.h"
#include "volume/ancestry.h"
#include "volume/catalog_internal.h"

const char *catalog_names(char out[CATALOG_NAMES_BYTES], const char *first, size_t stride, size_t n)
{
    enum { QUOTES = 8, REST = 32 };
    size_t len = 0;
    out[0] = '\0';
    for (size_t i = 0; i < n; i++) {
        const char *name = first + i * stride;
        size_t room = CATALOG_NAMES_BYTES - len;
        if (i > 0 && strlen(name) + QUOTES + REST > room) {
            snprintf(out + len, room, " and %zu more", n - i);
            break;
        }
        len += (size_t)snprintf(out + len, room, "%s\"%s\"",
                                i == 0      ? ""
                                : i + 1 < n ? ", "
                                            : " and ",
                                name);
    }
    return out;
}

/* --- snapshots ----------------------------------------------------------------------- */

void catalog_take_snapshots(struct job *job, const struct store_range *page)
{
    struct catalog_op *op = job->op;
    for (uint32_t i = 0; i < page->n_pairs; i++) {
        const struct store_pair *pair = &page->pairs[i];
        struct catalog_snapshot s;
        if (!key_parse_snapshot(pair->key, &s.branch, &s.epoch) ||
            !snapshot_decode(pair->key, pair->head, &s.rec)) {
            log_error("a record of a snapshot is damaged; it is left out");
            job->left_out = true;
        } else if (!s.rec.removed) {
            mem_grow(&op->snapshots, &job->cap_snapshots, op->n_snapshots + 1,
                     sizeof *op->snapshots);
            op->snapshots[op->n_snapshots++] = s;
        }
    }
}

void catalog_drop_snapshots(struct job *job)
{
    free(job->op->snapshots);
    job->op->snapshots = NULL;
    job->op->n_snapshots = job->cap_snapshots = 0;
    job->left_out = false;
}

static void done(struct job *job)
{
    job_finish(job, ST_OK);
}

void catalog_snapshots(struct catalog_op *op, struct store *store, struct env *env, uint64_t branch)
{
    struct job *job = job_new(op, store, env);
    struct key key;
    if (branch)
        key_prefix_branch(&key, 'v', branch);
    else
        key_prefix(&key, 'v');
    job_scan(job, &key, "list the snapshots", catalog_take_snapshots, done);
}

/* --- clones -------------------------------------------------------------------------- */

static int compare_branches(const void *a, const void *b)
{
    const struct catalog_child *x = a, *y = b;
    return x->branch < y->branch ? -1 : x->branch > y->branch;
}

static void want(struct job *job, uint64_t branch, uint64_t of_epoch)
{
    mem_grow(&job->wanted, &job->cap_wanted, job->n_wanted + 1, sizeof *job->wanted);
    job->wanted[job->n_wanted++] = (struct catalog_child){branch, of_epoch};
}

static void names_page(struct job *job, const struct store_range *page)
{
    for (uint32_t i = 0; i < page->n_pairs; i++) {
        const struct store_pair *pair = &page->pairs[i];
        char name[NAME_BYTES_MAX + 1];
        struct name_record rec;
        if (!key_parse_name(pair->key, name) || !name_decode(pair->key, pair->head, &rec))
            continue;
        const struct catalog_child key = {.branch = rec.branch},
                                   *wanted = bsearch(&key, job->wanted, job->n_wanted, sizeof key,
                                                     compare_branches);
        if (wanted)
            job_add_entry(job, name, rec.branch)->snapshot.epoch = wanted->of_epoch;
    }
}

/* Names the wanted branches: the names alone say which branch is whose. */
static void find_names(struct job *job, void (*over)(struct job *job))
{
    struct key key;
    qsort(job->wanted, job->n_wanted, sizeof *job->wanted, compare_branches);
    key_prefix(&key, 'n');
    job_scan(job, &key, "look up the names of volumes", names_page, over);
}

static void children_page(struct job *job, const struct store_range *page)
{
    for (uint32_t i = 0; i < page->n_pairs; i++) {
        uint64_t branch, epoch, child;
        if (key_parse_child(page->pairs[i].key, &branch, &epoch, &child))
            want(job, child, epoch);
    }
}

static void children_known(struct job *job)
{
    if (job->n_wanted == 0)
        job->clones_found(job);
    else
        find_names(job, job->clones_found);
}

void catalog_find_clones(struct job *job, uint64_t branch, uint64_t epoch,
                         void (*found)(struct job *job))
{
    struct key key;
    free(job->op->entries);
    job->op->entries = NULL;
    job->op->n_entries = job->cap_entries = 0;
    job->n_wanted = 0;
    job->clones_found = found;
    if (epoch)
        key_prefix_children(&key, branch, epoch);
    else
        key_prefix_branch(&key, 'd', branch);
    job_scan(job, &key, "look for clones", children_page, children_known);
}

void catalog_clones(struct catalog_op *op, struct store *store, struct env *env, uint64_t branch,
                    uint64_t epoch)
{
    struct job *job = job_new(op, store, env);
    catalog_find_clones(job, branch, epoch, done);
}

static void no_parent(struct job *job)
{
    fail(&job->op->err, ST_NOTFOUND, "volume \"%s\" is not a clone any more", job->entry.name);
    job_finish(job, ST_NOTFOUND);
}

static void parent_named(struct job *job)
{
    if (job->op->n_entries == 0) {
        no_parent(job);
        return;
    }
    job->op->entries[0].snapshot = job->entry.snapshot;
    job_finish(job, ST_OK);
}

static void parent_seen(struct job *job, enum status st)
{
    const struct store_get *get = &job->gets[0];
    struct catalog_snapshot *snapshot = &job->entry.snapshot;
    if (st != ST_OK) {
        job_store_failed(job, st, "look up the snapshot behind a clone");
    } else if (get->st == ST_NOTFOUND) {
        no_parent(job);
    } else if (!snapshot_decode(get->key, get->head, &snapshot->rec)) {
        job_damaged(job, "the record of the snapshot behind a clone");
    } else {
        snapshot->branch = job->entry.header.parent_branch;
        snapshot->epoch = job->entry.header.parent_epoch;
        want(job, snapshot->branch, snapshot->epoch);
        find_names(job, parent_named);
    }
}

void catalog_parent(struct catalog_op *op, struct store *store, struct env *env,
                    const struct catalog_entry *clone)
{
    struct job *job = job_new(op, store, env);
    struct key key;
    job->entry = *clone;
    if (!clone->header.parent_branch) {
        fail(&op->err, ST_NOTFOUND, "volume \"%s\" is not a clone", clone->name);
        job_refuse(job);
        return;
    }
    key_snapshot(&key, clone->header.parent_branch, clone->header.parent_epoch);
    job_get(job, &key);
    job_read(job, parent_seen);
}

/* --- what cloning and rolling back have in common -------------------------------------- */

/* Where rows of the volume are now, as read. False: the job has ended. */
static bool take_ancestry(struct job *job, const struct store_get *get,
                          struct ancestry_record *ancestry)
{
    *ancestry = (struct ancestry_record){0};
    if (get->st != ST_OK || ancestry_decode(get->key, get->head, ancestry))
        return true;
    job_damaged(job, "the record of where volume \"%s\" has its rows", job->entry.name);
    return false;
}

/* The header and the snapshot that `job->entry` names, as read. False: the job has ended. */
static bool take_snapshot(struct job *job, const struct store_get *header_get,
                          const struct store_get *snapshot_get, struct header_record *header,
                          struct snapshot_record *snapshot)
{
    const struct catalog_entry *entry = &job->entry;
    const char *name = entry->snapshot.rec.name;
    if (header_get->st == ST_NOTFOUND || snapshot_get->st == ST_NOTFOUND) {
        fail(&job->op->err, ST_NOTFOUND, "snapshot \"%s@%s\" was removed by somebody else just now",
             entry->name, name);
        job_finish(job, ST_NOTFOUND);
        return false;
    }
    if (!catalog_take_header(job, header_get, header))
        return false;
    if (!snapshot_decode(snapshot_get->key, snapshot_get->head, snapshot)) {
        job_damaged(job, "the record of snapshot \"%s@%s\"", entry->name, name);
        return false;
    }
    if (snapshot->removed) {
        fail(&job->op->err, ST_NOTFOUND, "snapshot \"%s@%s\" was removed by somebody else just now",
             entry->name, name);
        job_finish(job, ST_NOTFOUND);
        return false;
    }
    if ((header->features.incompat & ~FEATURES_INCOMPAT_KNOWN) ||
        (header->features.ro_compat & ~FEATURES_RO_COMPAT_KNOWN)) {
        fail(&job->op->err, ST_FORMAT,
             "volume \"%s\" has features that this version does not know: use a newer fdb-nbd",
             entry->name);
        job_finish(job, ST_FORMAT);
        return false;
    }
    return true;
}

/* --- clone --------------------------------------------------------------------------- */

static void clone_look(struct job *job);

static void clone_written(struct job *job, enum status st)
{
    job_end_change(job, st, clone_look, "clone \"%s@%s\" to \"%s\"", job->entry.name,
                   job->entry.snapshot.rec.name, job->spec.name);
}

static void clone_seen(struct job *job, enum status st)
{
    const struct store_get *name = &job->gets[0], *counter = &job->gets[1],
                           *header_get = &job->gets[2], *snapshot_get = &job->gets[3],
                           *ancestry_get = &job->gets[4];
    const struct catalog_entry *from = &job->entry;
    struct header_record parent;
    struct snapshot_record snapshot;
    struct ancestry_record now, ancestry;
    if (st != ST_OK) {
        job_store_failed(job, st, "look up what is to be cloned");
        return;
    }
    if (name->st == ST_OK) {
        catalog_name_taken(job, job->spec.name);
        return;
    }
    if (!take_snapshot(job, header_get, snapshot_get, &parent, &snapshot) ||
        !take_ancestry(job, ancestry_get, &now))
        return;
    if (parent.import_base && from->snapshot.epoch > parent.import_base) {
        fail(&job->op->err, ST_BUSY,
             "\"%s@%s\" is part of an import that is not complete: run it again first, or roll the "
             "volume back to its snapshot before it",
             from->name, snapshot.name);
        job_finish(job, ST_BUSY);
        return;
    }
    if (!ancestry_of_clone(&now, from->branch, from->snapshot.epoch, &ancestry)) {
        fail(&job->op->err, ST_NOSPC,
             "\"%s@%s\" has %u volumes behind it, and more there can't be: flatten volume \"%s\", "
             "or clone an older one",
             from->name, snapshot.name, ANCESTRY_STORED_MAX, from->name);
        job_finish(job, ST_NOSPC);
        return;
    }
    struct header_record header = {.features = {.incompat = FEATURE_INCOMPAT_HISTORY},
                                   .size = snapshot.size,
                                   .block_size = parent.block_size,
                                   .codec = parent.codec,
                                   .codec_level = parent.codec_level,
                                   .parent_branch = from->branch,
                                   .parent_epoch = from->snapshot.epoch};
    struct state_record state = {.data_blocks = snapshot.data_blocks};
    struct child_record child = {.created_ns = env_realtime_ns(job->op->env)};
    struct key key;
    uint8_t bytes[RECORD_BYTES_MAX];
    uint64_t branch;
    if (!catalog_add_volume(job, counter, &header, &state, &branch))
        return;
    job_check(job, name);
    job_check(job, header_get);
    job_check(job, snapshot_get);
    job_check(job, ancestry_get);
    key_ancestry(&key, branch);
    job_set(job, &key, bytes, ancestry_encode(&ancestry, key_slice(&key), bytes));
    key_child(&key, from->branch, from->snapshot.epoch, branch);
    job_set(job, &key, bytes, child_encode(&child, key_slice(&key), bytes));
    job_commit(job, false, clone_written);
}

static void clone_look(struct job *job)
{
    const struct catalog_entry *from = &job->entry;
    struct key key;
    job_reset(job);
    key_name(&key, job->spec.name);
    job_get(job, &key);
    key_branch_counter(&key);
    job_get(job, &key);
    key_header(&key, from->branch);
    job_get(job, &key);
    key_snapshot(&key, from->branch, from->snapshot.epoch);
    job_get(job, &key);
    key_ancestry(&key, from->branch);
    job_get(job, &key);
    job_read(job, clone_seen);
}

void catalog_clone(struct catalog_op *op, struct store *store, struct env *env,
                   const struct catalog_entry *from, const struct volume_spec *spec)
{
    struct job *job = job_new(op, store, env);
    job->entry = *from;
    job->spec = *spec;
    job->spec.size = from->snapshot.rec.size;
    job->spec.block_size = from->header.block_size;
    job->spec.codec = from->header.codec;
    job->spec.codec_level = from->header.codec_level;
    if (volume_spec_check(&job->spec, &op->err) != ST_OK)
        job_refuse(job);
    else
        clone_look(job);
}

/* --- rollback ------------------------------------------------------------------------ */

static void rollback_look(struct job *job);

static void rollback_written(struct job *job, enum status st)
{
    catalog_drop_snapshots(job); /* only looked at */
    job_end_change(job, st, rollback_look, "roll back to \"%s@%s\"", job->entry.name,
                   job->entry.snapshot.rec.name);
}

static void rollback_refused(struct job *job)
{
    catalog_refuse_for_clones(job, "remove or flatten them first", rollback_look);
}

/* Where the records of the snapshots newer than `to` are, and those of their children. */
static void newer_snapshots(const struct catalog_entry *to, struct key *begin, struct key *end)
{
    key_snapshot(begin, to->branch, to->snapshot.epoch + 1);
    key_prefix_branch(end, 'v', to->branch);
    key_prefix_end(end);
}

static void children_of_newer(const struct catalog_entry *to, struct key *begin, struct key *end)
{
    key_prefix_children(begin, to->branch, to->snapshot.epoch + 1);
    key_prefix_branch(end, 'd', to->branch);
    key_prefix_end(end);
}

/* Range 0: newer snapshots; range 1: their clones. True: the job goes on elsewhere. */
static bool newer_forbid(struct job *job)
{
    const struct catalog_entry *to = &job->entry;
    struct catalog_op *op = job->op;
    char names[CATALOG_NAMES_BYTES];
    uint64_t branch, child;
    catalog_drop_snapshots(job);
    catalog_take_snapshots(job, &job->ranges[0]);
    if (job->ranges[1].n_pairs > 0 &&
        key_parse_child(job->ranges[1].pairs[0].key, &branch, &job->epoch, &child)) {
        catalog_find_clones(job, to->branch, job->epoch, rollback_refused);
        return true;
    }
    if (op->n_snapshots == 0 || job->with_snapshots)
        return false;
    fail(&op->err, ST_EXISTS,
         "volume \"%s\" has %s newer than \"%s\": %s; --destroy-newer removes what is newer",
         to->name, op->n_snapshots == 1 ? "a snapshot" : "snapshots", to->snapshot.rec.name,
         catalog_names(names, op->snapshots[0].rec.name, sizeof *op->snapshots, op->n_snapshots));
    job_finish(job, ST_EXISTS);
    return true;
}

static void rollback_seen(struct job *job, enum status st)
{
    const struct store_get *header_get = &job->gets[2], *state_get = &job->gets[3],
                           *ancestry_get = &job->gets[4], *snapshot_get = &job->gets[5];
    const struct catalog_entry *to = &job->entry;
    struct owner_record owner;
    struct header_record header;
    struct state_record state;
    struct ancestry_record ancestry;
    struct snapshot_record snapshot;
    if (!catalog_still_free(job, st, &owner) ||
        !take_snapshot(job, header_get, snapshot_get, &header, &snapshot) ||
        !take_ancestry(job, ancestry_get, &ancestry))
        return;
    if (state_get->st != ST_OK || !state_decode(state_get->key, state_get->head, &state)) {
        job_damaged(job, "the state of volume \"%s\"", to->name);
        return;
    }
    if (newer_forbid(job))
        return;
    if (header.epoch != to->header.epoch) {
        fail(&job->op->err, ST_BUSY, "volume \"%s\" has got a new snapshot just now", to->name);
        job_finish(job, ST_BUSY);
        return;
    }
    if (!ancestry_roll_back(&ancestry, to->branch, to->snapshot.epoch, header.epoch)) {
        fail(&job->op->err, ST_NOSPC,
             "volume \"%s\" was rolled back so often that no more can be noted until its next "
             "owner has cleared that up",
             to->name);
        job_finish(job, ST_NOSPC);
        return;
    }
    header.epoch++;
    header.size = snapshot.size;
    header.import_base = 0;
    state.data_blocks = snapshot.data_blocks;
    state.changed = ++state.generation;
    state.n_logs = 0;
    owner.token++;
    memset(owner.session, 0, sizeof owner.session);

    struct key key, end;
    uint8_t bytes[RECORD_BYTES_MAX];
    for (size_t i = 0; i < job->n_gets; i++)
        job_check(job, &job->gets[i]);
    newer_snapshots(to, &key, &end);
    job_clear_range(job, &key, &end);
    children_of_newer(to, &key, &end);
    job_check_empty(job, &key, &end);
    key_owner(&key, to->branch);
    job_set(job, &key, bytes, owner_encode(&owner, key_slice(&key), bytes));
    key_header(&key, to->branch);
    job_set(job, &key, bytes, header_encode(&header, key_slice(&key), bytes));
    key_state(&key, to->branch);
    job_set(job, &key, bytes, state_encode(&state, key_slice(&key), bytes));
    key_ancestry(&key, to->branch);
    job_set(job, &key, bytes, ancestry_encode(&ancestry, key_slice(&key), bytes));
    job_commit(job, true, rollback_written);
}

static void rollback_look(struct job *job)
{
    const struct catalog_entry *to = &job->entry;
    struct key key, end;
    catalog_look_up(job);
    key_state(&key, to->branch);
    job_get(job, &key);
    key_ancestry(&key, to->branch);
    job_get(job, &key);
    key_snapshot(&key, to->branch, to->snapshot.epoch);
    job_get(job, &key);
    newer_snapshots(to, &key, &end);
    job_range(job, key_slice(&key), &end, JOB_RANGE_MAX);
    children_of_newer(to, &key, &end);
    job_range(job, key_slice(&key), &end, 1);
    job_read(job, rollback_seen);
}

void catalog_rollback(struct catalog_op *op, struct store *store, struct env *env,
                      const struct catalog_entry *to, bool destroy_newer)
{
    struct job *job = job_new(op, store, env);
    job->entry = *to;
    job->with_snapshots = destroy_newer;
    rollback_look(job);
}
