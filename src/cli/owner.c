/*
 * fdb-nbd owner: which server has a volume in use, and taking it from that one.
 *
 * An owner is asked first, through its mailbox. One that is alive but has not answered
 * for longer than its lease is ended where the engine can do that (it can't be fenced by
 * waiting there); its other volumes are taken over by whoever is asked for them next. On
 * stores with heartbeats one that gives no sign of life for its lease is fenced instead.
 */
#include <stdio.h>
#include <string.h>

#include "base/date.h"
#include "cli/audit.h"
#include "cli/describe.h"

enum { YES = 1 };

static const struct cli_option options[] = {
    {YES, "yes", NULL, "evict: do not ask (needed where there is no terminal)"},
    {0, NULL, NULL, NULL},
};

static enum status take(void *arg, int code, const char *value, struct err *e)
{
    (void)code;
    (void)value;
    (void)e;
    *(bool *)arg = true;
    return ST_OK;
}

static int show(struct run *run, const struct catalog_entry *entry)
{
    const struct owner_record *o = &entry->owner;
    enum run_owner state = run_owner_wait(run, o);
    static const char *const alive[] = {
        [OWNER_ALIVE] = "yes", [OWNER_DEAD] = "no", [OWNER_UNKNOWN] = "unknown"};
    char since[DATE_BYTES];
    if (run->cli->json) {
        describe_print(json_pack("{s:s, s:o, s:s}", "name", entry->name, "owner",
                                 describe_owner_json(state, o), "store", run->cli->store_uri));
    } else if (state == OWNER_NONE) {
        printf("nobody has volume \"%s\" in %s in use\n", entry->name, run->cli->store_uri);
    } else {
        printf("host:     %s\n", o->host);
        printf("pid:      %u\n", o->pid);
        printf("address:  %s\n", o->address);
        printf("since:    %s\n", date_format(o->since_ns, since));
        printf("alive:    %s\n", alive[state]);
    }
    return CLI_DONE;
}

static int evict(struct run *run, const struct catalog_entry *entry, bool yes)
{
    enum run_owner state = run_owner_state(run, &entry->owner);
    if (state == OWNER_NONE || state == OWNER_DEAD) {
        printf("volume \"%s\" in %s is free: %s\n", entry->name, run->cli->store_uri,
               state == OWNER_DEAD ? "the server that had it is dead" : "nobody has it in use");
        return CLI_DONE;
    }
    char what[NAME_BYTES_MAX + 2 * HOST_BYTES_MAX];
    snprintf(what, sizeof what, "cuts off the clients of volume \"%s\" on %s (pid %u)", entry->name,
             entry->owner.host, entry->owner.pid);
    if (!cli_confirm(yes, what))
        return CLI_FAILED;
    enum status st = run_evict(run, entry);
    if (st != ST_OK && st != ST_NOTFOUND) {
        cli_failed(&run->op.err);
        return CLI_FAILED;
    }
    audit_changed(run->cli, "evicted volume \"%s\" in %s, which is free", entry->name,
                  run->cli->store_uri);
    return CLI_DONE;
}

static int run_owner(struct cli *cli, int argc, char **argv)
{
    bool yes = false;
    int first = cli_parse(cli, argc, argv, take, &yes);
    if (first < 0)
        return cli->status;
    const char *what = argv[first], *name = argv[first + 1];
    bool evicting = strcmp(what, "evict") == 0;
    if (!evicting && strcmp(what, "show") != 0)
        return cli_usage_error(cli, "owner show NAME or owner evict NAME, not \"%s\"", what);
    struct run run;
    struct catalog_entry entry;
    int status = run_begin(&run, cli, evicting ? RUN_WRITE : RUN_READ);
    if (status == CLI_DONE)
        status = run_find(&run, name, &entry);
    if (status == CLI_DONE)
        status = evicting ? evict(&run, &entry, yes) : show(&run, &entry);
    run_end(&run);
    return status;
}

const struct cli_command owner_command = {
    .name = "owner",
    .args = "show|evict NAME",
    .summary = "show which server has a volume in use; take it away",
    .details =
        "evict asks the server to commit everything and let go, which cuts off its clients.\n"
        "A server that does not answer within 30 s is ended; in a store that many hosts share one\n"
        "that gives no sign of life for its lease is cut off from the volumes it had.",
    .options = options,
    .args_min = 2,
    .args_max = 2,
    .run = run_owner,
};
