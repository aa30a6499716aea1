/*
 * The handshake, server side, as a machine of bytes.
 *
 * The owner of a connection feeds what arrives, sends what comes out, and
 * answers what only it can know: which exports there are, and what one of them
 * is. It may take its time over an answer; until then the machine takes no
 * bytes. Nothing here knows a socket or a volume, so all of it can be tested and
 * fuzzed from memory.
 *
 * What a client may make the server hold is bounded: one option's data
 * (HANDSHAKE_OPTION_BYTES_MAX; what is longer is read over) and the output,
 * provided that the owner feeds only when all output was sent.
 *
 * One thread at a time.
 */
#ifndef NBD_HANDSHAKE_H
#define NBD_HANDSHAKE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/status.h"

/* Longest data of an option that is looked at; longer ones are refused with ERR_TOO_BIG (or
 * what else the option calls for) after their data was read over ... */
#define HANDSHAKE_OPTION_BYTES_MAX (64u << 10)
/* ... up to this length, above which the connection is closed. */
#define HANDSHAKE_SKIP_BYTES_MAX (16u << 20)
/* Options in one handshake; the connection is closed at the next one. */
#define HANDSHAKE_OPTIONS_MAX 1024u
/* Queries in one SET_META_CONTEXT or LIST_META_CONTEXT, and contexts that may be selected. */
#define HANDSHAKE_QUERIES_MAX 1024u
#define HANDSHAKE_CONTEXTS_MAX 16u
/* With more output than this unsent, handshake_list_item() asks to wait. */
#define HANDSHAKE_OUTPUT_BYTES_SOFT (128u << 10)

enum nbd_tls_mode {
    NBD_TLS_OFF,     /* STARTTLS is an unknown option */
    NBD_TLS_ON,      /* the client may choose */
    NBD_TLS_REQUIRE, /* nothing but STARTTLS and ABORT before it */
};

/* What the machine needs to go on. */
enum handshake_want {
    HANDSHAKE_BYTES,  /* more from the client: handshake_feed */
    HANDSHAKE_LIST,   /* handshake_list_item for each export, then handshake_list_done */
    HANDSHAKE_EXPORT, /* handshake_export, about the export handshake_export_name */
    HANDSHAKE_TLS,    /* the output sent, then TLS begun, then handshake_tls_started */
    HANDSHAKE_READY,  /* the output sent, then transmission as in `result` */
    HANDSHAKE_CLOSE,  /* the output sent as far as the client takes it, then closed */
};

/* Answer to HANDSHAKE_EXPORT; the caller's, read during the call only. */
struct nbd_export {
    const char *name;        /* the canonical one; also where the client gave an empty name */
    const char *description; /* for people; may be empty */
    uint64_t size;           /* bytes */
    uint32_t block_size;     /* bytes, the preferred one, a power of two */
    bool read_only;
    /* Metadata contexts this export offers, as full names ("base:allocation"): at least those that
     * handshake_asks_for(). Only of use where the client asks about contexts. */
    const char *const *contexts;
    size_t n_contexts;
    const char *identity; /* a name of NBD_CONTEXT_IDENTITY_PREFIX, or NULL */
};

/* What was agreed; valid from HANDSHAKE_READY until handshake_free, the contexts before that too. */
struct handshake_result {
    char *name; /* canonical name of the export */
    bool structured, extended;
    uint16_t flags; /* transmission flags as they were sent */
    uint32_t n_contexts;
    struct {
        uint32_t id; /* as the client knows it */
        char *name;
    } contexts[HANDSHAKE_CONTEXTS_MAX];
};

struct handshake {
    enum handshake_want want; /* read by the owner */
    struct handshake_result result;

    /* For the owner's log: an option was refused for want of TLS; the connection is to be closed
     * because there was data behind a STARTTLS. */
    bool lacked_tls, spoke_before_tls;

    /* The machine's own. */
    enum nbd_tls_mode tls_mode;
    bool tls_active, fixed, no_zeroes;
    uint8_t state;
    uint8_t head[16];
    uint32_t head_len;
    uint32_t option, option_len, option_got, n_options;
    uint8_t *data;        /* of the current option; NULL where it is read over */
    struct meta_query *queries; /* in `data`, sorted */
    uint32_t n_queries;
    char *asked_name;     /* HANDSHAKE_EXPORT is about this */
    char *contexts_name;  /* canonical name the contexts were set for */
    uint8_t *out;
    size_t out_len, out_sent, out_cap;
};

/* Begins: the greeting is in the output. */
void handshake_init(struct handshake *h, enum nbd_tls_mode tls_mode);

/* Frees what the machine holds; not `h` itself. */
void handshake_free(struct handshake *h);

/* Takes bytes from the client and returns how many were used: fewer than `len` when the
 * machine came to want something else (see h->want); the rest is to be fed later, or
 * belongs to the transmission phase. All that has come is to be fed together: what follows a
 * STARTTLS was not protected by the TLS session it would become part of, and ends the
 * connection. */
size_t handshake_feed(struct handshake *h, const uint8_t *data, size_t len);

/* What is to be sent; *len 0: nothing. */
const uint8_t *handshake_output(const struct handshake *h, size_t *len);

/* The first `n` bytes of the output were sent. */
void handshake_sent(struct handshake *h, size_t n);

/* During HANDSHAKE_LIST: one export. False: not taken, because too much output is unsent;
 * the same one again when it was. */
bool handshake_list_item(struct handshake *h, const char *name, const char *description);

/* During HANDSHAKE_LIST: that were all, or (`st` not ST_OK) the list failed. */
void handshake_list_done(struct handshake *h, enum status st, const char *why);

/* During HANDSHAKE_EXPORT: the name the client gave, UTF-8 without NULs; "" is the default
 * export. *opens: the client means to enter the transmission phase with it. */
const char *handshake_export_name(const struct handshake *h, bool *opens);

/* During HANDSHAKE_EXPORT: whether the client asks about the metadata context of this name; about any
 * whose names begin with `prefix`, which ends with a colon. */
bool handshake_asks_for(const struct handshake *h, const char *context);
bool handshake_asks_below(const struct handshake *h, const char *prefix);

/* Whether the contexts in h->result are selected for the export of this canonical name, so that the
 * client uses them if it enters that one. */
bool handshake_selected_for(const struct handshake *h, const char *name);

/* During HANDSHAKE_EXPORT: the answer. `st` ST_OK: `export` describes it; else `why` is a
 * sentence for the client: ST_NOTFOUND is ERR_UNKNOWN, ST_SHUTDOWN ERR_SHUTDOWN, all else
 * ERR_POLICY. */
void handshake_export(struct handshake *h, enum status st, const struct nbd_export *export,
                      const char *why);

/* During HANDSHAKE_TLS: the TLS session stands. All that was negotiated before is forgotten. */
void handshake_tls_started(struct handshake *h);

/* The server takes no clients any more: the connection is to be closed. Allowed at any time before READY. */
void handshake_shutdown(struct handshake *h);

/* Transmission flags for an export under what was negotiated. */
uint16_t nbd_transmission_flags(bool read_only, bool structured, bool extended, bool contexts);

#endif
