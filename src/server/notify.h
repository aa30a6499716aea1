/*
 * What the service manager is told: systemd's notification protocol, where NOTIFY_SOCKET names a
 * socket. Elsewhere all of this does nothing.
 *
 * A server that takes the place of another (replace.h) makes itself the service's main process. To
 * be heard then it has to be started inside the service, and the unit needs NotifyAccess=all; the
 * one that is replaced says nothing from then on, or its end would be taken for the service's.
 */
#ifndef SERVER_NOTIFY_H
#define SERVER_NOTIFY_H

#include <stdbool.h>

struct server;
struct watchdog;

/* One line of a person's words about what goes on. */
void notify_status(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* Clients are served; after the start, and after notify_reloading(). */
void notify_ready(void);

/* Settings are being read again. */
void notify_reloading(void);

void notify_stopping(void);

/* This process is the service's from now on. */
void notify_main_process(void);

/* Another process is: nothing is said any more. Reactor 0. */
void notify_no_more(void);

/* Where the manager wants signs of life (WATCHDOG_USEC): gives them, four times as often as asked
 * for, while all lanes turn. NULL: none are wanted. `took_over`: in any case, for they
 * were asked of the process whose place was taken. Reactor 0, between lanes_open() and lanes_close(). */
struct watchdog *watchdog_begin(struct server *s, bool took_over);

/* The last sign was given; and, when no lane can turn any more, it is freed. NULL is let pass. */
void watchdog_end(struct watchdog *w);
void watchdog_free(struct watchdog *w);

#endif
