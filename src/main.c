/* fdb-nbd: network block devices whose blocks live in a key-value store. */
#include <signal.h>

#include "cli/cli.h"
#include "store/store.h"

int main(int argc, char **argv)
{
    /* A client or a pipe that goes away is an error of one write, not the end of the process. */
    signal(SIGPIPE, SIG_IGN);
    int status = cli_main(argc, argv);
    store_shutdown();
    return status;
}
