/*
 * fdb-nbd snapshot create with several volumes: snapshots of one instant.
 *
 * The volumes are frozen, each by its owner: changes that clients begin wait. When all are, the
 * snapshots are made, each under the condition that its volume is still frozen for us; so
 * between the first and the last of them nothing was written anywhere. Then the volumes are
 * thawed; if this command dies first, they thaw by themselves. Where one snapshot can't be made,
 * those that were are removed again.
 *
 * Volumes that nobody owns are taken in the order of their branches. Of two commands with volumes
 * in common the first freeze counts; who meets one of another lets go of all and begins again after
 * a while that is left to chance.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/mem.h"
#include "cli/snapshot.h"

#define ATTEMPTS_MAX 20u
#define FREEZE_MS 5000u
#define PAUSE_MS_MAX 250u /* before the second attempt; longer before later ones */

struct member {
    const struct snapshot_name *name;
    uint8_t id[SNAPSHOT_ID_BYTES];
    struct catalog_entry entry;
    struct change change;
    bool begun, asked;
};

struct group {
    struct run *run;
    struct run_owned self;
    struct member *members;
    size_t n;
    bool frozen;    /* some of them, perhaps */
    struct err err; /* why the last attempt failed */
};

static int compare_branches(const void *a, const void *b)
{
    const struct member *x = a, *y = b;
    return x->entry.branch < y->entry.branch ? -1 : x->entry.branch > y->entry.branch;
}

/* One step with all of them at once, because clients wait meanwhile. */
static enum status all_at_once(struct group *g, struct mail_record *mail)
{
    enum status result = ST_OK;
    for (size_t i = 0; i < g->n; i++) {
        struct member *m = &g->members[i];
        memcpy(mail->name, m->name->snapshot, sizeof mail->name);
        memcpy(mail->snapshot_id, m->id, sizeof mail->snapshot_id);
        change_start(&m->change, mail);
    }
    for (size_t i = 0; i < g->n; i++) {
        struct member *m = &g->members[i];
        enum status st = change_wait(&m->change);
        /* What can be tried again is so only where nothing else stands against it. */
        bool passing = st == ST_CONFLICT || st == ST_BUSY;
        if (st == ST_OK || (passing && result != ST_OK))
            continue;
        result = st;
        g->err = m->change.err;
    }
    return result;
}

static enum status take_and_freeze(struct group *g, uint64_t token)
{
    for (size_t i = 0; i < g->n; i++) {
        struct member *m = &g->members[i];
        m->begun = true;
        enum status st = change_begin(&m->change, g->run, &g->self, &m->entry);
        if (st != ST_OK) {
            g->err = m->change.err;
            return st;
        }
        /* Or whoever asks for it would be given it: nobody uses it. */
        if (m->change.vol)
            volume_keep(m->change.vol, true);
    }
    struct mail_record mail = run_mail(MAIL_FREEZE);
    mail.token = token;
    mail.number = FREEZE_MS;
    g->frozen = true;
    return all_at_once(g, &mail);
}

static enum status make(struct group *g, uint64_t token)
{
    struct mail_record mail = run_mail(MAIL_SNAPSHOT_CREATE);
    mail.token = token;
    for (size_t i = 0; i < g->n; i++)
        g->members[i].asked = true;
    return all_at_once(g, &mail);
}

static void let_go(struct group *g, uint64_t token)
{
    struct mail_record mail = run_mail(MAIL_THAW);
    struct err why = g->err;
    mail.token = token;
    /* (One that can't be asked has thawed, or will.) */
    if (g->frozen)
        all_at_once(g, &mail);
    g->frozen = false;
    g->err = why;
    for (size_t i = 0; i < g->n; i++) {
        struct member *m = &g->members[i];
        if (m->begun && m->change.vol)
            volume_keep(m->change.vol, false);
        if (m->begun)
            change_end(&m->change);
        m->begun = false;
    }
    run_disown(g->run, &g->self);
}

/* --- taking back --------------------------------------------------------------------- */

struct undoing {
    struct change_plan plan;
    const struct member *member;
};

/* An owner may have made it although its answer did not come: what is there counts. */
static int look_before_undoing(struct change_plan *plan, struct run *run,
                               struct catalog_entry *entry)
{
    const struct member *m = container_of(plan, struct undoing, plan)->member;
    catalog_find(run_op(run), run->store, run->env, m->name->text);
    enum status st = run_wait(run);
    if (st != ST_OK && st != ST_NOTFOUND)
        return cli_failed(&run->op.err);
    plan->over =
        st == ST_NOTFOUND || memcmp(run->op.entries[0].snapshot.rec.id, m->id, sizeof m->id) != 0;
    if (!plan->over)
        *entry = run->op.entries[0];
    return CLI_DONE;
}

/* Whether nothing is left of what this attempt made. */
static bool undo(struct group *g)
{
    bool all = true;
    for (size_t i = 0; i < g->n; i++) {
        struct member *m = &g->members[i];
        if (!m->asked)
            continue;
        m->asked = false;
        struct undoing u = {
            .plan = {.look = look_before_undoing, .mail = run_mail(MAIL_SNAPSHOT_REMOVE)},
            .member = m};
        memcpy(u.plan.mail.name, m->name->snapshot, sizeof u.plan.mail.name);
        if (change_volume(g->run, &u.plan) != CLI_DONE) {
            cli_error("snapshot \"%s\" was made and could not be removed again: remove it",
                      m->name->text);
            all = false;
        }
    }
    return all;
}

/* ------------------------------------------------------------------------------------- */

static enum status attempt(struct group *g)
{
    uint64_t token = 0;
    while (token == 0)
        env_random(g->run->env, &token, sizeof token);
    for (size_t i = 0; i < g->n; i++)
        env_random(g->run->env, g->members[i].id, sizeof g->members[i].id);
    enum status st = take_and_freeze(g, token);
    if (st == ST_OK)
        st = make(g, token);
    let_go(g, token);
    return st;
}

static int look_up(struct group *g)
{
    for (size_t i = 0; i < g->n; i++) {
        int status = run_find(g->run, g->members[i].name->volume, &g->members[i].entry);
        if (status != CLI_DONE)
            return status;
    }
    qsort(g->members, g->n, sizeof *g->members, compare_branches);
    return CLI_DONE;
}

static int create(struct group *g)
{
    for (unsigned i = 1;; i++) {
        int status = look_up(g);
        if (status != CLI_DONE)
            return status;
        enum status st = attempt(g);
        if (st == ST_OK)
            return CLI_DONE;
        if (!undo(g))
            return CLI_FAILED;
        if (i == ATTEMPTS_MAX || (st != ST_CONFLICT && st != ST_BUSY)) {
            cli_error("%s; none of the %zu snapshots was made", g->err.text, g->n);
            return CLI_FAILED;
        }
        uint32_t ms;
        env_random(g->run->env, &ms, sizeof ms);
        run_pause(g->run, ms % (PAUSE_MS_MAX * i) + 1);
    }
}

int snapshot_group_create(struct run *run, const struct snapshot_name *names, size_t n)
{
    struct group g = {.run = run, .n = n, .members = mem_zalloc(n * sizeof *g.members)};
    for (size_t i = 0; i < n; i++)
        g.members[i].name = &names[i];
    int status = create(&g);
    free(g.members);
    return status;
}
