// The parts of the engines, each by itself: without a source, a sink or a fabric.
#define RMIG_IMPLEMENTATION
#include "../rmig.h"

#include <criterion/criterion.h>

#define RANDOM_SEED 0x51ed270b7f4a7c15u
#include "random.h"

#define PAGE 4096u
#define SECOND ((uint64_t)1000000000)

// >> pacer

/* Writes as much as is allowed, in pieces of at most `most` bytes, until `end`; what came out. Who is held back sleeps
   until it may come again, or somewhat longer. */
static uint64_t paced(struct rmig__pacer *p, uint64_t rate, uint64_t most, uint64_t end, uint64_t late) {
    uint64_t now = p->filled, sum = 0;
    while (now < end) {
        uint64_t allowed = rmig__pacer_allows(p, rate, PAGE, now);
        cr_assert_eq(allowed % PAGE, 0);
        if (allowed == 0) {
            cr_assert_gt(p->until, now);
            now = p->until + (late == 0 ? 0 : below(late));
            continue;
        }
        uint64_t n = allowed < most ? allowed : most;
        rmig__pacer_spend(p, n);
        sum += n;
    }
    return sum;
}

static const uint64_t rates[] = {PAGE, 100000, RMIG_MIB, 125 * RMIG_MIB, 50 * RMIG_GIB};

Test(pacer, the_rate_is_kept_and_used) {
    for (size_t i = 0; i < sizeof rates / sizeof rates[0]; i++)
        for (uint64_t most = PAGE; most <= RMIG_GIB; most *= 64) {
            struct rmig__pacer p = {0};
            uint64_t rate = rates[i], burst = rate / 50 > PAGE ? rate / 50 : PAGE;
            uint64_t ns = (most == PAGE && rate > RMIG_GIB ? 1 : 20) * SECOND / (rate > RMIG_MIB ? 10 : 1);
            rmig__pacer_begin(&p, 7 * SECOND);
            uint64_t sum = paced(&p, rate, most, 7 * SECOND + ns, 0);
            double due = (double)rate * (double)ns / 1e9;
            cr_expect_leq((double)sum, due + 1, "%llu B/s, writes of %llu", (unsigned long long)rate,
                          (unsigned long long)most);
            cr_expect_geq((double)sum, due * 0.999 - 2.0 * (double)burst, "%llu B/s, writes of %llu",
                          (unsigned long long)rate, (unsigned long long)most);
        }
}

Test(pacer, who_comes_late_gets_20_ms_of_it_at_once_and_no_more) {
    struct rmig__pacer p = {0};
    rmig__pacer_begin(&p, SECOND);
    cr_expect_eq(rmig__pacer_allows(&p, 100 * RMIG_MIB, PAGE, 100 * SECOND), 2 * RMIG_MIB);
    rmig__pacer_begin(&p, 200 * SECOND);
    cr_expect_eq(rmig__pacer_allows(&p, 100 * RMIG_MIB, PAGE, 200 * SECOND), 0, "a round begins with nothing");
    for (unsigned i = 0; i < 200; i++) {
        uint64_t rate = rates[1 + below(4)];
        rmig__pacer_begin(&p, SECOND);
        uint64_t sum = paced(&p, rate, UINT64_MAX, 3 * SECOND, SECOND / 10);
        cr_assert_leq(sum, 2 * rate + 1);
    }
}

Test(pacer, a_write_longer_than_what_is_there_empties_it) {
    struct rmig__pacer p = {0};
    rmig__pacer_begin(&p, 0);
    uint64_t allowed = rmig__pacer_allows(&p, RMIG_GIB, PAGE, SECOND);
    rmig__pacer_spend(&p, 10 * allowed);
    cr_expect_eq(rmig__pacer_allows(&p, RMIG_GIB, PAGE, SECOND), 0);
    // Half of the bucket, and not one page.
    cr_expect_eq(rmig__pacer_allows(&p, RMIG_GIB, PAGE, p.until), RMIG_GIB / 100 / PAGE * PAGE);
}

// >> outbox

static uint8_t room[RMIG_PAYLOAD_MAX], payload[RMIG_PAYLOAD_MAX];

static struct rmig__outbox outbox(size_t limit) { return (struct rmig__outbox){.bytes = room, .limit = limit}; }

Test(outbox, everything_comes_out_in_order) {
    static uint8_t text[200000];
    for (size_t i = 0; i < sizeof text; i++)
        text[i] = (uint8_t)below(256);
    for (unsigned run = 0; run < 100; run++) {
        size_t limit = 1 + below(run % 2 == 0 ? 100 : 32768), in = 0, out = 0, end = limit * 5 + below(sizeof text / 2);
        end = end < sizeof text ? end : sizeof text;
        struct rmig__outbox o = outbox(limit);
        while (out < end) {
            size_t n = below(end - in + 1), taken = rmig__outbox_put(&o, text + in, n);
            cr_assert_leq(taken, n);
            cr_assert(taken == n || o.fill == limit, "it took %zu of %zu though there was room", taken, n);
            in += taken;
            while (rmig__outbox_due(&o, in == end)) {
                n = rmig__outbox_take(&o, payload);
                cr_assert(n > 0 && n <= limit);
                cr_assert_arr_eq(payload, text + out, n);
                out += n;
            }
            cr_assert_eq(in - out, o.fill);
            cr_assert_lt(o.fill, limit);
        }
        cr_assert_eq(out, end);
    }
}

Test(outbox, a_message_is_due_when_it_is_full_or_awaited) {
    struct rmig__outbox o = outbox(100);
    cr_expect_not(rmig__outbox_due(&o, true), "of nothing");
    rmig__outbox_put(&o, payload, 99);
    cr_expect_not(rmig__outbox_due(&o, false));
    cr_expect(rmig__outbox_due(&o, true));
    rmig__outbox_put(&o, payload, 1);
    cr_expect(rmig__outbox_due(&o, false));
    rmig__outbox_take(&o, payload);
    for (unsigned i = 0; i < 2; i++) {
        rmig__outbox_put(&o, payload, 10);
        *(i == 0 ? &o.first : &o.flush) = true;
        cr_expect(rmig__outbox_due(&o, false));
        cr_expect_eq(rmig__outbox_take(&o, payload), 10);
        cr_expect_not(o.first || o.flush, "nobody waits for what is gone");
    }
}

Test(outbox, the_peers_limit_may_be_less_than_what_is_there) {
    struct rmig__outbox o = outbox(1000);
    rmig__outbox_put(&o, payload, 900);
    o.limit = 400; // HELLO_RESULT has come
    cr_expect_eq(rmig__outbox_put(&o, payload, 10), 0);
    cr_expect_eq(rmig__outbox_take(&o, payload), 400);
    cr_expect_eq(rmig__outbox_take(&o, payload), 400);
    cr_expect_not(rmig__outbox_due(&o, false));
    cr_expect_eq(rmig__outbox_put(&o, payload, 1000), 300);
}

// >> clears

enum { NOT_ZERO, NOTED, SENT };

/* Blocks of 100 pages, the last page short: what the sink is to clear, page by page, as a second method. */
struct cleared {
    struct rmig__clears c;
    uint8_t page[3][100];
    bool again[3][100]; // saved while it was to be cleared
};

static uint64_t end_of(uint64_t page) { return page == 100 ? 99 * PAGE + 512 : page * PAGE; }

static unsigned pages_that_are(const struct cleared *w, uint8_t state) {
    unsigned n = 0;
    for (unsigned b = 0; b < 3; b++)
        for (unsigned i = 0; i < 100; i++)
            n += w->page[b][i] == state;
    return n;
}

/* Zero pages are noted if there is room; then they are not noted twice, as the engine's are not. */
static void find_zero(struct cleared *w, uint32_t most) {
    uint32_t block = (uint32_t)below(3), before = w->c.count;
    uint64_t first = below(100), n = 1 + below(100 - first);
    for (uint64_t i = first; i < first + n; i++)
        if (w->page[block][i] != NOT_ZERO)
            return;
    const struct rmig_compress *last = before > 0 ? &w->c.run[before - 1] : NULL;
    bool follows = last != NULL && last->block == block && last->start + last->length == first * PAGE;
    bool noted = rmig__clears_add(&w->c, most, block, first * PAGE, end_of(first + n) - first * PAGE, PAGE);
    cr_assert_eq(noted, follows || before < most);
    cr_assert_eq(w->c.count, before + (noted && !follows));
    if (noted)
        memset(&w->page[block][first], NOTED, n);
}

static void send_some(struct cleared *w) {
    uint32_t n = (uint32_t)below(w->c.count + 1);
    for (uint32_t i = 0; i < n; i++) {
        const struct rmig_compress *run = &w->c.run[i];
        cr_assert_eq(run->start % PAGE, 0);
        for (uint64_t at = run->start; at < run->start + run->length; at += PAGE) {
            cr_assert_eq(w->page[run->block][at / PAGE], NOTED);
            w->page[run->block][at / PAGE] = SENT;
        }
    }
    rmig__clears_send(&w->c, n);
}

static void save_pages(struct cleared *w) {
    uint32_t block = (uint32_t)below(3);
    uint64_t first = below(100), n = 1 + below(100 - first);
    for (uint64_t i = first; i < first + n; i++)
        w->again[block][i] = w->again[block][i] || w->page[block][i] != NOT_ZERO;
    rmig__clears_guard(&w->c, block, first, n);
}

static void ready(struct cleared *w) {
    rmig__clears_done(&w->c);
    for (unsigned i = 0; i < 300; i++)
        if (w->page[i / 100][i % 100] == SENT)
            w->page[i / 100][i % 100] = NOT_ZERO, w->again[i / 100][i % 100] = false;
}

Test(clears, no_page_that_is_to_be_cleared_is_saved_without_a_fence) {
    for (unsigned run = 0; run < 300; run++) {
        struct cleared w = {0};
        uint32_t most = run % 2 == 0 ? 1 : 1 + (uint32_t)below(20);
        for (unsigned step = 0; step < 200; step++) {
            unsigned kind = (unsigned)below(4);
            if (kind == 0 && !w.c.fence) // behind a fence the planner stands still
                find_zero(&w, most);
            if (kind == 1 && !w.c.sent)
                send_some(&w);
            if (kind == 2)
                save_pages(&w);
            if (kind == 3)
                ready(&w);
            cr_assert(w.c.fence || memchr(w.again, true, sizeof w.again) == NULL, "it may be written before it is cleared");
            cr_assert_eq(w.c.count == 0, pages_that_are(&w, NOTED) == 0);
            cr_assert(!w.c.fence || w.c.sent || w.c.count > 0, "a fence that nothing will take down");
        }
    }
}

Test(clears, pages_beside_those_to_be_cleared_raise_no_fence) {
    struct rmig__clears c = {0};
    rmig__clears_guard(&c, 0, 0, 100);
    cr_expect_not(c.fence, "of nothing");
    rmig__clears_add(&c, 10, 1, 10 * PAGE, 3 * PAGE, PAGE);
    rmig__clears_guard(&c, 0, 10, 3);
    rmig__clears_guard(&c, 1, 0, 10);
    rmig__clears_guard(&c, 1, 13, 10);
    rmig__clears_guard(&c, 2, 10, 3);
    cr_expect_not(c.fence);
    rmig__clears_guard(&c, 1, 12, 1);
    cr_expect(c.fence);
}

Test(clears, a_message_holds_no_more_than_a_sink_clears_between_two_readys) {
    struct rmig__clears c = {0};
    cr_expect(rmig__clears_add(&c, 10, 0, 0, RMIG__CLEAR_BYTES - PAGE, PAGE));
    cr_expect_not(rmig__clears_add(&c, 10, 0, RMIG__CLEAR_BYTES - PAGE, 2 * PAGE, PAGE));
    cr_expect(rmig__clears_add(&c, 10, 0, RMIG__CLEAR_BYTES - PAGE, PAGE, PAGE));
    rmig__clears_send(&c, 1);
    cr_expect(rmig__clears_add(&c, 10, 1, 0, PAGE, PAGE));
    for (uint32_t i = 0; i < 1000; i++)
        rmig__clears_add(&c, UINT32_MAX, 2, 2 * i * PAGE, PAGE, PAGE);
    cr_expect_eq(c.count, RMIG__CLEAR_RUNS);
}

// >> meter

/* A wire of `rate` that is looked at every `step` ns while it works. What has arrived when it has worked for ns. */
static uint64_t work(struct rmig__meter *m, uint64_t rate, uint64_t *now, uint64_t arrived, uint64_t ns, uint64_t step) {
    if (rmig__meter_stopped(m))
        rmig__meter_start(m, *now);
    m->busy = true;
    for (uint64_t t = 0; t < ns; t += step) {
        *now += step;
        arrived += (uint64_t)((double)rate * (double)step / 1e9);
        rmig__meter_look(m, *now, arrived, 0, true, false);
    }
    return arrived;
}

static bool is_near(uint64_t rate, uint64_t due) { return rate > due - due / 50 && rate < due + due / 50; }

Test(meter, the_rate_is_that_of_the_time_with_work) {
    for (uint64_t rate = RMIG_MIB; rate <= 64 * RMIG_GIB; rate *= 8) {
        struct rmig__meter m = {.ns = 5};
        uint64_t now = 3 * SECOND, arrived = 12345 * RMIG_GIB;
        rmig__meter_begin(&m, arrived);
        for (unsigned i = 0; i < 20; i++) {
            arrived = work(&m, rate, &now, arrived, SECOND / 4, SECOND / 1000);
            rmig__meter_look(&m, now, arrived, 0, false, true);
            now += below(10 * SECOND); // nothing is to be done
        }
        uint64_t told = rmig__meter_rate(&m, &m.begin, arrived, false);
        cr_expect(is_near(told, rate), "%llu is told as %llu", (unsigned long long)rate, (unsigned long long)told);
    }
}

Test(meter, the_rate_now_forgets_what_was_two_seconds_ago) {
    struct rmig__meter m = {0};
    uint64_t now = SECOND;
    rmig__meter_begin(&m, 0);
    uint64_t arrived = work(&m, 100 * RMIG_MIB, &now, 0, 10 * SECOND, SECOND / 100);
    arrived = work(&m, 10 * RMIG_MIB, &now, arrived, 3 * SECOND, SECOND / 100);
    cr_expect(is_near(rmig__meter_rate(&m, &m.mark[0], arrived, false), 10 * RMIG_MIB));
    cr_expect_gt(rmig__meter_rate(&m, &m.begin, arrived, false), 70 * RMIG_MIB);
}

Test(meter, time_in_which_only_zero_pages_went_by_does_not_count) {
    struct rmig__meter m = {0};
    uint64_t now = SECOND, zero = 0;
    rmig__meter_begin(&m, 0);
    uint64_t arrived = work(&m, 100 * RMIG_MIB, &now, 0, SECOND, SECOND / 100), ns = m.ns;
    rmig__meter_look(&m, now, arrived, zero, false, false);
    for (unsigned i = 0; i < 100; i++)
        rmig__meter_look(&m, now += SECOND / 10, arrived, zero += RMIG_GIB, false, false);
    cr_expect_eq(m.ns, ns);
    rmig__meter_look(&m, now += SECOND, arrived, zero, false, false);
    cr_expect_eq(m.ns, ns + SECOND, "what went by without them does");
}

Test(meter, little_tells_nothing_unless_anything_will_do) {
    struct rmig__meter m = {0};
    uint64_t now = SECOND, arrived;
    rmig__meter_begin(&m, 0);
    cr_expect_eq(rmig__meter_rate(&m, &m.begin, 0, true), 0, "no time has gone by");
    arrived = work(&m, 10 * RMIG_MIB, &now, 0, SECOND / 100, SECOND / 100);
    cr_expect_eq(rmig__meter_rate(&m, &m.begin, arrived, false), 0);
    cr_expect(is_near(rmig__meter_rate(&m, &m.begin, arrived, true), 10 * RMIG_MIB));
    arrived = work(&m, 10 * RMIG_MIB, &now, arrived, SECOND / 10, SECOND / 100);
    cr_expect(is_near(rmig__meter_rate(&m, &m.begin, arrived, false), 10 * RMIG_MIB));
}

// >> round

#define RAM (100 * RMIG_MIB)

Test(round, in_the_first_round_only_what_is_saved_again_is_dirty) {
    struct rmig__round r = {0};
    rmig__round_begin(&r, 5 * SECOND);
    cr_expect_eq(rmig__round_dirty_rate(&r, 0, RAM), 0);
    rmig__round_look(&r, 6 * SECOND, RAM, true);
    cr_expect_eq(rmig__round_dirty_rate(&r, RAM, RAM), 0);
    rmig__round_look(&r, 7 * SECOND, RAM + 40 * RMIG_MIB, false);
    rmig__round_look(&r, 9 * SECOND, RAM + 40 * RMIG_MIB, false);
    cr_expect_eq(rmig__round_dirty_rate(&r, RAM + 40 * RMIG_MIB, RAM), 20 * RMIG_MIB, "until the last was saved");
}

Test(round, what_a_round_saves_was_dirtied_since_the_round_before_began) {
    struct rmig__round r = {0};
    rmig__round_begin(&r, 5 * SECOND);
    rmig__round_look(&r, 6 * SECOND, RAM, true);
    rmig__round_begin(&r, 15 * SECOND);
    cr_expect(r.open && r.began == 15 * SECOND && r.before == 5 * SECOND && r.saved == 0);
    rmig__round_look(&r, 16 * SECOND, 30 * RMIG_MIB, true); // all at once, at the begin
    cr_expect_eq(rmig__round_dirty_rate(&r, 30 * RMIG_MIB, RAM), 3 * RMIG_MIB);
    rmig__round_look(&r, 20 * SECOND, 45 * RMIG_MIB, false);
    cr_expect_eq(rmig__round_dirty_rate(&r, 45 * RMIG_MIB, RAM), 3 * RMIG_MIB);
}

// >> dialogue

Test(dialogue, one_ready_lets_one_thing_be_said) {
    struct rmig__dialogue d = {0};
    cr_expect_not(rmig__dialogue_may_ask(&d));
    cr_expect_str_eq(rmig__dialogue_due(&d), "READY");
    cr_expect(rmig__dialogue_ready(&d));
    cr_expect_str_eq(rmig__dialogue_due(&d), "nothing");
    cr_expect_not(rmig__dialogue_ready(&d), "a second is not due");
    cr_expect(rmig__dialogue_may_ask(&d));
    rmig__dialogue_ask(&d, RMIG_MSG_NONE, 7);
    cr_expect_not(rmig__dialogue_may_ask(&d));
    cr_expect(rmig__dialogue_ready(&d), "what needs no reply is followed by a READY");
}

Test(dialogue, a_reply_comes_before_the_next_ready) {
    struct rmig__dialogue d = {0};
    rmig__dialogue_ready(&d);
    rmig__dialogue_ask(&d, RMIG_MSG_REGISTER_RESULT, 100);
    cr_expect_str_eq(rmig__dialogue_due(&d), "REGISTER_RESULT");
    cr_expect_not(rmig__dialogue_ready(&d));
    cr_expect_eq(rmig__dialogue_hold_until(&d, 30), 0, "it may take long");
    cr_expect_eq(rmig__dialogue_reply(&d, 150), 50);
    cr_expect_not(rmig__dialogue_may_ask(&d));
    cr_expect_eq(rmig__dialogue_hold_until(&d, 30), 180);
    cr_expect_eq(rmig__dialogue_hold_until(&d, UINT64_MAX), UINT64_MAX, "no sum wraps around");
    rmig__dialogue_ready(&d);
    cr_expect_eq(rmig__dialogue_hold_until(&d, 30), 0);
}

// >> flight

/* A wire of `rate` on which writes complete in order, as far as they were posted. */
struct wire {
    struct rmig__flight f;
    uint64_t rate, rtt, now, free; // when it has nothing left to do
    uint64_t end[4096], sum[4096]; // ring: when each write is through, and bytes up to it
    uint64_t posted, completed;
    uint64_t most; // outstanding at once
};

static void complete(struct wire *w) {
    while (w->completed < w->posted && w->end[w->completed % 4096] <= w->now)
        w->completed++;
}

/* For ns: posts all that may be outstanding, every `turn` ns; how many bytes went through. */
static uint64_t fly(struct wire *w, uint64_t ns, uint64_t turn, uint64_t idle) {
    struct rmig__flight *f = &w->f;
    uint64_t until = w->now + ns, before = w->completed == 0 ? 0 : w->sum[(w->completed - 1) % 4096];
    for (; w->now < until; w->now += turn) {
        complete(w);
        uint64_t through = w->completed == 0 ? 0 : w->sum[(w->completed - 1) % 4096];
        bool dry = w->completed == w->posted;
        if (rmig__flight_done(f, w->completed, dry))
            rmig__flight_sample(f, dry, w->now, w->rtt);
        uint64_t limit = rmig__flight_limit(f, idle, w->rtt);
        uint64_t stride = limit / RMIG__STRIDES > RMIG__STRIDE_MIN ? limit / RMIG__STRIDES : RMIG__STRIDE_MIN;
        stride = stride < limit ? stride : limit;
        cr_assert(f->from <= f->done && f->done <= through && through <= f->bytes);
        cr_assert_leq(through - f->done, 3 * stride, "done is far behind what is");
        cr_assert(w->completed < w->posted || f->done == f->bytes);
        f->full = false;
        for (;;) {
            f->full = f->bytes > f->done && f->bytes - f->done + stride > limit;
            if (f->full)
                break;
            if (f->bytes == f->done)
                f->since = w->now;
            uint64_t length = w->posted % 3 == 0 ? stride / 3 : stride;
            f->bytes += length;
            w->free = (w->free > w->now ? w->free : w->now) + (uint64_t)((double)length * 1e9 / (double)w->rate);
            w->end[w->posted % 4096] = w->free + w->rtt;
            w->sum[w->posted % 4096] = f->bytes;
            w->posted++;
            rmig__flight_mark(f, w->posted, stride);
        }
        w->most = f->bytes - f->done > w->most ? f->bytes - f->done : w->most;
    }
    complete(w);
    return w->sum[(w->completed - 1) % 4096] - before;
}

static struct wire wire(uint64_t rate) { return (struct wire){.rate = rate, .rtt = 10000, .now = SECOND, .free = SECOND}; }

Test(flight, a_fast_wire_stays_full_though_this_end_is_away) {
    for (uint64_t rate = RMIG_GIB / 8; rate <= 50 * RMIG_GIB; rate *= 4) {
        struct wire w = wire(rate);
        fly(&w, SECOND / 2, 2000000, 30 * SECOND);
        uint64_t through = fly(&w, SECOND, 2000000, 30 * SECOND);
        cr_expect(is_near(through, rate), "%llu of %llu went through", (unsigned long long)through,
                  (unsigned long long)rate);
        cr_expect(w.f.rate > rate / 2 && w.f.rate < rate + rate / 2, "%llu is measured as %llu",
                  (unsigned long long)rate, (unsigned long long)w.f.rate);
    }
}

Test(flight, no_more_is_outstanding_than_a_slow_link_gets_through_in_the_peers_patience) {
    for (uint64_t idle = SECOND; idle <= 32 * SECOND; idle *= 2) {
        struct wire w = wire(RMIG__SLOW_LINK);
        fly(&w, 20 * SECOND, SECOND / 1000, idle);
        cr_expect_leq(w.most, RMIG__SLOW_LINK * (idle / SECOND) / 4 + RMIG__STRIDE_MIN);
        w = wire(10 * RMIG_GIB); // one that becomes slow
        fly(&w, SECOND, SECOND / 1000, idle);
        cr_expect_leq(w.most, RMIG__SLOW_LINK * (idle / SECOND) / 4 + RMIG__STRIDE_MIN);
    }
}

Test(flight, a_fall_of_the_rate_counts_as_soon_as_it_is_measured) {
    struct wire w = wire(10 * RMIG_GIB);
    fly(&w, SECOND, SECOND / 1000, 30 * SECOND);
    uint64_t high = rmig__flight_limit(&w.f, 30 * SECOND, w.rtt);
    w.rate = 40 * RMIG_MIB;
    fly(&w, 5 * SECOND, SECOND / 1000, 30 * SECOND);
    cr_expect_lt(w.f.rate, 80 * RMIG_MIB);
    cr_expect_lt(rmig__flight_limit(&w.f, 30 * SECOND, w.rtt), high);
}

// >> writes

Test(writes, a_completion_covers_every_write) {
    for (unsigned run = 0; run < 500; run++) {
        struct rmig__writes w = {.depth = 1 + below(100), .signal_every = 1 + below(80)};
        uint64_t stride = RMIG_MIB * (1 + below(8)), next = 0, taken = 0, silent = 0, bytes = 0;
        for (unsigned step = 0; step < 300; step++) {
            if (w.queued < RMIG__WRITE_BATCH && below(3) != 0) {
                rmig__writes_add(&w, 1 + below(RMIG_MIB), stride)->id = next++;
                continue;
            }
            if (w.queued == 0)
                continue;
            rmig__writes_seal(&w);
            cr_assert(w.queue[w.queued - 1].signal, "nothing says when the last is through");
            unsigned n = (unsigned)below(w.queued + 1);
            for (unsigned i = 0; i < n; i++) {
                cr_assert_eq(w.queue[i].id, taken++);
                silent = w.queue[i].signal ? 0 : silent + 1;
                bytes = w.queue[i].signal ? 0 : bytes + w.queue[i].length;
                cr_assert(silent < w.signal_every && bytes < stride);
                cr_assert(silent == 0 || silent < (w.depth + 1) / 2, "half of the queue has no completion");
            }
            rmig__writes_posted(&w, n);
            cr_assert_eq(w.queued, next - taken);
        }
    }
}

Test(writes, no_more_completions_are_asked_for_than_are_due) {
    struct rmig__writes w = {.depth = 100, .signal_every = 16};
    unsigned signals = 0;
    for (unsigned i = 0; i < 64; i++)
        signals += rmig__writes_add(&w, PAGE, RMIG_GIB)->signal;
    cr_expect_eq(signals, 4);
    rmig__writes_seal(&w);
    for (unsigned i = 0; i < 64; i++)
        cr_expect_eq(w.queue[i].signal, i % 16 == 15);
}

// >> regions and windows

enum { CHUNKS = 64 };

/* Two blocks, the last chunk of each short, as the planner asks for keys chunk by chunk. */
struct registered {
    struct rmig__regions rs;
    struct rmig__windows ws;
    struct rmig__chunks chunks[2];
    struct rmig__region region[2 * CHUNKS];
    struct rmig_mr piece[2 * CHUNKS];
    uint32_t map[2][CHUNKS];
};

static uint64_t length_of_blocks(uint64_t chunk) { return CHUNKS * chunk - PAGE; }

static void registered(struct registered *r, uint64_t chunk, unsigned max) {
    memset(r, 0, sizeof *r);
    r->rs.region = r->region;
    r->rs.piece = r->piece;
    r->rs.capacity = 2 * CHUNKS;
    r->rs.chunk_size = chunk;
    r->rs.piece_bytes = 2 * chunk;
    r->ws.max = max;
    r->ws.page_size = PAGE;
    r->ws.bytes = r->ws.longest = UINT64_MAX;
    r->ws.regions = UINT64_MAX;
    for (unsigned b = 0; b < 2; b++) {
        r->chunks[b].region = r->map[b];
        r->chunks[b].count = r->chunks[b].unregistered = CHUNKS;
    }
}

static bool window_takes(struct registered *r, struct rmig__window *w, uint32_t block, uint64_t chunk) {
    return rmig__windows_add(&r->ws, w, &r->rs, &r->chunks[block], block, chunk * r->rs.chunk_size,
                             length_of_blocks(r->rs.chunk_size));
}

Test(regions, each_chunk_belongs_to_the_one_region_that_holds_it) {
    static struct registered r;
    for (unsigned run = 0; run < 200; run++) {
        uint64_t chunk = (uint64_t)RMIG_CHUNK_SIZE_MIN << below(4);
        registered(&r, chunk, 2);
        r.ws.longest = chunk * (1 + below(5));
        r.ws.version_1 = run % 2 == 0;
        struct rmig__window w = {0};
        for (unsigned block = 0; block < 2; block++)
            for (unsigned i = 0; i < 100; i++) {
                uint64_t at = i < 50 ? below(CHUNKS) : i - 50;
                if (rmig__regions_of(&r.rs, &r.chunks[block], at) == NULL)
                    cr_assert(window_takes(&r, &w, block, at));
            }
        for (unsigned block = 0; block < 2; block++) {
            uint64_t none = 0, held[CHUNKS] = {0};
            for (unsigned i = 0; i < CHUNKS; i++) {
                const struct rmig__region *of = rmig__regions_of(&r.rs, &r.chunks[block], i);
                none += of == NULL;
                cr_assert(of == NULL || (of->block == block && of->offset <= i * chunk &&
                                         i * chunk < of->offset + of->length && of->length <= r.ws.longest));
            }
            cr_assert_eq(none, r.chunks[block].unregistered);
            for (uint32_t i = 0; i < r.rs.count; i++) {
                uint64_t pieces = 0;
                for (uint32_t k = 0; k * r.rs.piece_bytes < r.region[i].length; k++)
                    pieces += rmig__regions_piece_length(&r.rs, &r.region[i], k);
                cr_assert_eq(pieces, r.region[i].length);
                if (r.region[i].block == block)
                    for (uint64_t at = r.region[i].offset; at < r.region[i].offset + r.region[i].length; at += chunk)
                        cr_assert_eq(++held[at / chunk], 1, "two regions hold a chunk");
            }
        }
    }
}

/* What stands in the reason: whatever size the sink's chunks have, no request that begins in a chunk asked for before
   reaches beyond it. */
Test(regions, a_request_of_version_1_stays_in_what_a_sink_may_have_registered) {
    static struct registered r;
    for (unsigned run = 0; run < 300; run++) {
        uint64_t chunk = RMIG_CHUNK_SIZE_MIN, begun[2 * CHUNKS], n = 0;
        registered(&r, chunk, 2);
        r.ws.version_1 = true;
        struct rmig__window w = {0};
        for (unsigned i = 0; i < 40; i++) {
            uint64_t first = below(CHUNKS), length = 1 + below(CHUNKS - first);
            uint32_t before = r.rs.count;
            for (uint64_t at = first; at < first + length && rmig__regions_of(&r.rs, &r.chunks[0], at) == NULL; at++)
                window_takes(&r, &w, 0, at);
            for (uint32_t k = before; k < r.rs.count; k++)
                for (uint64_t size = chunk; size <= RMIG_CHUNK_SIZE_MAX; size *= 2)
                    for (uint64_t j = 0; j < n; j++)
                        if (begun[j] / size == r.region[k].offset / size) {
                            uint64_t end = (r.region[k].offset / size + 1) * size;
                            cr_assert_leq(r.region[k].offset + r.region[k].length, end);
                        }
            for (uint32_t k = before; k < r.rs.count; k++)
                begun[n++] = r.region[k].offset;
        }
    }
}

Test(windows, one_is_filled_while_the_other_is_written) {
    static struct registered r;
    registered(&r, RMIG_MIB, 2);
    struct rmig__window *w = rmig__windows_open(&r.ws, r.rs.count);
    for (unsigned i = 0; i < 10; i++)
        cr_assert(window_takes(&r, w, 0, i));
    cr_expect_eq(w->count, 1, "chunks side by side are one region");
    cr_expect_eq(w->bytes, 10 * RMIG_MIB);
    w->state = RMIG__WINDOW_ANSWERED;
    cr_expect_not(rmig__windows_ready(&r.ws, &r.rs), "this end has registered nothing yet");
    w->local = w->count;
    cr_expect(rmig__windows_ready(&r.ws, &r.rs));
    cr_expect(r.region[0].ready && w->state == RMIG__WINDOW_READY);
    struct rmig__window *next = rmig__windows_open(&r.ws, r.rs.count);
    cr_expect(next != NULL && next->first == 1 && rmig__windows_find(&r.ws, RMIG__WINDOW_OPEN) == next);
    cr_expect_eq(rmig__windows_open(&r.ws, r.rs.count), NULL);
    cr_expect_not(rmig__windows_retire(&r.ws, (struct rmig__cursor){0, 10 * 256 - 1}, false));
    cr_expect(rmig__windows_retire(&r.ws, (struct rmig__cursor){0, 10 * 256}, false));
    cr_expect_eq(rmig__windows_find(&r.ws, RMIG__WINDOW_OPEN), &r.ws.window[0]);
    cr_expect_not(rmig__windows_retire(&r.ws, (struct rmig__cursor){2, 0}, true), "an open one is not used up");
}

Test(windows, in_lockstep_this_end_registers_after_the_sink) {
    for (unsigned max = 1; max <= 2; max++) {
        struct rmig__windows ws = {.max = max};
        struct rmig__window *w = rmig__windows_open(&ws, 0);
        const bool due[] = {false, false, max == 2, true, false};
        for (unsigned state = RMIG__WINDOW_OPEN; state <= RMIG__WINDOW_READY; state++) {
            w->state = (enum rmig__window_state)state;
            cr_expect_eq(rmig__windows_due(&ws, w), due[state], "state %u of %u windows", state, max);
        }
    }
}

Test(windows, a_full_one_takes_no_more) {
    static struct registered r;
    registered(&r, RMIG_MIB, 2);
    r.ws.bytes = 3 * RMIG_MIB;
    r.ws.regions = 2;
    struct rmig__window *w = rmig__windows_open(&r.ws, 0);
    cr_expect(window_takes(&r, w, 0, 1) && window_takes(&r, w, 0, 5));
    cr_expect_not(window_takes(&r, w, 0, 9), "a third region");
    cr_expect(window_takes(&r, w, 0, 6));
    cr_expect_not(window_takes(&r, w, 0, 7), "a fourth chunk");
    cr_expect_eq(r.chunks[0].unregistered, CHUNKS - 3);
    cr_expect(w->end.block == 0 && w->end.page == 7 * 256);
}

// >> hole

Test(hole, what_was_learned_is_forgotten_where_the_guest_may_have_written) {
    struct rmig__hole h = {.block = 3, .from = 100, .data = 200, .end = 300};
    cr_expect(rmig__hole_knows(&h, 3, 100) && rmig__hole_knows(&h, 3, 299));
    cr_expect_not(rmig__hole_knows(&h, 3, 99) || rmig__hole_knows(&h, 3, 300) || rmig__hole_knows(&h, 2, 100));
    rmig__hole_filled(&h, 2, 0, 1000);
    rmig__hole_filled(&h, 3, 0, 100);
    rmig__hole_filled(&h, 3, 200, 1000); // it counted as data already
    cr_expect(rmig__hole_knows(&h, 3, 100));
    rmig__hole_filled(&h, 3, 199, 200);
    cr_expect_not(rmig__hole_knows(&h, 3, 100));
}

// >> link

static const enum rmig_fabric_event_type link_events[] = {RMIG_FEV_RESOLVED,     RMIG_FEV_ESTABLISHED, RMIG_FEV_REJECTED,
                                                          RMIG_FEV_DISCONNECTED, RMIG_FEV_ERROR,       RMIG_FEV_RECV};

static void tell(struct rmig__link *l, enum rmig_fabric_event_type type, bool at_this_end, const char *text) {
    struct rmig_fabric_event e = {.type = type, .at_this_end = at_this_end, .text = text, .provider_code = (int)strlen(text)};
    rmig__link_event(l, &e);
}

/* What each event makes of each state that is not down, by hand. */
Test(link, each_event_has_its_state) {
    const enum rmig__link_state from[] = {RMIG__LINK_OPENING, RMIG__LINK_RESOLVED, RMIG__LINK_UP};
    const enum rmig__link_state to[3][6] = {
        {RMIG__LINK_RESOLVED, RMIG__LINK_UP, RMIG__LINK_REJECTED, RMIG__LINK_UNREACHED, RMIG__LINK_UNREACHED,
         RMIG__LINK_OPENING},
        {RMIG__LINK_RESOLVED, RMIG__LINK_UP, RMIG__LINK_REJECTED, RMIG__LINK_UNREACHED, RMIG__LINK_UNREACHED,
         RMIG__LINK_RESOLVED},
        {RMIG__LINK_UP, RMIG__LINK_UP, RMIG__LINK_LOST, RMIG__LINK_LEFT, RMIG__LINK_LOST, RMIG__LINK_UP}};
    for (unsigned i = 0; i < 3; i++)
        for (unsigned k = 0; k < 6; k++) {
            struct rmig__link l = {.state = from[i]};
            tell(&l, link_events[k], false, "why");
            cr_expect_eq(l.state, to[i][k], "state %u, event %u: %u", (unsigned)from[i], (unsigned)link_events[k],
                         (unsigned)l.state);
            cr_expect_str_eq(l.text, rmig__link_is_down(&l) ? "why" : "");
            l.state = from[i];
            tell(&l, RMIG_FEV_ERROR, true, "");
            cr_expect_eq(l.state, from[i] == RMIG__LINK_UP ? RMIG__LINK_LOST : RMIG__LINK_UNREACHED_HERE);
        }
}

Test(link, what_is_down_stays_down_and_says_why_it_went_down_first) {
    for (unsigned run = 0; run < 1000; run++) {
        struct rmig__link l = {RMIG__LINK_OPENING, 0, ""};
        bool was_down = false, was_up = false;
        char first[8] = "";
        for (unsigned i = 0; i < 20; i++) {
            enum rmig_fabric_event_type type = link_events[below(6)];
            char text[8];
            snprintf(text, sizeof text, "%u", i);
            was_up = was_up || (type == RMIG_FEV_ESTABLISHED && !was_down);
            tell(&l, type, below(2) == 0, text);
            cr_assert(!was_down || rmig__link_is_down(&l));
            if (rmig__link_is_down(&l) && !was_down)
                memcpy(first, text, sizeof first);
            was_down = rmig__link_is_down(&l);
            cr_assert_eq(rmig__link_was_up(&l), was_up);
            cr_assert_str_eq(l.text, first);
        }
    }
}

Test(link, a_rejection_gives_its_reason_behind_the_private_data) {
    uint8_t data[64] = {0, 0, 0, 1, 0, 0, 0, 0};
    memcpy(data + RMIG_PRIVATE_DATA_SIZE, "no room\nhere", 12);
    struct rmig_fabric_event e = {.type = RMIG_FEV_REJECTED, .text = "rejected", .private_data = data};
    struct rmig__link l = {RMIG__LINK_RESOLVED, 0, ""};
    rmig__link_event(&l, &e);
    cr_expect_str_eq(l.text, "rejected", "it came without private data");
    e.private_data_length = sizeof data;
    l.state = RMIG__LINK_RESOLVED;
    rmig__link_event(&l, &e);
    cr_expect(strstr(l.text, "rejected: no room") == l.text && strchr(l.text, '\n') == NULL, "%s", l.text);
    e.private_data_length = RMIG_PRIVATE_DATA_SIZE;
    l.state = RMIG__LINK_RESOLVED;
    rmig__link_event(&l, &e);
    cr_expect_str_eq(l.text, "rejected: it gave no reason; it may be busy with another source");
}

// >> grants

#define UNITS 48u
#define GRANTS (2 * 2 * UNITS + 2)

/* Two blocks of UNITS units each; which grants there are is known a second time: by slot. */
struct granted {
    struct rmig__grants gs;
    struct rmig__units units[2];
    struct {
        bool used;
        unsigned block;
        uint64_t from, to;
    } model[GRANTS];
};

static void granted(struct granted *t) {
    memset(t, 0, sizeof *t);
    t->gs.unit = 4 * PAGE;
    cr_assert(rmig__grants_begin(&t->gs, UNITS + UNITS, 2));
    cr_assert_eq(t->gs.capacity, GRANTS);
    t->units[0].grant = t->gs.units;
    t->units[1].grant = t->gs.units + UNITS;
}

/* What is added has its number for a key; the lowest slot that is free by the model must get it. */
static bool grant(struct granted *t, unsigned block, uint64_t from, uint64_t to) {
    uint32_t lowest = 0;
    while (lowest < GRANTS && t->model[lowest].used)
        lowest++;
    struct rmig__grant *slot = rmig__grants_slot(&t->gs);
    if (slot == NULL) {
        cr_assert_eq(lowest, GRANTS, "slot %u is free", lowest);
        return false;
    }
    cr_assert_eq(slot - t->gs.grant, lowest);
    slot->mr.key = lowest + 1;
    rmig__grants_add(&t->gs, &t->units[block], slot, from, to);
    t->model[lowest].used = true;
    t->model[lowest].block = block;
    t->model[lowest].from = from;
    t->model[lowest].to = to;
    return true;
}

static void withdraw(struct granted *t, struct rmig__grant *g) {
    uint32_t i = (uint32_t)(g - t->gs.grant);
    cr_assert(t->model[i].used && g->offset == t->model[i].from && g->offset + g->length == t->model[i].to);
    rmig__grants_remove(&t->gs, &t->units[t->model[i].block], g);
    t->model[i].used = false;
}

/* Each unit against the model, and the bytes. With `apart` no grants overlap. */
static void check_granted(const struct granted *t, bool apart) {
    for (unsigned b = 0; b < 2; b++) {
        uint64_t bytes = 0;
        for (uint32_t i = 0; i < GRANTS; i++)
            bytes += t->model[i].used && t->model[i].block == b ? t->model[i].to - t->model[i].from : 0;
        cr_assert_eq(t->units[b].granted, bytes);
        for (uint64_t at = 0; at < UNITS * t->gs.unit; at += t->gs.unit) {
            const struct rmig__grant *g = rmig__grants_of(&t->gs, &t->units[b], at);
            bool covered = false;
            for (uint32_t i = 0; i < GRANTS; i++)
                covered = covered || (t->model[i].used && t->model[i].block == b && t->model[i].from <= at &&
                                      at < t->model[i].to);
            cr_assert(g != NULL ? covered : !covered || !apart);
            if (g == NULL)
                continue;
            uint32_t i = (uint32_t)(g - t->gs.grant);
            cr_assert(t->model[i].used && t->model[i].block == b && t->model[i].from <= at && at < t->model[i].to);
            cr_assert_eq(g->mr.key, i + 1);
        }
    }
}

Test(grants, what_does_not_overlap_is_found_by_each_unit_and_its_slot_is_used_again) {
    for (unsigned run = 0; run < 50; run++) {
        static struct granted t;
        granted(&t);
        for (unsigned i = 0; i < 400; i++) {
            unsigned b = (unsigned)below(2);
            uint64_t from = below(UNITS), to = from + 1 + below(rmig__min(UNITS - from, 5));
            from *= t.gs.unit;
            to *= t.gs.unit;
            struct rmig__grant *first = NULL;
            for (uint64_t at = from; at < to && first == NULL; at += t.gs.unit)
                for (uint32_t k = 0; k < GRANTS; k++)
                    if (t.model[k].used && t.model[k].block == b && t.model[k].from <= at && at < t.model[k].to)
                        first = &t.gs.grant[k];
            cr_assert_eq(rmig__grants_overlapping(&t.gs, &t.units[b], from, to), first);
            bool inside = first != NULL && t.model[first - t.gs.grant].from <= from &&
                          to <= t.model[first - t.gs.grant].to;
            cr_assert_eq(rmig__grants_covering(&t.gs, &t.units[b], from, to), inside ? first : NULL);
            if (first == NULL)
                cr_assert(grant(&t, b, from, to));
            else if (below(2) == 0)
                withdraw(&t, first);
            check_granted(&t, true);
        }
        rmig__grants_end(&t.gs);
    }
}

/* As those of a version 1 source: they are only added, from anywhere to anywhere. */
Test(grants, of_those_that_overlap_a_unit_names_one_that_reaches_furthest) {
    for (unsigned run = 0; run < 50; run++) {
        static struct granted t;
        granted(&t);
        unsigned added = 0;
        for (;; added++) {
            unsigned b = (unsigned)below(2);
            uint64_t from = below(UNITS), to = from + 1 + below(UNITS - from);
            if (!grant(&t, b, from * t.gs.unit, to * t.gs.unit))
                break;
            cr_assert_not_null(rmig__grants_covering(&t.gs, &t.units[b], from * t.gs.unit, to * t.gs.unit));
            check_granted(&t, true);
            for (uint64_t at = 0; at < UNITS * t.gs.unit; at += t.gs.unit) {
                uint64_t furthest = 0;
                for (uint32_t k = 0; k < GRANTS; k++)
                    if (t.model[k].used && t.model[k].block == b && t.model[k].from <= at && at < t.model[k].to)
                        furthest = rmig__max(furthest, t.model[k].to);
                const struct rmig__grant *g = rmig__grants_of(&t.gs, &t.units[b], at);
                cr_assert_eq(g == NULL ? 0 : g->offset + g->length, furthest);
            }
        }
        cr_expect_eq(added, GRANTS);
        uint32_t gone = (uint32_t)below(GRANTS), before[2 * UNITS];
        memcpy(before, t.gs.units, sizeof before);
        withdraw(&t, &t.gs.grant[gone]);
        check_granted(&t, false);
        for (unsigned i = 0; i < 2 * UNITS; i++)
            cr_assert_eq(t.gs.units[i], before[i] == gone + 1 ? 0 : before[i], "what another covers stays its own");
        cr_expect(grant(&t, 0, 0, t.gs.unit), "the slot is free again");
        cr_expect_null(rmig__grants_slot(&t.gs));
        rmig__grants_end(&t.gs);
    }
}

Test(grants, the_newest_go_first_each_once) {
    static struct granted t;
    granted(&t);
    for (unsigned i = 0; i < UNITS; i++)
        cr_assert(grant(&t, i % 2, i * t.gs.unit, (i + 1) * t.gs.unit));
    for (unsigned i = 0; i < UNITS; i++)
        if (i % 3 == 2)
            withdraw(&t, &t.gs.grant[i]);
    for (unsigned i = UNITS; i-- > 0;)
        if (i % 3 != 2) {
            cr_expect_gt(t.gs.count, i);
            const struct rmig__grant *g = rmig__grants_pop(&t.gs);
            cr_assert(g == &t.gs.grant[i] && g->length == t.gs.unit && !g->used);
        }
    cr_expect_null(rmig__grants_pop(&t.gs));
    cr_expect_eq(t.gs.count, 0);
    cr_expect_eq(rmig__grants_slot(&t.gs), &t.gs.grant[0]);
    rmig__grants_end(&t.gs);
    cr_expect_eq(t.gs.capacity, 0, "there is no room before it begins");
}
