/*
 * An environment for tests of the store: one thread that waits on a condition,
 * with a few workers. No event loop, no timers (the store uses none).
 */
#ifndef TESTS_ENV_TEST_H
#define TESTS_ENV_TEST_H

#include <pthread.h>
#include <stdbool.h>
#include <string.h>
#include <sys/random.h>
#include <time.h>

#include "base/check.h"
#include "base/env.h"

#define TEST_WORKERS 2

struct test_env {
    struct env env;
    pthread_mutex_t lock;
    pthread_cond_t posted, work_there;
    struct env_task *first, **last;
    struct env_work *work_first, **work_last; /* linked through impl[0] */
    pthread_t workers[TEST_WORKERS];
    bool stopping;
};

static inline struct test_env *test_env_of(struct env *env)
{
    return (struct test_env *)(void *)env;
}

static inline uint64_t test_env_now(struct env *env)
{
    (void)env;
    struct timespec ts;
    clock_gettime(CLOCK_BOOTTIME, &ts);
    return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}

static inline void test_env_post(struct env *env, struct env_task *task)
{
    struct test_env *t = test_env_of(env);
    pthread_mutex_lock(&t->lock);
    task->next = NULL;
    *t->last = task;
    t->last = &task->next;
    pthread_cond_signal(&t->posted);
    pthread_mutex_unlock(&t->lock);
}

static inline void test_env_work(struct env *env, struct env_work *work)
{
    struct test_env *t = test_env_of(env);
    pthread_mutex_lock(&t->lock);
    work->impl[0] = NULL;
    *t->work_last = work;
    t->work_last = (struct env_work **)(void *)&work->impl[0];
    pthread_cond_signal(&t->work_there);
    pthread_mutex_unlock(&t->lock);
}

static inline void test_env_work_done(struct env_task *task)
{
    /* impl[1] and impl[2] hold the task that brings the work back. */
    struct env_work *work = container_of(task, struct env_work, impl[1]);
    work->done(work);
}

static inline void *test_env_worker(void *arg)
{
    struct test_env *t = arg;
    for (;;) {
        pthread_mutex_lock(&t->lock);
        while (!t->work_first && !t->stopping)
            pthread_cond_wait(&t->work_there, &t->lock);
        struct env_work *work = t->work_first;
        if (work) {
            t->work_first = work->impl[0];
            if (!t->work_first)
                t->work_last = &t->work_first;
        }
        pthread_mutex_unlock(&t->lock);
        if (!work)
            return NULL;
        work->work(work);
        struct env_task *task = (struct env_task *)(void *)&work->impl[1];
        task->run = test_env_work_done;
        test_env_post(&t->env, task);
    }
}

static inline void test_env_random(struct env *env, void *out, size_t len)
{
    (void)env;
    CHECK(getrandom(out, len, 0) == (ssize_t)len);
}

static inline void test_env_start(struct test_env *t)
{
    static const struct env_ops ops = {
        .now_ns = test_env_now,
        .realtime_ns = test_env_now,
        .post = test_env_post,
        .work = test_env_work,
        .random = test_env_random,
    };
    memset(t, 0, sizeof *t);
    t->env.ops = &ops;
    t->last = &t->first;
    t->work_last = &t->work_first;
    pthread_mutex_init(&t->lock, NULL);
    pthread_cond_init(&t->posted, NULL);
    pthread_cond_init(&t->work_there, NULL);
    for (int i = 0; i < TEST_WORKERS; i++)
        CHECK(pthread_create(&t->workers[i], NULL, test_env_worker, t) == 0);
}

static inline void test_env_stop(struct test_env *t)
{
    pthread_mutex_lock(&t->lock);
    t->stopping = true;
    pthread_cond_broadcast(&t->work_there);
    pthread_mutex_unlock(&t->lock);
    for (int i = 0; i < TEST_WORKERS; i++)
        pthread_join(t->workers[i], NULL);
    pthread_mutex_destroy(&t->lock);
    pthread_cond_destroy(&t->posted);
    pthread_cond_destroy(&t->work_there);
}

/* Runs one posted task; waits up to `wait_ms` for it. False: none came. */
static inline bool test_env_step(struct test_env *t, unsigned wait_ms)
{
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until);
    uint64_t ns = (uint64_t)until.tv_nsec + (uint64_t)wait_ms * 1000000u;
    until.tv_sec += (time_t)(ns / 1000000000u);
    until.tv_nsec = (long)(ns % 1000000000u);
    pthread_mutex_lock(&t->lock);
    int rc = 0;
    while (!t->first && rc == 0)
        rc = pthread_cond_timedwait(&t->posted, &t->lock, &until);
    struct env_task *task = t->first;
    if (task) {
        t->first = task->next;
        if (!t->first)
            t->last = &t->first;
    }
    pthread_mutex_unlock(&t->lock);
    if (task)
        task->run(task);
    return task != NULL;
}

/* Runs tasks until *flag is set; gives up, with an abort, after a minute. */
static inline void test_env_until(struct test_env *t, const bool *flag)
{
    uint64_t end = test_env_now(&t->env) + 60000000000u;
    while (!*flag) {
        test_env_step(t, 200);
        CHECK(*flag || test_env_now(&t->env) < end);
    }
}

#endif
