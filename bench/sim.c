/* In the simulator, on a link of 100 Gb/s with 5 us round trip: the time to move 8 GiB with one request per chunk, as
   stock QEMU does (register-ahead 0), and with rmig's registration ahead of the wire; at two prices of a registration,
   at each side. One thread a side registers, posts and waits. The time is virtual: any machine gives the same.

   sim [DATA]     prints "name value unit"; DATA gets the table for bench/plot.gp. */
#define _GNU_SOURCE
#define RMIG_IMPLEMENTATION
#include "../tests/sim_fabric.h"

#include <sys/mman.h>

#define RAM_BYTES (8 * RMIG_GIB)

struct price {
    const char *name; // in the results
    uint64_t call_ns, mib_ns;
};

struct run {
    struct rmig_source *source;
    struct rmig_sink *sink;
    uint64_t begin, end;
    enum { CONNECTING, ROUND, FINISHING } stage;
};

static void die(const char *what, const char *why) {
    fprintf(stderr, "sim: %s: %s\n", what, why);
    exit(1);
}

static void check(struct run *r, int status) {
    if (status < 0)
        die("source", rmig_source_error(r->source)->text);
}

static uint64_t source_step(void *user, uint64_t now) {
    struct run *r = user;
    int status = rmig_source_process(r->source);
    check(r, status);
    if (status == RMIG_PENDING)
        return rmig_source_next_deadline(r->source);
    switch (r->stage) {
    case CONNECTING:
        r->begin = now;
        check(r, rmig_source_begin_round(r->source));
        check(r, rmig_source_save_range(r->source, 0, 0, RAM_BYTES));
        check(r, rmig_source_end_round_start(r->source));
        r->stage = ROUND;
        return 0;
    case ROUND:
        r->end = now;
        check(r, rmig_source_finish_start(r->source));
        r->stage = FINISHING;
        return 0;
    case FINISHING:
        break;
    }
    return SIM_DONE;
}

static uint64_t sink_step(void *user, uint64_t now) {
    (void)now;
    struct run *r = user;
    struct rmig_sink_event ev;
    if (rmig_sink_process(r->sink, &ev) != RMIG_OK ||
        (ev.type == RMIG_SINK_BLOCKS && rmig_sink_accept_blocks(r->sink) != RMIG_OK))
        die("sink", rmig_sink_error(r->sink)->text);
    return ev.type == RMIG_SINK_FINISHED ? SIM_DONE : rmig_sink_next_deadline(r->sink);
}

/* Virtual ns for one round over all of RAM. */
static uint64_t measure(void *ram, const struct price *price, uint64_t chunk, bool lockstep) {
    struct sim_config world;
    struct rmig_config cfg = {0};
    struct rmig_error err = {0};
    struct run r = {0};
    sim_defaults(&world, SIM_ORDERED, 1);
    world.latency_ns = 2500;
    world.bandwidth = 12500000000u;
    world.no_copy = true;
    for (unsigned i = 0; i < 2; i++) {
        world.cpu[i].reg_call = price->call_ns;
        world.cpu[i].reg_mib = price->mib_ns;
    }
    if (rmig_set_chunk_size(&cfg, chunk, &err) != RMIG_OK || rmig_set_zero_detect(&cfg, 0, &err) != RMIG_OK ||
        (lockstep && rmig_set_register_ahead(&cfg, 0, &err) != RMIG_OK))
        die("parameters", err.text);
    struct rmig_block_desc block = {.name = "ram", .host = ram, .length = RAM_BYTES};
    struct sim *sim = sim_open(&world);
    if (rmig_source_open(sim_fabric(sim, 0), &cfg, &r.source, &err) != RMIG_OK ||
        rmig_sink_open(sim_fabric(sim, 1), &cfg, &r.sink, &err) != RMIG_OK)
        die("open", err.text);
    if (rmig_sink_add_block(r.sink, &block, NULL) != RMIG_OK || rmig_sink_listen(r.sink, "sink:1") != RMIG_OK)
        die("sink", rmig_sink_error(r.sink)->text);
    check(&r, rmig_source_add_block(r.source, &block, NULL));
    check(&r, rmig_source_connect_start(r.source, "sink:1"));
    sim_actor(sim, 0, source_step, &r);
    sim_actor(sim, 1, sink_step, &r);
    if (sim_run(sim, 3600 * SIM_SECOND, &err) != RMIG_OK)
        die("run", err.text);
    rmig_source_close(r.source);
    rmig_sink_close(r.sink);
    if (sim_clean(sim, &err) != RMIG_OK || sim_stats(sim, 0)->bytes_written != RAM_BYTES)
        die("end", err.text);
    sim_close(sim);
    return r.end - r.begin;
}

int main(int argc, char **argv) {
    static const struct price prices[2] = {{"sim", 100 * SIM_US, 80 * SIM_US}, {"sim.costly", 2 * SIM_MS, 40 * SIM_US}};
    FILE *data = argc > 1 ? fopen(argv[1], "w") : NULL;
    if (argc > 1 && data == NULL)
        die(argv[1], "cannot be written");
    /* Never touched: the simulator moves no bytes here, it only checks where they would go. */
    void *ram = mmap(NULL, RAM_BYTES, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (ram == MAP_FAILED)
        die("mmap", "8 GiB of address space");
    double first[2] = {0};
    for (uint64_t mib = 1; mib <= 1024; mib *= 2) {
        if (data != NULL)
            fprintf(data, "%llu", (unsigned long long)mib);
        for (unsigned p = 0; p < 2; p++) {
            double lockstep = (double)measure(ram, &prices[p], mib * RMIG_MIB, true) / 1e9;
            double rmig = (double)measure(ram, &prices[p], mib * RMIG_MIB, false) / 1e9;
            printf("%s.lockstep_chunk%llum %.6f s\n", prices[p].name, (unsigned long long)mib, lockstep);
            printf("%s.rmig_chunk%llum %.6f s\n", prices[p].name, (unsigned long long)mib, rmig);
            if (data != NULL)
                fprintf(data, " %.6f %.6f", lockstep, rmig);
            if (mib == 1) {
                first[p] = rmig;
                printf("%s.lockstep_over_rmig_chunk1m %.4f ratio of times\n", prices[p].name, lockstep / rmig);
            }
            if (mib == 1024)
                printf("%s.chunk1m_over_chunk1g %.4f ratio of times\n", prices[p].name, first[p] / rmig);
        }
        if (data != NULL)
            fputc('\n', data);
    }
    if (data != NULL && fclose(data) != 0)
        die(argv[1], "cannot be written");
    return 0;
}
