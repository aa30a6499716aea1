/* The trace, and the program's log in it (linked with -Wl,--wrap=log_line); trace.h. */
#include "trace.h"

#include <stdarg.h>
#include <stdio.h>

#include "base/log.h"

bool trace_on;
static struct sim *world;
static const char *who_runs;
static FILE *out; /* (where stdout is for a command is another matter) */

/* The world does not begin at zero. */
#define BEGIN_NS 1000000000u

void trace_begin(struct sim *sim, bool on)
{
    world = sim;
    trace_on = on;
    who_runs = NULL;
    out = stdout;
}

void trace_who(const char *name)
{
    who_runs = name;
}

static void put(const char *who, const char *format, va_list args)
{
    uint64_t us = (sim_now_ns(world) - BEGIN_NS) / 1000;
    fprintf(out, "%5u.%03u %03u s  %-12s ", (unsigned)(us / 1000000), (unsigned)(us / 1000 % 1000),
           (unsigned)(us % 1000), who ? who : "");
    vfprintf(out, format, args);
    fputc('\n', out);
}

void trace_line(const char *who, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    put(who, format, args);
    va_end(args);
}

void __wrap_log_line(enum log_level level, const char *volume, const char *client,
                     const char *format, ...) __attribute__((format(printf, 4, 5)));

void __wrap_log_line(enum log_level level, const char *volume, const char *client,
                     const char *format, ...)
{
    (void)volume;
    (void)client;
    static const char *const names[] = {"debug: ", "", "warning: ", "error: "};
    if (!trace_on)
        return;
    const struct sim_env *env = sim_running(world);
    char text[1024];
    snprintf(text, sizeof text, "%s%s", names[level], format);
    va_list args;
    va_start(args, format);
    /* The format is a literal of the program with a word before it. */
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wformat-nonliteral"
    put(who_runs ? who_runs : env ? env->name : NULL, text, args);
#pragma GCC diagnostic pop
    va_end(args);
}
