// Zero detection against a plain loop; holes in real memory, and that looking for them allocates nothing.
#ifndef _GNU_SOURCE
#define _GNU_SOURCE // memfd_create, fallocate, SEEK_DATA
#endif
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

// The header's own calls: how often it opens what, and a hook at the moment of its question to userfaultfd.
static struct {
    unsigned opens, opens_of_maps, inherited; // inherited: without O_CLOEXEC
    unsigned walks; // over all data of a file, to its next hole
    void (*before_register)(void);
} calls;

static int counted_open(const char *path, int flags) {
    calls.opens++;
    calls.opens_of_maps += strcmp(path, "/proc/self/maps") == 0;
    calls.inherited += (flags & O_CLOEXEC) == 0;
    return open(path, flags);
}

static int hooked_ioctl(int fd, unsigned long request, void *argument) {
    if (request == UFFDIO_REGISTER && calls.before_register != NULL)
        calls.before_register();
    return ioctl(fd, request, argument);
}

static off_t counted_lseek(int fd, off_t offset, int whence) {
    calls.walks += whence == 4; // SEEK_HOLE
    return lseek(fd, offset, whence);
}

#define open counted_open
#define ioctl hooked_ioctl
#define lseek counted_lseek
#define RMIG_IMPLEMENTATION
#include "../rmig.h"
#undef open
#undef ioctl
#undef lseek

#include <criterion/criterion.h>
#include <poll.h>
#include <pthread.h>
#include <sys/mman.h>
#include <sys/stat.h>

#define RANDOM_SEED 0x13198a2e03707344u
#include "random.h"

static bool is_zero_loop(const uint8_t *p, size_t n) {
    for (size_t i = 0; i < n; i++)
        if (p[i] != 0)
            return false;
    return true;
}

static void check_zero(const uint8_t *p, size_t n, bool want) {
    cr_assert_eq(rmig_is_zero(p, n), want, "address %p, %zu bytes", (const void *)p, n);
    cr_assert_eq(rmig_is_zero_portable(p, n), want, "portable: address %p, %zu bytes", (const void *)p, n);
}

// Two pages between pages that cannot be read: one byte too far is a crash.
static uint8_t *guarded_pages(void) {
    uint8_t *p = (uint8_t *)mmap(NULL, 4 * 4096, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    cr_assert(p != MAP_FAILED);
    cr_assert_eq(mprotect(p + 4096, 2 * 4096, PROT_READ | PROT_WRITE), 0);
    return p + 4096;
}

// >> is_zero

Test(zero, one_byte_at_every_position_alignment_and_length, .timeout = 600) {
    uint8_t *room = guarded_pages();
    static const uint8_t bytes[] = {1, 0x80, 0xff};
    for (size_t align = 0; align < 64; align++)
        for (size_t n = 0; n <= 300; n++) {
            uint8_t *p = room + align;
            check_zero(p, n, true);
            for (size_t at = 0; at < n; at++) {
                p[at] = bytes[at % 3];
                check_zero(p, n, false);
                p[at] = 0;
            }
        }
}

Test(zero, bytes_beside_the_range_do_not_count) {
    uint8_t *room = guarded_pages();
    for (size_t align = 0; align < 70; align++)
        for (size_t n = 0; n <= 300; n++) {
            uint8_t *p = room + 64 + align;
            p[-1] = p[n] = 0xff;
            check_zero(p, n, true);
            p[-1] = p[n] = 0;
        }
}

Test(zero, the_range_may_begin_and_end_at_unreadable_memory) {
    uint8_t *room = guarded_pages();
    for (size_t n = 0; n <= 2 * 4096; n = n < 600 ? n + 1 : n + 61) {
        check_zero(room, n, true);
        check_zero(room + 2 * 4096 - n, n, true);
    }
}

Test(zero, nothing_is_zero) {
    uint8_t byte = 1;
    check_zero(&byte, 0, true);
    check_zero(NULL, 0, true);
}

Test(zero, no_memory_is_not_zero) {
    check_zero(NULL, 1, false);
    check_zero(NULL, 4096, false);
}

Test(zero, large_ranges) {
    const size_t size = 9 * (size_t)RMIG_MIB + 77;
    uint8_t *p = (uint8_t *)calloc(1, size);
    cr_assert_not_null(p);
    check_zero(p, size, true);
    for (int i = 0; i < 200; i++) {
        size_t at = i == 0 ? 0 : i == 1 ? size - 1 : below(size);
        p[at] = (uint8_t)(1 + below(255));
        check_zero(p, size, false);
        check_zero(p + at + 1, size - at - 1, true);
        check_zero(p, at, true);
        p[at] = 0;
    }
    free(p);
}

Test(zero, random_contents_against_a_loop) {
    uint8_t buf[2048];
    for (int i = 0; i < 30000; i++) {
        memset(buf, 0, sizeof buf);
        for (uint64_t k = below(4); k > 0; k--)
            buf[below(sizeof buf)] = (uint8_t)rng();
        size_t from = below(sizeof buf), n = below(sizeof buf - from + 1);
        check_zero(buf + from, n, is_zero_loop(buf + from, n));
    }
}

// >> holes

enum { PAGE = 4096, PAGES = 1024, SIZE = PAGE * PAGES };

struct memory {
    struct rmig_block block;
    struct rmig_holes holes;
    bool touched[PAGES]; // written at some time, or allocated otherwise
};

static void memory_init(struct memory *m, enum rmig_backing backing, uint64_t fd_offset) {
    cr_assert_eq(sysconf(_SC_PAGESIZE), PAGE);
    memset(m, 0, sizeof *m);
    m->block.name = (char *)(uintptr_t) "test";
    m->block.length = SIZE;
    m->block.backing = backing;
    m->block.fd = -1;
    m->block.fd_offset = fd_offset;
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    if (backing == RMIG_BACKING_SHARED_FD) {
        flags = MAP_SHARED;
        m->block.fd = memfd_create("unit_zero", MFD_CLOEXEC);
        cr_assert(m->block.fd >= 0);
        cr_assert_eq(ftruncate(m->block.fd, (off_t)(fd_offset + SIZE)), 0);
    }
    void *p = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, flags, m->block.fd, (off_t)fd_offset);
    cr_assert(p != MAP_FAILED);
    madvise(p, SIZE, MADV_NOHUGEPAGE); // a huge page would be touched as a whole
    m->block.host = (uint8_t *)p;
    rmig_holes_open(&m->holes);
}

static void memory_free(struct memory *m) {
    rmig_holes_close(&m->holes);
    munmap(m->block.host, SIZE);
    if (m->block.fd >= 0)
        close(m->block.fd);
}

static void touch(struct memory *m, uint64_t page, uint8_t value) {
    m->block.host[page * PAGE + below(PAGE)] = value;
    m->touched[page] = true;
}

static void touch_some(struct memory *m) {
    for (int i = 0; i < 20; i++) {
        uint64_t first = below(PAGES), n = 1 + below(12);
        for (uint64_t k = first; k < first + n && k < PAGES; k++)
            touch(m, k, (uint8_t)(1 + below(255)));
    }
}

// How much memory the range takes, by a way that does not touch it.
static uint64_t allocated(const struct memory *m) {
    if (m->block.backing == RMIG_BACKING_SHARED_FD) {
        struct stat st;
        cr_assert_eq(fstat(m->block.fd, &st), 0);
        return (uint64_t)st.st_blocks * 512;
    }
    static uint64_t entry[PAGES];
    int fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    cr_assert(fd >= 0);
    ssize_t n = pread(fd, entry, sizeof entry, (off_t)((uintptr_t)m->block.host / PAGE * 8));
    close(fd);
    cr_assert_eq(n, (ssize_t)sizeof entry);
    uint64_t pages = 0;
    for (int i = 0; i < PAGES; i++)
        pages += entry[i] >> 62 != 0;
    return pages * PAGE;
}

static uint64_t resident_pages(void) {
    unsigned long size, resident;
    FILE *f = fopen("/proc/self/statm", "re");
    cr_assert_not_null(f);
    cr_assert_eq(fscanf(f, "%lu %lu", &size, &resident), 2);
    fclose(f);
    return resident;
}

// Walks [from, to): runs inside, ascending, not empty; every touched page that it meets is in a run. Returns the bytes
// in runs.
static uint64_t check_runs(struct memory *m, uint64_t from, uint64_t to) {
    uint64_t bytes = 0, at = from, guard = 0;
    while (at < to) {
        uint64_t data = 1, end = 0;
        rmig_holes_next_data(&m->holes, &m->block, at, to, &data, &end);
        cr_assert(data >= at && data <= to, "from %lu: data at %lu", (unsigned long)at, (unsigned long)data);
        for (uint64_t hole = at; hole < data; hole = (hole / PAGE + 1) * PAGE)
            cr_assert(!m->touched[hole / PAGE], "page %lu has data but is in a hole", (unsigned long)(hole / PAGE));
        if (data == to)
            return bytes;
        cr_assert(end > data && end <= to, "run %lu to %lu", (unsigned long)data, (unsigned long)end);
        bytes += end - data;
        at = end;
        cr_assert(++guard <= PAGES + 2, "no end");
    }
    return bytes;
}

static uint64_t touched_bytes(const struct memory *m, uint64_t from, uint64_t to) {
    uint64_t bytes = 0;
    for (uint64_t at = from; at < to;) {
        uint64_t next = (at / PAGE + 1) * PAGE < to ? (at / PAGE + 1) * PAGE : to;
        bytes += m->touched[at / PAGE] ? next - at : 0;
        at = next;
    }
    return bytes;
}

static void check_random_ranges(struct memory *m) {
    for (int i = 0; i < 300; i++) {
        uint64_t from = below(SIZE + 1), to = from + below(SIZE - from + 1);
        if (i % 3 == 0) {
            from = from / PAGE * PAGE;
            to = to / PAGE * PAGE;
        }
        if (from <= to)
            cr_assert_eq(check_runs(m, from, to), touched_bytes(m, from, to), "%lu to %lu", (unsigned long)from,
                         (unsigned long)to);
    }
}

static void check_exact(enum rmig_backing backing, uint64_t fd_offset) {
    for (int round = 0; round < 10; round++) {
        struct memory m;
        memory_init(&m, backing, fd_offset);
        cr_assert_eq(check_runs(&m, 0, SIZE), 0, "an untouched block is one hole");
        touch_some(&m);
        if (round % 2 == 0) {
            touch(&m, 0, 1);
            touch(&m, PAGES - 1, 1);
        }
        uint64_t before = allocated(&m);
        cr_assert_eq(before, touched_bytes(&m, 0, SIZE), "the test's own memory is not as it believes");
        cr_assert_eq(check_runs(&m, 0, SIZE), before);
        check_random_ranges(&m);
        cr_assert_eq(allocated(&m), before, "looking made the memory grow");
        memory_free(&m);
    }
}

Test(holes, memfd) { check_exact(RMIG_BACKING_SHARED_FD, 0); }
Test(holes, memfd_with_the_block_in_the_middle_of_the_file) { check_exact(RMIG_BACKING_SHARED_FD, 5 * PAGE); }
Test(holes, anonymous) { check_exact(RMIG_BACKING_ANONYMOUS, 0); }

static void check_everything_written(enum rmig_backing backing) {
    struct memory m;
    memory_init(&m, backing, 0);
    for (uint64_t i = 0; i < PAGES; i++)
        touch(&m, i, 7);
    cr_expect_eq(check_runs(&m, 0, SIZE), SIZE);
    uint64_t data, end;
    rmig_holes_next_data(&m.holes, &m.block, 0, SIZE, &data, &end);
    cr_expect(data == 0 && end == SIZE, "one run for one stretch of data");
    memory_free(&m);
}

Test(holes, a_memfd_without_holes_is_one_run) { check_everything_written(RMIG_BACKING_SHARED_FD); }
Test(holes, anonymous_memory_without_holes_is_one_run) { check_everything_written(RMIG_BACKING_ANONYMOUS); }

static void check_given_back(enum rmig_backing backing) {
    struct memory m;
    memory_init(&m, backing, 0);
    for (uint64_t i = 0; i < PAGES; i++)
        touch(&m, i, 7);
    int advice = backing == RMIG_BACKING_SHARED_FD ? MADV_REMOVE : MADV_DONTNEED; // as a balloon does
    cr_assert_eq(madvise(m.block.host + 100 * PAGE, 300 * PAGE, advice), 0);
    memset(m.touched + 100, 0, 300 * sizeof(bool));
    cr_expect_eq(check_runs(&m, 0, SIZE), SIZE - 300 * PAGE);
    memory_free(&m);
}

Test(holes, a_memfd_with_pages_given_back) { check_given_back(RMIG_BACKING_SHARED_FD); }
Test(holes, anonymous_memory_with_pages_given_back) { check_given_back(RMIG_BACKING_ANONYMOUS); }

// For the next hole a file system walks all data up to it. Asked for piece by piece, that would be work by the square.
Test(holes, data_of_a_file_is_walked_over_once) {
    struct memory m;
    memory_init(&m, RMIG_BACKING_SHARED_FD, PAGE);
    for (uint64_t i = 0; i < PAGES; i++)
        if (i != 500)
            touch(&m, i, 7);
    for (unsigned round = 1; round < 3; round++) {
        calls.walks = 0;
        rmig_holes_forget(&m.holes);
        for (uint64_t at = 0; at < PAGES; at += 4)
            cr_expect_eq(check_runs(&m, at * PAGE, (at + 4) * PAGE), at == 500 ? 3 * PAGE : 4 * PAGE);
        cr_expect_leq(calls.walks, 3, "%u walks", calls.walks);
    }
    cr_assert_eq(madvise(m.block.host + 700 * PAGE, 100 * PAGE, MADV_REMOVE), 0);
    rmig_holes_forget(&m.holes);
    memset(m.touched + 700, 0, 100 * sizeof(bool));
    cr_expect_eq(check_runs(&m, 0, SIZE), touched_bytes(&m, 0, SIZE));
    memory_free(&m);
}

// Data that this process never mapped in: SEEK_DATA sees it, a look at our own page table would not.
Test(holes, data_written_to_the_file_by_others_is_found) {
    struct memory m;
    memory_init(&m, RMIG_BACKING_SHARED_FD, 3 * PAGE);
    for (uint64_t i = 10; i < PAGES; i += 50) {
        cr_assert_eq(pwrite(m.block.fd, "x", 1, (off_t)((3 + i) * PAGE + 17)), 1);
        m.touched[i] = true;
    }
    cr_expect_eq(check_runs(&m, 0, SIZE), touched_bytes(&m, 0, SIZE));
    memory_free(&m);
}

Test(holes, the_file_position_may_be_anywhere) {
    struct memory m;
    memory_init(&m, RMIG_BACKING_SHARED_FD, 0);
    touch_some(&m);
    lseek(m.block.fd, SIZE / 2 + 5, SEEK_SET);
    cr_expect_eq(check_runs(&m, 0, SIZE), touched_bytes(&m, 0, SIZE));
    memory_free(&m);
}

// The kernel maps one shared zero page where anonymous memory was only read. It may count as data, but must not break
// the walk.
Test(holes, anonymous_pages_that_were_only_read) {
    struct memory m;
    memory_init(&m, RMIG_BACKING_ANONYMOUS, 0);
    touch_some(&m);
    volatile uint8_t sum = 0;
    for (uint64_t i = 0; i < PAGES; i += 3)
        sum = (uint8_t)(sum + m.block.host[i * PAGE]);
    cr_expect(check_runs(&m, 0, SIZE) >= touched_bytes(&m, 0, SIZE));
    memory_free(&m);
}

Test(holes, resident_memory_stays_as_it_was_in_a_large_sparse_block, .timeout = 600) {
    for (int shared = 0; shared < 2; shared++) {
        const uint64_t size = 4 * RMIG_GIB;
        struct rmig_block b = {0};
        b.length = size;
        b.backing = shared ? RMIG_BACKING_SHARED_FD : RMIG_BACKING_ANONYMOUS;
        b.fd = shared ? memfd_create("sparse", MFD_CLOEXEC) : -1;
        if (shared)
            cr_assert_eq(ftruncate(b.fd, (off_t)size), 0);
        int flags = shared ? MAP_SHARED : MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
        b.host = (uint8_t *)mmap(NULL, size, PROT_READ | PROT_WRITE, flags, b.fd, 0);
        cr_assert((void *)b.host != MAP_FAILED);
        madvise(b.host, size, MADV_NOHUGEPAGE);
        b.host[3 * RMIG_GIB] = 9;
        struct rmig_holes h;
        rmig_holes_open(&h);
        uint64_t before = resident_pages(), data = 0, end = 0;
        rmig_holes_next_data(&h, &b, 0, size, &data, &end);
        uint64_t grown = resident_pages() - before;
        cr_expect(data <= 3 * RMIG_GIB && end > 3 * RMIG_GIB && end - data <= 2 * RMIG_MIB, "run %lu to %lu",
                  (unsigned long)data, (unsigned long)end);
        cr_expect(grown < 1024 || grown > UINT64_MAX / 2, "grown by %lu pages", (unsigned long)grown);
        rmig_holes_close(&h);
        munmap(b.host, size);
        if (shared)
            close(b.fd);
    }
}

// >> where nothing can be known, all is data

static void must_be_all_data(struct memory *m) {
    uint64_t data = 1, end = 0;
    rmig_holes_next_data(&m->holes, &m->block, 0, SIZE, &data, &end);
    cr_expect(data == 0 && end == SIZE, "run %lu to %lu", (unsigned long)data, (unsigned long)end);
    rmig_holes_next_data(&m->holes, &m->block, 12345, 54321, &data, &end);
    cr_expect(data == 12345 && end == 54321, "run %lu to %lu", (unsigned long)data, (unsigned long)end);
}

Test(holes, unknown_backing_is_all_data) {
    struct memory m;
    memory_init(&m, RMIG_BACKING_UNKNOWN, 0);
    must_be_all_data(&m);
    memory_free(&m);
}

Test(holes, a_bad_descriptor_is_all_data) {
    struct memory m;
    memory_init(&m, RMIG_BACKING_SHARED_FD, 0);
    close(m.block.fd);
    must_be_all_data(&m);
    m.block.fd = -1;
    must_be_all_data(&m);
    m.block.fd = 1000000;
    must_be_all_data(&m);
    m.block.fd = -1;
    memory_free(&m);
}

Test(holes, a_descriptor_that_cannot_seek_is_all_data) {
    struct memory m;
    int ends[2];
    memory_init(&m, RMIG_BACKING_SHARED_FD, 0);
    close(m.block.fd);
    cr_assert_eq(pipe(ends), 0);
    m.block.fd = ends[0];
    must_be_all_data(&m);
    close(ends[1]);
    memory_free(&m);
}

Test(holes, a_file_offset_out_of_range_is_all_data) {
    static const uint64_t odd[] = {UINT64_MAX, UINT64_MAX - SIZE, (uint64_t)INT64_MAX, (uint64_t)INT64_MAX - 100,
                                   (uint64_t)1 << 63};
    for (size_t i = 0; i < sizeof odd / sizeof odd[0]; i++) {
        struct memory m;
        memory_init(&m, RMIG_BACKING_SHARED_FD, 0);
        touch_some(&m);
        m.block.fd_offset = odd[i];
        must_be_all_data(&m);
        memory_free(&m);
    }
}

Test(holes, without_a_page_map_anonymous_memory_is_all_data) {
    struct memory m;
    memory_init(&m, RMIG_BACKING_ANONYMOUS, 0);
    rmig_holes_close(&m.holes);
    touch_some(&m);
    must_be_all_data(&m);
    close(0); // a number that could be taken for a descriptor
    rmig_holes_close(&m.holes); // twice does no harm
    memory_free(&m);
}

Test(holes, a_page_map_that_cannot_be_read_is_all_data) {
    struct memory m;
    memory_init(&m, RMIG_BACKING_ANONYMOUS, 0);
    touch_some(&m);
    int whole = m.holes.pagemap_fd;
    m.holes.pagemap_fd = open("/dev/null", O_RDONLY | O_CLOEXEC); // reads end at once
    must_be_all_data(&m);
    close(m.holes.pagemap_fd);
    m.holes.pagemap_fd = 1000000;
    must_be_all_data(&m);
    m.holes.pagemap_fd = whole;
    memory_free(&m);
}

// >> limits

static void check_empty_ranges(enum rmig_backing backing) {
    struct memory m;
    memory_init(&m, backing, 0);
    touch_some(&m);
    static const uint64_t at[] = {0, 1, PAGE, SIZE / 2, SIZE};
    for (size_t i = 0; i < sizeof at / sizeof at[0]; i++) {
        uint64_t data = 1, end = 0;
        rmig_holes_next_data(&m.holes, &m.block, at[i], at[i], &data, &end);
        cr_expect_eq(data, at[i], "an empty range has no data");
    }
    memory_free(&m);
}

Test(holes, empty_ranges) {
    check_empty_ranges(RMIG_BACKING_UNKNOWN);
    check_empty_ranges(RMIG_BACKING_ANONYMOUS);
    check_empty_ranges(RMIG_BACKING_SHARED_FD);
}

static void check_unreadable_parts(enum rmig_backing backing) {
    struct memory m;
    memory_init(&m, backing, 0);
    touch_some(&m);
    uint64_t before = allocated(&m);
    cr_assert_eq(mprotect(m.block.host + 200 * PAGE, 400 * PAGE, PROT_NONE), 0);
    cr_expect_eq(check_runs(&m, 0, SIZE), before);
    cr_expect_eq(allocated(&m), before);
    memory_free(&m);
}

Test(holes, memory_that_cannot_be_read_is_looked_at_without_reading_it) {
    check_unreadable_parts(RMIG_BACKING_ANONYMOUS);
    check_unreadable_parts(RMIG_BACKING_SHARED_FD);
}

Test(holes, a_block_that_begins_inside_a_page) {
    struct memory m;
    memory_init(&m, RMIG_BACKING_ANONYMOUS, 0);
    touch(&m, 3, 1);
    touch(&m, 4, 1);
    m.block.host += 100; // the touched pages are now bytes [3 * PAGE - 100, 5 * PAGE - 100)
    uint64_t data = 1, end = 0;
    rmig_holes_next_data(&m.holes, &m.block, 50, SIZE - 200, &data, &end);
    cr_expect(data == 3 * PAGE - 100 && end == 5 * PAGE - 100, "run %lu to %lu", (unsigned long)data,
              (unsigned long)end);
    m.block.host -= 100;
    memory_free(&m);
}

Test(holes, opening_and_closing_leaves_no_descriptor_behind) {
    int first = dup(1);
    close(first);
    for (int i = 0; i < 100; i++) {
        struct rmig_holes h;
        rmig_holes_open(&h);
        cr_expect(h.pagemap_fd < 0 || (fcntl(h.pagemap_fd, F_GETFD) & FD_CLOEXEC) != 0);
        cr_expect(h.uffd < 0 || (fcntl(h.uffd, F_GETFD) & FD_CLOEXEC) != 0);
        cr_expect(h.page >= 4096 && (h.page & (h.page - 1)) == 0);
        rmig_holes_close(&h);
    }
    int again = dup(1);
    close(again);
    cr_expect_eq(again, first);
}

// Setting FD_CLOEXEC afterwards is too late for a fork and exec in between.
Test(holes, nothing_is_opened_that_a_new_program_would_inherit) {
    struct memory m;
    memory_init(&m, RMIG_BACKING_ANONYMOUS, 0);
    m.holes.uffd = -1; // /proc/self/smaps is read too
    check_runs(&m, 0, SIZE);
    cr_expect_geq(calls.opens, 3);
    cr_expect_eq(calls.inherited, 0);
    memory_free(&m);
}

Test(holes, no_holes_no_block_and_nowhere_to_put_the_answer_do_not_crash) {
    struct memory m;
    uint64_t data = 1, end = 0;
    memory_init(&m, RMIG_BACKING_ANONYMOUS, 0);
    rmig_holes_open(NULL);
    rmig_holes_close(NULL);
    rmig_holes_forget(NULL);
    rmig_holes_next_data(NULL, &m.block, 5, SIZE, &data, &end);
    cr_expect(data == 5 && end == SIZE);
    rmig_holes_next_data(&m.holes, NULL, 5, SIZE, &data, &end);
    cr_expect(data == 5 && end == SIZE);
    rmig_holes_next_data(&m.holes, &m.block, 0, SIZE, NULL, &end);
    rmig_holes_next_data(&m.holes, &m.block, 0, SIZE, &data, NULL);
    memory_free(&m);
}

// >> holes that are none: somebody fills them in

enum { WAYS = 4 };

// How a look is done: with or without a userfaultfd, with or without a kernel that tells of one mapping.
static void take_away(struct rmig_holes *h, int way) {
    if ((way & 1) != 0 && h->uffd >= 0) {
        close(h->uffd);
        h->uffd = -1;
    }
    if ((way & 2) != 0 && h->maps_fd >= 0) {
        close(h->maps_fd);
        h->maps_fd = -1;
    }
}

static struct pager {
    int fd;
    pthread_t thread;
    uint8_t *from;
    uint64_t length;
    bool ends;
} pager;

static bool pager_open(struct pager *p, uint8_t *from, uint64_t length, uint64_t mode) {
    memset(p, 0, sizeof *p);
    p->from = from;
    p->length = length;
    p->fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | 1);
    struct uffdio_api api = {.api = UFFD_API};
    struct uffdio_register wanted = {.range = {(uint64_t)(uintptr_t)from, length}, .mode = mode};
    if (p->fd < 0 || ioctl(p->fd, UFFDIO_API, &api) != 0)
        return false;
    return ioctl(p->fd, UFFDIO_REGISTER, &wanted) == 0;
}

static void pager_close(struct pager *p) {
    struct uffdio_range range = {(uint64_t)(uintptr_t)p->from, p->length};
    ioctl(p->fd, UFFDIO_UNREGISTER, &range);
    close(p->fd);
}

static void pager_place(struct pager *p, uint8_t *page, uint8_t value) {
    static uint8_t content[PAGE];
    memset(content, value, PAGE);
    struct uffdio_copy copy = {.dst = (uint64_t)(uintptr_t)page, .src = (uint64_t)(uintptr_t)content, .len = PAGE};
    cr_assert(ioctl(p->fd, UFFDIO_COPY, &copy) == 0 || errno == EEXIST);
}

static void check_pager(enum rmig_backing backing, int way) {
    struct memory m;
    struct pager p;
    memory_init(&m, backing, 0);
    touch_some(&m);
    take_away(&m.holes, way);
    cr_assert_eq(check_runs(&m, 0, SIZE), touched_bytes(&m, 0, SIZE), "way %d, before", way);
    if (!pager_open(&p, m.block.host, SIZE, UFFDIO_REGISTER_MODE_MISSING))
        cr_skip("no userfaultfd here");
    rmig_holes_forget(&m.holes);
    cr_expect_eq(check_runs(&m, 0, SIZE), SIZE, "way %d: a hole was believed under a pager", way);
    pager_place(&p, m.block.host + 700 * PAGE, 9);
    m.touched[700] = true;
    pager_close(&p);
    rmig_holes_forget(&m.holes);
    cr_expect_eq(check_runs(&m, 0, SIZE), touched_bytes(&m, 0, SIZE), "way %d, afterwards", way);
    memory_free(&m);
}

Test(holes, memory_that_is_being_filled_in_has_none) {
    for (int way = 0; way < WAYS; way++) {
        check_pager(RMIG_BACKING_ANONYMOUS, way);
        check_pager(RMIG_BACKING_SHARED_FD, way);
    }
}

// It may have part of a block only.
Test(holes, a_part_that_is_being_filled_in_has_none) {
    for (int way = 0; way < WAYS; way++) {
        struct memory m;
        struct pager p;
        memory_init(&m, RMIG_BACKING_ANONYMOUS, 0);
        take_away(&m.holes, way);
        if (!pager_open(&p, m.block.host + 300 * PAGE, 100 * PAGE, UFFDIO_REGISTER_MODE_MISSING))
            cr_skip("no userfaultfd here");
        for (uint64_t i = 300; i < 400; i++)
            m.touched[i] = true; // must be taken for data
        uint64_t bytes = check_runs(&m, 0, SIZE);
        cr_expect_geq(bytes, 100 * PAGE);
        cr_expect(way != 0 || bytes <= SIZE - 300 * PAGE, "%lu bytes", (unsigned long)bytes);
        pager_close(&p);
        memory_free(&m);
    }
}

// Who tracks writes by write protection fills nothing in: its holes are true, and reading them would make a file grow.
Test(holes, memory_whose_writes_are_tracked_has_its_holes) {
    for (int way = 0; way < WAYS; way++)
        for (int shared = 0; shared < 2; shared++) {
            struct memory m;
            struct pager p;
            memory_init(&m, shared ? RMIG_BACKING_SHARED_FD : RMIG_BACKING_ANONYMOUS, 0);
            touch_some(&m);
            take_away(&m.holes, way);
            if (!pager_open(&p, m.block.host, SIZE, UFFDIO_REGISTER_MODE_WP))
                cr_skip("no write protection by userfaultfd here");
            cr_expect_eq(check_runs(&m, 0, SIZE), touched_bytes(&m, 0, SIZE), "way %d", way);
            cr_assert_eq(pager_open(&pager, m.block.host, SIZE, UFFDIO_REGISTER_MODE_WP), false, "still its own");
            close(pager.fd);
            pager_close(&p);
            memory_free(&m);
        }
}

// The pager puts a page there and leaves, between the question where the holes are and the look at the mapping.
static struct memory *last_moment_memory;

static void leave_at_the_last_moment(void) {
    calls.before_register = NULL;
    pager_place(&pager, last_moment_memory->block.host + 10 * PAGE, 9);
    pager_close(&pager);
}

Test(holes, a_pager_that_leaves_while_it_is_looked_for_loses_nothing) {
    for (int way = 0; way < WAYS; way += 2)
        for (int shared = 0; shared < 2; shared++) {
            struct memory m;
            memory_init(&m, shared ? RMIG_BACKING_SHARED_FD : RMIG_BACKING_ANONYMOUS, 0);
            take_away(&m.holes, way);
            if (m.holes.uffd < 0 || !pager_open(&pager, m.block.host, SIZE, UFFDIO_REGISTER_MODE_MISSING))
                cr_skip("no userfaultfd here");
            last_moment_memory = &m;
            calls.before_register = leave_at_the_last_moment;
            m.touched[10] = true;
            cr_expect_eq(check_runs(&m, 0, SIZE), PAGE);
            cr_assert_null(calls.before_register, "nobody looked");
            memory_free(&m);
        }
}

static unsigned mappings(void) {
    unsigned n = 0;
    FILE *f = fopen("/proc/self/maps", "re");
    cr_assert_not_null(f);
    for (int c; (c = getc(f)) != EOF;)
        n += c == '\n';
    fclose(f);
    return n;
}

// Guest threads touch memory, present and not, while it is looked at.
static void *guest(void *user) {
    const struct memory *m = (const struct memory *)user;
    uint64_t seed = 7, sum = 0;
    for (int i = 0; i < 20000; i++) {
        seed = seed * 6364136223846793005u + 1442695040888963407u;
        uint8_t *p = m->block.host + (seed >> 20) % SIZE;
        if ((i & 1) != 0)
            *p = 1;
        else
            sum += *(volatile uint8_t *)p;
        if (i % 512 == 0)
            madvise(m->block.host + SIZE / 2, SIZE / 4, MADV_DONTNEED);
    }
    return (void *)(uintptr_t)(sum == UINT64_MAX);
}

Test(holes, looking_disturbs_no_thread_and_leaves_nothing_behind, .timeout = 600) {
    for (int way = 0; way < WAYS; way += 2) {
        struct memory m;
        pthread_t thread[2];
        memory_init(&m, RMIG_BACKING_ANONYMOUS, 0);
        take_away(&m.holes, way);
        unsigned before = mappings();
        for (int i = 0; i < 2; i++)
            cr_assert_eq(pthread_create(&thread[i], NULL, guest, &m), 0);
        for (int i = 0; i < 300; i++) {
            uint64_t data, end;
            rmig_holes_forget(&m.holes);
            for (uint64_t at = 0; at < SIZE; at = end)
                rmig_holes_next_data(&m.holes, &m.block, at, SIZE, &data, &end);
        }
        for (int i = 0; i < 2; i++)
            pthread_join(thread[i], NULL);
        // Threads bring mappings of their own: stacks, and arenas of malloc. None is of the block, which is one again.
        cr_expect_leq(mappings(), before + 8);
        struct pager p;
        if (m.holes.uffd >= 0)
            cr_expect(pager_open(&p, m.block.host, SIZE, UFFDIO_REGISTER_MODE_MISSING), "still registered");
        memory_free(&m);
    }
}

// A mapping is looked at once, not each of its holes.
static unsigned registered;

static void count_registered(void) { registered++; }

Test(holes, a_mapping_is_looked_at_once_in_a_round) {
    struct memory m;
    memory_init(&m, RMIG_BACKING_SHARED_FD, 0);
    for (uint64_t i = 0; i < PAGES; i += 2)
        touch(&m, i, 1);
    struct rmig__mapping mapping;
    if (m.holes.uffd < 0 || !rmig__mapping_at(&m.holes, (uint64_t)(uintptr_t)m.block.host, &mapping))
        cr_skip("no userfaultfd here, or a kernel before 6.11");
    for (unsigned round = 1; round < 4; round++) {
        calls.before_register = count_registered;
        rmig_holes_forget(&m.holes);
        cr_expect_eq(check_runs(&m, 0, SIZE), SIZE / 2);
        cr_expect_eq(check_runs(&m, 0, SIZE), SIZE / 2);
        cr_expect_eq(registered, round);
    }
    memory_free(&m);
}

// >> holes that are none: what is asked is not this memory's

// The page map shows nothing of a huge page of hugetlbfs that is being moved, or is poisoned.
Test(holes, huge_pages_of_hugetlbfs_are_all_data) {
    for (int way = 0; way < WAYS; way++) {
        struct memory m;
        memory_init(&m, RMIG_BACKING_ANONYMOUS, 0);
        take_away(&m.holes, way);
        void *huge = mmap(NULL, SIZE, PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB | MAP_NORESERVE, -1, 0);
        if (huge == MAP_FAILED)
            cr_skip("no hugetlbfs here");
        uint8_t *small = m.block.host;
        m.block.host = (uint8_t *)huge;
        must_be_all_data(&m);
        cr_expect_eq(munmap(huge, SIZE), 0);
        m.block.host = small;
        memory_free(&m);
    }
}

static void must_know_mappings(const struct memory *m) {
    struct rmig__mapping mapping;
    if (!rmig__mapping_at(&m->holes, (uint64_t)(uintptr_t)m->block.host, &mapping))
        cr_skip("a kernel before 6.11 does not tell what is mapped");
}

// Shared memory may hold what this process has never mapped in.
Test(holes, shared_memory_that_is_said_to_be_private_is_all_data) {
    struct memory m;
    memory_init(&m, RMIG_BACKING_SHARED_FD, 0);
    must_know_mappings(&m);
    cr_assert_eq(pwrite(m.block.fd, "x", 1, 17), 1);
    m.block.backing = RMIG_BACKING_ANONYMOUS;
    must_be_all_data(&m);
    memory_free(&m);
}

static void check_other_mapping(int flags, int fd, off_t offset, enum rmig_backing backing) {
    struct memory m;
    memory_init(&m, RMIG_BACKING_SHARED_FD, PAGE);
    must_know_mappings(&m);
    m.block.backing = backing;
    void *p = mmap(m.block.host, SIZE, PROT_READ | PROT_WRITE, flags | MAP_FIXED, fd < 0 ? m.block.fd : fd, offset);
    cr_assert(p != MAP_FAILED);
    must_be_all_data(&m);
    memory_free(&m);
}

Test(holes, memory_of_another_file_or_another_place_in_it_is_all_data) {
    int other = memfd_create("other", MFD_CLOEXEC);
    cr_assert(other >= 0 && ftruncate(other, SIZE + PAGE) == 0);
    check_other_mapping(MAP_SHARED, other, PAGE, RMIG_BACKING_SHARED_FD);
    check_other_mapping(MAP_SHARED, -1, 0, RMIG_BACKING_SHARED_FD);
    check_other_mapping(MAP_PRIVATE, -1, PAGE, RMIG_BACKING_SHARED_FD); // what was written is not in the file
    check_other_mapping(MAP_PRIVATE, -1, PAGE, RMIG_BACKING_ANONYMOUS); // what was not is in the file alone
    close(other);
}

Test(holes, memory_that_can_never_be_written_has_its_holes) {
    struct memory m;
    char path[64];
    memory_init(&m, RMIG_BACKING_SHARED_FD, 0);
    touch_some(&m);
    snprintf(path, sizeof path, "/proc/self/fd/%d", m.block.fd);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    cr_assert_geq(fd, 0);
    cr_assert(mmap(m.block.host, SIZE, PROT_READ, MAP_SHARED | MAP_FIXED, fd, 0) != MAP_FAILED);
    cr_expect_eq(check_runs(&m, 0, SIZE), touched_bytes(&m, 0, SIZE));
    close(fd);
    memory_free(&m);
}

// >> what counts against a limit of locked memory

static uint64_t charged;

static int note_charged(struct rmig_ep *ep, uint64_t bytes, uint64_t limited, struct rmig_error *err) {
    (void)ep, (void)bytes, (void)err;
    charged = limited;
    return RMIG_OK;
}

static int check_lockable(const struct rmig_blocks *blocks) {
    struct rmig_fabric_ops ops = {0};
    struct rmig_fabric fabric = {0};
    ops.size = sizeof ops;
    ops.lockable = note_charged;
    fabric.ops = &ops;
    struct rmig__session *ss = (struct rmig__session *)calloc(1, sizeof *ss);
    ss->fabric = &fabric;
    int status = rmig__check_lockable(ss, blocks, UINT64_MAX);
    free(ss);
    return status;
}

Test(lockable, the_list_of_mappings_is_read_once_for_all_blocks) {
    struct rmig_blocks t = {0};
    uint8_t *huge = (uint8_t *)mmap(NULL, 4 * RMIG_MIB, PROT_READ | PROT_WRITE,
                                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB | MAP_NORESERVE, -1, 0);
    uint64_t want = 0;
    for (uint32_t i = 0; i < 300; i++) {
        char name[16];
        snprintf(name, sizeof name, "b%u", i);
        struct rmig_block_desc d = {.name = name, .length = PAGE, .guest_offset = (uint64_t)i << 20};
        bool on_huge = huge != MAP_FAILED && i % 3 == 0;
        d.host = on_huge ? (void *)(huge + (300 - i) * PAGE)
                         : mmap(NULL, PAGE, i % 2 ? PROT_READ : PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        want += on_huge ? 0 : PAGE;
        cr_assert_eq(rmig_blocks_add(&t, &d, NULL, NULL), RMIG_OK);
    }
    calls.opens_of_maps = 0;
    cr_assert_eq(check_lockable(&t), RMIG_OK);
    cr_expect_eq(calls.opens_of_maps, 1, "%u times", calls.opens_of_maps);
    cr_expect_eq(charged, want);
    rmig_blocks_free(&t);
}

// Against a loop over all mappings for each span; a list as the kernel writes it, with names of any length.
Test(lockable, bytes_on_huge_pages_against_a_loop) {
    for (int round = 0; round < 200; round++) {
        struct rmig__span mapping[60], span[40];
        bool huge[60];
        uint64_t at = 0x10000, want = 0;
        int fd = memfd_create("maps", MFD_CLOEXEC);
        for (int i = 0; i < 60; i++) {
            mapping[i].from = at += below(3) * PAGE;
            mapping[i].to = at += (1 + below(20)) * PAGE;
            huge[i] = below(2) == 0;
            dprintf(fd, "%lx-%lx rw-p 00000000 00:0f %d %*s%s\n", (unsigned long)mapping[i].from,
                    (unsigned long)mapping[i].to, i, huge[i] ? 20 : (int)below(600), "",
                    huge[i] ? "/anon_hugepage (deleted)" : "/home/anon_hugepage");
        }
        for (int k = 0; k < 40; k++) {
            span[k].from = below(at) + 1;
            span[k].to = span[k].from + 1 + below(30 * PAGE);
            for (int i = 0; i < 60; i++) {
                uint64_t from = mapping[i].from > span[k].from ? mapping[i].from : span[k].from;
                uint64_t to = mapping[i].to < span[k].to ? mapping[i].to : span[k].to;
                want += huge[i] && from < to ? to - from : 0;
            }
        }
        lseek(fd, 0, SEEK_SET);
        cr_assert_eq(rmig__anonymous_huge(fd, span, 40), want, "round %d", round);
        close(fd);
    }
}
