/* Bulk throughput of rmig over libfabric on loopback: one process sends `bytes` of random RAM to another.

   ofi [--bytes SIZE] [--file PATH] [--provider NAME] [--touched] [--set NAME=VALUE]...

   Prints one line of JSON: bytes, round_ns (begin of the round to its end: delivered and announced), total_ns (connect
   to handover). --file takes the RAM from a file (on /dev/shm, say) and its size. --touched populates the sink's memory
   before; by default it is fresh, as at a real destination. */
#define _GNU_SOURCE
#define RMIG_IMPLEMENTATION
#include "../rmig_fabric_ofi.h"

#include <argp.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>

struct options {
    uint64_t bytes;
    const char *file;
    bool touched;
    struct rmig_ofi_options ofi;
    struct rmig_config cfg;
};

static void die(const char *what, const char *why) {
    fprintf(stderr, "ofi: %s: %s\n", what, why);
    exit(1);
}

static uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* Populated, as a guest that has run left it. */
static struct rmig_block_desc map_ram(int fd, uint64_t bytes) {
    struct rmig_block_desc ram = {.name = "ram", .length = bytes, .backing = RMIG_BACKING_SHARED_FD, .fd = fd};
    ram.host = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, 0);
    if (ram.host == MAP_FAILED)
        die("mmap", strerror(errno));
    return ram;
}

/* Private anonymous memory, as the raw loop's, or a shared memory file, as QEMU's in the comparison. */
static struct rmig_block_desc make_ram(uint64_t bytes, bool shared) {
    struct rmig_block_desc ram = {.name = "ram", .length = bytes, .backing = RMIG_BACKING_ANONYMOUS, .fd = -1};
    if (shared) {
        ram.backing = RMIG_BACKING_SHARED_FD;
        ram.fd = memfd_create("ram", MFD_CLOEXEC);
        if (ram.fd < 0 || ftruncate(ram.fd, (off_t)bytes) != 0)
            die("memfd", strerror(errno));
    }
    ram.host = mmap(NULL, bytes, PROT_READ | PROT_WRITE, shared ? MAP_SHARED : MAP_PRIVATE | MAP_ANONYMOUS, ram.fd, 0);
    if (ram.host == MAP_FAILED)
        die("mmap", strerror(errno));
    return ram;
}

static struct rmig_block_desc file_ram(const char *path, uint64_t *bytes) {
    struct stat st;
    int fd = open(path, O_RDWR | O_CLOEXEC);
    if (fd < 0 || fstat(fd, &st) != 0)
        die(path, strerror(errno));
    if (st.st_size == 0 || st.st_size % 4096 != 0)
        die(path, "its size must be a multiple of 4096 above 0");
    *bytes = (uint64_t)st.st_size;
    return map_ram(fd, *bytes);
}

static void fill_random(void *p, uint64_t bytes) {
    uint64_t *word = p, x = 88172645463325252u;
    for (uint64_t i = 0; i < bytes / 8; i++) {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        word[i] = x;
    }
}

static int run_sink(const struct options *o, int address_pipe, int sum_pipe) {
    struct rmig_error err = {0};
    struct rmig_fabric *fabric = rmig_ofi_open(&o->ofi, &err);
    struct rmig_sink *sink;
    char address[128];
    if (fabric == NULL || rmig_sink_open(fabric, &o->cfg, &sink, &err) != RMIG_OK)
        die("sink", err.text);
    struct rmig_block_desc ram = make_ram(o->bytes, o->file != NULL);
    if (o->touched)
        memset(ram.host, 0x5a, o->bytes);
    if (rmig_sink_listen(sink, "127.0.0.1:0") != RMIG_OK || rmig_sink_add_block(sink, &ram, NULL) != RMIG_OK ||
        rmig_sink_address(sink, address, sizeof address) != RMIG_OK)
        die("sink", rmig_sink_error(sink)->text);
    if (write(address_pipe, address, sizeof address) != (ssize_t)sizeof address)
        return 1;
    struct rmig_sink_event ev;
    do {
        if (rmig_sink_wait(sink, &ev, 60 * (uint64_t)1000000000) != RMIG_OK)
            die("sink", rmig_sink_error(sink)->text);
        if (ev.type == RMIG_SINK_BLOCKS && rmig_sink_accept_blocks(sink) != RMIG_OK)
            die("sink", rmig_sink_error(sink)->text);
        if (ev.type == RMIG_SINK_TAKE && rmig_sink_take(sink) != RMIG_OK)
            die("sink", rmig_sink_error(sink)->text);
        if (ev.type == RMIG_SINK_NONE)
            die("sink", "no event within 60 s");
    } while (ev.type != RMIG_SINK_FINISHED);
    rmig_sink_close(sink);
    rmig_fabric_close(fabric);
    /* The source compares: what was measured must also have arrived. */
    uint64_t sum = 0;
    for (uint64_t i = 0; i < o->bytes / 8; i++)
        sum = sum * 31 + ((uint64_t *)ram.host)[i];
    return write(sum_pipe, &sum, sizeof sum) == (ssize_t)sizeof sum ? 0 : 1;
}

static void run_source(const struct options *o, const char *address, const struct rmig_block_desc *ram,
                       uint64_t *round_ns, uint64_t *total_ns) {
    struct rmig_error err = {0};
    struct rmig_fabric *fabric = rmig_ofi_open(&o->ofi, &err);
    struct rmig_source *s;
    uint32_t block;
    if (fabric == NULL || rmig_source_open(fabric, &o->cfg, &s, &err) != RMIG_OK)
        die("source", err.text);
    uint64_t begin = now_ns(), round = 0;
    bool ok = rmig_source_add_block(s, ram, &block) == RMIG_OK && rmig_source_connect(s, address) == RMIG_OK;
    if (ok) {
        round = now_ns();
        ok = rmig_source_begin_round(s) == RMIG_OK && rmig_source_save_range(s, block, 0, o->bytes) == RMIG_OK &&
             rmig_source_end_round(s) == RMIG_OK;
        *round_ns = now_ns() - round;
    }
    if (!ok || rmig_source_finish(s) != RMIG_OK)
        die("source", rmig_source_error(s)->text);
    *total_ns = now_ns() - begin;
    rmig_source_close(s);
    rmig_fabric_close(fabric);
}

static error_t parse(int key, char *arg, struct argp_state *state) {
    struct options *o = state->input;
    struct rmig_error err;
    char *equals;
    switch (key) {
    case 'b':
        if (rmig_size_parse(arg, &o->bytes, &err) != RMIG_OK || o->bytes == 0 || o->bytes % 4096 != 0)
            argp_error(state, "--bytes %s: must be a multiple of 4K above 0", arg);
        return 0;
    case 'f':
        o->file = arg;
        return 0;
    case 'p':
        o->ofi.provider = arg;
        return 0;
    case 't':
        o->touched = true;
        return 0;
    case 's':
        equals = strchr(arg, '=');
        if (equals == NULL)
            argp_error(state, "--set %s: must be NAME=VALUE", arg);
        *equals = '\0';
        if (rmig_set_param(&o->cfg, arg, equals + 1, &err) != RMIG_OK)
            argp_error(state, "%s", err.text);
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

int main(int argc, char **argv) {
    static const struct argp_option table[] = {{"bytes", 'b', "SIZE", 0, "RAM to move (512M)", 0},
                                               {"file", 'f', "PATH", 0, "RAM from this file", 0},
                                               {"provider", 'p', "NAME", 0, "libfabric provider (tcp)", 0},
                                               {"touched", 't', NULL, 0, "populate the sink's memory before", 0},
                                               {"set", 's', "NAME=VALUE", 0, "rmig parameter", 0},
                                               {0}};
    struct options o = {.bytes = 512 * RMIG_MIB, .ofi = {.provider = "tcp"}};
    argp_parse(
        &(struct argp){table, parse, NULL, "Bulk throughput of rmig over libfabric on loopback.", NULL, NULL, NULL},
        argc, argv, 0, NULL, &o);
    struct rmig_block_desc ram = {0};
    if (o.file != NULL)
        ram = file_ram(o.file, &o.bytes);
    int address_pipe[2], sum_pipe[2];
    if (pipe(address_pipe) != 0 || pipe(sum_pipe) != 0)
        die("pipe", strerror(errno));
    pid_t child = fork();
    if (child == 0)
        _exit(run_sink(&o, address_pipe[1], sum_pipe[1]));
    close(address_pipe[1]);
    close(sum_pipe[1]);
    if (o.file == NULL) {
        ram = make_ram(o.bytes, false);
        fill_random(ram.host, o.bytes);
    }
    char address[128];
    if (read(address_pipe[0], address, sizeof address) != (ssize_t)sizeof address)
        die("sink", "did not start");
    uint64_t round_ns = 0, total_ns = 0, sum = 0, expected = 0;
    run_source(&o, address, &ram, &round_ns, &total_ns);
    for (uint64_t i = 0; i < o.bytes / 8; i++)
        expected = expected * 31 + ((uint64_t *)ram.host)[i];
    int status = 0;
    if (read(sum_pipe[0], &sum, sizeof sum) != (ssize_t)sizeof sum || waitpid(child, &status, 0) != child ||
        status != 0)
        die("sink", "failed");
    if (sum != expected)
        die("verify", "the sink's RAM differs from the source's");
    printf("{\"bytes\": %llu, \"round_ns\": %llu, \"total_ns\": %llu}\n", (unsigned long long)o.bytes,
           (unsigned long long)round_ns, (unsigned long long)total_ns);
    return 0;
}
