/* Memory that somebody's userfaultfd still fills in, migrated with the backing that it rightly has: what has not come yet
   looks like a hole, and must arrive as what it will be. */
#define _GNU_SOURCE
#define RMIG_IMPLEMENTATION
#include "sim_fabric.h"

#include <criterion/criterion.h>
#include <poll.h>
#include <pthread.h>
#include <sys/mman.h>

#define PAGE ((uint64_t)4096)
#define LENGTH (4 * RMIG_MIB)

/* Puts a page there whenever one is touched: its number in each of its words. */
struct pager {
    int fd;
    pthread_t thread;
    uint8_t *memory;
    volatile bool stop;
};

static void content(uint64_t page, uint64_t *out) {
    for (uint64_t i = 0; i < PAGE / sizeof *out; i++)
        out[i] = page + 1;
}

static void *serve(void *user) {
    struct pager *p = user;
    uint64_t page[PAGE / 8];
    while (!p->stop) {
        struct pollfd ready = {p->fd, POLLIN, 0};
        struct uffd_msg message;
        if (poll(&ready, 1, 20) <= 0 || read(p->fd, &message, sizeof message) != sizeof message)
            continue;
        uint64_t at = message.arg.pagefault.address / PAGE * PAGE;
        content((at - (uint64_t)(uintptr_t)p->memory) / PAGE, page);
        struct uffdio_copy copy = {.dst = at, .src = (uint64_t)(uintptr_t)page, .len = PAGE};
        ioctl(p->fd, UFFDIO_COPY, &copy);
    }
    return NULL;
}

static void begin_loading(struct pager *p, uint8_t *memory) {
    struct uffdio_api api = {.api = UFFD_API};
    struct uffdio_register range = {.range = {(uint64_t)(uintptr_t)memory, LENGTH},
                                    .mode = UFFDIO_REGISTER_MODE_MISSING};
    p->memory = memory;
    p->stop = false;
    p->fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | 1); // UFFD_USER_MODE_ONLY
    if (p->fd < 0 || ioctl(p->fd, UFFDIO_API, &api) != 0 || ioctl(p->fd, UFFDIO_REGISTER, &range) != 0)
        cr_skip("no userfaultfd here");
    cr_assert_eq(pthread_create(&p->thread, NULL, serve, p), 0);
}

static void end_loading(struct pager *p) {
    p->stop = true;
    pthread_join(p->thread, NULL);
    close(p->fd);
}

struct world {
    struct sim *sim;
    struct rmig_source *source;
    struct rmig_sink *sink;
    uint8_t *from, *to;
    int fd; // of the memory; -1: private
    bool finished;
};

static uint64_t sink_step(void *user, uint64_t now) {
    (void)now;
    struct world *w = user;
    struct rmig_sink_event ev;
    cr_assert_eq(rmig_sink_process(w->sink, &ev), RMIG_OK, "%s", rmig_sink_error(w->sink)->text);
    if (ev.type == RMIG_SINK_BLOCKS)
        cr_assert_eq(rmig_sink_accept_blocks(w->sink), RMIG_OK, "%s", rmig_sink_error(w->sink)->text);
    if (ev.type == RMIG_SINK_TAKE)
        cr_assert_eq(rmig_sink_take(w->sink), RMIG_OK);
    w->finished = w->finished || ev.type == RMIG_SINK_FINISHED;
    return w->finished ? SIM_DONE : rmig_sink_next_deadline(w->sink);
}

static uint8_t *map(int fd) {
    void *p = mmap(NULL, LENGTH, PROT_READ | PROT_WRITE, fd < 0 ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_SHARED, fd, 0);
    cr_assert_neq(p, MAP_FAILED);
    return p;
}

static void open_world(struct world *w, bool shared) {
    struct sim_config c;
    struct rmig_error err = {0};
    memset(w, 0, sizeof *w);
    sim_defaults(&c, SIM_ORDERED, 1);
    w->sim = sim_open(&c);
    w->fd = shared ? memfd_create("still_loading", MFD_CLOEXEC) : -1;
    cr_assert(!shared || ftruncate(w->fd, (off_t)LENGTH) == 0);
    w->from = map(w->fd);
    w->to = map(-1);
    cr_assert_eq(rmig_source_open(sim_fabric(w->sim, 0), NULL, &w->source, &err), RMIG_OK);
    cr_assert_eq(rmig_sink_open(sim_fabric(w->sim, 1), NULL, &w->sink, &err), RMIG_OK);
    struct rmig_block_desc block = {.name = "ram", .host = w->from, .length = LENGTH, .fd = w->fd};
    block.backing = shared ? RMIG_BACKING_SHARED_FD : RMIG_BACKING_ANONYMOUS;
    cr_assert_eq(rmig_source_add_block(w->source, &block, NULL), RMIG_OK);
    block.host = w->to;
    block.backing = RMIG_BACKING_ANONYMOUS;
    cr_assert_eq(rmig_sink_add_block(w->sink, &block, NULL), RMIG_OK);
    cr_assert_eq(rmig_sink_listen(w->sink, "sink:1"), RMIG_OK);
    sim_actor(w->sim, 1, sink_step, w);
    cr_assert_eq(rmig_source_connect(w->source, "sink:1"), RMIG_OK);
}

static void one_round(struct world *w) {
    cr_assert_eq(rmig_source_begin_round(w->source), RMIG_OK);
    cr_assert_eq(rmig_source_save_range(w->source, 0, 0, LENGTH), RMIG_OK);
    cr_assert_eq(rmig_source_end_round(w->source), RMIG_OK, "%s", rmig_source_error(w->source)->text);
}

static void close_world(struct world *w) {
    struct rmig_error err = {0};
    uint64_t want[PAGE / 8];
    cr_assert_eq(rmig_source_finish(w->source), RMIG_OK, "%s", rmig_source_error(w->source)->text);
    cr_assert_eq(sim_run(w->sim, 100 * SIM_SECOND, &err), RMIG_OK, "%s", err.text);
    cr_assert(w->finished);
    for (uint64_t page = 0; page < LENGTH / PAGE; page++) {
        content(page, want);
        cr_assert_eq(memcmp(w->to + page * PAGE, want, PAGE), 0, "page %llu is lost", (unsigned long long)page);
    }
    rmig_source_close(w->source);
    rmig_sink_close(w->sink);
    sim_close(w->sim);
    munmap(w->from, LENGTH);
    munmap(w->to, LENGTH);
    if (w->fd >= 0)
        close(w->fd);
}

/* before: rounds in which it was memory like any other, untouched. */
static void migrate(bool shared, unsigned before) {
    struct world w;
    struct pager p;
    open_world(&w, shared);
    for (unsigned i = 0; i < before; i++)
        one_round(&w);
    begin_loading(&p, w.from);
    one_round(&w);
    end_loading(&p);
    close_world(&w);
}

Test(still_loading, private_memory_arrives, .timeout = 600) { migrate(false, 0); }
Test(still_loading, shared_memory_arrives, .timeout = 600) { migrate(true, 0); }
Test(still_loading, private_memory_whose_loading_began_between_rounds, .timeout = 600) { migrate(false, 2); }
Test(still_loading, shared_memory_whose_loading_began_between_rounds, .timeout = 600) { migrate(true, 2); }
