// Chunk arithmetic and the set of pages, against brute force.
#define RMIG_IMPLEMENTATION
#include "../rmig.h"

#include <criterion/criterion.h>
#include <stdlib.h>

#define RANDOM_SEED 0x9e3779b97f4a7c15u
#include "random.h"

// >> chunk arithmetic

Test(chunk, stock_peers_table) {
    static const struct {
        uint64_t length, count_v1, last, last_length;
    } row[] = {
        {0x1000, 1, 0, 0x1000},   {0xff000, 1, 0, 0xff000},      {0x100000, 2, 0, 0x100000},
        {0x101000, 2, 1, 0x1000}, {0x4000000, 65, 63, 0x100000},
    };
    const uint64_t c = 0x100000;
    for (size_t i = 0; i < sizeof row / sizeof row[0]; i++) {
        uint64_t last = rmig_chunk_index(row[i].length - 1, c);
        cr_expect_eq(rmig_chunk_count_v1(row[i].length, c), row[i].count_v1, "row %zu", i);
        cr_expect_eq(last, row[i].last, "row %zu", i);
        cr_expect_eq(rmig_chunk_count(row[i].length, c), row[i].last + 1, "row %zu", i);
        uint64_t length = rmig_chunk_end(last, c, row[i].length) - rmig_chunk_start(last, c);
        cr_expect_eq(length, row[i].last_length, "row %zu", i);
    }
}

// The second method walks the block page by page and opens a chunk each time a full one was passed.
static void check_chunks_by_walking(uint64_t length, uint64_t chunk, uint64_t step) {
    uint64_t index = 0, start = 0;
    for (uint64_t at = 0; at < length; at += step) {
        if (at - start == chunk) {
            cr_assert_eq(rmig_chunk_end(index, chunk, length), at);
            index++;
            start = at;
        }
        cr_assert_eq(rmig_chunk_index(at, chunk), index, "offset %lu", (unsigned long)at);
        cr_assert_eq(rmig_chunk_start(index, chunk), start);
    }
    cr_assert_eq(rmig_chunk_end(index, chunk, length), length);
    cr_assert_eq(rmig_chunk_count(length, chunk), index + 1);
    cr_assert_eq(rmig_chunk_further(length, chunk), index);
}

Test(chunk, lengths_that_are_no_multiple) {
    for (uint64_t pages = 1; pages < 4 * 256 + 3; pages++)
        check_chunks_by_walking(pages * 4096, RMIG_MIB, 4096);
}

Test(chunk, lengths_that_are_no_multiple_of_a_page) {
    for (uint64_t extra = 1; extra < 4096; extra += 97)
        check_chunks_by_walking(3 * RMIG_MIB + extra, RMIG_MIB, extra < 64 ? 1024 : 512);
}

Test(chunk, every_chunk_size) {
    for (uint64_t c = RMIG_CHUNK_SIZE_MIN; c <= RMIG_CHUNK_SIZE_MAX; c *= 2)
        for (int i = 0; i < 20; i++)
            check_chunks_by_walking((1 + below(5 * c / 65536)) * 65536 - (i % 2 == 0 ? 0 : 4096), c, 65536);
}

Test(chunk, one_gib_chunks_in_large_blocks) {
    const uint64_t c = RMIG_CHUNK_SIZE_MAX, tib = (uint64_t)1 << 40;
    cr_expect_eq(rmig_chunk_count(16 * tib, c), 16384);
    cr_expect_eq(rmig_chunk_count(16 * tib + 1, c), 16385);
    cr_expect_eq(rmig_chunk_count_v1(16 * tib, c), 16385);
    cr_expect_eq(rmig_chunk_index(16 * tib - 1, c), 16383);
    cr_expect_eq(rmig_chunk_end(16383, c, 16 * tib), 16 * tib);
    cr_expect_eq(rmig_chunk_further(16 * tib, c), 16383);
}

Test(chunk, no_overflow_at_the_top_of_64_bits) {
    const uint64_t length = UINT64_MAX, c = RMIG_CHUNK_SIZE_MIN;
    uint64_t last = rmig_chunk_index(length - 1, c);
    cr_expect_eq(rmig_chunk_count(length, c), (uint64_t)1 << 44);
    cr_expect_eq(last, ((uint64_t)1 << 44) - 1);
    cr_expect_eq(rmig_chunk_end(last, c, length), length);
    cr_expect_eq(rmig_chunk_end(last - 1, c, length), last * c);
}

Test(chunk, an_index_past_the_end_ends_at_the_block_end) {
    cr_expect_eq(rmig_chunk_end(7, RMIG_MIB, 3 * RMIG_MIB), 3 * RMIG_MIB);
    cr_expect_eq(rmig_chunk_end(UINT64_MAX, RMIG_MIB, 3 * RMIG_MIB), 3 * RMIG_MIB);
}

Test(chunk, an_empty_length_has_no_chunk) {
    cr_expect_eq(rmig_chunk_count(0, RMIG_MIB), 0);
    cr_expect_eq(rmig_chunk_further(0, RMIG_MIB), 0);
    cr_expect_eq(rmig_chunk_end(0, RMIG_MIB, 0), 0);
}

// >> the set of pages. The second method: one bool a page.

struct model {
    struct rmig_merge set;
    bool *page;
};

static void model_init(struct model *m, uint64_t pages) {
    m->set.pages = pages;
    m->set.pending = 0;
    // Exactly as many words as the interface asks for, so that the sanitizer sees one too many.
    m->set.bits = (uint64_t *)calloc((size_t)((pages + 63) / 64), sizeof(uint64_t));
    m->page = (bool *)calloc((size_t)pages, sizeof(bool));
    cr_assert(m->set.bits != NULL && m->page != NULL);
}

static void model_free(struct model *m) {
    free(m->set.bits);
    free(m->page);
}

static void model_add(struct model *m, uint64_t first, uint64_t n) {
    for (uint64_t i = 0; i < n; i++)
        m->page[first + i] = true;
    rmig_merge_add(&m->set, first, n);
}

static void model_check(const struct model *m) {
    uint64_t pending = 0;
    for (uint64_t i = 0; i < m->set.pages; i++) {
        bool in = (m->set.bits[i / 64] >> (i % 64) & 1) != 0;
        cr_assert_eq(in, m->page[i], "page %lu of %lu", (unsigned long)i, (unsigned long)m->set.pages);
        pending += m->page[i];
    }
    cr_assert_eq(m->set.pending, pending, "pending %lu, pages in the set %lu", (unsigned long)m->set.pending,
                 (unsigned long)pending);
    for (uint64_t i = m->set.pages; i < (m->set.pages + 63) / 64 * 64; i++)
        cr_assert_eq(m->set.bits[i / 64] >> (i % 64) & 1, 0, "bit %lu past the last page", (unsigned long)i);
}

static bool model_next(const struct model *m, uint64_t from, uint64_t to, uint64_t max, uint64_t *first, uint64_t *n) {
    while (from < to && !m->page[from])
        from++;
    if (from >= to)
        return false;
    *first = from;
    for (*n = 0; from + *n < to && *n < max && m->page[from + *n]; ++*n)
        ;
    return true;
}

// Walks [from, to) and returns how many pages came out.
static uint64_t check_extents(const struct model *m, uint64_t from, uint64_t to, uint64_t max) {
    uint64_t total = 0, guard = 0, first = 0, n = 0, want_first = 0, want_n = 0;
    for (;;) {
        bool more = rmig_merge_next(&m->set, from, to, max, &first, &n);
        bool want = model_next(m, from, to, max, &want_first, &want_n);
        cr_assert_eq(more, want, "from %lu to %lu max %lu", (unsigned long)from, (unsigned long)to, (unsigned long)max);
        if (!more)
            return total;
        cr_assert(first == want_first && n == want_n, "from %lu to %lu max %lu: %lu+%lu, wanted %lu+%lu",
                  (unsigned long)from, (unsigned long)to, (unsigned long)max, (unsigned long)first, (unsigned long)n,
                  (unsigned long)want_first, (unsigned long)want_n);
        total += n;
        from = first + n;
        cr_assert(++guard <= m->set.pages, "no end");
    }
}

static void random_set(struct model *m) {
    static const uint64_t typical_run[] = {1, 3, 64, 200};
    uint64_t run = typical_run[below(4)];
    for (uint64_t i = below(40); i > 0; i--) {
        uint64_t first = below(m->set.pages);
        uint64_t n = 1 + below(run * 2);
        model_add(m, first, n < m->set.pages - first ? n : m->set.pages - first);
    }
}

Test(merge, random_sets_give_maximal_ascending_complete_extents, .timeout = 600) {
    for (int round = 0; round < 600; round++) {
        struct model m;
        model_init(&m, 1 + below(700));
        random_set(&m);
        model_check(&m);
        cr_assert_eq(check_extents(&m, 0, m.set.pages, UINT64_MAX), m.set.pending);
        for (int i = 0; i < 20; i++) {
            uint64_t from = below(m.set.pages + 1), to = below(m.set.pages + 1);
            check_extents(&m, from, to, 1 + below(i % 2 == 0 ? 10 : 300));
        }
        model_free(&m);
    }
}

Test(merge, an_extent_is_maximal_and_never_longer_than_max) {
    for (uint64_t max = 1; max <= 200; max++) {
        struct model m;
        model_init(&m, 321);
        model_add(&m, 0, 321);
        uint64_t first, n, from = 0;
        while (rmig_merge_next(&m.set, from, 321, max, &first, &n)) {
            cr_assert_eq(first, from);
            cr_assert_eq(n, 321 - from < max ? 321 - from : max);
            from += n;
        }
        cr_assert_eq(from, 321);
        model_free(&m);
    }
}

Test(merge, limits_at_every_position_round_a_word_border) {
    struct model m;
    model_init(&m, 256);
    model_add(&m, 60, 70);
    model_add(&m, 191, 2);
    for (uint64_t from = 0; from <= 256; from++)
        for (uint64_t to = 0; to <= 256; to++)
            check_extents(&m, from, to, UINT64_MAX);
    model_free(&m);
}

Test(merge, an_empty_set_has_no_extent) {
    struct model m;
    model_init(&m, 1000);
    uint64_t first = 11, n = 12;
    cr_expect(!rmig_merge_next(&m.set, 0, 1000, 5, &first, &n));
    cr_expect(!rmig_merge_next(&m.set, 1000, 1000, 5, &first, &n));
    cr_expect(!rmig_merge_next(&m.set, 600, 300, 5, &first, &n));
    cr_expect(first == 11 && n == 12, "output changed although there is no extent");
    model_free(&m);
}

Test(merge, whole_words_of_ones) {
    for (uint64_t pages = 63; pages <= 66; pages++)
        for (uint64_t words = 0; words < 3; words++) {
            struct model m;
            model_init(&m, pages + words * 64);
            model_add(&m, 0, m.set.pages);
            model_check(&m);
            cr_assert_eq(m.set.pending, m.set.pages);
            uint64_t first, n;
            cr_assert(rmig_merge_next(&m.set, 0, m.set.pages, UINT64_MAX, &first, &n));
            cr_assert(first == 0 && n == m.set.pages);
            model_free(&m);
        }
}

Test(merge, a_page_far_behind_empty_words_is_found) {
    struct model m;
    model_init(&m, 100000);
    model_add(&m, 99999, 1);
    uint64_t first, n;
    cr_assert(rmig_merge_next(&m.set, 0, 100000, 8, &first, &n));
    cr_expect(first == 99999 && n == 1);
    cr_expect(!rmig_merge_next(&m.set, 0, 99999, 8, &first, &n));
    model_free(&m);
}

Test(merge, adding_twice_counts_once) {
    struct model m;
    model_init(&m, 300);
    for (int i = 0; i < 3; i++) {
        model_add(&m, 10, 200);
        model_add(&m, 100, 200);
        cr_assert_eq(m.set.pending, 290);
    }
    model_check(&m);
    model_free(&m);
}

Test(merge, adding_nothing_changes_nothing) {
    struct model m;
    model_init(&m, 64);
    rmig_merge_add(&m.set, 0, 0);
    rmig_merge_add(&m.set, 64, 0); // the end of the set is a legal place for no page
    rmig_merge_add_bitmap(&m.set, 64, NULL, 0);
    model_check(&m);
    model_free(&m);
}

// The bitmap is allocated exactly, with ones behind the last page: tail bits must be ignored.
static void check_bitmap(uint64_t pages, uint64_t first, uint64_t n, uint64_t density) {
    struct model m;
    model_init(&m, pages);
    random_set(&m);
    uint64_t *bitmap = (uint64_t *)calloc((size_t)((n + 63) / 64), sizeof(uint64_t));
    cr_assert(bitmap != NULL || n == 0);
    for (uint64_t i = 0; i < (n + 63) / 64 * 64; i++) {
        bool dirty = i >= n || (density == 64 ? true : below(64) < density);
        if (!dirty)
            continue;
        bitmap[i / 64] |= (uint64_t)1 << (i % 64);
        if (i < n)
            m.page[first + i] = true;
    }
    rmig_merge_add_bitmap(&m.set, first, bitmap, n);
    model_check(&m);
    free(bitmap);
    model_free(&m);
}

Test(merge, bitmaps_at_any_place_of_any_length, .timeout = 600) {
    static const uint64_t density[] = {0, 1, 32, 63, 64};
    for (uint64_t first = 0; first < 130; first++)
        for (uint64_t n = 1; n < 200; n += 1 + below(12))
            check_bitmap(first + n + below(3), first, n, density[below(5)]);
}

Test(merge, random_bitmaps, .timeout = 600) {
    for (int i = 0; i < 3000; i++) {
        uint64_t pages = 1 + below(900), first = below(pages), n = 1 + below(pages - first);
        check_bitmap(pages, first, n, below(65));
    }
}

Test(merge, three_ways_in_give_the_same_set) {
    for (int round = 0; round < 200; round++) {
        struct model by_page, by_range, by_bitmap;
        uint64_t pages = 1 + below(600);
        model_init(&by_page, pages);
        model_init(&by_range, pages);
        model_init(&by_bitmap, pages);
        random_set(&by_range);
        for (uint64_t i = pages; i-- > 0;) // one by one, from the end
            if (by_range.page[i])
                model_add(&by_page, i, 1);
        memcpy(by_bitmap.page, by_range.page, (size_t)pages * sizeof(bool));
        uint64_t *bitmap = (uint64_t *)calloc((size_t)((pages + 63) / 64), sizeof(uint64_t));
        cr_assert_not_null(bitmap);
        for (uint64_t i = 0; i < pages; i++)
            bitmap[i / 64] |= (uint64_t)by_range.page[i] << (i % 64);
        rmig_merge_add_bitmap(&by_bitmap.set, 0, bitmap, pages);
        model_check(&by_page);
        model_check(&by_range);
        model_check(&by_bitmap);
        cr_assert_arr_eq(by_page.set.bits, by_range.set.bits, (size_t)((pages + 63) / 64 * 8));
        cr_assert_arr_eq(by_page.set.bits, by_bitmap.set.bits, (size_t)((pages + 63) / 64 * 8));
        free(bitmap);
        model_free(&by_page);
        model_free(&by_range);
        model_free(&by_bitmap);
    }
}

Test(merge, taking_extents_out_empties_the_set_without_touching_the_rest) {
    for (int round = 0; round < 300; round++) {
        struct model m;
        model_init(&m, 1 + below(800));
        random_set(&m);
        uint64_t max = 1 + below(100), first, n, guard = 0;
        while (rmig_merge_next(&m.set, 0, m.set.pages, max, &first, &n)) {
            for (uint64_t i = 0; i < n; i++)
                m.page[first + i] = false;
            rmig_merge_take(&m.set, first, n);
            if (guard % 7 == 0)
                model_check(&m);
            cr_assert(++guard <= m.set.pages);
        }
        model_check(&m);
        cr_assert_eq(m.set.pending, 0);
        model_free(&m);
    }
}

Test(merge, taking_part_of_an_extent_leaves_the_other_part) {
    struct model m;
    model_init(&m, 400);
    model_add(&m, 0, 400);
    rmig_merge_take(&m.set, 50, 100);
    memset(m.page + 50, 0, 100 * sizeof(bool));
    model_check(&m);
    check_extents(&m, 0, 400, UINT64_MAX);
    model_free(&m);
}

Test(merge, popcount_and_ctz_against_loops) {
    for (int i = 0; i < 20000; i++) {
        uint64_t x = rng() & rng() & (i % 3 == 0 ? rng() : UINT64_MAX);
        if (i < 64)
            x = (uint64_t)1 << i;
        uint64_t ones = 0, zeros = 0;
        for (int b = 0; b < 64; b++)
            ones += x >> b & 1;
        cr_assert_eq(rmig__popcount(x), ones);
        if (x == 0)
            continue;
        while ((x >> zeros & 1) == 0)
            zeros++;
        cr_assert_eq(rmig__ctz(x), zeros);
    }
    cr_assert_eq(rmig__popcount(0), 0);
    cr_assert_eq(rmig__popcount(UINT64_MAX), 64);
}
