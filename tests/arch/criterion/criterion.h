/* The few words of Criterion that some suites use, for machines that Criterion has not been built for, and for the
   emulated ones with RDMA devices, where a process is dear: Criterion loads all its libraries anew for each test, this
   forks. The same sources, each test in a process of its own, TAP on standard output; what a test prints goes to standard
   error. `--filter SUITE/TEST` (a pattern, any number of them, the last one that fits counts; with a "!" before it, it
   keeps out what it fits) chooses what runs, a pattern that fits nothing is a failure; `--jobs N` runs so many tests side
   by side. Of Criterion's options there is the timeout, of a test or of its suite; another one does not compile. A test
   that ends its process itself has failed, whatever the exit status. */
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

// What a test is run with, one run each.
struct criterion_test_params {
    size_t size; // of one
    void *params;
    size_t length;
};

struct arch_test {
    const char *suite, *name;
    void (*run)(void *param);
    struct criterion_test_params (*params)(void); // NULL: one run, without
    struct arch_options options;
    struct arch_test *next;
};

static struct arch_test *arch_tests, **arch_last = &arch_tests;

// What the tests of a suite are run with that do not say it themselves.
struct arch_suite {
    const char *name;
    struct arch_options options;
    struct arch_suite *next;
};

static struct arch_suite *arch_suites;

// What the process of a test tells the one that waits for it.
struct arch_result {
    unsigned failed;
    bool skipped;
    pid_t ended; // the process that came to the end of a test, or to a failure that ends it
    char text[4096]; // the first failure, or why the test is skipped
};

static struct arch_result *arch_result; // of the test whose process this is

// A run that is under way, one for each job.
struct arch_slot {
    pid_t child; // 0: free
    const struct arch_test *test;
    size_t row;
    struct arch_result *result;
};

static struct {
    struct arch_slot *slots;
    unsigned jobs, running, number, failed;
} arch = {.jobs = 1};

static void arch_register(struct arch_test *t) {
    *arch_last = t;
    arch_last = &t->next;
}

#ifdef FNM_EXTMATCH
#define ARCH_MATCH FNM_EXTMATCH // "@(a|b)", as Criterion has it
#else
#define ARCH_MATCH 0
#endif

#define ARCH_NAME(suite, name, what) arch_##suite##_##name##_##what

#define ARCH_REGISTER(suite_, name_, params_, ...)                                                                     \
    static void ARCH_NAME(suite_, name_, start)(void *param);                                                          \
    __attribute__((constructor)) static void ARCH_NAME(suite_, name_, register)(void) {                                \
        static struct arch_test t = {                                                                                  \
            #suite_, #name_, ARCH_NAME(suite_, name_, start), params_, {0, __VA_ARGS__}, NULL};                        \
        arch_register(&t);                                                                                             \
    }

#define Test(suite_, name_, ...)                                                                                       \
    static void ARCH_NAME(suite_, name_, run)(void);                                                                   \
    ARCH_REGISTER(suite_, name_, NULL, __VA_ARGS__)                                                                    \
    static void ARCH_NAME(suite_, name_, start)(void *param) {                                                         \
        (void)param;                                                                                                   \
        ARCH_NAME(suite_, name_, run)();                                                                               \
    }                                                                                                                  \
    static void ARCH_NAME(suite_, name_, run)(void)

#define ParameterizedTestParameters(suite_, name_)                                                                     \
    static struct criterion_test_params ARCH_NAME(suite_, name_, params)(void)

#define ParameterizedTest(param_, suite_, name_, ...)                                                                  \
    static void ARCH_NAME(suite_, name_, run)(param_);                                                                 \
    ARCH_REGISTER(suite_, name_, ARCH_NAME(suite_, name_, params), __VA_ARGS__)                                        \
    static void ARCH_NAME(suite_, name_, start)(void *param) { ARCH_NAME(suite_, name_, run)(param); }                 \
    static void ARCH_NAME(suite_, name_, run)(param_)

#define cr_make_param_array(type, array, length) ((struct criterion_test_params){sizeof(type), array, length})

#define TestSuite(suite_, ...)                                                                                         \
    __attribute__((constructor)) static void ARCH_NAME(suite_, suite, register)(void) {                                \
        static struct arch_suite s = {#suite_, {0, __VA_ARGS__}, NULL};                                                \
        s.next = arch_suites;                                                                                          \
        arch_suites = &s;                                                                                              \
    }                                                                                                                  \
    struct arch_suite_##suite_ // takes the semicolon

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
    arch_result->ended = getpid();
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

#define cr_skip_test(...) cr_skip(__VA_ARGS__)

// Prints the line of a run that ended so.
static inline void arch_report(const struct arch_slot *slot, int status) {
    const struct arch_test *t = slot->test;
    const struct arch_result *r = slot->result;
    bool ended = r->ended == slot->child, passed = status == 0 && r->failed == 0 && ended, skipped = passed && r->skipped;
    char row[24] = "";
    if (slot->row > 0)
        snprintf(row, sizeof row, " %zu", slot->row + 1);
    printf("%sok %u - %s/%s%s%s%s\n", passed ? "" : "not ", ++arch.number, t->suite, t->name, row,
           skipped ? " # SKIP " : "", skipped ? r->text : "");
    if (!passed)
        printf("# %u failed, the first: %s; wait status 0x%x%s\n", r->failed, r->text, (unsigned)status,
               ended ? "" : ", before its end");
    arch.failed += !passed;
}

// Waits for one of the runs under way.
static inline void arch_reap(void) {
    int status = 0;
    pid_t child = wait(&status);
    if (child < 0) {
        perror("wait");
        exit(1);
    }
    for (struct arch_slot *slot = arch.slots; slot < arch.slots + arch.jobs; slot++)
        if (slot->child == child) {
            arch_report(slot, status);
            slot->child = 0;
            arch.running--;
        }
}

// In whole seconds, at least one: alarm(0) would be none.
static inline unsigned arch_timeout(const struct arch_test *t) {
    double timeout = t->options.timeout;
    for (const struct arch_suite *s = arch_suites; s != NULL && !(timeout > 0); s = s->next)
        if (strcmp(s->name, t->suite) == 0)
            timeout = s->options.timeout;
    unsigned whole = (unsigned)timeout;
    return timeout > 0 ? whole + ((double)whole < timeout) : 600;
}

__attribute__((noreturn)) static inline void arch_child(const struct arch_slot *slot, void *param) {
    dup2(STDERR_FILENO, STDOUT_FILENO);
    alarm(arch_timeout(slot->test));
    arch_result = slot->result;
    slot->test->run(param);
    arch_leave();
}

static inline void arch_start(const struct arch_test *t, size_t row, void *param) {
    struct arch_slot *slot = arch.slots;
    while (arch.running == arch.jobs) // a child that was inherited over exec leaves none free
        arch_reap();
    while (slot->child != 0)
        slot++;
    slot->test = t;
    slot->row = row;
    memset(slot->result, 0, sizeof *slot->result);
    fflush(NULL);
    slot->child = fork();
    if (slot->child == 0)
        arch_child(slot, param);
    if (slot->child < 0) {
        perror("fork");
        exit(1);
    }
    arch.running++;
}

static inline void arch_run(const struct arch_test *t) {
    if (t->params == NULL) {
        arch_start(t, 0, NULL);
        return;
    }
    struct criterion_test_params p = t->params();
    for (size_t row = 0; row < p.length; row++)
        arch_start(t, row, (char *)p.params + row * p.size);
}

static inline bool arch_prepare(unsigned jobs) {
    arch.jobs = jobs;
    arch.slots = (struct arch_slot *)calloc(jobs, sizeof *arch.slots);
    void *results = mmap(NULL, jobs * sizeof *arch_result, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (arch.slots == NULL || results == MAP_FAILED)
        return false;
    for (unsigned i = 0; i < jobs; i++)
        arch.slots[i].result = (struct arch_result *)results + i;
    return true;
}

#ifdef ARCH_HIDES_PAGEMAP
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

#endif

// A pattern: what is kept out, or else chosen.
struct arch_filter {
    const char *pattern;
    bool out, used;
};

static inline bool arch_chosen(const struct arch_test *t, struct arch_filter *filters, unsigned count) {
    char name[256];
    bool chosen = count == 0 || filters[0].out;
    snprintf(name, sizeof name, "%s/%s", t->suite, t->name);
    for (struct arch_filter *f = filters; f < filters + count; f++)
        if (fnmatch(f->pattern, name, ARCH_MATCH) == 0) {
            f->used = true;
            chosen = !f->out;
        }
    return chosen;
}

int main(int argc, char **argv) {
    if (argc == 2 && strcmp(argv[1], "--page-size") == 0) {
        printf("%ld\n", sysconf(_SC_PAGESIZE));
        return 0;
    }
    unsigned count = 0, jobs = 1;
    struct arch_filter *filters = (struct arch_filter *)calloc((size_t)argc, sizeof *filters);
    for (int i = 1; i < argc; i += 2) {
        const char *value = i + 1 < argc ? argv[i + 1] : "";
        if (strcmp(argv[i], "--filter") == 0 && *value != '\0' && filters != NULL) {
            filters[count++] = (struct arch_filter){value + (*value == '!'), *value == '!', false};
        } else if (strcmp(argv[i], "--jobs") != 0 || (jobs = (unsigned)atoi(value)) - 1 >= 64) {
            fprintf(stderr, "%s: %s %s: --filter SUITE/TEST or --jobs 1..64 is known\n", argv[0], argv[i], value);
            return 2;
        }
    }
    if (!arch_prepare(jobs))
        return 1;
    for (const struct arch_test *t = arch_tests; t != NULL; t = t->next)
        if (arch_chosen(t, filters, count))
            arch_run(t);
    while (arch.running > 0)
        arch_reap();
    for (struct arch_filter *f = filters; f < filters + count; f++)
        if (!f->used) {
            printf("not ok %u - --filter %s%s fits no test\n", ++arch.number, f->out ? "!" : "", f->pattern);
            arch.failed++;
        }
    printf("1..%u\n", arch.number);
    free(filters);
    return arch.failed != 0 || arch.number == 0;
}

#endif
