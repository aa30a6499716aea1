/* How far a long command has come, and being told to stop; see progress.h. */
#include "cli/progress.h"

#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "base/bytes.h"
#include "base/size.h"
#include "cli/cli.h"

#define DRAW_MS 250u
#define WIDTH_DEFAULT 80u
#define NS_PER_S 1000000000ull

/* --- interruption -------------------------------------------------------------------------- */

static volatile sig_atomic_t signalled;

static void note_signal(int number)
{
    (void)number;
    signalled = 1;
}

void interrupt_catch(void)
{
    /* Once: whoever repeats it does not want to wait for what is under way. */
    struct sigaction action = {.sa_handler = note_signal, .sa_flags = (int)SA_RESETHAND};
    sigemptyset(&action.sa_mask);
    sigaction(SIGINT, &action, NULL);
    sigaction(SIGTERM, &action, NULL);
}

bool interrupted(void)
{
    return signalled != 0;
}

int interrupt_status(void)
{
    cli_error("interrupted; run it again");
    return CLI_FAILED;
}

/* --- the line ------------------------------------------------------------------------------ */

static void format_seconds(uint64_t s, char out[32])
{
    if (s < 3600)
        snprintf(out, 32, "%u:%02u", (unsigned)(s / 60), (unsigned)(s % 60));
    else if (s < 100ull * 3600)
        snprintf(out, 32, "%u:%02u:%02u", (unsigned)(s / 3600), (unsigned)(s / 60 % 60),
                 (unsigned)(s % 60));
    else
        snprintf(out, 32, "%llu days", (unsigned long long)(s / 86400));
}

size_t progress_format(char out[PROGRESS_LINE_BYTES], size_t width, const char *what, uint64_t done,
                       uint64_t total, uint64_t rate, uint64_t elapsed_s)
{
    char a[24], b[24], per_s[24], time[32], amount[80];
    /* What is counted may turn out to be more than was announced. */
    bool known = total > 0 && done <= total;
    bool left = known && rate > 0;
    if (known)
        snprintf(amount, sizeof amount, "%s of %s (%u%%)", size_format(done, a),
                 size_format(total, b), (unsigned)((double)done * 100 / (double)total));
    else
        snprintf(amount, sizeof amount, "%s", size_format(done, a));
    format_seconds(left ? (total - done) / rate : elapsed_s, time);
    int n = snprintf(out, PROGRESS_LINE_BYTES, "%s: %s, %s/s, %s%s", what, amount,
                     size_format(rate, per_s), time, left ? " left" : "");
    size_t len = (size_t)min_u64((uint64_t)n, min_u64(PROGRESS_LINE_BYTES - 1, width));
    out[len] = '\0';
    return len;
}

static size_t terminal_width(void)
{
    struct winsize size;
    if (ioctl(fileno(stderr), TIOCGWINSZ, &size) != 0 || size.ws_col == 0)
        return WIDTH_DEFAULT;
    return size.ws_col;
}

/* Bytes a second since the oldest sample there is. */
static uint64_t recent_rate(const struct progress *p, uint64_t now)
{
    const struct progress_sample *oldest =
        &p->samples[p->n_samples > PROGRESS_SAMPLES ? p->n_samples % PROGRESS_SAMPLES : 0];
    uint64_t ns = now - oldest->at_ns;
    if (p->n_samples == 0 || ns == 0 || p->done < oldest->done)
        return 0;
    return (uint64_t)((double)(p->done - oldest->done) * (double)NS_PER_S / (double)ns);
}

void progress_draw(struct progress *p, uint64_t now_ns)
{
    if (!p->shown)
        return;
    if (p->n_samples == 0)
        p->begun_ns = now_ns;
    char line[PROGRESS_LINE_BYTES];
    /* The last column stays free: a cursor behind it is on the next line on some terminals. */
    size_t len = progress_format(line, terminal_width() - 1, p->what, p->done, p->total,
                                 recent_rate(p, now_ns), (now_ns - p->begun_ns) / NS_PER_S);
    fprintf(stderr, "\r%s%*s", line, p->drawn > len ? (int)(p->drawn - len) : 0, "");
    fflush(stderr);
    p->drawn = len;
    p->samples[p->n_samples++ % PROGRESS_SAMPLES] = (struct progress_sample){now_ns, p->done};
}

static void draw(struct env_timer *timer)
{
    struct progress *p = container_of(timer, struct progress, timer);
    progress_draw(p, env_now_ns(p->env));
    env_timer_start(p->env, &p->timer, DRAW_MS);
}

void progress_begin(struct progress *p, struct env *env, uint64_t total, const char *what, ...)
{
    *p = (struct progress){.total = total, .env = env, .timer = {.fire = draw}};
    va_list args;
    va_start(args, what);
    vsnprintf(p->what, sizeof p->what, what, args);
    va_end(args);
    p->shown = isatty(fileno(stderr));
    if (!p->shown || !env)
        return;
    p->begun_ns = env_now_ns(env);
    p->samples[p->n_samples++] = (struct progress_sample){p->begun_ns, 0};
    env_timer_start(env, &p->timer, DRAW_MS);
}

void progress_wipe(struct progress *p)
{
    if (!p->shown || p->drawn == 0)
        return;
    fprintf(stderr, "\r%*s\r", (int)p->drawn, "");
    fflush(stderr);
    p->drawn = 0;
}

void progress_end(struct progress *p)
{
    if (!p->shown)
        return;
    if (p->env)
        env_timer_stop(p->env, &p->timer);
    progress_wipe(p);
    p->shown = false;
}
