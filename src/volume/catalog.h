/*
 * The catalog: which volumes a store has, and the changes that are not data:
 * create, list, find, rename, remove. Used by the commands and by the server.
 *
 * Everything is asynchronous on one reactor (`env`): operations are structures of the
 * caller's, answered by `done`, never from inside the call. Each change is one
 * store commit under checks, so two commands at once are as one after the other.
 */
#ifndef VOLUME_CATALOG_H
#define VOLUME_CATALOG_H

#include "base/env.h"
#include "base/status.h"
#include "store/store.h"
#include "volume/records.h"

struct session_sight;

/* A snapshot of a volume, as it stands in the store. */
struct catalog_snapshot {
    uint64_t branch, epoch; /* 0: none */
    struct snapshot_record rec;
};

struct catalog_entry {
    char name[NAME_BYTES_MAX + 1];
    uint64_t branch;
    struct catalog_snapshot snapshot; /* found as VOLUME@SNAPSHOT; epoch 0: the volume itself */
    struct header_record header;
    struct state_record state;
    struct owner_record owner; /* token 0 and a zero session where there never was one */
};

struct volume_spec {
    char name[NAME_BYTES_MAX + 1];
    uint64_t size;       /* bytes, a multiple of 512, at least 512, at most 2^62 */
    uint32_t block_size; /* 0: what performs best on the store (limits.body_bytes_best) */
    int codec;           /* enum codec_kind; -1: the default (lz4) */
    int codec_level;     /* zstd: 1..19, 0: the library's default */
    char description[DESCRIPTION_BYTES_MAX + 1];
};

struct catalog_op {
    void (*done)(struct catalog_op *op); /* in */
    enum status st;                      /* out */
    struct err err;                      /* out: a sentence where st is not ST_OK */
    struct catalog_entry *entries;       /* out of find (one) and list; freed by catalog_op_free */
    size_t n_entries;
    struct catalog_snapshot *snapshots;  /* out of snapshots: oldest first; freed as entries are */
    size_t n_snapshots;
    struct meta_record meta;             /* out of prepare */
    uint64_t number;                     /* out of ask_owner: answer_record.number */

    struct store *store; /* the catalog's, from here on */
    struct env *env;
    void *state;
};

/* Frees what an answered operation holds. */
void catalog_op_free(struct catalog_op *op);

/* Makes sure that the store has a meta record ("m") this build can work with: writes one into
 * an empty store where `create`, else ST_NOTFOUND there. ST_FORMAT where an incompatible
 * feature is unknown; who wants to write also asks catalog_may_write(). */
void catalog_prepare(struct catalog_op *op, struct store *store, struct env *env, bool create);

/* Whether this build knows all that a writer of the store must know. */
static inline bool catalog_may_write(const struct meta_record *meta)
{
    return (meta->features.ro_compat & ~FEATURES_RO_COMPAT_KNOWN) == 0;
}

/* Checks a specification, as catalog_create does, before there is a store. ST_INVAL. */
enum status volume_spec_check(const struct volume_spec *spec, struct err *e);

/* Makes a volume. ST_EXISTS, ST_INVAL (name, size, block size, codec), ST_NOSPC. */
void catalog_create(struct catalog_op *op, struct store *store, struct env *env,
                    const struct volume_spec *spec);

/* All volumes, by name. */
void catalog_list(struct catalog_op *op, struct store *store, struct env *env);

/* One volume, or with VOLUME@SNAPSHOT one of its snapshots; ST_NOTFOUND names the store and what
 * similar names it has. */
void catalog_find(struct catalog_op *op, struct store *store, struct env *env, const char *name);

/* ST_NOTFOUND, ST_EXISTS, ST_INVAL. Does not disturb clients of the volume. */
void catalog_rename(struct catalog_op *op, struct store *store, struct env *env, const char *from,
                    const char *to);

/* Takes the name away and leaves the volume's keys to be cleared: one commit, which checks
 * that the owner key is still what `entry` says (the caller made sure nobody serves it).
 * ST_BUSY where it has another owner, ST_NOTFOUND where the name moved. ST_EXISTS where it has
 * snapshots and not `with_snapshots`, or where one of them has clones: the sentence names them.
 * A clone is no longer counted as one by the snapshot it was made from. */
void catalog_remove(struct catalog_op *op, struct store *store, struct env *env,
                    const struct catalog_entry *entry, bool with_snapshots);

/* The same, with its snapshots, and gives its name to the volume that is called `by` until then, all in
 * one commit. ST_NOTFOUND: there is none of that name. */
void catalog_replace(struct catalog_op *op, struct store *store, struct env *env,
                     const struct catalog_entry *entry, const char *by);

/* Marks a volume that nobody has in use, before an import changes it, with the epoch of its newest
 * snapshot: header_record.import_base; 0 takes the mark away. One commit, which checks that owner and
 * epoch are still what `entry` says: ST_BUSY. */
void catalog_mark_import(struct catalog_op *op, struct store *store, struct env *env,
                         const struct catalog_entry *entry, uint64_t base);

/* The snapshots of a volume that are not removed, into op->snapshots; those of all volumes, one
 * after the other, where branch is 0. */
void catalog_snapshots(struct catalog_op *op, struct store *store, struct env *env,
                       uint64_t branch);

/* The clones of a snapshot, by name, into op->entries (name, branch and snapshot.epoch, which is that
 * of the snapshot), those of all snapshots of the branch where epoch is 0. One that is being removed
 * is not there any more. */
void catalog_clones(struct catalog_op *op, struct store *store, struct env *env, uint64_t branch,
                    uint64_t epoch);

/* What a clone was made from, into op->entries (one; its name, branch and snapshot only).
 * ST_NOTFOUND: it is not a clone, or not any more. */
void catalog_parent(struct catalog_op *op, struct store *store, struct env *env,
                    const struct catalog_entry *clone);

/* Makes a volume from a snapshot (`from` as catalog_find gave it): one commit. spec: name,
 * description; the rest is the snapshot's. ST_EXISTS, ST_INVAL, ST_NOTFOUND (the snapshot is gone),
 * ST_NOSPC (a chain of clones as long as ANCESTRY_MAX allows: flatten one). */
void catalog_clone(struct catalog_op *op, struct store *store, struct env *env,
                   const struct catalog_entry *from, const struct volume_spec *spec);

/* Makes a volume what it was at a snapshot (`to` as catalog_find gave it): one commit, which checks
 * that the owner key is still what `to` says (the caller made sure nobody serves it), and takes the
 * volume from its owner. What an owner that died has logged and not committed is dropped.
 * Snapshots that are newer are removed where `destroy_newer`, else they are ST_EXISTS, named; with
 * clones they are ST_EXISTS in any case. ST_BUSY (another owner; a snapshot that was made since `to`
 * was read), ST_NOTFOUND, ST_NOSPC (too many rollbacks that are not cleaned up yet: the volume's
 * next owner does that). */
void catalog_rollback(struct catalog_op *op, struct store *store, struct env *env,
                      const struct catalog_entry *to, bool destroy_newer);

/* `"a", "b" and 7 more`: the names that stand at `first` and every `stride` bytes behind it. */
#define CATALOG_NAMES_BYTES 320u
const char *catalog_names(char out[CATALOG_NAMES_BYTES], const char *first, size_t stride,
                          size_t n);

/* Clears one batch of what removed volumes left; *more tells whether there is more. Resumable
 * at any point, harmless from several processes at once. */
void catalog_clear_removed(struct catalog_op *op, struct store *store, struct env *env, bool *more);

/* Asks the owner of a volume through its mailbox and waits for the answer: ST_OK and what the
 * owner said (err.text), ST_BUSY or what else it answered (refused: err.text says why),
 * ST_UNAVAIL (no answer in `wait_ms`; the request was withdrawn), ST_NOTFOUND (nobody owns
 * it, its owner is dead, or it gave the volume up without an answer). mail->id is chosen
 * here.
 *
 * `sight`: where the owner's session needs heartbeats, what is seen of it while asking goes in
 * there, every SESSION_LOOK_MS at least. The caller's, as long as the operation; NULL: not
 * wanted.
 *
 * `fence`: on a store that knows dead owners only by their silence, waits for as long as that
 * takes where the owner gives no sign of life, and then fences its session: ST_NOTFOUND. */
void catalog_ask_owner(struct catalog_op *op, struct store *store, struct env *env,
                       const struct catalog_entry *entry, const struct mail_record *mail,
                       uint32_t wait_ms, struct session_sight *sight, bool fence);

#endif
