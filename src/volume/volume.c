/*
 * The life of a volume on its shard: opened for negotiation, owned when needed,
 * closed when the last reference went and everything is committed.
 */
#include <stdlib.h>

#include "volume/internal.h"

static struct volume *find(struct shard *s, uint64_t branch, uint64_t epoch)
{
    list_for_each(l, &s->volumes)
    {
        struct volume *vol = container_of(l, struct volume, link);
        if (vol->branch == branch && vol->view_epoch == epoch)
            return vol;
    }
    return NULL;
}

static unsigned shift_of(uint32_t size)
{
    return (unsigned)__builtin_ctz(size);
}

bool volume_import_unfinished(const struct volume *vol, const struct header_record *h)
{
    /* (The snapshots that were there before are what they were.) */
    return h->import_base && !vol->importing &&
           (!vol->view_epoch || vol->view_epoch > h->import_base);
}

/* Takes over what the header says, at open and when ownership was taken. */
enum status volume_set_header(struct volume *vol, const struct header_record *h, struct err *e)
{
    if (h->features.incompat & ~FEATURES_INCOMPAT_KNOWN)
        return fail(e, ST_FORMAT,
                    "volume %s uses features (mask %#llx) that this version does not know: "
                    "upgrade fdb-nbd on this host",
                    vol->name, (unsigned long long)(h->features.incompat & ~FEATURES_INCOMPAT_KNOWN));
    if (h->features.ro_compat & ~FEATURES_RO_COMPAT_KNOWN)
        vol->read_only = true;
    if (h->block_size < BLOCK_SIZE_MIN || h->block_size > BLOCK_SIZE_MAX ||
        (h->block_size & (h->block_size - 1)) || h->size % 512 || !h->size)
        return fail(e, ST_IO, "volume %s has a header that makes no sense: block size %u, size %llu",
                    vol->name, h->block_size, (unsigned long long)h->size);
    if (volume_import_unfinished(vol, h))
        return fail(e, ST_BUSY,
                    "an import into volume %s is not complete: run it again, or roll the volume back "
                    "to its snapshot before it",
                    vol->name);
    vol->header = *h;
    vol->block_size = h->block_size;
    vol->block_shift = shift_of(h->block_size);
    vol->size = h->size;
    vol->codec = (struct codec){.kind = h->codec, .level = h->codec_level};
    return ST_OK;
}

/* What a view sees: the size and the rows of its snapshot. */
static enum status open_view(struct volume *vol, const struct store_get *ancestry,
                             const struct store_get *snapshot, struct err *e)
{
    struct ancestry_record now = {0};
    struct snapshot_record rec;
    if (!view_stands(snapshot))
        return fail(e, ST_NOTFOUND, "there is no snapshot %s any more", vol->name);
    if (ancestry->st != ST_NOTFOUND &&
        (ancestry->st != ST_OK || !ancestry_decode(ancestry->key, ancestry->head, &now)))
        return fail(e, ST_IO, "the record of where volume %s comes from is damaged", vol->name);
    if (!ancestry_of_snapshot(&now, vol->branch, vol->view_epoch, &vol->ancestry))
        return fail(e, ST_IO, "the record of where volume %s comes from does not fit its snapshot",
                    vol->name);
    bool decoded = snapshot_decode(snapshot->key, snapshot->head, &rec);
    CHECK(decoded);
    vol->size = rec.size;
    vol->data_blocks = rec.data_blocks;
    vol->read_only = vol->served_read_only = true;
    return ST_OK;
}

static void open_read(struct store_read *read, enum status st)
{
    struct volume_open *op = container_of(read, struct volume_open, read);
    struct shard *s = op->shard;
    struct header_record header;
    struct state_record state;
    struct volume *vol = NULL;
    bool state_known = false;

    if (st == ST_OK)
        st = op->gets[0].st;
    if (st == ST_NOTFOUND)
        fail(&op->err, st, "there is no volume %s any more", op->name);
    else if (st != ST_OK)
        fail(&op->err, st, "the header of volume %s can't be read: %s", op->name, status_text(st));
    else if (!header_decode(op->gets[0].key, op->gets[0].head, &header))
        st = fail(&op->err, ST_IO, "the header of volume %s is damaged", op->name);
    if (st == ST_OK && op->gets[1].st == ST_OK)
        state_known = state_decode(op->gets[1].key, op->gets[1].head, &state);
    if (st == ST_OK && find(s, op->branch, op->epoch)) {
        /* Another open of the same volume was faster. */
        store_read_release(read);
        volume_open(s, op);
        return;
    }
    if (st == ST_OK) {
        vol = mem_zalloc(sizeof *vol);
        vol->shard = s;
        vol->branch = op->branch;
        vol->view_epoch = op->epoch;
        vol->served_read_only = op->read_only;
        vol->importing = op->importing;
        vol->closed = op->closed;
        memcpy(vol->name, op->name, sizeof vol->name);
        st = volume_set_header(vol, &header, &op->err);
        if (st == ST_OK && op->epoch)
            st = open_view(vol, &op->gets[2], &op->gets[3], &op->err);
        if (st != ST_OK) {
            free(vol);
            vol = NULL;
        }
    }
    store_read_release(read);
    if (vol) {
        vol->tag = ++s->next_tag;
        vol->refs = 1;
        vol->lineage = 1;
        vol->changed_known = state_known;
        vol->changed = state_known ? state.changed : 0;
        list_init(&vol->parked);
        list_init(&vol->watchers);
        list_init(&vol->reopen);
        for (unsigned i = 0; i < ENTRY_LISTS; i++)
            list_init(&vol->entries[i]);
        list_init(&vol->gens);
        index_init(&vol->index);
        key_owner(&vol->owner_key, vol->branch);
        list_add_tail(&s->volumes, &vol->link);
        if (vol->view_epoch)
            view_start(vol);
    }
    op->vol = vol;
    op->st = st;
    op->done(op);
}

void volume_open(struct shard *shard, struct volume_open *op)
{
    struct volume *vol = find(shard, op->branch, op->epoch);
    op->shard = shard;
    op->vol = NULL;
    op->err.text[0] = 0;
    if (vol && (vol->closing || vol->lost)) {
        list_add_tail(&vol->reopen, &op->link);
        return;
    }
    if (vol) {
        vol->refs++;
        op->vol = vol;
        op->st = ST_OK;
        op->done(op);
        return;
    }
    key_header(&op->keys[0], op->branch);
    op->gets[0] = (struct store_get){.key = key_slice(&op->keys[0])};
    key_state(&op->keys[1], op->branch);
    op->gets[1] = (struct store_get){.key = key_slice(&op->keys[1])};
    if (op->epoch) {
        key_ancestry(&op->keys[2], op->branch);
        op->gets[2] = (struct store_get){.key = key_slice(&op->keys[2])};
        key_snapshot(&op->keys[3], op->branch, op->epoch);
        op->gets[3] = (struct store_get){.key = key_slice(&op->keys[3])};
    }
    op->read = (struct store_read){
        .gets = op->gets, .n_gets = op->epoch ? 4 : 2, .done = open_read};
    store_read(shard->store, shard->env, &op->read);
}

void volume_close(struct volume *vol, void (*done)(void *arg), void *arg)
{
    CHECK(vol->refs > 0);
    if (--vol->refs) {
        if (done)
            done(arg);
        return;
    }
    vol->closing = true;
    vol->close_done = done;
    vol->close_arg = arg;
    volume_progress(vol);
}

void volume_drop_cache(struct volume *vol)
{
    struct blocks *t = &vol->shard->blocks;
    for (unsigned i = 0; i < ENTRY_LISTS; i++)
        list_for_each_safe(l, next, &vol->entries[i])
        {
            struct blk *e = container_of(l, struct blk, in_vol);
            CHECK(e->gen == 0 || vol->lost);
            e->gen = 0;
            blocks_drop(t, e);
        }
    index_destroy(vol);
}

void volume_begin_io(struct volume *vol, struct vol_io *io)
{
    io->vol = vol;
    io->stage = IO_IDLE;
    io->commits_waited = 0;
    io->first = false;
    io->held_bytes = io->held_log = 0;
    io->held_space = (struct store_reservation){0, 0};
    vol->busy++;
    vol->requests++;
    io->tick = vol->shard->tick;
    timeout_start(vol->shard);
}

void volume_end_io(struct volume *vol, struct vol_io *io, enum status st)
{
    io->st = st;
    io->vol = NULL;
    CHECK(vol->busy > 0);
    vol->busy--;
    bool last = io->first && --vol->reads_first == 0;
    io->first = false;
    io->done(io);
    if (last)
        shard_wake_writers(vol->shard);
    volume_progress(vol);
}

static void finish_task(struct env_task *task)
{
    struct vol_io *io = container_of(task, struct vol_io, task);
    volume_end_io(io->vol, io, io->st);
}

void io_finish_soon(struct volume *vol, struct vol_io *io, enum status st)
{
    io->st = st;
    io->task.run = finish_task;
    env_post(vol->shard->env, &io->task);
}

/* Answers everything that waits for a turn that will not come. */
static void fail_waiting(struct volume *vol, struct list *waiters)
{
    struct list failed = LIST_INIT(failed);
    list_for_each_safe(l, next, waiters)
    {
        struct vol_io *io = container_of(l, struct vol_io, link);
        if (io->vol == vol) {
            list_remove(&io->link);
            list_add_tail(&failed, &io->link);
        }
    }
    struct list *l;
    while ((l = list_pop(&failed))) {
        struct vol_io *io = container_of(l, struct vol_io, link);
        io->st = ST_PERM;
        if (io->kind == IO_WRITE)
            write_granted(vol, io);
        else
            volume_end_io(vol, io, ST_PERM);
    }
}

void volume_fail_waiting(struct volume *vol)
{
    fail_waiting(vol, &vol->parked);
    fail_waiting(vol, &vol->shard->write_waiters);
    fail_waiting(vol, &vol->shard->read_waiters);
}

void volume_withdraw(struct volume *vol, bool (*is_meant)(struct vol_io *io, const void *arg),
                     const void *arg)
{
    struct list withdrawn = LIST_INIT(withdrawn);
    list_for_each_safe(l, next, &vol->parked)
    {
        struct vol_io *io = container_of(l, struct vol_io, link);
        if (io->kind != IO_WRITE && is_meant(io, arg)) {
            list_remove(&io->link);
            list_add_tail(&withdrawn, &io->link);
        }
    }
    struct list *l;
    while ((l = list_pop(&withdrawn)))
        volume_end_io(vol, container_of(l, struct vol_io, link), ST_SHUTDOWN);
}

static void fail_parked(struct env_task *task)
{
    struct volume *vol = container_of(task, struct volume, fail_task);
    vol->fail_posted = false;
    fail_waiting(vol, &vol->parked);
    volume_progress(vol);
}

void volume_fail_parked_soon(struct volume *vol)
{
    if (vol->fail_posted || list_empty(&vol->parked))
        return;
    vol->fail_posted = true;
    vol->fail_task.run = fail_parked;
    env_post(vol->shard->env, &vol->fail_task);
}

void volume_tell_watchers(struct volume *vol, const char *why)
{
    struct list told = LIST_INIT(told);
    list_splice_tail(&told, &vol->watchers);
    struct list *l;
    while ((l = list_pop(&told))) {
        struct volume_watcher *w = container_of(l, struct volume_watcher, link);
        list_add_tail(&vol->watchers, &w->link);
        w->lost(w, why);
    }
}

static void lose(struct volume *vol, const char *why)
{
    vol->lost = true;
    vol->ownership = VOL_UNOWNED;
    freeze_end(vol);
    owner_forget(vol);
    cleaner_stop(vol);
    gen_fail_waiters(vol);
    volume_fail_waiting(vol);
    volume_tell_watchers(vol, why);
}

void volume_lose(struct volume *vol, const char *why)
{
    if (vol->lost)
        return;
    if (vol->view_epoch)
        log_volume_info(vol->name, "%s: %s: nothing of it is answered any more", vol->name, why);
    else
        log_volume_error(vol->name,
                         "volume %s: lost: %s; its connections are closed and nothing of it is "
                         "answered", vol->name, why);
    lose(vol, why);
}

unsigned volume_lose_all(struct shard *s)
{
    unsigned n = 0;
    list_for_each_safe(l, next, &s->volumes)
    {
        struct volume *vol = container_of(l, struct volume, link);
        if (vol->lost || (vol->ownership != VOL_OWNED && vol->ownership != VOL_RELEASING))
            continue;
        n++;
        log_volume_debug(vol->name, "volume %s: lost with the session of this server", vol->name);
        lose(vol, "the session of this server ended");
        volume_progress(vol);
    }
    return n;
}

static void volume_free(struct volume *vol)
{
    struct shard *s = vol->shard;
    void (*done)(void *) = vol->close_done;
    void *arg = vol->close_arg;
    struct list reopen = LIST_INIT(reopen);

    owner_forget(vol);
    cleaner_stop(vol);
    view_stop(vol);
    freeze_end(vol);
    volume_drop_cache(vol);
    free(vol->index.table);
    history_forget_all(&vol->history);
    if (vol->closed)
        volume_stats_add(vol->closed, &vol->stats);
    list_splice_tail(&reopen, &vol->reopen);
    list_remove(&vol->link);
    free(vol);
    if (done)
        done(arg);
    struct list *l;
    while ((l = list_pop(&reopen)))
        volume_open(s, container_of(l, struct volume_open, link));
}

static bool may_free(const struct volume *vol)
{
    return vol->closing && !vol->fail_posted && !vol->busy && !vol->fetches &&
           !index_loading(vol) && owner_quiet(vol) && !cleaner_busy(vol) && view_quiet(vol) &&
           (vol->lost ? list_empty(&vol->gens)
                      : vol->ownership == VOL_UNOWNED && !vol->may_be_ours);
}

static void free_task(struct env_task *task)
{
    struct volume *vol = container_of(task, struct volume, free_task);
    vol->free_posted = false;
    if (may_free(vol))
        volume_free(vol);
}

void volume_progress(struct volume *vol)
{
    if (vol->in_progress)
        return;
    vol->in_progress = true;
    if (vol->lost && !list_empty(&vol->gens) && gen_all_quiet(vol))
        gen_free_all(vol);
    if (vol->closing && vol->ownership == VOL_OWNED && !vol->busy)
        owner_release(vol, NULL, NULL);
    owner_progress(vol);
    owner_settle(vol);
    vol->in_progress = false;
    /* Freed from the loop, because whoever called may still look at it. */
    if (may_free(vol) && !vol->free_posted) {
        vol->free_posted = true;
        vol->free_task.run = free_task;
        env_post(vol->shard->env, &vol->free_task);
    }
}

uint64_t volume_size(const struct volume *vol)
{
    return vol->size;
}

uint32_t volume_block_size(const struct volume *vol)
{
    return vol->block_size;
}

uint64_t volume_branch(const struct volume *vol)
{
    return vol->branch;
}

const char *volume_name(const struct volume *vol)
{
    return vol->name;
}

const char *volume_description(const struct volume *vol)
{
    return vol->header.description;
}

uint64_t volume_epoch(const struct volume *vol)
{
    return vol->view_epoch;
}

bool volume_is_owned(const struct volume *vol)
{
    if (vol->view_epoch)
        return !vol->lost;
    return vol->ownership == VOL_OWNED && !vol->shard->in_doubt;
}

uint64_t volume_times_taken(const struct volume *vol)
{
    return vol->times_taken;
}

bool volume_changed_before_taken(const struct volume *vol)
{
    return vol->changed_before_taken;
}

void volume_keep(struct volume *vol, bool on)
{
    vol->kept += on ? 1 : -1u;
}

uint64_t volume_lineage(const struct volume *vol)
{
    return vol->lineage;
}

const char *volume_refusal(const struct volume *vol)
{
    return vol->refusal;
}

void volume_watch_loss(struct volume *vol, struct volume_watcher *w)
{
    list_add_tail(&vol->watchers, &w->link);
}

void volume_unwatch_loss(struct volume_watcher *w)
{
    if (w->link.next)
        list_remove(&w->link);
}

void volume_get_stats(const struct volume *vol, struct volume_stats *stats)
{
    *stats = vol->stats;
    stats->generation = vol->committed_gen;
    stats->data_blocks = vol->data_blocks;
    stats->dirty_bytes = stats->dirty_since_ns = 0;
    list_for_each(l, &vol->gens)
    {
        const struct gen *g = container_of(l, struct gen, link);
        stats->dirty_bytes += g->dirty_bytes;
        if (!stats->dirty_since_ns)
            stats->dirty_since_ns = g->opened_ns;
    }
    stats->cached_bytes = vol->cached_blocks * vol->block_size;
}

struct volume_stats *volume_counts_into(const struct volume *vol)
{
    return vol->closed;
}

void volume_stats_add(struct volume_stats *to, const struct volume_stats *from)
{
    to->cache_hits += from->cache_hits;
    to->cache_misses += from->cache_misses;
    to->hash_errors += from->hash_errors;
    to->commits += from->commits;
    to->commit_retries += from->commit_retries;
    to->timeouts += from->timeouts;
    to->conflicts += from->conflicts;
    to->fencings += from->fencings;
    histogram_gather(&to->commit_time, &from->commit_time);
}
