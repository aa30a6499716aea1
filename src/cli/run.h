/*
 * A command's store and reactor: opens them, and turns asynchronous operations
 * into ones that are waited for. For commands that come and go; the server runs
 * its reactors itself.
 */
#ifndef CLI_RUN_H
#define CLI_RUN_H

#include "cli/cli.h"
#include "store/store.h"
#include "volume/catalog.h"
#include "volume/session.h"

struct reactor;
struct shard;
struct volume;

/* What is known of the session in an owner record. UNKNOWN: only time can tell. */
enum run_owner { OWNER_NONE, OWNER_ALIVE, OWNER_DEAD, OWNER_UNKNOWN };

struct run {
    struct cli *cli;
    struct reactor *reactor;
    struct env *env;
    struct store *store;
    struct meta_record meta;
    struct catalog_op op; /* the one in progress, or the last; run_op() starts over */
    bool answered;
    bool background; /* what is read of volumes may wait while others are busy; before run_own() */
    struct session_sight sight; /* of the session that was looked at last */
    uint64_t sighted_ns;         /* ... and when */
    enum run_owner sighted;
};

enum run_mode {
    RUN_READ,   /* looks only */
    RUN_WRITE,  /* changes a store that is there */
    RUN_CREATE, /* makes the store where it is not there */
};

/* Opens the store that the command line names and checks its format. On failure prints why
 * and returns the exit status, CLI_DONE else. In any case run_end() follows. */
int run_begin(struct run *run, struct cli *cli, enum run_mode mode);
void run_end(struct run *run);

/* For one operation of the catalog: give run_op() to the catalog's function, then wait. */
struct catalog_op *run_op(struct run *run);
enum status run_wait(struct run *run);
/* Moves what the last operation found to `to`, the caller's to free. */
void run_keep(struct run *run, struct catalog_op *to);

/* Finds a volume; *entry is a copy. On failure prints why and returns the exit status. */
int run_find(struct run *run, const char *name, struct catalog_entry *entry);
/* The same for VOLUME@SNAPSHOT, and for either. */
int run_find_snapshot(struct run *run, const char *name, struct catalog_entry *entry);
int run_find_either(struct run *run, const char *name, struct catalog_entry *entry);

/* Lets the loop turn until *done. */
void run_until(struct run *run, const bool *done);

/* Runs work(arg) on a worker thread and lets the loop turn until it is over: for what blocks (files),
 * while sessions have to be kept alive. */
void run_aside(struct run *run, void (*work)(void *arg), void *arg);

/* Gives back the space of removed volumes. Returns the exit status. */
int run_clear_removed(struct run *run);

/* Lets `ms` pass. */
void run_pause(struct run *run, uint32_t ms);

/* What is known at once of an owner. */
enum run_owner run_owner_state(struct run *run, const struct owner_record *owner);

/* The same, but where only time can tell waits for a sign of life, for as long as one that lives
 * needs at most to give one. UNKNOWN: there was none. */
enum run_owner run_owner_wait(struct run *run, const struct owner_record *owner);

/* A server commits what it holds before it answers: that may take a while. */
#define RUN_ASK_WAIT_MS 30000u

/* A request to an owner, as this command sends it. */
struct mail_record run_mail(enum mail_kind kind);

/* A server whose last client has just left commits what it holds before it lets go: for how long a
 * command has waited for that. All zeros at first. */
struct run_patience {
    uint32_t waited_ms;
    bool called;
};

/* Somebody has a volume in use, and this is to be done when nobody has: waits for a moment, after
 * which the volume is to be looked up again. False: for long enough; it is printed who has it, and
 * `advice` with that. `state`: what is known of the owner. */
bool run_wait_leaving(struct run *run, const struct catalog_entry *entry, enum run_owner state,
                      struct run_patience *patience, const char *advice);

/* Asks the owner of a volume, which may live, for something that takes no more words, and waits:
 * as catalog_ask_owner, one that gives no sign of life being fenced where that is the way. */
enum status run_ask(struct run *run, const struct catalog_entry *entry, enum mail_kind kind);

/* Has the owner of a volume, which may live, cut its clients off and let go. ST_OK: it did, and the
 * volume is free unless somebody took it meanwhile. ST_NOTFOUND: the owner is dead, fenced or
 * gone, or it gave no answer and was ended, which is printed; whose the volume is has to be looked
 * up again. Else run->op.err says why not. */
enum status run_evict(struct run *run, const struct catalog_entry *entry);

/* A command that changes volumes itself: a session, a shard without a log (NULL: not begun), and
 * the volume that is open on it, or NULL. */
struct run_owned {
    struct session session;
    struct shard *shard;
    struct volume *vol;
};

/* Registers this process as a session and opens the volume, which nobody has in use (NULL:
 * none). On failure prints nothing, leaves why in run->op.err, and nothing to be undone. */
enum status run_own(struct run *run, const struct catalog_entry *entry, struct run_owned *owned);

/* The same for a volume that this command imports into; it may be marked (catalog_mark_import). */
enum status run_own_marked(struct run *run, const struct catalog_entry *entry,
                           struct run_owned *owned);

/* Opens a volume (or a snapshot of it, where the entry names one) on a shard. On failure leaves why in
 * run->op.err. */
enum status run_open(struct run *run, struct shard *shard, const struct catalog_entry *entry,
                     struct volume **vol);
/* Closes it, and waits until it is given back. */
void run_close(struct run *run, struct volume *vol);

/* Closes what is open and takes the session away, if there is one. */
void run_disown(struct run *run, struct run_owned *owned);

#endif
