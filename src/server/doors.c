/* A server's sockets before it serves; see doors.h. */
#include "server/doors.h"

#include "base/check.h"
#include "server/server.h"

static enum status open_nbd(struct listeners *l, const struct server_config *config, struct err *e)
{
    size_t n;
    enum status st = listeners_inherit(l, &n, e);
    if (st == ST_OK && n > 0 && config->replace)
        return fail(e, ST_INVAL, "--replace is not for the sockets of a service manager: restart "
                    "the service, they stay open meanwhile");
    if (st == ST_OK && n == 0 && config->n_listen == 0)
        return listeners_open(l, SERVER_LISTEN_DEFAULT, config->replace, e);
    for (size_t i = 0; i < config->n_listen && st == ST_OK; i++)
        st = listeners_open(l, config->listen[i], config->replace, e);
    return st;
}

enum status doors_open(struct doors *d, const struct server_config *config, uid_t owner,
                       struct err *e)
{
    CHECK(config->n_listen <= SERVER_LISTEN_MAX && config->n_http <= SERVER_LISTEN_MAX);
    *d = (struct doors){.nbd = listeners_new(owner), .http = listeners_new(owner)};
    enum status st = open_nbd(d->nbd, config, e);
    for (size_t i = 0; i < config->n_http && st == ST_OK; i++)
        st = listeners_open(d->http, config->http[i], config->replace, e);
    return st;
}

enum status doors_claim(struct doors *d, struct err *e)
{
    enum status st = listeners_claim(d->nbd, e);
    return st == ST_OK ? listeners_claim(d->http, e) : st;
}

void doors_close(struct doors *d)
{
    listeners_close(d->nbd);
    listeners_close(d->http);
    *d = (struct doors){0};
}
