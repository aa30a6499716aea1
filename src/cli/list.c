/* fdb-nbd list: all volumes of a store. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/mem.h"
#include "cli/describe.h"

/* All that is shown: volumes by name, and their snapshots by branch and epoch. */
struct listing {
    struct run *run;
    struct catalog_op volumes, snapshots;
    const struct catalog_entry **by_branch;
};

static int compare_branches(const void *a, const void *b)
{
    const struct catalog_entry *const *x = a, *const *y = b;
    return (*x)->branch < (*y)->branch ? -1 : (*x)->branch > (*y)->branch;
}

static void sort_by_branch(struct listing *l)
{
    size_t n = l->volumes.n_entries;
    l->by_branch = mem_alloc((n + 1) * sizeof *l->by_branch);
    for (size_t i = 0; i < n; i++)
        l->by_branch[i] = &l->volumes.entries[i];
    qsort(l->by_branch, n, sizeof *l->by_branch, compare_branches);
}

/* The first snapshot of that branch and epoch or a later one. */
static size_t place_of(const struct listing *l, uint64_t branch, uint64_t epoch)
{
    size_t low = 0, high = l->snapshots.n_snapshots;
    while (low < high) {
        size_t middle = low + (high - low) / 2;
        const struct catalog_snapshot *s = &l->snapshots.snapshots[middle];
        if (s->branch < branch || (s->branch == branch && s->epoch < epoch))
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

static size_t n_snapshots(const struct listing *l, const struct catalog_entry *e)
{
    return place_of(l, e->branch + 1, 0) - place_of(l, e->branch, 0);
}

static const char *parent_of(const struct listing *l, const struct catalog_entry *e,
                             char out[FULL_NAME_BYTES])
{
    const struct header_record *h = &e->header;
    const struct catalog_entry wanted = {.branch = h->parent_branch}, *key = &wanted;
    const struct catalog_entry **parent =
        bsearch(&key, l->by_branch, l->volumes.n_entries, sizeof *l->by_branch, compare_branches);
    size_t at = place_of(l, h->parent_branch, h->parent_epoch);
    if (!h->parent_branch || !parent || at == l->snapshots.n_snapshots ||
        l->snapshots.snapshots[at].branch != h->parent_branch ||
        l->snapshots.snapshots[at].epoch != h->parent_epoch)
        return "";
    return describe_snapshot((*parent)->name, l->snapshots.snapshots[at].rec.name, out);
}

static void cell(void *arg, size_t row, size_t column, char out[DESCRIBE_CELL_BYTES])
{
    const struct listing *l = arg;
    const struct catalog_entry *e = &l->volumes.entries[row];
    const struct header_record *h = &e->header;
    char text[24], parent[FULL_NAME_BYTES], owner[HOST_BYTES_MAX + 16];
    switch (column) {
    case 0:
        snprintf(out, DESCRIBE_CELL_BYTES, "%s", e->name);
        break;
    case 1:
        snprintf(out, DESCRIBE_CELL_BYTES, "%s", cli_size(h->size, text));
        break;
    case 2:
        snprintf(out, DESCRIBE_CELL_BYTES, "%s",
                 cli_size(e->state.data_blocks * h->block_size, text));
        break;
    case 3:
        snprintf(out, DESCRIBE_CELL_BYTES, "%s", cli_size(h->block_size, text));
        break;
    case 4:
        snprintf(out, DESCRIBE_CELL_BYTES, "%s", cli_codec(h->codec, h->codec_level, text));
        break;
    case 5:
        snprintf(out, DESCRIBE_CELL_BYTES, "%zu", n_snapshots(l, e));
        break;
    case 6:
        snprintf(out, DESCRIBE_CELL_BYTES, "%s", parent_of(l, e, parent));
        if (!out[0])
            strcpy(out, "-");
        break;
    default:
        snprintf(out, DESCRIBE_CELL_BYTES, "%s",
                 describe_owner(run_owner_state(l->run, &e->owner), &e->owner, owner));
    }
}

static void print_json(const struct listing *l)
{
    json_t *volumes = json_array();
    for (size_t i = 0; i < l->volumes.n_entries; i++) {
        const struct catalog_entry *e = &l->volumes.entries[i];
        char parent[FULL_NAME_BYTES];
        json_array_append_new(
            volumes, describe_volume_json(l->run, e, n_snapshots(l, e), parent_of(l, e, parent)));
    }
    describe_print(json_pack("{s:s, s:o}", "store", l->run->cli->store_uri, "volumes", volumes));
}

static int list(struct run *run)
{
    static const char *const titles[] = {"NAME",  "SIZE",      "USED",   "BLOCK",
                                         "CODEC", "SNAPSHOTS", "PARENT", "OWNER"};
    struct listing l = {.run = run};
    catalog_list(run_op(run), run->store, run->env);
    enum status st = run_wait(run);
    if (st == ST_OK) {
        run_keep(run, &l.volumes);
        catalog_snapshots(run_op(run), run->store, run->env, 0);
        st = run_wait(run);
    }
    if (st == ST_OK) {
        run_keep(run, &l.snapshots);
        sort_by_branch(&l);
        if (run->cli->json) {
            print_json(&l);
        } else {
            size_t n = l.volumes.n_entries;
            describe_table(titles, sizeof titles / sizeof *titles, n, cell, &l);
            /* On stderr: a script that reads the table gets the table only. */
            fflush(stdout);
            fprintf(stderr, "%zu volume%s in %s\n", n, n == 1 ? "" : "s", run->cli->store_uri);
        }
    }
    catalog_op_free(&l.volumes);
    catalog_op_free(&l.snapshots);
    free(l.by_branch);
    return st == ST_OK ? CLI_DONE : cli_failed(&run->op.err);
}

static int run_list(struct cli *cli, int argc, char **argv)
{
    if (cli_parse(cli, argc, argv, NULL, NULL) < 0)
        return cli->status;
    struct run run;
    int status = run_begin(&run, cli, RUN_READ);
    if (status == CLI_DONE)
        status = list(&run);
    run_end(&run);
    return status;
}

const struct cli_command list_command = {
    .name = "list",
    .args = "",
    .summary = "show all volumes",
    .details =
        "USED is what clients see as data, before compression. PARENT is the snapshot that the\n"
        "volume was cloned from. OWNER is the server that has the volume in use;\n"
        "\"dead\": one that died, the next client's server takes over.",
    .run = run_list,
};
