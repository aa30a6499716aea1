/*
 * The server, begun and ended again and again in one process: what one life leaves behind adds up
 * (test_again.py).
 *
 *     serve_again ROUNDS ARGUMENT...    the arguments are those of fdb-nbd
 *
 * After each round a line says how it ended and what is there then: open descriptors, threads, and
 * bytes that are allocated.
 */
#include <dirent.h>
#include <malloc.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>

#include "cli/cli.h"
#include "store/store.h"

/* Of the sanitizer, where there is one. */
size_t __sanitizer_get_current_allocated_bytes(void) __attribute__((weak));

static size_t allocated_bytes(void)
{
    if (__sanitizer_get_current_allocated_bytes)
        return __sanitizer_get_current_allocated_bytes();
    struct mallinfo2 info = mallinfo2();
    return info.uordblks + info.hblkhd;
}

static unsigned entries(const char *path)
{
    DIR *dir = opendir(path);
    unsigned n = 0;
    while (dir && readdir(dir))
        n++;
    if (dir)
        closedir(dir);
    return n;
}

int main(int argc, char **argv)
{
    if (argc < 3)
        return 2;
    signal(SIGPIPE, SIG_IGN);
    int rounds = atoi(argv[1]), status = 0;
    argv[1] = argv[0];
    for (int i = 0; i < rounds && status == 0; i++) {
        status = cli_main(argc - 1, argv + 1);
        size_t bytes = allocated_bytes();
        printf("status %d descriptors %u threads %u bytes %zu\n", status, entries("/proc/self/fd"),
               entries("/proc/self/task"), bytes);
        fflush(stdout);
    }
    store_shutdown();
    return status;
}
