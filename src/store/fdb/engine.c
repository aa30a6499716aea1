/*
 * A store in a FoundationDB cluster: opening it, which waits for the cluster's
 * first answer, and closing it.
 *
 * All keys stand under one prefix, a tuple's text element, so that several stores
 * share a cluster and every tool can read them.
 */
#include "store/fdb/engine.h"

#include <ctype.h>
#include <errno.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "base/log.h"
#include "store/engines.h"

#define PREFIX_DEFAULT "fdb-nbd"
#define PREFIX_TEXT_BYTES_MAX 64u
#define ANSWER_WAIT_MS 10000u
#define PROTOCOL_WAIT_MS 1000u
#define STILL_WAITING_MS 2000u /* until a server that waits for its cluster says so */
#define SAY_AGAIN_MS 30000u
#define LOCKED_TRIES_MS 1000u
#define LANES_CLEARED_MAX 10000
/* A week of versions: about a million a second. */
#define LANE_OLD_VERSIONS (7ull * 24 * 3600 * 1000000)
/* Of a protocol version the lower bits do not matter to who can talk with whom; the uppermost ones are
 * a flag that servers set and clients do not. */
#define PROTOCOL_MASK 0x0fffffffffff0000ull

/* --- keys and values ------------------------------------------------------------------ */

void fd_key_make(const struct fd *fd, struct fd_key *k, struct slice key)
{
    CHECK(key.len > 0 && key.len <= STORE_KEY_BYTES_MAX);
    memcpy(k->bytes, fd->prefix, (size_t)fd->prefix_len);
    memcpy(k->bytes + fd->prefix_len, key.data, key.len);
    k->len = fd->prefix_len + (int)key.len;
}

static void add_integer(struct fd_key *k, uint32_t n)
{
    uint8_t be[4];
    put_be32(be, n);
    int skip = 0;
    while (skip < 4 && !be[skip])
        skip++;
    k->bytes[k->len++] = (uint8_t)(0x14 + 4 - skip);
    memcpy(k->bytes + k->len, be + skip, (size_t)(4 - skip));
    k->len += 4 - skip;
}

/* ("x", writer): a text and a byte string, both as tuples have them. */
static void writer_key(const struct fd *fd, struct fd_key *k)
{
    fd_key_make(fd, k, (struct slice){"\x02x\x00\x01", 4});
    for (size_t i = 0; i < sizeof fd->writer; i++) {
        k->bytes[k->len++] = fd->writer[i];
        if (!fd->writer[i])
            k->bytes[k->len++] = 0xff;
    }
    k->bytes[k->len++] = 0;
}

void fd_key_lane(const struct fr *fr, struct fd_key *k, uint32_t lane)
{
    writer_key(fr->fd, k);
    add_integer(k, fr->no);
    add_integer(k, lane);
}

void fd_key_bounds(const struct fd *fd, struct fd_key *begin, struct fd_key *end)
{
    memcpy(begin->bytes, fd->prefix, (size_t)fd->prefix_len);
    begin->len = fd->prefix_len;
    *end = *begin;
    end->bytes[end->len++] = 0xff;
}

uint32_t fd_value_put(uint8_t *out, struct slice head, struct slice body)
{
    put_le16(out, (uint16_t)head.len);
    if (head.len)
        memcpy(out + 2, head.data, head.len);
    if (body.len)
        memcpy(out + 2 + head.len, body.data, body.len);
    return (uint32_t)(2 + head.len + body.len);
}

bool fd_value_parse(const uint8_t *value, int len, struct slice *head, struct slice *body)
{
    if (len < 2)
        return false;
    size_t n = get_le16(value), rest = (size_t)len - 2;
    if (n > rest)
        return false;
    *head = (struct slice){value + 2, n};
    *body = (struct slice){value + 2 + n, rest - n};
    return true;
}

/* --- waiting for futures -------------------------------------------------------------- */

static void waited(struct env_task *task)
{
    struct fd_wait *wait = container_of(task, struct fd_wait, task);
    wait->ready(wait);
}

/* Callbacks under way; closing waits for them. */
static _Atomic int n_callbacks;

/* Network thread, or inside fd_wait_add. */
static void counted(FDBFuture *future, void *arg)
{
    struct fd_wait *wait = arg;
    (void)future;
    fd_take_over(wait);
    atomic_fetch_add(&n_callbacks, 1);
    if (atomic_fetch_sub(&wait->left, 1) == 1)
        env_post(wait->env, &wait->task);
    atomic_fetch_sub(&n_callbacks, 1);
}

void fd_wait_begin(struct fr *fr, struct fd_wait *wait, uint32_t n,
                   void (*ready)(struct fd_wait *wait))
{
    wait->env = fr->env;
    wait->ready = ready;
    wait->task.run = waited;
    atomic_store(&wait->left, n);
    fd_health_watch(fr);
}

void fd_wait_add(struct fd_wait *wait, FDBFuture *future)
{
    fd_hand_over(wait);
    int code = fdb.future_set_callback(future, counted, wait);
    CHECK(code == 0);
}

void fd_wait_one(struct fr *fr, struct fd_wait *wait, FDBFuture *future,
                 void (*ready)(struct fd_wait *wait))
{
    fd_wait_begin(fr, wait, 1, ready);
    fd_wait_add(wait, future);
}

void fd_wait_abandon(struct fd_wait *wait, FDBFuture *future)
{
    fdb.future_cancel(future);
    while (atomic_load(&wait->left) || atomic_load(&n_callbacks))
        sched_yield();
    fdb.future_destroy(future);
}

#define LASTING_FIRST_MS 10u
#define LASTING_MS 1000u

static void paused(struct env_timer *timer)
{
    struct fd_retry *retry = container_of(timer, struct fd_retry, timer);
    retry->again(retry, true);
}

static void backed_off(struct fd_wait *wait)
{
    struct fd_retry *retry = container_of(wait, struct fd_retry, wait);
    int code = fdb.future_get_error(retry->future);
    fdb.future_destroy(retry->future);
    retry->future = NULL;
    if (!code) {
        retry->pause_ms = 0;
        retry->again(retry, false);
        return;
    }
    retry->pause_ms = retry->pause_ms ? retry->pause_ms * 2 : LASTING_FIRST_MS;
    if (retry->pause_ms > LASTING_MS)
        retry->pause_ms = LASTING_MS;
    retry->timer.fire = paused;
    env_timer_start(retry->env, &retry->timer, retry->pause_ms);
}

void fd_retry(struct fr *fr, struct fd_retry *retry, FDBTransaction *tr, int code,
              void (*again)(struct fd_retry *retry, bool lasting))
{
    retry->env = fr->env;
    retry->again = again;
    counter_add_shared(&fr->fd->base.counters.retries, 1);
    retry->future = fdb.transaction_on_error(tr, code);
    fd_wait_one(fr, &retry->wait, retry->future, backed_off);
}

/* Outlives whoever stops waiting: the last of the two frees it. */
struct block {
    pthread_mutex_t lock;
    pthread_cond_t cond;
    bool ready;
    int users;
};

static void block_leave(struct block *b)
{
    bool last = --b->users == 0;
    pthread_mutex_unlock(&b->lock);
    if (last) {
        pthread_mutex_destroy(&b->lock);
        pthread_cond_destroy(&b->cond);
        free(b);
    }
}

static void block_ready(FDBFuture *future, void *arg)
{
    struct block *b = arg;
    (void)future;
    fd_take_over(b);
    pthread_mutex_lock(&b->lock);
    b->ready = true;
    pthread_cond_signal(&b->cond);
    block_leave(b);
}

static struct block *block_begin(FDBFuture *future)
{
    struct block *b = mem_zalloc(sizeof *b);
    pthread_condattr_t attr;
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_mutex_init(&b->lock, NULL);
    pthread_cond_init(&b->cond, &attr);
    pthread_condattr_destroy(&attr);
    b->users = 2;
    fd_hand_over(b);
    int code = fdb.future_set_callback(future, block_ready, b);
    CHECK(code == 0);
    return b;
}

static bool block_wait(struct block *b, uint64_t ms)
{
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_sec += (time_t)(ms / 1000);
    until.tv_nsec += (long)(ms % 1000) * 1000000;
    if (until.tv_nsec >= 1000000000) {
        until.tv_sec++;
        until.tv_nsec -= 1000000000;
    }
    pthread_mutex_lock(&b->lock);
    while (!b->ready && pthread_cond_timedwait(&b->cond, &b->lock, &until) == 0)
        ;
    bool ready = b->ready;
    pthread_mutex_unlock(&b->lock);
    return ready;
}

static void block_end(struct block *b)
{
    pthread_mutex_lock(&b->lock);
    block_leave(b);
}

bool fd_block(FDBFuture *future, uint64_t ms)
{
    struct block *b = block_begin(future);
    bool ready = block_wait(b, ms);
    block_end(b);
    return ready;
}

void fd_transaction(struct fd *fd, FDBTransaction **tr, bool background, uint64_t tag)
{
    int code = *tr ? 0 : fdb.database_create_transaction(fd->db, tr);
    CHECK(code == 0);
    /* Nothing here reads what it wrote. Options that a library does not know it refuses, which
     * costs nothing but what they were to give. */
    code = fdb.transaction_set_option(*tr, FDB_TR_READ_YOUR_WRITES_DISABLE, NULL, 0);
    CHECK(code == 0);
    if (background) {
        code = fdb.transaction_set_option(*tr, FDB_TR_PRIORITY_BATCH, NULL, 0);
        code = fdb.transaction_set_option(*tr, FDB_TR_READ_PRIORITY_LOW, NULL, 0);
    }
    if (tag) {
        char text[17];
        int n = snprintf(text, sizeof text, "v%llu", (unsigned long long)tag % 1000000000000000);
        code = fdb.transaction_set_option(*tr, FDB_TR_AUTO_THROTTLE_TAG, (const uint8_t *)text, n);
    }
    (void)code;
}

/* --- reactors --------------------------------------------------------------------------- */

struct fr *fd_reactor(struct fd *fd, struct env *env)
{
    uint32_t n = atomic_load_explicit(&fd->n_reactors, memory_order_acquire);
    for (uint32_t i = 0; i < n; i++)
        if (fd->reactors[i]->env == env)
            return fd->reactors[i];
    struct fr *fr = mem_zalloc(sizeof *fr);
    fr->fd = fd;
    fr->env = env;
    fr->value = mem_alloc(2 + FD_HEAD_BYTES_MAX + FD_BODY_BYTES_MAX);
    list_init(&fr->lanes);
    list_init(&fr->commits);
    list_init(&fr->reads);
    list_init(&fr->committing);
    list_init(&fr->watches);
    list_init(&fr->tickets);
    list_init(&fr->room_waits);
    fd_versions_init(fr);
    pthread_mutex_lock(&fd->lock);
    n = atomic_load(&fd->n_reactors);
    CHECK(n < FD_REACTORS_MAX);
    if (!n)
        env_random(env, fd->writer, sizeof fd->writer);
    fr->no = n;
    fd->reactors[n] = fr;
    atomic_store_explicit(&fd->n_reactors, n + 1, memory_order_release);
    pthread_mutex_unlock(&fd->lock);
    return fr;
}

/* --- sessions --------------------------------------------------------------------------- */

static enum status session_begin(struct store *store, const uint8_t id[STORE_ID_BYTES],
                                 struct err *e)
{
    (void)store, (void)id, (void)e;
    return ST_OK;
}

static void session_end(struct store *store, const uint8_t id[STORE_ID_BYTES])
{
    (void)store, (void)id;
}

static enum store_liveness session_probe(struct store *store, const uint8_t id[STORE_ID_BYTES])
{
    (void)store, (void)id;
    return STORE_SESSION_UNKNOWN;
}

static enum status session_kill(struct store *store, const uint8_t id[STORE_ID_BYTES],
                                struct err *e)
{
    (void)store, (void)id;
    return fail(e, ST_UNSUP, "FoundationDB can't end another process");
}

/* --- opening ---------------------------------------------------------------------------- */

/* "[CLUSTER_FILE][?prefix=TEXT]" */
static enum status parse(struct fd *fd, const char *rest, struct err *e)
{
    const char *query = strchr(rest, '?');
    size_t n = query ? (size_t)(query - rest) : strlen(rest);
    const char *prefix = PREFIX_DEFAULT;
    if (n >= sizeof fd->cluster)
        return fail(e, ST_INVAL, "the path of the cluster file is longer than %zu bytes",
                    sizeof fd->cluster - 1);
    memcpy(fd->cluster, rest, n);
    if (query) {
        if (strncmp(query, "?prefix=", 8) != 0)
            return fail(e, ST_INVAL, "\"%.100s\" is not understood: a FoundationDB store is "
                        "fdb:[CLUSTER_FILE][?prefix=TEXT]", query);
        prefix = query + 8;
    }
    size_t len = strlen(prefix);
    bool plain = len >= 1 && len <= PREFIX_TEXT_BYTES_MAX;
    for (size_t i = 0; i < len && plain; i++)
        plain = isalnum((unsigned char)prefix[i]) || strchr("._-/:", prefix[i]);
    if (!plain)
        return fail(e, ST_INVAL,
                    "the prefix \"%.80s\" must have 1 to %u letters, digits or ._-/: in it", prefix,
                    PREFIX_TEXT_BYTES_MAX);
    memcpy(fd->prefix_text, prefix, len + 1);
    fd->prefix[0] = 0x02;
    memcpy(fd->prefix + 1, prefix, len);
    fd->prefix[len + 1] = 0;
    fd->prefix_len = (int)len + 2;
    snprintf(fd->uri, sizeof fd->uri, "fdb:%s?prefix=%s", fd->cluster, prefix);
    return ST_OK;
}

/* The file every FoundationDB tool would use, for messages. */
static const char *cluster_file(const struct fd *fd)
{
    const char *env = getenv("FDB_CLUSTER_FILE");
    if (*fd->cluster)
        return fd->cluster;
    if (env && *env)
        return env;
    return access("fdb.cluster", F_OK) == 0 ? "fdb.cluster" : "/etc/foundationdb/fdb.cluster";
}

static enum status file_error(const struct fd *fd, int code, struct err *e)
{
    const char *file = cluster_file(fd);
    if (code == FDB_CONNECTION_STRING_INVALID)
        return fail(e, ST_UNAVAIL,
                    "%s is not a FoundationDB cluster file: copy it anew from a machine of the "
                    "cluster", file);
    if (code == FDB_NO_CLUSTER_FILE || code == FDB_FILE_NOT_READABLE)
        return fail(e, ST_UNAVAIL,
                    "there is no FoundationDB cluster file %s that can be read: copy it from a "
                    "machine of the cluster, or name it: --store fdb:/path/to/fdb.cluster", file);
    return fail(e, ST_UNAVAIL, "cannot use the FoundationDB cluster of %s: %s", file,
                fdb.get_error(code));
}

/* What is wrong with the file itself, said before the library is asked, which says less. */
static enum status check_file(const struct fd *fd, struct err *e)
{
    const char *file = cluster_file(fd);
    if (access(file, R_OK) == 0)
        return ST_OK;
    return fail(e, ST_UNAVAIL,
                "there is no FoundationDB cluster file %s that can be read (%s): copy it from a "
                "machine of the cluster, or name it: --store fdb:/path/to/fdb.cluster", file,
                strerror(errno));
}

/* Whether the cluster is there and speaks another protocol; then it never answers else. */
static bool other_protocol(const struct fd *fd, uint64_t *theirs)
{
    if (!fdb.database_get_server_protocol || !fdb.future_get_uint64 || !fdb.protocol)
        return false;
    FDBFuture *future = fdb.database_get_server_protocol(fd->db, 0);
    bool other = fd_block(future, PROTOCOL_WAIT_MS) &&
                 fdb.future_get_uint64(future, theirs) == 0 && *theirs &&
                 (*theirs & PROTOCOL_MASK) != (fdb.protocol & PROTOCOL_MASK);
    fdb.future_destroy(future);
    return other;
}

static enum status no_answer(const struct fd *fd, struct err *e)
{
    uint64_t theirs;
    if (other_protocol(fd, &theirs))
        return fail(e, ST_UNAVAIL,
                    "the FoundationDB cluster of %s speaks protocol %012llx and the client library "
                    "(%s) %012llx: install the library of the cluster's version, or put it into "
                    "the folder named by FDB_NETWORK_OPTION_EXTERNAL_CLIENT_DIRECTORY",
                    cluster_file(fd), (unsigned long long)(theirs & PROTOCOL_MASK) >> 16,
                    fdb.client, (unsigned long long)(fdb.protocol & PROTOCOL_MASK) >> 16);
    return fail(e, ST_UNAVAIL,
                "the FoundationDB cluster of %s does not answer: is it running? "
                "fdbcli -C %s --exec status tells more", cluster_file(fd), cluster_file(fd));
}

/* Waits until the cluster gives a read version. */
static enum status first_answer(struct fd *fd, struct err *e)
{
    bool wait = fd->options.flags & STORE_WAIT;
    FDBTransaction *tr = NULL;
    fd_transaction(fd, &tr, false, 0);
    FDBFuture *future = fdb.transaction_get_read_version(tr);
    struct block *block = block_begin(future);
    enum status st = ST_OK;
    uint64_t waited_ms = 0;
    unsigned said = 0;
    for (;;) {
        uint64_t slice_ms = !wait ? ANSWER_WAIT_MS : said ? SAY_AGAIN_MS : STILL_WAITING_MS;
        if (!block_wait(block, slice_ms)) {
            waited_ms += slice_ms;
            st = no_answer(fd, e);
            if (!wait)
                break;
            log_warning("waiting for FoundationDB since %llu s: %s",
                        (unsigned long long)waited_ms / 1000, e ? e->text : "");
            said++;
            continue;
        }
        int code = fdb.future_get_int64(future, &fd->first_version);
        fdb.future_destroy(future);
        future = NULL;
        st = ST_OK;
        if (!code)
            break;
        if (code == FDB_DATABASE_LOCKED) {
            st = fail(e, ST_UNAVAIL,
                      "the FoundationDB cluster of %s is locked (a restore or a switch to another "
                      "data centre?)", cluster_file(fd));
            if (!wait)
                break;
            if (waited_ms % SAY_AGAIN_MS == 0)
                log_warning("%s", e ? e->text : "");
            said++;
            waited_ms += LOCKED_TRIES_MS;
            usleep(LOCKED_TRIES_MS * 1000);
            fdb.transaction_reset(tr);
            future = fdb.transaction_get_read_version(tr);
            block_end(block);
            block = block_begin(future);
            continue;
        }
        future = fdb.transaction_on_error(tr, code);
        if (!fd_block(future, ANSWER_WAIT_MS) || fdb.future_get_error(future)) {
            st = file_error(fd, code, e);
            break;
        }
        fdb.future_destroy(future);
        future = fdb.transaction_get_read_version(tr);
        block_end(block);
        block = block_begin(future);
    }
    block_end(block);
    if (future)
        fdb.future_destroy(future);
    fdb.transaction_destroy(tr);
    if (st == ST_OK && said)
        log_info("FoundationDB answers after %llu s", (unsigned long long)waited_ms / 1000);
    return st;
}

/* Clears the lanes of processes that died long ago: those that nobody has used for a week. One
 * that is used just now makes this commit fail, which then is left to the next start. */
static void clear_old_lanes(struct fd *fd)
{
    const struct fdb_key_value *kv;
    struct fd_key begin, end;
    FDBTransaction *tr = NULL;
    FDBFuture *future;
    int count = 0, more = 1, n = 0;
    unsigned n_old = 0;
    fd_key_make(fd, &begin, (struct slice){"\x02x\x00", 3});
    end = begin;
    end.bytes[end.len++] = 0xff;
    fd_transaction(fd, &tr, false, 0);
    for (; more && n < LANES_CLEARED_MAX; n += count) {
        future = fdb.transaction_get_range(tr, begin.bytes, begin.len, n > 0, 1, end.bytes, end.len,
                                           0, 1, LANES_CLEARED_MAX - n, 0, FDB_STREAMING_WANT_ALL,
                                           0, 0, 0);
        count = more = 0;
        if (fd_block(future, ANSWER_WAIT_MS) && !fdb.future_get_error(future))
            fdb.future_get_keyvalue_array(future, &kv, &count, &more);
        for (int i = 0; i < count; i++) {
            if (i == count - 1 && kv[i].key_length <= (int)sizeof begin.bytes) {
                begin.len = kv[i].key_length;
                memcpy(begin.bytes, kv[i].key, (size_t)begin.len);
            }
            if (kv[i].value_length != FD_LANE_VALUE_BYTES ||
                get_le64(kv[i].value + 8) == 0 ||
                get_le64(kv[i].value + 8) + LANE_OLD_VERSIONS > (uint64_t)fd->first_version)
                continue;
            fdb.transaction_clear(tr, kv[i].key, kv[i].key_length);
            n_old++;
        }
        fdb.future_destroy(future);
    }
    if (n_old) {
        future = fdb.transaction_commit(tr);
        fd_block(future, ANSWER_WAIT_MS);
        fdb.future_destroy(future);
    }
    fdb.transaction_destroy(tr);
}

/* Takes this handle's commit ids out of the store. Those of processes that died are left to
 * whoever cleans up. */
static void clear_lanes(struct fd *fd)
{
    bool any = false;
    for (uint32_t i = 0; i < fd->n_reactors; i++)
        any |= fd->reactors[i]->n_lanes > 0;
    if (!any)
        return;
    struct fd_key begin, end;
    writer_key(fd, &begin);
    end = begin;
    end.bytes[end.len++] = 0xff;
    FDBTransaction *tr = NULL;
    fd_transaction(fd, &tr, false, 0);
    fdb.transaction_clear_range(tr, begin.bytes, begin.len, end.bytes, end.len);
    FDBFuture *future = fdb.transaction_commit(tr);
    /* Once, and not for long: what stays is a few bytes. */
    fd_block(future, PROTOCOL_WAIT_MS);
    fdb.future_destroy(future);
    fdb.transaction_destroy(tr);
}

static void fd_close(struct store *store)
{
    struct fd *fd = fd_of(store);
    if (fd->db && !atomic_load(&fd->silent_since_ns))
        clear_lanes(fd);
    for (uint32_t i = 0; i < fd->n_reactors; i++) {
        struct fr *fr = fd->reactors[i];
        CHECK(list_empty(&fr->reads) && list_empty(&fr->commits) && list_empty(&fr->committing));
        fd_health_close(fr);
        fd_lanes_close(fr);
        fd_watches_close(fr);
        fd_versions_close(fr);
        env_timer_stop(fr->env, &fr->tick);
        free(fr->value);
        free(fr);
    }
    fd_room_close(fd);
    if (fd->db)
        fdb.database_destroy(fd->db);
    pthread_mutex_destroy(&fd->lock);
    pthread_mutex_destroy(&fd->state_lock);
    free(fd);
}

static const struct store_ops ops = {
    .close = fd_close,
    .read = fd_read,
    .read_release = fd_read_release,
    .commit = fd_commit,
    .watch = fd_watch,
    .watch_stop = fd_watch_stop,
    .reserve = fd_reserve,
    .reserve_wait = fd_reserve_wait,
    .unreserve = fd_unreserve,
    .body_cost = fd_body_cost,
    .session_begin = session_begin,
    .session_end = session_end,
    .session_probe = session_probe,
    .session_kill = session_kill,
    .info = fd_info,
    .usage = fd_usage,
};

static enum status fd_open(const char *rest, const struct store_options *options,
                           struct store **out, struct err *e)
{
    struct fd *fd = mem_zalloc(sizeof *fd);
    fd->base.ops = &ops;
    fd->base.limits = (struct store_limits){.head_bytes_max = FD_HEAD_BYTES_MAX,
                                            .body_bytes_max = FD_BODY_BYTES_MAX,
                                            .batch_bytes_max = FD_BATCH_BYTES_MAX,
                                            .commit_bytes_max = FD_COMMIT_BYTES_MAX,
                                            .body_bytes_best = 16384,
                                            .clears_ranges = true,
                                            .has_log = false,
                                            .needs_heartbeat = true};
    fd->options = *options;
    pthread_mutex_init(&fd->lock, NULL);
    pthread_mutex_init(&fd->state_lock, NULL);
    fd_room_open(fd);

    enum status st = parse(fd, rest, e);
    if (st == ST_OK)
        st = check_file(fd, e);
    if (st == ST_OK)
        st = fdb_api_start(e);
    if (st == ST_OK) {
        int code = fdb.create_database(*fd->cluster ? fd->cluster : NULL, &fd->db);
        if (code) {
            fd->db = NULL;
            st = file_error(fd, code, e);
        }
    }
    if (st == ST_OK)
        st = first_answer(fd, e);
    if (st != ST_OK) {
        fd_close(&fd->base);
        return st;
    }
    if (options->flags & STORE_WAIT)
        clear_old_lanes(fd);
    *out = &fd->base;
    return ST_OK;
}

const struct store_engine store_engine_fdb = {
    .scheme = "fdb",
    .form = "fdb:[CLUSTER_FILE][?prefix=TEXT]",
    .open = fd_open,
    .shutdown = fdb_api_stop,
};
