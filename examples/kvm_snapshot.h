/*
kvm_snapshot.h - a guest of kvm_guest.h in a snapshot file of QEMU's mapped-ram format

    Written:    snapshot_create, snapshot_round again and again while the guest runs, at last with it stopped;
                snapshot_finish with its state. The file gets its name only then; snapshot_close forgets it before.
    Read:       snapshot_open checks all but the pages, and hands out the guest's state; snapshot_load fills the RAM,
                or snapshot_load_start and snapshot_load_wait do while the guest runs in it.

    The machine is called kvm-live and has one block, kvm-live.ram. The device state is struct guest_state and, as its
    end, a description in JSON that says for people what the state says.
*/
#ifndef KVM_SNAPSHOT_H
#define KVM_SNAPSHOT_H

#include "kvm_guest.h"
#include "whole_file.h"
#include "../rmig_mapped_ram.h"

#define SNAPSHOT_MACHINE "kvm-live"
#define SNAPSHOT_BLOCK "kvm-live.ram"

struct snapshot {
    const char *path; // the caller's, and must stay
    int fd; // being read; -1: none
    struct whole_file out; // being written
    struct rmig_mapped_writer *writer;
    struct rmig_mapped_reader *reader;
    uint32_t block;
    bool no_sync;
    uint64_t bytes, allocated; // length of the file, and what it takes on the disk
    uint64_t bytes_set; // of RAM, that are in the file
};

#define SNAPSHOT_NONE                                                                                                  \
    {                                                                                                                  \
        .fd = -1, .out = {.fd = -1 }                                                                                   \
    }

/* What concerns the content of a file does not name the file yet. */
static int snapshot_fail(const struct snapshot *s, const struct rmig_error *why, struct rmig_error *err) {
    return rmig_fail(err, why->status, why->provider_code, "%s: %s", s->path, why->text);
}

static int snapshot_measure(struct snapshot *s, int fd, struct rmig_error *err) {
    struct stat st;
    if (fstat(fd, &st) != 0)
        return rmig_fail(err, RMIG_ERR_FILE, errno, "%s: %s", s->path, strerror(errno));
    s->bytes = (uint64_t)(S_ISBLK(st.st_mode) ? lseek(fd, 0, SEEK_END) : st.st_size);
    s->allocated = (uint64_t)st.st_blocks * 512;
    return RMIG_OK;
}

static struct rmig_block_desc snapshot_block(uint8_t *host, uint64_t length, int fd) {
    return (struct rmig_block_desc){
        .name = SNAPSHOT_BLOCK, .host = host, .length = length, .backing = RMIG_BACKING_SHARED_FD, .fd = fd};
}

/* The end of the device state: how many bytes. */
static int snapshot_encode_end(const struct guest_state *state, uint8_t *out, size_t cap) {
    const struct guest_layout *l = &state->layout;
    char text[512];
    int n = snprintf(text, sizeof text,
                     "{\"program\": \"" SNAPSHOT_MACHINE "\", \"version\": %u, \"state_bytes\": %u, \"guest\": \"%s\", "
                     "\"steps\": %llu, \"layout\": {\"ram\": %llu, \"work_pages\": %llu, \"fill_pages\": %llu, "
                     "\"seed\": %llu, \"batch\": %llu, \"steps_per_second\": %llu}}",
                     state->version, state->size, guest_kind_name((enum guest_kind)state->kind),
                     (unsigned long long)state->steps, (unsigned long long)l->ram, (unsigned long long)l->work_pages,
                     (unsigned long long)l->fill_pages, (unsigned long long)l->seed, (unsigned long long)l->batch,
                     (unsigned long long)l->steps_per_second);
    return rmig_qemu_encode_end(out, cap, text, (size_t)n);
}

// >>snapshot: writing

/* Begins PATH.part, or in place what is at PATH. host, fd: the guest's RAM, which must stay until close. *s is
   SNAPSHOT_NONE; close it in any case. */
static int snapshot_create(struct snapshot *s, const char *path, bool in_place, const struct rmig_mapped_options *opt,
                           uint8_t *host, uint64_t length, int fd, struct rmig_error *err) {
    struct rmig_block_desc ram = snapshot_block(host, length, fd);
    struct rmig_mapped_machine machine = {.configuration = {.machine = SNAPSHOT_MACHINE}};
    struct rmig_error why = {0};
    s->path = path;
    s->no_sync = opt->no_sync;
    int rc = whole_file_open(&s->out, path, WHOLE_FILE_MAY_BE_IN_PLACE | (in_place ? WHOLE_FILE_IN_PLACE : 0), err);
    if (rc != RMIG_OK)
        return rc;
    rc = rmig_mapped_writer_open(s->out.fd, opt, &s->writer, &why);
    if (rc != RMIG_OK)
        return snapshot_fail(s, &why, err);
    rc = rmig_mapped_writer_add_block(s->writer, &ram, &s->block);
    if (rc == RMIG_OK)
        rc = rmig_mapped_writer_start(s->writer, &machine);
    return rc == RMIG_OK ? RMIG_OK : snapshot_fail(s, rmig_mapped_writer_error(s->writer), err);
}

/* Everything (dirty NULL), or the pages that a dirty log says. */
static int snapshot_round(struct snapshot *s, const uint64_t *dirty, uint64_t length, struct rmig_error *err) {
    int rc = rmig_mapped_writer_begin_round(s->writer);
    if (rc == RMIG_OK)
        rc = dirty == NULL ? rmig_mapped_writer_save_range(s->writer, s->block, 0, length)
                           : rmig_mapped_writer_save_bitmap(s->writer, s->block, dirty, 0, length / GUEST_PAGE);
    if (rc == RMIG_OK)
        rc = rmig_mapped_writer_end_round(s->writer);
    return rc == RMIG_OK ? RMIG_OK : snapshot_fail(s, rmig_mapped_writer_error(s->writer), err);
}

/* Makes the file whole and gives it its name. The RAM is not looked at any more: the guest may run on. */
static int snapshot_finish(struct snapshot *s, const struct guest_state *state, struct rmig_error *err) {
    uint8_t end[1024];
    int n = snapshot_encode_end(state, end, sizeof end);
    if (n < 0)
        return rmig_fail(err, n, 0, "%s: the description of the device state cannot be encoded", s->path);
    int rc = rmig_mapped_writer_put(s->writer, state, sizeof *state);
    if (rc == RMIG_OK)
        rc = rmig_mapped_writer_put(s->writer, end, (size_t)n);
    if (rc == RMIG_OK)
        rc = rmig_mapped_writer_finish(s->writer);
    if (rc != RMIG_OK)
        return snapshot_fail(s, rmig_mapped_writer_error(s->writer), err);
    rc = snapshot_measure(s, s->out.fd, err);
    return rc == RMIG_OK ? whole_file_commit(&s->out, !s->no_sync, err) : rc;
}

// >>snapshot: reading

/* A name of a file's for a terminal. */
static const char *snapshot_printable(const char *name, char *out, size_t n) {
    size_t i = 0;
    for (; i < n - 1 && name[i] != '\0'; i++)
        out[i] = name[i] >= ' ' && name[i] <= '~' ? name[i] : '?';
    out[i] = '\0';
    return out;
}

static int snapshot_check_machine(const struct snapshot *s, const struct rmig_mapped_block **block,
                                  struct rmig_error *err) {
    const struct rmig_mapped_machine *m = rmig_mapped_reader_machine(s->reader);
    uint32_t n = rmig_mapped_reader_blocks(s->reader, block);
    char name[64];
    if (strcmp(m->configuration.machine, SNAPSHOT_MACHINE) != 0)
        return rmig_fail(err, RMIG_ERR_WIRE, 0, "%s: a snapshot of a machine \"%s\"; must be one of \"%s\"", s->path,
                         snapshot_printable(m->configuration.machine, name, sizeof name), SNAPSHOT_MACHINE);
    if (n != 1 || strcmp((*block)->name, SNAPSHOT_BLOCK) != 0)
        return rmig_fail(err, RMIG_ERR_WIRE, 0, "%s: %u blocks, the first is \"%s\"; must be one, \"%s\"", s->path, n,
                         snapshot_printable(n > 0 ? (*block)->name : "", name, sizeof name), SNAPSHOT_BLOCK);
    return RMIG_OK;
}

/* Bytes got, which are fewer than n only at the end, or an error. */
static int64_t snapshot_get(struct snapshot *s, void *out, size_t n) {
    size_t at = 0;
    int64_t got = 0;
    while (at < n && (got = rmig_mapped_reader_get(s->reader, (uint8_t *)out + at, n - at)) > 0)
        at += (size_t)got;
    return got < 0 ? got : (int64_t)at;
}

static int snapshot_get_state(struct snapshot *s, struct guest_state *state, uint64_t ram, struct rmig_error *err) {
    uint8_t is[1024], must[sizeof is];
    struct rmig_error why = {0};
    memset(state, 0, sizeof *state);
    int64_t got = snapshot_get(s, state, sizeof *state);
    int64_t rest = got < 0 ? got : snapshot_get(s, is, sizeof is);
    if (rest < 0)
        return snapshot_fail(s, rmig_mapped_reader_error(s->reader), err);
    if (state_check(state, ram, &why) != RMIG_OK)
        return snapshot_fail(s, &why, err);
    int n = snapshot_encode_end(state, must, sizeof must);
    if (got < (int64_t)sizeof *state || n < 0 || rest != n || memcmp(is, must, (size_t)n) != 0)
        return rmig_fail(err, RMIG_ERR_WIRE, 0,
                         "%s: %llu bytes of device state, which do not end as this program ends %zu bytes of state",
                         s->path, (unsigned long long)rmig_mapped_reader_state_size(s->reader), sizeof *state);
    return RMIG_OK;
}

/* Opens and checks a snapshot, and reads the guest's state: its layout says how much RAM there must be. *s is
   SNAPSHOT_NONE; close it in any case. */
static int snapshot_open(struct snapshot *s, const char *path, const struct rmig_mapped_options *opt,
                         struct guest_state *state, struct rmig_error *err) {
    const struct rmig_mapped_block *block;
    struct rmig_error why = {0};
    s->path = path;
    s->fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); // a pipe is refused, not waited for
    if (s->fd < 0)
        return rmig_fail(err, RMIG_ERR_FILE, errno, "cannot read %s: %s", path, strerror(errno));
    if (whole_file_lock_to_read(s->fd, path, err) < 0)
        return RMIG_ERR_FILE;
    if (rmig_mapped_reader_open(s->fd, opt, &s->reader, &why) != RMIG_OK)
        return snapshot_fail(s, &why, err);
    int rc = snapshot_check_machine(s, &block, err);
    if (rc == RMIG_OK)
        rc = snapshot_get_state(s, state, block->length, err);
    if (rc != RMIG_OK)
        return rc;
    s->bytes_set = block->pages_set * block->page_size;
    return snapshot_measure(s, s->fd, err);
}

static int snapshot_add(struct snapshot *s, uint8_t *host, uint64_t length, int fd) {
    struct rmig_block_desc ram = snapshot_block(host, length, fd);
    return rmig_mapped_reader_add_block(s->reader, &ram);
}

static int snapshot_load(struct snapshot *s, uint8_t *host, uint64_t length, int fd, struct rmig_error *err) {
    int rc = snapshot_add(s, host, length, fd);
    if (rc == RMIG_OK)
        rc = rmig_mapped_reader_load(s->reader);
    return rc == RMIG_OK ? RMIG_OK : snapshot_fail(s, rmig_mapped_reader_error(s->reader), err);
}

/* From here on the RAM may be used, by this mapping alone: a read by another one ends the loading. */
static int snapshot_load_start(struct snapshot *s, uint8_t *host, uint64_t length, int fd, struct rmig_error *err) {
    int rc = snapshot_add(s, host, length, fd);
    if (rc == RMIG_OK)
        rc = rmig_mapped_reader_load_start(s->reader);
    return rc == RMIG_OK ? RMIG_OK : snapshot_fail(s, rmig_mapped_reader_error(s->reader), err);
}

/* RMIG_PENDING after timeout_ns. After an error nobody can access the RAM any more. */
static int snapshot_load_wait(struct snapshot *s, uint64_t timeout_ns, struct rmig_error *err) {
    int rc = rmig_mapped_reader_load_wait(s->reader, timeout_ns);
    return rc >= RMIG_OK ? rc : snapshot_fail(s, rmig_mapped_reader_error(s->reader), err);
}

/* What was not finished is removed. */
static void snapshot_close(struct snapshot *s) {
    rmig_mapped_writer_close(s->writer);
    rmig_mapped_reader_close(s->reader);
    whole_file_remove(&s->out);
    whole_file_free(&s->out);
    if (s->fd >= 0)
        close(s->fd);
    s->writer = NULL;
    s->reader = NULL;
    s->fd = -1;
}

#endif // KVM_SNAPSHOT_H
