/*
ofi_raw - how fast libfabric alone writes memory from one process to another: the yardstick for rmig over libfabric

    cc -O2 -o ofi_raw ofi_raw.c -lfabric
    ofi_raw [--bytes 2G] [--write 1M] [--depth 64] [--every 1] [--provider tcp] [--address 127.0.0.1] [--touched]
            [--spin]

The target is a child process with --bytes of memory; the initiator writes all of it once, in writes of --write bytes,
--depth of them outstanding, each --every-th with a completion that says it was delivered (FI_DELIVERY_COMPLETE). Both
wait on their completion queue's descriptor; with --spin they poll. --touched: the target's memory was touched before,
as a populated guest's is. The target then compares every word.
Prints one line: {"bytes":..,"ns":..}, the time from the first post to the last completion.
*/
#define _GNU_SOURCE
#include <errno.h>
#include <inttypes.h>
#include <netinet/in.h>
#include <poll.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <rdma/fabric.h>
#include <rdma/fi_cm.h>
#include <rdma/fi_domain.h>
#include <rdma/fi_endpoint.h>
#include <rdma/fi_eq.h>
#include <rdma/fi_errno.h>
#include <rdma/fi_rma.h>

#define SILENCE_NS 30000000000ull // without any progress

struct options {
    uint64_t bytes, write, depth, every;
    const char *provider, *address;
    bool touched, spin;
};

struct side {
    const struct options *opt;
    const char *name;
    struct fi_info *info;
    struct fid_fabric *fabric;
    struct fid_domain *domain;
    struct fid_eq *eq;
    struct fid_cq *cq;
    struct fid_pep *pep;
    struct fid_ep *ep;
    struct fid_mr *mr;
    uint64_t *memory;
    uint64_t heard; // when there was progress last
    bool down; // the peer has shut the connection
};

struct hello { // what the target tells: where it listens, and its memory's key
    struct sockaddr_storage name;
    uint64_t name_size, key, base;
};

static uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

__attribute__((noreturn, format(printf, 2, 3))) static void die(const struct side *s, const char *format, ...) {
    va_list args;
    va_start(args, format);
    fprintf(stderr, "ofi_raw: %s: ", s->name);
    vfprintf(stderr, format, args);
    fprintf(stderr, "\n");
    va_end(args);
    exit(1);
}

static void check(const struct side *s, ssize_t ret, const char *what) {
    if (ret < 0)
        die(s, "%s: %s (%zd)", what, fi_strerror((int)-ret), -ret);
}

static struct fi_info *get_info(const struct side *s, const char *node, const char *service, uint64_t flags) {
    struct fi_info *hints = fi_allocinfo(), *info = NULL;
    if (hints == NULL)
        die(s, "out of memory");
    hints->caps = FI_MSG | FI_RMA;
    hints->mode = FI_CONTEXT | FI_CONTEXT2;
    hints->addr_format = FI_SOCKADDR;
    hints->ep_attr->type = FI_EP_MSG;
    hints->domain_attr->threading = FI_THREAD_DOMAIN;
    hints->domain_attr->control_progress = FI_PROGRESS_MANUAL;
    hints->domain_attr->data_progress = FI_PROGRESS_MANUAL;
    hints->domain_attr->mr_mode = FI_MR_LOCAL | FI_MR_VIRT_ADDR | FI_MR_ALLOCATED | FI_MR_PROV_KEY;
    hints->tx_attr->op_flags = FI_DELIVERY_COMPLETE;
    hints->tx_attr->msg_order = FI_ORDER_WAW;
    hints->tx_attr->size = s->opt->depth;
    hints->fabric_attr->prov_name = strdup(s->opt->provider);
    check(s, fi_getinfo(FI_VERSION(1, 11), node, service, flags, hints, &info), "fi_getinfo");
    fi_freeinfo(hints);
    return info;
}

static void open_eq(struct side *s) {
    struct fi_eq_attr attr = {.wait_obj = FI_WAIT_FD};
    check(s, fi_fabric(s->info->fabric_attr, &s->fabric, NULL), "fi_fabric");
    check(s, fi_eq_open(s->fabric, &attr, &s->eq, NULL), "fi_eq_open");
}

static void open_endpoint(struct side *s, struct fi_info *info) {
    struct fi_cq_attr attr = {.wait_obj = FI_WAIT_FD, .format = FI_CQ_FORMAT_CONTEXT, .size = s->opt->depth + 16};
    check(s, fi_cq_open(s->domain, &attr, &s->cq, NULL), "fi_cq_open");
    check(s, fi_endpoint(s->domain, info, &s->ep, NULL), "fi_endpoint");
    check(s, fi_ep_bind(s->ep, &s->eq->fid, 0), "fi_ep_bind");
    check(s, fi_ep_bind(s->ep, &s->cq->fid, FI_TRANSMIT | FI_RECV | FI_SELECTIVE_COMPLETION), "fi_ep_bind");
    check(s, fi_enable(s->ep), "fi_enable");
}

static void make_memory(struct side *s, uint64_t access, uint64_t key) {
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    s->memory = mmap(NULL, s->opt->bytes, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (s->memory == MAP_FAILED)
        die(s, "mmap of %" PRIu64 " bytes: %s", s->opt->bytes, strerror(errno));
    check(s, fi_mr_reg(s->domain, s->memory, s->opt->bytes, access, 0, key, 0, &s->mr, NULL), "fi_mr_reg");
}

/* Sleeps until a queue may hold something, no longer than 100 ms; dies after
 * too long a silence. */
static void wait_some(struct side *s) {
    struct fid *fids[2] = {&s->eq->fid, s->cq == NULL ? NULL : &s->cq->fid};
    int n = s->cq == NULL ? 1 : 2;
    struct pollfd p[2];
    if (now_ns() - s->heard > SILENCE_NS)
        die(s, "no progress for %llu s", SILENCE_NS / 1000000000);
    if (s->opt->spin || fi_trywait(s->fabric, fids, n) != 0)
        return;
    for (int i = 0; i < n; i++) {
        check(s, fi_control(fids[i], FI_GETWAIT, &p[i].fd), "FI_GETWAIT");
        p[i].events = POLLIN;
    }
    if (poll(p, (nfds_t)n, 100) < 0 && errno != EINTR)
        die(s, "poll: %s", strerror(errno));
}

/* Reads one event of the event queue if there is one. */
static bool read_event(struct side *s, uint32_t *event, struct fi_eq_cm_entry *entry) {
    ssize_t n = fi_eq_read(s->eq, event, entry, sizeof *entry, 0);
    if (n == -FI_EAGAIN)
        return false;
    if (n == -FI_EAVAIL) {
        struct fi_eq_err_entry e = {0};
        fi_eq_readerr(s->eq, &e, 0);
        die(s, "connection: %s", fi_strerror(e.err));
    }
    check(s, n, "fi_eq_read");
    s->heard = now_ns();
    return true;
}

static void wait_event(struct side *s, uint32_t wanted, struct fi_eq_cm_entry *entry) {
    uint32_t event = 0;
    for (;;) {
        if (s->cq != NULL)
            fi_cq_read(s->cq, NULL, 0); // progress
        if (read_event(s, &event, entry))
            break;
        wait_some(s);
    }
    if (event != wanted)
        die(s, "event %u instead of %u", event, wanted);
}

static int read_completions(struct side *s, struct fi_cq_entry *e, size_t n) {
    ssize_t got = fi_cq_read(s->cq, e, n);
    if (got == -FI_EAGAIN)
        return 0;
    if (got == -FI_EAVAIL) {
        struct fi_cq_err_entry err = {0};
        fi_cq_readerr(s->cq, &err, 0);
        die(s, "completion: %s", fi_strerror(err.err));
    }
    check(s, got, "fi_cq_read");
    s->heard = now_ns();
    return (int)got;
}

// the target

static void compare(const struct side *s) {
    for (uint64_t i = 0; i < s->opt->bytes / 8; i++)
        if (s->memory[i] != i + 1)
            die(s, "word %" PRIu64 " is %" PRIu64 " instead of %" PRIu64, i, s->memory[i], i + 1);
}

static void tell_hello(struct side *s, int out) {
    struct hello hello = {.name_size = sizeof hello.name, .key = fi_mr_key(s->mr)};
    size_t size = sizeof hello.name;
    check(s, fi_getname(&s->pep->fid, &hello.name, &size), "fi_getname");
    hello.name_size = size;
    hello.base = (s->info->domain_attr->mr_mode & FI_MR_VIRT_ADDR) != 0 ? (uint64_t)(uintptr_t)s->memory : 0;
    if (write(out, &hello, sizeof hello) != (ssize_t)sizeof hello)
        die(s, "the initiator is gone");
}

static void run_target(const struct options *opt, int out) {
    struct side s = {.opt = opt, .name = "target", .heard = now_ns()};
    struct fi_eq_cm_entry entry;
    uint32_t event = 0;
    s.info = get_info(&s, opt->address, "0", FI_SOURCE);
    open_eq(&s);
    check(&s, fi_domain(s.fabric, s.info, &s.domain, NULL), "fi_domain");
    make_memory(&s, FI_REMOTE_WRITE, 0x1234);
    if (opt->touched)
        memset(s.memory, 0xff, opt->bytes);
    check(&s, fi_passive_ep(s.fabric, s.info, &s.pep, NULL), "fi_passive_ep");
    check(&s, fi_pep_bind(s.pep, &s.eq->fid, 0), "fi_pep_bind");
    check(&s, fi_listen(s.pep), "fi_listen");
    tell_hello(&s, out);
    s.heard = now_ns();
    wait_event(&s, FI_CONNREQ, &entry);
    open_endpoint(&s, entry.info);
    check(&s, fi_accept(s.ep, NULL, 0), "fi_accept");
    fi_freeinfo(entry.info);
    wait_event(&s, FI_CONNECTED, &entry);
    while (!s.down) { // data arrives while we read the queue
        ssize_t n = fi_cq_read(s.cq, NULL, 0);
        if (n != -FI_EAGAIN && n != -FI_EAVAIL)
            check(&s, n, "fi_cq_read");
        s.down = read_event(&s, &event, &entry) && event == FI_SHUTDOWN;
        s.heard = now_ns(); // the initiator keeps the time; if it dies the
                            // connection goes down
        if (!s.down)
            wait_some(&s);
    }
    compare(&s);
    exit(0);
}

// the initiator

static bool post(struct side *s, const struct hello *to, uint64_t offset, bool signal, struct fi_context2 *context) {
    uint64_t left = s->opt->bytes - offset, n = left < s->opt->write ? left : s->opt->write;
    struct iovec iov = {.iov_base = (char *)s->memory + offset, .iov_len = n};
    struct fi_rma_iov remote = {.addr = to->base + offset, .len = n, .key = to->key};
    void *desc = fi_mr_desc(s->mr);
    struct fi_msg_rma msg = {.msg_iov = &iov, .desc = &desc, .iov_count = 1, .rma_iov = &remote, .rma_iov_count = 1};
    msg.context = context;
    ssize_t ret = fi_writemsg(s->ep, &msg, signal ? FI_COMPLETION | FI_DELIVERY_COMPLETE : 0);
    if (ret == -FI_EAGAIN)
        return false;
    check(s, ret, "fi_writemsg");
    return true;
}

/* Writes everything; returns when the last write is delivered. A completion
 * stands for all writes up to its own (FI_ORDER_WAW). */
static uint64_t write_all(struct side *s, const struct hello *to) {
    uint64_t writes = (s->opt->bytes + s->opt->write - 1) / s->opt->write, posted = 0, done = 0;
    struct fi_context2 *contexts = calloc(s->opt->depth, sizeof *contexts);
    uint64_t *position = calloc(s->opt->depth, sizeof *position); // of the write in this slot
    struct fi_cq_entry e[16];
    if (contexts == NULL || position == NULL)
        die(s, "out of memory");
    uint64_t start = now_ns();
    while (done < writes) {
        bool full = false;
        while (!full && posted < writes && posted - done < s->opt->depth) {
            bool signal = (posted + 1) % s->opt->every == 0 || posted + 1 == writes;
            uint64_t slot = posted % s->opt->depth;
            position[slot] = posted + 1;
            full = !post(s, to, posted * s->opt->write, signal, &contexts[slot]);
            posted += full ? 0 : 1;
        }
        int n = read_completions(s, e, 16);
        for (int i = 0; i < n; i++) {
            uint64_t at = position[(struct fi_context2 *)e[i].op_context - contexts];
            done = at > done ? at : done;
        }
        if (n == 0)
            wait_some(s);
    }
    uint64_t ns = now_ns() - start;
    free(contexts);
    free(position);
    return ns;
}

static uint64_t run_initiator(const struct options *opt, int in) {
    struct side s = {.opt = opt, .name = "initiator", .heard = now_ns()};
    struct hello to;
    struct fi_eq_cm_entry entry;
    char port[16];
    if (read(in, &to, sizeof to) != (ssize_t)sizeof to)
        die(&s, "the target is gone");
    const struct sockaddr *name = (const struct sockaddr *)&to.name;
    in_port_t number = name->sa_family == AF_INET6 ? ((const struct sockaddr_in6 *)&to.name)->sin6_port
                                                   : ((const struct sockaddr_in *)&to.name)->sin_port;
    snprintf(port, sizeof port, "%u", (unsigned)ntohs(number));
    s.info = get_info(&s, opt->address, port, 0);
    open_eq(&s);
    check(&s, fi_domain(s.fabric, s.info, &s.domain, NULL), "fi_domain");
    make_memory(&s, FI_WRITE, 0x4321);
    for (uint64_t i = 0; i < opt->bytes / 8; i++)
        s.memory[i] = i + 1;
    open_endpoint(&s, s.info);
    check(&s, fi_connect(s.ep, s.info->dest_addr, NULL, 0), "fi_connect");
    s.heard = now_ns();
    wait_event(&s, FI_CONNECTED, &entry);
    uint64_t ns = write_all(&s, &to);
    check(&s, fi_shutdown(s.ep, 0), "fi_shutdown");
    return ns;
}

// the command line

static uint64_t size_of(const char *name, const char *text) {
    char *end = NULL;
    unsigned shift = 0;
    errno = 0;
    uint64_t n = strtoull(text, &end, 10);
    static const char suffix[] = "KMGT";
    const char *at = *end == '\0' ? NULL : strchr(suffix, *end & ~0x20);
    if (at != NULL && *at != '\0') {
        shift = 10 * (unsigned)(at - suffix + 1);
        end++;
    }
    if (errno != 0 || *end != '\0' || end == text || text[0] == '-' || n == 0 || n > UINT64_MAX >> shift) {
        fprintf(stderr,
                "ofi_raw: %s '%s': a number above 0 is needed, with K, M, G or T "
                "if you like\n",
                name, text);
        exit(2);
    }
    return n << shift;
}

static void parse(int argc, char **argv, struct options *opt) {
    struct {
        const char *name;
        uint64_t *size;
        const char **text;
        bool *flag;
    } known[] = {{"--bytes", &opt->bytes, NULL, NULL},       {"--write", &opt->write, NULL, NULL},
                 {"--depth", &opt->depth, NULL, NULL},       {"--every", &opt->every, NULL, NULL},
                 {"--provider", NULL, &opt->provider, NULL}, {"--address", NULL, &opt->address, NULL},
                 {"--touched", NULL, NULL, &opt->touched},   {"--spin", NULL, NULL, &opt->spin}};
    for (int i = 1; i < argc; i++) {
        size_t k = 0, count = sizeof known / sizeof known[0];
        while (k < count && strcmp(argv[i], known[k].name) != 0)
            k++;
        if (k == count || (known[k].flag == NULL && i + 1 == argc)) {
            fprintf(stderr, "ofi_raw: '%s' %s\n", argv[i], k == count ? "is no option" : "needs a value");
            exit(2);
        }
        if (known[k].flag != NULL)
            *known[k].flag = true;
        else if (known[k].text != NULL)
            *known[k].text = argv[++i];
        else {
            *known[k].size = size_of(known[k].name, argv[i + 1]);
            i++;
        }
    }
    if (opt->bytes % 8 != 0 || opt->depth > 1u << 20 || opt->every > opt->depth) {
        fprintf(stderr, "ofi_raw: --bytes must be a multiple of 8, --depth at most "
                        "1M, --every at most --depth\n");
        exit(2);
    }
}

int main(int argc, char **argv) {
    struct options opt = {.bytes = (uint64_t)2 << 30, .write = 1 << 20, .depth = 64, .every = 1};
    int hello[2], status = 0;
    opt.provider = "tcp";
    opt.address = "127.0.0.1";
    parse(argc, argv, &opt);
    if (pipe(hello) != 0) {
        perror("ofi_raw: pipe");
        return 1;
    }
    pid_t target = fork();
    if (target < 0) {
        perror("ofi_raw: fork");
        return 1;
    }
    if (target == 0) {
        close(hello[0]);
        run_target(&opt, hello[1]);
    }
    close(hello[1]);
    uint64_t ns = run_initiator(&opt, hello[0]);
    if (waitpid(target, &status, 0) != target || status != 0) {
        fprintf(stderr, "ofi_raw: the target failed\n");
        return 1;
    }
    printf("{\"bytes\":%" PRIu64 ",\"ns\":%" PRIu64 "}\n", opt.bytes, ns);
    return 0;
}
