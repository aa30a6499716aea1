/*
 * Replies on their way out: gathered without copies, sent with as few calls as can be.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/check.h"
#include "base/mem.h"
#include "server/connection.h"

#define ZERO_BYTES (64u << 10)

static const uint8_t zeros[ZERO_BYTES];

static struct out *last_with_room(struct conn *c)
{
    struct out *o = c->out_last;
    if (o && o->n < OUT_PIECES && o->head_bytes + NBD_REPLY_HEAD_MAX <= OUT_HEAD_BYTES)
        return o;
    struct lane *lane = c->lane;
    if (lane->free_outs) {
        o = lane->free_outs;
        lane->free_outs = o->next;
        lane->n_free_outs--;
    } else {
        o = mem_alloc(sizeof *o);
    }
    o->next = NULL;
    o->first = o->n = o->head_bytes = 0;
    if (c->out_last)
        c->out_last->next = o;
    else
        c->out_first = o;
    c->out_last = o;
    return o;
}

static void put_out(struct lane *lane, struct out *o)
{
    if (lane->n_free_outs == OUT_KEPT_MAX) {
        free(o);
        return;
    }
    o->next = lane->free_outs;
    lane->free_outs = o;
    lane->n_free_outs++;
}

static void mark(struct conn *c)
{
    if (list_empty(&c->flush_link))
        list_add_tail(&c->lane->flush, &c->flush_link);
}

uint8_t *out_head(struct conn *c)
{
    struct out *o = last_with_room(c);
    return o->heads + o->head_bytes;
}

void out_head_done(struct conn *c, size_t len)
{
    struct out *o = c->out_last;
    uint8_t *p = o->heads + o->head_bytes;
    o->head_bytes += (uint32_t)len;
    c->out_bytes += len;
    c->out_tells = true;
    c->lane->reply_bytes += len;
    mark(c);
    /* Replies without data stand side by side. */
    if (o->n > o->first) {
        struct iovec *before = &o->pieces[o->n - 1];
        if ((uint8_t *)before->iov_base + before->iov_len == p && !o->owners[o->n - 1]) {
            before->iov_len += len;
            return;
        }
    }
    o->pieces[o->n] = (struct iovec){p, len};
    o->owners[o->n] = 0;
    o->n++;
}

void out_data(struct conn *c, const void *data, size_t len, uintptr_t owner)
{
    struct out *o = last_with_room(c);
    /* iovecs serve both directions, hence their pointer to what could be written. */
    union {
        const void *in;
        void *base;
    } p = {data};
    o->pieces[o->n] = (struct iovec){p.base, len};
    o->owners[o->n] = owner;
    o->n++;
    c->out_bytes += len;
    c->lane->reply_bytes += len;
    mark(c);
}

void out_zeros(struct conn *c, uint64_t len)
{
    while (len) {
        size_t n = min_u64(len, ZERO_BYTES);
        out_data(c, zeros, n, 0);
        len -= n;
    }
}

static void give_back(uintptr_t owner)
{
    if (owner & 1)
        free((void *)(owner & ~(uintptr_t)1));
    else if (owner)
        buf_unref((struct buf *)owner);
}

static void pop_out(struct conn *c)
{
    struct out *o = c->out_first;
    c->out_first = o->next;
    if (!c->out_first)
        c->out_last = NULL;
    put_out(c->lane, o);
}

bool out_flush(struct conn *c)
{
    while (c->out_first) {
        struct out *o = c->out_first;
        if (o->first == o->n) {
            pop_out(c);
            continue;
        }
        ssize_t sent = wire_send(c->wire, o->pieces + o->first, o->n - o->first);
        if (sent < 0) {
            c->blocked = errno == EAGAIN;
            return c->blocked;
        }
        c->out_bytes -= (uint64_t)sent;
        c->lane->reply_bytes -= (uint64_t)sent;
        size_t left = (size_t)sent;
        while (o->first < o->n && left >= o->pieces[o->first].iov_len) {
            left -= o->pieces[o->first].iov_len;
            give_back(o->owners[o->first]);
            o->first++;
        }
        if (left) {
            struct iovec *v = &o->pieces[o->first];
            v->iov_base = (uint8_t *)v->iov_base + left;
            v->iov_len -= left;
        }
    }
    CHECK(c->out_bytes == 0);
    c->blocked = c->out_tells = false;
    return true;
}

void out_drop(struct conn *c)
{
    while (c->out_first) {
        struct out *o = c->out_first;
        for (uint32_t i = o->first; i < o->n; i++)
            give_back(o->owners[i]);
        pop_out(c);
    }
    c->lane->reply_bytes -= c->out_bytes;
    c->out_bytes = 0;
}

void out_free_kept(struct lane *lane)
{
    while (lane->free_outs) {
        struct out *o = lane->free_outs;
        lane->free_outs = o->next;
        free(o);
    }
    lane->n_free_outs = 0;
}
