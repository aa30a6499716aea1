/*
 * Streams of export, good and bad, through the command `import` into a live store.
 *
 * At stake: an import that fails changes nothing, one that succeeds makes exactly what the stream says
 * (docs/stream.md, G5); whatever the stream, there is one sentence about what is wrong with it.
 *
 * An input: which volume it goes to (1 byte: one that is there and has the snapshot "a", or a new one),
 * then how to make the stream (streams.h). The store is a real one, in TMPDIR, and the commands run in
 * this process.
 *
 * Oracle: a model applies the stream's frames to plain memory. After a success the volume, exported
 * again, is that; after a failure the volumes and the snapshots there are, and what is in them, are
 * what they were.
 *
 * Code: src/cli/import.c src/cli/source.c
 */
#include "streams.h"

#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <sys/stat.h>
#include <unistd.h>

#include "cli/cli.h"

#define IMAGE_BYTES_MAX (8u << 20) /* larger ones are not looked into */
#define WORDS_MAX 12u

static char dir[180], uri[200], stream_file[200], image_file[200];
static unsigned n_sentences;

/* A volume as plain memory. */
struct image {
    uint64_t size;
    uint8_t *bytes; /* NULL: too large */
};

void __wrap_cli_error(const char *format, ...) __attribute__((format(printf, 1, 2)));
int __wrap_cli_failed(const struct err *e);
void __wrap_audit_changed(const struct cli *cli, const char *format, ...);

/* What a command has to say is counted, not printed. */
void __wrap_cli_error(const char *format, ...)
{
    char text[2000];
    va_list args;
    va_start(args, format);
    CHECK(vsnprintf(text, sizeof text, format, args) > 0);
    va_end(args);
    n_sentences++;
}

int __wrap_cli_failed(const struct err *e)
{
    CHECK(e->text[0]);
    n_sentences++;
    return e->st == ST_NOTFOUND ? CLI_NOTFOUND : CLI_FAILED;
}

void __wrap_audit_changed(const struct cli *cli, const char *format, ...)
{
    (void)cli;
    (void)format;
}

static int command(const char *first, ...)
{
    char *words[WORDS_MAX] = {(char *)(uintptr_t)"fdb-nbd", (char *)(uintptr_t)"--store", uri};
    int n = 3;
    va_list args;
    va_start(args, first);
    for (const char *word = first; word; word = va_arg(args, const char *))
        words[n++] = (char *)(uintptr_t)word;
    va_end(args);
    n_sentences = 0;
    return cli_main(n, words);
}

static void write_file(const char *path, const uint8_t *bytes, size_t len)
{
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    CHECK(fd >= 0 && write(fd, bytes, len) == (ssize_t)len && close(fd) == 0);
}

/* --- what is there ------------------------------------------------------------------------- */

/* What `list --json` says; its standard output is a file for that. */
static char *listing(const char *volume)
{
    char path[220];
    snprintf(path, sizeof path, "%s/listing", dir);
    fflush(stdout);
    int out = dup(STDOUT_FILENO), fd = open(path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    CHECK(out >= 0 && fd >= 0 && dup2(fd, STDOUT_FILENO) >= 0);
    int status = volume ? command("snapshot", "list", volume, "--json", NULL)
                        : command("list", "--json", NULL);
    CHECK(status == CLI_DONE);
    fflush(stdout);
    CHECK(dup2(out, STDOUT_FILENO) >= 0 && close(out) == 0);
    struct stat st;
    CHECK(fstat(fd, &st) == 0);
    char *text = mem_zalloc((size_t)st.st_size + 1);
    CHECK(pread(fd, text, (size_t)st.st_size, 0) == st.st_size && close(fd) == 0);
    return text;
}

static struct image image_of(const char *volume)
{
    struct image image = {0};
    struct stat st;
    CHECK(command("export", volume, image_file, "--force", NULL) == CLI_DONE);
    CHECK(stat(image_file, &st) == 0);
    image.size = (uint64_t)st.st_size;
    CHECK(image.size <= IMAGE_BYTES_MAX);
    int fd = open(image_file, O_RDONLY | O_CLOEXEC);
    image.bytes = mem_alloc(image.size);
    CHECK(fd >= 0 && read(fd, image.bytes, image.size) == (ssize_t)image.size && close(fd) == 0);
    return image;
}

static void check_image(const char *volume, const struct image *want)
{
    struct image is = image_of(volume);
    CHECK(is.size == want->size && memcmp(is.bytes, want->bytes, is.size) == 0);
    free(is.bytes);
}

/* --- the model ----------------------------------------------------------------------------- */

/* What the bytes are as a stream: applied to `image`, where it is to go on from something that of
 * `base`. False: they are none. *incremental: its first state has a base. */
static bool apply(const struct made_stream *made, const struct image *base, struct image *image,
                  bool *incremental, bool *too_large)
{
    static uint8_t unpacked[STREAM_DATA_BYTES_MAX];
    struct stream_reader r;
    struct stream_frame f;
    struct err e;
    *incremental = *too_large = false;
    if (made->len < STREAM_BEGIN_BYTES || stream_take_begin(&r, made->bytes, &e) != ST_OK)
        return false;
    while (r.last != STREAM_END) {
        const uint8_t *body = made->bytes + r.position + STREAM_HEAD_BYTES;
        if (made->len - r.position < STREAM_HEAD_BYTES ||
            stream_take_head(&r, made->bytes + r.position, &f, &e) != ST_OK ||
            made->len - r.position < f.body_len || stream_take_body(&r, &f, body, &e) != ST_OK)
            return false;
        if (f.kind == STREAM_SECTION) {
            uint64_t had = image->size;
            if (r.n_sections == 1 && !stream_no_id(r.section.base)) {
                *incremental = true;
                had = base->size;
                memcpy(image->bytes, base->bytes, had);
            }
            image->size = r.section.size;
            *too_large = *too_large || image->size > IMAGE_BYTES_MAX;
            if (!*too_large && image->size > had)
                memset(image->bytes + had, 0, image->size - had);
        }
        if (f.packed && stream_unpack(&f, body, unpacked, &e) != ST_OK)
            return false;
        if (f.kind == STREAM_DATA && !*too_large)
            memcpy(image->bytes + f.offset, f.packed ? unpacked : body, f.length);
        if (f.kind == STREAM_ZERO && !*too_large)
            memset(image->bytes + f.offset, 0, f.length);
    }
    return made->len == r.position;
}

/* --- */

static struct image base;
static char *base_list, *base_snapshots;

/* The volume "v": its snapshot "a", with an id of ones, is all there is. */
static void make_base(void)
{
    static const uint8_t frames[] = {
        0,   0, 0, 0,                               /* not damaged */
        1,   1, 0, 0, 0, 1, 1, 0, 0, 0, 0,          /* one state, 4 KiB blocks */
        10,  39, 0, 7, 0, 1, 0, 1, 0,               /* a snapshot, 20 KiB, "a" */
        3,   0, 0, 0, 32, 1, 3,                     /* data */
        3,   100, 0, 200, 0, 1, 5, 5, 6};
    struct fuzz_input in = fuzz_input(frames, sizeof frames);
    struct made_stream made;
    made_stream(&made, &in);
    write_file(stream_file, made.bytes, made.len);
    free(made.bytes);
    int status = command("import", "--stream", "--force", "--yes", stream_file, "v", NULL);
    CHECK(status == CLI_DONE);
    free(base.bytes);
    free(base_list);
    free(base_snapshots);
    base = image_of("v");
    base_list = listing(NULL);
    base_snapshots = listing("v");
}

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
    (void)argc;
    (void)argv;
    const char *tmp = getenv("TMPDIR") ? getenv("TMPDIR") : "/tmp";
    CHECK(freopen("/dev/null", "w", stdout));
    snprintf(dir, sizeof dir, "%.150s/fuzz-import-XXXXXX", tmp);
    CHECK(mkdtemp(dir));
    snprintf(uri, sizeof uri, "lmdb:%s/store", dir);
    snprintf(stream_file, sizeof stream_file, "%s/stream", dir);
    snprintf(image_file, sizeof image_file, "%s/image", dir);
    make_base();
    return 0;
}

static void check_as_before(void)
{
    char *list = listing(NULL), *snapshots = listing("v");
    CHECK(strcmp(list, base_list) == 0 && strcmp(snapshots, base_snapshots) == 0);
    check_image("v", &base);
    free(list);
    free(snapshots);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static uint8_t bytes[IMAGE_BYTES_MAX];
    struct fuzz_input in = fuzz_input(data, size);
    bool to_new = fuzz_take(&in, 1) % 2, incremental, too_large;
    struct image want = {.bytes = bytes};
    struct made_stream made;
    made_stream(&made, &in);
    write_file(stream_file, made.bytes, made.len);
    bool good = apply(&made, &base, &want, &incremental, &too_large);
    CHECK(!good || !made.flipped);

    const char *name = to_new ? "new" : "v";
    int status = command("import", "--stream", stream_file, name, NULL);
    CHECK((status == CLI_DONE) == (n_sentences == 0));
    CHECK(status != CLI_DONE || good);
    /* A whole stream may still not fit: the name is taken, or its base is not there. */
    CHECK(status == CLI_DONE || !good || !to_new || incremental || too_large || want.size == 0);
    if (status != CLI_DONE) {
        check_as_before();
    } else {
        if (!too_large)
            check_image(name, &want);
        CHECK(command("remove", name, "--yes", "--snapshots", NULL) == CLI_DONE);
        if (!to_new)
            make_base();
    }
    free(made.bytes);
    return 0;
}
