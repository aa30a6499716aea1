/*
 * The NBD server: listeners, reactors, connections, from start to a clean end.
 *
 * Reactor 0 runs on the calling thread: it accepts, negotiates, and does the
 * housekeeping. Each volume lives on one of the reactors (by its branch number),
 * and a connection moves there when its handshake is over.
 */
#ifndef SERVER_SERVER_H
#define SERVER_SERVER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/status.h"
#include "nbd/handshake.h"
#include "server/tls.h"
#include "store/store.h"

#define SERVER_LISTEN_MAX 16u
#define SERVER_LISTEN_DEFAULT "localhost:10809"
#define SERVER_THREADS_MAX 64u
#define SERVER_CONNECTIONS_MAX 100000u
#define SERVER_CONNECTIONS_USUAL 1024u

struct access;
struct doors;
struct http_file;

struct server_config {
    struct store *store; /* open; server_run closes it */
    struct doors *doors; /* open and claimed; server_run takes what is in it over */
    const char *const *listen; /* "HOST:PORT", "[V6]:PORT", ":PORT" (any address), "unix:PATH" */
    /* Up to SERVER_LISTEN_MAX, besides the sockets of a service manager (LISTEN_FDS). Where there
     * are neither: SERVER_LISTEN_DEFAULT. */
    size_t n_listen;
    const char *default_export; /* volume an empty name means; NULL: the only one, if it is */
    bool read_only;
    /* Who may open what (access.h), and the file it came from, which is read again on SIGHUP. NULL:
     * everybody may open everything. */
    struct access *access;
    const char *access_file;
    bool replace;         /* the servers of this store that listen at these addresses end */
    bool shared;          /* writes from several client addresses are let through */
    uint64_t cache_bytes; /* all reactors together; at least VOLUME_CACHE_BYTES_MIN for each */
    unsigned threads;     /* reactors; 1 .. SERVER_THREADS_MAX */
    unsigned lease_ms;
    bool user_given; /* which user it runs as was said, not left to who started it */
    unsigned store_timeout_ms; /* as in struct shard_config */
    /* A request waits so long for another server, and a write for another host on this one, to let
     * go of its volume before it is refused; 0: not at all. */
    unsigned owner_wait_ms;
    enum nbd_tls_mode tls;
    struct tls_config tls_files; /* read again at each SIGHUP; not with NBD_TLS_OFF */
    /* What was in them, which server_run takes over; NULL with NBD_TLS_OFF. */
    struct tls_credentials *credentials;
    unsigned connections_max;      /* 0: SERVER_CONNECTIONS_USUAL */
    unsigned handshakes_max;       /* of them; 0: half, 128 at least; see connection.h */
    unsigned handshake_timeout_ms; /* 0: 10000 */
    unsigned pause_close_ms;       /* 0: 10000; see connection.h */
    unsigned receive_timeout_ms;   /* 0: 30000; see connection.h */
    unsigned drain_ms;             /* 0: 10000; how long a stop waits for requests under way */
    unsigned slow_ms;              /* requests that take longer are logged; 0: none */
    const char *store_uri;         /* for people */
    const char *const *http; /* where HTTP is served; as `listen`, up to SERVER_LISTEN_MAX */
    size_t n_http;
    const char *control;           /* path of the control socket; NULL: the usual one; "off": none */
    const struct http_file *files; /* served over HTTP as they are; see http.h */
    size_t n_files;
    /* Called once when clients can connect, with the addresses listened on ("127.0.0.1:10809",
     * "unix:/run/nbd.sock"), n of them. May be NULL. */
    void (*ready)(void *arg, const char *const *addresses, size_t n);
    void *arg;
};

/* Serves until SIGTERM or SIGINT (or SIGHUP, where the terminal it was started on is gone; any
 * other SIGHUP has the access file and the credentials of TLS read again, the latter for sessions
 * that begin later), or until another server takes its place; then commits everything, gives all
 * volumes back and returns
 * ST_OK. A second signal ends the wait for requests under way. A service manager is told what goes
 * on (notify.h). Other than ST_OK: the server
 * could not be started, and `e` says why (ST_UNAVAIL: an address that cannot be listened on, or where
 * nobody may be replaced; what session_begin and shard_new give). */
enum status server_run(const struct server_config *config, struct err *e);

/* A descriptor for each of config->connections_max: raises this process's limit of open files as far
 * as it takes and may be, for which it is called before rights are given up. Where that is not enough,
 * connections_max is lowered, with a warning, or (ST_INVAL) refused if it was not 0. Before any
 * thread is started. */
enum status server_reserve_descriptors(struct server_config *config, struct err *e);

#endif
