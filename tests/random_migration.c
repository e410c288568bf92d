/* Whole migrations in the simulator, thousands of seeds: random blocks, contents, parameters, fabrics, ways to save, a
   guest that writes during rounds, and (in one family of seeds) faults. What must hold for every seed:

     - both ends succeed and the sink's RAM and device state equal the source's, or
     - both ends fail, each with an error, within its deadlines; and
     - nothing is leaked, the fabric's contract is kept, no memory is allocated after the first round.

   The one gap that no protocol can close is the last message of the handover; RMIG_ERR_HANDOVER says so.

   RMIG_SEED=n runs one seed of each family with a trace (RMIG_FAMILY=name: of one); RMIG_SEEDS=n that many of each.
   RMIG_SOAK=FILE RMIG_SECONDS=n: seeds one after the other for that long. FILE says the first one, and then always
   which one runs; at the end, the next.
   RMIG_RECORD=FILE: a line for each seed is added to FILE with everything that can be seen of it (tests/record.sh). */
#define _GNU_SOURCE
#include "counted_heap.h"
#include "guest_ram.h"

#define RMIG_IMPLEMENTATION
#include "sim_fabric.h"

#include <criterion/criterion.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <time.h>

#define PAGE 4096u
#define BLOCKS_MAX 6
#define STREAM_MAX 700000
#define ALL_DONE 2 // beside RMIG_OK and RMIG_PENDING
#define STATE_END 0xff // version 1: the last byte of the device state, and no other

struct guest_block {
    char name[32];
    struct rmig_block_desc source, sink;
    uint64_t pages;
    uint64_t *dirty; // the dirty log
    uint32_t sink_index;
};

struct outcome {
    bool done;
    int status; // RMIG_OK or the session's error
    char text[sizeof ((struct rmig_error *)0)->text];
};

struct run {
    uint64_t random;
    struct sim *sim;
    bool faults, fresh_sink, worn;
    struct guest_block block[BLOCKS_MAX];
    unsigned blocks;
    unsigned rounds, round;
    bool extended; // both ends have the extension on
    unsigned writes_per_step; // of the guest, while a round runs
    unsigned zeroes; // percentage of its writes that make a page zero
    uint64_t spend; // ns between rounds

    struct rmig_source *source;
    enum { CONNECTING, BEGIN, IN_ROUND, STREAMING, FINISHING } stage;
    uint64_t allocated; // heap.count after the first round
    uint8_t *state, *got; // device state, sent and received
    size_t state_size, state_at, got_size;
    struct outcome from;

    struct rmig_sink *sink;
    bool blocks_wrong; // the sink answers with a block missing or of another length
    struct outcome to;
};

static uint64_t next_random(struct run *r) {
    uint64_t z = (r->random += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

static uint64_t below(struct run *r, uint64_t n) { return next_random(r) % n; }
static bool chance(struct run *r, unsigned percent) { return below(r, 100) < percent; }
static uint64_t pick(struct run *r, const uint64_t *from, size_t n) { return from[below(r, n)]; }
#define PICK(r, ...) pick(r, (const uint64_t[]){__VA_ARGS__}, sizeof(uint64_t[]){__VA_ARGS__} / sizeof(uint64_t))

// --- the guest

static void guest_write(struct run *r, struct guest_block *b, uint64_t page) {
    uint8_t *p = (uint8_t *)b->source.host + page * PAGE;
    uint64_t size = b->source.length - page * PAGE < PAGE ? b->source.length - page * PAGE : PAGE;
    if (chance(r, r->zeroes)) {
        memset(p, 0, size); // a page may become zero again
    } else {
        for (unsigned i = 0; i < 4; i++)
            p[below(r, size)] = (uint8_t)next_random(r);
    }
    b->dirty[page / 64] |= (uint64_t)1 << (page % 64);
}

static void guest_runs(struct run *r, unsigned writes) {
    for (unsigned i = 0; i < writes; i++) {
        struct guest_block *b = &r->block[below(r, r->blocks)];
        uint64_t page = below(r, b->pages), run = chance(r, 20) ? 1 + below(r, 40) : 1;
        for (; run > 0 && page < b->pages; run--, page++)
            guest_write(r, b, page);
    }
}

/* Hands the dirty log to the source, in one of the three ways, and clears it. */
static int save_dirty(struct run *r, uint32_t index) {
    struct guest_block *b = &r->block[index];
    uint64_t words = (b->pages + 63) / 64, way = below(r, 3);
    int status = RMIG_OK;
    if (way == 0) {
        uint64_t first = 64 * below(r, words), pages;
        while (status == RMIG_OK && first < b->pages) { // in pieces that begin at any word
            pages = rmig__min(b->pages - first, 64 * (1 + below(r, words)));
            status = rmig_source_save_bitmap(r->source, index, b->dirty + first / 64, first, pages);
            first += pages;
        }
        if (status == RMIG_OK)
            status = rmig_source_save_bitmap(r->source, index, b->dirty, 0, b->pages);
    } else {
        uint64_t start = below(r, b->pages); // any order: from the middle, backwards
        for (uint64_t i = 0; i < b->pages && status == RMIG_OK; i++) {
            uint64_t page = (start + b->pages - i) % b->pages;
            if ((b->dirty[page / 64] >> (page % 64) & 1) == 0)
                continue;
            uint64_t offset = page * PAGE;
            if (way == 1)
                status = rmig_source_save_page(r->source, index, offset);
            else
                status = rmig_source_save_range(r->source, index, offset, rmig__min(PAGE, b->source.length - offset));
        }
    }
    memset(b->dirty, 0, words * 8);
    return status;
}

// --- the source's embedder

static uint64_t source_over(struct run *r, int status) {
    r->from.done = true;
    r->from.status = status;
    snprintf(r->from.text, sizeof r->from.text, "%s", status < 0 ? rmig_source_error(r->source)->text : "");
    return SIM_DONE;
}

static int begin_round(struct run *r) {
    int status = rmig_source_begin_round(r->source);
    for (uint32_t i = 0; i < r->blocks && status == RMIG_OK; i++) {
        if (r->round == 0) // nothing is known to be there: everything
            status = rmig_source_save_range(r->source, i, 0, r->block[i].source.length);
        else
            status = save_dirty(r, i);
    }
    return status;
}

/* Moves to the next stage once the operation before is over. */
static int source_next(struct run *r) {
    bool last = r->round + 1 == r->rounds;
    switch (r->stage) {
    case CONNECTING:
    case BEGIN:
        if (r->round == 1)
            r->allocated = heap.count;
        if (!last) // in the last round the guest stands still
            guest_runs(r, (unsigned)below(r, 30));
        sim_spend(r->sim, 0, below(r, r->spend));
        r->stage = IN_ROUND;
        return begin_round(r);
    case IN_ROUND:
        if (!last && chance(r, 60)) {
            guest_runs(r, r->writes_per_step);
            if (chance(r, 50)) { // pages may be saved again while they are on the wire
                int status = save_dirty(r, (uint32_t)below(r, r->blocks));
                if (status != RMIG_OK)
                    return status;
            }
            return chance(r, 50) ? RMIG_PENDING : RMIG_OK;
        }
        r->stage = last ? STREAMING : BEGIN;
        r->round++;
        return rmig_source_end_round_start(r->source);
    case STREAMING:
        while (r->state_at < r->state_size) {
            size_t n = 1 + below(r, r->state_size - r->state_at);
            int64_t taken = rmig_source_put_some(r->source, r->state + r->state_at, n);
            if (taken < 0)
                return (int)taken;
            r->state_at += (size_t)taken;
            if (taken == 0 || chance(r, 10))
                return rmig_source_flush_start(r->source);
        }
        r->stage = FINISHING;
        return rmig_source_finish_start(r->source);
    case FINISHING:
        break;
    }
    return ALL_DONE;
}

static uint64_t source_step(void *user, uint64_t now) {
    struct run *r = user;
    for (;;) {
        int status = rmig_source_process(r->source);
        if (status == RMIG_PENDING) {
            if (r->round + 1 < r->rounds && r->stage != CONNECTING)
                guest_runs(r, (unsigned)below(r, r->writes_per_step + 1));
            return rmig_source_next_deadline(r->source);
        }
        if (status == RMIG_OK)
            status = source_next(r);
        if (status < 0 || status == ALL_DONE)
            return source_over(r, status == ALL_DONE ? RMIG_OK : status);
        if (status == RMIG_PENDING) // the round goes on by itself for a while
            return rmig__min(rmig_source_next_deadline(r->source), now + 1 + below(r, 100000));
    }
}

// --- the sink's embedder

static uint64_t sink_over(struct run *r, int status) {
    r->to.done = true;
    r->to.status = status;
    snprintf(r->to.text, sizeof r->to.text, "%s", status < 0 ? rmig_sink_error(r->sink)->text : "");
    return SIM_DONE;
}

static int on_blocks(struct run *r, const struct rmig_sink_event *ev) {
    int status = RMIG_OK;
    if (r->extended)
        cr_assert_eq(ev->block_count, r->blocks);
    for (unsigned i = 0; i < r->blocks && status == RMIG_OK; i++) {
        /* An extended source's blocks are found by name, in whatever order they were added. */
        struct guest_block *b = &r->block[r->extended ? r->blocks - 1 - i : i];
        if (r->extended) {
            struct rmig_block_entry entry;
            cr_assert_eq(rmig_sink_peer_block(r->sink, i, &entry), RMIG_OK);
            cr_assert_str_eq(entry.name, r->block[i].name);
            cr_assert_eq(entry.length, r->block[i].source.length);
        }
        struct rmig_block_desc d = b->sink;
        if (r->blocks_wrong && i == 0)
            d.length = d.length > PAGE ? d.length - PAGE : d.length + 1;
        status = rmig_sink_add_block(r->sink, &d, &b->sink_index);
    }
    return status == RMIG_OK ? rmig_sink_accept_blocks(r->sink) : status;
}

static uint64_t sink_step(void *user, uint64_t now) {
    struct run *r = user;
    struct rmig_sink_event ev;
    if (now > 1200 * SIM_SECOND && !r->from.done && !r->faults)
        rmig_sink_cancel(r->sink);
    if (r->from.done && r->from.status < 0 && now > 1000 * SIM_SECOND)
        rmig_sink_cancel(r->sink); // no source will come any more: a listener alone has no deadline
    int status = rmig_sink_process(r->sink, &ev);
    if (status != RMIG_OK)
        return sink_over(r, status);
    switch (ev.type) {
    case RMIG_SINK_BLOCKS:
        status = on_blocks(r, &ev);
        break;
    case RMIG_SINK_STREAM:
        for (size_t n; (n = rmig_sink_get(r->sink, r->got + r->got_size, 1 + below(r, STREAM_MAX - r->got_size))) > 0;)
            r->got_size += n;
        break;
    case RMIG_SINK_DISCONNECTED: // version 1: the reader of the stream knows whether this is the end
        if (r->got_size > 0 && r->got[r->got_size - 1] == STATE_END)
            status = rmig_sink_complete(r->sink);
        else
            rmig_sink_cancel(r->sink);
        break;
    case RMIG_SINK_TAKE:
        status = rmig_sink_take(r->sink);
        break;
    case RMIG_SINK_FINISHED:
        cr_assert_eq(sim_exposed(r->sim, 1), 0, "the peer can still write");
        return sink_over(r, RMIG_OK);
    default:
        break;
    }
    if (status < 0)
        return sink_over(r, status);
    uint64_t deadline = rmig_sink_next_deadline(r->sink);
    return deadline == RMIG_FOREVER ? 1300 * SIM_SECOND : deadline;
}

// --- a world from a seed

static void must_set(struct rmig_config *cfg, enum rmig_param param, uint64_t value) {
    struct rmig_error err;
    cr_assert_eq(rmig_set(cfg, param, value, &err), RMIG_OK, "%s", err.text);
}

static void random_world(struct run *r, struct sim_config *w, uint64_t seed) {
    enum sim_mode mode = (enum sim_mode)PICK(r, SIM_ORDERED, SIM_ORDERED, SIM_UNORDERED, SIM_LOCAL);
    sim_defaults(w, mode, seed * 2 + 1);
    w->latency_ns = PICK(r, 300, 2500, 100000, 5000000);
    w->bandwidth = PICK(r, 0, 12500000000u, 1000000000u, 50000000u);
    w->write_depth = (uint32_t)PICK(r, 0, 0, 1, 2, 7, 300);
    w->write_max = PICK(r, 1u << 31, 1u << 31, PAGE, 3 * PAGE + 5, 1u << 18);
    w->pad_private_data = chance(r, 50);
    w->offset_addressing = chance(r, 40);
    w->local_mr = chance(r, 60);
    w->extra_completions = chance(r, 20);
    if (chance(r, 20))
        w->registration_max = PICK(r, 4u << 20, 6u << 20);
    w->max_steps = 3000000;
    for (unsigned i = 0; i < 2; i++) {
        w->cpu[i].reg_call = PICK(r, 0, 10000, 2000000);
        w->cpu[i].poll = PICK(r, 50, 50, 100000); // a slow processor lets writes overtake messages
    }
}

static void random_parameters(struct run *r, struct rmig_config *source, struct rmig_config *sink, bool v1) {
    must_set(source, RMIG_PARAM_CHUNK_SIZE, PICK(r, 1, 1, 1, 2, 4, 1024) * RMIG_MIB);
    must_set(source, RMIG_PARAM_PIN_ALL, chance(r, 25));
    must_set(source, RMIG_PARAM_ZERO_DETECT, chance(r, 75));
    must_set(source, RMIG_PARAM_WRITE_DEPTH, PICK(r, 1, 3, 128, 1000));
    if (chance(r, 50))
        must_set(source, RMIG_PARAM_SIGNAL_EVERY, 1);
    if (chance(r, 60))
        must_set(source, RMIG_PARAM_REGISTER_AHEAD, PICK(r, 0, 1, 2, 5, 64) * RMIG_MIB);
    if (chance(r, 40))
        must_set(source, RMIG_PARAM_MERGE_MAX, PICK(r, PAGE, 5 * PAGE, RMIG_MIB, 8 * RMIG_MIB));
    if (chance(r, 15))
        must_set(source, RMIG_PARAM_MAX_BANDWIDTH, PICK(r, 20 * RMIG_MIB, RMIG_GIB));
    must_set(source, RMIG_PARAM_IO_TIMEOUT, 20 * SIM_SECOND);
    must_set(sink, RMIG_PARAM_IO_TIMEOUT, (v1 ? 400 : 20) * SIM_SECOND); // version 1 has no KEEPALIVE
    if (v1) {
        bool at_source = chance(r, 50);
        must_set(at_source ? source : sink, RMIG_PARAM_EXTENSION, 0);
        if (chance(r, 30))
            must_set(sink, RMIG_PARAM_PEER_CHUNK_SIZE, rmig_chunk_size(source));
    }
    r->extended = !v1;
}

/* Most guests have touched all their RAM; that of the others has holes. */
static void *map(const struct run *r, struct rmig_block_desc *d, uint64_t length, unsigned way) {
    int fd = -1;
    if (way == 1) {
        fd = memfd_create("block", MFD_CLOEXEC);
        cr_assert(fd >= 0 && ftruncate(fd, (off_t)length) == 0);
        d->backing = RMIG_BACKING_SHARED_FD;
        d->fd = fd;
    } else if (way == 2) {
        d->backing = RMIG_BACKING_ANONYMOUS;
    }
    d->length = length;
    d->host = r->worn && way != 1 ? guest_ram_map(length)
                                  : mmap(NULL, length, PROT_READ | PROT_WRITE,
                                         way == 1 ? MAP_SHARED : MAP_PRIVATE | MAP_ANONYMOUS, fd, 0);
    cr_assert_neq(d->host, MAP_FAILED);
    return d->host;
}

static void unmap(const struct run *r, const struct rmig_block_desc *d) {
    if (d->backing == RMIG_BACKING_SHARED_FD)
        close(d->fd);
    if (r->worn && d->backing != RMIG_BACKING_SHARED_FD)
        guest_ram_unmap(d->host);
    else
        munmap(d->host, d->length);
}

static void random_blocks(struct run *r) {
    uint64_t at = below(r, 2) * RMIG_GIB;
    r->blocks = 1 + (unsigned)below(r, BLOCKS_MAX);
    r->zeroes = (unsigned)PICK(r, 15, 15, 60);
    r->fresh_sink = chance(r, 70);
    for (unsigned i = 0; i < r->blocks; i++) {
        struct guest_block *b = &r->block[i];
        uint64_t length = chance(r, 50)
                              ? PICK(r, PAGE, RMIG_MIB, 2 * RMIG_MIB, RMIG_MIB + PAGE, 255 * PAGE, 1, PAGE + 1)
                              : 1 + below(r, 5 * RMIG_MIB);
        snprintf(b->name, sizeof b->name, "block%u.%llx", i, (unsigned long long)next_random(r) & 0xfff);
        map(r, &b->source, length, (unsigned)PICK(r, 0, 0, 0, 1, 2, 2));
        map(r, &b->sink, length, (unsigned)PICK(r, 0, 0, 0, 1, 2, 2));
        b->source.name = b->sink.name = b->name;
        b->source.guest_offset = at;
        b->sink.guest_offset = at + 4 * RMIG_GIB; // the two ends number RAM differently
        at += length + below(r, 2) * RMIG_MIB;
        b->pages = (length + PAGE - 1) / PAGE;
        b->dirty = calloc((b->pages + 63) / 64, 8);
        if (!r->fresh_sink)
            memset(b->sink.host, 0x5a, length); // what is zero at the source must become so
        for (uint64_t page = 0; page < b->pages; page += 1 + below(r, 200))
            for (uint64_t n = chance(r, 30) ? below(r, 90) : 1; n > 0 && page < b->pages; n--, page++)
                guest_write(r, b, page);
        memset(b->dirty, 0, (b->pages + 63) / 64 * 8);
    }
}

static void random_faults(struct run *r, struct sim_config *w) {
    r->faults = true;
    if (chance(r, 25)) {
        heap.fail_at = 1 + below(r, 40);
        return;
    }
    if (chance(r, 10)) {
        r->blocks_wrong = true;
        return;
    }
    if (chance(r, 10)) {
        w->registered_max = 4 * RMIG_MIB + below(r, 8 * RMIG_MIB); // the control buffers take 4
        return;
    }
    if (chance(r, 40)) { // at a time
        w->faults[0].kind = chance(r, 50) ? SIM_FAULT_DEATH : SIM_FAULT_SILENCE;
        w->faults[0].op = SIM_TIME;
        w->faults[0].side = (int)below(r, 2);
        w->faults[0].nth = 1 + below(r, (uint64_t)1 << (10 + below(r, 24)));
        return;
    }
    w->random_max = 1 + (uint32_t)below(r, 3);
    w->random_per_million = (uint32_t)PICK(r, 300, 3000, 30000);
    w->random_kinds = (uint32_t)next_random(r) | 1u << SIM_FAULT_FULL;
}

// What both ends have traced, in order: every message, with its time.
static uint64_t traced;

static void count_trace(void *user, const char *line) {
    traced = (traced ^ *(const uint8_t *)user) * 0x100000001b3u;
    for (; *line != '\0'; line++)
        traced = (traced ^ (uint8_t)*line) * 0x100000001b3u;
}

static void trace(void *user, const char *line) { fprintf(stderr, "%s %s\n", (const char *)user, line); }

static void open_run(struct run *r, uint64_t seed, bool v1, bool faults, bool verbose) {
    struct sim_config w;
    struct rmig_config source = {0}, sink = {0};
    struct rmig_error err = {0};
    memset(r, 0, sizeof *r);
    memset(&heap, 0, sizeof heap);
    r->random = seed ^ (v1 ? 0x76310000000000 : 0) ^ (faults ? 0x66000000000000 : 0);
    r->worn = seed % 8 != 0;
    random_world(r, &w, seed);
    random_parameters(r, &source, &sink, v1);
    random_blocks(r);
    if (w.registration_max < rmig_chunk_size(&source))
        w.registration_max = (uint64_t)1 << 40;
    if (v1) { // what version 1 cannot do: keys are 32 bits, a pinned or addressed block is one registration
        w.key_bits = 32;
        w.registration_max = (uint64_t)1 << 40;
    }
    r->rounds = 1 + (unsigned)below(r, 5);
    r->writes_per_step = (unsigned)PICK(r, 0, 1, 5);
    r->spend = PICK(r, 1, 1000000, 300000000);
    r->state_size = below(r, 4) == 0 ? below(r, STREAM_MAX) : below(r, 3000);
    r->state = malloc(STREAM_MAX);
    r->got = malloc(STREAM_MAX + 1);
    for (size_t i = 0; i < r->state_size; i++)
        r->state[i] = v1 ? (uint8_t)below(r, STATE_END) : (uint8_t)next_random(r);
    if (v1)
        r->state[r->state_size++] = STATE_END;
    if (faults)
        random_faults(r, &w);
    traced = 0xcbf29ce484222325u;
    source.trace = sink.trace = verbose ? trace : getenv("RMIG_RECORD") != NULL ? count_trace : NULL;
    source.trace_user = (void *)"source";
    sink.trace_user = (void *)"  sink";
    r->sim = sim_open(&w);
    if (rmig_source_open(sim_fabric(r->sim, 0), &source, &r->source, &err) != RMIG_OK)
        cr_assert_eq(err.status, RMIG_ERR_NO_MEMORY, "%s", err.text);
    if (rmig_sink_open(sim_fabric(r->sim, 1), &sink, &r->sink, &err) != RMIG_OK)
        cr_assert_eq(err.status, RMIG_ERR_NO_MEMORY, "%s", err.text);
}

/* What happens before the actors run: false if a fault has ended the matter already. */
static bool start_run(struct run *r) {
    if (r->source == NULL || r->sink == NULL)
        return false;
    int status = RMIG_OK;
    for (unsigned i = 0; i < r->blocks && status == RMIG_OK; i++)
        status = rmig_source_add_block(r->source, &r->block[i].source, NULL);
    if (status == RMIG_OK)
        status = rmig_sink_listen(r->sink, "sink:7000");
    if (status == RMIG_OK)
        status = rmig_source_connect_start(r->source, "sink:7000");
    if (!r->faults)
        cr_assert_eq(status, RMIG_OK, "%s", rmig_source_error(r->source)->text);
    sim_actor(r->sim, 0, source_step, r);
    sim_actor(r->sim, 1, sink_step, r);
    return status == RMIG_OK;
}

static void close_run(struct run *r, uint64_t seed) {
    struct rmig_error err = {0};
    rmig_source_close(r->source);
    rmig_sink_close(r->sink);
    cr_assert_eq(sim_clean(r->sim, &err), RMIG_OK, "replay with RMIG_SEED=%llu: %s", (unsigned long long)seed,
                 err.text);
    cr_assert_eq(heap.live, 0, "replay with RMIG_SEED=%llu: %td allocations leaked", (unsigned long long)seed,
                 heap.live);
    sim_close(r->sim);
    for (unsigned i = 0; i < r->blocks; i++) {
        struct guest_block *b = &r->block[i];
        unmap(r, &b->source);
        unmap(r, &b->sink);
        free(b->dirty);
    }
    free(r->state);
    free(r->got);
}

// --- what must hold

static void check_equal(const struct run *r, uint64_t seed) {
    for (unsigned i = 0; i < r->blocks; i++) {
        const struct guest_block *b = &r->block[i];
        const uint8_t *x = b->source.host, *y = b->sink.host;
        uint64_t at = 0;
        if (memcmp(x, y, b->source.length) == 0)
            continue;
        while (x[at] == y[at])
            at++;
        cr_assert_fail(
            "replay with RMIG_SEED=%llu: block %u differs at offset 0x%llx: %02x at the source, %02x at the sink",
            (unsigned long long)seed, i, (unsigned long long)at, x[at], y[at]);
    }
    cr_assert_eq(r->got_size, r->state_size, "replay with RMIG_SEED=%llu: device state of %zu bytes, %zu sent",
                 (unsigned long long)seed, r->got_size, r->state_size);
    cr_assert_eq(memcmp(r->got, r->state, r->state_size), 0, "replay with RMIG_SEED=%llu: device state differs",
                 (unsigned long long)seed);
}

static void check_outcome(const struct run *r, uint64_t seed) {
    const struct outcome *from = &r->from, *to = &r->to;
#define TELL                                                                                                           \
    "replay with RMIG_SEED=%llu: source %s (%s), sink %s (%s)", (unsigned long long)seed,                              \
        from->done ? rmig_status_name(from->status) : "dead", from->text,                                              \
        to->done ? rmig_status_name(to->status) : "dead", to->text
    if (!r->faults) {
        cr_assert(from->done && from->status == RMIG_OK && to->done && to->status == RMIG_OK, TELL);
        if (r->rounds > 1)
            cr_assert_eq(heap.count, r->allocated, "replay with RMIG_SEED=%llu: %llu allocations after the first round",
                         (unsigned long long)seed, (unsigned long long)(heap.count - r->allocated));
    }
    if (to->done && to->status == RMIG_OK) {
        check_equal(r, seed);
        /* The guest is the sink's: the source must not believe that it is still its own. */
        if (from->done && r->extended)
            cr_assert(from->status == RMIG_OK || from->status == RMIG_ERR_HANDOVER, TELL);
    }
    /* The source has given the guest up: then the sink has it, or died, or knows that it does not know. */
    if (from->done && from->status == RMIG_OK && to->done && r->extended)
        cr_assert(to->status == RMIG_OK || to->status == RMIG_ERR_HANDOVER || to->status == RMIG_ERR_CANCELLED, TELL);
    if (from->done && from->status < 0)
        cr_assert(from->text[0] != '\0', TELL);
    if (to->done && to->status < 0)
        cr_assert(to->text[0] != '\0', TELL);
}

static void record_end(FILE *file, const char *name, const struct outcome *o, const struct rmig_stats *stats) {
    uint64_t counter[sizeof *stats / 8];
    memcpy(counter, stats, sizeof counter);
    fprintf(file, "; %s %s \"%s\"", name, o->done ? rmig_status_name(o->status) : "dead", o->text);
    for (size_t i = 0; i < sizeof counter / sizeof counter[0]; i++)
        fprintf(file, " %llu", (unsigned long long)counter[i]);
}

// One line: what the fabric has done, what was said, how each end ended and what it has counted.
static void record(const struct run *r, const char *path, const char *family, uint64_t seed) {
    struct rmig_stats from = {0}, to = {0};
    FILE *file = fopen(path, "a");
    cr_assert_not_null(file, "RMIG_RECORD=%s: cannot be written", path);
    if (r->source != NULL)
        rmig_source_stats(r->source, &from);
    if (r->sink != NULL)
        rmig_sink_stats(r->sink, &to);
    fprintf(file, "%s %llu: fabric %016llx said %016llx", family, (unsigned long long)seed,
            (unsigned long long)sim_hash(r->sim), (unsigned long long)traced);
    record_end(file, "source", &r->from, &from);
    record_end(file, "sink", &r->to, &to);
    fputc('\n', file);
    cr_assert_eq(fclose(file), 0, "RMIG_RECORD=%s: cannot be written", path);
}

/* True if both ends succeeded. */
static bool run_seed(uint64_t seed, bool v1, bool faults, bool verbose) {
    struct run r;
    struct rmig_error err = {0};
    open_run(&r, seed, v1, faults, verbose);
    if (start_run(&r)) {
        int status = sim_run(r.sim, 2000 * SIM_SECOND, &err);
        cr_assert_eq(status, RMIG_OK, "replay with RMIG_SEED=%llu: %s", (unsigned long long)seed, err.text);
        check_outcome(&r, seed);
    }
    if (verbose)
        fprintf(stderr, "source %s %s, sink %s %s\n", rmig_status_name(r.from.status), r.from.text,
                rmig_status_name(r.to.status), r.to.text);
    bool good = r.from.done && r.from.status == RMIG_OK && r.to.done && r.to.status == RMIG_OK;
    if (getenv("RMIG_RECORD") != NULL)
        record(&r, getenv("RMIG_RECORD"), v1 ? faults ? "version_1_with_faults" : "version_1"
                                             : faults ? "extended_with_faults" : "extended", seed);
    close_run(&r, seed);
    return good;
}

static uint64_t seconds_now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec;
}

// A seed that crashes, or hangs, is named by the file all the same.
static void soak(const char *path, const char *seconds, bool v1, bool faults) {
    char text[32] = "";
    int fd = open(path, O_RDWR | O_CLOEXEC);
    cr_assert(fd >= 0 && seconds != NULL && pread(fd, text, sizeof text - 1, 0) > 0,
              "RMIG_SOAK=%s: not readable, empty, or without RMIG_SECONDS", path);
    uint64_t seed = strtoull(text, NULL, 10), end = seconds_now() + strtoull(seconds, NULL, 10);
    do {
        run_seed(seed, v1, faults, false);
        int n = snprintf(text, sizeof text, "%020llu\n", (unsigned long long)++seed);
        cr_assert_eq(pwrite(fd, text, (size_t)n, 0), n, "%s", path);
    } while (seconds_now() < end);
    close(fd);
}

/* The sanitizers make a seed several times as slow: where no count is given, each program takes seeds of its own. */
#ifdef __SANITIZE_ADDRESS__
#define IS_MINE(seed) ((seed) % 3 == 0)
#else
#define IS_MINE(seed) ((seed) % 3 != 0)
#endif

static void run_seeds(const char *family, uint64_t count, bool v1, bool faults) {
    const char *one = getenv("RMIG_SEED"), *many = getenv("RMIG_SEEDS"), *only = getenv("RMIG_FAMILY");
    if (only != NULL && strcmp(only, family) != 0)
        return;
    if (one != NULL) {
        run_seed(strtoull(one, NULL, 0), v1, faults, true);
        return;
    }
    if (getenv("RMIG_SOAK") != NULL) {
        soak(getenv("RMIG_SOAK"), getenv("RMIG_SECONDS"), v1, faults);
        return;
    }
    if (many != NULL)
        count = strtoull(many, NULL, 0);
    uint64_t good = 0, ran = 0;
    for (uint64_t seed = 1; seed <= count; seed++)
        if (many != NULL || IS_MINE(seed)) {
            good += run_seed(seed, v1, faults, false);
            ran++;
        }
    if (faults && ran >= 100) // the faults must neither miss nor hit everything
        cr_assert(good > ran / 10 && good < ran - ran / 10, "%llu of %llu seeds with faults succeeded",
                  (unsigned long long)good, (unsigned long long)ran);
}

TestSuite(random_migration, .timeout = 2400);

Test(random_migration, extended) { run_seeds("extended", 1500, false, false); }
Test(random_migration, version_1) { run_seeds("version_1", 800, true, false); }
Test(random_migration, extended_with_faults) { run_seeds("extended_with_faults", 3000, false, true); }
Test(random_migration, version_1_with_faults) { run_seeds("version_1_with_faults", 1000, true, true); }
