/* fdb-nbd store: about the store itself, and switching new features on. */
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "base/date.h"
#include "cli/describe.h"

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

static int run_store(struct cli *cli, int argc, char **argv)
{
    int first = cli_parse(cli, argc, argv, NULL, NULL);
    if (first < 0)
        return cli->status;
    bool upgrading = strcmp(argv[first], "upgrade") == 0;
    if (!upgrading && strcmp(argv[first], "info") != 0)
        return cli_usage_error(cli, "store info or store upgrade, not \"%s\"", argv[first]);
    struct run run;
    int status = run_begin(&run, cli, upgrading ? RUN_WRITE : RUN_READ);
    if (status == CLI_DONE)
        status = upgrading ? upgrade(&run) : info(&run);
    run_end(&run);
    return status;
}

const struct cli_command store_command = {
    .name = "store",
    .args = "info|upgrade",
    .summary = "show the store; switch on what a new version brings",
    .args_min = 1,
    .args_max = 1,
    .run = run_store,
};
