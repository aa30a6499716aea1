#include "volume/usage.h"

#include <stdlib.h>

#include "base/mem.h"

static struct usage *usage_of(struct walk *w)
{
    return container_of(w, struct usage, walk);
}

static bool walk_go_on(struct walk *w)
{
    struct usage *u = usage_of(w);
    return u->go_on(u);
}

/* Whether a state names a block that none before it can name. */
static bool born(const struct usage *u, size_t state, const struct row_source *src)
{
    uint64_t before = state ? u->walked[state - 1].epoch : 0;
    return src->branch == u->entry->branch && src->epoch > before;
}

static void walk_row1(struct walk *w, size_t state, uint64_t no, const struct walk_row *before,
                      const struct walk_row *now)
{
    struct usage *u = usage_of(w);
    struct usage_state *s = &u->states[state];
    uint64_t branch = u->entry->branch;
    (void)no;
    if (now->found != ROW_THERE || before->found != ROW_THERE) {
        u->uncertain = true;
        return;
    }
    for (unsigned i = 0; i < INDEX_FANOUT; i++) {
        const struct row_source *is = row1_data(now->row, i), *was = row1_data(before->row, i);
        if (is && was && is->branch == was->branch && is->epoch == was->epoch)
            continue;
        if (is) {
            s->inherited += is->branch != branch;
            s->born += born(u, state, is);
        }
        if (was && state > 0) {
            s->inherited -= was->branch != branch;
            s[-1].exclusive += born(u, state - 1, was);
        }
    }
}

static enum status ancestry_read(struct usage *u, struct ancestry_record *out, struct err *e)
{
    struct key key;
    key_ancestry(&key, u->entry->branch);
    struct store_get get = {.key = key_slice(&key)};
    struct walk_read r = {.read = {.gets = &get, .n_gets = 1}};
    enum status st = walk_read(&r, u->store, u->env, u->run_once);
    *out = (struct ancestry_record){0};
    if (st != ST_OK)
        fail(e, st, "cannot read the store: %s", status_text(st));
    else if (get.st != ST_NOTFOUND && (get.st != ST_OK || !ancestry_decode(get.key, get.head, out)))
        st = fail(e, ST_IO, "the record of its ancestry is damaged");
    store_read_release(&r.read);
    return st;
}

/* What has neither snapshots nor a parent has all it names for itself. */
static bool alone(struct usage *u)
{
    struct usage_state *s = &u->states[0];
    if (u->n_snapshots || u->entry->header.parent_branch)
        return false;
    s->named = s->born = s->exclusive = u->entry->state.data_blocks;
    return true;
}

enum status usage_run(struct usage *u, struct err *e)
{
    size_t n = u->n_snapshots + 1;
    uint64_t size = u->entry->header.size;
    u->uncertain = false;
    u->states = mem_zalloc(n * sizeof *u->states);
    if (alone(u))
        return ST_OK;
    struct ancestry_record *ancestry = mem_alloc(sizeof *ancestry);
    u->walked = mem_zalloc(n * sizeof *u->walked);
    for (size_t i = 0; i < u->n_snapshots; i++) {
        u->walked[i].epoch = u->snapshots[i].epoch;
        size = max_u64(size, u->snapshots[i].rec.size);
    }
    u->walked[n - 1].epoch = u->entry->header.epoch;
    u->walk = (struct walk){.store = u->store,
                            .env = u->env,
                            .run_once = u->run_once,
                            .branch = u->entry->branch,
                            .ancestry = ancestry,
                            .n_blocks = size / u->entry->header.block_size + 1,
                            .states = u->walked,
                            .n_states = n,
                            .go_on = walk_go_on,
                            .row1 = walk_row1};
    enum status st = ancestry_read(u, ancestry, e);
    if (st == ST_OK)
        st = walk_run(&u->walk, e);
    uint64_t inherited = 0;
    for (size_t i = 0; i < n; i++) {
        struct usage_state *s = &u->states[i];
        s->named = u->walked[i].n_data;
        u->uncertain |= u->walked[i].uncertain;
        /* So far only the difference to the one before. */
        s->inherited = inherited += s->inherited;
    }
    u->states[n - 1].exclusive = u->states[n - 1].born;
    free(u->walked);
    u->walked = NULL;
    free(ancestry);
    return st;
}

void usage_free(struct usage *u)
{
    free(u->states);
    u->states = NULL;
}
