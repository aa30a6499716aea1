#include "volume/ancestry.h"

#include "base/check.h"

static bool add(struct ancestry_record *to, uint64_t branch, uint64_t after, uint64_t upto)
{
    if (after >= upto)
        return true;
    if (to->n_segments == ANCESTRY_MAX)
        return false;
    to->segments[to->n_segments++] = (struct ancestry_segment){branch, after, upto};
    return true;
}

bool ancestry_of_snapshot(const struct ancestry_record *now, uint64_t branch, uint64_t epoch,
                          struct ancestry_record *out)
{
    bool fits = true, own = false;
    *out = (struct ancestry_record){0};
    if (epoch > now->after) {
        own = true;
        fits = add(out, branch, now->after, epoch);
    }
    for (uint32_t i = 0; i < now->n_segments && fits; i++) {
        const struct ancestry_segment *s = &now->segments[i];
        if (s->branch == branch && !own) {
            if (s->after >= epoch)
                continue;
            if (s->upto < epoch)
                return false;
            own = true;
            fits = add(out, branch, s->after, epoch);
        } else {
            fits = add(out, s->branch, s->after, s->upto);
        }
    }
    return fits && own;
}

bool ancestry_of_clone(const struct ancestry_record *now, uint64_t branch, uint64_t epoch,
                       struct ancestry_record *out)
{
    return ancestry_of_snapshot(now, branch, epoch, out) && out->n_segments <= ANCESTRY_STORED_MAX;
}

bool ancestry_roll_back(struct ancestry_record *now, uint64_t branch, uint64_t epoch, uint64_t last)
{
    struct ancestry_record to;
    if (!ancestry_of_snapshot(now, branch, epoch, &to) || to.n_segments > ANCESTRY_STORED_MAX)
        return false;
    to.after = last;
    *now = to;
    return true;
}

bool ancestry_gap(const struct ancestry_record *now, uint64_t branch, uint64_t *after,
                  uint64_t *upto)
{
    uint64_t end = now->after;
    bool found = false;
    for (uint32_t i = 0; i < now->n_segments && now->segments[i].branch == branch; i++) {
        *after = now->segments[i].upto;
        *upto = end;
        found = true;
        end = now->segments[i].after;
    }
    /* Where the oldest own segment does not begin with the first epoch: cannot be, a rollback needs a
     * snapshot of the branch to go back to. */
    CHECK(!found || end == 0);
    return found;
}

void ancestry_close_gap(struct ancestry_record *now, uint64_t branch, uint64_t upto)
{
    uint64_t *newer = &now->after;
    for (uint32_t i = 0; i < now->n_segments && now->segments[i].branch == branch; i++) {
        if (*newer != upto) {
            newer = &now->segments[i].after;
            continue;
        }
        *newer = now->segments[i].after;
        for (uint32_t k = i + 1; k < now->n_segments; k++)
            now->segments[k - 1] = now->segments[k];
        now->n_segments--;
        return;
    }
}

void ancestry_forget_parents(struct ancestry_record *now, uint64_t branch)
{
    uint32_t n = 0;
    while (n < now->n_segments && now->segments[n].branch == branch)
        n++;
    now->n_segments = n;
}

bool ancestry_empty(const struct ancestry_record *now)
{
    return now->after == 0 && now->n_segments == 0;
}
