/*
kvm_guest.h - a small guest whose memory proves that no update was lost and none invented

    The guest runs under KVM (x86-64, long mode, no BIOS) or, without a usable /dev/kvm, as a thread of this process
    that follows the same rule. Both have a dirty log: KVM's own, or userfaultfd write protection.

THE RULE

    Step n = 1, 2, 3 ... goes to page p(n) of the working set, W pages, in the order of a linear congruential
    generator with full period: every pass of W steps visits each page once. In that page, 512 words of 64 bits, it
    writes, in this order:
        word 256 + (visits before) % 256 = n      the latest 256 visits
        word 2   chain = chain * M + n            depends on every visit there ever was
        word 3   sum   = 1 + 2 + ... + n          kept in an SSE register, so that the FPU's state has to move too
        word 1   visits + 1
        word 0   n
    and then n into the header page. From n alone follows what each of these words must be: guest_verify computes it
    in closed form and compares all of RAM. A page that arrives stale or too new does not fit the one n there is.

RAM, by offset

    0             header page: magic, layout, n
    4 KiB         code
    8 KiB         page tables, linear, 2 MiB pages (accessed and dirty bits are set, so the CPU writes nothing there)
    2 MiB         working set
    after it      fill: pseudo-random words that must never change
    the rest      zero: the first half written with zeros, the second half never touched

    The guest sees RAM as one linear range. Its physical addresses leave 3 GiB ... 4 GiB out, as on a PC.
*/
#ifndef KVM_GUEST_H
#define KVM_GUEST_H

#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#if defined(__x86_64__)
#include <linux/kvm.h>
#endif

#include "../rmig.h"

#define GUEST_PAGE ((uint64_t)4096)
#define GUEST_WORDS (GUEST_PAGE / 8)
#define GUEST_SYSTEM (2 * RMIG_MIB)
#define GUEST_WORK_PAGE (GUEST_SYSTEM / GUEST_PAGE) // where the working set begins
#define GUEST_RAM_MIN (16 * RMIG_MIB)
#define GUEST_RAM_MAX (256 * RMIG_GIB) // page directories up to here fit in the system area
#define GUEST_LOW_RAM (3 * RMIG_GIB)
#define GUEST_HIGH_AT (4 * RMIG_GIB)
#define GUEST_TABLES ((uint64_t)8192)
#define GUEST_DOOR (511 * RMIG_GIB) // linear address; a store there leaves the guest: no memory lies behind it
#define GUEST_DOOR_PHYSICAL GUEST_LOW_RAM
#define GUEST_MAGIC 0x6576696c2d6d766bULL // "kvm-live"
#define GUEST_LCG_A 0x5851f42d4c957f2dULL // 1 mod 4, and C odd: full period for any power of two
#define GUEST_LCG_C 0x14057b7ef767814fULL
#define GUEST_CHAIN_M 0x9e3779b97f4a7c15ULL
#define GUEST_SLOTS 256
#define GUEST_STEPS_WORD 8 // of the header page: n
#define GUEST_PAUSE_NS 5000000000ULL // longest wait for the guest to stop or to make a step

enum guest_kind { GUEST_KVM = 1, GUEST_THREAD = 2 };

static inline const char *guest_kind_name(enum guest_kind kind) { return kind == GUEST_KVM ? "kvm" : "thread"; }

static inline uint64_t guest_now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static inline struct timespec guest_timespec(uint64_t ns) {
    return (struct timespec){.tv_sec = (time_t)(ns / 1000000000u), .tv_nsec = (long)(ns % 1000000000u)};
}

// >>layout

struct guest_layout {
    uint64_t ram; // bytes
    uint64_t work_pages; // a power of two
    uint64_t fill_pages;
    uint64_t seed; // of the fill
    uint64_t batch; // steps between two exits to the hypervisor
    uint64_t steps_per_second; // 0: as fast as it can
};

static inline uint64_t layout_fill_page(const struct guest_layout *l) { return GUEST_WORK_PAGE + l->work_pages; }
static inline uint64_t layout_zero_page(const struct guest_layout *l) { return layout_fill_page(l) + l->fill_pages; }
static inline uint64_t layout_pages(const struct guest_layout *l) { return l->ram / GUEST_PAGE; }

static bool is_power_of_two(uint64_t x) { return x != 0 && (x & (x - 1)) == 0; }

/* Also for a layout that a peer sent: nothing else bounds what the guest and the verifier touch. */
static int layout_check(const struct guest_layout *l, struct rmig_error *err) {
    char text[32];
    if (l->ram < GUEST_RAM_MIN || l->ram > GUEST_RAM_MAX || l->ram % GUEST_SYSTEM != 0)
        return rmig_fail(err, RMIG_ERR_ARGUMENT, 0, "RAM size %s: must be a multiple of 2M from 16M to 256G",
                         rmig_size_format(l->ram, text, sizeof text));
    uint64_t room = (l->ram - GUEST_SYSTEM) / GUEST_PAGE;
    if (!is_power_of_two(l->work_pages) || l->work_pages > room)
        return rmig_fail(err, RMIG_ERR_ARGUMENT, 0,
                         "working set of %llu pages: must be a power of two, at most the RAM less 2M: %llu pages",
                         (unsigned long long)l->work_pages, (unsigned long long)room);
    if (l->fill_pages > room - l->work_pages)
        return rmig_fail(err, RMIG_ERR_ARGUMENT, 0,
                         "fill of %llu pages: only %llu are left beside 2M and the working set",
                         (unsigned long long)l->fill_pages, (unsigned long long)(room - l->work_pages));
    if (l->batch == 0 || l->batch > UINT32_MAX)
        return rmig_fail(err, RMIG_ERR_ARGUMENT, 0, "batch of %llu steps: must be 1 to 4294967295",
                         (unsigned long long)l->batch);
    return RMIG_OK;
}

/* work, fill: bytes; UINT64_MAX: default (a quarter rounded down to a power of two; half). rate: bytes dirtied a
   second. */
static int layout_make(struct guest_layout *l, uint64_t ram, uint64_t work, uint64_t fill, uint64_t rate,
                       struct rmig_error *err) {
    memset(l, 0, sizeof *l);
    l->ram = ram;
    l->work_pages = work / GUEST_PAGE;
    if (work == UINT64_MAX)
        for (l->work_pages = 1; l->work_pages * 2 <= ram / 4 / GUEST_PAGE;)
            l->work_pages *= 2;
    l->fill_pages = fill == UINT64_MAX ? ram / 2 / GUEST_PAGE : fill / GUEST_PAGE;
    l->seed = 0x726d6967;
    l->steps_per_second = rate / GUEST_PAGE;
    if (rate != 0 && l->steps_per_second == 0)
        l->steps_per_second = 1;
    // A batch of about a millisecond: exits cost little, and the pace is even.
    l->batch = l->steps_per_second / 1000;
    if (rate == 0 || l->batch > 4096)
        l->batch = 4096;
    if (l->batch == 0)
        l->batch = 1;
    return layout_check(l, err);
}

// >>rule

struct guest_registers { // of a thread guest; the KVM guest keeps the same in rbx, rsi, xmm0
    uint64_t n, x, sum;
};

static inline uint64_t rule_next(uint64_t x, uint64_t work_pages) {
    return (GUEST_LCG_A * x + GUEST_LCG_C) & (work_pages - 1);
}

static inline void rule_store(uint64_t *word, uint64_t value) { __atomic_store_n(word, value, __ATOMIC_RELAXED); }

/* One step, the way the machine code below does it. */
static void rule_step(uint8_t *ram, const struct guest_layout *l, struct guest_registers *r) {
    r->x = rule_next(r->x, l->work_pages);
    r->n++;
    r->sum += r->n;
    uint64_t *page = (uint64_t *)(void *)(ram + (GUEST_WORK_PAGE + r->x) * GUEST_PAGE);
    rule_store(&page[GUEST_SLOTS + page[1] % GUEST_SLOTS], r->n);
    rule_store(&page[2], page[2] * GUEST_CHAIN_M + r->n);
    rule_store(&page[3], r->sum);
    rule_store(&page[1], page[1] + 1);
    rule_store(&page[0], r->n);
    rule_store((uint64_t *)(void *)ram + GUEST_STEPS_WORD, r->n);
}

// >>machine code

#if defined(__x86_64__)
/* Position independent, no stack, no interrupts. rbx n, rsi x, r8 A, r9 C, r10 W - 1, r11 working set, r12 M,
   r13 batch, r14 door, rcx steps left in the batch, rbp header page, xmm0 sum. It may be stopped between any two
   instructions. It runs in ring 3: a KVM without hardware support emulates ring 0, slowly and without SSE. */
__asm__(".pushsection .rodata\n"
        "guest_code:\n"
        "1:  imul  %r8, %rsi\n"
        "    add   %r9, %rsi\n"
        "    and   %r10, %rsi\n"
        "    inc   %rbx\n"
        "    movq  %rbx, %xmm1\n"
        "    paddq %xmm1, %xmm0\n"
        "    mov   %rsi, %rdi\n"
        "    shl   $12, %rdi\n"
        "    add   %r11, %rdi\n"
        "    mov   8(%rdi), %rax\n"
        "    movzbl %al, %edx\n" // visits % 256
        "    mov   %rbx, 2048(%rdi,%rdx,8)\n"
        "    mov   16(%rdi), %rdx\n"
        "    imul  %r12, %rdx\n"
        "    add   %rbx, %rdx\n"
        "    mov   %rdx, 16(%rdi)\n"
        "    movq  %xmm0, 24(%rdi)\n"
        "    inc   %rax\n"
        "    mov   %rax, 8(%rdi)\n"
        "    mov   %rbx, (%rdi)\n"
        "    mov   %rbx, 64(%rbp)\n" // header word 8
        "    dec   %rcx\n"
        "    jnz   1b\n"
        "    mov   %r13, %rcx\n"
        "    mov   %eax, (%r14)\n" // the batch is done: out through the door, the hypervisor sets the pace
        "    jmp   1b\n"
        "guest_code_end:\n"
        ".popsection\n");
extern const uint8_t guest_code[], guest_code_end[];

static size_t machine_code(const uint8_t **code) {
    *code = guest_code;
    return (size_t)(guest_code_end - guest_code);
}
#else
static size_t machine_code(const uint8_t **code) {
    *code = NULL;
    return 0;
}
#endif

// >>content: what a page must hold

static inline uint64_t fill_word(uint64_t seed, uint64_t index) { // splitmix64
    uint64_t z = seed + (index + 1) * 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

static inline uint64_t physical_address(uint64_t offset) {
    return offset < GUEST_LOW_RAM ? offset : offset - GUEST_LOW_RAM + GUEST_HIGH_AT;
}

/* Page tables: at GUEST_TABLES the PML4, then the PDPT, then one page directory for each GiB, then that of the door. */
static void content_table(const struct guest_layout *l, uint64_t table, uint64_t *out) {
    const uint64_t link = 0x27, leaf = 0xe7; // present, writable, user, accessed; dirty, large
    uint64_t gibs = (l->ram + RMIG_GIB - 1) / RMIG_GIB;
    if (table == 0) {
        out[0] = (GUEST_TABLES + GUEST_PAGE) | link;
    } else if (table == 1) {
        for (uint64_t i = 0; i < gibs; i++)
            out[i] = (GUEST_TABLES + (2 + i) * GUEST_PAGE) | link;
        out[GUEST_DOOR / RMIG_GIB] = (GUEST_TABLES + (2 + gibs) * GUEST_PAGE) | link;
    } else if (table < 2 + gibs) {
        for (uint64_t i = 0; i < GUEST_WORDS; i++) {
            uint64_t offset = (table - 2) * RMIG_GIB + i * 2 * RMIG_MIB;
            if (offset < l->ram)
                out[i] = physical_address(offset) | leaf;
        }
    } else if (table == 2 + gibs) {
        out[0] = GUEST_DOOR_PHYSICAL | leaf;
    }
}

static void content_system(const struct guest_layout *l, uint64_t page, uint64_t steps, uint64_t *out) {
    if (page == 0) {
        out[0] = GUEST_MAGIC;
        out[1] = l->ram;
        out[2] = l->work_pages;
        out[3] = l->fill_pages;
        out[4] = l->seed;
        out[GUEST_STEPS_WORD] = steps;
    } else if (page == 1) {
        const uint8_t *code;
        size_t n = machine_code(&code);
        if (n > 0)
            memcpy(out, code, n);
    } else {
        content_table(l, page - GUEST_TABLES / GUEST_PAGE, out);
    }
}

/* Every page outside the working set. */
static void content_constant(const struct guest_layout *l, uint64_t page, uint64_t steps, uint64_t *out) {
    memset(out, 0, GUEST_PAGE);
    if (page < GUEST_WORK_PAGE)
        content_system(l, page, steps, out);
    else if (page >= layout_fill_page(l) && page < layout_zero_page(l))
        for (uint64_t i = 0; i < GUEST_WORDS; i++)
            out[i] = fill_word(l->seed, page * GUEST_WORDS + i);
}

/* chain of the page with order i = a * (i + 1) + b, since its steps are i + 1, i + 1 + W, i + 1 + 2W ... */
struct chain_form {
    uint64_t a, b;
};

static struct chain_form chain_next(struct chain_form f, uint64_t visits, uint64_t work_pages) {
    return (struct chain_form){f.a * GUEST_CHAIN_M + 1, f.b * GUEST_CHAIN_M + visits * work_pages};
}

static inline uint64_t sum_to(uint64_t n) { return n % 2 == 0 ? n / 2 * (n + 1) : (n + 1) / 2 * n; }

static void content_work(const struct guest_layout *l, uint64_t order, uint64_t visits, struct chain_form chain,
                         uint64_t *out) {
    memset(out, 0, GUEST_PAGE);
    if (visits == 0)
        return;
    out[0] = (visits - 1) * l->work_pages + order + 1;
    out[1] = visits;
    out[2] = chain.a * (order + 1) + chain.b;
    out[3] = sum_to(out[0]);
    for (uint64_t back = 0; back < GUEST_SLOTS && back < visits; back++) {
        uint64_t visit = visits - 1 - back;
        out[GUEST_SLOTS + visit % GUEST_SLOTS] = visit * l->work_pages + order + 1;
    }
}

/* RAM as it is before step 1. ram: fresh, all zero. */
static void content_write_all(const struct guest_layout *l, uint8_t *ram) {
    uint64_t words[GUEST_WORDS];
    for (uint64_t page = 0; page < layout_zero_page(l); page++) {
        if (page >= GUEST_WORK_PAGE && page < layout_fill_page(l))
            continue;
        content_constant(l, page, 0, words);
        memcpy(ram + page * GUEST_PAGE, words, sizeof words);
    }
    uint64_t zero = layout_zero_page(l);
    memset(ram + zero * GUEST_PAGE, 0, (layout_pages(l) - zero) / 2 * GUEST_PAGE);
}

// >>verify

struct guest_verdict {
    bool ok;
    uint64_t bad_pages;
    char text[256]; // the first bad page, in words
};

static const char *content_region(const struct guest_layout *l, uint64_t page) {
    if (page < GUEST_WORK_PAGE)
        return page == 0 ? "header" : page == 1 ? "code" : "page tables";
    if (page < layout_fill_page(l))
        return "working set";
    return page < layout_zero_page(l) ? "fill" : "zero";
}

static void verdict_bad(struct guest_verdict *v, const struct guest_layout *l, uint64_t page, const uint64_t *is,
                        const uint64_t *must) {
    v->ok = false;
    if (v->bad_pages++ > 0)
        return;
    unsigned w = 0;
    while (w < GUEST_WORDS - 1 && is[w] == must[w])
        w++;
    bool work = page >= GUEST_WORK_PAGE && page < layout_fill_page(l);
    const char *what = !work ? "changed" : is[0] < must[0] ? "an update was lost" : "an update was invented";
    snprintf(v->text, sizeof v->text, "page %llu (%s), word %u: is 0x%llx, must be 0x%llx: %s",
             (unsigned long long)page, content_region(l, page), w, (unsigned long long)is[w],
             (unsigned long long)must[w], what);
}

static bool page_equals(const uint64_t *is, const uint64_t *must) { return memcmp(is, must, GUEST_PAGE) == 0; }

/* The page of step n + 1 may have got the first few of the step's writes, in their order. must: after step n; changed
   on return. */
static bool page_equals_midway(const uint64_t *is, uint64_t *must, uint64_t next) {
    const uint64_t visits = must[1];
    const unsigned word[5] = {(unsigned)(GUEST_SLOTS + visits % GUEST_SLOTS), 2, 3, 1, 0};
    const uint64_t value[5] = {next, must[2] * GUEST_CHAIN_M + next, sum_to(next), visits + 1, next};
    for (unsigned i = 0; !page_equals(is, must); i++) {
        if (i == 5)
            return false;
        must[word[i]] = value[i];
    }
    return true;
}

static void verify_work(const struct guest_layout *l, const uint8_t *ram, uint64_t n, struct guest_verdict *v) {
    uint64_t passes = n / l->work_pages, x = 0, must[GUEST_WORDS];
    struct chain_form chain = {0, 0};
    for (uint64_t k = 0; k < passes; k++)
        chain = chain_next(chain, k, l->work_pages);
    struct chain_form chain_more = chain_next(chain, passes, l->work_pages);
    for (uint64_t order = 0; order < l->work_pages; order++) {
        bool more = order < n % l->work_pages;
        x = rule_next(x, l->work_pages);
        const uint64_t page = GUEST_WORK_PAGE + x;
        const uint64_t *is = (const uint64_t *)(const void *)(ram + page * GUEST_PAGE);
        content_work(l, order, passes + more, more ? chain_more : chain, must);
        if (page_equals(is, must) || (order == n % l->work_pages && page_equals_midway(is, must, n + 1)))
            continue;
        content_work(l, order, passes + more, more ? chain_more : chain, must);
        verdict_bad(v, l, page, is, must);
    }
}

/* Compares all of RAM with what follows from n steps. The guest is stopped, or ram is a copy that does not change. */
static struct guest_verdict guest_verify(const struct guest_layout *l, const uint8_t *ram, uint64_t n) {
    struct guest_verdict v = {.ok = true};
    uint64_t must[GUEST_WORDS];
    for (uint64_t page = 0; page < layout_pages(l); page++) {
        if (page >= GUEST_WORK_PAGE && page < layout_fill_page(l))
            continue;
        const uint64_t *is = (const uint64_t *)(const void *)(ram + page * GUEST_PAGE);
        content_constant(l, page, n, must);
        if (!page_equals(is, must))
            verdict_bad(&v, l, page, is, must);
    }
    verify_work(l, ram, n, &v);
    if (v.ok)
        snprintf(v.text, sizeof v.text, "all %llu pages are as step %llu leaves them",
                 (unsigned long long)layout_pages(l), (unsigned long long)n);
    return v;
}

// >>state: what travels beside RAM

#if defined(__x86_64__)
#define GUEST_MSRS 9
struct vcpu_state {
    struct kvm_sregs sregs;
    struct kvm_regs regs;
    uint32_t xsave[1024]; // struct kvm_xsave. KVM_SET_FPU would not do: it leaves the registers marked as unused
    struct kvm_debugregs debugregs;
    struct kvm_vcpu_events events;
    uint64_t msr[GUEST_MSRS];
};
#else
struct vcpu_state {
    uint64_t none;
};
#endif

struct guest_state { // same architecture, same layout of KVM's structures at both ends; size and version say so
    uint64_t magic;
    uint32_t version, size;
    uint32_t kind, rounds;
    uint64_t steps; // committed when it was stopped
    uint64_t begin_ns, stop_ns; // CLOCK_MONOTONIC: of use on the same host only
    struct guest_layout layout;
    struct guest_registers thread;
    struct vcpu_state vcpu;
};
#define GUEST_STATE_VERSION 1u

static int state_check(const struct guest_state *s, uint64_t ram, struct rmig_error *err) {
    if (s->magic != GUEST_MAGIC || s->version != GUEST_STATE_VERSION || s->size != sizeof *s)
        return rmig_fail(err, RMIG_ERR_ARGUMENT, 0,
                         "the device state is not this program's: magic 0x%llx, version %u, %u bytes; must be 0x%llx, "
                         "%u, %zu",
                         (unsigned long long)s->magic, s->version, s->size, GUEST_MAGIC, GUEST_STATE_VERSION,
                         sizeof *s);
    if (s->kind != GUEST_KVM && s->kind != GUEST_THREAD)
        return rmig_fail(err, RMIG_ERR_ARGUMENT, 0, "guest kind %u in the device state: must be 1 (kvm) or 2 (thread)",
                         s->kind);
    if (s->layout.ram != ram)
        return rmig_fail(err, RMIG_ERR_ARGUMENT, 0, "the device state says %llu bytes of RAM, the block has %llu",
                         (unsigned long long)s->layout.ram, (unsigned long long)ram);
    return layout_check(&s->layout, err);
}

// >>guest

struct guest {
    struct guest_layout layout;
    struct guest_registers registers; // of a thread guest
    uint8_t *ram;
    enum guest_kind kind;
    int kvm, vm, vcpu; // -1: not open
    void *run; // struct kvm_run
    size_t run_size;

    pthread_t thread;
    pthread_mutex_t lock; // of run_wanted ... failure
    pthread_cond_t changed;
    uint64_t next_batch_ns;
    bool run_wanted, running, quit, failed;
    bool thread_started;
    bool exit_pending; // an MMIO exit is complete only when KVM_RUN is entered again
    bool logging;
    atomic_bool kick; // tells a thread guest to look at run_wanted
    char failure[200];

    pthread_t uffd_thread;
    pthread_mutex_t uffd_lock; // a page is logged and opened, or taken and closed, never half of each
    struct rmig_merge uffd_log; // pages written since they were taken
    int uffd, uffd_stop; // -1: not open
};

static void guest_init(struct guest *g, enum guest_kind kind, const struct guest_layout *l, uint8_t *ram) {
    memset(g, 0, sizeof *g);
    if (l != NULL)
        g->layout = *l;
    g->kind = kind;
    g->ram = ram;
    g->kvm = g->vm = g->vcpu = g->uffd = g->uffd_stop = -1;
    pthread_condattr_t attr;
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_cond_init(&g->changed, &attr);
    pthread_condattr_destroy(&attr);
    pthread_mutex_init(&g->lock, NULL);
    pthread_mutex_init(&g->uffd_lock, NULL);
}

static void guest_set_failed(struct guest *g, const char *what, int error_number) {
    pthread_mutex_lock(&g->lock);
    g->failed = true;
    snprintf(g->failure, sizeof g->failure, "%s%s%s", what, error_number ? ": " : "",
             error_number ? strerror(error_number) : "");
    pthread_cond_broadcast(&g->changed);
    pthread_mutex_unlock(&g->lock);
}

/* Steps committed so far; any thread. */
static uint64_t guest_steps(const uint8_t *ram) {
    return __atomic_load_n((const uint64_t *)(const void *)ram + GUEST_STEPS_WORD, __ATOMIC_RELAXED);
}

static int fail_errno(struct rmig_error *err, const char *what) {
    int code = errno;
    return rmig_fail(err, RMIG_ERR_SETUP, code, "%s: %s", what, strerror(code));
}

// >>kvm

#if defined(__x86_64__)
static const uint32_t guest_msr_index[GUEST_MSRS] = {
    0x10, // TSC
    0x174,      0x175,      0x176, // SYSENTER CS, ESP, EIP
    0x277, // PAT
    0xc0000081, 0xc0000082, 0xc0000084, 0xc0000102 // STAR, LSTAR, FMASK, KERNEL_GS_BASE
};

static void kvm_signal(int number) { (void)number; } // its only use: KVM_RUN returns

static int kvm_copy_cpuid(struct guest *g, struct rmig_error *err) {
    const uint32_t room = 256;
    struct kvm_cpuid2 *cpuid = calloc(1, sizeof *cpuid + room * sizeof cpuid->entries[0]);
    if (cpuid == NULL)
        return rmig_fail(err, RMIG_ERR_NO_MEMORY, 0, "no memory for the guest's CPUID");
    cpuid->nent = room;
    int rc = RMIG_OK;
    if (ioctl(g->kvm, KVM_GET_SUPPORTED_CPUID, cpuid) != 0 || ioctl(g->vcpu, KVM_SET_CPUID2, cpuid) != 0)
        rc = fail_errno(err, "KVM: CPUID");
    free(cpuid);
    return rc;
}

/* Opens KVM with a VM and a vcpu, still without memory: the slow part, done before the guest stands still. */
static int kvm_open_vcpu(struct guest *g, struct rmig_error *err) {
    g->kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
    if (g->kvm < 0)
        return fail_errno(err, "/dev/kvm");
    int version = ioctl(g->kvm, KVM_GET_API_VERSION, 0);
    if (version != KVM_API_VERSION)
        return rmig_fail(err, RMIG_ERR_SETUP, 0, "KVM's API version is %d, must be %d", version, KVM_API_VERSION);
    if (ioctl(g->kvm, KVM_CHECK_EXTENSION, KVM_CAP_IMMEDIATE_EXIT) <= 0)
        return rmig_fail(err, RMIG_ERR_SETUP, 0, "this KVM has no KVM_CAP_IMMEDIATE_EXIT (Linux 4.12 and later have)");
    g->vm = ioctl(g->kvm, KVM_CREATE_VM, 0);
    if (g->vm < 0)
        return fail_errno(err, "KVM_CREATE_VM");
    // Intel's KVM wants three pages for itself: in the hole below 4 GiB.
    if (ioctl(g->vm, KVM_SET_TSS_ADDR, 0xfffbd000ul) != 0)
        return fail_errno(err, "KVM_SET_TSS_ADDR");
    g->vcpu = ioctl(g->vm, KVM_CREATE_VCPU, 0);
    if (g->vcpu < 0)
        return fail_errno(err, "KVM_CREATE_VCPU");
    int size = ioctl(g->kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
    if (size <= 0)
        return fail_errno(err, "KVM_GET_VCPU_MMAP_SIZE");
    void *run = mmap(NULL, (size_t)size, PROT_READ | PROT_WRITE, MAP_SHARED, g->vcpu, 0);
    if (run == MAP_FAILED)
        return fail_errno(err, "mapping the vcpu");
    g->run = run;
    g->run_size = (size_t)size;
    return kvm_copy_cpuid(g, err);
}

/* Slot 0: RAM below 3 GiB; slot 1: the rest, from 4 GiB on. */
static int kvm_slots(struct guest *g, uint32_t flags, struct rmig_error *err) {
    uint64_t ram = g->layout.ram, low = ram < GUEST_LOW_RAM ? ram : GUEST_LOW_RAM;
    struct kvm_userspace_memory_region slot[2] = {
        {.slot = 0, .flags = flags, .memory_size = low},
        {.slot = 1, .flags = flags, .guest_phys_addr = GUEST_HIGH_AT, .memory_size = ram - low}};
    slot[0].userspace_addr = (uint64_t)(uintptr_t)g->ram;
    slot[1].userspace_addr = (uint64_t)(uintptr_t)g->ram + low;
    for (int i = 0; i < 2; i++)
        if (slot[i].memory_size > 0 && ioctl(g->vm, KVM_SET_USER_MEMORY_REGION, &slot[i]) != 0)
            return fail_errno(err, "KVM_SET_USER_MEMORY_REGION");
    return RMIG_OK;
}

static int kvm_fetch_log(struct guest *g, uint64_t *bitmap, struct rmig_error *err) {
    struct kvm_dirty_log log = {.slot = 0};
    log.dirty_bitmap = bitmap;
    if (ioctl(g->vm, KVM_GET_DIRTY_LOG, &log) != 0)
        return fail_errno(err, "KVM_GET_DIRTY_LOG");
    if (g->layout.ram <= GUEST_LOW_RAM)
        return RMIG_OK;
    log.slot = 1;
    log.dirty_bitmap = bitmap + GUEST_LOW_RAM / GUEST_PAGE / 64;
    return ioctl(g->vm, KVM_GET_DIRTY_LOG, &log) == 0 ? RMIG_OK : fail_errno(err, "KVM_GET_DIRTY_LOG");
}

static struct kvm_segment kvm_segment_make(uint16_t selector, uint8_t type, bool code) {
    struct kvm_segment s = {.limit = 0xffffffff, .selector = selector, .type = type, .present = 1, .s = 1, .g = 1};
    s.l = code ? 1 : 0;
    s.db = code ? 0 : 1;
    s.dpl = 3;
    return s;
}

/* The vcpu of a new guest: long mode, paging on, at the first instruction. */
static int kvm_start_state(struct guest *g, struct rmig_error *err) {
    struct kvm_sregs sregs;
    if (ioctl(g->vcpu, KVM_GET_SREGS, &sregs) != 0)
        return fail_errno(err, "KVM_GET_SREGS");
    sregs.cs = kvm_segment_make(0x1b, 11, true);
    sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = kvm_segment_make(0x23, 3, false);
    sregs.cr3 = GUEST_TABLES;
    sregs.cr4 = 0x20 | 0x200; // PAE, OSFXSR
    sregs.cr0 = 0x80000033; // PG, NE, ET, MP, PE
    sregs.efer = 0x500; // LME, LMA
    if (ioctl(g->vcpu, KVM_SET_SREGS, &sregs) != 0)
        return fail_errno(err, "KVM_SET_SREGS (long mode)");
    struct kvm_regs regs = {.rip = GUEST_PAGE, .rflags = 2};
    regs.r8 = GUEST_LCG_A;
    regs.r9 = GUEST_LCG_C;
    regs.r10 = g->layout.work_pages - 1;
    regs.r11 = GUEST_SYSTEM;
    regs.r12 = GUEST_CHAIN_M;
    regs.r13 = regs.rcx = g->layout.batch;
    regs.r14 = GUEST_DOOR;
    return ioctl(g->vcpu, KVM_SET_REGS, &regs) == 0 ? RMIG_OK : fail_errno(err, "KVM_SET_REGS");
}

/* In the order in which they are to be set. */
static const struct vcpu_part {
    const char *name;
    unsigned long get, set;
    size_t offset;
} vcpu_parts[] = {
    {"SREGS", KVM_GET_SREGS, KVM_SET_SREGS, offsetof(struct vcpu_state, sregs)},
    {"REGS", KVM_GET_REGS, KVM_SET_REGS, offsetof(struct vcpu_state, regs)},
    {"XSAVE", KVM_GET_XSAVE, KVM_SET_XSAVE, offsetof(struct vcpu_state, xsave)},
    {"DEBUGREGS", KVM_GET_DEBUGREGS, KVM_SET_DEBUGREGS, offsetof(struct vcpu_state, debugregs)},
    {"VCPU_EVENTS", KVM_GET_VCPU_EVENTS, KVM_SET_VCPU_EVENTS, offsetof(struct vcpu_state, events)},
};

static int kvm_msrs(struct guest *g, uint64_t *value, bool set, struct rmig_error *err) {
    struct kvm_msrs *list = calloc(1, sizeof *list + GUEST_MSRS * sizeof list->entries[0]);
    if (list == NULL)
        return rmig_fail(err, RMIG_ERR_NO_MEMORY, 0, "no memory for the MSRs");
    list->nmsrs = GUEST_MSRS;
    for (unsigned i = 0; i < GUEST_MSRS; i++) {
        list->entries[i].index = guest_msr_index[i];
        list->entries[i].data = set ? value[i] : 0;
    }
    int rc = RMIG_OK, n = ioctl(g->vcpu, set ? KVM_SET_MSRS : KVM_GET_MSRS, list);
    if (n < 0)
        rc = fail_errno(err, set ? "KVM_SET_MSRS" : "KVM_GET_MSRS");
    else if (n != GUEST_MSRS)
        rc = rmig_fail(err, RMIG_ERR_SETUP, 0, "KVM_%s_MSRS stopped at MSR 0x%x", set ? "SET" : "GET",
                       guest_msr_index[n]);
    for (unsigned i = 0; rc == RMIG_OK && !set && i < GUEST_MSRS; i++)
        value[i] = list->entries[i].data;
    free(list);
    return rc;
}

static int kvm_state(struct guest *g, struct vcpu_state *s, bool set, struct rmig_error *err) {
    for (size_t i = 0; i < sizeof vcpu_parts / sizeof vcpu_parts[0]; i++) {
        const struct vcpu_part *p = &vcpu_parts[i];
        if (ioctl(g->vcpu, set ? p->set : p->get, (uint8_t *)s + p->offset) == 0)
            continue;
        int code = errno;
        return rmig_fail(err, RMIG_ERR_SETUP, code, "KVM_%s_%s: %s", set ? "SET" : "GET", p->name, strerror(code));
    }
    return kvm_msrs(g, s->msr, set, err);
}

static void kvm_kick(struct guest *g, bool on) {
    struct kvm_run *run = g->run;
    __atomic_store_n(&run->immediate_exit, (uint8_t)on, __ATOMIC_SEQ_CST);
}

/* Runs the guest to the end of its batch (true) or until it is kicked. */
static bool kvm_run_batch(struct guest *g) {
    const struct kvm_run *run = g->run;
    if (ioctl(g->vcpu, KVM_RUN, 0) != 0) {
        g->exit_pending = false;
        if (errno != EINTR && errno != EAGAIN)
            guest_set_failed(g, "KVM_RUN", errno);
        return false;
    }
    g->exit_pending = run->exit_reason == KVM_EXIT_MMIO;
    if (run->exit_reason == KVM_EXIT_MMIO && run->mmio.is_write && run->mmio.phys_addr == GUEST_DOOR_PHYSICAL)
        return true;
    char text[120];
    struct kvm_regs regs = {0};
    ioctl(g->vcpu, KVM_GET_REGS, &regs);
    snprintf(text, sizeof text, "the guest stopped by itself: KVM exit %u (hardware reason 0x%llx) at rip 0x%llx",
             run->exit_reason, (unsigned long long)run->hw.hardware_exit_reason, (unsigned long long)regs.rip);
    guest_set_failed(g, text, 0);
    return false;
}

/* Finishes a pending exit, without another instruction: only then are the registers whole. */
static void kvm_settle(struct guest *g) {
    if (!g->exit_pending)
        return;
    kvm_kick(g, true);
    kvm_run_batch(g);
}
#else
static int kvm_open_vcpu(struct guest *g, struct rmig_error *err) {
    (void)g;
    return rmig_fail(err, RMIG_ERR_SETUP, 0, "the KVM guest of this program is x86-64 code");
}
#endif

// >>running

/* Keeps to steps_per_second; wakes early when the guest shall stop. lock is held. */
static void guest_pace(struct guest *g) {
    if (g->layout.steps_per_second == 0)
        return;
    g->next_batch_ns += (uint64_t)((double)g->layout.batch * 1e9 / (double)g->layout.steps_per_second);
    uint64_t now = guest_now();
    if (g->next_batch_ns + 100000000u < now) // held up for long: not to be caught up
        g->next_batch_ns = now;
    struct timespec until = guest_timespec(g->next_batch_ns);
    while (g->run_wanted && !g->quit && guest_now() < g->next_batch_ns)
        if (pthread_cond_timedwait(&g->changed, &g->lock, &until) != 0)
            break;
}

static bool thread_steps(struct guest *g) {
    for (uint64_t i = 0; i < g->layout.batch; i++) {
        if (atomic_load_explicit(&g->kick, memory_order_relaxed))
            return false;
        rule_step(g->ram, &g->layout, &g->registers);
    }
    return true;
}

/* RAM that is loaded lazily becomes inaccessible when that fails. KVM_RUN returns an error then; a thread guest has to
   fail as well, and not this whole program. */
static _Thread_local sigjmp_buf *thread_on_fault;
static struct sigaction thread_fault_before;

static void thread_fault(int number) {
    if (thread_on_fault != NULL)
        siglongjmp(*thread_on_fault, 1);
    sigaction(number, &thread_fault_before, NULL); // of nobody's: on return it happens again
}

static void thread_catch_faults(void) {
    static bool caught;
    struct sigaction action = {.sa_handler = thread_fault, .sa_flags = (int)SA_NODEFER};
    if (!caught)
        sigaction(SIGSEGV, &action, &thread_fault_before);
    caught = true;
}

static bool thread_run_batch(struct guest *g) {
    sigjmp_buf jump;
    if (sigsetjmp(jump, 0) != 0) {
        thread_on_fault = NULL;
        guest_set_failed(g, "the guest's RAM cannot be accessed", 0);
        return false;
    }
    thread_on_fault = &jump;
    bool whole = thread_steps(g);
    thread_on_fault = NULL;
    return whole;
}

static bool guest_run_batch(struct guest *g) {
#if defined(__x86_64__)
    if (g->kind == GUEST_KVM)
        return kvm_run_batch(g);
#endif
    return thread_run_batch(g);
}

static void guest_settle(struct guest *g) {
#if defined(__x86_64__)
    if (g->kind == GUEST_KVM)
        kvm_settle(g);
#else
    (void)g;
#endif
}

static void *guest_main(void *arg) {
    struct guest *g = arg;
    pthread_mutex_lock(&g->lock);
    while (!g->quit) {
        if (g->run_wanted && !g->failed) {
            g->running = true;
            pthread_mutex_unlock(&g->lock);
            bool whole = guest_run_batch(g);
            pthread_mutex_lock(&g->lock);
            if (whole)
                guest_pace(g);
            continue;
        }
        pthread_mutex_unlock(&g->lock);
        guest_settle(g);
        pthread_mutex_lock(&g->lock);
        g->running = false;
        pthread_cond_broadcast(&g->changed);
        while (!g->quit && (!g->run_wanted || g->failed))
            pthread_cond_wait(&g->changed, &g->lock);
    }
    g->running = false;
    pthread_mutex_unlock(&g->lock);
    return NULL;
}

static int guest_start_thread(struct guest *g, struct rmig_error *err) {
#if defined(__x86_64__)
    struct sigaction action = {.sa_handler = kvm_signal}; // without SA_RESTART: KVM_RUN shall return
    sigaction(SIGUSR1, &action, NULL);
#endif
    if (g->kind == GUEST_THREAD)
        thread_catch_faults();
    errno = pthread_create(&g->thread, NULL, guest_main, g);
    if (errno != 0)
        return fail_errno(err, "the guest's thread");
    g->thread_started = true;
    return RMIG_OK;
}

static void guest_kick(struct guest *g, bool on) { // lock is held
    atomic_store(&g->kick, on);
#if defined(__x86_64__)
    if (g->kind != GUEST_KVM || g->run == NULL)
        return;
    kvm_kick(g, on);
    if (on)
        pthread_kill(g->thread, SIGUSR1);
#endif
}

static void guest_resume(struct guest *g) {
    pthread_mutex_lock(&g->lock);
    guest_kick(g, false);
    g->run_wanted = true;
    g->next_batch_ns = guest_now();
    pthread_cond_broadcast(&g->changed);
    pthread_mutex_unlock(&g->lock);
}

/* Stops the guest between two instructions and waits until it stands still. */
static int guest_pause(struct guest *g, struct rmig_error *err) {
    struct timespec until = guest_timespec(guest_now() + GUEST_PAUSE_NS);
    int rc = RMIG_OK;
    pthread_mutex_lock(&g->lock);
    g->run_wanted = false;
    guest_kick(g, true);
    pthread_cond_broadcast(&g->changed);
    while (g->running && rc == RMIG_OK)
        if (pthread_cond_timedwait(&g->changed, &g->lock, &until) != 0 && g->running)
            rc = rmig_fail(err, RMIG_ERR_SETUP, 0, "the guest did not stop within %llu ms",
                           (unsigned long long)(GUEST_PAUSE_NS / 1000000));
    if (rc == RMIG_OK && g->failed)
        rc = rmig_fail(err, RMIG_ERR_SETUP, 0, "%s", g->failure);
    pthread_mutex_unlock(&g->lock);
    return rc;
}

static bool guest_has_failed(struct guest *g, struct rmig_error *err) {
    pthread_mutex_lock(&g->lock);
    bool failed = g->failed;
    if (failed)
        rmig_fail(err, RMIG_ERR_SETUP, 0, "%s", g->failure);
    pthread_mutex_unlock(&g->lock);
    return failed;
}

/* Waits until the guest has made a step after step `from`: it runs. */
static int guest_wait_step(struct guest *g, uint64_t from, struct rmig_error *err) {
    uint64_t deadline = guest_now() + GUEST_PAUSE_NS;
    while (guest_steps(g->ram) == from) {
        if (guest_has_failed(g, err))
            return RMIG_ERR_SETUP;
        if (guest_now() > deadline)
            return rmig_fail(err, RMIG_ERR_SETUP, 0, "the guest made no step after step %llu within %llu ms",
                             (unsigned long long)from, (unsigned long long)(GUEST_PAUSE_NS / 1000000));
        struct timespec nap = guest_timespec(20000);
        nanosleep(&nap, NULL);
    }
    return RMIG_OK;
}

// >>dirty log of a thread guest: userfaultfd, write protection

static int uffd_protect(struct guest *g, uint64_t first, uint64_t pages, bool on) {
    struct uffdio_writeprotect wp;
    memset(&wp, 0, sizeof wp);
    wp.range.start = (uint64_t)(uintptr_t)g->ram + first * GUEST_PAGE;
    wp.range.len = pages * GUEST_PAGE;
    wp.mode = on ? UFFDIO_WRITEPROTECT_MODE_WP : 0;
    int rc;
    do
        rc = ioctl(g->uffd, UFFDIO_WRITEPROTECT, &wp);
    while (rc != 0 && errno == EAGAIN);
    return rc;
}

static void uffd_handle(struct guest *g, const struct uffd_msg *msg) {
    if (msg->event != UFFD_EVENT_PAGEFAULT || !(msg->arg.pagefault.flags & UFFD_PAGEFAULT_FLAG_WP)) {
        guest_set_failed(g, "userfaultfd: an event that is no write fault", 0);
        return;
    }
    uint64_t page = (msg->arg.pagefault.address - (uint64_t)(uintptr_t)g->ram) / GUEST_PAGE;
    pthread_mutex_lock(&g->uffd_lock);
    rmig_merge_add_page(&g->uffd_log, page);
    int rc = uffd_protect(g, page, 1, false);
    pthread_mutex_unlock(&g->uffd_lock);
    if (rc != 0)
        guest_set_failed(g, "userfaultfd: opening a page for writing", errno);
}

static void *uffd_main(void *arg) {
    struct guest *g = arg;
    struct pollfd p[2] = {{.fd = g->uffd, .events = POLLIN}, {.fd = g->uffd_stop, .events = POLLIN}};
    while (poll(p, 2, -1) >= 0 || errno == EINTR) {
        if (p[1].revents != 0)
            break;
        struct uffd_msg msg;
        if (p[0].revents != 0 && read(g->uffd, &msg, sizeof msg) == (ssize_t)sizeof msg)
            uffd_handle(g, &msg);
    }
    return NULL;
}

static int uffd_open(struct guest *g, struct rmig_error *err) {
    // User mode only: then no privilege is needed, and only the guest's own stores are to be caught.
    g->uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY);
    if (g->uffd < 0)
        return fail_errno(err, "userfaultfd, the dirty log of a thread guest");
    struct uffdio_api api = {.api = UFFD_API};
    api.features = UFFD_FEATURE_PAGEFAULT_FLAG_WP | UFFD_FEATURE_WP_HUGETLBFS_SHMEM;
    if (ioctl(g->uffd, UFFDIO_API, &api) != 0)
        return fail_errno(err, "userfaultfd: write protection of shared memory (Linux 5.19 and later have it)");
    struct uffdio_register reg = {.mode = UFFDIO_REGISTER_MODE_WP};
    reg.range.start = (uint64_t)(uintptr_t)g->ram;
    reg.range.len = g->layout.ram;
    if (ioctl(g->uffd, UFFDIO_REGISTER, &reg) != 0)
        return fail_errno(err, "userfaultfd: registering the guest's RAM");
    return RMIG_OK;
}

static void uffd_close(struct guest *g) {
    if (g->uffd_stop >= 0) {
        uint64_t one = 1;
        if (write(g->uffd_stop, &one, sizeof one) == (ssize_t)sizeof one)
            pthread_join(g->uffd_thread, NULL);
        close(g->uffd_stop);
    }
    if (g->uffd >= 0) // closing it removes the protection and lets waiting stores go on
        close(g->uffd);
    free(g->uffd_log.bits);
    g->uffd = g->uffd_stop = -1;
    memset(&g->uffd_log, 0, sizeof g->uffd_log);
}

static int uffd_start(struct guest *g, struct rmig_error *err) {
    g->uffd_log.pages = layout_pages(&g->layout);
    g->uffd_log.bits = calloc((g->uffd_log.pages + 63) / 64, 8);
    if (g->uffd_log.bits == NULL)
        return rmig_fail(err, RMIG_ERR_NO_MEMORY, 0, "no memory for the dirty log");
    int rc = uffd_open(g, err);
    if (rc != RMIG_OK)
        return rc;
    int stop = eventfd(0, EFD_CLOEXEC);
    if (stop < 0)
        return fail_errno(err, "eventfd");
    g->uffd_stop = stop;
    errno = pthread_create(&g->uffd_thread, NULL, uffd_main, g);
    if (errno != 0) {
        rc = fail_errno(err, "the dirty log's thread");
        close(stop);
        g->uffd_stop = -1;
        return rc;
    }
    return uffd_protect(g, 0, layout_pages(&g->layout), true) == 0 ? RMIG_OK
                                                                   : fail_errno(err, "userfaultfd: write protection");
}

static int uffd_fetch_log(struct guest *g, uint64_t *bitmap, struct rmig_error *err) {
    struct rmig_merge *log = &g->uffd_log;
    uint64_t first, n;
    int rc = 0;
    pthread_mutex_lock(&g->uffd_lock);
    memcpy(bitmap, log->bits, (log->pages + 63) / 64 * 8);
    while (rc == 0 && rmig_merge_next(log, 0, log->pages, UINT64_MAX, &first, &n)) {
        rmig_merge_take(log, first, n);
        rc = uffd_protect(g, first, n, true);
    }
    pthread_mutex_unlock(&g->uffd_lock);
    return rc == 0 ? RMIG_OK : fail_errno(err, "userfaultfd: write protection");
}

// >>dirty log

static int guest_log_start(struct guest *g, struct rmig_error *err) {
    g->logging = true;
#if defined(__x86_64__)
    if (g->kind == GUEST_KVM)
        return kvm_slots(g, KVM_MEM_LOG_DIRTY_PAGES, err);
#endif
    return uffd_start(g, err);
}

/* Pages written since start or the last fetch: bit i of word i / 64 is page i. Writes after the call are for the next
   fetch. */
static int guest_log_fetch(struct guest *g, uint64_t *bitmap, struct rmig_error *err) {
#if defined(__x86_64__)
    if (g->kind == GUEST_KVM)
        return kvm_fetch_log(g, bitmap, err);
#endif
    return uffd_fetch_log(g, bitmap, err);
}

static void guest_log_stop(struct guest *g) {
    if (!g->logging)
        return;
    g->logging = false;
    uffd_close(g);
#if defined(__x86_64__)
    if (g->kind == GUEST_KVM)
        kvm_slots(g, 0, NULL);
#endif
}

// >>life

/* A new guest, at its first instruction, paused. ram: all zero. */
static int guest_create(struct guest *g, struct rmig_error *err) {
    content_write_all(&g->layout, g->ram);
#if defined(__x86_64__)
    if (g->kind == GUEST_KVM) {
        int rc = kvm_open_vcpu(g, err);
        if (rc == RMIG_OK)
            rc = kvm_slots(g, 0, err);
        if (rc == RMIG_OK)
            rc = kvm_start_state(g, err);
        if (rc != RMIG_OK)
            return rc;
    }
#endif
    return guest_start_thread(g, err);
}

/* The state of a paused guest. */
static int guest_save_state(struct guest *g, struct guest_state *s, struct rmig_error *err) {
    memset(s, 0, sizeof *s);
    s->magic = GUEST_MAGIC;
    s->version = GUEST_STATE_VERSION;
    s->size = sizeof *s;
    s->kind = g->kind;
    s->steps = guest_steps(g->ram);
    s->layout = g->layout;
    s->thread = g->registers;
#if defined(__x86_64__)
    if (g->kind == GUEST_KVM)
        return kvm_state(g, &s->vcpu, false, err);
#endif
    (void)err;
    return RMIG_OK;
}

/* Makes the guest of a state that arrived and passed state_check, paused. kvm_open_vcpu may have been called before. */
static int guest_load_state(struct guest *g, struct guest_state *s, struct rmig_error *err) {
    g->layout = s->layout;
    g->kind = (enum guest_kind)s->kind;
    g->registers = s->thread;
    if (g->kind == GUEST_KVM) {
        int rc = g->vcpu >= 0 ? RMIG_OK : kvm_open_vcpu(g, err);
#if defined(__x86_64__)
        if (rc == RMIG_OK)
            rc = kvm_slots(g, 0, err);
        if (rc == RMIG_OK)
            rc = kvm_state(g, &s->vcpu, true, err);
#endif
        if (rc != RMIG_OK)
            return rc;
    }
    return guest_start_thread(g, err);
}

/* n in the registers against n in memory: a step under way has counted already. The guest is paused. */
static bool guest_registers_fit(struct guest *g, uint64_t steps, struct guest_verdict *v) {
    uint64_t n = g->registers.n;
#if defined(__x86_64__)
    struct kvm_regs regs = {0};
    if (g->kind == GUEST_KVM) {
        ioctl(g->vcpu, KVM_GET_REGS, &regs);
        n = regs.rbx;
    }
#endif
    if (n == steps || (g->kind == GUEST_KVM && n == steps + 1))
        return true;
    if (v->ok)
        snprintf(v->text, sizeof v->text, "the registers are at step %llu, memory at step %llu", (unsigned long long)n,
                 (unsigned long long)steps);
    v->ok = false;
    return false;
}

/* Stops and frees the guest; its RAM is the caller's. Any state of *g after guest_init. */
static void guest_close(struct guest *g) {
    if (g->thread_started) {
        pthread_mutex_lock(&g->lock);
        g->quit = true;
        g->run_wanted = false;
        guest_kick(g, true);
        pthread_cond_broadcast(&g->changed);
        pthread_mutex_unlock(&g->lock);
        guest_log_stop(g); // before the join: a store may wait for the log's thread
        pthread_join(g->thread, NULL);
        g->thread_started = false;
    }
    guest_log_stop(g);
    if (g->run != NULL)
        munmap(g->run, g->run_size);
    const int fds[3] = {g->vcpu, g->vm, g->kvm};
    for (int i = 0; i < 3; i++)
        if (fds[i] >= 0)
            close(fds[i]);
    g->run = NULL;
    g->kvm = g->vm = g->vcpu = -1;
    pthread_cond_destroy(&g->changed);
    pthread_mutex_destroy(&g->lock);
    pthread_mutex_destroy(&g->uffd_lock);
}

/* Does a guest really run under KVM here? A /dev/kvm that opens says too little. *err has the reason if not. */
static int guest_probe_kvm(struct rmig_error *err) {
    struct guest g;
    struct guest_layout l;
    int rc = layout_make(&l, GUEST_RAM_MIN, UINT64_MAX, UINT64_MAX, 0, err);
    void *ram = mmap(NULL, GUEST_RAM_MIN, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (rc != RMIG_OK || ram == MAP_FAILED)
        return rc != RMIG_OK ? rc : fail_errno(err, "memory to try KVM with");
    guest_init(&g, GUEST_KVM, &l, ram);
    rc = guest_create(&g, err);
    if (rc == RMIG_OK) {
        guest_resume(&g);
        rc = guest_wait_step(&g, 0, err);
    }
    guest_close(&g);
    munmap(ram, GUEST_RAM_MIN);
    return rc;
}

#endif // KVM_GUEST_H
