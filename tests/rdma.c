/* Whole sessions over verbs with both ends in this process: what the device holds for it when they are closed, however
   they ended, and memory behind a dma-buf. With RMIG_TEST_ADDR (an address of this host's on an RDMA interface,
   RMIG_TEST_DEVICE its device); without, all but one test is skipped. */
#define _GNU_SOURCE
#define RMIG_IMPLEMENTATION
#include "../rmig.h"
#include "../rmig_fabric_ofi.h"
#include "../rmig_fabric_verbs.h"

#include <criterion/criterion.h>
#include <linux/udmabuf.h>
#include <sys/ioctl.h>
#include <sys/mman.h>

#define PAGE 4096u
#define LENGTH (8 * RMIG_MIB)
#define SECOND ((uint64_t)1000000000)
#define LIMIT (30 * SECOND)

struct pair {
    struct rmig_fabric *fabric[2]; // the source's, the sink's
    struct rmig_source *source;
    struct rmig_sink *sink;
    struct rmig_block_desc ram[2];
    char address[128];
    bool finished;
    int sink_status; // how the sink ended, RMIG_OK: it has not
};

// >>memory

static void fill(uint8_t *p) {
    uint64_t x = 88172645463325252u;
    for (uint64_t i = 0; i < LENGTH; i += sizeof x) {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        memcpy(p + i, &x, sizeof x);
    }
}

static struct rmig_block_desc new_ram(void) {
    struct rmig_block_desc d = {.name = "ram", .length = LENGTH, .backing = RMIG_BACKING_SHARED_FD};
    d.fd = memfd_create("ram", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    cr_assert(d.fd >= 0 && ftruncate(d.fd, LENGTH) == 0, "%s", strerror(errno));
    d.host = mmap(NULL, LENGTH, PROT_READ | PROT_WRITE, MAP_SHARED, d.fd, 0);
    cr_assert_neq(d.host, MAP_FAILED, "%s", strerror(errno));
    return d;
}

/* The same memory behind a dma-buf. Where the kernel makes none of ordinary memory it stays a plain file: a device that
   takes no dma-buf says so before it looks. */
static void behind_dmabuf(struct rmig_block_desc *d) {
    struct udmabuf_create create = {.memfd = (uint32_t)d->fd, .flags = UDMABUF_FLAGS_CLOEXEC, .size = LENGTH};
    d->backing = RMIG_BACKING_DMABUF;
    int device = open("/dev/udmabuf", O_RDWR | O_CLOEXEC);
    if (device < 0)
        return;
    cr_assert_eq(fcntl(d->fd, F_ADD_SEALS, F_SEAL_SHRINK), 0, "%s", strerror(errno));
    int made = ioctl(device, UDMABUF_CREATE, &create);
    cr_assert_geq(made, 0, "/dev/udmabuf: %s", strerror(errno));
    close(device);
    close(d->fd);
    d->fd = made;
}

// >>both ends

static struct rmig_fabric *open_verbs(void) {
    struct rmig_verbs_options options = {.device = getenv("RMIG_TEST_DEVICE")};
    struct rmig_error err = {0};
    struct rmig_fabric *f = rmig_verbs_open(&options, &err);
    cr_assert_not_null(f, "%s", err.text);
    return f;
}

static struct rmig_fabric *open_tcp(void) {
    struct rmig_ofi_options options = {.provider = "tcp"};
    struct rmig_error err = {0};
    struct rmig_fabric *f = rmig_ofi_open(&options, &err);
    cr_assert_not_null(f, "%s", err.text);
    return f;
}

static void pair_open(struct pair *p, struct rmig_fabric *(*open_fabric)(void), const char *host, bool pin_all) {
    struct rmig_config cfg = {0};
    struct rmig_error err = {0};
    char address[128];
    for (int i = 0; i < 2; i++) {
        p->fabric[i] = open_fabric();
        p->ram[i] = new_ram();
    }
    fill(p->ram[0].host);
    cr_assert_eq(rmig_set(&cfg, RMIG_PARAM_PIN_ALL, pin_all, &err), RMIG_OK, "%s", err.text);
    cr_assert_eq(rmig_set(&cfg, RMIG_PARAM_MAX_BANDWIDTH, 4 * RMIG_MIB, &err), RMIG_OK, "%s", err.text);
    cr_assert_eq(rmig_source_open(p->fabric[0], &cfg, &p->source, &err), RMIG_OK, "%s", err.text);
    cr_assert_eq(rmig_sink_open(p->fabric[1], &cfg, &p->sink, &err), RMIG_OK, "%s", err.text);
    snprintf(address, sizeof address, "%s:0", host);
    cr_assert_eq(rmig_sink_listen(p->sink, address), RMIG_OK, "%s", rmig_sink_error(p->sink)->text);
    cr_assert_eq(rmig_sink_address(p->sink, p->address, sizeof p->address), RMIG_OK);
}

static void pair_close(struct pair *p) {
    rmig_source_close(p->source);
    rmig_sink_close(p->sink);
    for (int i = 0; i < 2; i++) {
        rmig_fabric_close(p->fabric[i]);
        munmap(p->ram[i].host, LENGTH);
        close(p->ram[i].fd);
    }
}

static void sink_turn(struct pair *p) {
    struct rmig_sink_event ev;
    uint8_t rest[64];
    if (p->finished || p->sink_status != RMIG_OK)
        return;
    int status = rmig_sink_wait(p->sink, &ev, 1000000);
    if (status == RMIG_OK && ev.type == RMIG_SINK_BLOCKS)
        status = rmig_sink_accept_blocks(p->sink);
    if (status == RMIG_OK && ev.type == RMIG_SINK_TAKE)
        status = rmig_sink_take(p->sink);
    while (status == RMIG_OK && ev.type == RMIG_SINK_STREAM && rmig_sink_get(p->sink, rest, sizeof rest) > 0) {
    }
    p->finished = status == RMIG_OK && ev.type == RMIG_SINK_FINISHED;
    p->sink_status = status;
}

/* Both ends go on until the source's operation is over; with `written` not 0 only until so much is. */
static int drive(struct pair *p, int status, uint64_t written) {
    uint64_t until = p->fabric[0]->ops->now(p->fabric[0]) + LIMIT;
    struct rmig_stats stats = {0};
    while (status >= 0 && (written == 0 || stats.bytes_written < written)) {
        cr_assert_lt(p->fabric[0]->ops->now(p->fabric[0]), until, "the source is not done within 30 s");
        status = rmig_source_process(p->source);
        if (status != RMIG_PENDING)
            break;
        rmig_source_stats(p->source, &stats);
        sink_turn(p);
    }
    return status;
}

static int connect_ends(struct pair *p) {
    uint32_t block;
    cr_assert_eq(rmig_sink_add_block(p->sink, &p->ram[1], &block), RMIG_OK, "%s", rmig_sink_error(p->sink)->text);
    cr_assert_eq(rmig_source_add_block(p->source, &p->ram[0], &block), RMIG_OK, "%s",
                 rmig_source_error(p->source)->text);
    return drive(p, rmig_source_connect_start(p->source, p->address), 0);
}

static int run_round(struct pair *p, uint64_t written) {
    cr_assert_eq(rmig_source_begin_round(p->source), RMIG_OK, "%s", rmig_source_error(p->source)->text);
    cr_assert_eq(rmig_source_save_range(p->source, 0, 0, LENGTH), RMIG_OK, "%s", rmig_source_error(p->source)->text);
    return drive(p, rmig_source_end_round_start(p->source), written);
}

/* The source's status at the end. */
static int migrate(struct pair *p) {
    int status = connect_ends(p);
    if (status == RMIG_OK)
        status = run_round(p, 0);
    if (status == RMIG_OK)
        status = drive(p, rmig_source_finish_start(p->source), 0);
    for (uint64_t until = p->fabric[1]->ops->now(p->fabric[1]) + LIMIT; !p->finished && p->sink_status == RMIG_OK;) {
        cr_assert_lt(p->fabric[1]->ops->now(p->fabric[1]), until, "the sink is not done within 30 s");
        sink_turn(p);
    }
    return status;
}

static void check_moved(const struct pair *p) {
    cr_assert(p->finished, "the sink: %s", rmig_sink_error(p->sink)->text);
    cr_assert_eq(memcmp(p->ram[0].host, p->ram[1].host, LENGTH), 0, "the sink's memory differs");
}

// >>what the device holds

/* Lines of `rdma resource show KIND` that belong to this process. */
static unsigned held(const char *kind) {
    char command[64], pid[32], line[1024];
    unsigned count = 0;
    snprintf(command, sizeof command, "rdma resource show %s", kind);
    snprintf(pid, sizeof pid, " pid %d ", (int)getpid());
    FILE *out = popen(command, "r");
    cr_assert_not_null(out, "%s: %s", command, strerror(errno));
    while (fgets(line, sizeof line, out) != NULL)
        count += strstr(line, pid) != NULL;
    cr_assert_eq(pclose(out), 0, "\"%s\" failed", command);
    return count;
}

static const char *const kinds[] = {"pd", "cq", "qp", "mr", "cm_id"};
#define KINDS (sizeof kinds / sizeof kinds[0])

static void check_nothing_held(void) {
    for (size_t i = 0; i < KINDS; i++)
        cr_assert_eq(held(kinds[i]), 0, "a %s is left after close", kinds[i]);
}

static const char *test_address(void) {
    const char *address = getenv("RMIG_TEST_ADDR");
    if (address == NULL)
        cr_skip_test("RMIG_TEST_ADDR is not set");
    return address;
}

static void moves_and_leaves_nothing(bool pin_all) {
    struct pair p = {0};
    pair_open(&p, open_verbs, test_address(), pin_all);
    cr_assert_eq(connect_ends(&p), RMIG_OK, "%s", rmig_source_error(p.source)->text);
    cr_assert_eq(run_round(&p, 1), RMIG_PENDING, "%s", rmig_source_error(p.source)->text);
    for (size_t i = 0; i < KINDS; i++) // else finding nothing afterwards would say nothing
        cr_assert_geq(held(kinds[i]), 2, "both ends are connected, but a %s is missing", kinds[i]);
    cr_assert_eq(drive(&p, RMIG_PENDING, 0), RMIG_OK, "%s", rmig_source_error(p.source)->text);
    cr_assert_eq(drive(&p, rmig_source_finish_start(p.source), 0), RMIG_OK, "%s", rmig_source_error(p.source)->text);
    while (!p.finished && p.sink_status == RMIG_OK)
        sink_turn(&p);
    check_moved(&p);
    pair_close(&p);
    check_nothing_held();
}

Test(rdma, nothing_is_held_after_a_migration, .timeout = 60) { moves_and_leaves_nothing(false); }
Test(rdma, nothing_is_held_after_a_migration_pinned_whole, .timeout = 60) { moves_and_leaves_nothing(true); }

Test(rdma, nothing_is_held_after_close_in_mid_round, .timeout = 60) {
    struct pair p = {0};
    pair_open(&p, open_verbs, test_address(), false);
    cr_assert_eq(connect_ends(&p), RMIG_OK, "%s", rmig_source_error(p.source)->text);
    cr_assert_eq(run_round(&p, 1), RMIG_PENDING, "%s", rmig_source_error(p.source)->text);
    pair_close(&p);
    check_nothing_held();
}

Test(rdma, nothing_is_held_after_cancelling_at_the_source, .timeout = 60) {
    struct pair p = {0};
    pair_open(&p, open_verbs, test_address(), false);
    cr_assert_eq(connect_ends(&p), RMIG_OK, "%s", rmig_source_error(p.source)->text);
    cr_assert_eq(run_round(&p, 1), RMIG_PENDING, "%s", rmig_source_error(p.source)->text);
    rmig_source_cancel(p.source);
    for (uint64_t until = p.fabric[1]->ops->now(p.fabric[1]) + LIMIT; p.sink_status == RMIG_OK;) {
        cr_assert_lt(p.fabric[1]->ops->now(p.fabric[1]), until, "the sink has not noticed within 30 s");
        rmig_source_process(p.source);
        sink_turn(&p);
    }
    cr_assert(strstr(rmig_sink_error(p.sink)->text, "cancelled") != NULL, "%s", rmig_sink_error(p.sink)->text);
    pair_close(&p);
    check_nothing_held();
}

// >>dma-buf

/* Moved byte for byte, or refused by the device in words that name the block and what it is. */
static void dmabuf_at(unsigned end) {
    struct pair p = {0};
    pair_open(&p, open_verbs, test_address(), false);
    behind_dmabuf(&p.ram[end]);
    int status = migrate(&p);
    if (status == RMIG_OK) {
        check_moved(&p);
    } else {
        const struct rmig_error *err = end == 0 ? rmig_source_error(p.source) : rmig_sink_error(p.sink);
        const struct rmig_error *other = end == 0 ? rmig_sink_error(p.sink) : rmig_source_error(p.source);
        cr_assert_eq(err->status, RMIG_ERR_REGISTRATION, "%s", err->text);
        cr_assert(strstr(err->text, "block \"ram\"") != NULL && strstr(err->text, "dma-buf") != NULL, "%s", err->text);
        cr_assert_eq(other->status, RMIG_ERR_REFUSED, "%s", other->text);
        cr_assert(strstr(other->text, "dma-buf") != NULL, "%s", other->text);
    }
    pair_close(&p);
    check_nothing_held();
}

Test(rdma, a_dmabuf_at_the_source, .timeout = 60) { dmabuf_at(0); }
Test(rdma, a_dmabuf_at_the_sink, .timeout = 60) { dmabuf_at(1); }

Test(rdma, a_dmabuf_over_a_fabric_that_takes_none, .timeout = 60) {
    struct pair p = {0};
    pair_open(&p, open_tcp, "127.0.0.1", false);
    p.ram[1].backing = RMIG_BACKING_DMABUF;
    cr_assert_eq(migrate(&p), RMIG_ERR_REFUSED, "%s", rmig_source_error(p.source)->text);
    const struct rmig_error *err = rmig_sink_error(p.sink);
    cr_assert_eq(err->status, RMIG_ERR_REGISTRATION, "%s", err->text);
    cr_assert(strstr(err->text, "block \"ram\"") != NULL && strstr(err->text, "\"ofi\" takes no dma-buf") != NULL, "%s",
              err->text);
    pair_close(&p);
}
