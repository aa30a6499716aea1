/*
 * Opens stores one after the other, as a server that starts on them would, and shows what is in
 * them: the quick way through thousands of images of a disk after a cut (test_prefixes.py).
 *
 * Each line of the input is a folder. The store in it is opened (made, if it is not there), a
 * session and a write log are begun, and every volume and every snapshot is read to its end,
 * which takes the volume over and replays the log of whoever had it. Behind a blank and "recover"
 * all that the dead left is recovered before, as at the start of a server. Then all is closed.
 * For each folder this is written:
 *
 *     volume NAME SIZE N\n        NAME@SNAPSHOT for a snapshot
 *     damaged OFFSET LENGTH\n     before that line: a part of the volume that can't be read
 *     N times: number of a page (8 bytes, little-endian), the page (PAGE_BYTES)
 *     failed SENTENCE\n           something did not work
 *     end\n
 *
 * The pages are those which differ from what was last shown under that name, in the beginning zeros.
 */
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "base/bytes.h"
#include "base/log.h"
#include "base/mem.h"
#include "cli/run.h"
#include "server/reactor.h"
#include "volume/recovery.h"
#include "volume/volume.h"

#define PAGE_BYTES 4096u
#define SHOWN_MAX 64u
#define VOLUME_BYTES_MAX (64ull << 20)
#define LOG_BYTES (4ull << 20)
#define LEASE_MS 10000u

/* The images are in memory, where setting space aside means clearing it: that took most of the
 * time. Here a file only gets longer. */
int double_fallocate(int fd, int mode, off_t at, off_t len) __asm__("fallocate");
int double_fallocate64(int fd, int mode, off_t at, off_t len) __asm__("fallocate64");

int double_fallocate(int fd, int mode, off_t at, off_t len)
{
    struct stat sb;
    if (mode != 0)
        return (int)syscall(SYS_fallocate, fd, mode, at, len);
    if (fstat(fd, &sb) < 0)
        return -1;
    return sb.st_size < at + len ? ftruncate(fd, at + len) : 0;
}

int double_fallocate64(int fd, int mode, off_t at, off_t len)
{
    return double_fallocate(fd, mode, at, len);
}

/* What was shown under a name. */
struct shown {
    char name[FULL_NAME_BYTES];
    uint8_t *bytes; /* VOLUME_BYTES_MAX */
};

static struct shown shown[SHOWN_MAX];
static uint8_t now[VOLUME_BYTES_MAX];

static struct shown *shown_as(const char *name)
{
    struct shown *s = shown;
    while (s->name[0] && strcmp(s->name, name) != 0)
        if (++s == shown + SHOWN_MAX)
            abort();
    if (!s->name[0]) {
        snprintf(s->name, sizeof s->name, "%s", name);
        s->bytes = mem_zalloc(VOLUME_BYTES_MAX);
    }
    return s;
}

static void show(const char *name, uint64_t size)
{
    struct shown *s = shown_as(name);
    uint64_t n = 0, end = round_up_u64(size, PAGE_BYTES);
    memset(now + size, 0, end - size);
    for (uint64_t at = 0; at < end; at += PAGE_BYTES)
        n += memcmp(now + at, s->bytes + at, PAGE_BYTES) != 0;
    printf("volume %s %llu %llu\n", name, (unsigned long long)size, (unsigned long long)n);
    for (uint64_t at = 0; at < end; at += PAGE_BYTES) {
        if (memcmp(now + at, s->bytes + at, PAGE_BYTES) == 0)
            continue;
        uint8_t number[8];
        put_le64(number, at / PAGE_BYTES);
        fwrite(number, sizeof number, 1, stdout);
        fwrite(now + at, PAGE_BYTES, 1, stdout);
        memcpy(s->bytes + at, now + at, PAGE_BYTES);
    }
}

static void failed(const char *what, const struct err *e)
{
    printf("failed %s: %s\n", what, e->text);
}

/* --- reading ------------------------------------------------------------------------------- */

struct reading {
    struct vol_io io;
    bool done;
};

static void answered(struct vol_io *io)
{
    container_of(io, struct reading, io)->done = true;
}

static void read_part(struct run *run, struct volume *vol, uint64_t at, uint64_t len)
{
    static struct vol_seg segs[VOL_SEGS(VOLUME_READ_BYTES_MAX, 4096)];
    struct reading r = {.io = {.done = answered,
                               .offset = at,
                               .length = len,
                               .segs = segs,
                               .segs_cap = sizeof segs / sizeof segs[0]}};
    if (!volume_read(vol, &r.io))
        run_until(run, &r.done);
    if (r.io.st != ST_OK) {
        printf("damaged %llu %llu\n", (unsigned long long)at, (unsigned long long)len);
        memset(now + at, 0, len);
        return;
    }
    for (uint32_t i = 0; i < r.io.n_segs; i++) {
        const struct vol_seg *seg = &r.io.segs[i];
        if (seg->buf)
            memcpy(now + at, seg->buf->data + seg->offset, seg->len);
        else
            memset(now + at, 0, seg->len);
        at += seg->len;
    }
    volume_release_segs(&r.io);
}

static void read_volume(struct run *run, struct shard *shard, const struct catalog_entry *entry)
{
    struct volume *vol;
    if (run_open(run, shard, entry, &vol) != ST_OK) {
        failed(entry->name, &run->op.err);
        return;
    }
    uint64_t size = volume_size(vol);
    if (size > VOLUME_BYTES_MAX)
        abort();
    for (uint64_t at = 0; at < size; at += VOLUME_READ_BYTES_MAX)
        read_part(run, vol, at, min_u64(VOLUME_READ_BYTES_MAX, size - at));
    show(volume_name(vol), size);
    run_close(run, vol);
}

/* --- a store ------------------------------------------------------------------------------- */

static void read_all(struct run *run, struct shard *shard)
{
    struct catalog_op volumes, snapshots;
    catalog_list(run_op(run), run->store, run->env);
    if (run_wait(run) != ST_OK) {
        failed("list", &run->op.err);
        return;
    }
    run_keep(run, &volumes);
    for (size_t i = 0; i < volumes.n_entries; i++) {
        struct catalog_entry *entry = &volumes.entries[i];
        read_volume(run, shard, entry);
        catalog_snapshots(run_op(run), run->store, run->env, entry->branch);
        if (run_wait(run) != ST_OK) {
            failed("snapshots", &run->op.err);
            continue;
        }
        run_keep(run, &snapshots);
        for (size_t k = 0; k < snapshots.n_snapshots; k++) {
            entry->snapshot = snapshots.snapshots[k];
            read_volume(run, shard, entry);
        }
        catalog_op_free(&snapshots);
    }
    catalog_op_free(&volumes);
}

struct recovering {
    struct recovery recovery;
    bool done;
};

static void recovered(struct recovery *r)
{
    container_of(r, struct recovering, recovery)->done = true;
}

static void recover(struct run *run, struct shard *shard)
{
    struct recovering r = {.recovery.done = recovered};
    recover_dead_sessions(&r.recovery, shard);
    run_until(run, &r.done);
    if (r.recovery.st != ST_OK)
        failed("recovery", &r.recovery.err);
}

static void look_into(const char *folder, bool recovers)
{
    static const struct cli_command command = {.name = "opener"};
    char uri[1024];
    snprintf(uri, sizeof uri, "lmdb:%s", folder);
    struct cli cli = {.command = &command, .store_uri = uri, .lease_ms = LEASE_MS};
    struct run run;
    struct session session;
    struct err e = {0};
    if (run_begin(&run, &cli, RUN_CREATE) != CLI_DONE) {
        printf("failed the store does not open (see above)\n");
        run_end(&run);
        return;
    }
    enum status st =
        session_begin(&session, run.store, run.env, reactor_run_once, LEASE_MS, "opener", &e);
    if (st != ST_OK) {
        failed("session", &e);
        run_end(&run);
        return;
    }
    struct shard *shard;
    struct shard_config config = {.store = run.store,
                                  .env = run.env,
                                  .session = &session,
                                  .cache_bytes = VOLUME_CACHE_BYTES_MIN,
                                  .log_bytes = LOG_BYTES};
    if (shard_new(&config, &shard, &e) != ST_OK) {
        failed("shard", &e);
    } else {
        if (recovers)
            recover(&run, shard);
        read_all(&run, shard);
        shard_free(shard);
    }
    session_end(&session, run.env, reactor_run_once);
    run_end(&run);
}

int main(void)
{
    char line[900];
    while (fgets(line, sizeof line, stdin)) {
        line[strcspn(line, "\n")] = '\0';
        char *end = strchr(line, ' ');
        if (end)
            *end = '\0';
        look_into(line, end && strcmp(end + 1, "recover") == 0);
        printf("end\n");
        fflush(stdout);
    }
    return 0;
}
