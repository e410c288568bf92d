// Holds every fabric to the contract above struct rmig_fabric_ops, by its operations alone. A new fabric is a row of
// `fabrics` and a function that opens it. With RMIG_TEST_ADDR and RMIG_TEST_ADDR6 (addresses of this host's on an RDMA
// interface, RMIG_TEST_DEVICE its device) the fabrics that need one are tested, and only those.
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <rdma/fi_domain.h>
#include <stdbool.h>

/* libfabric's fi_mr_reg, which newer releases make so that a region that no peer may reach has no key. */
static bool keyless;
static int reg_like_newer(struct fid_domain *domain, const void *p, size_t n, uint64_t access, uint64_t offset,
                          uint64_t key, uint64_t flags, struct fid_mr **mr, void *context) {
    int ret = fi_mr_reg(domain, p, n, access, offset, key, flags, mr, context);
    if (ret == 0 && keyless && (access & (FI_REMOTE_READ | FI_REMOTE_WRITE)) == 0)
        (*mr)->key = FI_KEY_NOTAVAIL;
    return ret;
}
#define fi_mr_reg reg_like_newer

#define RMIG_IMPLEMENTATION
#include "../rmig.h"
#include "../rmig_fabric_ofi.h"
#include "../rmig_fabric_verbs.h"
#include "half_write.h"
#include "raw_tcp.h"
#include "sim_fabric.h"

#include <criterion/criterion.h>
#include <criterion/parameterized.h>
#include <dirent.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#define LIMIT (100 * SIM_SECOND) // for anything that has to happen: long, so that only what never happens fails
#define ENDS_MAX 8
#define DATA_MAX 1024

// >>worlds

struct seen { // an event, kept
    struct rmig_fabric_event e;
    uint8_t private_data[DATA_MAX];
    char text[200];
    bool used;
};

struct end { // an endpoint and all that its poll has yielded
    struct rmig_fabric *f;
    const struct rmig_fabric_ops *ops;
    struct rmig_ep *ep;
    struct rmig_fabric_caps caps;
    struct seen *seen;
    size_t count, cap;
    bool quiet; // not polled
};

struct world {
    const char *name;
    struct rmig_fabric *passive, *active;
    struct sim *sim;
    struct end *ends[ENDS_MAX];
    size_t end_count;
    struct end listener;
    char address[128];
};

typedef void open_world(struct world *w);

static void open_sim(struct world *w, const struct sim_config *cfg) {
    w->sim = sim_open(cfg);
    w->active = sim_fabric(w->sim, 0);
    w->passive = sim_fabric(w->sim, 1);
}

static void open_sim_ordered(struct world *w) {
    struct sim_config cfg;
    sim_defaults(&cfg, SIM_ORDERED, 1);
    cfg.bandwidth = 1000000000;
    cfg.parts = 7;
    open_sim(w, &cfg);
}

static void open_sim_unordered(struct world *w) {
    struct sim_config cfg;
    sim_defaults(&cfg, SIM_UNORDERED, 2);
    cfg.bandwidth = 1000000000;
    cfg.parts = 7;
    cfg.extra_completions = true;
    open_sim(w, &cfg);
}

static void open_sim_local(struct world *w) {
    struct sim_config cfg;
    sim_defaults(&cfg, SIM_LOCAL, 3);
    cfg.pad_private_data = true;
    open_sim(w, &cfg);
}

static void open_sim_offsets(struct world *w) {
    struct sim_config cfg;
    sim_defaults(&cfg, SIM_ORDERED, 4);
    cfg.offset_addressing = cfg.target_must_poll = cfg.extra_completions = true;
    cfg.local_mr = false;
    cfg.key_bits = 64;
    open_sim(w, &cfg);
}

static void open_sim_small(struct world *w) {
    struct sim_config cfg;
    sim_defaults(&cfg, SIM_UNORDERED, 5);
    cfg.write_depth = 3;
    cfg.send_depth = 1;
    cfg.recv_depth = 2;
    cfg.private_data_request = cfg.private_data_reply = 8;
    cfg.target_must_poll = true;
    open_sim(w, &cfg);
}

static void open_sim_slow(struct world *w) {
    struct sim_config cfg;
    sim_defaults(&cfg, SIM_LOCAL, 6);
    cfg.bandwidth = 100000000;
    cfg.parts = 1000;
    cfg.latency_ns = SIM_MS;
    open_sim(w, &cfg);
}

static struct rmig_fabric *open_ofi(const char *provider, bool poll) {
    struct rmig_ofi_options options = {.provider = provider, .poll = poll};
    struct rmig_error err = {0};
    struct rmig_fabric *f = rmig_ofi_open(&options, &err);
    cr_assert_not_null(f, "provider %s: %s", provider, err.text);
    return f;
}

static void open_ofi_tcp(struct world *w) {
    w->passive = open_ofi("tcp", false);
    w->active = open_ofi("tcp", false);
}

static void open_ofi_tcp_poll(struct world *w) {
    w->passive = open_ofi("tcp", true);
    w->active = open_ofi("tcp", true);
}

static void open_ofi_net(struct world *w) {
    struct rmig_ofi_options options = {.provider = "net"};
    w->passive = rmig_ofi_open(&options, NULL);
    if (w->passive == NULL) // libfabric from 1.18 on has made it its tcp
        cr_skip_test("no provider net");
    w->active = open_ofi("net", false);
}

static struct rmig_fabric *open_verbs(bool poll) {
    struct rmig_verbs_options options = {.device = getenv("RMIG_TEST_DEVICE"), .poll = poll};
    struct rmig_error err = {0};
    struct rmig_fabric *f = rmig_verbs_open(&options, &err);
    cr_assert_not_null(f, "%s", err.text);
    return f;
}

static void open_verbs_waiting(struct world *w) {
    w->passive = open_verbs(false);
    w->active = open_verbs(false);
}

static void open_verbs_poll(struct world *w) {
    w->passive = open_verbs(true);
    w->active = open_verbs(true);
}

static void open_ofi_verbs(struct world *w) {
    w->passive = open_ofi("verbs", false);
    w->active = open_ofi("verbs", false);
}

static const struct fabric_row {
    const char *name;
    open_world *open;
    bool real; // another process can be the peer
    bool rdma; // needs a device
} fabrics[] = {
    {"sim, ordered", open_sim_ordered, false, false},
    {"sim, unordered", open_sim_unordered, false, false},
    {"sim, local completions", open_sim_local, false, false},
    {"sim, offsets, target polls", open_sim_offsets, false, false},
    {"sim, small queues", open_sim_small, false, false},
    {"sim, slow", open_sim_slow, false, false},
    {"ofi, tcp", open_ofi_tcp, true, false},
    {"ofi, tcp, busy polling", open_ofi_tcp_poll, true, false},
    {"ofi, net", open_ofi_net, true, false},
    {"verbs", open_verbs_waiting, true, true},
    {"verbs, busy polling", open_verbs_poll, true, true},
    {"ofi, verbs", open_ofi_verbs, true, true},
};

#define FABRICS (sizeof fabrics / sizeof fabrics[0])

static size_t choose_rows(size_t *rows) {
    const char *only = getenv("RMIG_TEST_FABRIC"); // a row's name; iWARP is not for all
    bool rdma = getenv("RMIG_TEST_ADDR") != NULL;
    size_t n = 0;
    for (size_t i = 0; i < FABRICS; i++)
        if (fabrics[i].rdma == rdma && (only == NULL || strcmp(only, fabrics[i].name) == 0))
            rows[n++] = i;
    return n;
}

/* "address:0" of this host. */
static const char *any_port(bool v6) {
    static char address[128];
    const char *host = getenv(v6 ? "RMIG_TEST_ADDR6" : "RMIG_TEST_ADDR");
    snprintf(address, sizeof address, v6 ? "[%s]:0" : "%s:0", host != NULL ? host : v6 ? "::1" : "127.0.0.1");
    return address;
}

static void world_close(struct world *w) {
    for (size_t i = 0; i < w->end_count; i++)
        cr_assert(w->ends[i]->ep == NULL, "%s: the test left an endpoint open", w->name);
    rmig_fabric_close(w->active);
    rmig_fabric_close(w->passive);
    if (w->sim == NULL)
        return;
    struct rmig_error err = {0};
    cr_assert_eq(sim_clean(w->sim, &err), RMIG_OK, "%s: %s", w->name, err.text);
    sim_close(w->sim);
}

/* A test of one behaviour, run for each fabric in a process of its own. That process may be mapped elsewhere: only the
   row's number is passed. */
#define CONFORMANCE(behaviour)                                                                                         \
    static void behaviour(struct world *w);                                                                            \
    ParameterizedTestParameters(fabric, behaviour) {                                                                   \
        static size_t rows[FABRICS];                                                                                   \
        return cr_make_param_array(size_t, rows, choose_rows(rows));                                                   \
    }                                                                                                                  \
    ParameterizedTest(size_t *row, fabric, behaviour, .timeout = 600) {                                                \
        struct world w = {0};                                                                                          \
        w.name = fabrics[*row].name;                                                                                   \
        fabrics[*row].open(&w);                                                                                        \
        behaviour(&w);                                                                                                 \
        world_close(&w);                                                                                               \
    }                                                                                                                  \
    static void behaviour(struct world *w)

// >>events

static const char *type_name(enum rmig_fabric_event_type type) {
    static const char *const names[] = {"0",    "REQUEST", "RESOLVED", "ESTABLISHED", "REJECTED", "DISCONNECTED",
                                        "SEND", "RECV",    "WRITE",    "ERROR"};
    return (unsigned)type < sizeof names / sizeof names[0] ? names[type] : "unknown";
}

static bool is_last(enum rmig_fabric_event_type type) {
    return type == RMIG_FEV_ERROR || type == RMIG_FEV_DISCONNECTED || type == RMIG_FEV_REJECTED;
}

static void keep(struct world *w, struct end *end, const struct rmig_fabric_event *e) {
    if (end->count == end->cap) {
        end->cap = end->cap == 0 ? 64 : 2 * end->cap;
        end->seen = sim_grow(end->seen, end->cap, sizeof *end->seen);
    }
    struct seen *s = &end->seen[end->count++];
    memset(s, 0, sizeof *s);
    s->e = *e;
    cr_assert(e->type >= RMIG_FEV_REQUEST && e->type <= RMIG_FEV_ERROR, "%s: event type %d", w->name, (int)e->type);
    if (e->type == RMIG_FEV_REQUEST || e->type == RMIG_FEV_ESTABLISHED || e->type == RMIG_FEV_REJECTED) {
        cr_assert_leq(e->private_data_length, (size_t)DATA_MAX);
        if (e->private_data_length > 0)
            memcpy(s->private_data, e->private_data, e->private_data_length);
    }
    if (is_last(e->type)) {
        cr_assert_not_null(e->text, "%s: %s without a text", w->name, type_name(e->type));
        snprintf(s->text, sizeof s->text, "%s", e->text);
        cr_assert_neq(s->text[0], '\0', "%s: %s with an empty text", w->name, type_name(e->type));
    }
}

static size_t poll_end(struct world *w, struct end *end) {
    struct rmig_fabric_event events[4];
    struct rmig_error err = {0};
    int n = end->ops->poll(end->ep, events, 4, &err);
    cr_assert_geq(n, 0, "%s: poll: %s", w->name, err.text);
    cr_assert_leq(n, 4);
    for (int i = 0; i < n; i++)
        keep(w, end, &events[i]);
    return (size_t)n;
}

/* Lets that fabric wait whose clock is behind: in a simulated world both clocks must go on together. */
static void wait_behind(struct world *w, uint64_t ns) {
    bool passive = w->passive->ops->now(w->passive) <= w->active->ops->now(w->active);
    struct rmig_fabric *f = passive ? w->passive : w->active;
    struct rmig_ep *eps[ENDS_MAX];
    struct rmig_error err = {0};
    size_t n = 0;
    for (size_t i = 0; i < w->end_count; i++)
        if (w->ends[i]->f == f && w->ends[i]->ep != NULL && !w->ends[i]->quiet)
            eps[n++] = w->ends[i]->ep;
    cr_assert_eq(f->ops->wait(f, eps, n, f->ops->now(f) + ns, &err), RMIG_OK, "%s: wait: %s", w->name, err.text);
}

/* Sleeps on the descriptors of all endpoints, or in `wait` where there are none. */
static void sleep_a_little(struct world *w) {
    struct pollfd fds[4 * ENDS_MAX];
    nfds_t count = 0;
    bool blind = false;
    for (size_t i = 0; i < w->end_count; i++) {
        struct end *end = w->ends[i];
        struct rmig_fd got[4];
        struct rmig_error err = {0};
        bool ready = false;
        if (end->ep == NULL || end->quiet)
            continue;
        int n = end->ops->fds(end->ep, got, 4, &ready, &err);
        cr_assert(n >= 0 && n <= 4, "%s: fds: %d: %s", w->name, n, err.text);
        if (ready)
            return;
        blind = blind || n == 0;
        for (int k = 0; k < n; k++, count++) {
            fds[count].fd = got[k].fd;
            fds[count].events = (short)(POLLIN | (got[k].write ? POLLOUT : 0));
        }
    }
    if (blind || count == 0)
        wait_behind(w, SIM_MS);
    else
        poll(fds, count, 20);
}

/* Polls every endpoint once; sleeps a little if there was nothing. */
static void pump(struct world *w) {
    size_t got = 0;
    for (size_t i = 0; i < w->end_count; i++)
        if (w->ends[i]->ep != NULL && !w->ends[i]->quiet)
            got += poll_end(w, w->ends[i]);
    if (got == 0)
        sleep_a_little(w);
}

static struct seen *find(struct end *end, enum rmig_fabric_event_type type, uint64_t id, bool any_id) {
    for (size_t i = 0; i < end->count; i++)
        if (!end->seen[i].used && end->seen[i].e.type == type && (any_id || end->seen[i].e.id == id))
            return &end->seen[i];
    return NULL;
}

static const char *last_words(const struct end *end) {
    for (size_t i = 0; i < end->count; i++)
        if (is_last(end->seen[i].e.type))
            return end->seen[i].text;
    return NULL;
}

static uint64_t world_now(struct world *w) { return w->passive->ops->now(w->passive) + w->active->ops->now(w->active); }

static struct seen *await(struct world *w, struct end *end, enum rmig_fabric_event_type type, uint64_t id,
                          bool any_id) {
    uint64_t deadline = world_now(w) + 2 * LIMIT;
    for (;;) {
        struct seen *s = find(end, type, id, any_id);
        if (s != NULL) {
            s->used = true;
            return s;
        }
        cr_assert(is_last(type) || last_words(end) == NULL, "%s: %s expected, but: %s", w->name, type_name(type),
                  last_words(end));
        cr_assert_lt(world_now(w), deadline, "%s: no %s (id %llu) in time", w->name, type_name(type),
                     (unsigned long long)id);
        pump(w);
    }
}

/* The next event of a type, waited for. Valid until the next event of that endpoint. */
static struct seen *expect(struct world *w, struct end *end, enum rmig_fabric_event_type type) {
    return await(w, end, type, 0, true);
}

static void expect_id(struct world *w, struct end *end, enum rmig_fabric_event_type type, uint64_t id) {
    await(w, end, type, id, false);
}

static void expect_end_of(struct world *w, struct end *end) {
    uint64_t deadline = world_now(w) + 2 * LIMIT;
    while (last_words(end) == NULL) {
        cr_assert_lt(world_now(w), deadline, "%s: neither ERROR nor DISCONNECTED in time", w->name);
        pump(w);
    }
}

static size_t count_events(const struct end *end, enum rmig_fabric_event_type type) {
    size_t n = 0;
    for (size_t i = 0; i < end->count; i++)
        n += end->seen[i].e.type == type;
    return n;
}

// >>connections

static struct rmig_ep_config wanted(void) {
    struct rmig_ep_config cfg = {0};
    cfg.write_depth = 16;
    cfg.send_depth = 8;
    cfg.recv_depth = 16;
    cfg.connect_timeout_ns = LIMIT;
    return cfg;
}

static void enter(struct world *w, struct end *end, struct rmig_fabric *f, struct rmig_ep *ep) {
    memset(end, 0, sizeof *end);
    end->f = f;
    end->ops = f->ops;
    end->ep = ep;
    cr_assert_eq(ep->fabric, f, "%s: an endpoint that does not know its fabric", w->name);
    for (size_t i = 0; i < w->end_count; i++)
        if (w->ends[i] == end)
            return;
    cr_assert_lt(w->end_count, (size_t)ENDS_MAX);
    w->ends[w->end_count++] = end;
}

static void leave(struct world *w, struct end *end) {
    if (end->ep != NULL)
        end->ops->close(end->ep);
    end->ep = NULL;
    free(end->seen);
    end->seen = NULL;
    end->count = end->cap = 0;
    for (size_t i = 0; i < w->end_count; i++)
        if (w->ends[i] == end)
            w->ends[i] = w->ends[--w->end_count];
}

/* Hands an endpoint on to another `end`. */
static void hand_on(struct world *w, struct end *from, struct end *to) {
    *to = *from;
    for (size_t i = 0; i < w->end_count; i++)
        if (w->ends[i] == from)
            w->ends[i] = to;
    memset(from, 0, sizeof *from);
}

static void listen_on(struct world *w, const char *address) {
    struct rmig_error err = {0};
    struct rmig_ep *ep = NULL;
    cr_assert_eq(w->passive->ops->listen(w->passive, address, &ep, &err), RMIG_OK, "%s: listen: %s", w->name, err.text);
    enter(w, &w->listener, w->passive, ep);
    cr_assert_eq(w->passive->ops->address(ep, w->address, sizeof w->address, &err), RMIG_OK, "%s: %s", w->name,
                 err.text);
}

static void get_caps(struct world *w, struct end *end) {
    struct rmig_error err = {0};
    cr_assert_eq(end->ops->caps(end->ep, &end->caps, &err), RMIG_OK, "%s: caps: %s", w->name, err.text);
}

/* Opens an active endpoint, up to RESOLVED. */
static void open_active(struct world *w, struct end *end, const char *address) {
    struct rmig_ep_config cfg = wanted();
    struct rmig_error err = {0};
    struct rmig_ep *ep = NULL;
    cr_assert_eq(w->active->ops->open(w->active, address, &cfg, &ep, &err), RMIG_OK, "%s: open: %s", w->name, err.text);
    enter(w, end, w->active, ep);
    expect(w, end, RMIG_FEV_RESOLVED);
    get_caps(w, end);
}

static void start_connect(struct world *w, struct end *end, const void *data, size_t n) {
    struct rmig_error err = {0};
    cr_assert_eq(end->ops->connect(end->ep, data, n, &err), RMIG_OK, "%s: connect: %s", w->name, err.text);
}

static void open_passive(struct world *w, struct end *end, void *request) {
    struct rmig_ep_config cfg = wanted();
    struct rmig_error err = {0};
    struct rmig_ep *ep = NULL;
    cr_assert_eq(w->passive->ops->open_request(w->listener.ep, request, &cfg, &ep, &err), RMIG_OK, "%s: %s", w->name,
                 err.text);
    enter(w, end, w->passive, ep);
    get_caps(w, end);
}

static void start_accept(struct world *w, struct end *end, const void *data, size_t n) {
    struct rmig_error err = {0};
    cr_assert_eq(end->ops->accept(end->ep, data, n, &err), RMIG_OK, "%s: accept: %s", w->name, err.text);
}

/* Both ends up to, not including, connect's answer: what is posted now is posted before the connection is there. */
static void half_connect(struct world *w, struct end *a, struct end *p) {
    if (w->listener.ep == NULL)
        listen_on(w, any_port(false));
    open_active(w, a, w->address);
    start_connect(w, a, "request.", 8);
    open_passive(w, p, expect(w, &w->listener, RMIG_FEV_REQUEST)->e.request);
}

static void finish_connect(struct world *w, struct end *a, struct end *p) {
    start_accept(w, p, "reply...", 8);
    expect(w, a, RMIG_FEV_ESTABLISHED);
    expect(w, p, RMIG_FEV_ESTABLISHED);
}

static void connect_pair(struct world *w, struct end *a, struct end *p) {
    half_connect(w, a, p);
    finish_connect(w, a, p);
}

static void leave_pair(struct world *w, struct end *a, struct end *p) {
    leave(w, a);
    leave(w, p);
    leave(w, &w->listener);
}

// >>memory

struct region {
    struct end *end;
    uint8_t *p;
    size_t n;
    struct rmig_mr mr;
};

#define ALL_ACCESS (RMIG_ACCESS_LOCAL_READ | RMIG_ACCESS_LOCAL_WRITE | RMIG_ACCESS_REMOTE_WRITE)

static struct region region_at(struct world *w, struct end *end, void *p, size_t n, unsigned access) {
    struct region r = {end, p, n, {0}};
    struct rmig_error err = {0};
    cr_assert_eq(end->ops->reg(end->ep, p, n, access, &r.mr, &err), RMIG_OK, "%s: reg of %zu bytes: %s", w->name, n,
                 err.text);
    cr_assert((access & RMIG_ACCESS_REMOTE_WRITE) == 0 || r.mr.key != 0, "%s: a key of 0", w->name);
    if (end->caps.key_bits < 64)
        cr_assert_eq(r.mr.key >> end->caps.key_bits, 0, "%s: key 0x%llx has more than %u bits", w->name,
                     (unsigned long long)r.mr.key, end->caps.key_bits);
    if (!end->caps.offset_addressing)
        cr_assert_eq(r.mr.remote_address, (uint64_t)(uintptr_t)p, "%s: not addressed by host address", w->name);
    return r;
}

static void *pages(size_t n) {
    void *p = mmap(NULL, n, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    cr_assert_neq(p, MAP_FAILED, "mmap of %zu bytes", n);
    madvise(p, n, MADV_HUGEPAGE); // on a virtual machine page faults cost more than the rest of a test
    return p;
}

static struct region region(struct world *w, struct end *end, size_t n, unsigned access) {
    return region_at(w, end, pages(n), n, access);
}

static void deregister(struct world *w, struct region *r) {
    struct rmig_error err = {0};
    cr_assert_eq(r->end->ops->dereg(r->end->ep, &r->mr, &err), RMIG_OK, "%s: dereg: %s", w->name, err.text);
}

static void drop(struct world *w, struct region *r) {
    deregister(w, r);
    munmap(r->p, r->n);
}

static uint64_t random_state = 0x452821e638d01377u;

static uint64_t below(uint64_t n) {
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return random_state % n;
}

static void fill(uint8_t *p, size_t n) {
    for (size_t i = 0; i < n; i++)
        p[i] = (uint8_t)below(256);
}

static const struct rmig_mr *local_mr(const struct region *r) { return r->end->caps.local_mr ? &r->mr : NULL; }

static struct rmig_write make_write(const struct region *from, uint64_t from_offset, const struct region *to,
                                    uint64_t to_offset, uint64_t n, uint64_t id, bool signal) {
    struct rmig_write write = {0};
    write.local = from->p + from_offset;
    write.mr = local_mr(from);
    write.length = n;
    write.remote_address = to->mr.remote_address + to_offset;
    write.key = to->mr.key;
    write.id = id;
    write.signal = signal;
    return write;
}

static int post_writes(struct world *w, struct end *end, const struct rmig_write *writes, size_t n) {
    struct rmig_error err = {0};
    int taken = end->ops->write(end->ep, writes, n, &err);
    cr_assert(taken >= 0 && (size_t)taken <= n, "%s: write: %d: %s", w->name, taken, err.text);
    return taken;
}

/* Posts all, waiting for room. Some must be signalled, or room never comes. */
static void write_all(struct world *w, struct end *end, const struct rmig_write *writes, size_t n) {
    uint64_t deadline = world_now(w) + 2 * LIMIT;
    while (n > 0) {
        int taken = post_writes(w, end, writes, n);
        writes += taken;
        n -= (size_t)taken;
        cr_assert_lt(world_now(w), deadline, "%s: no room for %zu writes in time", w->name, n);
        if (n > 0)
            pump(w);
    }
}

static int try_recv(struct end *end, const struct region *r, uint64_t offset, uint64_t n, uint64_t id) {
    struct rmig_error err = {0};
    int status = end->ops->recv(end->ep, r->p + offset, n, &r->mr, id, &err);
    cr_assert(status == RMIG_OK || status == RMIG_ERR_FULL, "recv: %d: %s", status, err.text);
    return status;
}

static void post_recv(struct world *w, struct end *end, const struct region *r, uint64_t offset, uint64_t n,
                      uint64_t id) {
    cr_assert_eq(try_recv(end, r, offset, n, id), RMIG_OK, "%s: no room for a receive", w->name);
}

static int try_send(struct world *w, struct end *end, const struct region *r, uint64_t offset, uint64_t n,
                    uint64_t id) {
    struct rmig_error err = {0};
    int status = end->ops->send(end->ep, r->p + offset, n, &r->mr, id, &err);
    cr_assert(status == RMIG_OK || status == RMIG_ERR_FULL, "%s: send: %d: %s", w->name, status, err.text);
    return status;
}

static void post_send(struct world *w, struct end *end, const struct region *r, uint64_t offset, uint64_t n,
                      uint64_t id) {
    cr_assert_eq(try_send(w, end, r, offset, n, id), RMIG_OK, "%s: no room for a send", w->name);
}

/* A message there: after it, with sends_after_writes, all writes before it are delivered. */
static void send_message(struct world *w, struct end *from, struct end *to) {
    struct region out = region(w, from, 4096, RMIG_ACCESS_LOCAL_READ | RMIG_ACCESS_LOCAL_WRITE);
    struct region in = region(w, to, 4096, RMIG_ACCESS_LOCAL_READ | RMIG_ACCESS_LOCAL_WRITE);
    fill(out.p, 100);
    post_recv(w, to, &in, 0, 4096, 77);
    post_send(w, from, &out, 0, 100, 78);
    struct seen *s = expect(w, to, RMIG_FEV_RECV);
    cr_assert_eq(s->e.id, 77);
    cr_assert_eq(s->e.length, 100);
    cr_assert_arr_eq(in.p, out.p, 100, "%s: a message changed on its way", w->name);
    expect_id(w, from, RMIG_FEV_SEND, 78);
    drop(w, &in);
    drop(w, &out);
}

// >>listening and connecting

CONFORMANCE(a_listener_tells_the_port_it_bound) {
    struct rmig_error err = {0};
    char small[4], host[64], port[8];
    listen_on(w, any_port(false));
    cr_assert_eq(rmig_split_address(w->address, host, sizeof host, port, sizeof port, &err), RMIG_OK, "%s: \"%s\"",
                 w->name, w->address);
    cr_assert_neq(atoi(port), 0, "%s: \"%s\" has no port", w->name, w->address);
    cr_assert_lt(w->passive->ops->address(w->listener.ep, small, sizeof small, &err), 0, "%s: 4 bytes suffice?",
                 w->name);
    cr_assert_neq(err.text[0], '\0');
    leave(w, &w->listener);
}

CONFORMANCE(a_listener_takes_ipv6) {
    struct end a, p;
    listen_on(w, any_port(true));
    cr_assert_eq(w->address[0], '[', "%s: \"%s\"", w->name, w->address);
    connect_pair(w, &a, &p);
    leave_pair(w, &a, &p);
}

// --- names with several addresses

/* Hosts that this process alone knows. "several" has an address of either family, and a link-local one that no
   interface is known for; "nearby" has none but such. In the simulator every host is one address, so a name with two is
   two hosts. Returns the name. */
static const char *several(const struct world *w) {
    const char *v4 = getenv("RMIG_TEST_ADDR"), *v6 = getenv("RMIG_TEST_ADDR6");
    char path[] = "/tmp/rmig-hosts-XXXXXX";
    if (w->sim != NULL)
        return "one.invalid+sim";
    v4 = v4 != NULL ? v4 : "127.0.0.1";
    int fd = mkstemp(path);
    cr_assert(fd >= 0 && // one of them stands there twice, as in hosts files that grew
              dprintf(fd, "fe80::7 several nearby\n%s several\n%s several\n%s several\n", v4, v6 != NULL ? v6 : "::1",
                      v4) > 0);
    close(fd);
    bool own = (unshare(CLONE_NEWNS) == 0 || unshare(CLONE_NEWUSER | CLONE_NEWNS) == 0) &&
               mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) == 0 &&
               mount(path, "/etc/hosts", NULL, MS_BIND, NULL) == 0;
    unlink(path);
    if (!own)
        cr_skip_test("this user cannot have an /etc/hosts of its own");
    return "several";
}

static const char *port_text(const struct world *w) { return strrchr(w->address, ':') + 1; }

static void set_port(char *address, size_t size, const char *host, const char *port) {
    snprintf(address, size, strchr(host, ':') != NULL ? "[%s]:%s" : "%s:%s", host, port);
}

static void next(struct world *w, struct end *a) {
    uint32_t others = a->ep->others;
    cr_assert_gt(others, 0u, "%s: no other address behind: %s", w->name, last_words(a));
    a->count = 0;
    a->ops->next(a->ep);
    cr_assert_eq(a->ep->others, others - 1, "%s", w->name);
}

/* Until a request has come from one of the name's addresses; returns it. */
static void *request_by_name(struct world *w, struct end *a) {
    char at_hand[128];
    struct seen *s = NULL;
    uint64_t deadline = world_now(w) + 2 * LIMIT;
    while ((s = find(&w->listener, RMIG_FEV_REQUEST, 0, true)) == NULL) {
        struct seen *resolved = find(a, RMIG_FEV_RESOLVED, 0, true);
        cr_assert_lt(world_now(w), deadline, "%s: neither a request nor a failure in time", w->name);
        if (resolved != NULL) {
            resolved->used = true;
            get_caps(w, a);
            struct region r = region(w, a, 4096, RMIG_ACCESS_LOCAL_WRITE); // is gone before the next
            start_connect(w, a, "request.", 8);
            drop(w, &r);
        }
        cr_assert_eq(a->ops->address(a->ep, at_hand, sizeof at_hand, NULL), RMIG_OK, "%s", w->name);
        if (last_words(a) != NULL)
            next(w, a);
        pump(w);
    }
    s->used = true;
    return s->e.request;
}

static void open_by_name(struct world *w, struct end *a, const char *address) {
    struct rmig_ep_config cfg = wanted();
    struct rmig_error err = {0};
    struct rmig_ep *ep = NULL;
    cr_assert_eq(w->active->ops->open(w->active, address, &cfg, &ep, &err), RMIG_OK, "%s: %s", w->name, err.text);
    enter(w, a, w->active, ep);
    cr_assert_eq(a->ep->others, 1u, "%s: %u others", w->name, a->ep->others);
}

static void host_of(char *host, size_t size, bool v6) {
    char port[16];
    cr_assert_eq(rmig_split_address(any_port(v6), host, size, port, sizeof port, NULL), RMIG_OK);
}

static void connects_to(struct world *w, const char *host) {
    struct end a, p;
    char port[16];
    snprintf(port, sizeof port, "%s", port_text(w));
    set_port(w->address, sizeof w->address, host, port);
    connect_pair(w, &a, &p);
    send_message(w, &a, &p);
    leave(w, &a);
    leave(w, &p);
}

static void both_families_connect(struct world *w, const char *address) {
    char host[256];
    listen_on(w, address);
    for (int v6 = 0; v6 < 2; v6++) {
        host_of(host, sizeof host, v6 == 1);
        connects_to(w, host);
    }
    leave(w, &w->listener);
}

CONFORMANCE(a_name_is_listened_on_at_all_its_addresses) {
    char address[64];
    snprintf(address, sizeof address, "%s:0", several(w));
    both_families_connect(w, address);
}

CONFORMANCE(a_port_alone_is_listened_on_at_both_families) { both_families_connect(w, ":0"); }

CONFORMANCE(all_addresses_of_a_name_are_connected_to) {
    const char *name = several(w);
    for (int v6 = 0; v6 < 2; v6++) { // one of them is not the first
        struct end a, p;
        char address[128];
        listen_on(w, any_port(v6 == 1));
        snprintf(address, sizeof address, "%s:%s", name, port_text(w));
        open_by_name(w, &a, address);
        open_passive(w, &p, request_by_name(w, &a));
        finish_connect(w, &a, &p);
        send_message(w, &a, &p);
        send_message(w, &p, &a);
        leave_pair(w, &a, &p);
    }
}

CONFORMANCE(behind_a_rejection_the_next_address_of_a_name_is_tried) {
    const char *name = several(w);
    struct end a, p;
    struct rmig_error err = {0};
    char address[128];
    snprintf(address, sizeof address, "%s:0", name);
    listen_on(w, w->sim != NULL ? "sim:0" : address);
    snprintf(address, sizeof address, "%s:%s", w->sim != NULL ? "sim+sim" : name, port_text(w));
    open_by_name(w, &a, address);
    cr_assert_eq(w->passive->ops->reject(w->listener.ep, request_by_name(w, &a), NULL, 0, &err), RMIG_OK, "%s",
                 err.text);
    expect(w, &a, RMIG_FEV_REJECTED);
    cr_assert_eq(a.ep->others, 1u, "%s: the first address was not there", w->name);
    next(w, &a);
    open_passive(w, &p, request_by_name(w, &a));
    finish_connect(w, &a, &p);
    send_message(w, &a, &p);
    leave_pair(w, &a, &p);
}

CONFORMANCE(a_name_without_an_address_of_known_scope_is_refused) {
    struct rmig_ep_config cfg = wanted();
    struct rmig_error err = {0};
    struct rmig_ep *ep = NULL;
    if (w->sim != NULL)
        return;
    several(w);
    cr_assert_eq(w->passive->ops->listen(w->passive, "nearby:0", &ep, &err), RMIG_ERR_FABRIC, "%s", err.text);
    cr_assert(strstr(err.text, "'nearby:0'") != NULL && strstr(err.text, "%eth0") != NULL, "%s: %s", w->name, err.text);
    cr_assert_eq(w->active->ops->open(w->active, "nearby:4444", &cfg, &ep, &err), RMIG_ERR_UNREACHABLE, "%s", err.text);
    cr_assert(strstr(err.text, "'nearby:4444'") != NULL && strstr(err.text, "%eth0") != NULL, "%s: %s", w->name,
              err.text);
}

CONFORMANCE(a_name_with_an_address_in_use_is_refused_by_that_address) {
    struct rmig_error err = {0};
    struct rmig_ep *ep = NULL;
    char name[64], address[128], host[256];
    if (w->sim != NULL)
        return;
    snprintf(name, sizeof name, "%s", several(w));
    for (int v6 = 0; v6 < 2; v6++) {
        host_of(host, sizeof host, v6 == 1);
        listen_on(w, any_port(v6 == 1));
        snprintf(address, sizeof address, "%s:%s", name, port_text(w));
        cr_assert_neq(w->passive->ops->listen(w->passive, address, &ep, &err), RMIG_OK, "%s: %s", w->name, address);
        cr_assert(strstr(err.text, host) != NULL && strstr(err.text, "in use") != NULL, "%s: %s", w->name, err.text);
        leave(w, &w->listener);
    }
}

CONFORMANCE(bad_addresses_are_refused_with_a_text) {
    static const char *const bad[] = {"",      "127.0.0.1:port", "127.0.0.1:65536", "[::1:5", "127.0.0.1:-1",
                                      "a:b:c", "[fe80::1]:5"};
    struct rmig_ep_config cfg = wanted();
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        struct rmig_error err = {0};
        struct rmig_ep *ep = NULL;
        cr_assert_lt(w->passive->ops->listen(w->passive, bad[i], &ep, &err), 0, "%s: listens on \"%s\"", w->name,
                     bad[i]);
        cr_assert_neq(err.text[0], '\0', "%s: no text for \"%s\"", w->name, bad[i]);
        memset(&err, 0, sizeof err);
        cr_assert_lt(w->active->ops->open(w->active, bad[i], &cfg, &ep, &err), 0, "%s: opens \"%s\"", w->name, bad[i]);
        cr_assert_neq(err.text[0], '\0', "%s: no text for \"%s\"", w->name, bad[i]);
    }
}

CONFORMANCE(a_port_in_use_is_refused) {
    struct rmig_error err = {0};
    struct rmig_ep *second = NULL;
    listen_on(w, any_port(false));
    cr_assert_lt(w->passive->ops->listen(w->passive, w->address, &second, &err), 0, "%s: two listeners on %s", w->name,
                 w->address);
    cr_assert_neq(err.text[0], '\0');
    leave(w, &w->listener);
    listen_on(w, w->address);
    leave(w, &w->listener);
}

static void check_private(struct world *w, const struct seen *s, const uint8_t *data, size_t n, uint32_t limit) {
    cr_assert(s->e.private_data_length >= n && s->e.private_data_length <= limit,
              "%s: %zu bytes of private data became %zu, the limit is %u", w->name, n, s->e.private_data_length, limit);
    cr_assert_arr_eq(s->private_data, data, n, "%s: private data of %zu bytes changed on its way", w->name, n);
}

static void exchange_private(struct world *w, size_t request, size_t reply) {
    struct end a, p;
    uint8_t data[DATA_MAX], answer[DATA_MAX];
    fill(data, sizeof data);
    fill(answer, sizeof answer);
    listen_on(w, any_port(false));
    open_active(w, &a, w->address);
    request = request == 0 ? a.caps.private_data_request : request;
    start_connect(w, &a, data, request);
    struct seen *s = expect(w, &w->listener, RMIG_FEV_REQUEST);
    check_private(w, s, data, request, a.caps.private_data_request);
    open_passive(w, &p, s->e.request);
    reply = reply == 0 ? p.caps.private_data_reply : reply;
    start_accept(w, &p, answer, reply);
    check_private(w, expect(w, &a, RMIG_FEV_ESTABLISHED), answer, reply, p.caps.private_data_reply);
    expect(w, &p, RMIG_FEV_ESTABLISHED);
    send_message(w, &a, &p);
    send_message(w, &p, &a);
    leave_pair(w, &a, &p);
}

CONFORMANCE(private_data_of_8_bytes_goes_both_ways) { exchange_private(w, 8, 8); }

CONFORMANCE(private_data_at_its_limit_goes_both_ways) { exchange_private(w, 0, 0); }

CONFORMANCE(private_data_beyond_its_limit_is_refused) {
    static const uint8_t data[DATA_MAX + 1] = {1};
    struct end a, p;
    struct rmig_error err = {0};
    listen_on(w, any_port(false));
    open_active(w, &a, w->address);
    cr_assert_leq(a.caps.private_data_request, (uint32_t)DATA_MAX);
    cr_assert_lt(a.ops->connect(a.ep, data, a.caps.private_data_request + 1, &err), 0, "%s: too much is taken",
                 w->name);
    cr_assert_neq(err.text[0], '\0');
    leave(w, &a);
    half_connect(w, &a, &p);
    memset(&err, 0, sizeof err);
    cr_assert_lt(p.ops->accept(p.ep, data, p.caps.private_data_reply + 1, &err), 0, "%s: too much is taken", w->name);
    cr_assert_neq(err.text[0], '\0');
    leave_pair(w, &a, &p);
}

CONFORMANCE(capabilities_make_sense) {
    struct end a, p;
    connect_pair(w, &a, &p);
    const struct rmig_fabric_caps *both[] = {&a.caps, &p.caps};
    for (int i = 0; i < 2; i++) {
        const struct rmig_fabric_caps *c = both[i];
        cr_assert(c->write_max >= 1 && c->registration_max >= c->write_max / 2, "%s", w->name);
        cr_assert(c->write_depth >= 1 && c->send_depth >= 1 && c->recv_depth >= 2, "%s: depths %u %u %u", w->name,
                  c->write_depth, c->send_depth, c->recv_depth);
        cr_assert(c->private_data_request >= 8 && c->private_data_reply >= 8, "%s", w->name);
        cr_assert(c->key_bits >= 32 && c->key_bits <= 64, "%s: key_bits %u", w->name, c->key_bits);
        cr_assert(c->sends_after_writes || c->completion_is_delivery, "%s: nothing tells of delivery", w->name);
    }
    leave_pair(w, &a, &p);
}

static void reject_one(struct world *w, size_t reason) {
    struct end a;
    uint8_t data[DATA_MAX];
    struct rmig_error err = {0};
    fill(data, sizeof data);
    open_active(w, &a, w->address);
    start_connect(w, &a, data, 8);
    void *request = expect(w, &w->listener, RMIG_FEV_REQUEST)->e.request;
    int status = w->passive->ops->reject(w->listener.ep, request, data, reason, &err);
    if (status == RMIG_ERR_ARGUMENT && reason > 8) { // more than the fabric carries: the request is still there
        reason = 8;
        status = w->passive->ops->reject(w->listener.ep, request, data, reason, &err);
    }
    cr_assert_eq(status, RMIG_OK, "%s: reject: %s", w->name, err.text);
    struct seen *s = expect(w, &a, RMIG_FEV_REJECTED);
    if (s->e.private_data_length > 0 && reason > 0) // a fabric need not carry it
        check_private(w, s, data, reason, DATA_MAX);
    leave(w, &a);
}

CONFORMANCE(a_rejected_request_is_told_and_the_listener_goes_on) {
    struct end a, p;
    listen_on(w, any_port(false));
    reject_one(w, 0);
    reject_one(w, 8);
    reject_one(w, 100); // with a reason
    connect_pair(w, &a, &p);
    send_message(w, &a, &p);
    leave_pair(w, &a, &p);
}

CONFORMANCE(connecting_to_nobody_fails_in_time) {
    struct end a;
    listen_on(w, any_port(false));
    leave(w, &w->listener);
    open_active(w, &a, w->address);
    start_connect(w, &a, "request.", 8);
    expect_end_of(w, &a);
    cr_assert(find(&a, RMIG_FEV_REJECTED, 0, true) != NULL || find(&a, RMIG_FEV_ERROR, 0, true) != NULL, "%s", w->name);
    leave(w, &a);
}

CONFORMANCE(a_name_that_does_not_exist_is_told) {
    struct rmig_ep_config cfg = wanted();
    struct rmig_error err = {0};
    struct rmig_ep *ep = NULL;
    struct end a;
    int status = w->active->ops->open(w->active, "no-such-host.invalid:4444", &cfg, &ep, &err);
    if (status != RMIG_OK) {
        cr_assert(status < 0 && err.text[0] != '\0', "%s: %d without a text", w->name, status);
        return;
    }
    enter(w, &a, w->active, ep);
    expect(w, &a, RMIG_FEV_ERROR);
    leave(w, &a);
}

CONFORMANCE(a_listener_survives_an_abandoned_request) {
    struct end a, p;
    struct rmig_error err = {0};
    listen_on(w, any_port(false));
    open_active(w, &a, w->address);
    start_connect(w, &a, "abandon.", 8);
    struct seen *s = expect(w, &w->listener, RMIG_FEV_REQUEST);
    void *request = s->e.request;
    leave(w, &a);
    for (int i = 0; i < 20; i++) // the news may or may not have come when the request is accepted
        pump(w);
    struct rmig_ep_config cfg = wanted();
    struct rmig_ep *ep = NULL;
    if (w->passive->ops->open_request(w->listener.ep, request, &cfg, &ep, &err) == RMIG_OK) {
        enter(w, &p, w->passive, ep);
        if (p.ops->accept(p.ep, (const uint8_t *)"reply...", 8, &err) == RMIG_OK)
            expect_end_of(w, &p);
        leave(w, &p);
    } else {
        cr_assert_eq(w->passive->ops->reject(w->listener.ep, request, NULL, 0, NULL), RMIG_OK,
                     "%s: a request that could not be opened cannot be rejected", w->name);
    }
    cr_assert(err.status == RMIG_OK || err.text[0] != '\0', "%s: refused without a text", w->name);
    connect_pair(w, &a, &p);
    send_message(w, &a, &p);
    leave_pair(w, &a, &p);
}

CONFORMANCE(a_closed_listener_leaves_connections_alone) {
    struct end a, p, late;
    connect_pair(w, &a, &p);
    open_active(w, &late, w->address);
    start_connect(w, &late, "pending.", 8);
    expect(w, &w->listener, RMIG_FEV_REQUEST);
    leave(w, &w->listener);
    expect_end_of(w, &late);
    send_message(w, &a, &p);
    send_message(w, &p, &a);
    leave(w, &late);
    leave_pair(w, &a, &p);
}

CONFORMANCE(two_connections_at_once_are_kept_apart) {
    struct end a[2], p[2];
    void *request[2] = {NULL, NULL};
    listen_on(w, any_port(false));
    for (int i = 0; i < 2; i++) {
        open_active(w, &a[i], w->address);
        start_connect(w, &a[i], i == 0 ? "number 0" : "number 1", 8);
    }
    for (int i = 0; i < 2; i++) {
        struct seen *s = expect(w, &w->listener, RMIG_FEV_REQUEST);
        cr_assert(memcmp(s->private_data, "number ", 7) == 0 && (s->private_data[7] & 0xfe) == '0', "%s", w->name);
        request[s->private_data[7] - '0'] = s->e.request;
    }
    for (int i = 1; i >= 0; i--) {
        cr_assert_not_null(request[i]);
        open_passive(w, &p[i], request[i]);
        start_accept(w, &p[i], i == 0 ? "reply  0" : "reply  1", 8);
    }
    for (int i = 0; i < 2; i++) {
        struct seen *s = expect(w, &a[i], RMIG_FEV_ESTABLISHED);
        cr_assert_eq(s->private_data[7], '0' + i, "%s: the replies went astray", w->name);
        expect(w, &p[i], RMIG_FEV_ESTABLISHED);
    }
    send_message(w, &a[0], &p[0]);
    send_message(w, &p[1], &a[1]);
    leave(w, &p[0]);
    expect_end_of(w, &a[0]);
    send_message(w, &a[1], &p[1]);
    leave(w, &a[0]);
    leave_pair(w, &a[1], &p[1]);
}

// >>messages

CONFORMANCE(receives_posted_before_the_connection_get_the_first_messages) {
    struct end a, p;
    half_connect(w, &a, &p);
    struct region ra = region(w, &a, 8192, ALL_ACCESS), rp = region(w, &p, 8192, ALL_ACCESS);
    fill(ra.p, 4096);
    fill(rp.p, 4096);
    post_recv(w, &a, &ra, 4096, 2048, 1);
    post_recv(w, &a, &ra, 6144, 2048, 2);
    post_recv(w, &p, &rp, 4096, 2048, 3);
    finish_connect(w, &a, &p);
    post_send(w, &p, &rp, 0, 1000, 4);
    expect_id(w, &p, RMIG_FEV_SEND, 4);
    post_send(w, &p, &rp, 1000, 2000, 5);
    post_send(w, &a, &ra, 0, 500, 6);
    expect_id(w, &a, RMIG_FEV_RECV, 1);
    expect_id(w, &a, RMIG_FEV_RECV, 2);
    expect_id(w, &p, RMIG_FEV_RECV, 3);
    cr_assert_arr_eq(ra.p + 4096, rp.p, 1000);
    cr_assert_arr_eq(ra.p + 6144, rp.p + 1000, 2000);
    cr_assert_arr_eq(rp.p + 4096, ra.p, 500);
    expect_id(w, &p, RMIG_FEV_SEND, 5);
    expect_id(w, &a, RMIG_FEV_SEND, 6);
    drop(w, &ra);
    drop(w, &rp);
    leave_pair(w, &a, &p);
}

#define SLOT ((uint64_t)512 * 1024)

/* Sends messages of these lengths, as many at a time as both queues hold, and checks each as it comes. */
static void send_many(struct world *w, struct end *from, struct end *to, const uint64_t *lengths, uint64_t n) {
    uint64_t total = 0, sent = 0, received = 0, posted = 0, completed = 0, at_send = 0, at_check = 0;
    for (uint64_t i = 0; i < n; i++)
        total += lengths[i];
    uint64_t slots = sim_min(to->caps.recv_depth, 8), deadline = world_now(w) + 2 * LIMIT;
    struct region out = region(w, from, total, ALL_ACCESS), in = region(w, to, slots * SLOT, ALL_ACCESS);
    fill(out.p, total);
    while (received < n || completed < n) {
        for (; posted < n && posted < received + slots; posted++)
            post_recv(w, to, &in, posted % slots * SLOT, SLOT, posted);
        // iWARP ends a connection on which a message finds no receive posted.
        for (; sent < posted && sent - completed < from->caps.send_depth; at_send += lengths[sent++])
            if (try_send(w, from, &out, at_send, lengths[sent], sent) == RMIG_ERR_FULL)
                cr_assert_fail("%s: full with %llu of %u sends", w->name, (unsigned long long)(sent - completed),
                               from->caps.send_depth);
        pump(w);
        cr_assert_null(last_words(from), "%s: %s", w->name, last_words(from));
        cr_assert_null(last_words(to), "%s: %s", w->name, last_words(to));
        cr_assert_lt(world_now(w), deadline, "%s: %llu of %llu messages came", w->name, (unsigned long long)received,
                     (unsigned long long)n);
        for (struct seen *s; (s = find(to, RMIG_FEV_RECV, 0, true)) != NULL; received++) {
            s->used = true;
            cr_assert_eq(s->e.id, received, "%s: receives complete out of order", w->name);
            cr_assert_eq(s->e.length, lengths[received], "%s: message %llu of %llu bytes came with %llu", w->name,
                         (unsigned long long)received, (unsigned long long)lengths[received],
                         (unsigned long long)s->e.length);
            cr_assert_arr_eq(in.p + received % slots * SLOT, out.p + at_check, lengths[received]);
            at_check += lengths[received];
        }
        for (struct seen *s; (s = find(from, RMIG_FEV_SEND, 0, true)) != NULL; completed++)
            s->used = true;
        from->count = to->count = 0; // all of it was used
    }
    drop(w, &in);
    drop(w, &out);
}

CONFORMANCE(messages_of_every_length_come_whole_and_in_order) {
    struct end a, p;
    uint64_t lengths[120] = {1,   2,    3,    7,    8,    63,    64,    65,    127,   128,    129,      255, 256,
                             257, 1023, 4095, 4096, 4097, 16383, 65535, 65536, 65537, 131072, SLOT - 1, SLOT};
    for (size_t i = 25; i < 120; i++)
        lengths[i] = 1 + below((uint64_t)1 << (1 + below(17)));
    connect_pair(w, &a, &p);
    send_many(w, &a, &p, lengths, 120);
    send_many(w, &p, &a, lengths, 120);
    leave_pair(w, &a, &p);
}

CONFORMANCE(a_full_send_queue_says_so_and_recovers) {
    struct end a, p;
    connect_pair(w, &a, &p);
    struct region out = region(w, &a, 4096, ALL_ACCESS), in = region(w, &p, 4096, ALL_ACCESS);
    uint64_t sent = 0, posted = 0, slots = sim_min(p.caps.recv_depth, 8);
    for (; posted < slots; posted++)
        post_recv(w, &p, &in, 0, 256, posted);
    while (try_send(w, &a, &out, 0, 256, sent) == RMIG_OK)
        cr_assert_lt(++sent, 100000u, "%s: the queue never fills", w->name);
    cr_assert_geq(sent, (uint64_t)a.caps.send_depth, "%s: room for fewer than caps says", w->name);
    for (uint64_t i = 0; i < sent; i++) {
        expect_id(w, &p, RMIG_FEV_RECV, i);
        post_recv(w, &p, &in, 0, 256, posted++);
    }
    for (uint64_t i = 0; i < sent; i++)
        expect_id(w, &a, RMIG_FEV_SEND, i);
    post_send(w, &a, &out, 0, 256, sent);
    expect_id(w, &p, RMIG_FEV_RECV, sent);
    expect_id(w, &a, RMIG_FEV_SEND, sent);
    leave(w, &w->listener);
    drop(w, &out);
    drop(w, &in);
    leave_pair(w, &a, &p);
}

CONFORMANCE(a_full_receive_queue_says_so) {
    struct end a, p;
    connect_pair(w, &a, &p);
    struct region in = region(w, &p, 4096, ALL_ACCESS);
    uint64_t posted = 0;
    while (try_recv(&p, &in, 0, 256, posted) == RMIG_OK)
        cr_assert_lt(++posted, 100000u, "%s: the queue never fills", w->name);
    cr_assert_geq(posted, (uint64_t)p.caps.recv_depth, "%s: room for fewer than caps says", w->name);
    drop(w, &in);
    leave_pair(w, &a, &p);
}

CONFORMANCE(a_message_too_long_never_leaves_its_buffer) {
    struct end a, p;
    connect_pair(w, &a, &p);
    struct region out = region(w, &a, 65536, ALL_ACCESS), in = region(w, &p, 65536, ALL_ACCESS);
    memset(out.p, 0xee, 65536);
    post_recv(w, &p, &in, 0, 100, 1);
    post_send(w, &a, &out, 0, 65536, 2);
    uint64_t deadline = world_now(w) + 2 * LIMIT;
    while (last_words(&a) == NULL && last_words(&p) == NULL && find(&p, RMIG_FEV_RECV, 1, false) == NULL) {
        cr_assert_lt(world_now(w), deadline, "%s: neither a receive nor an error", w->name);
        pump(w);
    }
    for (size_t i = 100; i < 65536; i++)
        cr_assert_eq(in.p[i], 0, "%s: byte %zu beyond the buffer was written", w->name, i - 100);
    drop(w, &in);
    drop(w, &out);
    leave_pair(w, &a, &p);
}

CONFORMANCE(polling_for_one_event_at_a_time_loses_none) {
    struct end a, p;
    connect_pair(w, &a, &p);
    struct region out = region(w, &a, 4096, ALL_ACCESS), in = region(w, &p, 4096, ALL_ACCESS);
    uint64_t deadline = world_now(w) + 2 * LIMIT;
    post_recv(w, &p, &in, 0, 256, 0);
    post_recv(w, &p, &in, 256, 256, 1);
    p.quiet = true;
    for (uint64_t i = 0; i < 2; i++) {
        post_send(w, &a, &out, 0, 256, i);
        if (a.caps.send_depth == 1) {
            p.quiet = !p.caps.target_must_poll;
            expect_id(w, &a, RMIG_FEV_SEND, i);
        }
    }
    p.quiet = true;
    for (uint64_t want = count_events(&p, RMIG_FEV_RECV); want < 2;) {
        struct rmig_fabric_event e;
        struct rmig_error err = {0};
        int n = p.ops->poll(p.ep, &e, 1, &err);
        cr_assert(n == 0 || n == 1, "%s: poll for 1: %d: %s", w->name, n, err.text);
        cr_assert_lt(world_now(w), deadline, "%s: event %llu lost", w->name, (unsigned long long)want);
        if (n == 0) {
            pump(w);
            cr_assert_eq(p.ops->wait(p.f, &p.ep, 1, p.ops->now(p.f) + SIM_MS, &err), RMIG_OK, "%s", err.text);
            continue;
        }
        cr_assert(e.type == RMIG_FEV_RECV && e.id == want, "%s: %s %llu", w->name, type_name(e.type),
                  (unsigned long long)e.id);
        want++;
    }
    drop(w, &in);
    drop(w, &out);
    leave_pair(w, &a, &p);
}

// >>writes

/* Until all writes, the last of which has this id and is signalled, are in the target's memory. */
static void settle(struct world *w, struct end *from, struct end *to, const struct rmig_write *writes, size_t n) {
    to->quiet = from->caps.completion_is_delivery && !to->caps.target_must_poll;
    for (size_t i = 0; i < n; i++)
        if (writes[i].signal)
            expect_id(w, from, RMIG_FEV_WRITE, writes[i].id);
    to->quiet = false;
    if (!from->caps.completion_is_delivery)
        send_message(w, from, to);
}

CONFORMANCE(completed_writes_are_in_the_target_memory) {
    struct end a, p;
    connect_pair(w, &a, &p);
    const uint64_t sizes[] = {1, 2, 8, 127, 128, 129, 4096, 65536, 1000003, 4 << 20};
    const uint64_t n = 16 << 20;
    struct end *from = &a, *to = &p;
    for (int way = 0; way < 2; way++, from = &p, to = &a) {
        struct region src = region(w, from, n, ALL_ACCESS), dst = region(w, to, n, ALL_ACCESS);
        uint8_t *model = calloc(1, n);
        fill(src.p, n);
        for (uint64_t i = 0; i < 30; i++) {
            uint64_t length = i < 10 ? sizes[i] : 1 + below((uint64_t)1 << (1 + below(20)));
            uint64_t at = below(n - length + 1), read = below(n - length + 1);
            length = sim_min(length, from->caps.write_max);
            struct rmig_write write = make_write(&src, read, &dst, at, length, 1000 + i, true);
            write_all(w, from, &write, 1);
            settle(w, from, to, &write, 1);
            memcpy(model + at, src.p + read, length);
            cr_assert_eq(memcmp(dst.p + at, model + at, length), 0, "%s: %llu bytes at %llu are not there", w->name,
                         (unsigned long long)length, (unsigned long long)at);
        }
        cr_assert_eq(memcmp(dst.p, model, n), 0, "%s: bytes beside the writes changed", w->name);
        free(model);
        drop(w, &src);
        drop(w, &dst);
    }
    leave_pair(w, &a, &p);
}

CONFORMANCE(a_batch_larger_than_the_queue_is_taken_in_parts) {
    enum { COUNT = 400, SIZE = 10000 };
    struct end a, p;
    connect_pair(w, &a, &p);
    struct region src = region(w, &a, COUNT * SIZE, ALL_ACCESS), dst = region(w, &p, COUNT * SIZE, ALL_ACCESS);
    static struct rmig_write writes[COUNT];
    fill(src.p, src.n);
    for (uint64_t i = 0; i < COUNT; i++)
        writes[i] = make_write(&src, i * SIZE, &dst, (COUNT - 1 - i) * SIZE, SIZE, i + 1, true);
    int taken = post_writes(w, &a, writes, COUNT);
    cr_assert_leq((uint32_t)taken, a.caps.write_depth, "%s: more taken than caps allows", w->name);
    cr_assert_eq((uint32_t)taken, sim_min(COUNT, a.caps.write_depth), "%s: room for fewer than caps says", w->name);
    write_all(w, &a, writes + taken, COUNT - (size_t)taken);
    settle(w, &a, &p, writes, COUNT);
    for (uint64_t i = 0; i < COUNT; i++)
        cr_assert_eq(memcmp(dst.p + (COUNT - 1 - i) * SIZE, src.p + i * SIZE, SIZE), 0, "%s: write %llu", w->name,
                     (unsigned long long)i);
    cr_assert_eq(count_events(&a, RMIG_FEV_WRITE), (size_t)COUNT, "%s: one completion each", w->name);
    if (a.caps.writes_in_order)
        for (uint64_t i = 0, id = 1; i < a.count; i++)
            if (a.seen[i].e.type == RMIG_FEV_WRITE)
                cr_assert_eq(a.seen[i].e.id, id++, "%s: completions out of order", w->name);
    drop(w, &src);
    drop(w, &dst);
    leave_pair(w, &a, &p);
}

CONFORMANCE(a_completion_covers_the_unsignalled_writes_before_it) {
    enum { ROUNDS = 60, SIZE = 3000 };
    struct end a, p;
    connect_pair(w, &a, &p);
    uint64_t per = sim_min(a.caps.write_depth, 16), id = 0;
    struct region src = region(w, &a, per * SIZE, ALL_ACCESS), dst = region(w, &p, per * SIZE, ALL_ACCESS);
    for (int round = 0; round < ROUNDS && a.caps.writes_in_order; round++) {
        struct rmig_write writes[16];
        fill(src.p, src.n);
        for (uint64_t i = 0; i < per; i++)
            writes[i] = make_write(&src, i * SIZE, &dst, i * SIZE, SIZE, ++id, i == per - 1);
        write_all(w, &a, writes, per);
        settle(w, &a, &p, writes, per);
        cr_assert_eq(memcmp(dst.p, src.p, src.n), 0, "%s: not all there in round %d", w->name, round);
    }
    drop(w, &src);
    drop(w, &dst);
    leave_pair(w, &a, &p);
}

CONFORMANCE(overlapping_writes_land_in_order) {
    enum { COUNT = 300, SIZE = 40000 };
    struct end a, p;
    connect_pair(w, &a, &p);
    struct region src = region(w, &a, COUNT * 64 + SIZE, ALL_ACCESS), dst = region(w, &p, SIZE * 2, ALL_ACCESS);
    static struct rmig_write writes[COUNT];
    uint8_t *model = calloc(1, dst.n);
    fill(src.p, src.n);
    for (uint64_t i = 0; i < COUNT && a.caps.writes_in_order; i++) {
        uint64_t at = below(SIZE), n = 1 + below(SIZE);
        writes[i] = make_write(&src, i * 64, &dst, at, n, i + 1, i % 2 == 1);
        memcpy(model + at, src.p + i * 64, n);
    }
    if (a.caps.writes_in_order) {
        write_all(w, &a, writes, COUNT);
        settle(w, &a, &p, writes, COUNT);
        cr_assert_eq(memcmp(dst.p, model, dst.n), 0, "%s: a later write was overwritten by an earlier one", w->name);
    }
    free(model);
    drop(w, &src);
    drop(w, &dst);
    leave_pair(w, &a, &p);
}

CONFORMANCE(a_message_after_writes_finds_their_data) {
    enum { ROUNDS = 30 };
    struct end a, p;
    connect_pair(w, &a, &p);
    const uint64_t part = 100000;
    uint64_t per = sim_min(a.caps.write_depth, 8);
    struct region src = region(w, &a, per * part, ALL_ACCESS), dst = region(w, &p, per * part, ALL_ACCESS);
    struct region in = region(w, &p, 4096, ALL_ACCESS), out = region(w, &a, 4096, ALL_ACCESS);
    for (uint64_t round = 1; round <= ROUNDS && a.caps.sends_after_writes; round++) {
        struct rmig_write writes[8];
        memset(src.p, (int)round, src.n);
        for (uint64_t i = 0; i < per; i++)
            writes[i] = make_write(&src, i * part, &dst, i * part, part, round * 100 + i, i == per - 1);
        post_recv(w, &p, &in, 0, 4096, round);
        write_all(w, &a, writes, per);
        post_send(w, &a, &out, 0, 1 + below(4096), round);
        expect_id(w, &p, RMIG_FEV_RECV, round);
        for (size_t i = 0; i < dst.n; i += 997)
            cr_assert_eq(dst.p[i], (uint8_t)round, "%s: the message overtook byte %zu in round %llu", w->name, i,
                         (unsigned long long)round);
        expect_id(w, &a, RMIG_FEV_SEND, round);
        expect_id(w, &a, RMIG_FEV_WRITE, round * 100 + per - 1);
    }
    drop(w, &src);
    drop(w, &dst);
    drop(w, &in);
    drop(w, &out);
    leave_pair(w, &a, &p);
}

CONFORMANCE(a_large_write_comes_whole) {
    struct end a, p;
    connect_pair(w, &a, &p);
    uint64_t n = sim_min((uint64_t)48 << 20, sim_min(a.caps.write_max, p.caps.registration_max));
    struct region src = region(w, &a, n, ALL_ACCESS), dst = region(w, &p, n, ALL_ACCESS);
    for (uint64_t i = 0; i < n / 8; i++)
        memcpy(src.p + 8 * i, &i, 8);
    struct rmig_write write = make_write(&src, 0, &dst, 0, n, 1, true);
    write_all(w, &a, &write, 1);
    settle(w, &a, &p, &write, 1);
    cr_assert_eq(memcmp(src.p, dst.p, n), 0, "%s: %llu bytes", w->name, (unsigned long long)n);
    drop(w, &src);
    drop(w, &dst);
    leave_pair(w, &a, &p);
}

// >>registration

CONFORMANCE(a_thousand_regions_have_keys_of_their_own) {
    enum { COUNT = 1000, SIZE = 4096 };
    struct end a, p;
    static struct region in[COUNT];
    connect_pair(w, &a, &p);
    struct region src = region(w, &a, SIZE, ALL_ACCESS);
    uint8_t *memory = pages((size_t)COUNT * SIZE);
    for (size_t i = 0; i < COUNT; i++) {
        in[i] = region_at(w, &p, memory + i * SIZE, SIZE, ALL_ACCESS);
        for (size_t k = 0; k < i; k++)
            cr_assert_neq(in[k].mr.key, in[i].mr.key, "%s: regions %zu and %zu share a key", w->name, k, i);
    }
    fill(src.p, SIZE);
    for (uint64_t i = 0; i < 100; i++) {
        uint64_t r = below(COUNT), at = below(SIZE);
        struct rmig_write write = make_write(&src, at, &in[r], at, 1, i + 1, true);
        write_all(w, &a, &write, 1);
        settle(w, &a, &p, &write, 1);
        cr_assert_eq(in[r].p[at], src.p[at], "%s: region %llu", w->name, (unsigned long long)r);
    }
    for (size_t i = 0; i < COUNT; i++)
        deregister(w, &in[i * 7 % COUNT]);
    munmap(memory, (size_t)COUNT * SIZE);
    drop(w, &src);
    leave_pair(w, &a, &p);
}

CONFORMANCE(memory_can_be_registered_again_and_again) {
    struct end a, p;
    connect_pair(w, &a, &p);
    struct region src = region(w, &a, 65536, ALL_ACCESS);
    uint8_t *memory = pages(1 << 20);
    fill(src.p, src.n);
    for (uint64_t i = 0; i < 200; i++) {
        uint64_t at = below(1 << 19), n = 1 + below(65536);
        struct region whole = region_at(w, &p, memory, 1 << 20, ALL_ACCESS); // overlaps the other
        struct region part = region_at(w, &p, memory + at, n, ALL_ACCESS);
        struct rmig_write write = make_write(&src, 0, &part, 0, n, i + 1, true);
        write_all(w, &a, &write, 1);
        settle(w, &a, &p, &write, 1);
        cr_assert_eq(memcmp(memory + at, src.p, n), 0, "%s", w->name);
        deregister(w, &whole);
        deregister(w, &part);
    }
    munmap(memory, 1 << 20);
    drop(w, &src);
    leave_pair(w, &a, &p);
}

CONFORMANCE(large_memory_can_be_registered) {
    struct end a, p;
    connect_pair(w, &a, &p);
    uint64_t n = sim_min((uint64_t)1 << 28, p.caps.registration_max);
    struct region big = region(w, &p, n, ALL_ACCESS), src = region(w, &a, 4096, ALL_ACCESS);
    fill(src.p, 4096);
    struct rmig_write write = make_write(&src, 0, &big, n - 4096, 4096, 1, true);
    write_all(w, &a, &write, 1);
    settle(w, &a, &p, &write, 1);
    cr_assert_arr_eq(big.p + n - 4096, src.p, 4096, "%s", w->name);
    drop(w, &big);
    drop(w, &src);
    leave_pair(w, &a, &p);
}

enum { GUARD = 8192 }; // bytes on each side of the region, and the region's own length

typedef void spoiler(struct world *w, struct rmig_write *write, struct region *dst);

/* A write that the target must refuse: `spoil` makes it so, given a good one. The target's memory stays as it was, at
   least one end learns of it, and other connections go on. */
static void refuse_write(struct world *w, unsigned access, spoiler *spoil) {
    struct end a, p, other_a, other_p;
    connect_pair(w, &other_a, &other_p);
    connect_pair(w, &a, &p);
    uint8_t *memory = pages(3 * GUARD);
    memset(memory, 0x5a, 3 * GUARD);
    struct region dst = region_at(w, &p, memory + GUARD, GUARD, access), src = region(w, &a, GUARD, ALL_ACCESS);
    memset(src.p, 0xee, GUARD);
    struct rmig_write write = make_write(&src, 0, &dst, 0, GUARD / 2, 1, true);
    spoil(w, &write, &dst);
    struct rmig_error err = {0};
    int taken = a.ops->write(a.ep, &write, 1, &err); // a fabric may see it at once
    cr_assert(taken == 1 || (taken < 0 && err.text[0] != '\0'), "%s: write: %d", w->name, taken);
    uint64_t deadline = world_now(w) + 2 * LIMIT;
    while (taken == 1 && last_words(&a) == NULL && last_words(&p) == NULL) {
        cr_assert_lt(world_now(w), deadline, "%s: no end learns of a write that must be refused", w->name);
        pump(w);
    }
    cr_assert(!a.caps.completion_is_delivery || find(&a, RMIG_FEV_WRITE, 1, false) == NULL, "%s: it completed",
              w->name);
    for (size_t i = 0; i < 3 * GUARD; i++)
        cr_assert_eq(memory[i], 0x5a, "%s: byte %td of the region was written", w->name, (ptrdiff_t)i - GUARD);
    send_message(w, &other_a, &other_p);
    if (dst.mr.handle != NULL)
        deregister(w, &dst);
    munmap(memory, 3 * GUARD);
    drop(w, &src);
    leave(w, &other_a);
    leave(w, &other_p);
    leave_pair(w, &a, &p);
}

static void spoil_key(struct world *w, struct rmig_write *write, struct region *dst) {
    (void)w, (void)dst;
    write->key ^= 0x15400000u;
}

static void spoil_key_zero(struct world *w, struct rmig_write *write, struct region *dst) {
    (void)w, (void)dst;
    write->key = 0;
}

static void spoil_end(struct world *w, struct rmig_write *write, struct region *dst) {
    (void)w;
    write->remote_address = dst->mr.remote_address + GUARD - write->length + 1;
}

static void spoil_start(struct world *w, struct rmig_write *write, struct region *dst) {
    (void)w;
    write->remote_address = dst->mr.remote_address - 1;
}

static void spoil_beyond(struct world *w, struct rmig_write *write, struct region *dst) {
    (void)w;
    write->remote_address = dst->mr.remote_address + GUARD;
}

static void spoil_wrap(struct world *w, struct rmig_write *write, struct region *dst) {
    (void)w, (void)dst;
    write->remote_address = UINT64_MAX - write->length / 2; // its end comes around to 0
}

static void spoil_region(struct world *w, struct rmig_write *write, struct region *dst) {
    (void)write;
    deregister(w, dst);
    dst->mr.handle = NULL;
}

static void spoil_nothing(struct world *w, struct rmig_write *write, struct region *dst) {
    (void)w, (void)write, (void)dst;
}

CONFORMANCE(a_write_with_an_unknown_key_is_refused) { refuse_write(w, ALL_ACCESS, spoil_key); }
CONFORMANCE(a_write_with_key_0_is_refused) { refuse_write(w, ALL_ACCESS, spoil_key_zero); }
CONFORMANCE(a_write_past_the_end_is_refused) { refuse_write(w, ALL_ACCESS, spoil_end); }
CONFORMANCE(a_write_before_the_start_is_refused) { refuse_write(w, ALL_ACCESS, spoil_start); }
CONFORMANCE(a_write_beyond_the_end_is_refused) { refuse_write(w, ALL_ACCESS, spoil_beyond); }
CONFORMANCE(a_write_whose_end_wraps_around_is_refused) { refuse_write(w, ALL_ACCESS, spoil_wrap); }
CONFORMANCE(a_write_after_deregistration_is_refused) { refuse_write(w, ALL_ACCESS, spoil_region); }
CONFORMANCE(a_write_to_memory_not_meant_for_the_peer_is_refused) {
    refuse_write(w, RMIG_ACCESS_LOCAL_READ | RMIG_ACCESS_LOCAL_WRITE, spoil_nothing);
}

Test(ofi, a_region_that_the_peer_may_not_write_needs_no_key, .timeout = 120) {
    const unsigned local = RMIG_ACCESS_LOCAL_READ | RMIG_ACCESS_LOCAL_WRITE;
    struct world w = {.name = "ofi, tcp, as newer libfabric"};
    struct end a, p;
    keyless = true;
    open_ofi_tcp(&w);
    connect_pair(&w, &a, &p);
    struct region src = region(&w, &a, GUARD, local), dst = region(&w, &p, GUARD, ALL_ACCESS);
    cr_assert_eq(src.mr.key, 0, "key 0x%llx, none was given", (unsigned long long)src.mr.key);
    fill(src.p, GUARD);
    struct rmig_write write = make_write(&src, 0, &dst, 0, GUARD, 1, true);
    write_all(&w, &a, &write, 1);
    settle(&w, &a, &p, &write, 1);
    cr_assert_arr_eq(src.p, dst.p, GUARD);
    drop(&w, &src);
    drop(&w, &dst);
    leave_pair(&w, &a, &p);
    refuse_write(&w, local, spoil_nothing);
    world_close(&w);
}

/* A connection that was granted nothing, with all that another connection of the same fabric was granted. */
static void use_foreign_key(struct world *w, bool other_listener) {
    struct end a, p, b, q, first = {0};
    connect_pair(w, &a, &p);
    struct region dst = region(w, &p, GUARD, ALL_ACCESS);
    memset(dst.p, 0x5a, dst.n);
    if (other_listener)
        hand_on(w, &w->listener, &first);
    connect_pair(w, &b, &q);
    struct region src = region(w, &b, GUARD, ALL_ACCESS), own = region(w, &q, GUARD, ALL_ACCESS);
    memset(src.p, 0xee, src.n);
    struct rmig_write honest = make_write(&src, 0, &own, 0, GUARD, 1, true);
    write_all(w, &b, &honest, 1);
    settle(w, &b, &q, &honest, 1);
    struct rmig_write foreign = make_write(&src, 0, &dst, 0, GUARD, 2, true);
    struct rmig_error err = {0};
    int taken = b.ops->write(b.ep, &foreign, 1, &err);
    uint64_t deadline = world_now(w) + 2 * LIMIT;
    while (taken == 1 && last_words(&b) == NULL && last_words(&q) == NULL) {
        cr_assert_lt(world_now(w), deadline, "%s: no end learns of the write with a foreign key", w->name);
        pump(w);
    }
    for (size_t i = 0; i < dst.n; i++)
        cr_assert_eq(dst.p[i], 0x5a, "%s: byte %zu was written by a connection that was not granted it", w->name, i);
    send_message(w, &a, &p);
    drop(w, &src);
    drop(w, &own);
    drop(w, &dst);
    leave(w, &b);
    leave(w, &q);
    if (other_listener)
        leave(w, &first);
    leave_pair(w, &a, &p);
}

CONFORMANCE(a_key_is_not_good_on_another_connection_of_the_listener) { use_foreign_key(w, false); }
CONFORMANCE(a_key_is_not_good_on_a_connection_of_another_listener) { use_foreign_key(w, true); }

/* For fabrics that choose keys themselves: neither counted nor multiples of anything, and no two fabrics alike. */
CONFORMANCE(keys_are_no_sequence) {
    enum { COUNT = 64 };
    struct end a, p;
    struct region r[COUNT];
    uint64_t high = 0, low = 0;
    connect_pair(w, &a, &p);
    for (size_t i = 0; i < COUNT; i++) {
        r[i] = region(w, &p, 4096, ALL_ACCESS);
        high += r[i].mr.key >> 31 & 1;
        low += r[i].mr.key & 1;
    }
    bool chosen = w->sim != NULL || getenv("RMIG_TEST_ADDR") == NULL; // adapters make their own
    for (size_t i = 2; i < COUNT && chosen; i++)
        for (size_t k = 0; k + 1 < i; k++) {
            uint32_t one = (uint32_t)(r[i].mr.key - r[i - 1].mr.key), other = (uint32_t)(r[k + 1].mr.key - r[k].mr.key);
            cr_assert_neq(one, other, "%s: key %zu follows from key %zu as key %zu does from key %zu", w->name, i,
                          i - 1, k + 1, k);
        }
    if (chosen) // 64 coins each: fewer than 8 heads come once in 2^31 runs
        cr_assert(high >= 8 && high <= COUNT - 8 && low >= 8 && low <= COUNT - 8,
                  "%s: %llu of %d keys have the top "
                  "bit, %llu the lowest",
                  w->name, (unsigned long long)high, COUNT, (unsigned long long)low);
    for (size_t i = 0; i < COUNT; i++)
        drop(w, &r[i]);
    leave_pair(w, &a, &p);
}

// >>the end of a connection

static void send_then(struct world *w, bool wait_for_completions, bool orderly) {
    struct end a, p;
    connect_pair(w, &a, &p);
    struct region out = region(w, &a, 4096, ALL_ACCESS), in = region(w, &p, 4096, ALL_ACCESS);
    uint64_t n = sim_min(sim_min(p.caps.recv_depth, a.caps.send_depth), 4);
    fill(out.p, 4096);
    for (uint64_t i = 0; i < n; i++)
        post_recv(w, &p, &in, i * 1024, 1024, i);
    for (uint64_t i = 0; i < n; i++)
        post_send(w, &a, &out, i * 1024, 1024, i);
    for (uint64_t i = 0; i < n && wait_for_completions; i++)
        expect_id(w, &a, RMIG_FEV_SEND, i);
    /* A completion says that the buffer is free, not that the peer has the message: only disconnect promises that. */
    bool arrived = orderly || (wait_for_completions && a.caps.completion_is_delivery && !p.caps.target_must_poll);
    if (orderly)
        a.ops->disconnect(a.ep);
    else {
        deregister(w, &out);
        a.ops->close(a.ep);
        a.ep = NULL;
    }
    expect_end_of(w, &p);
    uint64_t got = 0;
    for (size_t i = 0; i < p.count; i++) {
        cr_assert(!is_last(p.seen[i].e.type) || i == p.count - 1, "%s: events after the last", w->name);
        if (p.seen[i].e.type == RMIG_FEV_RECV)
            cr_assert_eq(p.seen[i].e.id, got++, "%s", w->name);
    }
    cr_assert(got == n || !arrived, "%s: %llu of %llu messages came before the end", w->name, (unsigned long long)got,
              (unsigned long long)n);
    cr_assert_arr_eq(in.p, out.p, got * 1024, "%s", w->name);
    if (orderly)
        deregister(w, &out);
    munmap(out.p, out.n);
    drop(w, &in);
    leave_pair(w, &a, &p);
}

CONFORMANCE(disconnecting_comes_after_what_was_sent) { send_then(w, true, true); }
CONFORMANCE(disconnecting_at_once_still_delivers) { send_then(w, false, true); }
CONFORMANCE(closing_is_told_to_the_peer) { send_then(w, true, false); }
CONFORMANCE(closing_in_the_middle_of_sending_is_told_to_the_peer) { send_then(w, false, false); }

CONFORMANCE(the_passive_side_can_end_it_too) {
    struct end a, p;
    connect_pair(w, &a, &p);
    p.ops->disconnect(p.ep);
    expect_end_of(w, &a);
    cr_assert_not_null(find(&a, RMIG_FEV_DISCONNECTED, 0, true), "%s: %s", w->name, last_words(&a));
    leave_pair(w, &a, &p);
    connect_pair(w, &a, &p);
    leave(w, &p);
    expect_end_of(w, &a);
    leave_pair(w, &a, &p);
}

CONFORMANCE(work_posted_after_the_end_fails_or_vanishes) {
    struct end a, p;
    connect_pair(w, &a, &p);
    struct region out = region(w, &a, 4096, ALL_ACCESS), dst = region(w, &p, 4096, ALL_ACCESS);
    deregister(w, &dst);
    leave(w, &p);
    expect_end_of(w, &a);
    for (uint64_t i = 0; i < 3; i++) {
        struct rmig_error err = {0};
        struct rmig_write write = make_write(&out, 0, &dst, 0, 4096, i, true);
        int status = a.ops->send(a.ep, out.p, 64, &out.mr, i, &err);
        cr_assert(status >= 0 || err.text[0] != '\0', "%s: send failed without a text", w->name);
        memset(&err, 0, sizeof err);
        status = a.ops->write(a.ep, &write, 1, &err);
        cr_assert(status >= 0 || err.text[0] != '\0', "%s: write failed without a text", w->name);
        memset(&err, 0, sizeof err);
        status = a.ops->recv(a.ep, out.p, 64, &out.mr, i, &err);
        cr_assert(status >= 0 || err.text[0] != '\0', "%s: recv failed without a text", w->name);
        for (int k = 0; k < 5; k++)
            pump(w);
    }
    cr_assert_eq(count_events(&a, RMIG_FEV_WRITE) + count_events(&a, RMIG_FEV_SEND), 0, "%s: it completed", w->name);
    munmap(dst.p, dst.n);
    drop(w, &out);
    leave_pair(w, &a, &p);
}

// >>writes that have half arrived

enum cut_depth { CUT, CUT_AND_DEREGISTER, CUT_AND_CLOSE, CUT_DEPTHS };

/* A write is held half-way at the target, which then cuts the connection. What comes afterwards lands nowhere, though
   other connections of the same fabric go on. */
static void cut_half_way(struct world *w, enum cut_depth depth) {
    enum { SIZE = 1 << 20, HALF = 300000 };
    struct end a, p, b, q;
    struct half_write proxy;
    static uint8_t then[SIZE];
    listen_on(w, any_port(false));
    half_write_open(&proxy, w->address);
    connect_pair(w, &b, &q);
    snprintf(w->address, sizeof w->address, "%s", proxy.address);
    connect_pair(w, &a, &p);
    send_message(w, &a, &p);
    struct region src = region(w, &a, SIZE, ALL_ACCESS), dst = region(w, &p, SIZE, ALL_ACCESS);
    memset(src.p, 0xee, SIZE);
    half_write_hold(&proxy, 0, HALF);
    struct rmig_write write = make_write(&src, 0, &dst, 0, SIZE, 1, true);
    write_all(w, &a, &write, 1);
    uint64_t deadline = world_now(w) + 2 * LIMIT;
    while (!half_write_held(&proxy, 0) || dst.p[HALF / 2] == 0) {
        cr_assert_lt(world_now(w), deadline, "%s: half a write did not come through", w->name);
        pump(w);
    }
    p.ops->cut(p.ep);
    p.quiet = true;
    memcpy(then, dst.p, SIZE);
    cr_assert_eq(then[SIZE - 1], 0, "%s: the whole write is there", w->name);
    if (depth == CUT_AND_DEREGISTER)
        deregister(w, &dst);
    if (depth == CUT_AND_CLOSE) {
        deregister(w, &dst);
        leave(w, &p);
    }
    half_write_release(&proxy);
    cr_assert(half_write_wait_over(&proxy, 0, SIZE, 20), "%s: the rest was not sent on", w->name);
    a.quiet = true;
    for (int i = 0; i < 20; i++) {
        struct rmig_fabric_event e;
        send_message(w, &b, &q);
        send_message(w, &q, &b);
        if (p.ep != NULL)
            cr_assert_leq(p.ops->poll(p.ep, &e, 1, NULL), 0, "%s: an event after cut", w->name);
    }
    cr_assert_eq(memcmp(then, dst.p, SIZE), 0, "%s: memory changed after the connection was cut", w->name);
    if (depth == CUT)
        deregister(w, &dst);
    munmap(dst.p, SIZE);
    drop(w, &src);
    leave(w, &b);
    leave(w, &q);
    leave_pair(w, &a, &p);
    half_write_close(&proxy);
}

/* Over the providers that speak TCP; a simulated world has nothing that a proxy could hold. */
#define OVER_TCP(behaviour)                                                                                            \
    static void behaviour(struct world *w);                                                                            \
    ParameterizedTestParameters(ofi, behaviour) {                                                                      \
        static size_t rows[FABRICS];                                                                                   \
        return cr_make_param_array(size_t, rows, choose_tcp_rows(rows));                                               \
    }                                                                                                                  \
    ParameterizedTest(size_t *row, ofi, behaviour, .timeout = 600) {                                                   \
        struct world w = {0};                                                                                          \
        w.name = fabrics[*row].name;                                                                                   \
        fabrics[*row].open(&w);                                                                                        \
        behaviour(&w);                                                                                                 \
        world_close(&w);                                                                                               \
    }                                                                                                                  \
    static void behaviour(struct world *w)

static size_t choose_tcp_rows(size_t *rows) {
    size_t n = 0;
    for (size_t i = 0; i < FABRICS; i++)
        if (fabrics[i].real && !fabrics[i].rdma)
            rows[n++] = i;
    return n;
}

OVER_TCP(cut_is_safe_in_every_state) {
    struct end a, p, b, q;
    struct rmig_fabric_event e;
    connect_pair(w, &b, &q);
    for (int state = 0; state < 4; state++) { // resolved, requested, accepted, up
        open_active(w, &a, w->address);
        if (state > 0)
            start_connect(w, &a, "request.", 8);
        if (state > 0)
            open_passive(w, &p, expect(w, &w->listener, RMIG_FEV_REQUEST)->e.request);
        if (state > 1)
            start_accept(w, &p, "reply...", 8);
        if (state > 2) {
            expect(w, &a, RMIG_FEV_ESTABLISHED);
            expect(w, &p, RMIG_FEV_ESTABLISHED);
        }
        struct end *ends[] = {&a, state > 0 ? &p : &a};
        for (int i = 0; i < 4; i++) {
            const struct rmig_fabric_ops *ops = ends[i % 2]->ops;
            struct rmig_ep *ep = ends[i % 2]->ep;
            struct rmig_error err = {0};
            uint8_t byte = 0;
            ops->cut(ep);
            cr_assert_leq(ops->poll(ep, &e, 1, NULL), 0, "%s: an event after cut", w->name);
            cr_assert_lt(ops->recv(ep, &byte, 1, NULL, 1, &err), 0, "%s: a receive after cut", w->name);
            cr_assert_lt(ops->send(ep, &byte, 1, NULL, 1, &err), 0, "%s: a send after cut", w->name);
            ops->disconnect(ep);
        }
        leave(w, &a);
        if (state > 0)
            leave(w, &p);
    }
    send_message(w, &b, &q);
    leave(w, &b);
    leave(w, &q);
    leave(w, &w->listener);
}

OVER_TCP(cut_ends_a_write_that_has_half_arrived) { cut_half_way(w, CUT); }
OVER_TCP(cut_and_dereg_end_a_write_that_has_half_arrived) { cut_half_way(w, CUT_AND_DEREGISTER); }
OVER_TCP(cut_and_close_end_a_write_that_has_half_arrived) { cut_half_way(w, CUT_AND_CLOSE); }

// >>a listener among strangers, over TCP

static uint16_t port_of(const struct world *w) { return (uint16_t)atoi(strrchr(w->address, ':') + 1); }

static size_t open_descriptors(void) {
    size_t n = 0;
    DIR *d = opendir("/proc/self/fd");
    cr_assert_not_null(d);
    while (readdir(d) != NULL)
        n++;
    closedir(d);
    return n - 3; // ".", ".." and the folder's own
}

/* Leaves this process so many descriptors more; SIZE_MAX: as many as it may have. */
static void allow_descriptors(size_t more) {
    struct rlimit limit;
    cr_assert_eq(getrlimit(RLIMIT_NOFILE, &limit), 0);
    limit.rlim_cur = more == SIZE_MAX ? limit.rlim_max : open_descriptors() + more;
    cr_assert_eq(setrlimit(RLIMIT_NOFILE, &limit), 0);
}

static void cr_expect_descriptors_named(const struct rmig_error *err) {
    cr_assert_eq(err->provider_code, EMFILE, "%d: %s", err->provider_code, err->text);
    cr_assert_not_null(strstr(err->text, "descriptors"), "%s", err->text);
    cr_assert_not_null(strstr(err->text, "RLIMIT_NOFILE"), "%s", err->text);
    cr_assert_not_null(strstr(err->text, "ulimit -n"), "%s", err->text);
}

OVER_TCP(without_descriptors_every_way_to_an_endpoint_says_so) {
    struct end a, p;
    struct rmig_ep_config cfg = wanted();
    struct rmig_ep *ep = NULL;
    struct rmig_error err = {0};
    listen_on(w, any_port(false));
    open_active(w, &a, w->address);
    start_connect(w, &a, "request.", 8);
    void *request = expect(w, &w->listener, RMIG_FEV_REQUEST)->e.request;
    for (size_t more = 0; more < 6; more += 5) { // not even one, and not enough
        allow_descriptors(more);
        memset(&err, 0, sizeof err);
        cr_assert_lt(w->passive->ops->open_request(w->listener.ep, request, &cfg, &ep, &err), 0, "%s: %zu", w->name,
                     more);
        cr_expect_descriptors_named(&err);
        memset(&err, 0, sizeof err);
        cr_assert_lt(w->active->ops->open(w->active, w->address, &cfg, &ep, &err), 0, "%s: %zu", w->name, more);
        cr_expect_descriptors_named(&err);
        allow_descriptors(SIZE_MAX);
    }
    allow_descriptors(0);
    cr_assert_lt(w->passive->ops->listen(w->passive, any_port(false), &ep, &err), 0, "%s", w->name);
    cr_expect_descriptors_named(&err);
    allow_descriptors(SIZE_MAX);
    open_passive(w, &p, request);
    finish_connect(w, &a, &p);
    send_message(w, &a, &p);
    leave_pair(w, &a, &p);
}

OVER_TCP(without_descriptors_no_address_of_a_name_is_blamed) {
    struct rmig_ep_config cfg = wanted();
    struct rmig_error err = {0};
    struct rmig_ep *ep = NULL;
    struct end a;
    char address[128];
    int taken[16], n = 0;
    snprintf(address, sizeof address, "%s:4444", several(w));
    allow_descriptors(5); // it can be looked up, and there is no endpoint for its addresses
    open_by_name(w, &a, address);
    struct seen *s = await(w, &a, RMIG_FEV_ERROR, 0, true);
    cr_assert(s->e.at_this_end, "%s: %s", w->name, s->text);
    cr_assert(strstr(s->text, "descriptors") != NULL && strstr(s->text, "ulimit -n") != NULL, "%s: %s", w->name,
              s->text);
    leave(w, &a);
    allow_descriptors(0);
    while (n < 16 && (taken[n] = dup(2)) >= 0) // numbers below that are free
        n++;
    cr_assert_lt(w->active->ops->open(w->active, address, &cfg, &ep, &err), 0, "%s: it is looked up", w->name);
    cr_expect_descriptors_named(&err);
    while (n > 0)
        close(taken[--n]);
    allow_descriptors(SIZE_MAX);
}

OVER_TCP(a_listener_that_can_accept_nobody_says_so_and_lives) {
    struct end a, p;
    listen_on(w, any_port(false));
    int s = raw_connect(port_of(w)); // taken by the kernel; whether by the provider depends on when it is polled
    allow_descriptors(0);
    struct seen *e = await(w, &w->listener, RMIG_FEV_ERROR, 0, true);
    cr_assert_eq(e->e.provider_code, EMFILE);
    cr_assert_not_null(strstr(e->text, "ulimit -n"), "%s", e->text);
    allow_descriptors(SIZE_MAX);
    close(s);
    w->listener.count = 0;
    connect_pair(w, &a, &p);
    send_message(w, &a, &p);
    leave_pair(w, &a, &p);
}

OVER_TCP(what_strangers_say_to_a_listener_does_not_end_it) {
    struct end a, p;
    uint8_t request[RAW_REQUEST_MAX], junk[RAW_REQUEST_MAX];
    int held[8];
    size_t n = raw_capture_request(w->active, (const uint8_t *)"request.", 8, request);
    listen_on(w, any_port(false));
    for (int i = 0; i < 120; i++) {
        int s = raw_connect(port_of(w));
        cr_assert_geq(s, 0);
        fill(junk, sizeof junk);
        if (i % 4 == 0)
            raw_write(s, junk, 1 + below(sizeof junk));
        else if (i % 4 == 1)
            raw_write(s, request, below(n));
        else if (i % 4 == 2)
            raw_write(s, request, n);
        if (i < 8)
            held[i] = s;
        else if (i % 3 == 0)
            raw_reset(s);
        else
            close(s);
        pump(w);
    }
    for (size_t i = 0; i < w->listener.count; i++) { // poll_end holds that poll never failed
        struct rmig_error err = {0};
        if (w->listener.seen[i].e.type == RMIG_FEV_REQUEST)
            w->passive->ops->reject(w->listener.ep, w->listener.seen[i].e.request, NULL, 0, &err);
        w->listener.seen[i].used = true;
    }
    w->listener.count = 0;
    connect_pair(w, &a, &p);
    send_message(w, &a, &p);
    for (int i = 0; i < 8; i++)
        close(held[i]);
    leave_pair(w, &a, &p);
}

/* libfabric's own flag for fi_eq_write, by which its providers report errors. */
#define EQ_WRITE_ERROR (1ULL << 60)

OVER_TCP(the_error_of_a_request_is_an_event_of_the_listener) {
    struct end a, p;
    listen_on(w, any_port(false));
    struct rmig__ofi_listener *l = (struct rmig__ofi_listener *)(void *)w->listener.ep;
    for (int i = 0; i < 3; i++) {
        struct fi_eq_err_entry e = {.fid = &l->pep[0]->fid,
                                    .err = i == 0   ? FI_ECONNABORTED
                                           : i == 1 ? FI_ETIMEDOUT
                                                    : EPIPE};
        if (fi_eq_write(l->head.eq, FI_NOTIFY, &e, sizeof e, EQ_WRITE_ERROR) < 0)
            cr_skip_test("this libfabric takes no errors from outside");
    }
    for (int i = 0; i < 3; i++)
        await(w, &w->listener, RMIG_FEV_ERROR, 0, true);
    w->listener.count = 0;
    connect_pair(w, &a, &p);
    send_message(w, &a, &p);
    leave_pair(w, &a, &p);
}

OVER_TCP(requests_nobody_opens_are_bounded_and_cost_nothing_afterwards) {
    enum { COUNT = 150 };
    struct end a, p;
    uint8_t request[RAW_REQUEST_MAX], answer[64];
    int s[COUNT];
    size_t n = raw_capture_request(w->active, (const uint8_t *)"request.", 8, request), refused = 0;
    size_t before = open_descriptors();
    listen_on(w, any_port(false));
    for (int i = 0; i < COUNT; i++) {
        s[i] = raw_connect(port_of(w));
        cr_assert(s[i] >= 0 && raw_write(s[i], request, n));
    }
    uint64_t deadline = world_now(w) + 2 * LIMIT;
    while (count_events(&w->listener, RMIG_FEV_REQUEST) + refused < COUNT) {
        cr_assert_lt(world_now(w), deadline, "%s: %zu requests and %zu refusals of %d", w->name,
                     count_events(&w->listener, RMIG_FEV_REQUEST), refused, COUNT);
        pump(w);
        for (int i = 0; i < COUNT; i++)
            if (s[i] >= 0 && raw_read(s[i], answer, sizeof answer, 0) > 0) {
                close(s[i]);
                s[i] = -1;
                refused++;
            }
    }
    cr_assert_eq(refused, (size_t)COUNT - 64, "%s: %zu are refused", w->name, refused);
    for (size_t i = 0; i < 40; i++) {
        struct rmig_error err = {0};
        cr_assert_eq(w->passive->ops->reject(w->listener.ep, w->listener.seen[i].e.request, NULL, 0, &err), RMIG_OK);
    }
    w->listener.count = 0;
    connect_pair(w, &a, &p);
    send_message(w, &a, &p);
    leave_pair(w, &a, &p); // with 24 that nobody opened
    for (int i = 0; i < COUNT; i++)
        if (s[i] >= 0)
            close(s[i]);
    cr_assert_eq(open_descriptors(), before, "%s: %zu descriptors became %zu", w->name, before, open_descriptors());
}

Test(ofi, the_provider_sockets_is_refused_by_name) {
    static const char *const names[] = {"sockets", "SOCKETS", "sockets;ofi_rxd"};
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
        struct rmig_ofi_options options = {.provider = names[i]};
        struct rmig_error err = {0};
        cr_assert_null(rmig_ofi_open(&options, &err));
        cr_assert_eq(err.status, RMIG_ERR_FABRIC);
        cr_assert_not_null(strstr(err.text, "use 'tcp'"), "%s", err.text);
    }
}

// >>closing in every state

enum state {
    OPENED,
    RESOLVED,
    ASKED,
    REQUESTED,
    HALF,
    ACCEPTED,
    UP,
    RECEIVING,
    SENDING,
    WRITING,
    DISCONNECTED,
    STATES
};

struct stage {
    struct end a, p;
    struct region out, in;
    bool passive;
};

static void keep_busy(struct world *w, struct stage *s, enum state state) {
    s->out = region(w, &s->a, 1 << 20, ALL_ACCESS);
    s->in = region(w, &s->p, 1 << 20, ALL_ACCESS);
    if (state == RECEIVING || state == SENDING)
        for (uint64_t i = 0; i < 2; i++) {
            post_recv(w, &s->p, &s->in, i * SLOT, SLOT, i);
            post_recv(w, &s->a, &s->out, i * SLOT, SLOT, i);
        }
    for (uint64_t i = 0; i < s->a.caps.send_depth && i < 2 && state == SENDING; i++) {
        post_send(w, &s->a, &s->out, 0, SLOT, i);
        post_send(w, &s->p, &s->in, 0, SLOT, i);
    }
    struct rmig_write writes[3];
    for (uint64_t i = 0; i < 3; i++)
        writes[i] = make_write(&s->out, 0, &s->in, 0, 1 << 20, i + 1, true);
    if (state == WRITING)
        post_writes(w, &s->a, writes, 3);
}

/* Takes a connection to a state of its life, and leaves it there. */
static void reach(struct world *w, struct stage *s, enum state state) {
    struct rmig_ep_config cfg = wanted();
    struct rmig_error err = {0};
    struct rmig_ep *ep = NULL;
    memset(s, 0, sizeof *s);
    cr_assert_eq(w->active->ops->open(w->active, w->address, &cfg, &ep, &err), RMIG_OK, "%s: %s", w->name, err.text);
    enter(w, &s->a, w->active, ep);
    if (state == OPENED)
        return;
    expect(w, &s->a, RMIG_FEV_RESOLVED);
    get_caps(w, &s->a);
    if (state == RESOLVED)
        return;
    start_connect(w, &s->a, "request.", 8);
    if (state == ASKED)
        return;
    void *request = expect(w, &w->listener, RMIG_FEV_REQUEST)->e.request;
    if (state == REQUESTED) {
        cr_assert_eq(w->passive->ops->reject(w->listener.ep, request, NULL, 0, &err), RMIG_OK, "%s", err.text);
        return;
    }
    open_passive(w, &s->p, request);
    s->passive = true;
    if (state == HALF)
        return;
    start_accept(w, &s->p, "reply...", 8);
    if (state == ACCEPTED)
        return;
    expect(w, &s->a, RMIG_FEV_ESTABLISHED);
    expect(w, &s->p, RMIG_FEV_ESTABLISHED);
    if (state > UP)
        keep_busy(w, s, state);
    if (state == DISCONNECTED)
        s->a.ops->disconnect(s->a.ep);
}

static void close_active(struct world *w, struct stage *s) {
    if (s->out.p != NULL)
        drop(w, &s->out);
    leave(w, &s->a);
}

static void close_passive(struct world *w, struct stage *s) {
    if (s->in.p != NULL)
        drop(w, &s->in);
    if (s->passive)
        leave(w, &s->p);
}

/* Requests of connections that went away may have come meanwhile. */
static void refuse_pending(struct world *w) {
    struct rmig_error err = {0};
    for (int i = 0; i < 20; i++)
        pump(w);
    for (struct seen *s; (s = find(&w->listener, RMIG_FEV_REQUEST, 0, true)) != NULL; s->used = true)
        w->passive->ops->reject(w->listener.ep, s->e.request, NULL, 0, &err);
}

CONFORMANCE(an_endpoint_can_be_closed_in_every_state) {
    listen_on(w, any_port(false));
    for (int state = 0; state < STATES; state++)
        for (int order = 0; order < 2; order++) {
            struct stage s;
            struct end a, p;
            reach(w, &s, (enum state)state);
            if (order == 0)
                close_active(w, &s);
            close_passive(w, &s);
            if (order == 1)
                close_active(w, &s);
            refuse_pending(w);
            connect_pair(w, &a, &p); // nothing is left that disturbs the next
            send_message(w, &a, &p);
            leave(w, &a);
            leave(w, &p);
        }
    leave(w, &w->listener);
}

CONFORMANCE(a_listener_can_be_closed_in_every_state) {
    for (int state = 0; state < STATES; state++) {
        struct stage s;
        listen_on(w, any_port(false));
        reach(w, &s, (enum state)state);
        leave(w, &w->listener);
        for (int i = 0; i < 5; i++)
            pump(w);
        close_active(w, &s);
        close_passive(w, &s);
    }
}

// >>the end of the peer's writes

enum { FLOOD = 4, FLOOD_WRITE = 8 << 20 }; // writes at once at most, bytes of each

struct flood { // large writes under way
    struct end a, p;
    struct region src, dst;
    uint64_t n;
};

static void cut(struct end *end) {
    end->ops->cut(end->ep);
    end->quiet = true; // not even to be polled any more
}

static void start_flood(struct world *w, struct flood *f) {
    struct rmig_write writes[FLOOD];
    connect_pair(w, &f->a, &f->p);
    f->n = f->a.caps.write_depth < FLOOD ? f->a.caps.write_depth : FLOOD;
    f->src = region(w, &f->a, FLOOD_WRITE, ALL_ACCESS);
    f->dst = region(w, &f->p, f->n * FLOOD_WRITE, ALL_ACCESS);
    memset(f->src.p, 0xee, FLOOD_WRITE);
    for (uint64_t i = 0; i < f->n; i++)
        writes[i] = make_write(&f->src, 0, &f->dst, i * FLOOD_WRITE, FLOOD_WRITE, i, true);
    write_all(w, &f->a, writes, f->n);
}

static void end_flood(struct world *w, struct flood *f) {
    drop(w, &f->dst);
    drop(w, &f->src);
    leave(w, &f->a);
    leave(w, &f->p);
}

/* Until the first byte of the nth write is there. */
static void await_landing(struct world *w, const struct flood *f, uint64_t nth) {
    for (uint64_t deadline = world_now(w) + 2 * LIMIT; f->dst.p[nth * FLOOD_WRITE] == 0; pump(w))
        cr_assert_lt(world_now(w), deadline, "%s: write %llu does not land", w->name, (unsigned long long)nth);
}

static void let_pass(struct world *w, uint64_t ns) {
    for (uint64_t until = world_now(w) + 2 * ns; world_now(w) < until;)
        pump(w);
}

/* From now on nothing lands. What was still to land is lost, and so the connection: its end is waited for. */
static void check_quiet(struct world *w, struct flood *f) {
    size_t n = f->dst.n;
    uint8_t *now = pages(n);
    memcpy(now, f->dst.p, n);
    bool all = now[n - 1] == 0xee;
    cr_assert(!all || w->sim == NULL || w->sim->cfg.parts < 2, "%s: all has landed already: this shows nothing",
              w->name);
    let_pass(w, 200 * SIM_MS);
    for (size_t i = 0; i < n; i++)
        cr_assert_eq(now[i], f->dst.p[i], "%s: byte %zu of %zu landed too late", w->name, i, n);
    if (!all)
        expect_end_of(w, &f->a);
    munmap(now, n);
}

CONFORMANCE(nothing_lands_after_cut) {
    for (int late = 0; late < 2; late++) {
        struct flood f;
        start_flood(w, &f);
        await_landing(w, &f, late == 0 ? 0 : f.n - 1);
        cut(&f.p);
        check_quiet(w, &f);
        expect_end_of(w, &f.a);
        end_flood(w, &f);
    }
    leave(w, &w->listener);
}

CONFORMANCE(both_ends_can_cut) {
    for (int late = 0; late < 2; late++) {
        struct flood f;
        start_flood(w, &f);
        await_landing(w, &f, late == 0 ? 0 : f.n - 1);
        cut(&f.a);
        expect_end_of(w, &f.p);
        cut(&f.p);
        end_flood(w, &f);
    }
    leave(w, &w->listener);
}

CONFORMANCE(a_connection_can_be_cut_in_every_state) {
    listen_on(w, any_port(false));
    for (int state = 0; state < STATES; state++)
        for (int order = 0; order < 2; order++) {
            struct stage s;
            struct end a, p;
            reach(w, &s, (enum state)state);
            if (order == 0)
                cut(&s.a);
            for (int twice = 0; s.passive && twice < 2; twice++)
                cut(&s.p);
            for (int i = 0; i < 5; i++)
                pump(w);
            close_passive(w, &s);
            cut(&s.a);
            close_active(w, &s);
            refuse_pending(w);
            connect_pair(w, &a, &p); // nothing is left that disturbs the next
            send_message(w, &a, &p);
            leave(w, &a);
            leave(w, &p);
        }
    leave(w, &w->listener);
}

static bool revoke_writes(struct world *w, struct end *end) {
    struct rmig_error err = {0};
    if (!end->caps.revokes)
        return false;
    cr_assert_eq(end->ops->revoke(end->ep, &err), RMIG_OK, "%s: revoke: %s", w->name, err.text);
    return true;
}

CONFORMANCE(a_write_after_revoke_is_refused_and_messages_go_on) {
    struct end a, p;
    connect_pair(w, &a, &p);
    struct region src = region(w, &a, GUARD, ALL_ACCESS), dst = region(w, &p, GUARD, ALL_ACCESS);
    memset(src.p, 0xee, GUARD);
    struct rmig_write write = make_write(&src, 0, &dst, 0, GUARD, 1, true);
    write_all(w, &a, &write, 1);
    settle(w, &a, &p, &write, 1);
    memset(dst.p, 0x5a, GUARD);
    if (revoke_writes(w, &p)) {
        send_message(w, &a, &p);
        send_message(w, &p, &a);
        write.id = 2;
        cr_assert_eq(post_writes(w, &a, &write, 1), 1);
        expect_end_of(w, &a);
        cr_assert(!a.caps.completion_is_delivery || find(&a, RMIG_FEV_WRITE, 2, false) == NULL, "%s: it completed",
                  w->name);
        let_pass(w, 200 * SIM_MS);
        for (size_t i = 0; i < GUARD; i++)
            cr_assert_eq(dst.p[i], 0x5a, "%s: byte %zu was written after revoke", w->name, i);
    }
    drop(w, &dst);
    drop(w, &src);
    leave_pair(w, &a, &p);
}

CONFORMANCE(nothing_lands_after_revoke) {
    for (int late = 0; late < 2; late++) {
        struct flood f;
        start_flood(w, &f);
        await_landing(w, &f, late == 0 ? 0 : f.n - 1);
        if (revoke_writes(w, &f.p))
            check_quiet(w, &f);
        end_flood(w, &f);
    }
    leave(w, &w->listener);
}

// >>waiting

CONFORMANCE(waiting_ends_at_its_deadline) {
    struct end a, p;
    struct rmig_error err = {0};
    connect_pair(w, &a, &p);
    uint64_t begin = p.ops->now(p.f), deadline = begin + 30 * SIM_MS, before = begin;
    while (before < deadline) {
        cr_assert_eq(p.ops->wait(p.f, &p.ep, 1, deadline, &err), RMIG_OK, "%s: wait: %s", w->name, err.text);
        uint64_t now = p.ops->now(p.f);
        cr_assert_geq(now, before, "%s: the clock went back", w->name);
        cr_assert_eq(poll_end(w, &p), 0, "%s: an event from nowhere", w->name);
        before = now;
    }
    cr_assert_eq(p.ops->wait(p.f, &p.ep, 1, 0, &err), RMIG_OK, "%s: a deadline in the past: %s", w->name, err.text);
    cr_assert_eq(p.ops->wait(p.f, NULL, 0, p.ops->now(p.f) + SIM_MS, &err), RMIG_OK, "%s: nothing to wait for: %s",
                 w->name, err.text);
    leave_pair(w, &a, &p);
}

CONFORMANCE(waiting_ends_when_something_happens) {
    struct end a, p;
    struct rmig_error err = {0};
    connect_pair(w, &a, &p);
    struct region out = region(w, &a, 4096, ALL_ACCESS), in = region(w, &p, 4096, ALL_ACCESS);
    for (uint64_t i = 0; i < 10; i++) {
        post_recv(w, &p, &in, 0, 4096, i);
        post_send(w, &a, &out, 0, 64, i);
        uint64_t far = p.ops->now(p.f) + 3600 * SIM_SECOND; // this test's own limit is far shorter
        struct rmig_ep *both[] = {w->listener.ep, p.ep};
        while (find(&p, RMIG_FEV_RECV, i, false) == NULL) {
            cr_assert_eq(p.ops->wait(p.f, both, 2, far, &err), RMIG_OK, "%s: wait: %s", w->name, err.text);
            poll_end(w, &p);
            cr_assert_null(last_words(&p));
            cr_assert_lt(p.ops->now(p.f), far, "%s: a message does not end the wait", w->name);
        }
        expect_id(w, &a, RMIG_FEV_SEND, i);
    }
    p.ops->disconnect(p.ep);
    uint64_t far = a.ops->now(a.f) + 3600 * SIM_SECOND;
    while (last_words(&a) == NULL) {
        cr_assert_eq(a.ops->wait(a.f, &a.ep, 1, far, &err), RMIG_OK, "%s: wait: %s", w->name, err.text);
        poll_end(w, &a);
        cr_assert_lt(a.ops->now(a.f), far, "%s: the peer's disconnecting does not end the wait", w->name);
    }
    drop(w, &in);
    drop(w, &out);
    leave_pair(w, &a, &p);
}

CONFORMANCE(descriptors_tell_of_messages) {
    struct end a, p;
    struct rmig_error err = {0};
    connect_pair(w, &a, &p);
    struct region out = region(w, &a, 4096, ALL_ACCESS), in = region(w, &p, 4096, ALL_ACCESS);
    for (uint64_t i = 0; i < 10; i++) {
        struct rmig_fd fds[4];
        bool ready = true;
        post_recv(w, &p, &in, 0, 4096, i);
        int n = p.ops->fds(p.ep, fds, 4, &ready, &err);
        cr_assert(n >= 0 && n <= 4, "%s: fds: %d: %s", w->name, n, err.text);
        while (ready) {
            poll_end(w, &p);
            n = p.ops->fds(p.ep, fds, 4, &ready, &err);
        }
        post_send(w, &a, &out, 0, 64, i);
        while (n > 0 && !ready && find(&p, RMIG_FEV_RECV, i, false) == NULL) {
            struct pollfd wait_for[4];
            for (int k = 0; k < n; k++) {
                wait_for[k].fd = fds[k].fd;
                wait_for[k].events = (short)(POLLIN | (fds[k].write ? POLLOUT : 0));
            }
            cr_assert_gt(poll(wait_for, (nfds_t)n, (int)(LIMIT / SIM_MS)), 0, "%s: a message wakes nobody", w->name);
            poll_end(w, &p);
            n = p.ops->fds(p.ep, fds, 4, &ready, &err);
            if (ready)
                poll_end(w, &p), ready = false;
        }
        expect_id(w, &p, RMIG_FEV_RECV, i);
        expect_id(w, &a, RMIG_FEV_SEND, i);
    }
    drop(w, &in);
    drop(w, &out);
    leave_pair(w, &a, &p);
}

// >>death of a process

/* In a process of its own: connects to the address that comes from the pipe, sends a message, stays until killed. */
static void child_main(const struct fabric_row *row, int from_parent) {
    struct world w = {0};
    char address[128] = "";
    w.name = row->name;
    if (read(from_parent, address, sizeof address - 1) <= 0)
        _exit(1);
    row->open(&w);
    struct end a;
    open_active(&w, &a, address);
    struct region out = region(&w, &a, 1 << 20, ALL_ACCESS);
    start_connect(&w, &a, "request.", 8);
    expect(&w, &a, RMIG_FEV_ESTABLISHED);
    memset(out.p, 0x77, 1 << 20);
    post_send(&w, &a, &out, 0, 1000, 1);
    for (;;)
        pump(&w);
}

static void survive_peer(const struct fabric_row *row) {
    int pipe_fds[2];
    cr_assert_eq(pipe(pipe_fds), 0);
    pid_t child = fork(); // before either process opens a fabric
    cr_assert_geq(child, 0);
    if (child == 0) {
        alarm(600);
        child_main(row, pipe_fds[0]);
    }
    struct world w = {0};
    struct end p;
    w.name = row->name;
    row->open(&w);
    listen_on(&w, any_port(false));
    cr_assert_gt(write(pipe_fds[1], w.address, strlen(w.address)), 0);
    open_passive(&w, &p, expect(&w, &w.listener, RMIG_FEV_REQUEST)->e.request);
    struct region in = region(&w, &p, 4096, ALL_ACCESS);
    post_recv(&w, &p, &in, 0, 2048, 1);
    post_recv(&w, &p, &in, 2048, 2048, 2);
    start_accept(&w, &p, "reply...", 8);
    expect(&w, &p, RMIG_FEV_ESTABLISHED);
    expect_id(&w, &p, RMIG_FEV_RECV, 1);
    cr_assert_eq(in.p[999], 0x77);
    kill(child, SIGKILL);
    cr_assert_eq(waitpid(child, NULL, 0), child);
    expect_end_of(&w, &p);
    drop(&w, &in);
    leave(&w, &p);
    struct end a;
    connect_pair(&w, &a, &p); // the listener goes on
    send_message(&w, &a, &p);
    leave_pair(&w, &a, &p);
    world_close(&w);
}

Test(fabric, a_killed_peer_is_noticed, .timeout = 600) {
    size_t rows[FABRICS], n = choose_rows(rows);
    cr_assert_neq(n, 0, "RMIG_TEST_FABRIC names no fabric that can be tested here");
    for (size_t i = 0; i < n; i++)
        if (fabrics[rows[i]].real)
            survive_peer(&fabrics[rows[i]]);
}

// >>what only the simulator can show

struct talker { // sends and receives a number of messages
    struct world *w;
    struct end *end;
    struct region r;
    uint64_t sent, received, goal;
    bool speaks;
};

static uint64_t talk(void *user, uint64_t now) {
    struct talker *t = user;
    (void)now;
    poll_end(t->w, t->end);
    for (struct seen *s; (s = find(t->end, RMIG_FEV_RECV, 0, true)) != NULL; s->used = true, t->received++)
        post_recv(t->w, t->end, &t->r, 0, 1000, 1);
    if (last_words(t->end) != NULL)
        return SIM_DONE;
    if (t->sent < t->goal && (t->speaks ? t->sent == t->received : t->sent < t->received)) {
        post_send(t->w, t->end, &t->r, 2000, 100 + t->sent % 800, 2);
        t->sent++;
    }
    if (t->received == t->goal && t->sent == t->goal)
        return SIM_DONE;
    return RMIG_FOREVER;
}

struct run {
    int status;
    uint64_t hash, received, time;
    bool failed[2];
    char text[sizeof((struct rmig_error *)0)->text];
};

/* 50 messages back and forth in a world of the given configuration. */
static struct run ping_pong(const struct sim_config *cfg) {
    struct world w = {0};
    struct end a, p;
    struct run run = {0};
    struct rmig_error err = {0};
    w.name = "sim";
    open_sim(&w, cfg);
    connect_pair(&w, &a, &p);
    struct talker talkers[2] = {{&w, &a, region(&w, &a, 4096, ALL_ACCESS), 0, 0, 50, true},
                                {&w, &p, region(&w, &p, 4096, ALL_ACCESS), 0, 0, 50, false}};
    for (unsigned i = 0; i < 2; i++) {
        post_recv(&w, talkers[i].end, &talkers[i].r, 0, 1000, 1);
        sim_actor(w.sim, i, talk, &talkers[i]);
    }
    run.status = sim_run(w.sim, 10 * SIM_SECOND, &err);
    memcpy(run.text, err.text, sizeof run.text);
    run.hash = sim_hash(w.sim);
    run.received = talkers[0].received;
    run.time = sim_op_now(w.active);
    run.failed[0] = last_words(&a) != NULL;
    run.failed[1] = last_words(&p) != NULL;
    drop(&w, &talkers[0].r);
    drop(&w, &talkers[1].r);
    leave_pair(&w, &a, &p);
    world_close(&w);
    return run;
}

Test(sim, the_same_seed_gives_the_same_run) {
    for (int mode = SIM_ORDERED; mode <= SIM_LOCAL; mode++) {
        struct sim_config cfg;
        uint64_t first = 0;
        for (uint64_t i = 0; i < 6; i++) {
            sim_defaults(&cfg, (enum sim_mode)mode, 100 + i / 3);
            struct run run = ping_pong(&cfg);
            cr_assert_eq(run.status, RMIG_OK, "%s", run.text);
            cr_assert_eq(run.received, 50);
            cr_assert(i % 3 == 0 || run.hash == first, "mode %d: the same seed, another run", mode);
            if (mode == SIM_UNORDERED && i == 3)
                cr_assert_neq(run.hash, first, "another seed, the same run");
            first = run.hash;
        }
    }
}

Test(sim, varied_worlds_work) {
    for (uint64_t seed = 0; seed < 200; seed++) {
        struct sim_config cfg;
        sim_vary(&cfg, seed);
        struct run run = ping_pong(&cfg);
        cr_assert_eq(run.status, RMIG_OK, "seed %llu: %s", (unsigned long long)seed, run.text);
        cr_assert_eq(run.received, 50);
    }
}

Test(sim, time_passes_as_configured) {
    struct sim_config cfg;
    sim_defaults(&cfg, SIM_ORDERED, 1);
    cfg.latency_ns = 10 * SIM_MS;
    uint64_t slow = ping_pong(&cfg).time;
    cr_assert(slow > 1000 * SIM_MS && slow < 1200 * SIM_MS, "100 crossings of 10 ms took %llu ns",
              (unsigned long long)slow);
}

static struct run with_fault(enum sim_fault_kind kind, enum sim_op op, int side, uint64_t nth) {
    struct sim_config cfg;
    sim_defaults(&cfg, SIM_ORDERED, 1);
    struct sim_fault fault = {kind, op, side, nth};
    cfg.latency_ns = SIM_MS;
    cfg.faults[0] = fault;
    return ping_pong(&cfg);
}

Test(sim, a_dead_peer_is_told_and_the_dead_hear_nothing) {
    struct run run = with_fault(SIM_FAULT_DEATH, SIM_SEND, 1, 20);
    cr_assert_eq(run.status, RMIG_ERR_STATE, "a dead side that ends: %s", run.text);
    cr_assert(run.failed[0] && !run.failed[1]);
    cr_assert_eq(run.received, 19);
    run = with_fault(SIM_FAULT_DEATH, SIM_TIME, 0, 50 * SIM_MS);
    cr_assert(!run.failed[0] && run.failed[1], "a death at a time");
}

Test(sim, silence_is_silent) {
    struct run run = with_fault(SIM_FAULT_SILENCE, SIM_RECV, 0, 11);
    cr_assert_eq(run.status, RMIG_ERR_STATE, "%s", run.text);
    cr_assert_not_null(strstr(run.text, "deadlock"), "%s", run.text);
    cr_assert(!run.failed[0] && !run.failed[1]);
}

Test(sim, a_failed_completion_ends_both_sides) {
    struct run run = with_fault(SIM_FAULT_COMPLETION, SIM_SEND, 0, 30);
    cr_assert_eq(run.status, RMIG_OK, "%s", run.text);
    cr_assert(run.failed[0] && run.failed[1]);
    cr_assert_eq(run.received, 29);
}

struct duo { // a connection in a world of the given configuration, with memory at both ends
    struct world w;
    struct end a, p;
    struct region src, dst;
};

static void duo_open(struct duo *d, const struct sim_config *cfg) {
    memset(d, 0, sizeof *d);
    d->w.name = "sim";
    open_sim(&d->w, cfg);
    connect_pair(&d->w, &d->a, &d->p);
    d->src = region(&d->w, &d->a, 65536, ALL_ACCESS);
    d->dst = region(&d->w, &d->p, 65536, ALL_ACCESS);
}

static void duo_close(struct duo *d) {
    drop(&d->w, &d->src);
    drop(&d->w, &d->dst);
    leave_pair(&d->w, &d->a, &d->p);
    world_close(&d->w);
}

/* 4 KiB of 64 are there when `stop` is called; the rest needs another 60 us. Returns whether it comes all the same. */
static bool lands_all_the_same(bool revokes, void (*stop)(struct duo *d)) {
    struct sim_config cfg;
    struct duo d;
    sim_defaults(&cfg, SIM_ORDERED, 1);
    cfg.bandwidth = 1000000000;
    cfg.parts = 16;
    cfg.revokes = revokes;
    duo_open(&d, &cfg);
    cr_assert_eq(d.p.caps.revokes, revokes);
    struct rmig_write write = make_write(&d.src, 0, &d.dst, 0, 65536, 5, true);
    memset(d.src.p, 9, 65536);
    write_all(&d.w, &d.a, &write, 1);
    while (d.dst.p[0] == 0)
        sim_op_wait(d.a.f, NULL, 0, d.a.ops->now(d.a.f) + SIM_US, NULL);
    cr_assert_eq(d.dst.p[65535], 0, "it landed whole");
    stop(&d);
    let_pass(&d.w, SIM_MS);
    bool all = d.dst.p[65535] == 9;
    if (d.dst.mr.handle == NULL) // for duo_close
        d.dst = region_at(&d.w, &d.p, d.dst.p, d.dst.n, ALL_ACCESS);
    duo_close(&d);
    return all;
}

static void stop_not(struct duo *d) { (void)d; }
static void stop_dereg(struct duo *d) {
    deregister(&d->w, &d->dst);
    d->dst.mr.handle = NULL;
}
static void stop_revoke(struct duo *d) { revoke_writes(&d->w, &d->p); }
static void stop_cut(struct duo *d) { cut(&d->p); }

Test(sim, what_has_half_landed_is_stopped_by_revoke_and_cut_not_by_dereg) {
    cr_assert(lands_all_the_same(false, stop_not));
    cr_assert(lands_all_the_same(true, stop_dereg));
    cr_assert_not(lands_all_the_same(true, stop_revoke));
    cr_assert_not(lands_all_the_same(true, stop_cut));
    cr_assert_not(lands_all_the_same(false, stop_cut));
}

Test(sim, a_send_waits_for_a_receive_and_holds_up_what_follows) {
    struct sim_config cfg;
    struct duo d;
    sim_defaults(&cfg, SIM_ORDERED, 1);
    duo_open(&d, &cfg);
    struct rmig_write write = make_write(&d.src, 0, &d.dst, 0, 1000, 5, true);
    memset(d.src.p, 9, 1000);
    post_send(&d.w, &d.a, &d.src, 0, 100, 1);
    write_all(&d.w, &d.a, &write, 1);
    for (int i = 0; i < 50; i++)
        pump(&d.w);
    cr_assert(count_events(&d.a, RMIG_FEV_SEND) == 0 && d.dst.p[0] == 0, "delivered to nobody");
    post_recv(&d.w, &d.p, &d.dst, 2000, 100, 2);
    expect_id(&d.w, &d.p, RMIG_FEV_RECV, 2);
    expect_id(&d.w, &d.a, RMIG_FEV_SEND, 1);
    expect_id(&d.w, &d.a, RMIG_FEV_WRITE, 5);
    cr_assert(d.dst.p[0] == 9 && d.dst.p[2099] == 9);
    duo_close(&d);
}

Test(sim, without_retry_a_send_that_finds_no_receive_breaks_the_connection) {
    struct sim_config cfg;
    struct duo d;
    sim_defaults(&cfg, SIM_ORDERED, 1);
    cfg.no_retry = true;
    duo_open(&d, &cfg);
    post_send(&d.w, &d.a, &d.src, 0, 100, 1);
    expect(&d.w, &d.a, RMIG_FEV_ERROR);
    expect(&d.w, &d.p, RMIG_FEV_DISCONNECTED);
    duo_close(&d);
}

Test(sim, a_short_queue_takes_fewer_writes_and_then_the_rest) {
    struct sim_config cfg;
    struct duo d;
    sim_defaults(&cfg, SIM_ORDERED, 1);
    struct sim_fault fault = {SIM_FAULT_FULL, SIM_WRITE, 0, 3};
    cfg.faults[0] = fault;
    duo_open(&d, &cfg);
    struct rmig_write writes[6];
    for (uint64_t i = 0; i < 6; i++)
        writes[i] = make_write(&d.src, i * 100, &d.dst, i * 100, 100, i + 1, true);
    fill(d.src.p, 600);
    cr_assert_eq(post_writes(&d.w, &d.a, writes, 6), 2);
    write_all(&d.w, &d.a, writes + 2, 4);
    settle(&d.w, &d.a, &d.p, writes, 6);
    cr_assert_arr_eq(d.dst.p, d.src.p, 600);
    duo_close(&d);
}

Test(sim, registered_memory_can_be_limited) {
    struct sim_config cfg;
    struct duo d;
    struct rmig_error err = {0};
    struct rmig_mr mr;
    sim_defaults(&cfg, SIM_ORDERED, 1);
    cfg.registered_max = 65536 + 4096;
    duo_open(&d, &cfg);
    cr_assert_lt(d.a.ops->reg(d.a.ep, d.src.p, 4097, ALL_ACCESS, &mr, &err), 0);
    cr_assert_not_null(strstr(err.text, "4097"), "%s", err.text);
    struct region last = region_at(&d.w, &d.a, d.src.p, 4096, ALL_ACCESS);
    cr_assert_eq(sim_stats(d.w.sim, 0)->registered, 65536 + 4096);
    deregister(&d.w, &last);
    cr_assert_eq(sim_stats(d.w.sim, 0)->registered, 65536);
    duo_close(&d);
}

/* Calls the operation once more than the fault lets pass, and says how it went. */
static int call_op(struct duo *d, enum sim_op op, struct rmig_error *err) {
    const struct rmig_fabric_ops *ops = d->a.ops;
    struct rmig_write write = make_write(&d->src, 0, &d->dst, 0, 8, 1, true);
    struct rmig_ep_config want = wanted();
    struct rmig_fabric_event e;
    struct rmig_ep *ep;
    struct rmig_mr mr;
    switch (op) {
    case SIM_OPEN:
        return ops->open(d->a.f, d->w.address, &want, &ep, err);
    case SIM_LISTEN:
        return ops->listen(d->a.f, ":0", &ep, err);
    case SIM_REG:
        return ops->reg(d->a.ep, d->src.p, 8, ALL_ACCESS, &mr, err);
    case SIM_RECV:
        return ops->recv(d->a.ep, d->src.p, 8, &d->src.mr, 1, err);
    case SIM_SEND:
        return ops->send(d->a.ep, d->src.p, 8, &d->src.mr, 1, err);
    case SIM_WRITE:
        return ops->write(d->a.ep, &write, 1, err);
    case SIM_POLL:
        return ops->poll(d->a.ep, &e, 1, err);
    default:
        return ops->wait(d->a.f, NULL, 0, 0, err);
    }
}

Test(sim, each_function_can_be_made_to_fail) {
    static const enum sim_op ops[] = {SIM_OPEN, SIM_LISTEN, SIM_REG, SIM_RECV, SIM_SEND, SIM_WRITE, SIM_POLL, SIM_WAIT};
    for (size_t i = 0; i < sizeof ops / sizeof ops[0]; i++) {
        struct sim_config cfg;
        struct duo d;
        struct rmig_error err = {0};
        sim_defaults(&cfg, SIM_ORDERED, 1);
        duo_open(&d, &cfg);
        struct sim_fault fault = {SIM_FAULT_ERROR, ops[i], 0, sim_stats(d.w.sim, 0)->ops[ops[i]] + 1};
        d.w.sim->cfg.faults[0] = fault;
        cr_assert_eq(call_op(&d, ops[i], &err), RMIG_ERR_FABRIC, "%s", sim_op_name(ops[i]));
        cr_assert_not_null(strstr(err.text, "injected"), "%s: %s", sim_op_name(ops[i]), err.text);
        cr_assert_eq(sim_stats(d.w.sim, 0)->faults, 1);
        duo_close(&d);
    }
}

Test(sim, random_faults_happen_at_most_so_often) {
    uint64_t failed = 0;
    for (uint64_t seed = 0; seed < 50; seed++) {
        struct sim_config cfg;
        sim_defaults(&cfg, SIM_ORDERED, seed);
        cfg.random_per_million = 10000;
        cfg.random_kinds = 1u << SIM_FAULT_COMPLETION;
        struct run run = ping_pong(&cfg);
        cr_assert_eq(run.status, RMIG_OK, "seed %llu: %s", (unsigned long long)seed, run.text);
        cr_assert(run.received == 50 || (run.failed[0] && run.failed[1]), "seed %llu", (unsigned long long)seed);
        failed += run.failed[0];
    }
    cr_assert(failed > 10 && failed < 50, "%llu of 50 runs failed", (unsigned long long)failed);
}

static uint64_t spin(void *user, uint64_t now) {
    (void)user, (void)now;
    return 0;
}

Test(sim, an_endless_loop_is_found) {
    struct sim_config cfg;
    sim_defaults(&cfg, SIM_ORDERED, 1);
    struct sim *sim = sim_open(&cfg);
    struct rmig_error err = {0};
    sim_actor(sim, 0, spin, NULL);
    cr_assert_eq(sim_run(sim, SIM_SECOND, &err), RMIG_ERR_STATE);
    cr_assert_not_null(strstr(err.text, "endless"), "%s", err.text);
    sim_close(sim);
}

Test(sim, a_blocking_side_lets_the_other_run) {
    struct sim_config cfg;
    sim_defaults(&cfg, SIM_UNORDERED, 9);
    struct world w = {0};
    struct end a, p;
    w.name = "sim";
    open_sim(&w, &cfg);
    connect_pair(&w, &a, &p);
    struct talker answer = {&w, &p, region(&w, &p, 4096, ALL_ACCESS), 0, 0, 50, false};
    struct talker ask = {&w, &a, region(&w, &a, 4096, ALL_ACCESS), 0, 0, 50, true};
    post_recv(&w, &p, &answer.r, 0, 1000, 1);
    post_recv(&w, &a, &ask.r, 0, 1000, 1);
    sim_actor(w.sim, 1, talk, &answer);
    while (talk(&ask, 0) != SIM_DONE) {
        struct rmig_error err = {0};
        cr_assert_eq(a.ops->wait(a.f, &a.ep, 1, RMIG_FOREVER, &err), RMIG_OK, "%s", err.text);
    }
    cr_assert_eq(ask.received, 50);
    drop(&w, &answer.r);
    drop(&w, &ask.r);
    leave_pair(&w, &a, &p);
    world_close(&w);
}

/* What the caller may not do is found: each case breaks the contract once. */
static void misuse(int which, struct world *w, struct end *a, struct end *p, struct region *r) {
    struct rmig_error err = {0};
    uint8_t elsewhere[8] = {0};
    struct rmig_mr other = r->mr;
    struct rmig_write write = make_write(r, 0, r, 0, 8, 1, true);
    switch (which) {
    case 0:
        a->ops->send(a->ep, elsewhere, 8, &r->mr, 1, &err);
        break;
    case 1:
        write.local = r->p + r->n - 4;
        a->ops->write(a->ep, &write, 1, &err);
        break;
    case 2:
        p->ops->dereg(p->ep, &other, &err);
        break;
    case 3:
        a->ops->connect(a->ep, NULL, 0, &err);
        break;
    case 4:
        w->passive->ops->reject(w->listener.ep, &other, NULL, 0, &err);
        break;
    case 5:
        write.length = 0;
        a->ops->write(a->ep, &write, 1, &err);
        break;
    default:
        a->ops->reg(a->ep, r->p, 0, ALL_ACCESS, &other, &err);
        break;
    }
    cr_assert_lt(err.status, 0, "case %d is taken", which);
    cr_assert_neq(err.text[0], '\0');
}

Test(sim, misuse_of_the_contract_is_found) {
    for (int which = 0; which <= 6; which++) {
        struct sim_config cfg;
        struct world w = {0};
        struct end a, p;
        struct rmig_error err = {0};
        sim_defaults(&cfg, SIM_ORDERED, 1);
        w.name = "sim";
        open_sim(&w, &cfg);
        connect_pair(&w, &a, &p);
        struct region r = region(&w, &a, 4096, ALL_ACCESS);
        cr_assert_eq(w.sim->violations, 0);
        misuse(which, &w, &a, &p, &r);
        cr_assert_eq(w.sim->violations, 1, "case %d", which);
        drop(&w, &r);
        leave_pair(&w, &a, &p);
        cr_assert_eq(sim_clean(w.sim, &err), RMIG_ERR_STATE, "case %d", which);
        sim_close(w.sim);
    }
}

Test(sim, leaks_are_found) {
    struct sim_config cfg;
    struct world w = {0};
    struct end a, p;
    struct rmig_error err = {0};
    sim_defaults(&cfg, SIM_ORDERED, 1);
    w.name = "sim";
    open_sim(&w, &cfg);
    connect_pair(&w, &a, &p);
    struct region r = region(&w, &a, 4096, ALL_ACCESS);
    cr_assert_eq(sim_clean(w.sim, &err), RMIG_ERR_STATE);
    cr_assert_not_null(strstr(err.text, "leaks"), "%s", err.text);
    drop(&w, &r);
    leave_pair(&w, &a, &p);
    cr_assert_eq(sim_clean(w.sim, &err), RMIG_OK, "%s", err.text);
    sim_close(w.sim);
}

Test(sim, memory_is_read_between_post_and_completion) {
    /* The source changes while writes are under way: what arrives is old or new, and over many seeds it is both. */
    uint64_t old = 0, new = 0;
    for (uint64_t seed = 0; seed < 40; seed++) {
        struct sim_config cfg;
        struct world w = {0};
        struct end a, p;
        sim_defaults(&cfg, SIM_ORDERED, seed);
        w.name = "sim";
        open_sim(&w, &cfg);
        connect_pair(&w, &a, &p);
        struct region src = region(&w, &a, 1 << 20, ALL_ACCESS), dst = region(&w, &p, 1 << 20, ALL_ACCESS);
        struct rmig_write write = make_write(&src, 0, &dst, 0, 1 << 20, 1, true);
        memset(src.p, 1, src.n);
        write_all(&w, &a, &write, 1);
        cr_assert_eq(a.ops->wait(a.f, NULL, 0, a.ops->now(a.f) + 40 * SIM_US, NULL), RMIG_OK);
        memset(src.p, 2, src.n);
        expect_id(&w, &a, RMIG_FEV_WRITE, 1);
        memset(src.p, 3, src.n);
        old += dst.p[0] == 1;
        new += dst.p[0] == 2;
        drop(&w, &src);
        drop(&w, &dst);
        leave_pair(&w, &a, &p);
        world_close(&w);
    }
    cr_assert_eq(old + new, 40, "memory was read after the completion");
    cr_assert(old > 0 && new > 0, "%llu old, %llu new", (unsigned long long)old, (unsigned long long)new);
}

Test(sim, without_copies_memory_need_not_be_there) {
    const uint64_t chunk = 1 << 20, total = (uint64_t)8 << 30;
    struct sim_config cfg;
    struct world w = {0};
    struct end a, p;
    sim_defaults(&cfg, SIM_ORDERED, 1);
    cfg.no_copy = true;
    w.name = "sim";
    open_sim(&w, &cfg);
    connect_pair(&w, &a, &p);
    void *nothing = mmap(NULL, total, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    cr_assert_neq(nothing, MAP_FAILED);
    struct region src = region_at(&w, &a, nothing, total, ALL_ACCESS);
    struct region dst = region_at(&w, &p, nothing, total, ALL_ACCESS);
    uint64_t begin = a.ops->now(a.f);
    for (uint64_t i = 0; i < total / chunk; i++) {
        struct rmig_write write = make_write(&src, i * chunk, &dst, i * chunk, chunk, i + 1, i % 8 == 7);
        write_all(&w, &a, &write, 1);
        a.count = 0;
    }
    expect_id(&w, &a, RMIG_FEV_WRITE, total / chunk);
    cr_assert_eq(sim_stats(w.sim, 0)->bytes_written, total);
    uint64_t took = a.ops->now(a.f) - begin, wire = (uint64_t)((double)total / (double)cfg.bandwidth * 1e9);
    cr_assert(took >= wire && took < wire + wire / 10, "%llu ns, the wire alone %llu", (unsigned long long)took,
              (unsigned long long)wire);
    deregister(&w, &src);
    deregister(&w, &dst);
    munmap(nothing, total);
    leave_pair(&w, &a, &p);
    world_close(&w);
}
