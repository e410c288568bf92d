/*
program.h - what programs share: exit statuses, the first failure, signals, numbers

The program defines _GNU_SOURCE, PROGRAM and RMIG_IMPLEMENTATION before. No fabric is needed.
*/
#ifndef PROGRAM_H
#define PROGRAM_H

#include <argp.h>
#include <errno.h>
#include <inttypes.h>
#include <jansson.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

#include "../rmig.h"
#include "whole_file.h"

enum exit_code {
    EXIT_OK = 0,
    EXIT_USAGE = 2,
    EXIT_FILES = 3,
    EXIT_CONNECT = 4,
    EXIT_MIGRATION = 5,
    EXIT_HANDOVER = 6,
    EXIT_CANCELLED = 7
};

struct program {
    bool json, quiet;
    enum exit_code code;
    int status; // of rmig, if it failed
    char text[24576]; // why it failed: room for paths, one of them in quotes
};

static volatile sig_atomic_t cancelled;

/* Notes a failure; the first one stands, what follows is its consequence. */
__attribute__((format(printf, 3, 4))) static inline int fail(struct program *p, enum exit_code code, const char *format,
                                                             ...) {
    if (p->code != EXIT_OK)
        return -1;
    p->code = code;
    va_list ap;
    va_start(ap, format);
    vsnprintf(p->text, sizeof p->text, format, ap);
    va_end(ap);
    return -1;
}

static inline int fail_rmig(struct program *p, enum exit_code code, const struct rmig_error *err) {
    const char *hint = rmig_status_hint(err->status);
    if (err->status == RMIG_ERR_PARAM || err->status == RMIG_ERR_ARGUMENT)
        code = EXIT_USAGE;
    if (err->status == RMIG_ERR_HANDOVER)
        code = EXIT_HANDOVER;
    if (err->status == RMIG_ERR_CANCELLED)
        code = EXIT_CANCELLED;
    if (p->code == EXIT_OK)
        p->status = err->status;
    bool more = hint[0] != '\0' && err->status <= RMIG_SESSION_ERRORS;
    return fail(p, code, "%s%s%s%s", err->text, more ? " (" : "", more ? hint : "", more ? ")" : "");
}

/* An error of a snapshot file: file is its name. other: the exit status where the file is readable, but not right. */
static inline int fail_snapshot(struct program *p, enum exit_code other, const char *file,
                                const struct rmig_error *err) {
    enum exit_code code = err->status == RMIG_ERR_FILE ? EXIT_FILES : other;
    if (p->code == EXIT_OK)
        p->status = err->status;
    if (err->status == RMIG_ERR_PARAM)
        code = EXIT_USAGE;
    if (err->status == RMIG_ERR_CANCELLED)
        return fail(p, EXIT_CANCELLED, "cancelled");
    return fail(p, code, "%s: %s", file, err->text);
}

static inline void *checked(void *p) {
    if (p == NULL) {
        fputs(PROGRAM ": out of memory\n", stderr);
        exit(EXIT_MIGRATION);
    }
    return p;
}

static inline char *join(const char *dir, const char *name) {
    char *path = NULL;
    return (char *)checked(asprintf(&path, "%s/%s", dir, name) < 0 ? NULL : path);
}

static inline void on_cancel(int number) {
    (void)number;
    cancelled = 1;
}

/* Beyond a limit of the file size writes fail, as on a full disk. */
static inline void catch_signals(void (*on_bus_error)(int)) {
    struct sigaction cancel = {.sa_handler = on_cancel}, bus = {.sa_handler = on_bus_error};
    sigaction(SIGINT, &cancel, NULL);
    sigaction(SIGTERM, &cancel, NULL);
    whole_file_catch_signals(&cancel);
    sigaction(SIGBUS, &bus, NULL);
    signal(SIGPIPE, SIG_IGN);
    signal(SIGXFSZ, SIG_IGN);
}

/* Error texts may quote bytes of a peer, but JSON is UTF-8: what is not becomes '?'. */
static inline json_t *text_json(const char *text) {
    json_t *value = json_string(text);
    if (value != NULL)
        return value;
    char copy[sizeof((struct program *)NULL)->text];
    snprintf(copy, sizeof copy, "%s", text);
    for (char *p = copy; *p != '\0'; p++)
        *p = (unsigned char)*p >= 0x80 ? '?' : *p;
    return (json_t *)checked(json_string(copy));
}

/* null: a failure that is not rmig's. */
static inline json_t *status_json(const struct program *p) {
    bool own = p->code != EXIT_OK && p->status == RMIG_OK;
    return (json_t *)checked(own ? json_null() : json_string(rmig_status_name(p->status)));
}

/* Of a sink: a source was let go before it could move anything, and the next is waited for. */
static inline void tell_forgotten(bool json, const char *why) {
    fprintf(stderr, PROGRAM ": a source was let go, another may come: %s\n", why);
    if (!json)
        return;
    json_t *object = (json_t *)checked(json_object());
    json_object_set_new(object, "forgotten", text_json(why));
    json_dumpf(object, stdout, JSON_COMPACT);
    putchar('\n');
    fflush(stdout);
    json_decref(object);
}

// >>arguments

static inline uint64_t parse_count(const char *option, const char *arg, uint64_t max, struct argp_state *state) {
    char *end = NULL;
    errno = 0;
    unsigned long long value = strtoull(arg, &end, 10);
    if (arg[0] < '0' || arg[0] > '9' || *end != '\0' || errno != 0 || value < 1 || value > max)
        argp_error(state, "%s %s: a number from 1 to %" PRIu64 " is wanted", option, arg, max);
    return value;
}

static inline void parse_size(const char *option, const char *arg, uint64_t *size, struct argp_state *state) {
    struct rmig_error err;
    if (rmig_size_parse(arg, size, &err) < 0)
        argp_error(state, "%s %s: %s", option, arg, err.text);
}

static inline void parse_arguments(const struct argp *argp, void *input, int argc, char **argv) {
    static char version[64];
    snprintf(version, sizeof version, PROGRAM " %d.%d.%d", RMIG_VERSION_MAJOR, RMIG_VERSION_MINOR, RMIG_VERSION_PATCH);
    argp_program_version = version;
    argp_err_exit_status = EXIT_USAGE;
    argp_parse(argp, argc, argv, 0, NULL, input);
}

#endif
