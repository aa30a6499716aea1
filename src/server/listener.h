/*
 * Listening sockets: TCP over IPv4 and IPv6, and Unix domain sockets.
 */
#ifndef SERVER_LISTENER_H
#define SERVER_LISTENER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "base/status.h"
#include "server/peer.h"

#define LISTENER_SOCKETS_MAX 64u
#define LISTENER_ADDRESS_MAX 160u

/* A connection that was accepted; the socket is non-blocking and the callee's. */
struct accepted {
    int fd;
    struct peer peer;
};

struct listeners;
struct uv_loop_s;

/* Sockets that are to be `owner`'s, who may replace them later; (uid_t)-1: whose process this is. */
struct listeners *listeners_new(uid_t owner);

/* The first step, which may need rights (ports below 1024) that are given up before the second.
 * Opens what `text` names: "HOST:PORT" (all addresses HOST resolves to), "[V6]:PORT", ":PORT"
 * (any address), "unix:PATH"; nothing listens yet, and of a Unix socket nothing is there. Blocks
 * while a name is resolved. ST_INVAL: not an address; ST_UNAVAIL: can't listen there, because
 * somebody else does for one.
 *
 * `replace`: an address where somebody listens already is taken as well, if the kernel allows
 * that; no client comes to us before the last two steps below. */
enum status listeners_open(struct listeners *l, const char *text, bool replace, struct err *e);

/* Takes the sockets that a service manager handed to this process (LISTEN_FDS), if it did: *n of
 * them. They listen already, and stay with the manager when we end; so do their files. ST_INVAL:
 * one of them is no listening stream socket. */
enum status listeners_inherit(struct listeners *l, size_t *n, struct err *e);

/* The second step: makes sure that the Unix sockets can be made. A file left by a server that died
 * is removed. ST_UNAVAIL as for the first. */
enum status listeners_claim(struct listeners *l, struct err *e);

/* Somebody else who listens at an address of ours. */
struct listen_holder {
    const char *address; /* ours; valid until the close */
    uint64_t inode;      /* TCP: of the socket */
    uint32_t pid;        /* Unix: of the process that began to listen */
};

/* After listeners_claim(), with `replace`: who listens at these addresses now, *n of them, up to
 * `max`. ST_UNAVAIL: there is one who can't be made out. */
enum status listeners_holders(const struct listeners *l, struct listen_holder *out, size_t max,
                              size_t *n, struct err *e);

/* The last two steps. From the first on new TCP connections come to us, and to nobody else who
 * listens there (as far as the kernel can keep them apart; otherwise to both), and those of Unix
 * sockets where nobody else listens; from the second on those where somebody does. They wait until
 * listeners_start(). */
enum status listeners_listen(struct listeners *l, struct err *e);
enum status listeners_take_names(struct listeners *l, struct err *e);

/* Begins to hand connections to `take`, on the thread of `loop`. */
void listeners_start(struct listeners *l, struct uv_loop_s *loop,
                     void (*take)(void *arg, const struct accepted *a), void *arg);

/* After accept ran out of descriptors or memory it rests; this lets it try again. */
void listeners_resume(struct listeners *l);

/* Closes the sockets and removes their files. What the loop holds is freed by its next turns. */
void listeners_close(struct listeners *l);

/* The sockets themselves, as listeners_addresses() counts them. */
int listeners_descriptor(const struct listeners *l, size_t i);

/* Where it listens, in words a client understands; *n of them, valid until the close. */
const char *const *listeners_addresses(const struct listeners *l, size_t *n);

/* Whether other machines can come to the one with that number in listeners_addresses(). */
bool listeners_is_exposed(const struct listeners *l, size_t i);
/* Whether only this machine can, over TCP. */
bool listeners_is_loopback(const struct listeners *l, size_t i);

#endif
