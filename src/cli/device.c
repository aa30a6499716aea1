/*
 * fdb-nbd device: attaches volumes, or exports of any NBD server, to the kernel's nbd devices.
 *
 * The work is done in src/device/: attach leaves a small process behind that keeps the device
 * connected (device/keeper.h). Nothing here has to do with a store.
 */
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <systemd/sd-daemon.h>
#include <unistd.h>

#include "base/date.h"
#include "base/log.h"
#include "base/mem.h"
#include "cli/cli.h"
#include "cli/describe.h"
#include "device/background.h"
#include "device/detach.h"
#include "device/keeper.h"

/* A week: a server that is away for longer than that is not coming back by itself. */
#define DEAD_CONN_TIMEOUT_S (7u * 86400)
#define RESEND_MS 2000u
#define REQUEST_TIMEOUT_S 30u
#define SIZE_POLL_MS 5000u

enum {
    READ_ONLY = 1,
    CONNECTIONS,
    DEAD_CONN_TIMEOUT,
    RESEND,
    REQUEST_TIMEOUT,
    SIZE_POLL,
    FOREGROUND,
    FORCE
};

static const struct cli_option options[] = {
    {READ_ONLY, "read-only", NULL, "attach: a device that can't be written to"},
    {CONNECTIONS, "connections", "N", "attach: so many to the server, up to 16 (default: 1)"},
    {DEAD_CONN_TIMEOUT, "dead-conn-timeout", "S",
     "attach: seconds for which requests wait for a server to come back (default: a week)"},
    {RESEND, "resend-ms", "MS",
     "attach: when what was not answered is sent again, after a new connection (default: 2000)"},
    {REQUEST_TIMEOUT, "request-timeout", "S",
     "attach: the same with several connections; one that is silent for so long ends (default: "
     "30)"},
    {SIZE_POLL, "size-poll-ms", "MS",
     "attach: how often to see whether the volume has grown (default: 5000)"},
    {FOREGROUND, "foreground", NULL, "attach: stay, instead of leaving a process behind"},
    {FORCE, "force", NULL, "detach: also one that is in use; what was not written is lost"},
    {0, NULL, NULL, NULL},
};

struct device_options {
    struct keeper_options keeper;
    bool foreground, force;
    bool for_attach;              /* one of attach's options was given */
    bool resend, request_timeout; /* these were */
};

static enum status take(void *arg, int code, const char *value, struct err *e)
{
    struct device_options *o = arg;
    struct keeper_options *k = &o->keeper;
    uint64_t v = 0;
    enum status st = ST_OK;
    o->for_attach |= code != FORCE;
    switch (code) {
    case READ_ONLY:
        k->read_only = true;
        break;
    case CONNECTIONS:
        st = cli_parse_number(value, 1, KEEPER_CONNECTIONS_MAX, &v, e);
        k->connections = (uint32_t)v;
        break;
    case DEAD_CONN_TIMEOUT:
        st = cli_parse_number(value, 1, KEEPER_DEAD_CONN_TIMEOUT_MAX_S, &k->dead_conn_timeout_s, e);
        break;
    case RESEND:
        st = cli_parse_number(value, 100, 3600000, &v, e);
        k->resend_ms = (uint32_t)v;
        o->resend = true;
        break;
    case REQUEST_TIMEOUT:
        st = cli_parse_number(value, 1, 86400, &v, e);
        k->request_timeout_s = (uint32_t)v;
        o->request_timeout = true;
        break;
    case SIZE_POLL:
        st = cli_parse_number(value, 100, 86400000, &v, e);
        k->size_poll_ms = (uint32_t)v;
        break;
    case FOREGROUND:
        o->foreground = true;
        break;
    default:
        o->force = true;
    }
    return st;
}

static int needs_root(void)
{
    if (geteuid() == 0)
        return CLI_DONE;
    cli_error("only root can attach and detach devices: try sudo fdb-nbd device ...");
    return CLI_FAILED;
}

/* --- attach -------------------------------------------------------------------------------- */

/* The process that stays lives in no folder. */
static enum status make_absolute(struct nbd_uri *uri, struct err *e)
{
    char path[sizeof uri->socket + 4096];
    if (!uri->is_unix || uri->socket[0] == '/')
        return ST_OK;
    if (!getcwd(path, 4096))
        return fail(e, ST_IO, "cannot find out which folder this is: %s", strerror(errno));
    size_t len = strlen(path);
    snprintf(path + len, sizeof path - len, "/%s", uri->socket);
    if (strlen(path) >= sizeof uri->socket)
        return fail(e, ST_INVAL, "the socket's path, %.200s, is longer than %zu bytes", path,
                    sizeof uri->socket - 1);
    strcpy(uri->socket, path);
    return ST_OK;
}

static int announce(int index)
{
    printf("/dev/nbd%d\n", index);
    return CLI_DONE;
}

static int attach_in_foreground(const struct device_options *o)
{
    struct keeper k;
    struct err e = {0};
    keeper_catch_signals();
    enum status st = keeper_attach(&k, &o->keeper, &e);
    if (st == ST_OK) {
        announce(k.index);
        fflush(stdout);
        sd_notifyf(0, "READY=1\nSTATUS=/dev/nbd%d is %s", k.index, k.backend);
        keeper_run(&k);
    }
    keeper_end(&k);
    return st == ST_OK ? CLI_DONE : cli_failed(&e);
}

static int attach_in_background(const struct device_options *o)
{
    struct background b;
    struct background_report report = {.index = -1};
    struct err e = {0};
    if (background_begin(&b, &e) != ST_OK ||
        (!b.stays && background_wait(&b, &report, &e) != ST_OK))
        return cli_failed(&e);
    if (!b.stays)
        return announce(report.index);
    struct keeper k;
    keeper_catch_signals();
    report.err.st = keeper_attach(&k, &o->keeper, &report.err);
    report.index = k.index;
    background_report(&b, &report);
    if (report.err.st == ST_OK)
        keeper_run(&k);
    keeper_end(&k);
    return CLI_DONE;
}

static int attach(struct cli *cli, struct device_options *o, char **words, int n)
{
    struct err e = {0};
    struct keeper_options *k = &o->keeper;
    if (strncasecmp(words[0], "nbds", 4) == 0) {
        cli_error(
            "\"%.200s\" asks for TLS, and Linux's nbd devices send everything as it is: let a "
            "program on this machine speak TLS, as nbdkit's plugin nbd or qemu-nbd, and "
            "attach the socket of that one",
            words[0]);
        return CLI_USAGE;
    }
    if (nbd_uri_parse(words[0], &k->uri, &e) != ST_OK || make_absolute(&k->uri, &e) != ST_OK ||
        (n > 1 && sysfs_parse(words[1], &k->index, &e) != ST_OK))
        return cli_usage_error(cli, "%s", e.text);
    if (k->connections > 1 && o->resend)
        return cli_usage_error(cli, "--resend-ms is for one connection: with several it is "
                                    "--request-timeout");
    if (k->connections == 1 && o->request_timeout)
        return cli_usage_error(cli, "--request-timeout is for several connections: with one it is "
                                    "--resend-ms");
    if (o->force)
        return cli_usage_error(cli, "--force is for device detach only");
    int status = needs_root();
    if (status != CLI_DONE)
        return status;
    if (!cli->log_level && !getenv("FDB_NBD_LOG"))
        log_set_level(LOG_LEVEL_INFO);
    return o->foreground ? attach_in_foreground(o) : attach_in_background(o);
}

/* --- detach -------------------------------------------------------------------------------- */

static int detach(struct cli *cli, struct device_options *o, char **words, int n)
{
    (void)n;
    int index;
    bool lingers = false;
    struct err e = {0};
    if (sysfs_parse(words[0], &index, &e) != ST_OK)
        return cli_usage_error(cli, "%s", e.text);
    int status = needs_root();
    if (status != CLI_DONE)
        return status;
    if (device_detach(index, o->force, &lingers, &e) != ST_OK)
        return cli_failed(&e);
    printf("/dev/nbd%d is detached%s\n", index,
           lingers ? "; it can be attached again when those who have it open have closed it" : "");
    return CLI_DONE;
}

/* --- list ---------------------------------------------------------------------------------- */

enum device_state {
    DEVICE_CONNECTED,
    DEVICE_RECONNECTING,
    DEVICE_UNKEPT,
    DEVICE_FOREIGN,
};

static const char *const state_names[] = {
    [DEVICE_CONNECTED] = "connected",
    [DEVICE_RECONNECTING] = "reconnecting",
    [DEVICE_UNKEPT] = "unkept",
    [DEVICE_FOREIGN] = "foreign",
};

struct shown {
    struct sysfs_device d;
    struct record record;
    uint32_t keeper;
    enum device_state state;
    const char *uri;
};

struct listing {
    struct shown *all;
    size_t n, n_free;
};

static void show(struct shown *s, const struct sysfs_device *d)
{
    *s = (struct shown){.d = *d, .keeper = record_keeper(d->index)};
    bool known = record_read(d->index, &s->record);
    s->uri = d->backend[0] ? s->d.backend : s->record.uri;
    if (s->keeper)
        s->state = known && s->record.dead ? DEVICE_RECONNECTING : DEVICE_CONNECTED;
    else
        s->state = strncmp(s->uri, "nbd", 3) == 0 ? DEVICE_UNKEPT : DEVICE_FOREIGN;
}

static void cell(void *arg, size_t row, size_t column, char out[DESCRIBE_CELL_BYTES])
{
    const struct listing *l = arg;
    const struct shown *s = &l->all[row];
    char text[24];
    switch (column) {
    case 0:
        snprintf(out, DESCRIBE_CELL_BYTES, "/dev/nbd%d", s->d.index);
        break;
    case 1:
        snprintf(out, DESCRIBE_CELL_BYTES, "%s", cli_size(s->d.size, text));
        break;
    case 2:
        snprintf(out, DESCRIBE_CELL_BYTES, "%s", s->d.read_only ? "ro" : "rw");
        break;
    case 3:
        snprintf(out, DESCRIBE_CELL_BYTES, "%s", state_names[s->state]);
        break;
    case 4:
        snprintf(out, DESCRIBE_CELL_BYTES, s->keeper ? "%u" : "-", s->keeper);
        break;
    default:
        snprintf(out, DESCRIBE_CELL_BYTES, "%.380s", s->uri[0] ? s->uri : "-");
    }
}

static json_t *text_or_null(const char *text)
{
    return text[0] ? json_string(text) : json_null();
}

static void print_json(const struct listing *l)
{
    json_t *devices = json_array();
    for (size_t i = 0; i < l->n; i++) {
        const struct shown *s = &l->all[i];
        const struct record *r = &s->record;
        char since[DATE_BYTES], device[24];
        snprintf(device, sizeof device, "/dev/nbd%d", s->d.index);
        json_array_append_new(
            devices,
            json_pack("{s:s, s:o, s:I, s:i, s:b, s:s, s:o, s:o, s:o, s:o, s:o}", "device", device,
                      "uri", text_or_null(s->uri), "size_bytes", (json_int_t)s->d.size,
                      "block_size_bytes", (int)s->d.block_size, "read_only", (int)s->d.read_only,
                      "state", state_names[s->state], "pid",
                      s->keeper ? json_integer((json_int_t)s->keeper) : json_null(), "connections",
                      s->keeper ? json_integer((json_int_t)r->connections) : json_null(),
                      "dead_connections",
                      s->keeper ? json_integer((json_int_t)r->dead) : json_null(), "since",
                      s->keeper ? json_string(date_format(r->since_ns, since)) : json_null(),
                      "error", text_or_null(s->keeper ? r->error : "")));
    }
    describe_print(json_pack("{s:o, s:I}", "devices", devices, "free", (json_int_t)l->n_free));
}

static void print_table(struct listing *l)
{
    static const char *const titles[] = {"DEVICE", "SIZE", "MODE", "STATE", "PID", "URI"};
    describe_table(titles, sizeof titles / sizeof *titles, l->n, cell, l);
    /* On stderr: a script that reads the table gets the table only. */
    fflush(stdout);
    for (size_t i = 0; i < l->n; i++) {
        const struct shown *s = &l->all[i];
        if (s->keeper && s->record.error[0])
            fprintf(stderr, "/dev/nbd%d: %s\n", s->d.index, s->record.error);
        else if (s->state == DEVICE_UNKEPT)
            fprintf(stderr, "/dev/nbd%d: nobody replaces its connections; attach it again to %s\n",
                    s->d.index, s->uri);
    }
    fprintf(stderr, "%zu device%s attached, %zu free\n", l->n, l->n == 1 ? "" : "s", l->n_free);
}

static int list(struct cli *cli, struct device_options *o, char **words, int n_words)
{
    (void)words;
    (void)n_words;
    if (o->force)
        return cli_usage_error(cli, "--force is for device detach only");
    size_t n;
    struct sysfs_device *all = sysfs_list(&n);
    if (n == 0) {
        cli_error("the kernel has no nbd devices: load its module, as root, with \"modprobe nbd\"");
        free(all);
        return CLI_FAILED;
    }
    struct listing l = {.all = mem_zalloc(n * sizeof *l.all)};
    for (size_t i = 0; i < n; i++) {
        if (all[i].attached)
            show(&l.all[l.n++], &all[i]);
        else
            l.n_free++;
    }
    if (cli->json)
        print_json(&l);
    else
        print_table(&l);
    free(l.all);
    free(all);
    return CLI_DONE;
}

/* ------------------------------------------------------------------------------------------- */

static const struct {
    const char *name, *usage;
    int args_min, args_max;
    int (*run)(struct cli *cli, struct device_options *o, char **words, int n);
} parts[] = {
    {"attach", "NBD-URI [/dev/nbdN]", 1, 2, attach},
    {"detach", "/dev/nbdN", 1, 1, detach},
    {"list", "", 0, 0, list},
};

static int run(struct cli *cli, int argc, char **argv)
{
    struct device_options o = {.keeper = {.index = -1,
                                          .connections = 1,
                                          .dead_conn_timeout_s = DEAD_CONN_TIMEOUT_S,
                                          .resend_ms = RESEND_MS,
                                          .request_timeout_s = REQUEST_TIMEOUT_S,
                                          .size_poll_ms = SIZE_POLL_MS}};
    int first = cli_parse(cli, argc, argv, take, &o);
    if (first < 0)
        return cli->status;
    int n = argc - first - 1;
    size_t part = 0, n_parts = sizeof parts / sizeof *parts;
    while (part < n_parts && strcmp(parts[part].name, argv[first]) != 0)
        part++;
    if (part == n_parts)
        return cli_usage_error(cli, "device attach, detach or list, not \"%.64s\"", argv[first]);
    if (n < parts[part].args_min || n > parts[part].args_max)
        return cli_usage_error(cli, "too %s arguments, usage: fdb-nbd device %s%s%s",
                               n < parts[part].args_min ? "few" : "many", parts[part].name,
                               parts[part].usage[0] ? " " : "", parts[part].usage);
    if (o.for_attach && parts[part].run != attach)
        return cli_usage_error(cli, "device %s has no such options but --force for detach",
                               parts[part].name);
    return parts[part].run(cli, &o, argv + first + 1, n);
}

const struct cli_command device_command = {
    .name = "device",
    .args = "attach|detach|list ...",
    .summary = "Linux block devices (/dev/nbdN) that survive restarts of their server",
    .details =
        "  device attach NBD-URI [/dev/nbdN]\n"
        "  device detach /dev/nbdN [--force]\n"
        "  device list\n"
        "\n"
        "attach: makes a device of an export of any NBD server, and prints its name. The URI is\n"
        "nbd://HOST[:PORT][/EXPORT] or nbd+unix:///[EXPORT]?socket=PATH. A process stays behind\n"
        "that connects the device again whenever its connection ends, for ever; requests wait\n"
        "meanwhile. It also lets the device grow with its volume; a device never shrinks. If that\n"
        "process is ended, the device stays; the same attach goes on with it.\n"
        "\n"
        "detach: refuses a device that is mounted, or in use in another way, and says by whom.\n"
        "\n"
        "list: connected; reconnecting; unkept: without such a process; foreign: attached by\n"
        "another program.",
    .options = options,
    .args_min = 1,
    .args_max = 3,
    .run = run,
};
