/* Requests: from bytes to checked structures; the rules are those of "Request types",
 * "Command flags" and "Error values" in the protocol document. */
#include "nbd/request.h"

#include <string.h>

#include "base/bytes.h"
#include "nbd/proto.h"

/* A compact request cannot tell "too long" before its payload, so a bit more than the most
 * is read over before the connection is given up. */
#define COMPACT_PAYLOAD_BYTES_BORNE (2 * (uint64_t)NBD_PAYLOAD_BYTES_MAX)

/* Flags that may come with each command besides FUA, which any command may carry. */
static uint16_t flags_of(const struct nbd_session *s, uint16_t command)
{
    switch (command) {
    case NBD_CMD_READ:
        return s->structured || s->extended ? NBD_CMD_FLAG_DF : 0;
    case NBD_CMD_WRITE:
        return s->extended ? NBD_CMD_FLAG_PAYLOAD_LEN : 0;
    case NBD_CMD_WRITE_ZEROES:
        return NBD_CMD_FLAG_NO_HOLE | NBD_CMD_FLAG_FAST_ZERO;
    case NBD_CMD_BLOCK_STATUS:
        return NBD_CMD_FLAG_REQ_ONE |
               (s->extended && s->n_contexts ? NBD_CMD_FLAG_PAYLOAD_LEN : 0);
    default:
        return 0;
    }
}

static enum nbd_verdict refuse(struct nbd_request *r, uint32_t error)
{
    r->error = error;
    return NBD_REQUEST_REFUSE;
}

static bool is_inside(const struct nbd_session *s, const struct nbd_request *r)
{
    return r->offset <= s->size && r->length <= s->size - r->offset;
}

enum nbd_verdict nbd_request_parse(const struct nbd_session *s, const uint8_t *head,
                                   struct nbd_request *r)
{
    r->flags = get_be16(head + 4);
    r->command = get_be16(head + 6);
    memcpy(&r->cookie, head + 8, sizeof r->cookie);
    r->offset = get_be64(head + 16);
    r->payload_len = 0;
    r->error = NBD_SUCCESS;

    if (s->extended) {
        if (get_be32(head) != NBD_EXTENDED_REQUEST_MAGIC)
            return NBD_REQUEST_DISCONNECT;
        r->length = get_be64(head + 24);
        if (r->flags & NBD_CMD_FLAG_PAYLOAD_LEN) {
            if (r->length > NBD_PAYLOAD_BYTES_MAX)
                return NBD_REQUEST_DISCONNECT;
            r->payload_len = (uint32_t)r->length;
        }
    } else {
        if (get_be32(head) != NBD_REQUEST_MAGIC)
            return NBD_REQUEST_DISCONNECT;
        r->length = get_be32(head + 24);
        if (r->command == NBD_CMD_WRITE) {
            if (r->length > COMPACT_PAYLOAD_BYTES_BORNE)
                return NBD_REQUEST_DISCONNECT;
            r->payload_len = (uint32_t)r->length;
        }
    }

    /* The way of nearly all requests: nothing to object to. */
    if (r->command == NBD_CMD_READ && !(r->flags & ~NBD_CMD_FLAG_FUA) && is_inside(s, r) &&
        r->length <= NBD_PAYLOAD_BYTES_MAX)
        return NBD_REQUEST_OK;

    /* There is nothing to answer to a DISC, however odd it is, and nothing behind it to wait for. */
    if (r->command == NBD_CMD_DISC) {
        r->payload_len = 0;
        return NBD_REQUEST_OK;
    }
    if (r->flags & ~(NBD_CMD_FLAG_FUA | (unsigned)flags_of(s, r->command)))
        return refuse(r, NBD_EINVAL);

    switch (r->command) {
    case NBD_CMD_READ:
        if (!is_inside(s, r))
            return refuse(r, NBD_EINVAL);
        /* EOVERFLOW is for those who may not have it in pieces. */
        if (r->length > NBD_PAYLOAD_BYTES_MAX)
            return refuse(r, r->flags & NBD_CMD_FLAG_DF ? NBD_EOVERFLOW : NBD_EINVAL);
        return NBD_REQUEST_OK;

    case NBD_CMD_WRITE:
        if (s->extended && !(r->flags & NBD_CMD_FLAG_PAYLOAD_LEN))
            return refuse(r, NBD_EINVAL);
        if (s->read_only)
            return refuse(r, NBD_EPERM);
        if (!is_inside(s, r))
            return refuse(r, NBD_ENOSPC);
        if (r->length > NBD_PAYLOAD_BYTES_MAX)
            return refuse(r, NBD_EINVAL);
        return NBD_REQUEST_OK;

    case NBD_CMD_WRITE_ZEROES:
        if (s->read_only)
            return refuse(r, NBD_EPERM);
        return is_inside(s, r) ? NBD_REQUEST_OK : refuse(r, NBD_ENOSPC);

    case NBD_CMD_TRIM:
        if (s->read_only)
            return refuse(r, NBD_EPERM);
        return is_inside(s, r) ? NBD_REQUEST_OK : refuse(r, NBD_EINVAL);

    case NBD_CMD_CACHE:
        return is_inside(s, r) ? NBD_REQUEST_OK : refuse(r, NBD_EINVAL);

    case NBD_CMD_FLUSH:
        return r->offset == 0 && r->length == 0 ? NBD_REQUEST_OK : refuse(r, NBD_EINVAL);

    case NBD_CMD_BLOCK_STATUS:
        if (s->n_contexts == 0)
            return refuse(r, NBD_EINVAL);
        if (nbd_request_has_status_payload(r)) {
            if (r->payload_len < 12 || r->payload_len > 8 + 4 * s->n_contexts ||
                r->payload_len % 4 != 0)
                return refuse(r, NBD_EINVAL);
            return NBD_REQUEST_OK;
        }
        if (r->length == 0 || !is_inside(s, r))
            return refuse(r, NBD_EINVAL);
        return NBD_REQUEST_OK;

    default:
        return refuse(r, NBD_EINVAL);
    }
}

bool nbd_request_is_disconnect(const struct nbd_session *s, const uint8_t *head)
{
    uint32_t magic = s->extended ? NBD_EXTENDED_REQUEST_MAGIC : NBD_REQUEST_MAGIC;
    return get_be32(head) == magic && get_be16(head + 6) == NBD_CMD_DISC;
}

bool nbd_request_has_status_payload(const struct nbd_request *r)
{
    return r->command == NBD_CMD_BLOCK_STATUS && (r->flags & NBD_CMD_FLAG_PAYLOAD_LEN);
}

enum nbd_verdict nbd_request_parse_status(const struct nbd_session *s, const uint8_t *payload,
                                          struct nbd_request *r, uint32_t *wanted)
{
    *wanted = 0;
    r->length = get_be64(payload);
    for (uint32_t at = 8; at < r->payload_len; at += 4) {
        uint32_t id = get_be32(payload + at), i = 0;
        while (i < s->n_contexts && s->context_ids[i] != id)
            i++;
        if (i == s->n_contexts || (*wanted & (1u << i)))
            return refuse(r, NBD_EINVAL);
        *wanted |= 1u << i;
    }
    if (r->length == 0 || !is_inside(s, r))
        return refuse(r, NBD_EINVAL);
    return NBD_REQUEST_OK;
}
