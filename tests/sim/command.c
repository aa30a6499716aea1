/*
 * Commands as processes of the simulated world; command.h says how they wait.
 *
 * What a command prints goes into memory: it finds other streams where stdout and stderr are.
 */
#include "command.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/check.h"
#include "base/mem.h"
#include "cli/audit.h"
#include "command_names.h"
#include "fiber.h"
#include "trace.h"

#define WORDS_MAX 16
#define FIRST_WORD 2 /* behind the program's name and the store */
#define FIRST_PID 30000
#define CLOSE_MS 50u

struct command {
    struct simstore *simstore;
    const char *name;
    char *words[WORDS_MAX + 1];
    int n_words, status;
    pid_t pid;
    struct sim_env *env;
    struct store *store; /* from store_open to store_close */
    struct fiber *fiber;
    bool waits, over;
    FILE *out;
    char *said;
    size_t said_len;
};

static unsigned n_commands;
static struct command *current; /* on its stack just now; NULL: none is */

/* Lets a command run until it waits or ends. */
static void go_on(struct command *c)
{
    FILE *out = stdout, *error = stderr;
    CHECK(!current);
    current = c;
    c->waits = false;
    stdout = stderr = c->out;
    fiber_go_on(c->fiber);
    stdout = out;
    stderr = error;
    current = NULL;
    if (!c->over)
        return;
    trace(c->name, "has ended with status %d: %s", c->status, command_said(c));
    sim_env_kill(c->env);
}

static void main_function(void *arg)
{
    struct command *c = arg;
    c->status = cli_main(c->n_words, c->words);
    fflush(c->out);
    c->over = true;
}

/* --- what a command has under it ------------------------------------------------------------ */

enum status command_reactor_new(struct reactor **out, struct err *e)
{
    (void)e;
    *out = (struct reactor *)current;
    return ST_OK;
}

void command_reactor_free(struct reactor *r)
{
    (void)r;
}

struct env *command_reactor_env(struct reactor *r)
{
    return &((struct command *)r)->env->base;
}

void command_reactor_run_once(struct env *env)
{
    struct command *c = current;
    CHECK(c && env == &c->env->base);
    c->waits = true;
    fiber_wait();
}

enum status command_store_open(const char *uri, const struct store_options *options,
                               struct store **out, struct err *e)
{
    struct command *c = current;
    (void)uri;
    (void)options;
    (void)e;
    *out = c->store = simstore_attach(c->simstore, c->env);
    return ST_OK;
}

struct pause {
    struct env_timer timer;
    bool over;
};

static void pause_over(struct env_timer *timer)
{
    container_of(timer, struct pause, timer)->over = true;
}

/* What was stopped just now still has a word from the engine's own thread to come. The real close
 * waits for that; the simulated one has to be given the time. */
void command_store_close(struct store *store)
{
    struct command *c = current;
    struct pause pause = {.timer = {.fire = pause_over}};
    env_timer_start(&c->env->base, &pause.timer, CLOSE_MS);
    while (!pause.over)
        command_reactor_run_once(&c->env->base);
    c->store = NULL;
    simstore_detach(c->simstore, store);
}

pid_t command_getpid(void)
{
    return current->pid;
}

/* Not run here: the tables of the command line name them. */
const struct cli_command serve_command = {.name = "serve"}, store_command = {.name = "store"},
                         export_command = {.name = "export"}, import_command = {.name = "import"},
                         diff_command = {.name = "diff"}, verify_command = {.name = "verify"},
                         usage_command = {.name = "usage"}, device_command = {.name = "device"},
                         bench_command = {.name = "bench"}, status_command = {.name = "status"},
                         clients_command = {.name = "clients"}, drain_command = {.name = "drain"};

/* --- from outside ---------------------------------------------------------------------------- */

static void event_over(struct sim_env *env)
{
    struct command *c = env->user;
    if (c->waits)
        go_on(c);
}

static void begin(void *arg)
{
    struct command *c = arg;
    if (trace_on) {
        char line[256] = "";
        for (int i = FIRST_WORD; i < c->n_words; i++) {
            size_t at = strlen(line);
            snprintf(line + at, sizeof line - at, " %s", c->words[i]);
        }
        trace(c->name, "begins: fdb-nbd%s", line);
    }
    go_on(c);
}

struct command *command_start(struct sim *sim, struct simstore *store, const char *name,
                              const char *const *words)
{
    struct command *c = mem_zalloc(sizeof *c);
    c->simstore = store;
    c->name = name;
    c->pid = FIRST_PID + (pid_t)++n_commands;
    c->words[0] = mem_strdup("fdb-nbd");
    c->words[1] = mem_strdup("--store=simulated:");
    c->n_words = FIRST_WORD;
    while (*words && c->n_words < WORDS_MAX)
        c->words[c->n_words++] = mem_strdup(*words++);
    c->env = sim_env_new(sim);
    c->env->name = c->name;
    c->env->user = c;
    c->env->after = event_over;
    c->out = open_memstream(&c->said, &c->said_len);
    CHECK(c->out);
    c->fiber = fiber_new(main_function, c);
    sim_at(c->env, 0, begin, c);
    return c;
}

/* The system's log is no part of the world. */
void audit_changed(const struct cli *cli, const char *format, ...)
{
    va_list args;
    (void)cli;
    va_start(args, format);
    vprintf(format, args);
    va_end(args);
    putchar('\n');
}

const char *audit_user(char out[AUDIT_USER_BYTES])
{
    snprintf(out, AUDIT_USER_BYTES, "somebody");
    return out;
}

bool command_is_over(const struct command *c)
{
    return c->over;
}

int command_status(const struct command *c)
{
    return c->status;
}

const char *command_said(struct command *c)
{
    fflush(c->out);
    char *end = c->said ? strchr(c->said, '\n') : NULL;
    if (end)
        *end = '\0';
    return c->said ? c->said : "";
}

void command_kill(struct command *c)
{
    CHECK(!current && !c->over);
    trace(c->name, "is killed");
    c->over = true;
    c->status = -1;
    if (c->store)
        simstore_died(c->simstore, c->store);
    sim_env_kill(c->env);
}
