/*
 * fdb-nbd snapshot rollback: a volume becomes again what it was.
 *
 * One commit, which takes the volume from an owner that is gone; one with a client is left alone:
 * under a mounted file system nothing may change. What is not needed any more is cleared
 * afterwards, by this command or by whoever has the volume in use next.
 */
#include <stdio.h>
#include <string.h>

#include "base/date.h"
#include "cli/audit.h"
#include "cli/snapshot.h"

/* What is lost, to be said before; false: it is not to be. */
static bool confirm(const struct catalog_entry *to, const char *newer)
{
    char what[2 * NAME_BYTES_MAX + CATALOG_NAMES_BYTES + 160], date[DATE_BYTES];
    snprintf(what, sizeof what,
             "makes volume \"%s\" what it was at \"%s\" (%s), loses all that was written since%s%s",
             to->name, to->snapshot.rec.name, date_format(to->snapshot.rec.created_ns, date),
             *newer ? ", and removes the newer snapshots " : "", newer);
    return cli_confirm(false, what);
}

/* The names of the snapshots that are newer, into `names`, in quotes. Refuses where they are to
 * stay. */
static int look_at_newer(struct run *run, const struct catalog_entry *to, bool destroy_newer,
                         char names[CATALOG_NAMES_BYTES])
{
    const struct catalog_op *op = &run->op;
    catalog_snapshots(run_op(run), run->store, run->env, to->branch);
    if (run_wait(run) != ST_OK)
        return cli_failed(&op->err);
    size_t first = 0;
    while (first < op->n_snapshots && op->snapshots[first].epoch <= to->snapshot.epoch)
        first++;
    size_t n = op->n_snapshots - first;
    names[0] = '\0';
    if (n == 0)
        return CLI_DONE;
    catalog_names(names, op->snapshots[first].rec.name, sizeof *op->snapshots, n);
    if (destroy_newer)
        return CLI_DONE;
    cli_error("volume \"%s\" in %s has %s newer than \"%s\": %s; --destroy-newer removes what is "
              "newer",
              to->name, run->cli->store_uri, n == 1 ? "a snapshot" : "snapshots",
              to->snapshot.rec.name, names);
    return CLI_FAILED;
}

/* What was rolled back lies there until somebody owns the volume. If that is another one by now,
 * that one clears it. */
static void clear(struct run *run, const struct catalog_entry *to)
{
    struct run_owned self = {0};
    struct change c;
    struct catalog_entry entry;
    catalog_find(run_op(run), run->store, run->env, to->name);
    if (run_wait(run) != ST_OK)
        return;
    entry = run->op.entries[0];
    if (change_begin(&c, run, &self, &entry) == ST_OK)
        snapshot_settle(&c, "what was rolled back");
    change_end(&c);
    run_disown(run, &self);
}

int snapshot_rollback(struct run *run, const char *name, bool destroy_newer, bool yes)
{
    struct catalog_entry to;
    struct run_patience patience = {0};
    char newer[CATALOG_NAMES_BYTES];
    uint64_t asked_about = 0;
    for (;;) {
        int status = run_find_snapshot(run, name, &to);
        if (status == CLI_DONE)
            status = look_at_newer(run, &to, destroy_newer, newer);
        if (status != CLI_DONE)
            return status;
        if (!yes && asked_about != to.header.epoch) {
            if (!confirm(&to, newer))
                return CLI_FAILED;
            asked_about = to.header.epoch;
        }
        enum run_owner state = run_owner_state(run, &to.owner);
        if (state == OWNER_NONE || state == OWNER_DEAD) {
            catalog_rollback(run_op(run), run->store, run->env, &to, destroy_newer);
            enum status st = run_wait(run);
            if (st == ST_OK)
                break;
            if (st != ST_BUSY)
                return cli_failed(&run->op.err);
        }
        if (!run_wait_leaving(run, &to, state, &patience, ""))
            return CLI_FAILED;
    }
    audit_changed(run->cli, "rolled volume \"%s\" back to \"%s\" in %s", to.name,
                  to.snapshot.rec.name, run->cli->store_uri);
    clear(run, &to);
    return CLI_DONE;
}
