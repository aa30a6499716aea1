/* Moments of the wall clock as people read them: UTC, so that hosts agree. */
#include "base/date.h"

#include <stdio.h>
#include <time.h>

const char *date_format(uint64_t ns, char out[DATE_BYTES])
{
    time_t seconds = (time_t)(ns / 1000000000u);
    struct tm utc;
    if (!gmtime_r(&seconds, &utc) || strftime(out, DATE_BYTES, "%Y-%m-%dT%H:%M:%SZ", &utc) == 0)
        snprintf(out, DATE_BYTES, "?");
    return out;
}
