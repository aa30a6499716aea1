/*
 * A limit on log lines of one kind, for what others can cause as often as they like: a client that
 * is refused, again and again, or a slow disk under many requests. What is left out is counted, and
 * the count is a line of its own when more may be said; so a log grows by a bounded number of lines
 * a second, and still tells how much there was.
 */
#ifndef BASE_LOGLIMIT_H
#define BASE_LOGLIMIT_H

#include <stdbool.h>
#include <stdint.h>

#include "base/log.h"

#define LOG_LIMIT_WINDOW_NS 5000000000u

/* One thread's at a time. All zero but for the first three: nothing was said yet. */
struct log_limit {
    const char *what;     /* for the line that counts: "slow requests" */
    enum log_level level; /* of that line: the one of those that it limits */
    uint32_t lines_max;   /* in each window of LOG_LIMIT_WINDOW_NS */
    uint32_t shown;
    uint64_t window_ns; /* when this window began; any clock that goes forth */
    uint64_t left_out;
};

/* Whether a line about `n` more of them may be written; counts them as left out where not. */
bool log_limit_may(struct log_limit *l, uint64_t now_ns, uint64_t n);

/* Says how many were left out, once more may be said. Now and then. */
void log_limit_tick(struct log_limit *l, uint64_t now_ns);

#endif
