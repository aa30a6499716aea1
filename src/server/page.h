/*
 * The status page as it is built in: the files of src/server/page/, which page/embed.py turns into
 * this table. They ask the server they come from for its JSON (docs/http.md), and nobody for
 * anything else.
 */
#ifndef SERVER_PAGE_H
#define SERVER_PAGE_H

#include "server/http.h"

extern const struct http_file page_files[];
extern const size_t page_n_files;

#endif
