/*
 * fdb-nbd flatten: a clone becomes a volume of its own.
 *
 * Part by part the volume's owner copies what the clone still shares with the snapshot behind it;
 * after the last part the snapshot is free to be removed. Interrupted at any point, nothing is
 * lost: what was copied is not copied again.
 */
#include <stdio.h>

#include "cli/audit.h"
#include "cli/change.h"
#include "cli/progress.h"

#define CONFLICTS_MAX 20u /* one after the other, without a part between them */
#define ROUNDS_MAX 10u    /* through the whole volume */
/* So often whoever wants the volume meanwhile, and asks this command for it, gets the time to. */
#define YIELD_MS 250u
#define YIELD_FOR_MS 15u

struct flattening {
    struct run *run;
    struct catalog_entry entry;
    struct run_owned self;
    uint64_t next; /* byte */
    unsigned conflicts, rounds;
    bool began; /* it was a clone when this command looked first */
    struct progress progress;
};

/* Parts, until the volume changes hands or the last one is made. */
static enum status go_on(struct flattening *f)
{
    struct run *run = f->run;
    struct mail_record mail = run_mail(MAIL_FLATTEN);
    struct change c;
    enum status st = change_begin(&c, run, &f->self, &f->entry);
    uint64_t yielded_ns = env_now_ns(run->env);
    if (st == ST_OK)
        change_yield(&c);
    while (st == ST_OK && f->next < f->entry.header.size && !interrupted()) {
        mail.number = f->next;
        change_start(&c, &mail);
        st = change_wait(&c);
        if (st != ST_OK)
            break;
        f->conflicts = 0;
        f->next = f->progress.done = c.number;
        uint64_t now = env_now_ns(run->env);
        if (c.vol && now - yielded_ns >= YIELD_MS * 1000000ull) {
            run_pause(run, YIELD_FOR_MS);
            yielded_ns = env_now_ns(run->env);
        }
    }
    run->op.err = c.err;
    change_end(&c);
    run_disown(run, &f->self);
    return st;
}

/* Whether there is something to be done; what is not CLI_DONE ends the command. */
static int look(struct flattening *f, const char *name, bool *clone)
{
    struct run *run = f->run;
    const struct catalog_op *op = &run->op;
    char names[CATALOG_NAMES_BYTES];
    int status = run_find(run, name, &f->entry);
    if (status != CLI_DONE)
        return status;
    *clone = f->entry.header.parent_branch != 0;
    if (!*clone)
        return CLI_DONE;
    catalog_snapshots(run_op(run), run->store, run->env, f->entry.branch);
    if (run_wait(run) != ST_OK)
        return cli_failed(&op->err);
    if (op->n_snapshots == 0)
        return CLI_DONE;
    cli_error(
        "volume \"%s\" in %s has %s, which would go on sharing what is behind it: %s; remove "
        "%s first",
        name, run->cli->store_uri, op->n_snapshots == 1 ? "a snapshot" : "snapshots",
        catalog_names(names, op->snapshots[0].rec.name, sizeof *op->snapshots, op->n_snapshots),
        op->n_snapshots == 1 ? "it" : "them");
    return CLI_FAILED;
}

static int flatten(struct flattening *f, const char *name)
{
    for (;;) {
        bool clone;
        int status = look(f, name, &clone);
        if (status != CLI_DONE)
            return status;
        if (!clone) {
            progress_end(&f->progress);
            if (f->began)
                audit_changed(f->run->cli, "flattened volume \"%s\" in %s", name,
                              f->run->cli->store_uri);
            else
                printf("volume \"%s\" in %s is not a clone: there is nothing to flatten\n", name,
                       f->run->cli->store_uri);
            return CLI_DONE;
        }
        if (!f->began)
            progress_begin(&f->progress, f->run->env, f->entry.header.size, "flattening %s", name);
        f->began = true;
        f->progress.total = f->entry.header.size;
        /* The end was reached, and it grew meanwhile, or the answer was lost. */
        if (f->next >= f->entry.header.size) {
            f->next = 0;
            f->rounds++;
        }
        enum status st = f->rounds < ROUNDS_MAX ? go_on(f) : ST_CONFLICT;
        if (interrupted()) {
            progress_end(&f->progress);
            return interrupt_status();
        }
        if (st == ST_CONFLICT && (++f->conflicts > CONFLICTS_MAX || f->rounds == ROUNDS_MAX))
            fail(&f->run->op.err, st, "volume \"%s\" in %s keeps changing hands: try again", name,
                 f->run->cli->store_uri);
        else if (st == ST_OK || st == ST_CONFLICT)
            continue;
        progress_end(&f->progress);
        cli_failed(&f->run->op.err);
        return CLI_FAILED;
    }
}

static int run_flatten(struct cli *cli, int argc, char **argv)
{
    int first = cli_parse(cli, argc, argv, NULL, NULL);
    if (first < 0)
        return cli->status;
    struct run run;
    struct flattening f = {.run = &run};
    int status = run_begin(&run, cli, RUN_WRITE);
    if (status == CLI_DONE) {
        interrupt_catch();
        status = flatten(&f, argv[first]);
        progress_end(&f.progress);
    }
    run_end(&run);
    return status;
}

const struct cli_command flatten_command = {
    .name = "flatten",
    .args = "NAME",
    .summary = "make a clone independent of its snapshot",
    .details =
        "Copies what the clone still shares with the snapshot it was made from, which can be\n"
        "removed afterwards. Works while clients use the clone. May be interrupted and run again:\n"
        "what was copied stays so. A clone that has snapshots itself is refused.",
    .args_min = 1,
    .args_max = 1,
    .run = run_flatten,
};
