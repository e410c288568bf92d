/*
qemu_common.h - what qemu_sink and qemu_source share: options, errors, and the directory that holds a machine

    DIR/machine.json    what the stream said: machine, blocks in order, facts of the migration
    DIR/ram/NAME        the memory of block NAME, sparse. All but letters, digits, '_', '-' and '.' become %XX, and so
                        does a leading dot
    DIR/state           the state of the devices, as QEMU sent it

The program defines _GNU_SOURCE, PROGRAM, RMIG_IMPLEMENTATION before, and includes this first.
*/
#ifndef QEMU_COMMON_H
#define QEMU_COMMON_H

#include <argp.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <jansson.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "../rmig.h"
#include "../rmig_qemu.h"
#include "open_fabric.h"

#define SECOND ((uint64_t)1000000000)
#define TICK (SECOND / 5) // how often a signal or the deadline is noticed
#define FORMAT "rmig-qemu"
#define FORMAT_VERSION 1
#define MACHINE_FILE "machine.json"
#define STATE_FILE "state"
#define RAM_DIR "ram"

enum exit_code {
    EXIT_OK = 0,
    EXIT_USAGE = 2,
    EXIT_FILES = 3,
    EXIT_CONNECT = 4,
    EXIT_MIGRATION = 5,
    EXIT_HANDOVER = 6,
    EXIT_CANCELLED = 7
};

#define EXIT_STATUS_DOC                                                                                                \
    "Exit status:\n"                                                                                                   \
    "  0  all was moved\n"                                                                                             \
    "  2  bad usage, or a bad parameter\n"                                                                             \
    "  3  a file cannot be read or written\n"                                                                          \
    "  4  no connection: fabric, listen, connect, or nobody came\n"                                                    \
    "  5  the migration failed\n"                                                                                      \
    "  6  the handover broke off: only the other end knows whether the machine was moved\n"                            \
    "  7  cancelled by SIGINT or SIGTERM"

struct image { // a RAM block and its file
    struct rmig_qemu_block block;
    char *file; // in the directory: "ram/pc.ram"
    int fd;
    void *map;
};

struct machine {
    struct rmig_qemu_configuration configuration;
    uint32_t section_id; // of ram
    struct image *image;
    uint32_t image_count;
    uint64_t ram_bytes, state_bytes;
};

struct common {
    const char *fabric_name, *provider, *dir;
    struct rmig_config cfg;
    uint64_t timeout_seconds;
    bool json, quiet, trace;

    struct machine machine;
    struct rmig_fabric *fabric;
    uint64_t started_ns, ended_ns, deadline;
    enum exit_code code;
    int status; // of rmig, if it failed
    char text[2048]; // why it failed
};

static volatile sig_atomic_t cancelled;

// >>errors

/* Notes a failure; the first one stands, what follows is its consequence. */
__attribute__((format(printf, 3, 4))) static inline int fail(struct common *c, enum exit_code code, const char *format,
                                                             ...) {
    if (c->code != EXIT_OK)
        return -1;
    c->code = code;
    va_list ap;
    va_start(ap, format);
    vsnprintf(c->text, sizeof c->text, format, ap);
    va_end(ap);
    return -1;
}

static inline int fail_rmig(struct common *c, enum exit_code code, const struct rmig_error *err) {
    const char *hint = rmig_status_hint(err->status);
    if (err->status == RMIG_ERR_PARAM || err->status == RMIG_ERR_ARGUMENT)
        code = EXIT_USAGE;
    if (err->status == RMIG_ERR_HANDOVER)
        code = EXIT_HANDOVER;
    if (err->status == RMIG_ERR_CANCELLED)
        code = EXIT_CANCELLED;
    if (c->code == EXIT_OK)
        c->status = err->status;
    bool more = hint[0] != '\0' && strncmp(hint, "see the text", 12) != 0 && err->status <= RMIG_SESSION_ERRORS;
    return fail(c, code, "%s%s%s%s", err->text, more ? " (" : "", more ? hint : "", more ? ")" : "");
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

static inline void catch_signals(void (*on_bus_error)(int)) {
    struct sigaction cancel = {.sa_handler = on_cancel}, bus = {.sa_handler = on_bus_error};
    sigaction(SIGINT, &cancel, NULL);
    sigaction(SIGTERM, &cancel, NULL);
    sigaction(SIGBUS, &bus, NULL);
    signal(SIGPIPE, SIG_IGN);
}

static inline uint64_t now_ns(const struct common *c) { return c->fabric->ops->now(c->fabric); }

static inline bool is_late(const struct common *c) { return c->deadline != 0 && now_ns(c) >= c->deadline; }

static inline int fail_late(struct common *c, bool begun, const char *waited_for) {
    return fail(c, begun ? EXIT_MIGRATION : EXIT_CONNECT, "%s within the %" PRIu64 " s of --timeout", waited_for,
                c->timeout_seconds);
}

// >>images

static inline bool is_plain(unsigned char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_' || c == '-' ||
           c == '.';
}

/* The file of a block: its name comes from a peer and must neither lead out of the directory nor hide. Different names
   stay different. */
static inline char *file_of_block(const char *name) {
    size_t n = strlen(name);
    char *out = (char *)checked(malloc(sizeof RAM_DIR + 3 * n + 1)), *at = out + sprintf(out, "%s/", RAM_DIR);
    for (size_t i = 0; i < n; i++) {
        if (is_plain((unsigned char)name[i]) && !(name[i] == '.' && i == 0))
            *at++ = name[i];
        else
            at += sprintf(at, "%%%02X", (unsigned char)name[i]);
    }
    *at = '\0';
    return out;
}

static inline struct image *add_image(struct machine *m, const struct rmig_qemu_block *block) {
    m->image = (struct image *)checked(realloc(m->image, (m->image_count + 1) * sizeof *m->image));
    struct image *image = &m->image[m->image_count++];
    *image = (struct image){.block = *block, .fd = -1, .map = MAP_FAILED};
    image->file = file_of_block(block->name);
    m->ram_bytes += block->length;
    return image;
}

static inline void machine_free(struct machine *m) {
    for (uint32_t i = 0; i < m->image_count; i++) {
        struct image *image = &m->image[i];
        if (image->map != MAP_FAILED)
            munmap(image->map, image->block.length);
        if (image->fd >= 0)
            close(image->fd);
        free(image->file);
    }
    free(m->image);
    *m = (struct machine){.image = NULL};
}

/* Blocks follow each other in the guest's address space, each on a multiple of 1 GiB: any page size fits. */
static inline struct rmig_block_desc describe(const struct image *image, uint64_t *guest_offset) {
    struct rmig_block_desc desc = {.name = image->block.name,
                                   .host = image->map,
                                   .length = image->block.length,
                                   .guest_offset = *guest_offset,
                                   .backing = RMIG_BACKING_SHARED_FD,
                                   .fd = image->fd};
    *guest_offset += (image->block.length + RMIG_GIB - 1) / RMIG_GIB * RMIG_GIB;
    return desc;
}

// >>machine.json

static inline json_t *uuid_json(const struct rmig_qemu_configuration *c) {
    char text[37];
    size_t n = 0;
    for (size_t i = 0; i < 16; i++)
        n += (size_t)sprintf(text + n, i == 4 || i == 6 || i == 8 || i == 10 ? "-%02x" : "%02x", c->uuid[i]);
    return c->has_uuid ? json_string(text) : json_null();
}

static inline int hex_digit(char c) {
    static const char digits[] = "0123456789abcdef";
    const char *at = c == '\0' ? NULL : strchr(digits, c);
    return at == NULL ? -1 : (int)(at - digits);
}

static inline bool parse_uuid(const char *text, struct rmig_qemu_configuration *c) {
    for (size_t i = 0; i < 16; i++) {
        if ((i == 4 || i == 6 || i == 8 || i == 10) && *text++ != '-')
            return false;
        int high = hex_digit(text[0]), low = high < 0 ? -1 : hex_digit(text[1]);
        if (low < 0)
            return false;
        c->uuid[i] = (uint8_t)(high << 4 | low);
        text += 2;
    }
    c->has_uuid = true;
    return *text == '\0';
}

static inline json_t *capabilities_json(uint32_t capabilities) {
    json_t *array = (json_t *)checked(json_array());
    if ((capabilities & RMIG_QEMU_CAPABILITY_IGNORE_SHARED) != 0)
        json_array_append_new(array, json_string("x-ignore-shared"));
    return array;
}

static inline json_t *blocks_json(const struct machine *m) {
    json_t *array = (json_t *)checked(json_array());
    for (uint32_t i = 0; i < m->image_count; i++) {
        const struct image *image = &m->image[i];
        json_t *object = (json_t *)checked(json_object());
        json_object_set_new(object, "name", json_string(image->block.name));
        json_object_set_new(object, "file", json_string(image->file));
        json_object_set_new(object, "length", json_integer((json_int_t)image->block.length));
        if ((m->configuration.capabilities & RMIG_QEMU_CAPABILITY_IGNORE_SHARED) != 0)
            json_object_set_new(object, "guest_address", json_integer((json_int_t)image->block.guest_address));
        json_array_append_new(array, object);
    }
    return array;
}

static inline json_t *machine_json(const struct machine *m) {
    const struct rmig_qemu_configuration *c = &m->configuration;
    json_t *object = (json_t *)checked(json_object()), *state = (json_t *)checked(json_object());
    json_object_set_new(object, "format", json_string(FORMAT));
    json_object_set_new(object, "version", json_integer(FORMAT_VERSION));
    json_object_set_new(object, "machine", json_string(c->machine));
    json_object_set_new(object, "page_bits", c->page_bits == 0 ? json_null() : json_integer(c->page_bits));
    json_object_set_new(object, "capabilities", capabilities_json(c->capabilities));
    json_object_set_new(object, "uuid", uuid_json(c));
    json_object_set_new(object, "section_id", json_integer(m->section_id));
    json_object_set_new(object, "blocks", blocks_json(m));
    json_object_set_new(state, "file", json_string(STATE_FILE));
    json_object_set_new(state, "length", json_integer((json_int_t)m->state_bytes));
    json_object_set_new(object, "state", state);
    return object;
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

/* Error texts may quote bytes of a peer, but JSON is UTF-8: what is not becomes '?'. */
static inline json_t *text_json(const char *text) {
    json_t *value = json_string(text);
    if (value != NULL)
        return value;
    char copy[sizeof((struct common *)NULL)->text];
    snprintf(copy, sizeof copy, "%s", text);
    for (char *p = copy; *p != '\0'; p++)
        *p = (unsigned char)*p >= 0x80 ? '?' : *p;
    return (json_t *)checked(json_string(copy));
}

static inline void print_json(const struct common *c, const struct rmig_stats *st, uint64_t ns) {
    json_t *object = (json_t *)checked(json_object());
    json_object_set_new(object, "ok", json_boolean(c->code == EXIT_OK));
    json_object_set_new(object, "exit_code", json_integer(c->code));
    bool own = c->code != EXIT_OK && c->status == RMIG_OK; // a failure that is not rmig's
    json_object_set_new(object, "status", own ? json_null() : json_string(rmig_status_name(c->status)));
    json_object_set_new(object, "error", c->code == EXIT_OK ? json_null() : text_json(c->text));
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
    if (c->code != EXIT_OK)
        fprintf(stderr, PROGRAM ": %s\n", c->text);
    if (c->json)
        print_json(c, st, ns);
    else if (c->code == EXIT_OK && !c->quiet)
        printf("%s %s: %s of RAM in %u blocks, %" PRIu64 " bytes of device state, %.3f s\n", verb,
               c->machine.configuration.machine, rmig_size_format(c->machine.ram_bytes, total, sizeof total),
               c->machine.image_count, c->machine.state_bytes, (double)ns / 1e9);
    if (fflush(stdout) != 0 && c->code == EXIT_OK) {
        fprintf(stderr, PROGRAM ": cannot write to the standard output: %s\n", strerror(errno));
        c->code = EXIT_FILES;
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
    KEY_TRACE
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
    {NULL, 0, NULL, 0, NULL, 0},
};

static inline uint64_t parse_count(const char *option, const char *arg, uint64_t max, struct argp_state *state) {
    char *end = NULL;
    errno = 0;
    unsigned long long value = strtoull(arg, &end, 10);
    if (arg[0] < '0' || arg[0] > '9' || *end != '\0' || errno != 0 || value < 1 || value > max)
        argp_error(state, "%s %s: a number from 1 to %" PRIu64 " is wanted", option, arg, max);
    return value;
}

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
        return 0;
    case KEY_JSON:
        c->json = true;
        return 0;
    case KEY_QUIET:
        c->quiet = true;
        return 0;
    case KEY_TRACE:
        c->trace = true;
        c->cfg.trace = print_trace;
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

static const struct argp common_argp = {common_options, parse_common, NULL, NULL, NULL, NULL, NULL};

/* A stock QEMU knows no extension, so none is offered: both ends speak version 1 whoever the peer is. */
static inline void parse_arguments(struct common *c, const struct argp *argp, void *input, int argc, char **argv) {
    static char version[64];
    snprintf(version, sizeof version, PROGRAM " %d.%d.%d", RMIG_VERSION_MAJOR, RMIG_VERSION_MINOR, RMIG_VERSION_PATCH);
    argp_program_version = version;
    argp_err_exit_status = EXIT_USAGE;
    rmig_set_extension(&c->cfg, 0, NULL);
    argp_parse(argp, argc, argv, 0, NULL, input);
}

static inline int open_the_fabric(struct common *c) {
    struct rmig_error err;
    const char *name = c->fabric_name;
#ifndef WITHOUT_VERBS
    if (name == NULL)
        name = "verbs";
#endif
    c->fabric = open_fabric(name, c->provider, &err);
    if (c->fabric == NULL)
        return fail_rmig(c, EXIT_CONNECT, &err);
    if (c->timeout_seconds > 0)
        c->deadline = now_ns(c) + c->timeout_seconds * SECOND;
    return 0;
}

#endif
