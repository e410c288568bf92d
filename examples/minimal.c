/* The shortest honest use of rmig: a child process takes over its parent's memory, over libfabric on the loopback
   device: everything, then what was written meanwhile, then some bytes of device state. The child compares a hash over
   all memory with the one in the state. */
#define _GNU_SOURCE
#include <stdio.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>
#define RMIG_IMPLEMENTATION
#include "../rmig.h"
#include "../rmig_fabric_ofi.h"

enum { RAM_SIZE = 64 << 20, PAGE = 4096, WORDS = RAM_SIZE / 8, PAGES = RAM_SIZE / PAGE };

struct device_state {
    uint64_t ticks, ram_hash;
};

static uint64_t hash(const uint64_t *ram) {
    uint64_t h = 0xcbf29ce484222325u;
    for (size_t i = 0; i < WORDS; i++)
        h = (h ^ ram[i]) * 0x100000001b3u;
    return h;
}

static int receive(struct rmig_sink *sink, uint64_t *ram, int address_fd) {
    struct rmig_block_desc desc = {.name = "ram", .host = ram, .length = RAM_SIZE};
    struct rmig_sink_event ev = {.type = RMIG_SINK_NONE};
    struct device_state state = {0};
    char address[64] = "";
    size_t got = 0, n;
    if (rmig_sink_add_block(sink, &desc, NULL) < 0 || rmig_sink_listen(sink, "127.0.0.1:0") < 0 ||
        rmig_sink_address(sink, address, sizeof address) < 0 || write(address_fd, address, sizeof address) < 0)
        return -1;
    while (ev.type != RMIG_SINK_FINISHED) {
        if (rmig_sink_wait(sink, &ev, 30 * (uint64_t)1000000000) < 0 || ev.type == RMIG_SINK_NONE) // none: 30 s passed
            return -1;
        if (ev.type == RMIG_SINK_BLOCKS && rmig_sink_accept_blocks(sink) < 0)
            return -1;
        while (ev.type == RMIG_SINK_STREAM && (n = rmig_sink_get(sink, (char *)&state + got, sizeof state - got)) > 0)
            got += n;
        if (ev.type == RMIG_SINK_TAKE && // what is refused here stays the parent's
            (got < sizeof state ? rmig_sink_refuse(sink, "the state is cut off") : rmig_sink_take(sink)) < 0)
            return -1;
    }
    bool same = state.ram_hash == hash(ram); // not before it is finished: until then memory can be written
    printf("arrived at tick %llu, memory %s\n", (unsigned long long)state.ticks, same ? "verified" : "DIFFERS");
    return same && fflush(stdout) == 0 ? 0 : 1;
}

static int migrate(struct rmig_source *src, uint64_t *ram, const char *address) {
    struct rmig_block_desc desc = {.name = "ram", .host = ram, .length = RAM_SIZE};
    static uint64_t dirty_log[PAGES / 64];
    uint32_t block = 0;
    if (rmig_source_add_block(src, &desc, &block) < 0 || rmig_source_connect(src, address) < 0 ||
        rmig_source_begin_round(src) < 0 || rmig_source_save_range(src, block, 0, RAM_SIZE) < 0)
        return -1;
    for (size_t page = 0; page < PAGES; page += 3) { // the guest runs on, and its writes are logged
        ram[page * PAGE / 8]++;
        dirty_log[page / 64] |= (uint64_t)1 << (page % 64);
    }
    if (rmig_source_end_round(src) < 0 || rmig_source_begin_round(src) < 0 ||
        rmig_source_save_bitmap(src, block, dirty_log, 0, PAGES) < 0 || rmig_source_end_round(src) < 0)
        return -1;
    struct device_state state = {.ticks = 42, .ram_hash = hash(ram)};
    return rmig_source_put(src, &state, sizeof state) < 0 ? -1 : rmig_source_finish(src);
}

static int run(bool is_sink, int fd, const char *address) {
    struct rmig_error err = {.status = RMIG_ERR_NO_MEMORY, .text = "no memory"};
    struct rmig_source *src = NULL;
    struct rmig_sink *sink = NULL;
    uint64_t *ram = mmap(NULL, RAM_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    struct rmig_fabric *fabric = ram == MAP_FAILED ? NULL : rmig_ofi_open(NULL, &err);
    for (size_t i = 0; fabric != NULL && !is_sink && i < WORDS / 2; i++)
        ram[i] = i * 0x9e3779b97f4a7c15u; // the upper half stays zero: rmig does not send it
    int rc = -1;
    if (fabric != NULL)
        rc = is_sink ? rmig_sink_open(fabric, NULL, &sink, &err) : rmig_source_open(fabric, NULL, &src, &err);
    if (rc == 0 && (rc = is_sink ? receive(sink, ram, fd) : migrate(src, ram, address)) < 0)
        err = is_sink ? *rmig_sink_error(sink) : *rmig_source_error(src);
    if (rc < 0)
        fprintf(stderr, "%s: %s\n", is_sink ? "sink" : "source", err.status == 0 ? "no source came" : err.text);
    rmig_sink_close(sink);
    rmig_source_close(src);
    rmig_fabric_close(fabric);
    return rc == 0 ? 0 : 1;
}

int main(void) {
    int fd[2], child_status = 1;
    char address[64];
    pid_t child = pipe(fd) < 0 ? -1 : fork();
    if (child <= 0)
        return child < 0 ? 1 : run(true, fd[1], NULL);
    close(fd[1]);
    int rc = read(fd[0], address, sizeof address) == sizeof address ? run(false, -1, address) : 1;
    return waitpid(child, &child_status, 0) < 0 || rc != 0 || child_status != 0;
}
