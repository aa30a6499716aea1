/* A double for the loss of power: it stands between a program and its files.
 *
 * Preloaded into a server, it writes down every change of every file beneath one
 * folder, in the order in which they were made, and every sync: which file, where,
 * which bytes, when it began and when it returned. From that journal images.py
 * builds the folder as a disk could hold it after a cut at any moment.
 *
 * It can also make the disk slow (so that more is under way at once) and make it
 * fail, as long as a file says so.
 *
 *   POWERCUT_ROOT      folder to watch
 *   POWERCUT_TRACE     journal to append to; without it only delays and faults work
 *   POWERCUT_SYNC_US   "low-high": each sync takes that much longer, half of it
 *                      before and half of it after the real one
 *   POWERCUT_WRITE_US  "low-high": so does each write
 *   POWERCUT_SEED      of those delays
 *   POWERCUT_FAULT     path; while that file exists, its lines "sync ERRNO" and
 *                      "write ERRNO" make those calls fail, and "sync 0" makes
 *                      syncs wait until it is gone
 *
 * Creating, renaming and removing a file are written down, and so are syncs of folders, which
 * make them durable. Several processes may write one journal. Asynchronous writes (io_submit) it
 * does itself when their end is asked for.
 * What it does not see (stores through a shared writable mapping, stdio, io_uring) it
 * cannot lose; a writable mapping is noted in the journal, and that the journal is
 * complete is checked afterwards against the folder itself.
 *
 * A write holds one lock from before the call to after its record, so that the order
 * of the journal is the order of the writes. A sync and a write that is its own sync
 * (O_DSYNC) do not: what others do meanwhile must be able to happen.
 */
#define _GNU_SOURCE
#undef _FORTIFY_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#include "../../unit/aio_double.h"

enum kind {
	FILE_SEEN = 1,	  /* data: path below the root; length: size now */
	WRITE = 2,	  /* offset, length, data (none if flag ZEROS) */
	TRUNCATE = 3,	  /* length: new size */
	ALLOCATE = 4,	  /* offset, length; extra: mode of fallocate */
	SYNC = 5,	  /* begins; extra: number */
	DONE = 6,	  /* a sync or a durable write returned; extra: its number */
	RENAME = 7,	  /* data: old path, NUL, new path */
	REMOVE = 8,	  /* data: path */
	MAPPED = 9,	  /* the file was mapped shared and writable */
	MAKE_FOLDER = 10, /* data: path */
	UNSOUND = 11,	  /* data: what happened that this journal cannot tell */
	FAILED = 12,	  /* a sync failed; extra: its number */
};

/* FOLDER: a sync of a folder; data: its path, empty for the root. */
enum { DURABLE = 1, ZEROS = 2, EVERYTHING = 4, FOLDER = 8 };

/* Little-endian on every machine this runs on; images.py reads it as such. */
struct record {
	uint32_t magic;
	uint8_t kind;
	uint8_t flags;
	uint16_t process; /* whose numbers of files and syncs these are */
	uint32_t file;
	uint32_t extra;
	uint64_t begun_ns;
	uint64_t ended_ns;
	uint64_t offset;
	uint64_t length;
	uint64_t data_length;
};

#define MAGIC 0x54554350u
#define FILES_MAX 4096

static struct {
	bool ready;
	char root[PATH_MAX];
	size_t root_length;
	int trace;
	const char *fault_path;
	unsigned sync_us[2], write_us[2];
	uint64_t random;
} shim = { .trace = -1 };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct {
	dev_t device;
	ino_t inode;
	bool used;
} files[FILES_MAX];
static uint32_t number;

static void fail(const char *what)
{
	char text[256];
	int n = snprintf(text, sizeof text, "powercut: %s\n", what);
	syscall(SYS_write, 2, text, (size_t)n);
	_exit(99);
}

static void range_of(const char *name, unsigned range[2])
{
	const char *text = getenv(name);
	if (text && sscanf(text, "%u-%u", &range[0], &range[1]) != 2)
		fail("a delay has to be low-high");
}

static pthread_once_t once = PTHREAD_ONCE_INIT;

static void set_up(void)
{
	const char *root = getenv("POWERCUT_ROOT"), *trace = getenv("POWERCUT_TRACE"),
		   *seed = getenv("POWERCUT_SEED");
	range_of("POWERCUT_SYNC_US", shim.sync_us);
	range_of("POWERCUT_WRITE_US", shim.write_us);
	shim.fault_path = getenv("POWERCUT_FAULT");
	shim.random = seed ? strtoull(seed, NULL, 10) * 2 + 1 : 88172645463325252u;
	if (!root)
		return;
	if (!realpath(root, shim.root))
		fail("POWERCUT_ROOT does not exist");
	shim.root_length = strlen(shim.root);
	if (trace) {
		shim.trace = (int)syscall(SYS_openat, AT_FDCWD, trace,
					  O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
		if (shim.trace < 0)
			fail("the trace cannot be opened");
		/* Out of the way of programs that expect low numbers to be theirs. */
		int high = fcntl(shim.trace, F_DUPFD_CLOEXEC, 1000);
		if (high >= 0) {
			syscall(SYS_close, shim.trace);
			shim.trace = high;
		}
	}
	shim.ready = true;
}

static bool watching(void)
{
	pthread_once(&once, set_up);
	return shim.ready;
}

static uint64_t now_ns(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* With the lock held, or before there are threads. */
static void put(struct record r, const struct iovec *data, int count)
{
	struct iovec all[IOV_MAX];
	size_t left = r.data_length, total = sizeof r + r.data_length;
	int n = 1;
	if (shim.trace < 0)
		return;
	r.magic = MAGIC;
	r.process = (uint16_t)getpid();
	all[0] = (struct iovec){ &r, sizeof r };
	for (int i = 0; i < count && left; i++) {
		if (n == IOV_MAX)
			fail("a write of too many pieces");
		size_t take = data[i].iov_len < left ? data[i].iov_len : left;
		all[n++] = (struct iovec){ data[i].iov_base, take };
		left -= take;
	}
	if (syscall(SYS_writev, shim.trace, all, n) != (long)total)
		fail("the trace could not be written");
}

static void put_text(enum kind kind, uint32_t file, const char *text, size_t length, uint64_t size)
{
	uint64_t t = now_ns();
	struct iovec data = { (void *)(uintptr_t)text, length };
	put((struct record){ .kind = kind, .file = file, .begun_ns = t, .ended_ns = t,
			     .length = size, .data_length = length }, &data, 1);
}

/* Path below the root that fd stands for, or NULL. */
static const char *below(int fd, char *path)
{
	char link[64];
	snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
	ssize_t n = readlink(link, path, PATH_MAX - 1);
	if (n <= 0)
		return NULL;
	path[n] = 0;
	if (strncmp(path, shim.root, shim.root_length) != 0 || path[shim.root_length] != '/')
		return NULL;
	return path + shim.root_length + 1;
}

/* The number of the file behind fd, or -1 if it is none of ours. With the lock held. */
static int file_of(int fd)
{
	struct stat st;
	char path[PATH_MAX];
	if (fstat(fd, &st) != 0 || !S_ISREG(st.st_mode))
		return -1;
	int unused = -1;
	for (int i = 0; i < FILES_MAX; i++) {
		if (!files[i].used) {
			unused = i;
			break;
		}
		if (files[i].device == st.st_dev && files[i].inode == st.st_ino)
			return i;
	}
	const char *name = below(fd, path);
	if (!name || st.st_nlink == 0)
		return -1;
	if (unused < 0)
		fail("too many files");
	files[unused].device = st.st_dev;
	files[unused].inode = st.st_ino;
	files[unused].used = true;
	put_text(FILE_SEEN, (uint32_t)unused, name, strlen(name), (uint64_t)st.st_size);
	return unused;
}

static bool ours(int fd)
{
	struct stat st;
	return watching() && fstat(fd, &st) == 0 && S_ISREG(st.st_mode);
}

static void delay(const unsigned range[2], unsigned parts)
{
	if (range[1] == 0)
		return;
	uint64_t r = __atomic_fetch_add(&shim.random, 0x9E3779B97F4A7C15u, __ATOMIC_RELAXED);
	r ^= r >> 30;
	r *= 0xBF58476D1CE4E5B9u;
	r ^= r >> 27;
	uint64_t us = (range[0] + r % (range[1] - range[0] + 1)) / parts;
	struct timespec t = { (time_t)(us / 1000000), (long)(us % 1000000) * 1000 };
	nanosleep(&t, NULL);
}

/* The error this call is to fail with, 0 if it is to wait, -1 for nothing. */
static int fault_now(const char *what)
{
	char text[256], word[32];
	int error;
	if (!shim.fault_path)
		return -1;
	int fd = (int)syscall(SYS_openat, AT_FDCWD, shim.fault_path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return -1;
	ssize_t n = read(fd, text, sizeof text - 1);
	syscall(SYS_close, fd);
	text[n > 0 ? n : 0] = 0;
	for (char *line = text; line && *line; line = strchr(line, '\n'), line += line != NULL)
		if (sscanf(line, "%31s %d", word, &error) == 2 && strcmp(word, what) == 0)
			return error;
	return -1;
}

static int fault(const char *what)
{
	int error;
	while ((error = fault_now(what)) == 0)
		nanosleep(&(struct timespec){ 0, 5000000 }, NULL);
	return error > 0 ? error : 0;
}

static bool all_zeros(const struct iovec *data, int count, size_t length)
{
	static const char zeros[4096];
	for (int i = 0; i < count && length; i++) {
		const char *p = data[i].iov_base;
		size_t n = data[i].iov_len < length ? data[i].iov_len : length;
		length -= n;
		for (; n; ) {
			size_t step = n < sizeof zeros ? n : sizeof zeros;
			if (memcmp(p, zeros, step) != 0)
				return false;
			p += step;
			n -= step;
		}
	}
	return true;
}

/* offset -1: at the file's own position. */
static ssize_t do_write(int fd, const struct iovec *data, int count, off_t offset, int how)
{
	if (!ours(fd)) {
		if (offset < 0)
			return syscall(SYS_writev, fd, data, count);
		return syscall(SYS_pwritev2, fd, data, count, offset, 0, how);
	}
	pthread_mutex_lock(&lock);
	int file = file_of(fd), flags = fcntl(fd, F_GETFL);
	pthread_mutex_unlock(&lock);
	if (file >= 0) {
		int error = fault("write");
		delay(shim.write_us, 1);
		if (error) {
			errno = error;
			return -1;
		}
	}
	pthread_mutex_lock(&lock);
	struct stat st;
	off_t at = offset >= 0 ? offset : lseek(fd, 0, SEEK_CUR);
	if ((flags & O_APPEND) && fstat(fd, &st) == 0)
		at = st.st_size;
	struct record r = { .kind = WRITE, .file = (uint32_t)file, .offset = (uint64_t)at };
	for (int i = 0; i < count; i++)
		r.length += data[i].iov_len;
	bool zeros = file >= 0 && r.length >= 4096 && all_zeros(data, count, r.length);
	bool durable = file >= 0 && ((flags & (O_DSYNC | O_SYNC)) || (how & (RWF_DSYNC | RWF_SYNC)));
	r.flags = (uint8_t)((durable ? DURABLE : 0) | (zeros ? ZEROS : 0));
	r.begun_ns = now_ns();
	if (durable) {
		size_t length = r.length;
		r.extra = ++number;
		r.data_length = zeros ? 0 : length;
		put(r, data, count);
		pthread_mutex_unlock(&lock);
		delay(shim.sync_us, 2);
		ssize_t n = syscall(SYS_pwritev2, fd, data, count, offset, 0, how);
		int saved = errno, error = fault("sync");
		if (error) {
			saved = error;
			n = -1;
		}
		delay(shim.sync_us, 2);
		pthread_mutex_lock(&lock);
		if (n >= 0 && n != (ssize_t)length)
			put_text(UNSOUND, (uint32_t)file, "short durable write", 19, 0);
		put((struct record){ .kind = n < 0 ? FAILED : DONE, .file = (uint32_t)file, .extra = r.extra,
				     .begun_ns = r.begun_ns, .ended_ns = now_ns() }, NULL, 0);
		pthread_mutex_unlock(&lock);
		errno = saved;
		return n;
	}
	ssize_t n = offset < 0 ? syscall(SYS_writev, fd, data, count)
			       : syscall(SYS_pwritev2, fd, data, count, offset, 0, how);
	int saved = errno;
	if (file >= 0 && n > 0) {
		r.ended_ns = now_ns();
		r.length = (uint64_t)n;
		r.data_length = zeros ? 0 : (uint64_t)n;
		put(r, data, count);
	}
	pthread_mutex_unlock(&lock);
	errno = saved;
	return n;
}

/* Path below the root of the folder that fd stands for, empty for the root itself; or NULL. */
static const char *folder_below(int fd, char *path)
{
	struct stat st;
	if (!watching() || fstat(fd, &st) != 0 || !S_ISDIR(st.st_mode))
		return NULL;
	const char *name = below(fd, path);
	return name ? name : strcmp(path, shim.root) == 0 ? "" : NULL;
}

/* As for a file, but that it can't be made to fail. */
static int do_sync_folder(int fd, long call, const char *name)
{
	struct iovec path = { (void *)(uintptr_t)name, strlen(name) };
	pthread_mutex_lock(&lock);
	struct record r = { .kind = SYNC, .flags = FOLDER, .extra = ++number,
			    .data_length = path.iov_len };
	r.begun_ns = r.ended_ns = now_ns();
	put(r, &path, 1);
	pthread_mutex_unlock(&lock);
	delay(shim.sync_us, 2);
	int result = (int)syscall(call, fd), saved = errno;
	delay(shim.sync_us, 2);
	pthread_mutex_lock(&lock);
	r.kind = result == 0 ? DONE : FAILED;
	r.ended_ns = now_ns();
	put(r, &path, 1);
	pthread_mutex_unlock(&lock);
	errno = saved;
	return result;
}

static int do_sync(int fd, long call)
{
	char path[PATH_MAX];
	const char *folder = folder_below(fd, path);
	if (folder)
		return do_sync_folder(fd, call, folder);
	if (!ours(fd))
		return (int)syscall(call, fd);
	pthread_mutex_lock(&lock);
	int file = file_of(fd);
	struct record r = { .kind = SYNC, .file = (uint32_t)file, .extra = ++number };
	r.begun_ns = r.ended_ns = now_ns();
	if (file >= 0)
		put(r, NULL, 0);
	pthread_mutex_unlock(&lock);
	if (file < 0)
		return (int)syscall(call, fd);
	delay(shim.sync_us, 2);
	int saved = fault("sync"), result = saved ? -1 : (int)syscall(call, fd);
	if (!saved)
		saved = errno;
	delay(shim.sync_us, 2);
	r.kind = result == 0 ? DONE : FAILED;
	pthread_mutex_lock(&lock);
	r.ended_ns = now_ns();
	put(r, NULL, 0);
	pthread_mutex_unlock(&lock);
	errno = saved;
	return result;
}

static void sync_everything(void)
{
	if (!watching())
		return;
	/* Rare enough to be done under the lock. */
	pthread_mutex_lock(&lock);
	struct record r = { .kind = SYNC, .flags = EVERYTHING, .extra = ++number };
	r.begun_ns = r.ended_ns = now_ns();
	put(r, NULL, 0);
	pthread_mutex_unlock(&lock);
	syscall(SYS_sync);
	pthread_mutex_lock(&lock);
	r.kind = DONE;
	r.ended_ns = now_ns();
	put(r, NULL, 0);
	pthread_mutex_unlock(&lock);
}

static int opened(int fd, int flags)
{
	if (fd < 0 || !ours(fd))
		return fd;
	int saved = errno;
	pthread_mutex_lock(&lock);
	int file = file_of(fd);
	if (file >= 0 && (flags & O_TRUNC) && (flags & O_ACCMODE) != O_RDONLY) {
		uint64_t t = now_ns();
		put((struct record){ .kind = TRUNCATE, .file = (uint32_t)file, .begun_ns = t,
				     .ended_ns = t }, NULL, 0);
	}
	pthread_mutex_unlock(&lock);
	errno = saved;
	return fd;
}

#define MODE_OF(flags, last)                                              \
	mode_t mode = 0;                                                  \
	if (((flags) & O_CREAT) || ((flags) & O_TMPFILE) == O_TMPFILE) {  \
		va_list args;                                             \
		va_start(args, last);                                     \
		mode = va_arg(args, mode_t);                              \
		va_end(args);                                             \
	}

static int do_open(int at, const char *path, int flags, mode_t mode)
{
	return opened((int)syscall(SYS_openat, at, path, flags, mode), flags);
}

int open(const char *path, int flags, ...)
{
	MODE_OF(flags, flags)
	return do_open(AT_FDCWD, path, flags, mode);
}

int open64(const char *path, int flags, ...)
{
	MODE_OF(flags, flags)
	return do_open(AT_FDCWD, path, flags | O_LARGEFILE, mode);
}

int openat(int at, const char *path, int flags, ...)
{
	MODE_OF(flags, flags)
	return do_open(at, path, flags, mode);
}

int openat64(int at, const char *path, int flags, ...)
{
	MODE_OF(flags, flags)
	return do_open(at, path, flags | O_LARGEFILE, mode);
}

int __open_2(const char *path, int flags);
int __open64_2(const char *path, int flags);
int __openat_2(int at, const char *path, int flags);
int __openat64_2(int at, const char *path, int flags);

int __open_2(const char *path, int flags)
{
	return do_open(AT_FDCWD, path, flags, 0);
}

int __open64_2(const char *path, int flags)
{
	return do_open(AT_FDCWD, path, flags, 0);
}

int __openat_2(int at, const char *path, int flags)
{
	return do_open(at, path, flags, 0);
}

int __openat64_2(int at, const char *path, int flags)
{
	return do_open(at, path, flags, 0);
}

int creat(const char *path, mode_t mode)
{
	return do_open(AT_FDCWD, path, O_WRONLY | O_CREAT | O_TRUNC, mode);
}

int creat64(const char *path, mode_t mode)
{
	return creat(path, mode);
}

ssize_t write(int fd, const void *data, size_t length)
{
	if (!ours(fd))
		return syscall(SYS_write, fd, data, length);
	struct iovec v = { (void *)(uintptr_t)data, length };
	return do_write(fd, &v, 1, -1, 0);
}

ssize_t pwrite(int fd, const void *data, size_t length, off_t offset)
{
	if (!ours(fd))
		return syscall(SYS_pwrite64, fd, data, length, offset);
	struct iovec v = { (void *)(uintptr_t)data, length };
	return do_write(fd, &v, 1, offset, 0);
}

ssize_t pwrite64(int fd, const void *data, size_t length, off_t offset)
{
	return pwrite(fd, data, length, offset);
}

ssize_t writev(int fd, const struct iovec *data, int count)
{
	return do_write(fd, data, count, -1, 0);
}

ssize_t pwritev(int fd, const struct iovec *data, int count, off_t offset)
{
	return do_write(fd, data, count, offset, 0);
}

ssize_t pwritev64(int fd, const struct iovec *data, int count, off_t offset)
{
	return do_write(fd, data, count, offset, 0);
}

ssize_t pwritev2(int fd, const struct iovec *data, int count, off_t offset, int how)
{
	return do_write(fd, data, count, offset, how);
}

ssize_t pwritev64v2(int fd, const struct iovec *data, int count, off_t offset, int how)
{
	return do_write(fd, data, count, offset, how);
}

long syscall(long call, ...)
{
	static long (*real)(long, ...);
	long a[6], result;
	va_list args;
	va_start(args, call);
	aio_double_arguments(a, args);
	va_end(args);
	if (aio_double_call(call, a, pwritev, &result))
		return result;
	if (!real) {
		void *f = dlsym(RTLD_NEXT, "syscall");
		memcpy(&real, &f, sizeof real);
	}
	return real(call, a[0], a[1], a[2], a[3], a[4], a[5]);
}

int ftruncate(int fd, off_t length)
{
	if (!ours(fd))
		return (int)syscall(SYS_ftruncate, fd, length);
	pthread_mutex_lock(&lock);
	int file = file_of(fd);
	uint64_t begun = now_ns();
	int result = (int)syscall(SYS_ftruncate, fd, length);
	int saved = errno;
	if (file >= 0 && result == 0)
		put((struct record){ .kind = TRUNCATE, .file = (uint32_t)file, .begun_ns = begun,
				     .ended_ns = now_ns(), .length = (uint64_t)length }, NULL, 0);
	pthread_mutex_unlock(&lock);
	errno = saved;
	return result;
}

int ftruncate64(int fd, off_t length)
{
	return ftruncate(fd, length);
}

int truncate(const char *path, off_t length)
{
	int fd = do_open(AT_FDCWD, path, O_WRONLY | O_CLOEXEC, 0);
	if (fd < 0)
		return -1;
	int result = ftruncate(fd, length), saved = errno;
	syscall(SYS_close, fd);
	errno = saved;
	return result;
}

int fallocate(int fd, int mode, off_t offset, off_t length)
{
	if (!ours(fd))
		return (int)syscall(SYS_fallocate, fd, mode, offset, length);
	pthread_mutex_lock(&lock);
	int file = file_of(fd), error = file >= 0 ? fault("write") : 0;
	uint64_t begun = now_ns();
	int result = -1, saved = error;
	/* Giving space back works on a full disk too. */
	if (!error || (mode & FALLOC_FL_PUNCH_HOLE)) {
		result = (int)syscall(SYS_fallocate, fd, mode, offset, length);
		saved = errno;
	}
	if (file >= 0 && result == 0)
		put((struct record){ .kind = ALLOCATE, .file = (uint32_t)file,
				     .extra = (uint32_t)mode, .begun_ns = begun,
				     .ended_ns = now_ns(), .offset = (uint64_t)offset,
				     .length = (uint64_t)length }, NULL, 0);
	pthread_mutex_unlock(&lock);
	errno = saved;
	return result;
}

int fallocate64(int fd, int mode, off_t offset, off_t length)
{
	return fallocate(fd, mode, offset, length);
}

int posix_fallocate(int fd, off_t offset, off_t length)
{
	return fallocate(fd, 0, offset, length) == 0 ? 0 : errno;
}

int posix_fallocate64(int fd, off_t offset, off_t length)
{
	return posix_fallocate(fd, offset, length);
}

int fsync(int fd)
{
	return do_sync(fd, SYS_fsync);
}

int fdatasync(int fd)
{
	return do_sync(fd, SYS_fdatasync);
}

void sync(void)
{
	if (watching())
		sync_everything();
	else
		syscall(SYS_sync);
}

int syncfs(int fd)
{
	if (!watching())
		return (int)syscall(SYS_syncfs, fd);
	sync_everything();
	return 0;
}

/* Starts writing but promises nothing about durability: not a sync. */
int sync_file_range(int fd, off_t offset, off_t length, unsigned flags)
{
	return (int)syscall(SYS_sync_file_range, fd, offset, length, flags);
}

static void unsound(int fd, const char *what)
{
	if (!ours(fd))
		return;
	pthread_mutex_lock(&lock);
	int file = file_of(fd);
	if (file >= 0)
		put_text(UNSOUND, (uint32_t)file, what, strlen(what), 0);
	pthread_mutex_unlock(&lock);
}

ssize_t copy_file_range(int from, off_t *from_offset, int to, off_t *to_offset, size_t length,
			unsigned flags)
{
	unsound(to, "copy_file_range");
	return syscall(SYS_copy_file_range, from, from_offset, to, to_offset, length, flags);
}

ssize_t sendfile(int to, int from, off_t *offset, size_t length)
{
	unsound(to, "sendfile");
	return syscall(SYS_sendfile, to, from, offset, length);
}

ssize_t sendfile64(int to, int from, off_t *offset, size_t length)
{
	return sendfile(to, from, offset, length);
}

void *mmap(void *address, size_t length, int protection, int flags, int fd, off_t offset)
{
	if (fd >= 0 && (protection & PROT_WRITE) && (flags & MAP_TYPE) != MAP_PRIVATE && ours(fd)) {
		pthread_mutex_lock(&lock);
		int file = file_of(fd);
		if (file >= 0)
			put((struct record){ .kind = MAPPED, .file = (uint32_t)file,
					     .begun_ns = now_ns() }, NULL, 0);
		pthread_mutex_unlock(&lock);
	}
	return (void *)syscall(SYS_mmap, address, length, protection, flags, fd, offset);
}

void *mmap64(void *address, size_t length, int protection, int flags, int fd, off_t offset)
{
	return mmap(address, length, protection, flags, fd, offset);
}

int msync(void *address, size_t length, int flags)
{
	return (int)syscall(SYS_msync, address, length, flags);
}

/* An absolute path below the root, or NULL. The last part need not exist. */
static const char *named(int at, const char *path, char *out)
{
	char folder[PATH_MAX], full[PATH_MAX];
	int n;
	if (path[0] == '/') {
		n = snprintf(full, sizeof full, "%s", path);
	} else if (at == AT_FDCWD) {
		if (!getcwd(folder, sizeof folder))
			return NULL;
		n = snprintf(full, sizeof full, "%s/%s", folder, path);
	} else {
		char link[64];
		snprintf(link, sizeof link, "/proc/self/fd/%d", at);
		ssize_t length = readlink(link, folder, sizeof folder - 1);
		if (length <= 0)
			return NULL;
		folder[length] = 0;
		n = snprintf(full, sizeof full, "%s/%s", folder, path);
	}
	if (n < 0 || n >= (int)sizeof full)
		return NULL;
	char *slash = strrchr(full, '/');
	if (!slash)
		return NULL;
	*slash = 0;
	if (!realpath(full[0] ? full : "/", folder))
		return NULL;
	n = snprintf(out, PATH_MAX, "%s/%s", folder, slash + 1);
	if (n < 0 || n >= PATH_MAX || strncmp(out, shim.root, shim.root_length) != 0
	    || out[shim.root_length] != '/')
		return NULL;
	return out + shim.root_length + 1;
}

static int do_rename(int from_at, const char *from, int to_at, const char *to, unsigned flags)
{
	char a[PATH_MAX], b[PATH_MAX], both[2 * PATH_MAX];
	struct stat replaced;
	if (!watching())
		return (int)syscall(SYS_renameat2, from_at, from, to_at, to, flags);
	pthread_mutex_lock(&lock);
	const char *old = named(from_at, from, a), *new = named(to_at, to, b);
	bool over = fstatat(to_at, to, &replaced, 0) == 0 && replaced.st_nlink == 1;
	int result = (int)syscall(SYS_renameat2, from_at, from, to_at, to, flags), saved = errno;
	if (result == 0 && (old || new)) {
		int n = snprintf(both, sizeof both, "%s%c%s", old ? old : "", 0, new ? new : "");
		put_text(RENAME, 0, both, (size_t)n, 0);
		for (int i = 0; over && i < FILES_MAX && files[i].used; i++)
			if (files[i].device == replaced.st_dev && files[i].inode == replaced.st_ino)
				files[i].inode = 0;
	}
	pthread_mutex_unlock(&lock);
	errno = saved;
	return result;
}

int rename(const char *from, const char *to)
{
	return do_rename(AT_FDCWD, from, AT_FDCWD, to, 0);
}

int renameat(int from_at, const char *from, int to_at, const char *to)
{
	return do_rename(from_at, from, to_at, to, 0);
}

int renameat2(int from_at, const char *from, int to_at, const char *to, unsigned flags)
{
	return do_rename(from_at, from, to_at, to, flags);
}

int unlinkat(int at, const char *path, int flags)
{
	char buffer[PATH_MAX];
	struct stat st;
	if (!watching())
		return (int)syscall(SYS_unlinkat, at, path, flags);
	pthread_mutex_lock(&lock);
	const char *name = named(at, path, buffer);
	bool last = fstatat(at, path, &st, AT_SYMLINK_NOFOLLOW) == 0 && st.st_nlink == 1;
	int result = (int)syscall(SYS_unlinkat, at, path, flags), saved = errno;
	if (result == 0 && name) {
		put_text(REMOVE, 0, name, strlen(name), 0);
		/* Its inode number may come back as another file's. */
		for (int i = 0; last && i < FILES_MAX && files[i].used; i++)
			if (files[i].device == st.st_dev && files[i].inode == st.st_ino)
				files[i].inode = 0;
	}
	pthread_mutex_unlock(&lock);
	errno = saved;
	return result;
}

int unlink(const char *path)
{
	return unlinkat(AT_FDCWD, path, 0);
}

int rmdir(const char *path)
{
	return unlinkat(AT_FDCWD, path, AT_REMOVEDIR);
}

int mkdirat(int at, const char *path, mode_t mode)
{
	char buffer[PATH_MAX];
	int result = (int)syscall(SYS_mkdirat, at, path, mode), saved = errno;
	if (result == 0 && watching()) {
		pthread_mutex_lock(&lock);
		const char *name = named(at, path, buffer);
		if (name)
			put_text(MAKE_FOLDER, 0, name, strlen(name), 0);
		pthread_mutex_unlock(&lock);
	}
	errno = saved;
	return result;
}

int mkdir(const char *path, mode_t mode)
{
	return mkdirat(AT_FDCWD, path, mode);
}
