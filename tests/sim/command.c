/*
 * Commands as processes of the simulated world; command.h says how they wait.
 *
 * A command's stack is switched to with swapcontext(). What it prints goes into memory.
 */
#include "command.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include "base/check.h"
#include "base/mem.h"
#include "cli/cli.h"
#include "command_names.h"
#include "trace.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

#define STACK_BYTES (256u << 10)
#define WORDS_MAX 16
#define FIRST_WORD 2 /* behind the program's name and the store */
#define FIRST_PID 30000

/* A stack and where it stands. */
struct side {
    ucontext_t context;
    const void *stack;
    size_t stack_bytes;
    void *shadow; /* the sanitizer's */
};

struct command {
    struct simstore *simstore;
    const char *name;
    char *words[WORDS_MAX + 1];
    int n_words, status;
    pid_t pid;
    struct sim_env *env;
    struct store *store; /* from store_open to store_close */
    struct side side;
    bool waits, over;
    FILE *out;
    char *said;
    size_t said_len;
};

static unsigned n_commands;
static struct command *current; /* on its stack just now; NULL: the world is */
static struct side world;

/* --- stacks ------------------------------------------------------------------------------- */

/* On the stack of `side` after `from` was left. */
static void arrived(struct side *side, struct side *from)
{
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(side->shadow, &from->stack, &from->stack_bytes);
#else
    (void)side;
    (void)from;
#endif
}

static void change_sides(struct side *from, struct side *to, bool for_good)
{
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(for_good ? NULL : &from->shadow, to->stack, to->stack_bytes);
#else
    (void)for_good;
#endif
    CHECK(swapcontext(&from->context, &to->context) == 0);
    arrived(from, to);
}

/* Lets a command run until it waits or ends. */
static void go_on(struct command *c)
{
    FILE *out = stdout, *error = stderr;
    CHECK(!current);
    current = c;
    c->waits = false;
    stdout = stderr = c->out;
    trace_who(c->name);
    change_sides(&world, &c->side, false);
    trace_who(NULL);
    stdout = out;
    stderr = error;
    current = NULL;
    if (!c->over)
        return;
    trace(c->name, "has ended with status %d: %s", c->status, command_said(c));
    sim_env_kill(c->env);
}

static void body(void)
{
    struct command *c = current;
    arrived(&c->side, &world);
    c->status = cli_main(c->n_words, c->words);
    fflush(c->out);
    c->over = true;
    change_sides(&c->side, &world, true);
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
    change_sides(&c->side, &world, false);
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

void command_store_close(struct store *store)
{
    struct command *c = current;
    c->store = NULL;
    simstore_detach(c->simstore, store);
}

pid_t command_getpid(void)
{
    return current->pid;
}

/* Not run here: the tables of the command line name them. */
const struct cli_command serve_command = {.name = "serve"}, store_command = {.name = "store"};

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
    CHECK(c->out && getcontext(&c->side.context) == 0);
    void *stack = mem_alloc(STACK_BYTES);
    c->side.stack = stack;
    c->side.stack_bytes = STACK_BYTES;
    c->side.context.uc_stack.ss_sp = stack;
    c->side.context.uc_stack.ss_size = STACK_BYTES;
    makecontext(&c->side.context, body, 0);
    sim_at(c->env, 0, begin, c);
    return c;
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
