/*
rmig_fabric_ofi.h - a fabric for rmig.h over libfabric: tcp, verbs and other providers with connected endpoints

    Do this
        #define RMIG_IMPLEMENTATION
        #include "rmig.h"
        #include "rmig_fabric_ofi.h"
    in exactly *one* C or C++ file, and include it without the macro elsewhere. Link with -lfabric -pthread
(libfabric 1.11 or later, 2.x too) and -pthread. Only the file with the implementation needs libfabric's headers. It
uses POSIX clocks, poll and getaddrinfo: under -std=c11 either include it first (it then defines _DEFAULT_SOURCE if no
feature macro is defined) or define a feature macro yourself.

USE

        struct rmig_error err;
        struct rmig_fabric *fabric = rmig_ofi_open(NULL, &err);
        if (fabric == NULL)
            fprintf(stderr, "%s\n", err.text);
        else
            printf("over %s\n", rmig_ofi_provider(fabric));
        ...                             // rmig_source_open(fabric, ...) or rmig_sink_open(fabric, ...)
        rmig_fabric_close(fabric);

    Both ends must use the same provider: name it in the options where the hosts differ.
        struct rmig_ofi_options opt = {0};
        opt.provider = "tcp";

WHAT IT ASKS OF A PROVIDER

    FI_EP_MSG endpoints with messages and RMA writes, IP addresses, and either delivery-complete writes or sends that
    stay behind the writes before them. Memory registration may need FI_MR_LOCAL, FI_MR_VIRT_ADDR, FI_MR_ALLOCATED,
    FI_MR_PROV_KEY and FI_MR_ENDPOINT; keys longer than 64 bits (FI_MR_RAW) are not taken. `fi_info -t FI_EP_MSG` lists
    candidates.

REGISTRATION

    libfabric's providers for adapters keep what is deregistered in a cache of registrations, where a peer with the key
could still write to it. rmig_ofi_open therefore puts FI_MR_CACHE_MAX_COUNT=0 into the environment unless it is there
already (call it before other threads use the environment), which has its effect if libfabric was not used before in
the process; where the cache is on all the same, no connection is made.

STRANGERS

    libfabric's providers over TCP trust their peer. What could be done about that is done here: nothing is shared
between connections, keys are drawn at random, each endpoint has a receive context of its own, and FI_NET_MAX_SAVED=0
and FI_TCP_MAX_SAVED=0 go into the environment as above, so that no tagged message is kept for nobody. What is left,
seen with 1.17's `tcp` and `net`: whoever can connect can end the process, with an acknowledgement of 16 bytes that
nobody waits for; and a peer that was given a key and guesses where its region lies in memory can write beyond the
region's end, since the length it names is added without a look at the carry. With 2.1's `tcp` three more messages end
the process, and nothing asked for here prevents it: a tagged one, one of the rendezvous of tagged ones, and one with the
flag "commit" (versions between 1.17 and 2.1, and later ones, were not tried). Only peers that are trusted may reach a
listener over TCP: keep it on a network of its own, or behind a tunnel that knows who they are. Adapters check in
hardware, and have none of these faults.

POPULATING

    An adapter pins what is registered, so the memory is there when the data comes. A provider in software (tcp) does
not, and the first touch of fresh guest memory then costs more than the copy. So memory registered for the peer's writes
is populated ahead of the wire by a thread of the fabric's own, started at the first such registration and ended with
the fabric. It never changes what memory holds, and never touches what has been deregistered. Linux 5.14 or later;
elsewhere, with adapters and with no_populate set there is no thread.

ADDRESSES

    "host:port", "127.0.0.1:4444", "[::1]:4444", "[fe80::1%eth0]:4444". To listen on all addresses of the host: ":4444",
    of IPv4 alone: "0.0.0.0:4444"; on a free port: port 0. A name is listened on at all of its addresses that the host
    has, and connected to at the first that takes the connection; link-local ones that come without their interface are
    left out. Host names are looked up by the call that opens the endpoint, which may block for as long as the resolver
    does; numeric addresses do not.

QEMU

    The verbs provider puts a byte, the length, before private data, which a stock QEMU neither expects nor sends. As a
source it can still be served: its request is recognised, and all of the sink's memory is pinned, as if the source had
asked for it. As a sink it cannot be reached, and stops listening when this is tried: use rmig_fabric_verbs.h.

KNOWN OF LIBFABRIC

    The descriptors of 1.17's provider `net` and of 1.18.0's `tcp` stay readable after the first message (fixed in
    1.18.1): all works, but waiting spins. 1.17's `tcp` is not affected. The deprecated `sockets` loses completions of
    writes and ends the process when a `tcp` peer connects: it is refused.

    A TCP connection on which no request comes is libfabric's alone: it costs a descriptor until the client closes it,
    after the listener and the fabric are closed too. A process that listens to strangers bounds them from outside.

LICENCE

    MIT, see the end of rmig.h.
*/
#ifndef RMIG_FABRIC_OFI_H
#define RMIG_FABRIC_OFI_H

#if defined(RMIG_IMPLEMENTATION) && defined(__STRICT_ANSI__) && !defined(_DEFAULT_SOURCE) && !defined(_GNU_SOURCE) &&  \
    !defined(_POSIX_C_SOURCE)
#define _DEFAULT_SOURCE 1
#endif

#include "rmig.h"

#ifdef RMIG_NAMESPACE
#define rmig_ofi_open RMIG__NAME(rmig_ofi_open)
#define rmig_ofi_provider RMIG__NAME(rmig_ofi_provider)
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* Zero-initialise it: then everything has its default. */
struct rmig_ofi_options {
    const char *provider; // as fi_info names it. NULL: the first on offer that can do it; tcp without an adapter
    bool poll; // busy poll: no descriptors to wait on, waits only yield the processor. For cores to spare
    bool no_populate; // leave the first touch of registered memory to the data's arrival; see POPULATING above
};

/* Opens a fabric. options NULL: all defaults. Returns NULL with *err filled in (err may be NULL): RMIG_ERR_FABRIC when
   no provider can do it, RMIG_ERR_NO_MEMORY. Loads libfabric's providers, which takes some 100 ms the first time. Close
   it with rmig_fabric_close. */
RMIG_API struct rmig_fabric *rmig_ofi_open(const struct rmig_ofi_options *options, struct rmig_error *err);

/* The name of the provider in use, valid until the fabric is closed. f must come from rmig_ofi_open. */
RMIG_API const char *rmig_ofi_provider(const struct rmig_fabric *f);

#ifdef __cplusplus
}
#endif

#endif // RMIG_FABRIC_OFI_H

#if defined(RMIG_IMPLEMENTATION) && !defined(RMIG_FABRIC_OFI_IMPLEMENTATION_DONE)
#define RMIG_FABRIC_OFI_IMPLEMENTATION_DONE

// >>ofi: libfabric and the operating system

#include <errno.h>
#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <strings.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#include <rdma/fabric.h>
#include <rdma/fi_cm.h>
#include <rdma/fi_domain.h>
#include <rdma/fi_endpoint.h>
#include <rdma/fi_eq.h>
#include <rdma/fi_errno.h>
#include <rdma/fi_rma.h>

#ifndef CLOCK_MONOTONIC
#error "rmig_fabric_ofi.h needs POSIX: compile with -std=gnu11 or define _DEFAULT_SOURCE before the first #include"
#endif
#if FI_MAJOR_VERSION < 1 || (FI_MAJOR_VERSION == 1 && FI_MINOR_VERSION < 11)
#error "rmig_fabric_ofi.h needs libfabric 1.11 or later"
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* The interface version asked for. 2.x still speaks 1.17, in which nothing used here differs. */
#if FI_MAJOR_VERSION > 1 || FI_MINOR_VERSION > 17
#define RMIG__OFI_VERSION FI_VERSION(1, 17)
#else
#define RMIG__OFI_VERSION FI_VERSION(FI_MAJOR_VERSION, FI_MINOR_VERSION)
#endif

#define RMIG__OFI_MR_MODE (FI_MR_LOCAL | FI_MR_VIRT_ADDR | FI_MR_ALLOCATED | FI_MR_PROV_KEY | FI_MR_ENDPOINT)
#define RMIG__OFI_ORDER (FI_ORDER_SAS | FI_ORDER_SAW | FI_ORDER_WAW)
#define RMIG__OFI_STRICT 0x1FFULL // completions in the order of posting; 2.x deprecates its name
#define RMIG__OFI_CM_DATA 1024 // private data that an event may bring: more than any provider has
#define RMIG__OFI_HOLD_NS 100000000ULL // how long a cancelled operation waits for the reason
#define RMIG__OFI_WAIT_MAX_NS 1000000000ULL // a provider's lost wake-up costs this, not a hang
#define RMIG__OFI_IDLE_NS 50000 // sleep where a provider has no descriptors
#define RMIG__OFI_POLLFDS 64
#define RMIG__OFI_REQUESTS 64 // at a listener, neither opened nor rejected; what comes beyond is rejected
#define RMIG__OFI_FREE_PORTS 8 // tried until one is free at all addresses of a name
#define RMIG__OFI_DESCRIPTORS 16 // that an endpoint takes, at most: its queues, and libfabric's own for each
#define RMIG__OFI_STARVED_NS 1000000000ULL // how often a listener says that it can accept nobody
#define RMIG__OFI_SOFT_WRITE                                                                                           \
    1048576 // longer writes fall out of the caches of a provider in software: measured, a quarter slower

struct rmig__ofi_range { // to be populated
    uintptr_t at, end;
    const void *owner; // the registration
};

struct rmig__ofi_populator {
    pthread_t thread;
    pthread_mutex_t lock; // of all that follows
    pthread_cond_t wake, idle;
    struct rmig__ofi_range *range; // oldest first
    size_t count, capacity;
    const void *busy; // whose range is being populated
    bool stop;
};

struct rmig__ofi {
    struct rmig_fabric base;
    char provider[FI_NAME_MAX * 2];
    bool poll;
    bool delivery; // completions mean delivery
    uint64_t order; // message order asked for
    bool shared; // receive contexts of their own are bound to endpoints: see rmig__ofi_negotiate
    bool no_populate;
    struct rmig__ofi_populator *populator; // NULL: not started
};

struct rmig__ofi_ep { // what listeners and connections share
    struct rmig_ep base;
    bool listener;
    bool waitable;
    struct fid_fabric *fabric; // its own: see rmig__ofi_open_fabric
    struct fid_eq *eq;
    struct fi_info *info;
};

struct rmig__ofi_request {
    struct rmig__ofi_request *next;
    struct fid_pep *pep; // that it came to
    struct fi_info *info;
    bool told; // its event was delivered
    bool bare; // its private data came without libfabric's frame: see QEMU above
    size_t length;
    uint8_t data[RMIG__OFI_CM_DATA];
};

struct rmig__ofi_listener {
    struct rmig__ofi_ep head; // info: of the first address
    struct fid_pep **pep; // one for each address
    size_t pep_count, pep_live; // behind the live ones: those whose adapter was removed
    char name[256]; // that was given, where it has several addresses
    struct rmig__ofi_request *requests;
    char text[512]; // what went wrong with a request; empty: nothing that was not told
    int code;
    uint64_t asked_at; // when it was last looked whether descriptors are left
    uint32_t users; // the caller, and connections neither accepted nor closed: rejecting them takes the listener
};

enum rmig__ofi_kind { RMIG__OFI_SEND, RMIG__OFI_RECV, RMIG__OFI_WRITE };

struct rmig__ofi_op { // an operation in flight; its address is the context that libfabric hands back
    struct fi_context2 context; // first
    enum rmig__ofi_kind kind;
    uint32_t index; // in its array
    uint64_t id;
    uint64_t length;
    bool wanted; // write: the caller wants the event
    bool done;
    bool told;
};

enum rmig__ofi_state { RMIG__OFI_RESOLVED, RMIG__OFI_IDLE, RMIG__OFI_CONNECTING, RMIG__OFI_UP, RMIG__OFI_ENDED };

struct rmig__ofi_conn {
    struct rmig__ofi_ep head;
    enum rmig__ofi_state state;
    struct fid_domain *domain; // its own: a key is good in all of its domain, and nowhere else
    struct rmig__ofi_listener *from; // passive side, until accepted
    struct fid_pep *pep; // that the request came to
    struct addrinfo *addresses, *address; // active side: all of the name; the one at hand
    struct rmig_ep_config cfg;
    struct fid_ep *ep;
    struct fid_ep *context; // takes the receives; NULL: ep does
    struct fid_cq *cq;
    char peer[300]; // address, for texts
    size_t cm_data_max;
    bool ordered_completions;
    bool bare; // passive side: the peer reads private data without libfabric's frame

    uint32_t send_depth, recv_depth, write_depth;
    struct rmig__ofi_op *ops; // all of them: sends, then receives, then writes
    struct rmig__ofi_op **free_sends, **free_recvs; // stacks
    uint32_t free_send_count, free_recv_count;
    struct rmig__ofi_op **events; // ring of completed operations that poll has not told yet
    uint64_t event_first, event_last;
    uint64_t write_first, write_done, write_last; // ring: first not told, first not complete, next to post
    uint32_t silent_writes; // posted since the last that asked for a completion
    uint32_t sends_posted;

    bool connected; // seen, not told yet
    bool leaving, left; // disconnect was called; was done
    enum rmig_fabric_event_type end; // how the connection ended, 0: it has not
    int end_code;
    uint64_t held_at; // when the first operation was cancelled, 0: none was
    int held_code;
    size_t data_length;
    uint8_t data[RMIG__OFI_CM_DATA];
    char text[320];
};

union rmig__ofi_cm_event {
    struct fi_eq_entry entry;
    struct fi_eq_cm_entry cm;
    uint64_t align;
    char bytes[sizeof(struct fi_eq_cm_entry) + RMIG__OFI_CM_DATA];
};

static void *rmig__ofi_alloc(size_t n, size_t size) {
    void *p = RMIG_MALLOC(n * size);
    if (p != NULL)
        memset(p, 0, n * size);
    return p;
}

static void rmig__ofi_free(void *p) { // an overridden RMIG_FREE need not take NULL
    if (p != NULL)
        RMIG_FREE(p);
}

static int rmig__ofi_fail(struct rmig_error *err, int status, ssize_t ret, const char *what) {
    int code = ret < 0 ? (int)-ret : 0;
    if (code == FI_ENOMEM)
        status = RMIG_ERR_NO_MEMORY;
    return rmig_fail(err, status, code, "libfabric: %s: %s (%d)", what, fi_strerror(code), code);
}

static const char *rmig__ofi_name(const char *name) { return name == NULL ? "" : name; }

static struct rmig__ofi *rmig__ofi_of(struct rmig_ep *ep) { return (struct rmig__ofi *)(void *)ep->fabric; }

static uint64_t rmig__ofi_now(struct rmig_fabric *f) {
    struct timespec t;
    (void)f;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

// >>ofi: descriptors

static bool rmig__ofi_starved(void) {
    int fd[4], n = 0, code = 0;
    while (n < 4 && code == 0) {
        fd[n] = open("/dev/null", O_RDONLY | O_CLOEXEC);
        code = fd[n] < 0 ? errno : 0;
        n += code == 0;
    }
    while (n > 0)
        close(fd[--n]);
    return code == EMFILE || code == ENFILE;
}

/* libfabric says "no memory", or nothing, when it has no descriptors. Returns err's status. */
static int rmig__ofi_blame_descriptors(const struct rmig__ofi *f, struct rmig_error *err) {
    struct rlimit limit;
    if (err->provider_code != EMFILE && err->provider_code != ENFILE && !rmig__ofi_starved())
        return err->status;
    memset(&limit, 0, sizeof limit);
    getrlimit(RLIMIT_NOFILE, &limit);
    return rmig_fail(err, RMIG_ERR_FABRIC, EMFILE,
                     "libfabric provider '%s': out of file descriptors: a listener or a connection takes up to %d, and "
                     "this process may have %llu: raise RLIMIT_NOFILE (ulimit -n), or close some (%.200s)",
                     f->provider, RMIG__OFI_DESCRIPTORS, (unsigned long long)limit.rlim_cur, err->text);
}

// >>ofi: populating

#define RMIG__OFI_POPULATE_WRITE 23 // MADV_POPULATE_WRITE of Linux 5.14, which older headers lack
#define RMIG__OFI_PIECE ((uintptr_t)4 << 20) // populated at once: what a deregistration may have to wait for

static void *rmig__ofi_populate_run(void *argument) {
    struct rmig__ofi_populator *p = (struct rmig__ofi_populator *)argument;
    pthread_mutex_lock(&p->lock);
    while (!p->stop) {
        if (p->count == 0) {
            pthread_cond_wait(&p->wake, &p->lock);
            continue;
        }
        struct rmig__ofi_range *r = &p->range[0];
        // From the end: data arrives from the beginning, and where both come to the same page one waits for the other.
        uintptr_t n = r->end - r->at < RMIG__OFI_PIECE ? r->end - r->at : RMIG__OFI_PIECE, at = r->end - n;
        p->busy = r->owner;
        r->end -= n;
        if (r->at == r->end)
            memmove(r, r + 1, --p->count * sizeof *r);
        pthread_mutex_unlock(&p->lock);
        int ret = madvise((void *)at, n, RMIG__OFI_POPULATE_WRITE); // NOLINT(performance-no-int-to-ptr)
        int code = ret == 0 ? 0 : errno;
        pthread_mutex_lock(&p->lock);
        p->busy = NULL;
        p->stop = p->stop || code == EINVAL; // an older kernel
        pthread_cond_broadcast(&p->idle);
    }
    pthread_mutex_unlock(&p->lock);
    return NULL;
}

static void rmig__ofi_populate_free(struct rmig__ofi_populator *p) {
    pthread_cond_destroy(&p->idle);
    pthread_cond_destroy(&p->wake);
    pthread_mutex_destroy(&p->lock);
    rmig__ofi_free(p->range);
    rmig__ofi_free(p);
}

static struct rmig__ofi_populator *rmig__ofi_populate_start(void) {
    struct rmig__ofi_populator *p = (struct rmig__ofi_populator *)rmig__ofi_alloc(1, sizeof *p);
    if (p == NULL)
        return NULL;
    pthread_mutex_init(&p->lock, NULL);
    pthread_cond_init(&p->wake, NULL);
    pthread_cond_init(&p->idle, NULL);
    sigset_t all, before; // the embedder's signals are not for this thread
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int ret = pthread_create(&p->thread, NULL, rmig__ofi_populate_run, p);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (ret == 0)
        return p;
    rmig__ofi_populate_free(p);
    return NULL;
}

/* Whole pages of the range are populated in the background. It is help only: where it cannot be had, nothing is lost.
 */
static void rmig__ofi_populate(struct rmig__ofi *f, void *address, uint64_t length, const void *owner) {
    long page = sysconf(_SC_PAGESIZE);
    uintptr_t mask = page > 0 ? (uintptr_t)page - 1 : 4095;
    struct rmig__ofi_range r;
    r.at = ((uintptr_t)address + mask) & ~mask;
    r.end = ((uintptr_t)address + (uintptr_t)length) & ~mask;
    r.owner = owner;
    if (r.at >= r.end || f->no_populate)
        return;
    if (f->populator == NULL)
        f->populator = rmig__ofi_populate_start();
    struct rmig__ofi_populator *p = f->populator;
    if (p == NULL)
        return;
    pthread_mutex_lock(&p->lock);
    if (p->count == p->capacity) {
        size_t capacity = p->capacity == 0 ? 64 : 2 * p->capacity;
        void *more = RMIG_REALLOC(p->range, capacity * sizeof *p->range);
        if (more != NULL) {
            p->range = (struct rmig__ofi_range *)more;
            p->capacity = capacity;
        }
    }
    if (p->count < p->capacity && !p->stop)
        p->range[p->count++] = r;
    pthread_cond_signal(&p->wake);
    pthread_mutex_unlock(&p->lock);
}

/* The memory may be gone after this. */
static void rmig__ofi_populate_drop(struct rmig__ofi *f, const void *owner) {
    struct rmig__ofi_populator *p = f->populator;
    if (p == NULL)
        return;
    pthread_mutex_lock(&p->lock);
    size_t kept = 0;
    for (size_t i = 0; i < p->count; i++)
        if (p->range[i].owner != owner)
            p->range[kept++] = p->range[i];
    p->count = kept;
    while (p->busy == owner)
        pthread_cond_wait(&p->idle, &p->lock);
    pthread_mutex_unlock(&p->lock);
}

static void rmig__ofi_populate_stop(struct rmig__ofi *f) {
    struct rmig__ofi_populator *p = f->populator;
    if (p == NULL)
        return;
    pthread_mutex_lock(&p->lock);
    p->stop = true;
    pthread_cond_signal(&p->wake);
    pthread_mutex_unlock(&p->lock);
    pthread_join(p->thread, NULL);
    rmig__ofi_populate_free(p);
    f->populator = NULL;
}

// >>ofi: choosing a provider, resolving addresses

static struct fi_info *rmig__ofi_hints(const char *provider, bool delivery, uint64_t order, bool shared) {
    struct fi_info *h = fi_allocinfo();
    if (h == NULL)
        return NULL;
    h->caps = FI_MSG | FI_RMA | FI_SEND | FI_RECV | FI_WRITE | FI_REMOTE_WRITE;
    h->mode = FI_CONTEXT | FI_CONTEXT2;
    h->addr_format = FI_SOCKADDR;
    h->ep_attr->type = FI_EP_MSG;
    if (shared)
        h->ep_attr->rx_ctx_cnt = FI_SHARED_CONTEXT;
    h->domain_attr->threading = FI_THREAD_DOMAIN;
    h->domain_attr->control_progress = FI_PROGRESS_MANUAL; // no threads behind our back
    h->domain_attr->data_progress = FI_PROGRESS_MANUAL;
    h->domain_attr->mr_mode = RMIG__OFI_MR_MODE;
    h->tx_attr->op_flags = delivery ? FI_DELIVERY_COMPLETE : 0;
    h->tx_attr->msg_order = order;
    h->rx_attr->msg_order = order;
    if (provider == NULL || provider[0] == '\0')
        return h;
    size_t n = strlen(provider) + 1;
    h->fabric_attr->prov_name = (char *)malloc(n); // fi_freeinfo frees it: not RMIG_MALLOC
    if (h->fabric_attr->prov_name == NULL) {
        fi_freeinfo(h);
        return NULL;
    }
    memcpy(h->fabric_attr->prov_name, provider, n);
    return h;
}

static bool rmig__ofi_usable(const struct fi_info *info) {
    if (info->ep_attr->type != FI_EP_MSG || (info->domain_attr->mr_mode & ~RMIG__OFI_MR_MODE) != 0)
        return false;
    if ((info->domain_attr->mr_mode & FI_MR_PROV_KEY) == 0 && info->domain_attr->mr_key_size < sizeof(uint32_t))
        return false; // keys that can be guessed
    return info->addr_format == FI_SOCKADDR || info->addr_format == FI_SOCKADDR_IN ||
           info->addr_format == FI_SOCKADDR_IN6;
}

/* The first usable offer for the fabric's provider; the caller frees it. tx, rx: queue sizes wanted, 0: its default. */
static int rmig__ofi_getinfo(const struct rmig__ofi *f, const char *host, const char *port, uint64_t flags, size_t tx,
                             size_t rx, struct fi_info **out) {
    struct fi_info *list = NULL, *i, *h = rmig__ofi_hints(f->provider, f->delivery, f->order, f->shared);
    *out = NULL;
    if (h == NULL)
        return -FI_ENOMEM;
    h->tx_attr->size = tx;
    h->rx_attr->size = rx;
    int ret = fi_getinfo(RMIG__OFI_VERSION, host, port, flags, h, &list);
    fi_freeinfo(h);
    if (ret != 0)
        return ret;
    for (i = list; i != NULL && !rmig__ofi_usable(i); i = i->next)
        ;
    if (i != NULL)
        *out = fi_dupinfo(i);
    ret = i == NULL ? -FI_ENODATA : *out == NULL ? -FI_ENOMEM : 0;
    fi_freeinfo(list);
    return ret;
}

static bool rmig__ofi_pins(const struct fi_info *info) { // whoever makes keys or wants memory to exist has an adapter
    return (info->domain_attr->mr_mode & (FI_MR_ALLOCATED | FI_MR_PROV_KEY)) != 0;
}

/* Sets delivery and order to the best that the provider can. In libfabric's providers in software a tagged message
   follows the endpoint's pointer to a receive context, which there may be none: one for each endpoint is asked for
   where it can be had. Adapters have no such parser, and iWARP has no such contexts. */
static bool rmig__ofi_negotiate(struct rmig__ofi *f) {
    for (int attempt = 0; attempt < 3; attempt++) {
        struct fi_info *info;
        f->delivery = attempt != 1;
        f->order = attempt == 2 ? FI_ORDER_SAS : RMIG__OFI_ORDER;
        f->shared = false;
        if (rmig__ofi_getinfo(f, NULL, NULL, 0, 0, 0, &info) != 0)
            continue;
        f->shared = !rmig__ofi_pins(info);
        fi_freeinfo(info);
        if (f->shared && rmig__ofi_getinfo(f, NULL, NULL, 0, 0, 0, &info) == 0)
            fi_freeinfo(info);
        else
            f->shared = false;
        return true;
    }
    return false;
}

static bool rmig__ofi_is_deprecated(const char *name) { return strncasecmp(name, "sockets", 7) == 0; }

/* "", or "; ...": the environment may leave libfabric fewer providers than are installed, which its own words do not
   tell. Returns buf. */
static const char *rmig__ofi_filter_hint(char *buf, size_t size) {
    const char *filter = getenv("FI_PROVIDER");
    buf[0] = '\0';
    if (filter != NULL && filter[0] != '\0')
        snprintf(buf, size, "; FI_PROVIDER=%.60s in the environment limits what libfabric offers: unset it", filter);
    return buf;
}

static int rmig__ofi_refuse_deprecated(struct rmig_error *err) {
    char hint[160];
    return rmig_fail(err, RMIG_ERR_FABRIC, 0,
                     "libfabric's provider 'sockets' is deprecated, loses completions of writes and ends the process "
                     "when a peer uses another provider: use 'tcp' at both ends%s",
                     rmig__ofi_filter_hint(hint, sizeof hint));
}

static int rmig__ofi_no_provider(const char *wanted, int code, struct rmig_error *err) {
    char hint[160];
    rmig__ofi_filter_hint(hint, sizeof hint);
    if (wanted != NULL)
        return rmig_fail(
            err, RMIG_ERR_FABRIC, code,
            "libfabric: provider '%s' has no connected endpoints with ordered or delivery-complete RMA writes here: "
            "%s (`fi_info -t FI_EP_MSG` lists candidates)%s",
            wanted, fi_strerror(code), hint);
    return rmig_fail(err, RMIG_ERR_FABRIC, code,
                     "libfabric: no provider has connected endpoints with RMA writes here: %s%s", fi_strerror(code),
                     hint);
}

static int rmig__ofi_choose(struct rmig__ofi *f, const char *wanted, struct rmig_error *err) {
    if (wanted != NULL && rmig__ofi_is_deprecated(wanted))
        return rmig__ofi_refuse_deprecated(err);
    struct fi_info *list = NULL, *h = rmig__ofi_hints(wanted, false, 0, false);
    bool found = false, deprecated = false;
    if (h == NULL)
        return rmig_fail(err, RMIG_ERR_NO_MEMORY, 0, "out of memory for libfabric's hints");
    int ret = fi_getinfo(RMIG__OFI_VERSION, NULL, NULL, 0, h, &list);
    fi_freeinfo(h);
    for (struct fi_info *i = list; ret == 0 && i != NULL && !found; i = i->next) {
        const char *name = rmig__ofi_name(i->fabric_attr->prov_name);
        deprecated = deprecated || rmig__ofi_is_deprecated(name);
        if (!rmig__ofi_usable(i) || rmig__ofi_is_deprecated(name) || strcmp(name, f->provider) == 0 ||
            strlen(name) >= sizeof f->provider)
            continue;
        memcpy(f->provider, name, strlen(name) + 1);
        found = rmig__ofi_negotiate(f);
    }
    if (list != NULL)
        fi_freeinfo(list);
    if (found)
        return RMIG_OK;
    if (deprecated)
        return rmig__ofi_refuse_deprecated(err);
    return rmig__ofi_no_provider(wanted, ret == 0 ? FI_ENODATA : -ret, err);
}

static bool rmig__ofi_same(const struct addrinfo *a, const struct addrinfo *b) {
    return b->ai_addrlen == a->ai_addrlen && memcmp(b->ai_addr, a->ai_addr, a->ai_addrlen) == 0;
}

/* Which of the host's interfaces leads to a link-local address only its scope can tell. */
static bool rmig__ofi_lacks_scope(const struct addrinfo *a) {
    const struct sockaddr_in6 *in6 = (const struct sockaddr_in6 *)(const void *)a->ai_addr;
    return a->ai_family == AF_INET6 && in6->sin6_addr.s6_addr[0] == 0xfe &&
           (in6->sin6_addr.s6_addr[1] & 0xc0) == 0x80 && in6->sin6_scope_id == 0;
}

/* Drops those that lack their scope, and what is there twice: in a hosts file each line counts. */
static struct addrinfo *rmig__ofi_sift(struct addrinfo *list) {
    struct addrinfo *first = NULL, **last = &first;
    while (list != NULL) {
        struct addrinfo *a = list, *b = first;
        list = a->ai_next;
        a->ai_next = NULL;
        while (b != NULL && !rmig__ofi_same(a, b))
            b = b->ai_next;
        if (b != NULL || rmig__ofi_lacks_scope(a)) {
            freeaddrinfo(a);
            continue;
        }
        *last = a;
        last = &a->ai_next;
    }
    return first;
}

static int rmig__ofi_no_address(const char *address, const char *host, bool passive, struct rmig_error *err) {
    return rmig_fail(
        err, passive ? RMIG_ERR_FABRIC : RMIG_ERR_UNREACHABLE, 0,
        "address '%.100s': '%.100s' stands for link-local addresses alone, which do not tell the interface: "
        "give such an address itself, as in [fe80::2%%eth0]:4444",
        address, host);
}

/* All addresses of a name, IPv6 first where the host was left out: its wildcard mostly takes IPv4 too. */
static int rmig__ofi_lookup(const char *address, bool passive, struct addrinfo **out, struct rmig_error *err) {
    char host[256], port[16];
    int ret = rmig_split_address(address, host, sizeof host, port, sizeof port, err);
    if (ret != RMIG_OK)
        return ret;
    if (port[0] == '\0')
        return rmig_fail(err, RMIG_ERR_ARGUMENT, 0, "address '%s' has no port: \"host:port\" is needed", address);
    if (!passive && (host[0] == '\0' || strtoul(port, NULL, 10) == 0))
        return rmig_fail(err, RMIG_ERR_ARGUMENT, 0,
                         "address '%s' to connect to needs a host and a port from 1 to 65535", address);
    struct addrinfo hints, *list = NULL;
    memset(&hints, 0, sizeof hints);
    hints.ai_socktype = SOCK_STREAM;
    hints.ai_flags = passive ? AI_PASSIVE : 0;
    int gai = getaddrinfo(host[0] == '\0' ? NULL : host, port, &hints, &list);
    if (gai != 0)
        return rmig_fail(err, passive ? RMIG_ERR_FABRIC : RMIG_ERR_UNREACHABLE, gai, "address '%s': %s", address,
                         gai_strerror(gai));
    list = rmig__ofi_sift(list);
    if (list == NULL)
        return rmig__ofi_no_address(address, host, passive, err);
    struct addrinfo *second = list->ai_next;
    if (host[0] == '\0' && list->ai_family == AF_INET && second != NULL && second->ai_next == NULL) {
        second->ai_next = list; // there are two
        list->ai_next = NULL;
        list = second;
    }
    *out = list;
    return RMIG_OK;
}

/* "127.0.0.1:4444", "[::1]:4444". Returns a status. */
static int rmig__ofi_print(const struct sockaddr *a, size_t length, char *buf, size_t size, struct rmig_error *err) {
    char host[256], port[16];
    int ret = getnameinfo(a, (socklen_t)length, host, sizeof host, port, sizeof port, NI_NUMERICHOST | NI_NUMERICSERV);
    if (ret != 0)
        return rmig_fail(err, RMIG_ERR_FABRIC, ret, "an address in figures: %s", gai_strerror(ret));
    ret = snprintf(buf, size, a->sa_family == AF_INET6 ? "[%s]:%s" : "%s:%s", host, port);
    if (ret < 0 || (size_t)ret >= size)
        return rmig_fail(err, RMIG_ERR_ARGUMENT, 0, "address: %zu bytes of room, %d needed", size, ret + 1);
    return RMIG_OK;
}

/* The provider's offer for one address. own_port: instead of the one in it; NULL: that. */
static int rmig__ofi_resolve(const struct rmig__ofi *f, const struct addrinfo *a, bool passive, const char *own_port,
                             size_t tx, size_t rx, struct fi_info **info) {
    char host[256], port[16];
    if (getnameinfo(a->ai_addr, a->ai_addrlen, host, sizeof host, port, sizeof port, NI_NUMERICHOST | NI_NUMERICSERV) !=
        0)
        return -FI_EINVAL;
    const char *service = own_port == NULL ? port : own_port;
    int ret = rmig__ofi_getinfo(f, host, service, passive ? FI_SOURCE : 0, tx, rx, info);
    if (ret != 0 && (tx != 0 || rx != 0)) // the queues wanted may be more than it has
        ret = rmig__ofi_getinfo(f, host, service, passive ? FI_SOURCE : 0, 0, 0, info);
    return ret;
}

// >>ofi: fabrics and event queues

/* Each endpoint has a libfabric fabric of its own. Providers progress all of a fabric in whatever call comes along, and
   connections that have not asked yet point to the listener that took them, even when it is closed: what comes on them
   is never read if nothing of its fabric is left. */
static int rmig__ofi_open_fabric(struct rmig__ofi_ep *ep, struct fi_info *info, struct rmig_error *err) {
    int ret = info == NULL ? -FI_EINVAL : fi_fabric(info->fabric_attr, &ep->fabric, NULL);
    if (ret == 0)
        return RMIG_OK;
    ep->fabric = NULL;
    int status = rmig__ofi_fail(err, RMIG_ERR_FABRIC, ret, "fi_fabric");
    return status < 0 ? status : RMIG_ERR_FABRIC; // static analysis does not see through the variadic rmig_fail
}

static void rmig__ofi_close_fabric(struct rmig_fabric *base) {
    struct rmig__ofi *f = (struct rmig__ofi *)(void *)base;
    rmig__ofi_populate_stop(f);
    rmig__ofi_free(f);
}

static bool rmig__ofi_has_fd(struct fid *fid) { // some take FI_WAIT_FD and have no descriptor
    int fd = -1;
    return fi_control(fid, FI_GETWAIT, &fd) == 0 && fd >= 0;
}

/* Opens the event queue, waitable by descriptor where the provider can. */
static int rmig__ofi_open_eq(struct rmig__ofi_ep *ep, bool poll_only, struct rmig_error *err) {
    struct fi_eq_attr attr;
    memset(&attr, 0, sizeof attr);
    attr.wait_obj = FI_WAIT_FD;
    if (!poll_only && fi_eq_open(ep->fabric, &attr, &ep->eq, NULL) == 0) {
        ep->waitable = rmig__ofi_has_fd(&ep->eq->fid);
        if (ep->waitable)
            return RMIG_OK;
        fi_close(&ep->eq->fid);
    }
    ep->eq = NULL;
    attr.wait_obj = FI_WAIT_NONE;
    int ret = fi_eq_open(ep->fabric, &attr, &ep->eq, NULL);
    return ret == 0 ? RMIG_OK : rmig__ofi_fail(err, RMIG_ERR_FABRIC, ret, "fi_eq_open");
}

// >>ofi: listeners

/* Private data of a rejection that has none: by its data the peer tells one from a port where nobody listens. */
static const uint8_t rmig__ofi_no[8] = {0, 0, 0, 0, 0, 0, 0, 0};

static void rmig__ofi_drop_request(struct rmig__ofi_request *r, const void *data, size_t n) {
    if (r->info != NULL) {
        fi_reject(r->pep, r->info->handle, data, n);
        fi_freeinfo(r->info);
    }
    rmig__ofi_free(r);
}

static void rmig__ofi_stop_queue(struct rmig__ofi_listener *l) {
    if (l->head.eq != NULL)
        fi_close(&l->head.eq->fid);
    if (l->head.fabric != NULL)
        fi_close(&l->head.fabric->fid);
    if (l->head.info != NULL)
        fi_freeinfo(l->head.info);
    l->head.eq = NULL;
    l->head.fabric = NULL;
    l->head.info = NULL;
}

/* Leaves the listener as if it had never listened. */
static void rmig__ofi_stop_listener(struct rmig__ofi_listener *l) {
    for (size_t i = 0; i < l->pep_count; i++)
        fi_close(&l->pep[i]->fid);
    rmig__ofi_free(l->pep);
    l->pep = NULL;
    l->pep_count = l->pep_live = 0;
    rmig__ofi_stop_queue(l);
}

/* Closes the listener when its last user is gone. */
static void rmig__ofi_release_listener(struct rmig__ofi_listener *l) {
    if (--l->users > 0)
        return;
    rmig__ofi_stop_listener(l);
    rmig__ofi_free(l);
}

static bool rmig__ofi_frames(const struct rmig_fabric *f) { // puts a byte, the length, before private data
    return strcmp(((const struct rmig__ofi *)(const void *)f)->provider, "verbs") == 0;
}

/* A stock QEMU's first byte, 0, was taken for a length: what it asked for cannot be known. So it is granted pin-all,
   which a source that did not ask does not look at; 7.2 aborts, with its guest, when it asked and is refused. */
static void rmig__ofi_unframe(const struct rmig__ofi_listener *l, struct rmig__ofi_request *r) {
    static const uint8_t version_1[8] = {0, 0, 0, 1, 0, 0, 0, 1}; // flags: pin-all
    r->bare = r->length == 0 && rmig__ofi_frames(l->head.base.fabric);
    if (!r->bare)
        return;
    memcpy(r->data, version_1, sizeof version_1);
    r->length = sizeof version_1;
}

static struct fid_pep *rmig__ofi_pep_of(const struct rmig__ofi_listener *l, const struct fid *fid) {
    size_t i = 0;
    while (i + 1 < l->pep_count && &l->pep[i]->fid != fid)
        i++;
    return l->pep[i];
}

static void rmig__ofi_add_request(struct rmig__ofi_listener *l, const struct fi_eq_cm_entry *cm, size_t data_length) {
    struct rmig__ofi_request **tail = &l->requests;
    size_t count = 0;
    for (; *tail != NULL; tail = &(*tail)->next)
        count++;
    struct rmig__ofi_request *r = NULL;
    if (count < RMIG__OFI_REQUESTS && data_length <= sizeof r->data)
        r = (struct rmig__ofi_request *)rmig__ofi_alloc(1, sizeof *r);
    struct fid_pep *pep = rmig__ofi_pep_of(l, cm->fid);
    if (r == NULL) {
        fi_reject(pep, cm->info->handle, rmig__ofi_no, sizeof rmig__ofi_no);
        fi_freeinfo(cm->info);
        return;
    }
    r->pep = pep;
    r->info = cm->info;
    r->length = data_length;
    memcpy(r->data, cm->data, data_length);
    rmig__ofi_unframe(l, r);
    *tail = r;
}

/* An adapter was removed: the other addresses are listened on further. False: there is none. */
static bool rmig__ofi_lose_adapter(struct rmig__ofi_listener *l, const struct fid *fid) {
    for (size_t i = 0; i < l->pep_live; i++) {
        struct fid_pep *pep = l->pep[i];
        if (&pep->fid != fid)
            continue;
        l->pep[i] = l->pep[--l->pep_live];
        l->pep[l->pep_live] = pep; // closed with the listener: a request may still name it
    }
    return l->pep_live > 0;
}

/* What is wrong with one that asks ends nothing but its request. Returns the listener's own status. */
static int rmig__ofi_read_listener_error(struct rmig__ofi_listener *l, struct rmig_error *err) {
    struct fi_eq_err_entry e;
    memset(&e, 0, sizeof e);
    ssize_t n = fi_eq_readerr(l->head.eq, &e, 0);
    if (n == -FI_EAGAIN)
        return RMIG_OK;
    int code = n < 0 ? (int)-n : e.err < 0 ? -e.err : e.err;
    if (n >= 0 && code == FI_ENODEV && rmig__ofi_lose_adapter(l, e.fid))
        return RMIG_OK;
    if (n < 0 || code == FI_ENODEV)
        return rmig__ofi_fail(err, RMIG_ERR_FABRIC, -code, "listening");
    l->code = code;
    snprintf(l->text, sizeof l->text, "a request to connect failed: %s", fi_strerror(code));
    return RMIG_OK;
}

/* Takes some of the listener's events, up to the first error; returns its status. */
static int rmig__ofi_read_requests(struct rmig__ofi_listener *l, struct rmig_error *err) {
    for (int i = 0; i < RMIG__OFI_REQUESTS && l->text[0] == '\0'; i++) {
        union rmig__ofi_cm_event buf;
        uint32_t event = 0;
        ssize_t n = fi_eq_read(l->head.eq, &event, &buf, sizeof buf, 0);
        if (n == -FI_EAGAIN)
            return RMIG_OK;
        if (n == -FI_EAVAIL) {
            int status = rmig__ofi_read_listener_error(l, err);
            if (status != RMIG_OK)
                return status;
        } else if (n < 0) {
            return rmig__ofi_fail(err, RMIG_ERR_FABRIC, n, "fi_eq_read");
        } else if (event == FI_CONNREQ && (size_t)n >= sizeof(struct fi_eq_cm_entry)) {
            rmig__ofi_add_request(l, &buf.cm, (size_t)n - sizeof buf.cm);
        }
    }
    return RMIG_OK;
}

/* A provider in software accepts by itself, and where it has no descriptor for that it says nothing. */
static void rmig__ofi_check_starved(struct rmig__ofi_listener *l) {
    uint64_t now = rmig__ofi_now(l->head.base.fabric);
    if (rmig__ofi_pins(l->head.info) || now - l->asked_at < RMIG__OFI_STARVED_NS)
        return;
    l->asked_at = now;
    struct rmig_error err;
    memset(&err, 0, sizeof err);
    rmig_fail(&err, RMIG_OK, 0, "nobody can connect");
    rmig__ofi_blame_descriptors((struct rmig__ofi *)(void *)l->head.base.fabric, &err);
    if (err.status == RMIG_OK)
        return;
    l->code = err.provider_code;
    snprintf(l->text, sizeof l->text, "%s", err.text);
}

static int rmig__ofi_poll_listener(struct rmig__ofi_listener *l, struct rmig_fabric_event *events, size_t n,
                                   struct rmig_error *err) {
    size_t count = 0;
    l->text[0] = '\0'; // was told
    int status = rmig__ofi_read_requests(l, err);
    for (struct rmig__ofi_request *r = l->requests; r != NULL && count < n; r = r->next) {
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
    if (count == 0 && l->text[0] == '\0')
        rmig__ofi_check_starved(l);
    if (count < n && l->text[0] != '\0') {
        struct rmig_fabric_event *e = &events[count++];
        memset(e, 0, sizeof *e);
        e->type = RMIG_FEV_ERROR;
        e->provider_code = l->code;
        e->text = l->text;
    }
    return count > 0 || status == RMIG_OK ? (int)count : status;
}

static void rmig__ofi_close_listener(struct rmig__ofi_listener *l) {
    if (l->pep_count > 0) {
        /* Requests that nobody saw hold memory and descriptors too; fresh ones may come all the time. */
        for (int i = 0; i < RMIG__OFI_REQUESTS && rmig__ofi_read_requests(l, NULL) == RMIG_OK; i++)
            l->text[0] = '\0';
        while (l->requests != NULL) {
            struct rmig__ofi_request *r = l->requests;
            l->requests = r->next;
            rmig__ofi_drop_request(r, NULL, 0);
        }
    }
    rmig__ofi_release_listener(l);
}

/* The first address brings the fabric and the queue that serve all. */
static int rmig__ofi_make_pep(struct rmig__ofi *f, struct rmig__ofi_listener *l, struct fi_info *info,
                              struct fid_pep **pep, struct rmig_error *err) {
    if (l->head.info == info) {
        int status = rmig__ofi_open_fabric(&l->head, info, err);
        if (status == RMIG_OK)
            status = rmig__ofi_open_eq(&l->head, f->poll, err);
        if (status != RMIG_OK)
            return status;
    }
    int ret = fi_passive_ep(l->head.fabric, info, pep, NULL);
    if (ret != 0)
        *pep = NULL;
    if (ret == 0)
        ret = fi_pep_bind(*pep, &l->head.eq->fid, 0);
    if (ret == 0)
        ret = fi_listen(*pep);
    return ret == 0 ? RMIG_OK : rmig_fail(err, RMIG_ERR_FABRIC, -ret, "%s", fi_strerror(-ret));
}

/* Listens on one more address. port: NULL: its own. */
static int rmig__ofi_add_pep(struct rmig__ofi *f, struct rmig__ofi_listener *l, const struct addrinfo *a,
                             const char *port, struct rmig_error *err) {
    struct fi_info *info = NULL;
    struct fid_pep *pep = NULL;
    int ret = rmig__ofi_resolve(f, a, true, port, 0, 0, &info);
    if (ret == -FI_ENODATA && rmig__ofi_resolve(f, a, true, "0", 0, 0, &info) == 0) {
        fi_freeinfo(info);
        ret = -FI_EADDRINUSE; // the verbs provider has tried the port, and does not say so
    }
    if (ret != 0)
        return rmig_fail(err, RMIG_ERR_FABRIC, -ret, "%s", fi_strerror(-ret));
    bool first = l->head.info == NULL;
    if (first)
        l->head.info = info;
    int status = rmig__ofi_make_pep(f, l, info, &pep, err);
    if (status == RMIG_OK)
        l->pep[l->pep_live++] = pep;
    else if (pep != NULL)
        fi_close(&pep->fid);
    l->pep_count = l->pep_live;
    if (!first)
        fi_freeinfo(info);
    else if (status != RMIG_OK)
        rmig__ofi_stop_queue(l);
    return status;
}

static bool rmig__ofi_not_here(int code) { // the host, or the provider, has no such address
    return code == FI_EADDRNOTAVAIL || code == EAFNOSUPPORT || code == FI_ENODATA || code == FI_ENODEV;
}

/* The first address that is listened on, whole and its port. */
static int rmig__ofi_bound(const struct rmig__ofi_listener *l, char *buf, size_t size, char *port, size_t port_size,
                           struct rmig_error *err) {
    union {
        struct sockaddr sa;
        struct sockaddr_storage storage;
    } name;
    size_t length = sizeof name;
    int ret = fi_getname(&l->pep[0]->fid, &name, &length);
    if (ret != 0)
        return rmig__ofi_fail(err, RMIG_ERR_FABRIC, ret, "fi_getname");
    int status = rmig__ofi_print(&name.sa, length, buf, size, err);
    if (status == RMIG_OK)
        snprintf(port, port_size, "%s", strrchr(buf, ':') + 1);
    return status;
}

/* net.ipv6.bindv6only is what every IPv6 socket begins with. */
static bool rmig__ofi_v6_takes_v4(void) {
    int only = 1, fd = socket(AF_INET6, SOCK_STREAM | SOCK_CLOEXEC, 0);
    socklen_t n = sizeof only;
    bool both = fd >= 0 && getsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &only, &n) == 0 && only == 0;
    if (fd >= 0)
        close(fd);
    return both;
}

/* Listens on all of the list that is here, on a free port on the same one everywhere. */
static int rmig__ofi_add_peps(struct rmig__ofi *f, struct rmig__ofi_listener *l, const struct addrinfo *list,
                              size_t count, bool any_host, struct rmig_error *err) {
    char port[16] = "", text[128], entry[250];
    struct rmig__list tried;
    int status = RMIG_OK;
    rmig__list_begin(&tried, "; ", 300, count);
    for (const struct addrinfo *a = list; a != NULL; a = a->ai_next) {
        status = rmig__ofi_add_pep(f, l, a, port[0] == '\0' ? NULL : port, err);
        if (status == RMIG_OK && port[0] == '\0')
            status = rmig__ofi_bound(l, text, sizeof text, port, sizeof port, err);
        if (status != RMIG_OK && any_host && l->pep_count > 0 && err->provider_code == FI_EADDRINUSE &&
            rmig__ofi_v6_takes_v4())
            status = RMIG_OK; // IPv6's wildcard has taken IPv4's
        if (status == RMIG_OK)
            continue;
        if (rmig__ofi_print(a->ai_addr, a->ai_addrlen, text, sizeof text, NULL) != RMIG_OK)
            text[0] = '\0';
        snprintf(entry, sizeof entry, "%s: %.100s", text, err->text);
        rmig__list_add(&tried, entry);
        if (!rmig__ofi_not_here(err->provider_code))
            break;
        status = RMIG_OK;
    }
    if (status == RMIG_OK && l->pep_count > 0)
        return RMIG_OK;
    return rmig_fail(err, err->status, err->provider_code, "%s", tried.text);
}

static int rmig__ofi_start_listener(struct rmig__ofi *f, struct rmig__ofi_listener *l, const char *address,
                                    struct rmig_error *err) {
    char host[256] = "", port[16] = "";
    struct addrinfo *list = NULL;
    size_t count = 0;
    int status = rmig__ofi_lookup(address, true, &list, err);
    if (status != RMIG_OK)
        return status;
    rmig_split_address(address, host, sizeof host, port, sizeof port, NULL);
    for (const struct addrinfo *a = list; a != NULL; a = a->ai_next)
        count++;
    bool any_port = strtoul(port, NULL, 10) == 0, again = true;
    for (int i = 0; i < RMIG__OFI_FREE_PORTS && again; i++) {
        l->pep = (struct fid_pep **)rmig__ofi_alloc(count + 1, sizeof(struct fid_pep *));
        status = l->pep == NULL ? rmig_fail(err, RMIG_ERR_NO_MEMORY, 0, "out of memory for a listener")
                                : rmig__ofi_add_peps(f, l, list, count, host[0] == '\0', err);
        again = status != RMIG_OK && any_port && l->pep_count > 0 && err->provider_code == FI_EADDRINUSE;
        if (again) // a port that was free at one address is not at another
            rmig__ofi_stop_listener(l);
    }
    freeaddrinfo(list);
    if (status != RMIG_OK)
        return rmig_fail(err, err->status, err->provider_code,
                         "libfabric provider '%s': listening on '%.100s' failed: %.300s", f->provider, address,
                         err->text);
    if (count > 1 && host[0] != '\0')
        snprintf(l->name, sizeof l->name, "%s", host);
    return RMIG_OK;
}

static int rmig__ofi_listen(struct rmig_fabric *base, const char *address, struct rmig_ep **out,
                            struct rmig_error *err) {
    struct rmig__ofi_listener *l = (struct rmig__ofi_listener *)rmig__ofi_alloc(1, sizeof *l);
    if (l == NULL)
        return rmig_fail(err, RMIG_ERR_NO_MEMORY, 0, "out of memory for a listener");
    l->head.base.fabric = base;
    l->head.listener = true;
    l->users = 1;
    struct rmig_error why;
    memset(&why, 0, sizeof why);
    err = err == NULL ? &why : err;
    int status = rmig__ofi_start_listener((struct rmig__ofi *)(void *)base, l, address, err);
    if (status != RMIG_OK) {
        status = rmig__ofi_blame_descriptors((struct rmig__ofi *)(void *)base, err);
        rmig__ofi_close_listener(l);
        return status;
    }
    *out = &l->head.base;
    return RMIG_OK;
}

static struct rmig__ofi_listener *rmig__ofi_listener_of(struct rmig_ep *ep) {
    struct rmig__ofi_ep *head = (struct rmig__ofi_ep *)(void *)ep;
    return head->listener ? (struct rmig__ofi_listener *)(void *)head : NULL;
}

static int rmig__ofi_address(struct rmig_ep *ep, char *buf, size_t size, struct rmig_error *err) {
    const struct rmig__ofi_listener *l = rmig__ofi_listener_of(ep);
    char first[320], port[16];
    int ret = -1;
    if (l == NULL) {
        const struct rmig__ofi_conn *c = (const struct rmig__ofi_conn *)(const void *)ep;
        if (c->address == NULL)
            return rmig_fail(err, RMIG_ERR_STATE, 0, "address: the endpoint was opened from a request");
        return rmig__ofi_print(c->address->ai_addr, c->address->ai_addrlen, buf, size, err);
    }
    int status = rmig__ofi_bound(l, first, sizeof first, port, sizeof port, err);
    if (status != RMIG_OK)
        return status;
    if (l->name[0] != '\0')
        ret = snprintf(buf, size, "%s:%s", l->name, port);
    if (ret < 0 || (size_t)ret >= size) // one of its addresses is shorter than a long name
        ret = snprintf(buf, size, "%s", first);
    if (ret < 0 || (size_t)ret >= size)
        return rmig_fail(err, RMIG_ERR_ARGUMENT, 0, "address: %zu bytes of room, %d needed", size, ret + 1);
    return RMIG_OK;
}

/* Takes a request off the listener's list; NULL if it is not there (any more). */
static struct rmig__ofi_request *rmig__ofi_take_request(struct rmig__ofi_listener *l, const void *request) {
    for (struct rmig__ofi_request **at = &l->requests; *at != NULL; at = &(*at)->next) {
        struct rmig__ofi_request *r = *at;
        if (r != request)
            continue;
        *at = r->next;
        r->next = NULL;
        return r;
    }
    return NULL;
}

static size_t rmig__ofi_cm_data_max(struct fid *fid) {
    size_t max = 0, length = sizeof max;
    if (fi_getopt(fid, FI_OPT_ENDPOINT, FI_OPT_CM_DATA_SIZE, &max, &length) != 0)
        return 0;
    return max < RMIG__OFI_CM_DATA ? max : RMIG__OFI_CM_DATA;
}

static int rmig__ofi_reject(struct rmig_ep *ep, void *request, const uint8_t *data, size_t n, struct rmig_error *err) {
    struct rmig__ofi_listener *l = rmig__ofi_listener_of(ep);
    if (l == NULL)
        return rmig_fail(err, RMIG_ERR_STATE, 0, "reject: the endpoint is not a listener");
    size_t max = rmig__ofi_cm_data_max(&l->pep[0]->fid);
    if (n > max)
        return rmig_fail(err, RMIG_ERR_ARGUMENT, 0, "reject: %zu bytes of private data, at most %zu", n, max);
    struct rmig__ofi_request *r = rmig__ofi_take_request(l, request);
    if (r == NULL)
        return rmig_fail(err, RMIG_ERR_STATE, 0, "reject: the request was used up already");
    if (n == 0) {
        data = rmig__ofi_no;
        n = sizeof rmig__ofi_no;
    }
    rmig__ofi_drop_request(r, data, n);
    return RMIG_OK;
}

// >>ofi: keys
// Who knows a key can write, so nobody may guess one: each is drawn from the system's random numbers. Where the
// provider makes the keys it has an adapter, which checks the connection too.

static int rmig__ofi_random(void *out, size_t n) {
    ssize_t got = getrandom(out, n, 0);
    if (got == (ssize_t)n)
        return 0;
    int fd = open("/dev/urandom", O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return -errno;
    got = read(fd, out, n);
    int code = got < 0 ? errno : EIO;
    close(fd);
    return got == (ssize_t)n ? 0 : -code;
}

/* Not 0, which means none, and at most 32 bits: version 1 peers carry no more. */
static int rmig__ofi_draw_key(uint64_t *out) {
    uint32_t key = 0;
    int ret = 0;
    while (key == 0 && ret == 0)
        ret = rmig__ofi_random(&key, sizeof key);
    *out = key;
    return ret;
}

static int rmig__ofi_try_reg(struct rmig__ofi_conn *c, void *address, uint64_t length, uint64_t access,
                             struct fid_mr **mr) {
    int mode = c->head.info->domain_attr->mr_mode, ret = -FI_ENOKEY;
    for (int i = 0; i < 64 && ret == -FI_ENOKEY; i++) { // a key that is drawn may be in use
        uint64_t key = 0;
        ret = (mode & FI_MR_PROV_KEY) != 0 ? 0 : rmig__ofi_draw_key(&key);
        if (ret == 0)
            ret = fi_mr_reg(c->domain, address, (size_t)length, access, 0, key, 0, mr, NULL);
    }
    if (ret != 0 || (mode & FI_MR_ENDPOINT) == 0)
        return ret;
    ret = fi_mr_bind(*mr, &c->ep->fid, 0);
    if (ret == 0)
        ret = fi_mr_enable(*mr);
    if (ret != 0)
        fi_close(&(*mr)->fid);
    return ret;
}

/* With a cache of registrations the same memory, registered twice, gets the same key twice, and keeps it when it is
   deregistered. Each domain has a cache of its own, so each is asked. */
static int rmig__ofi_check_cache(struct rmig__ofi_conn *c, struct rmig_error *err) {
    struct fid_mr *mr[2] = {NULL, NULL};
    uint64_t key[2] = {FI_KEY_NOTAVAIL, FI_KEY_NOTAVAIL};
    const size_t page = 4096;
    if ((c->head.info->domain_attr->mr_mode & FI_MR_PROV_KEY) == 0)
        return RMIG_OK;
    void *probe = mmap(NULL, page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    int ret = probe == MAP_FAILED ? -errno : 0;
    for (int i = 0; i < 2 && ret == 0; i++) {
        ret = rmig__ofi_try_reg(c, probe, page, FI_REMOTE_WRITE, &mr[i]);
        if (ret != 0)
            mr[i] = NULL;
        else
            key[i] = fi_mr_key(mr[i]);
    }
    for (int i = 0; i < 2; i++)
        if (mr[i] != NULL)
            fi_close(&mr[i]->fid);
    if (probe != MAP_FAILED)
        munmap(probe, page);
    if (ret == 0 && (key[0] == FI_KEY_NOTAVAIL || key[1] == FI_KEY_NOTAVAIL))
        ret = -FI_ENOKEY;
    if (ret != 0)
        return rmig_fail(err, RMIG_ERR_FABRIC, -ret,
                         "libfabric provider '%s': whether its registration cache is off cannot be told, since "
                         "registering a page twice failed: %s",
                         rmig__ofi_of(&c->head.base)->provider, fi_strerror(-ret));
    if (key[0] != key[1])
        return RMIG_OK;
    return rmig_fail(err, RMIG_ERR_FABRIC, 0,
                     "libfabric's registration cache is on, so that a peer could write memory after it was "
                     "deregistered: start the program with FI_MR_CACHE_MAX_COUNT=0");
}

// >>ofi: connections, made and freed

/* The first reason that ends a connection is the one that is told. */
#if defined(__GNUC__)
__attribute__((format(printf, 4, 5)))
#endif
static void
rmig__ofi_end(struct rmig__ofi_conn *c, enum rmig_fabric_event_type type, int code, const char *format, ...) {
    va_list args;
    if (c->end != 0)
        return;
    c->end = type;
    c->end_code = code;
    va_start(args, format);
    vsnprintf(c->text, sizeof c->text, format, args);
    va_end(args);
}

/* The provider reads nothing more for an endpoint that is closed, a write that has half arrived neither; closing its
   regions would not stop that. */
static void rmig__ofi_sever(struct rmig__ofi_conn *c) {
    if (c->ep != NULL)
        fi_close(&c->ep->fid);
    if (c->from != NULL) { // opened from a request and never accepted: the request is still to be freed, after its user
        if (c->ep != NULL) {
            fi_reject(c->pep, c->head.info->handle, NULL, 0);
            c->head.info->handle = NULL;
        }
        rmig__ofi_release_listener(c->from);
    }
    c->ep = NULL;
    c->from = NULL;
}

/* All that was made for one address. */
static void rmig__ofi_free_link(struct rmig__ofi_conn *c) {
    rmig__ofi_sever(c);
    if (c->context != NULL)
        fi_close(&c->context->fid);
    if (c->cq != NULL)
        fi_close(&c->cq->fid);
    if (c->domain != NULL)
        fi_close(&c->domain->fid);
    if (c->head.eq != NULL)
        fi_close(&c->head.eq->fid);
    if (c->head.fabric != NULL)
        fi_close(&c->head.fabric->fid);
    if (c->head.info != NULL)
        fi_freeinfo(c->head.info);
    rmig__ofi_free(c->ops);
    rmig__ofi_free(c->free_sends);
    rmig__ofi_free(c->events);
}

static void rmig__ofi_free_conn(struct rmig__ofi_conn *c) {
    rmig__ofi_free_link(c);
    if (c->addresses != NULL)
        freeaddrinfo(c->addresses);
    rmig__ofi_free(c);
}

static uint32_t rmig__ofi_clamp(uint64_t wanted, uint64_t max, uint32_t least) {
    uint64_t n = wanted < max ? wanted : max;
    return n < least ? least : (uint32_t)n;
}

/* Sends and writes share the transmit queue: sends get their part first, so that writes never crowd them out. */
static int rmig__ofi_make_ops(struct rmig__ofi_conn *c, const struct rmig_ep_config *cfg, struct rmig_error *err) {
    uint64_t tx = c->head.info->tx_attr->size, rx = c->head.info->rx_attr->size;
    if (tx < 2 || rx < 2)
        return rmig_fail(err, RMIG_ERR_FABRIC, 0,
                         "libfabric: queues of %llu sends and %llu receives, at least 2 of each are needed",
                         (unsigned long long)tx, (unsigned long long)rx);
    c->send_depth = rmig__ofi_clamp(cfg->send_depth, tx / 2, 1);
    c->write_depth = rmig__ofi_clamp(cfg->write_depth, tx - c->send_depth, 1);
    c->recv_depth = rmig__ofi_clamp(cfg->recv_depth, rx, 2);
    uint32_t sends = c->send_depth, recvs = c->recv_depth, all = sends + recvs + c->write_depth;
    c->ops = (struct rmig__ofi_op *)rmig__ofi_alloc(all, sizeof *c->ops);
    c->events = (struct rmig__ofi_op **)rmig__ofi_alloc(all, sizeof(struct rmig__ofi_op *));
    c->free_sends = (struct rmig__ofi_op **)rmig__ofi_alloc((size_t)sends + recvs, sizeof(struct rmig__ofi_op *));
    if (c->ops == NULL || c->events == NULL || c->free_sends == NULL)
        return rmig_fail(err, RMIG_ERR_NO_MEMORY, 0, "out of memory for %lu operations", (unsigned long)all);
    c->free_recvs = c->free_sends + sends;
    for (uint32_t i = 0; i < all; i++) {
        struct rmig__ofi_op *op = &c->ops[i];
        op->kind = i < sends ? RMIG__OFI_SEND : i < sends + recvs ? RMIG__OFI_RECV : RMIG__OFI_WRITE;
        if (op->kind == RMIG__OFI_SEND)
            c->free_sends[c->free_send_count++] = op;
        if (op->kind == RMIG__OFI_RECV)
            c->free_recvs[c->free_recv_count++] = op;
    }
    return RMIG_OK;
}

static int rmig__ofi_open_domain(struct rmig__ofi_conn *c, struct rmig_error *err) {
    int ret = fi_domain(c->head.fabric, c->head.info, &c->domain, NULL);
    if (ret == 0)
        return RMIG_OK;
    c->domain = NULL;
    return rmig__ofi_fail(err, RMIG_ERR_FABRIC, ret, "fi_domain");
}

static int rmig__ofi_open_cq(struct rmig__ofi_conn *c, struct rmig_error *err) {
    struct fi_cq_attr attr;
    memset(&attr, 0, sizeof attr);
    attr.size = (size_t)c->send_depth + c->write_depth + c->recv_depth;
    attr.format = FI_CQ_FORMAT_MSG;
    attr.wait_obj = FI_WAIT_FD;
    if (c->head.waitable && fi_cq_open(c->domain, &attr, &c->cq, NULL) == 0) {
        if (rmig__ofi_has_fd(&c->cq->fid))
            return RMIG_OK;
        fi_close(&c->cq->fid);
    }
    c->cq = NULL;
    c->head.waitable = false;
    attr.wait_obj = FI_WAIT_NONE;
    int ret = fi_cq_open(c->domain, &attr, &c->cq, NULL);
    return ret == 0 ? RMIG_OK : rmig__ofi_fail(err, RMIG_ERR_FABRIC, ret, "fi_cq_open");
}

static int rmig__ofi_open_ep(struct rmig__ofi_conn *c, struct rmig_error *err) {
    struct fi_info *info = c->head.info;
    int ret = 0;
    if (info->ep_attr->rx_ctx_cnt == FI_SHARED_CONTEXT) {
        info->rx_attr->size = c->recv_depth;
        ret = fi_srx_context(c->domain, info->rx_attr, &c->context, NULL);
        if (ret != 0) {
            c->context = NULL;
            return rmig__ofi_fail(err, RMIG_ERR_FABRIC, ret, "fi_srx_context");
        }
    }
    ret = fi_endpoint(c->domain, info, &c->ep, NULL);
    if (ret != 0) {
        c->ep = NULL;
        return rmig__ofi_fail(err, RMIG_ERR_FABRIC, ret, "fi_endpoint");
    }
    ret = fi_ep_bind(c->ep, &c->head.eq->fid, 0);
    if (ret == 0)
        ret = fi_ep_bind(c->ep, &c->cq->fid, FI_TRANSMIT | FI_SELECTIVE_COMPLETION);
    if (ret == 0)
        ret = fi_ep_bind(c->ep, &c->cq->fid, FI_RECV);
    if (ret == 0 && c->context != NULL)
        ret = fi_ep_bind(c->ep, &c->context->fid, 0);
    if (ret == 0)
        ret = fi_enable(c->ep);
    return ret == 0 ? RMIG_OK : rmig__ofi_fail(err, RMIG_ERR_FABRIC, ret, "enabling an endpoint");
}

/* Makes everything from c->head.info; what was made before a failure is in *c. */
static int rmig__ofi_build_conn(struct rmig__ofi *f, struct rmig__ofi_conn *c, const struct rmig_ep_config *cfg,
                                struct rmig_error *err) {
    const struct fi_info *info = c->head.info;
    // A request's info need not name its fabric as the listener's does.
    int status = rmig__ofi_open_fabric(&c->head, c->from != NULL ? c->from->head.info : c->head.info, err);
    if (status == RMIG_OK)
        status = rmig__ofi_open_domain(c, err);
    if (status == RMIG_OK)
        status = rmig__ofi_make_ops(c, cfg, err);
    if (status == RMIG_OK)
        status = rmig__ofi_open_eq(&c->head, f->poll, err);
    if (status == RMIG_OK)
        status = rmig__ofi_open_cq(c, err);
    if (status != RMIG_OK)
        return status;
    status = rmig__ofi_open_ep(c, err);
    if (status != RMIG_OK)
        return status;
    c->ordered_completions = (info->tx_attr->comp_order & RMIG__OFI_STRICT) == RMIG__OFI_STRICT;
    status = rmig__ofi_check_cache(c, err);
    if (status != RMIG_OK)
        return status;
    c->cm_data_max = rmig__ofi_cm_data_max(&c->ep->fid);
    if (c->cm_data_max < 8)
        return rmig_fail(err, RMIG_ERR_FABRIC, 0,
                         "libfabric provider '%s' carries %zu bytes of private data, 8 are needed", f->provider,
                         c->cm_data_max);
    return RMIG_OK;
}

static struct rmig__ofi_conn *rmig__ofi_new_conn(struct rmig_fabric *base, enum rmig__ofi_state state,
                                                 const char *peer) {
    struct rmig__ofi_conn *c = (struct rmig__ofi_conn *)rmig__ofi_alloc(1, sizeof *c);
    if (c == NULL)
        return NULL;
    c->head.base.fabric = base;
    c->state = state;
    snprintf(c->peer, sizeof c->peer, "%s", peer);
    return c;
}

/* Makes the connection's end for the address at hand. */
static int rmig__ofi_begin(struct rmig__ofi_conn *c, struct rmig_error *err) {
    struct rmig__ofi *f = rmig__ofi_of(&c->head.base);
    rmig__ofi_print(c->address->ai_addr, c->address->ai_addrlen, c->peer, sizeof c->peer, NULL);
    int ret = rmig__ofi_resolve(f, c->address, false, NULL, (size_t)c->cfg.send_depth + c->cfg.write_depth,
                                c->cfg.recv_depth, &c->head.info);
    if (ret != 0)
        return rmig_fail(err, RMIG_ERR_UNREACHABLE, -ret, "libfabric provider '%s' cannot reach %s: %s", f->provider,
                         c->peer, fi_strerror(-ret));
    int status = rmig__ofi_build_conn(f, c, &c->cfg, err);
    return status == RMIG_OK ? RMIG_OK : rmig__ofi_blame_descriptors(f, err);
}

/* What is wrong at this end with one of several addresses comes as what is wrong at the other. */
static void rmig__ofi_begin_failed(struct rmig__ofi_conn *c, const struct rmig_error *err) {
    c->state = RMIG__OFI_IDLE;
    c->head.waitable = false;
    rmig__ofi_end(c, RMIG_FEV_ERROR, err->provider_code, "%s", err->text);
}

static int rmig__ofi_open_active(struct rmig_fabric *base, const char *address, const struct rmig_ep_config *cfg,
                                 struct rmig_ep **out, struct rmig_error *err) {
    struct rmig__ofi_conn *c = rmig__ofi_new_conn(base, RMIG__OFI_RESOLVED, address);
    if (c == NULL)
        return rmig_fail(err, RMIG_ERR_NO_MEMORY, 0, "out of memory for a connection");
    struct rmig_error why;
    memset(&why, 0, sizeof why);
    err = err == NULL ? &why : err;
    c->cfg = *cfg;
    int status = rmig__ofi_lookup(address, false, &c->addresses, err);
    if (status == RMIG_ERR_UNREACHABLE)
        status = rmig__ofi_blame_descriptors((struct rmig__ofi *)(void *)base, err); // it reads files
    if (status == RMIG_OK) {
        c->address = c->addresses;
        for (const struct addrinfo *a = c->address->ai_next; a != NULL; a = a->ai_next)
            c->head.base.others++;
        status = rmig__ofi_begin(c, err);
    }
    if (status != RMIG_OK && c->head.base.others > 0) {
        rmig__ofi_begin_failed(c, err);
    } else if (status != RMIG_OK) {
        rmig__ofi_free_conn(c);
        return status;
    }
    *out = &c->head.base;
    return RMIG_OK;
}

static void rmig__ofi_next(struct rmig_ep *ep) {
    struct rmig__ofi_conn *c = (struct rmig__ofi_conn *)(void *)ep, fresh;
    struct rmig_error err;
    memset(&err, 0, sizeof err);
    rmig__ofi_free_link(c);
    memset(&fresh, 0, sizeof fresh);
    fresh.head.base = c->head.base;
    fresh.head.base.others--;
    fresh.state = RMIG__OFI_RESOLVED;
    fresh.cfg = c->cfg;
    fresh.addresses = c->addresses;
    fresh.address = c->address->ai_next;
    *c = fresh;
    if (rmig__ofi_begin(c, &err) != RMIG_OK)
        rmig__ofi_begin_failed(c, &err);
}

static int rmig__ofi_open_request(struct rmig_ep *ep, void *request, const struct rmig_ep_config *cfg,
                                  struct rmig_ep **out, struct rmig_error *err) {
    struct rmig__ofi_listener *l = rmig__ofi_listener_of(ep);
    if (l == NULL)
        return rmig_fail(err, RMIG_ERR_STATE, 0, "open_request: the endpoint is not a listener");
    struct rmig__ofi_conn *c = rmig__ofi_new_conn(ep->fabric, RMIG__OFI_IDLE, "the source");
    if (c == NULL)
        return rmig_fail(err, RMIG_ERR_NO_MEMORY, 0, "out of memory for a connection");
    struct rmig__ofi_request *r = rmig__ofi_take_request(l, request);
    if (r == NULL) {
        rmig__ofi_free_conn(c);
        return rmig_fail(err, RMIG_ERR_STATE, 0, "open_request: the request was used up already");
    }
    if (r->info == NULL) {
        rmig__ofi_free_conn(c);
        r->next = l->requests;
        l->requests = r;
        return rmig_fail(err, RMIG_ERR_PEER_GONE, 0, "open_request: it failed before; reject it");
    }
    c->head.info = r->info;
    c->bare = r->bare;
    c->from = l;
    c->pep = r->pep;
    l->users++;
    struct rmig_error why;
    memset(&why, 0, sizeof why);
    err = err == NULL ? &why : err;
    int status = rmig__ofi_build_conn(rmig__ofi_of(ep), c, cfg, err);
    if (status == RMIG_OK) {
        rmig__ofi_free(r);
        *out = &c->head.base;
        return RMIG_OK;
    }
    status = rmig__ofi_blame_descriptors(rmig__ofi_of(ep), err);
    if (c->ep == NULL) // the request is untouched
        c->head.info = NULL;
    else
        r->info = NULL; // refused with the endpoint
    r->next = l->requests; // the caller may still reject it
    l->requests = r;
    rmig__ofi_free_conn(c);
    return status;
}

static void rmig__ofi_close(struct rmig_ep *ep) {
    struct rmig__ofi_listener *l = rmig__ofi_listener_of(ep);
    if (l != NULL)
        rmig__ofi_close_listener(l);
    else
        rmig__ofi_free_conn((struct rmig__ofi_conn *)(void *)ep);
}

// >>ofi: events of a connection

static bool rmig__ofi_is_network(int code) { // providers also put what errno happened to hold
    static const int known[] = {FI_ECONNREFUSED, FI_ETIMEDOUT,     FI_EHOSTUNREACH, FI_ENETUNREACH,
                                FI_ENETDOWN,     FI_EADDRNOTAVAIL, FI_EACCES,       FI_ENOPROTOOPT,
                                FI_ECONNRESET,   FI_ECONNABORTED,  EPERM,           EHOSTDOWN};
    for (size_t i = 0; i < sizeof known / sizeof known[0]; i++)
        if (code == known[i])
            return true;
    return false;
}

static bool rmig__ofi_is_gone(int code) { // what the end of a connection looks like from an operation under way
    return code == FI_ECANCELED || code == FI_ENOTCONN || code == FI_ECONNRESET || code == FI_ECONNABORTED ||
           code == FI_ESHUTDOWN || code == EPIPE;
}

static void rmig__ofi_read_eq_error(struct rmig__ofi_conn *c) {
    struct fi_eq_err_entry e;
    uint8_t data[RMIG__OFI_CM_DATA];
    memset(&e, 0, sizeof e);
    e.err_data = data; // a rejection's private data
    e.err_data_size = sizeof data;
    ssize_t n = fi_eq_readerr(c->head.eq, &e, 0);
    if (n == -FI_EAGAIN)
        return;
    if (n < 0) {
        rmig__ofi_end(c, RMIG_FEV_ERROR, (int)-n, "libfabric: fi_eq_readerr: %s", fi_strerror((int)-n));
        return;
    }
    char buf[128] = "";
    const char *more = e.prov_errno == 0 ? NULL : fi_eq_strerror(c->head.eq, e.prov_errno, e.err_data, buf, sizeof buf);
    int code = e.err < 0 ? -e.err : e.err;
    const char *why = fi_strerror(code);
    if (more == NULL || strcmp(more, why) == 0)
        more = "";
    const char *sep = more[0] == '\0' ? "" : ": ";
    if (c->state == RMIG__OFI_UP) {
        rmig__ofi_end(c, rmig__ofi_is_gone(code) ? RMIG_FEV_DISCONNECTED : RMIG_FEV_ERROR, code,
                      "the connection with %s failed: %s%s%s", c->peer, why, sep, more);
        return;
    }
    if (code == FI_ECONNREFUSED && e.err_data != NULL && e.err_data_size > 0) {
        c->data_length = e.err_data_size < sizeof c->data ? e.err_data_size : sizeof c->data;
        memcpy(c->data, e.err_data, c->data_length);
        rmig__ofi_end(c, RMIG_FEV_REJECTED, code, "%s rejected the connection", c->peer);
        return;
    }
    if (!rmig__ofi_is_network(code))
        why = "it closed the connection";
    rmig__ofi_end(c, RMIG_FEV_ERROR, code, "connecting to %s failed: %s%s%s%s", c->peer, why, sep, more,
                  rmig__ofi_frames(c->head.base.fabric)
                      ? "; if a stock QEMU listens there, it can only be reached with rmig_fabric_verbs.h"
                      : "");
}

static void rmig__ofi_read_eq(struct rmig__ofi_conn *c) {
    while (c->end == 0) {
        union rmig__ofi_cm_event buf;
        uint32_t event = 0;
        ssize_t n = fi_eq_read(c->head.eq, &event, &buf, sizeof buf, 0);
        if (n == -FI_EAGAIN)
            return;
        if (n == -FI_EAVAIL) {
            rmig__ofi_read_eq_error(c);
            return;
        }
        if (n < 0) {
            rmig__ofi_end(c, RMIG_FEV_ERROR, (int)-n, "libfabric: fi_eq_read: %s", fi_strerror((int)-n));
        } else if (event == FI_CONNECTED) {
            c->connected = true;
            c->data_length = (size_t)n > sizeof(struct fi_eq_cm_entry) ? (size_t)n - sizeof(struct fi_eq_cm_entry) : 0;
            memcpy(c->data, buf.bytes + sizeof(struct fi_eq_cm_entry), c->data_length);
        } else if (event == FI_SHUTDOWN && c->left) {
            rmig__ofi_end(c, RMIG_FEV_DISCONNECTED, 0, "disconnected by this side");
        } else if (event == FI_SHUTDOWN && (c->connected || c->state == RMIG__OFI_UP)) {
            rmig__ofi_end(c, RMIG_FEV_DISCONNECTED, c->held_code, "%s closed the connection", c->peer);
        } else if (event == FI_SHUTDOWN) {
            rmig__ofi_end(c, RMIG_FEV_ERROR, 0, "%s closed the connection while it was being made", c->peer);
        }
    }
}

static uint32_t rmig__ofi_op_count(const struct rmig__ofi_conn *c) {
    return c->send_depth + c->recv_depth + c->write_depth;
}

static struct rmig__ofi_op *rmig__ofi_write_op(struct rmig__ofi_conn *c, uint64_t position) {
    return &c->ops[c->send_depth + c->recv_depth + (uint32_t)(position % c->write_depth)];
}

/* An operation holds its slot until its event was told, so the ring has room for all. */
static void rmig__ofi_push(struct rmig__ofi_conn *c, struct rmig__ofi_op *op) {
    c->events[c->event_last++ % rmig__ofi_op_count(c)] = op;
}

static void rmig__ofi_free_writes(struct rmig__ofi_conn *c) {
    while (c->write_first < c->write_done && rmig__ofi_write_op(c, c->write_first)->told)
        c->write_first++;
}

/* Writes complete in the order of posting as far as the caller sees. Where the provider does not promise it, each write
   asks for a completion and those that come early wait here; where it does, one covers the silent writes before it. */
static void rmig__ofi_write_completed(struct rmig__ofi_conn *c, struct rmig__ofi_op *op) {
    op->done = true;
    if (c->ordered_completions)
        for (uint64_t p = c->write_done; p < c->write_last && rmig__ofi_write_op(c, p) != op; p++)
            rmig__ofi_write_op(c, p)->done = true;
    while (c->write_done < c->write_last && rmig__ofi_write_op(c, c->write_done)->done) {
        struct rmig__ofi_op *w = rmig__ofi_write_op(c, c->write_done++);
        w->told = !w->wanted;
        if (w->wanted)
            rmig__ofi_push(c, w);
    }
    rmig__ofi_free_writes(c);
}

static void rmig__ofi_completed(struct rmig__ofi_conn *c, const struct fi_cq_msg_entry *e) {
    struct rmig__ofi_op *op = (struct rmig__ofi_op *)e->op_context;
    if (op == NULL || op->done)
        return;
    if (op->kind == RMIG__OFI_WRITE) {
        rmig__ofi_write_completed(c, op);
        return;
    }
    op->done = true;
    op->length = e->len;
    if (op->kind == RMIG__OFI_SEND)
        c->sends_posted--;
    rmig__ofi_push(c, op);
}

static void rmig__ofi_read_cq_error(struct rmig__ofi_conn *c) {
    static const char *const what[] = {"a send", "a receive", "a write"};
    struct fi_cq_err_entry e;
    memset(&e, 0, sizeof e);
    ssize_t n = fi_cq_readerr(c->cq, &e, 0);
    if (n == -FI_EAGAIN || c->end != 0) // what is cancelled after the end says nothing new
        return;
    if (n < 0) {
        rmig__ofi_end(c, RMIG_FEV_ERROR, (int)-n, "libfabric: fi_cq_readerr: %s", fi_strerror((int)-n));
        return;
    }
    const struct rmig__ofi_op *op = (const struct rmig__ofi_op *)e.op_context;
    int code = e.err < 0 ? -e.err : e.err;
    if (rmig__ofi_is_gone(code)) { // the event queue tells why, perhaps a moment later
        if (c->held_at == 0) {
            c->held_at = rmig__ofi_now(c->head.base.fabric);
            c->held_code = code;
        }
        return;
    }
    char buf[128] = "";
    const char *more = fi_cq_strerror(c->cq, e.prov_errno, e.err_data, buf, sizeof buf);
    rmig__ofi_end(c, RMIG_FEV_ERROR, e.prov_errno != 0 ? e.prov_errno : code,
                  "%s to or from %s failed: %s (provider: %s, %d)", op == NULL ? "an operation" : what[op->kind],
                  c->peer, fi_strerror(code), more == NULL ? "" : more, e.prov_errno);
}

static bool rmig__ofi_all_sent(const struct rmig__ofi_conn *c) {
    return c->sends_posted == 0 && c->write_done == c->write_last;
}

/* Lets the provider make progress and takes its completions. */
static void rmig__ofi_drain(struct rmig__ofi_conn *c) {
    struct fi_cq_msg_entry e[16];
    ssize_t n = 0;
    do {
        n = fi_cq_read(c->cq, e, 16);
        for (ssize_t i = 0; i < n; i++)
            rmig__ofi_completed(c, &e[i]);
        if (n == -FI_EAVAIL)
            rmig__ofi_read_cq_error(c);
        else if (n < 0 && n != -FI_EAGAIN)
            rmig__ofi_end(c, RMIG_FEV_ERROR, (int)-n, "libfabric: fi_cq_read: %s", fi_strerror((int)-n));
    } while (n == 16 || n == -FI_EAVAIL || (n > 0 && c->end != 0));
    if (c->leaving && !c->left && rmig__ofi_all_sent(c)) {
        c->left = true;
        fi_shutdown(c->ep, 0);
    }
}

static size_t rmig__ofi_tell(struct rmig__ofi_conn *c, struct rmig_fabric_event *events, size_t n) {
    static const enum rmig_fabric_event_type type[] = {RMIG_FEV_SEND, RMIG_FEV_RECV, RMIG_FEV_WRITE};
    size_t count = 0;
    while (count < n && c->event_first < c->event_last) {
        struct rmig__ofi_op *op = c->events[c->event_first++ % rmig__ofi_op_count(c)];
        struct rmig_fabric_event *e = &events[count++];
        memset(e, 0, sizeof *e);
        e->type = type[op->kind];
        e->id = op->id;
        e->length = op->length;
        if (op->kind == RMIG__OFI_SEND)
            c->free_sends[c->free_send_count++] = op;
        if (op->kind == RMIG__OFI_RECV)
            c->free_recvs[c->free_recv_count++] = op;
        op->told = true;
    }
    rmig__ofi_free_writes(c);
    return count;
}

static void rmig__ofi_event(struct rmig_fabric_event *e, enum rmig_fabric_event_type type) {
    memset(e, 0, sizeof *e);
    e->type = type;
}

static size_t rmig__ofi_tell_end(struct rmig__ofi_conn *c, struct rmig_fabric_event *e) {
    c->state = RMIG__OFI_ENDED;
    rmig__ofi_event(e, c->end);
    e->text = c->text;
    e->provider_code = c->end_code;
    e->at_this_end = c->end_code == EMFILE || c->end_code == ENFILE;
    if (c->end == RMIG_FEV_REJECTED) {
        e->private_data = c->data;
        e->private_data_length = c->data_length;
    }
    return 1;
}

static bool rmig__ofi_held_expired(struct rmig__ofi_conn *c) {
    return c->held_at != 0 && rmig__ofi_now(c->head.base.fabric) - c->held_at >= RMIG__OFI_HOLD_NS;
}

static int rmig__ofi_poll_conn(struct rmig__ofi_conn *c, struct rmig_fabric_event *events, size_t n) {
    size_t count = 0;
    if (n == 0 || c->state == RMIG__OFI_ENDED)
        return 0;
    if (c->state == RMIG__OFI_RESOLVED) {
        c->state = RMIG__OFI_IDLE;
        rmig__ofi_event(&events[count++], RMIG_FEV_RESOLVED);
    }
    if (c->state == RMIG__OFI_CONNECTING) {
        fi_cq_read(c->cq, NULL, 0); // progress alone: no completion may overtake ESTABLISHED
        rmig__ofi_read_eq(c);
        if (c->connected && count < n) {
            c->state = RMIG__OFI_UP;
            rmig__ofi_event(&events[count], RMIG_FEV_ESTABLISHED);
            events[count].private_data = c->data_length == 0 ? NULL : c->data;
            events[count++].private_data_length = c->data_length;
        }
    }
    if (c->state == RMIG__OFI_UP || (c->end != 0 && c->cq != NULL)) {
        rmig__ofi_read_eq(c); // before the completions: what came before a shutdown is then among them
        rmig__ofi_drain(c);
        count += rmig__ofi_tell(c, events + count, n - count);
    }
    if (c->end == 0 && rmig__ofi_held_expired(c))
        rmig__ofi_end(c, RMIG_FEV_ERROR, c->held_code, "an operation with %s was cancelled: %s", c->peer,
                      fi_strerror(c->held_code));
    if (c->end != 0 && count < n && c->event_first == c->event_last &&
        !(c->connected && c->state == RMIG__OFI_CONNECTING))
        count += rmig__ofi_tell_end(c, &events[count]);
    return (int)count;
}

static int rmig__ofi_poll(struct rmig_ep *ep, struct rmig_fabric_event *events, size_t n, struct rmig_error *err) {
    struct rmig__ofi_listener *l = rmig__ofi_listener_of(ep);
    if (l != NULL)
        return rmig__ofi_poll_listener(l, events, n, err);
    return rmig__ofi_poll_conn((struct rmig__ofi_conn *)(void *)ep, events, n);
}

// >>ofi: connecting

static int rmig__ofi_check_data(const struct rmig__ofi_conn *c, const char *what, size_t n, struct rmig_error *err) {
    if (c->head.listener || c->state != RMIG__OFI_IDLE)
        return rmig_fail(err, RMIG_ERR_STATE, 0, "%s: the endpoint is %s", what,
                         c->head.listener                 ? "a listener"
                         : c->state == RMIG__OFI_RESOLVED ? "not resolved yet"
                                                          : "connected or was already");
    if (n > c->cm_data_max)
        return rmig_fail(err, RMIG_ERR_ARGUMENT, 0, "%s: %zu bytes of private data, at most %zu", what, n,
                         c->cm_data_max);
    return RMIG_OK;
}

static int rmig__ofi_connect(struct rmig_ep *ep, const uint8_t *data, size_t n, struct rmig_error *err) {
    struct rmig__ofi_conn *c = (struct rmig__ofi_conn *)(void *)ep;
    int status = rmig__ofi_check_data(c, "connect", n, err);
    if (status != RMIG_OK)
        return status;
    int ret = fi_connect(c->ep, c->head.info->dest_addr, data, n);
    c->state = RMIG__OFI_CONNECTING;
    if (ret != 0) // some failures are known at once: they come as the others do
        rmig__ofi_end(c, RMIG_FEV_ERROR, -ret, "connecting to %s failed: %s", c->peer, fi_strerror(-ret));
    return RMIG_OK;
}

static int rmig__ofi_accept(struct rmig_ep *ep, const uint8_t *data, size_t n, struct rmig_error *err) {
    struct rmig__ofi_conn *c = (struct rmig__ofi_conn *)(void *)ep;
    int status = rmig__ofi_check_data(c, "accept", n, err);
    if (status != RMIG_OK)
        return status;
    if (c->from == NULL)
        return rmig_fail(err, RMIG_ERR_STATE, 0, "accept: the endpoint was not opened from a request");
    if (c->bare && n > 0) { // the length takes the place of the version's first byte, which nobody reads
        data++;
        n--;
    }
    int ret = fi_accept(c->ep, data, n);
    if (ret != 0)
        return rmig__ofi_fail(err, RMIG_ERR_FABRIC, ret, "fi_accept");
    rmig__ofi_release_listener(c->from);
    c->from = NULL;
    c->head.info->handle = NULL; // the request is used up
    c->state = RMIG__OFI_CONNECTING;
    return RMIG_OK;
}

static void rmig__ofi_cut(struct rmig_ep *ep) {
    struct rmig__ofi_conn *c = (struct rmig__ofi_conn *)(void *)ep;
    if (c->head.listener) // nobody writes through one
        return;
    rmig__ofi_sever(c);
    rmig__ofi_end(c, RMIG_FEV_DISCONNECTED, 0, "cut by this side");
    c->state = RMIG__OFI_ENDED;
}

static void rmig__ofi_disconnect(struct rmig_ep *ep) {
    struct rmig__ofi_conn *c = (struct rmig__ofi_conn *)(void *)ep;
    if (c->head.listener || c->leaving)
        return;
    if (c->state == RMIG__OFI_CONNECTING && !c->connected)
        rmig__ofi_end(c, RMIG_FEV_DISCONNECTED, 0, "disconnected by this side while connecting");
    if ((c->state != RMIG__OFI_UP && c->state != RMIG__OFI_CONNECTING) || c->end != 0)
        return;
    c->leaving = true; // shut down once all that was posted is sent
    rmig__ofi_drain(c);
}

// >>ofi: capabilities, memory

static int rmig__ofi_caps(struct rmig_ep *ep, struct rmig_fabric_caps *caps, struct rmig_error *err) {
    struct rmig__ofi_conn *c = (struct rmig__ofi_conn *)(void *)ep;
    if (c->head.listener)
        return rmig_fail(err, RMIG_ERR_STATE, 0, "caps: the endpoint is a listener");
    const struct fi_info *info = c->head.info;
    uint64_t order = info->tx_attr->msg_order;
    int mode = info->domain_attr->mr_mode;
    size_t key_bits = info->domain_attr->mr_key_size >= 8 ? 64 : info->domain_attr->mr_key_size * 8;
    memset(caps, 0, sizeof *caps);
    caps->write_max = info->ep_attr->max_msg_size;
    if (!rmig__ofi_pins(info) && caps->write_max > RMIG__OFI_SOFT_WRITE)
        caps->write_max = RMIG__OFI_SOFT_WRITE;
    caps->registration_max = UINT64_MAX;
    caps->write_depth = c->write_depth;
    caps->send_depth = c->send_depth;
    caps->recv_depth = c->recv_depth;
    caps->private_data_request = (uint32_t)c->cm_data_max;
    caps->private_data_reply = (uint32_t)c->cm_data_max;
    caps->key_bits = (mode & FI_MR_PROV_KEY) != 0 && key_bits > 32 ? (uint32_t)key_bits : 32;
    caps->sends_after_writes = (order & FI_ORDER_SAW) != 0;
    caps->completion_is_delivery = rmig__ofi_of(ep)->delivery;
    caps->writes_in_order =
        (order & (FI_ORDER_WAW | FI_ORDER_RMA_WAW)) != 0 && info->ep_attr->max_order_waw_size >= caps->write_max;
    caps->local_mr = (mode & FI_MR_LOCAL) != 0;
    caps->offset_addressing = (mode & FI_MR_VIRT_ADDR) == 0;
    caps->target_must_poll = info->domain_attr->data_progress != FI_PROGRESS_AUTO;
    return RMIG_OK;
}

// >>ofi: registering

static int rmig__ofi_reg(struct rmig_ep *ep, void *address, uint64_t length, unsigned access, struct rmig_mr *mr,
                         struct rmig_error *err) {
    struct rmig__ofi_conn *c = (struct rmig__ofi_conn *)(void *)ep;
    struct fid_mr *fid = NULL, *zero = NULL;
    uint64_t flags = 0;
    if (c->head.listener)
        return rmig_fail(err, RMIG_ERR_STATE, 0, "reg: the endpoint is a listener");
    if (c->ep == NULL)
        return rmig_fail(err, RMIG_ERR_STATE, 0, "reg: the connection was cut");
    if (address == NULL || length == 0 || length > SIZE_MAX)
        return rmig_fail(err, RMIG_ERR_ARGUMENT, 0, "reg: %llu bytes at %p: a range of memory is needed",
                         (unsigned long long)length, address);
    flags |= (access & RMIG_ACCESS_LOCAL_READ) != 0 ? FI_SEND | FI_WRITE : 0;
    flags |= (access & RMIG_ACCESS_LOCAL_WRITE) != 0 ? FI_RECV | FI_READ : 0;
    flags |= (access & RMIG_ACCESS_REMOTE_WRITE) != 0 ? FI_REMOTE_WRITE : 0;
    if (flags == 0)
        return rmig_fail(err, RMIG_ERR_ARGUMENT, 0, "reg: access %u names none of enum rmig_access", access);
    int ret = rmig__ofi_try_reg(c, address, length, flags, &fid);
    bool remote = (access & RMIG_ACCESS_REMOTE_WRITE) != 0;
    if (ret == 0 && remote &&
        fi_mr_key(fid) == 0) { // the core takes key 0 for none; while this one is held the next is another
        zero = fid;
        ret = rmig__ofi_try_reg(c, address, length, flags, &fid);
        fi_close(&zero->fid);
    }
    if (ret != 0)
        return rmig_fail(err, RMIG_ERR_REGISTRATION, -ret,
                         "libfabric provider '%s': registering %llu bytes at %p failed: %s", rmig__ofi_of(ep)->provider,
                         (unsigned long long)length, address, fi_strerror(-ret));
    uint64_t key = fi_mr_key(fid);
    if (remote && (key == 0 || key == FI_KEY_NOTAVAIL)) {
        fi_close(&fid->fid);
        return rmig_fail(err, RMIG_ERR_REGISTRATION, 0,
                         "libfabric provider '%s' gave %llu bytes at %p no key that a peer could use",
                         rmig__ofi_of(ep)->provider, (unsigned long long)length, address);
    }
    mr->handle = fid;
    mr->desc = fi_mr_desc(fid);
    mr->key = key == FI_KEY_NOTAVAIL ? 0 : key;
    mr->remote_address = (c->head.info->domain_attr->mr_mode & FI_MR_VIRT_ADDR) != 0 ? (uint64_t)(uintptr_t)address : 0;
    if ((access & RMIG_ACCESS_REMOTE_WRITE) != 0 && !rmig__ofi_pins(c->head.info))
        rmig__ofi_populate(rmig__ofi_of(ep), address, length, fid);
    return RMIG_OK;
}

static int rmig__ofi_dereg(struct rmig_ep *ep, struct rmig_mr *mr, struct rmig_error *err) {
    struct fid_mr *fid = (struct fid_mr *)mr->handle;
    if (fid == NULL)
        return rmig_fail(err, RMIG_ERR_ARGUMENT, 0, "dereg: the region is not registered");
    rmig__ofi_populate_drop(rmig__ofi_of(ep), fid);
    int ret = fi_close(&fid->fid);
    if (ret != 0)
        return rmig__ofi_fail(err, RMIG_ERR_REGISTRATION, ret, "deregistering memory");
    memset(mr, 0, sizeof *mr);
    return RMIG_OK;
}

// >>ofi: posting

static int rmig__ofi_check_up(const struct rmig__ofi_conn *c, const char *what, struct rmig_error *err) {
    if (c->head.listener)
        return rmig_fail(err, RMIG_ERR_STATE, 0, "%s: the endpoint is a listener", what);
    if (c->end != 0)
        return rmig_fail(err, RMIG_ERR_PEER_GONE, c->end_code, "%s: the connection has ended: %s", what, c->text);
    if (c->state != RMIG__OFI_UP || c->leaving)
        return rmig_fail(err, RMIG_ERR_STATE, 0, "%s: the endpoint is %s", what,
                         c->leaving ? "disconnecting" : "not connected");
    return RMIG_OK;
}

static int rmig__ofi_post_failed(struct rmig__ofi_conn *c, const char *what, ssize_t ret, struct rmig_error *err) {
    int code = (int)-ret;
    return rmig_fail(err, rmig__ofi_is_gone(code) ? RMIG_ERR_PEER_GONE : RMIG_ERR_FABRIC, code,
                     "libfabric: %s with %s: %s", what, c->peer, fi_strerror(code));
}

static int rmig__ofi_recv(struct rmig_ep *ep, void *buf, uint64_t n, const struct rmig_mr *mr, uint64_t id,
                          struct rmig_error *err) {
    struct rmig__ofi_conn *c = (struct rmig__ofi_conn *)(void *)ep;
    if (c->head.listener)
        return rmig_fail(err, RMIG_ERR_STATE, 0, "recv: the endpoint is a listener");
    if (c->end != 0)
        return rmig_fail(err, RMIG_ERR_PEER_GONE, c->end_code, "recv: the connection has ended: %s", c->text);
    if (c->free_recv_count == 0)
        return rmig_fail(err, RMIG_ERR_FULL, 0, "recv: %u receives are posted, the most there may be", c->recv_depth);
    struct rmig__ofi_op *op = c->free_recvs[c->free_recv_count - 1];
    op->id = id;
    op->done = op->told = false;
    ssize_t ret = fi_recv(c->context != NULL ? c->context : c->ep, buf, (size_t)n, mr == NULL ? NULL : mr->desc,
                          FI_ADDR_UNSPEC, op);
    if (ret == -FI_EAGAIN)
        return rmig_fail(err, RMIG_ERR_FULL, FI_EAGAIN, "recv: the provider's queue is full");
    if (ret != 0)
        return rmig__ofi_post_failed(c, "posting a receive", ret, err);
    c->free_recv_count--;
    return RMIG_OK;
}

static ssize_t rmig__ofi_post_send(struct rmig__ofi_conn *c, const void *buf, uint64_t n, const struct rmig_mr *mr,
                                   struct rmig__ofi_op *op) {
    struct fi_msg msg;
    struct iovec iov;
    void *desc = mr == NULL ? NULL : mr->desc;
    iov.iov_base = (void *)(uintptr_t)buf;
    iov.iov_len = (size_t)n;
    memset(&msg, 0, sizeof msg);
    msg.msg_iov = &iov;
    msg.desc = &desc;
    msg.iov_count = 1;
    msg.addr = FI_ADDR_UNSPEC;
    msg.context = op;
    /* Delivery for sends too: a stream socket that closes with unread bytes in it takes back what it has not delivered;
       this way nobody who waits for completions closes too early. */
    return fi_sendmsg(c->ep, &msg, FI_COMPLETION | (rmig__ofi_of(&c->head.base)->delivery ? FI_DELIVERY_COMPLETE : 0));
}

static int rmig__ofi_send(struct rmig_ep *ep, const void *buf, uint64_t n, const struct rmig_mr *mr, uint64_t id,
                          struct rmig_error *err) {
    struct rmig__ofi_conn *c = (struct rmig__ofi_conn *)(void *)ep;
    int status = rmig__ofi_check_up(c, "send", err);
    if (status != RMIG_OK)
        return status;
    if (c->free_send_count == 0)
        return rmig_fail(err, RMIG_ERR_FULL, 0, "send: %u sends are outstanding, the most there may be", c->send_depth);
    struct rmig__ofi_op *op = c->free_sends[c->free_send_count - 1];
    op->id = id;
    op->length = n;
    op->done = op->told = false;
    ssize_t ret = rmig__ofi_post_send(c, buf, n, mr, op);
    if (ret == -FI_EAGAIN) {
        rmig__ofi_drain(c);
        ret = rmig__ofi_post_send(c, buf, n, mr, op);
    }
    if (ret == -FI_EAGAIN)
        return rmig_fail(err, RMIG_ERR_FULL, FI_EAGAIN, "send: the provider's queue is full");
    if (ret != 0)
        return rmig__ofi_post_failed(c, "posting a send", ret, err);
    c->free_send_count--;
    c->sends_posted++;
    return RMIG_OK;
}

static ssize_t rmig__ofi_post_write(struct rmig__ofi_conn *c, const struct rmig_write *w, bool more) {
    struct rmig__ofi_op *op = rmig__ofi_write_op(c, c->write_last);
    /* A full queue of silent writes would never empty: now and then one asks for a completion that nobody is told. */
    bool signal = w->signal || !c->ordered_completions || c->silent_writes + 1 >= (c->write_depth + 1) / 2;
    uint64_t flags = (more ? FI_MORE : 0) | (signal ? FI_COMPLETION : 0);
    if (signal && rmig__ofi_of(&c->head.base)->delivery)
        flags |= FI_DELIVERY_COMPLETE;
    struct iovec iov;
    struct fi_rma_iov remote;
    struct fi_msg_rma msg;
    void *desc = w->mr == NULL ? NULL : w->mr->desc;
    iov.iov_base = (void *)(uintptr_t)w->local;
    iov.iov_len = (size_t)w->length;
    remote.addr = w->remote_address;
    remote.len = (size_t)w->length;
    remote.key = w->key;
    memset(&msg, 0, sizeof msg);
    msg.msg_iov = &iov;
    msg.desc = &desc;
    msg.iov_count = 1;
    msg.addr = FI_ADDR_UNSPEC;
    msg.rma_iov = &remote;
    msg.rma_iov_count = 1;
    msg.context = op;
    op->id = w->id;
    op->length = w->length;
    op->wanted = w->signal;
    op->done = op->told = false;
    ssize_t ret = fi_writemsg(c->ep, &msg, flags);
    if (ret != 0)
        return ret;
    c->write_last++;
    c->silent_writes = signal ? 0 : c->silent_writes + 1;
    return 0;
}

static int rmig__ofi_write(struct rmig_ep *ep, const struct rmig_write *writes, size_t n, struct rmig_error *err) {
    struct rmig__ofi_conn *c = (struct rmig__ofi_conn *)(void *)ep;
    int status = rmig__ofi_check_up(c, "write", err);
    if (status != RMIG_OK)
        return status;
    uint64_t max = c->head.info->ep_attr->max_msg_size;
    for (size_t i = 0; i < n; i++)
        if (writes[i].length == 0 || writes[i].length > max)
            return rmig_fail(err, RMIG_ERR_ARGUMENT, 0, "write: length %llu of write %zu is not within 1 ... %llu",
                             (unsigned long long)writes[i].length, i, (unsigned long long)max);
    uint64_t room = c->write_depth - (c->write_last - c->write_first);
    size_t count = n < room ? n : (size_t)room;
    for (size_t i = 0; i < count; i++) {
        ssize_t ret = rmig__ofi_post_write(c, &writes[i], i + 1 < count);
        if (ret == -FI_EAGAIN) {
            rmig__ofi_drain(c); // a full queue empties by progress only
            ret = rmig__ofi_post_write(c, &writes[i], false);
        }
        if (ret == 0)
            continue;
        if (i > 0 || ret == -FI_EAGAIN)
            return (int)i;
        return rmig__ofi_post_failed(c, "posting a write", ret, err);
    }
    return (int)count;
}

// >>ofi: waiting

/* Something that no descriptor would tell. */
static bool rmig__ofi_pending(struct rmig__ofi_ep *head) {
    if (head->listener) {
        struct rmig__ofi_listener *l = (struct rmig__ofi_listener *)(void *)head;
        struct rmig__ofi_request *r = l->requests;
        while (r != NULL && r->told)
            r = r->next;
        return r != NULL;
    }
    struct rmig__ofi_conn *c = (struct rmig__ofi_conn *)(void *)head;
    if (c->state == RMIG__OFI_ENDED)
        return false;
    return c->state == RMIG__OFI_RESOLVED || c->end != 0 || c->event_first != c->event_last ||
           (c->connected && c->state == RMIG__OFI_CONNECTING) || rmig__ofi_held_expired(c);
}

static int rmig__ofi_fds(struct rmig_ep *ep, struct rmig_fd *fds, size_t n, bool *ready, struct rmig_error *err) {
    struct rmig__ofi_ep *head = (struct rmig__ofi_ep *)(void *)ep;
    struct fid *fid[2];
    size_t count = 0;
    *ready = rmig__ofi_pending(head);
    if (!head->listener && ((struct rmig__ofi_conn *)(void *)head)->held_at != 0)
        *ready = true; // the reason of a failure is awaited for a moment, and no descriptor tells when that is over
    if (!head->waitable)
        return 0;
    fid[count++] = &head->eq->fid;
    if (!head->listener)
        fid[count++] = &((struct rmig__ofi_conn *)(void *)head)->cq->fid;
    if (n < count)
        return rmig_fail(err, RMIG_ERR_ARGUMENT, 0, "fds: room for %zu descriptors, %zu needed", n, count);
    for (size_t i = 0; i < count; i++) {
        fds[i].fd = -1;
        fds[i].write = false;
        int ret = fi_control(fid[i], FI_GETWAIT, &fds[i].fd);
        if (ret != 0)
            return rmig__ofi_fail(err, RMIG_ERR_FABRIC, ret, "FI_GETWAIT");
    }
    if (*ready)
        return (int)count;
    int ret = fi_trywait(head->fabric, fid, (int)count);
    if (ret != 0 && ret != -FI_EAGAIN)
        return rmig__ofi_fail(err, RMIG_ERR_FABRIC, ret, "fi_trywait");
    *ready = ret == -FI_EAGAIN;
    return (int)count;
}

static int rmig__ofi_timeout_ms(uint64_t now, uint64_t deadline, uint64_t max) {
    uint64_t left = deadline > now ? deadline - now : 0;
    if (left > max)
        left = max;
    return (int)((left + 999999) / 1000000);
}

static void rmig__ofi_idle(const struct rmig__ofi *f, uint64_t left) {
    struct timespec t;
    if (f->poll) {
        sched_yield();
        return;
    }
    t.tv_sec = 0;
    t.tv_nsec = left < RMIG__OFI_IDLE_NS ? (long)left : RMIG__OFI_IDLE_NS;
    nanosleep(&t, NULL);
}

static int rmig__ofi_wait(struct rmig_fabric *base, struct rmig_ep *const *eps, size_t n, uint64_t deadline,
                          struct rmig_error *err) {
    struct pollfd p[RMIG__OFI_POLLFDS];
    uint64_t max = RMIG__OFI_WAIT_MAX_NS, now;
    size_t count = 0;
    bool blind = false; // an endpoint has no descriptor
    for (size_t i = 0; i < n; i++) {
        struct rmig_fd fds[4];
        bool ready = false;
        struct rmig__ofi_ep *head = (struct rmig__ofi_ep *)(void *)eps[i];
        int got = rmig__ofi_fds(eps[i], fds, 4, &ready, err);
        if (got < 0)
            return got;
        if (ready)
            return RMIG_OK;
        if (!head->listener && ((struct rmig__ofi_conn *)(void *)head)->held_at != 0)
            max = RMIG__OFI_HOLD_NS;
        if (got == 0 || count + (size_t)got > RMIG__OFI_POLLFDS)
            blind = true;
        for (int k = 0; k < got && count < RMIG__OFI_POLLFDS; k++, count++) {
            p[count].fd = fds[k].fd;
            p[count].events = POLLIN;
            p[count].revents = 0;
        }
    }
    now = rmig__ofi_now(base);
    if (now >= deadline)
        return RMIG_OK;
    if (blind) {
        rmig__ofi_idle((struct rmig__ofi *)(void *)base, deadline - now);
        return RMIG_OK;
    }
    if (poll(p, (nfds_t)count, rmig__ofi_timeout_ms(now, deadline, max)) < 0 && errno != EINTR)
        return rmig_fail(err, RMIG_ERR_FABRIC, errno, "poll: %s", fi_strerror(errno));
    return RMIG_OK;
}

// >>ofi: the table

static const struct rmig_fabric_ops rmig__ofi_ops = {
    sizeof(struct rmig_fabric_ops),
    "ofi",
    rmig__ofi_close_fabric,
    rmig__ofi_now,
    rmig__ofi_wait,
    rmig__ofi_listen,
    rmig__ofi_address,
    rmig__ofi_open_active,
    rmig__ofi_open_request,
    rmig__ofi_reject,
    rmig__ofi_connect,
    rmig__ofi_accept,
    rmig__ofi_disconnect,
    rmig__ofi_close,
    rmig__ofi_caps,
    rmig__ofi_reg,
    rmig__ofi_dereg,
    rmig__ofi_recv,
    rmig__ofi_send,
    rmig__ofi_write,
    rmig__ofi_poll,
    rmig__ofi_fds,
    NULL, // reg_dmabuf
    NULL, // lockable: the provider's own refusal comes with the registration
    NULL, // revoke: a write whose header has arrived outlives its region
    rmig__ofi_cut,
    rmig__ofi_next,
};

RMIG__DEF struct rmig_fabric *rmig_ofi_open(const struct rmig_ofi_options *options, struct rmig_error *err) {
    struct rmig__ofi *f = (struct rmig__ofi *)rmig__ofi_alloc(1, sizeof *f);
    if (f == NULL) {
        rmig_fail(err, RMIG_ERR_NO_MEMORY, 0, "out of memory for a fabric");
        return NULL;
    }
    f->base.ops = &rmig__ofi_ops;
    f->poll = options != NULL && options->poll;
    f->no_populate = options != NULL && options->no_populate;
    setenv("FI_MR_CACHE_MAX_COUNT", "0", 0); // all read by libfabric when it is used first; see REGISTRATION
    setenv("FI_NET_MAX_SAVED", "0", 0); // and STRANGERS
    setenv("FI_TCP_MAX_SAVED", "0", 0);
    if (rmig__ofi_choose(f, options == NULL ? NULL : options->provider, err) != RMIG_OK) {
        rmig__ofi_free(f);
        return NULL;
    }
    return &f->base;
}

RMIG__DEF const char *rmig_ofi_provider(const struct rmig_fabric *f) {
    return ((const struct rmig__ofi *)(const void *)f)->provider;
}

#ifdef __cplusplus
}
#endif

#endif // RMIG_IMPLEMENTATION
