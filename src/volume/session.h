/*
 * The session: this process in the eyes of others.
 *
 * An owner key names a session (an incarnation); whoever wants a volume that a
 * session owns asks, waits, or finds that the session is dead. One per process,
 * shared by its shards.
 *
 * Stores that can tell a dead process (the embedded one) need nothing more. On
 * others (limits.needs_heartbeat) a session has to show that it lives: every third
 * of a lease a commit raises the counter in its record, under a check of the
 * record's exact bytes. It may be relied on (G4) until a lease after the *sending* of the
 * last one that succeeded: from its commit on others wait for longer than that before
 * they fence it. After a lease without a success the session is in doubt: nothing is
 * answered. It ends there only if others have fenced it, which the next heartbeat finds out;
 * one that succeeds proves that nobody has, and so that nobody has changed anything it
 * owns, and it goes on. (So a store that was away for longer than a lease costs its clients
 * a pause, not their connections.) A heartbeat whose check fails ends the incarnation for good:
 * every shard lets go of what it owned, and when all have, the process goes on as a new
 * incarnation: a new id, a new record.
 *
 * Heartbeats are sent by one thread, that of the environment the session was begun with
 * (here: home). It must run as long as anything is owned.
 */
#ifndef VOLUME_SESSION_H
#define VOLUME_SESSION_H

#include <stdatomic.h>

#include "base/env.h"
#include "base/status.h"
#include "store/store.h"
#include "volume/records.h"

/* A gateway that is not heard of for two thirds of its lease (the last heartbeat may be a third
 * old) makes its clients wait and may be fenced. A cluster that replaces one of its processes
 * takes a second or two, and that is nothing wrong. */
#define SESSION_LEASE_MS_MIN 3000u

enum session_stage {
    SESSION_ON,
    SESSION_IN_DOUBT,   /* a lease has passed; a heartbeat will tell whether it goes on */
    SESSION_LETTING_GO, /* ended; not all members have let go */
    SESSION_BEGINNING,  /* the new incarnation's record is on its way */
};

struct session {
    /* Constant from session_begin() to session_end(); any thread. */
    struct store *store;
    struct env *env; /* home's */
    uint32_t lease_ms;
    uint32_t pid;
    char host[HOST_BYTES_MAX + 1];
    char address[HOST_BYTES_MAX + 1];
    bool timed; /* the store needs heartbeats */
    /* For tests only: take volumes from others at once and leave their sessions alone, so that
     * nothing but the owner key stands between two gateways. */
    bool skip_lease;

    /* Written at home, and only while no member relies on it: before any joined, and between
     * the last one's letting go and the first one's `begun`. So a member reads it on its own
     * thread without a lock as long as it was not told `lost` since it was last told `begun`. */
    uint8_t id[SESSION_ID_BYTES];

    /* Any thread. Until then (env_now_ns) it may be relied on; 0: it ended. */
    _Atomic uint64_t valid_until_ns;
    _Atomic uint64_t n_ended; /* incarnations that ended while they were needed */

    /* Home only. */
    enum session_stage stage;
    struct list members;
    unsigned n_holding, n_volumes_lost;
    bool stopped;
    char why[160];
    struct session_record rec;
    struct key key;
    uint8_t bytes[RECORD_BYTES_MAX], next_bytes[RECORD_BYTES_MAX]; /* as stored; as being stored */
    size_t len, next_len;
    uint8_t next_id[SESSION_ID_BYTES];
    struct key next_key;
    uint64_t sent_ns;
    struct env_timer timer;
    struct store_check check;
    struct store_mutation mutations[2];
    struct store_commit commit;
    bool committing;
};

/* Registers a new incarnation with a random id: with the engine, and as a session record in
 * the store. `address`: where this process listens, or the name of the command. Drives `env`
 * by `run_once` (one turn of its loop) until the record is committed: before the reactor
 * serves. `s` must stay where it is until session_end(). */
enum status session_begin(struct session *s, struct store *store, struct env *env,
                          void (*run_once)(struct env *env), uint32_t lease_ms,
                          const char *address, struct err *e);

/* Takes the record and the registration away; no volume may be owned any more and all members
 * have left. */
void session_end(struct session *s, struct env *env, void (*run_once)(struct env *env));

/* The first half of the end: no more heartbeats. What is under way is still answered. */
void session_stop(struct session *s);

/* Whether the session may be relied on at this moment. Asked after something was looked up and
 * before it is told to anybody: then the look fell into the lease, however long the telling
 * takes; or it fell into a doubt that is over, during which nobody changed anything. Any
 * thread; `env` is its own. */
static inline bool session_holds(struct session *s, struct env *env)
{
    uint64_t until = atomic_load(&s->valid_until_ns);
    return until && env_now_ns(env) < until;
}

/* One that owns volumes under the session: a shard. Only where session->timed. */
struct session_member;

/* `lost`: called on the thread of `env` when the incarnation has ended: let go of everything
 * and give how many volumes that were; `begun`: there is a new one. Home thread, while
 * the reactor of `env` does not run or is home. */
struct session_member *session_join(struct session *s, struct env *env,
                                    unsigned (*lost)(void *arg), void (*begun)(void *arg),
                                    void *arg);
/* The same rules; nothing is called afterwards. */
void session_leave(struct session_member *m);
/* The member found that the session does not hold: home looks at once. Member's thread. */
void session_notice(struct session_member *m);

/* --- the sessions of others ------------------------------------------------------------ */

/* Longer than any session record is. */
#define SESSION_SEEN_BYTES_MAX 1024u

/* Whoever waits for another session's silence looks at its record so often, at least. */
#define SESSION_LOOK_MS 500u

/* What was last seen of another session's record, and for how long it has been so.
 *
 * Only time between two looks counts that were answered and no more than half a lease apart: while
 * the store is away nobody's heartbeats reach it. A session that lives has its record stand still
 * for the third of a lease between two heartbeats and half of one at most for an outage that is
 * counted: less than a whole one. */
struct session_sight {
    struct key key;
    uint8_t bytes[SESSION_SEEN_BYTES_MAX];
    size_t len;
    uint64_t since_ns;  /* by the clock alone */
    uint64_t silent_ns; /* what counts of it */
    uint64_t looked_ns; /* the last look that was answered */
    unsigned n_changes; /* signs of life: how often it became another */
    struct session_record rec;
    bool readable; /* `rec` is what `bytes` say */
};

enum session_verdict {
    SESSION_ENDED,  /* no record, or a fenced one: what it owned is free */
    SESSION_GONE,   /* its process is known to have ended: may be fenced */
    SESSION_SILENT, /* its record stood still for its lease and a margin: may be fenced */
    SESSION_MAYBE,  /* may live */
};

/* Begins to look at a session; keeps what was seen where it is the same one as before. */
void session_sight_begin(struct session_sight *sight, const uint8_t id[SESSION_ID_BYTES]);

/* Takes in what was read just now under the record's key; on the thread of `env`. Ends with
 * SESSION_MAYBE where the read failed. `here`: the name of this host. */
enum session_verdict session_judge(struct session_sight *sight, const struct store_get *get,
                                   struct env *env, const char *here);

/* How long a record must stand still, on a clock of one's own, before its session is fenced:
 * longer than its lease, because clocks do not run alike. And how much of that is missing. */
uint64_t session_silence_ns(const struct session_sight *sight);
uint64_t session_silence_left_ns(const struct session_sight *sight);

/* Whether it has stood still for a lease by the clock alone: then it is worth looking again every
 * SESSION_LOOK_MS, so that the time counts. */
bool session_is_suspect(const struct session_sight *sight);

/* The record of a fenced session, in place of what was seen. */
size_t session_fenced_bytes(const struct session_sight *sight, uint8_t out[RECORD_BYTES_MAX]);

/* Fills `host` with the name of this machine. */
void session_host_name(char host[HOST_BYTES_MAX + 1]);

#endif
