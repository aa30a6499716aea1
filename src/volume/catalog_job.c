/* Jobs of the catalog; see catalog_internal.h. */
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/check.h"
#include "volume/catalog_internal.h"

#define KEYS_PER_PAGE 1000u
#define WHAT_BYTES (3 * NAME_BYTES_MAX + 64) /* a few words about two volumes and a snapshot */

struct scrap {
    struct scrap *next;
    uint8_t bytes[];
};

struct job *job_new(struct catalog_op *op, struct store *store, struct env *env)
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
    op->snapshots = NULL;
    op->n_entries = op->n_snapshots = 0;
    return job;
}

static void job_release_read(struct job *job)
{
    if (job->read_held)
        store_read_release(&job->read);
    job->read_held = false;
}

void job_reset(struct job *job)
{
    job_release_read(job);
    job->n_gets = job->n_ranges = job->n_checks = job->n_mutations = 0;
    while (job->scraps) {
        struct scrap *s = job->scraps;
        job->scraps = s->next;
        free(s);
    }
}

void job_finish(struct job *job, enum status st)
{
    struct catalog_op *op = job->op;
    job_reset(job);
    if (job->ended)
        job->ended(job);
    free(job->wanted);
    free(job->gets);
    free(job->ranges);
    free(job->checks);
    free(job->mutations);
    free(job);
    op->state = NULL;
    op->st = st;
    if (st != ST_OK) {
        catalog_op_free(op);
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

void job_refuse(struct job *job)
{
    job->task.run = finish_posted;
    env_post(job->op->env, &job->task);
}

const char *job_store_name(struct job *job, struct store_info *info)
{
    if (store_info(job->op->store, info, NULL) != ST_OK)
        snprintf(info->uri, sizeof info->uri, "the store");
    return info->uri;
}

static void store_failed(struct job *job, enum status st, const char *format, va_list args)
{
    struct store_info info;
    char what[WHAT_BYTES];
    const char *why = st == ST_CONFLICT ? "others keep changing it" : status_text(st);
    vsnprintf(what, sizeof what, format, args);
    fail(&job->op->err, st == ST_CONFLICT ? ST_BUSY : st, "cannot %s in %s: %s", what,
         job_store_name(job, &info), why);
    job_finish(job, job->op->err.st);
}

void job_store_failed(struct job *job, enum status st, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    store_failed(job, st, format, args);
    va_end(args);
}

void job_end_change(struct job *job, enum status st, void (*look)(struct job *job),
                    const char *format, ...)
{
    va_list args;
    va_start(args, format);
    if (job_may_try_again(job, st))
        look(job);
    else if (st != ST_OK)
        store_failed(job, st, format, args);
    else
        job_finish(job, ST_OK);
    va_end(args);
}

void job_damaged(struct job *job, const char *format, ...)
{
    struct store_info info;
    char what[WHAT_BYTES];
    va_list args;
    va_start(args, format);
    vsnprintf(what, sizeof what, format, args);
    va_end(args);
    fail(&job->op->err, ST_IO, "%s in %s is damaged or missing", what, job_store_name(job, &info));
    job_finish(job, ST_IO);
}

struct slice job_keep(struct job *job, const void *data, size_t len)
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
    return job_keep(job, key->bytes, key->len);
}

void job_get(struct job *job, const struct key *key)
{
    mem_grow(&job->gets, &job->cap_gets, job->n_gets + 1, sizeof *job->gets);
    job->gets[job->n_gets++] = (struct store_get){.key = keep_key(job, key)};
}

void job_range(struct job *job, struct slice begin, const struct key *end, uint32_t limit)
{
    mem_grow(&job->ranges, &job->cap_ranges, job->n_ranges + 1, sizeof *job->ranges);
    job->ranges[job->n_ranges++] = (struct store_range){
        .begin = job_keep(job, begin.data, begin.len), .end = keep_key(job, end), .limit = limit};
}

void job_range_of(struct job *job, const struct key *prefix, uint32_t limit)
{
    struct key end = *prefix;
    key_prefix_end(&end);
    job_range(job, key_slice(prefix), &end, limit);
}

void job_check(struct job *job, const struct store_get *get)
{
    mem_grow(&job->checks, &job->cap_checks, job->n_checks + 1, sizeof *job->checks);
    struct store_check *check = &job->checks[job->n_checks++];
    *check = (struct store_check){.kind = STORE_CHECK_ABSENT,
                                  .key = job_keep(job, get->key.data, get->key.len)};
    if (get->st == ST_OK) {
        check->kind = STORE_CHECK_VALUE;
        check->value = job_keep(job, get->head.data, get->head.len);
    }
}

void job_check_value(struct job *job, const struct key *key, const void *value, size_t len)
{
    job_check(job, &(struct store_get){.key = key_slice(key), .st = ST_OK, .head = {value, len}});
}

void job_check_empty(struct job *job, const struct key *begin, const struct key *end)
{
    mem_grow(&job->checks, &job->cap_checks, job->n_checks + 1, sizeof *job->checks);
    job->checks[job->n_checks++] = (struct store_check){
        .kind = STORE_CHECK_EMPTY, .key = keep_key(job, begin), .value = keep_key(job, end)};
}

static void add_mutation(struct job *job, enum store_mutation_kind kind, struct slice key,
                         struct slice head)
{
    mem_grow(&job->mutations, &job->cap_mutations, job->n_mutations + 1, sizeof *job->mutations);
    job->mutations[job->n_mutations++] =
        (struct store_mutation){.kind = kind,
                                .key = job_keep(job, key.data, key.len),
                                .head = job_keep(job, head.data, head.len)};
}

void job_set(struct job *job, const struct key *key, const uint8_t *value, size_t len)
{
    add_mutation(job, STORE_SET, key_slice(key), (struct slice){value, len});
}

void job_clear(struct job *job, struct slice key)
{
    add_mutation(job, STORE_CLEAR, key, (struct slice){NULL, 0});
}

void job_clear_range(struct job *job, const struct key *begin, const struct key *end)
{
    add_mutation(job, STORE_CLEAR_RANGE, key_slice(begin), key_slice(end));
}

void job_clear_all(struct job *job, const struct key *prefix)
{
    struct key end = *prefix;
    key_prefix_end(&end);
    job_clear_range(job, prefix, &end);
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

void job_read(struct job *job, void (*next)(struct job *job, enum status st))
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

void job_read_in_parts(struct job *job, void (*next)(struct job *job, enum status st))
{
    job_read(job, next);
    job->read_in_parts = true;
}

static void scan_go_on(struct job *job);

static void scan_seen(struct job *job, enum status st)
{
    const struct store_range *range = &job->ranges[0];
    if (st != ST_OK) {
        job_store_failed(job, st, "%s", job->scan_what);
        return;
    }
    bool more = range->more && range->n_pairs > 0;
    if (more) {
        /* The first key behind the last one seen. */
        struct slice last = range->pairs[range->n_pairs - 1].key;
        CHECK(last.len < sizeof job->scan_from.bytes);
        memcpy(job->scan_from.bytes, last.data, last.len);
        job->scan_from.bytes[last.len] = 0;
        job->scan_from.len = last.len + 1;
    }
    job->scan_page(job, range);
    if (more) {
        scan_go_on(job);
    } else {
        job_reset(job);
        job->scan_over(job);
    }
}

static void scan_go_on(struct job *job)
{
    job_reset(job);
    job_range(job, key_slice(&job->scan_from), &job->scan_end, KEYS_PER_PAGE);
    job_read(job, scan_seen);
}

void job_scan(struct job *job, const struct key *prefix, const char *what,
              void (*page)(struct job *job, const struct store_range *page),
              void (*over)(struct job *job))
{
    job->scan_from = job->scan_end = *prefix;
    key_prefix_end(&job->scan_end);
    job->scan_page = page;
    job->scan_over = over;
    job->scan_what = what;
    scan_go_on(job);
}

static void commit_done(struct store_commit *commit, enum status st)
{
    struct job *job = container_of(commit, struct job, commit);
    job->next(job, st);
}

void job_commit(struct job *job, bool wake_watchers, void (*next)(struct job *job, enum status st))
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

bool job_may_try_again(struct job *job, enum status st)
{
    return st == ST_CONFLICT && ++job->attempts < JOB_ATTEMPTS_MAX;
}

void catalog_op_free(struct catalog_op *op)
{
    free(op->entries);
    free(op->snapshots);
    op->entries = NULL;
    op->snapshots = NULL;
    op->n_entries = op->n_snapshots = 0;
}
