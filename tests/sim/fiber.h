/*
 * A stack of its own for code that waits in the middle of calls, in a world of one thread: it runs
 * until it waits, and goes on when it is let.
 */
#ifndef TESTS_SIM_FIBER_H
#define TESTS_SIM_FIBER_H

#include <stdbool.h>

struct fiber;

/* `body(arg)` begins with the first fiber_go_on(), and may return. One that never goes on again is
 * forgotten as it is; its stack is leaked. */
struct fiber *fiber_new(void (*body)(void *arg), void *arg);

/* Lets it run until it waits or returns. Not from inside a fiber. */
void fiber_go_on(struct fiber *f);
bool fiber_is_over(const struct fiber *f);

/* Inside a fiber: gives the thread back to whoever let it go on. */
void fiber_wait(void);

#endif
