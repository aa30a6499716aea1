/*
 * What the disk itself gives for single durable writes, as a measure for a write
 * and a FLUSH over NBD: a loop of one pwrite of 4 KiB and one fdatasync, one after
 * the other, round and round a file that was written before, so that a sync moves
 * no metadata.
 *
 *   bare_sync FILE SECONDS
 *
 * Makes FILE (64 MiB), removes it at the end, and prints one line of JSON.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "measure.h"

#define BLOCK_BYTES 4096u
#define N_BLOCKS 16384u
/* The loop ends there, which no disk reaches in a minute. */
#define TIMES_MAX 20000000u

static int by_size(const void *a, const void *b)
{
    const float *x = a, *y = b;
    return (*x > *y) - (*x < *y);
}

static void give_up(const char *what)
{
    fprintf(stderr, "bare_sync: %s: %s\n", what, strerror(errno));
    exit(1);
}

static void write_block(int fd, const uint8_t *block, uint32_t no)
{
    if (pwrite(fd, block, BLOCK_BYTES, (off_t)no * BLOCK_BYTES) != (ssize_t)BLOCK_BYTES)
        give_up("pwrite");
}

int main(int argc, char **argv)
{
    double seconds = argc == 3 ? strtod(argv[2], NULL) : 0;
    if (seconds <= 0) {
        fprintf(stderr, "usage: bare_sync FILE SECONDS\n");
        return 2;
    }
    static uint8_t block[BLOCK_BYTES];
    float *times_us = malloc(TIMES_MAX * sizeof *times_us);
    int fd = open(argv[1], O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    if (fd < 0 || !times_us)
        give_up(argv[1]);
    unlink(argv[1]);
    srandom(1);
    for (uint32_t i = 0; i < BLOCK_BYTES; i++)
        block[i] = (uint8_t)random();
    for (uint32_t no = 0; no < N_BLOCKS; no++)
        write_block(fd, block, no);
    if (fsync(fd) != 0)
        give_up("fsync");

    uint32_t n = 0;
    double begin_s = now_s(), begin_cpu_s = cpu_s(), at_s = begin_s;
    while (at_s - begin_s < seconds && n < TIMES_MAX) {
        block[n % BLOCK_BYTES]++;
        write_block(fd, block, n % N_BLOCKS);
        if (fdatasync(fd) != 0)
            give_up("fdatasync");
        double done_s = now_s();
        times_us[n++] = (float)((done_s - at_s) * 1e6);
        at_s = done_s;
    }
    double cpu_us = (cpu_s() - begin_cpu_s) * 1e6 / n;
    qsort(times_us, n, sizeof *times_us, by_size);
    printf("{\"requests\": %u, \"iops\": %.1f, \"p50_us\": %.1f, \"p99_us\": %.1f, "
           "\"cpu_us\": %.2f}\n",
           n, n / (at_s - begin_s), (double)times_us[n / 2],
           (double)times_us[(uint64_t)n * 99 / 100], cpu_us);
    close(fd);
    free(times_us);
    return 0;
}
