/*
 * The weight of a generation: the most bytes that its commit can have, kept up to date while
 * requests go into it.
 *
 * Engines refuse commits over a size (limits.commit_bytes_max), and what was answered or is
 * about to be can't be taken back. So a generation is sealed before a request that might
 * make its commit too large, although how large its index rows become is known only when they
 * are loaded: each request counts for the longest rows it could change. Counting too much
 * makes a generation smaller than need be, counting too little is a bug that the build of
 * the commit notices (CHECK in generation.c).
 */
#include "volume/internal.h"

/* A mutation beside its value. FoundationDB counts the key three times (as such, and for both
 * ends of the write conflict) and some 64 bytes: with rows' and blocks' keys of up to 32 bytes
 * behind a prefix of up to 66, 358 bytes; a clear counts as a range of its own, up to 464. */
#define MUTATION_BYTES 480u
#define UNIFORM_ROW_BYTES 64u /* a level-2 row of one kind, a trash record */
/* State, header, a snapshot, the ancestry, and the check of the owner key. */
#define RECORDS_BYTES (5 * RECORD_BYTES_MAX)
#define ROW_BLOCKS ((uint64_t)INDEX_FANOUT)
#define ROW2_BLOCKS (ROW_BLOCKS << INDEX_SHIFT)

uint64_t weight_of_mutation(const struct store_mutation *m)
{
    /* The end of a range that is cleared is a key. */
    size_t head_bytes = m->kind == STORE_CLEAR_RANGE ? 0 : m->head.len;
    return MUTATION_BYTES + head_bytes + m->body.len;
}

/* The epoch that the open generation will belong to: those that hold snapshots come first. */
static uint64_t epoch_then(const struct volume *vol)
{
    return vol->header.epoch + vol->snapshots_unbuilt;
}

/* Of a row or block that is written the version of an older epoch may go, where there can be one. */
static uint64_t older_weight(const struct volume *vol)
{
    return epoch_then(vol) > 1 ? MUTATION_BYTES : 0;
}

static uint64_t row1_weight(const struct volume *vol)
{
    /* In a clone a row may name a source of its own for each block. The sources of a volume
     * without a parent are its epochs, and what a damaged row is replaced by. */
    uint64_t sources = vol->header.parent_branch ? INDEX_FANOUT : epoch_then(vol) + 1;
    return MUTATION_BYTES + older_weight(vol) + row1_bytes_max((unsigned)min_u64(sources, INDEX_FANOUT));
}

static uint64_t row2_weight(const struct volume *vol)
{
    uint64_t epoch = epoch_then(vol), branch = 0;
    for (uint32_t i = 0; i < vol->ancestry.n_segments; i++) {
        epoch = max_u64(epoch, vol->ancestry.segments[i].upto);
        branch = vol->branch; /* those of ancestors are lower */
    }
    return MUTATION_BYTES + older_weight(vol) + row2_bytes_max(epoch, branch);
}

static uint64_t head_keys(size_t head_bytes)
{
    return 1 + head_bytes / STORE_KEY_HEAD_BYTES;
}

uint64_t weight_keys_each(const struct volume *vol)
{
    if (epoch_then(vol) == 1 && !vol->ancestry.n_segments)
        return 2;
    return 1 + head_keys(row1_weight(vol)) + head_keys(row2_weight(vol));
}

static uint64_t data_weight(const struct volume *vol, bool full)
{
    return older_weight(vol) + vol->block_size + BLOCK_HEAD_BYTES_MAX + (full ? 0 : mask_bytes_max(vol->block_size));
}

/* Rows of both levels of all blocks in [first, end), which may be many of level 1. */
static uint64_t rows_weight(const struct volume *vol, uint64_t first, uint64_t end)
{
    uint64_t n1 = ((end - 1) / ROW_BLOCKS) - first / ROW_BLOCKS + 1;
    uint64_t n2 = ((end - 1) / ROW2_BLOCKS) - first / ROW2_BLOCKS + 1;
    return n1 * row1_weight(vol) + n2 * row2_weight(vol);
}

/* Blocks of level-1 rows that [first, end) covers in part: they leave the index one by one. */
static uint64_t edge_blocks(uint64_t first, uint64_t end)
{
    uint64_t lead = -first % ROW_BLOCKS, tail = end % ROW_BLOCKS;
    return first / ROW_BLOCKS == end / ROW_BLOCKS ? end - first : lead + tail;
}

static uint64_t rows2_covered(uint64_t first, uint64_t end)
{
    uint64_t from = (first + ROW2_BLOCKS - 1) / ROW2_BLOCKS, to = end / ROW2_BLOCKS;
    return to > from ? to - from : 0;
}

/* A level-2 row of one kind. */
static uint64_t uniform_weight(const struct volume *vol)
{
    return MUTATION_BYTES + older_weight(vol) + UNIFORM_ROW_BYTES;
}

/* A range without the rows at its two ends. */
static uint64_t range_weight(const struct volume *vol, uint64_t first, uint64_t end)
{
    return edge_blocks(first, end) * MUTATION_BYTES +
           (rows2_covered(first, end) + 1) * uniform_weight(vol);
}

static uint64_t range_ends_weight(const struct volume *vol)
{
    return 2 * (row1_weight(vol) + row2_weight(vol));
}

uint64_t weight_of_write(const struct volume *vol, uint64_t first, uint64_t end)
{
    return (end - first) * (MUTATION_BYTES + data_weight(vol, true)) +
           2 * mask_bytes_max(vol->block_size) + rows_weight(vol, first, end);
}

uint64_t weight_of_zeros(const struct volume *vol, uint64_t first, uint64_t end)
{
    uint64_t ends = 2 * (MUTATION_BYTES + data_weight(vol, false));
    if (end - first <= TRIM_EACH_MAX)
        return ends + (end - first) * MUTATION_BYTES + rows_weight(vol, first, end);
    return ends + range_weight(vol, first, end) + range_ends_weight(vol);
}

uint64_t weight_zeros_max(const struct volume *vol)
{
    uint64_t limit = vol->shard->commit_bytes_max;
    if (limit == UINT64_MAX)
        return UINT64_MAX;
    uint64_t ends = weight_of_zeros(vol, 1, 3 * ROW_BLOCKS - 1) + RECORDS_BYTES;
    CHECK(limit > ends + uniform_weight(vol));
    return (limit - ends) / uniform_weight(vol) * ROW2_BLOCKS;
}

uint64_t weight_of_clears(uint64_t n)
{
    return n * MUTATION_BYTES;
}

uint64_t weight_of_row(const struct volume *vol)
{
    return row1_weight(vol) + row2_weight(vol);
}

uint64_t weight_of_record(void)
{
    return MUTATION_BYTES + RECORD_BYTES_MAX;
}

/* Whether the generation has counted this row already. What falls out of the table is counted
 * again. */
static bool row_counted(struct gen *g, unsigned level, uint64_t no)
{
    uint64_t id = no * 2 + level; /* level 1 or 2, so never 0 */
    uint64_t hash = id * 0x9e3779b97f4a7c15u;
    uint64_t *slot = &g->rows_counted[(hash ^ hash >> 29) % GENERATION_ROWS_COUNTED];
    bool was = *slot == id;
    *slot = id;
    return was;
}

static void count_row1(struct gen *g, uint64_t no)
{
    if (row_counted(g, 1, no / ROW_BLOCKS))
        return;
    g->n_rows1++;
    g->weight += row1_weight(g->vol);
}

static void count_row2(struct gen *g, uint64_t no)
{
    if (!row_counted(g, 2, no / ROW2_BLOCKS))
        g->weight += row2_weight(g->vol);
}

void weight_begin(struct gen *g)
{
    g->weight = RECORDS_BYTES;
}

void weight_touch(struct gen *g, uint64_t no)
{
    g->weight += MUTATION_BYTES;
    count_row1(g, no);
    count_row2(g, no);
}

void weight_data(struct gen *g, const struct blk *e)
{
    g->weight += data_weight(g->vol, e->full);
}

void weight_range(struct gen *g, uint64_t first, uint64_t end)
{
    g->weight += range_weight(g->vol, first, end);
    if (first % ROW_BLOCKS)
        count_row1(g, first);
    if (end % ROW_BLOCKS)
        count_row1(g, end - 1);
    if (first % ROW2_BLOCKS)
        count_row2(g, first);
    if (end % ROW2_BLOCKS)
        count_row2(g, end - 1);
}

void weight_clears(struct gen *g, uint64_t n)
{
    g->weight += weight_of_clears(n);
}

void gen_make_fit(struct volume *vol, uint64_t bytes, uint64_t weight)
{
    const struct gen *g = vol->open;
    const struct shard *s = vol->shard;
    if ((g->dirty_bytes && g->dirty_bytes + bytes > s->generation_bytes_max) ||
        g->n_dirty >= GENERATION_BLOCKS_MAX || g->n_ranges >= GENERATION_RANGES_MAX ||
        g->weight + weight > s->commit_bytes_max)
        gen_seal(vol, false);
}
