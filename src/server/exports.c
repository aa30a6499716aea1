/* Exports: names and writers; exports.h says why. */
#include "server/exports.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/check.h"
#include "base/mem.h"

static void answer(struct catalog_op *op)
{
    struct export_search *search = container_of(op, struct export_search, op);
    search->st = op->st;
    search->err = op->err;
    if (op->st == ST_OK && op->n_entries != 1)
        search->st = fail(&search->err, ST_NOTFOUND,
                          "no default export: this server has %zu volumes, name one of them",
                          op->n_entries);
    if (search->st == ST_OK)
        search->entry = op->entries[0];
    catalog_op_free(op);
    search->done(search);
}

void export_find(struct export_search *search, struct store *store, struct env *env,
                 const char *name, const char *default_name)
{
    memset(&search->op, 0, sizeof search->op);
    memset(&search->err, 0, sizeof search->err);
    search->op.done = answer;
    if (!*name && !default_name)
        catalog_list(&search->op, store, env);
    else
        catalog_find(&search->op, store, env, *name ? name : default_name);
}

struct export *export_join(struct list *exports, uint64_t branch)
{
    struct export *x = NULL;
    list_for_each (l, exports) {
        struct export *other = container_of(l, struct export, link);
        if (other->branch == branch)
            x = other;
    }
    if (!x) {
        x = mem_zalloc(sizeof *x);
        x->branch = branch;
        list_add_tail(exports, &x->link);
    }
    x->n_connections++;
    return x;
}

void export_leave(struct export *x, bool was_writer)
{
    CHECK(x->n_connections > 0);
    if (was_writer)
        x->n_writers--;
    if (--x->n_connections == 0) {
        CHECK(x->n_writers == 0);
        list_remove(&x->link);
        free(x);
    }
}

bool export_claim(struct export *x, const char *host)
{
    if (x->n_writers == 0)
        snprintf(x->writer, sizeof x->writer, "%s", host);
    if (strcmp(x->writer, host) != 0)
        return false;
    x->n_writers++;
    return true;
}
