/* One server in memory; served.h says what it is for. */
#include "served.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "../sim/mem_store.h"
#include "../sim/sim_env.h"
#include "base/check.h"
#include "base/log.h"
#include "base/mem.h"
#include "base/process.h"
#include "server/connection.h"
#include "volume/catalog.h"
#include "volume/internal.h"

#define STEPS_MAX 200000u /* until something that must come is there */
#define CACHE_BYTES VOLUME_CACHE_BYTES_MIN
#define TURN_NS_MAX 20000u
#define DELAY_NS 20000u
#define LEASE_MS 3000u
#define ROOM_BYTES (256u << 10)
#define FIRST_FD 1000
#define IMAGE_KEYS_MAX 1000u

uint8_t served_a[SERVED_A_BYTES], served_a_then[SERVED_A_BYTES];

struct reactor {
    struct sim_env *env;
    struct list hooks;
    bool turn_due, turned;
};

/* The server of this input. */
static struct {
    struct sim *sim;
    struct mem_store *db;
    struct store *store;
    struct reactor reactor;
    struct session session;
    struct server_config config;
    struct server server;
    struct lane lane;
    bool all_stopped;
} the;

/* --- the program as a process of its own -------------------------------------------------- */

void __wrap_process_self(struct process_id *id);
bool __wrap_process_ended(const struct process_id *id);
pid_t __wrap_getpid(void);
int __wrap_gethostname(char *name, size_t len);
void __wrap_log_line(enum log_level level, const char *volume, const char *client,
                     const char *format, ...) __attribute__((format(printf, 4, 5)));

void __wrap_process_self(struct process_id *id)
{
    *id = (struct process_id){.boot = {1}, .pid_namespace = 1, .start_ticks = 1, .pid = 1000};
}

bool __wrap_process_ended(const struct process_id *id)
{
    (void)id;
    return false;
}

pid_t __wrap_getpid(void)
{
    return 1000;
}

int __wrap_gethostname(char *name, size_t len)
{
    snprintf(name, len, "here");
    return 0;
}

/* Lines are made, so that what stands in them is read, and shown only where somebody looks. */
void __wrap_log_line(enum log_level level, const char *volume, const char *client,
                     const char *format, ...)
{
    static int shown = -1;
    char line[4096];
    va_list args;
    if (shown < 0)
        shown = getenv("FUZZ_LOG") != NULL;
    (void)level, (void)volume, (void)client;
    va_start(args, format);
    vsnprintf(line, sizeof line, format, args);
    va_end(args);
    if (shown)
        fprintf(stderr, "%8.3f %s\n", (double)sim_now_ns(the.sim) / 1e9, line);
}

/* --- the reactor -------------------------------------------------------------------------- */

struct env *reactor_env(struct reactor *r)
{
    return &r->env->base;
}

void reactor_hook_add(struct reactor *r, struct reactor_hook *hook)
{
    list_add_tail(&r->hooks, &hook->link);
}

void reactor_hook_remove(struct reactor_hook *hook)
{
    list_remove(&hook->link);
}

void reactor_expects(struct reactor *r, bool soon)
{
    (void)r, (void)soon;
}

static void run_hooks(struct reactor *r)
{
    list_for_each_safe (l, next, &r->hooks) {
        struct reactor_hook *hook = container_of(l, struct reactor_hook, link);
        hook->run(hook);
    }
}

static void turn(void *arg)
{
    struct reactor *r = arg;
    r->turn_due = false;
    r->turned = true;
    run_hooks(r);
}

/* A turn of a loop has one event or several. */
static void event_over(struct sim_env *env)
{
    struct reactor *r = env->user;
    if (r->turned) {
        r->turned = false;
    } else if (!r->turn_due) {
        if (sim_one_in(the.sim, 2)) {
            run_hooks(r);
        } else {
            r->turn_due = true;
            sim_at(env, sim_below(the.sim, TURN_NS_MAX), turn, r);
        }
    }
}

static void run_until(bool (*cond)(void *arg), void *arg)
{
    bool came = sim_run_until(the.sim, cond, arg, STEPS_MAX);
    CHECK(came);
}

/* --- wires -------------------------------------------------------------------------------- */

/* A wire's time on the reactor. */
struct watch {
    struct wire *wire; /* NULL: detached */
    void (*on_events)(void *arg, int events);
    void (*detached)(void *arg);
    void *arg;
    int events;
    bool woken; /* a look at it is under way */
};

struct wire {
    struct link *link;
    struct watch *watch;
};

struct bytes {
    uint8_t *data;
    size_t at, len, cap;
};

struct link {
    struct wire *wire; /* NULL: the server has closed it, or was not there yet */
    int fd;
    struct accepted accepted;
    struct bytes up, down;
    size_t room;
    bool ended, reset, was_accepted, freed;
};

static struct link *links[SERVED_LINKS_MAX];
static unsigned n_links;

static void bytes_put(struct bytes *b, const void *data, size_t len)
{
    if (!len)
        return;
    if (b->at == b->len)
        b->at = b->len = 0;
    mem_grow(&b->data, &b->cap, b->len + len, 1);
    memcpy(b->data + b->len, data, len);
    b->len += len;
}

static int readiness(const struct link *l)
{
    size_t waiting = l->down.len - l->down.at;
    return (l->up.len > l->up.at || l->ended ? WIRE_READABLE : 0) |
           (l->room > waiting && l->room - waiting >= l->room / 2 ? WIRE_WRITABLE : 0) |
           (l->ended ? WIRE_HANG_UP : 0);
}

static void wake(struct link *l);

static void look(void *arg)
{
    struct watch *watch = arg;
    struct wire *w = watch->wire;
    watch->woken = false;
    if (!w) {
        if (!watch->detached)
            free(watch);
        return;
    }
    int events = watch->events & readiness(w->link);
    if (w->link->reset && watch->events) {
        watch->events = 0;
        watch->on_events(watch->arg, 0);
        return;
    }
    if (!events)
        return;
    /* It stays until it is detached, and then until this is over. */
    watch->woken = true;
    watch->on_events(watch->arg, events);
    watch->woken = false;
    if (watch->wire)
        wake(watch->wire->link);
}

static void wake(struct link *l)
{
    struct watch *watch = l->wire ? l->wire->watch : NULL;
    if (!watch || watch->woken || !watch->events)
        return;
    if (!l->reset && !(watch->events & readiness(l)))
        return;
    watch->woken = true;
    sim_at(the.reactor.env, 0, look, watch);
}

struct wire *wire_new(int fd)
{
    struct link *l = links[fd - FIRST_FD];
    struct wire *w = mem_zalloc(sizeof *w);
    CHECK(!l->was_accepted);
    l->was_accepted = true;
    w->link = l;
    l->wire = w;
    return w;
}

void wire_attach(struct wire *w, struct reactor *r, void (*on_events)(void *arg, int events),
                 void *arg)
{
    CHECK(!w->watch && r == &the.reactor);
    w->watch = mem_zalloc(sizeof *w->watch);
    *w->watch = (struct watch){.wire = w, .on_events = on_events, .arg = arg};
}

void wire_watch(struct wire *w, int events)
{
    w->watch->events = events;
    wake(w->link);
}

static void detached(void *arg)
{
    struct watch *watch = arg;
    void (*done)(void *of) = watch->detached;
    void *of = watch->arg;
    watch->detached = NULL;
    if (!watch->woken)
        free(watch);
    done(of);
}

void wire_detach(struct wire *w, void (*done)(void *arg))
{
    struct watch *watch = w->watch;
    CHECK(watch && done);
    w->watch = NULL;
    watch->wire = NULL;
    watch->detached = done;
    sim_at(the.reactor.env, 0, detached, watch);
}

static ssize_t receive(struct wire *w, const struct iovec *iov, size_t n, bool take)
{
    struct link *l = w->link;
    size_t at = l->up.at;
    if (l->reset) {
        errno = ECONNRESET;
        return -1;
    }
    for (size_t i = 0; i < n && at < l->up.len; i++) {
        size_t part = min_u64(iov[i].iov_len, l->up.len - at);
        memcpy(iov[i].iov_base, l->up.data + at, part);
        at += part;
    }
    size_t got = at - l->up.at;
    if (take)
        l->up.at = at;
    if (got || l->ended)
        return (ssize_t)got;
    errno = EAGAIN;
    return -1;
}

ssize_t wire_receive(struct wire *w, struct iovec *iov, size_t n)
{
    return receive(w, iov, n, true);
}

ssize_t wire_peek(struct wire *w, void *out, size_t len)
{
    return receive(w, &(struct iovec){out, len}, 1, false);
}

ssize_t wire_send(struct wire *w, struct iovec *iov, size_t n)
{
    struct link *l = w->link;
    size_t sent = 0;
    if (l->reset) {
        errno = EPIPE;
        return -1;
    }
    for (size_t i = 0; i < n; i++) {
        size_t waiting = l->down.len - l->down.at;
        size_t part = min_u64(iov[i].iov_len, l->room > waiting ? l->room - waiting : 0);
        bytes_put(&l->down, iov[i].iov_base, part);
        sent += part;
    }
    if (!sent) {
        errno = EAGAIN;
        return -1;
    }
    return (ssize_t)sent;
}

bool wire_has_unread(struct wire *w)
{
    return w->link->up.len > w->link->up.at;
}

static void link_settle(struct link *l)
{
    if (!l->freed || l->wire || !l->was_accepted)
        return;
    links[l->fd - FIRST_FD] = NULL;
    free(l->up.data);
    free(l->down.data);
    free(l);
}

void wire_close(struct wire *w)
{
    struct link *l = w->link;
    CHECK(!w->watch);
    l->wire = NULL;
    free(w);
    link_settle(l);
}

static void accept_link(void *arg)
{
    struct link *l = arg;
    conn_accept(&the.lane, &l->accepted);
}

struct link *link_open(const char *host, bool is_tcp)
{
    if (n_links == SERVED_LINKS_MAX)
        return NULL;
    struct link *l = mem_zalloc(sizeof *l);
    struct peer *peer = &l->accepted.peer;
    l->room = ROOM_BYTES;
    l->fd = l->accepted.fd = FIRST_FD + (int)n_links;
    links[n_links++] = l;
    peer->way = is_tcp ? PEER_TCP : PEER_UNIX;
    snprintf(peer->host, sizeof peer->host, "%s", is_tcp ? host : "local");
    snprintf(peer->address, sizeof peer->address, "%.32s:%d", host, l->fd);
    sim_at(the.reactor.env, 0, accept_link, l);
    return l;
}

void link_free(struct link *l)
{
    if (!l->ended)
        link_end(l, true);
    l->freed = true;
    link_settle(l);
}

void link_send(struct link *l, const void *bytes, size_t len)
{
    if (l->ended || link_is_closed(l))
        return;
    bytes_put(&l->up, bytes, len);
    wake(l);
}

void link_set_room(struct link *l, size_t bytes)
{
    l->room = bytes;
    wake(l);
}

const uint8_t *link_received(const struct link *l, size_t *len)
{
    *len = l->down.len - l->down.at;
    return *len ? l->down.data + l->down.at : NULL;
}

void link_took(struct link *l, size_t len)
{
    CHECK(len <= l->down.len - l->down.at);
    l->down.at += len;
    wake(l);
}

void link_end(struct link *l, bool reset)
{
    l->ended = true;
    l->reset |= reset;
    wake(l);
}

bool link_is_closed(const struct link *l)
{
    return l->was_accepted && !l->wire;
}

/* --- the store that all begin with -------------------------------------------------------- */

struct kept {
    uint8_t *bytes;
    size_t key_len, head_len, body_len;
};

static struct kept image[IMAGE_KEYS_MAX];
static unsigned n_image;

static void keep(void *arg, struct slice key, struct slice head, struct slice body)
{
    (void)arg;
    CHECK(n_image < IMAGE_KEYS_MAX);
    struct kept *k = &image[n_image++];
    *k = (struct kept){.key_len = key.len, .head_len = head.len, .body_len = body.len};
    k->bytes = mem_alloc(key.len + head.len + body.len);
    memcpy(k->bytes, key.data, key.len);
    if (head.len)
        memcpy(k->bytes + key.len, head.data, head.len);
    if (body.len)
        memcpy(k->bytes + key.len + head.len, body.data, body.len);
}

static void put_back(struct mem_store *db)
{
    for (unsigned i = 0; i < n_image; i++) {
        const struct kept *k = &image[i];
        mem_store_put(db, (struct slice){k->bytes, k->key_len},
                      (struct slice){k->bytes + k->key_len, k->head_len},
                      (struct slice){k->bytes + k->key_len + k->head_len, k->body_len});
    }
}

static bool op_done;

static void catalog_done(struct catalog_op *op)
{
    (void)op;
    op_done = true;
}

static bool is_done(void *arg)
{
    (void)arg;
    return op_done;
}

static void wait_for_catalog(struct catalog_op *op)
{
    run_until(is_done, NULL);
    CHECK(op->st == ST_OK);
    op_done = false;
}

static void make_volume(const char *name, uint64_t size, uint32_t block_size)
{
    struct env *env = reactor_env(&the.reactor);
    struct volume_spec spec = {.size = size, .block_size = block_size, .codec = CODEC_NONE};
    struct catalog_op op = {.done = catalog_done};
    snprintf(spec.name, sizeof spec.name, "%s", name);
    catalog_create(&op, the.store, env, &spec);
    wait_for_catalog(&op);
    catalog_op_free(&op);
}

static void io_done(struct vol_io *io)
{
    CHECK(io->st == ST_OK);
    op_done = true;
}

static void io_wait(void)
{
    shard_submit(the.lane.shard);
    run_until(is_done, NULL);
    op_done = false;
}

static void open_done(struct volume_open *open)
{
    CHECK(open->st == ST_OK);
    op_done = true;
}

static void close_done(void *arg)
{
    (void)arg;
    op_done = true;
}

static void write_now(struct volume *vol, uint64_t at, const uint8_t *data, uint64_t len)
{
    struct vol_io io = {.done = io_done, .granted = io_done, .offset = at, .length = len};
    if (!volume_write_begin(vol, &io))
        io_wait();
    CHECK(io.st == ST_OK);
    volume_write_commit(vol, &io, data);
    io_wait();
}

static void fill(uint64_t at, uint64_t len, uint8_t with)
{
    for (uint64_t i = at; i < at + len; i++)
        served_a[i] = (uint8_t)(with + i + (i >> 8) * 7);
}

static void fill_a(struct volume *vol)
{
    fill(0, 40 << 10, 1);
    fill(128 << 10, 9000, 2);
    write_now(vol, 0, served_a, 40 << 10);
    write_now(vol, 128 << 10, served_a + (128 << 10), 9000);
    memcpy(served_a_then, served_a, sizeof served_a);

    struct vol_history_op op = {.io = {.done = io_done}, .name = "s", .id = {1}, .created_ns = 1};
    volume_snapshot_create(vol, &op);
    io_wait();

    fill(10000, 3000, 3);
    fill(SERVED_A_BYTES - 5000, 5000, 4);
    write_now(vol, 10000, served_a + 10000, 3000);
    write_now(vol, SERVED_A_BYTES - 5000, served_a + SERVED_A_BYTES - 5000, 5000);
}

static uint64_t branch_of(const char *name)
{
    struct catalog_op op = {.done = catalog_done};
    catalog_find(&op, the.store, reactor_env(&the.reactor), name);
    wait_for_catalog(&op);
    uint64_t branch = op.entries[0].branch;
    catalog_op_free(&op);
    return branch;
}

void served_prepare(void)
{
    struct catalog_op op = {.done = catalog_done};
    served_begin(&(struct served_config){0});
    catalog_prepare(&op, the.store, reactor_env(&the.reactor), true);
    wait_for_catalog(&op);
    catalog_op_free(&op);
    make_volume("a", SERVED_A_BYTES, 4096);
    make_volume("b", SERVED_B_BYTES, 16384);
    make_volume("big", SERVED_BIG_BYTES, 65536);

    struct volume_open open = {.branch = branch_of("a"), .name = "a", .done = open_done};
    volume_open(the.lane.shard, &open);
    if (!op_done)
        run_until(is_done, NULL);
    op_done = false;
    fill_a(open.vol);
    volume_close(open.vol, close_done, NULL);
    io_wait();
    struct mem_store *db = the.db;
    the.db = NULL; /* kept for a look when the server is gone */
    served_end();
    mem_store_each(db, (struct slice){"", 0}, (struct slice){"\xff", 1}, keep, NULL);
    CHECK(n_image > 10);
    mem_store_free(db);
    sim_free(the.sim);
}

/* --- a server's life ---------------------------------------------------------------------- */

static void all_stopped(struct server *s)
{
    (void)s;
    the.all_stopped = true;
}

static void overdue(struct server *s)
{
    (void)s;
    CHECK(!"the store did not take the last commits in time");
}

void served_begin(const struct served_config *config)
{
    struct err e = {0};
    memset(&the, 0, sizeof the);
    the.sim = sim_new(config->seed);
    uint64_t delay = config->slow_ns ? config->slow_ns : DELAY_NS;
    the.db = mem_store_new(the.sim, &(struct mem_config){.has_log = !config->fdb_like,
                                                         .needs_heartbeat = config->fdb_like,
                                                         .read_ns_max = delay,
                                                         .commit_ns_max = 3 * delay,
                                                         .sync_ns_max = delay});
    put_back(the.db);
    struct reactor *r = &the.reactor;
    r->env = sim_env_new(the.sim);
    r->env->name = "server";
    r->env->user = r;
    r->env->after = event_over;
    list_init(&r->hooks);
    the.store = mem_store_attach(the.db, r->env);

    the.config = (struct server_config){.store = the.store,
                                        .shared = config->shared,
                                        .cache_bytes = CACHE_BYTES,
                                        .threads = 1,
                                        .lease_ms = LEASE_MS,
                                        .owner_wait_ms = 2000};
    struct server *s = &the.server;
    s->config = &the.config;
    s->store = the.store;
    s->session = &the.session;
    s->lanes = &the.lane;
    s->n_lanes = 1;
    s->all_stopped = all_stopped;
    s->overdue = overdue;
    server_fill_limits(s);
    the.lane.server = s;
    the.lane.reactor = r;
    enum status st = session_begin(&the.session, the.store, &r->env->base, sim_run_once, LEASE_MS,
                                   "10.0.0.1:10809", &e);
    if (st == ST_OK)
        st = lanes_open(s, &e);
    CHECK(st == ST_OK);
    lanes_begin(s);
}

static bool is_stopped(void *arg)
{
    (void)arg;
    return the.all_stopped;
}

static void forget_links(void)
{
    for (unsigned i = 0; i < n_links; i++)
        CHECK(!links[i]);
    n_links = 0;
}

void served_end(void)
{
    struct reactor *r = &the.reactor;
    lanes_stop(&the.server);
    run_until(is_stopped, NULL);
    forget_links();
    struct mem_counts counts;
    lanes_close(&the.server);
    session_end(&the.session, &r->env->base, sim_run_once);
    env_timer_stop(&r->env->base, &the.server.end_timer);
    store_close(the.store);
    CHECK(list_empty(&r->env->timers) && list_empty(&r->hooks));
    sim_env_free(r->env);
    if (!the.db)
        return;
    mem_store_counts(the.db, &counts);
    CHECK(!counts.broken_promises && !counts.reserved_bytes && !counts.reserved_keys);
    mem_store_free(the.db);
    sim_free(the.sim);
}

void served_run_us(uint64_t us)
{
    uint64_t until = sim_now_ns(the.sim) + us * 1000;
    unsigned steps = 0;
    while (sim_step_by(the.sim, until))
        CHECK(++steps < STEPS_MAX);
}

uint64_t served_now_ms(void)
{
    return sim_now_ns(the.sim) / 1000000;
}

void served_stop_store(bool stopped)
{
    mem_store_stop(the.db, stopped);
}

void served_store_fails(uint32_t one_in)
{
    mem_store_set_faults(the.db, (struct mem_faults){.commit_fails = one_in, .get_fails = one_in});
}

void served_store_full(bool full)
{
    struct mem_counts counts;
    mem_store_counts(the.db, &counts);
    /* (What was promised to somebody stays his.) */
    mem_store_set_capacity(the.db, full ? counts.body_bytes_used + counts.reserved_bytes + 1 : 0);
}

struct served_held served_held(void)
{
    const struct lane *lane = &the.lane;
    return (struct served_held){.connections = atomic_load(&the.server.n_conns),
                                .requests = lane->n_requests,
                                .reply_bytes = lane->reply_bytes,
                                .ahead_bytes = lane->ahead_bytes,
                                .write_bytes = lane->shard->write_bytes,
                                .read_bytes = lane->shard->read_bytes,
                                .cache_bytes = buf_pool_used(lane->shard->pool)};
}
