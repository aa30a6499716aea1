/*
 * Processes by what /proc says of them. Whatever is missing or makes no sense is
 * taken as "can't be told": to call a process dead that lives is the one mistake
 * that must not happen.
 */
#include "base/process.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

/* Reads a file of /proc whole; false where it is not there or longer than `cap` - 1. */
static bool read_text(const char *path, char *text, size_t cap)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return false;
    ssize_t n = read(fd, text, cap - 1);
    close(fd);
    if (n <= 0)
        return false;
    text[n] = '\0';
    return true;
}

/* State and start time out of /proc/PID/stat. */
static bool read_stat(uint32_t pid, char *state, uint64_t *start_ticks)
{
    char path[40], text[1024];
    snprintf(path, sizeof path, "/proc/%u/stat", pid);
    if (!read_text(path, text, sizeof text))
        return false;
    /* The name may hold anything, also spaces and brackets: fields count from its end. */
    const char *p = strrchr(text, ')');
    if (!p || p[1] != ' ')
        return false;
    p += 2;
    *state = *p;
    for (int field = 3; field < 22; field++) {
        p = strchr(p, ' ');
        if (!p)
            return false;
        p++;
    }
    *start_ticks = strtoull(p, NULL, 10);
    return *start_ticks != 0;
}

static uint64_t inode_of(const char *path)
{
    struct stat st;
    return stat(path, &st) == 0 ? (uint64_t)st.st_ino : 0;
}

/* "xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx" */
static bool read_boot(uint8_t boot[PROCESS_BOOT_BYTES])
{
    char text[64];
    size_t n = 0;
    if (!read_text("/proc/sys/kernel/random/boot_id", text, sizeof text))
        return false;
    for (const char *p = text; n < PROCESS_BOOT_BYTES; p += 2) {
        unsigned byte;
        if (*p == '-')
            p++;
        if (sscanf(p, "%2x", &byte) != 1)
            return false;
        boot[n++] = (uint8_t)byte;
    }
    return true;
}

/* Whether /proc shows the processes that our ids mean: it may be mounted for another
 * namespace. */
static bool proc_is_ours(void)
{
    char link[32];
    ssize_t n = readlink("/proc/self", link, sizeof link - 1);
    if (n <= 0)
        return false;
    link[n] = '\0';
    return strtol(link, NULL, 10) == getpid();
}

void process_self(struct process_id *id)
{
    char state;
    struct process_id self = {.pid = (uint32_t)getpid()};
    *id = self;
    if (!proc_is_ours() || !read_boot(self.boot) || !read_stat(self.pid, &state, &self.start_ticks))
        return;
    self.pid_namespace = inode_of("/proc/self/ns/pid");
    self.time_namespace = inode_of("/proc/self/ns/time");
    if (self.pid_namespace)
        *id = self;
}

/* Whether its id and times mean here what they mean to itself. */
static bool is_from_here(const struct process_id *id)
{
    static const uint8_t unknown[PROCESS_BOOT_BYTES];
    struct process_id self;
    if (id->pid <= 1 || !id->start_ticks || !memcmp(id->boot, unknown, sizeof unknown))
        return false;
    process_self(&self);
    return !memcmp(id->boot, self.boot, sizeof self.boot) &&
           id->pid_namespace == self.pid_namespace && id->time_namespace == self.time_namespace;
}

/* Another one that got its id, or what is left of it until its parent looks: nothing of the
 * program runs in a zombie. */
static bool is_over(const struct process_id *id, char state, uint64_t start_ticks)
{
    return start_ticks != id->start_ticks || state == 'Z' || state == 'X';
}

bool process_ended(const struct process_id *id)
{
    char state = 0;
    uint64_t start_ticks = 0;
    if (!is_from_here(id))
        return false;
    if (kill((pid_t)id->pid, 0) != 0 && errno == ESRCH)
        return true;
    return read_stat(id->pid, &state, &start_ticks) && is_over(id, state, start_ticks);
}

int process_pidfd(const struct process_id *id)
{
    char state = 0;
    uint64_t start_ticks = 0;
    if (!is_from_here(id))
        return -1;
    int fd = (int)syscall(SYS_pidfd_open, (pid_t)id->pid, 0);
    if (fd < 0)
        return -1;
    /* Looked at after the descriptor is had: from here on it can be no other process. */
    if (read_stat(id->pid, &state, &start_ticks) && !is_over(id, state, start_ticks))
        return fd;
    close(fd);
    return -1;
}
