// The framing of QEMU's migration stream. Golden bytes were seen between stock QEMUs and in files of theirs.
#define RMIG_IMPLEMENTATION
#include "../rmig.h"
#include "../rmig_qemu.h"

#include <criterion/criterion.h>
#include <stdio.h>
#include <stdlib.h>

#define RANDOM_SEED 0x452821e638d01377u
#include "random.h"

// >>tools

struct bytes {
    uint8_t *p;
    size_t n, room;
};

// Small ones have no room to spare, so that whoever reads on behind their end is caught.
static void add(struct bytes *b, const void *p, size_t n) {
    if (b->n + n >= b->room) {
        b->room = b->n + n < 4096 ? b->n + n + 1 : 2 * (b->n + n);
        b->p = (uint8_t *)realloc(b->p, b->room);
        cr_assert_not_null(b->p);
    }
    if (n > 0)
        memcpy(b->p + b->n, p, n);
    b->n += n;
}

// Hexadecimal with spaces; "text" in quotes stands for its bytes.
static void add_hex(struct bytes *b, const char *hex) {
    int high = -1;
    for (bool quoted = false; *hex != '\0'; hex++) {
        const char *at = strchr("0123456789abcdef", *hex);
        uint8_t byte = (uint8_t)*hex;
        if (*hex == '"') {
            quoted = !quoted;
            continue;
        }
        if (!quoted && *hex == ' ')
            continue;
        cr_assert(quoted || at != NULL, "bad hexadecimal in the test: %s", hex);
        if (!quoted) {
            int digit = (int)(at - strchr("0123456789abcdef", '0'));
            digit = digit < 0 ? digit + 16 : digit;
            if (high < 0) {
                high = digit;
                continue;
            }
            byte = (uint8_t)(high << 4 | digit);
            high = -1;
        }
        add(b, &byte, 1);
    }
    cr_assert_eq(high, -1, "half a byte in the test");
}

static struct bytes hex(const char *text) {
    struct bytes b = {0};
    add_hex(&b, text);
    return b;
}

static void expect_bytes(const uint8_t *got, int n, const char *want) {
    struct bytes b = hex(want);
    cr_assert_eq(n, (int)b.n, "%d bytes, wanted %zu: %s", n, b.n, want);
    for (size_t i = 0; i < b.n; i++)
        cr_assert_eq(got[i], b.p[i], "byte %zu is %02x, wanted %02x: %s", i, got[i], b.p[i], want);
    free(b.p);
}

// What a reader says of a stream: events as text, device state as bytes.
struct told {
    char text[65536];
    size_t n;
    struct bytes state;
    struct rmig_qemu_reader reader;
};

static struct told *told_new(unsigned flags) {
    struct told *t = (struct told *)calloc(1, sizeof *t);
    cr_assert_not_null(t);
    rmig_qemu_reader_init(&t->reader, flags);
    return t;
}

static void told_free(struct told *t) {
    free(t->state.p);
    free(t);
}

static void tell_configuration(struct told *t, const struct rmig_qemu_configuration *c) {
    t->n += (size_t)snprintf(t->text + t->n, sizeof t->text - t->n, "config %s bits %u caps %u uuid %d:%02x%02x",
                             c->machine, c->page_bits, c->capabilities, c->has_uuid, c->uuid[0], c->uuid[15]);
}

static void tell(struct told *t, const struct rmig_qemu_event *ev) {
    static const char *const kind[] = {"", "START", "PART", "END"};
    char *at = t->text + t->n;
    size_t room = sizeof t->text - t->n;
    int n = 0;
    switch (ev->type) {
    case RMIG_QEV_NONE:
        return;
    case RMIG_QEV_STATE:
        add(&t->state, ev->data, ev->length);
        return;
    case RMIG_QEV_CONFIGURATION:
        tell_configuration(t, ev->configuration);
        break;
    case RMIG_QEV_COMMAND:
        n = snprintf(at, room, "%s %u", rmig_qemu_command_name(ev->command), ev->value);
        break;
    case RMIG_QEV_SECTION:
        n = snprintf(at, room, "%s %u", kind[ev->section], ev->section_id);
        break;
    case RMIG_QEV_BLOCK:
        n = snprintf(at, room, "block %s %llx %llx %u %llx %llx %llx", ev->block->name,
                     (unsigned long long)ev->block->length, (unsigned long long)ev->block->guest_address,
                     ev->block->mapped.version, (unsigned long long)ev->block->mapped.page_size,
                     (unsigned long long)ev->block->mapped.bitmap_offset,
                     (unsigned long long)ev->block->mapped.pages_offset);
        break;
    case RMIG_QEV_RAM_LIST:
        n = snprintf(at, room, "list %u %llx", ev->block_count, (unsigned long long)ev->total);
        break;
    case RMIG_QEV_HOOK:
        n = snprintf(at, room, "hook");
        break;
    case RMIG_QEV_EOS:
        n = snprintf(at, room, "eos %s %u", kind[ev->section], ev->section_id);
        break;
    case RMIG_QEV_FOOTER:
        n = snprintf(at, room, "footer %u", ev->section_id);
        break;
    case RMIG_QEV_RAM_OVER:
        n = snprintf(at, room, "over");
        break;
    case RMIG_QEV_END:
        n = snprintf(at, room, "whole");
        break;
    }
    t->n += (size_t)n;
    cr_assert_lt(t->n + 2, sizeof t->text);
    t->text[t->n++] = '\n';
    t->text[t->n] = '\0';
}

// A piece of a message, from memory of exactly its size: a sanitizer sees the first byte read too far.
static int feed(struct told *t, const uint8_t *p, size_t n) {
    struct rmig_qemu_event ev;
    uint8_t *copy = (uint8_t *)malloc(n > 0 ? n : 1);
    cr_assert_not_null(copy);
    if (n > 0)
        memcpy(copy, p, n);
    size_t at = 0;
    do {
        uint64_t before = rmig_qemu_reader_offset(&t->reader);
        int64_t used = rmig_qemu_reader_feed(&t->reader, copy + at, n - at, &ev);
        if (used < 0) {
            cr_assert_eq(used, t->reader.error.status);
            cr_assert_eq(ev.type, RMIG_QEV_NONE);
            free(copy);
            return (int)used;
        }
        cr_assert_leq((size_t)used, n - at);
        cr_assert_eq(rmig_qemu_reader_offset(&t->reader), before + (uint64_t)used);
        tell(t, &ev);
        at += (size_t)used;
    } while (ev.type != RMIG_QEV_NONE);
    cr_assert_eq(at, n, "%zu bytes were left", n - at);
    free(copy);
    return RMIG_OK;
}

static int end_message(struct told *t) {
    struct rmig_qemu_event ev;
    int status = rmig_qemu_reader_end_message(&t->reader, &ev);
    tell(t, &ev);
    cr_assert_eq(rmig_qemu_reader_whole(&t->reader), ev.type == RMIG_QEV_END);
    return status;
}

static int feed_message(struct told *t, struct bytes message) {
    int status = feed(t, message.p, message.n);
    return status == RMIG_OK ? end_message(t) : status;
}

static void expect_told(const struct told *t, const char *want) {
    cr_assert_str_eq(t->text, want, "told:\n%swanted:\n%s", t->text, want);
}

// >>golden bytes

// The first message of a 64 MiB q35 of QEMU 7.2 without return path.
#define FIRST_LIST                                                                                                     \
    "06 \"pc.ram\" 0000000004000000 14 \"/rom@etc/acpi/tables\" 0000000000020000 "                                     \
    "07 \"pc.bios\" 0000000000040000 06 \"pc.rom\" 0000000000020000 "                                                  \
    "15 \"/rom@etc/table-loader\" 0000000000001000 12 \"/rom@etc/acpi/rsdp\" 0000000000001000 "
#define FIRST                                                                                                          \
    "51 45 56 4d 00000003 07 0000000a \"pc-q35-7.2\" 01 00000002 03 \"ram\" 00000000 00000004 "                        \
    "0000000004082004 " FIRST_LIST "0000000000000080"
#define FIRST_TOLD                                                                                                     \
    "config pc-q35-7.2 bits 0 caps 0 uuid 0:0000\nSTART 2\nblock pc.ram 4000000 0 0 0 0 0\n"                           \
    "block /rom@etc/acpi/tables 20000 0 0 0 0 0\nblock pc.bios 40000 0 0 0 0 0\nblock pc.rom 20000 0 0 0 0 0\n"        \
    "block /rom@etc/table-loader 1000 0 0 0 0 0\nblock /rom@etc/acpi/rsdp 1000 0 0 0 0 0\nlist 6 4082000\nhook\n"
#define EOS "0000000000000010"
#define HOOK "0000000000000080"
#define FOOTER "7e 00000002"
#define JSON "\"{\" 22 \"devices\" 22 \":[]}\""

// A whole migration, message by message, in the shapes that stock sources cut it.
static const char *const whole[] = {
    FIRST,
    EOS,
    FOOTER "02 00000002" HOOK,
    EOS,
    FOOTER "08 000b 0000 03 00000002" HOOK,
    EOS,
    FOOTER "04 00000000 05 \"timer\" 00000000 00000002 0000000000000007",
    "7e 00000000 04 00000003 03 \"cpu\" 7e 00000003 00",
    ("06 0000000e " JSON),
};
enum { WHOLE = sizeof whole / sizeof whole[0] };
#define WHOLE_TOLD                                                                                                     \
    FIRST_TOLD "eos START 2\nfooter 2\nPART 2\nhook\neos PART 2\nfooter 2\nSWITCHOVER_START 0\nEND 2\nhook\n"          \
               "eos END 2\nfooter 2\nover\nwhole\n"
#define WHOLE_STATE                                                                                                    \
    "04 00000000 05 \"timer\" 00000000 00000002 0000000000000007 7e 00000000 04 00000003 03 \"cpu\" 7e 00000003 00 "   \
    "06 0000000e " JSON

static void expect_whole(const struct told *t) {
    expect_told(t, WHOLE_TOLD);
    expect_bytes(t->state.p, (int)t->state.n, WHOLE_STATE);
}

Test(qemu, first_message_of_7_2) {
    struct bytes b = hex(FIRST);
    cr_assert_eq(b.n, 188); // as seen on the wire
    struct told *t = told_new(0);
    cr_assert_eq(feed_message(t, b), RMIG_OK);
    expect_told(t, FIRST_TOLD);
    told_free(t);
    free(b.p);
}

Test(qemu, first_message_of_7_2_is_written_the_same) {
    static const struct rmig_qemu_configuration config = {.machine = "pc-q35-7.2"};
    static const struct rmig_qemu_block block[] = {{.name = "pc.ram", .length = 0x4000000},
                                                   {.name = "/rom@etc/acpi/tables", .length = 0x20000},
                                                   {.name = "pc.bios", .length = 0x40000},
                                                   {.name = "pc.rom", .length = 0x20000},
                                                   {.name = "/rom@etc/table-loader", .length = 0x1000},
                                                   {.name = "/rom@etc/acpi/rsdp", .length = 0x1000}};
    uint8_t out[512];
    int n = rmig_qemu_encode_start(out, sizeof out, &config);
    n += rmig_qemu_encode_section(out + n, sizeof out - (size_t)n, RMIG_QEMU_SECTION_START, 2);
    n += rmig_qemu_encode_mem_size(out + n, sizeof out - (size_t)n, 0x4082000);
    for (size_t i = 0; i < 6; i++)
        n += rmig_qemu_encode_block(out + n, sizeof out - (size_t)n, &block[i], 0);
    n += rmig_qemu_encode_word(out + n, sizeof out - (size_t)n, RMIG_QEMU_WORD_HOOK);
    expect_bytes(out, n, FIRST);
}

Test(qemu, small_pieces_are_written_as_seen) {
    uint8_t out[64];
    expect_bytes(out, rmig_qemu_encode_word(out, sizeof out, RMIG_QEMU_WORD_EOS), EOS);
    int n = rmig_qemu_encode_footer(out, sizeof out, 1);
    n += rmig_qemu_encode_section(out + n, 40, RMIG_QEMU_SECTION_PART, 1);
    n += rmig_qemu_encode_word(out + n, 40, RMIG_QEMU_WORD_HOOK);
    expect_bytes(out, n, "7e 00000001 02 00000001 0000000000000080");
    n = rmig_qemu_encode_footer(out, sizeof out, 1);
    n += rmig_qemu_encode_command(out + n, 40, RMIG_QEMU_COMMAND_SWITCHOVER_START, 9);
    expect_bytes(out, n, "7e 00000001 08 000b 0000");
    expect_bytes(out, rmig_qemu_encode_command(out, 40, RMIG_QEMU_COMMAND_OPEN_RETURN_PATH, 0), "08 0001 0000");
    expect_bytes(out, rmig_qemu_encode_command(out, 40, RMIG_QEMU_COMMAND_PING, 1), "08 0002 0004 00000001");
    expect_bytes(out, rmig_qemu_encode_section(out, 40, RMIG_QEMU_SECTION_END, 1), "03 00000001");
    expect_bytes(out, rmig_qemu_encode_end(out, 40, "{\"devices\":[]}", 14), "00 06 0000000e " JSON);
}

Test(qemu, whole_stream) {
    struct told *t = told_new(0);
    for (size_t i = 0; i < WHOLE; i++) {
        struct bytes b = hex(whole[i]);
        cr_assert_eq(feed_message(t, b), RMIG_OK, "message %zu: %s", i, t->reader.error.text);
        cr_assert_eq(rmig_qemu_reader_whole(&t->reader), i + 1 == WHOLE, "message %zu", i);
        free(b.p);
    }
    expect_whole(t);
    cr_assert_str_eq(t->reader.configuration.machine, "pc-q35-7.2");
    told_free(t);
}

Test(qemu, return_path_commands_after_the_configuration) {
    struct bytes b = hex("51 45 56 4d 00000003 07 00000004 \"none\" 08 0001 0000 08 0002 0004 00000001 01 00000001 03 "
                         "\"ram\" 00000000 00000004");
    struct told *t = told_new(0);
    cr_assert_eq(feed_message(t, b), RMIG_OK, "%s", t->reader.error.text);
    expect_told(t, "config none bits 0 caps 0 uuid 0:0000\nOPEN_RETURN_PATH 0\nPING 1\nSTART 1\n");
    told_free(t);
    free(b.p);
}

#define SUBSECTIONS                                                                                                    \
    "05 1e \"configuration/target-page-bits\" 00000001 00000010 "                                                      \
    "05 1a \"configuration/capabilities\" 00000001 00000001 0f \"x-ignore-shared\" "                                   \
    "05 12 \"configuration/uuid\" 00000001 000102030405060708090a0b0c0d0eff "

Test(qemu, configuration_subsections_both_ways) {
    struct bytes b = hex("51 45 56 4d 00000003 07 00000004 \"virt\" " SUBSECTIONS
                         "01 00000001 03 \"ram\" 00000000 00000004 0000000000010004 "
                         "03 \"mem\" 0000000000010000 0000000040000000 " EOS);
    struct told *t = told_new(0);
    cr_assert_eq(feed_message(t, b), RMIG_OK, "%s", t->reader.error.text);
    expect_told(t, "config virt bits 16 caps 1 uuid 1:00ff\nSTART 1\nblock mem 10000 40000000 0 0 0 0\nlist 1 10000\n"
                   "eos START 1\n");
    uint8_t out[RMIG_QEMU_START_MAX];
    int n = rmig_qemu_encode_start(out, sizeof out, &t->reader.configuration);
    expect_bytes(out, n, "51 45 56 4d 00000003 07 00000004 \"virt\" " SUBSECTIONS);
    struct rmig_qemu_block block = {.name = "mem", .length = 0x10000, .guest_address = 0x40000000};
    n = rmig_qemu_encode_block(out, sizeof out, &block, RMIG_QEMU_CAPABILITY_IGNORE_SHARED);
    expect_bytes(out, n, "03 \"mem\" 0000000000010000 0000000040000000");
    told_free(t);
    free(b.p);
}

Test(qemu, no_configuration_and_no_footers) {
    struct bytes b = hex("51 45 56 4d 00000003 01 00000001 03 \"ram\" 00000000 00000004 0000000000001004 "
                         "01 \"a\" 0000000000001000 " EOS "03 00000001 " EOS "04 0000 00 06 00000002 \"{}\"");
    struct told *t = told_new(0);
    cr_assert_eq(feed_message(t, b), RMIG_OK, "%s", t->reader.error.text);
    expect_told(t,
                "config  bits 0 caps 0 uuid 0:0000\nSTART 1\nblock a 1000 0 0 0 0 0\nlist 1 1000\neos START 1\nEND 1\n"
                "eos END 1\nover\nwhole\n");
    expect_bytes(t->state.p, (int)t->state.n, "04 0000 00 06 00000002 \"{}\"");
    told_free(t);
    free(b.p);
}

// The beginning of a mapped-ram file of QEMU 10.0.2, and what follows behind the pages.
Test(qemu, mapped_ram_file_of_10_0_2) {
    struct bytes head = hex("51 45 56 4d 00 00 00 03 07 00 00 00 0b 70 63 2d 71 33 35 2d 31 30 2e 30 05 1a 63 6f 6e 66"
                            "69 67 75 72 61 74 69 6f 6e 2f 63 61 70 61 62 69 6c 69 74 69 65 73 00 00 00 01 00 00 00 01"
                            "0a 6d 61 70 70 65 64 2d 72 61 6d 01 00 00 00 01 03 72 61 6d"
                            "00 00 00 00 00 00 00 04 00 00 00 00 04 08 20 04"
                            "06 70 63 2e 72 61 6d 00 00 00 00 04 00 00 00 00"
                            "00 00 01 00 00 00 00 00 00 10 00 00 00 00 00 00 00 00 8b 00 00 00 00 00 10 00 00");
    // The first byte of the header stands at 0x6f: 00, before "00 00 01".
    struct bytes fixed = {0};
    add(&fixed, head.p, 0x6f);
    add_hex(&fixed, "00000001 0000000000001000 000000000000008b 0000000000100000");
    cr_assert_eq(fixed.n, 0x8b);
    struct told *t = told_new(RMIG_QEMU_MAPPED_RAM);
    cr_assert_eq(feed(t, fixed.p, fixed.n), RMIG_OK, "%s", t->reader.error.text);
    expect_told(t, "config pc-q35-10.0 bits 0 caps 2 uuid 0:0000\nSTART 1\nblock pc.ram 4000000 0 1 1000 8b 100000\n");
    rmig_qemu_reader_jump(&t->reader, 0x4100000);
    struct bytes next = hex("14 \"/rom@etc/acpi/tables\" 0000000000020000 "
                            "00000001 0000000000001000 0000000004100039 0000000004200000");
    cr_assert_eq(feed(t, next.p, next.n), RMIG_OK, "%s", t->reader.error.text);
    cr_assert_eq(rmig_qemu_reader_offset(&t->reader), 0x4100039);
    cr_assert(strstr(t->text, "block /rom@etc/acpi/tables 20000 0 1 1000 4100039 4200000\n") != NULL, "%s", t->text);
    told_free(t);
    free(head.p);
    free(fixed.p);
    free(next.p);
}

#define MAPPED                                                                                                         \
    "51 45 56 4d 00000003 07 00000001 \"m\" 05 1a \"configuration/capabilities\" 00000001 00000001 0a \"mapped-ram\" "

Test(qemu, mapped_ram_both_ways_to_the_end) {
    struct bytes b = hex(MAPPED "01 00000001 03 \"ram\" 00000000 00000004 0000000000001004 01 \"a\" 0000000000001000 "
                                "00000001 0000000000001000 0000000000000100 0000000000100000 " EOS "7e 00000001"
                                "02 00000001 " EOS "7e 00000001 08 000b 0000 03 00000001 " EOS "7e 00000001"
                                "04 00 06 00000002 \"{}\"");
    struct told *t = told_new(RMIG_QEMU_MAPPED_RAM);
    cr_assert_eq(feed_message(t, b), RMIG_OK, "%s", t->reader.error.text);
    cr_assert(rmig_qemu_reader_whole(&t->reader));
    uint8_t out[RMIG_QEMU_START_MAX];
    struct rmig_qemu_block block = {.name = "a", .length = 0x1000, .mapped = {1, 0x1000, 0x100, 0x100000}};
    expect_bytes(out, rmig_qemu_encode_start(out, sizeof out, &t->reader.configuration), MAPPED);
    expect_bytes(out, rmig_qemu_encode_block(out, sizeof out, &block, RMIG_QEMU_CAPABILITY_MAPPED_RAM),
                 "01 \"a\" 0000000000001000 00000001 0000000000001000 0000000000000100 0000000000100000");
    told_free(t);
    free(b.p);
}

// >>splits

Test(qemu, every_cut_of_every_message_tells_the_same) {
    for (size_t cut_message = 0; cut_message < WHOLE; cut_message++) {
        struct bytes victim = hex(whole[cut_message]);
        for (size_t cut = 0; cut <= victim.n; cut++) {
            struct told *t = told_new(0);
            for (size_t i = 0; i < WHOLE; i++) {
                struct bytes b = hex(whole[i]);
                size_t first = i == cut_message ? cut : b.n;
                cr_assert_eq(feed(t, b.p, first), RMIG_OK);
                cr_assert_eq(feed(t, b.p + first, b.n - first), RMIG_OK);
                cr_assert_eq(end_message(t), RMIG_OK);
                free(b.p);
            }
            expect_whole(t);
            told_free(t);
        }
        free(victim.p);
    }
}

Test(qemu, random_pieces_tell_the_same) {
    for (unsigned round = 0; round < 300; round++) {
        struct told *t = told_new(0);
        for (size_t i = 0; i < WHOLE; i++) {
            struct bytes b = hex(whole[i]);
            for (size_t at = 0; at < b.n;) {
                size_t n = round == 0 ? 1 : 1 + below(below(40) + 1);
                n = n < b.n - at ? n : b.n - at;
                cr_assert_eq(feed(t, b.p + at, n), RMIG_OK);
                at += n;
            }
            cr_assert_eq(end_message(t), RMIG_OK);
            free(b.p);
        }
        expect_whole(t);
        told_free(t);
    }
}

// Messages may also be cut anywhere, except that the hook word ends one; a cut never makes a part look whole.
Test(qemu, message_boundaries_mean_nothing_else) {
    struct told *t = told_new(0);
    for (size_t i = 0; i < WHOLE; i++) {
        struct bytes b = hex(whole[i]);
        for (size_t k = 0; k < b.n; k++) {
            cr_assert_not(rmig_qemu_reader_whole(&t->reader), "message %zu, byte %zu", i, k);
            cr_assert_eq(feed(t, b.p + k, 1), RMIG_OK);
            cr_assert_eq(end_message(t), RMIG_OK);
        }
        free(b.p);
    }
    expect_whole(t);
    told_free(t);
}

// >>refusals

#define MAGIC "51 45 56 4d 00000003 "
#define HEAD MAGIC "07 00000001 \"m\" "
#define START HEAD "01 00000001 03 \"ram\" 00000000 00000004 "
#define LIST START "0000000000001004 01 \"a\" 0000000000001000 "
#define DONE LIST EOS "7e 00000001 "

static const struct {
    const char *stream, *offset, *words[3];
} refusal[] = {
    {"50 45 56 4d 00000003", "offset 0:", {"not a migration stream", "50 45 56 4d"}},
    {"51 45 56 4d 00000002", "offset 0:", {"version 2", "must be 3"}},
    {MAGIC "07 00000000", "offset 8:", {"machine name of 0 bytes", "1 to 255"}},
    {MAGIC "07 00000100", "offset 8:", {"machine name of 256 bytes", "1 to 255"}},
    {MAGIC "07 ffffffff", "offset 8:", {"machine name of 4294967295 bytes"}},
    {MAGIC "07 00000002 \"a\" 00", "offset 8:", {"machine name holds a zero byte"}},
    {HEAD "05 03 \"foo\" 00000001", "offset 14:", {"subsection \"foo\" is not known"}},
    {HEAD "05 12 \"configuration/uuid\" 00000002", "offset 14:", {"configuration/uuid", "version 2"}},
    {HEAD
     "05 12 \"configuration/uuid\" 00000001 00000000000000000000000000000000 05 12 \"configuration/uuid\" 00000001",
     "offset 54:",
     {"configuration/uuid", "come once"}},
    {HEAD "05 1e \"configuration/target-page-bits\" 00000001 00000009", "offset 14:", {"9 bits", "10 to 30"}},
    {HEAD "05 1e \"configuration/target-page-bits\" 00000001 ffffffff", "offset 14:", {"4294967295 bits"}},
    {HEAD "05 1a \"configuration/capabilities\" 00000001 00000003", "offset 14:", {"3 capabilities"}},
    {HEAD "05 1a \"configuration/capabilities\" 00000001 00000001 03 \"foo\"", "offset 14:", {"\"foo\" is not known"}},
    {HEAD "05 1a \"configuration/capabilities\" 00000001 00000001 0a \"mapped-ram\"", "offset 14:", {"is for files"}},
    {HEAD "05 1a \"configuration/capabilities\" 00000001 00000002 0f \"x-ignore-shared\" 0f \"x-ignore-shared\"",
     "offset 14:",
     {"listed twice"}},
    {START "0000000000001004 00", "offset 39:", {"block 0 has no name"}},
    {START "0000000000001004 02 \"a\" 00", "offset 39:", {"name of block 0 holds a zero byte"}},
    {START "0000000000001004 01 \"a\" 0000000000000000", "offset 39:", {"\"a\" of 0 bytes", "1 to 4096 are left"}},
    {START "0000000000001004 01 \"a\" 0000000000001001", "offset 39:", {"\"a\" of 4097 bytes", "1 to 4096 are left"}},
    {START "0000000000002004 01 \"a\" 0000000000001000 01 \"b\" fffffffffffff000",
     "offset 49:",
     {"\"b\" of 18446744073709547520 bytes", "total of 8192"}},
    {LIST "0000000000001004", "offset 49:", {"second list of blocks", "4096 bytes"}},
    {START HOOK, "offset 31:", {"before the list of blocks"}},
    {START EOS, "offset 31:", {"before the list of blocks"}},
    {LIST "0000000000000008", "offset 49:", {"word 0x8", "PAGE", "RDMA"}},
    {LIST "0000000000001028", "offset 49:", {"word 0x1028", "PAGE"}},
    {LIST "0000000000002002", "offset 49:", {"word 0x2002", "ZERO"}},
    {LIST "0000000000001040", "offset 49:", {"XBZRLE", "capability xbzrle"}},
    {LIST "0000000000000100", "offset 49:", {"COMPRESS_PAGE", "capability compress"}},
    {LIST "0000000000000200", "offset 49:", {"MULTIFD_FLUSH", "capability multifd"}},
    {LIST "0000000000000000", "offset 49:", {"word 0x0", "must be MEM_SIZE, HOOK or EOS"}},
    {LIST "0000000000001010", "offset 49:", {"word 0x1010"}},
    {LIST "0000000000001080", "offset 49:", {"word 0x1080"}},
    {LIST HOOK "00", "offset 57:", {"1 bytes follow the hook word"}},
    {LIST HOOK EOS, "offset 57:", {"8 bytes follow the hook word"}},
    {LIST EOS "7e 00000002", "offset 57:", {"footer of section 2", "section 1 was due"}},
    {HEAD "7e 00000001", "offset 14:", {"byte 7e where a section or a command was due"}},
    {DONE "7e 00000001", "offset 62:", {"byte 7e where a section or a command was due"}},
    {DONE "05", "offset 62:", {"byte 05 where a section or a command was due"}},
    {DONE "07", "offset 62:", {"byte 07"}},
    {DONE "00", "offset 62:", {"byte 00", "before the END of ram"}},
    {HEAD "00", "offset 14:", {"before the END of ram"}},
    {HEAD "02 00000001", "offset 14:", {"section PART (id 1) before the START of ram"}},
    {HEAD "03 00000001", "offset 14:", {"section END (id 1) before the START of ram"}},
    {DONE "02 00000007", "offset 62:", {"section PART of id 7, which is not ram (id 1)"}},
    {DONE "03 00000007", "offset 62:", {"section END of id 7, which is not ram (id 1)"}},
    {DONE "02 00000001 0000000000001004", "offset 67:", {"second list of blocks"}},
    {DONE "01 00000001 03 \"ram\"", "offset 62:", {"section START \"ram\" (id 1) comes twice"}},
    {HEAD "01 00000001 03 \"ram\" 00000001 00000004", "offset 14:", {"instance 1, version 4", "must be instance 0"}},
    {HEAD "01 00000001 03 \"ram\" 00000000 00000003", "offset 14:", {"instance 0, version 3"}},
    {HEAD "01 00000004 0c \"dirty-bitmap\"",
     "offset 14:",
     {"section START \"dirty-bitmap\" (id 4)", "cannot be skipped", "dirty-bitmaps"}},
    {DONE "01 00000004 11 \"0000:00:02.0/vfio\"", "offset 62:", {"\"0000:00:02.0/vfio\" (id 4)", "VFIO"}},
    {HEAD "01 00000004 05 \"block\"", "offset 14:", {"\"block\"", "block migration"}},
    {HEAD "05 1a \"configuration/capabilities\" 00000001 00000001 09 \"fixed-ram\"",
     "offset 14:",
     {"\"fixed-ram\" is an early form of mapped-ram", "9.0 or later"}},
    {HEAD "01 00000004 0a \"spapr/htab\"", "offset 14:", {"\"spapr/htab\"", "only ram"}},
    {HEAD "01 00000004 00", "offset 14:", {"section START \"\" (id 4)"}},
    {HEAD "04 00000009 0a \"virtio-mem\"",
     "offset 14:",
     {"section FULL \"virtio-mem\" (id 9) before the END of ram", "unplug"}},
    {DONE "04 00000009 03 \"ram\"", "offset 62:", {"section FULL \"ram\" (id 9) before the END of ram"}},
    {HEAD "08 0001 0001", "offset 14:", {"OPEN_RETURN_PATH (1) with 1 bytes", "must have no data"}},
    {HEAD "08 0002 0000", "offset 14:", {"PING (2) with 0 bytes", "4 bytes"}},
    {HEAD "08 0003 0010", "offset 14:", {"POSTCOPY_ADVISE (3) with 16 bytes", "postcopy-ram"}},
    {DONE "08 0004 0000", "offset 62:", {"POSTCOPY_LISTEN (4)", "post-copy"}},
    {DONE "08 0005 0000", "offset 62:", {"POSTCOPY_RUN (5)", "post-copy"}},
    {DONE "08 0006 0003", "offset 62:", {"POSTCOPY_RAM_DISCARD (6)", "post-copy"}},
    {DONE "08 0007 0004", "offset 62:", {"PACKAGED (7)", "cannot be skipped"}},
    {DONE "08 0008 0000", "offset 62:", {"ENABLE_COLO (8)", "x-colo"}},
    {DONE "08 0009 0000", "offset 62:", {"POSTCOPY_RESUME (9)"}},
    {DONE "08 000a 0003", "offset 62:", {"RECV_BITMAP (10)"}},
    {DONE "08 000b 0001", "offset 62:", {"SWITCHOVER_START (11)", "must have no data"}},
    {DONE "08 000c 0000", "offset 62:", {"unknown (12)", "is not known"}},
    {DONE "08 0000 0000", "offset 62:", {"unknown (0)", "is not known"}},
};

static void expect_refused(struct told *t, int status, size_t i) {
    cr_assert_eq(status, RMIG_ERR_WIRE, "%zu: %s: not refused; told:\n%s", i, refusal[i].stream, t->text);
    cr_assert(strstr(t->reader.error.text, refusal[i].offset) != NULL, "%zu: \"%s\" is not in: %s", i,
              refusal[i].offset, t->reader.error.text);
    for (size_t k = 0; k < 3 && refusal[i].words[k] != NULL; k++)
        cr_assert(strstr(t->reader.error.text, refusal[i].words[k]) != NULL, "%zu: \"%s\" is not in: %s", i,
                  refusal[i].words[k], t->reader.error.text);
}

Test(qemu, what_cannot_be_read_is_refused_with_reason_and_place) {
    for (size_t i = 0; i < sizeof refusal / sizeof refusal[0]; i++) {
        struct bytes b = hex(refusal[i].stream);
        struct told *t = told_new(0);
        expect_refused(t, feed(t, b.p, b.n), i);
        struct rmig_error first = t->reader.error;
        struct rmig_qemu_event ev;
        cr_assert_eq(rmig_qemu_reader_feed(&t->reader, "x", 1, &ev), RMIG_ERR_WIRE); // and it stays so
        cr_assert_eq(rmig_qemu_reader_end_message(&t->reader, &ev), RMIG_ERR_WIRE);
        cr_assert_str_eq(t->reader.error.text, first.text);
        told_free(t);
        free(b.p);
    }
}

Test(qemu, a_refusal_does_not_depend_on_the_pieces) {
    for (size_t i = 0; i < sizeof refusal / sizeof refusal[0]; i++) {
        struct bytes b = hex(refusal[i].stream);
        struct told *t = told_new(0);
        int status = RMIG_OK;
        for (size_t k = 0; k < b.n && status == RMIG_OK; k++)
            status = feed(t, b.p + k, 1);
        cr_assert_eq(status, RMIG_ERR_WIRE, "%zu: %s", i, refusal[i].stream);
        if (strstr(t->reader.error.text, "follow the hook word") == NULL)
            expect_refused(t, status, i);
        told_free(t);
        free(b.p);
    }
}

Test(qemu, hook_in_a_mapped_ram_file_is_refused) {
    struct bytes b = hex(MAPPED "01 00000001 03 \"ram\" 00000000 00000004 0000000000001004 01 \"a\" 0000000000001000 "
                                "00000001 0000000000001000 0000000000000100 0000000000100000 " HOOK);
    struct told *t = told_new(RMIG_QEMU_MAPPED_RAM);
    cr_assert_eq(feed(t, b.p, b.n), RMIG_ERR_WIRE);
    cr_assert(strstr(t->reader.error.text, "no place in a mapped-ram file") != NULL, "%s", t->reader.error.text);
    told_free(t);
    free(b.p);
}

static struct bytes many_blocks(uint32_t count) {
    struct bytes b = hex(HEAD "01 00000001 03 \"ram\" 00000000 00000004");
    uint8_t out[RMIG_QEMU_BLOCK_MAX];
    add(&b, out, (size_t)rmig_qemu_encode_mem_size(out, sizeof out, (uint64_t)count * 0x1000));
    for (uint32_t i = 0; i < count; i++) {
        struct rmig_qemu_block block = {.length = 0x1000};
        snprintf(block.name, sizeof block.name, "block%u", i);
        add(&b, out, (size_t)rmig_qemu_encode_block(out, sizeof out, &block, 0));
    }
    return b;
}

static int count_blocks(const struct bytes *b, uint32_t *count, struct rmig_qemu_reader *r) {
    struct rmig_qemu_event ev;
    const uint8_t *p = b->p;
    size_t n = b->n;
    rmig_qemu_reader_init(r, 0);
    *count = 0;
    do {
        int64_t used = rmig_qemu_reader_feed(r, p, n, &ev);
        if (used < 0)
            return (int)used;
        p += used;
        n -= (size_t)used;
        *count += ev.type == RMIG_QEV_BLOCK;
    } while (ev.type != RMIG_QEV_NONE);
    return RMIG_OK;
}

Test(qemu, the_number_of_blocks_is_bounded) {
    struct rmig_qemu_reader r;
    uint32_t count;
    struct bytes b = many_blocks(RMIG_QEMU_BLOCKS_MAX);
    cr_assert_eq(count_blocks(&b, &count, &r), RMIG_OK, "%s", r.error.text);
    cr_assert_eq(count, 16383);
    free(b.p);
    b = many_blocks(RMIG_QEMU_BLOCKS_MAX + 1);
    cr_assert_eq(count_blocks(&b, &count, &r), RMIG_ERR_WIRE);
    cr_assert_eq(count, 16383);
    cr_assert(strstr(r.error.text, "more than 16383 blocks") != NULL, "%s", r.error.text);
    free(b.p);
}

// >>the end of device state

static const char *const state_head = LIST EOS "7e 00000001 03 00000001 " EOS "7e 00000001 ";

// The rule, the slow way: collect everything, look backwards.
static bool ends_with_description(const uint8_t *p, size_t n) {
    if (n == 0 || p[n - 1] != '}')
        return false;
    for (size_t json = 1; json + 6 <= n; json++) {
        const uint8_t *q = p + n - json;
        if (q[0] == 0)
            return false; // it would hold a zero byte
        uint64_t length = (uint64_t)q[-4] << 24 | (uint64_t)q[-3] << 16 | (uint64_t)q[-2] << 8 | q[-1];
        if (q[0] == '{' && length == json && q[-5] == 6 && q[-6] == 0 &&
            (q[-1] == 0 || q[-2] == 0 || q[-3] == 0 || q[-4] == 0))
            return true;
    }
    return false;
}

static bool found_whole(const struct bytes *state) {
    struct bytes head = hex(state_head);
    struct told *t = told_new(0);
    cr_assert_eq(feed(t, head.p, head.n), RMIG_OK);
    for (size_t at = 0; at < state->n;) {
        size_t n = 1 + below(state->n - at);
        cr_assert_eq(feed(t, state->p + at, n), RMIG_OK);
        at += n;
    }
    cr_assert_eq(end_message(t), RMIG_OK);
    bool found = rmig_qemu_reader_whole(&t->reader);
    told_free(t);
    free(head.p);
    return found;
}

static void add_description(struct bytes *b, uint32_t n) {
    uint8_t head[6] = {0, 6, (uint8_t)(n >> 24), (uint8_t)(n >> 16), (uint8_t)(n >> 8), (uint8_t)n};
    add(b, head, sizeof head);
    uint8_t *json = (uint8_t *)malloc(n);
    memset(json, ' ', n);
    json[0] = '{';
    json[n - 1] = '}';
    add(b, json, n);
    free(json);
}

Test(qemu, descriptions_of_all_kinds_of_length_are_found) {
    static const uint32_t length[] = {2,      3,       9,       255,     256,      257,      511,      512,
                                      0xffff, 0x10000, 0x10001, 0x10100, 0x010101, 0x020304, 0xff0000, 0xffffff};
    for (size_t i = 0; i < sizeof length / sizeof length[0]; i++) {
        for (unsigned before = 0; before < 3; before++) {
            struct bytes b = {0};
            add_hex(&b, before == 0 ? "" : before == 1 ? "04 00 06 00000002 \"{}\"" : "01 02 03 04 05 06 07 08 09");
            add_description(&b, length[i]);
            cr_expect(found_whole(&b), "%u bytes, %u", length[i], before);
            b.n--; // one byte is missing
            cr_expect_not(found_whole(&b), "%u bytes less one, %u", length[i], before);
            b.n++;
            add_hex(&b, "20"); // one too many
            cr_expect_not(found_whole(&b), "%u bytes and one, %u", length[i], before);
            free(b.p);
        }
    }
}

Test(qemu, near_misses_of_the_end_are_none) {
    static const char *const miss[] = {
        "",
        "00",
        "00 06 00000000",
        "00 06 00000002 \"[]\"",
        "00 06 00000002 \"{]\"",
        "00 07 00000002 \"{}\"",
        "01 06 00000002 \"{}\"",
        "06 00000002 \"{}\"",
        "00 06 00000003 \"{}\"",
        "00 06 00000002 \"{}\" 00",
        "00 06 00000004 \"{\" 00 \"a}\"",
        "00 06 00000002 \"{}\" 04 00000001",
    };
    for (size_t i = 0; i < sizeof miss / sizeof miss[0]; i++) {
        struct bytes b = hex(miss[i]);
        cr_expect_not(found_whole(&b), "%s", miss[i]);
        free(b.p);
    }
    struct bytes b = hex("00 06 00000002 \"{}\"");
    cr_expect(found_whole(&b));
    free(b.p);
}

Test(qemu, the_end_is_found_as_by_looking_backwards) {
    unsigned found = 0;
    for (unsigned round = 0; round < 20000; round++) {
        struct bytes b = {0};
        for (size_t n = below(12); n > 0; n--) {
            uint8_t byte = (uint8_t)(below(3) == 0 ? below(256) : below(8));
            add(&b, &byte, 1);
        }
        if (below(2) == 0)
            add_description(&b, (uint32_t)(2 + below(600)));
        for (size_t n = below(3); n > 0 && b.n > 0; n--)
            b.p[b.n - 1 - below(b.n < 12 ? b.n : 12)] ^= (uint8_t)(1u << below(8));
        bool want = ends_with_description(b.p, b.n);
        cr_assert_eq(found_whole(&b), want, "round %u: %d wanted", round, want);
        found += want;
        free(b.p);
    }
    cr_assert_gt(found, 1000);
}

Test(qemu, what_follows_an_end_is_device_state_again) {
    struct bytes head = hex(state_head), end = hex("04 00 06 00000002 \"{}\"");
    struct told *t = told_new(0);
    cr_assert_eq(feed(t, head.p, head.n), RMIG_OK);
    cr_assert_eq(feed_message(t, end), RMIG_OK);
    cr_assert(rmig_qemu_reader_whole(&t->reader));
    cr_assert_eq(end_message(t), RMIG_OK); // nothing new: still whole
    cr_assert(rmig_qemu_reader_whole(&t->reader));
    cr_assert_eq(feed(t, end.p, 3), RMIG_OK);
    cr_assert_not(rmig_qemu_reader_whole(&t->reader));
    cr_assert_eq(feed(t, end.p + 3, end.n - 3), RMIG_OK);
    cr_assert_not(rmig_qemu_reader_whole(&t->reader)); // only the end of a message can be the end
    cr_assert_eq(end_message(t), RMIG_OK);
    cr_assert(rmig_qemu_reader_whole(&t->reader));
    cr_assert_eq(t->state.n, 2 * end.n);
    told_free(t);
    free(head.p);
    free(end.p);
}

// >>round trips

static void random_name(char *name) {
    size_t n = below(8) == 0 ? RMIG_NAME_MAX : 1 + below(30);
    for (size_t i = 0; i < n; i++)
        name[i] = (char)(1 + below(127));
    for (size_t i = 0; i < n; i++)
        name[i] = name[i] == '\n' ? '.' : name[i];
    name[n] = '\0';
}

static struct rmig_qemu_configuration random_configuration(bool mapped) {
    struct rmig_qemu_configuration c = {.machine = ""};
    if (below(4) > 0 || mapped) {
        random_name(c.machine);
        c.page_bits = below(2) == 0 ? 0 : (uint32_t)(10 + below(21));
        c.capabilities =
            (below(3) == 0 ? RMIG_QEMU_CAPABILITY_IGNORE_SHARED : 0u) | (mapped ? RMIG_QEMU_CAPABILITY_MAPPED_RAM : 0u);
        c.has_uuid = below(2) == 0;
        for (size_t i = 0; i < 16 && c.has_uuid; i++)
            c.uuid[i] = (uint8_t)below(256);
    }
    return c;
}

static struct rmig_qemu_block random_block(uint32_t capabilities) {
    struct rmig_qemu_block b = {.length = 1024 * (1 + below(below(2) == 0 ? 4 : 1u << 30))};
    random_name(b.name);
    if ((capabilities & RMIG_QEMU_CAPABILITY_IGNORE_SHARED) != 0)
        b.guest_address = rng();
    if ((capabilities & RMIG_QEMU_CAPABILITY_MAPPED_RAM) != 0)
        b.mapped = (struct rmig_qemu_mapped_ram){(uint32_t)rng(), rng(), rng(), rng()};
    return b;
}

// Writes a stream, and beside it what a reader has to say.
struct script {
    struct bytes stream, want;
    struct told *told; // of what was written, to reuse its words
    size_t message_end[64];
    size_t messages;
};

#define PUT(s, call)                                                                                                   \
    do {                                                                                                               \
        uint8_t out[RMIG_QEMU_START_MAX];                                                                              \
        int put_n = (call);                                                                                            \
        cr_assert_gt(put_n, 0);                                                                                        \
        add(&(s)->stream, out, (size_t)put_n);                                                                         \
    } while (0)

static void say(struct script *s, struct rmig_qemu_event ev) { tell(s->told, &ev); }

static void cut(struct script *s) { s->message_end[s->messages++] = s->stream.n; }

static void write_section(struct script *s, enum rmig_qemu_section kind, uint32_t id, bool hook) {
    struct rmig_qemu_event ev = {.type = RMIG_QEV_SECTION, .section = kind, .section_id = id};
    if (kind != RMIG_QEMU_SECTION_START) {
        PUT(s, rmig_qemu_encode_section(out, sizeof out, kind, id));
        say(s, ev);
    }
    if (hook) {
        PUT(s, rmig_qemu_encode_word(out, sizeof out, RMIG_QEMU_WORD_HOOK));
        ev.type = RMIG_QEV_HOOK;
        say(s, ev);
        cut(s);
    }
    PUT(s, rmig_qemu_encode_word(out, sizeof out, RMIG_QEMU_WORD_EOS));
    ev.type = RMIG_QEV_EOS;
    say(s, ev);
    if (below(2) == 0)
        cut(s);
    if (below(4) > 0) {
        PUT(s, rmig_qemu_encode_footer(out, sizeof out, id));
        ev.type = RMIG_QEV_FOOTER;
        say(s, ev);
    }
}

static void write_command(struct script *s, enum rmig_qemu_command command, uint32_t value) {
    PUT(s, rmig_qemu_encode_command(out, sizeof out, command, value));
    say(s, (struct rmig_qemu_event){.type = RMIG_QEV_COMMAND,
                                    .command = (uint32_t)command,
                                    .value = command == RMIG_QEMU_COMMAND_PING ? value : 0});
}

static void write_list(struct script *s, const struct rmig_qemu_configuration *c) {
    struct rmig_qemu_block block[40];
    uint32_t count = (uint32_t)below(41);
    uint64_t total = 0;
    for (uint32_t i = 0; i < count; i++) {
        block[i] = random_block(c->capabilities);
        total += block[i].length;
    }
    PUT(s, rmig_qemu_encode_mem_size(out, sizeof out, total));
    for (uint32_t i = 0; i < count; i++) {
        PUT(s, rmig_qemu_encode_block(out, sizeof out, &block[i], c->capabilities));
        say(s, (struct rmig_qemu_event){.type = RMIG_QEV_BLOCK, .block = &block[i]});
    }
    say(s, (struct rmig_qemu_event){.type = RMIG_QEV_RAM_LIST, .block_count = count, .total = total});
}

static void write_script(struct script *s, bool mapped) {
    struct rmig_qemu_configuration c = random_configuration(mapped);
    uint32_t id = (uint32_t)rng();
    PUT(s, rmig_qemu_encode_start(out, sizeof out, &c));
    say(s, (struct rmig_qemu_event){.type = RMIG_QEV_CONFIGURATION, .configuration = &c});
    if (below(2) == 0) {
        write_command(s, RMIG_QEMU_COMMAND_OPEN_RETURN_PATH, 0);
        cut(s);
        write_command(s, RMIG_QEMU_COMMAND_PING, (uint32_t)rng());
    }
    PUT(s, rmig_qemu_encode_section(out, sizeof out, RMIG_QEMU_SECTION_START, id));
    say(s, (struct rmig_qemu_event){.type = RMIG_QEV_SECTION, .section = RMIG_QEMU_SECTION_START, .section_id = id});
    write_list(s, &c);
    write_section(s, RMIG_QEMU_SECTION_START, id, !mapped);
    for (size_t i = below(5); i > 0; i--)
        write_section(s, RMIG_QEMU_SECTION_PART, id, !mapped && below(4) > 0);
    if (below(2) == 0)
        write_command(s, RMIG_QEMU_COMMAND_SWITCHOVER_START, 0);
    write_section(s, RMIG_QEMU_SECTION_END, id, !mapped && below(4) > 0);
    say(s, (struct rmig_qemu_event){.type = RMIG_QEV_RAM_OVER});
    s->want.n = 0;
    add_hex(&s->want, "04 00000005 01 \"x\" 00000000 00000001 00"); // not 7e: that would be a footer
    add_description(&s->want, (uint32_t)(2 + below(3000)));
    add(&s->stream, s->want.p, s->want.n);
    say(s, (struct rmig_qemu_event){.type = RMIG_QEV_END});
    cut(s);
}

Test(qemu, what_is_written_is_read) {
    for (unsigned round = 0; round < 2000; round++) {
        bool mapped = below(4) == 0;
        unsigned flags = mapped ? RMIG_QEMU_MAPPED_RAM : 0;
        struct script s = {.told = told_new(flags)};
        write_script(&s, mapped);
        struct told *t = told_new(flags);
        size_t at = 0;
        for (size_t m = 0; m < s.messages; m++) {
            while (at < s.message_end[m]) {
                size_t n = 1 + below(s.message_end[m] - at);
                cr_assert_eq(feed(t, s.stream.p + at, n), RMIG_OK, "round %u: %s", round, t->reader.error.text);
                at += n;
            }
            cr_assert_eq(end_message(t), RMIG_OK);
        }
        expect_told(t, s.told->text);
        cr_assert_eq(t->state.n, s.want.n);
        cr_assert_arr_eq(t->state.p, s.want.p, s.want.n);
        free(s.stream.p);
        free(s.want.p);
        told_free(s.told);
        told_free(t);
    }
}

Test(qemu, the_longest_pieces_fit_what_is_promised) {
    struct rmig_qemu_configuration c = {.page_bits = 16, .capabilities = 3, .has_uuid = true};
    struct rmig_qemu_block b = {.length = 1024};
    uint8_t out[RMIG_QEMU_START_MAX];
    memset(c.machine, 'm', RMIG_NAME_MAX);
    memset(b.name, 'b', RMIG_NAME_MAX);
    cr_expect_gt(rmig_qemu_encode_start(out, sizeof out, &c), 0);
    cr_expect_eq(rmig_qemu_encode_block(out, RMIG_QEMU_BLOCK_MAX, &b, 3), 300);
    cr_expect_gt(rmig_qemu_encode_section(out, RMIG_QEMU_SMALL_MAX, RMIG_QEMU_SECTION_START, 1), 0);
}

// >>what encoders refuse

#define EXPECT_FULL(call)                                                                                              \
    do {                                                                                                               \
        uint8_t out[RMIG_QEMU_START_MAX];                                                                              \
        size_t cap = sizeof out;                                                                                       \
        int whole_n = (call);                                                                                          \
        cr_assert_gt(whole_n, 0);                                                                                      \
        for (cap = 0; cap < (size_t)whole_n; cap++) {                                                                  \
            memset(out, 0x5a, sizeof out);                                                                             \
            cr_assert_eq((call), RMIG_ERR_FULL, "cap %zu", cap);                                                       \
            for (size_t i = 0; i < sizeof out; i++)                                                                    \
                cr_assert_eq(out[i], 0x5a, "cap %zu", cap);                                                            \
        }                                                                                                              \
        cr_assert_eq((call), whole_n);                                                                                 \
    } while (0)

Test(qemu, encoders_write_nothing_where_there_is_no_room) {
    struct rmig_qemu_configuration c = {.machine = "m", .page_bits = 16, .capabilities = 3, .has_uuid = true};
    struct rmig_qemu_block b = {.name = "b", .length = 1024};
    struct rmig_qemu_return shut = {RMIG_QEMU_RETURN_SHUT, 0};
    EXPECT_FULL(rmig_qemu_encode_start(out, cap, &c));
    EXPECT_FULL(rmig_qemu_encode_section(out, cap, RMIG_QEMU_SECTION_START, 1));
    EXPECT_FULL(rmig_qemu_encode_mem_size(out, cap, 1024));
    EXPECT_FULL(rmig_qemu_encode_block(out, cap, &b, 3));
    EXPECT_FULL(rmig_qemu_encode_word(out, cap, RMIG_QEMU_WORD_HOOK));
    EXPECT_FULL(rmig_qemu_encode_footer(out, cap, 1));
    EXPECT_FULL(rmig_qemu_encode_command(out, cap, RMIG_QEMU_COMMAND_PING, 1));
    EXPECT_FULL(rmig_qemu_encode_end(out, cap, "{}", 2));
    EXPECT_FULL(rmig_qemu_encode_return(out, cap, &shut));
}

Test(qemu, encoders_refuse_what_no_reader_takes) {
    uint8_t out[RMIG_QEMU_START_MAX];
    struct rmig_qemu_configuration c;
    struct rmig_qemu_block b = {.name = "", .length = 1024};
    struct rmig_qemu_return pages = {4, 0};
    memset(&c, 'x', sizeof c); // a name without end
    cr_expect_eq(rmig_qemu_encode_start(out, sizeof out, &c), RMIG_ERR_ARGUMENT);
    cr_expect_eq(rmig_qemu_encode_block(out, sizeof out, &b, 0), RMIG_ERR_ARGUMENT);
    memset(b.name, 'x', sizeof b.name);
    cr_expect_eq(rmig_qemu_encode_block(out, sizeof out, &b, 0), RMIG_ERR_ARGUMENT);
    b = (struct rmig_qemu_block){.name = "b", .length = 0};
    cr_expect_eq(rmig_qemu_encode_block(out, sizeof out, &b, 0), RMIG_ERR_ARGUMENT);
    cr_expect_eq(rmig_qemu_encode_mem_size(out, sizeof out, 1023), RMIG_ERR_ARGUMENT);
    cr_expect_eq(rmig_qemu_encode_section(out, sizeof out, RMIG_QEMU_SECTION_FULL, 0), RMIG_ERR_ARGUMENT);
    cr_expect_eq(rmig_qemu_encode_word(out, sizeof out, RMIG_QEMU_WORD_MEM_SIZE), RMIG_ERR_ARGUMENT);
    cr_expect_eq(rmig_qemu_encode_command(out, sizeof out, RMIG_QEMU_COMMAND_PACKAGED, 0), RMIG_ERR_ARGUMENT);
    cr_expect_eq(rmig_qemu_encode_end(out, sizeof out, "[]", 2), RMIG_ERR_ARGUMENT);
    cr_expect_eq(rmig_qemu_encode_end(out, sizeof out, "{]", 2), RMIG_ERR_ARGUMENT);
    cr_expect_eq(rmig_qemu_encode_end(out, sizeof out, "{}", 0), RMIG_ERR_ARGUMENT);
    cr_expect_eq(rmig_qemu_encode_end(out, sizeof out, "{}", 3), RMIG_ERR_ARGUMENT); // with its final NUL
    cr_expect_eq(rmig_qemu_encode_end(out, sizeof out, "{}", 0x1000000), RMIG_ERR_ARGUMENT);
    cr_expect_eq(rmig_qemu_encode_return(out, sizeof out, &pages), RMIG_ERR_ARGUMENT);
}

// >>return path

Test(qemu, return_path_both_ways) {
    static const struct {
        struct rmig_qemu_return in;
        const char *bytes;
    } row[] = {
        {{RMIG_QEMU_RETURN_PONG, 1}, "00 02 00 04 00 00 00 01"},
        {{RMIG_QEMU_RETURN_SHUT, 0}, "00 01 00 04 00 00 00 00"},
        {{RMIG_QEMU_RETURN_SHUT, 0x01020304}, "00 01 00 04 01 02 03 04"},
        {{RMIG_QEMU_RETURN_SWITCHOVER_ACK, 0}, "00 07 00 00"},
    };
    for (size_t i = 0; i < sizeof row / sizeof row[0]; i++) {
        uint8_t out[RMIG_QEMU_RETURN_MAX];
        struct rmig_qemu_return got = {99, 99};
        int n = rmig_qemu_encode_return(out, sizeof out, &row[i].in);
        expect_bytes(out, n, row[i].bytes);
        for (int cut_at = 0; cut_at < n; cut_at++) {
            cr_assert_eq(rmig_qemu_decode_return(out, (size_t)cut_at, &got), 0);
            cr_assert_eq(got.type, 99);
        }
        cr_assert_eq(rmig_qemu_decode_return(out, (size_t)n, &got), n);
        cr_assert_eq(got.type, row[i].in.type);
        cr_assert_eq(got.value, row[i].in.value);
    }
}

Test(qemu, return_path_refusals) {
    static const char *const bad[] = {"00 00 00 00", "00 03 00 0c",          "00 04 00 0c",
                                      "00 05 00 04", "00 06 00 04 00000001", "00 01 00 05 00000000",
                                      "00 02 00 00", "00 07 00 04",          "ff ff ff ff"};
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        struct bytes b = hex(bad[i]);
        struct rmig_qemu_return got;
        cr_expect_eq(rmig_qemu_decode_return(b.p, b.n, &got), RMIG_ERR_WIRE, "%s", bad[i]);
        free(b.p);
    }
}

Test(qemu, command_names) {
    cr_expect_str_eq(rmig_qemu_command_name(1), "OPEN_RETURN_PATH");
    cr_expect_str_eq(rmig_qemu_command_name(11), "SWITCHOVER_START");
    cr_expect_str_eq(rmig_qemu_command_name(0), "unknown");
    cr_expect_str_eq(rmig_qemu_command_name(12), "unknown");
}
