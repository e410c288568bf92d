/*
qemu_common.h - what qemu_sink and qemu_source share: options, deadlines, the report

The program defines _GNU_SOURCE, PROGRAM, RMIG_IMPLEMENTATION before, and includes this first.
*/
#ifndef QEMU_COMMON_H
#define QEMU_COMMON_H

#include <poll.h>
#include <time.h>

#include "machine_dir.h"
#include "../rmig_mapped_ram.h"
#include "open_fabric.h"

#define SECOND ((uint64_t)1000000000)
#define TICK (SECOND / 5) // how often a signal or the deadline is noticed

#define EXIT_STATUS_DOC                                                                                                \
    "Exit status:\n"                                                                                                   \
    "  0  all was moved\n"                                                                                             \
    "  2  bad usage, or a bad parameter\n"                                                                             \
    "  3  a file cannot be read or written\n"                                                                          \
    "  4  no connection: fabric, listen, connect, or nobody came\n"                                                    \
    "  5  the migration failed\n"                                                                                      \
    "  6  the handover broke off, or what was moved got no name: see the message\n"                                    \
    "  7  cancelled by a signal (one that dumps core ends it at once)"

struct common {
    struct program p;
    const char *fabric_name, *provider;
    struct rmig_config cfg;
    struct rmig_mapped_options snapshot; // how a snapshot file is read or written
    const char *snapshot_option; // one of those was given
    uint64_t timeout_seconds;
    bool trace;

    struct machine machine;
    struct rmig_fabric *fabric;
    uint64_t started_ns, ended_ns, deadline;
};

/* A clock that there is before there is a fabric. */
static inline uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * SECOND + (uint64_t)t.tv_nsec;
}

static inline bool is_late(const struct common *c) { return c->deadline != 0 && now_ns() >= c->deadline; }

static inline int fail_late(struct common *c, bool begun, const char *waited_for) {
    return fail(&c->p, begun ? EXIT_MIGRATION : EXIT_CONNECT, "%s within the %" PRIu64 " s of --timeout", waited_for,
                c->timeout_seconds);
}

/* A signal or --timeout has ended what goes on. */
static inline int fail_stopped(struct common *c, bool begun, const char *waited_for) {
    return cancelled ? fail(&c->p, EXIT_CANCELLED, "cancelled") : fail_late(c, begun, waited_for);
}

// >>report

static inline json_t *stats_json(const struct rmig_stats *st) {
    const struct {
        const char *name;
        uint64_t value;
    } row[] = {
        {"bytes_written", st->bytes_written},
        {"bytes_zero", st->bytes_zero},
        {"rounds", st->rounds},
        {"writes_posted", st->writes_posted},
        {"registrations", st->registrations},
        {"bytes_registered", st->bytes_registered},
        {"registration_ns", st->registration_ns},
        {"control_sent", st->control_sent},
        {"control_received", st->control_received},
        {"stream_bytes", st->stream_bytes},
        {"setup_ns", st->setup_ns},
    };
    json_t *object = (json_t *)checked(json_object());
    for (size_t i = 0; i < sizeof row / sizeof row[0]; i++)
        json_object_set_new(object, row[i].name, json_integer((json_int_t)row[i].value));
    return object;
}

static inline void print_json(const struct common *c, const struct rmig_stats *st, uint64_t ns) {
    json_t *object = (json_t *)checked(json_object());
    json_object_set_new(object, "ok", json_boolean(c->p.code == EXIT_OK));
    json_object_set_new(object, "exit_code", json_integer(c->p.code));
    json_object_set_new(object, "status", status_json(&c->p));
    json_object_set_new(object, "error", c->p.code == EXIT_OK ? json_null() : text_json(c->p.text));
    json_object_set_new(object, "fabric", json_string(c->fabric == NULL ? "" : c->fabric->ops->name));
    json_object_set_new(object, "machine", text_json(c->machine.configuration.machine));
    json_object_set_new(object, "blocks", json_integer(c->machine.image_count));
    json_object_set_new(object, "ram_bytes", json_integer((json_int_t)c->machine.ram_bytes));
    json_object_set_new(object, "state_bytes", json_integer((json_int_t)c->machine.state_bytes));
    json_object_set_new(object, "total_ns", json_integer((json_int_t)ns));
    json_object_set_new(object, "stats", stats_json(st));
    json_dumpf(object, stdout, JSON_COMPACT);
    putchar('\n');
    json_decref(object);
}

static inline void report(struct common *c, const struct rmig_stats *st, const char *verb) {
    uint64_t ns = c->started_ns == 0 || c->ended_ns == 0 ? 0 : c->ended_ns - c->started_ns;
    char total[32];
    if (c->p.code != EXIT_OK)
        fprintf(stderr, PROGRAM ": %s\n", c->p.text);
    if (c->p.json)
        print_json(c, st, ns);
    else if (c->p.code == EXIT_OK && !c->p.quiet)
        printf("%s %s: %s of RAM in %u blocks, %" PRIu64 " bytes of device state, %.3f s\n", verb,
               c->machine.configuration.machine, rmig_size_format(c->machine.ram_bytes, total, sizeof total),
               c->machine.image_count, c->machine.state_bytes, (double)ns / 1e9);
    if (fflush(stdout) != 0 && c->p.code == EXIT_OK) {
        fprintf(stderr, PROGRAM ": cannot write to the standard output: %s\n", strerror(errno));
        c->p.code = EXIT_FILES;
    }
}

static inline void print_trace(void *user, const char *line) {
    (void)user;
    fprintf(stderr, "trace: %s\n", line);
}

// >>arguments

enum common_key {
    KEY_FABRIC = 'f',
    KEY_PROVIDER = 'p',
    KEY_QUIET = 'q',
    KEY_SET = 0x200,
    KEY_TIMEOUT,
    KEY_JSON,
    KEY_TRACE,
    KEY_THREADS,
    KEY_DIRECT,
    KEY_OFFSET
};

static const struct argp_option common_options[] = {
    {"fabric", KEY_FABRIC, "NAME", 0,
     "verbs, for a stock QEMU, or ofi, libfabric (default: verbs if built in): " OPEN_FABRIC_NAMES, 1},
    {"provider", KEY_PROVIDER, "NAME", 0, "libfabric's provider, or the verbs device (default: the first that can)", 1},
    {"set", KEY_SET, "NAME=VALUE", 0, "set a parameter of rmig, e.g. io-timeout=20s; any number", 1},
    {"timeout", KEY_TIMEOUT, "SECONDS", 0, "give up when it has not ended by then (default: io-timeout alone counts)",
     1},
    {"json", KEY_JSON, NULL, 0, "print the result and the statistics as JSON, one object a line", 1},
    {"quiet", KEY_QUIET, NULL, 0, "no summary", 1},
    {"trace", KEY_TRACE, NULL, 0, "print the events of the session on the standard error output", 1},
    {NULL, 0, NULL, 0, "Of a snapshot file:", 2},
    {"threads", KEY_THREADS, "N", 0, "read or write it by N threads, 1 to 64 (default 1)", 2},
    {"direct", KEY_DIRECT, NULL, 0, "direct I/O: past the page cache", 2},
    {"offset", KEY_OFFSET, "SIZE", 0, "where the stream begins in it, as in QEMU's file:PATH,offset= (default 0)", 2},
    {NULL, 0, NULL, 0, NULL, 0},
};

static inline void parse_set(struct common *c, const char *arg, struct argp_state *state) {
    struct rmig_error err;
    const char *equals = strchr(arg, '=');
    if (equals == NULL || equals == arg) {
        argp_error(state, "--set %s: NAME=VALUE is wanted", arg);
        return;
    }
    char *name = (char *)checked(strndup(arg, (size_t)(equals - arg)));
    int rc = rmig_set_param(&c->cfg, name, equals + 1, &err);
    free(name);
    if (rc < 0)
        argp_error(state, "--set %s: %s", arg, err.text);
    else if (rmig_extension(&c->cfg) != 0)
        argp_error(state, "--set %s: this program speaks protocol version 1, as QEMU does; extension must be off", arg);
}

static inline error_t parse_snapshot(int key, char *arg, struct common *c, struct argp_state *state) {
    switch (key) {
    case KEY_THREADS:
        c->snapshot_option = "--threads";
        c->snapshot.threads = (uint32_t)parse_count("--threads", arg, RMIG_MAPPED_THREADS_MAX, state);
        return 0;
    case KEY_DIRECT:
        c->snapshot_option = "--direct";
        c->snapshot.direct = true;
        return 0;
    case KEY_OFFSET:
        c->snapshot_option = "--offset";
        parse_size("--offset", arg, &c->snapshot.offset, state);
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

static inline error_t parse_common(int key, char *arg, struct argp_state *state) {
    struct common *c = (struct common *)state->input;
    switch (key) {
    case KEY_FABRIC:
        c->fabric_name = arg;
        return 0;
    case KEY_PROVIDER:
        c->provider = arg;
        return 0;
    case KEY_SET:
        parse_set(c, arg, state);
        return 0;
    case KEY_TIMEOUT:
        c->timeout_seconds = parse_count("--timeout", arg, 1000000, state);
        c->deadline = now_ns() + c->timeout_seconds * SECOND;
        return 0;
    case KEY_JSON:
        c->p.json = true;
        return 0;
    case KEY_QUIET:
        c->p.quiet = true;
        return 0;
    case KEY_TRACE:
        c->trace = true;
        c->cfg.trace = print_trace;
        return 0;
    default:
        return parse_snapshot(key, arg, c, state);
    }
}

static const struct argp common_argp = {common_options, parse_common, NULL, NULL, NULL, NULL, NULL};

/* A stock QEMU knows no extension, so none is offered: both ends speak version 1 whoever the peer is. */
static inline void without_extension(struct common *c) { rmig_set_extension(&c->cfg, 0, NULL); }

static inline int open_the_fabric(struct common *c) {
    struct rmig_error err;
    const char *name = c->fabric_name;
#ifndef WITHOUT_VERBS
    if (name == NULL)
        name = "verbs";
#endif
    c->fabric = open_fabric(name, c->provider, &err);
    if (c->fabric == NULL)
        return fail_rmig(&c->p, EXIT_CONNECT, &err);
    return 0;
}

#endif
