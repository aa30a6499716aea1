/*
 * Views: snapshots opened as volumes that nobody owns.
 *
 * A view reads rows and blocks as the snapshot sees them and never changes. What keeps it honest
 * when the snapshot is removed under it: blocks and level-1 rows are asked for by exact keys, which
 * fails where they were cleared; a level-2 row is searched for, and where the right one was cleared
 * an older one would be found, so each such search reads the snapshot's record with it. The
 * record is watched besides, so that clients learn soon.
 */
#include <stdlib.h>

#include "volume/internal.h"

#define LOOK_AGAIN_MS 1000u

struct view {
    struct volume *vol;
    struct key key;
    struct store_watch watch;
    struct store_read read;
    struct store_get get;
    struct env_timer retry;
    bool armed, reading, waits;
};

bool view_stands(const struct store_get *get)
{
    struct snapshot_record rec;
    return get->st == ST_OK && snapshot_decode(get->key, get->head, &rec) && !rec.removed;
}

static void look(struct view *v);

static void look_again(struct env_timer *timer)
{
    struct view *v = container_of(timer, struct view, retry);
    v->waits = false;
    look(v);
}

static void looked(struct store_read *read, enum status st)
{
    struct view *v = container_of(read, struct view, read);
    struct volume *vol = v->vol;
    bool unknown = st != ST_OK || (v->get.st != ST_OK && v->get.st != ST_NOTFOUND);
    bool stands = !unknown && view_stands(&v->get);
    store_read_release(read);
    v->reading = false;
    if (unknown && !vol->lost && !vol->closing) {
        v->waits = true;
        v->retry.fire = look_again;
        env_timer_start(vol->shard->env, &v->retry, LOOK_AGAIN_MS);
    } else if (!unknown && !stands) {
        volume_lose(vol, "the snapshot was removed");
    } else if (!v->armed && !vol->lost && !vol->closing) {
        look(v); /* it fired during the read */
    }
    volume_progress(vol);
}

static void fired(struct store_watch *watch)
{
    struct view *v = container_of(watch, struct view, watch);
    v->armed = false;
    if (!v->reading && !v->waits && !v->vol->closing)
        look(v);
}

/* Arms the watch first, so that a removal during the read is not overlooked. */
static void look(struct view *v)
{
    struct shard *s = v->vol->shard;
    if (!v->armed) {
        v->armed = true;
        v->watch = (struct store_watch){.key = key_slice(&v->key), .fired = fired};
        store_watch(s->store, s->env, &v->watch);
    }
    v->reading = true;
    v->get = (struct store_get){.key = key_slice(&v->key)};
    v->read = (struct store_read){.gets = &v->get, .n_gets = 1, .done = looked};
    store_read(s->store, s->env, &v->read);
}

void view_start(struct volume *vol)
{
    struct view *v = vol->view = mem_zalloc(sizeof *v);
    v->vol = vol;
    key_snapshot(&v->key, vol->branch, vol->view_epoch);
    look(v);
}

bool view_quiet(const struct volume *vol)
{
    return !vol->view || !vol->view->reading;
}

void view_stop(struct volume *vol)
{
    struct view *v = vol->view;
    if (!v)
        return;
    CHECK(!v->reading);
    if (v->armed)
        store_watch_stop(&v->watch);
    env_timer_stop(vol->shard->env, &v->retry);
    free(v);
    vol->view = NULL;
}
