/*
 * A gateway in the simulator: the production server (connections, requests, volume layer,
 * ownership, and on one of the stores the FoundationDB engine) from its lanes downwards, with
 * simulated reactors and wires, as one process that can stop, crash, stand still and come back.
 *
 * A dead gateway is never taken apart: its reactors just never run again, and its memory goes
 * with the process that runs the seed.
 */
#ifndef TESTS_SIM_GATEWAY_H
#define TESTS_SIM_GATEWAY_H

#include "net.h"
#include "store/store.h"
#include "volume/session.h"

/* Where gateways keep their volumes: one of two kinds (stores.h has the choice). */
struct simstore;

struct gateway_config {
    struct net *net;
    struct simstore *store;
    unsigned host;          /* in the network; one gateway process at a time listens there */
    unsigned lanes;         /* 1 .. 3 */
    uint32_t lease_ms;
    uint32_t store_timeout_ms; /* 0: requests wait for the store */
    uint32_t owner_wait_ms, pause_close_ms; /* as in struct server_config */
    uint64_t cache_bytes;
    bool shared;
    int clock_ppm;          /* its clock runs so much faster (slower: negative) than the world's */
};

enum gateway_state { GATEWAY_STARTING, GATEWAY_UP, GATEWAY_STOPPING, GATEWAY_ENDED, GATEWAY_DEAD };

struct gateway;

/* Starts a process: registers its session, opens its lanes and listens; all of that is events of
 * the world. What fails is tried again, as a process would be started again. The name ("gateway
 * 1") is for the trace. Programs with this are linked with log_line, process_self, process_ended,
 * gethostname and getpid wrapped (-Wl,--wrap): each gateway is a process of its own with a host
 * of its own, in the eyes of the program. All here may be called from events, too. */
struct gateway *gateway_start(const struct gateway_config *config, const char *name);
enum gateway_state gateway_state(const struct gateway *g);

/* SIGTERM: as server.c ends a server. GATEWAY_ENDED when it has, GATEWAY_DEAD where the store did
 * not take its last commits in time. A gateway that replaces it on the same host may have been
 * started before. One that has not come up yet just dies of it. */
void gateway_stop(struct gateway *g);
/* kill -9, or the death of its machine: other hosts hear nothing then. Nothing where it is gone. */
void gateway_crash(struct gateway *g, bool host_too);
/* SIGSTOP and SIGCONT. */
void gateway_pause(struct gateway *g);
void gateway_resume(struct gateway *g);
/* Its way to the store: cut, everything it sends waits (or is lost) until healed. (Nothing to cut
 * on SIMSTORE_LOG.) */
void gateway_cut_store(struct gateway *g, bool cut);
/* Its commits take so much longer on their way to the store, and the answers on the way back; 0: as
 * long as others'. (Nothing on SIMSTORE_LOG.) */
void gateway_slow_store(struct gateway *g, uint32_t commit_ms, uint32_t answer_ms);
/* Memory is short: all blocks leave its caches that may. */
void gateway_squeeze(struct gateway *g);
/* While on, it takes volumes from owners that live (session.skip_lease). */
void gateway_use_force(struct gateway *g, bool on);

/* For checks from outside (G4): whether it takes itself for the owner, and would answer, if it
 * ran now. Its owner key in the store may be older than that, and its word to come. */
bool gateway_may_answer(struct gateway *g, uint64_t branch);
/* Whether it is about to take the volume, and can't yet. */
bool gateway_wants(struct gateway *g, uint64_t branch);
/* Whether the store names this gateway's present session as the owner. */
bool gateway_owns_in_store(struct gateway *g, uint64_t branch);
uint64_t gateway_sessions_ended(struct gateway *g);
bool gateway_is_paused(const struct gateway *g);

#endif
