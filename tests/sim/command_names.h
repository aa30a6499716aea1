/*
 * What the sources of the commands (src/cli) are compiled with for the simulator, in front of each:
 * under these names they find the simulated reactor and store of the process they run in
 * (command.c).
 */
#ifndef TESTS_SIM_COMMAND_NAMES_H
#define TESTS_SIM_COMMAND_NAMES_H

#include <unistd.h>

#include "server/reactor.h"
#include "store/store.h"

enum status command_reactor_new(struct reactor **out, struct err *e);
void command_reactor_free(struct reactor *r);
struct env *command_reactor_env(struct reactor *r);
void command_reactor_run_once(struct env *env);
enum status command_store_open(const char *uri, const struct store_options *options,
                               struct store **out, struct err *e);
void command_store_close(struct store *store);
pid_t command_getpid(void);

#define reactor_new command_reactor_new
#define reactor_free command_reactor_free
#define reactor_env command_reactor_env
#define reactor_run_once command_reactor_run_once
#define store_open command_store_open
#define store_close command_store_close
#define getpid command_getpid

#endif
