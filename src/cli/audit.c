/* Changes, told and kept; see audit.h. */
#include "cli/audit.h"

#include <pwd.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <syslog.h>
#include <unistd.h>

#include "base/log.h"

#define LINE_BYTES 1024u

const char *audit_user(char out[AUDIT_USER_BYTES])
{
    struct passwd entry, *found = NULL;
    char memory[4096];
    if (getpwuid_r(geteuid(), &entry, memory, sizeof memory, &found) == 0 && found)
        snprintf(out, AUDIT_USER_BYTES, "%s", found->pw_name);
    else
        snprintf(out, AUDIT_USER_BYTES, "uid %lu", (unsigned long)geteuid());
    return out;
}

/* The one who logged in, also behind sudo; -1 where nobody did, or the kernel does not say. */
static long login_uid(void)
{
    long uid = -1;
    FILE *f = fopen("/proc/self/loginuid", "re");
    if (!f)
        return -1;
    if (fscanf(f, "%ld", &uid) != 1 || uid == (long)(uid_t)-1)
        uid = -1;
    fclose(f);
    return uid;
}

void audit_changed(const struct cli *cli, const char *format, ...)
{
    char what[LINE_BYTES], user[AUDIT_USER_BYTES], host[65] = "", login[32] = "";
    va_list args;
    va_start(args, format);
    vsnprintf(what, sizeof what, format, args);
    va_end(args);
    puts(what);
    fflush(stdout);

    gethostname(host, sizeof host - 1);
    if (login_uid() >= 0)
        snprintf(login, sizeof login, " (login uid %ld)", login_uid());
    audit_user(user);
    /* A server has a log of its own. So has a command without a system log, as in most containers:
     * stderr, where the level is info. */
    if (cli->command == &serve_command || access(_PATH_LOG, F_OK) != 0) {
        log_info("audit: %s%s, process %ld on %s, %s", user, login, (long)getpid(), host, what);
        return;
    }
    openlog("fdb-nbd", LOG_PID, LOG_DAEMON);
    syslog(LOG_NOTICE, "audit: %s%s, process %ld on %s, %s", user, login, (long)getpid(), host,
           what);
    closelog();
}
