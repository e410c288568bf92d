/*
sim_fabric.h - a fabric that is simulated: both ends in one process, one seed, a virtual clock

    struct sim_config cfg;
    sim_defaults(&cfg, SIM_ORDERED, seed);      // then change what the test is about
    struct sim *sim = sim_open(&cfg);
    struct rmig_fabric *source_fabric = sim_fabric(sim, 0), *sink_fabric = sim_fabric(sim, 1);
    ... rmig_source_open(source_fabric, ...), rmig_sink_open(sink_fabric, ...) ...
    sim_actor(sim, 0, source_step, &source);    // steps never block: process, then return next_deadline
    sim_actor(sim, 1, sink_step, &sink);
    int status = sim_run(sim, 60 * SIM_SECOND, &err);
    ... close sources and sinks ...
    assert(sim_clean(sim, &err) == RMIG_OK);    // nothing leaked, and nobody broke the contract
    sim_close(sim);

Time. Each side (a host) has its own clock. What costs CPU there (registering, posting, polling) moves it on; a side
that waits is moved on by the world. The world always lets the actor run that would wake first, and all happens in order
of time: the same seed and the same actors give the same run, which sim_hash tells.

Actors and blocking calls. A step returns the time at which it wants to run next if nothing happens before (in ns,
RMIG_FOREVER: only when something happens; 0: again at once) or SIM_DONE. A blocking call (the fabric's wait) lets the
other actors run until there is something for this side. So one side may block, in its step or in plain code between
sim_actor and sim_close; the other one's steps must not, since a blocked actor cannot run below another. A side
without a fabric's endpoints can be an actor too: a guest that writes its memory, say.

Adversity. Data is read from the source's memory at some time between posting and completion and written to the target's
at arrival, or part by part until then. A connection closed without disconnect loses what was not read yet. See struct
sim_config for modes, limits and faults. Misuse of the contract by the caller is printed, counted, and makes sim_clean
fail.
*/
#ifndef RMIG_SIM_FABRIC_H
#define RMIG_SIM_FABRIC_H

#include "../rmig.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

#define SIM_SIDES_MAX 8
#define SIM_FAULTS_MAX 16
#define SIM_DONE (UINT64_MAX - 1) // a step's return value: this actor has finished
#define SIM_US ((uint64_t)1000)
#define SIM_MS ((uint64_t)1000000)
#define SIM_SECOND ((uint64_t)1000000000)
#define SIM_PRIVATE_MAX 256

// >>configuration

enum sim_mode {
    SIM_ORDERED, // as RC verbs: all in order, completion is delivery
    SIM_UNORDERED, // as EFA's SRD: writes and completions in any order, sends overtake writes; completion is delivery
    SIM_LOCAL, // as iWARP: all in order, but completion only means that the data was taken from local memory
};

enum sim_op {
    SIM_OPEN,
    SIM_LISTEN,
    SIM_OPEN_REQUEST,
    SIM_REJECT,
    SIM_CONNECT,
    SIM_ACCEPT,
    SIM_REG,
    SIM_DEREG,
    SIM_RECV,
    SIM_SEND,
    SIM_WRITE,
    SIM_POLL,
    SIM_WAIT,
    SIM_REVOKE,
    SIM_OP_COUNT,
    SIM_TIME = SIM_OP_COUNT // not an operation: a fault at a time
};

enum sim_fault_kind {
    SIM_NO_FAULT,
    SIM_FAULT_ERROR, // the function fails
    SIM_FAULT_COMPLETION, // the function succeeds, then the operation fails: RMIG_FEV_ERROR here, DISCONNECTED there
    SIM_FAULT_DEATH, // this side's process dies: DISCONNECTED at its peers, and nothing ever happens here again
    SIM_FAULT_SILENCE, // from now on nothing arrives anywhere, without a word
    SIM_FAULT_FULL, // send, recv: RMIG_ERR_FULL; write: fewer are taken
    SIM_FAULT_KINDS
};

struct sim_fault {
    enum sim_fault_kind kind;
    enum sim_op op; // or SIM_TIME: nth is a time in ns (DEATH and SILENCE only)
    int side; // which side's operations count; -1: each side's
    uint64_t nth; // 1: the first; single writes count, not batches
};

struct sim_cpu { // what things cost a side, ns
    uint64_t reg_call, reg_mib, dereg_call, dereg_mib; // per call and per MiB
    uint64_t post, poll; // per send, recv, batch of writes; per poll
};

struct sim_config {
    uint64_t seed;
    unsigned sides; // 2 ... SIM_SIDES_MAX
    enum sim_mode mode;

    uint64_t latency_ns; // one way
    uint64_t jitter_ns; // SIM_UNORDERED: added to each arrival at random
    uint64_t bandwidth; // bytes per second out of each side; 0: unlimited
    uint64_t change_ns, changed_bandwidth; // what it is from that time on; 0: it stays
    struct sim_cpu cpu[SIM_SIDES_MAX];

    uint32_t write_depth, send_depth, recv_depth; // what caps grants; 0: what was wanted
    uint64_t write_max, registration_max;
    uint64_t registered_max; // bytes registered at once on a side, like RLIMIT_MEMLOCK
    uint32_t private_data_request, private_data_reply; // at most SIM_PRIVATE_MAX
    bool pad_private_data; // to those sizes, as InfiniBand does
    unsigned key_bits; // 32 ... 64
    bool offset_addressing, local_mr, target_must_poll;
    bool revokes; // caps.revokes
    uint32_t parts; // a write lands in so many, over the time that it takes on the wire; 0, 1: all at its arrival
    bool no_copy; // writes touch no memory; bounds, keys and access are still checked
    bool no_retry; // a send that finds no receive breaks the connection at once, instead of waiting for one
    bool extra_completions; // some that were not asked for
    bool stray_at_this_end; // at_this_end is set in all events in which it means nothing

    struct sim_fault faults[SIM_FAULTS_MAX]; // kind SIM_NO_FAULT: unused
    uint32_t random_per_million; // each operation fails at random with this chance ...
    uint32_t random_kinds; // ... in one of these ways: bit k for enum sim_fault_kind k
    uint32_t random_max; // ... at most so often
    uint64_t max_steps; // actor steps and events after which a run is given up as endless
};

struct sim_stats { // of one side
    uint64_t ops[SIM_OP_COUNT]; // calls; of SIM_WRITE: single writes offered while there was room
    uint64_t batches, writes; // calls of write, writes taken
    uint64_t bytes_written, bytes_sent; // delivered from this side
    uint64_t access_errors; // writes from this side that the target refused
    uint64_t regions, regions_peak, registered, registered_peak; // now and at most; bytes
    uint64_t endpoints; // now
    uint64_t cuts; // of connections, each once
    uint64_t faults; // injected here
    uint64_t steps; // of its actor
};

// >>world

struct sim;
struct sim_conn;

struct sim_region {
    struct sim_ep *ep;
    uint8_t *address;
    uint64_t length;
    unsigned access;
    uint32_t generation; // of this slot
    bool live;
    uint32_t next_free;
};

typedef uint64_t sim_step(void *user, uint64_t now);

struct sim_side {
    struct rmig_fabric fabric; // first: the fabric is the side
    struct sim *sim;
    unsigned index;
    uint64_t time;
    uint64_t link_busy; // when what is queued to go out has left
    bool dead, open;
    struct sim_ep *eps;
    struct sim_region *regions;
    uint32_t region_count, region_cap, region_free;
    uint64_t key_secret; // what its keys are made of
    struct sim_stats stats;

    sim_step *step; // the actor
    void *user;
    uint64_t deadline;
    uint64_t last_run; // for fairness: the step's number
    uint64_t last_wake, still; // steps since its time moved on
    bool running, done;
};

struct sim_out { // an event waiting for poll
    uint64_t time;
    uint64_t covers; // writes whose queue slots it gives back
    bool hidden; // only gives back a slot
    struct rmig_fabric_event e;
};

struct sim_recv {
    void *buf;
    uint64_t n, id;
    struct rmig_mr mr;
    bool has_mr, fail;
};

enum sim_phase { SIM_LISTENING, SIM_OPENING, SIM_RESOLVED, SIM_CONNECTING, SIM_UP, SIM_ENDED };

struct sim_ep {
    struct rmig_ep base; // first
    struct sim_side *side;
    struct sim_conn *conn; // NULL: a listener
    unsigned end; // 0: the active one, 1: the passive
    enum sim_phase phase; // as far as poll has told
    bool ended; // the last event is queued
    bool disconnecting;
    bool revoked; // the peer may not write any more
    bool cut;
    char host[64]; // active side: all hosts that are still to be tried, with a '+' between them
    unsigned port;
    uint32_t write_depth, send_depth, recv_depth;
    uint32_t writes, sends, recvs; // outstanding: posted, and poll has not told of their end
    uint32_t coming; // writes and sends outstanding that will have an event
    struct sim_out *out;
    size_t out_head, out_count, out_cap;
    struct sim_recv *recv;
    size_t recv_head, recv_count;
    struct sim_ep *next;
};

enum sim_transfer_kind { SIM_TRANSFER_WRITE, SIM_TRANSFER_SEND, SIM_TRANSFER_GOODBYE };

struct sim_transfer { // a write, a send, or an orderly disconnect on its way
    enum sim_transfer_kind kind;
    struct sim_conn *conn;
    unsigned from;
    const uint8_t *local;
    uint64_t length, remote_address, key, id;
    struct rmig_mr mr;
    bool has_mr, signal, fail;
    bool taken; // from local memory
    uint8_t *copy; // what was taken; NULL while taken: at arrival, or nothing is copied
    uint8_t *target; // where it lands; NULL: nothing has landed
    uint64_t landed; // bytes
    uint64_t part_ns; // from one part to the next
    uint64_t arrival;
    struct sim_transfer *next;
};

struct sim_dir { // one direction of a connection
    uint64_t last_arrival, last_send, last_delivery;
    struct sim_transfer *waiting, *waiting_last; // arrived, not deliverable yet
    uint64_t covers; // writes completed since the last completion told of any
    bool resuming;
    bool cut; // something was lost: nothing after it may arrive
};

struct sim_conn {
    struct sim *sim;
    struct sim_side *side[2];
    struct sim_ep *end[2]; // NULL: not yet, or closed
    struct sim_ep *listener; // while the request is unanswered
    bool up[2], down[2], asked, answered, abandoned, broken;
    bool unknown_host, dead_host; // "HOST.invalid"; "HOST.dead": nobody answers
    bool out_of_fds; // "HOST.full": this end has no descriptor for it
    unsigned port;
    uint8_t request[SIM_PRIVATE_MAX], reply[SIM_PRIVATE_MAX];
    size_t request_length, reply_length;
    char text[2][200];
    struct sim_dir dir[2]; // by sender
    struct sim_conn *next;
};

enum sim_event_kind {
    SIM_EV_RESOLVED,
    SIM_EV_REQUEST,
    SIM_EV_ACCEPTED,
    SIM_EV_READY,
    SIM_EV_REJECTED,
    SIM_EV_GONE,
    SIM_EV_TAKE,
    SIM_EV_LEFT,
    SIM_EV_PART,
    SIM_EV_ARRIVE,
    SIM_EV_RESUME,
    SIM_EV_FAULT
};

struct sim_event {
    uint64_t time, seq;
    enum sim_event_kind kind;
    unsigned end; // whom it happens to, or whose fault
    struct sim_conn *conn;
    struct sim_transfer *transfer;
};

struct sim {
    struct sim_config cfg;
    struct sim_side side[SIM_SIDES_MAX];
    uint64_t random;
    struct sim_event *heap;
    size_t heap_count, heap_cap;
    uint64_t seq, hash, steps;
    struct sim_conn *conns;
    struct sim_transfer *spare;
    unsigned next_port;
    bool silent;
    uint32_t random_faults;
    uint64_t violations;
    char violation[256]; // the first
};

static inline void sim_violate(struct sim *sim, const char *format, ...) __attribute__((format(printf, 2, 3)));
static inline void sim_violate(struct sim *sim, const char *format, ...) {
    char text[sizeof sim->violation];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    if (sim->violations++ == 0)
        memcpy(sim->violation, text, sizeof text);
    fprintf(stderr, "sim: contract broken: %s\n", text);
}

static inline void *sim_grow(void *p, size_t n, size_t size) {
    p = realloc(p, n * size);
    if (p == NULL) {
        fprintf(stderr, "sim: out of memory for %zu objects of %zu bytes\n", n, size);
        abort();
    }
    return p;
}

static inline uint64_t sim_mix(uint64_t z) { // splitmix64's
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

static inline uint64_t sim_random(struct sim *sim) { return sim_mix(sim->random += 0x9e3779b97f4a7c15u); }

static inline uint64_t sim_below(struct sim *sim, uint64_t n) { return n == 0 ? 0 : sim_random(sim) % n; }

static inline uint64_t sim_max(uint64_t a, uint64_t b) { return a > b ? a : b; }
static inline uint64_t sim_min(uint64_t a, uint64_t b) { return a < b ? a : b; }

static inline bool sim_is_ordered(const struct sim *sim) { return sim->cfg.mode != SIM_UNORDERED; }

static inline void sim_note(struct sim *sim, uint64_t value) {
    sim->hash = (sim->hash ^ value) * 0x100000001b3u + (sim->hash >> 40);
}

static inline bool sim_sooner(const struct sim_event *a, const struct sim_event *b) {
    return a->time != b->time ? a->time < b->time : a->seq < b->seq;
}

static inline void sim_schedule(struct sim *sim, uint64_t time, enum sim_event_kind kind, struct sim_conn *conn,
                                unsigned end, struct sim_transfer *transfer) {
    if (sim->heap_count == sim->heap_cap) {
        sim->heap_cap = sim->heap_cap == 0 ? 64 : 2 * sim->heap_cap;
        sim->heap = sim_grow(sim->heap, sim->heap_cap, sizeof *sim->heap);
    }
    struct sim_event event = {time, sim->seq++, kind, end, conn, transfer};
    size_t at = sim->heap_count++;
    for (; at > 0 && sim_sooner(&event, &sim->heap[(at - 1) / 2]); at = (at - 1) / 2)
        sim->heap[at] = sim->heap[(at - 1) / 2];
    sim->heap[at] = event;
}

static inline struct sim_event sim_next(struct sim *sim) {
    struct sim_event first = sim->heap[0], last = sim->heap[--sim->heap_count];
    size_t at = 0;
    for (;;) {
        size_t child = 2 * at + 1;
        if (child >= sim->heap_count)
            break;
        if (child + 1 < sim->heap_count && sim_sooner(&sim->heap[child + 1], &sim->heap[child]))
            child++;
        if (!sim_sooner(&sim->heap[child], &last))
            break;
        sim->heap[at] = sim->heap[child];
        at = child;
    }
    if (sim->heap_count > 0)
        sim->heap[at] = last;
    return first;
}

// >>events of an endpoint

/* Queues an event for poll, by time; after the last one nothing more comes. Returns it to be filled in, or NULL. */
static inline struct sim_out *sim_push(struct sim_ep *ep, uint64_t time, enum rmig_fabric_event_type type,
                                       uint64_t id) {
    if (ep == NULL || ep->ended || ep->side->dead || ep->side->sim->silent)
        return NULL;
    if (ep->out_head > 0 && ep->out_head == ep->out_count)
        ep->out_head = ep->out_count = 0;
    if (ep->out_count == ep->out_cap) {
        ep->out_cap = ep->out_cap == 0 ? 16 : 2 * ep->out_cap;
        ep->out = sim_grow(ep->out, ep->out_cap, sizeof *ep->out);
    }
    size_t at = ep->out_count++;
    for (; at > ep->out_head && ep->out[at - 1].time > time; at--)
        ep->out[at] = ep->out[at - 1];
    struct sim_out *out = &ep->out[at];
    memset(out, 0, sizeof *out);
    out->time = time;
    out->e.type = type;
    out->e.id = id;
    return out;
}

/* The last event of an endpoint: ERROR, DISCONNECTED or REJECTED. */
static inline void sim_end(struct sim_conn *conn, unsigned end, uint64_t time, enum rmig_fabric_event_type type,
                           int code, const char *text) {
    struct sim_ep *ep = conn->end[end];
    struct sim_out *out = sim_push(ep, time, type, 0);
    if (out == NULL)
        return;
    snprintf(conn->text[end], sizeof conn->text[end], "%s", text);
    out->e.text = conn->text[end];
    out->e.provider_code = code;
    out->e.at_this_end = end == 0 && conn->out_of_fds;
    ep->ended = true;
}

/* A transfer from `from` failed at the target: no more is delivered in either direction. */
static inline void sim_break(struct sim_conn *conn, unsigned from, uint64_t time, int code, const char *text) {
    struct sim *sim = conn->sim;
    if (conn->broken)
        return;
    conn->broken = true;
    char gone[200];
    snprintf(gone, sizeof gone, "the peer ended the connection: %s", text);
    if (sim->cfg.mode == SIM_LOCAL)
        sim_end(conn, from, time + sim->cfg.latency_ns, RMIG_FEV_DISCONNECTED, code, gone);
    else
        sim_end(conn, from, time + sim->cfg.latency_ns, RMIG_FEV_ERROR, code, text);
    sim_end(conn, 1 - from, time, RMIG_FEV_DISCONNECTED, 0, gone);
}

static inline struct sim_region *sim_region_by_handle(struct sim_side *side, const void *handle) {
    uint64_t id = (uint64_t)(uintptr_t)handle;
    uint32_t slot = (uint32_t)(id & 0xfffff);
    if (slot == 0 || slot > side->region_count)
        return NULL;
    struct sim_region *r = &side->regions[slot - 1];
    return r->live && r->generation == id >> 20 ? r : NULL;
}

/* Puts all numbers of 32 bits into an order that only the secret tells (a Feistel network), and back. */
static inline uint32_t sim_shuffle(uint64_t secret, uint32_t x, bool back) {
    uint32_t left = x >> 16, right = x & 0xffff;
    for (unsigned i = 0; i < 6; i++) {
        uint64_t round = back ? 5 - i : i;
        uint32_t next = left ^ (uint32_t)(sim_mix(secret + (round << 32 | right)) & 0xffff);
        left = right;
        right = next;
    }
    return right << 16 | left;
}

/* Keys differ from region to region and from side to side, and none tells another. */
static inline uint64_t sim_key(const struct sim_side *side, uint32_t slot, uint32_t generation) {
    unsigned bits = side->sim->cfg.key_bits;
    uint64_t key = sim_shuffle(side->key_secret, (generation & 0xfff) << 20 | slot, false);
    return bits == 32 ? key : key | (sim_mix(side->key_secret ^ key) >> (64 - bits) & ~(uint64_t)0xffffffffu);
}

static inline struct sim_region *sim_region_by_key(struct sim_side *side, uint64_t key) {
    uint32_t slot = sim_shuffle(side->key_secret, (uint32_t)key, true) & 0xfffff;
    if (slot == 0 || slot > side->region_count)
        return NULL;
    struct sim_region *r = &side->regions[slot - 1];
    return r->live && sim_key(side, slot, r->generation) == key ? r : NULL;
}

/* Whether mr may be used for `length` bytes at p. Says why not. */
static inline const char *sim_local_fault(struct sim_ep *ep, const void *p, uint64_t length, const struct rmig_mr *mr,
                                          unsigned access) {
    if (mr == NULL)
        return "no region given";
    struct sim_region *r = sim_region_by_handle(ep->side, mr->desc);
    if (r == NULL || r->ep != ep)
        return "not a region of this endpoint";
    uint64_t offset = (uint64_t)((uintptr_t)p - (uintptr_t)r->address);
    if ((uintptr_t)p < (uintptr_t)r->address || offset > r->length || length > r->length - offset)
        return "outside the region";
    return (r->access & access) == access ? NULL : "the region lacks the access right";
}

// >>transfers

static inline void sim_transfer_free(struct sim *sim, struct sim_transfer *t) {
    free(t->copy);
    t->next = sim->spare;
    sim->spare = t;
}

static inline struct sim_transfer *sim_transfer_new(struct sim_ep *ep, enum sim_transfer_kind kind) {
    struct sim *sim = ep->side->sim;
    struct sim_transfer *t = sim->spare;
    if (t != NULL)
        sim->spare = t->next;
    else
        t = sim_grow(NULL, 1, sizeof *t);
    memset(t, 0, sizeof *t);
    t->kind = kind;
    t->conn = ep->conn;
    t->from = ep->end;
    return t;
}

/* The region may have been given back since the transfer was posted. */
static inline bool sim_still_registered(struct sim_transfer *t) {
    struct sim *sim = t->conn->sim;
    return !sim->cfg.local_mr || t->length == 0 ||
           sim_local_fault(t->conn->end[t->from], t->local, t->length, &t->mr, RMIG_ACCESS_LOCAL_READ) == NULL;
}

/* Its sender has closed or cut the connection, or died: nothing more is read from its memory. */
static inline bool sim_lost_sender(const struct sim_transfer *t) {
    const struct sim_ep *ep = t->conn->end[t->from];
    return ep == NULL || ep->cut || t->conn->side[t->from]->dead;
}

/* Takes the data from the sender's memory, into a copy. */
static inline void sim_take(struct sim_transfer *t) {
    struct sim *sim = t->conn->sim;
    if (t->taken || sim_lost_sender(t))
        return;
    t->taken = true;
    if (!sim_still_registered(t))
        t->fail = true;
    if (t->fail || (sim->cfg.no_copy && t->kind == SIM_TRANSFER_WRITE) || t->length == 0)
        return;
    t->copy = sim_grow(NULL, (size_t)t->length, 1);
    memcpy(t->copy, t->local, (size_t)t->length);
}

static inline void sim_complete(struct sim_transfer *t, uint64_t time) {
    struct sim_conn *conn = t->conn;
    struct sim_ep *ep = conn->end[t->from];
    struct sim_dir *dir = &conn->dir[t->from];
    if (t->kind == SIM_TRANSFER_SEND) {
        sim_push(ep, time, RMIG_FEV_SEND, t->id);
        return;
    }
    if (t->kind != SIM_TRANSFER_WRITE)
        return;
    dir->covers++;
    if (!t->signal && sim_is_ordered(conn->sim))
        return;
    struct sim_out *out = sim_push(ep, time, RMIG_FEV_WRITE, t->id);
    if (out != NULL) {
        out->covers = dir->covers;
        out->hidden = !t->signal;
    }
    dir->covers = 0;
}

/* Once it has arrived, the sender hears of it. */
static inline void sim_acknowledge(struct sim_transfer *t, uint64_t time) {
    struct sim *sim = t->conn->sim;
    if (sim->cfg.mode == SIM_LOCAL)
        return;
    uint64_t jitter = sim_is_ordered(sim) ? 0 : sim_below(sim, sim->cfg.jitter_ns + 1);
    sim_complete(t, time + sim->cfg.latency_ns + jitter);
}

/* Where a write would land; NULL: it may not. */
static inline uint8_t *sim_write_target(const struct sim_transfer *t) {
    struct sim_conn *conn = t->conn;
    struct sim *sim = conn->sim;
    struct sim_side *target = conn->side[1 - t->from];
    struct sim_region *r = sim_region_by_key(target, t->key);
    uint64_t base = r == NULL || sim->cfg.offset_addressing ? 0 : (uint64_t)(uintptr_t)r->address;
    uint64_t offset = t->remote_address - base;
    if (r == NULL || r->ep != conn->end[1 - t->from] || (r->access & RMIG_ACCESS_REMOTE_WRITE) == 0 ||
        t->remote_address < base || offset > r->length || t->length > r->length - offset)
        return NULL;
    return r->address + offset;
}

/* Lets a write land up to its byte `upto`. The key counts when the first byte lands: dereg does not stop the others.
   False: refused, and the connection is broken. */
static inline bool sim_land(struct sim_transfer *t, uint64_t upto, uint64_t time) {
    struct sim_conn *conn = t->conn;
    if (t->target == NULL)
        t->target = sim_write_target(t);
    if (t->target == NULL || conn->end[1 - t->from]->revoked) {
        conn->side[t->from]->stats.access_errors++;
        sim_break(conn, t->from, time, 10, "remote access error");
        return false;
    }
    const uint8_t *from = t->copy != NULL ? t->copy : t->local;
    if (!conn->sim->cfg.no_copy)
        memcpy(t->target + t->landed, from + t->landed, (size_t)(upto - t->landed));
    t->landed = upto;
    return true;
}

static inline void sim_deliver_write(struct sim_transfer *t, uint64_t time) {
    if (!sim_land(t, t->length, time))
        return;
    t->conn->side[t->from]->stats.bytes_written += t->length;
    sim_acknowledge(t, time);
}

static inline void sim_deliver_send(struct sim_transfer *t, uint64_t time) {
    struct sim_conn *conn = t->conn;
    struct sim_ep *ep = conn->end[1 - t->from];
    if (ep->recv_count == 0) {
        sim_break(conn, t->from, time, 13, "the receiver was not ready");
        return;
    }
    struct sim_recv recv = ep->recv[ep->recv_head];
    ep->recv_head = (ep->recv_head + 1) % ep->recv_depth;
    ep->recv_count--;
    if (recv.fail || t->length > recv.n ||
        (conn->sim->cfg.local_mr &&
         sim_local_fault(ep, recv.buf, recv.n, recv.has_mr ? &recv.mr : NULL, RMIG_ACCESS_LOCAL_WRITE) != NULL)) {
        sim_end(conn, 1 - t->from, time, RMIG_FEV_ERROR, 1,
                recv.fail ? "injected: a receive failed" : "a message does not fit its receive buffer");
        sim_break(conn, t->from, time, 9, "the receiver could not take a message");
        return;
    }
    if (t->length > 0)
        memcpy(recv.buf, t->copy, (size_t)t->length);
    struct sim_out *out = sim_push(ep, time, RMIG_FEV_RECV, recv.id);
    if (out != NULL)
        out->e.length = t->length;
    conn->side[t->from]->stats.bytes_sent += t->length;
    sim_acknowledge(t, time);
}

/* A transfer that lost its sender before its data was taken, or that nobody can receive. */
static inline bool sim_is_lost(struct sim_transfer *t) {
    struct sim_conn *conn = t->conn;
    struct sim_dir *dir = &conn->dir[t->from];
    bool sender_gone = sim_lost_sender(t);
    if (conn->sim->silent || conn->broken || conn->end[1 - t->from] == NULL || conn->down[1 - t->from] ||
        conn->side[1 - t->from]->dead)
        return true;
    if (t->kind == SIM_TRANSFER_GOODBYE)
        return false;
    if (sender_gone && !t->taken && sim_is_ordered(conn->sim))
        dir->cut = true;
    return dir->cut || (sender_gone && !t->taken);
}

static inline void sim_deliver(struct sim_transfer *t, uint64_t time) {
    struct sim_conn *conn = t->conn;
    struct sim_dir *dir = &conn->dir[t->from];
    if (sim_is_lost(t))
        return;
    if (sim_is_ordered(conn->sim))
        time = dir->last_delivery = sim_max(time, dir->last_delivery);
    if (!t->taken && !sim_still_registered(t))
        t->fail = true;
    sim_note(conn->sim, time ^ t->length << 8 ^ (uint64_t)t->kind);
    if (t->fail) {
        const char *why = "a local operation failed: injected, or its memory was deregistered";
        sim_end(conn, t->from, time, RMIG_FEV_ERROR, 4, why);
        sim_break(conn, t->from, time, 4, why);
    } else if (t->kind == SIM_TRANSFER_WRITE) {
        sim_deliver_write(t, time);
    } else if (t->kind == SIM_TRANSFER_SEND) {
        sim_deliver_send(t, time);
    } else {
        conn->down[1 - t->from] = true;
        sim_end(conn, 1 - t->from, time, RMIG_FEV_DISCONNECTED, 0, "the peer disconnected");
        sim_end(conn, t->from, time + conn->sim->cfg.latency_ns, RMIG_FEV_DISCONNECTED, 0, "disconnected");
    }
}

static inline bool sim_lacks_receive(const struct sim_transfer *t) {
    const struct sim_ep *ep = t->conn->end[1 - t->from];
    return t->kind == SIM_TRANSFER_SEND && ep != NULL && ep->recv_count == 0 && !t->conn->sim->cfg.no_retry;
}

/* Delivers what has been waiting at the target, in order, as far as it can be. */
static inline void sim_drain(struct sim_conn *conn, unsigned from, uint64_t time) {
    struct sim_dir *dir = &conn->dir[from];
    while (dir->waiting != NULL && dir->waiting->arrival <= time && !sim_lacks_receive(dir->waiting)) {
        struct sim_transfer *t = dir->waiting;
        dir->waiting = t->next;
        sim_deliver(t, time);
        sim_transfer_free(conn->sim, t);
    }
}

static inline void sim_arrive(struct sim_transfer *t, uint64_t time) {
    struct sim_conn *conn = t->conn;
    struct sim *sim = conn->sim;
    struct sim_dir *dir = &conn->dir[t->from];
    t->arrival = time;
    bool behind = dir->waiting != NULL && (sim_is_ordered(sim) || t->kind != SIM_TRANSFER_WRITE);
    if (sim_is_lost(t) || !(behind || sim->cfg.target_must_poll || sim_lacks_receive(t))) {
        sim_deliver(t, time);
        sim_transfer_free(sim, t);
        return;
    }
    t->next = NULL;
    if (dir->waiting == NULL)
        dir->waiting = t;
    else
        dir->waiting_last->next = t;
    dir->waiting_last = t;
}

/* When bytes that begin to leave at `start` have left. */
static inline uint64_t sim_left(const struct sim_config *cfg, uint64_t start, uint64_t bytes) {
    bool changed = cfg->change_ns != 0 && start >= cfg->change_ns;
    uint64_t rate = changed ? cfg->changed_bandwidth : cfg->bandwidth;
    uint64_t end = start + (rate == 0 ? 0 : (uint64_t)((double)bytes / (double)rate * 1e9));
    if (changed || cfg->change_ns == 0 || end <= cfg->change_ns)
        return end;
    uint64_t before = (uint64_t)((double)rate * (double)(cfg->change_ns - start) / 1e9);
    return sim_left(cfg, cfg->change_ns, bytes - sim_min(before, bytes));
}

/* A part of a write is there, and not the last. Behind what waits at the target it waits too. */
static inline void sim_on_part(struct sim_transfer *t, uint64_t time) {
    const struct sim *sim = t->conn->sim;
    uint64_t upto = sim_min(t->landed + t->length / sim->cfg.parts + 1, t->length - 1);
    if (sim_is_lost(t) || t->fail || t->conn->dir[t->from].waiting != NULL || (!t->taken && !sim_still_registered(t)))
        return;
    if (sim_land(t, upto, time) && time + t->part_ns < t->arrival)
        sim_schedule(t->conn->sim, time + t->part_ns, SIM_EV_PART, t->conn, t->from, t);
}

/* Puts a transfer on the wire: when it leaves, when it arrives, when its data is taken. */
static inline void sim_transmit(struct sim_ep *ep, struct sim_transfer *t) {
    struct sim *sim = ep->side->sim;
    const struct sim_config *cfg = &sim->cfg;
    struct sim_dir *dir = &ep->conn->dir[ep->end];
    uint64_t now = ep->side->time, start = now;
    bool queues = sim_is_ordered(sim) || t->kind == SIM_TRANSFER_WRITE;
    if (queues)
        start = sim_max(now, ep->side->link_busy);
    uint64_t left = sim_left(cfg, start, t->length), arrival = left + cfg->latency_ns;
    if (queues)
        ep->side->link_busy = left;
    if (!sim_is_ordered(sim)) {
        arrival += sim_below(sim, cfg->jitter_ns + 1);
        if (t->kind != SIM_TRANSFER_WRITE)
            arrival = dir->last_send = sim_max(arrival, dir->last_send);
    }
    if (t->kind == SIM_TRANSFER_GOODBYE)
        arrival = sim_max(arrival, dir->last_arrival);
    dir->last_arrival = sim_max(arrival, dir->last_arrival);
    /* Half of the writes are read as they land, the others some time before; a send as it leaves. */
    bool early = t->kind == SIM_TRANSFER_SEND || cfg->mode == SIM_LOCAL || sim_below(sim, 2) == 0;
    uint64_t take = t->kind == SIM_TRANSFER_SEND ? start : now + sim_below(sim, left - now + 1);
    if (t->kind != SIM_TRANSFER_GOODBYE && early) {
        if (take <= now)
            sim_take(t);
        else
            sim_schedule(sim, take, SIM_EV_TAKE, ep->conn, ep->end, t);
    }
    if (cfg->mode == SIM_LOCAL)
        sim_schedule(sim, left, SIM_EV_LEFT, ep->conn, ep->end, t);
    t->arrival = arrival;
    t->part_ns = cfg->parts < 2 ? 0 : (left - start) / cfg->parts;
    if (t->kind == SIM_TRANSFER_WRITE && t->part_ns > 0 && !cfg->target_must_poll)
        sim_schedule(sim, arrival - (left - start) + t->part_ns, SIM_EV_PART, ep->conn, ep->end, t);
    sim_schedule(sim, arrival, SIM_EV_ARRIVE, ep->conn, ep->end, t);
}

// >>connections

static inline struct sim_ep *sim_find_listener(struct sim *sim, unsigned port, struct sim_side **side) {
    for (unsigned i = 0; i < sim->cfg.sides; i++) {
        *side = &sim->side[i];
        if (sim->side[i].dead)
            continue;
        for (struct sim_ep *ep = sim->side[i].eps; ep != NULL; ep = ep->next)
            if (ep->conn == NULL && ep->port == port)
                return ep;
    }
    return NULL;
}

/* Private data as the receiver sees it. */
static inline void sim_show_private(const struct sim *sim, struct rmig_fabric_event *e, const uint8_t *data, size_t n,
                                    uint32_t limit) {
    e->private_data = data;
    e->private_data_length = sim->cfg.pad_private_data ? limit : n;
}

static inline void sim_refuse(struct sim_conn *conn, uint64_t time, const char *text) {
    conn->answered = true;
    conn->listener = NULL;
    snprintf(conn->text[0], sizeof conn->text[0], "%s", text);
    sim_schedule(conn->sim, time + conn->sim->cfg.latency_ns, SIM_EV_REJECTED, conn, 0, NULL);
}

static inline void sim_on_request(struct sim_conn *conn, uint64_t time) {
    struct sim_side *side;
    struct sim_ep *listener = sim_find_listener(conn->sim, conn->port, &side);
    struct sim_out *out = listener == NULL ? NULL : sim_push(listener, time, RMIG_FEV_REQUEST, 0);
    if (out == NULL) {
        sim_refuse(conn, time, "connection refused: nobody listens there");
        return;
    }
    conn->listener = listener;
    conn->side[1] = side;
    out->e.request = conn;
    sim_show_private(conn->sim, &out->e, conn->request, conn->request_length, conn->sim->cfg.private_data_request);
}

static inline void sim_on_accepted(struct sim_conn *conn, uint64_t time) {
    struct sim_out *out = sim_push(conn->end[0], time, RMIG_FEV_ESTABLISHED, 0);
    uint64_t back = time + conn->sim->cfg.latency_ns;
    if (out == NULL) {
        if (!conn->side[0]->dead || conn->end[0] == NULL)
            sim_schedule(conn->sim, back, SIM_EV_GONE, conn, 1, NULL);
        return;
    }
    conn->up[0] = true;
    sim_show_private(conn->sim, &out->e, conn->reply, conn->reply_length, conn->sim->cfg.private_data_reply);
    sim_schedule(conn->sim, back, SIM_EV_READY, conn, 1, NULL);
}

/* The peer of `end` has closed its endpoint or died. */
static inline void sim_on_gone(struct sim_conn *conn, unsigned end, uint64_t time) {
    if (conn->end[end] == NULL) {
        conn->abandoned = conn->abandoned || end == 1;
        return;
    }
    sim_drain(conn, 1 - end, time);
    conn->down[end] = true;
    if (conn->up[end])
        sim_end(conn, end, time, RMIG_FEV_DISCONNECTED, 0, "the peer went away");
    else
        sim_end(conn, end, time, RMIG_FEV_ERROR, 104, "the peer went away before the connection was established");
}

static inline void sim_kill_side(struct sim *sim, struct sim_side *side, uint64_t time) {
    if (side->dead)
        return;
    side->dead = true;
    for (struct sim_conn *conn = sim->conns; conn != NULL; conn = conn->next)
        for (unsigned end = 0; end < 2; end++) {
            if (conn->side[end] != side || conn->side[1 - end] == NULL || conn->side[1 - end] == side)
                continue;
            if (end == 1 && !conn->answered)
                sim_refuse(conn, time, "connection refused: the peer died");
            else
                sim_schedule(sim, time + sim->cfg.latency_ns, SIM_EV_GONE, conn, 1 - end, NULL);
        }
}

static inline void sim_happen(struct sim *sim, const struct sim_event *ev) {
    struct sim_conn *conn = ev->conn;
    sim->steps++;
    sim_note(sim, ev->time ^ (uint64_t)ev->kind << 56);
    if (sim->silent && ev->kind != SIM_EV_ARRIVE)
        return;
    switch (ev->kind) {
    case SIM_EV_RESOLVED:
        if (conn->unknown_host)
            sim_end(conn, 0, ev->time, RMIG_FEV_ERROR, 2, "the name of the host cannot be resolved");
        else if (conn->out_of_fds)
            sim_end(conn, 0, ev->time, RMIG_FEV_ERROR, 24, "this end has no descriptor left");
        else
            sim_push(conn->end[0], ev->time, RMIG_FEV_RESOLVED, 0);
        break;
    case SIM_EV_REQUEST:
        sim_on_request(conn, ev->time);
        break;
    case SIM_EV_ACCEPTED:
        sim_on_accepted(conn, ev->time);
        break;
    case SIM_EV_READY:
        conn->up[1] = sim_push(conn->end[1], ev->time, RMIG_FEV_ESTABLISHED, 0) != NULL;
        break;
    case SIM_EV_REJECTED: {
        struct sim_out *out = sim_push(conn->end[0], ev->time, RMIG_FEV_REJECTED, 0);
        if (out == NULL)
            break;
        out->e.text = conn->text[0];
        out->e.provider_code = 28;
        if (conn->reply_length > 0)
            sim_show_private(sim, &out->e, conn->reply, conn->reply_length, sim->cfg.private_data_reply);
        conn->end[0]->ended = true;
        break;
    }
    case SIM_EV_GONE:
        sim_on_gone(conn, ev->end, ev->time);
        break;
    case SIM_EV_TAKE:
        sim_take(ev->transfer);
        break;
    case SIM_EV_LEFT:
        sim_take(ev->transfer);
        if (!conn->broken && conn->end[ev->end] != NULL && !ev->transfer->fail)
            sim_complete(ev->transfer, ev->time);
        break;
    case SIM_EV_PART:
        sim_on_part(ev->transfer, ev->time);
        break;
    case SIM_EV_ARRIVE:
        sim_arrive(ev->transfer, ev->time);
        break;
    case SIM_EV_RESUME:
        conn->dir[1 - ev->end].resuming = false;
        sim_drain(conn, 1 - ev->end, ev->time);
        break;
    case SIM_EV_FAULT:
        if (sim->cfg.faults[ev->end].kind == SIM_FAULT_SILENCE)
            sim->silent = true;
        else
            sim_kill_side(sim, &sim->side[sim->cfg.faults[ev->end].side], ev->time);
        break;
    }
}

static inline void sim_catch_up(struct sim *sim, uint64_t time) {
    while (sim->heap_count > 0 && sim->heap[0].time <= time) {
        struct sim_event ev = sim_next(sim);
        sim_happen(sim, &ev);
    }
}

// >>faults

static inline const char *sim_op_name(enum sim_op op) {
    static const char *const names[SIM_OP_COUNT] = {"open",   "listen", "open_request", "reject", "connect",
                                                    "accept", "reg",    "dereg",        "recv",   "send",
                                                    "write",  "poll",   "wait",         "revoke"};
    return names[op];
}

static inline bool sim_fault_fits(enum sim_fault_kind kind, enum sim_op op) {
    bool transfer = op == SIM_SEND || op == SIM_RECV || op == SIM_WRITE;
    return kind == SIM_FAULT_FULL || kind == SIM_FAULT_COMPLETION ? transfer : true;
}

static inline enum sim_fault_kind sim_random_fault(struct sim *sim, enum sim_op op) {
    if (sim->cfg.random_per_million == 0 || sim->random_faults >= sim->cfg.random_max ||
        sim_below(sim, 1000000) >= sim->cfg.random_per_million)
        return SIM_NO_FAULT;
    enum sim_fault_kind kind = (enum sim_fault_kind)(1 + sim_below(sim, SIM_FAULT_KINDS - 1));
    if ((sim->cfg.random_kinds >> kind & 1) == 0 || !sim_fault_fits(kind, op))
        return SIM_NO_FAULT;
    sim->random_faults++;
    return kind;
}

/* Counts an operation, and says whether it is to fail, and how. Death and silence have happened when this returns. */
static inline enum sim_fault_kind sim_inject(struct sim_side *side, enum sim_op op) {
    struct sim *sim = side->sim;
    uint64_t nth = ++side->stats.ops[op];
    enum sim_fault_kind kind = sim_random_fault(sim, op);
    for (unsigned i = 0; i < SIM_FAULTS_MAX; i++) {
        const struct sim_fault *f = &sim->cfg.faults[i];
        bool here = f->side < 0 || (unsigned)f->side == side->index;
        if (f->kind != SIM_NO_FAULT && f->op == op && f->nth == nth && here)
            kind = f->kind;
    }
    if (kind == SIM_NO_FAULT)
        return kind;
    side->stats.faults++;
    if (kind == SIM_FAULT_DEATH)
        sim_kill_side(sim, side, side->time);
    if (kind == SIM_FAULT_SILENCE)
        sim->silent = true;
    return kind;
}

static inline int sim_injected(struct sim_side *side, enum sim_op op, struct rmig_error *err) {
    return rmig_fail(err, RMIG_ERR_FABRIC, 5, "injected: %s number %llu of side %u failed", sim_op_name(op),
                     (unsigned long long)side->stats.ops[op], side->index);
}

// >>operations: endpoints

static inline struct sim_ep *sim_ep_of(struct rmig_ep *ep) { return (struct sim_ep *)ep; }

static inline struct sim_ep *sim_ep_new(struct sim_side *side, struct sim_conn *conn, unsigned end,
                                        const struct rmig_ep_config *want) {
    const struct sim_config *cfg = &side->sim->cfg;
    struct sim_ep *ep = sim_grow(NULL, 1, sizeof *ep);
    memset(ep, 0, sizeof *ep);
    ep->base.fabric = &side->fabric;
    ep->side = side;
    ep->conn = conn;
    ep->end = end;
    if (want != NULL) {
        ep->write_depth = cfg->write_depth != 0 ? cfg->write_depth : want->write_depth;
        ep->send_depth = cfg->send_depth != 0 ? cfg->send_depth : want->send_depth;
        ep->recv_depth = cfg->recv_depth != 0 ? cfg->recv_depth : want->recv_depth;
        ep->write_depth = ep->write_depth == 0 ? 1 : ep->write_depth;
        ep->send_depth = ep->send_depth == 0 ? 1 : ep->send_depth;
        ep->recv_depth = ep->recv_depth < 2 ? 2 : ep->recv_depth;
        ep->recv = sim_grow(NULL, ep->recv_depth, sizeof *ep->recv);
    }
    ep->next = side->eps;
    side->eps = ep;
    side->stats.endpoints++;
    return ep;
}

static inline bool sim_port_taken(struct sim *sim, unsigned port) {
    struct sim_side *side;
    return sim_find_listener(sim, port, &side) != NULL;
}

static inline int sim_op_listen(struct rmig_fabric *f, const char *address, struct rmig_ep **out,
                                struct rmig_error *err) {
    struct sim_side *side = (struct sim_side *)f;
    char host[64], port[8];
    *out = NULL;
    int status = rmig_split_address(address, host, sizeof host, port, sizeof port, err);
    if (status != RMIG_OK)
        return status;
    if (sim_inject(side, SIM_LISTEN) == SIM_FAULT_ERROR)
        return sim_injected(side, SIM_LISTEN, err);
    unsigned number = (unsigned)strtoul(port, NULL, 10);
    if (number != 0 && sim_port_taken(side->sim, number))
        return rmig_fail(err, RMIG_ERR_FABRIC, 98, "cannot listen on \"%.80s\": the port is in use", address);
    while (number == 0 || sim_port_taken(side->sim, number))
        number = side->sim->next_port++;
    struct sim_ep *ep = sim_ep_new(side, NULL, 1, NULL);
    memcpy(ep->host, host, sizeof ep->host);
    ep->port = number;
    ep->phase = SIM_LISTENING;
    *out = &ep->base;
    return RMIG_OK;
}

static inline int sim_op_address(struct rmig_ep *listener, char *buf, size_t n, struct rmig_error *err) {
    struct sim_ep *ep = sim_ep_of(listener);
    if (ep->conn != NULL && ep->end == 1)
        return rmig_fail(err, RMIG_ERR_STATE, 0, "address: the endpoint was opened from a request");
    char host_at_hand[64];
    snprintf(host_at_hand, sizeof host_at_hand, "%.*s", (int)strcspn(ep->host, "+"), ep->host);
    const char *host = host_at_hand;
    if (host[0] == '\0' || strcmp(host, "0.0.0.0") == 0 || strcmp(host, "::") == 0)
        host = "sim";
    bool v6 = strchr(host, ':') != NULL;
    int length = snprintf(buf, n, "%s%s%s:%u", v6 ? "[" : "", host, v6 ? "]" : "", ep->port);
    if ((size_t)length >= n)
        return rmig_fail(err, RMIG_ERR_ARGUMENT, 0, "address: %zu bytes are too few for %d", n, length + 1);
    return RMIG_OK;
}

/* Makes the connection's end for the first of ep->host. */
static inline void sim_begin(struct sim_ep *ep) {
    struct sim *sim = ep->side->sim;
    struct sim_conn *conn = sim_grow(NULL, 1, sizeof *conn);
    memset(conn, 0, sizeof *conn);
    conn->sim = sim;
    conn->side[0] = ep->side;
    conn->end[0] = ep;
    conn->port = ep->port;
    conn->next = sim->conns;
    sim->conns = conn;
    ep->conn = conn;
    ep->phase = SIM_OPENING;
    size_t n = strcspn(ep->host, "+");
    conn->unknown_host = n >= 8 && strncmp(ep->host + n - 8, ".invalid", 8) == 0;
    conn->out_of_fds = n >= 5 && strncmp(ep->host + n - 5, ".full", 5) == 0;
    conn->dead_host = n >= 5 && strncmp(ep->host + n - 5, ".dead", 5) == 0;
    sim_schedule(sim, ep->side->time + sim->cfg.latency_ns, SIM_EV_RESOLVED, conn, 0, NULL);
}

static inline int sim_op_open(struct rmig_fabric *f, const char *address, const struct rmig_ep_config *want,
                              struct rmig_ep **out, struct rmig_error *err) {
    struct sim_side *side = (struct sim_side *)f;
    char host[64], port[8];
    *out = NULL;
    int status = rmig_split_address(address, host, sizeof host, port, sizeof port, err);
    if (status != RMIG_OK)
        return status;
    if (port[0] == '\0' || strcmp(port, "0") == 0)
        return rmig_fail(err, RMIG_ERR_ARGUMENT, 0, "address \"%.80s\": a port from 1 to 65535 is needed", address);
    enum sim_fault_kind fault = sim_inject(side, SIM_OPEN);
    if (fault == SIM_FAULT_ERROR)
        return sim_injected(side, SIM_OPEN, err);
    struct sim_ep *ep = sim_ep_new(side, NULL, 0, want);
    memcpy(ep->host, host, sizeof ep->host);
    ep->port = (unsigned)strtoul(port, NULL, 10);
    for (const char *p = host; *p != '\0'; p++)
        ep->base.others += *p == '+';
    sim_begin(ep);
    *out = &ep->base;
    return RMIG_OK;
}

static inline int sim_check_private(const uint8_t *data, size_t n, uint32_t limit, struct rmig_error *err) {
    if (n > limit || (data == NULL && n > 0))
        return rmig_fail(err, RMIG_ERR_ARGUMENT, 0, "private data of %zu bytes: must be 0 to %u", n, limit);
    return RMIG_OK;
}

static inline int sim_misuse(struct sim_ep *ep, const char *op, struct rmig_error *err) {
    sim_violate(ep->side->sim, "%s in a state of the endpoint where it is not allowed (phase %d)", op, (int)ep->phase);
    return rmig_fail(err, RMIG_ERR_STATE, 0, "%s: not in this state of the endpoint", op);
}

/* A request that the listener yielded and that nobody has used up. */
static inline struct sim_conn *sim_request(struct sim_ep *listener, void *request) {
    struct sim_conn *conn = listener->side->sim->conns;
    while (conn != NULL && (conn != request || conn->listener != listener))
        conn = conn->next;
    if (conn == NULL && !listener->side->dead)
        sim_violate(listener->side->sim, "a request that this listener does not have, or that was used up before");
    return conn;
}

static inline int sim_op_open_request(struct rmig_ep *listener, void *request, const struct rmig_ep_config *want,
                                      struct rmig_ep **out, struct rmig_error *err) {
    struct sim_ep *from = sim_ep_of(listener);
    *out = NULL;
    struct sim_conn *conn = sim_request(from, request);
    if (conn == NULL)
        return rmig_fail(err, RMIG_ERR_ARGUMENT, 0, "open_request: no such request");
    if (sim_inject(from->side, SIM_OPEN_REQUEST) == SIM_FAULT_ERROR)
        return sim_injected(from->side, SIM_OPEN_REQUEST, err);
    conn->listener = NULL;
    struct sim_ep *ep = sim_ep_new(from->side, conn, 1, want);
    ep->phase = SIM_RESOLVED;
    conn->end[1] = ep;
    *out = &ep->base;
    return RMIG_OK;
}

static inline int sim_op_reject(struct rmig_ep *listener, void *request, const uint8_t *data, size_t n,
                                struct rmig_error *err) {
    struct sim_ep *from = sim_ep_of(listener);
    struct sim_conn *conn = sim_request(from, request);
    if (conn == NULL)
        return rmig_fail(err, RMIG_ERR_ARGUMENT, 0, "reject: no such request");
    int status = sim_check_private(data, n, from->side->sim->cfg.private_data_reply, err);
    if (status != RMIG_OK)
        return status;
    if (sim_inject(from->side, SIM_REJECT) == SIM_FAULT_ERROR)
        return sim_injected(from->side, SIM_REJECT, err);
    if (n > 0)
        memcpy(conn->reply, data, n);
    conn->reply_length = n;
    sim_refuse(conn, from->side->time, "rejected by the peer");
    return RMIG_OK;
}

static inline int sim_op_connect(struct rmig_ep *base, const uint8_t *data, size_t n, struct rmig_error *err) {
    struct sim_ep *ep = sim_ep_of(base);
    struct sim *sim = ep->side->sim;
    if (ep->conn == NULL || ep->cut || ep->end != 0 || (ep->phase != SIM_RESOLVED && ep->phase != SIM_ENDED))
        return sim_misuse(ep, "connect", err);
    int status = sim_check_private(data, n, sim->cfg.private_data_request, err);
    if (status != RMIG_OK)
        return status;
    enum sim_fault_kind fault = sim_inject(ep->side, SIM_CONNECT);
    if (fault == SIM_FAULT_ERROR)
        return sim_injected(ep->side, SIM_CONNECT, err);
    if (ep->phase == SIM_ENDED)
        return rmig_fail(err, RMIG_ERR_FABRIC, 0, "connect: the endpoint has failed: %s", ep->conn->text[0]);
    if (n > 0)
        memcpy(ep->conn->request, data, n);
    ep->conn->request_length = n;
    ep->conn->asked = true;
    ep->phase = SIM_CONNECTING;
    if (!ep->side->dead && !ep->conn->dead_host)
        sim_schedule(sim, ep->side->time + sim->cfg.latency_ns, SIM_EV_REQUEST, ep->conn, 1, NULL);
    return RMIG_OK;
}

static inline int sim_op_accept(struct rmig_ep *base, const uint8_t *data, size_t n, struct rmig_error *err) {
    struct sim_ep *ep = sim_ep_of(base);
    struct sim *sim = ep->side->sim;
    if (ep->conn == NULL || ep->cut || ep->end != 1 || (ep->phase != SIM_RESOLVED && ep->phase != SIM_ENDED))
        return sim_misuse(ep, "accept", err);
    int status = sim_check_private(data, n, sim->cfg.private_data_reply, err);
    if (status != RMIG_OK)
        return status;
    enum sim_fault_kind fault = sim_inject(ep->side, SIM_ACCEPT);
    if (fault == SIM_FAULT_ERROR)
        return sim_injected(ep->side, SIM_ACCEPT, err);
    if (n > 0)
        memcpy(ep->conn->reply, data, n);
    ep->conn->reply_length = n;
    ep->conn->answered = true;
    if (ep->phase == SIM_ENDED)
        return rmig_fail(err, RMIG_ERR_FABRIC, 0, "accept: the request is gone");
    ep->phase = SIM_CONNECTING;
    if (ep->conn->abandoned)
        sim_end(ep->conn, 1, ep->side->time + 2 * sim->cfg.latency_ns, RMIG_FEV_ERROR, 104, "the peer gave up");
    else if (!ep->side->dead)
        sim_schedule(sim, ep->side->time + sim->cfg.latency_ns, SIM_EV_ACCEPTED, ep->conn, 0, NULL);
    return RMIG_OK;
}

static inline void sim_op_disconnect(struct rmig_ep *base) {
    struct sim_ep *ep = sim_ep_of(base);
    if (ep->cut)
        sim_misuse(ep, "disconnect after cut", NULL);
    if (ep->conn == NULL || ep->disconnecting || ep->ended || ep->side->dead || !ep->conn->up[ep->end])
        return;
    ep->disconnecting = true;
    sim_transmit(ep, sim_transfer_new(ep, SIM_TRANSFER_GOODBYE));
}

/* Requests that nobody answered go with their listener. */
static inline void sim_close_listener(struct sim_ep *ep) {
    for (struct sim_conn *conn = ep->side->sim->conns; conn != NULL; conn = conn->next)
        if (conn->listener == ep)
            sim_refuse(conn, ep->side->time, "connection refused: the listener was closed");
}

/* Tells the peer that this end is no more. */
static inline void sim_leave(struct sim_ep *ep) {
    struct sim_conn *conn = ep->conn;
    struct sim *sim = ep->side->sim;
    if (ep->end == 1 && !conn->answered)
        sim_refuse(conn, ep->side->time, "connection refused: the peer closed it");
    else if ((ep->end == 1 || conn->asked) && !ep->side->dead) {
        uint64_t time = ep->side->time + sim->cfg.latency_ns;
        if (ep->disconnecting && !ep->cut)
            time = sim_max(time, conn->dir[ep->end].last_arrival);
        sim_schedule(sim, time, SIM_EV_GONE, conn, 1 - ep->end, NULL);
    }
}

static inline void sim_close_connection(struct sim_ep *ep) {
    ep->conn->end[ep->end] = NULL;
    if (!ep->cut)
        sim_leave(ep);
}

/* What has left this end may still reach the peer; nothing reaches this end. */
static inline void sim_op_cut(struct rmig_ep *base) {
    struct sim_ep *ep = sim_ep_of(base);
    if (ep->conn == NULL)
        sim_violate(ep->side->sim, "cut of a listener");
    if (ep->conn == NULL || ep->cut)
        return;
    ep->cut = ep->ended = true;
    ep->conn->down[ep->end] = true;
    ep->out_head = ep->out_count = 0;
    ep->side->stats.cuts++;
    sim_leave(ep);
}

static inline void sim_forget_regions(struct sim_ep *ep) {
    struct sim_side *side = ep->side;
    for (uint32_t i = 0; i < side->region_count; i++)
        if (side->regions[i].live && side->regions[i].ep == ep) {
            sim_violate(side->sim, "side %u closes an endpoint with a region of %llu bytes still registered",
                        side->index, (unsigned long long)side->regions[i].length);
            side->regions[i].live = false;
        }
}

static inline void sim_op_close(struct rmig_ep *base) {
    struct sim_ep *ep = sim_ep_of(base);
    struct sim_side *side = ep->side;
    struct sim_ep **at = &side->eps;
    while (*at != ep)
        at = &(*at)->next;
    *at = ep->next;
    side->stats.endpoints--;
    sim_forget_regions(ep);
    if (ep->conn == NULL)
        sim_close_listener(ep);
    else
        sim_close_connection(ep);
    free(ep->out);
    free(ep->recv);
    free(ep);
}

static inline void sim_op_next(struct rmig_ep *base) {
    struct sim_ep *ep = sim_ep_of(base);
    if (ep->conn == NULL || ep->end != 0 || ep->cut || ep->conn->up[0] || base->others == 0) {
        sim_misuse(ep, "next", NULL);
        return;
    }
    sim_forget_regions(ep);
    sim_close_connection(ep);
    ep->out_head = ep->out_count = 0;
    ep->recv_head = ep->recv_count = 0;
    ep->writes = ep->sends = ep->recvs = ep->coming = 0;
    ep->ended = ep->disconnecting = false;
    base->others--;
    memmove(ep->host, strchr(ep->host, '+') + 1, strlen(strchr(ep->host, '+')));
    sim_begin(ep);
}

static inline int sim_op_caps(struct rmig_ep *base, struct rmig_fabric_caps *caps, struct rmig_error *err) {
    struct sim_ep *ep = sim_ep_of(base);
    const struct sim_config *cfg = &ep->side->sim->cfg;
    if (ep->conn == NULL || ep->cut || ep->phase < SIM_RESOLVED)
        return sim_misuse(ep, "caps", err);
    memset(caps, 0, sizeof *caps);
    caps->write_max = cfg->write_max;
    caps->registration_max = cfg->registration_max;
    caps->write_depth = ep->write_depth;
    caps->send_depth = ep->send_depth;
    caps->recv_depth = ep->recv_depth;
    caps->private_data_request = cfg->private_data_request;
    caps->private_data_reply = cfg->private_data_reply;
    caps->key_bits = cfg->key_bits;
    caps->sends_after_writes = cfg->mode != SIM_UNORDERED;
    caps->completion_is_delivery = cfg->mode != SIM_LOCAL;
    caps->writes_in_order = cfg->mode != SIM_UNORDERED;
    caps->local_mr = cfg->local_mr;
    caps->offset_addressing = cfg->offset_addressing;
    caps->target_must_poll = cfg->target_must_poll;
    caps->revokes = cfg->revokes;
    return RMIG_OK;
}

// >>operations: memory

static inline uint64_t sim_cost(uint64_t call, uint64_t mib, uint64_t bytes) {
    return call + (uint64_t)((double)mib * (double)bytes / (double)RMIG_MIB);
}

static inline struct sim_region *sim_region_new(struct sim_side *side, uint32_t *slot) {
    if (side->region_free != 0) {
        *slot = side->region_free;
        side->region_free = side->regions[*slot - 1].next_free;
        return &side->regions[*slot - 1];
    }
    if (side->region_count == 0xfffff)
        return NULL;
    if (side->region_count == side->region_cap) {
        side->region_cap = side->region_cap == 0 ? 64 : 2 * side->region_cap;
        side->regions = sim_grow(side->regions, side->region_cap, sizeof *side->regions);
    }
    *slot = ++side->region_count;
    struct sim_region *r = &side->regions[*slot - 1];
    memset(r, 0, sizeof *r);
    return r;
}

static inline int sim_op_reg(struct rmig_ep *base, void *address, uint64_t length, unsigned access, struct rmig_mr *mr,
                             struct rmig_error *err) {
    struct sim_ep *ep = sim_ep_of(base);
    struct sim_side *side = ep->side;
    const struct sim_config *cfg = &side->sim->cfg;
    if (ep->conn == NULL || ep->cut || ep->phase < SIM_RESOLVED)
        return sim_misuse(ep, "reg", err);
    if (length == 0 || length > cfg->registration_max || access == 0 || access > 7) {
        sim_violate(side->sim, "registration of %llu bytes, access %u", (unsigned long long)length, access);
        return rmig_fail(err, RMIG_ERR_ARGUMENT, 0,
                         "registration of %llu bytes with access %u: must be 1 to %llu, 1 to 7",
                         (unsigned long long)length, access, (unsigned long long)cfg->registration_max);
    }
    side->time += sim_cost(cfg->cpu[side->index].reg_call, cfg->cpu[side->index].reg_mib, length);
    if (sim_inject(side, SIM_REG) == SIM_FAULT_ERROR)
        return sim_injected(side, SIM_REG, err);
    if (length > cfg->registered_max - side->stats.registered)
        return rmig_fail(err, RMIG_ERR_FABRIC, 12, "cannot register %llu bytes: %llu of at most %llu are registered",
                         (unsigned long long)length, (unsigned long long)side->stats.registered,
                         (unsigned long long)cfg->registered_max);
    uint32_t slot;
    struct sim_region *r = sim_region_new(side, &slot);
    if (r == NULL)
        return rmig_fail(err, RMIG_ERR_FABRIC, 12, "no more than %d regions", 0xfffff);
    do
        r->generation++;
    while (sim_key(side, slot, r->generation) == 0);
    r->live = true;
    r->ep = ep;
    r->address = (uint8_t *)address;
    r->length = length;
    r->access = access;
    side->stats.regions++;
    side->stats.registered += length;
    side->stats.regions_peak = sim_max(side->stats.regions_peak, side->stats.regions);
    side->stats.registered_peak = sim_max(side->stats.registered_peak, side->stats.registered);
    mr->handle = mr->desc = (void *)(uintptr_t)((uint64_t)r->generation << 20 | slot);
    mr->key = sim_key(side, slot, r->generation);
    mr->remote_address = cfg->offset_addressing ? 0 : (uint64_t)(uintptr_t)address;
    return RMIG_OK;
}

static inline int sim_op_dereg(struct rmig_ep *base, struct rmig_mr *mr, struct rmig_error *err) {
    struct sim_ep *ep = sim_ep_of(base);
    struct sim_side *side = ep->side;
    const struct sim_cpu *cpu = &side->sim->cfg.cpu[side->index];
    struct sim_region *r = sim_region_by_handle(side, mr->handle);
    if (r == NULL || r->ep != ep) {
        sim_violate(side->sim, "side %u deregisters what is not registered", side->index);
        return rmig_fail(err, RMIG_ERR_ARGUMENT, 0, "dereg: not a live region of this endpoint");
    }
    enum sim_fault_kind fault = sim_inject(side, SIM_DEREG);
    side->time += sim_cost(cpu->dereg_call, cpu->dereg_mib, r->length);
    r->live = false;
    r->next_free = side->region_free;
    side->region_free = (uint32_t)(r - side->regions) + 1;
    side->stats.regions--;
    side->stats.registered -= r->length;
    return fault == SIM_FAULT_ERROR ? sim_injected(side, SIM_DEREG, err) : RMIG_OK;
}

static inline int sim_op_revoke(struct rmig_ep *base, struct rmig_error *err) {
    struct sim_ep *ep = sim_ep_of(base);
    if (!ep->side->sim->cfg.revokes || ep->conn == NULL || ep->cut || ep->phase < SIM_UP)
        return sim_misuse(ep, "revoke", err);
    if (sim_inject(ep->side, SIM_REVOKE) == SIM_FAULT_ERROR)
        return sim_injected(ep->side, SIM_REVOKE, err);
    if (ep->phase == SIM_ENDED)
        return rmig_fail(err, RMIG_ERR_PEER_GONE, 107, "revoke: the connection is over: %s", ep->conn->text[ep->end]);
    ep->revoked = true;
    return RMIG_OK;
}

// >>operations: transfers

/* Whether the endpoint can take work at all: RMIG_OK, or why not. */
static inline int sim_can_post(struct sim_ep *ep, enum sim_op op, struct rmig_error *err) {
    enum sim_phase from = op == SIM_RECV ? SIM_RESOLVED : SIM_UP;
    if (ep->conn == NULL || ep->cut || ep->phase < from)
        return sim_misuse(ep, sim_op_name(op), err);
    if (ep->phase == SIM_ENDED || ep->disconnecting)
        return rmig_fail(err, RMIG_ERR_FABRIC, 107, "%s: the connection is over: %s", sim_op_name(op),
                         ep->disconnecting ? "disconnected" : ep->conn->text[ep->end]);
    return RMIG_OK;
}

static inline int sim_check_local(struct sim_ep *ep, enum sim_op op, const void *p, uint64_t n,
                                  const struct rmig_mr *mr, struct rmig_error *err) {
    if (!ep->side->sim->cfg.local_mr || n == 0)
        return RMIG_OK;
    const char *why = sim_local_fault(ep, p, n, mr, op == SIM_RECV ? RMIG_ACCESS_LOCAL_WRITE : RMIG_ACCESS_LOCAL_READ);
    if (why == NULL)
        return RMIG_OK;
    sim_violate(ep->side->sim, "%s of %llu bytes: %s", sim_op_name(op), (unsigned long long)n, why);
    return rmig_fail(err, RMIG_ERR_ARGUMENT, 0, "%s: the buffer must lie in its region: %s", sim_op_name(op), why);
}

static inline int sim_op_recv(struct rmig_ep *base, void *buf, uint64_t n, const struct rmig_mr *mr, uint64_t id,
                              struct rmig_error *err) {
    struct sim_ep *ep = sim_ep_of(base);
    struct sim_side *side = ep->side;
    int status = sim_can_post(ep, SIM_RECV, err);
    if (status == RMIG_OK)
        status = sim_check_local(ep, SIM_RECV, buf, n, mr, err);
    if (status != RMIG_OK)
        return status;
    enum sim_fault_kind fault = sim_inject(side, SIM_RECV);
    if (fault == SIM_FAULT_ERROR)
        return sim_injected(side, SIM_RECV, err);
    if (ep->recvs == ep->recv_depth || fault == SIM_FAULT_FULL)
        return rmig_fail(err, RMIG_ERR_FULL, 0, "%u receives are outstanding, at most %u", ep->recvs, ep->recv_depth);
    side->time += side->sim->cfg.cpu[side->index].post;
    struct sim_recv *r = &ep->recv[(ep->recv_head + ep->recv_count) % ep->recv_depth];
    memset(r, 0, sizeof *r);
    r->buf = buf;
    r->n = n;
    r->id = id;
    r->fail = fault == SIM_FAULT_COMPLETION;
    r->has_mr = mr != NULL;
    if (mr != NULL)
        r->mr = *mr;
    ep->recv_count++;
    ep->recvs++;
    struct sim_dir *dir = &ep->conn->dir[1 - ep->end];
    if (dir->waiting != NULL && !dir->resuming && !side->sim->cfg.target_must_poll) {
        dir->resuming = true;
        sim_schedule(side->sim, side->time + side->sim->cfg.latency_ns, SIM_EV_RESUME, ep->conn, ep->end, NULL);
    }
    return RMIG_OK;
}

static inline void sim_transfer_fill(struct sim_transfer *t, const void *local, uint64_t length,
                                     const struct rmig_mr *mr, uint64_t id, bool signal) {
    t->local = (const uint8_t *)local;
    t->length = length;
    t->id = id;
    t->signal = signal;
    t->has_mr = mr != NULL;
    if (mr != NULL)
        t->mr = *mr;
}

static inline int sim_op_send(struct rmig_ep *base, const void *buf, uint64_t n, const struct rmig_mr *mr, uint64_t id,
                              struct rmig_error *err) {
    struct sim_ep *ep = sim_ep_of(base);
    struct sim_side *side = ep->side;
    int status = sim_can_post(ep, SIM_SEND, err);
    if (status == RMIG_OK)
        status = sim_check_local(ep, SIM_SEND, buf, n, mr, err);
    if (status != RMIG_OK)
        return status;
    enum sim_fault_kind fault = sim_inject(side, SIM_SEND);
    if (fault == SIM_FAULT_ERROR)
        return sim_injected(side, SIM_SEND, err);
    if (ep->sends == ep->send_depth || (fault == SIM_FAULT_FULL && ep->coming > 0))
        return rmig_fail(err, RMIG_ERR_FULL, 0, "%u sends are outstanding, at most %u", ep->sends, ep->send_depth);
    side->time += side->sim->cfg.cpu[side->index].post;
    ep->sends++;
    ep->coming++;
    struct sim_transfer *t = sim_transfer_new(ep, SIM_TRANSFER_SEND);
    sim_transfer_fill(t, buf, n, mr, id, true);
    t->fail = fault == SIM_FAULT_COMPLETION;
    sim_transmit(ep, t);
    return RMIG_OK;
}

static inline int sim_check_write(struct sim_ep *ep, const struct rmig_write *w, struct rmig_error *err) {
    struct sim *sim = ep->side->sim;
    if (w->length == 0 || w->length > sim->cfg.write_max) {
        sim_violate(sim, "write of %llu bytes", (unsigned long long)w->length);
        return rmig_fail(err, RMIG_ERR_ARGUMENT, 0, "write of %llu bytes: must be 1 to %llu",
                         (unsigned long long)w->length, (unsigned long long)sim->cfg.write_max);
    }
    return sim_check_local(ep, SIM_WRITE, w->local, w->length, w->mr, err);
}

static inline int sim_op_write(struct rmig_ep *base, const struct rmig_write *writes, size_t n,
                               struct rmig_error *err) {
    struct sim_ep *ep = sim_ep_of(base);
    struct sim_side *side = ep->side;
    struct sim *sim = side->sim;
    int taken = 0, status = sim_can_post(ep, SIM_WRITE, err);
    if (status != RMIG_OK)
        return status;
    side->time += sim->cfg.cpu[side->index].post;
    side->stats.batches++;
    for (size_t i = 0; i < n && ep->writes < ep->write_depth; i++, taken++) {
        const struct rmig_write *w = &writes[i];
        status = sim_check_write(ep, w, err);
        if (status != RMIG_OK)
            return status;
        enum sim_fault_kind fault = sim_inject(side, SIM_WRITE);
        if (fault == SIM_FAULT_ERROR)
            return sim_injected(side, SIM_WRITE, err);
        if (fault == SIM_FAULT_FULL && ep->coming > 0) // otherwise nothing would tell that there is room again
            break;
        struct sim_transfer *t = sim_transfer_new(ep, SIM_TRANSFER_WRITE);
        bool extra = sim->cfg.extra_completions && sim_below(sim, 8) == 0;
        sim_transfer_fill(t, w->local, w->length, w->mr, w->id, w->signal || extra);
        t->remote_address = w->remote_address;
        t->key = w->key;
        t->fail = fault == SIM_FAULT_COMPLETION;
        ep->writes++;
        side->stats.writes++;
        ep->coming += t->signal || !sim_is_ordered(sim) ? 1 : 0;
        sim_transmit(ep, t);
    }
    return taken;
}

// >>operations: events and time

/* When poll on the endpoint has something: the time, or RMIG_FOREVER. */
static inline uint64_t sim_ep_next(const struct sim_ep *ep) {
    uint64_t next = ep->out_head < ep->out_count ? ep->out[ep->out_head].time : RMIG_FOREVER;
    if (ep->conn == NULL || ep->cut || !ep->side->sim->cfg.target_must_poll || ep->side->dead || ep->side->sim->silent)
        return next;
    const struct sim_transfer *t = ep->conn->dir[1 - ep->end].waiting;
    return t == NULL || sim_lacks_receive(t) ? next : sim_min(next, t->arrival);
}

static inline void sim_told(struct sim_ep *ep, const struct sim_out *out) {
    switch (out->e.type) {
    case RMIG_FEV_RESOLVED:
        ep->phase = SIM_RESOLVED;
        break;
    case RMIG_FEV_ESTABLISHED:
        ep->phase = SIM_UP;
        break;
    case RMIG_FEV_REJECTED:
    case RMIG_FEV_DISCONNECTED:
    case RMIG_FEV_ERROR:
        ep->phase = SIM_ENDED;
        break;
    case RMIG_FEV_SEND:
        ep->sends--;
        ep->coming--;
        break;
    case RMIG_FEV_RECV:
        ep->recvs--;
        break;
    case RMIG_FEV_WRITE:
        ep->writes -= (uint32_t)out->covers;
        ep->coming--;
        break;
    case RMIG_FEV_REQUEST:
        break;
    }
}

static inline int sim_op_fds(struct rmig_ep *base, struct rmig_fd *fds, size_t n, bool *ready, struct rmig_error *err) {
    (void)fds, (void)n;
    struct sim_ep *ep = sim_ep_of(base);
    if (ep->cut)
        return sim_misuse(ep, "fds after cut", err);
    sim_catch_up(ep->side->sim, ep->side->time);
    *ready = sim_ep_next(ep) <= ep->side->time;
    return 0;
}

static inline uint64_t sim_op_now(struct rmig_fabric *f) { return ((struct sim_side *)f)->time; }

/* When the actor of a side would run. */
static inline uint64_t sim_wake(const struct sim_side *side) {
    uint64_t next = side->deadline;
    for (const struct sim_ep *ep = side->eps; ep != NULL; ep = ep->next)
        next = sim_min(next, sim_ep_next(ep));
    return sim_max(side->time, next);
}

static inline struct sim_side *sim_pick(struct sim *sim, uint64_t *wake) {
    struct sim_side *pick = NULL;
    *wake = RMIG_FOREVER;
    for (unsigned i = 0; i < sim->cfg.sides; i++) {
        struct sim_side *side = &sim->side[i];
        if (side->step == NULL || side->running || side->done)
            continue;
        uint64_t at = sim_wake(side);
        if (at < *wake || (at == *wake && pick != NULL && side->last_run < pick->last_run)) {
            pick = side;
            *wake = at;
        }
    }
    return pick;
}

static inline void sim_run_step(struct sim *sim, struct sim_side *side, uint64_t wake) {
    side->time = sim_max(side->time, wake);
    side->still = side->time > side->last_wake ? 0 : side->still + 1;
    side->last_wake = side->time;
    side->last_run = ++sim->steps;
    side->stats.steps++;
    side->running = true;
    uint64_t deadline = side->step(side->user, side->time);
    side->running = false;
    side->done = deadline == SIM_DONE;
    side->deadline = deadline;
}

/* Lets the next thing happen that is due not after limit. False: there is none, or the run has become endless. */
static inline bool sim_advance(struct sim *sim, uint64_t limit, struct rmig_error *err) {
    uint64_t wake;
    struct sim_side *side = sim_pick(sim, &wake);
    uint64_t event = sim->heap_count > 0 ? sim->heap[0].time : RMIG_FOREVER;
    uint64_t time = sim_min(wake, event);
    if (time > limit || time == RMIG_FOREVER)
        return false;
    uint64_t still = side == NULL ? 0 : side->still;
    if (still > 100000 || sim->steps > sim->cfg.max_steps) {
        rmig_fail(err, RMIG_ERR_STATE, 0,
                  "endless: %llu steps, the last %llu of side %u without time passing, at %llu ns",
                  (unsigned long long)sim->steps, (unsigned long long)still, side == NULL ? 0 : side->index,
                  (unsigned long long)time);
        return false;
    }
    if (event <= wake) {
        struct sim_event ev = sim_next(sim);
        sim_happen(sim, &ev);
    } else {
        sim_run_step(sim, side, wake);
    }
    return true;
}

/* While this side was busy the others were too: lets them come up to its time. */
static inline void sim_let_others(struct sim_side *side) {
    bool was_running = side->running;
    side->running = true;
    while (sim_advance(side->sim, side->time, NULL)) {
    }
    side->running = was_running;
}

static inline int sim_op_poll(struct rmig_ep *base, struct rmig_fabric_event *events, size_t n,
                              struct rmig_error *err) {
    struct sim_ep *ep = sim_ep_of(base);
    struct sim_side *side = ep->side;
    if (ep->cut)
        return sim_misuse(ep, "poll after cut", err);
    side->time += side->sim->cfg.cpu[side->index].poll;
    if (sim_inject(side, SIM_POLL) == SIM_FAULT_ERROR)
        return sim_injected(side, SIM_POLL, err);
    sim_let_others(side);
    if (ep->conn != NULL && side->sim->cfg.target_must_poll && !side->dead)
        sim_drain(ep->conn, 1 - ep->end, side->time);
    int got = 0;
    while ((size_t)got < n && ep->out_head < ep->out_count && ep->out[ep->out_head].time <= side->time) {
        const struct sim_out *out = &ep->out[ep->out_head++];
        sim_told(ep, out);
        if (out->hidden)
            continue;
        events[got] = out->e;
        bool early = out->e.type == RMIG_FEV_ERROR && ep->conn != NULL && !ep->conn->up[ep->end];
        if (side->sim->cfg.stray_at_this_end && !early)
            events[got].at_this_end = true;
        got++;
        sim_note(side->sim, side->time ^ (uint64_t)out->e.type << 48 ^ out->e.id << 16);
    }
    return got;
}

static inline int sim_op_wait(struct rmig_fabric *f, struct rmig_ep *const *eps, size_t n, uint64_t deadline,
                              struct rmig_error *err) {
    struct sim_side *side = (struct sim_side *)f;
    if (sim_inject(side, SIM_WAIT) == SIM_FAULT_ERROR)
        return sim_injected(side, SIM_WAIT, err);
    for (size_t i = 0; i < n; i++)
        if (sim_ep_of(eps[i])->cut)
            return sim_misuse(sim_ep_of(eps[i]), "wait after cut", err);
    bool was_running = side->running;
    struct rmig_error why;
    memset(&why, 0, sizeof why);
    side->running = true;
    for (;;) {
        uint64_t limit = deadline;
        for (size_t i = 0; i < n; i++)
            limit = sim_min(limit, sim_ep_next(sim_ep_of(eps[i])));
        if (limit <= side->time || !sim_advance(side->sim, limit, &why)) {
            if (limit != RMIG_FOREVER)
                side->time = sim_max(side->time, limit);
            else if (why.status == RMIG_OK)
                rmig_fail(&why, RMIG_ERR_STATE, 0, "deadlock: side %u waits for ever and nothing will happen",
                          side->index);
            break;
        }
    }
    side->running = was_running;
    if (why.status != RMIG_OK) {
        fprintf(stderr, "sim: %s\n", why.text);
        return rmig_fail(err, why.status, 0, "%s", why.text);
    }
    return RMIG_OK;
}

static inline void sim_op_close_fabric(struct rmig_fabric *f) {
    struct sim_side *side = (struct sim_side *)f;
    if (side->eps != NULL)
        sim_violate(side->sim, "the fabric of side %u is closed with %llu endpoints open", side->index,
                    (unsigned long long)side->stats.endpoints);
    side->open = false;
}

// >>interface

/* A world that works without surprises: 2 us away, 100 Gbit/s, all limits wide, no faults. Registration costs about
   what it does with resident memory. */
static inline void sim_defaults(struct sim_config *cfg, enum sim_mode mode, uint64_t seed) {
    memset(cfg, 0, sizeof *cfg);
    cfg->seed = seed;
    cfg->sides = 2;
    cfg->mode = mode;
    cfg->latency_ns = 2 * SIM_US;
    cfg->jitter_ns = mode == SIM_UNORDERED ? 20 * SIM_US : 0;
    cfg->bandwidth = 12500000000u;
    for (unsigned i = 0; i < SIM_SIDES_MAX; i++) {
        cfg->cpu[i].reg_call = 10 * SIM_US;
        cfg->cpu[i].reg_mib = 50 * SIM_US;
        cfg->cpu[i].dereg_call = 5 * SIM_US;
        cfg->cpu[i].dereg_mib = 30 * SIM_US;
        cfg->cpu[i].post = 100;
        cfg->cpu[i].poll = 50;
    }
    cfg->write_max = (uint64_t)1 << 31;
    cfg->registration_max = (uint64_t)1 << 46;
    cfg->registered_max = (uint64_t)1 << 62;
    cfg->private_data_request = 56;
    cfg->private_data_reply = 196;
    cfg->key_bits = mode == SIM_UNORDERED ? 64 : 32;
    cfg->local_mr = true;
    cfg->revokes = true;
    cfg->random_max = 1;
    cfg->max_steps = 100000000;
}

/* A world for random tests: everything that fabrics may differ in is drawn from the seed. Faults are left to the
   caller. */
static inline void sim_vary(struct sim_config *cfg, uint64_t seed) {
    struct sim dice;
    memset(&dice, 0, sizeof dice);
    dice.random = seed ^ 0x5851f42d4c957f2du;
    sim_defaults(cfg, (enum sim_mode)sim_below(&dice, 3), seed);
    cfg->latency_ns = (uint64_t)1 << (6 + sim_below(&dice, 14)); // 64 ns to 0.5 ms
    cfg->jitter_ns = cfg->mode == SIM_UNORDERED ? sim_below(&dice, 20 * cfg->latency_ns) : 0;
    cfg->bandwidth = sim_below(&dice, 4) == 0 ? 0 : (uint64_t)1 << (27 + sim_below(&dice, 8));
    for (unsigned i = 0; i < cfg->sides; i++)
        if (sim_below(&dice, 3) == 0) // an emulated adapter
            cfg->cpu[i].reg_mib = 2 * SIM_MS;
    cfg->write_depth = sim_below(&dice, 2) == 0 ? 0 : (uint32_t)(1 + sim_below(&dice, 300));
    cfg->recv_depth = sim_below(&dice, 2) == 0 ? 0 : 64;
    cfg->write_max = (uint64_t)1 << (16 + sim_below(&dice, 16));
    cfg->registration_max = (uint64_t)1 << (30 + sim_below(&dice, 17));
    cfg->private_data_request = (uint32_t)(8 + sim_below(&dice, SIM_PRIVATE_MAX - 7));
    cfg->private_data_reply = (uint32_t)(8 + sim_below(&dice, SIM_PRIVATE_MAX - 7));
    cfg->pad_private_data = sim_below(&dice, 2) == 0;
    cfg->key_bits = sim_below(&dice, 2) == 0 ? 32 : 64;
    cfg->offset_addressing = sim_below(&dice, 2) == 0;
    cfg->local_mr = sim_below(&dice, 2) == 0;
    cfg->target_must_poll = sim_below(&dice, 2) == 0;
    cfg->extra_completions = sim_below(&dice, 2) == 0;
    cfg->revokes = sim_below(&dice, 2) == 0;
    cfg->parts = (uint32_t)sim_below(&dice, 6);
}

static inline void sim_check_config(const struct sim_config *cfg) {
    if (cfg->sides < 2 || cfg->sides > SIM_SIDES_MAX || cfg->private_data_request > SIM_PRIVATE_MAX ||
        cfg->private_data_reply > SIM_PRIVATE_MAX || cfg->key_bits < 32 || cfg->key_bits > 64 || cfg->write_max == 0) {
        fprintf(stderr,
                "sim: sides %u (2 to %d), private data %u and %u (at most %d), key_bits %u (32 to 64), write_max %llu "
                "(at least 1): begin with sim_defaults\n",
                cfg->sides, SIM_SIDES_MAX, cfg->private_data_request, cfg->private_data_reply, SIM_PRIVATE_MAX,
                cfg->key_bits, (unsigned long long)cfg->write_max);
        abort();
    }
    for (unsigned i = 0; i < SIM_FAULTS_MAX; i++) {
        const struct sim_fault *f = &cfg->faults[i];
        bool timed = f->op == SIM_TIME;
        if (f->kind != SIM_NO_FAULT &&
            (f->side >= (int)cfg->sides || (timed && f->kind == SIM_FAULT_DEATH && f->side < 0) ||
             (timed ? f->kind != SIM_FAULT_DEATH && f->kind != SIM_FAULT_SILENCE
                    : f->nth == 0 || !sim_fault_fits(f->kind, f->op)))) {
            fprintf(stderr, "sim: fault %u makes no sense: kind %d, op %d, side %d, nth %llu\n", i, (int)f->kind,
                    (int)f->op, f->side, (unsigned long long)f->nth);
            abort();
        }
    }
}

/* Never NULL. */
static inline struct sim *sim_open(const struct sim_config *cfg) {
    static const struct rmig_fabric_ops ops = {
        .size = sizeof(struct rmig_fabric_ops),
        .name = "sim",
        .close_fabric = sim_op_close_fabric,
        .now = sim_op_now,
        .wait = sim_op_wait,
        .listen = sim_op_listen,
        .address = sim_op_address,
        .open = sim_op_open,
        .open_request = sim_op_open_request,
        .reject = sim_op_reject,
        .connect = sim_op_connect,
        .accept = sim_op_accept,
        .disconnect = sim_op_disconnect,
        .close = sim_op_close,
        .caps = sim_op_caps,
        .reg = sim_op_reg,
        .dereg = sim_op_dereg,
        .recv = sim_op_recv,
        .send = sim_op_send,
        .write = sim_op_write,
        .poll = sim_op_poll,
        .fds = sim_op_fds,
        .revoke = sim_op_revoke,
        .cut = sim_op_cut,
        .next = sim_op_next,
    };
    sim_check_config(cfg);
    struct sim *sim = sim_grow(NULL, 1, sizeof *sim);
    memset(sim, 0, sizeof *sim);
    sim->cfg = *cfg;
    sim->random = cfg->seed;
    sim->next_port = 49152;
    for (unsigned i = 0; i < cfg->sides; i++) {
        struct sim_side *side = &sim->side[i];
        side->fabric.ops = &ops;
        side->sim = sim;
        side->index = i;
        side->open = true;
        side->time = 1000; // a deadline of 0 means at once, so no clock begins there
        side->deadline = 0;
        side->key_secret = sim_random(sim);
    }
    for (unsigned i = 0; i < SIM_FAULTS_MAX; i++)
        if (cfg->faults[i].kind != SIM_NO_FAULT && cfg->faults[i].op == SIM_TIME)
            sim_schedule(sim, cfg->faults[i].nth, SIM_EV_FAULT, NULL, i, NULL);
    return sim;
}

static inline struct rmig_fabric *sim_fabric(struct sim *sim, unsigned side) { return &sim->side[side].fabric; }

/* Gives a side its actor; step is first called at once. NULL takes it away. */
static inline void sim_actor(struct sim *sim, unsigned side, sim_step *step, void *user) {
    sim->side[side].step = step;
    sim->side[side].user = user;
    sim->side[side].deadline = 0;
    sim->side[side].done = false;
}

/* Runs the actors until all are done. RMIG_ERR_TIMEOUT: not by the virtual time `until`; RMIG_ERR_STATE: deadlock,
   nobody would ever wake again, or no end of steps. */
static inline int sim_run(struct sim *sim, uint64_t until, struct rmig_error *err) {
    for (;;) {
        bool busy = false;
        for (unsigned i = 0; i < sim->cfg.sides; i++)
            busy = busy || (sim->side[i].step != NULL && !sim->side[i].done);
        if (!busy)
            return RMIG_OK;
        struct rmig_error why;
        memset(&why, 0, sizeof why);
        if (sim_advance(sim, until, &why))
            continue;
        if (why.status != RMIG_OK)
            return rmig_fail(err, why.status, 0, "%s", why.text);
        uint64_t wake;
        if (sim_pick(sim, &wake) == NULL && sim->heap_count == 0)
            return rmig_fail(err, RMIG_ERR_STATE, 0,
                             "deadlock: no actor would ever wake again; side 0 is at %llu ns, side 1 at %llu ns",
                             (unsigned long long)sim->side[0].time, (unsigned long long)sim->side[1].time);
        return rmig_fail(
            err, RMIG_ERR_TIMEOUT, 0, "not done at virtual time %llu ns; side 0 is at %llu ns, side 1 at %llu ns",
            (unsigned long long)until, (unsigned long long)sim->side[0].time, (unsigned long long)sim->side[1].time);
    }
}

/* Makes CPU time pass on a side: a guest that runs, a device whose state is saved. */
static inline void sim_spend(struct sim *sim, unsigned side, uint64_t ns) { sim->side[side].time += ns; }

/* What struct sim_fault can also be made to do, now: a side's process dies; all falls silent. */
static inline void sim_kill(struct sim *sim, unsigned side) {
    sim_kill_side(sim, &sim->side[side], sim->side[side].time);
}
static inline void sim_silence(struct sim *sim) { sim->silent = true; }

/* Regions of this side that a peer can write now. */
static inline uint64_t sim_exposed(const struct sim *sim, unsigned side) {
    uint64_t n = 0;
    for (uint32_t i = 0; i < sim->side[side].region_count; i++) {
        const struct sim_region *r = &sim->side[side].regions[i];
        n += r->live && (r->access & RMIG_ACCESS_REMOTE_WRITE) != 0 && !r->ep->cut && !r->ep->revoked;
    }
    return n;
}
static inline const struct sim_stats *sim_stats(const struct sim *sim, unsigned side) { return &sim->side[side].stats; }

/* The same for two runs that went the same way. */
static inline uint64_t sim_hash(const struct sim *sim) { return sim->hash; }

/* RMIG_OK when no endpoint and no region is left and nobody has broken the contract; otherwise *err says what. */
static inline int sim_clean(const struct sim *sim, struct rmig_error *err) {
    if (sim->violations > 0)
        return rmig_fail(err, RMIG_ERR_STATE, 0, "the contract was broken %llu times, first: %s",
                         (unsigned long long)sim->violations, sim->violation);
    for (unsigned i = 0; i < sim->cfg.sides; i++) {
        const struct sim_stats *s = &sim->side[i].stats;
        if (s->endpoints != 0 || s->regions != 0)
            return rmig_fail(err, RMIG_ERR_STATE, 0, "side %u leaks: %llu endpoints, %llu regions of %llu bytes", i,
                             (unsigned long long)s->endpoints, (unsigned long long)s->regions,
                             (unsigned long long)s->registered);
    }
    return RMIG_OK;
}

static inline void sim_close(struct sim *sim) {
    if (sim == NULL)
        return;
    for (unsigned i = 0; i < sim->cfg.sides; i++) {
        while (sim->side[i].eps != NULL)
            sim_op_close(&sim->side[i].eps->base);
        free(sim->side[i].regions);
    }
    while (sim->heap_count > 0) {
        struct sim_event ev = sim_next(sim);
        if (ev.kind == SIM_EV_ARRIVE) // each transfer has one
            sim_transfer_free(sim, ev.transfer);
    }
    for (struct sim_conn *conn = sim->conns, *next; conn != NULL; conn = next) {
        next = conn->next;
        for (unsigned end = 0; end < 2; end++)
            for (struct sim_transfer *t = conn->dir[end].waiting, *after; t != NULL; t = after) {
                after = t->next;
                sim_transfer_free(sim, t);
            }
        free(conn);
    }
    for (struct sim_transfer *t = sim->spare, *after; t != NULL; t = after) {
        after = t->next;
        free(t);
    }
    free(sim->heap);
    free(sim);
}

#endif // RMIG_SIM_FABRIC_H
