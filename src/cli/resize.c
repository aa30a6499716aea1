/*
 * fdb-nbd resize: another size for a volume.
 *
 * The volume's owner does it, so that its clients' requests and the new size have an
 * order; where there is none, this command becomes the owner for that moment.
 */
#include <stdio.h>

#include "cli/audit.h"
#include "cli/change.h"

enum { SHRINK = 1, YES };

static const struct cli_option options[] = {
    {SHRINK, "shrink", NULL, "make it smaller: what is cut off is lost"},
    {YES, "yes", NULL, "do not ask (needed with --shrink where there is no terminal)"},
    {0, NULL, NULL, NULL},
};

struct resize_options {
    bool shrink, yes;
};

static enum status take(void *arg, int code, const char *value, struct err *e)
{
    struct resize_options *o = arg;
    (void)value;
    (void)e;
    *(code == SHRINK ? &o->shrink : &o->yes) = true;
    return ST_OK;
}

struct resizing {
    struct change_plan plan;
    const char *name;
    uint64_t size, old;
    const struct resize_options *o;
    bool confirmed;
};

static int look(struct change_plan *plan, struct run *run, struct catalog_entry *entry)
{
    struct resizing *r = container_of(plan, struct resizing, plan);
    char was[24], is[24];
    int status = run_find(run, r->name, entry);
    if (status != CLI_DONE)
        return status;
    r->old = entry->header.size;
    if (r->size == r->old) {
        printf("volume \"%s\" in %s has %s already\n", r->name, run->cli->store_uri,
               cli_size(r->size, is));
        plan->over = true;
        return CLI_DONE;
    }
    if (r->size < r->old && !r->o->shrink) {
        cli_error("volume \"%s\" in %s has %s: making it smaller loses what is cut off, and needs "
                  "--shrink",
                  r->name, run->cli->store_uri, cli_size(r->old, was));
        return CLI_FAILED;
    }
    if (r->size < r->old && !r->confirmed) {
        char what[NAME_BYTES_MAX + 128];
        snprintf(what, sizeof what, "cuts volume \"%s\" from %s to %s and loses what lies behind",
                 r->name, cli_size(r->old, was), cli_size(r->size, is));
        if (!cli_confirm(false, what))
            return CLI_FAILED;
        r->confirmed = true;
    }
    return CLI_DONE;
}

static int resize(struct run *run, const char *name, uint64_t size, const struct resize_options *o)
{
    struct resizing r = {.plan = {.look = look, .mail = run_mail(MAIL_RESIZE)},
                         .name = name,
                         .size = size,
                         .o = o,
                         .confirmed = o->yes};
    char was[24], is[24];
    r.plan.mail.size = size;
    r.plan.mail.shrink = o->shrink;
    int status = change_volume(run, &r.plan);
    if (status == CLI_DONE && !r.plan.over)
        audit_changed(run->cli, "resized volume \"%s\" in %s from %s to %s", name,
                      run->cli->store_uri, cli_size(r.old, was), cli_size(size, is));
    return status;
}

static int run_resize(struct cli *cli, int argc, char **argv)
{
    struct resize_options o = {false, false};
    struct err e = {0};
    int first = cli_parse(cli, argc, argv, take, &o);
    if (first < 0)
        return cli->status;
    /* The same rules as for a new volume. */
    struct volume_spec spec = {.name = "any", .codec = -1};
    if (cli_parse_size(argv[first + 1], &spec.size, &e) != ST_OK ||
        volume_spec_check(&spec, &e) != ST_OK)
        return cli_failed(&e);
    struct run run;
    int status = run_begin(&run, cli, RUN_WRITE);
    if (status == CLI_DONE)
        status = resize(&run, argv[first], spec.size, &o);
    run_end(&run);
    return status;
}

const struct cli_command resize_command = {
    .name = "resize",
    .args = "NAME SIZE",
    .summary = "make a volume larger, or smaller with --shrink",
    .details =
        "Works while the volume is in use; clients see the new size when they connect again\n"
        "or ask for it. Space gained reads as zeros.",
    .options = options,
    .args_min = 2,
    .args_max = 2,
    .run = run_resize,
};
