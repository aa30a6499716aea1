/* fdb-nbd store: about the store itself, switching new features on, and copying it. */
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "base/date.h"
#include "cli/describe.h"
#include "cli/progress.h"

#define LOOK_MS 50u

static void format_uuid(const uint8_t uuid[16], char out[33])
{
    for (int i = 0; i < 16; i++)
        snprintf(out + 2 * i, 3, "%02x", uuid[i]);
}

static int info(struct run *run)
{
    struct store_info s;
    struct err e = {0};
    const struct meta_record *m = &run->meta;
    char uuid[33], created[DATE_BYTES], a[24];
    if (store_info(run->store, &s, &e) != ST_OK)
        return cli_failed(&e);
    catalog_list(run_op(run), run->store, run->env);
    if (run_wait(run) != ST_OK)
        return cli_failed(&run->op.err);
    size_t volumes = run->op.n_entries;
    format_uuid(m->uuid, uuid);
    date_format(m->created_ns, created);
    if (run->cli->json) {
        describe_print(json_pack(
            "{s:s, s:s, s:o, s:i, s:{s:I, s:I, s:I}, s:s, s:s, s:I, s:o, s:o, s:o}", "uri", s.uri,
            "engine", s.engine, "state", s.state[0] ? json_string(s.state) : json_null(), "format",
            (int)m->format, "features", "compat",
            (json_int_t)m->features.compat, "ro_compat", (json_int_t)m->features.ro_compat,
            "incompat", (json_int_t)m->features.incompat, "uuid", uuid, "created", created,
            "volumes", (json_int_t)volumes, "bytes_used", describe_bytes_json(s.bytes_used),
            "bytes_free", describe_bytes_json(s.bytes_free), "bytes_available",
            describe_bytes_json(s.bytes_available)));
        return CLI_DONE;
    }
    printf("uri:        %s\n", s.uri);
    printf("engine:     %s\n", s.engine);
    printf("state:      %s\n", s.state[0] ? s.state : "works");
    printf("format:     %u, features compat %#" PRIx64 " ro_compat %#" PRIx64 " incompat %#" PRIx64
           "\n",
           m->format, m->features.compat, m->features.ro_compat, m->features.incompat);
    printf("uuid:       %s\n", uuid);
    printf("created:    %s\n", created);
    printf("volumes:    %zu\n", volumes);
    printf("used:       %s\n", describe_bytes(s.bytes_used, a));
    printf("free:       %s (inside the store's files)\n", describe_bytes(s.bytes_free, a));
    printf("available:  %s (it could grow by)\n", describe_bytes(s.bytes_available, a));
    return CLI_DONE;
}

/* run_begin() has refused stores with features unknown here, so a difference would be
 * features that this version brings; it brings none. */
static int upgrade(struct run *run)
{
    printf("%s has format %u and every feature this version knows: there is nothing to do\n",
           run->cli->store_uri, run->meta.format);
    return CLI_DONE;
}

struct backing_up {
    struct env_work work;
    struct store *store;
    struct store_backup backup;
    enum status st;
    struct err err;
    bool done;
};

static bool go_on(struct store_backup *backup)
{
    (void)backup;
    return !interrupted();
}

static void backup_work(struct env_work *work)
{
    struct backing_up *b = container_of(work, struct backing_up, work);
    b->st = store_backup(b->store, &b->backup, &b->err);
}

static void backup_done(struct env_work *work)
{
    container_of(work, struct backing_up, work)->done = true;
}

static int backup(struct run *run, const char *dir)
{
    struct backing_up b = {.work = {.work = backup_work, .done = backup_done, .env = run->env},
                           .store = run->store,
                           .backup = {.to = dir, .progress = go_on}};
    struct progress progress;
    char size[24];
    interrupt_catch();
    progress_begin(&progress, run->env, 0, "copying to %.100s", dir);
    env_work(run->env, &b.work);
    while (!b.done) {
        run_pause(run, LOOK_MS);
        progress.total = atomic_load(&b.backup.total_bytes);
        progress.done = atomic_load(&b.backup.done_bytes);
    }
    progress_end(&progress);
    if (b.st == ST_UNSUP) {
        cli_error("store backup copies embedded stores: back a FoundationDB cluster up with "
                  "fdbbackup, as docs/foundationdb.md describes");
        return CLI_FAILED;
    }
    if (b.st == ST_SHUTDOWN) {
        cli_error("interrupted: there is no backup in %s", dir);
        return CLI_FAILED;
    }
    if (b.st != ST_OK) {
        cli_failed(&b.err);
        return CLI_FAILED;
    }
    printf("copied %s to %s (%s of data): --store lmdb:%s\n", run->cli->store_uri, dir,
           cli_size(atomic_load(&b.backup.done_bytes), size), dir);
    if (b.backup.n_damaged == 0)
        return CLI_DONE;
    fflush(stdout);
    cli_error("%llu things in %s are damaged, and are so in the copy: verify the volumes of both",
              (unsigned long long)b.backup.n_damaged, run->cli->store_uri);
    return CLI_FAILED;
}

static int run_store(struct cli *cli, int argc, char **argv)
{
    int first = cli_parse(cli, argc, argv, NULL, NULL);
    if (first < 0)
        return cli->status;
    const char *what = argv[first], *dir = argc > first + 1 ? argv[first + 1] : NULL;
    bool upgrading = strcmp(what, "upgrade") == 0, copying = strcmp(what, "backup") == 0;
    if (!upgrading && !copying && strcmp(what, "info") != 0)
        return cli_usage_error(cli, "store info, store upgrade or store backup DIR, not \"%s\"",
                               what);
    if (copying && !dir)
        return cli_usage_error(cli, "store backup needs a folder to copy to");
    if (!copying && dir)
        return cli_usage_error(cli, "store %s takes no more arguments", what);
    struct run run;
    int status = run_begin(&run, cli, upgrading ? RUN_WRITE : RUN_READ);
    if (status == CLI_DONE)
        status = upgrading ? upgrade(&run) : copying ? backup(&run, dir) : info(&run);
    run_end(&run);
    return status;
}

const struct cli_command store_command = {
    .name = "store",
    .args = "info|upgrade|backup DIR",
    .summary = "show the store; switch on what a new version brings; copy it",
    .details =
        "backup copies an embedded store that may be in use to a new folder: all volumes, with every\n"
        "write that was answered before the command was started. Until it ends, space that writes\n"
        "free is not used again. The copy is made in DIR.partial; of one that was interrupted\n"
        "nothing is kept. It is a store like any other: --store lmdb:DIR. What is there is copied as\n"
        "it is, and not verified: fdb-nbd verify tells of each volume whether it is whole.",
    .args_min = 1,
    .args_max = 2,
    .run = run_store,
};
