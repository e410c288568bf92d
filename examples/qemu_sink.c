/*
qemu_sink - lets a stock QEMU migrate into a directory, or into a snapshot file

    qemu_sink --listen 10.0.0.2:4444 DIR
    qemu_sink --listen 10.0.0.2:4444 --snapshot FILE
    (qemu) migrate -d rdma:10.0.0.2:4444

DIR: the RAM of every block is received straight into a mapped file, the state of the devices is kept as it came; see
machine_dir.h for what is in DIR. All is made in DIR.part, which becomes DIR when the machine is there whole.

FILE: all is received into memory, and written to FILE.part in QEMU's mapped-ram format. The RAM is written in the last
round, before the source hears that the round is over: until then it keeps its machine, whatever becomes of the file.
Only then does it send the state of the devices, and the few MiB that are still to be written have their room.

qemu_source takes either back into a QEMU; a QEMU loads FILE itself, with -incoming file:FILE.
*/
#define _GNU_SOURCE
#define PROGRAM "qemu_sink"
#define RMIG_IMPLEMENTATION
#include "qemu_common.h"
#include "disk_room.h"
#include <sys/statvfs.h>

#define STATE_ROOM (16 * RMIG_MIB) // on the file system, for the state of the devices

struct run {
    struct common c;
    const char *address;
    const char *dir, *file; // one of them is NULL
    uint64_t max_size;
    bool sparse, in_place;

    struct whole_file out; // DIR.part or FILE.part
    int state_fd;
    struct rmig_mapped_writer *writer;
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
    bool ram_written; // into FILE.part
    bool sealed; // everything is on the disk
    uint64_t end_without_magic; // of a device: what has no end is no snapshot there, but ends here
    bool kept; // what is there is no longer ours to remove
    uint64_t messages, hooks, pings;
};

static struct run *bus_error_run; // for the handler of SIGBUS

// >>what is written

/* Of what a handler of signals may call. */
static void remove_part(struct run *r) {
    if (r->file != NULL)
        whole_file_remove(&r->out);
    else
        remove_machine_dir(&r->out, &r->c.machine);
}

/* With a return path a QEMU waits for SHUT. Without one it calls the migration completed when its last byte is
   delivered, read or not; that can be from the end of the last round on. */
static bool may_be_completed(const struct run *r) {
    return r->accepted && !r->returns && (r->state_came || (r->ending && !r->in_hook && !r->left));
}

/* The disk is full: the access to a mapped file cannot be repeated. */
static void on_bus_error(int number) {
    static const char removed[] = PROGRAM ": mapped memory cannot be accessed: the disk or a quota is full, or memory failed\n";
    static const char kept[] =
        PROGRAM ": mapped memory cannot be accessed: the disk or a quota is full, or memory failed; the source may have completed "
                "the migration, so what was written is kept, but may not be whole: ";
    const struct whole_file *out = &bus_error_run->out;
    (void)number;
    bool keep = bus_error_run->sealed || may_be_completed(bus_error_run);
    ssize_t done =
        keep ? write(STDERR_FILENO, kept, sizeof kept - 1) : write(STDERR_FILENO, removed, sizeof removed - 1);
    if (keep) // .part, or in place the file itself
        done = write(STDERR_FILENO, out->part, strlen(out->part)) + write(STDERR_FILENO, "\n", 1);
    (void)done;
    if (!keep)
        remove_part(bus_error_run);
    _exit(keep ? EXIT_HANDOVER : EXIT_FILES);
}

static int write_state(struct run *r, const uint8_t *p, size_t n) {
    struct machine *m = &r->c.machine;
    if (n > r->max_size - m->ram_bytes - m->state_bytes)
        return fail(&r->c.p, EXIT_MIGRATION, "RAM and device state are more than the %" PRIu64 " bytes of --max-size",
                    r->max_size);
    if (write_all(r->state_fd, p, n) < 0)
        return fail(&r->c.p, EXIT_FILES, "cannot write %s%s: %s", r->file != NULL ? "into memory for " : "",
                    r->file != NULL ? r->file : r->out.part, strerror(errno));
    m->state_bytes += n;
    return 0;
}

// >>the directory

/* Before a source is kept waiting. */
static int make_dir_part(struct run *r) {
    struct rmig_error err;
    if (whole_file_open_dir(&r->out, r->dir, &err) < 0)
        return fail_rmig(&r->c.p, EXIT_FILES, &err);
    if (create_ram_dir(&r->c.p, &r->out) < 0)
        return -1;
    r->state_fd = create_in_dir(&r->c.p, &r->out, STATE_FILE);
    return r->state_fd < 0 ? -1 : 0;
}

static json_t *facts_json(const struct run *r) {
    struct rmig_stats st;
    rmig_sink_stats(r->sink, &st);
    json_t *object = checked(json_object());
    json_object_set_new(object, "return_path", json_boolean(r->returns));
    json_object_set_new(object, "pings", json_integer((json_int_t)r->pings));
    json_object_set_new(object, "messages", json_integer((json_int_t)r->messages));
    json_object_set_new(object, "bytes", json_integer((json_int_t)rmig_qemu_reader_offset(&r->reader)));
    json_object_set_new(object, "rounds", json_integer((json_int_t)st.rounds));
    return object;
}

static int seal_dir(struct run *r) {
    if (write_machine_file(&r->c.p, &r->out, &r->c.machine, facts_json(r)) < 0)
        return -1;
    r->described = true;
    return sync_machine_dir(&r->c.p, &r->out, &r->c.machine, r->state_fd);
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

/* For disk_room.h. */
static int take_room(void *user, uint64_t address, uint64_t length, struct rmig_error *err) {
    struct run *r = user;
    int status = RMIG_OK;
    for (uint32_t i = 0; i < r->c.machine.image_count && status == RMIG_OK; i++) {
        const struct image *image = &r->c.machine.image[i];
        char *name = join(r->out.part, image->file);
        if (image->map != MAP_FAILED)
            status = disk_room_in(image->fd, image->map, image->block.length, address, length, name, err);
        free(name);
    }
    if (status != RMIG_OK)
        fail(&r->c.p, EXIT_FILES, "%s", err->text);
    return status;
}

/* Registration, and the room for it, have made zero pages take space; what fails here costs only that. Holes are not
   read: on tmpfs that takes space, which may not be there. */
static void dig_holes(const struct image *image) {
    off_t at = 0, data, end, size = (off_t)image->block.length;
    for (; at < size; at = end) {
        data = lseek(image->fd, at, SEEK_DATA);
        if (data < 0 && errno != ENXIO) // which alone says that there is no more
            return;
        data = data < 0 ? size : data;
        if (data > at && fallocate(image->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, at, data - at) < 0)
            return;
        end = data < size ? lseek(image->fd, data, SEEK_HOLE) : size;
        if (end < 0 || dig_run(image, data, end) < 0)
            return;
    }
}

// >>the snapshot file

static int fail_file(struct run *r, const struct rmig_error *err) {
    return fail_snapshot(&r->c.p, EXIT_MIGRATION, r->out.part, err);
}

static bool must_stop(const struct run *r);

static bool is_stopped(void *user) {
    const struct run *r = user;
    return !r->kept && must_stop(r);
}

static int on_progress(void *user, const struct rmig_stats *stats) {
    (void)stats;
    return is_stopped(user);
}

static int fail_writer(struct run *r) {
    const struct rmig_error *err = rmig_mapped_writer_error(r->writer);
    if (err->status == RMIG_ERR_CANCELLED)
        return fail_stopped(&r->c, true, "the snapshot was not written");
    return fail_file(r, err);
}

/* Opens a writer; another one before is forgotten, with all that it wrote. */
static int open_writer(struct run *r) {
    struct rmig_error err;
    rmig_mapped_writer_close(r->writer);
    return rmig_mapped_writer_open(r->out.fd, &r->c.snapshot, &r->writer, &err) < 0 ? fail_file(r, &err) : 0;
}

/* Before a source is kept waiting. */
static int make_file_part(struct run *r) {
    struct rmig_error err;
    r->c.snapshot.progress = on_progress;
    r->c.snapshot.progress_user = r;
    int flags = WHOLE_FILE_ONLY | WHOLE_FILE_MAY_BE_IN_PLACE | (r->in_place ? WHOLE_FILE_IN_PLACE : 0);
    if (whole_file_open(&r->out, r->file, flags, &err) < 0)
        return fail_rmig(&r->c.p, EXIT_FILES, &err);
    int rc = whole_file_keep(&r->out, r->c.snapshot.offset, is_stopped, r, &err);
    if (rc == RMIG_ERR_CANCELLED)
        return fail_stopped(&r->c, false, "what lies before --offset was not copied");
    if (rc < 0)
        return fail_rmig(&r->c.p, EXIT_FILES, &err);
    r->state_fd = memfd_create("device-state", MFD_CLOEXEC);
    if (r->state_fd < 0)
        return fail(&r->c.p, EXIT_FILES, "no memory for the state of the devices: %s", strerror(errno));
    return open_writer(r);
}

static int start_writer(struct run *r) {
    const struct machine *m = &r->c.machine;
    struct rmig_mapped_machine machine = {
        .configuration = m->configuration, .section_id = m->section_id, .switchover_start = m->switchover_start};
    uint64_t guest_offset = 0;
    if (open_writer(r) < 0)
        return -1;
    for (uint32_t i = 0; i < m->image_count; i++) {
        uint32_t index;
        struct rmig_block_desc desc = describe(&m->image[i], &guest_offset);
        if (rmig_mapped_writer_add_block(r->writer, &desc, &index) < 0)
            return fail_writer(r);
    }
    return rmig_mapped_writer_start(r->writer, &machine) < 0 ? fail_writer(r) : 0;
}

static bool is_device(const struct run *r) {
    struct stat st;
    return fstat(r->out.fd, &st) == 0 && S_ISBLK(st.st_mode);
}

/* How many bytes can still be written; UINT64_MAX: nobody says. */
static uint64_t find_room(const struct run *r) {
    struct statvfs fs;
    if (is_device(r)) {
        uint64_t size = (uint64_t)lseek(r->out.fd, 0, SEEK_END), end = rmig_mapped_writer_size(r->writer);
        return size > end ? size - end : 0;
    }
    if (fstatvfs(r->out.fd, &fs) < 0 || fs.f_blocks == 0) // some file systems have no such number
        return UINT64_MAX;
    return (uint64_t)(geteuid() == 0 ? fs.f_bfree : fs.f_bavail) * fs.f_frsize;
}

/* Is there room for so many bytes of pages, and for what goes round them? A device has its room laid out. */
static int check_room(struct run *r, uint64_t pages) {
    const struct machine *m = &r->c.machine;
    bool device = is_device(r);
    uint64_t needed = STATE_ROOM, room = find_room(r);
    char need[32], have[32];
    if (!device)
        needed += pages + m->ram_bytes / PAGE / 8 + m->image_count * (uint64_t)3 * PAGE;
    if (room >= needed)
        return 0;
    if (device)
        return fail(&r->c.p, EXIT_FILES,
                    "%s: the device is too short: behind the RAM it has %s left, and %s may be needed "
                    "for the state of the devices",
                    r->out.part, rmig_size_format(room / RMIG_MIB * RMIG_MIB, have, sizeof have),
                    rmig_size_format(needed, need, sizeof need));
    return fail(&r->c.p, EXIT_FILES, "%s: its file system has room for %s, and up to %s may be needed%s", r->out.part,
                rmig_size_format(room / RMIG_MIB * RMIG_MIB, have, sizeof have),
                rmig_size_format((needed / RMIG_MIB + 1) * RMIG_MIB, need, sizeof need),
                pages == 0 ? " for the state of the devices"
                           : " (pages of zeros take none: with --sparse the migration begins all the same)");
}

/* What can be wrong with the machine, the file system or a limit is said before anything is moved. */
static int prepare_file(struct run *r) {
    uint64_t length = r->c.machine.ram_bytes + r->c.snapshot.offset; // the file will be longer
    if (start_writer(r) < 0 || ((!r->sparse || is_device(r)) && check_room(r, r->c.machine.ram_bytes) < 0))
        return -1;
    if (is_device(r))
        return 0;
    if (length > INT64_MAX || ftruncate(r->out.fd, (off_t)length) < 0)
        return fail(&r->c.p, EXIT_FILES, "%s: cannot have the %" PRIu64 " bytes of RAM and more: %s", r->out.part,
                    r->c.machine.ram_bytes, strerror(length > INT64_MAX ? EFBIG : errno));
    return 0;
}

static int write_ram(struct run *r) {
    if (start_writer(r) < 0)
        return -1;
    if (rmig_mapped_writer_begin_round(r->writer) < 0)
        return fail_writer(r);
    for (uint32_t i = 0; i < r->c.machine.image_count; i++)
        if (rmig_mapped_writer_save_range(r->writer, i, 0, r->c.machine.image[i].block.length) < 0)
            return fail_writer(r);
    if (rmig_mapped_writer_end_round(r->writer) < 0)
        return fail_writer(r);
    if (fsync(r->out.fd) < 0)
        return fail(&r->c.p, EXIT_FILES, "cannot bring %s to the disk: %s", r->out.part, strerror(errno));
    r->ram_written = true;
    return 0;
}

/* In the last round, while the source waits, and can still be told that all was in vain. */
static int write_ram_early(struct run *r) {
    if (write_ram(r) < 0)
        return -1;
    if (must_stop(r))
        return fail_stopped(&r->c, true, "the migration did not end");
    return check_room(r, 0);
}

static int copy_state(struct run *r) {
    uint8_t piece[65536];
    ssize_t n;
    if (lseek(r->state_fd, 0, SEEK_SET) < 0)
        return fail(&r->c.p, EXIT_FILES, "the state of the devices in memory: %s", strerror(errno));
    while ((n = read(r->state_fd, piece, sizeof piece)) > 0) {
        if (is_stopped(r))
            return fail_stopped(&r->c, true, "the snapshot was not written");
        if (rmig_mapped_writer_put(r->writer, piece, (size_t)n) < 0)
            return fail_writer(r);
    }
    return n < 0 ? fail(&r->c.p, EXIT_FILES, "the state of the devices in memory: %s", strerror(errno)) : 0;
}

/* State without an end, of a QEMU that describes no devices or that was broken off: the writer finishes no such file,
   so it gets an end, which is cut off again. It is then what such a QEMU would have written itself: a QEMU may load it,
   and readers say that it has no end. On a device an older end may lie behind it: there the magic is taken away. */
static int finish_without_end(struct run *r) {
    static const uint8_t no_magic[8];
    uint8_t end[64];
    int n = rmig_qemu_encode_end(end, sizeof end, "{}", 2);
    if (n < 0 || rmig_mapped_writer_put(r->writer, end, (size_t)n) < 0 || rmig_mapped_writer_finish(r->writer) < 0)
        return fail_writer(r);
    uint64_t length = rmig_mapped_writer_size(r->writer) - (uint64_t)n;
    bool device = is_device(r);
    bool cut =
        device ? pwrite(r->out.fd, no_magic, sizeof no_magic, (off_t)r->c.snapshot.offset) == (ssize_t)sizeof no_magic
               : ftruncate(r->out.fd, (off_t)length) == 0;
    if (!cut || fsync(r->out.fd) < 0)
        return fail(&r->c.p, EXIT_FILES, "cannot end %s: %s", r->out.part, strerror(errno));
    r->end_without_magic = device ? length : 0;
    return 0;
}

static int seal_file(struct run *r) {
    if ((!r->ram_written && write_ram(r) < 0) || copy_state(r) < 0)
        return -1;
    if (!rmig_qemu_reader_whole(&r->reader))
        return finish_without_end(r);
    return rmig_mapped_writer_finish(r->writer) < 0 ? fail_writer(r) : 0;
}

// >>the end of either

/* Brings all to the disk, before the source hears that it is here: after that it may forget the machine. */
static int seal(struct run *r) {
    r->seal_tried = true;
    if ((r->file != NULL ? seal_file(r) : seal_dir(r)) < 0)
        return -1;
    r->sealed = true;
    return 0;
}

/* The source has let the machine go: what fails now is no failure to move it. */
static int commit(struct run *r) {
    struct rmig_error err;
    for (uint32_t i = 0; r->file == NULL && i < r->c.machine.image_count; i++)
        dig_holes(&r->c.machine.image[i]);
    if (whole_file_commit(&r->out, true, &err) == RMIG_OK)
        return 0;
    if (r->out.fd < 0)
        return fail(&r->c.p, EXIT_HANDOVER, "all was received, but %s", err.text);
    return fail(&r->c.p, EXIT_HANDOVER, "all was received, but %s; %s holds the machine", err.text, r->out.part);
}

// >>the stream

static int fail_sink(struct run *r) { return fail_rmig(&r->c.p, EXIT_MIGRATION, rmig_sink_error(r->sink)); }

/* Tells the source; the session's error follows, once it has been told. */
static int refuse(struct run *r) {
    bool again = r->refused;
    r->refused = true;
    return again || rmig_sink_refuse(r->sink, r->c.p.text) == RMIG_OK ? 0 : -1;
}

static int send_return(struct run *r, enum rmig_qemu_return_type type, uint32_t value) {
    struct rmig_qemu_return message = {(uint32_t)type, value};
    uint8_t bytes[RMIG_QEMU_RETURN_MAX];
    int n = rmig_qemu_encode_return(bytes, sizeof bytes, &message);
    return rmig_sink_return_put(r->sink, bytes, (size_t)n) < 0 ? fail_sink(r) : 0;
}

static int on_command(struct run *r, const struct rmig_qemu_event *ev) {
    if (ev->command == RMIG_QEMU_COMMAND_SWITCHOVER_START)
        r->c.machine.switchover_start = true;
    if (ev->command == RMIG_QEMU_COMMAND_OPEN_RETURN_PATH)
        r->returns = true;
    if (ev->command != RMIG_QEMU_COMMAND_PING || !r->returns)
        return 0;
    r->pings++;
    return send_return(r, RMIG_QEMU_RETURN_PONG, ev->value);
}

static int on_configuration(struct run *r, const struct rmig_qemu_configuration *configuration) {
    json_t *name = json_string(configuration->machine);
    if (r->file != NULL && is_ignore_shared(configuration))
        fail(&r->c.p, EXIT_MIGRATION,
             "the source has the capability x-ignore-shared, with which no QEMU before 11.0 loads a file: switch it "
             "off");
    else if (name == NULL || configuration->machine[0] == '\0')
        fail(&r->c.p, EXIT_MIGRATION, "the source %s: only a machine with a name in UTF-8 can be started again",
             name == NULL ? "has a machine whose name is not UTF-8" : "names no machine");
    json_decref(name);
    r->c.machine.configuration = *configuration;
    return r->c.p.code == EXIT_OK ? 0 : -1;
}

static int on_block(struct run *r, const struct rmig_qemu_block *block) {
    uint64_t left = r->max_size - r->c.machine.ram_bytes;
    json_t *name = r->file != NULL ? json_null() : json_string(block->name);
    char *file = file_of_block(block->name);
    if (name == NULL)
        fail(&r->c.p, EXIT_MIGRATION, "block %s: its name is not UTF-8", file);
    else if (block->guest_address > INT64_MAX)
        fail(&r->c.p, EXIT_MIGRATION, "block %s is at guest address %#" PRIx64 "; at most %#" PRIx64 " can be kept",
             file, block->guest_address, (uint64_t)INT64_MAX);
    else if (block->length > left)
        fail(&r->c.p, EXIT_MIGRATION, "block %s has %" PRIu64 " bytes; %" PRIu64 " are left of --max-size", file,
             block->length, left);
    else
        add_image(&r->c.machine, block);
    free(file);
    json_decref(name);
    return r->c.p.code == EXIT_OK ? 0 : -1;
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
            return fail_rmig(&r->c.p, EXIT_MIGRATION, &r->reader.error);
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
        return fail(&r->c.p, EXIT_MIGRATION,
                    "the source sent stream bytes (offset %" PRIu64 ") while RAM is being moved",
                    rmig_qemu_reader_offset(&r->reader));
    r->messages++;
    while ((n = rmig_sink_get(r->sink, piece, sizeof piece)) > 0)
        if (feed(r, piece, n) < 0)
            return -1;
    if (rmig_qemu_reader_end_message(&r->reader, &ev) < 0)
        return fail_rmig(&r->c.p, EXIT_MIGRATION, &r->reader.error);
    return ev.type == RMIG_QEV_END && r->returns ? complete(r) : 0;
}

// >>the session

static int accept_blocks(struct run *r) {
    struct machine *m = &r->c.machine;
    uint64_t guest_offset = 0;
    if (!r->listed || !r->in_hook)
        return fail(&r->c.p, EXIT_MIGRATION, "the source asked for the blocks %s",
                    r->listed ? "outside a hook" : "before it named its own");
    if (m->image_count == 0)
        return fail(&r->c.p, EXIT_MIGRATION, "the source has no RAM to move");
    for (uint32_t i = 0; i < m->image_count; i++)
        if ((r->file != NULL ? make_memory_image(&r->c.p, &m->image[i])
                             : create_image(&r->c.p, &r->out, &m->image[i])) < 0)
            return -1;
    if (r->file != NULL && prepare_file(r) < 0)
        return -1;
    for (uint32_t i = 0; i < m->image_count; i++) {
        uint32_t index;
        struct rmig_block_desc desc = describe(&m->image[i], &guest_offset);
        if (rmig_sink_add_block(r->sink, &desc, &index) < 0)
            return fail(&r->c.p, EXIT_MIGRATION, "%s", rmig_sink_error(r->sink)->text);
    }
    r->accepted = rmig_sink_accept_blocks(r->sink) == RMIG_OK;
    return r->accepted ? 0 : fail_sink(r);
}

static int end_hook(struct run *r) {
    if (!r->in_hook)
        return fail(&r->c.p, EXIT_MIGRATION, "the source ended a round that no hook word began");
    if (r->ending && r->file != NULL && write_ram_early(r) < 0)
        return -1;
    r->in_hook = false;
    return 0;
}

static int on_disconnected(struct run *r) {
    r->left = true;
    if (rmig_qemu_reader_whole(&r->reader))
        return complete(r);
    if (!r->state_came)
        return fail(&r->c.p, EXIT_MIGRATION,
                    "the source left before the end of its stream (offset %" PRIu64 "): it failed or was cancelled",
                    rmig_qemu_reader_offset(&r->reader));
    return fail(&r->c.p, EXIT_MIGRATION,
                "the source left, and its device state has no end that is recognised (offset %" PRIu64
                "): it failed, or was cancelled, or describes no devices (suppress-vmdesc)",
                rmig_qemu_reader_offset(&r->reader));
}

/* Not when a source connects: one that begins nothing is forgotten. */
static void note_begin(struct run *r) {
    if (!r->begun)
        r->c.started_ns = now_ns();
    r->begun = true;
}

static int on_event(struct run *r, const struct rmig_sink_event *ev) {
    if (ev->type == RMIG_SINK_BLOCKS || ev->type == RMIG_SINK_STREAM)
        note_begin(r);
    switch (ev->type) {
    case RMIG_SINK_FORGOTTEN: // before its first bytes of the stream: there is nothing of it
        tell_forgotten(r->c.p.json, rmig_sink_error(r->sink)->text);
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
    case RMIG_SINK_CONNECTED:
    case RMIG_SINK_TAKE: // not of a source of version 1, and no other is let in
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

/* As one word for a shell, to be freed. */
static char *shell_quoted(const char *text) {
    char *out = checked(malloc(4 * strlen(text) + 3)), *at = out;
    *at++ = '\'';
    for (; *text != '\0'; text++) {
        if (*text == '\'')
            at = stpcpy(at, "'\\'");
        *at++ = *text;
    }
    *at++ = '\'';
    *at = '\0';
    return out;
}

/* The command makes what a file would hold: there nothing follows the state. Offsets in the stream count from the
   beginning of the device, so what lies before it is copied, too. */
static void describe_without_magic(const struct run *r, char *out, size_t size) {
    uint64_t offset = r->c.snapshot.offset;
    char *device = shell_quoted(r->out.part);
    snprintf(out, size,
             ". It is no snapshot yet: its first 8 bytes, at offset %" PRIu64
             ", are zeros, because the end of an older "
             "one may follow it on the device. If the source says completed, copy it into a file with them, which a "
             "QEMU may load at that offset: device=%s; { head -c %" PRIu64
             " \"$device\"; printf 'QEVM\\0\\0\\0\\3'; tail -c +%" PRIu64 " \"$device\" | head -c %" PRIu64
             "; } >FILE",
             offset, device, offset, offset + 9, r->end_without_magic - offset - 8);
    free(device);
}

/* After a failure: what is in what is kept, and what is not. */
static void describe_part(const struct run *r, const char *unsealed, char *out, size_t size) {
    bool whole = rmig_qemu_reader_whole(&r->reader);
    const char *lack = r->described ? "not all of it may be on the disk" : MACHINE_FILE " is missing or not whole";
    size_t n = 0;
    if (r->sealed && whole) {
        snprintf(out, size, "it holds the machine: it is valid if the source says completed");
        return;
    }
    if (r->file != NULL)
        lack = r->ram_written ? "it is no snapshot that can be loaded: it has all pages of RAM, but may lack the "
                                "bitmaps that tell which, and the state of the devices"
                              : "it is no snapshot that can be loaded: it has not even all pages of RAM";
    if (!whole)
        n = (size_t)snprintf(out, size, "its device state ends after %" PRIu64 " bytes, where no end is recognised",
                             r->c.machine.state_bytes);
    if (!r->sealed)
        snprintf(out + n, size - n, "%s%s%s%.600s", whole ? "" : ", and ", lack, unsealed[0] == '\0' ? "" : ": ",
                 unsealed);
    else if (r->end_without_magic != 0)
        describe_without_magic(r, out + n, size - n);
}

/* When the source may have completed the migration, what is here may be all there is of the machine. A source that says
   ERROR has not. */
static int settle(struct run *r) {
    struct program *p = &r->c.p;
    char why[900], unsealed[700] = "", content[4 * PATH_MAX + 1200];
    bool gave_up = p->status == RMIG_ERR_REFUSED && !rmig_qemu_reader_whole(&r->reader);
    if (p->code != EXIT_HANDOVER && (gave_up || !may_be_completed(r)))
        return -1;
    r->kept = true;
    snprintf(why, sizeof why, "%.899s", p->text);
    if (!r->seal_tried) {
        p->code = EXIT_OK; // for what fails now
        if (seal(r) < 0)
            snprintf(unsealed, sizeof unsealed, "%.699s", p->text);
    }
    describe_part(r, unsealed, content, sizeof content);
    p->code = EXIT_OK;
    return fail(p, EXIT_HANDOVER, "%s; the source may have completed the migration, so %s is kept: %s", why,
                r->out.part, content);
}

static int print_address(struct run *r) {
    char address[128];
    if (rmig_sink_address(r->sink, address, sizeof address) < 0)
        return fail_rmig(&r->c.p, EXIT_CONNECT, rmig_sink_error(r->sink));
    printf(r->c.p.json ? "{\"listening\":\"%s\"}\n" : "listening on %s\n", address);
    if (fflush(stdout) != 0)
        return fail(&r->c.p, EXIT_FILES, "cannot write to the standard output: %s", strerror(errno));
    return 0;
}

static int receive(struct run *r) {
    struct rmig_error err;
    if ((r->file != NULL ? make_file_part(r) : make_dir_part(r)) < 0 || open_the_fabric(&r->c) < 0)
        return -1;
    if (r->file == NULL)
        disk_room_by_chunk(r->c.fabric, take_room, r);
    if (rmig_sink_open(r->c.fabric, &r->c.cfg, &r->sink, &err) < 0)
        return fail_rmig(&r->c.p, EXIT_CONNECT, &err);
    if (rmig_sink_listen(r->sink, r->address) < 0)
        return fail_rmig(&r->c.p, EXIT_CONNECT, rmig_sink_error(r->sink));
    if (print_address(r) < 0)
        return -1;
    if (receive_events(r) < 0)
        return settle(r);
    r->kept = true;
    r->c.ended_ns = now_ns();
    return commit(r);
}

// >>arguments and main

enum key { KEY_LISTEN = 'l', KEY_SNAPSHOT = 's', KEY_MAX_SIZE = 0x100, KEY_SPARSE, KEY_IN_PLACE };

static const struct argp_option option_table[] = {
    {"listen", KEY_LISTEN, "HOST:PORT", 0, "where to listen; port 0: any free one, which is printed", 0},
    {"snapshot", KEY_SNAPSHOT, "FILE", 0,
     "into a snapshot file in QEMU's mapped-ram format, instead of DIR; an older FILE stays until the new one is whole",
     0},
    {"max-size", KEY_MAX_SIZE, "SIZE", 0, "refuse a machine of more bytes in all (default 1T)", 0},
    {"sparse", KEY_SPARSE, NULL, 0,
     "begin also where the file system of FILE has no room for all RAM: pages of zeros take none", 2},
    {"in-place", KEY_IN_PLACE, NULL, 0,
     "into FILE itself, which must be there: a file, or a block device. What it holds behind --offset is lost when a "
     "migration begins, whatever comes of it",
     2},
    {NULL, 0, NULL, 0, NULL, 0},
};

static const char doc[] =
    "Lets a stock QEMU migrate (migrate rdma:HOST:PORT) into the new directory DIR, or into a snapshot file.\v"
    "DIR holds machine.json, the RAM of every block in ram/, and the state of the devices in "
    "state. It is called DIR.part until all of it is there.\n\n"
    "FILE can be loaded by QEMU 9.0 and later (-incoming file:FILE, capability mapped-ram). The RAM is received into "
    "memory, and written to FILE.part, in the last round if the source has one, as QEMU does.\n\n" EXIT_STATUS_DOC;

static void check_arguments(const struct run *r, struct argp_state *state) {
    const char *option = r->sparse ? "--sparse" : r->in_place ? "--in-place" : r->c.snapshot_option;
    if (r->address == NULL)
        argp_error(state, "--listen HOST:PORT is wanted");
    else if (r->dir == NULL && r->file == NULL)
        argp_error(state, "DIR or --snapshot FILE is wanted: where the machine goes");
    else if (r->dir != NULL && r->file != NULL)
        argp_error(state, "DIR and --snapshot FILE exclude each other: %s, %s", r->dir, r->file);
    else if (r->file == NULL && option != NULL)
        argp_error(state, "%s is for --snapshot", option);
}

static error_t parse_option(int key, char *arg, struct argp_state *state) {
    struct run *r = state->input;
    switch (key) {
    case ARGP_KEY_INIT:
        state->child_inputs[0] = &r->c;
        return 0;
    case KEY_LISTEN:
        r->address = arg;
        return 0;
    case KEY_SNAPSHOT:
        r->file = arg;
        return 0;
    case KEY_MAX_SIZE:
        parse_size("--max-size", arg, &r->max_size, state);
        return 0;
    case KEY_SPARSE:
        r->sparse = true;
        return 0;
    case KEY_IN_PLACE:
        r->in_place = true;
        return 0;
    case ARGP_KEY_ARG:
        if (r->dir != NULL)
            argp_error(state, "unexpected argument %s", arg);
        r->dir = arg;
        return 0;
    case ARGP_KEY_SUCCESS:
        check_arguments(r, state);
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
    rmig_mapped_writer_close(r->writer);
    machine_free(&r->c.machine);
    if (r->state_fd >= 0)
        close(r->state_fd);
    whole_file_free(&r->out);
}

int main(int argc, char **argv) {
    static struct run run;
    static const struct argp_child children[] = {{&common_argp, 0, NULL, 0}, {NULL, 0, NULL, 0}};
    static const struct argp argp = {option_table, parse_option, "DIR\n--snapshot FILE", doc, children, NULL, NULL};
    struct rmig_stats st = {0};
    whole_file_hold_standard();
    run.max_size = 1024 * RMIG_GIB;
    run.out.fd = run.state_fd = -1;
    without_extension(&run.c);
    parse_arguments(&argp, &run, argc, argv);
    bus_error_run = &run;
    catch_signals(on_bus_error);
    rmig_qemu_reader_init(&run.reader, 0);
    receive(&run);
    if (run.sink != NULL)
        rmig_sink_stats(run.sink, &st);
    report(&run.c, &st, "received");
    clean_up(&run);
    return (int)run.c.p.code;
}
