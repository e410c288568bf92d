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
    bool begun, refused;
    bool listed; // the stream has named all blocks
    bool in_hook; // after a hook word, until the end of its round
    bool accepted; // the blocks
    bool ending; // the last section of ram has begun
    bool state_came;
    bool returns; // the stream asked for a return path
    bool left; // the source has
    bool seal_tried, described; // machine.json is written
    bool sealed; // everything is on the disk
    bool kept; // DIR.part is no longer ours to remove
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

/* With a return path a QEMU waits for SHUT. Without one it calls the migration completed when its last byte is
   delivered, read or not; that can be from the end of the last round on. */
static bool may_be_completed(const struct run *r) {
    return r->accepted && !r->returns && (r->state_came || (r->ending && !r->in_hook && !r->left));
}

/* The disk is full: the access to a mapped file cannot be repeated. */
static void on_bus_error(int number) {
    static const char removed[] = PROGRAM ": a mapped file cannot be written: the disk is full\n";
    static const char kept[] = PROGRAM ": a mapped file cannot be accessed: the disk is full; the source may have "
                                       "completed the migration, so DIR.part is kept, but may not be whole\n";
    (void)number;
    bool keep = bus_error_run->sealed || may_be_completed(bus_error_run);
    ssize_t done =
        keep ? write(STDERR_FILENO, kept, sizeof kept - 1) : write(STDERR_FILENO, removed, sizeof removed - 1);
    (void)done;
    if (!keep)
        remove_part(bus_error_run);
    _exit(keep ? EXIT_HANDOVER : EXIT_FILES);
}

static int create(struct run *r, const char *file) {
    int fd = openat(r->part_fd, file, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW, 0600);
    if (fd < 0)
        fail(&r->c, EXIT_FILES, "cannot create %s/%.100s%s: %s", r->part, file, strlen(file) > 100 ? "..." : "",
             strerror(errno));
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
    r->described = rc == 0;
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
    r->seal_tried = true;
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

enum { PAGE = 4096 };

/* Where the zero pages that begin at an offset end. */
static off_t zero_end(const struct image *image, off_t at, off_t end) {
    const uint8_t *p = image->map;
    while (at < end) {
        off_t n = end - at < PAGE ? end - at : PAGE;
        if (!rmig_is_zero(p + at, (size_t)n))
            break;
        at += n;
    }
    return at;
}

static int dig_run(const struct image *image, off_t at, off_t end) {
    while (at < end) {
        off_t zeros = zero_end(image, at, end);
        if (zeros > at && fallocate(image->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, at, zeros - at) < 0)
            return -1;
        at = zeros > at ? zeros : at - at % PAGE + PAGE;
    }
    return 0;
}

/* Registration has made zero pages take space; what fails here costs only that. Holes are not read: on tmpfs that takes
   space, which may not be there. */
static void dig_holes(const struct image *image) {
    off_t at = 0, end;
    while ((at = lseek(image->fd, at, SEEK_DATA)) >= 0 && (end = lseek(image->fd, at, SEEK_HOLE)) >= 0) {
        if (dig_run(image, at, end) < 0)
            return;
        at = end;
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

static int fail_sink(struct run *r) { return fail_rmig(&r->c, EXIT_MIGRATION, rmig_sink_error(r->sink)); }

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
    else if (block->guest_address > INT64_MAX)
        fail(&r->c, EXIT_MIGRATION, "block %s is at guest address %#" PRIx64 "; at most %#" PRIx64 " can be kept", file,
             block->guest_address, (uint64_t)INT64_MAX);
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
        r->ending = ev->section == RMIG_QEMU_SECTION_END;
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
        r->state_came = true;
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
    r->accepted = rmig_sink_accept_blocks(r->sink) == RMIG_OK;
    return r->accepted ? 0 : fail_sink(r);
}

static int end_hook(struct run *r) {
    if (!r->in_hook)
        return fail(&r->c, EXIT_MIGRATION, "the source ended a round that no hook word began");
    r->in_hook = false;
    return 0;
}

static int on_disconnected(struct run *r) {
    r->left = true;
    if (rmig_qemu_reader_whole(&r->reader))
        return complete(r);
    if (!r->state_came)
        return fail(&r->c, EXIT_MIGRATION,
                    "the source left before the end of its stream (offset %" PRIu64 "): it failed or was cancelled",
                    rmig_qemu_reader_offset(&r->reader));
    return fail(&r->c, EXIT_MIGRATION,
                "the source left, and its device state has no end that is recognised (offset %" PRIu64
                "): it failed, or was cancelled, or describes no devices (suppress-vmdesc)",
                rmig_qemu_reader_offset(&r->reader));
}

/* Not when a source connects: one that begins nothing is forgotten. */
static void note_begin(struct run *r) {
    if (!r->begun)
        r->c.started_ns = now_ns(&r->c);
    r->begun = true;
}

static int on_event(struct run *r, const struct rmig_sink_event *ev) {
    if (ev->type == RMIG_SINK_BLOCKS || ev->type == RMIG_SINK_STREAM)
        note_begin(r);
    switch (ev->type) {
    case RMIG_SINK_BLOCKS:
        return accept_blocks(r);
    case RMIG_SINK_STREAM:
        return read_message(r);
    case RMIG_SINK_ROUND:
        return end_hook(r);
    case RMIG_SINK_DISCONNECTED:
        return on_disconnected(r);
    case RMIG_SINK_NONE:
    case RMIG_SINK_CONNECTED:
    case RMIG_SINK_FINISHED:
        return 0;
    }
    return 0;
}

/* Nothing takes back a machine that is here whole and whose source has left; a deadline not even one that is sealed. */
static bool must_stop(const struct run *r) { return !r->left && (cancelled || (!r->sealed && is_late(&r->c))); }

static int stop(struct run *r) {
    rmig_sink_cancel(r->sink);
    if (cancelled || rmig_sink_error(r->sink)->status == RMIG_ERR_HANDOVER)
        return fail_sink(r);
    return fail_late(&r->c, r->begun, r->begun ? "the migration did not end" : "no source began a migration");
}

/* What has arrived is read before a signal or the deadline counts: it may be the last bytes. */
static int receive_events(struct run *r) {
    struct rmig_sink_event ev = {.type = RMIG_SINK_NONE};
    while (ev.type != RMIG_SINK_FINISHED) {
        bool stopping = must_stop(r);
        if (rmig_sink_wait(r->sink, &ev, stopping ? 0 : TICK) < 0)
            return fail_sink(r);
        if (stopping && ev.type == RMIG_SINK_NONE)
            return stop(r);
        if (on_event(r, &ev) < 0 && refuse(r) < 0)
            return -1;
    }
    return 0;
}

/* After a failure: what is in DIR.part, and what is not. */
static void describe_part(const struct run *r, const char *unsealed, char *out, size_t size) {
    bool whole = rmig_qemu_reader_whole(&r->reader);
    size_t n = 0;
    if (r->sealed && whole) {
        snprintf(out, size, "it holds the machine: it is valid if the source says completed");
        return;
    }
    if (!whole)
        n = (size_t)snprintf(out, size, "its device state ends after %" PRIu64 " bytes, where no end is recognised",
                             r->c.machine.state_bytes);
    if (!r->sealed)
        snprintf(out + n, size - n, "%s%s%s%.600s", whole ? "" : ", and ",
                 r->described ? "not all of it may be on the disk" : MACHINE_FILE " is missing or not whole",
                 unsealed[0] == '\0' ? "" : ": ", unsealed);
}

/* When the source may have completed the migration, what is here may be all there is of the machine. A source that says
   ERROR has not. */
static int settle(struct run *r) {
    struct common *c = &r->c;
    char why[900], unsealed[700] = "", content[900];
    bool gave_up = c->status == RMIG_ERR_REFUSED && !rmig_qemu_reader_whole(&r->reader);
    if (c->code != EXIT_HANDOVER && (gave_up || !may_be_completed(r)))
        return -1;
    r->kept = true;
    snprintf(why, sizeof why, "%.899s", c->text);
    if (!r->seal_tried) {
        c->code = EXIT_OK; // for what fails now
        if (seal(r) < 0)
            snprintf(unsealed, sizeof unsealed, "%.699s", c->text);
    }
    describe_part(r, unsealed, content, sizeof content);
    c->code = EXIT_OK;
    return fail(c, EXIT_HANDOVER, "%s; the source may have completed the migration, so %.200s is kept: %s", why,
                r->part, content);
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
    if (print_address(r) < 0)
        return -1;
    if (receive_events(r) < 0)
        return settle(r);
    r->kept = true;
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
    if (!r->kept)
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
