/* What the core itself costs per dirty page: for callgrind, which counts the instructions below measured().

   core bitmap|page|range|alone     prints "pages N": pages saved in measured()

   2 GiB of RAM, all registered; runs of 64 dirty pages and 64 clean ones, not aligned to words or chunks, go the given
   way into the source and out as writes; "alone": every other page, by bitmap, so that each is a write of its own. The
   fabric is the simulator, but its writes complete at once and cost nothing. */
#define _GNU_SOURCE
#define RMIG_IMPLEMENTATION
#include "../tests/sim_fabric.h"

#include <sys/mman.h>

#define RAM_BYTES (2 * RMIG_GIB)
#define PAGES (RAM_BYTES / 4096)
#define RUN 64u

static struct rmig_fabric_ops ops; // the simulator's, but for writes
static const struct rmig_fabric_ops *sim_ops;
static uint64_t last_write, told_write, writes;

static int free_write(struct rmig_ep *ep, const struct rmig_write *batch, size_t n, struct rmig_error *err) {
    (void)ep;
    (void)err;
    last_write = batch[n - 1].id;
    writes += n;
    return (int)n;
}

static int free_poll(struct rmig_ep *ep, struct rmig_fabric_event *events, size_t n, struct rmig_error *err) {
    if (last_write == told_write)
        return sim_ops->poll(ep, events, n, err);
    memset(&events[0], 0, sizeof events[0]);
    events[0].type = RMIG_FEV_WRITE;
    events[0].id = told_write = last_write;
    return 1;
}

static void die(const char *why) {
    fprintf(stderr, "core: %s\n", why);
    exit(1);
}

static uint64_t sink_step(void *user, uint64_t now) {
    (void)now;
    struct rmig_sink *sink = user;
    struct rmig_sink_event ev;
    if (rmig_sink_process(sink, &ev) != RMIG_OK ||
        (ev.type == RMIG_SINK_BLOCKS && rmig_sink_accept_blocks(sink) != RMIG_OK))
        die(rmig_sink_error(sink)->text);
    return rmig_sink_next_deadline(sink);
}

static void check(struct rmig_source *s, int status) {
    if (status < 0)
        die(rmig_source_error(s)->text);
}

static uint64_t *bitmap;

/* Page i is dirty in every other run of that many pages; the first run begins at page 13. */
static bool is_dirty(uint64_t page, uint64_t run) { return page >= 13 && (page - 13) / run % 2 == 0; }

__attribute__((noinline)) void measured(struct rmig_source *s, char way);
__attribute__((noinline)) void measured(struct rmig_source *s, char way) {
    if (way == 'b' || way == 'a')
        check(s, rmig_source_save_bitmap(s, 0, bitmap, 0, PAGES));
    for (uint64_t page = 13; way == 'r' && page < PAGES; page += 2 * RUN)
        check(s, rmig_source_save_range(s, 0, page * 4096, (PAGES - page < RUN ? PAGES - page : RUN) * 4096));
    for (uint64_t page = 13; way == 'p' && page < PAGES; page += page % 128 == 12 + RUN ? RUN + 1 : 1)
        check(s, rmig_source_save_page(s, 0, page * 4096));
    struct rmig_stats stats;
    do {
        check(s, rmig_source_process(s));
        rmig_source_stats(s, &stats);
    } while (stats.bytes_pending > 0);
}

int main(int argc, char **argv) {
    struct sim_config world;
    struct rmig_config cfg = {0};
    struct rmig_error err = {0};
    struct rmig_source *source;
    struct rmig_sink *sink;
    struct rmig_block_desc block = {.name = "ram", .length = RAM_BYTES};
    if (argc != 2 || strchr("bpra", argv[1][0]) == NULL)
        die("usage: core bitmap|page|range|alone");
    sim_defaults(&world, SIM_ORDERED, 1);
    world.no_copy = true;
    struct sim *sim = sim_open(&world);
    struct rmig_fabric *fabric = sim_fabric(sim, 0);
    sim_ops = fabric->ops;
    ops = *sim_ops;
    ops.write = free_write;
    ops.poll = free_poll;
    fabric->ops = &ops;
    block.host = mmap(NULL, RAM_BYTES, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    bitmap = calloc(PAGES / 64, 8);
    if (block.host == MAP_FAILED || bitmap == NULL || rmig_set_zero_detect(&cfg, 0, &err) != RMIG_OK ||
        rmig_source_open(fabric, &cfg, &source, &err) != RMIG_OK ||
        rmig_sink_open(sim_fabric(sim, 1), &cfg, &sink, &err) != RMIG_OK)
        die("set-up failed");
    if (rmig_sink_add_block(sink, &block, NULL) != RMIG_OK || rmig_sink_listen(sink, "sink:1") != RMIG_OK)
        die(rmig_sink_error(sink)->text);
    sim_actor(sim, 1, sink_step, sink);
    check(source, rmig_source_add_block(source, &block, NULL));
    check(source, rmig_source_connect(source, "sink:1"));
    check(source, rmig_source_begin_round(source));
    check(source, rmig_source_save_range(source, 0, 0, RAM_BYTES));
    check(source, rmig_source_end_round(source));
    uint64_t pages = 0;
    for (uint64_t page = 0; page < PAGES; page++)
        if (is_dirty(page, argv[1][0] == 'a' ? 1 : RUN)) {
            bitmap[page / 64] |= (uint64_t)1 << (page % 64);
            pages++;
        }
    check(source, rmig_source_begin_round(source));
    struct rmig_stats before, after;
    rmig_source_stats(source, &before);
    measured(source, argv[1][0]);
    rmig_source_stats(source, &after);
    if (after.pages_written - before.pages_written != pages)
        die("not the pages that were dirty");
    printf("pages %llu\nwrites %llu\n", (unsigned long long)pages,
           (unsigned long long)(after.writes_posted - before.writes_posted));
    sim_actor(sim, 1, NULL, NULL);
    rmig_source_close(source);
    rmig_sink_close(sink);
    sim_close(sim);
    return 0;
}
