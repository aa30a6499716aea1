/*
 * The small records of the stored layout, between structures and bytes.
 *
 * Each encoded record is: a version byte, its fields (integers little-endian,
 * texts with a 16-bit length in front), and a 64-bit hash over key and record
 * (G5): a record that was moved, cut or flipped does not decode. docs/format.md
 * states every byte.
 */
#ifndef VOLUME_RECORDS_H
#define VOLUME_RECORDS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/bytes.h"
#include "base/process.h"
#include "volume/keys.h"

#define RECORD_BYTES_MAX 8192u
#define DESCRIPTION_BYTES_MAX 1024u
#define HOST_BYTES_MAX 128u
#define STATE_LOGS_MAX 16u
#define SESSION_LOGS_MAX 64u
#define SESSION_ID_BYTES 16u

/* Feature masks as in ext4: a gateway that knows not all of `incompat` must not open; not
 * all of `ro_compat`: not write; `compat`: no matter. */
struct features {
    uint64_t compat, ro_compat, incompat;
};

#define FEATURES_COMPAT_KNOWN 0ull
#define FEATURES_RO_COMPAT_KNOWN 0ull
/* Of a volume: it has, or had, snapshots, or is a clone: rows of several epochs and branches,
 * ("l", ...), ("v", ...) and ("d", ...). */
#define FEATURE_INCOMPAT_HISTORY 1ull
#define FEATURES_INCOMPAT_KNOWN FEATURE_INCOMPAT_HISTORY

enum codec_kind { CODEC_NONE = 0, CODEC_LZ4 = 1, CODEC_ZSTD = 2 };

#define STORE_FORMAT 1u

/* ("m"): of the whole store. */
struct meta_record {
    uint32_t format; /* STORE_FORMAT */
    struct features features;
    uint8_t uuid[16];
    uint64_t created_ns; /* wall clock */
};

/* ("c"): the number the next branch gets; never used twice. */
struct counter_record {
    uint64_t next_branch;
};

/* ("n", NAME). */
struct name_record {
    uint64_t branch;
};

/* ("h", branch). */
struct header_record {
    struct features features;
    uint64_t size;         /* bytes, a multiple of 512 */
    uint32_t block_size;   /* 4096 .. 65536, a power of two */
    uint8_t codec;         /* enum codec_kind */
    uint8_t codec_level;
    uint64_t epoch;        /* the current one, from 1 */
    uint64_t parent_branch, parent_epoch; /* the snapshot it is a clone of; 0, 0: none */
    uint64_t created_ns;
    char description[DESCRIPTION_BYTES_MAX + 1]; /* UTF-8 */
    /* Not 0: an import into the volume is not complete, which makes it what it was at the snapshot of
     * this epoch, or not to be opened. Then a record of version 2. */
    uint64_t import_base;
};

/* Epochs after `after`, up to `upto`, of a branch. */
struct ancestry_segment {
    uint64_t branch, after, upto;
};

/* Clones of clones, and rollbacks that are not cleaned up yet. */
#define ANCESTRY_MAX 64u
/* A record has one less: those of its snapshots have the volume's own epochs besides. */
#define ANCESTRY_STORED_MAX (ANCESTRY_MAX - 1)

/* ("l", branch): where the rows of a volume are that it has not changed itself; only where there
 * is something to say. Of its own branch those of the epochs above `after` count; what has no
 * level-2 row there has that of the first segment (of its newest epoch) that has one. Own epochs
 * between a segment and what follows it in time were rolled back: nothing of them counts. */
struct ancestry_record {
    uint64_t after;
    uint32_t n_segments;
    struct ancestry_segment segments[ANCESTRY_MAX]; /* the nearest first */
};

#define SNAPSHOT_ID_BYTES 16u
#define SNAPSHOTS_MAX 16384u /* of one volume */

/* ("v", branch, epoch): the volume as it was at the end of that epoch. */
struct snapshot_record {
    char name[NAME_BYTES_MAX + 1]; /* unique among those of the volume that are not removed */
    uint8_t id[SNAPSHOT_ID_BYTES]; /* random; stays with the contents in other stores (import) */
    uint8_t removed;               /* it exists no more; what only it holds is being cleared */
    uint64_t size;                 /* bytes */
    uint64_t data_blocks;          /* blocks the index names as data, own and inherited */
    uint64_t created_ns;
};

/* ("d", branch, epoch, child): the snapshot has a clone. */
struct child_record {
    uint64_t created_ns;
};

/* ("o", branch): who may change the volume. All zero session: nobody. */
struct owner_record {
    uint64_t token; /* fencing token: one higher with every change of owner */
    uint8_t session[SESSION_ID_BYTES];
    uint64_t since_ns;
    uint32_t pid;
    char host[HOST_BYTES_MAX + 1];
    char address[HOST_BYTES_MAX + 1]; /* where it listens, or the command's name */
};

/* A write log that may hold records of the volume which are not committed. */
struct log_position {
    uint64_t log_id;
    uint64_t applied_seq; /* records up to here are in the store */
};

/* ("a", branch): written with every generation. */
struct state_record {
    uint64_t generation;  /* number of the last committed generation */
    uint64_t data_blocks; /* blocks the index names as data, own and inherited */
    uint64_t trash_next;  /* number for the next ("t", branch, n) */
    /* The last generation with a client's write, zero or trim in it (clean-up and resizing do not
     * count). Records of version 1 do not say: then that of the last generation. */
    uint64_t changed;
    uint32_t n_logs;      /* in the order they must be replayed */
    struct log_position logs[STATE_LOGS_MAX];
};

enum session_state { SESSION_LIVE = 1, SESSION_FENCED = 2 };

/* ("s", ID). */
struct session_record {
    uint8_t state;
    uint64_t counter;  /* raised by each heartbeat, where the store needs them */
    uint32_t lease_ms; /* standing still for longer means the end, where it does */
    uint64_t started_ns;
    struct process_id process; /* only its pid in records of version 1 */
    char host[HOST_BYTES_MAX + 1];
    char address[HOST_BYTES_MAX + 1];
};

/* ("t", branch, n): keys of the epochs after `after`, up to `epoch`, that the index no longer names, to
 * be removed in batches. No snapshot of an epoch between the two was there when it was written, so
 * the oldest one from `epoch` on, or the volume, is who may name any of them. */
struct trash_record {
    uint64_t after, epoch;
    uint64_t first_block, end_block;
};

/* ("g", branch): a removed volume whose keys are still to be cleared. */
struct removed_record {
    uint64_t removed_ns;
    char name[NAME_BYTES_MAX + 1]; /* it had, for messages */
};

/* What a command asks of a volume's owner, ("q", branch), and its answer, ("r", branch). */
enum mail_kind {
    MAIL_RELEASE = 1,
    MAIL_EVICT = 2,
    MAIL_RESIZE = 3,
    MAIL_SYNC = 4,
    MAIL_SNAPSHOT_CREATE = 5, /* `name`; with a `token`: only in the freeze of that token */
    MAIL_SNAPSHOT_REMOVE = 6, /* `name` */
    MAIL_SNAPSHOT_RENAME = 7, /* `name`, `to` */
    MAIL_FREEZE = 8,          /* changes wait for `number` ms or a MAIL_THAW with the same `token` */
    MAIL_THAW = 9,            /* `token` */
    MAIL_FLATTEN = 10, /* a part, from byte `number` on; answer.number: where the next one begins */
};
#define MAIL_KIND_PLAIN_MAX MAIL_SYNC /* up to here without the fields behind `from` */

struct mail_record {
    uint64_t id; /* random, to match question and answer */
    uint8_t kind;
    uint64_t size;   /* MAIL_RESIZE: the new size in bytes */
    uint8_t shrink;  /* MAIL_RESIZE: smaller is meant */
    char from[HOST_BYTES_MAX + 1]; /* host and pid of the asking command */
    char name[NAME_BYTES_MAX + 1], to[NAME_BYTES_MAX + 1];
    uint8_t snapshot_id[SNAPSHOT_ID_BYTES];
    uint64_t token, number;
};

struct answer_record {
    uint64_t id;
    uint8_t status; /* enum status */
    char text[512]; /* a sentence for a person */
    uint64_t number;
};

/* Each `encode` writes at most RECORD_BYTES_MAX bytes to `out` and returns how many; the
 * hash binds them to `key`. Each `decode` gives false where the bytes are not a whole
 * record of that key, or of a version this build does not know. Any thread. */
#define RECORD_FUNCTIONS(name)                                                                     \
    size_t name##_encode(const struct name##_record *rec, struct slice key,                        \
                         uint8_t out[RECORD_BYTES_MAX]);                                           \
    bool name##_decode(struct slice key, struct slice bytes, struct name##_record *rec);

RECORD_FUNCTIONS(meta)
RECORD_FUNCTIONS(counter)
RECORD_FUNCTIONS(name)
RECORD_FUNCTIONS(header)
RECORD_FUNCTIONS(ancestry)
RECORD_FUNCTIONS(snapshot)
RECORD_FUNCTIONS(child)
RECORD_FUNCTIONS(owner)
RECORD_FUNCTIONS(state)
RECORD_FUNCTIONS(session)
RECORD_FUNCTIONS(trash)
RECORD_FUNCTIONS(removed)
RECORD_FUNCTIONS(mail)
RECORD_FUNCTIONS(answer)

#endif
