/* fdb-nbd info: all about one volume. */
#include <stdio.h>

#include "base/date.h"
#include "cli/describe.h"
#include "volume/keys.h"

/* What the volume's blocks take in the store, after compression. */
static enum status stored_bytes(struct run *run, uint64_t branch, uint64_t *bytes, struct err *e)
{
    struct key begin, end;
    uint64_t keys;
    key_prefix_branch(&begin, 'b', branch);
    end = begin;
    key_prefix_end(&end);
    return store_usage(run->store, key_slice(&begin), key_slice(&end), &keys, bytes, e);
}

/* What is said of a volume beside its own records. */
struct about {
    uint64_t stored;
    size_t n_snapshots;
    char parent[FULL_NAME_BYTES];
};

static enum status look_about(struct run *run, const struct catalog_entry *entry,
                              struct about *about, struct err *e)
{
    *about = (struct about){0};
    enum status st = stored_bytes(run, entry->branch, &about->stored, e);
    if (st != ST_OK)
        return st;
    catalog_snapshots(run_op(run), run->store, run->env, entry->branch);
    st = run_wait(run);
    about->n_snapshots = run->op.n_snapshots;
    if (st == ST_OK && entry->header.parent_branch) {
        catalog_parent(run_op(run), run->store, run->env, entry);
        st = run_wait(run);
        if (st == ST_OK)
            describe_snapshot(run->op.entries[0].name, run->op.entries[0].snapshot.rec.name,
                              about->parent);
        else if (st == ST_NOTFOUND)
            st = ST_OK; /* not a clone any more */
    }
    *e = run->op.err;
    return st;
}

static void print_text(struct run *run, const struct catalog_entry *entry,
                       const struct about *about)
{
    const struct header_record *h = &entry->header;
    const struct owner_record *o = &entry->owner;
    char a[24], b[DATE_BYTES], owner[HOST_BYTES_MAX + 16];
    enum run_owner state = run_owner_state(run, o);
    printf("name:         %s\n", entry->name);
    if (h->description[0])
        printf("description:  %s\n", h->description);
    printf("size:         %s (%llu bytes)\n", cli_size(h->size, a), (unsigned long long)h->size);
    printf("used:         %s\n", cli_size(entry->state.data_blocks * h->block_size, a));
    printf("stored:       %s\n", describe_bytes(about->stored, a));
    printf("block size:   %s\n", cli_size(h->block_size, a));
    printf("compression:  %s\n", cli_codec(h->codec, h->codec_level, a));
    printf("snapshots:    %zu\n", about->n_snapshots);
    if (about->parent[0])
        printf("clone of:     %s\n", about->parent);
    printf("created:      %s\n", date_format(h->created_ns, b));
    printf("epoch:        %llu\n", (unsigned long long)h->epoch);
    printf("generation:   %llu\n", (unsigned long long)entry->state.generation);
    if (state == OWNER_NONE)
        printf("owner:        nobody\n");
    else
        printf("owner:        %s, %s, since %s\n", describe_owner(state, o, owner), o->address,
               date_format(o->since_ns, b));
    printf("store:        %s\n", run->cli->store_uri);
}

static void print_json(struct run *run, const struct catalog_entry *entry,
                       const struct about *about)
{
    json_t *json = describe_volume_json(run, entry, about->n_snapshots, about->parent);
    json_object_set_new(json, "stored_bytes", describe_bytes_json(about->stored));
    json_object_set_new(json, "epoch", json_integer((json_int_t)entry->header.epoch));
    json_object_set_new(json, "generation", json_integer((json_int_t)entry->state.generation));
    json_object_set_new(json, "branch", json_integer((json_int_t)entry->branch));
    json_object_set_new(json, "store", json_string(run->cli->store_uri));
    describe_print(json);
}

static int run_info(struct cli *cli, int argc, char **argv)
{
    int first = cli_parse(cli, argc, argv, NULL, NULL);
    if (first < 0)
        return cli->status;
    struct run run;
    struct catalog_entry entry;
    int status = run_begin(&run, cli, RUN_READ);
    if (status == CLI_DONE)
        status = run_find(&run, argv[first], &entry);
    if (status == CLI_DONE) {
        struct about about;
        struct err e = {0};
        if (look_about(&run, &entry, &about, &e) != ST_OK)
            status = cli_failed(&e);
        else if (cli->json)
            print_json(&run, &entry, &about);
        else
            print_text(&run, &entry, &about);
    }
    run_end(&run);
    return status;
}

const struct cli_command info_command = {
    .name = "info",
    .args = "NAME",
    .summary = "show all about one volume",
    .details =
        "used: what clients see as data. stored: what it takes in the store, compressed, which\n"
        "the store may estimate.",
    .args_min = 1,
    .args_max = 1,
    .run = run_info,
};
