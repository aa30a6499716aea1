/* Giving up rights; see privilege.h. */
#include "base/privilege.h"

#include <errno.h>
#include <grp.h>
#include <linux/capability.h>
#include <pwd.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

/* Text that is all digits, as the number of a user or group. */
static bool parse_id(const char *text, unsigned *id)
{
    char *end;
    errno = 0;
    unsigned long long v = strtoull(text, &end, 10);
    /* (The last number means nobody at all.) */
    if (text[0] < '0' || text[0] > '9' || *end || errno || v >= UINT32_MAX)
        return false;
    *id = (unsigned)v;
    return true;
}

static enum status find_group(const char *text, gid_t *gid, struct err *e)
{
    const struct group *group;
    if (parse_id(text, gid))
        return ST_OK;
    group = getgrnam(text);
    if (!group)
        return fail(e, ST_INVAL, "there is no group \"%.64s\" on this machine", text);
    *gid = group->gr_gid;
    return ST_OK;
}

enum status privilege_find(const char *text, struct privilege_user *out, struct err *e)
{
    char name[PRIVILEGE_NAME_BYTES];
    const char *colon = strchr(text, ':');
    size_t len = colon ? (size_t)(colon - text) : strlen(text);
    memset(out, 0, sizeof *out);
    if (len == 0 || len >= sizeof name || (colon && !colon[1]))
        return fail(e, ST_INVAL, "\"%.140s\" is not NAME or NAME:GROUP", text);
    memcpy(name, text, len);
    name[len] = '\0';
    bool is_number = parse_id(name, &out->uid);
    const struct passwd *user = is_number ? getpwuid(out->uid) : getpwnam(name);
    if (!user && !is_number)
        return fail(e, ST_INVAL, "there is no user \"%s\" on this machine", name);
    if (!user && !colon)
        return fail(e, ST_INVAL, "the user %s has no entry on this machine that says its group: "
                    "add one, %s:GROUP", name, name);
    if (user) {
        snprintf(out->name, sizeof out->name, "%s", user->pw_name);
        snprintf(out->home, sizeof out->home, "%s", user->pw_dir);
        out->uid = user->pw_uid;
        out->gid = user->pw_gid;
    }
    return colon ? find_group(colon + 1, &out->gid, e) : ST_OK;
}

static enum status cannot(const char *what, struct err *e)
{
    return fail(e, ST_UNAVAIL, "cannot give up root's rights: %s: %s", what, strerror(errno));
}

/* So that not even a program of root's could get them back. Harmless where it is not allowed. */
static void empty_bounding_set(void)
{
    for (unsigned long cap = 0; prctl(PR_CAPBSET_READ, cap, 0, 0, 0) >= 0; cap++)
        prctl(PR_CAPBSET_DROP, cap, 0, 0, 0);
}

static void move_home(const struct privilege_user *user)
{
    if (user->home[0])
        setenv("HOME", user->home, 1);
    if (user->name[0]) {
        setenv("USER", user->name, 1);
        setenv("LOGNAME", user->name, 1);
    }
    unsetenv("XDG_RUNTIME_DIR");
    unsetenv("XDG_DATA_HOME");
}

static bool is_all(const struct privilege_user *user)
{
    uid_t uid, euid, suid;
    gid_t gid, egid, sgid;
    return getresuid(&uid, &euid, &suid) == 0 && getresgid(&gid, &egid, &sgid) == 0 &&
           uid == user->uid && euid == uid && suid == uid && gid == user->gid && egid == gid &&
           sgid == gid;
}

enum status privilege_become(const struct privilege_user *user, struct err *e)
{
    if (is_all(user))
        return ST_OK;
    if (geteuid() != 0)
        return fail(e, ST_PERM, "cannot run as user %s (uid %lu, gid %lu): only root can change "
                    "into another user, and this is uid %lu, gid %lu",
                    user->name, (unsigned long)user->uid, (unsigned long)user->gid,
                    (unsigned long)geteuid(), (unsigned long)getegid());
    if (user->uid != 0)
        empty_bounding_set();
    if (user->name[0] ? initgroups(user->name, user->gid) : setgroups(1, &user->gid))
        return cannot("its groups", e);
    if (setresgid(user->gid, user->gid, user->gid) != 0)
        return cannot("its group", e);
    if (setresuid(user->uid, user->uid, user->uid) != 0)
        return cannot("its user", e);
    if (!is_all(user) || (user->uid != 0 && setresuid(-1u, 0, -1u) == 0))
        return fail(e, ST_UNAVAIL, "cannot give up root's rights: the kernel did not take them");
    /* The kernel hides a process that was another user's from its own user, who has to see which
     * sockets are whose (serve --replace). */
    prctl(PR_SET_DUMPABLE, 1, 0, 0, 0);
    move_home(user);
    return ST_OK;
}

/* Where there is none already, nothing is asked for: a filter on system calls may forbid it. */
static bool drop_capabilities(void)
{
    struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
    struct __user_cap_data_struct have[_LINUX_CAPABILITY_U32S_3];
    const struct __user_cap_data_struct none[_LINUX_CAPABILITY_U32S_3] = {{0}};
    if (syscall(SYS_capget, &header, have) == 0 && memcmp(have, none, sizeof none) == 0)
        return true;
    return syscall(SYS_capset, &header, none) == 0;
}

enum status privilege_keep_none(struct err *e)
{
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0)
        return fail(e, ST_UNAVAIL, "cannot give up rights for good: %s", strerror(errno));
    if (geteuid() != 0 && !drop_capabilities())
        return fail(e, ST_UNAVAIL, "cannot give up capabilities: %s", strerror(errno));
    return ST_OK;
}
