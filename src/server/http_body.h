/*
 * What stands in the answers of http.c: JSON and metrics. The HTTP thread.
 */
#ifndef SERVER_HTTP_BODY_H
#define SERVER_HTTP_BODY_H

#include <jansson.h>

#include "server/connection.h"
#include "server/inquiry.h"
#include "server/report.h"
#include "server/series.h"

/* All that answers are made of. */
struct http_source {
    struct server *server;
    struct report *report;
    struct inquiry *inquiry;
    struct series series;
    uint64_t started_ns;      /* since 1970 */
    uint64_t started_boot_ns; /* env_now_ns */
    const char *const *listen, *const *http;
    size_t n_listen, n_http;
    const char *control; /* NULL: none */
    uint64_t silent_ms;  /* of the store, when http_reasons() asked last */
    bool stopping;       /* atomic: lane 0 writes it */
};

struct http_text {
    char *bytes;
    size_t len, cap;
};
void http_text_add(struct http_text *t, const char *format, ...)
    __attribute__((format(printf, 2, 3)));

/* Why clients can't be served just now, one line each; "" where they can. */
void http_reasons(struct http_source *s, struct http_text *out);

json_t *http_server_json(struct http_source *s);
json_t *http_volumes_json(struct http_source *s, bool with_series);
json_t *http_volume_json(struct http_source *s, const char *name); /* NULL: there is none */
json_t *http_heat_json(struct http_source *s, const char *name);   /* NULL: there is none */
json_t *http_clients_json(struct http_source *s);

void http_metrics_text(struct http_source *s, struct http_text *out);

#endif
