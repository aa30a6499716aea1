/*
 * Telling the service manager; notify.h.
 *
 * A sign of life is given for the lanes together: every lane has run a task since the last one.
 * So a lane that hangs ends the process, which is what a watchdog is for. A store that does not
 * answer does not keep lanes from turning.
 */
#include "server/notify.h"

#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#include <systemd/sd-daemon.h>

#include "base/mem.h"
#include "server/connection.h"

#define STATUS_BYTES_MAX 512
#define SIGNS_IN_TIME 4u
/* Where the manager does not say: systemd tells its unit's watchdog to main processes alone, and a
 * process that takes the place of one was no such thing when it was started. */
#define WANTED_US_UNTOLD 2000000u

/* Asked of a lane, and away until it has turned. */
struct pulse {
    struct env_task task;
    atomic_bool away;
};

struct watchdog {
    struct server *server;
    struct env_timer timer;
    uint64_t every_ms;
    struct pulse pulses[]; /* one for each lane */
};

static bool says_nothing; /* reactor 0's */

static void tell(const char *text)
{
    if (!says_nothing)
        (void)sd_notify(0, text);
}

void notify_status(const char *format, ...)
{
    char text[STATUS_BYTES_MAX] = "STATUS=";
    va_list args;
    va_start(args, format);
    vsnprintf(text + 7, sizeof text - 7, format, args);
    va_end(args);
    /* A line is a message of its own. */
    for (char *c = text; *c; c++)
        if (*c == '\n')
            *c = ' ';
    tell(text);
}

void notify_ready(void)
{
    tell("READY=1");
}

void notify_reloading(void)
{
    struct timespec now;
    char text[64];
    clock_gettime(CLOCK_MONOTONIC, &now);
    snprintf(text, sizeof text, "RELOADING=1\nMONOTONIC_USEC=%lld",
             (long long)now.tv_sec * 1000000 + now.tv_nsec / 1000);
    tell(text);
}

void notify_stopping(void)
{
    tell("STOPPING=1\nSTATUS=stopping: requests under way are answered, volumes given back");
}

void notify_main_process(void)
{
    char text[32];
    snprintf(text, sizeof text, "MAINPID=%d", (int)getpid());
    tell(text);
}

void notify_no_more(void)
{
    says_nothing = true;
}

/* --- signs of life --------------------------------------------------------------------------- */

static void turned(struct env_task *task)
{
    atomic_store(&container_of(task, struct pulse, task)->away, false);
}

static void give_sign(struct env_timer *timer)
{
    struct watchdog *w = container_of(timer, struct watchdog, timer);
    struct server *s = w->server;
    bool all_turn = true;
    for (unsigned i = 0; i < s->n_lanes; i++)
        all_turn &= !atomic_load(&w->pulses[i].away);
    /* At the end lanes stop, one after the other, and how long that takes is bounded. */
    if (all_turn || s->stopping)
        tell("WATCHDOG=1");
    for (unsigned i = 0; all_turn && !s->stopping && i < s->n_lanes; i++) {
        atomic_store(&w->pulses[i].away, true);
        env_post(s->lanes[i].env, &w->pulses[i].task);
    }
    env_timer_start(s->lanes[0].env, &w->timer, w->every_ms);
}

/* In which time a sign is wanted, in microseconds; 0: none is. */
static uint64_t wanted_us(bool took_over)
{
    const char *text = getenv("WATCHDOG_USEC");
    uint64_t us = 0;
    if (took_over)
        return text ? strtoull(text, NULL, 10) : WANTED_US_UNTOLD;
    return sd_watchdog_enabled(0, &us) > 0 ? us : 0;
}

struct watchdog *watchdog_begin(struct server *s, bool took_over)
{
    uint64_t us = wanted_us(took_over);
    if (us == 0)
        return NULL;
    struct watchdog *w = mem_zalloc(sizeof *w + s->n_lanes * sizeof w->pulses[0]);
    w->server = s;
    w->every_ms = us / 1000 / SIGNS_IN_TIME + 1;
    w->timer.fire = give_sign;
    for (unsigned i = 0; i < s->n_lanes; i++)
        w->pulses[i].task.run = turned;
    env_timer_start(s->lanes[0].env, &w->timer, 0);
    return w;
}

void watchdog_end(struct watchdog *w)
{
    if (w)
        env_timer_stop(w->server->lanes[0].env, &w->timer);
}

void watchdog_free(struct watchdog *w)
{
    free(w);
}
