/*
 * Finds the engine that a store URI names. Everything else goes straight
 * through the table of functions that the engine put into the store.
 */
#include "store/store.h"

#include <stdio.h>
#include <string.h>

#include "store/engines.h"

static const struct store_engine *const engines[] = {
    &store_engine_lmdb,
    &store_engine_fdb,
};

#define N_ENGINES (sizeof engines / sizeof engines[0])

enum status store_open(const char *uri, const struct store_options *options, struct store **out,
                       struct err *e)
{
    *out = NULL;
    for (size_t i = 0; i < N_ENGINES; i++) {
        size_t n = strlen(engines[i]->scheme);
        if (strncmp(uri, engines[i]->scheme, n) == 0 && uri[n] == ':')
            return engines[i]->open(uri + n + 1, options, out, e);
    }
    char forms[200];
    size_t used = 0;
    forms[0] = '\0';
    for (size_t i = 0; i < N_ENGINES && used < sizeof forms; i++) {
        int n =
            snprintf(forms + used, sizeof forms - used, "%s%s", i ? " or " : "", engines[i]->form);
        if (n > 0)
            used += (size_t)n;
    }
    return fail(e, ST_INVAL, "\"%.200s\" names no kind of store this program knows: use %s", uri,
                forms);
}

enum status store_backup(struct store *store, struct store_backup *backup, struct err *e)
{
    atomic_store(&backup->done_bytes, 0);
    atomic_store(&backup->total_bytes, 0);
    backup->n_damaged = 0;
    if (!store->ops->backup)
        return fail(e, ST_UNSUP, "this kind of store is not copied from here");
    return store->ops->backup(store, backup, e);
}

void store_shutdown(void)
{
    for (size_t i = 0; i < N_ENGINES; i++)
        if (engines[i]->shutdown)
            engines[i]->shutdown();
}
