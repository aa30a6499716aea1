/*
 * The write log: what lets a store answer a write before it is committed.
 *
 * A log belongs to one reactor of one session. Records are appended, made to
 * survive the process by one write call for all that gathered (submit), made to
 * survive the machine by a sync, and replayed by whoever takes over a volume
 * after the session died. It is a ring in a file written through beforehand, so
 * that a sync moves no metadata; room is given back by commits (store_commit.
 * log_keep_from).
 *
 * Every record carries a sequence number one above the one before it and a hash
 * bound to the log's identity; a replay stops at the first record that does not
 * fit, so what it yields is a prefix (G2).
 */
#ifndef STORE_LOG_H
#define STORE_LOG_H

#include <sys/uio.h>

#include "store/store.h"

/* One appended write. `stream` says whose it is (the volume layer uses the branch
 * number), `meta` is the volume layer's. */
struct store_log_record {
    uint64_t seq;
    uint64_t stream;
    uint8_t meta[32];
    const void *payload; /* replay only */
    uint32_t payload_len;
};

#define STORE_LOG_PAYLOAD_MAX (4u << 20)

/* A request to make all submitted records survive the machine. */
struct store_log_sync {
    void (*done)(struct store_log_sync *sync, enum status st);

    struct list link; /* the engine's, from here on */
    struct store_log *log;
    struct env_task task;
    enum status result;
};

/* Engines embed this as their first member. */
struct store_log {
    struct store *store;
};

struct store_log_ops {
    enum status (*open)(struct store *store, struct env *env, const uint8_t session[STORE_ID_BYTES],
                        uint64_t bytes, struct store_log **out, struct err *e);
    void (*close)(struct store_log *log, bool remove);
    uint64_t (*id)(const struct store_log *log);
    uint64_t (*next_seq)(const struct store_log *log);
    uint64_t (*room)(const struct store_log *log);
    uint64_t (*capacity)(const struct store_log *log);
    uint64_t (*append)(struct store_log *log, uint64_t stream, const uint8_t meta[32],
                       const struct iovec *iov, int n_iov, uint32_t payload_len);
    enum status (*submit)(struct store_log *log);
    void (*sync)(struct store_log *log, struct store_log_sync *sync);
    enum status (*replay)(struct store *store, uint64_t log_id, uint64_t stream, uint64_t after_seq,
                          bool (*take)(void *arg, const struct store_log_record *rec), void *arg,
                          struct err *e);
    enum status (*remove_unused)(struct store *store, const uint64_t *needed, size_t n_needed,
                                 struct err *e);
};

/* Makes a log of `bytes` (4 MiB to 4 GiB) for `session`, reusing the file of a finished
 * log where there is one. Blocks while it writes the file through; before the reactor
 * serves. ST_NOSPC where the file does not fit. */
enum status store_log_open(struct store *store, struct env *env,
                           const uint8_t session[STORE_ID_BYTES], uint64_t bytes,
                           struct store_log **out, struct err *e);

/* Closes; `remove`: nobody needs its records any more. Syncs must have been answered. */
void store_log_close(struct store_log *log, bool remove);

/* Identifies the log in the store, also after its process died. */
uint64_t store_log_id(const struct store_log *log);

/* The sequence number the next record gets. Starts at 1. */
uint64_t store_log_next_seq(const struct store_log *log);

/* Bytes a record with `payload_len` bytes of payload takes in the ring. */
uint64_t store_log_record_bytes(uint64_t payload_len);

/* Bytes that can still be appended before room is given back, and bytes in all. */
uint64_t store_log_room(const struct store_log *log);
uint64_t store_log_capacity(const struct store_log *log);

/* Adds a record to those that the next submit writes and returns its sequence number. The
 * payload (at most STORE_LOG_PAYLOAD_MAX, in `n_iov` pieces, at most 1100) is hashed now
 * and must stay unchanged and valid until the submit. The caller has seen that there is
 * room. May itself write what gathered when its own lists are full. No copy of the
 * payload is made. */
uint64_t store_log_append(struct store_log *log, uint64_t stream, const uint8_t meta[32],
                          const struct iovec *iov, int n_iov, uint32_t payload_len);

/* Writes all that was appended; when it gives ST_OK the records survive the death of this
 * process (they are in the page cache). On ST_IO none of those records counts and the log
 * takes no more: every later submit and sync gives ST_IO too. Does not wait for the disk. */
enum status store_log_submit(struct store_log *log);

/* Answers when every record submitted before this call would survive the death of the
 * machine. Several waiting syncs share one fdatasync. After a sync that failed every later
 * one fails, because the kernel may have dropped what it could not write. */
void store_log_sync(struct store_log *log, struct store_log_sync *sync);

/* Hands the records of `stream` with a sequence number above `after_seq` to `take`, in
 * order, up to the end of the log; `take` returns false to stop early (ST_OK). Blocking:
 * on a worker thread. Only for logs whose session is dead or that this process owns and
 * does not append to meanwhile. ST_NOTFOUND where there is no such log. */
enum status store_log_replay(struct store *store, uint64_t log_id, uint64_t stream,
                             uint64_t after_seq,
                             bool (*take)(void *arg, const struct store_log_record *rec), void *arg,
                             struct err *e);

/* Removes (or keeps for reuse) the logs of dead sessions that are not in `needed`. The
 * caller has read, after those sessions died, which logs volumes still need. Blocking. */
enum status store_log_remove_unused(struct store *store, const uint64_t *needed, size_t n_needed,
                                    struct err *e);

#endif
