/*
 * Looking at LMDB's map where the disk may not give a page.
 *
 * What can't be read of a mapped file is no error of a call but a SIGBUS, which ends the process with
 * all of its volumes: for one sector that is lost, or a file that somebody cut short. So whoever is
 * about to follow a page (tree.c) has it brought in here first, where the signal is waited for. LMDB
 * itself comes only to pages that were looked at before (guard.c).
 */
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdatomic.h>

#include "base/check.h"
#include "store/lmdb/engine.h"

#define STEP_BYTES 4096u /* no machine's pages are smaller */

/* Where this thread goes on if what it touches is not there; NULL: it touches nothing. */
static _Thread_local sigjmp_buf *volatile waiting;
static struct sigaction before;

static void on_sigbus(int number, siginfo_t *info, void *context)
{
    (void)info, (void)context;
    if (waiting)
        siglongjmp(*waiting, 1);
    /* Not ours. It comes again when this returns. */
    sigaction(number, &before, NULL);
}

void lm_touch_begin(void)
{
    static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
    /* SA_NODEFER: the handler is left without returning, and the mask is not put back then. */
    struct sigaction ours = {.sa_sigaction = on_sigbus, .sa_flags = SA_SIGINFO | SA_NODEFER}, now;
    pthread_mutex_lock(&lock);
    CHECK(sigaction(SIGBUS, NULL, &now) == 0);
    if (!(now.sa_flags & SA_SIGINFO) || now.sa_sigaction != on_sigbus) {
        before = now;
        CHECK(sigaction(SIGBUS, &ours, NULL) == 0);
    }
    pthread_mutex_unlock(&lock);
}

bool lm_touch(const uint8_t *p, size_t len)
{
    sigjmp_buf env;
    if (sigsetjmp(env, 0)) {
        waiting = NULL;
        return false;
    }
    waiting = &env;
    atomic_signal_fence(memory_order_seq_cst);
    for (size_t at = 0; at < len; at += STEP_BYTES)
        (void)*(const volatile uint8_t *)(p + at);
    atomic_signal_fence(memory_order_seq_cst);
    waiting = NULL;
    return true;
}
