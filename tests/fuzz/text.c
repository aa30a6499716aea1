/*
 * Any bytes as what people write: configuration files (config.c), access files (access.c), and here
 * the NBD URIs and sizes that commands are given.
 *
 * At stake: what a user types wrong is refused with a sentence; what is taken means one thing.
 *
 * An input: which of them (1 byte), then its bytes.
 *
 * Oracle: of the files, theirs. A URI that is taken, written in its canonical form, is taken again as
 * the same, with the same canonical form. A size that is taken is never shown as more than it is.
 *
 * Code: src/cli/config.c src/server/access.c src/client/uri.c src/base/size.c src/base/textfile.c
 */
#include "text.h"

#include <stdlib.h>
#include <string.h>

#include "base/mem.h"
#include "base/size.h"
#include "client/uri.h"

static char *text_of(const uint8_t *data, size_t size)
{
    char *text = mem_alloc(size + 1);
    if (size > 0)
        memcpy(text, data, size);
    text[size] = '\0';
    return text;
}

static void try_uri(const uint8_t *data, size_t size)
{
    static char canonical[NBD_URI_TEXT_BYTES], again[NBD_URI_TEXT_BYTES];
    struct nbd_uri uri, back;
    struct err e = {0};
    char *text = text_of(data, size);
    enum status st = nbd_uri_parse(text, &uri, &e);
    free(text);
    if (st != ST_OK) {
        CHECK(st == ST_INVAL && e.text[0]);
        return;
    }
    CHECK(strnlen(uri.export, sizeof uri.export) < sizeof uri.export);
    if (uri.is_unix) {
        CHECK(uri.socket[0] && strnlen(uri.socket, sizeof uri.socket) < sizeof uri.socket);
    } else {
        long port = strtol(uri.port, NULL, 10);
        CHECK(uri.host[0] && port >= 1 && port <= 65535 && uri.port[0] != '0');
    }
    CHECK(strlen(nbd_uri_format(&uri, canonical)) < NBD_URI_TEXT_BYTES);
    CHECK(nbd_uri_parse(canonical, &back, &e) == ST_OK && back.is_unix == uri.is_unix);
    CHECK(strcmp(back.host, uri.host) == 0 && strcmp(back.port, uri.port) == 0 &&
          strcmp(back.socket, uri.socket) == 0 && strcmp(back.export, uri.export) == 0);
    CHECK(strcmp(nbd_uri_format(&back, again), canonical) == 0);
}

static void try_size(const uint8_t *data, size_t size)
{
    char shown[24], *text = text_of(data, size), *digits = text;
    uint64_t bytes, back;
    if (size_parse(text, &bytes)) {
        CHECK(bytes <= INT64_MAX);
        /* (Without the blank between number and unit.) */
        size_format(bytes, shown);
        char *blank = strchr(shown, ' ');
        CHECK(blank);
        memmove(blank, blank + 1, strlen(blank));
        CHECK(size_parse(shown, &back) && back <= bytes && bytes - back <= bytes / 10);
        while (*digits >= '0' && *digits <= '9')
            digits++;
        if (!*digits)
            CHECK(bytes == strtoull(text, NULL, 10));
    }
    free(text);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static void (*const tries[])(const uint8_t *, size_t) = {try_config, try_access, try_uri,
                                                             try_size};
    if (size > 0)
        tries[data[0] % 4](data + 1, size - 1);
    return 0;
}
