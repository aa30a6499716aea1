/*
 * The session: registering this process with the engine and in the store.
 *
 * With the engine first: by the time others can read the record, the engine can tell
 * them whether we live. Ended in the opposite order, so that a record is never there
 * without somebody who can be asked about it, short of a crash, after which the engine
 * says "dead".
 */
#include "volume/session.h"

#include <stdio.h>
#include <string.h>
#include <unistd.h>

struct written {
    struct store_commit commit;
    bool done;
    enum status st;
};

static void written_done(struct store_commit *commit, enum status st)
{
    struct written *w = container_of(commit, struct written, commit);
    w->done = true;
    w->st = st;
}

static enum status write_one(struct store *store, struct env *env,
                             void (*run_once)(struct env *env), const struct store_check *check,
                             const struct store_mutation *mutation)
{
    struct written w = {.commit = {.checks = check,
                                   .mutations = mutation,
                                   .n_checks = check ? 1 : 0,
                                   .n_mutations = 1,
                                   .wake_watchers = true,
                                   .done = written_done}};
    store_commit(store, env, &w.commit);
    while (!w.done)
        run_once(env);
    return w.st;
}

enum status session_begin(struct session *s, struct store *store, struct env *env,
                          void (*run_once)(struct env *env), uint32_t lease_ms, const char *address,
                          struct err *e)
{
    *s = (struct session){.store = store, .lease_ms = lease_ms, .pid = (uint32_t)getpid()};
    env_random(env, s->id, sizeof s->id);
    /* A longer name than fits, here or from the system, is cut: it is for people only. */
    if (gethostname(s->host, sizeof s->host) != 0)
        snprintf(s->host, sizeof s->host, "unknown");
    s->host[sizeof s->host - 1] = '\0';
    snprintf(s->address, sizeof s->address, "%s", address);

    enum status st = store_session_begin(store, s->id, e);
    if (st != ST_OK)
        return st;

    struct session_record rec = {.state = SESSION_LIVE,
                                 .counter = 1,
                                 .lease_ms = lease_ms,
                                 .pid = s->pid,
                                 .started_ns = env_realtime_ns(env)};
    memcpy(rec.host, s->host, sizeof rec.host);
    memcpy(rec.address, s->address, sizeof rec.address);
    struct key key;
    uint8_t bytes[RECORD_BYTES_MAX];
    key_session(&key, s->id);
    size_t len = session_encode(&rec, key_slice(&key), bytes);
    struct store_check absent = {.kind = STORE_CHECK_ABSENT, .key = key_slice(&key)};
    struct store_mutation set = {.kind = STORE_SET, .key = key_slice(&key), .head = {bytes, len}};
    st = write_one(store, env, run_once, &absent, &set);
    if (st != ST_OK) {
        store_session_end(store, s->id);
        struct store_info info;
        if (store_info(store, &info, NULL) != ST_OK)
            snprintf(info.uri, sizeof info.uri, "the store");
        return fail(e, st, "cannot register this process in %s: %s", info.uri, status_text(st));
    }
    return ST_OK;
}

void session_end(struct session *s, struct env *env, void (*run_once)(struct env *env))
{
    struct key key;
    key_session(&key, s->id);
    struct store_mutation clear = {.kind = STORE_CLEAR, .key = key_slice(&key)};
    /* A record that can't be removed is one of a dead session from now on; whoever comes
     * next clears it. */
    write_one(s->store, env, run_once, NULL, &clear);
    store_session_end(s->store, s->id);
}
