/*
 * TLS, the server's side, with GnuTLS: what the server proves itself with and whom it believes
 * (credentials), and the session of one client.
 *
 * Credentials are read once and shared by all sessions that began with them, so that a change of
 * the files reaches new sessions only, and none of them half a change.
 *
 * A session stands between a socket and whoever reads and writes it, with calls like those of
 * wire.h, which hides it (wire.c). Ciphertext is read and written in large pieces whatever size
 * its records have. What a client can make a session hold is bounded: TLS_IN_BYTES of ciphertext
 * read ahead, a record of each direction, TLS_OUT_BYTES_MAX of ciphertext that the socket does not
 * take, and what tls_peek() was asked for; all but the records only while there is something.
 */
#ifndef SERVER_TLS_H
#define SERVER_TLS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>
#include <sys/uio.h>

#include "base/status.h"

#define TLS_IN_BYTES (64u << 10)
/* So much is encrypted at once, and sent before more is. */
#define TLS_OUT_BYTES (64u << 10)
#define TLS_OUT_BYTES_MAX (256u << 10)
#define TLS_NAME_BYTES 256u

/* Where credentials come from; at least one of the two. */
struct tls_config {
    /* A folder with server-cert.pem and server-key.pem and, needed with verify_peer, ca-cert.pem;
     * ca-crl.pem if it is there. NULL: no certificates. */
    const char *certificates;
    bool verify_peer; /* a client without a certificate that the CA signed is refused */
    /* A file with lines "identity:key", the key in hexadecimal digits. NULL: none. */
    const char *psk;
};

struct tls_credentials;

/* Reads the files. What is allowed but unwise (keys that others can read, a certificate that is
 * over) is logged. ST_UNAVAIL: a file is missing or makes no sense; `e` says which and why, and
 * holds no secret. ANY thread. */
enum status tls_credentials_load(const struct tls_config *config, struct tls_credentials **out,
                                 struct err *e);

/* Counted; ANY thread. NULL is nobody's. */
struct tls_credentials *tls_credentials_ref(struct tls_credentials *c);
void tls_credentials_unref(struct tls_credentials *c);

/* What a session came to. Names are whole or "": the client proved none, or it does not fit or has
 * a control character. */
struct tls_info {
    const char *version, *cipher; /* "TLS1.3", "AES-256-GCM" */
    bool is_psk;
    /* The PSK identity; or the distinguished name (RFC 4514) of the client's certificate, which was
     * verified ... */
    char name[TLS_NAME_BYTES];
    char common_name[TLS_NAME_BYTES]; /* ... and its common name, where it has exactly one. */
};

struct tls_session;

/* A session on a non-blocking socket, which stays the caller's. One thread at a time from here
 * on. */
struct tls_session *tls_session_new(struct tls_credentials *c, int fd);

/* Tells the client that nothing more comes, as far as the socket takes that, and frees. */
void tls_session_free(struct tls_session *s);

/* Goes on with the handshake. ST_OK: the session stands. ST_BUSY: again when the socket is
 * readable. Else it is over, the client was told, and `e` says why in words for a person. */
enum status tls_handshake(struct tls_session *s, struct err *e);

/* Of a session that stands. */
const struct tls_info *tls_info(const struct tls_session *s);

/* What was wrong with what came on a session that stood, where that broke it; NULL: nothing. */
const char *tls_trouble(const struct tls_session *s);

/* As wire_receive, wire_send, wire_peek; a stream that was cut off ends like one that was closed.
 * Fewer bytes than asked for: nothing more is there. The bytes of a tls_send() that took only a
 * part, or EAGAIN, are to come again first with the next one: some may be encrypted already. */
ssize_t tls_receive(struct tls_session *s, struct iovec *iov, size_t n);
ssize_t tls_send(struct tls_session *s, const struct iovec *iov, size_t n);
ssize_t tls_peek(struct tls_session *s, void *out, size_t len);

/* Whether tls_receive() may find something although the socket has nothing new. */
bool tls_has_more(const struct tls_session *s);

/* Whether something came that tls_receive() has not given yet: data, or a part of a record that
 * lies here and not on the socket any more. */
bool tls_has_unread(const struct tls_session *s);

/* Whether ciphertext waits for the socket; sends what it takes. False: the connection is broken. */
bool tls_has_unsent(const struct tls_session *s);
bool tls_flush(struct tls_session *s);

#endif
