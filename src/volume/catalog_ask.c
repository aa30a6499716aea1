/* Asking the owner of a volume through its mailbox. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/check.h"
#include "base/log.h"
#include "volume/catalog_internal.h"
#include "volume/session.h"

/* How often an asker looks although nothing woke it: the owner may have died. */
#define ASK_TICK_MS SESSION_LOOK_MS
#define ASK_WATCHES 2u
#define N_CHECKED 3u /* gets of a look: mailbox, answer, owner; then its session where needed */
/* A request of somebody else that lay in the mailbox for so long was left by a command
 * that died: one that lives withdraws its own. */
#define MAIL_STALE_MS 15000u
/* An answer that lay there for so long is not waited for: whoever does reads it at once. */
#define ANSWER_STALE_MS 2000u

static const uint8_t nobody[SESSION_ID_BYTES];

/* A request on its way through the mailbox. */
struct ask {
    struct job *job;
    struct catalog_entry entry;
    struct mail_record mail;
    uint64_t deadline_ns;
    uint32_t wait_ms;
    struct env_timer timer;
    struct ask_watch {
        struct store_watch watch;
        struct ask *ask;
        bool armed;         /* and has not fired */
        bool used;          /* it was armed at least once */
    } watches[ASK_WATCHES]; /* of the answer, and of the owner, who may let go without one */
    bool idle;              /* nothing runs; the timer or a watch starts the next look */
    bool written;           /* the request lies in the mailbox */
    struct key mailbox, answer, owner;
    uint8_t mine[RECORD_BYTES_MAX], other[RECORD_BYTES_MAX];
    size_t mine_len, other_len;
    uint64_t other_since_ns;
    uint64_t answer_id, answer_since_ns; /* of an answer to somebody else */
    enum status outcome;                 /* of a request that is being withdrawn, or was answered */
    bool fence;
    char here[HOST_BYTES_MAX + 1];
    struct session_sight *sight, own_sight; /* of the owner's session, where it needs heartbeats */
};

static void ask_look(struct job *job);

static void ask_wait(struct job *job)
{
    struct ask *ask = job->ask;
    job_reset(job);
    /* What woke us meanwhile may be newer than what was just read. */
    for (size_t i = 0; i < ASK_WATCHES; i++) {
        if (!ask->watches[i].armed) {
            ask_look(job);
            return;
        }
    }
    uint64_t now = env_now_ns(job->op->env);
    /* (Past the deadline only where the silence of its session is waited for.) */
    uint64_t left_ms = ask->deadline_ns > now ? (ask->deadline_ns - now) / 1000000u + 1
                       : ask->fence           ? ASK_TICK_MS
                                              : 1;
    ask->idle = true;
    env_timer_start(job->op->env, &ask->timer, min_u64(left_ms, ASK_TICK_MS));
}

static void ask_go_on(struct ask *ask)
{
    if (!ask->idle)
        return;
    ask->idle = false;
    env_timer_stop(ask->job->op->env, &ask->timer);
    ask_look(ask->job);
}

static void ask_tick(struct env_timer *timer)
{
    ask_go_on(container_of(timer, struct ask, timer));
}

static void ask_woken(struct store_watch *watch)
{
    struct ask_watch *w = container_of(watch, struct ask_watch, watch);
    w->armed = false;
    ask_go_on(w->ask);
}

static void ask_finish(struct job *job, enum status st)
{
    const struct catalog_entry *entry = &job->ask->entry;
    const char *host = entry->owner.host[0] ? entry->owner.host : "an unknown host";
    struct err *e = &job->op->err;
    if (st == ST_NOTFOUND)
        fail(e, st, "nobody has volume \"%s\" in use", entry->name);
    else if (st == ST_UNAVAIL)
        fail(e, st,
             "the server that has volume \"%s\" in use (pid %u on %s) did not answer within %u s",
             entry->name, entry->owner.pid, host, (job->ask->wait_ms + 999) / 1000);
    job_finish(job, st);
}

static void ask_cleared(struct job *job, enum status st)
{
    /* An answer left behind is overwritten by the next one who asks. */
    (void)st;
    job_finish(job, job->ask->outcome);
}

/* The answer came, in place of the question: takes it out. */
static void ask_answered(struct job *job, const struct answer_record *answer)
{
    struct ask *ask = job->ask;
    ask->outcome = (enum status)answer->status;
    /* These two would tell the caller that nobody owns the volume, or nobody answered. */
    if (answer->status > ST_FORMAT || answer->status == ST_NOTFOUND || answer->status == ST_UNAVAIL)
        ask->outcome = ST_BUSY;
    fail(&job->op->err, ask->outcome, "%s", answer->text);
    job->op->number = answer->number;
    job_check(job, &job->gets[1]);
    job_clear(job, key_slice(&ask->answer));
    /* Who waits for the turn after ours looks at once. */
    job_commit(job, true, ask_cleared);
}

static void ask_withdrawn(struct job *job, enum status st)
{
    if (st == ST_OK)
        ask_finish(job, job->ask->outcome);
    else if (job_may_try_again(job, st))
        ask_look(job); /* answered at the last moment */
    else
        job_store_failed(job, st, "withdraw a request to a volume's owner");
}

/* Takes the question back, provided that it still has no answer. `answer` is what was
 * read under the answer's key. */
static void ask_withdraw(struct job *job, enum status outcome, const struct store_get *answer)
{
    struct ask *ask = job->ask;
    ask->outcome = outcome;
    job_check(job, answer);
    job_check_value(job, &ask->mailbox, ask->mine, ask->mine_len);
    job_clear(job, key_slice(&ask->mailbox));
    job_commit(job, false, ask_withdrawn);
}

static void ask_fenced(struct job *job, enum status st)
{
    if (st == ST_OK) {
        log_warning("process %u on %s gave no sign of life and is fenced: all its volumes are free",
                    job->ask->entry.owner.pid, job->ask->entry.owner.host);
        ask_finish(job, ST_NOTFOUND);
    } else if (job_may_try_again(job, st)) {
        ask_look(job); /* it lives after all, or somebody else was faster */
    } else {
        job_store_failed(job, st, "fence a server that gives no sign of life");
    }
}

/* The owner stood still for long enough, or is known to be dead: nothing of it counts from here
 * on. Takes our question back where it lies there. */
static void ask_fence(struct job *job, bool still_there)
{
    struct ask *ask = job->ask;
    uint8_t bytes[RECORD_BYTES_MAX];
    job_check_value(job, &ask->sight->key, ask->sight->bytes, ask->sight->len);
    job_set(job, &ask->sight->key, bytes, session_fenced_bytes(ask->sight, bytes));
    if (still_there) {
        job_check_value(job, &ask->mailbox, ask->mine, ask->mine_len);
        job_clear(job, key_slice(&ask->mailbox));
    }
    job_commit(job, true, ask_fenced);
}

static void ask_written(struct job *job, enum status st)
{
    if (st != ST_OK && st != ST_CONFLICT) {
        job_store_failed(job, st, "ask a volume's owner");
        return;
    }
    job->ask->written = st == ST_OK;
    if (st == ST_OK || job_may_try_again(job, st))
        ask_wait(job);
    else
        job_store_failed(job, st, "ask a volume's owner");
}

/* Whether the mailbox can be written over: a request that has been lying there unchanged
 * belongs to a command that died. */
static bool ask_other_is_stale(struct ask *ask, const struct store_get *mailbox)
{
    uint64_t now = env_now_ns(ask->job->op->env);
    bool same = ask->other_len == mailbox->head.len &&
                memcmp(ask->other, mailbox->head.data, ask->other_len) == 0;
    if (same)
        return now - ask->other_since_ns >= MAIL_STALE_MS * 1000000ull;
    /* One too long to be a request is nobody's. */
    if (mailbox->head.len > sizeof ask->other)
        return true;
    memcpy(ask->other, mailbox->head.data, mailbox->head.len);
    ask->other_len = mailbox->head.len;
    ask->other_since_ns = now;
    return false;
}

/* Whether an answer lies there that somebody else has still to read: writing a question takes it
 * away. */
static bool ask_answer_is_awaited(struct ask *ask, const struct store_get *answer)
{
    uint64_t now = env_now_ns(ask->job->op->env);
    struct answer_record rec;
    if (answer->st != ST_OK || !answer_decode(answer->key, answer->head, &rec))
        return false;
    if (!ask->answer_since_ns || ask->answer_id != rec.id) {
        ask->answer_id = rec.id;
        ask->answer_since_ns = now;
    }
    return now - ask->answer_since_ns < ANSWER_STALE_MS * 1000000ull;
}

/* Of what was read, all has to be still so. */
static void ask_write(struct job *job)
{
    struct ask *ask = job->ask;
    for (size_t i = 0; i < N_CHECKED; i++)
        job_check(job, &job->gets[i]);
    job_set(job, &ask->mailbox, ask->mine, ask->mine_len);
    job_clear(job, key_slice(&ask->answer));
    job_commit(job, true, ask_written);
}

static void ask_seen(struct job *job, enum status st)
{
    struct ask *ask = job->ask;
    const struct store_get *mailbox = &job->gets[0], *answer = &job->gets[1],
                           *owner = &job->gets[2];
    struct answer_record answer_rec;
    struct owner_record owner_rec = {0};
    if (st != ST_OK) {
        job_store_failed(job, st, "ask a volume's owner");
        return;
    }
    if (owner->st == ST_OK && !owner_decode(owner->key, owner->head, &owner_rec)) {
        job_damaged(job, "a record of a volume's owner");
        return;
    }
    if (ask->written && answer->st == ST_OK &&
        answer_decode(answer->key, answer->head, &answer_rec) && answer_rec.id == ask->mail.id) {
        ask_answered(job, &answer_rec);
        return;
    }

    struct store *store = job->op->store;
    bool timed = store->limits.needs_heartbeat, silent = false;
    bool late = env_now_ns(job->op->env) >= ask->deadline_ns;
    bool gone = !catalog_same_owner(&owner_rec, &ask->entry.owner) ||
                memcmp(owner_rec.session, nobody, sizeof nobody) == 0;
    if (!gone && timed) {
        enum session_verdict verdict =
            session_judge(ask->sight, &job->gets[3], job->op->env, ask->here);
        gone = verdict == SESSION_ENDED;
        silent = verdict == SESSION_GONE || verdict == SESSION_SILENT;
        /* Whether it lives is not known yet. */
        if (ask->fence && !ask->sight->n_changes)
            late = false;
    } else if (!gone) {
        gone = store_session_probe(store, owner_rec.session) == STORE_SESSION_DEAD;
    }
    bool still_there = ask->written && mailbox->st == ST_OK && mailbox->head.len == ask->mine_len &&
                       memcmp(mailbox->head.data, ask->mine, ask->mine_len) == 0;
    if (!gone && silent && ask->fence) {
        ask_fence(job, still_there);
        return;
    }
    if (!ask->written) {
        if (gone)
            ask_finish(job, ST_NOTFOUND);
        else if (mailbox->st == ST_NOTFOUND ? !ask_answer_is_awaited(ask, answer)
                                            : ask_other_is_stale(ask, mailbox))
            ask_write(job);
        else if (late && timed) {
            ask_finish(job, ST_UNAVAIL); /* whoever asked first waits for the same */
        } else if (late) {
            fail(
                &job->op->err, ST_BUSY,
                "another command waits for an answer from the server that has volume \"%s\" in use",
                ask->entry.name);
            job_finish(job, ST_BUSY);
        } else
            ask_wait(job);
        return;
    }

    if (still_there && (gone || late))
        ask_withdraw(job, gone ? ST_NOTFOUND : ST_UNAVAIL, answer);
    else if (gone || late || !still_there)
        ask_finish(job, gone ? ST_NOTFOUND : ST_UNAVAIL);
    else
        ask_wait(job);
}

static void ask_look(struct job *job)
{
    struct ask *ask = job->ask;
    job_reset(job);
    /* Armed before reading: what comes after the read wakes us. */
    const struct key *const keys[ASK_WATCHES] = {&ask->answer, &ask->owner};
    for (size_t i = 0; i < ASK_WATCHES; i++) {
        struct ask_watch *w = &ask->watches[i];
        if (w->armed)
            continue;
        w->ask = ask;
        w->armed = w->used = true;
        w->watch = (struct store_watch){.key = key_slice(keys[i]), .fired = ask_woken};
        store_watch(job->op->store, job->op->env, &w->watch);
    }
    job_get(job, &ask->mailbox);
    job_get(job, &ask->answer);
    job_get(job, &ask->owner);
    if (job->op->store->limits.needs_heartbeat)
        job_get(job, &ask->sight->key);
    job_read(job, ask_seen);
}

static void ask_ended(struct job *job)
{
    struct ask *ask = job->ask;
    env_timer_stop(job->op->env, &ask->timer);
    for (size_t i = 0; i < ASK_WATCHES; i++)
        if (ask->watches[i].used)
            store_watch_stop(&ask->watches[i].watch);
    free(ask);
}

void catalog_ask_owner(struct catalog_op *op, struct store *store, struct env *env,
                       const struct catalog_entry *entry, const struct mail_record *mail,
                       uint32_t wait_ms, struct session_sight *sight, bool fence)
{
    struct job *job = job_new(op, store, env);
    struct ask *ask = job->ask = mem_zalloc(sizeof *ask);
    job->ended = ask_ended;
    op->number = 0;
    ask->job = job;
    ask->entry = *entry;
    ask->mail = *mail;
    ask->wait_ms = wait_ms;
    ask->fence = fence;
    ask->sight = sight ? sight : &ask->own_sight;
    session_sight_begin(ask->sight, entry->owner.session);
    session_host_name(ask->here);
    ask->deadline_ns = env_now_ns(env) + wait_ms * 1000000ull;
    ask->timer.fire = ask_tick;
    env_random(env, &ask->mail.id, sizeof ask->mail.id);
    key_mailbox(&ask->mailbox, entry->branch);
    key_answer(&ask->answer, entry->branch);
    key_owner(&ask->owner, entry->branch);
    ask->mine_len = mail_encode(&ask->mail, key_slice(&ask->mailbox), ask->mine);
    ask_look(job);
}
