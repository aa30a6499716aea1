#include "base/memlimit.h"

#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sysinfo.h>

#include "base/bytes.h"

#define V1_FOLDER "/sys/fs/cgroup/memory"
#define V2_FOLDER "/sys/fs/cgroup"

/* The number in a file, or no limit: no such file, or another word ("max"). */
static uint64_t file_number(const char *path)
{
    char text[32] = "";
    FILE *f = fopen(path, "re");
    if (!f)
        return UINT64_MAX;
    bool any = fgets(text, sizeof text, f) && text[0] >= '0' && text[0] <= '9';
    fclose(f);
    return any ? strtoull(text, NULL, 10) : UINT64_MAX;
}

/* The lowest limit of the group and those it is in. Inside a container the group may go by the
 * name it has outside; then the topmost one that can be seen is the container's own. */
static uint64_t groups_limit(const char *folder, char *group, const char *file)
{
    uint64_t least = UINT64_MAX;
    for (;;) {
        char path[640];
        snprintf(path, sizeof path, "%s%s/%s", folder, group, file);
        least = min_u64(least, file_number(path));
        char *slash = strrchr(group, '/');
        if (!slash)
            return least;
        *slash = '\0';
    }
}

uint64_t memory_limit_bytes(void)
{
    struct sysinfo info;
    uint64_t least = UINT64_MAX;
    if (sysinfo(&info) == 0)
        least = (uint64_t)info.totalram * info.mem_unit;
    FILE *f = fopen("/proc/self/cgroup", "re");
    if (!f)
        return least;
    /* "3:cpu,memory:/group"; version 2 has no controllers in it. */
    char line[512];
    while (fgets(line, sizeof line, f)) {
        line[strcspn(line, "\n")] = '\0';
        char *controllers = strchr(line, ':');
        char *group = controllers ? strchr(++controllers, ':') : NULL;
        if (!group)
            continue;
        *group++ = '\0';
        if (!*controllers)
            least = min_u64(least, groups_limit(V2_FOLDER, group, "memory.max"));
        else if (strstr(controllers, "memory"))
            least = min_u64(least, groups_limit(V1_FOLDER, group, "memory.limit_in_bytes"));
    }
    fclose(f);
    return least;
}
