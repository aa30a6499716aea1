/*
 * The file an export goes to: not there under its name before it is whole.
 *
 * A file is made under another name beside it, and gets its own when everything is on the disk. A
 * block device is written in place; a pipe, as it comes.
 */
#ifndef CLI_OUTFILE_H
#define CLI_OUTFILE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "cli/run.h"

struct iovec;

enum outfile_kind {
    OUTFILE_FILE,   /* new and empty: what is not written reads as zeros */
    OUTFILE_DEVICE, /* has contents already */
    OUTFILE_PIPE,   /* takes bytes one after the other only */
};

/* Zero-initialised before outfile_open(). All functions on the reactor's thread but outfile_write()
 * and outfile_zero(). */
struct outfile {
    enum outfile_kind kind;
    uint64_t device_bytes; /* DEVICE: how many it has */

    struct run *run; /* private, from here on */
    const char *name;
    char *path, *partial;
    int fd;
    bool force;
    struct outfile_half {
        struct env_work work;
        struct outfile *file;
        uint8_t *bytes;
        size_t len;
        int error;
        bool busy;
    } halves[2];
    unsigned filling;
    int error; /* errno of the first failure; EINTR: interrupted */
};

/* Opens FILE, "-" being standard output, which must not be a terminal. ST_EXISTS: it is there, and
 * not `force`. `name` must stay. */
enum status outfile_open(struct outfile *f, struct run *run, const char *name, bool force,
                         struct err *e);

/* Writes behind what was written; copies, and writes in the background. Waits for room. */
enum status outfile_put(struct outfile *f, const void *data, size_t len, struct err *e);
enum status outfile_put_zeros(struct outfile *f, uint64_t len, struct err *e);

/* FILE and DEVICE, on any thread, several at a time, not together with outfile_put(): writes at an
 * offset, or makes zeros there. 0, or errno. */
int outfile_write(struct outfile *f, uint64_t offset, struct iovec *parts, int n);
int outfile_zero(struct outfile *f, uint64_t offset, uint64_t len);

/* FILE: how many bytes it has. */
enum status outfile_set_size(struct outfile *f, uint64_t size, struct err *e);

/* The sentence about an errno. */
enum status outfile_failed(const struct outfile *f, int error, struct err *e);

/* Everything is there: on the disk and under its name when this returns ST_OK. */
enum status outfile_finish(struct outfile *f, struct err *e);

/* Closes it; of what was not finished nothing is left where it is a file. Always to be called. */
void outfile_close(struct outfile *f);

#endif
