/* The end of a migration over libfabric's socket providers, where deregistering alone does not stop a write that has
   half arrived: honest ends always agree, and no write lands once the sink has said that the guest is its own, or is
   closed. */
#define _GNU_SOURCE
#define RMIG_IMPLEMENTATION
#include "../rmig.h"
#include "../rmig_fabric_ofi.h"

#include "guest_ram.h"
#include "half_write.h"

#include <criterion/criterion.h>
#include <criterion/parameterized.h>

#define RAM (4 * RMIG_MIB)
#define LATE RMIG_MIB // of the write that comes late
#define PASSES 300000 // bytes of it, and of what is before it, that get through in time
#define SECOND ((uint64_t)1000000000)
#define PATIENCE (60 * SECOND) // the machine may be busy
#ifdef __SANITIZE_ADDRESS__
#define HONEST 200 // slower there, and the order is the same
#else
#define HONEST 1000
#endif

static const char *const providers[] = {"tcp", "net"};

/* How a session can end. */
enum way { WAY_EXTENDED, WAY_VERSION_1, WAY_RETURN_PATH, WAY_BROKEN_RETURN_PATH, WAY_CANCEL, WAY_CLOSE, WAY_FAILURE };

/* A version 1 source's second connection. It says READY once, and takes what comes. */
struct return_path {
    struct rmig_fabric *fabric;
    struct rmig_ep *ep;
    struct rmig_mr mr;
    uint8_t buf[2][64]; // in, out
    uint64_t heard; // bytes of the message that came
};

struct scene {
    enum way way;
    struct rmig_fabric *from, *to;
    struct rmig_source *source;
    struct rmig_sink *sink, *other; // other: a second sink of the same fabric, for its polling
    uint8_t *from_ram, *to_ram;
    char address[64];
    struct half_write proxy;
    struct return_path back;
    const struct rmig_ep *cut; // the sink's, the last that was cut
    bool hostile, late; // late: the write is posted
    bool taken, finished;
    size_t got;
};

static struct { // the source's fabric and the sink's, with ears
    const struct rmig_fabric_ops *below, *below_sink;
    struct rmig_fabric_ops ops, sink_ops;
    struct scene *scene;
} spy;

static uint64_t now(const struct scene *s) { return s->to->ops->now(s->to); }

/* Behind the message that lets the guest go the source writes once more, and only half of that gets through. */
static void write_late(struct scene *s, struct rmig_ep *ep) {
    static uint8_t late[LATE];
    struct rmig_error err = {0};
    memset(late, 0xee, sizeof late);
    struct rmig_write w = {.local = late,
                           .length = LATE,
                           .remote_address = s->source->regions.region[0].address,
                           .key = s->source->regions.region[0].key,
                           .id = RMIG__ID_WRITE | 1,
                           .signal = true};
    cr_assert_eq(spy.below->write(ep, &w, 1, &err), 1, "%s", err.text);
    s->late = true;
}

static int spy_send(struct rmig_ep *ep, const void *buf, uint64_t n, const struct rmig_mr *mr, uint64_t id,
                    struct rmig_error *err) {
    struct scene *s = spy.scene;
    uint32_t type = rmig__get_be32((const uint8_t *)buf + 4);
    bool last = type == RMIG_MSG_GOODBYE || (type == RMIG_MSG_QEMU_FILE && s->way != WAY_EXTENDED);
    if (!s->hostile || s->late || !last || s->way >= WAY_CANCEL)
        return spy.below->send(ep, buf, n, mr, id, err);
    half_write_hold(&s->proxy, 0, PASSES);
    int status = spy.below->send(ep, buf, n, mr, id, err);
    write_late(s, ep);
    return status;
}

static void spy_disconnect(struct rmig_ep *ep) {
    if (!spy.scene->hostile)
        spy.below->disconnect(ep);
}

static void spy_cut(struct rmig_ep *ep) {
    spy.scene->cut = ep;
    spy.below_sink->cut(ep);
}

static struct rmig_fabric *open_fabric(const char *provider) {
    struct rmig_error err = {0};
    struct rmig_ofi_options options = {.provider = provider};
    struct rmig_fabric *f = rmig_ofi_open(&options, &err);
    if (f == NULL && strcmp(provider, "net") == 0) // libfabric from 1.18 on has made it its tcp
        cr_skip_test("no provider net");
    cr_assert_not_null(f, "%s", err.text);
    return f;
}

static struct rmig_sink *listen_on(struct scene *s, const struct rmig_config *cfg, char *address, size_t size) {
    struct rmig_error err = {0};
    struct rmig_sink *sink;
    cr_assert_eq(rmig_sink_open(s->to, cfg, &sink, &err), RMIG_OK, "%s", err.text);
    cr_assert_eq(rmig_sink_listen(sink, "127.0.0.1:0"), RMIG_OK, "%s", rmig_sink_error(sink)->text);
    cr_assert_eq(rmig_sink_address(sink, address, size), RMIG_OK);
    return sink;
}

static void open_fabrics(struct scene *s, const char *provider) {
    s->from = open_fabric(provider);
    s->to = open_fabric(provider);
    s->from_ram = guest_ram_map(RAM);
    s->to_ram = guest_ram_map(RAM);
    memset(s->from_ram, 0x11, RAM);
    spy.below = s->from->ops;
    spy.ops = *spy.below;
    spy.ops.send = spy_send;
    spy.ops.disconnect = spy_disconnect;
    spy.scene = s;
    s->from->ops = &spy.ops;
    spy.below_sink = s->to->ops;
    spy.sink_ops = *spy.below_sink;
    spy.sink_ops.cut = spy_cut;
    s->to->ops = &spy.sink_ops;
}

static void open_ends(struct scene *s) {
    struct rmig_config from = {0}, to = {0};
    struct rmig_error err = {0};
    if (s->way != WAY_EXTENDED && s->way < WAY_CANCEL)
        rmig_set_extension(&from, 0, &err);
    if (s->way == WAY_FAILURE)
        rmig_set_io_timeout(&to, SECOND / 2, &err);
    struct rmig_block_desc ram = {.name = "ram", .host = s->to_ram, .length = RAM};
    s->sink = listen_on(s, &to, s->address, sizeof s->address);
    cr_assert_eq(rmig_sink_add_block(s->sink, &ram, NULL), RMIG_OK);
    cr_assert_eq(rmig_source_open(s->from, &from, &s->source, &err), RMIG_OK, "%s", err.text);
    ram.host = s->from_ram;
    cr_assert_eq(rmig_source_add_block(s->source, &ram, NULL), RMIG_OK);
}

static void close_fabrics(struct scene *s) {
    rmig_fabric_close(s->from);
    rmig_fabric_close(s->to);
    guest_ram_unmap(s->from_ram);
    guest_ram_unmap(s->to_ram);
}

/* The sink's embedder, one turn. The state is 5 bytes. Returns process's status. */
static int sink_turn(struct scene *s) {
    struct rmig_sink_event ev;
    uint8_t state[16];
    int status = rmig_sink_process(s->sink, &ev);
    if (status == RMIG_OK && ev.type == RMIG_SINK_BLOCKS)
        status = rmig_sink_accept_blocks(s->sink);
    if (status == RMIG_OK && ev.type == RMIG_SINK_TAKE) {
        s->taken = true;
        status = rmig_sink_take(s->sink);
    }
    if (ev.type == RMIG_SINK_STREAM)
        s->got += rmig_sink_get(s->sink, state, sizeof state);
    bool whole =
        s->got == 5 && !rmig_sink_extended(s->sink) && !s->taken && (!s->hostile || half_write_held(&s->proxy, 0));
    if (status == RMIG_OK && whole) {
        s->taken = true;
        if (rmig_sink_has_return_path(s->sink))
            status = rmig_sink_return_put(s->sink, "shut", 4);
        status = status == RMIG_OK ? rmig_sink_complete(s->sink) : status;
    }
    s->finished = s->finished || ev.type == RMIG_SINK_FINISHED;
    return status;
}

/* Sleeps, now and then. */
static void rest(struct scene *s) {
    static unsigned turn;
    struct rmig_error err;
    struct rmig_ep *ep = s->source->ss.ep;
    if (++turn % 64 == 0)
        s->from->ops->wait(s->from, &ep, ep != NULL, now(s) + SECOND / 1000, &err);
}

/* Both ends go on until the source's operation is over. */
static int drive(struct scene *s) {
    for (uint64_t until = now(s) + PATIENCE; now(s) < until;) {
        int status = rmig_source_process(s->source);
        if (status != RMIG_PENDING)
            return status;
        status = sink_turn(s);
        if (status != RMIG_OK)
            return status;
        rest(s);
    }
    cr_assert_fail("nothing comes of it");
    return RMIG_ERR_TIMEOUT;
}

#define SOURCE(s, call)                                                                                                \
    do {                                                                                                               \
        int status_ = (call);                                                                                          \
        status_ = status_ == RMIG_OK ? drive(s) : status_;                                                             \
        cr_assert_eq(status_, RMIG_OK, "%s: %s / %s", #call, rmig_source_error((s)->source)->text,                     \
                     rmig_sink_error((s)->sink)->text);                                                                \
    } while (0)

static void one_round(struct scene *s, uint64_t length) {
    cr_assert_eq(rmig_source_begin_round(s->source), RMIG_OK);
    cr_assert_eq(rmig_source_save_range(s->source, 0, 0, length), RMIG_OK);
    SOURCE(s, rmig_source_end_round_start(s->source));
}

// --- honest ends

static void honest(const char *provider, enum way way) {
    struct scene s = {.way = way};
    open_fabrics(&s, provider);
    for (unsigned i = 0; i < (way == WAY_EXTENDED ? HONEST : HONEST / 10); i++) {
        open_ends(&s);
        s.got = 0;
        s.taken = s.finished = false;
        s.to_ram[i % RAM] = 0;
        SOURCE(&s, rmig_source_connect_start(s.source, s.address));
        one_round(&s, 4096);
        cr_assert_eq(rmig_source_put(s.source, "state", 5), RMIG_OK);
        int status = rmig_source_finish_start(s.source);
        status = status == RMIG_OK ? drive(&s) : status;
        cr_assert_eq(status, RMIG_OK, "%u: %s / %s", i, rmig_source_error(s.source)->text,
                     rmig_sink_error(s.sink)->text);
        rmig_source_close(s.source); // at once, as a process that ends
        for (uint64_t until = now(&s) + PATIENCE; !s.finished && now(&s) < until;)
            cr_assert_eq(sink_turn(&s), RMIG_OK, "%u: %s", i, rmig_sink_error(s.sink)->text);
        cr_assert(s.finished, "%u", i);
        rmig_sink_close(s.sink);
    }
    close_fabrics(&s);
}

// --- a write that comes late

static void return_path_event(struct return_path *b, const struct rmig_fabric_event *ev) {
    static const uint8_t ask[RMIG_PRIVATE_DATA_SIZE] = {0, 0, 0, RMIG_PROTOCOL_VERSION};
    struct rmig_error err = {0};
    struct rmig_header ready = {.type = RMIG_MSG_READY, .repeat = 1};
    if (ev->type == RMIG_FEV_RESOLVED) {
        cr_assert_eq(b->fabric->ops->reg(b->ep, b->buf, sizeof b->buf, RMIG_ACCESS_LOCAL_READ | RMIG_ACCESS_LOCAL_WRITE,
                                         &b->mr, &err),
                     RMIG_OK, "%s", err.text);
        cr_assert_eq(b->fabric->ops->recv(b->ep, b->buf[0], sizeof b->buf[0], &b->mr, 1, &err), RMIG_OK, "%s",
                     err.text);
        cr_assert_eq(b->fabric->ops->connect(b->ep, ask, sizeof ask, &err), RMIG_OK, "%s", err.text);
    } else if (ev->type == RMIG_FEV_ESTABLISHED) {
        rmig_encode_header(b->buf[1], sizeof b->buf[1], &ready);
        cr_assert_eq(b->fabric->ops->send(b->ep, b->buf[1], RMIG_HEADER_SIZE, &b->mr, 2, &err), RMIG_OK, "%s",
                     err.text);
    } else if (ev->type == RMIG_FEV_RECV) {
        b->heard = ev->length;
    }
}

static void return_path_turn(struct scene *s) {
    struct rmig_error err = {0};
    struct rmig_fabric_event ev;
    if (s->back.ep != NULL && s->back.fabric->ops->poll(s->back.ep, &ev, 1, &err) == 1)
        return_path_event(&s->back, &ev);
}

/* Opens what a sink takes for the return path of a version 1 source. */
static void return_path_open(struct scene *s, const char *provider) {
    struct rmig_error err = {0};
    struct rmig_ep_config cfg = {16, 4, 4, 5 * SECOND};
    s->back.fabric = open_fabric(provider);
    cr_assert_eq(s->back.fabric->ops->open(s->back.fabric, s->address, &cfg, &s->back.ep, &err), RMIG_OK, "%s",
                 err.text);
    for (uint64_t until = now(s) + PATIENCE; !rmig_sink_has_return_path(s->sink) && now(s) < until;) {
        return_path_turn(s);
        cr_assert_eq(sink_turn(s), RMIG_OK, "%s", rmig_sink_error(s->sink)->text);
    }
    cr_assert(rmig_sink_has_return_path(s->sink));
}

static void return_path_close(struct return_path *b) {
    if (b->ep == NULL)
        return;
    b->fabric->ops->cut(b->ep);
    b->fabric->ops->dereg(b->ep, &b->mr, NULL);
    b->fabric->ops->close(b->ep);
    rmig_fabric_close(b->fabric);
}

/* Until the late write stands half-way. */
static void until_held(struct scene *s) {
    for (uint64_t until = now(s) + PATIENCE; !half_write_held(&s->proxy, 0) || !s->late;) {
        cr_assert_lt(now(s), until, "the late write is not held");
        rmig_source_process(s->source);
        cr_assert_eq(sink_turn(s), RMIG_OK, "%s", rmig_sink_error(s->sink)->text);
        rest(s);
    }
}

/* Before the sink's bytes are delivered it breaks, and the session fails with the write under way. */
static void return_path_breaks(struct scene *s) {
    until_held(s);
    return_path_close(&s->back);
    s->back.ep = NULL;
    int status = RMIG_OK;
    for (uint64_t until = now(s) + PATIENCE; status == RMIG_OK && now(s) < until;)
        status = sink_turn(s);
    cr_assert_neq(status, RMIG_OK);
    rmig_sink_close(s->sink);
    s->sink = NULL;
}

static void ends_well(struct scene *s) {
    until_held(s);
    for (uint64_t until = now(s) + PATIENCE; !s->finished;) {
        cr_assert_lt(now(s), until, "the sink does not finish");
        rmig_source_process(s->source);
        return_path_turn(s);
        cr_assert_eq(sink_turn(s), RMIG_OK, "%s", rmig_sink_error(s->sink)->text);
        rest(s);
    }
    if (s->way == WAY_RETURN_PATH)
        cr_assert_eq(s->back.heard, RMIG_HEADER_SIZE + 4, "%llu", (unsigned long long)s->back.heard);
}

/* In the midst of a round's write. */
static void breaks_off(struct scene *s) {
    half_write_hold(&s->proxy, 0, PASSES);
    cr_assert_eq(rmig_source_begin_round(s->source), RMIG_OK);
    cr_assert_eq(rmig_source_save_range(s->source, 0, 0, RAM), RMIG_OK);
    cr_assert_eq(rmig_source_end_round_start(s->source), RMIG_OK);
    s->late = true;
    until_held(s);
    int status = RMIG_OK;
    if (s->way == WAY_CANCEL)
        rmig_sink_cancel(s->sink);
    for (uint64_t until = now(s) + PATIENCE; s->way != WAY_CLOSE && status == RMIG_OK && now(s) < until;)
        status = sink_turn(s);
    cr_assert_eq(status,
                 s->way == WAY_CANCEL    ? RMIG_ERR_CANCELLED
                 : s->way == WAY_FAILURE ? RMIG_ERR_TIMEOUT
                                         : RMIG_OK,
                 "%s", rmig_sink_error(s->sink)->text);
    rmig_sink_close(s->sink);
    s->sink = NULL;
}

/* The sink's connection, unless it was cut, as by an embedder who waits for several. */
static void still_polled(struct scene *s) {
    struct rmig_fabric_event ev;
    struct rmig_ep *ep = s->sink == NULL ? NULL : s->sink->ss.ep;
    if (ep != NULL && ep != s->cut)
        s->to->ops->poll(ep, &ev, 1, NULL);
}

/* The rest of the write comes; whatever still runs in this process is run. */
static void nothing_lands(struct scene *s, const uint8_t *before) {
    struct rmig_sink_event ev;
    half_write_release(&s->proxy);
    half_write_wait_over(&s->proxy, 0, LATE / 2, 1);
    for (unsigned i = 0; i < 200; i++) {
        rmig_sink_wait(s->other, &ev, SECOND / 1000);
        rmig_sink_process(s->sink, &ev);
        rmig_source_process(s->source);
        still_polled(s);
    }
    cr_assert_eq(memcmp(before, s->to_ram, RAM), 0, "the guest's memory has changed");
    rmig_sink_close(s->sink);
    for (unsigned i = 0; i < 50; i++)
        rmig_sink_wait(s->other, &ev, SECOND / 1000);
    cr_assert_eq(memcmp(before, s->to_ram, RAM), 0, "the guest's memory has changed after close");
}

static void late(const char *provider, enum way way) {
    struct scene s = {.way = way, .hostile = true};
    char other[64];
    open_fabrics(&s, provider);
    open_ends(&s);
    s.other = listen_on(&s, NULL, other, sizeof other);
    half_write_open(&s.proxy, s.address);
    SOURCE(&s, rmig_source_connect_start(s.source, s.proxy.address));
    if (way == WAY_RETURN_PATH || way == WAY_BROKEN_RETURN_PATH)
        return_path_open(&s, provider);
    if (way >= WAY_CANCEL) {
        one_round(&s, 4096);
        breaks_off(&s);
    } else {
        one_round(&s, RAM);
        cr_assert_eq(rmig_source_put(s.source, "state", 5), RMIG_OK);
        cr_assert_eq(rmig_source_finish_start(s.source), RMIG_OK);
        if (way == WAY_BROKEN_RETURN_PATH)
            return_path_breaks(&s);
        else
            ends_well(&s);
    }
    uint8_t *before = malloc(RAM);
    memcpy(before, s.to_ram, RAM);
    nothing_lands(&s, before);
    free(before);
    rmig_source_close(s.source);
    rmig_sink_close(s.other);
    return_path_close(&s.back);
    half_write_close(&s.proxy);
    close_fabrics(&s);
}

TestSuite(handover, .timeout = 600);

#define HANDOVER(provider_index, provider)                                                                             \
    Test(handover, a_thousand_honest_ones_over_##provider##_end_well_at_both_ends) {                                   \
        honest(providers[provider_index], WAY_EXTENDED);                                                               \
    }                                                                                                                  \
    Test(handover, honest_version_1_ends_over_##provider##_end_well_at_both_ends) {                                    \
        honest(providers[provider_index], WAY_VERSION_1);                                                              \
    }                                                                                                                  \
    Test(handover, no_late_write_over_##provider##_behind_the_handover) {                                              \
        late(providers[provider_index], WAY_EXTENDED);                                                                 \
    }                                                                                                                  \
    Test(handover, no_late_write_over_##provider##_behind_complete) {                                                  \
        late(providers[provider_index], WAY_VERSION_1);                                                                \
    }                                                                                                                  \
    Test(handover, no_late_write_over_##provider##_behind_a_return_path) {                                             \
        late(providers[provider_index], WAY_RETURN_PATH);                                                              \
    }                                                                                                                  \
    Test(handover, no_late_write_over_##provider##_behind_a_broken_return_path) {                                      \
        late(providers[provider_index], WAY_BROKEN_RETURN_PATH);                                                       \
    }                                                                                                                  \
    Test(handover, no_late_write_over_##provider##_behind_cancel) { late(providers[provider_index], WAY_CANCEL); }     \
    Test(handover, no_late_write_over_##provider##_behind_close) { late(providers[provider_index], WAY_CLOSE); }       \
    Test(handover, no_late_write_over_##provider##_behind_a_failure) { late(providers[provider_index], WAY_FAILURE); }
HANDOVER(0, tcp)
HANDOVER(1, net)
