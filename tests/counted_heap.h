/* RMIG_MALLOC and friends that count, and fail where told: to be included before rmig.h. */
#ifndef RMIG_COUNTED_HEAP_H
#define RMIG_COUNTED_HEAP_H

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

#endif
