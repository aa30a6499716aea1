/*
 * fdb-nbd remove: a volume and its data, for good.
 *
 * A volume that a living server owns has a client, idle or not: a mounted file system may
 * be idle for hours. So its owner is not asked to let go (it would, of an idle one), the
 * command is refused, or with --force the clients are cut off: the volume gets another name first,
 * so that a client that connects again does not find it. Taking the name away is one commit;
 * giving the space back comes afterwards, in batches; if it is interrupted, a server or the next
 * remove goes on with it.
 */
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "cli/audit.h"
#include "cli/run.h"

/* After an owner that was to be evicted was gone already. */
#define LOOK_AGAIN_MS 100u

/* A connection that had looked the volume up just before may still come in. */
#define EVICTS_MAX 20u

enum { FORCE = 1, SNAPSHOTS, YES };

static const struct cli_option options[] = {
    {FORCE, "force", NULL, "cut off the clients that use it"},
    {SNAPSHOTS, "snapshots", NULL, "remove its snapshots too"},
    {YES, "yes", NULL, "do not ask (needed where there is no terminal)"},
    {0, NULL, NULL, NULL},
};

struct remove_options {
    bool force, snapshots, yes;
};

static enum status take(void *arg, int code, const char *value, struct err *e)
{
    struct remove_options *o = arg;
    (void)value;
    (void)e;
    *(code == FORCE ? &o->force : code == SNAPSHOTS ? &o->snapshots : &o->yes) = true;
    return ST_OK;
}

/* Refuses, in time, what catalog_remove() would refuse after the clients were cut off: it has
 * snapshots that are to stay, or clones. The names of its snapshots are in `names` then. */
static int look_at_history(struct run *run, const struct catalog_entry *entry, bool with_snapshots,
                           char names[CATALOG_NAMES_BYTES])
{
    const struct catalog_op *op = &run->op;
    catalog_clones(run_op(run), run->store, run->env, entry->branch, 0);
    if (run_wait(run) != ST_OK)
        return cli_failed(&op->err);
    if (op->n_entries > 0) {
        cli_error("snapshots of volume \"%s\" in %s have clones: %s; remove or flatten them first",
                  entry->name, run->cli->store_uri,
                  catalog_names(names, op->entries[0].name, sizeof *op->entries, op->n_entries));
        return CLI_FAILED;
    }
    catalog_snapshots(run_op(run), run->store, run->env, entry->branch);
    if (run_wait(run) != ST_OK)
        return cli_failed(&op->err);
    names[0] = '\0';
    if (op->n_snapshots == 0)
        return CLI_DONE;
    catalog_names(names, op->snapshots[0].rec.name, sizeof *op->snapshots, op->n_snapshots);
    if (with_snapshots)
        return CLI_DONE;
    cli_error("volume \"%s\" in %s has %s: %s; --snapshots removes them too", entry->name,
              run->cli->store_uri, op->n_snapshots == 1 ? "a snapshot" : "snapshots", names);
    return CLI_FAILED;
}

static bool confirm(const struct catalog_entry *entry, bool force, const char *snapshots)
{
    char what[NAME_BYTES_MAX + CATALOG_NAMES_BYTES + 128], size[24], used[24];
    snprintf(what, sizeof what, "%sremoves volume \"%s\" (%s, %s of data)%s%s for good",
             force ? "cuts off whoever uses, and " : "", entry->name,
             cli_size(entry->header.size, size),
             cli_size(entry->state.data_blocks * entry->header.block_size, used),
             *snapshots ? " and its snapshots " : "", snapshots);
    return cli_confirm(false, what);
}

/* Gives the volume a name that no client asks for; `aside` is that one. */
static enum status put_aside(struct run *run, const char *name, char aside[NAME_BYTES_MAX + 1])
{
    snprintf(aside, NAME_BYTES_MAX + 1, "%.90s.removing-%u", name, (unsigned)getpid());
    catalog_rename(run_op(run), run->store, run->env, name, aside);
    return run_wait(run);
}

static int remove_once(struct run *run, const char *name, const struct remove_options *o,
                       char aside[NAME_BYTES_MAX + 1])
{
    struct catalog_entry entry;
    char names[CATALOG_NAMES_BYTES];
    struct run_patience patience = {0};
    uint64_t asked_about = 0;
    unsigned evicts = 0;
    for (;;) {
        int status = run_find(run, *aside ? aside : name, &entry);
        if (status != CLI_DONE)
            return status;
        status = look_at_history(run, &entry, o->snapshots, names);
        if (status != CLI_DONE)
            return status;
        if (!o->yes && asked_about != entry.branch) {
            if (!confirm(&entry, o->force, names))
                return CLI_FAILED;
            asked_about = entry.branch;
        }
        enum run_owner state = run_owner_state(run, &entry.owner);
        if (o->force && state != OWNER_NONE && state != OWNER_DEAD && evicts++ < EVICTS_MAX) {
            if (!*aside) {
                if (put_aside(run, name, aside) != ST_OK) {
                    *aside = '\0';
                    return cli_failed(&run->op.err);
                }
                continue;
            }
            enum status st = run_evict(run, &entry);
            if (st == ST_NOTFOUND) {
                run_pause(run, LOOK_AGAIN_MS);
                continue;
            }
            if (st != ST_OK) {
                cli_failed(&run->op.err);
                return CLI_FAILED;
            }
            /* No look-up in between: that is time to come back in. */
            memset(entry.owner.session, 0, sizeof entry.owner.session);
            state = OWNER_NONE;
        }
        if (state == OWNER_NONE || state == OWNER_DEAD) {
            catalog_remove(run_op(run), run->store, run->env, &entry, o->snapshots);
            enum status st = run_wait(run);
            if (st == ST_OK) {
                *aside = '\0';
                audit_changed(run->cli, "removed volume \"%s\" from %s", name,
                              run->cli->store_uri);
                return run_clear_removed(run);
            }
            if (st != ST_BUSY)
                return cli_failed(&run->op.err);
            if (o->force && evicts < EVICTS_MAX)
                continue;
        }
        if (!run_wait_leaving(run, &entry, state, &patience, o->force ? "" : ", or use --force"))
            return CLI_FAILED;
    }
}

static int remove_volume(struct run *run, const char *name, const struct remove_options *o)
{
    char aside[NAME_BYTES_MAX + 1] = "";
    int status = remove_once(run, name, o, aside);
    if (!*aside)
        return status;
    /* It is still there: under its own name, if it can be. */
    catalog_rename(run_op(run), run->store, run->env, aside, name);
    if (run_wait(run) != ST_OK)
        cli_error("volume \"%s\" in %s is called \"%s\" now: remove it again under that name", name,
                  run->cli->store_uri, aside);
    return status;
}

static int run_remove(struct cli *cli, int argc, char **argv)
{
    struct remove_options o = {false, false, false};
    int first = cli_parse(cli, argc, argv, take, &o);
    if (first < 0)
        return cli->status;
    struct run run;
    int status = run_begin(&run, cli, RUN_WRITE);
    if (status == CLI_DONE)
        status = remove_volume(&run, argv[first], &o);
    run_end(&run);
    return status;
}

const struct cli_command remove_command = {
    .name = "remove",
    .args = "NAME",
    .summary = "remove a volume and its data",
    .details =
        "Refused while a client uses the volume. With --force the volume is called\n"
        "NAME.removing-PID first, so that clients do not find it again, and its server is made to\n"
        "let go, as by owner evict, which cuts off its clients. With snapshots a volume is "
        "removed\n"
        "by --snapshots only, and not at all while they have clones.",
    .options = options,
    .args_min = 1,
    .args_max = 1,
    .run = run_remove,
};
