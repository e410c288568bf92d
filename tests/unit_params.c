// Status texts, sizes in text, and every parameter: defaults, setting, reading back, refusals.
#define RMIG_IMPLEMENTATION
#include "../rmig.h"

#include <criterion/criterion.h>
#include <stdio.h>
#include <stdlib.h>

#define RANDOM_SEED 0x452821e638d01377u
#include "random.h"

// A number of random magnitude: 0 to 64 bits.
static uint64_t rng_wide(void) {
    uint64_t bits = rng() % 65;
    return bits == 0 ? 0 : rng() >> (64 - bits);
}

static bool mentions(const struct rmig_error *err, const char *word) { return strstr(err->text, word) != NULL; }

// What the parameters are, written down independently of the table in rmig.h.
struct expectation {
    enum rmig_param param;
    const char *name;
    enum rmig_unit unit;
    uint64_t value; // default
    uint64_t other; // valid and not the default
    const char *other_text;
    int (*set)(struct rmig_config *, uint64_t, struct rmig_error *);
    uint64_t (*get)(const struct rmig_config *);
};

#define NS_PER_SECOND 1000000000u
#define TYPED(x) rmig_set_##x, rmig_##x

static const struct expectation params[] = {
    {RMIG_PARAM_CHUNK_SIZE, "chunk-size", RMIG_UNIT_BYTES, RMIG_CHUNK_SIZE, 0x8000000, "128M", TYPED(chunk_size)},
    {RMIG_PARAM_MERGE_MAX, "merge-max", RMIG_UNIT_BYTES, 2 * (uint64_t)RMIG_CHUNK_SIZE, 0x180000, "1536K",
     TYPED(merge_max)},
    {RMIG_PARAM_PIN_ALL, "pin-all", RMIG_UNIT_SWITCH, 0, 1, "on", TYPED(pin_all)},
    {RMIG_PARAM_SIGNAL_EVERY, "signal-every", RMIG_UNIT_COUNT, 64, 7, "7", TYPED(signal_every)},
    {RMIG_PARAM_WRITE_DEPTH, "write-depth", RMIG_UNIT_COUNT, 128, 500, "500", TYPED(write_depth)},
    {RMIG_PARAM_REGISTER_AHEAD, "register-ahead", RMIG_UNIT_BYTES, 0x8000000, 0x40000000, "1G", TYPED(register_ahead)},
    {RMIG_PARAM_ZERO_DETECT, "zero-detect", RMIG_UNIT_SWITCH, 1, 0, "off", TYPED(zero_detect)},
    {RMIG_PARAM_MAX_BANDWIDTH, "max-bandwidth", RMIG_UNIT_BYTES_PER_SECOND, 0, 0x6400000, "100M", TYPED(max_bandwidth)},
    {RMIG_PARAM_CONNECT_TIMEOUT, "connect-timeout", RMIG_UNIT_NS, 10ull * NS_PER_SECOND, 2500000000u, "2500ms",
     TYPED(connect_timeout)},
    {RMIG_PARAM_IO_TIMEOUT, "io-timeout", RMIG_UNIT_NS, 30ull * NS_PER_SECOND, 60ull * NS_PER_SECOND, "60s",
     TYPED(io_timeout)},
    {RMIG_PARAM_PAGE_SIZE, "page-size", RMIG_UNIT_BYTES, 4096, 65536, "64K", TYPED(page_size)},
    {RMIG_PARAM_PEER_CHUNK_SIZE, "peer-chunk-size", RMIG_UNIT_BYTES, 0, 0x200000, "2M", TYPED(peer_chunk_size)},
    {RMIG_PARAM_EXTENSION, "extension", RMIG_UNIT_SWITCH, 1, 0, "off", TYPED(extension)},
    {RMIG_PARAM_HANDOVER_TIMEOUT, "handover-timeout", RMIG_UNIT_NS, 10ull * NS_PER_SECOND, 60ull * NS_PER_SECOND, "60s",
     TYPED(handover_timeout)},
    {RMIG_PARAM_AUTO_TAKE, "auto-take", RMIG_UNIT_SWITCH, 0, 1, "on", TYPED(auto_take)},
};
enum { PARAMS = sizeof params / sizeof params[0] };

static struct rmig_param_info info_of(enum rmig_param param) {
    struct rmig_param_info list[RMIG_PARAM_COUNT];
    cr_assert_eq(rmig_param_list(list, RMIG_PARAM_COUNT), (size_t)RMIG_PARAM_COUNT);
    return list[param];
}

// >> status

Test(status, every_code_has_a_name_and_a_text) {
#define X(code, value, text, hint)                                                                                     \
    cr_expect_eq(RMIG_##code, value);                                                                                  \
    cr_expect_str_eq(rmig_status_name(value), "RMIG_" #code);                                                          \
    cr_expect_str_eq(rmig_status_text(value), text);                                                                   \
    cr_expect_str_eq(rmig_status_hint(value), hint);                                                                   \
    cr_expect(strlen(rmig_status_text(value)) > 1);                                                                    \
    cr_expect_null(strstr(hint, "see the text"), "%s: a hint says what to do, or nothing", #code);
    RMIG_STATUS_LIST(X)
#undef X
}

Test(status, a_number_that_is_no_status_has_texts_too) {
    static const int odd[] = {2, -99, -12345, 2147483647, -2147483647 - 1};
    for (size_t i = 0; i < sizeof odd / sizeof odd[0]; i++) {
        cr_expect_not_null(rmig_status_name(odd[i]));
        cr_expect_not_null(rmig_status_text(odd[i]));
        cr_expect_not_null(rmig_status_hint(odd[i]));
    }
}

Test(status, the_value_says_whether_the_session_is_over) {
#define X(code, value, text, hint) cr_expect_eq(value <= RMIG_SESSION_ERRORS, value <= -100);
    RMIG_STATUS_LIST(X)
#undef X
    cr_expect(RMIG_ERR_WIRE > RMIG_SESSION_ERRORS);
    cr_expect(RMIG_ERR_TIMEOUT <= RMIG_SESSION_ERRORS);
}

Test(status, fail_fills_in_and_returns_the_status) {
    struct rmig_error err;
    memset(&err, 0xa5, sizeof err);
    cr_expect_eq(rmig_fail(&err, RMIG_ERR_FABRIC, 110, "send of %d bytes to %s", 42, "b"), RMIG_ERR_FABRIC);
    cr_expect_eq(err.status, RMIG_ERR_FABRIC);
    cr_expect_eq(err.provider_code, 110);
    cr_expect_str_eq(err.text, "send of 42 bytes to b");
    cr_expect_eq(rmig_fail(NULL, RMIG_ERR_STATE, 0, "%s", "nobody listens"), RMIG_ERR_STATE);
}

Test(status, fail_cuts_a_long_text) {
    struct rmig_error err;
    char text[1000];
    memset(text, 'y', sizeof text);
    text[sizeof text - 1] = 0;
    rmig_fail(&err, RMIG_ERR_SETUP, 0, "%s", text);
    cr_expect_eq(strlen(err.text), sizeof err.text - 1);
}

Test(status, fail_may_quote_the_text_that_it_replaces) {
    struct rmig_error err = {0};
    rmig_fail(&err, RMIG_ERR_FABRIC, 5, "inner");
    rmig_fail(&err, RMIG_ERR_SETUP, err.provider_code, "outer: %s", err.text);
    cr_expect_str_eq(err.text, "outer: inner");
    cr_expect_eq(err.provider_code, 5);
}

// >> sizes in text

Test(size, texts_that_are_sizes) {
    static const struct {
        const char *text;
        uint64_t bytes;
    } row[] = {
        {"0", 0},
        {"1", 1},
        {"4097", 4097},
        {"007", 7},
        {"0T", 0},
        {"12B", 12},
        {"12b", 12},
        {"64M", 64 * RMIG_MIB},
        {"64m", 64 * RMIG_MIB},
        {"3k", 3072},
        {"1G", RMIG_GIB},
        {"2T", 2048 * RMIG_GIB},
        {"1.5G", 1536 * RMIG_MIB},
        {"0.5M", 512 * RMIG_KIB},
        {"0.25K", 256},
        {"1.0", 1},
        {"1.000B", 1},
        {"0.0009765625K", 1},
        {"1.0009765625K", 1025},
        {"16777215T", (uint64_t)16777215 << 40},
        {"18446744073709551615", UINT64_MAX},
        {"18014398509481983K", UINT64_MAX - 1023},
        {"18014398509481983.5K", UINT64_MAX - 511},
        {"17179869183.9990234375G", UINT64_MAX - RMIG_MIB + 1},
    };
    for (size_t i = 0; i < sizeof row / sizeof row[0]; i++) {
        uint64_t bytes = 4711;
        struct rmig_error err = {0};
        cr_expect_eq(rmig_size_parse(row[i].text, &bytes, &err), RMIG_OK, "'%s': %s", row[i].text, err.text);
        cr_expect_eq(bytes, row[i].bytes, "'%s' gave %lu", row[i].text, (unsigned long)bytes);
    }
}

static const char *const bad_size[] = {
    "",     " ",     "-1",    "-0",   "+1",  "abc", "M",      ".",        ".M",    "1X",    "1MB",
    "1MiB", "64 M",  " 64M",  "64M ", "\t1", "1\n", "0x1000", "1e6",      "1E6",   "1..5M", "1.5.5M",
    "1,5M", "1_000", "1.-5M", "inf",  "nan", "1P",  "1KK",    "\xd9\xa1", "1\x80", "1%s",   "%n",
};

Test(size, texts_that_are_no_sizes) {
    for (size_t i = 0; i < sizeof bad_size / sizeof bad_size[0]; i++) {
        uint64_t bytes = 4711;
        struct rmig_error err = {0};
        cr_expect_eq(rmig_size_parse(bad_size[i], &bytes, &err), RMIG_ERR_ARGUMENT, "'%s'", bad_size[i]);
        cr_expect_eq(err.status, RMIG_ERR_ARGUMENT);
        cr_expect(mentions(&err, bad_size[i]), "'%s' is not quoted in '%s'", bad_size[i], err.text);
        cr_expect_eq(bytes, 4711, "'%s' changed the output", bad_size[i]);
        cr_expect_eq(rmig_size_parse(bad_size[i], &bytes, NULL), RMIG_ERR_ARGUMENT);
    }
}

Test(size, sizes_that_do_not_fit_or_are_not_whole) {
    static const char *const bad[] = {
        "18446744073709551616",
        "99999999999999999999",
        "18446744073709551615K",
        "16777216T",
        "18014398509481984K",
        "17179869184G",
        "1.5",
        "0.5B",
        "0.3K",
        "0.1M",
        "0.00001K",
        "1.0000000001T",
        "18446744073709551615.5",
        "0.0000001K",
        "340282366920938463463374607431768211456",
    };
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        uint64_t bytes = 4711;
        struct rmig_error err = {0};
        cr_expect_eq(rmig_size_parse(bad[i], &bytes, &err), RMIG_ERR_ARGUMENT, "'%s' gave %lu", bad[i],
                     (unsigned long)bytes);
        cr_expect(mentions(&err, bad[i]), "'%s' is not quoted in '%s'", bad[i], err.text);
        cr_expect_eq(bytes, 4711);
    }
}

Test(size, null_and_very_long_texts_are_refused) {
    uint64_t bytes = 4711;
    struct rmig_error err = {0};
    cr_expect_eq(rmig_size_parse(NULL, &bytes, &err), RMIG_ERR_ARGUMENT);
    cr_expect_eq(rmig_size_parse("1M", NULL, &err), RMIG_ERR_ARGUMENT);
    static char text[20000];
    memset(text, '7', sizeof text - 1);
    cr_expect_eq(rmig_size_parse(text, &bytes, &err), RMIG_ERR_ARGUMENT);
    cr_expect(memchr(err.text, 0, sizeof err.text) != NULL);
    cr_expect(mentions(&err, "7777777777"));
    cr_expect_eq(bytes, 4711);
}

// Long multiplication in decimal: the exact fraction of x / 2^shift has at most `shift` digits.
static void exact_decimal(uint64_t x, unsigned shift, char *out) {
    uint64_t rest = x & (((uint64_t)1 << shift) - 1);
    out += sprintf(out, "%llu", (unsigned long long)(x >> shift));
    if (rest != 0)
        *out++ = '.';
    while (rest != 0) {
        rest *= 10; // shift <= 40: no overflow
        *out++ = (char)('0' + (rest >> shift));
        rest &= ((uint64_t)1 << shift) - 1;
    }
    *out = 0;
}

Test(size, exact_fractions_against_long_multiplication) {
    static const char suffix[] = "BKMGT";
    for (int i = 0; i < 20000; i++) {
        unsigned which = (unsigned)(rng() % 5);
        uint64_t x = rng_wide(), bytes = 4711;
        if (which > 1) // at most 18 digits after the point
            x &= ~(((uint64_t)1 << (10 * which - 18)) - 1);
        char text[100];
        exact_decimal(x, 10 * which, text);
        bool whole = strchr(text, '.') == NULL;
        size_t n = strlen(text);
        text[n] = suffix[which];
        text[n + 1] = 0;
        struct rmig_error err = {0};
        cr_assert_eq(rmig_size_parse(text, &bytes, &err), RMIG_OK, "'%s': %s", text, err.text);
        cr_assert_eq(bytes, x, "'%s' gave %lu", text, (unsigned long)bytes);
        if (whole)
            continue;
        // The fraction is a multiple of a power of 1/2; a digit more makes it one of 1/5 too, and no longer whole.
        text[n] = '1';
        text[n + 1] = suffix[which];
        text[n + 2] = 0;
        cr_assert_eq(rmig_size_parse(text, &bytes, NULL), RMIG_ERR_ARGUMENT, "'%s'", text);
    }
}

Test(size, fractions_of_any_number_of_digits) {
    uint64_t bytes = 4711;
    cr_expect_eq(rmig_size_parse("1.0000000000000000000000M", &bytes, NULL), RMIG_OK);
    cr_expect_eq(bytes, RMIG_MIB);
    cr_expect_eq(rmig_size_parse("0.0000000000009094947017729282379150390625T", &bytes, NULL), RMIG_OK);
    cr_expect_eq(bytes, 1);
    cr_expect_eq(rmig_size_parse("0.0000000000009094947017729282379150390626T", &bytes, NULL), RMIG_ERR_ARGUMENT);
}

// The second method tries every suffix and keeps the shortest text.
static size_t shortest(uint64_t x) {
    char text[32];
    size_t best = (size_t)snprintf(text, sizeof text, "%llu", (unsigned long long)x);
    for (unsigned shift = 10; shift <= 40; shift += 10) {
        if (x % ((uint64_t)1 << shift) != 0)
            continue;
        size_t n = (size_t)snprintf(text, sizeof text, "%lluX", (unsigned long long)(x >> shift));
        best = n < best ? n : best;
    }
    return best;
}

static void check_round_trip(uint64_t x) {
    char text[32];
    uint64_t back = ~x;
    cr_assert_eq((void *)rmig_size_format(x, text, sizeof text), (void *)text);
    cr_assert_eq(rmig_size_parse(text, &back, NULL), RMIG_OK, "%lu became '%s'", (unsigned long)x, text);
    cr_assert_eq(back, x, "%lu became '%s'", (unsigned long)x, text);
    cr_assert(strlen(text) <= shortest(x), "'%s' is not the shortest for %lu", text, (unsigned long)x);
}

Test(size, format_and_parse_round_trip) {
    for (uint64_t x = 0; x < 10000; x++)
        check_round_trip(x);
    for (unsigned shift = 0; shift < 64; shift++)
        for (uint64_t d = 0; d < 3; d++)
            check_round_trip(((uint64_t)1 << shift) + d - 1);
    for (int i = 0; i < 100000; i++) {
        uint64_t x = rng_wide();
        check_round_trip(x);
        check_round_trip(x << (rng() % 64));
    }
    check_round_trip(UINT64_MAX);
}

Test(size, format_examples) {
    char text[32];
    cr_expect_str_eq(rmig_size_format(64 * RMIG_MIB, text, sizeof text), "64M");
    cr_expect_str_eq(rmig_size_format(1536 * RMIG_KIB, text, sizeof text), "1536K");
    cr_expect_str_eq(rmig_size_format(4097, text, sizeof text), "4097");
    cr_expect_str_eq(rmig_size_format(0, text, sizeof text), "0");
    cr_expect_str_eq(rmig_size_format(UINT64_MAX, text, sizeof text), "18446744073709551615");
}

Test(size, format_never_passes_the_end_of_the_buffer) {
    for (size_t n = 1; n < 24; n++) {
        char *text = (char *)malloc(n); // exact, for the sanitizer
        cr_assert_not_null(text);
        rmig_size_format(UINT64_MAX, text, n);
        cr_expect(memchr(text, 0, n) != NULL);
        free(text);
    }
    char untouched = 'u';
    rmig_size_format(1, &untouched, 0);
    cr_expect_eq(untouched, 'u');
}

// >> parameters: listing and defaults

Test(params, the_list_is_in_order_and_complete) {
    cr_assert_eq((int)PARAMS, (int)RMIG_PARAM_COUNT, "a parameter is missing in the test's table");
    struct rmig_param_info list[RMIG_PARAM_COUNT + 2];
    memset(list, 0xa5, sizeof list);
    cr_assert_eq(rmig_param_list(list, RMIG_PARAM_COUNT + 2), (size_t)RMIG_PARAM_COUNT);
    for (size_t i = 0; i < PARAMS; i++) {
        cr_expect_eq(params[i].param, (enum rmig_param)i);
        cr_expect_eq(list[i].param, (enum rmig_param)i);
        cr_expect_str_eq(list[i].name, params[i].name);
        cr_expect_eq(list[i].unit, params[i].unit, "%s", list[i].name);
        cr_expect(list[i].min <= list[i].max, "%s", list[i].name);
        cr_expect(strlen(list[i].range_text) > 3, "%s", list[i].name);
        cr_expect(strlen(list[i].help) > 10 && strchr(list[i].help, '\n') == NULL, "%s", list[i].name);
    }
    uint8_t *past = (uint8_t *)&list[RMIG_PARAM_COUNT];
    for (size_t i = 0; i < sizeof list[0]; i++)
        cr_assert_eq(past[i], 0xa5, "written past the last parameter");
}

Test(params, the_list_stops_at_the_end_of_the_array) {
    cr_expect_eq(rmig_param_list(NULL, 0), (size_t)RMIG_PARAM_COUNT);
    struct rmig_param_info list[3];
    memset(list, 0xa5, sizeof list);
    cr_expect_eq(rmig_param_list(list, 2), (size_t)RMIG_PARAM_COUNT);
    cr_expect_str_eq(list[1].name, "merge-max");
    for (size_t i = 0; i < sizeof list[0]; i++)
        cr_assert_eq(((uint8_t *)&list[2])[i], 0xa5);
}

Test(params, documented_ranges) {
    struct rmig_param_info i = info_of(RMIG_PARAM_CHUNK_SIZE);
    cr_expect(i.min == RMIG_MIB && i.max == RMIG_GIB && i.power_of_two && !i.zero_allowed);
    cr_expect(strstr(i.range_text, "1M") && strstr(i.range_text, "1G") && strstr(i.range_text, "power of two"));
    i = info_of(RMIG_PARAM_SIGNAL_EVERY);
    cr_expect_eq(i.min, 1);
    cr_expect(info_of(RMIG_PARAM_REGISTER_AHEAD).zero_allowed);
    cr_expect(info_of(RMIG_PARAM_MAX_BANDWIDTH).zero_allowed);
    cr_expect(info_of(RMIG_PARAM_PEER_CHUNK_SIZE).zero_allowed);
}

static void check_default(const struct rmig_config *cfg, const struct expectation *e) {
    char text[64], listed[64];
    cr_expect_eq(rmig_get(cfg, e->param), e->value, "%s is %lu", e->name, (unsigned long)rmig_get(cfg, e->param));
    cr_expect_eq(e->get(cfg), e->value, "%s", e->name);
    cr_assert_eq(rmig_get_param(cfg, e->name, text, sizeof text, NULL), RMIG_OK, "%s", e->name);
    snprintf(listed, sizeof listed, "%s", info_of(e->param).default_text);
    cr_expect_str_eq(text, listed, "%s", e->name);
    struct rmig_config again = {0};
    cr_assert_eq(rmig_set_param(&again, e->name, text, NULL), RMIG_OK, "%s = %s", e->name, text);
    cr_expect_eq(rmig_get(&again, e->param), e->value, "%s = %s", e->name, text);
}

Test(params, zero_initialised_means_defaults) {
    struct rmig_config cfg = {0};
    for (size_t i = 0; i < PARAMS; i++)
        check_default(&cfg, &params[i]);
    cr_expect_eq(rmig_get(&cfg, RMIG_PARAM_COUNT), 0);
    cr_expect_eq(rmig_get(&cfg, (enum rmig_param)12345), 0);
}

Test(params, merge_max_follows_chunk_size_until_it_is_set) {
    struct rmig_config cfg = {0};
    char text[64];
    for (uint64_t c = RMIG_CHUNK_SIZE_MIN; c <= RMIG_CHUNK_SIZE_MAX; c *= 2) {
        cr_assert_eq(rmig_set_chunk_size(&cfg, c, NULL), RMIG_OK);
        cr_expect_eq(rmig_merge_max(&cfg), 2 * c);
        // What is read back must be settable, or saved configurations could not be restored.
        cr_assert_eq(rmig_get_param(&cfg, "merge-max", text, sizeof text, NULL), RMIG_OK);
        struct rmig_config again = {0};
        cr_expect_eq(rmig_set_param(&again, "merge-max", text, NULL), RMIG_OK, "%s", text);
    }
    cr_assert_eq(rmig_set_merge_max(&cfg, 123 * 4096, NULL), RMIG_OK);
    cr_assert_eq(rmig_set_chunk_size(&cfg, RMIG_MIB, NULL), RMIG_OK);
    cr_expect_eq(rmig_merge_max(&cfg), 123 * 4096);
}

// >> parameters: setting

static void check_value(const struct rmig_config *cfg, const struct expectation *e, uint64_t value) {
    char text[64];
    cr_expect_eq(rmig_get(cfg, e->param), value, "%s", e->name);
    cr_expect_eq(e->get(cfg), value, "%s", e->name);
    cr_assert_eq(rmig_get_param(cfg, e->name, text, sizeof text, NULL), RMIG_OK);
    struct rmig_config again = {0};
    rmig_set_write_depth(&again, rmig_write_depth(cfg), NULL); // signal-every is bounded by it
    cr_assert_eq(rmig_set_param(&again, e->name, text, NULL), RMIG_OK, "%s = %s", e->name, text);
    cr_expect_eq(rmig_get(&again, e->param), value, "%s = %s", e->name, text);
}

// Every other parameter keeps its default.
static void check_others(const struct rmig_config *cfg, enum rmig_param changed) {
    for (size_t i = 0; i < PARAMS; i++) {
        bool follows = params[i].param == RMIG_PARAM_MERGE_MAX && changed == RMIG_PARAM_CHUNK_SIZE;
        if (params[i].param != changed && !follows)
            cr_expect_eq(params[i].get(cfg), params[i].value, "%s changed with %s", params[i].name,
                         params[changed].name);
    }
}

Test(params, typed_setters) {
    for (size_t i = 0; i < PARAMS; i++) {
        struct rmig_config cfg = {0};
        struct rmig_error err = {0};
        cr_assert_eq(params[i].set(&cfg, params[i].other, &err), RMIG_OK, "%s: %s", params[i].name, err.text);
        check_value(&cfg, &params[i], params[i].other);
        check_others(&cfg, params[i].param);
        cr_assert_eq(params[i].set(&cfg, params[i].value, NULL), RMIG_OK);
        check_value(&cfg, &params[i], params[i].value);
    }
}

Test(params, by_name_and_text) {
    for (size_t i = 0; i < PARAMS; i++) {
        struct rmig_config cfg = {0};
        struct rmig_error err = {0};
        char text[64];
        cr_assert_eq(rmig_set_param(&cfg, params[i].name, params[i].other_text, &err), RMIG_OK, "%s", err.text);
        check_value(&cfg, &params[i], params[i].other);
        check_others(&cfg, params[i].param);
        cr_assert_eq(rmig_get_param(&cfg, params[i].name, text, sizeof text, &err), RMIG_OK);
        if (params[i].param != RMIG_PARAM_IO_TIMEOUT)
            cr_expect_str_eq(text, params[i].other_text);
    }
}

Test(params, the_ends_of_each_range_are_inside_and_beyond_is_not) {
    for (size_t i = 0; i < PARAMS; i++) {
        const struct expectation *e = &params[i];
        struct rmig_param_info info = info_of(e->param);
        struct rmig_config cfg = {0};
        struct rmig_error err = {0};
        if (e->param == RMIG_PARAM_SIGNAL_EVERY)
            cr_assert_eq(rmig_set_write_depth(&cfg, info_of(RMIG_PARAM_WRITE_DEPTH).max, NULL), RMIG_OK);
        cr_expect_eq(rmig_set(&cfg, e->param, info.max, &err), RMIG_OK, "%s", err.text);
        check_value(&cfg, e, info.max);
        cr_expect_eq(rmig_set(&cfg, e->param, info.max + 1, &err), RMIG_ERR_PARAM, "%s", e->name);
        cr_expect_eq(rmig_set(&cfg, e->param, UINT64_MAX, &err), RMIG_ERR_PARAM, "%s", e->name);
        cr_expect_eq(rmig_get(&cfg, e->param), info.max);
        cr_expect_eq(rmig_set(&cfg, e->param, info.min, &err), RMIG_OK, "%s", err.text);
        check_value(&cfg, e, info.min);
        if (info.min > 0)
            cr_expect_eq(rmig_set(&cfg, e->param, 0, &err), info.zero_allowed ? RMIG_OK : RMIG_ERR_PARAM);
        if (info.min > 1)
            cr_expect_eq(rmig_set(&cfg, e->param, info.min - 1, &err), RMIG_ERR_PARAM, "%s", e->name);
        if (info.power_of_two)
            cr_expect_eq(rmig_set(&cfg, e->param, info.min * 3, &err), RMIG_ERR_PARAM, "%s", e->name);
    }
}

Test(params, times_in_text) {
    static const struct {
        const char *text;
        uint64_t ns;
    } row[] = {
        {"10s", 10ull * NS_PER_SECOND},
        {"500ms", 500000000u},
        {"250000us", 250000000u},
        {"1000000ns", 1000000u},
        {"1ms", 1000000u},
        {"100", 100000000u},
        {"3600s", 3600ull * NS_PER_SECOND},
        {"1234567us", 1234567000u},
        {"999999999ns", 999999999u},
    };
    for (size_t i = 0; i < sizeof row / sizeof row[0]; i++) {
        struct rmig_config cfg = {0};
        struct rmig_error err = {0};
        cr_expect_eq(rmig_set_param(&cfg, "io-timeout", row[i].text, &err), RMIG_OK, "%s", err.text);
        cr_expect_eq(rmig_io_timeout(&cfg), row[i].ns, "%s", row[i].text);
        cr_expect_eq(rmig_set_param(&cfg, "connect-timeout", row[i].text, &err), RMIG_OK, "%s", err.text);
        check_value(&cfg, &params[RMIG_PARAM_CONNECT_TIMEOUT], row[i].ns);
    }
}

Test(params, random_times_round_trip) {
    struct rmig_param_info info = info_of(RMIG_PARAM_IO_TIMEOUT);
    struct rmig_config cfg = {0}, again = {0};
    char text[64];
    for (int i = 0; i < 5000; i++) {
        uint64_t ns = info.min + rng_wide() % (info.max - info.min + 1);
        static const uint64_t unit[] = {1, 1000, 1000000, 1000000000};
        ns -= ns % unit[i % 4];
        if (ns < info.min)
            continue;
        cr_assert_eq(rmig_set_io_timeout(&cfg, ns, NULL), RMIG_OK);
        cr_assert_eq(rmig_get_param(&cfg, "io-timeout", text, sizeof text, NULL), RMIG_OK);
        cr_assert_eq(rmig_set_param(&again, "io-timeout", text, NULL), RMIG_OK, "%s", text);
        cr_assert_eq(rmig_io_timeout(&again), ns, "%s", text);
    }
}

Test(params, random_sizes_round_trip) {
    struct rmig_config cfg = {0}, again = {0};
    char text[64];
    for (int i = 0; i < 5000; i++) {
        uint64_t bytes = 4096 + rng_wide() % (RMIG_GIB * 1000);
        cr_assert_eq(rmig_set_max_bandwidth(&cfg, bytes, NULL), RMIG_OK);
        cr_assert_eq(rmig_get_param(&cfg, "max-bandwidth", text, sizeof text, NULL), RMIG_OK);
        cr_assert_eq(rmig_set_param(&again, "max-bandwidth", text, NULL), RMIG_OK, "%s", text);
        cr_assert_eq(rmig_max_bandwidth(&again), bytes, "%s", text);
    }
}

// >> parameters: refusals

static bool mentions_range(const struct rmig_error *err, enum rmig_param param) {
    struct rmig_param_info info = info_of(param);
    return mentions(err, info.range_text);
}

// Refused by text: the error names parameter, value and range, the old value stays, and err may be NULL.
static void must_refuse(const char *name, const char *text) {
    for (size_t i = 0; i < PARAMS; i++) {
        const struct expectation *e = &params[i];
        if (strcmp(e->name, name) != 0)
            continue;
        struct rmig_config cfg = {0};
        struct rmig_error err = {0};
        cr_assert_eq(e->set(&cfg, e->other, NULL), RMIG_OK);
        struct rmig_config before = cfg;
        cr_expect_eq(rmig_set_param(&cfg, name, text, &err), RMIG_ERR_PARAM, "%s = '%s' was taken", name, text);
        cr_expect_eq(err.status, RMIG_ERR_PARAM);
        cr_expect(mentions(&err, name), "'%s' does not name %s", err.text, name);
        cr_expect(mentions(&err, text), "'%s' does not name the value %s", err.text, text);
        cr_expect(mentions_range(&err, e->param), "'%s' does not name the range of %s", err.text, name);
        cr_expect_eq(rmig_set_param(&cfg, name, text, NULL), RMIG_ERR_PARAM);
        cr_expect_arr_eq(&cfg, &before, sizeof cfg, "%s = '%s' changed the configuration", name, text);
        return;
    }
    cr_assert_fail("no parameter %s in the test's table", name);
}

Test(params, values_that_no_parameter_takes) {
    static const char *const bad[] = {"",
                                      " ",
                                      "-1",
                                      "-5M",
                                      "abc",
                                      "1X",
                                      "1e6",
                                      "0x10",
                                      "64 M",
                                      " 64M",
                                      "64M ",
                                      "10 s",
                                      "1,5",
                                      "1..5",
                                      "nan",
                                      "--",
                                      "%n%s",
                                      "1.5.5",
                                      "+1",
                                      "99999999999999999999",
                                      "184467440737095516160"};
    for (size_t i = 0; i < PARAMS; i++)
        for (size_t k = 0; k < sizeof bad / sizeof bad[0]; k++)
            must_refuse(params[i].name, bad[k]);
}

Test(params, sizes_that_are_no_sizes) {
    for (size_t i = 0; i < PARAMS; i++)
        for (size_t k = 0; params[i].unit == RMIG_UNIT_BYTES && k < sizeof bad_size / sizeof bad_size[0]; k++)
            must_refuse(params[i].name, bad_size[k]);
}

Test(params, bad_chunk_sizes) {
    static const char *const bad[] = {"0",       "1",       "4096",    "1.5G",  "0.5M",
                                      "1048575", "1048577", "3M",      "2G",    "1T",
                                      "1.5",     "0.3M",    "1000000", "1023K", "18446744073709551615"};
    for (size_t k = 0; k < sizeof bad / sizeof bad[0]; k++) {
        must_refuse("chunk-size", bad[k]);
        if (strcmp(bad[k], "0") != 0)
            must_refuse("peer-chunk-size", bad[k]);
    }
    struct rmig_config cfg = {0};
    cr_expect_eq(rmig_set_param(&cfg, "peer-chunk-size", "0", NULL), RMIG_OK);
}

Test(params, bad_counts) {
    static const char *const bad[] = {"0", "1.5", "64K", "64M", "1.0", "1ms", "65537000000", "18446744073709551616"};
    for (size_t k = 0; k < sizeof bad / sizeof bad[0]; k++) {
        must_refuse("signal-every", bad[k]);
        must_refuse("write-depth", bad[k]);
    }
}

Test(params, bad_times) {
    static const char *const bad[] = {"0",
                                      "0s",
                                      "1ns",
                                      "10m",
                                      "10h",
                                      "10S",
                                      "10sec",
                                      "s",
                                      "ms",
                                      "1.5ns",
                                      "999us",
                                      "3601s",
                                      "18446744073709551615s",
                                      "0.0000000001s",
                                      "10 ms"};
    for (size_t k = 0; k < sizeof bad / sizeof bad[0]; k++) {
        must_refuse("io-timeout", bad[k]);
        must_refuse("connect-timeout", bad[k]);
        must_refuse("handover-timeout", bad[k]);
    }
}

Test(params, bad_switches) {
    static const char *const bad[] = {"onn", "o", "of", "offf", "maybe", "2", "on ", "on,off", "10"};
    static const char *const name[] = {"pin-all", "zero-detect", "extension", "auto-take"};
    for (size_t i = 0; i < 4; i++)
        for (size_t k = 0; k < sizeof bad / sizeof bad[0]; k++)
            must_refuse(name[i], bad[k]);
}

Test(params, a_null_text_is_refused) {
    for (size_t i = 0; i < PARAMS; i++) {
        struct rmig_config cfg = {0};
        struct rmig_error err = {0};
        cr_expect_eq(rmig_set_param(&cfg, params[i].name, NULL, &err), RMIG_ERR_PARAM);
        cr_expect(mentions(&err, params[i].name) && mentions_range(&err, params[i].param), "'%s'", err.text);
        cr_expect_eq(rmig_set_param(&cfg, params[i].name, NULL, NULL), RMIG_ERR_PARAM);
        check_default(&cfg, &params[i]);
    }
}

Test(params, unknown_names_are_refused) {
    static const char *const bad[] = {
        "",     "chunk",  "chunk-siz", "chunk-sizes", "chunk_size", " chunk-size", "chunk-size ", "merge-max=",
        "%s%n", "pin-al", "x"};
    for (size_t k = 0; k < sizeof bad / sizeof bad[0]; k++) {
        struct rmig_config cfg = {0}, zero = {0};
        struct rmig_error err = {0};
        char text[64] = "unchanged";
        cr_expect_eq(rmig_set_param(&cfg, bad[k], "64M", &err), RMIG_ERR_PARAM, "'%s'", bad[k]);
        cr_expect(mentions(&err, bad[k]), "'%s' does not name '%s'", err.text, bad[k]);
        for (size_t i = 0; i < PARAMS; i++)
            cr_expect(mentions(&err, params[i].name), "'%s' does not offer %s", err.text, params[i].name);
        cr_expect_eq(rmig_set_param(&cfg, bad[k], "64M", NULL), RMIG_ERR_PARAM);
        cr_expect_arr_eq(&cfg, &zero, sizeof cfg);
        cr_expect_eq(rmig_get_param(&cfg, bad[k], text, sizeof text, &err), RMIG_ERR_PARAM);
        cr_expect_str_eq(text, "unchanged");
    }
    struct rmig_config cfg = {0};
    char text[64];
    cr_expect_eq(rmig_set_param(&cfg, NULL, "64M", NULL), RMIG_ERR_PARAM);
    cr_expect_eq(rmig_get_param(&cfg, NULL, text, sizeof text, NULL), RMIG_ERR_PARAM);
}

Test(params, typed_values_out_of_range) {
    for (size_t i = 0; i < PARAMS; i++) {
        const struct expectation *e = &params[i];
        struct rmig_config cfg = {0};
        struct rmig_error err = {0};
        char value[32];
        uint64_t bad = info_of(e->param).max + 1;
        snprintf(value, sizeof value, "%llu", (unsigned long long)bad);
        cr_assert_eq(e->set(&cfg, e->other, NULL), RMIG_OK);
        cr_expect_eq(e->set(&cfg, bad, &err), RMIG_ERR_PARAM, "%s", e->name);
        cr_expect(mentions(&err, e->name) && mentions(&err, value) && mentions_range(&err, e->param), "'%s'", err.text);
        cr_expect_eq(e->set(&cfg, bad, NULL), RMIG_ERR_PARAM);
        cr_expect_eq(e->get(&cfg), e->other);
    }
}

Test(params, a_number_that_is_no_parameter_is_refused) {
    static const int odd[] = {RMIG_PARAM_COUNT, 31, 32, 1000000, -1};
    for (size_t k = 0; k < sizeof odd / sizeof odd[0]; k++) {
        struct rmig_config cfg = {0}, zero = {0};
        struct rmig_error err = {0};
        cr_expect_eq(rmig_set(&cfg, (enum rmig_param)odd[k], 1, &err), RMIG_ERR_PARAM, "%d", odd[k]);
        cr_expect(strlen(err.text) > 10);
        cr_expect_arr_eq(&cfg, &zero, sizeof cfg);
        cr_expect_eq(rmig_get(&cfg, (enum rmig_param)odd[k]), 0);
    }
}

Test(params, signal_every_never_exceeds_write_depth) {
    struct rmig_config cfg = {0};
    struct rmig_error err = {0};
    cr_assert_eq(rmig_set_write_depth(&cfg, 16, &err), RMIG_OK, "%s", err.text);
    cr_expect(rmig_signal_every(&cfg) <= 16, "the default must fit a small queue");
    cr_expect_eq(rmig_set_signal_every(&cfg, 17, &err), RMIG_ERR_PARAM);
    cr_expect(mentions(&err, "signal-every") && mentions(&err, "17") && mentions(&err, "16"), "'%s'", err.text);
    cr_expect(mentions(&err, "write-depth"), "'%s'", err.text);
    cr_expect_eq(rmig_set_param(&cfg, "signal-every", "17", NULL), RMIG_ERR_PARAM);
    cr_expect_eq(rmig_set_signal_every(&cfg, 16, &err), RMIG_OK);
    cr_expect_eq(rmig_set_write_depth(&cfg, 15, &err), RMIG_ERR_PARAM);
    cr_expect(mentions(&err, "write-depth") && mentions(&err, "15") && mentions(&err, "16"), "'%s'", err.text);
    cr_expect_eq(rmig_write_depth(&cfg), 16);
    cr_expect_eq(rmig_signal_every(&cfg), 16);
}

Test(params, merge_max_is_never_below_page_size) {
    struct rmig_config cfg = {0};
    struct rmig_error err = {0};
    must_refuse("merge-max", "4095");
    cr_assert_eq(rmig_set_page_size(&cfg, 65536, &err), RMIG_OK, "%s", err.text);
    cr_expect_eq(rmig_set_merge_max(&cfg, 32768, &err), RMIG_ERR_PARAM);
    cr_expect(mentions(&err, "merge-max") && mentions(&err, "32768") && mentions(&err, "65536"), "'%s'", err.text);
    cr_expect_eq(rmig_merge_max(&cfg), 2 * (uint64_t)RMIG_CHUNK_SIZE);
    cr_expect_eq(rmig_set_merge_max(&cfg, 65536, &err), RMIG_OK);
    cr_expect_eq(rmig_set_page_size(&cfg, 131072, &err), RMIG_ERR_PARAM);
    cr_expect(mentions(&err, "page-size") && mentions(&err, "131072") && mentions(&err, "65536"), "'%s'", err.text);
    cr_expect_eq(rmig_page_size(&cfg), 65536);
}

Test(params, very_long_names_and_values_are_cut_in_the_error) {
    static char text[20000];
    memset(text, '3', sizeof text - 1);
    for (size_t i = 0; i < PARAMS; i++) {
        struct rmig_config cfg = {0};
        struct rmig_error err = {0};
        cr_expect_eq(rmig_set_param(&cfg, params[i].name, text, &err), RMIG_ERR_PARAM);
        cr_expect(mentions(&err, "33333333") && mentions_range(&err, params[i].param), "'%s'", err.text);
        cr_expect_eq(rmig_set_param(&cfg, text, "1", &err), RMIG_ERR_PARAM);
        cr_expect(memchr(err.text, 0, sizeof err.text) != NULL);
    }
}

Test(params, reading_back_into_a_small_buffer_is_an_error) {
    struct rmig_config cfg = {0};
    struct rmig_error err = {0};
    char *buf = (char *)malloc(5); // "1536K" needs 6
    cr_assert_not_null(buf);
    cr_assert_eq(rmig_set_param(&cfg, "merge-max", "1536K", NULL), RMIG_OK);
    memset(buf, 'u', 5);
    for (size_t n = 0; n <= 5; n++) {
        cr_expect(rmig_get_param(&cfg, "merge-max", buf, n, &err) < 0, "%zu bytes", n);
        cr_expect(mentions(&err, "merge-max"), "'%s'", err.text);
        cr_expect(memcmp(buf, "uuuuu", 5) == 0, "a refused call wrote");
    }
    free(buf);
    cr_expect(rmig_get_param(&cfg, "merge-max", NULL, 100, &err) < 0);
    char six[6];
    cr_expect_eq(rmig_get_param(&cfg, "merge-max", six, sizeof six, &err), RMIG_OK);
    cr_expect_str_eq(six, "1536K");
}

Test(params, a_null_configuration) {
    struct rmig_error err = {0};
    cr_expect(rmig_set(NULL, RMIG_PARAM_PIN_ALL, 1, &err) < 0);
    cr_expect(mentions(&err, "cfg"), "'%s'", err.text);
    cr_expect(rmig_set_param(NULL, "pin-all", "on", &err) < 0);
    cr_expect_eq(rmig_get(NULL, RMIG_PARAM_CHUNK_SIZE), RMIG_CHUNK_SIZE);
}

Test(params, trace_hook_survives_setting) {
    struct rmig_config cfg = {0};
    cfg.trace_user = &cfg;
    rmig_set_chunk_size(&cfg, 2 * RMIG_MIB, NULL);
    rmig_set_param(&cfg, "chunk-size", "bad", NULL);
    cr_expect_eq(cfg.trace_user, (void *)&cfg);
}

// >> addresses

Test(address, texts_that_are_addresses) {
    static const struct {
        const char *text, *host, *port;
    } row[] = {
        {"10.0.0.2:4444", "10.0.0.2", "4444"},
        {"host.example:0", "host.example", "0"},
        {"[fe80::1%eth0]:65535", "fe80::1%eth0", "65535"},
        {"[::1]:1", "::1", "1"},
        {"host", "host", ""},
        {":4444", "", "4444"},
        {"[::]:4444", "::", "4444"},
        {"[fe8::1]:1", "fe8::1", "1"},
        {"[fec0::1]:1", "fec0::1", "1"},
        {"fe80:1", "fe80", "1"},
    };
    for (size_t i = 0; i < sizeof row / sizeof row[0]; i++) {
        char host[64], port[16];
        struct rmig_error err = {0};
        cr_expect_eq(rmig_split_address(row[i].text, host, sizeof host, port, sizeof port, &err), RMIG_OK, "%s",
                     err.text);
        cr_expect_str_eq(host, row[i].host);
        cr_expect_str_eq(port, row[i].port);
    }
}

Test(address, texts_that_are_no_addresses) {
    static const char *const bad[] = {
        "",          "host:65536", "host:-1",  "host:x",      "host: 1",       "host:1 ",
        "host:1x",   "[::1",       "[::1]x:1", "::1",         "a:b:1",         "host:99999999999999999999",
        "[::1]4444", "host:0x10",  "host:+1",  "[fe80::1]:1", "[FEBF:2::1]:1", "[fe80::1]"};
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        char host[64], port[16];
        struct rmig_error err = {0};
        cr_expect_eq(rmig_split_address(bad[i], host, sizeof host, port, sizeof port, &err), RMIG_ERR_ARGUMENT, "'%s'",
                     bad[i]);
        cr_expect(mentions(&err, bad[i]), "'%s'", err.text);
        cr_expect_eq(rmig_split_address(bad[i], host, sizeof host, port, sizeof port, NULL), RMIG_ERR_ARGUMENT);
    }
    char host[64], port[16];
    cr_expect_eq(rmig_split_address(NULL, host, sizeof host, port, sizeof port, NULL), RMIG_ERR_ARGUMENT);
}

Test(address, parts_that_do_not_fit_are_refused) {
    struct rmig_error err = {0};
    for (size_t h = 2; h < 12; h++)
        for (size_t p = 2; p < 8; p++) {
            char *host = (char *)malloc(h), *port = (char *)malloc(p); // exact, for the sanitizer
            cr_assert(host != NULL && port != NULL);
            int r = rmig_split_address("12345678:4444", host, h, port, p, &err);
            cr_expect_eq(r, h > 8 && p > 4 ? RMIG_OK : RMIG_ERR_ARGUMENT, "%zu %zu", h, p);
            free(host);
            free(port);
        }
}
