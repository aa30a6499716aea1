/* What wires without TLS say when they are asked about it: nothing. For all wires that stand in for
 * those of server/wire.h. */

#include "base/check.h"
#include "server/wire.h"

void wire_begin_tls(struct wire *w, struct tls_credentials *credentials)
{
    (void)w, (void)credentials;
    CHECK(!"TLS on a wire that has none");
}

enum status wire_handshake(struct wire *w, struct err *e)
{
    (void)w, (void)e;
    CHECK(!"TLS on a wire that has none");
    return ST_UNSUP;
}

void wire_lend(struct wire *w, bool lent)
{
    (void)w, (void)lent;
    CHECK(!"TLS on a wire that has none");
}

const struct tls_info *wire_tls_info(const struct wire *w)
{
    (void)w;
    return NULL;
}

const char *wire_tls_trouble(const struct wire *w)
{
    (void)w;
    return NULL;
}
