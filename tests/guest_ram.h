/* RAM for the guests of tests: zeros, with a page behind it that nobody may touch, and one before it where the length is
   a multiple of GUEST_RAM_HUGE. What was given back is given out again, and it is made of huge pages where the kernel
   has them: on a virtual machine the page faults of memory that is new cost more than all that a test does with it. So
   it has no holes that a page map could show; where those are what is tested, map the memory anew. */
#ifndef RMIG_GUEST_RAM_H
#define RMIG_GUEST_RAM_H

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define GUEST_RAM_MAX 64
#define GUEST_RAM_HUGE ((size_t)2 << 20)
#define GUEST_RAM_PAGE ((size_t)4096)
#define GUEST_RAM_UP(n, unit) (((n) + (unit)-1) / (unit) * (unit))

struct guest_ram {
    uint8_t *base; // at a huge page
    size_t size;   // in whole huge pages; the guest's is at its end
    bool taken;
};

static struct guest_ram guest_ram_pool[GUEST_RAM_MAX];

static inline void guest_ram_make(struct guest_ram *r, size_t length) {
    size_t size = GUEST_RAM_UP(length, GUEST_RAM_HUGE);
    uint8_t *p = (uint8_t *)mmap(NULL, size + 2 * GUEST_RAM_HUGE, PROT_NONE,
                                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    uint8_t *base = (uint8_t *)GUEST_RAM_UP((uintptr_t)p + 1, GUEST_RAM_HUGE);
    if (p == MAP_FAILED || mprotect(base, size, PROT_READ | PROT_WRITE) < 0) {
        perror("memory of a test");
        abort();
    }
    madvise(base, size, MADV_HUGEPAGE); // a kernel without them has small ones
    *r = (struct guest_ram){base, size, false};
}

static inline void *guest_ram_map(size_t length) {
    struct guest_ram *r = guest_ram_pool, *end = r + GUEST_RAM_MAX;
    while (r < end && r->base != NULL && (r->taken || r->size < length))
        r++;
    if (r == end) {
        fprintf(stderr, "a test has more than %d pieces of RAM\n", GUEST_RAM_MAX);
        abort();
    }
    bool used = r->base != NULL;
    if (!used)
        guest_ram_make(r, length);
    r->taken = true;
    uint8_t *host = r->base + r->size - GUEST_RAM_UP(length, GUEST_RAM_PAGE);
    if (used)
        memset(host, 0, GUEST_RAM_UP(length, GUEST_RAM_PAGE));
    return host;
}

/* False: it is not from here. */
static inline bool guest_ram_unmap(const void *host) {
    for (struct guest_ram *r = guest_ram_pool; r < guest_ram_pool + GUEST_RAM_MAX && r->base != NULL; r++)
        if ((uintptr_t)host - (uintptr_t)r->base < r->size) {
            r->taken = false;
            return true;
        }
    return false;
}

#endif
