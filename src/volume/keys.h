/*
 * The keys of the stored layout (docs/format.md), and nothing else.
 *
 * Keys are FoundationDB tuples (a one-letter string, then integers), so that
 * fdbcli and every binding can read them and their order is the order of their
 * parts. The same bytes are used on every engine.
 */
#ifndef VOLUME_KEYS_H
#define VOLUME_KEYS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/bytes.h"

#define KEY_BYTES_MAX 192u
#define NAME_BYTES_MAX 128u
#define FULL_NAME_BYTES (2 * NAME_BYTES_MAX + 2) /* VOLUME@SNAPSHOT and its NUL */

struct key {
    uint8_t bytes[KEY_BYTES_MAX];
    size_t len;
};

static inline struct slice key_slice(const struct key *k)
{
    return (struct slice){k->bytes, k->len};
}

void key_store_meta(struct key *k);                       /* ("m") */
void key_branch_counter(struct key *k);                   /* ("c") */
void key_name(struct key *k, const char *name);           /* ("n", NAME) */
void key_header(struct key *k, uint64_t branch);          /* ("h", branch) */
void key_owner(struct key *k, uint64_t branch);           /* ("o", branch) */
void key_state(struct key *k, uint64_t branch);           /* ("a", branch) */
void key_mailbox(struct key *k, uint64_t branch);         /* ("q", branch) */
void key_answer(struct key *k, uint64_t branch);          /* ("r", branch) */
void key_session(struct key *k, const uint8_t id[16]);    /* ("s", ID) */
void key_trash(struct key *k, uint64_t branch, uint64_t n); /* ("t", branch, n) */
void key_removed(struct key *k, uint64_t branch);         /* ("g", branch) */
void key_ancestry(struct key *k, uint64_t branch);        /* ("l", branch) */
void key_snapshot(struct key *k, uint64_t branch, uint64_t epoch); /* ("v", branch, epoch) */
/* ("d", branch, epoch, child): a clone of the snapshot */
void key_child(struct key *k, uint64_t branch, uint64_t epoch, uint64_t child);
/* ("i", branch, level 1|2, row, epoch): all versions of a row stand together, newest last */
void key_row(struct key *k, uint64_t branch, unsigned level, uint64_t row, uint64_t epoch);
void key_block(struct key *k, uint64_t branch, uint64_t epoch, uint64_t block); /* ("b", ...) */

/* The first key behind all keys that begin with the parts of ("t"|"b"|"i"|..., branch ...):
 * turns a key made from leading parts into the exclusive end of their range. */
void key_prefix_end(struct key *k);

/* Leading parts only, as the begin of a range over everything below them. */
void key_prefix(struct key *k, char tag);
void key_prefix_branch(struct key *k, char tag, uint64_t branch);
void key_prefix_rows(struct key *k, uint64_t branch, unsigned level);
void key_prefix_blocks(struct key *k, uint64_t branch, uint64_t epoch);
void key_prefix_children(struct key *k, uint64_t branch, uint64_t epoch);

/* Take a key apart; false where it is not of that form. */
bool key_parse_name(struct slice k, char name[NAME_BYTES_MAX + 1]);
bool key_parse_branch(struct slice k, char tag, uint64_t *branch); /* exactly (tag, branch) */
bool key_parse_trash(struct slice k, uint64_t *branch, uint64_t *n);
bool key_parse_row(struct slice k, uint64_t *branch, unsigned *level, uint64_t *row, uint64_t *epoch);
bool key_parse_block(struct slice k, uint64_t *branch, uint64_t *epoch, uint64_t *block);
bool key_parse_session(struct slice k, uint8_t id[16]);
bool key_parse_snapshot(struct slice k, uint64_t *branch, uint64_t *epoch);
bool key_parse_child(struct slice k, uint64_t *branch, uint64_t *epoch, uint64_t *child);

/* Whether `name` is a volume name: [A-Za-z0-9][A-Za-z0-9._-]{0,127}. */
bool name_valid(const char *name);

/* Takes "VOLUME" or "VOLUME@SNAPSHOT" apart; `snapshot` is "" for the former. False where a part is
 * not a name (the rules are the same for both). */
bool name_split(const char *text, char volume[NAME_BYTES_MAX + 1],
                char snapshot[NAME_BYTES_MAX + 1]);

#endif
