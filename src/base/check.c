/* Assertions that stay on: the failing end. Formats without the log module, so that the
 * log may use CHECK too. */
#include "base/check.h"

#include <stdio.h>
#include <stdlib.h>

_Noreturn void check_failed(const char *condition, const char *file, int line)
{
    fprintf(stderr, "fdb-nbd: internal error: %s does not hold at %s:%d\n", condition, file, line);
    abort();
}
