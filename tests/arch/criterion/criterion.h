/* The few words of Criterion that the suites without a device use, for machines that Criterion has not been built for:
   the same sources, each test in a process of its own, TAP on standard output. `--filter SUITE/TEST` (a pattern, any
   number of them, the last one that fits counts; with a "!" before it, it keeps out what it fits) chooses what runs. A
   pattern that fits nothing is a failure. */
#ifndef RMIG_ARCH_CRITERION_H
#define RMIG_ARCH_CRITERION_H

#include <errno.h>
#include <fcntl.h>
#include <fnmatch.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

struct arch_options {
    int first; // so that a list may be empty
    double timeout; // seconds
};

struct arch_test {
    const char *suite, *name;
    void (*run)(void);
    struct arch_options options;
    struct arch_test *next;
};

static struct arch_test *arch_tests, **arch_last = &arch_tests;

// What the process of a test tells the one that waits for it.
static struct {
    unsigned failed;
    bool skipped;
    char text[4096]; // the first failure, or why the test is skipped
} * arch_result;

static void arch_register(struct arch_test *t) {
    *arch_last = t;
    arch_last = &t->next;
}

#define ARCH_NAME(suite, name, what) arch_##suite##_##name##_##what

#define Test(suite_, name_, ...)                                                                                       \
    static void ARCH_NAME(suite_, name_, run)(void);                                                                   \
    __attribute__((constructor)) static void ARCH_NAME(suite_, name_, register)(void) {                                \
        static struct arch_test t = {#suite_, #name_, ARCH_NAME(suite_, name_, run), {0, __VA_ARGS__}, NULL};          \
        arch_register(&t);                                                                                             \
    }                                                                                                                  \
    static void ARCH_NAME(suite_, name_, run)(void)

#define TestSuite(suite, ...) struct arch_suite_##suite

__attribute__((format(printf, 5, 6))) static inline bool arch_expect(bool holds, const char *file, int line,
                                                                     const char *what, const char *format, ...) {
    if (!holds && arch_result->failed++ == 0) {
        int n = snprintf(arch_result->text, sizeof arch_result->text, "%s:%d: %s: ", file, line, what);
        va_list args;
        va_start(args, format);
        if (n > 0 && (size_t)n < sizeof arch_result->text)
            vsnprintf(arch_result->text + n, sizeof arch_result->text - (size_t)n, format, args);
        va_end(args);
    }
    return holds;
}

__attribute__((noreturn)) static inline void arch_leave(void) {
    fflush(NULL);
    _exit(0);
}

#define ARCH_EXPECT(holds, what, ...) arch_expect(holds, __FILE__, __LINE__, what, " " __VA_ARGS__)
#define ARCH_ASSERT(holds, what, ...)                                                                                  \
    do {                                                                                                               \
        if (!ARCH_EXPECT(holds, what, __VA_ARGS__))                                                                    \
            arch_leave();                                                                                              \
    } while (0)

#define cr_assert_fail(...) ARCH_ASSERT(false, "failed", __VA_ARGS__)
#define cr_assert(c, ...) ARCH_ASSERT(!!(c), #c, __VA_ARGS__)
#define cr_assert_not(c, ...) ARCH_ASSERT(!(c), "not " #c, __VA_ARGS__)
#define cr_assert_null(p, ...) ARCH_ASSERT((p) == NULL, #p " is NULL", __VA_ARGS__)
#define cr_assert_not_null(p, ...) ARCH_ASSERT((p) != NULL, #p " is not NULL", __VA_ARGS__)
#define cr_assert_eq(a, b, ...) ARCH_ASSERT((a) == (b), #a " == " #b, __VA_ARGS__)
#define cr_assert_neq(a, b, ...) ARCH_ASSERT((a) != (b), #a " != " #b, __VA_ARGS__)
#define cr_assert_lt(a, b, ...) ARCH_ASSERT((a) < (b), #a " < " #b, __VA_ARGS__)
#define cr_assert_leq(a, b, ...) ARCH_ASSERT((a) <= (b), #a " <= " #b, __VA_ARGS__)
#define cr_assert_gt(a, b, ...) ARCH_ASSERT((a) > (b), #a " > " #b, __VA_ARGS__)
#define cr_assert_geq(a, b, ...) ARCH_ASSERT((a) >= (b), #a " >= " #b, __VA_ARGS__)
#define cr_assert_str_eq(a, b, ...) ARCH_ASSERT(strcmp(a, b) == 0, #a " reads as " #b, __VA_ARGS__)
#define cr_assert_arr_eq(a, b, n, ...) ARCH_ASSERT(memcmp(a, b, n) == 0, #a " holds " #b, __VA_ARGS__)
#define cr_expect(c, ...) ARCH_EXPECT(!!(c), #c, __VA_ARGS__)
#define cr_expect_not(c, ...) ARCH_EXPECT(!(c), "not " #c, __VA_ARGS__)
#define cr_expect_null(p, ...) ARCH_EXPECT((p) == NULL, #p " is NULL", __VA_ARGS__)
#define cr_expect_not_null(p, ...) ARCH_EXPECT((p) != NULL, #p " is not NULL", __VA_ARGS__)
#define cr_expect_eq(a, b, ...) ARCH_EXPECT((a) == (b), #a " == " #b, __VA_ARGS__)
#define cr_expect_lt(a, b, ...) ARCH_EXPECT((a) < (b), #a " < " #b, __VA_ARGS__)
#define cr_expect_leq(a, b, ...) ARCH_EXPECT((a) <= (b), #a " <= " #b, __VA_ARGS__)
#define cr_expect_gt(a, b, ...) ARCH_EXPECT((a) > (b), #a " > " #b, __VA_ARGS__)
#define cr_expect_geq(a, b, ...) ARCH_EXPECT((a) >= (b), #a " >= " #b, __VA_ARGS__)
#define cr_expect_str_eq(a, b, ...) ARCH_EXPECT(strcmp(a, b) == 0, #a " reads as " #b, __VA_ARGS__)
#define cr_expect_str_neq(a, b, ...) ARCH_EXPECT(strcmp(a, b) != 0, #a " does not read as " #b, __VA_ARGS__)
#define cr_expect_arr_eq(a, b, n, ...) ARCH_EXPECT(memcmp(a, b, n) == 0, #a " holds " #b, __VA_ARGS__)

#define cr_skip(...)                                                                                                   \
    do {                                                                                                               \
        arch_result->skipped = true;                                                                                   \
        snprintf(arch_result->text, sizeof arch_result->text, __VA_ARGS__);                                            \
        arch_leave();                                                                                                  \
    } while (0)

// Runs one test and prints its line; true if it passed.
static inline bool arch_run(const struct arch_test *t, unsigned number) {
    int status = 0;
    memset(arch_result, 0, sizeof *arch_result);
    fflush(NULL);
    pid_t child = fork();
    if (child == 0) {
        alarm(t->options.timeout > 0 ? (unsigned)t->options.timeout : 600);
        t->run();
        arch_leave();
    }
    if (child < 0 || waitpid(child, &status, 0) != child)
        status = 1;
    bool passed = status == 0 && arch_result->failed == 0;
    printf("%sok %u - %s/%s%s%s\n", passed ? "" : "not ", number, t->suite, t->name,
           passed && arch_result->skipped ? " # SKIP " : "", passed && arch_result->skipped ? arch_result->text : "");
    if (!passed)
        printf("# %u failed, the first: %s; wait status 0x%x\n", arch_result->failed, arch_result->text,
               (unsigned)status);
    return passed;
}

/* In an emulator the page map is that of the machine below: other page size, other order of bytes. Linked with
   --wrap=open. */
int __real_open(const char *path, int flags, ...);
int __wrap_open(const char *path, int flags, ...);
int __wrap_open(const char *path, int flags, ...) {
    va_list args;
    va_start(args, flags);
    unsigned mode = (flags & O_CREAT) != 0 ? va_arg(args, unsigned) : 0;
    va_end(args);
    if (strcmp(path, "/proc/self/pagemap") != 0)
        return __real_open(path, flags, mode);
    errno = ENOENT;
    return -1;
}

static inline bool arch_chosen(const struct arch_test *t, int argc, char **argv, bool *used) {
    char name[256];
    bool chosen = argc < 3 || argv[2][0] == '!';
    snprintf(name, sizeof name, "%s/%s", t->suite, t->name);
    for (int i = 1; i + 1 < argc; i += 2) {
        bool out = argv[i + 1][0] == '!';
        if (fnmatch(argv[i + 1] + out, name, 0) == 0) {
            used[i] = true;
            chosen = !out;
        }
    }
    return chosen;
}

int main(int argc, char **argv) {
    if (argc == 2 && strcmp(argv[1], "--page-size") == 0) {
        printf("%ld\n", sysconf(_SC_PAGESIZE));
        return 0;
    }
    unsigned number = 0, failed = 0;
    bool *used = (bool *)calloc((size_t)argc + 1, sizeof *used);
    arch_result = mmap(NULL, sizeof *arch_result, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (used == NULL || arch_result == MAP_FAILED)
        return 1;
    for (const struct arch_test *t = arch_tests; t != NULL; t = t->next)
        if (arch_chosen(t, argc, argv, used))
            failed += !arch_run(t, ++number);
    for (int i = 1; i < argc; i += 2)
        if (strcmp(argv[i], "--filter") != 0 || i + 1 == argc || !used[i]) {
            printf("not ok %u - %s %s fits no test\n", ++number, argv[i], i + 1 == argc ? "" : argv[i + 1]);
            failed++;
        }
    printf("1..%u\n", number);
    free(used);
    return failed != 0 || number == 0;
}

#endif
