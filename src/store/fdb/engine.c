/* Opening and closing a store in a FoundationDB cluster. */
#include "store/engines.h"

static enum status open_cluster(const char *rest, const struct store_options *options,
                                struct store **out, struct err *e)
{
    (void)options;
    *out = NULL;
    return fail(e, ST_UNAVAIL, "fdb:%s can't be opened yet", rest);
}

const struct store_engine store_engine_fdb = {
    .scheme = "fdb",
    .form = "fdb:[CLUSTER_FILE][?prefix=TEXT]",
    .open = open_cluster,
};
