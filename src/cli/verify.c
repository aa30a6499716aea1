/*
 * fdb-nbd verify: reads all of a volume and its snapshots, and says what is wrong where.
 *
 * The volume may be in use: it is looked at as it was when the command was started, at a snapshot
 * made for that. What can be repaired is repaired only while nobody uses it, with every change
 * checking that nobody does.
 */
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "cli/change.h"
#include "cli/describe.h"
#include "cli/progress.h"
#include "cli/view.h"
#include "server/reactor.h"
#include "volume/verify.h"

enum { REPAIR = 1 };

/* A volume that changes hands meanwhile is looked at again, so often. */
#define ATTEMPTS_MAX 10

static const struct cli_option options[] = {
    {REPAIR, "repair", NULL, "repair what can be (nobody may use the volume)"},
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

struct verifying {
    struct verify verify;
    struct run *run;
    struct progress progress;
    const struct catalog_entry *entry;
    json_t *findings; /* NULL: they are printed */
    bool damage;      /* bytes of the volume or of a snapshot are lost */
};

static const char *const whats[] = {
    [VERIFY_BLOCK_MISSING] = "block missing",
    [VERIFY_BLOCK_DAMAGED] = "block damaged",
    [VERIFY_BYTES_LOST] = "bytes lost",
    [VERIFY_ROW_MISSING] = "index row missing",
    [VERIFY_ROW_DAMAGED] = "index row damaged",
    [VERIFY_ROW_COUNT] = "wrong count in the index",
    [VERIFY_COUNT] = "wrong count",
    [VERIFY_BLOCK_UNNAMED] = "block that nothing names",
    [VERIFY_ROW_UNNAMED] = "index row that nothing names",
    [VERIFY_RECORD] = "record damaged, or of nothing",
    [VERIFY_UNREADABLE] = "keys can't be listed",
};

static bool go_on(struct verify *verify)
{
    struct verifying *v = container_of(verify, struct verifying, verify);
    v->progress.done = verify->n_bytes;
    return !interrupted();
}

/* "VOLUME@SNAPSHOT", or the volume. The snapshot made for this is the volume, too. */
static void state_name(const struct verifying *v, size_t state, char out[2 * NAME_BYTES_MAX + 2])
{
    const struct verify_state *s = &v->verify.states[state];
    bool volume = s->is_volume || (v->verify.upto && s->epoch == v->verify.upto);
    snprintf(out, 2 * NAME_BYTES_MAX + 2, "%s%s%s", v->entry->name, volume ? "" : "@",
             volume ? "" : s->rec.name);
}

static void found(struct verify *verify, const struct verify_finding *f)
{
    struct verifying *v = container_of(verify, struct verifying, verify);
    char from[2 * NAME_BYTES_MAX + 2] = "", to[2 * NAME_BYTES_MAX + 2] = "";
    bool counted = f->what == VERIFY_ROW_COUNT || f->what == VERIFY_COUNT;
    v->damage |= f->length > 0 && !f->repaired && !counted;
    if (f->first_state != VERIFY_NOBODY) {
        state_name(v, f->first_state, from);
        state_name(v, f->last_state, to);
    }
    if (v->findings) {
        json_t *j = json_pack("{s:s, s:s, s:I, s:b}", "what", whats[f->what], "key", f->key, "keys",
                              (json_int_t)f->n_keys, "repaired", f->repaired);
        if (from[0]) {
            json_object_set_new(j, "first", json_string(from));
            json_object_set_new(j, "last", json_string(to));
        }
        if (f->length) {
            json_object_set_new(j, "offset", json_integer((json_int_t)f->offset));
            json_object_set_new(j, "length", json_integer((json_int_t)f->length));
        }
        if (counted) {
            json_object_set_new(j, "says", json_integer((json_int_t)f->said));
            json_object_set_new(j, "is", json_integer((json_int_t)f->is));
        }
        json_array_append_new(v->findings, j);
        return;
    }
    progress_wipe(&v->progress);
    printf("%s: ", whats[f->what]);
    if (f->length)
        printf("bytes %" PRIu64 " to %" PRIu64 "%s", f->offset, f->offset + f->length - 1,
               from[0] ? " of " : "");
    if (from[0])
        printf("%s", from);
    if (strcmp(from, to) != 0)
        printf(" to %s", to);
    if (counted)
        printf("%s%" PRIu64 " data blocks, says %" PRIu64, f->length || from[0] ? ": " : "", f->is,
               f->said);
    printf("%s%s", f->length || from[0] ? "; " : "", f->key);
    if (f->n_keys > 1)
        printf(" and %" PRIu64 " behind it", f->n_keys - 1);
    puts(f->repaired ? "; repaired" : "");
    fflush(stdout);
}

static void print_result(struct verifying *v)
{
    const struct verify *verify = &v->verify;
    size_t snapshots = 0;
    char bytes[24];
    /* The last state is the volume, be it at the snapshot made for this. */
    for (size_t i = 0; i + 1 < verify->n_states; i++)
        snapshots += !verify->states[i].gone;
    if (v->findings) {
        describe_print(
            json_pack("{s:s, s:s, s:I, s:I, s:I, s:I, s:I, s:I, s:O}", "name", v->entry->name,
                      "store", v->run->cli->store_uri, "snapshots", (json_int_t)snapshots, "blocks",
                      (json_int_t)verify->n_blocks, "bytes", (json_int_t)verify->n_bytes, "rows",
                      (json_int_t)verify->n_rows, "wrong", (json_int_t)verify->n_wrong, "repaired",
                      (json_int_t)verify->n_repaired, "findings", v->findings));
        return;
    }
    printf("read volume \"%s\" and %zu snapshot%s in %s, %s in %" PRIu64 " blocks: ",
           v->entry->name, snapshots, snapshots == 1 ? "" : "s", v->run->cli->store_uri,
           cli_size(verify->n_bytes, bytes), verify->n_blocks);
    if (verify->n_wrong == 0)
        puts("nothing is wrong");
    else if (verify->n_repaired == 0)
        printf("%" PRIu64 " thing%s wrong\n", verify->n_wrong,
               verify->n_wrong == 1 ? " is" : "s are");
    else
        printf("%" PRIu64 " thing%s wrong, %" PRIu64 " repaired\n", verify->n_wrong,
               verify->n_wrong == 1 ? " was" : "s were", verify->n_repaired);
    if (v->damage)
        puts("what is lost can't be repaired, and stays an error to read: overwrite those ranges, "
             "or restore them\nfrom a backup; snapshots have it until they are removed");
}

/* About how much there is to read. */
static uint64_t estimate(struct run *run, const struct catalog_entry *entry)
{
    struct key begin, end;
    uint64_t keys = 0, bytes = 0;
    key_prefix_branch(&begin, 'b', entry->branch);
    end = begin;
    key_prefix_end(&end);
    if (store_usage(run->store, key_slice(&begin), key_slice(&end), &keys, &bytes, NULL) != ST_OK)
        keys = 0;
    return max_u64(keys, entry->state.data_blocks) * entry->header.block_size;
}

/* Verifies it at the snapshot that the entry names, or as it is. Returns the exit status. */
static int verify_at(struct run *run, const struct catalog_entry *entry, bool repair)
{
    struct verifying v = {.verify = {.store = run->store,
                                     .env = run->env,
                                     .run_once = reactor_run_once,
                                     .branch = entry->branch,
                                     .upto = entry->snapshot.epoch,
                                     .repair = repair,
                                     .go_on = go_on,
                                     .found = found},
                          .run = run,
                          .entry = entry,
                          .findings = run->cli->json ? json_array() : NULL};
    struct err e = {0};
    progress_begin(&v.progress, run->env, estimate(run, entry), "verifying %s", entry->name);
    enum status st = verify_run(&v.verify, &e);
    progress_end(&v.progress);
    int status = CLI_DONE;
    if (st == ST_OK) {
        print_result(&v);
        status = v.verify.n_wrong > v.verify.n_repaired ? CLI_FAILED : CLI_DONE;
    } else if (st == ST_SHUTDOWN) {
        status = interrupt_status();
    } else {
        cli_error("cannot verify volume \"%s\" in %s: %s", entry->name, run->cli->store_uri,
                  e.text);
        status = CLI_FAILED;
    }
    verify_free(&v.verify);
    json_decref(v.findings);
    return status;
}

/* As it was just now, whoever uses it. */
static int verify_in_use(struct run *run, struct catalog_entry *entry)
{
    int status = view_snapshot(run, entry);
    if (status != CLI_DONE)
        return status;
    status = verify_at(run, entry, false);
    int dropped = view_drop_snapshot(run, entry);
    return status == CLI_DONE ? dropped : status;
}

/* Has what an owner that died left in its log committed. */
static int recover(struct run *run, const struct catalog_entry *entry)
{
    struct run_owned self = {0};
    struct change c;
    enum status st = change_begin(&c, run, &self, entry);
    struct err e = c.err;
    change_end(&c);
    run_disown(run, &self);
    return st == ST_OK || st == ST_CONFLICT ? CLI_DONE : cli_failed(&e);
}

static int verify_and_repair(struct run *run, const char *name, struct catalog_entry *entry)
{
    struct run_patience patience = {0};
    for (int attempt = 0; attempt < ATTEMPTS_MAX;) {
        enum run_owner state = run_owner_state(run, &entry->owner);
        if (state == OWNER_NONE)
            return verify_at(run, entry, true);
        if (state == OWNER_DEAD) {
            int status = recover(run, entry);
            if (status != CLI_DONE)
                return status;
            attempt++;
        } else if (!run_wait_leaving(run, entry, state, &patience, "")) {
            return CLI_FAILED;
        }
        int status = run_find(run, name, entry);
        if (status != CLI_DONE)
            return status;
    }
    cli_error("volume \"%s\" in %s keeps changing hands: try again", name, run->cli->store_uri);
    return CLI_FAILED;
}

static int run_verify(struct cli *cli, int argc, char **argv)
{
    bool repair = false;
    int first = cli_parse(cli, argc, argv, take, &repair);
    if (first < 0)
        return cli->status;
    struct run run;
    struct catalog_entry entry;
    interrupt_catch();
    int status = run_begin(&run, cli, RUN_WRITE);
    if (status == CLI_DONE)
        status = run_find(&run, argv[first], &entry);
    if (status == CLI_DONE)
        status =
            repair ? verify_and_repair(&run, argv[first], &entry) : verify_in_use(&run, &entry);
    run_end(&run);
    return status;
}

const struct cli_command verify_command = {
    .name = "verify",
    .args = "NAME",
    .summary = "read all of a volume and its snapshots, and say what is wrong",
    .details =
        "Checks every hash, that the index and the blocks agree, and the counts; exit status 1 "
        "where\n"
        "anything is wrong. A volume may be in use: it is looked at as it was when the command "
        "was\n"
        "started, at a snapshot that is removed in the end. --repair sets counts right and clears\n"
        "what nothing names. Blocks that are lost stay an error to read until they are "
        "overwritten.",
    .options = options,
    .args_min = 1,
    .args_max = 1,
    .run = run_verify,
};
