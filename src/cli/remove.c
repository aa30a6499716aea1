/*
 * fdb-nbd remove: a volume and its data, for good.
 *
 * A volume that a living server owns has a client, idle or not: a mounted file system may
 * be idle for hours. So its owner is not asked to let go (it would, of an idle one), the
 * command is refused. Taking the name away is one commit; giving the space back comes
 * afterwards, in batches; if it is interrupted, a server or the next remove goes on with it.
 */
#include <stdio.h>

#include "cli/run.h"

/* A server whose last client has just left commits what it holds before it lets go. */
#define LEAVING_MS_MAX 5000u
#define LOOK_AGAIN_MS 100u

enum { YES = 1 };

static const struct cli_option options[] = {
    {YES, "yes", NULL, "do not ask (needed where there is no terminal)"},
    {0, NULL, NULL, NULL},
};

static enum status take(void *arg, int code, const char *value, struct err *e)
{
    (void)code;
    (void)value;
    (void)e;
    *(bool *)arg = true;
    return ST_OK;
}

/* Gives the space of removed volumes back. */
static int clear_removed(struct run *run)
{
    bool more = true;
    while (more) {
        catalog_clear_removed(run_op(run), run->store, run->env, &more);
        if (run_wait(run) != ST_OK)
            return cli_failed(&run->op.err);
    }
    return CLI_DONE;
}

static int remove_volume(struct run *run, const char *name, bool yes)
{
    struct catalog_entry entry;
    uint64_t asked_about = 0, waited_ms = 0;
    bool called = false;
    for (;;) {
        int status = run_find(run, name, &entry);
        if (status != CLI_DONE)
            return status;
        if (!yes && asked_about != entry.branch) {
            char what[NAME_BYTES_MAX + 128], size[24], used[24];
            snprintf(what, sizeof what, "removes volume \"%s\" (%s, %s of data) for good", name,
                     cli_size(entry.header.size, size),
                     cli_size(entry.state.data_blocks * entry.header.block_size, used));
            if (!cli_confirm(false, what))
                return CLI_FAILED;
            asked_about = entry.branch;
        }
        enum run_owner state = run_owner_state(run, &entry.owner);
        if (state == OWNER_NONE || state == OWNER_DEAD) {
            catalog_remove(run_op(run), run->store, run->env, &entry);
            enum status st = run_wait(run);
            if (st == ST_OK) {
                printf("removed volume \"%s\" from %s\n", name, run->cli->store_uri);
                fflush(stdout);
                return clear_removed(run);
            }
            if (st != ST_BUSY)
                return cli_failed(&run->op.err);
        }
        if (state == OWNER_UNKNOWN && !called) {
            /* Nothing is asked of it that its clients would feel, only whether it is there. */
            called = true;
            if (run_ask(run, &entry, MAIL_SYNC, 0, false) == ST_NOTFOUND)
                continue;
        }
        if (waited_ms >= LEAVING_MS_MAX) {
            cli_error("volume \"%s\" in %s is in use by a client of the server at %s (pid %u on "
                      "%s): disconnect it first, or see fdb-nbd owner evict",
                      name, run->cli->store_uri, entry.owner.address, entry.owner.pid,
                      entry.owner.host);
            return CLI_FAILED;
        }
        run_pause(run, LOOK_AGAIN_MS);
        waited_ms += LOOK_AGAIN_MS;
    }
}

static int run_remove(struct cli *cli, int argc, char **argv)
{
    bool yes = false;
    int first = cli_parse(cli, argc, argv, take, &yes);
    if (first < 0)
        return cli->status;
    struct run run;
    int status = run_begin(&run, cli, RUN_WRITE);
    if (status == CLI_DONE)
        status = remove_volume(&run, argv[first], yes);
    run_end(&run);
    return status;
}

const struct cli_command remove_command = {
    .name = "remove",
    .args = "NAME",
    .summary = "remove a volume and its data",
    .details = "Refused while a client uses the volume.",
    .options = options,
    .args_min = 1,
    .args_max = 1,
    .run = run_remove,
};
