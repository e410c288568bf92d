// libFuzzer target for the reader of QEMU's migration stream: raw bytes in, in one piece and in many; both must tell
// the same, and what was read must be what the encoders write.
//     clang -g -O1 -fsanitize=fuzzer,address,undefined tests/fuzz_qemu.c -o fuzz_qemu
//     fuzz_qemu -max_total_time=60 -max_len=4096 new_inputs tests/corpus/fuzz_qemu
#define RMIG_IMPLEMENTATION
#include "../rmig.h"
#include "../rmig_qemu.h"
#include "fuzz.h"

// Digests of what a reader told.
struct told {
    uint64_t events, state, state_bytes;
    struct rmig_error error;
};

static void digest(uint64_t *h, const void *p, size_t n) {
    for (size_t i = 0; i < n; i++)
        *h = (*h ^ ((const uint8_t *)p)[i]) * 0x100000001b3u;
}

static void digest_event(struct told *t, const struct rmig_qemu_event *ev) {
    if (ev->type == RMIG_QEV_NONE)
        return;
    uint64_t word[] = {ev->type, ev->block_count, ev->total, ev->section, ev->section_id, ev->command, ev->value};
    if (ev->type == RMIG_QEV_STATE) {
        digest(&t->state, ev->data, ev->length);
        t->state_bytes += ev->length;
        return;
    }
    digest(&t->events, word, sizeof word);
    if (ev->type == RMIG_QEV_CONFIGURATION) {
        const struct rmig_qemu_configuration *c = ev->configuration;
        REQUIRE(memchr(c->machine, 0, sizeof c->machine) != NULL);
        digest(&t->events, c->machine, strlen(c->machine));
        digest(&t->events, &c->page_bits, sizeof c->page_bits);
        digest(&t->events, &c->capabilities, sizeof c->capabilities);
        digest(&t->events, c->uuid, sizeof c->uuid);
    }
    if (ev->type == RMIG_QEV_BLOCK) {
        REQUIRE(memchr(ev->block->name, 0, sizeof ev->block->name) != NULL && ev->block->name[0] != '\0');
        REQUIRE(ev->block->length > 0 && ev->block->length <= ev->total && ev->block_count <= RMIG_QEMU_BLOCKS_MAX);
        digest(&t->events, ev->block->name, strlen(ev->block->name));
        digest(&t->events, &ev->block->length, sizeof ev->block->length);
    }
}

// Feeds a copy of exactly n bytes and notes the events up to a hook, which ends its message. Returns the bytes used.
static size_t feed(struct rmig_qemu_reader *r, struct told *t, const uint8_t *p, size_t n) {
    uint8_t *copy = (uint8_t *)malloc(n + 1);
    struct rmig_qemu_event ev;
    size_t at = 0;
    REQUIRE(copy != NULL);
    memcpy(copy, p, n);
    uint8_t *exact = copy + 1;
    memmove(exact, copy, n);
    do {
        int64_t used = rmig_qemu_reader_feed(r, exact + at, n - at, &ev);
        if (used < 0) {
            REQUIRE(used == RMIG_ERR_WIRE && r->error.status == RMIG_ERR_WIRE && strlen(r->error.text) > 16);
            break;
        }
        REQUIRE((size_t)used <= n - at);
        REQUIRE(ev.type != RMIG_QEV_STATE || (ev.data == exact + at && ev.length == (size_t)used));
        at += (size_t)used;
        digest_event(t, &ev);
    } while (ev.type != RMIG_QEV_NONE && ev.type != RMIG_QEV_HOOK);
    REQUIRE(r->error.status != RMIG_OK || ev.type == RMIG_QEV_HOOK || at == n);
    if (ev.type == RMIG_QEV_HOOK)
        REQUIRE(rmig_qemu_reader_end_message(r, &ev) == RMIG_OK && ev.type == RMIG_QEV_NONE);
    free(copy);
    return at;
}

static struct told read_all(const uint8_t *p, size_t n, unsigned flags, uint32_t pieces) {
    struct rmig_qemu_reader r;
    struct rmig_qemu_event ev;
    struct told t;
    memset(&t, 0, sizeof t);
    rmig_qemu_reader_init(&r, flags);
    for (size_t at = 0; at < n && r.error.status == RMIG_OK;) {
        size_t piece = n - at;
        if (pieces != 0) {
            pieces = pieces * 1664525u + 1013904223u;
            size_t most = 1 + (pieces >> 24) % 24;
            piece = most < piece ? most : piece;
        }
        at += feed(&r, &t, p + at, piece);
    }
    if (r.error.status == RMIG_OK) {
        REQUIRE(rmig_qemu_reader_end_message(&r, &ev) == RMIG_OK);
        REQUIRE(rmig_qemu_reader_whole(&r) == (ev.type == RMIG_QEV_END));
        REQUIRE(ev.type == RMIG_QEV_NONE || t.state_bytes >= 7);
        digest_event(&t, &ev);
    }
    t.error = r.error;
    return t;
}

// What an encoder makes of an event must be the bytes that the reader has just used.
static int encode(const struct rmig_qemu_reader *r, const struct rmig_qemu_event *ev, uint8_t *out, size_t cap) {
    switch (ev->type) {
    case RMIG_QEV_COMMAND:
        return rmig_qemu_encode_command(out, cap, (enum rmig_qemu_command)ev->command, ev->value);
    case RMIG_QEV_SECTION:
        return rmig_qemu_encode_section(out, cap, ev->section, ev->section_id);
    case RMIG_QEV_BLOCK:
        return rmig_qemu_encode_block(out, cap, ev->block, r->configuration.capabilities);
    case RMIG_QEV_HOOK:
        return rmig_qemu_encode_word(out, cap, RMIG_QEMU_WORD_HOOK);
    case RMIG_QEV_EOS:
        return rmig_qemu_encode_word(out, cap, RMIG_QEMU_WORD_EOS);
    case RMIG_QEV_FOOTER:
        return rmig_qemu_encode_footer(out, cap, ev->section_id);
    default:
        return 0;
    }
}

static void check_configuration(const struct rmig_qemu_configuration *c, unsigned flags) {
    uint8_t out[RMIG_QEMU_START_MAX + 1];
    struct rmig_qemu_reader r;
    struct rmig_qemu_event ev;
    int n = rmig_qemu_encode_start(out, sizeof out - 1, c);
    REQUIRE(n >= 8);
    out[n] = RMIG_QEMU_SECTION_START; // shows that the configuration is over
    rmig_qemu_reader_init(&r, flags);
    REQUIRE(rmig_qemu_reader_feed(&r, out, (size_t)n + 1, &ev) == n && ev.type == RMIG_QEV_CONFIGURATION);
    REQUIRE(strcmp(ev.configuration->machine, c->machine) == 0 && ev.configuration->page_bits == c->page_bits);
    REQUIRE(ev.configuration->capabilities == c->capabilities && ev.configuration->has_uuid == c->has_uuid);
    REQUIRE(memcmp(ev.configuration->uuid, c->uuid, sizeof c->uuid) == 0);
}

static void check_encoders(const uint8_t *p, size_t n, unsigned flags) {
    struct rmig_qemu_reader r;
    struct rmig_qemu_event ev;
    uint8_t out[RMIG_QEMU_START_MAX];
    size_t at = 0;
    rmig_qemu_reader_init(&r, flags);
    for (;;) {
        int64_t used = rmig_qemu_reader_feed(&r, p + at, n - at, &ev);
        if (used < 0 || ev.type == RMIG_QEV_NONE)
            return;
        at += (size_t)used;
        if (ev.type == RMIG_QEV_CONFIGURATION)
            check_configuration(ev.configuration, flags);
        int size = encode(&r, &ev, out, sizeof out);
        if (size < 0) // the only one that is read and not written
            REQUIRE(ev.type == RMIG_QEV_COMMAND && ev.command == RMIG_QEMU_COMMAND_POSTCOPY_ADVISE);
        else
            REQUIRE((size_t)size <= at && memcmp(p + at - (size_t)size, out, (size_t)size) == 0);
        if (ev.type == RMIG_QEV_HOOK)
            REQUIRE(rmig_qemu_reader_end_message(&r, &ev) == RMIG_OK);
    }
}

static void check_return(const uint8_t *p, size_t n) {
    struct rmig_qemu_return message = {0, 0};
    uint8_t out[RMIG_QEMU_RETURN_MAX];
    int used = rmig_qemu_decode_return(p, n, &message);
    REQUIRE(used == RMIG_ERR_WIRE || (used >= 0 && (size_t)used <= n && used <= RMIG_QEMU_RETURN_MAX));
    if (used > 0)
        REQUIRE(rmig_qemu_encode_return(out, sizeof out, &message) == used && memcmp(out, p, (size_t)used) == 0);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    if (size < 1)
        return 0;
    unsigned flags = data[0] & 1 ? RMIG_QEMU_MAPPED_RAM : 0;
    struct told one = read_all(data + 1, size - 1, flags, 0), many = read_all(data + 1, size - 1, flags, data[0] | 1u);
    REQUIRE(one.events == many.events && one.state == many.state && one.state_bytes == many.state_bytes);
    REQUIRE(one.error.status == many.error.status && strcmp(one.error.text, many.error.text) == 0);
    check_encoders(data + 1, size - 1, flags);
    check_return(data + 1, size - 1);
    return 0;
}
