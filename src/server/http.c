/*
 * The HTTP thread; http.h says what it is for.
 *
 * libmicrohttpd speaks HTTP, one daemon for each socket, all driven by one loop of ours, which also
 * counts the seconds for series.c. The library bounds connections, memory and silence; what it does
 * not bound is a client that goes on sending or taking a byte now and then, which is cut off here,
 * and the answers that wait for slow clients.
 */
#include "server/http.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/timerfd.h>
#include <unistd.h>

#include <microhttpd.h>

#include "base/list.h"
#include "base/log.h"
#include "base/mem.h"
#include "server/control.h"
#include "server/http_body.h"

#define DAEMONS_MAX (LISTENER_SOCKETS_MAX + 1u)
#define JSON_TYPE "application/json"
#define TEXT_TYPE "text/plain; charset=utf-8"
#define METRICS_TYPE "text/plain; version=0.0.4; charset=utf-8"

static const char drain_path[] = "/v1/drain";

/* A socket that is served. */
struct port {
    struct http *http;
    struct MHD_Daemon *daemon;
    bool is_control;
    bool is_loopback; /* of TCP */
};

/* A connection. */
struct caller {
    struct list link; /* http->callers */
    int fd;
    uint64_t since_s; /* its last answer was sent, or it was accepted */
};

/* A request. */
struct call {
    size_t body_bytes;
};

struct http {
    struct http_source source;
    struct listeners *listeners;
    char *listen[LISTENER_SOCKETS_MAX];
    int control_fd;
    char control[CONTROL_PATH_BYTES];
    struct stat control_file;
    struct port ports[DAEMONS_MAX];
    size_t n_ports;
    int epoll, wake, clock;
    pthread_t thread;
    bool runs;
    struct list callers;
    uint64_t seconds;
    uint64_t held_bytes; /* in answers that are not sent */
};

/* --- answers ------------------------------------------------------------------------------ */

void http_text_add(struct http_text *t, const char *format, ...)
{
    va_list args, again;
    va_start(args, format);
    va_copy(again, args);
    size_t room = t->cap - t->len;
    int len = vsnprintf(t->bytes ? t->bytes + t->len : NULL, room, format, args);
    if (len >= 0 && (size_t)len >= room) {
        mem_grow(&t->bytes, &t->cap, t->len + (size_t)len + 1, 1);
        vsnprintf(t->bytes + t->len, t->cap - t->len, format, again);
    }
    t->len += len > 0 ? (size_t)len : 0;
    va_end(again);
    va_end(args);
}

/* An answer's bytes, until they were sent. */
struct held {
    struct http *http;
    size_t len;
    char bytes[];
};

static void held_sent(void *arg)
{
    struct held *held = arg;
    held->http->held_bytes -= held->len;
    free(held);
}

static enum MHD_Result send_response(struct MHD_Connection *connection, unsigned status,
                                     const char *type, struct MHD_Response *response)
{
    if (!response)
        return MHD_NO;
    MHD_add_response_header(response, "Content-Type", type);
    MHD_add_response_header(response, "Cache-Control", "no-store");
    MHD_add_response_header(response, "X-Content-Type-Options", "nosniff");
    MHD_add_response_header(response, "X-Frame-Options", "DENY");
    enum MHD_Result ok = MHD_queue_response(connection, status, response);
    MHD_destroy_response(response);
    return ok;
}

static enum MHD_Result send_bytes(struct http *h, struct MHD_Connection *connection,
                                  unsigned status, const char *type, const char *bytes, size_t len)
{
    if (h->held_bytes + len > HTTP_HELD_BYTES_MAX) {
        static const char busy[] = "busy: too many answers wait for slow clients\n";
        union {
            const void *in;
            void *base;
        } text = {busy};
        return send_response(
            connection, MHD_HTTP_SERVICE_UNAVAILABLE, TEXT_TYPE,
            MHD_create_response_from_buffer(sizeof busy - 1, text.base, MHD_RESPMEM_PERSISTENT));
    }
    struct held *held = mem_alloc(sizeof *held + len + 1);
    held->http = h;
    held->len = len;
    if (len)
        memcpy(held->bytes, bytes, len);
    struct MHD_Response *response =
        MHD_create_response_from_buffer_with_free_callback_cls(len, held->bytes, held_sent, held);
    if (!response) {
        free(held);
        return MHD_NO;
    }
    h->held_bytes += len;
    return send_response(connection, status, type, response);
}

static enum MHD_Result send_json(struct http *h, struct MHD_Connection *connection, unsigned status,
                                 json_t *json)
{
    char *text = json_dumps(json, JSON_COMPACT | JSON_REAL_PRECISION(9));
    json_decref(json);
    if (!text)
        return MHD_NO;
    enum MHD_Result ok = send_bytes(h, connection, status, JSON_TYPE, text, strlen(text));
    free(text);
    return ok;
}

static enum MHD_Result refuse(struct http *h, struct MHD_Connection *connection, unsigned status,
                              const char *why)
{
    return send_json(h, connection, status, json_pack("{s:s}", "error", why));
}

/* `allowed`: the methods that make sense there. */
static enum MHD_Result refuse_method(struct http *h, struct MHD_Connection *connection,
                                     const char *allowed)
{
    char why[64];
    snprintf(why, sizeof why, "here is only: %s", allowed);
    return refuse(h, connection, MHD_HTTP_METHOD_NOT_ALLOWED, why);
}

/* --- paths -------------------------------------------------------------------------------- */

static enum MHD_Result get_metrics(struct http *h, struct MHD_Connection *connection)
{
    struct http_text text = {0};
    http_metrics_text(&h->source, &text);
    enum MHD_Result ok = send_bytes(h, connection, MHD_HTTP_OK, METRICS_TYPE, text.bytes, text.len);
    free(text.bytes);
    return ok;
}

static enum MHD_Result get_health(struct http *h, struct MHD_Connection *connection)
{
    static const char good[] = "ok\n", bad[] = "reactor: one does not answer\n";
    return report_ask(h->source.report, 1000)
               ? send_bytes(h, connection, MHD_HTTP_OK, TEXT_TYPE, good, sizeof good - 1)
               : send_bytes(h, connection, MHD_HTTP_SERVICE_UNAVAILABLE, TEXT_TYPE, bad,
                            sizeof bad - 1);
}

static enum MHD_Result get_ready(struct http *h, struct MHD_Connection *connection)
{
    struct http_text text = {0};
    http_reasons(&h->source, &text);
    unsigned status = text.len ? MHD_HTTP_SERVICE_UNAVAILABLE : MHD_HTTP_OK;
    if (!text.len)
        http_text_add(&text, "ready\n");
    enum MHD_Result ok = send_bytes(h, connection, status, TEXT_TYPE, text.bytes, text.len);
    free(text.bytes);
    return ok;
}

/* "/v1/volumes/NAME" and what may stand behind it. */
static enum MHD_Result get_of_volume(struct http *h, struct MHD_Connection *connection,
                                     const char *rest)
{
    char name[NAME_BYTES_MAX + 1];
    size_t len = strcspn(rest, "/");
    bool heat = strcmp(rest + len, "/heat") == 0;
    json_t *json = NULL;
    if (len < sizeof name && (heat || !rest[len])) {
        memcpy(name, rest, len);
        name[len] = '\0';
        json = heat ? http_heat_json(&h->source, name) : http_volume_json(&h->source, name);
    }
    if (!json)
        return refuse(h, connection, MHD_HTTP_NOT_FOUND, "there is no such volume");
    return send_json(h, connection, MHD_HTTP_OK, json);
}

static enum MHD_Result get_file(struct MHD_Connection *connection, const struct http_file *file)
{
    union {
        const void *in;
        void *base;
    } bytes = {file->bytes};
    struct MHD_Response *response =
        MHD_create_response_from_buffer(file->len, bytes.base, MHD_RESPMEM_PERSISTENT);
    if (response)
        MHD_add_response_header(response, "Content-Security-Policy",
                                "default-src 'none'; script-src 'self'; style-src 'self'; "
                                "img-src 'self'; connect-src 'self'; base-uri 'none'; "
                                "form-action 'none'; frame-ancestors 'none'");
    return send_response(connection, MHD_HTTP_OK, file->type, response);
}

static enum MHD_Result get(struct http *h, struct MHD_Connection *connection, const char *path)
{
    static const char volumes[] = "/v1/volumes";
    const struct server_config *config = h->source.server->config;
    if (strcmp(path, "/metrics") == 0)
        return get_metrics(h, connection);
    if (strcmp(path, "/healthz") == 0)
        return get_health(h, connection);
    if (strcmp(path, "/readyz") == 0)
        return get_ready(h, connection);
    if (strcmp(path, "/v1/server") == 0)
        return send_json(h, connection, MHD_HTTP_OK, http_server_json(&h->source));
    if (strcmp(path, "/v1/clients") == 0)
        return send_json(h, connection, MHD_HTTP_OK, http_clients_json(&h->source));
    if (strcmp(path, volumes) == 0) {
        const char *series =
            MHD_lookup_connection_value(connection, MHD_GET_ARGUMENT_KIND, "series");
        return send_json(h, connection, MHD_HTTP_OK,
                         http_volumes_json(&h->source, series && strcmp(series, "1") == 0));
    }
    if (strncmp(path, volumes, sizeof volumes - 1) == 0 && path[sizeof volumes - 1] == '/')
        return get_of_volume(h, connection, path + sizeof volumes);
    for (size_t i = 0; i < config->n_files; i++)
        if (strcmp(path, config->files[i].path) == 0)
            return get_file(connection, &config->files[i]);
    if (strcmp(path, drain_path) == 0)
        return refuse_method(h, connection, "POST");
    return refuse(h, connection, MHD_HTTP_NOT_FOUND, "there is nothing at this path");
}

static enum MHD_Result post(struct port *port, struct MHD_Connection *connection, const char *path)
{
    struct http *h = port->http;
    if (strcmp(path, drain_path) != 0)
        return refuse_method(h, connection, "GET, HEAD");
    if (!port->is_control)
        return refuse(h, connection, MHD_HTTP_FORBIDDEN,
                      "this can be asked for on the control socket only");
    server_drain(h->source.server);
    return send_json(h, connection, MHD_HTTP_OK, http_server_json(&h->source));
}

/* A path is handed on as a string, which would end at an encoded NUL: one that has any stays as it
 * came, and nothing has a name like that. */
static size_t unescape(void *arg, struct MHD_Connection *connection, char *text)
{
    (void)arg;
    (void)connection;
    return strstr(text, "%00") ? strlen(text) : MHD_http_unescape(text);
}

/* Whether a Host header names this machine in a way that no name server has a part in. On loopback
 * all others are refused: a page in a browser of this machine may have given its own name this
 * address, and would read along (DNS rebinding). */
static bool is_local_name(const char *host)
{
    char name[256];
    uint8_t ip[16];
    const char *end = host[0] == '[' ? strchr(host, ']') : strchr(host, ':');
    size_t len = end ? (size_t)(end - host) : strlen(host);
    if (len >= sizeof name)
        return false;
    memcpy(name, host, len);
    name[len] = '\0';
    return !name[0] || strcasecmp(name, "localhost") == 0 || inet_pton(AF_INET, name, ip) == 1 ||
           (name[0] == '[' && inet_pton(AF_INET6, name + 1, ip) == 1);
}

static enum MHD_Result on_request(void *arg, struct MHD_Connection *connection, const char *path,
                                  const char *method, const char *version, const char *body,
                                  size_t *body_bytes, void **state)
{
    struct port *port = arg;
    struct call *call = *state;
    (void)version;
    (void)body;
    if (!call) {
        /* Only its head is there. */
        *state = mem_zalloc(sizeof *call);
        return MHD_YES;
    }
    if (*body_bytes) {
        call->body_bytes += *body_bytes;
        *body_bytes = 0;
        /* (Nothing is answered in the middle of a body: the connection ends.) */
        return call->body_bytes <= HTTP_BODY_BYTES_MAX ? MHD_YES : MHD_NO;
    }
    const char *host = MHD_lookup_connection_value(connection, MHD_HEADER_KIND, "Host");
    if (port->is_loopback && host && !is_local_name(host))
        return refuse(port->http, connection, MHD_HTTP_FORBIDDEN,
                      "on loopback only localhost and addresses are names of this server");
    if (strcmp(method, MHD_HTTP_METHOD_GET) == 0 || strcmp(method, MHD_HTTP_METHOD_HEAD) == 0)
        return get(port->http, connection, path);
    if (strcmp(method, MHD_HTTP_METHOD_POST) == 0)
        return post(port, connection, path);
    return refuse_method(port->http, connection, "GET, HEAD, POST");
}

/* --- connections -------------------------------------------------------------------------- */

static void on_connection(void *arg, struct MHD_Connection *connection, void **state,
                          enum MHD_ConnectionNotificationCode code)
{
    struct port *port = arg;
    if (code == MHD_CONNECTION_NOTIFY_STARTED) {
        const union MHD_ConnectionInfo *info =
            MHD_get_connection_info(connection, MHD_CONNECTION_INFO_CONNECTION_FD);
        struct caller *caller = mem_zalloc(sizeof *caller);
        caller->fd = info ? info->connect_fd : -1;
        caller->since_s = port->http->seconds;
        list_add_tail(&port->http->callers, &caller->link);
        *state = caller;
        return;
    }
    struct caller *caller = *state;
    if (caller)
        list_remove(&caller->link);
    free(caller);
    *state = NULL;
}

static void on_answered(void *arg, struct MHD_Connection *connection, void **state,
                        enum MHD_RequestTerminationCode code)
{
    struct port *port = arg;
    const union MHD_ConnectionInfo *info =
        MHD_get_connection_info(connection, MHD_CONNECTION_INFO_SOCKET_CONTEXT);
    (void)code;
    if (info && info->socket_context)
        ((struct caller *)info->socket_context)->since_s = port->http->seconds;
    free(*state);
    *state = NULL;
}

/* Clients that do something now and then, but never finish. */
static void end_slow_callers(struct http *h)
{
    list_for_each (l, &h->callers) {
        const struct caller *caller = container_of(l, struct caller, link);
        if (h->seconds - caller->since_s > HTTP_REQUEST_S && caller->fd >= 0)
            shutdown(caller->fd, SHUT_RDWR);
    }
}

static void on_trouble(void *arg, const char *format, va_list args)
{
    char text[512];
    (void)arg;
    /* The library's own sentences, about what clients did wrong mostly. */
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wformat-nonliteral"
    vsnprintf(text, sizeof text, format, args);
#pragma GCC diagnostic pop
    text[strcspn(text, "\n")] = '\0';
    log_debug("http: %s", text);
}

/* --- the thread --------------------------------------------------------------------------- */

static int next_timeout_ms(const struct http *h)
{
    int timeout_ms = -1;
    for (size_t i = 0; i < h->n_ports; i++) {
        MHD_UNSIGNED_LONG_LONG ms;
        if (MHD_get_timeout(h->ports[i].daemon, &ms) != MHD_YES)
            continue;
        int wait_ms = ms > 1000 ? 1000 : (int)ms;
        if (timeout_ms < 0 || wait_ms < timeout_ms)
            timeout_ms = wait_ms;
    }
    return timeout_ms;
}

static void *thread_main(void *arg)
{
    struct http *h = arg;
    struct epoll_event events[16];
    for (;;) {
        int n = epoll_wait(h->epoll, events, 16, next_timeout_ms(h));
        for (int i = 0; i < n; i++) {
            uint64_t seconds;
            if (events[i].data.fd == h->wake)
                return NULL;
            if (events[i].data.fd == h->clock &&
                read(h->clock, &seconds, sizeof seconds) == sizeof seconds) {
                h->seconds += seconds;
                series_tick(&h->source.series, h->source.server);
                end_slow_callers(h);
            }
        }
        for (size_t i = 0; i < h->n_ports; i++)
            MHD_run(h->ports[i].daemon);
    }
}

static enum status watch(struct http *h, int fd, struct err *e)
{
    struct epoll_event event = {.events = EPOLLIN, .data.fd = fd};
    if (fd < 0 || epoll_ctl(h->epoll, EPOLL_CTL_ADD, fd, &event) != 0)
        return fail(e, ST_NOMEM, "cannot serve HTTP: %s", strerror(errno));
    return ST_OK;
}

/* --- sockets ------------------------------------------------------------------------------ */

static enum status add_port(struct http *h, int listen_fd, bool is_control, bool is_loopback,
                            struct err *e)
{
    struct port *port = &h->ports[h->n_ports];
    /* The library closes what it is given. */
    int fd = fcntl(listen_fd, F_DUPFD_CLOEXEC, 0);
    port->http = h;
    port->is_control = is_control;
    port->is_loopback = is_loopback;
    /* clang-format off: one option a line */
    if (fd >= 0)
        port->daemon = MHD_start_daemon(
            MHD_USE_EPOLL | MHD_USE_ERROR_LOG, 0, NULL, NULL, on_request, port,
            MHD_OPTION_EXTERNAL_LOGGER, on_trouble, NULL,
            MHD_OPTION_UNESCAPE_CALLBACK, unescape, NULL,
            MHD_OPTION_LISTEN_SOCKET, fd,
            MHD_OPTION_CONNECTION_LIMIT, HTTP_CONNECTIONS_MAX,
            MHD_OPTION_PER_IP_CONNECTION_LIMIT, HTTP_PER_ADDRESS_MAX,
            MHD_OPTION_CONNECTION_TIMEOUT, HTTP_IDLE_S,
            MHD_OPTION_CONNECTION_MEMORY_LIMIT, (size_t)HTTP_HEAD_BYTES_MAX,
            MHD_OPTION_NOTIFY_CONNECTION, on_connection, port,
            MHD_OPTION_NOTIFY_COMPLETED, on_answered, port,
            MHD_OPTION_END);
    /* clang-format on */
    if (!port->daemon) {
        if (fd >= 0)
            close(fd);
        return fail(e, ST_NOMEM, "cannot serve HTTP: libmicrohttpd does not start");
    }
    h->n_ports++;
    const union MHD_DaemonInfo *info = MHD_get_daemon_info(port->daemon, MHD_DAEMON_INFO_EPOLL_FD);
    return watch(h, info ? info->epoll_fd : -1, e);
}

/* Anybody who can connect can read. */
static void warn_beyond_loopback(const struct listeners *l)
{
    size_t n;
    const char *const *addresses = listeners_addresses(l, &n);
    for (size_t i = 0; i < n; i++)
        if (listeners_is_exposed(l, i))
            log_warning("HTTP on %s is beyond this machine: whoever can connect can read the names "
                        "of volumes and the addresses of clients, unencrypted",
                        addresses[i]);
}

static void open_control(struct http *h, const char *path)
{
    struct err e = {0};
    if (path && strcmp(path, "off") == 0)
        return;
    if (control_open(path, h->control, &h->control_fd, &e) != ST_OK) {
        log_warning("no control socket: %s; \"fdb-nbd status\" and the like can't ask this server "
                    "(--control PATH names another place, --control off none)",
                    e.text);
        return;
    }
    if (lstat(h->control, &h->control_file) == 0)
        h->source.control = h->control;
}

struct http *http_open(struct server *s, struct listeners *listeners)
{
    struct http *h = mem_zalloc(sizeof *h);
    h->source.server = s;
    h->control_fd = h->epoll = h->wake = h->clock = -1;
    list_init(&h->callers);
    h->listeners = listeners;
    warn_beyond_loopback(h->listeners);
    open_control(h, s->config->control);
    return h;
}

enum status http_start(struct http *h, const char *const *listen, size_t n_listen, struct err *e)
{
    struct server *s = h->source.server;
    enum status st = ST_OK;
    h->source.inquiry = inquiry_new(s);
    h->source.report = report_new(s);
    h->source.started_ns = env_realtime_ns(s->lanes[0].env);
    h->source.started_boot_ns = env_now_ns(s->lanes[0].env);
    /* Copies: the listeners go when the server begins to stop. */
    for (size_t i = 0; i < n_listen; i++)
        h->listen[i] = mem_strdup(listen[i]);
    h->source.listen = (const char *const *)h->listen;
    h->source.n_listen = n_listen;
    h->source.http = listeners_addresses(h->listeners, &h->source.n_http);
    if (!h->source.n_http && !h->source.control)
        return ST_OK;
    h->epoll = epoll_create1(EPOLL_CLOEXEC);
    h->wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    h->clock = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK);
    const struct itimerspec second = {.it_interval.tv_sec = 1, .it_value.tv_sec = 1};
    if (h->clock >= 0)
        timerfd_settime(h->clock, 0, &second, NULL);
    st = watch(h, h->wake, e);
    if (st == ST_OK)
        st = watch(h, h->clock, e);
    /* (Where another server is replaced its socket still listens.) */
    if (st == ST_OK)
        st = listeners_listen(h->listeners, e);
    if (st == ST_OK)
        st = listeners_take_names(h->listeners, e);
    for (size_t i = 0; i < h->source.n_http && st == ST_OK; i++)
        st = add_port(h, listeners_descriptor(h->listeners, i), false,
                      listeners_is_loopback(h->listeners, i), e);
    if (st == ST_OK && h->source.control)
        st = add_port(h, h->control_fd, true, false, e);
    if (st != ST_OK)
        return st;
    int rc = pthread_create(&h->thread, NULL, thread_main, h);
    if (rc != 0)
        return fail(e, ST_NOMEM, "cannot start a thread: %s", strerror(rc));
    h->runs = true;
    for (size_t i = 0; i < h->source.n_http; i++)
        log_info("HTTP on %s", h->source.http[i]);
    return ST_OK;
}

void http_stopping(struct http *h)
{
    __atomic_store_n(&h->source.stopping, true, __ATOMIC_RELAXED);
    inquiry_stop(h->source.inquiry);
}

void http_stop(struct http *h)
{
    struct stat file;
    if (!h)
        return;
    if (h->runs) {
        uint64_t one = 1;
        ssize_t ignored = write(h->wake, &one, sizeof one);
        (void)ignored;
        pthread_join(h->thread, NULL);
        h->runs = false;
    }
    for (size_t i = 0; i < h->n_ports; i++)
        MHD_stop_daemon(h->ports[i].daemon);
    h->n_ports = 0;
    if (h->source.report)
        report_stop(h->source.report);
    if (h->source.inquiry)
        inquiry_stop(h->source.inquiry);
    series_free(&h->source.series, h->source.server);
    listeners_close(h->listeners);
    h->listeners = NULL;
    if (h->source.control && lstat(h->control, &file) == 0 &&
        file.st_dev == h->control_file.st_dev && file.st_ino == h->control_file.st_ino)
        unlink(h->control);
    h->source.control = NULL;
    const int fds[] = {h->control_fd, h->epoll, h->wake, h->clock};
    for (size_t i = 0; i < sizeof fds / sizeof *fds; i++)
        if (fds[i] >= 0)
            close(fds[i]);
    h->control_fd = h->epoll = h->wake = h->clock = -1;
}

void http_free(struct http *h)
{
    if (!h)
        return;
    report_free(h->source.report);
    inquiry_free(h->source.inquiry);
    for (size_t i = 0; i < h->source.n_listen; i++)
        free(h->listen[i]);
    free(h);
}
