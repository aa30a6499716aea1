/* What can be seen of the kernel's nbd devices; see sysfs.h. */
#include "device/sysfs.h"

#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/mem.h"

#define OPENERS_WAIT_NS NS_PER_S
#define OPENERS_LOOK_US 50000
/* "/dev/nbdNpM" and its like. */
#define SHORT_PATH_BYTES 300

/* --- reading ------------------------------------------------------------------------------- */

/* The index out of "nbd3"; -1: it is no such name. */
static int parse_name(const char *name)
{
    if (strncmp(name, "nbd", 3) != 0 || !isdigit((unsigned char)name[3]))
        return -1;
    char *end;
    unsigned long n = strtoul(name + 3, &end, 10);
    return *end || n > SYSFS_INDEX_MAX ? -1 : (int)n;
}

enum status sysfs_parse(const char *text, int *index, struct err *e)
{
    char *found = strchr(text, '/') ? realpath(text, NULL) : NULL;
    const char *path = found ? found : text, *slash = strrchr(path, '/');
    bool in_dev = !slash || (slash - path == 4 && strncmp(path, "/dev", 4) == 0);
    *index = in_dev ? parse_name(slash ? slash + 1 : path) : -1;
    free(found);
    if (*index < 0)
        return fail(e, ST_INVAL, "\"%.200s\" is not an nbd device, as /dev/nbd0 is", text);
    return ST_OK;
}

/* The first line of /sys/block/nbdN/FILE; false where there is none. */
static bool read_line(int index, const char *file, char *out, size_t cap)
{
    char path[SHORT_PATH_BYTES];
    snprintf(path, sizeof path, "/sys/block/nbd%d/%s", index, file);
    FILE *f = fopen(path, "re");
    bool got = f && fgets(out, (int)cap, f);
    if (f)
        fclose(f);
    if (!got)
        out[0] = '\0';
    out[strcspn(out, "\n")] = '\0';
    return got;
}

static uint64_t read_number(int index, const char *file)
{
    char text[32];
    return read_line(index, file, text, sizeof text) ? strtoull(text, NULL, 10) : 0;
}

static uint32_t count_entries(int index, const char *folder)
{
    char path[SHORT_PATH_BYTES];
    snprintf(path, sizeof path, "/sys/block/nbd%d/%s", index, folder);
    DIR *dir = opendir(path);
    uint32_t n = 0;
    for (struct dirent *d; dir && (d = readdir(dir));)
        n += d->d_name[0] != '.';
    if (dir)
        closedir(dir);
    return n;
}

void sysfs_read(int index, struct sysfs_device *d)
{
    char text[32];
    *d = (struct sysfs_device){.index = index};
    d->attached = read_line(index, "pid", text, sizeof text);
    d->pid = (uint32_t)strtoul(text, NULL, 10);
    d->n_connections = count_entries(index, "mq");
    d->block_size = (uint32_t)read_number(index, "queue/logical_block_size");
    d->size = read_number(index, "size") * 512;
    d->read_only = read_number(index, "ro") != 0;
    read_line(index, "backend", d->backend, sizeof d->backend);
}

static int by_index(const void *a, const void *b)
{
    return ((const struct sysfs_device *)a)->index - ((const struct sysfs_device *)b)->index;
}

struct sysfs_device *sysfs_list(size_t *n)
{
    struct sysfs_device *all = NULL;
    size_t cap = 0;
    *n = 0;
    DIR *dir = opendir("/sys/block");
    for (struct dirent *d; dir && (d = readdir(dir));) {
        int index = parse_name(d->d_name);
        if (index < 0)
            continue;
        mem_grow(&all, &cap, *n + 1, sizeof *all);
        sysfs_read(index, &all[(*n)++]);
    }
    if (dir)
        closedir(dir);
    if (*n > 0)
        qsort(all, *n, sizeof *all, by_index);
    return all;
}

void sysfs_set_request_check(int index, uint32_t interval_ms)
{
    char path[SHORT_PATH_BYTES];
    snprintf(path, sizeof path, "/sys/block/nbd%d/queue/io_timeout", index);
    FILE *f = fopen(path, "we");
    if (!f)
        return;
    fprintf(f, "%u\n", interval_ms);
    fclose(f);
}

/* --- who uses it --------------------------------------------------------------------------- */

/* Whether `name` is "nbd3", or "nbd3p1" and its like. */
static bool is_part_of(int index, const char *name)
{
    char whole[16];
    size_t len = (size_t)snprintf(whole, sizeof whole, "nbd%d", index);
    return strncmp(name, whole, len) == 0 && (name[len] == '\0' || name[len] == 'p');
}

/* The same for a path. */
static bool is_device_path(int index, const char *path)
{
    return strncmp(path, "/dev/", 5) == 0 && is_part_of(index, path + 5);
}

/* The same for a device's number. Those of partitions that lie beyond the range of minor numbers
 * are of a major number of their own, so the kernel is asked for the name. */
static bool is_device_number(int index, dev_t number)
{
    char path[SHORT_PATH_BYTES], link[SHORT_PATH_BYTES];
    snprintf(path, sizeof path, "/sys/dev/block/%u:%u", major(number), minor(number));
    ssize_t n = readlink(path, link, sizeof link - 1);
    if (n <= 0)
        return false;
    link[n] = '\0';
    return is_part_of(index, strrchr(link, '/') ? strrchr(link, '/') + 1 : link);
}

/* "36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw": see proc_pid_mountinfo(5). */
static bool find_mount(int index, char *where, size_t cap)
{
    FILE *f = fopen("/proc/self/mountinfo", "re");
    char *line = NULL;
    size_t size = 0;
    bool found = false;
    while (f && !found && getline(&line, &size, f) > 0) {
        unsigned ma, mi;
        int place = 0, place_end = 0;
        if (sscanf(line, "%*s %*s %u:%u %*s %n%*s%n", &ma, &mi, &place, &place_end) != 2 ||
            !place_end)
            continue;
        /* Some file systems have a number of their own, but name their source. */
        char source[SHORT_PATH_BYTES] = "";
        const char *dash = strstr(line + place_end, " - ");
        if (dash)
            sscanf(dash, " - %*s %299s", source);
        found = is_device_number(index, makedev(ma, mi)) || is_device_path(index, source);
        if (found)
            snprintf(where, cap, "%.*s", place_end - place, line + place);
    }
    free(line);
    if (f)
        fclose(f);
    return found;
}

static bool is_swap(int index)
{
    FILE *f = fopen("/proc/swaps", "re");
    char *line = NULL;
    size_t size = 0;
    bool found = false;
    while (f && !found && getline(&line, &size, f) > 0)
        found = is_device_path(index, line);
    free(line);
    if (f)
        fclose(f);
    return found;
}

/* Another block device that is made of it: of LVM, RAID, dm-crypt. */
static bool find_holder(int index, char *name, size_t cap)
{
    char path[SHORT_PATH_BYTES];
    snprintf(path, sizeof path, "/sys/block/nbd%d", index);
    DIR *dir = opendir(path);
    bool found = false;
    for (struct dirent *d; dir && !found && (d = readdir(dir));) {
        bool whole = strcmp(d->d_name, "holders") == 0;
        if (!whole && !is_part_of(index, d->d_name))
            continue;
        char holders[2 * SHORT_PATH_BYTES + 10];
        snprintf(holders, sizeof holders, "%s/%s%s", path, d->d_name, whole ? "" : "/holders");
        DIR *inner = opendir(holders);
        for (struct dirent *h; inner && !found && (h = readdir(inner));) {
            found = h->d_name[0] != '.';
            if (found)
                snprintf(name, cap, "%s", h->d_name);
        }
        if (inner)
            closedir(inner);
    }
    if (dir)
        closedir(dir);
    return found;
}

/* Whether one of the files of that process is the device. */
static bool has_open(int index, const char *pid)
{
    char path[SHORT_PATH_BYTES + 300];
    snprintf(path, sizeof path, "/proc/%.20s/fd", pid);
    DIR *dir = opendir(path);
    bool found = false;
    for (struct dirent *d; dir && !found && (d = readdir(dir));) {
        struct stat st;
        snprintf(path, sizeof path, "/proc/%.20s/fd/%.20s", pid, d->d_name);
        found = d->d_name[0] != '.' && stat(path, &st) == 0 && S_ISBLK(st.st_mode) &&
                is_device_number(index, st.st_rdev);
    }
    if (dir)
        closedir(dir);
    return found;
}

static bool find_opener(int index, char *who, size_t cap)
{
    DIR *dir = opendir("/proc");
    bool found = false;
    for (struct dirent *d; dir && !found && (d = readdir(dir));) {
        found = isdigit((unsigned char)d->d_name[0]) && has_open(index, d->d_name);
        if (!found)
            continue;
        char path[SHORT_PATH_BYTES], name[32] = "";
        snprintf(path, sizeof path, "/proc/%.20s/comm", d->d_name);
        FILE *f = fopen(path, "re");
        if (f && fgets(name, sizeof name, f))
            name[strcspn(name, "\n")] = '\0';
        if (f)
            fclose(f);
        snprintf(who, cap, "%s (pid %.20s)", name, d->d_name);
    }
    if (dir)
        closedir(dir);
    return found;
}

/* Whether the kernel says that somebody has it to himself, whom we may not see from here. */
static bool is_claimed(int index)
{
    char path[SHORT_PATH_BYTES];
    snprintf(path, sizeof path, "/dev/nbd%d", index);
    int fd = open(path, O_RDONLY | O_EXCL | O_CLOEXEC);
    if (fd >= 0)
        close(fd);
    return fd < 0 && errno == EBUSY;
}

enum status sysfs_check_unused(int index, struct err *e)
{
    char who[SHORT_PATH_BYTES];
    if (find_mount(index, who, sizeof who))
        return fail(e, ST_BUSY, "/dev/nbd%d is mounted on %s: unmount it first", index, who);
    if (is_swap(index))
        return fail(e, ST_BUSY, "/dev/nbd%d is swapped to: swapoff it first", index);
    if (find_holder(index, who, sizeof who))
        return fail(e, ST_BUSY, "/dev/nbd%d is part of %s: stop that first", index, who);
    for (uint64_t until = now_ns() + OPENERS_WAIT_NS;; usleep(OPENERS_LOOK_US)) {
        bool open = find_opener(index, who, sizeof who);
        if (!open && !is_claimed(index))
            return ST_OK;
        if (now_ns() < until)
            continue;
        if (open)
            return fail(e, ST_BUSY, "/dev/nbd%d is open: %s has it", index, who);
        return fail(e, ST_BUSY,
                    "/dev/nbd%d is in use by something that can't be seen from here, as a mount in "
                    "another container",
                    index);
    }
}
