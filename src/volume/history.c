#include "volume/history.h"

#include <stdlib.h>
#include <string.h>

#include "base/check.h"
#include "base/mem.h"

/* Where the first snapshot of `epoch` or a later one stands, or would stand. */
static size_t place_of(const struct history *h, uint64_t epoch)
{
    size_t low = 0, high = h->n;
    while (low < high) {
        size_t middle = low + (high - low) / 2;
        if (h->v[middle].epoch < epoch)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

uint64_t history_live_below(const struct history *h, uint64_t epoch)
{
    for (size_t i = place_of(h, epoch); i-- > 0;)
        if (!h->v[i].rec.removed)
            return h->v[i].epoch;
    return 0;
}

uint64_t history_live_at_or_above(const struct history *h, uint64_t epoch)
{
    for (size_t i = place_of(h, epoch); i < h->n; i++)
        if (!h->v[i].rec.removed)
            return h->v[i].epoch;
    return 0;
}

uint64_t history_newest_live(const struct history *h)
{
    return history_live_below(h, UINT64_MAX);
}

struct history_entry *history_find_name(const struct history *h, const char *name)
{
    for (size_t i = 0; i < h->n; i++)
        if (!h->v[i].rec.removed && strcmp(h->v[i].rec.name, name) == 0)
            return &h->v[i];
    return NULL;
}

struct history_entry *history_find(const struct history *h, uint64_t epoch)
{
    size_t i = place_of(h, epoch);
    return i < h->n && h->v[i].epoch == epoch ? &h->v[i] : NULL;
}

bool history_is_live(const struct history *h, uint64_t epoch)
{
    const struct history_entry *e = history_find(h, epoch);
    return e && !e->rec.removed;
}

void history_add(struct history *h, uint64_t epoch, const struct snapshot_record *rec)
{
    size_t at = place_of(h, epoch);
    CHECK(at == h->n || h->v[at].epoch != epoch);
    mem_grow(&h->v, &h->cap, h->n + 1, sizeof *h->v);
    memmove(h->v + at + 1, h->v + at, (h->n - at) * sizeof *h->v);
    h->v[at] = (struct history_entry){.epoch = epoch, .rec = *rec};
    h->n++;
}

void history_forget(struct history *h, uint64_t epoch)
{
    struct history_entry *e = history_find(h, epoch);
    if (!e)
        return;
    size_t behind = (size_t)(h->v + h->n - (e + 1));
    memmove(e, e + 1, behind * sizeof *e);
    h->n--;
}

void history_forget_all(struct history *h)
{
    free(h->v);
    *h = (struct history){0};
}
