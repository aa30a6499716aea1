/*
 * The access file: which clients may open which volumes.
 *
 * A line grants something; nothing else does. docs/access.md is the manual.
 *
 *     # CLIENT              RIGHT  VOLUMES
 *     user:backup           ro     *
 *     address:10.1.0.0/16   ro     images-*
 *     cn:vm-host-7          rw     vm7-* scratch
 *     psk:alice             rw     alice
 *     any                   ro     install@released
 *
 * The grants of all lines that fit a client add up, so no line takes anything away and their order
 * does not matter: each can be read, added and removed by itself, and a line too few shows at once
 * (somebody is kept out) while a line in the wrong place can't let anybody in. First match, which
 * needs rules that refuse, has both the other way round.
 *
 * Rules are immutable once parsed and counted, so each lane holds its own reference.
 */
#ifndef SERVER_ACCESS_H
#define SERVER_ACCESS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/status.h"
#include "server/peer.h"

#define ACCESS_BYTES_MAX (1u << 20)
#define ACCESS_LINE_BYTES_MAX 4096u
#define ACCESS_LINES_MAX 20000u
#define ACCESS_RULES_MAX 10000u
#define ACCESS_VOLUMES_MAX 20000u /* in all rules */

struct access;

enum access_right { ACCESS_NONE, ACCESS_READ, ACCESS_WRITE };

/* Takes `len` bytes apart, which the caller keeps. `file` is its name in sentences. `find_user`
 * gives the uid of a user's name, false where there is none: with it, the function is pure.
 * ST_INVAL with a sentence that begins with FILE:LINE. */
enum status access_parse(struct access **out, const char *file, const uint8_t *bytes, size_t len,
                         bool (*find_user)(const char *name, uint32_t *uid), struct err *e);

/* Reads and parses a file; users are those of this machine. Blocks, maybe for long where users come
 * over a network. ST_INVAL where it can't be read, too. */
enum status access_load(struct access **out, const char *file, struct err *e);

/* One more reference, which is given back by access_release(). NULL stays NULL. ANY thread. */
struct access *access_hold(struct access *a);
void access_release(struct access *a);

/* How many rules there are; how many of them are about certificates, and about pre-shared keys. */
struct access_count {
    size_t rules, certificates, psk;
};
struct access_count access_count(const struct access *a);

/* What one client may do: the rules that fit it, held. NULL for NULL: no rules, all is allowed. */
struct access_view;
struct access_view *access_view_new(struct access *a, const struct peer *p);
void access_view_free(struct access_view *v);

/* What it may do with a volume, or with a snapshot of it (`snapshot` not empty): a snapshot can
 * only be read, by whoever may open its volume or was granted the snapshot. */
enum access_right access_view_right(const struct access_view *v, const char *volume,
                                    const char *snapshot);

#endif
