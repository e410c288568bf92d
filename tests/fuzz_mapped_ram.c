// libFuzzer target for the reader of mapped-ram files: any bytes as a file. What is taken must be consistent, be loaded
// the same by every way there is, and come back from a file that the writer makes of it.
//     clang -g -O1 -fsanitize=fuzzer,address,undefined tests/fuzz_mapped_ram.c -o fuzz_mapped_ram
//     fuzz_mapped_ram -max_total_time=60 -max_len=65536 new_inputs tests/corpus/fuzz_mapped_ram
// The first byte: bits 0 to 3 are options, and times 4 KiB of holes are put behind the other bytes (bits 4 to 7).
#define _GNU_SOURCE
#define RMIG_IMPLEMENTATION
#include "../rmig.h"
#include "../rmig_mapped_ram.h"
#include "fuzz.h"

#include <sys/mman.h>

enum { MOST = 4 << 20 }; // bytes of RAM that are loaded

struct machine {
    uint32_t count;
    uint8_t *ram[64];
    uint64_t length[64];
    uint8_t *state;
    uint64_t state_size;
};

static void *checked(void *p) {
    REQUIRE(p != NULL);
    return p;
}

static struct rmig_block_desc describe(const struct machine *m, const struct rmig_mapped_block *b, uint32_t i) {
    struct rmig_block_desc desc = {.name = b->name, .host = m->ram[i], .length = b->length};
    desc.guest_offset = (uint64_t)i << 40;
    return desc;
}

static void check_blocks(const struct rmig_mapped_block *b, uint32_t n, uint64_t size) {
    for (uint32_t i = 0; i < n; i++) {
        uint64_t pages = b[i].length / b[i].page_size, bitmap = (pages + 63) / 64 * 8;
        REQUIRE(b[i].name[0] != '\0' && b[i].length > 0 && b[i].length % b[i].page_size == 0);
        REQUIRE(b[i].page_size == b[0].page_size && b[i].pages_set <= pages);
        REQUIRE(b[i].ignored || (b[i].bitmap_offset <= size && bitmap <= size - b[i].bitmap_offset));
        REQUIRE(b[i].ignored || (b[i].pages_offset <= size && b[i].length <= size - b[i].pages_offset));
    }
}

// Loads all of it twice, into memory that held something, and page by page. False: too large, or shared.
static bool load(struct rmig_mapped_reader *r, struct machine *m) {
    const struct rmig_mapped_block *b;
    uint64_t sum = 0, set = 0;
    memset(m, 0, sizeof *m);
    m->count = rmig_mapped_reader_blocks(r, &b);
    for (uint32_t i = 0; i < m->count; i++) {
        if (b[i].ignored || b[i].length > MOST - sum || m->count > 64)
            return false;
        sum += b[i].length;
        set += b[i].pages_set;
    }
    for (uint32_t i = 0; i < m->count; i++) {
        m->length[i] = b[i].length;
        m->ram[i] = (uint8_t *)checked(malloc(b[i].length));
        memset(m->ram[i], 0xa5, b[i].length);
        struct rmig_block_desc desc = describe(m, &b[i], i);
        REQUIRE(rmig_mapped_reader_add_block(r, &desc) == RMIG_OK);
    }
    struct rmig_stats st;
    REQUIRE(rmig_mapped_reader_load(r) == RMIG_OK);
    rmig_mapped_reader_stats(r, &st);
    REQUIRE(st.bytes_written + st.bytes_zero == sum && st.pages_written == set && st.bytes_pending == 0);
    for (uint32_t i = 0; i < m->count; i++) {
        uint8_t *copy = (uint8_t *)checked(malloc(b[i].length));
        REQUIRE(rmig_mapped_reader_read(r, i, 0, copy, b[i].length) == RMIG_OK);
        REQUIRE(memcmp(copy, m->ram[i], b[i].length) == 0);
        free(copy);
    }
    m->state_size = rmig_mapped_reader_state_size(r);
    m->state = (uint8_t *)checked(malloc(m->state_size + 1));
    REQUIRE(rmig_mapped_reader_get(r, m->state, m->state_size + 1) == (int64_t)m->state_size);
    REQUIRE(rmig_mapped_reader_get(r, m->state, 1) == 0);
    return true;
}

static void machine_free(struct machine *m) {
    for (uint32_t i = 0; i < 64; i++)
        free(m->ram[i]);
    free(m->state);
}

static void save(int fd, const struct rmig_mapped_reader *from, const struct machine *m) {
    const struct rmig_mapped_block *b;
    struct rmig_mapped_options opt = {.no_sync = true};
    struct rmig_mapped_machine machine = *rmig_mapped_reader_machine(from);
    struct rmig_mapped_writer *w;
    rmig_mapped_reader_blocks(from, &b);
    opt.page_size = opt.file_align = b[0].page_size;
    machine.configuration.capabilities &= ~RMIG_QEMU_CAPABILITY_IGNORE_SHARED;
    REQUIRE(rmig_mapped_writer_open(fd, &opt, &w, NULL) == RMIG_OK);
    for (uint32_t i = 0; i < m->count; i++) {
        struct rmig_block_desc desc = describe(m, &b[i], i);
        REQUIRE(rmig_mapped_writer_add_block(w, &desc, NULL) == RMIG_OK);
    }
    REQUIRE(rmig_mapped_writer_start(w, &machine) == RMIG_OK && rmig_mapped_writer_begin_round(w) == RMIG_OK);
    for (uint32_t i = 0; i < m->count; i++)
        REQUIRE(rmig_mapped_writer_save_range(w, i, 0, m->length[i]) == RMIG_OK);
    REQUIRE(rmig_mapped_writer_end_round(w) == RMIG_OK);
    REQUIRE(rmig_mapped_writer_put(w, m->state, m->state_size) == RMIG_OK);
    REQUIRE(rmig_mapped_writer_finish(w) == RMIG_OK);
    rmig_mapped_writer_close(w);
}

static void check_written_again(const struct rmig_mapped_reader *from, const struct machine *m) {
    struct rmig_mapped_reader *r;
    struct machine again;
    int fd = memfd_create("again", 0);
    REQUIRE(fd >= 0);
    save(fd, from, m);
    REQUIRE(rmig_mapped_reader_open(fd, NULL, &r, NULL) == RMIG_OK);
    REQUIRE(load(r, &again) && again.count == m->count && again.state_size == m->state_size);
    REQUIRE(memcmp(again.state, m->state, m->state_size) == 0);
    for (uint32_t i = 0; i < m->count; i++)
        REQUIRE(again.length[i] == m->length[i] && memcmp(again.ram[i], m->ram[i], m->length[i]) == 0);
    rmig_mapped_reader_close(r);
    machine_free(&again);
    close(fd);
}

static void check_file(int fd, uint64_t size, const struct rmig_mapped_options *opt) {
    struct rmig_mapped_reader *r = NULL;
    const struct rmig_mapped_block *b;
    struct rmig_error err;
    struct machine m;
    uint8_t byte;
    memset(&err, 0, sizeof err);
    int status = rmig_mapped_reader_open(fd, opt, &r, &err);
    REQUIRE((status == RMIG_OK) == (r != NULL));
    if (status != RMIG_OK) {
        REQUIRE(status == err.status && strlen(err.text) > 16 && !opt->incomplete);
        return;
    }
    uint32_t n = rmig_mapped_reader_blocks(r, &b);
    check_blocks(b, n, size);
    if (!rmig_mapped_reader_whole(r)) {
        REQUIRE(rmig_mapped_reader_load(r) == RMIG_ERR_WIRE && rmig_mapped_reader_get(r, &byte, 1) == RMIG_ERR_WIRE);
    } else if (load(r, &m)) {
        check_written_again(r, &m);
        machine_free(&m);
    }
    rmig_mapped_reader_close(r);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static int fd = -1;
    struct rmig_mapped_options opt = {.threads = 1};
    if (size < 1)
        return 0;
    if (fd < 0)
        fd = memfd_create("fuzz", 0);
    uint64_t whole = size - 1 + (data[0] >> 4) * 4096u;
    opt.incomplete = (data[0] & 1) != 0;
    opt.page_size = (data[0] & 2) != 0 ? 1024 : 0;
    opt.offset = (data[0] & 4) != 0 ? 100 : 0;
    REQUIRE(fd >= 0 && ftruncate(fd, 0) == 0 && ftruncate(fd, (off_t)whole) == 0);
    REQUIRE(pwrite(fd, data + 1, size - 1, 0) == (ssize_t)(size - 1));
    check_file(fd, whole, &opt);
    return 0;
}
