/* What sessions (tls.c) take from credentials (tls_credentials.c), and nobody else. */
#ifndef SERVER_TLS_CREDENTIALS_H
#define SERVER_TLS_CREDENTIALS_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <gnutls/gnutls.h>

#include "server/tls.h"

/* GnuTLS takes no longer ones. */
#define TLS_IDENTITY_BYTES_MAX 128u
#define TLS_KEY_BYTES_MIN 16u
#define TLS_KEY_BYTES_MAX 64u

struct tls_psk {
    char identity[TLS_IDENTITY_BYTES_MAX + 1];
    uint8_t key[TLS_KEY_BYTES_MAX];
    unsigned key_bytes;
};

struct tls_credentials {
    atomic_uint refs;
    gnutls_priority_t priorities;
    gnutls_certificate_credentials_t certificates; /* NULL: none */
    gnutls_psk_server_credentials_t psk;           /* NULL: none */
    bool verify_peer;
    struct tls_psk *keys; /* by identity */
    size_t n_keys;
    char *psk_path; /* for log lines */
    char *ca_path;
};

/* NULL: there is none of this name. */
const struct tls_psk *tls_credentials_find(const struct tls_credentials *c, const void *identity,
                                           size_t len);

/* Asked by GnuTLS during a handshake (tls.c): 0, or 1: there is none, and GnuTLS takes a random
 * key, so that nobody learns which identities exist. */
int tls_find_key(gnutls_session_t session, const gnutls_datum_t *identity, gnutls_datum_t *key);

#endif
