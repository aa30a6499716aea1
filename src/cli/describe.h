/*
 * How volumes and their owners are shown, to people and to programs.
 */
#ifndef CLI_DESCRIBE_H
#define CLI_DESCRIBE_H

#include <stdio.h>

#include <jansson.h>

#include "cli/run.h"

/* "host:pid", "dead", "-", or "host:pid?" where it can't be known whether it lives. */
const char *describe_owner(enum run_owner state, const struct owner_record *owner,
                           char out[HOST_BYTES_MAX + 16]);

/* The same for programs: null, or an object. A new reference. */
json_t *describe_owner_json(enum run_owner state, const struct owner_record *owner);

/* What list and info both say of a volume. `parent`: VOLUME@SNAPSHOT that it is a clone of, or "".
 * A new reference. */
json_t *describe_volume_json(struct run *run, const struct catalog_entry *entry, size_t n_snapshots,
                             const char *parent);

/* VOLUME@SNAPSHOT. */
const char *describe_snapshot(const char *volume, const char *snapshot, char out[FULL_NAME_BYTES]);

/* Prints a table on stdout, its columns as wide as what is in them. `cell` fills one; the last one of each
 * row is asked for once, the others twice. */
#define DESCRIBE_CELL_BYTES 400u
#define DESCRIBE_COLUMNS_MAX 10u
void describe_table(const char *const *titles, size_t columns, size_t rows,
                    void (*cell)(void *arg, size_t row, size_t column,
                                 char out[DESCRIBE_CELL_BYTES]),
                    void *arg);

/* The same, elsewhere. */
void describe_table_to(FILE *to, const char *const *titles, size_t columns, size_t rows,
                       void (*cell)(void *arg, size_t row, size_t column,
                                    char out[DESCRIBE_CELL_BYTES]),
                       void *arg);

/* A number of bytes that an engine may not know: cli_size() or "unknown"; for programs null. */
const char *describe_bytes(uint64_t bytes, char out[24]);
json_t *describe_bytes_json(uint64_t bytes);

/* Prints `json` on stdout and gives the reference back. */
void describe_print(json_t *json);

#endif
