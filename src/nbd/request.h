/*
 * Requests of the transmission phase: from bytes to a checked request, or to the
 * error it is to be answered with. All rules of what a client may ask live
 * here, so that those who carry requests out need not look at them again.
 */
#ifndef NBD_REQUEST_H
#define NBD_REQUEST_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/bytes.h"

/* What was agreed in the handshake, and what the export is. */
struct nbd_session {
    bool structured; /* structured replies */
    bool extended;   /* extended headers */
    bool read_only;
    uint32_t n_contexts; /* selected metadata contexts */
    const uint32_t *context_ids;
    uint64_t size; /* of the export in bytes; may change between requests */
};

struct nbd_request {
    uint16_t command; /* NBD_CMD_* */
    uint16_t flags;   /* NBD_CMD_FLAG_*, those that apply to the command */
    uint32_t payload_len; /* bytes that follow the header */
    uint64_t cookie;      /* opaque: as it lies in memory, to be put back the same way */
    uint64_t offset, length;
    uint32_t error; /* NBD_E* where the verdict is REFUSE */
};

enum nbd_verdict {
    NBD_REQUEST_OK,
    /* Answer with request.error after payload_len bytes were thrown away. */
    NBD_REQUEST_REFUSE,
    /* The stream makes no sense, or the payload is beyond bearing: close. */
    NBD_REQUEST_DISCONNECT,
};

/* Bytes of a request header in this session. */
static inline size_t nbd_request_bytes(const struct nbd_session *s)
{
    return s->extended ? 32 : 28;
}

/* Reads and checks the header at `head` (nbd_request_bytes() of them). A length of 0 is OK
 * where there is nothing to answer it with but success (all commands but BLOCK_STATUS). */
enum nbd_verdict nbd_request_parse(const struct nbd_session *s, const uint8_t *head,
                                   struct nbd_request *r);

/* The command and the offset in the header at `head`, neither of them checked: for looks ahead. */
static inline uint16_t nbd_request_command(const uint8_t *head)
{
    return get_be16(head + 6);
}

static inline uint64_t nbd_request_offset(const uint8_t *head)
{
    return get_be64(head + 16);
}

/* Whether the header at `head` is NBD_CMD_DISC; of a look ahead, so anything may lie there. */
bool nbd_request_is_disconnect(const struct nbd_session *s, const uint8_t *head);

/* Whether an OK request is a BLOCK_STATUS that brings a payload, to be read with
 * nbd_request_parse_status() when it is there. */
bool nbd_request_has_status_payload(const struct nbd_request *r);

/* Reads the payload of such a request: sets r->length, and *wanted to a bit for each context
 * (by its place in s->context_ids) that the client asks about. */
enum nbd_verdict nbd_request_parse_status(const struct nbd_session *s, const uint8_t *payload,
                                          struct nbd_request *r, uint32_t *wanted);

#endif
