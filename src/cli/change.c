/* Changes that the owner of a volume makes; see change.h. */
#include "cli/change.h"

#include "base/check.h"

/* A volume that changes hands meanwhile is looked up again, so often. */
#define ATTEMPTS_MAX 10u

/* "cannot ..." */
static const char *verb(const struct change *c)
{
    switch (c->mail.kind) {
    case MAIL_RESIZE:
        return "resize";
    case MAIL_SNAPSHOT_CREATE:
        return "make a snapshot of";
    case MAIL_SNAPSHOT_REMOVE:
        return "remove a snapshot of";
    case MAIL_SNAPSHOT_RENAME:
        return "rename a snapshot of";
    case MAIL_FLATTEN:
        return "flatten";
    default:
        return "use";
    }
}

static void step_over(struct change *c, enum status st, const struct err *e)
{
    c->st = st;
    c->done = true;
    if (st == ST_OK)
        return;
    c->err = *e;
    if (!e->text[0])
        fail(&c->err, st, "cannot %s volume \"%s\" in %s: %s", verb(c), c->entry.name,
             c->run->cli->store_uri, status_text(st));
}

static void asked(struct catalog_op *ask)
{
    struct change *c = container_of(ask, struct change, ask);
    c->number = ask->number;
    /* Gone while we asked: somebody else's turn, perhaps ours. */
    step_over(c, ask->st == ST_NOTFOUND ? ST_CONFLICT : ask->st, &ask->err);
    catalog_op_free(ask);
}

static void made_here(struct vol_io *io)
{
    struct vol_history_op *op = container_of(io, struct vol_history_op, io);
    struct change *c = container_of(op, struct change, op);
    c->number = c->mail.kind == MAIL_FLATTEN ? io->offset : op->epoch;
    step_over(c, io->st == ST_PERM ? ST_CONFLICT : io->st, &op->err);
}

static void owned_here(struct vol_io *io)
{
    struct vol_history_op *op = container_of(io, struct vol_history_op, io);
    struct change *c = container_of(op, struct change, op);
    bool faster = io->st == ST_PERM || io->st == ST_BUSY;
    step_over(c, faster ? ST_CONFLICT : io->st, &op->err);
}

static void make_here(struct change *c)
{
    const struct mail_record *mail = &c->mail;
    struct vol_history_op *op = &c->op;
    *op = (struct vol_history_op){.io = {.done = made_here}};
    switch (mail->kind) {
    case MAIL_RESIZE:
        volume_resize(c->vol, &op->io, mail->size, mail->shrink);
        break;
    case MAIL_SYNC:
        volume_sync(c->vol, &op->io);
        break;
    case MAIL_FREEZE:
        /* (Nobody else could freeze what this command has just taken.) */
        step_over(c,
                  volume_freeze(c->vol, mail->token, (uint32_t)mail->number) ? ST_OK : ST_BUSY,
                  &(struct err){0});
        break;
    case MAIL_THAW:
        volume_thaw(c->vol, mail->token);
        step_over(c, ST_OK, NULL);
        break;
    default:
        volume_history(c->vol, op, mail);
    }
}

enum status change_begin(struct change *c, struct run *run, struct run_owned *self,
                         const struct catalog_entry *entry)
{
    *c = (struct change){.run = run, .self = self, .entry = *entry, .done = true};
    c->entry.snapshot.epoch = 0; /* the volume is what is changed, not the snapshot */
    enum run_owner state = run_owner_state(run, &entry->owner);
    if (state != OWNER_NONE && state != OWNER_DEAD)
        return ST_OK;
    enum status st = self->shard ? ST_OK : run_own(run, NULL, self);
    if (st == ST_OK)
        st = run_open(run, self->shard, &c->entry, &c->vol);
    if (st != ST_OK) {
        step_over(c, st, &run->op.err);
        return st;
    }
    c->done = false;
    c->op = (struct vol_history_op){.io = {.done = owned_here}};
    volume_own(c->vol, &c->op.io);
    return change_wait(c);
}

void change_end(struct change *c)
{
    if (c->vol)
        run_close(c->run, c->vol);
    c->vol = NULL;
}

void change_yield(struct change *c)
{
    if (c->vol)
        shard_wait_no_more(c->self->shard);
}

void change_start(struct change *c, const struct mail_record *mail)
{
    CHECK(c->done);
    c->mail = *mail;
    c->done = false;
    c->number = 0;
    if (c->vol) {
        make_here(c);
        return;
    }
    c->ask = (struct catalog_op){.done = asked};
    catalog_ask_owner(&c->ask, c->run->store, c->run->env, &c->entry, &c->mail, RUN_ASK_WAIT_MS,
                      NULL, true);
}

enum status change_wait(struct change *c)
{
    run_until(c->run, &c->done);
    return c->st;
}

int change_volume(struct run *run, struct change_plan *plan)
{
    struct catalog_entry entry;
    for (plan->attempt = 0; plan->attempt < ATTEMPTS_MAX; plan->attempt++) {
        int status = plan->look(plan, run, &entry);
        if (status != CLI_DONE || plan->over)
            return status;
        struct run_owned self = {0};
        struct change c;
        enum status st = change_begin(&c, run, &self, &entry);
        if (st == ST_OK) {
            change_start(&c, &plan->mail);
            st = change_wait(&c);
        }
        if (st == ST_OK && plan->made)
            plan->made(plan, &c);
        change_end(&c);
        run_disown(run, &self);
        if (st == ST_OK)
            return CLI_DONE;
        if (st != ST_CONFLICT) {
            cli_failed(&c.err);
            return CLI_FAILED;
        }
    }
    cli_error("volume \"%s\" in %s keeps changing hands: try again", entry.name,
              run->cli->store_uri);
    return CLI_FAILED;
}
