/*
 * What clients of one volume asked for and were told, and whether that can have happened.
 *
 * The volume is a row of sectors of HISTORY_SECTOR bytes, all zeros at first. Every operation has
 * a number, and what a write puts into a sector tells its number and that sector (history_fill),
 * so that a reader knows from any sector who wrote it. Zeroes and trims put zeros there.
 *
 * Clients keep two rules that make the check exact and that file systems keep too: no two
 * changes of one sector are under way at once, but for one that was given up (its client is
 * gone, or has stopped asking); and one request sent again after its connection was lost is
 * the same operation.
 *
 * Proved, as far as clients can see:
 *   - linearisability of reads and writes of each sector (G1, G4): a read shows the newest
 *     change that was answered before the read was sent, or one that began after that one; once
 *     one read showed a change, no later one shows an older state;
 *   - G3: once any sector of a change was shown, or the change was answered, all of its sectors
 *     are there, or what changed them since. (Within one read, which may come in the middle of
 *     a change, each sector is judged by itself, unless that change can't have come then.)
 *   - G2: if a change was answered, all that were sent before it on its connection are there.
 *     (If it was only shown, one before it may have been refused, and that answer been lost.)
 *   - G8: a change that was given up does not appear after a newer change of one of its sectors
 *     was answered or shown; nor does a copy of a request that was sent on a connection that
 *     is gone.
 *   - G7: a snapshot has every change that was answered, or shown, before it was asked for, and none
 *     that was sent after it was made; with a change it has all that were answered before that
 *     one was sent (G2), and whole changes only (G3); it never shows anything else. Reads
 *     that are sent later do not show less than it has.
 * Not proved: what G2 and G3 say of zeroes and trims whose zeros may be somebody else's.
 *
 * Breaking the rules of these calls ends the process (CHECK).
 */
#ifndef TESTS_SIM_HISTORY_H
#define TESTS_SIM_HISTORY_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define HISTORY_SECTOR 512u
/* Longer ones are not atomic (G3: pieces of 4 MiB). */
#define HISTORY_SECTORS_MAX 8192u

enum history_kind { HISTORY_READ, HISTORY_WRITE, HISTORY_ZERO };

struct history;

struct history *history_new(uint64_t n_sectors);
void history_free(struct history *h);

/* An operation of a client begins: its number, from 1. Times are the world's, in ns, and never go
 * back from call to call. */
uint32_t history_begin(struct history *h, uint64_t now_ns, enum history_kind kind,
                       uint64_t first_sector, uint32_t n_sectors);
/* It is sent on a connection (any number that is used for one connection only); again where its
 * connection was lost, whose late answers are not reported then, or where it failed. Called in the
 * order of sending, before its first byte leaves. */
void history_sent(struct history *h, uint64_t now_ns, uint32_t op, uint32_t connection);
/* It was answered in good order, on the connection it was sent on last (a read: with these bytes,
 * n_sectors * HISTORY_SECTOR). */
void history_answered(struct history *h, uint64_t now_ns, uint32_t op, const uint8_t *data);
/* It was answered with an error there. It may have happened or not, and says nothing of others.
 * It is sent again or given up next. */
void history_failed(struct history *h, uint64_t now_ns, uint32_t op);
/* It was given up: no answer came, or history_failed(), and it will not be sent again. It may
 * be there or not; later, too, as long as nothing newer was answered or shown. */
void history_given_up(struct history *h, uint64_t now_ns, uint32_t op);

/* A snapshot is asked for: its number, from 1. */
uint32_t history_snapshot(struct history *h, uint64_t now_ns);
/* It is made: whoever asked was told so. (Not called where nobody knows when, or whether.) */
void history_snapshot_made(struct history *h, uint64_t now_ns, uint32_t snapshot);
/* A read of it, or of an untouched clone of it, or of what was rolled back to it, shows this. */
void history_snapshot_shown(struct history *h, uint64_t now_ns, uint32_t snapshot,
                            uint64_t first_sector, uint32_t n_sectors, const uint8_t *data);
/* Every sector of it was shown. What it says as a whole is judged then. */
bool history_snapshot_is_whole(const struct history *h, uint32_t snapshot);
/* Two whole ones, of two volumes, were made at one instant: with a change the one has what was
 * answered on the other volume before that change was sent. The times of both histories are of one
 * clock. */
void history_snapshots_together(struct history *a, uint32_t snapshot_a, struct history *b,
                                uint32_t snapshot_b);

/* The bytes of a write's sector. */
void history_fill(uint32_t op, uint64_t sector, uint8_t out[HISTORY_SECTOR]);

/* The first thing that can't have happened, as one sentence; NULL: nothing so far. Known as soon
 * as the read that shows it was answered. Valid as long as the history. */
const char *history_violation(const struct history *h);

/* At the end, when all faults are over, every operation was answered or given up and nothing that
 * was given up can arrive any more, and then every sector was read once more (in good order): the
 * same, of all that the last reads say together. */
const char *history_check(struct history *h);

/* How much there was of what. Of the changes that were given up, some are known to be there, and
 * some to be gone. */
struct history_counts {
    uint64_t reads, writes, zeros, answered, failed, sent_again;
    uint64_t given_up, given_up_there, given_up_gone; /* changes */
    uint64_t snapshots_whole, snapshot_reads;
};
void history_counts(const struct history *h, struct history_counts *counts);

#endif
