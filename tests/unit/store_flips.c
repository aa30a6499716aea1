/*
 * Damage in LMDB's own pages: every bit of what its pages are made of (meta pages, page headers,
 * pointers, node headers, branches, the records of the named databases, the list of free pages), a
 * sample of all others, and pages that are part new, part old. Whatever is read afterwards is right
 * or an error, nothing dies of it, and a commit through it makes it no worse.
 *
 * The store is small and has what a large one has: trees of three levels, large values, pages that
 * hold old versions of others. What is done to it is done in children, so that one that dies is
 * seen and counted. A run tries some of it, drawn by chance; LONG=1 tries every bit of what pages are
 * made of and every mix, SLOW=n fewer.
 */
#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>

#include "base/hash.h"
#include "store_test.h"

#define PAGE 4096u
#define SECTOR 512u
#define KEYS 420u
#define KEY_LEN 180u
#define HEAD_MAX 7000u
#define PAGES_MAX 4096u
#define OLD_MAX 8u
#define CASES_MAX 2000000u
#define SHOWN_MAX 10u
#define CHILD_LIMIT_S 20u

enum { P_BRANCH = 1, P_LEAF = 2, P_OVERFLOW = 4 };
enum { F_BIGDATA = 1, F_SUBDATA = 2 };

/* What the store must hold. */
struct model {
    uint32_t head_len[KEYS]; /* 0: the key is absent */
    uint32_t body_len[KEYS];
    uint32_t version[KEYS];
};

/* One damage: a bit of the file, or a page made of sectors of two of its versions. */
struct damage {
    uint32_t page;
    uint32_t bit;  /* a flip: in the page */
    int32_t old;   /* torn: which old version; -1: a flip */
    uint32_t mask; /* the sectors that are old */
};

/* What a child tells its parent. */
struct report {
    _Atomic uint32_t next; /* case; the one in work is next - 1 */
    uint64_t right, refused, wrong, died, not_opened;
};

static struct report *report;
static struct model model;
static struct damage *cases;
static uint32_t n_cases;

static uint8_t *image;           /* of data.mdb, as it was left */
static uint32_t n_pages;         /* in it */
static uint8_t *old[PAGES_MAX][OLD_MAX];
static uint32_t n_old[PAGES_MAX];
/* What a page in use is: Meta, Records of databases, Branch, Leaf, large value (O), free list (f, and
 * F for its large values). */
static char kind[PAGES_MAX];

static struct chance chance;
static char dir[200], copy_dir[200];

static unsigned slow(void)
{
    const char *s = getenv("SLOW");
    return s && atoi(s) > 1 ? (unsigned)atoi(s) : 1;
}

static bool longer(void)
{
    const char *s = getenv("LONG");
    return s && strcmp(s, "0") != 0 && *s;
}

/* Space set aside is of no use here, and takes its time on a disk that is memory. */
int fallocate(int fd, int mode, off_t at, off_t len)
{
    (void)fd, (void)mode, (void)at, (void)len;
    return 0;
}

/* ---- the store ---- */

static char keys[KEYS][KEY_LEN + 1];

static void key_names(void)
{
    for (unsigned i = 0; i < KEYS; i++) {
        memset(keys[i], 'a' + (int)(i % 7), KEY_LEN);
        char number[8];
        snprintf(number, sizeof number, "k%05u", i);
        memcpy(keys[i], number, 6);
        keys[i][KEY_LEN] = '\0';
    }
}

static void head_build(const struct model *m, unsigned i, uint8_t *out)
{
    for (uint32_t at = 0; at < m->head_len[i]; at += 8) {
        uint64_t word = hash_mix(hash_mix(i, m->version[i]), at);
        memcpy(out + at, &word, 8);
    }
}

static uint8_t *heads;  /* KEYS of HEAD_MAX */
static uint8_t body[8192];

/* Changes keys [from, to) by steps. `how`: 0 cleared, 1 small, 2 with bodies, 3 large,
 * 4 very large. */
struct change {
    unsigned from, to, step;
    int how;
};

static void model_change(struct model *m, const struct change *c)
{
    for (unsigned i = c->from; i < c->to; i += c->step) {
        m->version[i]++;
        m->head_len[i] = c->how == 0 ? 0 : c->how == 4   ? 7000
                         : c->how == 3 ? 2504 + i % 50 * 8
                                       : 16 + i % 4 * 8;
        m->body_len[i] = c->how == 2 ? 5000 : 0;
    }
}

static enum status change(struct test_store *t, struct model *m, const struct change *c)
{
    static struct store_mutation mutations[KEYS];
    size_t n = 0;
    struct model after = *m;
    model_change(&after, c);
    for (unsigned i = c->from; i < c->to; i += c->step) {
        head_build(&after, i, heads + i * HEAD_MAX);
        mutations[n++] =
            (struct store_mutation){.kind = c->how ? STORE_SET : STORE_CLEAR,
                                    .key = {keys[i], KEY_LEN},
                                    .head = {heads + i * HEAD_MAX, after.head_len[i]},
                                    .body = {body, after.body_len[i]}};
    }
    enum status st = test_commit(t, NULL, 0, mutations, n);
    if (!st)
        *m = after;
    return st;
}

static void old_pages_keep(const char *path)
{
    int fd = open(path, O_RDONLY);
    assert_true(fd >= 0);
    static uint8_t page[PAGE];
    for (uint32_t p = 0; p < PAGES_MAX && pread(fd, page, PAGE, (off_t)p * PAGE) == PAGE; p++) {
        if (n_old[p] == OLD_MAX || (n_old[p] && memcmp(old[p][n_old[p] - 1], page, PAGE) == 0))
            continue;
        uint8_t zero[16] = {0};
        if (memcmp(page, zero, sizeof zero) == 0 && p > 1)
            continue;
        old[p][n_old[p]] = mem_alloc(PAGE);
        memcpy(old[p][n_old[p]++], page, PAGE);
    }
    close(fd);
}

static void store_make(struct test_store *t)
{
    char path[240];
    snprintf(path, sizeof path, "%s/data.mdb", t->dir);
    static const struct change changes[] = {
        {0, KEYS, 1, 4}, /* many pages, freed all at once by the next */
        {0, KEYS, 1, 0},      {0, KEYS, 2, 1},  {1, KEYS, 2, 2},  {0, KEYS, 5, 1},
        {100, 300, 1, 1},     {3, KEYS, 9, 2},  {7, KEYS, 60, 3}, {4, KEYS, 11, 0},
        {120, 126, 1, 0},     {8, KEYS, 40, 1}, {7, KEYS, 60, 1}, {14, KEYS, 60, 3},
        {KEYS - 3, KEYS, 1, 1}, {0, 3, 1, 1},
    };
    for (size_t i = 0; i < sizeof changes / sizeof changes[0]; i++) {
        assert_int_equal(change(t, &model, &changes[i]), ST_OK);
        old_pages_keep(path);
    }
    /* Until nothing is pending: from then on a store that is open does not change by itself. */
    for (int i = 0; i < 6; i++) {
        struct change c = {200, 203, 1, 1};
        assert_int_equal(change(t, &model, &c), ST_OK);
        old_pages_keep(path);
    }
}

/* ---- what is in the file ---- */

static uint16_t u16(const uint8_t *p)
{
    return get_le16(p);
}

static void walk(uint64_t pgno, unsigned depth, char leaf_kind)
{
    assert_true(pgno < n_pages);
    const uint8_t *p = image + pgno * PAGE;
    unsigned n = (u16(p + 12) - 16u) / 2;
    bool leaf = depth == 1;
    assert_int_equal(u16(p + 10), leaf ? P_LEAF : P_BRANCH);
    kind[pgno] = leaf ? leaf_kind : leaf_kind == 'f' ? 'f' : 'B';
    for (unsigned i = 0; i < n; i++) {
        const uint8_t *node = p + u16(p + 16 + 2 * i);
        const uint8_t *data = node + 8 + u16(node + 6);
        if (!leaf) {
            walk(get_le32(node) | (uint64_t)u16(node + 4) << 32, depth - 1, leaf_kind);
        } else if (u16(node + 4) & F_BIGDATA) {
            uint64_t at = get_le64(data);
            kind[at] = leaf_kind == 'f' ? 'F' : 'O';
        } else if (u16(node + 4) & F_SUBDATA) {
            uint64_t root = get_le64(data + 40);
            if (root != UINT64_MAX)
                walk(root, u16(data + 6), 'L');
        }
    }
}

static unsigned count_kind(char c)
{
    unsigned n = 0;
    for (uint32_t p = 0; p < n_pages; p++)
        n += kind[p] == c;
    return n;
}

static void image_take(const char *path)
{
    int fd = open(path, O_RDONLY);
    struct stat sb;
    assert_true(fd >= 0 && fstat(fd, &sb) == 0);
    const size_t cap = (size_t)PAGES_MAX * PAGE;
    image = mmap(NULL, cap, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    ssize_t got = pread(fd, image, cap, 0);
    assert_true(got > 0);
    close(fd);
    const uint8_t *a = image + 16, *b = image + PAGE + 16;
    const uint8_t *meta = get_le64(a + 128) > get_le64(b + 128) ? a : b;
    n_pages = (uint32_t)get_le64(meta + 120) + 1;
    assert_true(n_pages <= PAGES_MAX);
    kind[0] = kind[1] = 'M';
    walk(get_le64(meta + 24 + 40), u16(meta + 24 + 6), 'f');
    walk(get_le64(meta + 72 + 40), u16(meta + 72 + 6), 'R');
    print_message("# %u pages in use of %u: %u branches, %u leaves, %u of large values, %u of the "
                  "free list, %u of its large values\n",
                  n_pages - count_kind('\0'), n_pages, count_kind('B'), count_kind('L'),
                  count_kind('O'), count_kind('f'), count_kind('F'));
    assert_true(count_kind('B') >= 3 && count_kind('O') >= 3 && count_kind('F') >= 1);
    assert_true(count_kind('\0') >= 20);
}

/* ---- cases ---- */

static void case_add(struct damage d)
{
    assert_true(n_cases < CASES_MAX);
    cases[n_cases++] = d;
}

/* Bits of [from, to) of a page, one in `of`. */
static void case_bits(uint32_t page, uint32_t from, uint32_t to, unsigned of)
{
    for (uint32_t bit = from * 8; bit < to * 8; bit++)
        if (of <= 1 || chance_below(&chance, of) == 0)
            case_add((struct damage){.page = page, .bit = bit, .old = -1});
}

static void cases_flips(unsigned of_structure, unsigned of_rest)
{
    n_cases = 0;
    for (uint32_t at = 0; at < n_pages; at++) {
        const uint8_t *p = image + (size_t)at * PAGE;
        unsigned lower = u16(p + 12), n = (lower - 16) / 2;
        switch (kind[at]) {
        case 'M':
            case_bits(at, 0, 176, of_structure);
            case_bits(at, 176, PAGE, of_rest * 8);
            break;
        case 'O':
        case 'F':
            case_bits(at, 0, 16, of_structure);
            case_bits(at, 16, 48, kind[at] == 'F' ? of_structure : of_rest);
            case_bits(at, 48, PAGE, of_rest);
            break;
        case 'B':
        case 'L':
        case 'R':
        case 'f':
            case_bits(at, 0, lower, of_structure);
            case_bits(at, lower, u16(p + 14), of_rest * 8);
            for (unsigned i = 0; i < n; i++) {
                unsigned node = u16(p + 16 + 2 * i), key_end = node + 8u + u16(p + node + 6);
                bool all = kind[at] != 'L';
                unsigned size = (unsigned)(get_le32(p + node));
                unsigned data = kind[at] == 'B'                       ? 0
                                : u16(p + node + 4) & F_BIGDATA ? 8
                                                                : size;
                case_bits(at, node, node + 8, of_structure);
                case_bits(at, node + 8, key_end, all ? of_structure * 4 : of_rest);
                case_bits(at, key_end, key_end + data, all ? of_structure : of_rest);
            }
            break;
        default:
            break; /* not in use: nobody looks at it */
        }
    }
}

static void damaged_page(const struct damage *d, uint8_t out[PAGE])
{
    memcpy(out, image + (size_t)d->page * PAGE, PAGE);
    if (d->old < 0) {
        out[d->bit / 8] ^= (uint8_t)(1u << d->bit % 8);
        return;
    }
    for (unsigned s = 0; s < PAGE / SECTOR; s++)
        if (d->mask >> s & 1)
            memcpy(out + s * SECTOR, old[d->page][d->old] + s * SECTOR, SECTOR);
}

/* Where what is left is all old or all new nothing is torn: the first is a write that was lost. */
static void cases_torn(unsigned of)
{
    n_cases = 0;
    uint8_t page[PAGE];
    for (uint32_t p = 0; p < n_pages; p++) {
        for (uint32_t o = 0; kind[p] && o < n_old[p]; o++) {
            for (uint32_t mask = 1; mask < 255; mask++) {
                struct damage d = {.page = p, .old = (int32_t)o, .mask = mask};
                if (of > 1 && chance_below(&chance, of))
                    continue;
                damaged_page(&d, page);
                if (memcmp(page, image + (size_t)p * PAGE, PAGE) == 0)
                    continue;
                bool is_old = false;
                for (uint32_t v = 0; v < n_old[p]; v++)
                    is_old |= memcmp(page, old[p][v], PAGE) == 0;
                if (!is_old)
                    case_add(d);
            }
        }
    }
}

static const char *case_text(uint32_t i)
{
    static char text[160];
    const struct damage *d = &cases[i];
    if (d->old < 0)
        snprintf(text, sizeof text, "page %u (%c), bit %u of byte %u", d->page, kind[d->page],
                 d->bit % 8, d->bit / 8);
    else
        snprintf(text, sizeof text, "page %u (%c), sectors %#x as in version %d", d->page,
                 kind[d->page], d->mask, d->old);
    return text;
}

/* ---- what a child does ---- */

static bool pair_right(const struct model *m, unsigned i, struct slice head, uint32_t body_len)
{
    static uint8_t want[HEAD_MAX];
    head_build(m, i, want);
    return head.len == m->head_len[i] && body_len == m->body_len[i] &&
           memcmp(head.data, want, head.len) == 0;
}

static void wrong(const char *what, unsigned i)
{
    report->wrong++;
    if (report->wrong <= SHOWN_MAX)
        fprintf(stdout, "# wrong after damage in %s: %s (key %u)\n", case_text(report->next - 1),
                what, i);
    fflush(stdout);
}

/* One key or answer of many. */
static void judge(bool right, enum status st, const char *what, unsigned i)
{
    if (st == ST_IO || st == ST_UNAVAIL || st == ST_FORMAT)
        report->refused++;
    else if (right)
        report->right++;
    else
        wrong(what, i);
}

static void read_range(struct test_store *t, const struct model *m, bool reverse)
{
    struct store_range range = {.begin = text("k"), .end = text("l"), .limit = 65536,
                                .reverse = reverse};
    struct test_read r = {.read = {.ranges = &range, .n_ranges = 1}};
    enum status st = test_read(t, &r);
    bool right = true;
    unsigned n = 0;
    for (unsigned j = 0; !st && j < KEYS; j++) {
        unsigned i = reverse ? KEYS - 1 - j : j;
        if (m->head_len[i] == 0)
            continue;
        const struct store_pair *pair = &range.pairs[n++];
        right = right && n <= range.n_pairs && pair->key.len == KEY_LEN &&
                memcmp(pair->key.data, keys[i], KEY_LEN) == 0 &&
                pair_right(m, i, pair->head, pair->body_len);
    }
    judge(right && n == range.n_pairs, st, reverse ? "a range backwards" : "a range", n);
    store_read_release(&r.read);
}

static void read_all(struct test_store *t, const struct model *m)
{
    static struct store_get gets[KEYS];
    for (unsigned i = 0; i < KEYS; i++)
        gets[i] = (struct store_get){.key = {keys[i], KEY_LEN}};
    struct test_read r = {.read = {.gets = gets, .n_gets = KEYS}};
    enum status st = test_read(t, &r);
    for (unsigned i = 0; i < KEYS; i++) {
        enum status key_st = st ? st : gets[i].st;
        bool right = m->head_len[i] == 0 ? key_st == ST_NOTFOUND
                                         : !key_st && pair_right(m, i, gets[i].head,
                                                                 gets[i].body_len);
        judge(right, key_st, key_st ? "a key is not there" : "a value", i);
    }
    store_read_release(&r.read);
    read_range(t, m, false);
    read_range(t, m, true);
}

static void quiet_stderr(void)
{
    if (getenv("VERBOSE"))
        return;
    int fd = open("/dev/null", O_WRONLY);
    if (fd >= 0)
        dup2(fd, 2);
}

/* Opens the store itself, and gives its data.mdb, to be damaged. */
static int opened(struct test_store *t)
{
    snprintf(t->dir, sizeof t->dir, "%s", dir);
    snprintf(t->uri, sizeof t->uri, "lmdb:%s", dir);
    test_env_start(&t->env);
    test_store_reopen(t);
    char path[240];
    snprintf(path, sizeof path, "%s/data.mdb", dir);
    return open(path, O_RDWR);
}

/* Reads with each of the cases in turn, on one open store. */
static void child_live(void)
{
    struct test_store t = {0};
    int fd = opened(&t);
    uint8_t page[PAGE];
    while (report->next < n_cases) {
        const struct damage *d = &cases[report->next++];
        alarm(CHILD_LIMIT_S);
        damaged_page(d, page);
        off_t at = (off_t)d->page * PAGE;
        assert_int_equal(pwrite(fd, page, PAGE, at), PAGE);
        read_all(&t, &model);
        assert_int_equal(pwrite(fd, image + at, PAGE, at), PAGE);
    }
    store_close(t.store);
    _exit(0);
}

/* Opens a damaged store, reads, commits, reads, opens it again and reads. */
static void child_reopen(void)
{
    const struct damage *d = &cases[report->next++];
    alarm(CHILD_LIMIT_S);
    char path[240];
    snprintf(path, sizeof path, "%s/data.mdb", copy_dir);
    int fd = open(path, O_RDWR);
    uint8_t page[PAGE];
    damaged_page(d, page);
    assert_int_equal(pwrite(fd, page, PAGE, (off_t)d->page * PAGE), PAGE);
    close(fd);
    struct test_store t = {0};
    snprintf(t.uri, sizeof t.uri, "lmdb:%s", copy_dir);
    test_env_start(&t.env);
    struct model m = model;
    for (int round = 0; round < 2; round++) {
        struct err e = {0};
        struct store_options options = {.flags = STORE_CREATE, .lease_ms = LEASE_MS};
        if (store_open(t.uri, &options, &t.store, &e)) {
            report->not_opened++;
            _exit(0);
        }
        read_all(&t, &m);
        if (round == 0) {
            unsigned at = d->bit % 300;
            struct change changes[] = {{at, at + 60, 3, 1}, {at, KEYS, 2, 0}, {7, KEYS, 13, 2}};
            for (size_t i = 0; i < sizeof changes / sizeof changes[0]; i++) {
                enum status st = change(&t, &m, &changes[i]);
                judge(!st, st, "a commit", (unsigned)i);
            }
            read_all(&t, &m);
        }
        store_close(t.store);
    }
    _exit(0);
}

/* Reads on an open store whose data.mdb ends early, which to a map is what a disk is that gives an
 * error; and again when all of it is back. */
static void child_cut(void)
{
    struct test_store t = {0};
    int fd = opened(&t);
    struct stat sb;
    assert_int_equal(fstat(fd, &sb), 0);
    uint8_t *all = mem_alloc((size_t)sb.st_size);
    assert_int_equal(pread(fd, all, (size_t)sb.st_size, 0), sb.st_size);
    while (report->next < n_cases) {
        const struct damage *d = &cases[report->next++];
        alarm(CHILD_LIMIT_S);
        off_t at = (off_t)d->page * PAGE + d->bit / 8;
        assert_int_equal(ftruncate(fd, at), 0);
        read_all(&t, &model);
        assert_int_equal(pwrite(fd, all + at, (size_t)(sb.st_size - at), at), sb.st_size - at);
        uint64_t refused = report->refused;
        read_all(&t, &model);
        assert_int_equal(report->refused, refused);
    }
    free(all);
    store_close(t.store);
    _exit(0);
}

/* ---- the parent ---- */

static void file_copy(const char *name, size_t max)
{
    char from[260], to[260];
    snprintf(from, sizeof from, "%s/%s", dir, name);
    snprintf(to, sizeof to, "%s/%s", copy_dir, name);
    int in = open(from, O_RDONLY), out = open(to, O_RDWR | O_CREAT | O_TRUNC, 0600);
    assert_true(in >= 0 && out >= 0);
    struct stat sb;
    assert_int_equal(fstat(in, &sb), 0);
    static uint8_t buffer[1 << 20];
    off_t at = 0;
    ssize_t n;
    while ((size_t)at < max && (n = pread(in, buffer, sizeof buffer, at)) > 0) {
        assert_int_equal(pwrite(out, buffer, (size_t)n, at), n);
        at += n;
    }
    close(in);
    close(out);
}

static void copy_make(void)
{
    test_folder_remove(copy_dir);
    assert_int_equal(mkdir(copy_dir, 0700), 0);
    file_copy("data.mdb", (size_t)n_pages * PAGE);
    file_copy("blocks", SIZE_MAX);
}

/* Runs `child` until all cases are through, or once. Counts those that died. */
static void child_run(void (*child)(void))
{
    pid_t pid = fork();
    assert_true(pid >= 0);
    if (pid == 0) {
        quiet_stderr();
        child();
    }
    int status;
    assert_int_equal(waitpid(pid, &status, 0), pid);
    if (WIFEXITED(status) && WEXITSTATUS(status) == 0)
        return;
    report->died++;
    if (report->died <= SHOWN_MAX)
        print_message("# died (%s %d) of damage in %s\n", WIFSIGNALED(status) ? "signal" : "exit",
                      WIFSIGNALED(status) ? WTERMSIG(status) : WEXITSTATUS(status),
                      case_text(report->next - 1));
}

static void page_restore(uint32_t page)
{
    char path[240];
    snprintf(path, sizeof path, "%s/data.mdb", dir);
    int fd = open(path, O_RDWR);
    off_t at = (off_t)page * PAGE;
    assert_int_equal(pwrite(fd, image + at, PAGE, at), PAGE);
    close(fd);
}

static void judged(const char *what)
{
    print_message("# %s: %u cases; answers right %llu, refused %llu, wrong %llu; not opened %llu, "
                  "died %llu\n",
                  what, n_cases, (unsigned long long)report->right,
                  (unsigned long long)report->refused, (unsigned long long)report->wrong,
                  (unsigned long long)report->not_opened, (unsigned long long)report->died);
    assert_int_equal(report->wrong, 0);
    assert_int_equal(report->died, 0);
    assert_true(report->right > 0 && report->refused > 0);
}

static void live(const char *what)
{
    memset(report, 0, sizeof *report);
    while (report->next < n_cases) {
        uint32_t before = report->next;
        child_run(child_live);
        if (report->next > before)
            page_restore(cases[report->next - 1].page);
        assert_true(report->next > before);
    }
    judged(what);
}

static void reopened(const char *what)
{
    memset(report, 0, sizeof *report);
    while (report->next < n_cases) {
        copy_make();
        child_run(child_reopen);
    }
    judged(what);
}

/* ---- tests ---- */

static int begin(void **state)
{
    (void)state;
    chance = chance_begin("store_flips");
    report = mmap(NULL, sizeof *report, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    cases = mem_alloc(CASES_MAX * sizeof *cases);
    heads = mem_alloc(KEYS * HEAD_MAX);
    key_names();
    static struct test_store t;
    const char *base = access("/dev/shm", W_OK) == 0 ? "/dev/shm" : NULL;
    test_store_begin(&t, base);
    snprintf(dir, sizeof dir, "%s", t.dir);
    snprintf(copy_dir, sizeof copy_dir, "%.190s-copy", t.dir);
    store_make(&t);
    store_close(t.store);
    t.store = NULL;
    test_env_stop(&t.env);
    char path[240];
    snprintf(path, sizeof path, "%s/data.mdb", dir);
    image_take(path);
    return 0;
}

static int end(void **state)
{
    (void)state;
    test_folder_remove(dir);
    test_folder_remove(copy_dir);
    return 0;
}

static void test_a_flip_is_never_read_as_something_else(void **state)
{
    (void)state;
    cases_flips(longer() ? 1 : 12 * slow(), longer() ? 8 : 1000 * slow());
    live("flips under an open store");
}

static void test_a_torn_page_is_never_read_as_something_else(void **state)
{
    (void)state;
    cases_torn(longer() ? 1 : 8 * slow());
    live("torn pages under an open store");
}

static void test_a_commit_through_damage_makes_it_no_worse(void **state)
{
    (void)state;
    cases_flips(longer() ? 4 : 300 * slow(), longer() ? 64 : 6000 * slow());
    reopened("flips in a store that is opened, changed and opened again");
}

static void test_what_the_disk_cant_give_is_an_error(void **state)
{
    (void)state;
    n_cases = 0;
    for (uint32_t page = 2; page < n_pages; page += 1 + (uint32_t)chance_below(&chance, 2 * slow()))
        case_add((struct damage){.page = page, .bit = (uint32_t)chance_below(&chance, 2) * PAGE * 4,
                                 .old = -1});
    memset(report, 0, sizeof *report);
    child_run(child_cut);
    judged("files that end early under an open store");
    assert_int_equal(report->next, n_cases);
}

/* Makes the copy one of a store from before there were seals. */
static void seals_disown(void)
{
    char path[260];
    snprintf(path, sizeof path, "%s/data.mdb", copy_dir);
    int fd = open(path, O_RDWR);
    unsigned found = 0;
    for (uint32_t at = 0; at < n_pages; at++) {
        const uint8_t *p = image + (size_t)at * PAGE;
        for (unsigned i = 0; kind[at] == 'L' && i < (u16(p + 12) - 16u) / 2; i++) {
            const uint8_t *node = p + u16(p + 16 + 2 * i);
            if (u16(node + 6) != 5 || memcmp(node + 8, "store", 5) != 0)
                continue;
            uint8_t record[64];
            memcpy(record, node + 13, sizeof record);
            assert_int_equal(get_le64(record + 24), 1);
            put_le64(record + 24, 0);
            put_le64(record, hash64(record + 8, sizeof record - 8, 0));
            assert_int_equal(pwrite(fd, record, sizeof record,
                                    (off_t)at * PAGE + u16(p + 16 + 2 * i) + 13),
                             sizeof record);
            found++;
        }
    }
    close(fd);
    assert_int_equal(found, 1);
    snprintf(path, sizeof path, "%s/blocks", copy_dir);
    fd = open(path, O_RDWR);
    uint8_t header[40];
    assert_int_equal(pread(fd, header, sizeof header, 0), sizeof header);
    assert_int_equal(get_le32(header + 28), 1);
    put_le32(header + 28, 0);
    put_le64(header + 32, hash64(header, 32, 0));
    assert_int_equal(pwrite(fd, header, sizeof header, 0), sizeof header);
    close(fd);
}

static void test_a_store_without_seals_is_served_as_before(void **state)
{
    (void)state;
    memset(report, 0, sizeof *report);
    copy_make();
    seals_disown();
    /* What can't be read in such a store is only what is damaged: a byte that no page uses. */
    n_cases = 0;
    case_add((struct damage){.page = 0, .bit = 3000 * 8, .old = -1});
    child_run(child_reopen);
    assert_int_equal(report->wrong + report->died + report->refused + report->not_opened, 0);
    assert_true(report->right > KEYS);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_a_flip_is_never_read_as_something_else),
        cmocka_unit_test(test_a_torn_page_is_never_read_as_something_else),
        cmocka_unit_test(test_what_the_disk_cant_give_is_an_error),
        cmocka_unit_test(test_a_commit_through_damage_makes_it_no_worse),
        cmocka_unit_test(test_a_store_without_seals_is_served_as_before),
    };
    return cmocka_run_group_tests(tests, begin, end);
}
