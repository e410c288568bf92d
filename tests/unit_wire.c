// The wire, byte for byte. Golden bytes of protocol version 1 were seen between stock QEMUs; those of the extension
// follow docs/protocol.md.
#define RMIG_IMPLEMENTATION
#include "../rmig.h"

#include <criterion/criterion.h>
#include <stdio.h>
#include <stdlib.h>

#define RANDOM_SEED 0xa4093822299f31d0u
#include "random.h"

// Hexadecimal with spaces to bytes; returns how many.
static size_t bytes_of(const char *hex, uint8_t *out, size_t cap) {
    size_t digits = 0;
    for (; *hex != 0; hex++) {
        if (*hex == ' ')
            continue;
        const char *at = strchr("0123456789abcdef", *hex);
        cr_assert(at != NULL && digits / 2 < cap, "bad hexadecimal in the test");
        unsigned value = (unsigned)(at - strchr("0123456789abcdef", '0'));
        uint8_t *byte = &out[digits / 2];
        *byte = (uint8_t)(digits % 2 == 0 ? value << 4 : *byte | value);
        digits++;
    }
    cr_assert_eq(digits % 2, 0);
    return digits / 2;
}

static void expect_bytes(const uint8_t *got, int n, const char *hex) {
    uint8_t want[1024];
    size_t size = bytes_of(hex, want, sizeof want);
    cr_assert_eq(n, (int)size, "%d bytes, wanted %zu: %s", n, size, hex);
    for (size_t i = 0; i < size; i++)
        cr_assert_eq(got[i], want[i], "byte %zu is %02x, wanted %02x: %s", i, got[i], want[i], hex);
}

// A copy of exactly n bytes on the heap, so that the sanitizer sees the first byte read too far.
static uint8_t *exact_copy(const uint8_t *p, size_t n) {
    uint8_t *copy = (uint8_t *)malloc(n > 0 ? n : 1);
    cr_assert_not_null(copy);
    if (n > 0)
        memcpy(copy, p, n);
    return copy;
}

// For a message of fixed size: golden bytes both ways, every short buffer and input refused, outputs untouched then,
// surplus ignored.
#define CHECK_FIXED(name, size, fields, hex, same)                                                                     \
    do {                                                                                                               \
        struct rmig_##name out, before;                                                                                \
        uint8_t golden[64], buf[64];                                                                                   \
        cr_assert_eq(bytes_of(hex, golden, sizeof golden), (size_t)(size));                                            \
        memset(buf, 0xa5, sizeof buf); /* padding must be written, not left */                                         \
        expect_bytes(buf, rmig_encode_##name(buf, size, &(fields)), hex);                                              \
        cr_expect_eq(buf[size], 0xa5);                                                                                 \
        memset(&before, 0x5a, sizeof before);                                                                          \
        for (size_t n = 0; n < (size); n++) {                                                                          \
            uint8_t *p = exact_copy(golden, n);                                                                        \
            out = before;                                                                                              \
            cr_expect_eq(rmig_decode_##name(p, n, &out), RMIG_ERR_WIRE, "%zu bytes", n);                               \
            cr_expect(memcmp(&out, &before, sizeof out) == 0, "output changed by %zu bytes", n);                       \
            memset(p, 0x77, n);                                                                                        \
            cr_expect_eq(rmig_encode_##name(p, n, &(fields)), RMIG_ERR_FULL, "cap %zu", n);                            \
            for (size_t i = 0; i < n; i++)                                                                             \
                cr_expect_eq(p[i], 0x77, "buffer of %zu bytes changed", n);                                            \
            free(p);                                                                                                   \
        }                                                                                                              \
        uint8_t *p = exact_copy(golden, size);                                                                         \
        memset(&out, 0x5a, sizeof out);                                                                                \
        cr_expect_eq(rmig_decode_##name(p, size, &out), (size));                                                       \
        cr_expect(same, "fields differ after decoding");                                                               \
        free(p);                                                                                                       \
    } while (0)

#define SAME(field) (out.field == in.field)

// >> names and numbers

Test(wire, message_numbers_of_version_1) {
    cr_expect_eq(RMIG_MSG_ERROR, 1);
    cr_expect_eq(RMIG_MSG_READY, 2);
    cr_expect_eq(RMIG_MSG_QEMU_FILE, 3);
    cr_expect_eq(RMIG_MSG_RAM_BLOCKS_REQUEST, 4);
    cr_expect_eq(RMIG_MSG_RAM_BLOCKS_RESULT, 5);
    cr_expect_eq(RMIG_MSG_COMPRESS, 6);
    cr_expect_eq(RMIG_MSG_REGISTER_REQUEST, 7);
    cr_expect_eq(RMIG_MSG_REGISTER_RESULT, 8);
    cr_expect_eq(RMIG_MSG_REGISTER_FINISHED, 9);
    cr_expect_eq(RMIG_MSG_UNREGISTER_REQUEST, 10);
    cr_expect_eq(RMIG_MSG_UNREGISTER_FINISHED, 11);
}

Test(wire, message_numbers_of_the_extension) {
    cr_expect_eq(RMIG_MSG_HELLO, 64);
    cr_expect_eq(RMIG_MSG_HELLO_RESULT, 65);
    cr_expect_eq(RMIG_MSG_BLOCKS, 66);
    cr_expect_eq(RMIG_MSG_BLOCKS_RESULT, 67);
    cr_expect_eq(RMIG_MSG_REGISTER_BATCH, 68);
    cr_expect_eq(RMIG_MSG_REGISTER_BATCH_RESULT, 69);
    cr_expect_eq(RMIG_MSG_CLEAR_BATCH, 70);
    cr_expect_eq(RMIG_MSG_KEEPALIVE, 71);
    cr_expect_eq(RMIG_MSG_FINISH, 72);
    cr_expect_eq(RMIG_MSG_FINISH_RESULT, 73);
    cr_expect_eq(RMIG_MSG_GOODBYE, 74);
    cr_expect_eq(RMIG_MSG_FINISH_PENDING, 75);
}

Test(wire, message_names) {
    cr_expect_str_eq(rmig_message_name(2), "READY");
    cr_expect_str_eq(rmig_message_name(10), "UNREGISTER_REQUEST");
    cr_expect_str_eq(rmig_message_name(69), "REGISTER_BATCH_RESULT");
    static const uint32_t odd[] = {12, 63, 76, 0x80000000u, UINT32_MAX};
    for (size_t i = 0; i < sizeof odd / sizeof odd[0]; i++)
        cr_expect_str_eq(rmig_message_name(odd[i]), "unknown");
}

Test(wire, sizes_and_limits) {
    cr_expect_eq(RMIG_HEADER_SIZE, 16);
    cr_expect_eq(RMIG_CONTROL_SIZE, 524288);
    cr_expect_eq(RMIG_PAYLOAD_MAX, 524272);
    cr_expect_eq(RMIG_REPEAT_MAX, 4096);
    cr_expect_eq(RMIG_PRIVATE_DATA_SIZE, 8);
    cr_expect_eq(RMIG_STREAM_MESSAGE_MAX, 32768);
    cr_expect_eq(RMIG_FLAG_PIN_ALL, 1);
    // The extension's bit is one bit, not pin-all's, and none that forks of QEMU use.
    cr_expect_eq(RMIG_FLAG_EXTENSION & (RMIG_FLAG_EXTENSION - 1), 0);
    cr_expect_eq(RMIG_FLAG_EXTENSION & (0x01u | 0x02u | 0x80u), 0);
    cr_expect(RMIG_REPEAT_MAX * RMIG_BATCH_SIZE <= RMIG_PAYLOAD_MAX, "a full batch must fit one message");
    cr_expect(RMIG_REPEAT_MAX * RMIG_BATCH_RESULT_SIZE <= RMIG_PAYLOAD_MAX);
    cr_expect(RMIG_REPEAT_MAX * RMIG_COMPRESS_SIZE <= RMIG_PAYLOAD_MAX);
}

// >> private data

Test(wire, private_data) {
    struct rmig_private_data in = {1, 1};
    CHECK_FIXED(private_data, 8, in, "00000001 00000001", SAME(version) && SAME(flags));
    in.flags = RMIG_FLAG_PIN_ALL | RMIG_FLAG_EXTENSION;
    CHECK_FIXED(private_data, 8, in, "00000001 00010001", SAME(version) && SAME(flags));
    in.version = 0xfedcba98;
    in.flags = 0x80000006;
    CHECK_FIXED(private_data, 8, in, "fedcba98 80000006", SAME(version) && SAME(flags));
}

Test(wire, private_data_may_be_padded_or_absent) {
    uint8_t padded[56] = {0, 0, 0, 1, 0, 1, 0, 0};
    memset(padded + 8, 0xee, sizeof padded - 8);
    struct rmig_private_data out = {0, 0};
    cr_expect_eq(rmig_decode_private_data(padded, sizeof padded, &out), 8);
    cr_expect(out.version == 1 && out.flags == RMIG_FLAG_EXTENSION);
    out.version = 77;
    cr_expect_eq(rmig_decode_private_data(NULL, 0, &out), RMIG_ERR_WIRE);
    cr_expect_eq(out.version, 77);
}

// >> the header

static void check_header(const char *hex, uint32_t len, uint32_t type, uint32_t repeat) {
    struct rmig_header in = {len, type, repeat}, out = {0, 0, 0};
    uint8_t buf[16];
    memset(buf, 0xa5, sizeof buf);
    expect_bytes(buf, rmig_encode_header(buf, sizeof buf, &in), hex);
    uint8_t *message = (uint8_t *)malloc(16 + len);
    cr_assert_not_null(message);
    memset(message, 0xcc, 16 + len);
    memcpy(message, buf, 16);
    cr_expect_eq(rmig_decode_header(message, 16 + len, &out), 16);
    cr_expect(out.len == len && out.type == type && out.repeat == repeat);
    free(message);
}

Test(wire, headers_of_version_1) {
    check_header("00000000 00000002 00000001 00000000", 0, RMIG_MSG_READY, 1);
    check_header("00000000 00000001 00000001 00000000", 0, RMIG_MSG_ERROR, 1);
    check_header("00000000 00000004 00000001 00000000", 0, RMIG_MSG_RAM_BLOCKS_REQUEST, 1);
    check_header("00000000 00000009 00000001 00000000", 0, RMIG_MSG_REGISTER_FINISHED, 1);
    check_header("00000000 0000000b 00000001 00000000", 0, RMIG_MSG_UNREGISTER_FINISHED, 1);
    check_header("000000c0 00000005 00000001 00000000", 6 * 32, RMIG_MSG_RAM_BLOCKS_RESULT, 1);
    check_header("00000018 00000006 00000001 00000000", 24, RMIG_MSG_COMPRESS, 1);
    check_header("00000018 00000007 00000001 00000000", 24, RMIG_MSG_REGISTER_REQUEST, 1);
    check_header("00000010 00000008 00000001 00000000", 16, RMIG_MSG_REGISTER_RESULT, 1);
    check_header("00000008 00000003 00000000 00000000", 8, RMIG_MSG_QEMU_FILE, 0);
    check_header("0007fff0 00000003 00000000 00000000", RMIG_PAYLOAD_MAX, RMIG_MSG_QEMU_FILE, 0);
}

Test(wire, headers_of_the_extension) {
    check_header("00000060 00000040 00000001 00000000", 96, RMIG_MSG_HELLO, 1);
    check_header("00018000 00000044 00001000 00000000", 4096 * 24, RMIG_MSG_REGISTER_BATCH, 4096);
    check_header("00010000 00000045 00001000 00000000", 4096 * 16, RMIG_MSG_REGISTER_BATCH_RESULT, 4096);
    check_header("00000000 0000004a 00000001 00000000", 0, RMIG_MSG_GOODBYE, 1);
}

Test(wire, header_encoding_in_buffers_too_small) {
    struct rmig_header in = {0, RMIG_MSG_READY, 1};
    for (size_t n = 0; n < 16; n++) {
        uint8_t *p = (uint8_t *)malloc(n > 0 ? n : 1);
        cr_assert_not_null(p);
        cr_expect_eq(rmig_encode_header(p, n, &in), RMIG_ERR_FULL);
        free(p);
    }
}

Test(wire, header_lengths_beyond_the_control_buffer_are_refused) {
    static const uint32_t len[] = {RMIG_PAYLOAD_MAX + 1, RMIG_CONTROL_SIZE, 0x7fffffff,
                                   0x80000000u,          0xfffffff0u,       UINT32_MAX};
    uint8_t *message = (uint8_t *)calloc(1, 2 * RMIG_CONTROL_SIZE);
    cr_assert_not_null(message);
    for (size_t i = 0; i < sizeof len / sizeof len[0]; i++) {
        struct rmig_header in = {len[i], RMIG_MSG_QEMU_FILE, 1}, out = {1, 2, 3};
        cr_expect_eq(rmig_encode_header(message, 16, &in), RMIG_ERR_WIRE, "len %u", len[i]);
        for (unsigned k = 0; k < 4; k++)
            message[k] = (uint8_t)(len[i] >> (24 - 8 * k));
        static const size_t received[] = {16, RMIG_CONTROL_SIZE, RMIG_CONTROL_SIZE + 1, 2 * RMIG_CONTROL_SIZE, 0, 15};
        for (size_t k = 0; k < sizeof received / sizeof received[0]; k++)
            cr_expect_eq(rmig_decode_header(message, received[k], &out), RMIG_ERR_WIRE);
        // 16 + len may wrap in 32 bits
        cr_expect_eq(rmig_decode_header(message, (uint32_t)(len[i] + 16u), &out), RMIG_ERR_WIRE);
        cr_expect_eq(rmig_decode_header(message, (size_t)len[i] + 16u, &out), RMIG_ERR_WIRE);
        cr_expect(out.len == 1 && out.type == 2 && out.repeat == 3);
    }
    free(message);
}

Test(wire, header_length_must_be_what_was_received) {
    for (uint32_t len = 0; len < 40; len++)
        for (size_t received = 0; received < 60; received++) {
            struct rmig_header in = {len, RMIG_MSG_QEMU_FILE, 1}, out = {91, 92, 93};
            uint8_t buf[64] = {0};
            cr_assert_eq(rmig_encode_header(buf, sizeof buf, &in), 16);
            uint8_t *p = exact_copy(buf, received);
            bool good = received == 16 + len;
            cr_expect_eq(rmig_decode_header(p, received, &out), good ? 16 : RMIG_ERR_WIRE, "len %u received %zu", len,
                         received);
            cr_expect_eq(out.len, good ? len : 91);
            cr_expect_eq(out.type, good ? (uint32_t)RMIG_MSG_QEMU_FILE : 92);
            free(p);
        }
}

// Stock sources before 8.2 leave garbage in QEMU_FILE's repeat and padding.
Test(wire, header_padding_is_ignored_and_any_type_and_repeat_pass) {
    uint8_t p[16];
    bytes_of("00000000 ffffffff deadbeef 12345678", p, sizeof p);
    struct rmig_header out = {0, 0, 0};
    cr_expect_eq(rmig_decode_header(p, sizeof p, &out), 16);
    cr_expect(out.len == 0 && out.type == UINT32_MAX && out.repeat == 0xdeadbeef);
}

// >> payloads of fixed size

Test(wire, ram_block) {
    struct rmig_ram_block in = {0x7f89afe00000u, 0, 0x4000000, 0};
    CHECK_FIXED(ram_block, 32, in, "00007f89afe00000 0000000000000000 0000000004000000 00000000 00000000",
                SAME(base) && SAME(offset) && SAME(length) && SAME(rkey));
    struct rmig_ram_block high = {UINT64_MAX, 0x0123456789abcdefu, 0xfedcba9876543210u, 0x80000007};
    in = high;
    CHECK_FIXED(ram_block, 32, in, "ffffffffffffffff 0123456789abcdef fedcba9876543210 80000007 00000000",
                SAME(base) && SAME(offset) && SAME(length) && SAME(rkey));
}

Test(wire, compress) {
    struct rmig_compress in = {0, 3, 0x4040000, 0x20000};
    CHECK_FIXED(compress, 24, in, "00000000 00000003 0000000004040000 0000000000020000",
                SAME(value) && SAME(block) && SAME(start) && SAME(length));
    struct rmig_compress high = {0xff, UINT32_MAX, 0x8000000000000001u, 0xfedcba9876543210u};
    in = high;
    CHECK_FIXED(compress, 24, in, "000000ff ffffffff 8000000000000001 fedcba9876543210",
                SAME(value) && SAME(block) && SAME(start) && SAME(length));
}

Test(wire, register_request) {
    struct rmig_register in = {0x4080000, 1, 0};
    CHECK_FIXED(register, 24, in, "0000000004080000 00000001 00000000 0000000000000000",
                SAME(key) && SAME(block) && SAME(chunks));
    struct rmig_register high = {0xfedcba9876543210u, 0x89abcdef, 0x0123456789abcdefu};
    in = high;
    CHECK_FIXED(register, 24, in, "fedcba9876543210 89abcdef 00000000 0123456789abcdef",
                SAME(key) && SAME(block) && SAME(chunks));
}

Test(wire, register_result) {
    struct rmig_register_result in = {0x80000007, 0x7f89af000000u};
    CHECK_FIXED(register_result, 16, in, "80000007 00000000 00007f89af000000", SAME(rkey) && SAME(base));
}

Test(wire, batch) {
    struct rmig_batch in = {2, 0x40000000, 0x100000};
    CHECK_FIXED(batch, 24, in, "00000002 00000000 0000000040000000 0000000000100000",
                SAME(block) && SAME(offset) && SAME(length));
    struct rmig_batch high = {0x89abcdef, 0xfedcba9876543210u, 0x8123456789abcdefu};
    in = high;
    CHECK_FIXED(batch, 24, in, "89abcdef 00000000 fedcba9876543210 8123456789abcdef",
                SAME(block) && SAME(offset) && SAME(length));
}

Test(wire, batch_result_carries_keys_of_64_bits) {
    struct rmig_batch_result in = {0xfedcba9876543210u, 0x00007f0000001000u};
    CHECK_FIXED(batch_result, 16, in, "fedcba9876543210 00007f0000001000", SAME(key) && SAME(address));
    struct rmig_batch_result high = {UINT64_MAX, UINT64_MAX};
    in = high;
    CHECK_FIXED(batch_result, 16, in, "ffffffffffffffff ffffffffffffffff", SAME(key) && SAME(address));
}

Test(wire, whole_messages_of_version_1) {
    static const struct {
        const char *hex;
        uint32_t type;
        size_t payload;
    } row[] = {
        {"00000018 00000006 00000001 00000000 00000000 00000003 0000000004040000 0000000000020000", 6, 24},
        {"00000018 00000007 00000001 00000000 0000000004080000 00000001 00000000 0000000000000000", 7, 24},
        {"00000010 00000008 00000001 00000000 80000007 00000000 00007f89af000000", 8, 16},
        {"00000008 00000003 00000000 00000000 0000000000000010", 3, 8},
        {"00000012 00000003 00000000 00000000 7e 00000001 02 00000001 0000000000000080", 3, 18},
        {"0000000a 00000003 00000000 00000000 7e 00000001 08 000b 0000", 3, 10},
    };
    for (size_t i = 0; i < sizeof row / sizeof row[0]; i++) {
        uint8_t buf[64];
        struct rmig_header h = {0, 0, 0};
        size_t n = bytes_of(row[i].hex, buf, sizeof buf);
        cr_assert_eq(rmig_decode_header(buf, n, &h), 16);
        cr_expect_eq(h.type, row[i].type);
        cr_expect_eq(h.len, row[i].payload);
    }
}

Test(wire, padding_is_ignored) {
    uint8_t p[32];
    struct rmig_ram_block block;
    bytes_of("00007f89afe00000 0000000000000000 0000000004000000 00000007 deadbeef", p, sizeof p);
    cr_expect_eq(rmig_decode_ram_block(p, 32, &block), 32);
    cr_expect(block.base == 0x7f89afe00000u && block.length == 0x4000000 && block.rkey == 7);
    struct rmig_register reg;
    bytes_of("0000000004080000 00000001 deadbeef 0000000000000002", p, sizeof p);
    cr_expect_eq(rmig_decode_register(p, 24, &reg), 24);
    cr_expect(reg.key == 0x4080000 && reg.block == 1 && reg.chunks == 2);
    struct rmig_register_result result;
    bytes_of("80000007 deadbeef 00007f89af000000", p, sizeof p);
    cr_expect_eq(rmig_decode_register_result(p, 16, &result), 16);
    cr_expect(result.rkey == 0x80000007 && result.base == 0x7f89af000000u);
    struct rmig_batch batch;
    bytes_of("00000002 deadbeef 0000000040000000 0000000000100000", p, sizeof p);
    cr_expect_eq(rmig_decode_batch(p, 24, &batch), 24);
    cr_expect(batch.block == 2 && batch.offset == 0x40000000 && batch.length == 0x100000);
}

// In an array the decoder takes its entry and says how far it went.
Test(wire, an_entry_of_an_array_leaves_the_rest) {
    uint8_t p[24 * 3];
    struct rmig_batch out;
    for (uint32_t i = 0; i < 3; i++) {
        struct rmig_batch in = {i, i * RMIG_MIB, RMIG_MIB};
        cr_assert_eq(rmig_encode_batch(p + 24 * i, sizeof p - 24 * i, &in), 24);
    }
    for (uint32_t i = 0; i < 3; i++) {
        cr_assert_eq(rmig_decode_batch(p + 24 * i, sizeof p - 24 * i, &out), 24);
        cr_expect(out.block == i && out.offset == i * RMIG_MIB && out.length == RMIG_MIB);
    }
}

// >> HELLO

#define HELLO_HEX                                                                                                      \
    "0001 0008 0000000000100000 0002 0008 0000000000001000 0003 0008 0000000000000020 0004 0008 000000000007fff0"      \
    "0005 0008 0000000000001000 0006 0008 0000000040000000 0007 0008 00000006fc23ac00 0008 0008 0000000000000000"

static struct rmig_hello hello_example(void) {
    struct rmig_hello h;
    memset(&h, 0, sizeof h);
    h.chunk_size = RMIG_MIB;
    h.page_size = 4096;
    h.key_bits = 32;
    h.payload_max = RMIG_PAYLOAD_MAX;
    h.batch_max = RMIG_REPEAT_MAX;
    h.registration_max = RMIG_GIB;
    h.idle_max = 30000000000u;
    return h;
}

static bool same_hello(const struct rmig_hello *a, const struct rmig_hello *b) {
    return a->chunk_size == b->chunk_size && a->page_size == b->page_size && a->key_bits == b->key_bits &&
           a->payload_max == b->payload_max && a->batch_max == b->batch_max &&
           a->registration_max == b->registration_max && a->idle_max == b->idle_max && a->status == b->status &&
           strcmp(a->reason, b->reason) == 0;
}

static void refuse_hello(const uint8_t *p, size_t n, const char *what) {
    uint8_t *copy = exact_copy(p, n);
    struct rmig_hello out, before;
    memset(&before, 0x5a, sizeof before);
    out = before;
    cr_expect_eq(rmig_decode_hello(copy, n, &out), RMIG_ERR_WIRE, "%s: taken", what);
    cr_expect(memcmp(&out, &before, sizeof out) == 0, "%s: output changed", what);
    free(copy);
}

static void refuse_hello_hex(const char *hex, const char *what) {
    uint8_t p[1024];
    refuse_hello(p, bytes_of(hex, p, sizeof p), what);
}

static struct rmig_hello take_hello(const uint8_t *p, size_t n) {
    uint8_t *copy = exact_copy(p, n);
    struct rmig_hello out;
    memset(&out, 0x5a, sizeof out);
    cr_assert_eq(rmig_decode_hello(copy, n, &out), (int)n);
    free(copy);
    return out;
}

Test(hello, golden_bytes) {
    struct rmig_hello in = hello_example(), out;
    uint8_t buf[512];
    int n = rmig_encode_hello(buf, sizeof buf, &in);
    expect_bytes(buf, n, HELLO_HEX);
    out = take_hello(buf, (size_t)n);
    cr_expect(same_hello(&in, &out));
}

/* What came after release 0.1.0 stands behind its bytes, and only if it says something. */
Test(hello, golden_bytes_with_features) {
    struct rmig_hello in = hello_example(), out;
    uint8_t buf[512];
    in.features = RMIG_FEATURE_FINISH_PENDING;
    int n = rmig_encode_hello(buf, sizeof buf, &in);
    expect_bytes(buf, n, HELLO_HEX "000b0008 0000000000000001");
    out = take_hello(buf, (size_t)n);
    cr_expect_eq(out.features, 1);
    cr_expect(same_hello(&in, &out));
}

Test(hello, golden_bytes_of_a_refusal) {
    struct rmig_hello in = hello_example(), out;
    uint8_t buf[512];
    in.chunk_size = 0x4000000;
    in.status = 1;
    memcpy(in.reason, "too big", 8);
    int n = rmig_encode_hello(buf, sizeof buf, &in);
    expect_bytes(buf, n,
                 "0001 0008 0000000004000000 0002 0008 0000000000001000 0003 0008 0000000000000020"
                 "0004 0008 000000000007fff0 0005 0008 0000000000001000 0006 0008 0000000040000000"
                 "0007 0008 00000006fc23ac00 0008 0008 0000000000000001"
                 "0009 0007 746f6f20626967");
    out = take_hello(buf, (size_t)n);
    cr_expect(same_hello(&in, &out));
    cr_expect_str_eq(out.reason, "too big");
}

Test(hello, every_buffer_too_small_is_refused_untouched) {
    struct rmig_hello in = hello_example();
    memcpy(in.reason, "because", 8);
    uint8_t buf[512];
    int whole = rmig_encode_hello(buf, sizeof buf, &in);
    cr_assert_eq(whole, 8 * 12 + 4 + 7);
    for (size_t n = 0; n < (size_t)whole; n++) {
        uint8_t *p = (uint8_t *)malloc(n > 0 ? n : 1);
        cr_assert_not_null(p);
        memset(p, 0x77, n);
        cr_expect_eq(rmig_encode_hello(p, n, &in), RMIG_ERR_FULL, "cap %zu", n);
        for (size_t i = 0; i < n; i++)
            cr_assert_eq(p[i], 0x77);
        free(p);
    }
}

// Cut inside an entry is an error; cut between two entries is a shorter message, and what is missing is 0.
Test(hello, every_truncation) {
    struct rmig_hello in = hello_example();
    memcpy(in.reason, "because", 8);
    uint8_t buf[512];
    size_t whole = (size_t)rmig_encode_hello(buf, sizeof buf, &in);
    for (size_t n = 0; n < whole; n++) {
        if (n % 12 != 0 || n > 96) {
            refuse_hello(buf, n, "truncated");
            continue;
        }
        struct rmig_hello out = take_hello(buf, n);
        cr_expect_eq(out.chunk_size, n >= 12 ? in.chunk_size : 0);
        cr_expect_eq(out.idle_max, n >= 84 ? in.idle_max : 0);
        cr_expect_eq(out.reason[0], 0);
    }
}

Test(hello, unknown_tags_are_skipped_wherever_they_stand) {
    static const char *const odd[] = {"000a 0000",
                                      "7fff 0003 aabbcc",
                                      "0000 0001 ff",
                                      "ffff 0008 0102030405060708",
                                      "0100 0008 0102030405060708",
                                      "0021 0004 00000000",
                                      "0029 0000"};
    struct rmig_hello in = hello_example();
    uint8_t plain[512], buf[1024];
    size_t n = (size_t)rmig_encode_hello(plain, sizeof plain, &in);
    for (size_t i = 0; i < sizeof odd / sizeof odd[0]; i++)
        for (size_t at = 0; at <= n; at += 12) {
            memcpy(buf, plain, at);
            size_t more = bytes_of(odd[i], buf + at, sizeof buf - at);
            memcpy(buf + at + more, plain + at, n - at);
            struct rmig_hello out = take_hello(buf, n + more);
            cr_assert(same_hello(&in, &out), "unknown tag %s at %zu", odd[i], at);
        }
}

Test(hello, an_unknown_tag_may_come_twice) {
    uint8_t p[64];
    size_t n = bytes_of("00f0 0001 01 00f0 0001 02", p, sizeof p);
    take_hello(p, n);
}

Test(hello, entries_in_any_order) {
    struct rmig_hello in = hello_example();
    uint8_t plain[512], buf[512];
    size_t n = (size_t)rmig_encode_hello(plain, sizeof plain, &in);
    for (size_t i = 0; i < n; i += 12)
        memcpy(buf + i, plain + n - 12 - i, 12);
    struct rmig_hello out = take_hello(buf, n);
    cr_expect(same_hello(&in, &out));
}

Test(hello, a_tag_that_comes_twice_is_refused) {
    uint8_t p[64];
    for (unsigned tag = 1; tag <= 8; tag++)
        for (int same = 0; same < 2; same++) {
            char hex[80];
            snprintf(hex, sizeof hex, "%04x0008%016x%04x0008%016x", tag, 5, tag, same ? 5 : 6);
            refuse_hello(p, bytes_of(hex, p, sizeof p), hex);
        }
    refuse_hello_hex("0009 0001 41 0009 0001 41", "reason twice");
    refuse_hello_hex("0009 0000 0009 0000", "empty reason twice");
}

Test(hello, a_number_of_a_wrong_length_is_refused) {
    for (unsigned tag = 1; tag <= 8; tag++)
        for (unsigned len = 0; len < 20; len++) {
            uint8_t p[64] = {0};
            p[1] = (uint8_t)tag;
            p[3] = (uint8_t)len;
            if (len != 8)
                refuse_hello(p, 4 + len, "wrong length");
        }
}

Test(hello, a_length_past_the_end_is_refused) {
    refuse_hello_hex("0001 0008 00000000000000", "one byte short");
    refuse_hello_hex("0009 ffff 41", "reason of 65535 bytes");
    refuse_hello_hex("00f0 ffff", "unknown tag of 65535 bytes");
    refuse_hello_hex("0001 0008 0000000000000000 00", "a byte too many");
    refuse_hello_hex("0001 0008 0000000000000000 0002", "half an entry");
    refuse_hello_hex("0001 0008 0000000000000000 0002 00", "three bytes");
}

Test(hello, an_empty_message_is_all_zero) {
    struct rmig_hello out, zero;
    memset(&zero, 0, sizeof zero);
    memset(&out, 0x5a, sizeof out);
    uint8_t nothing = 0;
    cr_expect_eq(rmig_decode_hello(&nothing, 0, &out), 0);
    cr_expect(same_hello(&out, &zero));
}

// The peer's text goes to logs and terminals.
Test(hello, the_reason_is_a_terminated_printable_text_whatever_arrives) {
    uint8_t p[4 + 600];
    for (size_t len = 0; len <= 600; len += len < 220 ? 1 : 37) {
        p[0] = 0;
        p[1] = RMIG_HELLO_REASON_TAG;
        p[2] = (uint8_t)(len >> 8);
        p[3] = (uint8_t)len;
        for (size_t i = 0; i < len; i++)
            p[4 + i] = (uint8_t)(rng() >> 20);
        struct rmig_hello out = take_hello(p, 4 + len);
        const char *end = (const char *)memchr(out.reason, 0, sizeof out.reason);
        cr_assert_not_null(end, "reason of %zu bytes has no end", len);
        size_t want = len < sizeof out.reason - 1 ? len : sizeof out.reason - 1;
        cr_expect_eq((size_t)(end - out.reason), want, "a reason of %zu bytes became %zu", len,
                     (size_t)(end - out.reason));
        for (const char *c = out.reason; c < end; c++)
            cr_assert(*c >= 0x20 && *c < 0x7f, "byte %02x of the peer came through", (unsigned)(uint8_t)*c);
    }
}

Test(hello, printable_text_passes_unchanged) {
    struct rmig_hello in = hello_example(), out;
    uint8_t buf[512];
    for (int c = 0x20; c < 0x7f; c++)
        in.reason[c - 0x20] = (char)c;
    out = take_hello(buf, (size_t)rmig_encode_hello(buf, sizeof buf, &in));
    cr_expect_str_eq(out.reason, in.reason);
}

Test(hello, a_reason_that_fills_its_array_is_cut_not_overrun) {
    struct rmig_hello *in = (struct rmig_hello *)malloc(sizeof *in); // exact, for the sanitizer
    cr_assert_not_null(in);
    *in = hello_example();
    memset(in->reason, 'r', sizeof in->reason); // no NUL anywhere
    uint8_t buf[512];
    int n = rmig_encode_hello(buf, sizeof buf, in);
    cr_assert(n > 0);
    struct rmig_hello out = take_hello(buf, (size_t)n);
    cr_expect_eq(strlen(out.reason), sizeof out.reason - 1);
    free(in);
}

Test(hello, random_values_round_trip) {
    for (int i = 0; i < 5000; i++) {
        struct rmig_hello in, out;
        memset(&in, 0, sizeof in);
        in.chunk_size = rng();
        in.page_size = rng();
        in.key_bits = rng();
        in.payload_max = rng();
        in.batch_max = rng();
        in.registration_max = rng();
        in.idle_max = rng();
        in.status = rng();
        for (uint64_t k = rng() % sizeof in.reason; k > 0; k--)
            in.reason[k - 1] = (char)(0x20 + rng() % 0x5f);
        uint8_t buf[512];
        out = take_hello(buf, (size_t)rmig_encode_hello(buf, sizeof buf, &in));
        cr_assert(same_hello(&in, &out));
    }
}

Test(hello, random_bytes_never_harm) {
    for (int i = 0; i < 20000; i++) {
        uint8_t p[64];
        size_t n = rng() % sizeof p;
        for (size_t k = 0; k < n; k++)
            p[k] = (uint8_t)(rng() % 3 == 0 ? rng() >> 8 : rng() % 10);
        uint8_t *copy = exact_copy(p, n);
        struct rmig_hello out;
        int r = rmig_decode_hello(copy, n, &out);
        cr_assert(r == (int)n || r == RMIG_ERR_WIRE);
        free(copy);
    }
}

// >> BLOCKS

static struct rmig_block_entry entry_named(size_t n) {
    struct rmig_block_entry e;
    memset(&e, 0, sizeof e);
    e.length = 0x4000000;
    e.guest_offset = 0x100000000u;
    memset(e.name, 'q', n);
    return e;
}

Test(block_entry, golden_bytes) {
    struct rmig_block_entry in, out;
    memset(&in, 0, sizeof in);
    in.length = 0x4000000;
    in.guest_offset = 0x0123456789abcdefu;
    memcpy(in.name, "pc.ram", 7);
    uint8_t buf[512];
    int n = rmig_encode_block_entry(buf, sizeof buf, &in);
    expect_bytes(buf, n, "0000000004000000 0123456789abcdef 06 70632e72616d");
    memset(&out, 0x5a, sizeof out);
    cr_expect_eq(rmig_decode_block_entry(buf, (size_t)n, &out), 23);
    cr_expect(out.length == in.length && out.guest_offset == in.guest_offset);
    cr_expect_str_eq(out.name, "pc.ram");
}

Test(block_entry, names_of_every_length) {
    for (size_t n = 1; n <= RMIG_NAME_MAX; n++) {
        struct rmig_block_entry in = entry_named(n), out;
        uint8_t *buf = (uint8_t *)malloc(17 + n);
        cr_assert_not_null(buf);
        cr_assert_eq(rmig_encode_block_entry(buf, 17 + n - 1, &in), RMIG_ERR_FULL);
        cr_assert_eq(rmig_encode_block_entry(buf, 17 + n, &in), (int)(17 + n));
        cr_assert_eq(buf[16], n);
        cr_assert_eq(rmig_decode_block_entry(buf, 17 + n, &out), (int)(17 + n));
        cr_assert_str_eq(out.name, in.name);
        free(buf);
    }
}

Test(block_entry, every_truncation_is_refused) {
    static const size_t lengths[] = {1, 6, 255};
    for (size_t k = 0; k < 3; k++) {
        struct rmig_block_entry in = entry_named(lengths[k]), out, before;
        memset(&before, 0x5a, sizeof before);
        uint8_t buf[512];
        size_t whole = (size_t)rmig_encode_block_entry(buf, sizeof buf, &in);
        for (size_t n = 0; n < whole; n++) {
            uint8_t *p = exact_copy(buf, n);
            out = before;
            cr_expect_eq(rmig_decode_block_entry(p, n, &out), RMIG_ERR_WIRE, "%zu of %zu bytes", n, whole);
            cr_expect(memcmp(&out, &before, sizeof out) == 0);
            cr_expect_eq(rmig_encode_block_entry(p, n, &in), RMIG_ERR_FULL, "cap %zu", n);
            free(p);
        }
    }
}

Test(block_entry, an_empty_name_is_refused) {
    struct rmig_block_entry in = entry_named(0), out;
    uint8_t buf[512];
    cr_expect_eq(rmig_encode_block_entry(buf, sizeof buf, &in), RMIG_ERR_WIRE);
    size_t n = bytes_of("0000000004000000 0000000000000000 00 7071", buf, sizeof buf);
    cr_expect_eq(rmig_decode_block_entry(buf, n, &out), RMIG_ERR_WIRE);
}

Test(block_entry, a_name_without_an_end_is_refused) {
    struct rmig_block_entry *in = (struct rmig_block_entry *)malloc(sizeof *in); // exact, for the sanitizer
    cr_assert_not_null(in);
    *in = entry_named(1);
    memset(in->name, 'x', sizeof in->name);
    uint8_t buf[512];
    cr_expect_eq(rmig_encode_block_entry(buf, sizeof buf, in), RMIG_ERR_WIRE);
    free(in);
}

// "ram\0x" and "ram" would be one name here and two elsewhere.
Test(block_entry, a_nul_inside_the_name_is_refused) {
    struct rmig_block_entry in = entry_named(20), out;
    uint8_t buf[512];
    int n = rmig_encode_block_entry(buf, sizeof buf, &in);
    for (size_t at = 0; at < 20; at++) {
        buf[17 + at] = 0;
        cr_expect_eq(rmig_decode_block_entry(buf, (size_t)n, &out), RMIG_ERR_WIRE, "NUL at %zu", at);
        buf[17 + at] = 'q';
    }
    cr_expect_eq(rmig_decode_block_entry(buf, (size_t)n, &out), n);
}

Test(block_entry, entries_follow_one_another) {
    uint8_t buf[2048];
    size_t at = 0, read = 0;
    for (size_t n = 1; n <= 30; n++) {
        struct rmig_block_entry in = entry_named(n);
        in.guest_offset = n;
        at += (size_t)rmig_encode_block_entry(buf + at, sizeof buf - at, &in);
    }
    for (size_t n = 1; n <= 30; n++) {
        struct rmig_block_entry out;
        int r = rmig_decode_block_entry(buf + read, at - read, &out);
        cr_assert_eq(r, (int)(17 + n));
        cr_expect_eq(out.guest_offset, n);
        cr_expect_eq(strlen(out.name), n);
        read += (size_t)r;
    }
    cr_expect_eq(read, at);
}
