/*
 * Replay: what a dead owner answered from its log and did not commit.
 *
 * A worker reads the log's records of this volume in batches, the reactor brings
 * them into generations like writes, and each commit moves the mark up to which
 * the log is applied. If this process dies in between, the next owner goes on
 * from that mark.
 */
#include <stdlib.h>

#include "volume/internal.h"

#define BATCH_BYTES (4u << 20)

struct replay {
    struct volume *vol;
    void (*done)(struct volume *vol, enum status st);
    uint32_t at; /* which of state.logs */
    uint64_t after_seq;
    uint64_t records;
    struct env_work work;
    struct store_log_record *batch;
    size_t n, cap, bytes;
    enum status st;
    struct err err;
    bool more;
    struct vol_io sync;
};

static void replay_read(struct replay *r);

static bool take(void *arg, const struct store_log_record *rec)
{
    struct replay *r = arg;
    mem_grow(&r->batch, &r->cap, r->n + 1, sizeof *r->batch);
    struct store_log_record *copy = &r->batch[r->n++];
    *copy = *rec;
    uint8_t *payload = mem_alloc(rec->payload_len ? rec->payload_len : 1);
    if (rec->payload_len)
        memcpy(payload, rec->payload, rec->payload_len);
    copy->payload = payload;
    /* Whole blocks may be dirtied by few bytes, so records count for more than their length. */
    r->bytes += rec->payload_len + 16384;
    r->more = r->bytes >= BATCH_BYTES;
    return !r->more;
}

static void read_work(struct env_work *work)
{
    struct replay *r = container_of(work, struct replay, work);
    struct volume *vol = r->vol;
    r->st = store_log_replay(vol->shard->store, vol->state.logs[r->at].log_id, vol->branch,
                             r->after_seq, take, r, &r->err);
}

static void replay_finish(struct replay *r, enum status st)
{
    struct volume *vol = r->vol;
    void (*done)(struct volume *, enum status) = r->done;
    if (st == ST_OK && r->records)
        log_volume_info(vol->name,
                        "volume %s: replayed %llu writes of its last owner",
                        vol->name, (unsigned long long)r->records);
    free(r->batch);
    free(r);
    done(vol, st);
}

static void batch_committed(struct vol_io *io)
{
    struct replay *r = container_of(io, struct replay, sync);
    struct volume *vol = r->vol;
    if (vol->lost) {
        replay_finish(r, ST_PERM);
        return;
    }
    if (io->st != ST_OK) {
        /* The commit is tried again by itself; wait for it again. */
        r->sync.done = batch_committed;
        volume_begin_io(vol, &r->sync);
        r->sync.kind = IO_SYNC;
        flush_by_commit(vol, &r->sync);
        return;
    }
    if (!r->more) {
        r->at++;
        r->after_seq = r->at < vol->state.n_logs ? vol->state.logs[r->at].applied_seq : 0;
    }
    if (r->at == vol->state.n_logs)
        replay_finish(r, ST_OK);
    else
        replay_read(r);
}

static void read_done(struct env_work *work)
{
    struct replay *r = container_of(work, struct replay, work);
    struct volume *vol = r->vol;
    if (r->st != ST_OK || vol->lost) {
        if (r->st != ST_OK)
            log_volume_error(vol->name, "volume %s: %s", vol->name, r->err.text);
        for (size_t i = 0; i < r->n; i++)
            free((void *)(uintptr_t)r->batch[i].payload);
        replay_finish(r, r->st != ST_OK ? r->st : ST_PERM);
        return;
    }
    vol->open->replayed_log = vol->state.logs[r->at].log_id;
    for (size_t i = 0; i < r->n; i++) {
        struct store_log_record *rec = &r->batch[i];
        write_replay(vol, rec);
        r->after_seq = rec->seq;
        free((void *)(uintptr_t)rec->payload);
    }
    r->records += r->n;
    r->n = r->bytes = 0;
    r->sync.done = batch_committed;
    volume_begin_io(vol, &r->sync);
    r->sync.kind = IO_SYNC;
    flush_by_commit(vol, &r->sync);
}

static void replay_read(struct replay *r)
{
    r->more = false;
    r->work.work = read_work;
    r->work.done = read_done;
    env_work(r->vol->shard->env, &r->work);
}

void replay_start(struct volume *vol, void (*done)(struct volume *vol, enum status st))
{
    struct replay *r = mem_zalloc(sizeof *r);
    r->vol = vol;
    r->done = done;
    r->after_seq = vol->state.logs[0].applied_seq;
    replay_read(r);
}
