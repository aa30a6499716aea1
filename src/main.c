/* fdb-nbd: network block devices whose blocks live in a key-value store. */
#include <fcntl.h>
#include <signal.h>
#include <unistd.h>

#include "base/mem.h"
#include "cli/cli.h"
#include "store/store.h"

/* A standard descriptor that came closed would be given to the first file that is opened. What takes
 * its place can't be used either: reads of 0 fail, and so do writes to 1 and 2. */
static bool hold_standard_descriptors(void)
{
    for (int fd = STDIN_FILENO; fd <= STDERR_FILENO; fd++)
        if (fcntl(fd, F_GETFD) < 0 &&
            open("/dev/null", fd == STDIN_FILENO ? O_WRONLY : O_RDONLY) != fd)
            return false;
    return true;
}

int main(int argc, char **argv)
{
    if (!hold_standard_descriptors())
        return CLI_FAILED;
    /* A client or a pipe that goes away is an error of one write, not the end of the process. */
    signal(SIGPIPE, SIG_IGN);
    mem_give_back();
    int status = cli_main(argc, argv);
    store_shutdown();
    return status;
}
