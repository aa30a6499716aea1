/*
 * What the server asks its store for the sake of people: whether it answers, which volumes it has
 * and who owns them, how much space is left.
 *
 * The questions are asked on lane 0, one of each kind at a time, and their answers are kept; other
 * threads ask for them and wait for a moment at most. So a store that is away delays nobody, and
 * however often somebody asks, the store is asked little.
 *
 * Space is also looked at without being asked for, where the store can say how much is left: a
 * line is logged when it becomes short, and the next one when it becomes shorter still.
 */
#ifndef SERVER_INQUIRY_H
#define SERVER_INQUIRY_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "store/store.h"
#include "volume/records.h"

/* Volumes of the store that are kept, by name. */
#define INQUIRY_VOLUMES_MAX 1000u

struct inquiry;
struct server;

struct inquiry_volume {
    char name[NAME_BYTES_MAX + 1];
    char *description;
    uint64_t branch, size, used_bytes;
    uint32_t block_size;
    bool owned, ours;
    struct owner_record owner;
};

struct inquiry_list {
    struct inquiry_volume *volumes;
    size_t n;
    uint64_t total;    /* in the store */
    uint64_t asked_ns; /* env_now_ns of the question; 0: there was no answer yet */
};

/* Before lane 0 runs, whose lanes are open. */
struct inquiry *inquiry_new(struct server *s);
/* Lane 0 stops: asks nothing more. Its thread. */
void inquiry_stop(struct inquiry *q);
/* No reactor runs any more, and what was posted has run. */
void inquiry_free(struct inquiry *q);

/* Asks the store for something small and waits for it, `wait_ms` at most. Gives for how long the
 * oldest question has been without an answer (ms); 0: it answers. Any thread but lane 0's. */
uint64_t inquiry_silent_ms(struct inquiry *q, unsigned wait_ms);

/* The volumes; asked for again where they are older than `age_ms` (many: ten times that), and
 * waited for, `wait_ms` at most. The caller frees it with inquiry_list_free(). Any thread but lane
 * 0's. */
void inquiry_volumes(struct inquiry *q, unsigned age_ms, unsigned wait_ms,
                     struct inquiry_list *out);
void inquiry_list_free(struct inquiry_list *list);

/* Space in the store and its name, as of some seconds ago. False where it did not say yet. */
bool inquiry_space(struct inquiry *q, unsigned wait_ms, struct store_info *out);

#endif
