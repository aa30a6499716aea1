/*
 * One server, all of it in memory and in one thread, made anew for each input: the program's own
 * connections, requests, volumes and session (src/server from its lanes downwards, src/nbd,
 * src/volume) on the clock of tests/sim/sim_env.h, the store of tests/sim/mem_store.h, and wires
 * whose other ends are here. The same calls give the same run.
 *
 * The store has three volumes, made once:
 *
 *   a    256 KiB and 512 bytes, blocks of 4 KiB, with data and holes, and a snapshot "s" from
 *        before some of it
 *   b    64 KiB, blocks of 16 KiB, empty
 *   big  24 MiB, blocks of 64 KiB, empty
 *
 * What is wrong in the server itself is a CHECK: there, or here.
 */
#ifndef FUZZ_SERVED_H
#define FUZZ_SERVED_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define SERVED_A_BYTES ((256u << 10) + 512u)
#define SERVED_B_BYTES (64u << 10)
#define SERVED_BIG_BYTES (24u << 20)

/* What is in "a", and what was in it at its snapshot. */
extern uint8_t served_a[SERVED_A_BYTES], served_a_then[SERVED_A_BYTES];

/* Once: makes the volumes. */
void served_prepare(void);

struct served_config {
    uint64_t seed;   /* of how long the store takes, and how events fall into turns */
    bool fdb_like;   /* no write log, and a lease to keep */
    bool shared;     /* as in struct server_config */
    uint64_t slow_ns; /* the store takes up to so long; 0: moments */
};

void served_begin(const struct served_config *config);
/* In good order, which needs a store that answers. Nothing may be held any more then. */
void served_end(void);

/* Lets so much time pass, and what happens in it. */
void served_run_us(uint64_t us);
uint64_t served_now_ms(void);

/* The store. */
void served_stop_store(bool stopped);
void served_store_fails(uint32_t one_in); /* reads and commits, with ST_IO; 0: never */
void served_store_full(bool full);

/* What is held by the server for its clients just now. */
struct served_held {
    unsigned connections, requests;
    uint64_t reply_bytes, ahead_bytes;   /* waiting replies; what was read ahead */
    uint64_t write_bytes, read_bytes;    /* memory for writes (till they are committed), reads */
    uint64_t cache_bytes;                /* all block buffers */
};
struct served_held served_held(void);

/* --- wires -------------------------------------------------------------------------------- */

/* The client's end of a connection. */
struct link;

/* `host`: shorter than 32 bytes; "local" is this machine. NULL: no more than SERVED_LINKS_MAX. */
#define SERVED_LINKS_MAX 64u
struct link *link_open(const char *host, bool is_tcp);
void link_free(struct link *l); /* ended, if it was not */

/* What the client sends arrives at once. Nothing once the server has closed it. */
void link_send(struct link *l, const void *bytes, size_t len);
/* The server may send so many bytes that were not taken. */
void link_set_room(struct link *l, size_t bytes);
/* What the server sent; *len 0: nothing. link_took() makes room. */
const uint8_t *link_received(const struct link *l, size_t *len);
void link_took(struct link *l, size_t len);
/* The client sends no more, or is gone with a reset. */
void link_end(struct link *l, bool reset);
/* The server has closed its end. */
bool link_is_closed(const struct link *l);

#endif
