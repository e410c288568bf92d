/* Many sessions in one process, each fabric with a thread of its own: nothing is shared between them. Built with
   ThreadSanitizer too, which Criterion cannot be: this is a plain program, its exit status counts. */
#define _GNU_SOURCE
#include <pthread.h>
#include <semaphore.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#define RMIG_IMPLEMENTATION
#include "../rmig.h"
#include "../rmig_fabric_ofi.h"

#define PAIRS 4
#define PAGE 4096u
#define TIMEOUT (30 * (uint64_t)1000000000)

struct end {
    pthread_t thread;
    uint8_t *ram;
    struct rmig_error err;
    struct pair *pair;
    bool done;
};

struct pair {
    struct end source, sink;
    char address[128];
    sem_t listening;
    uint64_t length;
    unsigned seed;
};

static int receive(struct rmig_sink *sink, struct end *end) {
    struct rmig_block_desc desc = {.name = "ram", .host = end->ram, .length = end->pair->length};
    struct rmig_sink_event ev = {.type = RMIG_SINK_NONE};
    uint32_t block;
    uint8_t rest[64];
    int rc = rmig_sink_add_block(sink, &desc, &block);
    if (rc == RMIG_OK)
        rc = rmig_sink_listen(sink, "127.0.0.1:0");
    if (rc == RMIG_OK)
        rc = rmig_sink_address(sink, end->pair->address, sizeof end->pair->address);
    sem_post(&end->pair->listening);
    while (rc == RMIG_OK && ev.type != RMIG_SINK_FINISHED) {
        rc = rmig_sink_wait(sink, &ev, TIMEOUT);
        if (rc == RMIG_OK && ev.type == RMIG_SINK_NONE)
            return rmig_fail(&end->err, RMIG_ERR_TIMEOUT, 0, "no event within 30 s");
        if (rc == RMIG_OK && ev.type == RMIG_SINK_BLOCKS)
            rc = rmig_sink_accept_blocks(sink);
        if (rc == RMIG_OK && ev.type == RMIG_SINK_TAKE)
            rc = rmig_sink_take(sink);
        while (rc == RMIG_OK && ev.type == RMIG_SINK_STREAM && rmig_sink_get(sink, rest, sizeof rest) > 0) {
        }
    }
    if (rc < 0)
        end->err = *rmig_sink_error(sink);
    return rc;
}

static void *run_sink(void *arg) {
    struct end *end = arg;
    struct rmig_sink *sink = NULL;
    struct rmig_fabric *fabric = rmig_ofi_open(NULL, &end->err);
    if (fabric == NULL || rmig_sink_open(fabric, NULL, &sink, &end->err) < 0)
        sem_post(&end->pair->listening);
    else
        end->done = receive(sink, end) == RMIG_OK;
    rmig_sink_close(sink);
    rmig_fabric_close(fabric);
    return NULL;
}

/* Three rounds; the pages that change in between are different for each pair. */
static int migrate(struct rmig_source *src, struct end *end) {
    struct rmig_block_desc desc = {.name = "ram", .host = end->ram, .length = end->pair->length};
    uint64_t pages = end->pair->length / PAGE;
    uint32_t block;
    int rc = rmig_source_add_block(src, &desc, &block);
    if (rc == RMIG_OK)
        rc = rmig_source_connect(src, end->pair->address);
    for (unsigned round = 0; rc == RMIG_OK && round < 3; round++) {
        rc = rmig_source_begin_round(src);
        if (rc == RMIG_OK && round == 0)
            rc = rmig_source_save_range(src, block, 0, end->pair->length);
        for (uint64_t page = round; rc == RMIG_OK && round > 0 && page < pages; page += 3 + end->pair->seed) {
            end->ram[page * PAGE + round] ^= 0xff;
            rc = rmig_source_save_page(src, block, page * PAGE);
        }
        if (rc == RMIG_OK)
            rc = rmig_source_end_round(src);
    }
    if (rc == RMIG_OK)
        rc = rmig_source_put(src, "state", 5);
    if (rc == RMIG_OK)
        rc = rmig_source_finish(src);
    if (rc < 0)
        end->err = *rmig_source_error(src);
    return rc;
}

static void *run_source(void *arg) {
    struct end *end = arg;
    struct rmig_config cfg = {0};
    struct rmig_source *src = NULL;
    struct rmig_fabric *fabric = rmig_ofi_open(NULL, &end->err);
    sem_wait(&end->pair->listening);
    if (fabric != NULL && rmig_set_chunk_size(&cfg, RMIG_MIB << (end->pair->seed % 3), &end->err) == RMIG_OK &&
        rmig_source_open(fabric, &cfg, &src, &end->err) == RMIG_OK)
        end->done = migrate(src, end) == RMIG_OK;
    rmig_source_close(src);
    rmig_fabric_close(fabric);
    return NULL;
}

static uint8_t *new_ram(uint64_t length) {
    void *p = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p != MAP_FAILED)
        return p;
    perror("mmap");
    exit(1);
}

static void start(struct pair *pair, unsigned seed) {
    pair->seed = seed;
    pair->length = (4 + seed) * RMIG_MIB + seed * PAGE;
    pair->source.pair = pair->sink.pair = pair;
    pair->source.ram = new_ram(pair->length);
    pair->sink.ram = new_ram(pair->length);
    for (uint64_t i = 0; i < pair->length; i += 1 + seed)
        pair->source.ram[i] = (uint8_t)(i * 31 + seed);
    if (sem_init(&pair->listening, 0, 0) != 0 || pthread_create(&pair->sink.thread, NULL, run_sink, &pair->sink) != 0 ||
        pthread_create(&pair->source.thread, NULL, run_source, &pair->source) != 0) {
        perror("a thread cannot be started");
        exit(1);
    }
}

static bool check(const struct pair *pair) {
    if (!pair->source.done)
        printf("pair %u: the source failed: %s\n", pair->seed, pair->source.err.text);
    if (!pair->sink.done)
        printf("pair %u: the sink failed: %s\n", pair->seed, pair->sink.err.text);
    if (!pair->source.done || !pair->sink.done)
        return false;
    if (memcmp(pair->source.ram, pair->sink.ram, pair->length) == 0)
        return true;
    printf("pair %u: the memory differs\n", pair->seed);
    return false;
}

int main(void) {
    static struct pair pairs[PAIRS];
    bool all = true;
    for (unsigned i = 0; i < PAIRS; i++)
        start(&pairs[i], i);
    for (unsigned i = 0; i < PAIRS; i++) {
        pthread_join(pairs[i].source.thread, NULL);
        pthread_join(pairs[i].sink.thread, NULL);
        all = check(&pairs[i]) && all;
        munmap(pairs[i].source.ram, pairs[i].length);
        munmap(pairs[i].sink.ram, pairs[i].length);
    }
    return all ? 0 : 1;
}
