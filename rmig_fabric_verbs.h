/*
rmig_fabric_verbs.h - a fabric for rmig.h over libibverbs and librdmacm: InfiniBand, RoCE and iWARP adapters

    Do this
        #define RMIG_IMPLEMENTATION
        #include "rmig.h"
        #include "rmig_fabric_verbs.h"
    in exactly *one* C or C++ file, and include it without the macro elsewhere. Link with -lrdmacm -libverbs (rdma-core
34 or later). Only the file with the implementation needs their headers. It uses POSIX clocks, poll and getaddrinfo:
under -std=c11 either include it first (it then defines _DEFAULT_SOURCE if no feature macro is defined) or define a
feature macro yourself.

USE

        struct rmig_error err;
        struct rmig_fabric *fabric = rmig_verbs_open(NULL, &err);
        if (fabric == NULL)
            fprintf(stderr, "%s\n", err.text);
        ...                             // rmig_source_open(fabric, ...) or rmig_sink_open(fabric, ...)
        rmig_fabric_close(fabric);

    This is the fabric whose peer can be a stock QEMU (`rdma:HOST:PORT`): private data travels as the protocol wants it.

ADDRESSES

    "host:port", "10.0.0.2:4444", "[fd00::2]:4444", "[fe80::2%eth0]:4444". The IP address chooses the adapter: it must
be one of an RDMA interface's own addresses to listen on (or ":4444": all, "0.0.0.0:4444": all of IPv4), and be reached
through one to connect to. A name is listened on at all of its addresses that are an RDMA interface's, and connected to
at the first that takes the connection; link-local ones that come without their interface are left out. Host names are
looked up by the call that opens the endpoint, which may block for as long as the resolver does; numeric addresses do
not.

MEMORY

    Registered memory is pinned. The kernel counts it against RLIMIT_MEMLOCK (`ulimit -l`) unless the process has
CAP_IPC_LOCK, and it cannot exceed the memory limit of the process's control group. Before the first page is sent rmig
asks whether what it is sure to pin may be; see rmig_verbs_options.on_demand for adapters that need not pin. Memory on
huge pages is registered as such by the kernel: fewer entries in the adapter's tables, nothing to set.

WAITING

    Two descriptors for a connection (completions, events of the connection manager), one for a listener; the first of
either on a device opens that, which takes two more until the process ends. All close on exec. No thread, no busy
polling unless asked for.

WHO MAY WRITE

    Each connection has a protection domain of its own: no key is good on another. A connection that is cut has its
queue pair destroyed. Mellanox's and NVIDIA's adapters and the kernel's software RoCE also take the right to write away
from a connection that goes on (caps.revokes).

IWARP

    A write's completion only says that the data is on its way, which the core knows (caps.completion_is_delivery). The
active side of an iWARP connection must send first: two rmig ends do (the source's HELLO). A plain version 1 source
waits for the sink's READY instead; that works where the adapter has the peer-to-peer mode of RFC 6581, and with the
kernel's software iWARP.

LICENCE

    MIT, see the end of rmig.h.
*/
#ifndef RMIG_FABRIC_VERBS_H
#define RMIG_FABRIC_VERBS_H

#if defined(RMIG_IMPLEMENTATION) && defined(__STRICT_ANSI__) && !defined(_DEFAULT_SOURCE) && !defined(_GNU_SOURCE) &&  \
    !defined(_POSIX_C_SOURCE)
#define _DEFAULT_SOURCE 1
#endif

#include "rmig.h"

#ifdef RMIG_NAMESPACE
#define rmig_verbs_open RMIG__NAME(rmig_verbs_open)
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* On-demand paging: the adapter takes page faults instead of having memory pinned. */
enum rmig_verbs_on_demand {
    RMIG_VERBS_ON_DEMAND_IF_REFUSED, // where pinning is refused and the adapter can do it
    RMIG_VERBS_ON_DEMAND_NEVER,
    RMIG_VERBS_ON_DEMAND_ALWAYS // registration fails where the adapter cannot
};

/* Zero-initialise it: then everything has its default. */
struct rmig_verbs_options {
    const char *device; // as `rdma link` names it ("mlx5_0"): addresses that lead elsewhere are not taken. NULL: any
    enum rmig_verbs_on_demand on_demand; // guest memory only; control buffers are always pinned
    bool poll; // busy poll: no descriptors to wait on, waits only yield the processor. For cores to spare
};

/* Opens a fabric. options NULL: all defaults. Returns NULL with *err filled in (err may be NULL): RMIG_ERR_FABRIC when
   there is no RDMA device, or none of that name; RMIG_ERR_NO_MEMORY. Close it with rmig_fabric_close. */
RMIG_API struct rmig_fabric *rmig_verbs_open(const struct rmig_verbs_options *options, struct rmig_error *err);

#ifdef __cplusplus
}
#endif

#endif // RMIG_FABRIC_VERBS_H

#if defined(RMIG_IMPLEMENTATION) && !defined(RMIG_FABRIC_VERBS_IMPLEMENTATION_DONE)
#define RMIG_FABRIC_VERBS_IMPLEMENTATION_DONE

// >>verbs: rdma-core and the operating system

#include <errno.h>
#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <poll.h>
#include <sched.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include <infiniband/verbs.h>
#include <rdma/rdma_cma.h>

#ifndef CLOCK_MONOTONIC
#error "rmig_fabric_verbs.h needs POSIX: compile with -std=gnu11 or define _DEFAULT_SOURCE before the first #include"
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* Private data that rdma_cm carries over RDMA_PS_TCP: rdma_connect(3), rdma_accept(3), rdma_reject(3). */
#define RMIG__VERBS_REQUEST_DATA 56
#define RMIG__VERBS_REPLY_DATA 196
#define RMIG__VERBS_REJECT_DATA 148
#define RMIG__VERBS_CM_DATA 512 // that an event may bring: more than any transport has

#define RMIG__VERBS_BACKLOG 16
#define RMIG__VERBS_FREE_PORTS 8 // tried until one is free at all addresses of a name
#define RMIG__VERBS_BATCH 64 // work requests behind one doorbell; completions taken at once
#define RMIG__VERBS_REQUESTS 64 // that wait for their answer, and that one poll reads: more peers are rejected, or wait
#define RMIG__VERBS_RETRY 7 // transport retries; receiver not ready: 7 means without end
#define RMIG__VERBS_RNR_TIMER 12 // 0.64 ms until a peer tries again: what rdma_cm leaves, 0, means 0.66 s
#define RMIG__VERBS_HOLD_NS 100000000ULL // how long flushed operations wait for the connection manager's reason
#define RMIG__VERBS_POLLFDS 64
#define RMIG__VERBS_REJECTED_BY_CONSUMER 28 // InfiniBand's reason for rdma_reject by the peer's program
#define RMIG__VERBS_REJECTED_NO_LISTENER 8 // invalid service id
#define RMIG__VERBS_SIW_VENDOR 0x626d74u // the kernel's software iWARP: counts locked memory even for root

struct rmig__verbs {
    struct rmig_fabric base;
    struct rmig_verbs_options options;
    char device[IBV_SYSFS_NAME_MAX];
};

struct rmig__verbs_ep { // what listeners and connections share
    struct rmig_ep base;
    bool listener;
    struct rdma_event_channel *channel;
    struct rdma_cm_id *id; // of a listener: for its first address
};

struct rmig__verbs_request {
    struct rmig__verbs_request *next;
    struct rdma_cm_id *id;
    bool told; // its event was delivered
    bool gone; // the peer has given up
    uint8_t reads; // that the peer would have outstanding
    size_t length;
    uint8_t data[RMIG__VERBS_CM_DATA];
};

struct rmig__verbs_listener {
    struct rmig__verbs_ep head;
    bool removed; // the last of its devices
    struct rdma_cm_id **ids; // one for each address that is listened on
    size_t id_count;
    char name[256]; // that was given, where it has several addresses
    struct rmig__verbs_request *requests;
};

enum rmig__verbs_state {
    RMIG__VERBS_RESOLVING, // the address, then the route
    RMIG__VERBS_RESOLVED, // not told yet
    RMIG__VERBS_IDLE,
    RMIG__VERBS_CONNECTING,
    RMIG__VERBS_UP,
    RMIG__VERBS_ENDED
};

enum rmig__verbs_queue { RMIG__VERBS_SENDS, RMIG__VERBS_RECVS }; // of a queue pair

struct rmig__verbs_slot { // a work request on the send queue
    uint64_t id;
    uint64_t length;
    bool send; // else a write
    bool wanted; // the caller wants the event
};

struct rmig__verbs_conn {
    struct rmig__verbs_ep head;
    enum rmig__verbs_state state;
    struct rmig_ep_config cfg;
    struct addrinfo *addresses, *address; // active side: all of the name; the one at hand
    uint64_t step_ns; // for resolving one of them, and again for its route
    bool passive;
    uint8_t reads;
    char peer[300]; // for texts

    struct ibv_device_attr device;
    uint32_t port_max_message;
    bool can_fault; // on-demand paging for sends, receives and writes
    struct ibv_pd *pd;
    struct ibv_comp_channel *completions;
    struct ibv_cq *cq[2]; // by enum rmig__verbs_queue
    bool armed[2];
    struct ibv_wc early[2]; // taken by fds to see whether there is one
    bool has_early[2];
    bool qp;

    uint32_t send_depth, recv_depth, write_depth;
    struct rmig__verbs_slot *slot; // ring: send_depth + write_depth + 1 for the last word of a disconnect
    uint64_t sq_done, sq_last; // ring: first not complete, next to post
    uint64_t sq_signalled; // one behind the last that has a completion coming
    uint32_t sends_out, recvs_out, writes_out;
    struct ibv_send_wr *wr; // for a batch
    struct ibv_sge *sge;

    bool connected; // seen, not told yet
    bool leaving, left; // disconnect was called; was done
    enum rmig_fabric_event_type end; // how the connection ended, 0: it has not
    int end_code;
    bool end_here; // for what no other address would do better
    uint64_t held_at; // when the first operation was flushed, 0: none was
    size_t data_length;
    uint8_t data[RMIG__VERBS_CM_DATA];
    char text[700];
};

static void *rmig__verbs_alloc(size_t n, size_t size) {
    void *p = RMIG_MALLOC(n * size);
    if (p != NULL)
        memset(p, 0, n * size);
    return p;
}

static void rmig__verbs_free(void *p) { // an overridden RMIG_FREE need not take NULL
    if (p != NULL)
        RMIG_FREE(p);
}

static int rmig__verbs_fail(struct rmig_error *err, int code, const char *what) {
    return rmig_fail(err, code == ENOMEM ? RMIG_ERR_NO_MEMORY : RMIG_ERR_FABRIC, code, "verbs: %s: %s (%d)", what,
                     strerror(code), code);
}

static struct rmig__verbs *rmig__verbs_of(const struct rmig_ep *ep) { return (struct rmig__verbs *)(void *)ep->fabric; }

static struct rmig__verbs_listener *rmig__verbs_listener_of(struct rmig_ep *ep) {
    struct rmig__verbs_ep *head = (struct rmig__verbs_ep *)(void *)ep;
    return head->listener ? (struct rmig__verbs_listener *)(void *)head : NULL;
}

static uint64_t rmig__verbs_now(struct rmig_fabric *f) {
    struct timespec t;
    (void)f;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static const char *rmig__verbs_device_name(const struct rdma_cm_id *id) {
    return id->verbs == NULL ? "" : ibv_get_device_name(id->verbs->device);
}

static bool rmig__verbs_iwarp(const struct rmig__verbs_conn *c) {
    return c->head.id->verbs->device->transport_type == IBV_TRANSPORT_IWARP;
}

// >>verbs: limits of memory

/* A number from a line of a file of the kernel's: the one behind `label`, or the first. UINT64_MAX: not found. */
static uint64_t rmig__verbs_read_number(const char *path, const char *label, int base) {
    char line[512];
    uint64_t value = UINT64_MAX;
    FILE *file = fopen(path, "re");
    while (file != NULL && value == UINT64_MAX && fgets(line, sizeof line, file) != NULL) {
        char *end, *at = label == NULL ? line : strncmp(line, label, strlen(label)) == 0 ? line + strlen(label) : NULL;
        if (at == NULL)
            continue;
        unsigned long long n = strtoull(at, &end, base);
        value = end == at ? UINT64_MAX : n;
    }
    if (file != NULL)
        fclose(file);
    return value;
}

/* A size in words: "16M", "69210118 bytes". Returns buf. */
static const char *rmig__verbs_size(uint64_t bytes, char *buf, size_t n) {
    rmig_size_format(bytes, buf, n);
    size_t used = strlen(buf);
    if (used > 0 && buf[used - 1] >= '0' && buf[used - 1] <= '9')
        snprintf(buf + used, n - used, " bytes");
    return buf;
}

static uint64_t rmig__verbs_pinned(void) { // by this process, bytes
    uint64_t kib = rmig__verbs_read_number("/proc/self/status", "VmPin:", 10);
    return kib == UINT64_MAX ? 0 : kib * 1024;
}

static uint64_t rmig__verbs_lock_limit(const struct rmig__verbs_conn *c) { // bytes; UINT64_MAX: none
    struct rlimit limit;
    uint64_t capabilities = rmig__verbs_read_number("/proc/self/status", "CapEff:", 16);
    bool exempt = capabilities != UINT64_MAX && (capabilities >> 14 & 1) != 0; // CAP_IPC_LOCK
    if (exempt && c->device.vendor_id != RMIG__VERBS_SIW_VENDOR)
        return UINT64_MAX;
    if (getrlimit(RLIMIT_MEMLOCK, &limit) != 0 || limit.rlim_cur == RLIM_INFINITY)
        return UINT64_MAX;
    return limit.rlim_cur;
}

/* The tightest memory limit of the process's control group and those above it; UINT64_MAX: none. */
static uint64_t rmig__verbs_group_limit(void) {
    char line[512], path[600];
    uint64_t least = UINT64_MAX;
    FILE *file = fopen("/proc/self/cgroup", "re");
    bool found = false;
    while (file != NULL && !found && fgets(line, sizeof line, file) != NULL)
        found = strncmp(line, "0::/", 4) == 0;
    if (file != NULL)
        fclose(file);
    if (!found)
        return UINT64_MAX;
    line[strcspn(line, "\n")] = '\0';
    for (char *slash = line + strlen(line); slash != NULL; slash = strrchr(line + 3, '/')) {
        *slash = '\0';
        snprintf(path, sizeof path, "/sys/fs/cgroup%s/memory.max", line + 3);
        uint64_t limit = rmig__verbs_read_number(path, NULL, 10);
        least = limit < least ? limit : least;
    }
    return least;
}

/* Why memory may have been refused: "" or "; ...". */
static const char *rmig__verbs_hint(const struct rmig__verbs_conn *c, int code, char *buf, size_t size) {
    char text[40];
    uint64_t allowed = rmig__verbs_lock_limit(c);
    buf[0] = '\0';
    if (code == ENOMEM && allowed != UINT64_MAX)
        snprintf(buf, size, "; RLIMIT_MEMLOCK is %s: raise it (ulimit -l) or grant CAP_IPC_LOCK",
                 rmig__verbs_size(allowed, text, sizeof text));
    else if (code == ENOMEM)
        snprintf(buf, size, "; no memory, or more than the device's %d regions: larger chunks need fewer",
                 c->device.max_mr);
    if (code == EFAULT)
        snprintf(buf, size, "; it must be mapped and writable, and not of a file on a disk's file system");
    return buf;
}

// >>verbs: file descriptors

/* EMFILE or ENFILE where descriptors ran out, else 0. code: what failed with. The libraries do not tell when it was the
   device that could not be opened, which takes two: so two are tried. */
static int rmig__verbs_out_of_fds(int code) {
    int fds[2] = {-1, -1};
    int found = code == EMFILE || code == ENFILE ? code : 0;
    for (int i = 0; i < 2 && found == 0; i++) {
        fds[i] = open("/dev/null", O_RDONLY | O_CLOEXEC);
        found = fds[i] < 0 && (errno == EMFILE || errno == ENFILE) ? errno : 0;
    }
    for (int i = 0; i < 2; i++)
        if (fds[i] >= 0)
            close(fds[i]);
    return found;
}

/* "" or "; ..." that says so, how many are needed, and what to do. */
static const char *rmig__verbs_fd_hint(int code, char *buf, size_t size) {
    struct rlimit limit;
    int out = rmig__verbs_out_of_fds(code);
    buf[0] = '\0';
    if (out == EMFILE && getrlimit(RLIMIT_NOFILE, &limit) == 0)
        snprintf(buf, size,
                 "; this process has no file descriptor left, and a listener takes 1, a connection 2, a device 2: "
                 "RLIMIT_NOFILE is %llu, raise it (ulimit -n, LimitNOFILE= of systemd)",
                 (unsigned long long)limit.rlim_cur);
    if (out == ENFILE)
        snprintf(buf, size, "; this system has no file descriptor left: raise fs.file-max (sysctl)");
    return buf;
}

/* Where a descriptor is made: what for, and why not. */
static int rmig__verbs_no_fd(struct rmig_error *err, int code, const char *what) {
    char hint[300];
    return rmig_fail(err, code == ENOMEM ? RMIG_ERR_NO_MEMORY : RMIG_ERR_FABRIC, code, "verbs: %s: %s%s", what,
                     strerror(code), rmig__verbs_fd_hint(code, hint, sizeof hint));
}

/* Never blocks, and closes on exec. The libraries offer no way to ask for that when it is made; that rdma-core's close
   on exec as they come is promised nowhere. */
static int rmig__verbs_tame(int fd, struct rmig_error *err) {
    int flags = fcntl(fd, F_GETFL), close_flags = fcntl(fd, F_GETFD);
    bool done = flags >= 0 && close_flags >= 0 && fcntl(fd, F_SETFD, close_flags | FD_CLOEXEC) == 0 &&
                fcntl(fd, F_SETFL, flags | O_NONBLOCK) == 0;
    return done ? RMIG_OK : rmig__verbs_fail(err, errno, "fcntl");
}

// >>verbs: addresses

static bool rmig__verbs_same(const struct addrinfo *a, const struct addrinfo *b) {
    return b->ai_addrlen == a->ai_addrlen && memcmp(b->ai_addr, a->ai_addr, a->ai_addrlen) == 0;
}

/* Which of the host's interfaces leads to a link-local address only its scope can tell. */
static bool rmig__verbs_lacks_scope(const struct addrinfo *a) {
    const struct sockaddr_in6 *in6 = (const struct sockaddr_in6 *)(const void *)a->ai_addr;
    return a->ai_family == AF_INET6 && in6->sin6_addr.s6_addr[0] == 0xfe &&
           (in6->sin6_addr.s6_addr[1] & 0xc0) == 0x80 && in6->sin6_scope_id == 0;
}

/* Drops those that lack their scope, and what is there twice: in a hosts file each line counts. */
static struct addrinfo *rmig__verbs_sift(struct addrinfo *list) {
    struct addrinfo *first = NULL, **last = &first;
    while (list != NULL) {
        struct addrinfo *a = list, *b = first;
        list = a->ai_next;
        a->ai_next = NULL;
        while (b != NULL && !rmig__verbs_same(a, b))
            b = b->ai_next;
        if (b != NULL || rmig__verbs_lacks_scope(a)) {
            freeaddrinfo(a);
            continue;
        }
        *last = a;
        last = &a->ai_next;
    }
    return first;
}

static int rmig__verbs_no_address(const char *address, const char *host, bool passive, struct rmig_error *err) {
    return rmig_fail(
        err, passive ? RMIG_ERR_FABRIC : RMIG_ERR_UNREACHABLE, 0,
        "address '%.100s': '%.100s' stands for link-local addresses alone, which do not tell the interface: "
        "give such an address itself, as in [fe80::2%%eth0]:4444",
        address, host);
}

static int rmig__verbs_lookup(const char *address, bool passive, struct addrinfo **out, struct rmig_error *err) {
    char host[256], port[16], fds[300];
    int status = rmig_split_address(address, host, sizeof host, port, sizeof port, err);
    if (status != RMIG_OK)
        return status;
    if (port[0] == '\0')
        return rmig_fail(err, RMIG_ERR_ARGUMENT, 0, "address '%s' has no port: \"host:port\" is needed", address);
    if (!passive && (host[0] == '\0' || strtoul(port, NULL, 10) == 0))
        return rmig_fail(err, RMIG_ERR_ARGUMENT, 0,
                         "address '%s' to connect to needs a host and a port from 1 to 65535", address);
    struct addrinfo hints;
    memset(&hints, 0, sizeof hints);
    hints.ai_socktype = SOCK_STREAM;
    hints.ai_flags = passive ? AI_PASSIVE : 0;
    int gai = getaddrinfo(host[0] == '\0' ? NULL : host, port, &hints, out);
    if (gai != 0) {
        const char *hint = rmig__verbs_fd_hint(0, fds, sizeof fds); // it reads files
        return rmig_fail(err, passive || hint[0] != '\0' ? RMIG_ERR_FABRIC : RMIG_ERR_UNREACHABLE, gai,
                         "address '%.200s': %s%s", address, gai_strerror(gai), hint);
    }
    *out = rmig__verbs_sift(*out);
    return *out != NULL ? RMIG_OK : rmig__verbs_no_address(address, host, passive, err);
}

/* "127.0.0.1:4444", "[::1]:4444". Returns a status. */
static int rmig__verbs_print(const struct sockaddr *a, char *buf, size_t size, struct rmig_error *err) {
    char host[256], port[16];
    socklen_t length = a->sa_family == AF_INET6 ? sizeof(struct sockaddr_in6) : sizeof(struct sockaddr_in);
    int ret = getnameinfo(a, length, host, sizeof host, port, sizeof port, NI_NUMERICHOST | NI_NUMERICSERV);
    if (ret != 0)
        return rmig_fail(err, RMIG_ERR_FABRIC, ret, "an address in figures: %s", gai_strerror(ret));
    ret = snprintf(buf, size, a->sa_family == AF_INET6 ? "[%s]:%s" : "%s:%s", host, port);
    if (ret < 0 || (size_t)ret >= size)
        return rmig_fail(err, RMIG_ERR_ARGUMENT, 0, "address: %zu bytes of room, %d needed", size, ret + 1);
    return RMIG_OK;
}

static int rmig__verbs_open_channel(struct rmig__verbs_ep *ep, struct rmig_error *err) {
    ep->channel = rdma_create_event_channel();
    int code = errno;
    if (ep->channel != NULL)
        return rmig__verbs_tame(ep->channel->fd, err);
    if (rmig__verbs_out_of_fds(code) != 0)
        return rmig__verbs_no_fd(err, code, "the connection manager cannot be opened");
    return rmig_fail(err, RMIG_ERR_FABRIC, code,
                     "verbs: the connection manager cannot be opened: %s (is the kernel module rdma_ucm loaded?)",
                     strerror(code));
}

static bool rmig__verbs_wrong_device(const struct rmig__verbs *f, const struct rdma_cm_id *id) {
    return f->device[0] != '\0' && id->verbs != NULL && strcmp(rmig__verbs_device_name(id), f->device) != 0;
}

/* A descriptor is readable while events of the connection manager are there. NULL: none now. */
static struct rdma_cm_event *rmig__verbs_next_cm(struct rmig__verbs_ep *ep, int *code) {
    struct rdma_cm_event *event = NULL;
    *code = 0;
    if (rdma_get_cm_event(ep->channel, &event) == 0)
        return event;
    *code = errno == EAGAIN || errno == EINTR ? 0 : errno;
    return NULL;
}

static size_t rmig__verbs_copy_data(uint8_t *to, const struct rdma_cm_event *event) {
    size_t n = event->param.conn.private_data == NULL ? 0 : event->param.conn.private_data_len;
    n = n < RMIG__VERBS_CM_DATA ? n : RMIG__VERBS_CM_DATA;
    if (n > 0)
        memcpy(to, event->param.conn.private_data, n);
    return n;
}

// >>verbs: listeners

/*
Requests wait in a list until they are answered. What goes wrong with one, or comes for one that is in the list (its
peer gave up, its device went), concerns that one alone: only what is the listener's own, its channel or the last of its
devices, makes poll fail. One poll reads a bounded number of events, and the list has a limit: who floods a listener
with requests is rejected and holds up nobody.
*/

/* Over iWARP the peer tells a rejection from a port where nobody listens by its data. */
static const uint8_t rmig__verbs_no_reason[8] = {0, 0, 0, 0, 0, 0, 0, 0};

static void rmig__verbs_drop_request(struct rmig__verbs_request *r, const uint8_t *data, size_t n) {
    if (!r->gone)
        rdma_reject(r->id, data, (uint8_t)n);
    rdma_destroy_id(r->id);
    rmig__verbs_free(r);
}

/* False: there are too many, or no memory for one more. */
static bool rmig__verbs_add_request(struct rmig__verbs_listener *l, const struct rdma_cm_event *event) {
    struct rmig__verbs_request **tail = &l->requests;
    unsigned count = 0;
    for (; *tail != NULL; tail = &(*tail)->next)
        count++;
    struct rmig__verbs_request *r =
        count >= RMIG__VERBS_REQUESTS ? NULL : (struct rmig__verbs_request *)rmig__verbs_alloc(1, sizeof *r);
    if (r == NULL)
        return false;
    r->id = event->id;
    r->reads = event->param.conn.responder_resources;
    r->length = rmig__verbs_copy_data(r->data, event);
    *tail = r;
    return true;
}

/* A request whose peer gave up before it was answered: whoever was told of it may still name it. */
static void rmig__verbs_lose_request(struct rmig__verbs_listener *l, const struct rdma_cm_id *id) {
    for (struct rmig__verbs_request **at = &l->requests; *at != NULL; at = &(*at)->next) {
        struct rmig__verbs_request *r = *at;
        if (r->id != id)
            continue;
        r->gone = true;
        if (!r->told) {
            *at = r->next;
            rmig__verbs_drop_request(r, NULL, 0);
        }
        return;
    }
}

static bool rmig__verbs_owns(const struct rmig__verbs_listener *l, const struct rdma_cm_id *id) {
    size_t i = 0;
    while (i < l->id_count && l->ids[i] != id)
        i++;
    return i < l->id_count;
}

/* The device of one address was removed: the others are listened on further. The last one is kept, for its name. */
static void rmig__verbs_lose_device(struct rmig__verbs_listener *l, struct rdma_cm_id *id) {
    size_t left = 0;
    l->removed = l->id_count == 1;
    if (l->removed)
        return;
    for (size_t i = 0; i < l->id_count; i++)
        if (l->ids[i] != id)
            l->ids[left++] = l->ids[i];
    l->id_count = left;
    l->head.id = l->ids[0];
    rdma_destroy_id(id);
}

/* Ids are destroyed behind the acknowledgement of their events: before, that would wait for it. */
static void rmig__verbs_on_listener(struct rmig__verbs_listener *l, struct rdma_cm_event *event) {
    struct rdma_cm_id *id = event->id;
    enum rdma_cm_event_type type = event->event;
    bool asks = type == RDMA_CM_EVENT_CONNECT_REQUEST;
    /* Who listens on all addresses hears of all devices. */
    bool wrong = asks && rmig__verbs_wrong_device(rmig__verbs_of(&l->head.base), id);
    bool taken = asks && !wrong && rmig__verbs_add_request(l, event);
    rdma_ack_cm_event(event);
    if (asks && !taken) {
        rdma_reject(id, wrong ? NULL : rmig__verbs_no_reason, wrong ? 0 : sizeof rmig__verbs_no_reason);
        rdma_destroy_id(id);
    } else if (!asks && rmig__verbs_owns(l, id)) {
        if (type == RDMA_CM_EVENT_DEVICE_REMOVAL)
            rmig__verbs_lose_device(l, id);
    } else if (!asks) {
        rmig__verbs_lose_request(l, id);
    }
}

static int rmig__verbs_read_requests(struct rmig__verbs_listener *l, struct rmig_error *err) {
    int code = 0;
    for (int i = 0; i < RMIG__VERBS_REQUESTS; i++) {
        struct rdma_cm_event *event = rmig__verbs_next_cm(&l->head, &code);
        if (event == NULL)
            break;
        rmig__verbs_on_listener(l, event);
    }
    if (l->removed)
        return rmig_fail(err, RMIG_ERR_FABRIC, ENODEV, "verbs: the RDMA device was removed");
    /* Without memory for it an event stays where it is, until there is some. */
    return code == 0 || code == ENOMEM ? RMIG_OK : rmig__verbs_fail(err, code, "listening: rdma_get_cm_event");
}

static int rmig__verbs_poll_listener(struct rmig__verbs_listener *l, struct rmig_fabric_event *events, size_t n,
                                     struct rmig_error *err) {
    size_t count = 0;
    int status = rmig__verbs_read_requests(l, err);
    for (struct rmig__verbs_request *r = l->requests; r != NULL && count < n; r = r->next) {
        if (r->told)
            continue;
        r->told = true;
        struct rmig_fabric_event *e = &events[count++];
        memset(e, 0, sizeof *e);
        e->type = RMIG_FEV_REQUEST;
        e->request = r;
        e->private_data = r->data;
        e->private_data_length = r->length;
    }
    return count > 0 || status == RMIG_OK ? (int)count : status;
}

static void rmig__verbs_stop_listener(struct rmig__verbs_listener *l) {
    for (size_t i = 0; i < l->id_count; i++)
        rdma_destroy_id(l->ids[i]);
    rmig__verbs_free(l->ids);
    l->ids = NULL;
    l->id_count = 0;
    l->head.id = NULL;
}

static void rmig__verbs_close_listener(struct rmig__verbs_listener *l) {
    if (l->head.id != NULL)
        rmig__verbs_read_requests(l, NULL); // a request that nobody saw holds memory too
    while (l->requests != NULL) {
        struct rmig__verbs_request *r = l->requests;
        l->requests = r->next;
        rmig__verbs_drop_request(r, NULL, 0);
    }
    rmig__verbs_stop_listener(l);
    if (l->head.channel != NULL)
        rdma_destroy_event_channel(l->head.channel);
    rmig__verbs_free(l);
}

/* Binds and listens on one more address, and on the first one's port; 0, or the error's number. */
static int rmig__verbs_bind(struct rmig__verbs *f, struct rmig__verbs_listener *l, struct addrinfo *a) {
    int on = 1;
    struct rdma_cm_id *id = NULL;
    if (rdma_create_id(l->head.channel, &id, NULL, RDMA_PS_TCP) != 0)
        return errno;
    rdma_set_option(id, RDMA_OPTION_ID, RDMA_OPTION_ID_REUSEADDR, &on, sizeof on);
    rdma_set_option(id, RDMA_OPTION_ID, RDMA_OPTION_ID_AFONLY, &on,
                    sizeof on); // over iWARP IPv6's wildcard hears no IPv4
    if (l->head.id != NULL && a->ai_family == AF_INET6)
        ((struct sockaddr_in6 *)(void *)a->ai_addr)->sin6_port = rdma_get_src_port(l->head.id);
    else if (l->head.id != NULL)
        ((struct sockaddr_in *)(void *)a->ai_addr)->sin_port = rdma_get_src_port(l->head.id);
    int code = rdma_bind_addr(id, a->ai_addr) != 0 ? errno : 0;
    if (code == 0 && rmig__verbs_wrong_device(f, id))
        code = ENODEV;
    if (code == 0 && rdma_listen(id, RMIG__VERBS_BACKLOG) != 0)
        code = errno;
    if (code != 0) {
        rdma_destroy_id(id);
        return code;
    }
    l->ids[l->id_count++] = id;
    l->head.id = l->ids[0];
    return 0;
}

/* No RDMA interface of the host's has this address. Of a wildcard EADDRNOTAVAIL says that the port is in use. */
static bool rmig__verbs_not_here(int code, bool any_host) {
    return (code == EADDRNOTAVAIL && !any_host) || code == EAFNOSUPPORT || code == ENODEV;
}

/* Listens on all of the list that is here. Returns 0, or the error's number; what did not do is in tried. */
static int rmig__verbs_bind_all(struct rmig__verbs *f, struct rmig__verbs_listener *l, struct addrinfo *list,
                                size_t count, bool any_host, struct rmig__list *tried) {
    int code = 0;
    rmig__list_begin(tried, "; ", 260, count);
    l->ids = (struct rdma_cm_id **)rmig__verbs_alloc(count + 1, sizeof(struct rdma_cm_id *));
    if (l->ids == NULL)
        return ENOMEM;
    for (int v6 = 1; v6 >= 0; v6--) {
        for (struct addrinfo *a = list; a != NULL; a = a->ai_next) {
            char text[128] = "", entry[250];
            if ((a->ai_family == AF_INET6) != (v6 == 1))
                continue;
            rmig__verbs_print(a->ai_addr, text, sizeof text, NULL);
            int ret = rmig__verbs_bind(f, l, a);
            if (ret == 0)
                continue;
            snprintf(entry, sizeof entry, "%s: %s", text, strerror(ret));
            rmig__list_add(tried, entry);
            code = ret;
            if (!rmig__verbs_not_here(ret, any_host))
                return code;
        }
    }
    return l->id_count > 0 ? 0 : code;
}

static int rmig__verbs_start_listener(struct rmig__verbs *f, struct rmig__verbs_listener *l, const char *address,
                                      struct rmig_error *err) {
    char host[256] = "", port[16] = "", fds[300];
    struct rmig__list tried;
    struct addrinfo *list = NULL;
    size_t count = 0;
    int code = 0, status = rmig__verbs_lookup(address, true, &list, err);
    if (status == RMIG_OK)
        status = rmig__verbs_open_channel(&l->head, err);
    if (status == RMIG_OK) {
        for (const struct addrinfo *a = list; a != NULL; a = a->ai_next)
            count++;
        rmig_split_address(address, host, sizeof host, port, sizeof port, NULL);
        code = rmig__verbs_bind_all(f, l, list, count, host[0] == '\0', &tried);
        bool any_port = strtoul(port, NULL, 10) == 0;
        for (int i = 1; i < RMIG__VERBS_FREE_PORTS && code == EADDRINUSE && l->id_count > 0 && any_port; i++) {
            rmig__verbs_stop_listener(l); // a port that was free at one address is not at another
            code = rmig__verbs_bind_all(f, l, list, count, host[0] == '\0', &tried);
        }
        if (count > 1 && host[0] != '\0')
            snprintf(l->name, sizeof l->name, "%s", host);
    }
    if (list != NULL)
        freeaddrinfo(list);
    if (status != RMIG_OK || code == 0)
        return status;
    const char *hint = rmig__verbs_fd_hint(code, fds, sizeof fds);
    if (hint[0] == '\0' && rmig__verbs_not_here(code, host[0] == '\0'))
        hint = "; it must be an address of an RDMA interface";
    else if (hint[0] == '\0' && code == EADDRNOTAVAIL)
        hint = "; another program listens on this port";
    return rmig_fail(err, RMIG_ERR_FABRIC, code, "verbs: listening on '%.100s'%s%s failed: %s%s", address,
                     f->device[0] == '\0' ? "" : " with ", f->device, tried.text, hint);
}

static int rmig__verbs_listen(struct rmig_fabric *base, const char *address, struct rmig_ep **out,
                              struct rmig_error *err) {
    struct rmig__verbs_listener *l = (struct rmig__verbs_listener *)rmig__verbs_alloc(1, sizeof *l);
    if (l == NULL)
        return rmig_fail(err, RMIG_ERR_NO_MEMORY, 0, "out of memory for a listener");
    l->head.base.fabric = base;
    l->head.listener = true;
    int status = rmig__verbs_start_listener((struct rmig__verbs *)(void *)base, l, address, err);
    if (status != RMIG_OK) {
        rmig__verbs_close_listener(l);
        return status;
    }
    *out = &l->head.base;
    return RMIG_OK;
}

static int rmig__verbs_address(struct rmig_ep *ep, char *buf, size_t size, struct rmig_error *err) {
    const struct rmig__verbs_listener *l = rmig__verbs_listener_of(ep);
    if (l == NULL) {
        const struct rmig__verbs_conn *c = (const struct rmig__verbs_conn *)(const void *)ep;
        if (c->address == NULL)
            return rmig_fail(err, RMIG_ERR_STATE, 0, "address: the endpoint was opened from a request");
        return rmig__verbs_print(c->address->ai_addr, buf, size, err);
    }
    int ret = -1;
    if (l->name[0] != '\0')
        ret = snprintf(buf, size, "%s:%u", l->name, (unsigned)ntohs(rdma_get_src_port(l->head.id)));
    if (ret >= 0 && (size_t)ret < size)
        return RMIG_OK;
    return rmig__verbs_print(rdma_get_local_addr(l->head.id), buf, size, err); // also in place of a long name
}

/* Takes a request off the listener's list; NULL if it is not there (any more). */
static struct rmig__verbs_request *rmig__verbs_take_request(struct rmig__verbs_listener *l, const void *request) {
    for (struct rmig__verbs_request **at = &l->requests; *at != NULL; at = &(*at)->next) {
        struct rmig__verbs_request *r = *at;
        if (r != request)
            continue;
        *at = r->next;
        r->next = NULL;
        return r;
    }
    return NULL;
}

static int rmig__verbs_reject(struct rmig_ep *ep, void *request, const uint8_t *data, size_t n,
                              struct rmig_error *err) {
    struct rmig__verbs_listener *l = rmig__verbs_listener_of(ep);
    if (l == NULL)
        return rmig_fail(err, RMIG_ERR_STATE, 0, "reject: the endpoint is not a listener");
    if (n > RMIG__VERBS_REJECT_DATA)
        return rmig_fail(err, RMIG_ERR_ARGUMENT, 0, "reject: %zu bytes of private data, at most %d", n,
                         RMIG__VERBS_REJECT_DATA);
    struct rmig__verbs_request *r = rmig__verbs_take_request(l, request);
    if (r == NULL)
        return rmig_fail(err, RMIG_ERR_STATE, 0, "reject: the request was used up already");
    rmig__verbs_drop_request(r, n == 0 ? rmig__verbs_no_reason : data, n == 0 ? sizeof rmig__verbs_no_reason : n);
    return RMIG_OK;
}

// >>verbs: connections, made and freed

static void rmig__verbs_free_qp(struct rmig__verbs_conn *c) {
    if (c->qp)
        rdma_destroy_qp(c->head.id);
    c->qp = false;
}

static void rmig__verbs_free_queues(struct rmig__verbs_conn *c) {
    rmig__verbs_free_qp(c);
    for (int q = 0; q < 2; q++) {
        if (c->cq[q] != NULL)
            ibv_destroy_cq(c->cq[q]);
        c->cq[q] = NULL;
    }
    if (c->completions != NULL)
        ibv_destroy_comp_channel(c->completions);
    if (c->pd != NULL)
        ibv_dealloc_pd(c->pd);
    c->completions = NULL;
    c->pd = NULL;
    rmig__verbs_free(c->slot);
    rmig__verbs_free(c->wr);
    rmig__verbs_free(c->sge);
    c->slot = NULL;
    c->wr = NULL;
    c->sge = NULL;
}

/* All that was made for one address. */
static void rmig__verbs_free_link(struct rmig__verbs_conn *c) {
    rmig__verbs_free_queues(c);
    if (c->head.id != NULL)
        rdma_destroy_id(c->head.id);
    c->head.id = NULL;
}

static void rmig__verbs_free_conn(struct rmig__verbs_conn *c) {
    rmig__verbs_free_link(c);
    if (c->head.channel != NULL)
        rdma_destroy_event_channel(c->head.channel);
    if (c->addresses != NULL)
        freeaddrinfo(c->addresses);
    rmig__verbs_free(c);
}

static uint32_t rmig__verbs_clamp(uint64_t wanted, uint64_t max, uint32_t least) {
    uint64_t n = wanted < max ? wanted : max;
    return n < least ? least : (uint32_t)n;
}

static int rmig__verbs_ask_device(struct rmig__verbs_conn *c, struct rmig_error *err) {
    struct ibv_port_attr port;
    struct ibv_device_attr_ex more;
    const uint32_t faults = IBV_ODP_SUPPORT_SEND | IBV_ODP_SUPPORT_RECV | IBV_ODP_SUPPORT_WRITE;
    struct ibv_context *verbs = c->head.id->verbs;
    memset(&port, 0, sizeof port);
    memset(&more, 0, sizeof more);
    int code = ibv_query_device(verbs, &c->device);
    if (code == 0)
        code = ibv_query_port(verbs, c->head.id->port_num, &port);
    if (code != 0)
        return rmig__verbs_fail(err, code, "asking the device what it can");
    c->port_max_message = port.max_msg_sz;
    if (ibv_query_device_ex(verbs, NULL, &more) == 0)
        c->can_fault = (more.odp_caps.general_caps & IBV_ODP_SUPPORT) != 0 &&
                       (more.odp_caps.per_transport_caps.rc_odp_caps & faults) == faults;
    return RMIG_OK;
}

/* Sends and writes share the send queue: sends get their part first, so that writes never crowd them out. */
static int rmig__verbs_size_queues(struct rmig__verbs_conn *c, struct rmig_error *err) {
    uint64_t wr = (uint64_t)c->device.max_qp_wr, cqe = (uint64_t)c->device.max_cqe;
    uint64_t most = wr < cqe ? wr : cqe;
    if (c->device.max_qp_wr < 4 || c->device.max_cqe < 4)
        return rmig_fail(err, RMIG_ERR_FABRIC, 0,
                         "verbs: %s has queues of %d requests and %d completions, 4 are needed",
                         rmig__verbs_device_name(c->head.id), c->device.max_qp_wr, c->device.max_cqe);
    c->send_depth = rmig__verbs_clamp(c->cfg.send_depth, (most - 1) / 2, 1);
    c->write_depth = rmig__verbs_clamp(c->cfg.write_depth, most - 1 - c->send_depth, 1);
    c->recv_depth = rmig__verbs_clamp(c->cfg.recv_depth, most, 2);
    uint32_t batch = c->write_depth < RMIG__VERBS_BATCH ? c->write_depth : RMIG__VERBS_BATCH;
    c->slot = (struct rmig__verbs_slot *)rmig__verbs_alloc(c->send_depth + c->write_depth + 1, sizeof *c->slot);
    c->wr = (struct ibv_send_wr *)rmig__verbs_alloc(batch, sizeof *c->wr);
    c->sge = (struct ibv_sge *)rmig__verbs_alloc(batch, sizeof *c->sge);
    if (c->slot == NULL || c->wr == NULL || c->sge == NULL)
        return rmig_fail(err, RMIG_ERR_NO_MEMORY, 0, "out of memory for queues of %lu operations",
                         (unsigned long)c->send_depth + c->write_depth);
    return RMIG_OK;
}

/* Queues are memory that may have to be locked too. */
static int rmig__verbs_no_queues(const struct rmig__verbs_conn *c, int code, const char *what, struct rmig_error *err) {
    char hint[200];
    return rmig_fail(err, code == ENOMEM ? RMIG_ERR_NO_MEMORY : RMIG_ERR_FABRIC, code,
                     "verbs: %s for %u sends, %u writes and %u receives cannot be made on %s: %s%s%s", what,
                     c->send_depth, c->write_depth, c->recv_depth, rmig__verbs_device_name(c->head.id), strerror(code),
                     c->passive && code == EINVAL ? " (the peer may have given up)" : "",
                     rmig__verbs_hint(c, code, hint, sizeof hint));
}

static int rmig__verbs_make_qp(struct rmig__verbs_conn *c, struct rmig_error *err) {
    struct ibv_qp_init_attr attr;
    memset(&attr, 0, sizeof attr);
    attr.qp_type = IBV_QPT_RC;
    attr.send_cq = c->cq[RMIG__VERBS_SENDS];
    attr.recv_cq = c->cq[RMIG__VERBS_RECVS];
    attr.cap.max_send_wr = c->send_depth + c->write_depth + 1;
    attr.cap.max_recv_wr = c->recv_depth;
    attr.cap.max_send_sge = 1;
    attr.cap.max_recv_sge = 1;
    /* Some devices have room for fewer requests of this kind than their max_qp_wr says. */
    while (rdma_create_qp(c->head.id, c->pd, &attr) != 0) {
        int code = errno;
        if ((code != EINVAL && code != ENOMEM) || c->write_depth < 32)
            return rmig__verbs_no_queues(c, code, "a queue pair", err);
        c->write_depth /= 2;
        attr.cap.max_send_wr = c->send_depth + c->write_depth + 1;
    }
    c->qp = true;
    return RMIG_OK;
}

/* A protection domain of its own, so that no other connection's peer can use its keys. What was made before a failure
   is in *c. */
static int rmig__verbs_make_queues(struct rmig__verbs_conn *c, struct rmig_error *err) {
    struct ibv_context *verbs = c->head.id->verbs;
    int status = rmig__verbs_ask_device(c, err);
    if (status == RMIG_OK)
        status = rmig__verbs_size_queues(c, err);
    if (status != RMIG_OK)
        return status;
    c->pd = ibv_alloc_pd(verbs);
    if (c->pd == NULL)
        return rmig__verbs_fail(err, errno, "ibv_alloc_pd");
    c->completions = ibv_create_comp_channel(verbs);
    if (c->completions == NULL)
        return rmig__verbs_no_fd(err, errno, "ibv_create_comp_channel");
    status = rmig__verbs_tame(c->completions->fd, err);
    if (status != RMIG_OK)
        return status;
    for (int q = 0; q < 2; q++) {
        uint32_t entries = q == RMIG__VERBS_SENDS ? c->send_depth + c->write_depth + 1 : c->recv_depth;
        c->cq[q] = ibv_create_cq(verbs, (int)entries, NULL, c->completions, 0);
        if (c->cq[q] == NULL)
            return rmig__verbs_no_queues(c, errno, "a completion queue", err);
    }
    return rmig__verbs_make_qp(c, err);
}

static struct rmig__verbs_conn *rmig__verbs_new_conn(struct rmig_fabric *base, const struct rmig_ep_config *cfg,
                                                     const char *peer) {
    struct rmig__verbs_conn *c = (struct rmig__verbs_conn *)rmig__verbs_alloc(1, sizeof *c);
    if (c == NULL)
        return NULL;
    c->head.base.fabric = base;
    c->cfg = *cfg;
    snprintf(c->peer, sizeof c->peer, "%s", peer);
    return c;
}

/* The first reason that ends a connection is the one that is told. */
#if defined(__GNUC__)
__attribute__((format(printf, 4, 5)))
#endif
static void
rmig__verbs_end(struct rmig__verbs_conn *c, enum rmig_fabric_event_type type, int code, const char *format, ...) {
    va_list args;
    if (c->end != 0)
        return;
    c->end = type;
    c->end_code = code;
    va_start(args, format);
    vsnprintf(c->text, sizeof c->text, format, args);
    va_end(args);
}

static int rmig__verbs_timeout_ms(uint64_t ns) {
    uint64_t ms = ns / 1000000;
    return ms < 1 ? 1 : ms > 3600000 ? 3600000 : (int)ms;
}

static void rmig__verbs_unreached(struct rmig__verbs_conn *c, int code, const char *what) {
    char hint[300];
    c->end_here = rmig__verbs_out_of_fds(code) != 0;
    rmig__verbs_end(c, RMIG_FEV_ERROR, code, "no RDMA device reaches %s: %s%s%s%s", c->peer, what,
                    code == 0 || what[0] == '\0' ? "" : ": ", code == 0 ? "" : strerror(code),
                    rmig__verbs_fd_hint(code, hint, sizeof hint));
}

/* Begins with the address at hand. What fails at once comes as other failures do. */
static void rmig__verbs_resolve(struct rmig__verbs_conn *c) {
    struct rmig__verbs_ep *head = &c->head;
    rmig__verbs_print(c->address->ai_addr, c->peer, sizeof c->peer, NULL);
    if (rdma_create_id(head->channel, &head->id, NULL, RDMA_PS_TCP) != 0) {
        head->id = NULL;
        rmig__verbs_end(c, RMIG_FEV_ERROR, errno, "verbs: rdma_create_id: %s", strerror(errno));
    } else if (rdma_resolve_addr(head->id, NULL, c->address->ai_addr, rmig__verbs_timeout_ms(c->step_ns)) != 0) {
        rmig__verbs_unreached(c, errno, "");
    }
}

static int rmig__verbs_open_active(struct rmig_fabric *base, const char *address, const struct rmig_ep_config *cfg,
                                   struct rmig_ep **out, struct rmig_error *err) {
    struct rmig__verbs_conn *c = rmig__verbs_new_conn(base, cfg, address);
    if (c == NULL)
        return rmig_fail(err, RMIG_ERR_NO_MEMORY, 0, "out of memory for a connection");
    int status = rmig__verbs_lookup(address, false, &c->addresses, err);
    if (status == RMIG_OK)
        status = rmig__verbs_open_channel(&c->head, err);
    if (status != RMIG_OK) {
        rmig__verbs_free_conn(c);
        return status;
    }
    for (const struct addrinfo *a = c->addresses->ai_next; a != NULL; a = a->ai_next)
        c->head.base.others++;
    uint64_t steps = 3 + 2 * (uint64_t)c->head.base.others; // the address and the route of each, and the connection
    c->step_ns = cfg->connect_timeout_ns / steps;
    c->address = c->addresses;
    rmig__verbs_resolve(c);
    *out = &c->head.base;
    return RMIG_OK;
}

static void rmig__verbs_next(struct rmig_ep *ep) {
    struct rmig__verbs_conn *c = (struct rmig__verbs_conn *)(void *)ep, fresh;
    rmig__verbs_free_link(c); // its events go with the id
    memset(&fresh, 0, sizeof fresh);
    fresh.head.base = c->head.base;
    fresh.head.base.others--;
    fresh.head.channel = c->head.channel;
    fresh.cfg = c->cfg;
    fresh.step_ns = c->step_ns;
    fresh.addresses = c->addresses;
    fresh.address = c->address->ai_next;
    *c = fresh;
    rmig__verbs_resolve(c);
}

static int rmig__verbs_build_passive(struct rmig__verbs_conn *c, struct rmig_error *err) {
    int status = rmig__verbs_open_channel(&c->head, err);
    if (status == RMIG_OK)
        status = rmig__verbs_make_queues(c, err);
    if (status == RMIG_OK && rdma_migrate_id(c->head.id, c->head.channel) != 0)
        status = rmig__verbs_fail(err, errno, "rdma_migrate_id");
    return status;
}

static int rmig__verbs_open_request(struct rmig_ep *ep, void *request, const struct rmig_ep_config *cfg,
                                    struct rmig_ep **out, struct rmig_error *err) {
    struct rmig__verbs_listener *l = rmig__verbs_listener_of(ep);
    if (l == NULL)
        return rmig_fail(err, RMIG_ERR_STATE, 0, "open_request: the endpoint is not a listener");
    struct rmig__verbs_request *r = rmig__verbs_take_request(l, request);
    if (r == NULL)
        return rmig_fail(err, RMIG_ERR_STATE, 0, "open_request: the request was used up already");
    struct rmig__verbs_conn *c = rmig__verbs_new_conn(ep->fabric, cfg, "the source");
    int status = c == NULL ? rmig_fail(err, RMIG_ERR_NO_MEMORY, 0, "out of memory for a connection") : RMIG_OK;
    if (status == RMIG_OK && r->gone)
        status = rmig_fail(err, RMIG_ERR_PEER_GONE, 0, "open_request: the peer has given up");
    if (status == RMIG_OK) {
        c->head.id = r->id;
        c->passive = true;
        c->reads = r->reads;
        c->state = RMIG__VERBS_IDLE;
        rmig__verbs_print(rdma_get_peer_addr(r->id), c->peer, sizeof c->peer, NULL);
        status = rmig__verbs_build_passive(c, err);
    }
    if (status == RMIG_OK) {
        rmig__verbs_free(r);
        *out = &c->head.base;
        return RMIG_OK;
    }
    if (c != NULL) { // the request can still be rejected
        rmig__verbs_free_queues(c);
        c->head.id = NULL;
        rmig__verbs_free_conn(c);
    }
    r->next = l->requests;
    l->requests = r;
    return status;
}

static void rmig__verbs_close(struct rmig_ep *ep) {
    struct rmig__verbs_listener *l = rmig__verbs_listener_of(ep);
    if (l != NULL)
        rmig__verbs_close_listener(l);
    else
        rmig__verbs_free_conn((struct rmig__verbs_conn *)(void *)ep);
}

// >>verbs: events of the connection manager

static void rmig__verbs_on_address(struct rmig__verbs_conn *c) {
    if (rmig__verbs_wrong_device(rmig__verbs_of(&c->head.base), c->head.id)) {
        char what[160];
        snprintf(what, sizeof what, "it is reached by %s, not by %s", rmig__verbs_device_name(c->head.id),
                 rmig__verbs_of(&c->head.base)->device);
        rmig__verbs_unreached(c, 0, what);
    } else if (rdma_resolve_route(c->head.id, rmig__verbs_timeout_ms(c->step_ns)) != 0) {
        rmig__verbs_unreached(c, errno, "no route");
    }
}

static void rmig__verbs_on_route(struct rmig__verbs_conn *c) {
    struct rmig_error err;
    memset(&err, 0, sizeof err);
    if (rmig__verbs_make_queues(c, &err) == RMIG_OK) {
        c->state = RMIG__VERBS_RESOLVED;
        return;
    }
    c->end_here = rmig__verbs_out_of_fds(err.provider_code) != 0;
    rmig__verbs_end(c, RMIG_FEV_ERROR, err.provider_code, "%s", err.text);
}

static void rmig__verbs_on_rejected(struct rmig__verbs_conn *c, int reason) {
    bool iwarp = rmig__verbs_iwarp(c);
    if (c->passive)
        rmig__verbs_end(c, RMIG_FEV_ERROR, reason, "%s gave up while the connection was being made", c->peer);
    else if (iwarp ? c->data_length > 0 : reason == RMIG__VERBS_REJECTED_BY_CONSUMER)
        rmig__verbs_end(c, RMIG_FEV_REJECTED, reason, "%s rejected the connection", c->peer);
    else if (iwarp || reason == RMIG__VERBS_REJECTED_NO_LISTENER)
        rmig__verbs_end(c, RMIG_FEV_ERROR, reason, "connecting to %s failed: nobody listens there", c->peer);
    else
        rmig__verbs_end(c, RMIG_FEV_ERROR, reason, "connecting to %s failed: the connection manager gave reason %d",
                        c->peer, reason);
}

static void rmig__verbs_on_disconnected(struct rmig__verbs_conn *c) {
    if (c->left)
        rmig__verbs_end(c, RMIG_FEV_DISCONNECTED, 0, "disconnected by this side");
    else if (c->connected || c->state == RMIG__VERBS_UP)
        rmig__verbs_end(c, RMIG_FEV_DISCONNECTED, 0, "%s closed the connection", c->peer);
    else
        rmig__verbs_end(c, RMIG_FEV_ERROR, 0, "%s closed the connection while it was being made", c->peer);
}

/* How long a peer waits that has met no receive, or a page on demand that was not there. iWARP has no such thing. */
static void rmig__verbs_set_rnr_timer(struct rmig__verbs_conn *c) {
    struct ibv_qp_attr attr;
    memset(&attr, 0, sizeof attr);
    attr.qp_state = IBV_QPS_RTS;
    attr.min_rnr_timer = RMIG__VERBS_RNR_TIMER;
    if (!rmig__verbs_iwarp(c)) // where it fails it stays slow
        ibv_modify_qp(c->head.id->qp, &attr, IBV_QP_STATE | IBV_QP_MIN_RNR_TIMER);
}

/* type, status: of an event that has been given back, since what follows may wait for that. */
static void rmig__verbs_on_cm(struct rmig__verbs_conn *c, enum rdma_cm_event_type type, int event_status) {
    int code = event_status == -1 ? 0 : event_status < 0 ? -event_status : event_status; // -1: of no errno
    switch (type) {
    case RDMA_CM_EVENT_ADDR_RESOLVED:
        rmig__verbs_on_address(c);
        break;
    case RDMA_CM_EVENT_ADDR_ERROR:
        rmig__verbs_unreached(c, code, "the address does not resolve");
        break;
    case RDMA_CM_EVENT_ROUTE_RESOLVED:
        rmig__verbs_on_route(c);
        break;
    case RDMA_CM_EVENT_ROUTE_ERROR:
        rmig__verbs_unreached(c, code, "no route");
        break;
    case RDMA_CM_EVENT_ESTABLISHED:
        c->connected = true;
        rmig__verbs_set_rnr_timer(c);
        break;
    case RDMA_CM_EVENT_REJECTED:
        rmig__verbs_on_rejected(c, code);
        break;
    case RDMA_CM_EVENT_UNREACHABLE:
    case RDMA_CM_EVENT_CONNECT_ERROR:
        rmig__verbs_end(c, RMIG_FEV_ERROR, code, "connecting with %s failed: %s", c->peer,
                        code == 0 ? "the connection manager gave no reason" : strerror(code));
        break;
    case RDMA_CM_EVENT_DISCONNECTED:
        rmig__verbs_on_disconnected(c);
        break;
    case RDMA_CM_EVENT_DEVICE_REMOVAL:
        rmig__verbs_end(c, RMIG_FEV_ERROR, 0, "the RDMA device %s was removed", rmig__verbs_device_name(c->head.id));
        break;
    default: // the address of a bonded interface moved, the time of waiting is over
        break;
    }
}

/* What comes behind the end (the other side's disconnect, the end of TIME_WAIT) would keep the descriptor readable. */
static void rmig__verbs_discard_cm(struct rmig__verbs_conn *c) {
    struct rdma_cm_event *event;
    int code;
    while ((event = rmig__verbs_next_cm(&c->head, &code)) != NULL)
        rdma_ack_cm_event(event);
}

static void rmig__verbs_read_cm(struct rmig__verbs_conn *c) {
    while (c->end == 0) {
        int code;
        struct rdma_cm_event *event = rmig__verbs_next_cm(&c->head, &code);
        if (event == NULL) {
            if (code != 0)
                rmig__verbs_end(c, RMIG_FEV_ERROR, code, "verbs: rdma_get_cm_event: %s", strerror(code));
            return;
        }
        enum rdma_cm_event_type type = event->event;
        int status = event->status;
        if (type == RDMA_CM_EVENT_ESTABLISHED || type == RDMA_CM_EVENT_REJECTED)
            c->data_length = rmig__verbs_copy_data(c->data, event);
        rdma_ack_cm_event(event);
        rmig__verbs_on_cm(c, type, status);
    }
}

// >>verbs: completions

static void rmig__verbs_event(struct rmig_fabric_event *e, enum rmig_fabric_event_type type) {
    memset(e, 0, sizeof *e);
    e->type = type;
}

static struct rmig__verbs_slot *rmig__verbs_slot_at(struct rmig__verbs_conn *c, uint64_t position) {
    return &c->slot[position % (c->send_depth + c->write_depth + 1)];
}

/* A completion covers all that was posted before. Returns whether *e was filled in. */
static bool rmig__verbs_sent(struct rmig__verbs_conn *c, uint64_t position, struct rmig_fabric_event *e) {
    struct rmig__verbs_slot *slot = rmig__verbs_slot_at(c, position);
    for (; c->sq_done <= position; c->sq_done++) {
        if (rmig__verbs_slot_at(c, c->sq_done)->send)
            c->sends_out--;
        else
            c->writes_out--;
    }
    if (!slot->wanted)
        return false;
    rmig__verbs_event(e, slot->send ? RMIG_FEV_SEND : RMIG_FEV_WRITE);
    e->id = slot->id;
    e->length = slot->length;
    return true;
}

static void rmig__verbs_failed(struct rmig__verbs_conn *c, enum rmig__verbs_queue q, const struct ibv_wc *wc) {
    const char *what = "a receive";
    unsigned long long bytes = 0;
    if (q == RMIG__VERBS_SENDS) {
        const struct rmig__verbs_slot *slot = rmig__verbs_slot_at(c, wc->wr_id);
        what = slot->send ? "a send" : "a write";
        bytes = slot->length;
    }
    if (wc->status == IBV_WC_WR_FLUSH_ERR) { // the connection manager tells why, perhaps a moment later
        if (c->held_at == 0 && !c->left)
            c->held_at = rmig__verbs_now(c->head.base.fabric);
        return;
    }
    rmig__verbs_end(c, RMIG_FEV_ERROR, (int)wc->status, "%s of %llu bytes with %s failed: %s (status %d, vendor 0x%x)",
                    what, bytes, c->peer, ibv_wc_status_str(wc->status), (int)wc->status, wc->vendor_err);
}

/* Up to n completions, of which fds may have taken one already. */
static int rmig__verbs_take(struct rmig__verbs_conn *c, enum rmig__verbs_queue q, struct ibv_wc *wc, size_t n) {
    if (c->has_early[q]) {
        c->has_early[q] = false;
        wc[0] = c->early[q];
        return 1;
    }
    return ibv_poll_cq(c->cq[q], (int)(n < 16 ? n : 16), wc);
}

static size_t rmig__verbs_drain_queue(struct rmig__verbs_conn *c, enum rmig__verbs_queue q,
                                      struct rmig_fabric_event *events, size_t n) {
    struct ibv_wc wc[16];
    size_t count = 0;
    int got = 1;
    while (count < n && got > 0) {
        got = rmig__verbs_take(c, q, wc, n - count);
        for (int i = 0; i < got; i++) {
            if (wc[i].status != IBV_WC_SUCCESS) {
                rmig__verbs_failed(c, q, &wc[i]);
            } else if (q == RMIG__VERBS_SENDS) {
                count += rmig__verbs_sent(c, wc[i].wr_id, &events[count]);
            } else {
                c->recvs_out--;
                rmig__verbs_event(&events[count], RMIG_FEV_RECV);
                events[count].id = wc[i].wr_id;
                events[count++].length = wc[i].byte_len;
            }
        }
    }
    if (got < 0)
        rmig__verbs_end(c, RMIG_FEV_ERROR, -got, "verbs: ibv_poll_cq failed (%d)", got);
    return count;
}

static void rmig__verbs_leave(struct rmig__verbs_conn *c) {
    if (!c->leaving || c->left || c->sq_done != c->sq_last)
        return;
    c->left = true;
    rdma_disconnect(c->head.id);
}

static size_t rmig__verbs_drain(struct rmig__verbs_conn *c, struct rmig_fabric_event *events, size_t n) {
    size_t count = rmig__verbs_drain_queue(c, RMIG__VERBS_SENDS, events, n);
    count += rmig__verbs_drain_queue(c, RMIG__VERBS_RECVS, events + count, n - count);
    rmig__verbs_leave(c);
    return count;
}

/* The peer's own disconnect is over when this side has answered; of another end it learns so. */
static void rmig__verbs_tell_end(struct rmig__verbs_conn *c, struct rmig_fabric_event *e) {
    if (c->state == RMIG__VERBS_UP && !c->left)
        rdma_disconnect(c->head.id);
    c->state = RMIG__VERBS_ENDED;
    rmig__verbs_event(e, c->end);
    e->text = c->text;
    e->provider_code = c->end_code;
    e->at_this_end = c->end_here;
    if (c->end == RMIG_FEV_REJECTED) {
        e->private_data = c->data;
        e->private_data_length = c->data_length;
    }
}

static bool rmig__verbs_held_expired(const struct rmig__verbs_conn *c) {
    return c->held_at != 0 && rmig__verbs_now(c->head.base.fabric) - c->held_at >= RMIG__VERBS_HOLD_NS;
}

static int rmig__verbs_poll_conn(struct rmig__verbs_conn *c, struct rmig_fabric_event *events, size_t n) {
    size_t count = 0;
    if (n == 0)
        return 0;
    if (c->state == RMIG__VERBS_ENDED) {
        rmig__verbs_discard_cm(c);
        return 0;
    }
    rmig__verbs_read_cm(c); // before the completions: what came before a disconnect is then among them
    if (c->state == RMIG__VERBS_RESOLVED) {
        c->state = RMIG__VERBS_IDLE;
        rmig__verbs_event(&events[count++], RMIG_FEV_RESOLVED);
    }
    if (c->state == RMIG__VERBS_CONNECTING && c->connected && count < n) {
        c->state = RMIG__VERBS_UP;
        rmig__verbs_event(&events[count], RMIG_FEV_ESTABLISHED);
        events[count].private_data = c->passive || c->data_length == 0 ? NULL : c->data;
        events[count].private_data_length = c->passive ? 0 : c->data_length;
        count++;
    }
    if (c->state == RMIG__VERBS_UP)
        count += rmig__verbs_drain(c, events + count, n - count);
    if (c->end == 0 && rmig__verbs_held_expired(c))
        rmig__verbs_end(c, RMIG_FEV_ERROR, IBV_WC_WR_FLUSH_ERR, "the operations with %s were flushed", c->peer);
    if (c->end != 0 && count < n) // room was left: the queues are empty
        rmig__verbs_tell_end(c, &events[count++]);
    return (int)count;
}

static int rmig__verbs_poll(struct rmig_ep *ep, struct rmig_fabric_event *events, size_t n, struct rmig_error *err) {
    struct rmig__verbs_listener *l = rmig__verbs_listener_of(ep);
    if (l != NULL)
        return rmig__verbs_poll_listener(l, events, n, err);
    return rmig__verbs_poll_conn((struct rmig__verbs_conn *)(void *)ep, events, n);
}

// >>verbs: connecting

static int rmig__verbs_check_data(const struct rmig__verbs_conn *c, const char *what, size_t n, size_t max,
                                  struct rmig_error *err) {
    if (c->head.listener || c->state != RMIG__VERBS_IDLE)
        return rmig_fail(err, RMIG_ERR_STATE, 0, "%s: the endpoint is %s", what,
                         c->head.listener                   ? "a listener"
                         : c->state <= RMIG__VERBS_RESOLVED ? "not resolved yet"
                                                            : "connected or was already");
    if (n > max)
        return rmig_fail(err, RMIG_ERR_ARGUMENT, 0, "%s: %zu bytes of private data, at most %zu", what, n, max);
    return RMIG_OK;
}

/* RDMA READ is never used; a peer that offers it (QEMU does) is granted what the device has. */
static void rmig__verbs_conn_param(const struct rmig__verbs_conn *c, struct rdma_conn_param *p, const uint8_t *data,
                                   size_t n) {
    int most = c->device.max_qp_rd_atom;
    memset(p, 0, sizeof *p);
    p->private_data = data;
    p->private_data_len = (uint8_t)n;
    p->responder_resources = c->reads <= most ? c->reads : (uint8_t)most;
    p->retry_count = RMIG__VERBS_RETRY;
    p->rnr_retry_count = RMIG__VERBS_RETRY;
}

static int rmig__verbs_connect(struct rmig_ep *ep, const uint8_t *data, size_t n, struct rmig_error *err) {
    struct rmig__verbs_conn *c = (struct rmig__verbs_conn *)(void *)ep;
    struct rdma_conn_param param;
    int status = rmig__verbs_check_data(c, "connect", n, RMIG__VERBS_REQUEST_DATA, err);
    if (status != RMIG_OK)
        return status;
    if (c->passive)
        return rmig_fail(err, RMIG_ERR_STATE, 0, "connect: the endpoint was opened from a request");
    rmig__verbs_conn_param(c, &param, data, n);
    c->state = RMIG__VERBS_CONNECTING;
    if (rdma_connect(c->head.id, &param) != 0) // some failures are known at once: they come as the others do
        rmig__verbs_end(c, RMIG_FEV_ERROR, errno, "connecting to %s failed: %s", c->peer, strerror(errno));
    return RMIG_OK;
}

static int rmig__verbs_accept(struct rmig_ep *ep, const uint8_t *data, size_t n, struct rmig_error *err) {
    struct rmig__verbs_conn *c = (struct rmig__verbs_conn *)(void *)ep;
    struct rdma_conn_param param;
    int status = rmig__verbs_check_data(c, "accept", n, RMIG__VERBS_REPLY_DATA, err);
    if (status != RMIG_OK)
        return status;
    if (!c->passive)
        return rmig_fail(err, RMIG_ERR_STATE, 0, "accept: the endpoint was not opened from a request");
    rmig__verbs_conn_param(c, &param, data, n);
    if (rdma_accept(c->head.id, &param) != 0)
        return rmig_fail(err, RMIG_ERR_FABRIC, errno, "verbs: accepting %s failed: %s", c->peer, strerror(errno));
    c->state = RMIG__VERBS_CONNECTING;
    return RMIG_OK;
}

static int rmig__verbs_say_last(struct rmig__verbs_conn *c);

static void rmig__verbs_disconnect(struct rmig_ep *ep) {
    struct rmig__verbs_conn *c = (struct rmig__verbs_conn *)(void *)ep;
    if (c->head.listener || c->leaving)
        return;
    if (c->state == RMIG__VERBS_CONNECTING && !c->connected)
        rmig__verbs_end(c, RMIG_FEV_DISCONNECTED, 0, "disconnected by this side while connecting");
    if ((c->state != RMIG__VERBS_UP && c->state != RMIG__VERBS_CONNECTING) || c->end != 0)
        return;
    c->leaving = true; // for good once all that was posted is sent
    if (c->sq_signalled != c->sq_last)
        rmig__verbs_say_last(c);
    rmig__verbs_leave(c);
}

// >>verbs: the end of the peer's writes

/*
Two ways. A queue pair that is destroyed takes nothing any more: destroying waits for what the adapter is at, which
moving it to the error state need not. And a queue pair may lose IBV_ACCESS_REMOTE_WRITE while it goes on: the adapter
looks at that with each packet. But drivers may drop such a change without a word (Broadcom's always lets the peer
write, Intel's only ever adds rights), and over iWARP the rights are those of the moment of connecting. So revoke is
offered only where the driver is known to pass it on. (Software RoCE may be copying a packet that it has looked at just
before, on another processor: some microseconds.)
*/

static const uint32_t rmig__verbs_revoking[] = {
    // by vendor_id
    0x02c9, // Mellanox, NVIDIA
    0xffffff // the kernel's software RoCE
};

static bool rmig__verbs_revokes(const struct rmig__verbs_conn *c) {
    bool known = false;
    for (size_t i = 0; i < sizeof rmig__verbs_revoking / sizeof rmig__verbs_revoking[0]; i++)
        known = known || rmig__verbs_revoking[i] == c->device.vendor_id;
    return known && c->head.id->verbs->device->transport_type == IBV_TRANSPORT_IB;
}

static void rmig__verbs_cut(struct rmig_ep *ep) {
    struct rmig__verbs_conn *c = (struct rmig__verbs_conn *)(void *)ep;
    if (c->head.listener)
        return;
    /* The peer hears of it now, not when the id is destroyed. While an iWARP connection is being made it would wait. */
    if (c->qp && c->connected && c->state != RMIG__VERBS_ENDED && !c->left)
        rdma_disconnect(c->head.id);
    rmig__verbs_free_qp(c);
    rmig__verbs_end(c, RMIG_FEV_DISCONNECTED, 0, "cut by this side");
    c->state = RMIG__VERBS_ENDED;
}

// >>verbs: capabilities, memory

static uint64_t rmig__verbs_write_max(const struct rmig__verbs_conn *c) {
    uint64_t max = c->port_max_message;
    return max == 0 || max > ((uint64_t)1 << 30) ? (uint64_t)1 << 30 : max;
}

static int rmig__verbs_caps(struct rmig_ep *ep, struct rmig_fabric_caps *caps, struct rmig_error *err) {
    struct rmig__verbs_conn *c = (struct rmig__verbs_conn *)(void *)ep;
    if (c->head.listener || !c->qp)
        return rmig_fail(err, RMIG_ERR_STATE, 0, "caps: the endpoint is %s",
                         c->head.listener ? "a listener" : "not resolved yet");
    memset(caps, 0, sizeof *caps);
    caps->write_max = rmig__verbs_write_max(c);
    caps->registration_max = c->device.max_mr_size;
    caps->write_depth = c->write_depth;
    caps->send_depth = c->send_depth;
    caps->recv_depth = c->recv_depth;
    caps->private_data_request = RMIG__VERBS_REQUEST_DATA;
    caps->private_data_reply = RMIG__VERBS_REPLY_DATA;
    caps->key_bits = 32;
    caps->sends_after_writes = true;
    caps->completion_is_delivery = !rmig__verbs_iwarp(c);
    caps->writes_in_order = true;
    caps->local_mr = true;
    caps->offset_addressing = false;
    caps->target_must_poll = false;
    caps->revokes = rmig__verbs_revokes(c);
    return RMIG_OK;
}

static int rmig__verbs_lockable(struct rmig_ep *ep, uint64_t bytes, uint64_t charged, struct rmig_error *err) {
    struct rmig__verbs_conn *c = (struct rmig__verbs_conn *)(void *)ep;
    char need[32], have[32], used[32];
    if (c->head.listener || !c->qp)
        return rmig_fail(err, RMIG_ERR_STATE, 0, "lockable: the endpoint has no device yet");
    if (rmig__verbs_of(ep)->options.on_demand == RMIG_VERBS_ON_DEMAND_ALWAYS ||
        (c->can_fault && rmig__verbs_of(ep)->options.on_demand != RMIG_VERBS_ON_DEMAND_NEVER))
        return RMIG_OK;
    uint64_t limit = rmig__verbs_lock_limit(c), pinned = rmig__verbs_pinned();
    rmig__verbs_size(bytes, need, sizeof need);
    if (limit != UINT64_MAX && (pinned > limit || bytes > limit - pinned))
        return rmig_fail(
            err, RMIG_ERR_REGISTRATION, ENOMEM,
            "%s must be locked in memory for RDMA; RLIMIT_MEMLOCK allows %s, of which %s are in use: raise "
            "it (ulimit -l, LimitMEMLOCK= of systemd) or grant CAP_IPC_LOCK",
            need, rmig__verbs_size(limit, have, sizeof have), rmig__verbs_size(pinned, used, sizeof used));
    limit = rmig__verbs_group_limit();
    if (charged > limit)
        return rmig_fail(err, RMIG_ERR_REGISTRATION, ENOMEM,
                         "%s must be locked in memory for RDMA; the control group's memory.max is %s: raise it", need,
                         rmig__verbs_size(limit, have, sizeof have));
    return RMIG_OK;
}

static int rmig__verbs_reg_failed(const struct rmig__verbs_conn *c, const char *what, uint64_t length, int code,
                                  struct rmig_error *err) {
    char size[40], hint[200];
    return rmig_fail(err, RMIG_ERR_REGISTRATION, code, "verbs: registering %s of %s with %s failed: %s%s",
                     rmig__verbs_size(length, size, sizeof size), what, rmig__verbs_device_name(c->head.id),
                     strerror(code), rmig__verbs_hint(c, code, hint, sizeof hint));
}

struct rmig__verbs_region { // what to register
    void *address;
    uint64_t length;
    unsigned access; // enum ibv_access_flags
    int dmabuf; // its file descriptor, -1: ordinary memory
    uint64_t offset; // in the dma-buf
};

/* NULL with errno set. */
static struct ibv_mr *rmig__verbs_try_reg(struct rmig__verbs_conn *c, const struct rmig__verbs_region *r) {
    enum rmig_verbs_on_demand mode = rmig__verbs_of(&c->head.base)->options.on_demand;
    size_t length = (size_t)r->length;
    if (r->dmabuf >= 0)
        return ibv_reg_dmabuf_mr(c->pd, r->offset, length, (uint64_t)(uintptr_t)r->address, r->dmabuf, (int)r->access);
    if (r->access == IBV_ACCESS_LOCAL_WRITE) // control buffers: a message must not meet a page that is not there
        return ibv_reg_mr(c->pd, r->address, length, r->access);
    if (mode != RMIG_VERBS_ON_DEMAND_ALWAYS) {
        struct ibv_mr *mr = ibv_reg_mr(c->pd, r->address, length, r->access);
        bool refused = mr == NULL && (errno == ENOMEM || errno == EOPNOTSUPP);
        if (!refused || mode == RMIG_VERBS_ON_DEMAND_NEVER || !c->can_fault)
            return mr;
    }
    if (c->can_fault)
        return ibv_reg_mr(c->pd, r->address, length, r->access | IBV_ACCESS_ON_DEMAND);
    errno = EOPNOTSUPP;
    return NULL;
}

static int rmig__verbs_register(struct rmig__verbs_conn *c, const struct rmig__verbs_region *r, struct rmig_mr *out,
                                struct rmig_error *err) {
    struct ibv_mr *mr = rmig__verbs_try_reg(c, r);
    bool remote = (r->access & IBV_ACCESS_REMOTE_WRITE) != 0;
    if (mr != NULL && remote &&
        mr->rkey == 0) { // the core takes key 0 for none; while this is held the next is another
        struct ibv_mr *zero = mr;
        mr = rmig__verbs_try_reg(c, r);
        int code = errno;
        ibv_dereg_mr(zero);
        errno = code;
    }
    if (mr == NULL)
        return rmig__verbs_reg_failed(c, r->dmabuf >= 0 ? "a dma-buf" : "memory", r->length, errno, err);
    out->handle = mr;
    out->desc = mr;
    out->key = mr->rkey;
    out->remote_address = (uint64_t)(uintptr_t)r->address;
    return RMIG_OK;
}

static int rmig__verbs_reg_any(struct rmig_ep *ep, struct rmig__verbs_region *r, unsigned access, struct rmig_mr *mr,
                               struct rmig_error *err) {
    struct rmig__verbs_conn *c = (struct rmig__verbs_conn *)(void *)ep;
    if (c->head.listener || c->pd == NULL)
        return rmig_fail(err, RMIG_ERR_STATE, 0, "reg: the endpoint is %s",
                         c->head.listener ? "a listener" : "not resolved yet");
    if (r->address == NULL || r->length == 0 || r->length > SIZE_MAX)
        return rmig_fail(err, RMIG_ERR_ARGUMENT, 0, "reg: %llu bytes at %p: a range of memory is needed",
                         (unsigned long long)r->length, r->address);
    const unsigned all = RMIG_ACCESS_LOCAL_READ | RMIG_ACCESS_LOCAL_WRITE | RMIG_ACCESS_REMOTE_WRITE;
    if ((access & all) == 0)
        return rmig_fail(err, RMIG_ERR_ARGUMENT, 0, "reg: access %u names none of enum rmig_access", access);
    r->access = 0; // local read is what every region allows
    if ((access & (RMIG_ACCESS_LOCAL_WRITE | RMIG_ACCESS_REMOTE_WRITE)) != 0)
        r->access |= IBV_ACCESS_LOCAL_WRITE; // remote write needs it too
    if ((access & RMIG_ACCESS_REMOTE_WRITE) != 0)
        r->access |= IBV_ACCESS_REMOTE_WRITE;
    return rmig__verbs_register(c, r, mr, err);
}

static int rmig__verbs_reg(struct rmig_ep *ep, void *address, uint64_t length, unsigned access, struct rmig_mr *mr,
                           struct rmig_error *err) {
    struct rmig__verbs_region r;
    memset(&r, 0, sizeof r);
    r.address = address;
    r.length = length;
    r.dmabuf = -1;
    return rmig__verbs_reg_any(ep, &r, access, mr, err);
}

static int rmig__verbs_reg_dmabuf(struct rmig_ep *ep, int fd, uint64_t offset, void *address, uint64_t length,
                                  unsigned access, struct rmig_mr *mr, struct rmig_error *err) {
    struct rmig__verbs_region r;
    memset(&r, 0, sizeof r);
    r.address = address;
    r.length = length;
    r.dmabuf = fd;
    r.offset = offset;
    if (fd < 0)
        return rmig_fail(err, RMIG_ERR_ARGUMENT, 0, "reg_dmabuf: descriptor %d: an open dma-buf is needed", fd);
    return rmig__verbs_reg_any(ep, &r, access, mr, err);
}

static int rmig__verbs_dereg(struct rmig_ep *ep, struct rmig_mr *mr, struct rmig_error *err) {
    (void)ep;
    if (mr->handle == NULL)
        return rmig_fail(err, RMIG_ERR_ARGUMENT, 0, "dereg: the region is not registered");
    int code = ibv_dereg_mr((struct ibv_mr *)mr->handle);
    if (code != 0)
        return rmig_fail(err, RMIG_ERR_REGISTRATION, code, "verbs: deregistering memory: %s", strerror(code));
    memset(mr, 0, sizeof *mr);
    return RMIG_OK;
}

// >>verbs: posting

static int rmig__verbs_check_up(const struct rmig__verbs_conn *c, const char *what, struct rmig_error *err) {
    if (c->head.listener)
        return rmig_fail(err, RMIG_ERR_STATE, 0, "%s: the endpoint is a listener", what);
    if (c->end != 0)
        return rmig_fail(err, RMIG_ERR_PEER_GONE, c->end_code, "%s: the connection has ended: %s", what, c->text);
    if (c->state != RMIG__VERBS_UP || c->leaving)
        return rmig_fail(err, RMIG_ERR_STATE, 0, "%s: the endpoint is %s", what,
                         c->leaving ? "disconnecting" : "not connected");
    return RMIG_OK;
}

static int rmig__verbs_revoke(struct rmig_ep *ep, struct rmig_error *err) {
    struct rmig__verbs_conn *c = (struct rmig__verbs_conn *)(void *)ep;
    struct ibv_qp_attr attr;
    int status = rmig__verbs_check_up(c, "revoke", err);
    if (status != RMIG_OK)
        return status;
    if (!rmig__verbs_revokes(c))
        return rmig_fail(err, RMIG_ERR_STATE, EOPNOTSUPP, "revoke: %s is not known to take the right to write away",
                         rmig__verbs_device_name(c->head.id));
    memset(&attr, 0, sizeof attr);
    attr.qp_state = IBV_QPS_RTS; // where it is; access flags: none
    int code = ibv_modify_qp(c->head.id->qp, &attr, IBV_QP_STATE | IBV_QP_ACCESS_FLAGS);
    if (code != 0)
        return rmig__verbs_fail(err, code, "taking the peer's right to write away");
    return RMIG_OK;
}

static uint32_t rmig__verbs_lkey(const struct rmig_mr *mr) {
    return mr == NULL ? 0 : ((const struct ibv_mr *)mr->desc)->lkey;
}

static int rmig__verbs_recv(struct rmig_ep *ep, void *buf, uint64_t n, const struct rmig_mr *mr, uint64_t id,
                            struct rmig_error *err) {
    struct rmig__verbs_conn *c = (struct rmig__verbs_conn *)(void *)ep;
    struct ibv_recv_wr wr, *bad = NULL;
    struct ibv_sge sge;
    if (c->head.listener || !c->qp)
        return rmig_fail(err, RMIG_ERR_STATE, 0, "recv: the endpoint is %s",
                         c->head.listener ? "a listener" : "not resolved yet");
    if (c->end != 0)
        return rmig_fail(err, RMIG_ERR_PEER_GONE, c->end_code, "recv: the connection has ended: %s", c->text);
    if (n > UINT32_MAX)
        return rmig_fail(err, RMIG_ERR_ARGUMENT, 0, "recv: %llu bytes, at most %u", (unsigned long long)n, UINT32_MAX);
    if (c->recvs_out == c->recv_depth)
        return rmig_fail(err, RMIG_ERR_FULL, 0, "recv: %u receives are posted, the most there may be", c->recv_depth);
    sge.addr = (uint64_t)(uintptr_t)buf;
    sge.length = (uint32_t)n;
    sge.lkey = rmig__verbs_lkey(mr);
    memset(&wr, 0, sizeof wr);
    wr.wr_id = id;
    wr.sg_list = &sge;
    wr.num_sge = 1;
    int code = ibv_post_recv(c->head.id->qp, &wr, &bad);
    if (code != 0)
        return rmig__verbs_fail(err, code < 0 ? -code : code, "ibv_post_recv");
    c->recvs_out++;
    return RMIG_OK;
}

/* Notes a work request in the ring, at a position that is its wr_id. */
static uint64_t rmig__verbs_note(struct rmig__verbs_conn *c, uint64_t position, uint64_t id, uint64_t length, bool send,
                                 bool wanted) {
    struct rmig__verbs_slot *slot = rmig__verbs_slot_at(c, position);
    slot->id = id;
    slot->length = length;
    slot->send = send;
    slot->wanted = wanted;
    return position;
}

static void rmig__verbs_posted(struct rmig__verbs_conn *c, bool send, bool signalled) {
    c->sq_last++;
    if (signalled)
        c->sq_signalled = c->sq_last;
    if (send)
        c->sends_out++;
    else
        c->writes_out++;
}

/* Over iWARP a connection that has failed takes no more work, and says so with a number below 0. */
static int rmig__verbs_post_failed(const struct rmig__verbs_conn *c, const char *what, int code,
                                   struct rmig_error *err) {
    code = code < 0 ? -code : code;
    bool gone = code == ENOTCONN || code == EPIPE || (code == EINVAL && rmig__verbs_iwarp(c));
    return rmig_fail(err, gone ? RMIG_ERR_PEER_GONE : RMIG_ERR_FABRIC, code, "verbs: %s with %s: %s", what, c->peer,
                     strerror(code));
}

static int rmig__verbs_send(struct rmig_ep *ep, const void *buf, uint64_t n, const struct rmig_mr *mr, uint64_t id,
                            struct rmig_error *err) {
    struct rmig__verbs_conn *c = (struct rmig__verbs_conn *)(void *)ep;
    struct ibv_send_wr wr, *bad = NULL;
    struct ibv_sge sge;
    int status = rmig__verbs_check_up(c, "send", err);
    if (status != RMIG_OK)
        return status;
    if (n > rmig__verbs_write_max(c))
        return rmig_fail(err, RMIG_ERR_ARGUMENT, 0, "send: %llu bytes, at most %llu", (unsigned long long)n,
                         (unsigned long long)rmig__verbs_write_max(c));
    if (c->sends_out == c->send_depth)
        return rmig_fail(err, RMIG_ERR_FULL, 0, "send: %u sends are outstanding, the most there may be", c->send_depth);
    sge.addr = (uint64_t)(uintptr_t)buf;
    sge.length = (uint32_t)n;
    sge.lkey = rmig__verbs_lkey(mr);
    memset(&wr, 0, sizeof wr);
    wr.wr_id = rmig__verbs_note(c, c->sq_last, id, n, true, true);
    wr.opcode = IBV_WR_SEND;
    wr.send_flags = IBV_SEND_SIGNALED;
    wr.sg_list = &sge;
    wr.num_sge = 1;
    int code = ibv_post_send(c->head.id->qp, &wr, &bad);
    if (code != 0)
        return rmig__verbs_post_failed(c, "posting a send", code, err);
    rmig__verbs_posted(c, true, true);
    return RMIG_OK;
}

/* A write of nothing, whose completion says that all silent writes before it are done. It has a place of its own. */
static int rmig__verbs_say_last(struct rmig__verbs_conn *c) {
    struct ibv_send_wr wr, *bad = NULL;
    memset(&wr, 0, sizeof wr);
    wr.wr_id = rmig__verbs_note(c, c->sq_last, 0, 0, false, false);
    wr.opcode = IBV_WR_RDMA_WRITE;
    wr.send_flags = IBV_SEND_SIGNALED;
    int code = ibv_post_send(c->head.id->qp, &wr, &bad);
    if (code == 0)
        rmig__verbs_posted(c, false, true);
    return code;
}

static void rmig__verbs_fill_write(struct rmig__verbs_conn *c, const struct rmig_write *w, uint64_t position,
                                   struct ibv_send_wr *wr, struct ibv_sge *sge) {
    /* A full queue of silent writes would never empty: now and then one asks for a completion that nobody is told. */
    bool signal = w->signal || position + 1 - c->sq_signalled >= (c->write_depth + 1) / 2;
    if (signal)
        c->sq_signalled = position + 1;
    sge->addr = (uint64_t)(uintptr_t)w->local;
    sge->length = (uint32_t)w->length;
    sge->lkey = rmig__verbs_lkey(w->mr);
    memset(wr, 0, sizeof *wr);
    wr->wr_id = rmig__verbs_note(c, position, w->id, w->length, false, w->signal);
    wr->opcode = IBV_WR_RDMA_WRITE;
    wr->send_flags = signal ? IBV_SEND_SIGNALED : 0;
    wr->sg_list = sge;
    wr->num_sge = 1;
    wr->wr.rdma.remote_addr = w->remote_address;
    wr->wr.rdma.rkey = (uint32_t)w->key;
}

/* Posts up to a batch with one doorbell. How many were taken is in *taken. */
static int rmig__verbs_post_batch(struct rmig__verbs_conn *c, const struct rmig_write *writes, size_t n,
                                  size_t *taken) {
    struct ibv_send_wr *bad = NULL;
    for (size_t i = 0; i < n; i++) {
        rmig__verbs_fill_write(c, &writes[i], c->sq_last + i, &c->wr[i], &c->sge[i]);
        c->wr[i].next = i + 1 < n ? &c->wr[i + 1] : NULL;
    }
    int code = ibv_post_send(c->head.id->qp, c->wr, &bad);
    *taken = code == 0 ? n : bad == NULL ? 0 : (size_t)(bad - c->wr);
    c->sq_last += *taken;
    c->writes_out += (uint32_t)*taken;
    if (c->sq_signalled > c->sq_last)
        c->sq_signalled = c->sq_done; // of those posted, whichever: the next asks early rather than late
    return code;
}

static int rmig__verbs_write(struct rmig_ep *ep, const struct rmig_write *writes, size_t n, struct rmig_error *err) {
    struct rmig__verbs_conn *c = (struct rmig__verbs_conn *)(void *)ep;
    int status = rmig__verbs_check_up(c, "write", err);
    if (status != RMIG_OK)
        return status;
    uint64_t max = rmig__verbs_write_max(c);
    for (size_t i = 0; i < n; i++)
        if (writes[i].length == 0 || writes[i].length > max || writes[i].key > UINT32_MAX)
            return rmig_fail(
                err, RMIG_ERR_ARGUMENT, 0,
                "write: write %zu of %llu bytes with key 0x%llx: must be 1 to %llu bytes, a key of 32 bits", i,
                (unsigned long long)writes[i].length, (unsigned long long)writes[i].key, (unsigned long long)max);
    size_t room = c->write_depth - c->writes_out, done = 0, taken = 0;
    n = n < room ? n : room;
    for (; done < n; done += taken) {
        size_t batch = n - done < RMIG__VERBS_BATCH ? n - done : RMIG__VERBS_BATCH;
        int code = rmig__verbs_post_batch(c, writes + done, batch, &taken);
        if (code == 0)
            continue;
        bool full = (code == ENOMEM || code == -ENOMEM) && c->writes_out + c->sends_out > 0;
        if (done + taken > 0 || full) // what is wrong, if it stays wrong, is told the next time
            return (int)(done + taken);
        return rmig__verbs_post_failed(c, "posting a write", code, err);
    }
    return (int)done;
}

// >>verbs: waiting

/* Something that no descriptor would tell. */
static bool rmig__verbs_pending(const struct rmig__verbs_ep *head) {
    if (head->listener) {
        const struct rmig__verbs_request *r = ((const struct rmig__verbs_listener *)(const void *)head)->requests;
        while (r != NULL && r->told)
            r = r->next;
        return r != NULL;
    }
    const struct rmig__verbs_conn *c = (const struct rmig__verbs_conn *)(const void *)head;
    if (c->state == RMIG__VERBS_ENDED)
        return false;
    return c->state == RMIG__VERBS_RESOLVED || c->end != 0 || (c->connected && c->state == RMIG__VERBS_CONNECTING) ||
           c->has_early[0] || c->has_early[1] || rmig__verbs_held_expired(c);
}

/* Asks for a wake-up at the next completion. What came before that is looked for once more, and kept. */
static int rmig__verbs_arm(struct rmig__verbs_conn *c, struct rmig_error *err) {
    struct ibv_cq *cq;
    void *context;
    while (ibv_get_cq_event(c->completions, &cq, &context) == 0) {
        ibv_ack_cq_events(cq, 1);
        c->armed[cq == c->cq[RMIG__VERBS_SENDS] ? RMIG__VERBS_SENDS : RMIG__VERBS_RECVS] = false;
    }
    for (int q = 0; q < 2; q++) {
        if (c->armed[q])
            continue;
        int code = ibv_req_notify_cq(c->cq[q], 0);
        if (code != 0)
            return rmig__verbs_fail(err, code, "ibv_req_notify_cq");
        c->armed[q] = true;
        if (!c->has_early[q])
            c->has_early[q] = ibv_poll_cq(c->cq[q], 1, &c->early[q]) == 1;
    }
    return RMIG_OK;
}

static int rmig__verbs_fds(struct rmig_ep *ep, struct rmig_fd *fds, size_t n, bool *ready, struct rmig_error *err) {
    struct rmig__verbs_ep *head = (struct rmig__verbs_ep *)(void *)ep;
    struct rmig__verbs_conn *c = head->listener ? NULL : (struct rmig__verbs_conn *)(void *)ep;
    bool up = c != NULL && c->completions != NULL && c->state != RMIG__VERBS_ENDED;
    size_t count = up ? 2 : 1;
    if (rmig__verbs_of(ep)->options.poll) {
        *ready = rmig__verbs_pending(head);
        return 0;
    }
    if (n < count)
        return rmig_fail(err, RMIG_ERR_ARGUMENT, 0, "fds: room for %zu descriptors, %zu needed", n, count);
    memset(fds, 0, count * sizeof *fds);
    fds[0].fd = head->channel->fd;
    if (up) {
        fds[1].fd = c->completions->fd;
        int status = c->state == RMIG__VERBS_UP ? rmig__verbs_arm(c, err) : RMIG_OK;
        if (status != RMIG_OK)
            return status;
    }
    *ready = rmig__verbs_pending(head);
    if (c != NULL && c->held_at != 0 && c->end == 0)
        *ready = true; // the reason of a failure is awaited for a moment, and no descriptor tells when that is over
    return (int)count;
}

static int rmig__verbs_wait(struct rmig_fabric *base, struct rmig_ep *const *eps, size_t n, uint64_t deadline,
                            struct rmig_error *err) {
    struct pollfd p[RMIG__VERBS_POLLFDS];
    size_t count = 0;
    if (((struct rmig__verbs *)(void *)base)->options.poll) {
        sched_yield();
        return RMIG_OK;
    }
    for (size_t i = 0; i < n; i++) {
        struct rmig_fd fds[4];
        bool ready = false;
        int got = rmig__verbs_fds(eps[i], fds, 4, &ready, err);
        if (got < 0)
            return got;
        if (ready)
            return RMIG_OK;
        for (int k = 0; k < got && count < RMIG__VERBS_POLLFDS; k++, count++) {
            p[count].fd = fds[k].fd;
            p[count].events = POLLIN;
            p[count].revents = 0;
        }
    }
    uint64_t now = rmig__verbs_now(base), left = deadline > now ? deadline - now : 0;
    if (left > (uint64_t)3600 * 1000000000u)
        left = (uint64_t)3600 * 1000000000u; // an early return is allowed
    if (poll(p, (nfds_t)count, (int)((left + 999999) / 1000000)) < 0 && errno != EINTR)
        return rmig__verbs_fail(err, errno, "poll");
    return RMIG_OK;
}

// >>verbs: the fabric

static void rmig__verbs_close_fabric(struct rmig_fabric *f) { rmig__verbs_free(f); }

static const struct rmig_fabric_ops *rmig__verbs_ops(void) {
    static const struct rmig_fabric_ops ops = {
        sizeof ops,
        "verbs",
        rmig__verbs_close_fabric,
        rmig__verbs_now,
        rmig__verbs_wait,
        rmig__verbs_listen,
        rmig__verbs_address,
        rmig__verbs_open_active,
        rmig__verbs_open_request,
        rmig__verbs_reject,
        rmig__verbs_connect,
        rmig__verbs_accept,
        rmig__verbs_disconnect,
        rmig__verbs_close,
        rmig__verbs_caps,
        rmig__verbs_reg,
        rmig__verbs_dereg,
        rmig__verbs_recv,
        rmig__verbs_send,
        rmig__verbs_write,
        rmig__verbs_poll,
        rmig__verbs_fds,
        rmig__verbs_reg_dmabuf,
        rmig__verbs_lockable,
        rmig__verbs_revoke,
        rmig__verbs_cut,
        rmig__verbs_next,
    };
    return &ops;
}

/* RMIG_OK, or an error that lists what devices there are. */
static int rmig__verbs_check_device(const char *wanted, struct rmig_error *err) {
    struct rmig__list names;
    int count = 0;
    bool found = false;
    struct ibv_device **list = ibv_get_device_list(&count);
    rmig__list_begin(&names, ", ", 300, (size_t)count);
    for (int i = 0; list != NULL && i < count; i++) {
        const char *name = ibv_get_device_name(list[i]);
        found = found || wanted == NULL || strcmp(name, wanted) == 0;
        rmig__list_add(&names, name);
    }
    if (list != NULL)
        ibv_free_device_list(list);
    if (found)
        return RMIG_OK;
    if (count == 0)
        return rmig_fail(err, RMIG_ERR_FABRIC, ENODEV,
                         "verbs: no RDMA device here (`rdma link` lists them; is ib_uverbs loaded?)");
    return rmig_fail(err, RMIG_ERR_FABRIC, ENODEV, "verbs: no RDMA device '%s' here; there is %s", wanted, names.text);
}

RMIG__DEF struct rmig_fabric *rmig_verbs_open(const struct rmig_verbs_options *options, struct rmig_error *err) {
    struct rmig_verbs_options defaults;
    memset(&defaults, 0, sizeof defaults);
    if (options == NULL)
        options = &defaults;
    if (options->device != NULL && strlen(options->device) >= IBV_SYSFS_NAME_MAX) {
        rmig_fail(err, RMIG_ERR_ARGUMENT, 0, "verbs: the device's name has %zu bytes, at most %d",
                  strlen(options->device), IBV_SYSFS_NAME_MAX - 1);
        return NULL;
    }
    if (rmig__verbs_check_device(options->device, err) != RMIG_OK)
        return NULL;
    struct rmig__verbs *f = (struct rmig__verbs *)rmig__verbs_alloc(1, sizeof *f);
    if (f == NULL) {
        rmig_fail(err, RMIG_ERR_NO_MEMORY, 0, "out of memory for a fabric");
        return NULL;
    }
    f->base.ops = rmig__verbs_ops();
    f->options = *options;
    if (options->device != NULL)
        memcpy(f->device, options->device, strlen(options->device) + 1);
    f->options.device = NULL; // the caller's: kept as a copy
    return &f->base;
}

#ifdef __cplusplus
}
#endif

#endif // RMIG_IMPLEMENTATION
