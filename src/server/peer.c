/* Who a client is; peer.h says what for. */
#include "server/peer.h"

#include <inttypes.h>
#include <netdb.h>
#include <netinet/in.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>

#define UNKNOWN_UID 65534u /* where the kernel does not say another one */

void peer_format_address(const struct sockaddr *sa, socklen_t len, char *out, size_t size)
{
    char host[PEER_HOST_BYTES] = "?", port[16] = "?";
    getnameinfo(sa, len, host, sizeof host, port, sizeof port, NI_NUMERICHOST | NI_NUMERICSERV);
    bool v6 = sa->sa_family == AF_INET6;
    snprintf(out, size, v6 ? "[%s]:%s" : "%s:%s", host, port);
}

bool peer_is_loopback(const struct sockaddr *sa)
{
    if (sa->sa_family == AF_INET) {
        const struct sockaddr_in *in = (const struct sockaddr_in *)(const void *)sa;
        return ntohl(in->sin_addr.s_addr) >> 24 == 127;
    }
    if (sa->sa_family == AF_INET6) {
        const struct sockaddr_in6 *in6 = (const struct sockaddr_in6 *)(const void *)sa;
        return IN6_IS_ADDR_LOOPBACK(&in6->sin6_addr);
    }
    return true;
}

/* An IPv4 address in the clothes of IPv6 becomes one; all else stays. */
static socklen_t undress(const struct sockaddr *sa, socklen_t len, struct sockaddr_storage *out)
{
    const struct sockaddr_in6 *in6 = (const struct sockaddr_in6 *)(const void *)sa;
    if (sa->sa_family != AF_INET6 || !IN6_IS_ADDR_V4MAPPED(&in6->sin6_addr)) {
        memcpy(out, sa, len);
        return len;
    }
    struct sockaddr_in in = {.sin_family = AF_INET, .sin_port = in6->sin6_port};
    memcpy(&in.sin_addr, in6->sin6_addr.s6_addr + 12, sizeof in.sin_addr);
    memcpy(out, &in, sizeof in);
    return sizeof in;
}

static void fill_tcp(struct peer *p, const struct sockaddr *given, socklen_t given_len)
{
    struct sockaddr_storage storage = {0};
    socklen_t len = undress(given, given_len, &storage);
    const struct sockaddr *sa = (const struct sockaddr *)&storage;
    if (sa->sa_family == AF_INET) {
        const struct sockaddr_in *in = (const struct sockaddr_in *)(const void *)sa;
        p->ip_bytes = sizeof in->sin_addr;
        memcpy(p->ip, &in->sin_addr, sizeof in->sin_addr);
        p->port = ntohs(in->sin_port);
    } else {
        const struct sockaddr_in6 *in6 = (const struct sockaddr_in6 *)(const void *)sa;
        p->ip_bytes = sizeof in6->sin6_addr;
        memcpy(p->ip, &in6->sin6_addr, sizeof in6->sin6_addr);
        p->port = ntohs(in6->sin6_port);
    }
    peer_format_address(sa, len, p->address, sizeof p->address);
    if (peer_is_loopback(sa))
        snprintf(p->host, sizeof p->host, "local");
    else
        getnameinfo(sa, len, p->host, sizeof p->host, NULL, 0, NI_NUMERICHOST);
}

/* What a file of the kernel's says in its first numbers; how many there are, up to 4. */
static int read_numbers(const char *path, unsigned long long n[4])
{
    FILE *f = fopen(path, "re");
    int found = f ? fscanf(f, "%llu %llu %llu %llu", &n[0], &n[1], &n[2], &n[3]) : 0;
    if (f)
        fclose(f);
    return found > 0 ? found : 0;
}

/* The number that the kernel gives for all users whom this process's user namespace does not know;
 * UINT32_MAX, which nobody has: it knows all. Namespaces know the same for all their life. */
static uint32_t unknown_uid(void)
{
    static _Atomic uint64_t kept; /* and 1, once it was looked up */
    unsigned long long n[4], all = UINT32_MAX;
    uint64_t uid = atomic_load(&kept);
    if (uid)
        return (uint32_t)(uid - 1);
    if (read_numbers("/proc/self/uid_map", n) == 3 && n[0] == 0 && n[2] == all)
        uid = UINT32_MAX;
    else
        uid = read_numbers("/proc/sys/kernel/overflowuid", n) ? (uint32_t)n[0] : UNKNOWN_UID;
    atomic_store(&kept, uid + 1);
    return (uint32_t)uid;
}

static void fill_unix(struct peer *p, int fd)
{
    struct ucred cred;
    socklen_t len = sizeof cred;
    snprintf(p->host, sizeof p->host, "local");
    snprintf(p->address, sizeof p->address, "unix socket");
    if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &cred, &len) != 0 || len != sizeof cred)
        return;
    if (cred.uid == unknown_uid()) {
        snprintf(p->address, sizeof p->address, "unix socket (a user unknown here)");
        return;
    }
    p->has_uid = true;
    p->uid = cred.uid;
    p->gid = cred.gid;
    snprintf(p->address, sizeof p->address, "unix socket (uid %" PRIu32 ")", p->uid);
}

void peer_fill(struct peer *p, int fd, const struct sockaddr *sa, socklen_t len)
{
    memset(p, 0, sizeof *p);
    p->way = sa->sa_family == AF_INET || sa->sa_family == AF_INET6 ? PEER_TCP : PEER_UNIX;
    if (p->way == PEER_TCP)
        fill_tcp(p, sa, len);
    else
        fill_unix(p, fd);
}

const char *peer_text(const struct peer *p, char out[PEER_TEXT_BYTES])
{
    const char *proved = p->tls == PEER_PLAIN     ? ""
                         : !p->tls_name[0]        ? ", no certificate"
                         : p->tls == PEER_TLS_PSK ? ", PSK identity "
                                                  : ", certificate ";
    snprintf(out, PEER_TEXT_BYTES, "%s%s%s", p->address, proved,
             p->tls == PEER_PLAIN ? "" : p->tls_name);
    return out;
}
