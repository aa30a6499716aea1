/*
 * Who is to be replaced: the listening sockets say who listens at our addresses, the session
 * records who serves our store, and only who is both is told to end.
 */
#include "server/replace.h"

#include <dirent.h>
#include <errno.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "base/check.h"
#include "base/log.h"
#include "base/mem.h"
#include "base/process.h"
#include "volume/session.h"

#define SESSIONS_MAX 4096u
#define HOLDERS_MAX 64u
/* Goes along with the signal; older servers take it for any SIGTERM. */
#define REPLACE_VALUE 0x6e6264

/* --- the servers of the store --------------------------------------------------------- */

struct sessions {
    struct key begin, end;
    struct store_range range;
    struct store_read read;
    bool done;
    enum status st;
    struct process_id *processes; /* on this machine, as far as the records tell */
    size_t n, cap;
};

static void sessions_read(struct store_read *read, enum status st)
{
    struct sessions *s = container_of(read, struct sessions, read);
    char here[HOST_BYTES_MAX + 1];
    session_host_name(here);
    s->done = true;
    s->st = st;
    for (uint32_t i = 0; st == ST_OK && i < s->range.n_pairs; i++) {
        const struct store_pair *pair = &s->range.pairs[i];
        struct session_record rec;
        if (!session_decode(pair->key, pair->head, &rec) || strcmp(rec.host, here) != 0 ||
            rec.process.pid == (uint32_t)getpid())
            continue;
        mem_grow(&s->processes, &s->cap, s->n + 1, sizeof *s->processes);
        s->processes[s->n++] = rec.process;
    }
    store_read_release(read);
}

static enum status read_sessions(struct sessions *s, struct store *store, struct env *env,
                                 void (*run_once)(struct env *env), struct err *e)
{
    key_prefix(&s->begin, 's');
    s->end = s->begin;
    key_prefix_end(&s->end);
    s->range = (struct store_range){
        .begin = key_slice(&s->begin), .end = key_slice(&s->end), .limit = SESSIONS_MAX};
    s->read = (struct store_read){.ranges = &s->range, .n_ranges = 1, .done = sessions_read};
    store_read(store, env, &s->read);
    while (!s->done)
        run_once(env);
    if (s->st != ST_OK)
        return fail(e, s->st, "cannot look for the server to be replaced: %s", status_text(s->st));
    return ST_OK;
}

/* --- matching -------------------------------------------------------------------------- */

static bool has_socket(uint32_t pid, uint64_t inode)
{
    char path[40], wanted[40], link[40];
    snprintf(path, sizeof path, "/proc/%u/fd", pid);
    snprintf(wanted, sizeof wanted, "socket:[%llu]", (unsigned long long)inode);
    DIR *folder = opendir(path);
    if (!folder)
        return false;
    bool found = false;
    const struct dirent *entry;
    while (!found && (entry = readdir(folder))) {
        ssize_t n = readlinkat(dirfd(folder), entry->d_name, link, sizeof link - 1);
        link[n > 0 ? n : 0] = '\0';
        found = strcmp(link, wanted) == 0;
    }
    closedir(folder);
    return found;
}

static bool listens_as(const struct process_id *id, const struct listen_holder *h)
{
    return h->pid ? h->pid == id->pid : has_socket(id->pid, h->inode);
}

static bool is_older(const struct process_id *a, const struct process_id *b)
{
    return a->start_ticks != b->start_ticks ? a->start_ticks < b->start_ticks : a->pid < b->pid;
}

static enum status add_rival(struct rivals *r, const struct process_id *id,
                             const struct listen_holder *h, struct err *e)
{
    struct process_id self;
    process_self(&self);
    for (size_t i = 0; i < r->n; i++)
        if (r->all[i].pid == id->pid)
            return ST_OK;
    if (!is_older(id, &self))
        return fail(e, ST_UNAVAIL, "cannot listen on %s: process %u, which started later, is "
                    "replacing the server there", h->address, id->pid);
    int fd = process_pidfd(id);
    if (fd < 0)
        return ST_OK; /* it has just ended */
    if (syscall(SYS_pidfd_send_signal, fd, 0, NULL, 0) != 0) {
        int why = errno;
        close(fd);
        return fail(e, ST_UNAVAIL, "cannot listen on %s: the server there, process %u, may not be "
                    "told to end (%s): start the new one as the same user, or end the old one",
                    h->address, id->pid, strerror(why));
    }
    if (r->n == RIVALS_MAX) {
        close(fd);
        return fail(e, ST_UNAVAIL, "cannot replace more than %u servers", RIVALS_MAX);
    }
    log_info("replacing process %u, which listens on %s", id->pid, h->address);
    r->all[r->n++] = (struct rival){.pid = id->pid, .pidfd = fd};
    return ST_OK;
}

static enum status match(struct rivals *r, const struct sessions *s, const struct listen_holder *h,
                         struct err *e)
{
    for (size_t i = 0; i < s->n; i++) {
        int fd = process_pidfd(&s->processes[i]);
        if (fd < 0)
            continue;
        bool it_is = listens_as(&s->processes[i], h);
        close(fd);
        if (it_is)
            return add_rival(r, &s->processes[i], h, e);
    }
    char who[64] = "what listens there";
    if (h->pid)
        snprintf(who, sizeof who, "process %u, which listens there,", h->pid);
    return fail(e, ST_UNAVAIL, "cannot listen on %s: %s is no server of this store that could be "
                "replaced", h->address, who);
}

enum status rivals_find(struct rivals *r, const struct listeners *l, struct store *store,
                        struct env *env, void (*run_once)(struct env *env), struct err *e)
{
    struct listen_holder holders[HOLDERS_MAX];
    struct sessions s = {.n = 0};
    size_t n;
    enum status st = listeners_holders(l, holders, HOLDERS_MAX, &n, e);
    if (st != ST_OK || n == 0)
        return st;
    st = read_sessions(&s, store, env, run_once, e);
    for (size_t i = 0; i < n && st == ST_OK; i++)
        st = match(r, &s, &holders[i], e);
    free(s.processes);
    return st;
}

/* --- the telling ----------------------------------------------------------------------- */

void rivals_tell(const struct rivals *r)
{
    siginfo_t why = {.si_signo = SIGTERM, .si_code = SI_QUEUE};
    why.si_pid = getpid();
    why.si_uid = getuid();
    why.si_value.sival_int = REPLACE_VALUE;
    for (size_t i = 0; i < r->n; i++) {
        if (syscall(SYS_pidfd_send_signal, r->all[i].pidfd, SIGTERM, &why, 0) == 0)
            log_info("told process %u to end", r->all[i].pid);
        else if (errno != ESRCH)
            log_warning("cannot tell process %u to end: %s", r->all[i].pid, strerror(errno));
    }
}

void rivals_free(struct rivals *r)
{
    for (size_t i = 0; i < r->n; i++)
        close(r->all[i].pidfd);
    r->n = 0;
}

/* --- being told ------------------------------------------------------------------------ */

static atomic_int successor;
static struct sigaction handled; /* how SIGTERM is, but for what is noted */

static void on_sigterm(int number, siginfo_t *info, void *context)
{
    (void)context;
    if (info->si_code == SI_QUEUE && info->si_value.sival_int == REPLACE_VALUE)
        atomic_store(&successor, info->si_pid);
    handled.sa_handler(number);
}

void replace_note_successor(void)
{
    struct sigaction ours;
    CHECK(sigaction(SIGTERM, NULL, &handled) == 0);
    /* (libuv's.) */
    CHECK(!(handled.sa_flags & SA_SIGINFO) && handled.sa_handler != SIG_DFL);
    ours = handled;
    ours.sa_flags |= SA_SIGINFO;
    ours.sa_sigaction = on_sigterm;
    CHECK(sigaction(SIGTERM, &ours, NULL) == 0);
}

pid_t replace_successor(void)
{
    return atomic_load(&successor);
}
