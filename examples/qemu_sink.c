/*
qemu_sink - lets a stock QEMU migrate into a directory

    qemu_sink --listen 10.0.0.2:4444 DIR
    (qemu) migrate -d rdma:10.0.0.2:4444

The RAM of every block is received straight into a mapped file, the state of the devices is kept as it came; see
qemu_common.h for what is in DIR. qemu_source takes such a directory back into a QEMU. All is made in DIR.part, which
becomes DIR when the machine is there whole.
*/
#define _GNU_SOURCE
#define PROGRAM "qemu_sink"
#define RMIG_IMPLEMENTATION
#include "qemu_common.h"

struct run {
    struct common c;
    const char *address;
    uint64_t max_size;

    char *part; // DIR.part
    int part_fd, state_fd;
    struct rmig_sink *sink;
    struct rmig_qemu_reader reader;
    bool connected, refused;
    bool listed; // the stream has named all blocks
    bool in_hook; // after a hook word, until the end of its round
    bool returns; // the stream asked for a return path
    bool sealed; // everything is on the disk
    bool switchover_start;
    uint64_t messages, hooks, pings;
};

static struct run *bus_error_run; // for the handler of SIGBUS

// >>the directory

static void remove_part(const struct run *r) {
    if (r->part_fd < 0)
        return;
    for (uint32_t i = 0; i < r->c.machine.image_count; i++)
        unlinkat(r->part_fd, r->c.machine.image[i].file, 0);
    unlinkat(r->part_fd, RAM_DIR, AT_REMOVEDIR);
    unlinkat(r->part_fd, STATE_FILE, 0);
    unlinkat(r->part_fd, MACHINE_FILE, 0);
    rmdir(r->part);
}

/* The disk is full: the access to a mapped file cannot be repeated. */
static void on_bus_error(int number) {
    static const char text[] = PROGRAM ": a mapped file cannot be written: the disk is full\n";
    (void)number;
    if (write(STDERR_FILENO, text, sizeof text - 1) >= 0)
        remove_part(bus_error_run);
    _exit(EXIT_FILES);
}

static int create(struct run *r, const char *file) {
    int fd = openat(r->part_fd, file, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW, 0600);
    if (fd < 0)
        fail(&r->c, EXIT_FILES, "cannot create %s/%s: %s", r->part, file, strerror(errno));
    return fd;
}

/* Before a source is kept waiting. */
static int make_part(struct run *r) {
    struct stat st;
    if (lstat(r->c.dir, &st) == 0)
        return fail(&r->c, EXIT_FILES, "%s exists: name a directory that does not", r->c.dir);
    if (asprintf(&r->part, "%s.part", r->c.dir) < 0)
        checked(NULL);
    int made = mkdir(r->part, 0700);
    if (made < 0 && errno == EEXIST)
        return fail(&r->c, EXIT_FILES, "%s exists: another " PROGRAM " writes it, or one was killed; then remove it",
                    r->part);
    r->part_fd = made < 0 ? -1 : open(r->part, O_RDONLY | O_DIRECTORY | O_CLOEXEC | O_NOFOLLOW);
    if (r->part_fd < 0 || mkdirat(r->part_fd, RAM_DIR, 0700) < 0)
        return fail(&r->c, EXIT_FILES, "cannot create %s: %s", r->part, strerror(errno));
    r->state_fd = create(r, STATE_FILE);
    return r->state_fd < 0 ? -1 : 0;
}

static int open_image(struct run *r, struct image *image) {
    image->fd = create(r, image->file);
    if (image->fd < 0)
        return -1;
    if (ftruncate(image->fd, (off_t)image->block.length) < 0)
        return fail(&r->c, EXIT_FILES, "%s: cannot make %" PRIu64 " bytes: %s", image->file, image->block.length,
                    strerror(errno));
    image->map = mmap(NULL, image->block.length, PROT_READ | PROT_WRITE, MAP_SHARED, image->fd, 0);
    if (image->map == MAP_FAILED)
        return fail(&r->c, EXIT_FILES, "%s: cannot map %" PRIu64 " bytes: %s", image->file, image->block.length,
                    strerror(errno));
    return 0;
}

static int write_state(struct run *r, const uint8_t *p, size_t n) {
    struct machine *m = &r->c.machine;
    if (n > r->max_size - m->ram_bytes - m->state_bytes)
        return fail(&r->c, EXIT_MIGRATION, "RAM and device state are more than the %" PRIu64 " bytes of --max-size",
                    r->max_size);
    while (n > 0) {
        ssize_t done = write(r->state_fd, p, n);
        if (done < 0 && errno == EINTR)
            continue;
        if (done <= 0)
            return fail(&r->c, EXIT_FILES, "cannot write %s/" STATE_FILE ": %s", r->part,
                        strerror(done < 0 ? errno : ENOSPC));
        p += done;
        n -= (size_t)done;
        m->state_bytes += (uint64_t)done;
    }
    return 0;
}

static json_t *facts_json(const struct run *r) {
    struct rmig_stats st;
    rmig_sink_stats(r->sink, &st);
    json_t *object = checked(json_object());
    json_object_set_new(object, "return_path", json_boolean(r->returns));
    json_object_set_new(object, "pings", json_integer((json_int_t)r->pings));
    json_object_set_new(object, "switchover_start", json_boolean(r->switchover_start));
    json_object_set_new(object, "messages", json_integer((json_int_t)r->messages));
    json_object_set_new(object, "bytes", json_integer((json_int_t)rmig_qemu_reader_offset(&r->reader)));
    json_object_set_new(object, "rounds", json_integer((json_int_t)st.rounds));
    return object;
}

static int write_machine(struct run *r) {
    int fd = create(r, MACHINE_FILE);
    if (fd < 0)
        return -1;
    json_t *object = machine_json(&r->c.machine);
    json_object_set_new(object, "stream", facts_json(r));
    int rc = json_dumpfd(object, fd, JSON_INDENT(4)) < 0 || write(fd, "\n", 1) != 1 || fsync(fd) < 0 ? -1 : 0;
    int error = errno;
    json_decref(object);
    close(fd);
    return rc < 0 ? fail(&r->c, EXIT_FILES, "cannot write %s/" MACHINE_FILE ": %s", r->part, strerror(error)) : 0;
}

static int sync_dir(int at, const char *path) {
    int fd = openat(at, path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    int rc = fd < 0 ? -1 : fsync(fd);
    if (fd >= 0)
        close(fd);
    return rc;
}

/* Brings all to the disk, before the source hears that it is here: after that it may forget the machine. */
static int seal(struct run *r) {
    struct machine *m = &r->c.machine;
    if (write_machine(r) < 0)
        return -1;
    bool ok = fsync(r->state_fd) == 0;
    for (uint32_t i = 0; i < m->image_count && ok; i++)
        ok = fsync(m->image[i].fd) == 0;
    if (!ok || sync_dir(r->part_fd, RAM_DIR) < 0 || fsync(r->part_fd) < 0)
        return fail(&r->c, EXIT_FILES, "cannot bring %s to the disk: %s", r->part, strerror(errno));
    r->sealed = true;
    return 0;
}

enum { PAGE = 4096, RUN = 256 * PAGE };

/* Where the zero pages that begin at an offset end; not more than a run of them. */
static off_t zero_end(const struct image *image, off_t at) {
    const uint8_t *p = image->map;
    off_t length = (off_t)image->block.length, end = length - at < RUN ? length : at + RUN;
    while (at < end) {
        off_t n = end - at < PAGE ? end - at : PAGE;
        if (!rmig_is_zero(p + at, (size_t)n))
            break;
        at += n;
    }
    return at;
}

/* Registration has made zero pages take space; what fails here costs only that. */
static void dig_holes(const struct image *image) {
    off_t at = 0;
    while ((at = lseek(image->fd, at, SEEK_DATA)) >= 0) {
        off_t end = zero_end(image, at);
        if (end > at && fallocate(image->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, at, end - at) < 0)
            return;
        at = end > at ? end : at - at % PAGE + PAGE;
    }
}

static int commit(struct run *r) {
    for (uint32_t i = 0; i < r->c.machine.image_count; i++)
        dig_holes(&r->c.machine.image[i]);
    if (rename(r->part, r->c.dir) < 0)
        return fail(&r->c, EXIT_FILES, "all was received, but %s cannot become %s: %s; it holds the machine", r->part,
                    r->c.dir, strerror(errno));
    close(r->part_fd);
    r->part_fd = -1; // nothing to remove any more
    char *parent = join(r->c.dir, "..");
    int rc = sync_dir(AT_FDCWD, parent);
    free(parent);
    return rc < 0 ? fail(&r->c, EXIT_FILES, "%s is there, but may be lost if the power fails: %s", r->c.dir,
                         strerror(errno))
                  : 0;
}

// >>the stream

static int fail_sink(struct run *r) {
    fail_rmig(&r->c, EXIT_MIGRATION, rmig_sink_error(r->sink));
    if (r->c.code == EXIT_HANDOVER && r->sealed)
        snprintf(r->c.text + strlen(r->c.text), sizeof r->c.text - strlen(r->c.text),
                 "; %s holds the machine: it is valid if the source says completed", r->part);
    return -1;
}

/* Tells the source; the session's error follows, once it has been told. */
static int refuse(struct run *r) {
    bool again = r->refused;
    r->refused = true;
    return again || rmig_sink_refuse(r->sink, r->c.text) == RMIG_OK ? 0 : -1;
}

static int send_return(struct run *r, enum rmig_qemu_return_type type, uint32_t value) {
    struct rmig_qemu_return message = {(uint32_t)type, value};
    uint8_t bytes[RMIG_QEMU_RETURN_MAX];
    int n = rmig_qemu_encode_return(bytes, sizeof bytes, &message);
    return rmig_sink_return_put(r->sink, bytes, (size_t)n) < 0 ? fail_sink(r) : 0;
}

static int on_command(struct run *r, const struct rmig_qemu_event *ev) {
    if (ev->command == RMIG_QEMU_COMMAND_SWITCHOVER_START)
        r->switchover_start = true;
    if (ev->command == RMIG_QEMU_COMMAND_OPEN_RETURN_PATH)
        r->returns = true;
    if (ev->command != RMIG_QEMU_COMMAND_PING || !r->returns)
        return 0;
    r->pings++;
    return send_return(r, RMIG_QEMU_RETURN_PONG, ev->value);
}

static int on_configuration(struct run *r, const struct rmig_qemu_configuration *configuration) {
    json_t *name = json_string(configuration->machine);
    if (name == NULL || configuration->machine[0] == '\0')
        fail(&r->c, EXIT_MIGRATION, "the source %s: only a machine with a name in UTF-8 can be started again",
             name == NULL ? "has a machine whose name is not UTF-8" : "names no machine");
    json_decref(name);
    r->c.machine.configuration = *configuration;
    return r->c.code == EXIT_OK ? 0 : -1;
}

static int on_block(struct run *r, const struct rmig_qemu_block *block) {
    uint64_t left = r->max_size - r->c.machine.ram_bytes;
    json_t *name = json_string(block->name);
    char *file = file_of_block(block->name);
    if (name == NULL)
        fail(&r->c, EXIT_MIGRATION, "block %s: its name is not UTF-8", file);
    else if (block->length > left)
        fail(&r->c, EXIT_MIGRATION, "block %s has %" PRIu64 " bytes; %" PRIu64 " are left of --max-size", file,
             block->length, left);
    else
        add_image(&r->c.machine, block);
    free(file);
    json_decref(name);
    return r->c.code == EXIT_OK ? 0 : -1;
}

static int on_stream_event(struct run *r, const struct rmig_qemu_event *ev) {
    switch (ev->type) {
    case RMIG_QEV_CONFIGURATION:
        return on_configuration(r, ev->configuration);
    case RMIG_QEV_COMMAND:
        return on_command(r, ev);
    case RMIG_QEV_SECTION:
        r->c.machine.section_id = ev->section_id;
        return 0;
    case RMIG_QEV_BLOCK:
        return on_block(r, ev->block);
    case RMIG_QEV_RAM_LIST:
        r->listed = true;
        return 0;
    case RMIG_QEV_HOOK:
        r->in_hook = true;
        r->hooks++;
        return 0;
    case RMIG_QEV_STATE:
        return write_state(r, ev->data, ev->length);
    case RMIG_QEV_NONE:
    case RMIG_QEV_EOS:
    case RMIG_QEV_FOOTER:
    case RMIG_QEV_RAM_OVER:
    case RMIG_QEV_END:
        return 0;
    }
    return 0;
}

static int feed(struct run *r, const uint8_t *p, size_t n) {
    struct rmig_qemu_event ev;
    do {
        int64_t used = rmig_qemu_reader_feed(&r->reader, p, n, &ev);
        if (used < 0)
            return fail_rmig(&r->c, EXIT_MIGRATION, &r->reader.error);
        p += used;
        n -= (size_t)used;
        if (on_stream_event(r, &ev) < 0)
            return -1;
    } while (ev.type != RMIG_QEV_NONE);
    return 0;
}

/* With a return path the source waits for a word of ours, so the end is acted on where it is recognised; without one
   the source leaves, which confirms it. */
static int complete(struct run *r) {
    if (seal(r) < 0 || (r->returns && send_return(r, RMIG_QEMU_RETURN_SHUT, 0) < 0))
        return -1;
    return rmig_sink_complete(r->sink) < 0 ? fail_sink(r) : 0;
}

/* One message: all its bytes are taken, so that where they end is where it ends. */
static int read_message(struct run *r) {
    uint8_t piece[65536];
    size_t n;
    struct rmig_qemu_event ev;
    if (r->in_hook)
        return fail(&r->c, EXIT_MIGRATION, "the source sent stream bytes (offset %" PRIu64 ") while RAM is being moved",
                    rmig_qemu_reader_offset(&r->reader));
    r->messages++;
    while ((n = rmig_sink_get(r->sink, piece, sizeof piece)) > 0)
        if (feed(r, piece, n) < 0)
            return -1;
    if (rmig_qemu_reader_end_message(&r->reader, &ev) < 0)
        return fail_rmig(&r->c, EXIT_MIGRATION, &r->reader.error);
    return ev.type == RMIG_QEV_END && r->returns ? complete(r) : 0;
}

// >>the session

static int accept_blocks(struct run *r) {
    struct machine *m = &r->c.machine;
    uint64_t guest_offset = 0;
    if (!r->listed || !r->in_hook)
        return fail(&r->c, EXIT_MIGRATION, "the source asked for the blocks %s",
                    r->listed ? "outside a hook" : "before it named its own");
    if (m->image_count == 0)
        return fail(&r->c, EXIT_MIGRATION, "the source has no RAM to move");
    for (uint32_t i = 0; i < m->image_count; i++) {
        uint32_t index;
        if (open_image(r, &m->image[i]) < 0)
            return -1;
        struct rmig_block_desc desc = describe(&m->image[i], &guest_offset);
        if (rmig_sink_add_block(r->sink, &desc, &index) < 0)
            return fail(&r->c, EXIT_MIGRATION, "%s", rmig_sink_error(r->sink)->text);
    }
    return rmig_sink_accept_blocks(r->sink) < 0 ? fail_sink(r) : 0;
}

static int end_hook(struct run *r) {
    if (!r->in_hook)
        return fail(&r->c, EXIT_MIGRATION, "the source ended a round that no hook word began");
    r->in_hook = false;
    return 0;
}

static int on_disconnected(struct run *r) {
    if (!rmig_qemu_reader_whole(&r->reader))
        return fail(&r->c, EXIT_MIGRATION,
                    "the source left before the end of its stream (offset %" PRIu64 "): it failed or was cancelled",
                    rmig_qemu_reader_offset(&r->reader));
    return complete(r);
}

static int on_event(struct run *r, const struct rmig_sink_event *ev) {
    switch (ev->type) {
    case RMIG_SINK_CONNECTED:
        r->connected = true;
        r->c.started_ns = now_ns(&r->c);
        return 0;
    case RMIG_SINK_BLOCKS:
        return accept_blocks(r);
    case RMIG_SINK_STREAM:
        return read_message(r);
    case RMIG_SINK_ROUND:
        return end_hook(r);
    case RMIG_SINK_DISCONNECTED:
        return on_disconnected(r);
    case RMIG_SINK_NONE:
    case RMIG_SINK_FINISHED:
        return 0;
    }
    return 0;
}

static int receive_events(struct run *r) {
    struct rmig_sink_event ev = {.type = RMIG_SINK_NONE};
    while (ev.type != RMIG_SINK_FINISHED) {
        if (cancelled)
            rmig_sink_cancel(r->sink);
        if (rmig_sink_wait(r->sink, &ev, TICK) < 0)
            return fail_sink(r);
        if (on_event(r, &ev) < 0 && refuse(r) < 0)
            return -1;
        if (check_deadline(&r->c, r->connected, r->connected ? "the migration did not end" : "no source came") < 0)
            return -1;
    }
    return 0;
}

static int print_address(struct run *r) {
    char address[128];
    if (rmig_sink_address(r->sink, address, sizeof address) < 0)
        return fail_rmig(&r->c, EXIT_CONNECT, rmig_sink_error(r->sink));
    printf(r->c.json ? "{\"listening\":\"%s\"}\n" : "listening on %s\n", address);
    if (fflush(stdout) != 0)
        return fail(&r->c, EXIT_FILES, "cannot write to the standard output: %s", strerror(errno));
    return 0;
}

static int receive(struct run *r) {
    struct rmig_error err;
    if (make_part(r) < 0 || open_the_fabric(&r->c) < 0)
        return -1;
    if (rmig_sink_open(r->c.fabric, &r->c.cfg, &r->sink, &err) < 0)
        return fail_rmig(&r->c, EXIT_CONNECT, &err);
    if (rmig_sink_listen(r->sink, r->address) < 0)
        return fail_rmig(&r->c, EXIT_CONNECT, rmig_sink_error(r->sink));
    if (print_address(r) < 0 || receive_events(r) < 0)
        return -1;
    r->c.ended_ns = now_ns(&r->c);
    return commit(r);
}

// >>arguments and main

enum key { KEY_LISTEN = 'l', KEY_MAX_SIZE = 0x100 };

static const struct argp_option option_table[] = {
    {"listen", KEY_LISTEN, "HOST:PORT", 0, "where to listen; port 0: any free one, which is printed", 0},
    {"max-size", KEY_MAX_SIZE, "SIZE", 0, "refuse a machine of more bytes in all (default 1T)", 0},
    {NULL, 0, NULL, 0, NULL, 0},
};

static const char doc[] = "Lets a stock QEMU migrate (migrate rdma:HOST:PORT) into the new directory DIR.\v"
                          "DIR holds machine.json, the RAM of every block in ram/, and the state of the devices in "
                          "state. It is called DIR.part until all of it is there.\n\n" EXIT_STATUS_DOC;

static char *without_slash(char *path) { // its neighbour DIR.part is made
    size_t n = strlen(path);
    while (n > 1 && path[n - 1] == '/')
        path[--n] = '\0';
    return path;
}

static error_t parse_option(int key, char *arg, struct argp_state *state) {
    struct run *r = state->input;
    struct rmig_error err;
    switch (key) {
    case ARGP_KEY_INIT:
        state->child_inputs[0] = &r->c;
        return 0;
    case KEY_LISTEN:
        r->address = arg;
        return 0;
    case KEY_MAX_SIZE:
        if (rmig_size_parse(arg, &r->max_size, &err) < 0)
            argp_error(state, "--max-size %s: %s", arg, err.text);
        return 0;
    case ARGP_KEY_ARG:
        if (r->c.dir != NULL)
            argp_error(state, "unexpected argument %s", arg);
        r->c.dir = without_slash(arg);
        return 0;
    case ARGP_KEY_END:
        if (r->address == NULL)
            argp_error(state, "--listen HOST:PORT is wanted");
        if (r->c.dir == NULL)
            argp_error(state, "DIR is wanted: where the machine goes");
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

static void clean_up(struct run *r) {
    bool keep = r->sealed && (r->c.code == EXIT_HANDOVER || r->c.code == EXIT_FILES);
    if (r->c.code != EXIT_OK && !keep)
        remove_part(r);
    rmig_sink_close(r->sink);
    rmig_fabric_close(r->c.fabric);
    machine_free(&r->c.machine);
    if (r->state_fd >= 0)
        close(r->state_fd);
    if (r->part_fd >= 0)
        close(r->part_fd);
    free(r->part);
}

int main(int argc, char **argv) {
    static struct run run;
    static const struct argp_child children[] = {{&common_argp, 0, NULL, 0}, {NULL, 0, NULL, 0}};
    static const struct argp argp = {option_table, parse_option, "DIR", doc, children, NULL, NULL};
    struct rmig_stats st = {0};
    run.max_size = 1024 * RMIG_GIB;
    run.part_fd = run.state_fd = -1;
    parse_arguments(&run.c, &argp, &run, argc, argv);
    bus_error_run = &run;
    catch_signals(on_bus_error);
    rmig_qemu_reader_init(&run.reader, 0);
    receive(&run);
    if (run.sink != NULL)
        rmig_sink_stats(run.sink, &st);
    report(&run.c, &st, "received");
    clean_up(&run);
    return (int)run.c.code;
}
