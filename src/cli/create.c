/* fdb-nbd create: makes a volume, and the store where there is none. */
#include <stdio.h>
#include <string.h>

#include "cli/audit.h"
#include "cli/run.h"

enum { BLOCK_SIZE = 1, COMPRESSION, DESCRIPTION };

static const struct cli_option options[] = {
    {BLOCK_SIZE, "block-size", "SIZE",
     "4K, 8K, 16K, 32K or 64K (default: what is best on the store; lmdb: 16K)"},
    {COMPRESSION, "compression", "CODEC", "none, lz4, zstd or zstd:LEVEL, 1 to 19 (default: lz4)"},
    {DESCRIPTION, "description", "TEXT", "shown to clients and by info (default: none)"},
    {0, NULL, NULL, NULL},
};

static enum status parse_codec(const char *text, struct volume_spec *spec, struct err *e)
{
    uint64_t level;
    if (strcmp(text, "none") == 0)
        spec->codec = CODEC_NONE;
    else if (strcmp(text, "lz4") == 0)
        spec->codec = CODEC_LZ4;
    else if (strncmp(text, "zstd", 4) == 0 && (text[4] == '\0' || text[4] == ':'))
        spec->codec = CODEC_ZSTD;
    else
        return fail(e, ST_INVAL, "\"%.64s\" is none of none, lz4, zstd, zstd:LEVEL", text);
    if (strncmp(text, "zstd:", 5) == 0) {
        if (cli_parse_number(text + 5, 1, 19, &level, e) != ST_OK)
            return ST_INVAL;
        spec->codec_level = (int)level;
    }
    return ST_OK;
}

static enum status take(void *arg, int code, const char *value, struct err *e)
{
    struct volume_spec *spec = arg;
    uint64_t size;
    switch (code) {
    case BLOCK_SIZE:
        if (cli_parse_size(value, &size, e) != ST_OK)
            return ST_INVAL;
        if (size < 4096 || size > 65536 || (size & (size - 1)) != 0)
            return fail(e, ST_INVAL, "a block has 4K, 8K, 16K, 32K or 64K, not %.64s", value);
        spec->block_size = (uint32_t)size;
        return ST_OK;
    case COMPRESSION:
        return parse_codec(value, spec, e);
    default:
        return cli_parse_description(value, spec->description, e);
    }
}

static int run_create(struct cli *cli, int argc, char **argv)
{
    struct volume_spec spec = {.codec = -1};
    struct err e = {0};
    int first = cli_parse(cli, argc, argv, take, &spec);
    if (first < 0)
        return cli->status;
    const char *name = argv[first];
    /* One byte more than a name has: too long stays too long. */
    if (strlen(name) > NAME_BYTES_MAX)
        return cli_usage_error(cli, "a volume's name has at most %u characters", NAME_BYTES_MAX);
    strcpy(spec.name, name);
    if (cli_parse_size(argv[first + 1], &spec.size, &e) != ST_OK ||
        volume_spec_check(&spec, &e) != ST_OK)
        return cli_failed(&e);

    struct run run;
    int status = run_begin(&run, cli, RUN_CREATE);
    if (status == CLI_DONE) {
        catalog_create(run_op(&run), run.store, run.env, &spec);
        if (run_wait(&run) != ST_OK) {
            status = cli_failed(&run.op.err);
        } else {
            char size[24];
            audit_changed(cli, "created volume \"%s\" of %s in %s", spec.name,
                          cli_size(spec.size, size), cli->store_uri);
        }
    }
    run_end(&run);
    return status;
}

const struct cli_command create_command = {
    .name = "create",
    .args = "NAME SIZE",
    .summary = "make a volume",
    .details =
        "NAME has 1 to 128 of A-Z a-z 0-9 . _ -, the first a letter or digit. SIZE is like\n"
        "10G, 512M, 1.5T (powers of 1024) or a number of bytes, a multiple of 512. A volume\n"
        "takes space for what is written to it only. The store is made if it is not there.",
    .options = options,
    .args_min = 2,
    .args_max = 2,
    .run = run_create,
};
