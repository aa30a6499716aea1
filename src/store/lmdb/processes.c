/*
 * How the processes that have one store open know of each other: the file
 * `processes`, mapped by all, with a slot for each. A slot is held by an open
 * file description lock on its bytes, which ends with its process, so a slot
 * whose lock can be had is free whatever stands in it. In its slot a process
 * says that it wants or holds LMDB's writer lock, and how much of the free space
 * it claims. Nothing here matters once the processes are gone.
 */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "store/lmdb/engine.h"

#define SLOTS 255
#define FILE_BYTES ((SLOTS + 1) * 64)
#define KILL_WAIT_MS 10000
#define WATCH_MS 1500
#define WATCH_STEP_MS 50

struct lm_slot {
    _Atomic int32_t pid;
    _Atomic uint32_t lock_state; /* enum lm_lock_state */
    _Atomic uint64_t start_time;
    _Atomic uint64_t turn; /* counts the times the lock was wanted */
    _Atomic uint64_t progress;
    _Atomic int64_t claim_units, claim_index;
    uint64_t spare[2];
};

_Static_assert(sizeof(struct lm_slot) == 64, "slots are shared between builds");

static struct lm_slot *slot_at(const struct lm *lm, int i)
{
    return (struct lm_slot *)lm->processes_map + 1 + i;
}

static struct flock slot_lock(int i, short type)
{
    return (struct flock){.l_type = type,
                          .l_whence = SEEK_SET,
                          .l_start = (off_t)sizeof(struct lm_slot) * (i + 1),
                          .l_len = (off_t)sizeof(struct lm_slot)};
}

/* Whether another process holds slot `i`. */
static bool slot_alive(const struct lm *lm, int i)
{
    if (atomic_load(&slot_at(lm, i)->pid) == 0)
        return false;
    struct flock fl = slot_lock(i, F_WRLCK);
    return fcntl(lm->processes_fd, F_OFD_GETLK, &fl) == 0 && fl.l_type != F_UNLCK;
}

static enum status slot_take(struct lm *lm, struct err *e)
{
    for (int i = 0; i < SLOTS; i++) {
        struct flock fl = slot_lock(i, F_WRLCK);
        if (fcntl(lm->processes_fd, F_OFD_SETLK, &fl) == 0) {
            struct lm_slot *slot = slot_at(lm, i);
            atomic_store(&slot->lock_state, LM_LOCK_NONE);
            atomic_store(&slot->claim_units, 0);
            atomic_store(&slot->claim_index, 0);
            atomic_store(&slot->start_time, lm_process_start_time(getpid(), NULL));
            atomic_store(&slot->pid, (int32_t)getpid());
            lm->slot = slot;
            lm->own_slot = i;
            return ST_OK;
        }
        if (errno != EAGAIN && errno != EACCES)
            return fail(e, ST_UNAVAIL, "cannot lock %s/processes: %s", lm->dir, strerror(errno));
    }
    return fail(e, ST_UNAVAIL, "%d processes have the store %s open already: stop some", SLOTS,
                lm->dir);
}

enum status lm_processes_open(struct lm *lm, struct err *e)
{
    lm->processes_fd = openat(lm->dir_fd, "processes",
                              O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600);
    struct stat sb;
    if (lm->processes_fd < 0 || fstat(lm->processes_fd, &sb) < 0)
        return fail(e, errno == ENOSPC || errno == EDQUOT ? ST_NOSPC : ST_UNAVAIL,
                    "cannot open %s/processes: %s", lm->dir, strerror(errno));
    if (sb.st_size == 0)
        lm_file_adopt(lm, lm->processes_fd);
    /* Real space, for a write to a mapped hole on a full disk is a SIGBUS. */
    if (sb.st_size < FILE_BYTES || (int64_t)sb.st_blocks * 512 < FILE_BYTES) {
        int rc = posix_fallocate(lm->processes_fd, 0, FILE_BYTES);
        if (rc)
            return fail(e, rc == ENOSPC ? ST_NOSPC : ST_UNAVAIL, "cannot write %s/processes: %s",
                        lm->dir, strerror(rc));
    }
    void *map = mmap(NULL, FILE_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, lm->processes_fd, 0);
    if (map == MAP_FAILED)
        return fail(e, ST_UNAVAIL, "cannot map %s/processes: %s", lm->dir, strerror(errno));
    lm->processes_map = map;
    return slot_take(lm, e);
}

void lm_processes_close(struct lm *lm)
{
    if (lm->slot) {
        atomic_store(&lm->slot->lock_state, LM_LOCK_NONE);
        atomic_store(&lm->slot->pid, 0);
    }
    lm->slot = NULL;
    if (lm->processes_map)
        munmap(lm->processes_map, FILE_BYTES);
    lm->processes_map = NULL;
    if (lm->processes_fd >= 0)
        close(lm->processes_fd);
    lm->processes_fd = -1;
}

void lm_lock_state_set(struct lm *lm, enum lm_lock_state state)
{
    if (state == LM_LOCK_WANTED)
        atomic_fetch_add(&lm->slot->turn, 1);
    atomic_store(&lm->slot->lock_state, state);
}

void lm_lock_progress(struct lm *lm)
{
    atomic_fetch_add_explicit(&lm->slot->progress, 1, memory_order_relaxed);
}

struct lm_claims lm_claims_of_others(struct lm *lm)
{
    struct lm_claims sum = {0, 0};
    for (int i = 0; i < SLOTS; i++) {
        struct lm_slot *slot = slot_at(lm, i);
        if (i == lm->own_slot || !slot_alive(lm, i))
            continue;
        sum.units += atomic_load(&slot->claim_units);
        sum.index += atomic_load(&slot->claim_index);
    }
    return sum;
}

void lm_claims_share(struct lm *lm, const struct lm_claims *claims)
{
    atomic_store(&lm->slot->claim_units, claims->units);
    atomic_store(&lm->slot->claim_index, claims->index);
}

bool lm_lock_has_ghost(struct lm *lm)
{
    for (int i = 0; i < SLOTS; i++)
        if (i != lm->own_slot && atomic_load(&slot_at(lm, i)->lock_state) == LM_LOCK_HELD &&
            slot_alive(lm, i))
            return true;
    return false;
}

bool lm_lock_holder(struct lm *lm, struct lm_holder *holder)
{
    bool found = false;
    for (int i = 0; i < SLOTS; i++) {
        struct lm_slot *slot = slot_at(lm, i);
        uint32_t state = atomic_load(&slot->lock_state);
        if (i == lm->own_slot || state == LM_LOCK_NONE || !slot_alive(lm, i))
            continue;
        struct lm_holder h = {i, atomic_load(&slot->pid), atomic_load(&slot->start_time),
                              atomic_load(&slot->turn), atomic_load(&slot->progress)};
        if (state == LM_LOCK_HELD) {
            *holder = h;
            return true;
        }
        /* One that only wants it can have been stopped between getting it and saying so. */
        char run_state = 0;
        if (!found && lm_process_start_time(h.pid, &run_state) == h.start_time &&
            (run_state == 'T' || run_state == 't')) {
            *holder = h;
            found = true;
        }
    }
    return found;
}

uint64_t lm_process_start_time(pid_t pid, char *state)
{
    char path[40], text[1024];
    snprintf(path, sizeof path, "/proc/%d/stat", (int)pid);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return 0;
    ssize_t n = read(fd, text, sizeof text - 1);
    close(fd);
    if (n <= 0)
        return 0;
    text[n] = '\0';
    /* The name may hold anything, also spaces and brackets: fields count from its end. */
    char *p = strrchr(text, ')');
    if (!p || p[1] != ' ')
        return 0;
    p += 2;
    if (state)
        *state = *p;
    for (int field = 3; field < 22; field++) {
        p = strchr(p, ' ');
        if (!p)
            return 0;
        p++;
    }
    return strtoull(p, NULL, 10);
}

/* How often the main thread of `pid` was taken off a processor; false where it can't be told. */
static bool switches_of(pid_t pid, uint64_t *switches)
{
    char path[60], text[4096];
    snprintf(path, sizeof path, "/proc/%d/task/%d/status", (int)pid, (int)pid);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return false;
    ssize_t n = read(fd, text, sizeof text - 1);
    close(fd);
    if (n <= 0)
        return false;
    text[n] = '\0';
    static const char *const fields[] = {"\nvoluntary_ctxt_switches:",
                                         "\nnonvoluntary_ctxt_switches:"};
    *switches = 0;
    for (size_t i = 0; i < 2; i++) {
        const char *p = strstr(text, fields[i]);
        if (!p)
            return false;
        *switches += strtoull(p + strlen(fields[i]), NULL, 10);
    }
    return true;
}

/* The main thread of a server wakes at least twice a second, so one that lives is switched
 * more than once while it is watched. One switch alone may be its last: on its way to stand
 * still. */
bool lm_process_at_work(pid_t pid, uint64_t start_time)
{
    uint64_t first, now;
    char state = 0;
    if (pid <= 1 || !switches_of(pid, &first))
        return false;
    now = first;
    for (int ms = 0; ms <= WATCH_MS; ms += WATCH_STEP_MS) {
        if (lm_process_start_time(pid, &state) != start_time || state == 'T' || state == 't' ||
            state == 'Z' || !switches_of(pid, &now))
            return false;
        if (ms < WATCH_MS)
            usleep(WATCH_STEP_MS * 1000);
    }
    /* One that waits for a disk is slow, and killing does not make the disk faster. */
    return now - first >= 2 || state == 'D';
}

/* As kill(2) has it: by the real user or the saved one. */
static bool owner_may_end(const struct lm *lm, pid_t pid)
{
    if (geteuid() != 0 || lm->uid == 0)
        return true;
    char path[40], text[4096];
    snprintf(path, sizeof path, "/proc/%d/status", (int)pid);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t n = fd >= 0 ? read(fd, text, sizeof text - 1) : -1;
    if (fd >= 0)
        close(fd);
    if (n <= 0)
        return false;
    text[n] = '\0';
    const char *line = strstr(text, "\nUid:");
    unsigned real, effective, saved;
    return line && sscanf(line, "\nUid: %u %u %u", &real, &effective, &saved) == 3 &&
           (real == lm->uid || saved == lm->uid);
}

enum status lm_process_kill(const struct lm *lm, pid_t pid, uint64_t start_time, struct err *e)
{
    if (pid <= 1 || pid == getpid())
        return fail(e, ST_INVAL, "process %d is none that could be ended", (int)pid);
    int fd = (int)syscall(SYS_pidfd_open, pid, 0);
    if (fd < 0)
        return errno == ESRCH
                   ? ST_NOTFOUND
                   : fail(e, ST_UNAVAIL, "cannot reach process %d: %s", (int)pid, strerror(errno));
    /* Looked at after the descriptor is had: from here on it can be no other process. */
    if (lm_process_start_time(pid, NULL) != start_time) {
        close(fd);
        return ST_NOTFOUND;
    }
    if (!owner_may_end(lm, pid)) {
        close(fd);
        return fail(e, ST_PERM, "process %d is not one of the store's owner; it was not ended",
                    (int)pid);
    }
    /* One whose state is Z, a zombie, may be half dead only: its first thread is, and others still
     * hold its files. It is waited for as any other. */
    enum status st = ST_OK;
    if (syscall(SYS_pidfd_send_signal, fd, SIGKILL, NULL, 0) < 0) {
        if (errno == ESRCH) {
            close(fd);
            return ST_NOTFOUND;
        }
        st = fail(e, errno == EPERM ? ST_PERM : ST_UNAVAIL, "cannot end process %d: %s", (int)pid,
                  strerror(errno));
    } else {
        struct pollfd pfd = {.fd = fd, .events = POLLIN};
        int rc;
        do
            rc = poll(&pfd, 1, KILL_WAIT_MS);
        while (rc < 0 && errno == EINTR);
        if (rc != 1)
            st = fail(e, ST_UNAVAIL, "process %d was killed but has not ended: it waits for a disk",
                      (int)pid);
    }
    close(fd);
    return st;
}
