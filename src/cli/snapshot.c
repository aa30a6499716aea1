/*
 * fdb-nbd snapshot: making, listing, removing and renaming snapshots of volumes.
 *
 * All of it is done by the volume's owner, in the order of its clients' writes (change.h). Going
 * back to one is in rollback.c, several at one instant in group.c.
 */
#include "cli/snapshot.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/date.h"
#include "base/mem.h"
#include "cli/audit.h"
#include "cli/describe.h"
#include "cli/progress.h"

enum { DESTROY_NEWER = 1, YES };

static const struct cli_option options[] = {
    {DESTROY_NEWER, "destroy-newer", NULL, "rollback: remove the snapshots that are newer"},
    {YES, "yes", NULL, "rollback: do not ask (needed where there is no terminal)"},
    {0, NULL, NULL, NULL},
};

struct snapshot_options {
    bool destroy_newer, yes;
};

static enum status take(void *arg, int code, const char *value, struct err *e)
{
    struct snapshot_options *o = arg;
    (void)value;
    (void)e;
    *(code == YES ? &o->yes : &o->destroy_newer) = true;
    return ST_OK;
}

/* Behind a lost answer: looks for a snapshot without a word where there is none. */
static enum status find_again(struct run *run, const char *volume, const char *snapshot,
                              struct catalog_entry *entry)
{
    char text[FULL_NAME_BYTES];
    catalog_find(run_op(run), run->store, run->env, describe_snapshot(volume, snapshot, text));
    enum status st = run_wait(run);
    if (st == ST_OK)
        *entry = run->op.entries[0];
    return st;
}

/* --- create -------------------------------------------------------------------------- */

struct making {
    struct change_plan plan;
    const struct snapshot_name *name;
};

static int look_before_making(struct change_plan *plan, struct run *run,
                              struct catalog_entry *entry)
{
    /* (Asked for again with the same id, it counts as made.) */
    return run_find(run, container_of(plan, struct making, plan)->name->volume, entry);
}

static int create_one(struct run *run, const struct snapshot_name *name)
{
    struct making m = {.plan = {.look = look_before_making, .mail = run_mail(MAIL_SNAPSHOT_CREATE)},
                       .name = name};
    memcpy(m.plan.mail.name, name->snapshot, sizeof m.plan.mail.name);
    env_random(run->env, m.plan.mail.snapshot_id, sizeof m.plan.mail.snapshot_id);
    return change_volume(run, &m.plan);
}

static int create(struct run *run, const struct snapshot_options *o, char **words, int n)
{
    (void)o;
    struct snapshot_name names[SNAPSHOT_GROUP_MAX];
    for (int i = 0; i < n; i++) {
        names[i].text = words[i];
        if (!name_split(words[i], names[i].volume, names[i].snapshot) || !names[i].snapshot[0])
            return cli_usage_error(
                run->cli,
                "\"%.300s\" is not of the form VOLUME@SNAPSHOT, each 1 to 128 of "
                "A-Z a-z 0-9 . _ -, the first a letter or digit",
                words[i]);
        for (int k = 0; k < i; k++)
            if (strcmp(names[k].volume, names[i].volume) == 0)
                return cli_usage_error(run->cli, "volume \"%s\" is named twice", names[i].volume);
    }
    int status = n == 1 ? create_one(run, names) : snapshot_group_create(run, names, (size_t)n);
    for (int i = 0; i < n && status == CLI_DONE; i++)
        audit_changed(run->cli, "created snapshot \"%s\" in %s", words[i], run->cli->store_uri);
    return status;
}

/* --- remove -------------------------------------------------------------------------- */

struct removing {
    struct change_plan plan;
    const char *text;
    bool settle;
};

static int look_before_removing(struct change_plan *plan, struct run *run,
                                struct catalog_entry *entry)
{
    const struct removing *r = container_of(plan, struct removing, plan);
    char names[CATALOG_NAMES_BYTES];
    if (plan->attempt == 0) {
        int status = run_find_snapshot(run, r->text, entry);
        if (status != CLI_DONE)
            return status;
    } else {
        char volume[NAME_BYTES_MAX + 1], snapshot[NAME_BYTES_MAX + 1];
        name_split(r->text, volume, snapshot);
        enum status st = find_again(run, volume, snapshot, entry);
        plan->over = st == ST_NOTFOUND; /* it was there, and is not */
        if (st != ST_OK)
            return plan->over ? CLI_DONE : cli_failed(&run->op.err);
    }
    memcpy(plan->mail.name, entry->snapshot.rec.name, sizeof plan->mail.name);
    catalog_clones(run_op(run), run->store, run->env, entry->branch, entry->snapshot.epoch);
    if (run_wait(run) != ST_OK)
        return cli_failed(&run->op.err);
    if (run->op.n_entries == 0)
        return CLI_DONE;
    cli_error(
        "snapshot \"%s\" in %s has %s: %s; remove or flatten %s first", r->text,
        run->cli->store_uri, run->op.n_entries == 1 ? "a clone" : "clones",
        catalog_names(names, run->op.entries[0].name, sizeof *run->op.entries, run->op.n_entries),
        run->op.n_entries == 1 ? "it" : "them");
    return CLI_FAILED;
}

static void say_removed(const struct removing *r, struct run *run)
{
    audit_changed(run->cli, "removed snapshot \"%s\" from %s", r->text, run->cli->store_uri);
}

static void removed(struct change_plan *plan, struct change *c)
{
    const struct removing *r = container_of(plan, struct removing, plan);
    char what[FULL_NAME_BYTES + 32];
    say_removed(r, c->run);
    if (!r->settle)
        return;
    snprintf(what, sizeof what, "what was only in %s", r->text);
    snapshot_settle(c, what);
}

/* Whether two texts name snapshots of one volume. */
static bool same_volume(const char *a, const char *b)
{
    size_t len = strcspn(a, "@");
    return len == strcspn(b, "@") && memcmp(a, b, len) == 0;
}

static int remove_all(struct run *run, const struct snapshot_options *o, char **words, int n)
{
    (void)o;
    int status = CLI_DONE;
    for (int i = 0; i < n; i++)
        for (int k = 0; k < i; k++)
            if (strcmp(words[k], words[i]) == 0)
                return cli_usage_error(run->cli, "snapshot \"%.300s\" is named twice", words[i]);
    for (int i = 0; i < n && status == CLI_DONE; i++) {
        struct removing r = {.plan = {.look = look_before_removing,
                                      .made = removed,
                                      .mail = run_mail(MAIL_SNAPSHOT_REMOVE)},
                             .text = words[i],
                             .settle = true};
        /* What the next one holds too would be looked through twice. */
        for (int k = i + 1; k < n; k++)
            r.settle &= !same_volume(words[k], words[i]);
        status = change_volume(run, &r.plan);
        if (status == CLI_DONE && r.plan.over)
            say_removed(&r, run);
        if (status == CLI_DONE && i + 1 < n && interrupted()) {
            cli_error("interrupted before \"%s\"", words[i + 1]);
            status = CLI_FAILED;
        }
    }
    return status;
}

/* --- rename -------------------------------------------------------------------------- */

struct renaming {
    struct change_plan plan;
    const char *text, *to;
    uint64_t epoch;
};

static int look_before_renaming(struct change_plan *plan, struct run *run,
                                struct catalog_entry *entry)
{
    struct renaming *r = container_of(plan, struct renaming, plan);
    char volume[NAME_BYTES_MAX + 1], snapshot[NAME_BYTES_MAX + 1];
    if (plan->attempt > 0 && name_split(r->text, volume, snapshot) &&
        find_again(run, volume, r->to, entry) == ST_OK && entry->snapshot.epoch == r->epoch) {
        plan->over = true;
        return CLI_DONE;
    }
    int status = run_find_snapshot(run, r->text, entry);
    if (status != CLI_DONE)
        return status;
    r->epoch = entry->snapshot.epoch;
    memcpy(plan->mail.name, entry->snapshot.rec.name, sizeof plan->mail.name);
    return CLI_DONE;
}

static int rename_one(struct run *run, const struct snapshot_options *o, char **words, int n)
{
    (void)o;
    (void)n;
    struct renaming r = {
        .plan = {.look = look_before_renaming, .mail = run_mail(MAIL_SNAPSHOT_RENAME)},
        .text = words[0],
        .to = words[1]};
    if (!name_valid(words[1]))
        return cli_usage_error(run->cli,
                               "\"%.140s\" is not a snapshot name (without VOLUME@): 1 to 128 of "
                               "A-Z a-z 0-9 . _ -, the first a letter or digit",
                               words[1]);
    snprintf(r.plan.mail.to, sizeof r.plan.mail.to, "%s", words[1]);
    int status = change_volume(run, &r.plan);
    if (status == CLI_DONE)
        audit_changed(run->cli, "renamed snapshot \"%s\" to \"%s\" in %s", words[0], words[1],
                      run->cli->store_uri);
    return status;
}

/* --- list ---------------------------------------------------------------------------- */

/* A volume's snapshots and, by name, their clones. */
struct listing {
    const struct catalog_entry *volume;
    struct catalog_op snapshots, clones;
};

static void cell(void *arg, size_t row, size_t column, char out[DESCRIBE_CELL_BYTES])
{
    const struct listing *l = arg;
    const struct catalog_snapshot *s = &l->snapshots.snapshots[row];
    char text[24], date[DATE_BYTES];
    size_t clones = 0;
    switch (column) {
    case 0:
        snprintf(out, DESCRIBE_CELL_BYTES, "%s", s->rec.name);
        break;
    case 1:
        snprintf(out, DESCRIBE_CELL_BYTES, "%s", date_format(s->rec.created_ns, date));
        break;
    case 2:
        snprintf(out, DESCRIBE_CELL_BYTES, "%s", cli_size(s->rec.size, text));
        break;
    case 3:
        snprintf(out, DESCRIBE_CELL_BYTES, "%s",
                 cli_size(s->rec.data_blocks * l->volume->header.block_size, text));
        break;
    default:
        for (size_t i = 0; i < l->clones.n_entries; i++)
            clones += l->clones.entries[i].snapshot.epoch == s->epoch;
        snprintf(out, DESCRIBE_CELL_BYTES, "%zu", clones);
    }
}

static json_t *snapshot_json(const struct listing *l, const struct catalog_snapshot *s)
{
    char id[2 * SNAPSHOT_ID_BYTES + 1], created[DATE_BYTES];
    json_t *clones = json_array();
    for (size_t i = 0; i < l->clones.n_entries; i++)
        if (l->clones.entries[i].snapshot.epoch == s->epoch)
            json_array_append_new(clones, json_string(l->clones.entries[i].name));
    for (size_t i = 0; i < SNAPSHOT_ID_BYTES; i++)
        snprintf(id + 2 * i, 3, "%02x", s->rec.id[i]);
    return json_pack("{s:s, s:s, s:s, s:I, s:I, s:I, s:o}", "name", s->rec.name, "id", id,
                     "created", date_format(s->rec.created_ns, created), "size_bytes",
                     (json_int_t)s->rec.size, "used_bytes",
                     (json_int_t)(s->rec.data_blocks * l->volume->header.block_size), "epoch",
                     (json_int_t)s->epoch, "clones", clones);
}

static void show(struct run *run, struct listing *l)
{
    static const char *const titles[] = {"NAME", "CREATED", "SIZE", "USED", "CLONES"};
    size_t n = l->snapshots.n_snapshots;
    if (run->cli->json) {
        json_t *snapshots = json_array();
        for (size_t i = 0; i < n; i++)
            json_array_append_new(snapshots, snapshot_json(l, &l->snapshots.snapshots[i]));
        describe_print(json_pack("{s:s, s:s, s:o}", "store", run->cli->store_uri, "volume",
                                 l->volume->name, "snapshots", snapshots));
        return;
    }
    describe_table(titles, sizeof titles / sizeof *titles, n, cell, l);
    /* On stderr: a script that reads the table gets the table only. */
    fflush(stdout);
    fprintf(stderr, "%zu snapshot%s of volume \"%s\" in %s\n", n, n == 1 ? "" : "s",
            l->volume->name, run->cli->store_uri);
}

static int list(struct run *run, const struct snapshot_options *o, char **words, int n)
{
    (void)o;
    (void)n;
    struct catalog_entry volume;
    int status = run_find(run, words[0], &volume);
    if (status != CLI_DONE)
        return status;
    struct listing l = {.volume = &volume};
    catalog_snapshots(run_op(run), run->store, run->env, volume.branch);
    enum status st = run_wait(run);
    if (st == ST_OK) {
        run_keep(run, &l.snapshots);
        catalog_clones(run_op(run), run->store, run->env, volume.branch, 0);
        st = run_wait(run);
    }
    if (st == ST_OK) {
        run_keep(run, &l.clones);
        show(run, &l);
    } else {
        status = cli_failed(&run->op.err);
    }
    catalog_op_free(&l.snapshots);
    catalog_op_free(&l.clones);
    return status;
}

/* --- rollback ------------------------------------------------------------------------ */

static int roll_back(struct run *run, const struct snapshot_options *o, char **words, int n)
{
    (void)n;
    return snapshot_rollback(run, words[0], o->destroy_newer, o->yes);
}

/* ------------------------------------------------------------------------------------- */

static const struct {
    const char *name, *usage;
    int args_min, args_max;
    enum run_mode mode;
    int (*run)(struct run *run, const struct snapshot_options *o, char **words, int n);
} parts[] = {
    {"create", "VOLUME@SNAPSHOT...", 1, SNAPSHOT_GROUP_MAX, RUN_WRITE, create},
    {"remove", "VOLUME@SNAPSHOT...", 1, SNAPSHOT_GROUP_MAX, RUN_WRITE, remove_all},
    {"list", "VOLUME", 1, 1, RUN_READ, list},
    {"rename", "VOLUME@OLD NEW", 2, 2, RUN_WRITE, rename_one},
    {"rollback", "VOLUME@SNAPSHOT [--destroy-newer] [--yes]", 1, 1, RUN_WRITE, roll_back},
};

static int run_snapshot(struct cli *cli, int argc, char **argv)
{
    struct snapshot_options o = {false, false};
    int first = cli_parse(cli, argc, argv, take, &o);
    if (first < 0)
        return cli->status;
    char **words = argv + first + 1;
    int n = argc - first - 1;
    size_t part = 0, n_parts = sizeof parts / sizeof *parts;
    while (part < n_parts && strcmp(parts[part].name, argv[first]) != 0)
        part++;
    if (part == n_parts)
        return cli_usage_error(
            cli, "snapshot create, remove, list, rename or rollback, not \"%.64s\"", argv[first]);
    if (n < parts[part].args_min || n > parts[part].args_max)
        return cli_usage_error(cli, "too %s arguments, usage: fdb-nbd snapshot %s %s",
                               n < parts[part].args_min ? "few" : "many", parts[part].name,
                               parts[part].usage);
    if ((o.destroy_newer || o.yes) && parts[part].run != roll_back)
        return cli_usage_error(cli, "--%s is for snapshot rollback only",
                               o.yes ? "yes" : "destroy-newer");
    struct run run;
    int status = run_begin(&run, cli, parts[part].mode);
    if (status == CLI_DONE)
        status = parts[part].run(&run, &o, words, n);
    run_end(&run);
    return status;
}

const struct cli_command snapshot_command = {
    .name = "snapshot",
    .args = "create|remove|list|rename|rollback ...",
    .summary = "make, show, remove and go back to snapshots",
    .details =
        "  snapshot create VOLUME@SNAPSHOT...\n"
        "  snapshot remove VOLUME@SNAPSHOT...\n"
        "  snapshot list VOLUME\n"
        "  snapshot rename VOLUME@OLD NEW\n"
        "  snapshot rollback VOLUME@SNAPSHOT [--destroy-newer] [--yes]\n"
        "\n"
        "create: the snapshot holds all that was answered to clients before the command began. "
        "What\n"
        "a file system has in its memory is not in it: sync it or freeze it (fsfreeze) before, or\n"
        "rely on its journal. Of several volumes (up to 64) the snapshots are of one instant, and\n"
        "either all are made or none; clients wait for a moment.\n"
        "\n"
        "remove: refused while it has clones. The space that only the snapshot held is given back "
        "by\n"
        "whichever server has the volume in use; if none has, by this command, which may be\n"
        "interrupted: the next one to use the volume goes on.\n"
        "\n"
        "list: USED is what clients of the snapshot see as data, before compression.\n"
        "\n"
        "rollback: makes the volume what it was; what was written since is lost. Refused while a\n"
        "client uses the volume, and while there are newer snapshots, unless --destroy-newer\n"
        "removes them.\n"
        "\n"
        "A snapshot is read over NBD as the export VOLUME@SNAPSHOT, and becomes a volume of its "
        "own\n"
        "with fdb-nbd clone.",
    .options = options,
    .args_min = 1,
    .args_max = 1 + SNAPSHOT_GROUP_MAX,
    .run = run_snapshot,
};
