/*
 * The pages of the index that a transaction is about to change, brought into memory ahead of it.
 *
 * LMDB reads its pages where it needs them, through its map, one after another. Where the index
 * is larger than the memory that is left for it, the commit thread would wait for the disk once
 * for nearly every random write, while the disk could do dozens of such reads at a time. So a few
 * threads look the keys of a transaction up before the commit thread comes to them. They only
 * read; what they find is thrown away. Where the index is in memory that is wasted work: it is
 * done only after a transaction that had to wait for pages, and as long as some have to be waited
 * for, by whomever.
 */
#include <pthread.h>
#include <stdlib.h>
#include <sys/resource.h>

#include "base/mem.h"
#include "store/lmdb/engine.h"

#define WARMERS 8u
#define KEYS_AT_ONCE 16u

/* Fewer waits than this in a transaction, and fewer than one for so many keys, are no matter. */
#define FAULTS_MIN 16u
#define KEYS_PER_FAULT 64u

struct lm_warm {
    struct lm *lm;

    pthread_mutex_t lock;
    pthread_cond_t work_cond, done_cond;
    struct store_commit *const *commits;
    size_t n_commits, commit, mutation; /* the next to be looked up */
    unsigned n_working;
    bool over;     /* the commit thread is through with the keys */
    bool stopping;
    uint64_t faults; /* that the threads waited for in this turn */

    bool wanted; /* the last transaction waited */
    long faults_before;

    unsigned n_threads;
    bool no_threads;
    pthread_t threads[WARMERS];
};

static long thread_faults(void)
{
    struct rusage usage;
    return getrusage(RUSAGE_THREAD, &usage) ? 0 : usage.ru_majflt;
}

/* The next keys to look up. With the lock held. */
static size_t keys_take(struct lm_warm *w, struct slice keys[KEYS_AT_ONCE])
{
    size_t n = 0;
    while (n < KEYS_AT_ONCE && w->commit < w->n_commits && !w->over) {
        const struct store_commit *c = w->commits[w->commit];
        if (w->mutation == c->n_mutations) {
            w->commit++;
            w->mutation = 0;
            continue;
        }
        keys[n++] = c->mutations[w->mutation++].key;
    }
    return n;
}

static void keys_touch(struct lm *lm, const struct slice *keys, size_t n)
{
    struct lm_reader *reader;
    if (lm_read_begin(lm, &reader))
        return;
    for (size_t i = 0; i < n; i++) {
        MDB_val data;
        if (keys[i].len)
            (void)lm_tree_get(&reader->tree, LM_DB_KEYS, keys[i], &data);
    }
    lm_read_end(lm, reader);
}

static void *warmer_thread(void *arg)
{
    struct lm_warm *w = arg;
    struct slice keys[KEYS_AT_ONCE];
    pthread_mutex_lock(&w->lock);
    for (;;) {
        size_t n;
        while (!w->stopping && (n = keys_take(w, keys)) == 0)
            pthread_cond_wait(&w->work_cond, &w->lock);
        if (w->stopping)
            break;
        w->n_working++;
        pthread_mutex_unlock(&w->lock);
        long before = thread_faults();
        keys_touch(w->lm, keys, n);
        long faults = thread_faults() - before;
        pthread_mutex_lock(&w->lock);
        w->faults += (uint64_t)faults;
        if (--w->n_working == 0)
            pthread_cond_signal(&w->done_cond);
    }
    pthread_mutex_unlock(&w->lock);
    return NULL;
}

static bool threads_start(struct lm_warm *w)
{
    while (w->n_threads < WARMERS && !w->no_threads) {
        if (pthread_create(&w->threads[w->n_threads], NULL, warmer_thread, w))
            w->no_threads = true;
        else
            w->n_threads++;
    }
    return w->n_threads > 0;
}

void lm_warm_begin(struct lm_warm *w, struct store_commit *const *commits, size_t n)
{
    w->faults_before = thread_faults();
    if (!w->wanted || !threads_start(w))
        return;
    pthread_mutex_lock(&w->lock);
    w->commits = commits;
    w->n_commits = n;
    w->commit = w->mutation = 0;
    w->faults = 0;
    w->over = false;
    pthread_cond_broadcast(&w->work_cond);
    pthread_mutex_unlock(&w->lock);
}

void lm_warm_end(struct lm_warm *w, uint64_t n_keys)
{
    uint64_t faults = (uint64_t)(thread_faults() - w->faults_before);
    pthread_mutex_lock(&w->lock);
    w->over = true;
    while (w->n_working > 0)
        pthread_cond_wait(&w->done_cond, &w->lock);
    w->n_commits = 0;
    faults += w->faults;
    w->faults = 0;
    pthread_mutex_unlock(&w->lock);
    if (n_keys >= FAULTS_MIN)
        w->wanted = faults >= FAULTS_MIN && faults >= n_keys / KEYS_PER_FAULT;
}

struct lm_warm *lm_warm_new(struct lm *lm)
{
    struct lm_warm *w = mem_zalloc(sizeof *w);
    w->lm = lm;
    pthread_mutex_init(&w->lock, NULL);
    pthread_cond_init(&w->work_cond, NULL);
    pthread_cond_init(&w->done_cond, NULL);
    return w;
}

void lm_warm_free(struct lm_warm *w)
{
    pthread_mutex_lock(&w->lock);
    w->stopping = true;
    pthread_cond_broadcast(&w->work_cond);
    pthread_mutex_unlock(&w->lock);
    for (unsigned i = 0; i < w->n_threads; i++)
        pthread_join(w->threads[i], NULL);
    pthread_mutex_destroy(&w->lock);
    pthread_cond_destroy(&w->work_cond);
    pthread_cond_destroy(&w->done_cond);
    free(w);
}
