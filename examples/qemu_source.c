/*
qemu_source - migrates the directory that qemu_sink made into a stock QEMU

    qemu-system-x86_64 -machine pc-q35-7.2 -m 64M ... -incoming rdma:10.0.0.2:4444
    qemu_source DIR 10.0.0.2:4444

The QEMU must be of the same machine type and have the same devices as the one that DIR came from: the state of the
devices is passed on unread. One round moves the RAM; see rmig_qemu.h for the stream around it, and qemu_common.h for
what is in DIR, which stays as it is.
*/
#define _GNU_SOURCE
#define PROGRAM "qemu_source"
#define RMIG_IMPLEMENTATION
#include "qemu_common.h"

#define PIECE 32768

struct run {
    struct common c;
    const char *address;
    char *state_path;
    int state_fd;
    uint8_t *prologue, *epilogue; // of the stream: up to the hook word, and behind it up to the device state
    size_t prologue_size, epilogue_size;
    struct rmig_source *source;
    bool connected;
};

// >>the directory

/* What is wrong with machine.json. */
__attribute__((format(printf, 2, 3))) static int bad(struct run *r, const char *format, ...) {
    char text[300];
    va_list ap;
    va_start(ap, format);
    vsnprintf(text, sizeof text, format, ap);
    va_end(ap);
    return fail(&r->c, EXIT_FILES, "%s/" MACHINE_FILE ": %s", r->c.dir, text);
}

static const char *get_text(struct run *r, const json_t *object, const char *key) {
    const char *text = json_string_value(json_object_get(object, key));
    if (text == NULL || text[0] == '\0')
        bad(r, "\"%s\" is missing, or no text", key);
    return text == NULL ? "" : text;
}

static uint64_t get_number(struct run *r, const json_t *object, const char *key, uint64_t min, uint64_t max) {
    const json_t *value = json_object_get(object, key);
    json_int_t number = json_integer_value(value);
    if (!json_is_integer(value) || number < 0 || (uint64_t)number < min || (uint64_t)number > max)
        bad(r, "\"%s\" is missing, or no number from %" PRIu64 " to %" PRIu64, key, min, max);
    return (uint64_t)number;
}

static void copy_name(struct run *r, char *out, const char *key, const char *text) {
    if (strlen(text) > RMIG_NAME_MAX)
        bad(r, "\"%s\" has %zu bytes; at most %d are allowed", key, strlen(text), RMIG_NAME_MAX);
    snprintf(out, RMIG_NAME_MAX + 1, "%s", text);
}

static void read_capabilities(struct run *r, const json_t *object) {
    const json_t *array = json_object_get(object, "capabilities");
    const json_t *value;
    size_t i;
    if (!json_is_array(array))
        bad(r, "\"capabilities\" is missing, or no array");
    json_array_foreach(array, i, value) {
        const char *name = json_string_value(value);
        if (name == NULL || strcmp(name, "x-ignore-shared") != 0)
            bad(r, "capability \"%s\" is not known", name == NULL ? "" : name);
        r->c.machine.configuration.capabilities |= RMIG_QEMU_CAPABILITY_IGNORE_SHARED;
    }
}

static void read_configuration(struct run *r, const json_t *object) {
    struct rmig_qemu_configuration *c = &r->c.machine.configuration;
    const json_t *uuid = json_object_get(object, "uuid");
    copy_name(r, c->machine, "machine", get_text(r, object, "machine"));
    if (!json_is_null(json_object_get(object, "page_bits")))
        c->page_bits = (uint32_t)get_number(r, object, "page_bits", 10, 30);
    read_capabilities(r, object);
    if (!json_is_null(uuid) && (!json_is_string(uuid) || !parse_uuid(json_string_value(uuid), c)))
        bad(r, "\"uuid\" is missing, or neither null nor 32 lower-case hexadecimal digits in groups of 8-4-4-4-12");
    r->c.machine.section_id = (uint32_t)get_number(r, object, "section_id", 0, UINT32_MAX);
}

static void read_block(struct run *r, const json_t *object) {
    struct rmig_qemu_block block = {.name = ""};
    copy_name(r, block.name, "name", get_text(r, object, "name"));
    block.length = get_number(r, object, "length", 1, INT64_MAX);
    if ((r->c.machine.configuration.capabilities & RMIG_QEMU_CAPABILITY_IGNORE_SHARED) != 0)
        block.guest_address = get_number(r, object, "guest_address", 0, INT64_MAX);
    if (r->c.code != EXIT_OK)
        return;
    struct image *image = add_image(&r->c.machine, &block);
    const char *file = get_text(r, object, "file");
    free(image->file);
    image->file = checked(strdup(file));
}

static void read_blocks(struct run *r, const json_t *object) {
    const json_t *array = json_object_get(object, "blocks");
    size_t n = json_array_size(array);
    if (n == 0 || n > RMIG_QEMU_BLOCKS_MAX)
        bad(r, "\"blocks\" is missing, or no array of 1 to %d", RMIG_QEMU_BLOCKS_MAX);
    for (size_t i = 0; i < n && r->c.code == EXIT_OK; i++)
        read_block(r, json_array_get(array, i));
    if (r->c.code == EXIT_OK && r->c.machine.ram_bytes % 1024 != 0)
        bad(r, "the blocks have %" PRIu64 " bytes in all, which is no multiple of 1024", r->c.machine.ram_bytes);
}

static void read_all(struct run *r, const json_t *object) {
    const char *format = json_string_value(json_object_get(object, "format"));
    const json_t *version = json_object_get(object, "version");
    if (format == NULL || strcmp(format, FORMAT) != 0) {
        bad(r, "\"format\" is not \"" FORMAT "\": this is no directory of qemu_sink");
        return;
    }
    if (json_integer_value(version) != FORMAT_VERSION) {
        bad(r, "\"version\" is %" JSON_INTEGER_FORMAT "; this program reads version %d", json_integer_value(version),
            FORMAT_VERSION);
        return;
    }
    const json_t *state = json_object_get(object, "state");
    read_configuration(r, object);
    read_blocks(r, object);
    r->c.machine.state_bytes = get_number(r, state, "length", 1, INT64_MAX);
    r->state_path = join(r->c.dir, get_text(r, state, "file"));
}

static int read_machine(struct run *r) {
    json_error_t error;
    char *path = join(r->c.dir, MACHINE_FILE);
    json_t *object = json_load_file(path, JSON_REJECT_DUPLICATES, &error);
    free(path);
    if (object == NULL)
        return bad(r, "line %d: %s", error.line, error.text);
    read_all(r, object);
    json_decref(object);
    return r->c.code == EXIT_OK ? 0 : -1;
}

static int check_file(struct run *r, int fd, const char *path, uint64_t length) {
    struct stat st;
    if (fd < 0 || fstat(fd, &st) < 0)
        return fail(&r->c, EXIT_FILES, "cannot read %s: %s", path, strerror(errno));
    if (!S_ISREG(st.st_mode))
        return fail(&r->c, EXIT_FILES, "%s is not a regular file", path);
    if ((uint64_t)st.st_size != length)
        return fail(&r->c, EXIT_FILES, "%s has %lld bytes; " MACHINE_FILE " says %" PRIu64, path, (long long)st.st_size,
                    length);
    return 0;
}

/* Opened for writing where that is allowed, though nothing is written: some adapters cannot register memory that is
   mapped read-only. */
static int open_image(struct run *r, struct image *image) {
    char *path = join(r->c.dir, image->file);
    int protection = PROT_READ | PROT_WRITE;
    image->fd = open(path, O_RDWR | O_CLOEXEC);
    if (image->fd < 0 && errno != ENOENT && errno != EISDIR) {
        protection = PROT_READ;
        image->fd = open(path, O_RDONLY | O_CLOEXEC);
    }
    int rc = check_file(r, image->fd, path, image->block.length);
    if (rc == 0) {
        image->map = mmap(NULL, image->block.length, protection, MAP_SHARED, image->fd, 0);
        if (image->map == MAP_FAILED)
            rc = fail(&r->c, EXIT_FILES, "cannot map the %" PRIu64 " bytes of %s: %s", image->block.length, path,
                      strerror(errno));
    }
    free(path);
    return rc;
}

/* The file was cut under us. */
static void on_bus_error(int number) {
    static const char text[] = PROGRAM ": a mapped file cannot be read: it was cut\n";
    (void)number;
    _exit(write(STDERR_FILENO, text, sizeof text - 1) < 0 ? EXIT_MIGRATION : EXIT_FILES);
}

// >>the stream

static size_t encoded(struct run *r, int n) {
    if (n < 0)
        bad(r, "it cannot be written as a stream: %s", rmig_status_text(n));
    return n < 0 ? 0 : (size_t)n;
}

/* Up to the hook word, which must be the last of its message. */
static int make_prologue(struct run *r) {
    const struct machine *m = &r->c.machine;
    size_t cap = RMIG_QEMU_START_MAX + (size_t)3 * RMIG_QEMU_SMALL_MAX + (size_t)m->image_count * RMIG_QEMU_BLOCK_MAX,
           n = 0;
    uint8_t *out = r->prologue = checked(malloc(cap));
    n += encoded(r, rmig_qemu_encode_start(out, cap, &m->configuration));
    n += encoded(r, rmig_qemu_encode_section(out + n, cap - n, RMIG_QEMU_SECTION_START, m->section_id));
    n += encoded(r, rmig_qemu_encode_mem_size(out + n, cap - n, m->ram_bytes));
    for (uint32_t i = 0; i < m->image_count; i++)
        n += encoded(r, rmig_qemu_encode_block(out + n, cap - n, &m->image[i].block, m->configuration.capabilities));
    n += encoded(r, rmig_qemu_encode_word(out + n, cap - n, RMIG_QEMU_WORD_HOOK));
    r->prologue_size = n;
    return r->c.code == EXIT_OK ? 0 : -1;
}

/* The rest of START, and an END in which nothing is left to move. */
static int make_epilogue(struct run *r) {
    uint32_t id = r->c.machine.section_id;
    size_t cap = (size_t)5 * RMIG_QEMU_SMALL_MAX, n = 0;
    uint8_t *out = r->epilogue = checked(malloc(cap));
    n += encoded(r, rmig_qemu_encode_word(out, cap, RMIG_QEMU_WORD_EOS));
    n += encoded(r, rmig_qemu_encode_footer(out + n, cap - n, id));
    n += encoded(r, rmig_qemu_encode_section(out + n, cap - n, RMIG_QEMU_SECTION_END, id));
    n += encoded(r, rmig_qemu_encode_word(out + n, cap - n, RMIG_QEMU_WORD_EOS));
    n += encoded(r, rmig_qemu_encode_footer(out + n, cap - n, id));
    r->epilogue_size = n;
    return r->c.code == EXIT_OK ? 0 : -1;
}

static int read_through(struct run *r, struct rmig_qemu_reader *reader, const uint8_t *p, size_t n) {
    struct rmig_qemu_event ev;
    do {
        int64_t used = rmig_qemu_reader_feed(reader, p, n, &ev);
        if (used < 0)
            return fail(&r->c, EXIT_FILES, "%s: its stream would be malformed: %s", r->c.dir, reader->error.text);
        p += used;
        n -= (size_t)used;
    } while (ev.type != RMIG_QEV_NONE);
    return 0;
}

/* Reads the stream as the other end will: state that was cut would leave a QEMU waiting. */
static int check_stream(struct run *r) {
    struct rmig_qemu_reader reader;
    struct rmig_qemu_event ev;
    uint8_t piece[PIECE];
    ssize_t n;
    rmig_qemu_reader_init(&reader, 0);
    if (read_through(r, &reader, r->prologue, r->prologue_size) < 0)
        return -1;
    rmig_qemu_reader_end_message(&reader, &ev);
    if (read_through(r, &reader, r->epilogue, r->epilogue_size) < 0)
        return -1;
    while ((n = read(r->state_fd, piece, sizeof piece)) > 0)
        if (read_through(r, &reader, piece, (size_t)n) < 0)
            return -1;
    rmig_qemu_reader_end_message(&reader, &ev);
    if (n < 0 || lseek(r->state_fd, 0, SEEK_SET) < 0)
        return fail(&r->c, EXIT_FILES, "cannot read %s: %s", r->state_path, strerror(errno));
    if (ev.type != RMIG_QEV_END)
        return fail(&r->c, EXIT_FILES, "%s is not whole: it does not end with QEMU's description of the devices",
                    r->state_path);
    return 0;
}

static int open_inputs(struct run *r) {
    struct machine *m = &r->c.machine;
    if (read_machine(r) < 0)
        return -1;
    for (uint32_t i = 0; i < m->image_count; i++)
        if (open_image(r, &m->image[i]) < 0)
            return -1;
    r->state_fd = open(r->state_path, O_RDONLY | O_CLOEXEC);
    if (check_file(r, r->state_fd, r->state_path, m->state_bytes) < 0)
        return -1;
    return make_prologue(r) < 0 || make_epilogue(r) < 0 ? -1 : check_stream(r);
}

// >>the session

static int fail_source(struct run *r) {
    struct rmig_error err = *rmig_source_error(r->source);
    if (r->connected)
        return fail_rmig(&r->c, EXIT_MIGRATION, &err);
    if (strstr(err.text, r->address) == NULL) // to whom, is what a user wants to know first
        rmig_fail(&err, err.status, err.provider_code, "%s: %s", r->address, rmig_source_error(r->source)->text);
    return fail_rmig(&r->c, EXIT_CONNECT, &err);
}

static void nap(struct run *r) {
    struct rmig_fd fds[4];
    struct pollfd polls[4];
    int n = rmig_source_fds(r->source, fds, 4);
    uint64_t deadline = rmig_source_next_deadline(r->source), now = now_ns(&r->c);
    uint64_t sleep_ns = deadline > now ? deadline - now : 0;
    uint64_t limit = n <= 0 ? SECOND / 1000 : TICK; // a fabric without descriptors is polled
    if (sleep_ns > limit)
        sleep_ns = limit;
    for (int i = 0; i < n; i++)
        polls[i] = (struct pollfd){.fd = fds[i].fd, .events = fds[i].write ? POLLIN | POLLOUT : POLLIN};
    struct timespec ts = {.tv_sec = 0, .tv_nsec = (long)sleep_ns};
    ppoll(polls, n <= 0 ? 0 : (nfds_t)n, &ts, NULL);
}

static bool must_stop(const struct run *r) { return cancelled || is_late(&r->c); }

/* Only the session knows whether the last bytes have left: then it is the handover that broke off. */
static int stop(struct run *r) {
    rmig_source_cancel(r->source);
    int rc = rmig_source_process(r->source);
    if (rc == RMIG_ERR_CANCELLED && !cancelled)
        return fail_late(&r->c, r->connected, "the migration did not end");
    return rc < 0 ? fail_source(r) : rc;
}

/* Drives the operation that a _start call began to its end. Once it is done no deadline undoes it. */
static int drive(struct run *r, int started) {
    if (started < 0)
        return fail_source(r);
    for (;;) {
        int rc = rmig_source_process(r->source);
        if (rc < 0)
            return fail_source(r);
        if (rc == RMIG_OK)
            return 0;
        if (must_stop(r))
            return stop(r);
        nap(r);
    }
}

static int put(struct run *r, const uint8_t *p, size_t n) {
    while (n > 0) {
        int64_t taken = rmig_source_put_some(r->source, p, n);
        if (taken < 0)
            return fail_source(r);
        p += taken;
        n -= (size_t)taken;
        if (n > 0 && rmig_source_process(r->source) < 0)
            return fail_source(r);
        if (must_stop(r))
            return stop(r);
        if (n > 0 && taken == 0)
            nap(r);
    }
    return 0;
}

static int open_source(struct run *r) {
    struct rmig_error err;
    uint64_t guest_offset = 0;
    if (rmig_source_open(r->c.fabric, &r->c.cfg, &r->source, &err) < 0)
        return fail_rmig(&r->c, EXIT_CONNECT, &err);
    for (uint32_t i = 0; i < r->c.machine.image_count; i++) {
        uint32_t index;
        struct rmig_block_desc desc = describe(&r->c.machine.image[i], &guest_offset);
        if (rmig_source_add_block(r->source, &desc, &index) < 0)
            return fail_source(r);
    }
    return 0;
}

static int send_ram(struct run *r) {
    if (put(r, r->prologue, r->prologue_size) < 0 || drive(r, rmig_source_flush_start(r->source)) < 0)
        return -1;
    if (rmig_source_begin_round(r->source) < 0)
        return fail_source(r);
    for (uint32_t i = 0; i < r->c.machine.image_count; i++)
        if (rmig_source_save_range(r->source, i, 0, r->c.machine.image[i].block.length) < 0)
            return fail_source(r);
    return drive(r, rmig_source_end_round_start(r->source));
}

/* The last bytes are left to finish, which knows what their loss means. */
static int send_state(struct run *r) {
    uint8_t piece[PIECE];
    ssize_t n;
    if (put(r, r->epilogue, r->epilogue_size) < 0)
        return -1;
    while ((n = read(r->state_fd, piece, sizeof piece)) > 0)
        if (put(r, piece, (size_t)n) < 0)
            return -1;
    if (n < 0)
        return fail(&r->c, EXIT_FILES, "cannot read %s: %s", r->state_path, strerror(errno));
    return drive(r, rmig_source_finish_start(r->source));
}

static int migrate(struct run *r) {
    if (open_inputs(r) < 0 || open_the_fabric(&r->c) < 0 || open_source(r) < 0)
        return -1;
    r->c.started_ns = now_ns(&r->c);
    if (drive(r, rmig_source_connect_start(r->source, r->address)) < 0)
        return -1;
    r->connected = true;
    if (send_ram(r) < 0 || send_state(r) < 0)
        return -1;
    r->c.ended_ns = now_ns(&r->c);
    return 0;
}

// >>arguments and main

static const char doc[] =
    "Migrates DIR, which qemu_sink made, into a stock QEMU that was started with the same machine "
    "type and devices and -incoming rdma:HOST:PORT.\v" EXIT_STATUS_DOC;

static error_t parse_option(int key, char *arg, struct argp_state *state) {
    struct run *r = state->input;
    switch (key) {
    case ARGP_KEY_INIT:
        state->child_inputs[0] = &r->c;
        return 0;
    case ARGP_KEY_ARG:
        if (r->c.dir == NULL)
            r->c.dir = arg;
        else if (r->address == NULL)
            r->address = arg;
        else
            argp_error(state, "unexpected argument %s", arg);
        return 0;
    case ARGP_KEY_END:
        if (r->address == NULL)
            argp_error(state, "%s is wanted", r->c.dir == NULL ? "DIR HOST:PORT" : "HOST:PORT");
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

static void clean_up(struct run *r) {
    rmig_source_close(r->source);
    rmig_fabric_close(r->c.fabric);
    machine_free(&r->c.machine);
    if (r->state_fd >= 0)
        close(r->state_fd);
    free(r->state_path);
    free(r->prologue);
    free(r->epilogue);
}

int main(int argc, char **argv) {
    static struct run run;
    static const struct argp_child children[] = {{&common_argp, 0, NULL, 0}, {NULL, 0, NULL, 0}};
    static const struct argp argp = {NULL, parse_option, "DIR HOST:PORT", doc, children, NULL, NULL};
    struct rmig_stats st = {0};
    run.state_fd = -1;
    parse_arguments(&run.c, &argp, &run, argc, argv);
    catch_signals(on_bus_error);
    migrate(&run);
    if (run.source != NULL)
        rmig_source_stats(run.source, &st);
    report(&run.c, &st, "sent");
    clean_up(&run);
    return (int)run.c.code;
}
