/* fdb-nbd clone: a new volume that begins as a snapshot. One commit; nobody is asked. */
#include <stdio.h>
#include <string.h>

#include "cli/audit.h"
#include "cli/run.h"

enum { DESCRIPTION = 1 };

static const struct cli_option options[] = {
    {DESCRIPTION, "description", "TEXT", "shown to clients and by info (default: none)"},
    {0, NULL, NULL, NULL},
};

static enum status take(void *arg, int code, const char *value, struct err *e)
{
    struct volume_spec *spec = arg;
    (void)code;
    return cli_parse_description(value, spec->description, e);
}

static int run_clone(struct cli *cli, int argc, char **argv)
{
    struct volume_spec spec = {.codec = -1};
    int first = cli_parse(cli, argc, argv, take, &spec);
    if (first < 0)
        return cli->status;
    const char *from = argv[first], *name = argv[first + 1];
    if (strlen(name) > NAME_BYTES_MAX)
        return cli_usage_error(cli, "a volume's name has at most %u characters", NAME_BYTES_MAX);
    strcpy(spec.name, name);
    struct run run;
    struct catalog_entry entry;
    int status = run_begin(&run, cli, RUN_WRITE);
    if (status == CLI_DONE)
        status = run_find_snapshot(&run, from, &entry);
    if (status == CLI_DONE) {
        char size[24];
        catalog_clone(run_op(&run), run.store, run.env, &entry, &spec);
        if (run_wait(&run) != ST_OK)
            status = cli_failed(&run.op.err);
        else
            audit_changed(cli, "cloned \"%s\" to volume \"%s\" of %s in %s", from, name,
                          cli_size(entry.snapshot.rec.size, size), cli->store_uri);
    }
    run_end(&run);
    return status;
}

const struct cli_command clone_command = {
    .name = "clone",
    .args = "VOLUME@SNAPSHOT NEW",
    .summary = "make a volume that begins as a snapshot",
    .details =
        "Takes a moment, whatever the size: the clone shares what the snapshot holds and stores\n"
        "what is written to it. Size, block size and compression are those of the volume it comes\n"
        "from. The snapshot stays until its clones are removed or flattened (fdb-nbd flatten).",
    .options = options,
    .args_min = 2,
    .args_max = 2,
    .run = run_clone,
};
