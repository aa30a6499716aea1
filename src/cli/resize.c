/*
 * fdb-nbd resize: another size for a volume.
 *
 * The volume's owner does it, so that its clients' requests and the new size have an
 * order; where there is none, this command becomes the owner for that moment.
 */
#include <stdio.h>
#include <string.h>

#include "cli/run.h"
#include "volume/volume.h"

/* A volume that changes hands meanwhile is looked up again, so often. */
#define ATTEMPTS_MAX 10

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
    struct vol_io io;
    bool done;
};

static void resized(struct vol_io *io)
{
    container_of(io, struct resizing, io)->done = true;
}

/* As the owner. ST_PERM, ST_BUSY, ST_CONFLICT: somebody else was faster. */
static enum status resize_here(struct run *run, const struct catalog_entry *entry, uint64_t size,
                               bool shrink)
{
    struct run_owned owned;
    enum status st = run_own(run, entry, &owned);
    if (st != ST_OK)
        return st;
    struct resizing r = {.io = {.done = resized}};
    volume_resize(owned.vol, &r.io, size, shrink);
    run_until(run, &r.done);
    run_disown(run, &owned);
    if (r.io.st != ST_OK)
        fail(&run->op.err, r.io.st, "cannot resize volume \"%s\" in %s: %s", entry->name,
             run->cli->store_uri, status_text(r.io.st));
    return r.io.st;
}

static enum status resize_once(struct run *run, const struct catalog_entry *entry, uint64_t size,
                               bool shrink)
{
    switch (run_owner_state(run, &entry->owner)) {
    case OWNER_NONE:
    case OWNER_DEAD: {
        enum status st = resize_here(run, entry, size, shrink);
        return st == ST_PERM || st == ST_BUSY ? ST_CONFLICT : st;
    }
    default: {
        /* Gone while we asked: somebody else's turn, perhaps ours. */
        enum status st = run_ask(run, entry, MAIL_RESIZE, size, shrink);
        return st == ST_NOTFOUND ? ST_CONFLICT : st;
    }
    }
}

static int resize(struct run *run, const char *name, uint64_t size, const struct resize_options *o)
{
    struct catalog_entry entry;
    char was[24], is[24];
    bool confirmed = o->yes;
    for (int attempt = 0; attempt < ATTEMPTS_MAX; attempt++) {
        int status = run_find(run, name, &entry);
        if (status != CLI_DONE)
            return status;
        uint64_t old = entry.header.size;
        if (size == old) {
            printf("volume \"%s\" in %s has %s already\n", name, run->cli->store_uri,
                   cli_size(size, is));
            return CLI_DONE;
        }
        if (size < old && !o->shrink) {
            cli_error("volume \"%s\" in %s has %s: making it smaller loses what is cut off, and "
                      "needs --shrink",
                      name, run->cli->store_uri, cli_size(old, was));
            return CLI_FAILED;
        }
        if (size < old && !confirmed) {
            char what[NAME_BYTES_MAX + 128];
            snprintf(what, sizeof what,
                     "cuts volume \"%s\" from %s to %s and loses what lies behind", name,
                     cli_size(old, was), cli_size(size, is));
            if (!cli_confirm(false, what))
                return CLI_FAILED;
            confirmed = true;
        }
        enum status st = resize_once(run, &entry, size, o->shrink);
        if (st == ST_OK) {
            printf("resized volume \"%s\" in %s from %s to %s\n", name, run->cli->store_uri,
                   cli_size(old, was), cli_size(size, is));
            return CLI_DONE;
        }
        if (st != ST_CONFLICT) {
            cli_failed(&run->op.err);
            return CLI_FAILED;
        }
    }
    cli_error("volume \"%s\" in %s keeps changing hands: try again", name, run->cli->store_uri);
    return CLI_FAILED;
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
