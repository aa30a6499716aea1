/*
 * What a program finds in the library beside transactions and futures: version, network
 * set-up, databases, error texts. And the one state of it all.
 */
#include "inside.h"

#include <ctype.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#define DB_MAGIC 0x64622121u

struct double_state g = {
    .lock = PTHREAD_MUTEX_INITIALIZER,
    .ready = PTHREAD_COND_INITIALIZER,
    .watches = LIST_INIT(g.watches),
    .commits = LIST_INIT(g.commits),
};

void lock(void)
{
    pthread_mutex_lock(&g.lock);
}

void unlock(void)
{
    if (g.instant)
        events_instant();
    pthread_mutex_unlock(&g.lock);
}

bool on_network_thread(void)
{
    if (g.manual)
        return g.manual_running;
    return g.network_running && pthread_equal(pthread_self(), g.network_thread);
}

void violation(const char *format, ...)
{
    va_list args;
    va_start(args, format);
    vsnprintf(g.violation, sizeof g.violation, format, args);
    va_end(args);
    g.counts.violations++;
}

int api_version(void)
{
    return g.api_selected;
}

/* --- versions and errors --------------------------------------------------------------- */

static uint64_t protocol_of(int64_t api)
{
    /* 630, 710 and so on are releases 6.3 and 7.1; the protocol number has them in it. */
    uint64_t release = (uint64_t)(api / 100) << 4 | (uint64_t)(api / 10 % 10);
    return 0x0fdb00b000000000u | release << 24 | (api < 700 ? 0x010001u : 0);
}

EXPORT int fdb_get_max_api_version(void)
{
    return (int)g.config.api;
}

EXPORT const char *fdb_get_client_version(void)
{
    static char text[96];
    lock();
    snprintf(text, sizeof text, "%d.%d.0,0000000000000000000000000000000000000000,%llx",
             (int)(g.config.api / 100), (int)(g.config.api / 10 % 10),
             (unsigned long long)protocol_of(g.config.api));
    unlock();
    return text;
}

EXPORT fdb_error_t fdb_select_api_version_impl(int runtime_version, int header_version)
{
    lock();
    fdb_error_t error = g.api_selected                                          ? E_API_TWICE
                        : runtime_version > header_version                      ? E_API_INVALID
                        : header_version > g.config.api || runtime_version < 13 ? E_API_UNSUPPORTED
                                                                                : 0;
    if (!error)
        g.api_selected = runtime_version;
    unlock();
    return error;
}

EXPORT const char *fdb_get_error(fdb_error_t code)
{
    static const struct {
        fdb_error_t code;
        const char *text;
    } texts[] = {
        {0, "Success"},
        {E_TOO_OLD, "Transaction is too old to perform reads or be committed"},
        {E_FUTURE, "Request for future version"},
        {E_CONFLICT, "Transaction not committed due to conflict with another transaction"},
        {E_UNKNOWN, "Transaction may or may not have committed"},
        {E_TXN_CANCELLED, "Operation aborted because the transaction was cancelled"},
        {E_TIMED_OUT, "Operation aborted because the transaction timed out"},
        {E_MANY_WATCHES, "Too many watches currently set"},
        {E_BEHIND, "Storage process does not have recent mutations"},
        {E_CHANGED, "The protocol version of the cluster has changed"},
        {E_CANCELLED, "Asynchronous operation cancelled"},
        {E_RELEASED, "Future has been released"},
        {E_NO_CLUSTER_FILE, "No cluster file found in current directory or default location"},
        {E_INVALID, "Invalid API call"},
        {E_OUTSIDE, "Key outside legal range"},
        {E_INVERTED, "Range begin key larger than end key"},
        {E_OPTION_VALUE, "Option set with an invalid value"},
        {E_OPTION, "Option not valid in this context"},
        {E_NO_NETWORK, "Action not possible before the network is configured"},
        {E_NETWORK_TWICE, "Network can be configured only once"},
        {E_NOT_SET, "Future not ready"},
        {E_DURING_COMMIT, "Operation issued while a commit was outstanding"},
        {E_RESTARTED, "Network can only be started once"},
        {E_BLOCKED, "Detected a deadlock in a callback called from the network thread"},
        {E_TOO_LARGE, "Transaction exceeds byte limit"},
        {E_KEY_LARGE, "Key length exceeds limit"},
        {E_VALUE_LARGE, "Value length exceeds limit"},
        {E_CONNECTION_STRING, "Connection string invalid"},
        {E_API_UNSET, "API version is not set"},
        {E_API_TWICE, "API version may be set only once"},
        {E_API_INVALID, "API version not valid"},
        {E_API_UNSUPPORTED, "API version not supported"},
    };
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++)
        if (texts[i].code == code)
            return texts[i].text;
    return "An unknown error occurred";
}

EXPORT fdb_bool_t fdb_error_predicate(int predicate, fdb_error_t code)
{
    enum { RETRYABLE = 50000, MAYBE_COMMITTED, RETRYABLE_NOT_COMMITTED };
    bool maybe = code == E_UNKNOWN || code == E_CHANGED;
    bool not_committed = code == E_CONFLICT || code == E_TOO_OLD || code == E_FUTURE ||
                         code == E_BEHIND || code == 1038 || code == 1078 || code == 1042 ||
                         code == 1051 || code == 1213 || code == 1223;
    return predicate == RETRYABLE                 ? maybe || not_committed
           : predicate == MAYBE_COMMITTED         ? maybe
           : predicate == RETRYABLE_NOT_COMMITTED ? not_committed
                                                  : false;
}

/* --- the network ----------------------------------------------------------------------- */

EXPORT fdb_error_t fdb_network_set_option(int option, const uint8_t *value, int value_len)
{
    (void)value;
    (void)value_len;
    bool known = option == 10 || option == 20 || (option >= 30 && option <= 43) ||
                 (option >= 45 && option <= 54) || (option >= 60 && option <= 72) ||
                 (option >= 80 && option <= 83) || option == 90 || option == 91 ||
                 (option >= 1000 && option <= 1002);
    return known ? 0 : E_OPTION;
}

EXPORT fdb_error_t fdb_setup_network(void)
{
    lock();
    fdb_error_t error = !g.api_selected ? E_API_UNSET : g.network_setup ? E_NETWORK_TWICE : 0;
    if (!error)
        g.network_setup = true;
    unlock();
    return error;
}

/* --- databases ------------------------------------------------------------------------- */

/* description:id@address:port,... as the real client wants it, with lines of comments. */
static bool connection_string_valid(const char *text)
{
    const char *at = strchr(text, '@'), *colon = strchr(text, ':');
    if (!at || !colon || colon > at || colon == text || colon + 1 == at)
        return false;
    for (const char *c = text; c < at; c++)
        if (!isalnum((unsigned char)*c) && *c != '_' && c != colon)
            return false;
    const char *port = strrchr(at, ':');
    return port && port > at + 1 && isdigit((unsigned char)port[1]);
}

static fdb_error_t read_cluster_file(const char *path)
{
    const char *from_env = getenv("FDB_CLUSTER_FILE");
    if (path && !*path)
        path = NULL;
    if (!path)
        path = from_env                           ? from_env
               : access("fdb.cluster", F_OK) == 0 ? "fdb.cluster"
                                                  : "/etc/foundationdb/fdb.cluster";
    FILE *file = fopen(path, "r");
    if (!file)
        return E_NO_CLUSTER_FILE;
    char line[4096], text[4096] = "";
    while (fgets(line, sizeof line, file)) {
        line[strcspn(line, "#\r\n")] = 0;
        char *start = line + strspn(line, " \t");
        start[strcspn(start, " \t")] = 0;
        if (*start && strlen(text) + strlen(start) < sizeof text)
            memcpy(text + strlen(text), start, strlen(start) + 1);
    }
    fclose(file);
    return connection_string_valid(text) ? 0 : E_CONNECTION_STRING;
}

EXPORT fdb_error_t fdb_create_database(const char *cluster_file, FDBDatabase **out)
{
    lock();
    fdb_error_t error = !g.network_setup ? E_NO_NETWORK : (fdb_error_t)g.config.create_error;
    if (!error) {
        FDBDatabase *db = mem_zalloc(sizeof *db);
        db->magic = DB_MAGIC;
        db->refs = 1;
        /* As the real one: whatever is wrong with the file is told by the first operation. */
        db->error = g.config.open_error ? (fdb_error_t)g.config.open_error
                                        : read_cluster_file(cluster_file);
        db->defaults = (struct txn_options){
            .retry_limit = -1, .max_delay_ms = 1000, .size_limit = TXN_BYTES_MAX};
        db->watches_max = 10000;
        g.counts.databases_alive++;
        *out = db;
    }
    unlock();
    return error;
}

EXPORT void fdb_database_destroy(FDBDatabase *db)
{
    lock();
    g.counts.databases_alive--;
    db_unref(db);
    unlock();
}

EXPORT double fdb_database_get_main_thread_busyness(FDBDatabase *db)
{
    (void)db;
    return 0;
}

static void protocol_answer(struct event *e)
{
    FDBFuture *f = e->f;
    if (f->settled)
        return;
    uint64_t other = protocol_of(g.config.api >= 740 ? 730 : 740);
    uint64_t protocol = g.config.incompatible ? other : protocol_of(g.config.api);
    if (g.config.down || protocol == (uint64_t)e->version) {
        /* Asked again until it answers, or another than the expected. */
        struct event *again = event_new(WAY_LOCAL, protocol_answer, f, NULL);
        again->version = e->version;
        again->idle = true;
        event_post(again, 5000000);
        return;
    }
    f->number = (int64_t)(protocol | 1ull << 60); /* a flag that servers set */
    future_settle(f, 0);
}

EXPORT FDBFuture *fdb_database_get_server_protocol(FDBDatabase *db, uint64_t expected)
{
    lock();
    FDBFuture *f = future_new(F_UINT64, db);
    if (db->error) {
        future_settle(f, db->error);
    } else {
        struct event *e = event_new(WAY_LOCAL, protocol_answer, f, NULL);
        e->version = (int64_t)expected;
        event_post(e, random_delay_ns());
    }
    unlock();
    return f;
}
