/*
 * The command line: global options, what the configuration file says, help.
 *
 * Options are described once, in tables; help, parsing and the keys of the configuration file
 * all come from them, so that they can't say different things.
 */
#include "cli/cli.h"

#include <errno.h>
#include <getopt.h>
#include <pwd.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/check.h"
#include "base/log.h"
#include "base/mem.h"
#include "base/size.h"
#include "volume/records.h"

#define ANSWER_BYTES_MAX 64

enum {
    GLOBAL_STORE = 1001,
    GLOBAL_CONFIG,
    GLOBAL_JSON,
    GLOBAL_LOG_LEVEL,
    GLOBAL_LOG_FORMAT,
    GLOBAL_HELP,
    GLOBAL_VERSION
};

static const struct cli_option global_options[] = {
    {GLOBAL_STORE, "store", "URI",
     "lmdb:DIRECTORY or fdb:[CLUSTER_FILE][?prefix=TEXT] (default: see below)"},
    {GLOBAL_CONFIG, "config", "FILE", "read the configuration FILE (default: none)"},
    {GLOBAL_JSON, "json", NULL,
     "answers for programs: list, info, snapshot list, diff, usage, verify, owner show, "
     "store info, device list, bench"},
    {GLOBAL_LOG_LEVEL, "log-level", "LEVEL",
     "debug, info, warning or error (default: info for serve)"},
    {GLOBAL_LOG_FORMAT, "log-format", "FORMAT",
     "text, json or journal (default: journal where stderr is the journal, else text)"},
    {GLOBAL_HELP, "help", NULL, "show this; behind a command: about that command"},
    {GLOBAL_VERSION, "version", NULL, "show the version"},
    {0, NULL, NULL, NULL},
};

const struct cli_command *const cli_commands[] = {
    &create_command,
    &list_command,
    &info_command,
    &rename_command,
    &resize_command,
    &remove_command,
    &snapshot_command,
    &clone_command,
    &flatten_command,
    &diff_command,
    &export_command,
    &import_command,
    &usage_command,
    &verify_command,
    &serve_command,
    &status_command,
    &clients_command,
    &drain_command,
    &owner_command,
    &store_command,
    &device_command,
    &bench_command,
    NULL,
};

void cli_error(const char *format, ...)
{
    char text[2048];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    /* What was typed may stand in the sentence: it stays one line and moves no cursor. */
    for (char *c = text; *c; c++)
        if ((unsigned char)*c < 0x20 || *c == 0x7f)
            *c = '?';
    fflush(stdout);
    /* Whoever reads the log as a program's reads this too. */
    if (log_format() != LOG_FORMAT_TEXT) {
        log_error("%s", text);
        return;
    }
    fprintf(stderr, "fdb-nbd: %s\n", text);
}

int cli_failed(const struct err *e)
{
    cli_error("%s", e->text[0] ? e->text : status_text(e->st));
    switch (e->st) {
    case ST_OK:
        return CLI_DONE;
    case ST_INVAL:
        return CLI_USAGE;
    case ST_NOTFOUND:
        return CLI_NOTFOUND;
    case ST_UNAVAIL:
    case ST_FORMAT:
        return CLI_STORE;
    default:
        return CLI_FAILED;
    }
}

int cli_usage_error(const struct cli *cli, const char *format, ...)
{
    char text[1024];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    cli_error("%s; see fdb-nbd %s%s--help", text, cli->command ? cli->command->name : "",
              cli->command ? " " : "");
    return CLI_USAGE;
}

bool cli_confirm(bool yes, const char *what)
{
    if (yes)
        return true;
    if (!isatty(STDIN_FILENO) || !isatty(STDERR_FILENO)) {
        cli_error("this %s: add --yes to say that you mean it", what);
        return false;
    }
    fflush(stdout);
    fprintf(stderr, "This %s. Go on? Type \"yes\": ", what);
    char answer[ANSWER_BYTES_MAX];
    if (fgets(answer, sizeof answer, stdin)) {
        answer[strcspn(answer, "\r\n")] = '\0';
        if (strcasecmp(answer, "yes") == 0)
            return true;
    }
    cli_error("nothing was done");
    return false;
}

enum status cli_parse_size(const char *text, uint64_t *bytes, struct err *e)
{
    if (!size_parse(text, bytes))
        return fail(e, ST_INVAL, "\"%.64s\" is not a size (10G, 512M, 1.5T, or a number of bytes)",
                    text);
    return ST_OK;
}

enum status cli_parse_description(const char *text, char *out, struct err *e)
{
    if (strlen(text) > DESCRIPTION_BYTES_MAX)
        return fail(e, ST_INVAL, "a description has at most %u bytes", DESCRIPTION_BYTES_MAX);
    strcpy(out, text);
    return ST_OK;
}

enum status cli_parse_number(const char *text, uint64_t min, uint64_t max, uint64_t *out,
                             struct err *e)
{
    char *end;
    errno = 0;
    unsigned long long v = strtoull(text, &end, 10);
    if (text[0] < '0' || text[0] > '9' || *end || errno || v < min || v > max)
        return fail(e, ST_INVAL, "\"%.64s\" is not a number from %llu to %llu", text,
                    (unsigned long long)min, (unsigned long long)max);
    *out = v;
    return ST_OK;
}

const char *cli_size(uint64_t bytes, char out[24])
{
    char text[24];
    size_format(bytes, text);
    char *blank = strchr(text, ' ');
    char unit = blank ? blank[1] : 'B';
    if (blank)
        *blank = '\0';
    size_t len = strlen(text);
    if (len > 2 && strcmp(text + len - 2, ".0") == 0)
        text[len - 2] = '\0';
    snprintf(out, 24, "%.20s%c", text, unit);
    return out;
}

const char *cli_codec(int kind, int level, char out[24])
{
    static const char *const names[] = {"none", "lz4", "zstd"};
    if (kind < 0 || kind > CODEC_ZSTD)
        snprintf(out, 24, "unknown (%d)", kind);
    else if (level > 0)
        snprintf(out, 24, "%s:%d", names[kind], level);
    else
        snprintf(out, 24, "%s", names[kind]);
    return out;
}

/* --- help ---------------------------------------------------------------------------- */

static void print_options(const struct cli_option *options)
{
    for (; options && options->name; options++) {
        char left[48];
        snprintf(left, sizeof left, "--%s%s%s", options->name, options->arg ? " " : "",
                 options->arg ? options->arg : "");
        printf("  %-22s %s\n", left, options->help);
    }
}

static void print_help(void)
{
    puts("fdb-nbd: network block devices whose blocks live in a key-value store\n\n"
         "usage: fdb-nbd [--store URI] [--config FILE] [--json] COMMAND ...\n\ncommands:");
    for (size_t i = 0; cli_commands[i]; i++) {
        char left[48];
        snprintf(left, sizeof left, "%s %s", cli_commands[i]->name, cli_commands[i]->args);
        printf("  %-22s %s\n", left, cli_commands[i]->summary);
    }
    puts("\noptions:");
    print_options(global_options);
    puts("\nThe store is what --store says, else \"store\" in the configuration file, else the\n"
         "environment variable FDB_NBD_STORE, else lmdb:/var/lib/fdb-nbd for root and for\n"
         "the owner of that folder, and lmdb:~/.local/share/fdb-nbd (or below\n"
         "$XDG_DATA_HOME) for everybody else.\n"
         "The log level may also stand in FDB_NBD_LOG.\n\n"
         "exit status: 0 done, 1 refused or failed, 2 usage, 3 not found, 4 store unavailable");
}

static void print_command_help(const struct cli_command *command)
{
    printf("usage: fdb-nbd %s%s%s%s\n\n%s\n", command->name, command->args[0] ? " " : "",
           command->args, command->options ? " [options]" : "", command->summary);
    if (command->details)
        printf("\n%s\n", command->details);
    if (command->options) {
        puts("\noptions:");
        print_options(command->options);
    }
    puts("\nGlobal options: fdb-nbd --help");
}

/* --- options ------------------------------------------------------------------------- */

static void set_text(char **field, const char *value)
{
    free(*field);
    *field = mem_strdup(value);
}

/* Ends the parsing: help was shown or an error printed. */
static int over(struct cli *cli, int status)
{
    cli->over = true;
    cli->status = status;
    return -1;
}

static void take_global(struct cli *cli, int code, const char *value)
{
    switch (code) {
    case GLOBAL_STORE:
        set_text(&cli->store_uri, value);
        break;
    case GLOBAL_CONFIG:
        set_text(&cli->config_path, value);
        break;
    case GLOBAL_LOG_LEVEL:
        set_text(&cli->log_level, value);
        break;
    case GLOBAL_LOG_FORMAT:
        set_text(&cli->log_format, value);
        break;
    case GLOBAL_JSON:
        cli->json = true;
        break;
    case GLOBAL_HELP:
        if (cli->command)
            print_command_help(cli->command);
        else
            print_help();
        over(cli, CLI_DONE);
        break;
    default:
        puts("fdb-nbd " FDB_NBD_VERSION);
        over(cli, CLI_DONE);
    }
}

static size_t add_long_options(struct option *to, size_t n, const struct cli_option *from)
{
    for (; from && from->name; from++) {
        CHECK(n < 2 * CLI_OPTIONS_MAX && from->code % GLOBAL_STORE < (int)CLI_OPTIONS_MAX);
        to[n++] = (struct option){.name = from->name,
                                  .has_arg = from->arg ? required_argument : no_argument,
                                  .val = from->code};
    }
    return n;
}

/* The index of `name` in a list that ends with NULL; -1 where it is not there. */
static int find_name(const char *const *names, const char *name)
{
    for (int i = 0; names[i]; i++)
        if (strcasecmp(names[i], name) == 0)
            return i;
    return -1;
}

static enum status parse_log_level(const char *name, enum log_level *level, struct err *e)
{
    int i = find_name(log_level_names, name);
    if (i < 0)
        return fail(e, ST_INVAL, "\"%.64s\" is not a log level (debug, info, warning, error)",
                    name);
    *level = (enum log_level)i;
    return ST_OK;
}

static enum status parse_log_format(const char *name, enum log_format *format, struct err *e)
{
    int i = find_name(log_format_names, name);
    if (i < 0)
        return fail(e, ST_INVAL, "\"%.64s\" is not a log format (text, json, journal)", name);
    *format = (enum log_format)i;
    return ST_OK;
}

static const char *option_name(const struct cli_option *options, int code)
{
    while (options->code != code)
        options++;
    return options->name;
}

/* Takes options off argv: the global ones, and the command's where `take` is given. */
static void parse_options(struct cli *cli, int argc, char **argv, const char *how,
                          enum status (*take)(void *, int, const char *, struct err *),
                          void *options)
{
    struct option table[2 * CLI_OPTIONS_MAX + 1] = {{0}};
    size_t n = add_long_options(table, 0, global_options);
    if (take)
        n = add_long_options(table, n, cli->command->options);
    table[n] = (struct option){0};

    opterr = 0;
    optind = 0; /* glibc: forget an earlier argv */
    int code;
    while (!cli->over && (code = getopt_long(argc, argv, how, table, NULL)) != -1) {
        struct err e = {0};
        if (code == 'h')
            code = GLOBAL_HELP;
        if (code == ':') {
            over(cli, cli_usage_error(cli, "%s needs a value", argv[optind - 1]));
        } else if (code == '?') {
            over(cli, cli_usage_error(cli, "\"%s\" is not an option here, or not a complete one",
                                      argv[optind - 1]));
        } else if (code >= GLOBAL_STORE) {
            cli->given_globals[code - GLOBAL_STORE] = true;
            take_global(cli, code, optarg);
        } else {
            cli->given[code] = true;
            if (take(options, code, optarg, &e) != ST_OK)
                over(cli, cli_usage_error(cli, "--%s: %s", option_name(cli->command->options, code),
                                          e.text));
        }
    }
}

/* --- the configuration file ----------------------------------------------------------- */

static const struct cli_option *find_option(const struct cli_option *options, const char *name)
{
    for (; options && options->name; options++)
        if (strcmp(options->name, name) == 0)
            return options;
    return NULL;
}

/* 1, 0, or -1 where the text is neither. */
static int parse_truth(const char *text)
{
    static const char *const words[2][3] = {{"no", "false", "off"}, {"yes", "true", "on"}};
    for (int truth = 0; truth < 2; truth++)
        for (int i = 0; i < 3; i++)
            if (strcasecmp(text, words[truth][i]) == 0)
                return truth;
    return -1;
}

/* Global options that may stand in the file: those with a value, but that of the file itself. */
static bool is_setting(const struct cli_option *global)
{
    return global->arg && global->code != GLOBAL_CONFIG;
}

static bool is_repeatable(const struct cli_option *option)
{
    for (const int *code = serve_command.repeatable; code && *code; code++)
        if (option->code == *code)
            return true;
    return false;
}

static const struct cli_option *find_setting(const struct cli_option *options, const char *key)
{
    const struct cli_option *option = find_option(options, key);
    return option && (options != global_options || is_setting(option)) ? option : NULL;
}

static enum status apply_own(struct cli *cli, const struct config_setting *s,
                             const struct cli_option *option,
                             enum status (*take)(void *, int, const char *, struct err *),
                             void *options, struct err *e)
{
    const char *file = cli->config_path;
    struct err why = {0};
    int truth = option->arg ? 1 : parse_truth(s->value);
    if (truth < 0)
        return fail(e, ST_INVAL, "%s:%u: \"%s\" is yes or no, not \"%.64s\"", file, s->line, s->key,
                    s->value);
    if (cli->command != &serve_command || cli->given[option->code] || truth == 0)
        return ST_OK;
    if (take(options, option->code, option->arg ? s->value : NULL, &why) != ST_OK)
        return fail(e, ST_INVAL, "%s:%u: %s: %s", file, s->line, s->key, why.text);
    return ST_OK;
}

static enum status apply_global(struct cli *cli, const struct config_setting *s,
                                const struct cli_option *option, struct err *e)
{
    enum log_level level = LOG_LEVEL_INFO;
    struct err why = {0};
    enum log_format format = LOG_FORMAT_TEXT;
    if ((option->code == GLOBAL_LOG_LEVEL && parse_log_level(s->value, &level, &why) != ST_OK) ||
        (option->code == GLOBAL_LOG_FORMAT && parse_log_format(s->value, &format, &why) != ST_OK))
        return fail(e, ST_INVAL, "%s:%u: %s: %s", cli->config_path, s->line, s->key, why.text);
    if (!cli->given_globals[option->code - GLOBAL_STORE])
        take_global(cli, option->code, s->value);
    return ST_OK;
}

/* Gives what stands in the file, and the command line did not say, to `take` (of `serve`) and
 * take_global(). */
static enum status apply_settings(struct cli *cli,
                                  enum status (*take)(void *, int, const char *, struct err *),
                                  void *options, struct err *e)
{
    unsigned own_lines[CLI_OPTIONS_MAX] = {0}, global_lines[CLI_OPTIONS_MAX] = {0};
    const struct config *config = &cli->config;
    for (size_t i = 0; i < config->n; i++) {
        const struct config_setting *s = &config->settings[i];
        const struct cli_option *own = find_setting(serve_command.options, s->key);
        const struct cli_option *global = find_setting(global_options, s->key);
        if (!own && !global)
            return fail(e, ST_INVAL, "%s:%u: there is no setting \"%.64s\"; the settings are the "
                        "options of \"fdb-nbd serve\", and --store, --log-level and --log-format",
                        config->file, s->line, s->key);
        unsigned *line =
            own ? &own_lines[own->code] : &global_lines[global->code - GLOBAL_STORE];
        if (*line && !(own && is_repeatable(own)))
            return fail(e, ST_INVAL, "%s:%u: \"%s\" stands in line %u already", config->file,
                        s->line, s->key, *line);
        *line = s->line;
        enum status st = own ? apply_own(cli, s, own, take, options, e)
                             : apply_global(cli, s, global, e);
        if (st != ST_OK)
            return st;
    }
    return ST_OK;
}

#define SYSTEM_STORE "/var/lib/fdb-nbd"

/* Root's, and the service's, which runs as the user whose folder it is. */
static bool has_system_store(void)
{
    struct stat folder;
    return geteuid() == 0 || (stat(SYSTEM_STORE, &folder) == 0 && folder.st_uid == geteuid());
}

static void find_store(struct cli *cli)
{
    const char *given = getenv("FDB_NBD_STORE");
    if (cli->store_uri)
        return;
    if (given && given[0]) {
        set_text(&cli->store_uri, given);
        return;
    }
    if (has_system_store()) {
        set_text(&cli->store_uri, "lmdb:" SYSTEM_STORE);
        return;
    }
    char uri[4096];
    const char *data = getenv("XDG_DATA_HOME"), *home = getenv("HOME");
    if (!home || home[0] != '/') {
        const struct passwd *user = getpwuid(geteuid());
        home = user ? user->pw_dir : "/";
    }
    /* A relative one is to be ignored, says the specification. */
    if (data && data[0] == '/')
        snprintf(uri, sizeof uri, "lmdb:%s/fdb-nbd", data);
    else
        snprintf(uri, sizeof uri, "lmdb:%s/.local/share/fdb-nbd", home);
    set_text(&cli->store_uri, uri);
}

static bool set_log_level(const struct cli *cli)
{
    const char *name = cli->log_level ? cli->log_level : getenv("FDB_NBD_LOG");
    if (!name || !name[0]) {
        log_set_level(cli->command == &serve_command ? LOG_LEVEL_INFO : LOG_LEVEL_WARNING);
        return true;
    }
    struct err e = {0};
    enum log_level level = LOG_LEVEL_INFO;
    if (parse_log_level(name, &level, &e) == ST_OK)
        log_set_level(level);
    else
        cli_usage_error(cli, "%s", e.text);
    return e.st == ST_OK;
}

static bool set_log_format(const struct cli *cli)
{
    struct err e = {0};
    enum log_format format = LOG_FORMAT_TEXT;
    if (!cli->log_format) {
        if (log_stderr_is_journal())
            (void)log_set_format(LOG_FORMAT_JOURNAL);
        return true;
    }
    if (parse_log_format(cli->log_format, &format, &e) != ST_OK)
        cli_usage_error(cli, "%s", e.text);
    else if (!log_set_format(format))
        cli_usage_error(cli, "--log-format journal: there is no journald on this machine; use text "
                             "or json");
    else
        return true;
    return false;
}

int cli_parse(struct cli *cli, int argc, char **argv,
              enum status (*take)(void *options, int code, const char *value, struct err *e),
              void *options)
{
    struct err e = {0};
    parse_options(cli, argc, argv, ":h", take, options);
    if (cli->over)
        return -1;
    int n = argc - optind;
    if (n < cli->command->args_min || n > cli->command->args_max)
        return over(cli,
                    cli_usage_error(cli, "too %s arguments, usage: fdb-nbd %s%s%s",
                                    n < cli->command->args_min ? "few" : "many", cli->command->name,
                                    cli->command->args[0] ? " " : "", cli->command->args));
    int first = optind;
    if (cli->config_path &&
        (config_load(&cli->config, cli->config_path, &e) != ST_OK ||
         apply_settings(cli, take, options, &e) != ST_OK))
        return over(cli, cli_failed(&e));
    if (!set_log_level(cli) || !set_log_format(cli))
        return over(cli, CLI_USAGE);
    find_store(cli);
    return first;
}

static void cli_free(struct cli *cli)
{
    config_free(&cli->config);
    free(cli->store_uri);
    free(cli->config_path);
    free(cli->log_level);
    free(cli->log_format);
}

static int run_command(struct cli *cli, int argc, char **argv)
{
    /* "+": what stands behind the command's name is the command's. */
    parse_options(cli, argc, argv, "+:h", NULL, NULL);
    if (cli->over)
        return cli->status;
    if (optind == argc)
        return cli_usage_error(cli, "which command?");
    int at = optind;
    for (size_t i = 0; cli_commands[i]; i++)
        if (strcmp(cli_commands[i]->name, argv[at]) == 0)
            cli->command = cli_commands[i];
    if (!cli->command)
        return cli_usage_error(cli, "there is no command \"%s\"", argv[at]);
    return cli->command->run(cli, argc - at, argv + at);
}

int cli_main(int argc, char **argv)
{
    struct cli cli = {.lease_ms = CLI_LEASE_MS};
    int status = run_command(&cli, argc, argv);
    /* Half an answer on a full disk is not an answer. */
    if ((fflush(stdout) != 0 || ferror(stdout)) && status == CLI_DONE) {
        cli_error("cannot write the answer: %s", strerror(errno));
        status = CLI_FAILED;
    }
    cli_free(&cli);
    return status;
}
