/* What may be outstanding on a link: enough that the wire never runs dry while an end registers, little enough that a
   message is never late, however slow the link is or becomes. In the simulator, where every message can be seen to
   queue behind writes. No byte is moved: the simulator only checks where they would go. */
#define _GNU_SOURCE
#define RMIG_IMPLEMENTATION
#include "sim_fabric.h"

#include <criterion/criterion.h>
#include <sys/mman.h>

struct link {
    uint64_t rate; // bytes per second
    uint64_t fall_ns, then; // the rate from that time on
    uint64_t ram;
    uint64_t chunk; // 0: as it comes
    uint64_t io_timeout; // of both ends; 0: as it comes
    uint64_t latency; // 0: as it comes
    uint64_t reg_call, reg_mib; // 0: as it comes
    uint64_t busy_ns; // what the source's embedder does besides, a turn, once it is connected
    enum sim_mode mode;
    bool version_1;
    bool not_local; // the source registers nothing
};

struct world {
    struct sim *sim;
    struct rmig_source *source;
    struct rmig_sink *sink;
    uint64_t ram, busy_ns;
    unsigned stage;
    uint64_t began, took; // the first round
    bool finished;
};

// --- between the core and the fabric

static struct rmig_fabric_ops watched;
static const struct rmig_fabric_ops *below;
static uint64_t settled_ns; // by then the link has been measured
static uint64_t longest_wait, settled_wait;

static int watch_send(struct rmig_ep *ep, const void *buf, uint64_t n, const struct rmig_mr *mr, uint64_t id,
                      struct rmig_error *err) {
    const struct sim_side *side = (const struct sim_side *)ep->fabric;
    uint64_t before = side->time;
    int status = below->send(ep, buf, n, mr, id, err);
    uint64_t wait = status == RMIG_OK && side->link_busy > before ? side->link_busy - before : 0;
    longest_wait = sim_max(longest_wait, wait);
    if (before >= settled_ns)
        settled_wait = sim_max(settled_wait, wait);
    return status;
}

// --- both ends

static int source_next(struct world *w, uint64_t now) {
    int status = RMIG_OK;
    switch (w->stage++) {
    case 0:
    case 2:
        w->began = now;
        status = rmig_source_begin_round(w->source);
        if (status == RMIG_OK)
            status = rmig_source_save_range(w->source, 0, 0, w->stage == 1 ? w->ram : w->ram / 8);
        return status == RMIG_OK ? rmig_source_end_round_start(w->source) : status;
    case 1:
        w->took = now - w->began;
        return RMIG_OK;
    case 3:
        return rmig_source_finish_start(w->source);
    default:
        w->finished = true;
        return RMIG_OK;
    }
}

static uint64_t source_step(void *user, uint64_t now) {
    struct world *w = user;
    int status = rmig_source_process(w->source);
    if (status == RMIG_OK)
        status = source_next(w, now);
    cr_assert_geq(status, 0, "at %.3f s: %s", (double)now / 1e9, rmig_source_error(w->source)->text);
    if (w->stage > 0)
        w->sim->side[0].time += w->busy_ns;
    return w->finished ? SIM_DONE : status == RMIG_OK ? 0 : rmig_source_next_deadline(w->source);
}

static uint64_t sink_step(void *user, uint64_t now) {
    struct world *w = user;
    struct rmig_sink_event ev;
    int status = rmig_sink_process(w->sink, &ev);
    if (status == RMIG_OK && ev.type == RMIG_SINK_BLOCKS)
        status = rmig_sink_accept_blocks(w->sink);
    if (status == RMIG_OK && ev.type == RMIG_SINK_DISCONNECTED)
        status = rmig_sink_complete(w->sink);
    cr_assert_geq(status, 0, "at %.3f s: %s", (double)now / 1e9, rmig_sink_error(w->sink)->text);
    return ev.type == RMIG_SINK_FINISHED ? SIM_DONE : rmig_sink_next_deadline(w->sink);
}

static void configure(const struct link *l, struct sim_config *world, struct rmig_config *cfg) {
    struct rmig_error err = {0};
    sim_defaults(world, l->mode, 7);
    world->no_copy = true;
    world->local_mr = !l->not_local;
    world->bandwidth = l->rate;
    world->change_ns = l->fall_ns;
    world->changed_bandwidth = l->then;
    world->latency_ns = l->latency != 0 ? l->latency : world->latency_ns;
    for (unsigned i = 0; i < 2 && l->reg_mib != 0; i++) {
        world->cpu[i].reg_call = l->reg_call;
        world->cpu[i].reg_mib = l->reg_mib;
    }
    int status = rmig_set_zero_detect(cfg, 0, &err);
    if (status == RMIG_OK && l->chunk != 0)
        status = rmig_set_chunk_size(cfg, l->chunk, &err);
    if (status == RMIG_OK && l->io_timeout != 0)
        status = rmig_set_io_timeout(cfg, l->io_timeout, &err);
    if (status == RMIG_OK && l->version_1)
        status = rmig_set_extension(cfg, 0, &err);
    cr_assert_eq(status, RMIG_OK, "%s", err.text);
    (void)rmig_set_param(cfg, "auto-take", "on", NULL);
}

/* Two rounds over the link, and the handover. Virtual ns of the first. */
static uint64_t migrate(const struct link *l) {
    struct sim_config world;
    struct rmig_config cfg = {0};
    struct rmig_error err = {0};
    struct world w = {.ram = l->ram, .busy_ns = l->busy_ns};
    configure(l, &world, &cfg);
    void *ram = mmap(NULL, l->ram, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    cr_assert_neq(ram, MAP_FAILED);
    struct rmig_block_desc block = {.name = "ram", .host = ram, .length = l->ram};
    w.sim = sim_open(&world);
    longest_wait = settled_wait = 0;
    settled_ns = l->fall_ns + 8 * SIM_SECOND;
    below = sim_fabric(w.sim, 0)->ops;
    watched = *below;
    watched.send = watch_send;
    sim_fabric(w.sim, 0)->ops = &watched;
    cr_assert_eq(rmig_source_open(sim_fabric(w.sim, 0), &cfg, &w.source, &err), RMIG_OK, "%s", err.text);
    cr_assert_eq(rmig_sink_open(sim_fabric(w.sim, 1), &cfg, &w.sink, &err), RMIG_OK, "%s", err.text);
    cr_assert_eq(rmig_source_add_block(w.source, &block, NULL), RMIG_OK);
    cr_assert_eq(rmig_sink_add_block(w.sink, &block, NULL), RMIG_OK);
    cr_assert_eq(rmig_sink_listen(w.sink, "sink:1"), RMIG_OK);
    cr_assert_eq(rmig_source_connect_start(w.source, "sink:1"), RMIG_OK);
    sim_actor(w.sim, 0, source_step, &w);
    sim_actor(w.sim, 1, sink_step, &w);
    cr_assert_eq(sim_run(w.sim, 100000 * SIM_SECOND, &err), RMIG_OK, "%s", err.text);
    cr_assert(w.finished);
    rmig_source_close(w.source);
    rmig_sink_close(w.sink);
    cr_assert_eq(sim_clean(w.sim, &err), RMIG_OK, "%s", err.text);
    sim_close(w.sim);
    munmap(ram, l->ram);
    return w.took;
}

/* No end gives up, no message is late (nor slow once the link is known), and the wire is kept busy to within `over`. */
static void holds(const struct link *l, double over) {
    uint64_t idle = l->io_timeout != 0 ? l->io_timeout : 30 * SIM_SECOND, took = migrate(l);
    uint64_t fast = l->fall_ns == 0 ? l->ram : 0; // with a fall: nothing is asked of the time
    double wire = (double)fast / (double)l->rate * 1e9;
    cr_expect_leq(longest_wait, idle / 4, "%llu bytes/s, chunk %llu: a message waited %.3f s of %.3f",
                  (unsigned long long)l->rate, (unsigned long long)l->chunk, (double)longest_wait / 1e9,
                  (double)idle / 4e9);
    cr_expect_leq(settled_wait, SIM_SECOND, "%llu bytes/s, chunk %llu: a message waited %.3f s on a link that is known",
                  (unsigned long long)l->rate, (unsigned long long)l->chunk, (double)settled_wait / 1e9);
    cr_expect(fast == 0 || (double)took <= over * wire, "%llu bytes/s, chunk %llu: %.4f s, %.4f of the wire's",
              (unsigned long long)l->rate, (unsigned long long)l->chunk, (double)took / 1e9, (double)took / wire);
}

#define MB ((uint64_t)1000000)
#define GB ((uint64_t)1000000000)

static const uint64_t chunks[] = {RMIG_MIB, 64 * RMIG_MIB, RMIG_GIB};

Test(links, at_10_megabytes_a_second_messages_are_in_time_and_the_wire_is_busy) {
    for (unsigned i = 0; i < 3; i++)
        holds(&(struct link){.rate = 10 * MB, .ram = RMIG_GIB, .chunk = chunks[i]}, 1.02);
}

Test(links, at_100_megabytes_a_second_messages_are_in_time_and_the_wire_is_busy) {
    for (unsigned i = 0; i < 3; i++)
        holds(&(struct link){.rate = 100 * MB, .ram = 2 * RMIG_GIB, .chunk = chunks[i]}, 1.02);
}

/* A registration costs what the wire takes for the same bytes, almost. */
Test(links, at_100_gigabits_messages_are_in_time_and_the_wire_is_busy) {
    for (unsigned i = 0; i < 3; i++) {
        struct link l = {.rate = 12500 * MB, .ram = 8 * RMIG_GIB, .chunk = chunks[i], .reg_call = 100 * SIM_US};
        double over = i < 2 ? 1.02 : 1.13; // the first registration of 1 GiB alone is 82 ms
        l.reg_mib = 80 * SIM_US;
        holds(&l, over);
        l.mode = SIM_LOCAL;
        holds(&l, over);
        l.mode = SIM_UNORDERED;
        holds(&l, over);
    }
}

Test(links, at_400_gigabits_messages_are_in_time_and_the_wire_is_busy) {
    for (unsigned i = 0; i < 2; i++) {
        struct link l = {.rate = 50 * GB, .ram = 8 * RMIG_GIB, .chunk = chunks[i], .reg_call = 20 * SIM_US};
        l.reg_mib = 5 * SIM_US;
        holds(&l, 1.02);
    }
}

/* At any moment of the engine's life: while it fills the wire, registers, asks, or has just begun. */
Test(links, a_fall_to_10_megabytes_a_second_makes_no_message_late_whenever_it_comes) {
    for (unsigned i = 0; i < 3; i++)
        for (uint64_t at = 100 * SIM_US; at < 100 * SIM_MS; at += at / 2) {
            struct link l = {.rate = 12500 * MB, .then = 10 * MB, .fall_ns = at, .ram = 2 * RMIG_GIB};
            l.chunk = chunks[i];
            holds(&l, 0);
            l.reg_call = 100 * SIM_US;
            l.reg_mib = 80 * SIM_US;
            holds(&l, 0);
        }
}

Test(links, a_fall_makes_no_message_late_for_version_1_nor_where_a_completion_says_little) {
    for (uint64_t at = 10 * SIM_MS; at < 80 * SIM_MS; at += 7 * SIM_MS) {
        struct link l = {.rate = 12500 * MB, .then = 10 * MB, .fall_ns = at, .ram = RMIG_GIB};
        l.version_1 = true;
        holds(&l, 0);
        l.version_1 = false;
        l.mode = SIM_LOCAL;
        holds(&l, 0);
    }
}

Test(links, a_fall_from_400_gigabits_makes_no_message_late) {
    for (uint64_t at = SIM_MS; at < 40 * SIM_MS; at += 3 * SIM_MS) {
        struct link l = {.rate = 50 * GB, .then = 10 * MB, .fall_ns = at, .ram = 2 * RMIG_GIB, .reg_call = 20 * SIM_US};
        l.reg_mib = 5 * SIM_US;
        holds(&l, 0);
    }
}

/* The less patient the peer, the less may be outstanding. */
Test(links, a_short_io_timeout_holds_too) {
    for (uint64_t s = 1; s <= 8; s *= 2) {
        struct link l = {.rate = 10 * MB, .ram = 256 * RMIG_MIB, .io_timeout = s * SIM_SECOND};
        holds(&l, 1.05);
        struct link fall = {.rate = 12500 * MB, .then = 10 * MB, .fall_ns = 20 * SIM_MS, .ram = RMIG_GIB};
        fall.io_timeout = s * SIM_SECOND;
        holds(&fall, 0);
    }
}

/* Where nothing is registered slowly but the embedder comes only now and then. */
Test(links, an_end_that_is_away_for_other_reasons_keeps_the_wire_busy) {
    for (uint64_t away = 100 * SIM_US; away <= 3 * SIM_MS; away *= 3) {
        struct link l = {.rate = 12500 * MB, .ram = 16 * RMIG_GIB, .busy_ns = away, .chunk = 64 * RMIG_MIB};
        holds(&l, 1.25);
        l.not_local = true;
        holds(&l, 1.25);
    }
}

/* The link alone bounds a round, whatever its latency: slow start is over after a few round trips. */
Test(links, a_long_way_is_filled) {
    holds(&(struct link){.rate = 12500 * MB, .ram = 16 * RMIG_GIB, .latency = 250 * SIM_US, .chunk = 64 * RMIG_MIB},
          1.15);
    holds(&(struct link){.rate = 1250 * MB, .ram = 8 * RMIG_GIB, .latency = 5 * SIM_MS, .chunk = 64 * RMIG_MIB}, 1.15);
}

/* And when the link comes back it is used again. */
Test(links, a_rise_is_followed) {
    struct link l = {.rate = 10 * MB, .then = 12500 * MB, .fall_ns = 5 * SIM_SECOND, .ram = 8 * RMIG_GIB};
    uint64_t took = migrate(&l);
    cr_expect_leq(took, 5 * SIM_SECOND + 900 * SIM_MS, "%.3f s", (double)took / 1e9);
}
