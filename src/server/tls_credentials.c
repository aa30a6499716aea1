/*
 * Credentials: certificates and keys as nbdkit, qemu and libnbd name them, and pre-shared keys as
 * psktool writes them. All files are read into memory before anything is made of them, so that an
 * error names the file, and new credentials are whole or not there at all.
 */
#include "server/tls_credentials.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include <gnutls/x509.h>

#include "base/bytes.h"
#include "base/log.h"
#include "base/mem.h"
#include "base/textfile.h"

#define FILE_BYTES_MAX (4u << 20)
#define LINES_MAX 10000u
/* A certificate that ends within this time is worth a word. */
#define SOON_S (14 * 86400)

/* --- files ---------------------------------------------------------------------------- */

static void wipe(gnutls_datum_t *d)
{
    if (d->data)
        explicit_bzero(d->data, d->size);
    free(d->data);
    *d = (gnutls_datum_t){NULL, 0};
}

static enum status read_open_file(int fd, const char *path, bool is_secret, gnutls_datum_t *out,
                                  struct err *e)
{
    struct stat st;
    if (fstat(fd, &st) != 0)
        return fail(e, ST_UNAVAIL, "cannot read %s: %s", path, strerror(errno));
    if (!S_ISREG(st.st_mode) || st.st_size > (off_t)FILE_BYTES_MAX)
        return fail(e, ST_UNAVAIL, "cannot read %s: it is no file, or longer than %u MiB", path,
                    FILE_BYTES_MAX >> 20);
    if (is_secret && st.st_mode & S_IRWXO)
        log_warning("%s holds a secret key and every user of this machine has access to it: "
                    "chmod o= %s",
                    path, path);
    /* One more, which GnuTLS does not ask for: the text ends with a NUL. */
    out->data = mem_zalloc((size_t)st.st_size + 1);
    while (out->size < (size_t)st.st_size) {
        ssize_t n = read(fd, out->data + out->size, (size_t)st.st_size - out->size);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0) {
            int why = errno;
            wipe(out);
            return fail(e, ST_UNAVAIL, "cannot read %s: %s", path, strerror(why));
        }
        if (n == 0)
            break;
        out->size += (unsigned)n;
    }
    return ST_OK;
}

/* *out empty where the file is not there and may be missing. */
static enum status read_file(const char *path, bool is_secret, bool may_miss, gnutls_datum_t *out,
                             struct err *e)
{
    *out = (gnutls_datum_t){NULL, 0};
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0 && errno == ENOENT && may_miss)
        return ST_OK;
    if (fd < 0)
        return fail(e, ST_UNAVAIL, "cannot read %s: %s", path, strerror(errno));
    enum status st = read_open_file(fd, path, is_secret, out, e);
    close(fd);
    return st;
}

/* --- certificates --------------------------------------------------------------------- */

struct files {
    char cert_path[PATH_MAX], key_path[PATH_MAX], ca_path[PATH_MAX], crl_path[PATH_MAX];
    gnutls_datum_t cert, key, ca, crl;
};

static void format_day(time_t t, char day[16])
{
    struct tm utc;
    if (!gmtime_r(&t, &utc) || !strftime(day, 16, "%Y-%m-%d", &utc))
        snprintf(day, 16, "?");
}

/* Says what clients will find wrong with the times of a certificate. */
static void check_times(gnutls_x509_crt_t crt, const char *path)
{
    time_t now = time(NULL), from = gnutls_x509_crt_get_activation_time(crt),
           until = gnutls_x509_crt_get_expiration_time(crt);
    char day[16];
    if (from > now) {
        format_day(from, day);
        log_warning("%s is not valid before %s: clients refuse it until then", path, day);
    } else if (until < now) {
        format_day(until, day);
        log_warning("%s has expired on %s: clients refuse it; put a new one in its place and send "
                    "SIGHUP",
                    path, day);
    } else if (until - now < SOON_S) {
        format_day(until, day);
        log_warning("%s expires on %s: put a new one in its place and send SIGHUP", path, day);
    }
}

static enum status check_certificate(const struct files *f, struct err *e)
{
    gnutls_x509_crt_t *list;
    unsigned n;
    int rc = gnutls_x509_crt_list_import2(&list, &n, &f->cert, GNUTLS_X509_FMT_PEM, 0);
    if (rc < 0)
        return fail(e, ST_UNAVAIL, "%s holds no certificate in PEM format: %s", f->cert_path,
                    gnutls_strerror(rc));
    check_times(list[0], f->cert_path);
    for (unsigned i = 0; i < n; i++)
        gnutls_x509_crt_deinit(list[i]);
    gnutls_free(list);
    return ST_OK;
}

static enum status use_certificates(struct tls_credentials *c, const struct files *f,
                                    struct err *e)
{
    enum status st = check_certificate(f, e);
    if (st != ST_OK)
        return st;
    gnutls_certificate_allocate_credentials(&c->certificates);
    int rc = gnutls_certificate_set_x509_key_mem2(c->certificates, &f->cert, &f->key,
                                                  GNUTLS_X509_FMT_PEM, NULL, 0);
    if (rc == GNUTLS_E_CERTIFICATE_KEY_MISMATCH)
        return fail(e, ST_UNAVAIL, "%s is not the key of the certificate %s", f->key_path,
                    f->cert_path);
    if (rc < 0)
        return fail(e, ST_UNAVAIL, "cannot use the key %s: %s%s", f->key_path, gnutls_strerror(rc),
                    rc == GNUTLS_E_DECRYPTION_FAILED
                        ? " (the server needs a key without a password)"
                        : "");
    if (f->ca.size) {
        rc = gnutls_certificate_set_x509_trust_mem(c->certificates, &f->ca, GNUTLS_X509_FMT_PEM);
        if (rc <= 0)
            return fail(e, ST_UNAVAIL, "%s holds no certificate in PEM format%s%s", f->ca_path,
                        rc ? ": " : "", rc ? gnutls_strerror(rc) : "");
    }
    if (f->crl.size) {
        rc = gnutls_certificate_set_x509_crl_mem(c->certificates, &f->crl, GNUTLS_X509_FMT_PEM);
        if (rc <= 0)
            return fail(e, ST_UNAVAIL, "%s holds no revocation list in PEM format%s%s", f->crl_path,
                        rc ? ": " : "", rc ? gnutls_strerror(rc) : "");
    }
    return ST_OK;
}

static enum status load_certificates(struct tls_credentials *c, const char *folder, struct err *e)
{
    struct files *f = mem_zalloc(sizeof *f);
    snprintf(f->cert_path, sizeof f->cert_path, "%s/server-cert.pem", folder);
    snprintf(f->key_path, sizeof f->key_path, "%s/server-key.pem", folder);
    snprintf(f->ca_path, sizeof f->ca_path, "%s/ca-cert.pem", folder);
    snprintf(f->crl_path, sizeof f->crl_path, "%s/ca-crl.pem", folder);
    c->ca_path = mem_strdup(f->ca_path);
    enum status st = read_file(f->cert_path, false, false, &f->cert, e);
    if (st == ST_OK)
        st = read_file(f->key_path, true, false, &f->key, e);
    /* Only to verify clients with. */
    if (st == ST_OK)
        st = read_file(f->ca_path, false, !c->verify_peer, &f->ca, e);
    if (st == ST_OK && c->verify_peer)
        st = read_file(f->crl_path, false, true, &f->crl, e);
    if (st == ST_OK)
        st = use_certificates(c, f, e);
    wipe(&f->cert);
    wipe(&f->key);
    wipe(&f->ca);
    wipe(&f->crl);
    free(f);
    return st;
}

/* --- pre-shared keys ------------------------------------------------------------------ */

static int compare_identities(const void *a, const void *b)
{
    const struct tls_psk *left = a, *right = b;
    return strcmp(left->identity, right->identity);
}

const struct tls_psk *tls_credentials_find(const struct tls_credentials *c, const void *identity,
                                           size_t len)
{
    struct tls_psk wanted;
    if (len == 0 || len > TLS_IDENTITY_BYTES_MAX || memchr(identity, 0, len) || !c->n_keys)
        return NULL;
    memcpy(wanted.identity, identity, len);
    wanted.identity[len] = '\0';
    return bsearch(&wanted, c->keys, c->n_keys, sizeof *c->keys, compare_identities);
}

static int hex_digit(char c)
{
    if (c >= '0' && c <= '9')
        return c - '0';
    c = (char)(c | 0x20);
    return c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

/* `len` digits; false: not all are, or they are not in pairs. */
static bool parse_hex(const char *text, size_t len, uint8_t *out)
{
    if (len % 2)
        return false;
    for (size_t i = 0; i < len; i += 2) {
        int high = hex_digit(text[i]), low = hex_digit(text[i + 1]);
        if (high < 0 || low < 0)
            return false;
        out[i / 2] = (uint8_t)(high << 4 | low);
    }
    return true;
}

static bool has_control_character(const char *text, size_t len)
{
    for (size_t i = 0; i < len; i++)
        if ((unsigned char)text[i] < 0x20 || text[i] == 0x7f)
            return true;
    return false;
}

/* One line: "identity:key", or "#" and the identity in hexadecimal digits, as psktool writes
 * unusual ones. NULL, or what is wrong with it. */
static const char *parse_key(const char *line, size_t len, struct tls_psk *k)
{
    const char *colon = memchr(line, ':', len);
    size_t name_len = colon ? (size_t)(colon - line) : 0;
    size_t key_len = colon ? len - name_len - 1 : 0;
    memset(k, 0, sizeof *k);
    if (!colon)
        return "is not identity:key";
    if (line[0] == '#') {
        line++;
        name_len--;
        if (name_len > 2 * TLS_IDENTITY_BYTES_MAX ||
            !parse_hex(line, name_len, (uint8_t *)k->identity))
            return "begins with # and no identity in hexadecimal digits";
        name_len /= 2;
    } else if (name_len <= TLS_IDENTITY_BYTES_MAX) {
        memcpy(k->identity, line, name_len);
    }
    if (name_len == 0 || name_len > TLS_IDENTITY_BYTES_MAX)
        return "has an identity that is not 1 to 128 bytes long";
    if (has_control_character(k->identity, name_len))
        return "has an identity with a control character";
    if (key_len > 2 * TLS_KEY_BYTES_MAX || !parse_hex(colon + 1, key_len, k->key))
        return "has a key that is not up to 64 bytes in hexadecimal digits";
    k->key_bytes = (unsigned)(key_len / 2);
    if (k->key_bytes < TLS_KEY_BYTES_MIN)
        return "has a key of fewer than 16 bytes, which can be guessed (psktool makes longer ones)";
    return NULL;
}

static enum status parse_keys(struct tls_credentials *c, const gnutls_datum_t *file,
                              struct err *e)
{
    const char *at = textfile_begin((char *)file->data, file->size).at;
    const char *end = (const char *)file->data + file->size;
    size_t n_lines = 1;
    for (const char *p = at; (p = memchr(p, '\n', (size_t)(end - p))); p++)
        n_lines++;
    if (n_lines > LINES_MAX)
        return fail(e, ST_UNAVAIL, "%s has more than %u lines", c->psk_path, LINES_MAX);
    c->keys = mem_zalloc(n_lines * sizeof *c->keys);
    for (unsigned line = 1; line <= n_lines; line++) {
        const char *newline = memchr(at, '\n', (size_t)(end - at));
        size_t len = (size_t)((newline ? newline : end) - at);
        const char *next = newline ? newline + 1 : end;
        if (len && at[len - 1] == '\r')
            len--;
        if (len) {
            const char *wrong = parse_key(at, len, &c->keys[c->n_keys++]);
            if (wrong)
                return fail(e, ST_UNAVAIL, "%s: line %u %s", c->psk_path, line, wrong);
        }
        at = next;
    }
    if (!c->n_keys)
        return fail(e, ST_UNAVAIL, "%s has no keys: psktool -u NAME -p %s makes one", c->psk_path,
                    c->psk_path);
    qsort(c->keys, c->n_keys, sizeof *c->keys, compare_identities);
    for (size_t i = 1; i < c->n_keys; i++)
        if (strcmp(c->keys[i - 1].identity, c->keys[i].identity) == 0)
            return fail(e, ST_UNAVAIL, "%s has two keys for \"%s\"", c->psk_path,
                        c->keys[i].identity);
    return ST_OK;
}

static enum status load_keys(struct tls_credentials *c, const char *path, struct err *e)
{
    gnutls_datum_t file;
    c->psk_path = mem_strdup(path);
    enum status st = read_file(path, true, false, &file, e);
    if (st == ST_OK)
        st = parse_keys(c, &file, e);
    wipe(&file);
    if (st == ST_OK) {
        gnutls_psk_allocate_server_credentials(&c->psk);
        gnutls_psk_set_server_credentials_function2(c->psk, tls_find_key);
    }
    return st;
}

/* --- the whole ------------------------------------------------------------------------ */

/* What the machine's GnuTLS allows, without what is too old; AES before ChaCha20, because
 * processors have instructions for it; only in ways that keep what was sent secret when a key, of a
 * certificate or shared, is lost later. */
static enum status set_priorities(struct tls_credentials *c, struct err *e)
{
    char text[160];
    snprintf(text, sizeof text,
             "-VERS-ALL:+VERS-TLS1.3:+VERS-TLS1.2:-RSA:-CHACHA20-POLY1305:+CHACHA20-POLY1305:"
             "%%SERVER_PRECEDENCE%s",
             c->psk ? ":+ECDHE-PSK:+DHE-PSK" : "");
    int rc = gnutls_priority_init2(&c->priorities, text, NULL, GNUTLS_PRIORITY_INIT_DEF_APPEND);
    if (rc < 0)
        return fail(e, ST_UNAVAIL, "GnuTLS's settings on this machine leave no way to use TLS: %s",
                    gnutls_strerror(rc));
    return ST_OK;
}

enum status tls_credentials_load(const struct tls_config *config, struct tls_credentials **out,
                                 struct err *e)
{
    struct tls_credentials *c = mem_zalloc(sizeof *c);
    enum status st = ST_OK;
    atomic_init(&c->refs, 1);
    c->verify_peer = config->verify_peer;
    if (config->certificates)
        st = load_certificates(c, config->certificates, e);
    if (st == ST_OK && config->psk)
        st = load_keys(c, config->psk, e);
    if (st == ST_OK)
        st = set_priorities(c, e);
    if (st == ST_OK)
        *out = c;
    else
        tls_credentials_unref(c);
    return st;
}

struct tls_credentials *tls_credentials_ref(struct tls_credentials *c)
{
    atomic_fetch_add(&c->refs, 1);
    return c;
}

void tls_credentials_unref(struct tls_credentials *c)
{
    if (!c || atomic_fetch_sub(&c->refs, 1) > 1)
        return;
    if (c->certificates)
        gnutls_certificate_free_credentials(c->certificates);
    if (c->psk)
        gnutls_psk_free_server_credentials(c->psk);
    if (c->priorities)
        gnutls_priority_deinit(c->priorities);
    if (c->keys)
        explicit_bzero(c->keys, c->n_keys * sizeof *c->keys);
    free(c->keys);
    free(c->psk_path);
    free(c->ca_path);
    free(c);
}
