/*
mapped_ram - looks at snapshot files in QEMU's mapped-ram format, takes them apart, and makes them

    mapped_ram info FILE
    mapped_ram verify FILE
    mapped_ram extract FILE BLOCK OUT
    mapped_ram diff FILE FILE
    mapped_ram load FILE DIR
    mapped_ram save DIR FILE

DIR is laid out as qemu_sink does it, see machine_dir.h: so a machine that came by RDMA can be saved to a file, and one
from a file be sent by RDMA. What is written gets its name when all of it is on the disk; until then it is called
NAME.part.
*/
#define _GNU_SOURCE
#define PROGRAM "mapped_ram"
#define RMIG_IMPLEMENTATION
#include "machine_dir.h"
#include "../rmig_mapped_ram.h"

#define PIECE RMIG_MIB
enum { EXIT_DIFFERENT = 1 };

struct run {
    struct program p;
    struct machine machine;
    struct rmig_mapped_options opt;
    bool named; // command is known
    unsigned command, args;
    const char *arg[3];
    const char *file; // what is being read
    int fd, other_fd;
    struct rmig_mapped_reader *reader, *other; // diff: of the second file
    struct rmig_mapped_writer *writer;
    struct whole_file out; // what is being written
    int state_fd;
    bool in_place;
    bool different;
    json_t *result;
};

static struct run *bus_error_run; // for the handler of SIGBUS

// >>errors

static int fail_file(struct run *r, const struct rmig_error *err) {
    return fail_snapshot(&r->p, EXIT_MIGRATION, r->file, err);
}

static int fail_reader(struct run *r) { return fail_file(r, rmig_mapped_reader_error(r->reader)); }
static int fail_other(struct run *r) {
    r->file = r->arg[1];
    return fail_file(r, rmig_mapped_reader_error(r->other));
}

static int fail_writer(struct run *r) { return fail_file(r, rmig_mapped_writer_error(r->writer)); }

static void remove_part(struct run *r) {
    struct stat st;
    if (r->out.fd >= 0 && fstat(r->out.fd, &st) == 0 && S_ISDIR(st.st_mode))
        remove_machine_dir(&r->out, &r->machine);
    else
        whole_file_remove(&r->out);
}

static void on_bus_error(int number) {
    static const char text[] = PROGRAM ": a mapped file cannot be accessed: it was cut, or the disk or a quota is full\n";
    (void)number;
    if (write(STDERR_FILENO, text, sizeof text - 1) >= 0)
        remove_part(bus_error_run);
    _exit(EXIT_FILES);
}

static int on_progress(void *user, const struct rmig_stats *stats) {
    (void)user;
    (void)stats;
    return cancelled;
}

static bool is_cancelled(void *user) {
    (void)user;
    return cancelled;
}

// >>names: what is written gets its own when it is whole

static int open_part(struct run *r, const char *path, int flags) {
    struct rmig_error err;
    return whole_file_open(&r->out, path, flags, &err) < 0 ? fail_rmig(&r->p, EXIT_FILES, &err) : 0;
}

/* What the file has before --offset is not ours: it stays. */
static int open_snapshot(struct run *r, const char *path) {
    struct rmig_error err;
    int flags = WHOLE_FILE_MAY_BE_IN_PLACE | (r->in_place ? WHOLE_FILE_IN_PLACE : 0);
    if (open_part(r, path, flags) < 0)
        return -1;
    return whole_file_keep(&r->out, r->opt.offset, is_cancelled, NULL, &err) < 0 ? fail_rmig(&r->p, EXIT_FILES, &err) : 0;
}

static int commit(struct run *r) {
    struct rmig_error err;
    return whole_file_commit(&r->out, !r->opt.no_sync, &err) < 0 ? fail_rmig(&r->p, EXIT_FILES, &err) : 0;
}

/* What is written must not be what is read: it would be gone when it is still needed. */
static int refuse_same(struct run *r, int fd, const char *from) {
    struct stat in, out;
    const char *to = r->out.target;
    if (fd < 0 || fstat(fd, &in) < 0 || stat(to, &out) < 0 || in.st_ino != out.st_ino || in.st_dev != out.st_dev)
        return 0;
    return fail(&r->p, EXIT_USAGE, "%s is what is read (%s): name another file", r->out.path, from);
}

// >>reading

static int open_reader(struct run *r, const char *path, int *fd, struct rmig_mapped_reader **reader) {
    struct rmig_error err;
    r->file = path;
    *fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); // a pipe is refused, not waited for
    if (*fd < 0)
        return fail(&r->p, EXIT_FILES, "cannot read %s: %s", path, strerror(errno));
    if (whole_file_lock_to_read(*fd, path, &err) < 0)
        return fail(&r->p, EXIT_FILES, "%s", err.text);
    return rmig_mapped_reader_open(*fd, &r->opt, reader, &err) < 0 ? fail_file(r, &err) : 0;
}

/* Calls f for each piece of a block that has pages in the file. */
typedef int (*piece_fn)(struct run *r, void *user, uint64_t offset, const uint8_t *p, uint64_t n);

static int each_piece(struct run *r, uint32_t block, piece_fn f, void *user) {
    const struct rmig_mapped_block *b;
    rmig_mapped_reader_blocks(r->reader, &b);
    b += block;
    uint64_t most = b->page_size > PIECE ? b->page_size : PIECE;
    uint8_t *buf = checked(aligned_alloc(4096, most));
    int rc = 0;
    for (uint64_t at = 0, n; at < b->length && rc == 0; at += n) {
        n = b->length - at < most ? b->length - at : most;
        if (cancelled)
            rc = fail(&r->p, EXIT_CANCELLED, "cancelled");
        else if (rmig_mapped_reader_read(r->reader, block, at, buf, n) < 0)
            rc = fail_reader(r);
        else if (!rmig_is_zero(buf, n))
            rc = f(r, user, at, buf, n);
    }
    free(buf);
    return rc;
}

// >>info

static json_t *all_capabilities(uint32_t capabilities) {
    json_t *array = capabilities_json(capabilities);
    if ((capabilities & RMIG_QEMU_CAPABILITY_MAPPED_RAM) != 0)
        json_array_append_new(array, json_string("mapped-ram"));
    return array;
}

static json_t *block_json(const struct rmig_mapped_block *b) {
    json_t *object = checked(json_object());
    json_object_set_new(object, "name", text_json(b->name));
    json_object_set_new(object, "version", json_integer(1));
    json_object_set_new(object, "length", json_integer((json_int_t)b->length));
    json_object_set_new(object, "page_size", json_integer((json_int_t)b->page_size));
    json_object_set_new(object, "pages", json_integer((json_int_t)(b->length / b->page_size)));
    json_object_set_new(object, "pages_set", json_integer((json_int_t)b->pages_set));
    json_object_set_new(object, "guest_address", json_integer((json_int_t)b->guest_address));
    json_object_set_new(object, "bitmap_offset", json_integer((json_int_t)b->bitmap_offset));
    json_object_set_new(object, "pages_offset", json_integer((json_int_t)b->pages_offset));
    json_object_set_new(object, "ignored", json_boolean(b->ignored));
    return object;
}

static json_t *info_json(struct run *r, const struct stat *st) {
    const struct rmig_mapped_machine *m = rmig_mapped_reader_machine(r->reader);
    const struct rmig_mapped_block *b;
    uint32_t n = rmig_mapped_reader_blocks(r->reader, &b);
    bool whole = rmig_mapped_reader_whole(r->reader);
    json_t *object = checked(json_object()), *blocks = checked(json_array());
    for (uint32_t i = 0; i < n; i++)
        json_array_append_new(blocks, block_json(&b[i]));
    json_object_set_new(object, "whole", json_boolean(whole));
    json_object_set_new(object, "why", whole ? json_null() : text_json(rmig_mapped_reader_error(r->reader)->text));
    json_object_set_new(object, "machine", text_json(m->configuration.machine));
    json_object_set_new(object, "page_bits", json_integer(m->configuration.page_bits));
    json_object_set_new(object, "capabilities", all_capabilities(m->configuration.capabilities));
    json_object_set_new(object, "uuid", uuid_json(&m->configuration));
    json_object_set_new(object, "section_id", json_integer(m->section_id));
    json_object_set_new(object, "switchover_start", json_boolean(m->switchover_start));
    json_object_set_new(object, "state_bytes", json_integer((json_int_t)rmig_mapped_reader_state_size(r->reader)));
    json_object_set_new(object, "file_bytes", json_integer(st->st_size));
    json_object_set_new(object, "file_allocated", json_integer(st->st_blocks * 512));
    json_object_set_new(object, "blocks", blocks);
    return object;
}

static void print_info(struct run *r, const struct stat *st) {
    const struct rmig_mapped_machine *m = rmig_mapped_reader_machine(r->reader);
    const struct rmig_mapped_block *b;
    uint32_t capabilities = m->configuration.capabilities;
    uint32_t n = rmig_mapped_reader_blocks(r->reader, &b);
    char size[32], held[32];
    bool whole = rmig_mapped_reader_whole(r->reader);
    printf("machine       %s\n", m->configuration.machine);
    printf("whole         %s%s\n", whole ? "yes" : "no: ", whole ? "" : rmig_mapped_reader_error(r->reader)->text);
    printf("capabilities %s%s\n", (capabilities & RMIG_QEMU_CAPABILITY_MAPPED_RAM) != 0 ? " mapped-ram" : "",
           (capabilities & RMIG_QEMU_CAPABILITY_IGNORE_SHARED) != 0 ? " x-ignore-shared" : "");
    printf("device state  %" PRIu64 " bytes\n", rmig_mapped_reader_state_size(r->reader));
    printf("file          %s, %s of it on the disk\n", rmig_size_format((uint64_t)st->st_size, size, sizeof size),
           rmig_size_format((uint64_t)st->st_blocks * 512, held, sizeof held));
    printf("%-32s %10s %10s %10s %14s\n", "block", "length", "pages", "in file", "pages at");
    for (uint32_t i = 0; i < n; i++)
        printf("%-32s %10s %10" PRIu64 " %10" PRIu64 " %#14" PRIx64 "%s\n", b[i].name,
               rmig_size_format(b[i].length, size, sizeof size), b[i].length / b[i].page_size, b[i].pages_set,
               b[i].pages_offset, b[i].ignored ? " shared, not in the file" : "");
}

static int do_info(struct run *r) {
    struct stat st;
    r->opt.incomplete = true;
    if (open_reader(r, r->arg[0], &r->fd, &r->reader) < 0)
        return -1;
    if (fstat(r->fd, &st) < 0 || (S_ISBLK(st.st_mode) && (st.st_size = lseek(r->fd, 0, SEEK_END)) < 0))
        return fail(&r->p, EXIT_FILES, "%s: %s", r->file, strerror(errno));
    if (r->p.json)
        json_object_set_new(r->result, "info", info_json(r, &st));
    else
        print_info(r, &st);
    return rmig_mapped_reader_whole(r->reader) ? 0 : fail_reader(r);
}

// >>verify

static int count_bytes(struct run *r, void *user, uint64_t offset, const uint8_t *p, uint64_t n) {
    (void)r;
    (void)offset;
    (void)p;
    *(uint64_t *)user += n;
    return 0;
}

static int read_state(struct run *r, int out) {
    uint8_t piece[65536];
    int64_t got;
    while ((got = rmig_mapped_reader_get(r->reader, piece, sizeof piece)) > 0) {
        if (cancelled)
            return fail(&r->p, EXIT_CANCELLED, "cancelled");
        if (out >= 0 && write_all(out, piece, (size_t)got) < 0)
            return fail(&r->p, EXIT_FILES, "cannot write %s/" STATE_FILE ": %s", r->out.part, strerror(errno));
    }
    return got < 0 ? fail_reader(r) : 0;
}

static int do_verify(struct run *r) {
    const struct rmig_mapped_block *b;
    uint64_t bytes = 0;
    if (open_reader(r, r->arg[0], &r->fd, &r->reader) < 0)
        return -1;
    uint32_t n = rmig_mapped_reader_blocks(r->reader, &b);
    for (uint32_t i = 0; i < n; i++)
        if (!b[i].ignored && each_piece(r, i, count_bytes, &bytes) < 0)
            return -1;
    if (read_state(r, -1) < 0)
        return -1;
    if (!r->p.json && !r->p.quiet)
        printf("%s is whole: %u blocks, %" PRIu64 " bytes of device state\n", r->file, n,
               rmig_mapped_reader_state_size(r->reader));
    return 0;
}

// >>extract

static int find_block(struct run *r, const char *name, uint32_t *block) {
    const struct rmig_mapped_block *b;
    uint32_t n = rmig_mapped_reader_blocks(r->reader, &b);
    for (uint32_t i = 0; i < n; i++) {
        if (strcmp(b[i].name, name) != 0)
            continue;
        *block = i;
        return b[i].ignored
                   ? fail(&r->p, EXIT_MIGRATION, "%s: block %s is shared: it is not in the file", r->file, name)
                   : 0;
    }
    return fail(&r->p, EXIT_USAGE, "%s has no block %s; info lists them", r->file, name);
}

/* Pages of zeros stay holes. */
static int write_piece(struct run *r, void *user, uint64_t offset, const uint8_t *p, uint64_t n) {
    uint64_t page = *(uint64_t *)user;
    for (uint64_t at = 0, run; at < n; at += run) {
        bool zero = rmig_is_zero(p + at, page);
        for (run = page; at + run < n && rmig_is_zero(p + at + run, page) == zero;)
            run += page;
        for (uint64_t done = 0; !zero && done < run;) {
            ssize_t got = pwrite(r->out.fd, p + at + done, run - done, (off_t)(offset + at + done));
            if (got < 0 && errno == EINTR)
                continue;
            if (got <= 0)
                return fail(&r->p, EXIT_FILES, "cannot write %s: %s", r->out.part, strerror(got < 0 ? errno : ENOSPC));
            done += (uint64_t)got;
        }
    }
    return 0;
}

static int do_extract(struct run *r) {
    const struct rmig_mapped_block *b;
    uint32_t block = 0;
    if (open_reader(r, r->arg[0], &r->fd, &r->reader) < 0 || find_block(r, r->arg[1], &block) < 0 ||
        open_part(r, r->arg[2], 0) < 0 || refuse_same(r, r->fd, r->arg[0]) < 0)
        return -1;
    rmig_mapped_reader_blocks(r->reader, &b);
    uint64_t page = b[block].page_size;
    if (ftruncate(r->out.fd, (off_t)b[block].length) < 0)
        return fail(&r->p, EXIT_FILES, "cannot make %s of %" PRIu64 " bytes: %s", r->out.part, b[block].length,
                    strerror(errno));
    if (each_piece(r, block, write_piece, &page) < 0)
        return -1;
    struct rmig_error err;
    if (!r->opt.no_sync && whole_file_sync(&r->out, &err) < 0)
        return fail_rmig(&r->p, EXIT_FILES, &err);
    return commit(r);
}

// >>diff

static void tell(struct run *r, json_t *object) {
    r->different = true;
    json_array_append_new(json_object_get(r->result, "differences"), checked(object));
}

static void tell_range(struct run *r, const char *block, uint64_t from, uint64_t to) {
    if (!r->p.json)
        printf("%s 0x%" PRIx64 "-0x%" PRIx64 "\n", block, from, to);
    tell(r, json_pack("{s:o, s:I, s:I}", "block", text_json(block), "from", (json_int_t)from, "to", (json_int_t)to));
}

static void tell_text(struct run *r, const char *what, const char *text) {
    if (!r->p.json)
        printf("%s %s\n", what, text);
    tell(r, json_pack("{s:o, s:s}", "what", text_json(what), "text", text));
}

struct pair { // a block in both files
    const struct rmig_mapped_block *a, *b;
    uint32_t index_a, index_b;
    uint8_t *piece_a, *piece_b;
    uint64_t from, to; // pages that differ, and follow each other; to 0: none
};

static void compare_piece(struct run *r, struct pair *p, uint64_t offset, uint64_t n) {
    uint64_t page = p->a->page_size < p->b->page_size ? p->a->page_size : p->b->page_size;
    for (uint64_t at = 0; at < n; at += page) {
        if (memcmp(p->piece_a + at, p->piece_b + at, page) == 0)
            continue;
        if (p->to != 0 && p->to != offset + at) {
            tell_range(r, p->a->name, p->from, p->to);
            p->to = 0;
        }
        p->from = p->to == 0 ? offset + at : p->from;
        p->to = offset + at + page;
    }
}

static int compare_block(struct run *r, struct pair *p) {
    uint64_t most = p->a->page_size > p->b->page_size ? p->a->page_size : p->b->page_size;
    most = most > PIECE ? most : PIECE;
    p->piece_a = checked(aligned_alloc(4096, most));
    p->piece_b = checked(aligned_alloc(4096, most));
    int rc = 0;
    for (uint64_t at = 0, n; at < p->a->length && rc == 0; at += n) {
        n = p->a->length - at < most ? p->a->length - at : most;
        if (cancelled)
            rc = fail(&r->p, EXIT_CANCELLED, "cancelled");
        else if (rmig_mapped_reader_read(r->reader, p->index_a, at, p->piece_a, n) < 0)
            rc = fail_reader(r);
        else if (rmig_mapped_reader_read(r->other, p->index_b, at, p->piece_b, n) < 0)
            rc = fail_other(r);
        else
            compare_piece(r, p, at, n);
    }
    if (p->to != 0)
        tell_range(r, p->a->name, p->from, p->to);
    free(p->piece_a);
    free(p->piece_b);
    return rc;
}

static uint32_t index_of(const struct rmig_mapped_block *blocks, uint32_t n, const char *name) {
    uint32_t i = 0;
    while (i < n && strcmp(blocks[i].name, name) != 0)
        i++;
    return i;
}

static int compare_blocks(struct run *r) {
    const struct rmig_mapped_block *a, *b;
    uint32_t n = rmig_mapped_reader_blocks(r->reader, &a), m = rmig_mapped_reader_blocks(r->other, &b);
    for (uint32_t i = 0; i < n; i++) {
        struct pair pair = {.a = &a[i], .index_a = i, .index_b = index_of(b, m, a[i].name)};
        pair.b = &b[pair.index_b];
        if (pair.index_b == m)
            tell_text(r, a[i].name, "is only in the first file");
        else if (pair.a->ignored != pair.b->ignored)
            tell_text(r, a[i].name, "is shared, and so not in one of the files");
        else if (pair.a->length != pair.b->length)
            tell_text(r, a[i].name, "differs in length");
        else if (!pair.a->ignored && compare_block(r, &pair) < 0)
            return -1;
    }
    for (uint32_t i = 0; i < m; i++)
        if (index_of(a, n, b[i].name) == n)
            tell_text(r, b[i].name, "is only in the second file");
    return 0;
}

static int compare_states(struct run *r) {
    uint8_t a[32768], b[sizeof a];
    int64_t n, m;
    bool same = rmig_mapped_reader_state_size(r->reader) == rmig_mapped_reader_state_size(r->other);
    do {
        n = rmig_mapped_reader_get(r->reader, a, sizeof a);
        m = rmig_mapped_reader_get(r->other, b, sizeof b);
        if (n < 0 || m < 0)
            return n < 0 ? fail_reader(r) : fail_other(r);
        if (cancelled)
            return fail(&r->p, EXIT_CANCELLED, "cancelled");
        same = same && n == m && memcmp(a, b, (size_t)n) == 0;
    } while (same && n > 0);
    if (!same)
        tell_text(r, "device state", "differs");
    return 0;
}

static int do_diff(struct run *r) {
    if (open_reader(r, r->arg[1], &r->other_fd, &r->other) < 0 || open_reader(r, r->arg[0], &r->fd, &r->reader) < 0)
        return -1;
    json_object_set_new(r->result, "differences", checked(json_array()));
    const struct rmig_mapped_machine a = *rmig_mapped_reader_machine(r->reader);
    const struct rmig_mapped_machine b = *rmig_mapped_reader_machine(r->other);
    if (strcmp(a.configuration.machine, b.configuration.machine) != 0)
        tell_text(r, "machine", "differs");
    return compare_blocks(r) < 0 ? -1 : compare_states(r);
}

// >>load

static int make_dir(struct run *r, const char *path) {
    struct rmig_error err;
    if (whole_file_open_dir(&r->out, path, &err) < 0)
        return fail_rmig(&r->p, EXIT_FILES, &err);
    return create_ram_dir(&r->p, &r->out);
}

static int load_images(struct run *r) {
    const struct rmig_mapped_block *b;
    uint32_t n = rmig_mapped_reader_blocks(r->reader, &b);
    uint64_t guest_offset = 0;
    for (uint32_t i = 0; i < n; i++) {
        struct rmig_qemu_block block = {.length = b[i].length, .guest_address = b[i].guest_address};
        snprintf(block.name, sizeof block.name, "%s", b[i].name);
        if (b[i].ignored)
            return fail(&r->p, EXIT_MIGRATION, "%s: block %s is shared: it is not in the file", r->file, b[i].name);
        struct image *image = add_image(&r->machine, &block);
        if (create_image(&r->p, &r->out, image) < 0)
            return -1;
        struct rmig_block_desc desc = describe(image, &guest_offset);
        if (rmig_mapped_reader_add_block(r->reader, &desc) < 0)
            return fail_reader(r);
    }
    return rmig_mapped_reader_load(r->reader) < 0 ? fail_reader(r) : 0;
}

static int write_machine(struct run *r) {
    struct machine *m = &r->machine;
    const struct rmig_mapped_machine *from = rmig_mapped_reader_machine(r->reader);
    m->configuration = from->configuration;
    m->section_id = from->section_id;
    m->switchover_start = from->switchover_start;
    m->state_bytes = rmig_mapped_reader_state_size(r->reader);
    return write_machine_file(&r->p, &r->out, m, checked(json_object()));
}

static int do_load(struct run *r) {
    r->opt.memory_is_zero = true; // a file just made
    if (open_reader(r, r->arg[0], &r->fd, &r->reader) < 0 || make_dir(r, r->arg[1]) < 0 || load_images(r) < 0)
        return -1;
    r->state_fd = create_in_dir(&r->p, &r->out, STATE_FILE);
    if (r->state_fd < 0 || read_state(r, r->state_fd) < 0 || write_machine(r) < 0)
        return -1;
    if (!r->opt.no_sync && sync_machine_dir(&r->p, &r->out, &r->machine, r->state_fd) < 0)
        return -1;
    return commit(r);
}

// >>save

static int read_dir(struct run *r) {
    struct machine_dir dir = {.program = &r->p, .machine = &r->machine, .path = r->arg[0]};
    int rc = open_machine_dir(&dir, false, &r->state_fd);
    if (rc == 0 && is_ignore_shared(&r->machine.configuration))
        return fail(&r->p, EXIT_FILES,
                    "%s: the machine has the capability x-ignore-shared, with which no QEMU before 11.0 loads a file",
                    r->arg[0]);
    return rc;
}

static int add_images(struct run *r) {
    uint64_t guest_offset = 0;
    for (uint32_t i = 0; i < r->machine.image_count; i++) {
        uint32_t index;
        struct rmig_block_desc desc = describe(&r->machine.image[i], &guest_offset);
        if (rmig_mapped_writer_add_block(r->writer, &desc, &index) < 0)
            return fail_writer(r);
    }
    return 0;
}

static int save_ram(struct run *r) {
    if (rmig_mapped_writer_begin_round(r->writer) < 0)
        return fail_writer(r);
    for (uint32_t i = 0; i < r->machine.image_count; i++)
        if (rmig_mapped_writer_save_range(r->writer, i, 0, r->machine.image[i].block.length) < 0)
            return fail_writer(r);
    return rmig_mapped_writer_end_round(r->writer) < 0 ? fail_writer(r) : 0;
}

static int save_state(struct run *r) {
    uint8_t piece[65536];
    ssize_t got;
    while ((got = read(r->state_fd, piece, sizeof piece)) > 0) {
        if (cancelled)
            return fail(&r->p, EXIT_CANCELLED, "cancelled");
        if (rmig_mapped_writer_put(r->writer, piece, (size_t)got) < 0)
            return fail_writer(r);
    }
    return got < 0 ? fail(&r->p, EXIT_FILES, "cannot read %s/" STATE_FILE ": %s", r->arg[0], strerror(errno)) : 0;
}

static int do_save(struct run *r) {
    struct rmig_error err;
    if (read_dir(r) < 0 || open_snapshot(r, r->arg[1]) < 0)
        return -1;
    const struct rmig_mapped_machine machine = {.configuration = r->machine.configuration,
                                                .section_id = r->machine.section_id,
                                                .switchover_start = r->machine.switchover_start};
    for (uint32_t i = 0; i < r->machine.image_count; i++)
        if (refuse_same(r, r->machine.image[i].fd, r->machine.image[i].file) < 0)
            return -1;
    if (refuse_same(r, r->state_fd, STATE_FILE) < 0)
        return -1;
    r->file = r->out.part;
    if (rmig_mapped_writer_open(r->out.fd, &r->opt, &r->writer, &err) < 0)
        return fail_file(r, &err);
    if (add_images(r) < 0)
        return -1;
    if (rmig_mapped_writer_start(r->writer, &machine) < 0)
        return fail_writer(r);
    if (save_ram(r) < 0 || save_state(r) < 0)
        return -1;
    if (rmig_mapped_writer_finish(r->writer) < 0)
        return fail_writer(r);
    return commit(r);
}

// >>result

static json_t *stats_object(const struct run *r) {
    struct rmig_stats st = {0};
    if (r->writer != NULL)
        rmig_mapped_writer_stats(r->writer, &st);
    else if (r->reader != NULL)
        rmig_mapped_reader_stats(r->reader, &st);
    return json_pack("{s:I, s:I, s:I, s:I}", "bytes_written", (json_int_t)st.bytes_written, "bytes_zero",
                     (json_int_t)st.bytes_zero, "state_bytes", (json_int_t)st.stream_bytes, "ns",
                     (json_int_t)st.round_ns);
}

static int exit_code(const struct run *r) {
    return r->p.code == EXIT_OK && r->different ? EXIT_DIFFERENT : (int)r->p.code;
}

static void print_result(struct run *r) {
    if (r->p.code != EXIT_OK)
        fprintf(stderr, PROGRAM ": %s\n", r->p.text);
    if (r->p.json) {
        json_object_set_new(r->result, "ok", json_boolean(r->p.code == EXIT_OK));
        json_object_set_new(r->result, "exit_code", json_integer(exit_code(r)));
        json_object_set_new(r->result, "status", status_json(&r->p));
        json_object_set_new(r->result, "error", r->p.code == EXIT_OK ? json_null() : text_json(r->p.text));
        json_object_set_new(r->result, "stats", stats_object(r));
        json_dumpf(r->result, stdout, JSON_COMPACT);
        putchar('\n');
    }
    if (fflush(stdout) != 0 && r->p.code == EXIT_OK) {
        fprintf(stderr, PROGRAM ": cannot write to the standard output: %s\n", strerror(errno));
        r->p.code = EXIT_FILES;
    }
}

// >>arguments and main

enum key {
    KEY_ALIGN = 'a',
    KEY_DIRECT = 'd',
    KEY_OFFSET = 'o',
    KEY_QUIET = 'q',
    KEY_THREADS = 't',
    KEY_NO_SYNC = 0x100,
    KEY_EVERY,
    KEY_NO_URING,
    KEY_IN_PLACE,
    KEY_JSON
};

static const struct argp_option option_table[] = {
    {"threads", KEY_THREADS, "N", 0, "load and save by N threads, 1 to 64 (default 1)", 0},
    {"direct", KEY_DIRECT, NULL, 0, "direct I/O: past the page cache", 0},
    {"offset", KEY_OFFSET, "SIZE", 0,
     "where the stream begins in the file, as in QEMU's file:PATH,offset= (default 0); what lies before is kept", 0},
    {"align", KEY_ALIGN, "SIZE", 0, "save: page regions begin at multiples of it (default 1M)", 0},
    {"every-page", KEY_EVERY, NULL, 0, "save: write pages of zeros too", 0},
    {"in-place", KEY_IN_PLACE, NULL, 0,
     "save: into FILE itself, which must be there: a file, or a block device. What it holds behind --offset is lost at "
     "once, whatever comes",
     0},
    {"no-sync", KEY_NO_SYNC, NULL, 0, "do not wait until what is written is on the disk", 0},
    {"no-uring", KEY_NO_URING, NULL, 0, "do without io_uring", 0},
    {"json", KEY_JSON, NULL, 0, "print the result as JSON, one object", 0},
    {"quiet", KEY_QUIET, NULL, 0, "no summary", 0},
    {NULL, 0, NULL, 0, NULL, 0},
};

static const char doc[] = "Looks at snapshot files in QEMU's mapped-ram format, takes them apart, and makes them.\v"
                          "  info FILE               machine, blocks, pages in the file, whether it is whole\n"
                          "  verify FILE             reads and checks all of it\n"
                          "  extract FILE BLOCK OUT  the memory of one block\n"
                          "  diff FILE FILE          pages that differ, as ranges of bytes in their block\n"
                          "  load FILE DIR           into the new directory DIR, laid out as by qemu_sink\n"
                          "  save DIR FILE           such a directory into a file; an older FILE stays until the\n"
                          "                          new one is whole\n\n"
                          "Exit status:\n"
                          "  0  all is well; diff: no difference\n"
                          "  1  diff: something differs\n"
                          "  2  bad usage, or a bad parameter\n"
                          "  3  a file cannot be read or written\n"
                          "  5  a file is not a whole snapshot, or what it holds does not fit\n"
                          "  7  cancelled by a signal (one that dumps core ends it at once)";

static const struct {
    const char *name;
    unsigned args;
    int (*run)(struct run *r);
} commands[] = {{"info", 1, do_info}, {"verify", 1, do_verify}, {"extract", 3, do_extract},
                {"diff", 2, do_diff}, {"load", 2, do_load},     {"save", 2, do_save}};
enum { COMMANDS = sizeof commands / sizeof commands[0] };

static void parse_word(struct run *r, const char *arg, struct argp_state *state) {
    if (!r->named) {
        while (r->command < COMMANDS && strcmp(commands[r->command].name, arg) != 0)
            r->command++;
        if (r->command == COMMANDS)
            argp_error(state, "no command %s: there are info, verify, extract, diff, load and save", arg);
        r->named = true;
        return;
    }
    if (r->args == commands[r->command].args)
        argp_error(state, "unexpected argument %s", arg);
    else
        r->arg[r->args++] = arg;
}

static error_t parse_option(int key, char *arg, struct argp_state *state) {
    struct run *r = state->input;
    switch (key) {
    case KEY_THREADS:
        r->opt.threads = (uint32_t)parse_count("--threads", arg, RMIG_MAPPED_THREADS_MAX, state);
        return 0;
    case KEY_DIRECT:
        r->opt.direct = true;
        return 0;
    case KEY_OFFSET:
        parse_size("--offset", arg, &r->opt.offset, state);
        return 0;
    case KEY_ALIGN:
        parse_size("--align", arg, &r->opt.file_align, state);
        return 0;
    case KEY_EVERY:
        r->opt.no_zero_detect = true;
        return 0;
    case KEY_NO_SYNC:
        r->opt.no_sync = true;
        return 0;
    case KEY_IN_PLACE:
        r->in_place = true;
        return 0;
    case KEY_NO_URING:
        r->opt.no_uring = true;
        return 0;
    case KEY_JSON:
        r->p.json = true;
        return 0;
    case KEY_QUIET:
        r->p.quiet = true;
        return 0;
    case ARGP_KEY_ARG:
        parse_word(r, arg, state);
        return 0;
    case ARGP_KEY_END:
        if (!r->named)
            argp_error(state, "a command is wanted: info, verify, extract, diff, load or save");
        else if (r->args != commands[r->command].args)
            argp_error(state, "%s wants %u arguments, see --help", commands[r->command].name,
                       commands[r->command].args);
        else if (r->in_place && commands[r->command].run != do_save)
            argp_error(state, "--in-place is for save");
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

static void clean_up(struct run *r) {
    if (r->p.code != EXIT_OK)
        remove_part(r);
    rmig_mapped_writer_close(r->writer);
    rmig_mapped_reader_close(r->reader);
    rmig_mapped_reader_close(r->other);
    machine_free(&r->machine);
    int fds[] = {r->fd, r->other_fd, r->state_fd};
    for (size_t i = 0; i < sizeof fds / sizeof fds[0]; i++)
        if (fds[i] >= 0)
            close(fds[i]);
    whole_file_free(&r->out);
    json_decref(r->result);
}

int main(int argc, char **argv) {
    static struct run run;
    static const struct argp argp = {option_table, parse_option, "COMMAND ARGUMENT...", doc, NULL, NULL, NULL};
    whole_file_hold_standard();
    run.fd = run.other_fd = run.out.fd = run.state_fd = -1;
    run.opt.progress = on_progress;
    parse_arguments(&argp, &run, argc, argv);
    run.result = checked(json_object());
    bus_error_run = &run;
    catch_signals(on_bus_error);
    commands[run.command].run(&run);
    print_result(&run);
    clean_up(&run);
    return exit_code(&run);
}
