/* Asking the running servers over HTTP; see control.h. */
#include "cli/control.h"

#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <netdb.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "base/mem.h"
#include "server/control.h"

/* A server answers from memory; one that does not is not well. */
#define ANSWER_MS 5000u
#define ANSWER_BYTES_MAX (64u << 20)
#define RECEIVE_BYTES 65536u
#define UNIX_PREFIX "unix:"

/* --- places ---------------------------------------------------------------------------- */

static enum status add_place(struct control *c, const char *prefix, const char *value,
                             struct err *e)
{
    if (c->n == CONTROL_PLACES_MAX)
        return fail(e, ST_INVAL, "at most %u times", CONTROL_PLACES_MAX);
    int len = snprintf(c->places[c->n], CONTROL_PLACE_BYTES, "%s%s", prefix, value);
    if (len >= (int)CONTROL_PLACE_BYTES)
        return fail(e, ST_INVAL, "\"%.100s...\" is too long", value);
    c->n++;
    return ST_OK;
}

enum status control_take(struct control *c, int code, const char *value, struct err *e)
{
    struct err number = {0};
    uint64_t port;
    c->given = true;
    if (code == CONTROL_SOCKET)
        return add_place(c, UNIX_PREFIX, value, e);
    const char *colon = strrchr(value, ':');
    if (strncmp(value, UNIX_PREFIX, strlen(UNIX_PREFIX)) != 0 &&
        (!colon || cli_parse_number(colon + 1, 1, 65535, &port, &number) != ST_OK))
        return fail(e, ST_INVAL, "\"%.160s\" is not HOST:PORT, [V6]:PORT or unix:PATH", value);
    return add_place(c, "", value, e);
}

/* Whether somebody listens at a socket of that folder. One whose process is gone is removed. */
static bool is_alive(const char *path, pid_t pid)
{
    int fd;
    enum status st = control_connect(path, &fd, NULL);
    if (st == ST_OK)
        close(fd);
    else if (st == ST_NOTFOUND && kill(pid, 0) != 0 && errno == ESRCH)
        unlink(path);
    return st == ST_OK;
}

static pid_t pid_of_socket(const struct dirent *entry)
{
    char *end;
    errno = 0;
    long pid = strtol(entry->d_name, &end, 10);
    bool good = isdigit((unsigned char)entry->d_name[0]) && !errno && pid > 0 && pid < INT32_MAX &&
                strcmp(end, ".sock") == 0;
    return good ? (pid_t)pid : 0;
}

static int is_socket_name(const struct dirent *entry)
{
    return pid_of_socket(entry) != 0;
}

static int by_pid(const struct dirent **a, const struct dirent **b)
{
    pid_t x = pid_of_socket(*a), y = pid_of_socket(*b);
    return (x > y) - (x < y);
}

/* /tmp is everybody's: what others put there is not asked. */
static bool is_ours(const char *folder)
{
    struct stat st;
    return lstat(folder, &st) == 0 && S_ISDIR(st.st_mode) &&
           (st.st_uid == geteuid() || geteuid() == 0);
}

enum status control_find(struct control *c, struct err *e)
{
    char folder[CONTROL_PATH_BYTES], path[CONTROL_PATH_BYTES + 32];
    struct dirent **entries = NULL;
    if (c->given)
        return ST_OK;
    c->n = 0;
    enum status st = control_directory(folder, e);
    if (st != ST_OK)
        return st;
    int n = is_ours(folder) ? scandir(folder, &entries, is_socket_name, by_pid) : 0;
    if (n < 0)
        return fail(e, ST_UNAVAIL, "cannot look for servers in %s: %s", folder, strerror(errno));
    for (int i = 0; i < n; i++) {
        snprintf(path, sizeof path, "%s/%.24s", folder, entries[i]->d_name);
        if (c->n < CONTROL_PLACES_MAX && is_alive(path, pid_of_socket(entries[i])))
            add_place(c, UNIX_PREFIX, path, e);
        free(entries[i]);
    }
    free(entries);
    if (c->n == 0)
        return fail(e, ST_NOTFOUND, "no server of this user runs on this host (no control socket in "
                    "%s); ask one elsewhere with --http HOST:PORT, or another user's with "
                    "--control PATH", folder);
    return ST_OK;
}

/* --- one question ------------------------------------------------------------------------ */

static uint64_t now_ms(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000 + (uint64_t)t.tv_nsec / 1000000;
}

/* Waits for `events`; false, with errno, where they do not come in time. */
static bool wait_for(int fd, short events, uint64_t until_ms)
{
    struct pollfd p = {.fd = fd, .events = events};
    uint64_t now = now_ms();
    int n = now < until_ms ? poll(&p, 1, (int)(until_ms - now)) : 0;
    if (n == 0)
        errno = ETIMEDOUT;
    return n > 0;
}

/* Connects; -1, with errno. */
static int connect_socket(int family, const struct sockaddr *sa, socklen_t len)
{
    int fd = socket(family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    int why = 0;
    socklen_t why_len = sizeof why;
    if (fd < 0)
        return -1;
    if (connect(fd, sa, len) != 0)
        why = errno;
    if (why == EINPROGRESS && (!wait_for(fd, POLLOUT, now_ms() + ANSWER_MS) ||
                               getsockopt(fd, SOL_SOCKET, SO_ERROR, &why, &why_len) != 0))
        why = errno;
    if (!why)
        return fd;
    close(fd);
    errno = why;
    return -1;
}

static enum status nobody(const char *place, const char *why, struct err *e)
{
    return fail(e, ST_UNAVAIL, "no server answers at %.200s: %s", place, why);
}

static enum status connect_tcp(const char *place, int *fd, struct err *e)
{
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM}, *found;
    char host[CONTROL_PLACE_BYTES];
    const char *colon = strrchr(place, ':');
    size_t len = (size_t)(colon - place);
    bool bracketed = len >= 2 && place[0] == '[' && place[len - 1] == ']';
    snprintf(host, sizeof host, "%.*s", (int)(bracketed ? len - 2 : len), place + bracketed);
    int problem = getaddrinfo(host[0] ? host : "localhost", colon + 1, &hints, &found);
    if (problem)
        return nobody(place, gai_strerror(problem), e);
    *fd = -1;
    for (const struct addrinfo *a = found; a && *fd < 0; a = a->ai_next)
        *fd = connect_socket(a->ai_family, a->ai_addr, a->ai_addrlen);
    int why = errno;
    freeaddrinfo(found);
    return *fd >= 0 ? ST_OK : nobody(place, strerror(why), e);
}

static enum status connect_to(const char *place, int *fd, struct err *e)
{
    if (strncmp(place, UNIX_PREFIX, strlen(UNIX_PREFIX)) != 0)
        return connect_tcp(place, fd, e);
    /* (That there is no socket is not that there is no volume, or the like.) */
    enum status st = control_connect(place + strlen(UNIX_PREFIX), fd, e);
    return st == ST_NOTFOUND ? ST_UNAVAIL : st;
}

static bool send_all(int fd, const char *text, size_t len, uint64_t until_ms)
{
    while (len > 0) {
        ssize_t n = send(fd, text, len, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (n < 0 && errno != EAGAIN)
            return false;
        if (n < 0 && !wait_for(fd, POLLOUT, until_ms))
            return false;
        text += n > 0 ? n : 0;
        len -= n > 0 ? (size_t)n : 0;
    }
    return true;
}

/* All that comes until the end: *len bytes and a NUL, the caller's. NULL with errno. */
static char *receive_all(int fd, size_t *len, uint64_t until_ms)
{
    char *bytes = NULL;
    size_t cap = 0;
    for (*len = 0;;) {
        mem_grow(&bytes, &cap, *len + RECEIVE_BYTES + 1, 1);
        ssize_t n = recv(fd, bytes + *len, RECEIVE_BYTES, MSG_DONTWAIT);
        if (n == 0) {
            bytes[*len] = '\0';
            return bytes;
        }
        if (n < 0 && errno == EAGAIN && wait_for(fd, POLLIN, until_ms))
            continue;
        *len += n > 0 ? (size_t)n : 0;
        if (n > 0 && *len <= ANSWER_BYTES_MAX)
            continue;
        int why = n > 0 ? EMSGSIZE : errno;
        free(bytes);
        errno = why;
        return NULL;
    }
}

/* Takes an answer apart: its status and its body, whose length has to be what the head says. */
static const char *parse_answer(const char *answer, size_t len, unsigned *status, size_t *body_len)
{
    const char *head_end = strstr(answer, "\r\n\r\n");
    unsigned long long told;
    if (!head_end || sscanf(answer, "HTTP/1.%*1[01] %3u", status) != 1)
        return NULL;
    const char *body = head_end + 4;
    *body_len = len - (size_t)(body - answer);
    const char *length = strcasestr(answer, "\r\nContent-Length:");
    if (length && length < head_end &&
        (sscanf(length + 17, "%llu", &told) != 1 || told != *body_len))
        return NULL;
    return body;
}

static enum status understand(const char *place, const char *answer, size_t len, json_t **out,
                              struct err *e)
{
    unsigned status;
    size_t body_len;
    const char *body = parse_answer(answer, len, &status, &body_len);
    json_t *json = body ? json_loadb(body, body_len, 0, NULL) : NULL;
    if (!json_is_object(json)) {
        json_decref(json);
        return fail(e, ST_UNAVAIL, "what answers at %.200s is no fdb-nbd server", place);
    }
    if (status < 300) {
        *out = json;
        return ST_OK;
    }
    enum status st = status == 404   ? ST_NOTFOUND
                     : status == 403 ? ST_PERM
                                     : ST_UNAVAIL;
    fail(e, st, "the server at %.160s refuses: %.200s", place, control_text(json, "error"));
    json_decref(json);
    return st;
}

enum status control_ask(const char *place, const char *method, const char *path, json_t **out,
                        struct err *e)
{
    char question[CONTROL_PLACE_BYTES + 512];
    uint64_t until_ms = now_ms() + ANSWER_MS;
    size_t len;
    int fd;
    enum status st = connect_to(place, &fd, e);
    if (st != ST_OK)
        return st;
    bool is_unix = strncmp(place, UNIX_PREFIX, strlen(UNIX_PREFIX)) == 0;
    /* HTTP/1.0: the answer comes in one piece and ends with the connection. */
    int n = snprintf(question, sizeof question,
                     "%s %s HTTP/1.0\r\nHost: %s\r\nAccept: application/json\r\n%s\r\n", method,
                     path, is_unix ? "localhost" : place,
                     strcmp(method, "POST") == 0 ? "Content-Length: 0\r\n" : "");
    char *answer = send_all(fd, question, (size_t)n, until_ms) ? receive_all(fd, &len, until_ms)
                                                               : NULL;
    int why = errno;
    close(fd);
    if (!answer)
        return nobody(place, strerror(why), e);
    st = understand(place, answer, len, out, e);
    free(answer);
    return st;
}

/* --- what was answered --------------------------------------------------------------------- */

const char *control_text(json_t *object, const char *name)
{
    json_t *member = json_object_get(object, name);
    if (!json_is_string(member))
        return "";
    /* The bytes of a new value, which the object keeps. (Terminals also obey U+0080 to U+009F.) */
    const char *text = json_string_value(member);
    bool clean = true;
    for (const unsigned char *p = (const unsigned char *)text; *p && clean; p++)
        clean = *p >= 0x20 && *p != 0x7f && !(p[0] == 0xc2 && p[1] < 0xa0);
    if (clean)
        return text;
    char *copy = mem_strdup(text);
    for (unsigned char *p = (unsigned char *)copy; *p; p++) {
        if (p[0] == 0xc2 && p[1] && p[1] < 0xa0)
            *p++ = '?', *p = '?';
        else if (*p < 0x20 || *p == 0x7f)
            *p = '?';
    }
    json_object_set_new(object, name, json_string(copy));
    free(copy);
    return json_string_value(json_object_get(object, name));
}

double control_number(json_t *object, const char *name)
{
    return json_number_value(json_object_get(object, name));
}

bool control_truth(json_t *object, const char *name)
{
    return json_is_true(json_object_get(object, name));
}
