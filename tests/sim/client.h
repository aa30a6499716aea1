/*
 * NBD clients in the simulator: hosts that read and write one volume over streams of the
 * simulated network, as kernels and virtual machines do, and tell the history what they see.
 *
 * A client has one to three connections to one export. When a connection ends, or answers
 * nothing for too long, what was not answered on it is sent again on another one, to whichever
 * gateway can be reached (as Linux does with nbd-client -persist, and qemu with reconnect-delay).
 * A client may also die, its process or its host, in the middle of sending a write; what it had
 * under way is then given up.
 *
 * The encoding of requests and the reading of replies is the client's own, after the protocol
 * document: the server's is what is under test. An answer that makes no sense is a violation.
 *
 * Clients keep the rules of history.h: one change of a sector at a time. Who writes is the
 * scenario's business: one client at a time, the next one after the one before was given its
 * answers (client_stop) or is dead.
 */
#ifndef TESTS_SIM_CLIENT_H
#define TESTS_SIM_CLIENT_H

#include <stdbool.h>
#include <stdint.h>

#include "history.h"
#include "net.h"
#include "sim_env.h"

#define CLIENT_CONNECTIONS_MAX 3u
#define CLIENT_DEPTH_MAX 32u
#define CLIENT_GATEWAYS_MAX 3u

struct client_counts {
    uint64_t requests;  /* sent, each once however often it was sent again */
    uint64_t answered;  /* in good order */
    uint64_t resends;
    uint64_t refused;   /* changes answered with an error that says nothing was done */
    uint64_t errors;    /* all other errors */
    uint64_t given_up;  /* changes, by error or death */
    uint64_t half_sent; /* writes of which a dying client had sent a part only */
    uint64_t connections, connections_lost, timeouts;
    uint64_t deaths;
    uint64_t snapshot_reads; /* answered; counted as nothing else */
};

/* What the clients of the volume have in common. */
struct clients {
    struct sim *sim;
    struct net *net;
    struct history *history;
    uint32_t n_sectors; /* of the volume, from its begin, that clients use ... */
    uint64_t tail_bytes; /* ... and behind them, where the volume has just these or none */
    unsigned n_gateways;
    unsigned gateways[CLIENT_GATEWAYS_MAX]; /* hosts; where clients are sent to one after another */
    uint64_t served[CLIENT_GATEWAYS_MAX];   /* requests answered from there */
    /* The volume is called one of these; clients try the other one where one is unknown. */
    const char *names[2];
    unsigned name;
    bool cut[CLIENT_GATEWAYS_MAX][NET_HOSTS_MAX]; /* no way between this gateway and that host */
    /* A gateway that does not see the end of a connection ends it by itself when it had to leave
     * it waiting for so long and a bit: whoever goes elsewhere earlier has to say so. */
    uint32_t stale_ms;
    /* Gateways may refuse changes and take later ones of the same connection, and the answer that
     * says so may be lost: that something was sent before something else says nothing then. */
    bool refusals;
    uint32_t last_connection;
    uint8_t *changing; /* per sector: a change that was not given up is under way */
    struct client_counts counts;
    uint64_t hash;       /* of all that clients saw, and when */
    char violation[400]; /* the first; empty: none */
};

void clients_init(struct clients *all, struct sim *sim, struct net *net, struct history *history,
                  uint32_t n_sectors);

/* What a client asks for: one in a hundred; reads are the rest. */
struct client_mix {
    uint8_t writes, zeros, trims, flushes, statuses;
    uint8_t fua;   /* of the changes */
    uint8_t large; /* of the reads and writes: up to 256 KiB */
    uint8_t hot;   /* of all: in a few blocks that everybody wants */
};

struct client_config {
    struct clients *all;
    const char *name;       /* "client 1", for the trace; stays where it is */
    unsigned host;
    unsigned gateway;       /* the first it goes to: an index */
    unsigned n_connections; /* 1 .. CLIENT_CONNECTIONS_MAX */
    uint8_t structured;     /* a bit for each of them: asks for structured replies */
    bool by_offset;         /* requests go to connections by their offset, else at random */
    bool mixes_gateways;    /* a connection that was lost goes elsewhere alone */
    bool only_writes;       /* reads just what it is told to (client_read_all) */
    bool stays;             /* goes to no other gateway than the first */
    /* Reads a snapshot (its number in the history), under these names of it, whatever the volume's
     * is; what is read only is a view, else a clone or what was rolled back to it. 0: the volume. */
    uint32_t snapshot;
    /* What it shows to a read that was sent before then (the world's clock) does not count: it may
     * be taken back, and made again with what is newer. */
    const uint64_t *settled_ns;
    const char *names[2];
    bool read_only;
    unsigned depth;         /* 1 .. CLIENT_DEPTH_MAX requests at once */
    struct client_mix mix;
    /* Requests come in bursts of up to so many, with pauses of up to so long between them. */
    uint32_t burst_max, pause_ms_max;
    uint32_t timeout_ms; /* a connection without an answer to a request for so long is ended */
    uint8_t gives_up;    /* changes that were answered with an error and are not tried again: % */
};

struct client;

/* Begins to connect and, unless `quiet`, to ask. */
struct client *client_start(const struct client_config *config, bool quiet);

/* Asks for nothing more by itself (until client_go); what is under way goes on. */
void client_stop(struct client *c);
void client_go(struct client *c);
/* From now on it rests for moments only. */
void client_hurry(struct client *c);
/* Nothing is under way, and nothing is left to be done of what it was told. */
bool client_is_idle(const struct client *c);
/* Some connection of it is in transmission. */
bool client_is_connected(const struct client *c);
/* Requests answered so far. */
uint64_t client_answered(const struct client *c);
const char *client_name(const struct client *c);
unsigned client_host(const struct client *c);

/* Reads all sectors once, besides what else it does; a flush, once. */
void client_read_all(struct client *c);
void client_flush(struct client *c);

/* Takes no answers for so long. */
void client_do_not_read(struct client *c, uint32_t ms);

/* The service address moved: connections it makes from now on go there. */
void client_turn_to(struct client *c, unsigned gateway);
/* All its connections go there, as far as their end can be heard. */
void client_move(struct client *c, unsigned gateway);
/* Ends one of its connections, as far as that can be heard; it goes on elsewhere. */
void client_lose_connection(struct client *c);

/* No gateway knew its own names, each several times: it is gone. */
bool client_found_nothing(const struct client *c);

/* Says goodbye and closes: it is idle. */
void client_leave(struct client *c);
enum client_death {
    CLIENT_KILLED,      /* its process */
    CLIENT_KILLED_HALF, /* ... in the middle of sending a write */
    CLIENT_VANISHED,    /* its host; where that can't be heard, the other two come to this, too */
};
/* How long its successor has to wait at least, because nobody may know yet: ms. */
uint32_t client_die(struct client *c, enum client_death how);
bool client_is_gone(const struct client *c);

/* What it waits for, for messages. */
void client_describe(const struct client *c, char *out, size_t len);

#endif
