/*
 * fdb-nbd status: what the running servers do, once or (--watch) every second.
 *
 * A picture is made as a whole before any of it is printed, so that a terminal never shows half of
 * one; there it is drawn over the one before, and cut to the terminal's size.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <time.h>
#include <unistd.h>

#include "base/mem.h"
#include "cli/control.h"
#include "cli/describe.h"

#define WATCH_MS 1000

enum { WATCH = 1 };

static const struct cli_option options[] = {
    {WATCH, "watch", NULL, "again every second, until interrupted (default: once)"},
    CONTROL_OPTION_SOCKET,
    CONTROL_OPTION_HTTP,
    {0, NULL, NULL, NULL},
};

struct status_options {
    struct control control;
    bool watch;
};

static enum status take(void *arg, int code, const char *value, struct err *e)
{
    struct status_options *o = arg;
    if (code != WATCH)
        return control_take(&o->control, code, value, e);
    o->watch = true;
    return ST_OK;
}

/* --- numbers ------------------------------------------------------------------------------- */

#define NUMBER_BYTES 40u

static const char *size_of(json_t *object, const char *name, char out[24])
{
    return cli_size((uint64_t)control_number(object, name), out);
}

/* "120us", "1.5ms", "2.0s"; "-" where nothing was asked. */
static const char *duration(json_t *rates, const char *name, char out[NUMBER_BYTES])
{
    double us = control_number(rates, name);
    if (!json_is_number(json_object_get(rates, name)))
        snprintf(out, NUMBER_BYTES, "-");
    else if (us < 1000)
        snprintf(out, NUMBER_BYTES, "%.0fus", us);
    else if (us < 1e6)
        snprintf(out, NUMBER_BYTES, "%.1fms", us / 1e3);
    else
        snprintf(out, NUMBER_BYTES, "%.1fs", us / 1e6);
    return out;
}

/* "3 d 4 h", "2 h 5 min", "7 min", "12 s". */
static const char *uptime(json_t *server, char out[NUMBER_BYTES])
{
    unsigned long s = (unsigned long)control_number(server, "uptime_s");
    if (s >= 86400)
        snprintf(out, NUMBER_BYTES, "%lu d %lu h", s / 86400, s % 86400 / 3600);
    else if (s >= 3600)
        snprintf(out, NUMBER_BYTES, "%lu h %lu min", s / 3600, s % 3600 / 60);
    else if (s >= 60)
        snprintf(out, NUMBER_BYTES, "%lu min", s / 60);
    else
        snprintf(out, NUMBER_BYTES, "%lu s", s);
    return out;
}

/* --- a server ---------------------------------------------------------------------------- */

static const char *state_of(json_t *server)
{
    if (control_truth(server, "stopping"))
        return "stopping";
    if (control_truth(server, "drained"))
        return "drained";
    if (control_truth(server, "draining"))
        return "draining";
    return control_truth(server, "ready") ? "serving" : "not ready";
}

static void print_half(FILE *to, const char *title, json_t *rates, const char *kind)
{
    char name[32], size[24], p50[NUMBER_BYTES], p99[NUMBER_BYTES];
    snprintf(name, sizeof name, "%s_bytes", kind);
    size_of(rates, name, size);
    snprintf(name, sizeof name, "%s_requests", kind);
    double requests = control_number(rates, name);
    snprintf(name, sizeof name, "%s_p50_us", kind);
    duration(rates, name, p50);
    snprintf(name, sizeof name, "%s_p99_us", kind);
    fprintf(to, "  %-6s %s/s in %.0f requests/s, latency p50 %s, p99 %s\n", title, size, requests,
            p50, duration(rates, name, p99));
}

static void print_server(FILE *to, json_t *server)
{
    char text[NUMBER_BYTES], used[24], limit[24], dirty[24];
    json_t *store = json_object_get(server, "store"), *cache = json_object_get(server, "cache");
    json_t *rates = json_object_get(server, "rates"), *listen = json_object_get(server, "listen");
    fprintf(to, "%s:%.0f  %s  %s  up %s  version %s\n", control_text(server, "host"),
            control_number(server, "pid"), state_of(server), control_text(store, "uri"),
            uptime(server, text), control_text(server, "version"));
    fprintf(to, "  listens on");
    for (size_t i = 0; i < json_array_size(listen); i++)
        if (json_is_string(json_array_get(listen, i)))
            fprintf(to, " %s", json_string_value(json_array_get(listen, i)));
    fprintf(to, "\n");
    if (!control_truth(store, "reachable"))
        fprintf(to, "  the store has not answered for %.0f ms\n", control_number(store, "silent_ms"));
    print_half(to, "read", rates, "read");
    print_half(to, "write", rates, "write");
    fprintf(to, "  cache  %s of %s, %s dirty\n", size_of(cache, "used_bytes", used),
            size_of(cache, "limit_bytes", limit), size_of(cache, "dirty_bytes", dirty));
    fprintf(to, "  %.0f clients, %.0f volumes open, %.0f owned\n",
            control_number(server, "connections"), control_number(server, "volumes_open"),
            control_number(server, "volumes_owned"));
}

/* --- its volumes ----------------------------------------------------------------------------- */

struct volume_rows {
    json_t **all;
    size_t n;
};

static const char *owner_of(json_t *volume, char out[DESCRIBE_CELL_BYTES])
{
    json_t *owner = json_object_get(volume, "owner");
    if (json_is_object(owner))
        snprintf(out, DESCRIBE_CELL_BYTES, "%.300s:%.0f", control_text(owner, "host"),
                 control_number(owner, "pid"));
    else
        snprintf(out, DESCRIBE_CELL_BYTES, "-");
    return out;
}

static void rate_cell(json_t *volume, const char *name, char out[DESCRIBE_CELL_BYTES])
{
    char size[24];
    snprintf(out, DESCRIBE_CELL_BYTES, "%s", size_of(json_object_get(volume, "rates"), name, size));
}

static void cell(void *arg, size_t row, size_t column, char out[DESCRIBE_CELL_BYTES])
{
    const struct volume_rows *rows = arg;
    json_t *v = rows->all[row], *rates = json_object_get(v, "rates");
    char text[NUMBER_BYTES], size[24];
    switch (column) {
    case 0:
        snprintf(out, DESCRIBE_CELL_BYTES, "%.300s", control_text(v, "name"));
        break;
    case 1:
        snprintf(out, DESCRIBE_CELL_BYTES, "%s", size_of(v, "size_bytes", size));
        break;
    case 2:
        owner_of(v, out);
        break;
    case 3:
        snprintf(out, DESCRIBE_CELL_BYTES, "%.0f", control_number(v, "clients"));
        break;
    case 4:
        rate_cell(v, "read_bytes", out);
        break;
    case 5:
        rate_cell(v, "write_bytes", out);
        break;
    case 6:
        snprintf(out, DESCRIBE_CELL_BYTES, "%s", duration(rates, "read_p99_us", text));
        break;
    case 7:
        snprintf(out, DESCRIBE_CELL_BYTES, "%s", duration(rates, "write_p99_us", text));
        break;
    case 8:
        snprintf(out, DESCRIBE_CELL_BYTES, "%s", size_of(v, "cached_bytes", size));
        break;
    default:
        snprintf(out, DESCRIBE_CELL_BYTES, "%s", size_of(v, "dirty_bytes", size));
    }
}

/* Those that this server has to do with; all are in `list`. */
static void print_volumes(FILE *to, json_t *answer)
{
    static const char *const titles[] = {"VOLUME",  "SIZE",     "OWNER",     "CLIENTS", "READ/S",
                                         "WRITE/S", "READ p99", "WRITE p99", "CACHED",  "DIRTY"};
    json_t *volumes = json_object_get(answer, "volumes"), *volume;
    struct volume_rows rows = {0};
    size_t i;
    rows.all = mem_alloc((json_array_size(volumes) + 1) * sizeof *rows.all);
    json_array_foreach (volumes, i, volume)
        if (control_truth(volume, "open") ||
            control_truth(json_object_get(volume, "owner"), "ours"))
            rows.all[rows.n++] = volume;
    fprintf(to, "\n");
    if (rows.n > 0)
        describe_table_to(to, titles, sizeof titles / sizeof *titles, rows.n, cell, &rows);
    double others = control_number(answer, "total") - (double)rows.n;
    if (others > 0)
        fprintf(to, "%s%.0f volume%s not in use here: fdb-nbd list\n", rows.n > 0 ? "and " : "",
                others, others > 1 ? "s" : "");
    else if (rows.n == 0)
        fprintf(to, "no volumes yet; make one: fdb-nbd create NAME SIZE\n");
    free(rows.all);
}

/* --- all of them ------------------------------------------------------------------------------ */

/* Asks one server for all that is shown; what fails is said in `e`. */
static enum status ask(const char *place, json_t **server, json_t **volumes, struct err *e)
{
    *server = *volumes = NULL;
    enum status st = control_ask(place, "GET", "/v1/server", server, e);
    if (st == ST_OK)
        st = control_ask(place, "GET", "/v1/volumes", volumes, e);
    return st;
}

static void give_back(json_t *server, json_t *volumes)
{
    json_decref(server);
    json_decref(volumes);
}

/* One picture; what fails is part of it, or said on stderr where `to` is stdout. CLI_FAILED where a
 * server did not answer. */
static int print_all(FILE *to, const struct control *control)
{
    int status = CLI_DONE;
    for (size_t i = 0; i < control->n; i++) {
        json_t *server, *volumes;
        struct err e = {0};
        if (i > 0)
            fprintf(to, "\n");
        if (ask(control->places[i], &server, &volumes, &e) == ST_OK) {
            print_server(to, server);
            print_volumes(to, volumes);
        } else {
            if (to == stdout)
                cli_error("%s", e.text);
            else
                fprintf(to, "%s\n", e.text);
            status = CLI_FAILED;
        }
        give_back(server, volumes);
    }
    return status;
}

static int print_json(const struct control *control)
{
    json_t *all = json_array();
    int status = CLI_DONE;
    for (size_t i = 0; i < control->n; i++) {
        json_t *server, *volumes;
        struct err e = {0};
        if (ask(control->places[i], &server, &volumes, &e) == ST_OK) {
            json_object_del(server, "series");
            json_array_append_new(
                all, json_pack("{s:s, s:O, s:O}", "place", control->places[i], "server", server,
                               "volumes", json_object_get(volumes, "volumes")));
        } else {
            json_array_append_new(all, json_pack("{s:s, s:s}", "place", control->places[i], "error",
                                                 e.text));
            status = CLI_FAILED;
        }
        give_back(server, volumes);
    }
    describe_print(json_pack("{s:o}", "servers", all));
    return status;
}

/* --- watching --------------------------------------------------------------------------------- */

/* Bytes of the first line of `text`, and in *cut those that a terminal of `columns` shows. */
static size_t measure_line(const char *text, size_t columns, size_t *cut)
{
    size_t len = strcspn(text, "\n"), seen = 0;
    for (*cut = 0; *cut < len; (*cut)++) {
        bool begins = ((unsigned char)text[*cut] & 0xc0) != 0x80; /* a character of UTF-8 */
        if (begins && seen++ == columns)
            break;
    }
    return len;
}

static void draw(const char *picture)
{
    struct winsize size = {0};
    if (ioctl(STDOUT_FILENO, TIOCGWINSZ, &size) != 0 || !size.ws_row || !size.ws_col)
        size = (struct winsize){.ws_row = 24, .ws_col = 80};
    printf("\033[H");
    for (unsigned row = 0; *picture && row + 1 < size.ws_row; row++) {
        size_t cut, len = measure_line(picture, size.ws_col, &cut);
        printf("%.*s\033[K\n", (int)cut, picture);
        picture += len + (picture[len] == '\n');
    }
    printf("\033[J");
}

static void rest(void)
{
    struct timespec t = {.tv_sec = WATCH_MS / 1000, .tv_nsec = WATCH_MS % 1000 * 1000000L};
    nanosleep(&t, NULL);
}

/* Until interrupted, or nobody reads what it prints. Servers may come and go. */
static int watch(struct control *control)
{
    bool on_terminal = isatty(STDOUT_FILENO);
    if (on_terminal)
        printf("\033[2J");
    for (bool first = true;; first = false) {
        char *picture = NULL;
        size_t len;
        struct err e = {0};
        FILE *to = open_memstream(&picture, &len);
        if (!to) {
            cli_error("cannot make a picture: %s", strerror(errno));
            return CLI_FAILED;
        }
        if (control_find(control, &e) == ST_OK)
            print_all(to, control);
        else
            fprintf(to, "%s\n", e.text);
        fclose(to);
        if (on_terminal)
            draw(picture);
        else
            printf("%s%s", first ? "" : "\n", picture);
        free(picture);
        if (fflush(stdout) != 0)
            return CLI_FAILED;
        rest();
    }
}

static int run_status(struct cli *cli, int argc, char **argv)
{
    struct status_options o = {0};
    struct err e = {0};
    if (cli_parse(cli, argc, argv, take, &o) < 0)
        return cli->status;
    if (o.watch && cli->json)
        return cli_usage_error(cli, "--watch is for people; ask again with --json instead");
    if (control_find(&o.control, &e) != ST_OK)
        return cli_failed(&e);
    if (o.watch)
        return watch(&o.control);
    return cli->json ? print_json(&o.control) : print_all(stdout, &o.control);
}

const struct cli_command status_command = {
    .name = "status",
    .args = "",
    .summary = "show what the running servers do",
    .details =
        "Asks the servers of this user on this host, or those that --control and --http name.\n"
        "Figures are of the last whole second. Listed are the volumes that a server owns or has\n"
        "open for a client; \"fdb-nbd list\" shows all. The same, with plots, is the page at the\n"
        "address of serve --http.",
    .options = options,
    .run = run_status,
};
