/* Snapshots opened by a command; see view.h. */
#include "cli/view.h"

#include <stdio.h>
#include <string.h>
#include <unistd.h>

/* A volume that changes hands meanwhile is looked up again, so often. */
#define ATTEMPTS_MAX 10
#define ASK_WAIT_MS 30000u

struct opening {
    struct volume_open open;
    bool done;
};

static void opened(struct volume_open *op)
{
    container_of(op, struct opening, open)->done = true;
}

enum status view_open(struct run *run, struct shard *shard, const struct catalog_entry *entry,
                      const struct catalog_snapshot *snap, struct volume **out)
{
    struct opening opening = {
        .open = {.branch = entry->branch, .epoch = snap->epoch, .read_only = true, .done = opened}};
    memcpy(opening.open.name, entry->name, sizeof opening.open.name);
    volume_open(shard, &opening.open);
    run_until(run, &opening.done);
    *out = opening.open.vol;
    if (opening.open.st != ST_OK)
        run->op.err = opening.open.err;
    return opening.open.st;
}

static void closed(void *arg)
{
    *(bool *)arg = true;
}

void view_close(struct run *run, struct volume *vol)
{
    bool done = false;
    if (!vol)
        return;
    volume_close(vol, closed, &done);
    run_until(run, &done);
}

/* --- a snapshot for the time of a command --------------------------------------------------- */

struct changing {
    struct vol_history_op op;
    bool done;
};

static void changed(struct vol_io *io)
{
    struct vol_history_op *op = container_of(io, struct vol_history_op, io);
    container_of(op, struct changing, op)->done = true;
}

/* As the owner for that moment. */
static enum status change_here(struct run *run, const struct catalog_entry *entry,
                               const struct mail_record *mail)
{
    struct run_owned owned;
    enum status st = run_own(run, entry, &owned);
    if (st != ST_OK)
        return st;
    struct changing c = {.op = {.io = {.done = changed}}};
    memcpy(c.op.name, mail->name, sizeof c.op.name);
    memcpy(c.op.id, mail->snapshot_id, sizeof c.op.id);
    if (mail->kind == MAIL_SNAPSHOT_CREATE)
        volume_snapshot_create(owned.vol, &c.op);
    else
        volume_snapshot_remove(owned.vol, &c.op);
    shard_submit(owned.shard);
    run_until(run, &c.done);
    run_disown(run, &owned);
    if (c.op.io.st != ST_OK)
        run->op.err = c.op.err;
    return c.op.io.st;
}

static int change(struct run *run, const char *volume, struct mail_record *mail)
{
    for (int attempt = 0; attempt < ATTEMPTS_MAX; attempt++) {
        struct catalog_entry entry;
        int status = run_find(run, volume, &entry);
        if (status != CLI_DONE)
            return status;
        enum run_owner owner = run_owner_state(run, &entry.owner);
        enum status st;
        if (owner == OWNER_NONE || owner == OWNER_DEAD) {
            st = change_here(run, &entry, mail);
            if (st == ST_PERM || st == ST_BUSY)
                continue;
        } else {
            catalog_ask_owner(run_op(run), run->store, run->env, &entry, mail, ASK_WAIT_MS, NULL,
                              true);
            st = run_wait(run);
            if (st == ST_NOTFOUND)
                continue;
        }
        return st == ST_OK ? CLI_DONE : cli_failed(&run->op.err);
    }
    cli_error("volume \"%s\" in %s keeps changing hands: try again", volume, run->cli->store_uri);
    return CLI_FAILED;
}

int view_snapshot(struct run *run, struct catalog_entry *entry)
{
    char name[2 * NAME_BYTES_MAX + 2];
    uint32_t number;
    struct mail_record mail = {.kind = MAIL_SNAPSHOT_CREATE};
    env_random(run->env, &number, sizeof number);
    env_random(run->env, mail.snapshot_id, sizeof mail.snapshot_id);
    snprintf(mail.name, sizeof mail.name, "export-%u-%08x", (unsigned)getpid(), number);
    int status = change(run, entry->name, &mail);
    if (status != CLI_DONE)
        return status;
    snprintf(name, sizeof name, "%s@%s", entry->name, mail.name);
    return run_find(run, name, entry);
}

int view_drop_snapshot(struct run *run, const struct catalog_entry *entry)
{
    struct mail_record mail = {.kind = MAIL_SNAPSHOT_REMOVE};
    memcpy(mail.name, entry->snapshot.rec.name, sizeof mail.name);
    return change(run, entry->name, &mail);
}

/* --- walks ---------------------------------------------------------------------------------- */

void extents_begin(struct extents *x, struct run *run, struct volume *vol, struct volume *since,
                   uint32_t mask)
{
    x->run = run;
    x->vol = vol;
    x->since = since;
    x->at = 0;
    x->end = volume_size(vol);
    x->mask = mask;
    x->n = x->next = 0;
}

static void answered(struct vol_io *io)
{
    container_of(io, struct extents, io)->answered = true;
}

static enum status ask(struct extents *x)
{
    x->io = (struct vol_io){.done = answered,
                            .offset = x->at,
                            .length = x->end - x->at,
                            .extents = x->got,
                            .extents_cap = EXTENTS_PER_ASK,
                            .status_of = x->since ? VOL_STATUS_CHANGED : VOL_STATUS_ALLOCATION,
                            .since = x->since};
    x->answered = false;
    volume_status(x->vol, &x->io);
    run_until(x->run, &x->answered);
    x->n = x->io.n_extents;
    x->next = 0;
    if (x->io.st == ST_OK)
        return ST_OK;
    return fail(&x->run->op.err, x->io.st,
                "cannot read the index of %s from byte %llu on: %s", volume_name(x->vol),
                (unsigned long long)x->at, status_text(x->io.st));
}

enum status extents_next(struct extents *x, struct extent *out)
{
    *out = (struct extent){0, 0, 0};
    while (x->at < x->end) {
        enum status st = x->next < x->n ? ST_OK : ask(x);
        if (st != ST_OK)
            return st;
        const struct vol_extent *got = &x->got[x->next];
        uint32_t flags = got->flags & x->mask;
        bool wanted = !x->since || (got->flags & VOL_EXTENT_CHANGED);
        if (out->length > 0 && (!wanted || flags != out->flags))
            return ST_OK;
        if (wanted) {
            if (out->length == 0)
                *out = (struct extent){x->at, 0, flags};
            out->length += got->length;
        }
        x->at += got->length;
        x->next++;
    }
    return ST_OK;
}
