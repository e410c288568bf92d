/*
rmig_migrate - moves RAM images from the files of one host into files of another

    rmig_migrate recv --listen 0.0.0.0:4444 --out DIR
    rmig_migrate send --connect HOST:4444 --block ram=guest.mem --state device.bin

Both ends map the files and hand them to rmig as RAM blocks, as a hypervisor does with guest memory backed by files.
What goes beside the memory is a stream of records: magic, then u8 type, u32 length, payload (numbers big-endian):
BLOCK (u64 length, name), STATE (device state, in pieces) and END. The blocks are announced in the stream, as
hypervisors do, so that the receiver knows them also when the session is plain protocol version 1.

The receiver answers the handover when all files are on the disk, under the names that they have until then: what the
disk refuses, the source hears, and keeps its images. What fails behind the answer loses nothing: FILE.part stays.
*/
#define _GNU_SOURCE
#include <fcntl.h>
#include <libgen.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define RMIG_IMPLEMENTATION
#include "../rmig.h"
#define PROGRAM "rmig_migrate"
#include "disk_room.h"
#include "open_fabric.h"
#include "program.h"
#include "whole_file.h"

#define SECOND ((uint64_t)1000000000)
#define TICK (SECOND / 5) // how often the bar is drawn and a signal noticed
#define BLOCKS_MAX 4096 // announced by a peer, at most
#define STATE_PIECE 32768 // device state in one record, at most
#define MAGIC "RMIGIMG1"

enum record { RECORD_BLOCK = 1, RECORD_STATE = 2, RECORD_END = 3 };
enum { RECORD_HEADER = 5, RECORD_MAX = RECORD_HEADER + STATE_PIECE };

struct image {
    char *name; // of the block
    char *path; // send: the file; recv: its final name
    struct whole_file file; // send: fd alone
    uint64_t length;
    void *map;
    bool announced; // recv: the source has it
};

struct images {
    struct image *at;
    size_t count;
};

enum mode { MODE_NONE, MODE_SEND, MODE_RECV };

struct options {
    enum mode mode;
    const char *address, *out_dir, *state_path, *fabric, *provider;
    const char *send_only, *recv_only; // an option that was given and is for this mode
    struct images blocks; // as named by --block
    struct rmig_config cfg;
    uint64_t rounds, wait_seconds, disk_seconds, max_size;
    bool force, sparse, quiet, json, trace, list_params;
};

/* What the receiver has read of the stream. */
struct reader {
    uint8_t buf[RECORD_MAX];
    size_t have;
    bool magic_seen, end_seen;
};

/* A thread of the receiver's, since a disk takes its time, and the session must go on meanwhile. */
struct disk {
    pthread_t thread;
    bool started; // and not joined
    atomic_bool done;
    uint64_t deadline;
    struct rmig_error error;
};

struct run {
    struct options opt;
    struct images images; // those that move, in the source's order
    struct image state; // recv: path and file
    struct disk disk;
    bool taken; // recv: the source has been told that the images are here
    bool kept; // recv: what is there is no longer ours to remove
    struct rmig_fabric *fabric;
    struct rmig_source *source;
    struct rmig_sink *sink;
    struct reader reader;
    uint64_t total; // bytes of all images
    uint64_t state_bytes, started_ns, ended_ns, drawn_ns, accept_deadline;
    bool tty, connected, draws;
    bool ours; // what failed is this end's, and the next source would meet the same
    struct program p; // json and quiet are in opt
};

static struct run *bus_error_run; // for the handler of SIGBUS

// >>errors

static int fail_source(struct run *r) {
    struct rmig_error err = *rmig_source_error(r->source);
    if (r->connected)
        return fail_rmig(&r->p, EXIT_MIGRATION, &err);
    if (strstr(err.text, r->opt.address) == NULL) // to whom, is what a user wants to know first
        rmig_fail(&err, err.status, err.provider_code, "%s: %s", r->opt.address, rmig_source_error(r->source)->text);
    return fail_rmig(&r->p, EXIT_CONNECT, &err);
}

static int fail_sink(struct run *r) { return fail_rmig(&r->p, EXIT_MIGRATION, rmig_sink_error(r->sink)); }

/* Of what a handler of signals may call. */
static void remove_parts(struct run *r) {
    for (size_t i = 0; r->sink != NULL && i < r->images.count; i++)
        whole_file_remove(&r->images.at[i].file);
    if (r->sink != NULL)
        whole_file_remove(&r->state.file);
}

/* Of a source that gets no answer, only the end of its stream says that it may be done. */
static bool may_be_moved(const struct run *r) {
    return r->taken || (r->reader.end_seen && !rmig_sink_extended(r->sink));
}

/* A mapped file shrank under us, or the disk is full: the access cannot be repeated. */
static void on_bus_error(int number) {
    static const char removed[] = PROGRAM ": a mapped file cannot be accessed: it was cut, or the disk or a quota is full\n";
    static const char kept[] = PROGRAM ": a mapped file cannot be accessed: it was cut, or the disk or a quota is full; what was "
                                       "received is kept as FILE.part, but may not be whole\n";
    (void)number;
    bool keep = bus_error_run->kept || may_be_moved(bus_error_run);
    ssize_t done =
        keep ? write(STDERR_FILENO, kept, sizeof kept - 1) : write(STDERR_FILENO, removed, sizeof removed - 1);
    (void)done;
    if (!keep)
        remove_parts(bus_error_run);
    _exit(keep ? EXIT_HANDOVER : EXIT_FILES);
}

// >>progress

/* In a unit that moves: a step is at most a hundredth of the amount, from 100 bytes on. */
static const char *amount_text(uint64_t bytes, char *buf, size_t n) {
    static const char *const unit[] = {"B", "KiB", "MiB", "GiB", "TiB"};
    double amount = (double)bytes;
    size_t i = 0;
    for (; amount >= 10000 && i < 4; i++)
        amount /= 1024;
    snprintf(buf, n, amount < 100 && i > 0 ? "%.1f %s" : "%.0f %s", amount, unit[i]);
    return buf;
}

static const char *left_text(uint64_t ns, char *buf, size_t n) {
    uint64_t seconds = ns / SECOND + (ns % SECOND != 0);
    if (ns == RMIG_FOREVER)
        snprintf(buf, n, "time left unknown");
    else if (seconds < 100)
        snprintf(buf, n, "%" PRIu64 " s left", seconds);
    else
        snprintf(buf, n, "%" PRIu64 ":%02" PRIu64 ":%02" PRIu64 " left", seconds / 3600, seconds / 60 % 60,
                 seconds % 60);
    return buf;
}

static void draw_bar(uint64_t done, uint64_t total, const char *tail) {
    enum { WIDTH = 30 };
    int filled = total == 0 ? 0 : (int)((double)(done < total ? done : total) / (double)total * WIDTH);
    fprintf(stderr, "\r[%.*s%*s] %3d%%  %s\033[K", filled, "##############################", WIDTH - filled, "",
            total == 0 ? 0 : (int)((double)done * 100 / (double)total), tail);
}

/* Pages that nobody has looked at may be zero: then less time is left than is told. */
static void draw_source(struct run *r) {
    struct rmig_stats st;
    rmig_source_stats(r->source, &st);
    char tail[160], done[32], total[32], rate[32], left[32];
    uint64_t round = st.rounds < r->opt.rounds ? st.rounds + 1 : r->opt.rounds; // the last is over while finish goes on
    bool over = st.bytes_pending == 0 && st.round_bytes > 0;
    uint64_t left_ns = over ? 0 : rmig_expected_downtime_ns(&st, st.bytes_pending);
    snprintf(tail, sizeof tail, "%s of %s  %s/s  round %llu of %llu  %s",
             amount_text(st.round_bytes, done, sizeof done), amount_text(r->total, total, sizeof total),
             amount_text(st.throughput, rate, sizeof rate), (unsigned long long)round,
             (unsigned long long)r->opt.rounds, left_text(left_ns, left, sizeof left));
    draw_bar(st.round_bytes, r->total, tail);
}

/* The source writes into the receiver's memory without its doing: what it sees of a round is what is registered. */
static void draw_sink(struct run *r) {
    struct rmig_stats st;
    rmig_sink_stats(r->sink, &st);
    char tail[160], total[32];
    snprintf(tail, sizeof tail, "of %s registered  round %llu", amount_text(r->total, total, sizeof total),
             (unsigned long long)st.rounds + 1);
    draw_bar(st.bytes_registered, r->total, tail);
}

static void draw_progress(struct run *r) {
    uint64_t now = r->fabric->ops->now(r->fabric);
    if (!r->tty || !r->connected || now - r->drawn_ns < TICK)
        return;
    r->drawn_ns = now;
    r->draws = true;
    if (r->source != NULL)
        draw_source(r);
    else
        draw_sink(r);
}

static void end_progress(struct run *r) {
    if (r->draws)
        fputs("\r\033[K", stderr);
    r->draws = false;
}

static void print_trace(void *user, const char *line) {
    end_progress((struct run *)user);
    fprintf(stderr, "trace: %s\n", line);
}

// >>images

static struct image *images_add(struct images *list) {
    list->at = checked(realloc(list->at, (list->count + 1) * sizeof *list->at));
    struct image *image = &list->at[list->count++];
    *image = (struct image){.file.fd = -1, .map = MAP_FAILED};
    return image;
}

static struct image *images_find(struct images *list, const char *name) {
    for (size_t i = 0; i < list->count; i++)
        if (strcmp(list->at[i].name, name) == 0)
            return &list->at[i];
    return NULL;
}

static void image_free(struct image *image) {
    if (image->map != MAP_FAILED)
        munmap(image->map, image->length);
    whole_file_free(&image->file);
    free(image->name);
    free(image->path);
}

static void images_free(struct images *list) {
    for (size_t i = 0; i < list->count; i++)
        image_free(&list->at[i]);
    free(list->at);
    *list = (struct images){0};
}

/* Blocks follow each other in the guest's address space, each on a multiple of 1 GiB: any page size fits. */
static void describe(const struct images *list, size_t i, struct rmig_block_desc *desc) {
    uint64_t offset = 0;
    for (size_t k = 0; k < i; k++)
        offset += (list->at[k].length + RMIG_GIB - 1) / RMIG_GIB * RMIG_GIB;
    const struct image *image = &list->at[i];
    *desc = (struct rmig_block_desc){.name = image->name,
                                     .host = image->map,
                                     .length = image->length,
                                     .guest_offset = offset,
                                     .backing = RMIG_BACKING_SHARED_FD,
                                     .fd = image->file.fd};
}

/* Opened for writing where that is allowed: some adapters cannot register memory that is mapped read-only. */
static int open_for_sending(struct run *r, struct image *image) {
    struct stat st;
    int protection = PROT_READ | PROT_WRITE;
    image->file.fd = open(image->path, O_RDWR | O_CLOEXEC);
    if (image->file.fd < 0 && errno != ENOENT && errno != EISDIR) {
        protection = PROT_READ;
        image->file.fd = open(image->path, O_RDONLY | O_CLOEXEC);
    }
    if (image->file.fd < 0 || fstat(image->file.fd, &st) < 0)
        return fail(&r->p, EXIT_FILES, "block %s: cannot read %s: %s", image->name, image->path, strerror(errno));
    if (!S_ISREG(st.st_mode))
        return fail(&r->p, EXIT_FILES, "block %s: %s is not a regular file", image->name, image->path);
    if (st.st_size == 0)
        return fail(&r->p, EXIT_FILES, "block %s: %s is empty: a block has at least one byte", image->name,
                    image->path);
    image->length = (uint64_t)st.st_size;
    image->map = mmap(NULL, image->length, protection, MAP_SHARED, image->file.fd, 0);
    if (image->map == MAP_FAILED)
        return fail(&r->p, EXIT_FILES, "block %s: cannot map the %llu bytes of %s: %s", image->name,
                    (unsigned long long)image->length, image->path, strerror(errno));
    r->total += image->length;
    return 0;
}

/* Is the file of one of two also that of the other, or called what the other is until it is whole? */
static int check_pair(struct run *r, const struct whole_file *file, const struct whole_file *other, const char *what) {
    if (other->target == NULL)
        return 0;
    if (whole_file_same_name(file->target, other->target))
        return fail(&r->p, EXIT_FILES, "%s: %s is already the file of another block, or of the state: name one for each",
                    what, file->path);
    const char *clash = whole_file_clash(file, other);
    return clash == NULL ? 0
                         : fail(&r->p, EXIT_FILES,
                                "%s: of it and of another block, or the state, one is to be called %s, and the other "
                                "is called that until it is whole: name another file",
                                what, clash);
}

/* Of a file that is to be opened: with those that are open, and with the state's, which is opened when the first of it
   comes. What is asked of the file system does not grow with the number of blocks: the source chooses that. */
static int check_names(struct run *r, const struct image *image, const char *what) {
    struct rmig_error err = {0};
    struct whole_file file = {.fd = -1}, state = {.fd = -1};
    int rc = whole_file_name(&file, image->path, 0, &err);
    if (rc == RMIG_OK && image != &r->state)
        rc = whole_file_name(&state, r->state.path, 0, &err);
    if (rc != RMIG_OK)
        rc = fail(&r->p, EXIT_FILES, "%s: %s", what, err.text);
    else
        rc = check_pair(r, &file, &state, what);
    for (size_t i = 0; i < r->images.count && rc == 0; i++)
        rc = check_pair(r, &file, &r->images.at[i].file, what);
    whole_file_free(&file);
    whole_file_free(&state);
    return rc;
}

static int open_part(struct run *r, struct image *image, const char *what) {
    struct rmig_error err;
    struct stat st;
    if (check_names(r, image, what) < 0)
        return -1;
    if (!r->opt.force && lstat(image->path, &st) == 0)
        return fail(&r->p, EXIT_FILES, "%s: %s exists: remove it, or give --force", what, image->path);
    return whole_file_open(&image->file, image->path, WHOLE_FILE_ONLY, &err) == RMIG_OK
               ? 0
               : fail(&r->p, EXIT_FILES, "%s: %s", what, err.text);
}

static int open_for_receiving(struct run *r, struct image *image) {
    char what[RMIG_NAME_MAX + 16];
    char *safe = checked(safe_name(image->name, true));
    snprintf(what, sizeof what, "block %.*s", RMIG_NAME_MAX, safe);
    if (image->path == NULL)
        image->path = join(r->opt.out_dir, safe);
    free(safe);
    if (open_part(r, image, what) < 0)
        return -1;
    int fd = image->file.fd, error = ftruncate(fd, (off_t)image->length) < 0 ? errno : 0;
    if (error == 0 && !r->opt.sparse)
        error = posix_fallocate(fd, 0, (off_t)image->length);
    if (error != 0)
        return fail(&r->p, EXIT_FILES, "%s: cannot reserve %llu bytes for %s: %s%s", what,
                    (unsigned long long)image->length, image->file.part, strerror(error),
                    error == ENOSPC || error == EDQUOT ? " (free some, or give --sparse if the image has holes)" : "");
    image->map = mmap(NULL, image->length, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (image->map == MAP_FAILED)
        return fail(&r->p, EXIT_FILES, "%s: cannot map %llu bytes: %s", what, (unsigned long long)image->length,
                    strerror(errno));
    return 0;
}

/* --sparse: for disk_room.h. */
static int take_room(void *user, uint64_t address, uint64_t length, struct rmig_error *err) {
    struct run *r = user;
    int status = RMIG_OK;
    for (size_t i = 0; i < r->images.count && status == RMIG_OK; i++) {
        const struct image *image = &r->images.at[i];
        if (image->map != MAP_FAILED)
            status = disk_room_in(image->file.fd, image->map, image->length, address, length, image->file.part, err);
    }
    if (status != RMIG_OK)
        fail(&r->p, EXIT_FILES, "%s", err->text);
    return status;
}

// >>send

static void nap(struct run *r) {
    struct rmig_fd fds[4];
    struct pollfd polls[4];
    int n = rmig_source_fds(r->source, fds, 4);
    uint64_t deadline = rmig_source_next_deadline(r->source), now = r->fabric->ops->now(r->fabric);
    uint64_t sleep_ns = deadline > now ? deadline - now : 0;
    uint64_t limit = n <= 0 ? SECOND / 1000 : TICK; // a fabric without descriptors is polled
    if (sleep_ns > limit)
        sleep_ns = limit;
    for (int i = 0; i < n; i++)
        polls[i] = (struct pollfd){.fd = fds[i].fd, .events = fds[i].write ? POLLIN | POLLOUT : POLLIN};
    struct timespec ts = {.tv_sec = 0, .tv_nsec = (long)sleep_ns};
    ppoll(polls, n <= 0 ? 0 : (nfds_t)n, &ts, NULL);
}

/* One step of the session; RMIG_PENDING while the operation under way goes on. */
static int step(struct run *r) {
    if (cancelled)
        rmig_source_cancel(r->source);
    int rc = rmig_source_process(r->source);
    draw_progress(r);
    return rc < 0 ? fail_source(r) : rc;
}

/* Drives the operation that a _start call began to its end. */
static int drive(struct run *r, int started) {
    if (started < 0)
        return fail_source(r);
    for (;;) {
        int rc = step(r);
        if (rc != RMIG_PENDING)
            return rc;
        nap(r);
    }
}

static int put(struct run *r, const void *data, size_t n) {
    for (const uint8_t *p = data; n > 0;) {
        int64_t taken = rmig_source_put_some(r->source, p, n);
        if (taken < 0)
            return fail_source(r);
        p += taken;
        n -= (size_t)taken;
        if (n == 0)
            break;
        if (step(r) < 0)
            return -1;
        if (taken == 0)
            nap(r);
    }
    return 0;
}

static void put_be(uint8_t *out, uint64_t value, size_t n) {
    for (size_t i = 0; i < n; i++)
        out[i] = (uint8_t)(value >> 8 * (n - 1 - i));
}

static uint64_t get_be(const uint8_t *p, size_t n) {
    uint64_t value = 0;
    for (size_t i = 0; i < n; i++)
        value = value << 8 | p[i];
    return value;
}

static int put_record(struct run *r, enum record type, const void *payload, size_t n) {
    uint8_t header[RECORD_HEADER] = {(uint8_t)type};
    put_be(header + 1, n, 4);
    return put(r, header, sizeof header) < 0 ? -1 : put(r, payload, n);
}

static int announce(struct run *r) {
    if (put(r, MAGIC, strlen(MAGIC)) < 0)
        return -1;
    for (size_t i = 0; i < r->images.count; i++) {
        const struct image *image = &r->images.at[i];
        uint8_t payload[8 + RMIG_NAME_MAX];
        size_t n = strlen(image->name); // rmig_source_add_block has refused names that are too long
        put_be(payload, image->length, 8);
        memcpy(payload + 8, image->name, n);
        if (put_record(r, RECORD_BLOCK, payload, 8 + n) < 0)
            return -1;
    }
    return drive(r, rmig_source_flush_start(r->source));
}

static int send_state(struct run *r) {
    uint8_t piece[STATE_PIECE];
    ssize_t n = 0;
    while (r->state.file.fd >= 0 && (n = read(r->state.file.fd, piece, sizeof piece)) > 0) {
        if (put_record(r, RECORD_STATE, piece, (size_t)n) < 0)
            return -1;
        r->state_bytes += (uint64_t)n;
    }
    if (n < 0)
        return fail(&r->p, EXIT_FILES, "cannot read %s: %s", r->opt.state_path, strerror(errno));
    return put_record(r, RECORD_END, "", 0);
}

/* Every round sends everything: the files do not change, more rounds than one only measure. */
static int send_round(struct run *r) {
    if (rmig_source_begin_round(r->source) < 0)
        return fail_source(r);
    for (uint32_t i = 0; i < r->images.count; i++)
        if (rmig_source_save_range(r->source, i, 0, r->images.at[i].length) < 0)
            return fail_source(r);
    return drive(r, rmig_source_end_round_start(r->source));
}

static int open_source(struct run *r) {
    struct rmig_error err;
    if (rmig_source_open(r->fabric, &r->opt.cfg, &r->source, &err) < 0)
        return fail_rmig(&r->p, EXIT_CONNECT, &err);
    for (size_t i = 0; i < r->images.count; i++) {
        struct rmig_block_desc desc;
        uint32_t index;
        describe(&r->images, i, &desc);
        if (rmig_source_add_block(r->source, &desc, &index) < 0)
            return fail_source(r);
    }
    return 0;
}

static int open_inputs(struct run *r) {
    r->images = r->opt.blocks;
    r->opt.blocks = (struct images){0};
    for (size_t i = 0; i < r->images.count; i++)
        if (open_for_sending(r, &r->images.at[i]) < 0)
            return -1;
    if (r->opt.state_path == NULL)
        return 0;
    r->state.file.fd = open(r->opt.state_path, O_RDONLY | O_CLOEXEC);
    if (r->state.file.fd < 0)
        return fail(&r->p, EXIT_FILES, "cannot read the state file %s: %s", r->opt.state_path, strerror(errno));
    return 0;
}

static int send_all(struct run *r) {
    if (open_source(r) < 0)
        return -1;
    r->started_ns = r->fabric->ops->now(r->fabric);
    if (drive(r, rmig_source_connect_start(r->source, r->opt.address)) < 0)
        return -1;
    r->connected = true;
    if (announce(r) < 0)
        return -1;
    for (uint64_t i = 0; i < r->opt.rounds; i++)
        if (send_round(r) < 0)
            return -1;
    return send_state(r) < 0 ? -1 : drive(r, rmig_source_finish_start(r->source));
}

// >>recv

static int read_block_record(struct run *r, const uint8_t *p, size_t n) {
    if (n < 9 || n > 8 + RMIG_NAME_MAX || memchr(p + 8, '\0', n - 8) != NULL)
        return fail(&r->p, EXIT_MIGRATION, "the source announced a block in a record of %zu bytes: malformed", n);
    uint64_t length = get_be(p, 8);
    if (r->images.count == BLOCKS_MAX)
        return fail(&r->p, EXIT_MIGRATION, "the source announced more than %d blocks", BLOCKS_MAX);
    uint64_t left = r->opt.max_size - r->total - r->state_bytes;
    if (length == 0 || length > left)
        return fail(&r->p, EXIT_MIGRATION,
                    "the source announced a block of %llu bytes; 1 to %llu are left of --max-size",
                    (unsigned long long)length, (unsigned long long)left);
    struct image *image = images_add(&r->images);
    image->name = checked(strndup((const char *)p + 8, n - 8));
    image->length = length;
    r->total += length;
    return 0;
}

static int read_state_record(struct run *r, const uint8_t *p, size_t n) {
    uint64_t left = r->opt.max_size - r->total - r->state_bytes;
    if (n > left)
        return fail(&r->p, EXIT_MIGRATION, "the source sent %zu bytes of state; %llu are left of --max-size", n,
                    (unsigned long long)left);
    if (r->state.file.fd < 0 && open_part(r, &r->state, "the state") < 0)
        return -1;
    while (n > 0) {
        ssize_t done = write(r->state.file.fd, p, n);
        if (done < 0 && errno == EINTR)
            continue;
        if (done <= 0)
            return fail(&r->p, EXIT_FILES, "cannot write %s: %s", r->state.file.part,
                        strerror(done < 0 ? errno : ENOSPC));
        p += done;
        n -= (size_t)done;
        r->state_bytes += (uint64_t)done;
    }
    return 0;
}

static int read_record(struct run *r, unsigned type, const uint8_t *payload, size_t n) {
    if (r->reader.end_seen)
        return fail(&r->p, EXIT_MIGRATION, "the source sent a record after the end");
    if (type == RECORD_BLOCK && r->images.count > 0 && r->images.at[0].file.fd >= 0)
        return fail(&r->p, EXIT_MIGRATION, "the source announced a block after the first round began");
    if (type == RECORD_BLOCK)
        return read_block_record(r, payload, n);
    if (type == RECORD_STATE)
        return read_state_record(r, payload, n);
    if (type != RECORD_END || n != 0)
        return fail(&r->p, EXIT_MIGRATION, "the source sent a record of type %u with %zu bytes, which is none", type,
                    n);
    r->reader.end_seen = true;
    return 0;
}

/* Takes one record off the reader's buffer: 1, or 0 when it is not whole yet. */
static int take_record(struct run *r) {
    struct reader *reader = &r->reader;
    size_t magic = strlen(MAGIC), used;
    if (!reader->magic_seen) {
        if (reader->have < magic)
            return 0;
        if (memcmp(reader->buf, MAGIC, magic) != 0)
            return fail(&r->p, EXIT_MIGRATION,
                        "the source is not " PROGRAM " send: its stream does not begin with " MAGIC);
        reader->magic_seen = true;
        used = magic;
    } else {
        if (reader->have < RECORD_HEADER)
            return 0;
        uint64_t n = get_be(reader->buf + 1, 4);
        if (n > STATE_PIECE)
            return fail(&r->p, EXIT_MIGRATION, "the source sent a record of %llu bytes; %d is the most",
                        (unsigned long long)n, STATE_PIECE);
        used = RECORD_HEADER + n;
        if (reader->have < used)
            return 0;
        if (read_record(r, reader->buf[0], reader->buf + RECORD_HEADER, n) < 0)
            return -1;
    }
    reader->have -= used;
    memmove(reader->buf, reader->buf + used, reader->have);
    return 1;
}

static int read_stream(struct run *r) {
    struct reader *reader = &r->reader;
    size_t n;
    while ((n = rmig_sink_get(r->sink, reader->buf + reader->have, sizeof reader->buf - reader->have)) > 0) {
        int rc;
        reader->have += n;
        while ((rc = take_record(r)) > 0) {
        }
        if (rc < 0)
            return -1;
    }
    return 0;
}

/* Gives each announced block the file that --block named, or one in DIR. */
static int open_outputs(struct run *r) {
    for (size_t i = 0; i < r->images.count; i++) {
        struct image *image = &r->images.at[i];
        struct image *named = images_find(&r->opt.blocks, image->name);
        if (named != NULL) {
            named->announced = true;
            image->path = checked(strdup(named->path));
        }
    }
    for (size_t i = 0; i < r->opt.blocks.count; i++)
        if (!r->opt.blocks.at[i].announced)
            return fail(&r->p, EXIT_USAGE, "--block %s=%s: the source has no block of this name",
                        r->opt.blocks.at[i].name, r->opt.blocks.at[i].path);
    for (size_t i = 0; i < r->images.count; i++) {
        struct rmig_block_desc desc;
        uint32_t index;
        if (open_for_receiving(r, &r->images.at[i]) < 0)
            return -1;
        describe(&r->images, i, &desc);
        if (rmig_sink_add_block(r->sink, &desc, &index) < 0)
            return fail(&r->p, EXIT_MIGRATION, "%s", rmig_sink_error(r->sink)->text);
    }
    return 0;
}

/* What the source asks for is what it has announced. A version 1 source names nothing here: count is 0. */
static int check_announced(struct run *r, uint32_t count) {
    for (uint32_t i = 0; i < count; i++) {
        struct rmig_block_entry entry = {.length = 0};
        if (rmig_sink_peer_block(r->sink, i, &entry) < 0)
            return fail_sink(r);
        const struct image *image = images_find(&r->images, entry.name);
        if (image == NULL || image->length != entry.length)
            return fail(&r->p, EXIT_MIGRATION, "the source asks for a block of %llu bytes that it did not announce",
                        (unsigned long long)entry.length);
    }
    return 0;
}

static int accept_blocks(struct run *r, uint32_t count) {
    if (r->images.count == 0)
        return fail(&r->p, EXIT_MIGRATION, "the source is not " PROGRAM " send: it did not announce its blocks");
    if (check_announced(r, count) < 0 || open_outputs(r) < 0)
        return -1;
    r->ours = rmig_sink_accept_blocks(r->sink) < 0;
    return r->ours ? fail_sink(r) : 0;
}

/* The files that are written: an array to be freed, of *n. */
static struct whole_file **files_of(struct run *r, size_t *n) {
    struct whole_file **files = checked(calloc(r->images.count + 1, sizeof(struct whole_file *)));
    *n = 0;
    for (size_t i = 0; i < r->images.count; i++)
        files[(*n)++] = &r->images.at[i].file;
    if (r->state.file.fd >= 0)
        files[(*n)++] = &r->state.file;
    return files;
}

static int sync_files(struct run *r, struct rmig_error *err) {
    size_t n;
    int status = RMIG_OK;
    struct whole_file **files = files_of(r, &n);
    for (size_t i = 0; i < n && status == RMIG_OK; i++)
        status = whole_file_sync(files[i], err);
    free(files);
    return status;
}

static void *run_disk(void *user) {
    struct run *r = user;
    sync_files(r, &r->disk.error);
    atomic_store(&r->disk.done, true);
    return NULL;
}

static void join_disk(struct run *r) {
    if (r->disk.started)
        pthread_join(r->disk.thread, NULL);
    r->disk.started = false;
}

/* Everything has arrived. The answer is given when it is on the disk. */
static int start_disk(struct run *r) {
    if (!r->reader.end_seen)
        return fail(&r->p, EXIT_MIGRATION, "the source finished before the end of its stream");
    r->disk.deadline = r->fabric->ops->now(r->fabric) + r->opt.disk_seconds * SECOND;
    int error = pthread_create(&r->disk.thread, NULL, run_disk, r);
    r->disk.started = error == 0;
    return error == 0 ? 0 : fail(&r->p, EXIT_FILES, "no thread to write to the disk: %s", strerror(error));
}

static int answer(struct run *r) {
    if (!r->disk.started)
        return 0;
    if (!atomic_load(&r->disk.done))
        return r->fabric->ops->now(r->fabric) < r->disk.deadline
                   ? 0
                   : fail(&r->p, EXIT_FILES, "the disk has not taken all within the %llu s of --disk-timeout",
                          (unsigned long long)r->opt.disk_seconds);
    join_disk(r);
    if (r->disk.error.status != RMIG_OK)
        return fail(&r->p, EXIT_FILES, "%s", r->disk.error.text);
    r->taken = true;
    return rmig_sink_take(r->sink) < 0 ? fail_sink(r) : 0;
}

/* What the source has said goes with it, and what was made for it. Where something is wrong here (a file, too little
   memory that may be locked) the receiver ends: its operator has to look. */
static int forget(struct run *r) {
    if ((r->p.code != EXIT_OK && r->p.code != EXIT_MIGRATION) || r->ours)
        return -1;
    r->p.code = EXIT_OK;
    r->p.status = RMIG_OK;
    if (rmig_sink_clear_blocks(r->sink) < 0)
        return fail_sink(r);
    rmig_sink_forgive(r->sink); // blocks of that source that were refused
    end_progress(r);
    tell_forgotten(r->opt.json, rmig_sink_error(r->sink)->text);
    remove_parts(r);
    images_free(&r->images);
    whole_file_free(&r->state.file);
    r->reader = (struct reader){.have = 0};
    r->total = r->state_bytes = r->started_ns = 0;
    r->connected = false;
    return 0;
}

static void begin(struct run *r) {
    if (!r->connected)
        r->started_ns = r->fabric->ops->now(r->fabric);
    r->connected = true;
}

static int on_event(struct run *r, const struct rmig_sink_event *ev) {
    switch (ev->type) {
    case RMIG_SINK_FORGOTTEN:
        return forget(r);
    case RMIG_SINK_BLOCKS:
        begin(r);
        return accept_blocks(r, ev->block_count);
    case RMIG_SINK_STREAM:
        begin(r);
        return read_stream(r);
    case RMIG_SINK_DISCONNECTED:
        if (!r->reader.end_seen)
            return fail(&r->p, EXIT_MIGRATION, "the source left before the end of its stream");
        return rmig_sink_complete(r->sink) < 0 ? fail_sink(r) : 0;
    case RMIG_SINK_TAKE:
        return start_disk(r);
    case RMIG_SINK_FINISHED: // without RMIG_SINK_TAKE if auto-take is on
        return r->reader.end_seen ? 0 : fail(&r->p, EXIT_MIGRATION, "the source finished before the end of its stream");
    case RMIG_SINK_NONE:
    case RMIG_SINK_CONNECTED:
    case RMIG_SINK_ROUND:
        return 0;
    }
    return 0;
}

static int receive_events(struct run *r) {
    struct rmig_sink_event ev = {.type = RMIG_SINK_NONE};
    while (ev.type != RMIG_SINK_FINISHED) {
        if (cancelled)
            rmig_sink_cancel(r->sink);
        if (rmig_sink_wait(r->sink, &ev, r->disk.started ? SECOND / 1000 : TICK) < 0)
            return fail_sink(r);
        // The source is told; the session's error follows.
        if ((on_event(r, &ev) < 0 || answer(r) < 0) && rmig_sink_refuse(r->sink, r->p.text) != RMIG_OK)
            return -1;
        if (!r->connected && r->fabric->ops->now(r->fabric) >= r->accept_deadline)
            return fail(&r->p, EXIT_CONNECT, "no source came within the %llu s of --wait",
                        (unsigned long long)r->opt.wait_seconds);
        draw_progress(r);
    }
    return 0;
}

static int print_address(struct run *r) {
    char address[128];
    if (rmig_sink_address(r->sink, address, sizeof address) < 0)
        return fail_rmig(&r->p, EXIT_CONNECT, rmig_sink_error(r->sink));
    printf(r->opt.json ? "{\"listening\":\"%s\"}\n" : "listening on %s\n", address);
    if (fflush(stdout) != 0)
        return fail(&r->p, EXIT_FILES, "cannot write to the standard output: %s", strerror(errno));
    return 0;
}

/* The images are this side's alone, whatever comes: what fails now leaves them where they are. */
static int commit(struct run *r) {
    struct rmig_error err;
    size_t n;
    r->kept = true;
    struct whole_file **files = files_of(r, &n);
    int status = r->taken ? RMIG_OK : sync_files(r, &err); // of a source that waits for no answer
    if (status == RMIG_OK)
        status = whole_file_commit_all(files, n, r->opt.force, &err);
    if (status != RMIG_OK)
        fail(&r->p, EXIT_HANDOVER, "all was received, but %s%s", err.text,
             files[0]->fd < 0 ? "" : "; every file is kept as FILE.part, and is whole");
    free(files);
    return status;
}

/* The receiver failed. When the source may take the images for moved, what is here may be all there is. */
static int settle(struct run *r) {
    struct rmig_error err = {0};
    char why[sizeof err.text + 100];
    r->taken = r->p.status == RMIG_ERR_HANDOVER; // any other error, and the source has kept them
    if (!may_be_moved(r))
        return -1;
    r->kept = true;
    snprintf(why, sizeof why, "%.600s", r->p.text);
    sync_files(r, &err);
    r->p.code = EXIT_OK;
    return fail(&r->p, EXIT_HANDOVER, "%s; the source may have ended well, so every file is kept as FILE.part%s%s", why,
                err.status == RMIG_OK ? ", and is whole" : ", but ", err.text);
}

static int receive_all(struct run *r) {
    struct rmig_error err;
    if (r->opt.sparse)
        disk_room_by_chunk(r->fabric, take_room, r);
    if (rmig_sink_open(r->fabric, &r->opt.cfg, &r->sink, &err) < 0)
        return fail_rmig(&r->p, EXIT_CONNECT, &err);
    if (rmig_sink_listen(r->sink, r->opt.address) < 0)
        return fail_rmig(&r->p, EXIT_CONNECT, rmig_sink_error(r->sink));
    if (print_address(r) < 0)
        return -1;
    r->accept_deadline = RMIG_FOREVER;
    if (r->opt.wait_seconds > 0)
        r->accept_deadline = r->fabric->ops->now(r->fabric) + r->opt.wait_seconds * SECOND;
    if (receive_events(r) < 0)
        return settle(r);
    r->ended_ns = r->fabric->ops->now(r->fabric);
    return commit(r);
}

/* Of the directory in which a file will be made. */
static int check_dir(struct run *r, const char *dir) {
    struct stat st;
    if (stat(dir, &st) < 0 || (S_ISDIR(st.st_mode) ? access(dir, W_OK | X_OK) < 0 : (errno = ENOTDIR) != 0))
        return fail(&r->p, EXIT_FILES, "cannot create files in %s: %s", dir, strerror(errno));
    return 0;
}

/* Of what will be replaced, or made. */
static int check_file(struct run *r, const char *given, const char *path) {
    struct stat st;
    if (path[whole_file_dir_length(path)] == '\0')
        return fail(&r->p, EXIT_FILES, "\"%s\": the name of a file is missing at its end", path);
    if (stat(given, &st) < 0)
        return 0;
    if (!S_ISREG(st.st_mode))
        return fail(&r->p, EXIT_FILES, "%s is not a regular file, and will not be replaced", given);
    if (lstat(path, &st) < 0 && errno == ENOENT && strcmp(path, given) != 0)
        return fail(&r->p, EXIT_FILES, "%s leads to a file that was removed", given);
    return 0;
}

/* Finds what can be wrong with the places before a source is kept waiting. */
static int check_outputs(struct run *r) {
    r->state.path = r->opt.state_path != NULL ? checked(strdup(r->opt.state_path)) : join(r->opt.out_dir, "state");
    if (check_dir(r, r->opt.out_dir) < 0)
        return -1;
    for (size_t i = 0; i <= r->opt.blocks.count; i++) {
        struct rmig_error err;
        const char *path = i < r->opt.blocks.count ? r->opt.blocks.at[i].path : r->state.path;
        char *target = whole_file_resolve(path, &err);
        if (target == NULL)
            return fail_rmig(&r->p, EXIT_FILES, &err);
        int rc = check_file(r, path, target);
        if (rc == 0)
            rc = check_dir(r, dirname(target));
        free(target);
        if (rc < 0)
            return -1;
    }
    return 0;
}

// >>report

static json_t *stats_json(const struct rmig_stats *st) {
    const struct {
        const char *name;
        uint64_t value;
    } row[] = {
        {"bytes_written", st->bytes_written},
        {"pages_written", st->pages_written},
        {"bytes_zero", st->bytes_zero},
        {"pages_zero", st->pages_zero},
        {"rounds", st->rounds},
        {"writes_posted", st->writes_posted},
        {"writes_signalled", st->writes_signalled},
        {"registrations", st->registrations},
        {"deregistrations", st->deregistrations},
        {"bytes_registered", st->bytes_registered},
        {"registration_ns", st->registration_ns},
        {"control_sent", st->control_sent},
        {"control_received", st->control_received},
        {"stream_bytes", st->stream_bytes},
        {"setup_ns", st->setup_ns},
        {"round_bytes", st->round_bytes},
        {"round_ns", st->round_ns},
        {"throughput", st->throughput},
        {"message_rtt_ns", st->message_rtt_ns},
    };
    json_t *object = checked(json_object());
    for (size_t i = 0; i < sizeof row / sizeof row[0]; i++)
        json_object_set_new(object, row[i].name, json_integer((json_int_t)row[i].value));
    return object;
}

/* Names and paths may be any bytes, but JSON is UTF-8: what is not is given as its safe name. */
static json_t *name_json(const char *name) {
    json_t *value = json_string(name);
    if (value != NULL)
        return value;
    char *safe = checked(safe_name(name, true));
    value = (json_t *)checked(json_string(safe));
    free(safe);
    return value;
}

static json_t *images_json(const struct images *list) {
    json_t *array = checked(json_array());
    for (size_t i = 0; i < list->count; i++) {
        const struct image *image = &list->at[i];
        json_t *object = checked(json_object());
        json_object_set_new(object, "name", name_json(image->name));
        json_object_set_new(object, "file", image->path == NULL ? json_null() : name_json(image->path));
        json_object_set_new(object, "bytes", json_integer((json_int_t)image->length));
        json_array_append_new(array, object);
    }
    return array;
}

static void session_stats(const struct run *r, struct rmig_stats *st, bool *extended) {
    *st = (struct rmig_stats){0};
    *extended = r->source != NULL ? rmig_source_extended(r->source) : r->sink != NULL && rmig_sink_extended(r->sink);
    if (r->source != NULL)
        rmig_source_stats(r->source, st);
    else if (r->sink != NULL)
        rmig_sink_stats(r->sink, st);
}

static void print_json(const struct run *r, uint64_t ns) {
    struct rmig_stats st;
    bool extended;
    session_stats(r, &st, &extended);
    json_t *object = checked(json_object());
    json_object_set_new(object, "mode", json_string(r->opt.mode == MODE_SEND ? "send" : "recv"));
    json_object_set_new(object, "ok", json_boolean(r->p.code == EXIT_OK));
    json_object_set_new(object, "exit_code", json_integer(r->p.code));
    json_object_set_new(object, "status", status_json(&r->p));
    json_object_set_new(object, "error", r->p.code == EXIT_OK ? json_null() : text_json(r->p.text));
    json_object_set_new(object, "fabric", json_string(r->fabric == NULL ? "" : r->fabric->ops->name));
    json_object_set_new(object, "extension", json_boolean(extended));
    json_object_set_new(object, "blocks", images_json(&r->images));
    json_object_set_new(object, "bytes", json_integer((json_int_t)r->total));
    json_object_set_new(object, "state_bytes", json_integer((json_int_t)r->state_bytes));
    json_object_set_new(object, "total_ns", json_integer((json_int_t)ns));
    json_object_set_new(object, "stats", stats_json(&st));
    json_dumpf(object, stdout, JSON_COMPACT);
    putchar('\n');
    json_decref(object);
}

static void print_summary(const struct run *r, uint64_t ns) {
    struct rmig_stats st;
    bool extended;
    char total[32], written[32], rate[32];
    session_stats(r, &st, &extended);
    amount_text(r->total, total, sizeof total);
    amount_text(ns == 0 ? 0 : (uint64_t)((double)st.bytes_written * 1e9 / (double)ns), rate, sizeof rate);
    if (r->opt.mode == MODE_RECV)
        printf("received %s in %zu blocks and %llu bytes of state: %.3f s\n", total, r->images.count,
               (unsigned long long)r->state_bytes, (double)ns / 1e9);
    else
        printf("sent %s in %zu blocks and %llu bytes of state: %.3f s, %s/s (%s written in %llu writes, "
               "the rest is zero), rounds %llu, protocol %s\n",
               total, r->images.count, (unsigned long long)r->state_bytes, (double)ns / 1e9, rate,
               amount_text(st.bytes_written, written, sizeof written), (unsigned long long)st.writes_posted,
               (unsigned long long)st.rounds, extended ? "1 with rmig's extension" : "1");
}

static void report(struct run *r) {
    end_progress(r);
    uint64_t ns = r->started_ns == 0 ? 0 : r->ended_ns - r->started_ns;
    if (r->p.code != EXIT_OK)
        fprintf(stderr, PROGRAM ": %s\n", r->p.text);
    if (r->opt.json)
        print_json(r, ns);
    else if (r->p.code == EXIT_OK && !r->opt.quiet)
        print_summary(r, ns);
    if (fflush(stdout) != 0 && r->p.code == EXIT_OK) {
        fprintf(stderr, PROGRAM ": cannot write to the standard output: %s\n", strerror(errno));
        r->p.code = EXIT_FILES;
    }
}

// >>parameters

static const char *unit_text(enum rmig_unit unit) {
    switch (unit) {
    case RMIG_UNIT_BYTES:
        return "bytes";
    case RMIG_UNIT_BYTES_PER_SECOND:
        return "bytes/s";
    case RMIG_UNIT_COUNT:
        return "count";
    case RMIG_UNIT_SWITCH:
        return "switch";
    case RMIG_UNIT_NS:
        return "time";
    }
    return "";
}

static void list_params(const struct options *opt) {
    struct rmig_param_info info[RMIG_PARAM_COUNT];
    char value[64];
    size_t n = rmig_param_list(info, RMIG_PARAM_COUNT);
    json_t *array = checked(json_array());
    if (!opt->json)
        printf("%-16s %-10s %-46s %-10s %-8s %s\n", "NAME", "VALUE", "RANGE", "DEFAULT", "UNIT", "");
    for (size_t i = 0; i < n && i < RMIG_PARAM_COUNT; i++) {
        rmig_get_param(&opt->cfg, info[i].name, value, sizeof value, NULL);
        if (!opt->json)
            printf("%-16s %-10s %-46s %-10s %-8s %s\n", info[i].name, value, info[i].range_text, info[i].default_text,
                   unit_text(info[i].unit), info[i].help);
        json_array_append_new(array, json_pack("{s:s,s:s,s:s,s:s,s:s,s:s}", "name", info[i].name, "value", value,
                                               "range", info[i].range_text, "default", info[i].default_text, "unit",
                                               unit_text(info[i].unit), "help", info[i].help));
    }
    if (opt->json) {
        json_dumpf(array, stdout, JSON_COMPACT);
        putchar('\n');
    }
    json_decref(array);
}

// >>arguments

enum key {
    KEY_CONNECT = 'c',
    KEY_LISTEN = 'l',
    KEY_BLOCK = 'b',
    KEY_OUT = 'o',
    KEY_STATE = 's',
    KEY_FABRIC = 'f',
    KEY_PROVIDER = 'p',
    KEY_QUIET = 'q',
    KEY_SET = 0x100,
    KEY_LIST,
    KEY_ROUNDS,
    KEY_WAIT,
    KEY_DISK_TIMEOUT,
    KEY_MAX_SIZE,
    KEY_FORCE,
    KEY_SPARSE,
    KEY_JSON,
    KEY_TRACE
};

static const struct argp_option option_table[] = {
    {NULL, 0, NULL, 0, "Options of send:", 1},
    {"connect", KEY_CONNECT, "HOST:PORT", 0, "where the receiver listens; IPv6 as [ADDRESS]:PORT", 0},
    {"rounds", KEY_ROUNDS, "N", 0, "send everything N times, to measure (default 1)", 0},
    {NULL, 0, NULL, 0, "Options of recv:", 2},
    {"listen", KEY_LISTEN, "HOST:PORT", 0, "where to listen; port 0: any free one, which is printed", 0},
    {"out", KEY_OUT, "DIR", 0, "where blocks go that --block does not name, and the state", 0},
    {"force", KEY_FORCE, NULL, 0, "replace files that exist", 0},
    {"sparse", KEY_SPARSE, NULL, 0, "reserve disk space as data comes only, leave holes where the memory is zero", 0},
    {"max-size", KEY_MAX_SIZE, "SIZE", 0, "refuse images and state of more bytes in all (default 1T)", 0},
    {"wait", KEY_WAIT, "SECONDS", 0, "give up when no source came (default: never)", 0},
    {"disk-timeout", KEY_DISK_TIMEOUT, "SECONDS", 0,
     "refuse when the disk has not taken all so long after the last byte (default 3600)", 0},
    {NULL, 0, NULL, 0, "Options of both:", 3},
    {"block", KEY_BLOCK, "NAME=FILE", 0, "a RAM block and its image; any number", 0},
    {"state", KEY_STATE, "FILE", 0, "device state: bytes that follow the memory (recv: default DIR/state)", 0},
    {"set", KEY_SET, "NAME=VALUE", 0, "set a parameter, e.g. chunk-size=64M; any number", 0},
    {"list-params", KEY_LIST, NULL, 0, "print the parameters with the values in force, and exit", 0},
    {"fabric", KEY_FABRIC, "NAME", 0, "ofi (libfabric) or verbs (libibverbs and librdmacm) (default ofi)", 0},
    {"provider", KEY_PROVIDER, "NAME", 0,
     "ofi: libfabric's provider, e.g. tcp (default: the first that can); verbs: the device, e.g. mlx5_0 (default: any)",
     0},
    {"json", KEY_JSON, NULL, 0, "print the result and the statistics as JSON, one object a line", 0},
    {"quiet", KEY_QUIET, NULL, 0, "no progress bar and no summary", 0},
    {"trace", KEY_TRACE, NULL, 0, "print the events of the session on the standard error output", 0},
    {NULL, 0, NULL, 0, NULL, 0},
};

static const char doc[] =
    "Moves RAM images from the files of one host into files of another by RDMA.\v"
    "A received file is called FILE.part until all of it is on the disk; only then the source hears that it was moved. "
    "Several files get their names together, or none. A FILE.part that an earlier receiver left is not written over. "
    "Names of blocks come from the source: in DIR, characters other than letters, digits, '_', '-' and '.' become "
    "%XX.\n\n"
    "Exit status:\n"
    "  0  all was moved\n"
    "  2  bad usage, or a bad parameter\n"
    "  3  a file cannot be read or written\n"
    "  4  no connection: fabric, listen, connect, or nobody came\n"
    "  5  the migration failed; the receiver keeps nothing\n"
    "  6  the handover broke off, or a file got no name: the receiver has FILE.part\n"
    "  7  cancelled by a signal (one that dumps core ends it at once)";

static void parse_block(struct options *opt, const char *arg, struct argp_state *state) {
    const char *equals = strchr(arg, '=');
    if (equals == NULL || equals == arg || equals[1] == '\0') {
        argp_error(state, "--block %s: NAME=FILE is wanted", arg);
        return;
    }
    struct image *image = images_add(&opt->blocks);
    image->name = checked(strndup(arg, (size_t)(equals - arg)));
    image->path = checked(strdup(equals + 1));
    for (size_t i = 0; i + 1 < opt->blocks.count; i++)
        if (strcmp(opt->blocks.at[i].name, image->name) == 0)
            argp_error(state, "--block %s: the name %s was given before", arg, image->name);
}

static void parse_set(struct options *opt, const char *arg, struct argp_state *state) {
    struct rmig_error err;
    const char *equals = strchr(arg, '=');
    if (equals == NULL || equals == arg) {
        argp_error(state, "--set %s: NAME=VALUE is wanted", arg);
        return;
    }
    char *name = checked(strndup(arg, (size_t)(equals - arg)));
    int rc = rmig_set_param(&opt->cfg, name, equals + 1, &err);
    free(name);
    if (rc < 0)
        argp_error(state, "--set %s: %s", arg, err.text);
}

static void parse_max_size(struct options *opt, const char *arg, struct argp_state *state) {
    struct rmig_error err;
    if (rmig_size_parse(arg, &opt->max_size, &err) < 0)
        argp_error(state, "--max-size %s: %s", arg, err.text);
}

static void parse_mode(struct options *opt, const char *arg, struct argp_state *state) {
    if (opt->mode != MODE_NONE)
        argp_error(state, "unexpected argument %s", arg);
    if (strcmp(arg, "send") == 0)
        opt->mode = MODE_SEND;
    else if (strcmp(arg, "recv") == 0)
        opt->mode = MODE_RECV;
    else
        argp_error(state, "%s is no command: send or recv is wanted", arg);
}

static void check_usage(const struct options *opt, struct argp_state *state) {
    if (opt->list_params)
        return;
    if (opt->mode == MODE_NONE)
        argp_error(state, "a command is wanted: send or recv");
    if (opt->mode == MODE_SEND && opt->recv_only != NULL)
        argp_error(state, "--%s is an option of recv", opt->recv_only);
    if (opt->mode == MODE_RECV && opt->send_only != NULL)
        argp_error(state, "--%s is an option of send", opt->send_only);
    if (opt->address == NULL)
        argp_error(state, "%s needs --%s HOST:PORT", opt->mode == MODE_SEND ? "send" : "recv",
                   opt->mode == MODE_SEND ? "connect" : "listen");
    if (opt->mode == MODE_SEND && opt->blocks.count == 0)
        argp_error(state, "send needs at least one --block NAME=FILE");
    if (opt->mode == MODE_RECV && opt->out_dir == NULL)
        argp_error(state, "recv needs --out DIR");
}

static const char *option_name(int key) {
    const struct argp_option *o = option_table;
    while (o->key != key)
        o++;
    return o->name;
}

static void note_mode(struct options *opt, int key) {
    if (key == KEY_CONNECT || key == KEY_ROUNDS)
        opt->send_only = option_name(key);
    if (key == KEY_LISTEN || key == KEY_OUT || key == KEY_FORCE || key == KEY_SPARSE || key == KEY_MAX_SIZE ||
        key == KEY_WAIT || key == KEY_DISK_TIMEOUT)
        opt->recv_only = option_name(key);
}

static error_t parse_option(int key, char *arg, struct argp_state *state) {
    struct options *opt = state->input;
    note_mode(opt, key);
    switch (key) {
    case KEY_CONNECT:
    case KEY_LISTEN:
        opt->address = arg;
        return 0;
    case KEY_BLOCK:
        parse_block(opt, arg, state);
        return 0;
    case KEY_OUT:
        opt->out_dir = arg;
        return 0;
    case KEY_STATE:
        opt->state_path = arg;
        return 0;
    case KEY_FABRIC:
        opt->fabric = arg;
        return 0;
    case KEY_PROVIDER:
        opt->provider = arg;
        return 0;
    case KEY_SET:
        parse_set(opt, arg, state);
        return 0;
    case KEY_LIST:
        opt->list_params = true;
        return 0;
    case KEY_ROUNDS:
        opt->rounds = parse_count("--rounds", arg, 1000000, state);
        return 0;
    case KEY_WAIT:
        opt->wait_seconds = parse_count("--wait", arg, 1000000, state);
        return 0;
    case KEY_DISK_TIMEOUT:
        opt->disk_seconds = parse_count("--disk-timeout", arg, 1000000, state);
        return 0;
    case KEY_MAX_SIZE:
        parse_max_size(opt, arg, state);
        return 0;
    case KEY_FORCE:
        opt->force = true;
        return 0;
    case KEY_SPARSE:
        opt->sparse = true;
        return 0;
    case KEY_JSON:
        opt->json = true;
        return 0;
    case KEY_QUIET:
        opt->quiet = true;
        return 0;
    case KEY_TRACE:
        opt->trace = true;
        return 0;
    case ARGP_KEY_ARG:
        parse_mode(opt, arg, state);
        return 0;
    case ARGP_KEY_END:
        check_usage(opt, state);
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

// >>main

static int migrate(struct run *r) {
    struct rmig_error err;
    bool sends = r->opt.mode == MODE_SEND;
    if ((sends ? open_inputs(r) : check_outputs(r)) < 0)
        return -1;
    r->fabric = open_fabric(r->opt.fabric, r->opt.provider, &err);
    if (r->fabric == NULL)
        return fail_rmig(&r->p, EXIT_CONNECT, &err);
    int rc = sends ? send_all(r) : receive_all(r);
    if (r->ended_ns == 0)
        r->ended_ns = r->fabric->ops->now(r->fabric);
    return rc;
}

static void clean_up(struct run *r) {
    if (r->p.code != EXIT_OK && !r->kept)
        remove_parts(r);
    rmig_source_close(r->source);
    rmig_sink_close(r->sink);
    rmig_fabric_close(r->fabric);
    join_disk(r); // of a disk that was given up, too, but the source waits no more
    image_free(&r->state);
    images_free(&r->images);
    images_free(&r->opt.blocks);
}

int main(int argc, char **argv) {
    static const struct argp argp = {option_table, parse_option, "send|recv", doc, NULL, NULL, NULL};
    static struct run run;
    whole_file_hold_standard();
    run.opt.rounds = 1;
    run.opt.disk_seconds = 3600;
    run.opt.max_size = 1024 * RMIG_GIB;
    run.state = (struct image){.file.fd = -1, .map = MAP_FAILED};
    parse_arguments(&argp, &run.opt, argc, argv);
    if (run.opt.list_params) {
        list_params(&run.opt);
        images_free(&run.opt.blocks);
        return fflush(stdout) == 0 ? EXIT_OK : EXIT_FILES;
    }
    run.tty = isatty(STDERR_FILENO) && !run.opt.quiet;
    if (run.opt.trace) {
        run.opt.cfg.trace = print_trace;
        run.opt.cfg.trace_user = &run;
    }
    bus_error_run = &run;
    catch_signals(on_bus_error);
    migrate(&run);
    report(&run);
    clean_up(&run);
    return (int)run.p.code;
}
