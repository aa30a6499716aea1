/*
 * A load for any NBD server on a unix socket: requests of one size on one
 * connection, so many in flight, for so long, with simple replies. It does as
 * little as it can, so that it is not what is measured.
 *
 *   nbd_load SOCKET EXPORT read|write [key=value ...]
 *     request=BYTES  (131072)        depth=N      in flight (32)
 *     seconds=S      (2)             random=0|1   places (0: one behind the other)
 *     size=BYTES     of the export that is used (all of it)
 *     bytes=N        stop after so many (no limit)
 *     packs=0|1      whether the bytes written compress, about 3 : 1 (0)
 *     from=BYTES     where sequential requests begin (0)
 *     check=0|1      reads: look whether every 4 KiB hold what write= wrote (0)
 *
 * Prints a line of JSON. What it writes is the same each time for the same place up to
 * a choice among some megabytes of noise; every 4 KiB begin with their own address.
 */
#include <errno.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include "base/bytes.h"
#include "base/mem.h"
#include "nbd/proto.h"

#define POOL_BYTES (16u << 20)
#define PAGE 4096u
#define DEPTH_MAX 1024u

static struct {
    bool write, random, packs, check;
    uint32_t request_bytes, depth;
    double seconds;
    uint64_t size, bytes_max, from;
} want = {.request_bytes = 128u << 10, .depth = 32, .seconds = 2};

static int sock;
static uint8_t *pool, *sink;
static uint64_t chance = 0x9e3779b97f4a7c15;
static struct {
    uint64_t offset;
    double sent_s;
} requests[DEPTH_MAX];

static double now_s(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (double)ts.tv_sec + (double)ts.tv_nsec / 1e9;
}

static double cpu_s(void)
{
    struct rusage r;
    getrusage(RUSAGE_SELF, &r);
    return (double)(r.ru_utime.tv_sec + r.ru_stime.tv_sec) +
           (double)(r.ru_utime.tv_usec + r.ru_stime.tv_usec) / 1e6;
}

static uint64_t random_u64(void)
{
    chance ^= chance << 13;
    chance ^= chance >> 7;
    chance ^= chance << 17;
    return chance;
}

static void give_up(const char *what)
{
    fprintf(stderr, "nbd_load: %s\n", what);
    exit(1);
}

static void send_all(struct iovec *iov, int n)
{
    while (n) {
        ssize_t sent = writev(sock, iov, n);
        if (sent <= 0)
            give_up(sent < 0 ? strerror(errno) : "the server closed the connection");
        while (n && (size_t)sent >= iov->iov_len) {
            sent -= (ssize_t)iov->iov_len;
            iov++;
            n--;
        }
        if (n) {
            iov->iov_base = (uint8_t *)iov->iov_base + sent;
            iov->iov_len -= (size_t)sent;
        }
    }
}

static void recv_all(void *to, size_t len)
{
    uint8_t *at = to;
    while (len) {
        ssize_t got = recv(sock, at, len, 0);
        if (got <= 0)
            give_up(got < 0 ? strerror(errno) : "the server closed the connection");
        at += got;
        len -= (size_t)got;
    }
}

static void connect_to(const char *path, const char *export)
{
    struct sockaddr_un to = {.sun_family = AF_UNIX};
    uint8_t greeting[18], info[10];
    snprintf(to.sun_path, sizeof to.sun_path, "%s", path);
    sock = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (sock < 0 || connect(sock, (struct sockaddr *)&to, sizeof to))
        give_up(strerror(errno));
    recv_all(greeting, sizeof greeting);
    if (memcmp(greeting, "NBDMAGICIHAVEOPT", 16) != 0)
        give_up("this is no NBD server of the fixed newstyle");
    size_t len = strlen(export);
    uint8_t *hello = mem_alloc(4 + 16 + len);
    put_be32(hello, 3); /* fixed newstyle, no zeroes */
    memcpy(hello + 4, "IHAVEOPT", 8);
    put_be32(hello + 12, NBD_OPT_EXPORT_NAME);
    put_be32(hello + 16, (uint32_t)len);
    memcpy(hello + 20, export, len);
    send_all(&(struct iovec){hello, 20 + len}, 1);
    free(hello);
    recv_all(info, sizeof info);
    uint64_t size = get_be64(info);
    if (!want.size || want.size > size)
        want.size = size;
}

/* Noise; or of each 64 bytes 16 noise, which lz4 and zstd bring to a third or less. */
static void fill_pool(void)
{
    pool = mem_zalloc(POOL_BYTES);
    for (size_t i = 0; i < POOL_BYTES; i += 8)
        if (!want.packs || i % 64 < 16)
            put_le64(pool + i, random_u64());
}

static void request_send(uint32_t slot, uint64_t offset)
{
    uint8_t head[28];
    requests[slot].offset = offset;
    requests[slot].sent_s = now_s();
    put_be32(head, NBD_REQUEST_MAGIC);
    put_be16(head + 4, 0);
    put_be16(head + 6, want.write ? NBD_CMD_WRITE : NBD_CMD_READ);
    put_be64(head + 8, slot);
    put_be64(head + 16, offset);
    put_be32(head + 24, want.request_bytes);
    struct iovec iov[2] = {{head, sizeof head}, {NULL, 0}};
    if (want.write) {
        uint8_t *data = pool + random_u64() % ((POOL_BYTES - want.request_bytes) / PAGE) * PAGE;
        for (uint32_t at = 0; at < want.request_bytes; at += PAGE)
            put_le64(data + at, offset + at);
        iov[1] = (struct iovec){data, want.request_bytes};
    }
    send_all(iov, want.write ? 2 : 1);
}

static uint32_t reply_take(double *waited_s)
{
    uint8_t head[16];
    recv_all(head, sizeof head);
    if (get_be32(head) != NBD_SIMPLE_REPLY_MAGIC)
        give_up("no simple reply");
    if (get_be32(head + 4))
        give_up("the server answered with an error");
    uint32_t slot = (uint32_t)get_be64(head + 8);
    if (!want.write) {
        recv_all(sink, want.request_bytes);
        for (uint32_t at = 0; want.check && at < want.request_bytes; at += PAGE)
            if (get_le64(sink + at) != requests[slot].offset + at)
                give_up("other bytes than were written");
    }
    *waited_s += now_s() - requests[slot].sent_s;
    return slot;
}

static bool option(const char *word)
{
    const char *value = strchr(word, '=');
    if (!value)
        return false;
    size_t n = (size_t)(value++ - word);
    unsigned long long number = strtoull(value, NULL, 0);
#define IS(name) (n == sizeof name - 1 && memcmp(word, name, n) == 0)
    if (IS("request"))
        want.request_bytes = (uint32_t)number;
    else if (IS("depth"))
        want.depth = (uint32_t)number;
    else if (IS("seconds"))
        want.seconds = strtod(value, NULL);
    else if (IS("random"))
        want.random = number;
    else if (IS("size"))
        want.size = number;
    else if (IS("bytes"))
        want.bytes_max = number;
    else if (IS("packs"))
        want.packs = number;
    else if (IS("from"))
        want.from = number;
    else if (IS("check"))
        want.check = number;
    else
        return false;
#undef IS
    return true;
}

int main(int argc, char **argv)
{
    bool good = argc >= 4 && (strcmp(argv[3], "read") == 0 || strcmp(argv[3], "write") == 0);
    for (int i = 4; i < argc && good; i++)
        good = option(argv[i]);
    if (!good || !want.depth || want.depth > DEPTH_MAX || want.request_bytes < PAGE ||
        want.request_bytes % PAGE || want.request_bytes > POOL_BYTES / 2) {
        fprintf(stderr, "usage: nbd_load SOCKET EXPORT read|write [request=BYTES] [depth=N] "
                        "[seconds=S] [random=0|1] [size=BYTES] [bytes=N] [packs=0|1] "
                        "[from=BYTES] [check=0|1]\n");
        return 2;
    }
    want.write = argv[3][0] == 'w';
    connect_to(argv[1], argv[2]);
    uint64_t n_places = want.size / want.request_bytes, sent = 0, answered = 0;
    uint64_t n_max = want.bytes_max ? want.bytes_max / want.request_bytes : UINT64_MAX;
    if (!n_places)
        give_up("the export is smaller than a request");
    fill_pool();
    sink = mem_alloc(want.request_bytes);
    chance ^= (uint64_t)time(NULL) * 0x2545f4914f6cdd1d;
    uint32_t free_slots[DEPTH_MAX], n_free = 0;
    for (uint32_t i = 0; i < want.depth; i++)
        free_slots[n_free++] = i;
    double begin = now_s(), cpu = cpu_s(), waited_s = 0;
    uint64_t first = want.from / want.request_bytes;
    for (;;) {
        bool sending = sent < n_max && now_s() - begin < want.seconds;
        if (sending && n_free) {
            uint64_t place = want.random ? random_u64() % n_places : (first + sent) % n_places;
            request_send(free_slots[--n_free], place * want.request_bytes);
            sent++;
        } else if (answered < sent) {
            free_slots[n_free++] = reply_take(&waited_s);
            answered++;
        } else {
            break;
        }
    }
    double took = now_s() - begin;
    cpu = cpu_s() - cpu;
    printf("{\"mb_per_s\": %.1f, \"requests_per_s\": %.0f, \"requests\": %llu, \"bytes\": %llu, "
           "\"seconds\": %.3f, \"mean_ms\": %.3f, \"cpu_s\": %.3f, \"next\": %llu}\n",
           (double)(answered * want.request_bytes) / 1e6 / took, (double)answered / took,
           (unsigned long long)answered, (unsigned long long)(answered * want.request_bytes), took,
           answered ? waited_s / (double)answered * 1e3 : 0, cpu,
           (unsigned long long)((first + sent) % n_places * want.request_bytes));
    uint8_t bye[28] = {0};
    put_be32(bye, NBD_REQUEST_MAGIC);
    put_be16(bye + 6, NBD_CMD_DISC);
    send_all(&(struct iovec){bye, sizeof bye}, 1);
    close(sock);
    free(pool);
    free(sink);
    return 0;
}
