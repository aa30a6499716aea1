/*
 * Who changed what: each command that changed a volume says so on stdout, for whoever typed it, and
 * in the system's log (syslog, so the journal too), for whoever asks later; where there is none, in
 * its own, which is stderr, if --log-level is info. What a server does itself (serve --create) goes
 * into its own log; so do changes that a command had it make, which the server tells of with the
 * command's words (owner.c).
 */
#ifndef CLI_AUDIT_H
#define CLI_AUDIT_H

#include "cli/cli.h"

/* A sentence in the past tense, without an end: created volume "x" in lmdb:/y. */
void audit_changed(const struct cli *cli, const char *format, ...)
    __attribute__((format(printf, 2, 3)));

#define AUDIT_USER_BYTES 48u

/* The name of the user this process runs as; "uid 12" where it has none. */
const char *audit_user(char out[AUDIT_USER_BYTES]);

#endif
