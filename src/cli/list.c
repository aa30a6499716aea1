/* fdb-nbd list: all volumes of a store. */
#include <stdio.h>
#include <string.h>

#include "cli/describe.h"

/* Columns as wide as what is in them; the owner, last, needs no width. */
static void print_table(struct run *run)
{
    static const char *const titles[] = {"NAME", "SIZE", "USED", "BLOCK", "CODEC"};
    enum { COLUMNS = 5, CELL = NAME_BYTES_MAX + 1 };
    int width[COLUMNS];
    for (int c = 0; c < COLUMNS; c++)
        width[c] = (int)strlen(titles[c]);
    /* Twice over the entries: once for the widths, once to print. */
    for (int printing = 0; printing < 2; printing++) {
        if (printing) {
            for (int c = 0; c < COLUMNS; c++)
                printf("%-*s  ", width[c], titles[c]);
            puts("OWNER");
        }
        for (size_t i = 0; i < run->op.n_entries; i++) {
            const struct catalog_entry *e = &run->op.entries[i];
            char cells[COLUMNS][CELL], text[24], owner[HOST_BYTES_MAX + 16];
            snprintf(cells[0], CELL, "%s", e->name);
            snprintf(cells[1], CELL, "%s", cli_size(e->header.size, text));
            snprintf(cells[2], CELL, "%s",
                     cli_size(e->state.data_blocks * e->header.block_size, text));
            snprintf(cells[3], CELL, "%s", cli_size(e->header.block_size, text));
            snprintf(cells[4], CELL, "%s", cli_codec(e->header.codec, e->header.codec_level, text));
            for (int c = 0; c < COLUMNS; c++) {
                int len = (int)strlen(cells[c]);
                if (printing)
                    printf("%-*s  ", width[c], cells[c]);
                else if (len > width[c])
                    width[c] = len;
            }
            if (printing)
                puts(describe_owner(run_owner_state(run, &e->owner), &e->owner, owner));
        }
    }
}

static void print_json(struct run *run)
{
    json_t *volumes = json_array();
    for (size_t i = 0; i < run->op.n_entries; i++)
        json_array_append_new(volumes, describe_volume_json(run, &run->op.entries[i]));
    describe_print(json_pack("{s:s, s:o}", "store", run->cli->store_uri, "volumes", volumes));
}

static int run_list(struct cli *cli, int argc, char **argv)
{
    if (cli_parse(cli, argc, argv, NULL, NULL) < 0)
        return cli->status;
    struct run run;
    int status = run_begin(&run, cli, RUN_READ);
    if (status == CLI_DONE) {
        catalog_list(run_op(&run), run.store, run.env);
        if (run_wait(&run) != ST_OK) {
            status = cli_failed(&run.op.err);
        } else if (cli->json) {
            print_json(&run);
        } else {
            print_table(&run);
            /* On stderr: a script that reads the table gets the table only. */
            fflush(stdout);
            fprintf(stderr, "%zu volume%s in %s\n", run.op.n_entries,
                    run.op.n_entries == 1 ? "" : "s", cli->store_uri);
        }
    }
    run_end(&run);
    return status;
}

const struct cli_command list_command = {
    .name = "list",
    .args = "",
    .summary = "show all volumes",
    .details =
        "USED is what clients see as data, before compression. OWNER is the server that has\n"
        "the volume in use; \"dead\": one that died, the next client's server takes over.",
    .run = run_list,
};
