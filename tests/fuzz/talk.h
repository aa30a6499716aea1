/*
 * A client's conversation with the server of served.h, and a judge of what it is answered.
 *
 * Whatever the client sends, sense or not, goes through a reading of the protocol of its own,
 * which knows what must be answered: which requests there are, which of them are refused with what,
 * what the changes among them do (model.h). The answers are held against it: each request one
 * final reply and none before it was sent whole, chunks inside the request, in order and covering
 * it, contents as the model allows, extents that tell the truth. What is wrong is a CHECK.
 *
 * A conversation whose handshake is any bytes is not judged (`unjudged`), nor one that used a
 * cookie twice at a time.
 */
#ifndef FUZZ_TALK_H
#define FUZZ_TALK_H

#include <stdbool.h>
#include <stdint.h>

#include "model.h"
#include "served.h"

enum talk_export { TALK_A, TALK_B, TALK_BIG, TALK_A_THEN, TALK_NONE };
#define TALK_EXPORTS 4u

/* What the run has done to the server that clients may notice. */
extern struct talk_weather {
    struct model models[TALK_EXPORTS];
    bool failing; /* the store failed, ever */
    bool full;    /* ... or was full */
    bool hosts;   /* hosts compete for the right to write */
    bool unmodelled; /* somebody may have written who knows what */
    uint64_t received; /* bytes by all clients */
} talk_weather;

enum { TALK_STRUCTURED = 1, TALK_EXTENDED = 2, TALK_BY_NAME = 4, TALK_INFO = 8 };
enum { TALK_ALLOCATION = 1, TALK_DEPTH = 2, TALK_BITMAP = 4 };

struct talk_config {
    const char *host;
    bool is_tcp;
    enum talk_export export;
    unsigned how;      /* TALK_STRUCTURED ... */
    unsigned contexts; /* TALK_ALLOCATION ... */
    bool waits;        /* for the end of the handshake, before anything else is sent */
    bool raw;          /* sends no handshake by itself */
};

struct talk;

/* NULL: there were too many. */
struct talk *talk_open(const struct talk_config *config);
/* The server has closed it. */
void talk_free(struct talk *t);

/* Sends bytes, whatever they are. */
void talk_send(struct talk *t, const uint8_t *bytes, size_t len);

/* A request's header, as the conversation has it, into out[32]; its length. Cookies count up. */
struct talk_request {
    uint16_t command, flags;
    uint64_t offset, length;
};
size_t talk_header(struct talk *t, const struct talk_request *r, uint8_t out[32]);
/* Whether a payload of r->length bytes belongs behind it. */
bool talk_has_payload(const struct talk *t, const struct talk_request *r);

/* Takes and judges what has come, unless the client does not read. */
void talk_hear(struct talk *t);
void talk_set_reading(struct talk *t, bool on);

/* The end, by the client. */
void talk_end(struct talk *t, bool reset);

bool talk_is_serving(const struct talk *t);  /* the handshake is over, the server there */
bool talk_is_closed(const struct talk *t);   /* by the server */
/* It said goodbye, or sent what is no request, or asked for what is not there. */
bool talk_must_end(const struct talk *t);
bool talk_is_judged(const struct talk *t);
unsigned talk_unanswered(const struct talk *t); /* requests that were sent whole */
/* Whether the last answer was a success. */
bool talk_succeeded(const struct talk *t);
uint64_t talk_size(const struct talk *t);
struct link *talk_link(struct talk *t);

#endif
