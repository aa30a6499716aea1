/* Snapshots opened by a command; see view.h. */
#include "cli/view.h"

#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "cli/change.h"

enum status view_open(struct run *run, struct shard *shard, const struct catalog_entry *entry,
                      const struct catalog_snapshot *snap, struct volume **out)
{
    struct catalog_entry at = *entry;
    at.snapshot = *snap;
    return run_open(run, shard, &at, out);
}

void view_close(struct run *run, struct volume *vol)
{
    if (vol)
        run_close(run, vol);
}

/* --- a snapshot for the time of a command --------------------------------------------------- */

struct passing {
    struct change_plan plan;
    const char *volume;
    struct catalog_entry *entry;
};

/* Whether it is there; without a word. */
static enum status find(struct run *run, const struct passing *p)
{
    char name[2 * NAME_BYTES_MAX + 2];
    snprintf(name, sizeof name, "%s@%s", p->volume, p->plan.mail.name);
    catalog_find(run_op(run), run->store, run->env, name);
    enum status st = run_wait(run);
    if (st == ST_OK)
        *p->entry = run->op.entries[0];
    return st;
}

/* An attempt whose answer was lost may have done it. */
static int look(struct change_plan *plan, struct run *run, struct catalog_entry *entry)
{
    const struct passing *p = container_of(plan, struct passing, plan);
    bool makes = plan->mail.kind == MAIL_SNAPSHOT_CREATE;
    if (plan->attempt > 0 && (find(run, p) == ST_OK) == makes) {
        plan->over = true;
        return CLI_DONE;
    }
    return run_find(run, p->volume, entry);
}

int view_snapshot(struct run *run, struct catalog_entry *entry)
{
    char volume[NAME_BYTES_MAX + 1];
    uint32_t number;
    memcpy(volume, entry->name, sizeof volume);
    struct passing p = {.plan = {.look = look, .mail = run_mail(MAIL_SNAPSHOT_CREATE)},
                        .volume = volume,
                        .entry = entry};
    env_random(run->env, &number, sizeof number);
    env_random(run->env, p.plan.mail.snapshot_id, sizeof p.plan.mail.snapshot_id);
    snprintf(p.plan.mail.name, sizeof p.plan.mail.name, "%s-%u-%08x",
             run->cli->command->name, (unsigned)getpid(), number);
    int status = change_volume(run, &p.plan);
    if (status == CLI_DONE && find(run, &p) != ST_OK)
        status = cli_failed(&run->op.err);
    return status;
}

int view_drop_snapshot(struct run *run, const struct catalog_entry *entry)
{
    struct catalog_entry unused;
    struct passing p = {.plan = {.look = look, .mail = run_mail(MAIL_SNAPSHOT_REMOVE)},
                        .volume = entry->name,
                        .entry = &unused};
    memcpy(p.plan.mail.name, entry->snapshot.rec.name, sizeof p.plan.mail.name);
    int status = change_volume(run, &p.plan);
    if (status != CLI_DONE)
        cli_error("the snapshot \"%s@%s\", made for this command alone, may be there still: remove it",
                  entry->name, entry->snapshot.rec.name);
    return status;
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
