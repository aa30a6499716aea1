/*
 * Sessions: a file each, locked for as long as the process lives, so that its
 * death is known at once and without asking anybody's clock. The lock belongs to
 * the open file description, not to the process id, and so tells the truth across
 * containers too. The folder itself is locked while files come and go.
 */
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/log.h"
#include "base/mem.h"
#include "store/lmdb/engine.h"

#define FILES_MAX 65536u
#define UNKNOWN_TELL_NS 10000000000u /* the same trouble with probes is logged so often */

/* A session of this process: the descriptor holds the lock. */
struct session {
    struct session *next;
    struct lm *lm;
    uint8_t id[STORE_ID_BYTES];
    int fd;
};

static pthread_mutex_t sessions_lock = PTHREAD_MUTEX_INITIALIZER;
static struct session *sessions;

static struct flock whole_file(short type)
{
    return (struct flock){.l_type = type, .l_whence = SEEK_SET};
}

/* Whether somebody holds the lock of session file `name`: 1, 0, or -1 where it can't be
 * told (errno). */
static int name_locked(struct lm *lm, const char *name)
{
    int fd = openat(lm->session_fd, name, O_RDWR | O_CLOEXEC | O_NOFOLLOW);
    if (fd < 0)
        return errno == ENOENT ? 0 : -1;
    struct flock fl = whole_file(F_WRLCK);
    int rc = fcntl(fd, F_OFD_GETLK, &fl);
    close(fd);
    return rc < 0 ? -1 : fl.l_type != F_UNLCK;
}

/* Makes and locks a session's file; -1: errno says why. */
static int session_file_make(struct lm *lm, const char *name)
{
    int fd = openat(lm->session_fd, name, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    if (fd < 0)
        return -1;
    char text[64];
    int n = snprintf(text, sizeof text, "%d %" PRIu64 "\n", (int)getpid(),
                     lm_process_start_time(getpid(), NULL));
    struct flock fl = whole_file(F_WRLCK);
    if (fcntl(fd, F_OFD_SETLK, &fl) == 0) {
        ssize_t written = write(fd, text, (size_t)n);
        if (written == n)
            return fd;
        if (written >= 0)
            errno = ENOSPC;
    }
    int why = errno;
    unlinkat(lm->session_fd, name, 0);
    close(fd);
    errno = why;
    return -1;
}

enum status lm_session_begin(struct store *store, const uint8_t id[STORE_ID_BYTES], struct err *e)
{
    struct lm *lm = lm_of(store);
    char name[LM_ID_TEXT_BYTES];
    lm_id_text(id, name);
    if (!lm_flock(lm, lm->session_fd))
        return fail(e, ST_UNAVAIL, "cannot lock %s/session: %s", lm->dir, strerror(errno));
    enum status st = ST_OK;
    int fd = session_file_make(lm, name);
    if (fd < 0 && (errno == ENOSPC || errno == EDQUOT)) {
        int why = errno;
        if (lm_ballast_drop(lm)) {
            fd = session_file_make(lm, name);
            why = errno;
            /* What is left of it at once, for the next start on a full disk. */
            lm_ballast_make(lm);
        }
        errno = why;
    }
    if (fd < 0)
        st = fail(e, errno == ENOSPC || errno == EDQUOT ? ST_NOSPC : ST_UNAVAIL,
                  "cannot make the session file %s/session/%s: %s", lm->dir, name, strerror(errno));
    else
        lm_file_adopt(lm, fd);
    flock(lm->session_fd, LOCK_UN);
    if (st)
        return st;
    struct session *s = mem_zalloc(sizeof *s);
    s->lm = lm;
    s->fd = fd;
    memcpy(s->id, id, STORE_ID_BYTES);
    pthread_mutex_lock(&sessions_lock);
    s->next = sessions;
    sessions = s;
    pthread_mutex_unlock(&sessions_lock);
    return ST_OK;
}

/* The file stays as long as a log names the session, see lm_sessions_sweep(); without its
 * lock it says the same as no file. */
void lm_session_end(struct store *store, const uint8_t id[STORE_ID_BYTES])
{
    struct lm *lm = lm_of(store);
    pthread_mutex_lock(&sessions_lock);
    struct session **at = &sessions;
    while (*at && ((*at)->lm != lm || memcmp((*at)->id, id, STORE_ID_BYTES) != 0))
        at = &(*at)->next;
    struct session *s = *at;
    if (s)
        *at = s->next;
    pthread_mutex_unlock(&sessions_lock);
    if (!s)
        return;
    char name[LM_ID_TEXT_BYTES];
    lm_id_text(id, name);
    unlinkat(lm->session_fd, name, 0);
    close(s->fd);
    free(s);
}

/* Whoever has to know waits until it can be told, so it has to be said what for. */
static void probe_failed(struct lm *lm, const char *name)
{
    int why = errno;
    if (lm_may_tell(&lm->probe_told_ns, UNKNOWN_TELL_NS))
        log_error("cannot tell whether the process of %s/session/%s lives: %s", lm->dir, name,
                  strerror(why));
}

enum store_liveness lm_session_probe(struct store *store, const uint8_t id[STORE_ID_BYTES])
{
    struct lm *lm = lm_of(store);
    char name[LM_ID_TEXT_BYTES];
    lm_id_text(id, name);
    switch (name_locked(lm, name)) {
    case 0:
        return STORE_SESSION_DEAD;
    case 1:
        return STORE_SESSION_ALIVE;
    default:
        probe_failed(lm, name);
        return STORE_SESSION_UNKNOWN;
    }
}

enum status lm_session_kill(struct store *store, const uint8_t id[STORE_ID_BYTES], struct err *e)
{
    struct lm *lm = lm_of(store);
    char name[LM_ID_TEXT_BYTES], text[64] = "";
    lm_id_text(id, name);
    int fd = openat(lm->session_fd, name, O_RDONLY | O_CLOEXEC | O_NOFOLLOW);
    if (fd < 0)
        return errno == ENOENT ? ST_OK
                               : fail(e, ST_UNAVAIL, "cannot read %s/session/%s: %s", lm->dir, name,
                                      strerror(errno));
    ssize_t n = read(fd, text, sizeof text - 1);
    close(fd);
    int pid = 0;
    uint64_t start_time = 0;
    if (n <= 0 || sscanf(text, "%d %" SCNu64, &pid, &start_time) != 2)
        return fail(e, ST_IO, "%s/session/%s does not say which process it belongs to", lm->dir,
                    name);
    /* Asked after the file was read: a lock still held means the pid is still the session's. */
    if (lm_session_probe(store, id) == STORE_SESSION_DEAD)
        return ST_OK;
    /* Silence towards a client or another server may be a slow disk and no more. */
    if (pid != getpid() && lm_process_at_work(pid, start_time))
        return fail(e, ST_BUSY, "process %d is alive and at work (slow store?); it was not ended",
                    pid);
    if (lm_session_probe(store, id) == STORE_SESSION_DEAD)
        return ST_OK;
    enum status st = lm_process_kill(lm, pid, start_time, e);
    if (st == ST_NOTFOUND || st == ST_OK) {
        if (lm_session_probe(store, id) == STORE_SESSION_DEAD)
            return ST_OK;
        return fail(e, ST_UNSUP,
                    "the process %d that holds session %s can't be reached from here: it runs in "
                    "another container; stop it there",
                    pid, name);
    }
    return st;
}

static bool hex_id(const char *name, uint8_t id[STORE_ID_BYTES])
{
    static const char digits[] = "0123456789abcdef";
    if (strlen(name) != 2 * STORE_ID_BYTES)
        return false;
    for (size_t i = 0; i < STORE_ID_BYTES; i++) {
        const char *hi = strchr(digits, name[2 * i]), *lo = strchr(digits, name[2 * i + 1]);
        if (!hi || !lo)
            return false;
        id[i] = (uint8_t)((hi - digits) << 4 | (lo - digits));
    }
    return true;
}

void lm_sessions_sweep(struct lm *lm, const uint8_t (*keep)[STORE_ID_BYTES], size_t n)
{
    DIR *dir = lm_folder_list(openat(lm->session_fd, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC));
    if (!dir)
        return;
    if (lm_flock(lm, lm->session_fd)) {
        struct dirent *ent;
        uint8_t id[STORE_ID_BYTES];
        for (unsigned looked = 0; looked < FILES_MAX && (ent = readdir(dir)) != NULL; looked++) {
            if (!hex_id(ent->d_name, id))
                continue;
            bool wanted = false;
            for (size_t i = 0; i < n && !wanted; i++)
                wanted = memcmp(keep[i], id, STORE_ID_BYTES) == 0;
            if (!wanted && name_locked(lm, ent->d_name) == 0)
                unlinkat(lm->session_fd, ent->d_name, 0);
        }
        flock(lm->session_fd, LOCK_UN);
    }
    closedir(dir);
}
