// Snapshot files in QEMU's mapped-ram format: written, read back by a second reader of this file's own, and refused
// when anything is wrong with them. Golden bytes are of a file that QEMU 10.0 wrote.
#define _GNU_SOURCE
#ifdef TESTS_OVERRIDE_H
#define WITHOUT_COUNTED_HEAP
#else
#include "counted_heap.h"
#endif
#define RMIG_IMPLEMENTATION
#include "../rmig.h"
#include "../rmig_mapped_ram.h"

#include <criterion/criterion.h>
#include <inttypes.h>
#include <linux/capability.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/resource.h>

#define RANDOM_SEED 0x13198a2e03707344u
#include "random.h"

#define STATE "\4device\0state\0\6\0\0\0\16{\"devices\":[]}"
enum { STATE_SIZE = sizeof STATE - 1 };

// >>tools

static int new_file(void) {
    char path[] = "/tmp/unit_mapped_ram.XXXXXX";
    int fd = mkostemp(path, O_CLOEXEC);
    cr_assert_geq(fd, 0, "%s: %s", path, strerror(errno));
    unlink(path);
    return fd;
}

struct ram {
    const char *name;
    uint8_t *mem;
    uint64_t length;
};

static struct rmig_block_desc describe(const struct ram *ram, uint32_t index) {
    struct rmig_block_desc desc = {.name = ram->name, .host = ram->mem, .length = ram->length};
    desc.guest_offset = index * 16 * RMIG_GIB;
    desc.backing = RMIG_BACKING_ANONYMOUS;
    return desc;
}

static uint8_t *new_memory(uint64_t n) {
    void *p = mmap(NULL, n, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    cr_assert_neq(p, MAP_FAILED);
    return (uint8_t *)p;
}

#define OK(w, call)                                                                                                    \
    do {                                                                                                               \
        int ok_status = (call);                                                                                        \
        cr_assert_eq(ok_status, RMIG_OK, "%s: %s", #call, rmig_mapped_writer_error(w)->text);                          \
    } while (0)

static struct rmig_mapped_writer *open_writer(int fd, const struct rmig_mapped_options *opt) {
    struct rmig_mapped_writer *w;
    struct rmig_error err;
    int status = rmig_mapped_writer_open(fd, opt, &w, &err);
    cr_assert_eq(status, RMIG_OK, "%s", status == RMIG_OK ? "" : err.text);
    return w;
}

static struct rmig_mapped_machine machine_of(const char *name) {
    struct rmig_mapped_machine m;
    memset(&m, 0, sizeof m);
    snprintf(m.configuration.machine, sizeof m.configuration.machine, "%s", name);
    m.section_id = 1;
    return m;
}

static struct rmig_mapped_writer *start_writer(int fd, const struct rmig_mapped_options *opt, const struct ram *ram,
                                               uint32_t n) {
    struct rmig_mapped_writer *w = open_writer(fd, opt);
    struct rmig_mapped_machine machine = machine_of("test-1.0");
    for (uint32_t i = 0; i < n; i++) {
        struct rmig_block_desc desc = describe(&ram[i], i);
        uint32_t index;
        OK(w, rmig_mapped_writer_add_block(w, &desc, &index));
        cr_assert_eq(index, i);
    }
    OK(w, rmig_mapped_writer_start(w, &machine));
    return w;
}

static void save_all(struct rmig_mapped_writer *w, const struct ram *ram, uint32_t n) {
    OK(w, rmig_mapped_writer_begin_round(w));
    for (uint32_t i = 0; i < n; i++)
        OK(w, rmig_mapped_writer_save_range(w, i, 0, ram[i].length));
    OK(w, rmig_mapped_writer_end_round(w));
}

static void finish(struct rmig_mapped_writer *w) {
    OK(w, rmig_mapped_writer_put(w, STATE, STATE_SIZE));
    OK(w, rmig_mapped_writer_finish(w));
    rmig_mapped_writer_close(w);
}

static void save_file(int fd, const struct rmig_mapped_options *opt, const struct ram *ram, uint32_t n) {
    struct rmig_mapped_writer *w = start_writer(fd, opt, ram, n);
    save_all(w, ram, n);
    finish(w);
}

static struct rmig_mapped_reader *open_reader(int fd, const struct rmig_mapped_options *opt) {
    struct rmig_mapped_reader *r;
    struct rmig_error err;
    int status = rmig_mapped_reader_open(fd, opt, &r, &err);
    cr_assert_eq(status, RMIG_OK, "%s", status == RMIG_OK ? "" : err.text);
    return r;
}

static int refused(int fd, const struct rmig_mapped_options *opt, struct rmig_error *err) {
    struct rmig_mapped_reader *r = (struct rmig_mapped_reader *)&r;
    memset(err, 0, sizeof *err);
    int status = rmig_mapped_reader_open(fd, opt, &r, err);
    cr_assert_lt(status, 0, "a file that must be refused was opened");
    cr_assert_null(r);
    cr_assert_eq(err->status, status);
    return status;
}

static void expect_refused(int fd, const struct rmig_mapped_options *opt, const char *text) {
    struct rmig_error err;
    refused(fd, opt, &err);
    cr_assert(strstr(err.text, text) != NULL, "wanted \"%s\" in: %s", text, err.text);
}

static uint64_t size_of(int fd) {
    struct stat st;
    cr_assert_eq(fstat(fd, &st), 0);
    return (uint64_t)st.st_size;
}

static uint64_t big(const uint8_t *p, unsigned n) {
    uint64_t v = 0;
    for (unsigned i = 0; i < n; i++)
        v = v << 8 | p[i];
    return v;
}

static void read_at(int fd, void *p, size_t n, uint64_t at) {
    cr_assert_eq(pread(fd, p, n, (off_t)at), (ssize_t)n, "%zu bytes at %" PRIu64, n, at);
}

static void write_at(int fd, const void *p, size_t n, uint64_t at) {
    cr_assert_eq(pwrite(fd, p, n, (off_t)at), (ssize_t)n);
}

// The second reader: by the tables of the format alone. `at`: where the first block's entry begins. Returns where the
// last one's pages end.
static uint64_t check_by_hand(int fd, uint64_t at, const struct ram *ram, uint32_t n, uint64_t page) {
    for (uint32_t i = 0; i < n; i++) {
        uint8_t entry[1 + 255 + 8 + 28], *content = (uint8_t *)malloc(page);
        size_t name = strlen(ram[i].name);
        read_at(fd, entry, 1 + name + 36, at);
        const uint8_t *p = entry + 1 + name;
        cr_assert_eq(entry[0], name);
        cr_assert_eq(memcmp(entry + 1, ram[i].name, name), 0);
        cr_assert_eq(big(p, 8), ram[i].length);
        cr_assert_eq(big(p + 8, 4), 1);
        cr_assert_eq(big(p + 12, 8), page);
        uint64_t bitmap = big(p + 20, 8), pages = big(p + 28, 8);
        cr_assert_eq(bitmap, at + 1 + name + 36);
        for (uint64_t k = 0; k < ram[i].length / page; k++) {
            uint8_t byte;
            read_at(fd, &byte, 1, bitmap + k / 8);
            if ((byte >> (k % 8) & 1) != 0)
                read_at(fd, content, page, pages + k * page);
            else
                memset(content, 0, page);
            cr_assert_eq(memcmp(content, ram[i].mem + k * page, page), 0, "page %" PRIu64 " of block %u", k, i);
        }
        at = pages + ram[i].length;
        free(content);
    }
    return at;
}

static void check_loaded(int fd, const struct rmig_mapped_options *opt, const struct ram *ram, uint32_t n,
                         uint64_t misalign) {
    struct rmig_mapped_reader *r = open_reader(fd, opt);
    struct ram copy[8];
    uint8_t state[STATE_SIZE + 1];
    for (uint32_t i = 0; i < n; i++) {
        copy[i] = ram[i];
        copy[i].mem = new_memory(ram[i].length + 8192) + misalign;
        if (!opt->memory_is_zero)
            memset(copy[i].mem, 0xa5, ram[i].length);
        struct rmig_block_desc desc = describe(&copy[i], i);
        cr_assert_eq(rmig_mapped_reader_add_block(r, &desc), RMIG_OK, "%s", rmig_mapped_reader_error(r)->text);
    }
    cr_assert_eq(rmig_mapped_reader_load(r), RMIG_OK, "%s", rmig_mapped_reader_error(r)->text);
    for (uint32_t i = 0; i < n; i++) {
        cr_assert_eq(memcmp(copy[i].mem, ram[i].mem, ram[i].length), 0, "block %u", i);
        munmap(copy[i].mem - misalign, ram[i].length + 8192);
    }
    cr_assert_eq(rmig_mapped_reader_state_size(r), STATE_SIZE);
    cr_assert_eq(rmig_mapped_reader_get(r, state, 5), 5);
    cr_assert_eq(rmig_mapped_reader_get(r, state + 5, sizeof state - 5), STATE_SIZE - 5);
    cr_assert_eq(memcmp(state, STATE, STATE_SIZE), 0);
    cr_assert_eq(rmig_mapped_reader_get(r, state, sizeof state), 0);
    rmig_mapped_reader_close(r);
}

static void fill(uint8_t *p, uint64_t n) {
    for (uint64_t i = 0; i < n; i++)
        p[i] = (uint8_t)rng();
}

// >>layout

Test(mapped_layout, a_file_has_the_bytes_that_qemu_writes) {
    static const uint8_t head[] = {
        0x51, 0x45, 0x56, 0x4d, 0x00, 0x00, 0x00, 0x03, 0x07, 0x00, 0x00, 0x00, 0x0b, 0x70, 0x63, 0x2d, 0x71, 0x33,
        0x35, 0x2d, 0x31, 0x30, 0x2e, 0x30, 0x05, 0x1a, 0x63, 0x6f, 0x6e, 0x66, 0x69, 0x67, 0x75, 0x72, 0x61, 0x74,
        0x69, 0x6f, 0x6e, 0x2f, 0x63, 0x61, 0x70, 0x61, 0x62, 0x69, 0x6c, 0x69, 0x74, 0x69, 0x65, 0x73, 0x00, 0x00,
        0x00, 0x01, 0x00, 0x00, 0x00, 0x01, 0x0a, 0x6d, 0x61, 0x70, 0x70, 0x65, 0x64, 0x2d, 0x72, 0x61, 0x6d, 0x01,
        0x00, 0x00, 0x00, 0x01, 0x03, 0x72, 0x61, 0x6d, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x04, 0x00, 0x00,
        0x00, 0x00, 0x04, 0x08, 0x20, 0x04, 0x06, 0x70, 0x63, 0x2e, 0x72, 0x61, 0x6d, 0x00, 0x00, 0x00, 0x00, 0x04,
        0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x01, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x10, 0x00, 0x00, 0x00, 0x00,
        0x00, 0x00, 0x00, 0x00, 0x8b, 0x00, 0x00, 0x00, 0x00, 0x00, 0x10, 0x00, 0x00, 0x41, 0x00};
    static const char second[] = "\24/rom@etc/acpi/tables\0\0\0\0\0\2\0\0\0\0\0\1\0\0\0\0\0\0\20\0"
                                 "\0\0\0\0\4\20\0\71\0\0\0\0\4\40\0";
    static const uint8_t end[] = {0, 0, 0, 0, 0, 0, 0, 0x10, 0x7e, 0, 0, 0, 1,    8,    0, 11, 0, 0,
                                  3, 0, 0, 0, 1, 0, 0, 0,    0,    0, 0, 0, 0x10, 0x7e, 0, 0,  0, 1};
    struct ram ram[] = {
        {"pc.ram", NULL, 0x4000000}, {"/rom@etc/acpi/tables", NULL, 0x20000}, {"pc.bios", NULL, 0x40000},
        {"pc.rom", NULL, 0x20000},   {"/rom@etc/table-loader", NULL, 0x1000}, {"/rom@etc/acpi/rsdp", NULL, 0x1000}};
    struct rmig_mapped_machine machine = machine_of("pc-q35-10.0");
    uint8_t got[sizeof head];
    int fd = new_file();
    struct rmig_mapped_writer *w = open_writer(fd, NULL);
    for (uint32_t i = 0; i < 6; i++) {
        ram[i].mem = new_memory(ram[i].length);
        struct rmig_block_desc desc = describe(&ram[i], i);
        OK(w, rmig_mapped_writer_add_block(w, &desc, NULL));
    }
    ram[0].mem[0] = 1;
    ram[0].mem[6 * 4096 + 4095] = 1;
    machine.switchover_start = true;
    OK(w, rmig_mapped_writer_start(w, &machine));
    save_all(w, ram, 6);
    finish(w);
    read_at(fd, got, sizeof head, 0);
    for (size_t i = 0; i < sizeof head; i++)
        cr_assert_eq(got[i], head[i], "byte %zu is %02x, wanted %02x", i, got[i], head[i]);
    read_at(fd, got, sizeof second - 1, 0x4100000);
    cr_assert_eq(memcmp(got, second, sizeof second - 1), 0);
    cr_assert_eq(check_by_hand(fd, 0x60, ram, 6, 4096), 0x4601000);
    read_at(fd, got, sizeof end, 0x4601000);
    cr_assert_eq(memcmp(got, end, sizeof end), 0);
    cr_assert_eq(size_of(fd), 0x4601000 + sizeof end + STATE_SIZE);
    close(fd);
}

Test(mapped_layout, a_stream_at_an_offset_has_absolute_offsets_and_keeps_what_is_before) {
    struct ram ram = {"ram", new_memory(8192), 8192};
    struct rmig_mapped_options opt = {.offset = 0x1200, .memory_is_zero = true};
    uint8_t got[0x1200];
    int fd = new_file();
    for (unsigned i = 0; i < 8192; i += 4) // more than before the offset: the rest is cut off
        write_at(fd, "keep", 4, i);
    ram.mem[4096] = 7;
    save_file(fd, &opt, &ram, 1);
    read_at(fd, got, sizeof got, 0);
    for (unsigned i = 0; i < sizeof got; i++)
        cr_assert_eq(got[i], (uint8_t) "keep"[i % 4]);
    read_at(fd, got, 4, 0x1200);
    cr_assert_eq(memcmp(got, "QEVM", 4), 0);
    check_by_hand(fd, 0x1200 + 0x60 - 3, &ram, 1, 4096); // the machine's name is three bytes shorter
    check_loaded(fd, &opt, &ram, 1, 0);
    opt.offset = 0;
    expect_refused(fd, &opt, "not a migration stream");
    close(fd);
}

// >>rounds

static void change_some(const struct ram *ram, uint64_t page, uint64_t *dirty, uint64_t pages) {
    memset(dirty, 0, (pages + 63) / 64 * 8);
    for (uint64_t n = 1 + below(pages); n > 0; n--) {
        uint64_t k = below(pages);
        dirty[k / 64] |= (uint64_t)1 << k % 64;
        if (below(3) == 0)
            memset(ram->mem + k * page, 0, page);
        else
            fill(ram->mem + k * page + below(page / 2), 16);
    }
}

// Rounds of pages, ranges and bitmaps, over random blocks and options, read by hand and by the reader.
static void random_snapshot(void) {
    static const uint64_t aligns[] = {0, 4096, 65536, RMIG_MIB, 4 * RMIG_MIB};
    uint64_t page = (uint64_t)1024 << below(4), misalign = below(3) == 0 ? 512 : 0, dirty[64];
    uint32_t n = 1 + (uint32_t)below(4);
    struct rmig_mapped_options opt = {.page_size = page, .threads = (uint32_t)below(5)};
    static const char *const names[] = {"ram", "a", "/rom@etc/x", "\xc3\xa9 with space"};
    struct ram ram[4];
    opt.file_align = aligns[below(5)] < page ? 0 : aligns[below(5)];
    opt.file_align = opt.file_align != 0 && opt.file_align < page ? page : opt.file_align;
    opt.offset = below(2) * below(100000);
    opt.direct = below(2) == 0;
    opt.no_sync = true;
    opt.no_uring = below(3) == 0;
    opt.no_zero_detect = below(4) == 0;
    for (uint32_t i = 0; i < n; i++) {
        ram[i].name = names[i];
        ram[i].length = page * (1 + below(4000));
        ram[i].mem = new_memory(ram[i].length + 4096) + misalign;
        if (below(2) == 0)
            fill(ram[i].mem, below(ram[i].length));
    }
    int fd = new_file();
    struct rmig_mapped_writer *w = start_writer(fd, &opt, ram, n);
    save_all(w, ram, n);
    for (uint64_t round = below(4); round > 0; round--) {
        OK(w, rmig_mapped_writer_begin_round(w));
        for (uint32_t i = 0; i < n; i++) {
            uint64_t pages = ram[i].length / page;
            uint64_t first = below(pages), some = 1 + below(pages - first);
            some = some > 4000 ? 4000 : some;
            struct ram part = {ram[i].name, ram[i].mem + first * page, some * page};
            change_some(&part, page, dirty, some);
            OK(w, rmig_mapped_writer_save_bitmap(w, i, dirty, first, some));
            uint64_t at = below(ram[i].length);
            ram[i].mem[at] = (uint8_t)rng();
            OK(w, rmig_mapped_writer_save_page(w, i, at));
        }
        OK(w, rmig_mapped_writer_end_round(w));
    }
    struct rmig_stats st;
    rmig_mapped_writer_stats(w, &st);
    cr_assert_eq(st.bytes_pending, 0);
    cr_assert_eq(st.bytes_written, st.pages_written * page);
    finish(w);
    check_by_hand(fd, opt.offset + 0x5d, ram, n, page);
    opt.memory_is_zero = misalign == 0 && below(2) == 0;
    check_loaded(fd, &opt, ram, n, below(2) * 8);
    for (uint32_t i = 0; i < n; i++)
        munmap(ram[i].mem - misalign, ram[i].length + 4096);
    close(fd);
}

Test(mapped_rounds, random_snapshots_come_back, .timeout = 600) {
    for (unsigned i = 0; i < TIMES(40); i++)
        random_snapshot();
}

Test(mapped_rounds, a_page_that_becomes_zero_loses_its_bit_and_its_place) {
    struct ram ram = {"ram", new_memory(RMIG_MIB), RMIG_MIB};
    struct rmig_mapped_options opt = {.no_sync = true};
    uint64_t bits[4];
    int fd = new_file();
    memset(ram.mem, 1, ram.length);
    struct rmig_mapped_writer *w = start_writer(fd, &opt, &ram, 1);
    save_all(w, &ram, 1);
    memset(ram.mem + 16 * 4096, 0, 64 * 4096);
    OK(w, rmig_mapped_writer_begin_round(w));
    OK(w, rmig_mapped_writer_save_range(w, 0, 0, 100 * 4096));
    OK(w, rmig_mapped_writer_end_round(w));
    finish(w);
    check_by_hand(fd, 0x5d, &ram, 1, 4096);
    struct rmig_mapped_reader *r = open_reader(fd, &opt);
    const struct rmig_mapped_block *b;
    cr_assert_eq(rmig_mapped_reader_blocks(r, &b), 1);
    cr_assert_eq(b->pages_set, 256 - 64);
    cr_assert_eq(rmig_mapped_reader_bitmap(r, 0, 0, 256, bits), RMIG_OK);
    cr_assert_eq(bits[0], 0xffff);
    cr_assert_eq(bits[1], ~(uint64_t)0xffff);
    off_t hole = lseek(fd, (off_t)b->pages_offset, SEEK_HOLE);
    cr_assert_eq(hole, (off_t)b->pages_offset + 16 * 4096, "the first hole is at %lld", (long long)hole);
    rmig_mapped_reader_close(r);
    close(fd);
}

// What a file may have at most: RAM, a gap of the alignment and a bitmap for each block, the stream.
static uint64_t longest(const struct rmig_mapped_options *opt, const struct ram *ram, uint32_t n) {
    uint64_t align = opt->file_align == 0 ? RMIG_MIB : opt->file_align, sum = opt->offset + 1000 + STATE_SIZE;
    for (uint32_t i = 0; i < n; i++)
        sum += ram[i].length + align + ram[i].length / 4096 / 8 + 300;
    return sum;
}

static void twenty_rounds(const struct rmig_mapped_options *opt) {
    // More than one call moves, and not a multiple of it.
    struct ram ram[2] = {{"ram", new_memory(5 * RMIG_MIB / 2), 5 * RMIG_MIB / 2}, {"rom", new_memory(65536), 65536}};
    uint64_t dirty[10];
    int fd = new_file();
    fill(ram[0].mem, RMIG_MIB);
    struct rmig_mapped_writer *w = start_writer(fd, opt, ram, 2);
    save_all(w, ram, 2);
    for (unsigned round = 1; round < 20; round++) {
        OK(w, rmig_mapped_writer_begin_round(w));
        for (uint32_t i = 0; i < 2; i++) {
            uint64_t pages = ram[i].length / 4096;
            change_some(&ram[i], 4096, dirty, pages);
            OK(w, rmig_mapped_writer_save_bitmap(w, i, dirty, 0, pages));
        }
        OK(w, rmig_mapped_writer_end_round(w));
        cr_assert_leq((uint64_t)size_of(fd), longest(opt, ram, 2), "after round %u", round);
    }
    finish(w);
    cr_assert_leq((uint64_t)size_of(fd), longest(opt, ram, 2));
    struct stat st;
    cr_assert_eq(fstat(fd, &st), 0);
    cr_assert_leq((uint64_t)st.st_blocks * 512, longest(opt, ram, 2) + 65536); // and its own tables
    check_loaded(fd, opt, ram, 2, 0);
    close(fd);
    munmap(ram[0].mem, ram[0].length);
    munmap(ram[1].mem, ram[1].length);
}

Test(mapped_rounds, twenty_rounds_make_no_longer_file_in_any_mode, .timeout = 600) {
    for (unsigned mode = 0; mode < 64; mode += TIMES(64) == 64 ? 1 : 11) {
        struct rmig_mapped_options opt = {.no_sync = true,
                                          .direct = (mode & 1) != 0,
                                          .threads = (mode & 2) != 0 ? 3 : 1,
                                          .no_uring = (mode & 4) != 0,
                                          .no_zero_detect = (mode & 8) != 0,
                                          .file_align = (mode & 16) != 0 ? 4096 : 0,
                                          .offset = (mode & 32) != 0 ? 12345 : 0};
        twenty_rounds(&opt);
    }
}

#ifdef RMIG_MAPPED_URING
static bool has_uring(void) {
    struct io_uring uring;
    if (io_uring_queue_init(4, &uring, 0) < 0)
        return false;
    io_uring_queue_exit(&uring);
    return true;
}

static bool is_open_uring(void) {
    char name[32], target[64];
    for (int fd = 3; fd < 64; fd++) {
        snprintf(name, sizeof name, "/proc/self/fd/%d", fd);
        ssize_t n = readlink(name, target, sizeof target - 1);
        target[n < 0 ? 0 : n] = '\0';
        if (strcmp(target, "anon_inode:[io_uring]") == 0)
            return true;
    }
    return false;
}

static int note_uring(void *user, const struct rmig_stats *stats) {
    (void)stats;
    *(bool *)user = *(bool *)user || is_open_uring();
    return 0;
}

// It is used where it is wanted, for what is written and for what is read.
Test(mapped_rounds, io_uring_is_used_unless_it_is_switched_off) {
    struct ram ram = {"ram", new_memory(8 * RMIG_MIB), 8 * RMIG_MIB};
    fill(ram.mem, ram.length);
    for (unsigned off = 0; off < 2; off++) {
        bool seen = false;
        struct rmig_mapped_options opt = {
            .no_sync = true, .direct = true, .no_uring = off == 1, .progress = note_uring, .progress_user = &seen};
        int fd = new_file();
        save_file(fd, &opt, &ram, 1);
        cr_assert_eq(seen, off == 0 && has_uring(), "while it is written");
        seen = false;
        check_loaded(fd, &opt, &ram, 1, 0);
        cr_assert_eq(seen, off == 0 && has_uring(), "while it is read");
        close(fd);
    }
}
#endif

Test(mapped_rounds, memory_that_was_never_touched_is_not_read) {
    struct ram ram = {"ram", new_memory(64 * RMIG_MIB), 64 * RMIG_MIB};
    struct rmig_mapped_options opt = {.no_sync = true, .threads = 4};
    unsigned char resident[64];
    int fd = new_file();
    ram.mem[40 * RMIG_MIB] = 1;
    save_file(fd, &opt, &ram, 1);
    check_by_hand(fd, 0x5d, &ram, 1, 4096);
    save_file(fd, &opt, &ram, 1);
    munmap(ram.mem, ram.length);
    ram.mem = new_memory(ram.length);
    save_file(fd, &opt, &ram, 1);
    cr_assert_eq(mincore(ram.mem, sizeof resident * 4096, resident), 0);
    for (unsigned i = 0; i < sizeof resident; i++)
        cr_assert_eq(resident[i] & 1, 0);
    close(fd);
}

// >>reading parts

Test(mapped_read, any_pages_of_a_block_can_be_read) {
    struct ram ram = {"ram", new_memory(9 * RMIG_MIB), 9 * RMIG_MIB};
    struct rmig_mapped_options opt = {.no_sync = true, .page_size = 1024};
    uint8_t *out = (uint8_t *)malloc(ram.length);
    int fd = new_file();
    for (uint64_t i = 0; i < ram.length; i += 1 + below(20000))
        ram.mem[i] = (uint8_t)rng();
    save_file(fd, &opt, &ram, 1);
    struct rmig_mapped_reader *r = open_reader(fd, &opt);
    for (unsigned i = 0; i < 100; i++) {
        uint64_t from = below(9 * 1024), n = 1 + below(9 * 1024 - from);
        cr_assert_eq(rmig_mapped_reader_read(r, 0, from * 1024, out, n * 1024), RMIG_OK);
        cr_assert_eq(memcmp(out, ram.mem + from * 1024, n * 1024), 0);
    }
    cr_assert_eq(rmig_mapped_reader_read(r, 0, 512, out, 1024), RMIG_ERR_ARGUMENT);
    cr_assert_eq(rmig_mapped_reader_read(r, 0, 0, out, ram.length + 1024), RMIG_ERR_ARGUMENT);
    cr_assert_eq(rmig_mapped_reader_read(r, 1, 0, out, 1024), RMIG_ERR_ARGUMENT);
    cr_assert_eq(rmig_mapped_reader_bitmap(r, 0, 1, 1, (uint64_t *)(void *)out), RMIG_ERR_ARGUMENT);
    cr_assert_eq(rmig_mapped_reader_bitmap(r, 0, 0, 9 * 1024 + 1, (uint64_t *)(void *)out), RMIG_ERR_ARGUMENT);
    rmig_mapped_reader_close(r);
    free(out);
    close(fd);
}

// >>lazy loading

struct lazy_case {
    struct ram ram, copy;
    int fd, memory; // memory -1: anonymous
    uint64_t zero_bytes; // in whole pages of the host
    struct rmig_mapped_reader *reader;
    struct rmig_block_desc desc;
};

// A guest of 64 MiB, most of it random, about to be loaded.
static bool lazy_open(struct lazy_case *c, bool shared, uint64_t page) {
    static const uint8_t zeros[4096];
    uint64_t at;
    struct rmig_mapped_options opt = {.no_sync = true, .page_size = page};
    c->ram.name = c->copy.name = "ram";
    c->ram.length = c->copy.length = 64 * RMIG_MIB;
    c->ram.mem = new_memory(c->ram.length);
    for (uint64_t i = 0; i < c->ram.length; i += 1024 + below(9000))
        c->ram.mem[i] = (uint8_t)rng();
    memset(c->ram.mem + 20 * RMIG_MIB, 0, 10 * RMIG_MIB);
    for (c->zero_bytes = 0, at = 0; at < c->ram.length; at += 4096)
        c->zero_bytes += memcmp(c->ram.mem + at, zeros, 4096) == 0 ? 4096 : 0;
    c->fd = new_file();
    save_file(c->fd, &opt, &c->ram, 1);
    c->memory = shared ? memfd_create("lazy", MFD_CLOEXEC) : -1;
    cr_assert(!shared || ftruncate(c->memory, (off_t)c->ram.length) == 0);
    c->copy.mem = (uint8_t *)mmap(NULL, c->ram.length, PROT_READ | PROT_WRITE,
                                  shared ? MAP_SHARED : MAP_PRIVATE | MAP_ANONYMOUS, c->memory, 0);
    cr_assert_neq(c->copy.mem, MAP_FAILED);
    memset(c->copy.mem, 0xa5, c->copy.length);
    c->desc = describe(&c->copy, 0);
    c->desc.backing = shared ? RMIG_BACKING_SHARED_FD : RMIG_BACKING_ANONYMOUS;
    c->desc.fd = c->memory;
    c->reader = open_reader(c->fd, &opt);
    cr_assert_eq(rmig_mapped_reader_add_block(c->reader, &c->desc), RMIG_OK);
    int status = rmig_mapped_reader_load_start(c->reader);
    const struct rmig_error *error = rmig_mapped_reader_error(c->reader);
    if (status == RMIG_ERR_SETUP && (error->provider_code == EPERM || error->provider_code == ENOSYS))
        return false;
    cr_assert_eq(status, RMIG_OK, "%s", error->text);
    return true;
}

static void lazy_close(struct lazy_case *c) {
    rmig_mapped_reader_close(c->reader);
    munmap(c->copy.mem, c->copy.length);
    munmap(c->ram.mem, c->ram.length);
    if (c->memory >= 0)
        close(c->memory);
    close(c->fd);
}

// The guest reads and writes at once, from the end on, against the loader.
static void lazy_run(bool shared, uint64_t page) {
    struct lazy_case c;
    if (!lazy_open(&c, shared, page)) {
        rmig_mapped_reader_close(c.reader);
        cr_skip("no userfaultfd here");
    }
    for (uint64_t i = 0; i < 2000; i++) {
        uint64_t at = c.ram.length - 1 - below(i * 32768 + 4096) % c.ram.length;
        cr_assert_eq(c.copy.mem[at], c.ram.mem[at], "byte %" PRIu64, at);
        c.copy.mem[at] = c.ram.mem[at] = (uint8_t)i;
    }
    cr_assert_eq(rmig_mapped_reader_load(c.reader), RMIG_ERR_STATE);
    cr_assert_eq(rmig_mapped_reader_load_wait(c.reader, 240000000000u), RMIG_OK, "%s",
                 rmig_mapped_reader_error(c.reader)->text);
    cr_assert_eq(memcmp(c.copy.mem, c.ram.mem, c.ram.length), 0);
    struct rmig_stats st;
    rmig_mapped_reader_stats(c.reader, &st);
    cr_assert_eq(st.bytes_pending, 0);
    cr_assert_eq(st.bytes_written + st.bytes_zero, c.ram.length);
    cr_assert_eq(st.bytes_zero, c.zero_bytes);
    lazy_close(&c);
}

Test(mapped_lazy, anonymous_memory_is_there_when_it_is_touched, .timeout = 600) { lazy_run(false, 4096); }
Test(mapped_lazy, shared_memory_is_there_when_it_is_touched, .timeout = 600) { lazy_run(true, 4096); }
Test(mapped_lazy, pages_smaller_than_the_hosts, .timeout = 600) { lazy_run(false, 1024); }
Test(mapped_lazy, pages_larger_than_the_hosts, .timeout = 600) { lazy_run(true, 4 * RMIG_MIB); }

// Threads that touch memory in the moment in which the loading ends: Linux 6.18 forgot some of them.
struct toucher {
    pthread_t thread;
    const uint8_t *is, *wanted;
    uint64_t length, seed, wrong;
};

static void *touch(void *user) {
    struct toucher *t = (struct toucher *)user;
    for (int i = 0; i < 2000; i++) {
        t->seed = t->seed * 6364136223846793005u + 1442695040888963407u;
        uint64_t at = (t->seed >> 20) % t->length;
        t->wrong += t->is[at] != t->wanted[at];
    }
    return NULL;
}

static void end_among_touchers(const struct ram *ram, int fd, bool shared) {
    struct toucher toucher[6];
    int memory = shared ? memfd_create("lazy", MFD_CLOEXEC) : -1;
    cr_assert(!shared || ftruncate(memory, (off_t)ram->length) == 0);
    struct ram copy = {
        ram->name,
        mmap(NULL, ram->length, PROT_READ | PROT_WRITE, shared ? MAP_SHARED : MAP_PRIVATE | MAP_ANONYMOUS, memory, 0),
        ram->length};
    cr_assert_neq(copy.mem, MAP_FAILED);
    struct rmig_block_desc desc = describe(&copy, 0);
    desc.backing = shared ? RMIG_BACKING_SHARED_FD : RMIG_BACKING_ANONYMOUS;
    desc.fd = memory;
    struct rmig_mapped_reader *r = open_reader(fd, NULL);
    cr_assert_eq(rmig_mapped_reader_add_block(r, &desc), RMIG_OK);
    cr_assert_eq(rmig_mapped_reader_load_start(r), RMIG_OK);
    for (unsigned i = 0; i < 6; i++) {
        toucher[i] = (struct toucher){.is = copy.mem, .wanted = ram->mem, .length = ram->length, .seed = rng()};
        cr_assert_eq(pthread_create(&toucher[i].thread, NULL, touch, &toucher[i]), 0);
    }
    for (unsigned i = 0; i < 6; i++) {
        pthread_join(toucher[i].thread, NULL);
        cr_assert_eq(toucher[i].wrong, 0);
    }
    cr_assert_eq(rmig_mapped_reader_load_wait(r, 240000000000u), RMIG_OK);
    rmig_mapped_reader_close(r);
    munmap(copy.mem, copy.length);
    if (memory >= 0)
        close(memory);
}

Test(mapped_lazy, nobody_waits_when_the_loading_has_ended, .timeout = 600) {
    struct rmig_mapped_options opt = {.no_sync = true};
    struct lazy_case c;
    if (!lazy_open(&c, false, 4096))
        cr_skip("no userfaultfd here");
    lazy_close(&c);
    struct ram ram = {"ram", new_memory(16 * RMIG_MIB), 16 * RMIG_MIB};
    for (uint64_t at = 0; at < ram.length; at += 4096 * (1 + below(64)))
        ram.mem[at] = 1;
    int fd = new_file();
    save_file(fd, &opt, &ram, 1);
    for (unsigned i = 0; i < TIMES(150); i++)
        end_among_touchers(&ram, fd, i % 2 == 1);
    close(fd);
}

static struct lazy_case *touched;
static void on_fault(int number) {
    (void)number;
    _exit(touched == NULL ? 3 : 77);
}

// Memory that could not be loaded is out of reach, and not zero.
static void lazy_fails(bool cut, const char *text) {
    struct lazy_case c;
    if (!lazy_open(&c, false, 4096))
        _exit(77);
    if (cut)
        cr_assert_eq(ftruncate(c.fd, 2 * RMIG_MIB), 0);
    if (cut) {
        cr_assert_eq(rmig_mapped_reader_load_wait(c.reader, 240000000000u), RMIG_ERR_FILE);
        cr_assert(strstr(rmig_mapped_reader_error(c.reader)->text, text) != NULL);
    }
    rmig_mapped_reader_close(c.reader);
    touched = &c;
    signal(SIGSEGV, on_fault);
    if (!cut && c.copy.mem[63 * RMIG_MIB] == c.ram.mem[63 * RMIG_MIB])
        _exit(77); // it was loaded before it was closed
    _exit(c.copy.mem[63 * RMIG_MIB]);
}

Test(mapped_lazy, memory_of_a_file_that_was_cut_cannot_be_accessed, .exit_code = 77, .timeout = 600) {
    lazy_fails(true, "was c");
}
Test(mapped_lazy, memory_of_a_reader_that_was_closed_too_early_cannot_be_accessed, .exit_code = 77, .timeout = 600) {
    lazy_fails(false, NULL);
}

// A page that another mapping read would be zero for the guest: the loading ends, and the memory is out of reach.
Test(mapped_lazy, a_page_that_another_mapping_put_there_is_noticed, .exit_code = 77, .timeout = 600) {
    for (unsigned i = 0; i < 10; i++) {
        struct lazy_case c;
        if (!lazy_open(&c, true, 4096))
            _exit(77);
        const volatile uint8_t *other =
            (const volatile uint8_t *)mmap(NULL, c.copy.length, PROT_READ, MAP_SHARED, c.memory, 0);
        cr_assert_neq((const void *)other, MAP_FAILED);
        (void)other[c.copy.length - 1];
        int status = rmig_mapped_reader_load_wait(c.reader, 240000000000u);
        if (status == RMIG_OK) { // it had been loaded before
            cr_assert_eq(memcmp(c.copy.mem, c.ram.mem, c.ram.length), 0);
            lazy_close(&c);
            continue;
        }
        cr_assert_eq(status, RMIG_ERR_SETUP);
        const char *text = rmig_mapped_reader_error(c.reader)->text;
        cr_assert(strstr(text, "block \"ram\": somebody else put a page at") != NULL, "%s", text);
        touched = &c;
        signal(SIGSEGV, on_fault);
        _exit(c.copy.mem[c.copy.length - 1] == 0 ? 1 : 2);
    }
    cr_assert_fail("never was there a page of somebody else");
}

// What is not there yet looks like a hole, and is none. The writer may have been opened before the loading began.
static void save_while_it_is_loaded(bool shared, enum rmig_backing backing) {
    struct rmig_mapped_options opt = {.no_sync = true};
    struct lazy_case c;
    if (!lazy_open(&c, shared, 4096))
        cr_skip("no userfaultfd here");
    int fd = new_file();
    struct rmig_mapped_writer *w = open_writer(fd, &opt);
    struct rmig_mapped_machine machine = machine_of("test-1.0");
    struct rmig_block_desc desc = c.desc;
    desc.backing = backing;
    OK(w, rmig_mapped_writer_add_block(w, &desc, NULL));
    OK(w, rmig_mapped_writer_start(w, &machine));
    save_all(w, &c.copy, 1);
    finish(w);
    cr_assert_eq(rmig_mapped_reader_load_wait(c.reader, 240000000000u), RMIG_OK);
    check_loaded(fd, &opt, &c.ram, 1, 0);
    close(fd);
    lazy_close(&c);
}

Test(mapped_lazy, a_guest_that_is_being_loaded_can_be_saved, .timeout = 600) {
    save_while_it_is_loaded(true, RMIG_BACKING_UNKNOWN);
    save_while_it_is_loaded(true, RMIG_BACKING_SHARED_FD);
    save_while_it_is_loaded(false, RMIG_BACKING_ANONYMOUS);
}

// Memory whose pages come from a place of the test's own while round after round saves all of it.
Test(mapped_lazy, a_pager_that_comes_between_two_rounds_is_noticed, .timeout = 600) {
    struct rmig_mapped_options opt = {.no_sync = true};
    struct ram ram = {"ram", new_memory(8 * RMIG_MIB), 8 * RMIG_MIB};
    int fd = new_file(), from = new_file();
    fill(ram.mem, ram.length / 2);
    save_file(from, &opt, &ram, 1);
    struct ram copy = {"ram", new_memory(ram.length), ram.length};
    struct rmig_block_desc desc = describe(&copy, 0);
    struct rmig_mapped_writer *w = start_writer(fd, &opt, &copy, 1);
    save_all(w, &copy, 1); // nothing but holes, rightly
    struct rmig_mapped_reader *r = open_reader(from, &opt);
    cr_assert_eq(rmig_mapped_reader_add_block(r, &desc), RMIG_OK);
    if (rmig_mapped_reader_load_start(r) == RMIG_ERR_SETUP)
        cr_skip("no userfaultfd here");
    save_all(w, &copy, 1);
    finish(w);
    cr_assert_eq(rmig_mapped_reader_load_wait(r, 240000000000u), RMIG_OK);
    check_loaded(fd, &opt, &ram, 1, 0);
    rmig_mapped_reader_close(r);
    close(fd);
    close(from);
}

// Whatever the caller thinks it is: it is emptied before.
Test(mapped_lazy, shared_memory_without_a_file, .timeout = 600) {
    struct rmig_mapped_options opt = {.no_sync = true};
    struct ram ram = {"ram", new_memory(4 * RMIG_MIB), 4 * RMIG_MIB};
    fill(ram.mem, ram.length / 2);
    int fd = new_file();
    save_file(fd, &opt, &ram, 1);
    struct ram copy = {"ram", NULL, ram.length};
    copy.mem = (uint8_t *)mmap(NULL, ram.length, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    cr_assert_neq(copy.mem, MAP_FAILED);
    memset(copy.mem, 0xa5, copy.length);
    struct rmig_block_desc desc = describe(&copy, 0);
    struct rmig_mapped_reader *r = open_reader(fd, &opt);
    cr_assert_eq(rmig_mapped_reader_add_block(r, &desc), RMIG_OK);
    int status = rmig_mapped_reader_load_start(r);
    if (status == RMIG_ERR_SETUP)
        cr_skip("no userfaultfd here");
    cr_assert_eq(status, RMIG_OK);
    cr_assert_eq(rmig_mapped_reader_load_wait(r, 240000000000u), RMIG_OK, "%s", rmig_mapped_reader_error(r)->text);
    cr_assert_eq(memcmp(copy.mem, ram.mem, ram.length), 0);
    rmig_mapped_reader_close(r);
    close(fd);
}

Test(mapped_lazy, locked_memory_is_refused) {
    struct rmig_mapped_options opt = {.no_sync = true};
    struct ram ram = {"ram", new_memory(16 * 4096), 16 * 4096};
    struct rmig_block_desc desc = describe(&ram, 0);
    ram.mem[5] = 1;
    int fd = new_file();
    save_file(fd, &opt, &ram, 1);
    if (syscall(SYS_mlock, ram.mem, ram.length) != 0) // AddressSanitizer makes mlock do nothing
        cr_skip("memory cannot be locked here");
    struct rmig_mapped_reader *r = open_reader(fd, &opt);
    cr_assert_eq(rmig_mapped_reader_add_block(r, &desc), RMIG_OK);
    cr_assert_eq(rmig_mapped_reader_load_start(r), RMIG_ERR_SETUP);
    const struct rmig_error *error = rmig_mapped_reader_error(r);
    if (error->provider_code != EPERM && error->provider_code != ENOSYS)
        cr_assert(strstr(error->text, "is it locked") != NULL, "%s", error->text);
    cr_assert_eq(rmig_mapped_reader_load_wait(r, 0), RMIG_ERR_SETUP);
    cr_assert_eq(rmig_mapped_reader_load(r), RMIG_ERR_SETUP);
    rmig_mapped_reader_close(r);
    close(fd);
}

// What cannot be emptied is never taken for empty: its old content would stay where the file has zeros.
Test(mapped_lazy, memory_that_cannot_be_emptied_is_refused_and_never_keeps_what_it_held) {
    struct rmig_mapped_options opt = {.no_sync = true};
    struct ram ram = {"ram", new_memory(RMIG_MIB), RMIG_MIB};
    int fd = new_file();
    save_file(fd, &opt, &ram, 1);
    int file = memfd_create("sealed", MFD_CLOEXEC | MFD_ALLOW_SEALING), plain = memfd_create("plain", MFD_CLOEXEC);
    cr_assert(file >= 0 && plain >= 0);
    cr_assert(ftruncate(file, (off_t)ram.length) == 0 && ftruncate(plain, (off_t)ram.length) == 0);
    void *sealed = mmap(NULL, ram.length, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    cr_assert_neq(sealed, MAP_FAILED);
    memset(sealed, 0x55, ram.length);
    if (fcntl(file, F_ADD_SEALS, 0x10) < 0) // F_SEAL_FUTURE_WRITE
        cr_skip("no seal of future writes here");
    const struct {
        void *memory;
        enum rmig_backing backing;
        int fd;
        const char *text;
    } row[] = {
        {sealed, RMIG_BACKING_SHARED_FD, file, "sealed against writing"},
        {sealed, RMIG_BACKING_ANONYMOUS, -1, "sealed against writing"},
        {new_memory(ram.length), RMIG_BACKING_SHARED_FD, plain, "no mapping of its file"},
        {mmap(NULL, ram.length, PROT_READ | PROT_WRITE, MAP_PRIVATE, plain, 0), RMIG_BACKING_SHARED_FD, plain,
         "nor a shared mapping"},
        {mmap(NULL, ram.length, PROT_READ | PROT_WRITE, MAP_PRIVATE, plain, 0), RMIG_BACKING_ANONYMOUS, -1,
         "neither private anonymous"},
    };
    for (size_t i = 0; i < sizeof row / sizeof row[0]; i++) {
        struct ram copy = {"ram", (uint8_t *)row[i].memory, ram.length};
        struct rmig_block_desc desc = describe(&copy, 0);
        desc.backing = row[i].backing;
        desc.fd = row[i].fd;
        struct rmig_mapped_reader *r = open_reader(fd, &opt);
        cr_assert_eq(rmig_mapped_reader_add_block(r, &desc), RMIG_OK);
        int status = rmig_mapped_reader_load_start(r);
        const struct rmig_error *error = rmig_mapped_reader_error(r);
        if (error->provider_code == ENOSYS || strstr(error->text, "no userfaultfd") != NULL)
            cr_skip("no userfaultfd here");
        cr_expect_eq(status, RMIG_ERR_SETUP, "row %zu: %d", i, status);
        cr_expect(strstr(error->text, row[i].text) != NULL, "row %zu: %s", i, error->text);
        cr_expect_eq(rmig_mapped_reader_load_wait(r, 0), RMIG_ERR_SETUP);
        rmig_mapped_reader_close(r);
    }
    close(fd);
}

// A block of private and of shared memory, each emptied in its own way.
Test(mapped_lazy, mappings_of_two_kinds_in_one_block, .timeout = 600) {
    struct rmig_mapped_options opt = {.no_sync = true};
    struct ram ram = {"ram", new_memory(4 * RMIG_MIB), 4 * RMIG_MIB};
    int fd = new_file();
    fill(ram.mem, ram.length / 8);
    save_file(fd, &opt, &ram, 1);
    struct rmig_holes holes;
    struct rmig__mapping mapping;
    struct ram copy = {"ram", new_memory(ram.length), ram.length};
    rmig_holes_open(&holes);
    bool known = rmig__mapping_at(&holes, (uint64_t)(uintptr_t)copy.mem, &mapping);
    rmig_holes_close(&holes);
    if (!known)
        cr_skip("a kernel before 6.11 does not tell what is mapped");
    void *half = mmap(copy.mem + ram.length / 2, ram.length / 2, PROT_READ | PROT_WRITE,
                      MAP_SHARED | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
    cr_assert_neq(half, MAP_FAILED);
    memset(copy.mem, 0x55, copy.length);
    struct rmig_block_desc desc = describe(&copy, 0);
    struct rmig_mapped_reader *r = open_reader(fd, &opt);
    cr_assert_eq(rmig_mapped_reader_add_block(r, &desc), RMIG_OK);
    if (rmig_mapped_reader_load_start(r) == RMIG_ERR_SETUP)
        cr_skip("no userfaultfd here");
    cr_assert_eq(rmig_mapped_reader_load_wait(r, 240000000000u), RMIG_OK, "%s", rmig_mapped_reader_error(r)->text);
    cr_assert_eq(memcmp(copy.mem, ram.mem, ram.length), 0);
    rmig_mapped_reader_close(r);
    close(fd);
}

// An eager load goes over holes too: what this process has not mapped in is no hole of shared memory.
Test(mapped_lazy, an_eager_load_zeroes_shared_memory_that_is_said_to_be_private) {
    struct rmig_mapped_options opt = {.no_sync = true};
    struct ram ram = {"ram", new_memory(RMIG_MIB), RMIG_MIB}, copy = {"ram", NULL, RMIG_MIB};
    int fd = new_file();
    save_file(fd, &opt, &ram, 1);
    copy.mem = (uint8_t *)mmap(NULL, copy.length, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    cr_assert_neq(copy.mem, MAP_FAILED);
    memset(copy.mem, 0x55, copy.length);
    madvise(copy.mem, copy.length, MADV_DONTNEED);
    struct rmig_block_desc desc = describe(&copy, 0);
    struct rmig_mapped_reader *r = open_reader(fd, &opt);
    struct rmig__mapping mapping;
    if (!rmig__mapping_at(&r->holes.holes, (uint64_t)(uintptr_t)copy.mem, &mapping))
        cr_skip("a kernel before 6.11 does not tell what is mapped");
    cr_assert_eq(rmig_mapped_reader_add_block(r, &desc), RMIG_OK);
    cr_assert_eq(rmig_mapped_reader_load(r), RMIG_OK);
    cr_assert_eq(memcmp(copy.mem, ram.mem, ram.length), 0);
    rmig_mapped_reader_close(r);
    close(fd);
}

// Their pages could not be placed one by one.
Test(mapped_lazy, huge_pages_are_refused_and_keep_what_they_hold) {
    struct rmig_mapped_options opt = {.no_sync = true};
    struct ram ram = {"ram", new_memory(2 * RMIG_MIB), 2 * RMIG_MIB};
    int fd = new_file();
    save_file(fd, &opt, &ram, 1);
    void *huge = mmap(NULL, ram.length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB, -1, 0);
    if (huge == MAP_FAILED)
        cr_skip("no huge pages here (sysctl vm.nr_hugepages)");
    memset(huge, 7, ram.length);
    struct ram copy = {"ram", (uint8_t *)huge, ram.length};
    struct rmig_block_desc desc = describe(&copy, 0);
    struct rmig_mapped_reader *r = open_reader(fd, &opt);
    cr_assert_eq(rmig_mapped_reader_add_block(r, &desc), RMIG_OK);
    int status = rmig_mapped_reader_load_start(r);
    const struct rmig_error *error = rmig_mapped_reader_error(r);
    if (status == RMIG_ERR_SETUP)
        cr_skip("no userfaultfd here");
    cr_assert_eq(status, RMIG_ERR_ARGUMENT, "%s", error->text);
    cr_assert(strstr(error->text, "huge pages of hugetlbfs") != NULL, "%s", error->text);
    cr_assert_eq(copy.mem[ram.length - 1], 7);
    cr_assert_eq(rmig_mapped_reader_load(r), RMIG_OK);
    cr_assert_eq(copy.mem[ram.length - 1], 0);
    rmig_mapped_reader_close(r);
    close(fd);
}

static int lazy_start(struct rmig_error *err) {
    struct rmig_mapped_options opt = {.no_sync = true};
    struct ram ram = {"ram", new_memory(8192), 8192};
    struct rmig_block_desc desc = describe(&ram, 0);
    int fd = new_file();
    fill(ram.mem, 8192);
    uint8_t first = ram.mem[0];
    save_file(fd, &opt, &ram, 1);
    struct rmig_mapped_reader *r = open_reader(fd, &opt);
    cr_assert_eq(rmig_mapped_reader_add_block(r, &desc), RMIG_OK);
    int status = rmig_mapped_reader_load_start(r);
    *err = *rmig_mapped_reader_error(r);
    if (status == RMIG_OK)
        cr_assert_eq(*(volatile uint8_t *)ram.mem, first);
    if (status == RMIG_OK)
        cr_assert_eq(rmig_mapped_reader_load_wait(r, RMIG_FOREVER), RMIG_OK);
    rmig_mapped_reader_close(r);
    close(fd);
    return status;
}

static bool may_call_userfaultfd(void) {
    int fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC);
    if (fd >= 0)
        close(fd);
    return fd >= 0;
}

// Whom the system call refuses may have been let in by the device.
Test(mapped_lazy, the_device_of_userfaultfd_is_tried, .timeout = 60) {
    struct rmig_error err;
    struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
    struct __user_cap_data_struct caps[2];
    cr_assert_eq(syscall(SYS_capget, &header, caps), 0);
    caps[0].effective &= ~(1u << CAP_SYS_PTRACE);
    caps[0].permitted &= ~(1u << CAP_SYS_PTRACE);
    cr_assert_eq(syscall(SYS_capset, &header, caps), 0);
    int device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
    if (device < 0 || may_call_userfaultfd())
        cr_skip_test("the device is not there, or anybody may call userfaultfd");
    close(device);
    int status = lazy_start(&err);
    cr_assert_eq(status, RMIG_OK, "%s", err.text);
}

Test(mapped_lazy, who_may_not_have_userfaultfd_hears_of_its_device, .timeout = 60) {
    struct rmig_error err;
    if (geteuid() == 0)
        cr_assert_eq(setresuid(65534, 65534, 65534), 0);
    if (may_call_userfaultfd() || access("/dev/userfaultfd", R_OK | W_OK) == 0)
        cr_skip_test("anybody may have userfaultfd");
    cr_assert_eq(lazy_start(&err), RMIG_ERR_SETUP);
    cr_assert(strstr(err.text, "or access to /dev/userfaultfd") != NULL, "%s", err.text);
}

Test(mapped_lazy, memory_that_does_not_suit_is_refused) {
    struct rmig_mapped_options opt = {.no_sync = true, .page_size = 1024};
    struct ram ram = {"ram", new_memory(8192) + 1024, 4096};
    struct rmig_block_desc desc = describe(&ram, 0);
    int fd = new_file();
    save_file(fd, &opt, &ram, 1);
    struct rmig_mapped_reader *r = open_reader(fd, &opt);
    cr_assert_eq(rmig_mapped_reader_load_wait(r, 0), RMIG_ERR_STATE);
    cr_assert_eq(rmig_mapped_reader_load_start(r), RMIG_ERR_STATE);
    cr_assert_eq(rmig_mapped_reader_add_block(r, &desc), RMIG_OK);
    cr_assert_eq(rmig_mapped_reader_load_start(r), RMIG_ERR_ARGUMENT);
    cr_assert(strstr(rmig_mapped_reader_error(r)->text, "wants whole host pages") != NULL);
    cr_assert_eq(rmig_mapped_reader_load(r), RMIG_OK);
    rmig_mapped_reader_close(r);
    close(fd);
}

// >>refusals: files

static const struct rmig_mapped_options small_opt = {.file_align = 4096, .no_sync = true};

// Blocks "ram" of 5 pages and "rom" of 2: entry of the first at 0x5d, of the second at 0x1000 + 5 pages.
static int small_file(void) {
    static struct ram ram[] = {{"ram", NULL, 5 * 4096}, {"rom", NULL, 2 * 4096}};
    int fd = new_file();
    for (unsigned i = 0; i < 2; i++) {
        ram[i].mem = new_memory(ram[i].length);
        ram[i].mem[0] = ram[i].mem[ram[i].length - 1] = 1;
    }
    save_file(fd, &small_opt, ram, 2);
    return fd;
}
enum { ENTRY_1 = 0x5d, HEADER_1 = ENTRY_1 + 12, BITMAP_1 = HEADER_1 + 28, ENTRY_2 = 0x6000, HEADER_2 = ENTRY_2 + 12 };

Test(mapped_refuses, each_field_that_is_wrong_by_its_name) {
    static const struct {
        uint64_t at;
        unsigned n;
        uint8_t bytes[8];
        const char *text;
    } change[] = {
        {0, 8, {0}, "no magic at file offset 0"},
        {0, 1, {'X'}, "not a migration stream"},
        {7, 1, {2}, "version 2; must be 3"},
        {0x3a, 6, {'f', 'i', 'x', 'e', 'd', '-'}, "fixed--ram"},
        {0x59, 4, {0, 2, 0x80, 4}, "ram: block 2 has no name"},
        {0x59, 4, {0, 0, 0x40, 4}, "1 to 16384 are left of the total of 16384"},
        {HEADER_1 + 3, 1, {0}, "block \"ram\": mapped-ram header of version 0; must be 1"},
        {HEADER_1 + 3, 1, {2}, "block \"ram\": mapped-ram header of version 2; must be 1"},
        {HEADER_1 + 4, 8, {0, 0, 0, 0, 0, 0, 0, 0}, "block \"ram\": page size 0; must be a power of two"},
        {HEADER_1 + 4, 8, {0, 0, 0, 0, 0, 0, 0x30, 0}, "page size 12288; must be a power of two"},
        {HEADER_1 + 4, 8, {0, 0, 0, 0, 0, 0, 0x20, 0}, "block \"ram\" of 20480 bytes: must be a multiple of the page"},
        {HEADER_2 + 4, 8, {0, 0, 0, 0, 0, 0, 0x20, 0}, "block \"rom\": page size 8192; other blocks have 4096"},
        {HEADER_1 + 12, 8, {0, 0, 0, 0, 0, 1, 0, 0}, "its bitmap, 8 bytes at file offset 65536, lies outside"},
        {HEADER_1 + 12, 8, {255, 255, 255, 255, 255, 255, 255, 255}, "its bitmap, 8 bytes at file offset 1844"},
        {HEADER_1 + 20, 8, {0, 0, 0, 0, 0, 1, 0, 0}, "its pages, 20480 bytes at file offset 65536, lie outside"},
        {HEADER_1 + 20, 8, {255, 255, 255, 255, 255, 255, 0xf0, 0}, "lie outside the file"},
        {HEADER_1 + 20, 8, {0, 0, 0, 0, 0, 0, 0x12, 0}, "file offset 4608; must be a multiple of the page size, 4096"},
        {HEADER_2 + 12,
         8,
         {0, 0, 0, 0, 0, 0, 0x10, 0},
         "the pages of block \"ram\" and the bitmap of block \"rom\" over"},
        {HEADER_2 + 12, 8, {0, 0, 0, 0, 0, 0, 0x70, 0}, "block \"rom\" overlap at file offset 28672"},
        {BITMAP_1, 1, {0x3f}, "block \"ram\": its bitmap, at file offset 133, has bits behind its last page"},
        {BITMAP_1 + 7, 1, {0x80}, "damaged, or of a host of another byte order"},
        {ENTRY_2 + 2, 2, {'a', 'm'}, "block \"ram\" comes twice"},
        {0x9000 + 7, 1, {0x08}, "PAGE"},
        {0x9000 + 8, 1, {0x7d}, "byte 7d where a section"},
        {0x9000 + 13, 1, {0}, "before the END of ram"},
        {0x9000 + 31 + 13, 1, {1}, "does not end in a description"},
    };
    for (size_t i = 0; i < sizeof change / sizeof change[0]; i++) {
        int fd = small_file();
        write_at(fd, change[i].bytes, change[i].n, change[i].at);
        expect_refused(fd, NULL, change[i].text);
        close(fd);
    }
}

Test(mapped_refuses, regions_before_the_beginning_of_the_stream) {
    static const uint8_t nowhere[8] = {0};
    struct rmig_mapped_options opt = {.file_align = 4096, .no_sync = true, .offset = 8192};
    struct ram ram = {"ram", new_memory(5 * 4096), 5 * 4096};
    for (unsigned field = 12; field <= 20; field += 8) { // where the bitmap is, and the pages
        int fd = new_file();
        ram.mem[0] = 1;
        save_file(fd, &opt, &ram, 1);
        write_at(fd, nowhere, 8, opt.offset + HEADER_1 + field);
        expect_refused(fd, &opt, "before the stream, which begins at 8192");
        close(fd);
    }
}

Test(mapped_refuses, other_page_sizes_than_wanted) {
    int fd = small_file();
    struct rmig_mapped_options opt = {.page_size = 16384};
    expect_refused(fd, &opt, "block \"ram\": page size 4096; wanted are pages of 16384 bytes");
    close(fd);
}

// A head of a stream, by hand, of so many bytes and then holes.
static int file_of(const void *head, size_t n, uint64_t size) {
    int fd = new_file();
    write_at(fd, head, n, 0);
    cr_assert_eq(ftruncate(fd, (off_t)size), 0);
    return fd;
}

#define START "QEVM\0\0\0\3\7\0\0\0\4test"
#define CAPABILITIES "\5\32configuration/capabilities\0\0\0\1\0\0\0"
#define RAM "\1\0\0\0\1\3ram\0\0\0\0\0\0\0\4"

Test(mapped_refuses, page_sizes_that_the_configuration_denies) {
    static const char head[] = START "\5\36configuration/target-page-bits\0\0\0\1\0\0\0\16" CAPABILITIES
                                     "\1\12mapped-ram" RAM "\0\0\0\0\0\0\20\4\1a\0\0\0\0\0\0\20\0"
                                     "\0\0\0\1\0\0\0\0\0\0\20\0\0\0\0\0\0\0\1\0\0\0\0\0\0\0\20\0";
    int fd = file_of(head, sizeof head - 1, 16384);
    expect_refused(fd, NULL, "page size 4096; the configuration of the machine says pages of 14 bits");
    close(fd);
}

Test(mapped_refuses, streams_that_are_not_mapped_ram) {
    static const char plain[] = START RAM "\0\0\0\0\0\0\20\4", fixed[] = START CAPABILITIES "\1\11fixed-ram" RAM;
    int fd = file_of(plain, sizeof plain - 1, 16384);
    expect_refused(fd, NULL, "does not list the capability mapped-ram");
    close(fd);
    fd = file_of(fixed, sizeof fixed - 1, 16384);
    expect_refused(fd, NULL, "\"fixed-ram\" is an early form of mapped-ram");
    close(fd);
}

Test(mapped_refuses, every_beginning_of_a_file) {
    int fd = small_file(), part = new_file();
    uint64_t size = size_of(fd);
    uint8_t *bytes = (uint8_t *)malloc(size);
    struct rmig_error err;
    read_at(fd, bytes, size, 0);
    write_at(part, bytes, size, 0);
    rmig_mapped_reader_close(open_reader(part, NULL));
    for (uint64_t n = size; n > 0; n -= n > 0x9000 || n < 0x200 ? 1 : 61) {
        cr_assert_eq(ftruncate(part, (off_t)n - 1), 0);
        cr_assert_eq(refused(part, NULL, &err), RMIG_ERR_WIRE, "%s", err.text);
    }
    free(bytes);
    close(fd);
    close(part);
}

Test(mapped_refuses, bytes_behind_the_end) {
    int fd = small_file();
    write_at(fd, "x", 1, size_of(fd));
    expect_refused(fd, NULL, "something was appended: what is no snapshot begins at file offset 36928");
    close(fd);
}

// The first end is the end, whatever the rest ends in.
Test(mapped_refuses, what_follows_the_first_end) {
    static const char again[] = "\0\6\0\0\0\2{}", more[] = "\4more\0\6\0\0\0\2{}";
    const struct {
        const char *bytes;
        size_t n;
        uint64_t behind; // the end
        const char *text;
    } tail[] = {
        {again, sizeof again - 1, 0, "ends at file offset 36928, and something was appended"},
        {more, sizeof more - 1, 0, "what is no snapshot begins at file offset 36928"},
        {more, sizeof more - 1, 100000, "what is no snapshot begins at file offset 136928"},
        {START "\0\6\0\0\0\2{}", sizeof START + 7, 0, "another one begins at file offset 36928"},
        {START "\0\6\0\0\0\2{}", sizeof START + 7, (uint64_t)1 << 40,
         "another one begins at file offset 1099511664704"},
    };
    for (size_t i = 0; i < sizeof tail / sizeof tail[0]; i++) {
        int fd = small_file();
        cr_assert_eq(size_of(fd), 36928);
        write_at(fd, tail[i].bytes, tail[i].n, 36928 + tail[i].behind);
        expect_refused(fd, NULL, tail[i].text);
        close(fd);
    }
}

Test(mapped_refuses, zeros_behind_the_end) {
    int fd = small_file();
    cr_assert_eq(ftruncate(fd, 50000), 0);
    expect_refused(fd, NULL, "a run of zeros begins at file offset 36928");
    close(fd);
}

// A reader would stop at the first; of a guest's own bytes that is no less true.
Test(mapped_refuses, device_state_that_holds_an_end) {
    static const char state[] = "\4device\0\6\0\0\0\2{}more\0\6\0\0\0\2{}";
    struct ram ram = {"ram", new_memory(65536), 65536};
    int fd = new_file();
    struct rmig_mapped_writer *w = start_writer(fd, NULL, &ram, 1);
    OK(w, rmig_mapped_writer_put(w, state, sizeof state - 1));
    cr_assert_eq(rmig_mapped_writer_finish(w), RMIG_ERR_STATE);
    cr_assert(strstr(rmig_mapped_writer_error(w)->text, "looks like its end, 12 bytes before") != NULL, "%s",
              rmig_mapped_writer_error(w)->text);
    rmig_mapped_writer_close(w);
    munmap(ram.mem, ram.length);
    close(fd);
}

// Whatever the hole's place in a piece that is read, and however long it is.
Test(mapped_read, device_state_with_holes_has_its_end, .timeout = 60) {
    static const char end[] = "\0\6\0\0\0\2{}";
    for (uint64_t hole = 1; hole < (uint64_t)1 << 42; hole = hole * 5 + 3) {
        int fd = small_file();
        cr_assert_eq(ftruncate(fd, 36928 - STATE_SIZE + 7), 0); // "\4device"
        write_at(fd, end, sizeof end - 1, 36928 - STATE_SIZE + 7 + hole);
        struct rmig_mapped_reader *r = open_reader(fd, NULL);
        cr_assert_eq(rmig_mapped_reader_state_size(r), 7 + hole + sizeof end - 1);
        rmig_mapped_reader_close(r);
        close(fd);
    }
}

// A crash while an older snapshot is written over must not leave one: what was there is none from the start on.
Test(mapped_layout, an_older_snapshot_is_none_as_soon_as_another_begins) {
    struct ram ram = {"ram", new_memory(8192), 8192};
    int fd = small_file();
    ram.mem[0] = 1;
    struct rmig_mapped_writer *w = start_writer(fd, &small_opt, &ram, 1);
    uint64_t end = rmig_mapped_writer_size(w);
    cr_assert_lt(end, 36928);
    expect_refused(fd, NULL, "its writer did not finish");
    save_all(w, &ram, 1);
    expect_refused(fd, NULL, "no magic");
    OK(w, rmig_mapped_writer_put(w, STATE, STATE_SIZE));
    OK(w, rmig_mapped_writer_finish(w));
    cr_assert_eq(rmig_mapped_writer_size(w), end + STATE_SIZE);
    cr_assert_eq(rmig_mapped_writer_size(w), size_of(fd));
    rmig_mapped_writer_close(w);
    close(fd);
}

Test(mapped_refuses, huge_blocks_of_holes_without_reading_them, .timeout = 600) {
    static const char head[] = START CAPABILITIES "\1\12mapped-ram" RAM "\0\0\010\0\0\0\0\4\1a\0\0\010\0\0\0\0\0"
                                                  "\0\0\0\1\0\0\0\0\0\0\20\0\0\0\0\0\0\0\20\0\0\0\0\1\0\0\0\0";
    int fd = file_of(head, sizeof head - 1, (uint64_t)0x8000000 << 16 | 0x200000000); // 8 TiB of RAM
    expect_refused(fd, NULL, "word 0x0: must be MEM_SIZE");
    close(fd);
}

Test(mapped_read, an_incomplete_file_can_be_looked_at_and_not_loaded) {
    struct rmig_mapped_options opt = {.incomplete = true};
    int fd = small_file();
    cr_assert_eq(ftruncate(fd, 0x9000), 0);
    struct rmig_mapped_reader *r = open_reader(fd, &opt);
    cr_assert(!rmig_mapped_reader_whole(r));
    cr_assert(strstr(rmig_mapped_reader_error(r)->text, "before the END of ram") != NULL);
    cr_assert_eq(rmig_mapped_reader_blocks(r, NULL), 2);
    uint8_t state[10], page[4096];
    cr_assert_eq(rmig_mapped_reader_load(r), RMIG_ERR_WIRE);
    cr_assert_eq(rmig_mapped_reader_read(r, 0, 0, page, sizeof page), RMIG_ERR_WIRE);
    cr_assert_eq(rmig_mapped_reader_get(r, state, sizeof state), RMIG_ERR_WIRE);
    rmig_mapped_reader_close(r);
    close(fd);
}

Test(mapped_read, pages_of_a_file_that_was_changed_are_refused) {
    uint8_t page[4096];
    int fd = small_file();
    struct rmig_mapped_reader *r = open_reader(fd, &small_opt);
    cr_assert_eq(rmig_mapped_reader_read(r, 0, 0, page, sizeof page), RMIG_OK);
    struct timespec pause = {0, 20000000};
    nanosleep(&pause, NULL); // longer than the file system's clock ticks
    write_at(fd, "x", 1, 0x1000);
    cr_assert_eq(rmig_mapped_reader_read(r, 0, 0, page, sizeof page), RMIG_ERR_FILE);
    const char *text = rmig_mapped_reader_error(r)->text;
    cr_assert(strstr(text, "was changed while it was read") != NULL, "%s", text);
    rmig_mapped_reader_close(r);
    close(fd);
}

Test(mapped_read, shared_blocks_have_an_address_and_no_pages) {
    static const char head[] = START CAPABILITIES "\2\17x-ignore-shared\12mapped-ram" RAM "\0\0\0\0\0\0\60\4"
                                                  "\1s\0\0\0\0\0\0\40\0\0\0\0\1\0\0\0\0"
                                                  "\0\0\0\1\0\0\0\0\0\0\20\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0"
                                                  "\1a\0\0\0\0\0\0\20\0\0\0\0\0\0\0\60\0"
                                                  "\0\0\0\1\0\0\0\0\0\0\20\0\0\0\0\0\0\0\1\54\0\0\0\0\0\0\20\0";
    static const char tail[] = "\0\0\0\0\0\0\0\20\176\0\0\0\1\3\0\0\0\1\0\0\0\0\0\0\0\20\176\0\0\0\1" STATE;
    int fd = file_of(head, sizeof head - 1, 8192);
    write_at(fd, tail, sizeof tail - 1, 8192);
    struct rmig_mapped_reader *r = open_reader(fd, NULL);
    const struct rmig_mapped_block *b;
    uint8_t page[4096];
    cr_assert_eq(rmig_mapped_reader_blocks(r, &b), 2);
    cr_assert(b[0].ignored && b[0].guest_address == 0x100000000 && !b[1].ignored && b[1].guest_address == 0x3000);
    cr_assert_eq(rmig_mapped_reader_read(r, 0, 0, page, 4096), RMIG_ERR_ARGUMENT);
    cr_assert_eq(rmig_mapped_reader_read(r, 1, 0, page, 4096), RMIG_OK);
    rmig_mapped_reader_close(r);
    close(fd);
}

// >>refusals: blocks, calls, descriptors

Test(mapped_refuses, blocks_that_do_not_fit_the_file) {
    int fd = small_file();
    struct rmig_mapped_reader *r = open_reader(fd, NULL);
    struct ram ram = {"ram", new_memory(5 * 4096), 5 * 4096}, shorter = {"rom", new_memory(8192), 4096};
    struct ram other = {"other", ram.mem, 4096};
    struct rmig_block_desc desc = describe(&shorter, 0);
    cr_assert_eq(rmig_mapped_reader_add_block(r, &desc), RMIG_ERR_ARGUMENT);
    cr_assert_str_eq(rmig_mapped_reader_error(r)->text, "block \"rom\" has 4096 bytes here, and 8192 in the file");
    desc = describe(&other, 0);
    cr_assert_eq(rmig_mapped_reader_add_block(r, &desc), RMIG_ERR_ARGUMENT);
    cr_assert_str_eq(rmig_mapped_reader_error(r)->text, "block \"other\": there is none in the file");
    desc = describe(&ram, 0);
    cr_assert_eq(rmig_mapped_reader_add_block(r, &desc), RMIG_OK);
    cr_assert_eq(rmig_mapped_reader_add_block(r, &desc), RMIG_ERR_ARGUMENT);
    rmig_mapped_reader_forgive(r);
    cr_assert_eq(rmig_mapped_reader_load(r), RMIG_ERR_STATE);
    cr_assert(strstr(rmig_mapped_reader_error(r)->text, "block \"rom\" of the file was not added") != NULL);
    rmig_mapped_reader_close(r);
    close(fd);
}

Test(mapped_refuses, calls_out_of_order_and_bad_arguments) {
    struct ram ram = {"ram", new_memory(8192), 8192}, odd = {"odd", ram.mem, 5000};
    struct rmig_block_desc desc = describe(&ram, 0);
    struct rmig_mapped_machine machine = machine_of("");
    uint64_t bits[1] = {1};
    int fd = new_file();
    struct rmig_mapped_writer *w = open_writer(fd, NULL);
    cr_assert_eq(rmig_mapped_writer_begin_round(w), RMIG_ERR_STATE);
    cr_assert_eq(rmig_mapped_writer_put(w, "x", 1), RMIG_ERR_STATE);
    cr_assert_eq(rmig_mapped_writer_finish(w), RMIG_ERR_STATE);
    cr_assert_eq(rmig_mapped_writer_start(w, &machine), RMIG_ERR_ARGUMENT);
    machine = machine_of("test");
    cr_assert_eq(rmig_mapped_writer_start(w, &machine), RMIG_ERR_STATE);
    OK(w, rmig_mapped_writer_add_block(w, &desc, NULL));
    machine.configuration.capabilities = RMIG_QEMU_CAPABILITY_IGNORE_SHARED;
    cr_assert_eq(rmig_mapped_writer_start(w, &machine), RMIG_ERR_ARGUMENT);
    machine = machine_of("test");
    machine.configuration.page_bits = 14;
    cr_assert_eq(rmig_mapped_writer_start(w, &machine), RMIG_ERR_ARGUMENT); // 8192 bytes are no multiple
    machine.configuration.page_bits = 31;
    cr_assert_eq(rmig_mapped_writer_start(w, &machine), RMIG_ERR_ARGUMENT);
    machine = machine_of("test");
    OK(w, rmig_mapped_writer_start(w, &machine));
    cr_assert_eq(rmig_mapped_writer_add_block(w, &desc, NULL), RMIG_ERR_STATE);
    cr_assert_eq(rmig_mapped_writer_save_page(w, 0, 0), RMIG_ERR_STATE);
    rmig_mapped_writer_forgive(w);
    cr_assert_eq(rmig_mapped_writer_end_round(w), RMIG_ERR_STATE);
    cr_assert_eq(rmig_mapped_writer_finish(w), RMIG_ERR_STATE);
    cr_assert(strstr(rmig_mapped_writer_error(w)->text, "does not end in a description") != NULL);
    OK(w, rmig_mapped_writer_begin_round(w));
    cr_assert_eq(rmig_mapped_writer_save_page(w, 1, 0), RMIG_ERR_ARGUMENT);
    cr_assert_eq(rmig_mapped_writer_save_page(w, 0, 8192), RMIG_ERR_ARGUMENT);
    cr_assert_eq(rmig_mapped_writer_save_range(w, 0, 4096, UINT64_MAX), RMIG_ERR_ARGUMENT);
    cr_assert_eq(rmig_mapped_writer_save_bitmap(w, 0, bits, 1, 2), RMIG_ERR_ARGUMENT);
    cr_assert_eq(rmig_mapped_writer_save_bitmap(w, 0, NULL, 0, 1), RMIG_ERR_ARGUMENT);
    rmig_mapped_writer_forgive(w);
    cr_assert_eq(rmig_mapped_writer_finish(w), RMIG_ERR_STATE);
    OK(w, rmig_mapped_writer_end_round(w));
    finish(w);
    rmig_mapped_reader_close(open_reader(fd, NULL));
    w = open_writer(fd, NULL);
    desc = describe(&odd, 0);
    OK(w, rmig_mapped_writer_add_block(w, &desc, NULL));
    cr_assert_eq(rmig_mapped_writer_start(w, &machine), RMIG_ERR_ARGUMENT);
    cr_assert_str_eq(rmig_mapped_writer_error(w)->text,
                     "block \"odd\" of 5000 bytes: must be a multiple of the page size, 4096");
    rmig_mapped_writer_close(w);
    close(fd);
}

static void expect_open(int fd, bool out, const struct rmig_mapped_options *opt, int status, const char *text) {
    struct rmig_mapped_writer *w;
    struct rmig_mapped_reader *r;
    struct rmig_error err;
    int got = out ? rmig_mapped_writer_open(fd, opt, &w, &err) : rmig_mapped_reader_open(fd, opt, &r, &err);
    cr_assert_eq(got, status);
    cr_assert(strstr(err.text, text) != NULL, "wanted \"%s\" in: %s", text, err.text);
}

Test(mapped_refuses, descriptors_that_cannot_do_it) {
    int ends[2], dir = open("/tmp", O_RDONLY | O_DIRECTORY), null = open("/dev/null", O_RDWR), fd = new_file();
    char path[64];
    cr_assert_eq(pipe(ends), 0);
    expect_open(ends[1], true, NULL, RMIG_ERR_ARGUMENT, "is a pipe");
    expect_open(ends[0], false, NULL, RMIG_ERR_ARGUMENT, "is a pipe");
    expect_open(dir, false, NULL, RMIG_ERR_ARGUMENT, "is a directory");
    expect_open(null, true, NULL, RMIG_ERR_ARGUMENT, "is a device");
    expect_open(-1, true, NULL, RMIG_ERR_ARGUMENT, "Bad file descriptor");
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    int read_only = open(path, O_RDONLY), write_only = open(path, O_WRONLY), append = open(path, O_RDWR | O_APPEND);
    int direct = open(path, O_RDWR | O_DIRECT);
    expect_open(read_only, true, NULL, RMIG_ERR_ARGUMENT, "open for reading only");
    expect_open(write_only, false, NULL, RMIG_ERR_ARGUMENT, "open for writing only");
    expect_open(append, true, NULL, RMIG_ERR_ARGUMENT, "O_APPEND");
    if (direct >= 0)
        expect_open(direct, true, NULL, RMIG_ERR_ARGUMENT, "O_DIRECT");
    expect_open(fd, false, NULL, RMIG_ERR_WIRE, "its writer did not finish");
}

Test(mapped_refuses, options_out_of_range) {
    int fd = new_file();
    struct rmig_mapped_options page = {.page_size = 3000}, small = {.page_size = 512}, align = {.file_align = 5000};
    struct rmig_mapped_options below_page = {.page_size = 4096, .file_align = 2048}, threads = {.threads = 65};
    struct rmig_mapped_options offset = {.offset = UINT64_MAX};
    expect_open(fd, true, &page, RMIG_ERR_PARAM, "page_size 3000: must be a power of two from 1024");
    expect_open(fd, false, &small, RMIG_ERR_PARAM, "page_size 512");
    expect_open(fd, true, &align, RMIG_ERR_PARAM, "file_align 5000: must be a power of two");
    expect_open(fd, true, &below_page, RMIG_ERR_PARAM,
                "file_align 2048: must be a power of two from the page size, 4096");
    expect_open(fd, true, &threads, RMIG_ERR_PARAM, "threads 65: must be 1 to 64");
    expect_open(fd, false, &offset, RMIG_ERR_PARAM, "offset 18446744073709551615: must be at most");
    close(fd);
}

// A program that looks at the last status alone must not be told that all is well.
static void writer_refuses(struct rmig_mapped_writer *w, const char *text) {
    cr_expect_eq(rmig_mapped_writer_finish(w), RMIG_ERR_ARGUMENT);
    cr_expect(strstr(rmig_mapped_writer_error(w)->text, text) != NULL, "wanted \"%s\" in: %s", text,
              rmig_mapped_writer_error(w)->text);
    cr_expect_eq(rmig_mapped_writer_error(w)->status, RMIG_ERR_ARGUMENT);
}

static void refused_call(unsigned which, const char *text) {
    struct ram ram = {"ram", new_memory(8192), 8192};
    struct rmig_mapped_options opt = {.no_sync = true};
    struct rmig_mapped_machine machine = machine_of("test");
    struct rmig_block_desc desc = describe(&ram, 0), twice = desc;
    uint64_t bits[1] = {3};
    int fd = new_file();
    struct rmig_mapped_writer *w = open_writer(fd, &opt);
    rmig_mapped_writer_add_block(w, &desc, NULL);
    if (which == 0)
        rmig_mapped_writer_add_block(w, &twice, NULL);
    rmig_mapped_writer_start(w, &machine);
    rmig_mapped_writer_begin_round(w);
    if (which == 1)
        rmig_mapped_writer_save_page(w, 1, 0);
    if (which == 2)
        rmig_mapped_writer_save_range(w, 0, 4096, 8192);
    if (which == 3)
        rmig_mapped_writer_save_bitmap(w, 0, bits, 1, 2);
    if (which == 4)
        rmig_mapped_writer_put(w, NULL, 7);
    rmig_mapped_writer_save_range(w, 0, 0, 1);
    rmig_mapped_writer_save_page(w, 7, 0); // the first refusal is the one that is told
    cr_expect_eq(rmig_mapped_writer_end_round(w), RMIG_ERR_ARGUMENT);
    cr_expect(strstr(rmig_mapped_writer_error(w)->text, text) != NULL, "%s", rmig_mapped_writer_error(w)->text);
    rmig_mapped_writer_put(w, STATE, STATE_SIZE);
    writer_refuses(w, text);
    expect_refused(fd, NULL, "the writer of this file did not finish");
    rmig_mapped_writer_forgive(w);
    OK(w, rmig_mapped_writer_end_round(w)); // the round was left open
    OK(w, rmig_mapped_writer_finish(w));
    rmig_mapped_writer_close(w);
    rmig_mapped_reader_close(open_reader(fd, NULL));
    close(fd);
}

Test(mapped_refuses, to_finish_a_file_that_lacks_what_was_refused) {
    refused_call(0, "there is a block 0 of that name already");
    refused_call(1, "block 1; there are 1");
    refused_call(2, "8192 bytes at 4096 are outside block");
    refused_call(3, "2 pages from page 1 on are outside");
    refused_call(4, "data is NULL, of 7 bytes");
}

Test(mapped_refuses, to_load_when_a_block_was_refused) {
    struct ram ram[] = {{"ram", new_memory(5 * 4096), 5 * 4096}, {"rom", new_memory(8192), 8192}};
    struct ram other = {"vga", new_memory(4096), 4096};
    int fd = small_file();
    struct rmig_mapped_reader *r = open_reader(fd, NULL);
    for (uint32_t i = 0; i < 2; i++) {
        struct rmig_block_desc desc = describe(&ram[i], i);
        cr_assert_eq(rmig_mapped_reader_add_block(r, &desc), RMIG_OK);
    }
    struct rmig_block_desc desc = describe(&other, 2);
    cr_assert_eq(rmig_mapped_reader_add_block(r, &desc), RMIG_ERR_ARGUMENT);
    for (unsigned i = 0; i < 2; i++) {
        cr_expect_eq(i == 0 ? rmig_mapped_reader_load(r) : rmig_mapped_reader_load_start(r), RMIG_ERR_ARGUMENT);
        cr_expect_str_eq(rmig_mapped_reader_error(r)->text, "block \"vga\": there is none in the file");
    }
    rmig_mapped_reader_forgive(r);
    cr_expect_eq(rmig_mapped_reader_load(r), RMIG_OK);
    rmig_mapped_reader_close(r);
    close(fd);
}

Test(mapped_refuses, null_in_place_of_an_object) {
    static const struct rmig_block_desc desc = {.name = "ram", .length = 4096};
    struct rmig_mapped_machine machine = machine_of("test");
    const struct rmig_mapped_block *blocks = (const struct rmig_mapped_block *)&desc;
    struct rmig_stats stats = {.rounds = 7};
    struct rmig_error err;
    uint64_t word = 0;
    uint32_t index;
    uint8_t byte = 0;
    int fd = small_file();
    cr_expect_eq(rmig_mapped_writer_open(fd, NULL, NULL, &err), RMIG_ERR_ARGUMENT);
    cr_expect_eq(rmig_mapped_reader_open(fd, NULL, NULL, NULL), RMIG_ERR_ARGUMENT);
    rmig_mapped_writer_close(NULL);
    rmig_mapped_writer_forgive(NULL);
    cr_expect_eq(rmig_mapped_writer_add_block(NULL, &desc, &index), RMIG_ERR_ARGUMENT);
    cr_expect_eq(rmig_mapped_writer_start(NULL, &machine), RMIG_ERR_ARGUMENT);
    cr_expect_eq(rmig_mapped_writer_begin_round(NULL), RMIG_ERR_ARGUMENT);
    cr_expect_eq(rmig_mapped_writer_save_page(NULL, 0, 0), RMIG_ERR_ARGUMENT);
    cr_expect_eq(rmig_mapped_writer_save_range(NULL, 0, 0, 1), RMIG_ERR_ARGUMENT);
    cr_expect_eq(rmig_mapped_writer_save_bitmap(NULL, 0, &word, 0, 1), RMIG_ERR_ARGUMENT);
    cr_expect_eq(rmig_mapped_writer_end_round(NULL), RMIG_ERR_ARGUMENT);
    cr_expect_eq(rmig_mapped_writer_put(NULL, &byte, 1), RMIG_ERR_ARGUMENT);
    cr_expect_eq(rmig_mapped_writer_finish(NULL), RMIG_ERR_ARGUMENT);
    cr_expect_str_neq(rmig_mapped_writer_error(NULL)->text, "");
    rmig_mapped_writer_stats(NULL, &stats);
    cr_expect_eq(rmig_mapped_writer_size(NULL), 0);
    cr_expect_eq(stats.rounds, 0);
    rmig_mapped_reader_close(NULL);
    rmig_mapped_reader_forgive(NULL);
    cr_expect_null(rmig_mapped_reader_machine(NULL));
    cr_expect_eq(rmig_mapped_reader_blocks(NULL, &blocks), 0);
    cr_expect_null(blocks);
    cr_expect_not(rmig_mapped_reader_whole(NULL));
    cr_expect_eq(rmig_mapped_reader_bitmap(NULL, 0, 0, 1, &word), RMIG_ERR_ARGUMENT);
    cr_expect_eq(rmig_mapped_reader_read(NULL, 0, 0, &byte, 1), RMIG_ERR_ARGUMENT);
    cr_expect_eq(rmig_mapped_reader_add_block(NULL, &desc), RMIG_ERR_ARGUMENT);
    cr_expect_eq(rmig_mapped_reader_load(NULL), RMIG_ERR_ARGUMENT);
    cr_expect_eq(rmig_mapped_reader_load_start(NULL), RMIG_ERR_ARGUMENT);
    cr_expect_eq(rmig_mapped_reader_load_wait(NULL, 0), RMIG_ERR_ARGUMENT);
    cr_expect_eq(rmig_mapped_reader_state_size(NULL), 0);
    cr_expect_eq(rmig_mapped_reader_get(NULL, &byte, 1), RMIG_ERR_ARGUMENT);
    cr_expect_str_neq(rmig_mapped_reader_error(NULL)->text, "");
    rmig_mapped_reader_stats(NULL, &stats);
    rmig_mapped_reader_stats(NULL, NULL);
    close(fd);
}

Test(mapped_refuses, null_in_place_of_what_an_object_is_given) {
    struct ram ram = {"ram", new_memory(8192), 8192};
    uint8_t state[100];
    int fd = new_file();
    struct rmig_mapped_writer *w = open_writer(fd, &small_opt);
    struct rmig_mapped_machine machine = machine_of("test");
    struct rmig_block_desc desc = describe(&ram, 0);
    cr_expect_eq(rmig_mapped_writer_add_block(w, NULL, NULL), RMIG_ERR_ARGUMENT);
    rmig_mapped_writer_forgive(w);
    OK(w, rmig_mapped_writer_add_block(w, &desc, NULL));
    cr_expect_eq(rmig_mapped_writer_start(w, NULL), RMIG_ERR_ARGUMENT);
    OK(w, rmig_mapped_writer_start(w, &machine));
    OK(w, rmig_mapped_writer_put(w, NULL, 0));
    rmig_mapped_writer_stats(w, NULL);
    save_all(w, &ram, 1);
    finish(w);
    struct rmig_mapped_reader *r = open_reader(fd, NULL);
    cr_expect_eq(rmig_mapped_reader_blocks(r, NULL), 1);
    cr_expect_eq(rmig_mapped_reader_bitmap(r, 0, 0, 1, NULL), RMIG_ERR_ARGUMENT);
    cr_expect_eq(rmig_mapped_reader_read(r, 0, 0, NULL, 4096), RMIG_ERR_ARGUMENT);
    cr_expect_eq(rmig_mapped_reader_add_block(r, NULL), RMIG_ERR_ARGUMENT);
    cr_expect_eq(rmig_mapped_reader_get(r, NULL, 10), RMIG_ERR_ARGUMENT);
    cr_expect_eq(rmig_mapped_reader_get(r, state, sizeof state), STATE_SIZE);
    rmig_mapped_reader_stats(r, NULL);
    rmig_mapped_reader_close(r);
    close(fd);
}

// Of the framing, which has the same rule.
Test(mapped_refuses, null_in_place_of_a_stream) {
    struct rmig_qemu_reader r;
    struct rmig_qemu_event ev;
    struct rmig_qemu_configuration configuration = {.machine = "test"};
    struct rmig_qemu_block block = {.name = "ram", .length = 4096};
    struct rmig_qemu_return answer = {.type = RMIG_QEMU_RETURN_SHUT};
    uint8_t out[RMIG_QEMU_START_MAX];
    rmig_qemu_reader_init(NULL, 0);
    rmig_qemu_reader_init(&r, 0);
    cr_expect_eq(rmig_qemu_reader_feed(NULL, "x", 1, &ev), RMIG_ERR_ARGUMENT);
    cr_expect_eq(rmig_qemu_reader_feed(&r, NULL, 1, &ev), RMIG_ERR_ARGUMENT);
    cr_expect_eq(rmig_qemu_reader_feed(&r, "x", 1, NULL), RMIG_ERR_ARGUMENT);
    cr_expect_eq(rmig_qemu_reader_feed(&r, NULL, 0, &ev), 0);
    cr_expect_eq(rmig_qemu_reader_end_message(NULL, &ev), RMIG_ERR_ARGUMENT);
    cr_expect_eq(rmig_qemu_reader_end_message(&r, NULL), RMIG_ERR_ARGUMENT);
    cr_expect_not(rmig_qemu_reader_whole(NULL));
    cr_expect_eq(rmig_qemu_reader_offset(NULL), 0);
    rmig_qemu_reader_jump(NULL, 7);
    cr_expect_eq(rmig_qemu_encode_start(out, sizeof out, NULL), RMIG_ERR_ARGUMENT);
    cr_expect_eq(rmig_qemu_encode_start(NULL, sizeof out, &configuration), RMIG_ERR_ARGUMENT);
    cr_expect_eq(rmig_qemu_encode_section(NULL, 20, RMIG_QEMU_SECTION_START, 1), RMIG_ERR_ARGUMENT);
    cr_expect_eq(rmig_qemu_encode_mem_size(NULL, 20, 4096), RMIG_ERR_ARGUMENT);
    cr_expect_eq(rmig_qemu_encode_block(NULL, 300, &block, 0), RMIG_ERR_ARGUMENT);
    cr_expect_eq(rmig_qemu_encode_block(out, sizeof out, NULL, 0), RMIG_ERR_ARGUMENT);
    cr_expect_eq(rmig_qemu_encode_word(NULL, 20, RMIG_QEMU_WORD_EOS), RMIG_ERR_ARGUMENT);
    cr_expect_eq(rmig_qemu_encode_footer(NULL, 20, 1), RMIG_ERR_ARGUMENT);
    cr_expect_eq(rmig_qemu_encode_command(NULL, 20, RMIG_QEMU_COMMAND_PING, 1), RMIG_ERR_ARGUMENT);
    cr_expect_eq(rmig_qemu_encode_end(NULL, 20, "{}", 2), RMIG_ERR_ARGUMENT);
    cr_expect_eq(rmig_qemu_encode_end(out, sizeof out, NULL, 2), RMIG_ERR_ARGUMENT);
    cr_expect_eq(rmig_qemu_encode_return(NULL, 8, &answer), RMIG_ERR_ARGUMENT);
    cr_expect_eq(rmig_qemu_encode_return(out, sizeof out, NULL), RMIG_ERR_ARGUMENT);
    cr_expect_eq(rmig_qemu_decode_return(NULL, 8, &answer), RMIG_ERR_ARGUMENT);
    cr_expect_eq(rmig_qemu_decode_return(out, 8, NULL), RMIG_ERR_ARGUMENT);
}

// >>work

static struct rmig_mapped_writer *watched;
static uint8_t *closed_from, *closed_to;

enum { FAR_APART = 8192 }; // dirty pages, in pages

/* What lies before the last page that was taken may not be looked at any more. */
static int close_what_is_done(void *user, const struct rmig_stats *stats) {
    (void)user;
    (void)stats;
    uint8_t *bits = (uint8_t *)watched->place[0].dirty.bits;
    uint64_t first, n;
    if (!rmig_merge_next(&watched->place[0].dirty, (uint64_t)(closed_to - bits) * 8, watched->place[0].dirty.pages, 1,
                         &first, &n))
        return 0;
    uint8_t *upto = bits + (first - first % FAR_APART - FAR_APART / 2) / 64 * 8;
    if (first < FAR_APART)
        return 0;
    upto -= (uintptr_t)upto % 4096;
    if (upto > closed_to) {
        cr_assert_eq(mprotect(closed_to, (size_t)(upto - closed_to), PROT_NONE), 0);
        closed_to = upto;
    }
    return 0;
}

// A round goes through the set of dirty pages once: a second look at what was written already ends in SIGSEGV here. Its
// lowest page is noted, which is not to be taken for the first one that is left.
Test(mapped_rounds, the_set_of_dirty_pages_is_gone_through_once, .timeout = 600) {
    const uint64_t size = 32 * RMIG_GIB, pages = size / 4096, step = FAR_APART;
    struct rmig_mapped_options opt = {.no_sync = true, .progress = close_what_is_done};
    struct ram ram = {"ram", NULL, size};
    ram.mem = (uint8_t *)mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    cr_assert_neq(ram.mem, MAP_FAILED);
    int fd = new_file();
    uint64_t *bitmap = (uint64_t *)calloc(pages / 64, sizeof *bitmap);
    struct rmig_mapped_writer *w = watched = start_writer(fd, &opt, &ram, 1);
    for (uint64_t page = step / 2; page < pages; page += step)
        bitmap[page / 64] |= (uint64_t)1 << page % 64;
    OK(w, rmig_mapped_writer_begin_round(w));
    OK(w, rmig_mapped_writer_save_bitmap(w, 0, bitmap, 0, pages));
    closed_from = (uint8_t *)w->place[0].dirty.bits;
    closed_from += (4096 - (uintptr_t)closed_from % 4096) % 4096;
    closed_to = closed_from;
    OK(w, rmig_mapped_writer_end_round(w));
    cr_assert_gt(closed_to - closed_from, 900000, "%td bytes were closed", closed_to - closed_from);
    cr_assert_eq(mprotect(closed_from, (size_t)(closed_to - closed_from), PROT_READ | PROT_WRITE), 0);
    finish(w);
    free(bitmap);
    munmap(ram.mem, size);
    close(fd);
}

// >>failures in the middle

struct live {
    unsigned with, without; // calls in the first round after something was written: with a throughput, and without
};

static int note_throughput(void *user, const struct rmig_stats *stats) {
    struct live *live = (struct live *)user;
    live->with += stats->rounds == 0 && stats->bytes_written > 0 && stats->throughput > 0;
    live->without += stats->rounds == 0 && stats->bytes_written > 0 && stats->throughput == 0;
    return 0;
}

Test(mapped_rounds, throughput_is_live_in_the_first_round_and_is_what_is_written) {
    struct ram ram = {"ram", new_memory(96 * RMIG_MIB), 96 * RMIG_MIB};
    struct live live = {0, 0};
    struct rmig_mapped_options opt = {.progress = note_throughput, .progress_user = &live, .no_sync = true};
    struct rmig_stats st;
    int fd = new_file();
    memset(ram.mem, 1, 48 * RMIG_MIB); // the rest is zero
    struct rmig_mapped_writer *w = start_writer(fd, &opt, &ram, 1);
    save_all(w, &ram, 1);
    cr_expect_gt(live.with, 0);
    cr_expect_eq(live.without, 0);
    rmig_mapped_writer_stats(w, &st);
    cr_assert_eq(st.bytes_written, 48 * RMIG_MIB);
    double rate = 48.0 * RMIG_MIB * 1e9 / (double)st.round_ns;
    cr_expect((double)st.throughput > 0.99 * rate && (double)st.throughput < 1.01 * rate,
              "%llu bytes/s, %.0f are written", (unsigned long long)st.throughput, rate);
    rmig_mapped_writer_close(w);
    close(fd);
}

static int stop_at_once(void *user, const struct rmig_stats *stats) {
    cr_assert_gt(stats->bytes_pending + stats->round_bytes + stats->bytes_written + stats->bytes_zero, 0);
    ++*(int *)user;
    return 1;
}

static int stop_once_it_loads(void *user, const struct rmig_stats *stats) {
    ++*(int *)user;
    return stats->bytes_written > 0;
}

Test(mapped_fails, progress_can_cancel_and_nothing_whole_is_left) {
    int calls = 0;
    struct ram ram = {"ram", new_memory(8 * RMIG_MIB), 8 * RMIG_MIB};
    struct rmig_mapped_options opt = {.progress = stop_at_once, .progress_user = &calls, .threads = 2};
    int fd = new_file();
    memset(ram.mem, 3, ram.length);
    struct rmig_mapped_writer *w = start_writer(fd, &opt, &ram, 1);
    OK(w, rmig_mapped_writer_begin_round(w));
    OK(w, rmig_mapped_writer_save_range(w, 0, 0, ram.length));
    cr_assert_eq(rmig_mapped_writer_end_round(w), RMIG_ERR_CANCELLED);
    cr_assert_eq(rmig_mapped_writer_finish(w), RMIG_ERR_CANCELLED);
    cr_assert_geq(calls, 1);
    rmig_mapped_writer_close(w);
    expect_refused(fd, NULL, "the writer of this file did not finish");
    opt.progress = NULL;
    save_file(fd, &opt, &ram, 1);
    opt.progress = stop_once_it_loads;
    struct rmig_mapped_reader *r = open_reader(fd, &opt);
    struct rmig_block_desc desc = describe(&ram, 0);
    cr_assert_eq(rmig_mapped_reader_add_block(r, &desc), RMIG_OK);
    cr_assert_eq(rmig_mapped_reader_load(r), RMIG_ERR_CANCELLED);
    rmig_mapped_reader_close(r);
    close(fd);
}

struct patience {
    uint64_t asked, most;
};

static int stop_after_some(void *user, const struct rmig_stats *stats) {
    struct patience *p = (struct patience *)user;
    (void)stats;
    return p->asked++ == p->most;
}

// Opens a file of which so many bytes are read: that can be ended before each piece of 4096 of them.
static void cancel_opening(int fd, bool incomplete, uint64_t bytes, int status) {
    struct patience p = {0, UINT64_MAX};
    struct rmig_mapped_options opt = {.progress = stop_after_some, .progress_user = &p, .incomplete = incomplete};
    struct rmig_mapped_reader *r = NULL;
    struct rmig_error err;
    cr_assert_eq(rmig_mapped_reader_open(fd, &opt, &r, &err), status);
    rmig_mapped_reader_close(r);
    uint64_t all = p.asked;
    cr_assert_geq(all, bytes / 4096, "asked %" PRIu64 " times in %" PRIu64 " bytes", all, bytes);
    for (uint64_t n = 0; n < all; n += n < 40 ? 1 : (all - n) / 2 + 1) {
        p = (struct patience){0, n};
        cr_assert_eq(refused(fd, &opt, &err), RMIG_ERR_CANCELLED);
    }
    close(fd);
}

static int with_bytes_behind(uint64_t at, int byte, uint64_t n) {
    void *bytes = malloc(n);
    int fd = small_file();
    cr_assert_not_null(bytes);
    write_at(fd, memset(bytes, byte, n), n, at);
    free(bytes);
    return fd;
}

// Whatever it is of which there may be much: the bitmaps, state without an end, zeros behind the end.
Test(mapped_fails, progress_can_cancel_the_opening_of_any_file, .timeout = 600) {
    const uint64_t much = 4 * RMIG_MIB, end = 36928;
    cancel_opening(small_file(), false, 3 * 4096, RMIG_OK);
    cancel_opening(small_file(), true, 3 * 4096, RMIG_OK);
    cancel_opening(with_bytes_behind(end - STATE_SIZE, 1, much), false, much, RMIG_ERR_WIRE);
    cancel_opening(with_bytes_behind(end - STATE_SIZE, 1, much), true, much, RMIG_OK); // the bitmaps come behind it
    cancel_opening(with_bytes_behind(end, 0, much), false, much, RMIG_ERR_WIRE);
    struct ram ram = {"ram", new_memory(RMIG_GIB), RMIG_GIB}; // a bitmap of 32 KiB
    for (uint64_t at = 0; at < ram.length; at += RMIG_GIB / 8)
        ram.mem[at] = 1;
    int fd = new_file();
    save_file(fd, &small_opt, &ram, 1);
    munmap(ram.mem, ram.length);
    cancel_opening(fd, false, 32 * RMIG_KIB, RMIG_OK);
}

Test(mapped_fails, a_limit_of_the_file_size_is_an_error_with_its_reason) {
    struct ram ram = {"ram", new_memory(8 * RMIG_MIB), 8 * RMIG_MIB};
    struct rlimit limit = {3 * RMIG_MIB, RLIM_INFINITY}, none = {RLIM_INFINITY, RLIM_INFINITY};
    for (uint32_t threads = 1; threads < 7; threads++) {
        struct rmig_mapped_options opt = {
            .threads = 1 + threads % 3, .direct = threads % 2 == 0, .no_uring = threads > 3};
        int fd = new_file();
        memset(ram.mem, 3, ram.length);
        signal(SIGXFSZ, SIG_IGN);
        struct rmig_mapped_writer *w = start_writer(fd, &opt, &ram, 1);
        cr_assert_eq(setrlimit(RLIMIT_FSIZE, &limit), 0);
        OK(w, rmig_mapped_writer_begin_round(w));
        OK(w, rmig_mapped_writer_save_range(w, 0, 0, ram.length));
        cr_assert_eq(rmig_mapped_writer_end_round(w), RMIG_ERR_FILE);
        const struct rmig_error *error = rmig_mapped_writer_error(w);
        cr_assert_eq(error->provider_code, EFBIG);
        cr_assert(strstr(error->text, "block \"ram\": cannot write") != NULL, "%s", error->text);
        cr_assert(strstr(error->text, strerror(EFBIG)) != NULL, "%s", error->text);
        cr_assert_eq(rmig_mapped_writer_put(w, "x", 1), RMIG_ERR_FILE);
        cr_assert_eq(rmig_mapped_writer_save_page(w, 9, 0), RMIG_ERR_FILE);
        cr_assert_eq(rmig_mapped_writer_end_round(w), RMIG_ERR_FILE);
        cr_assert_eq(rmig_mapped_writer_finish(w), RMIG_ERR_FILE);
        cr_assert(strstr(error->text, strerror(EFBIG)) != NULL, "%s", error->text);
        rmig_mapped_writer_close(w);
        cr_assert_eq(setrlimit(RLIMIT_FSIZE, &none), 0);
        expect_refused(fd, NULL, "did not finish");
        close(fd);
    }
}

#ifdef RMIG_MAPPED_URING
// The file has its whole length from the beginning.
Test(mapped_fails, a_limit_of_the_file_size_is_noticed_at_the_start) {
    struct rlimit limit = {2 * RMIG_MIB, 2 * RMIG_MIB};
    struct rmig_mapped_machine machine = machine_of("test-1.0");
    struct ram ram = {"ram", new_memory(8 * RMIG_MIB), 8 * RMIG_MIB};
    struct rmig_block_desc desc = describe(&ram, 0);
    struct rmig_mapped_writer *w;
    struct rmig_mapped_options opt = {.direct = true};
    int fd = new_file();
    if (!has_uring())
        cr_skip("no io_uring here");
    signal(SIGXFSZ, SIG_IGN);
    cr_assert_eq(setrlimit(RLIMIT_FSIZE, &limit), 0);
    cr_assert_eq(rmig_mapped_writer_open(fd, &opt, &w, NULL), RMIG_OK);
    OK(w, rmig_mapped_writer_add_block(w, &desc, NULL));
    cr_assert_eq(rmig_mapped_writer_start(w, &machine), RMIG_ERR_FILE);
    const struct rmig_error *error = rmig_mapped_writer_error(w);
    cr_assert_eq(error->provider_code, EFBIG);
    cr_assert(strstr(error->text, "cannot be given a length of") != NULL, "%s", error->text);
    rmig_mapped_writer_close(w);
    close(fd);
}
#endif

struct meddler {
    int fd;
    bool cuts;
};

static int meddle(void *user, const struct rmig_stats *stats) {
    struct meddler *m = (struct meddler *)user;
    if (stats->bytes_written == 0) // it is being opened
        return 0;
    if (m->cuts)
        cr_assert_eq(ftruncate(m->fd, 4096), 0);
    else
        write_at(m->fd, "x", 1, size_of(m->fd) - 2);
    return 0;
}

static void load_meddled(bool cuts, const char *text) {
    struct ram ram = {"ram", new_memory(64 * RMIG_MIB), 64 * RMIG_MIB};
    int fd = new_file();
    struct meddler m = {fd, cuts};
    struct rmig_mapped_options opt = {.no_sync = true}, load = {.progress = meddle, .progress_user = &m};
    memset(ram.mem, 3, ram.length);
    save_file(fd, &opt, &ram, 1);
    struct timespec pause = {0, 20000000};
    nanosleep(&pause, NULL); // longer than the file system's clock ticks
    struct rmig_mapped_reader *r = open_reader(fd, &load);
    struct rmig_block_desc desc = describe(&ram, 0);
    cr_assert_eq(rmig_mapped_reader_add_block(r, &desc), RMIG_OK);
    cr_assert_eq(rmig_mapped_reader_load(r), RMIG_ERR_FILE);
    uint64_t word;
    uint8_t page[4096];
    cr_expect_eq(rmig_mapped_reader_load(r), RMIG_ERR_FILE); // the reader has ended
    cr_expect_eq(rmig_mapped_reader_load_start(r), RMIG_ERR_FILE);
    cr_expect_eq(rmig_mapped_reader_load_wait(r, 0), RMIG_ERR_FILE);
    cr_expect_eq(rmig_mapped_reader_add_block(r, NULL), RMIG_ERR_FILE);
    cr_expect_eq(rmig_mapped_reader_bitmap(r, 9, 0, 1, &word), RMIG_ERR_FILE);
    cr_expect_eq(rmig_mapped_reader_read(r, 9, 0, page, 4096), RMIG_ERR_FILE);
    cr_expect_eq(rmig_mapped_reader_get(r, page, 1), RMIG_ERR_FILE);
    cr_assert(strstr(rmig_mapped_reader_error(r)->text, text) != NULL, "%s", rmig_mapped_reader_error(r)->text);
    rmig_mapped_reader_close(r);
    close(fd);
}

Test(mapped_fails, a_file_that_is_cut_while_it_is_read) { load_meddled(true, "it was cut while it was read"); }
Test(mapped_fails, a_file_that_is_changed_while_it_is_read) { load_meddled(false, "was changed while it was read"); }

#ifndef WITHOUT_COUNTED_HEAP
static bool whole_run(int fd) {
    static const struct rmig_mapped_options opt = {.direct = true, .no_sync = true, .threads = 1};
    struct rmig_mapped_machine machine = machine_of("test-1.0");
    struct ram ram = {"ram", new_memory(5 * 4096) + 8, 4 * 4096};
    struct rmig_block_desc desc = describe(&ram, 0);
    struct rmig_mapped_writer *w = NULL;
    struct rmig_mapped_reader *r = NULL;
    struct rmig_error err;
    ram.mem[0] = 1;
    bool ok = rmig_mapped_writer_open(fd, &opt, &w, &err) == RMIG_OK &&
              rmig_mapped_writer_add_block(w, &desc, NULL) == RMIG_OK &&
              rmig_mapped_writer_start(w, &machine) == RMIG_OK && rmig_mapped_writer_begin_round(w) == RMIG_OK &&
              rmig_mapped_writer_save_range(w, 0, 0, ram.length) == RMIG_OK &&
              rmig_mapped_writer_end_round(w) == RMIG_OK && rmig_mapped_writer_put(w, STATE, STATE_SIZE) == RMIG_OK &&
              rmig_mapped_writer_finish(w) == RMIG_OK && rmig_mapped_reader_open(fd, &opt, &r, &err) == RMIG_OK &&
              rmig_mapped_reader_add_block(r, &desc) == RMIG_OK && rmig_mapped_reader_load(r) == RMIG_OK;
    rmig_mapped_writer_close(w);
    rmig_mapped_reader_close(r);
    munmap(ram.mem - 8, 5 * 4096);
    return ok;
}

// A status above RMIG_SESSION_ERRORS leaves the writer as it was; what ends it has one below.
Test(mapped_fails, a_start_without_memory_can_be_tried_again_and_a_round_without_ends_the_writer) {
    static const struct rmig_mapped_options opt = {.direct = true, .no_sync = true};
    struct ram ram = {"ram", new_memory(5 * 4096) + 8, 4 * 4096};
    struct rmig_block_desc desc = describe(&ram, 0);
    struct rmig_mapped_machine machine = machine_of("test-1.0");
    int fd = new_file();
    ram.mem[0] = 1;
    struct rmig_mapped_writer *w = open_writer(fd, &opt);
    OK(w, rmig_mapped_writer_add_block(w, &desc, NULL));
    for (size_t i = 1; i <= 2; i++) {
        heap.count = 0;
        heap.fail_at = i;
        cr_assert_eq(rmig_mapped_writer_start(w, &machine), RMIG_ERR_NO_MEMORY);
        heap.fail_at = 0;
    }
    OK(w, rmig_mapped_writer_start(w, &machine));
    OK(w, rmig_mapped_writer_begin_round(w));
    OK(w, rmig_mapped_writer_save_range(w, 0, 0, ram.length));
    heap.count = 0;
    heap.fail_at = 1; // the buffer for memory that is not aligned
    cr_assert_eq(rmig_mapped_writer_end_round(w), RMIG_ERR_FILE);
    heap.fail_at = 0;
    const char *text = rmig_mapped_writer_error(w)->text;
    cr_assert(strstr(text, "out of memory for a buffer") != NULL, "%s", text);
    cr_assert_eq(rmig_mapped_writer_begin_round(w), RMIG_ERR_FILE);
    cr_assert_eq(rmig_mapped_writer_finish(w), RMIG_ERR_FILE);
    rmig_mapped_writer_close(w);
    close(fd);
}

Test(mapped_fails, every_allocation_that_fails_is_survived_and_nothing_leaks) {
    int fd = new_file();
    heap.count = 0;
    cr_assert(whole_run(fd));
    size_t all = heap.count;
    cr_assert_geq(all, 10);
    for (size_t i = 1; i <= all; i++) {
        ptrdiff_t live = heap.live;
        heap.count = 0;
        heap.fail_at = i;
        cr_assert(!whole_run(fd), "allocation %zu of %zu failed, and nobody noticed", i, all);
        cr_assert_eq(heap.live, live, "allocation %zu: %td blocks are left", i, heap.live - live);
    }
    close(fd);
}
#endif
