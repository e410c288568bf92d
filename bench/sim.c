/* What a migration takes in the simulator. The time is virtual: any machine gives the same to the nanosecond. One
   thread a side registers, posts and waits.

   sim DATA      the table for bench/figure.awk: 8 GiB at 100 Gb/s by chunk size, with one request per chunk, as stock QEMU
                 does (register-ahead 0), and with rmig's registration ahead of the wire, at two prices of a
   registration sim costs     prints "name value unit" for bench/costs.sh */
#define _GNU_SOURCE
#define RMIG_IMPLEMENTATION
#include "../tests/sim_fabric.h"

#include <sys/mman.h>

struct link {
    const char *name; // in the results
    uint64_t rate; // bytes per second
    uint64_t reg_call, reg_mib; // a registration, ns: the call, and per MiB
};

/* At 5 us round trip. Deregistering costs what sim_defaults says. */
static const struct link links[3] = {
    {"sim.link100", 12500000000u, 100 * SIM_US, 80 * SIM_US},
    {"sim.costly.link100", 12500000000u, 2 * SIM_MS, 40 * SIM_US},
    {"sim.huge.link400", 50000000000u, 20 * SIM_US, 5 * SIM_US}, // huge pages
};

struct side { // the most that one call of process did
    uint64_t calls, ns; // of the fabric; of virtual time
};

struct run {
    struct sim *sim;
    struct rmig_source *source;
    struct rmig_sink *sink;
    uint64_t ram;
    enum { CONNECTING, ROUND, FINISHING } stage;
    uint64_t round_began, round_ns, finish_began, handover_ns;
    struct side most[2];
};

struct result {
    uint64_t round_ns, handover_ns, messages, registrations, pinned;
    struct side most[2];
};

static void die(const char *what, const char *why) {
    fprintf(stderr, "sim: %s: %s\n", what, why);
    exit(1);
}

static void check(struct run *r, int status) {
    if (status < 0)
        die("source", rmig_source_error(r->source)->text);
}

/* Calls of the fabric so far: a batch of writes is one. */
static uint64_t calls(const struct sim_stats *st) {
    uint64_t n = st->batches;
    for (unsigned op = 0; op < SIM_OP_COUNT; op++)
        n += op == SIM_WRITE ? 0 : st->ops[op];
    return n;
}

/* What one process did, from `before` and `began` on. */
static void note(struct run *r, unsigned i, uint64_t before, uint64_t began) {
    r->most[i].calls = sim_max(r->most[i].calls, calls(sim_stats(r->sim, i)) - before);
    r->most[i].ns = sim_max(r->most[i].ns, r->sim->side[i].time - began);
}

static uint64_t source_step(void *user, uint64_t now) {
    struct run *r = user;
    uint64_t before = calls(sim_stats(r->sim, 0));
    int status = rmig_source_process(r->source);
    check(r, status);
    note(r, 0, before, now);
    if (status == RMIG_PENDING)
        return rmig_source_next_deadline(r->source);
    now = r->sim->side[0].time;
    switch (r->stage) {
    case CONNECTING:
        r->round_began = now;
        check(r, rmig_source_begin_round(r->source));
        check(r, rmig_source_save_range(r->source, 0, 0, r->ram));
        check(r, rmig_source_end_round_start(r->source));
        r->stage = ROUND;
        return 0;
    case ROUND:
        r->round_ns = now - r->round_began;
        r->finish_began = now;
        check(r, rmig_source_finish_start(r->source));
        r->stage = FINISHING;
        return 0;
    case FINISHING:
        r->handover_ns = now - r->finish_began;
        break;
    }
    return SIM_DONE;
}

static uint64_t sink_step(void *user, uint64_t now) {
    struct run *r = user;
    struct rmig_sink_event ev;
    uint64_t before = calls(sim_stats(r->sim, 1));
    int status = rmig_sink_process(r->sink, &ev);
    note(r, 1, before, now);
    if (status == RMIG_OK && ev.type == RMIG_SINK_BLOCKS)
        status = rmig_sink_accept_blocks(r->sink);
    if (status == RMIG_OK && ev.type == RMIG_SINK_TAKE)
        status = rmig_sink_take(r->sink);
    if (status != RMIG_OK)
        die("sink", rmig_sink_error(r->sink)->text);
    return ev.type == RMIG_SINK_FINISHED ? SIM_DONE : rmig_sink_next_deadline(r->sink);
}

static void open_both(struct run *r, const struct rmig_config *cfg, struct rmig_block_desc *block) {
    struct rmig_error err = {0};
    if (rmig_source_open(sim_fabric(r->sim, 0), cfg, &r->source, &err) != RMIG_OK ||
        rmig_sink_open(sim_fabric(r->sim, 1), cfg, &r->sink, &err) != RMIG_OK)
        die("open", err.text);
    if (rmig_sink_add_block(r->sink, block, NULL) != RMIG_OK || rmig_sink_listen(r->sink, "sink:1") != RMIG_OK)
        die("sink", rmig_sink_error(r->sink)->text);
    check(r, rmig_source_add_block(r->source, block, NULL));
    check(r, rmig_source_connect_start(r->source, "sink:1"));
}

/* One round over all of RAM and the handover. */
static struct result measure(const struct link *link, uint64_t ram, uint64_t chunk, bool lockstep) {
    struct sim_config world;
    struct rmig_config cfg = {0};
    struct rmig_error err = {0};
    struct run r = {.ram = ram};
    struct result result = {0};
    sim_defaults(&world, SIM_ORDERED, 1);
    world.latency_ns = 2500;
    world.bandwidth = link->rate;
    world.no_copy = true;
    for (unsigned i = 0; i < 2; i++) {
        world.cpu[i].reg_call = link->reg_call;
        world.cpu[i].reg_mib = link->reg_mib;
    }
    if (rmig_set_chunk_size(&cfg, chunk, &err) != RMIG_OK || rmig_set_zero_detect(&cfg, 0, &err) != RMIG_OK ||
        (lockstep && rmig_set_register_ahead(&cfg, 0, &err) != RMIG_OK))
        die("parameters", err.text);
    /* Never touched: the simulator moves no bytes here, it only checks where they would go. */
    struct rmig_block_desc block = {.name = "ram", .length = ram};
    block.host = mmap(NULL, ram, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (block.host == MAP_FAILED)
        die("mmap", "no such address space");
    r.sim = sim_open(&world);
    open_both(&r, &cfg, &block);
    sim_actor(r.sim, 0, source_step, &r);
    sim_actor(r.sim, 1, sink_step, &r);
    if (sim_run(r.sim, 36000 * SIM_SECOND, &err) != RMIG_OK)
        die("run", err.text);
    struct rmig_stats source, sink;
    rmig_source_stats(r.source, &source);
    rmig_sink_stats(r.sink, &sink);
    result.round_ns = r.round_ns;
    result.handover_ns = r.handover_ns;
    result.messages = source.control_sent + sink.control_sent;
    result.registrations = source.registrations + sink.registrations;
    result.pinned = sim_max(sim_stats(r.sim, 0)->registered_peak, sim_stats(r.sim, 1)->registered_peak);
    memcpy(result.most, r.most, sizeof r.most);
    rmig_source_close(r.source);
    rmig_sink_close(r.sink);
    if (sim_clean(r.sim, &err) != RMIG_OK || sim_stats(r.sim, 0)->bytes_written != ram)
        die("end", err.text);
    sim_close(r.sim);
    munmap(block.host, ram);
    return result;
}

#define RAM_BYTES (8 * RMIG_GIB)

static void table(const char *path) {
    FILE *data = fopen(path, "w");
    if (data == NULL)
        die(path, "cannot be written");
    for (uint64_t mib = 1; mib <= 1024; mib *= 2) {
        fprintf(data, "%llu", (unsigned long long)mib);
        for (unsigned i = 0; i < 2; i++)
            fprintf(data, " %.6f %.6f", (double)measure(&links[i], RAM_BYTES, mib * RMIG_MIB, true).round_ns / 1e9,
                    (double)measure(&links[i], RAM_BYTES, mib * RMIG_MIB, false).round_ns / 1e9);
        fputc('\n', data);
    }
    if (fclose(data) != 0)
        die(path, "cannot be written");
}

static void times_over_the_wire(const struct link *link) {
    static const struct {
        const char *name;
        uint64_t bytes;
    } chunks[4] = {{"1m", RMIG_MIB}, {"64m", 64 * RMIG_MIB}, {"256m", 256 * RMIG_MIB}, {"1g", RMIG_GIB}};
    double wire = (double)RAM_BYTES / (double)link->rate * 1e9;
    for (unsigned i = 0; i < 4; i++)
        printf("%s.chunk%s_over_wire %.5f ratio of times\n", link->name, chunks[i].name,
               (double)measure(link, RAM_BYTES, chunks[i].bytes, false).round_ns / wire);
}

static void costs(void) {
    for (unsigned i = 0; i < 3; i++)
        times_over_the_wire(&links[i]);
    struct result one = measure(&links[0], RAM_BYTES, RMIG_MIB, false);
    uint64_t lockstep[2], ahead = one.round_ns;
    for (unsigned i = 0; i < 2; i++)
        lockstep[i] = measure(&links[i], RAM_BYTES, RMIG_MIB, true).round_ns;
    printf("sim.link100.lockstep_over_rmig_chunk1m %.4f ratio of times\n", (double)lockstep[0] / (double)ahead);
    printf("sim.link100.lockstep_chunk1m_s %.4f s\n", (double)lockstep[0] / 1e9);
    printf("sim.costly.link100.lockstep_chunk1m_s %.4f s\n", (double)lockstep[1] / 1e9);
    printf("sim.link100.messages_8gib %llu messages\n", (unsigned long long)one.messages);
    printf("sim.link100.registrations_8gib %llu registrations\n", (unsigned long long)one.registrations);
    printf("sim.link100.pinned_peak_8gib %llu bytes\n", (unsigned long long)one.pinned);
    printf("sim.source.process_calls_max %llu calls of the fabric\n", (unsigned long long)one.most[0].calls);
    printf("sim.source.process_ns_max %llu ns\n", (unsigned long long)one.most[0].ns);
    printf("sim.sink.process_calls_max %llu calls of the fabric\n", (unsigned long long)one.most[1].calls);
    printf("sim.sink.process_ns_max %llu ns\n", (unsigned long long)one.most[1].ns);
    printf("sim.handover_ns_64gib %llu ns\n",
           (unsigned long long)measure(&links[0], 64 * RMIG_GIB, RMIG_MIB, false).handover_ns);
    printf("sim.handover_ns_1tib %llu ns\n",
           (unsigned long long)measure(&links[0], 1024 * RMIG_GIB, RMIG_MIB, false).handover_ns);
}

int main(int argc, char **argv) {
    if (argc != 2)
        die("usage", "sim DATA|costs");
    if (strcmp(argv[1], "costs") == 0)
        costs();
    else
        table(argv[1]);
    return 0;
}
