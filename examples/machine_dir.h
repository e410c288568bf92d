/*
machine_dir.h - a machine, and the directory that holds one: written by qemu_sink and mapped_ram load, read by
qemu_source and mapped_ram save

    DIR/machine.json    what the stream said: machine, blocks in order, facts of the migration
    DIR/ram/NAME        the memory of block NAME, sparse. All but letters, digits, '_', '-' and '.' become %XX, and so
                        does a leading dot; what is longer than 255 bytes then ends in %- and a hash
    DIR/state           the state of the devices, as QEMU sent it
*/
#ifndef MACHINE_DIR_H
#define MACHINE_DIR_H

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "../rmig_qemu.h"
#include "program.h"
#include "whole_file.h"

#define FORMAT "rmig-qemu"
#define FORMAT_VERSION 1
#define MACHINE_FILE "machine.json"
#define STATE_FILE "state"
#define RAM_DIR "ram"

struct image { // a RAM block and its file
    struct rmig_qemu_block block;
    char *file; // in the directory: "ram/pc.ram"
    int fd;
    void *map;
};

struct machine {
    struct rmig_qemu_configuration configuration;
    uint32_t section_id; // of ram
    bool switchover_start; // the stream had that command
    struct image *image;
    uint32_t image_count;
    uint64_t ram_bytes, state_bytes;
};

// >>images

/* The file of a block: its name comes from a peer and must neither lead out of the directory nor hide. Different names
   stay different. */
static inline char *file_of_block(const char *name) {
    char *safe = (char *)checked(safe_name(name, false)), *out = join(RAM_DIR, safe);
    free(safe);
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

static inline int map_image(struct program *p, struct image *image, int protection) {
    image->map = mmap(NULL, image->block.length, protection, MAP_SHARED, image->fd, 0);
    return image->map != MAP_FAILED ? 0
                                    : fail(p, EXIT_FILES, "%s: cannot map %" PRIu64 " bytes: %s", image->file,
                                           image->block.length, strerror(errno));
}

/* Gives a block fresh memory behind a descriptor of its own: in a file just made, or of memory alone. */
static inline int make_image(struct program *p, struct image *image, int fd) {
    image->fd = fd;
    if (fd < 0)
        return fail(p, EXIT_FILES, "%s: no descriptor for its memory: %s", image->file, strerror(errno));
    if (ftruncate(fd, (off_t)image->block.length) < 0)
        return fail(p, EXIT_FILES, "%s: cannot make %" PRIu64 " bytes: %s", image->file, image->block.length,
                    strerror(errno));
    return map_image(p, image, PROT_READ | PROT_WRITE);
}

static inline int make_memory_image(struct program *p, struct image *image) {
    return make_image(p, image, memfd_create("guest-ram", MFD_CLOEXEC));
}

static inline bool is_ignore_shared(const struct rmig_qemu_configuration *c) {
    return (c->capabilities & RMIG_QEMU_CAPABILITY_IGNORE_SHARED) != 0;
}

// >>writing a directory

static inline json_t *uuid_json(const struct rmig_qemu_configuration *c) {
    char text[37];
    size_t n = 0;
    for (size_t i = 0; i < 16; i++)
        n += (size_t)sprintf(text + n, i == 4 || i == 6 || i == 8 || i == 10 ? "-%02x" : "%02x", c->uuid[i]);
    return c->has_uuid ? json_string(text) : json_null();
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
        if (is_ignore_shared(&m->configuration))
            json_object_set_new(object, "guest_address", json_integer((json_int_t)image->block.guest_address));
        json_array_append_new(array, object);
    }
    return array;
}

/* facts: of the stream, beside what belongs to the machine; given away. */
static inline json_t *machine_json(const struct machine *m, json_t *facts) {
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
    json_object_set_new(facts, "switchover_start", json_boolean(m->switchover_start));
    json_object_set_new(object, "stream", facts);
    return object;
}

static inline int create_in_dir(struct program *p, const struct whole_file *dir, const char *file) {
    int fd = openat(dir->fd, file, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW, 0600);
    if (fd < 0)
        fail(p, EXIT_FILES, "cannot create %s/%.100s%s: %s", dir->part, file, strlen(file) > 100 ? "..." : "",
             strerror(errno));
    return fd;
}

static inline int create_ram_dir(struct program *p, const struct whole_file *dir) {
    return mkdirat(dir->fd, RAM_DIR, 0700) == 0
               ? 0
               : fail(p, EXIT_FILES, "cannot create %s/" RAM_DIR ": %s", dir->part, strerror(errno));
}

static inline int create_image(struct program *p, const struct whole_file *dir, struct image *image) {
    int fd = create_in_dir(p, dir, image->file);
    return fd < 0 ? -1 : make_image(p, image, fd);
}

static inline int write_all(int fd, const uint8_t *p, size_t n) {
    while (n > 0) {
        ssize_t done = write(fd, p, n);
        if (done < 0 && errno == EINTR)
            continue;
        if (done == 0)
            errno = ENOSPC;
        if (done <= 0)
            return -1;
        p += done;
        n -= (size_t)done;
    }
    return 0;
}

static inline int write_machine_file(struct program *p, const struct whole_file *dir, const struct machine *m,
                                     json_t *facts) {
    int fd = create_in_dir(p, dir, MACHINE_FILE);
    json_t *object = machine_json(m, facts);
    int rc = fd < 0 || json_dumpfd(object, fd, JSON_INDENT(4)) < 0 || write(fd, "\n", 1) != 1 || fsync(fd) < 0 ? -1 : 0;
    int error = errno;
    json_decref(object);
    if (fd >= 0)
        close(fd);
    return rc < 0 ? fail(p, EXIT_FILES, "cannot write %s/" MACHINE_FILE ": %s", dir->part, strerror(error)) : 0;
}

static inline int sync_machine_dir(struct program *p, const struct whole_file *dir, const struct machine *m,
                                   int state_fd) {
    bool ok = fsync(state_fd) == 0;
    for (uint32_t i = 0; i < m->image_count && ok; i++)
        ok = fsync(m->image[i].fd) == 0;
    int ram = ok ? openat(dir->fd, RAM_DIR, O_RDONLY | O_DIRECTORY | O_CLOEXEC) : -1;
    ok = ram >= 0 && fsync(ram) == 0 && fsync(dir->fd) == 0;
    int error = errno;
    if (ram >= 0)
        close(ram);
    return ok ? 0 : fail(p, EXIT_FILES, "cannot bring %s to the disk: %s", dir->part, strerror(error));
}

/* Of what a handler of signals may call. */
static inline void remove_machine_dir(struct whole_file *dir, const struct machine *m) {
    if (dir->fd < 0)
        return;
    for (uint32_t i = 0; i < m->image_count; i++)
        unlinkat(dir->fd, m->image[i].file, 0);
    unlinkat(dir->fd, RAM_DIR, AT_REMOVEDIR);
    unlinkat(dir->fd, STATE_FILE, 0);
    unlinkat(dir->fd, MACHINE_FILE, 0);
    whole_file_remove(dir);
}

// >>reading a directory

struct machine_dir { // where reading stands
    struct program *program;
    struct machine *machine;
    const char *path;
    int fd;
};

static inline int open_below(int dir, const char *name, int how) {
    return openat(dir, name, how | O_CLOEXEC | O_NONBLOCK | O_NOFOLLOW);
}

/* What is wrong with machine.json. */
__attribute__((format(printf, 2, 3))) static inline int bad(struct machine_dir *d, const char *format, ...) {
    char text[300];
    va_list ap;
    va_start(ap, format);
    vsnprintf(text, sizeof text, format, ap);
    va_end(ap);
    for (char *c = text; *c != '\0'; c++) // what a file says is shown, not obeyed
        if ((unsigned char)*c < ' ' || *c == 0x7f)
            *c = '?';
    return fail(d->program, EXIT_FILES, "%s/" MACHINE_FILE ": %s", d->path, text);
}

static inline const char *get_text(struct machine_dir *d, const json_t *object, const char *key) {
    const char *text = json_string_value(json_object_get(object, key));
    if (text == NULL || text[0] == '\0')
        bad(d, "\"%s\" is missing, or no text", key);
    return text == NULL ? "" : text;
}

static inline uint64_t get_number(struct machine_dir *d, const json_t *object, const char *key, uint64_t min,
                                  uint64_t max) {
    const json_t *value = json_object_get(object, key);
    json_int_t number = json_integer_value(value);
    if (!json_is_integer(value) || number < 0 || (uint64_t)number < min || (uint64_t)number > max)
        bad(d, "\"%s\" is missing, or no number from %" PRIu64 " to %" PRIu64, key, min, max);
    return (uint64_t)number;
}

static inline void copy_name(struct machine_dir *d, char *out, const char *key, const char *text) {
    if (strlen(text) > RMIG_NAME_MAX)
        bad(d, "\"%s\" has %zu bytes; at most %d are allowed", key, strlen(text), RMIG_NAME_MAX);
    snprintf(out, RMIG_NAME_MAX + 1, "%s", text);
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

static inline void read_capabilities(struct machine_dir *d, const json_t *object) {
    const json_t *array = json_object_get(object, "capabilities");
    const json_t *value;
    size_t i;
    if (!json_is_array(array))
        bad(d, "\"capabilities\" is missing, or no array");
    json_array_foreach(array, i, value) {
        const char *name = json_string_value(value);
        if (name == NULL || strcmp(name, "x-ignore-shared") != 0)
            bad(d, "capability \"%s\" is not known", name == NULL ? "" : name);
        d->machine->configuration.capabilities |= RMIG_QEMU_CAPABILITY_IGNORE_SHARED;
    }
}

static inline void read_configuration(struct machine_dir *d, const json_t *object) {
    struct rmig_qemu_configuration *c = &d->machine->configuration;
    const json_t *uuid = json_object_get(object, "uuid");
    copy_name(d, c->machine, "machine", get_text(d, object, "machine"));
    if (!json_is_null(json_object_get(object, "page_bits")))
        c->page_bits = (uint32_t)get_number(d, object, "page_bits", 10, 30);
    read_capabilities(d, object);
    if (!json_is_null(uuid) && (!json_is_string(uuid) || !parse_uuid(json_string_value(uuid), c)))
        bad(d, "\"uuid\" is missing, or neither null nor 32 lower-case hexadecimal digits in groups of 8-4-4-4-12");
    d->machine->section_id = (uint32_t)get_number(d, object, "section_id", 0, UINT32_MAX);
    d->machine->switchover_start = json_is_true(json_object_get(json_object_get(object, "stream"), "switchover_start"));
}

/* Nothing is opened but what this program would have made. */
static inline void check_name(struct machine_dir *d, const char *what, const char *is, const char *must) {
    if (strcmp(is, must) != 0)
        bad(d, "the \"file\" of %s is \"%.100s\"; must be \"%.100s\"", what, is, must);
}

static inline void read_block(struct machine_dir *d, const json_t *object) {
    struct rmig_qemu_block block = {.name = ""};
    copy_name(d, block.name, "name", get_text(d, object, "name"));
    block.length = get_number(d, object, "length", 1, INT64_MAX);
    if (is_ignore_shared(&d->machine->configuration))
        block.guest_address = get_number(d, object, "guest_address", 0, INT64_MAX);
    const char *file = get_text(d, object, "file");
    if (d->program->code != EXIT_OK)
        return;
    check_name(d, block.name, file, add_image(d->machine, &block)->file);
}

static inline void read_blocks(struct machine_dir *d, const json_t *object) {
    const json_t *array = json_object_get(object, "blocks");
    size_t n = json_array_size(array);
    if (n == 0 || n > RMIG_QEMU_BLOCKS_MAX)
        bad(d, "\"blocks\" is missing, or no array of 1 to %d", RMIG_QEMU_BLOCKS_MAX);
    for (size_t i = 0; i < n && d->program->code == EXIT_OK; i++)
        read_block(d, json_array_get(array, i));
    if (d->program->code == EXIT_OK && d->machine->ram_bytes % 1024 != 0)
        bad(d, "the blocks have %" PRIu64 " bytes in all, which is no multiple of 1024", d->machine->ram_bytes);
}

static inline void read_whole_machine(struct machine_dir *d, const json_t *object) {
    const char *format = json_string_value(json_object_get(object, "format"));
    const json_t *version = json_object_get(object, "version");
    if (format == NULL || strcmp(format, FORMAT) != 0) {
        bad(d, "\"format\" is not \"" FORMAT "\": this is no directory of qemu_sink");
        return;
    }
    if (json_integer_value(version) != FORMAT_VERSION) {
        bad(d, "\"version\" is %" JSON_INTEGER_FORMAT "; this program reads version %d", json_integer_value(version),
            FORMAT_VERSION);
        return;
    }
    const json_t *state = json_object_get(object, "state");
    read_configuration(d, object);
    read_blocks(d, object);
    d->machine->state_bytes = get_number(d, state, "length", 1, INT64_MAX);
    check_name(d, "state", get_text(d, state, "file"), STATE_FILE);
}

static inline int read_machine_file(struct machine_dir *d) {
    json_error_t error;
    int fd = open_below(d->fd, MACHINE_FILE, O_RDONLY);
    struct stat st;
    if (fd < 0 || fstat(fd, &st) < 0)
        return bad(d, "cannot be read: %s", strerror(errno));
    json_t *object = S_ISREG(st.st_mode) ? json_loadfd(fd, JSON_REJECT_DUPLICATES, &error) : NULL;
    close(fd);
    if (!S_ISREG(st.st_mode))
        return bad(d, "is not a regular file");
    if (object == NULL)
        return bad(d, "line %d: %s", error.line, error.text);
    read_whole_machine(d, object);
    json_decref(object);
    return d->program->code == EXIT_OK ? 0 : -1;
}

static inline int check_file(struct machine_dir *d, int fd, const char *file, uint64_t length) {
    struct stat st;
    if (fd < 0 || fstat(fd, &st) < 0)
        return fail(d->program, EXIT_FILES, "cannot read %s/%s: %s", d->path, file,
                    errno == ELOOP ? "it is a symbolic link, which may lead out of the directory" : strerror(errno));
    if (!S_ISREG(st.st_mode))
        return fail(d->program, EXIT_FILES, "%s/%s is not a regular file", d->path, file);
    if ((uint64_t)st.st_size != length)
        return fail(d->program, EXIT_FILES, "%s/%s has %lld bytes; " MACHINE_FILE " says %" PRIu64, d->path, file,
                    (long long)st.st_size, length);
    return 0;
}

static inline int open_image(struct machine_dir *d, int ram, struct image *image, bool writable) {
    int protection = writable ? PROT_READ | PROT_WRITE : PROT_READ;
    const char *name = image->file + sizeof RAM_DIR; // behind the slash
    image->fd = open_below(ram, name, writable ? O_RDWR : O_RDONLY);
    if (image->fd < 0 && writable && errno != ENOENT && errno != EISDIR) {
        protection = PROT_READ;
        image->fd = open_below(ram, name, O_RDONLY);
    }
    if (check_file(d, image->fd, image->file, image->block.length) < 0)
        return -1;
    return map_image(d->program, image, protection);
}

static inline int open_images(struct machine_dir *d, bool writable) {
    int rc = 0, ram = open_below(d->fd, RAM_DIR, O_RDONLY | O_DIRECTORY);
    if (ram < 0)
        return fail(d->program, EXIT_FILES, "cannot read %s/" RAM_DIR ": %s", d->path, strerror(errno));
    for (uint32_t i = 0; i < d->machine->image_count && rc == 0; i++)
        rc = open_image(d, ram, &d->machine->image[i], writable);
    close(ram);
    return rc;
}

/* Reads machine.json into an empty machine, maps the RAM of all its blocks and opens the state of its devices.
   writable: where that is allowed, though nothing is written: some adapters cannot register memory that is mapped
   read-only. d: program, machine and path are filled in. No link is followed but path. */
static inline int open_machine_dir(struct machine_dir *d, bool writable, int *state_fd) {
    d->fd = open(d->path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (d->fd < 0)
        return bad(d, "%s", strerror(errno));
    int rc = read_machine_file(d);
    if (rc == 0)
        rc = open_images(d, writable);
    if (rc == 0) {
        *state_fd = open_below(d->fd, STATE_FILE, O_RDONLY);
        rc = check_file(d, *state_fd, STATE_FILE, d->machine->state_bytes);
    }
    close(d->fd);
    return rc;
}

#endif
