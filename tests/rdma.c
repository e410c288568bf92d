/* Whole sessions over verbs with both ends in this process: what the device holds for it when they are closed, however
   they ended, and memory behind a dma-buf. With RMIG_TEST_ADDR (an address of this host's on an RDMA interface,
   RMIG_TEST_DEVICE its device); without, all but one test is skipped. */
#define _GNU_SOURCE
#define RMIG_IMPLEMENTATION
#include "../rmig.h"
#include "../rmig_fabric_ofi.h"
#include "../rmig_fabric_verbs.h"

#include <criterion/criterion.h>
#include <dirent.h>
#include <linux/udmabuf.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/resource.h>

#define PAGE 4096u
#define LENGTH (8 * RMIG_MIB)
#define SECOND ((uint64_t)1000000000)
#define LIMIT (120 * SECOND)

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

Test(rdma, nothing_is_held_after_a_migration, .timeout = 600) { moves_and_leaves_nothing(false); }
Test(rdma, nothing_is_held_after_a_migration_pinned_whole, .timeout = 600) { moves_and_leaves_nothing(true); }

Test(rdma, nothing_is_held_after_close_in_mid_round, .timeout = 600) {
    struct pair p = {0};
    pair_open(&p, open_verbs, test_address(), false);
    cr_assert_eq(connect_ends(&p), RMIG_OK, "%s", rmig_source_error(p.source)->text);
    cr_assert_eq(run_round(&p, 1), RMIG_PENDING, "%s", rmig_source_error(p.source)->text);
    pair_close(&p);
    check_nothing_held();
}

Test(rdma, nothing_is_held_after_cancelling_at_the_source, .timeout = 600) {
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

// >>listeners, by the fabric's operations alone

#define PEERS 80 // more than may wait

struct crowd { // one listener, and those who knock
    struct rmig_fabric *f;
    struct rmig_ep *listener, *peer[PEERS];
    bool rejected[PEERS];
    void *request[PEERS];
    size_t peers, requests;
    char address[128];
};

static void crowd_open(struct crowd *c) {
    struct rmig_error err = {0};
    char address[128];
    memset(c, 0, sizeof *c);
    snprintf(address, sizeof address, "%s:0", test_address());
    c->f = open_verbs();
    cr_assert_eq(c->f->ops->listen(c->f, address, &c->listener, &err), RMIG_OK, "%s", err.text);
    cr_assert_eq(c->f->ops->address(c->listener, c->address, sizeof c->address, &err), RMIG_OK, "%s", err.text);
}

static void crowd_close(struct crowd *c) {
    for (size_t i = 0; i < c->peers; i++)
        c->f->ops->close(c->peer[i]);
    c->f->ops->close(c->listener);
    rmig_fabric_close(c->f);
}

static void take_requests(struct crowd *c) {
    struct rmig_fabric_event e;
    struct rmig_error err = {0};
    int n;
    while ((n = c->f->ops->poll(c->listener, &e, 1, &err)) == 1)
        if (e.type == RMIG_FEV_REQUEST) {
            cr_assert_lt(c->requests, (size_t)PEERS);
            c->request[c->requests++] = e.request;
        }
    cr_assert_eq(n, 0, "the listener failed: %s", err.text);
}

/* An event of the ith peer, or 0; the listener is looked after meanwhile. */
static enum rmig_fabric_event_type poll_peer(struct crowd *c, size_t i) {
    struct rmig_fabric_event e = {0};
    struct rmig_error err = {0};
    int n = c->f->ops->poll(c->peer[i], &e, 1, &err);
    cr_assert_geq(n, 0, "%s", err.text);
    cr_assert(n == 0 || e.type != RMIG_FEV_ERROR, "peer %zu: %s", i, e.text);
    c->rejected[i] = c->rejected[i] || e.type == RMIG_FEV_REJECTED;
    take_requests(c);
    return e.type;
}

static void await_peer(struct crowd *c, size_t i, enum rmig_fabric_event_type type) {
    uint64_t until = c->f->ops->now(c->f) + LIMIT;
    struct rmig_ep *eps[] = {c->listener, c->peer[i]};
    while (poll_peer(c, i) != type) {
        cr_assert_lt(c->f->ops->now(c->f), until, "peer %zu: nothing within 30 s", i);
        c->f->ops->wait(c->f, eps, 2, c->f->ops->now(c->f) + SECOND / 100, NULL);
    }
}

static struct rmig_ep_config small_queues(void) {
    return (struct rmig_ep_config){.write_depth = 4, .send_depth = 2, .recv_depth = 2, .connect_timeout_ns = LIMIT};
}

static void knock(struct crowd *c) {
    struct rmig_ep_config cfg = small_queues();
    struct rmig_error err = {0};
    size_t i = c->peers;
    cr_assert_eq(c->f->ops->open(c->f, c->address, &cfg, &c->peer[i], &err), RMIG_OK, "%s", err.text);
    c->peers++;
    await_peer(c, i, RMIG_FEV_RESOLVED);
    cr_assert_eq(c->f->ops->connect(c->peer[i], (const uint8_t *)"request.", 8, &err), RMIG_OK, "%s", err.text);
}

static size_t count_rejected(struct crowd *c) {
    size_t n = 0;
    for (size_t i = 0; i < c->peers; i++) {
        poll_peer(c, i);
        n += c->rejected[i];
    }
    return n;
}

static void await_rejected(struct crowd *c, size_t wanted) {
    for (uint64_t until = c->f->ops->now(c->f) + LIMIT; count_rejected(c) < wanted;)
        cr_assert_lt(c->f->ops->now(c->f), until, "%zu of %zu rejected in time", count_rejected(c), wanted);
}

static void reject_all(struct crowd *c) {
    struct rmig_error err = {0};
    while (c->requests > 0)
        cr_assert_eq(c->f->ops->reject(c->listener, c->request[--c->requests], NULL, 0, &err), RMIG_OK, "%s", err.text);
}

static bool is_iwarp(struct crowd *c) {
    return ((struct rmig__verbs_ep *)(void *)c->listener)->id->verbs->device->transport_type == IBV_TRANSPORT_IWARP;
}

Test(rdma, requests_that_nobody_answers_have_a_limit, .timeout = 600) {
    struct crowd c;
    crowd_open(&c);
    if (is_iwarp(&c)) { // the listener's code is the same
        crowd_close(&c);
        cr_skip_test("the kernel's software iWARP makes fewer queues than are needed");
    }
    while (c.peers < PEERS - 1)
        knock(&c);
    await_rejected(&c, PEERS - 1 - 64);
    cr_assert_eq(c.requests, 64, "%zu requests wait", c.requests);
    reject_all(&c);
    await_rejected(&c, PEERS - 1);
    knock(&c); // and the listener is as it was
    for (uint64_t until = c.f->ops->now(c.f) + LIMIT; c.requests == 0; poll_peer(&c, PEERS - 1))
        cr_assert_lt(c.f->ops->now(c.f), until, "no request within 30 s");
    crowd_close(&c);
    check_nothing_held();
}

// >>descriptors

/* From now on only `more` descriptors can be made. Returns what the limit was. */
static struct rlimit leave_descriptors(int more) {
    struct rlimit before, now;
    int lowest = dup(0);
    cr_assert_geq(lowest, 0);
    close(lowest);
    cr_assert_eq(getrlimit(RLIMIT_NOFILE, &before), 0);
    now = before;
    now.rlim_cur = (rlim_t)(lowest + more);
    cr_assert_eq(setrlimit(RLIMIT_NOFILE, &now), 0);
    return before;
}

static void says_what_ran_out(const char *text, int more) {
    cr_assert(strstr(text, "no file descriptor left") != NULL && strstr(text, "ulimit -n") != NULL &&
                  strstr(text, "RLIMIT_NOFILE is ") != NULL,
              "with %d descriptors: %s", more, text);
}

Test(rdma, a_listener_without_descriptors_says_so, .timeout = 600) {
    char address[128];
    snprintf(address, sizeof address, "%s:0", test_address());
    struct rmig_fabric *f = open_verbs();
    for (int more = 0; more < 3; more++) {
        struct rlimit before = leave_descriptors(more);
        struct rmig_error err = {0};
        struct rmig_ep *ep = NULL;
        cr_assert_lt(f->ops->listen(f, address, &ep, &err), 0, "it listens with %d descriptors", more);
        setrlimit(RLIMIT_NOFILE, &before);
        says_what_ran_out(err.text, more);
    }
    rmig_fabric_close(f);
}

Test(rdma, a_connection_without_descriptors_says_so, .timeout = 600) {
    char address[128];
    snprintf(address, sizeof address, "%s:4444", test_address());
    struct rmig_fabric *f = open_verbs();
    struct rmig_ep_config cfg = small_queues();
    for (int more = 0; more < 4; more++) {
        struct rlimit before = leave_descriptors(more);
        struct rmig_fabric_event e = {0};
        struct rmig_error err = {0};
        struct rmig_ep *ep = NULL;
        int status = f->ops->open(f, address, &cfg, &ep, &err);
        for (uint64_t until = f->ops->now(f) + LIMIT; status == RMIG_OK && e.type == 0;) {
            cr_assert_lt(f->ops->now(f), until, "nothing within 30 s");
            cr_assert_geq(f->ops->poll(ep, &e, 1, &err), 0, "%s", err.text);
        }
        setrlimit(RLIMIT_NOFILE, &before);
        cr_assert(status < 0 || e.type == RMIG_FEV_ERROR, "it is resolved with %d descriptors", more);
        cr_assert(status < 0 || e.at_this_end, "another address is tried with %d descriptors", more);
        says_what_ran_out(status < 0 ? err.text : e.text, more);
        if (status == RMIG_OK)
            f->ops->close(ep);
    }
    rmig_fabric_close(f);
}

/* The sink's listener lives through a request that cannot be taken for want of descriptors, and takes it later. */
Test(rdma, a_request_without_descriptors_ends_no_listener, .timeout = 600) {
    struct crowd c;
    struct rmig_ep_config cfg = small_queues();
    struct rmig_error err = {0};
    struct rmig_ep *passive = NULL;
    crowd_open(&c);
    knock(&c);
    for (uint64_t until = c.f->ops->now(c.f) + LIMIT; c.requests == 0; poll_peer(&c, 0))
        cr_assert_lt(c.f->ops->now(c.f), until, "no request within 30 s");
    for (int more = 0; more < 2; more++) {
        struct rlimit before = leave_descriptors(more);
        int status = c.f->ops->open_request(c.listener, c.request[0], &cfg, &passive, &err);
        take_requests(&c);
        setrlimit(RLIMIT_NOFILE, &before);
        cr_assert_lt(status, 0, "it is opened with %d descriptors", more);
        says_what_ran_out(err.text, more);
    }
    cr_assert_eq(c.f->ops->open_request(c.listener, c.request[0], &cfg, &passive, &err), RMIG_OK, "%s", err.text);
    cr_assert_eq(c.f->ops->accept(passive, NULL, 0, &err), RMIG_OK, "%s", err.text);
    await_peer(&c, 0, RMIG_FEV_ESTABLISHED);
    c.f->ops->close(passive);
    crowd_close(&c);
    check_nothing_held();
}

/* Programs that this one starts get none of them. */
Test(rdma, descriptors_close_on_exec, .timeout = 600) {
    struct pair p = {0};
    unsigned count = 0;
    pair_open(&p, open_verbs, test_address(), false);
    cr_assert_eq(connect_ends(&p), RMIG_OK, "%s", rmig_source_error(p.source)->text);
    DIR *dir = opendir("/proc/self/fd");
    cr_assert_not_null(dir);
    for (struct dirent *entry; (entry = readdir(dir)) != NULL;) {
        char path[300], target[300];
        snprintf(path, sizeof path, "/proc/self/fd/%s", entry->d_name);
        ssize_t n = readlink(path, target, sizeof target - 1);
        target[n < 0 ? 0 : n] = '\0';
        if (strstr(target, "infiniband") == NULL) // the device's, or an anonymous [infinibandevent]
            continue;
        count++;
        cr_assert((fcntl(atoi(entry->d_name), F_GETFD) & FD_CLOEXEC) != 0, "%s, %s, stays open", path, target);
    }
    closedir(dir);
    cr_assert_geq(count, 5, "only %u descriptors found",
                  count); // listener and two connections, channels and completions
    pair_close(&p);
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

Test(rdma, a_dmabuf_at_the_source, .timeout = 600) { dmabuf_at(0); }
Test(rdma, a_dmabuf_at_the_sink, .timeout = 600) { dmabuf_at(1); }

Test(rdma, a_dmabuf_over_a_fabric_that_takes_none, .timeout = 600) {
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
