/*
 * The running servers, as the commands that look at them find and ask them: over HTTP
 * (docs/http.md), at the control sockets of this host or at addresses that were given. One question
 * is one connection, and blocks.
 */
#ifndef CLI_CONTROL_H
#define CLI_CONTROL_H

#include <stdbool.h>
#include <stddef.h>

#include <jansson.h>

#include "base/status.h"
#include "cli/cli.h"

#define CONTROL_PLACE_BYTES 256u
#define CONTROL_PLACES_MAX 64u

/* Where servers may be asked. */
struct control {
    char places[CONTROL_PLACES_MAX][CONTROL_PLACE_BYTES]; /* "unix:PATH" or "HOST:PORT" */
    size_t n;
    bool given; /* by options; else found on this host */
};

/* The options --http and --control, for the tables of the commands and for their take(). */
enum { CONTROL_HTTP = 20, CONTROL_SOCKET };
#define CONTROL_OPTION_SOCKET                                                                     \
    {CONTROL_SOCKET, "control", "PATH",                                                           \
     "a server's control socket; repeatable (default: all of this user on this host)"}
#define CONTROL_OPTION_HTTP                                                                       \
    {CONTROL_HTTP, "http", "HOST:PORT", "an HTTP address of a server; repeatable"}

/* Takes a value of either. ST_INVAL with a sentence that follows the option's name. */
enum status control_take(struct control *c, int code, const char *value, struct err *e);

/* Where no place was given: fills `c` with those of this host, in the order of their process ids. A
 * socket that a dead server left is removed. ST_NOTFOUND with a sentence where there is none. */
enum status control_find(struct control *c, struct err *e);

/* Asks a place for `path` ("/v1/server"), which gives a JSON object: a new reference in *out.
 * `method` is GET or POST. ST_UNAVAIL: nobody answers there, or with something else; ST_PERM: the
 * server refuses that; ST_NOTFOUND: it knows no such thing. */
enum status control_ask(const char *place, const char *method, const char *path, json_t **out,
                        struct err *e);

/* Members of an object, however incomplete it is: "" and 0 where there is none of that type. Texts
 * come from others: control characters in them are replaced, in place. */
const char *control_text(json_t *object, const char *name);
double control_number(json_t *object, const char *name);
bool control_truth(json_t *object, const char *name);

#endif
