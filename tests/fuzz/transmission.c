/*
 * The transmission phase with live volumes behind it: up to four clients that do what the input
 * says against one server (served.h), beside two that behave: one on a volume of its own, one on
 * the volume that the others have, too.
 *
 * At stake: what a client sends changes nothing but what it says, whoever else is there (G1, G3,
 * G8), and takes no more than its part (G6); checklist B.
 *
 * An input is the choices of the server, then a list of acts: connections, requests with chosen
 * fields, whole, in part, or damaged; bytes as they are; clients that do not read, or go; time;
 * a store that stops, fails, or is full.
 *
 * Oracle: every answer to everybody is judged (talk.h), contents by a model of the volumes
 * (model.h); who behaves is answered in bounded time; when the clients are gone, nothing is held
 * for them any more, and what can be read is what the model says.
 *
 * Code: src/server/connection.c src/server/transmission.c src/server/leftover.c src/server/output.c
 * src/server/exports.c src/server/lanes.c src/nbd/request.c src/nbd/reply.c src/nbd/reply.h
 */
#include "fuzz.h"

#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "base/mem.h"
#include "served.h"
#include "talk.h"

#define ACTS_MAX 200u
#define ROOM_BYTES (1u << 20)
#define HOSTILE 4u
/* All that hostile clients send, and all that clients read, in one input. */
#define SENT_BYTES_MAX (6u << 20)
#define RECEIVED_BYTES_MAX (10u << 20)
/* Half a write may hold memory that others wait for, for this long. */
#define ANSWERED_WITHIN_MS 45000u
#define PATIENCE_MS 10000u
#define MOMENT_US 2000u
#define LONG_US 500000u

struct player {
    struct talk *talk; /* NULL: none */
    uint64_t opened_ms;
    bool ended;        /* by itself */
    struct talk_request last;
    uint8_t *owed; /* what is left of a request that was sent in part */
    size_t n_owed, owed_at;
};

static struct player hostile[HOSTILE];
static struct talk *own, *beside; /* of those that behave */
static uint64_t sent, seed;
static bool stopped;

/* --- time --------------------------------------------------------------------------------- */

static void release(struct player *p)
{
    talk_free(p->talk);
    free(p->owed);
    *p = (struct player){0};
}

/* The server closes nobody without a reason before some limit of time is over, 10 s all of them. */
static void check_closed(const struct player *p)
{
    CHECK(p->ended || talk_must_end(p->talk) || !talk_is_judged(p->talk) || talk_weather.failing ||
          served_now_ms() - p->opened_ms >= PATIENCE_MS);
}

static void hear_all(void)
{
    for (unsigned i = 0; i < HOSTILE; i++) {
        struct player *p = &hostile[i];
        if (!p->talk)
            continue;
        if (talk_weather.received > RECEIVED_BYTES_MAX)
            talk_set_reading(p->talk, false);
        talk_hear(p->talk);
        if (talk_is_closed(p->talk))
            check_closed(p);
        if (p->ended && talk_is_closed(p->talk))
            release(p);
    }
    if (own)
        talk_hear(own);
    if (beside)
        talk_hear(beside);
}

/* Time passes; clients read what comes now and then. */
static void pass(uint64_t us)
{
    for (uint64_t step = MOMENT_US; us; step = min_u64(2 * step, LONG_US)) {
        uint64_t n = min_u64(us, step);
        served_run_us(n);
        hear_all();
        us -= n;
    }
}

/* --- who behaves -------------------------------------------------------------------------- */

static void open_polite(struct talk **t, enum talk_export export)
{
    struct talk_config config = {.host = "local", .is_tcp = seed & 1, .export = export,
                                 .how = TALK_STRUCTURED, .contexts = TALK_ALLOCATION};
    *t = talk_open(&config);
    uint64_t begun = served_now_ms();
    while (*t && !talk_is_serving(*t) && !talk_is_closed(*t) &&
           served_now_ms() - begun < ANSWERED_WITHIN_MS)
        pass(MOMENT_US);
    CHECK(!*t || talk_is_serving(*t) || talk_weather.failing);
}

/* Bytes that count up, from `first` and then by rows of 256 from `step` more. */
static void fill(uint8_t *out, uint64_t len, uint8_t first, uint8_t step)
{
    uint8_t ramp[512];
    for (unsigned i = 0; i < sizeof ramp; i++)
        ramp[i] = (uint8_t)i;
    for (uint64_t at = 0; at < len; at += 256, first = (uint8_t)(first + step))
        memcpy(out + at, ramp + first, min_u64(256, len - at));
}

static void send_request(struct talk *t, const struct talk_request *r, uint8_t pattern)
{
    uint8_t head[32];
    size_t n = talk_header(t, r, head);
    talk_send(t, head, n);
    if (!talk_has_payload(t, r))
        return;
    uint8_t *payload = mem_alloc(r->length);
    fill(payload, r->length, pattern, 3);
    talk_send(t, payload, r->length);
    free(payload);
}

static bool is_waiting(struct talk **t)
{
    return *t && talk_unanswered(*t) && !talk_is_closed(*t);
}

/* A request of one that behaves, to its end. */
static void ask(struct talk **t, const struct talk_request *r, uint8_t pattern)
{
    if (*t && talk_is_closed(*t)) {
        talk_free(*t);
        *t = NULL;
    }
    if (stopped)
        return;
    if (!*t)
        open_polite(t, t == &own ? TALK_B : TALK_A);
    if (!*t || !talk_is_serving(*t))
        return;
    send_request(*t, r, pattern);
    uint64_t begun = served_now_ms();
    for (uint64_t us = MOMENT_US; is_waiting(t); us *= 2) {
        CHECK(served_now_ms() - begun < ANSWERED_WITHIN_MS);
        pass(min_u64(us, 1000000));
    }
    /* Only where others are on the same volume a connection may have to be made again. */
    CHECK(t != &own || !talk_is_closed(*t));
}

static void act_polite(struct fuzz_input *in, struct talk **t)
{
    static const uint16_t commands[] = {0, 1, 3, 4, 6, 7, 0, 1};
    uint64_t what = fuzz_take(in, 1), where = fuzz_take(in, 1);
    struct talk_request r = {.command = commands[what % 8], .flags = what & 8 ? 1 : 0};
    if (r.command != 3) {
        r.offset = where * 1000;
        r.length = 1 + (what >> 4) * 4000;
    }
    ask(t, &r, (uint8_t)(what * 7 + where));
}

/* --- who does not ------------------------------------------------------------------------- */

static uint64_t take_offset(struct fuzz_input *in, uint64_t size)
{
    uint64_t kind = fuzz_take(in, 1);
    if (kind < 0x80)
        return kind * 4096;
    if (kind < 0xc0)
        return fuzz_take(in, 3);
    if (kind < 0xe0)
        return size - (kind - 0xc0) * 300;
    return kind == 0xff ? UINT64_MAX : fuzz_take(in, 8);
}

static uint64_t take_length(struct fuzz_input *in, uint64_t size)
{
    uint64_t kind = fuzz_take(in, 1);
    if (kind < 0x60)
        return kind;
    if (kind < 0xa0)
        return (kind - 0x5f) * 4096;
    if (kind < 0xd0)
        return fuzz_take(in, 2);
    if (kind < 0xe0)
        return (kind - 0xcf) << 19;
    if (kind < 0xf0)
        return size - fuzz_take(in, 2);
    return kind == 0xff ? UINT64_MAX : kind == 0xfe ? 0xffffffff : fuzz_take(in, 4);
}

static struct talk_request take_request(struct fuzz_input *in, struct talk *t)
{
    static const uint16_t commands[16] = {0, 1, 6, 4, 7, 3, 5, 1, 0, 1, 6, 7, 8, 1, 0, 2};
    uint64_t kind = fuzz_take(in, 1);
    struct talk_request r = {.command = commands[kind % 16]};
    if (kind & 0x80)
        r.flags = (uint16_t)(fuzz_take(in, 1) & 0x7f);
    if (r.command == 1 && !(kind & 0x40))
        r.flags |= 1u << 5; /* taken away below where there is no such thing */
    if (r.command == 1 && !talk_has_payload(t, &(struct talk_request){.flags = 1u << 5}))
        r.flags &= (uint16_t)~(1u << 5);
    if (r.command != 3 || kind & 0x20) {
        r.offset = take_offset(in, talk_size(t));
        r.length = take_length(in, talk_size(t));
    }
    return r;
}

static void send_hostile(struct player *p, const uint8_t *bytes, size_t len)
{
    if (sent + len > SENT_BYTES_MAX || p->ended)
        return;
    sent += len;
    talk_send(p->talk, bytes, len);
}

/* The bytes of a request; the payload is of the input's or a pattern. */
static uint8_t *make_request(struct talk *t, const struct talk_request *r, uint8_t pattern,
                             size_t *len)
{
    uint8_t head[32];
    size_t n = talk_header(t, r, head);
    uint64_t payload = talk_has_payload(t, r) ? min_u64(r->length, SENT_BYTES_MAX) : 0;
    uint8_t *bytes = mem_alloc(n + payload);
    memcpy(bytes, head, n);
    fill(bytes + n, payload, pattern, 5);
    if (r->command == 7 && payload >= 12) {
        memset(bytes + n, 0, payload);
        put_be64(bytes + n, pattern * 1000u);
        for (uint64_t i = 8; i + 4 <= payload; i += 4)
            put_be32(bytes + n + i, (uint32_t)(i / 4 - 1));
    }
    *len = n + payload;
    return bytes;
}

static void act_open(struct fuzz_input *in, struct player *p)
{
    uint64_t how = fuzz_take(in, 1), what = fuzz_take(in, 1);
    static const char *const hosts[] = {"local", "local", "10.0.0.7", "10.0.0.8"};
    static const enum talk_export exports[] = {TALK_A,   TALK_A,      TALK_BIG, TALK_A,
                                               TALK_BIG, TALK_A_THEN, TALK_A,   TALK_NONE};
    if (p->talk)
        return;
    struct talk_config config = {.host = hosts[what >> 3 & 3],
                                 .is_tcp = what & 0x20 || what & 0x10,
                                 .export = exports[what & 7],
                                 .how = how & 15,
                                 .contexts = how >> 4 & 7,
                                 .raw = (what & 0xc0) == 0xc0};
    /* Their volume is "a", where the one that behaves is "local". */
    talk_weather.hosts |= config.is_tcp && what & 0x10;
    p->talk = talk_open(&config);
    p->opened_ms = served_now_ms();
    if (p->talk && !(what & 0x40))
        pass(MOMENT_US);
}

static void act_request(struct fuzz_input *in, struct player *p, bool in_part, bool damaged)
{
    if (!p->talk || p->ended || p->n_owed)
        return;
    size_t len;
    p->last = take_request(in, p->talk);
    uint8_t *bytes = make_request(p->talk, &p->last, (uint8_t)fuzz_take(in, 1), &len);
    if (damaged)
        bytes[fuzz_take(in, 1) % len] ^= (uint8_t)(1u << fuzz_take(in, 1) % 8);
    size_t now = in_part ? fuzz_take(in, 3) % len : len;
    send_hostile(p, bytes, now);
    if (now == len || p->ended) {
        free(bytes);
        return;
    }
    p->owed = bytes;
    p->owed_at = now;
    p->n_owed = len - now;
}

static void act_repeat(struct fuzz_input *in, struct player *p)
{
    uint64_t times = fuzz_take(in, 1), step = fuzz_take(in, 1);
    for (uint64_t i = 0; i < times && p->talk && !p->ended && !p->n_owed; i++) {
        size_t len;
        p->last.offset += step * 512;
        uint8_t *bytes = make_request(p->talk, &p->last, (uint8_t)i, &len);
        bool too_much = sent + len > SENT_BYTES_MAX;
        send_hostile(p, bytes, len);
        free(bytes);
        if (too_much)
            break;
    }
}

static void act_go_on(struct fuzz_input *in, struct player *p)
{
    uint64_t n = fuzz_take(in, 2);
    if (!p->talk || !p->n_owed)
        return;
    n = n ? min_u64(n, p->n_owed) : p->n_owed;
    send_hostile(p, p->owed + p->owed_at, n);
    p->owed_at += n;
    p->n_owed -= n;
    if (p->n_owed)
        return;
    free(p->owed);
    p->owed = NULL;
}

static void act_raw(struct fuzz_input *in, struct player *p)
{
    size_t n = min_u64(fuzz_take(in, 1), fuzz_left(in));
    if (p->talk)
        send_hostile(p, in->at, n);
    in->at += n;
}

static void act_end(struct player *p, bool reset)
{
    if (!p->talk)
        return;
    talk_end(p->talk, reset);
    p->ended = true;
}

static void act_time(struct fuzz_input *in)
{
    static const uint32_t ms[] = {1, 20, 120, 600, 1100, 4000, 11000, 31000};
    pass(1000u * ms[fuzz_take(in, 1) % 8]);
}

static void act_store(struct fuzz_input *in)
{
    switch (fuzz_take(in, 1) % 8) {
    case 0:
    case 1:
    case 2:
        stopped = !stopped;
        served_stop_store(stopped);
        break;
    case 3:
    case 4:
        talk_weather.failing = true;
        served_store_fails(3);
        break;
    case 5:
        served_store_fails(0);
        break;
    case 6:
        talk_weather.full = true;
        served_store_full(true);
        break;
    default:
        served_store_full(false);
        break;
    }
}

static void act(struct fuzz_input *in)
{
    uint64_t what = fuzz_take(in, 1);
    struct player *p = &hostile[what >> 4 & 3];
    switch (what & 15) {
    case 0:
        act_open(in, p);
        break;
    case 1:
    case 2:
        act_request(in, p, false, false);
        break;
    case 3:
        act_request(in, p, true, false);
        break;
    case 4:
        act_go_on(in, p);
        break;
    case 5:
        act_raw(in, p);
        break;
    case 6:
        act_request(in, p, false, true);
        break;
    case 7:
        act_repeat(in, p);
        break;
    case 8:
        act_end(p, what & 0x40);
        break;
    case 9:
        if (p->talk)
            talk_set_reading(p->talk, what & 0x40);
        break;
    case 10:
        if (p->talk)
            link_set_room(talk_link(p->talk), (size_t)1 << fuzz_take(in, 1) % 21);
        break;
    case 11:
        act_time(in);
        break;
    case 12:
        act_store(in);
        break;
    case 13:
        act_polite(in, &own);
        break;
    default:
        act_polite(in, &beside);
        break;
    }
    /* Else it comes together with what is sent next. */
    if (!(what & 0x80))
        pass(MOMENT_US);
}

/* --- the end ------------------------------------------------------------------------------ */

/* Whether somebody is still to be answered, or to be sent away. */
static bool is_owed(void)
{
    for (unsigned i = 0; i < HOSTILE; i++) {
        const struct talk *t = hostile[i].talk;
        if (t && talk_is_judged(t) && !talk_is_closed(t) &&
            (talk_must_end(t) || talk_unanswered(t)))
            return true;
    }
    return false;
}

/* Whoever is still there and reads was answered, and whoever has to go has gone. */
static void check_served(void)
{
    for (unsigned i = 0; i < HOSTILE; i++)
        if (hostile[i].talk) {
            talk_set_reading(hostile[i].talk, true);
            link_set_room(talk_link(hostile[i].talk), ROOM_BYTES);
        }
    for (uint64_t us = 50000; is_owed() && us < 1000u * ANSWERED_WITHIN_MS; us *= 3)
        pass(us);
    CHECK(!is_owed() || talk_weather.received > RECEIVED_BYTES_MAX);
}

static void check_contents(struct talk **t, uint64_t size, const struct model *m)
{
    /* What nobody changed is not all looked at. */
    if (!m->n_effects && !talk_weather.unmodelled)
        size = 8192;
    for (uint64_t at = 0; at < size; at += 65536) {
        struct talk_request r = {.offset = at, .length = min_u64(65536, size - at)};
        ask(t, &r, 0);
        CHECK(*t && talk_is_serving(*t));
    }
}

static void check_released(void)
{
    /* (Who does not read and closes only its own side is ended by TCP, which is not here.) */
    bool reads = talk_weather.received <= RECEIVED_BYTES_MAX;
    for (unsigned i = 0; i < HOSTILE; i++)
        if (hostile[i].talk)
            act_end(&hostile[i], !reads || (i + seed) & 2);
    pass(100000);
    for (unsigned i = 0; i < HOSTILE; i++)
        CHECK(!hostile[i].talk);
    ask(&own, &(struct talk_request){.command = 3}, 0);
    ask(&beside, &(struct talk_request){.command = 3}, 0);
    pass(4000000); /* what is dirty is committed */
    struct served_held held = served_held();
    CHECK(held.connections == (unsigned)(own && !talk_is_closed(own)) +
                                  (unsigned)(beside && !talk_is_closed(beside)));
    CHECK(!held.requests && !held.reply_bytes && !held.ahead_bytes && !held.write_bytes &&
          !held.read_bytes);
    CHECK(held.cache_bytes <= 32u << 20);
}

static void end(struct talk **t)
{
    if (!*t)
        return;
    talk_end(*t, false);
    pass(100000);
    CHECK(talk_is_closed(*t));
    talk_free(*t);
    *t = NULL;
}

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
    (void)argc, (void)argv;
    served_prepare();
    return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct fuzz_input in = fuzz_input(data, size);
    seed = fuzz_take(&in, 1);
    uint64_t how = fuzz_take(&in, 1);
    static const uint64_t slow_ns[] = {0, 0, 1000000, 100000000};
    struct served_config config = {.seed = seed,
                                   .fdb_like = how & 1,
                                   .shared = how & 2,
                                   .slow_ns = slow_ns[how >> 2 & 3]};
    sent = 0;
    stopped = false;
    talk_weather = (struct talk_weather){.models = {[TALK_A] = {served_a, SERVED_A_BYTES, NULL, 0},
                                                    [TALK_B] = {NULL, SERVED_B_BYTES, NULL, 0},
                                                    [TALK_BIG] = {NULL, SERVED_BIG_BYTES, NULL, 0},
                                                    [TALK_A_THEN] = {served_a_then, SERVED_A_BYTES,
                                                                     NULL, 0}}};
    served_begin(&config);
    for (unsigned i = 0; i < ACTS_MAX && fuzz_left(&in); i++)
        act(&in);

    stopped = false;
    served_stop_store(false);
    served_store_fails(0);
    served_store_full(false);
    check_served();
    check_released();
    check_contents(&beside, SERVED_A_BYTES, &talk_weather.models[TALK_A]);
    check_contents(&own, SERVED_B_BYTES, &talk_weather.models[TALK_B]);
    end(&own);
    end(&beside);
    served_end();
    for (unsigned i = 0; i < TALK_EXPORTS; i++)
        model_clear(&talk_weather.models[i]);
    return 0;
}
