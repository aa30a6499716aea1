/* What SIGHUP reads anew; reload.h says how. */
#include "server/reload.h"

#include <signal.h>
#include <unistd.h>

#include "base/check.h"
#include "base/log.h"
#include "server/notify.h"

static volatile sig_atomic_t asked_early, started_on_terminal;

static void on_early_hangup(int number)
{
    if (started_on_terminal && !isatty(STDERR_FILENO)) {
        signal(number, SIG_DFL);
        raise(number);
    }
    asked_early = 1;
}

void reload_keep_early(void)
{
    struct sigaction action = {.sa_handler = on_early_hangup, .sa_flags = SA_RESTART};
    started_on_terminal = isatty(STDERR_FILENO);
    sigaction(SIGHUP, &action, NULL);
}

bool reload_was_asked_for_early(void)
{
    return asked_early;
}

void reload_init(struct reload *r, struct env *env)
{
    *r = (struct reload){.env = env};
}

void reload_add(struct reload *r, struct reload_hook hook)
{
    CHECK(r->n < RELOAD_HOOKS_MAX);
    r->hooks[r->n++] = hook;
}

static void load_all(struct env_work *work)
{
    struct reload *r = container_of(work, struct reload, work);
    for (size_t i = 0; i < r->n; i++) {
        struct reload_hook *hook = &r->hooks[i];
        hook->err = (struct err){0};
        hook->st = hook->load(hook->arg, &hook->loaded, &hook->err);
    }
}

static void use_all(struct env_work *work)
{
    struct reload *r = container_of(work, struct reload, work);
    r->busy = false;
    for (size_t i = 0; i < r->n; i++) {
        struct reload_hook *hook = &r->hooks[i];
        if (hook->st != ST_OK) {
            log_error("%s stay as they were, the new ones are not used: %s", hook->what,
                      hook->err.text);
        } else if (r->ended) {
            hook->drop(hook->loaded);
        } else {
            hook->use(hook->arg, hook->loaded);
            log_info("%s were read again and are in use", hook->what);
        }
        hook->loaded = NULL;
    }
    if (r->ended)
        return;
    notify_ready();
    if (r->again)
        reload_begin(r);
}

void reload_begin(struct reload *r)
{
    r->again = r->busy;
    if (r->busy)
        return;
    notify_reloading();
    if (r->n == 0) {
        log_info("SIGHUP: this server has neither access rules nor TLS credentials to read again");
        notify_ready();
        return;
    }
    r->busy = true;
    r->work = (struct env_work){.work = load_all, .done = use_all};
    env_work(r->env, &r->work);
}

void reload_end(struct reload *r)
{
    r->ended = true;
}
