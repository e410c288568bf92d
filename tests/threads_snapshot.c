/* The threads of a snapshot file's writer and reader, and those that touch memory while it is loaded lazily. Built with
   ThreadSanitizer too, which Criterion cannot be: this is a plain program, its exit status counts. */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#define RMIG_IMPLEMENTATION
#include "../rmig.h"
#include "../rmig_mapped_ram.h"

#define RANDOM_SEED 0x243f6a8885a308d3u
#include "random.h"

enum { TOUCHERS = 3, TOUCHES = 300, ROUNDS = 3 };
#define LENGTH (24 * RMIG_MIB) // worth several threads
#define TIMEOUT (120 * (uint64_t)1000000000)

static void die(const char *what, const struct rmig_error *err) {
    fprintf(stderr, "threads_snapshot: %s: %s\n", what, err == NULL ? "wrong" : err->text);
    exit(1);
}

static uint8_t *new_memory(void) {
    void *p = mmap(NULL, LENGTH, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED)
        die("mmap", NULL);
    return (uint8_t *)p;
}

static void change(uint8_t *ram) {
    for (unsigned i = 0; i < 3000; i++)
        ram[below(LENGTH)] = (uint8_t)rng();
    memset(ram + below(LENGTH / 2), 0, LENGTH / 8);
}

static void save(int fd, const struct rmig_mapped_options *opt, uint8_t *ram) {
    struct rmig_mapped_machine machine = {.configuration.machine = "test-1.0"};
    struct rmig_block_desc desc = {.name = "ram", .host = ram, .length = LENGTH, .backing = RMIG_BACKING_ANONYMOUS};
    struct rmig_mapped_writer *w;
    struct rmig_error err;
    uint8_t state[64];
    int n = rmig_qemu_encode_end(state, sizeof state, "{}", 2);
    if (rmig_mapped_writer_open(fd, opt, &w, &err) < 0)
        die("open", &err);
    bool ok =
        rmig_mapped_writer_add_block(w, &desc, NULL) == RMIG_OK && rmig_mapped_writer_start(w, &machine) == RMIG_OK;
    for (unsigned i = 0; i < ROUNDS && ok; i++) {
        change(ram);
        ok = rmig_mapped_writer_begin_round(w) == RMIG_OK &&
             rmig_mapped_writer_save_range(w, 0, 0, LENGTH) == RMIG_OK && rmig_mapped_writer_end_round(w) == RMIG_OK;
    }
    if (!ok || rmig_mapped_writer_put(w, state, (size_t)n) < 0 || rmig_mapped_writer_finish(w) < 0)
        die("save", rmig_mapped_writer_error(w));
    rmig_mapped_writer_close(w);
}

struct toucher {
    pthread_t thread;
    const uint8_t *is, *wanted;
    uint64_t seed, wrong;
};

static void *touch(void *user) {
    struct toucher *t = (struct toucher *)user;
    for (int i = 0; i < TOUCHES; i++) {
        t->seed = t->seed * 6364136223846793005u + 1442695040888963407u;
        uint64_t at = (t->seed >> 20) % LENGTH;
        t->wrong += t->is[at] != t->wanted[at];
    }
    return NULL;
}

/* False: there is no userfaultfd here. */
static bool load_lazily(struct rmig_mapped_reader *r, const uint8_t *copy, const uint8_t *ram) {
    struct toucher toucher[TOUCHERS];
    struct rmig_stats st;
    int status = rmig_mapped_reader_load_start(r);
    if (status == RMIG_ERR_SETUP)
        return false;
    if (status != RMIG_OK)
        die("load_start", rmig_mapped_reader_error(r));
    for (unsigned i = 0; i < TOUCHERS; i++) {
        toucher[i] = (struct toucher){.is = copy, .wanted = ram, .seed = rng()};
        if (pthread_create(&toucher[i].thread, NULL, touch, &toucher[i]) != 0)
            die("pthread_create", NULL);
    }
    rmig_mapped_reader_stats(r, &st);
    for (unsigned i = 0; i < TOUCHERS; i++)
        if (pthread_join(toucher[i].thread, NULL) != 0 || toucher[i].wrong != 0)
            die("memory that was touched", NULL);
    if (rmig_mapped_reader_load_wait(r, TIMEOUT) != RMIG_OK)
        die("load_wait", rmig_mapped_reader_error(r));
    return true;
}

static void load(int fd, const struct rmig_mapped_options *opt, const uint8_t *ram, bool lazy) {
    uint8_t *copy = new_memory();
    struct rmig_block_desc desc = {.name = "ram", .host = copy, .length = LENGTH, .backing = RMIG_BACKING_ANONYMOUS};
    struct rmig_mapped_reader *r;
    struct rmig_error err;
    if (rmig_mapped_reader_open(fd, opt, &r, &err) < 0)
        die("open", &err);
    if (rmig_mapped_reader_add_block(r, &desc) < 0)
        die("add_block", rmig_mapped_reader_error(r));
    if (lazy ? !load_lazily(r, copy, ram) : rmig_mapped_reader_load(r) != RMIG_OK) {
        if (!lazy)
            die("load", rmig_mapped_reader_error(r));
        rmig_mapped_reader_close(r); // no userfaultfd here, which ended it
        munmap(copy, LENGTH);
        load(fd, opt, ram, false);
        return;
    }
    if (memcmp(copy, ram, LENGTH) != 0)
        die("memory", NULL);
    rmig_mapped_reader_close(r);
    munmap(copy, LENGTH);
}

int main(void) {
    char path[] = "/tmp/threads_snapshot.XXXXXX";
    uint8_t *ram = new_memory();
    int fd = mkostemp(path, O_CLOEXEC);
    if (fd < 0 || unlink(path) != 0)
        die(path, NULL);
    for (unsigned i = 0; i < 8; i++) {
        struct rmig_mapped_options opt = {
            .threads = 4, .direct = (i & 1) != 0, .no_uring = (i & 2) != 0, .no_sync = true};
        save(fd, &opt, ram);
        load(fd, &opt, ram, (i & 4) != 0);
    }
    close(fd);
    return 0;
}
