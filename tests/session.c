/* How sources and sinks behave, seen through the public interface: order of calls, cancelling, death and silence, what goes over the
   wire, what gets registered, pace, streams, allocation. Over the simulator, where time is virtual and each byte can be seen; the event
   loops at the end over libfabric's tcp.

   A diary between the core and the fabric notes what each side posts, in order. */
#define _GNU_SOURCE
#include <stddef.h>
#include <stdlib.h>

static struct {
    size_t count; // calls of malloc and realloc
    size_t fail_at; // the one that fails, 0: none
    ptrdiff_t live;
} heap;

static void *counted_realloc(void *p, size_t n) {
    if (++heap.count == heap.fail_at)
        return NULL;
    void *q = realloc(p, n);
    if (p == NULL && q != NULL)
        heap.live++;
    return q;
}

static void counted_free(void *p) {
    heap.live--;
    free(p);
}

#define RMIG_MALLOC(n) counted_realloc(NULL, n)
#define RMIG_REALLOC(p, n) counted_realloc(p, n)
#define RMIG_FREE(p) counted_free(p)
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
    uint32_t stop_type; // when stop_side sends this, the world falls silent, or that side dies
    int stop_side;
    bool stop_kills, stop_on_write;
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
    if (diary.stop_kills)
        sim_kill(side->sim, side->index);
    else
        sim_silence(side->sim);
}

static int diary_send(struct rmig_ep *ep, const void *buf, uint64_t n, const struct rmig_mr *mr, uint64_t id,
                      struct rmig_error *err) {
    struct rmig_header header;
    cr_assert_eq(rmig_decode_header(buf, (size_t)n, &header), RMIG_HEADER_SIZE);
    if (diary.stop_type == header.type && diary.stop_side == (int)side_of(ep))
        stop_the_world(ep);
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
    char text[320];
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
    bool hold_blocks, hold_stream;
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
    d->host = mmap(NULL, length, PROT_READ | PROT_WRITE, flags, *fd, 0);
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

static bool same_ram(const struct world *w) {
    for (unsigned i = 0; i < w->rams; i++)
        if (memcmp(w->ram[i].from.host, w->ram[i].to.host, w->ram[i].from.length) != 0)
            return false;
    return true;
}

static void param(struct rmig_config *cfg, enum rmig_param p, uint64_t value) {
    struct rmig_error err;
    cr_assert_eq(rmig_set(cfg, p, value, &err), RMIG_OK, "%s", err.text);
}

static void plan_world(struct world *w, enum sim_mode mode) {
    memset(w, 0, sizeof *w);
    memset(&heap, 0, sizeof heap);
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
    for (unsigned i = 0; i < w->rams && status == RMIG_OK; i++)
        status = rmig_sink_add_block(w->sink, &w->ram[i].to, NULL);
    return status == RMIG_OK ? rmig_sink_accept_blocks(w->sink) : status;
}

/* RMIG_OK: go on, ALL_DONE, or the session's error. */
static int on_sink_event(struct world *w, const struct rmig_sink_event *ev) {
    w->events |= 1u << ev->type;
    if (w->watch != NULL)
        w->watch(w, ev);
    switch (ev->type) {
    case RMIG_SINK_BLOCKS:
        return w->hold_blocks ? RMIG_OK : accept_ram(w);
    case RMIG_SINK_ROUND:
        w->rounds++;
        return RMIG_OK;
    case RMIG_SINK_STREAM:
        if (!w->hold_stream)
            read_stream(w);
        return RMIG_OK;
    case RMIG_SINK_DISCONNECTED:
        if (w->got_size == w->want)
            return rmig_sink_complete(w->sink);
        rmig_sink_cancel(w->sink);
        return RMIG_OK;
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
        w->want = STATE_SIZE;
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
    w->sim = sim_open(&w->cfg);
    diary_begin(w->sim);
    sim_actor(w->sim, 1, sink_step, w);
}

/* The sink listens and is an actor; the test itself is the source's embedder. */
static void open_world(struct world *w) {
    open_sim(w);
    open_sessions(w, sim_fabric(w->sim, 0), sim_fabric(w->sim, 1), w->address);
}

static void free_ram(struct world *w) {
    for (unsigned i = 0; i < w->rams; i++) {
        munmap(w->ram[i].from.host, w->ram[i].from.length);
        munmap(w->ram[i].to.host, w->ram[i].to.length);
        for (unsigned k = 0; k < 2; k++)
            if (w->ram[i].fd[k] >= 0)
                close(w->ram[i].fd[k]);
    }
    free(w->got);
}

/* Everything is given back, whatever happened before. */
static void close_world(struct world *w) {
    struct rmig_error err = {0};
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

TestSuite(session, .timeout = 120);

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
    cr_expect(strstr(rmig_source_error(w.source)->text, "cancelled") != NULL, "process returns CANCELLED, error says \"%s\"",
              rmig_source_error(w.source)->text);
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

Test(session, wait_after_finished_returns) {
    struct world w;
    struct rmig_sink_event ev;
    small_world(&w);
    connect_world(&w);
    one_round(&w);
    finish(&w);
    sim_actor(w.sim, 1, NULL, NULL);
    SINK_OK(&w, rmig_sink_wait(w.sink, &ev, SIM_MS));
    cr_assert_eq(ev.type, RMIG_SINK_NONE);
    int status = rmig_sink_wait(w.sink, &ev, RMIG_FOREVER); // nothing can come any more
    cr_expect(status == RMIG_OK || status == RMIG_ERR_STATE, "%s: %s", rmig_status_name(status),
              rmig_sink_error(w.sink)->text);
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
    SINK_OK(w, accept_ram(w));
    sim_actor(w->sim, 1, sink_step, w);
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
    read_stream(&w);
    cr_expect_eq(w.got_size, 100);
    sim_actor(w.sim, 1, sink_step, &w);
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
        const char *part = missing ? "block \"ram0\" of the source is not known" : "block \"ram0\" has 1060864 bytes at the source and 1056768";
        cr_expect(strstr(w.to.text, part) != NULL, "sink: %s", w.to.text);
        cr_expect(strstr(rmig_source_error(w.source)->text, part) != NULL, "source: %s", rmig_source_error(w.source)->text);
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
    cr_expect(strstr(rmig_source_error(w.source)->text, "this host is full") != NULL, "%s", rmig_source_error(w.source)->text);
    sink_ends(&w);
    cr_expect(strstr(w.to.text, "this host is full") != NULL, "%s", w.to.text);
    close_world(&w);
}

Test(session, a_sink_goes_on_listening_when_a_source_leaves_before_it_is_connected) {
    struct world w;
    struct rmig_error err = {0};
    small_world(&w);
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
