/*
 * A simulated network: byte streams between hosts, in the world of sim_env.h.
 *
 * A stream is what TCP makes of a network: bytes arrive in order, in pieces of any size, some
 * time after they were sent, or not at all once it broke. What the reader does not read stays
 * in bounded buffers on both sides, so that the end of a dead client may be seen long after it is
 * gone (G8). What a client's own host still holds does not outlive it here: no server could tell it
 * from the requests of one that lives. Hosts can be cut off from each other: what was
 * under way waits, until the cut is healed or either side gives the stream up.
 *
 * Servers see their ends as wires (server/wire.h, implemented here in place of src/server/wire.c),
 * clients through the calls below.
 */
#ifndef TESTS_SIM_NET_H
#define TESTS_SIM_NET_H

#include "server/reactor.h"
#include "sim_env.h"

struct net;
struct stream;

#define NET_HOSTS_MAX 32u

/* One at a time: the newest is where wire_new() looks for its descriptors. */
struct net *net_new(struct sim *sim);
struct sim *net_sim(const struct net *net);

/* How long bytes are on their way (up to; seldom ten times as long), and one in how many pieces is
 * lost and comes a fraction of a second later (0: none). At first 50 us, none. */
void net_set_delays(struct net *net, uint64_t latency_ns_max, uint32_t loss_one_in);

/* Where connections to `host` end up: `accept` is called as an event of `env` with a number that
 * wire_new() takes as a descriptor, and the caller's host. NULL: nobody listens, connections
 * are refused. A listener of another process on the same host replaces the one before for
 * connections made from now on; NULL with an `env` that is not the listener's changes nothing.
 * Connections that were not accepted when the listener went are reset. A host that had died is
 * back. */
void net_listen(struct net *net, unsigned host, struct sim_env *env,
                void (*accept)(void *arg, int fd, unsigned from_host), void *arg);

/* The client's end. Callbacks are events of the client's `env`; `closed` is the last one and ends
 * the stream, which is not to be used any more. `data`: the bytes are the callee's until it
 * returns; it may send, and go. */
struct stream_events {
    void (*connected)(void *arg);
    void (*data)(void *arg, const uint8_t *bytes, size_t len);
    void (*closed)(void *arg, bool reset); /* the peer's end (FIN), a reset, refused, given up */
};
struct stream *net_connect(struct net *net, struct sim_env *env, unsigned from_host,
                           unsigned to_host, const struct stream_events *events, void *arg);

/* Takes all of it; it goes out as the window allows. */
void stream_send(struct stream *s, const void *bytes, size_t len);
uint64_t stream_unsent(const struct stream *s); /* not yet taken by the other side's host */
/* A client that does not read (false): what comes fills the buffers on both sides. */
void stream_read(struct stream *s, bool on);

/* Three ways to go; after each the stream is not to be used any more and nothing is called.
 * In good order: all that was sent arrives, then the end. As when a process is killed: what had
 * left its host arrives, then the end or a reset. As when a host dies or is cut off for good:
 * nothing more arrives, no end is seen, and the other side's own time limits (TCP_USER_TIMEOUT,
 * keepalive: 20 to 30 s) end it. */
void stream_close(struct stream *s);
void stream_kill(struct stream *s);
void stream_vanish(struct stream *s);

/* Nothing passes between the two hosts (both ways) until healed. */
void net_cut(struct net *net, unsigned host, unsigned other_host, bool cut);

/* All wires of a process that has died: peers that are still reachable see a reset, or the end,
 * behind what had arrived with them; its listener is gone. `env`: any of its reactors. The
 * host's death instead: nobody hears anything. */
void net_process_died(struct net *net, struct sim_env *const *envs, size_t n, bool host_too);

#endif
