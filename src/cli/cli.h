/*
 * What the commands share: options and help from one table, the configuration file,
 * error sentences, exit statuses.
 *
 * A command is a table entry (what it takes, with its defaults, for --help and
 * for parsing alike) and a function. Global options stand before or behind the
 * command's name.
 */
#ifndef CLI_CLI_H
#define CLI_CLI_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/status.h"
#include "cli/config.h"

#define CLI_LEASE_MS 10000u
#define CLI_OPTIONS_MAX 64u /* of a command */

enum cli_exit {
    CLI_DONE = 0,
    CLI_FAILED = 1,   /* refused, or tried and failed */
    CLI_USAGE = 2,    /* not a command line this program knows */
    CLI_NOTFOUND = 3, /* no such volume */
    CLI_STORE = 4,    /* the store is not there, or not to be worked with */
};

struct cli_option {
    int code;         /* what the command's take() gets; from 1, unique in the command */
    const char *name; /* without the dashes */
    const char *arg;  /* what stands for its value in the help; NULL: a flag */
    const char *help; /* one line, with the default */
};

struct cli;

struct cli_command {
    const char *name;
    const char *args;                 /* "NAME SIZE" */
    const char *summary;              /* one line */
    const char *details;              /* more lines for its own --help, or NULL */
    const struct cli_option *options; /* ends with a NULL name; NULL: none */
    const int *repeatable;            /* serve: codes of those that may come again; ends with 0 */
    int args_min, args_max;
    /* argv[0] is the command's name. Returns an enum cli_exit. */
    int (*run)(struct cli *cli, int argc, char **argv);
};

struct cli {
    const struct cli_command *command;
    char *store_uri; /* resolved by cli_parse */
    char *config_path;
    char *log_level, *log_format;
    bool json;
    uint32_t lease_ms;         /* of the command's session, and of the store's patience */
    uint32_t store_timeout_ms; /* serve: store_options.timeout_ms */
    uint64_t quota_bytes;      /* serve: store_options.quota_bytes */
    bool own_cache;            /* serve: store_options.own_cache */
    bool wait_for_store;       /* serve: STORE_WAIT */
    /* What the command line said: the command's options by code, global ones by their place. */
    bool given[CLI_OPTIONS_MAX], given_globals[CLI_OPTIONS_MAX];
    struct config config; /* the file's settings; options may point into it */
    bool over;  /* cli_parse has answered already (--help, an error) ... */
    int status; /* ... and this is what the process ends with */
};

extern const struct cli_command create_command, list_command, info_command, rename_command,
    resize_command, remove_command, snapshot_command, clone_command, flatten_command, diff_command,
    export_command, import_command, verify_command, usage_command, serve_command, owner_command,
    store_command, device_command, bench_command, status_command, clients_command, drain_command;

/* All of them, in the order of the help; NULL at the end. */
extern const struct cli_command *const cli_commands[];

/* Runs the command line: the whole program. Returns the exit status. */
int cli_main(int argc, char **argv);

/* Parses the words behind the command's name: its options go to `take` (returns ST_OK, or
 * ST_INVAL with a sentence in `e` that follows the option's name), global ones into `cli`.
 * Then reads the configuration file, whose names are the long options of `serve` and the global
 * ones with a value (for `serve`, what the command line did not say is taken from it; a repeatable
 * option that it did say is not added to), sets how to log and finds the store. Returns the
 * index in argv of the first of the command's own arguments (options before them), of which there
 * are between args_min and args_max; or -1: cli->status is the exit status then. */
int cli_parse(struct cli *cli, int argc, char **argv,
              enum status (*take)(void *options, int code, const char *value, struct err *e),
              void *options);

/* Prints "fdb-nbd: ..." as one line on stderr. */
void cli_error(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* Prints what failed and returns the exit status for it. */
int cli_failed(const struct err *e);

/* Prints a sentence about the command line, where to read more, and returns CLI_USAGE. */
int cli_usage_error(const struct cli *cli, const char *format, ...)
    __attribute__((format(printf, 2, 3)));

/* Before data is destroyed: true where `yes`, or where a person at the terminal says so.
 * `what` completes "This ...". Prints why not otherwise. */
bool cli_confirm(bool yes, const char *what);

/* Values of options. ST_INVAL with a sentence that follows the option's name. */
enum status cli_parse_size(const char *text, uint64_t *bytes, struct err *e);
enum status cli_parse_description(const char *text, char *out, struct err *e);
enum status cli_parse_number(const char *text, uint64_t min, uint64_t max, uint64_t *out,
                             struct err *e);

/* "10G", "1.5T", "512B": a size without a blank in it, for tables; never shown too large. */
const char *cli_size(uint64_t bytes, char out[24]);

/* "lz4", "zstd:3". */
const char *cli_codec(int kind, int level, char out[24]);

#endif
