/*
 * What the files of the catalog share: the job.
 *
 *   catalog_job.c      jobs: reading, committing, ending
 *   catalog.c          the store's own record; create, rename
 *   catalog_find.c     list, find, names that look alike
 *   catalog_history.c  snapshots, clones, rollback
 *   catalog_import.c   the mark of a volume that is being imported into
 *   catalog_remove.c   remove, and clearing what is left
 *   catalog_ask.c      the mailbox of a volume's owner
 *
 * Each operation is a job: a chain of steps, each of which reads or commits and names the
 * step that comes next. A change reads what it depends on, checks exactly that in its
 * commit, and starts over when the check fails: two commands at once end up as one after
 * the other, whoever they run for. Attempts are counted, because a conflict means that
 * somebody else got through, but nothing promises that it will ever be us.
 *
 * What a step builds for a commit (keys, values, what was read and is checked) lies in
 * the job's scraps, which go with the next attempt.
 */
#ifndef VOLUME_CATALOG_INTERNAL_H
#define VOLUME_CATALOG_INTERNAL_H

#include "base/mem.h"
#include "volume/catalog.h"

#define JOB_ATTEMPTS_MAX 64u
/* The snapshots of a volume, removed ones that are still being cleared included, are taken in with
 * one read where a commit depends on them. */
#define JOB_RANGE_MAX 65536u

struct ask;
struct scrap;

struct job {
    struct catalog_op *op;
    void (*next)(struct job *job, enum status st);
    void (*ended)(struct job *job); /* gives back what `ask` holds, or NULL */
    struct env_task task;
    unsigned attempts;

    struct store_read read;
    bool read_held, read_in_parts;
    struct store_get *gets;
    struct store_range *ranges;
    size_t n_gets, cap_gets, n_ranges, cap_ranges;

    struct store_commit commit;
    struct store_check *checks;
    struct store_mutation *mutations;
    size_t n_checks, cap_checks, n_mutations, cap_mutations;
    struct scrap *scraps;

    /* A scan: page by page. */
    struct key scan_from, scan_end;
    void (*scan_page)(struct job *job, const struct store_range *page);
    void (*scan_over)(struct job *job);
    const char *scan_what;

    /* What the operation was asked for. */
    struct volume_spec spec;
    char name[NAME_BYTES_MAX + 1], to[NAME_BYTES_MAX + 1];
    struct catalog_entry entry;
    bool create, background, with_snapshots;
    bool *more;
    uint64_t branch, epoch;
    size_t cap_entries, loaded; /* list: entries before `loaded` are whole */
    size_t cap_snapshots;
    bool left_out;    /* a snapshot, because its record is damaged */
    struct catalog_child {
        uint64_t branch, of_epoch;
    } *wanted; /* branches whose names are looked for, rising */
    size_t n_wanted, cap_wanted;
    void (*clones_found)(struct job *job);
    struct ask *ask;
};

struct job *job_new(struct catalog_op *op, struct store *store, struct env *env);

/* Ends a job: answers, and frees it. What `st` is not OK for and op->err does not say is filled
 * in. */
void job_finish(struct job *job, enum status st);
/* Ends a job from outside the call, with what fail() put into op->err. */
void job_refuse(struct job *job);
/* Ends a job over a failed read or commit; what `format` gives completes "cannot ...". */
void job_store_failed(struct job *job, enum status st, const char *format, ...)
    __attribute__((format(printf, 3, 4)));
/* Ends a job: what `format` gives is damaged or missing. */
void job_damaged(struct job *job, const char *format, ...) __attribute__((format(printf, 2, 3)));

const char *job_store_name(struct job *job, struct store_info *info);

/* Forgets what the last step built. */
void job_reset(struct job *job);
/* A copy that lives as long as the scraps. */
struct slice job_keep(struct job *job, const void *data, size_t len);

/* Add to the next read. */
void job_get(struct job *job, const struct key *key);
void job_range(struct job *job, struct slice begin, const struct key *end, uint32_t limit);
void job_range_of(struct job *job, const struct key *prefix, uint32_t limit);

/* Reads what was added and goes on with `next`, where gets and ranges can be looked at
 * until the next start or finish. A get that failed fails the whole. */
void job_read(struct job *job, void (*next)(struct job *job, enum status st));
/* The same, but `next` looks at the outcome of each get. */
void job_read_in_parts(struct job *job, void (*next)(struct job *job, enum status st));

/* Goes through all keys below `prefix`: `page` is given them lot by lot, then `over` goes on with
 * the job. `what` completes "cannot ..."; static. */
void job_scan(struct job *job, const struct key *prefix, const char *what,
              void (*page)(struct job *job, const struct store_range *page),
              void (*over)(struct job *job));

/* Add to the next commit. A check requires what `get` saw: this very value, or nothing. */
void job_check(struct job *job, const struct store_get *get);
void job_check_value(struct job *job, const struct key *key, const void *value, size_t len);
void job_check_empty(struct job *job, const struct key *begin, const struct key *end);
void job_set(struct job *job, const struct key *key, const uint8_t *value, size_t len);
void job_clear(struct job *job, struct slice key);
void job_clear_range(struct job *job, const struct key *begin, const struct key *end);
void job_clear_all(struct job *job, const struct key *prefix);
void job_commit(struct job *job, bool wake_watchers, void (*next)(struct job *job, enum status st));
/* Whether a commit that ended so is to be tried again, from the reading on. */
bool job_may_try_again(struct job *job, enum status st);
/* What most changes do when their commit ended so: start over with `look`, or end the job, well or
 * with job_store_failed(). */
void job_end_change(struct job *job, enum status st, void (*look)(struct job *job),
                    const char *format, ...) __attribute__((format(printf, 4, 5)));

struct catalog_entry *job_add_entry(struct job *job, const char *name, uint64_t branch);

bool catalog_same_owner(const struct owner_record *a, const struct owner_record *b);

/* Adds the records of a new volume, named and described as job->spec says, to the next commit.
 * `counter` is what was read of the counter of branches. That the name is free is for the caller
 * to check. Fills what is missing in `header`. False: the job has ended, the counter is damaged. */
bool catalog_add_volume(struct job *job, const struct store_get *counter,
                        struct header_record *header, const struct state_record *state,
                        uint64_t *branch);
/* Ends a job: there is a volume of that name already. */
void catalog_name_taken(struct job *job, const char *name);

/* Ends a job with ST_NOTFOUND and names that look like job->name. */
void catalog_no_volume(struct job *job);

/* What a page of ("v", branch, ...) says of snapshots that are not removed, into op->snapshots. */
void catalog_take_snapshots(struct job *job, const struct store_range *page);
void catalog_drop_snapshots(struct job *job);

/* The clones of a snapshot (epoch 0: of all of the branch), into op->entries. */
void catalog_find_clones(struct job *job, uint64_t branch, uint64_t epoch,
                         void (*found)(struct job *job));
/* Ends a job: the snapshot of job->epoch, which is among op->snapshots, has the clones that were
 * found. Where there are none any more it goes on with `again`. */
void catalog_refuse_for_clones(struct job *job, const char *advice, void (*again)(struct job *job));

/* Begins what a step reads to change the volume of job->entry: gets 0 to 2 are its name, its owner
 * and its header. */
void catalog_look_up(struct job *job);
/* Whether the volume still has its name and its owner, by how the read ended and by gets 0 and 1;
 * *owner is the latter. False: the job has ended. */
bool catalog_still_free(struct job *job, enum status st, struct owner_record *owner);
/* The volume's header, as read. False: the job has ended, the header is damaged or missing. */
bool catalog_take_header(struct job *job, const struct store_get *get,
                         struct header_record *header);

#endif
