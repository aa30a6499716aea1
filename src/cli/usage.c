/*
 * fdb-nbd usage: what volumes and their snapshots take, and what removing a snapshot would give
 * back.
 *
 * Counted from the index, without reading data (usage.h). What blocks take in the store,
 * compressed, the store says for all blocks of a volume, or of some epochs: what a snapshot's take
 * is their part of that.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/mem.h"
#include "cli/describe.h"
#include "cli/progress.h"
#include "server/reactor.h"
#include "volume/usage.h"

/* A line of the table: a snapshot, or a volume behind its snapshots. */
struct line {
    const struct catalog_entry *volume;
    const struct catalog_snapshot *snapshot; /* NULL: the volume itself */
    struct usage_state state;
    uint64_t stored; /* bytes; of a snapshot: what removing it frees, about */
    bool measured;   /* `stored`: the store counted; else it estimates */
    bool uncertain;
};

struct measuring {
    struct run *run;
    struct catalog_op volumes; /* kept */
    struct catalog_snapshot *snapshots;
    size_t n_snapshots;
    struct line *lines;
    size_t n_lines, cap_lines;
    struct progress progress;
};

struct counting {
    struct usage usage;
    struct progress *progress;
    uint64_t before; /* of the volumes before this one */
};

/* Progress in what the rows cover. */
static bool go_on(struct usage *u)
{
    const struct counting *c = container_of(u, struct counting, usage);
    c->progress->done = c->before + u->walk.n_rows * INDEX_FANOUT * u->entry->header.block_size;
    return !interrupted();
}

/* What blocks of the epochs above `after`, up to `upto`, take. */
static enum status stored(struct run *run, uint64_t branch, uint64_t after, uint64_t upto,
                          uint64_t *keys, uint64_t *bytes, struct err *e)
{
    struct key begin, end;
    key_prefix_blocks(&begin, branch, after + 1);
    if (upto == UINT64_MAX) {
        key_prefix_branch(&end, 'b', branch);
        key_prefix_end(&end);
    } else {
        key_prefix_blocks(&end, branch, upto + 1);
    }
    return store_usage(run->store, key_slice(&begin), key_slice(&end), keys, bytes, e);
}

static struct line *line_add(struct measuring *m, const struct catalog_entry *volume,
                             const struct catalog_snapshot *snapshot, const struct usage_state *s)
{
    mem_grow(&m->lines, &m->cap_lines, m->n_lines + 1, sizeof *m->lines);
    struct line *line = &m->lines[m->n_lines++];
    *line = (struct line){.volume = volume, .snapshot = snapshot, .state = *s};
    return line;
}

static uint64_t part_of(uint64_t bytes, uint64_t part, uint64_t of)
{
    return of ? (uint64_t)((double)bytes * (double)part / (double)of) : 0;
}

static enum status lines_add(struct measuring *m, const struct usage *u, struct err *e)
{
    const struct catalog_entry *entry = u->entry;
    uint64_t keys, bytes, born = 0;
    enum status st = stored(m->run, entry->branch, 0, UINT64_MAX, &keys, &bytes, e);
    bool measured = keys > 0 || bytes == 0;
    for (size_t i = 0; i <= u->n_snapshots; i++)
        born += u->states[i].born;
    for (size_t i = 0; i < u->n_snapshots && st == ST_OK; i++) {
        const struct usage_state *s = &u->states[i];
        struct line *line = line_add(m, entry, &u->snapshots[i], s);
        uint64_t n = 0, of = 0, after = i ? u->snapshots[i - 1].epoch : 0;
        line->uncertain = u->uncertain;
        /* An estimate of some epochs would be worth little. */
        if (measured && s->exclusive)
            st = stored(m->run, entry->branch, after, u->snapshots[i].epoch, &n, &of, e);
        line->stored = measured ? part_of(of, s->exclusive, n) : part_of(bytes, s->exclusive, born);
    }
    if (st == ST_OK) {
        struct line *line = line_add(m, entry, NULL, &u->states[u->n_snapshots]);
        line->stored = bytes;
        line->measured = measured;
        line->uncertain = u->uncertain;
    }
    return st;
}

static enum status measure(struct measuring *m, const struct catalog_entry *entry, struct err *e)
{
    struct counting c = {.usage = {.store = m->run->store,
                                   .env = m->run->env,
                                   .run_once = reactor_run_once,
                                   .entry = entry,
                                   .go_on = go_on},
                         .progress = &m->progress,
                         .before = m->progress.done};
    struct usage *u = &c.usage;
    /* The snapshots of one volume lie together, oldest first. */
    for (size_t i = 0; i < m->n_snapshots; i++) {
        if (m->snapshots[i].branch != entry->branch)
            continue;
        if (u->n_snapshots++ == 0)
            u->snapshots = &m->snapshots[i];
    }
    enum status st = usage_run(u, e);
    if (st == ST_OK)
        st = lines_add(m, u, e);
    usage_free(u);
    return st;
}

/* ---- showing ---- */

static void cell(void *arg, size_t row, size_t column, char out[DESCRIBE_CELL_BYTES])
{
    const struct measuring *m = arg;
    const struct line *line = &m->lines[row];
    uint64_t block_size = line->volume->header.block_size;
    char name[FULL_NAME_BYTES], size[24];
    switch (column) {
    case 0:
        snprintf(out, DESCRIBE_CELL_BYTES, "%s",
                 line->snapshot
                     ? describe_snapshot(line->volume->name, line->snapshot->rec.name, name)
                     : line->volume->name);
        break;
    case 1:
        cli_size(line->snapshot ? line->snapshot->rec.size : line->volume->header.size, size);
        snprintf(out, DESCRIBE_CELL_BYTES, "%s", size);
        break;
    case 2:
        snprintf(out, DESCRIBE_CELL_BYTES, "%s", cli_size(line->state.named * block_size, size));
        break;
    case 3:
        snprintf(out, DESCRIBE_CELL_BYTES, "%s",
                 cli_size(line->state.inherited * block_size, size));
        break;
    case 4:
        snprintf(out, DESCRIBE_CELL_BYTES, "%s",
                 cli_size(line->state.exclusive * block_size, size));
        break;
    case 5:
        if (line->snapshot)
            strcpy(out, "");
        else
            snprintf(out, DESCRIBE_CELL_BYTES, "%s%s", line->measured ? "" : "~",
                     cli_size(line->stored, size));
        break;
    default:
        if (line->snapshot)
            snprintf(out, DESCRIBE_CELL_BYTES, "~%s", cli_size(line->stored, size));
        else
            strcpy(out, "");
    }
}

static json_t *line_json(const struct line *line)
{
    json_int_t block_size = (json_int_t)line->volume->header.block_size;
    const struct usage_state *s = &line->state;
    return json_pack(
        "{s:s, s:I, s:I, s:I, s:I}", "name",
        line->snapshot ? line->snapshot->rec.name : line->volume->name, "size",
        (json_int_t)(line->snapshot ? line->snapshot->rec.size : line->volume->header.size),
        "used_bytes", (json_int_t)s->named * block_size, "inherited_bytes",
        (json_int_t)s->inherited * block_size, "exclusive_bytes",
        (json_int_t)s->exclusive * block_size);
}

static void print_json(const struct measuring *m)
{
    json_t *volumes = json_array(), *snapshots = json_array();
    for (size_t i = 0; i < m->n_lines; i++) {
        const struct line *line = &m->lines[i];
        json_t *json = line_json(line);
        if (line->snapshot) {
            json_object_set_new(json, "freed_bytes", json_integer((json_int_t)line->stored));
            json_array_append_new(snapshots, json);
            continue;
        }
        json_object_set_new(json, "stored_bytes", json_integer((json_int_t)line->stored));
        json_object_set_new(json, "stored_is",
                            json_string(line->measured ? "measured" : "estimated"));
        json_object_set_new(json, "complete", json_boolean(!line->uncertain));
        json_object_set_new(json, "snapshots", snapshots);
        json_array_append_new(volumes, json);
        snapshots = json_array();
    }
    json_decref(snapshots);
    describe_print(json_pack("{s:s, s:o}", "store", m->run->cli->store_uri, "volumes", volumes));
}

static void print(const struct measuring *m)
{
    static const char *const titles[] = {"NAME",      "SIZE",   "USED", "INHERITED",
                                         "EXCLUSIVE", "STORED", "FREED"};
    if (m->run->cli->json) {
        print_json(m);
        return;
    }
    describe_table(titles, sizeof titles / sizeof *titles, m->n_lines, cell, (void *)(uintptr_t)m);
    fflush(stdout);
    for (size_t i = 0; i < m->n_lines; i++)
        if (m->lines[i].uncertain && !m->lines[i].snapshot)
            fprintf(stderr,
                    "fdb-nbd: not all of the index of volume \"%s\" could be read: it may "
                    "have changed meanwhile, or verify tells more\n",
                    m->lines[i].volume->name);
}

static int usage(struct run *run, const char *name)
{
    struct measuring m = {.run = run};
    struct catalog_op snapshots = {0};
    struct err e = {0};
    int status = CLI_DONE;
    if (name) {
        catalog_find(run_op(run), run->store, run->env, name);
    } else {
        catalog_list(run_op(run), run->store, run->env);
    }
    enum status st = run_wait(run);
    if (st == ST_OK) {
        run_keep(run, &m.volumes);
        catalog_snapshots(run_op(run), run->store, run->env,
                          name ? m.volumes.entries[0].branch : 0);
        st = run_wait(run);
    }
    if (st != ST_OK) {
        status = cli_failed(&run->op.err);
    } else {
        run_keep(run, &snapshots);
        m.snapshots = snapshots.snapshots;
        m.n_snapshots = snapshots.n_snapshots;
        progress_begin(&m.progress, run->env, 0, "counting");
        for (size_t i = 0; i < m.volumes.n_entries && st == ST_OK; i++)
            st = measure(&m, &m.volumes.entries[i], &e);
        progress_end(&m.progress);
        if (st == ST_OK)
            print(&m);
        else if (st == ST_SHUTDOWN)
            status = interrupt_status();
        else
            status = cli_failed(&e);
    }
    free(m.lines);
    catalog_op_free(&m.volumes);
    catalog_op_free(&snapshots);
    return status;
}

static int run_usage(struct cli *cli, int argc, char **argv)
{
    int first = cli_parse(cli, argc, argv, NULL, NULL);
    if (first < 0)
        return cli->status;
    const char *name = first < argc ? argv[first] : NULL;
    if (name && strchr(name, '@'))
        return cli_usage_error(cli, "usage takes a volume, and tells of all its snapshots");
    struct run run;
    interrupt_catch();
    int status = run_begin(&run, cli, RUN_READ);
    if (status == CLI_DONE)
        status = usage(&run, name);
    run_end(&run);
    return status;
}

const struct cli_command usage_command = {
    .name = "usage",
    .args = "[NAME]",
    .summary = "show what volumes and their snapshots take",
    .details =
        "USED is what clients see as data; INHERITED, the part of it that is shared with what\n"
        "the volume is a clone of; EXCLUSIVE, what only that snapshot or the volume itself has.\n"
        "STORED is what all of the volume's own blocks take in the store, compressed; FREED,\n"
        "about what removing the snapshot would give back of that. ~ marks what is estimated.\n"
        "No data is read; what was written in the last second or two may not be counted yet.",
    .args_min = 0,
    .args_max = 1,
    .run = run_usage,
};
