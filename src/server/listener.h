/*
 * Listening sockets: TCP over IPv4 and IPv6, and Unix domain sockets.
 */
#ifndef SERVER_LISTENER_H
#define SERVER_LISTENER_H

#include <stdbool.h>
#include <stddef.h>

#include "base/status.h"

#define LISTENER_SOCKETS_MAX 64u
#define LISTENER_ADDRESS_MAX 160u

/* A connection that was accepted; the socket is non-blocking and the callee's. */
struct accepted {
    int fd;
    bool is_tcp;
    char host[64];     /* the client's numeric address; "local" for this machine itself */
    char address[96];  /* host and port, for log lines */
};

struct listeners;
struct uv_loop_s;

struct listeners *listeners_new(void);

/* Opens what `text` names: "HOST:PORT" (all addresses HOST resolves to), "[V6]:PORT", ":PORT"
 * (any address), "unix:PATH". A socket file left by a server that died is replaced. Blocks
 * while a name is resolved. ST_INVAL: not an address; ST_UNAVAIL: can't listen there. */
enum status listeners_open(struct listeners *l, const char *text, struct err *e);

/* Begins to hand connections to `take`, on the thread of `loop`. */
void listeners_start(struct listeners *l, struct uv_loop_s *loop,
                     void (*take)(void *arg, const struct accepted *a), void *arg);

/* After accept ran out of descriptors or memory it rests; this lets it try again. */
void listeners_resume(struct listeners *l);

/* Closes the sockets and removes their files. What the loop holds is freed by its next turns. */
void listeners_close(struct listeners *l);

/* Where it listens, in words a client understands; *n of them, valid until the close. */
const char *const *listeners_addresses(const struct listeners *l, size_t *n);

#endif
