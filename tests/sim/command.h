/*
 * Commands in the simulator: the program's own command line (src/cli), as a process of its own
 * that opens the simulated store.
 *
 * A command waits by turning its reactor's loop. Here it has a stack of its own and gives the
 * thread back to the world whenever it waits, so that everything else goes on meanwhile.
 */
#ifndef TESTS_SIM_COMMAND_H
#define TESTS_SIM_COMMAND_H

#include <stdbool.h>

#include "sim_env.h"
#include "stores.h"

struct command;

/* Starts "fdb-nbd WORDS ...": `words` ends with NULL. `name` ("resize (3)", for the trace) stays
 * where it is. */
struct command *command_start(struct sim *sim, struct simstore *store, const char *name,
                              const char *const *words);
bool command_is_over(const struct command *c);
/* What its process ended with (enum cli_exit); -1: it was killed. */
int command_status(const struct command *c);
/* The first line that it printed. */
const char *command_said(struct command *c);
/* kill -9, while it waits. */
void command_kill(struct command *c);

#endif
