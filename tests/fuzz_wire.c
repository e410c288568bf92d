// libFuzzer target for every decoder of the wire: raw bytes in, and what decodes must survive encoding and decoding
// again.
//     clang -g -O1 -fsanitize=fuzzer,address,undefined tests/fuzz_wire.c -o fuzz_wire
//     fuzz_wire -max_total_time=60 -max_len=2048 new_inputs tests/corpus/fuzz_wire
#define RMIG_IMPLEMENTATION
#include "../rmig.h"
#include "fuzz.h"

enum { ROOM = 1024 }; // more than any encoder needs

/* Decodes; on success encodes and decodes again, which must give the same fields, and the same bytes but for the
   padding at [pad, pad + 4). pad < 0: none. fixed: the size of the message. */
#define CHECK_FIXED(name, p, n, fixed, pad, same)                                                                      \
    do {                                                                                                               \
        struct rmig_##name a, b;                                                                                       \
        memset(&a, 0x5a, sizeof a);                                                                                    \
        memset(&b, 0x5a, sizeof b);                                                                                    \
        int r = rmig_decode_##name(p, n, &a);                                                                          \
        if (r < 0) {                                                                                                   \
            REQUIRE(r == RMIG_ERR_WIRE && (n) < (fixed));                                                              \
            REQUIRE(memcmp(&a, &b, sizeof a) == 0);                                                                    \
            break;                                                                                                     \
        }                                                                                                              \
        uint8_t again[ROOM];                                                                                           \
        REQUIRE(r == (fixed) && (size_t)r <= (n));                                                                     \
        REQUIRE(rmig_encode_##name(again, sizeof again, &a) == r);                                                     \
        for (int i = 0; i < r; i++)                                                                                    \
            REQUIRE((pad) >= 0 && i >= (pad) && i < (pad) + 4 ? again[i] == 0 : again[i] == (p)[i]);                   \
        REQUIRE(rmig_decode_##name(again, (size_t)r, &b) == r);                                                        \
        REQUIRE(same);                                                                                                 \
    } while (0)

#define SAME(field) (a.field == b.field)

static void check_fixed(const uint8_t *p, size_t n) {
    CHECK_FIXED(private_data, p, n, RMIG_PRIVATE_DATA_SIZE, -1, SAME(version) && SAME(flags));
    CHECK_FIXED(ram_block, p, n, RMIG_RAM_BLOCK_SIZE, 28, SAME(base) && SAME(offset) && SAME(length) && SAME(rkey));
    CHECK_FIXED(compress, p, n, RMIG_COMPRESS_SIZE, -1, SAME(value) && SAME(block) && SAME(start) && SAME(length));
    CHECK_FIXED(register, p, n, RMIG_REGISTER_SIZE, 12, SAME(key) && SAME(block) && SAME(chunks));
    CHECK_FIXED(register_result, p, n, RMIG_REGISTER_RESULT_SIZE, 4, SAME(rkey) && SAME(base));
    CHECK_FIXED(batch, p, n, RMIG_BATCH_SIZE, 4, SAME(block) && SAME(offset) && SAME(length));
    CHECK_FIXED(batch_result, p, n, RMIG_BATCH_RESULT_SIZE, -1, SAME(key) && SAME(address));
}

static void check_header(const uint8_t *p, size_t n) {
    struct rmig_header a, b;
    int r = rmig_decode_header(p, n, &a);
    if (r < 0) {
        REQUIRE(r == RMIG_ERR_WIRE);
        return;
    }
    REQUIRE(r == RMIG_HEADER_SIZE && a.len <= RMIG_PAYLOAD_MAX && n == RMIG_HEADER_SIZE + (size_t)a.len);
    uint8_t *again = (uint8_t *)malloc(n);
    REQUIRE(again != NULL);
    memcpy(again, p, n);
    REQUIRE(rmig_encode_header(again, n, &a) == r);
    REQUIRE(memcmp(again, p, 12) == 0 && memcmp(again + 16, p + 16, n - 16) == 0);
    REQUIRE(rmig_decode_header(again, n, &b) == r);
    REQUIRE(SAME(len) && SAME(type) && SAME(repeat));
    free(again);
    REQUIRE(rmig_message_name(a.type) != NULL);
}

static void check_hello(const uint8_t *p, size_t n) {
    struct rmig_hello a, b;
    int r = rmig_decode_hello(p, n, &a);
    if (r < 0) {
        REQUIRE(r == RMIG_ERR_WIRE);
        return;
    }
    REQUIRE((size_t)r == n);
    REQUIRE(memchr(a.reason, 0, sizeof a.reason) != NULL);
    for (const char *c = a.reason; *c != 0; c++)
        REQUIRE(*c >= 0x20 && *c < 0x7f);
    uint8_t again[ROOM];
    int m = rmig_encode_hello(again, sizeof again, &a);
    REQUIRE(m > 0 && rmig_decode_hello(again, (size_t)m, &b) == m);
    REQUIRE(SAME(chunk_size) && SAME(page_size) && SAME(key_bits) && SAME(payload_max) && SAME(batch_max));
    REQUIRE(SAME(registration_max) && SAME(idle_max) && SAME(status) && strcmp(a.reason, b.reason) == 0);
}

// Entries as a sink reads them, one after another to the end.
static void check_block_entries(const uint8_t *p, size_t n) {
    while (n > 0) {
        struct rmig_block_entry a, b;
        int r = rmig_decode_block_entry(p, n, &a);
        if (r < 0) {
            REQUIRE(r == RMIG_ERR_WIRE);
            return;
        }
        size_t name = strlen(a.name);
        REQUIRE(name >= 1 && name <= RMIG_NAME_MAX && (size_t)r == 17 + name && (size_t)r <= n);
        uint8_t again[ROOM];
        REQUIRE(rmig_encode_block_entry(again, sizeof again, &a) == r && memcmp(again, p, (size_t)r) == 0);
        REQUIRE(rmig_decode_block_entry(again, (size_t)r, &b) == r);
        REQUIRE(SAME(length) && SAME(guest_offset) && strcmp(a.name, b.name) == 0);
        p += r;
        n -= (size_t)r;
    }
}

static void check_all(const uint8_t *data, size_t size) {
    uint8_t *p = (uint8_t *)malloc(size > 0 ? size : 1); // exact, so that a byte read too far is seen
    REQUIRE(p != NULL);
    if (size > 0)
        memcpy(p, data, size);
    check_fixed(p, size);
    check_header(p, size);
    check_hello(p, size);
    check_block_entries(p, size);
    free(p);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    check_all(data, size);
    if (size >= RMIG_HEADER_SIZE) // a whole message: its payload too
        check_all(data + RMIG_HEADER_SIZE, size - RMIG_HEADER_SIZE);
    if (size >= RMIG_HEADER_SIZE + 8) // BLOCKS: entries follow two numbers
        check_all(data + RMIG_HEADER_SIZE + 8, size - RMIG_HEADER_SIZE - 8);
    return 0;
}
