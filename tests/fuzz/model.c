/* What a volume may show; model.h says by what rules. */
#include "model.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "base/check.h"
#include "base/mem.h"

static uint64_t now;

uint64_t model_now(void)
{
    return ++now;
}

struct effect *model_begin(struct model *m, uint64_t offset, uint64_t length, const uint8_t *data)
{
    struct effect *e = mem_zalloc(sizeof *e);
    CHECK(length && offset <= m->size && length <= m->size - offset);
    *e = (struct effect){.next = m->effects,
                         .offset = offset,
                         .length = length,
                         .begun = model_now(),
                         .ended = UINT64_MAX};
    if (data) {
        e->data = mem_alloc(length);
        memcpy(e->data, data, length);
    }
    m->effects = e;
    m->n_effects++;
    return e;
}

void model_end(struct effect *e, bool certain)
{
    CHECK(e->ended == UINT64_MAX);
    e->ended = model_now();
    e->certain = certain;
}

static bool overlaps(const struct effect *e, uint64_t from, uint64_t to)
{
    return e->offset < to && e->offset + e->length > from;
}

/* The next place behind `at` where an effect begins or ends; at most `to`. */
static uint64_t next_edge(const struct model *m, uint64_t at, uint64_t to)
{
    for (const struct effect *e = m->effects; e; e = e->next) {
        if (e->offset > at && e->offset < to)
            to = e->offset;
        if (e->offset + e->length > at && e->offset + e->length < to)
            to = e->offset + e->length;
    }
    return to;
}

static uint8_t byte_of(const uint8_t *data, uint64_t at)
{
    return data ? data[at] : 0;
}

static bool is_zeros(const uint8_t *p, uint64_t len)
{
    return !len || (p[0] == 0 && memcmp(p, p + 1, len - 1) == 0);
}

static bool is_same(const uint8_t *a, const uint8_t *b, uint64_t len)
{
    if (a && b)
        return memcmp(a, b, len) == 0;
    return (!a || is_zeros(a, len)) && (!b || is_zeros(b, len));
}

static const uint8_t *plus(const uint8_t *p, uint64_t n)
{
    return p ? p + n : NULL;
}

/* No effect begins or ends between the two. */
static bool allows_stretch(const struct model *m, uint64_t from, uint64_t to, const uint8_t *bytes,
                           uint64_t begun)
{
    /* What ended before this began is out of date. */
    uint64_t newest = 0;
    unsigned n = 0;
    for (const struct effect *e = m->effects; e; e = e->next)
        if (overlaps(e, from, to) && e->certain && e->ended < begun)
            newest = max_u64(newest, e->begun);
    const uint8_t **shown = mem_alloc((m->n_effects + 1) * sizeof *shown);
    if (!newest)
        shown[n++] = plus(m->base, from);
    for (const struct effect *e = m->effects; e; e = e->next)
        if (overlaps(e, from, to) && e->ended >= newest)
            shown[n++] = plus(e->data, from - e->offset);

    bool may = false;
    for (unsigned i = 0; i < n && !may; i++)
        may = is_same(bytes, shown[i], to - from);
    if (!may && n > 1) {
        may = true;
        for (uint64_t at = 0; at < to - from && may; at++) {
            may = false;
            for (unsigned i = 0; i < n && !may; i++)
                may = byte_of(bytes, at) == byte_of(shown[i], at);
        }
    }
    free(shown);
    return may;
}

bool model_allows(const struct model *m, uint64_t offset, uint64_t length, const uint8_t *bytes,
                  uint64_t begun)
{
    for (uint64_t at = offset, end = offset + length; at < end;) {
        uint64_t to = next_edge(m, at, end);
        if (!allows_stretch(m, at, to, plus(bytes, at - offset), begun))
            return false;
        at = to;
    }
    return true;
}

void model_explain(const struct model *m, uint64_t offset, uint64_t length, const uint8_t *bytes,
                   uint64_t begun)
{
    uint64_t at = 0;
    while (at < length && model_allows(m, offset + at, 1, plus(bytes, at), begun))
        at++;
    fprintf(stderr,
            "a read or status of %llu+%llu, begun at %llu, answered at %llu, shows %02x at %llu, "
            "which held %02x at first; since then, the last first:\n",
            (unsigned long long)offset, (unsigned long long)length, (unsigned long long)begun,
            (unsigned long long)now, byte_of(bytes, at), (unsigned long long)(offset + at),
            byte_of(m->base, offset + at));
    for (const struct effect *e = m->effects; e; e = e->next)
        if (overlaps(e, offset + at, offset + at + 1))
            fprintf(stderr, "  %02x by a %s of %llu+%llu, begun at %llu, ended at %lld%s\n",
                    byte_of(e->data, offset + at - e->offset), e->data ? "write" : "zero",
                    (unsigned long long)e->offset, (unsigned long long)e->length,
                    (unsigned long long)e->begun, (long long)e->ended,
                    e->certain ? "" : ", if at all");
}

void model_clear(struct model *m)
{
    for (struct effect *e; (e = m->effects);) {
        m->effects = e->next;
        free(e->data);
        free(e);
    }
    m->n_effects = 0;
}
