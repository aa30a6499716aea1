/*
 * Who a client is: how it came, from where, as which user, and what TLS vouches for.
 *
 * Filled when a connection is accepted; the TLS part when its handshake is over, before the client
 * can ask for an export. It does not change after that. What decides over access (access.h) and
 * what log lines say about a client come from here.
 */
#ifndef SERVER_PEER_H
#define SERVER_PEER_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/socket.h>

#define PEER_HOST_BYTES 64u
#define PEER_ADDRESS_BYTES 96u
#define PEER_NAME_BYTES 256u

enum peer_way { PEER_UNIX, PEER_TCP };

enum peer_tls {
    PEER_PLAIN,
    PEER_TLS_CERTIFICATE, /* TLS with certificates: the server's, and maybe the client's */
    PEER_TLS_PSK,
};

struct peer {
    enum peer_way way;

    /* The process that connected a Unix socket, as the kernel saw it at that moment. Not where this
     * server's user namespace does not know its user: they all look like one, often "nobody". */
    bool has_uid;
    uint32_t uid, gid;

    /* TCP: the client's address in network order; an IPv4 address that came over an IPv6 socket
     * (::ffff:192.0.2.1) is IPv4 here. 4 or 16 bytes; Unix sockets have none. */
    uint8_t ip[16];
    unsigned ip_bytes;
    uint16_t port;

    char host[PEER_HOST_BYTES];       /* the address as text; "local" for this machine itself */
    char address[PEER_ADDRESS_BYTES]; /* for log lines: "192.0.2.1:40312", "unix socket (uid 0)" */

    enum peer_tls tls;
    /* What the client proved, whole or "" (it proved nothing, or the name does not fit or has a
     * control character): for PEER_TLS_PSK its identity; for PEER_TLS_CERTIFICATE the
     * distinguished name (RFC 4514, as "certtool --certificate-info" prints it) of a certificate
     * that was VERIFIED against the server's CA, and its common name where it has exactly one. */
    char tls_name[PEER_NAME_BYTES];
    char tls_common_name[PEER_NAME_BYTES];
};

/* Fills all but the TLS part, which is cleared, for an accepted socket whose other side is at
 * `sa`. */
void peer_fill(struct peer *p, int fd, const struct sockaddr *sa, socklen_t len);

/* What is known of it, for log lines: "192.0.2.1:40312, certificate CN=a,O=b". */
#define PEER_TEXT_BYTES (PEER_ADDRESS_BYTES + PEER_NAME_BYTES + 32)
const char *peer_text(const struct peer *p, char out[PEER_TEXT_BYTES]);

/* "192.0.2.1:40312", "[2001:db8::1]:40312" into out[size]. TCP addresses. */
void peer_format_address(const struct sockaddr *sa, socklen_t len, char *out, size_t size);

/* Whether it is an address of this machine alone: loopback, or no TCP address at all. */
bool peer_is_loopback(const struct sockaddr *sa);

#endif
