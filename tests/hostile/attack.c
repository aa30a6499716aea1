/*
 * Clients that mean no good, thousands at once, from one process.
 *
 *   attack TO CONNECTIONS SECONDS [FROM] [LEAST] STEP...
 *
 * TO is HOST:PORT (numbers) or a socket's path; FROM "from:ADDRESS" or "from:ADDRESS/N", which
 * deals the connections out over N addresses beginning there; LEAST "least:N": it goes on beyond SECONDS,
 * for LATE_S at most, until so many connections were made or SIGUSR1 says that it is enough. Each does
 * the steps in turn:
 *
 *   send:FILE     sends what is in the file
 *   bytes:FILE    the same, a byte in each call, one in each round over all connections
 *   flood:FILE    sends it again and again, for good
 *   got:N         reads until N bytes have come in all
 *   read          reads whatever comes, for good
 *   hold          does nothing, for good, and reads nothing
 *   close, reset  ends with FIN, RST
 *
 * and is made anew when it is over or the server has ended it. What it did is printed as JSON.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define STEPS_MAX 16
#define EVENTS_MAX 512
/* A server that turns everybody away is not asked in a busy loop. */
#define REST_MS 5
#define LATE_S 150
/* Not yet accepted: more, and the kernel has them come again after seconds. */
#define CONNECTING_MAX 512

enum what { SEND, BYTES, FLOOD, GOT, READ, HOLD, CLOSE, RESET };

struct step {
    enum what what;
    char *data;
    size_t len;
    uint64_t n;
};

struct conn {
    int fd; /* -1: to be made */
    bool connected;
    uint32_t watched;
    size_t step, at;
    uint64_t got;
};

static struct step steps[STEPS_MAX];
static size_t n_steps;
static struct sockaddr_storage to, from;
static socklen_t to_len;
static bool has_from;
static uint32_t from_n = 1;
static struct conn *conns;
static size_t n_conns;
static int epoll;
static uint64_t n_made, n_failed, n_ended, n_over, sent_bytes, got_bytes, open_now, open_most, n_connecting;
static char trash[1 << 18];

static void die(const char *what)
{
    perror(what);
    exit(2);
}

static void take_step(const char *text)
{
    static const char *const names[] = {"send:", "bytes:", "flood:", "got:", "read",
                                        "hold",  "close",  "reset"};
    struct step *s = &steps[n_steps++];
    for (unsigned i = 0; i < sizeof names / sizeof *names; i++) {
        size_t len = strlen(names[i]);
        if (strncmp(text, names[i], len) != 0)
            continue;
        s->what = (enum what)i;
        if (s->what == GOT)
            s->n = strtoull(text + len, NULL, 10);
        if (s->what > FLOOD)
            return;
        struct stat st;
        int fd = open(text + len, O_RDONLY | O_CLOEXEC);
        if (fd < 0 || fstat(fd, &st) != 0)
            die(text + len);
        s->len = (size_t)st.st_size;
        s->data = malloc(s->len + 1);
        if (!s->data || read(fd, s->data, s->len) != (ssize_t)s->len)
            die(text + len);
        close(fd);
        return;
    }
    fprintf(stderr, "no step: %s\n", text);
    exit(2);
}

static void take_address(const char *text, struct sockaddr_storage *out, socklen_t *len)
{
    struct sockaddr_in *in = (struct sockaddr_in *)(void *)out;
    struct sockaddr_un *un = (struct sockaddr_un *)(void *)out;
    char host[64];
    const char *colon = strrchr(text, ':');
    if (text[0] == '/') {
        un->sun_family = AF_UNIX;
        snprintf(un->sun_path, sizeof un->sun_path, "%s", text);
        *len = sizeof *un;
        return;
    }
    snprintf(host, sizeof host, "%.*s", colon ? (int)(colon - text) : 63, text);
    in->sin_family = AF_INET;
    in->sin_port = htons((uint16_t)(colon ? atoi(colon + 1) : 0));
    *len = sizeof *in;
    if (inet_pton(AF_INET, host, &in->sin_addr) != 1)
        die(text);
}

static void watch(struct conn *c, uint32_t events)
{
    struct epoll_event e = {.events = events, .data.ptr = c};
    if (events != c->watched)
        epoll_ctl(epoll, EPOLL_CTL_MOD, c->fd, &e);
    c->watched = events;
}

static void end(struct conn *c, bool by_server)
{
    close(c->fd);
    c->fd = -1;
    open_now--;
    n_connecting -= !c->connected;
    *(by_server ? &n_ended : &n_over) += 1;
}

static bool make(struct conn *c)
{
    int on = 1;
    c->fd = socket(to.ss_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (c->fd < 0)
        return false;
    if (to.ss_family == AF_INET)
        setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    if (has_from) {
        struct sockaddr_in in = *(struct sockaddr_in *)(void *)&from;
        in.sin_addr.s_addr = htonl(ntohl(in.sin_addr.s_addr) + (uint32_t)(n_made % from_n));
        setsockopt(c->fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &on, sizeof on);
        if (bind(c->fd, (struct sockaddr *)&in, sizeof in) != 0)
            die("bind");
    }
    if (connect(c->fd, (struct sockaddr *)&to, to_len) != 0 && errno != EINPROGRESS) {
        close(c->fd);
        c->fd = -1;
        n_failed++;
        return false;
    }
    c->connected = false;
    c->step = c->at = 0;
    c->got = 0;
    c->watched = EPOLLOUT | EPOLLRDHUP;
    struct epoll_event e = {.events = c->watched, .data.ptr = c};
    epoll_ctl(epoll, EPOLL_CTL_ADD, c->fd, &e);
    n_made++;
    open_now++;
    n_connecting++;
    if (open_now > open_most)
        open_most = open_now;
    return true;
}

/* False: the server ended it. */
static bool take_in(struct conn *c)
{
    ssize_t n = recv(c->fd, trash, sizeof trash, MSG_DONTWAIT);
    if (n == 0 || (n < 0 && errno != EAGAIN))
        return false;
    if (n > 0) {
        c->got += (uint64_t)n;
        got_bytes += (uint64_t)n;
    }
    return true;
}

/* Goes on as far as it can. */
static void run(struct conn *c)
{
    for (;;) {
        const struct step *s = c->step < n_steps ? &steps[c->step] : NULL;
        if (!s || s->what == CLOSE || s->what == RESET) {
            struct linger now = {1, 0};
            if (s && s->what == RESET)
                setsockopt(c->fd, SOL_SOCKET, SO_LINGER, &now, sizeof now);
            end(c, false);
            return;
        }
        if (s->what == HOLD) {
            watch(c, EPOLLRDHUP);
            return;
        }
        if (s->what == READ || s->what == GOT) {
            if (!take_in(c)) {
                end(c, true);
                return;
            }
            if (s->what == GOT && c->got >= s->n) {
                c->step++;
                continue;
            }
            watch(c, EPOLLIN | EPOLLRDHUP);
            return;
        }
        size_t len = s->what == BYTES ? 1 : s->len - c->at;
        ssize_t n = send(c->fd, s->data + c->at, len, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (n < 0 && errno == EAGAIN) {
            watch(c, EPOLLOUT | EPOLLRDHUP);
            return;
        }
        if (n < 0) {
            end(c, true);
            return;
        }
        sent_bytes += (uint64_t)n;
        c->at += (size_t)n;
        if (c->at == s->len) {
            c->at = 0;
            c->step += s->what != FLOOD;
        }
        if (s->what != SEND) { /* others have their turn */
            watch(c, EPOLLOUT | EPOLLRDHUP);
            return;
        }
    }
}

static volatile sig_atomic_t enough;

static void on_enough(int signal_number)
{
    (void)signal_number;
    enough = 1;
}

static double now_s(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

int main(int argc, char **argv)
{
    struct rlimit limit;
    int arg = 4;
    if (argc < 5)
        return 2;
    take_address(argv[1], &to, &to_len);
    n_conns = strtoul(argv[2], NULL, 10);
    double until_s = now_s() + atof(argv[3]);
    if (strncmp(argv[arg], "from:", 5) == 0) {
        socklen_t ignored;
        char *slash = strchr(argv[arg], '/');
        if (slash) {
            from_n = (uint32_t)atoi(slash + 1);
            *slash = '\0';
        }
        take_address(argv[arg] + 5, &from, &ignored);
        has_from = true;
        arg++;
    }
    uint64_t least = 0;
    if (strncmp(argv[arg], "least:", 6) == 0)
        least = strtoull(argv[arg++] + 6, NULL, 10);
    for (; arg < argc && n_steps < STEPS_MAX; arg++)
        take_step(argv[arg]);
    signal(SIGUSR1, on_enough);
    getrlimit(RLIMIT_NOFILE, &limit);
    limit.rlim_cur = limit.rlim_max;
    setrlimit(RLIMIT_NOFILE, &limit);
    conns = calloc(n_conns, sizeof *conns);
    epoll = epoll_create1(EPOLL_CLOEXEC);
    for (size_t i = 0; i < n_conns; i++)
        conns[i].fd = -1;

    struct epoll_event events[EVENTS_MAX];
    size_t next = 0;
    double rests_s = 0;
    for (double s; (s = now_s()) < until_s || (!enough && n_made < least && s < until_s + LATE_S);) {
        uint64_t ended = n_ended;
        /* A few new ones in each round, so that those there are go on. */
        for (size_t i = 0, made = 0; i < n_conns && made < 64 && open_now < n_conns &&
                                     n_connecting < CONNECTING_MAX && now_s() >= rests_s;
             i++) {
            struct conn *c = &conns[next++ % n_conns];
            if (c->fd >= 0)
                continue;
            made++;
            if (!make(c))
                rests_s = now_s() + REST_MS / 1e3;
        }
        int n = epoll_wait(epoll, events, EVENTS_MAX, REST_MS);
        for (int i = 0; i < n; i++) {
            struct conn *c = events[i].data.ptr;
            if (events[i].events & (EPOLLERR | EPOLLHUP | EPOLLRDHUP)) {
                n_failed += !c->connected && events[i].events & EPOLLERR;
                end(c, true);
                continue;
            }
            n_connecting -= !c->connected;
            c->connected = true;
            run(c);
        }
        if (n_ended - ended > EVENTS_MAX / 2)
            rests_s = now_s() + REST_MS / 1e3;
    }
    printf("{\"made\": %llu, \"failed\": %llu, \"ended_by_server\": %llu, \"over\": %llu, "
           "\"sent_bytes\": %llu, \"got_bytes\": %llu, \"open_at_end\": %llu, \"open_most\": %llu}\n",
           (unsigned long long)n_made, (unsigned long long)n_failed, (unsigned long long)n_ended,
           (unsigned long long)n_over, (unsigned long long)sent_bytes,
           (unsigned long long)got_bytes, (unsigned long long)open_now,
           (unsigned long long)open_most);
    return 0;
}
