/* How sources and sinks behave, seen through the public interface: order of calls, cancelling, death and silence, what
   goes over the wire, what gets registered, pace, streams, allocation. Over the simulator, where time is virtual and
   each byte can be seen; the event loops at the end over libfabric's tcp.

   A diary between the core and the fabric notes what each side posts, in order. */
#define _GNU_SOURCE
#include "counted_heap.h"
#include "guest_ram.h"

#define RMIG_IMPLEMENTATION
#include "../rmig_fabric_ofi.h"

#include "sim_fabric.h"

#include <criterion/criterion.h>
#include <poll.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>

#define PAGE ((uint64_t)4096)
#define ALL_DONE 2 // beside RMIG_OK and RMIG_PENDING
#define STATE_SIZE 20000 // device state: less than a stream message of version 1 holds
#define RAM_MAX 8

// --- the diary

enum did { DID_SEND, DID_WRITE, DID_REG, DID_DEREG };

struct entry {
    enum did did;
    unsigned side;
    uint32_t type, repeat; // SEND
    uint64_t length;
    const uint8_t *local; // WRITE, REG
};

static struct {
    const struct rmig_fabric_ops *below;
    struct rmig_fabric_ops ops;
    struct entry *entry;
    size_t count, cap;
    uint32_t stop_type; // when stop_side sends this, the world falls silent
    int stop_side;
    unsigned stop_nth; // not the first few: counts down
    bool stop_drops; // only that message is lost
    bool stop_on_write;
    uint64_t stopped; // when that was, 0: not yet
    uint64_t written, ahead_max; // by the source; registered at the sink and not yet posted, at most
    uint64_t registered;
} diary;

static unsigned side_of(const struct rmig_ep *ep) { return ((const struct sim_side *)ep->fabric)->index; }

static void note(const struct rmig_ep *ep, enum did did, const void *local, uint64_t length) {
    if (diary.count == diary.cap) {
        diary.cap = diary.cap == 0 ? 1024 : 2 * diary.cap;
        diary.entry = sim_grow(diary.entry, diary.cap, sizeof *diary.entry);
    }
    struct entry *e = &diary.entry[diary.count++];
    memset(e, 0, sizeof *e);
    e->did = did;
    e->side = side_of(ep);
    e->local = local;
    e->length = length;
}

static void stop_the_world(struct rmig_ep *ep) {
    struct sim_side *side = (struct sim_side *)ep->fabric;
    if (diary.stopped != 0)
        return;
    diary.stopped = side->time;
    sim_silence(side->sim);
}

static int diary_send(struct rmig_ep *ep, const void *buf, uint64_t n, const struct rmig_mr *mr, uint64_t id,
                      struct rmig_error *err) {
    struct rmig_header header;
    cr_assert_eq(rmig_decode_header(buf, (size_t)n, &header), RMIG_HEADER_SIZE);
    if (diary.stop_type == header.type && diary.stop_side == (int)side_of(ep) && diary.stop_nth-- == 1) {
        if (diary.stop_drops)
            return RMIG_OK;
        stop_the_world(ep);
    }
    note(ep, DID_SEND, NULL, n);
    diary.entry[diary.count - 1].type = header.type;
    diary.entry[diary.count - 1].repeat = header.repeat;
    return diary.below->send(ep, buf, n, mr, id, err);
}

static int diary_write(struct rmig_ep *ep, const struct rmig_write *writes, size_t n, struct rmig_error *err) {
    if (diary.stop_on_write)
        stop_the_world(ep);
    int taken = diary.below->write(ep, writes, n, err);
    for (int i = 0; i < taken; i++) {
        note(ep, DID_WRITE, writes[i].local, writes[i].length);
        diary.written += writes[i].length;
    }
    return taken;
}

static int diary_reg(struct rmig_ep *ep, void *address, uint64_t length, unsigned access, struct rmig_mr *mr,
                     struct rmig_error *err) {
    int status = diary.below->reg(ep, address, length, access, mr, err);
    if (status != RMIG_OK)
        return status;
    note(ep, DID_REG, address, length);
    if ((access & RMIG_ACCESS_REMOTE_WRITE) != 0) {
        diary.registered += length;
        diary.ahead_max = sim_max(diary.ahead_max, diary.registered - diary.written);
    }
    return status;
}

static int diary_dereg(struct rmig_ep *ep, struct rmig_mr *mr, struct rmig_error *err) {
    note(ep, DID_DEREG, NULL, 0);
    return diary.below->dereg(ep, mr, err);
}

static void diary_begin(struct sim *sim) {
    diary.below = sim_fabric(sim, 0)->ops;
    diary.ops = *diary.below;
    diary.ops.send = diary_send;
    diary.ops.write = diary_write;
    diary.ops.reg = diary_reg;
    diary.ops.dereg = diary_dereg;
    for (unsigned i = 0; i < sim->cfg.sides; i++)
        sim_fabric(sim, i)->ops = &diary.ops;
}

static void diary_end(void) {
    free(diary.entry);
    memset(&diary, 0, sizeof diary);
}

static uint64_t diary_sends(unsigned side, uint32_t type) {
    uint64_t n = 0;
    for (size_t i = 0; i < diary.count; i++)
        n += diary.entry[i].did == DID_SEND && diary.entry[i].side == side && diary.entry[i].type == type;
    return n;
}

static uint64_t diary_writes(void) {
    uint64_t n = 0;
    for (size_t i = 0; i < diary.count; i++)
        n += diary.entry[i].did == DID_WRITE;
    return n;
}

// --- a world: two ends, RAM, and the embedders of both

struct ram {
    char name[32];
    struct rmig_block_desc from, to;
    int fd[2];
};

struct outcome {
    bool done;
    int status;
    uint64_t at;
    char text[sizeof((struct rmig_error *)0)->text];
};

enum blow { BLOW_NONE, BLOW_CANCEL, BLOW_CLOSE, BLOW_DEATH, BLOW_SILENCE };

struct world {
    struct sim_config cfg;
    struct rmig_config source_cfg, sink_cfg;
    struct sim *sim; // NULL: over libfabric
    struct rmig_source *source;
    struct rmig_sink *sink;
    struct ram ram[RAM_MAX];
    unsigned rams;
    char address[80];

    struct outcome from, to; // how it went for each side
    unsigned stage; // of the source's script
    uint8_t state[STATE_SIZE];

    unsigned events; // bit t: an event of type t came
    unsigned rounds;
    uint8_t *got; // stream bytes
    size_t got_size, got_cap;
    size_t want; // version 1: how long the stream is
    bool hold_blocks, hold_stream, hold_take;
    unsigned added; // blocks at the sink
    bool listens_on; // after a source was forgotten
    size_t starved; // the allocation in accept_blocks that fails, 0: none
    void (*watch)(struct world *w, const struct rmig_sink_event *ev);
    uint64_t horizon; // a sink without a source stops listening then

    enum blow blow; // what happens ...
    unsigned blow_side;
    uint64_t blow_at; // ... at this step of that side
    uint64_t steps[2], blown; // blown: when
};

static void map_ram(struct rmig_block_desc *d, int *fd, uint64_t length, enum rmig_backing backing) {
    bool shared = backing == RMIG_BACKING_SHARED_FD;
    *fd = -1;
    if (shared) {
        *fd = memfd_create("ram", MFD_CLOEXEC);
        cr_assert(*fd >= 0 && ftruncate(*fd, (off_t)length) == 0);
    }
    int flags = shared ? MAP_SHARED : MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    d->host = backing == RMIG_BACKING_UNKNOWN && length <= 256 * RMIG_MIB
                  ? guest_ram_map(length)
                  : mmap(NULL, length, PROT_READ | PROT_WRITE, flags, *fd, 0);
    cr_assert_neq(d->host, MAP_FAILED);
    d->length = length;
    d->backing = backing;
    d->fd = *fd;
}

static struct ram *add_ram(struct world *w, uint64_t length, enum rmig_backing backing) {
    struct ram *r = &w->ram[w->rams];
    snprintf(r->name, sizeof r->name, "ram%u", w->rams++);
    map_ram(&r->from, &r->fd[0], length, backing);
    map_ram(&r->to, &r->fd[1], length, backing);
    r->from.name = r->to.name = r->name;
    r->from.guest_offset = r->to.guest_offset = w->rams * 64 * RMIG_GIB;
    return r;
}

/* Every page differs from every other, and none is zero. */
static void fill(struct ram *r, uint64_t offset, uint64_t length, unsigned salt) {
    uint8_t *p = (uint8_t *)r->from.host + offset;
    for (uint64_t at = 0; at < length; at += 8) {
        uint64_t value = ((offset + at) * 0x9e3779b97f4a7c15u ^ salt * 0xbf58476d1ce4e5b9u) | 1;
        memcpy(p + at, &value, (size_t)sim_min(8, length - at));
    }
}

static struct ram *add_full_ram(struct world *w, uint64_t length) {
    struct ram *r = add_ram(w, length, RMIG_BACKING_UNKNOWN);
    fill(r, 0, length, 1);
    return r;
}

static bool same_range(const struct ram *r, uint64_t offset, uint64_t length) {
    return memcmp((uint8_t *)r->from.host + offset, (uint8_t *)r->to.host + offset, (size_t)length) == 0;
}

static bool same_ram(const struct world *w) {
    for (unsigned i = 0; i < w->rams; i++)
        if (!same_range(&w->ram[i], 0, w->ram[i].from.length))
            return false;
    return true;
}

static void param(struct rmig_config *cfg, enum rmig_param p, uint64_t value) {
    struct rmig_error err;
    cr_assert_eq(rmig_set(cfg, p, value, &err), RMIG_OK, "%s", err.text);
}

static void plan_world(struct world *w, enum sim_mode mode) {
    memset(w, 0, sizeof *w);
    sim_defaults(&w->cfg, mode, 42);
    w->cfg.max_steps = 3000000;
    w->horizon = 3000 * SIM_SECOND;
    snprintf(w->address, sizeof w->address, "sink:7000");
    for (size_t i = 0; i < STATE_SIZE; i++)
        w->state[i] = (uint8_t)(i * 31 + (i >> 8));
}

static void version_1(struct world *w) {
    param(&w->source_cfg, RMIG_PARAM_EXTENSION, 0);
    w->cfg.key_bits = 32;
}

// --- the sink's embedder

static void read_stream(struct world *w) {
    for (;;) {
        if (w->got_cap - w->got_size < 65536) {
            w->got_cap = w->got_cap == 0 ? 65536 : 2 * w->got_cap;
            w->got = sim_grow(w->got, w->got_cap, 1);
        }
        size_t n = rmig_sink_get(w->sink, w->got + w->got_size, w->got_cap - w->got_size);
        if (n == 0)
            return;
        w->got_size += n;
    }
}

static int accept_ram(struct world *w) {
    int status = RMIG_OK;
    for (; w->added < w->rams && status == RMIG_OK; w->added += status == RMIG_OK)
        status = rmig_sink_add_block(w->sink, &w->ram[w->added].to, NULL);
    return status == RMIG_OK ? rmig_sink_accept_blocks(w->sink) : status;
}

/* This embedder waits for no other source, unless the test wants it to. */
static int on_forgotten(const struct world *w) { return w->listens_on ? RMIG_OK : rmig_sink_error(w->sink)->status; }

/* A version 1 source has left: the reader of the stream knows whether that was the end. */
static int on_disconnected(struct world *w) {
    struct rmig_sink_event none;
    if (w->got_size == w->want)
        return rmig_sink_complete(w->sink);
    rmig_sink_cancel(w->sink);
    return rmig_sink_process(w->sink, &none);
}

/* RMIG_OK: go on, ALL_DONE, or the session's error. */
static int on_sink_event(struct world *w, const struct rmig_sink_event *ev) {
    int status;
    w->events |= 1u << ev->type;
    if (w->watch != NULL)
        w->watch(w, ev);
    switch (ev->type) {
    case RMIG_SINK_FORGOTTEN:
        return on_forgotten(w);
    case RMIG_SINK_BLOCKS:
        status = w->hold_blocks ? RMIG_OK : accept_ram(w);
        return status == RMIG_ERR_FORGOTTEN ? RMIG_OK : status; // the event follows
    case RMIG_SINK_ROUND:
        w->rounds++;
        return RMIG_OK;
    case RMIG_SINK_STREAM:
        if (!w->hold_stream)
            read_stream(w);
        return RMIG_OK;
    case RMIG_SINK_DISCONNECTED:
        return on_disconnected(w);
    case RMIG_SINK_TAKE:
        return w->hold_take ? RMIG_OK : rmig_sink_take(w->sink);
    case RMIG_SINK_FINISHED:
        return ALL_DONE;
    default:
        return RMIG_OK;
    }
}

static void over(struct outcome *o, int status, const struct rmig_error *err, uint64_t now) {
    o->done = true;
    o->status = status == ALL_DONE ? RMIG_OK : status;
    o->at = now;
    snprintf(o->text, sizeof o->text, "%s", status < 0 ? err->text : "");
}

static uint64_t world_now(const struct world *w, unsigned side) { return w->sim->side[side].time; }

/* As an embedder does: a session that has failed is closed at once. */
static uint64_t sink_over(struct world *w, int status) {
    over(&w->to, status, rmig_sink_error(w->sink), world_now(w, 1));
    if (status < 0 && w->blow != BLOW_NONE) {
        rmig_sink_close(w->sink);
        w->sink = NULL;
    }
    return SIM_DONE;
}

/* The blow falls on this side at this step? True: the side is no more. */
static bool blow_falls(struct world *w, unsigned side) {
    if (w->blow == BLOW_NONE || w->blow_side != side || w->steps[side]++ != w->blow_at)
        return false;
    w->blown = world_now(w, side);
    switch (w->blow) {
    case BLOW_CANCEL:
        if (side == 0)
            rmig_source_cancel(w->source);
        else
            rmig_sink_cancel(w->sink);
        return false;
    case BLOW_CLOSE:
        if (side == 0)
            rmig_source_close(w->source);
        else
            rmig_sink_close(w->sink);
        w->source = side == 0 ? NULL : w->source;
        w->sink = side == 1 ? NULL : w->sink;
        return true;
    case BLOW_DEATH:
        sim_kill(w->sim, side);
        return true;
    default:
        sim_silence(w->sim);
        return false;
    }
}

static uint64_t sink_step(void *user, uint64_t now) {
    struct world *w = user;
    struct rmig_sink_event ev;
    if (now >= w->horizon || blow_falls(w, 1))
        return SIM_DONE;
    int status = rmig_sink_process(w->sink, &ev);
    if (status == RMIG_OK)
        status = on_sink_event(w, &ev);
    if (status != RMIG_OK)
        return sink_over(w, status);
    return sim_min(rmig_sink_next_deadline(w->sink), w->horizon);
}

// --- the source's embedder

static int save_all(struct world *w) {
    int status = RMIG_OK;
    for (uint32_t i = 0; i < w->rams && status == RMIG_OK; i++)
        status = rmig_source_save_range(w->source, i, 0, w->ram[i].from.length);
    return status;
}

/* The next call of a whole migration: two rounds with device state behind them. */
static int source_next(struct world *w) {
    int status;
    switch (w->stage++) {
    case 0:
        return rmig_source_connect_start(w->source, w->address);
    case 1:
        status = rmig_source_begin_round(w->source);
        return status == RMIG_OK ? save_all(w) : status;
    case 2:
        return rmig_source_end_round_start(w->source);
    case 3:
        status = rmig_source_begin_round(w->source);
        return status == RMIG_OK ? rmig_source_save_range(w->source, 0, 0, w->ram[0].from.length / 2) : status;
    case 4:
        return rmig_source_end_round_start(w->source);
    case 5:
        status = (int)rmig_source_put_some(w->source, w->state, STATE_SIZE);
        return status == STATE_SIZE ? rmig_source_flush_start(w->source) : status < 0 ? status : RMIG_ERR_FULL;
    case 6:
        return rmig_source_finish_start(w->source);
    default:
        return ALL_DONE;
    }
}

static uint64_t source_over(struct world *w, int status) {
    over(&w->from, status, rmig_source_error(w->source), world_now(w, 0));
    if (status < 0 && w->blow != BLOW_NONE) {
        rmig_source_close(w->source);
        w->source = NULL;
    }
    return SIM_DONE;
}

static uint64_t source_step(void *user, uint64_t now) {
    struct world *w = user;
    if (blow_falls(w, 0))
        return SIM_DONE;
    int status = rmig_source_process(w->source);
    if (status == RMIG_PENDING)
        return rmig_source_next_deadline(w->source);
    if (status == RMIG_OK)
        status = source_next(w);
    if (status != RMIG_OK)
        return source_over(w, status);
    return now; // again at once, after the others
}

// --- beginning and ending

static void open_sessions(struct world *w, struct rmig_fabric *from, struct rmig_fabric *to, const char *address) {
    struct rmig_error err = {0};
    cr_assert_eq(rmig_source_open(from, &w->source_cfg, &w->source, &err), RMIG_OK, "%s", err.text);
    cr_assert_eq(rmig_sink_open(to, &w->sink_cfg, &w->sink, &err), RMIG_OK, "%s", err.text);
    for (unsigned i = 0; i < w->rams; i++)
        cr_assert_eq(rmig_source_add_block(w->source, &w->ram[i].from, NULL), RMIG_OK, "%s",
                     rmig_source_error(w->source)->text);
    cr_assert_eq(rmig_sink_listen(w->sink, address), RMIG_OK, "%s", rmig_sink_error(w->sink)->text);
}

static void open_sim(struct world *w) {
    size_t fail_at = heap.fail_at;
    memset(&heap, 0, sizeof heap);
    heap.fail_at = fail_at;
    w->sim = sim_open(&w->cfg);
    diary_begin(w->sim);
    sim_actor(w->sim, 1, sink_step, w);
}

/* The sink listens and is an actor; the test itself is the source's embedder. */
static void open_world(struct world *w) {
    open_sim(w);
    open_sessions(w, sim_fabric(w->sim, 0), sim_fabric(w->sim, 1), w->address);
}

static void unmap_ram(const struct rmig_block_desc *d) {
    if (!guest_ram_unmap(d->host))
        munmap(d->host, d->length);
}

static void free_ram(struct world *w) {
    for (unsigned i = 0; i < w->rams; i++) {
        unmap_ram(&w->ram[i].from);
        unmap_ram(&w->ram[i].to);
        for (unsigned k = 0; k < 2; k++)
            if (w->ram[i].fd[k] >= 0)
                close(w->ram[i].fd[k]);
    }
    free(w->got);
}

/* Everything is given back, whatever happened before. */
static void close_world(struct world *w) {
    struct rmig_error err = {0};
    heap.fail_at = 0;
    sim_actor(w->sim, 0, NULL, NULL);
    rmig_source_close(w->source);
    sim_actor(w->sim, 1, NULL, NULL);
    rmig_sink_close(w->sink);
    cr_assert_eq(sim_clean(w->sim, &err), RMIG_OK, "%s", err.text);
    cr_assert_eq(heap.live, 0, "%td allocations are left", heap.live);
    sim_close(w->sim);
    free_ram(w);
    diary_end();
}

#define SOURCE_OK(w, call)                                                                                             \
    do {                                                                                                               \
        int status_ = (call);                                                                                          \
        cr_assert_eq(status_, RMIG_OK, "%s: %s", #call, rmig_source_error((w)->source)->text);                         \
    } while (0)

#define SINK_OK(w, call)                                                                                               \
    do {                                                                                                               \
        int status_ = (call);                                                                                          \
        cr_assert_eq(status_, RMIG_OK, "%s: %s", #call, rmig_sink_error((w)->sink)->text);                             \
    } while (0)

/* Refused, for this reason, and the session is none the worse. */
#define REFUSED(call, want, error, part)                                                                               \
    do {                                                                                                               \
        int64_t status_ = (call);                                                                                      \
        const struct rmig_error *e_ = (error);                                                                         \
        cr_expect_eq(status_, (want), "%s: %s, expected %s", #call, rmig_status_name((int)status_),                    \
                     rmig_status_name(want));                                                                          \
        cr_expect(strstr(e_->text, part) != NULL, "%s: \"%s\" does not say \"%s\"", #call, e_->text, part);            \
        cr_expect_eq(e_->status, (want), "%s: the error's status is %d", #call, e_->status);                           \
    } while (0)
#define SOURCE_REFUSES(w, call, want, part) REFUSED(call, want, rmig_source_error((w)->source), part)
#define SINK_REFUSES(w, call, want, part) REFUSED(call, want, rmig_sink_error((w)->sink), part)

static void one_round(struct world *w) {
    SOURCE_OK(w, rmig_source_begin_round(w->source));
    SOURCE_OK(w, save_all(w));
    SOURCE_OK(w, rmig_source_end_round(w->source));
}

/* Runs the sink until it is through. */
static void sink_ends(struct world *w) {
    struct rmig_error err = {0};
    if (w->to.done)
        return;
    cr_assert_eq(sim_run(w->sim, world_now(w, 0) + 100 * SIM_SECOND, &err), RMIG_OK, "%s", err.text);
}

static void finish(struct world *w) {
    SOURCE_OK(w, rmig_source_finish(w->source));
    sink_ends(w);
    cr_assert_eq(w->to.status, RMIG_OK, "%s", w->to.text);
    cr_assert(same_ram(w), "the sink's RAM differs");
}

static void connect_world(struct world *w) {
    open_world(w);
    SOURCE_OK(w, rmig_source_connect(w->source, w->address));
}

/* Both ends as actors, to the end, whatever that is. */
static void run_both(struct world *w) {
    struct rmig_error err = {0};
    w->want = STATE_SIZE;
    open_world(w);
    sim_actor(w->sim, 0, source_step, w);
    cr_assert_eq(sim_run(w->sim, 2 * w->horizon, &err), RMIG_OK, "blow %d at step %llu of side %u: %s", (int)w->blow,
                 (unsigned long long)w->blow_at, w->blow_side, err.text);
}

/* Lets time pass while the source's embedder looks after its session as next_deadline says. */
static int look_after(struct world *w, uint64_t ns, unsigned *turns) {
    uint64_t until = world_now(w, 0) + ns;
    for (*turns = 0; world_now(w, 0) < until; ++*turns) {
        int status = rmig_source_process(w->source);
        if (status < 0)
            return status;
        uint64_t deadline = sim_min(rmig_source_next_deadline(w->source), until);
        struct rmig_ep *ep = &w->sim->side[0].eps->base;
        cr_assert_eq(diary.below->wait(sim_fabric(w->sim, 0), &ep, 1, deadline, NULL), RMIG_OK);
    }
    return RMIG_OK;
}

/* The same without a look at the session: the embedder is busy elsewhere. */
static void be_away(struct world *w, uint64_t ns) {
    struct rmig_error err = {0};
    uint64_t until = world_now(w, 0) + ns;
    cr_assert_eq(diary.below->wait(sim_fabric(w->sim, 0), NULL, 0, until, &err), RMIG_OK, "%s", err.text);
}

/* The sink's embedder acts now: its clock has stood still since it last did. */
static void sink_wakes(struct world *w) {
    sim_spend(w->sim, 1, sim_max(world_now(w, 0), world_now(w, 1)) - world_now(w, 1));
    sim_actor(w->sim, 1, sink_step, w);
}

static struct rmig_stats source_stats(const struct world *w) {
    struct rmig_stats st;
    rmig_source_stats(w->source, &st);
    return st;
}

static struct rmig_stats sink_stats(const struct world *w) {
    struct rmig_stats st;
    rmig_sink_stats(w->sink, &st);
    return st;
}

/* After FINISHED the sink's embedder goes on until nothing is registered any more. Returns the calls that it took. */
static unsigned release(struct world *w) {
    struct rmig_sink_event none;
    unsigned calls = 0;
    for (; rmig_sink_next_deadline(w->sink) == 0; calls++) {
        cr_assert_lt(calls, 100000, "deregistering does not end");
        cr_assert_eq(rmig_sink_process(w->sink, &none), RMIG_OK);
        cr_assert_eq(none.type, RMIG_SINK_NONE);
    }
    return calls;
}

TestSuite(session, .timeout = 600);

Test(session, a_whole_migration_ends_well_at_both_ends) {
    for (unsigned v1 = 0; v1 < 2; v1++)
        for (unsigned mode = SIM_ORDERED; mode <= SIM_LOCAL; mode++) {
            struct world w;
            plan_world(&w, (enum sim_mode)mode);
            add_full_ram(&w, 3 * RMIG_MIB + 5 * PAGE + 7);
            if (v1)
                version_1(&w);
            run_both(&w);
            cr_assert_eq(w.from.status, RMIG_OK, "%s", w.from.text);
            cr_assert_eq(w.to.status, RMIG_OK, "%s", w.to.text);
            cr_assert_eq(rmig_source_extended(w.source), !v1);
            cr_assert_eq(rmig_sink_extended(w.sink), !v1);
            cr_assert(same_ram(&w));
            cr_assert_eq(w.got_size, STATE_SIZE);
            cr_assert_eq(memcmp(w.got, w.state, STATE_SIZE), 0);
            close_world(&w);
        }
}

// --- order of calls, and bad arguments

static void small_world(struct world *w) {
    plan_world(w, SIM_ORDERED);
    add_full_ram(w, RMIG_MIB + 3 * PAGE);
}

Test(session, open_without_a_fabric_or_a_place_for_the_session_is_refused) {
    struct rmig_error err = {0};
    struct rmig_source *source = (struct rmig_source *)&err;
    struct rmig_sink *sink = (struct rmig_sink *)&err;
    memset(&heap, 0, sizeof heap);
    REFUSED(rmig_source_open(NULL, NULL, &source, &err), RMIG_ERR_ARGUMENT, &err, "fabric is NULL");
    cr_assert_null(source);
    REFUSED(rmig_sink_open(NULL, NULL, &sink, &err), RMIG_ERR_ARGUMENT, &err, "fabric is NULL");
    cr_assert_null(sink);
    REFUSED(rmig_source_open(NULL, NULL, NULL, &err), RMIG_ERR_ARGUMENT, &err, "out is NULL");
    REFUSED(rmig_sink_open(NULL, NULL, NULL, &err), RMIG_ERR_ARGUMENT, &err, "out is NULL");
    cr_assert_eq(rmig_source_open(NULL, NULL, &source, NULL), RMIG_ERR_ARGUMENT);
    cr_assert_eq(heap.live, 0);
}

Test(session, close_of_nothing_does_nothing) {
    rmig_source_close(NULL);
    rmig_sink_close(NULL);
    rmig_fabric_close(NULL);
}

Test(session, source_calls_before_connect_are_refused) {
    struct world w;
    uint64_t bitmap = 1;
    small_world(&w);
    open_world(&w);
    SOURCE_REFUSES(&w, rmig_source_begin_round(w.source), RMIG_ERR_STATE, "rmig_source_begin_round: connect first");
    SOURCE_REFUSES(&w, rmig_source_save_page(w.source, 0, 0), RMIG_ERR_STATE, "save_page: connect first");
    SOURCE_REFUSES(&w, rmig_source_save_range(w.source, 0, 0, 1), RMIG_ERR_STATE, "save_range: connect first");
    SOURCE_REFUSES(&w, rmig_source_save_bitmap(w.source, 0, &bitmap, 0, 1), RMIG_ERR_STATE, "connect first");
    SOURCE_REFUSES(&w, rmig_source_end_round_start(w.source), RMIG_ERR_STATE, "connect first");
    SOURCE_REFUSES(&w, rmig_source_put_some(w.source, &w, 1), RMIG_ERR_STATE, "connect first");
    SOURCE_REFUSES(&w, rmig_source_put(w.source, &w, 1), RMIG_ERR_STATE, "connect first");
    SOURCE_REFUSES(&w, rmig_source_flush(w.source), RMIG_ERR_STATE, "connect first");
    SOURCE_REFUSES(&w, rmig_source_finish(w.source), RMIG_ERR_STATE, "connect first");
    cr_assert_eq(rmig_source_process(w.source), RMIG_OK);
    cr_assert_eq(rmig_source_next_deadline(w.source), RMIG_FOREVER);
    SOURCE_OK(&w, rmig_source_connect(w.source, w.address));
    rmig_source_forgive(w.source);
    one_round(&w);
    finish(&w);
    close_world(&w);
}

Test(session, source_connects_only_with_a_block_and_an_address_and_once) {
    struct world w;
    struct rmig_error err = {0};
    small_world(&w);
    open_sim(&w);
    cr_assert_eq(rmig_source_open(sim_fabric(w.sim, 0), NULL, &w.source, &err), RMIG_OK);
    cr_assert_eq(rmig_sink_open(sim_fabric(w.sim, 1), NULL, &w.sink, &err), RMIG_OK);
    SINK_OK(&w, rmig_sink_listen(w.sink, w.address));
    SOURCE_REFUSES(&w, rmig_source_connect(w.source, w.address), RMIG_ERR_STATE, "add a block first");
    SOURCE_REFUSES(&w, rmig_source_add_block(w.source, NULL, NULL), RMIG_ERR_ARGUMENT, "NULL");
    SOURCE_OK(&w, rmig_source_add_block(w.source, &w.ram[0].from, NULL));
    SOURCE_REFUSES(&w, rmig_source_connect(w.source, NULL), RMIG_ERR_ARGUMENT, "address is NULL");
    SOURCE_REFUSES(&w, rmig_source_connect(w.source, "sink:99999"), RMIG_ERR_ARGUMENT, "sink:99999");
    SOURCE_OK(&w, rmig_source_connect(w.source, w.address));
    SOURCE_REFUSES(&w, rmig_source_connect(w.source, w.address), RMIG_ERR_STATE, "connected before");
    SOURCE_REFUSES(&w, rmig_source_add_block(w.source, &w.ram[0].from, NULL), RMIG_ERR_STATE, "before connect");
    rmig_source_forgive(w.source);
    one_round(&w);
    finish(&w);
    close_world(&w);
}

Test(session, round_calls_out_of_order_are_refused) {
    struct world w;
    uint64_t bitmap = 1;
    small_world(&w);
    connect_world(&w);
    SOURCE_REFUSES(&w, rmig_source_end_round(w.source), RMIG_ERR_STATE, "rmig_source_end_round: no round has begun");
    SOURCE_REFUSES(&w, rmig_source_save_page(w.source, 0, 0), RMIG_ERR_STATE, "call rmig_source_begin_round first");
    SOURCE_REFUSES(&w, rmig_source_save_range(w.source, 0, 0, 1), RMIG_ERR_STATE, "call rmig_source_begin_round first");
    SOURCE_REFUSES(&w, rmig_source_save_bitmap(w.source, 0, &bitmap, 0, 1), RMIG_ERR_STATE, "begin_round first");
    SOURCE_OK(&w, rmig_source_begin_round(w.source));
    SOURCE_REFUSES(&w, rmig_source_begin_round(w.source), RMIG_ERR_STATE, "end the round before");
    SOURCE_REFUSES(&w, rmig_source_finish(w.source), RMIG_ERR_STATE, "rmig_source_finish: end the round first");
    rmig_source_forgive(w.source);
    SOURCE_OK(&w, save_all(&w));
    SOURCE_OK(&w, rmig_source_end_round(w.source));
    finish(&w);
    close_world(&w);
}

Test(session, a_second_operation_is_refused_while_one_is_under_way) {
    struct world w;
    small_world(&w);
    open_world(&w);
    SOURCE_OK(&w, rmig_source_connect_start(w.source, w.address));
    SOURCE_REFUSES(&w, rmig_source_begin_round(w.source), RMIG_ERR_STATE, "an operation is under way");
    while (rmig_source_process(w.source) == RMIG_PENDING)
        be_away(&w, SIM_US);
    SOURCE_OK(&w, rmig_source_begin_round(w.source));
    SOURCE_OK(&w, save_all(&w));
    SOURCE_OK(&w, rmig_source_end_round_start(w.source));
    SOURCE_REFUSES(&w, rmig_source_end_round_start(w.source), RMIG_ERR_STATE, "an operation is under way");
    SOURCE_REFUSES(&w, rmig_source_save_page(w.source, 0, 0), RMIG_ERR_STATE, "an operation is under way");
    SOURCE_REFUSES(&w, rmig_source_put_some(w.source, &w, 1), RMIG_ERR_STATE, "an operation is under way");
    SOURCE_REFUSES(&w, rmig_source_flush_start(w.source), RMIG_ERR_STATE, "an operation is under way");
    SOURCE_REFUSES(&w, rmig_source_finish_start(w.source), RMIG_ERR_STATE, "an operation is under way");
    while (rmig_source_process(w.source) == RMIG_PENDING)
        be_away(&w, SIM_US);
    rmig_source_forgive(w.source);
    finish(&w);
    close_world(&w);
}

Test(session, source_calls_after_finish_are_refused) {
    struct world w;
    small_world(&w);
    connect_world(&w);
    one_round(&w);
    finish(&w);
    SOURCE_REFUSES(&w, rmig_source_begin_round(w.source), RMIG_ERR_STATE, "the session is finished");
    SOURCE_REFUSES(&w, rmig_source_save_page(w.source, 0, 0), RMIG_ERR_STATE, "the session is finished");
    SOURCE_REFUSES(&w, rmig_source_end_round(w.source), RMIG_ERR_STATE, "the session is finished");
    SOURCE_REFUSES(&w, rmig_source_put(w.source, &w, 1), RMIG_ERR_STATE, "the session is finished");
    SOURCE_REFUSES(&w, rmig_source_flush(w.source), RMIG_ERR_STATE, "the session is finished");
    SOURCE_REFUSES(&w, rmig_source_finish(w.source), RMIG_ERR_STATE, "the session is finished");
    SOURCE_REFUSES(&w, rmig_source_connect(w.source, w.address), RMIG_ERR_STATE, "connected before");
    cr_assert_eq(rmig_source_process(w.source), RMIG_OK);
    cr_assert_eq(rmig_source_next_deadline(w.source), RMIG_FOREVER);
    rmig_source_cancel(w.source);
    cr_assert_eq(rmig_source_process(w.source), RMIG_OK, "a finished migration cannot be cancelled");
    close_world(&w);
}

Test(session, source_calls_after_a_failure_return_that_failure) {
    struct world w;
    uint64_t bitmap = 1;
    small_world(&w);
    connect_world(&w);
    rmig_source_cancel(w.source);
    cr_expect_eq(rmig_source_process(w.source), RMIG_ERR_CANCELLED);
    cr_expect_eq(rmig_source_begin_round(w.source), RMIG_ERR_CANCELLED);
    cr_expect_eq(rmig_source_save_page(w.source, 0, 0), RMIG_ERR_CANCELLED);
    cr_expect_eq(rmig_source_save_bitmap(w.source, 0, &bitmap, 0, 1), RMIG_ERR_CANCELLED);
    cr_expect_eq(rmig_source_end_round(w.source), RMIG_ERR_CANCELLED);
    cr_expect_eq(rmig_source_put(w.source, &w, 1), RMIG_ERR_CANCELLED);
    cr_expect_eq(rmig_source_flush(w.source), RMIG_ERR_CANCELLED);
    cr_expect_eq(rmig_source_finish(w.source), RMIG_ERR_CANCELLED);
    cr_expect_eq(rmig_source_error(w.source)->status, RMIG_ERR_CANCELLED);
    cr_expect_eq(rmig_source_next_deadline(w.source), RMIG_FOREVER);
    struct rmig_fd fds[4];
    cr_expect_eq(rmig_source_fds(w.source, fds, 4), 0);
    close_world(&w);
}

Test(session, a_refused_call_after_a_failure_does_not_hide_the_failure) {
    struct world w;
    small_world(&w);
    connect_world(&w);
    rmig_source_cancel(w.source);
    cr_expect_lt(rmig_source_connect(w.source, w.address), 0);
    cr_expect_lt(rmig_source_add_block(w.source, &w.ram[0].from, NULL), 0);
    cr_expect_eq(rmig_source_process(w.source), RMIG_ERR_CANCELLED);
    const char *text = rmig_source_error(w.source)->text;
    cr_expect(strstr(text, "cancelled") != NULL, "process returns CANCELLED, error says \"%s\"", text);
    close_world(&w);
}

Test(session, saves_outside_a_block_are_refused) {
    struct world w;
    uint64_t bitmap[8] = {1}, length, pages;
    small_world(&w);
    length = w.ram[0].from.length;
    pages = length / PAGE;
    connect_world(&w);
    SOURCE_OK(&w, rmig_source_begin_round(w.source));
    SOURCE_REFUSES(&w, rmig_source_save_page(w.source, 1, 0), RMIG_ERR_ARGUMENT, "block 1; must be 0 to 0");
    SOURCE_REFUSES(&w, rmig_source_save_page(w.source, UINT32_MAX, 0), RMIG_ERR_ARGUMENT, "block 4294967295");
    SOURCE_REFUSES(&w, rmig_source_save_page(w.source, 0, length), RMIG_ERR_ARGUMENT, "outside block \"ram0\"");
    SOURCE_REFUSES(&w, rmig_source_save_page(w.source, 0, UINT64_MAX), RMIG_ERR_ARGUMENT, "0xffffffffffffffff");
    SOURCE_REFUSES(&w, rmig_source_save_range(w.source, 0, 0, length + 1), RMIG_ERR_ARGUMENT, "outside block");
    SOURCE_REFUSES(&w, rmig_source_save_range(w.source, 0, length - 1, 2), RMIG_ERR_ARGUMENT, "outside block");
    SOURCE_REFUSES(&w, rmig_source_save_range(w.source, 0, PAGE, UINT64_MAX), RMIG_ERR_ARGUMENT, "outside block");
    SOURCE_REFUSES(&w, rmig_source_save_range(w.source, 0, UINT64_MAX, 2), RMIG_ERR_ARGUMENT, "outside block");
    SOURCE_REFUSES(&w, rmig_source_save_range(w.source, 1, 0, 1), RMIG_ERR_ARGUMENT, "save_range: block 1");
    SOURCE_REFUSES(&w, rmig_source_save_bitmap(w.source, 0, NULL, 0, 1), RMIG_ERR_ARGUMENT, "bitmap is NULL");
    SOURCE_REFUSES(&w, rmig_source_save_bitmap(w.source, 1, bitmap, 0, 1), RMIG_ERR_ARGUMENT, "save_bitmap: block 1");
    SOURCE_REFUSES(&w, rmig_source_save_bitmap(w.source, 0, bitmap, 0, pages + 1), RMIG_ERR_ARGUMENT, "of 259 pages");
    SOURCE_REFUSES(&w, rmig_source_save_bitmap(w.source, 0, bitmap, pages, 1), RMIG_ERR_ARGUMENT, "outside block");
    SOURCE_REFUSES(&w, rmig_source_save_bitmap(w.source, 0, bitmap, 2, UINT64_MAX), RMIG_ERR_ARGUMENT, "outside");
    SOURCE_REFUSES(&w, rmig_source_put(w.source, NULL, 1), RMIG_ERR_ARGUMENT, "data is NULL");
    cr_expect_eq(source_stats(&w).round_saved, 0, "a refused save has noted pages");
    SOURCE_OK(&w, rmig_source_save_range(w.source, 0, length, 0));
    SOURCE_OK(&w, rmig_source_save_bitmap(w.source, 0, NULL, 0, 0));
    SOURCE_OK(&w, rmig_source_put(w.source, NULL, 0));
    rmig_source_forgive(w.source);
    SOURCE_OK(&w, save_all(&w));
    SOURCE_OK(&w, rmig_source_end_round(w.source));
    finish(&w);
    close_world(&w);
}

Test(session, stream_bytes_in_a_round_are_refused_for_a_version_1_sink) {
    struct world w;
    small_world(&w);
    version_1(&w);
    connect_world(&w);
    SOURCE_OK(&w, rmig_source_begin_round(w.source));
    SOURCE_REFUSES(&w, rmig_source_put(w.source, w.state, 10), RMIG_ERR_STATE, "only between rounds");
    rmig_source_forgive(w.source);
    SOURCE_OK(&w, save_all(&w));
    SOURCE_OK(&w, rmig_source_end_round(w.source));
    SOURCE_OK(&w, rmig_source_put(w.source, w.state, 10));
    w.want = 10;
    finish(&w);
    cr_assert_eq(w.got_size, 10);
    close_world(&w);
}

Test(session, sink_calls_before_listen_are_refused) {
    struct world w;
    struct rmig_error err = {0};
    struct rmig_sink_event ev;
    struct rmig_block_entry entry;
    char text[80];
    small_world(&w);
    open_sim(&w);
    cr_assert_eq(rmig_sink_open(sim_fabric(w.sim, 1), NULL, &w.sink, &err), RMIG_OK);
    SINK_REFUSES(&w, rmig_sink_address(w.sink, text, sizeof text), RMIG_ERR_STATE, "listen first");
    SINK_REFUSES(&w, rmig_sink_wait(w.sink, &ev, SIM_SECOND), RMIG_ERR_STATE, "listen first");
    SINK_REFUSES(&w, rmig_sink_accept_blocks(w.sink), RMIG_ERR_STATE, "wait for RMIG_SINK_BLOCKS first");
    SINK_REFUSES(&w, rmig_sink_refuse(w.sink, "no"), RMIG_ERR_STATE, "no source to refuse");
    SINK_REFUSES(&w, rmig_sink_complete(w.sink), RMIG_ERR_STATE, "rmig_sink_complete");
    SINK_REFUSES(&w, rmig_sink_peer_block(w.sink, 0, &entry), RMIG_ERR_ARGUMENT, "has named 0 blocks");
    SINK_REFUSES(&w, rmig_sink_listen(w.sink, NULL), RMIG_ERR_ARGUMENT, "address is NULL");
    SINK_REFUSES(&w, rmig_sink_listen(w.sink, "sink:70000"), RMIG_ERR_ARGUMENT, "sink:70000");
    SINK_REFUSES(&w, rmig_sink_add_block(w.sink, NULL, NULL), RMIG_ERR_ARGUMENT, "NULL");
    cr_assert_eq(rmig_sink_get(w.sink, text, 1), 0);
    cr_assert_eq(rmig_source_open(sim_fabric(w.sim, 0), NULL, &w.source, &err), RMIG_OK);
    SOURCE_OK(&w, rmig_source_add_block(w.source, &w.ram[0].from, NULL));
    SINK_OK(&w, rmig_sink_listen(w.sink, w.address));
    SINK_REFUSES(&w, rmig_sink_listen(w.sink, "sink:7001"), RMIG_ERR_STATE, "listened before");
    SINK_OK(&w, rmig_sink_address(w.sink, text, sizeof text));
    cr_assert_str_eq(text, "sink:7000");
    SINK_REFUSES(&w, rmig_sink_address(w.sink, text, 4), RMIG_ERR_ARGUMENT, "4 bytes");
    SINK_REFUSES(&w, rmig_sink_refuse(w.sink, "no"), RMIG_ERR_STATE, "no source to refuse");
    rmig_sink_forgive(w.sink);
    SOURCE_OK(&w, rmig_source_connect(w.source, w.address));
    one_round(&w);
    finish(&w);
    close_world(&w);
}

static void sink_calls_too_early(struct world *w, const struct rmig_sink_event *ev) {
    char byte;
    if (ev->type == RMIG_SINK_CONNECTED) {
        SINK_REFUSES(w, rmig_sink_accept_blocks(w->sink), RMIG_ERR_STATE, "wait for RMIG_SINK_BLOCKS first");
        SINK_REFUSES(w, rmig_sink_listen(w->sink, "sink:7001"), RMIG_ERR_STATE, "listened before");
        SINK_REFUSES(w, rmig_sink_complete(w->sink), RMIG_ERR_STATE, "finish by themselves");
    }
    if (ev->type == RMIG_SINK_BLOCKS || ev->type == RMIG_SINK_ROUND)
        cr_expect_eq(rmig_sink_get(w->sink, &byte, 1), 0, "there are no stream bytes");
    if (ev->type == RMIG_SINK_ROUND) {
        SINK_REFUSES(w, rmig_sink_accept_blocks(w->sink), RMIG_ERR_STATE, "wait for RMIG_SINK_BLOCKS first");
        SINK_REFUSES(w, rmig_sink_add_block(w->sink, &w->ram[0].to, NULL), RMIG_ERR_STATE, "before rmig_sink_accept");
        SINK_REFUSES(w, rmig_sink_complete(w->sink), RMIG_ERR_STATE, "only for a version 1 source");
    }
    if (ev->type == RMIG_SINK_FINISHED) {
        SINK_REFUSES(w, rmig_sink_accept_blocks(w->sink), RMIG_ERR_STATE, "wait for RMIG_SINK_BLOCKS first");
        SINK_REFUSES(w, rmig_sink_refuse(w->sink, "no"), RMIG_ERR_STATE, "no source to refuse");
        SINK_REFUSES(w, rmig_sink_complete(w->sink), RMIG_ERR_STATE, "rmig_sink_complete");
        rmig_sink_cancel(w->sink);
        struct rmig_sink_event none;
        cr_expect_eq(rmig_sink_process(w->sink, &none), RMIG_OK, "a finished migration cannot be cancelled");
        cr_expect_eq(none.type, RMIG_SINK_NONE);
    }
}

Test(session, sink_calls_out_of_order_are_refused) {
    struct world w;
    small_world(&w);
    w.watch = sink_calls_too_early;
    connect_world(&w);
    one_round(&w);
    finish(&w);
    close_world(&w);
}

static void peer_blocks(struct world *w, const struct rmig_sink_event *ev) {
    struct rmig_block_entry entry;
    if (ev->type != RMIG_SINK_BLOCKS)
        return;
    cr_expect_eq(ev->block_count, 1);
    SINK_OK(w, rmig_sink_peer_block(w->sink, 0, &entry));
    cr_expect_str_eq(entry.name, "ram0");
    cr_expect_eq(entry.length, w->ram[0].from.length);
    cr_expect_eq(entry.guest_offset, w->ram[0].from.guest_offset);
    SINK_REFUSES(w, rmig_sink_peer_block(w->sink, 1, &entry), RMIG_ERR_ARGUMENT, "rmig_sink_peer_block: 1;");
}

Test(session, the_sink_learns_the_names_and_lengths_of_blocks_and_no_more) {
    struct world w;
    small_world(&w);
    w.watch = peer_blocks;
    connect_world(&w);
    one_round(&w);
    finish(&w);
    close_world(&w);
}

Test(session, wait_after_finished_returns, .timeout = 600) {
    struct world w;
    struct rmig_sink_event ev;
    small_world(&w);
    connect_world(&w);
    one_round(&w);
    finish(&w);
    sim_actor(w.sim, 1, NULL, NULL);
    SINK_REFUSES(&w, rmig_sink_wait(w.sink, &ev, SIM_MS), RMIG_ERR_STATE, "the session is finished");
    SINK_REFUSES(&w, rmig_sink_wait(w.sink, &ev, RMIG_FOREVER), RMIG_ERR_STATE, "the session is finished");
    close_world(&w);
}

/* Arguments that may not be NULL: a clear error, or nothing at all, but never a crash. One test each. */
static void at_blocks(struct world *w) {
    small_world(w);
    w->hold_blocks = true;
    connect_world(w);
    SOURCE_OK(w, rmig_source_begin_round(w->source));
    SOURCE_OK(w, save_all(w));
    unsigned turns;
    cr_assert_eq(look_after(w, SIM_MS, &turns), RMIG_OK);
    cr_assert((w->events & 1u << RMIG_SINK_BLOCKS) != 0);
}

static void go_on(struct world *w) {
    sink_wakes(w);
    SINK_OK(w, accept_ram(w));
    SOURCE_OK(w, rmig_source_end_round(w->source));
    finish(w);
    close_world(w);
}

Test(session, peer_block_into_nothing_is_refused) {
    struct world w;
    at_blocks(&w);
    SINK_REFUSES(&w, rmig_sink_peer_block(w.sink, 0, NULL), RMIG_ERR_ARGUMENT, "NULL");
    go_on(&w);
}

Test(session, process_without_an_event_to_fill_is_refused) {
    struct world w;
    at_blocks(&w);
    SINK_REFUSES(&w, rmig_sink_process(w.sink, NULL), RMIG_ERR_ARGUMENT, "NULL");
    go_on(&w);
}

Test(session, wait_without_an_event_to_fill_is_refused) {
    struct world w;
    at_blocks(&w);
    SINK_REFUSES(&w, rmig_sink_wait(w.sink, NULL, 0), RMIG_ERR_ARGUMENT, "NULL");
    go_on(&w);
}

Test(session, address_into_nothing_is_refused) {
    struct world w;
    at_blocks(&w);
    SINK_REFUSES(&w, rmig_sink_address(w.sink, NULL, 10), RMIG_ERR_ARGUMENT, "NULL");
    go_on(&w);
}

Test(session, get_into_nothing_takes_nothing) {
    struct world w;
    small_world(&w);
    w.hold_stream = true;
    connect_world(&w);
    one_round(&w);
    SOURCE_OK(&w, rmig_source_put(w.source, w.state, 100));
    SOURCE_OK(&w, rmig_source_flush(w.source));
    be_away(&w, SIM_MS);
    cr_assert((w.events & 1u << RMIG_SINK_STREAM) != 0);
    cr_expect_eq(rmig_sink_get(w.sink, NULL, 100), 0);
    cr_expect_eq(rmig_sink_get(w.sink, w.state, 0), 0);
    w.hold_stream = false;
    sink_wakes(&w);
    read_stream(&w);
    cr_expect_eq(w.got_size, 100);
    finish(&w);
    close_world(&w);
}

Test(session, finish_without_a_round_does_not_hand_over_a_guest_without_memory) {
    struct world w;
    small_world(&w);
    connect_world(&w);
    SOURCE_REFUSES(&w, rmig_source_finish(w.source), RMIG_ERR_STATE, "round");
    if (!w.to.done) {
        one_round(&w);
        finish(&w);
    }
    close_world(&w);
}

Test(session, blocks_that_differ_are_named_at_both_ends) {
    for (unsigned missing = 0; missing < 2; missing++) {
        struct world w;
        small_world(&w);
        if (missing)
            w.ram[0].to.name = "other";
        else
            w.ram[0].to.length -= PAGE;
        connect_world(&w);
        SOURCE_OK(&w, rmig_source_begin_round(w.source));
        cr_expect_eq(rmig_source_end_round(w.source), RMIG_ERR_REFUSED);
        sink_ends(&w);
        cr_expect_eq(w.to.status, RMIG_ERR_SETUP, "%s", w.to.text);
        const char *part = missing ? "block \"ram0\" of the source is not known"
                                   : "block \"ram0\" has 1060864 bytes at the source and 1056768";
        const char *text = rmig_source_error(w.source)->text;
        cr_expect(strstr(w.to.text, part) != NULL, "sink: %s", w.to.text);
        cr_expect(strstr(text, part) != NULL, "source: %s", text);
        w.ram[0].to.length = w.ram[0].from.length;
        close_world(&w);
    }
}

static void refuse_blocks(struct world *w, const struct rmig_sink_event *ev) {
    if (ev->type == RMIG_SINK_BLOCKS)
        SINK_OK(w, rmig_sink_refuse(w->sink, "this host is full"));
}

Test(session, the_reason_of_a_refusal_is_read_at_both_ends) {
    struct world w;
    small_world(&w);
    w.watch = refuse_blocks;
    w.hold_blocks = true;
    connect_world(&w);
    SOURCE_OK(&w, rmig_source_begin_round(w.source));
    cr_expect_eq(rmig_source_end_round(w.source), RMIG_ERR_REFUSED);
    const char *text = rmig_source_error(w.source)->text;
    cr_expect(strstr(text, "this host is full") != NULL, "%s", text);
    sink_ends(&w);
    cr_expect(strstr(w.to.text, "this host is full") != NULL, "%s", w.to.text);
    close_world(&w);
}

Test(session, a_sink_goes_on_listening_when_a_source_leaves_before_it_is_connected) {
    struct world w;
    struct rmig_error err = {0};
    small_world(&w);
    w.listens_on = true;
    open_world(&w);
    SOURCE_OK(&w, rmig_source_connect_start(w.source, w.address));
    cr_assert_eq(rmig_source_process(w.source), RMIG_PENDING);
    be_away(&w, 2100);
    cr_assert_eq(rmig_source_process(w.source), RMIG_PENDING);
    rmig_source_close(w.source);
    be_away(&w, SIM_MS);
    cr_assert_eq(rmig_source_open(sim_fabric(w.sim, 0), NULL, &w.source, &err), RMIG_OK);
    SOURCE_OK(&w, rmig_source_add_block(w.source, &w.ram[0].from, NULL));
    SOURCE_OK(&w, rmig_source_connect(w.source, w.address));
    one_round(&w);
    finish(&w);
    close_world(&w);
}

// --- cancel, close, death and silence at every step

static bool says(const char *text, const char *part) { return strstr(text, part) != NULL; }

static bool says_one_of(const char *text, const char *const *parts) {
    for (; *parts != NULL; parts++)
        if (says(text, *parts))
            return true;
    return false;
}

#define TELL(w)                                                                                                        \
    "blow %d on side %u at step %llu, after %llu ns: source %s \"%s\" at %llu, sink %s \"%s\" at %llu",                \
        (int)(w)->blow, (w)->blow_side, (unsigned long long)(w)->blow_at, (unsigned long long)(w)->blown,              \
        (w)->from.done ? rmig_status_name((w)->from.status) : "gone", (w)->from.text,                                  \
        (unsigned long long)(w)->from.at, (w)->to.done ? rmig_status_name((w)->to.status) : "gone", (w)->to.text,      \
        (unsigned long long)(w)->to.at

/* The side that was cancelled. In the last step of the handover it cannot know who owns the guest, and says so. */
static void check_cancelled(const struct world *w) {
    const struct outcome *o = w->blow_side == 0 ? &w->from : &w->to;
    if (o->done && o->status == RMIG_OK && o->at <= w->blown)
        return; // it was over
    uint32_t last_word = w->blow_side == 1 ? RMIG_MSG_FINISH_RESULT : RMIG_MSG_GOODBYE;
    if (w->blow_side == 0 && (!rmig_extension(&w->source_cfg) || !rmig_extension(&w->sink_cfg)))
        last_word = RMIG_MSG_QEMU_FILE; // version 1 has no later one
    int other = diary_sends(w->blow_side, last_word) > 0 ? RMIG_ERR_HANDOVER : RMIG_ERR_CANCELLED;
    cr_assert(o->done && (o->status == RMIG_ERR_CANCELLED || o->status == other), TELL(w));
    cr_assert(says(o->text, w->blow_side == 0 ? "cancelled at the source" : "cancelled at the sink"), TELL(w));
    cr_assert_leq(o->at, w->blown + SIM_MS, TELL(w));
}

/* The other side: through already, or an error that says why, in time. */
static void check_other(const struct world *w) {
    static const char *const why[] = {
        "cancelled", "went away", "gave up", "rejected", "refused", "the connection to the", "the peer disconnected",
        NULL};
    static const char *const silent[] = {"nothing from the source for", "nothing from the sink for", NULL};
    const struct outcome *o = w->blow_side == 0 ? &w->to : &w->from;
    bool connected = (w->events & 1u << RMIG_SINK_CONNECTED) != 0;
    if (w->blow_side == 0 && !o->done) {
        bool begun = diary_sends(1, RMIG_MSG_HELLO_RESULT) > 0 ||
                     (w->events & (1u << RMIG_SINK_STREAM | 1u << RMIG_SINK_BLOCKS)) != 0;
        cr_assert(!begun, TELL(w)); // it listens for another source
        return;
    }
    cr_assert(o->done, TELL(w));
    if (o->status == RMIG_OK)
        return;
    cr_assert(says_one_of(o->text, w->blow == BLOW_SILENCE ? silent : why), TELL(w));
    uint64_t limit = w->blow == BLOW_SILENCE ? 11 * SIM_SECOND : 200 * SIM_MS;
    cr_assert_leq(o->at, w->blown + limit, TELL(w));
    if (w->blow == BLOW_CANCEL && rmig_get(&w->source_cfg, RMIG_PARAM_EXTENSION) && connected &&
        diary_sends(0, RMIG_MSG_HELLO) > 0 && o->status == RMIG_ERR_REFUSED)
        cr_assert(says(o->text, "cancelled"), TELL(w));
}

/* Where the guest is: never at both ends, and whole where it is. */
static void check_guest(const struct world *w) {
    if (w->to.done && w->to.status == RMIG_OK) {
        cr_assert(same_ram(w) && w->got_size == STATE_SIZE, TELL(w));
        cr_assert(!w->from.done || w->from.status == RMIG_OK || w->from.status == RMIG_ERR_HANDOVER ||
                      !rmig_get(&w->source_cfg, RMIG_PARAM_EXTENSION),
                  TELL(w));
    }
}

static void plan_blow(struct world *w, enum sim_mode mode, enum blow blow, unsigned side, uint64_t at, bool v1) {
    plan_world(w, mode);
    bool holes = mode == SIM_ORDERED && !v1; // the others share memory, which costs less
    struct ram *r = add_ram(w, 3 * RMIG_MIB + 5 * PAGE, holes ? RMIG_BACKING_ANONYMOUS : RMIG_BACKING_UNKNOWN);
    fill(r, RMIG_MIB, r->from.length - RMIG_MIB, 1);
    param(&w->source_cfg, RMIG_PARAM_REGISTER_AHEAD, 2 * RMIG_MIB);
    param(&w->source_cfg, RMIG_PARAM_MERGE_MAX, 64 * PAGE);
    param(&w->source_cfg, RMIG_PARAM_IO_TIMEOUT, 10 * SIM_SECOND);
    param(&w->sink_cfg, RMIG_PARAM_IO_TIMEOUT, 10 * SIM_SECOND);
    if (v1)
        version_1(w);
    w->horizon = 1000 * SIM_SECOND;
    w->blow = blow;
    w->blow_side = side;
    w->blow_at = at;
}

/* Lets the blow fall at each step there is. Returns how many there were. */
static uint64_t blow_everywhere(enum sim_mode mode, enum blow blow, unsigned side, bool v1) {
    for (uint64_t at = 0;; at++) {
        struct world w;
        plan_blow(&w, mode, blow, side, at, v1);
        run_both(&w);
        bool fell = w.blown != 0;
        if (fell && blow == BLOW_CANCEL)
            check_cancelled(&w);
        if (fell)
            check_other(&w);
        check_guest(&w);
        close_world(&w);
        if (!fell)
            return at;
    }
}

static void blows(enum blow blow) {
    for (unsigned side = 0; side < 2; side++) {
        cr_expect_gt(blow_everywhere(SIM_ORDERED, blow, side, false), 15);
        cr_expect_gt(blow_everywhere(SIM_ORDERED, blow, side, true), 15);
        cr_expect_gt(blow_everywhere(SIM_LOCAL, blow, side, false), 15);
        cr_expect_gt(blow_everywhere(SIM_UNORDERED, blow, side, false), 15);
    }
}

Test(session, cancel_at_any_step_ends_both_ends_with_the_reason) { blows(BLOW_CANCEL); }
Test(session, close_at_any_step_is_noticed_by_the_peer) { blows(BLOW_CLOSE); }
Test(session, death_at_any_step_is_noticed_by_the_peer) { blows(BLOW_DEATH); }
Test(session, silence_at_any_step_ends_both_ends_within_io_timeout) { blows(BLOW_SILENCE); }

Test(session, cancel_before_connect_and_before_listen) {
    struct world w;
    struct rmig_error err = {0};
    struct rmig_sink_event ev;
    small_world(&w);
    open_sim(&w);
    cr_assert_eq(rmig_source_open(sim_fabric(w.sim, 0), NULL, &w.source, &err), RMIG_OK);
    cr_assert_eq(rmig_sink_open(sim_fabric(w.sim, 1), NULL, &w.sink, &err), RMIG_OK);
    rmig_source_cancel(w.source);
    rmig_source_cancel(w.source);
    rmig_sink_cancel(w.sink);
    cr_assert_eq(rmig_source_process(w.source), RMIG_ERR_CANCELLED);
    cr_assert_eq(rmig_sink_process(w.sink, &ev), RMIG_ERR_CANCELLED);
    cr_assert_eq(rmig_sink_wait(w.sink, &ev, RMIG_FOREVER), RMIG_ERR_CANCELLED);
    cr_assert_eq(rmig_source_next_deadline(w.source), RMIG_FOREVER);
    close_world(&w);
}

Test(session, cancel_while_listening) {
    struct world w;
    struct rmig_sink_event ev;
    small_world(&w);
    open_world(&w);
    sim_actor(w.sim, 1, NULL, NULL);
    rmig_sink_cancel(w.sink);
    cr_assert_eq(rmig_sink_wait(w.sink, &ev, RMIG_FOREVER), RMIG_ERR_CANCELLED);
    cr_assert_str_eq(rmig_sink_error(w.sink)->text, "cancelled at the sink");
    close_world(&w);
}

/* The states in which the sink's embedder has the word. */
static void cancel_while_held(bool stream, bool at_source) {
    struct world w;
    struct rmig_sink_event ev;
    small_world(&w);
    w.hold_blocks = !stream;
    w.hold_stream = stream;
    connect_world(&w);
    SOURCE_OK(&w, rmig_source_put(w.source, w.state, stream ? 100 : 0));
    SOURCE_OK(&w, rmig_source_flush(w.source));
    SOURCE_OK(&w, rmig_source_begin_round(w.source));
    SOURCE_OK(&w, save_all(&w));
    SOURCE_OK(&w, rmig_source_end_round_start(w.source));
    cr_assert_eq(rmig_source_process(w.source), RMIG_PENDING);
    be_away(&w, SIM_MS);
    cr_assert((w.events & 1u << (stream ? RMIG_SINK_STREAM : RMIG_SINK_BLOCKS)) != 0);
    sim_actor(w.sim, 1, NULL, NULL);
    if (at_source)
        rmig_source_cancel(w.source);
    else
        rmig_sink_cancel(w.sink);
    be_away(&w, SIM_MS);
    sink_wakes(&w);
    int source = rmig_source_process(w.source), sink = rmig_sink_process(w.sink, &ev);
    if (at_source) { // its migration has not begun
        cr_expect(sink == RMIG_OK && ev.type == RMIG_SINK_FORGOTTEN);
        sink = rmig_sink_error(w.sink)->status;
    }
    cr_expect_eq(source, at_source ? RMIG_ERR_CANCELLED : RMIG_ERR_REFUSED, "%s", rmig_source_error(w.source)->text);
    cr_expect(says(rmig_source_error(w.source)->text, "cancelled at"), "%s", rmig_source_error(w.source)->text);
    cr_expect_eq(sink, at_source ? RMIG_ERR_REFUSED : RMIG_ERR_CANCELLED, "%s", rmig_sink_error(w.sink)->text);
    cr_expect(says(rmig_sink_error(w.sink)->text, "cancelled at"), "%s", rmig_sink_error(w.sink)->text);
    close_world(&w);
}

Test(session, cancel_while_the_sinks_embedder_has_the_word) {
    cancel_while_held(false, false);
    cancel_while_held(true, false);
    cancel_while_held(false, true);
    cancel_while_held(true, true);
}

/* An embedder that is asked about the blocks waits in vain if it is not told that the source has gone. */
Test(session, a_sink_asked_for_blocks_learns_that_the_source_has_gone) {
    for (unsigned way = 0; way < 2; way++) {
        struct world w;
        struct rmig_sink_event ev;
        at_blocks(&w);
        sim_actor(w.sim, 1, NULL, NULL);
        if (way == 0)
            rmig_source_cancel(w.source);
        rmig_source_close(w.source);
        w.source = NULL;
        be_away(&w, SIM_MS);
        SINK_OK(&w, rmig_sink_wait(w.sink, &ev, SIM_SECOND));
        cr_expect_eq(ev.type, RMIG_SINK_FORGOTTEN, "way %u: nothing was said in a second", way);
        cr_expect_eq(rmig_sink_error(w.sink)->status, way == 0 ? RMIG_ERR_REFUSED : RMIG_ERR_PEER_GONE);
        SINK_REFUSES(&w, rmig_sink_accept_blocks(w.sink), RMIG_ERR_STATE, "wait for RMIG_SINK_BLOCKS first");
        close_world(&w);
    }
}

// --- the handover: who has the word, and who owns the guest

/* Handles every event but TAKE itself. */
static void handover_world(struct world *w) {
    small_world(w);
    w->hold_take = true;
    connect_world(w);
    one_round(w);
}

Test(session, a_sink_that_needs_a_minute_to_take_the_guest_gets_it) {
    struct world w;
    handover_world(&w);
    SOURCE_OK(&w, rmig_source_finish_start(w.source));
    uint64_t since = world_now(&w, 0);
    while (world_now(&w, 0) < since + 60 * SIM_SECOND) {
        cr_assert_eq(rmig_source_process(w.source), RMIG_PENDING, "%s", rmig_source_error(w.source)->text);
        be_away(&w, 100 * SIM_MS);
    }
    cr_assert((w.events & 1u << RMIG_SINK_TAKE) != 0);
    cr_assert((w.events & 1u << RMIG_SINK_FINISHED) == 0);
    cr_expect_geq(diary_sends(1, RMIG_MSG_FINISH_PENDING), 23, "one in 2.5 s: a quarter of the source's patience");
    cr_expect_leq(diary_sends(1, RMIG_MSG_FINISH_PENDING), 27);
    SINK_OK(&w, rmig_sink_take(w.sink));
    SINK_REFUSES(&w, rmig_sink_take(w.sink), RMIG_ERR_STATE, "take once");
    SINK_REFUSES(&w, rmig_sink_refuse(w.sink, "no"), RMIG_ERR_STATE, "taken already");
    while (rmig_source_process(w.source) == RMIG_PENDING)
        be_away(&w, SIM_US);
    SOURCE_OK(&w, rmig_source_process(w.source));
    sink_ends(&w);
    cr_assert_eq(w.to.status, RMIG_OK, "%s", w.to.text);
    close_world(&w);
}

static void refuse_the_guest(struct world *w, const struct rmig_sink_event *ev) {
    if (ev->type == RMIG_SINK_TAKE)
        SINK_OK(w, rmig_sink_refuse(w->sink, "the disk is full"));
}

Test(session, a_sink_that_refuses_at_the_end_leaves_the_guest_with_the_source) {
    for (unsigned revokes = 0; revokes < 2; revokes++) {
        struct world w;
        small_world(&w);
        w.cfg.revokes = revokes;
        w.hold_take = true;
        w.watch = refuse_the_guest;
        connect_world(&w);
        one_round(&w);
        cr_assert_eq(rmig_source_finish(w.source), RMIG_ERR_REFUSED);
        cr_assert(says(rmig_source_error(w.source)->text, "the disk is full"), "%s", rmig_source_error(w.source)->text);
        sink_ends(&w);
        cr_assert_eq(w.to.status, RMIG_ERR_SETUP);
        cr_assert_eq(diary_sends(1, RMIG_MSG_FINISH_RESULT), 0);
        close_world(&w);
    }
}

/* The sink's embedder does not look after its session while it thinks. The source's patience ends, for certain, and a
   sink that takes the guest after that learns that it has not got it. */
Test(session, a_sink_that_is_away_too_long_does_not_get_the_guest) {
    struct world w;
    handover_world(&w);
    SOURCE_OK(&w, rmig_source_finish_start(w.source));
    while ((w.events & 1u << RMIG_SINK_TAKE) == 0) {
        cr_assert_eq(rmig_source_process(w.source), RMIG_PENDING);
        be_away(&w, SIM_US);
    }
    sim_actor(w.sim, 1, NULL, NULL); // away
    int status;
    while ((status = rmig_source_process(w.source)) == RMIG_PENDING)
        be_away(&w, 100 * SIM_MS);
    cr_assert_eq(status, RMIG_ERR_TIMEOUT);
    cr_assert(says(rmig_source_error(w.source)->text, "10s (handover-timeout)"), "%s",
              rmig_source_error(w.source)->text);
    sim_spend(w.sim, 1, world_now(&w, 0) - world_now(&w, 1) + SIM_MS);
    SINK_OK(&w, rmig_sink_take(w.sink));
    sim_actor(w.sim, 1, sink_step, &w);
    sink_ends(&w);
    cr_assert_eq(w.to.status, RMIG_ERR_REFUSED, "the source has said that it gave up: %s", w.to.text);
    close_world(&w);
}

/* The answer is on its way to a source that gives up meanwhile: its ERROR proves that it keeps the guest. */
Test(session, a_source_that_gives_up_before_goodbye_keeps_the_guest_and_the_sink_knows) {
    struct world w;
    handover_world(&w);
    SOURCE_OK(&w, rmig_source_finish_start(w.source));
    while ((w.events & 1u << RMIG_SINK_TAKE) == 0) {
        cr_assert_eq(rmig_source_process(w.source), RMIG_PENDING);
        be_away(&w, SIM_US);
    }
    SINK_OK(&w, rmig_sink_take(w.sink));
    cr_assert_eq(diary_sends(1, RMIG_MSG_FINISH_RESULT), 1);
    rmig_source_cancel(w.source);
    cr_assert_eq(rmig_source_process(w.source), RMIG_ERR_CANCELLED);
    sink_ends(&w);
    cr_assert_eq(w.to.status, RMIG_ERR_REFUSED, "%s", w.to.text);
    close_world(&w);
}

static void no_take(struct world *w, const struct rmig_sink_event *ev) {
    (void)w;
    cr_assert_neq(ev->type, RMIG_SINK_TAKE);
}

Test(session, with_auto_take_the_sink_does_not_ask) {
    struct world w;
    small_world(&w);
    w.watch = no_take;
    param(&w.sink_cfg, RMIG_PARAM_AUTO_TAKE, 1);
    connect_world(&w);
    one_round(&w);
    finish(&w);
    close_world(&w);
}

/* Nothing registered is worth the guest's time: all of it goes when the guest runs again, in steps. */
Test(session, deregistering_is_no_part_of_the_downtime) {
    struct world w;
    plan_world(&w, SIM_ORDERED);
    add_full_ram(&w, 256 * RMIG_MIB);
    for (unsigned side = 0; side < 2; side++)
        w.cfg.cpu[side].dereg_mib = 100 * SIM_MS; // 25 s in all
    connect_world(&w);
    one_round(&w);
    uint64_t since = world_now(&w, 0);
    finish(&w);
    cr_assert_lt(w.from.done ? w.from.at : world_now(&w, 0), since + SIM_MS);
    cr_assert_lt(w.to.at, since + SIM_MS);
    cr_assert_eq(sim_exposed(w.sim, 1), 0);
    uint64_t longest = 0;
    struct rmig_sink_event none;
    while (rmig_sink_next_deadline(w.sink) == 0) {
        uint64_t before = world_now(&w, 1);
        cr_assert_eq(rmig_sink_process(w.sink, &none), RMIG_OK);
        longest = sim_max(longest, world_now(&w, 1) - before);
    }
    cr_assert_eq(sink_stats(&w).bytes_registered, 0);
    cr_assert_leq(longest, 65 * 100 * SIM_MS, "64 MiB a call: %llu ns", (unsigned long long)longest);
    close_world(&w);
}

// --- callers that do not look

Test(session, a_refused_save_is_found_out_by_who_looks_at_finish_alone) {
    struct world w;
    small_world(&w);
    connect_world(&w);
    one_round(&w);
    rmig_source_begin_round(w.source);
    rmig_source_save_range(w.source, 0, 0, w.ram[0].from.length + 1);
    SOURCE_REFUSES(&w, rmig_source_end_round(w.source), RMIG_ERR_ARGUMENT, "outside block");
    cr_assert_lt(rmig_source_finish(w.source), 0);
    rmig_source_forgive(w.source);
    SOURCE_OK(&w, save_all(&w));
    SOURCE_OK(&w, rmig_source_end_round(w.source));
    finish(&w);
    close_world(&w);
}

Test(session, whatever_call_refuses_blocks_pages_or_bytes_the_end_returns_it) {
    uint64_t bitmap = 1;
    for (unsigned call = 0; call < 8; call++) {
        struct world w;
        small_world(&w);
        connect_world(&w);
        one_round(&w);
        struct rmig_source *s = w.source;
        const uint64_t length = w.ram[0].from.length;
        if (call < 5)
            SOURCE_OK(&w, rmig_source_begin_round(s));
        uint32_t nowhere = 0;
        uint64_t offset = 0;
        int64_t refused = call == 0   ? rmig_source_save_page(s, 7, 0)
                          : call == 1 ? rmig_source_save_bitmap(s, 0, &bitmap, length / PAGE, 64)
                          : call == 2 ? rmig_source_put(s, NULL, 1)
                          : call == 3 ? rmig_source_add_block(s, NULL, NULL)
                          : call == 4 ? (rmig_source_block_at(s, UINT64_MAX, &nowhere, &offset),
                                         rmig_source_save_page(s, nowhere, offset)) // an address in no block
                          : call == 5 ? rmig_source_save_page(s, 0, 0) // outside a round
                          : call == 6 ? rmig_source_save_range(s, 0, 0, 1)
                                      : rmig_source_put_some(s, NULL, 1);
        cr_assert_lt(refused, 0, "%u", call);
        if (call < 5) {
            cr_assert_eq(rmig_source_end_round_start(s), refused, "%u", call);
            cr_assert_eq(rmig_source_process(s), refused, "%u: process says that the round is over", call);
            cr_assert_eq(rmig_source_end_round(s), refused, "%u: only forgive forgives", call);
        } else {
            SOURCE_OK(&w, rmig_source_begin_round(s));
            SOURCE_OK(&w, save_all(&w));
            cr_assert_eq(rmig_source_end_round(s), refused, "%u", call);
        }
        rmig_source_forgive(s);
        SOURCE_OK(&w, rmig_source_end_round(s));
        finish(&w);
        close_world(&w);
    }
}

Test(session, a_question_without_an_answer_taints_nothing) {
    struct world w;
    uint32_t block = 0;
    small_world(&w);
    connect_world(&w);
    SOURCE_OK(&w, rmig_source_begin_round(w.source));
    SOURCE_REFUSES(&w, rmig_source_block_at(w.source, UINT64_MAX, &block, NULL), RMIG_ERR_ARGUMENT, "no block");
    cr_assert_eq(block, UINT32_MAX);
    SOURCE_OK(&w, save_all(&w));
    SOURCE_OK(&w, rmig_source_end_round(w.source));
    finish(&w);
    close_world(&w);
}

/* Without a look at finish_start its refusal must not be taken for the handover. */
Test(session, process_does_not_say_ok_where_connect_was_refused) {
    struct world w;
    small_world(&w);
    open_world(&w);
    cr_assert_lt(rmig_source_connect_start(w.source, "nonsense:x"), 0);
    cr_assert_lt(rmig_source_process(w.source), 0);
    rmig_source_begin_round(w.source);
    rmig_source_save_range(w.source, 0, 0, PAGE);
    rmig_source_end_round_start(w.source);
    cr_assert_lt(rmig_source_process(w.source), 0);
    rmig_source_finish_start(w.source);
    cr_assert_lt(rmig_source_process(w.source), 0, "the guest has not moved");
    close_world(&w);
}

Test(session, process_does_not_say_ok_for_an_operation_that_was_refused) {
    struct world w;
    small_world(&w);
    connect_world(&w);
    cr_assert_lt(rmig_source_finish_start(w.source), 0);
    cr_assert_eq(rmig_source_process(w.source), RMIG_ERR_STATE);
    SOURCE_OK(&w, rmig_source_begin_round(w.source));
    SOURCE_OK(&w, save_all(&w));
    SOURCE_OK(&w, rmig_source_end_round_start(w.source));
    cr_assert_lt(rmig_source_finish_start(w.source), 0);
    while (rmig_source_process(w.source) == RMIG_PENDING)
        be_away(&w, SIM_US);
    cr_assert_eq(rmig_source_process(w.source), RMIG_ERR_STATE, "the round is over, the guest is not handed over");
    finish(&w);
    close_world(&w);
}

/* The sink's embedder looks at nothing: the source hears at once what was refused there. */
static void add_nothing_and_do_not_look(struct world *w, const struct rmig_sink_event *ev) {
    if (ev->type == RMIG_SINK_BLOCKS) {
        rmig_sink_add_block(w->sink, NULL, NULL);
        rmig_sink_accept_blocks(w->sink);
    }
}

Test(session, a_source_hears_what_was_refused_at_a_sink_that_does_not_look) {
    struct world w;
    small_world(&w);
    w.hold_blocks = w.listens_on = true;
    w.watch = add_nothing_and_do_not_look;
    connect_world(&w);
    SOURCE_OK(&w, rmig_source_begin_round(w.source));
    SOURCE_OK(&w, save_all(&w));
    cr_assert_lt(rmig_source_end_round(w.source), RMIG_SESSION_ERRORS);
    cr_assert(says(rmig_source_error(w.source)->text, "the description is NULL"), "%s",
              rmig_source_error(w.source)->text);
    close_world(&w);
}

static void add_nothing(struct world *w, const struct rmig_sink_event *ev) {
    if (ev->type == RMIG_SINK_BLOCKS) {
        rmig_sink_add_block(w->sink, NULL, NULL);
        rmig_sink_add_block(w->sink, &w->ram[0].to, NULL);
        SINK_REFUSES(w, rmig_sink_accept_blocks(w->sink), RMIG_ERR_ARGUMENT, "the description is NULL");
        rmig_sink_forgive(w->sink);
        SINK_OK(w, rmig_sink_accept_blocks(w->sink));
    }
}

Test(session, a_block_refused_at_the_sink_is_found_out_when_the_blocks_are_accepted) {
    struct world w;
    small_world(&w);
    w.hold_blocks = true;
    w.watch = add_nothing;
    connect_world(&w);
    one_round(&w);
    finish(&w);
    close_world(&w);
}

/* A program that does not look whether open succeeded goes through all its calls. */
Test(session, every_call_takes_null_for_its_object) {
    struct rmig_sink_event ev;
    struct rmig_block_entry entry;
    struct rmig_stats st;
    struct rmig_fd fds[12];
    uint64_t bitmap = 1, offset;
    uint32_t block;
    char text[80];
    cr_expect_eq(rmig_source_add_block(NULL, NULL, &block), RMIG_ERR_ARGUMENT);
    cr_expect_eq(rmig_source_block_at(NULL, 0, &block, &offset), RMIG_ERR_ARGUMENT);
    cr_expect_eq(rmig_source_connect_start(NULL, "a:1"), RMIG_ERR_ARGUMENT);
    cr_expect_eq(rmig_source_connect(NULL, "a:1"), RMIG_ERR_ARGUMENT);
    cr_expect_eq(rmig_source_begin_round(NULL), RMIG_ERR_ARGUMENT);
    cr_expect_eq(rmig_source_save_page(NULL, 0, 0), RMIG_ERR_ARGUMENT);
    cr_expect_eq(rmig_source_save_range(NULL, 0, 0, 1), RMIG_ERR_ARGUMENT);
    cr_expect_eq(rmig_source_save_bitmap(NULL, 0, &bitmap, 0, 1), RMIG_ERR_ARGUMENT);
    cr_expect_eq(rmig_source_end_round_start(NULL), RMIG_ERR_ARGUMENT);
    cr_expect_eq(rmig_source_end_round(NULL), RMIG_ERR_ARGUMENT);
    cr_expect_eq(rmig_source_put_some(NULL, "x", 1), RMIG_ERR_ARGUMENT);
    cr_expect_eq(rmig_source_put(NULL, "x", 1), RMIG_ERR_ARGUMENT);
    cr_expect_eq(rmig_source_flush_start(NULL), RMIG_ERR_ARGUMENT);
    cr_expect_eq(rmig_source_flush(NULL), RMIG_ERR_ARGUMENT);
    cr_expect_eq(rmig_source_finish_start(NULL), RMIG_ERR_ARGUMENT);
    cr_expect_eq(rmig_source_finish(NULL), RMIG_ERR_ARGUMENT);
    cr_expect_eq(rmig_source_process(NULL), RMIG_ERR_ARGUMENT);
    cr_expect_eq(rmig_source_fds(NULL, fds, 4), RMIG_ERR_ARGUMENT);
    cr_expect_eq(rmig_source_next_deadline(NULL), RMIG_FOREVER);
    cr_expect(says(rmig_source_error(NULL)->text, "rmig_source_open failed"));
    cr_expect_not(rmig_source_extended(NULL));
    memset(&st, 1, sizeof st);
    rmig_source_stats(NULL, &st);
    cr_expect_eq(st.rounds, 0);
    rmig_source_stats(NULL, NULL);
    rmig_source_forgive(NULL);
    rmig_source_cancel(NULL);
    cr_expect_eq(rmig_sink_listen(NULL, "a:1"), RMIG_ERR_ARGUMENT);
    cr_expect_eq(rmig_sink_address(NULL, text, sizeof text), RMIG_ERR_ARGUMENT);
    cr_expect_eq(rmig_sink_add_block(NULL, NULL, &block), RMIG_ERR_ARGUMENT);
    cr_expect_eq(rmig_sink_peer_block(NULL, 0, &entry), RMIG_ERR_ARGUMENT);
    cr_expect_eq(rmig_sink_clear_blocks(NULL), RMIG_ERR_ARGUMENT);
    cr_expect_eq(rmig_sink_accept_blocks(NULL), RMIG_ERR_ARGUMENT);
    cr_expect_eq(rmig_sink_take(NULL), RMIG_ERR_ARGUMENT);
    cr_expect_eq(rmig_sink_refuse(NULL, "no"), RMIG_ERR_ARGUMENT);
    cr_expect_eq(rmig_sink_get(NULL, text, sizeof text), 0);
    cr_expect_not(rmig_sink_has_return_path(NULL));
    cr_expect_eq(rmig_sink_return_put(NULL, "x", 1), RMIG_ERR_ARGUMENT);
    cr_expect_eq(rmig_sink_complete(NULL), RMIG_ERR_ARGUMENT);
    cr_expect_eq(rmig_sink_process(NULL, &ev), RMIG_ERR_ARGUMENT);
    cr_expect_eq(rmig_sink_wait(NULL, &ev, 1), RMIG_ERR_ARGUMENT);
    cr_expect_eq(rmig_sink_fds(NULL, fds, 12), RMIG_ERR_ARGUMENT);
    cr_expect_eq(rmig_sink_next_deadline(NULL), RMIG_FOREVER);
    cr_expect(says(rmig_sink_error(NULL)->text, "rmig_sink_open failed"));
    cr_expect_not(rmig_sink_extended(NULL));
    rmig_sink_stats(NULL, &st);
    rmig_sink_stats(NULL, NULL);
    rmig_sink_forgive(NULL);
    rmig_sink_cancel(NULL);
    cr_expect_eq(rmig_expected_downtime_ns(NULL, 1), RMIG_FOREVER);
}

// --- silence: what was being waited for, and for how long

struct quiet {
    int side; // whose message is lost
    uint32_t type; // 0: a write
    unsigned nth; // of that type
    bool source_waits;
    int status;
    uint64_t limit_s;
    const char *text;
};

static void fall_silent(const struct quiet *q, struct world *w) {
    plan_world(w, SIM_ORDERED);
    add_full_ram(w, 3 * RMIG_MIB);
    param(&w->source_cfg, RMIG_PARAM_CONNECT_TIMEOUT, 3 * SIM_SECOND);
    param(&w->sink_cfg, RMIG_PARAM_CONNECT_TIMEOUT, 4 * SIM_SECOND);
    param(&w->source_cfg, RMIG_PARAM_IO_TIMEOUT, 5 * SIM_SECOND);
    param(&w->sink_cfg, RMIG_PARAM_IO_TIMEOUT, 6 * SIM_SECOND);
    open_world(w);
    diary.stop_side = q->side;
    diary.stop_type = q->type;
    diary.stop_nth = q->nth;
    diary.stop_on_write = q->type == 0;
    struct rmig_error err = {0};
    sim_actor(w->sim, 0, source_step, w);
    cr_assert_eq(sim_run(w->sim, 100 * SIM_SECOND, &err), RMIG_OK, "%s", err.text);
    cr_assert_neq(diary.stopped, 0, "%s was never sent", rmig_message_name(q->type));
}

Test(session, silence_says_what_was_awaited_and_for_how_long) {
    static const struct quiet quiet[] = {
        {1, RMIG_MSG_HELLO_RESULT, 1, true, RMIG_ERR_TIMEOUT, 3,
         "for 3s (connect-timeout) while waiting for HELLO_RESULT"},
        {1, RMIG_MSG_READY, 5, true, RMIG_ERR_TIMEOUT, 5, "for 5s (io-timeout) while waiting for READY"},
        {1, RMIG_MSG_BLOCKS_RESULT, 1, true, RMIG_ERR_TIMEOUT, 5, "while waiting for BLOCKS_RESULT"},
        {1, RMIG_MSG_REGISTER_BATCH_RESULT, 1, true, RMIG_ERR_TIMEOUT, 5, "while waiting for REGISTER_BATCH_RESULT"},
        {0, 0, 0, true, RMIG_ERR_TIMEOUT, 5, "while waiting for writes to complete"},
        {1, RMIG_MSG_FINISH_RESULT, 1, true, RMIG_ERR_TIMEOUT, 10,
         "for 10s (handover-timeout) while waiting for FINISH_RESULT"},
        {0, RMIG_MSG_GOODBYE, 1, true, RMIG_ERR_HANDOVER, 5, "while waiting for the handover to be delivered"},
        {0, RMIG_MSG_BLOCKS, 1, false, RMIG_ERR_TIMEOUT, 6, "for 6s (io-timeout) while waiting for the next message"},
        {0, RMIG_MSG_REGISTER_BATCH, 1, false, RMIG_ERR_TIMEOUT, 6, "while waiting for the next message"},
        {0, 0, 0, false, RMIG_ERR_TIMEOUT, 6, "while waiting for the next message"},
        {0, RMIG_MSG_REGISTER_FINISHED, 2, false, RMIG_ERR_TIMEOUT, 6, "while waiting for the next message"},
        {0, RMIG_MSG_QEMU_FILE, 1, false, RMIG_ERR_TIMEOUT, 6, "while waiting for the next message"},
        {0, RMIG_MSG_GOODBYE, 1, false, RMIG_ERR_HANDOVER, 6, "while waiting for GOODBYE"},
    };
    for (size_t i = 0; i < sizeof quiet / sizeof quiet[0]; i++) {
        struct world w;
        fall_silent(&quiet[i], &w);
        const struct outcome *o = quiet[i].source_waits ? &w.from : &w.to;
        uint64_t waited = o->at - diary.stopped, limit = quiet[i].limit_s * SIM_SECOND;
        cr_expect_eq(o->status, quiet[i].status, "%zu: %s", i, o->text);
        cr_expect(says(o->text, quiet[i].text), "%zu: \"%s\" does not say \"%s\"", i, o->text, quiet[i].text);
        cr_expect(waited <= limit + SIM_MS && waited + 10 * SIM_MS >= limit, "%zu: after %llu ns", i,
                  (unsigned long long)waited);
        close_world(&w);
    }
}

/* The sink goes on listening, and says why it forgot the source. */
Test(session, a_source_that_does_not_say_hello_is_given_up) {
    struct world w;
    struct rmig_error err = {0};
    small_world(&w);
    w.listens_on = true;
    param(&w.sink_cfg, RMIG_PARAM_CONNECT_TIMEOUT, 2 * SIM_SECOND);
    open_world(&w);
    diary.stop_type = RMIG_MSG_HELLO;
    diary.stop_nth = 1;
    diary.stop_drops = true;
    cr_expect_eq(rmig_source_connect(w.source, w.address), RMIG_ERR_REFUSED);
    const char *part = "nothing from the source for 2s (connect-timeout) while waiting for HELLO";
    cr_expect(says(rmig_source_error(w.source)->text, part), "%s", rmig_source_error(w.source)->text);
    rmig_source_close(w.source);
    be_away(&w, SIM_SECOND);
    cr_assert_not(w.to.done, "%s", w.to.text);
    cr_expect_eq(rmig_sink_error(w.sink)->status, RMIG_ERR_TIMEOUT);
    cr_expect(says(rmig_sink_error(w.sink)->text, part), "%s", rmig_sink_error(w.sink)->text);
    cr_assert_eq(rmig_source_open(sim_fabric(w.sim, 0), NULL, &w.source, &err), RMIG_OK);
    SOURCE_OK(&w, rmig_source_add_block(w.source, &w.ram[0].from, NULL));
    SOURCE_OK(&w, rmig_source_connect(w.source, w.address));
    one_round(&w);
    finish(&w);
    close_world(&w);
}

static void connect_into_silence(enum sim_op op, const char *text) {
    struct world w;
    small_world(&w);
    w.cfg.faults[0].kind = SIM_FAULT_SILENCE;
    w.cfg.faults[0].op = op;
    w.cfg.faults[0].side = -1;
    w.cfg.faults[0].nth = 1;
    param(&w.source_cfg, RMIG_PARAM_CONNECT_TIMEOUT, 2 * SIM_SECOND);
    open_world(&w);
    cr_expect_eq(rmig_source_connect(w.source, w.address), RMIG_ERR_TIMEOUT);
    cr_expect(says(rmig_source_error(w.source)->text, text), "%s", rmig_source_error(w.source)->text);
    cr_expect(world_now(&w, 0) >= 2 * SIM_SECOND && world_now(&w, 0) < 2 * SIM_SECOND + SIM_MS);
    close_world(&w);
}

Test(session, connect_gives_up_after_connect_timeout) {
    connect_into_silence(SIM_OPEN, "waiting for the address to be resolved");
    connect_into_silence(SIM_CONNECT, "waiting for the connection");
    connect_into_silence(SIM_ACCEPT, "waiting for the connection");
}

Test(session, nobody_there_is_unreachable_or_refused_at_once) {
    struct world w;
    small_world(&w);
    open_world(&w);
    int status = rmig_source_connect(w.source, "sink:7999");
    cr_assert(status == RMIG_ERR_UNREACHABLE || status == RMIG_ERR_REFUSED, "%d", status);
    cr_assert(says(rmig_source_error(w.source)->text, "nobody listens there"), "%s", rmig_source_error(w.source)->text);
    cr_assert_lt(world_now(&w, 0), SIM_SECOND);
    close_world(&w);
}

// --- names with several addresses: hosts of the simulator with a '+' between them

static const char *by_name(const struct world *w, const char *hosts) {
    static char address[128];
    snprintf(address, sizeof address, "%s%s", hosts, strrchr(w->address, ':'));
    return address;
}

/* connect-timeout is shared out: what a dead address takes is not all there is. */
Test(session, an_address_that_does_not_answer_has_its_share_of_connect_timeout) {
    struct world w;
    small_world(&w);
    param(&w.source_cfg, RMIG_PARAM_CONNECT_TIMEOUT, 8 * SIM_SECOND);
    open_world(&w);
    SOURCE_OK(&w, rmig_source_connect(w.source, by_name(&w, "a.dead+b.invalid+c.dead+sink")));
    uint64_t now = world_now(&w, 0); // 8 s / 4, then a share of the 6 s that are left for 2
    cr_expect(now >= 5 * SIM_SECOND && now < 5 * SIM_SECOND + 10 * SIM_MS, "%llu", (unsigned long long)now);
    one_round(&w);
    finish(&w);
    close_world(&w);
}

Test(session, an_embedder_that_was_away_still_tries_each_address) {
    struct world w;
    int status;
    small_world(&w);
    open_world(&w);
    SOURCE_OK(&w, rmig_source_connect_start(w.source, by_name(&w, "a.dead+sink")));
    sim_spend(w.sim, 0, 11 * SIM_SECOND); // longer than connect-timeout
    while ((status = rmig_source_process(w.source)) == RMIG_PENDING) {
        struct rmig_ep *ep = &w.sim->side[0].eps->base;
        cr_assert_eq(diary.below->wait(sim_fabric(w.sim, 0), &ep, 1, rmig_source_next_deadline(w.source), NULL),
                     RMIG_OK);
    }
    SOURCE_OK(&w, status);
    one_round(&w);
    finish(&w);
    close_world(&w);
}

Test(session, what_stands_against_each_address_of_a_name_is_told_within_connect_timeout) {
    struct world w;
    small_world(&w);
    param(&w.source_cfg, RMIG_PARAM_CONNECT_TIMEOUT, 6 * SIM_SECOND);
    open_world(&w);
    cr_expect_eq(rmig_source_connect(w.source, by_name(&w, "a.dead+b.invalid+c.dead")), RMIG_ERR_TIMEOUT);
    const char *text = rmig_source_error(w.source)->text;
    cr_expect(says(text, "a.dead:") && says(text, "did not answer for 2s, its share of connect-timeout"), "%s", text);
    cr_expect(says(text, "b.invalid:") && says(text, "the name of the host cannot be resolved"), "%s", text);
    cr_expect(says(text, "c.dead:"), "%s", text);
    cr_expect_not(says(text, "handover"), "%s", text);
    uint64_t now = world_now(&w, 0);
    cr_expect(now >= 6 * SIM_SECOND && now < 6 * SIM_SECOND + 10 * SIM_MS, "%llu", (unsigned long long)now);
    close_world(&w);
}

Test(session, every_address_of_a_long_list_is_named) {
    struct world w;
    char hosts[64] = "a.invalid", name[8];
    small_world(&w);
    open_world(&w);
    for (char c = 'b'; c <= 'f'; c++) // as many as the simulator's names have room for
        snprintf(hosts + strlen(hosts), sizeof hosts - strlen(hosts), "+%c.invalid", c);
    cr_expect_eq(rmig_source_connect(w.source, by_name(&w, hosts)), RMIG_ERR_UNREACHABLE);
    for (char c = 'a'; c <= 'f'; c++) {
        snprintf(name, sizeof name, "%c.inval", c);
        cr_expect(says(rmig_source_error(w.source)->text, name), "%s", rmig_source_error(w.source)->text);
    }
    close_world(&w);
}

/* Whole words stand for as many as a text has room for, and the rest is counted. */
Test(session, addresses_beyond_the_room_of_an_error_are_counted) {
    static const char full[] = ".dead:7000 did not answer for 1s, its share of connect-timeout";
    struct world w;
    char hosts[64] = ".dead";
    unsigned named = 0, more = 0;
    small_world(&w);
    open_world(&w);
    for (unsigned i = 1; i < 10; i++)
        snprintf(hosts + strlen(hosts), sizeof hosts - strlen(hosts), "+.dead");
    cr_expect_eq(rmig_source_connect(w.source, by_name(&w, hosts)), RMIG_ERR_TIMEOUT);
    const char *text = rmig_source_error(w.source)->text, *at = text, *end;
    for (; (end = strstr(at, "...; ")) != NULL; at = end + 5, named++)
        cr_expect(strncmp(at, full, (size_t)(end - at)) == 0 && full[end - at] == ' ', "cut in a word: %s", text);
    cr_expect_eq(sscanf(at, "and %u more", &more), 1, "%s", text);
    cr_expect(named >= 8 && named + more == 10, "%s", text);
    close_world(&w);
}

/* What this end lacks it lacks for the next address too. */
Test(session, what_fails_at_this_end_is_no_address_that_cannot_be_reached) {
    struct world w;
    small_world(&w);
    open_world(&w);
    cr_expect_eq(rmig_source_connect(w.source, by_name(&w, "a.full+sink")), RMIG_ERR_FABRIC);
    const char *text = rmig_source_error(w.source)->text;
    cr_expect_str_eq(text, "this end has no descriptor left");
    cr_expect_eq(rmig_source_error(w.source)->provider_code, 24);
    close_world(&w);
}

/* Only an ERROR before the connection is there has that word; elsewhere a fabric may leave anything in its place. */
Test(session, at_this_end_means_nothing_in_other_events) {
    struct world w;
    struct rmig_source *second = NULL;
    struct rmig_error err = {0};
    small_world(&w);
    w.cfg.stray_at_this_end = true;
    connect_world(&w); // RESOLVED, ESTABLISHED
    cr_assert_eq(rmig_source_open(sim_fabric(w.sim, 0), NULL, &second, &err), RMIG_OK);
    cr_assert_eq(rmig_source_add_block(second, &w.ram[0].from, NULL), RMIG_OK);
    cr_expect_eq(rmig_source_connect(second, by_name(&w, "sink+b.invalid")), RMIG_ERR_REFUSED); // REJECTED
    cr_expect(says(rmig_source_error(second)->text, "b.invalid:"), "%s", rmig_source_error(second)->text);
    rmig_source_close(second);
    one_round(&w); // SEND, RECV, WRITE
    finish(&w); // DISCONNECTED
    close_world(&w);
}

/* The first write fails: the status, and the words. */
static int fail_a_write(bool stray, char *text, size_t size) {
    struct world w;
    small_world(&w);
    w.cfg.stray_at_this_end = stray;
    w.cfg.faults[0] = (struct sim_fault){SIM_FAULT_COMPLETION, SIM_WRITE, 0, 1};
    connect_world(&w);
    SOURCE_OK(&w, rmig_source_begin_round(w.source));
    SOURCE_OK(&w, rmig_source_save_range(w.source, 0, 0, w.ram[0].from.length));
    int status = rmig_source_end_round(w.source);
    snprintf(text, size, "%s", rmig_source_error(w.source)->text);
    close_world(&w);
    return status;
}

Test(session, at_this_end_means_nothing_once_there_is_a_connection) {
    char usual[512], stray[512];
    int status = fail_a_write(false, usual, sizeof usual);
    cr_expect_lt(status, 0);
    cr_expect_eq(fail_a_write(true, stray, sizeof stray), status);
    cr_expect_str_eq(stray, usual);
}

/* The one that was there is what counts. */
Test(session, a_sink_that_is_busy_says_so_and_the_next_address_is_tried) {
    struct world w;
    struct rmig_source *second = NULL;
    struct rmig_error err = {0};
    small_world(&w);
    connect_world(&w);
    cr_assert_eq(rmig_source_open(sim_fabric(w.sim, 0), NULL, &second, &err), RMIG_OK);
    cr_assert_eq(rmig_source_add_block(second, &w.ram[0].from, NULL), RMIG_OK);
    cr_expect_eq(rmig_source_connect(second, by_name(&w, "sink+b.invalid")), RMIG_ERR_REFUSED);
    const char *text = rmig_source_error(second)->text;
    cr_expect(says(text, "sink:") && says(text, "it is busy with another source"), "%s", text);
    cr_expect(says(text, "b.invalid:"), "%s", text);
    rmig_source_close(second);
    one_round(&w);
    finish(&w);
    close_world(&w);
}

/* Whoever comes then cannot know why. */
Test(session, nobody_listens_where_a_migration_has_begun_and_the_hint_says_so) {
    struct world w;
    struct rmig_source *second = NULL;
    struct rmig_error err = {0};
    small_world(&w);
    connect_world(&w);
    one_round(&w);
    cr_assert_eq(rmig_source_open(sim_fabric(w.sim, 0), NULL, &second, &err), RMIG_OK);
    cr_assert_eq(rmig_source_add_block(second, &w.ram[0].from, NULL), RMIG_OK);
    cr_expect_lt(rmig_source_connect(second, w.address), 0);
    cr_expect(says(rmig_source_error(second)->text, "nobody listens there"), "%s", rmig_source_error(second)->text);
    cr_expect(says(rmig_status_hint(RMIG_ERR_UNREACHABLE), "whose migration has begun"));
    rmig_source_close(second);
    finish(&w);
    close_world(&w);
}

/* All of a name's addresses lead to one sink, whose embedder is away for the first one's share: the source has given
   that up, so it is not what the sink is busy with. */
static void connect_to_a_sink_that_was_away(bool v1) {
    struct world w;
    small_world(&w);
    if (v1)
        version_1(&w);
    w.listens_on = true;
    param(&w.source_cfg, RMIG_PARAM_CONNECT_TIMEOUT, 8 * SIM_SECOND);
    open_world(&w);
    sim_spend(w.sim, 1, 5 * SIM_SECOND); // the shares are 4 s
    SOURCE_OK(&w, rmig_source_connect(w.source, by_name(&w, "sink+sink")));
    cr_expect_geq(world_now(&w, 0), 5 * SIM_SECOND);
    cr_expect(w.events & 1u << RMIG_SINK_FORGOTTEN, "the sink has not met the request that was given up");
    one_round(&w);
    finish(&w);
    close_world(&w);
}

Test(session, a_request_that_was_given_up_does_not_keep_a_sink_busy) { connect_to_a_sink_that_was_away(false); }

Test(session, a_version_1_request_that_was_given_up_does_not_keep_a_sink_busy) {
    connect_to_a_sink_that_was_away(true);
}

/* The clock of a wait begins with the wait, not with the last word before a pause that was this end's own. */
Test(session, a_source_that_was_busy_elsewhere_still_gives_the_sink_io_timeout) {
    for (unsigned v1 = 0; v1 < 2; v1++) {
        struct world w;
        small_world(&w);
        if (v1)
            version_1(&w);
        param(&w.source_cfg, RMIG_PARAM_IO_TIMEOUT, 2 * SIM_SECOND);
        param(&w.sink_cfg, RMIG_PARAM_IO_TIMEOUT, 3600 * SIM_SECOND);
        connect_world(&w);
        one_round(&w);
        unsigned turns;
        cr_assert_eq(look_after(&w, 10 * SIM_SECOND, &turns), RMIG_OK, "%s", rmig_source_error(w.source)->text);
        one_round(&w);
        be_away(&w, 10 * SIM_SECOND);
        SOURCE_OK(&w, rmig_source_put(w.source, w.state, 100));
        SOURCE_OK(&w, rmig_source_flush(w.source));
        w.want = 100;
        be_away(&w, 10 * SIM_SECOND);
        finish(&w);
        close_world(&w);
    }
}

Test(session, a_sink_whose_embedder_was_slow_still_gives_the_source_io_timeout) {
    struct world w;
    small_world(&w);
    param(&w.source_cfg, RMIG_PARAM_IO_TIMEOUT, 3600 * SIM_SECOND);
    param(&w.sink_cfg, RMIG_PARAM_IO_TIMEOUT, 2 * SIM_SECOND);
    w.hold_blocks = w.hold_stream = true;
    connect_world(&w);
    SOURCE_OK(&w, rmig_source_begin_round(w.source));
    SOURCE_OK(&w, save_all(&w));
    unsigned turns;
    cr_assert_eq(look_after(&w, 10 * SIM_SECOND, &turns), RMIG_OK);
    sink_wakes(&w);
    SINK_OK(&w, accept_ram(&w)); // the memory had to be mapped first
    SOURCE_OK(&w, rmig_source_end_round(w.source));
    SOURCE_OK(&w, rmig_source_put(w.source, w.state, 100));
    SOURCE_OK(&w, rmig_source_flush(w.source));
    cr_assert_eq(look_after(&w, 10 * SIM_SECOND, &turns), RMIG_OK);
    w.hold_stream = false;
    sink_wakes(&w);
    read_stream(&w); // the device state took its time
    finish(&w);
    close_world(&w);
}

// --- keepalive

Test(session, an_idle_extended_session_outlives_io_timeout) {
    struct world w;
    unsigned turns;
    small_world(&w);
    param(&w.source_cfg, RMIG_PARAM_IO_TIMEOUT, 2 * SIM_SECOND);
    param(&w.sink_cfg, RMIG_PARAM_IO_TIMEOUT, 2 * SIM_SECOND);
    connect_world(&w);
    one_round(&w);
    cr_assert_eq(look_after(&w, 60 * SIM_SECOND, &turns), RMIG_OK, "%s", rmig_source_error(w.source)->text);
    cr_expect_lt(turns, 1000, "%u turns in 60 s", turns);
    cr_expect_geq(diary_sends(0, RMIG_MSG_KEEPALIVE), 30);
    cr_expect_leq(diary_sends(0, RMIG_MSG_KEEPALIVE), 240);
    cr_assert(!w.to.done, "%s", w.to.text);
    one_round(&w);
    finish(&w);
    close_world(&w);
}

Test(session, a_slow_round_keeps_the_sink_alive) {
    struct world w;
    plan_world(&w, SIM_ORDERED);
    add_full_ram(&w, 2 * RMIG_MIB);
    param(&w.source_cfg, RMIG_PARAM_MAX_BANDWIDTH, 128 * 1024); // 16 s
    param(&w.source_cfg, RMIG_PARAM_IO_TIMEOUT, 2 * SIM_SECOND);
    param(&w.sink_cfg, RMIG_PARAM_IO_TIMEOUT, 2 * SIM_SECOND);
    connect_world(&w);
    one_round(&w);
    cr_expect_gt(world_now(&w, 0), 14 * SIM_SECOND);
    finish(&w);
    close_world(&w);
}

Test(session, a_stream_that_nobody_reads_makes_the_source_wait_and_then_fail) {
    struct world w;
    small_world(&w);
    w.hold_stream = true;
    param(&w.source_cfg, RMIG_PARAM_IO_TIMEOUT, 3 * SIM_SECOND);
    param(&w.sink_cfg, RMIG_PARAM_IO_TIMEOUT, 2 * SIM_SECOND);
    connect_world(&w);
    one_round(&w);
    SOURCE_OK(&w, rmig_source_put(w.source, w.state, 100));
    SOURCE_OK(&w, rmig_source_flush(w.source));
    uint64_t before = world_now(&w, 0);
    cr_expect_eq(rmig_source_finish(w.source), RMIG_ERR_TIMEOUT);
    cr_expect(says(rmig_source_error(w.source)->text, "for 3s (io-timeout) while waiting for READY"), "%s",
              rmig_source_error(w.source)->text);
    cr_expect_leq(world_now(&w, 0) - before, 3 * SIM_SECOND + 10 * SIM_MS);
    sink_ends(&w); // it hears of that although nobody reads
    cr_expect_eq(w.to.status, RMIG_ERR_REFUSED);
    cr_expect(says(w.to.text, "the source gave up: nothing from the sink for 3s"), "%s", w.to.text);
    close_world(&w);
}

// --- merging

struct extents {
    bool pin_all;
    enum sim_mode mode;
    uint64_t merge_max, write_max, chunk;
    unsigned density; // percent of pages
};

#define MERGE_PAGES 2560 // 10 MiB

/* What the writes must be, found page by page. Returns how many. */
static size_t expected_extents(const struct extents *x, const bool *want, uint64_t (*out)[2]) {
    uint64_t most = sim_min(x->merge_max, x->write_max) / PAGE;
    size_t n = 0;
    for (uint64_t page = 0; page < MERGE_PAGES; page++) {
        if (!want[page])
            continue;
        bool joins = n > 0 && out[n - 1][0] + out[n - 1][1] == page && out[n - 1][1] < most &&
                     (x->pin_all || page % (x->chunk / PAGE) != 0);
        if (joins) {
            out[n - 1][1]++;
            continue;
        }
        out[n][0] = page;
        out[n++][1] = 1;
    }
    return n;
}

/* Saves the pages in disorder, in all three ways, many of them twice. */
static void save_in_disorder(struct world *w, const bool *want) {
    uint64_t bitmap[2] = {0, 0};
    for (uint64_t i = 0; i < 2 * MERGE_PAGES; i++) {
        uint64_t page = i * 1009 % MERGE_PAGES, n = 1;
        if (!want[page])
            continue;
        while (i % 3 == 0 && n < 20 && page + n < MERGE_PAGES && want[page + n])
            n++;
        bitmap[0] = n >= 64 ? UINT64_MAX : ((uint64_t)1 << n) - 1;
        if (i % 3 == 0 && i % 2 == 0)
            SOURCE_OK(w, rmig_source_save_range(w->source, 0, page * PAGE + 1, n * PAGE - 2));
        else if (i % 3 == 0)
            SOURCE_OK(w, rmig_source_save_bitmap(w->source, 0, bitmap, page, n));
        else
            SOURCE_OK(w, rmig_source_save_page(w->source, 0, page * PAGE + i % PAGE));
    }
}

static void check_extents(const struct extents *x, const struct world *w, const bool *want) {
    static uint64_t extent[MERGE_PAGES][2];
    size_t n = expected_extents(x, want, extent), at = 0;
    const uint8_t *host = w->ram[0].from.host;
    uint64_t pages = 0;
    for (size_t i = 0; i < diary.count; i++) {
        const struct entry *e = &diary.entry[i];
        if (e->did != DID_WRITE)
            continue;
        cr_assert_lt(at, n, "more than %zu writes", n);
        cr_assert(e->local == host + extent[at][0] * PAGE && e->length == extent[at][1] * PAGE,
                  "write %zu is page %llu + %llu bytes, must be page %llu + %llu pages", at,
                  (unsigned long long)((uint64_t)(e->local - host) / PAGE), (unsigned long long)e->length,
                  (unsigned long long)extent[at][0], (unsigned long long)extent[at][1]);
        pages += extent[at++][1];
    }
    struct rmig_stats st = source_stats(w);
    cr_assert_eq(at, n, "%zu writes, must be %zu", at, n);
    cr_assert_eq(st.writes_posted, n);
    cr_assert_leq(st.writes_signalled, n);
    cr_assert_geq(st.writes_signalled, 1);
    cr_assert_eq(st.pages_written, pages);
    cr_assert_eq(st.bytes_written, pages * PAGE);
    cr_assert_eq(st.bytes_pending, 0);
}

/* The pages are saved while the sink thinks about the blocks, so nothing is written before all is known. */
static void merge_case(const struct extents *x) {
    static bool want[MERGE_PAGES];
    struct world w;
    uint64_t random = x->density;
    plan_world(&w, x->mode);
    w.cfg.write_max = x->write_max;
    add_full_ram(&w, MERGE_PAGES * PAGE);
    param(&w.source_cfg, RMIG_PARAM_CHUNK_SIZE, x->chunk);
    param(&w.source_cfg, RMIG_PARAM_PIN_ALL, x->pin_all);
    param(&w.source_cfg, RMIG_PARAM_MERGE_MAX, x->merge_max);
    for (size_t i = 0; i < MERGE_PAGES; i++) {
        random = random * 6364136223846793005u + 1442695040888963407u;
        want[i] = (random >> 33) % 100 < x->density;
    }
    w.hold_blocks = true;
    connect_world(&w);
    SOURCE_OK(&w, rmig_source_begin_round(w.source));
    save_in_disorder(&w, want);
    be_away(&w, SIM_MS);
    cr_assert_eq(rmig_source_process(w.source), RMIG_OK);
    be_away(&w, SIM_MS);
    cr_assert_eq(diary_writes(), 0);
    sink_wakes(&w);
    SINK_OK(&w, accept_ram(&w));
    SOURCE_OK(&w, rmig_source_end_round(w.source));
    check_extents(x, &w, want);
    be_away(&w, 100 * SIM_MS); // on fabrics that order sends after writes, end_round may be ahead of the sink
    for (size_t i = 0; i < MERGE_PAGES; i++)
        if (want[i])
            cr_assert(same_range(&w.ram[0], i * PAGE, PAGE), "page %zu differs", i);
    one_round(&w);
    finish(&w);
    close_world(&w);
}

Test(session, saved_pages_become_the_longest_writes_that_chunks_allow) {
    for (unsigned mode = SIM_ORDERED; mode <= SIM_LOCAL; mode++) {
        merge_case(&(struct extents){false, (enum sim_mode)mode, RMIG_GIB, 1u << 30, RMIG_MIB, 60});
        merge_case(&(struct extents){false, (enum sim_mode)mode, RMIG_GIB, 1u << 30, 4 * RMIG_MIB, 97});
        merge_case(&(struct extents){false, (enum sim_mode)mode, RMIG_GIB, 1u << 30, RMIG_MIB, 100});
        merge_case(&(struct extents){false, (enum sim_mode)mode, RMIG_GIB, 1u << 30, RMIG_MIB, 3});
    }
}

Test(session, with_pin_all_writes_run_on_beyond_chunks) {
    merge_case(&(struct extents){true, SIM_ORDERED, RMIG_GIB, 1u << 30, RMIG_MIB, 97});
    merge_case(&(struct extents){true, SIM_ORDERED, RMIG_GIB, 1u << 30, RMIG_MIB, 98});
}

Test(session, no_write_is_longer_than_merge_max) {
    merge_case(&(struct extents){false, SIM_ORDERED, 5 * PAGE, 1u << 30, RMIG_MIB, 90});
    merge_case(&(struct extents){true, SIM_ORDERED, 200 * PAGE, 1u << 30, RMIG_MIB, 100});
    merge_case(&(struct extents){true, SIM_ORDERED, PAGE, 1u << 30, RMIG_MIB, 30});
}

Test(session, no_write_is_longer_than_the_fabric_takes) {
    merge_case(&(struct extents){false, SIM_ORDERED, RMIG_GIB, 7 * PAGE + 100, RMIG_MIB, 95});
    merge_case(&(struct extents){true, SIM_UNORDERED, RMIG_GIB, 100 * PAGE, RMIG_MIB, 100});
}

static void ram_is_there(struct world *w, const struct rmig_sink_event *ev) {
    if (ev->type == RMIG_SINK_ROUND || ev->type == RMIG_SINK_STREAM)
        cr_assert(same_ram(w), "event %d came before the memory saved before it", (int)ev->type);
}

Test(session, memory_saved_before_is_there_at_the_end_of_a_round_and_at_stream_bytes) {
    for (unsigned mode = SIM_ORDERED; mode <= SIM_LOCAL; mode++) {
        struct world w;
        plan_world(&w, (enum sim_mode)mode);
        w.cfg.bandwidth = 100000000;
        add_full_ram(&w, 3 * RMIG_MIB + PAGE);
        w.watch = ram_is_there;
        connect_world(&w);
        for (unsigned round = 0; round < 4; round++) {
            be_away(&w, 100 * SIM_MS); // the sink looks, then the guest writes
            fill(&w.ram[0], round * RMIG_MIB / 2, RMIG_MIB, round + 2);
            SOURCE_OK(&w, rmig_source_begin_round(w.source));
            SOURCE_OK(&w, save_all(&w));
            if (round % 2 == 1) {
                SOURCE_OK(&w, rmig_source_put(w.source, w.state, 1000));
                SOURCE_OK(&w, rmig_source_flush(w.source));
            }
            SOURCE_OK(&w, rmig_source_end_round(w.source));
        }
        finish(&w);
        cr_assert_eq(w.rounds, 4);
        cr_assert_eq(w.got_size, 2000);
        close_world(&w);
    }
}

Test(session, counters_add_up) {
    struct world w;
    plan_world(&w, SIM_ORDERED);
    struct ram *r = add_ram(&w, 8 * RMIG_MIB, RMIG_BACKING_ANONYMOUS);
    fill(r, 2 * RMIG_MIB, 3 * RMIG_MIB, 1);
    connect_world(&w);
    one_round(&w);
    struct rmig_stats st = source_stats(&w);
    cr_expect_eq(st.rounds, 1);
    cr_expect_eq(st.bytes_written, 3 * RMIG_MIB);
    cr_expect_eq(st.bytes_zero, 5 * RMIG_MIB);
    cr_expect_eq(st.pages_written + st.pages_zero, r->from.length / PAGE);
    cr_expect_eq(st.round_bytes, 8 * RMIG_MIB);
    cr_expect_eq(st.round_saved, 8 * RMIG_MIB);
    cr_expect_eq(st.bytes_registered, 3 * RMIG_MIB);
    cr_expect_eq(st.writes_posted, diary_writes());
    cr_expect_gt(st.setup_ns, 0);
    cr_expect_gt(st.throughput, 0);
    SOURCE_OK(&w, rmig_source_put(w.source, w.state, 777));
    finish(&w);
    release(&w);
    st = source_stats(&w);
    struct rmig_stats to = sink_stats(&w);
    cr_expect_eq(st.stream_bytes, 777);
    cr_expect_eq(to.stream_bytes, 777);
    cr_expect_eq(to.bytes_zero, 5 * RMIG_MIB);
    cr_expect_eq(to.rounds, 1);
    cr_expect_eq(to.registrations, to.deregistrations);
    cr_expect_eq(to.bytes_registered, 0);
    cr_expect_eq(st.control_sent, to.control_received);
    cr_expect_eq(to.control_sent, st.control_received);
    close_world(&w);
}

// --- zero

Test(session, all_zero_memory_is_neither_registered_nor_written) {
    struct world w;
    plan_world(&w, SIM_ORDERED);
    add_ram(&w, 64 * RMIG_MIB, RMIG_BACKING_ANONYMOUS);
    add_ram(&w, 64 * RMIG_MIB + 1, RMIG_BACKING_UNKNOWN);
    connect_world(&w);
    one_round(&w);
    finish(&w);
    cr_expect_eq(source_stats(&w).registrations + sink_stats(&w).registrations, 0);
    cr_expect_eq(diary_writes(), 0);
    cr_expect_eq(source_stats(&w).bytes_zero, 128 * RMIG_MIB + 1);
    cr_expect_leq(diary_sends(0, RMIG_MSG_CLEAR_BATCH), 4, "%llu messages",
                  (unsigned long long)diary_sends(0, RMIG_MSG_CLEAR_BATCH));
    close_world(&w);
}

static uint64_t source_step_that_finds_little(void *user, uint64_t now) {
    const struct world *w = user;
    uint64_t before = source_stats(w).bytes_zero;
    uint64_t next = source_step(user, now);
    uint64_t found = source_stats(w).bytes_zero - before;
    cr_assert_leq(found, 64 * RMIG_MIB, "%llu bytes tested in one call", (unsigned long long)found);
    return next;
}

Test(session, no_call_tests_more_than_64_mib_for_zeros) {
    struct world w;
    struct rmig_error err = {0};
    plan_world(&w, SIM_ORDERED);
    add_ram(&w, 192 * RMIG_MIB, RMIG_BACKING_UNKNOWN);
    open_world(&w);
    sim_actor(w.sim, 0, source_step_that_finds_little, &w);
    cr_assert_eq(sim_run(w.sim, w.horizon, &err), RMIG_OK, "%s", err.text);
    cr_assert_eq(w.from.status, RMIG_OK, "%s", w.from.text);
    cr_assert_eq(source_stats(&w).bytes_zero, 288 * RMIG_MIB);
    close_world(&w);
}

Test(session, a_zero_run_across_chunks_is_one_entry) {
    struct world w;
    uint64_t entries = 0;
    plan_world(&w, SIM_ORDERED);
    struct ram *r = add_ram(&w, 40 * RMIG_MIB, RMIG_BACKING_UNKNOWN);
    fill(r, 20 * RMIG_MIB, RMIG_MIB, 1);
    connect_world(&w);
    one_round(&w);
    for (size_t i = 0; i < diary.count; i++)
        if (diary.entry[i].did == DID_SEND && diary.entry[i].type == RMIG_MSG_CLEAR_BATCH)
            entries += diary.entry[i].repeat;
    cr_expect_eq(entries, 2, "%llu entries for two runs", (unsigned long long)entries);
    finish(&w);
    close_world(&w);
}

Test(session, a_zero_page_in_a_registered_chunk_is_written) {
    struct world w;
    small_world(&w);
    connect_world(&w);
    one_round(&w);
    struct rmig_stats before = source_stats(&w);
    memset((uint8_t *)w.ram[0].from.host + 7 * PAGE, 0, PAGE);
    SOURCE_OK(&w, rmig_source_begin_round(w.source));
    SOURCE_OK(&w, rmig_source_save_page(w.source, 0, 7 * PAGE));
    SOURCE_OK(&w, rmig_source_end_round(w.source));
    struct rmig_stats after = source_stats(&w);
    cr_expect_eq(after.pages_written, before.pages_written + 1);
    cr_expect_eq(after.pages_zero, before.pages_zero);
    finish(&w);
    close_world(&w);
}

static void all_zero_is_written(enum rmig_param p, uint64_t value) {
    struct world w;
    plan_world(&w, SIM_ORDERED);
    add_ram(&w, 4 * RMIG_MIB, RMIG_BACKING_UNKNOWN);
    memset(w.ram[0].to.host, 0x5a, 4 * RMIG_MIB);
    param(&w.source_cfg, p, value);
    connect_world(&w);
    one_round(&w);
    cr_expect_eq(source_stats(&w).bytes_written, 4 * RMIG_MIB);
    cr_expect_eq(source_stats(&w).bytes_zero, 0);
    cr_expect_eq(diary_sends(0, RMIG_MSG_CLEAR_BATCH), 0);
    finish(&w);
    close_world(&w);
}

Test(session, pin_all_never_tests_for_zero) { all_zero_is_written(RMIG_PARAM_PIN_ALL, 1); }
Test(session, without_zero_detect_zero_is_written) { all_zero_is_written(RMIG_PARAM_ZERO_DETECT, 0); }

Test(session, a_page_that_becomes_zero_or_nonzero_between_rounds_is_right_at_the_sink) {
    struct world w;
    plan_world(&w, SIM_ORDERED);
    struct ram *r = add_ram(&w, 16 * RMIG_MIB, RMIG_BACKING_SHARED_FD);
    memset(r->to.host, 0x5a, r->to.length); // old content
    connect_world(&w);
    uint64_t random = 1;
    for (unsigned round = 0; round < 12; round++) {
        SOURCE_OK(&w, rmig_source_begin_round(w.source));
        for (unsigned i = 0; i < 40; i++) {
            random = random * 6364136223846793005u + 1442695040888963407u;
            uint64_t offset = (random >> 33) % (r->from.length / PAGE) * PAGE;
            if ((random >> 20) % 2 == 0)
                fill(r, offset, PAGE, round + i);
            else
                memset((uint8_t *)r->from.host + offset, 0, PAGE);
            SOURCE_OK(&w, rmig_source_save_page(w.source, 0, offset));
        }
        if (round == 3)
            SOURCE_OK(&w, save_all(&w));
        SOURCE_OK(&w, rmig_source_end_round(w.source));
        be_away(&w, SIM_MS);
        cr_assert(round < 3 || same_ram(&w), "round %u", round);
    }
    finish(&w);
    close_world(&w);
}

static uint64_t file_blocks(int fd) {
    struct stat st;
    cr_assert_eq(fstat(fd, &st), 0);
    return (uint64_t)st.st_blocks * 512;
}

static uint64_t resident(void) {
    unsigned long size, pages;
    FILE *f = fopen("/proc/self/statm", "r");
    cr_assert(f != NULL && fscanf(f, "%lu %lu", &size, &pages) == 2);
    fclose(f);
    return (uint64_t)pages * (uint64_t)sysconf(_SC_PAGESIZE);
}

/* What holds data is sent in whole chunks; nothing else may grow. */
static void migrate_holes(uint64_t lone_page, uint64_t source_limit, uint64_t sink_limit) {
    struct world w;
    plan_world(&w, SIM_ORDERED);
    struct ram *r = add_ram(&w, 512 * RMIG_MIB, RMIG_BACKING_SHARED_FD);
    fill(r, 100 * RMIG_MIB, 2 * RMIG_MIB, 1);
    if (lone_page != 0)
        fill(r, lone_page, PAGE, 1);
    connect_world(&w);
    one_round(&w);
    SOURCE_OK(&w, rmig_source_finish(w.source));
    sink_ends(&w);
    cr_expect_leq(file_blocks(r->fd[0]), source_limit, "the source's file has %llu bytes",
                  (unsigned long long)file_blocks(r->fd[0]));
    cr_expect_leq(file_blocks(r->fd[1]), sink_limit, "the sink's file has %llu bytes",
                  (unsigned long long)file_blocks(r->fd[1]));
    cr_assert(same_range(r, 99 * RMIG_MIB, 4 * RMIG_MIB));
    cr_assert(same_range(r, lone_page, PAGE));
    close_world(&w);
}

Test(session, holes_of_a_memory_file_stay_holes_at_both_ends) {
    migrate_holes(0, 2 * RMIG_MIB, 2 * RMIG_MIB);
    migrate_holes(300 * RMIG_MIB + PAGE, 3 * RMIG_MIB, 3 * RMIG_MIB);
}

Test(session, untouched_anonymous_memory_stays_untouched_at_both_ends) {
    struct world w;
    plan_world(&w, SIM_ORDERED);
    struct ram *r = add_ram(&w, 512 * RMIG_MIB, RMIG_BACKING_ANONYMOUS);
    fill(r, 100 * RMIG_MIB, 2 * RMIG_MIB, 1);
    uint64_t before = resident();
    connect_world(&w);
    one_round(&w);
    SOURCE_OK(&w, rmig_source_finish(w.source));
    sink_ends(&w);
    uint64_t grown = resident() - before;
    cr_expect_lt(grown, 64 * RMIG_MIB, "grew by %llu bytes", (unsigned long long)grown);
    cr_assert(same_range(r, 99 * RMIG_MIB, 4 * RMIG_MIB));
    close_world(&w);
}

// --- registration

static uint64_t ahead_of(uint64_t chunk, uint64_t ahead) {
    struct world w;
    plan_world(&w, SIM_ORDERED);
    w.cfg.bandwidth = 1000000000;
    add_full_ram(&w, 48 * RMIG_MIB);
    param(&w.source_cfg, RMIG_PARAM_CHUNK_SIZE, chunk);
    param(&w.source_cfg, RMIG_PARAM_REGISTER_AHEAD, ahead);
    param(&w.source_cfg, RMIG_PARAM_WRITE_DEPTH, 1); // the wire is the bottleneck
    param(&w.source_cfg, RMIG_PARAM_MERGE_MAX, 64 * PAGE);
    connect_world(&w);
    one_round(&w);
    finish(&w);
    uint64_t most = diary.ahead_max;
    close_world(&w);
    return most;
}

Test(session, no_more_is_registered_ahead_of_the_wire_than_register_ahead) {
    static const uint64_t mib[][2] = {{1, 2}, {1, 4}, {1, 16}, {2, 4}, {2, 8}, {4, 8}};
    for (size_t i = 0; i < sizeof mib / sizeof mib[0]; i++) {
        uint64_t most = ahead_of(mib[i][0] * RMIG_MIB, mib[i][1] * RMIG_MIB);
        cr_expect_leq(most, mib[i][1] * RMIG_MIB, "chunks of %llu MiB, register-ahead %llu MiB: %llu bytes",
                      (unsigned long long)mib[i][0], (unsigned long long)mib[i][1], (unsigned long long)most);
        cr_expect_geq(most, mib[i][1] * RMIG_MIB / 2);
    }
}

/* Two chunks are the least there is, one on the wire and the next; beyond that the parameter's word holds. */
Test(session, register_ahead_holds_when_it_is_odd_or_small) {
    static const uint64_t mib[][2] = {{1, 1}, {1, 3}, {1, 5}, {2, 3}, {4, 1}};
    for (size_t i = 0; i < sizeof mib / sizeof mib[0]; i++) {
        uint64_t bound = sim_max(2 * mib[i][0], mib[i][1]) * RMIG_MIB;
        uint64_t most = ahead_of(mib[i][0] * RMIG_MIB, mib[i][1] * RMIG_MIB);
        cr_expect_leq(most, bound, "chunks of %llu MiB, register-ahead %llu MiB: %llu bytes",
                      (unsigned long long)mib[i][0], (unsigned long long)mib[i][1], (unsigned long long)most);
    }
}

/* Request, then that chunk's writes, then the next request. */
static void check_lockstep(uint32_t request, uint64_t chunks) {
    uint64_t requests = 0, written = 0;
    for (size_t i = 0; i < diary.count; i++) {
        const struct entry *e = &diary.entry[i];
        if (e->did == DID_WRITE)
            written += e->length;
        if (e->did != DID_SEND || e->type != request)
            continue;
        cr_assert_eq(e->repeat, 1, "%u chunks in one request", e->repeat);
        cr_assert_eq(written, requests * RMIG_MIB, "%llu bytes written at request %llu", (unsigned long long)written,
                     (unsigned long long)requests);
        requests++;
    }
    cr_assert_eq(requests, chunks);
}

Test(session, register_ahead_0_asks_for_one_chunk_at_a_time) {
    for (unsigned v1 = 0; v1 < 2; v1++) {
        struct world w;
        plan_world(&w, SIM_ORDERED);
        add_full_ram(&w, 6 * RMIG_MIB);
        param(&w.source_cfg, RMIG_PARAM_REGISTER_AHEAD, 0);
        if (v1)
            version_1(&w);
        connect_world(&w);
        one_round(&w);
        check_lockstep(v1 ? RMIG_MSG_REGISTER_REQUEST : RMIG_MSG_REGISTER_BATCH, 6);
        finish(&w);
        close_world(&w);
    }
}

Test(session, contiguous_chunks_share_a_registration) {
    struct world w;
    plan_world(&w, SIM_ORDERED);
    struct ram *r = add_ram(&w, 64 * RMIG_MIB, RMIG_BACKING_UNKNOWN);
    fill(r, 4 * RMIG_MIB, 20 * RMIG_MIB, 1);
    fill(r, 40 * RMIG_MIB, 8 * RMIG_MIB, 1);
    connect_world(&w);
    one_round(&w);
    cr_expect_eq(source_stats(&w).registrations, 2);
    cr_expect_eq(sink_stats(&w).registrations, 2);
    cr_expect_eq(source_stats(&w).bytes_registered, 28 * RMIG_MIB);
    cr_expect_eq(sink_stats(&w).bytes_registered, 28 * RMIG_MIB);
    cr_expect_eq(sim_stats(w.sim, 0)->regions, 3, "two of RAM and the control buffers");
    cr_expect_eq(sim_stats(w.sim, 1)->regions, 3, "two of RAM and the control buffers");
    one_round(&w);
    cr_expect_eq(sink_stats(&w).registrations, 2, "registered chunks are registered again");
    finish(&w);
    close_world(&w);
}

Test(session, pin_all_registers_each_block_once_at_both_ends_before_the_first_write) {
    for (unsigned v1 = 0; v1 < 2; v1++) {
        struct world w;
        plan_world(&w, SIM_ORDERED);
        for (unsigned i = 0; i < 5; i++)
            add_full_ram(&w, (i + 1) * RMIG_MIB + i * PAGE);
        param(&w.source_cfg, RMIG_PARAM_PIN_ALL, 1);
        if (v1)
            version_1(&w);
        connect_world(&w);
        one_round(&w);
        one_round(&w);
        bool written = false;
        for (size_t i = 0; i < diary.count; i++) {
            written = written || diary.entry[i].did == DID_WRITE;
            cr_assert(!written || diary.entry[i].did != DID_REG, "a registration after the first write");
        }
        cr_expect_eq(source_stats(&w).registrations, 5);
        cr_expect_eq(sink_stats(&w).registrations, 5);
        finish(&w);
        close_world(&w);
    }
}

static void nothing_registered(struct world *w, const struct rmig_sink_event *ev) {
    if (ev->type != RMIG_SINK_FINISHED)
        return;
    cr_assert_eq(sim_exposed(w->sim, 1), 0, "the peer can still write");
    release(w);
    cr_assert_eq(sim_stats(w->sim, 1)->regions, 1, "only the control buffers may be left");
    cr_assert_eq(sink_stats(w).bytes_registered, 0);
}

Test(session, when_the_sink_has_finished_no_write_of_the_peer_can_land) {
    for (unsigned kind = 0; kind < 8; kind++) {
        struct world w;
        plan_world(&w, SIM_ORDERED);
        w.cfg.revokes = (kind & 1) != 0;
        add_full_ram(&w, 5 * RMIG_MIB);
        param(&w.source_cfg, RMIG_PARAM_PIN_ALL, (kind & 2) != 0);
        if ((kind & 4) != 0)
            version_1(&w);
        w.watch = nothing_registered;
        connect_world(&w);
        one_round(&w);
        finish(&w);
        cr_assert((w.events & 1u << RMIG_SINK_FINISHED) != 0);
        close_world(&w);
    }
}

// --- pace

static uint64_t round_ns(struct world *w) {
    uint64_t before = world_now(w, 0);
    one_round(w);
    return world_now(w, 0) - before;
}

Test(session, max_bandwidth_is_kept_within_a_tenth_in_whole_pages) {
    static const uint64_t rates[] = {50 * RMIG_MIB, 1000000007, 3 * RMIG_MIB + 333};
    for (size_t i = 0; i < sizeof rates / sizeof rates[0]; i++) {
        struct world w;
        plan_world(&w, SIM_ORDERED);
        add_full_ram(&w, 32 * RMIG_MIB);
        param(&w.source_cfg, RMIG_PARAM_MAX_BANDWIDTH, rates[i]);
        connect_world(&w);
        double rate = 32.0 * (double)RMIG_MIB * 1e9 / (double)round_ns(&w);
        cr_expect(rate > 0.9 * (double)rates[i] && rate < 1.1 * (double)rates[i], "%.0f bytes/s, must be %llu", rate,
                  (unsigned long long)rates[i]);
        for (size_t k = 0; k < diary.count; k++)
            cr_assert(diary.entry[k].did != DID_WRITE || diary.entry[k].length % PAGE == 0, "a write of %llu bytes",
                      (unsigned long long)diary.entry[k].length);
        finish(&w);
        close_world(&w);
    }
}

Test(session, without_max_bandwidth_a_round_takes_what_the_link_takes) {
    struct world w;
    plan_world(&w, SIM_ORDERED);
    add_full_ram(&w, 64 * RMIG_MIB);
    connect_world(&w);
    round_ns(&w);
    double rate = 64.0 * (double)RMIG_MIB * 1e9 / (double)round_ns(&w);
    cr_expect_gt(rate, 0.9 * (double)w.cfg.bandwidth, "%.0f bytes/s", rate);
    finish(&w);
    close_world(&w);
}

// --- chunk size

/* Two version 1 ends that do not know each other's chunks: what the sink registers is at most twice the RAM, however
   much that is beyond the 64 GiB that one request may mean. */
static void nothing_is_said(struct world *w, const struct rmig_sink_event *ev) {
    struct rmig_sink_event none;
    if (ev->type != RMIG_SINK_DISCONNECTED)
        return;
    uint64_t sent = sink_stats(w).control_sent;
    for (unsigned i = 0; i < 3; i++)
        cr_assert_eq(rmig_sink_process(w->sink, &none), RMIG_OK);
    cr_expect_eq(sink_stats(w).control_sent, sent, "to whom?");
    cr_expect_gt(rmig_sink_next_deadline(w->sink), world_now(w, 1) + SIM_SECOND, "there is nothing to look for");
}

/* The embedder may take its time with what it has of the stream. */
Test(session, a_version_1_sink_is_quiet_when_its_link_has_failed) {
    bool seen = false;
    for (uint64_t nth = 5; nth < 16; nth++) { // the first four receives are those of the beginning
        struct world w;
        small_world(&w);
        version_1(&w);
        w.watch = nothing_is_said;
        w.cfg.faults[0] = (struct sim_fault){SIM_FAULT_ERROR, SIM_RECV, 1, nth};
        open_world(&w);
        if (rmig_source_connect(w.source, w.address) == RMIG_OK && rmig_source_begin_round(w.source) == RMIG_OK &&
            rmig_source_save_range(w.source, 0, 0, w.ram[0].from.length) == RMIG_OK)
            rmig_source_end_round(w.source);
        be_away(&w, SIM_SECOND);
        seen = seen || (w.events & 1u << RMIG_SINK_DISCONNECTED) != 0;
        close_world(&w);
    }
    cr_expect(seen);
}

Test(session, a_version_1_sink_of_unknown_chunks_registers_ram_twice_at_most) {
    struct world w;
    plan_world(&w, SIM_ORDERED);
    w.cfg.no_copy = true;
    version_1(&w);
    param(&w.source_cfg, RMIG_PARAM_ZERO_DETECT, 0);
    struct ram *r = add_ram(&w, 150 * RMIG_GIB, RMIG_BACKING_UNKNOWN);
    uint64_t most = 0;
    connect_world(&w);
    SOURCE_OK(&w, rmig_source_begin_round(w.source));
    for (uint64_t at = 0; at < r->from.length; at += RMIG_GIB) // a request of 64 chunks each
        SOURCE_OK(&w, rmig_source_save_range(w.source, 0, at, 64 * RMIG_MIB));
    SOURCE_OK(&w, rmig_source_end_round(w.source));
    most = sink_stats(&w).bytes_registered;
    cr_expect_leq(most, 2 * r->from.length, "%llu GiB", (unsigned long long)(most / RMIG_GIB));
    rmig_source_cancel(w.source);
    be_away(&w, SIM_SECOND);
    close_world(&w);
}

static void one_chunk_size(uint64_t source, uint64_t sink) {
    struct world w;
    plan_world(&w, SIM_ORDERED);
    add_full_ram(&w, 5 * RMIG_MIB + 3 * PAGE + 1);
    param(&w.source_cfg, RMIG_PARAM_CHUNK_SIZE, source);
    if (sink != 0)
        param(&w.sink_cfg, RMIG_PARAM_CHUNK_SIZE, sink);
    connect_world(&w);
    one_round(&w);
    finish(&w);
    close_world(&w);
}

Test(session, a_sink_without_a_chunk_size_takes_the_sources) {
    for (uint64_t size = RMIG_CHUNK_SIZE_MIN; size <= RMIG_CHUNK_SIZE_MAX; size *= 2)
        one_chunk_size(size, 0);
    one_chunk_size(4 * RMIG_MIB, 4 * RMIG_MIB);
}

Test(session, a_sink_set_to_another_chunk_size_refuses_and_both_ends_say_why) {
    struct world w;
    small_world(&w);
    param(&w.source_cfg, RMIG_PARAM_CHUNK_SIZE, 2 * RMIG_MIB);
    param(&w.sink_cfg, RMIG_PARAM_CHUNK_SIZE, 4 * RMIG_MIB);
    open_world(&w);
    cr_expect_eq(rmig_source_connect(w.source, w.address), RMIG_ERR_REFUSED);
    const char *part = "chunk-size: the source has 2097152, the sink is set to 4194304";
    cr_expect(says(rmig_source_error(w.source)->text, part), "%s", rmig_source_error(w.source)->text);
    sink_ends(&w);
    cr_expect_eq(w.to.status, RMIG_ERR_SETUP);
    cr_expect(says(w.to.text, part), "%s", w.to.text);
    close_world(&w);
}

Test(session, chunks_of_1_gib) {
    struct world w;
    plan_world(&w, SIM_ORDERED);
    struct ram *r = add_ram(&w, RMIG_GIB + 3 * RMIG_MIB, RMIG_BACKING_ANONYMOUS);
    static const uint64_t at[] = {0, 512 * RMIG_MIB, RMIG_GIB - PAGE, RMIG_GIB, RMIG_GIB + 3 * RMIG_MIB - PAGE};
    for (size_t i = 0; i < sizeof at / sizeof at[0]; i++)
        fill(r, at[i], PAGE, 1);
    param(&w.source_cfg, RMIG_PARAM_CHUNK_SIZE, RMIG_GIB);
    connect_world(&w);
    SOURCE_OK(&w, rmig_source_begin_round(w.source));
    for (size_t i = 0; i < sizeof at / sizeof at[0]; i++)
        SOURCE_OK(&w, rmig_source_save_page(w.source, 0, at[i]));
    SOURCE_OK(&w, rmig_source_end_round(w.source));
    cr_expect_eq(sink_stats(&w).bytes_registered, r->from.length);
    SOURCE_OK(&w, rmig_source_finish(w.source));
    sink_ends(&w);
    for (size_t i = 0; i < sizeof at / sizeof at[0]; i++)
        cr_assert(same_range(r, at[i], PAGE));
    close_world(&w);
}

// --- the stream

static void put_all(struct world *w, const uint8_t *data, size_t total) {
    static const size_t sizes[] = {0, 1, 7, 4096, 32767, 32768, 32769, 524271, 524272, 524273, 100, 1300000};
    size_t done = 0;
    for (size_t i = 0; done < total; i = (i + 1) % (sizeof sizes / sizeof sizes[0])) {
        size_t n = (size_t)sim_min(sizes[i], total - done);
        SOURCE_OK(w, rmig_source_put(w->source, data + done, n));
        done += n;
    }
}

static void stream_case(bool v1, enum sim_mode mode) {
    size_t total = 5 * RMIG_MIB + 13;
    uint8_t *data = malloc(total);
    struct world w;
    plan_world(&w, mode);
    add_full_ram(&w, 2 * RMIG_MIB);
    if (v1)
        version_1(&w);
    for (size_t i = 0; i < total; i++)
        data[i] = (uint8_t)(i * 7 + (i >> 9) + (i >> 17));
    w.watch = ram_is_there;
    connect_world(&w);
    one_round(&w);
    put_all(&w, data, total / 2);
    one_round(&w);
    put_all(&w, data + total / 2, total - total / 2);
    w.want = total;
    finish(&w);
    cr_assert_eq(w.got_size, total, "%zu bytes of %zu came", w.got_size, total);
    cr_assert_eq(memcmp(w.got, data, total), 0);
    cr_expect_eq(source_stats(&w).stream_bytes, total);
    free(data);
    close_world(&w);
}

Test(session, stream_bytes_arrive_whole_and_in_order) {
    for (unsigned mode = SIM_ORDERED; mode <= SIM_LOCAL; mode++) {
        stream_case(false, (enum sim_mode)mode);
        stream_case(true, (enum sim_mode)mode);
    }
}

Test(session, put_some_takes_what_fits_and_more_after_progress) {
    struct world w;
    size_t total = 2 * RMIG_MIB, done = 0;
    uint8_t *data = malloc(total);
    small_world(&w);
    for (size_t i = 0; i < total; i++)
        data[i] = (uint8_t)(i * 13 + (i >> 10));
    connect_world(&w);
    one_round(&w);
    for (unsigned turns = 0; done < total; turns++) {
        int64_t taken = rmig_source_put_some(w.source, data + done, total - done);
        cr_assert(taken >= 0 && (size_t)taken <= total - done, "%s", rmig_source_error(w.source)->text);
        done += (size_t)taken;
        cr_assert_lt(turns, 100000);
        if (taken == 0) {
            cr_assert_geq(rmig_source_process(w.source), 0);
            be_away(&w, SIM_US);
        }
    }
    finish(&w);
    cr_assert(w.got_size == total && memcmp(w.got, data, total) == 0);
    free(data);
    close_world(&w);
}

// --- expected downtime

Test(session, expected_downtime_of_given_counters) {
    struct rmig_stats st;
    memset(&st, 0, sizeof st);
    cr_expect_eq(rmig_expected_downtime_ns(&st, 1), RMIG_FOREVER);
    cr_expect_eq(rmig_expected_downtime_ns(&st, UINT64_MAX), RMIG_FOREVER);
    st.throughput = 1000000000;
    cr_expect_eq(rmig_expected_downtime_ns(&st, 0), 0);
    cr_expect_eq(rmig_expected_downtime_ns(&st, 1000000000), SIM_SECOND);
    st.message_rtt_ns = 5000;
    cr_expect_eq(rmig_expected_downtime_ns(&st, 0), 10000);
    cr_expect_eq(rmig_expected_downtime_ns(&st, 2000000), 2000000 + 10000);
    st.throughput = 1;
    cr_expect_eq(rmig_expected_downtime_ns(&st, UINT64_MAX), RMIG_FOREVER);
    cr_expect_gt(rmig_expected_downtime_ns(&st, 1000000000), SIM_SECOND * 999999999);
}

Test(session, expected_downtime_is_for_ever_when_nothing_was_measured) {
    struct rmig_stats st;
    memset(&st, 0, sizeof st);
    cr_expect_eq(rmig_expected_downtime_ns(&st, 0), RMIG_FOREVER);
}

static void check_estimate(struct world *w, uint64_t n) {
    struct rmig_stats st = source_stats(w);
    uint64_t expected = rmig_expected_downtime_ns(&st, n), before = world_now(w, 0);
    SOURCE_OK(w, rmig_source_begin_round(w->source));
    SOURCE_OK(w, rmig_source_save_range(w->source, 0, 0, n));
    SOURCE_OK(w, rmig_source_end_round(w->source));
    uint64_t took = world_now(w, 0) - before;
    cr_expect(expected <= 2 * took && took <= 2 * expected,
              "latency %llu ns, %llu bytes/s: %llu bytes took %llu ns, expected were %llu",
              (unsigned long long)w->cfg.latency_ns, (unsigned long long)w->cfg.bandwidth, (unsigned long long)n,
              (unsigned long long)took, (unsigned long long)expected);
}

static void estimates(uint64_t latency, uint64_t bandwidth, bool growing) {
    struct world w;
    plan_world(&w, SIM_ORDERED);
    w.cfg.latency_ns = latency;
    w.cfg.bandwidth = bandwidth;
    add_full_ram(&w, 64 * RMIG_MIB);
    connect_world(&w);
    one_round(&w);
    for (unsigned i = 0; i <= 7; i++)
        check_estimate(&w, 64 * RMIG_MIB >> (2 * (growing ? 7 - i : i)));
    finish(&w);
    close_world(&w);
}

Test(session, expected_downtime_of_shrinking_rounds_is_within_a_factor_of_two) {
    static const uint64_t latencies[] = {2 * SIM_US, 200 * SIM_US, 5 * SIM_MS};
    for (size_t i = 0; i < 3; i++) {
        estimates(latencies[i], 12500000000u, false);
        estimates(latencies[i], 100000000u, false);
    }
}

Test(session, expected_downtime_of_growing_rounds_is_within_a_factor_of_two) {
    estimates(2 * SIM_US, 12500000000u, true);
    estimates(2 * SIM_US, 100000000u, true);
}

// --- what a round tells while it runs

struct sample {
    uint64_t at;
    struct rmig_stats st;
};

/* One round of everything, looked at ten times a second. Returns how many looks; *end: when it was over. */
static size_t watched_round(struct world *w, struct sample *x, size_t max, uint64_t *end) {
    size_t n = 0;
    unsigned turns;
    SOURCE_OK(w, rmig_source_begin_round(w->source));
    SOURCE_OK(w, rmig_source_save_range(w->source, 0, 0, w->ram[0].from.length));
    int status = rmig_source_end_round_start(w->source);
    while (status == RMIG_PENDING || (status == RMIG_OK && source_stats(w).rounds == 0)) {
        cr_assert_lt(n, max, "the round does not end");
        cr_assert_eq(look_after(w, SIM_SECOND / 10, &turns), RMIG_OK, "%s", rmig_source_error(w->source)->text);
        x[n].at = world_now(w, 0);
        x[n++].st = source_stats(w);
        status = rmig_source_process(w->source);
    }
    cr_assert_eq(status, RMIG_OK, "%s", rmig_source_error(w->source)->text);
    *end = world_now(w, 0);
    return n;
}

static void expect_rate(const struct sample *x, size_t i, double rate, double low, double high) {
    cr_expect((double)x[i].st.throughput > low * rate && (double)x[i].st.throughput < high * rate,
              "look %zu: %llu bytes/s, the wire does %.0f", i, (unsigned long long)x[i].st.throughput, rate);
}

Test(session, under_a_limit_zero_pages_are_no_throughput_and_the_time_left_is_right) {
    static struct sample x[100];
    struct world w;
    uint64_t limit = 8 * RMIG_MIB, end;
    plan_world(&w, SIM_ORDERED);
    struct ram *r = add_ram(&w, 64 * RMIG_MIB, RMIG_BACKING_UNKNOWN);
    fill(r, 40 * RMIG_MIB, 24 * RMIG_MIB, 1);
    param(&w.source_cfg, RMIG_PARAM_MAX_BANDWIDTH, limit);
    connect_world(&w);
    size_t n = watched_round(&w, x, 100, &end);
    cr_assert_geq(n, 25);
    for (size_t i = 1; i + 1 < n; i++) {
        expect_rate(x, i, (double)limit, 0.7, 1.2);
        double left = (double)(end - x[i].at);
        double told = (double)rmig_expected_downtime_ns(&x[i].st, x[i].st.bytes_pending);
        cr_expect(told > 0.75 * left - 1e8 && told < 1.25 * left + 1e8, "look %zu: %.1f s left, told are %.1f", i,
                  left / 1e9, told / 1e9);
    }
    finish(&w);
    close_world(&w);
}

Test(session, what_is_told_of_a_round_is_what_has_arrived) {
    static struct sample x[100];
    struct world w;
    uint64_t end, began;
    plan_world(&w, SIM_ORDERED);
    w.cfg.bandwidth = 10000000;
    add_full_ram(&w, 32 * RMIG_MIB);
    connect_world(&w);
    began = world_now(&w, 0);
    size_t n = watched_round(&w, x, 100, &end);
    for (size_t i = 1; i + 1 < n; i++) {
        double wire = (double)w.cfg.bandwidth * (double)(x[i].at - began) / 1e9;
        cr_expect_leq((double)x[i].st.round_bytes, wire, "look %zu", i);
        cr_expect_eq(x[i].st.round_bytes + x[i].st.bytes_pending, 32 * RMIG_MIB, "look %zu", i);
        if (i >= 10) // a second
            expect_rate(x, i, (double)w.cfg.bandwidth, 0.75, 1.1);
    }
    cr_expect_gt(x[n / 2].st.round_bytes, 12 * RMIG_MIB, "half of the time is over");
    finish(&w);
    close_world(&w);
}

Test(session, throughput_is_that_of_now_when_the_link_falls) {
    static struct sample x[200];
    struct world w;
    uint64_t end;
    plan_world(&w, SIM_ORDERED);
    w.cfg.bandwidth = 50000000;
    w.cfg.change_ns = 2 * SIM_SECOND;
    w.cfg.changed_bandwidth = 10000000;
    add_full_ram(&w, 140 * RMIG_MIB);
    connect_world(&w);
    size_t n = watched_round(&w, x, 200, &end);
    expect_rate(x, 18, 50000000.0, 0.75, 1.1);
    cr_assert_gt(n, 60);
    for (size_t i = 55; i + 1 < n; i++)
        expect_rate(x, i, 10000000.0, 0.5, 1.3);
    finish(&w);
    close_world(&w);
}

Test(session, dirty_rate_of_the_first_round_is_what_is_saved_again) {
    struct world w;
    unsigned turns;
    plan_world(&w, SIM_ORDERED);
    add_full_ram(&w, 8 * RMIG_MIB);
    connect_world(&w);
    SOURCE_OK(&w, rmig_source_begin_round(w.source));
    SOURCE_OK(&w, rmig_source_save_range(w.source, 0, 0, 8 * RMIG_MIB));
    cr_assert_eq(look_after(&w, SIM_SECOND, &turns), RMIG_OK);
    cr_expect_eq(source_stats(&w).dirty_rate, 0, "nothing was saved again");
    for (unsigned i = 0; i < 10; i++) { // 2 MiB/s, from the second second on: over both, nearly half of it
        SOURCE_OK(&w, rmig_source_save_range(w.source, 0, i % 4 * 2 * RMIG_MIB, RMIG_MIB / 5 / PAGE * PAGE));
        cr_assert_eq(look_after(&w, SIM_SECOND / 10, &turns), RMIG_OK);
    }
    uint64_t rate = source_stats(&w).dirty_rate;
    cr_expect(rate > 9 * RMIG_MIB / 10 && rate < 12 * RMIG_MIB / 10, "%llu bytes/s", (unsigned long long)rate);
    SOURCE_OK(&w, rmig_source_end_round(w.source));
    SOURCE_OK(&w, rmig_source_begin_round(w.source));
    cr_expect_eq(source_stats(&w).dirty_rate, 0, "the log of the first round has not been saved yet");
    SOURCE_OK(&w, rmig_source_save_range(w.source, 0, 0, 4 * RMIG_MIB));
    SOURCE_OK(&w, rmig_source_end_round(w.source));
    rate = source_stats(&w).dirty_rate;
    cr_expect(rate > 19 * RMIG_MIB / 10 && rate < 21 * RMIG_MIB / 10, "%llu bytes/s", (unsigned long long)rate);
    finish(&w);
    close_world(&w);
}

// --- allocation

Test(session, nothing_is_allocated_after_the_first_round) {
    for (unsigned v1 = 0; v1 < 2; v1++) {
        struct world w;
        plan_world(&w, SIM_ORDERED);
        struct ram *r = add_ram(&w, 32 * RMIG_MIB, RMIG_BACKING_SHARED_FD);
        fill(r, 0, RMIG_MIB, 1);
        if (v1)
            version_1(&w);
        connect_world(&w);
        one_round(&w);
        be_away(&w, SIM_MS);
        size_t before = heap.count;
        for (unsigned round = 1; round < 16; round++) {
            fill(r, round * RMIG_MIB * 2, RMIG_MIB, round);
            one_round(&w);
            SOURCE_OK(&w, rmig_source_put(w.source, w.state, STATE_SIZE));
            SOURCE_OK(&w, rmig_source_flush(w.source));
        }
        w.want = 15 * STATE_SIZE;
        finish(&w);
        cr_assert_eq(heap.count, before, "%zu allocations", heap.count - before);
        close_world(&w);
    }
}

/* A whole migration in which one allocation fails. False: there were not so many. */
static bool fail_allocation(size_t nth, bool v1) {
    struct world w;
    struct rmig_error err = {0};
    plan_world(&w, SIM_ORDERED);
    for (unsigned i = 0; i < 3; i++)
        add_full_ram(&w, RMIG_MIB + PAGE);
    if (v1)
        version_1(&w);
    heap.fail_at = nth;
    open_sim(&w);
    int status = rmig_source_open(sim_fabric(w.sim, 0), &w.source_cfg, &w.source, &err);
    if (status == RMIG_OK)
        status = rmig_sink_open(sim_fabric(w.sim, 1), &w.sink_cfg, &w.sink, &err);
    for (unsigned i = 0; i < w.rams && status == RMIG_OK; i++) {
        status = rmig_source_add_block(w.source, &w.ram[i].from, NULL);
        err = *rmig_source_error(w.source);
    }
    if (status == RMIG_OK && (status = rmig_sink_listen(w.sink, w.address)) == RMIG_OK) {
        sim_actor(w.sim, 0, source_step, &w);
        cr_assert_eq(sim_run(w.sim, 4000 * SIM_SECOND, &err), RMIG_OK, "allocation %zu: %s", nth, err.text);
        bool sink_failed = w.to.done && w.to.status < 0;
        status = sink_failed && says(w.to.text, "out of memory") ? w.to.status : w.from.status;
        snprintf(err.text, sizeof err.text, "%s", status == w.to.status ? w.to.text : w.from.text);
    }
    bool failed = heap.count >= nth;
    cr_expect_eq(failed, status < 0, "allocation %zu of %zu: %s", nth, heap.count, rmig_status_name(status));
    if (failed)
        cr_expect(says(err.text, "out of memory"), "allocation %zu: %s \"%s\"", nth, rmig_status_name(status),
                  err.text);
    close_world(&w);
    return failed;
}

Test(session, each_allocation_that_fails_gives_a_clear_error_and_leaks_nothing) {
    for (unsigned v1 = 0; v1 < 2; v1++) {
        size_t nth = 1;
        while (fail_allocation(nth, v1))
            cr_assert_lt(++nth, 1000);
        cr_expect_gt(nth, 15);
    }
}

Test(session, a_call_refused_for_lack_of_memory_may_be_repeated) {
    struct world w;
    small_world(&w);
    open_world(&w);
    for (size_t more = 1; more <= 5; more++) {
        heap.fail_at = heap.count + more;
        SOURCE_REFUSES(&w, rmig_source_connect_start(w.source, w.address), RMIG_ERR_NO_MEMORY, "out of memory");
    }
    heap.fail_at = 0;
    SOURCE_OK(&w, rmig_source_connect(w.source, w.address));
    one_round(&w);
    finish(&w);
    close_world(&w);
}

/* The blocks are agreed, and the tables for them cannot be had: that source goes, told why, and the next is served. */
static void starve_accept(struct world *w, const struct rmig_sink_event *ev) {
    if (ev->type != RMIG_SINK_BLOCKS)
        return;
    w->hold_blocks = w->starved != 0; // answered here
    if (w->starved == 0)
        return;
    SINK_OK(w, rmig_sink_add_block(w->sink, &w->ram[w->added].to, NULL));
    w->added++;
    heap.fail_at = heap.count + w->starved;
    cr_expect_eq(rmig_sink_accept_blocks(w->sink), RMIG_ERR_FORGOTTEN, "allocation %zu", w->starved);
    heap.fail_at = 0;
    w->starved = 0;
}

Test(session, a_source_for_which_there_is_no_memory_is_forgotten) {
    for (size_t nth = 1; nth <= 4; nth++) { // the blocks, which of them are taken, the chunks, the regions
        struct world w;
        struct rmig_error err = {0};
        small_world(&w);
        w.listens_on = true;
        w.watch = starve_accept;
        w.starved = nth;
        connect_world(&w);
        SOURCE_OK(&w, rmig_source_begin_round(w.source));
        cr_expect_eq(rmig_source_end_round(w.source), RMIG_ERR_REFUSED);
        cr_expect(says(rmig_source_error(w.source)->text, "out of memory"), "%s", rmig_source_error(w.source)->text);
        rmig_source_close(w.source);
        be_away(&w, SIM_SECOND);
        cr_assert((w.events & 1u << RMIG_SINK_FORGOTTEN) != 0 && !w.to.done, "%s", w.to.text);
        cr_expect(says(rmig_sink_error(w.sink)->text, "out of memory"), "%s", rmig_sink_error(w.sink)->text);
        cr_assert_eq(rmig_source_open(sim_fabric(w.sim, 0), NULL, &w.source, &err), RMIG_OK);
        SOURCE_OK(&w, rmig_source_add_block(w.source, &w.ram[0].from, NULL));
        SOURCE_OK(&w, rmig_source_connect(w.source, w.address));
        one_round(&w);
        finish(&w);
        close_world(&w);
    }
}

// --- many blocks, many sessions

#define MANY 100000u

static void accept_many(struct world *w, const struct rmig_sink_event *ev) {
    static char name[MANY][12];
    if (ev->type != RMIG_SINK_BLOCKS)
        return;
    cr_assert_eq(ev->block_count, MANY);
    for (uint32_t i = 0; i < MANY; i++) {
        struct rmig_block_desc d = w->ram[0].to;
        snprintf(name[i], sizeof name[i], "b%06u", i);
        d.name = name[i];
        d.host = (uint8_t *)d.host + i * 16;
        d.length = 16;
        d.guest_offset = i * PAGE;
        SINK_OK(w, rmig_sink_add_block(w->sink, &d, NULL));
    }
    SINK_OK(w, rmig_sink_accept_blocks(w->sink));
}

Test(session, a_hundred_thousand_blocks_migrate) {
    struct world w;
    struct rmig_error err = {0};
    plan_world(&w, SIM_ORDERED);
    struct ram *r = add_full_ram(&w, MANY * 16);
    w.hold_blocks = true;
    w.watch = accept_many;
    open_sim(&w);
    cr_assert_eq(rmig_source_open(sim_fabric(w.sim, 0), NULL, &w.source, &err), RMIG_OK);
    cr_assert_eq(rmig_sink_open(sim_fabric(w.sim, 1), NULL, &w.sink, &err), RMIG_OK);
    for (uint32_t i = 0; i < MANY; i++) {
        struct rmig_block_desc d = r->from;
        char name[12];
        snprintf(name, sizeof name, "b%06u", i);
        d.name = name;
        d.host = (uint8_t *)d.host + i * 16;
        d.length = 16;
        d.guest_offset = i * PAGE;
        SOURCE_OK(&w, rmig_source_add_block(w.source, &d, NULL));
    }
    SINK_OK(&w, rmig_sink_listen(w.sink, w.address));
    SOURCE_OK(&w, rmig_source_connect(w.source, w.address));
    SOURCE_OK(&w, rmig_source_begin_round(w.source));
    for (uint32_t i = 0; i < MANY; i++)
        SOURCE_OK(&w, rmig_source_save_range(w.source, i, 0, 16));
    SOURCE_OK(&w, rmig_source_end_round(w.source));
    finish(&w);
    cr_expect_gt(diary_sends(0, RMIG_MSG_BLOCKS), 1);
    close_world(&w);
}

#define SESSIONS 5u

struct crowd {
    struct world w[SESSIONS];
};

static uint64_t crowd_step(void *user, uint64_t now, unsigned side) {
    struct crowd *c = user;
    uint64_t next = SIM_DONE;
    for (unsigned i = 0; i < SESSIONS; i++) {
        struct world *w = &c->w[i];
        if (side == 0 ? w->from.done : w->to.done)
            continue;
        uint64_t at = side == 0 ? source_step(w, now) : sink_step(w, now);
        next = at == SIM_DONE ? next : next == SIM_DONE ? at : sim_min(next, at);
    }
    return next;
}

static uint64_t crowd_source(void *user, uint64_t now) { return crowd_step(user, now, 0); }
static uint64_t crowd_sink(void *user, uint64_t now) { return crowd_step(user, now, 1); }

Test(session, five_sessions_at_once_in_one_thread_on_one_fabric) {
    static struct crowd c;
    struct rmig_error err = {0};
    for (unsigned i = 0; i < SESSIONS; i++) {
        plan_world(&c.w[i], SIM_ORDERED);
        c.w[i].want = STATE_SIZE;
        add_full_ram(&c.w[i], (3 + i) * RMIG_MIB);
        fill(&c.w[i].ram[0], 0, RMIG_MIB, i + 5);
        snprintf(c.w[i].address, sizeof c.w[i].address, "sink:%u", 7000 + i);
        if (i == 0)
            open_world(&c.w[0]);
        c.w[i].sim = c.w[0].sim;
        if (i > 0)
            open_sessions(&c.w[i], sim_fabric(c.w[0].sim, 0), sim_fabric(c.w[0].sim, 1), c.w[i].address);
    }
    sim_actor(c.w[0].sim, 0, crowd_source, &c);
    sim_actor(c.w[0].sim, 1, crowd_sink, &c);
    cr_assert_eq(sim_run(c.w[0].sim, 100 * SIM_SECOND, &err), RMIG_OK, "%s", err.text);
    for (unsigned i = SESSIONS; i-- > 0;) {
        struct world *w = &c.w[i];
        cr_expect(w->from.status == RMIG_OK && w->to.status == RMIG_OK, "%u: %s %s", i, w->from.text, w->to.text);
        cr_expect(same_ram(w) && w->got_size == STATE_SIZE, "session %u", i);
        if (i > 0) {
            rmig_source_close(w->source);
            rmig_sink_close(w->sink);
            free_ram(w);
        }
    }
    close_world(&c.w[0]);
}

// --- event loops over libfabric

static uint64_t clock_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * SIM_SECOND + (uint64_t)t.tv_nsec;
}

static struct rmig_fabric *open_tcp(void) {
    struct rmig_error err = {0};
    struct rmig_ofi_options opt;
    memset(&opt, 0, sizeof opt);
    opt.provider = "tcp";
    struct rmig_fabric *f = rmig_ofi_open(&opt, &err);
    cr_assert_not_null(f, "%s", err.text);
    return f;
}

/* One step of each embedder; true while there is more to do. */
static bool source_turn(struct world *w) {
    if (w->from.done)
        return false;
    int status = rmig_source_process(w->source);
    while (status == RMIG_OK) {
        status = source_next(w);
        if (status == RMIG_OK)
            status = rmig_source_process(w->source);
    }
    if (status != RMIG_PENDING)
        over(&w->from, status, rmig_source_error(w->source), 0);
    return status == RMIG_PENDING;
}

static bool sink_turn(struct world *w) {
    struct rmig_sink_event ev = {0};
    int status = RMIG_OK;
    if (w->to.done)
        return false;
    do {
        status = rmig_sink_process(w->sink, &ev);
        if (status == RMIG_OK)
            status = on_sink_event(w, &ev);
    } while (status == RMIG_OK && ev.type != RMIG_SINK_NONE);
    if (status != RMIG_OK)
        over(&w->to, status, rmig_sink_error(w->sink), 0);
    return status == RMIG_OK;
}

/* Descriptors and deadline of what is still going on; -1: an error. */
static int what_to_wait_for(struct world *w, struct rmig_fd *fds, uint64_t *deadline) {
    int n = 0;
    *deadline = RMIG_FOREVER;
    if (!w->from.done) {
        n = rmig_source_fds(w->source, fds, 4);
        *deadline = n < 0 ? 0 : rmig_source_next_deadline(w->source);
    }
    if (n >= 0 && !w->to.done) {
        int more = rmig_sink_fds(w->sink, fds + n, 8);
        *deadline = sim_min(*deadline, rmig_sink_next_deadline(w->sink));
        n = more < 0 ? more : n + more;
    }
    return n;
}

/* Milliseconds to sleep, rounded up: not before the deadline, so that nobody is woken in vain. */
static int sleep_ms(uint64_t deadline) {
    uint64_t now = clock_ns();
    return deadline <= now ? 0 : (int)sim_min((deadline - now + SIM_MS - 1) / SIM_MS, 60000);
}

static void wait_with_poll(struct world *w) {
    struct rmig_fd fds[12];
    struct pollfd p[12];
    uint64_t deadline;
    int n = what_to_wait_for(w, fds, &deadline);
    for (int i = 0; i < n; i++) {
        p[i].fd = fds[i].fd;
        p[i].events = (short)(POLLIN | (fds[i].write ? POLLOUT : 0));
    }
    if (n >= 0)
        poll(p, (nfds_t)n, sleep_ms(deadline));
}

static void wait_with_epoll(struct world *w) {
    struct rmig_fd fds[12];
    uint64_t deadline;
    int n = what_to_wait_for(w, fds, &deadline), set = epoll_create1(EPOLL_CLOEXEC);
    cr_assert_geq(set, 0);
    for (int i = 0; i < n; i++) {
        struct epoll_event e = {.events = EPOLLIN | (fds[i].write ? (unsigned)EPOLLOUT : 0u)};
        if (epoll_ctl(set, EPOLL_CTL_ADD, fds[i].fd, &e) != 0)
            cr_assert_eq(errno, EEXIST, "descriptor %d cannot be waited on: %s", fds[i].fd, strerror(errno));
    }
    struct epoll_event got[4];
    if (n >= 0)
        epoll_wait(set, got, 4, sleep_ms(deadline));
    close(set);
}

static void open_tcp_world(struct world *w, uint64_t length) {
    memset(&heap, 0, sizeof heap);
    plan_world(w, SIM_ORDERED);
    add_full_ram(w, length);
    param(&w->source_cfg, RMIG_PARAM_IO_TIMEOUT, 20 * SIM_SECOND);
    param(&w->sink_cfg, RMIG_PARAM_IO_TIMEOUT, 20 * SIM_SECOND);
}

static void close_tcp_world(struct world *w, struct rmig_fabric *from, struct rmig_fabric *to) {
    rmig_source_close(w->source);
    rmig_sink_close(w->sink);
    rmig_fabric_close(from);
    if (to != from)
        rmig_fabric_close(to);
    cr_assert_eq(heap.live, 0, "%td allocations are left", heap.live);
    free_ram(w);
}

/* tcp moves a MiB or so each time that it is woken: what is far above that is a loop that does not sleep. */
static void check_wakeups(uint64_t turns, uint64_t bytes) {
    uint64_t most = 300 + bytes / 32768;
    cr_expect_lt(turns, most, "%llu turns for %llu bytes", (unsigned long long)turns, (unsigned long long)bytes);
}

Test(session, an_event_loop_with_poll_runs_both_ends_in_one_thread) {
    struct world w;
    uint64_t turns = 0;
    open_tcp_world(&w, 48 * RMIG_MIB + 3 * PAGE + 5);
    struct rmig_fabric *f = open_tcp();
    open_sessions(&w, f, f, "127.0.0.1:0");
    SINK_OK(&w, rmig_sink_address(w.sink, w.address, sizeof w.address));
    for (bool more = true; more; turns++) {
        bool source_goes_on = source_turn(&w);
        more = sink_turn(&w) || source_goes_on;
        if (more)
            wait_with_poll(&w);
    }
    cr_expect_eq(w.from.status, RMIG_OK, "%s", w.from.text);
    cr_expect_eq(w.to.status, RMIG_OK, "%s", w.to.text);
    cr_expect(same_ram(&w) && w.got_size == STATE_SIZE && memcmp(w.got, w.state, STATE_SIZE) == 0);
    check_wakeups(turns, w.ram[0].from.length * 3 / 2);
    close_tcp_world(&w, f, f);
}

Test(session, an_idle_event_loop_sleeps) {
    struct world w;
    uint64_t turns = 0, until = 0;
    open_tcp_world(&w, RMIG_MIB);
    struct rmig_fabric *f = open_tcp();
    open_sessions(&w, f, f, "127.0.0.1:0");
    SINK_OK(&w, rmig_sink_address(w.sink, w.address, sizeof w.address));
    while (w.stage < 3 || rmig_source_process(w.source) == RMIG_PENDING) {
        source_turn(&w);
        w.stage = w.stage > 3 ? 3 : w.stage;
        sink_turn(&w);
        wait_with_poll(&w);
    }
    for (until = clock_ns() + SIM_SECOND; clock_ns() < until; turns++) {
        struct rmig_fd fds[12];
        struct pollfd p[12];
        uint64_t deadline;
        cr_assert_geq(rmig_source_process(w.source), 0);
        sink_turn(&w);
        int n = what_to_wait_for(&w, fds, &deadline);
        for (int i = 0; i < n; i++) {
            p[i].fd = fds[i].fd;
            p[i].events = (short)(POLLIN | (fds[i].write ? POLLOUT : 0));
        }
        poll(p, (nfds_t)n, sleep_ms(sim_min(deadline, until)));
    }
    cr_expect_lt(turns, 50, "%llu turns in an idle second", (unsigned long long)turns);
    close_tcp_world(&w, f, f);
}

static bool shared_ram(struct world *w) { // so that the parent sees what the child's sink has got
    const struct rmig_block_desc *to = &w->ram[0].to;
    return mmap(to->host, to->length, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == to->host;
}

/* The child: a sink alone, in its own loop. Exit status 0: all came. */
static int sink_process(struct world *w, int pipe_fd) {
    struct rmig_error err = {0};
    struct rmig_fabric *f = open_tcp();
    w->from.done = true;
    if (rmig_sink_open(f, &w->sink_cfg, &w->sink, &err) != RMIG_OK ||
        rmig_sink_listen(w->sink, "127.0.0.1:0") != RMIG_OK ||
        rmig_sink_address(w->sink, w->address, sizeof w->address) != RMIG_OK ||
        write(pipe_fd, w->address, sizeof w->address) != (ssize_t)sizeof w->address)
        return 2;
    uint64_t until = clock_ns() + 60 * SIM_SECOND, turns = 0;
    for (; sink_turn(w) && clock_ns() < until; turns++)
        wait_with_epoll(w);
    if (turns > 300 + w->ram[0].to.length / 16384)
        return 3;
    bool good =
        w->to.done && w->to.status == RMIG_OK && w->got_size == STATE_SIZE && memcmp(w->got, w->state, STATE_SIZE) == 0;
    rmig_sink_close(w->sink);
    rmig_fabric_close(f);
    return good ? 0 : 1;
}

/* Forks the sink, before this process has anything of libfabric; the source is open when this returns. */
static pid_t fork_sink(struct world *w, struct rmig_fabric **f) {
    struct rmig_error err = {0};
    int ends[2];
    cr_assert(shared_ram(w) && pipe(ends) == 0);
    pid_t pid = fork();
    cr_assert_geq(pid, 0);
    if (pid == 0)
        _exit(sink_process(w, ends[1]));
    close(ends[1]);
    cr_assert_eq(read(ends[0], w->address, sizeof w->address), (ssize_t)sizeof w->address, "the sink does not listen");
    close(ends[0]);
    *f = open_tcp();
    w->to.done = true; // of this process
    cr_assert_eq(rmig_source_open(*f, &w->source_cfg, &w->source, &err), RMIG_OK, "%s", err.text);
    SOURCE_OK(w, rmig_source_add_block(w->source, &w->ram[0].from, NULL));
    return pid;
}

Test(session, event_loops_with_epoll_run_two_processes) {
    struct world w;
    struct rmig_fabric *f;
    uint64_t turns = 0;
    int status;
    open_tcp_world(&w, 48 * RMIG_MIB);
    pid_t pid = fork_sink(&w, &f);
    for (; source_turn(&w); turns++)
        wait_with_epoll(&w);
    cr_expect_eq(w.from.status, RMIG_OK, "%s", w.from.text);
    cr_expect_eq(waitpid(pid, &status, 0), pid);
    cr_expect(WIFEXITED(status) && WEXITSTATUS(status) == 0, "the sink's process ended with 0x%x", (unsigned)status);
    cr_expect(same_ram(&w));
    check_wakeups(turns, w.ram[0].from.length * 3 / 2);
    close_tcp_world(&w, f, f);
}

Test(session, a_peer_killed_in_mid_round_is_noticed_long_before_io_timeout) {
    struct world w;
    struct rmig_fabric *f;
    uint64_t killed = 0;
    int status;
    open_tcp_world(&w, 256 * RMIG_MIB);
    param(&w.source_cfg, RMIG_PARAM_MAX_BANDWIDTH, 200 * RMIG_MIB);
    pid_t pid = fork_sink(&w, &f);
    while (source_turn(&w)) {
        if (killed == 0 && source_stats(&w).bytes_written > 16 * RMIG_MIB) {
            killed = clock_ns();
            kill(pid, SIGKILL);
        }
        wait_with_epoll(&w);
    }
    uint64_t waited = clock_ns() - killed;
    cr_expect_eq(waitpid(pid, &status, 0), pid);
    cr_assert_neq(killed, 0, "the round was over before the sink was killed: %s", w.from.text);
    cr_expect(w.from.status == RMIG_ERR_PEER_GONE || w.from.status == RMIG_ERR_FABRIC, "%s %s",
              rmig_status_name(w.from.status), w.from.text);
    cr_expect_lt(waited, 5 * SIM_SECOND, "noticed after %llu ns", (unsigned long long)waited);
    cr_expect(says(w.from.text, "went away") || says(w.from.text, "the connection to the sink failed"), "%s",
              w.from.text);
    close_tcp_world(&w, f, f);
}

/* Dirty pages are often known by guest address. */
Test(session, a_guest_address_finds_its_block) {
    struct world w;
    small_world(&w);
    open_world(&w);
    uint32_t block = 9;
    uint64_t at = 9;
    SOURCE_OK(&w, rmig_source_block_at(w.source, w.ram[0].from.guest_offset + 4097, &block, &at));
    cr_expect_eq(block, 0);
    cr_expect_eq(at, 4097);
    SOURCE_OK(&w, rmig_source_block_at(w.source, w.ram[0].from.guest_offset, NULL, NULL));
    uint64_t hole = w.ram[0].from.guest_offset + ((uint64_t)1 << 50);
    cr_expect_eq(rmig_source_block_at(w.source, hole, &block, &at), RMIG_ERR_ARGUMENT);
    cr_expect(says(rmig_source_error(w.source)->text, "no block holds guest offset 0x"), "%s",
              rmig_source_error(w.source)->text);
    close_world(&w);
}
