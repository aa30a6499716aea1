/*
 * What clients of one volume asked for and were told, and whether that can have happened.
 *
 * The volume is a row of sectors of HISTORY_SECTOR bytes. Every write has a number, and what it
 * puts into a sector tells which number and which sector (history_fill), so that a reader knows
 * from any sector who wrote it. Zeroes and trims put zeros there, number 0, as in the beginning.
 *
 * Clients keep two rules that make the check exact and that file systems keep too: no two
 * changes of one sector are under way at once, but for one that was given up (its client is
 * gone, or has stopped asking); and one request sent again after its connection was lost is
 * the same operation.
 *
 * Proved, as far as clients can see:
 *   - linearisability of reads and writes of each sector (G1, G4): a read shows the newest
 *     change that was answered before the read began, or one that was under way or given up
 *     in between; once one read showed a change, no later one shows an older state;
 *   - G3: of a change that was given up, all sectors are there or none (those that nothing
 *     changed since);
 *   - G2: if a change is there, so are all that were sent before it on the same connection;
 *     and likewise if it was answered;
 *   - G8: a change that was given up does not appear after a newer change of the same sector was
 *     answered; nor does a copy of a request that was sent on a connection that is gone, after
 *     the request itself was answered and overwritten.
 */
#ifndef TESTS_SIM_HISTORY_H
#define TESTS_SIM_HISTORY_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define HISTORY_SECTOR 512u

enum history_kind { HISTORY_READ, HISTORY_WRITE, HISTORY_ZERO };

struct history;

struct history *history_new(uint64_t n_sectors);
void history_free(struct history *h);

/* An operation of a client begins: its number, from 1. Times are the world's, in ns, and never go
 * back from call to call. */
uint32_t history_begin(struct history *h, uint64_t now_ns, enum history_kind kind,
                       uint64_t first_sector, uint32_t n_sectors);
/* It is sent on a connection (any number that is used for one connection only); again where its
 * first connection was lost. Called in the order of sending. */
void history_sent(struct history *h, uint64_t now_ns, uint32_t op, uint32_t connection);
/* It was answered: in good order (a read: with these bytes, n_sectors * HISTORY_SECTOR). */
void history_answered(struct history *h, uint64_t now_ns, uint32_t op, const uint8_t *data);
/* It was given up: no answer came, or one that says it failed, and it will not be sent again. It
 * may be there or not; later, too, as long as nothing newer was answered. */
void history_given_up(struct history *h, uint64_t now_ns, uint32_t op);

/* The bytes of a write's sector. */
void history_fill(uint32_t op, uint64_t sector, uint8_t out[HISTORY_SECTOR]);

/* At the end, when every sector was read once more after all faults were over and every operation
 * is answered or given up: NULL, or what can't have happened, as one sentence. (Reads may be
 * judged as they come; then this is the first that was wrong.) */
const char *history_check(struct history *h);

/* How much there was of what. */
struct history_counts {
    uint64_t reads, writes, zeros, answered, sent_again, given_up, given_up_there, given_up_gone;
};
void history_counts(const struct history *h, struct history_counts *counts);

#endif
