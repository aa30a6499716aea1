/*
 * The data file: bodies in units of 4 KiB, and nothing else. Where they are is
 * LMDB's to know. The first unit names the store that the file belongs to.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include "base/hash.h"
#include "base/log.h"
#include "store/lmdb/engine.h"

#define HEADER_FLAGS_AT 28u
#define HEADER_HASHED_BYTES 32u
#define HEADER_SEALED 1u
#define BALLAST_BYTES (1ull << 20)
#define BALLAST_BYTES_MIN (64ull << 10)

static const char magic[8] = {'f', 'n', 'b', 'd', 'b', 'l', 'k', '1'};

enum status lm_write_all(int fd, struct iovec *iov, int n_iov, uint64_t offset)
{
    while (n_iov > 0) {
        ssize_t n = pwritev(fd, iov, n_iov, (off_t)offset);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return errno == ENOSPC || errno == EDQUOT ? ST_NOSPC : ST_IO;
        if (n == 0)
            return ST_IO;
        offset += (uint64_t)n;
        size_t done = (size_t)n;
        while (n_iov > 0 && done >= iov->iov_len) {
            done -= iov->iov_len;
            iov++;
            n_iov--;
        }
        if (n_iov > 0) {
            iov->iov_base = (char *)iov->iov_base + done;
            iov->iov_len -= done;
        }
    }
    return ST_OK;
}

void lm_file_in_place(int fd)
{
    int flags;
    if (ioctl(fd, FS_IOC_GETFLAGS, &flags) == 0) {
        flags |= FS_NOCOW_FL;
        (void)ioctl(fd, FS_IOC_SETFLAGS, &flags);
    }
}

static void header_build(const struct lm *lm, uint8_t unit[SPACE_UNIT_BYTES])
{
    memset(unit, 0, SPACE_UNIT_BYTES);
    memcpy(unit, magic, sizeof magic);
    memcpy(unit + 8, lm->uuid, STORE_ID_BYTES);
    put_le32(unit + 24, SPACE_UNIT_BYTES);
    put_le32(unit + HEADER_FLAGS_AT, lm->sealed ? HEADER_SEALED : 0);
    put_le64(unit + 32, hash64(unit, HEADER_HASHED_BYTES, 0));
}

/* It says so too, beside the description of the store in LMDB, because it can be read before LMDB
 * is let loose on its file. */
enum status lm_datafile_look(struct lm *lm, struct err *e)
{
    lm->sealed = false;
    int fd = openat(lm->dir_fd, "blocks", O_RDONLY | O_CLOEXEC);
    if (fd < 0 && errno == ENOENT)
        return ST_OK; /* missed, or made, later */
    if (fd < 0)
        return fail(e, ST_UNAVAIL, "cannot open %s/blocks: %s", lm->dir, strerror(errno));
    uint8_t header[HEADER_HASHED_BYTES + 8];
    ssize_t n = pread(fd, header, sizeof header, 0);
    int why = errno;
    close(fd);
    if (n == 0)
        return ST_OK;
    if (n < 0)
        return fail(e, ST_UNAVAIL, "cannot read %s/blocks: %s", lm->dir, strerror(why));
    if (n != (ssize_t)sizeof header || memcmp(header, magic, sizeof magic) != 0 ||
        get_le64(header + 32) != hash64(header, HEADER_HASHED_BYTES, 0))
        return fail(e, ST_FORMAT,
                    "%s/blocks is not the data file of this store: its first block is damaged; "
                    "restore the whole folder from one backup",
                    lm->dir);
    lm->sealed = get_le32(header + HEADER_FLAGS_AT) & HEADER_SEALED;
    return ST_OK;
}

enum status lm_datafile_open(struct lm *lm, bool create, struct err *e)
{
    lm->blocks_fd = openat(lm->dir_fd, "blocks", O_RDWR | O_CLOEXEC | (create ? O_CREAT : 0), 0600);
    if (lm->blocks_fd < 0) {
        if (errno == ENOENT)
            return fail(e, ST_FORMAT,
                        "the store %s has lost its data file \"blocks\": restore the whole folder "
                        "from a backup",
                        lm->dir);
        return fail(e, ST_UNAVAIL, "cannot open %s/blocks: %s", lm->dir, strerror(errno));
    }
    struct stat sb;
    if (fstat(lm->blocks_fd, &sb) < 0)
        return fail(e, ST_UNAVAIL, "cannot look at %s/blocks: %s", lm->dir, strerror(errno));
    uint8_t unit[SPACE_UNIT_BYTES], want[SPACE_UNIT_BYTES];
    header_build(lm, want);
    if (create && sb.st_size == 0) {
        lm_file_adopt(lm, lm->blocks_fd);
        lm_file_in_place(lm->blocks_fd);
        struct iovec iov = {want, sizeof want};
        enum status st = lm_write_all(lm->blocks_fd, &iov, 1, 0);
        if (!st && fsync(lm->blocks_fd) < 0)
            st = ST_IO;
        if (st)
            return fail(e, st == ST_NOSPC ? ST_NOSPC : ST_UNAVAIL,
                        "cannot write the data file %s/blocks: %s", lm->dir, strerror(errno));
        return ST_OK;
    }
    if (pread(lm->blocks_fd, unit, sizeof unit, 0) != (ssize_t)sizeof unit ||
        memcmp(unit, want, HEADER_HASHED_BYTES + 8) != 0)
        return fail(e, ST_FORMAT,
                    "%s/blocks is not the data file of this store: its first block is damaged or "
                    "names another store; restore the whole folder from one backup",
                    lm->dir);
    /* Some file systems can't; then reads go through the page cache. */
    if (lm->own_cache)
        lm->direct_fd = openat(lm->dir_fd, "blocks", O_RDONLY | O_DIRECT | O_CLOEXEC);
    return ST_OK;
}

/* ---- ballast ---- */

static int ballast_write(int fd, uint64_t bytes)
{
    /* Drawn by chance, for a file system that compresses would keep nothing of zeros. */
    uint8_t block[4096];
    for (uint64_t at = 0; at < bytes; at += sizeof block) {
        if (getrandom(block, sizeof block, 0) != (ssize_t)sizeof block)
            return -1;
        struct iovec iov = {block, sizeof block};
        enum status st = lm_write_all(fd, &iov, 1, at);
        if (st) {
            errno = st == ST_NOSPC ? ENOSPC : EIO;
            return -1;
        }
    }
    return fdatasync(fd);
}

static bool ballast_try(int fd, uint64_t bytes)
{
    struct stat sb;
    if (fstat(fd, &sb) < 0)
        return false;
    if ((uint64_t)sb.st_size >= bytes && (uint64_t)sb.st_blocks * 512 >= bytes)
        return true;
    int rc = fallocate(fd, 0, 0, (off_t)bytes);
    if (rc < 0 && (errno == EOPNOTSUPP || errno == ENOSYS))
        rc = ballast_write(fd, bytes);
    return rc == 0;
}

void lm_ballast_make(struct lm *lm)
{
    int fd = openat(lm->dir_fd, "reserve", O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600);
    if (fd < 0)
        return;
    struct stat sb;
    if (fstat(fd, &sb) == 0 && sb.st_size == 0)
        lm_file_adopt(lm, fd);
    /* A part of it is worth having too: what a start takes is a few blocks. */
    bool made = false;
    for (uint64_t bytes = BALLAST_BYTES; !made && bytes >= BALLAST_BYTES_MIN; bytes /= 2) {
        made = ballast_try(fd, bytes);
        if (!made && ftruncate(fd, (off_t)(bytes / 2)) < 0)
            break;
    }
    if (!made)
        unlinkat(lm->dir_fd, "reserve", 0);
    close(fd);
}

bool lm_ballast_drop(struct lm *lm)
{
    int fd = openat(lm->dir_fd, "reserve", O_RDWR | O_CLOEXEC | O_NOFOLLOW);
    if (fd < 0)
        return false;
    /* First cut, for some file systems free the blocks of a removed file only later. */
    bool dropped = ftruncate(fd, 0) == 0;
    close(fd);
    return unlinkat(lm->dir_fd, "reserve", 0) == 0 || dropped;
}

/* The spare log is worth less than anybody's data. */
static bool spare_log_drop(struct lm *lm)
{
    bool dropped = unlinkat(lm->log_fd, "spare", 0) == 0;
    errno = ENOSPC;
    return dropped;
}

enum status lm_datafile_back(struct lm *lm, uint64_t start, uint64_t units)
{
    off_t from = (off_t)(start * SPACE_UNIT_BYTES), len = (off_t)(units * SPACE_UNIT_BYTES);
    if (!lm->no_fallocate) {
        int rc;
        do
            rc = fallocate(lm->blocks_fd, 0, from, len);
        while (rc < 0 && (errno == EINTR || (errno == ENOSPC && spare_log_drop(lm))));
        if (rc == 0)
            return ST_OK;
        if (errno != EOPNOTSUPP)
            return errno == ENOSPC || errno == EDQUOT || errno == EFBIG ? ST_NOSPC : ST_IO;
        lm->no_fallocate = true;
        log_warning("the file system of %s cannot set space aside: should it fill up, writes that "
                    "were answered may fail to reach the store",
                    lm->dir);
    }
    struct statvfs vfs;
    if (fstatvfs(lm->blocks_fd, &vfs) == 0 &&
        (uint64_t)vfs.f_bavail * vfs.f_frsize < (uint64_t)len + lm->emergency_bytes)
        return ST_NOSPC;
    struct stat sb;
    if (fstat(lm->blocks_fd, &sb) < 0)
        return ST_IO;
    if (sb.st_size < from + len && ftruncate(lm->blocks_fd, from + len) < 0)
        return errno == ENOSPC || errno == EDQUOT || errno == EFBIG ? ST_NOSPC : ST_IO;
    return ST_OK;
}

enum status lm_datafile_punch(struct lm *lm, uint64_t start, uint64_t units)
{
    if (fallocate(lm->blocks_fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                  (off_t)(start * SPACE_UNIT_BYTES), (off_t)(units * SPACE_UNIT_BYTES)) < 0) {
        lm->no_punch = true;
        return ST_UNSUP;
    }
    return ST_OK;
}
