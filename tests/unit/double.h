/*
 * For doubles of library calls in a test program. One whose name the headers change where file
 * offsets have 64 bits is declared with a label, under both names.
 */
#ifndef TESTS_DOUBLE_H
#define TESTS_DOUBLE_H

#include <dlfcn.h>
#include <string.h>

#include "base/check.h"

/* The real call `name` into the function pointer at `out`. */
static inline void real(const char *name, void *out)
{
    void *f = dlsym(RTLD_NEXT, name);
    CHECK(f);
    memcpy(out, &f, sizeof f);
}

#endif
