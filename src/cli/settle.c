/* Giving space back while a command has the volume; see snapshot.h. */
#include <stdio.h>

#include "cli/progress.h"
#include "cli/snapshot.h"

#define LOOK_MS 20u
#define LOOKS_PER_MEASURE 25u

/* What the store says it uses; 0: it can't. */
static uint64_t bytes_used(struct run *run)
{
    struct store_info info;
    bool known =
        store_info(run->store, &info, NULL) == ST_OK && info.bytes_used != STORE_BYTES_UNKNOWN;
    return known ? info.bytes_used : 0;
}

void snapshot_settle(struct change *c, const char *what)
{
    struct run *run = c->run;
    struct mail_record sync = run_mail(MAIL_SYNC);
    struct progress progress;
    if (!c->vol || !volume_is_owned(c->vol) || volume_is_clean(c->vol))
        return;
    interrupt_catch();
    change_yield(c);
    progress_begin(&progress, run->env, 0, "clearing %s", what);
    uint64_t before = progress.shown ? bytes_used(run) : 0;
    for (unsigned n = 1; volume_is_owned(c->vol) && !volume_is_clean(c->vol) && !interrupted();
         n++) {
        /* What is found to be cleared would lie around until its generation is old enough. */
        change_start(c, &sync);
        if (change_wait(c) == ST_OK)
            run_pause(run, LOOK_MS);
        if (!progress.shown || n % LOOKS_PER_MEASURE != 0)
            continue;
        uint64_t now = bytes_used(run);
        progress.done = before > now ? before - now : 0;
    }
    progress_end(&progress);
    if (interrupted())
        fprintf(stderr,
                "fdb-nbd: interrupted while clearing %s: whoever uses volume \"%s\" next goes "
                "on with it\n",
                what, c->entry.name);
}
