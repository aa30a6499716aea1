/* Outcomes in the few error values the protocol knows ("Error values"). */
#include "nbd/reply.h"

uint32_t nbd_error_of(enum status st)
{
    switch (st) {
    case ST_OK:
        return NBD_SUCCESS;
    case ST_NOSPC:
        return NBD_ENOSPC;
    case ST_PERM:
        return NBD_EPERM;
    case ST_INVAL:
        return NBD_EINVAL;
    case ST_NOMEM:
        return NBD_ENOMEM;
    case ST_SHUTDOWN:
        return NBD_ESHUTDOWN;
    /* ENOTSUP is reserved for FAST_ZERO, so "not supported" is an invalid request. */
    case ST_UNSUP:
        return NBD_EINVAL;
    case ST_IO:
    case ST_NOTFOUND:
    case ST_EXISTS:
    case ST_CONFLICT:
    case ST_UNAVAIL:
    case ST_BUSY:
    case ST_FORMAT:
        return NBD_EIO;
    }
    return NBD_EIO;
}
