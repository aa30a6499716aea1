/*
 * What happened, in words a person can follow: `--trace` of the simulator. Lines carry the
 * world's time and who: "   3.204 817 s  gateway 2     takes volume v from gateway 1, ..."
 */
#ifndef TESTS_SIM_TRACE_H
#define TESTS_SIM_TRACE_H

#include <stdbool.h>

#include "sim_env.h"

/* Off (the default) nothing is formatted. Lines of the program's own log go here too, under the
 * name of whoever runs just then. */
void trace_begin(struct sim *sim, bool on);
extern bool trace_on;
void trace_line(const char *who, const char *format, ...) __attribute__((format(printf, 2, 3)));
#define trace(who, ...)                                                                            \
    do {                                                                                           \
        if (trace_on)                                                                              \
            trace_line(who, __VA_ARGS__);                                                          \
    } while (0)

/* Who the events that run now belong to, for log lines; NULL: the world. */
void trace_who(const char *name);

#endif
