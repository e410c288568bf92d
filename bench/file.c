/* Snapshot files: RAM as a hypervisor has it, saved to a file, and loaded into fresh memory.

   file image RAM DATA     makes RAM of --bytes: runs of 64 KiB to 4 MiB, random or zero by turns, half of it each; and
                           DATA, the random ones one behind the other: what a file of that RAM has to hold
   file save RAM FILE      RAM is mapped and populated before, as a guest that has run left it
   file load FILE [RAM]    into new shared memory of its own; compares it with RAM afterwards

   file map RAM            until RAM, a file of shared memory, is mapped with all its pages, as load leaves it

   Prints one line of JSON, times in nanoseconds. ns: from opening FILE until it has its name and is on the disk, or
   until memory holds it all and the device state is read. first_touch_ns: from opening FILE until a byte of a random
   page that the file holds was read: with --lazy while the rest is still coming. */
#define _GNU_SOURCE
#define RMIG_IMPLEMENTATION
#include "../examples/whole_file.h"
#include "../rmig_mapped_ram.h"

#include <argp.h>
#include <inttypes.h>
#include <sys/mman.h>

#if !defined(MADV_POPULATE_READ)
#define MADV_POPULATE_READ 22
#endif
#define PIECE RMIG_MIB
#define STATE_END "{\"devices\":[]}"
#define LOAD_LIMIT_NS 600000000000u

enum command { IMAGE, SAVE, LOAD, MAP };

struct options {
    enum command command;
    int args;
    const char *arg[2];
    uint64_t bytes, seed;
    bool lazy;
    struct rmig_mapped_options mapped;
};

static struct whole_file *unfinished; // removed when the program dies of an error

static void die(const char *what, const char *why) {
    fprintf(stderr, "file: %s: %s\n", what, why);
    if (unfinished != NULL)
        whole_file_remove(unfinished);
    exit(1);
}

static uint64_t lesser(uint64_t a, uint64_t b) { return a < b ? a : b; }

static uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static uint64_t next_random(uint64_t *seed) { // splitmix64
    uint64_t z = *seed += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

// >>image

static void put(int fd, const char *path, const void *p, uint64_t n) {
    ssize_t done = write(fd, p, n);
    if (done < 0 || (uint64_t)done != n)
        die(path, done < 0 ? strerror(errno) : "no space");
}

static int create(const char *path) {
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    if (fd < 0)
        die(path, strerror(errno));
    return fd;
}

static void make_image(struct options *o) {
    static uint64_t piece[PIECE / 8];
    static const uint8_t zeros[PIECE];
    int ram = create(o->arg[0]), data = create(o->arg[1]);
    uint64_t left[2] = {o->bytes / 2, o->bytes / 2}; // of zeros, of random bytes
    for (unsigned random = 1; left[0] + left[1] > 0; random = !random) {
        uint64_t run = lesser(left[random], (16 + next_random(&o->seed) % 1009) * 4096);
        left[random] -= run;
        for (uint64_t n; run > 0; run -= n) { // zeros are written too: memory that the guest has used
            n = lesser(run, PIECE);
            for (uint64_t i = 0; random && i < n / 8; i++)
                piece[i] = next_random(&o->seed);
            put(ram, o->arg[0], random ? (const void *)piece : zeros, n);
            if (random)
                put(data, o->arg[1], piece, n);
        }
    }
    close(ram);
    close(data);
}

// >>save

static struct rmig_block_desc map_ram(const char *path, int flags) {
    struct rmig_block_desc ram = {.name = "pc.ram", .backing = RMIG_BACKING_SHARED_FD};
    struct stat st;
    ram.fd = open(path, O_RDWR | O_CLOEXEC);
    if (ram.fd < 0 || fstat(ram.fd, &st) < 0)
        die(path, strerror(errno));
    if (st.st_size == 0 || st.st_size % 4096 != 0)
        die(path, "its size must be a multiple of 4096 above 0");
    ram.length = (uint64_t)st.st_size;
    ram.host = mmap(NULL, ram.length, PROT_READ | PROT_WRITE, MAP_SHARED | flags, ram.fd, 0);
    if (ram.host == MAP_FAILED)
        die(path, strerror(errno));
    return ram;
}

static void save_all(struct options *o, int fd, const struct rmig_block_desc *ram, struct rmig_stats *stats) {
    struct rmig_mapped_machine machine = {.configuration.machine = "pc-q35-10.0"};
    struct rmig_mapped_writer *w;
    struct rmig_error err;
    uint8_t state[64];
    uint32_t block;
    int n = rmig_qemu_encode_end(state, sizeof state, STATE_END, sizeof STATE_END - 1);
    if (rmig_mapped_writer_open(fd, &o->mapped, &w, &err) < 0)
        die("open", err.text);
    if (n < 0 || rmig_mapped_writer_add_block(w, ram, &block) < 0 || rmig_mapped_writer_start(w, &machine) < 0 ||
        rmig_mapped_writer_begin_round(w) < 0 || rmig_mapped_writer_save_range(w, block, 0, ram->length) < 0 ||
        rmig_mapped_writer_end_round(w) < 0 || rmig_mapped_writer_put(w, state, (size_t)n) < 0 ||
        rmig_mapped_writer_finish(w) < 0)
        die("save", rmig_mapped_writer_error(w)->text);
    rmig_mapped_writer_stats(w, stats);
    rmig_mapped_writer_close(w);
}

static void save(struct options *o) {
    struct rmig_block_desc ram = map_ram(o->arg[0], MAP_POPULATE);
    struct whole_file file;
    struct rmig_stats stats;
    struct rmig_error err;
    uint64_t began = now_ns();
    if (whole_file_open(&file, o->arg[1], &err) < 0)
        die("create", err.text);
    unfinished = &file;
    save_all(o, file.fd, &ram, &stats);
    if (whole_file_commit(&file, !o->mapped.no_sync, &err) < 0)
        die("commit", err.text);
    uint64_t ended = now_ns();
    unfinished = NULL;
    whole_file_free(&file);
    printf("{\"ns\": %" PRIu64 ", \"pages_ns\": %" PRIu64 ", \"bytes_written\": %" PRIu64 ", \"writes\": %" PRIu64
           "}\n",
           ended - began, stats.round_ns, stats.bytes_written, stats.writes_posted);
}

/* Of memory that is there, mapping for reading is the cheaper: many pages by one fault, and what is shared can be
   written too then. */
static void map(struct options *o) {
    uint64_t began = now_ns();
    struct rmig_block_desc ram = map_ram(o->arg[0], 0);
    if (madvise(ram.host, ram.length, MADV_POPULATE_READ) < 0)
        die("Linux 5.14 or later is needed", strerror(errno));
    printf("{\"ns\": %" PRIu64 "}\n", now_ns() - began);
}

// >>load

struct loading {
    struct rmig_mapped_reader *reader;
    const struct rmig_mapped_block *info;
    uint32_t count, largest; // largest: the block of RAM
    struct rmig_block_desc *block;
};

static void add_block(struct loading *l, uint32_t i) {
    struct rmig_block_desc *d = &l->block[i];
    d->name = l->info[i].name;
    d->length = l->info[i].length;
    d->guest_offset = i == 0 ? 0 : l->block[i - 1].guest_offset + l->block[i - 1].length;
    d->backing = RMIG_BACKING_SHARED_FD;
    d->fd = memfd_create("ram", MFD_CLOEXEC);
    if (d->fd < 0 || ftruncate(d->fd, (off_t)d->length) < 0)
        die("memfd", strerror(errno));
    d->host = mmap(NULL, d->length, PROT_READ | PROT_WRITE, MAP_SHARED, d->fd, 0);
    if (d->host == MAP_FAILED)
        die("mmap", strerror(errno));
    if (rmig_mapped_reader_add_block(l->reader, d) < 0)
        die("block", rmig_mapped_reader_error(l->reader)->text);
    if (d->length > l->block[l->largest].length)
        l->largest = i;
}

static void open_snapshot(struct options *o, struct loading *l) {
    struct rmig_error err;
    int fd = open(o->arg[0], O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        die(o->arg[0], strerror(errno));
    o->mapped.memory_is_zero = true; // it is new
    if (rmig_mapped_reader_open(fd, &o->mapped, &l->reader, &err) < 0)
        die(o->arg[0], err.text);
    l->count = rmig_mapped_reader_blocks(l->reader, &l->info);
    l->block = calloc(l->count, sizeof *l->block);
    if (l->block == NULL)
        die("blocks", "out of memory");
    for (uint32_t i = 0; i < l->count; i++)
        add_block(l, i);
}

/* A page that the file holds, in the block of RAM. */
static uint64_t random_page(struct options *o, struct loading *l) {
    const struct rmig_mapped_block *b = &l->info[l->largest];
    uint64_t pages = b->length / b->page_size, bits = 0, first = 0;
    if (b->pages_set == 0)
        die(o->arg[0], "no page of its largest block is in the file: nothing to touch");
    while (bits == 0) {
        first = next_random(&o->seed) % pages / 64 * 64;
        if (rmig_mapped_reader_bitmap(l->reader, l->largest, first, lesser(64, pages - first), &bits) < 0)
            die(o->arg[0], rmig_mapped_reader_error(l->reader)->text);
    }
    return first + (uint64_t)__builtin_ctzll(bits);
}

static void compare(const struct loading *l, const char *path) {
    static uint8_t want[PIECE], got[PIECE];
    const struct rmig_block_desc *b = &l->block[l->largest];
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    struct stat st;
    if (fd < 0 || fstat(fd, &st) < 0)
        die(path, strerror(errno));
    if ((uint64_t)st.st_size != b->length)
        die(path, "it is not as long as the largest block in the file");
    for (uint64_t at = 0, n; at < b->length; at += n) { // reads: touching holes would fill them
        n = lesser(PIECE, b->length - at);
        if (pread(fd, want, n, (off_t)at) != (ssize_t)n || pread(b->fd, got, n, (off_t)at) != (ssize_t)n)
            die(path, "it, or what was loaded, cannot be read");
        if (memcmp(want, got, n) != 0)
            die(path, "what was loaded differs from it");
    }
    close(fd);
}

static void load(struct options *o) {
    struct loading l = {0};
    struct rmig_stats stats;
    uint8_t state[65536];
    int64_t got;
    uint64_t began = now_ns();
    open_snapshot(o, &l);
    uint64_t page = random_page(o, &l);
    int status = o->lazy ? rmig_mapped_reader_load_start(l.reader) : rmig_mapped_reader_load(l.reader);
    if (status < 0)
        die("load", rmig_mapped_reader_error(l.reader)->text);
    const volatile uint8_t *ram = l.block[l.largest].host;
    uint8_t touched = ram[page * l.info[l.largest].page_size];
    uint64_t touched_at = now_ns();
    do
        got = rmig_mapped_reader_get(l.reader, state, sizeof state);
    while (got > 0);
    if (got < 0 || (o->lazy && rmig_mapped_reader_load_wait(l.reader, LOAD_LIMIT_NS) != RMIG_OK))
        die("load", rmig_mapped_reader_error(l.reader)->text);
    uint64_t ended = now_ns();
    if (touched != ram[page * l.info[l.largest].page_size])
        die("load", "the page that was touched first has changed since");
    if (o->args > 1)
        compare(&l, o->arg[1]);
    rmig_mapped_reader_stats(l.reader, &stats);
    rmig_mapped_reader_close(l.reader);
    printf("{\"ns\": %" PRIu64 ", \"first_touch_ns\": %" PRIu64 ", \"bytes_read\": %" PRIu64 ", \"reads\": %" PRIu64
           "}\n",
           ended - began, touched_at - began, stats.bytes_written, stats.writes_posted);
}

// >>options

enum { KEY_BYTES = 1, KEY_SEED, KEY_THREADS, KEY_DIRECT, KEY_NO_SYNC, KEY_LAZY, KEY_NO_URING };

static const struct argp_option option_list[] = {
    {"bytes", KEY_BYTES, "SIZE", 0, "image: of RAM (512M)", 0},
    {"seed", KEY_SEED, "NUMBER", 0, "of the image, and of the page that is touched first (1)", 0},
    {"threads", KEY_THREADS, "NUMBER", 0, "that move pages (1)", 0},
    {"direct", KEY_DIRECT, NULL, 0, "past the page cache", 0},
    {"no-sync", KEY_NO_SYNC, NULL, 0, "save: do not wait for the disk", 0},
    {"lazy", KEY_LAZY, NULL, 0, "load: touch the page while the rest is being loaded", 0},
#ifdef RMIG_MAPPED_URING
    {"no-uring", KEY_NO_URING, NULL, 0, "without io_uring", 0},
#endif
    {0},
};

static uint64_t number(const char *text, struct argp_state *state) {
    char *end;
    errno = 0;
    unsigned long long n = strtoull(text, &end, 10);
    if (errno != 0 || *text < '0' || *text > '9' || *end != '\0')
        argp_error(state, "\"%s\" is no number: digits are wanted", text);
    return n;
}

static error_t on_argument(struct options *o, const char *arg, struct argp_state *state) {
    static const char *const commands[] = {"image", "save", "load", "map"};
    if (state->arg_num > 0) {
        if (o->args == 2)
            argp_error(state, "too many arguments: \"%s\"", arg);
        o->arg[o->args++] = arg;
        return 0;
    }
    for (unsigned i = 0; i < 4; i++) {
        o->command = (enum command)i;
        if (strcmp(arg, commands[i]) == 0)
            return 0;
    }
    argp_error(state, "no command %s: must be image, save, load or map", arg);
    return EINVAL;
}

static error_t on_option(int key, char *arg, struct argp_state *state) {
    struct options *o = state->input;
    struct rmig_error err;
    switch (key) {
    case KEY_BYTES:
        if (rmig_size_parse(arg, &o->bytes, &err) < 0)
            argp_error(state, "--bytes: %s", err.text);
        if (o->bytes == 0 || o->bytes % 8192 != 0)
            argp_error(state, "--bytes %s: must be a multiple of 8K above 0", arg);
        return 0;
    case KEY_SEED:
        o->seed = number(arg, state);
        return 0;
    case KEY_THREADS:
        o->mapped.threads = (uint32_t)lesser(number(arg, state), UINT32_MAX);
        return 0;
    case KEY_DIRECT:
        o->mapped.direct = true;
        return 0;
    case KEY_NO_SYNC:
        o->mapped.no_sync = true;
        return 0;
    case KEY_LAZY:
        o->lazy = true;
        return 0;
#ifdef RMIG_MAPPED_URING
    case KEY_NO_URING:
        o->mapped.no_uring = true;
        return 0;
#endif
    case ARGP_KEY_ARG:
        return on_argument(o, arg, state);
    case ARGP_KEY_END:
        if (state->arg_num == 0 || o->args < (o->command == LOAD || o->command == MAP ? 1 : 2))
            argp_error(state, "wanted: image RAM DATA, save RAM FILE, load FILE [RAM], or map RAM");
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

int main(int argc, char **argv) {
    struct options o = {.bytes = 512 * RMIG_MIB, .seed = 1};
    const struct argp argp = {option_list,
                              on_option,
                              "image|save|load FILE [FILE]",
                              "saves RAM to snapshot files and loads it from them, for bench/file.sh",
                              NULL,
                              NULL,
                              NULL};
    argp_parse(&argp, argc, argv, 0, NULL, &o);
    static void (*const run[])(struct options *) = {make_image, save, load, map};
    run[o.command](&o);
    return 0;
}
