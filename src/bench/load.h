/*
 * A load for an NBD server: requests of one size on so many connections, so many in flight on each,
 * and how long they took. It is to be quick enough never to be what is measured.
 *
 * One thread. What can be sent on a connection goes out in one call, and one call takes in all
 * replies that are there; nothing is allocated, copied or made for a request. With one connection
 * each reply is waited for in recv() itself, so that a request alone in flight costs two system
 * calls; with several epoll tells which have replies.
 *
 * The clock is read once for all the replies that one recv() brought, and that is also the time at
 * which the requests that take their places begin. So latencies include what the load itself takes
 * to make and send requests, and, where a socket is full, what they waited for it.
 *
 * Each connection has its own sequence of requests, which depends on the seed alone, and its own
 * part of --bytes; sequential ones also have their own part of the range. One that has come to
 * the end begins again.
 */
#ifndef BENCH_LOAD_H
#define BENCH_LOAD_H

#include <stdbool.h>
#include <stdint.h>

#include "base/status.h"
#include "client/connect.h"
#include "bench/latency.h"

#define LOAD_DEPTH_MAX 1024u
#define LOAD_CONNECTIONS_MAX 256u
#define LOAD_BLOCK_BYTES_MIN 512u
#define LOAD_BLOCK_BYTES_MAX (32u << 20)
#define LOAD_TICK_MS 250u

enum load_op { LOAD_READ, LOAD_WRITE, LOAD_FLUSH, LOAD_OPS };

struct load_options {
    unsigned reads_percent; /* 100: only reads */
    bool sequential;
    uint32_t block_size; /* bytes of each request */
    uint32_t depth, n_connections;
    uint64_t flush_every; /* a FLUSH when so many writes were answered, before the next; 0: never */
    bool fua;
    unsigned compressible;       /* percent of what is written */
    uint64_t time_ns, bytes_max; /* ends at whichever comes first; bytes_max 0: no limit */
    uint64_t start, size;        /* the range of the export that is used; size 0: up to the end */
    uint64_t seed;
    uint64_t timeout_ns; /* for the handshake, and without any reply while one is owed */
    uint32_t server_pid; /* whose CPU time is taken; 0: none */
    /* Called about every LOAD_TICK_MS, and when a signal came: whether to go on. NULL: always. */
    bool (*tick)(void *arg, uint64_t now_ns, uint64_t n_requests);
    void *arg;
};

struct load_result {
    uint64_t size; /* bytes of the range that was used */
    struct latency
        op[LOAD_OPS];        /* of what was answered without error; FLUSH: of flush_every alone */
    uint64_t elapsed_ns;     /* from the first request to the last reply, final flush included */
    uint64_t n_errors;       /* requests answered with an error; the first one ends the run */
    bool flushed;            /* it wrote, and the server knows FLUSH */
    uint64_t final_flush_ns; /* where `flushed` */
    uint64_t client_cpu_ns, server_cpu_ns; /* user and system, all threads, of that time */
    bool server_cpu_known;
};

/* Runs it to its end. ST_OK: `r` is filled. Where the server answered a request with an error, it
 * is filled too, and `e` says which; the status is ST_IO as for all that goes wrong meanwhile.
 * Blocks, and has SIGALRM and the timer that sends it to itself meanwhile. */
enum status load_run(const struct nbd_uri *uri, const struct load_options *o, struct load_result *r,
                     struct err *e);

#endif
