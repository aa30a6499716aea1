/*
 * TLS sessions; tls.h says what they are, wire.c puts them between a socket and a connection.
 *
 * GnuTLS never meets the socket: it pulls from ciphertext that was read ahead, and what it pushes
 * is gathered and sent by tls_flush(). So it never has to wait in the middle of a record, and what
 * a session sends on its own account (alerts, answers to changes of keys) needs no caller.
 */
#include "server/tls.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

#include <gnutls/gnutls.h>
#include <gnutls/x509.h>

#include "base/bytes.h"
#include "base/check.h"
#include "base/log.h"
#include "base/mem.h"
#include "server/tls_credentials.h"

#define RECORD_BYTES (16u << 10)
/* What may come without a byte of data in it: a whole handshake with a chain of certificates. GnuTLS
 * gathers any message until it is whole, and it may claim 16 MiB. */
#define BARREN_BYTES_MAX (64u << 10)
/* Warnings and wishes for another handshake that one session may come with. */
#define ODD_RECORDS_MAX 16u

/* [at, len) are there. */
struct run {
    uint8_t *bytes;
    size_t at, len, cap;
};

struct tls_session {
    gnutls_session_t gnutls;
    struct tls_credentials *credentials;
    int fd;
    const char *trouble; /* see tls_trouble() */
    bool stands;
    bool ended;  /* nothing more comes */
    int broken;  /* errno; 0: it is not */
    bool more;   /* see tls_has_more() */
    unsigned n_odd;
    size_t barren;    /* ciphertext since the last data */
    bool dry;         /* the socket had no more when it was read last */
    struct run in;    /* ciphertext */
    struct run out;   /* ciphertext */
    struct run ahead; /* plaintext: tls_peek() */
    size_t encrypted; /* plaintext, of which `out` still has a part */
    /* What the client said it is, for the reason of a refusal. */
    bool told_identity, is_unknown;
    char identity[TLS_NAME_BYTES];
    struct tls_info info;
};

static void run_free(struct run *r)
{
    free(r->bytes);
    *r = (struct run){.bytes = NULL};
}

static size_t run_left(const struct run *r)
{
    return r->len - r->at;
}

/* Moves up to `len` bytes out; frees it when it is empty. */
static size_t run_take(struct run *r, void *out, size_t len)
{
    size_t n = min_u64(len, run_left(r));
    if (n)
        memcpy(out, r->bytes + r->at, n);
    r->at += n;
    if (r->at == r->len)
        run_free(r);
    return n;
}

/* --- what GnuTLS reads and writes ------------------------------------------------------- */

static ssize_t pull(gnutls_transport_ptr_t arg, void *out, size_t len)
{
    struct tls_session *s = arg;
    if (!run_left(&s->in)) {
        s->in.bytes = mem_alloc(TLS_IN_BYTES);
        ssize_t n;
        s->dry = true;
        do
            n = recv(s->fd, s->in.bytes, TLS_IN_BYTES, MSG_DONTWAIT);
        while (n < 0 && errno == EINTR);
        if (n <= 0) {
            int why = errno;
            run_free(&s->in);
            if (n < 0)
                gnutls_transport_set_errno(s->gnutls, why);
            if (n < 0 && why != EAGAIN)
                s->broken = why;
            return n;
        }
        s->in.len = (size_t)n;
        s->dry = false;
    }
    size_t n = run_take(&s->in, out, len);
    s->barren += n;
    if (s->barren <= BARREN_BYTES_MAX)
        return (ssize_t)n;
    s->broken = EMSGSIZE;
    gnutls_transport_set_errno(s->gnutls, EMSGSIZE);
    return -1;
}

static ssize_t push(gnutls_transport_ptr_t arg, const void *data, size_t len)
{
    struct tls_session *s = arg;
    struct run *o = &s->out;
    if (run_left(o) + len > TLS_OUT_BYTES_MAX) {
        gnutls_transport_set_errno(s->gnutls, ENOBUFS);
        return -1;
    }
    if (o->at) {
        memmove(o->bytes, o->bytes + o->at, run_left(o));
        o->len -= o->at;
        o->at = 0;
    }
    mem_grow(&o->bytes, &o->cap, o->len + len, 1);
    memcpy(o->bytes + o->len, data, len);
    o->len += len;
    return (ssize_t)len;
}

bool tls_has_unsent(const struct tls_session *s)
{
    return run_left(&s->out) > 0;
}

bool tls_flush(struct tls_session *s)
{
    struct run *o = &s->out;
    while (run_left(o)) {
        ssize_t n = send(s->fd, o->bytes + o->at, run_left(o), MSG_NOSIGNAL | MSG_DONTWAIT);
        if (n >= 0) {
            o->at += (size_t)n;
        } else if (errno == EAGAIN) {
            return true;
        } else if (errno != EINTR) {
            s->broken = errno;
            return false;
        }
    }
    run_free(o);
    return true;
}

/* --- begin and end ---------------------------------------------------------------------- */

int tls_find_key(gnutls_session_t session, const gnutls_datum_t *identity, gnutls_datum_t *key)
{
    struct tls_session *s = gnutls_session_get_ptr(session);
    const struct tls_psk *k =
        tls_credentials_find(s->credentials, identity->data, identity->size);
    size_t len = min_u64(identity->size, sizeof s->identity - 1);
    memcpy(s->identity, identity->data, len);
    s->identity[len] = '\0';
    s->told_identity = true;
    s->is_unknown = !k;
    if (!k)
        return 1;
    key->data = gnutls_malloc(k->key_bytes);
    if (!key->data)
        return -1;
    memcpy(key->data, k->key, k->key_bytes);
    key->size = k->key_bytes;
    return 0;
}

struct tls_session *tls_session_new(struct tls_credentials *c, int fd)
{
    struct tls_session *s = mem_zalloc(sizeof *s);
    s->credentials = tls_credentials_ref(c);
    s->fd = fd;
    CHECK(gnutls_init(&s->gnutls, GNUTLS_SERVER | GNUTLS_NONBLOCK) == 0);
    gnutls_session_set_ptr(s->gnutls, s);
    gnutls_transport_set_ptr(s->gnutls, s);
    gnutls_transport_set_pull_function(s->gnutls, pull);
    gnutls_transport_set_push_function(s->gnutls, push);
    CHECK(gnutls_priority_set(s->gnutls, c->priorities) == 0);
    if (c->certificates)
        gnutls_credentials_set(s->gnutls, GNUTLS_CRD_CERTIFICATE, c->certificates);
    if (c->psk)
        gnutls_credentials_set(s->gnutls, GNUTLS_CRD_PSK, c->psk);
    if (c->verify_peer) {
        /* A certificate that is for servers only is none of a client. (GnuTLS keeps the address of
         * this, for when the client shows its certificate.) */
        static unsigned char purpose[] = GNUTLS_KP_TLS_WWW_CLIENT;
        static gnutls_typed_vdata_st data = {GNUTLS_DT_KEY_PURPOSE_OID, purpose, 0};
        gnutls_certificate_server_set_request(s->gnutls, GNUTLS_CERT_REQUIRE);
        gnutls_session_set_verify_cert2(s->gnutls, &data, 1, 0);
    } else {
        gnutls_certificate_server_set_request(s->gnutls, GNUTLS_CERT_IGNORE);
    }
    return s;
}

void tls_session_free(struct tls_session *s)
{
    if (s->stands && !s->broken)
        gnutls_bye(s->gnutls, GNUTLS_SHUT_WR);
    if (!s->broken)
        tls_flush(s);
    gnutls_deinit(s->gnutls);
    tls_credentials_unref(s->credentials);
    run_free(&s->in);
    run_free(&s->out);
    run_free(&s->ahead);
    free(s);
}

/* --- handshake --------------------------------------------------------------------------- */

/* Whole, or "". */
static void set_name(char out[TLS_NAME_BYTES], const void *name, size_t len)
{
    const unsigned char *p = name;
    bool fits = len < TLS_NAME_BYTES;
    for (size_t i = 0; fits && i < len; i++)
        fits = p[i] >= 0x20 && p[i] != 0x7f;
    if (fits)
        memcpy(out, name, len);
    out[fits ? len : 0] = '\0';
}

static void set_certificate_names(struct tls_session *s)
{
    gnutls_x509_crt_t crt;
    gnutls_datum_t dn;
    unsigned n = 0;
    const gnutls_datum_t *chain = gnutls_certificate_get_peers(s->gnutls, &n);
    if (!chain || !n || gnutls_x509_crt_init(&crt) != 0)
        return;
    if (gnutls_x509_crt_import(crt, &chain[0], GNUTLS_X509_FMT_DER) == 0) {
        char cn[TLS_NAME_BYTES], other[1];
        size_t len = sizeof cn, other_len = sizeof other;
        if (gnutls_x509_crt_get_dn3(crt, &dn, 0) == 0) {
            set_name(s->info.name, dn.data, dn.size);
            gnutls_free(dn.data);
        }
        if (gnutls_x509_crt_get_dn_by_oid(crt, GNUTLS_OID_X520_COMMON_NAME, 0, 0, cn, &len) == 0 &&
            gnutls_x509_crt_get_dn_by_oid(crt, GNUTLS_OID_X520_COMMON_NAME, 1, 0, other,
                                          &other_len) == GNUTLS_E_REQUESTED_DATA_NOT_AVAILABLE)
            set_name(s->info.common_name, cn, len);
    }
    gnutls_x509_crt_deinit(crt);
}

static void set_info(struct tls_session *s)
{
    s->info.version = gnutls_protocol_get_name(gnutls_protocol_get_version(s->gnutls));
    s->info.cipher = gnutls_cipher_get_name(gnutls_cipher_get(s->gnutls));
    s->info.is_psk = gnutls_auth_get_type(s->gnutls) == GNUTLS_CRD_PSK;
    if (s->info.is_psk)
        set_name(s->info.name, s->identity, strlen(s->identity));
    else if (s->credentials->verify_peer)
        set_certificate_names(s);
}

const struct tls_info *tls_info(const struct tls_session *s)
{
    return &s->info;
}

const char *tls_trouble(const struct tls_session *s)
{
    return s->trouble;
}

/* What the client found wrong with us, or with what we said of it. */
static void explain_alert(struct tls_session *s, struct err *e)
{
    gnutls_alert_description_t alert = gnutls_alert_get(s->gnutls);
    const char *name = gnutls_alert_get_name(alert);
    switch ((int)alert) {
    case GNUTLS_A_UNKNOWN_CA:
    case GNUTLS_A_BAD_CERTIFICATE:
    case GNUTLS_A_CERTIFICATE_EXPIRED:
    case GNUTLS_A_CERTIFICATE_REVOKED:
    case GNUTLS_A_CERTIFICATE_UNKNOWN:
    case GNUTLS_A_UNSUPPORTED_CERTIFICATE:
        fail(e, ST_PERM, "the client does not accept this server's certificate (its alert: %s): its "
             "ca-cert.pem must be the one that signed server-cert.pem, and the host's name it "
             "connects to must stand there",
             name);
        return;
    default:
        fail(e, ST_PERM, "the client ended it (its alert: %s)", name ? name : "unknown");
    }
}

static void explain_certificate(struct tls_session *s, struct err *e)
{
    gnutls_datum_t why = {NULL, 0};
    unsigned status = gnutls_session_get_verify_cert_status(s->gnutls);
    set_certificate_names(s);
    if (gnutls_certificate_verification_status_print(status, GNUTLS_CRT_X509, &why, 0) != 0)
        why.data = NULL;
    fail(e, ST_PERM, "the client's certificate (%s) is not accepted: %s It must be for TLS clients, "
         "signed by the CA in %s",
         s->info.name[0] ? s->info.name : "without a name that can be shown",
         why.data ? (const char *)why.data : "verification failed.", s->credentials->ca_path);
    gnutls_free(why.data);
}

static void explain(struct tls_session *s, int rc, struct err *e)
{
    const struct tls_credentials *c = s->credentials;
    bool with_psk = c->psk && s->told_identity;
    switch (rc) {
    case GNUTLS_E_PREMATURE_TERMINATION:
    case GNUTLS_E_PULL_ERROR:
    case GNUTLS_E_PUSH_ERROR:
        if (s->broken == EMSGSIZE)
            fail(e, ST_PERM, "what the client sent is longer than any handshake has to be");
        else
            fail(e, ST_PERM, "the client broke off during the handshake%s%s",
                 with_psk ? "" : ": it may not accept this server's certificate",
                 with_psk || c->psk ? "" : ", or want to use a pre-shared key (--tls-psk)");
        return;
    case GNUTLS_E_FATAL_ALERT_RECEIVED:
        if (!with_psk) {
            explain_alert(s, e);
            return;
        }
        break;
    case GNUTLS_E_CERTIFICATE_VERIFICATION_ERROR:
    case GNUTLS_E_CERTIFICATE_ERROR:
        explain_certificate(s, e);
        return;
    case GNUTLS_E_NO_CERTIFICATE_FOUND:
    case GNUTLS_E_CERTIFICATE_REQUIRED:
        fail(e, ST_PERM, "the client has no certificate, which --tls-verify-peer asks for: give it "
             "client-cert.pem and client-key.pem, signed by the CA in %s",
             c->ca_path);
        return;
    case GNUTLS_E_DECRYPTION_FAILED:
        /* So looks OpenSSL's alert at this point, which it does not encrypt. */
        if (with_psk)
            break;
        fail(e, ST_PERM, "the client sent what can't be decrypted: it may not accept this server's "
             "certificate (its ca-cert.pem must be the one that signed server-cert.pem, and the "
             "host's name it connects to must stand there)");
        return;
    case GNUTLS_E_UNEXPECTED_PACKET_LENGTH:
    case GNUTLS_E_UNEXPECTED_PACKET:
    case GNUTLS_E_UNSUPPORTED_VERSION_PACKET:
    case GNUTLS_E_RECORD_OVERFLOW:
        if (!s->told_identity) {
            fail(e, ST_PERM, "what came after STARTTLS is not TLS, or an older version than TLS 1.2");
            return;
        }
        break;
    case GNUTLS_E_NO_CIPHER_SUITES:
    case GNUTLS_E_INSUFFICIENT_CREDENTIALS:
    case GNUTLS_E_NO_COMMON_KEY_SHARE:
    case GNUTLS_E_INSUFFICIENT_SECURITY:
        fail(e, ST_PERM, "client and server have no way in common: this server takes %s (%s)",
             !c->psk            ? "certificates, no pre-shared keys"
             : !c->certificates ? "pre-shared keys, no certificates"
                                : "certificates and pre-shared keys",
             gnutls_strerror(rc));
        return;
    default:
        break;
    }
    if (with_psk && s->is_unknown)
        fail(e, ST_PERM, "%s has no key for the identity \"%s\"", c->psk_path, s->identity);
    else if (with_psk)
        fail(e, ST_PERM, "the client's key for the identity \"%s\" is not the one in %s (%s)",
             s->identity, c->psk_path, gnutls_strerror(rc));
    else
        fail(e, ST_PERM, "%s", gnutls_strerror(rc));
}

enum status tls_handshake(struct tls_session *s, struct err *e)
{
    int rc;
    do
        rc = gnutls_handshake(s->gnutls);
    while (rc == GNUTLS_E_INTERRUPTED ||
           (rc < 0 && rc != GNUTLS_E_AGAIN && !gnutls_error_is_fatal(rc) &&
            ++s->n_odd <= ODD_RECORDS_MAX));
    if (rc == GNUTLS_E_AGAIN && tls_flush(s))
        return ST_BUSY;
    if (rc == 0 && tls_flush(s)) {
        s->stands = s->more = true;
        s->barren = 0;
        set_info(s);
        return ST_OK;
    }
    explain(s, rc < 0 && rc != GNUTLS_E_AGAIN ? rc : GNUTLS_E_PUSH_ERROR, e);
    if (!s->broken) {
        gnutls_alert_send_appropriate(s->gnutls, rc);
        tls_flush(s);
        s->broken = EPROTO;
    }
    return e->st;
}

/* --- data --------------------------------------------------------------------------------- */

static void break_off(struct tls_session *s, int rc)
{
    s->trouble = gnutls_strerror(rc);
    s->broken = EPROTO;
}

/* What GnuTLS has: bytes, 0 when there is none now, nor more (s->ended, s->broken). */
static size_t receive_some(struct tls_session *s, void *out, size_t len)
{
    while (!s->ended && !s->broken) {
        size_t barren = s->barren;
        s->dry = false;
        ssize_t n = gnutls_record_recv(s->gnutls, out, len);
        if (n > 0) {
            s->barren = 0;
            return (size_t)n;
        }
        int rc = (int)n;
        /* After a message of its own, like new keys, GnuTLS says so, too, whatever lies behind it. */
        if (rc == GNUTLS_E_AGAIN && !s->dry && s->barren > barren)
            continue;
        if (rc == GNUTLS_E_AGAIN)
            return 0;
        if (rc == GNUTLS_E_INTERRUPTED)
            continue;
        /* Cut off, or closed in good order: no request is taken before it is whole. */
        if (rc == 0 || rc == GNUTLS_E_PREMATURE_TERMINATION)
            s->ended = true;
        else if (!s->broken && (gnutls_error_is_fatal(rc) || ++s->n_odd > ODD_RECORDS_MAX))
            break_off(s, rc);
        else if (rc == GNUTLS_E_REHANDSHAKE)
            gnutls_alert_send(s->gnutls, GNUTLS_AL_WARNING, GNUTLS_A_NO_RENEGOTIATION);
    }
    return 0;
}

/* The outcome of a look for bytes that found none. */
static ssize_t nothing_there(const struct tls_session *s)
{
    if (s->ended)
        return 0;
    errno = s->broken ? s->broken : EAGAIN;
    return -1;
}

ssize_t tls_receive(struct tls_session *s, struct iovec *iov, size_t n)
{
    size_t total = 0;
    bool is_full = true;
    for (size_t i = 0; i < n && is_full; i++) {
        uint8_t *p = iov[i].iov_base;
        size_t have = 0;
        while (have < iov[i].iov_len) {
            size_t got = run_left(&s->ahead) ? run_take(&s->ahead, p + have, iov[i].iov_len - have)
                                             : receive_some(s, p + have, iov[i].iov_len - have);
            have += got;
            is_full = got > 0;
            if (!is_full)
                break;
        }
        total += have;
    }
    s->more = is_full || s->ended || s->broken;
    return total ? (ssize_t)total : nothing_there(s);
}

ssize_t tls_peek(struct tls_session *s, void *out, size_t len)
{
    struct run *a = &s->ahead;
    while (run_left(a) < len) {
        mem_grow(&a->bytes, &a->cap, a->len + RECORD_BYTES, 1);
        size_t n = receive_some(s, a->bytes + a->len, RECORD_BYTES);
        if (!n)
            break;
        a->len += n;
    }
    size_t n = min_u64(len, run_left(a));
    s->more = n || s->ended || s->broken;
    if (!n) {
        run_free(a);
        return nothing_there(s);
    }
    memcpy(out, a->bytes + a->at, n);
    return (ssize_t)n;
}

bool tls_has_more(const struct tls_session *s)
{
    return s->more;
}

bool tls_has_unread(const struct tls_session *s)
{
    return run_left(&s->ahead) || run_left(&s->in) || s->barren ||
           gnutls_record_check_pending(s->gnutls);
}

/* Where in a list of pieces. */
struct place {
    const struct iovec *piece, *end;
    size_t offset;
};

/* `n` bytes on, and over empty pieces. */
static void go_forth(struct place *p, size_t n)
{
    for (;;) {
        while (p->piece < p->end && p->offset == p->piece->iov_len) {
            p->piece++;
            p->offset = 0;
        }
        if (!n)
            return;
        size_t part = min_u64(n, p->piece->iov_len - p->offset);
        p->offset += part;
        n -= part;
    }
}

/* A record's worth from there: where it lies, if that is one piece, else gathered in `record`. */
static size_t gather(struct place from, uint8_t record[RECORD_BYTES], size_t max,
                     const uint8_t **data)
{
    size_t len = 0;
    *data = (const uint8_t *)from.piece->iov_base + from.offset;
    if (from.piece->iov_len - from.offset >= max)
        return max;
    *data = record;
    while (from.piece < from.end && len < max) {
        size_t part = min_u64(max - len, from.piece->iov_len - from.offset);
        memcpy(record + len, (const uint8_t *)from.piece->iov_base + from.offset, part);
        len += part;
        go_forth(&from, part);
    }
    return len;
}

/* Encrypts about TLS_OUT_BYTES from there. False: the session broke. */
static bool encrypt(struct tls_session *s, struct place *p)
{
    uint8_t record[RECORD_BYTES];
    size_t max = min_u64(gnutls_record_get_max_size(s->gnutls), RECORD_BYTES);
    while (p->piece < p->end && s->encrypted < TLS_OUT_BYTES) {
        const uint8_t *data;
        size_t len = gather(*p, record, max, &data);
        ssize_t n = gnutls_record_send(s->gnutls, data, len);
        if (n <= 0) {
            break_off(s, (int)n);
            return false;
        }
        go_forth(p, (size_t)n);
        s->encrypted += (size_t)n;
    }
    return true;
}

ssize_t tls_send(struct tls_session *s, const struct iovec *iov, size_t n)
{
    struct place p = {iov, iov + n, 0};
    size_t done = 0;
    go_forth(&p, s->encrypted);
    while (!s->broken && tls_flush(s) && !tls_has_unsent(s)) {
        done += s->encrypted;
        s->encrypted = 0;
        if (p.piece == p.end || !encrypt(s, &p))
            break;
    }
    if (done)
        return (ssize_t)done;
    errno = s->broken ? s->broken : EAGAIN;
    return -1;
}
