/* The catalog: the store's own record; creating and renaming volumes. */
#include <stdio.h>
#include <string.h>

#include "volume/catalog_internal.h"

#define VOLUME_BYTES_MAX (1ull << 62)
#define SECTOR_BYTES 512u
#define BLOCK_BYTES_MIN 4096u
#define BLOCK_BYTES_MAX 65536u
#define ZSTD_LEVEL_MAX 19

/* --- prepare ------------------------------------------------------------------------- */

static void prepare_look(struct job *job);

static void prepare_written(struct job *job, enum status st)
{
    job_end_change(job, st, prepare_look, "write the store's own record");
}

static void prepare_write(struct job *job)
{
    struct key key;
    uint8_t bytes[RECORD_BYTES_MAX];
    struct meta_record *meta = &job->op->meta;
    key_store_meta(&key);
    /* All features so far are those of single volumes. */
    *meta = (struct meta_record){.format = STORE_FORMAT,
                                 .created_ns = env_realtime_ns(job->op->env)};
    env_random(job->op->env, meta->uuid, sizeof meta->uuid);
    job_check(job, &job->gets[0]);
    job_set(job, &key, bytes, meta_encode(meta, key_slice(&key), bytes));
    job_commit(job, false, prepare_written);
}

static void prepare_seen(struct job *job, enum status st)
{
    struct store_info info;
    struct meta_record *meta = &job->op->meta;
    const struct store_get *get = &job->gets[0];
    if (st != ST_OK) {
        job_store_failed(job, st, "read the store's own record");
    } else if (get->st == ST_NOTFOUND) {
        if (job->ranges[0].n_pairs > 0 || job->ranges[1].n_pairs > 0) {
            fail(&job->op->err, ST_FORMAT, "%s has volumes but no record of its format",
                 job_store_name(job, &info));
            job_finish(job, ST_FORMAT);
        } else if (!job->create) {
            fail(&job->op->err, ST_NOTFOUND, "there are no volumes in %s yet",
                 job_store_name(job, &info));
            job_finish(job, ST_NOTFOUND);
        } else {
            prepare_write(job);
        }
    } else if (!meta_decode(get->key, get->head, meta)) {
        job_damaged(job, "the store's own record");
    } else if (meta->format != STORE_FORMAT ||
               (meta->features.incompat & ~FEATURES_INCOMPAT_KNOWN)) {
        fail(&job->op->err, ST_FORMAT,
             "%s has format %u and features this version does not know (0x%llx): use a newer "
             "fdb-nbd",
             job_store_name(job, &info), meta->format,
             (unsigned long long)(meta->features.incompat & ~FEATURES_INCOMPAT_KNOWN));
        job_finish(job, ST_FORMAT);
    } else {
        job_finish(job, ST_OK);
    }
}

static void prepare_look(struct job *job)
{
    struct key key;
    job_reset(job);
    key_store_meta(&key);
    job_get(job, &key);
    key_prefix(&key, 'n');
    job_range_of(job, &key, 1);
    key_prefix(&key, 'h');
    job_range_of(job, &key, 1);
    job_read(job, prepare_seen);
}

void catalog_prepare(struct catalog_op *op, struct store *store, struct env *env, bool create)
{
    struct job *job = job_new(op, store, env);
    job->create = create;
    prepare_look(job);
}

/* --- create -------------------------------------------------------------------------- */

/* Whether `text` is UTF-8 without control characters: it is shown on terminals. */
static bool text_valid(const char *text)
{
    const unsigned char *at = (const unsigned char *)text;
    while (*at) {
        unsigned c = *at++;
        if (c < 0x20 || c == 0x7f)
            return false;
        if (c < 0x80)
            continue;
        unsigned more = c >= 0xf0 ? 3 : c >= 0xe0 ? 2 : 1;
        if (c < 0xc2 || c > 0xf4)
            return false;
        uint32_t point = c & (0x3fu >> more);
        for (unsigned i = 0; i < more; i++) {
            if ((*at & 0xc0) != 0x80)
                return false;
            point = point << 6 | (*at++ & 0x3fu);
        }
        /* Longer than need be, a surrogate half, past the last one, or a C1 control. */
        if (point < (more == 3   ? 0x10000u
                     : more == 2 ? 0x800u
                                 : 0xa0u) ||
            (point >= 0xd800 && point < 0xe000) || point > 0x10ffff)
            return false;
    }
    return true;
}

static enum status name_check(struct err *e, const char *name)
{
    if (name_valid(name))
        return ST_OK;
    return fail(e, ST_INVAL,
                "\"%.140s\" is not a volume name: 1 to 128 of A-Z a-z 0-9 . _ -, the first a "
                "letter or digit",
                name);
}

static enum status size_check(struct err *e, uint64_t size)
{
    if (size < SECTOR_BYTES || size % SECTOR_BYTES != 0 || size > VOLUME_BYTES_MAX)
        return fail(e, ST_INVAL,
                    "a volume's size is a multiple of 512 bytes, from 512 to 2^62, not %llu",
                    (unsigned long long)size);
    return ST_OK;
}

enum status volume_spec_check(const struct volume_spec *spec, struct err *e)
{
    enum status st = name_check(e, spec->name);
    if (st == ST_OK)
        st = size_check(e, spec->size);
    if (st != ST_OK)
        return st;
    if (spec->block_size != 0 &&
        (spec->block_size < BLOCK_BYTES_MIN || spec->block_size > BLOCK_BYTES_MAX ||
         (spec->block_size & (spec->block_size - 1)) != 0))
        return fail(e, ST_INVAL, "the block size is 4K, 8K, 16K, 32K or 64K, not %u bytes",
                    spec->block_size);
    if (spec->codec > CODEC_ZSTD)
        return fail(e, ST_INVAL, "there is no compression number %d", spec->codec);
    if (spec->codec == CODEC_ZSTD ? spec->codec_level < 0 || spec->codec_level > ZSTD_LEVEL_MAX
                                  : spec->codec_level != 0)
        return fail(e, ST_INVAL, "only zstd has levels, from 1 to %d", ZSTD_LEVEL_MAX);
    if (!text_valid(spec->description))
        return fail(e, ST_INVAL, "the description is not plain UTF-8 text");
    return ST_OK;
}

void catalog_name_taken(struct job *job, const char *name)
{
    struct store_info info;
    fail(&job->op->err, ST_EXISTS, "there is a volume \"%s\" in %s already", name,
         job_store_name(job, &info));
    job_finish(job, ST_EXISTS);
}

bool catalog_add_volume(struct job *job, const struct store_get *counter,
                        struct header_record *header, const struct state_record *state,
                        uint64_t *branch)
{
    struct counter_record next = {.next_branch = 1};
    struct key key;
    uint8_t bytes[RECORD_BYTES_MAX];
    if (counter->st == ST_OK && !counter_decode(counter->key, counter->head, &next)) {
        job_damaged(job, "the counter of volumes");
        return false;
    }
    *branch = next.next_branch++;
    job_check(job, counter);
    key_branch_counter(&key);
    job_set(job, &key, bytes, counter_encode(&next, key_slice(&key), bytes));

    struct name_record name = {*branch};
    key_name(&key, job->spec.name);
    job_set(job, &key, bytes, name_encode(&name, key_slice(&key), bytes));

    header->epoch = 1;
    header->created_ns = env_realtime_ns(job->op->env);
    memcpy(header->description, job->spec.description, sizeof header->description);
    key_header(&key, *branch);
    job_set(job, &key, bytes, header_encode(header, key_slice(&key), bytes));

    key_state(&key, *branch);
    job_set(job, &key, bytes, state_encode(state, key_slice(&key), bytes));

    struct owner_record owner = {0};
    key_owner(&key, *branch);
    job_set(job, &key, bytes, owner_encode(&owner, key_slice(&key), bytes));
    return true;
}

static void create_look(struct job *job);

static void create_written(struct job *job, enum status st)
{
    job_end_change(job, st, create_look, "create \"%s\"", job->spec.name);
}

static void create_seen(struct job *job, enum status st)
{
    const struct store_get *name = &job->gets[0], *counter = &job->gets[1];
    if (st != ST_OK) {
        job_store_failed(job, st, "look for a free name");
        return;
    }
    if (name->st == ST_OK) {
        catalog_name_taken(job, job->spec.name);
        return;
    }
    struct header_record header = {.size = job->spec.size,
                                   .block_size = job->spec.block_size,
                                   .codec = (uint8_t)job->spec.codec,
                                   .codec_level = (uint8_t)job->spec.codec_level};
    struct state_record state = {0};
    uint64_t branch;
    if (catalog_add_volume(job, counter, &header, &state, &branch)) {
        job_check(job, name);
        job_commit(job, false, create_written);
    }
}

static void create_look(struct job *job)
{
    struct key key;
    job_reset(job);
    key_name(&key, job->spec.name);
    job_get(job, &key);
    key_branch_counter(&key);
    job_get(job, &key);
    job_read(job, create_seen);
}

void catalog_create(struct catalog_op *op, struct store *store, struct env *env,
                    const struct volume_spec *spec)
{
    struct job *job = job_new(op, store, env);
    job->spec = *spec;
    if (job->spec.block_size == 0)
        job->spec.block_size = store->limits.body_bytes_best;
    if (job->spec.codec < 0)
        job->spec.codec = CODEC_LZ4;
    if (volume_spec_check(&job->spec, &op->err) != ST_OK)
        job_refuse(job);
    else
        create_look(job);
}

/* --- rename -------------------------------------------------------------------------- */

static void rename_look(struct job *job);

static void rename_written(struct job *job, enum status st)
{
    job_end_change(job, st, rename_look, "rename \"%s\"", job->name);
}

static void rename_seen(struct job *job, enum status st)
{
    const struct store_get *from = &job->gets[0], *to = &job->gets[1];
    struct name_record rec;
    if (st != ST_OK) {
        job_store_failed(job, st, "look up volume \"%s\"", job->name);
        return;
    }
    if (from->st == ST_NOTFOUND) {
        catalog_no_volume(job);
        return;
    }
    if (to->st == ST_OK) {
        catalog_name_taken(job, job->to);
        return;
    }
    if (!name_decode(from->key, from->head, &rec)) {
        job_damaged(job, "the name record of volume \"%s\"", job->name);
        return;
    }
    struct key key;
    uint8_t bytes[RECORD_BYTES_MAX];
    job_check(job, from);
    job_check(job, to);
    key_name(&key, job->name);
    job_clear(job, key_slice(&key));
    key_name(&key, job->to);
    job_set(job, &key, bytes, name_encode(&rec, key_slice(&key), bytes));
    job_commit(job, true, rename_written);
}

static void rename_look(struct job *job)
{
    struct key key;
    job_reset(job);
    key_name(&key, job->name);
    job_get(job, &key);
    key_name(&key, job->to);
    job_get(job, &key);
    job_read(job, rename_seen);
}

void catalog_rename(struct catalog_op *op, struct store *store, struct env *env, const char *from,
                    const char *to)
{
    struct job *job = job_new(op, store, env);
    snprintf(job->name, sizeof job->name, "%s", from);
    snprintf(job->to, sizeof job->to, "%s", to);
    if (name_check(&op->err, to) != ST_OK)
        job_refuse(job);
    else if (!name_valid(from))
        catalog_no_volume(job);
    else
        rename_look(job);
}
