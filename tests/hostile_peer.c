/* A peer that is not rmig. It is written from the description of the protocol straight on struct rmig_fabric_ops, makes
   its bytes by hand, and does what it likes:

     honest_source, honest_sink    as stock QEMU does: must be able to migrate to and from rmig
     hostile_source                against rmig's sink
     hostile_sink                  against rmig's source

   The raw peer is plain code that may block; rmig's end is an actor of the simulator, or is driven while the raw peer
   waits. What must hold for every hostile test: rmig's session ends in time, with the status expected and a text that
   names the thing and the value, or, before a migration has begun, rmig's sink goes on listening and serves the next
   source; nothing is written outside the blocks (there are guard pages on both sides of them) nor inside unless that
   was asked for properly; the peer is told; nothing leaks.

   RMIG_TRACE=1 shows what rmig says. RMIG_HOSTILE_FABRIC=name runs the list over another fabric of `fabrics` below, at
   the address RMIG_HOSTILE_ADDR ("HOST:0"); what needs the simulator's powers is skipped there. "ofi" needs
   -DRMIG_TEST_OFI, "verbs" -DRMIG_TEST_VERBS. */
#define _GNU_SOURCE
#define RMIG_IMPLEMENTATION
#ifdef RMIG_TEST_OFI // not always: with libfabric each of these processes takes a quarter of a second to end
#include "../rmig_fabric_ofi.h"
#endif
#ifdef RMIG_TEST_VERBS
#include "../rmig_fabric_verbs.h"
#endif

#include "guest_ram.h"
#include "sim_fabric.h"

#include <criterion/criterion.h>
#include <poll.h>
#include <stdarg.h>
#include <sys/mman.h>

#define PAGE 4096u
#define MIB ((uint64_t)1 << 20)
#define BLOCKS 2
#define FILL 0x5a // what a sink's RAM holds before
#define STREAM_MAX 300000

/* Stock QEMU knows of these alone. */
enum {
    T_ERROR = 1,
    T_READY,
    T_QEMU_FILE,
    T_RAM_BLOCKS_REQUEST,
    T_RAM_BLOCKS_RESULT,
    T_COMPRESS,
    T_REGISTER_REQUEST,
    T_REGISTER_RESULT,
    T_REGISTER_FINISHED,
    T_UNREGISTER_REQUEST,
    T_UNREGISTER_FINISHED,
    T_HELLO = 64,
    T_HELLO_RESULT,
    T_BLOCKS,
    T_BLOCKS_RESULT,
    T_REGISTER_BATCH,
    T_REGISTER_BATCH_RESULT,
    T_CLEAR_BATCH,
    T_KEEPALIVE,
    T_FINISH,
    T_FINISH_RESULT,
    T_GOODBYE
};
#define PIN_ALL 0x00000001u
#define EXTENSION 0x00010000u

// --- bytes, by hand

static void put_be32(uint8_t *p, uint32_t v) {
    for (unsigned i = 0; i < 4; i++)
        p[i] = (uint8_t)(v >> (24 - 8 * i));
}

static void put_be64(uint8_t *p, uint64_t v) {
    put_be32(p, (uint32_t)(v >> 32));
    put_be32(p + 4, (uint32_t)v);
}

static uint32_t get_be32(const uint8_t *p) {
    return (uint32_t)p[0] << 24 | (uint32_t)p[1] << 16 | (uint32_t)p[2] << 8 | (uint32_t)p[3];
}

static uint64_t get_be64(const uint8_t *p) { return (uint64_t)get_be32(p) << 32 | get_be32(p + 4); }

/* b: a byte, h: 16 bits, w: 32 bits, q: 64 bits. Returns the bytes written. */
static size_t pack(uint8_t *out, const char *format, const uint64_t *v) {
    uint8_t *p = out;
    for (; *format != '\0'; format++, v++) {
        switch (*format) {
        case 'b':
            *p++ = (uint8_t)*v;
            break;
        case 'h':
            *p++ = (uint8_t)(*v >> 8);
            *p++ = (uint8_t)*v;
            break;
        case 'w':
            put_be32(p, (uint32_t)*v);
            p += 4;
            break;
        default:
            put_be64(p, *v);
            p += 8;
        }
    }
    return (size_t)(p - out);
}

// --- the raw peer

#define BUFFER 524288u
#define RECEIVES 4
#define SENDS 16
#define SLOTS (RECEIVES + SENDS)

struct message {
    uint32_t len, type, repeat;
    uint8_t *payload;
};

struct play;

struct raw {
    struct play *play;
    struct rmig_fabric *fabric;
    const struct rmig_fabric_ops *ops;
    struct rmig_ep *listener, *ep;
    uint8_t *memory; // buffers to receive into, then buffers to send from
    struct rmig_mr mr;
    unsigned free_receives, free_sends; // a bit each
    bool by_hand; // receives are posted by post_receive alone
    unsigned receives_left; // 1 + how many post_receive still posts, 0: no limit
    struct {
        unsigned buffer;
        size_t length;
    } inbox[RECEIVES];
    unsigned inbox_count;
    bool resolved, established, rejected, gone;
    uint64_t writes, writes_done;
    uint8_t private_data[256]; // the peer's
    size_t private_data_length;
    void *request;
    char text[200]; // of what ended the connection
    struct message m; // received last
};

static uint64_t raw_now(const struct raw *r) { return r->ops->now(r->fabric); }

static void raw_open(struct raw *r, struct play *p, struct rmig_fabric *fabric) {
    memset(r, 0, sizeof *r);
    r->play = p;
    r->fabric = fabric;
    r->ops = r->fabric->ops;
    r->memory = calloc(SLOTS + 1, BUFFER);
    cr_assert_not_null(r->memory);
    r->m.payload = r->memory + (size_t)SLOTS * BUFFER;
}

/* Gives one buffer to the fabric, as a receive. */
static void post_receive(struct raw *r) {
    struct rmig_error err = {0};
    if (r->receives_left == 1)
        return;
    r->receives_left -= r->receives_left > 0;
    cr_assert_neq(r->free_receives, 0u, "the raw peer posts more receives than it has buffers");
    unsigned i = (unsigned)__builtin_ctz(r->free_receives);
    if (r->ops->recv(r->ep, r->memory + (size_t)i * BUFFER, BUFFER, &r->mr, i, &err) == RMIG_OK)
        r->free_receives &= ~(1u << i);
}

static void raw_setup(struct raw *r, unsigned receives) {
    struct rmig_error err = {0};
    cr_assert_eq(r->ops->reg(r->ep, r->memory, (uint64_t)SLOTS * BUFFER,
                             RMIG_ACCESS_LOCAL_READ | RMIG_ACCESS_LOCAL_WRITE, &r->mr, &err),
                 RMIG_OK, "%s", err.text);
    r->free_receives = (1u << RECEIVES) - 1;
    r->free_sends = (1u << SENDS) - 1;
    for (unsigned i = 0; i < receives; i++)
        post_receive(r);
}

static void raw_drop(struct raw *r) { // without a word
    if (r->ep == NULL)
        return;
    r->ops->dereg(r->ep, &r->mr, NULL);
    r->ops->close(r->ep);
    r->ep = NULL;
    r->resolved = r->established = r->rejected = r->gone = false;
    r->inbox_count = 0;
}

static void raw_close(struct raw *r) {
    raw_drop(r);
    if (r->listener != NULL)
        r->ops->close(r->listener);
    r->listener = NULL;
    free(r->memory);
}

static void keep_private_data(struct raw *r, const struct rmig_fabric_event *e) {
    r->private_data_length = e->private_data_length;
    if (e->private_data_length > 0)
        memcpy(r->private_data, e->private_data, e->private_data_length);
}

static void raw_event(struct raw *r, const struct rmig_fabric_event *e) {
    switch (e->type) {
    case RMIG_FEV_REQUEST:
        r->request = e->request;
        keep_private_data(r, e);
        break;
    case RMIG_FEV_RESOLVED:
        r->resolved = true;
        break;
    case RMIG_FEV_ESTABLISHED:
        r->established = true;
        if (r->listener == NULL)
            keep_private_data(r, e);
        break;
    case RMIG_FEV_SEND:
        r->free_sends |= 1u << e->id;
        break;
    case RMIG_FEV_RECV:
        r->inbox[r->inbox_count].buffer = (unsigned)e->id;
        r->inbox[r->inbox_count++].length = (size_t)e->length;
        break;
    case RMIG_FEV_WRITE:
        r->writes_done = e->id > r->writes_done ? e->id : r->writes_done;
        break;
    case RMIG_FEV_REJECTED:
        r->rejected = true; // and gone
        __attribute__((fallthrough));
    case RMIG_FEV_DISCONNECTED:
    case RMIG_FEV_ERROR:
        r->gone = true;
        snprintf(r->text, sizeof r->text, "%s", e->text);
        break;
    }
}

static void raw_poll(struct raw *r, struct rmig_ep *ep) {
    struct rmig_fabric_event e;
    struct rmig_error err = {0};
    int n;
    while (ep != NULL && r->inbox_count < RECEIVES && (n = r->ops->poll(ep, &e, 1, &err)) != 0) {
        cr_assert(n > 0, "%s", err.text);
        raw_event(r, &e);
    }
}

typedef bool raw_condition(const struct raw *r);

static void pass(struct raw *r, struct rmig_ep *const *eps, size_t n, uint64_t until);
static uint64_t patience(const struct raw *r, uint64_t span);

/* Until it holds or the time has come. */
static bool raw_until_time(struct raw *r, raw_condition *holds, uint64_t until) {
    for (;;) {
        struct rmig_ep *eps[2];
        size_t n = 0;
        raw_poll(r, r->listener);
        raw_poll(r, r->ep);
        if (holds(r))
            return true;
        if (raw_now(r) >= until)
            return false;
        if (r->listener != NULL)
            eps[n++] = r->listener;
        if (r->ep != NULL)
            eps[n++] = r->ep;
        pass(r, eps, n, until);
    }
}

/* Waits until it holds, at most so long; longer where time is real. */
static bool raw_until(struct raw *r, raw_condition *holds, uint64_t span) {
    return raw_until_time(r, holds, raw_now(r) + patience(r, span));
}

static bool is_never(const struct raw *r) { return r == NULL; }
static bool is_resolved(const struct raw *r) { return r->resolved; }
static bool is_connected(const struct raw *r) { return r->established || r->gone; }
static bool is_asked(const struct raw *r) { return r->request != NULL; }
static bool is_gone(const struct raw *r) { return r->gone; }
static bool is_sent(const struct raw *r) { return r->free_sends == (1u << SENDS) - 1 || r->gone; }
static bool is_written(const struct raw *r) { return r->writes_done == r->writes || r->gone; }
static bool has_message(const struct raw *r) { return r->inbox_count > 0 || r->gone; }

static void pass_time(struct raw *r, uint64_t span) { raw_until_time(r, is_never, raw_now(r) + span); }

static const struct rmig_ep_config raw_depths = {64, SENDS, RECEIVES, 5 * SIM_SECOND};

static const char *play_address(const struct play *p);

static void raw_resolve(struct raw *r, unsigned receives) {
    struct rmig_error err = {0};
    cr_assert_eq(r->ops->open(r->fabric, play_address(r->play), &raw_depths, &r->ep, &err), RMIG_OK, "%s", err.text);
    cr_assert(raw_until(r, is_resolved, SIM_SECOND));
    raw_setup(r, receives);
}

/* As the active side; the peer's answer is in r->private_data. */
static void raw_connect(struct raw *r, const uint8_t *private_data, size_t n, unsigned receives) {
    struct rmig_error err = {0};
    raw_resolve(r, receives);
    cr_assert_eq(r->ops->connect(r->ep, private_data, n, &err), RMIG_OK, "%s", err.text);
    cr_assert(raw_until(r, is_connected, SIM_SECOND), "the sink does not answer");
}

/* Sends any bytes: whether the fabric took them. */
static bool send_bytes(struct raw *r, const uint8_t *p, size_t n) {
    struct rmig_error err = {0};
    raw_until(r, is_sent, 0);
    cr_assert_neq(r->free_sends, 0u, "the raw peer sends more than it has buffers");
    unsigned slot = (unsigned)__builtin_ctz(r->free_sends);
    uint8_t *buffer = r->memory + (size_t)(RECEIVES + slot) * BUFFER;
    memcpy(buffer, p, n < BUFFER ? n : BUFFER);
    if (r->ops->send(r->ep, buffer, n, &r->mr, slot, &err) != RMIG_OK)
        return false;
    r->free_sends &= ~(1u << slot);
    return true;
}

/* A message whose header says len, with n bytes behind it. What pads is garbage: nobody may read it. */
static bool say_bytes(struct raw *r, uint32_t type, uint32_t repeat, uint32_t len, const uint8_t *payload, size_t n) {
    static uint8_t bytes[BUFFER];
    put_be32(bytes, len);
    put_be32(bytes + 4, type);
    put_be32(bytes + 8, repeat);
    put_be32(bytes + 12, 0xdeadbeef);
    if (n > 0)
        memcpy(bytes + 16, payload, n);
    return send_bytes(r, bytes, 16 + n);
}

static bool say(struct raw *r, uint32_t type, uint32_t repeat, const char *format, const uint64_t *values) {
    uint8_t payload[4096];
    size_t n = pack(payload, format, values);
    return say_bytes(r, type, repeat, (uint32_t)n, payload, n);
}
#define SAY(r, type, repeat, format, ...) say(r, type, repeat, format, (const uint64_t[]){__VA_ARGS__})
#define SAY_EMPTY(r, type) say_bytes(r, type, 1, 0, NULL, 0)
#define PADDING 0xbadc0de5u

/* The next message, in r->m; false: the connection is gone, or nothing came within `span`. */
static bool next_message(struct raw *r, uint64_t span) {
    if (!raw_until(r, has_message, span) || r->inbox_count == 0)
        return false;
    unsigned buffer = r->inbox[0].buffer;
    size_t n = r->inbox[0].length;
    const uint8_t *p = r->memory + (size_t)buffer * BUFFER;
    cr_assert_geq(n, 16u);
    r->m.len = get_be32(p);
    r->m.type = get_be32(p + 4);
    r->m.repeat = get_be32(p + 8);
    cr_assert_eq(n, 16 + (size_t)r->m.len, "message %u of %zu bytes says len %u", r->m.type, n, r->m.len);
    cr_assert_eq(get_be32(p + 12), 0u, "padding of message %u", r->m.type);
    if (r->m.type == T_READY)
        cr_assert(r->m.len == 0 && r->m.repeat == 1, "READY has len %u, repeat %u", r->m.len, r->m.repeat);
    memcpy(r->m.payload, p + 16, n - 16);
    r->free_receives |= 1u << buffer;
    memmove(r->inbox, r->inbox + 1, --r->inbox_count * sizeof r->inbox[0]);
    if (!r->by_hand || r->receives_left > 0)
        post_receive(r);
    return true;
}

static void expect(struct raw *r, uint32_t type) {
    cr_assert(next_message(r, 5 * SIM_SECOND), "message %u was due: %s", type, r->gone ? r->text : "nothing came");
    cr_assert_eq(r->m.type, type, "message %u was due, %u came: %.*s", type, r->m.type,
                 r->m.type == T_ERROR ? (int)r->m.len : 0, (const char *)r->m.payload);
}

static void raw_leave(struct raw *r) {
    r->ops->disconnect(r->ep);
    raw_until(r, is_gone, SIM_SECOND);
}

// --- both ends together

struct ram {
    const char *name;
    uint8_t *map, *host; // host: between two guard pages
    uint64_t length;
};

enum step { PUT_HEAD, PUT_PART, PUT_TAIL, BEGIN, SAVE_ALL, SAVE_DIRTY, END, FINISH, OVER };

struct play {
    struct sim_config world, plain; // plain: as the test found it
    struct sim *sim; // NULL: the fabric is a real one
    struct rmig_fabric *fabric[2]; // of the source, of the sink
    unsigned own; // rmig's of these
    char address[80];
    sim_step *step; // rmig's end
    struct raw raw;
    struct ram ram[BLOCKS]; // rmig's
    struct rmig_config cfg;
    bool done;
    int status;
    char text[sizeof((struct rmig_error *)0)->text];

    struct rmig_sink *sink;
    unsigned connected, rounds, taken, finished, disconnected, forgotten;
    struct rmig_error why; // what the last source was forgotten for
    bool blocks_added, think; // the embedder takes its time over the blocks
    bool returns; // it answers the first stream bytes on the return path, and the last, which complete the migration
    uint8_t stream[STREAM_MAX]; // received by rmig's sink, or to be sent by its source
    size_t stream_size, stream_due;
    uint64_t regions_at_end;

    struct rmig_source *source;
    const enum step *script;
    unsigned put; // bytes of the present PUT that were taken
    uint64_t *dirty[BLOCKS];
};

// --- fabrics

#ifdef RMIG_TEST_OFI
static struct rmig_fabric *open_ofi(struct rmig_error *err) {
    struct rmig_ofi_options options = {.provider = "tcp"};
    return rmig_ofi_open(&options, err);
}
#endif
#ifdef RMIG_TEST_VERBS
static struct rmig_fabric *open_verbs(struct rmig_error *err) { return rmig_verbs_open(NULL, err); }
#endif

static const struct {
    const char *name;
    struct rmig_fabric *(*open)(struct rmig_error *err); // NULL: the simulator
    const char *address; // NULL: RMIG_HOSTILE_ADDR must say
    bool pads; // private data: what is short arrives with zeroes behind it
    bool drops; // a send that finds no receive completes all the same
    bool offsets; // remote addresses are offsets: one region a block in version 1
} fabrics[] = {
    {"sim", NULL, "sink:7000", false, false, false},
#ifdef RMIG_TEST_OFI
    {"ofi", open_ofi, "127.0.0.1:0", false, true, true},
#endif
#ifdef RMIG_TEST_VERBS
    {"verbs", open_verbs, NULL, true, false, false},
#endif
};
#define FABRICS (sizeof fabrics / sizeof fabrics[0])

/* The row that the environment names. */
static size_t chosen(void) {
    const char *name = getenv("RMIG_HOSTILE_FABRIC");
    for (size_t i = 0; i < FABRICS; i++)
        if (strcmp(name == NULL ? "sim" : name, fabrics[i].name) == 0)
            return i;
    cr_assert_fail("RMIG_HOSTILE_FABRIC=%s: not a fabric that this was compiled with", name);
    return 0;
}

static bool simulated(void) { return fabrics[chosen()].open == NULL; }

#define SIM_ONLY                                                                                                       \
    do {                                                                                                               \
        if (!simulated())                                                                                              \
            cr_skip_test("needs the simulator");                                                                       \
    } while (0)
#define SKIP_IF(which, why)                                                                                            \
    do {                                                                                                               \
        if (fabrics[chosen()].which)                                                                                   \
            cr_skip_test(why);                                                                                         \
    } while (0)
#define NO_PADDING SKIP_IF(pads, "short private data arrives padded")
#define NEEDS_RECEIVES SKIP_IF(drops, "sends without a receive complete")
#define NO_OFFSETS SKIP_IF(offsets, "a region a block")

/* Stands between rmig's end and its fabric and counts what it holds. */
#define REGIONS_MAX 4096
static struct {
    const struct rmig_fabric_ops *below;
    struct rmig_fabric_ops ops;
    struct {
        struct rmig_ep *ep;
        void *handle;
        uint64_t length;
        bool exposed; // the peer can write it
    } region[REGIONS_MAX];
    uint64_t regions, peak, exposed, bytes, rejects;
    int64_t endpoints;
} held;

static int held_reg(struct rmig_ep *ep, void *address, uint64_t length, unsigned access, struct rmig_mr *mr,
                    struct rmig_error *err) {
    int status = held.below->reg(ep, address, length, access, mr, err);
    if (status != RMIG_OK)
        return status;
    cr_assert_lt(held.regions, (uint64_t)REGIONS_MAX);
    bool exposed = (access & RMIG_ACCESS_REMOTE_WRITE) != 0;
    held.region[held.regions].ep = ep;
    held.region[held.regions].handle = mr->handle;
    held.region[held.regions].length = length;
    held.region[held.regions++].exposed = exposed;
    held.exposed += exposed;
    held.bytes += length;
    held.peak = sim_max(held.peak, held.regions);
    return status;
}

static int held_dereg(struct rmig_ep *ep, struct rmig_mr *mr, struct rmig_error *err) {
    uint64_t i = 0;
    while (i < held.regions && held.region[i].handle != mr->handle)
        i++;
    cr_assert_lt(i, held.regions, "what is not registered is deregistered");
    held.exposed -= held.region[i].exposed;
    held.bytes -= held.region[i].length;
    held.region[i] = held.region[--held.regions];
    return held.below->dereg(ep, mr, err);
}

/* Nothing of the peer lands on this endpoint any more. */
static void held_bar(const struct rmig_ep *ep) {
    for (uint64_t i = 0; i < held.regions; i++)
        if (held.region[i].ep == ep && held.region[i].exposed) {
            held.region[i].exposed = false;
            held.exposed--;
        }
}

static int held_revoke(struct rmig_ep *ep, struct rmig_error *err) {
    int status = held.below->revoke(ep, err);
    if (status == RMIG_OK)
        held_bar(ep);
    return status;
}

static void held_cut(struct rmig_ep *ep) {
    held.below->cut(ep);
    held_bar(ep);
}

static int held_listen(struct rmig_fabric *f, const char *address, struct rmig_ep **ep, struct rmig_error *err) {
    int status = held.below->listen(f, address, ep, err);
    held.endpoints += status == RMIG_OK;
    return status;
}

static int held_open(struct rmig_fabric *f, const char *address, const struct rmig_ep_config *cfg, struct rmig_ep **ep,
                     struct rmig_error *err) {
    int status = held.below->open(f, address, cfg, ep, err);
    held.endpoints += status == RMIG_OK;
    return status;
}

static int held_open_request(struct rmig_ep *listener, void *request, const struct rmig_ep_config *cfg,
                             struct rmig_ep **ep, struct rmig_error *err) {
    int status = held.below->open_request(listener, request, cfg, ep, err);
    held.endpoints += status == RMIG_OK;
    return status;
}

static int held_reject(struct rmig_ep *listener, void *request, const uint8_t *private_data, size_t n,
                       struct rmig_error *err) {
    held.rejects++;
    return held.below->reject(listener, request, private_data, n, err);
}

static void held_close(struct rmig_ep *ep) {
    held.endpoints--;
    held.below->close(ep);
}

static void hold(struct rmig_fabric *f) {
    memset(&held, 0, sizeof held);
    held.below = f->ops;
    held.ops = *f->ops;
    held.ops.reg = held_reg;
    held.ops.dereg = held_dereg;
    held.ops.revoke = held.below->revoke == NULL ? NULL : held_revoke;
    held.ops.cut = held_cut;
    held.ops.listen = held_listen;
    held.ops.open = held_open;
    held.ops.open_request = held_open_request;
    held.ops.reject = held_reject;
    held.ops.close = held_close;
    f->ops = &held.ops;
}

/* own: which end is rmig's. A test that has changed the simulated world is none for a real fabric. */
static void play_open(struct play *p, unsigned own) {
    size_t row = chosen();
    const char *address = getenv("RMIG_HOSTILE_ADDR");
    struct rmig_error err = {0};
    p->own = own;
    if (address == NULL || simulated())
        address = fabrics[row].address;
    cr_assert_not_null(address, "RMIG_HOSTILE_ADDR: say at which address of an interface, \"HOST:0\"");
    snprintf(p->address, sizeof p->address, "%s", address);
    p->plain.key_bits = p->world.key_bits;
    if (simulated()) {
        p->sim = sim_open(&p->world);
        p->fabric[0] = sim_fabric(p->sim, 0);
        p->fabric[1] = sim_fabric(p->sim, 1);
    } else if (p->world.mode != SIM_ORDERED || memcmp(&p->plain, &p->world, sizeof p->world) != 0) {
        SIM_ONLY;
    } else {
        for (unsigned i = 0; i < 2; i++) {
            p->fabric[i] = fabrics[row].open(&err);
            cr_assert_not_null(p->fabric[i], "%s: %s", fabrics[row].name, err.text);
        }
    }
    raw_open(&p->raw, p, p->fabric[1 - own]);
    hold(p->fabric[own]);
}

static void play_actor(struct play *p, sim_step *step) {
    p->step = step;
    if (p->sim != NULL)
        sim_actor(p->sim, p->own, step, p);
}

static const char *play_address(const struct play *p) { return p->address; }
static uint64_t patience(const struct raw *r, uint64_t span) { return r->play->sim != NULL ? span : 60 * span; }

static int add_fds(struct pollfd *to, const struct rmig_fd *fds, int n) {
    for (int i = 0; i < n; i++) {
        to[i].fd = fds[i].fd;
        to[i].events = (short)(POLLIN | (fds[i].write ? POLLOUT : 0));
    }
    return n;
}

/* One turn of both ends where time is real: rmig's end does what it can, then both sleep. */
static void real_turn(struct raw *r, struct rmig_ep *const *eps, size_t n, uint64_t until) {
    struct play *p = r->play;
    struct pollfd fds[24];
    struct rmig_fd got[12];
    struct rmig_error err = {0};
    bool ready = false, active = p->step != NULL && !p->done;
    int count = 0;
    if (active)
        until = sim_min(until, p->step(p, raw_now(r)));
    for (size_t i = 0; i < n; i++) {
        int more = r->ops->fds(eps[i], got, 4, &ready, &err);
        cr_assert_geq(more, 0, "%s", err.text);
        count += add_fds(fds + count, got, more);
    }
    if (active && !p->done) {
        int more = p->sink != NULL ? rmig_sink_fds(p->sink, got, 12) : rmig_source_fds(p->source, got, 12);
        count += add_fds(fds + count, got, more > 0 ? more : 0);
        until =
            sim_min(until, p->sink != NULL ? rmig_sink_next_deadline(p->sink) : rmig_source_next_deadline(p->source));
    }
    uint64_t now = raw_now(r);
    if (!ready && until > now)
        poll(fds, (nfds_t)count, (int)sim_min((until - now) / SIM_MS + 1, 5));
}

static void pass(struct raw *r, struct rmig_ep *const *eps, size_t n, uint64_t until) {
    struct rmig_error err = {0};
    if (r->play->sim == NULL)
        real_turn(r, eps, n, until);
    else
        cr_assert_eq(r->ops->wait(r->fabric, eps, n, until, &err), RMIG_OK, "%s", err.text);
}

static bool is_over(const struct raw *r) { return r->play->done; }

static void map_ram(struct ram *b, const char *name, uint64_t length) {
    b->name = name;
    b->length = length;
    b->map = NULL;
    if (length % GUEST_RAM_HUGE == 0) {
        b->host = guest_ram_map(length);
        return;
    }
    b->map = mmap(NULL, length + 2 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    cr_assert_neq((void *)b->map, MAP_FAILED);
    b->host = b->map + PAGE;
    cr_assert_eq(mprotect(b->host, length, PROT_READ | PROT_WRITE), 0);
}

static void unmap_ram(const struct ram *b) {
    if (b->map == NULL)
        guest_ram_unmap(b->host);
    else
        munmap(b->map, b->length + 2 * PAGE);
}

static void set(struct play *p, enum rmig_param param, uint64_t value) {
    struct rmig_error err = {0};
    cr_assert_eq(rmig_set(&p->cfg, param, value, &err), RMIG_OK, "%s", err.text);
}

static void trace(void *user, const char *line) { fprintf(stderr, "%s %s\n", (const char *)user, line); }

#define RAM 0 // blocks
#define ROM 1
#define RAM_LENGTH (4 * MIB)
#define ROM_LENGTH (MIB + PAGE)
#define CONNECT_TIMEOUT (2 * SIM_SECOND)
#define IO_TIMEOUT (3 * SIM_SECOND)

/* Where time is real, a busy machine is silent for seconds: ten more are granted, so that the text has the same end. */
static uint64_t timeout_of(uint64_t simulated) {
    return fabrics[chosen()].open == NULL ? simulated : simulated + 10 * SIM_SECOND;
}

/* The defaults of a test, which may change them before play_sink or play_source. */
static struct play *play_new(enum sim_mode mode) {
    struct play *p = calloc(1, sizeof *p);
    cr_assert_not_null(p);
    sim_defaults(&p->world, mode, 7);
    p->world.key_bits = 32;
    p->plain = p->world;
    set(p, RMIG_PARAM_CONNECT_TIMEOUT, timeout_of(CONNECT_TIMEOUT));
    set(p, RMIG_PARAM_IO_TIMEOUT, timeout_of(IO_TIMEOUT));
    if (getenv("RMIG_TRACE") != NULL) {
        p->cfg.trace = trace;
        p->cfg.trace_user = (void *)(uintptr_t) "rmig";
    }
    return p;
}

static void play_free(struct play *p) {
    struct rmig_error err = {0};
    raw_close(&p->raw);
    rmig_source_close(p->source);
    rmig_sink_close(p->sink);
    cr_assert(held.regions == 0 && held.endpoints == 0, "rmig leaves %llu regions and %lld endpoints",
              (unsigned long long)held.regions, (long long)held.endpoints);
    if (p->sim != NULL)
        cr_assert_eq(sim_clean(p->sim, &err), RMIG_OK, "%s", err.text);
    else
        for (unsigned i = 0; i < 2; i++)
            rmig_fabric_close(p->fabric[i]);
    sim_close(p->sim);
    for (unsigned i = 0; i < BLOCKS; i++) {
        unmap_ram(&p->ram[i]);
        free(p->dirty[i]);
    }
    free(p);
}

static uint64_t over(struct play *p, int status, const struct rmig_error *error) {
    p->done = true;
    p->status = status;
    snprintf(p->text, sizeof p->text, "%s", status < 0 ? error->text : "");
    return SIM_DONE;
}

/* Runs rmig's end until it is over, within so much time. */
static void run_to_end(struct play *p, uint64_t within) {
    struct rmig_error err = {0};
    uint64_t until = raw_now(&p->raw) + within;
    if (p->sim == NULL)
        cr_assert(raw_until(&p->raw, is_over, within), "rmig has not come to an end");
    else
        cr_assert_eq(sim_run(p->sim, until, &err), RMIG_OK, "rmig has not come to an end within %llu ms: %s",
                     (unsigned long long)(within / SIM_MS), err.text);
}

/* Every part of `needles`, which are separated by |, is in the text. */
static void check_text(const char *text, const char *needles) {
    char copy[200];
    snprintf(copy, sizeof copy, "%s", needles);
    for (char *save = NULL, *part = strtok_r(copy, "|", &save); part != NULL; part = strtok_r(NULL, "|", &save))
        cr_expect(strstr(text, part) != NULL, "the error does not name \"%s\": %s", part, text);
    for (const char *c = text; *c != '\0'; c++)
        cr_expect(*c >= 0x20 && *c < 0x7f, "the error has byte 0x%02x in it", (unsigned)(uint8_t)*c);
}

/* A real fabric may tell of a failure in another way than the simulator does, and in its own words. */
static bool alike(const struct play *p, int status, int expected) {
    bool link = expected == RMIG_ERR_FABRIC || expected == RMIG_ERR_PEER_GONE;
    if (p->sim == NULL && link)
        return status == RMIG_ERR_FABRIC || status == RMIG_ERR_PEER_GONE;
    if (p->sim == NULL && expected == RMIG_ERR_REFUSED && status == RMIG_ERR_UNREACHABLE)
        return true;
    return status == expected;
}

static void check_failure(const struct play *p, int status, const char *text, int expected, const char *needles) {
    cr_assert(alike(p, status, expected), "%s was due, %s came: %s", rmig_status_name(expected),
              rmig_status_name(status), text);
    check_text(text, p->sim == NULL && expected == RMIG_ERR_FABRIC ? "" : needles);
}

/* A real fabric wants rmig's end looked after, until it is closed. */
static void close_own(struct play *p) {
    if (p->sim != NULL || !p->done)
        return;
    rmig_source_close(p->source);
    rmig_sink_close(p->sink);
    p->source = NULL;
    p->sink = NULL;
}

/* Who broke the protocol is told, if it can be. */
static void check_told(struct play *p, const char *text, bool extended) {
    if (p->raw.gone || p->raw.ep == NULL || !p->raw.established)
        return;
    while (next_message(&p->raw, 200 * SIM_MS) && p->raw.m.type != T_ERROR) {
    }
    cr_expect_eq(p->raw.m.type, (uint32_t)T_ERROR, "the peer was not told");
    cr_expect_eq(p->raw.m.len, extended ? strlen(text) : 0, "ERROR has %u bytes", p->raw.m.len);
    if (extended && p->raw.m.len == strlen(text))
        cr_expect_eq(memcmp(p->raw.m.payload, text, p->raw.m.len), 0, "the peer was told something else");
    close_own(p);
    cr_expect(raw_until(&p->raw, is_gone, SIM_SECOND), "rmig did not hang up");
}

/* The session failed as expected, in time, and the raw peer was told if it could be. */
static void must_fail(struct play *p, int status, const char *needles) {
    bool slow = status == RMIG_ERR_TIMEOUT || status == RMIG_ERR_HANDOVER;
    bool extended = p->sink != NULL     ? rmig_sink_extended(p->sink)
                    : p->source != NULL ? rmig_source_extended(p->source)
                                        : false;
    run_to_end(p, slow ? 5 * SIM_SECOND : SIM_SECOND);
    check_failure(p, p->status, p->text, status, needles);
    if (status == RMIG_ERR_PROTOCOL)
        check_told(p, p->text, extended);
}

// --- rmig's sink as an actor

static uint64_t sink_over(struct play *p, int status) { return over(p, status, rmig_sink_error(p->sink)); }

static int give_blocks(struct play *p) {
    int status = RMIG_OK;
    for (unsigned i = 0; i < BLOCKS && status == RMIG_OK && !p->blocks_added; i++) {
        struct rmig_block_desc d = {0};
        d.name = p->ram[i].name;
        d.host = p->ram[i].host;
        d.length = p->ram[i].length;
        d.guest_offset = (uint64_t)i << 36;
        status = rmig_sink_add_block(p->sink, &d, NULL);
    }
    p->blocks_added = true;
    if (status == RMIG_OK)
        status = rmig_sink_accept_blocks(p->sink);
    return status == RMIG_ERR_FORGOTTEN ? RMIG_OK : status; // the event follows
}

static const uint8_t pong[8] = {0, 2, 0, 4, 0, 0, 0, 1}, shut[8] = {0, 1, 0, 4, 0, 0, 0, 0};

static int answer_stream(struct play *p, bool first) {
    int status = first ? rmig_sink_return_put(p->sink, pong, sizeof pong) : RMIG_OK;
    if (status != RMIG_OK || p->stream_due == 0 || p->stream_size != p->stream_due)
        return status;
    status = rmig_sink_return_put(p->sink, shut, sizeof shut);
    if (status == RMIG_OK)
        status = rmig_sink_complete(p->sink);
    cr_assert(status < 0 || held.exposed == 0 || !p->sink->ss.caps.revokes,
              "complete leaves memory that the source can write");
    return status;
}

static uint64_t sink_step(void *user, uint64_t now) {
    struct play *p = user;
    struct rmig_sink_event ev;
    (void)now;
    int status = rmig_sink_process(p->sink, &ev);
    if (status != RMIG_OK)
        return sink_over(p, status);
    switch (ev.type) {
    case RMIG_SINK_CONNECTED:
        p->connected++;
        break;
    case RMIG_SINK_FORGOTTEN:
        p->forgotten++;
        p->why = *rmig_sink_error(p->sink);
        p->stream_size = 0;
        break;
    case RMIG_SINK_BLOCKS:
        status = p->think ? RMIG_OK : give_blocks(p);
        break;
    case RMIG_SINK_ROUND:
        p->rounds++;
        break;
    case RMIG_SINK_STREAM: {
        bool first = p->stream_size == 0;
        for (size_t n; (n = rmig_sink_get(p->sink, p->stream + p->stream_size, STREAM_MAX - p->stream_size)) > 0;)
            p->stream_size += n;
        if (p->returns)
            status = answer_stream(p, first);
        break;
    }
    case RMIG_SINK_DISCONNECTED: // only the stream's reader knows whether this is the end
        p->disconnected++;
        if (p->stream_due == 0 || p->stream_size != p->stream_due) {
            rmig_sink_cancel(p->sink);
            return 0; // process says so
        }
        status = rmig_sink_complete(p->sink);
        break;
    case RMIG_SINK_TAKE:
        p->taken++;
        status = rmig_sink_take(p->sink);
        break;
    case RMIG_SINK_FINISHED:
        p->finished++;
        p->regions_at_end = held.exposed;
        return sink_over(p, RMIG_OK);
    default:
        break;
    }
    return status < 0 ? sink_over(p, status) : rmig_sink_next_deadline(p->sink);
}

static void play_sink(struct play *p, uint64_t ram, uint64_t rom) {
    struct rmig_error err = {0};
    play_open(p, 1);
    map_ram(&p->ram[RAM], "ram", ram);
    map_ram(&p->ram[ROM], "rom", rom);
    for (unsigned i = 0; i < BLOCKS; i++)
        if (p->ram[i].length <= 16 * MIB)
            memset(p->ram[i].host, FILL, p->ram[i].length);
    cr_assert_eq(rmig_sink_open(p->fabric[1], &p->cfg, &p->sink, &err), RMIG_OK, "%s", err.text);
    cr_assert_eq(rmig_sink_listen(p->sink, p->address), RMIG_OK, "%s", rmig_sink_error(p->sink)->text);
    cr_assert_eq(rmig_sink_address(p->sink, p->address, sizeof p->address), RMIG_OK);
    play_actor(p, sink_step);
}

// --- rmig's source as an actor

static const uint8_t hook_word[8] = {0, 0, 0, 0, 0, 0, 0, 0x80};

/* What the embedder puts in the stream at each PUT: [from, to) of p->stream. */
static void put_range(const struct play *p, enum step step, size_t *from, size_t *to) {
    *from = step == PUT_HEAD ? 0 : step == PUT_PART ? 200 : 230;
    *to = step == PUT_HEAD ? 200 : step == PUT_PART ? 230 : p->stream_size;
}

static int put_step(struct play *p, enum step step) {
    size_t from, to;
    put_range(p, step, &from, &to);
    while (from + p->put < to) {
        int64_t taken = rmig_source_put_some(p->source, p->stream + from + p->put, to - from - p->put);
        if (taken < 0)
            return (int)taken;
        p->put += (unsigned)taken;
        if (taken == 0)
            return rmig_source_flush_start(p->source);
    }
    p->put = 0;
    p->script++;
    return RMIG_OK;
}

static int source_next(struct play *p) {
    enum step step = *p->script;
    int status = RMIG_OK;
    if (step <= PUT_TAIL)
        return put_step(p, step);
    p->script++;
    switch (step) {
    case BEGIN:
        return rmig_source_begin_round(p->source);
    case SAVE_ALL:
        for (uint32_t i = 0; i < BLOCKS && status == RMIG_OK; i++)
            status = rmig_source_save_range(p->source, i, 0, p->ram[i].length);
        return status;
    case SAVE_DIRTY:
        for (uint32_t i = 0; i < BLOCKS && status == RMIG_OK; i++)
            status = rmig_source_save_bitmap(p->source, i, p->dirty[i], 0, p->ram[i].length / PAGE);
        return status;
    case END:
        return rmig_source_end_round_start(p->source);
    default:
        return rmig_source_finish_start(p->source);
    }
}

static uint64_t source_step(void *user, uint64_t now) {
    struct play *p = user;
    (void)now;
    for (;;) {
        int status = rmig_source_process(p->source);
        if (status == RMIG_PENDING)
            return rmig_source_next_deadline(p->source);
        if (status == RMIG_OK && *p->script == OVER)
            return over(p, RMIG_OK, NULL);
        if (status == RMIG_OK)
            status = source_next(p);
        if (status < 0)
            return over(p, status, rmig_source_error(p->source));
    }
}

static void play_source(struct play *p, uint64_t ram, uint64_t rom, const enum step *script) {
    struct rmig_error err = {0};
    play_open(p, 0);
    p->script = script;
    map_ram(&p->ram[RAM], "ram", ram);
    map_ram(&p->ram[ROM], "rom", rom);
    cr_assert_eq(p->raw.ops->listen(p->raw.fabric, p->address, &p->raw.listener, &err), RMIG_OK, "%s", err.text);
    cr_assert_eq(p->raw.ops->address(p->raw.listener, p->address, sizeof p->address, &err), RMIG_OK, "%s", err.text);
    cr_assert_eq(rmig_source_open(p->fabric[0], &p->cfg, &p->source, &err), RMIG_OK, "%s", err.text);
    for (unsigned i = 0; i < BLOCKS; i++) {
        struct rmig_block_desc d = {0};
        d.name = p->ram[i].name;
        d.host = p->ram[i].host;
        d.length = p->ram[i].length;
        d.guest_offset = (uint64_t)i << 36;
        cr_assert_eq(rmig_source_add_block(p->source, &d, NULL), RMIG_OK, "%s", rmig_source_error(p->source)->text);
        p->dirty[i] = calloc(p->ram[i].length / PAGE / 64 + 1, 8);
        cr_assert_not_null(p->dirty[i]);
    }
    cr_assert_eq(rmig_source_connect_start(p->source, p->address), RMIG_OK, "%s", rmig_source_error(p->source)->text);
    play_actor(p, source_step);
}

/* Takes rmig's request; its private data is in r->private_data. */
static void raw_accept(struct raw *r, const uint8_t *reply, size_t n, unsigned receives) {
    struct rmig_error err = {0};
    cr_assert(raw_until(r, is_asked, SIM_SECOND), "no request came");
    cr_assert_eq(r->ops->open_request(r->listener, r->request, &raw_depths, &r->ep, &err), RMIG_OK, "%s", err.text);
    raw_setup(r, receives);
    cr_assert_eq(r->ops->accept(r->ep, reply, n, &err), RMIG_OK, "%s", err.text);
    raw_until(r, is_connected, SIM_SECOND);
}

// --- an honest source, as stock QEMU is

#define STOCK_RUN_MAX (2 * MIB)
#define CHUNKS_MAX 200

struct stock_source {
    struct play *p;
    struct raw *r;
    uint64_t chunk; // its own, which is not on the wire
    bool pinned;
    struct {
        struct ram ram;
        struct rmig_mr mr;
        uint64_t base, offset; // at the sink
        bool base_known;
        uint32_t rkey[CHUNKS_MAX];
    } block[BLOCKS];
    uint64_t writing; // 1 + block and chunk with a write in flight
    uint8_t stream[STREAM_MAX]; // what was sent
    size_t stream_size;
    unsigned readies, registrations, clears;
};

/* One message for one READY, and its reply if it has one; receives are posted when stock QEMU posts them. */
static void stock_say(struct stock_source *q, uint32_t type, uint32_t repeat, const uint8_t *payload, size_t n,
                      uint32_t reply) {
    expect(q->r, T_READY);
    q->readies++;
    if (reply != 0)
        post_receive(q->r);
    post_receive(q->r);
    cr_assert(say_bytes(q->r, type, repeat, (uint32_t)n, payload, n), "message %u cannot be sent", type);
    cr_assert(raw_until(q->r, is_sent, SIM_SECOND) && !q->r->gone, "message %u was not taken: %s", type, q->r->text);
    if (reply != 0)
        expect(q->r, reply);
}

static void stock_stream(struct stock_source *q, const uint8_t *bytes, size_t n) {
    memcpy(q->stream + q->stream_size, bytes, n);
    q->stream_size += n;
    for (size_t at = 0; at < n; at += 32768) // before QEMU 8.2 repeat was garbage
        stock_say(q, T_QEMU_FILE, 0x7fedcba9, bytes + at, n - at < 32768 ? n - at : 32768, 0);
}

static void stock_setup(struct stock_source *q) {
    uint8_t bytes[256];
    size_t n = pack(bytes, "wwbwbwbwwq", (const uint64_t[]){0x5145564d, 3, 1, 2, 3, 0x72616d00, 0, 0, 4, 0x4082004});
    memcpy(bytes + n, hook_word, 8);
    stock_stream(q, bytes, n + 8);
    stock_say(q, T_RAM_BLOCKS_REQUEST, 1, NULL, 0, T_RAM_BLOCKS_RESULT);
    cr_assert_eq(q->r->m.len, 32u * BLOCKS);
    for (unsigned i = 0; i < BLOCKS; i++) {
        const uint8_t *e = q->r->m.payload + 32 * (size_t)i;
        cr_assert_eq(get_be64(e + 16), q->block[i].ram.length, "length of block %u", i);
        q->block[i].base = get_be64(e);
        q->block[i].offset = get_be64(e + 8);
        if (q->pinned)
            cr_assert_neq(get_be32(e + 24), 0u, "pin-all was granted, but block %u has rkey 0", i);
        for (unsigned c = 0; q->pinned && c < CHUNKS_MAX; c++)
            q->block[i].rkey[c] = get_be32(e + 24);
    }
    stock_say(q, T_REGISTER_FINISHED, 1, NULL, 0, 0);
    stock_stream(q, bytes, 8);
}

static void stock_register(struct stock_source *q, unsigned block, uint64_t offset) {
    uint8_t bytes[24];
    pack(bytes, "qwwq", (const uint64_t[]){q->block[block].offset + offset, block, PADDING, 0});
    stock_say(q, T_REGISTER_REQUEST, 1, bytes, sizeof bytes, T_REGISTER_RESULT);
    cr_assert_eq(q->r->m.len, 16u);
    uint32_t rkey = get_be32(q->r->m.payload);
    uint64_t base = get_be64(q->r->m.payload + 8);
    cr_assert_neq(rkey, 0u, "rkey 0 for block %u, offset 0x%llx", block, (unsigned long long)offset);
    if (q->block[block].base_known)
        cr_assert_eq(base, q->block[block].base, "the base of block %u changes, at offset 0x%llx", block,
                     (unsigned long long)offset);
    q->block[block].base_known = true;
    q->block[block].base = base;
    q->block[block].rkey[offset / q->chunk] = rkey;
    q->registrations++;
}

static void stock_write(struct stock_source *q, unsigned block, uint64_t offset, uint64_t n) {
    struct rmig_error err = {0};
    uint64_t chunk = offset / q->chunk, place = 1 + (chunk << 8 | block);
    if (q->writing == place || q->r->writes - q->r->writes_done >= 64) // one write at a time in a chunk
        cr_assert(raw_until(q->r, is_written, SIM_SECOND) && !q->r->gone, "a write failed: %s", q->r->text);
    struct rmig_write w = {q->block[block].ram.host + offset, &q->block[block].mr, n,   q->block[block].base + offset,
                           q->block[block].rkey[chunk],       ++q->r->writes,      true};
    cr_assert_eq(q->r->ops->write(q->r->ep, &w, 1, &err), 1, "%s", err.text);
    q->writing = place;
}

static void stock_run(struct stock_source *q, unsigned block, uint64_t offset, uint64_t n) {
    if (q->block[block].rkey[offset / q->chunk] == 0) {
        if (rmig_is_zero_portable(q->block[block].ram.host + offset, n)) {
            uint8_t bytes[24];
            pack(bytes, "wwqq", (const uint64_t[]){0, block, q->block[block].offset + offset, n});
            stock_say(q, T_COMPRESS, 1, bytes, sizeof bytes, 0);
            q->clears++;
            return;
        }
        stock_register(q, block, offset);
    }
    stock_write(q, block, offset, n);
}

/* A pass over the pages that `wanted` names: runs inside a chunk. */
static void stock_pass(struct stock_source *q, bool (*wanted)(unsigned block, uint64_t page)) {
    uint8_t hook[18] = {0x7e, 0, 0, 0, 2, 2, 0, 0, 0, 2};
    memcpy(hook + 10, hook_word, 8);
    stock_stream(q, hook, sizeof hook);
    for (unsigned i = 0; i < BLOCKS; i++) {
        uint64_t start = 0, n = 0, length = q->block[i].ram.length;
        for (uint64_t at = 0; at <= length; at += PAGE) {
            bool take = at < length && wanted(i, at / PAGE);
            if (n > 0 && (!take || n == STOCK_RUN_MAX || at / q->chunk != start / q->chunk)) {
                stock_run(q, i, start, n);
                n = 0;
            }
            start = n == 0 ? at : start;
            n += take ? PAGE : 0;
        }
    }
    cr_assert(raw_until(q->r, is_written, SIM_SECOND) && !q->r->gone, "a write failed: %s", q->r->text);
    stock_say(q, T_REGISTER_FINISHED, 1, NULL, 0, 0);
    uint8_t eos[8] = {0, 0, 0, 0, 0, 0, 0, 0x10};
    stock_stream(q, eos, sizeof eos);
}

static bool every_page(unsigned block, uint64_t page) { return block < BLOCKS && page < UINT64_MAX; }
static bool some_pages(unsigned block, uint64_t page) { return (page * 7 + block) % 11 < 3; }

static void fill_page(uint8_t *p, uint64_t seed) {
    for (unsigned i = 0; i < PAGE; i += 8) {
        uint64_t v = (seed + 1) * 0x9e3779b97f4a7c15u + i;
        memcpy(p + i, &v, 8);
    }
}

/* Data in some chunks, zeros in others, and both in the same. */
static void fill_ram(const struct ram *b) {
    for (uint64_t at = 0; at < b->length; at += PAGE)
        if (at / MIB % 3 != 1 && at / PAGE % 5 != 2)
            fill_page(b->host + at, at / PAGE);
}

static struct stock_source *stock_source_new(struct play *p, uint64_t chunk, uint32_t flags) {
    struct stock_source *q = calloc(1, sizeof *q);
    struct rmig_error err = {0};
    cr_assert_not_null(q);
    q->p = p;
    q->r = &p->raw;
    q->chunk = chunk;
    q->pinned = (flags & PIN_ALL) != 0;
    uint8_t data[8];
    pack(data, "ww", (const uint64_t[]){1, flags});
    q->r->by_hand = true;
    raw_connect(q->r, data, sizeof data, 1);
    cr_assert(q->r->established, "%s", q->r->text);
    cr_assert_geq(q->r->private_data_length, 8u);
    cr_assert_eq(get_be32(q->r->private_data), 1u);
    cr_assert_eq(get_be32(q->r->private_data + 4), flags & PIN_ALL, "flags 0x%x were answered 0x%x", flags,
                 get_be32(q->r->private_data + 4));
    for (unsigned i = 0; i < BLOCKS; i++) {
        map_ram(&q->block[i].ram, p->ram[i].name, p->ram[i].length);
        fill_ram(&q->block[i].ram);
        cr_assert_eq(q->r->ops->reg(q->r->ep, q->block[i].ram.host, q->block[i].ram.length, RMIG_ACCESS_LOCAL_READ,
                                    &q->block[i].mr, &err),
                     RMIG_OK, "%s", err.text);
    }
    return q;
}

static void stock_source_free(struct stock_source *q) {
    for (unsigned i = 0; i < BLOCKS; i++) {
        q->r->ops->dereg(q->r->ep, &q->block[i].mr, NULL);
        unmap_ram(&q->block[i].ram);
    }
    raw_drop(q->r);
    free(q);
}

/* The last of the stream. */
static void stock_say_state(struct stock_source *q) {
    static uint8_t state[76000];
    for (size_t i = 0; i < sizeof state; i++)
        state[i] = (uint8_t)(i * 31 + (i >> 8));
    q->p->stream_due = q->stream_size + sizeof state;
    stock_stream(q, state, sizeof state);
}

/* rmig's sink must have it all. */
static void stock_check_end(struct stock_source *q) {
    struct play *p = q->p;
    run_to_end(p, SIM_SECOND);
    cr_assert_eq(p->status, RMIG_OK, "%s: %s", rmig_status_name(p->status), p->text);
    cr_assert_eq(p->stream_size, q->stream_size);
    cr_assert_eq(memcmp(p->stream, q->stream, q->stream_size), 0, "the stream differs");
    cr_assert(p->connected == 1 && p->disconnected == !p->returns && p->finished == 1);
    cr_assert_eq(p->regions_at_end, 0u, "%llu regions are still writable", (unsigned long long)p->regions_at_end);
    for (unsigned i = 0; i < BLOCKS; i++)
        cr_assert_eq(memcmp(p->ram[i].host, q->block[i].ram.host, p->ram[i].length), 0, "block %u differs", i);
}

/* The last of the stream, then the source leaves. */
static void stock_finish(struct stock_source *q) {
    stock_say_state(q);
    q->r->ops->disconnect(q->r->ep);
    stock_check_end(q);
}

struct stock_case {
    uint64_t chunk, ram, peer_chunk_size;
    bool pin_all, offset_addressing;
    enum sim_mode mode;
};

static void stock_to_rmig(const struct stock_case *c) {
    struct play *p = play_new(c->mode);
    p->world.offset_addressing = c->offset_addressing;
    p->world.no_retry = simulated() && c->mode != SIM_UNORDERED; // rnr_retry_count 0
    if (c->peer_chunk_size != 0)
        set(p, RMIG_PARAM_PEER_CHUNK_SIZE, c->peer_chunk_size);
    play_sink(p, c->ram, ROM_LENGTH);
    struct stock_source *q = stock_source_new(p, c->chunk, c->pin_all ? PIN_ALL : 0);
    stock_setup(q);
    stock_pass(q, every_page);
    unsigned first = q->registrations;
    for (unsigned i = 0; i < BLOCKS; i++) { // the guest writes, and clears what it had
        fill_page(q->block[i].ram.host + 3 * PAGE, 12345);
        memset(q->block[i].ram.host + 7 * PAGE, 0, 4 * PAGE);
    }
    stock_pass(q, some_pages);
    fill_page(q->block[ROM].ram.host + MIB, 999); // a block's last page
    stock_pass(q, every_page);
    cr_assert_eq(p->rounds, 4u, "%u rounds", p->rounds);
    if (c->pin_all)
        cr_assert(q->registrations == 0 && q->clears == 0);
    else
        cr_assert(first >= 2 && (c->chunk > MIB || q->clears > 0));
    stock_finish(q);
    stock_source_free(q);
    play_free(p);
}

#define STOCK_TO_RMIG(name, ...)                                                                                       \
    Test(honest_source, name) {                                                                                        \
        const struct stock_case c = {__VA_ARGS__};                                                                     \
        stock_to_rmig(&c);                                                                                             \
    }

TestSuite(honest_source, .timeout = 600);
STOCK_TO_RMIG(dynamic, MIB, RAM_LENGTH, 0, false, false, SIM_ORDERED)
STOCK_TO_RMIG(dynamic_with_offset_addressing, MIB, RAM_LENGTH, 0, false, true, SIM_ORDERED)
STOCK_TO_RMIG(dynamic_over_iwarp, MIB, RAM_LENGTH, 0, false, false, SIM_LOCAL)
STOCK_TO_RMIG(dynamic_out_of_order, MIB, RAM_LENGTH, 0, false, false, SIM_UNORDERED)
STOCK_TO_RMIG(dynamic_peer_chunk_size_set, MIB, RAM_LENGTH, MIB, false, false, SIM_ORDERED)
STOCK_TO_RMIG(dynamic_peer_chunk_size_set_offset_addressing, MIB, RAM_LENGTH, MIB, false, true, SIM_ORDERED)
STOCK_TO_RMIG(chunks_of_64M_unknown, 64 * MIB, 130 * MIB, 0, false, false, SIM_ORDERED)
STOCK_TO_RMIG(chunks_of_64M_unknown_offset_addressing, 64 * MIB, 130 * MIB, 0, false, true, SIM_ORDERED)
STOCK_TO_RMIG(chunks_of_64M_peer_chunk_size_set, 64 * MIB, 130 * MIB, 64 * MIB, false, false, SIM_ORDERED)
STOCK_TO_RMIG(chunks_smaller_than_peer_chunk_size, MIB, 130 * MIB, 64 * MIB, false, false, SIM_ORDERED)
STOCK_TO_RMIG(pin_all, MIB, RAM_LENGTH, 0, true, false, SIM_ORDERED)
STOCK_TO_RMIG(pin_all_with_offset_addressing, MIB, RAM_LENGTH, 0, true, true, SIM_ORDERED)
STOCK_TO_RMIG(pin_all_over_iwarp, MIB, RAM_LENGTH, 0, true, false, SIM_LOCAL)
STOCK_TO_RMIG(pin_all_chunks_of_64M, 64 * MIB, 130 * MIB, 0, true, false, SIM_ORDERED)

static void stock_unregister(struct stock_source *q, unsigned block, uint64_t chunk) {
    uint8_t bytes[24];
    pack(bytes, "qwwq", (const uint64_t[]){chunk, block, PADDING, 0});
    stock_say(q, T_UNREGISTER_REQUEST, 1, bytes, sizeof bytes, T_UNREGISTER_FINISHED);
    cr_assert_eq(q->r->m.len, 0u);
    q->block[block].rkey[chunk] = 0;
}

static void migrate_with_unregister(uint64_t peer_chunk_size, bool all) {
    struct play *p = play_new(SIM_ORDERED);
    if (peer_chunk_size != 0)
        set(p, RMIG_PARAM_PEER_CHUNK_SIZE, peer_chunk_size);
    play_sink(p, RAM_LENGTH, ROM_LENGTH);
    struct stock_source *q = stock_source_new(p, MIB, 0);
    stock_setup(q);
    stock_pass(q, every_page);
    stock_unregister(q, RAM, 0);
    for (uint64_t c = 2; all && c < 4; c++)
        stock_unregister(q, RAM, c);
    fill_page(q->block[RAM].ram.host + 5 * PAGE, 4711);
    fill_page(q->block[RAM].ram.host + 2 * MIB, 4712);
    stock_pass(q, every_page);
    stock_finish(q);
    stock_source_free(q);
    play_free(p);
}

/* Chunk 0's key goes; the keys of chunks 2 and 3 stay good. */
Test(honest_source, unregister_the_first_chunk) { migrate_with_unregister(0, false); }
Test(honest_source, unregister_every_chunk) { migrate_with_unregister(0, true); }
Test(honest_source, unregister_with_peer_chunk_size) { migrate_with_unregister(MIB, true); }

/* One request for a whole block, one COMPRESS over chunks, a stream message of 200 KB: what a foreign source may do. */
Test(honest_source, whole_blocks_in_one_request) {
    struct play *p = play_new(SIM_ORDERED);
    play_sink(p, RAM_LENGTH, ROM_LENGTH);
    struct stock_source *q = stock_source_new(p, MIB, 0);
    static uint8_t big[200000];
    uint8_t bytes[24];
    stock_setup(q);
    memset(q->block[RAM].ram.host, 0, 3 * MIB);
    pack(bytes, "wwqq", (const uint64_t[]){0, RAM, 0, 3 * MIB});
    stock_say(q, T_COMPRESS, 1, bytes, sizeof bytes, 0);
    for (unsigned i = 0; i < BLOCKS; i++) {
        uint64_t length = q->block[i].ram.length;
        pack(bytes, "qwwq", (const uint64_t[]){0, i, PADDING, (length - 1) / MIB});
        stock_say(q, T_REGISTER_REQUEST, 1, bytes, sizeof bytes, T_REGISTER_RESULT);
        q->block[i].rkey[0] = get_be32(q->r->m.payload);
        q->block[i].base = get_be64(q->r->m.payload + 8);
        q->chunk = length;
        stock_write(q, i, 0, length);
    }
    cr_assert(raw_until(q->r, is_written, SIM_SECOND) && !q->r->gone, "a write failed: %s", q->r->text);
    stock_say(q, T_REGISTER_FINISHED, 1, NULL, 0, 0);
    memcpy(q->stream + q->stream_size, big, sizeof big);
    q->stream_size += sizeof big;
    stock_say(q, T_QEMU_FILE, 0, big, sizeof big, 0);
    stock_finish(q);
    stock_source_free(q);
    play_free(p);
}

/* Whoever asks for the blocks again gets the same answer, and nothing is registered twice. */
Test(honest_source, asks_for_the_blocks_twice) {
    struct play *p = play_new(SIM_ORDERED);
    play_sink(p, RAM_LENGTH, ROM_LENGTH);
    struct stock_source *q = stock_source_new(p, MIB, PIN_ALL);
    uint8_t first[64];
    stock_setup(q);
    stock_say(q, T_RAM_BLOCKS_REQUEST, 1, NULL, 0, T_RAM_BLOCKS_RESULT);
    memcpy(first, q->r->m.payload, sizeof first);
    uint64_t before = held.bytes;
    for (unsigned i = 0; i < 50; i++)
        stock_say(q, T_RAM_BLOCKS_REQUEST, 1, NULL, 0, T_RAM_BLOCKS_RESULT);
    cr_assert_eq(memcmp(first, q->r->m.payload, sizeof first), 0);
    cr_assert_eq(held.bytes, before);
    stock_pass(q, every_page);
    stock_finish(q);
    stock_source_free(q);
    play_free(p);
}

/* Bits that the sink does not know come back as 0. */
Test(honest_source, unknown_flags_are_cleared) {
    struct play *p = play_new(SIM_ORDERED);
    play_sink(p, RAM_LENGTH, ROM_LENGTH);
    struct stock_source *q = stock_source_new(p, MIB, 0x80000006);
    stock_setup(q);
    stock_pass(q, every_page);
    stock_finish(q);
    stock_source_free(q);
    play_free(p);
}

// --- an honest sink, as stock QEMU is

struct stock_sink {
    struct play *p;
    struct raw *r;
    uint64_t chunk;
    bool pinned, hook;
    struct {
        struct ram ram;
        uint64_t offset; // in the RAM address space of this sink
        struct rmig_mr whole, mr[CHUNKS_MAX];
        bool registered[CHUNKS_MAX], asked[1024]; // asked: per MiB
    } block[BLOCKS];
    uint8_t stream[STREAM_MAX];
    size_t stream_size;
    unsigned rounds, requests, clears, most_chunks;
    uint64_t registered;
};

static void stock_reg(struct stock_sink *k, unsigned block, uint64_t from, uint64_t to, struct rmig_mr *mr) {
    struct rmig_error err = {0};
    cr_assert_eq(k->r->ops->reg(k->r->ep, k->block[block].ram.host + from, to - from,
                                RMIG_ACCESS_LOCAL_WRITE | RMIG_ACCESS_REMOTE_WRITE, mr, &err),
                 RMIG_OK, "%s", err.text);
    k->registered += to - from;
}

static void stock_reply(struct stock_sink *k, uint32_t type, uint32_t repeat, const uint8_t *payload, size_t n) {
    cr_assert(say_bytes(k->r, type, repeat, (uint32_t)n, payload, n), "message %u cannot be sent", type);
    cr_assert(raw_until(k->r, is_sent, SIM_SECOND) && !k->r->gone, "message %u was not taken: %s", type, k->r->text);
}

static void stock_say_blocks(struct stock_sink *k) {
    uint8_t bytes[32 * BLOCKS];
    for (unsigned i = 0; i < BLOCKS; i++) {
        uint64_t length = k->block[i].ram.length;
        if (k->pinned)
            stock_reg(k, i, 0, length, &k->block[i].whole);
        pack(bytes + 32 * (size_t)i, "qqqww",
             (const uint64_t[]){(uintptr_t)k->block[i].ram.host, k->block[i].offset, length,
                                k->pinned ? k->block[i].whole.key : 0, 0});
    }
    stock_reply(k, T_RAM_BLOCKS_RESULT, 1, bytes, sizeof bytes);
}

/* Section 7.2: the first registration of a start chunk stays, whatever it covers. */
static void stock_on_register(struct stock_sink *k, const uint8_t *m) {
    uint64_t key = get_be64(m), chunks = get_be64(m + 16);
    uint32_t block = get_be32(m + 8);
    cr_assert_eq(k->r->m.len, 24u);
    cr_assert_eq(k->r->m.repeat, 1u, "only the first of several commands is answered");
    cr_assert(block < BLOCKS && !k->pinned);
    uint64_t offset = key - k->block[block].offset, length = k->block[block].ram.length;
    cr_assert(key >= k->block[block].offset && offset < length, "key 0x%llx", (unsigned long long)key);
    cr_assert(!k->block[block].asked[offset / MIB], "block %u, offset 0x%llx is asked for again", block,
              (unsigned long long)offset);
    cr_assert(offset / MIB + chunks <= (length - 1) / MIB,
              "%llu more chunks at 0x%llx: counted in units of 1 MiB they pass the end", (unsigned long long)chunks,
              (unsigned long long)offset);
    k->block[block].asked[offset / MIB] = true;
    k->most_chunks = chunks + 1 > k->most_chunks ? (unsigned)chunks + 1 : k->most_chunks;
    uint64_t c = offset / k->chunk, to = (c + chunks + 1) * k->chunk;
    if (!k->block[block].registered[c])
        stock_reg(k, block, c * k->chunk, to < length ? to : length, &k->block[block].mr[c]);
    k->block[block].registered[c] = true;
    k->requests++;
    uint8_t reply[16];
    pack(reply, "wwq", (const uint64_t[]){k->block[block].mr[c].key, PADDING, (uintptr_t)k->block[block].ram.host});
    stock_reply(k, T_REGISTER_RESULT, 1, reply, sizeof reply);
}

static void stock_on_compress(struct stock_sink *k, const uint8_t *m) {
    uint32_t block = get_be32(m + 4);
    uint64_t start = get_be64(m + 8), length = get_be64(m + 16);
    cr_assert(k->r->m.len == 24 && get_be32(m) == 0 && block < BLOCKS);
    uint64_t offset = start - k->block[block].offset, end = k->block[block].ram.length;
    cr_assert(offset < end && length > 0 && length <= end - offset, "start 0x%llx, length 0x%llx",
              (unsigned long long)start, (unsigned long long)length);
    memset(k->block[block].ram.host + offset, 0, length);
    k->clears++;
}

static void stock_on_finished(struct stock_sink *k) {
    cr_assert_eq(k->r->m.len, 0u);
    k->hook = false;
    if (++k->rounds == 1) // the hook of the setup: no pages yet
        return;
    for (unsigned i = 0; i < BLOCKS; i++)
        cr_assert_eq(memcmp(k->block[i].ram.host, k->p->ram[i].host, k->p->ram[i].length), 0,
                     "block %u is not all there when round %u is said to be over", i, k->rounds);
}

static void stock_on_stream(struct stock_sink *k) {
    uint32_t n = k->r->m.len;
    cr_assert(n >= 1 && n <= 32768, "QEMU_FILE of %u bytes", n);
    cr_assert_eq(k->r->m.repeat, 0u);
    cr_assert(k->stream_size + n <= STREAM_MAX);
    memcpy(k->stream + k->stream_size, k->r->m.payload, n);
    k->stream_size += n;
    k->hook = k->stream_size >= 8 && memcmp(k->stream + k->stream_size - 8, hook_word, 8) == 0;
}

static void stock_handle(struct stock_sink *k) {
    const struct message *m = &k->r->m;
    if (!k->hook) {
        cr_assert_eq(m->type, (uint32_t)T_QEMU_FILE, "was %u but must be QEMU_FILE", m->type);
        stock_on_stream(k);
        return;
    }
    switch (m->type) {
    case T_RAM_BLOCKS_REQUEST:
        cr_assert_eq(m->len, 0u);
        stock_say_blocks(k);
        break;
    case T_REGISTER_REQUEST:
        stock_on_register(k, m->payload);
        break;
    case T_COMPRESS:
        stock_on_compress(k, m->payload);
        break;
    case T_REGISTER_FINISHED:
        stock_on_finished(k);
        break;
    default:
        cr_assert_fail("message %u in hook mode", m->type);
    }
}

/* One READY for each message, one receive at a time, until the source leaves. */
static void stock_serve(struct stock_sink *k) {
    post_receive(k->r); // only once established
    for (;;) {
        if (!SAY_EMPTY(k->r, T_READY) || !next_message(k->r, 2 * SIM_SECOND))
            break;
        post_receive(k->r);
        stock_handle(k);
    }
    cr_assert(k->r->gone, "the source is silent");
}

static const enum step stock_script[] = {PUT_HEAD, BEGIN, END,        PUT_PART, BEGIN,    SAVE_ALL, END,
                                         PUT_PART, BEGIN, SAVE_DIRTY, END,      PUT_TAIL, FINISH,   OVER};

static void fill_stream(struct play *p) {
    for (size_t i = 0; i < sizeof p->stream; i++)
        p->stream[i] = (uint8_t)(i * 13 + (i >> 8) + 1);
    memcpy(p->stream + 200 - 8, hook_word, 8);
    memcpy(p->stream + 230 - 8, hook_word, 8);
    p->stream_size = 100000;
}

struct rmig_case {
    uint64_t chunk, ahead; // rmig's
    bool pin_all, grant;
    uint64_t sink_chunk, peer_chunk_size;
    enum sim_mode mode;
    bool sparse;
};

/* Lone pages and long runs with zeros between, so that requests begin anywhere. */
static void fill_sparse(const struct ram *b) {
    for (uint64_t at = 0; at < b->length; at += PAGE) {
        uint64_t chunk = at / MIB;
        if (chunk == 16 || (chunk >= 18 && chunk < 50) || chunk % 7 == 5 || chunk > 92)
            fill_page(b->host + at, at / PAGE);
    }
}

static void stock_sink_end(struct stock_sink *k, const struct rmig_case *c) {
    struct play *p = k->p;
    run_to_end(p, SIM_SECOND);
    cr_assert_eq(p->status, RMIG_OK, "%s: %s", rmig_status_name(p->status), p->text);
    cr_assert_eq(k->rounds, 3u);
    size_t due = p->stream_size + 30; // the part was put twice
    cr_assert_eq(k->stream_size, due, "a stream of %zu bytes came, %zu were due", k->stream_size, due);
    cr_assert_eq(memcmp(k->stream, p->stream, 230), 0);
    cr_assert_eq(memcmp(k->stream + 230, p->stream + 200, due - 230), 0);
    if (c->pin_all && c->grant)
        cr_assert(k->requests == 0);
    else if (c->ahead == 0)
        cr_assert_leq(k->most_chunks, c->chunk / MIB, "one chunk at a time: %u x 1 MiB", k->most_chunks);
    else if (!c->sparse)
        cr_assert_gt(k->most_chunks, c->chunk / MIB, "many chunks a request");
    cr_assert_eq(held.exposed, 0u, "the source's memory can be written");
}

static void rmig_to_stock(const struct rmig_case *c) {
    struct play *p = play_new(c->mode);
    struct stock_sink *k = calloc(1, sizeof *k);
    uint64_t length = c->sparse ? 100 * MIB : 40 * MIB + PAGE;
    uint8_t reply[8];
    cr_assert_not_null(k);
    p->world.no_retry = c->mode != SIM_UNORDERED;
    set(p, RMIG_PARAM_CHUNK_SIZE, c->chunk);
    set(p, RMIG_PARAM_REGISTER_AHEAD, c->ahead);
    set(p, RMIG_PARAM_PIN_ALL, c->pin_all);
    if (c->peer_chunk_size != 0)
        set(p, RMIG_PARAM_PEER_CHUNK_SIZE, c->peer_chunk_size);
    play_source(p, length, ROM_LENGTH, stock_script);
    fill_stream(p);
    k->p = p;
    k->r = &p->raw;
    k->r->by_hand = true;
    k->chunk = c->sink_chunk;
    k->pinned = c->pin_all && c->grant;
    for (unsigned i = 0; i < BLOCKS; i++) {
        const struct ram *b = &p->ram[i];
        if (c->sparse)
            fill_sparse(b);
        else
            fill_ram(b);
        for (uint64_t page = 0; page < b->length / PAGE; page++) // the guest has not written: sent again all the same
            if (some_pages(i, page))
                p->dirty[i][page / 64] |= (uint64_t)1 << page % 64;
        map_ram(&k->block[i].ram, b->name, b->length);
        memset(k->block[i].ram.host, FILL, b->length);
        k->block[i].offset = 0x7000000 + ((uint64_t)i << 33);
    }
    cr_assert(raw_until(k->r, is_asked, SIM_SECOND));
    cr_assert_geq(k->r->private_data_length, 8u);
    cr_assert_eq(get_be32(k->r->private_data), 1u);
    uint32_t flags = get_be32(k->r->private_data + 4);
    cr_assert_eq(flags & ~EXTENSION, c->pin_all ? PIN_ALL : 0u, "flags 0x%x", flags);
    pack(reply, "ww", (const uint64_t[]){1, k->pinned ? flags & PIN_ALL : 0}); // a bit that is not known is cleared
    raw_accept(k->r, reply, sizeof reply, 0);
    stock_serve(k);
    stock_sink_end(k, c);
    for (unsigned i = 0; i < BLOCKS; i++) {
        for (unsigned j = 0; j < CHUNKS_MAX; j++)
            if (k->block[i].registered[j])
                k->r->ops->dereg(k->r->ep, &k->block[i].mr[j], NULL);
        if (k->pinned)
            k->r->ops->dereg(k->r->ep, &k->block[i].whole, NULL);
        unmap_ram(&k->block[i].ram);
    }
    free(k);
    play_free(p);
}

#define RMIG_TO_STOCK(name, ...)                                                                                       \
    Test(honest_sink, name) {                                                                                          \
        const struct rmig_case c = {__VA_ARGS__};                                                                      \
        rmig_to_stock(&c);                                                                                             \
    }
#define AHEAD (128 * MIB)

TestSuite(honest_sink, .timeout = 600);
RMIG_TO_STOCK(dynamic, MIB, AHEAD, false, false, MIB, 0, SIM_ORDERED, false)
RMIG_TO_STOCK(dynamic_one_chunk_at_a_time, MIB, 0, false, false, MIB, 0, SIM_ORDERED, false)
RMIG_TO_STOCK(dynamic_over_iwarp, MIB, AHEAD, false, false, MIB, 0, SIM_LOCAL, false)
RMIG_TO_STOCK(dynamic_out_of_order, MIB, AHEAD, false, false, MIB, 0, SIM_UNORDERED, false)
RMIG_TO_STOCK(chunks_of_4M_at_rmig, 4 * MIB, AHEAD, false, false, MIB, 0, SIM_ORDERED, false)
RMIG_TO_STOCK(chunks_of_4M_one_at_a_time, 4 * MIB, 0, false, false, MIB, 0, SIM_ORDERED, false)
RMIG_TO_STOCK(chunks_of_32M_at_the_sink, MIB, AHEAD, false, false, 32 * MIB, 0, SIM_ORDERED, false)
RMIG_TO_STOCK(chunks_of_32M_at_the_sink_one_at_a_time, MIB, 0, false, false, 32 * MIB, 0, SIM_ORDERED, false)
RMIG_TO_STOCK(chunks_of_4M_and_32M, 4 * MIB, AHEAD, false, false, 32 * MIB, 0, SIM_ORDERED, false)
RMIG_TO_STOCK(peer_chunk_size_as_at_the_sink, 32 * MIB, AHEAD, false, false, 32 * MIB, 32 * MIB, SIM_ORDERED, true)
RMIG_TO_STOCK(pin_all_granted, MIB, AHEAD, true, true, MIB, 0, SIM_ORDERED, false)
RMIG_TO_STOCK(pin_all_granted_chunks_of_4M, 4 * MIB, AHEAD, true, true, MIB, 0, SIM_ORDERED, false)
RMIG_TO_STOCK(pin_all_granted_over_iwarp, MIB, AHEAD, true, true, MIB, 0, SIM_LOCAL, false)
RMIG_TO_STOCK(pin_all_refused, MIB, AHEAD, true, false, MIB, 0, SIM_ORDERED, false)
RMIG_TO_STOCK(pin_all_refused_one_chunk_at_a_time, MIB, 0, true, false, MIB, 0, SIM_ORDERED, false)
RMIG_TO_STOCK(sparse, MIB, AHEAD, false, false, MIB, 0, SIM_ORDERED, true)
RMIG_TO_STOCK(sparse_chunks_of_4M, 4 * MIB, AHEAD, false, false, MIB, 0, SIM_ORDERED, true)
RMIG_TO_STOCK(sparse_one_chunk_at_a_time, MIB, 0, false, false, 32 * MIB, 0, SIM_ORDERED, true)
/* The sink answers a start chunk of its own once and for all: a request that begins in the middle of one must not go
   on beyond it. */
RMIG_TO_STOCK(sparse_chunks_of_32M_at_the_sink, MIB, AHEAD, false, false, 32 * MIB, 0, SIM_ORDERED, true)
RMIG_TO_STOCK(sparse_chunks_of_32M_peer_chunk_size_set, MIB, AHEAD, false, false, 32 * MIB, 32 * MIB, SIM_ORDERED, true)

// --- hostile sources: how far the session has come

#define HELLO_FORMAT "hhqhhqhhqhhqhhqhhqhhqhhq"
#define HELLO_VALUES(chunk, payload, batch, registration, idle, status)                                                \
    1, 8, chunk, 2, 8, 4096, 3, 8, 64, 4, 8, payload, 5, 8, batch, 6, 8, registration, 7, 8, idle, 8, 8, status
#define SAY_HELLO(r, type, chunk)                                                                                      \
    SAY(r, type, 1, HELLO_FORMAT, HELLO_VALUES(chunk, 524272, 4096, (uint64_t)1 << 40, 30 * SIM_SECOND, 0))

static void connect_with(struct raw *r, uint32_t flags, unsigned receives) {
    uint8_t data[8];
    pack(data, "ww", (const uint64_t[]){1, flags});
    raw_connect(r, data, sizeof data, receives);
    cr_assert(r->established, "%s", r->text);
    cr_assert_eq(get_be32(r->private_data + 4), flags);
}

/* One entry of BLOCKS: "qqb" and the name. */
static size_t put_block(uint8_t *p, uint64_t length, uint64_t guest_offset, const char *name) {
    size_t n = strlen(name);
    size_t at = pack(p, "qqb", (const uint64_t[]){length, guest_offset, n});
    memcpy(p + at, name, n);
    return at + n;
}

static bool say_blocks(struct raw *r, uint32_t total, uint32_t first, const char *name, uint64_t length) {
    uint8_t bytes[300];
    size_t n = pack(bytes, "ww", (const uint64_t[]){total, first});
    n += put_block(bytes + n, length, (uint64_t)first << 36, name);
    return say_bytes(r, T_BLOCKS, 1, (uint32_t)n, bytes, n);
}

static bool say_both_blocks(struct raw *r) {
    uint8_t bytes[300];
    size_t n = pack(bytes, "ww", (const uint64_t[]){2, 0});
    n += put_block(bytes + n, RAM_LENGTH, 0, "ram");
    n += put_block(bytes + n, ROM_LENGTH, (uint64_t)1 << 36, "rom");
    return say_bytes(r, T_BLOCKS, 2, (uint32_t)n, bytes, n);
}

enum sink_stage {
    V1_READY, // version 1: a READY is in hand
    V1_STREAM, // the same behind bytes of the stream: the migration has begun
    V1_BLOCKS, // the blocks are agreed, a READY is in hand
    V1_CHUNKS, // the same with the source's chunk size known, 1 MiB
    V1_PINNED, // the same with pin-all
    X_CONNECTED, // extended: HELLO is due
    X_READY, // HELLO was answered, a READY is in hand
    X_BLOCKS, // the blocks are agreed, a READY is in hand
    X_FINISH // FINISH was answered
};

static void go_extended(struct raw *r, enum sink_stage stage) {
    if (stage == X_CONNECTED)
        return;
    cr_assert(SAY_HELLO(r, T_HELLO, MIB));
    expect(r, T_HELLO_RESULT);
    cr_assert(r->m.len == 96 && get_be64(r->m.payload + 88) == 0);
    expect(r, T_READY);
    if (stage == X_READY)
        return;
    cr_assert(say_both_blocks(r));
    expect(r, T_BLOCKS_RESULT);
    cr_assert(r->m.len == 4 && get_be32(r->m.payload) == 0);
    expect(r, T_READY);
    if (stage == X_BLOCKS)
        return;
    cr_assert(SAY_EMPTY(r, T_FINISH));
    expect(r, T_FINISH_RESULT);
    cr_assert_eq(r->m.len, 0u);
}

static struct play *sink_at(enum sink_stage stage) {
    struct play *p = play_new(SIM_ORDERED);
    struct raw *r = &p->raw;
    p->world.key_bits = stage < X_CONNECTED ? 32 : 64;
    if (stage == V1_CHUNKS)
        set(p, RMIG_PARAM_PEER_CHUNK_SIZE, MIB);
    play_sink(p, RAM_LENGTH, ROM_LENGTH);
    connect_with(r, stage >= X_CONNECTED ? EXTENSION : stage == V1_PINNED ? PIN_ALL : 0, RECEIVES);
    if (stage >= X_CONNECTED) {
        go_extended(r, stage);
        return p;
    }
    expect(r, T_READY);
    if (stage == V1_READY)
        return p;
    cr_assert(stage == V1_STREAM ? SAY(r, T_QEMU_FILE, 0, "q", 1) : SAY_EMPTY(r, T_RAM_BLOCKS_REQUEST));
    if (stage != V1_STREAM) {
        expect(r, T_RAM_BLOCKS_RESULT);
        cr_assert_eq(r->m.len, 64u);
    }
    expect(r, T_READY);
    return p;
}

static void check_untouched(const struct play *p) {
    for (unsigned i = 0; i < BLOCKS; i++) {
        const struct ram *b = &p->ram[i];
        uint64_t at = 0;
        if (b->host[0] == FILL && memcmp(b->host, b->host + 1, b->length - 1) == 0)
            continue;
        while (b->host[at] == FILL)
            at++;
        cr_assert_fail("block %u was written at 0x%llx", i, (unsigned long long)at);
    }
}

static void sink_must_fail(struct play *p, int status, const char *needles) {
    must_fail(p, status, needles);
    cr_expect_eq(p->finished, 0u);
    check_untouched(p);
    play_free(p);
}

/* An honest migration over the sink that other sources have been to. */
static void serve_stock(struct play *p) {
    struct stock_source *q = stock_source_new(p, MIB, 0);
    stock_setup(q);
    stock_pass(q, every_page);
    stock_finish(q);
    stock_source_free(q);
}

static void register_batch(struct raw *r, uint32_t block, uint64_t offset, uint64_t length, uint64_t *key,
                           uint64_t *address);

static void serve_extended(struct play *p) {
    struct raw *r = &p->raw;
    struct rmig_error err = {0};
    connect_with(r, EXTENSION, RECEIVES);
    go_extended(r, X_BLOCKS);
    uint8_t *data = r->memory + (size_t)(SLOTS - 2) * BUFFER;
    for (size_t i = 0; i < MIB; i++)
        data[i] = (uint8_t)(i * 13 + (i >> 9));
    for (uint32_t i = 0; i < BLOCKS; i++) {
        uint64_t key, address;
        register_batch(r, i, 0, MIB, &key, &address);
        struct rmig_write w = {data, &r->mr, MIB, address, key, ++r->writes, true};
        cr_assert_eq(r->ops->write(r->ep, &w, 1, &err), 1, "%s", err.text);
    }
    cr_assert(raw_until(r, is_written, SIM_SECOND) && !r->gone, "a write failed: %s", r->text);
    cr_assert(SAY_EMPTY(r, T_REGISTER_FINISHED));
    expect(r, T_READY);
    cr_assert(SAY_EMPTY(r, T_FINISH));
    expect(r, T_FINISH_RESULT);
    cr_assert(SAY_EMPTY(r, T_GOODBYE));
    run_to_end(p, SIM_SECOND);
    cr_assert(p->status == RMIG_OK && p->finished == 1 && p->connected == 1, "%s", p->text);
    for (unsigned i = 0; i < BLOCKS; i++)
        cr_assert_eq(memcmp(p->ram[i].host, data, MIB), 0, "block %u differs", i);
}

static bool is_listening(const struct raw *r) { return r->play->done || (held.regions == 0 && held.endpoints == 1); }
static bool has_forgotten(const struct raw *r) { return r->play->done || r->play->forgotten > 0; }

/* The sink says why it forgot the source and holds nothing for it any more. */
static void check_forgotten(struct play *p, int status, const char *needles) {
    bool extended = get_be32(p->raw.private_data + 4) == EXTENSION;
    struct rmig_block_entry entry;
    cr_assert(raw_until(&p->raw, has_forgotten, status == RMIG_ERR_TIMEOUT ? 5 * SIM_SECOND : SIM_SECOND),
              "the embedder is not told");
    cr_assert_not(p->done, "the sink has ended: %s", p->text);
    struct rmig_error why = p->why;
    check_failure(p, why.status, why.text, status, needles);
    if (status == RMIG_ERR_PROTOCOL && strstr(why.text, "refused") == NULL)
        check_told(p, why.text, extended);
    cr_assert(raw_until(&p->raw, is_listening, 150 * SIM_MS), "%llu regions and %lld endpoints are left",
              (unsigned long long)held.regions, (long long)held.endpoints);
    cr_assert_not(rmig_sink_extended(p->sink) || rmig_sink_has_return_path(p->sink));
    cr_assert_eq(rmig_sink_peer_block(p->sink, 0, &entry), RMIG_ERR_ARGUMENT, "a block of it is still known");
    cr_assert_eq(p->forgotten, 1u, "it was told %u times", p->forgotten);
    check_untouched(p);
    raw_drop(&p->raw);
    p->connected = p->forgotten = 0;
    p->think = false;
}

/* The source is forgotten, and an honest one is served by the same sink. */
static void sink_must_forget(struct play *p, int status, const char *needles) {
    check_forgotten(p, status, needles);
    if (p->world.key_bits == 32)
        serve_stock(p);
    else
        serve_extended(p);
    play_free(p);
}

/* A session that has come so far; the source does the rest; rmig's sink must say so. An extended source whose blocks
   are not agreed yet is forgotten. */
#define TO_SINK(name, stage, status, needles, ...)                                                                     \
    Test(hostile_source, name) {                                                                                       \
        struct play *p = sink_at(stage);                                                                               \
        struct raw *r = &p->raw;                                                                                       \
        __VA_ARGS__;                                                                                                   \
        if (stage == X_CONNECTED || stage == X_READY)                                                                  \
            sink_must_forget(p, RMIG_ERR_##status, needles);                                                           \
        else                                                                                                           \
            sink_must_fail(p, RMIG_ERR_##status, needles);                                                             \
    }

/* The same before its migration has begun: the sink forgets the source. */
#define TO_FORGET(name, stage, status, needles, ...)                                                                   \
    Test(hostile_source, name) {                                                                                       \
        struct play *p = sink_at(stage);                                                                               \
        struct raw *r = &p->raw;                                                                                       \
        __VA_ARGS__;                                                                                                   \
        sink_must_forget(p, RMIG_ERR_##status, needles);                                                               \
    }

TestSuite(hostile_source, .timeout = 600);

// --- hostile sources: private data

/* The request is rejected, and the next source, an honest one, is served by the same sink. */
static void rejected(const uint8_t *data, size_t n) {
    struct play *p = play_new(SIM_ORDERED);
    struct raw *r = &p->raw;
    if (n >= 4 && n < 8) // with zeroes behind it, it is good
        NO_PADDING;
    play_sink(p, RAM_LENGTH, ROM_LENGTH);
    for (unsigned i = 0; i < 3; i++) {
        raw_connect(r, data, n, RECEIVES);
        cr_assert(r->rejected, "private data of %zu bytes was not rejected", n);
        raw_drop(r);
    }
    cr_assert(!p->done && p->connected == 0);
    serve_stock(p);
    play_free(p);
}

static const uint8_t good_data[8] = {0, 0, 0, 1, 0, 0, 0, 0};
Test(hostile_source, private_data_of_0_bytes) { rejected(good_data, 0); }
Test(hostile_source, private_data_of_1_byte) { rejected(good_data, 1); }
Test(hostile_source, private_data_of_2_bytes) { rejected(good_data, 2); }
Test(hostile_source, private_data_of_3_bytes) { rejected(good_data, 3); }
Test(hostile_source, private_data_of_4_bytes) { rejected(good_data, 4); }
Test(hostile_source, private_data_of_5_bytes) { rejected(good_data, 5); }
Test(hostile_source, private_data_of_6_bytes) { rejected(good_data, 6); }
Test(hostile_source, private_data_of_7_bytes) { rejected(good_data, 7); }
Test(hostile_source, version_0) { rejected((const uint8_t[]){0, 0, 0, 0, 0, 0, 0, 0}, 8); }
Test(hostile_source, version_2) { rejected((const uint8_t[]){0, 0, 0, 2, 0, 0, 0, 0}, 8); }
Test(hostile_source, version_in_the_wrong_byte_order) { rejected((const uint8_t[]){1, 0, 0, 0, 0, 0, 0, 0}, 8); }
Test(hostile_source, version_beyond_16_bits) { rejected((const uint8_t[]){0, 1, 0, 1, 0, 0, 0, 0}, 8); }
Test(hostile_source, version_2_with_56_bytes) { rejected((const uint8_t[56]){0, 0, 0, 2}, 56); }

/* A source that vanishes before the connection is there, or just then, takes nothing with it. */
Test(hostile_source, vanishes_before_it_is_connected) {
    SIM_ONLY;
    struct play *p = play_new(SIM_ORDERED);
    struct raw *r = &p->raw;
    struct rmig_error err = {0};
    play_sink(p, RAM_LENGTH, ROM_LENGTH);
    for (uint64_t wait = 0; wait < 12 * SIM_US; wait += SIM_US) {
        raw_resolve(r, RECEIVES);
        cr_assert_eq(r->ops->connect(r->ep, good_data, sizeof good_data, &err), RMIG_OK, "%s", err.text);
        sim_spend(p->sim, 0, wait);
        raw_drop(r);
        pass_time(r, SIM_MS);
        cr_assert_not(p->done, "%s", p->text);
    }
    p->connected = 0;
    check_untouched(p);
    serve_stock(p);
    play_free(p);
}

/* While a source is served others are turned away. */
Test(hostile_source, a_second_connection) {
    struct play *p = play_new(SIM_ORDERED);
    struct raw second;
    play_sink(p, RAM_LENGTH, ROM_LENGTH);
    struct stock_source *q = stock_source_new(p, MIB, 0);
    stock_setup(q);
    raw_open(&second, p, p->fabric[0]);
    for (unsigned i = 0; i < 20; i++) {
        raw_connect(&second, good_data, sizeof good_data, RECEIVES);
        cr_assert(second.gone && !second.established);
        raw_drop(&second);
    }
    stock_pass(q, every_page);
    stock_finish(q);
    raw_close(&second);
    stock_source_free(q);
    play_free(p);
}

// --- hostile sources: the header

#define ZEROES(n) ((const uint8_t[n]){0})
TO_SINK(message_of_0_bytes, V1_BLOCKS, PROTOCOL, "0 bytes|16", send_bytes(r, ZEROES(1), 0))
TO_SINK(message_of_1_byte, V1_BLOCKS, PROTOCOL, "1 bytes|16", send_bytes(r, ZEROES(1), 1))
TO_SINK(message_of_15_bytes, V1_BLOCKS, PROTOCOL, "15 bytes|16", send_bytes(r, ZEROES(15), 15))
TO_SINK(len_less_than_sent, V1_BLOCKS, PROTOCOL, "40|23", say_bytes(r, T_COMPRESS, 1, 23, ZEROES(24), 24))
TO_SINK(len_more_than_sent, V1_BLOCKS, PROTOCOL, "39|24", say_bytes(r, T_COMPRESS, 1, 24, ZEROES(23), 23))
TO_SINK(len_beyond_the_buffer, V1_BLOCKS, PROTOCOL, "524273|524272",
        say_bytes(r, T_QEMU_FILE, 1, 524273, ZEROES(24), 24))
TO_SINK(len_of_32_bits, V1_BLOCKS, PROTOCOL, "4294967295", say_bytes(r, T_QEMU_FILE, 1, 0xffffffff, ZEROES(24), 24))
TO_SINK(len_that_wraps, V1_BLOCKS, PROTOCOL, "4294967288", say_bytes(r, T_QEMU_FILE, 1, 0xfffffff8, ZEROES(8), 8))
TO_FORGET(first_message_of_0_bytes, V1_READY, PROTOCOL, "0 bytes|16", send_bytes(r, ZEROES(1), 0))
TO_FORGET(first_message_of_15_bytes, X_CONNECTED, PROTOCOL, "15 bytes|16", send_bytes(r, ZEROES(15), 15))
TO_FORGET(first_message_cut, V1_READY, PROTOCOL, "39|24", say_bytes(r, T_QEMU_FILE, 1, 24, ZEROES(23), 23))
TO_FORGET(first_message_of_any_type, V1_READY, PROTOCOL, "type 4294967295", SAY_EMPTY(r, 0xffffffff))
TO_FORGET(first_message_too_long, V1_READY, FABRIC, "source", send_bytes(r, r->memory, BUFFER + 1))
TO_FORGET(first_message_too_long_extended, X_CONNECTED, FABRIC, "source", send_bytes(r, r->memory, BUFFER + 1))
TO_SINK(message_of_15_bytes_extended, X_BLOCKS, PROTOCOL, "15 bytes|16", send_bytes(r, ZEROES(15), 15))
TO_SINK(len_more_than_sent_extended, X_READY, PROTOCOL, "39|24", say_bytes(r, T_BLOCKS, 1, 24, ZEROES(23), 23))
TO_SINK(header_alone_with_len, V1_BLOCKS, PROTOCOL, "16|24", say_bytes(r, T_COMPRESS, 1, 24, NULL, 0))

// --- hostile sources: types

#define BAD_TYPE(name, stage, type, needles) TO_SINK(name, stage, PROTOCOL, needles, SAY_EMPTY(r, type))
BAD_TYPE(type_0, V1_BLOCKS, 0, "type 0")
BAD_TYPE(type_12, V1_BLOCKS, 12, "type 12")
BAD_TYPE(type_63, V1_BLOCKS, 63, "type 63")
BAD_TYPE(type_75, V1_BLOCKS, 75, "type 75")
BAD_TYPE(type_of_32_bits, V1_BLOCKS, 0xffffffff, "type 4294967295")
BAD_TYPE(type_75_extended, X_BLOCKS, 75, "type 75")
BAD_TYPE(ready, V1_BLOCKS, T_READY, "READY (type 2")
BAD_TYPE(ready_extended, X_BLOCKS, T_READY, "READY (type 2")
BAD_TYPE(ram_blocks_result, V1_BLOCKS, T_RAM_BLOCKS_RESULT, "RAM_BLOCKS_RESULT")
BAD_TYPE(register_result, V1_BLOCKS, T_REGISTER_RESULT, "REGISTER_RESULT")
BAD_TYPE(unregister_finished, V1_BLOCKS, T_UNREGISTER_FINISHED, "UNREGISTER_FINISHED")
BAD_TYPE(hello_result, X_BLOCKS, T_HELLO_RESULT, "HELLO_RESULT")
BAD_TYPE(blocks_result, X_BLOCKS, T_BLOCKS_RESULT, "BLOCKS_RESULT")
BAD_TYPE(register_batch_result, X_BLOCKS, T_REGISTER_BATCH_RESULT, "REGISTER_BATCH_RESULT")
BAD_TYPE(finish_result, X_BLOCKS, T_FINISH_RESULT, "FINISH_RESULT")
BAD_TYPE(ram_blocks_request_extended, X_BLOCKS, T_RAM_BLOCKS_REQUEST, "RAM_BLOCKS_REQUEST")

/* The extension's messages without the extension. */
TO_FORGET(hello_in_version_1, V1_READY, PROTOCOL, "HELLO (type 64", SAY_HELLO(r, T_HELLO, MIB))
TO_FORGET(blocks_in_version_1, V1_READY, PROTOCOL, "BLOCKS (type 66", say_both_blocks(r))
TO_SINK(register_batch_in_version_1, V1_BLOCKS, PROTOCOL, "REGISTER_BATCH",
        SAY(r, T_REGISTER_BATCH, 1, "wwqq", 0, 0, 0, MIB))
TO_SINK(clear_batch_in_version_1, V1_BLOCKS, PROTOCOL, "CLEAR_BATCH", SAY(r, T_CLEAR_BATCH, 1, "wwqq", 0, 0, 0, PAGE))
BAD_TYPE(keepalive_in_version_1, V1_BLOCKS, T_KEEPALIVE, "KEEPALIVE")
BAD_TYPE(finish_in_version_1, V1_BLOCKS, T_FINISH, "FINISH (type 72")
BAD_TYPE(goodbye_in_version_1, V1_BLOCKS, T_GOODBYE, "GOODBYE")

// --- hostile sources: payloads where none belongs, or none where one does

TO_FORGET(ram_blocks_request_with_payload, V1_READY, PROTOCOL, "RAM_BLOCKS_REQUEST|len 8",
          SAY(r, T_RAM_BLOCKS_REQUEST, 1, "q", 0))
TO_SINK(register_finished_with_payload, V1_BLOCKS, PROTOCOL, "REGISTER_FINISHED|len 4",
        SAY(r, T_REGISTER_FINISHED, 1, "w", 0))
TO_SINK(register_finished_with_payload_extended, X_BLOCKS, PROTOCOL, "REGISTER_FINISHED|len 4",
        SAY(r, T_REGISTER_FINISHED, 1, "w", 0))
TO_SINK(keepalive_with_payload, X_BLOCKS, PROTOCOL, "KEEPALIVE|len 1", SAY(r, T_KEEPALIVE, 1, "b", 0))
TO_SINK(finish_with_payload, X_BLOCKS, PROTOCOL, "FINISH|len 8", SAY(r, T_FINISH, 1, "q", 0))
TO_FORGET(qemu_file_of_0_bytes_at_first, V1_READY, PROTOCOL, "QEMU_FILE|len 0", SAY_EMPTY(r, T_QEMU_FILE))
BAD_TYPE(qemu_file_of_0_bytes, V1_BLOCKS, T_QEMU_FILE, "QEMU_FILE|len 0")
BAD_TYPE(qemu_file_of_0_bytes_extended, X_BLOCKS, T_QEMU_FILE, "QEMU_FILE|len 0")

// --- hostile sources: COMPRESS

#define COMPRESS(name, stage, needles, value, block, start, length)                                                    \
    TO_SINK(name, stage, PROTOCOL, "COMPRESS|" needles, SAY(r, T_COMPRESS, 1, "wwqq", value, block, start, length))
COMPRESS(compress_value, V1_BLOCKS, "value 1", 1, RAM, 0, PAGE)
COMPRESS(compress_value_of_32_bits, V1_BLOCKS, "4294967295", 0xffffffff, RAM, 0, PAGE)
COMPRESS(compress_block_2, V1_BLOCKS, "block 2", 0, 2, 0, PAGE)
COMPRESS(compress_block_of_32_bits, V1_BLOCKS, "block 4294967295", 0, 0xffffffff, 0, PAGE)
COMPRESS(compress_starts_at_the_end, V1_BLOCKS, "0x400000", 0, RAM, RAM_LENGTH, PAGE)
COMPRESS(compress_starts_behind_the_end, V1_BLOCKS, "0x401000", 0, RAM, RAM_LENGTH + PAGE, PAGE)
COMPRESS(compress_passes_the_end, V1_BLOCKS, "0x3ff000|0x1001", 0, RAM, RAM_LENGTH - PAGE, PAGE + 1)
COMPRESS(compress_longer_than_the_block, V1_BLOCKS, "0x400001", 0, RAM, 0, RAM_LENGTH + 1)
COMPRESS(compress_longer_than_this_block, V1_BLOCKS, "block 1", 0, ROM, 0, RAM_LENGTH)
COMPRESS(compress_wraps, V1_BLOCKS, "0x1000|0xfffffffffffff000", 0, RAM, PAGE, UINT64_MAX - PAGE + 1)
COMPRESS(compress_wraps_to_itself, V1_BLOCKS, "0xffffffffffffffff", 0, RAM, 1, UINT64_MAX)
COMPRESS(compress_starts_before_the_block, V1_BLOCKS, "0xfffffffffffff000", 0, RAM, UINT64_MAX - PAGE + 1, 2 * PAGE)
COMPRESS(compress_half_of_the_address_space, V1_BLOCKS, "0x8000000000000000", 0, RAM, 0, (uint64_t)1 << 63)
COMPRESS(compress_of_0_bytes, V1_BLOCKS, "length 0x0", 0, RAM, 0, 0)
COMPRESS(compress_of_0_bytes_at_the_end, V1_BLOCKS, "0x400000", 0, RAM, RAM_LENGTH, 0)
TO_FORGET(compress_before_the_blocks, V1_READY, PROTOCOL, "COMPRESS|block 0",
          SAY(r, T_COMPRESS, 1, "wwqq", 0, RAM, 0, PAGE))
COMPRESS(compress_before_the_blocks_in_the_stream, V1_STREAM, "block 0", 0, RAM, 0, PAGE)
COMPRESS(compress_pinned_passes_the_end, V1_PINNED, "0x400001", 0, RAM, 0, RAM_LENGTH + 1)
COMPRESS(compress_extended_passes_the_end, X_BLOCKS, "0x400001", 0, RAM, 0, RAM_LENGTH + 1)
COMPRESS(compress_extended_before_the_blocks, X_READY, "block 0", 0, RAM, 0, PAGE)
TO_SINK(compress_with_len_0, V1_BLOCKS, PROTOCOL, "COMPRESS|len 0", SAY_EMPTY(r, T_COMPRESS))
TO_SINK(compress_with_len_23, V1_BLOCKS, PROTOCOL, "COMPRESS|len 23", say_bytes(r, T_COMPRESS, 1, 23, ZEROES(23), 23))
TO_SINK(compress_with_len_25, V1_BLOCKS, PROTOCOL, "COMPRESS|len 25", say_bytes(r, T_COMPRESS, 1, 25, ZEROES(25), 25))
TO_SINK(compress_with_two_entries, V1_BLOCKS, PROTOCOL, "COMPRESS|len 48",
        say_bytes(r, T_COMPRESS, 2, 48, ZEROES(48), 48))

/* A block's last byte, its first, all of it: these are good, whatever repeat says, and nothing else is cleared. */
Test(hostile_source, compress_at_the_edges_is_exact) {
    struct play *p = sink_at(V1_BLOCKS);
    struct raw *r = &p->raw;
    const uint64_t cut[][2] = {{RAM_LENGTH - 1, 1}, {0, 1}, {PAGE + 1, 3 * PAGE}};
    uint8_t *mirror = malloc(RAM_LENGTH);
    cr_assert_not_null(mirror);
    memset(mirror, FILL, RAM_LENGTH);
    for (unsigned i = 0; i < 3; i++) {
        cr_assert(SAY(r, T_COMPRESS, 77, "wwqq", 0, RAM, cut[i][0], cut[i][1]));
        expect(r, T_READY);
        memset(mirror + cut[i][0], 0, cut[i][1]);
    }
    cr_assert_eq(memcmp(mirror, p->ram[RAM].host, RAM_LENGTH), 0);
    cr_assert(SAY(r, T_COMPRESS, 0, "wwqq", 0, ROM, 0, ROM_LENGTH));
    expect(r, T_READY);
    cr_assert(rmig_is_zero_portable(p->ram[ROM].host, ROM_LENGTH));
    cr_assert_eq(memcmp(mirror, p->ram[RAM].host, RAM_LENGTH), 0);
    free(mirror);
    play_free(p);
}

// --- hostile sources: REGISTER_REQUEST, UNREGISTER_REQUEST

#define REGISTER(name, stage, needles, key, block, chunks)                                                             \
    TO_SINK(name, stage, PROTOCOL, needles, SAY(r, T_REGISTER_REQUEST, 1, "qwwq", key, block, PADDING, chunks))
REGISTER(register_key_at_the_end, V1_BLOCKS, "block 0|0x400000", RAM_LENGTH, RAM, 0)
REGISTER(register_key_of_64_bits, V1_BLOCKS, "block 0|0xffffffffffffffff", UINT64_MAX, RAM, 0)
REGISTER(register_key_of_another_block, V1_BLOCKS, "block 1|0x200000", 2 * MIB, ROM, 0)
REGISTER(register_block_2, V1_BLOCKS, "block 2", 0, 2, 0)
REGISTER(register_block_of_32_bits, V1_BLOCKS, "block 4294967295", 0, 0xffffffff, 0)
REGISTER(register_chunks_of_64_bits, V1_BLOCKS, "18446744073709551615", 0, RAM, UINT64_MAX)
REGISTER(register_chunks_that_wrap, V1_BLOCKS, "17592186044415", 0, RAM, ((uint64_t)1 << 44) - 1)
REGISTER(register_chunks_too_many, V1_BLOCKS, "100", 0, RAM, 100)
TO_FORGET(register_before_the_blocks, V1_READY, PROTOCOL, "block 0",
          SAY(r, T_REGISTER_REQUEST, 1, "qwwq", 0, RAM, 0, 0))
REGISTER(register_before_the_blocks_in_the_stream, V1_STREAM, "block 0", 0, RAM, 0)
REGISTER(register_pinned_key_at_the_end, V1_PINNED, "block 0|0x400000", RAM_LENGTH, RAM, 0)
REGISTER(register_extended_key_at_the_end, X_BLOCKS, "block 0|0x400000", RAM_LENGTH, RAM, 0)
REGISTER(register_extended_before_the_blocks, X_READY, "block 0", 0, RAM, 0)

static bool say_many(struct raw *r, uint32_t type, uint32_t repeat, size_t len) {
    static uint8_t zeroes[BUFFER];
    return say_bytes(r, type, repeat, (uint32_t)len, zeroes, len);
}

#define LISTS(type)                                                                                                    \
    TO_SINK(type##_repeat_0, V1_BLOCKS, PROTOCOL, #type "|repeat 0", SAY(r, T_##type, 0, "qwwq", 0, RAM, 0, 0))        \
    TO_SINK(type##_repeat_2_in_one, V1_BLOCKS, PROTOCOL, #type "|repeat 2", SAY(r, T_##type, 2, "qwwq", 0, RAM, 0, 0)) \
    TO_SINK(type##_repeat_1_in_two, V1_BLOCKS, PROTOCOL, #type "|len 48", say_many(r, T_##type, 1, 48))                \
    TO_SINK(type##_repeat_4096_in_one, V1_BLOCKS, PROTOCOL, #type "|repeat 4096", say_many(r, T_##type, 4096, 24))     \
    TO_SINK(type##_repeat_4097, V1_BLOCKS, PROTOCOL, #type "|repeat 4097", say_many(r, T_##type, 4097, 24 * 4097))     \
    TO_SINK(type##_repeat_that_wraps, V1_BLOCKS, PROTOCOL, #type "|repeat 536870912",                                  \
            say_many(r, T_##type, 0x20000000, 0))                                                                      \
    TO_SINK(type##_repeat_of_32_bits, V1_BLOCKS, PROTOCOL, #type "|repeat 4294967295",                                 \
            say_many(r, T_##type, 0xffffffff, 24))                                                                     \
    TO_SINK(type##_len_0, V1_BLOCKS, PROTOCOL, #type "|len 0", say_many(r, T_##type, 1, 0))                            \
    TO_SINK(type##_len_16, V1_BLOCKS, PROTOCOL, #type "|len 16", say_many(r, T_##type, 1, 16))
TO_SINK(REGISTER_REQUEST_second_block_is_bad, V1_BLOCKS, PROTOCOL, "block 9",
        SAY(r, T_REGISTER_REQUEST, 2, "qwwqqwwq", 0, RAM, 0, 0, 0, 9, 0, 0))
TO_SINK(REGISTER_REQUEST_second_key_is_bad, V1_BLOCKS, PROTOCOL, "0x400000",
        SAY(r, T_REGISTER_REQUEST, 2, "qwwqqwwq", 0, RAM, 0, 0, RAM_LENGTH, RAM, 0, 0))
LISTS(REGISTER_REQUEST)

static void register_chunk(struct raw *r, uint64_t key, uint32_t block, uint64_t chunks) {
    cr_assert(SAY(r, T_REGISTER_REQUEST, 1, "qwwq", key, block, PADDING, chunks));
    expect(r, T_REGISTER_RESULT);
    expect(r, T_READY);
}

/* 64 GiB that were never touched: looking for what to clear there takes the system's time, so it is done in steps. */
Test(hostile_source, compress_over_what_was_never_touched) {
    SIM_ONLY;
    struct play *p = play_new(SIM_ORDERED);
    struct raw *r = &p->raw;
    struct rmig_sink_event ev;
    uint64_t length = 64 * RMIG_GIB;
    play_sink(p, PAGE, ROM_LENGTH);
    void *host = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    cr_assert_neq(host, MAP_FAILED);
    struct rmig_block_desc d = {.name = "big", .host = host, .length = length};
    d.backing = RMIG_BACKING_ANONYMOUS;
    d.guest_offset = (uint64_t)1 << 40;
    cr_assert_eq(rmig_sink_add_block(p->sink, &d, NULL), RMIG_OK);
    connect_with(r, 0, RECEIVES);
    expect(r, T_READY);
    cr_assert(SAY_EMPTY(r, T_RAM_BLOCKS_REQUEST));
    expect(r, T_RAM_BLOCKS_RESULT);
    expect(r, T_READY);
    ((uint8_t *)host)[length / 2 + 7] = 1;
    play_actor(p, NULL);
    cr_assert(SAY(r, T_COMPRESS, 1, "wwqq", 0, 0, 0, length));
    pass_time(r, SIM_MS);
    sim_spend(p->sim, 1, SIM_MS);
    unsigned calls = 0;
    do {
        cr_assert_eq(rmig_sink_process(p->sink, &ev), RMIG_OK);
        calls++;
    } while (rmig_sink_next_deadline(p->sink) == 0);
    cr_assert(calls >= 64 && calls < 200, "%u calls", calls);
    expect(r, T_READY);
    cr_assert_eq(((uint8_t *)host)[length / 2 + 7], 0);
    munmap(host, length);
    play_free(p);
}
/* All that REGISTER_REQUEST may name is answered, each of them. */
Test(hostile_source, register_4096_at_once) {
    struct play *p = sink_at(V1_BLOCKS);
    struct raw *r = &p->raw;
    cr_assert(say_many(r, T_REGISTER_REQUEST, 4096, 24 * 4096));
    expect(r, T_REGISTER_RESULT);
    cr_assert(r->m.repeat == 4096 && r->m.len == 16 * 4096);
    for (unsigned i = 0; i < 4096; i++)
        cr_assert(get_be32(r->m.payload + 16 * i) != 0 && memcmp(r->m.payload, r->m.payload + 16 * i, 16) == 0);
    cr_assert_eq(held.exposed, 1u);
    play_free(p);
}

#define UNREGISTER(name, stage, needles, chunk, block)                                                                 \
    TO_SINK(name, stage, PROTOCOL, needles, SAY(r, T_UNREGISTER_REQUEST, 1, "qwwq", chunk, block, PADDING, 0))
UNREGISTER(unregister_block_2, V1_BLOCKS, "block 2", 0, 2)
UNREGISTER(unregister_block_of_32_bits, V1_BLOCKS, "block 4294967295", 0, 0xffffffff)
UNREGISTER(unregister_chunk_behind_the_end, V1_BLOCKS, "chunk 5|block 0", 5, RAM)
UNREGISTER(unregister_chunk_of_64_bits, V1_BLOCKS, "chunk 18446744073709551615|block 0", UINT64_MAX, RAM)
UNREGISTER(unregister_chunk_that_wraps, V1_BLOCKS, "chunk 17592186044416|block 0", (uint64_t)1 << 44, RAM)
UNREGISTER(unregister_without_registration, V1_CHUNKS, "chunk 0|block 0", 0, RAM)
UNREGISTER(unregister_without_registration_extended, X_BLOCKS, "chunk 0|block 0", 0, RAM)
TO_SINK(unregister_in_the_middle_of_a_registration, V1_CHUNKS, PROTOCOL, "chunk 2|block 0", NO_OFFSETS;
        register_chunk(r, MIB, RAM, 1), SAY(r, T_UNREGISTER_REQUEST, 1, "qwwq", 2, RAM, PADDING, 0))
TO_FORGET(unregister_before_the_blocks, V1_READY, PROTOCOL, "block 0",
          SAY(r, T_UNREGISTER_REQUEST, 1, "qwwq", 0, RAM, 0, 0))
UNREGISTER(unregister_before_the_blocks_in_the_stream, V1_STREAM, "block 0", 0, RAM)
UNREGISTER(unregister_before_the_blocks_extended, X_READY, "block 0", 0, RAM)
LISTS(UNREGISTER_REQUEST)

static void register_batch(struct raw *r, uint32_t block, uint64_t offset, uint64_t length, uint64_t *key,
                           uint64_t *address) {
    cr_assert(SAY(r, T_REGISTER_BATCH, 1, "wwqq", block, PADDING, offset, length));
    expect(r, T_REGISTER_BATCH_RESULT);
    cr_assert(r->m.repeat == 1 && r->m.len == 16);
    *key = get_be64(r->m.payload);
    *address = get_be64(r->m.payload + 8);
    cr_assert_neq(*key, 0u);
    expect(r, T_READY);
}

static void unregister_twice(struct raw *r) {
    uint64_t key, address;
    register_batch(r, RAM, MIB, MIB, &key, &address);
    cr_assert(SAY(r, T_UNREGISTER_REQUEST, 1, "qwwq", 1, RAM, PADDING, 0));
    expect(r, T_UNREGISTER_FINISHED);
    expect(r, T_READY);
    cr_assert_eq(held.exposed, 0u);
    cr_assert(SAY(r, T_UNREGISTER_REQUEST, 1, "qwwq", 1, RAM, PADDING, 0));
}
TO_SINK(unregister_twice, X_BLOCKS, PROTOCOL, "chunk 1|block 0", unregister_twice(r))
TO_SINK(unregister_twice_in_one_message, V1_CHUNKS, PROTOCOL, "chunk 0|block 0", NO_OFFSETS;
        register_chunk(r, 0, RAM, 0), SAY(r, T_UNREGISTER_REQUEST, 2, "qwwqqwwq", 0, RAM, 0, 0, 0, RAM, 0, 0))

Test(hostile_source, register_and_unregister_a_thousand_times) {
    struct play *p = sink_at(X_BLOCKS);
    struct raw *r = &p->raw;
    uint64_t key, address;
    for (unsigned i = 0; i < 1000; i++) {
        register_batch(r, RAM, i % 4 * MIB, MIB, &key, &address);
        cr_assert(SAY(r, T_UNREGISTER_REQUEST, 1, "qwwq", i % 4, RAM, PADDING, 0));
        expect(r, T_UNREGISTER_FINISHED);
        expect(r, T_READY);
    }
    cr_assert_eq(held.exposed, 0u);
    cr_assert_leq(held.peak, 2u);
    play_free(p);
}

// --- hostile sources: writes

static void write_to(struct raw *r, uint64_t key, uint64_t address, uint64_t n) {
    struct rmig_error err = {0};
    struct rmig_write w = {r->memory, &r->mr, n, address, key, ++r->writes, true};
    cr_assert_eq(r->ops->write(r->ep, &w, 1, &err), 1, "%s", err.text);
    raw_until(r, is_written, SIM_SECOND);
    cr_assert(r->gone, "a write of %llu bytes to key 0x%llx was carried out", (unsigned long long)n,
              (unsigned long long)key);
}

enum bad_write { BEHIND, BEFORE, ACROSS, UNREGISTERED, AFTER_FINISH };

static void write_where_nothing_is_granted(enum bad_write how, int status) {
    struct play *p = sink_at(X_BLOCKS);
    struct raw *r = &p->raw;
    uint64_t key, address;
    register_batch(r, RAM, MIB, MIB, &key, &address);
    if (how == UNREGISTERED) {
        cr_assert(SAY(r, T_UNREGISTER_REQUEST, 1, "qwwq", 1, RAM, PADDING, 0));
        expect(r, T_UNREGISTER_FINISHED);
    } else if (how == AFTER_FINISH) {
        cr_assert(SAY_EMPTY(r, T_FINISH));
        expect(r, T_FINISH_RESULT);
        cr_assert_eq(held.exposed, 0u, "FINISH was answered with memory still registered");
    }
    write_to(r, key,
             how == BEHIND   ? address + MIB
             : how == BEFORE ? address - 1
                             : address,
             how == ACROSS ? MIB + 1 : 1);
    sink_must_fail(p, status, "source");
}
Test(hostile_source, write_behind_the_range) { write_where_nothing_is_granted(BEHIND, RMIG_ERR_PEER_GONE); }
Test(hostile_source, write_before_the_range) { write_where_nothing_is_granted(BEFORE, RMIG_ERR_PEER_GONE); }
Test(hostile_source, write_across_the_end) { write_where_nothing_is_granted(ACROSS, RMIG_ERR_PEER_GONE); }
Test(hostile_source, write_after_unregister) { write_where_nothing_is_granted(UNREGISTERED, RMIG_ERR_PEER_GONE); }
Test(hostile_source, write_after_finish) { write_where_nothing_is_granted(AFTER_FINISH, RMIG_ERR_HANDOVER); }

/* What rmig keeps for itself cannot be written, whoever guesses its key: the control buffers. */
Test(hostile_source, write_to_the_control_buffers) {
    struct play *p = sink_at(X_BLOCKS);
    cr_assert_eq(held.exposed, 0u);
    play_free(p);
}

// --- hostile sources: the order of messages

/* The sink is busy, so that it finds both at once: otherwise it cannot tell which READY the second one used. */
static void be_busy(const struct play *p) {
    SIM_ONLY;
    sim_spend(p->sim, p->own, SIM_MS);
}
#define BUSY be_busy(p)
#define TWO_FOR_ONE(name, stage, type, needles)                                                                        \
    TO_SINK(name, stage, PROTOCOL, needles, BUSY, SAY_EMPTY(r, type), SAY_EMPTY(r, type))
TWO_FOR_ONE(two_messages_for_one_ready, V1_BLOCKS, T_REGISTER_FINISHED, "two messages for one READY|REGISTER_FINISHED")
TWO_FOR_ONE(two_messages_for_one_ready_extended, X_BLOCKS, T_KEEPALIVE, "two messages for one READY|KEEPALIVE")
TWO_FOR_ONE(two_requests_for_one_ready, V1_READY, T_RAM_BLOCKS_REQUEST, "two messages for one READY|RAM_BLOCKS_REQUEST")
TO_SINK(two_stream_messages_for_one_ready, V1_BLOCKS, PROTOCOL, "two messages for one READY|QEMU_FILE", BUSY,
        SAY(r, T_QEMU_FILE, 0, "q", 1), SAY(r, T_QEMU_FILE, 0, "q", 2))
TO_SINK(twelve_messages_for_one_ready, V1_BLOCKS, PROTOCOL, "two messages for one READY", BUSY;
        for (unsigned i = 0; i < 12; i++) SAY(r, T_QEMU_FILE, 0, "q", 1))
TO_FORGET(message_before_the_first_ready_extended, X_CONNECTED, PROTOCOL, "HELLO was due|KEEPALIVE",
          SAY_EMPTY(r, T_KEEPALIVE))
TO_SINK(goodbye_before_finish, X_BLOCKS, PROTOCOL, "GOODBYE", SAY_EMPTY(r, T_GOODBYE))
TO_SINK(goodbye_before_the_blocks, X_READY, PROTOCOL, "GOODBYE", SAY_EMPTY(r, T_GOODBYE))
TO_FORGET(goodbye_at_once, X_CONNECTED, PROTOCOL, "GOODBYE", SAY_EMPTY(r, T_GOODBYE))
/* What is not agreed yet cannot be complete: a sink that believed it would start a guest without memory. */
TO_SINK(finish_before_the_blocks, X_READY, PROTOCOL, "FINISH", SAY_EMPTY(r, T_FINISH), pass_time(r, SIM_MS),
        SAY_EMPTY(r, T_GOODBYE))
TO_SINK(finish_in_the_middle_of_the_blocks, X_READY, PROTOCOL, "FINISH", say_blocks(r, 2, 0, "ram", RAM_LENGTH),
        expect(r, T_READY), SAY_EMPTY(r, T_FINISH), pass_time(r, SIM_MS), SAY_EMPTY(r, T_GOODBYE))
TO_SINK(register_finished_in_the_stream, V1_STREAM, PROTOCOL, "REGISTER_FINISHED", SAY_EMPTY(r, T_REGISTER_FINISHED))
TO_FORGET(register_finished_before_the_blocks, V1_READY, PROTOCOL, "REGISTER_FINISHED",
          SAY_EMPTY(r, T_REGISTER_FINISHED))
TO_SINK(register_finished_before_the_blocks_extended, X_READY, PROTOCOL, "REGISTER_FINISHED",
        SAY_EMPTY(r, T_REGISTER_FINISHED))

/* Behind FINISH only GOODBYE is due. Who owns the guest is then open. */
#define AFTER_FINISH_SENT(name, type, needles)                                                                         \
    TO_SINK(name, X_FINISH, HANDOVER, "GOODBYE was due|" needles, SAY_EMPTY(r, type))
AFTER_FINISH_SENT(finish_twice, T_FINISH, "FINISH")
AFTER_FINISH_SENT(keepalive_after_finish, T_KEEPALIVE, "KEEPALIVE")
AFTER_FINISH_SENT(register_finished_after_finish, T_REGISTER_FINISHED, "REGISTER_FINISHED")
AFTER_FINISH_SENT(ready_after_finish, T_READY, "READY")
TO_SINK(register_batch_after_finish, X_FINISH, HANDOVER, "GOODBYE was due|REGISTER_BATCH",
        SAY(r, T_REGISTER_BATCH, 1, "wwqq", RAM, 0, 0, MIB))
TO_SINK(clear_batch_after_finish, X_FINISH, HANDOVER, "GOODBYE was due|CLEAR_BATCH",
        SAY(r, T_CLEAR_BATCH, 1, "wwqq", 0, RAM, 0, PAGE))
TO_SINK(stream_after_finish, X_FINISH, HANDOVER, "GOODBYE was due|QEMU_FILE", SAY(r, T_QEMU_FILE, 0, "q", 1))
TO_SINK(goodbye_with_payload, X_FINISH, HANDOVER, "GOODBYE|len 1", SAY(r, T_GOODBYE, 1, "b", 1))

/* Once the guest is here nothing that the source still says changes that, when it is there at once neither. */
static void messages_after_goodbye(bool at_once) {
    struct play *p = sink_at(X_FINISH);
    struct raw *r = &p->raw;
    if (at_once)
        be_busy(p);
    SAY_EMPTY(r, T_GOODBYE);
    SAY(r, T_CLEAR_BATCH, 1, "wwqq", 0, RAM, 0, PAGE);
    SAY_EMPTY(r, T_ERROR);
    run_to_end(p, SIM_SECOND);
    pass_time(r, SIM_SECOND);
    cr_assert(p->status == RMIG_OK && p->finished == 1, "%s", p->text);
    check_untouched(p);
    play_free(p);
}
Test(hostile_source, messages_after_goodbye) { messages_after_goodbye(false); }
Test(hostile_source, messages_with_goodbye) { messages_after_goodbye(true); }

// --- hostile sources: HELLO

TO_SINK(hello_twice, X_READY, PROTOCOL, "HELLO (type 64", SAY_HELLO(r, T_HELLO, MIB))
TO_SINK(hello_twice_at_once, X_CONNECTED, PROTOCOL, "HELLO (type 64", SAY_HELLO(r, T_HELLO, MIB),
        SAY_HELLO(r, T_HELLO, MIB))
TO_FORGET(hello_cut_in_a_tag, X_CONNECTED, PROTOCOL, "HELLO|malformed", SAY(r, T_HELLO, 1, "hhqh", 1, 8, MIB, 2))
TO_FORGET(hello_cut_in_a_value, X_CONNECTED, PROTOCOL, "HELLO|malformed", SAY(r, T_HELLO, 1, "hhw", 1, 8, 0))
TO_FORGET(hello_with_a_long_entry, X_CONNECTED, PROTOCOL, "HELLO|malformed",
          SAY(r, T_HELLO, 1, "hhqhhb", 1, 8, MIB, 99, 65535, 1))
TO_FORGET(hello_with_a_short_number, X_CONNECTED, PROTOCOL, "HELLO|malformed", SAY(r, T_HELLO, 1, "hhw", 1, 4, MIB))
TO_FORGET(hello_with_a_tag_twice, X_CONNECTED, PROTOCOL, "HELLO|malformed",
          SAY(r, T_HELLO, 1, "hhqhhq", 1, 8, MIB, 1, 8, 2 * MIB))
TO_FORGET(hello_with_one_byte, X_CONNECTED, PROTOCOL, "HELLO|malformed", SAY(r, T_HELLO, 1, "b", 1))

/* Refused with a reason, which both ends show: status 1, and no ERROR behind it. */
static void hello_refused(struct play *p, const char *needles) {
    struct raw *r = &p->raw;
    char reason[201] = "";
    expect(r, T_HELLO_RESULT);
    cr_assert_geq(r->m.len, 100u);
    cr_assert_eq(get_be64(r->m.payload + 88), 1u, "status");
    cr_assert_eq(get_be32(r->m.payload + 96) >> 16, 9u, "tag of the reason");
    uint32_t n = get_be32(r->m.payload + 96) & 0xffff;
    cr_assert(n > 0 && n <= 200 && r->m.len == 100 + n);
    memcpy(reason, r->m.payload + 100, n);
    check_text(reason, needles);
    pass_time(r, 20 * SIM_MS);
    close_own(p);
    cr_assert(!next_message(r, SIM_SECOND), "message %u behind a refusal", r->m.type);
    cr_assert(r->gone, "the sink did not hang up");
}

/* It is forgotten, and the operator of the sink learns what did not suit. */
static void hello_forgotten(struct play *p, const char *needles) {
    hello_refused(p, needles);
    sink_must_forget(p, RMIG_ERR_PROTOCOL, needles);
}

#define HELLO_REFUSED(name, needles, ...)                                                                              \
    Test(hostile_source, name) {                                                                                       \
        struct play *p = sink_at(X_CONNECTED);                                                                         \
        cr_assert(SAY(&p->raw, T_HELLO, 1, HELLO_FORMAT, HELLO_VALUES(__VA_ARGS__)));                                  \
        hello_forgotten(p, needles);                                                                                   \
    }
HELLO_REFUSED(hello_chunk_size_0, "chunk-size|0|1M|1G", 0, 524272, 4096, 1 << 30, 0, 0)
HELLO_REFUSED(hello_chunk_size_small, "chunk-size|524288", MIB / 2, 524272, 4096, 1 << 30, 0, 0)
HELLO_REFUSED(hello_chunk_size_large, "chunk-size|2147483648", (uint64_t)1 << 31, 524272, 4096, 1 << 30, 0, 0)
HELLO_REFUSED(hello_chunk_size_no_power_of_two, "chunk-size|3145728", 3 * MIB, 524272, 4096, 1 << 30, 0, 0)
HELLO_REFUSED(hello_chunk_size_off_by_one, "chunk-size|1048577", MIB + 1, 524272, 4096, 1 << 30, 0, 0)
HELLO_REFUSED(hello_chunk_size_of_64_bits, "chunk-size|18446744073709551615", UINT64_MAX, 524272, 4096, 1 << 30, 0, 0)
HELLO_REFUSED(hello_payload_too_small, "payload|511|512", MIB, 511, 4096, 1 << 30, 0, 0)
HELLO_REFUSED(hello_batch_0, "batch|0", MIB, 524272, 0, 1 << 30, 0, 0)
HELLO_REFUSED(hello_registration_too_small, "registration_max 1048575|1048576", MIB, 524272, 4096, MIB - 1, 0, 0)
HELLO_REFUSED(hello_idle_1_ns, "idle_max 1:|0, or 1000000 or more", MIB, 524272, 4096, 1 << 30, 1, 0)
HELLO_REFUSED(hello_idle_below_1_ms, "idle_max 999999", MIB, 524272, 4096, 1 << 30, 999999, 0)

static void limit_refused(uint64_t page, uint64_t bits, const char *needles) {
    struct play *p = sink_at(X_CONNECTED);
    cr_assert(SAY(&p->raw, T_HELLO, 1, "hhqhhqhhqhhqhhqhhq", 1, 8, MIB, 2, 8, page, 3, 8, bits, 4, 8, 524272, 5, 8,
                  4096, 6, 8, 1 << 30));
    hello_forgotten(p, needles);
}
Test(hostile_source, hello_page_size_0) { limit_refused(0, 64, "page_size 0|power of two|4096 to 1073741824"); }
Test(hostile_source, hello_page_size_small) { limit_refused(2048, 64, "page_size 2048"); }
Test(hostile_source, hello_page_size_no_power_of_two) { limit_refused(12288, 64, "page_size 12288"); }
Test(hostile_source, hello_page_size_of_64_bits) { limit_refused(UINT64_MAX, 64, "page_size 18446744073709551615"); }
Test(hostile_source, hello_keys_of_31_bits) { limit_refused(PAGE, 31, "key_bits 31|32 to 64"); }
Test(hostile_source, hello_keys_of_65_bits) { limit_refused(PAGE, 65, "key_bits 65|32 to 64"); }

Test(hostile_source, hello_without_entries) {
    struct play *p = sink_at(X_CONNECTED);
    cr_assert(SAY_EMPTY(&p->raw, T_HELLO));
    hello_forgotten(p, "chunk-size|0");
}

Test(hostile_source, hello_without_chunk_size) {
    struct play *p = sink_at(X_CONNECTED);
    cr_assert(SAY(&p->raw, T_HELLO, 1, "hhqhhq", 4, 8, 524272, 5, 8, 4096));
    hello_forgotten(p, "chunk-size|0");
}

Test(hostile_source, hello_with_another_chunk_size_than_was_set) {
    struct play *p = play_new(SIM_ORDERED);
    set(p, RMIG_PARAM_CHUNK_SIZE, 4 * MIB);
    play_sink(p, RAM_LENGTH, ROM_LENGTH);
    connect_with(&p->raw, EXTENSION, RECEIVES);
    cr_assert(SAY_HELLO(&p->raw, T_HELLO, 2 * MIB));
    hello_refused(p, "chunk-size|2097152|4194304");
    check_forgotten(p, RMIG_ERR_SETUP, "chunk-size|2097152|4194304");
    serve_stock(p);
    play_free(p);
}

/* Unknown tags are skipped, however often they come and however long they are; limits beyond all bounds count as the
   bounds. */
Test(hostile_source, hello_with_unknown_tags_is_good) {
    struct play *p = sink_at(X_CONNECTED);
    struct raw *r = &p->raw;
    uint8_t bytes[2000];
    size_t n = pack(bytes, HELLO_FORMAT,
                    (const uint64_t[]){HELLO_VALUES(MIB, UINT64_MAX, UINT64_MAX, UINT64_MAX, UINT64_MAX, 0)});
    for (unsigned i = 0; i < 100; i++)
        n += pack(bytes + n, "hhqb", (const uint64_t[]){i % 2 == 0 ? 4711 : 0, 9, UINT64_MAX, i});
    cr_assert(say_bytes(r, T_HELLO, 1, (uint32_t)n, bytes, n));
    expect(r, T_HELLO_RESULT);
    cr_assert(r->m.len == 96 && get_be64(r->m.payload + 4) == MIB && get_be64(r->m.payload + 88) == 0);
    expect(r, T_READY);
    play_free(p);
}

// --- hostile sources: BLOCKS

TO_SINK(blocks_first_is_not_0, X_READY, PROTOCOL, "BLOCKS (type 66", say_blocks(r, 3, 1, "ram", RAM_LENGTH))
TO_SINK(blocks_out_of_order, X_READY, PROTOCOL, "BLOCKS (type 66", say_blocks(r, 3, 0, "ram", RAM_LENGTH),
        expect(r, T_READY), say_blocks(r, 3, 2, "rom", ROM_LENGTH))
TO_SINK(blocks_first_twice, X_READY, PROTOCOL, "BLOCKS (type 66", say_blocks(r, 3, 0, "ram", RAM_LENGTH),
        expect(r, T_READY), say_blocks(r, 3, 0, "ram", RAM_LENGTH))
TO_SINK(blocks_total_changes, X_READY, PROTOCOL, "BLOCKS (type 66", say_blocks(r, 3, 0, "ram", RAM_LENGTH),
        expect(r, T_READY), say_blocks(r, 2, 1, "rom", ROM_LENGTH))
TO_SINK(blocks_twice, X_BLOCKS, PROTOCOL, "BLOCKS (type 66", say_both_blocks(r))
TO_SINK(blocks_total_0, X_READY, PROTOCOL, "BLOCKS (type 66", say_blocks(r, 0, 0, "ram", RAM_LENGTH))
TO_SINK(blocks_total_too_large, X_READY, PROTOCOL, "BLOCKS (type 66|131072",
        say_blocks(r, 131073, 0, "ram", RAM_LENGTH))
TO_SINK(blocks_total_of_32_bits, X_READY, PROTOCOL, "BLOCKS (type 66|131072",
        say_blocks(r, 0xffffffff, 0, "ram", RAM_LENGTH))
TO_SINK(blocks_of_length_0, X_READY, PROTOCOL, "BLOCKS (type 66|length", say_blocks(r, 1, 0, "ram", 0))
TO_SINK(blocks_without_a_name, X_READY, PROTOCOL, "BLOCKS (type 66|name", say_blocks(r, 1, 0, "", RAM_LENGTH))
TO_SINK(blocks_name_with_nul, X_READY, PROTOCOL, "BLOCKS (type 66",
        SAY(r, T_BLOCKS, 1, "wwqqbbbb", 1, 0, RAM_LENGTH, 0, 3, 'r', 0, 'm'))
TO_SINK(blocks_name_cut, X_READY, PROTOCOL, "BLOCKS (type 66",
        SAY(r, T_BLOCKS, 1, "wwqqbbb", 1, 0, RAM_LENGTH, 0, 3, 'r', 'a'))
TO_SINK(blocks_entry_cut, X_READY, PROTOCOL, "BLOCKS (type 66", SAY(r, T_BLOCKS, 1, "wwqq", 1, 0, RAM_LENGTH, 0))
TO_SINK(blocks_len_7, X_READY, PROTOCOL, "BLOCKS (type 66|len 7", say_bytes(r, T_BLOCKS, 1, 7, ZEROES(7), 7))
TO_SINK(blocks_len_0, X_READY, PROTOCOL, "BLOCKS (type 66|len 0", SAY_EMPTY(r, T_BLOCKS))
TO_SINK(blocks_repeat_0, X_READY, PROTOCOL, "BLOCKS (type 66|repeat 0", SAY(r, T_BLOCKS, 0, "ww", 1, 0))
TO_SINK(blocks_repeat_too_small, X_READY, PROTOCOL, "BLOCKS (type 66|bytes follow",
        SAY(r, T_BLOCKS, 1, "wwqqbbbbqqbbbb", 2, 0, RAM_LENGTH, 0, 3, 'r', 'a', 'm', ROM_LENGTH, 0, 3, 'r', 'o', 'm'))
TO_SINK(blocks_repeat_too_large, X_READY, PROTOCOL, "BLOCKS (type 66|repeat 2",
        SAY(r, T_BLOCKS, 2, "wwqqbbbb", 2, 0, RAM_LENGTH, 0, 3, 'r', 'a', 'm'))
TO_SINK(blocks_repeat_of_32_bits, X_READY, PROTOCOL, "BLOCKS (type 66|repeat 4294967295",
        SAY(r, T_BLOCKS, 0xffffffff, "wwqqbbbb", 2, 0, RAM_LENGTH, 0, 3, 'r', 'a', 'm'))
TO_SINK(blocks_more_than_total, X_READY, PROTOCOL, "BLOCKS (type 66|repeat 2",
        SAY(r, T_BLOCKS, 2, "wwqqbbbbqqbbbb", 1, 0, RAM_LENGTH, 0, 3, 'r', 'a', 'm', ROM_LENGTH, 0, 3, 'r', 'o', 'm'))
TO_SINK(blocks_trailing_bytes, X_READY, PROTOCOL, "BLOCKS (type 66|bytes follow",
        SAY(r, T_BLOCKS, 1, "wwqqbbbbb", 1, 0, RAM_LENGTH, 0, 3, 'r', 'a', 'm', 0))
TO_SINK(blocks_unknown_name, X_READY, SETUP, "\"nvram\"|not known", say_blocks(r, 1, 0, "nvram", PAGE))
TO_SINK(blocks_name_with_control_characters, X_READY, SETUP, "not known",
        say_blocks(r, 1, 0, "\x1b[31mram\n\x7f\xff", PAGE))
TO_SINK(blocks_other_length, X_READY, SETUP, "\"ram\"|4194305|4194304", say_blocks(r, 1, 0, "ram", RAM_LENGTH + 1))
TO_SINK(blocks_length_of_64_bits, X_READY, SETUP, "\"ram\"|18446744073709551615",
        say_blocks(r, 1, 0, "ram", UINT64_MAX))

/* Names are unique: two of the source's blocks cannot both be this one. */
Test(hostile_source, blocks_with_a_name_twice) {
    struct play *p = sink_at(X_READY);
    uint8_t bytes[300];
    size_t n = pack(bytes, "ww", (const uint64_t[]){2, 0});
    n += put_block(bytes + n, RAM_LENGTH, 0, "ram");
    n += put_block(bytes + n, RAM_LENGTH, (uint64_t)1 << 36, "ram");
    cr_assert(say_bytes(&p->raw, T_BLOCKS, 2, (uint32_t)n, bytes, n));
    sink_must_forget(p, RMIG_ERR_PROTOCOL, "\"ram\" twice");
}

/* While the embedder looks for its blocks. The sink may find fault with a message at once, or after the answer. */
static void embedder_answers(struct play *p) {
    pass_time(&p->raw, 10 * SIM_MS);
    if (p->done)
        return;
    give_blocks(p);
    play_actor(p, sink_step);
}
#define THINKING(name, status, needles, ...)                                                                           \
    TO_SINK(name##_while_the_embedder_thinks, X_READY, status, needles, p->think = true, say_both_blocks(r),           \
            pass_time(r, SIM_MS), __VA_ARGS__)
THINKING(leaves, PEER_GONE, "source went away", raw_leave(r))
THINKING(vanishes, PEER_GONE, "source went away", raw_drop(r))
THINKING(keepalive, PROTOCOL, "KEEPALIVE", SAY_EMPTY(r, T_KEEPALIVE), embedder_answers(p))
THINKING(error, REFUSED, "source gave up|no disk", say_bytes(r, T_ERROR, 1, 7, (const uint8_t *)"no disk", 7))
THINKING(error_and_leaves, REFUSED, "source gave up|no disk",
         say_bytes(r, T_ERROR, 1, 7, (const uint8_t *)"no disk", 7), raw_leave(r))

// --- hostile sources: REGISTER_BATCH, CLEAR_BATCH

#define BATCH(name, stage, needles, block, offset, length)                                                             \
    TO_SINK(name, stage, PROTOCOL, needles, SAY(r, T_REGISTER_BATCH, 1, "wwqq", block, PADDING, offset, length))
BATCH(batch_block_2, X_BLOCKS, "block 2", 2, 0, MIB)
BATCH(batch_block_of_32_bits, X_BLOCKS, "block 4294967295", 0xffffffff, 0, MIB)
BATCH(batch_offset_not_aligned, X_BLOCKS, "block 0|0x1000", RAM, PAGE, MIB)
BATCH(batch_length_not_aligned, X_BLOCKS, "block 0|0x101000", RAM, 0, MIB + PAGE)
BATCH(batch_length_0, X_BLOCKS, "block 0|length 0x0", RAM, 0, 0)
BATCH(batch_at_the_end, X_BLOCKS, "block 0|0x400000", RAM, RAM_LENGTH, MIB)
BATCH(batch_passes_the_end, X_BLOCKS, "block 0|0x300000|0x200000", RAM, 3 * MIB, 2 * MIB)
BATCH(batch_longer_than_this_block, X_BLOCKS, "block 1|0x400000", ROM, 0, RAM_LENGTH)
BATCH(batch_rounded_up, X_BLOCKS, "block 1|0x200000", ROM, 0, 2 * MIB)
BATCH(batch_wraps, X_BLOCKS, "block 0|0xfffffffffff00000", RAM, MIB, UINT64_MAX - MIB + 1)
BATCH(batch_offset_of_64_bits, X_BLOCKS, "block 0|0xfffffffffff00000", RAM, UINT64_MAX - MIB + 1, 2 * MIB)
BATCH(batch_before_the_blocks, X_READY, "block 0", RAM, 0, MIB)
TO_SINK(batch_second_is_bad, X_BLOCKS, PROTOCOL, "block 0|0x1",
        SAY(r, T_REGISTER_BATCH, 2, "wwqqwwqq", RAM, 0, 0, MIB, RAM, 0, 1, MIB))
TO_SINK(batch_repeat_0, X_BLOCKS, PROTOCOL, "REGISTER_BATCH|repeat 0",
        SAY(r, T_REGISTER_BATCH, 0, "wwqq", RAM, 0, 0, MIB))
TO_SINK(batch_repeat_2_in_one, X_BLOCKS, PROTOCOL, "REGISTER_BATCH|repeat 2",
        SAY(r, T_REGISTER_BATCH, 2, "wwqq", RAM, 0, 0, MIB))
TO_SINK(batch_repeat_4097, X_BLOCKS, PROTOCOL, "REGISTER_BATCH|repeat 4097",
        say_many(r, T_REGISTER_BATCH, 4097, 24 * 4097))
TO_SINK(batch_repeat_that_wraps, X_BLOCKS, PROTOCOL, "REGISTER_BATCH|repeat 536870912",
        say_many(r, T_REGISTER_BATCH, 0x20000000, 0))
TO_SINK(batch_len_0, X_BLOCKS, PROTOCOL, "REGISTER_BATCH|len 0", SAY_EMPTY(r, T_REGISTER_BATCH))

Test(hostile_source, batch_longer_than_a_registration_may_be) {
    struct play *p = play_new(SIM_ORDERED);
    p->world.registration_max = 16 * MIB;
    play_sink(p, 40 * MIB, ROM_LENGTH);
    connect_with(&p->raw, EXTENSION, RECEIVES);
    cr_assert(SAY_HELLO(&p->raw, T_HELLO, MIB));
    expect(&p->raw, T_HELLO_RESULT);
    cr_assert_eq(get_be64(p->raw.m.payload + 64), 16 * MIB, "registration_max");
    expect(&p->raw, T_READY);
    cr_assert(say_blocks(&p->raw, 1, 0, "ram", 40 * MIB));
    expect(&p->raw, T_BLOCKS_RESULT);
    expect(&p->raw, T_READY);
    cr_assert(SAY(&p->raw, T_REGISTER_BATCH, 1, "wwqq", RAM, 0, 0, 17 * MIB));
    must_fail(p, RMIG_ERR_PROTOCOL, "block 0|0x1100000|16777216");
    play_free(p);
}

/* A version 1 source does not know that limit: the sink must, and say so, before it asks its fabric for what that
   cannot do. */
Test(hostile_source, register_more_than_the_fabric_can) {
    struct play *p = play_new(SIM_ORDERED);
    p->world.registration_max = 16 * MIB;
    play_sink(p, 40 * MIB, ROM_LENGTH);
    connect_with(&p->raw, 0, RECEIVES);
    expect(&p->raw, T_READY);
    cr_assert(SAY_EMPTY(&p->raw, T_RAM_BLOCKS_REQUEST));
    expect(&p->raw, T_RAM_BLOCKS_RESULT);
    expect(&p->raw, T_READY);
    cr_assert(SAY(&p->raw, T_REGISTER_REQUEST, 1, "qwwq", 0, RAM, 0, 39));
    pass_time(&p->raw, SIM_SECOND);
    if (p->done)
        check_text(p->text, "block|16777216");
    play_free(p);
}

/* A version 1 sink registers 1 GiB at once. Where that cannot be pinned it says what takes less. */
static void cannot_be_pinned(uint64_t peer_chunk_size, bool advised) {
    struct play *p = play_new(SIM_ORDERED);
    p->world.registered_max = 11 * MIB; // the raw peer takes 10, the control buffers 4
    if (peer_chunk_size != 0)
        set(p, RMIG_PARAM_PEER_CHUNK_SIZE, peer_chunk_size);
    play_sink(p, 8 * MIB, ROM_LENGTH);
    connect_with(&p->raw, 0, RECEIVES);
    expect(&p->raw, T_READY);
    cr_assert(SAY_EMPTY(&p->raw, T_RAM_BLOCKS_REQUEST));
    expect(&p->raw, T_RAM_BLOCKS_RESULT);
    expect(&p->raw, T_READY);
    cr_assert(SAY(&p->raw, T_REGISTER_REQUEST, 1, "qwwq", 0, RAM, 0, 7));
    must_fail(p, RMIG_ERR_REGISTRATION, "\"ram\"|8388608|at most 11534336");
    cr_assert_eq(strstr(p->text, "set peer-chunk-size to the source's (stock QEMU: 1M)") != NULL, advised, "%s",
                 p->text);
    play_free(p);
}
Test(hostile_source, register_what_cannot_be_pinned) { cannot_be_pinned(0, true); }
Test(hostile_source, register_what_cannot_be_pinned_in_chunks) { cannot_be_pinned(MIB, false); }

/* The same chunks over and over, alone and in ranges that overlap: the sink pins no more for that. */
Test(hostile_source, batch_over_and_over) {
    struct play *p = sink_at(X_BLOCKS);
    struct raw *r = &p->raw;
    uint64_t key, address, random = 1;
    for (unsigned i = 0; i < 500; i++)
        register_batch(r, RAM, 0, MIB, &key, &address);
    cr_assert_eq(held.exposed, 1u, "%llu registrations of one chunk", (unsigned long long)held.exposed);
    for (unsigned i = 0; i < 500 && !p->done; i++) {
        random = random * 6364136223846793005u + 1442695040888963407u;
        uint64_t from = random >> 33 & 3, n = 1 + (random >> 40) % (4 - from);
        if (!SAY(r, T_REGISTER_BATCH, 1, "wwqq", RAM, 0, from * MIB, n * MIB) || !next_message(r, SIM_SECOND) ||
            r->m.type == T_ERROR)
            break;
        cr_assert_eq(r->m.type, (uint32_t)T_REGISTER_BATCH_RESULT);
        expect(r, T_READY);
    }
    cr_assert_leq(held.peak, 1u + 2 * (4 + 2) + BLOCKS, "%llu regions", (unsigned long long)held.peak);
    check_untouched(p);
    play_free(p);
}

/* Ranges inside one that was registered before: each key must cover its range. */
Test(hostile_source, batch_inside_another_is_good) {
    struct play *p = sink_at(X_BLOCKS);
    struct raw *r = &p->raw;
    const uint64_t range[][2] = {{1, 3}, {0, 1}, {1, 2}, {2, 2}, {1, 1}, {3, 1}, {1, 3}, {0, 1}};
    struct rmig_error err = {0};
    for (unsigned i = 0; i < sizeof range / sizeof range[0]; i++) {
        uint64_t key, address, n = range[i][1] * MIB;
        register_batch(r, RAM, range[i][0] * MIB, n, &key, &address);
        memset(r->memory + (size_t)RECEIVES * BUFFER, (int)i + 1, n);
        struct rmig_write w = {r->memory + (size_t)RECEIVES * BUFFER, &r->mr, n, address, key, ++r->writes, true};
        cr_assert_eq(r->ops->write(r->ep, &w, 1, &err), 1, "%s", err.text);
        cr_assert(raw_until(r, is_written, SIM_SECOND) && !r->gone, "range %u: %s", i, r->text);
        const uint8_t *host = p->ram[RAM].host + range[i][0] * MIB;
        cr_assert(host[0] == i + 1 && host[n - 1] == i + 1, "range %u was written elsewhere", i);
    }
    play_free(p);
}

/* What overlaps a registration and does not lie inside it is refused: ranges that grow would pin any number of bytes.
 */
static void overlap(struct raw *r, uint64_t from, uint64_t n) {
    uint64_t key, address;
    register_batch(r, RAM, MIB, MIB, &key, &address);
    register_batch(r, RAM, 2 * MIB, MIB, &key, &address);
    SAY(r, T_REGISTER_BATCH, 1, "wwqq", RAM, 0, from * MIB, n * MIB);
}
TO_SINK(batch_overlaps_from_before, X_BLOCKS, PROTOCOL, "[0x0, 0x200000)|\"ram\"|[0x100000, 0x200000)",
        overlap(r, 0, 2))
TO_SINK(batch_overlaps_behind, X_BLOCKS, PROTOCOL, "[0x200000, 0x400000)|[0x200000, 0x300000)", overlap(r, 2, 2))
TO_SINK(batch_overlaps_all, X_BLOCKS, PROTOCOL, "[0x0, 0x400000)|[0x100000, 0x200000)", overlap(r, 0, 4))
TO_SINK(batch_overlaps_two, X_BLOCKS, PROTOCOL, "[0x100000, 0x300000)|[0x100000, 0x200000)", overlap(r, 1, 2))
TO_SINK(batch_overlaps_in_its_own_message, X_BLOCKS, PROTOCOL, "[0x0, 0x200000)|[0x0, 0x100000)",
        SAY(r, T_REGISTER_BATCH, 2, "wwqqwwqq", RAM, 0, 0, MIB, RAM, 0, 0, 2 * MIB))
TO_SINK(register_extended_overlaps, X_BLOCKS, PROTOCOL, "[0x0, 0x200000)|[0x0, 0x100000)",
        SAY(r, T_REGISTER_REQUEST, 2, "qwwqqwwq", 0, RAM, 0, 0, 0, RAM, 0, 1))

static uint64_t pinned(const struct play *p) {
    struct rmig_stats st;
    rmig_sink_stats(p->sink, &st);
    return st.bytes_registered;
}

/* Ranges of a version 1 source may overlap. Each is granted, and no more is pinned than twice the RAM. */
static void v1_ranges(uint64_t block, unsigned shift, bool down) {
    struct play *p = play_new(SIM_ORDERED);
    struct raw *r = &p->raw;
    set(p, RMIG_PARAM_PEER_CHUNK_SIZE, MIB);
    play_sink(p, block, ROM_LENGTH);
    connect_with(r, 0, RECEIVES);
    expect(r, T_READY);
    cr_assert(SAY_EMPTY(r, T_RAM_BLOCKS_REQUEST));
    expect(r, T_RAM_BLOCKS_RESULT);
    expect(r, T_READY);
    uint64_t chunks = block / MIB;
    struct rmig_error err = {0};
    for (uint64_t i = 0; i < chunks; i++) {
        uint64_t from = down ? chunks - 1 - i : shift == 0 ? 0 : i, n = shift == 0 || down ? i : shift - 1;
        n = sim_min(n, chunks - 1 - from);
        cr_assert(SAY(r, T_REGISTER_REQUEST, 1, "qwwq", from * MIB, RAM, PADDING, n));
        expect(r, T_REGISTER_RESULT);
        uint64_t key = get_be32(r->m.payload), base = get_be64(r->m.payload + 8);
        expect(r, T_READY);
        cr_assert_leq(pinned(p), 2 * block, "%llu bytes", (unsigned long long)pinned(p));
        for (unsigned end = 0; end < 2; end++) { // the first page and the last
            uint64_t at = end == 0 ? from * MIB : (from + n + 1) * MIB - PAGE;
            struct rmig_write w = {r->memory, &r->mr, PAGE, base + at, key, ++r->writes, true};
            cr_assert_eq(r->ops->write(r->ep, &w, 1, &err), 1, "%s", err.text);
            cr_assert(raw_until(r, is_written, SIM_SECOND) && !r->gone, "range %llu: %s", (unsigned long long)i,
                      r->text);
        }
    }
    play_free(p);
}
Test(hostile_source, version_1_ranges_that_grow) { v1_ranges(64 * MIB, 0, false); }
Test(hostile_source, version_1_ranges_that_grow_downwards) { v1_ranges(64 * MIB, 0, true); }
Test(hostile_source, version_1_ranges_that_slide) { v1_ranges(64 * MIB, 16, false); }
Test(hostile_source, version_1_ranges_one_by_one) { v1_ranges(64 * MIB, 1, false); }

/* Where a whole block is more than the fabric registers at once, there is an end to it. */
Test(hostile_source, version_1_ranges_beyond_all_bounds) {
    struct play *p = play_new(SIM_ORDERED);
    struct raw *r = &p->raw;
    p->world.registration_max = 16 * MIB;
    set(p, RMIG_PARAM_PEER_CHUNK_SIZE, MIB);
    play_sink(p, 40 * MIB, ROM_LENGTH);
    connect_with(r, 0, RECEIVES);
    expect(r, T_READY);
    cr_assert(SAY_EMPTY(r, T_RAM_BLOCKS_REQUEST));
    expect(r, T_RAM_BLOCKS_RESULT);
    expect(r, T_READY);
    for (uint64_t i = 0; i < 40 && SAY(r, T_REGISTER_REQUEST, 1, "qwwq", 0, RAM, PADDING, i % 16) &&
                         next_message(r, SIM_SECOND) && r->m.type == T_REGISTER_RESULT;
         i++) {
        expect(r, T_READY);
        cr_assert_leq(pinned(p), 80 * MIB);
    }
    must_fail(p, RMIG_ERR_PROTOCOL, "\"ram\"|twice its length, 41943040");
    play_free(p);
}

/* rmig's sink by hand, one call of process after the other, until it would sleep. Returns how many calls registered or
   deregistered anything, and none may do more than the bound. */
static unsigned calls_that_register(struct play *p, uint64_t most) {
    struct rmig_sink_event ev;
    unsigned calls = 0;
    const struct sim_stats *st = sim_stats(p->sim, 1);
    do {
        uint64_t before = st->ops[SIM_REG] + st->ops[SIM_DEREG];
        sim_spend(p->sim, 1, SIM_US);
        cr_assert_eq(rmig_sink_process(p->sink, &ev), RMIG_OK, "%s", rmig_sink_error(p->sink)->text);
        uint64_t did = st->ops[SIM_REG] + st->ops[SIM_DEREG] - before;
        cr_assert_leq(did, most, "%llu at once", (unsigned long long)did);
        calls += did > 0;
    } while (rmig_sink_next_deadline(p->sink) == 0);
    return calls;
}

/* 300 chunks asked for in one message, and given back in one: in steps, and the answer has them all. */
static void many_in_one(bool extended) {
    SIM_ONLY;
    struct play *p = play_new(SIM_ORDERED);
    struct raw *r = &p->raw;
    static uint8_t bytes[300 * 24];
    if (!extended)
        set(p, RMIG_PARAM_PEER_CHUNK_SIZE, MIB);
    play_sink(p, 300 * MIB, ROM_LENGTH);
    connect_with(r, extended ? EXTENSION : 0, RECEIVES);
    if (extended) {
        go_extended(r, X_READY);
        cr_assert(say_blocks(r, 1, 0, "ram", 300 * MIB));
    } else {
        expect(r, T_READY);
        cr_assert(SAY_EMPTY(r, T_RAM_BLOCKS_REQUEST));
    }
    expect(r, extended ? T_BLOCKS_RESULT : T_RAM_BLOCKS_RESULT);
    expect(r, T_READY);
    play_actor(p, NULL);
    for (unsigned i = 0; i < 300; i++) {
        if (extended)
            pack(bytes + 24 * i, "wwqq", (const uint64_t[]){RAM, 0, i * MIB, MIB});
        else
            pack(bytes + 24 * i, "qwwq", (const uint64_t[]){i * MIB, RAM, PADDING, 0});
    }
    cr_assert(say_bytes(r, extended ? T_REGISTER_BATCH : T_REGISTER_REQUEST, 300, sizeof bytes, bytes, sizeof bytes));
    pass_time(r, SIM_MS);
    sim_spend(p->sim, 1, SIM_MS);
    cr_assert_eq(calls_that_register(p, 64), 5u);
    expect(r, extended ? T_REGISTER_BATCH_RESULT : T_REGISTER_RESULT);
    cr_assert_eq(r->m.repeat, 300u);
    expect(r, T_READY);
    cr_assert_eq(held.exposed, 300u);
    for (unsigned i = 0; i < 300; i++)
        pack(bytes + 24 * i, "qwwq", (const uint64_t[]){i, RAM, PADDING, 0});
    cr_assert(say_bytes(r, T_UNREGISTER_REQUEST, 300, sizeof bytes, bytes, sizeof bytes));
    pass_time(r, SIM_MS);
    sim_spend(p->sim, 1, SIM_MS);
    cr_assert_eq(calls_that_register(p, 64), 5u);
    expect(r, T_UNREGISTER_FINISHED);
    cr_assert(held.exposed == 0 && pinned(p) == 0);
    play_free(p);
}
Test(hostile_source, many_chunks_in_one_batch) { many_in_one(true); }
Test(hostile_source, many_chunks_in_one_request) { many_in_one(false); }

/* Pin-all of version 1: the blocks are registered in steps too. */
Test(hostile_source, pins_all_in_steps) {
    SIM_ONLY;
    struct play *p = play_new(SIM_ORDERED);
    struct raw *r = &p->raw;
    play_sink(p, 100 * MIB, 100 * MIB);
    connect_with(r, PIN_ALL, RECEIVES);
    expect(r, T_READY);
    p->think = true;
    cr_assert(SAY_EMPTY(r, T_RAM_BLOCKS_REQUEST));
    pass_time(r, SIM_MS);
    play_actor(p, NULL);
    sim_spend(p->sim, 1, SIM_MS);
    cr_assert_eq(give_blocks(p), RMIG_OK);
    cr_assert_eq(calls_that_register(p, 1), 2u);
    expect(r, T_RAM_BLOCKS_RESULT);
    cr_assert(r->m.len == 64 && get_be32(r->m.payload + 24) != 0 && get_be32(r->m.payload + 56) != 0);
    play_free(p);
}

#define CLEAR(name, stage, needles, value, block, start, length)                                                       \
    TO_SINK(name, stage, PROTOCOL, "CLEAR_BATCH|" needles,                                                             \
            SAY(r, T_CLEAR_BATCH, 1, "wwqq", value, block, start, length))
CLEAR(clear_value, X_BLOCKS, "value 7", 7, RAM, 0, PAGE)
CLEAR(clear_block_2, X_BLOCKS, "block 2", 0, 2, 0, PAGE)
CLEAR(clear_at_the_end, X_BLOCKS, "0x400000", 0, RAM, RAM_LENGTH, PAGE)
CLEAR(clear_passes_the_end, X_BLOCKS, "0x400001", 0, RAM, 0, RAM_LENGTH + 1)
CLEAR(clear_wraps, X_BLOCKS, "0xfffffffffffff000", 0, RAM, PAGE, UINT64_MAX - PAGE + 1)
CLEAR(clear_of_0_bytes, X_BLOCKS, "length 0x0", 0, RAM, 0, 0)
CLEAR(clear_before_the_blocks, X_READY, "block 0", 0, RAM, 0, PAGE)
TO_SINK(clear_repeat_0, X_BLOCKS, PROTOCOL, "CLEAR_BATCH|repeat 0", SAY(r, T_CLEAR_BATCH, 0, "wwqq", 0, RAM, 0, PAGE))
TO_SINK(clear_repeat_2_in_one, X_BLOCKS, PROTOCOL, "CLEAR_BATCH|repeat 2",
        SAY(r, T_CLEAR_BATCH, 2, "wwqq", 0, RAM, 0, PAGE))
TO_SINK(clear_repeat_4097, X_BLOCKS, PROTOCOL, "CLEAR_BATCH|repeat 4097", say_many(r, T_CLEAR_BATCH, 4097, 24 * 4097))
TO_SINK(clear_repeat_that_wraps, X_BLOCKS, PROTOCOL, "CLEAR_BATCH|repeat 536870912",
        say_many(r, T_CLEAR_BATCH, 0x20000000, 0))

// --- hostile sources: ERROR, leaving, silence

TO_FORGET(error_before_hello, X_CONNECTED, REFUSED, "source gave up", SAY_EMPTY(r, T_ERROR))
TO_FORGET(error_at_first, V1_READY, REFUSED, "source gave up", SAY_EMPTY(r, T_ERROR))
TO_SINK(error_without_text, V1_BLOCKS, REFUSED, "source gave up", SAY_EMPTY(r, T_ERROR))
TO_SINK(error_with_text, X_BLOCKS, REFUSED, "source gave up|no disk",
        say_bytes(r, T_ERROR, 1, 7, (const uint8_t *)"no disk", 7))
TO_SINK(error_after_finish, X_FINISH, REFUSED, "no disk", say_bytes(r, T_ERROR, 1, 7, (const uint8_t *)"no disk", 7))
TO_SINK(error_with_control_characters, X_BLOCKS, REFUSED, "source gave up",
        say_bytes(r, T_ERROR, 1, 12, (const uint8_t *)"\x1b[2J\r\n\t\a\0\x7f\x80\xff", 12))
TO_SINK(error_with_format, X_BLOCKS, REFUSED, "%s%n%1000000d",
        say_bytes(r, T_ERROR, 1, 13, (const uint8_t *)"%s%n%1000000d", 13))
TO_SINK(error_of_half_a_megabyte, X_BLOCKS, REFUSED, "source gave up", say_many(r, T_ERROR, 1, 524272))
TO_SINK(error_and_then_leaves, X_BLOCKS, REFUSED, "source gave up|no disk",
        say_bytes(r, T_ERROR, 1, 7, (const uint8_t *)"no disk", 7), raw_leave(r))

#define LEAVES(name, stage, status, needles)                                                                           \
    TO_SINK(leaves_##name, stage, status, needles, raw_leave(r))                                                       \
    TO_SINK(vanishes_##name, stage, status, needles, raw_drop(r))
#define FORGETS_LEAVING(name, stage)                                                                                   \
    TO_FORGET(leaves_##name, stage, PEER_GONE, "source went away", raw_leave(r))                                       \
    TO_FORGET(vanishes_##name, stage, PEER_GONE, "source went away", raw_drop(r))
FORGETS_LEAVING(at_first, V1_READY)
FORGETS_LEAVING(before_hello, X_CONNECTED)
LEAVES(before_the_blocks, V1_STREAM, PEER_GONE, "source went away")
LEAVES(after_hello, X_READY, PEER_GONE, "source went away")
LEAVES(after_the_blocks, X_BLOCKS, PEER_GONE, "source went away")
LEAVES(after_finish, X_FINISH, HANDOVER, "source went away")
LEAVES(after_the_blocks_in_version_1, V1_BLOCKS, CANCELLED, "cancelled") // as the embedder decides

#define SILENT(name, stage, status, needles) TO_SINK(silent_##name, stage, status, needles, (void)r)
TO_FORGET(silent_at_first, V1_READY, TIMEOUT, "io-timeout|3s|next message", (void)r)
TO_FORGET(silent_before_hello, X_CONNECTED, TIMEOUT, "HELLO|connect-timeout|2s", (void)r)
SILENT(before_the_blocks, V1_STREAM, TIMEOUT, "io-timeout|source")
SILENT(after_the_blocks_in_version_1, V1_BLOCKS, TIMEOUT, "io-timeout|source")
SILENT(after_hello, X_READY, TIMEOUT, "io-timeout|3s")
SILENT(after_the_blocks, X_BLOCKS, TIMEOUT, "io-timeout|3s")
SILENT(after_finish, X_FINISH, HANDOVER, "GOODBYE|io-timeout|3s")

/* A source that takes nothing: the sink's messages stay under way for ever. */
static void let_be(struct raw *r) { pass_time(r, r->play->sim != NULL ? SIM_MS : 100 * SIM_MS); }

static struct play *deaf_source(uint32_t flags) {
    NEEDS_RECEIVES;
    struct play *p = play_new(SIM_ORDERED);
    struct raw *r = &p->raw;
    play_sink(p, RAM_LENGTH, ROM_LENGTH);
    r->by_hand = true;
    connect_with(r, flags, 0);
    let_be(r);
    if (flags == EXTENSION) {
        SAY_HELLO(r, T_HELLO, MIB);
        let_be(r);
        say_both_blocks(r);
    } else {
        SAY_EMPTY(r, T_RAM_BLOCKS_REQUEST);
    }
    for (unsigned i = 0; i < 4; i++) {
        let_be(r);
        SAY_EMPTY(r, T_REGISTER_FINISHED);
    }
    let_be(r);
    return p;
}
Test(hostile_source, takes_nothing) { sink_must_fail(deaf_source(0), RMIG_ERR_TIMEOUT, "io-timeout"); }
Test(hostile_source, takes_nothing_extended) { sink_must_fail(deaf_source(EXTENSION), RMIG_ERR_TIMEOUT, "io-timeout"); }

/* Nothing can be delivered to a source that has left: no reason to wait for it. */
static void deaf_source_leaves(uint32_t flags) {
    struct play *p = deaf_source(flags);
    p->raw.ops->disconnect(p->raw.ep);
    run_to_end(p, SIM_SECOND);
    bool by_embedder = p->disconnected == 1 && p->status == RMIG_ERR_CANCELLED; // version 1
    cr_assert(by_embedder || p->status == RMIG_ERR_PEER_GONE, "%s: %s", rmig_status_name(p->status), p->text);
    check_untouched(p);
    play_free(p);
}
Test(hostile_source, takes_nothing_and_leaves) { deaf_source_leaves(0); }
Test(hostile_source, takes_nothing_and_leaves_extended) { deaf_source_leaves(EXTENSION); }

TO_SINK(message_longer_than_a_receive, X_BLOCKS, FABRIC, "source", send_bytes(r, r->memory, BUFFER + 1))

// --- hostile sinks: how far the session has come

static const enum step short_script[] = {BEGIN, SAVE_ALL, END, PUT_HEAD, FINISH, OVER};

enum source_stage {
    S1_REQUEST, // the request has come
    S1_ACCEPTED, // version 1: accepted, no READY sent yet
    S1_BLOCKS, // RAM_BLOCKS_REQUEST has come
    S1_REGISTER, // REGISTER_REQUEST has come
    S1_CLEAR, // with RAM that is zero: COMPRESS has come
    S1_ROUND, // REGISTER_FINISHED has come
    S1_STREAM, // QEMU_FILE has come: the source has nothing more to say
    SX_HELLO, // extended: HELLO has come
    SX_ACCEPTED, // HELLO was answered, no READY sent yet
    SX_BLOCKS, // BLOCKS has come
    SX_BATCH, // REGISTER_BATCH has come
    SX_ROUND,
    SX_STREAM,
    SX_FINISH // FINISH has come
};

/* RAM of the raw sink that rmig's source may write, in the regions it asked for. */
struct target {
    uint8_t *host[BLOCKS];
    struct rmig_mr mr[BLOCKS];
    bool registered;
};
static struct target target;

static void target_open(const struct play *p) {
    struct rmig_error err = {0};
    for (unsigned i = 0; i < BLOCKS; i++) {
        target.host[i] = calloc(1, p->ram[i].length);
        cr_assert_not_null(target.host[i]);
        cr_assert_eq(p->raw.ops->reg(p->raw.ep, target.host[i], p->ram[i].length,
                                     RMIG_ACCESS_LOCAL_WRITE | RMIG_ACCESS_REMOTE_WRITE, &target.mr[i], &err),
                     RMIG_OK, "%s", err.text);
    }
    target.registered = true;
}

static void target_close(struct play *p) {
    for (unsigned i = 0; target.registered && i < BLOCKS; i++) {
        if (p->raw.ep != NULL)
            p->raw.ops->dereg(p->raw.ep, &target.mr[i], NULL);
        free(target.host[i]);
    }
    target.registered = false;
}

static void give_ready(struct raw *r) { cr_assert(SAY_EMPTY(r, T_READY)); }

static void answer_ram_blocks(struct raw *r) {
    cr_assert(SAY(r, T_RAM_BLOCKS_RESULT, 1, "qqqwwqqqww", target.mr[0].remote_address, 0x1000000, RAM_LENGTH, 0, 0,
                  target.mr[1].remote_address, 0x9000000, ROM_LENGTH, 0, 0));
}

/* Answers the REGISTER_REQUEST in r->m. */
static void answer_register(struct raw *r) {
    uint32_t block = get_be32(r->m.payload + 8);
    cr_assert_lt(block, (uint32_t)BLOCKS);
    cr_assert(SAY(r, T_REGISTER_RESULT, 1, "wwq", target.mr[block].key, 0, target.mr[block].remote_address));
}

static void answer_batch(struct raw *r) {
    uint8_t reply[16 * 64];
    uint32_t n = r->m.repeat;
    cr_assert(n <= 64 && r->m.len == 24 * n);
    for (uint32_t i = 0; i < n; i++) {
        const uint8_t *e = r->m.payload + 24 * (size_t)i;
        uint32_t block = get_be32(e);
        cr_assert_lt(block, (uint32_t)BLOCKS);
        put_be64(reply + 16 * (size_t)i, target.mr[block].key);
        put_be64(reply + 16 * (size_t)i + 8, target.mr[block].remote_address + get_be64(e + 8));
    }
    cr_assert(say_bytes(r, T_REGISTER_BATCH_RESULT, n, 16 * n, reply, 16 * n));
}

static void v1_go(struct raw *r, enum source_stage stage) {
    if (stage <= S1_ACCEPTED)
        return;
    give_ready(r);
    expect(r, T_RAM_BLOCKS_REQUEST);
    if (stage == S1_BLOCKS)
        return;
    answer_ram_blocks(r);
    give_ready(r);
    if (stage == S1_CLEAR) {
        expect(r, T_COMPRESS);
        return;
    }
    for (expect(r, T_REGISTER_REQUEST); r->m.type == T_REGISTER_REQUEST; next_message(r, SIM_SECOND)) {
        if (stage == S1_REGISTER)
            return;
        answer_register(r);
        give_ready(r);
    }
    cr_assert_eq(r->m.type, (uint32_t)T_REGISTER_FINISHED);
    if (stage == S1_ROUND)
        return;
    give_ready(r);
    expect(r, T_QEMU_FILE);
}

static void x_go(struct raw *r, enum source_stage stage) {
    expect(r, T_HELLO);
    if (stage == SX_HELLO)
        return;
    cr_assert(SAY_HELLO(r, T_HELLO_RESULT, MIB));
    if (stage == SX_ACCEPTED)
        return;
    give_ready(r);
    expect(r, T_BLOCKS);
    if (stage == SX_BLOCKS)
        return;
    cr_assert(SAY(r, T_BLOCKS_RESULT, 1, "w", 0));
    give_ready(r);
    for (expect(r, T_REGISTER_BATCH); r->m.type == T_REGISTER_BATCH; next_message(r, SIM_SECOND)) {
        if (stage == SX_BATCH)
            return;
        answer_batch(r);
        give_ready(r);
    }
    cr_assert_eq(r->m.type, (uint32_t)T_REGISTER_FINISHED);
    if (stage == SX_ROUND)
        return;
    give_ready(r);
    expect(r, T_QEMU_FILE);
    if (stage == SX_STREAM)
        return;
    give_ready(r);
    expect(r, T_FINISH);
}

static void check_hello(const struct raw *r) {
    static const uint16_t tags[9] = {1, 2, 3, 4, 5, 6, 7, 8, 11};
    cr_assert_eq(r->m.len, 108u);
    for (unsigned i = 0; i < 9; i++)
        cr_assert_eq(get_be32(r->m.payload + 12 * i), (uint32_t)tags[i] << 16 | 8, "entry %u", i);
    cr_assert_eq(get_be64(r->m.payload + 4), MIB, "chunk_size");
}

static struct play *source_with(enum source_stage stage, void (*change)(struct play *p)) {
    struct play *p = play_new(SIM_ORDERED);
    if (change != NULL)
        change(p);
    play_source(p, RAM_LENGTH, ROM_LENGTH, short_script);
    fill_stream(p);
    for (unsigned i = 0; i < BLOCKS && stage != S1_CLEAR; i++)
        memset(p->ram[i].host, FILL, p->ram[i].length);
    return p;
}

static struct play *source_at(enum source_stage stage) {
    struct play *p = source_with(stage, NULL);
    uint8_t reply[8];
    if (stage == S1_REQUEST) {
        cr_assert(raw_until(&p->raw, is_asked, SIM_SECOND));
        return p;
    }
    pack(reply, "ww", (const uint64_t[]){1, stage >= SX_HELLO ? EXTENSION : 0});
    raw_accept(&p->raw, reply, sizeof reply, RECEIVES);
    cr_assert_eq(get_be32(p->raw.private_data), 1u);
    cr_assert_eq(get_be32(p->raw.private_data + 4), EXTENSION);
    target_open(p);
    if (stage >= SX_HELLO)
        x_go(&p->raw, stage);
    else
        v1_go(&p->raw, stage);
    if (stage == SX_HELLO)
        check_hello(&p->raw);
    return p;
}

static void raw_vanish(struct play *p) {
    target_close(p);
    raw_drop(&p->raw);
}

static void source_must_fail(struct play *p, int status, const char *needles) {
    must_fail(p, status, needles);
    cr_expect_eq(held.exposed, 0u, "the source's memory can be written");
    for (unsigned i = 0; i < BLOCKS; i++)
        cr_assert_eq(memcmp(p->ram[i].host, p->ram[i].host + 1, p->ram[i].length - 1), 0, // every byte as the first
                     "the source's block %u was written", i);
    target_close(p);
    play_free(p);
}

#define TO_SOURCE(name, stage, status, needles, ...)                                                                   \
    Test(hostile_sink, name) {                                                                                         \
        struct play *p = source_at(stage);                                                                             \
        struct raw *r = &p->raw;                                                                                       \
        __VA_ARGS__;                                                                                                   \
        source_must_fail(p, RMIG_ERR_##status, needles);                                                               \
    }

TestSuite(hostile_sink, .timeout = 600);

/* What the raw sink does in all these tests before it turns hostile is right: gone through to the end it works. */
static void whole_session(enum source_stage stage) {
    struct play *p = source_at(stage);
    struct raw *r = &p->raw;
    if (stage == SX_FINISH) {
        cr_assert(SAY_EMPTY(r, T_FINISH_RESULT));
        expect(r, T_GOODBYE);
        cr_assert_eq(r->m.len, 0u);
    }
    run_to_end(p, SIM_SECOND);
    cr_assert_eq(p->status, RMIG_OK, "%s", p->text);
    for (unsigned i = 0; i < BLOCKS; i++)
        cr_assert_eq(memcmp(target.host[i], p->ram[i].host, p->ram[i].length), 0);
    target_close(p);
    play_free(p);
}
Test(hostile_sink, nothing_hostile_in_version_1) { whole_session(S1_STREAM); }
Test(hostile_sink, nothing_hostile_extended) { whole_session(SX_FINISH); }

// --- hostile sinks: the answer to the request

TO_SOURCE(rejects, S1_REQUEST, REFUSED, "rejected", struct rmig_error err;
          cr_assert_eq(r->ops->reject(r->listener, r->request, NULL, 0, &err), RMIG_OK))
TO_SOURCE(rejects_with_garbage, S1_REQUEST, REFUSED, "rejected", struct rmig_error err;
          uint8_t garbage[140]; // InfiniBand has room for 148
          memset(garbage, 0xff, 140);
          cr_assert_eq(r->ops->reject(r->listener, r->request, garbage, 140, &err), RMIG_OK))
TO_SOURCE(never_answers_the_request, S1_REQUEST, TIMEOUT, "sink|connect-timeout|2s", (void)r)
TO_SOURCE(stops_to_listen, S1_REQUEST, REFUSED, "", r->ops->close(r->listener), r->listener = NULL)

#define SHORT_REPLY(n)                                                                                                 \
    TO_SOURCE(private_data_of_##n##_bytes, S1_REQUEST, PROTOCOL, "private data|8 bytes", NO_PADDING;                   \
              raw_accept(r, good_data, n, RECEIVES))
SHORT_REPLY(0)
SHORT_REPLY(1)
SHORT_REPLY(2)
SHORT_REPLY(3)
SHORT_REPLY(4)
SHORT_REPLY(5)
SHORT_REPLY(6)
SHORT_REPLY(7)

/* Stock sources ignore the version in the reply, and what they have not asked for. */
Test(hostile_sink, reply_with_another_version_and_all_flags_but_the_extension) {
    struct play *p = source_at(S1_REQUEST);
    raw_accept(&p->raw, (const uint8_t[]){0xff, 0xff, 0xff, 0xff, 0xff, 0xfe, 0xff, 0xff}, 8, RECEIVES);
    target_open(p);
    v1_go(&p->raw, S1_STREAM);
    run_to_end(p, SIM_SECOND);
    cr_assert_eq(p->status, RMIG_OK, "%s", p->text);
    cr_assert_not(rmig_source_extended(p->source));
    target_close(p);
    play_free(p);
}

static void without_extension(struct play *p) { set(p, RMIG_PARAM_EXTENSION, 0); }

Test(hostile_sink, grants_an_extension_that_was_not_offered) {
    struct play *p = source_with(S1_REQUEST, without_extension);
    raw_accept(&p->raw, (const uint8_t[]){0, 0, 0, 1, 0xff, 0xff, 0xff, 0xff}, 8, RECEIVES);
    cr_assert_eq(get_be32(p->raw.private_data + 4), 0u);
    target_open(p);
    v1_go(&p->raw, S1_STREAM);
    run_to_end(p, SIM_SECOND);
    cr_assert_eq(p->status, RMIG_OK, "%s", p->text);
    cr_assert_not(rmig_source_extended(p->source));
    target_close(p);
    play_free(p);
}

// --- hostile sinks: the header, types, order

#define SOURCE_BYTES(name, needles, ...) TO_SOURCE(name, S1_BLOCKS, PROTOCOL, needles, __VA_ARGS__)
SOURCE_BYTES(message_of_0_bytes, "0 bytes|16", send_bytes(r, ZEROES(1), 0))
SOURCE_BYTES(message_of_15_bytes, "15 bytes|16", send_bytes(r, ZEROES(15), 15))
SOURCE_BYTES(len_less_than_sent, "80|63", say_bytes(r, T_RAM_BLOCKS_RESULT, 1, 63, ZEROES(64), 64))
SOURCE_BYTES(len_more_than_sent, "79|64", say_bytes(r, T_RAM_BLOCKS_RESULT, 1, 64, ZEROES(63), 63))
SOURCE_BYTES(len_beyond_the_buffer, "524273|524272", say_bytes(r, T_RAM_BLOCKS_RESULT, 1, 524273, ZEROES(64), 64))
SOURCE_BYTES(len_that_wraps, "4294967288", say_bytes(r, T_RAM_BLOCKS_RESULT, 1, 0xfffffff8, ZEROES(8), 8))

TO_SOURCE(message_of_15_bytes_extended, SX_BLOCKS, PROTOCOL, "15 bytes|16", send_bytes(r, ZEROES(15), 15))
TO_SOURCE(len_more_than_sent_extended, SX_HELLO, PROTOCOL, "111|96",
          say_bytes(r, T_HELLO_RESULT, 1, 96, ZEROES(95), 95))
TO_SOURCE(message_longer_than_a_receive, S1_BLOCKS, FABRIC, "sink", send_bytes(r, r->memory, BUFFER + 1))
TO_SOURCE(message_longer_than_a_receive_extended, SX_HELLO, FABRIC, "sink", send_bytes(r, r->memory, BUFFER + 1))

#define WRONG(name, stage, type, needles) TO_SOURCE(name, stage, PROTOCOL, needles, SAY_EMPTY(r, type))
WRONG(type_0_for_ready, S1_ACCEPTED, 0, "type 0|READY was due")
WRONG(type_12_for_ready, S1_ACCEPTED, 12, "type 12|READY was due")
WRONG(type_of_32_bits, S1_ACCEPTED, 0xffffffff, "type 4294967295|READY was due")
WRONG(a_source_message_for_ready, S1_ACCEPTED, T_REGISTER_FINISHED, "REGISTER_FINISHED|READY was due")
WRONG(stream_for_ready, S1_ACCEPTED, T_QEMU_FILE, "QEMU_FILE|READY was due")
WRONG(reply_nobody_asked_for, S1_ACCEPTED, T_RAM_BLOCKS_RESULT, "RAM_BLOCKS_RESULT|READY was due")
WRONG(register_result_nobody_asked_for, S1_ROUND, T_REGISTER_RESULT, "REGISTER_RESULT|READY was due")
WRONG(unregister_finished_nobody_asked_for, S1_ROUND, T_UNREGISTER_FINISHED, "UNREGISTER_FINISHED|READY was due")
WRONG(batch_result_nobody_asked_for, SX_ROUND, T_REGISTER_BATCH_RESULT, "REGISTER_BATCH_RESULT|READY was due")
WRONG(blocks_result_twice, SX_BATCH, T_BLOCKS_RESULT, "BLOCKS_RESULT|REGISTER_BATCH_RESULT was due")
WRONG(hello_result_twice, SX_ACCEPTED, T_HELLO_RESULT, "HELLO_RESULT|READY was due")
WRONG(finish_result_before_finish, SX_ROUND, T_FINISH_RESULT, "FINISH_RESULT|READY was due")
WRONG(hello_result_in_version_1, S1_ACCEPTED, T_HELLO_RESULT, "HELLO_RESULT|READY was due")
WRONG(batch_result_in_version_1, S1_REGISTER, T_REGISTER_BATCH_RESULT, "REGISTER_BATCH_RESULT|REGISTER_RESULT was due")
WRONG(finish_result_in_version_1, S1_ROUND, T_FINISH_RESULT, "FINISH_RESULT|READY was due")
WRONG(ready_for_hello_result, SX_HELLO, T_READY, "READY|HELLO_RESULT was due")
WRONG(ready_for_ram_blocks_result, S1_BLOCKS, T_READY, "READY|RAM_BLOCKS_RESULT was due")
WRONG(ready_for_register_result, S1_REGISTER, T_READY, "READY|REGISTER_RESULT was due")
WRONG(ready_for_blocks_result, SX_BLOCKS, T_READY, "READY|BLOCKS_RESULT was due")
WRONG(ready_for_batch_result, SX_BATCH, T_READY, "READY|REGISTER_BATCH_RESULT was due")
WRONG(ready_for_finish_result, SX_FINISH, T_READY, "READY|FINISH_RESULT was due")
WRONG(ram_blocks_result_for_register_result, S1_REGISTER, T_RAM_BLOCKS_RESULT,
      "RAM_BLOCKS_RESULT|REGISTER_RESULT was due")
WRONG(register_result_for_batch_result, SX_BATCH, T_REGISTER_RESULT, "REGISTER_RESULT|REGISTER_BATCH_RESULT was due")
WRONG(goodbye_from_the_sink, SX_FINISH, T_GOODBYE, "GOODBYE|FINISH_RESULT was due")
TO_SOURCE(ready_with_payload, S1_ACCEPTED, PROTOCOL, "READY|len 1", SAY(r, T_READY, 1, "b", 0))
TO_SOURCE(two_readys, S1_ACCEPTED, PROTOCOL, "READY", BUSY, SAY_EMPTY(r, T_READY), SAY_EMPTY(r, T_READY))
TO_SOURCE(two_readys_extended, SX_ACCEPTED, PROTOCOL, "READY", BUSY, SAY_EMPTY(r, T_READY), SAY_EMPTY(r, T_READY))
TO_SOURCE(a_storm_of_readys, S1_ACCEPTED, PROTOCOL, "READY", for (unsigned i = 0; i < 15; i++) SAY_EMPTY(r, T_READY))
TO_SOURCE(ready_before_hello_result, SX_HELLO, PROTOCOL, "READY|HELLO_RESULT was due", SAY_EMPTY(r, T_READY),
          SAY_HELLO(r, T_HELLO_RESULT, MIB))

// --- hostile sinks: RAM_BLOCKS_RESULT, REGISTER_RESULT, and keys that are not good

#define ENTRY(base, offset, length, rkey) base, offset, length, rkey, 0
#define RAM_BLOCKS(name, status, needles, format, ...)                                                                 \
    TO_SOURCE(ram_blocks_##name, S1_BLOCKS, status, needles, SAY(r, T_RAM_BLOCKS_RESULT, 1, format, __VA_ARGS__))
RAM_BLOCKS(none, PROTOCOL, "RAM_BLOCKS_RESULT|0 bytes|2", "", 0)
RAM_BLOCKS(one_missing, PROTOCOL, "RAM_BLOCKS_RESULT|32 bytes|2", "qqqww", ENTRY(0, 0, RAM_LENGTH, 0))
RAM_BLOCKS(a_byte_missing, PROTOCOL, "RAM_BLOCKS_RESULT|63 bytes|32", "qqqwwqqqwhb", ENTRY(0, 0, RAM_LENGTH, 0), 0, 0,
           ROM_LENGTH, 0, 0, 0)
RAM_BLOCKS(a_byte_more, PROTOCOL, "RAM_BLOCKS_RESULT|65 bytes|32", "qqqwwqqqwwb", ENTRY(0, 0, RAM_LENGTH, 0),
           ENTRY(0, 0, ROM_LENGTH, 0), 0)
RAM_BLOCKS(with_31_bytes_more, PROTOCOL, "RAM_BLOCKS_RESULT|95 bytes|32", "qqqwwqqqwwqqqwhb",
           ENTRY(0, 0, RAM_LENGTH, 0), ENTRY(0, 0, ROM_LENGTH, 0), 0, 0, PAGE, 0, 0, 0)
RAM_BLOCKS(another_length, SETUP, "block 1 \"rom\"|1052672|1052673", "qqqwwqqqww", ENTRY(0, 0, RAM_LENGTH, 0),
           ENTRY(0, 0, ROM_LENGTH + 1, 0))
RAM_BLOCKS(length_0, SETUP, "block 0 \"ram\"|4194304|0 at", "qqqwwqqqww", ENTRY(0, 0, 0, 0), ENTRY(0, 0, ROM_LENGTH, 0))
RAM_BLOCKS(swapped, SETUP, "block 0 \"ram\"|4194304|1052672", "qqqwwqqqww", ENTRY(0, 0, ROM_LENGTH, 0),
           ENTRY(0, 0, RAM_LENGTH, 0))
TO_SOURCE(ram_blocks_half_a_megabyte, S1_BLOCKS, SETUP, "block 0 \"ram\"|4194304",
          say_many(r, T_RAM_BLOCKS_RESULT, 1, 16383 * 32))

/* A sink may have more blocks than the source names. */
Test(hostile_sink, ram_blocks_surplus_is_ignored) {
    struct play *p = source_at(S1_BLOCKS);
    struct raw *r = &p->raw;
    cr_assert(SAY(r, T_RAM_BLOCKS_RESULT, 1, "qqqwwqqqwwqqqww", ENTRY(target.mr[0].remote_address, 0, RAM_LENGTH, 0),
                  ENTRY(target.mr[1].remote_address, 0, ROM_LENGTH, 0), ENTRY(0, 0, PAGE, 0)));
    give_ready(r);
    expect(r, T_REGISTER_REQUEST);
    cr_assert(!p->done);
    target_close(p);
    play_free(p);
}

static void with_pin_all(struct play *p) { set(p, RMIG_PARAM_PIN_ALL, 1); }

static struct play *pinned_source(void) {
    struct play *p = source_with(S1_BLOCKS, with_pin_all);
    raw_accept(&p->raw, (const uint8_t[]){0, 0, 0, 1, 0, 0, 0, 1}, 8, RECEIVES);
    target_open(p);
    v1_go(&p->raw, S1_BLOCKS);
    return p;
}

Test(hostile_sink, ram_blocks_rkey_0_with_pin_all) {
    struct play *p = pinned_source();
    cr_assert(SAY(&p->raw, T_RAM_BLOCKS_RESULT, 1, "qqqwwqqqww",
                  ENTRY(target.mr[0].remote_address, 0, RAM_LENGTH, target.mr[0].key),
                  ENTRY(target.mr[1].remote_address, 0, ROM_LENGTH, 0)));
    source_must_fail(p, RMIG_ERR_PROTOCOL, "rkey 0|\"rom\"");
}

/* Keys and addresses are the sink's affair: bad ones end the connection, and no more. */
static void bad_keys(uint64_t key, uint64_t base) {
    struct play *p = pinned_source();
    cr_assert(SAY(&p->raw, T_RAM_BLOCKS_RESULT, 1, "qqqwwqqqww", ENTRY(base, UINT64_MAX, RAM_LENGTH, key),
                  ENTRY(base, UINT64_MAX - 7, ROM_LENGTH, key)));
    give_ready(&p->raw);
    source_must_fail(p, RMIG_ERR_FABRIC, "sink|remote access error");
}
Test(hostile_sink, ram_blocks_bad_key_with_pin_all) { bad_keys(0x12345678, 0); }
Test(hostile_sink, ram_blocks_bad_base_with_pin_all) { bad_keys(0xffffffff, UINT64_MAX); }

#define REGISTERED(name, status, needles, format, ...)                                                                 \
    TO_SOURCE(register_result_##name, S1_REGISTER, status, needles, SAY(r, T_REGISTER_RESULT, 1, format, __VA_ARGS__))
REGISTERED(rkey_0, PROTOCOL, "REGISTER_RESULT|rkey", "wwq", 0, 0, target.mr[0].remote_address)
REGISTERED(of_0_bytes, PROTOCOL, "REGISTER_RESULT|0 bytes|16", "", 0)
REGISTERED(of_15_bytes, PROTOCOL, "REGISTER_RESULT|15 bytes|16", "wwwhb", 1, 0, 0, 0, 0)
REGISTERED(of_17_bytes, PROTOCOL, "REGISTER_RESULT|17 bytes|16", "wwqb", 1, 0, 0, 0)
REGISTERED(of_32_bytes, PROTOCOL, "REGISTER_RESULT|32 bytes|16", "wwqwwq", 1, 0, 0, 1, 0, 0)
TO_SOURCE(register_result_bad_key, S1_REGISTER, FABRIC, "sink|remote access error",
          SAY(r, T_REGISTER_RESULT, 1, "wwq", 0x12345678, 0, 0), give_ready(r))
TO_SOURCE(register_result_bad_base, S1_REGISTER, FABRIC, "sink|remote access error",
          SAY(r, T_REGISTER_RESULT, 1, "wwq", target.mr[0].key, 0, UINT64_MAX), give_ready(r))
TO_SOURCE(register_result_base_behind, S1_REGISTER, FABRIC, "sink|remote access error",
          SAY(r, T_REGISTER_RESULT, 1, "wwq", target.mr[0].key, 0, target.mr[0].remote_address + PAGE), give_ready(r))

// --- hostile sinks: the extension

#define HELLO_ANSWER(name, status, needles, ...)                                                                       \
    TO_SOURCE(hello_result_##name, SX_HELLO, status, needles,                                                          \
              SAY(r, T_HELLO_RESULT, 1, HELLO_FORMAT, HELLO_VALUES(__VA_ARGS__)))
HELLO_ANSWER(refused_without_reason, REFUSED, "refused", MIB, 524272, 4096, 1 << 30, 0, 1)
HELLO_ANSWER(status_of_64_bits, REFUSED, "refused", MIB, 524272, 4096, 1 << 30, 0, UINT64_MAX)
HELLO_ANSWER(other_chunk_size, PROTOCOL, "chunk-size|2097152|1048576", 2 * MIB, 524272, 4096, 1 << 30, 0, 0)
HELLO_ANSWER(chunk_size_0, PROTOCOL, "chunk-size|0|1048576", 0, 524272, 4096, 1 << 30, 0, 0)
HELLO_ANSWER(payload_too_small, SETUP, "payload_max 511|512 or more", MIB, 511, 4096, 1 << 30, 0, 0)
HELLO_ANSWER(batch_0, SETUP, "batch_max 0|1 or more", MIB, 524272, 0, 1 << 30, 0, 0)
HELLO_ANSWER(registration_too_small, SETUP, "registration_max 1048575|1048576 or more", MIB, 524272, 4096, MIB - 1, 0,
             0)
HELLO_ANSWER(idle_1_ns, SETUP, "idle_max 1:|0, or 1000000", MIB, 524272, 4096, 1 << 30, 1, 0)
HELLO_ANSWER(idle_below_1_ms, SETUP, "idle_max 999999|1000000 or more", MIB, 524272, 4096, 1 << 30, 999999, 0)
#define LIMITS(page, bits)                                                                                             \
    1, 8, MIB, 2, 8, page, 3, 8, bits, 4, 8, 524272, 5, 8, 4096, 6, 8, 1 << 30, 7, 8, 30 * SIM_SECOND, 8, 8, 0
#define LIMIT_ANSWER(name, needles, page, bits)                                                                        \
    TO_SOURCE(hello_result_##name, SX_HELLO, SETUP, needles,                                                           \
              SAY(r, T_HELLO_RESULT, 1, HELLO_FORMAT, LIMITS(page, bits)))
LIMIT_ANSWER(page_size_0, "page_size 0|power of two|4096 to 1073741824", 0, 64)
LIMIT_ANSWER(page_size_no_power_of_two, "page_size 12288", 12288, 64)
LIMIT_ANSWER(page_size_large, "page_size 2147483648", (uint64_t)1 << 31, 64)
LIMIT_ANSWER(keys_of_31_bits, "key_bits 31|32 to 64", PAGE, 31)
LIMIT_ANSWER(keys_of_65_bits, "key_bits 65|32 to 64", PAGE, 65)

/* However short its patience is said to be, a source says KEEPALIVE so often and no more. */
Test(hostile_sink, keepalives_are_bounded) {
    SIM_ONLY;
    struct play *p = source_at(SX_HELLO);
    struct raw *r = &p->raw;
    static const enum step nothing[] = {OVER};
    unsigned said = 0;
    p->script = nothing;
    cr_assert(SAY(r, T_HELLO_RESULT, 1, HELLO_FORMAT, HELLO_VALUES(MIB, 524272, 4096, 1 << 30, SIM_MS, 0)));
    give_ready(r);
    pass_time(r, SIM_MS);
    cr_assert(p->done && p->status == RMIG_OK, "%s", p->text);
    for (unsigned i = 0; i < 1000; i++) {
        sim_spend(p->sim, 0, SIM_MS);
        cr_assert_eq(rmig_source_process(p->source), RMIG_OK);
        pass_time(r, SIM_MS);
        if (r->inbox_count > 0) {
            expect(r, T_KEEPALIVE);
            give_ready(r);
            said++;
        }
    }
    cr_assert(said >= 100 && said <= 251, "%u in a second", said);
    target_close(p);
    play_free(p);
}
TO_SOURCE(hello_result_without_entries, SX_HELLO, PROTOCOL, "chunk-size|0", SAY_EMPTY(r, T_HELLO_RESULT))
#define HELLO_BAD(name, format, ...)                                                                                   \
    TO_SOURCE(hello_result_##name, SX_HELLO, PROTOCOL, "HELLO_RESULT|malformed",                                       \
              SAY(r, T_HELLO_RESULT, 1, format, __VA_ARGS__))
HELLO_BAD(cut_in_a_tag, "hhqh", 1, 8, MIB, 2)
HELLO_BAD(cut_in_a_value, "hhw", 1, 8, 0)
HELLO_BAD(with_a_long_entry, "hhqhhb", 1, 8, MIB, 9, 65535, 'x')
HELLO_BAD(with_a_short_number, "hhw", 1, 4, MIB)
HELLO_BAD(with_a_tag_twice, "hhqhhq", 8, 8, 0, 8, 8, 1)
HELLO_BAD(with_two_reasons, "hhbhhb", 9, 1, 'a', 9, 1, 'b')
TO_SOURCE(hello_result_refused_with_reason, SX_HELLO, REFUSED, "refused|no",
          SAY(r, T_HELLO_RESULT, 1, "hhqhhqhhbb", 1, 8, MIB, 8, 8, 1, 9, 2, 'n', 'o'))
TO_SOURCE(hello_result_reason_with_control_characters, SX_HELLO, REFUSED, "refused|ok",
          SAY(r, T_HELLO_RESULT, 1, "hhqhhbbbbbbb", 8, 8, 1, 9, 7, 0x1b, '\n', 0, 0x7f, 0xff, 'o', 'k'))
TO_SOURCE(hello_result_reason_with_format, SX_HELLO, REFUSED, "refused|%s%n",
          SAY(r, T_HELLO_RESULT, 1, "hhqhhbbbb", 8, 8, 1, 9, 4, '%', 's', '%', 'n'))

static void say_long_reason(struct raw *r) {
    static uint8_t bytes[16 + 65535];
    size_t n = pack(bytes, "hhqhh", (const uint64_t[]){8, 8, 1, 9, 65535});
    memset(bytes + n, 'x', 65535);
    cr_assert(say_bytes(r, T_HELLO_RESULT, 1, (uint32_t)n + 65535, bytes, n + 65535));
}
TO_SOURCE(hello_result_reason_of_64K, SX_HELLO, REFUSED, "refused|xxx", say_long_reason(r))

TO_SOURCE(blocks_result_of_0_bytes, SX_BLOCKS, PROTOCOL, "BLOCKS_RESULT", SAY_EMPTY(r, T_BLOCKS_RESULT))
TO_SOURCE(blocks_result_of_8_bytes, SX_BLOCKS, PROTOCOL, "BLOCKS_RESULT", SAY(r, T_BLOCKS_RESULT, 1, "q", 0))
TO_SOURCE(blocks_result_not_0, SX_BLOCKS, PROTOCOL, "BLOCKS_RESULT", SAY(r, T_BLOCKS_RESULT, 1, "w", 1))
TO_SOURCE(finish_result_with_payload, SX_FINISH, PROTOCOL, "FINISH_RESULT", SAY(r, T_FINISH_RESULT, 1, "w", 1))

#define BATCH_ANSWER(name, needles, repeat, format, ...)                                                               \
    TO_SOURCE(batch_result_##name, SX_BATCH, PROTOCOL, "REGISTER_BATCH_RESULT|" needles,                               \
              SAY(r, T_REGISTER_BATCH_RESULT, repeat, format, __VA_ARGS__))
BATCH_ANSWER(of_0_bytes, "0 bytes", 0, "", 0)
BATCH_ANSWER(one_missing, "1 results in 16 bytes", 1, "qq", 1, 0)
BATCH_ANSWER(one_too_many, "3 results in 48 bytes", 3, "qqqqqq", 1, 0, 1, 0, 1, 0)
BATCH_ANSWER(repeat_wrong, "7 results in 32 bytes", 7, "qqqq", 1, 0, 1, 0)
BATCH_ANSWER(a_byte_missing, "2 results in 31 bytes", 2, "qqqwhb", 1, 0, 1, 0, 0, 0)
BATCH_ANSWER(key_0, "key 0|result 0", 2, "qqqq", 0, target.mr[0].remote_address, target.mr[1].key,
             target.mr[1].remote_address)
BATCH_ANSWER(second_key_0, "key 0|result 1", 2, "qqqq", target.mr[0].key, target.mr[0].remote_address, 0,
             target.mr[1].remote_address)
TO_SOURCE(batch_result_bad_keys, SX_BATCH, FABRIC, "sink|remote access error",
          SAY(r, T_REGISTER_BATCH_RESULT, 2, "qqqq", UINT64_MAX, 0, 1, UINT64_MAX), give_ready(r))
TO_SOURCE(batch_result_addresses_that_wrap, SX_BATCH, FABRIC, "sink|remote access error",
          SAY(r, T_REGISTER_BATCH_RESULT, 2, "qqqq", target.mr[0].key, UINT64_MAX, target.mr[1].key, UINT64_MAX),
          give_ready(r))

/* The smallest limits that a sink may have: one entry a message, 512 bytes, one chunk a registration. */
Test(hostile_sink, smallest_limits_work) {
    struct play *p = source_at(SX_HELLO);
    struct raw *r = &p->raw;
    unsigned batches = 0, streams = 0;
    cr_assert(SAY(r, T_HELLO_RESULT, 1, HELLO_FORMAT, HELLO_VALUES(MIB, 512, 1, MIB, SIM_MS, 0)));
    give_ready(r);
    while (next_message(r, SIM_SECOND) && r->m.type != T_FINISH) {
        cr_assert_leq(r->m.len, 512u, "message %u of %u bytes", r->m.type, r->m.len);
        if (r->m.type == T_BLOCKS)
            cr_assert(SAY(r, T_BLOCKS_RESULT, 1, "w", 0));
        if (r->m.type == T_REGISTER_BATCH) {
            cr_assert(r->m.repeat == 1 && get_be64(r->m.payload + 16) <= MIB);
            answer_batch(r);
            batches++;
        }
        streams += r->m.type == T_QEMU_FILE;
        give_ready(r);
    }
    cr_assert_eq(r->m.type, (uint32_t)T_FINISH, "%s", p->text);
    cr_assert(batches == 6 && streams == 1, "%u batches, %u pieces of the stream", batches, streams);
    SAY_EMPTY(r, T_FINISH_RESULT);
    run_to_end(p, SIM_SECOND);
    cr_assert_eq(p->status, RMIG_OK, "%s", p->text);
    for (unsigned i = 0; i < BLOCKS; i++)
        cr_assert_eq(memcmp(target.host[i], p->ram[i].host, p->ram[i].length), 0);
    target_close(p);
    play_free(p);
}

// --- hostile sinks: ERROR, leaving, silence

TO_SOURCE(error_for_ready, S1_ACCEPTED, REFUSED, "sink gave up", SAY_EMPTY(r, T_ERROR))
TO_SOURCE(error_for_a_reply, S1_REGISTER, REFUSED, "sink gave up", SAY_EMPTY(r, T_ERROR))
TO_SOURCE(error_for_hello_result, SX_HELLO, REFUSED, "sink gave up|no disk",
          say_bytes(r, T_ERROR, 1, 7, (const uint8_t *)"no disk", 7))
TO_SOURCE(error_for_blocks_result, SX_BLOCKS, REFUSED, "sink gave up|no disk",
          say_bytes(r, T_ERROR, 1, 7, (const uint8_t *)"no disk", 7))
TO_SOURCE(error_for_finish_result, SX_FINISH, REFUSED, "sink gave up", SAY_EMPTY(r, T_ERROR))
TO_SOURCE(error_and_then_leaves, SX_BATCH, REFUSED, "sink gave up|no disk",
          say_bytes(r, T_ERROR, 1, 7, (const uint8_t *)"no disk", 7), raw_leave(r))
TO_SOURCE(error_with_control_characters, SX_BATCH, REFUSED, "sink gave up",
          say_bytes(r, T_ERROR, 1, 12, (const uint8_t *)"\x1b[2J\r\n\t\a\0\x7f\x80\xff", 12))
TO_SOURCE(error_with_format, SX_BATCH, REFUSED, "%s%n%1000000d",
          say_bytes(r, T_ERROR, 1, 13, (const uint8_t *)"%s%n%1000000d", 13))
TO_SOURCE(error_of_half_a_megabyte, SX_BATCH, REFUSED, "sink gave up", say_many(r, T_ERROR, 1, 524272))

#define SINK_LEAVES(name, stage, status)                                                                               \
    TO_SOURCE(leaves_##name, stage, status, "sink", raw_leave(r))                                                      \
    TO_SOURCE(vanishes_##name, stage, status, "sink", (void)r, raw_vanish(p))
SINK_LEAVES(for_ready, S1_ACCEPTED, PEER_GONE)
SINK_LEAVES(for_ram_blocks_result, S1_BLOCKS, PEER_GONE)
SINK_LEAVES(for_register_result, S1_REGISTER, PEER_GONE)
SINK_LEAVES(after_compress, S1_CLEAR, PEER_GONE)
SINK_LEAVES(after_a_round, S1_ROUND, PEER_GONE)
SINK_LEAVES(for_hello_result, SX_HELLO, PEER_GONE)
SINK_LEAVES(for_the_first_ready, SX_ACCEPTED, PEER_GONE)
SINK_LEAVES(for_blocks_result, SX_BLOCKS, PEER_GONE)
SINK_LEAVES(for_batch_result, SX_BATCH, PEER_GONE)
SINK_LEAVES(after_a_round_extended, SX_ROUND, PEER_GONE)
SINK_LEAVES(for_finish, SX_STREAM, PEER_GONE)
SINK_LEAVES(for_finish_result, SX_FINISH, PEER_GONE)

#define SINK_SILENT(name, stage, needles) TO_SOURCE(silent_##name, stage, TIMEOUT, "sink|" needles, (void)r)
SINK_SILENT(for_ready, S1_ACCEPTED, "io-timeout|3s|READY")
SINK_SILENT(for_ram_blocks_result, S1_BLOCKS, "io-timeout|3s|RAM_BLOCKS_RESULT")
SINK_SILENT(for_register_result, S1_REGISTER, "io-timeout|3s|REGISTER_RESULT")
SINK_SILENT(after_compress, S1_CLEAR, "io-timeout|3s|READY")
SINK_SILENT(after_a_round, S1_ROUND, "io-timeout|3s|READY")
SINK_SILENT(for_hello_result, SX_HELLO, "connect-timeout|2s|HELLO_RESULT")
SINK_SILENT(for_the_first_ready, SX_ACCEPTED, "io-timeout|3s|READY")
SINK_SILENT(for_blocks_result, SX_BLOCKS, "io-timeout|3s|BLOCKS_RESULT")
SINK_SILENT(for_batch_result, SX_BATCH, "io-timeout|3s|REGISTER_BATCH_RESULT")
SINK_SILENT(after_a_round_extended, SX_ROUND, "io-timeout|3s|READY")
SINK_SILENT(for_finish, SX_STREAM, "io-timeout|3s|READY")
SINK_SILENT(for_finish_result, SX_FINISH, "io-timeout|3s|FINISH_RESULT")

/* The raw sink stops posting receives: `takes` messages are taken, all others stay under way for ever. */
static struct play *deaf_sink(bool extended, enum source_stage stage, unsigned takes) {
    NEEDS_RECEIVES;
    struct play *p = source_with(stage, NULL);
    struct raw *r = &p->raw;
    uint8_t reply[8];
    pack(reply, "ww", (const uint64_t[]){1, extended ? EXTENSION : 0});
    r->by_hand = true;
    raw_accept(r, reply, sizeof reply, 0);
    target_open(p);
    r->receives_left = takes + 1;
    for (unsigned i = 0; i < RECEIVES; i++)
        post_receive(r);
    if (extended)
        x_go(r, stage);
    else
        v1_go(r, stage);
    return p;
}

/* HELLO, BLOCKS, REGISTER_BATCH, REGISTER_FINISHED, QEMU_FILE and FINISH are taken, GOODBYE is not: who owns the
   guest? */
Test(hostile_sink, takes_everything_but_goodbye) {
    struct play *p = deaf_sink(true, SX_FINISH, 6);
    SAY_EMPTY(&p->raw, T_FINISH_RESULT);
    source_must_fail(p, RMIG_ERR_HANDOVER, "handover|io-timeout|3s");
}

static uint64_t sent_so_far(const struct play *p) {
    struct rmig_stats stats;
    rmig_source_stats(p->source, &stats);
    return stats.control_sent;
}
static uint64_t sent_before;
static bool is_sent_more(const struct raw *r) { return sent_so_far(r->play) > sent_before; }

/* A source that has not said GOODBYE yet owns the guest, and may say so. */
Test(hostile_sink, leaves_before_it_takes_goodbye) {
    struct play *p = deaf_sink(true, SX_FINISH, 6);
    sent_before = sent_so_far(p);
    SAY_EMPTY(&p->raw, T_FINISH_RESULT);
    cr_assert(raw_until(&p->raw, is_sent_more, SIM_SECOND), "no GOODBYE was sent");
    raw_leave(&p->raw);
    source_must_fail(p, RMIG_ERR_HANDOVER, "handover|sink went away");
}

/* REGISTER_FINISHED is not taken, and all the same there is another READY. */
static void takes_no_end_of_round(bool extended) {
    struct play *p = deaf_sink(extended, extended ? SX_BATCH : S1_REGISTER, 3);
    struct raw *r = &p->raw;
    if (extended) {
        answer_batch(r);
    } else { // RAM_BLOCKS_REQUEST and two REGISTER_REQUESTs are taken
        answer_register(r);
        give_ready(r);
        expect(r, T_REGISTER_REQUEST);
        answer_register(r);
    }
    give_ready(r);
    pass_time(r, 10 * SIM_MS);
    give_ready(r);
    source_must_fail(p, RMIG_ERR_TIMEOUT, "sink|io-timeout|3s");
}
Test(hostile_sink, does_not_take_the_end_of_a_round) { takes_no_end_of_round(false); }
Test(hostile_sink, does_not_take_the_end_of_a_round_extended) { takes_no_end_of_round(true); }

/* The last bytes of the stream are not taken, and there is another READY: a version 1 source must not believe that
   all is there. */
Test(hostile_sink, does_not_take_the_end_of_the_stream) {
    struct play *p = deaf_sink(false, S1_ROUND, 4);
    give_ready(&p->raw);
    pass_time(&p->raw, 10 * SIM_MS);
    give_ready(&p->raw);
    source_must_fail(p, RMIG_ERR_HANDOVER, "sink may have everything|io-timeout|3s");
}

/* Writes go out and no completion ever comes. */
Test(hostile_sink, swallows_writes) {
    struct play *p = source_at(SX_BATCH);
    answer_batch(&p->raw);
    give_ready(&p->raw);
    pass_time(&p->raw, 20 * SIM_US);
    SIM_ONLY;
    sim_silence(p->sim);
    source_must_fail(p, RMIG_ERR_TIMEOUT, "sink|io-timeout|3s|writes to complete");
}

// --- the return path of a version 1 source: a second connection, for bytes to the source

TestSuite(return_path, .timeout = 600);

static void open_back(struct play *p, struct raw *back) {
    raw_open(back, p, p->fabric[0]);
    raw_connect(back, good_data, sizeof good_data, RECEIVES);
    cr_assert(back->established && get_be32(back->private_data) == 1 && get_be32(back->private_data + 4) == 0, "%s",
              back->text);
}

static void expect_back(struct raw *back, const void *bytes, size_t n) {
    expect(back, T_QEMU_FILE);
    cr_assert(back->m.len == n && back->m.repeat == 0, "%u bytes, %zu were due", back->m.len, n);
    cr_assert_eq(memcmp(back->m.payload, bytes, n), 0, "other bytes");
}

/* The migration has begun, a READY is in hand, and there is a return path. */
static struct play *with_return_path(struct raw *back) {
    struct play *p = play_new(SIM_ORDERED);
    struct raw *r = &p->raw;
    play_sink(p, RAM_LENGTH, ROM_LENGTH);
    connect_with(r, 0, RECEIVES);
    open_back(p, back);
    expect(r, T_READY);
    cr_assert(SAY(r, T_QEMU_FILE, 0, "q", 1));
    expect(r, T_READY);
    cr_assert(rmig_sink_has_return_path(p->sink));
    return p;
}

static void free_with_return_path(struct play *p, struct raw *back) {
    raw_close(back);
    play_free(p);
}

/* The embedder acts now. */
static void wake_sink(struct play *p) {
    if (p->sim != NULL) // its clock has stood still since it last did
        sim_spend(p->sim, 1, sim_max(raw_now(&p->raw), p->sim->side[1].time) - p->sim->side[1].time);
    if (!p->done)
        play_actor(p, sink_step);
}

static int put_back(struct play *p, const void *data, size_t n) {
    wake_sink(p);
    return rmig_sink_return_put(p->sink, data, n);
}

/* With PONG and SHUT, each when the source has said READY; the source then leaves by itself. */
static void migrate_with_return_path(enum sim_mode mode) {
    struct play *p = play_new(mode);
    struct raw back;
    p->world.key_bits = 32;
    p->returns = true;
    play_sink(p, RAM_LENGTH, ROM_LENGTH);
    struct stock_source *q = stock_source_new(p, MIB, 0);
    open_back(p, &back);
    give_ready(&back);
    stock_setup(q);
    expect_back(&back, pong, sizeof pong);
    stock_pass(q, every_page);
    stock_say_state(q);
    pass_time(q->r, SIM_SECOND);
    cr_assert(!p->done && back.inbox_count == 0, "SHUT did not wait for READY");
    cr_assert_eq(held.exposed, 0u);
    give_ready(&back);
    expect_back(&back, shut, sizeof shut);
    raw_leave(&back);
    raw_leave(q->r);
    stock_check_end(q);
    raw_close(&back);
    stock_source_free(q);
    play_free(p);
}
Test(return_path, whole_migration) { migrate_with_return_path(SIM_ORDERED); }
Test(return_path, whole_migration_over_iwarp) { migrate_with_return_path(SIM_LOCAL); }
Test(return_path, whole_migration_out_of_order) { migrate_with_return_path(SIM_UNORDERED); }

static char log_text[65536];
static void keep_log(void *user, const char *line) {
    (void)user;
    size_t n = strlen(log_text);
    snprintf(log_text + n, sizeof log_text - n, "%s\n", line);
}

/* The request comes before the sink has seen that the first connection is there. */
Test(return_path, requested_before_the_first_connection_is_seen) {
    SIM_ONLY;
    struct play *p = play_new(SIM_ORDERED);
    struct raw *r = &p->raw, back;
    struct rmig_error err = {0};
    p->cfg.trace = keep_log;
    play_sink(p, RAM_LENGTH, ROM_LENGTH);
    raw_open(&back, p, p->fabric[0]);
    raw_resolve(&back, RECEIVES);
    connect_with(r, 0, RECEIVES);
    be_busy(p);
    cr_assert_eq(back.ops->connect(back.ep, good_data, sizeof good_data, &err), RMIG_OK);
    cr_assert(raw_until(&back, is_connected, SIM_SECOND) && back.established, "%s", back.text);
    pass_time(r, SIM_MS);
    const char *accepted = strstr(log_text, "return path: accepted"), *seen = strstr(log_text, "connected, version 1");
    cr_assert(accepted != NULL && seen != NULL && seen < accepted, "%s", log_text); // the request waits for the news
    cr_assert(rmig_sink_has_return_path(p->sink));
    free_with_return_path(p, &back);
}

/* The link is so slow that the request comes when others are told that the sink is busy, and the news of the first
   connection is not there yet. */
Test(return_path, requested_late_on_a_slow_link) {
    SIM_ONLY;
    struct play *p = play_new(SIM_ORDERED);
    struct raw *r = &p->raw, back;
    struct rmig_error err = {0};
    p->world.latency_ns = 300 * SIM_MS;
    p->cfg.trace = keep_log;
    play_sink(p, RAM_LENGTH, ROM_LENGTH);
    raw_open(&back, p, p->fabric[0]);
    raw_resolve(&back, RECEIVES);
    raw_resolve(r, RECEIVES);
    cr_assert_eq(r->ops->connect(r->ep, good_data, sizeof good_data, &err), RMIG_OK);
    pass_time(r, 550 * SIM_MS);
    cr_assert_not(r->established);
    cr_assert_eq(back.ops->connect(back.ep, good_data, sizeof good_data, &err), RMIG_OK);
    cr_assert(raw_until(&back, is_connected, 5 * SIM_SECOND) && back.established, "%s", back.text);
    pass_time(r, SIM_SECOND);
    const char *accepted = strstr(log_text, "return path: accepted"), *seen = strstr(log_text, "connected, version 1");
    cr_assert(r->established && accepted != NULL && seen != NULL && accepted < seen, "%s", log_text);
    cr_assert(rmig_sink_has_return_path(p->sink));
    free_with_return_path(p, &back);
}

Test(return_path, each_message_waits_for_a_ready) {
    struct raw back;
    struct play *p = with_return_path(&back);
    cr_assert_eq(put_back(p, pong, sizeof pong), RMIG_OK);
    pass_time(&back, 100 * SIM_MS);
    cr_assert_eq(back.inbox_count, 0u, "the first message did not wait");
    give_ready(&back);
    expect_back(&back, pong, sizeof pong);
    cr_assert_eq(put_back(p, pong, sizeof pong), RMIG_OK);
    cr_assert_eq(put_back(p, shut, sizeof shut), RMIG_OK);
    pass_time(&back, 100 * SIM_MS);
    cr_assert_eq(back.inbox_count, 0u, "the second message did not wait");
    give_ready(&back);
    uint8_t both[16];
    memcpy(both, pong, 8);
    memcpy(both + 8, shut, 8);
    expect_back(&back, both, sizeof both); // what waits together goes together
    give_ready(&back);
    pass_time(&back, SIM_MS);
    cr_assert_eq(put_back(p, shut, sizeof shut), RMIG_OK);
    expect_back(&back, shut, sizeof shut);
    free_with_return_path(p, &back);
}

Test(return_path, no_more_than_4096_bytes_wait) {
    struct raw back;
    struct play *p = with_return_path(&back);
    uint8_t bytes[4097], all[4096];
    for (size_t i = 0; i < sizeof bytes; i++)
        bytes[i] = (uint8_t)(i * 7 + i / 256);
    cr_assert_eq(put_back(p, bytes, 4097), RMIG_ERR_ARGUMENT);
    check_text(rmig_sink_error(p->sink)->text, "4097|4096");
    cr_assert_eq(put_back(p, NULL, 1), RMIG_ERR_ARGUMENT);
    cr_assert_eq(put_back(p, NULL, 0), RMIG_OK);
    cr_assert_eq(put_back(p, bytes, 4000), RMIG_OK);
    cr_assert_eq(put_back(p, bytes, 97), RMIG_ERR_FULL);
    check_text(rmig_sink_error(p->sink)->text, "4000|97|4096");
    cr_assert_eq(put_back(p, bytes + 4000, 96), RMIG_OK);
    cr_assert_eq(put_back(p, bytes, 1), RMIG_ERR_FULL);
    memcpy(all, bytes, sizeof all);
    give_ready(&back);
    expect_back(&back, all, sizeof all);
    pass_time(&back, SIM_MS);
    cr_assert_eq(put_back(p, bytes, 4096), RMIG_OK);
    give_ready(&back);
    expect_back(&back, all, sizeof all);
    free_with_return_path(p, &back);
}

/* Bytes that are put while a message is under way go in the next. */
Test(return_path, bytes_behind_a_message_under_way) {
    struct raw back;
    struct play *p = with_return_path(&back);
    give_ready(&back);
    pass_time(&back, SIM_MS);
    cr_assert_eq(put_back(p, pong, sizeof pong), RMIG_OK);
    pass_time(&back, SIM_US); // it leaves
    cr_assert_eq(put_back(p, shut, sizeof shut), RMIG_OK);
    expect_back(&back, pong, sizeof pong);
    give_ready(&back);
    expect_back(&back, shut, sizeof shut);
    free_with_return_path(p, &back);
}

static void put_is_refused(struct play *p) {
    cr_assert_eq(rmig_sink_return_put(p->sink, pong, sizeof pong), RMIG_ERR_STATE);
    check_text(rmig_sink_error(p->sink)->text, "rmig_sink_return_put");
    cr_assert_not(rmig_sink_has_return_path(p->sink));
}

Test(return_path, put_without_one_is_refused) {
    struct play *p = play_new(SIM_ORDERED);
    struct raw *r = &p->raw;
    play_sink(p, RAM_LENGTH, ROM_LENGTH);
    put_is_refused(p);
    connect_with(r, 0, RECEIVES);
    expect(r, T_READY);
    put_is_refused(p);
    cr_assert(SAY(r, T_QEMU_FILE, 0, "q", 1));
    expect(r, T_READY);
    put_is_refused(p);
    cr_assert(SAY_EMPTY(r, T_RAM_BLOCKS_REQUEST));
    expect(r, T_RAM_BLOCKS_RESULT);
    play_free(p);
}

Test(return_path, put_to_an_extended_source_is_refused) {
    struct play *p = sink_at(X_BLOCKS);
    put_is_refused(p);
    play_free(p);
}

/* Whoever comes behind it, with other private data, too late or to an extended source, is turned away. */
static void turned_away(struct play *p, uint32_t flags) {
    struct raw more;
    uint8_t data[8];
    raw_open(&more, p, p->fabric[0]);
    pack(data, "ww", (const uint64_t[]){1, flags});
    raw_connect(&more, data, sizeof data, RECEIVES);
    cr_assert(more.gone && !more.established, "%s", more.text); // rejected, or nobody listens any more
    raw_close(&more);
}

Test(return_path, a_third_connection_is_rejected) {
    struct play *p = play_new(SIM_ORDERED);
    struct raw back;
    play_sink(p, RAM_LENGTH, ROM_LENGTH);
    connect_with(&p->raw, 0, RECEIVES);
    turned_away(p, PIN_ALL);
    turned_away(p, EXTENSION);
    open_back(p, &back);
    for (unsigned i = 0; i < 5; i++)
        turned_away(p, 0);
    expect(&p->raw, T_READY);
    cr_assert(rmig_sink_has_return_path(p->sink) && !p->done);
    free_with_return_path(p, &back);
}

Test(return_path, a_second_connection_behind_the_first_message_is_rejected) {
    struct play *p = sink_at(V1_STREAM);
    turned_away(p, 0);
    play_free(p);
}

Test(return_path, a_second_connection_to_an_extended_session_is_rejected) {
    for (enum sink_stage stage = X_READY; stage <= X_BLOCKS; stage++) {
        struct play *p = sink_at(stage);
        turned_away(p, EXTENSION);
        turned_away(p, 0);
        play_free(p);
    }
}

/* It may be the same source, by another address. */
static struct play *sink_with_two(struct raw *next) {
    struct play *p = sink_at(X_CONNECTED);
    struct rmig_error err = {0};
    uint8_t data[8];
    raw_open(next, p, p->fabric[0]);
    raw_resolve(next, RECEIVES);
    pack(data, "ww", (const uint64_t[]){1, EXTENSION});
    cr_assert_eq(next->ops->connect(next->ep, data, sizeof data, &err), RMIG_OK, "%s", err.text);
    return p;
}

Test(hostile_source, whoever_comes_while_it_stays_silent_hears_that_the_sink_is_busy) {
    struct raw next;
    struct play *p = sink_with_two(&next);
    cr_assert(raw_until(&next, is_gone, timeout_of(SIM_SECOND)), "it still waits");
    cr_assert(!next.established && p->forgotten == 0);
    raw_close(&next);
    play_free(p);
}

Test(hostile_source, whoever_comes_while_it_has_said_nothing_waits_for_its_end) {
    struct raw next;
    struct play *p = sink_with_two(&next);
    pass_time(&next, SIM_SECOND / 10);
    cr_assert(!next.gone && !next.established && p->forgotten == 0, "%s", next.text);
    raw_drop(&p->raw);
    cr_assert(raw_until(&next, is_connected, SIM_SECOND) && next.established, "%s", next.text);
    go_extended(&next, X_READY);
    raw_close(&next);
    play_free(p);
}

/* One that breaks before the migration has begun leaves its place to another. */
Test(return_path, the_next_takes_the_place_of_one_that_broke) {
    struct play *p = play_new(SIM_ORDERED);
    struct raw back;
    play_sink(p, RAM_LENGTH, ROM_LENGTH);
    connect_with(&p->raw, 0, RECEIVES);
    for (unsigned i = 0; i < 3; i++) {
        open_back(p, &back);
        SAY_EMPTY(&back, T_KEEPALIVE);
        cr_assert(raw_until(&back, is_gone, SIM_SECOND));
        raw_close(&back);
    }
    open_back(p, &back);
    expect(&p->raw, T_READY);
    cr_assert(SAY(&p->raw, T_QEMU_FILE, 0, "q", 1));
    give_ready(&back);
    pass_time(&back, SIM_MS);
    cr_assert_eq(put_back(p, pong, sizeof pong), RMIG_OK);
    expect_back(&back, pong, sizeof pong);
    free_with_return_path(p, &back);
}

/* What is wrong on it ends nothing while no bytes wait for it. The first bytes then do. */
static void broken_without_bytes(struct play *p, struct raw *back, int status, const char *needles) {
    pass_time(&p->raw, 10 * SIM_MS);
    cr_assert(back->ep == NULL || raw_until(back, is_gone, SIM_SECOND), "rmig did not hang up");
    cr_assert_not(p->done, "%s", p->text);
    cr_assert_not(rmig_sink_has_return_path(p->sink));
    cr_assert(SAY_EMPTY(&p->raw, T_RAM_BLOCKS_REQUEST)); // the session goes on
    expect(&p->raw, T_RAM_BLOCKS_RESULT);
    expect(&p->raw, T_READY);
    int got = put_back(p, pong, sizeof pong);
    cr_assert(alike(p, got, status), "%s", rmig_status_name(got));
    must_fail(p, status, needles);
    check_untouched(p);
    free_with_return_path(p, back);
}

static void broken_with_bytes(struct play *p, struct raw *back, int status, const char *needles) {
    must_fail(p, status, needles);
    check_untouched(p);
    free_with_return_path(p, back);
}

#define RETURN_BREAKS(name, status, needles, ...)                                                                      \
    Test(return_path, name) {                                                                                          \
        struct raw back, *b = &back;                                                                                   \
        struct play *p = with_return_path(b);                                                                          \
        __VA_ARGS__;                                                                                                   \
        broken_without_bytes(p, b, RMIG_ERR_##status, "return path|8 bytes|" needles);                                 \
    }                                                                                                                  \
    Test(return_path, name##_while_bytes_wait) {                                                                       \
        struct raw back, *b = &back;                                                                                   \
        struct play *p = with_return_path(b);                                                                          \
        cr_assert_eq(put_back(p, pong, sizeof pong), RMIG_OK);                                                         \
        pass_time(b, SIM_MS);                                                                                          \
        __VA_ARGS__;                                                                                                   \
        broken_with_bytes(p, b, RMIG_ERR_##status, "return path|8 bytes|" needles);                                    \
    }
RETURN_BREAKS(leaves, PEER_GONE, "disconnected", raw_leave(b))
RETURN_BREAKS(vanishes, PEER_GONE, "disconnected", raw_drop(b))
RETURN_BREAKS(message_of_0_bytes, PROTOCOL, "0 bytes|READY was due", send_bytes(b, ZEROES(1), 0))
RETURN_BREAKS(message_of_15_bytes, PROTOCOL, "15 bytes|READY was due", send_bytes(b, ZEROES(15), 15))
RETURN_BREAKS(ready_with_payload, PROTOCOL, "READY (type 2, len 1)|READY was due", SAY(b, T_READY, 1, "b", 0))
RETURN_BREAKS(ready_cut, PROTOCOL, "READY was due", say_bytes(b, T_READY, 1, 1, NULL, 0))
RETURN_BREAKS(another_type, PROTOCOL, "REGISTER_FINISHED (type 9|READY was due", SAY_EMPTY(b, T_REGISTER_FINISHED))
RETURN_BREAKS(stream, PROTOCOL, "QEMU_FILE (type 3|READY was due", SAY(b, T_QEMU_FILE, 0, "q", 1))
RETURN_BREAKS(type_of_32_bits, PROTOCOL, "type 4294967295|READY was due", SAY_EMPTY(b, 0xffffffff))
RETURN_BREAKS(error, PROTOCOL, "ERROR (type 1|READY was due", SAY_EMPTY(b, T_ERROR))
RETURN_BREAKS(message_longer_than_a_receive, FABRIC, "", say_many(b, T_READY, 1, 100))
RETURN_BREAKS(message_of_half_a_megabyte, FABRIC, "", say_many(b, T_READY, 1, 524272))

Test(return_path, two_readys) {
    struct raw back;
    struct play *p = with_return_path(&back);
    give_ready(&back);
    pass_time(&back, SIM_MS);
    give_ready(&back);
    broken_without_bytes(p, &back, RMIG_ERR_PROTOCOL, "return path|READY before the one before it was used");
}

Test(return_path, a_storm_of_readys) {
    struct raw back;
    struct play *p = with_return_path(&back);
    for (unsigned i = 0; i < 15; i++)
        SAY_EMPTY(&back, T_READY);
    pass_time(&back, SIM_MS);
    cr_assert_not(p->done, "%s", p->text);
    cr_assert_not(rmig_sink_has_return_path(p->sink));
    free_with_return_path(p, &back);
}

/* Junk on it, and the migration ends well all the same. */
Test(return_path, a_migration_outlives_it) {
    struct play *p = play_new(SIM_ORDERED);
    struct raw back;
    play_sink(p, RAM_LENGTH, ROM_LENGTH);
    struct stock_source *q = stock_source_new(p, MIB, 0);
    open_back(p, &back);
    stock_setup(q);
    SAY(&back, T_CLEAR_BATCH, 1, "wwqq", 0, RAM, 0, PAGE);
    stock_pass(q, every_page);
    cr_assert(back.gone || raw_until(&back, is_gone, SIM_SECOND));
    stock_finish(q);
    raw_close(&back);
    stock_source_free(q);
    play_free(p);
}

Test(return_path, no_ready_ever) {
    struct raw back;
    struct play *p = with_return_path(&back);
    cr_assert_eq(put_back(p, pong, sizeof pong), RMIG_OK);
    for (unsigned i = 0; i < 2; i++) { // the first connection is busy, which does not help
        pass_time(&p->raw, SIM_SECOND);
        cr_assert_not(p->done, "%s", p->text);
        cr_assert(SAY(&p->raw, T_QEMU_FILE, 0, "q", 1));
        expect(&p->raw, T_READY);
    }
    broken_with_bytes(p, &back, RMIG_ERR_TIMEOUT, "return path|8 bytes|no READY|3s (io-timeout)");
}

/* READY, but nobody takes the message. */
Test(return_path, message_not_taken) {
    NEEDS_RECEIVES;
    struct play *p = play_new(SIM_ORDERED);
    struct raw *r = &p->raw, back;
    play_sink(p, RAM_LENGTH, ROM_LENGTH);
    connect_with(r, 0, RECEIVES);
    raw_open(&back, p, p->fabric[0]);
    back.by_hand = true;
    raw_connect(&back, good_data, sizeof good_data, 0);
    expect(r, T_READY);
    cr_assert(SAY(r, T_QEMU_FILE, 0, "q", 1));
    give_ready(&back);
    pass_time(&back, SIM_MS);
    cr_assert_eq(put_back(p, pong, sizeof pong), RMIG_OK);
    pass_time(r, SIM_SECOND);
    cr_assert(SAY(r, T_QEMU_FILE, 0, "q", 1));
    broken_with_bytes(p, &back, RMIG_ERR_TIMEOUT, "return path|8 bytes|no delivery|3s (io-timeout)");
}

/* A request that was accepted and never comes up holds its place no longer than connect-timeout. */
Test(return_path, never_established) {
    SIM_ONLY;
    struct play *p = play_new(SIM_ORDERED);
    struct raw *r = &p->raw, back;
    struct rmig_error err = {0};
    play_sink(p, RAM_LENGTH, ROM_LENGTH);
    connect_with(r, 0, RECEIVES);
    raw_open(&back, p, p->fabric[0]);
    raw_resolve(&back, RECEIVES);
    cr_assert_eq(back.ops->connect(back.ep, good_data, sizeof good_data, &err), RMIG_OK);
    while (held.endpoints < 3)
        pass_time(r, 100);
    struct sim_ep *ep = p->sim->side[1].eps;
    ep->ended = true; // nothing is ever heard of it
    expect(r, T_READY);
    cr_assert(SAY(r, T_QEMU_FILE, 0, "q", 1));
    expect(r, T_READY);
    pass_time(r, 19 * SIM_SECOND / 10);
    cr_assert(!p->done && held.endpoints == 2 && !rmig_sink_has_return_path(p->sink)); // the listener is closed
    SAY(r, T_QEMU_FILE, 0, "q", 1);
    pass_time(r, SIM_SECOND / 5);
    cr_assert(!p->done && held.endpoints == 1, "%s", p->text);
    cr_assert_eq(put_back(p, pong, sizeof pong), RMIG_ERR_TIMEOUT);
    broken_with_bytes(p, &back, RMIG_ERR_TIMEOUT, "return path|8 bytes|no connection|2s (connect-timeout)");
}

/* The first connection goes, and the return path with it: the next source may come. */
Test(return_path, is_forgotten_with_its_source) {
    struct play *p = play_new(SIM_ORDERED);
    struct raw back;
    play_sink(p, RAM_LENGTH, ROM_LENGTH);
    connect_with(&p->raw, 0, RECEIVES);
    open_back(p, &back);
    pass_time(&back, SIM_MS);
    cr_assert(rmig_sink_has_return_path(p->sink));
    raw_leave(&p->raw);
    check_forgotten(p, RMIG_ERR_PEER_GONE, "source went away");
    cr_assert(raw_until(&back, is_gone, SIM_SECOND));
    raw_close(&back);
    serve_stock(p);
    play_free(p);
}

// --- the return path: complete

/* All but the last READY: the embedder has put SHUT and called complete. */
static struct play *shut_waits(struct raw *back) {
    struct play *p = with_return_path(back);
    cr_assert(SAY_EMPTY(&p->raw, T_RAM_BLOCKS_REQUEST));
    expect(&p->raw, T_RAM_BLOCKS_RESULT);
    expect(&p->raw, T_READY);
    register_chunk(&p->raw, 0, RAM, 3);
    cr_assert_eq(held.exposed, 1u);
    cr_assert_eq(put_back(p, shut, sizeof shut), RMIG_OK);
    cr_assert_eq(rmig_sink_complete(p->sink), RMIG_OK);
    cr_assert(held.exposed == 0 || !p->sink->ss.caps.revokes, "complete leaves memory that the source can write");
    cr_assert_eq(rmig_sink_return_put(p->sink, pong, sizeof pong), RMIG_ERR_STATE);
    pass_time(back, SIM_SECOND);
    cr_assert(!p->done && p->finished == 0);
    return p;
}

Test(return_path, complete_waits_for_delivery) {
    struct raw back;
    struct play *p = shut_waits(&back);
    give_ready(&back);
    expect_back(&back, shut, sizeof shut);
    run_to_end(p, SIM_SECOND);
    cr_assert(p->status == RMIG_OK && p->finished == 1, "%s", p->text);
    free_with_return_path(p, &back);
}

/* Without READY nothing has left: the guest is the source's, without a doubt. */
Test(return_path, complete_without_ready) {
    struct raw back;
    struct play *p = shut_waits(&back);
    broken_with_bytes(p, &back, RMIG_ERR_TIMEOUT, "return path|8 bytes|no READY|3s (io-timeout)");
}

Test(return_path, complete_and_it_leaves) {
    struct raw back;
    struct play *p = shut_waits(&back);
    raw_leave(&back);
    broken_with_bytes(p, &back, RMIG_ERR_PEER_GONE, "return path|8 bytes|disconnected");
}

/* The first connection is of no more use. */
Test(return_path, complete_and_the_first_connection_goes) {
    struct raw back;
    struct play *p = shut_waits(&back);
    raw_drop(&p->raw);
    pass_time(&back, SIM_MS);
    give_ready(&back);
    expect_back(&back, shut, sizeof shut);
    run_to_end(p, SIM_SECOND);
    cr_assert(p->status == RMIG_OK && p->finished == 1, "%s", p->text);
    free_with_return_path(p, &back);
}

Test(return_path, complete_and_cancel) {
    struct raw back;
    struct play *p = shut_waits(&back);
    rmig_sink_cancel(p->sink);
    wake_sink(p);
    broken_with_bytes(p, &back, RMIG_ERR_CANCELLED, "cancelled");
}

/* SHUT is on its way and not known to be there: nobody can know who owns the guest. */
Test(return_path, complete_and_shut_is_lost) {
    SIM_ONLY;
    struct raw back;
    struct play *p = shut_waits(&back);
    give_ready(&back);
    pass_time(&back, 3 * SIM_US);
    sim_silence(p->sim);
    pass_time(&back, SIM_US);
    broken_with_bytes(p, &back, RMIG_ERR_HANDOVER, "handover|the sink has everything|return path|8 bytes|io-timeout");
}

// --- the return path: close

struct leaving {
    struct raw *r[2];
    uint64_t at;
    bool early; // rmig's end went first
};

static uint64_t leave_step(void *user, uint64_t now) {
    struct leaving *l = user;
    for (unsigned i = 0; i < 2; i++) {
        raw_poll(l->r[i], l->r[i]->ep);
        l->early = l->early || l->r[i]->gone;
    }
    if (now < l->at)
        return l->at;
    for (unsigned i = 0; i < 2; i++)
        l->r[i]->ops->disconnect(l->r[i]->ep);
    return SIM_DONE;
}

/* Closes a sink that has finished; the source leaves after `stay`. How long that took. */
static uint64_t close_after(uint64_t stay, bool *early) {
    struct raw back;
    struct play *p = shut_waits(&back);
    give_ready(&back);
    expect_back(&back, shut, sizeof shut);
    run_to_end(p, SIM_SECOND);
    cr_assert_eq(p->status, RMIG_OK, "%s", p->text);
    wake_sink(p);
    struct leaving l = {{&p->raw, &back}, raw_now(&back) + stay, false};
    uint64_t begin = p->sim->side[1].time;
    sim_actor(p->sim, 0, leave_step, &l);
    rmig_sink_close(p->sink);
    p->sink = NULL;
    uint64_t took = p->sim->side[1].time - begin;
    sim_actor(p->sim, 0, NULL, NULL);
    *early = l.early;
    free_with_return_path(p, &back);
    return took;
}

Test(return_path, close_lets_the_source_leave_first) {
    SIM_ONLY;
    bool early;
    uint64_t took = close_after(50 * SIM_MS, &early);
    cr_assert(!early && took >= 49 * SIM_MS && took < 60 * SIM_MS, "%llu ns", (unsigned long long)took);
}

Test(return_path, close_does_not_wait_for_ever) {
    SIM_ONLY;
    bool early;
    uint64_t took = close_after(1000 * SIM_SECOND, &early);
    cr_assert(took >= SIM_SECOND && took < SIM_SECOND + 10 * SIM_MS, "%llu ns", (unsigned long long)took);
}

// --- the return path: cancel and close at every step

struct blow {
    struct play *p;
    uint64_t at, step;
    bool close, fell;
};

static uint64_t blow_step(void *user, uint64_t now) {
    struct blow *b = user;
    struct play *p = b->p;
    bool falls = b->step++ == b->at;
    b->fell = b->fell || falls;
    if (falls && !b->close)
        rmig_sink_cancel(p->sink);
    uint64_t next = falls && b->close ? SIM_DONE : sink_step(p, now);
    if ((falls && b->close) || (p->done && p->status < 0)) {
        rmig_sink_close(p->sink);
        p->sink = NULL;
        return SIM_DONE;
    }
    return next;
}

static bool comes(struct raw *r, uint32_t type) {
    while (next_message(r, 100 * SIM_MS))
        if (r->m.type == type)
            return true;
    return false;
}

/* A whole session with a return path, as far as rmig goes along. */
static void go_along(struct play *p, struct raw *back) {
    struct raw *r = &p->raw;
    raw_connect(r, good_data, sizeof good_data, RECEIVES);
    if (r->gone)
        return;
    raw_connect(back, good_data, sizeof good_data, RECEIVES);
    if (back->gone || !SAY_EMPTY(back, T_READY) || !comes(r, T_READY) || !SAY(r, T_QEMU_FILE, 0, "q", 1))
        return;
    if (!comes(back, T_QEMU_FILE) || !SAY_EMPTY(back, T_READY) || !comes(r, T_READY))
        return;
    if (!SAY_EMPTY(r, T_RAM_BLOCKS_REQUEST) || !comes(r, T_RAM_BLOCKS_RESULT) || !comes(r, T_READY))
        return;
    if (!SAY_EMPTY(r, T_REGISTER_FINISHED) || !comes(r, T_READY))
        return;
    p->stream_due = 16;
    if (SAY(r, T_QEMU_FILE, 0, "q", 1) && comes(back, T_QEMU_FILE)) {
        raw_leave(back);
        raw_leave(r);
    }
}

/* Returns how many steps there were. */
static uint64_t blow_everywhere(bool close) {
    for (struct blow b = {.close = close};; b.at++) {
        struct raw back;
        b.p = play_new(SIM_ORDERED);
        b.step = 0;
        b.fell = false;
        b.p->returns = true;
        play_sink(b.p, RAM_LENGTH, ROM_LENGTH);
        sim_actor(b.p->sim, 1, blow_step, &b);
        raw_open(&back, b.p, b.p->fabric[0]);
        go_along(b.p, &back);
        pass_time(&back, 100 * SIM_MS);
        bool known = b.p->status == RMIG_OK || b.p->status == RMIG_ERR_CANCELLED || b.p->status == RMIG_ERR_HANDOVER;
        cr_assert(close || (b.p->done && known), "cancel at step %llu: %s %s", (unsigned long long)b.at,
                  rmig_status_name(b.p->status), b.p->text);
        cr_assert_eq(held.exposed, 0u);
        check_untouched(b.p);
        free_with_return_path(b.p, &back);
        if (!b.fell)
            return b.at;
    }
}

Test(return_path, cancel_at_every_step) {
    SIM_ONLY;
    cr_assert_gt(blow_everywhere(false), 15u);
}

Test(return_path, close_at_every_step) {
    SIM_ONLY;
    cr_assert_gt(blow_everywhere(true), 15u);
}

/* Each operation of rmig's end fails once. */
static void fail_everywhere(enum sim_fault_kind kind, enum sim_op op) {
    for (uint64_t nth = 1;; nth++) {
        struct raw back;
        struct blow b = {.at = UINT64_MAX};
        struct play *p = b.p = play_new(SIM_ORDERED);
        p->returns = true;
        p->world.faults[0] = (struct sim_fault){kind, op, 1, nth};
        play_sink(p, RAM_LENGTH, ROM_LENGTH);
        sim_actor(p->sim, 1, blow_step, &b);
        raw_open(&back, p, p->fabric[0]);
        go_along(p, &back);
        pass_time(&back, 10 * SIM_SECOND);
        bool fell = sim_stats(p->sim, 1)->faults > 0, listens = held.regions == 0 && held.endpoints == 1;
        cr_assert(p->done || listens, "fault %d of operation %d, %llu: the sink hangs", (int)kind, (int)op,
                  (unsigned long long)nth);
        cr_assert(p->status == RMIG_OK || p->text[0] != '\0');
        cr_assert_eq(held.exposed, 0u);
        check_untouched(p);
        free_with_return_path(p, &back);
        if (!fell)
            return;
    }
}

Test(return_path, every_operation_fails_once) {
    SIM_ONLY;
    static const enum sim_op ops[] = {SIM_OPEN_REQUEST, SIM_REJECT, SIM_ACCEPT, SIM_REG,
                                      SIM_DEREG,        SIM_RECV,   SIM_SEND,   SIM_POLL};
    for (size_t i = 0; i < sizeof ops / sizeof ops[0]; i++)
        fail_everywhere(SIM_FAULT_ERROR, ops[i]);
    fail_everywhere(SIM_FAULT_COMPLETION, SIM_SEND);
    fail_everywhere(SIM_FAULT_COMPLETION, SIM_RECV);
    fail_everywhere(SIM_FAULT_FULL, SIM_SEND);
    fail_everywhere(SIM_FAULT_FULL, SIM_RECV);
}

// --- the listener survives

/* Every kind of bad beginning, over and over: the sink holds no more afterwards, and the next source is served. */
Test(hostile_source, a_hundred_bad_beginnings) {
    struct play *p = play_new(SIM_ORDERED);
    struct raw *r = &p->raw;
    play_sink(p, RAM_LENGTH, ROM_LENGTH);
    for (unsigned i = 0; i < 100; i++) {
        connect_with(r, i % 2 == 0 ? EXTENSION : 0, RECEIVES);
        if (i % 5 == 0)
            raw_leave(r);
        else if (i % 5 == 1)
            SAY_EMPTY(r, i);
        else if (i % 5 == 2)
            send_bytes(r, ZEROES(15), i % 16);
        else if (i % 5 == 3)
            SAY_EMPTY(r, T_ERROR);
        raw_drop(r);
        pass_time(r, 20 * SIM_MS);
        cr_assert(raw_until(r, is_listening, 150 * SIM_MS), "%u: something is left", i);
        cr_assert_not(p->done, "%u: %s", i, p->text);
    }
    check_untouched(p);
    p->connected = 0;
    serve_stock(p);
    play_free(p);
}

/* Who comes while the sink still takes leave of another is not turned away. */
Test(hostile_source, the_next_comes_while_the_sink_parts_with_one) {
    struct play *p = play_new(SIM_ORDERED);
    struct raw bad;
    play_sink(p, RAM_LENGTH, ROM_LENGTH);
    raw_open(&bad, p, p->fabric[0]);
    bad.by_hand = true; // it takes nothing, its ERROR neither
    uint8_t data[8];
    pack(data, "ww", (const uint64_t[]){1, EXTENSION});
    raw_connect(&bad, data, sizeof data, 0);
    SAY_EMPTY(&bad, T_GOODBYE);
    cr_assert(raw_until(&bad, has_forgotten, SIM_SECOND));
    cr_assert_eq(rmig_sink_error(p->sink)->status, RMIG_ERR_PROTOCOL);
    p->connected = 0;
    serve_stock(p);
    raw_close(&bad);
    play_free(p);
}

/* Cancelled and closed while the sink takes leave of a source. */
Test(hostile_source, cancel_while_the_sink_parts_with_one) {
    for (unsigned cancel = 0; cancel < 2; cancel++) {
        struct play *p = play_new(SIM_ORDERED);
        play_sink(p, RAM_LENGTH, ROM_LENGTH);
        p->raw.by_hand = true;
        connect_with(&p->raw, EXTENSION, 0);
        SAY_EMPTY(&p->raw, T_GOODBYE);
        cr_assert(raw_until(&p->raw, has_forgotten, SIM_SECOND));
        cr_assert(cancel == 0 || rmig_sink_refuse(p->sink, "no") == RMIG_ERR_STATE);
        if (cancel) {
            rmig_sink_cancel(p->sink);
            wake_sink(p);
            run_to_end(p, SIM_SECOND);
            cr_assert_eq(p->status, RMIG_ERR_CANCELLED);
        }
        play_free(p);
    }
}

/* The embedder does not want this source: told why, it goes, and the blocks that were added serve the next. */
Test(hostile_source, refused_by_the_embedder_while_it_thinks) {
    struct play *p = sink_at(X_READY);
    struct raw *r = &p->raw;
    p->think = true;
    cr_assert(say_both_blocks(r));
    pass_time(r, SIM_MS);
    wake_sink(p);
    cr_assert_eq(rmig_sink_refuse(p->sink, "not this guest"), RMIG_OK);
    cr_assert_eq(rmig_sink_accept_blocks(p->sink), RMIG_ERR_STATE);
    expect(r, T_ERROR);
    cr_assert(r->m.len > 14 && memcmp(r->m.payload + r->m.len - 14, "not this guest", 14) == 0);
    cr_assert(raw_until(r, has_forgotten, SIM_SECOND));
    sink_must_forget(p, RMIG_ERR_SETUP, "not this guest");
}

/* Three sources name blocks that are not here, then one comes whose blocks are: they were added once. */
Test(hostile_source, blocks_that_differ_three_times) {
    struct play *p = sink_at(X_READY);
    struct raw *r = &p->raw;
    for (unsigned i = 0; i < 3; i++) {
        cr_assert(say_blocks(r, 1, 0, i == 1 ? "rom" : "ram", RAM_LENGTH + PAGE));
        check_forgotten(p, RMIG_ERR_SETUP, i == 1 ? "\"rom\"|4198400" : "\"ram\"|4198400|4194304");
        connect_with(r, EXTENSION, RECEIVES);
        go_extended(r, X_READY);
        p->connected = 0;
    }
    raw_leave(r);
    sink_must_forget(p, RMIG_ERR_PEER_GONE, "source went away");
}

/* Bytes that a forgotten source put into the stream are nobody's. */
Test(hostile_source, stream_bytes_go_with_their_source) {
    struct play *p = sink_at(X_READY);
    struct raw *r = &p->raw;
    uint8_t byte;
    cr_assert(SAY(r, T_QEMU_FILE, 0, "q", 1));
    expect(r, T_READY);
    cr_assert_eq(p->stream_size, 8u);
    play_actor(p, NULL);
    cr_assert(SAY(r, T_QEMU_FILE, 0, "qq", 1, 2));
    pass_time(r, SIM_MS);
    struct rmig_sink_event ev;
    do {
        sim_spend(p->sim, 1, SIM_MS);
        cr_assert_eq(rmig_sink_process(p->sink, &ev), RMIG_OK);
    } while (ev.type != RMIG_SINK_STREAM);
    cr_assert_eq(rmig_sink_get(p->sink, &byte, 1), 1u);
    cr_assert_eq(rmig_sink_refuse(p->sink, "no"), RMIG_OK);
    cr_assert_eq(rmig_sink_get(p->sink, &byte, 1), 0u);
    wake_sink(p);
    sink_must_forget(p, RMIG_ERR_SETUP, "no");
}

/* What fails at this end on account of one source costs that source its connection, and the embedder learns why. */
static void one_fails(enum sim_op op, const char *needles) {
    struct play *p = play_new(SIM_ORDERED);
    struct raw *r = &p->raw;
    p->world.faults[0] = (struct sim_fault){SIM_FAULT_ERROR, op, 1, 1};
    play_sink(p, RAM_LENGTH, ROM_LENGTH);
    raw_connect(r, good_data, sizeof good_data, RECEIVES);
    cr_assert(r->gone && !r->established);
    cr_assert_leq(held.rejects, 1u, "one request was rejected %llu times", (unsigned long long)held.rejects);
    check_forgotten(p, RMIG_ERR_FABRIC, needles);
    serve_stock(p);
    play_free(p);
}
Test(hostile_source, request_cannot_be_opened) { one_fails(SIM_OPEN_REQUEST, "open_request"); }
Test(hostile_source, control_buffers_cannot_be_registered) { one_fails(SIM_REG, "reg"); }
Test(hostile_source, receive_cannot_be_posted) { one_fails(SIM_RECV, "recv"); }
Test(hostile_source, request_cannot_be_accepted) { one_fails(SIM_ACCEPT, "accept"); }

/* 200 strangers knock at once: a call takes 16 of them and comes back, and the migration that is under way goes on. */
Test(hostile_source, a_flood_of_requests) {
    SIM_ONLY;
    struct play *p = sink_at(X_READY);
    struct raw *r = &p->raw;
    struct rmig_ep *ep[200];
    struct rmig_error err = {0};
    struct rmig_fabric_event e;
    struct rmig_sink_event ev;
    char address[80];
    play_actor(p, NULL);
    for (unsigned i = 0; i < 200; i++)
        cr_assert_eq(r->ops->open(r->fabric, p->address, &raw_depths, &ep[i], &err), RMIG_OK, "%s", err.text);
    pass_time(r, SIM_MS);
    for (unsigned i = 0; i < 200; i++) {
        cr_assert(r->ops->poll(ep[i], &e, 1, &err) == 1 && e.type == RMIG_FEV_RESOLVED);
        cr_assert_eq(r->ops->connect(ep[i], good_data, sizeof good_data, &err), RMIG_OK, "%s", err.text);
    }
    pass_time(r, SIM_MS);
    sim_spend(p->sim, 1, 10 * SIM_MS);
    for (unsigned calls = 1; held.rejects < 200; calls++) {
        uint64_t before = held.rejects;
        cr_assert_leq(calls, 20u, "only %llu of 200 were rejected", (unsigned long long)held.rejects);
        cr_assert_eq(rmig_sink_process(p->sink, &ev), RMIG_OK);
        cr_assert_leq(held.rejects - before, 16u);
        cr_assert(held.rejects == 200 || rmig_sink_next_deadline(p->sink) == 0, "it would sleep");
    }
    for (unsigned i = 0; i < 200; i++)
        r->ops->close(ep[i]);
    wake_sink(p);
    cr_assert(say_both_blocks(r));
    expect(r, T_BLOCKS_RESULT);
    cr_assert_eq(held.endpoints, 1, "the listener is open although nobody else may come");
    cr_assert_eq(rmig_sink_address(p->sink, address, sizeof address), RMIG_OK);
    cr_assert_str_eq(address, p->address);
    cr_assert_eq(rmig_sink_address(p->sink, address, strlen(p->address)), RMIG_ERR_ARGUMENT);
    play_free(p);
}

/* A version 1 source may open its return path before it has said anything, and no connection afterwards. */
Test(return_path, nobody_is_listened_to_behind_the_first_message) {
    struct raw back;
    struct play *p = with_return_path(&back);
    cr_assert_eq(held.endpoints, 2);
    free_with_return_path(p, &back);
}

/* A connection that has something to tell without end holds no call for ever. */
static struct rmig_ep *chatty;
static int chatty_poll(struct rmig_ep *ep, struct rmig_fabric_event *events, size_t n, struct rmig_error *err) {
    if (ep != chatty)
        return held.below->poll(ep, events, n, err);
    memset(events, 0, n * sizeof *events);
    for (size_t i = 0; i < n; i++)
        events[i].type = RMIG_FEV_RESOLVED;
    return (int)n;
}

static void chatters(bool back) {
    SIM_ONLY;
    struct raw other;
    struct play *p = with_return_path(&other);
    struct rmig_sink_event ev;
    play_actor(p, NULL);
    chatty = back ? p->sink->ret.ep : p->sink->ss.ep;
    held.ops.poll = chatty_poll;
    cr_assert_eq(rmig_sink_process(p->sink, &ev), RMIG_OK);
    cr_assert_eq(rmig_sink_next_deadline(p->sink), 0u, "it would sleep");
    held.ops.poll = held.below->poll;
    free_with_return_path(p, &other);
}
Test(hostile_source, has_events_without_end, .timeout = 600) { chatters(false); }
Test(return_path, has_events_without_end, .timeout = 600) { chatters(true); }
