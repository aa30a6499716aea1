/*
 * A wire: one connected socket of a client, watched on one reactor at a time.
 *
 * All that the server does with a client's socket goes through these few calls, so that the
 * same connections, requests and replies run on real sockets here (wire.c), with TLS in between
 * (tls.h) or not, and on simulated ones, which lose, delay and cut as their seed says (tests/sim/net.c).
 */
#ifndef SERVER_WIRE_H
#define SERVER_WIRE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>
#include <sys/uio.h>

#include "base/status.h"
#include "server/reactor.h"

struct wire;
struct tls_credentials;
struct tls_info;

enum wire_event {
    WIRE_READABLE = 1,
    WIRE_WRITABLE = 2,
    WIRE_HANG_UP = 4, /* the peer closed its side, or broke off */
};

/* Takes over an accepted, non-blocking socket. Not watched yet. Any thread. */
struct wire *wire_new(int fd);

/* Begins to belong to a reactor: `on_events` is called on its thread with a mask of enum
 * wire_event, or 0 where the socket can't be watched any more. Nothing is watched for yet. */
void wire_attach(struct wire *w, struct reactor *r, void (*on_events)(void *arg, int events),
                 void *arg);

/* What to watch for from now on: a mask, 0 for nothing. The reactor's thread. */
void wire_watch(struct wire *w, int events);

/* Leaves its reactor: `on_events` is not called any more, and `done(arg)` is from a later turn
 * of the loop; only then may it be attached elsewhere or closed. The reactor's thread. */
void wire_detach(struct wire *w, void (*done)(void *arg));

/* As recvmsg and sendmsg, never waiting, never a signal: bytes, 0 at the end of what the peer
 * sent, or -1 and errno. The reactor's thread. */
ssize_t wire_receive(struct wire *w, struct iovec *iov, size_t n);
ssize_t wire_send(struct wire *w, struct iovec *iov, size_t n);

/* The same bytes as the next wire_receive would give; they stay. */
ssize_t wire_peek(struct wire *w, void *out, size_t len);

/* Whether the peer has sent something that was not received yet, be it only a part of a record of
 * TLS, of which wire_peek() sees nothing. The reactor's thread. */
bool wire_has_unread(struct wire *w);

/* From now on the bytes on the socket are those of a TLS session, of which this is the server's
 * side: wire_handshake() until it stands, then the calls above as before. Attached; what came
 * before was read. The reactor's thread. */
void wire_begin_tls(struct wire *w, struct tls_credentials *credentials);

/* Goes on with the handshake of the session. ST_OK: it stands. ST_BUSY: again when the wire is
 * readable. Else the client is to be closed, and `e` says why in words for a person. On another
 * thread, but for which the wire was lent. */
enum status wire_handshake(struct wire *w, struct err *e);

/* Lends the session to another thread for one wire_handshake(), or takes it back. Meanwhile nothing
 * is watched, and of the calls here only wire_detach may be used. The reactor's thread. */
void wire_lend(struct wire *w, bool lent);

/* What that came to (server/tls.h); NULL: there is no session that stands. */
const struct tls_info *wire_tls_info(const struct wire *w);

/* What broke the session after it stood, in words for a person; NULL: nothing did. */
const char *wire_tls_trouble(const struct wire *w);

/* Closes the socket and frees the wire, which is not attached. */
void wire_close(struct wire *w);

#endif
