/*
 * The write log's calls, passed on to the engine that made the log.
 */
#include "store/log.h"

#define LOG_RECORD_HEADER_BYTES 80u

uint64_t store_log_record_bytes(uint64_t payload_len)
{
    return LOG_RECORD_HEADER_BYTES + round_up_u64(payload_len, 8);
}

enum status store_log_open(struct store *store, struct env *env,
                           const uint8_t session[STORE_ID_BYTES], uint64_t bytes,
                           struct store_log **out, struct err *e)
{
    *out = NULL;
    if (!store->ops->log)
        return fail(e, ST_UNSUP, "this kind of store has no write log");
    return store->ops->log->open(store, env, session, bytes, out, e);
}

void store_log_close(struct store_log *log, bool remove)
{
    log->store->ops->log->close(log, remove);
}

uint64_t store_log_id(const struct store_log *log)
{
    return log->store->ops->log->id(log);
}

uint64_t store_log_next_seq(const struct store_log *log)
{
    return log->store->ops->log->next_seq(log);
}

uint64_t store_log_room(const struct store_log *log)
{
    return log->store->ops->log->room(log);
}

uint64_t store_log_capacity(const struct store_log *log)
{
    return log->store->ops->log->capacity(log);
}

uint64_t store_log_append(struct store_log *log, uint64_t stream, const uint8_t meta[32],
                          const struct iovec *iov, int n_iov, uint32_t payload_len)
{
    return log->store->ops->log->append(log, stream, meta, iov, n_iov, payload_len);
}

enum status store_log_submit(struct store_log *log)
{
    return log->store->ops->log->submit(log);
}

void store_log_sync(struct store_log *log, struct store_log_sync *sync)
{
    log->store->ops->log->sync(log, sync);
}

enum status store_log_replay(struct store *store, uint64_t log_id, uint64_t stream,
                             uint64_t after_seq,
                             bool (*take)(void *arg, const struct store_log_record *rec), void *arg,
                             struct err *e)
{
    if (!store->ops->log)
        return fail(e, ST_UNSUP, "this kind of store has no write log");
    return store->ops->log->replay(store, log_id, stream, after_seq, take, arg, e);
}

enum status store_log_remove_unused(struct store *store, const uint64_t *needed, size_t n_needed,
                                    struct err *e)
{
    if (!store->ops->log)
        return ST_OK;
    return store->ops->log->remove_unused(store, needed, n_needed, e);
}
