/* fdb-nbd rename: another name for a volume; its clients notice nothing. */
#include <stdio.h>
#include <string.h>

#include "cli/audit.h"
#include "cli/run.h"

static int run_rename(struct cli *cli, int argc, char **argv)
{
    int first = cli_parse(cli, argc, argv, NULL, NULL);
    if (first < 0)
        return cli->status;
    if (strchr(argv[first], '@'))
        return cli_usage_error(
            cli, "\"%.300s\" names a snapshot: snapshot rename gives it another name", argv[first]);
    struct run run;
    int status = run_begin(&run, cli, RUN_WRITE);
    if (status == CLI_DONE) {
        catalog_rename(run_op(&run), run.store, run.env, argv[first], argv[first + 1]);
        if (run_wait(&run) != ST_OK)
            status = cli_failed(&run.op.err);
        else
            audit_changed(cli, "renamed volume \"%s\" to \"%s\" in %s", argv[first],
                          argv[first + 1], cli->store_uri);
    }
    run_end(&run);
    return status;
}

const struct cli_command rename_command = {
    .name = "rename",
    .args = "OLD NEW",
    .summary = "give a volume another name",
    .details = "Clients that are connected stay connected; new ones use the new name.",
    .args_min = 2,
    .args_max = 2,
    .run = run_rename,
};
