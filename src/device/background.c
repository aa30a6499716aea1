/* A process that stays behind; see background.h. */
#include "device/background.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <unistd.h>

#include "base/log.h"

enum status background_begin(struct background *b, struct err *e)
{
    int ends[2];
    if (pipe2(ends, O_CLOEXEC) != 0)
        return fail(e, ST_IO, "cannot make a pipe: %s", strerror(errno));
    pid_t pid = fork();
    if (pid < 0)
        return fail(e, ST_IO, "cannot make a process: %s", strerror(errno));
    b->stays = pid == 0;
    b->pipe = ends[b->stays];
    close(ends[!b->stays]);
    return ST_OK;
}

enum status background_wait(struct background *b, struct background_report *report, struct err *e)
{
    ssize_t n;
    do
        n = read(b->pipe, report, sizeof *report);
    while (n < 0 && errno == EINTR);
    close(b->pipe);
    /* (It is less than a pipe takes at once, so it comes whole or not at all.) */
    if (n != (ssize_t)sizeof *report)
        return fail(e, ST_IO, "the process in the background ended without a word");
    if (report->err.st != ST_OK && e)
        *e = report->err;
    return report->err.st;
}

void background_report(struct background *b, const struct background_report *report)
{
    setsid();
    if (chdir("/") != 0)
        log_debug("cannot leave the folder: %s", strerror(errno));
    int null = open("/dev/null", O_RDWR | O_CLOEXEC);
    dup2(null, STDIN_FILENO);
    dup2(null, STDOUT_FILENO);
    dup2(null, STDERR_FILENO);
    if (null > STDERR_FILENO)
        close(null);
    (void)log_set_format(LOG_FORMAT_JOURNAL);
    if (write(b->pipe, report, sizeof *report) < 0)
        log_warning("nobody waits for the device any more");
    close(b->pipe);
}
