/*
 * Changes that the owner of a volume makes: asked of it through its mailbox, or, where the volume
 * has no owner, made by this command as its owner for that moment. Either way a mail record says
 * what is to be done, and the answer is the same.
 */
#ifndef CLI_CHANGE_H
#define CLI_CHANGE_H

#include "cli/run.h"
#include "volume/volume.h"

/* A volume in the hands of a command that changes it. */
struct change {
    struct catalog_entry entry;
    struct volume *vol; /* it is ours, open here; NULL: its owner is asked */
    /* Of the last step: ST_CONFLICT where the volume changed hands meanwhile, and nothing or
     * something was done; what the owner said with its answer; a sentence where it is not ST_OK. */
    enum status st;
    uint64_t number;
    struct err err;

    struct run *run; /* private, from here on */
    struct run_owned *self;
    struct mail_record mail;
    struct catalog_op ask;
    struct vol_history_op op;
    bool done;
};

/* Finds out who owns a volume, and takes it if nobody does, until change_end(), which follows in
 * any case. ST_CONFLICT: somebody was faster. `self` is begun when it is first needed (all zeros
 * before) and the caller's to end after the last change. */
enum status change_begin(struct change *c, struct run *run, struct run_owned *self,
                         const struct catalog_entry *entry);
void change_end(struct change *c);

/* From now on whoever wants a volume that is ours gets it as soon as no step is under way and the loop
 * turns for a moment: for commands that take long. The next step then is ST_CONFLICT. */
void change_yield(struct change *c);

/* One step. Several volumes may each have one under way. */
void change_start(struct change *c, const struct mail_record *mail);
enum status change_wait(struct change *c);

/* The whole of a change of one volume in one step, tried again where it changes hands. */
struct change_plan {
    /* Looks the volume up and whether there is anything to be done, and fills `mail`. What is not
     * CLI_DONE, or `over` being set, ends the command. */
    int (*look)(struct change_plan *plan, struct run *run, struct catalog_entry *entry);
    /* NULL, or what is to be done once it is made, while the volume is still in hand. */
    void (*made)(struct change_plan *plan, struct change *c);
    struct mail_record mail;
    unsigned attempt; /* from 0; later ones may find what an earlier one did */
    bool over;
};

/* Returns the exit status; prints what went wrong. */
int change_volume(struct run *run, struct change_plan *plan);

#endif
