/* The catalog: all volumes, one of them, and what was perhaps meant by a name that is none. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/log.h"
#include "volume/catalog_internal.h"

#define NAMES_PER_PAGE 1000u /* looked at for similar ones */
#define LOADS_PER_READ 250u  /* each is four gets */
#define SUGGESTIONS_MAX 3u
#define SUGGESTION_DISTANCE_MAX 3

struct catalog_entry *job_add_entry(struct job *job, const char *name, uint64_t branch)
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
    job_get(job, &key);
    key_header(&key, entry->branch);
    job_get(job, &key);
    key_state(&key, entry->branch);
    job_get(job, &key);
    key_owner(&key, entry->branch);
    job_get(job, &key);
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
            log_volume_error(entry->name,
                             "volume \"%s\" is left out: one of its records is damaged or missing",
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

static void list_page(struct job *job, const struct store_range *page)
{
    for (uint32_t i = 0; i < page->n_pairs; i++) {
        char name[NAME_BYTES_MAX + 1];
        struct name_record rec;
        const struct store_pair *pair = &page->pairs[i];
        if (!key_parse_name(pair->key, name))
            log_error("a key among the volume names is not one; it is left out");
        else if (!name_decode(pair->key, pair->head, &rec))
            log_volume_error(name, "volume \"%s\" is left out: its name record is damaged", name);
        else
            job_add_entry(job, name, rec.branch);
    }
}

/* Loads what is known by name only. */
static void list_go_on(struct job *job)
{
    struct catalog_op *op = job->op;
    job_reset(job);
    if (job->loaded == op->n_entries) {
        job_finish(job, ST_OK);
        return;
    }
    size_t end = min_u64(op->n_entries, job->loaded + LOADS_PER_READ);
    for (size_t i = job->loaded; i < end; i++)
        add_entry_gets(job, &op->entries[i]);
    job_read_in_parts(job, list_loaded);
}

void catalog_list(struct catalog_op *op, struct store *store, struct env *env)
{
    struct job *job = job_new(op, store, env);
    struct key key;
    key_prefix(&key, 'n');
    job_scan(job, &key, "list the volumes", list_page, list_go_on);
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

/* The nearest names so far. */
struct suggestions {
    const char *wanted;
    char best[SUGGESTIONS_MAX][NAME_BYTES_MAX + 1];
    int strange[SUGGESTIONS_MAX];
    size_t n;
};

#define HINT_BYTES (SUGGESTIONS_MAX * (2 * NAME_BYTES_MAX + 8) + 32)

static void suggest(struct suggestions *s, const char *name)
{
    int strange = name_strangeness(s->wanted, name);
    if (strange > SUGGESTION_DISTANCE_MAX)
        return;
    size_t at = s->n < SUGGESTIONS_MAX ? s->n++ : SUGGESTIONS_MAX;
    for (; at > 0 && s->strange[at - 1] > strange; at--) {
        if (at < SUGGESTIONS_MAX) {
            s->strange[at] = s->strange[at - 1];
            memcpy(s->best[at], s->best[at - 1], sizeof s->best[at]);
        }
    }
    if (at < SUGGESTIONS_MAX) {
        s->strange[at] = strange;
        snprintf(s->best[at], sizeof s->best[at], "%s", name);
    }
}

/* "; did you mean ...?", what was found being in front of each. Nothing where nothing is near. */
static void hint(const struct suggestions *s, const char *volume, char out[HINT_BYTES])
{
    out[0] = '\0';
    if (s->n == 0)
        return;
    size_t len = (size_t)snprintf(out, HINT_BYTES, "; did you mean");
    for (size_t i = 0; i < s->n; i++)
        len += (size_t)snprintf(out + len, HINT_BYTES - len, "%s \"%s%s%s\"", i ? " or" : "",
                                volume, *volume ? "@" : "", s->best[i]);
    snprintf(out + len, HINT_BYTES - len, "?");
}

static void find_similar(struct job *job, enum status st)
{
    struct suggestions near = {.wanted = job->name};
    uint32_t n_names = st == ST_OK ? job->ranges[0].n_pairs : 0;
    for (uint32_t i = 0; i < n_names; i++) {
        char name[NAME_BYTES_MAX + 1];
        if (key_parse_name(job->ranges[0].pairs[i].key, name))
            suggest(&near, name);
    }
    struct store_info info;
    char text[HINT_BYTES];
    hint(&near, "", text);
    if (st == ST_OK && n_names == 0)
        snprintf(text, sizeof text, "; it has no volumes");
    fail(&job->op->err, ST_NOTFOUND, "there is no volume \"%.140s\" in %s%s", job->name,
         job_store_name(job, &info), text);
    job_finish(job, ST_NOTFOUND);
}

void catalog_no_volume(struct job *job)
{
    struct key key;
    job_reset(job);
    free(job->op->entries);
    job->op->entries = NULL;
    job->op->n_entries = job->cap_entries = 0;
    key_prefix(&key, 'n');
    job_range_of(job, &key, NAMES_PER_PAGE);
    job_read(job, find_similar);
}

static void find_look(struct job *job);

static void find_snapshot(struct job *job)
{
    struct catalog_op *op = job->op;
    struct suggestions near = {.wanted = job->to};
    for (size_t i = 0; i < op->n_snapshots; i++) {
        if (strcmp(op->snapshots[i].rec.name, job->to) == 0) {
            op->entries[0].snapshot = op->snapshots[i];
            catalog_drop_snapshots(job);
            job_finish(job, ST_OK);
            return;
        }
        suggest(&near, op->snapshots[i].rec.name);
    }
    struct store_info info;
    char text[HINT_BYTES];
    hint(&near, job->name, text);
    if (op->n_snapshots == 0)
        snprintf(text, sizeof text, "; it has none");
    fail(&op->err, ST_NOTFOUND, "there is no snapshot \"%s\" of volume \"%s\" in %s%s", job->to,
         job->name, job_store_name(job, &info), text);
    job_finish(job, ST_NOTFOUND);
}

static void find_loaded(struct job *job, enum status st)
{
    enum status one = st == ST_OK ? fill_entry(&job->op->entries[0], job->gets) : ST_OK;
    if (one == ST_IO) {
        job_damaged(job, "a record of volume \"%s\"", job->name);
    } else if (one == ST_NOTFOUND && ++job->attempts < JOB_ATTEMPTS_MAX) {
        find_look(job);
    } else if (st != ST_OK || one != ST_OK) {
        job_store_failed(job, st != ST_OK ? st : ST_CONFLICT, "read volume \"%s\"", job->name);
    } else if (job->to[0]) {
        struct key key;
        key_prefix_branch(&key, 'v', job->op->entries[0].branch);
        job_scan(job, &key, "look up a snapshot", catalog_take_snapshots, find_snapshot);
    } else {
        job_finish(job, ST_OK);
    }
}

static void find_named(struct job *job, enum status st)
{
    struct name_record rec;
    const struct store_get *get = &job->gets[0];
    if (st != ST_OK) {
        job_store_failed(job, st, "look up volume \"%s\"", job->name);
    } else if (get->st == ST_NOTFOUND) {
        catalog_no_volume(job);
    } else if (!name_decode(get->key, get->head, &rec)) {
        job_damaged(job, "the name record of volume \"%s\"", job->name);
    } else {
        job_reset(job);
        job->op->n_entries = 0;
        add_entry_gets(job, job_add_entry(job, job->name, rec.branch));
        job_read_in_parts(job, find_loaded);
    }
}

static void find_look(struct job *job)
{
    struct key key;
    job_reset(job);
    key_name(&key, job->name);
    job_get(job, &key);
    job_read(job, find_named);
}

void catalog_find(struct catalog_op *op, struct store *store, struct env *env, const char *name)
{
    struct job *job = job_new(op, store, env);
    if (name_split(name, job->name, job->to)) {
        find_look(job);
        return;
    }
    /* A name too long to be one is cut in the message only. */
    snprintf(job->name, sizeof job->name, "%s", name);
    job->to[0] = '\0';
    catalog_no_volume(job);
}
