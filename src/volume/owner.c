/*
 * Ownership (G4): taking a volume for this session, giving it back, and the
 * mailbox through which others ask its owner for something.
 *
 * Every commit of a volume checks the exact bytes of its owner key, so whoever
 * changed that key has ended the powers of the one before. Taking the key from a
 * session that lives is asked for first; a session that is dead, or that did not
 * answer for a lease and was ended, is replaced and its log replayed.
 *
 * Where the store can't tell the dead, the owner's session record is looked at all the time while
 * its mailbox is asked. One that stood still for its lease and a margin is fenced by the
 * very commit that takes the volume, which checks that it still stands as it did.
 */
#include <stdio.h>
#include <stdlib.h>

#include "base/date.h"
#include "volume/catalog.h"
#include "volume/internal.h"

#define ACQUIRE_TRIES_MAX 20u
#define TIMES_SLOW_MAX 3u /* so often an owner is asked again that can't be ended: it is only slow */
#define TIMES_DEAF_MAX 3u /* ... that gives signs of life and no answer */
#define IDLE_MS 100u /* a volume without a request for so long may be handed over */
#define LEAVING_LOOK_MS 10u /* how often is looked whether the last requests are over */
#define REFUSAL_TELL_NS 10000000000ull /* the same refusal is logged so often */
#define AGAIN_MS 1000u
/* Then it is left to others: they evict this server, or it ends. */
#define GIVE_BACK_TRIES_MAX 5u
#define ADRIFT_MS 50u /* how often is looked whether there is a new session of ours */
#define FREEZE_MS_MAX 10000u
#define ASK_AGAIN_MS 200u /* after an owner said no, or could not be asked */

struct acquire {
    struct volume *vol;
    struct store_read read;
    struct store_get gets[3];
    struct key header_key, state_key;
    struct store_check checks[4];
    struct store_mutation mutations[3];
    struct store_commit commit;
    struct catalog_op ask;
    struct catalog_entry entry;
    struct owner_record owner;
    uint8_t was[RECORD_BYTES_MAX], header[RECORD_BYTES_MAX], state_was[RECORD_BYTES_MAX];
    size_t was_len, header_len, state_was_len;
    bool was_there;
    uint8_t owner_bytes[RECORD_BYTES_MAX], state_bytes[RECORD_BYTES_MAX];
    struct state_record state;
    struct header_record new_header;
    struct env_timer timer;
    struct vol_io sync;
    uint64_t since_ns; /* the first request waits */
    uint64_t changed_first; /* the state's, when it was looked at first ... */
    bool looked;            /* ... */
    unsigned tries;
    bool inflight;
    struct env_work kill;
    enum status kill_st;
    struct err kill_err;
    unsigned times_slow, times_deaf;
    unsigned signs_seen; /* of life, before the last question */
    /* The owner's session, where it has to be watched. */
    struct session_sight sight;
    bool fence; /* taken together with it */
    bool by_force;
    /* Why it can't be had although it was taken. */
    enum status st;
    char why[128];
    struct key history_begin, history_end;
    struct store_range history_range;
    uint8_t fenced[RECORD_BYTES_MAX];
    uint64_t incarnation; /* of ours that takes it */
};

struct release {
    struct volume *vol;
    struct store_check check;
    struct store_mutation mutations[2];
    struct store_commit commit;
    struct key state_key;
    uint8_t owner_bytes[RECORD_BYTES_MAX], state_bytes[RECORD_BYTES_MAX];
    struct owner_record owner;
    struct env_timer retry;
    bool committing;
};

struct mailbox {
    struct volume *vol;
    struct key question, answer;
    struct store_watch watch;
    bool armed, reading;
    bool again; /* something came during a read: look once more */
    struct store_read read;
    struct store_get get;
    struct mail_record mail;
    uint8_t raw[RECORD_BYTES_MAX], reply[RECORD_BYTES_MAX];
    size_t raw_len;
    struct store_check checks[2];
    struct store_mutation mutations[2];
    struct store_commit commit;
    struct env_timer timer;
    struct vol_io io;
    struct vol_history_op history;
    uint64_t requests_then;
    unsigned inflight;
    bool handling;
};

static void acquire_read(struct acquire *a);
static void acquire_look(struct acquire *a);
static void history_read(struct acquire *a);
static void mailbox_look(struct mailbox *m);
static void mailbox_start(struct volume *vol);

static bool session_none(const struct owner_record *o)
{
    static const uint8_t none[SESSION_ID_BYTES];
    return !memcmp(o->session, none, sizeof none);
}

/* --- what others changed ------------------------------------------------------------- */

/* The state as it is now, before any request of ours changed it. `by`: who owned the volume. */
static void note_changes(struct volume *vol, const struct state_record *state,
                         const struct owner_record *by)
{
    if (vol->changed_known && state->changed != vol->changed) {
        vol->lineage++;
        snprintf(vol->changed_by, sizeof vol->changed_by,
                 "clients of process %u on %s (%s) changed its data", by->pid, by->host,
                 by->address);
    }
    vol->changed = state->changed;
    vol->changed_known = true;
}

static bool is_outdated(const struct volume *vol, const struct vol_io *io)
{
    bool change = io->kind == IO_WRITE || io->kind == IO_ZERO || io->kind == IO_TRIM ||
                  io->kind == IO_OWN;
    return change && io->writer && io->writer->lineage && io->writer->lineage != vol->lineage;
}

bool owner_lets_write(struct volume *vol, struct vol_io *io)
{
    struct vol_writer *writer = io->writer;
    if (!is_outdated(vol, io)) {
        if (writer)
            writer->lineage = vol->lineage;
        return true;
    }
    snprintf(vol->refusal, sizeof vol->refusal,
             "volume %s was somewhere else since this client wrote last, and %s: what the client "
             "knows is old, so it may not write; connect again",
             vol->name, vol->changed_by);
    if (!writer->told)
        log_client_warning(writer->name, vol->name, "client %s: %s", writer->name, vol->refusal);
    writer->told = true;
    return false;
}

static void resume(struct volume *vol, struct list *ios)
{
    struct list *l;
    while ((l = list_pop(ios))) {
        struct vol_io *io = container_of(l, struct vol_io, link);
        io->stage = IO_IDLE;
        write_resume(vol, io);
    }
}

/* Whoever can't be let write anyhow need not take the volume from others for that. */
static void refuse_outdated(struct volume *vol)
{
    struct list refused = LIST_INIT(refused);
    list_for_each_safe(l, next, &vol->parked)
    {
        if (is_outdated(vol, container_of(l, struct vol_io, link))) {
            list_remove(l);
            list_add_tail(&refused, l);
        }
    }
    resume(vol, &refused);
}

/* --- taking -------------------------------------------------------------------------- */

/* Whether `io` waits for the end of a freeze. */
static bool is_frozen(const struct volume *vol, const struct vol_io *io)
{
    return vol->frozen && (io->kind == IO_WRITE || io->kind == IO_ZERO || io->kind == IO_TRIM ||
                           io->kind == IO_RESIZE);
}

static void resume_parked(struct volume *vol)
{
    struct list ready = LIST_INIT(ready);
    list_for_each_safe(l, next, &vol->parked)
    {
        if (!is_frozen(vol, container_of(l, struct vol_io, link))) {
            list_remove(l);
            list_add_tail(&ready, l);
        }
    }
    resume(vol, &ready);
}

static void acquire_end(struct acquire *a)
{
    struct volume *vol = a->vol;
    env_timer_stop(vol->shard->env, &a->timer);
    vol->acquire = NULL;
    free(a);
}

static void acquire_fail(struct acquire *a, enum status st, const char *why)
{
    struct volume *vol = a->vol;
    struct list parked = LIST_INIT(parked);
    char was[sizeof vol->refusal];
    memcpy(was, vol->refusal, sizeof was);
    snprintf(vol->refusal, sizeof vol->refusal, "volume %s can't be used here: %s", vol->name, why);
    /* A client may try again all the time. */
    uint64_t now = env_now_ns(vol->shard->env);
    if (strcmp(was, vol->refusal) != 0 || now - vol->refusal_told_ns >= REFUSAL_TELL_NS) {
        vol->refusal_told_ns = now;
        log_volume_warning(vol->name, "%s", vol->refusal);
    }
    acquire_end(a);
    vol->ownership = VOL_UNOWNED;
    list_splice_tail(&parked, &vol->parked);
    struct list *l;
    while ((l = list_pop(&parked))) {
        struct vol_io *io = container_of(l, struct vol_io, link);
        if (io->kind == IO_WRITE) {
            io->st = st;
            write_granted(vol, io);
        } else {
            volume_end_io(vol, io, st);
        }
    }
    volume_progress(vol);
}

static void acquire_again(struct env_timer *timer)
{
    acquire_read(container_of(timer, struct acquire, timer));
}

static void acquire_later(struct acquire *a, unsigned delay_ms)
{
    a->timer.fire = acquire_again;
    env_timer_start(a->vol->shard->env, &a->timer, delay_ms);
}

/* Whether its owner, which lives, has had the time it is given to let go. */
static bool has_waited(const struct acquire *a)
{
    const struct shard *s = a->vol->shard;
    return env_now_ns(s->env) - a->since_ns >= (uint64_t)s->owner_wait_ms * 1000000;
}

/* `who` has it. */
static void acquire_refuse(struct acquire *a, const char *who)
{
    char since[DATE_BYTES], text[400], waited[80] = "";
    uint64_t ms = (env_now_ns(a->vol->shard->env) - a->since_ns) / 1000000;
    if (ms >= 1000)
        snprintf(waited, sizeof waited, ", and was not let go of in %llu s",
                 (unsigned long long)ms / 1000);
    snprintf(text, sizeof text, "%.250s since %s%s", who,
             date_format(a->entry.owner.since_ns, since), waited);
    acquire_fail(a, ST_PERM, text);
}

static void acquire_retry(struct acquire *a, unsigned delay_ms)
{
    if (++a->tries > ACQUIRE_TRIES_MAX) {
        acquire_fail(a, ST_BUSY, "others change its owner all the time");
        return;
    }
    acquire_later(a, delay_ms);
}

static void own_log(const struct volume *vol, struct state_record *st)
{
    struct shard *s = vol->shard;
    st->n_logs = 0;
    if (shard_uses_log(s)) {
        st->n_logs = 1;
        st->logs[0] = (struct log_position){.log_id = store_log_id(s->log),
                                            .applied_seq = store_log_next_seq(s->log) - 1};
    }
}

static void owned(struct volume *vol)
{
    struct acquire *a = vol->acquire;
    note_changes(vol, &vol->state, &a->entry.owner);
    vol->times_taken++;
    vol->changed_before_taken = vol->state.changed != a->changed_first;
    acquire_end(a);
    vol->ownership = VOL_OWNED;
    mailbox_start(vol);
    resume_parked(vol);
    cleaner_kick(vol, false);
    volume_progress(vol);
}

static void logs_settled(struct vol_io *io)
{
    struct acquire *a = container_of(io, struct acquire, sync);
    struct volume *vol = a->vol;
    if (!vol->lost && io->st != ST_OK) {
        /* The commit is tried again by itself; wait for it again. */
        volume_begin_io(vol, io);
        io->kind = IO_SYNC;
        flush_by_commit(vol, io);
        return;
    }
    a->inflight = false;
    if (vol->lost) {
        acquire_fail(a, ST_PERM, "its owner changed while its log was replayed");
        return;
    }
    owned(vol);
}

static void disowned(struct store_commit *commit, enum status st)
{
    struct acquire *a = container_of(commit, struct acquire, commit);
    struct volume *vol = a->vol;
    (void)st; /* at worst the owner key still names us, and whoever asks is answered so */
    a->inflight = false;
    if (!vol->lost)
        volume_lose(vol, a->why);
    acquire_fail(a, a->st, a->why);
}

/* A volume nobody can have must not look owned: others would wait for its owner's answer and
 * end this process. What its log holds stays where it is. */
static void disown(struct acquire *a)
{
    struct volume *vol = a->vol;
    a->owner = vol->owner;
    memset(a->owner.session, 0, sizeof a->owner.session);
    size_t len = owner_encode(&a->owner, key_slice(&vol->owner_key), a->owner_bytes);
    a->checks[0] = (struct store_check){.kind = STORE_CHECK_VALUE,
                                        .key = key_slice(&vol->owner_key),
                                        .value = {vol->owner_bytes, vol->owner_len}};
    a->mutations[0] = (struct store_mutation){
        .kind = STORE_SET, .key = key_slice(&vol->owner_key), .head = {a->owner_bytes, len}};
    a->commit = (struct store_commit){.checks = a->checks,
                                      .n_checks = 1,
                                      .mutations = a->mutations,
                                      .n_mutations = 1,
                                      .wake_watchers = true,
                                      .reserved = true,
                                      .done = disowned};
    store_commit(vol->shard->store, vol->shard->env, &a->commit);
}

static void replayed(struct volume *vol, enum status st)
{
    struct acquire *a = vol->acquire;
    if (st != ST_OK || vol->lost) {
        vol->replaying = false;
        if (!vol->lost) {
            a->st = ST_IO;
            snprintf(a->why, sizeof a->why, "the write log of its last owner can't be replayed");
            disown(a);
            return;
        }
        a->inflight = false;
        acquire_fail(a, ST_PERM, "its owner changed while its log was replayed");
        return;
    }
    /* Everything of the old logs is in the store: from here on only ours counts. */
    vol->replaying = false;
    own_log(vol, &vol->state);
    vol->open->replayed_log = 0;
    vol->open->force = true;
    a->sync.kind = IO_SYNC;
    a->sync.done = logs_settled;
    volume_begin_io(vol, &a->sync);
    a->sync.kind = IO_SYNC;
    flush_by_commit(vol, &a->sync);
}

/* What is known of the volume is whole: what its log holds is next. */
static void acquire_opened(struct acquire *a)
{
    struct volume *vol = a->vol;
    CHECK(list_empty(&vol->gens));
    gen_open(vol);
    bool mine = a->state.n_logs == 0 ||
                (a->state.n_logs == 1 && shard_uses_log(vol->shard) &&
                 a->state.logs[0].log_id == store_log_id(vol->shard->log));
    if (mine) {
        owned(vol);
        return;
    }
    vol->replaying = true;
    a->inflight = true;
    replay_start(vol, replayed);
}

static void history_again(struct env_timer *timer)
{
    history_read(container_of(timer, struct acquire, timer));
}

/* Nobody but the owner changes these, so they hold for as long as the volume is owned. */
static void history_got(struct store_read *read, enum status st)
{
    struct acquire *a = container_of(read, struct acquire, read);
    struct volume *vol = a->vol;
    const struct store_get *get = &a->gets[0];
    const struct store_range *range = &a->history_range;
    const char *damaged = NULL;
    a->inflight = false;
    if (st == ST_OK && get->st != ST_NOTFOUND)
        st = get->st;
    if (st == ST_OK && get->st == ST_OK && !ancestry_decode(get->key, get->head, &vol->ancestry))
        damaged = "the record of where it comes from is damaged";
    for (uint32_t i = 0; st == ST_OK && !damaged && i < range->n_pairs; i++) {
        uint64_t branch, epoch;
        struct snapshot_record rec;
        if (!key_parse_snapshot(range->pairs[i].key, &branch, &epoch) ||
            !snapshot_decode(range->pairs[i].key, range->pairs[i].head, &rec))
            damaged = "the record of a snapshot of it is damaged";
        else
            history_add(&vol->history, epoch, &rec);
    }
    if (range->more)
        damaged = "it has more snapshots than there can be";
    store_read_release(read);
    if (damaged || (st != ST_OK && st != ST_UNAVAIL)) {
        a->st = damaged ? ST_IO : st;
        snprintf(a->why, sizeof a->why, "%s", damaged ? damaged : status_text(st));
        disown(a);
        return;
    }
    if (st != ST_OK) {
        a->timer.fire = history_again;
        env_timer_start(vol->shard->env, &a->timer, AGAIN_MS);
        return;
    }
    vol->protected_epoch = history_newest_live(&vol->history);
    if (!shard_has_session(vol->shard, a->incarnation)) {
        acquire_later(a, ADRIFT_MS);
        return;
    }
    acquire_opened(a);
}

static void history_read(struct acquire *a)
{
    struct volume *vol = a->vol;
    key_ancestry(&a->header_key, vol->branch);
    key_prefix_branch(&a->history_begin, 'v', vol->branch);
    a->history_end = a->history_begin;
    key_prefix_end(&a->history_end);
    a->gets[0] = (struct store_get){.key = key_slice(&a->header_key)};
    a->history_range = (struct store_range){.begin = key_slice(&a->history_begin),
                                            .end = key_slice(&a->history_end),
                                            .limit = 2 * SNAPSHOTS_MAX};
    a->read = (struct store_read){.gets = a->gets,
                                  .n_gets = 1,
                                  .ranges = &a->history_range,
                                  .n_ranges = 1,
                                  .done = history_got};
    history_forget_all(&vol->history);
    a->inflight = true;
    store_read(vol->shard->store, vol->shard->env, &a->read);
}

static void acquire_committed(struct store_commit *commit, enum status st)
{
    struct acquire *a = container_of(commit, struct acquire, commit);
    struct volume *vol = a->vol;
    struct err e;
    a->inflight = false;
    if (st == ST_CONFLICT) {
        acquire_retry(a, 1);
        return;
    }
    if (st != ST_OK) {
        acquire_fail(a, st, status_text(st));
        return;
    }
    if (a->by_force) {
        /* Its owner went on all the time; from now on it can't, and the state stands still. */
        a->by_force = false;
        acquire_read(a);
        return;
    }
    if (!shard_has_session(vol->shard, a->incarnation)) {
        /* It was taken for a session that is over by now: free, and ours no more than others'. */
        acquire_later(a, ADRIFT_MS);
        return;
    }
    if (a->fence) {
        vol->stats.fencings++;
        log_volume_warning(vol->name,
                           "volume %s: taken from process %u on %s, which gave no sign of life "
                           "and is fenced: all its volumes are free",
                           vol->name, a->entry.owner.pid, a->entry.owner.host);
    }
    st = volume_set_header(vol, &a->new_header, &e);
    if (st != ST_OK) {
        acquire_fail(a, st, e.text);
        return;
    }
    vol->owner = a->owner;
    vol->owner_len = owner_encode(&vol->owner, key_slice(&vol->owner_key), vol->owner_bytes);
    vol->state = a->state;
    vol->data_blocks = a->state.data_blocks;
    vol->committed_gen = vol->gen_next = a->state.generation;
    vol->last_seq = 0;
    vol->committed_epoch = vol->header.epoch - 1;
    vol->ancestry = (struct ancestry_record){0};
    history_forget_all(&vol->history);
    vol->protected_epoch = 0;
    if (vol->header.features.incompat & FEATURE_INCOMPAT_HISTORY)
        history_read(a);
    else
        acquire_opened(a);
}

static void acquire_take(struct acquire *a)
{
    struct volume *vol = a->vol;
    struct shard *s = vol->shard;
    const struct session *session = s->session;
    struct owner_record *o = &a->owner;
    size_t n = 1, n_checks = a->by_force ? 2 : 3;

    a->incarnation = s->incarnation;
    if (!shard_has_session(s, s->incarnation)) {
        acquire_later(a, ADRIFT_MS);
        return;
    }
    o->token = a->entry.owner.token + 1;
    memcpy(o->session, session->id, sizeof o->session);
    o->since_ns = env_realtime_ns(s->env);
    o->pid = session->pid;
    snprintf(o->host, sizeof o->host, "%s", session->host);
    snprintf(o->address, sizeof o->address, "%s", session->address);
    size_t len = owner_encode(o, key_slice(&vol->owner_key), a->owner_bytes);

    a->checks[0] = (struct store_check){
        .kind = a->was_there ? STORE_CHECK_VALUE : STORE_CHECK_ABSENT,
        .key = key_slice(&vol->owner_key),
        .value = {a->was, a->was_len}};
    a->checks[1] = (struct store_check){.kind = STORE_CHECK_VALUE,
                                        .key = key_slice(&a->header_key),
                                        .value = {a->header, a->header_len}};
    /* A last commit of the owner may have come since this was read: what it says counts. */
    a->checks[2] = (struct store_check){.kind = STORE_CHECK_VALUE,
                                        .key = key_slice(&a->state_key),
                                        .value = {a->state_was, a->state_was_len}};
    a->mutations[0] = (struct store_mutation){
        .kind = STORE_SET, .key = key_slice(&vol->owner_key), .head = {a->owner_bytes, len}};
    if (a->fence) {
        a->checks[n_checks++] = (struct store_check){.kind = STORE_CHECK_VALUE,
                                                     .key = key_slice(&a->sight.key),
                                                     .value = {a->sight.bytes, a->sight.len}};
        len = session_fenced_bytes(&a->sight, a->fenced);
        a->mutations[n++] = (struct store_mutation){
            .kind = STORE_SET, .key = key_slice(&a->sight.key), .head = {a->fenced, len}};
    }
    a->state = a->entry.state;
    if (!a->state.n_logs && !a->by_force) {
        own_log(vol, &a->state);
        len = state_encode(&a->state, key_slice(&a->state_key), a->state_bytes);
        a->mutations[n++] = (struct store_mutation){
            .kind = STORE_SET, .key = key_slice(&a->state_key), .head = {a->state_bytes, len}};
    }
    a->commit = (struct store_commit){.checks = a->checks,
                                      .n_checks = n_checks,
                                      .mutations = a->mutations,
                                      .n_mutations = n,
                                      .wake_watchers = true,
                                      .reserved = true,
                                      .done = acquire_committed};
    vol->may_be_ours = true;
    a->inflight = true;
    store_commit(s->store, s->env, &a->commit);
}

static void kill_work(struct env_work *work)
{
    struct acquire *a = container_of(work, struct acquire, kill);
    a->kill_st = store_session_kill(a->vol->shard->store, a->entry.owner.session, &a->kill_err);
}

/* An owner that stood still is ended now. One that is only slow is asked again: it may be
 * writing what it has to before it lets go. */
static void kill_done(struct env_work *work)
{
    struct acquire *a = container_of(work, struct acquire, kill);
    a->inflight = false;
    if (a->kill_st == ST_OK)
        log_volume_warning(a->vol->name,
                           "volume %s: its owner, process %u, stood still and was ended",
                           a->vol->name, a->entry.owner.pid);
    if (a->kill_st == ST_OK || (a->kill_st == ST_BUSY && ++a->times_slow < TIMES_SLOW_MAX))
        acquire_retry(a, 1);
    else
        acquire_fail(a, ST_PERM, a->kill_err.text);
}

/* Nobody waits for it any more. */
static void acquire_drop(struct acquire *a)
{
    struct volume *vol = a->vol;
    acquire_end(a);
    vol->ownership = VOL_UNOWNED;
    volume_progress(vol);
}

static void acquire_asked(struct catalog_op *op)
{
    struct acquire *a = container_of(op, struct acquire, ask);
    struct volume *vol = a->vol;
    struct shard *s = vol->shard;
    enum status st = op->st;
    struct err e = op->err;
    a->inflight = false;
    catalog_op_free(op);
    if (st == ST_BUSY) {
        a->times_deaf = 0;
        a->signs_seen = a->sight.n_changes;
        if (list_empty(&vol->parked))
            acquire_drop(a);
        else if (has_waited(a))
            acquire_refuse(a, e.text);
        else
            acquire_later(a, ASK_AGAIN_MS);
        return;
    }
    if (s->session->timed) {
        /* Gone, or given back, or no answer: the next look says whether it lives. */
        if (st == ST_OK || st == ST_NOTFOUND)
            acquire_retry(a, 1);
        else
            acquire_later(a, session_silence_left_ns(&a->sight) ? ASK_AGAIN_MS : 1);
        return;
    }
    if (st == ST_UNAVAIL && store_session_probe(s->store, a->entry.owner.session) ==
                                STORE_SESSION_ALIVE) {
        log_volume_warning(vol->name,
                           "volume %s: its owner, process %u on %s, gave no answer for %u ms",
                           vol->name, a->entry.owner.pid, a->entry.owner.host,
                           s->session->lease_ms);
        a->kill.work = kill_work;
        a->kill.done = kill_done;
        a->inflight = true;
        env_work(s->env, &a->kill);
        return;
    }
    acquire_retry(a, 1);
}

static void acquire_ask(struct acquire *a, uint32_t wait_ms)
{
    struct shard *s = a->vol->shard;
    struct mail_record mail = {.kind = MAIL_RELEASE};
    snprintf(mail.from, sizeof mail.from, "%.100s pid %u", s->session->host, s->session->pid);
    /* (No view has an owner: the name is a volume's.) */
    memcpy(a->entry.name, a->vol->name, sizeof a->entry.name - 1);
    a->entry.branch = a->vol->branch;
    a->ask = (struct catalog_op){.done = acquire_asked};
    a->inflight = true;
    catalog_ask_owner(&a->ask, s->store, s->env, &a->entry, &mail, wait_ms, &a->sight, false);
}

/* What the owner's session record says, on stores that can't tell by themselves. */
static void acquire_looked(struct store_read *read, enum status st)
{
    struct acquire *a = container_of(read, struct acquire, read);
    struct shard *s = a->vol->shard;
    struct session_sight *sight = &a->sight;
    a->inflight = false;
    if (st == ST_OK && a->gets[0].st != ST_NOTFOUND)
        st = a->gets[0].st;
    /* (A read that failed as a whole says nothing of the single get.) */
    enum session_verdict verdict =
        st == ST_OK ? session_judge(sight, &a->gets[0], s->env, s->session->host) : SESSION_MAYBE;
    store_read_release(read);
    if (st != ST_OK) {
        acquire_fail(a, st, "its owner's session record can't be read");
        return;
    }
    if (s->session->skip_lease) {
        log_volume_warning(a->vol->name,
                           "volume %s: taken by force from process %u on %s "
                           "(FDB_NBD_TEST_SKIP_LEASE)",
                           a->vol->name, a->entry.owner.pid, a->entry.owner.host);
        a->by_force = true;
        acquire_take(a);
        return;
    }
    a->fence = verdict == SESSION_GONE || verdict == SESSION_SILENT;
    if (verdict != SESSION_MAYBE) {
        acquire_take(a);
        return;
    }
    if (sight->n_changes > a->signs_seen)
        a->times_deaf++;
    a->signs_seen = sight->n_changes;
    if (a->times_deaf >= TIMES_DEAF_MAX && has_waited(a)) {
        const struct owner_record *o = &a->entry.owner;
        char who[2 * HOST_BYTES_MAX + 100];
        snprintf(who, sizeof who,
                 "process %u on %s (%s), which lives but gives no answer, has it in use", o->pid,
                 o->host, o->address);
        acquire_refuse(a, who);
        return;
    }
    acquire_ask(a, (uint32_t)(session_silence_left_ns(sight) / 1000000 + 1));
}

static void acquire_look(struct acquire *a)
{
    struct shard *s = a->vol->shard;
    session_sight_begin(&a->sight, a->entry.owner.session);
    a->gets[0] = (struct store_get){.key = key_slice(&a->sight.key)};
    a->read = (struct store_read){.gets = a->gets, .n_gets = 1, .done = acquire_looked};
    a->inflight = true;
    store_read(s->store, s->env, &a->read);
}

static void acquire_got(struct store_read *read, enum status st)
{
    struct acquire *a = container_of(read, struct acquire, read);
    struct volume *vol = a->vol;
    struct shard *s = vol->shard;
    const struct store_get *h = &a->gets[0], *o = &a->gets[1], *t = &a->gets[2];
    struct catalog_entry *entry = &a->entry;
    const char *damaged = NULL;

    a->inflight = false;
    memset(&entry->owner, 0, sizeof entry->owner);
    if (st == ST_OK)
        st = h->st;
    if (st == ST_OK) {
        if (!header_decode(h->key, h->head, &a->new_header))
            damaged = "its header is damaged";
        else if (t->st != ST_OK || !state_decode(t->key, t->head, &entry->state))
            damaged = "its state record is damaged";
        a->was_there = o->st == ST_OK;
        if (o->st == ST_IO || (a->was_there && !owner_decode(o->key, o->head, &entry->owner)))
            damaged = "its owner record is damaged";
    }
    if (st == ST_OK && !damaged) {
        a->header_len = h->head.len;
        memcpy(a->header, h->head.data, h->head.len);
        a->state_was_len = t->head.len;
        memcpy(a->state_was, t->head.data, t->head.len);
        a->was_len = a->was_there ? o->head.len : 0;
        if (a->was_there)
            memcpy(a->was, o->head.data, o->head.len);
    }
    store_read_release(read);
    if (st != ST_OK && st != ST_NOTFOUND && vol->closing && vol->may_be_ours &&
        ++a->tries <= GIVE_BACK_TRIES_MAX) {
        acquire_later(a, AGAIN_MS);
        return;
    }
    if (st == ST_NOTFOUND || damaged || vol->closing)
        vol->may_be_ours = false;
    if (st != ST_OK || damaged) {
        acquire_fail(a, damaged ? ST_IO : st,
                     damaged            ? damaged
                     : st == ST_NOTFOUND ? "it was removed"
                                         : status_text(st));
        return;
    }
    a->fence = a->by_force = false;
    if (!a->looked)
        a->changed_first = entry->state.changed;
    a->looked = true;
    note_changes(vol, &entry->state, &entry->owner);
    refuse_outdated(vol);
    /* (One that is ours already has to be given back, so it is taken first.) */
    vol->may_be_ours = !memcmp(entry->owner.session, s->session->id, SESSION_ID_BYTES);
    if (list_empty(&vol->parked) && !vol->may_be_ours) {
        acquire_drop(a);
        return;
    }
    if (volume_import_unfinished(vol, &a->new_header) && !vol->may_be_ours)
        acquire_fail(a, ST_PERM, "an import into it is not complete");
    else if (!shard_has_session(s, s->incarnation))
        acquire_later(a, ADRIFT_MS);
    else if (session_none(&entry->owner) ||
             !memcmp(entry->owner.session, s->session->id, SESSION_ID_BYTES))
        acquire_take(a);
    else if (s->session->timed)
        acquire_look(a);
    else if (store_session_probe(s->store, entry->owner.session) == STORE_SESSION_DEAD)
        acquire_take(a);
    else
        acquire_ask(a, s->session->lease_ms);
}

static void acquire_read(struct acquire *a)
{
    struct volume *vol = a->vol;
    key_header(&a->header_key, vol->branch);
    key_state(&a->state_key, vol->branch);
    a->gets[0] = (struct store_get){.key = key_slice(&a->header_key)};
    a->gets[1] = (struct store_get){.key = key_slice(&vol->owner_key)};
    a->gets[2] = (struct store_get){.key = key_slice(&a->state_key)};
    a->read = (struct store_read){.gets = a->gets, .n_gets = 3, .done = acquire_got};
    a->inflight = true;
    store_read(vol->shard->store, vol->shard->env, &a->read);
}

static void acquire_start(struct volume *vol)
{
    struct acquire *a = mem_zalloc(sizeof *a);
    a->vol = vol;
    a->since_ns = env_now_ns(vol->shard->env);
    vol->acquire = a;
    vol->ownership = VOL_ACQUIRING;
    acquire_read(a);
}

bool owner_ready(struct volume *vol, struct vol_io *io)
{
    if (vol->view_epoch && !vol->lost)
        return true;
    if (vol->ownership == VOL_OWNED && !vol->shard->in_doubt && !is_frozen(vol, io))
        return true;
    io->stage = IO_PARKED;
    list_add_tail(&vol->parked, &io->link);
    if (vol->lost)
        volume_fail_parked_soon(vol);
    else if (vol->ownership == VOL_UNOWNED)
        acquire_start(vol);
    return false;
}

void owner_settle(struct volume *vol)
{
    if (vol->closing && vol->may_be_ours && vol->ownership == VOL_UNOWNED && !vol->lost)
        acquire_start(vol);
}

void owner_resume(struct volume *vol)
{
    if (vol->ownership == VOL_OWNED && !vol->shard->in_doubt)
        resume_parked(vol);
}

/* --- giving back --------------------------------------------------------------------- */

static void release_retry(struct env_timer *timer)
{
    struct release *r = container_of(timer, struct release, retry);
    struct volume *vol = r->vol;
    r->committing = false;
    if (vol->lost)
        owner_forget(vol);
    volume_progress(vol);
}

static void release_committed(struct store_commit *commit, enum status st)
{
    struct release *r = container_of(commit, struct release, commit);
    struct volume *vol = r->vol;
    if (st != ST_OK && st != ST_CONFLICT && !vol->lost) {
        log_volume_error(vol->name, "volume %s can't be given back: %s; trying again", vol->name,
                         status_text(st));
        r->retry.fire = release_retry;
        env_timer_start(vol->shard->env, &r->retry, 1000);
        return;
    }
    vol->may_be_ours = false;
    vol->release = NULL;
    free(r);
    if (st == ST_CONFLICT && !vol->lost)
        volume_lose(vol, "another server owns it now");
    if (!vol->lost) {
        struct gen *g = vol->open;
        CHECK(gen_empty(g) && vol->gens_queued == 0);
        gen_free_all(vol);
        volume_drop_cache(vol);
        vol->changed = vol->state.changed;
        vol->ownership = VOL_UNOWNED;
    }
    void (*done)(struct volume *, void *) = vol->release_done;
    vol->release_done = NULL;
    if (done)
        done(vol, vol->release_arg);
    if (!vol->lost && !list_empty(&vol->parked) && vol->ownership == VOL_UNOWNED)
        acquire_start(vol);
    volume_progress(vol);
}

static void release_commit(struct volume *vol)
{
    struct release *r = vol->release;
    struct shard *s = vol->shard;
    struct state_record state = vol->state;

    r->committing = true;
    r->owner = vol->owner;
    memset(r->owner.session, 0, sizeof r->owner.session);
    state.n_logs = 0;
    key_state(&r->state_key, vol->branch);
    size_t owner_len = owner_encode(&r->owner, key_slice(&vol->owner_key), r->owner_bytes);
    size_t state_len = state_encode(&state, key_slice(&r->state_key), r->state_bytes);
    r->check = (struct store_check){.kind = STORE_CHECK_VALUE,
                                    .key = key_slice(&vol->owner_key),
                                    .value = {vol->owner_bytes, vol->owner_len}};
    r->mutations[0] = (struct store_mutation){
        .kind = STORE_SET, .key = key_slice(&vol->owner_key), .head = {r->owner_bytes, owner_len}};
    r->mutations[1] = (struct store_mutation){
        .kind = STORE_SET, .key = key_slice(&r->state_key), .head = {r->state_bytes, state_len}};
    r->commit = (struct store_commit){.checks = &r->check,
                                      .n_checks = 1,
                                      .mutations = r->mutations,
                                      .n_mutations = 2,
                                      .wake_watchers = true,
                                      .reserved = true,
                                      .done = release_committed};
    store_commit(s->store, s->env, &r->commit);
}

static unsigned parked_count(const struct volume *vol)
{
    unsigned n = 0;
    list_for_each(l, &vol->parked)
        n++;
    return n;
}

void owner_progress(struct volume *vol)
{
    struct release *r = vol->release;
    if (!r || r->committing || vol->lost)
        return;
    if (vol->busy > parked_count(vol) || vol->fetches || index_loading(vol))
        return;
    if (!gen_empty(vol->open))
        gen_seal(vol, false);
    if (!vol->gens_queued)
        release_commit(vol);
}

void owner_release(struct volume *vol, void (*done)(struct volume *vol, void *arg), void *arg)
{
    CHECK(vol->ownership == VOL_OWNED && !vol->release);
    freeze_end(vol);
    vol->ownership = VOL_RELEASING;
    vol->release = mem_zalloc(sizeof *vol->release);
    vol->release->vol = vol;
    vol->release_done = done;
    vol->release_arg = arg;
    cleaner_stop(vol);
    if (vol->mailbox && !vol->mailbox->handling && vol->mailbox->armed) {
        store_watch_stop(&vol->mailbox->watch);
        vol->mailbox->armed = false;
    }
    volume_progress(vol);
}

/* --- the mailbox --------------------------------------------------------------------- */

static void mailbox_fired(struct store_watch *watch)
{
    struct mailbox *m = container_of(watch, struct mailbox, watch);
    m->armed = false;
    mailbox_look(m);
}

static void mailbox_answered(struct store_commit *commit, enum status st)
{
    struct mailbox *m = container_of(commit, struct mailbox, commit);
    m->inflight--;
    m->handling = false;
    /* A conflict: whoever asked gave up meanwhile, or the volume is not ours any more, which is
     * for a commit of data to find out; what comes next wakes us. */
    if (m->vol->ownership == VOL_OWNED && (st != ST_CONFLICT || !m->armed))
        mailbox_look(m);
    volume_progress(m->vol);
}

/* Tells who had what changed: the log is where people look for it later. */
static void audit(const struct mailbox *m)
{
    const struct mail_record *mail = &m->mail;
    const char *name = m->vol->name;
    switch (mail->kind) {
    case MAIL_RESIZE:
        log_volume_info(name, "audit: %s: resized volume \"%s\" to %llu bytes", mail->from, name,
                        (unsigned long long)mail->size);
        break;
    case MAIL_EVICT:
        log_volume_info(name, "audit: %s: evicted volume \"%s\"", mail->from, name);
        break;
    case MAIL_SNAPSHOT_CREATE:
        log_volume_info(name, "audit: %s: created snapshot \"%s@%s\"", mail->from, name,
                        mail->name);
        break;
    case MAIL_SNAPSHOT_REMOVE:
        log_volume_info(name, "audit: %s: removed snapshot \"%s@%s\"", mail->from, name,
                        mail->name);
        break;
    case MAIL_SNAPSHOT_RENAME:
        log_volume_info(name, "audit: %s: renamed snapshot \"%s@%s\" to \"%s\"", mail->from, name,
                        mail->name, mail->to);
        break;
    case MAIL_FLATTEN:
        if (mail->number == 0)
            log_volume_info(name, "audit: %s: began to flatten volume \"%s\"", mail->from, name);
        break;
    default:
        break; /* changes nothing that stays */
    }
}

static void mailbox_answer_number(struct mailbox *m, enum status st, const char *text,
                                  uint64_t number)
{
    struct volume *vol = m->vol;
    struct shard *s = vol->shard;
    struct answer_record answer = {
        .id = m->mail.id, .status = (uint8_t)st, .number = number};
    size_t n_checks = 1;
    if (s->member && vol->lost) {
        /* The question is not for us, but for whoever owns the volume now. */
        m->handling = false;
        return;
    }
    if (st == ST_OK)
        audit(m);
    snprintf(answer.text, sizeof answer.text, "%s", text);
    size_t len = answer_encode(&answer, key_slice(&m->answer), m->reply);
    m->checks[0] = (struct store_check){.kind = STORE_CHECK_VALUE,
                                        .key = key_slice(&m->question),
                                        .value = {m->raw, m->raw_len}};
    if (s->member && vol->ownership == VOL_OWNED)
        m->checks[n_checks++] = (struct store_check){.kind = STORE_CHECK_VALUE,
                                                     .key = key_slice(&vol->owner_key),
                                                     .value = {vol->owner_bytes, vol->owner_len}};
    m->mutations[0] = (struct store_mutation){
        .kind = STORE_SET, .key = key_slice(&m->answer), .head = {m->reply, len}};
    m->mutations[1] =
        (struct store_mutation){.kind = STORE_CLEAR, .key = key_slice(&m->question)};
    m->commit = (struct store_commit){.checks = m->checks,
                                      .n_checks = n_checks,
                                      .mutations = m->mutations,
                                      .n_mutations = 2,
                                      .wake_watchers = true,
                                      .reserved = true,
                                      .done = mailbox_answered};
    m->inflight++;
    store_commit(s->store, s->env, &m->commit);
}

static void mailbox_answer(struct mailbox *m, enum status st, const char *text)
{
    mailbox_answer_number(m, st, text, 0);
}

static void mail_released(struct volume *vol, void *arg)
{
    struct mailbox *m = arg;
    m->inflight--;
    mailbox_answer(m, vol->lost ? ST_IO : ST_OK, vol->lost ? "it was lost" : "given back");
}

/* Counts what clients ask for; what the cache answers too. */
static uint64_t requests_of(const struct volume *vol)
{
    return vol->requests + vol->stats.cache_hits;
}

static void mail_idle_check(struct env_timer *timer)
{
    struct mailbox *m = container_of(timer, struct mailbox, timer);
    struct volume *vol = m->vol;
    char text[512];
    bool leaving = vol->shard->leaving; /* takes no new requests */
    bool idle = vol->busy == 0 &&
                (leaving || (!vol->kept && requests_of(vol) == m->requests_then));
    if (vol->ownership == VOL_OWNED && idle && !vol->closing) {
        owner_release(vol, mail_released, m);
        return;
    }
    if (vol->ownership == VOL_OWNED && leaving) {
        env_timer_start(vol->shard->env, &m->timer, LEAVING_LOOK_MS);
        return;
    }
    m->inflight--;
    if (vol->ownership != VOL_OWNED) {
        mailbox_answer(m, ST_OK, "given back");
    } else {
        snprintf(text, sizeof text, "it is in use by %u connection%s to process %u on %s (%s)",
                 vol->refs, vol->refs == 1 ? "" : "s", vol->owner.pid, vol->owner.host,
                 vol->owner.address);
        mailbox_answer(m, ST_BUSY, text);
    }
    volume_progress(vol);
}

static void mail_io_done(struct vol_io *io)
{
    struct mailbox *m = container_of(io, struct mailbox, io);
    m->inflight--;
    const char *text = io->st == ST_OK ? "done" : status_text(io->st);
    if (m->mail.kind == MAIL_RESIZE && io->st == ST_INVAL)
        text = "it is larger than that already; making it smaller cuts data off and needs --shrink";
    mailbox_answer(m, io->st, text);
}

static void mail_history_done(struct vol_io *io)
{
    struct vol_history_op *op = container_of(io, struct vol_history_op, io);
    struct mailbox *m = container_of(op, struct mailbox, history);
    m->inflight--;
    mailbox_answer_number(m, io->st, io->st == ST_OK ? "done" : op->err.text,
                          m->mail.kind == MAIL_FLATTEN ? io->offset : op->epoch);
}

static void mail_evicted(struct env_timer *timer)
{
    struct mailbox *m = container_of(timer, struct mailbox, timer);
    struct volume *vol = m->vol;
    if (vol->busy > parked_count(vol)) {
        /* Requests of the connections that were told to end are on their way out. */
        volume_fail_waiting(vol);
        env_timer_start(vol->shard->env, &m->timer, 1);
        return;
    }
    if (vol->ownership == VOL_OWNED) {
        owner_release(vol, mail_released, m);
        return;
    }
    m->inflight--;
    mailbox_answer(m, ST_OK, "given back");
    volume_progress(vol);
}

static void mailbox_handle(struct mailbox *m)
{
    struct volume *vol = m->vol;
    m->handling = true;
    /* What an import must be able to go back to stays as it is. */
    if (vol->importing && m->mail.kind != MAIL_RELEASE && m->mail.kind != MAIL_EVICT &&
        m->mail.kind != MAIL_SYNC) {
        mailbox_answer(m, ST_BUSY, "an import into it is under way");
        return;
    }
    switch (m->mail.kind) {
    case MAIL_RELEASE:
        m->requests_then = requests_of(vol);
        m->inflight++;
        m->timer.fire = mail_idle_check;
        env_timer_start(vol->shard->env, &m->timer, IDLE_MS);
        break;
    case MAIL_EVICT:
        log_volume_warning(vol->name, "volume %s: %s has it evicted", vol->name, m->mail.from);
        m->inflight++;
        m->timer.fire = mail_evicted;
        volume_tell_watchers(vol, "evicted by an administrator");
        volume_fail_waiting(vol);
        env_timer_start(vol->shard->env, &m->timer, 1);
        break;
    case MAIL_RESIZE:
    case MAIL_SYNC:
        m->io = (struct vol_io){.done = mail_io_done};
        m->inflight++;
        if (m->mail.kind == MAIL_SYNC)
            volume_sync(vol, &m->io);
        else
            volume_resize(vol, &m->io, m->mail.size, m->mail.shrink);
        break;
    case MAIL_SNAPSHOT_CREATE:
    case MAIL_SNAPSHOT_REMOVE:
    case MAIL_SNAPSHOT_RENAME:
    case MAIL_FLATTEN:
        m->inflight++;
        m->history.io.done = mail_history_done;
        volume_history(vol, &m->history, &m->mail);
        break;
    case MAIL_FREEZE:
        if (volume_freeze(vol, m->mail.token, (uint32_t)min_u64(m->mail.number, FREEZE_MS_MAX)))
            mailbox_answer(m, ST_OK, "frozen");
        else
            mailbox_answer(m, ST_BUSY, "another snapshot of several volumes is being made of it");
        break;
    case MAIL_THAW:
        volume_thaw(vol, m->mail.token);
        mailbox_answer(m, ST_OK, "done");
        break;
    default:
        mailbox_answer(m, ST_UNSUP, "this server does not know what was asked; upgrade it");
    }
}

static void mailbox_read(struct store_read *read, enum status st)
{
    struct mailbox *m = container_of(read, struct mailbox, read);
    struct volume *vol = m->vol;
    bool mail = st == ST_OK && m->get.st == ST_OK && m->get.head.len <= sizeof m->raw &&
                mail_decode(m->get.key, m->get.head, &m->mail);
    if (mail) {
        m->raw_len = m->get.head.len;
        memcpy(m->raw, m->get.head.data, m->raw_len);
    }
    store_read_release(read);
    m->reading = false;
    m->inflight--;
    if (mail && vol->ownership == VOL_OWNED)
        mailbox_handle(m);
    else if (m->again)
        mailbox_look(m);
    volume_progress(vol);
}

/* Arms the watch first, so that a letter written during the read is not overlooked. */
static void mailbox_look(struct mailbox *m)
{
    struct shard *s = m->vol->shard;
    if (m->handling || m->vol->ownership != VOL_OWNED)
        return;
    if (!m->armed) {
        m->armed = true;
        m->watch = (struct store_watch){.key = key_slice(&m->question), .fired = mailbox_fired};
        store_watch(s->store, s->env, &m->watch);
    }
    m->again = m->reading;
    if (m->reading)
        return;
    m->reading = true;
    m->get = (struct store_get){.key = key_slice(&m->question)};
    m->read = (struct store_read){.gets = &m->get, .n_gets = 1, .done = mailbox_read};
    m->inflight++;
    store_read(s->store, s->env, &m->read);
}

static void mailbox_start(struct volume *vol)
{
    struct mailbox *m = vol->mailbox;
    if (!m) {
        m = vol->mailbox = mem_zalloc(sizeof *m);
        m->vol = vol;
        key_mailbox(&m->question, vol->branch);
        key_answer(&m->answer, vol->branch);
    }
    mailbox_look(m);
}

bool owner_quiet(const struct volume *vol)
{
    return !vol->acquire && !vol->release && !(vol->mailbox && vol->mailbox->inflight);
}

void owner_forget(struct volume *vol)
{
    struct mailbox *m = vol->mailbox;
    if (m && m->armed) {
        store_watch_stop(&m->watch);
        m->armed = false;
    }
    if (vol->release && !vol->release->committing) {
        void (*done)(struct volume *, void *) = vol->release_done;
        free(vol->release);
        vol->release = NULL;
        vol->release_done = NULL;
        if (done)
            done(vol, vol->release_arg);
    }
    if (m && !m->inflight) {
        vol->mailbox = NULL;
        free(m);
    }
}
