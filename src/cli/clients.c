/* fdb-nbd clients: who is connected to the running servers. */
#include <stdio.h>

#include "cli/control.h"
#include "cli/describe.h"

static const struct cli_option options[] = {
    CONTROL_OPTION_SOCKET,
    CONTROL_OPTION_HTTP,
    {0, NULL, NULL, NULL},
};

static enum status take(void *arg, int code, const char *value, struct err *e)
{
    return control_take(arg, code, value, e);
}

static void cell(void *arg, size_t row, size_t column, char out[DESCRIBE_CELL_BYTES])
{
    json_t *c = json_array_get(arg, row);
    char size[24];
    switch (column) {
    case 0:
        snprintf(out, DESCRIBE_CELL_BYTES, "%.300s", control_text(c, "address"));
        break;
    case 1:
        snprintf(out, DESCRIBE_CELL_BYTES, "%.300s%s",
                 json_is_string(json_object_get(c, "export")) ? control_text(c, "export")
                                                              : control_text(c, "phase"),
                 control_truth(c, "read_only") ? " (read-only)" : "");
        break;
    case 2:
        snprintf(out, DESCRIBE_CELL_BYTES, "%.300s",
                 json_is_string(json_object_get(c, "peer")) ? control_text(c, "peer") : "-");
        break;
    case 3:
        snprintf(out, DESCRIBE_CELL_BYTES, "%.300s", control_text(c, "since"));
        break;
    case 4:
        snprintf(out, DESCRIBE_CELL_BYTES, "%.0f", control_number(c, "requests"));
        break;
    case 5:
        snprintf(out, DESCRIBE_CELL_BYTES, "%s",
                 cli_size((uint64_t)control_number(c, "read_bytes"), size));
        break;
    case 6:
        snprintf(out, DESCRIBE_CELL_BYTES, "%s",
                 cli_size((uint64_t)control_number(c, "written_bytes"), size));
        break;
    case 7:
        snprintf(out, DESCRIBE_CELL_BYTES, "%.0f", control_number(c, "in_flight"));
        break;
    default:
        snprintf(out, DESCRIBE_CELL_BYTES, "%.0f", control_number(c, "errors"));
    }
}

static void print_clients(const struct control *control, size_t i, json_t *answer)
{
    static const char *const titles[] = {"CLIENT", "VOLUME",  "WHO",       "SINCE", "REQUESTS",
                                         "READ",   "WRITTEN", "UNDER WAY", "ERRORS"};
    json_t *clients = json_object_get(answer, "clients");
    size_t n = json_array_size(clients);
    double total = control_number(answer, "total");
    if (control->n > 1)
        printf("%s%s\n", i > 0 ? "\n" : "", control->places[i]);
    if (n == 0)
        puts("nobody is connected");
    else
        describe_table(titles, sizeof titles / sizeof *titles, n, cell, clients);
    if (total > (double)n)
        printf("and %.0f more\n", total - (double)n);
}

static int run_clients(struct cli *cli, int argc, char **argv)
{
    struct control control = {0};
    struct err e = {0};
    if (cli_parse(cli, argc, argv, take, &control) < 0)
        return cli->status;
    if (control_find(&control, &e) != ST_OK)
        return cli_failed(&e);
    json_t *all = json_array();
    int status = CLI_DONE;
    for (size_t i = 0; i < control.n; i++) {
        json_t *answer = NULL;
        if (control_ask(control.places[i], "GET", "/v1/clients", &answer, &e) != ST_OK) {
            status = cli_failed(&e);
            continue;
        }
        if (!cli->json)
            print_clients(&control, i, answer);
        json_array_append_new(all, json_pack("{s:s, s:O}", "place", control.places[i], "clients",
                                             json_object_get(answer, "clients")));
        json_decref(answer);
    }
    if (cli->json)
        describe_print(json_pack("{s:o}", "servers", all));
    else
        json_decref(all);
    return status == CLI_DONE ? CLI_DONE : CLI_FAILED;
}

const struct cli_command clients_command = {
    .name = "clients",
    .args = "",
    .summary = "show who is connected to the running servers",
    .details = "Asks the servers of this user on this host, or those that --control and --http name.",
    .options = options,
    .run = run_clients,
};
