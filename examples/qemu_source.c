/*
qemu_source - migrates a machine into a stock QEMU: a directory that qemu_sink made, or a snapshot file

    qemu-system-x86_64 -machine pc-q35-7.2 -m 64M ... -incoming rdma:10.0.0.2:4444
    qemu_source DIR 10.0.0.2:4444
    qemu_source FILE 10.0.0.2:4444

The QEMU must be of the same machine type and have the same devices as the one that the machine came from: the state of
the devices is passed on unread. One round moves the RAM; see rmig_qemu.h for the stream around it, and machine_dir.h
for what is in DIR, which stays as it is. FILE is in QEMU's mapped-ram format, of qemu_sink --snapshot, mapped_ram, or a
QEMU; it is loaded into memory first.
*/
#define _GNU_SOURCE
#define PROGRAM "qemu_source"
#define RMIG_IMPLEMENTATION
#include "qemu_common.h"

#define PIECE 32768

struct run {
    struct common c;
    const char *from, *address;
    char *state_path; // NULL: in the snapshot file
    int state_fd, snapshot_fd;
    struct rmig_mapped_reader *reader; // NULL: of a directory, or loaded
    uint8_t *prologue, *epilogue; // of the stream: up to the hook word, and behind it up to the device state
    size_t prologue_size, epilogue_size;
    struct rmig_source *source;
    bool connected;
};

static const char *state_of(const struct run *r) { return r->state_path != NULL ? r->state_path : r->from; }

static bool must_stop(const struct run *r) { return cancelled || is_late(&r->c); }

/* The file was cut under us. */
static void on_bus_error(int number) {
    static const char text[] = PROGRAM ": a mapped file cannot be read: it was cut\n";
    (void)number;
    _exit(write(STDERR_FILENO, text, sizeof text - 1) < 0 ? EXIT_MIGRATION : EXIT_FILES);
}

// >>a snapshot file

/* By a signal or --timeout. */
static int fail_reading(struct run *r) {
    if (cancelled)
        return fail(&r->c.p, EXIT_CANCELLED, "cancelled");
    return fail(&r->c.p, EXIT_FILES, "%s was not loaded within the %" PRIu64 " s of --timeout", r->from,
                r->c.timeout_seconds);
}

static int fail_file(struct run *r, const struct rmig_error *err) {
    return err->status == RMIG_ERR_CANCELLED ? fail_reading(r) : fail_snapshot(&r->c.p, EXIT_FILES, r->from, err);
}

static int fail_reader(struct run *r) { return fail_file(r, rmig_mapped_reader_error(r->reader)); }

static int on_progress(void *user, const struct rmig_stats *stats) {
    (void)stats;
    return must_stop((const struct run *)user);
}

/* The state of the devices, into a file of memory: it is read twice. */
static int copy_state(struct run *r) {
    uint8_t piece[PIECE];
    int64_t n;
    r->state_fd = memfd_create("device-state", MFD_CLOEXEC);
    if (r->state_fd < 0)
        return fail(&r->c.p, EXIT_FILES, "no memory for the state of the devices: %s", strerror(errno));
    while ((n = rmig_mapped_reader_get(r->reader, piece, sizeof piece)) > 0) {
        if (must_stop(r))
            return fail_reading(r);
        if (write_all(r->state_fd, piece, (size_t)n) < 0)
            return fail(&r->c.p, EXIT_FILES, "no memory for the state of the devices: %s", strerror(errno));
    }
    if (n < 0)
        return fail_reader(r);
    return lseek(r->state_fd, 0, SEEK_SET) == 0
               ? 0
               : fail(&r->c.p, EXIT_FILES, "the state of the devices in memory: %s", strerror(errno));
}

static int add_blocks(struct run *r) {
    const struct rmig_mapped_block *b;
    uint32_t n = rmig_mapped_reader_blocks(r->reader, &b);
    for (uint32_t i = 0; i < n; i++) {
        struct rmig_qemu_block block = {.length = b[i].length, .guest_address = b[i].guest_address};
        snprintf(block.name, sizeof block.name, "%s", b[i].name);
        struct image *image = add_image(&r->c.machine, &block);
        if (b[i].ignored)
            return fail(&r->c.p, EXIT_FILES, "%s: block %s is shared (x-ignore-shared): its memory is not in the file",
                        r->from, image->file);
    }
    return 0;
}

/* All but the memory, which is loaded when nothing else can be wrong. */
static int open_snapshot(struct run *r) {
    struct rmig_error err;
    struct machine *m = &r->c.machine;
    r->c.snapshot.memory_is_zero = true;
    r->c.snapshot.progress = on_progress;
    r->c.snapshot.progress_user = r;
    r->snapshot_fd = open(r->from, O_RDONLY | O_CLOEXEC | O_NONBLOCK); // a pipe is refused, not waited for
    if (r->snapshot_fd < 0)
        return fail(&r->c.p, EXIT_FILES, "cannot read %s: %s", r->from, strerror(errno));
    if (whole_file_lock_to_read(r->snapshot_fd, r->from, &err) < 0)
        return fail(&r->c.p, EXIT_FILES, "%s", err.text);
    if (rmig_mapped_reader_open(r->snapshot_fd, &r->c.snapshot, &r->reader, &err) < 0)
        return fail_file(r, &err);
    const struct rmig_mapped_machine *from = rmig_mapped_reader_machine(r->reader);
    m->configuration = from->configuration;
    m->configuration.capabilities &= ~RMIG_QEMU_CAPABILITY_MAPPED_RAM; // of files alone
    m->section_id = from->section_id;
    m->switchover_start = from->switchover_start;
    m->state_bytes = rmig_mapped_reader_state_size(r->reader);
    return add_blocks(r) < 0 ? -1 : copy_state(r);
}

static int load_snapshot(struct run *r) {
    uint64_t guest_offset = 0;
    for (uint32_t i = 0; i < r->c.machine.image_count; i++) {
        struct image *image = &r->c.machine.image[i];
        if (make_memory_image(&r->c.p, image) < 0)
            return -1;
        struct rmig_block_desc desc = describe(image, &guest_offset);
        if (rmig_mapped_reader_add_block(r->reader, &desc) < 0)
            return fail_reader(r);
    }
    if (rmig_mapped_reader_load(r->reader) < 0)
        return fail_reader(r);
    rmig_mapped_reader_close(r->reader);
    r->reader = NULL;
    return 0;
}

// >>the stream

static size_t encoded(struct run *r, int n) {
    if (n < 0)
        fail(&r->c.p, EXIT_FILES, "%s cannot be written as a stream: %s", r->from, rmig_status_text(n));
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
    return r->c.p.code == EXIT_OK ? 0 : -1;
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
    return r->c.p.code == EXIT_OK ? 0 : -1;
}

static int read_through(struct run *r, struct rmig_qemu_reader *reader, const uint8_t *p, size_t n) {
    struct rmig_qemu_event ev;
    do {
        int64_t used = rmig_qemu_reader_feed(reader, p, n, &ev);
        if (used < 0)
            return fail(&r->c.p, EXIT_FILES, "%s: its stream would be malformed: %s", r->from, reader->error.text);
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
    while ((n = read(r->state_fd, piece, sizeof piece)) > 0) {
        if (must_stop(r))
            return fail_reading(r);
        if (read_through(r, &reader, piece, (size_t)n) < 0)
            return -1;
    }
    rmig_qemu_reader_end_message(&reader, &ev);
    if (n < 0 || lseek(r->state_fd, 0, SEEK_SET) < 0)
        return fail(&r->c.p, EXIT_FILES, "cannot read %s: %s", state_of(r), strerror(errno));
    if (ev.type != RMIG_QEV_END)
        return fail(&r->c.p, EXIT_FILES, "%s is not whole: it does not end with QEMU's description of the devices",
                    state_of(r));
    return 0;
}

static int open_directory(struct run *r) {
    struct machine_dir dir = {.program = &r->c.p, .machine = &r->c.machine, .path = r->from};
    r->state_path = join(r->from, STATE_FILE);
    return open_machine_dir(&dir, true, &r->state_fd);
}

static int open_inputs(struct run *r) {
    struct stat st;
    if (stat(r->from, &st) < 0)
        return fail(&r->c.p, EXIT_FILES, "cannot read %s: %s", r->from, strerror(errno));
    bool directory = S_ISDIR(st.st_mode);
    if (directory && r->c.snapshot_option != NULL)
        return fail(&r->c.p, EXIT_USAGE, "%s is for snapshot files; %s is a directory", r->c.snapshot_option, r->from);
    if ((directory ? open_directory(r) : open_snapshot(r)) < 0)
        return -1;
    return make_prologue(r) < 0 || make_epilogue(r) < 0 ? -1 : check_stream(r);
}

// >>the session

static int fail_source(struct run *r) {
    struct rmig_error err = *rmig_source_error(r->source);
    if (r->connected)
        return fail_rmig(&r->c.p, EXIT_MIGRATION, &err);
    if (strstr(err.text, r->address) == NULL) // to whom, is what a user wants to know first
        rmig_fail(&err, err.status, err.provider_code, "%s: %s", r->address, rmig_source_error(r->source)->text);
    return fail_rmig(&r->c.p, EXIT_CONNECT, &err);
}

static void nap(struct run *r) {
    struct rmig_fd fds[4];
    struct pollfd polls[4];
    int n = rmig_source_fds(r->source, fds, 4);
    uint64_t deadline = rmig_source_next_deadline(r->source), now = r->c.fabric->ops->now(r->c.fabric);
    uint64_t sleep_ns = deadline > now ? deadline - now : 0;
    uint64_t limit = n <= 0 ? SECOND / 1000 : TICK; // a fabric without descriptors is polled
    if (sleep_ns > limit)
        sleep_ns = limit;
    for (int i = 0; i < n; i++)
        polls[i] = (struct pollfd){.fd = fds[i].fd, .events = fds[i].write ? POLLIN | POLLOUT : POLLIN};
    struct timespec ts = {.tv_sec = 0, .tv_nsec = (long)sleep_ns};
    ppoll(polls, n <= 0 ? 0 : (nfds_t)n, &ts, NULL);
}

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
        return fail_rmig(&r->c.p, EXIT_CONNECT, &err);
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
        return fail(&r->c.p, EXIT_FILES, "cannot read %s: %s", state_of(r), strerror(errno));
    return drive(r, rmig_source_finish_start(r->source));
}

static int migrate(struct run *r) {
    if (open_inputs(r) < 0 || open_the_fabric(&r->c) < 0 || (r->reader != NULL && load_snapshot(r) < 0) ||
        open_source(r) < 0)
        return -1;
    r->c.started_ns = now_ns();
    if (drive(r, rmig_source_connect_start(r->source, r->address)) < 0)
        return -1;
    r->connected = true;
    if (send_ram(r) < 0 || send_state(r) < 0)
        return -1;
    r->c.ended_ns = now_ns();
    return 0;
}

// >>arguments and main

static const char doc[] =
    "Migrates a machine into a stock QEMU that was started with the same machine type and devices and "
    "-incoming rdma:HOST:PORT. The machine is DIR, which qemu_sink made, or FILE, a snapshot in QEMU's "
    "mapped-ram format.\v" EXIT_STATUS_DOC;

static error_t parse_option(int key, char *arg, struct argp_state *state) {
    struct run *r = state->input;
    switch (key) {
    case ARGP_KEY_INIT:
        state->child_inputs[0] = &r->c;
        return 0;
    case ARGP_KEY_ARG:
        if (r->from == NULL)
            r->from = arg;
        else if (r->address == NULL)
            r->address = arg;
        else
            argp_error(state, "unexpected argument %s", arg);
        return 0;
    case ARGP_KEY_END:
        if (r->address == NULL)
            argp_error(state, "%s is wanted", r->from == NULL ? "DIR HOST:PORT, or FILE HOST:PORT," : "HOST:PORT");
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

static void clean_up(struct run *r) {
    rmig_source_close(r->source);
    rmig_fabric_close(r->c.fabric);
    rmig_mapped_reader_close(r->reader);
    machine_free(&r->c.machine);
    if (r->snapshot_fd >= 0)
        close(r->snapshot_fd);
    if (r->state_fd >= 0)
        close(r->state_fd);
    free(r->state_path);
    free(r->prologue);
    free(r->epilogue);
}

int main(int argc, char **argv) {
    static struct run run;
    static const struct argp_child children[] = {{&common_argp, 0, NULL, 0}, {NULL, 0, NULL, 0}};
    static const struct argp argp = {NULL, parse_option, "DIR HOST:PORT\nFILE HOST:PORT", doc, children, NULL, NULL};
    struct rmig_stats st = {0};
    whole_file_hold_standard();
    run.state_fd = run.snapshot_fd = -1;
    without_extension(&run.c);
    parse_arguments(&argp, &run, argc, argv);
    catch_signals(on_bus_error);
    migrate(&run);
    if (run.source != NULL)
        rmig_source_stats(run.source, &st);
    report(&run.c, &st, "sent");
    clean_up(&run);
    return (int)run.c.p.code;
}
