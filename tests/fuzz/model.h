/*
 * What a volume may show, when several clients change it at once.
 *
 * Everything that happens in a run has a time of its own (model_now). A change takes effect at
 * some moment between the time when it was sent whole and the time when its answer was seen, or,
 * where it was never answered with success, at some moment until its connection was gone, or not
 * at all. A read shows for each byte what the last change before some moment of its own time made
 * of it.
 */
#ifndef FUZZ_MODEL_H
#define FUZZ_MODEL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct effect {
    struct effect *next;
    uint64_t offset, length;
    uint8_t *data; /* NULL: zeros */
    uint64_t begun, ended; /* UINT64_MAX: not yet */
    bool certain;          /* it happened */
};

struct model {
    const uint8_t *base; /* NULL: zeros */
    uint64_t size;
    struct effect *effects;
    unsigned n_effects;
};

/* Counts up; each call gives a later time. */
uint64_t model_now(void);

/* A change begins now. */
struct effect *model_begin(struct model *m, uint64_t offset, uint64_t length, const uint8_t *data);
/* It happened before now; or nobody knows, but it happens no more. */
void model_end(struct effect *e, bool certain);

/* Whether a read that was asked for at `begun` and answered now may show these bytes (NULL:
 * zeros). */
bool model_allows(const struct model *m, uint64_t offset, uint64_t length, const uint8_t *bytes,
                  uint64_t begun);

/* For a person: the first byte that may not be so, and what happened there. */
void model_explain(const struct model *m, uint64_t offset, uint64_t length, const uint8_t *bytes,
                   uint64_t begun);

void model_clear(struct model *m);

#endif
