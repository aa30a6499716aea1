/*
 * The catalog: names, headers, and the mailbox of a volume's owner.
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
#include "volume/catalog.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/check.h"
#include "base/log.h"
#include "base/mem.h"
#include "volume/session.h"

#define ATTEMPTS_MAX 64u
#define NAMES_PER_PAGE 1000u
#define LOADS_PER_READ 250u /* each is four gets */
#define CLEAR_BATCH_KEYS 2000u
#define SUGGESTIONS_MAX 3u
#define SUGGESTION_DISTANCE_MAX 3

/* How often an asker looks although nothing woke it: the owner may have died. */
#define ASK_TICK_MS SESSION_LOOK_MS
#define ASK_WATCHES 2u
/* A request of somebody else that lay in the mailbox for so long was left by a command
 * that died: one that lives withdraws its own. */
#define MAIL_STALE_MS 15000u

#define VOLUME_BYTES_MAX (1ull << 62)
#define SECTOR_BYTES 512u
#define BLOCK_BYTES_MIN 4096u
#define BLOCK_BYTES_MAX 65536u
#define ZSTD_LEVEL_MAX 19

static const uint8_t nobody[SESSION_ID_BYTES];

struct scrap {
    struct scrap *next;
    uint8_t bytes[];
};

/* A request on its way through the mailbox. */
struct ask {
    struct job *job;
    struct catalog_entry entry;
    struct mail_record mail;
    uint64_t deadline_ns;
    uint32_t wait_ms;
    struct env_timer timer;
    struct ask_watch {
        struct store_watch watch;
        struct ask *ask;
        bool armed; /* and has not fired */
        bool used;  /* it was armed at least once */
    } watches[ASK_WATCHES]; /* of the answer, and of the owner, who may let go without one */
    bool idle;      /* nothing runs; the timer or a watch starts the next look */
    bool written;  /* the request lies in the mailbox */
    struct key mailbox, answer, owner;
    uint8_t mine[RECORD_BYTES_MAX], other[RECORD_BYTES_MAX];
    size_t mine_len, other_len;
    uint64_t other_since_ns;
    enum status outcome; /* of a request that is being withdrawn, or was answered */
    bool fence;
    char here[HOST_BYTES_MAX + 1];
    struct session_sight *sight, own_sight; /* of the owner's session, where it needs heartbeats */
};

struct job {
    struct catalog_op *op;
    void (*next)(struct job *job, enum status st);
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

    /* What the operation was asked for. */
    struct volume_spec spec;
    char name[NAME_BYTES_MAX + 1], to[NAME_BYTES_MAX + 1];
    struct catalog_entry entry;
    bool create, background, with_snapshots;
    bool *more;
    uint64_t branch;
    size_t cap_entries, loaded; /* list: entries before `loaded` are whole */
    struct key page_from;
    bool pages_left;
    struct ask *ask;
};

static struct job *job_new(struct catalog_op *op, struct store *store, struct env *env)
{
    struct job *job = mem_zalloc(sizeof *job);
    job->op = op;
    op->store = store;
    op->env = env;
    op->state = job;
    op->st = ST_OK;
    op->err.st = ST_OK;
    op->err.text[0] = '\0';
    op->entries = NULL;
    op->n_entries = 0;
    return job;
}

static void job_release_read(struct job *job)
{
    if (job->read_held)
        store_read_release(&job->read);
    job->read_held = false;
}

/* Forgets what the last step built. */
static void job_reset(struct job *job)
{
    job_release_read(job);
    job->n_gets = job->n_ranges = job->n_checks = job->n_mutations = 0;
    while (job->scraps) {
        struct scrap *s = job->scraps;
        job->scraps = s->next;
        free(s);
    }
}

static void job_finish(struct job *job, enum status st)
{
    struct catalog_op *op = job->op;
    job_reset(job);
    if (job->ask) {
        env_timer_stop(op->env, &job->ask->timer);
        for (size_t i = 0; i < ASK_WATCHES; i++)
            if (job->ask->watches[i].used)
                store_watch_stop(&job->ask->watches[i].watch);
    }
    free(job->ask);
    free(job->gets);
    free(job->ranges);
    free(job->checks);
    free(job->mutations);
    free(job);
    op->state = NULL;
    op->st = st;
    if (st != ST_OK) {
        free(op->entries);
        op->entries = NULL;
        op->n_entries = 0;
        if (!op->err.text[0])
            fail(&op->err, st, "%s", status_text(st));
    }
    op->done(op);
}

static void finish_posted(struct env_task *task)
{
    struct job *job = container_of(task, struct job, task);
    job_finish(job, job->op->err.st);
}

/* Answers, from outside the call, with what fail() put into op->err. */
static void job_refuse(struct job *job)
{
    job->task.run = finish_posted;
    env_post(job->op->env, &job->task);
}

static const char *store_name(struct job *job, struct store_info *info)
{
    if (store_info(job->op->store, info, NULL) != ST_OK)
        snprintf(info->uri, sizeof info->uri, "the store");
    return info->uri;
}

/* Ends a job over a failed read or commit; `what` completes "cannot ...". */
static void job_store_failed(struct job *job, enum status st, const char *what)
{
    struct store_info info;
    const char *why = st == ST_CONFLICT ? "others keep changing it" : status_text(st);
    fail(&job->op->err, st == ST_CONFLICT ? ST_BUSY : st, "cannot %s in %s: %s", what,
         store_name(job, &info), why);
    job_finish(job, job->op->err.st);
}

static void job_damaged(struct job *job, const char *what)
{
    struct store_info info;
    fail(&job->op->err, ST_IO, "%s in %s is damaged or missing", what, store_name(job, &info));
    job_finish(job, ST_IO);
}

static struct slice keep(struct job *job, const void *data, size_t len)
{
    struct scrap *s = mem_alloc(sizeof *s + len);
    s->next = job->scraps;
    job->scraps = s;
    if (len)
        memcpy(s->bytes, data, len);
    return (struct slice){s->bytes, len};
}

static struct slice keep_key(struct job *job, const struct key *key)
{
    return keep(job, key->bytes, key->len);
}

static void add_get(struct job *job, const struct key *key)
{
    mem_grow(&job->gets, &job->cap_gets, job->n_gets + 1, sizeof *job->gets);
    job->gets[job->n_gets++] = (struct store_get){.key = keep_key(job, key)};
}

static void add_range(struct job *job, struct slice begin, const struct key *end, uint32_t limit)
{
    mem_grow(&job->ranges, &job->cap_ranges, job->n_ranges + 1, sizeof *job->ranges);
    job->ranges[job->n_ranges++] = (struct store_range){
        .begin = keep(job, begin.data, begin.len), .end = keep_key(job, end), .limit = limit};
}

static void add_prefix_range(struct job *job, const struct key *prefix, uint32_t limit)
{
    struct key end = *prefix;
    key_prefix_end(&end);
    add_range(job, key_slice(prefix), &end, limit);
}

/* The commit requires what `get` saw: this very value, or nothing. */
static void add_check(struct job *job, const struct store_get *get)
{
    mem_grow(&job->checks, &job->cap_checks, job->n_checks + 1, sizeof *job->checks);
    struct store_check *check = &job->checks[job->n_checks++];
    *check = (struct store_check){.kind = STORE_CHECK_ABSENT,
                                  .key = keep(job, get->key.data, get->key.len)};
    if (get->st == ST_OK) {
        check->kind = STORE_CHECK_VALUE;
        check->value = keep(job, get->head.data, get->head.len);
    }
}

static void add_check_value(struct job *job, const struct key *key, const void *value, size_t len)
{
    add_check(job, &(struct store_get){.key = key_slice(key), .st = ST_OK, .head = {value, len}});
}

static void add_mutation(struct job *job, enum store_mutation_kind kind, struct slice key,
                         struct slice head)
{
    mem_grow(&job->mutations, &job->cap_mutations, job->n_mutations + 1, sizeof *job->mutations);
    job->mutations[job->n_mutations++] = (struct store_mutation){
        .kind = kind, .key = keep(job, key.data, key.len), .head = keep(job, head.data, head.len)};
}

static void add_set(struct job *job, const struct key *key, const uint8_t *value, size_t len)
{
    add_mutation(job, STORE_SET, key_slice(key), (struct slice){value, len});
}

static void add_clear(struct job *job, const struct key *key)
{
    add_mutation(job, STORE_CLEAR, key_slice(key), (struct slice){NULL, 0});
}

static void add_clear_prefix(struct job *job, const struct key *prefix)
{
    struct key end = *prefix;
    key_prefix_end(&end);
    add_mutation(job, STORE_CLEAR_RANGE, key_slice(prefix), key_slice(&end));
}

static void read_done(struct store_read *read, enum status st)
{
    struct job *job = container_of(read, struct job, read);
    job->read_held = true;
    for (size_t i = 0; st == ST_OK && !job->read_in_parts && i < job->n_gets; i++)
        if (job->gets[i].st != ST_NOTFOUND)
            st = job->gets[i].st;
    job->next(job, st);
}

/* Reads what was added and goes on with `next`, where gets and ranges can be looked at
 * until the next start or finish. A get that failed fails the whole. */
static void start_read(struct job *job, void (*next)(struct job *job, enum status st))
{
    job_release_read(job);
    job->next = next;
    job->read_in_parts = false;
    job->read = (struct store_read){.gets = job->gets,
                                    .ranges = job->ranges,
                                    .n_gets = (uint32_t)job->n_gets,
                                    .n_ranges = (uint32_t)job->n_ranges,
                                    .background = job->background,
                                    .done = read_done};
    store_read(job->op->store, job->op->env, &job->read);
}

/* The same, but `next` looks at the outcome of each get. */
static void start_read_in_parts(struct job *job, void (*next)(struct job *job, enum status st))
{
    start_read(job, next);
    job->read_in_parts = true;
}

static void commit_done(struct store_commit *commit, enum status st)
{
    struct job *job = container_of(commit, struct job, commit);
    job->next(job, st);
}

static void start_commit(struct job *job, bool wake_watchers,
                         void (*next)(struct job *job, enum status st))
{
    job_release_read(job);
    job->next = next;
    job->commit = (struct store_commit){.checks = job->checks,
                                        .mutations = job->mutations,
                                        .n_checks = job->n_checks,
                                        .n_mutations = job->n_mutations,
                                        .wake_watchers = wake_watchers,
                                        .background = job->background,
                                        .done = commit_done};
    store_commit(job->op->store, job->op->env, &job->commit);
}

static bool may_try_again(struct job *job, enum status st)
{
    return st == ST_CONFLICT && ++job->attempts < ATTEMPTS_MAX;
}

void catalog_op_free(struct catalog_op *op)
{
    free(op->entries);
    op->entries = NULL;
    op->n_entries = 0;
}

/* --- prepare ------------------------------------------------------------------------- */

static void prepare_look(struct job *job);

static void prepare_written(struct job *job, enum status st)
{
    if (may_try_again(job, st))
        prepare_look(job);
    else if (st != ST_OK)
        job_store_failed(job, st, "write the store's own record");
    else
        job_finish(job, ST_OK);
}

static void prepare_write(struct job *job)
{
    struct key key;
    uint8_t bytes[RECORD_BYTES_MAX];
    struct meta_record *meta = &job->op->meta;
    key_store_meta(&key);
    *meta = (struct meta_record){.format = STORE_FORMAT,
                                 .features = {.compat = FEATURES_COMPAT_KNOWN,
                                              .ro_compat = FEATURES_RO_COMPAT_KNOWN,
                                              .incompat = FEATURES_INCOMPAT_KNOWN},
                                 .created_ns = env_realtime_ns(job->op->env)};
    env_random(job->op->env, meta->uuid, sizeof meta->uuid);
    add_check(job, &job->gets[0]);
    add_set(job, &key, bytes, meta_encode(meta, key_slice(&key), bytes));
    start_commit(job, false, prepare_written);
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
                 store_name(job, &info));
            job_finish(job, ST_FORMAT);
        } else if (!job->create) {
            fail(&job->op->err, ST_NOTFOUND, "there are no volumes in %s yet",
                 store_name(job, &info));
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
             store_name(job, &info), meta->format,
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
    add_get(job, &key);
    key_prefix(&key, 'n');
    add_prefix_range(job, &key, 1);
    key_prefix(&key, 'h');
    add_prefix_range(job, &key, 1);
    start_read(job, prepare_seen);
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

static void create_look(struct job *job);

static void create_written(struct job *job, enum status st)
{
    if (may_try_again(job, st)) {
        create_look(job);
    } else if (st != ST_OK) {
        char what[NAME_BYTES_MAX + 16];
        snprintf(what, sizeof what, "create \"%s\"", job->spec.name);
        job_store_failed(job, st, what);
    } else {
        job_finish(job, ST_OK);
    }
}

static void create_seen(struct job *job, enum status st)
{
    const struct store_get *name = &job->gets[0], *counter = &job->gets[1];
    struct counter_record next = {.next_branch = 1};
    if (st != ST_OK) {
        job_store_failed(job, st, "look for a free name");
        return;
    }
    if (name->st == ST_OK) {
        struct store_info info;
        fail(&job->op->err, ST_EXISTS, "there is a volume \"%s\" in %s already", job->spec.name,
             store_name(job, &info));
        job_finish(job, ST_EXISTS);
        return;
    }
    if (counter->st == ST_OK && !counter_decode(counter->key, counter->head, &next)) {
        job_damaged(job, "the counter of volumes");
        return;
    }

    struct key key;
    uint8_t bytes[RECORD_BYTES_MAX];
    uint64_t branch = next.next_branch++;
    add_check(job, name);
    add_check(job, counter);
    key_branch_counter(&key);
    add_set(job, &key, bytes, counter_encode(&next, key_slice(&key), bytes));

    struct name_record name_rec = {branch};
    key_name(&key, job->spec.name);
    add_set(job, &key, bytes, name_encode(&name_rec, key_slice(&key), bytes));

    struct header_record header = {.size = job->spec.size,
                                   .block_size = job->spec.block_size,
                                   .codec = (uint8_t)job->spec.codec,
                                   .codec_level = (uint8_t)job->spec.codec_level,
                                   .epoch = 1,
                                   .created_ns = env_realtime_ns(job->op->env)};
    memcpy(header.description, job->spec.description, sizeof header.description);
    key_header(&key, branch);
    add_set(job, &key, bytes, header_encode(&header, key_slice(&key), bytes));

    struct state_record state = {0};
    key_state(&key, branch);
    add_set(job, &key, bytes, state_encode(&state, key_slice(&key), bytes));

    struct owner_record owner = {0};
    key_owner(&key, branch);
    add_set(job, &key, bytes, owner_encode(&owner, key_slice(&key), bytes));
    start_commit(job, false, create_written);
}

static void create_look(struct job *job)
{
    struct key key;
    job_reset(job);
    key_name(&key, job->spec.name);
    add_get(job, &key);
    key_branch_counter(&key);
    add_get(job, &key);
    start_read(job, create_seen);
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

/* --- list and find ------------------------------------------------------------------- */

static struct catalog_entry *add_entry(struct job *job, const char *name, uint64_t branch)
{
    struct catalog_op *op = job->op;
    mem_grow(&op->entries, &job->cap_entries, op->n_entries + 1, sizeof *op->entries);
    struct catalog_entry *entry = &op->entries[op->n_entries++];
    memset(entry, 0, sizeof *entry);
    memcpy(entry->name, name, strlen(name) + 1);
    entry->branch = branch;
    return entry;
}

/* What one entry needs beside its name, and the name again, so that all is of one moment. */
static void add_entry_gets(struct job *job, const struct catalog_entry *entry)
{
    struct key key;
    key_name(&key, entry->name);
    add_get(job, &key);
    key_header(&key, entry->branch);
    add_get(job, &key);
    key_state(&key, entry->branch);
    add_get(job, &key);
    key_owner(&key, entry->branch);
    add_get(job, &key);
}

/* Fills an entry from its four gets. ST_NOTFOUND: the name was moved or taken away since
 * it was read; ST_IO: a record is damaged or missing. */
static enum status fill_entry(struct catalog_entry *entry, const struct store_get *gets)
{
    struct name_record name;
    if (gets[0].st == ST_NOTFOUND)
        return ST_NOTFOUND;
    if (gets[0].st != ST_OK || !name_decode(gets[0].key, gets[0].head, &name))
        return ST_IO;
    if (name.branch != entry->branch)
        return ST_NOTFOUND;
    if (gets[1].st != ST_OK || !header_decode(gets[1].key, gets[1].head, &entry->header))
        return ST_IO;
    if (gets[2].st != ST_OK || !state_decode(gets[2].key, gets[2].head, &entry->state))
        return ST_IO;
    if (gets[3].st == ST_NOTFOUND)
        return ST_OK;
    if (gets[3].st != ST_OK || !owner_decode(gets[3].key, gets[3].head, &entry->owner))
        return ST_IO;
    return ST_OK;
}

static void list_go_on(struct job *job);

static void list_loaded(struct job *job, enum status st)
{
    struct catalog_op *op = job->op;
    if (st != ST_OK) {
        job_store_failed(job, st, "list the volumes");
        return;
    }
    /* One damaged volume does not hide the rest. */
    size_t kept = job->loaded;
    for (size_t i = 0; i * 4 < job->n_gets; i++) {
        struct catalog_entry *entry = &op->entries[job->loaded + i];
        enum status one = fill_entry(entry, job->gets + i * 4);
        if (one == ST_IO)
            log_error("volume \"%s\" is left out: one of its records is damaged or missing",
                      entry->name);
        if (one == ST_OK)
            op->entries[kept++] = *entry;
    }
    size_t rest = job->loaded + job->n_gets / 4;
    memmove(&op->entries[kept], &op->entries[rest], (op->n_entries - rest) * sizeof *op->entries);
    op->n_entries -= rest - kept;
    job->loaded = kept;
    list_go_on(job);
}

static void list_page(struct job *job, enum status st)
{
    const struct store_range *range = job->ranges;
    if (st != ST_OK) {
        job_store_failed(job, st, "list the volumes");
        return;
    }
    for (uint32_t i = 0; i < range->n_pairs; i++) {
        char name[NAME_BYTES_MAX + 1];
        struct name_record rec;
        const struct store_pair *pair = &range->pairs[i];
        if (!key_parse_name(pair->key, name))
            log_error("a key among the volume names is not one; it is left out");
        else if (!name_decode(pair->key, pair->head, &rec))
            log_error("volume \"%s\" is left out: its name record is damaged", name);
        else
            add_entry(job, name, rec.branch);
    }
    job->pages_left = range->more && range->n_pairs > 0;
    if (job->pages_left) {
        /* The first key behind the last one seen. */
        struct slice last = range->pairs[range->n_pairs - 1].key;
        CHECK(last.len < sizeof job->page_from.bytes);
        memcpy(job->page_from.bytes, last.data, last.len);
        job->page_from.bytes[last.len] = 0;
        job->page_from.len = last.len + 1;
    }
    list_go_on(job);
}

/* Loads what is known by name only, then the next page of names. */
static void list_go_on(struct job *job)
{
    struct catalog_op *op = job->op;
    job_reset(job);
    if (job->loaded < op->n_entries) {
        size_t end = min_u64(op->n_entries, job->loaded + LOADS_PER_READ);
        for (size_t i = job->loaded; i < end; i++)
            add_entry_gets(job, &op->entries[i]);
        start_read_in_parts(job, list_loaded);
    } else if (job->pages_left) {
        struct key end;
        key_prefix(&end, 'n');
        key_prefix_end(&end);
        add_range(job, key_slice(&job->page_from), &end, NAMES_PER_PAGE);
        start_read(job, list_page);
    } else {
        job_finish(job, ST_OK);
    }
}

void catalog_list(struct catalog_op *op, struct store *store, struct env *env)
{
    struct job *job = job_new(op, store, env);
    key_prefix(&job->page_from, 'n');
    job->pages_left = true;
    list_go_on(job);
}

/* How many letters must be changed, added, dropped or swapped with their neighbour to get
 * from a to b; anything above SUGGESTION_DISTANCE_MAX is that plus 1. */
static int name_distance(const char *a, const char *b)
{
    enum { FAR = SUGGESTION_DISTANCE_MAX + 1 };
    int len_a = (int)strlen(a), len_b = (int)strlen(b);
    if (abs(len_a - len_b) >= FAR)
        return FAR;
    int rows[3][NAME_BYTES_MAX + 1];
    int *before = rows[0], *above = rows[1], *now = rows[2];
    for (int j = 0; j <= len_b; j++) {
        before[j] = FAR;
        above[j] = j < FAR ? j : FAR;
    }
    for (int i = 1; i <= len_a; i++) {
        for (int j = 0; j <= len_b; j++)
            now[j] = FAR;
        if (i < FAR)
            now[0] = i;
        int first = i > FAR ? i - FAR : 1, last = i + FAR < len_b ? i + FAR : len_b;
        for (int j = first; j <= last; j++) {
            int best = above[j - 1] + (a[i - 1] != b[j - 1]);
            if (above[j] + 1 < best)
                best = above[j] + 1;
            if (now[j - 1] + 1 < best)
                best = now[j - 1] + 1;
            if (i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] &&
                before[j - 2] + 1 < best)
                best = before[j - 2] + 1;
            now[j] = best < FAR ? best : FAR;
        }
        int *spare = before;
        before = above;
        above = now;
        now = spare;
    }
    return above[len_b];
}

/* Smaller is nearer; above SUGGESTION_DISTANCE_MAX not worth naming. */
static int name_strangeness(const char *wanted, const char *name)
{
    if (strcasecmp(wanted, name) == 0)
        return 0;
    size_t len = strlen(wanted);
    if (len >= 3 && (strncasecmp(wanted, name, len) == 0 || strcasestr(name, wanted)))
        return 1;
    int distance = name_distance(wanted, name);
    /* Of a name of three letters nothing is left when three are changed. */
    return distance * 2 <= (int)len ? distance : SUGGESTION_DISTANCE_MAX + 1;
}

static void find_similar(struct job *job, enum status st)
{
    char best[SUGGESTIONS_MAX][NAME_BYTES_MAX + 1];
    int strange[SUGGESTIONS_MAX];
    size_t n = 0;
    uint32_t n_names = st == ST_OK ? job->ranges[0].n_pairs : 0;
    for (uint32_t i = 0; i < n_names; i++) {
        char name[NAME_BYTES_MAX + 1];
        if (!key_parse_name(job->ranges[0].pairs[i].key, name))
            continue;
        int s = name_strangeness(job->name, name);
        if (s > SUGGESTION_DISTANCE_MAX)
            continue;
        size_t at = n < SUGGESTIONS_MAX ? n++ : SUGGESTIONS_MAX;
        for (; at > 0 && strange[at - 1] > s; at--) {
            if (at < SUGGESTIONS_MAX) {
                strange[at] = strange[at - 1];
                memcpy(best[at], best[at - 1], sizeof best[at]);
            }
        }
        if (at < SUGGESTIONS_MAX) {
            strange[at] = s;
            memcpy(best[at], name, sizeof name);
        }
    }

    struct store_info info;
    char hint[SUGGESTIONS_MAX * (NAME_BYTES_MAX + 8) + 32] = "";
    if (n > 0) {
        size_t len = (size_t)snprintf(hint, sizeof hint, "; did you mean");
        for (size_t i = 0; i < n; i++)
            len += (size_t)snprintf(hint + len, sizeof hint - len, "%s \"%s\"", i ? " or" : "",
                                    best[i]);
        snprintf(hint + len, sizeof hint - len, "?");
    } else if (st == ST_OK && n_names == 0) {
        snprintf(hint, sizeof hint, "; it has no volumes");
    }
    fail(&job->op->err, ST_NOTFOUND, "there is no volume \"%.140s\" in %s%s", job->name,
         store_name(job, &info), hint);
    job_finish(job, ST_NOTFOUND);
}

static void find_failed(struct job *job)
{
    struct key key;
    job_reset(job);
    free(job->op->entries);
    job->op->entries = NULL;
    job->op->n_entries = job->cap_entries = 0;
    key_prefix(&key, 'n');
    add_prefix_range(job, &key, NAMES_PER_PAGE);
    start_read(job, find_similar);
}

static void find_look(struct job *job);

static void find_loaded(struct job *job, enum status st)
{
    char what[NAME_BYTES_MAX + 32];
    enum status one = st == ST_OK ? fill_entry(&job->op->entries[0], job->gets) : ST_OK;
    if (one == ST_IO) {
        snprintf(what, sizeof what, "a record of volume \"%s\"", job->name);
        job_damaged(job, what);
    } else if (one == ST_NOTFOUND && ++job->attempts < ATTEMPTS_MAX) {
        find_look(job);
    } else if (st != ST_OK || one != ST_OK) {
        snprintf(what, sizeof what, "read volume \"%s\"", job->name);
        job_store_failed(job, st != ST_OK ? st : ST_CONFLICT, what);
    } else {
        job_finish(job, ST_OK);
    }
}

static void find_named(struct job *job, enum status st)
{
    struct name_record rec;
    const struct store_get *get = &job->gets[0];
    char what[NAME_BYTES_MAX + 32];
    if (st != ST_OK) {
        snprintf(what, sizeof what, "look up volume \"%s\"", job->name);
        job_store_failed(job, st, what);
    } else if (get->st == ST_NOTFOUND) {
        find_failed(job);
    } else if (!name_decode(get->key, get->head, &rec)) {
        snprintf(what, sizeof what, "the name record of volume \"%s\"", job->name);
        job_damaged(job, what);
    } else {
        job_reset(job);
        job->op->n_entries = 0;
        add_entry_gets(job, add_entry(job, job->name, rec.branch));
        start_read_in_parts(job, find_loaded);
    }
}

static void find_look(struct job *job)
{
    struct key key;
    job_reset(job);
    key_name(&key, job->name);
    add_get(job, &key);
    start_read(job, find_named);
}

void catalog_find(struct catalog_op *op, struct store *store, struct env *env, const char *name)
{
    struct job *job = job_new(op, store, env);
    /* A name too long to be one is cut in the message only. */
    snprintf(job->name, sizeof job->name, "%s", name);
    if (name_valid(name))
        find_look(job);
    else
        find_failed(job);
}

/* --- rename -------------------------------------------------------------------------- */

static void rename_look(struct job *job);

static void rename_written(struct job *job, enum status st)
{
    if (may_try_again(job, st)) {
        rename_look(job);
    } else if (st != ST_OK) {
        char what[NAME_BYTES_MAX + 16];
        snprintf(what, sizeof what, "rename \"%s\"", job->name);
        job_store_failed(job, st, what);
    } else {
        job_finish(job, ST_OK);
    }
}

static void rename_seen(struct job *job, enum status st)
{
    const struct store_get *from = &job->gets[0], *to = &job->gets[1];
    struct name_record rec;
    char what[NAME_BYTES_MAX + 32];
    if (st != ST_OK) {
        snprintf(what, sizeof what, "look up volume \"%s\"", job->name);
        job_store_failed(job, st, what);
        return;
    }
    if (from->st == ST_NOTFOUND) {
        find_failed(job);
        return;
    }
    if (to->st == ST_OK) {
        struct store_info info;
        fail(&job->op->err, ST_EXISTS, "there is a volume \"%s\" in %s already", job->to,
             store_name(job, &info));
        job_finish(job, ST_EXISTS);
        return;
    }
    if (!name_decode(from->key, from->head, &rec)) {
        snprintf(what, sizeof what, "the name record of volume \"%s\"", job->name);
        job_damaged(job, what);
        return;
    }
    struct key key;
    uint8_t bytes[RECORD_BYTES_MAX];
    add_check(job, from);
    add_check(job, to);
    key_name(&key, job->name);
    add_clear(job, &key);
    key_name(&key, job->to);
    add_set(job, &key, bytes, name_encode(&rec, key_slice(&key), bytes));
    start_commit(job, true, rename_written);
}

static void rename_look(struct job *job)
{
    struct key key;
    job_reset(job);
    key_name(&key, job->name);
    add_get(job, &key);
    key_name(&key, job->to);
    add_get(job, &key);
    start_read(job, rename_seen);
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
        find_failed(job);
    else
        rename_look(job);
}

/* --- remove -------------------------------------------------------------------------- */

static bool same_owner(const struct owner_record *a, const struct owner_record *b)
{
    return a->token == b->token && memcmp(a->session, b->session, SESSION_ID_BYTES) == 0;
}

static void remove_look(struct job *job);

static void remove_written(struct job *job, enum status st)
{
    if (may_try_again(job, st)) {
        remove_look(job);
    } else if (st != ST_OK) {
        char what[NAME_BYTES_MAX + 16];
        snprintf(what, sizeof what, "remove \"%s\"", job->entry.name);
        job_store_failed(job, st, what);
    } else {
        job_finish(job, ST_OK);
    }
}

static void remove_seen(struct job *job, enum status st)
{
    const struct catalog_entry *entry = &job->entry;
    const struct store_get *name = &job->gets[0], *owner = &job->gets[1];
    struct name_record name_rec = {0};
    struct owner_record owner_rec = {0};
    char what[NAME_BYTES_MAX + 48];
    if (st != ST_OK) {
        snprintf(what, sizeof what, "look up volume \"%s\"", entry->name);
        job_store_failed(job, st, what);
        return;
    }
    if ((name->st == ST_OK && !name_decode(name->key, name->head, &name_rec)) ||
        (owner->st == ST_OK && !owner_decode(owner->key, owner->head, &owner_rec))) {
        snprintf(what, sizeof what, "a record of volume \"%s\"", entry->name);
        job_damaged(job, what);
        return;
    }
    if (name->st == ST_NOTFOUND || name_rec.branch != entry->branch) {
        fail(&job->op->err, ST_NOTFOUND,
             "volume \"%s\" was renamed or removed by somebody else just now", entry->name);
        job_finish(job, ST_NOTFOUND);
        return;
    }
    if (!same_owner(&owner_rec, &entry->owner)) {
        fail(&job->op->err, ST_BUSY, "volume \"%s\" was taken into use by %s just now", entry->name,
             owner_rec.host[0] ? owner_rec.host : "a server");
        job_finish(job, ST_BUSY);
        return;
    }

    add_check(job, name);
    add_check(job, owner);
    static void (*const records[])(struct key *, uint64_t) = {key_header, key_owner, key_state,
                                                              key_mailbox, key_answer};
    struct key key;
    uint8_t bytes[RECORD_BYTES_MAX];
    key_name(&key, entry->name);
    add_clear(job, &key);
    for (size_t i = 0; i < sizeof records / sizeof *records; i++) {
        records[i](&key, entry->branch);
        add_clear(job, &key);
    }
    struct removed_record removed = {.removed_ns = env_realtime_ns(job->op->env)};
    memcpy(removed.name, entry->name, sizeof removed.name);
    key_removed(&key, entry->branch);
    add_set(job, &key, bytes, removed_encode(&removed, key_slice(&key), bytes));
    start_commit(job, true, remove_written);
}

static void remove_look(struct job *job)
{
    struct key key;
    job_reset(job);
    key_name(&key, job->entry.name);
    add_get(job, &key);
    key_owner(&key, job->entry.branch);
    add_get(job, &key);
    start_read(job, remove_seen);
}

void catalog_remove(struct catalog_op *op, struct store *store, struct env *env,
                    const struct catalog_entry *entry, bool with_snapshots)
{
    struct job *job = job_new(op, store, env);
    job->entry = *entry;
    job->with_snapshots = with_snapshots;
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
        add_clear(job, &key);
    } else {
        *job->more = true;
    }
    start_commit(job, false, clear_written);
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
            add_mutation(job, STORE_CLEAR, range->pairs[i].key, (struct slice){NULL, 0});
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
    static const char tags[] = "bitoaqrh";
    bool blind = job->op->store->limits.clears_ranges;
    for (size_t i = 0; i < sizeof tags - 1; i++) {
        struct key key;
        key_prefix_branch(&key, tags[i], job->branch);
        if (blind)
            add_clear_prefix(job, &key);
        else
            add_prefix_range(job, &key, CLEAR_BATCH_KEYS);
    }
    if (blind)
        clear_commit(job, true);
    else
        start_read(job, clear_found);
}

void catalog_clear_removed(struct catalog_op *op, struct store *store, struct env *env, bool *more)
{
    struct job *job = job_new(op, store, env);
    struct key key;
    job->more = more;
    job->background = true;
    *more = false;
    key_prefix(&key, 'g');
    add_prefix_range(job, &key, 2);
    start_read(job, clear_chosen);
}

/* --- the mailbox --------------------------------------------------------------------- */

static void ask_look(struct job *job);

static void ask_wait(struct job *job)
{
    struct ask *ask = job->ask;
    job_reset(job);
    /* What woke us meanwhile may be newer than what was just read. */
    for (size_t i = 0; i < ASK_WATCHES; i++) {
        if (!ask->watches[i].armed) {
            ask_look(job);
            return;
        }
    }
    uint64_t now = env_now_ns(job->op->env);
    /* (Past the deadline only where the silence of its session is waited for.) */
    uint64_t left_ms = ask->deadline_ns > now ? (ask->deadline_ns - now) / 1000000u + 1
                       : ask->fence           ? ASK_TICK_MS
                                              : 1;
    ask->idle = true;
    env_timer_start(job->op->env, &ask->timer, min_u64(left_ms, ASK_TICK_MS));
}

static void ask_go_on(struct ask *ask)
{
    if (!ask->idle)
        return;
    ask->idle = false;
    env_timer_stop(ask->job->op->env, &ask->timer);
    ask_look(ask->job);
}

static void ask_tick(struct env_timer *timer)
{
    ask_go_on(container_of(timer, struct ask, timer));
}

static void ask_woken(struct store_watch *watch)
{
    struct ask_watch *w = container_of(watch, struct ask_watch, watch);
    w->armed = false;
    ask_go_on(w->ask);
}

static void ask_finish(struct job *job, enum status st)
{
    const struct catalog_entry *entry = &job->ask->entry;
    const char *host = entry->owner.host[0] ? entry->owner.host : "an unknown host";
    struct err *e = &job->op->err;
    if (st == ST_NOTFOUND)
        fail(e, st, "nobody has volume \"%s\" in use", entry->name);
    else if (st == ST_UNAVAIL)
        fail(e, st,
             "the server that has volume \"%s\" in use (pid %u on %s) did not answer within %u s",
             entry->name, entry->owner.pid, host, (job->ask->wait_ms + 999) / 1000);
    job_finish(job, st);
}

static void ask_cleared(struct job *job, enum status st)
{
    /* An answer left behind is overwritten by the next one who asks. */
    (void)st;
    job_finish(job, job->ask->outcome);
}

/* The answer came: takes question and answer out. */
static void ask_answered(struct job *job, const struct answer_record *answer)
{
    struct ask *ask = job->ask;
    ask->outcome = (enum status)answer->status;
    /* These two would tell the caller that nobody owns the volume, or nobody answered. */
    if (answer->status > ST_FORMAT || answer->status == ST_NOTFOUND || answer->status == ST_UNAVAIL)
        ask->outcome = ST_BUSY;
    fail(&job->op->err, ask->outcome, "%s", answer->text);
    add_check_value(job, &ask->mailbox, ask->mine, ask->mine_len);
    add_clear(job, &ask->mailbox);
    add_clear(job, &ask->answer);
    start_commit(job, false, ask_cleared);
}

static void ask_withdrawn(struct job *job, enum status st)
{
    if (st == ST_OK)
        ask_finish(job, job->ask->outcome);
    else if (may_try_again(job, st))
        ask_look(job); /* answered at the last moment */
    else
        job_store_failed(job, st, "withdraw a request to a volume's owner");
}

/* Takes the question back, provided that it still has no answer. `answer` is what was
 * read under the answer's key. */
static void ask_withdraw(struct job *job, enum status outcome, const struct store_get *answer)
{
    struct ask *ask = job->ask;
    ask->outcome = outcome;
    add_check(job, answer);
    add_check_value(job, &ask->mailbox, ask->mine, ask->mine_len);
    add_clear(job, &ask->mailbox);
    start_commit(job, false, ask_withdrawn);
}

static void ask_fenced(struct job *job, enum status st)
{
    if (st == ST_OK) {
        log_warning("process %u on %s gave no sign of life and is fenced: all its volumes are free",
                    job->ask->entry.owner.pid, job->ask->entry.owner.host);
        ask_finish(job, ST_NOTFOUND);
    } else if (may_try_again(job, st)) {
        ask_look(job); /* it lives after all, or somebody else was faster */
    } else {
        job_store_failed(job, st, "fence a server that gives no sign of life");
    }
}

/* The owner stood still for long enough, or is known to be dead: nothing of it counts from here
 * on. Takes our question back where it lies there. */
static void ask_fence(struct job *job, bool still_there)
{
    struct ask *ask = job->ask;
    uint8_t bytes[RECORD_BYTES_MAX];
    add_check_value(job, &ask->sight->key, ask->sight->bytes, ask->sight->len);
    add_set(job, &ask->sight->key, bytes, session_fenced_bytes(ask->sight, bytes));
    if (still_there) {
        add_check_value(job, &ask->mailbox, ask->mine, ask->mine_len);
        add_clear(job, &ask->mailbox);
    }
    start_commit(job, true, ask_fenced);
}

static void ask_written(struct job *job, enum status st)
{
    if (st != ST_OK && st != ST_CONFLICT) {
        job_store_failed(job, st, "ask a volume's owner");
        return;
    }
    job->ask->written = st == ST_OK;
    if (st == ST_OK || may_try_again(job, st))
        ask_wait(job);
    else
        job_store_failed(job, st, "ask a volume's owner");
}

/* Whether the mailbox can be written over: a request that has been lying there unchanged
 * belongs to a command that died. */
static bool ask_other_is_stale(struct ask *ask, const struct store_get *mailbox)
{
    uint64_t now = env_now_ns(ask->job->op->env);
    bool same = ask->other_len == mailbox->head.len &&
                memcmp(ask->other, mailbox->head.data, ask->other_len) == 0;
    if (same)
        return now - ask->other_since_ns >= MAIL_STALE_MS * 1000000ull;
    /* One too long to be a request is nobody's. */
    if (mailbox->head.len > sizeof ask->other)
        return true;
    memcpy(ask->other, mailbox->head.data, mailbox->head.len);
    ask->other_len = mailbox->head.len;
    ask->other_since_ns = now;
    return false;
}

static void ask_write(struct job *job, const struct store_get *owner,
                      const struct store_get *mailbox)
{
    struct ask *ask = job->ask;
    add_check(job, owner);
    add_check(job, mailbox);
    add_set(job, &ask->mailbox, ask->mine, ask->mine_len);
    add_clear(job, &ask->answer);
    start_commit(job, true, ask_written);
}

static void ask_seen(struct job *job, enum status st)
{
    struct ask *ask = job->ask;
    const struct store_get *mailbox = &job->gets[0], *answer = &job->gets[1],
                           *owner = &job->gets[2];
    struct answer_record answer_rec;
    struct owner_record owner_rec = {0};
    if (st != ST_OK) {
        job_store_failed(job, st, "ask a volume's owner");
        return;
    }
    if (owner->st == ST_OK && !owner_decode(owner->key, owner->head, &owner_rec)) {
        job_damaged(job, "a record of a volume's owner");
        return;
    }
    if (ask->written && answer->st == ST_OK &&
        answer_decode(answer->key, answer->head, &answer_rec) && answer_rec.id == ask->mail.id) {
        ask_answered(job, &answer_rec);
        return;
    }

    struct store *store = job->op->store;
    bool timed = store->limits.needs_heartbeat, silent = false;
    bool late = env_now_ns(job->op->env) >= ask->deadline_ns;
    bool gone = !same_owner(&owner_rec, &ask->entry.owner) ||
                memcmp(owner_rec.session, nobody, sizeof nobody) == 0;
    if (!gone && timed) {
        enum session_verdict verdict =
            session_judge(ask->sight, &job->gets[3], job->op->env, ask->here);
        gone = verdict == SESSION_ENDED;
        silent = verdict == SESSION_GONE || verdict == SESSION_SILENT;
        /* Whether it lives is not known yet. */
        if (ask->fence && !ask->sight->n_changes)
            late = false;
    } else if (!gone) {
        gone = store_session_probe(store, owner_rec.session) == STORE_SESSION_DEAD;
    }
    bool still_there = ask->written && mailbox->st == ST_OK &&
                       mailbox->head.len == ask->mine_len &&
                       memcmp(mailbox->head.data, ask->mine, ask->mine_len) == 0;
    if (!gone && silent && ask->fence) {
        ask_fence(job, still_there);
        return;
    }
    if (!ask->written) {
        if (gone)
            ask_finish(job, ST_NOTFOUND);
        else if (mailbox->st == ST_NOTFOUND || ask_other_is_stale(ask, mailbox))
            ask_write(job, owner, mailbox);
        else if (late && timed) {
            ask_finish(job, ST_UNAVAIL); /* whoever asked first waits for the same */
        } else if (late) {
            fail(
                &job->op->err, ST_BUSY,
                "another command waits for an answer from the server that has volume \"%s\" in use",
                ask->entry.name);
            job_finish(job, ST_BUSY);
        } else
            ask_wait(job);
        return;
    }

    if (still_there && (gone || late))
        ask_withdraw(job, gone ? ST_NOTFOUND : ST_UNAVAIL, answer);
    else if (gone || late || !still_there)
        ask_finish(job, gone ? ST_NOTFOUND : ST_UNAVAIL);
    else
        ask_wait(job);
}

static void ask_look(struct job *job)
{
    struct ask *ask = job->ask;
    job_reset(job);
    /* Armed before reading: what comes after the read wakes us. */
    const struct key *const keys[ASK_WATCHES] = {&ask->answer, &ask->owner};
    for (size_t i = 0; i < ASK_WATCHES; i++) {
        struct ask_watch *w = &ask->watches[i];
        if (w->armed)
            continue;
        w->ask = ask;
        w->armed = w->used = true;
        w->watch = (struct store_watch){.key = key_slice(keys[i]), .fired = ask_woken};
        store_watch(job->op->store, job->op->env, &w->watch);
    }
    add_get(job, &ask->mailbox);
    add_get(job, &ask->answer);
    add_get(job, &ask->owner);
    if (job->op->store->limits.needs_heartbeat)
        add_get(job, &ask->sight->key);
    start_read(job, ask_seen);
}

void catalog_ask_owner(struct catalog_op *op, struct store *store, struct env *env,
                       const struct catalog_entry *entry, const struct mail_record *mail,
                       uint32_t wait_ms, struct session_sight *sight, bool fence)
{
    struct job *job = job_new(op, store, env);
    struct ask *ask = job->ask = mem_zalloc(sizeof *ask);
    ask->job = job;
    ask->entry = *entry;
    ask->mail = *mail;
    ask->wait_ms = wait_ms;
    ask->fence = fence;
    ask->sight = sight ? sight : &ask->own_sight;
    session_sight_begin(ask->sight, entry->owner.session);
    session_host_name(ask->here);
    ask->deadline_ns = env_now_ns(env) + wait_ms * 1000000ull;
    ask->timer.fire = ask_tick;
    env_random(env, &ask->mail.id, sizeof ask->mail.id);
    key_mailbox(&ask->mailbox, entry->branch);
    key_answer(&ask->answer, entry->branch);
    key_owner(&ask->owner, entry->branch);
    ask->mine_len = mail_encode(&ask->mail, key_slice(&ask->mailbox), ask->mine);
    ask_look(job);
}
