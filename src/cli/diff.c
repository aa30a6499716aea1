/*
 * fdb-nbd diff: which ranges of a volume have changed since a snapshot.
 *
 * It comes from the index alone: nothing is read of the data, and where a block was written again
 * with what it held before it counts as changed.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/mem.h"
#include "cli/progress.h"
#include "cli/view.h"

enum { SINCE = 1 };

static const struct cli_option options[] = {
    {SINCE, "since", "SNAP", "a snapshot of the volume, or OTHER@SNAP of one that it is a clone of"},
    {0, NULL, NULL, NULL},
};

struct diff {
    struct run *run;
    const char *since;
    struct catalog_entry to, from; /* each with its snapshot */
    bool temporary;                /* the snapshot of `to` was made for this */
    uint64_t n_extents, data_bytes, zero_bytes;
};

static enum status take(void *arg, int code, const char *value, struct err *e)
{
    (void)code;
    (void)e;
    *(const char **)arg = value;
    return ST_OK;
}

/* Whether `from` is a state that `to` came from. */
static int check_ancestor(struct diff *d)
{
    struct run *run = d->run;
    struct catalog_entry at = d->to;
    uint64_t upto = at.snapshot.epoch;
    for (unsigned i = 0; at.branch != d->from.branch && i <= ANCESTRY_MAX; i++) {
        if (!at.header.parent_branch)
            break;
        upto = at.header.parent_epoch;
        catalog_parent(run_op(run), run->store, run->env, &at);
        if (run_wait(run) != ST_OK)
            return cli_failed(&run->op.err);
        char name[NAME_BYTES_MAX + 1];
        memcpy(name, run->op.entries[0].name, sizeof name);
        int status = run_find(run, name, &at);
        if (status != CLI_DONE)
            return status;
    }
    if (at.branch == d->from.branch && d->from.snapshot.epoch <= upto)
        return CLI_DONE;
    cli_error("\"%s@%s\" is not a state that \"%s%s%s\" came from", d->from.name,
              d->from.snapshot.rec.name, d->to.name, d->temporary ? "" : "@",
              d->temporary ? "" : d->to.snapshot.rec.name);
    return CLI_FAILED;
}

static void print_extent(struct diff *d, const struct extent *t)
{
    bool zero = t->flags & VOL_EXTENT_ZERO;
    if (d->run->cli->json)
        printf("%s\n    {\"offset\": %llu, \"length\": %llu, \"zero\": %s}", d->n_extents ? "," : "",
               (unsigned long long)t->offset, (unsigned long long)t->length,
               zero ? "true" : "false");
    else
        printf("%14llu %14llu  %s\n", (unsigned long long)t->offset, (unsigned long long)t->length,
               zero ? "zero" : "data");
    d->n_extents++;
    *(zero ? &d->zero_bytes : &d->data_bytes) += t->length;
}

static enum status print_extents(struct diff *d, struct volume *to, struct volume *from)
{
    struct progress progress = {0};
    struct extents *walk = mem_alloc(sizeof *walk);
    struct extent t;
    enum status st;
    if (!isatty(STDOUT_FILENO))
        progress_begin(&progress, d->run->env, volume_size(to), "comparing %s", d->to.name);
    extents_begin(walk, d->run, to, from, VOL_EXTENT_ZERO);
    while ((st = extents_next(walk, &t)) == ST_OK && t.length > 0 && !interrupted()) {
        print_extent(d, &t);
        progress.done = t.offset + t.length;
    }
    progress_end(&progress);
    free(walk);
    return st;
}

static int print_diff(struct diff *d)
{
    struct run *run = d->run;
    struct run_owned reader;
    struct volume *to = NULL, *from = NULL;
    char data[24], zero[24];
    run->background = true;
    if (run_own(run, NULL, &reader) != ST_OK)
        return cli_failed(&run->op.err);
    enum status st = view_open(run, reader.shard, &d->from, &d->from.snapshot, &from);
    if (st == ST_OK)
        st = view_open(run, reader.shard, &d->to, &d->to.snapshot, &to);
    if (st == ST_OK) {
        if (run->cli->json)
            printf("{\n  \"volume\": \"%s\",\n  \"since\": \"%s@%s\",\n  \"extents\": [", d->to.name,
                   d->from.name, d->from.snapshot.rec.name);
        else
            printf("%14s %14s  TYPE\n", "OFFSET", "LENGTH");
        st = print_extents(d, to, from);
    }
    view_close(run, to);
    view_close(run, from);
    run_disown(run, &reader);
    run->background = false;
    if (st != ST_OK)
        return cli_failed(&run->op.err);
    if (interrupted())
        return interrupt_status();
    if (run->cli->json) {
        printf("%s],\n  \"data_bytes\": %llu,\n  \"zero_bytes\": %llu\n}\n", d->n_extents ? "\n  " : "",
               (unsigned long long)d->data_bytes, (unsigned long long)d->zero_bytes);
    } else {
        /* On stderr: a script that reads the table gets the table only. */
        fflush(stdout);
        fprintf(stderr, "%llu extent%s changed since %s@%s: %s of data, %s of zeros\n",
                (unsigned long long)d->n_extents, d->n_extents == 1 ? "" : "s", d->from.name,
                d->from.snapshot.rec.name, cli_size(d->data_bytes, data),
                cli_size(d->zero_bytes, zero));
    }
    return CLI_DONE;
}

static int diff(struct diff *d, const char *name)
{
    char since[2 * NAME_BYTES_MAX + 2];
    int status = run_find_either(d->run, name, &d->to);
    if (status != CLI_DONE)
        return status;
    if (strchr(d->since, '@'))
        snprintf(since, sizeof since, "%s", d->since);
    else
        snprintf(since, sizeof since, "%s@%s", d->to.name, d->since);
    status = run_find_snapshot(d->run, since, &d->from);
    if (status == CLI_DONE && !d->to.snapshot.epoch) {
        status = view_snapshot(d->run, &d->to);
        d->temporary = status == CLI_DONE;
    }
    if (status == CLI_DONE)
        status = check_ancestor(d);
    if (status == CLI_DONE)
        status = print_diff(d);
    if (d->temporary) {
        int dropped = view_drop_snapshot(d->run, &d->to);
        status = status == CLI_DONE ? dropped : status;
    }
    return status;
}

static int run_diff(struct cli *cli, int argc, char **argv)
{
    const char *since = NULL;
    int first = cli_parse(cli, argc, argv, take, &since);
    if (first < 0)
        return cli->status;
    if (!since)
        return cli_usage_error(cli, "since when? --since SNAP");
    struct run run;
    interrupt_catch();
    int status = run_begin(&run, cli, strchr(argv[first], '@') ? RUN_READ : RUN_WRITE);
    if (status == CLI_DONE) {
        struct diff *d = mem_zalloc(sizeof *d);
        d->run = &run;
        d->since = since;
        status = diff(d, argv[first]);
        free(d);
    }
    run_end(&run);
    return status;
}

const struct cli_command diff_command = {
    .name = "diff",
    .args = "VOLUME[@TO]",
    .summary = "list what changed in a volume since a snapshot",
    .details =
        "Each line is a range in bytes, and whether it holds data or zeros now. A volume that is in\n"
        "use is looked at as it was when the command was started.",
    .options = options,
    .args_min = 1,
    .args_max = 1,
    .run = run_diff,
};
