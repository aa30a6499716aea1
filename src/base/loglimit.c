/* Limits on log lines; loglimit.h says what for. */
#include "base/loglimit.h"

#include <inttypes.h>

void log_limit_tick(struct log_limit *l, uint64_t now_ns)
{
    if (!l->left_out || now_ns - l->window_ns < LOG_LIMIT_WINDOW_NS)
        return;
    log_line(l->level, NULL, NULL, "%s: %" PRIu64 " more were not shown", l->what, l->left_out);
    l->left_out = 0;
}

bool log_limit_may(struct log_limit *l, uint64_t now_ns, uint64_t n)
{
    if (now_ns - l->window_ns >= LOG_LIMIT_WINDOW_NS) {
        log_limit_tick(l, now_ns);
        l->window_ns = now_ns;
        l->shown = 0;
    }
    if (l->shown < l->lines_max) {
        l->shown++;
        return true;
    }
    l->left_out += n;
    return false;
}
