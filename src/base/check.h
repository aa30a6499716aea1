/*
 * Assertions that stay on in release builds.
 *
 * A block server that goes on after an impossible state writes that state to
 * disk; stopping is the safe answer, because the write log brings back
 * everything that was answered. CHECK is for cheap conditions on boundaries.
 */
#ifndef BASE_CHECK_H
#define BASE_CHECK_H

/* Reports the failed condition on stderr and aborts. Any thread. */
_Noreturn void check_failed(const char *condition, const char *file, int line);

#define CHECK(cond)                                                                                \
    do {                                                                                           \
        if (__builtin_expect(!(cond), 0))                                                          \
            check_failed(#cond, __FILE__, __LINE__);                                               \
    } while (0)

#endif
