/* How volumes and their owners are shown; see describe.h. */
#include "cli/describe.h"

#include <stdio.h>
#include <string.h>

#include "base/check.h"
#include "base/date.h"

const char *describe_owner(enum run_owner state, const struct owner_record *owner,
                           char out[HOST_BYTES_MAX + 16])
{
    if (state == OWNER_NONE)
        snprintf(out, HOST_BYTES_MAX + 16, "-");
    else if (state == OWNER_DEAD)
        snprintf(out, HOST_BYTES_MAX + 16, "dead");
    else
        snprintf(out, HOST_BYTES_MAX + 16, "%s:%u%s", owner->host, owner->pid,
                 state == OWNER_UNKNOWN ? "?" : "");
    return out;
}

json_t *describe_owner_json(enum run_owner state, const struct owner_record *owner)
{
    if (state == OWNER_NONE)
        return json_null();
    char since[DATE_BYTES];
    json_t *alive = state == OWNER_UNKNOWN ? json_null() : json_boolean(state == OWNER_ALIVE);
    return json_pack("{s:s, s:i, s:s, s:s, s:o, s:I}", "host", owner->host, "pid", (int)owner->pid,
                     "address", owner->address, "since", date_format(owner->since_ns, since),
                     "alive", alive, "token", (json_int_t)owner->token);
}

const char *describe_snapshot(const char *volume, const char *snapshot, char out[FULL_NAME_BYTES])
{
    snprintf(out, FULL_NAME_BYTES, "%s@%s", volume, snapshot);
    return out;
}

json_t *describe_volume_json(struct run *run, const struct catalog_entry *entry, size_t n_snapshots,
                             const char *parent)
{
    const struct header_record *h = &entry->header;
    char codec[24], created[DATE_BYTES];
    return json_pack("{s:s, s:I, s:I, s:i, s:s, s:s, s:s, s:I, s:o, s:o}", "name", entry->name,
                     "size_bytes", (json_int_t)h->size, "used_bytes",
                     (json_int_t)(entry->state.data_blocks * h->block_size), "block_size_bytes",
                     (int)h->block_size, "compression", cli_codec(h->codec, h->codec_level, codec),
                     "description", h->description, "created", date_format(h->created_ns, created),
                     "snapshots", (json_int_t)n_snapshots, "parent",
                     *parent ? json_string(parent) : json_null(), "owner",
                     describe_owner_json(run_owner_state(run, &entry->owner), &entry->owner));
}

const char *describe_bytes(uint64_t bytes, char out[24])
{
    return bytes == STORE_BYTES_UNKNOWN ? "unknown" : cli_size(bytes, out);
}

json_t *describe_bytes_json(uint64_t bytes)
{
    return bytes == STORE_BYTES_UNKNOWN ? json_null() : json_integer((json_int_t)bytes);
}

void describe_table(const char *const *titles, size_t columns, size_t rows,
                    void (*cell)(void *arg, size_t row, size_t column,
                                 char out[DESCRIBE_CELL_BYTES]),
                    void *arg)
{
    describe_table_to(stdout, titles, columns, rows, cell, arg);
}

void describe_table_to(FILE *to, const char *const *titles, size_t columns, size_t rows,
                       void (*cell)(void *arg, size_t row, size_t column,
                                    char out[DESCRIBE_CELL_BYTES]),
                       void *arg)
{
    char text[DESCRIBE_CELL_BYTES];
    int width[DESCRIBE_COLUMNS_MAX];
    CHECK(columns <= DESCRIBE_COLUMNS_MAX);
    for (size_t c = 0; c < columns; c++)
        width[c] = (int)strlen(titles[c]);
    for (size_t r = 0; r < rows; r++) {
        for (size_t c = 0; c + 1 < columns; c++) {
            cell(arg, r, c, text);
            int len = (int)strlen(text);
            width[c] = len > width[c] ? len : width[c];
        }
    }
    for (size_t c = 0; c + 1 < columns; c++)
        fprintf(to, "%-*s  ", width[c], titles[c]);
    fprintf(to, "%s\n", titles[columns - 1]);
    for (size_t r = 0; r < rows; r++) {
        for (size_t c = 0; c < columns; c++) {
            cell(arg, r, c, text);
            if (c + 1 < columns)
                fprintf(to, "%-*s  ", width[c], text);
            else
                fprintf(to, "%s\n", text);
        }
    }
}

void describe_print(json_t *json)
{
    json_dumpf(json, stdout, JSON_INDENT(2));
    putchar('\n');
    json_decref(json);
}
