// The table of RAM blocks, against a list that is searched from one end to the other.
#include <stdlib.h>

#ifndef RMIG_MALLOC // unless the suite is built with another allocator
#define CAN_FAIL 1
static long fail_at = -1; // the allocation that fails, counted down from here; -1: none

static void *tested_realloc(void *p, size_t n) {
    if (fail_at >= 0 && fail_at-- == 0)
        return NULL;
    return realloc(p, n);
}

#define RMIG_MALLOC(n) tested_realloc(NULL, n)
#define RMIG_REALLOC(p, n) tested_realloc(p, n)
#define RMIG_FREE(p) free(p)
#endif

// What the table does with many blocks is counted, not timed.
#include <stdint.h>
#include <string.h>
static struct {
    uint64_t bytes_moved, names_compared;
} work;

static inline void *counted_memmove(void *to, const void *from, size_t n) {
    work.bytes_moved += n;
    return memmove(to, from, n);
}

static inline int counted_strcmp(const char *a, const char *b) {
    work.names_compared++;
    return strcmp(a, b);
}

#define memmove counted_memmove
#define strcmp counted_strcmp
#define RMIG_IMPLEMENTATION
#include "../rmig.h"
#undef memmove
#undef strcmp

#include <criterion/criterion.h>
#include <stdio.h>

#define RANDOM_SEED 0x243f6a8885a308d3u
#include "random.h"

// Host addresses are only noted by the table, never followed: any page-aligned number will do.
static void *host_at(uint64_t n) { return (void *)(uintptr_t)(0x10000000u + n * 0x1000u); }

static struct rmig_block_desc desc_of(const char *name, uint64_t offset, uint64_t length) {
    struct rmig_block_desc d = {0};
    d.name = name;
    d.host = host_at(offset / 4096 % 1000000);
    d.length = length;
    d.guest_offset = offset;
    return d;
}

static int add(struct rmig_blocks *t, const char *name, uint64_t offset, uint64_t length, uint32_t *index,
               struct rmig_error *err) {
    struct rmig_block_desc d = desc_of(name, offset, length);
    return rmig_blocks_add(t, &d, index, err);
}

static void must_add(struct rmig_blocks *t, const char *name, uint64_t offset, uint64_t length) {
    struct rmig_error err = {0};
    uint32_t index = UINT32_MAX, want = t->count;
    cr_assert_eq(add(t, name, offset, length, &index, &err), RMIG_OK, "%s: %s", name, err.text);
    cr_assert_eq(index, want);
}

static bool mentions(const struct rmig_error *err, const char *word) { return strstr(err->text, word) != NULL; }

// A refused add: status, words in the text, and the table as it was, both in contents and in what searches find.
static void must_refuse(struct rmig_blocks *t, const struct rmig_block_desc *d, const char *word1, const char *word2) {
    struct rmig_error err = {0};
    uint32_t index = 4711, count = t->count;
    cr_expect_eq(rmig_blocks_add(t, d, &index, &err), RMIG_ERR_ARGUMENT, "wanted a refusal that says '%s'", word1);
    cr_expect_eq(err.status, RMIG_ERR_ARGUMENT);
    cr_expect(mentions(&err, word1), "'%s' does not name '%s'", err.text, word1);
    cr_expect(mentions(&err, word2), "'%s' does not name '%s'", err.text, word2);
    cr_expect_eq(index, 4711, "index changed by a refused add");
    cr_expect_eq(t->count, count, "count changed by a refused add");
    cr_expect_eq(rmig_blocks_add(t, d, &index, NULL), RMIG_ERR_ARGUMENT, "with err NULL");
    cr_expect_eq(t->count, count);
}

Test(blocks, index_is_the_order_of_addition) {
    struct rmig_blocks t = {0};
    must_add(&t, "c", 0x300000, 0x100000);
    must_add(&t, "a", 0x100000, 0x100000);
    must_add(&t, "b", 0x200000, 0x100000);
    static const char *const want[] = {"c", "a", "b"};
    for (uint32_t i = 0; i < 3; i++) {
        uint32_t index = UINT32_MAX;
        cr_expect_str_eq(t.block[i].name, want[i]);
        cr_expect_eq(rmig_blocks_by_name(&t, want[i], &index), RMIG_OK);
        cr_expect_eq(index, i);
    }
    rmig_blocks_free(&t);
}

Test(blocks, init_and_zero_initialised_are_the_same_and_free_may_be_repeated) {
    struct rmig_blocks t;
    memset(&t, 0xa5, sizeof t);
    rmig_blocks_init(&t);
    must_add(&t, "ram", 0, 4096);
    rmig_blocks_free(&t);
    rmig_blocks_free(&t);
    must_add(&t, "ram", 0, 4096);
    cr_expect_eq(t.count, 1);
    rmig_blocks_free(&t);
}

Test(blocks, every_field_is_kept_and_the_name_is_copied) {
    struct rmig_blocks t = {0};
    char name[] = "pc.ram";
    struct rmig_block_desc d = desc_of(name, 0x40000000, 0x7000);
    d.backing = RMIG_BACKING_SHARED_FD;
    d.fd = 7;
    d.fd_offset = 0x3000;
    uint32_t index;
    cr_assert_eq(rmig_blocks_add(&t, &d, &index, NULL), RMIG_OK);
    memset(name, 'x', sizeof name - 1);
    cr_expect_str_eq(t.block[0].name, "pc.ram");
    cr_expect_eq((void *)t.block[0].host, d.host);
    cr_expect_eq(t.block[0].length, 0x7000);
    cr_expect_eq(t.block[0].guest_offset, 0x40000000);
    cr_expect_eq(t.block[0].backing, RMIG_BACKING_SHARED_FD);
    cr_expect_eq(t.block[0].fd, 7);
    cr_expect_eq(t.block[0].fd_offset, 0x3000);
    rmig_blocks_free(&t);
}

Test(blocks, nothing_is_found_in_an_empty_table) {
    struct rmig_blocks t = {0};
    uint32_t index = 99;
    cr_expect_eq(rmig_blocks_by_offset(&t, 0, &index), RMIG_ERR_ARGUMENT);
    cr_expect_eq(rmig_blocks_by_offset(&t, UINT64_MAX, &index), RMIG_ERR_ARGUMENT);
    cr_expect_eq(rmig_blocks_by_name(&t, "", &index), RMIG_ERR_ARGUMENT);
    cr_expect_eq(rmig_blocks_by_name(&t, "ram", &index), RMIG_ERR_ARGUMENT);
    cr_expect_eq(index, 99, "output changed although nothing was found");
    rmig_blocks_free(&t);
}

Test(blocks, names_of_every_length_up_to_255) {
    struct rmig_blocks t = {0};
    char name[RMIG_NAME_MAX + 2];
    uint32_t index;
    for (size_t n = 1; n <= RMIG_NAME_MAX; n++) {
        memset(name, 'n', n);
        name[n] = 0;
        must_add(&t, name, n * 4096, 4096);
    }
    for (size_t n = 1; n <= RMIG_NAME_MAX; n++) {
        memset(name, 'n', n);
        name[n] = 0;
        cr_assert_eq(rmig_blocks_by_name(&t, name, &index), RMIG_OK);
        cr_assert_eq(index, n - 1);
    }
    memset(name, 'n', RMIG_NAME_MAX + 1);
    name[RMIG_NAME_MAX + 1] = 0;
    struct rmig_block_desc d = desc_of(name, 0x10000000, 4096);
    must_refuse(&t, &d, "nnnn", "255");
    cr_expect_eq(rmig_blocks_by_name(&t, name, &index), RMIG_ERR_ARGUMENT);
    rmig_blocks_free(&t);
}

Test(blocks, bad_names_are_refused) {
    struct rmig_blocks t = {0};
    struct rmig_block_desc d = desc_of("", 0, 4096);
    must_refuse(&t, &d, "name", "");
    d.name = NULL;
    must_refuse(&t, &d, "name", "");
    rmig_blocks_free(&t);
}

Test(blocks, a_name_with_bytes_that_are_no_text_works) {
    struct rmig_blocks t = {0};
    uint32_t index = 9;
    must_add(&t, "\x01\xff\x80 %s%n", 0, 4096);
    must_add(&t, "\x01\xff\x80 %s%", 4096, 4096);
    cr_expect_eq(rmig_blocks_by_name(&t, "\x01\xff\x80 %s%n", &index), RMIG_OK);
    cr_expect_eq(index, 0);
    struct rmig_block_desc d = desc_of("\x01\xff\x80 %s%n", 0x100000, 4096);
    must_refuse(&t, &d, "%s%n", ""); // the name must not act as a format
    rmig_blocks_free(&t);
}

Test(blocks, null_arguments_are_refused) {
    struct rmig_blocks t = {0};
    uint32_t index = 9;
    const char *volatile none = NULL; // so that the compiler does not see the NULL and warn in the header
    struct rmig_error err = {0};
    cr_expect_eq(rmig_blocks_add(&t, NULL, &index, &err), RMIG_ERR_ARGUMENT);
    cr_expect(mentions(&err, "NULL"), "'%s'", err.text);
    cr_expect_eq(rmig_blocks_by_name(&t, none, &index), RMIG_ERR_ARGUMENT);
    must_add(&t, "ram", 0, 4096);
    cr_expect_eq(rmig_blocks_by_name(&t, none, &index), RMIG_ERR_ARGUMENT);
    cr_expect_eq(index, 9);
    struct rmig_block_desc d = desc_of("no index wanted", 4096, 4096);
    cr_expect_eq(rmig_blocks_add(&t, &d, NULL, NULL), RMIG_OK);
    rmig_blocks_free(&t);
}

Test(blocks, no_table_is_a_bad_argument_and_no_crash) {
    struct rmig_block_desc d = desc_of("ram", 0, 4096);
    struct rmig_error err = {0};
    uint32_t index = 9;
    rmig_blocks_init(NULL);
    rmig_blocks_free(NULL);
    cr_expect_eq(rmig_blocks_add(NULL, &d, &index, &err), RMIG_ERR_ARGUMENT);
    cr_expect(mentions(&err, "table is NULL"), "'%s'", err.text);
    cr_expect_eq(rmig_blocks_by_name(NULL, "ram", &index), RMIG_ERR_ARGUMENT);
    cr_expect_eq(rmig_blocks_by_offset(NULL, 0, &index), RMIG_ERR_ARGUMENT);
    cr_expect_eq(index, 9);
    struct rmig_blocks t = {0};
    must_add(&t, "ram", 0, 4096);
    cr_expect_eq(rmig_blocks_by_name(&t, "ram", NULL), RMIG_OK);
    cr_expect_eq(rmig_blocks_by_offset(&t, 17, NULL), RMIG_OK);
    rmig_blocks_free(&t);
}

Test(blocks, an_unknown_backing_is_refused) {
    struct rmig_blocks t = {0};
    struct rmig_block_desc d = desc_of("odd", 0, 4096);
    d.backing = (enum rmig_backing)77;
    must_refuse(&t, &d, "odd", "77");
    rmig_blocks_free(&t);
}

Test(blocks, a_null_host_is_refused) {
    struct rmig_blocks t = {0};
    struct rmig_block_desc d = desc_of("hostless", 0, 4096);
    d.host = NULL;
    must_refuse(&t, &d, "hostless", "host");
    rmig_blocks_free(&t);
}

Test(blocks, length_zero_is_refused) {
    struct rmig_blocks t = {0};
    struct rmig_block_desc d = desc_of("nothing", 0, 0);
    must_refuse(&t, &d, "nothing", "length");
    rmig_blocks_free(&t);
}

Test(blocks, ranges_that_wrap_around_are_refused) {
    struct rmig_blocks t = {0};
    struct rmig_block_desc d = desc_of("guestwrap", UINT64_MAX - 0xfff, 0x2000);
    must_refuse(&t, &d, "guestwrap", "");
    d = desc_of("guestwrap", 2, UINT64_MAX);
    d.host = (void *)1; // whatever the host says, the guest range wraps
    must_refuse(&t, &d, "guestwrap", "");
    d = desc_of("hostwrap", 0, 0x2000);
    d.host = (void *)(UINTPTR_MAX - 0xfff);
    must_refuse(&t, &d, "hostwrap", "");
    rmig_blocks_free(&t);
}

Test(blocks, a_duplicate_name_is_refused_naming_both) {
    struct rmig_blocks t = {0};
    must_add(&t, "vga.vram", 0x100000, 0x1000);
    must_add(&t, "pc.bios", 0x200000, 0x1000);
    struct rmig_block_desc d = desc_of("vga.vram", 0x900000, 0x1000);
    must_refuse(&t, &d, "vga.vram", "");
    uint32_t index = 9;
    cr_expect_eq(rmig_blocks_by_offset(&t, 0x900000, &index), RMIG_ERR_ARGUMENT);
    cr_expect_eq(rmig_blocks_by_name(&t, "vga.vram", &index), RMIG_OK);
    cr_expect_eq(index, 0);
    rmig_blocks_free(&t);
}

Test(blocks, every_kind_of_overlap_is_refused_naming_both) {
    static const struct {
        uint64_t offset, length;
    } bad[] = {
        {0x10000, 0x4000}, // the same
        {0x11000, 0x1000}, // inside
        {0xf000, 0x6000}, // round it
        {0xf000, 0x1001}, // its first byte
        {0x13fff, 0x1000}, // its last byte
        {0x10000, 1},      {0x13fff, 1}, {0, 0x10001}, {0, UINT64_MAX / 2},
    };
    struct rmig_blocks t = {0};
    must_add(&t, "before", 0x2000000000000000u * 4, 0x1000);
    must_add(&t, "victim", 0x10000, 0x4000);
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        struct rmig_block_desc d = desc_of("intruder", bad[i].offset, bad[i].length);
        must_refuse(&t, &d, "intruder", "victim");
        uint32_t index = 9;
        cr_expect_eq(rmig_blocks_by_name(&t, "intruder", &index), RMIG_ERR_ARGUMENT);
        cr_expect_eq(rmig_blocks_by_offset(&t, 0x10000, &index), RMIG_OK);
        cr_expect_eq(index, 1);
    }
    must_add(&t, "left neighbour", 0xf000, 0x1000);
    must_add(&t, "right neighbour", 0x14000, 0x1000);
    rmig_blocks_free(&t);
}

Test(blocks, offsets_in_holes_belong_to_no_block) {
    struct rmig_blocks t = {0};
    must_add(&t, "low", 0x1000, 0x1000);
    must_add(&t, "high", 0x100000000u, 0x3000);
    static const struct {
        uint64_t offset;
        int index; // -1: a hole
    } row[] = {{0, -1},           {0xfff, -1},       {0x1000, 0},       {0x1fff, 0},        {0x2000, -1},
               {0xffffffffu, -1}, {0x100000000u, 1}, {0x100002fffu, 1}, {0x100003000u, -1}, {UINT64_MAX, -1},
               {0x1800, 0}};
    for (size_t i = 0; i < sizeof row / sizeof row[0]; i++) {
        uint32_t index = 4711;
        int r = rmig_blocks_by_offset(&t, row[i].offset, &index);
        cr_expect_eq(r, row[i].index < 0 ? RMIG_ERR_ARGUMENT : RMIG_OK, "offset %#lx", (unsigned long)row[i].offset);
        cr_expect_eq(index, row[i].index < 0 ? 4711u : (uint32_t)row[i].index);
    }
    rmig_blocks_free(&t);
}

Test(blocks, a_block_at_the_top_of_the_address_space) {
    struct rmig_blocks t = {0};
    uint32_t index = 9;
    must_add(&t, "top", UINT64_MAX - 0x1fff, 0x1000);
    cr_expect_eq(rmig_blocks_by_offset(&t, UINT64_MAX - 0x1000, &index), RMIG_OK);
    cr_expect_eq(rmig_blocks_by_offset(&t, UINT64_MAX, &index), RMIG_ERR_ARGUMENT);
    rmig_blocks_free(&t);
}

// >> the second method

struct plain {
    uint64_t offset, length;
    char name[24];
};

static int find_offset(const struct plain *list, uint32_t n, uint64_t offset) {
    for (uint32_t i = 0; i < n; i++)
        if (offset >= list[i].offset && offset - list[i].offset < list[i].length)
            return (int)i;
    return -1;
}

static int find_name(const struct plain *list, uint32_t n, const char *name) {
    for (uint32_t i = 0; i < n; i++)
        if (strcmp(list[i].name, name) == 0)
            return (int)i;
    return -1;
}

static bool collides(const struct plain *list, uint32_t n, const struct plain *p) {
    for (uint32_t i = 0; i < n; i++)
        if (strcmp(list[i].name, p->name) == 0 ||
            (p->offset < list[i].offset + list[i].length && list[i].offset < p->offset + p->length))
            return true;
    return false;
}

static void check_search(struct rmig_blocks *t, const struct plain *list, uint32_t n, uint64_t space) {
    uint32_t index = 4711;
    uint64_t offset = below(space);
    if (n > 0 && below(2) == 0) { // round a border
        const struct plain *p = &list[below(n)];
        offset = p->offset + (below(2) == 0 ? 0 : p->length) + below(3) - 1;
    }
    int want = find_offset(list, n, offset);
    int r = rmig_blocks_by_offset(t, offset, &index);
    cr_assert_eq(r == RMIG_OK ? (int)index : -1, want, "offset %#lx", (unsigned long)offset);
    char name[24];
    snprintf(name, sizeof name, "b%lu", (unsigned long)below(400));
    want = find_name(list, n, name);
    r = rmig_blocks_by_name(t, name, &index);
    cr_assert_eq(r == RMIG_OK ? (int)index : -1, want, "name %s", name);
}

Test(blocks, random_adds_and_searches_against_a_linear_list, .timeout = 600) {
    for (int round = 0; round < 60; round++) {
        struct rmig_blocks t = {0};
        struct plain list[200];
        uint32_t n = 0;
        const uint64_t space = 1u << 20;
        while (n < 200 && below(1500) != 0) {
            struct plain p;
            p.offset = below(space);
            p.length = 1 + below(8192);
            snprintf(p.name, sizeof p.name, "b%lu", (unsigned long)below(400));
            uint32_t index = 4711;
            bool bad = collides(list, n, &p);
            int r = add(&t, p.name, p.offset, p.length, &index, NULL);
            cr_assert_eq(r, bad ? RMIG_ERR_ARGUMENT : RMIG_OK, "%s at %#lx+%#lx", p.name, (unsigned long)p.offset,
                         (unsigned long)p.length);
            cr_assert_eq(index, bad ? 4711 : n);
            if (!bad)
                list[n++] = p;
            cr_assert_eq(t.count, n);
            for (uint64_t i = below(6); i > 0; i--)
                check_search(&t, list, n, space);
        }
        for (int i = 0; i < 2000; i++)
            check_search(&t, list, n, space);
        rmig_blocks_free(&t);
    }
}

Test(blocks, the_memory_of_the_last_hit_never_misleads) {
    struct rmig_blocks t = {0};
    uint32_t index = 9;
    must_add(&t, "b", 0x10000, 0x1000);
    cr_assert_eq(rmig_blocks_by_offset(&t, 0x10000, &index), RMIG_OK);
    must_add(&t, "a", 0x1000, 0x1000); // now before it in the order by offset
    must_add(&t, "c", 0x20000, 0x1000);
    static const uint64_t offset[] = {0x10fff, 0x1000, 0x11000, 0x20000, 0xfff, 0x1fff, 0x10000};
    static const int want[] = {0, 1, -1, 2, -1, 1, 0};
    for (size_t i = 0; i < 7 * 7; i++) { // each after each
        for (int k = 0; k < 2; k++) {
            size_t which = k == 0 ? i / 7 : i % 7;
            int r = rmig_blocks_by_offset(&t, offset[which], &index);
            cr_assert_eq(r == RMIG_OK ? (int)index : -1, want[which]);
        }
    }
    rmig_blocks_free(&t);
    rmig_blocks_init(&t);
    must_add(&t, "new", 0x500000, 0x1000); // the old memory must be gone
    cr_expect_eq(rmig_blocks_by_offset(&t, 0x10000, &index), RMIG_ERR_ARGUMENT);
    rmig_blocks_free(&t);
}

#ifdef CAN_FAIL
// Each allocation of an addition fails in turn: the addition is refused, the table is as before, and the next one
// works.
Test(blocks, out_of_memory_refuses_an_addition_and_changes_nothing) {
    struct rmig_blocks t = {0};
    char name[24];
    for (uint32_t i = 0; i < 200; i++) {
        struct rmig_error err = {0};
        uint32_t index = 4711;
        snprintf(name, sizeof name, "oom%u", i);
        for (long k = 0; k < 100; k++) {
            fail_at = k;
            int r = add(&t, name, (uint64_t)i * 4096, 4096, &index, &err);
            bool failed = fail_at < 0;
            fail_at = -1;
            if (!failed) {
                cr_assert_eq(r, RMIG_OK);
                cr_assert_eq(index, i);
                break;
            }
            cr_assert_eq(r, RMIG_ERR_NO_MEMORY);
            cr_assert_eq(t.count, i);
            cr_assert(mentions(&err, name), "'%s'", err.text);
            cr_assert_eq(rmig_blocks_by_name(&t, name, &index), RMIG_ERR_ARGUMENT);
            cr_assert_eq(rmig_blocks_by_offset(&t, (uint64_t)i * 4096, &index), RMIG_ERR_ARGUMENT);
            cr_assert_eq(index, 4711);
        }
        cr_assert_eq(t.count, i + 1);
    }
    for (uint32_t i = 0; i < 200; i++) {
        uint32_t index = 4711;
        cr_assert_eq(rmig_blocks_by_offset(&t, (uint64_t)i * 4096, &index), RMIG_OK);
        cr_assert_eq(index, i);
    }
    rmig_blocks_free(&t);
}
#endif

// >> many blocks

enum { MANY = 100000 };

static void shuffle(uint32_t *order, uint32_t n) {
    for (uint32_t i = n; i > 1; i--) {
        uint32_t j = (uint32_t)below(i), swap = order[j];
        order[j] = order[i - 1];
        order[i - 1] = swap;
    }
}

// Block k has the name mK and begins at k * 0x3000, 0x2000 long: between two of them is a hole of a page.
static void many_blocks(int how) {
    struct rmig_blocks t = {0};
    uint32_t *order = (uint32_t *)malloc(MANY * sizeof(uint32_t));
    cr_assert_not_null(order);
    for (uint32_t i = 0; i < MANY; i++)
        order[i] = how == 1 ? MANY - 1 - i : i;
    if (how == 2)
        shuffle(order, MANY);
    char name[24];
    uint32_t index;
    for (uint32_t i = 0; i < MANY; i++) {
        snprintf(name, sizeof name, "m%u", order[i]);
        must_add(&t, name, (uint64_t)order[i] * 0x3000, 0x2000);
    }
    cr_assert_eq(t.count, MANY);
    for (uint32_t i = 0; i < MANY; i++) {
        uint64_t start = (uint64_t)order[i] * 0x3000;
        snprintf(name, sizeof name, "m%u", order[i]);
        cr_assert_eq(rmig_blocks_by_name(&t, name, &index), RMIG_OK);
        cr_assert_eq(index, i);
        cr_assert_eq(rmig_blocks_by_offset(&t, start + 0x1fff, &index), RMIG_OK);
        cr_assert_eq(index, i);
        cr_assert_eq(rmig_blocks_by_offset(&t, start + 0x2000, &index), RMIG_ERR_ARGUMENT);
    }
    struct rmig_block_desc d = desc_of("late", (uint64_t)(MANY / 2) * 0x3000 + 0x1000, 0x1000);
    must_refuse(&t, &d, "late", "m50000");
    rmig_blocks_free(&t);
    free(order);
}

Test(blocks, a_hundred_thousand_ascending, .timeout = 600) { many_blocks(0); }
Test(blocks, a_hundred_thousand_descending, .timeout = 600) { many_blocks(1); }
Test(blocks, a_hundred_thousand_shuffled, .timeout = 600) { many_blocks(2); }

// Of n blocks none costs more than some multiples of log2 n steps: nothing is moved to make room in an order, and no name
// is compared with more than a few dozen others. Names and offsets come in orders of their own.
static void many_cost_little(bool names_descend, bool offsets_descend) {
    enum { N = 131072, STEPS = 64 };
    struct rmig_blocks t = {0};
    work.bytes_moved = work.names_compared = 0;
    for (uint32_t i = 0; i < N; i++) {
        char name[24];
        snprintf(name, sizeof name, "n%06u", names_descend ? N - i : i);
        must_add(&t, name, (uint64_t)(offsets_descend ? N - i : i) * 4096, 4096);
    }
    cr_expect_leq(work.bytes_moved, 64 * (uint64_t)N, "%lu bytes", (unsigned long)work.bytes_moved);
    cr_expect_leq(work.names_compared, STEPS * (uint64_t)N, "%lu names", (unsigned long)work.names_compared);
    for (uint32_t i = 0; i < 1000; i++) {
        char name[24];
        uint32_t which = (uint32_t)below(N), index;
        snprintf(name, sizeof name, "n%06u", names_descend ? N - which : which);
        work.names_compared = 0;
        cr_assert_eq(rmig_blocks_by_name(&t, name, &index), RMIG_OK);
        cr_assert_eq(index, which);
        cr_assert_leq(work.names_compared, STEPS);
    }
    rmig_blocks_free(&t);
}

Test(blocks, a_hundred_thousand_cost_little_in_ascending_order, .timeout = 600) { many_cost_little(false, false); }
Test(blocks, a_hundred_thousand_cost_little_in_descending_order, .timeout = 600) { many_cost_little(true, true); }
Test(blocks, a_hundred_thousand_cost_little_in_orders_that_disagree, .timeout = 600) { many_cost_little(true, false); }

// Searching after each addition is the worst case of sorting late.
Test(blocks, thousands_with_a_search_after_each_addition, .timeout = 600) {
    struct rmig_blocks t = {0};
    uint32_t order[5000], index;
    for (uint32_t i = 0; i < 5000; i++)
        order[i] = i;
    shuffle(order, 5000);
    for (uint32_t i = 0; i < 5000; i++) {
        char name[24];
        snprintf(name, sizeof name, "s%u", order[i]);
        must_add(&t, name, (uint64_t)order[i] * 4096, 4096);
        uint32_t probe = (uint32_t)below(i + 1);
        cr_assert_eq(rmig_blocks_by_offset(&t, (uint64_t)order[probe] * 4096 + 17, &index), RMIG_OK);
        cr_assert_eq(index, probe);
    }
    rmig_blocks_free(&t);
}
