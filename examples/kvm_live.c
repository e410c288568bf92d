/*
kvm_live.c - a small hypervisor that live-migrates a running guest with rmig, over libfabric or verbs, or into a file

    kvm_live demo                                  both ends on this machine: progress, a table, JSON
    kvm_live dest --listen 0.0.0.0:4444            on one host
    kvm_live source --connect 10.0.0.2:4444        on the other: the guest moves
    kvm_live local                                 no network: tries the guest, the dirty log and the verifier here
    kvm_live save FILE                             runs a guest and snapshots it live; it runs on here
    kvm_live load FILE [--lazy]                    runs the guest of a snapshot

    "local --save FILE" and "local --load FILE" are the last two in other words.

    The guest (kvm_guest.h) changes its memory by a rule from which every byte of RAM can be computed, so it can be
    checked that no update was lost and none invented: in memory as it arrived, and again after the guest has run on.

    What to read for your own hypervisor: source_migrate (the convergence loop), source_drive (waiting on descriptors,
    progress, giving up), source_main (who owns the guest after which error), dest_event (blocks, state, handover). For
    snapshots: save_guest, load_guest and kvm_snapshot.h.

EXIT STATUS

    0   the guest moved and is verified (source: the guest moved; save: the file is whole, and the guest ran on and
        was verified; load: the guest ran and was verified)
    1   memory is not what the rule says
    2   wrong usage
    3   the migration or the snapshot failed: at the source the guest runs on, and was verified after --run-after; what
        the FILE of save was before, it still is, unless the message says that it is there already
    4   the link broke during the handover: nobody can know who owns the guest, so it stays stopped here
*/
#define _GNU_SOURCE
#include <argp.h>
#include <inttypes.h>
#include <jansson.h>
#include <stdarg.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>

#define RMIG_IMPLEMENTATION
#include "../rmig.h"

#include "kvm_guest.h"
#include "kvm_snapshot.h"
#include "open_fabric.h"

enum exit_status { EXIT_OK, EXIT_NOT_VERIFIED, EXIT_USAGE, EXIT_FAILED, EXIT_HANDOVER };
enum mode { MODE_NONE, MODE_SOURCE, MODE_DEST, MODE_DEMO, MODE_LOCAL, MODE_SAVE, MODE_LOAD };
enum sabotage { SABOTAGE_NONE, SABOTAGE_LOSE_PAGE, SABOTAGE_INVENT_WORD };

#define MS ((uint64_t)1000000)
#define SECOND (1000 * MS)
#define SLICE (50 * MS) // longest sleep without a look at signals, deadlines and the guest

struct options {
    enum mode mode;
    const char *address, *fabric, *provider, *json;
    uint64_t ram, ram_max, work, fill, dirty_rate;
    uint64_t downtime_ns, run_before_ns, run_after_ns, timeout_ns, max_rounds;
    int guest; // enum guest_kind, 0: kvm if it works, else a thread
    enum sabotage sabotage;
    bool strict, no_progress;
    struct rmig_config cfg;
    const char *save, *load; // snapshot files
    bool lazy, in_place;
    struct rmig_mapped_options file;
    int address_fd, report_fd; // of a demo: where the destination tells its address, where an end reports; -1: none
};

static volatile sig_atomic_t interrupted;

static void on_signal(int number) {
    (void)number;
    interrupted = 1;
}

// >>text

/* "1.2G": three digits are enough to look at. */
static const char *human(uint64_t bytes, char *buf, size_t n) {
    double value = (double)bytes;
    unsigned unit = 0;
    while (value >= 999.5 && unit < 4) {
        value /= 1024;
        unit++;
    }
    snprintf(buf, n, value < 9.95 && unit > 0 ? "%.1f%c" : "%.0f%c", value, "BKMGT"[unit]);
    return buf;
}

static const char *human_ns(uint64_t ns, char *buf, size_t n) {
    if (ns == RMIG_FOREVER)
        snprintf(buf, n, "unknown");
    else if (ns < 10 * SECOND)
        snprintf(buf, n, "%.1f ms", (double)ns / (double)MS);
    else
        snprintf(buf, n, "%.1f s", (double)ns / (double)SECOND);
    return buf;
}

static uint64_t per_second(uint64_t bytes, uint64_t ns) {
    return ns == 0 ? 0 : (uint64_t)((double)bytes * (double)SECOND / (double)ns);
}

/* "50" and "50ms", "2s", "1m". */
static bool parse_duration(const char *text, uint64_t *ns) {
    char *end;
    errno = 0;
    double value = strtod(text, &end);
    double unit = *end == '\0' || strcmp(end, "ms") == 0 ? 1e6
                  : strcmp(end, "s") == 0                ? 1e9
                  : strcmp(end, "m") == 0                ? 60e9
                                                         : 0;
    if (end == text || errno != 0 || unit == 0 || !(value >= 0) || value * unit > 1e17)
        return false;
    *ns = (uint64_t)(value * unit);
    return true;
}

// >>progress

struct progress {
    bool bar; // stderr is a terminal
    uint64_t next_ns;
};

static void progress_line(struct progress *p, const char *format, ...) __attribute__((format(printf, 2, 3)));
static void progress_line(struct progress *p, const char *format, ...) {
    if (p->bar) // this end's or the other end's may stand there
        fputs("\r\033[K", stderr);
    va_list args;
    va_start(args, format);
    vfprintf(stderr, format, args);
    va_end(args);
    fputc('\n', stderr);
}

static void progress_bar(struct progress *p, const struct rmig_stats *st, uint64_t total) {
    if (!p->bar || total == 0 || guest_now() < p->next_ns)
        return;
    p->next_ns = guest_now() + 100 * MS;
    uint64_t done = st->round_bytes < total ? st->round_bytes : total;
    unsigned width = 28, full = total == 0 ? 0 : (unsigned)((double)done / (double)total * width);
    char bar[32], a[16], b[16], c[16], d[16];
    memset(bar, '.', width);
    memset(bar, '#', full);
    bar[width] = '\0';
    fprintf(stderr, "\r\033[Kround %" PRIu64 " [%s] %s  %s/s  %s left  downtime if stopped now %s", st->rounds + 1, bar,
            human(done, a, sizeof a), human(st->throughput, b, sizeof b), human(total - done, c, sizeof c),
            human_ns(rmig_expected_downtime_ns(st, total - done), d, sizeof d));
    fflush(stderr);
}

// >>ram

struct ram {
    int fd; // -1: not open
    uint8_t *shared; // the source's guest runs in it; at the destination rmig writes it
    uint8_t *pinnable; // a second view for the source's rmig, or NULL
    uint8_t *private_copy; // copy on write over it, or NULL
    uint64_t size;
};

static int ram_open(struct ram *r, uint64_t size, struct rmig_error *err) {
    r->size = size;
    r->fd = memfd_create("guest-ram", MFD_CLOEXEC);
    if (r->fd < 0)
        return fail_errno(err, "memfd_create");
    if (ftruncate(r->fd, (off_t)size) != 0)
        return fail_errno(err, "sizing the guest's RAM");
    void *p = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, r->fd, 0);
    if (p == MAP_FAILED)
        return fail_errno(err, "mapping the guest's RAM");
    r->shared = p;
    return RMIG_OK;
}

/* A second view, copy on write: a guest that runs on it leaves the shared one as it arrived, to be verified
   meanwhile. */
static int ram_open_private(struct ram *r, struct rmig_error *err) {
    void *p = mmap(NULL, r->size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_NORESERVE, r->fd, 0);
    if (p == MAP_FAILED)
        return fail_errno(err, "mapping the guest's RAM a second time");
    r->private_copy = p;
    return RMIG_OK;
}

/* A second view, without protection: a page that userfaultfd has write-protected may not be pinned, not even for
   reading (seen with Linux 6.1). */
static int ram_open_pinnable(struct ram *r, struct rmig_error *err) {
    void *p = mmap(NULL, r->size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, r->fd, 0);
    if (p == MAP_FAILED)
        return fail_errno(err, "mapping the guest's RAM a second time");
    r->pinnable = p;
    return RMIG_OK;
}

static uint64_t ram_resident(const struct ram *r) {
    struct stat st;
    return fstat(r->fd, &st) == 0 ? (uint64_t)st.st_blocks * 512 : 0;
}

static void ram_close(struct ram *r) {
    if (r->pinnable != NULL)
        munmap(r->pinnable, r->size);
    if (r->private_copy != NULL)
        munmap(r->private_copy, r->size);
    if (r->shared != NULL)
        munmap(r->shared, r->size);
    if (r->fd >= 0)
        close(r->fd);
    *r = (struct ram){.fd = -1};
}

// >>both ends

/* Sleeps, in slices, unless a signal came or the guest failed. */
static int run_for(struct guest *g, uint64_t ns, struct rmig_error *err) {
    uint64_t end = guest_now() + ns;
    for (uint64_t now = guest_now(); now < end && !interrupted; now = guest_now()) {
        if (guest_has_failed(g, err))
            return RMIG_ERR_SETUP;
        struct timespec nap = guest_timespec(end - now < SLICE ? end - now : SLICE);
        nanosleep(&nap, NULL);
    }
    return RMIG_OK;
}

static uint64_t deadline_of(const struct options *o) {
    return o->timeout_ns == 0 ? UINT64_MAX : guest_now() + o->timeout_ns;
}

static int choose_guest(const struct options *o, enum guest_kind *kind, struct progress *p, struct rmig_error *err) {
    *kind = o->guest == GUEST_THREAD ? GUEST_THREAD : GUEST_KVM;
    if (*kind == GUEST_THREAD)
        return RMIG_OK;
    int rc = guest_probe_kvm(err);
    if (rc == RMIG_OK || o->guest == GUEST_KVM)
        return rc;
    progress_line(p, "KVM cannot be used (%s): the guest is a thread, its dirty log userfaultfd", err->text);
    *kind = GUEST_THREAD;
    return RMIG_OK;
}

/* Of a guest that comes from elsewhere. */
static int check_kind(const struct options *o, const struct guest_state *state, struct rmig_error *err) {
    if (o->guest == 0 || state->kind == (uint32_t)o->guest)
        return RMIG_OK;
    return rmig_fail(err, RMIG_ERR_SETUP, 0, "the guest that comes is a %s guest, --guest here says %s",
                     guest_kind_name((enum guest_kind)state->kind), guest_kind_name((enum guest_kind)o->guest));
}

/* To the file of --json and, in a demo, to the process that makes one report of two. */
static int write_report(const struct options *o, json_t *report) {
    int rc = 0;
    if (o->report_fd >= 0)
        rc = json_dumpfd(report, o->report_fd, JSON_COMPACT);
    else if (o->json != NULL)
        rc = json_dump_file(report, o->json, JSON_INDENT(4));
    if (rc != 0)
        fprintf(stderr, "the report could not be written to %s\n", o->json != NULL ? o->json : "the demo");
    json_decref(report);
    return rc;
}

static void set_number(json_t *report, const char *key, uint64_t value) {
    json_object_set_new(report, key, json_integer((json_int_t)value));
}

// >>source

struct source {
    const struct options *o;
    struct progress progress;
    struct ram ram;
    struct guest guest;
    int (*round)(struct source *s, const uint64_t *dirty, uint64_t bytes, struct rmig_error *err); // fills in stats
    struct rmig_fabric *fabric; // a migration
    struct rmig_source *rmig;
    uint32_t block;
    struct snapshot file; // a snapshot
    uint64_t *dirty, *dirty_last; // dirty logs: since the last round; since then, once the guest is stopped
    uint64_t pages, deadline, begin_ns, stop_ns, end_ns, expected_ns;
    uint64_t fetch_ns, dirty_rate; // when the dirty log was fetched last, and what it said, bytes per second
    struct rmig_stats stats; // after the last round; when the session ends
    bool finishing;
    uint64_t first_step_ns; // of a guest that was snapshotted, when it runs on
    uint64_t round_total; // save: bytes of the round under way
    struct rmig_error gave_up; // save: why
    struct guest_verdict verdict; // of a guest that ran on here
};

static uint64_t count_bits(const uint64_t *bitmap, uint64_t pages) {
    uint64_t n = 0;
    for (uint64_t i = 0; i < (pages + 63) / 64; i++)
        n += (uint64_t)__builtin_popcountll(bitmap[i]);
    return n;
}

static void source_sleep(struct source *s) {
    struct rmig_fd fds[4];
    struct pollfd p[4];
    int n = rmig_source_fds(s->rmig, fds, 4);
    for (int i = 0; i < n; i++)
        p[i] = (struct pollfd){.fd = fds[i].fd, .events = fds[i].write ? POLLIN | POLLOUT : POLLIN};
    uint64_t due = rmig_source_next_deadline(s->rmig), now = s->fabric->ops->now(s->fabric);
    uint64_t ns = due <= now ? 0 : due - now < SLICE ? due - now : SLICE;
    struct timespec timeout = guest_timespec(ns);
    ppoll(p, n > 0 ? (nfds_t)n : 0, &timeout, NULL);
}

static int source_may_go_on(struct source *s, struct rmig_error *err) {
    char text[24];
    if (interrupted)
        return rmig_fail(err, RMIG_ERR_CANCELLED, 0, "cancelled by a signal");
    if (guest_now() > s->deadline)
        return rmig_fail(err, RMIG_ERR_TIMEOUT, 0, "not done within the --timeout of %s",
                         human_ns(s->o->timeout_ns, text, sizeof text));
    return guest_has_failed(&s->guest, err) ? RMIG_ERR_SETUP : RMIG_OK;
}

/* Drives the operation under way to its end, and gives up when there is a reason to. total: bytes of the round, for
   the bar. */
static int source_drive(struct source *s, uint64_t total, struct rmig_error *err) {
    for (;;) {
        int rc = rmig_source_process(s->rmig);
        if (rc != RMIG_PENDING) {
            if (rc != RMIG_OK)
                *err = *rmig_source_error(s->rmig);
            return rc;
        }
        rc = s->finishing ? RMIG_OK : source_may_go_on(s, err);
        if (rc != RMIG_OK)
            return rc;
        rmig_source_stats(s->rmig, &s->stats);
        progress_bar(&s->progress, &s->stats, total);
        source_sleep(s);
    }
}

/* A call on the source that is refused leaves its words there. */
static int source_check(struct source *s, int rc, struct rmig_error *err) {
    if (rc < 0)
        *err = *rmig_source_error(s->rmig);
    return rc;
}

static int source_connect(struct source *s, const char *address, struct rmig_error *err) {
    int rc = ram_open_pinnable(&s->ram, err);
    if (rc != RMIG_OK)
        return rc;
    struct rmig_block_desc ram = {.name = "kvm-live.ram",
                                  .host = s->ram.pinnable,
                                  .length = s->ram.size,
                                  .backing = RMIG_BACKING_SHARED_FD,
                                  .fd = s->ram.fd};
    s->fabric = open_fabric(s->o->fabric, s->o->provider, err);
    rc = s->fabric != NULL ? RMIG_OK : err->status;
    if (rc == RMIG_OK)
        rc = rmig_source_open(s->fabric, &s->o->cfg, &s->rmig, err);
    if (rc != RMIG_OK)
        return rc;
    rc = source_check(s, rmig_source_add_block(s->rmig, &ram, &s->block), err);
    if (rc == RMIG_OK)
        rc = source_check(s, rmig_source_connect_start(s->rmig, address), err);
    return rc == RMIG_OK ? source_drive(s, 0, err) : rc;
}

/* One round: everything (dirty NULL) or what the dirty log says. */
static int source_round(struct source *s, const uint64_t *dirty, uint64_t bytes, struct rmig_error *err) {
    int rc = rmig_source_begin_round(s->rmig);
    if (rc == RMIG_OK)
        rc = dirty == NULL ? rmig_source_save_range(s->rmig, s->block, 0, s->ram.size)
                           : rmig_source_save_bitmap(s->rmig, s->block, dirty, 0, s->pages);
    if (rc == RMIG_OK)
        rc = rmig_source_end_round_start(s->rmig);
    rc = source_check(s, rc, err);
    if (rc == RMIG_OK)
        rc = source_drive(s, bytes, err);
    rmig_source_stats(s->rmig, &s->stats);
    return rc;
}

/* After a round: what the guest dirtied meanwhile, and how long the rest would take with the guest stopped. */
static int source_look(struct source *s, uint64_t *dirty_bytes, struct rmig_error *err) {
    int rc = guest_log_fetch(&s->guest, s->dirty, err);
    if (rc != RMIG_OK)
        return rc;
    uint64_t now = guest_now();
    *dirty_bytes = count_bits(s->dirty, s->pages) * GUEST_PAGE;
    s->dirty_rate = per_second(*dirty_bytes, now - s->fetch_ns);
    s->fetch_ns = now;
    s->expected_ns = rmig_expected_downtime_ns(&s->stats, *dirty_bytes);
    char a[16], b[16], c[16], d[16], e[16];
    progress_line(&s->progress, "round %" PRIu64 ": %s in %s (%s/s); dirty since: %s; downtime if stopped now: %s",
                  s->stats.rounds, human(s->stats.round_bytes, a, sizeof a), human_ns(s->stats.round_ns, b, sizeof b),
                  human(per_second(s->stats.round_bytes, s->stats.round_ns), c, sizeof c),
                  human(*dirty_bytes, d, sizeof d), human_ns(s->expected_ns, e, sizeof e));
    return RMIG_OK;
}

/* Rounds while the guest runs, until the rest fits into the downtime limit. */
static int source_converge(struct source *s, struct rmig_error *err) {
    uint64_t bytes = s->ram.size;
    const uint64_t *dirty = NULL;
    for (;;) {
        int rc = s->round(s, dirty, bytes, err);
        if (rc == RMIG_OK)
            rc = source_look(s, &bytes, err);
        if (rc != RMIG_OK)
            return rc;
        dirty = s->dirty;
        if (s->expected_ns <= s->o->downtime_ns)
            return RMIG_OK;
        if (s->stats.rounds + 1 < s->o->max_rounds)
            continue;
        char expected[24], limit[24];
        human_ns(s->expected_ns, expected, sizeof expected);
        human_ns(s->o->downtime_ns, limit, sizeof limit);
        if (s->o->strict)
            return rmig_fail(err, RMIG_ERR_CANCELLED, 0,
                             "no convergence: after %" PRIu64 " rounds the downtime would be %s, the limit is %s",
                             s->stats.rounds, expected, limit);
        progress_line(&s->progress,
                      "no convergence after %" PRIu64 " rounds: stopping the guest anyway, expecting a "
                      "downtime of %s (limit %s)",
                      s->stats.rounds, expected, limit);
        return RMIG_OK;
    }
}

/* To prove the verifier: leaves one dirty page of the last round out, one that was written after the round before, so
   it is stale at the destination. */
static int sabotage_lose_page(struct source *s, uint64_t steps_before, struct rmig_error *err) {
    for (uint64_t page = GUEST_WORK_PAGE; page < layout_fill_page(&s->guest.layout); page++) {
        const uint64_t *words = (const uint64_t *)(const void *)(s->ram.shared + page * GUEST_PAGE);
        uint64_t bit = (uint64_t)1 << (page % 64);
        if (!(s->dirty_last[page / 64] & bit) || words[0] <= steps_before)
            continue;
        s->dirty[page / 64] &= ~bit;
        progress_line(&s->progress, "sabotage: dirty page %" PRIu64 " is not sent", page);
        return RMIG_OK;
    }
    return rmig_fail(err, RMIG_ERR_SETUP, 0, "--sabotage lose-page: the guest wrote no page that could be lost");
}

static int sabotage_invent_word(struct source *s, struct rmig_error *err) {
    if (s->guest.layout.fill_pages == 0)
        return rmig_fail(err, RMIG_ERR_SETUP, 0, "--sabotage invent-word needs a --fill of more than 0");
    uint64_t page = layout_fill_page(&s->guest.layout) + s->guest.layout.fill_pages / 2;
    s->ram.shared[page * GUEST_PAGE + 1000] ^= 1;
    s->dirty[page / 64] |= (uint64_t)1 << (page % 64);
    progress_line(&s->progress, "sabotage: one bit of page %" PRIu64 " is changed", page);
    return RMIG_OK;
}

/* Stops the guest and puts what it wrote since the last fetch into s->dirty. */
static int source_stop_guest(struct source *s, struct rmig_error *err) {
    uint64_t steps = guest_steps(s->ram.shared);
    int rc = RMIG_OK;
    if (s->o->sabotage == SABOTAGE_LOSE_PAGE && (rc = guest_wait_step(&s->guest, steps, err)) != RMIG_OK)
        return rc;
    s->stop_ns = guest_now();
    rc = guest_pause(&s->guest, err);
    if (rc == RMIG_OK)
        rc = guest_log_fetch(&s->guest, s->dirty_last, err);
    if (rc != RMIG_OK)
        return rc;
    for (uint64_t i = 0; i < (s->pages + 63) / 64; i++)
        s->dirty[i] |= s->dirty_last[i];
    if (s->o->sabotage == SABOTAGE_LOSE_PAGE)
        return sabotage_lose_page(s, steps, err);
    return s->o->sabotage == SABOTAGE_INVENT_WORD ? sabotage_invent_word(s, err) : RMIG_OK;
}

/* The guest stands still from here on: the last round, and its state. */
static int source_stop(struct source *s, struct guest_state *state, struct rmig_error *err) {
    int rc = source_stop_guest(s, err);
    if (rc == RMIG_OK)
        rc = s->round(s, s->dirty, count_bits(s->dirty, s->pages) * GUEST_PAGE, err);
    if (rc == RMIG_OK)
        rc = guest_save_state(&s->guest, state, err);
    if (rc != RMIG_OK)
        return rc;
    state->begin_ns = s->begin_ns;
    state->stop_ns = s->stop_ns;
    state->rounds = (uint32_t)s->stats.rounds;
    return RMIG_OK;
}

/* Any error hands the guest back to source_main. */
static int source_hand_over(struct source *s, struct rmig_error *err) {
    struct guest_state state;
    int rc = source_stop(s, &state, err);
    if (rc != RMIG_OK)
        return rc;
    // From here on the sink may own the guest before we hear of it: only rmig, by its own deadlines, says how it ended.
    s->finishing = true;
    rc = rmig_source_put(s->rmig, &state, sizeof state);
    if (rc == RMIG_OK)
        rc = rmig_source_finish_start(s->rmig);
    rc = source_check(s, rc, err);
    return rc == RMIG_OK ? source_drive(s, 0, err) : rc;
}

static int source_migrate(struct source *s, const char *address, struct rmig_error *err) {
    s->deadline = deadline_of(s->o);
    s->round = source_round;
    int rc = source_connect(s, address, err);
    if (rc == RMIG_OK)
        rc = guest_log_start(&s->guest, err); // before the first page is read
    s->begin_ns = s->fetch_ns = guest_now();
    if (rc == RMIG_OK)
        rc = source_converge(s, err);
    if (rc == RMIG_OK)
        rc = source_hand_over(s, err);
    s->end_ns = guest_now();
    if (s->rmig != NULL)
        rmig_source_stats(s->rmig, &s->stats);
    if (rc != RMIG_OK && s->rmig != NULL) {
        rmig_source_cancel(s->rmig); // tells the sink, if it can be told; nothing if the session is over already
        rmig_source_process(s->rmig);
    }
    rmig_source_close(s->rmig);
    s->rmig = NULL;
    return rc;
}

static int source_open(struct source *s, const struct options *o, struct rmig_error *err) {
    struct guest_layout layout;
    enum guest_kind kind;
    int rc = layout_make(&layout, o->ram, o->work, o->fill, o->dirty_rate, err);
    if (rc == RMIG_OK)
        rc = choose_guest(o, &kind, &s->progress, err);
    if (rc == RMIG_OK)
        rc = ram_open(&s->ram, o->ram, err);
    if (rc != RMIG_OK)
        return rc;
    s->pages = layout_pages(&layout);
    s->dirty = calloc((s->pages + 63) / 64, 8);
    s->dirty_last = calloc((s->pages + 63) / 64, 8);
    if (s->dirty == NULL || s->dirty_last == NULL)
        return rmig_fail(err, RMIG_ERR_NO_MEMORY, 0, "no memory for the dirty bitmaps");
    s->guest.layout = layout;
    s->guest.kind = kind;
    s->guest.ram = s->ram.shared;
    return guest_create(&s->guest, err);
}

static void source_close(struct source *s) {
    snapshot_close(&s->file);
    rmig_fabric_close(s->fabric);
    guest_close(&s->guest);
    ram_close(&s->ram);
    free(s->dirty);
    free(s->dirty_last);
}

static void save_report(const struct source *s, json_t *r) {
    json_object_set_new(r, "file", json_string(s->o->save));
    set_number(r, "file_bytes", s->file.bytes);
    set_number(r, "file_allocated_bytes", s->file.allocated);
    json_object_set_new(r, "verified", json_boolean(s->verdict.ok));
    json_object_set_new(r, "after_running", json_string(s->verdict.text));
    if (s->end_ns != 0)
        set_number(r, "total_ns", s->end_ns - s->begin_ns);
    if (s->first_step_ns != 0)
        set_number(r, "downtime_ns", s->first_step_ns - s->stop_ns);
}

static void source_report(struct source *s, const char *outcome, const struct rmig_error *err) {
    const struct rmig_stats *st = &s->stats;
    bool save = s->o->mode == MODE_SAVE;
    json_t *r = json_object();
    json_object_set_new(r, "role", json_string(save ? "save" : "source"));
    json_object_set_new(r, "outcome", json_string(outcome));
    json_object_set_new(r, "guest", json_string(guest_kind_name(s->guest.kind)));
    if (save) {
        save_report(s, r);
    } else {
        json_object_set_new(r, "fabric", json_string(s->fabric != NULL ? s->fabric->ops->name : "none"));
        json_object_set_new(r, "provider", json_string(fabric_provider(s->fabric)));
    }
    set_number(r, "ram_bytes", s->ram.size);
    set_number(r, "rounds", st->rounds);
    set_number(r, "bytes_written", st->bytes_written);
    set_number(r, "bytes_zero", st->bytes_zero);
    set_number(r, "downtime_limit_ns", s->o->downtime_ns);
    set_number(r, "downtime_expected_ns", s->expected_ns);
    set_number(r, "dirty_rate_bytes_per_s", s->dirty_rate);
    if (s->end_ns != 0)
        set_number(r, "throughput_bytes_per_s", per_second(st->bytes_written, s->end_ns - s->begin_ns));
    if (err != NULL && err->status != RMIG_OK)
        json_object_set_new(r, "error", json_string(err->text));
    write_report(s->o, r);
}

/* The guest is still ours, or again: it runs on, and is verified. */
static int source_verify(struct source *s, struct rmig_error *err) {
    guest_log_stop(&s->guest);
    guest_resume(&s->guest);
    int rc = guest_wait_step(&s->guest, guest_steps(s->ram.shared), err);
    if (rc == RMIG_OK)
        rc = run_for(&s->guest, s->o->run_after_ns, err);
    if (rc == RMIG_OK)
        rc = guest_pause(&s->guest, err);
    if (rc != RMIG_OK)
        return rc;
    uint64_t steps = guest_steps(s->ram.shared);
    s->verdict = guest_verify(&s->guest.layout, s->ram.shared, steps);
    guest_registers_fit(&s->guest, steps, &s->verdict);
    progress_line(&s->progress, "verified after running on: %s: %s", s->verdict.ok ? "yes" : "NO", s->verdict.text);
    return RMIG_OK;
}

/* why: of a migration or a snapshot that failed; NULL: a snapshot that is whole. */
static int source_run_on(struct source *s, const struct rmig_error *why) {
    struct rmig_error err = {0};
    if (why != NULL)
        progress_line(&s->progress, "the %s failed: %s (%s)", s->o->mode == MODE_SAVE ? "snapshot" : "migration",
                      why->text, rmig_status_name(why->status));
    progress_line(&s->progress, "the guest runs on here");
    if (source_verify(s, &err) != RMIG_OK) {
        progress_line(&s->progress, "the guest is lost: %s", err.text);
        source_report(s, "guest lost", &err);
        return EXIT_FAILED;
    }
    source_report(s, why != NULL ? "failed, guest runs on" : "saved", why);
    if (!s->verdict.ok)
        return EXIT_NOT_VERIFIED;
    return why != NULL ? EXIT_FAILED : EXIT_OK;
}

static int source_main(const struct options *o, const char *address) {
    struct source s = {.o = o, .ram = {.fd = -1}, .file = SNAPSHOT_NONE};
    struct rmig_error err = {0};
    s.progress.bar = isatty(2) && !o->no_progress;
    guest_init(&s.guest, GUEST_THREAD, NULL, NULL);
    int status = EXIT_FAILED, rc = source_open(&s, o, &err);
    if (rc != RMIG_OK) {
        progress_line(&s.progress, "the guest cannot be started: %s", err.text);
        source_close(&s);
        return EXIT_FAILED;
    }
    guest_resume(&s.guest);
    rc = run_for(&s.guest, o->run_before_ns, &err);
    if (rc == RMIG_OK)
        rc = source_migrate(&s, address, &err);
    if (rc == RMIG_OK) {
        progress_line(&s.progress, "the guest runs at the destination now");
        source_report(&s, "moved", NULL);
        status = EXIT_OK;
    } else if (rc == RMIG_ERR_HANDOVER) {
        progress_line(&s.progress, "%s; the guest stays stopped here: look whether the destination runs it", err.text);
        source_report(&s, "handover uncertain", &err);
        status = EXIT_HANDOVER;
    } else {
        status = source_run_on(&s, &err);
    }
    source_close(&s);
    return status;
}

// >>destination

struct dest {
    const struct options *o;
    struct progress progress;
    struct ram ram;
    struct guest guest;
    struct rmig_fabric *fabric;
    struct rmig_sink *rmig;
    struct guest_state state;
    size_t state_bytes; // of it, arrived
    bool ready; // the guest is made from the state
    bool taken; // the source has been told so, or may have gone without being told
    uint64_t deadline, finish_ns, resume_ns, first_step_ns, resident;
    struct guest_verdict arrival, final;
};

/* A call on the sink that is refused leaves its words there. */
static int dest_check(struct dest *d, int rc, struct rmig_error *err) {
    if (rc < 0)
        *err = *rmig_sink_error(d->rmig);
    return rc;
}

/* What the source says of its RAM, or what --ram says when a plain version 1 source says nothing; an error if this
   program does not take it. */
static int dest_offer(struct dest *d, const struct rmig_sink_event *ev, char *name, uint64_t *size,
                      struct rmig_error *err) {
    struct rmig_block_entry entry = {0};
    char is[32], max[32];
    snprintf(name, RMIG_NAME_MAX + 1, "kvm-live.ram");
    *size = d->o->ram;
    if (ev->block_count > 1)
        return rmig_fail(err, RMIG_ERR_SETUP, 0, "the source has %u RAM blocks, this program takes 1", ev->block_count);
    if (ev->block_count == 1) {
        int rc = rmig_sink_peer_block(d->rmig, 0, &entry);
        if (rc != RMIG_OK)
            return dest_check(d, rc, err);
        memcpy(name, entry.name, sizeof entry.name);
        *size = entry.length;
    }
    if (*size < GUEST_RAM_MIN || *size > d->o->ram_max)
        return rmig_fail(err, RMIG_ERR_SETUP, 0, "the source's RAM is %s: must be 16M to --ram-max, %s",
                         rmig_size_format(*size, is, sizeof is), rmig_size_format(d->o->ram_max, max, sizeof max));
    return RMIG_OK;
}

static int dest_blocks(struct dest *d, const struct rmig_sink_event *ev, struct rmig_error *err) {
    char name[RMIG_NAME_MAX + 1];
    uint64_t size;
    uint32_t index;
    if (dest_offer(d, ev, name, &size, err) != RMIG_OK) { // let it go: another may come
        rmig_sink_refuse(d->rmig, err->text);
        *err = (struct rmig_error){0};
        return RMIG_OK;
    }
    int rc = ram_open(&d->ram, size, err);
    // The slow part of making a VM, while the guest still runs at the source.
    struct rmig_error no_kvm = {0};
    if (rc == RMIG_OK && d->o->guest != GUEST_THREAD && kvm_open_vcpu(&d->guest, &no_kvm) != RMIG_OK)
        progress_line(&d->progress, "no KVM here (%s): only a thread guest can come", no_kvm.text);
    if (rc != RMIG_OK)
        return rc;
    struct rmig_block_desc ram = {
        .name = name, .host = d->ram.shared, .length = size, .backing = RMIG_BACKING_SHARED_FD, .fd = d->ram.fd};
    rc = rmig_sink_add_block(d->rmig, &ram, &index);
    if (rc == RMIG_OK)
        rc = rmig_sink_accept_blocks(d->rmig);
    return dest_check(d, rc, err);
}

/* The whole state is there: makes the guest of it, paused, so that all that can fail has been tried before the guest is
   taken. Its memory is not looked at: it may be written until the handover is over. An error now leaves the guest with
   the source. */
static int dest_make_guest(struct dest *d, struct rmig_error *err) {
    int rc = state_check(&d->state, d->ram.size, err);
    if (rc == RMIG_OK)
        rc = check_kind(d->o, &d->state, err);
    if (rc == RMIG_OK)
        rc = ram_open_private(&d->ram, err);
    if (rc != RMIG_OK)
        return rc;
    d->guest.ram = d->ram.private_copy;
    rc = guest_load_state(&d->guest, &d->state, err);
    d->ready = rc == RMIG_OK;
    return rc;
}

static int dest_stream(struct dest *d, struct rmig_error *err) {
    uint8_t more;
    size_t n;
    if (d->ram.fd < 0) { // and let it go, if it can be
        rmig_sink_refuse(d->rmig, "device state before RAM");
        return RMIG_OK;
    }
    while (d->state_bytes < sizeof d->state &&
           (n = rmig_sink_get(d->rmig, (uint8_t *)&d->state + d->state_bytes, sizeof d->state - d->state_bytes)) > 0)
        d->state_bytes += n;
    if (d->state_bytes < sizeof d->state)
        return RMIG_OK;
    if (rmig_sink_get(d->rmig, &more, 1) != 0)
        return rmig_fail(err, RMIG_ERR_SETUP, 0, "the device state is longer than the %zu bytes of this program's",
                         sizeof d->state);
    if (!d->ready && dest_make_guest(d, err) != RMIG_OK)
        return err->status;
    d->taken = d->taken || !rmig_sink_extended(d->rmig); // a version 1 source waits for no answer
    return RMIG_OK;
}

static int dest_take(struct dest *d, struct rmig_error *err) {
    if (!d->ready)
        return rmig_fail(err, RMIG_ERR_SETUP, 0, "the source finished after %zu bytes of the device state's %zu",
                         d->state_bytes, sizeof d->state);
    d->taken = true;
    return dest_check(d, rmig_sink_take(d->rmig), err);
}

static int dest_event(struct dest *d, const struct rmig_sink_event *ev, struct rmig_error *err) {
    switch (ev->type) {
    case RMIG_SINK_CONNECTED:
        progress_line(&d->progress, "destination: a source is there");
        return RMIG_OK;
    case RMIG_SINK_FORGOTTEN:
        progress_line(&d->progress, "destination: the source was let go, another may come: %s",
                      rmig_sink_error(d->rmig)->text);
        return RMIG_OK;
    case RMIG_SINK_BLOCKS:
        return dest_blocks(d, ev, err);
    case RMIG_SINK_STREAM:
        return dest_stream(d, err);
    case RMIG_SINK_DISCONNECTED: // a plain version 1 source: only the reader of the stream knows whether it was whole
        return d->ready ? dest_check(d, rmig_sink_complete(d->rmig), err)
                        : rmig_fail(err, RMIG_ERR_PEER_GONE, 0, "the source left before its device state was whole");
    case RMIG_SINK_TAKE:
        return dest_take(d, err);
    case RMIG_SINK_FINISHED:
        d->finish_ns = guest_now();
        return d->ready ? RMIG_OK : rmig_fail(err, RMIG_ERR_SETUP, 0, "the source finished without its device state");
    case RMIG_SINK_NONE:
    case RMIG_SINK_ROUND:
    default:
        return RMIG_OK;
    }
}

/* Once the guest is taken only rmig says how the handover ends. */
static int dest_may_go_on(const struct dest *d, struct rmig_error *err) {
    char text[24];
    if (!d->taken && interrupted)
        return rmig_fail(err, RMIG_ERR_CANCELLED, 0, "cancelled by a signal");
    if (!d->taken && guest_now() > d->deadline)
        return rmig_fail(err, RMIG_ERR_TIMEOUT, 0, "no guest within the --timeout of %s",
                         human_ns(d->o->timeout_ns, text, sizeof text));
    return RMIG_OK;
}

/* From listening until the guest is ours. */
static int dest_receive(struct dest *d, struct rmig_error *err) {
    while (d->finish_ns == 0) {
        struct rmig_sink_event ev = {0};
        int rc = dest_check(d, rmig_sink_wait(d->rmig, &ev, SLICE), err);
        if (rc < 0)
            return rc;
        rc = dest_event(d, &ev, err);
        if (rc == RMIG_OK)
            rc = dest_may_go_on(d, err);
        if (rc < 0) {
            if (rmig_sink_refuse(d->rmig, err->text) < 0) // so that the source hears why
                rmig_sink_cancel(d->rmig);
            return rc;
        }
    }
    return RMIG_OK;
}

static int dest_listen(struct dest *d, const char *address, struct rmig_error *err) {
    char bound[128];
    d->fabric = open_fabric(d->o->fabric, d->o->provider, err);
    int rc = d->fabric != NULL ? RMIG_OK : err->status;
    if (rc == RMIG_OK)
        rc = rmig_sink_open(d->fabric, &d->o->cfg, &d->rmig, err);
    if (rc != RMIG_OK)
        return rc;
    rc = rmig_sink_listen(d->rmig, address);
    if (rc == RMIG_OK)
        rc = rmig_sink_address(d->rmig, bound, sizeof bound);
    if (rc != RMIG_OK) {
        *err = *rmig_sink_error(d->rmig);
        return rc;
    }
    progress_line(&d->progress, "destination: listening on %s", bound);
    if (d->o->address_fd >= 0 && dprintf(d->o->address_fd, "%s\n", bound) < 0)
        return fail_errno(err, "telling the source the address");
    d->deadline = d->o->timeout_ns == 0 ? UINT64_MAX : guest_now() + d->o->timeout_ns + d->o->run_before_ns;
    return RMIG_OK;
}

/* The guest is ours: runs it, verifies meanwhile what arrived, and in the end what it has made of it. */
static int dest_run(struct dest *d, struct rmig_error *err) {
    d->resident = ram_resident(&d->ram);
    d->resume_ns = guest_now();
    guest_resume(&d->guest);
    int rc = guest_wait_step(&d->guest, d->state.steps, err);
    d->first_step_ns = guest_now();
    if (rc != RMIG_OK)
        return rc;
    uint64_t steps = guest_steps(d->ram.shared);
    d->arrival = guest_verify(&d->state.layout, d->ram.shared, d->state.steps);
    progress_line(&d->progress, "destination: memory as it arrived: %s: %s", d->arrival.ok ? "right" : "WRONG",
                  d->arrival.text);
    if (d->arrival.ok && steps != d->state.steps)
        return rmig_fail(err, RMIG_ERR_SETUP, 0, "the memory that arrived changed while the guest ran on a copy");
    uint64_t ran = guest_now() - d->resume_ns;
    rc = run_for(&d->guest, ran < d->o->run_after_ns ? d->o->run_after_ns - ran : 0, err);
    if (rc == RMIG_OK)
        rc = guest_pause(&d->guest, err);
    if (rc != RMIG_OK)
        return rc;
    steps = guest_steps(d->guest.ram);
    d->final = guest_verify(&d->state.layout, d->guest.ram, steps);
    guest_registers_fit(&d->guest, steps, &d->final);
    progress_line(&d->progress, "destination: memory after running on: %s: %s", d->final.ok ? "right" : "WRONG",
                  d->final.text);
    return RMIG_OK;
}

static void dest_report(struct dest *d, const struct rmig_error *err) {
    json_t *r = json_object();
    json_object_set_new(r, "role", json_string("dest"));
    json_object_set_new(r, "guest", json_string(d->ready ? guest_kind_name(d->guest.kind) : "none"));
    set_number(r, "ram_bytes", d->ram.size);
    json_object_set_new(r, "verified", json_boolean(d->arrival.ok && d->final.ok));
    if (d->first_step_ns != 0) {
        json_object_set_new(r, "verified_on_arrival", json_boolean(d->arrival.ok));
        json_object_set_new(r, "verified_after_running", json_boolean(d->final.ok));
        json_object_set_new(r, "arrival", json_string(d->arrival.text));
        json_object_set_new(r, "after_running", json_string(d->final.text));
        set_number(r, "rounds", d->state.rounds);
        set_number(r, "total_ns", d->first_step_ns - d->state.begin_ns);
        set_number(r, "downtime_ns", d->first_step_ns - d->state.stop_ns);
        set_number(r, "downtime_stop_to_handover_ns", d->finish_ns - d->state.stop_ns);
        set_number(r, "downtime_resume_to_first_step_ns", d->first_step_ns - d->resume_ns);
        set_number(r, "steps_at_stop", d->state.steps);
        set_number(r, "steps_at_end", guest_steps(d->guest.ram));
        set_number(r, "resident_on_arrival_bytes", d->resident);
    }
    if (err->status != RMIG_OK)
        json_object_set_new(r, "error", json_string(err->text));
    write_report(d->o, r);
}

static int dest_main(const struct options *o, const char *address) {
    struct dest d = {.o = o, .ram = {.fd = -1}, .progress = {.bar = isatty(2) && !o->no_progress}};
    struct rmig_error err = {0};
    guest_init(&d.guest, GUEST_THREAD, NULL, NULL);
    int status = EXIT_FAILED, rc = dest_listen(&d, address, &err);
    if (rc == RMIG_OK)
        rc = dest_receive(&d, &err);
    if (rc == RMIG_OK)
        rc = dest_run(&d, &err);
    if (rc != RMIG_OK)
        progress_line(&d.progress, "destination: failed: %s (%s)", err.text, rmig_status_name(rc));
    if (rc == RMIG_OK)
        status = d.arrival.ok && d.final.ok ? EXIT_OK : EXIT_NOT_VERIFIED;
    else if (rc == RMIG_ERR_HANDOVER)
        status = EXIT_HANDOVER;
    dest_report(&d, &err);
    rmig_sink_close(d.rmig);
    rmig_fabric_close(d.fabric);
    guest_close(&d.guest);
    ram_close(&d.ram);
    return status;
}

// >>local: the guest moves inside this process, by memcpy

static void copy_pages(const struct source *s, uint8_t *to, const uint64_t *dirty) {
    for (uint64_t page = 0; page < s->pages; page++)
        if (dirty == NULL || dirty[page / 64] >> (page % 64) & 1)
            memcpy(to + page * GUEST_PAGE, s->ram.shared + page * GUEST_PAGE, GUEST_PAGE);
}

static int local_move(struct source *s, struct dest *d, struct rmig_error *err) {
    int rc = guest_log_start(&s->guest, err);
    if (rc == RMIG_OK)
        rc = ram_open(&d->ram, s->ram.size, err);
    if (rc == RMIG_OK)
        copy_pages(s, d->ram.shared, NULL);
    for (int round = 2; rc == RMIG_OK && round <= 4; round++) {
        rc = guest_log_fetch(&s->guest, s->dirty, err);
        if (rc != RMIG_OK)
            break;
        progress_line(&s->progress, "round %d: %" PRIu64 " dirty pages", round, count_bits(s->dirty, s->pages));
        if (round == 4)
            rc = source_stop_guest(s, err);
        copy_pages(s, d->ram.shared, s->dirty);
    }
    if (rc == RMIG_OK)
        rc = guest_save_state(&s->guest, &d->state, err);
    d->state.begin_ns = d->state.stop_ns = s->stop_ns;
    if (rc == RMIG_OK)
        rc = dest_make_guest(d, err);
    d->finish_ns = guest_now();
    return rc;
}

static int local_main(const struct options *o) {
    struct source s = {.o = o, .ram = {.fd = -1}, .file = SNAPSHOT_NONE};
    struct dest d = {.o = o, .ram = {.fd = -1}};
    struct rmig_error err = {0};
    int status = EXIT_FAILED;
    guest_init(&s.guest, GUEST_THREAD, NULL, NULL);
    guest_init(&d.guest, GUEST_THREAD, NULL, NULL);
    int rc = source_open(&s, o, &err);
    if (rc == RMIG_OK) {
        guest_resume(&s.guest);
        rc = run_for(&s.guest, o->run_before_ns, &err);
    }
    if (rc == RMIG_OK)
        rc = local_move(&s, &d, &err);
    if (rc == RMIG_OK)
        rc = dest_run(&d, &err);
    if (rc != RMIG_OK)
        progress_line(&s.progress, "failed: %s (%s)", err.text, rmig_status_name(rc));
    else
        status = d.arrival.ok && d.final.ok ? EXIT_OK : EXIT_NOT_VERIFIED;
    dest_report(&d, &err);
    guest_close(&d.guest);
    ram_close(&d.ram);
    source_close(&s);
    return status;
}

// >>save: a snapshot of the guest, while it runs

/* Between two pieces of a round. */
static int save_progress(void *user, const struct rmig_stats *stats) {
    struct source *s = user;
    progress_bar(&s->progress, stats, s->round_total);
    return source_may_go_on(s, &s->gave_up);
}

static int save_round(struct source *s, const uint64_t *dirty, uint64_t bytes, struct rmig_error *err) {
    s->round_total = bytes;
    int rc = snapshot_round(&s->file, dirty, s->ram.size, err);
    rmig_mapped_writer_stats(s->file.writer, &s->stats);
    if (rc != RMIG_ERR_CANCELLED)
        return rc;
    *err = s->gave_up;
    return err->status;
}

static int save_open(struct source *s, struct rmig_error *err) {
    struct rmig_mapped_options opt = s->o->file;
    opt.progress = save_progress;
    opt.progress_user = s;
    int rc = ram_open_pinnable(&s->ram, err);
    return rc == RMIG_OK ? snapshot_create(&s->file, s->o->save, s->o->in_place, &opt, s->ram.pinnable, s->ram.size,
                                           s->ram.fd, err)
                         : rc;
}

/* It runs as soon as the file has its RAM and this process its state; the disk is waited for meanwhile. */
static int save_resume(struct source *s, struct rmig_error *err) {
    uint64_t steps = guest_steps(s->ram.shared);
    guest_resume(&s->guest);
    int rc = guest_wait_step(&s->guest, steps, err);
    s->first_step_ns = guest_now();
    guest_log_stop(&s->guest);
    return rc;
}

static int save_guest(struct source *s, struct rmig_error *err) {
    struct guest_state state;
    char size[16], held[16], time[24];
    s->deadline = deadline_of(s->o);
    s->round = save_round;
    int rc = save_open(s, err);
    if (rc == RMIG_OK)
        rc = guest_log_start(&s->guest, err); // before the first page is read
    s->begin_ns = s->fetch_ns = guest_now();
    if (rc == RMIG_OK)
        rc = source_converge(s, err);
    if (rc == RMIG_OK)
        rc = source_stop(s, &state, err);
    if (rc == RMIG_OK)
        rc = save_resume(s, err);
    if (rc == RMIG_OK)
        rc = snapshot_finish(&s->file, &state, err);
    if (rc != RMIG_OK)
        return rc;
    s->end_ns = guest_now();
    progress_line(&s->progress, "%s is whole: %s, %s of it on the disk; the guest stood still for %s", s->o->save,
                  human(s->file.bytes, size, sizeof size), human(s->file.allocated, held, sizeof held),
                  human_ns(s->first_step_ns - s->stop_ns, time, sizeof time));
    return RMIG_OK;
}

static int save_main(const struct options *o) {
    struct source s = {.o = o, .ram = {.fd = -1}, .file = SNAPSHOT_NONE};
    struct rmig_error err = {0};
    s.progress.bar = isatty(2) && !o->no_progress;
    guest_init(&s.guest, GUEST_THREAD, NULL, NULL);
    int status = EXIT_FAILED, rc = source_open(&s, o, &err);
    if (rc != RMIG_OK) {
        progress_line(&s.progress, "the guest cannot be started: %s", err.text);
    } else {
        guest_resume(&s.guest);
        rc = run_for(&s.guest, o->run_before_ns, &err);
        if (rc == RMIG_OK)
            rc = save_guest(&s, &err);
        status = source_run_on(&s, rc == RMIG_OK ? NULL : &err);
    }
    source_close(&s);
    return status;
}

// >>load: the guest of a snapshot

struct load {
    const struct options *o;
    struct progress progress;
    struct ram ram;
    struct guest guest;
    struct guest_state state;
    struct snapshot file;
    struct rmig_error gave_up; // why loading was
    uint64_t deadline, begin_ns, resume_ns, first_step_ns, loaded_ns;
    struct guest_verdict verdict;
};

static int load_may_go_on(const struct load *l, struct rmig_error *err) {
    char text[24];
    if (interrupted)
        return rmig_fail(err, RMIG_ERR_CANCELLED, 0, "cancelled by a signal");
    if (guest_now() > l->deadline)
        return rmig_fail(err, RMIG_ERR_TIMEOUT, 0, "not loaded within the --timeout of %s",
                         human_ns(l->o->timeout_ns, text, sizeof text));
    return RMIG_OK;
}

/* Between two pieces. */
static int load_progress(void *user, const struct rmig_stats *stats) {
    struct load *l = user;
    (void)stats;
    return load_may_go_on(l, &l->gave_up);
}

/* Everything that can be refused is, before there is a guest. */
static int load_open(struct load *l, struct rmig_error *err) {
    char is[32], max[32];
    struct rmig_mapped_options opt = l->o->file;
    opt.memory_is_zero = true;
    opt.progress = load_progress;
    opt.progress_user = l;
    int rc = snapshot_open(&l->file, l->o->load, &opt, &l->state, err);
    if (rc == RMIG_ERR_CANCELLED) {
        *err = l->gave_up;
        return err->status;
    }
    if (rc == RMIG_OK && l->state.layout.ram > l->o->ram_max)
        rc = rmig_fail(err, RMIG_ERR_SETUP, 0, "%s: RAM is %s: must be at most --ram-max, %s", l->o->load,
                       rmig_size_format(l->state.layout.ram, is, sizeof is),
                       rmig_size_format(l->o->ram_max, max, sizeof max));
    if (rc == RMIG_OK)
        rc = check_kind(l->o, &l->state, err);
    return rc == RMIG_OK ? ram_open(&l->ram, l->state.layout.ram, err) : rc;
}

static int load_ram(struct load *l, struct rmig_error *err) {
    if (l->o->lazy)
        return snapshot_load_start(&l->file, l->ram.shared, l->ram.size, l->ram.fd, err);
    int rc = snapshot_load(&l->file, l->ram.shared, l->ram.size, l->ram.fd, err);
    if (rc == RMIG_OK)
        l->loaded_ns = guest_now();
    if (rc != RMIG_ERR_CANCELLED)
        return rc;
    *err = l->gave_up;
    return err->status;
}

/* Nanoseconds that may be waited at once: at most these, and not beyond the deadline. */
static uint64_t load_wait_ns(const struct load *l, uint64_t most) {
    uint64_t now = guest_now(), left = l->deadline > now ? l->deadline - now : 0;
    return left < most ? left : most;
}

/* The guest fails too when its RAM cannot be loaded: then that is the reason. */
static int load_guest_failed(struct load *l, struct rmig_error *err) {
    struct rmig_error why = {0};
    if (!guest_has_failed(&l->guest, err))
        return RMIG_OK;
    if (l->o->lazy && snapshot_load_wait(&l->file, load_wait_ns(l, SECOND), &why) < RMIG_OK)
        *err = why;
    return err->status;
}

/* Waits for a step that was made here. RAM is looked at by way of its file: there a page that is not loaded reads as
   zero, and nothing happens to it. */
static int load_wait_step(struct load *l, struct rmig_error *err) {
    uint64_t steps = 0;
    while (steps <= l->state.steps) {
        struct timespec nap = guest_timespec(20000);
        int rc = load_guest_failed(l, err);
        if (rc == RMIG_OK)
            rc = load_may_go_on(l, err);
        if (rc == RMIG_OK && guest_now() > l->resume_ns + GUEST_PAUSE_NS)
            rc = rmig_fail(err, RMIG_ERR_SETUP, 0, "the guest made no step after step %" PRIu64 " within %llu ms",
                           l->state.steps, GUEST_PAUSE_NS / 1000000);
        if (rc != RMIG_OK)
            return rc;
        if (pread(l->ram.fd, &steps, sizeof steps, (off_t)sizeof steps * GUEST_STEPS_WORD) != (ssize_t)sizeof steps)
            return fail_errno(err, "reading the guest's RAM");
        if (steps <= l->state.steps)
            nanosleep(&nap, NULL);
    }
    l->first_step_ns = guest_now();
    return RMIG_OK;
}

/* While the guest runs. What is late has failed, loaded or not. */
static int load_wait_all(struct load *l, struct rmig_error *err) {
    for (;;) {
        int loading = snapshot_load_wait(&l->file, load_wait_ns(l, SLICE), err);
        if (loading == RMIG_OK)
            l->loaded_ns = guest_now();
        int rc = loading < RMIG_OK ? loading : load_guest_failed(l, err);
        if (rc == RMIG_OK)
            rc = load_may_go_on(l, err);
        if (rc != RMIG_OK || loading == RMIG_OK)
            return rc;
    }
}

static int load_start(struct load *l, struct rmig_error *err) {
    char a[24], b[24];
    l->begin_ns = guest_now();
    int rc = load_open(l, err);
    if (rc == RMIG_OK)
        rc = load_ram(l, err);
    l->guest.ram = l->ram.shared;
    if (rc == RMIG_OK)
        rc = guest_load_state(&l->guest, &l->state, err);
    l->resume_ns = guest_now();
    if (rc == RMIG_OK) {
        guest_resume(&l->guest);
        rc = load_wait_step(l, err);
    }
    if (rc == RMIG_OK && l->o->lazy)
        rc = load_wait_all(l, err);
    if (rc == RMIG_OK)
        progress_line(&l->progress, "the guest's first step came after %s, all was loaded after %s",
                      human_ns(l->first_step_ns - l->begin_ns, a, sizeof a),
                      human_ns(l->loaded_ns - l->begin_ns, b, sizeof b));
    return rc;
}

static int load_guest(struct load *l, struct rmig_error *err) {
    int rc = load_start(l, err);
    if (rc != RMIG_OK)
        return rc;
    uint64_t ran = guest_now() - l->resume_ns;
    rc = run_for(&l->guest, ran < l->o->run_after_ns ? l->o->run_after_ns - ran : 0, err);
    if (rc == RMIG_OK)
        rc = guest_pause(&l->guest, err);
    if (rc != RMIG_OK)
        return rc;
    uint64_t steps = guest_steps(l->ram.shared);
    l->verdict = guest_verify(&l->state.layout, l->ram.shared, steps);
    guest_registers_fit(&l->guest, steps, &l->verdict);
    progress_line(&l->progress, "memory after running on: %s: %s", l->verdict.ok ? "right" : "WRONG", l->verdict.text);
    return RMIG_OK;
}

static void load_report(const struct load *l, const struct rmig_error *err) {
    json_t *r = json_object();
    json_object_set_new(r, "role", json_string("load"));
    json_object_set_new(r, "outcome", json_string(err->status == RMIG_OK ? "loaded" : "failed"));
    json_object_set_new(r, "file", json_string(l->o->load));
    json_object_set_new(r, "lazy", json_boolean(l->o->lazy));
    json_object_set_new(r, "verified", json_boolean(l->verdict.ok));
    if (l->ram.size != 0) {
        json_object_set_new(r, "guest", json_string(guest_kind_name((enum guest_kind)l->state.kind)));
        set_number(r, "ram_bytes", l->ram.size);
        set_number(r, "file_bytes", l->file.bytes);
        set_number(r, "file_allocated_bytes", l->file.allocated);
        set_number(r, "ram_in_file_bytes", l->file.bytes_set);
        set_number(r, "rounds", l->state.rounds);
        set_number(r, "steps_at_stop", l->state.steps);
    }
    if (l->first_step_ns != 0)
        set_number(r, "first_step_ns", l->first_step_ns - l->begin_ns);
    if (l->loaded_ns != 0)
        set_number(r, "loaded_ns", l->loaded_ns - l->begin_ns);
    if (err->status == RMIG_OK) {
        set_number(r, "steps_at_end", guest_steps(l->ram.shared));
        json_object_set_new(r, "after_running", json_string(l->verdict.text));
    } else {
        json_object_set_new(r, "error", json_string(err->text));
    }
    write_report(l->o, r);
}

static int load_main(const struct options *o) {
    struct load l = {.o = o, .ram = {.fd = -1}, .file = SNAPSHOT_NONE};
    struct rmig_error err = {0};
    int status = EXIT_FAILED;
    l.deadline = deadline_of(o);
    guest_init(&l.guest, GUEST_THREAD, NULL, NULL);
    if (load_guest(&l, &err) != RMIG_OK)
        progress_line(&l.progress, "loading failed: %s (%s)", err.text, rmig_status_name(err.status));
    else
        status = l.verdict.ok ? EXIT_OK : EXIT_NOT_VERIFIED;
    load_report(&l, &err);
    guest_close(&l.guest); // first: it may wait for a page
    snapshot_close(&l.file);
    ram_close(&l.ram);
    return status;
}

// >>demo: both ends as processes of their own

struct end {
    const char *name;
    pid_t pid;
    int report; // pipe to read its report from
    int status; // exit status, 128 + n when killed by signal n; -1: still running
};

static int read_address(int fd, char *buf, size_t size) {
    struct pollfd p = {.fd = fd, .events = POLLIN};
    size_t n = 0;
    uint64_t deadline = guest_now() + 10 * SECOND;
    while (n < size - 1 && !interrupted && guest_now() < deadline) {
        if (poll(&p, 1, 50) <= 0)
            continue;
        ssize_t got = read(fd, buf + n, size - 1 - n);
        if (got <= 0)
            break;
        n += (size_t)got;
        if (buf[n - 1] == '\n') {
            buf[n - 1] = '\0';
            return RMIG_OK;
        }
    }
    fprintf(stderr, "the destination told no address to connect to\n");
    return RMIG_ERR_SETUP;
}

/* The child's side of fork. address: the pipe over which the destination tells where it listens. */
static int demo_child(struct options o, bool is_source, const int address[2], int report) {
    char text[128];
    prctl(PR_SET_PDEATHSIG, SIGTERM);
    o.report_fd = report;
    o.json = NULL;
    o.address_fd = address[1];
    if (!is_source) {
        close(address[0]);
        return dest_main(&o, o.address);
    }
    close(address[1]); // or the destination's end would never be seen
    return read_address(address[0], text, sizeof text) == RMIG_OK ? source_main(&o, text) : EXIT_FAILED;
}

static int demo_start(const struct options *o, struct end *end, const int address[2]) {
    int pipe_fd[2];
    if (pipe2(pipe_fd, O_CLOEXEC) != 0)
        return -1;
    end->status = -1;
    end->pid = fork();
    if (end->pid == 0) {
        close(pipe_fd[0]);
        exit(demo_child(*o, strcmp(end->name, "source") == 0, address, pipe_fd[1]));
    }
    close(pipe_fd[1]);
    end->report = pipe_fd[0];
    return end->pid < 0 ? -1 : 0;
}

/* Waits for both. Each ends by its own deadlines, so what is later than that is killed. A destination whose source
   ended before it connected would listen on: it is told; and both are when the demo itself is to end. */
static void demo_wait(struct end *end, uint64_t deadline) {
    uint64_t tell = UINT64_MAX;
    bool told = false;
    while (end[0].status < 0 || end[1].status < 0) {
        for (int i = 0; i < 2; i++) {
            int status;
            if (end[i].status >= 0 || waitpid(end[i].pid, &status, WNOHANG) != end[i].pid)
                continue;
            end[i].status = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
            if (WIFSIGNALED(status))
                fprintf(stderr, "the %s was killed by signal %d\n", end[i].name, WTERMSIG(status));
            if (i == 0 && end[i].status != EXIT_OK)
                tell = guest_now() + 3 * SECOND;
        }
        if (end[1].status < 0 && guest_now() > tell) {
            kill(end[1].pid, SIGTERM);
            tell = UINT64_MAX;
        }
        for (int i = 0; i < 2 && interrupted && !told; i++)
            if (end[i].status < 0)
                kill(end[i].pid, SIGTERM);
        told = interrupted;
        for (int i = 0; i < 2 && guest_now() > deadline; i++)
            if (end[i].status < 0 && kill(end[i].pid, SIGKILL) == 0)
                fprintf(stderr, "the %s did not end in time: killed\n", end[i].name);
        struct timespec nap = guest_timespec(10 * MS);
        nanosleep(&nap, NULL);
    }
}

static json_t *demo_read_report(const struct end *end) {
    json_t *r = json_loadfd(end->report, JSON_DISABLE_EOF_CHECK, NULL);
    close(end->report);
    return r != NULL ? r : json_object();
}

static uint64_t get_number(const json_t *r, const char *key) {
    return (uint64_t)json_integer_value(json_object_get(r, key));
}

static void demo_table(const struct options *o, const json_t *r) {
    char a[24], b[24];
    printf("guest        %s, %s of RAM, dirtying %s/s\n", json_string_value(json_object_get(r, "guest")),
           human(get_number(r, "ram_bytes"), a, sizeof a), human(get_number(r, "dirty_rate_bytes_per_s"), b, sizeof b));
    printf("rounds       %" PRIu64 "\n", get_number(r, "rounds"));
    printf("total time   %s\n", human_ns(get_number(r, "total_ns"), a, sizeof a));
    printf("throughput   %s/s\n", human(get_number(r, "throughput_bytes_per_s"), a, sizeof a));
    printf("downtime     %s (limit %s)\n", human_ns(get_number(r, "downtime_ns"), a, sizeof a),
           human_ns(o->downtime_ns, b, sizeof b));
    bool verified = json_is_true(json_object_get(r, "verified"));
    printf("verified     %s\n", verified ? "yes, on arrival and after running on" : "NO");
}

/* One report of two; the destination's word on what both know (the rounds), and on whether it is verified. */
static json_t *demo_merge(json_t *source, json_t *dest, const struct end *end) {
    if (end[1].status != EXIT_OK || end[0].status != EXIT_OK)
        json_object_set_new(dest, "verified", json_false());
    const char *error = json_string_value(json_object_get(source, "error"));
    json_object_del(source, "role");
    json_object_del(dest, "role");
    if (json_object_get(source, "guest") != NULL)
        json_object_del(dest, "guest");
    if (json_object_get(source, "ram_bytes") != NULL)
        json_object_del(dest, "ram_bytes");
    if (error != NULL)
        json_object_set_new(source, "source_error", json_string(error));
    json_object_update(source, dest);
    set_number(source, "source_exit", (uint64_t)end[0].status);
    set_number(source, "dest_exit", (uint64_t)end[1].status);
    json_decref(dest);
    return source;
}

static int demo_main(const struct options *o) {
    struct end end[2] = {{.name = "source"}, {.name = "destination"}};
    int address[2];
    if (pipe2(address, O_CLOEXEC) != 0 || demo_start(o, &end[1], address) != 0 ||
        demo_start(o, &end[0], address) != 0) {
        fprintf(stderr, "the demo's processes cannot be started: %s\n", strerror(errno));
        return EXIT_FAILED;
    }
    close(address[0]);
    close(address[1]);
    fprintf(stderr, "source is process %d, destination is process %d\n", end[0].pid, end[1].pid);
    uint64_t slack = 60 * SECOND + o->run_before_ns + o->run_after_ns;
    demo_wait(end, o->timeout_ns == 0 ? UINT64_MAX : guest_now() + o->timeout_ns + slack);
    json_t *source = demo_read_report(&end[0]), *dest = demo_read_report(&end[1]);
    json_t *report = demo_merge(source, dest, end);
    if (json_object_get(report, "downtime_ns") != NULL)
        demo_table(o, report);
    if (write_report(o, report) != 0)
        return EXIT_FAILED;
    if (end[0].status == EXIT_NOT_VERIFIED || end[1].status == EXIT_NOT_VERIFIED)
        return EXIT_NOT_VERIFIED;
    if (end[0].status == EXIT_HANDOVER || end[1].status == EXIT_HANDOVER)
        return EXIT_HANDOVER;
    return end[0].status == EXIT_OK && end[1].status == EXIT_OK ? EXIT_OK : EXIT_FAILED;
}

// >>options

enum option_key {
    KEY_CONNECT = 256,
    KEY_LISTEN,
    KEY_RAM,
    KEY_RAM_MAX,
    KEY_WORK,
    KEY_FILL,
    KEY_DIRTY_RATE,
    KEY_DOWNTIME,
    KEY_RUN_BEFORE,
    KEY_RUN_AFTER,
    KEY_MAX_ROUNDS,
    KEY_STRICT,
    KEY_FABRIC,
    KEY_PROVIDER,
    KEY_SET,
    KEY_GUEST,
    KEY_JSON,
    KEY_TIMEOUT,
    KEY_SABOTAGE,
    KEY_NO_PROGRESS,
    KEY_SAVE,
    KEY_LOAD,
    KEY_LAZY,
    KEY_THREADS,
    KEY_DIRECT,
    KEY_NO_SYNC,
    KEY_IN_PLACE
};

static const struct argp_option option_list[] = {
    {0, 0, 0, 0, "The guest:", 1},
    {"ram", KEY_RAM, "SIZE", 0, "RAM, a multiple of 2M from 16M to 256G (512M); dest takes what the source says", 1},
    {"working-set", KEY_WORK, "SIZE", 0, "what it keeps changing: a power of two (a quarter of RAM or less)", 1},
    {"fill", KEY_FILL, "SIZE", 0, "what holds data that never changes (half of RAM); the rest is zero", 1},
    {"dirty-rate", KEY_DIRTY_RATE, "BYTES", 0, "how much it dirties in a second, 0: as fast as it can (100M)", 1},
    {"guest", KEY_GUEST, "KIND", 0, "kvm, thread, or auto: kvm if a guest runs under it here (auto)", 1},
    {"run-before", KEY_RUN_BEFORE, "TIME", 0, "how long it runs before the migration begins (500ms)", 1},
    {"run-after", KEY_RUN_AFTER, "TIME", 0, "how long it runs on before it is verified at the end (1s)", 1},
    {0, 0, 0, 0, "The migration:", 2},
    {"connect", KEY_CONNECT, "HOST:PORT", 0, "source: where the destination listens", 2},
    {"listen", KEY_LISTEN, "HOST:PORT", 0, "dest, demo: where to listen, port 0: any (demo: 127.0.0.1:0)", 2},
    {"downtime", KEY_DOWNTIME, "TIME", 0, "the guest is stopped when the rest is expected to take no longer (50ms)", 2},
    {"max-rounds", KEY_MAX_ROUNDS, "N", 0, "rounds at most, at least 2; then the guest is stopped anyway (30)", 2},
    {"strict", KEY_STRICT, 0, 0, "after --max-rounds give up instead: the guest runs on at the source", 2},
    {"timeout", KEY_TIMEOUT, "TIME", 0, "give up when it is not done by then, 0: never (120s)", 2},
    {"ram-max", KEY_RAM_MAX, "SIZE", 0, "dest, load: largest RAM to accept (64G)", 2},
    {"fabric", KEY_FABRIC, "NAME", 0, "ofi (libfabric) or verbs (libibverbs, librdmacm) (ofi)", 2},
    {"provider", KEY_PROVIDER, "NAME", 0, "ofi: libfabric's provider; verbs: the device", 2},
    {"set", KEY_SET, "NAME=VALUE", 0, "set a parameter of rmig; may be repeated", 2},
    {0, 0, 0, 0, "Snapshot files (--downtime, --max-rounds, --strict and --timeout hold there too):", 3},
    {"save", KEY_SAVE, "FILE", 0, "local: as save FILE", 3},
    {"load", KEY_LOAD, "FILE", 0, "local: as load FILE", 3},
    {"lazy", KEY_LAZY, 0, 0, "load: the guest runs at once, pages come when it touches them", 3},
    {"threads", KEY_THREADS, "N", 0, "save, load: move pages by N threads, 1 to 64 (1)", 3},
    {"direct", KEY_DIRECT, 0, 0, "save, load: direct I/O, past the page cache", 3},
    {"no-sync", KEY_NO_SYNC, 0, 0, "save: do not wait until the file is on the disk", 3},
    {"in-place", KEY_IN_PLACE, 0, 0,
     "save: into FILE itself, which must be there: a file, or a block device; what it holds is lost at once", 3},
    {0, 0, 0, 0, "Results:", 4},
    {"json", KEY_JSON, "FILE", 0, "write the result there", 4},
    {"no-progress", KEY_NO_PROGRESS, 0, 0, "a line a round even on a terminal", 4},
    {"sabotage", KEY_SABOTAGE, "WHAT", 0,
     "spoil the migration, to see that the verifier notices: lose-page (a dirty page is not sent), invent-word "
     "(a word is changed)",
     4},
    {0}};

static void option_size(const char *name, const char *text, uint64_t *out, struct argp_state *state) {
    struct rmig_error err = {0};
    if (rmig_size_parse(text, out, &err) != RMIG_OK)
        argp_error(state, "--%s: %s", name, err.text);
}

static void option_time(const char *name, const char *text, uint64_t *out, struct argp_state *state) {
    if (!parse_duration(text, out))
        argp_error(state, "--%s: \"%s\" is no time: it must be a number with ms, s or m (without: ms)", name, text);
}

static void option_set(const char *text, struct options *o, struct argp_state *state) {
    struct rmig_error err = {0};
    char name[64];
    const char *equals = strchr(text, '=');
    if (equals == NULL || (size_t)(equals - text) >= sizeof name) {
        argp_error(state, "--set: \"%s\" must be NAME=VALUE", text);
        return;
    }
    memcpy(name, text, (size_t)(equals - text));
    name[equals - text] = '\0';
    if (rmig_set_param(&o->cfg, name, equals + 1, &err) != RMIG_OK)
        argp_error(state, "--set: %s", err.text);
}

/* The index of text among names, or an error that lists them. */
static int option_choice(const char *name, const char *text, const char *const *names, int n,
                         struct argp_state *state) {
    char list[120] = "";
    for (int i = 0; i < n; i++) {
        if (strcmp(text, names[i]) == 0)
            return i;
        snprintf(list + strlen(list), sizeof list - strlen(list), "%s%s", i > 0 ? ", " : "", names[i]);
    }
    argp_error(state, "%s: \"%s\" must be one of: %s", name, text, list);
    return 0;
}

static uint64_t option_number(const char *name, const char *text, uint64_t min, uint64_t max,
                              struct argp_state *state) {
    char *end, limit[32] = "on";
    errno = 0;
    uint64_t value = strtoull(text, &end, 10);
    if (max != UINT64_MAX)
        snprintf(limit, sizeof limit, "to %" PRIu64, max);
    if (end == text || *end != '\0' || errno != 0 || *text == '-' || value < min || value > max)
        argp_error(state, "--%s: \"%s\" must be a number from %" PRIu64 " %s", name, text, min, limit);
    return value;
}

static error_t option_argument(const char *text, struct options *o, struct argp_state *state) {
    static const char *const modes[] = {"source", "dest", "demo", "local", "save", "load"};
    const char **file = o->mode == MODE_SAVE ? &o->save : o->mode == MODE_LOAD ? &o->load : NULL;
    if (o->mode == MODE_NONE)
        o->mode = (enum mode)(MODE_SOURCE + option_choice("the command", text, modes, 6, state));
    else if (file != NULL && *file == NULL)
        *file = text;
    else
        argp_error(state, "\"%s\" is one word too many: one command is enough%s", text,
                   file != NULL ? ", with one FILE" : "");
    return 0;
}

/* local with a file is save or load; what concerns files makes sense nowhere else. */
static void option_end_files(struct options *o, struct argp_state *state) {
    if (o->save != NULL && o->load != NULL)
        argp_error(state, "--save and --load: only one of them at a time");
    if (o->mode == MODE_LOCAL && o->save != NULL)
        o->mode = MODE_SAVE;
    if (o->mode == MODE_LOCAL && o->load != NULL)
        o->mode = MODE_LOAD;
    bool save = o->mode == MODE_SAVE, load = o->mode == MODE_LOAD;
    if ((save && o->save == NULL) || (load && o->load == NULL))
        argp_error(state, "%s needs a FILE", save ? "save" : "load");
    if ((o->save != NULL && !save) || (o->load != NULL && !load))
        argp_error(state, "--save and --load belong to local");
    if (o->lazy && !load)
        argp_error(state, "--lazy belongs to load");
    if ((o->file.threads != 0 || o->file.direct) && !save && !load)
        argp_error(state, "--threads and --direct belong to save and load");
    if ((o->file.no_sync || o->in_place) && !save)
        argp_error(state, "--%s belongs to save", o->in_place ? "in-place" : "no-sync");
}

static error_t option_end(struct options *o, struct argp_state *state) {
    struct guest_layout layout;
    struct rmig_error err = {0};
    option_end_files(o, state);
    if (o->mode == MODE_NONE)
        argp_error(state, "a command is missing: one of source, dest, demo, local, save, load");
    else if (o->mode == MODE_SOURCE && o->address == NULL)
        argp_error(state, "source needs --connect HOST:PORT");
    else if (o->mode == MODE_DEST && o->address == NULL)
        argp_error(state, "dest needs --listen HOST:PORT");
    else if (o->mode != MODE_DEST && o->mode != MODE_LOAD &&
             layout_make(&layout, o->ram, o->work, o->fill, o->dirty_rate, &err) != RMIG_OK)
        argp_error(state, "%s", err.text);
    if (o->mode == MODE_DEMO && o->address == NULL)
        o->address = "127.0.0.1:0";
    return 0;
}

static error_t option_parse(int key, char *arg, struct argp_state *state) {
    static const char *const kinds[] = {"auto", "kvm", "thread"};
    static const char *const sabotages[] = {"none", "lose-page", "invent-word"};
    struct options *o = state->input;
    switch (key) {
    case KEY_CONNECT:
    case KEY_LISTEN:
        o->address = arg;
        break;
    case KEY_RAM:
        option_size("ram", arg, &o->ram, state);
        break;
    case KEY_RAM_MAX:
        option_size("ram-max", arg, &o->ram_max, state);
        break;
    case KEY_WORK:
        option_size("working-set", arg, &o->work, state);
        break;
    case KEY_FILL:
        option_size("fill", arg, &o->fill, state);
        break;
    case KEY_DIRTY_RATE:
        option_size("dirty-rate", arg, &o->dirty_rate, state);
        break;
    case KEY_DOWNTIME:
        option_time("downtime", arg, &o->downtime_ns, state);
        break;
    case KEY_RUN_BEFORE:
        option_time("run-before", arg, &o->run_before_ns, state);
        break;
    case KEY_RUN_AFTER:
        option_time("run-after", arg, &o->run_after_ns, state);
        break;
    case KEY_TIMEOUT:
        option_time("timeout", arg, &o->timeout_ns, state);
        break;
    case KEY_MAX_ROUNDS:
        o->max_rounds = option_number("max-rounds", arg, 2, UINT64_MAX, state);
        break;
    case KEY_STRICT:
        o->strict = true;
        break;
    case KEY_FABRIC:
        o->fabric = arg;
        break;
    case KEY_PROVIDER:
        o->provider = arg;
        break;
    case KEY_SET:
        option_set(arg, o, state);
        break;
    case KEY_GUEST:
        o->guest = option_choice("--guest", arg, kinds, 3, state);
        break;
    case KEY_JSON:
        o->json = arg;
        break;
    case KEY_SABOTAGE:
        o->sabotage = (enum sabotage)option_choice("--sabotage", arg, sabotages, 3, state);
        break;
    case KEY_NO_PROGRESS:
        o->no_progress = true;
        break;
    case KEY_SAVE:
        o->save = arg;
        break;
    case KEY_LOAD:
        o->load = arg;
        break;
    case KEY_LAZY:
        o->lazy = true;
        break;
    case KEY_THREADS:
        o->file.threads = (uint32_t)option_number("threads", arg, 1, RMIG_MAPPED_THREADS_MAX, state);
        break;
    case KEY_DIRECT:
        o->file.direct = true;
        break;
    case KEY_IN_PLACE:
        o->in_place = true;
        break;
    case KEY_NO_SYNC:
        o->file.no_sync = true;
        break;
    case ARGP_KEY_ARG:
        return option_argument(arg, o, state);
    case ARGP_KEY_END:
        return option_end(o, state);
    default:
        return ARGP_ERR_UNKNOWN;
    }
    return 0;
}

int main(int argc, char **argv) {
    struct options o = {.ram = 512 * RMIG_MIB, .ram_max = 64 * RMIG_GIB, .work = UINT64_MAX, .fill = UINT64_MAX};
    whole_file_hold_standard();
    o.dirty_rate = 100 * RMIG_MIB;
    o.downtime_ns = 50 * MS;
    o.run_before_ns = 500 * MS;
    o.run_after_ns = SECOND;
    o.timeout_ns = 120 * SECOND;
    o.max_rounds = 30;
    o.address_fd = o.report_fd = -1;
    struct argp argp = {option_list,
                        option_parse,
                        "source|dest|demo|local\nsave FILE\nload FILE",
                        "Migrates a running guest to another process by rmig, or into a snapshot file and from there, "
                        "and verifies that its memory arrived exactly.\vSizes take K, M, G, T. Exit status: 0 moved, "
                        "saved or loaded, and verified, 1 memory is wrong, 2 usage, 3 the migration, the snapshot or "
                        "the loading failed (the guest runs on at the source), 4 the link broke during the handover.",
                        0,
                        0,
                        0};
    argp_err_exit_status = EXIT_USAGE;
    argp_parse(&argp, argc, argv, 0, NULL, &o);
    struct sigaction action = {.sa_handler = on_signal, .sa_flags = (int)SA_RESETHAND}; // the second one ends us
    sigaction(SIGINT, &action, NULL);
    sigaction(SIGTERM, &action, NULL);
    action.sa_flags = 0; // of a terminal that closes several may come
    whole_file_catch_signals(&action);
    signal(SIGPIPE, SIG_IGN);
    switch (o.mode) {
    case MODE_SOURCE:
        return source_main(&o, o.address);
    case MODE_DEST:
        return dest_main(&o, o.address);
    case MODE_DEMO:
        return demo_main(&o);
    case MODE_LOCAL:
        return local_main(&o);
    case MODE_SAVE:
        return save_main(&o);
    case MODE_LOAD:
        return load_main(&o);
    case MODE_NONE:
    default:
        return EXIT_USAGE;
    }
}
