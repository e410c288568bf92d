// Every macro of rmig.h that an embedder may override, overridden: the unit suites are built with these once. Includes
// nothing, so that it may come before the feature macros of the file that is compiled.
#ifndef TESTS_OVERRIDE_H
#define TESTS_OVERRIDE_H

/* Blocks begin 32 bytes into what malloc gave, so that memory which took the wrong way in or out is noticed. */
static inline void *override_realloc(void *p, __SIZE_TYPE__ n) {
    char *base = (char *)__builtin_realloc(p ? (char *)p - 32 : (char *)p, n + 32);
    return base ? base + 32 : base;
}

static inline void override_free(void *p) { __builtin_free(p ? (char *)p - 32 : (char *)p); }

static inline void override_assert(int holds, const char *text) {
    if (holds)
        return;
    __builtin_printf("RMIG_ASSERT: %s\n", text);
    __builtin_abort();
}

#define RMIG_MALLOC(n) override_realloc((void *)0, n)
#define RMIG_REALLOC(p, n) override_realloc(p, n)
#define RMIG_FREE(p) override_free(p)
#define RMIG_LOG(text) __builtin_printf("rmig: %s\n", text)
#define RMIG_ASSERT(c) override_assert((c) ? 1 : 0, #c)

#endif
