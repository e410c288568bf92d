/* A page that was zero when it was planned, or lay in a hole, is written and saved again in the same round: after every
   number of the engine's steps, what arrives must be what was saved last. Clearing is the sink's processor's work,
   writing is not: they may overtake each other. */
#define _GNU_SOURCE
#define RMIG_IMPLEMENTATION
#include "sim_fabric.h"

#include <criterion/criterion.h>
#include <sys/mman.h>

#define PAGE 4096u
#define STEPS 60u

struct world {
    struct sim *sim;
    struct rmig_source *source;
    struct rmig_sink *sink;
    uint8_t *from, *to;
    uint64_t length;
    bool finished;
};

static uint64_t sink_step(void *user, uint64_t now) {
    (void)now;
    struct world *w = user;
    struct rmig_sink_event ev;
    cr_assert_eq(rmig_sink_process(w->sink, &ev), RMIG_OK, "%s", rmig_sink_error(w->sink)->text);
    if (ev.type == RMIG_SINK_BLOCKS)
        cr_assert_eq(rmig_sink_accept_blocks(w->sink), RMIG_OK, "%s", rmig_sink_error(w->sink)->text);
    if (ev.type == RMIG_SINK_DISCONNECTED)
        cr_assert_eq(rmig_sink_complete(w->sink), RMIG_OK);
    if (ev.type == RMIG_SINK_TAKE)
        cr_assert_eq(rmig_sink_take(w->sink), RMIG_OK);
    w->finished = w->finished || ev.type == RMIG_SINK_FINISHED;
    return w->finished ? SIM_DONE : rmig_sink_next_deadline(w->sink);
}

static uint8_t *map(uint64_t length) {
    void *p = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    cr_assert_neq(p, MAP_FAILED);
    return p;
}

static void open_world(struct world *w, uint64_t length, bool v1, uint64_t sink_poll_ns, enum rmig_backing backing) {
    struct sim_config c;
    struct rmig_config cfg = {0};
    struct rmig_error err = {0};
    memset(w, 0, sizeof *w);
    sim_defaults(&c, SIM_ORDERED, 1);
    c.latency_ns = 5 * SIM_US;
    c.cpu[1].poll = sink_poll_ns;
    w->length = length;
    w->from = map(length);
    w->to = map(length);
    w->sim = sim_open(&c);
    cr_assert_eq(rmig_set_register_ahead(&cfg, 2 * RMIG_MIB, &err), RMIG_OK);
    cr_assert_eq(rmig_set_extension(&cfg, !v1, &err), RMIG_OK);
    cr_assert_eq(rmig_source_open(sim_fabric(w->sim, 0), &cfg, &w->source, &err), RMIG_OK);
    cr_assert_eq(rmig_sink_open(sim_fabric(w->sim, 1), NULL, &w->sink, &err), RMIG_OK);
    struct rmig_block_desc block = {.name = "ram", .host = w->from, .length = length, .backing = backing};
    cr_assert_eq(rmig_source_add_block(w->source, &block, NULL), RMIG_OK);
    block.host = w->to;
    cr_assert_eq(rmig_sink_add_block(w->sink, &block, NULL), RMIG_OK);
    cr_assert_eq(rmig_sink_listen(w->sink, "sink:1"), RMIG_OK);
    sim_actor(w->sim, 1, sink_step, w);
    cr_assert_eq(rmig_source_connect(w->source, "sink:1"), RMIG_OK);
    cr_assert_eq(rmig_source_begin_round(w->source), RMIG_OK);
}

static void save(struct world *w, uint64_t page, uint64_t pages) {
    cr_assert_eq(rmig_source_save_range(w->source, 0, page * PAGE, pages * PAGE), RMIG_OK);
}

/* Lets the engine run so many steps, each as soon as there is something for it. */
static void run(struct world *w, unsigned steps) {
    struct rmig_error err;
    for (unsigned i = 0; i < steps; i++) {
        cr_assert_eq(rmig_source_process(w->source), RMIG_OK, "%s", rmig_source_error(w->source)->text);
        uint64_t now = w->source->ss.fabric->ops->now(w->source->ss.fabric);
        uint64_t deadline = rmig_source_next_deadline(w->source);
        deadline = deadline < now + 20 * SIM_US ? deadline : now + 20 * SIM_US;
        w->source->ss.fabric->ops->wait(w->source->ss.fabric, &w->source->ss.ep, 1, deadline, &err);
    }
}

static void write_and_save(struct world *w, uint64_t page) {
    memset(w->from + page * PAGE, 9, PAGE);
    cr_assert_eq(rmig_source_save_page(w->source, 0, page * PAGE), RMIG_OK);
}

/* Pages that neither end ever touched are zero at both: faulting them in would be most of what this suite does. */
static void check_pages(const struct world *w, unsigned steps) {
    unsigned char from[16 * RMIG_MIB / PAGE], to[16 * RMIG_MIB / PAGE];
    cr_assert_leq(w->length / PAGE, sizeof from);
    cr_assert(mincore(w->from, w->length, from) == 0 && mincore(w->to, w->length, to) == 0);
    for (uint64_t page = 0; page < w->length / PAGE; page++)
        if (((from[page] | to[page]) & 1) != 0)
            cr_assert_eq(memcmp(w->from + page * PAGE, w->to + page * PAGE, PAGE), 0,
                         "page %llu is lost after %u steps", (unsigned long long)page, steps);
}

static void close_world(struct world *w, unsigned steps) {
    struct rmig_error err = {0};
    cr_assert_eq(rmig_source_end_round(w->source), RMIG_OK, "%s", rmig_source_error(w->source)->text);
    cr_assert_eq(rmig_source_finish(w->source), RMIG_OK, "%s", rmig_source_error(w->source)->text);
    cr_assert_eq(sim_run(w->sim, 100 * SIM_SECOND, &err), RMIG_OK, "%s", err.text);
    cr_assert(w->finished);
    check_pages(w, steps);
    rmig_source_close(w->source);
    rmig_sink_close(w->sink);
    sim_close(w->sim);
    munmap(w->from, w->length);
    munmap(w->to, w->length);
}

static const struct {
    bool v1;
    uint64_t sink_poll_ns;
} ways[] = {{false, 50}, {true, 50}, {false, 100000}, {true, 100000}};

#define EACH_WAY_AND_STEP(way, steps)                                                                                  \
    for (unsigned way = 0; way < 4; way++)                                                                             \
        for (unsigned steps = 0; steps < STEPS; steps++)

/* Each chunk has zero pages at its start and one that is not, apart from them: cleared and registered in one pass. */
Test(saved_again, while_its_clearing_waits_behind_the_registration_of_its_chunk) {
    EACH_WAY_AND_STEP(way, steps) {
        struct world w;
        open_world(&w, 16 * RMIG_MIB, ways[way].v1, ways[way].sink_poll_ns, RMIG_BACKING_UNKNOWN);
        for (uint64_t chunk = 0; chunk < 16; chunk++) {
            memset(w.from + chunk * RMIG_MIB + RMIG_MIB / 2, 7, PAGE);
            save(&w, chunk * 256, 16);
            save(&w, chunk * 256 + 128, 1);
        }
        run(&w, steps);
        write_and_save(&w, 256 + 5);
        write_and_save(&w, 15 * 256 + 15);
        close_world(&w, steps);
    }
}

/* The chunk has its keys already from a page saved before; the zero page was cleared before that. */
Test(saved_again, while_the_sink_has_yet_to_clear_it) {
    EACH_WAY_AND_STEP(way, steps) {
        struct world w;
        open_world(&w, 4 * RMIG_MIB, ways[way].v1, ways[way].sink_poll_ns, RMIG_BACKING_UNKNOWN);
        memset(w.from + 602 * PAGE, 7, PAGE);
        save(&w, 600, 1);
        save(&w, 602, 1);
        run(&w, steps);
        write_and_save(&w, 600);
        close_world(&w, steps);
    }
}

Test(saved_again, in_what_was_known_as_a_hole) {
    EACH_WAY_AND_STEP(way, steps) {
        struct world w;
        open_world(&w, 16 * RMIG_MIB, ways[way].v1, ways[way].sink_poll_ns, RMIG_BACKING_ANONYMOUS);
        w.from[8 * RMIG_MIB] = 1;
        save(&w, 0, w.length / PAGE);
        run(&w, steps);
        write_and_save(&w, 15 * 256);
        close_world(&w, steps);
    }
}
