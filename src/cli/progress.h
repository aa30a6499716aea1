/*
 * How far a long command has come, and being told to stop.
 *
 * On a terminal (stderr) one line is written over and over: what, how much of how much, the rate of
 * the last seconds, the time left. On anything else there is nothing.
 *
 * SIGINT and SIGTERM end a long command where it can be gone on with: its loops ask interrupted().
 * A second signal ends the process at once.
 */
#ifndef CLI_PROGRESS_H
#define CLI_PROGRESS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/env.h"

#define PROGRESS_LINE_BYTES 256u
#define PROGRESS_SAMPLES 32u

/* The caller counts `done` up (bytes) and may set `total` when it gets to know it; the rest is
 * drawn by a timer. Lives on the reactor of `env`. */
struct progress {
    uint64_t done, total; /* total 0: not known */
    char what[160];       /* "exporting disk@monday" */

    struct env *env; /* private, from here on; may be NULL */
    struct env_timer timer;
    uint64_t begun_ns;
    struct progress_sample {
        uint64_t at_ns, done;
    } samples[PROGRESS_SAMPLES];
    unsigned n_samples; /* ever taken; the ring holds the last ones */
    size_t drawn;       /* characters on the terminal's line */
    bool shown;         /* stderr is a terminal */
};

/* Begins to show it. The structure is the caller's, until progress_end(). env NULL: there is no
 * reactor, and the caller calls progress_draw() every now and then. */
void progress_begin(struct progress *p, struct env *env, uint64_t total, const char *what, ...)
    __attribute__((format(printf, 4, 5)));

/* Draws the line; now_ns: on one clock that only goes forward. */
void progress_draw(struct progress *p, uint64_t now_ns);

/* Wipes the line, so that something else can be printed; it is drawn again soon. */
void progress_wipe(struct progress *p);

/* The last of it. Both are harmless if never begun (all zeros). */
void progress_end(struct progress *p);

/* The line, at most `width` characters and PROGRESS_LINE_BYTES - 1 bytes long, into `out`, and its
 * length. rate: bytes a second; elapsed_s: since the beginning, shown where no time left can be. */
size_t progress_format(char out[PROGRESS_LINE_BYTES], size_t width, const char *what, uint64_t done,
                       uint64_t total, uint64_t rate, uint64_t elapsed_s);

/* From now on SIGINT and SIGTERM are noted, each once. For all commands of the process. */
void interrupt_catch(void);

/* Whether one came. Any thread. */
bool interrupted(void);

/* Prints that the command was interrupted, and returns its exit status. */
int interrupt_status(void);

#endif
