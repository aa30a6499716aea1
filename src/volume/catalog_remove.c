/* The catalog: removing volumes, and clearing what they leave behind. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "volume/catalog_internal.h"

#define CLEAR_BATCH_KEYS 2000u

/* --- remove -------------------------------------------------------------------------- */

bool catalog_same_owner(const struct owner_record *a, const struct owner_record *b)
{
    return a->token == b->token && memcmp(a->session, b->session, SESSION_ID_BYTES) == 0;
}

void catalog_look_up(struct job *job)
{
    struct key key;
    job_reset(job);
    key_name(&key, job->entry.name);
    job_get(job, &key);
    key_owner(&key, job->entry.branch);
    job_get(job, &key);
    key_header(&key, job->entry.branch);
    job_get(job, &key);
}

bool catalog_still_free(struct job *job, enum status st, struct owner_record *owner)
{
    const struct catalog_entry *entry = &job->entry;
    const struct store_get *name_get = &job->gets[0], *owner_get = &job->gets[1];
    struct name_record name = {0};
    *owner = (struct owner_record){0};
    if (st != ST_OK) {
        job_store_failed(job, st, "look up volume \"%s\"", entry->name);
        return false;
    }
    if ((name_get->st == ST_OK && !name_decode(name_get->key, name_get->head, &name)) ||
        (owner_get->st == ST_OK && !owner_decode(owner_get->key, owner_get->head, owner))) {
        job_damaged(job, "a record of volume \"%s\"", entry->name);
        return false;
    }
    if (name_get->st == ST_NOTFOUND || name.branch != entry->branch) {
        fail(&job->op->err, ST_NOTFOUND,
             "volume \"%s\" was renamed or removed by somebody else just now", entry->name);
        job_finish(job, ST_NOTFOUND);
        return false;
    }
    if (!catalog_same_owner(owner, &entry->owner)) {
        fail(&job->op->err, ST_BUSY, "volume \"%s\" was taken into use by %s just now", entry->name,
             owner->host[0] ? owner->host : "a server");
        job_finish(job, ST_BUSY);
        return false;
    }
    return true;
}

bool catalog_take_header(struct job *job, const struct store_get *get, struct header_record *header)
{
    if (get->st == ST_OK && header_decode(get->key, get->head, header))
        return true;
    job_damaged(job, "the header of volume \"%s\"", job->entry.name);
    return false;
}

void catalog_refuse_for_clones(struct job *job, const char *advice, void (*again)(struct job *job))
{
    struct catalog_op *op = job->op;
    char names[CATALOG_NAMES_BYTES];
    const char *snapshot = "";
    if (op->n_entries == 0 && ++job->attempts < JOB_ATTEMPTS_MAX) {
        again(job); /* they were removed meanwhile */
        return;
    }
    for (size_t i = 0; i < op->n_snapshots; i++)
        if (op->snapshots[i].epoch == job->epoch)
            snapshot = op->snapshots[i].rec.name;
    fail(&op->err, ST_EXISTS, "snapshot \"%s@%s\" has %s: %s; %s", job->entry.name, snapshot,
         op->n_entries == 1 ? "a clone" : "clones",
         op->n_entries
             ? catalog_names(names, op->entries[0].name, sizeof *op->entries, op->n_entries)
             : "being removed",
         advice);
    job_finish(job, ST_EXISTS);
}

static void remove_look(struct job *job);

static void remove_written(struct job *job, enum status st)
{
    catalog_drop_snapshots(job); /* only looked at */
    job_end_change(job, st, remove_look, "remove \"%s\"", job->entry.name);
}

static void remove_refused(struct job *job)
{
    catalog_refuse_for_clones(job, "remove or flatten them first", remove_look);
}

/* Range 0: its snapshots; range 1: their clones. True: the job goes on elsewhere. */
static bool snapshots_forbid(struct job *job)
{
    struct catalog_op *op = job->op;
    char text[CATALOG_NAMES_BYTES];
    uint64_t branch, child;
    catalog_drop_snapshots(job);
    catalog_take_snapshots(job, &job->ranges[0]);
    if (job->ranges[1].n_pairs > 0 &&
        key_parse_child(job->ranges[1].pairs[0].key, &branch, &job->epoch, &child)) {
        catalog_find_clones(job, job->entry.branch, job->epoch, remove_refused);
        return true;
    }
    if (job->with_snapshots || (op->n_snapshots == 0 && !job->left_out))
        return false;
    if (op->n_snapshots == 0) {
        job_damaged(job, "the record of a snapshot of volume \"%s\"", job->entry.name);
        return true;
    }
    fail(&op->err, ST_EXISTS, "volume \"%s\" has %s: %s; --snapshots removes them too",
         job->entry.name, op->n_snapshots == 1 ? "a snapshot" : "snapshots",
         catalog_names(text, op->snapshots[0].rec.name, sizeof *op->snapshots, op->n_snapshots));
    job_finish(job, ST_EXISTS);
    return true;
}

static void remove_seen(struct job *job, enum status st)
{
    const struct catalog_entry *entry = &job->entry;
    const struct store_get *by = &job->gets[3];
    struct owner_record owner;
    struct header_record header;
    struct name_record successor;
    if (!catalog_still_free(job, st, &owner) || !catalog_take_header(job, &job->gets[2], &header))
        return;
    if (*job->name && by->st != ST_OK) {
        catalog_no_volume(job);
        return;
    }
    if (*job->name && !name_decode(by->key, by->head, &successor)) {
        job_damaged(job, "the name record of volume \"%s\"", job->name);
        return;
    }
    if (snapshots_forbid(job))
        return;

    static void (*const records[])(struct key *, uint64_t) = {key_header, key_owner, key_state,
                                                              key_mailbox, key_answer};
    struct key key, end;
    uint8_t bytes[RECORD_BYTES_MAX];
    /* (Whoever makes a snapshot changes the header.) */
    for (size_t i = 0; i < job->n_gets; i++)
        job_check(job, &job->gets[i]);
    key_prefix_branch(&key, 'd', entry->branch);
    end = key;
    key_prefix_end(&end);
    job_check_empty(job, &key, &end);
    key_name(&key, *job->name ? job->name : entry->name);
    job_clear(job, key_slice(&key));
    if (*job->name) {
        key_name(&key, entry->name);
        job_set(job, &key, bytes, name_encode(&successor, key_slice(&key), bytes));
    }
    for (size_t i = 0; i < sizeof records / sizeof *records; i++) {
        records[i](&key, entry->branch);
        job_clear(job, key_slice(&key));
    }
    if (header.parent_branch) {
        key_child(&key, header.parent_branch, header.parent_epoch, entry->branch);
        job_clear(job, key_slice(&key));
    }
    struct removed_record removed = {.removed_ns = env_realtime_ns(job->op->env)};
    memcpy(removed.name, entry->name, sizeof removed.name);
    key_removed(&key, entry->branch);
    job_set(job, &key, bytes, removed_encode(&removed, key_slice(&key), bytes));
    job_commit(job, true, remove_written);
}

static void remove_look(struct job *job)
{
    struct key key;
    catalog_look_up(job);
    if (*job->name) {
        key_name(&key, job->name);
        job_get(job, &key);
    }
    key_prefix_branch(&key, 'v', job->entry.branch);
    job_range_of(job, &key, JOB_RANGE_MAX);
    key_prefix_branch(&key, 'd', job->entry.branch);
    job_range_of(job, &key, 1);
    job_read(job, remove_seen);
}

void catalog_remove(struct catalog_op *op, struct store *store, struct env *env,
                    const struct catalog_entry *entry, bool with_snapshots)
{
    struct job *job = job_new(op, store, env);
    job->entry = *entry;
    job->with_snapshots = with_snapshots;
    remove_look(job);
}

void catalog_replace(struct catalog_op *op, struct store *store, struct env *env,
                     const struct catalog_entry *entry, const char *by)
{
    struct job *job = job_new(op, store, env);
    job->entry = *entry;
    job->with_snapshots = true;
    snprintf(job->name, sizeof job->name, "%s", by);
    remove_look(job);
}

/* --- clearing what removed volumes left ---------------------------------------------- */

static void clear_written(struct job *job, enum status st)
{
    if (st != ST_OK)
        job_store_failed(job, st, "clear what a removed volume left");
    else
        job_finish(job, ST_OK);
}

static void clear_commit(struct job *job, bool all)
{
    /* Last of all the record that says what is still to be done: from any interruption a
     * later call goes on. */
    if (all) {
        struct key key;
        key_removed(&key, job->branch);
        job_clear(job, key_slice(&key));
    } else {
        *job->more = true;
    }
    job_commit(job, false, clear_written);
}

static void clear_found(struct job *job, enum status st)
{
    if (st != ST_OK) {
        job_store_failed(job, st, "find what a removed volume left");
        return;
    }
    size_t room = CLEAR_BATCH_KEYS;
    bool all = true;
    for (size_t r = 0; r < job->n_ranges; r++) {
        const struct store_range *range = &job->ranges[r];
        size_t n = min_u64(range->n_pairs, room);
        for (size_t i = 0; i < n; i++)
            job_clear(job, range->pairs[i].key);
        room -= n;
        if (range->more || n < range->n_pairs)
            all = false;
    }
    clear_commit(job, all);
}

static void clear_chosen(struct job *job, enum status st)
{
    if (st != ST_OK) {
        job_store_failed(job, st, "look for removed volumes");
        return;
    }
    const struct store_range *range = job->ranges;
    if (range->n_pairs == 0) {
        job_finish(job, ST_OK);
        return;
    }
    *job->more = range->n_pairs > 1;
    if (!key_parse_branch(range->pairs[0].key, 'g', &job->branch)) {
        job_damaged(job, "a record of a removed volume");
        return;
    }
    job_reset(job);
    /* Its snapshots first: who reads one looks whether it is still there whenever a row could be
     * missing. */
    static const char tags[] = "vdlbitoaqrh";
    bool blind = job->op->store->limits.clears_ranges;
    for (size_t i = 0; i < sizeof tags - 1; i++) {
        struct key key;
        key_prefix_branch(&key, tags[i], job->branch);
        if (blind)
            job_clear_all(job, &key);
        else
            job_range_of(job, &key, CLEAR_BATCH_KEYS);
    }
    if (blind)
        clear_commit(job, true);
    else
        job_read(job, clear_found);
}

void catalog_clear_removed(struct catalog_op *op, struct store *store, struct env *env, bool *more)
{
    struct job *job = job_new(op, store, env);
    struct key key;
    job->more = more;
    job->background = true;
    *more = false;
    key_prefix(&key, 'g');
    job_range_of(job, &key, 2);
    job_read(job, clear_chosen);
}
