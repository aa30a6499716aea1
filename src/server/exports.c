/* Exports: names and writers; exports.h says why. */
#include "server/exports.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/check.h"
#include "base/date.h"
#include "base/log.h"
#include "base/mem.h"

static enum access_right right_to(const struct access_view *view,
                                  const struct catalog_entry *entry)
{
    return access_view_right(view, entry->name,
                             entry->snapshot.epoch ? entry->snapshot.rec.name : "");
}

void export_hide(struct catalog_op *list, const struct access_view *view)
{
    size_t kept = 0;
    for (size_t i = 0; view && i < list->n_entries; i++)
        if (right_to(view, &list->entries[i]) != ACCESS_NONE) {
            if (kept != i)
                list->entries[kept] = list->entries[i];
            kept++;
        }
    if (view)
        list->n_entries = kept;
}

/* The one sentence for all that the client can't have, there or not. */
static void none_for_it(struct export_search *search)
{
    if (search->name[0])
        search->st = fail(&search->err, ST_NOTFOUND,
                          "there is no volume \"%s\" that you may open here", search->name);
    else
        search->st = fail(&search->err, ST_NOTFOUND,
                          "no default export that you may open here: name a volume");
}

static void answer(struct catalog_op *op)
{
    struct export_search *search = container_of(op, struct export_search, op);
    search->st = op->st;
    search->err = op->err;
    if (op->st == ST_OK && !search->by_name)
        export_hide(op, search->view);
    if (op->st == ST_OK && op->n_entries != 1)
        search->st = fail(&search->err, ST_NOTFOUND,
                          search->view
                              ? "no default export: you may open %zu volumes here, name one of them"
                              : "no default export: this server has %zu volumes, name one of them",
                          op->n_entries);
    else if (op->st == ST_NOTFOUND && search->view)
        none_for_it(search);
    if (search->st == ST_OK) {
        search->entry = op->entries[0];
        enum access_right right = right_to(search->view, &search->entry);
        search->read_only = right != ACCESS_WRITE;
        search->denied = right == ACCESS_NONE;
        if (search->denied)
            none_for_it(search);
    }
    catalog_op_free(op);
    search->done(search);
}

static void answer_denied(struct env_task *task)
{
    struct export_search *search = container_of(task, struct export_search, task);
    search->denied = true;
    none_for_it(search);
    search->done(search);
}

static bool may_open(const struct access_view *view, const char *name)
{
    char volume[NAME_BYTES_MAX + 1], snapshot[NAME_BYTES_MAX + 1];
    return !view || (name_split(name, volume, snapshot) &&
                     access_view_right(view, volume, snapshot) != ACCESS_NONE);
}

void export_find(struct export_search *search, struct store *store, struct env *env,
                 const char *name, const char *default_name)
{
    memset(&search->op, 0, sizeof search->op);
    memset(&search->err, 0, sizeof search->err);
    search->op.done = answer;
    search->by_name = *name || default_name;
    snprintf(search->name, sizeof search->name, "%s", name);
    search->task.run = answer_denied;
    if (search->by_name && !may_open(search->view, *name ? name : default_name))
        env_post(env, &search->task);
    else if (!search->by_name)
        catalog_list(&search->op, store, env);
    else
        catalog_find(&search->op, store, env, *name ? name : default_name);
}

void export_name(const struct catalog_entry *entry, char out[FULL_NAME_BYTES])
{
    snprintf(out, FULL_NAME_BYTES, "%s%s%s", entry->name, entry->snapshot.epoch ? "@" : "",
             entry->snapshot.epoch ? entry->snapshot.rec.name : "");
}

void export_description(const struct catalog_entry *entry, char out[EXPORT_DESCRIPTION_BYTES])
{
    const char *description = entry->header.description;
    char date[DATE_BYTES];
    if (entry->snapshot.epoch)
        snprintf(out, EXPORT_DESCRIPTION_BYTES, "snapshot %s of %s, %s%s%s",
                 entry->snapshot.rec.name, entry->name,
                 date_format(entry->snapshot.rec.created_ns, date), description[0] ? ": " : "",
                 description);
    else
        snprintf(out, EXPORT_DESCRIPTION_BYTES, "%s", description);
}

uint64_t export_size(const struct catalog_entry *entry)
{
    return entry->snapshot.epoch ? entry->snapshot.rec.size : entry->header.size;
}

static bool same_host(const struct export_client *client, const char *host)
{
    return strcmp(client->host, host) == 0;
}

static bool has_role(const struct export_client *client)
{
    return client->export->n_writers > 0 && same_host(client, client->export->writer);
}

/* What the host that has the role did is not known from here on. */
static void watch_anew(struct export *x)
{
    x->uncovered = true;
    x->settling = x->settled = false;
}

static void look_for_hosts(struct export *x)
{
    bool mixed = false;
    const char *first = NULL;
    list_for_each (l, &x->clients) {
        const struct export_client *client = container_of(l, struct export_client, link);
        if (!first)
            first = client->host;
        mixed |= !same_host(client, first);
    }
    if (mixed && !x->mixed)
        watch_anew(x);
    x->mixed = mixed;
}

void export_join(struct list *exports, uint64_t branch, uint64_t epoch, const char *name,
                 bool shared, struct export_client *client)
{
    struct export *x = NULL;
    CHECK(strlen(client->host) < EXPORT_HOST_BYTES);
    list_for_each (l, exports) {
        struct export *other = container_of(l, struct export, link);
        if (other->branch == branch && other->epoch == epoch)
            x = other;
    }
    if (!x) {
        x = mem_zalloc(sizeof *x);
        x->branch = branch;
        x->epoch = epoch;
        snprintf(x->name, sizeof x->name, "%s", name);
        x->shared = shared;
        list_init(&x->clients);
        list_add_tail(exports, &x->link);
    }
    client->export = x;
    client->entered = ++x->n_entered;
    list_add_tail(&x->clients, &client->link);
    if (!shared)
        look_for_hosts(x);
}

void export_leave(struct export_client *client)
{
    struct export *x = client->export;
    list_remove(&client->link);
    if (client->writes)
        x->n_writers--;
    if (list_empty(&x->clients)) {
        CHECK(x->n_writers == 0);
        list_remove(&x->link);
        free(x);
    } else if (x->mixed) {
        look_for_hosts(x);
    }
}

static bool role_may_move_to(const struct export_client *client, uint64_t now_ms)
{
    const struct export *x = client->export;
    if (!x->settled || now_ms - x->settled_ms < EXPORT_QUIET_MS ||
        client->entered > x->settled_entered)
        return false;
    list_for_each (l, &x->clients) {
        struct export_client *other = container_of(l, struct export_client, link);
        if (has_role(other) && other->is_busy(other))
            return false;
    }
    return true;
}

/* The connections of the host that had it know an old volume from now on. */
static void role_leaves(struct export *x, const char *to)
{
    log_volume_info(x->name,
                    "volume %s: %s may write from now on, and no more %s, which flushed it and "
                    "fell idle", x->name, to, x->writer);
    list_for_each (l, &x->clients) {
        struct export_client *client = container_of(l, struct export_client, link);
        if (!has_role(client))
            continue;
        client->writes = false;
        client->barred = true;
        snprintf(client->refusal, sizeof client->refusal,
                 "%s writes this volume since %s had flushed it and fallen idle: what a connection "
                 "from before knows may be old, so it may not write; connect again",
                 to, client->host);
    }
    x->n_writers = 0;
}

enum export_claim export_claim(struct export_client *client, uint64_t now_ms)
{
    struct export *x = client->export;
    if (client->writes || x->shared)
        return CLAIM_YES;
    if (client->barred)
        return CLAIM_NO;
    if (x->n_writers > 0 && !has_role(client)) {
        if (!role_may_move_to(client, now_ms)) {
            snprintf(client->refusal, sizeof client->refusal,
                     "the volume is being written by %s, and %s is another host: disconnect that "
                     "one first (or serve with --shared where clients coordinate their writes)",
                     x->writer, client->host);
            return CLAIM_WAIT;
        }
        role_leaves(x, client->host);
    }
    if (x->n_writers++ == 0) {
        snprintf(x->writer, sizeof x->writer, "%s", client->host);
        watch_anew(x);
    }
    client->writes = true;
    return CLAIM_YES;
}

static bool others_busy(const struct export_client *client)
{
    list_for_each (l, &client->export->clients) {
        struct export_client *other = container_of(l, struct export_client, link);
        if (other != client && has_role(other) && other->is_busy(other))
            return true;
    }
    return false;
}

void export_took(struct export_client *client, enum export_request kind, bool alone)
{
    struct export *x = client->export;
    if (!has_role(client))
        return;
    x->settled = x->settling = false;
    if (kind == EXPORT_CHANGE)
        x->uncovered = true;
    x->is_flush = kind == EXPORT_FLUSH;
    if (x->is_flush || (kind == EXPORT_CHANGE_FUA && !x->uncovered)) {
        x->settling = alone && !others_busy(client);
        x->settled_entered = x->n_entered;
    }
    /* Under way with others, it may take effect behind a FLUSH that was asked for meanwhile. */
    if (kind == EXPORT_CHANGE_FUA && !x->settling)
        x->uncovered = true;
}

void export_answered(struct export_client *client, bool success, uint64_t now_ms)
{
    struct export *x = client->export;
    if (!has_role(client))
        return;
    if (!success)
        x->uncovered = true;
    /* Nothing else was under way when it was asked for, and nothing came since: it is this one. */
    if (x->settling && success) {
        x->settled = true;
        x->settled_ms = now_ms;
        if (x->is_flush)
            x->uncovered = false;
    }
    x->settling = false;
}
