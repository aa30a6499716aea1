/*
 * The table of engines that store_open() chooses from. An engine adds itself
 * here and nowhere else.
 */
#ifndef STORE_ENGINES_H
#define STORE_ENGINES_H

#include "store/store.h"

struct store_engine {
    const char *scheme; /* what stands before the colon of a URI */
    const char *form;   /* the whole URI as a person would write it */
    /* As store_open(); `rest` is what stands behind the colon. */
    enum status (*open)(const char *rest, const struct store_options *options, struct store **out,
                        struct err *e);
    void (*shutdown)(void); /* as store_shutdown(); may be NULL */
};

extern const struct store_engine store_engine_lmdb, store_engine_fdb;

#endif
