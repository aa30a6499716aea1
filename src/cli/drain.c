/*
 * fdb-nbd drain: a running server gives all its volumes back and takes no new clients, so that
 * others can have them before its machine is taken down.
 */
#include <stdio.h>
#include <time.h>

#include "cli/control.h"

#define LOOK_MS 50

enum { WAIT = 1, ALL };

static const struct cli_option options[] = {
    {WAIT, "wait", NULL, "until all volumes are given back (default: return at once)"},
    {ALL, "all", NULL, "every server of this user on this host (default: the only one)"},
    CONTROL_OPTION_SOCKET,
    {0, NULL, NULL, NULL},
};

struct drain_options {
    struct control control;
    bool wait, all;
};

static enum status take(void *arg, int code, const char *value, struct err *e)
{
    struct drain_options *o = arg;
    switch (code) {
    case WAIT:
        o->wait = true;
        return ST_OK;
    case ALL:
        o->all = true;
        return ST_OK;
    default:
        return control_take(&o->control, code, value, e);
    }
}

static int say_which(const struct control *control)
{
    cli_error("%zu servers run here; say which one (--control %s), or --all: see fdb-nbd status",
              control->n, control->places[0] + sizeof "unix:" - 1);
    return CLI_FAILED;
}

/* CLI_DONE when all its volumes are given back. */
static int wait_for(const char *place)
{
    for (;;) {
        struct err e = {0};
        json_t *server = NULL;
        if (control_ask(place, "GET", "/v1/server", &server, &e) != ST_OK) {
            cli_error("the server ended, or does not answer, before it said that all volumes are "
                      "given back: %s", e.text);
            return CLI_FAILED;
        }
        bool over = control_truth(server, "drained");
        if (over)
            printf("%s:%.0f: all volumes are given back\n", control_text(server, "host"),
                   control_number(server, "pid"));
        json_decref(server);
        if (over)
            return CLI_DONE;
        struct timespec t = {.tv_nsec = LOOK_MS * 1000000L};
        nanosleep(&t, NULL);
    }
}

static int drain(const char *place)
{
    struct err e = {0};
    json_t *server = NULL;
    if (control_ask(place, "POST", "/v1/drain", &server, &e) != ST_OK) {
        cli_failed(&e);
        return CLI_FAILED;
    }
    printf("%s:%.0f: takes no new clients, and gives its volumes back\n",
           control_text(server, "host"), control_number(server, "pid"));
    fflush(stdout);
    json_decref(server);
    return CLI_DONE;
}

static int run_drain(struct cli *cli, int argc, char **argv)
{
    struct drain_options o = {0};
    struct err e = {0};
    if (cli_parse(cli, argc, argv, take, &o) < 0)
        return cli->status;
    if (control_find(&o.control, &e) != ST_OK)
        return cli_failed(&e);
    if (o.control.n > 1 && !o.control.given && !o.all)
        return say_which(&o.control);
    int status = CLI_DONE;
    bool drains[CONTROL_PLACES_MAX];
    /* All are told before any is waited for: none is to hand its volumes to the next. */
    for (size_t i = 0; i < o.control.n; i++) {
        drains[i] = drain(o.control.places[i]) == CLI_DONE;
        status = drains[i] ? status : CLI_FAILED;
    }
    for (size_t i = 0; o.wait && i < o.control.n; i++)
        if (drains[i] && wait_for(o.control.places[i]) != CLI_DONE)
            status = CLI_FAILED;
    return status;
}

const struct cli_command drain_command = {
    .name = "drain",
    .args = "",
    .summary = "have a server give all its volumes back and take no new clients",
    .details =
        "New clients are refused (\"shutting down\"). Connections end when what is under way was\n"
        "answered, and clients that connect again find the volumes at another server. The process\n"
        "goes on, its /readyz says \"draining\", and only a restart has it serve again.",
    .options = options,
    .run = run_drain,
};
