/* Loading libfdb_c and running its network thread; api.h says why. */
#include "store/fdb/api.h"

#include <dlfcn.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/log.h"

struct fdb_api fdb;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static bool started, running;
static struct err failure;
static pthread_t network;

static const char *const places[] = {
    "libfdb_c.so",
    "/usr/lib/libfdb_c.so",
    "/usr/lib64/libfdb_c.so",
    "/usr/local/lib/libfdb_c.so",
};

#define INSTALL_IT                                                                                 \
    "install the foundationdb-clients package of your cluster's version, or name the library "    \
    "with FDB_NBD_LIBFDB_C=/path/to/libfdb_c.so"

static void *load(struct err *e)
{
    const char *named = getenv("FDB_NBD_LIBFDB_C");
    if (named && *named) {
        void *library = dlopen(named, RTLD_NOW | RTLD_LOCAL);
        if (!library)
            fail(e, ST_UNAVAIL, "FDB_NBD_LIBFDB_C names no library that can be loaded: %s",
                 dlerror());
        return library;
    }
    char first[300] = "";
    for (size_t i = 0; i < sizeof places / sizeof *places; i++) {
        void *library = dlopen(places[i], RTLD_NOW | RTLD_LOCAL);
        if (library)
            return library;
        const char *why = dlerror();
        /* A library that is there and can't be used is the more telling reason. */
        if (i == 0 || !strstr(why, "No such file"))
            snprintf(first, sizeof first, "%s", why);
    }
    fail(e, ST_UNAVAIL, "FoundationDB's client library can't be loaded (%s): " INSTALL_IT, first);
    return NULL;
}

static enum status bind_functions(void *library, struct err *e)
{
    /* POSIX lets a pointer from dlsym be a function's. */
    void *p;
#define BIND(type, name, args)                                                                     \
    p = dlsym(library, "fdb_" #name);                                                              \
    if (!p)                                                                                        \
        return fail(e, ST_UNAVAIL, "FoundationDB's client library lacks fdb_%s: " INSTALL_IT,      \
                    #name);                                                                        \
    memcpy(&fdb.name, &p, sizeof p);
#define BIND_OPTIONAL(type, name, args)                                                            \
    p = dlsym(library, "fdb_" #name);                                                              \
    memcpy(&fdb.name, &p, sizeof p);
    FDB_FUNCTIONS(BIND)
    FDB_FUNCTIONS_OPTIONAL(BIND_OPTIONAL)
#undef BIND
#undef BIND_OPTIONAL
    return ST_OK;
}

static enum status select_version(struct err *e)
{
    int newest = fdb.get_max_api_version();
    if (newest < FDB_API_VERSION_MIN)
        return fail(e, ST_UNAVAIL,
                    "FoundationDB's client library is too old (API version %d, %d is needed): "
                    "install that of FoundationDB 6.3 or newer",
                    newest, FDB_API_VERSION_MIN);
    fdb.version = newest < FDB_API_VERSION_MAX ? newest : FDB_API_VERSION_MAX;
    int code = fdb.select_api_version_impl(fdb.version, fdb.version);
    if (code)
        return fail(e, ST_UNAVAIL, "FoundationDB's client library refuses API version %d: %s",
                    fdb.version, fdb.get_error(code));
    return ST_OK;
}

/* The library says "7.3.79,<source>,<protocol in hex>", one such group per client. */
static void note_client(void)
{
    const char *text = fdb.get_client_version();
    size_t len = strcspn(text, ",");
    snprintf(fdb.client, sizeof fdb.client, "%.*s", len < 32 ? (int)len : 32, text);
    const char *comma = strchr(text, ',');
    comma = comma ? strchr(comma + 1, ',') : NULL;
    fdb.protocol = comma ? strtoull(comma + 1, NULL, 16) : 0;
}

static void *run_network(void *arg)
{
    (void)arg;
    int code = fdb.run_network();
    if (code)
        log_error("FoundationDB's network thread ended: %s", fdb.get_error(code));
    return NULL;
}

void fdb_api_stop(void)
{
    pthread_mutex_lock(&lock);
    if (running && fdb.stop_network() == 0)
        pthread_join(network, NULL);
    running = false;
    pthread_mutex_unlock(&lock);
}

static enum status start_network(struct err *e)
{
    int code = fdb.setup_network();
    if (code)
        return fail(e, ST_UNAVAIL,
                    "FoundationDB's client can't start: %s (its settings come from "
                    "FDB_NETWORK_OPTION_* and FDB_TLS_* in the environment)",
                    fdb.get_error(code));
    /* Signals are the program's, not this thread's. */
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    code = pthread_create(&network, NULL, run_network, NULL);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (code)
        return fail(e, ST_UNAVAIL, "cannot start FoundationDB's network thread: %s",
                    strerror(code));
    running = true;
    return ST_OK;
}

enum status fdb_api_start(struct err *e)
{
    pthread_mutex_lock(&lock);
    if (!started) {
        started = true;
        void *library = load(&failure);
        enum status st = library ? bind_functions(library, &failure) : ST_UNAVAIL;
        if (st == ST_OK)
            st = select_version(&failure);
        if (st == ST_OK)
            st = start_network(&failure);
        if (st == ST_OK)
            note_client();
    }
    pthread_mutex_unlock(&lock);
    return failure.st == ST_OK ? ST_OK : fail(e, failure.st, "%s", failure.text);
}
