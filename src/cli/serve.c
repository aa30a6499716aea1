/*
 * fdb-nbd serve: checks what is asked for, makes the volumes that are to be made, and
 * runs the server.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/log.h"
#include "base/mem.h"
#include "base/memlimit.h"
#include "base/privilege.h"
#include "cli/audit.h"
#include "cli/run.h"
#include "server/access.h"
#include "server/control.h"
#include "server/doors.h"
#include "server/notify.h"
#include "server/page.h"
#include "server/reload.h"
#include "server/server.h"
#include "volume/recovery.h"

#define CREATES_MAX 1000u
#define CACHE_BYTES_DEFAULT (256ull << 20)
#define CACHE_BYTES_MAX (1ull << 50)
/* The lease is also how long a process that holds the store's writer lock and does nothing
 * is borne before it is killed. A healthy one may stand for most of a second in one
 * fdatasync of a busy disk; under that, servers would kill each other. */
#define LEASE_MS_MIN 1000u
#define LEASE_MS_MAX 600000u
/* (With heartbeats it is at least SESSION_LEASE_MS_MIN.) */
/* Longer than hosts need that hand a volume over: a migration is silent for a fraction of a second.
 * Not much longer, because programs stand still meanwhile that only look: qemu reads a
 * sector of each disk when it starts, and the destination of a migration does so while the
 * source is busy. */
#define OWNER_WAIT_MS_DEFAULT 3000u
#define VOLUMES_SHOWN_MAX 10u
#define SLOW_MS_DEFAULT 1000u
/* Shorter, and a commit on a busy disk or a change of the cluster's leader would be an error; nor
 * does any owner answer sooner. */
#define TIME_MS_MIN 100u
#define TIME_MS_MAX 86400000u

enum {
    LISTEN = 1,
    CREATE,
    DEFAULT,
    READ_ONLY,
    CACHE_SIZE,
    THREADS,
    LEASE_MS,
    OWNER_WAIT,
    SHARED,
    STORE_TIMEOUT,
    QUOTA,
    REPLACE,
    TLS,
    TLS_CERTIFICATES,
    TLS_VERIFY_PEER,
    TLS_PSK,
    ACCESS,
    HTTP,
    CONTROL,
    SLOW_MS,
    CREATE_STORE,
    CONNECTIONS_MAX,
    USER,
};

static const struct cli_option options[] = {
    {LISTEN, "listen", "ADDRESS",
     "HOST:PORT, [V6]:PORT, :PORT or unix:PATH; repeatable (default: localhost:10809)"},
    {CREATE, "create", "NAME:SIZE", "make this volume if there is none of that name; repeatable"},
    {CREATE_STORE, "create-store", NULL, "make the store if it is not there (default: refuse)"},
    {DEFAULT, "default", "NAME",
     "the volume of clients that name none (default: the only one, if it is)"},
    {READ_ONLY, "read-only", NULL, "let nobody write (default: clients may)"},
    {CACHE_SIZE, "cache-size", "SIZE",
     "memory for blocks, at least 32M for each thread (default: 256M)"},
    {ACCESS, "access", "FILE",
     "who may open what; SIGHUP reads it again (default: everybody everything)"},
    {USER, "user", "NAME[:GROUP]",
     "run as this user, who owns the store; only root can (default: who starts it)"},
    {REPLACE, "replace", NULL,
     "take over from servers of this store at the same addresses (default: refuse)"},
    {CONNECTIONS_MAX, "connections-max", "N",
     "connections at once, 1 to 100000; others are turned away (default: 1024)"},
    {THREADS, "threads", "N", "1 to 64; a volume is served by one of them (default: 1)"},
    {LEASE_MS, "lease-ms", "N",
     "silence after which others may take over, 1000 (fdb: 3000) to 600000 (default: 10000)"},
    {OWNER_WAIT, "owner-wait", "TIME",
     "how long a client waits for one elsewhere to fall idle; 0: not at all (default: 3)"},
    {SHARED, "shared", NULL,
     "let clients at several addresses write one volume (default: the first)"},
    {STORE_TIMEOUT, "store-timeout", "TIME",
     "30 (seconds) or 500ms; longer waits for the store are EIO; 0: never (default: 0)"},
    {QUOTA, "quota", "SIZE",
     "bytes the store may use; writes beyond get ENOSPC; not on lmdb (default: no limit)"},
    {TLS, "tls", "MODE",
     "off, on (clients may use TLS) or require (others are refused) (default: off)"},
    {TLS_CERTIFICATES, "tls-certificates", "DIR",
     "a folder with server-cert.pem, server-key.pem, ca-cert.pem (default: none)"},
    {TLS_VERIFY_PEER, "tls-verify-peer", NULL,
     "refuse clients without a certificate of the CA (default: take them)"},
    {TLS_PSK, "tls-psk", "FILE",
     "pre-shared keys, as psktool writes them: identity:key (default: none)"},
    {HTTP, "http", "ADDRESS",
     "metrics, health and JSON over HTTP there; as --listen; repeatable (default: off)"},
    {CONTROL, "control", "PATH",
     "control socket for commands on this machine, or off (default: see docs/http.md)"},
    {SLOW_MS, "slow-ms", "N",
     "log requests that take longer than N milliseconds; 0: none (default: 1000)"},
    {0, NULL, NULL, NULL},
};

struct serve_options {
    const char *listen[SERVER_LISTEN_MAX];
    size_t n_listen;
    struct volume_spec *creates;
    size_t n_creates, cap_creates;
    const char *default_export, *access_file;
    const char *user_name;
    struct privilege_user user; /* where there is a name */
    bool read_only, shared, replace, create_store;
    bool tls_given;
    enum nbd_tls_mode tls;
    struct tls_config tls_files;
    uint64_t cache_bytes, threads, lease_ms, owner_wait_ms, store_timeout_ms, quota_bytes;
    const char *http[SERVER_LISTEN_MAX];
    size_t n_http;
    const char *control;
    uint64_t slow_ms, connections_max;
};

static enum status take_create(struct serve_options *o, const char *value, struct err *e)
{
    struct volume_spec spec = {.codec = -1};
    const char *colon = strchr(value, ':');
    size_t len = colon ? (size_t)(colon - value) : 0;
    if (!colon || len > NAME_BYTES_MAX)
        return fail(e, ST_INVAL, "\"%.160s\" is not NAME:SIZE", value);
    memcpy(spec.name, value, len);
    if (cli_parse_size(colon + 1, &spec.size, e) != ST_OK || volume_spec_check(&spec, e) != ST_OK)
        return ST_INVAL;
    if (o->n_creates == CREATES_MAX)
        return fail(e, ST_INVAL, "at most %u times", CREATES_MAX);
    mem_grow(&o->creates, &o->cap_creates, o->n_creates + 1, sizeof *o->creates);
    o->creates[o->n_creates++] = spec;
    return ST_OK;
}

/* What can be seen to be wrong before anything is opened. */
static enum status check_address(const char *address, struct err *e)
{
    uint64_t port;
    struct err number = {0};
    if (strncmp(address, "unix:", 5) == 0)
        return address[5] ? ST_OK : fail(e, ST_INVAL, "\"unix:\" lacks a path");
    const char *colon = strrchr(address, ':');
    if (!colon || cli_parse_number(colon + 1, 0, 65535, &port, &number) != ST_OK)
        return fail(e, ST_INVAL, "\"%.200s\" is not HOST:PORT, [V6]:PORT, :PORT or unix:PATH",
                    address);
    return ST_OK;
}

/* Seconds, or milliseconds where it says so. */
static enum status parse_time(const char *text, uint64_t *ms, struct err *e)
{
    char number[32];
    size_t len = strlen(text);
    bool is_ms = len > 2 && strcmp(text + len - 2, "ms") == 0;
    bool is_s = !is_ms && len > 1 && text[len - 1] == 's';
    struct err ignored = {0};
    snprintf(number, sizeof number, "%.*s", (int)min_u64(len - (is_ms ? 2 : is_s), 31), text);
    if (cli_parse_number(number, 0, TIME_MS_MAX / (is_ms ? 1 : 1000), ms, &ignored) !=
            ST_OK ||
        (is_ms && *ms && *ms < TIME_MS_MIN))
        return fail(e, ST_INVAL,
                    "seconds, or milliseconds like 500ms, from %ums to %us, or 0, not %.64s",
                    TIME_MS_MIN, TIME_MS_MAX / 1000, text);
    if (!is_ms)
        *ms *= 1000;
    return ST_OK;
}

static enum status take_tls(struct serve_options *o, const char *value, struct err *e)
{
    static const char *const modes[] = {
        [NBD_TLS_OFF] = "off", [NBD_TLS_ON] = "on", [NBD_TLS_REQUIRE] = "require"};
    for (unsigned i = 0; i < sizeof modes / sizeof *modes; i++) {
        if (strcmp(value, modes[i]) == 0) {
            o->tls = (enum nbd_tls_mode)i;
            o->tls_given = true;
            return ST_OK;
        }
    }
    return fail(e, ST_INVAL, "off, on or require, not %.64s", value);
}

/* What does not go together. NULL: it does. */
static const char *check_tls(const struct serve_options *o)
{
    bool has_files = o->tls_files.certificates || o->tls_files.psk;
    if (o->tls != NBD_TLS_OFF && !has_files)
        return "--tls needs --tls-certificates or --tls-psk (or both)";
    if (o->tls_files.verify_peer && !o->tls_files.certificates)
        return "--tls-verify-peer needs --tls-certificates";
    if (!o->tls_given && has_files)
        return "say whether clients may or have to use TLS: --tls on or --tls require";
    return NULL;
}

/* What options mean on this machine, and together. */
static int check_options(const struct cli *cli, struct serve_options *o)
{
    struct err e = {0};
    const char *tls_fault = check_tls(o);
    bool on_lmdb = strncmp(cli->store_uri, "lmdb:", 5) == 0;
    if (tls_fault)
        return cli_usage_error(cli, "%s", tls_fault);
    if (o->cache_bytes / o->threads < VOLUME_CACHE_BYTES_MIN)
        return cli_usage_error(cli, "%llu threads need --cache-size of at least %lluM",
                               (unsigned long long)o->threads,
                               (unsigned long long)(o->threads * (VOLUME_CACHE_BYTES_MIN >> 20)));
    if (o->quota_bytes && on_lmdb)
        return cli_usage_error(cli,
                               "--quota: an lmdb store has none, its file system limits it");
    if (o->user_name && privilege_find(o->user_name, &o->user, &e) != ST_OK)
        return cli_usage_error(cli, "--user: %s", e.text);
    /* (All others have heartbeats.) */
    if (!on_lmdb && o->lease_ms < SESSION_LEASE_MS_MIN)
        return cli_usage_error(cli,
                               "--lease-ms has to be at least %u for %s: with less, any short pause "
                               "of it would let others take volumes of servers that live",
                               SESSION_LEASE_MS_MIN, cli->store_uri);
    return CLI_DONE;
}

static enum status take(void *arg, int code, const char *value, struct err *e)
{
    struct serve_options *o = arg;
    switch (code) {
    case LISTEN:
        if (o->n_listen == SERVER_LISTEN_MAX)
            return fail(e, ST_INVAL, "at most %u times", SERVER_LISTEN_MAX);
        o->listen[o->n_listen++] = value;
        return check_address(value, e);
    case CREATE:
        return take_create(o, value, e);
    case DEFAULT:
        if (!name_valid(value))
            return fail(e, ST_INVAL, "\"%.140s\" is not a volume name", value);
        o->default_export = value;
        return ST_OK;
    case READ_ONLY:
        o->read_only = true;
        return ST_OK;
    case CACHE_SIZE:
        if (cli_parse_size(value, &o->cache_bytes, e) != ST_OK)
            return ST_INVAL;
        if (o->cache_bytes < VOLUME_CACHE_BYTES_MIN || o->cache_bytes > CACHE_BYTES_MAX)
            return fail(e, ST_INVAL, "from 32M to 1024T, not %.64s", value);
        return ST_OK;
    case THREADS:
        return cli_parse_number(value, 1, SERVER_THREADS_MAX, &o->threads, e);
    case LEASE_MS:
        return cli_parse_number(value, LEASE_MS_MIN, LEASE_MS_MAX, &o->lease_ms, e);
    case STORE_TIMEOUT:
        return parse_time(value, &o->store_timeout_ms, e);
    case OWNER_WAIT:
        return parse_time(value, &o->owner_wait_ms, e);
    case QUOTA:
        return cli_parse_size(value, &o->quota_bytes, e);
    case ACCESS:
        o->access_file = value;
        return ST_OK;
    case REPLACE:
        o->replace = true;
        return ST_OK;
    case TLS:
        return take_tls(o, value, e);
    case TLS_CERTIFICATES:
        o->tls_files.certificates = value;
        return ST_OK;
    case TLS_VERIFY_PEER:
        o->tls_files.verify_peer = true;
        return ST_OK;
    case TLS_PSK:
        o->tls_files.psk = value;
        return ST_OK;
    case HTTP:
        if (o->n_http == SERVER_LISTEN_MAX)
            return fail(e, ST_INVAL, "at most %u times", SERVER_LISTEN_MAX);
        o->http[o->n_http++] = value;
        return check_address(value, e);
    case CONTROL:
        o->control = value;
        return *value ? ST_OK : fail(e, ST_INVAL, "a path, or off");
    case SLOW_MS:
        return cli_parse_number(value, 0, TIME_MS_MAX, &o->slow_ms, e);
    case CREATE_STORE:
        o->create_store = true;
        return ST_OK;
    case CONNECTIONS_MAX:
        return cli_parse_number(value, 1, SERVER_CONNECTIONS_MAX, &o->connections_max, e);
    case USER:
        o->user_name = value;
        return ST_OK;
    default:
        o->shared = true;
        return ST_OK;
    }
}

static int create_volumes(struct run *run, const struct serve_options *o)
{
    for (size_t i = 0; i < o->n_creates; i++) {
        const struct volume_spec *spec = &o->creates[i];
        char size[24];
        catalog_create(run_op(run), run->store, run->env, spec);
        enum status st = run_wait(run);
        if (st == ST_EXISTS)
            printf("volume \"%s\" is there already: not made, and left as it is\n", spec->name);
        else if (st == ST_OK)
            audit_changed(run->cli, "created volume \"%s\" of %s", spec->name,
                          cli_size(spec->size, size));
        else
            return cli_failed(&run->op.err);
    }
    fflush(stdout);
    return CLI_DONE;
}

struct recovering {
    struct recovery recovery;
    bool done;
};

static void recovered(struct recovery *r)
{
    container_of(r, struct recovering, recovery)->done = true;
}

/* Commits what servers that died left in their logs. What fails here is tried again when
 * the volume is used. */
static void recover(struct run *run)
{
    struct run_owned owned;
    struct recovering r = {.recovery = {.done = recovered}};
    if (run_own(run, NULL, &owned) != ST_OK) {
        log_warning("no clean-up after servers that died: %s", run->op.err.text);
        return;
    }
    recover_dead_sessions(&r.recovery, owned.shard);
    run_until(run, &r.done);
    run_disown(run, &owned);
    if (r.recovery.st != ST_OK)
        log_warning("no clean-up after servers that died: %s", r.recovery.err.text);
    else if (r.recovery.sessions > 0)
        log_info("cleaned up after %u servers that died: %u volumes taken over",
                 r.recovery.sessions, r.recovery.volumes);
}

/* --- what to type next --------------------------------------------------------------- */

/* Splits "HOST:PORT" or "[V6]:PORT"; an address that means all of this machine's is named
 * as people call this machine. */
static void split_address(const char *address, char host[128], const char **port)
{
    const char *colon = strrchr(address, ':');
    size_t len = colon ? (size_t)(colon - address) : strlen(address);
    *port = colon ? colon + 1 : "10809";
    if (len >= 2 && address[0] == '[' && address[len - 1] == ']') {
        address++;
        len -= 2;
    }
    snprintf(host, 128, "%.*s", len < 127 ? (int)len : 127, address);
    static const char *const local[] = {"0.0.0.0", "::", "127.0.0.1", "::1", ""};
    for (size_t i = 0; i < sizeof local / sizeof *local; i++)
        if (strcmp(host, local[i]) == 0)
            snprintf(host, 128, "localhost");
}

static void print_examples(const struct serve_options *o, const char *address, const char *name)
{
    /* Only where nothing works without TLS; IDENTITY, FILE and DIR are the client's. */
    bool tls = o->tls == NBD_TLS_REQUIRE;
    const char *user = o->tls_files.psk ? "IDENTITY@" : "";
    const char *query = o->tls_files.psk ? "tls-psk-file=FILE" : "tls-certificates=DIR";
    puts("\nIn another terminal, for example:");
    if (strncmp(address, "unix:", 5) == 0) {
        const char *path = address + 5;
        if (tls) {
            printf("  nbdinfo 'nbds+unix://%s/%s?socket=%s&%s'\n", user, name, path, query);
            return;
        }
        printf("  sudo nbd-client -unix %s -N %s /dev/nbd0\n", path, name);
        printf("  nbdinfo 'nbd+unix:///%s?socket=%s'\n", name, path);
        printf("  qemu-img info 'nbd+unix:///%s?socket=%s'\n", name, path);
    } else {
        char host[128];
        const char *port;
        split_address(address, host, &port);
        bool bare_v6 = strchr(host, ':');
        const char *l = bare_v6 ? "[" : "", *r = bare_v6 ? "]" : "";
        if (tls) {
            printf("  nbdinfo 'nbds://%s%s%s%s:%s/%s?%s'\n", user, l, host, r, port, name, query);
            return;
        }
        printf("  sudo nbd-client -N %s %s %s /dev/nbd0\n", name, host, port);
        printf("  nbdinfo nbd://%s%s%s:%s/%s\n", l, host, r, port, name);
        printf("  qemu-img info nbd://%s%s%s:%s/%s\n", l, host, r, port, name);
    }
}

struct ready {
    struct run *run;
    const struct serve_options *options;
};

static void print_ready(void *arg, const char *const *addresses, size_t n)
{
    const struct ready *ready = arg;
    struct run *run = ready->run;
    const struct catalog_entry *entries = run->op.entries;
    size_t n_volumes = run->op.n_entries;
    char size[24];
    /* Whoever reads the log as a program's has no terminal to try the examples in. */
    if (log_format() != LOG_FORMAT_TEXT) {
        log_info("fdb-nbd " FDB_NBD_VERSION " serves %s, volumes: %zu", run->cli->store_uri,
                 n_volumes);
        catalog_op_free(&run->op);
        return;
    }
    printf("fdb-nbd " FDB_NBD_VERSION " serves %s on", run->cli->store_uri);
    for (size_t i = 0; i < n; i++)
        printf(" %s", addresses[i]);
    puts("");
    for (size_t i = 0; i < n_volumes && i < VOLUMES_SHOWN_MAX; i++)
        printf("  %s  %s\n", entries[i].name, cli_size(entries[i].header.size, size));
    if (n_volumes > VOLUMES_SHOWN_MAX)
        printf("  and %zu more: fdb-nbd list\n", n_volumes - VOLUMES_SHOWN_MAX);
    if (n_volumes == 0)
        puts("  no volumes yet; make one: fdb-nbd create NAME SIZE");
    else if (n > 0)
        print_examples(ready->options, addresses[0], entries[0].name);
    puts("Ctrl-C ends it cleanly.");
    fflush(stdout);
    /* Nobody asks again, and the list may be long. */
    catalog_op_free(&run->op);
}

static bool makes_default(const struct serve_options *o)
{
    for (size_t i = 0; i < o->n_creates; i++)
        if (strcmp(o->creates[i].name, o->default_export) == 0)
            return true;
    return false;
}

/* The volumes that are asked for, of a store that is open. */
static int prepare_volumes(struct run *run, const struct serve_options *o)
{
    struct catalog_entry entry;
    int status = CLI_DONE;
    if (o->default_export && !makes_default(o))
        status = run_find_either(run, o->default_export, &entry);
    if (status == CLI_DONE)
        status = create_volumes(run, o);
    if (status != CLI_DONE)
        return status;
    if (!o->read_only)
        recover(run);
    /* Kept in run->op for print_ready(). */
    catalog_list(run_op(run), run->store, run->env);
    return run_wait(run) == ST_OK ? CLI_DONE : cli_failed(&run->op.err);
}

/* An address that is taken, or files that make no sense, say nothing about the store. */
static int failed_before_store(const struct err *e)
{
    int status = cli_failed(e);
    return e->st == ST_UNAVAIL ? CLI_FAILED : status;
}

static int serve(struct run *run, const struct serve_options *o, struct server_config *config)
{
    int status = prepare_volumes(run, o);
    if (status != CLI_DONE)
        return status;
    struct ready ready = {run, o};
    struct err e = {0};
    config->store = run->store;
    config->ready = print_ready;
    config->arg = &ready;
    enum status st = server_run(config, &e);
    run->store = NULL;
    config->credentials = NULL;
    return st == ST_OK ? CLI_DONE : failed_before_store(&e);
}

/* All that can be seen to be wrong without the store, before that is made: files are read with the
 * rights with which SIGHUP reads them again, and ports opened with those from before. */
static enum status prepare(const struct serve_options *o, struct server_config *config,
                           struct err *e)
{
    reload_keep_early();
    uid_t owner = o->user_name && o->user.uid != geteuid() ? o->user.uid : (uid_t)-1;
    enum status st = server_reserve_descriptors(config, e);
    if (st == ST_OK)
        st = doors_open(config->doors, config, owner, e);
    if (st == ST_OK && o->user_name) {
        control_make_directory_for(o->user.uid, o->user.gid);
        st = privilege_become(&o->user, e);
    }
    if (st == ST_OK)
        st = privilege_keep_none(e);
    if (st == ST_OK && o->access_file)
        st = access_load(&config->access, o->access_file, e);
    if (st == ST_OK && o->tls != NBD_TLS_OFF)
        st = tls_credentials_load(&o->tls_files, &config->credentials, e);
    return st == ST_OK ? doors_claim(config->doors, e) : st;
}

static int open_and_serve(struct cli *cli, const struct serve_options *o,
                          struct server_config *config)
{
    struct run run;
    /* One that is there is asked for, and none is made beside. */
    bool creates = (o->n_creates || o->create_store) && !(o->default_export && !makes_default(o));
    cli->lease_ms = (uint32_t)o->lease_ms;
    cli->store_timeout_ms = (uint32_t)o->store_timeout_ms;
    cli->quota_bytes = o->quota_bytes;
    cli->own_cache = o->cache_bytes >= memory_limit_bytes() / 2;
    cli->wait_for_store = true;
    notify_status("opening %s", cli->store_uri);
    int status = run_begin(&run, cli, creates ? RUN_CREATE : o->read_only ? RUN_READ : RUN_WRITE);
    if (status == CLI_DONE)
        status = serve(&run, o, config);
    run_end(&run);
    return status;
}

static int run_serve(struct cli *cli, int argc, char **argv)
{
    struct err e = {0};
    struct serve_options o = {.cache_bytes = CACHE_BYTES_DEFAULT,
                              .threads = 1,
                              .lease_ms = CLI_LEASE_MS,
                              .owner_wait_ms = OWNER_WAIT_MS_DEFAULT,
                              .slow_ms = SLOW_MS_DEFAULT};
    if (cli_parse(cli, argc, argv, take, &o) < 0) {
        free(o.creates);
        return cli->status;
    }
    struct doors doors = {0};
    struct server_config config = {.doors = &doors,
                                   .listen = o.listen,
                                   .n_listen = o.n_listen,
                                   .default_export = o.default_export,
                                   .read_only = o.read_only,
                                   .access_file = o.access_file,
                                   .replace = o.replace,
                                   .shared = o.shared,
                                   .tls = o.tls,
                                   .tls_files = o.tls_files,
                                   .cache_bytes = o.cache_bytes,
                                   .threads = (unsigned)o.threads,
                                   .lease_ms = (unsigned)o.lease_ms,
                                   .store_timeout_ms = (unsigned)o.store_timeout_ms,
                                   .owner_wait_ms = (unsigned)o.owner_wait_ms,
                                   .connections_max = (unsigned)o.connections_max,
                                   .slow_ms = (unsigned)o.slow_ms,
                                   .store_uri = cli->store_uri,
                                   .http = o.http,
                                   .n_http = o.n_http,
                                   .control = o.control,
                                   .user_given = o.user_name,
                                   .files = page_files,
                                   .n_files = page_n_files};
    int status = check_options(cli, &o);
    if (status == CLI_DONE)
        status = prepare(&o, &config, &e) == ST_OK ? open_and_serve(cli, &o, &config)
                                                   : failed_before_store(&e);
    doors_close(&doors);
    tls_credentials_unref(config.credentials);
    access_release(config.access);
    free(o.creates);
    return status;
}

const struct cli_command serve_command = {
    .name = "serve",
    .args = "",
    .summary = "serve all volumes to NBD clients",
    .details =
        "All volumes of the store are served, also those made later. With --config FILE each\n"
        "option may stand in the file as \"name = value\" (flags: yes or no; # begins a comment\n"
        "line); what the command line says comes before what the file says. The store is made\n"
        "if it is not there and --create or --create-store is given. SIGTERM and SIGINT end it cleanly.\n\n"
        "Sockets that a service manager hands over (LISTEN_FDS; a systemd .socket unit) are served\n"
        "instead of the default address, and --listen adds others. With --replace servers of the\n"
        "same store that listen at these addresses are told to end, once this one has taken their\n"
        "place; clients that reconnect go on here.\n\n"
        "With --tls clients prove who they are by certificates or pre-shared keys; the files are those\n"
        "of nbdkit, qemu and libnbd. SIGHUP has them read again, for sessions that begin later.\n\n"
        "A store that can't be reached is waited for, at the start and later: requests wait, and\n"
        "nothing answered is lost. With --store-timeout a request that has waited so long is\n"
        "answered with an I/O error instead. What was written stays, in order, and reaches the\n"
        "store when that works again; a flush succeeds only when all data before it is in.",
    .options = options,
    .repeatable = (const int[]){LISTEN, CREATE, HTTP, 0},
    .run = run_serve,
};
