/*
 * HTTP: what the server tells about itself (docs/http.md).
 *
 * One thread serves all HTTP sockets: those of --http, which only read, and the control socket, a
 * Unix socket for the commands on this machine. Everything a client can make it hold is bounded
 * (HTTP_*), and nothing here is waited for by a reactor.
 */
#ifndef SERVER_HTTP_H
#define SERVER_HTTP_H

#include <stdbool.h>
#include <stddef.h>

#include "base/status.h"

#define HTTP_CONNECTIONS_MAX 64u /* for each socket */
#define HTTP_PER_ADDRESS_MAX 16u /* of one client address */
#define HTTP_IDLE_S 10u          /* silence that ends a connection */
#define HTTP_REQUEST_S 15u       /* from its first byte to the last of its answer */
#define HTTP_HEAD_BYTES_MAX (16u << 10)
#define HTTP_BODY_BYTES_MAX (4u << 10)
#define HTTP_HELD_BYTES_MAX (64u << 20) /* answers that clients have not taken yet */

/* A page or a part of one, served as it is. */
struct http_file {
    const char *path; /* "/", "/page.css" */
    const char *type; /* "text/html; charset=utf-8" */
    const void *bytes;
    size_t len;
};

struct http;
struct listeners;
struct server;

/* Takes the sockets of --http over, and makes the control socket; nothing is served yet. One that
 * can't be made is a warning. */
struct http *http_open(struct server *s, struct listeners *listeners);

/* Begins to serve, on a thread of its own. The lanes are open, and nothing of them runs yet. */
enum status http_start(struct http *h, const char *const *listen, size_t n_listen, struct err *e);

/* The server is about to end, which is what it says from now on. Lane 0's thread. */
void http_stopping(struct http *h);

/* Ends the thread and closes the sockets; the lanes are still there, and may have stopped. Harmless
 * where it was not started. */
void http_stop(struct http *h);

/* Once no reactor is left. */
void http_free(struct http *h);

#endif
