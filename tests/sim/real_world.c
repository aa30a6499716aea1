/* The real world; real_world.h says what it is made of. */
#include "real_world.h"

#include <ftw.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/check.h"
#include "base/mem.h"
#include "seeds.h"
#include "server/reactor.h"

#define PATIENCE_S 60u
#define WATCHDOG_MS 20u
#define LEASE_MS 60000u
#define LOOK_PAIRS 1000u

struct handle {
    struct list link;
    struct store *store;
    unsigned uses; /* processes; more than one only where a real process can open a store once */
};

struct stored {
    struct slice key, head;
};

struct real {
    struct world base; /* first */
    struct reactor *reactor;
    struct env *env;
    char uri[600], dir[300];
    bool mortal;
    struct graveyard graveyard;
    struct list handles; /* of processes that live */
    struct stored *stored;
    size_t n_stored, cap_stored;
};

static struct real *real_of(struct world *w)
{
    return container_of(w, struct real, base);
}

/* --- time ---------------------------------------------------------------------------- */

static uint64_t now_ns(struct world *w)
{
    return env_now_ns(real_of(w)->env);
}

static void nothing(struct env_task *task)
{
    (void)task;
}

static void too_long(struct env_timer *timer)
{
    (void)timer;
}

static bool step(struct world *w, uint64_t limit_ns)
{
    struct real *r = real_of(w);
    uint64_t now = now_ns(w), left = limit_ns > now ? limit_ns - now : 0;
    if (left < 1000000) {
        struct env_task task = {.run = nothing};
        env_post(r->env, &task);
        reactor_run_once(r->env);
        return left > 0;
    }
    struct env_timer timer = {.fire = too_long};
    env_timer_start(r->env, &timer, min_u64(left / 1000000, WATCHDOG_MS));
    reactor_run_once(r->env);
    env_timer_stop(r->env, &timer);
    return true;
}

static bool patient(struct world *w, struct patience *p)
{
    if (!p->until_ns)
        p->until_ns = now_ns(w) + PATIENCE_S * seeds_env("SLOW", 1) * 1000000000ull;
    return now_ns(w) < p->until_ns;
}

static bool run_until(struct world *w, struct env *env, bool (*cond)(void *arg), void *arg)
{
    struct patience p = {0};
    (void)env;
    while (!cond(arg)) {
        if (!patient(w, &p))
            return false;
        step(w, UINT64_MAX);
    }
    return true;
}

/* --- processes ----------------------------------------------------------------------- */

static struct store *attach(struct world *w, struct env **env, struct err *e)
{
    struct real *r = real_of(w);
    struct store *store;
    struct store_options options = {.flags = STORE_CREATE, .lease_ms = w->lease_ms};
    *env = r->env;
    if (r->dir[0] && !list_empty(&r->handles)) {
        struct handle *shared = container_of(r->handles.next, struct handle, link);
        shared->uses++;
        return shared->store;
    }
    if (store_open(r->uri, &options, &store, e) != ST_OK)
        return NULL;
    if (r->mortal)
        store = mortal_store_new(&r->graveyard, store, r->env);
    struct handle *h = mem_zalloc(sizeof *h);
    h->store = store;
    h->uses = 1;
    list_add_tail(&r->handles, &h->link);
    return store;
}

/* Whether nobody uses it any more. */
static bool forget(struct real *r, const struct store *store)
{
    list_for_each_safe (l, next, &r->handles) {
        struct handle *h = container_of(l, struct handle, link);
        if (h->store != store)
            continue;
        if (--h->uses > 0)
            return false;
        list_remove(&h->link);
        free(h);
    }
    return true;
}

static void detach(struct world *w, struct env *env, struct store *store)
{
    (void)env;
    if (forget(real_of(w), store))
        store_close(store);
}

static void stop(struct world *w, struct env *env)
{
    (void)w;
    (void)env;
}

static void crash(struct world *w, struct store *store)
{
    struct real *r = real_of(w);
    CHECK(r->mortal);
    forget(r, store);
    mortal_store_kill(store);
}

static void power_cut(struct world *w)
{
    (void)w; /* what such an engine answered survives that, too */
}

/* --- looking ------------------------------------------------------------------------- */

struct reading {
    struct store_read read;
    bool done;
    enum status st;
};

static void read_done(struct store_read *read, enum status st)
{
    struct reading *r = container_of(read, struct reading, read);
    r->done = true;
    r->st = st;
}

static bool is_read(void *arg)
{
    return ((const struct reading *)arg)->done;
}

static struct slice copy(struct slice s)
{
    uint8_t *bytes = mem_alloc(s.len + 1);
    if (s.len)
        memcpy(bytes, s.data, s.len);
    return (struct slice){bytes, s.len};
}

static void stored_free(struct real *r)
{
    for (size_t i = 0; i < r->n_stored; i++) {
        free((void *)(uintptr_t)r->stored[i].key.data);
        free((void *)(uintptr_t)r->stored[i].head.data);
    }
    r->n_stored = 0;
}

static const struct slice everything[2] = {{"\0", 1}, {"\xff", 1}};
/* ("x", ...): behind all keys of the volume layer; what an engine keeps there can't be read
 * through the store. */
static const struct slice engines_own = {"\x02x", 2};

static void look(struct world *w)
{
    struct real *r = real_of(w);
    struct env *env;
    struct err e;
    bool borrowed = !list_empty(&r->handles);
    struct store *store = borrowed
                              ? container_of(r->handles.next, struct handle, link)->store
                              : attach(w, &env, &e);
    CHECK(store);
    stored_free(r);
    uint8_t begin[STORE_KEY_BYTES_MAX + 1];
    size_t begin_len = everything[0].len;
    memcpy(begin, everything[0].data, begin_len);
    for (bool more = true; more;) {
        struct store_range range = {
            .begin = {begin, begin_len}, .end = engines_own, .limit = LOOK_PAIRS};
        struct reading reading = {
            .read = {.ranges = &range, .n_ranges = 1, .done = read_done}};
        store_read(store, r->env, &reading.read);
        CHECK(run_until(w, r->env, is_read, &reading) && reading.st == ST_OK);
        for (uint32_t i = 0; i < range.n_pairs; i++) {
            mem_grow(&r->stored, &r->cap_stored, r->n_stored + 1, sizeof *r->stored);
            r->stored[r->n_stored++] =
                (struct stored){copy(range.pairs[i].key), copy(range.pairs[i].head)};
        }
        more = range.more;
        if (range.n_pairs) {
            struct slice last = range.pairs[range.n_pairs - 1].key;
            memcpy(begin, last.data, last.len);
            begin[last.len] = 0;
            begin_len = last.len + 1;
        }
        store_read_release(&reading.read);
    }
    if (!borrowed)
        detach(w, env, store);
}

static int compare(struct slice a, struct slice b)
{
    int c = memcmp(a.data, b.data, min_u64(a.len, b.len));
    return c ? c : a.len < b.len ? -1 : a.len > b.len;
}

/* The first key at or behind `key`. */
static size_t seek(const struct real *r, struct slice key)
{
    size_t from = 0, to = r->n_stored;
    while (from < to) {
        size_t middle = from + (to - from) / 2;
        if (compare(r->stored[middle].key, key) < 0)
            from = middle + 1;
        else
            to = middle;
    }
    return from;
}

static bool peek(struct world *w, struct slice key, struct slice *head)
{
    const struct real *r = real_of(w);
    size_t i = seek(r, key);
    if (i == r->n_stored || compare(r->stored[i].key, key) != 0)
        return false;
    *head = r->stored[i].head;
    return true;
}

static void each(struct world *w, struct slice begin, struct slice end,
                 void (*see)(void *arg, struct slice key, struct slice head), void *arg)
{
    const struct real *r = real_of(w);
    for (size_t i = seek(r, begin); i < r->n_stored && compare(r->stored[i].key, end) < 0; i++)
        see(arg, r->stored[i].key, r->stored[i].head);
}

/* --- the end ------------------------------------------------------------------------- */

static bool is_quiet(void *arg)
{
    return graveyard_is_quiet(&((const struct real *)arg)->graveyard);
}

struct clearing {
    struct store_commit commit;
    bool done;
    enum status st;
};

static void cleared(struct store_commit *commit, enum status st)
{
    struct clearing *c = container_of(commit, struct clearing, commit);
    c->done = true;
    c->st = st;
}

static bool is_cleared(void *arg)
{
    return ((const struct clearing *)arg)->done;
}

static const char *world_real_end(struct world *w)
{
    struct real *r = real_of(w);
    struct env *env;
    struct err e;
    if (!list_empty(&r->handles))
        return "a process has not ended";
    if (!run_until(w, r->env, is_quiet, r))
        return "commits of a dead process are never settled";
    if (r->dir[0])
        return NULL;
    struct store *store = attach(w, &env, &e);
    if (!store)
        return "the store does not open for being cleared";
    struct store_mutation all = {
        .kind = STORE_CLEAR_RANGE, .key = everything[0], .head = everything[1]};
    struct clearing c = {.commit = {.mutations = &all, .n_mutations = 1, .done = cleared}};
    store_commit(store, env, &c.commit);
    if (!run_until(w, env, is_cleared, &c) || c.st != ST_OK)
        return "the store can't be cleared";
    detach(w, env, store);
    return NULL;
}

static int remove_one(const char *path, const struct stat *sb, int flag, struct FTW *ftw)
{
    (void)sb;
    (void)flag;
    (void)ftw;
    return remove(path);
}

static void world_real_free(struct world *w)
{
    struct real *r = real_of(w);
    stored_free(r);
    free(r->stored);
    graveyard_destroy(&r->graveyard);
    if (r->reactor)
        reactor_free(r->reactor);
    if (r->dir[0])
        nftw(r->dir, remove_one, 16, FTW_DEPTH | FTW_PHYS | FTW_MOUNT);
    free(r);
}

/* A store of its own for this world. */
static bool choose_uri(struct real *r, const struct real_config *c)
{
    if (strncmp(c->uri, "lmdb:", 5) == 0) {
        const char *base = c->uri[5] ? c->uri + 5 : getenv("TMPDIR");
        snprintf(r->dir, sizeof r->dir, "%.250s/volume-engine-XXXXXX", base ? base : "/tmp");
        if (!mkdtemp(r->dir)) {
            r->dir[0] = '\0';
            return false;
        }
        snprintf(r->uri, sizeof r->uri, "lmdb:%s", r->dir);
    } else {
        snprintf(r->uri, sizeof r->uri, "%.500s%s-%d-%llu", c->uri,
                 strstr(c->uri, "?prefix=") ? "" : "?prefix=test", (int)getpid(),
                 (unsigned long long)c->seed);
    }
    return true;
}

static const struct world_ops ops = {
    .now_ns = now_ns,
    .step = step,
    .patient = patient,
    .run_until = run_until,
    .attach = attach,
    .detach = detach,
    .stop = stop,
    .crash = crash,
    .power_cut = power_cut,
    .look = look,
    .peek = peek,
    .each = each,
    .end = world_real_end,
    .free = world_real_free,
};

struct world *world_real_new(const struct real_config *config, struct err *e)
{
    struct real *r = mem_zalloc(sizeof *r);
    r->base.ops = &ops;
    r->base.run_once = reactor_run_once;
    r->base.lease_ms = config->lease_ms ? config->lease_ms : LEASE_MS;
    r->base.long_ns = 20000000;
    r->mortal = config->mortal;
    list_init(&r->handles);
    graveyard_init(&r->graveyard);
    r->graveyard.deaths_unknown = config->deaths_unknown;
    if (!choose_uri(r, config)) {
        fail(e, ST_IO, "no folder can be made for %s", config->uri);
    } else if (reactor_new(&r->reactor, e) == ST_OK) {
        r->env = reactor_env(r->reactor);
        return &r->base;
    }
    world_real_free(&r->base);
    return NULL;
}

const struct graveyard *world_real_graveyard(struct world *w)
{
    return &real_of(w)->graveyard;
}

struct env *world_real_env(struct world *w)
{
    return real_of(w)->env;
}
