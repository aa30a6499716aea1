/* The catalog: marking a volume while an import into it is under way. */
#include "volume/catalog_internal.h"

static void mark_look(struct job *job);

static void mark_written(struct job *job, enum status st)
{
    job_end_change(job, st, mark_look, "mark volume \"%s\"", job->entry.name);
}

static void mark_seen(struct job *job, enum status st)
{
    const struct catalog_entry *entry = &job->entry;
    struct owner_record owner;
    struct header_record header;
    if (!catalog_still_free(job, st, &owner) || !catalog_take_header(job, &job->gets[2], &header))
        return;
    /* (Whoever makes a snapshot, or rolls back, raises the epoch.) */
    if (header.epoch != entry->header.epoch || header.import_base != entry->header.import_base) {
        fail(&job->op->err, ST_BUSY, "volume \"%s\" was changed by somebody else just now",
             entry->name);
        job_finish(job, ST_BUSY);
        return;
    }
    struct key key;
    uint8_t bytes[RECORD_BYTES_MAX];
    for (size_t i = 0; i < job->n_gets; i++)
        job_check(job, &job->gets[i]);
    header.import_base = job->epoch;
    key_header(&key, entry->branch);
    job_set(job, &key, bytes, header_encode(&header, key_slice(&key), bytes));
    job_commit(job, true, mark_written);
}

static void mark_look(struct job *job)
{
    catalog_look_up(job);
    job_read(job, mark_seen);
}

void catalog_mark_import(struct catalog_op *op, struct store *store, struct env *env,
                         const struct catalog_entry *entry, uint64_t base)
{
    struct job *job = job_new(op, store, env);
    job->entry = *entry;
    job->epoch = base;
    mark_look(job);
}
