/*
 * The server as a process: its sockets, threads and signals, and its session in the store. All
 * lanes are made before the first connection is accepted; the end goes the other way round.
 *
 * One that replaces another (replace.h) first has all new connections come to it, and leaves
 * them waiting while the other one takes in those it was given before; then it tells the
 * other one to end and begins to accept. So no connection is lost between the two, and none is
 * served here while the other one still means to keep its volumes.
 */
#include "server/server.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

#include <uv.h>

#include "base/check.h"
#include "base/log.h"
#include "base/mem.h"
#include "server/connection.h"
#include "server/doors.h"
#include "server/http.h"
#include "server/notify.h"
#include "server/reload.h"
#include "server/replace.h"
#include "volume/session.h"

/* For connections on their way to the server that is replaced, and their handshakes. */
#define REPLACE_GRACE_MS 200u

/* Files: of the store and what all lanes share, with some to spare; and of one lane. */
#define OTHER_DESCRIPTORS 128u
#define LANE_DESCRIPTORS 16u

/* They end it, but for SIGHUP. */
static const int signal_numbers[] = {SIGTERM, SIGINT, SIGHUP};
#define SIGNALS (sizeof signal_numbers / sizeof *signal_numbers)

struct running {
    struct server server; /* first */
    struct listeners *listeners;
    struct http *http;
    uv_signal_t signals[SIGNALS];
    unsigned n_signals;
    bool on_terminal; /* at the start */
    struct reload reload;
    struct watchdog *watchdog;
    unsigned n_conns_told; /* to the service manager */
    struct rivals rivals;
    struct env_timer replace_timer;
    bool names_taken, told; /* of Unix sockets, from those that are replaced; these were told */
    bool serving;
};

static struct running *running_of(struct server *s)
{
    return container_of(s, struct running, server);
}

/* --- stopping --------------------------------------------------------------------------- */

/* Every lane has closed everything. */
static void all_stopped(struct server *s)
{
    for (unsigned i = 0; i < s->n_lanes; i++)
        reactor_stop(s->lanes[i].reactor);
}

static void end_without(struct server *s)
{
    bool answered_in_log = s->store->limits.has_log;
    /* (Answered at its log record, which is replayed, or at its commit.) */
    log_error("the store did not take the last commits in time; ending without them. Nothing that "
              "was answered is lost: it is %s",
              answered_in_log ? "in the log and comes back at the next start"
                              : "committed already; what was not answered is dropped");
    _exit(1);
}

static void on_signal(uv_signal_t *handle, int signum)
{
    struct running *r = handle->data;
    /* Where the terminal went away it was meant for one who is left behind there. */
    bool left_behind = signum == SIGHUP && r->on_terminal && !isatty(STDERR_FILENO);
    if (signum == SIGHUP && !left_behind) {
        if (!r->server.stopping)
            reload_begin(&r->reload);
        return;
    }
    r->n_signals++;
    if (r->n_signals == 1) {
        pid_t successor = replace_successor();
        if (successor) {
            log_info("process %d takes the place of this one: stopping", (int)successor);
            notify_no_more();
        } else {
            log_info("%s: stopping", signum == SIGINT ? "interrupted"
                                     : left_behind    ? "the terminal is gone"
                                                      : "asked to end");
        }
        notify_stopping();
        /* The old one has lost its sockets' names to us: without it and us nobody would serve. */
        if (r->names_taken && !r->told)
            rivals_tell(&r->rivals);
        env_timer_stop(r->server.lanes[0].env, &r->replace_timer);
        http_stopping(r->http);
        listeners_close(r->listeners);
        r->listeners = NULL;
        reload_end(&r->reload);
        lanes_stop(&r->server);
        return;
    }
    log_info("asked again: not waiting for requests under way");
    r->server.drain_now = true;
}

static void signals_begin(struct running *r)
{
    r->on_terminal = isatty(STDERR_FILENO);
    for (size_t i = 0; i < SIGNALS; i++) {
        CHECK(uv_signal_init(reactor_loop(r->server.lanes[0].reactor), &r->signals[i]) == 0);
        r->signals[i].data = r;
        CHECK(uv_signal_start(&r->signals[i], on_signal, signal_numbers[i]) == 0);
    }
    replace_note_successor();
}

static void signals_end(struct running *r)
{
    for (size_t i = 0; i < SIGNALS; i++)
        uv_close((uv_handle_t *)&r->signals[i], NULL);
    /* What is left takes moments, and must not be cut off by one who asks once more. */
    signal(SIGTERM, SIG_IGN);
    signal(SIGINT, SIG_IGN);
    signal(SIGHUP, SIG_IGN);
}

/* --- what SIGHUP reads again ------------------------------------------------------------ */

static enum status load_access(void *arg, void **loaded, struct err *e)
{
    struct running *r = arg;
    struct access *access;
    enum status st = access_load(&access, r->server.config->access_file, e);
    if (st == ST_OK)
        *loaded = access;
    return st;
}

static void drop_access(void *loaded)
{
    access_release(loaded);
}

/* Rules that can't do what they were written for. */
static void tell_about_access(const struct server_config *config, const struct access *access)
{
    bool tls = config->tls != NBD_TLS_OFF;
    struct access_count n = access ? access_count(access) : (struct access_count){0};
    if (access && n.rules == 0)
        log_warning("the access rules let nobody in: the file has no rule");
    if (n.certificates > 0 && !(tls && config->tls_files.verify_peer))
        log_warning("access rules about certificates (%zu) fit nobody: this server does not ask "
                    "for any (--tls with --tls-verify-peer)", n.certificates);
    if (n.psk > 0 && !(tls && config->tls_files.psk))
        log_warning("access rules about pre-shared keys (%zu) fit nobody: this server has none "
                    "(--tls with --tls-psk)", n.psk);
}

static void use_access(void *arg, void *loaded)
{
    struct running *r = arg;
    lanes_use_access(&r->server, loaded);
    tell_about_access(r->server.config, loaded);
    drop_access(loaded);
}

static enum status load_tls(void *arg, void **loaded, struct err *e)
{
    const struct running *r = arg;
    struct tls_credentials *fresh;
    enum status st = tls_credentials_load(&r->server.config->tls_files, &fresh, e);
    *loaded = st ? NULL : fresh;
    return st;
}

static void drop_tls(void *loaded)
{
    tls_credentials_unref(loaded);
}

/* Whoever has a session keeps what it began with. */
static void use_tls(void *arg, void *loaded)
{
    struct server *s = &((struct running *)arg)->server;
    tls_credentials_unref(s->tls);
    s->tls = loaded;
}

static void reload_prepare(struct running *r)
{
    reload_init(&r->reload, reactor_env(r->server.lanes[0].reactor));
    if (r->server.config->access_file)
        reload_add(&r->reload, (struct reload_hook){.what = "the access rules",
                                                    .arg = r,
                                                    .load = load_access,
                                                    .use = use_access,
                                                    .drop = drop_access});
    if (r->server.config->tls != NBD_TLS_OFF)
        reload_add(&r->reload, (struct reload_hook){.what = "the TLS credentials",
                                                    .arg = r,
                                                    .load = load_tls,
                                                    .use = use_tls,
                                                    .drop = drop_tls});
}

/* --- starting ------------------------------------------------------------------------------ */

/* What is open besides connections of clients. */
static uint64_t other_descriptors(const struct server_config *config)
{
    return OTHER_DESCRIPTORS + config->threads * LANE_DESCRIPTORS +
           (config->n_http + 1) * HTTP_CONNECTIONS_MAX;
}

enum status server_reserve_descriptors(struct server_config *config, struct err *e)
{
    struct rlimit limit;
    unsigned asked = config->connections_max;
    uint64_t others = other_descriptors(config);
    uint64_t needed = (asked ? asked : SERVER_CONNECTIONS_USUAL) + others;
    if (getrlimit(RLIMIT_NOFILE, &limit) != 0)
        return ST_OK;
    rlim_t had = limit.rlim_max;
    if (limit.rlim_max < needed)
        limit.rlim_max = needed; /* a privilege */
    limit.rlim_cur = limit.rlim_max;
    if (setrlimit(RLIMIT_NOFILE, &limit) == 0)
        return ST_OK;
    limit.rlim_cur = limit.rlim_max = had;
    setrlimit(RLIMIT_NOFILE, &limit);
    if (had >= needed)
        return ST_OK;
    if (asked)
        return fail(e, ST_INVAL,
                    "cannot serve %u connections: this process may open %llu files and needs %llu; "
                    "raise the limit (systemd: LimitNOFILE=, shell: ulimit -Hn), or ask for fewer "
                    "(--connections-max)",
                    asked, (unsigned long long)had, (unsigned long long)needed);
    config->connections_max = (unsigned)(had > 2 * others ? had - others : had / 2);
    log_warning("at most %u connections are served: this process may open %llu files; to serve more "
                "clients raise the limit (systemd: LimitNOFILE=, shell: ulimit -Hn)",
                config->connections_max, (unsigned long long)had);
    return ST_OK;
}

static void tell_status(struct running *r)
{
    size_t n;
    const char *const *addresses = listeners_addresses(r->listeners, &n);
    char more[32] = "";
    if (n > 1)
        snprintf(more, sizeof more, " and %zu more", n - 1);
    r->n_conns_told = atomic_load(&r->server.n_conns);
    notify_status("serving on %s%s; connections: %u", addresses[0], more, r->n_conns_told);
}

static void tick(struct server *s)
{
    struct running *r = running_of(s);
    if (!r->listeners)
        return;
    listeners_resume(r->listeners);
    if (r->serving && atomic_load(&s->n_conns) != r->n_conns_told)
        tell_status(r);
}

static void take_connection(void *arg, const struct accepted *a)
{
    struct server *s = arg;
    conn_accept(&s->lanes[0], a);
}

static void accept_connections(struct running *r)
{
    struct server *s = &r->server;
    listeners_start(r->listeners, reactor_loop(s->lanes[0].reactor), take_connection, s);
    r->serving = true;
    r->watchdog = watchdog_begin(s, r->told);
    tell_status(r);
    notify_ready();
    if (reload_was_asked_for_early())
        reload_begin(&r->reload);
}

static void replace(struct env_timer *timer)
{
    struct running *r = container_of(timer, struct running, replace_timer);
    /* Before the end of the one that was it until now. */
    notify_main_process();
    rivals_tell(&r->rivals);
    r->told = true;
    accept_connections(r);
}

/* Whether everybody has to prove who he is before anything else. */
static bool asks_for_proof(const struct server_config *config)
{
    return config->tls == NBD_TLS_REQUIRE &&
           (config->tls_files.verify_peer || !config->tls_files.certificates);
}

static void tell_user(const struct server_config *config)
{
    if (geteuid() != 0)
        log_info("running as uid %lu, gid %lu, without capabilities", (unsigned long)geteuid(),
                 (unsigned long)getegid());
    else if (config->user_given)
        log_info("running as root");
    else
        log_warning("running as root: a fault in this server would be one in the whole machine; "
                    "--user NAME has it run as another user, whose the store then is (--user root: "
                    "it is meant so)");
}

/* A server that anybody on the network can use is seldom meant. */
static void warn_of_open_doors(const struct running *r)
{
    const struct server_config *config = r->server.config;
    size_t n;
    const char *const *addresses = listeners_addresses(r->listeners, &n);
    bool open = !config->access && !asks_for_proof(config);
    bool seen = config->tls != NBD_TLS_REQUIRE;
    for (size_t i = 0; i < n; i++) {
        if (!listeners_is_exposed(r->listeners, i))
            continue;
        if (open)
            log_warning("OPEN TO THE NETWORK: whoever reaches %s can read%s every volume, since "
                        "nobody has to prove who he is%s; say who may do what (--access FILE), ask "
                        "for proof (--tls require with --tls-verify-peer or --tls-psk), or listen "
                        "on localhost or a Unix socket (--listen)",
                        addresses[i], config->read_only ? "" : " and overwrite",
                        seen ? ", and data can be read and changed on its way" : "");
        else if (seen)
            log_warning("NOT ENCRYPTED: whoever is on the way between %s and its clients can read "
                        "and change what passes, and come from their addresses%s; --tls require "
                        "refuses clients without TLS",
                        addresses[i],
                        config->tls == NBD_TLS_ON ? " where they do not use TLS" : "");
    }
}

static void run_lanes(struct running *r)
{
    struct server *s = &r->server;
    size_t n;
    reload_prepare(r);
    signals_begin(r);
    r->replace_timer.fire = replace;
    lanes_begin(s);

    const char *const *addresses = listeners_addresses(r->listeners, &n);
    for (size_t i = 0; i < n; i++)
        log_info("listening on %s", addresses[i]);
    tell_user(s->config);
    warn_of_open_doors(r);
    tell_about_access(s->config, s->config->access);
    if (r->rivals.n > 0)
        env_timer_start(s->lanes[0].env, &r->replace_timer, REPLACE_GRACE_MS);
    else
        accept_connections(r);
    if (s->config->ready)
        s->config->ready(s->config->arg, addresses, n);

    reactor_run(s->lanes[0].reactor);
    for (unsigned i = 1; i < s->n_lanes; i++)
        reactor_join(s->lanes[i].reactor);
    http_stop(r->http);
    signals_end(r);
}

static enum status start_threads(struct server *s, struct err *e)
{
    for (unsigned i = 1; i < s->n_lanes; i++) {
        enum status st = reactor_start(s->lanes[i].reactor, e);
        if (st == ST_OK)
            continue;
        while (--i > 0) {
            reactor_stop(s->lanes[i].reactor);
            reactor_join(s->lanes[i].reactor);
        }
        return st;
    }
    return ST_OK;
}

static enum status find_rivals(struct running *r, struct err *e)
{
    struct server *s = &r->server;
    return rivals_find(&r->rivals, r->listeners, s->store, reactor_env(s->lanes[0].reactor),
                       reactor_run_once, e);
}

static enum status take_addresses(struct running *r, struct err *e)
{
    enum status st = listeners_listen(r->listeners, e);
    /* Again: by now another one that replaces the same server would be seen. */
    if (st == ST_OK)
        st = find_rivals(r, e);
    if (st == ST_OK)
        st = listeners_take_names(r->listeners, e);
    for (size_t i = 0; i < r->server.config->n_listen && r->rivals.n > 0; i++)
        r->names_taken |= strncmp(r->server.config->listen[i], "unix:", 5) == 0;
    return st;
}

static enum status serve(struct running *r, struct err *e)
{
    struct server *s = &r->server;
    struct session session;
    size_t n;
    const char *const *addresses = listeners_addresses(r->listeners, &n);
    const char *address = addresses[0];
    struct env *env = reactor_env(s->lanes[0].reactor);
    env_random(env, &s->group_seed, sizeof s->group_seed);
    enum status st = s->config->replace ? find_rivals(r, e) : ST_OK;
    if (st != ST_OK)
        return st;
    r->http = http_open(s, s->config->doors->http);
    s->config->doors->http = NULL;
    st = session_begin(&session, s->store, env, reactor_run_once, s->config->lease_ms, address,
                       e);
    if (st != ST_OK)
        return st;
    s->session = &session;
    st = lanes_open(s, e);
    if (st == ST_OK)
        st = s->config->replace ? take_addresses(r, e) : listeners_listen(r->listeners, e);
    if (st == ST_OK)
        st = http_start(r->http, addresses, n, e);
    if (st == ST_OK)
        st = start_threads(s, e);
    if (st == ST_OK)
        run_lanes(r);
    http_stop(r->http);
    lanes_close(s);
    session_end(&session, env, reactor_run_once);
    watchdog_end(r->watchdog);
    env_timer_stop(env, &s->end_timer);
    return st;
}

enum status server_run(const struct server_config *config, struct err *e)
{
    CHECK(config->threads >= 1 && config->threads <= SERVER_THREADS_MAX);
    signal(SIGPIPE, SIG_IGN);

    struct running *r = mem_zalloc(sizeof *r);
    struct server *s = &r->server;
    s->config = config;
    s->store = config->store;
    server_fill_limits(s);
    s->tick = tick;
    s->all_stopped = all_stopped;
    s->overdue = end_without;
    s->lanes = mem_zalloc(config->threads * sizeof *s->lanes);
    r->listeners = config->doors->nbd;
    config->doors->nbd = NULL;
    s->tls = config->credentials;

    enum status st = ST_OK;
    while (st == ST_OK && s->n_lanes < config->threads) {
        struct lane *lane = &s->lanes[s->n_lanes];
        lane->server = s;
        lane->no = s->n_lanes;
        st = reactor_new(&lane->reactor, e);
        if (st == ST_OK)
            s->n_lanes++;
    }
    if (st == ST_OK)
        st = serve(r, e);
    http_stop(r->http);
    listeners_close(r->listeners);
    rivals_free(&r->rivals);
    for (unsigned i = 0; i < s->n_lanes; i++)
        reactor_join(s->lanes[i].reactor);
    /* Before the reactors: an engine may have timers on them, and tasks on their way. */
    store_close(config->store);
    for (unsigned i = 0; i < s->n_lanes; i++)
        reactor_free(s->lanes[i].reactor);
    http_free(r->http);
    tls_credentials_unref(s->tls);
    watchdog_free(r->watchdog);
    free(s->lanes);
    free(r);
    return st;
}
