/*
rmig_mapped_ram.h - snapshots of a VM in files of QEMU's mapped-ram format, written and read

    Do this
        #define RMIG_IMPLEMENTATION
        #include "rmig.h"
        #include "rmig_mapped_ram.h"
    in exactly *one* C or C++ file, and include it without the macro elsewhere. Link with -pthread. Needs Linux, and
rmig_qemu.h beside it. Under -std=c11 include rmig.h or this header first, or define a feature macro yourself.

WHAT IT IS FOR

    In such a file page k of a block lies at a fixed place, however often it was saved, and a page of zeros is a hole.
So a running guest can be saved to it in rounds, it does not grow, and it can be loaded by many threads at once, or page
by page. Stock QEMU (9.0 and later) reads what is written here (-incoming file:PATH, capability mapped-ram), and what it
writes (migrate file:PATH) is read here. The state of the devices is opaque: bytes in, the same bytes out.

WRITING

        struct rmig_error err;
        struct rmig_mapped_options opt = {0};           // all defaults
        struct rmig_mapped_machine machine = {0};
        strcpy(machine.configuration.machine, "pc-q35-10.0");
        struct rmig_mapped_writer *w;
        int fd = open("vm.part", O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
        rmig_mapped_writer_open(fd, &opt, &w, &err);
        rmig_mapped_writer_add_block(w, &ram, &block);
        rmig_mapped_writer_start(w, &machine);
        rmig_mapped_writer_begin_round(w);
        rmig_mapped_writer_save_range(w, block, 0, size);   // first everything,
        rmig_mapped_writer_end_round(w);                    // then what KVM's dirty log says, as in a migration,
                                                            // at last with the guest stopped
        rmig_mapped_writer_put(w, state, state_size);       // ends as rmig_qemu_encode_end writes it
        if (rmig_mapped_writer_finish(w) == RMIG_OK) rename("vm.part", "vm.snapshot");
        else fprintf(stderr, "%s\n", rmig_mapped_writer_error(w)->text);
        rmig_mapped_writer_close(w);

    A file that was not finished is never taken for a whole one: the magic at its beginning is written last, and
between all the rest and the magic, and behind it, the file is brought to the disk (unless no_sync).

READING

        struct rmig_mapped_reader *r;
        rmig_mapped_reader_open(fd, &opt, &r, &err);        // checks the whole file, but for the pages
        rmig_mapped_reader_add_block(r, &ram);              // by name, for each block of the file
        rmig_mapped_reader_load(r);
        while ((got = rmig_mapped_reader_get(r, state, sizeof state)) > 0)
            use(state, got);
        rmig_mapped_reader_close(r);

    Nothing in the file is trusted: lengths, offsets, overlaps, page sizes, bitmaps, counts and the end are checked, and
each has its own message. Bitmaps are in the byte order of the host that wrote them, which no file tells: this header
takes them in the byte order of the host it runs on.

THREADS

    A writer and a reader are each used by one thread at a time. end_round and load start opt.threads - 1 threads of
their own, with all signals blocked but those of their own faults (SIGBUS, SIGSEGV ...), and have joined them when they
return; the calling thread works too. load_start starts two, which end with the loading or with close. Waits are for the
file alone, and last as long as the file system takes: there is no deadline to put on a read or a write of a file.
opt.progress can end them between two pieces of at most 16 MiB, or a page of the guest where that is larger; it can end
the opening of a reader, too.

DIRECT I/O

    With opt.direct pages go past the page cache, by a second descriptor that is opened by way of /proc. File offsets
and lengths are multiples of 4096 then; what does not fit (guest pages of 1 or 2 KiB) goes through the cache. Memory
that is not aligned to 4096 goes through a buffer of 1 MiB a thread. The stream and the bitmaps are never direct.

IO_URING

    Define RMIG_MAPPED_URING and _GNU_SOURCE before everything, and link with -luring (liburing 2.0 and later): then
each thread keeps up to 16 transfers of direct I/O of at most 1 MiB under way; through the page cache it brings nothing.
Where the kernel has no io_uring, or forbids it, at run time, things go on without; opt.no_uring does without in any
case. A file that is written so has its whole length from the start.

MEMORY

    A writer needs two bits a page (1/16384 of RAM) and 128 bytes a block, a reader some 500 bytes a block and, while
it loads lazily, one bit a host page.

ERRORS

    As in rmig.h, and by the same rule: a status above RMIG_SESSION_ERRORS (-1 ... -99) says that this call was
refused and left the writer or the reader as it was; one below it (RMIG_ERR_FILE, RMIG_ERR_CANCELLED, RMIG_ERR_SETUP)
has ended it: every later call returns it again, and only close is of use. A file that cannot be read or written is
RMIG_ERR_FILE with errno in provider_code, what a file holds and must not hold is RMIG_ERR_WIRE.

    A caller that checks nothing until the end still learns there that something is missing: when add_block, a save
function or put of a writer was refused, end_round and finish return that refusal, with its text, and do nothing; when
add_block of a reader was, load and load_start do. Until rmig_mapped_writer_forgive or rmig_mapped_reader_forgive: then
they go on without what was refused. Every function takes NULL for its writer or reader.

    A limit of the file size (RLIMIT_FSIZE) kills by SIGXFSZ unless that is ignored: ignore it, and it is an error
like any other.

LICENCE

    MIT, see the end of rmig.h.
*/
#ifndef RMIG_MAPPED_RAM_H
#define RMIG_MAPPED_RAM_H

#if defined(RMIG_IMPLEMENTATION) && defined(__STRICT_ANSI__) && !defined(_DEFAULT_SOURCE) && !defined(_GNU_SOURCE) &&  \
    !defined(_POSIX_C_SOURCE)
#define _DEFAULT_SOURCE 1
#endif

#include "rmig.h"
#include "rmig_qemu.h"

#ifdef RMIG_NAMESPACE
#define rmig_mapped_writer_open RMIG__NAME(rmig_mapped_writer_open)
#define rmig_mapped_writer_close RMIG__NAME(rmig_mapped_writer_close)
#define rmig_mapped_writer_add_block RMIG__NAME(rmig_mapped_writer_add_block)
#define rmig_mapped_writer_start RMIG__NAME(rmig_mapped_writer_start)
#define rmig_mapped_writer_begin_round RMIG__NAME(rmig_mapped_writer_begin_round)
#define rmig_mapped_writer_save_page RMIG__NAME(rmig_mapped_writer_save_page)
#define rmig_mapped_writer_save_range RMIG__NAME(rmig_mapped_writer_save_range)
#define rmig_mapped_writer_save_bitmap RMIG__NAME(rmig_mapped_writer_save_bitmap)
#define rmig_mapped_writer_end_round RMIG__NAME(rmig_mapped_writer_end_round)
#define rmig_mapped_writer_put RMIG__NAME(rmig_mapped_writer_put)
#define rmig_mapped_writer_finish RMIG__NAME(rmig_mapped_writer_finish)
#define rmig_mapped_writer_forgive RMIG__NAME(rmig_mapped_writer_forgive)
#define rmig_mapped_writer_error RMIG__NAME(rmig_mapped_writer_error)
#define rmig_mapped_writer_size RMIG__NAME(rmig_mapped_writer_size)
#define rmig_mapped_writer_stats RMIG__NAME(rmig_mapped_writer_stats)
#define rmig_mapped_reader_open RMIG__NAME(rmig_mapped_reader_open)
#define rmig_mapped_reader_close RMIG__NAME(rmig_mapped_reader_close)
#define rmig_mapped_reader_machine RMIG__NAME(rmig_mapped_reader_machine)
#define rmig_mapped_reader_blocks RMIG__NAME(rmig_mapped_reader_blocks)
#define rmig_mapped_reader_whole RMIG__NAME(rmig_mapped_reader_whole)
#define rmig_mapped_reader_bitmap RMIG__NAME(rmig_mapped_reader_bitmap)
#define rmig_mapped_reader_read RMIG__NAME(rmig_mapped_reader_read)
#define rmig_mapped_reader_add_block RMIG__NAME(rmig_mapped_reader_add_block)
#define rmig_mapped_reader_forgive RMIG__NAME(rmig_mapped_reader_forgive)
#define rmig_mapped_reader_load RMIG__NAME(rmig_mapped_reader_load)
#define rmig_mapped_reader_load_start RMIG__NAME(rmig_mapped_reader_load_start)
#define rmig_mapped_reader_load_wait RMIG__NAME(rmig_mapped_reader_load_wait)
#define rmig_mapped_reader_state_size RMIG__NAME(rmig_mapped_reader_state_size)
#define rmig_mapped_reader_get RMIG__NAME(rmig_mapped_reader_get)
#define rmig_mapped_reader_error RMIG__NAME(rmig_mapped_reader_error)
#define rmig_mapped_reader_stats RMIG__NAME(rmig_mapped_reader_stats)
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define RMIG_MAPPED_THREADS_MAX 64

/* Zero-initialise it: then everything has its default. Out of range: RMIG_ERR_PARAM. */
struct rmig_mapped_options {
    uint64_t page_size; // of the guest, a power of two from 1 KiB to 1 GiB. 0: writer 4 KiB, or what page_bits of the
                        // configuration says; reader any. Else a reader refuses files of another page size
    uint64_t file_align; // writer: page regions begin at multiples of it, a power of two from a page to 1 GiB. 0: 1
                         // MiB, or a page if that is larger
    uint64_t
        offset; // where the stream begins in the file: "offset" of QEMU's file: addresses. What lies before is kept
    uint32_t threads; // 1 to RMIG_MAPPED_THREADS_MAX, the caller's included. 0: 1
    bool direct; // pages by direct I/O: see DIRECT I/O
    bool no_sync; // writer: do not wait until the file is on the disk. A crash of the host may then leave a torn file
                  // that looks whole; a crash of the program still cannot
    bool no_uring; // do without io_uring, where it is built in (RMIG_MAPPED_URING)
    bool no_zero_detect; // writer: write pages of zeros too
    bool memory_is_zero; // reader: fresh memory, so that pages of zeros need no look
    bool incomplete; // reader: open what has no end, to look at it; load, read and get refuse then

    /* Called by the calling thread: in end_round and load after each piece that it has moved, when a reader is opened
       before each piece of at most 4096 bytes. Not 0: end with RMIG_ERR_CANCELLED. Must not call back. */
    int (*progress)(void *user, const struct rmig_stats *stats);
    void *progress_user;
};

/* What goes round the blocks. Zero-initialise, then fill in. */
struct rmig_mapped_machine {
    struct rmig_qemu_configuration configuration; // machine must not be ""; mapped-ram is added to the capabilities
    uint32_t section_id; // of ram; any
    bool switchover_start; // the stream has that command: machine types 10.0 and later of QEMU
};

// >>mapped: writer

struct rmig_mapped_writer;

/* Opens a writer to fd: a regular file or a block device, open for writing, neither O_APPEND nor O_DIRECT; open it for
   reading too. fd stays the caller's and must stay open until close; of a device its position is moved. options NULL:
   all defaults. RMIG_OK and *out, or RMIG_ERR_ARGUMENT, RMIG_ERR_PARAM, RMIG_ERR_NO_MEMORY, RMIG_ERR_FILE (no direct
   I/O there) with *err (may be NULL). */
RMIG_API int rmig_mapped_writer_open(int fd, const struct rmig_mapped_options *options, struct rmig_mapped_writer **out,
                                     struct rmig_error *err);
/* Frees everything; NULL is allowed. Unless finish succeeded, the file is the caller's to remove: it is no
   snapshot, or, if only the last wait for the disk failed, not sure to stay one. */
RMIG_API void rmig_mapped_writer_close(struct rmig_mapped_writer *w);
/* Before start. Indexes count from 0, which is the order in the file. The length must be a multiple of the page size;
   memory stays mapped until close. Errors as rmig_blocks_add; RMIG_ERR_STATE after start. */
RMIG_API int rmig_mapped_writer_add_block(struct rmig_mapped_writer *w, const struct rmig_block_desc *desc,
                                          uint32_t *index);
/* Lays the file out: cuts it off at options.offset, allocates the bitmaps. A snapshot that was there loses its magic
   first, and that is brought to the disk (unless no_sync). RMIG_ERR_ARGUMENT: the machine has no name,
   or one too long, or another page size, or has x-ignore-shared, which QEMU cannot load before 11.0; a block's length
   is no multiple of the page size, or more than a file can have. RMIG_ERR_STATE: called before, or no block.
   RMIG_ERR_NO_MEMORY: call again when there is more. RMIG_ERR_FILE: it cannot be cut off there, cannot get its
   length (a limit of that may show in end_round only), or a device is too short. */
RMIG_API int rmig_mapped_writer_start(struct rmig_mapped_writer *w, const struct rmig_mapped_machine *machine);

/* Rounds, as rmig_source_begin_round, rmig_source_save_page ... of rmig.h: what is saved is noted, and end_round writes
   it. A page that is zero loses its place in the file. What is written is the memory's content at some time in
   end_round; the dirty log must catch what the guest writes after begin_round. Offsets and lengths in bytes, any: whole
   pages are saved; in a bitmap bit i of bitmap[i / 64] is page first_page + i. The save functions neither block nor
   read memory. RMIG_ERR_ARGUMENT: no such block, or outside it; RMIG_ERR_STATE: no round is open, or one is. */
RMIG_API int rmig_mapped_writer_begin_round(struct rmig_mapped_writer *w);
RMIG_API int rmig_mapped_writer_save_page(struct rmig_mapped_writer *w, uint32_t block, uint64_t offset);
RMIG_API int rmig_mapped_writer_save_range(struct rmig_mapped_writer *w, uint32_t block, uint64_t offset,
                                           uint64_t length);
RMIG_API int rmig_mapped_writer_save_bitmap(struct rmig_mapped_writer *w, uint32_t block, const uint64_t *bitmap,
                                            uint64_t first_page, uint64_t pages);
/* Blocks while it writes. RMIG_ERR_FILE (also: out of memory for a buffer), RMIG_ERR_CANCELLED (by options.progress);
   RMIG_ERR_STATE: no round is open; or the status of a call that was refused before, and the round stays open. */
RMIG_API int rmig_mapped_writer_end_round(struct rmig_mapped_writer *w);

/* n bytes of device state, from start on, in a round too, in any number of pieces: what QEMU sends behind the END of
   ram. Blocks while it writes. RMIG_ERR_FILE; RMIG_ERR_STATE: before start, after finish. */
RMIG_API int rmig_mapped_writer_put(struct rmig_mapped_writer *w, const void *data, size_t n);
/* Makes the file whole: bitmaps, stream, and last the magic. Blocks. RMIG_ERR_STATE, and nothing is changed, if a round
   is open or the device state does not end in a description, which readers look for (rmig_qemu_encode_end), or holds
   what looks like the end of one before; or the status of a call that was refused before. RMIG_ERR_FILE: it could not
   be written, or not be brought to the disk. */
RMIG_API int rmig_mapped_writer_finish(struct rmig_mapped_writer *w);
/* What was refused so far shall be missing from the file: end_round and finish no longer return it. Nothing else. */
RMIG_API void rmig_mapped_writer_forgive(struct rmig_mapped_writer *w);
/* Where the stream ends, in bytes from the beginning of the file: after finish that is how much of a block device the
   snapshot takes. 0 before start. */
RMIG_API uint64_t rmig_mapped_writer_size(const struct rmig_mapped_writer *w);
/* The last error, also of a refused call; never NULL. */
RMIG_API const struct rmig_error *rmig_mapped_writer_error(const struct rmig_mapped_writer *w);
/* Counters as of a source in rmig.h; writes_posted counts writes of pages. Between calls, not during them. */
RMIG_API void rmig_mapped_writer_stats(const struct rmig_mapped_writer *w, struct rmig_stats *out);

// >>mapped: reader

struct rmig_mapped_reader;

struct rmig_mapped_block {
    const char *name; // any bytes but NUL; valid until close
    uint64_t length, page_size;
    uint64_t guest_address; // with x-ignore-shared, else 0
    uint64_t entry_offset, bitmap_offset, pages_offset; // in the file
    uint64_t pages_set; // which are in the file; the others are zero
    bool ignored; // with x-ignore-shared: the file has nothing of it. Not to be added
};

/* Reads and checks all but the pages, the device state up to its first end: nothing may follow it in a file, anything
   on a block device. fd: a regular file or a block device, open for reading, not O_DIRECT; stays the caller's and must
   stay open until close; its position is moved. RMIG_OK and *out, or RMIG_ERR_ARGUMENT, RMIG_ERR_PARAM,
   RMIG_ERR_NO_MEMORY, RMIG_ERR_FILE, RMIG_ERR_CANCELLED (by options.progress: device state without an end is read as
   far as the file or the device goes), or RMIG_ERR_WIRE: the file is not whole or not right, *err (may be NULL) says
   where. */
RMIG_API int rmig_mapped_reader_open(int fd, const struct rmig_mapped_options *options, struct rmig_mapped_reader **out,
                                     struct rmig_error *err);
RMIG_API void rmig_mapped_reader_close(struct rmig_mapped_reader *r);
RMIG_API const struct rmig_mapped_machine *rmig_mapped_reader_machine(const struct rmig_mapped_reader *r);
/* The number of blocks, and in *blocks (may be NULL) the blocks, in the order of the file, valid until close. */
RMIG_API uint32_t rmig_mapped_reader_blocks(const struct rmig_mapped_reader *r,
                                            const struct rmig_mapped_block **blocks);
/* False: opened with options.incomplete, and something is missing or wrong: rmig_mapped_reader_error says what. */
RMIG_API bool rmig_mapped_reader_whole(const struct rmig_mapped_reader *r);
/* Which of pages first_page ... first_page + pages - 1 are in the file: bit i of out[i / 64]. first_page must be a
   multiple of 64; out has room for (pages + 63) / 64 words. Reads the file. RMIG_ERR_ARGUMENT, RMIG_ERR_FILE. */
RMIG_API int rmig_mapped_reader_bitmap(struct rmig_mapped_reader *r, uint32_t block, uint64_t first_page,
                                       uint64_t pages, uint64_t *out);
/* length bytes of a block from offset on, both multiples of the page size. Blocks while it reads. RMIG_ERR_ARGUMENT,
   RMIG_ERR_NO_MEMORY, RMIG_ERR_FILE (also: the file was changed since it was opened), RMIG_ERR_WIRE (it is not whole).
 */
RMIG_API int rmig_mapped_reader_read(struct rmig_mapped_reader *r, uint32_t block, uint64_t offset, void *out,
                                     uint64_t length);
/* Where load puts a block: it must be in the file, by name, and of the same length (bytes), else RMIG_ERR_ARGUMENT.
   Other errors as rmig_blocks_add. The memory must stay mapped until close. */
RMIG_API int rmig_mapped_reader_add_block(struct rmig_mapped_reader *r, const struct rmig_block_desc *desc);
/* Blocks that were refused so far need not be loaded: load and load_start no longer return it. Nothing else. */
RMIG_API void rmig_mapped_reader_forgive(struct rmig_mapped_reader *r);
/* Fills the memory of all blocks; each block of the file must have been added. What is not in the file becomes zero.
   Blocks. After RMIG_ERR_FILE (also: the file was changed since it was opened, or out of memory for a buffer) and
   RMIG_ERR_CANCELLED the memory's content is undefined. RMIG_ERR_STATE (a block is missing, or lazy loading was
   started), RMIG_ERR_WIRE (the file is not whole) and the status of an add_block that was refused before change
   nothing. */
RMIG_API int rmig_mapped_reader_load(struct rmig_mapped_reader *r);
/* Lazy loading: load_start returns at once, and from then on the memory of the blocks may be used: a page that is
   touched before it was loaded is fetched from the file by one thread, while another loads all of them in order. What
   the memory held before is given up, so each block must be on whole host pages, private anonymous memory
   (RMIG_BACKING_ANONYMOUS) or a shared mapping of tmpfs or a memfd (RMIG_BACKING_SHARED_FD), and neither locked nor
   pinned (mlock, VFIO, registered for RDMA), nor sealed against writing. Until load_wait says RMIG_OK - only this
   mapping may be used: a read by another one (vhost-user, a second mapping) puts zeros there for good. That is noticed,
   and ends the loading with an error - the guest must not discard pages (balloon). It may be saved and migrated
   meanwhile, by this mapping, which fetches all of it. Needs userfaultfd, also for faults in the kernel: root, the
   sysctl vm.unprivileged_userfaultfd, or access to /dev/userfaultfd (Linux 6.1). Device state can be had meanwhile.
   RMIG_ERR_STATE and RMIG_ERR_WIRE as load; RMIG_ERR_ARGUMENT: no such memory, which is as it was and may be loaded by
   load; RMIG_ERR_NO_MEMORY. RMIG_ERR_SETUP with errno: no userfaultfd, or memory cannot be emptied; part of it may be
   empty then. */
RMIG_API int rmig_mapped_reader_load_start(struct rmig_mapped_reader *r);
/* Waits until all is loaded, at most timeout_ns: RMIG_OK; RMIG_PENDING; RMIG_ERR_STATE: load_start was not called; or
   why it failed: then the memory of all blocks cannot be accessed any more (SIGSEGV), since zeros where the file has
   something would go unnoticed. That is also so when the reader is closed before RMIG_OK. */
RMIG_API int rmig_mapped_reader_load_wait(struct rmig_mapped_reader *r, uint64_t timeout_ns);
RMIG_API uint64_t rmig_mapped_reader_state_size(const struct rmig_mapped_reader *r); // bytes of device state
/* The next bytes of the device state, at most n: how many (0: there are no more), or RMIG_ERR_FILE, RMIG_ERR_WIRE (the
   file is not whole), RMIG_ERR_ARGUMENT (out is NULL). */
RMIG_API int64_t rmig_mapped_reader_get(struct rmig_mapped_reader *r, void *out, size_t n);
RMIG_API const struct rmig_error *rmig_mapped_reader_error(const struct rmig_mapped_reader *r);
/* bytes_written, pages_written: loaded into memory; bytes_zero, pages_zero: not in the file, or, when it is loaded
   lazily, zero; writes_posted: reads, 0 when lazily; bytes_pending: still to be loaded; stream_bytes: device state
   handed out. */
RMIG_API void rmig_mapped_reader_stats(const struct rmig_mapped_reader *r, struct rmig_stats *out);

#ifdef __cplusplus
}
#endif

#endif // RMIG_MAPPED_RAM_H

#if defined(RMIG_IMPLEMENTATION) && !defined(RMIG_MAPPED_RAM_IMPLEMENTATION_DONE)
#define RMIG_MAPPED_RAM_IMPLEMENTATION_DONE

#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
#ifdef RMIG_MAPPED_URING
#include <liburing.h>
#endif

#ifdef __cplusplus
extern "C" {
#endif

// >>mapped: files

enum {
    RMIG__MAPPED_VERSION = 1,
    RMIG__MAPPED_ALIGN = 4096, // of direct I/O: memory, offset and length. Covers every usual logical block
    RMIG__MAPPED_UNIT = 1 << 20, // moved by one call at most
    RMIG__MAPPED_SPAN = 4096, // pages, and
    RMIG__MAPPED_SPAN_BYTES = 16 << 20, // bytes, that a thread loads at a time at most, but a page at least
    RMIG__MAPPED_ANNOUNCE = 64 << 10, // bytes of a run that are worth two system calls
    RMIG__MAPPED_THREAD_BYTES = 4 << 20, // what makes one more thread worth its start
};

#if defined(MADV_POPULATE_WRITE)
#define RMIG__MADV_POPULATE_WRITE MADV_POPULATE_WRITE
#else
#define RMIG__MADV_POPULATE_WRITE 23 // Linux 5.14 and later; an older one says EINVAL, which does no harm
#endif

#if defined(O_DIRECT) // which libc hides unless it is asked for by _GNU_SOURCE
#define RMIG__O_DIRECT O_DIRECT
#elif defined(__O_DIRECT)
#define RMIG__O_DIRECT __O_DIRECT
#else
#define RMIG__O_DIRECT 0
#endif

static uint64_t rmig__mapped_now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static uint64_t rmig__mapped_words(uint64_t pages) { return pages / 64 + (pages % 64 != 0); }

struct rmig__mapped_source;

/* A file as one thread uses it. */
struct rmig__mapped_io {
    int fd, direct_fd; // direct_fd -1: none
    uint8_t *bounce, *aligned; // of RMIG__MAPPED_UNIT bytes, NULL until it is needed
    struct rmig__mapped_ring *ring; // NULL: one transfer after the other
    struct {
        const struct rmig__mapped_source *source; // NULL: none
        uint64_t first, n;
    } ahead; // pages that are to be loaded next
    const char *block; // whose pages these are, NULL: the stream
    struct rmig_error error;
};

static void rmig__mapped_io_init(struct rmig__mapped_io *io, int fd, int direct_fd) {
    memset(io, 0, sizeof *io);
    io->fd = fd;
    io->direct_fd = direct_fd;
}

static struct rmig__qemu_text rmig__mapped_name(const char *name) { return rmig__qemu_show(name, strlen(name)); }

/* What an error of the system does not say by itself: EFAULT is of the memory, not of the file. */
static const char *rmig__mapped_hint(bool out, bool direct, int code) {
    if (code == EFAULT)
        return out ? " (the memory cannot be read: was its own file cut?)"
                   : " (the memory cannot be written: is the disk of its own file full?)";
    return direct && code == EINVAL ? " (direct I/O of multiples of 4096 bytes; switch direct off)" : "";
}

static int rmig__mapped_io_failed(struct rmig__mapped_io *io, bool out, uint64_t n, uint64_t at, bool direct) {
    struct rmig__qemu_text name = rmig__mapped_name(io->block == NULL ? "" : io->block);
    int code = errno;
    return rmig_fail(&io->error, RMIG_ERR_FILE, code, "%s%s%scannot %s %llu bytes at file offset %llu: %s%s",
                     io->block == NULL ? "" : "block \"", name.s,
                     io->block == NULL ? "" : "\": ", out ? "write" : "read", (unsigned long long)n,
                     (unsigned long long)at, strerror(code), rmig__mapped_hint(out, direct, code));
}

static bool rmig__mapped_bounce(struct rmig__mapped_io *io) {
    if (io->bounce != NULL)
        return true;
    io->bounce = (uint8_t *)RMIG_MALLOC((size_t)RMIG__MAPPED_UNIT + RMIG__MAPPED_ALIGN);
    if (io->bounce == NULL)
        return false;
    size_t odd = (size_t)((uintptr_t)io->bounce % RMIG__MAPPED_ALIGN);
    io->aligned = io->bounce + (odd == 0 ? 0 : RMIG__MAPPED_ALIGN - odd);
    return true;
}

/* One call, of which part may be done: how many bytes of n, or an error. */
static int64_t rmig__mapped_once(struct rmig__mapped_io *io, bool out, uint8_t *p, uint64_t n, uint64_t at) {
    bool direct = io->direct_fd >= 0 && at % RMIG__MAPPED_ALIGN == 0 && n >= RMIG__MAPPED_ALIGN;
    bool bounce = direct && (uintptr_t)p % RMIG__MAPPED_ALIGN != 0;
    if (direct)
        n -= n % RMIG__MAPPED_ALIGN;
    else if (io->direct_fd >= 0) // only up to where direct I/O can go on
        n = rmig__min(n, RMIG__MAPPED_ALIGN - at % RMIG__MAPPED_ALIGN);
    n = rmig__min(n, RMIG__MAPPED_UNIT);
    if (bounce && !rmig__mapped_bounce(io))
        return rmig_fail(&io->error, RMIG_ERR_NO_MEMORY, 0, "out of memory for a buffer of %d bytes for direct I/O",
                         RMIG__MAPPED_UNIT);
    uint8_t *buf = bounce ? io->aligned : p;
    int fd = direct ? io->direct_fd : io->fd;
    if (bounce && out)
        memcpy(buf, p, (size_t)n);
    ssize_t got;
    do
        got = out ? pwrite(fd, buf, (size_t)n, (off_t)at) : pread(fd, buf, (size_t)n, (off_t)at);
    while (got < 0 && errno == EINTR);
    if (got < 0)
        return rmig__mapped_io_failed(io, out, n, at, direct);
    if (bounce && !out)
        memcpy(p, buf, (size_t)got);
    return (int64_t)got;
}

/* Moves all n bytes, or says why not. Reads into memory, or only reads it. */
static int rmig__mapped_transfer(struct rmig__mapped_io *io, bool out, void *memory, uint64_t n, uint64_t at) {
    uint8_t *p = (uint8_t *)memory;
    while (n > 0) {
        int64_t done = rmig__mapped_once(io, out, p, n, at);
        if (done < 0)
            return (int)done;
        if (done == 0 && out) {
            errno = ENOSPC;
            return rmig__mapped_io_failed(io, out, n, at, false);
        }
        if (done == 0)
            return rmig_fail(&io->error, RMIG_ERR_FILE, 0,
                             "the file ends at offset %llu or before: it was cut while it was read",
                             (unsigned long long)at);
        p += done;
        n -= (uint64_t)done;
        at += (uint64_t)done;
    }
    return RMIG_OK;
}

#ifdef RMIG_MAPPED_URING

enum { RMIG__MAPPED_DEPTH = 16 }; // transfers under way at a time, of RMIG__MAPPED_UNIT bytes at most

struct rmig__mapped_piece {
    uint8_t *p;
    uint64_t n, at;
    const char *block;
    bool out, direct;
};

struct rmig__mapped_ring {
    struct io_uring uring;
    struct rmig__mapped_piece piece[RMIG__MAPPED_DEPTH];
    uint32_t unused[RMIG__MAPPED_DEPTH], unused_count; // of piece
    uint32_t prepared, flying; // not yet submitted; submitted, not yet complete
};

/* A filter of system calls may allow its setup alone. */
static bool rmig__mapped_ring_works(struct io_uring *uring) {
    struct io_uring_cqe *cqe = NULL;
    int code;
    io_uring_prep_nop(io_uring_get_sqe(uring));
    do
        code = io_uring_submit(uring);
    while (code == -EINTR);
    while (code == 1 && (code = io_uring_wait_cqe(uring, &cqe)) == -EINTR)
        code = 1;
    if (code == 0)
        io_uring_cqe_seen(uring, cqe);
    return code == 0;
}

/* Where the kernel has no io_uring, or forbids it, io does without. */
static void rmig__mapped_ring_open(struct rmig__mapped_io *io, struct rmig__mapped_ring *ring) {
    memset(ring, 0, sizeof *ring);
    if (io_uring_queue_init(RMIG__MAPPED_DEPTH, &ring->uring, 0) < 0)
        return;
    if (!rmig__mapped_ring_works(&ring->uring)) {
        io_uring_queue_exit(&ring->uring);
        return;
    }
    for (uint32_t i = 0; i < RMIG__MAPPED_DEPTH; i++)
        ring->unused[ring->unused_count++] = i;
    io->ring = ring;
}

static int rmig__mapped_ring_failed(struct rmig__mapped_io *io, int code) {
    return rmig_fail(&io->error, RMIG_ERR_FILE, -code, "io_uring: %s (no_uring does without)", strerror(-code));
}

static int rmig__mapped_ring_submit(struct rmig__mapped_io *io) {
    struct rmig__mapped_ring *ring = io->ring;
    int code;
    do
        code = io_uring_submit(&ring->uring);
    while (code == -EINTR);
    ring->prepared -= code > 0 ? (uint32_t)code : 0;
    ring->flying += code > 0 ? (uint32_t)code : 0;
    if (ring->prepared == 0 || ring->flying > 0) // the kernel may be short of something until some are complete
        return RMIG_OK;
    return rmig__mapped_ring_failed(io, code < 0 ? code : -EBUSY);
}

/* Waits for one transfer, and does what the kernel left of it undone. */
static int rmig__mapped_ring_take(struct rmig__mapped_io *io) {
    struct rmig__mapped_ring *ring = io->ring;
    struct io_uring_cqe *cqe = NULL;
    int code = rmig__mapped_ring_submit(io);
    if (code != RMIG_OK)
        return code;
    do
        code = io_uring_wait_cqe(&ring->uring, &cqe);
    while (code == -EINTR);
    if (code < 0)
        return rmig__mapped_ring_failed(io, code);
    uint64_t done = cqe->res < 0 ? 0 : (uint64_t)cqe->res; // what failed is tried without, which tells the reason
    uint32_t i = (uint32_t)cqe->user_data;
    const struct rmig__mapped_piece piece = ring->piece[i];
    io_uring_cqe_seen(&ring->uring, cqe);
    ring->flying--;
    ring->unused[ring->unused_count++] = i;
    const char *block = io->block;
    io->block = piece.block;
    int status = rmig__mapped_transfer(io, piece.out, piece.p + done, piece.n - done, piece.at + done);
    io->block = block;
    return status;
}

/* All transfers are complete, also after a failure: nobody looks at the memory any more. */
static int rmig__mapped_drain(struct rmig__mapped_io *io) {
    struct rmig_error first;
    uint32_t left = 0;
    memset(&first, 0, sizeof first);
    while (io->ring != NULL && (left = io->ring->prepared + io->ring->flying) > 0) {
        if (rmig__mapped_ring_take(io) == RMIG_OK)
            continue;
        if (first.status == RMIG_OK)
            first = io->error;
        if (io->ring->prepared + io->ring->flying == left)
            break; // the ring itself failed
    }
    if (first.status != RMIG_OK)
        io->error = first;
    return first.status;
}

static void rmig__mapped_ring_close(struct rmig__mapped_io *io) {
    if (io->ring != NULL)
        io_uring_queue_exit(&io->ring->uring);
    io->ring = NULL;
}

static int rmig__mapped_prepare(struct rmig__mapped_io *io, const struct rmig__mapped_piece *piece) {
    struct rmig__mapped_ring *ring = io->ring;
    int status = ring->unused_count > 0 ? RMIG_OK : rmig__mapped_ring_take(io);
    if (status != RMIG_OK)
        return status;
    struct io_uring_sqe *sqe = io_uring_get_sqe(&ring->uring);
    RMIG_ASSERT(sqe != NULL); // as many as pieces
    uint32_t i = ring->unused[--ring->unused_count];
    int fd = piece->direct ? io->direct_fd : io->fd;
    ring->piece[i] = *piece;
    if (piece->out)
        io_uring_prep_write(sqe, fd, piece->p, (unsigned)piece->n, piece->at);
    else
        io_uring_prep_read(sqe, fd, piece->p, (unsigned)piece->n, piece->at);
    sqe->user_data = i;
    ring->prepared++;
    return ring->prepared < RMIG__MAPPED_DEPTH / 2 ? RMIG_OK : rmig__mapped_ring_submit(io);
}

/* As rmig__mapped_transfer, but it need not be done when it returns: only once drain has. */
static int rmig__mapped_post(struct rmig__mapped_io *io, bool out, void *memory, uint64_t n, uint64_t at) {
    uint8_t *p = (uint8_t *)memory;
    bool direct = io->direct_fd >= 0;
    while (n > 0) {
        uint64_t size = rmig__min(n, RMIG__MAPPED_UNIT);
        if (direct)
            size -= size % RMIG__MAPPED_ALIGN;
        bool odd = direct && ((at | (uintptr_t)p) % RMIG__MAPPED_ALIGN != 0 || size == 0);
        if (io->ring == NULL || odd)
            return rmig__mapped_transfer(io, out, p, n, at);
        struct rmig__mapped_piece piece = {p, size, at, io->block, out, direct};
        int status = rmig__mapped_prepare(io, &piece);
        if (status != RMIG_OK)
            return status;
        p += size;
        at += size;
        n -= size;
    }
    return RMIG_OK;
}

#else

struct rmig__mapped_ring {
    char none;
};

static void rmig__mapped_ring_open(struct rmig__mapped_io *io, struct rmig__mapped_ring *ring) {
    (void)io;
    (void)ring;
}
static void rmig__mapped_ring_close(struct rmig__mapped_io *io) { (void)io; }
static int rmig__mapped_drain(struct rmig__mapped_io *io) { return io->ring == NULL ? RMIG_OK : RMIG_ERR_STATE; }
static int rmig__mapped_post(struct rmig__mapped_io *io, bool out, void *memory, uint64_t n, uint64_t at) {
    return rmig__mapped_transfer(io, out, memory, n, at);
}

#endif

static void rmig__mapped_io_end(struct rmig__mapped_io *io) {
    rmig__mapped_ring_close(io);
    rmig__release(io->bounce);
}

static int rmig__mapped_put(struct rmig__mapped_io *io, const void *p, uint64_t n, uint64_t at) {
    return rmig__mapped_transfer(io, true, (void *)(uintptr_t)p, n, at);
}

static bool rmig__mapped_in_range(uint64_t value, uint64_t min, uint64_t max) {
    return value >= min && value <= max && rmig__is_power_of_two(value);
}

static int rmig__mapped_check_options(const struct rmig_mapped_options *o, struct rmig_error *err) {
    uint64_t page = o->page_size == 0 ? RMIG_KIB : o->page_size;
    if (!rmig__mapped_in_range(page, RMIG_KIB, RMIG_GIB))
        return rmig_fail(err, RMIG_ERR_PARAM, 0, "page_size %llu: must be a power of two from 1024 to 1073741824",
                         (unsigned long long)o->page_size);
    if (o->file_align != 0 && !rmig__mapped_in_range(o->file_align, page, RMIG_GIB))
        return rmig_fail(err, RMIG_ERR_PARAM, 0,
                         "file_align %llu: must be a power of two from the page size, %llu, to 1073741824",
                         (unsigned long long)o->file_align, (unsigned long long)page);
    if (o->threads > RMIG_MAPPED_THREADS_MAX)
        return rmig_fail(err, RMIG_ERR_PARAM, 0, "threads %u: must be 1 to %d", o->threads, RMIG_MAPPED_THREADS_MAX);
    if (o->offset > INT64_MAX / 2)
        return rmig_fail(err, RMIG_ERR_PARAM, 0, "offset %llu: must be at most %llu", (unsigned long long)o->offset,
                         (unsigned long long)(INT64_MAX / 2));
    return RMIG_OK;
}

static const char *rmig__mapped_kind(mode_t mode) {
    if (S_ISFIFO(mode))
        return "a pipe";
    if (S_ISSOCK(mode))
        return "a socket";
    return S_ISDIR(mode) ? "a directory" : "a device";
}

/* Is fd a file that can be used? Then *st is filled in. */
static int rmig__mapped_check_fd(int fd, bool out, struct stat *st, struct rmig_error *err) {
    int flags = fcntl(fd, F_GETFL);
    if (flags < 0 || fstat(fd, st) < 0)
        return rmig_fail(err, RMIG_ERR_ARGUMENT, errno, "descriptor %d: %s", fd, strerror(errno));
    if (!S_ISREG(st->st_mode) && !S_ISBLK(st->st_mode))
        return rmig_fail(err, RMIG_ERR_ARGUMENT, 0,
                         "descriptor %d is %s: pages have their places in a regular file or on a block device", fd,
                         rmig__mapped_kind(st->st_mode));
    if ((flags & O_ACCMODE) == (out ? O_RDONLY : O_WRONLY))
        return rmig_fail(err, RMIG_ERR_ARGUMENT, 0, "descriptor %d is open for %s only", fd,
                         out ? "reading" : "writing");
    if ((flags & RMIG__O_DIRECT) != 0 || (out && (flags & O_APPEND) != 0))
        return rmig_fail(err, RMIG_ERR_ARGUMENT, 0, "descriptor %d is open with %s", fd,
                         (flags & RMIG__O_DIRECT) != 0 ? "O_DIRECT: open it without, and set direct"
                                                       : "O_APPEND: what is written would all go to the end");
    if (S_ISBLK(st->st_mode) && (st->st_size = lseek(fd, 0, SEEK_END)) < 0)
        return rmig_fail(err, RMIG_ERR_FILE, errno, "the length of the device: %s", strerror(errno));
    return RMIG_OK;
}

static int rmig__mapped_open_direct(int fd, bool out, int *direct_fd, struct rmig_error *err) {
    char path[32];
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    *direct_fd = RMIG__O_DIRECT == 0 ? -1 : open(path, (out ? O_WRONLY : O_RDONLY) | RMIG__O_DIRECT | O_CLOEXEC);
    if (*direct_fd < 0)
        return rmig_fail(err, RMIG_ERR_FILE, errno,
                         "no direct I/O: the file cannot be opened again by way of %s: %s; switch direct off", path,
                         strerror(errno));
    return RMIG_OK;
}

/* What fails half-way ends its writer or reader, whatever it is. */
static int rmig__mapped_final(int status, int end) { return status > RMIG_SESSION_ERRORS ? end : status; }

static const struct rmig_error *rmig__mapped_null(void) {
    static const struct rmig_error error = {RMIG_ERR_ARGUMENT, 0, "NULL is no writer and no reader"};
    return &error;
}

// >>mapped: threads

/* For threads that are started next: signals are for the caller's own, but for those of what a thread does itself. */
static void rmig__mapped_block_signals(sigset_t *before) {
    static const int own[] = {SIGBUS, SIGSEGV, SIGFPE, SIGILL, SIGTRAP};
    sigset_t all;
    sigfillset(&all);
    for (size_t i = 0; i < sizeof own / sizeof own[0]; i++)
        sigdelset(&all, own[i]);
    pthread_sigmask(SIG_SETMASK, &all, before);
}

/* Threads that do the steps of one job. */
struct rmig__mapped_crew {
    /* RMIG_PENDING: go on. RMIG_OK: nothing is left. Else io->error says what failed. */
    int (*step)(struct rmig__mapped_crew *crew, struct rmig__mapped_io *io);
    void *job;
    int fd, direct_fd;
    const struct rmig_mapped_options *options;
    struct rmig_stats *stats;

    pthread_mutex_t lock; // for the error, the statistics and the job's own
    struct rmig_error error; // the first one
};

static void rmig__mapped_note_error(struct rmig__mapped_crew *c, const struct rmig_error *error) {
    pthread_mutex_lock(&c->lock);
    if (c->error.status == RMIG_OK)
        c->error = *error;
    pthread_mutex_unlock(&c->lock);
}

static void rmig__mapped_tell(struct rmig__mapped_crew *c) {
    struct rmig_error error;
    pthread_mutex_lock(&c->lock);
    struct rmig_stats stats = *c->stats;
    pthread_mutex_unlock(&c->lock);
    if (c->options->progress(c->options->progress_user, &stats) == 0)
        return;
    rmig_fail(&error, RMIG_ERR_CANCELLED, 0, "cancelled by the function progress");
    rmig__mapped_note_error(c, &error);
}

static void rmig__mapped_do(struct rmig__mapped_crew *c, bool tells) {
    struct rmig__mapped_io io;
    struct rmig__mapped_ring ring;
    int status = RMIG_PENDING;
    rmig__mapped_io_init(&io, c->fd, c->direct_fd);
    if (!c->options->no_uring && c->direct_fd >= 0)
        rmig__mapped_ring_open(&io, &ring);
    while (status == RMIG_PENDING) {
        pthread_mutex_lock(&c->lock);
        bool stop = c->error.status != RMIG_OK;
        pthread_mutex_unlock(&c->lock);
        if (stop)
            break;
        status = c->step(c, &io);
        if (status < 0)
            rmig__mapped_note_error(c, &io.error);
        else if (tells && c->options->progress != NULL)
            rmig__mapped_tell(c);
    }
    if (rmig__mapped_drain(&io) != RMIG_OK)
        rmig__mapped_note_error(c, &io.error);
    rmig__mapped_io_end(&io);
}

static void *rmig__mapped_thread(void *crew) {
    rmig__mapped_do((struct rmig__mapped_crew *)crew, false);
    return NULL;
}

/* Runs the steps by as many threads as `bytes` are worth. A thread that cannot be started is done without. */
static int rmig__mapped_run(struct rmig__mapped_crew *c, uint64_t bytes, struct rmig_error *err) {
    pthread_t thread[RMIG_MAPPED_THREADS_MAX];
    sigset_t before;
    uint64_t wanted = rmig__min(c->options->threads, 1 + bytes / RMIG__MAPPED_THREAD_BYTES), started = 1;
    memset(&c->error, 0, sizeof c->error);
    if (pthread_mutex_init(&c->lock, NULL) != 0)
        return rmig_fail(err, RMIG_ERR_FILE, 0, "out of memory for a mutex");
    rmig__mapped_block_signals(&before);
    while (started < wanted && pthread_create(&thread[started], NULL, rmig__mapped_thread, c) == 0)
        started++;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    rmig__mapped_do(c, true);
    while (--started > 0)
        pthread_join(thread[started], NULL);
    pthread_mutex_destroy(&c->lock);
    if (c->error.status == RMIG_OK)
        return RMIG_OK;
    *err = c->error;
    return err->status = rmig__mapped_final(err->status, RMIG_ERR_FILE);
}

/* Where a block holds data, as last asked for; with the lock. */
struct rmig__mapped_holes {
    struct rmig_holes holes;
    struct rmig__hole known;
    uint64_t step; // how far it was asked
};

static void rmig__mapped_forget(struct rmig__mapped_holes *h) {
    rmig_holes_forget(&h->holes);
    h->known.block = UINT32_MAX;
}

/* The first byte at or behind `at` that may be something other than zero. Asked for in steps that grow as long as one
   follows the other, so that little is asked for what lies alone, and few questions are asked for what does not.
   `least`: what the caller wants to know at once, in bytes. */
static uint64_t rmig__mapped_data_at(struct rmig__mapped_holes *h, const struct rmig_block *b, uint32_t index,
                                     uint64_t at, uint64_t least) {
    if (!rmig__hole_knows(&h->known, index, at)) {
        bool follows = h->known.block == index && at == h->known.end;
        h->step = rmig__max(least, follows ? rmig__min(2 * h->step, RMIG_GIB) : (uint64_t)RMIG__MAPPED_UNIT);
        uint64_t reach = b->length - at > h->step ? at + h->step : b->length;
        rmig__hole_look(&h->known, &h->holes, b, index, at, reach);
    }
    return rmig__max(at, h->known.data);
}

// >>mapped: writer, implementation

/* A block in the file. */
struct rmig__mapped_place {
    struct rmig_merge dirty; // saved, not yet written
    struct rmig_merge filled; // the bitmap of the file
    uint64_t bitmap_offset, pages_offset;
};

enum rmig__mapped_state {
    RMIG__MAPPED_ADDING,
    RMIG__MAPPED_BETWEEN, // started, no round is open
    RMIG__MAPPED_IN_ROUND,
    RMIG__MAPPED_FINISHED
};

struct rmig_mapped_writer {
    int fd, direct_fd;
    struct rmig_mapped_options opt;
    struct rmig_mapped_machine machine;
    enum rmig__mapped_state state;
    struct rmig_blocks blocks;
    struct rmig__mapped_place *place;
    uint64_t *bits; // of all blocks: dirty, filled
    struct rmig_qemu_reader check; // reads what is written: a stream that it would refuse is not finished
    uint64_t end; // of the stream
    uint64_t device_size; // of a block device, which has its length; else 0
    uint32_t at_block; // end_round: the next page. What is before it is not dirty
    uint64_t at_page;
    struct rmig__mapped_holes holes;
    uint64_t round_began, round_before, written_before;
    struct rmig_stats stats;
    struct rmig_error error;
    struct rmig_error refused; // the first call that left something out of the file, until it is forgiven
    int failed; // the file is of no use any more
};

RMIG__DEF int rmig_mapped_writer_open(int fd, const struct rmig_mapped_options *options,
                                      struct rmig_mapped_writer **out, struct rmig_error *err) {
    struct rmig_mapped_options opt;
    struct stat st;
    int direct_fd = -1;
    memset(&opt, 0, sizeof opt);
    memset(&st, 0, sizeof st);
    if (options != NULL)
        opt = *options;
    if (out == NULL)
        return rmig_fail(err, RMIG_ERR_ARGUMENT, 0, "rmig_mapped_writer_open: out is NULL");
    *out = NULL;
    int status = rmig__mapped_check_options(&opt, err);
    if (status == RMIG_OK)
        status = rmig__mapped_check_fd(fd, true, &st, err);
    if (status == RMIG_OK && opt.direct)
        status = rmig__mapped_open_direct(fd, true, &direct_fd, err);
    if (status != RMIG_OK)
        return status;
    struct rmig_mapped_writer *w = (struct rmig_mapped_writer *)rmig__calloc(1, sizeof *w);
    if (w == NULL) {
        if (direct_fd >= 0)
            close(direct_fd);
        return rmig_fail(err, RMIG_ERR_NO_MEMORY, 0, "out of memory for a writer");
    }
    w->fd = fd;
    w->direct_fd = direct_fd;
    w->device_size = S_ISBLK(st.st_mode) ? (uint64_t)st.st_size : 0;
    w->opt = opt;
    w->opt.threads = opt.threads == 0 ? 1 : opt.threads;
    rmig_blocks_init(&w->blocks);
    rmig_holes_open(&w->holes.holes);
    rmig_qemu_reader_init(&w->check, RMIG_QEMU_MAPPED_RAM);
    *out = w;
    return RMIG_OK;
}

RMIG__DEF void rmig_mapped_writer_close(struct rmig_mapped_writer *w) {
    if (w == NULL)
        return;
    if (w->direct_fd >= 0)
        close(w->direct_fd);
    rmig_holes_close(&w->holes.holes);
    rmig_blocks_free(&w->blocks);
    rmig__release(w->place);
    rmig__release(w->bits);
    RMIG_FREE(w);
}

RMIG__DEF const struct rmig_error *rmig_mapped_writer_error(const struct rmig_mapped_writer *w) {
    return w == NULL ? rmig__mapped_null() : &w->error;
}

RMIG__DEF void rmig_mapped_writer_stats(const struct rmig_mapped_writer *w, struct rmig_stats *out) {
    if (out == NULL)
        return;
    memset(out, 0, sizeof *out);
    if (w != NULL)
        *out = w->stats;
}

/* The status of a call without which the file would lack something. */
static int rmig__writer_note(struct rmig_mapped_writer *w, int status) {
    if (status < 0 && status > RMIG_SESSION_ERRORS && w->refused.status == RMIG_OK)
        w->refused = w->error;
    return status;
}

RMIG__DEF void rmig_mapped_writer_forgive(struct rmig_mapped_writer *w) {
    if (w != NULL)
        memset(&w->refused, 0, sizeof w->refused);
}

/* Is the writer in this state? Else the error of a call at the wrong time. */
static int rmig__writer_in(struct rmig_mapped_writer *w, enum rmig__mapped_state wanted, const char *call) {
    static const char *const now[] = {"not started", "started, and no round is open", "in a round", "finished"};
    if (w->failed != RMIG_OK)
        return w->failed;
    if (w->state == wanted)
        return RMIG_OK;
    return rmig_fail(&w->error, RMIG_ERR_STATE, 0, "%s: the writer is %s; it must be %s", call, now[w->state],
                     now[wanted]);
}

/* For calls that would say that nothing is missing. */
static int rmig__writer_complete(struct rmig_mapped_writer *w) {
    if (w->failed == RMIG_OK && w->refused.status != RMIG_OK)
        w->error = w->refused;
    return w->failed != RMIG_OK ? w->failed : w->refused.status;
}

static int rmig__writer_add(struct rmig_mapped_writer *w, const struct rmig_block_desc *desc, uint32_t *index) {
    int status = rmig__writer_in(w, RMIG__MAPPED_ADDING, "rmig_mapped_writer_add_block");
    if (status != RMIG_OK)
        return status;
    if (w->blocks.count == RMIG_QEMU_BLOCKS_MAX)
        return rmig_fail(&w->error, RMIG_ERR_ARGUMENT, 0, "more than %d blocks", RMIG_QEMU_BLOCKS_MAX);
    return rmig_blocks_add(&w->blocks, desc, index, &w->error);
}

RMIG__DEF int rmig_mapped_writer_add_block(struct rmig_mapped_writer *w, const struct rmig_block_desc *desc,
                                           uint32_t *index) {
    return w == NULL ? RMIG_ERR_ARGUMENT : rmig__writer_note(w, rmig__writer_add(w, desc, index));
}

/* Where the walk over the stream stands, and what it does with the bytes: writes them, or lays out and checks. */
struct rmig__mapped_walk {
    struct rmig_mapped_writer *w;
    uint64_t at;
    bool writes;
};

static int rmig__walk_bytes(struct rmig__mapped_walk *k, const uint8_t *p, int n) {
    struct rmig_mapped_writer *w = k->w;
    struct rmig__mapped_io io;
    struct rmig_qemu_event ev;
    if (n < 0)
        return rmig_fail(&w->error, RMIG_ERR_ARGUMENT, 0, "the machine's configuration cannot be written: its name?");
    int status = RMIG_OK;
    if (k->writes) {
        uint64_t skip = k->at == w->opt.offset ? RMIG__QEMU_MAGIC_SIZE : 0; // the magic comes last of all
        rmig__mapped_io_init(&io, w->fd, -1);
        status = rmig__mapped_put(&io, p + skip, (uint64_t)n - skip, k->at + skip);
        if (status != RMIG_OK)
            w->error = io.error;
    } else {
        for (size_t used = 0; status == RMIG_OK && used < (size_t)n;) {
            int64_t took = rmig_qemu_reader_feed(&w->check, p + used, (size_t)n - used, &ev);
            if (took < 0)
                status =
                    rmig_fail(&w->error, RMIG_ERR_ARGUMENT, 0, "no reader would take this: %s", w->check.error.text);
            else
                used += (size_t)took;
        }
    }
    k->at += (uint64_t)n;
    return status;
}

static int rmig__walk_block(struct rmig__mapped_walk *k, uint32_t i) {
    struct rmig_mapped_writer *w = k->w;
    struct rmig__mapped_place *place = &w->place[i];
    const struct rmig_block *b = &w->blocks.block[i];
    struct rmig_qemu_block entry;
    uint8_t out[RMIG_QEMU_BLOCK_MAX];
    memset(&entry, 0, sizeof entry);
    memcpy(entry.name, b->name, strlen(b->name));
    entry.length = b->length;
    entry.mapped.version = RMIG__MAPPED_VERSION;
    entry.mapped.page_size = w->opt.page_size;
    int n = rmig_qemu_encode_block(out, sizeof out, &entry, w->machine.configuration.capabilities);
    uint64_t bitmap_size = rmig__mapped_words(b->length / w->opt.page_size) * 8, align = w->opt.file_align;
    place->bitmap_offset = k->at + (n < 0 ? 0 : (uint64_t)n);
    place->pages_offset = (place->bitmap_offset + bitmap_size + align - 1) / align * align;
    entry.mapped.bitmap_offset = place->bitmap_offset;
    entry.mapped.pages_offset = place->pages_offset;
    n = rmig_qemu_encode_block(out, sizeof out, &entry, w->machine.configuration.capabilities);
    int status = rmig__walk_bytes(k, out, n);
    k->at = place->pages_offset + b->length;
    if (!k->writes)
        rmig_qemu_reader_jump(&w->check, k->at);
    return status;
}

/* A section of ram ends: EOS and footer. */
static int rmig__walk_section_end(struct rmig__mapped_walk *k) {
    uint8_t out[RMIG_QEMU_SMALL_MAX];
    int status = rmig__walk_bytes(k, out, rmig_qemu_encode_word(out, sizeof out, RMIG_QEMU_WORD_EOS));
    if (status != RMIG_OK)
        return status;
    return rmig__walk_bytes(k, out, rmig_qemu_encode_footer(out, sizeof out, k->w->machine.section_id));
}

static int rmig__walk_start(struct rmig__mapped_walk *k) {
    struct rmig_mapped_writer *w = k->w;
    uint8_t out[RMIG_QEMU_START_MAX];
    uint64_t total = 0;
    for (uint32_t i = 0; i < w->blocks.count; i++)
        total += w->blocks.block[i].length;
    int status = rmig__walk_bytes(k, out, rmig_qemu_encode_start(out, sizeof out, &w->machine.configuration));
    if (status == RMIG_OK)
        status = rmig__walk_bytes(
            k, out, rmig_qemu_encode_section(out, sizeof out, RMIG_QEMU_SECTION_START, w->machine.section_id));
    if (status == RMIG_OK)
        status = rmig__walk_bytes(k, out, rmig_qemu_encode_mem_size(out, sizeof out, total));
    for (uint32_t i = 0; i < w->blocks.count && status == RMIG_OK; i++)
        status = rmig__walk_block(k, i);
    return status == RMIG_OK ? rmig__walk_section_end(k) : status;
}

/* The stream up to the device state. */
static int rmig__walk(struct rmig__mapped_walk *k) {
    struct rmig_mapped_writer *w = k->w;
    uint8_t out[RMIG_QEMU_SMALL_MAX];
    int status = rmig__walk_start(k);
    if (status == RMIG_OK && w->machine.switchover_start)
        status =
            rmig__walk_bytes(k, out, rmig_qemu_encode_command(out, sizeof out, RMIG_QEMU_COMMAND_SWITCHOVER_START, 0));
    if (status == RMIG_OK)
        status = rmig__walk_bytes(
            k, out, rmig_qemu_encode_section(out, sizeof out, RMIG_QEMU_SECTION_END, w->machine.section_id));
    return status == RMIG_OK ? rmig__walk_section_end(k) : status;
}

static int rmig__writer_check_machine(struct rmig_mapped_writer *w, const struct rmig_mapped_machine *m) {
    const struct rmig_qemu_configuration *c = &m->configuration;
    uint64_t said = c->page_bits == 0 ? 0 : (uint64_t)1 << (c->page_bits & 63);
    uint8_t out[RMIG_QEMU_START_MAX];
    if (c->page_bits != 0 && (c->page_bits < 10 || c->page_bits > 30))
        return rmig_fail(&w->error, RMIG_ERR_ARGUMENT, 0, "page_bits %u of the machine: must be 0, or 10 to 30",
                         c->page_bits);
    if (c->machine[0] == '\0')
        return rmig_fail(&w->error, RMIG_ERR_ARGUMENT, 0, "the machine has no name: QEMU would not load it");
    if (rmig_qemu_encode_start(out, sizeof out, c) < 0)
        return rmig_fail(&w->error, RMIG_ERR_ARGUMENT, 0, "the name of the machine must have 1 to %d bytes",
                         RMIG_NAME_MAX);
    if ((c->capabilities & RMIG_QEMU_CAPABILITY_IGNORE_SHARED) != 0)
        return rmig_fail(&w->error, RMIG_ERR_ARGUMENT, 0,
                         "the machine has the capability x-ignore-shared, with which no QEMU before 11.0 loads a file");
    if (w->opt.page_size != 0 && said != 0 && said != w->opt.page_size)
        return rmig_fail(&w->error, RMIG_ERR_ARGUMENT, 0, "page_bits %u of the machine: the page size is %llu",
                         c->page_bits, (unsigned long long)w->opt.page_size);
    if (w->opt.page_size == 0)
        w->opt.page_size = said != 0 ? said : 4096;
    return RMIG_OK;
}

static int rmig__writer_check_blocks(struct rmig_mapped_writer *w) {
    uint64_t left = INT64_MAX - w->opt.offset - RMIG_GIB; // of the file; the rest is for the stream
    if (w->blocks.count == 0)
        return rmig_fail(&w->error, RMIG_ERR_STATE, 0, "rmig_mapped_writer_start: no block was added");
    for (uint32_t i = 0; i < w->blocks.count; i++) {
        const struct rmig_block *b = &w->blocks.block[i];
        struct rmig__qemu_text name = rmig__mapped_name(b->name);
        if (b->length % w->opt.page_size != 0)
            return rmig_fail(&w->error, RMIG_ERR_ARGUMENT, 0,
                             "block \"%s\" of %llu bytes: must be a multiple of the page size, %llu", name.s,
                             (unsigned long long)b->length, (unsigned long long)w->opt.page_size);
        uint64_t align = rmig__max(w->opt.file_align, RMIG_MIB);
        if (b->length > left || left - b->length < b->length / 8192 + 2 * align)
            return rmig_fail(&w->error, RMIG_ERR_ARGUMENT, 0, "block \"%s\" of %llu bytes: no file is that long",
                             name.s, (unsigned long long)b->length);
        left -= b->length + b->length / 8192 + 2 * align;
    }
    return RMIG_OK;
}

static bool rmig__writer_allocate(struct rmig_mapped_writer *w) {
    uint64_t words = 0;
    for (uint32_t i = 0; i < w->blocks.count; i++)
        words += 2 * rmig__mapped_words(w->blocks.block[i].length / w->opt.page_size);
    w->place = (struct rmig__mapped_place *)rmig__calloc(w->blocks.count, sizeof *w->place);
    w->bits = (uint64_t *)rmig__calloc(words, sizeof *w->bits);
    if (w->place == NULL || w->bits == NULL) {
        rmig__release(w->place);
        rmig__release(w->bits);
        w->place = NULL;
        w->bits = NULL;
        return false;
    }
    uint64_t *at = w->bits;
    for (uint32_t i = 0; i < w->blocks.count; i++) {
        struct rmig__mapped_place *place = &w->place[i];
        place->dirty.pages = place->filled.pages = w->blocks.block[i].length / w->opt.page_size;
        place->dirty.bits = at;
        place->filled.bits = at + rmig__mapped_words(place->dirty.pages);
        at = place->filled.bits + rmig__mapped_words(place->dirty.pages);
    }
    return true;
}

/* Not when it has that length already: after it ext4 brings all to the disk at close. */
static int rmig__writer_set_length(struct rmig_mapped_writer *w, uint64_t length) {
    struct stat st;
    if (fstat(w->fd, &st) == 0 && (uint64_t)st.st_size == length)
        return RMIG_OK;
    if (ftruncate(w->fd, (off_t)length) == 0)
        return RMIG_OK;
    return rmig_fail(&w->error, RMIG_ERR_FILE, errno, "the file cannot be given a length of %llu bytes: %s",
                     (unsigned long long)length, strerror(errno));
}

static int rmig__writer_sync(struct rmig_mapped_writer *w);

/* An older snapshot that is there must not be taken for this one while it is written, nor after a crash: its magic is
   gone from the disk before anything else is touched. */
static int rmig__writer_forget_older(struct rmig_mapped_writer *w) {
    static const uint8_t none[RMIG__QEMU_MAGIC_SIZE] = {0};
    struct rmig__mapped_io io;
    uint8_t is[sizeof none];
    ssize_t got = pread(w->fd, is, sizeof is, (off_t)w->opt.offset);
    if (got >= 0 && memcmp(is, none, (size_t)got) == 0)
        return RMIG_OK;
    rmig__mapped_io_init(&io, w->fd, -1);
    int status = rmig__mapped_put(&io, none, sizeof none, w->opt.offset);
    if (status == RMIG_OK)
        return rmig__writer_sync(w);
    w->error = io.error;
    return status;
}

static int rmig__writer_check_device(struct rmig_mapped_writer *w, uint64_t end) {
    if (end <= w->device_size)
        return RMIG_OK;
    return rmig_fail(&w->error, RMIG_ERR_FILE, ENOSPC,
                     "the device has %llu bytes; the RAM takes those up to %llu, and the device state follows",
                     (unsigned long long)w->device_size, (unsigned long long)end);
}

/* Of the file nothing stays but what lies before the stream. With its whole length from the beginning io_uring need not
   wait for one transfer before the next (measured on ext4: 1.3 times as fast); without it, that is slower. */
static int rmig__writer_cut(struct rmig_mapped_writer *w, uint64_t end) {
    struct rmig__mapped_io io;
    struct rmig__mapped_ring ring;
    int status = w->device_size > 0 ? rmig__writer_check_device(w, end) : RMIG_OK;
    if (status == RMIG_OK)
        status = rmig__writer_forget_older(w);
    if (status != RMIG_OK || w->device_size > 0)
        return status;
    status = rmig__writer_set_length(w, w->opt.offset);
    if (status != RMIG_OK || w->opt.no_uring || w->direct_fd < 0)
        return status;
    rmig__mapped_io_init(&io, w->fd, -1);
    rmig__mapped_ring_open(&io, &ring);
    if (io.ring != NULL)
        status = rmig__writer_set_length(w, end);
    rmig__mapped_io_end(&io);
    return status;
}

/* Where all lies in the file, and *end of it. */
static int rmig__writer_lay_out(struct rmig_mapped_writer *w, const struct rmig_mapped_machine *machine,
                                uint64_t *end) {
    int status = rmig__writer_check_machine(w, machine);
    if (status == RMIG_OK)
        status = rmig__writer_check_blocks(w);
    if (status != RMIG_OK)
        return status;
    w->opt.file_align = rmig__max(w->opt.file_align == 0 ? RMIG_MIB : w->opt.file_align, w->opt.page_size);
    if (!rmig__writer_allocate(w))
        return rmig_fail(&w->error, RMIG_ERR_NO_MEMORY, 0, "out of memory for the bitmaps of %u blocks",
                         w->blocks.count);
    w->machine = *machine;
    w->machine.configuration.capabilities |= RMIG_QEMU_CAPABILITY_MAPPED_RAM;
    struct rmig__mapped_walk walk = {w, w->opt.offset, false};
    rmig_qemu_reader_jump(&w->check, w->opt.offset);
    status = rmig__walk(&walk);
    *end = walk.at;
    return status;
}

static void rmig__writer_not_laid_out(struct rmig_mapped_writer *w, const struct rmig_mapped_options *before) {
    w->opt = *before;
    rmig__release(w->place);
    rmig__release(w->bits);
    w->place = NULL;
    w->bits = NULL;
    rmig_qemu_reader_init(&w->check, RMIG_QEMU_MAPPED_RAM);
}

RMIG__DEF int rmig_mapped_writer_start(struct rmig_mapped_writer *w, const struct rmig_mapped_machine *machine) {
    uint64_t end = 0;
    if (w == NULL)
        return RMIG_ERR_ARGUMENT;
    int status = rmig__writer_in(w, RMIG__MAPPED_ADDING, "rmig_mapped_writer_start");
    if (status != RMIG_OK)
        return status;
    if (machine == NULL)
        return rmig_fail(&w->error, RMIG_ERR_ARGUMENT, 0, "rmig_mapped_writer_start: machine is NULL");
    const struct rmig_mapped_options before = w->opt;
    status = rmig__writer_lay_out(w, machine, &end);
    if (status != RMIG_OK) {
        rmig__writer_not_laid_out(w, &before);
        return status;
    }
    status = rmig__writer_cut(w, end);
    w->end = end;
    w->state = RMIG__MAPPED_BETWEEN;
    return w->failed = status;
}

// --- rounds

RMIG__DEF int rmig_mapped_writer_begin_round(struct rmig_mapped_writer *w) {
    if (w == NULL)
        return RMIG_ERR_ARGUMENT;
    int status = rmig__writer_in(w, RMIG__MAPPED_BETWEEN, "rmig_mapped_writer_begin_round");
    if (status != RMIG_OK)
        return status;
    w->state = RMIG__MAPPED_IN_ROUND;
    w->round_before = w->round_began;
    w->round_began = rmig__mapped_now();
    w->written_before = w->stats.bytes_written;
    w->stats.round_bytes = w->stats.round_ns = w->stats.round_saved = 0;
    return RMIG_OK;
}

static int rmig__writer_may_save(struct rmig_mapped_writer *w, uint32_t block, const char *call) {
    int status = rmig__writer_in(w, RMIG__MAPPED_IN_ROUND, call);
    if (status == RMIG_OK && block >= w->blocks.count)
        return rmig_fail(&w->error, RMIG_ERR_ARGUMENT, 0, "%s: block %u; there are %u", call, block, w->blocks.count);
    return status;
}

static int rmig__writer_saved(struct rmig_mapped_writer *w, uint32_t block, uint64_t pending_before) {
    uint64_t bytes = (w->place[block].dirty.pending - pending_before) * w->opt.page_size;
    w->stats.bytes_pending += bytes;
    w->stats.round_saved += bytes;
    return RMIG_OK;
}

static int rmig__writer_save_range(struct rmig_mapped_writer *w, uint32_t block, uint64_t offset, uint64_t length) {
    int status = rmig__writer_may_save(w, block, "rmig_mapped_writer_save_range");
    if (status != RMIG_OK || length == 0)
        return status;
    struct rmig__qemu_text name = rmig__mapped_name(w->blocks.block[block].name);
    uint64_t whole = w->blocks.block[block].length;
    if (offset >= whole || length > whole - offset)
        return rmig_fail(&w->error, RMIG_ERR_ARGUMENT, 0,
                         "rmig_mapped_writer_save_range: %llu bytes at %llu are outside block \"%s\" of %llu bytes",
                         (unsigned long long)length, (unsigned long long)offset, name.s, (unsigned long long)whole);
    struct rmig_merge *dirty = &w->place[block].dirty;
    uint64_t before = dirty->pending, first = offset / w->opt.page_size;
    rmig_merge_add(dirty, first, (offset + length - 1) / w->opt.page_size - first + 1);
    return rmig__writer_saved(w, block, before);
}

static int rmig__writer_save_bitmap(struct rmig_mapped_writer *w, uint32_t block, const uint64_t *bitmap,
                                    uint64_t first_page, uint64_t pages) {
    int status = rmig__writer_may_save(w, block, "rmig_mapped_writer_save_bitmap");
    if (status != RMIG_OK || pages == 0)
        return status;
    struct rmig_merge *dirty = &w->place[block].dirty;
    struct rmig__qemu_text name = rmig__mapped_name(w->blocks.block[block].name);
    if (bitmap == NULL)
        return rmig_fail(&w->error, RMIG_ERR_ARGUMENT, 0, "rmig_mapped_writer_save_bitmap: bitmap is NULL");
    if (first_page >= dirty->pages || pages > dirty->pages - first_page)
        return rmig_fail(
            &w->error, RMIG_ERR_ARGUMENT, 0,
            "rmig_mapped_writer_save_bitmap: %llu pages from page %llu on are outside block \"%s\" of %llu "
            "pages",
            (unsigned long long)pages, (unsigned long long)first_page, name.s, (unsigned long long)dirty->pages);
    uint64_t before = dirty->pending;
    rmig_merge_add_bitmap(dirty, first_page, bitmap, pages);
    return rmig__writer_saved(w, block, before);
}

RMIG__DEF int rmig_mapped_writer_save_range(struct rmig_mapped_writer *w, uint32_t block, uint64_t offset,
                                            uint64_t length) {
    return w == NULL ? RMIG_ERR_ARGUMENT : rmig__writer_note(w, rmig__writer_save_range(w, block, offset, length));
}

RMIG__DEF int rmig_mapped_writer_save_page(struct rmig_mapped_writer *w, uint32_t block, uint64_t offset) {
    return rmig_mapped_writer_save_range(w, block, offset, 1);
}

RMIG__DEF int rmig_mapped_writer_save_bitmap(struct rmig_mapped_writer *w, uint32_t block, const uint64_t *bitmap,
                                             uint64_t first_page, uint64_t pages) {
    if (w == NULL)
        return RMIG_ERR_ARGUMENT;
    return rmig__writer_note(w, rmig__writer_save_bitmap(w, block, bitmap, first_page, pages));
}

/* Pages to be written next. */
struct rmig__mapped_extent {
    uint32_t block;
    uint64_t first, n;
    bool hole; // all zero, and not to be read
};

static bool rmig__writer_detects(const struct rmig_mapped_writer *w, const struct rmig_block *b) {
    return !w->opt.no_zero_detect && b->backing != RMIG_BACKING_DMABUF;
}

/* With the lock. False: nothing is left. */
static bool rmig__writer_take(struct rmig_mapped_writer *w, struct rmig__mapped_extent *e) {
    uint64_t page = w->opt.page_size, most = rmig__max(RMIG__MAPPED_UNIT / page, 1);
    while (w->at_block < w->blocks.count &&
           !rmig_merge_next(&w->place[w->at_block].dirty, w->at_page, w->place[w->at_block].dirty.pages, most,
                            &e->first, &e->n)) {
        w->at_block++;
        w->at_page = 0;
    }
    if (w->at_block == w->blocks.count)
        return false;
    const struct rmig_block *b = &w->blocks.block[w->at_block];
    e->block = w->at_block;
    e->hole = false;
    if (rmig__writer_detects(w, b)) {
        uint64_t data = rmig__mapped_data_at(&w->holes, b, e->block, e->first * page, page);
        e->hole = data >= (e->first + 1) * page;
        uint64_t stop = e->hole ? data / page : (w->holes.known.end - 1) / page + 1;
        e->n = rmig__min(e->n, stop - e->first);
    }
    rmig_merge_take(&w->place[e->block].dirty, e->first, e->n);
    w->at_page = e->first + e->n;
    return true;
}

static void rmig__writer_rate(struct rmig_mapped_writer *w) {
    uint64_t written = w->stats.bytes_written - w->written_before;
    if (written > 0 && w->stats.round_ns > 0)
        w->stats.throughput = (uint64_t)((double)written * 1e9 / (double)w->stats.round_ns);
}

/* With the lock. */
static void rmig__writer_count(struct rmig_mapped_writer *w, uint64_t pages, bool zero) {
    uint64_t bytes = pages * w->opt.page_size;
    w->stats.bytes_pending -= bytes;
    w->stats.round_bytes += bytes;
    w->stats.round_ns = rmig__mapped_now() - w->round_began;
    if (zero) {
        w->stats.pages_zero += pages;
        w->stats.bytes_zero += bytes;
    } else {
        w->stats.pages_written += pages;
        w->stats.bytes_written += bytes;
        w->stats.writes_posted++;
        rmig__writer_rate(w);
    }
}

/* Pages that became zero lose their bits, and what the file held of them; where that cannot be given back, it stays
   and means nothing. */
static void rmig__writer_clear(struct rmig__mapped_crew *c, const struct rmig__mapped_extent *e) {
    struct rmig_mapped_writer *w = (struct rmig_mapped_writer *)c->job;
    struct rmig__mapped_place *place = &w->place[e->block];
    uint64_t page = w->opt.page_size, first = 0, n = 0;
    for (bool found = true; found;) {
        pthread_mutex_lock(&c->lock);
        found = rmig_merge_next(&place->filled, e->first, e->first + e->n, e->n, &first, &n);
        if (found)
            rmig_merge_take(&place->filled, first, n);
        else
            rmig__writer_count(w, e->n, true);
        pthread_mutex_unlock(&c->lock);
        if (found)
            syscall(SYS_fallocate, w->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                    place->pages_offset + first * page, n * page);
    }
}

static int rmig__writer_write(struct rmig__mapped_crew *c, struct rmig__mapped_io *io,
                              const struct rmig__mapped_extent *e) {
    struct rmig_mapped_writer *w = (struct rmig_mapped_writer *)c->job;
    const struct rmig_block *b = &w->blocks.block[e->block];
    uint64_t at = e->first * w->opt.page_size;
    io->block = b->name;
    int status =
        rmig__mapped_post(io, true, b->host + at, e->n * w->opt.page_size, w->place[e->block].pages_offset + at);
    if (status != RMIG_OK)
        return status;
    pthread_mutex_lock(&c->lock);
    rmig_merge_add(&w->place[e->block].filled, e->first, e->n);
    rmig__writer_count(w, e->n, false);
    pthread_mutex_unlock(&c->lock);
    return RMIG_OK;
}

/* Moves one extent: runs of zero pages, and runs of others. */
static int rmig__writer_step(struct rmig__mapped_crew *c, struct rmig__mapped_io *io) {
    struct rmig_mapped_writer *w = (struct rmig_mapped_writer *)c->job;
    struct rmig__mapped_extent e, run;
    size_t page = (size_t)w->opt.page_size;
    memset(&e, 0, sizeof e);
    pthread_mutex_lock(&c->lock);
    bool some = rmig__writer_take(w, &e);
    pthread_mutex_unlock(&c->lock);
    if (!some)
        return RMIG_OK;
    const struct rmig_block *b = &w->blocks.block[e.block];
    bool detects = rmig__writer_detects(w, b);
    run = e;
    for (uint64_t at = e.first, end = e.first + e.n; at < end; at += run.n) {
        bool zero = e.hole || (detects && rmig_is_zero(b->host + at * page, page));
        run.first = at;
        run.n = e.hole || !detects ? e.n : 1;
        while (at + run.n < end && rmig_is_zero(b->host + (at + run.n) * page, page) == zero)
            run.n++;
        int status = RMIG_OK;
        if (zero)
            rmig__writer_clear(c, &run);
        else
            status = rmig__writer_write(c, io, &run);
        if (status != RMIG_OK)
            return status;
    }
    return RMIG_PENDING;
}

static void rmig__writer_round_stats(struct rmig_mapped_writer *w) {
    uint64_t now = rmig__mapped_now(), since = w->round_before == 0 ? 0 : w->round_began - w->round_before;
    w->stats.rounds++;
    w->stats.round_ns = now - w->round_began;
    rmig__writer_rate(w);
    w->stats.dirty_rate = since == 0 ? 0 : (uint64_t)((double)w->stats.round_saved * 1e9 / (double)since);
}

RMIG__DEF int rmig_mapped_writer_end_round(struct rmig_mapped_writer *w) {
    struct rmig__mapped_crew crew;
    int status = w == NULL ? RMIG_ERR_ARGUMENT : rmig__writer_complete(w);
    if (status == RMIG_OK)
        status = rmig__writer_in(w, RMIG__MAPPED_IN_ROUND, "rmig_mapped_writer_end_round");
    if (status != RMIG_OK)
        return status;
    w->at_block = 0;
    w->at_page = 0;
    rmig__mapped_forget(&w->holes);
    memset(&crew, 0, sizeof crew);
    crew.step = rmig__writer_step;
    crew.job = w;
    crew.fd = w->fd;
    crew.direct_fd = w->direct_fd;
    crew.options = &w->opt;
    crew.stats = &w->stats;
    w->failed = rmig__mapped_run(&crew, w->stats.bytes_pending, &w->error);
    if (w->failed != RMIG_OK)
        return w->failed;
    rmig__writer_round_stats(w);
    w->state = RMIG__MAPPED_BETWEEN;
    return RMIG_OK;
}

// --- the end

static int rmig__writer_put(struct rmig_mapped_writer *w, const void *data, size_t n) {
    struct rmig__mapped_io io;
    struct rmig_qemu_event ev;
    const uint8_t *p = (const uint8_t *)data;
    int status = w->state == RMIG__MAPPED_IN_ROUND ? w->failed
                                                   : rmig__writer_in(w, RMIG__MAPPED_BETWEEN, "rmig_mapped_writer_put");
    if (status != RMIG_OK || n == 0)
        return status;
    if (data == NULL)
        return rmig_fail(&w->error, RMIG_ERR_ARGUMENT, 0, "rmig_mapped_writer_put: data is NULL, of %zu bytes", n);
    rmig__mapped_io_init(&io, w->fd, -1);
    status = rmig__mapped_put(&io, p, n, w->end);
    if (status != RMIG_OK) {
        w->error = io.error;
        return w->failed = status;
    }
    for (size_t at = 0; at < n;) { // once the END of ram is over any byte is taken
        int64_t used = rmig_qemu_reader_feed(&w->check, p + at, n - at, &ev);
        RMIG_ASSERT(used >= 0);
        at += (size_t)used;
    }
    w->end += n;
    w->stats.stream_bytes += n;
    return RMIG_OK;
}

RMIG__DEF int rmig_mapped_writer_put(struct rmig_mapped_writer *w, const void *data, size_t n) {
    return w == NULL ? RMIG_ERR_ARGUMENT : rmig__writer_note(w, rmig__writer_put(w, data, n));
}

static int rmig__writer_sync(struct rmig_mapped_writer *w) {
    int done;
    if (w->opt.no_sync)
        return RMIG_OK;
    do
        done = fsync(w->fd);
    while (done < 0 && errno == EINTR);
    if (done == 0)
        return RMIG_OK;
    return rmig_fail(&w->error, RMIG_ERR_FILE, errno, "the file cannot be brought to the disk: %s", strerror(errno));
}

static int rmig__writer_bitmaps(struct rmig_mapped_writer *w) {
    struct rmig__mapped_io io;
    rmig__mapped_io_init(&io, w->fd, -1);
    for (uint32_t i = 0; i < w->blocks.count; i++) {
        struct rmig__mapped_place *place = &w->place[i];
        int status = rmig__mapped_put(&io, place->filled.bits, rmig__mapped_words(place->filled.pages) * 8,
                                      place->bitmap_offset);
        if (status != RMIG_OK) {
            w->error = io.error;
            return status;
        }
    }
    return RMIG_OK;
}

static int rmig__writer_magic(struct rmig_mapped_writer *w) {
    struct rmig__mapped_io io;
    rmig__mapped_io_init(&io, w->fd, -1);
    int status = rmig__mapped_put(&io, rmig__qemu_magic, sizeof rmig__qemu_magic, w->opt.offset);
    if (status != RMIG_OK)
        w->error = io.error;
    return status;
}

RMIG__DEF uint64_t rmig_mapped_writer_size(const struct rmig_mapped_writer *w) { return w == NULL ? 0 : w->end; }

RMIG__DEF int rmig_mapped_writer_finish(struct rmig_mapped_writer *w) {
    struct rmig_qemu_event ev;
    int status = w == NULL ? RMIG_ERR_ARGUMENT : rmig__writer_complete(w);
    if (status == RMIG_OK)
        status = rmig__writer_in(w, RMIG__MAPPED_BETWEEN, "rmig_mapped_writer_finish");
    if (status != RMIG_OK)
        return status;
    rmig_qemu_reader_end_message(&w->check, &ev);
    if (ev.type != RMIG_QEV_END)
        return rmig_fail(&w->error, RMIG_ERR_STATE, 0,
                         "rmig_mapped_writer_finish: the device state (%llu bytes) does not end in a description in "
                         "JSON, without which no reader knows that it is whole: see rmig_qemu_encode_end",
                         (unsigned long long)w->stats.stream_bytes);
    if (w->check.first_end_ != w->check.offset_) // of all readers ours stops there
        return rmig_fail(&w->error, RMIG_ERR_STATE, 0,
                         "rmig_mapped_writer_finish: the device state holds what looks like its end, %llu bytes before "
                         "it ends: no reader could tell it from a file to which something was appended",
                         (unsigned long long)(w->check.offset_ - w->check.first_end_));
    struct rmig__mapped_walk walk = {w, w->opt.offset, true};
    status = rmig__writer_bitmaps(w);
    if (status == RMIG_OK)
        status = rmig__walk(&walk);
    if (status == RMIG_OK)
        status = rmig__writer_sync(w);
    if (status == RMIG_OK)
        status = rmig__writer_magic(w);
    if (status == RMIG_OK)
        status = rmig__writer_sync(w);
    w->failed = status;
    if (status == RMIG_OK)
        w->state = RMIG__MAPPED_FINISHED;
    return status;
}

// >>mapped: reader, implementation

/* A part of the file that belongs to something. */
struct rmig__mapped_region {
    uint64_t start, end;
    uint32_t block;
    char kind; // stream 's' (of a block: its entry), bitmap 'b', pages 'p'
};

struct rmig__mapped_source {
    struct rmig_mapped_block info;
    char name[RMIG_NAME_MAX + 1];
    bool added; // to be loaded
    uint32_t target; // index of the memory
};

struct rmig__lazy;

struct rmig_mapped_reader {
    int fd, direct_fd;
    struct rmig_mapped_options opt;
    struct stat st; // when it was opened
    struct rmig_mapped_machine machine;
    struct rmig__mapped_source *source;
    const struct rmig__mapped_source **by_name; // sorted
    struct rmig_mapped_block *info; // of the sources, as handed out
    struct rmig__mapped_region *region;
    uint32_t count, capacity, region_count;
    struct rmig_blocks targets;
    uint64_t state_offset, state_at;
    uint64_t end; // of the device state, once it is known
    uint32_t at_block; // load: the next page
    uint64_t at_page;
    struct rmig__mapped_holes holes;
    struct rmig_stats stats;
    struct rmig_error error, why; // why it is not whole
    struct rmig_error refused; // the first add_block that was, until it is forgiven
    struct rmig__lazy *lazy; // load_start; NULL: not begun
    int failed; // the reader is of no use any more
};

static void rmig__lazy_close(struct rmig__lazy *l);

RMIG__DEF const struct rmig_error *rmig_mapped_reader_error(const struct rmig_mapped_reader *r) {
    return r == NULL ? rmig__mapped_null() : &r->error;
}

RMIG__DEF bool rmig_mapped_reader_whole(const struct rmig_mapped_reader *r) {
    return r != NULL && r->why.status == RMIG_OK;
}

RMIG__DEF const struct rmig_mapped_machine *rmig_mapped_reader_machine(const struct rmig_mapped_reader *r) {
    return r == NULL ? NULL : &r->machine;
}

RMIG__DEF void rmig_mapped_reader_forgive(struct rmig_mapped_reader *r) {
    if (r != NULL)
        memset(&r->refused, 0, sizeof r->refused);
}

RMIG__DEF uint32_t rmig_mapped_reader_blocks(const struct rmig_mapped_reader *r,
                                             const struct rmig_mapped_block **blocks) {
    if (blocks != NULL)
        *blocks = r == NULL ? NULL : r->info;
    return r == NULL ? 0 : r->count;
}

static uint64_t rmig__reader_size(const struct rmig_mapped_reader *r) { return (uint64_t)r->st.st_size; }

/* The status of a call that may have ended the reader. */
static int rmig__reader_done(struct rmig_mapped_reader *r, int status) {
    if (status <= RMIG_SESSION_ERRORS)
        r->failed = status;
    return status;
}

static int rmig__reader_read(struct rmig_mapped_reader *r, void *p, uint64_t n, uint64_t at, const char *block) {
    struct rmig__mapped_io io;
    rmig__mapped_io_init(&io, r->fd, -1);
    io.block = block;
    int status = rmig__mapped_transfer(&io, false, p, n, at);
    if (status != RMIG_OK)
        r->error = io.error;
    return status;
}

/* As rmig__reader_read, for opening: how much there is to read is for the file to say, so each piece may be the last.
 */
static int rmig__reader_look(struct rmig_mapped_reader *r, void *p, uint64_t n, uint64_t at, const char *block) {
    if (r->opt.progress != NULL && r->opt.progress(r->opt.progress_user, &r->stats) != 0) {
        rmig_fail(&r->error, RMIG_ERR_CANCELLED, 0, "cancelled by the function progress");
        return RMIG_ERR_CANCELLED;
    }
    return rmig__reader_read(r, p, n, at, block);
}

/* What was read is of one file only if nobody wrote to it meanwhile. */
static int rmig__mapped_unchanged(int fd, const struct stat *before, struct rmig_error *err) {
    struct stat st;
    if (S_ISBLK(before->st_mode)) // which tells nobody that it was written to
        return RMIG_OK;
    if (fstat(fd, &st) < 0)
        return rmig_fail(err, RMIG_ERR_FILE, errno, "the file: %s", strerror(errno));
    if (st.st_size == before->st_size && st.st_mtim.tv_sec == before->st_mtim.tv_sec &&
        st.st_mtim.tv_nsec == before->st_mtim.tv_nsec)
        return RMIG_OK;
    return rmig_fail(err, RMIG_ERR_FILE, 0,
                     "the file was changed while it was read: it had %lld bytes and has %lld now",
                     (long long)before->st_size, (long long)st.st_size);
}

// --- checks of a block

static bool rmig__reader_reserve(struct rmig_mapped_reader *r) {
    if (r->count < r->capacity)
        return true;
    uint32_t wanted = r->capacity == 0 ? 16 : 2 * r->capacity;
    void *source = RMIG_REALLOC(r->source, wanted * sizeof *r->source);
    if (source == NULL)
        return false;
    r->source = (struct rmig__mapped_source *)source;
    void *region = RMIG_REALLOC(r->region, (3 * (size_t)wanted + 2) * sizeof *r->region);
    if (region == NULL)
        return false;
    r->region = (struct rmig__mapped_region *)region;
    r->capacity = wanted;
    return true;
}

static void rmig__reader_region(struct rmig_mapped_reader *r, uint64_t start, uint64_t end, char kind) {
    struct rmig__mapped_region *region = &r->region[r->region_count++];
    region->start = start;
    region->end = end;
    region->block = r->count;
    region->kind = kind;
}

static int rmig__reader_check_page_size(struct rmig_mapped_reader *r, const char *name, uint64_t page) {
    uint32_t bits = r->machine.configuration.page_bits;
    if (!rmig__mapped_in_range(page, RMIG_KIB, RMIG_GIB))
        return rmig_fail(&r->error, RMIG_ERR_WIRE, 0,
                         "block \"%s\": page size %llu; must be a power of two from 1024 to 1073741824", name,
                         (unsigned long long)page);
    if (bits != 0 && page != (uint64_t)1 << bits)
        return rmig_fail(&r->error, RMIG_ERR_WIRE, 0,
                         "block \"%s\": page size %llu; the configuration of the machine says pages of %u bits", name,
                         (unsigned long long)page, bits);
    if (r->opt.page_size != 0 && page != r->opt.page_size)
        return rmig_fail(&r->error, RMIG_ERR_WIRE, 0, "block \"%s\": page size %llu; wanted are pages of %llu bytes",
                         name, (unsigned long long)page, (unsigned long long)r->opt.page_size);
    if (r->count > 0 && page != r->source[0].info.page_size)
        return rmig_fail(&r->error, RMIG_ERR_WIRE, 0, "block \"%s\": page size %llu; other blocks have %llu", name,
                         (unsigned long long)page, (unsigned long long)r->source[0].info.page_size);
    return RMIG_OK;
}

static int rmig__reader_check_place(struct rmig_mapped_reader *r, const char *name, const struct rmig_mapped_block *b) {
    uint64_t size = rmig__reader_size(r), bitmap = rmig__mapped_words(b->length / b->page_size) * 8;
    if (b->bitmap_offset < r->opt.offset || b->pages_offset < r->opt.offset)
        return rmig_fail(&r->error, RMIG_ERR_WIRE, 0,
                         "block \"%s\": its bitmap is at file offset %llu, its pages at %llu: before the stream, "
                         "which begins at %llu",
                         name, (unsigned long long)b->bitmap_offset, (unsigned long long)b->pages_offset,
                         (unsigned long long)r->opt.offset);
    if (b->pages_offset % b->page_size != 0)
        return rmig_fail(&r->error, RMIG_ERR_WIRE, 0,
                         "block \"%s\": its pages begin at file offset %llu; must be a multiple of the page size, %llu",
                         name, (unsigned long long)b->pages_offset, (unsigned long long)b->page_size);
    if (b->bitmap_offset > size || bitmap > size - b->bitmap_offset)
        return rmig_fail(
            &r->error, RMIG_ERR_WIRE, 0,
            "block \"%s\": its bitmap, %llu bytes at file offset %llu, lies outside the file of %llu bytes", name,
            (unsigned long long)bitmap, (unsigned long long)b->bitmap_offset, (unsigned long long)size);
    if (b->pages_offset > size || b->length > size - b->pages_offset)
        return rmig_fail(&r->error, RMIG_ERR_WIRE, 0,
                         "block \"%s\": its pages, %llu bytes at file offset %llu, lie outside the file of %llu bytes: "
                         "it is cut off, or was not finished",
                         name, (unsigned long long)b->length, (unsigned long long)b->pages_offset,
                         (unsigned long long)size);
    return RMIG_OK;
}

/* Counts the pages of a bitmap, and looks at the bits behind the last one. Holes in it are not read: a file with large
   ones costs nothing. */
static int rmig__reader_check_bitmap(struct rmig_mapped_reader *r, const char *name, struct rmig_mapped_block *b) {
    uint64_t word[512], pages = b->length / b->page_size, end = rmig__mapped_words(pages);
    for (uint64_t at = 0, n; at < end; at += n) {
        off_t data = lseek(r->fd, (off_t)(b->bitmap_offset + at * 8), RMIG__SEEK_DATA);
        if (data < 0 && errno == ENXIO)
            return RMIG_OK;
        if (data >= 0 && (uint64_t)data > b->bitmap_offset + at * 8)
            at = rmig__min(((uint64_t)data - b->bitmap_offset) / 8, end);
        n = rmig__min(end - at, sizeof word / sizeof word[0]);
        int status = rmig__reader_look(r, word, n * 8, b->bitmap_offset + at * 8, name);
        if (status != RMIG_OK)
            return status;
        uint64_t last = n > 0 ? word[n - 1] : 0, mask = rmig__word_mask(0, pages % 64);
        bool ends = n > 0 && at + n == end && pages % 64 != 0;
        if (ends)
            word[n - 1] &= mask;
        for (uint64_t i = 0; i < n; i++)
            b->pages_set += rmig__popcount(word[i]);
        if (ends && (last & ~mask) != 0)
            return rmig_fail(&r->error, RMIG_ERR_WIRE, 0,
                             "block \"%s\": its bitmap, at file offset %llu, has bits behind its last page (last word "
                             "%016llx, %llu pages): damaged, or of a host of another byte order",
                             name, (unsigned long long)b->bitmap_offset, (unsigned long long)last,
                             (unsigned long long)pages);
    }
    return RMIG_OK;
}

static int rmig__reader_fill_block(struct rmig_mapped_reader *r, const struct rmig_qemu_block *in, uint64_t entry) {
    struct rmig__mapped_source *s = &r->source[r->count];
    struct rmig_mapped_block *b = &s->info;
    struct rmig__qemu_text name = rmig__mapped_name(in->name);
    bool shares = (r->machine.configuration.capabilities & RMIG_QEMU_CAPABILITY_IGNORE_SHARED) != 0;
    memset(s, 0, sizeof *s);
    memcpy(s->name, in->name, sizeof s->name);
    b->length = in->length;
    b->guest_address = in->guest_address;
    b->entry_offset = entry;
    b->page_size = in->mapped.page_size;
    b->bitmap_offset = in->mapped.bitmap_offset;
    b->pages_offset = in->mapped.pages_offset;
    b->ignored = shares && b->bitmap_offset == 0 && b->pages_offset == 0;
    if (in->mapped.version != RMIG__MAPPED_VERSION)
        return rmig_fail(&r->error, RMIG_ERR_WIRE, 0, "block \"%s\": mapped-ram header of version %u; must be %d",
                         name.s, in->mapped.version, RMIG__MAPPED_VERSION);
    int status = rmig__reader_check_page_size(r, name.s, b->page_size);
    if (status == RMIG_OK && b->length % b->page_size != 0)
        return rmig_fail(&r->error, RMIG_ERR_WIRE, 0,
                         "block \"%s\" of %llu bytes: must be a multiple of the page size, "
                         "%llu",
                         name.s, (unsigned long long)b->length, (unsigned long long)b->page_size);
    if (status == RMIG_OK && !b->ignored)
        status = rmig__reader_check_place(r, name.s, b);
    return status;
}

static int rmig__mapped_by_start(const void *a, const void *b) {
    const struct rmig__mapped_region *x = (const struct rmig__mapped_region *)a;
    const struct rmig__mapped_region *y = (const struct rmig__mapped_region *)b;
    return x->start < y->start ? -1 : x->start > y->start;
}

static int rmig__mapped_by_name(const void *a, const void *b) {
    return strcmp((*(const struct rmig__mapped_source *const *)a)->name,
                  (*(const struct rmig__mapped_source *const *)b)->name);
}

static const char *rmig__mapped_region_name(const struct rmig_mapped_reader *r, const struct rmig__mapped_region *x,
                                            char *buf, size_t n) {
    if (x->block >= r->count)
        snprintf(buf, n, "the end of the stream");
    else
        snprintf(buf, n, "the %s of block \"%s\"",
                 x->kind == 'p'   ? "pages"
                 : x->kind == 'b' ? "bitmap"
                                  : "entry",
                 rmig__mapped_name(r->source[x->block].name).s);
    return buf;
}

static int rmig__reader_check_overlaps(struct rmig_mapped_reader *r) {
    char one[100], two[100];
    if (r->region_count > 0)
        qsort(r->region, r->region_count, sizeof *r->region, rmig__mapped_by_start);
    for (uint32_t i = 1; i < r->region_count; i++) {
        const struct rmig__mapped_region *x = &r->region[i - 1], *y = &r->region[i];
        if (x->end > y->start)
            return rmig_fail(&r->error, RMIG_ERR_WIRE, 0, "%s and %s overlap at file offset %llu",
                             rmig__mapped_region_name(r, x, one, sizeof one),
                             rmig__mapped_region_name(r, y, two, sizeof two), (unsigned long long)y->start);
    }
    return RMIG_OK;
}

static int rmig__reader_sort_names(struct rmig_mapped_reader *r) {
    r->by_name = (const struct rmig__mapped_source **)rmig__calloc(r->count, sizeof *r->by_name);
    if (r->by_name == NULL)
        return rmig_fail(&r->error, RMIG_ERR_NO_MEMORY, 0, "out of memory for %u blocks", r->count);
    for (uint32_t i = 0; i < r->count; i++)
        r->by_name[i] = &r->source[i];
    qsort(r->by_name, r->count, sizeof *r->by_name, rmig__mapped_by_name);
    return RMIG_OK;
}

static int rmig__reader_check_names(struct rmig_mapped_reader *r) {
    int status = rmig__reader_sort_names(r);
    for (uint32_t i = 1; i < r->count && status == RMIG_OK; i++)
        if (strcmp(r->by_name[i - 1]->name, r->by_name[i]->name) == 0)
            status = rmig_fail(&r->error, RMIG_ERR_WIRE, 0, "block \"%s\" comes twice",
                               rmig__mapped_name(r->by_name[i]->name).s);
    return status;
}

// --- the stream

/* Where the reading of the stream stands. */
struct rmig__mapped_parse {
    struct rmig_qemu_reader q;
    uint64_t at; // of the next byte
    uint64_t stretch; // where the bytes since the last jump begin
    bool jumped;
};

static int rmig__reader_on_block(struct rmig_mapped_reader *r, struct rmig__mapped_parse *p,
                                 const struct rmig_qemu_block *block) {
    if (!rmig__reader_reserve(r))
        return rmig_fail(&r->error, RMIG_ERR_NO_MEMORY, 0, "out of memory for %u blocks", r->count + 1);
    int status = rmig__reader_fill_block(r, block, p->stretch);
    if (status != RMIG_OK)
        return status;
    const struct rmig_mapped_block *b = &r->source[r->count].info;
    if (!b->ignored) {
        rmig__reader_region(r, p->stretch, p->at, 's');
        rmig__reader_region(r, b->bitmap_offset, b->bitmap_offset + rmig__mapped_words(b->length / b->page_size) * 8,
                            'b');
        rmig__reader_region(r, b->pages_offset, b->pages_offset + b->length, 'p');
        p->at = p->stretch = b->pages_offset + b->length;
        p->jumped = true;
        rmig_qemu_reader_jump(&p->q, p->at);
    }
    r->count++;
    return RMIG_OK;
}

static int rmig__reader_on_configuration(struct rmig_mapped_reader *r, const struct rmig_qemu_configuration *c) {
    r->machine.configuration = *c;
    if ((c->capabilities & RMIG_QEMU_CAPABILITY_MAPPED_RAM) != 0)
        return RMIG_OK;
    return rmig_fail(&r->error, RMIG_ERR_WIRE, 0,
                     "the configuration does not list the capability mapped-ram: this is an ordinary migration stream, "
                     "with its pages in between");
}

static int rmig__reader_on_event(struct rmig_mapped_reader *r, struct rmig__mapped_parse *p,
                                 const struct rmig_qemu_event *ev) {
    switch (ev->type) {
    case RMIG_QEV_CONFIGURATION:
        return rmig__reader_on_configuration(r, ev->configuration);
    case RMIG_QEV_SECTION:
        r->machine.section_id = ev->section_id;
        return RMIG_OK;
    case RMIG_QEV_COMMAND:
        if (ev->command == RMIG_QEMU_COMMAND_SWITCHOVER_START)
            r->machine.switchover_start = true;
        return RMIG_OK;
    case RMIG_QEV_BLOCK:
        return rmig__reader_on_block(r, p, ev->block);
    case RMIG_QEV_RAM_OVER:
        r->state_offset = p->at;
        r->end = rmig__reader_size(r);
        return RMIG_OK;
    case RMIG_QEV_NONE:
    case RMIG_QEV_RAM_LIST:
    case RMIG_QEV_HOOK:
    case RMIG_QEV_EOS:
    case RMIG_QEV_FOOTER:
    case RMIG_QEV_STATE:
    case RMIG_QEV_END:
        return RMIG_OK;
    }
    return RMIG_OK;
}

/* Feeds n bytes, or those up to a jump. */
static int rmig__reader_feed(struct rmig_mapped_reader *r, struct rmig__mapped_parse *p, const uint8_t *bytes,
                             size_t n) {
    struct rmig_qemu_event ev;
    p->jumped = false;
    do {
        int64_t used = rmig_qemu_reader_feed(&p->q, bytes, n, &ev);
        if (used < 0) {
            r->error = p->q.error;
            return (int)used;
        }
        bytes += used;
        n -= (size_t)used;
        p->at += (uint64_t)used;
        int status = rmig__reader_on_event(r, p, &ev);
        if (status != RMIG_OK)
            return status;
    } while (ev.type != RMIG_QEV_NONE && !p->jumped);
    return RMIG_OK;
}

static int rmig__reader_check_magic(struct rmig_mapped_reader *r, uint64_t at) {
    static const uint8_t none[RMIG__QEMU_MAGIC_SIZE] = {0};
    uint8_t magic[RMIG__QEMU_MAGIC_SIZE];
    if (rmig__reader_size(r) < at || rmig__reader_size(r) - at < sizeof magic)
        return rmig_fail(&r->error, RMIG_ERR_WIRE, 0,
                         "the file has %llu bytes: no stream begins at offset %llu; its writer did not finish",
                         (unsigned long long)rmig__reader_size(r), (unsigned long long)at);
    int status = rmig__reader_look(r, magic, sizeof magic, at, NULL);
    if (status == RMIG_OK && memcmp(magic, none, sizeof magic) == 0)
        return rmig_fail(&r->error, RMIG_ERR_WIRE, 0,
                         "no magic at file offset %llu: it is written last, so the writer of this file did not finish",
                         (unsigned long long)at);
    return status;
}

/* Where the data at or behind an offset begins; the size of the file where there is none. */
static uint64_t rmig__reader_data(const struct rmig_mapped_reader *r, uint64_t at) {
    off_t data = lseek(r->fd, (off_t)at, RMIG__SEEK_DATA);
    if (data >= 0)
        return (uint64_t)data;
    return errno == ENXIO ? rmig__reader_size(r) : at; // some file systems and all devices know no holes
}

/* Where something other than zeros begins, from an offset on; the size of the file where nothing does. */
static int rmig__reader_nonzero(struct rmig_mapped_reader *r, uint64_t *at) {
    uint8_t piece[4096];
    uint64_t size = rmig__reader_size(r);
    while ((*at = rmig__reader_data(r, *at)) < size) {
        uint64_t n = rmig__min(sizeof piece, size - *at), i = 0;
        int status = rmig__reader_look(r, piece, n, *at, NULL);
        if (status != RMIG_OK)
            return status;
        while (i < n && piece[i] == 0)
            i++;
        *at += i;
        if (i < n)
            return RMIG_OK;
    }
    *at = size;
    return RMIG_OK;
}

/* The device state ends at the first end of a description: no file tells more, and what follows is of something else.
   On a block device that is what was there before. */
static int rmig__reader_check_end(struct rmig_mapped_reader *r) {
    uint8_t magic[RMIG__QEMU_MAGIC_SIZE] = {0};
    uint64_t size = rmig__reader_size(r), at = r->end;
    if (at == size || S_ISBLK(r->st.st_mode))
        return RMIG_OK;
    int status = rmig__reader_nonzero(r, &at);
    if (status == RMIG_OK && size - at >= sizeof magic)
        status = rmig__reader_look(r, magic, sizeof magic, at, NULL);
    if (status != RMIG_OK)
        return status;
    if (memcmp(magic, rmig__qemu_magic, sizeof magic) == 0)
        return rmig_fail(&r->error, RMIG_ERR_WIRE, 0,
                         "the snapshot ends at file offset %llu, and another one begins at file offset %llu: one of "
                         "them alone must be in the file",
                         (unsigned long long)r->end, (unsigned long long)at);
    return rmig_fail(&r->error, RMIG_ERR_WIRE, 0,
                     "the snapshot ends at file offset %llu, and something was appended: %s begins at file offset %llu",
                     (unsigned long long)r->end, at == size ? "a run of zeros" : "what is no snapshot",
                     (unsigned long long)(at == size ? r->end : at));
}

/* In the device state: a long hole is passed over, but for its last zeros. */
static void rmig__reader_pass_hole(struct rmig_mapped_reader *r, struct rmig__mapped_parse *p, uint64_t piece) {
    uint64_t data = rmig__reader_data(r, p->at);
    if (r->state_offset == 0 || data - p->at <= piece)
        return;
    p->at = data - piece;
    rmig_qemu_reader_jump(&p->q, p->at);
}

/* What follows the last block, and the end of what it is. */
static int rmig__reader_parse_end(struct rmig_mapped_reader *r, const struct rmig__mapped_parse *p) {
    if (r->state_offset == 0)
        return rmig_fail(&r->error, RMIG_ERR_WIRE, 0,
                         "the stream ends at file offset %llu, before the END of ram: the file is not whole",
                         (unsigned long long)p->at);
    if (p->q.first_end_ == 0)
        return rmig_fail(&r->error, RMIG_ERR_WIRE, 0,
                         "the device state, from file offset %llu to the end at %llu, does not end in a description: "
                         "the file is cut off, or something was appended",
                         (unsigned long long)r->state_offset, (unsigned long long)r->end);
    r->end = p->q.first_end_;
    return rmig__reader_check_end(r);
}

static int rmig__reader_parse(struct rmig_mapped_reader *r) {
    struct rmig__mapped_parse p;
    uint8_t piece[4096];
    uint64_t size = rmig__reader_size(r);
    memset(&p, 0, sizeof p);
    p.at = p.stretch = r->opt.offset;
    rmig_qemu_reader_init(&p.q, RMIG_QEMU_MAPPED_RAM);
    rmig_qemu_reader_jump(&p.q, p.at);
    int status = rmig__reader_check_magic(r, p.at);
    while (status == RMIG_OK && p.at < size && p.q.first_end_ == 0) {
        rmig__reader_pass_hole(r, &p, sizeof piece);
        size_t n = (size_t)rmig__min(sizeof piece, size - p.at);
        status = rmig__reader_look(r, piece, n, p.at, NULL);
        if (status == RMIG_OK)
            status = rmig__reader_feed(r, &p, piece, n);
    }
    if (status == RMIG_OK)
        status = rmig__reader_parse_end(r, &p);
    if (status != RMIG_OK)
        return status;
    if (!rmig__reader_reserve(r))
        return rmig_fail(&r->error, RMIG_ERR_NO_MEMORY, 0, "out of memory for %u blocks", r->count);
    rmig__reader_region(r, p.stretch, r->end, 's');
    if (r->count == 0)
        return rmig_fail(&r->error, RMIG_ERR_WIRE, 0, "the file has no block of RAM");
    return rmig__reader_check_names(r);
}

/* Of all blocks, once it is known that they overlap nowhere: so each byte of the file is looked at once at most. */
static int rmig__reader_check_bitmaps(struct rmig_mapped_reader *r) {
    int status = rmig__reader_check_overlaps(r);
    for (uint32_t i = 0; i < r->count && status == RMIG_OK; i++) {
        struct rmig__mapped_source *s = &r->source[i];
        if (!s->info.ignored)
            status = rmig__reader_check_bitmap(r, rmig__mapped_name(s->name).s, &s->info);
    }
    return status;
}

static int rmig__reader_hand_out(struct rmig_mapped_reader *r) {
    r->info = (struct rmig_mapped_block *)rmig__calloc(r->count, sizeof *r->info);
    if (r->info == NULL)
        return rmig_fail(&r->error, RMIG_ERR_NO_MEMORY, 0, "out of memory for %u blocks", r->count);
    for (uint32_t i = 0; i < r->count; i++) {
        r->source[i].info.name = r->source[i].name;
        r->info[i] = r->source[i].info;
    }
    return r->by_name != NULL ? RMIG_OK : rmig__reader_sort_names(r); // of a file that is not whole they were not
}

RMIG__DEF int rmig_mapped_reader_open(int fd, const struct rmig_mapped_options *options,
                                      struct rmig_mapped_reader **out, struct rmig_error *err) {
    struct rmig_mapped_options opt;
    struct stat st;
    memset(&opt, 0, sizeof opt);
    if (options != NULL)
        opt = *options;
    if (out == NULL)
        return rmig_fail(err, RMIG_ERR_ARGUMENT, 0, "rmig_mapped_reader_open: out is NULL");
    *out = NULL;
    int status = rmig__mapped_check_options(&opt, err);
    if (status == RMIG_OK)
        status = rmig__mapped_check_fd(fd, false, &st, err);
    if (status != RMIG_OK)
        return status;
    struct rmig_mapped_reader *r = (struct rmig_mapped_reader *)rmig__calloc(1, sizeof *r);
    if (r == NULL)
        return rmig_fail(err, RMIG_ERR_NO_MEMORY, 0, "out of memory for a reader");
    r->fd = fd;
    r->direct_fd = -1;
    r->opt = opt;
    r->opt.threads = opt.threads == 0 ? 1 : opt.threads;
    r->st = st;
    rmig_blocks_init(&r->targets);
    rmig_holes_open(&r->holes.holes);
    if (opt.direct)
        status = rmig__mapped_open_direct(fd, false, &r->direct_fd, &r->error);
    if (status == RMIG_OK)
        status = rmig__reader_parse(r);
    if (status == RMIG_OK || (status == RMIG_ERR_WIRE && opt.incomplete)) {
        struct rmig_error first = r->error;
        int bitmaps = rmig__reader_check_bitmaps(r);
        if (status == RMIG_OK || bitmaps == RMIG_ERR_CANCELLED)
            status = bitmaps;
        else
            r->error = first;
    }
    if (status == RMIG_ERR_WIRE && opt.incomplete) {
        r->why = r->error;
        status = RMIG_OK;
    }
    if (status == RMIG_OK)
        status = rmig__reader_hand_out(r);
    if (status != RMIG_OK) {
        rmig_fail(err, status, r->error.provider_code, "%s", r->error.text);
        rmig_mapped_reader_close(r);
        return status;
    }
    *out = r;
    return RMIG_OK;
}

RMIG__DEF void rmig_mapped_reader_close(struct rmig_mapped_reader *r) {
    if (r == NULL)
        return;
    rmig__lazy_close(r->lazy);
    if (r->direct_fd >= 0)
        close(r->direct_fd);
    rmig_holes_close(&r->holes.holes);
    rmig_blocks_free(&r->targets);
    rmig__release(r->source);
    rmig__release((void *)(uintptr_t)r->by_name);
    rmig__release(r->info);
    rmig__release(r->region);
    RMIG_FREE(r);
}

// --- pages

static int rmig__reader_refuse_torn(struct rmig_mapped_reader *r) {
    if (r->failed != RMIG_OK)
        return r->failed;
    if (r->why.status != RMIG_OK)
        r->error = r->why;
    return r->why.status;
}

/* A block of the file whose pages can be read, or an error. */
static int rmig__reader_block(struct rmig_mapped_reader *r, uint32_t block, const char *call) {
    if (r->failed != RMIG_OK)
        return r->failed;
    if (block >= r->count)
        return rmig_fail(&r->error, RMIG_ERR_ARGUMENT, 0, "%s: block %u; there are %u", call, block, r->count);
    if (r->source[block].info.ignored)
        return rmig_fail(&r->error, RMIG_ERR_ARGUMENT, 0,
                         "%s: block \"%s\" is shared (x-ignore-shared): the file has nothing of it", call,
                         rmig__mapped_name(r->source[block].name).s);
    return RMIG_OK;
}

RMIG__DEF int rmig_mapped_reader_bitmap(struct rmig_mapped_reader *r, uint32_t block, uint64_t first_page,
                                        uint64_t pages, uint64_t *out) {
    if (r == NULL)
        return RMIG_ERR_ARGUMENT;
    int status = rmig__reader_block(r, block, "rmig_mapped_reader_bitmap");
    if (status != RMIG_OK || pages == 0)
        return status;
    if (out == NULL)
        return rmig_fail(&r->error, RMIG_ERR_ARGUMENT, 0, "rmig_mapped_reader_bitmap: out is NULL");
    const struct rmig__mapped_source *s = &r->source[block];
    uint64_t all = s->info.length / s->info.page_size;
    if (first_page % 64 != 0 || first_page >= all || pages > all - first_page)
        return rmig_fail(
            &r->error, RMIG_ERR_ARGUMENT, 0,
            "rmig_mapped_reader_bitmap: %llu pages from page %llu on; block \"%s\" has %llu, and the first "
            "must be a multiple of 64",
            (unsigned long long)pages, (unsigned long long)first_page, rmig__mapped_name(s->name).s,
            (unsigned long long)all);
    status = rmig__reader_read(r, out, rmig__mapped_words(pages) * 8, s->info.bitmap_offset + first_page / 8, s->name);
    if (status == RMIG_OK && pages % 64 != 0)
        out[pages / 64] &= rmig__word_mask(0, pages % 64);
    return rmig__reader_done(r, status);
}

/* Pages of a block, at most RMIG__MAPPED_SPAN, and their bits as a set whose first page is a multiple of 64. */
struct rmig__mapped_span {
    const struct rmig__mapped_source *source;
    uint64_t first, n;
    uint64_t word[RMIG__MAPPED_SPAN / 64 + 1];
    struct rmig_merge set;
};

static int rmig__span_bits(struct rmig__mapped_span *s, struct rmig__mapped_io *io) {
    uint64_t words = rmig__mapped_words(s->first % 64 + s->n);
    struct rmig__mapped_io plain;
    rmig__mapped_io_init(&plain, io->fd, -1);
    plain.block = s->source->name;
    int status =
        rmig__mapped_transfer(&plain, false, s->word, words * 8, s->source->info.bitmap_offset + s->first / 64 * 8);
    if (status != RMIG_OK) {
        io->error = plain.error;
        return status;
    }
    s->set.bits = s->word;
    s->set.pages = s->set.high = words * 64;
    s->set.low = 0;
    s->set.pending = 1; // some, perhaps
    return RMIG_OK;
}

/* Calls f for each run of the span's pages that are in the file, or are not. */
typedef int (*rmig__span_fn)(void *user, struct rmig__mapped_io *io, const struct rmig__mapped_span *s, uint64_t first,
                             uint64_t n, bool in_file);

static int rmig__span_each(const struct rmig__mapped_span *s, struct rmig__mapped_io *io, rmig__span_fn f, void *user) {
    uint64_t base = s->first / 64 * 64, at = s->first - base, end = at + s->n, first, n;
    int status = RMIG_OK;
    while (status == RMIG_OK && at < end) {
        if (!rmig_merge_next(&s->set, at, end, end - at, &first, &n)) {
            first = end;
            n = 0;
        }
        if (first > at)
            status = f(user, io, s, base + at, first - at, false);
        if (status == RMIG_OK && n > 0)
            status = f(user, io, s, base + first, n, true);
        at = first + n;
    }
    return status;
}

/* For rmig_mapped_reader_read: user is where the span's first page goes. */
static int rmig__span_copy(void *user, struct rmig__mapped_io *io, const struct rmig__mapped_span *s, uint64_t first,
                           uint64_t n, bool in_file) {
    const struct rmig_mapped_block *b = &s->source->info;
    uint8_t *out = (uint8_t *)user + (first - s->first) * b->page_size;
    if (in_file)
        return rmig__mapped_transfer(io, false, out, n * b->page_size, b->pages_offset + first * b->page_size);
    memset(out, 0, (size_t)(n * b->page_size));
    return RMIG_OK;
}

RMIG__DEF int rmig_mapped_reader_read(struct rmig_mapped_reader *r, uint32_t block, uint64_t offset, void *out,
                                      uint64_t length) {
    struct rmig__mapped_span span;
    struct rmig__mapped_io io;
    if (r == NULL)
        return RMIG_ERR_ARGUMENT;
    int status = rmig__reader_refuse_torn(r);
    if (status == RMIG_OK)
        status = rmig__reader_block(r, block, "rmig_mapped_reader_read");
    if (status != RMIG_OK || length == 0)
        return status;
    if (out == NULL)
        return rmig_fail(&r->error, RMIG_ERR_ARGUMENT, 0, "rmig_mapped_reader_read: out is NULL");
    const struct rmig_mapped_block *b = &r->source[block].info;
    if (offset % b->page_size != 0 || length % b->page_size != 0 || offset >= b->length || length > b->length - offset)
        return rmig_fail(&r->error, RMIG_ERR_ARGUMENT, 0,
                         "rmig_mapped_reader_read: %llu bytes at %llu; block \"%s\" has %llu, in pages of %llu",
                         (unsigned long long)length, (unsigned long long)offset, rmig__mapped_name(b->name).s,
                         (unsigned long long)b->length, (unsigned long long)b->page_size);
    memset(&span, 0, sizeof span);
    rmig__mapped_io_init(&io, r->fd, r->direct_fd);
    io.block = b->name;
    uint64_t page = offset / b->page_size, end = page + length / b->page_size;
    for (uint8_t *at = (uint8_t *)out; page < end && status == RMIG_OK; at += span.n * b->page_size, page += span.n) {
        span.source = &r->source[block];
        span.first = page;
        span.n = rmig__min(end - page, RMIG__MAPPED_SPAN);
        status = rmig__span_bits(&span, &io);
        if (status == RMIG_OK)
            status = rmig__span_each(&span, &io, rmig__span_copy, at);
    }
    if (status == RMIG_OK)
        status = rmig__mapped_unchanged(r->fd, &r->st, &io.error);
    rmig__mapped_io_end(&io);
    if (status != RMIG_OK)
        r->error = io.error;
    return rmig__reader_done(r, status);
}

// --- loading

static int rmig__mapped_is_named(const void *name, const void *source) {
    return strcmp((const char *)name, (*(const struct rmig__mapped_source *const *)source)->name);
}

static int rmig__reader_add(struct rmig_mapped_reader *r, const struct rmig_block_desc *desc) {
    static const char call[] = "rmig_mapped_reader_add_block";
    uint32_t index = 0;
    if (desc == NULL || desc->name == NULL)
        return rmig_fail(&r->error, RMIG_ERR_ARGUMENT, 0, "%s: the %s is NULL", call,
                         desc == NULL ? "description" : "name");
    struct rmig__qemu_text name = rmig__mapped_name(desc->name);
    void *found =
        r->count == 0 ? NULL : bsearch(desc->name, r->by_name, r->count, sizeof *r->by_name, rmig__mapped_is_named);
    if (found == NULL)
        return rmig_fail(&r->error, RMIG_ERR_ARGUMENT, 0, "block \"%s\": there is none in the file", name.s);
    struct rmig__mapped_source *s = &r->source[*(const struct rmig__mapped_source **)found - r->source];
    int status = rmig__reader_block(r, (uint32_t)(s - r->source), call);
    if (status != RMIG_OK)
        return status;
    if (desc->length != s->info.length)
        return rmig_fail(&r->error, RMIG_ERR_ARGUMENT, 0, "block \"%s\" has %llu bytes here, and %llu in the file",
                         name.s, (unsigned long long)desc->length, (unsigned long long)s->info.length);
    status = rmig_blocks_add(&r->targets, desc, &index, &r->error);
    if (status != RMIG_OK)
        return status;
    s->added = true;
    s->target = index;
    return RMIG_OK;
}

RMIG__DEF int rmig_mapped_reader_add_block(struct rmig_mapped_reader *r, const struct rmig_block_desc *desc) {
    int status = r == NULL ? RMIG_ERR_ARGUMENT : r->failed != RMIG_OK ? r->failed : rmig__reader_add(r, desc);
    if (r != NULL && status < 0 && status > RMIG_SESSION_ERRORS && r->refused.status == RMIG_OK)
        r->refused = r->error;
    return status;
}

/* Zeros what is not zero; with the lock only to ask for holes. */
static void rmig__reader_zero(struct rmig__mapped_crew *c, uint32_t target, uint64_t from, uint64_t to, uint64_t page) {
    struct rmig_mapped_reader *r = (struct rmig_mapped_reader *)c->job;
    const struct rmig_block *b = &r->targets.block[target];
    while (from < to) {
        pthread_mutex_lock(&c->lock);
        from = rmig__min(rmig__mapped_data_at(&r->holes, b, target, from, page), to);
        uint64_t stop = rmig__min(r->holes.known.end, to);
        pthread_mutex_unlock(&c->lock);
        for (uint64_t n; from < stop; from += n) {
            n = rmig__min(page, stop - from);
            if (!rmig_is_zero(b->host + from, (size_t)n))
                memset(b->host + from, 0, (size_t)n);
        }
    }
}

/* Memory by the run is cheaper than one page at a time. What the kernel reads ahead has until all of a span's is there;
   direct I/O goes on while the next run's is made. */
static int rmig__reader_populate(void *user, struct rmig__mapped_io *io, const struct rmig__mapped_span *s,
                                 uint64_t first, uint64_t n, bool in_file) {
    const struct rmig_mapped_reader *r = (const struct rmig_mapped_reader *)user;
    uint64_t bytes = n * s->source->info.page_size;
    uint8_t *memory = r->targets.block[s->source->target].host + first * s->source->info.page_size;
    (void)io;
    if (in_file && bytes >= RMIG__MAPPED_ANNOUNCE && (uintptr_t)memory % (uint64_t)sysconf(_SC_PAGESIZE) == 0)
        madvise(memory, (size_t)bytes, RMIG__MADV_POPULATE_WRITE);
    return RMIG_OK;
}

static int rmig__reader_fill(void *user, struct rmig__mapped_io *io, const struct rmig__mapped_span *s, uint64_t first,
                             uint64_t n, bool in_file) {
    struct rmig__mapped_crew *c = (struct rmig__mapped_crew *)user;
    struct rmig_mapped_reader *r = (struct rmig_mapped_reader *)c->job;
    const struct rmig_mapped_block *b = &s->source->info;
    uint64_t at = first * b->page_size, bytes = n * b->page_size;
    if (in_file) {
        uint8_t *memory = r->targets.block[s->source->target].host + at;
        if (io->direct_fd >= 0)
            rmig__reader_populate(r, io, s, first, n, true);
        int status = rmig__mapped_post(io, false, memory, bytes, b->pages_offset + at);
        if (status != RMIG_OK)
            return status;
    } else if (!r->opt.memory_is_zero) {
        rmig__reader_zero(c, s->source->target, at, at + bytes, b->page_size);
    }
    pthread_mutex_lock(&c->lock);
    *(in_file ? &r->stats.bytes_written : &r->stats.bytes_zero) += bytes;
    *(in_file ? &r->stats.pages_written : &r->stats.pages_zero) += n;
    r->stats.writes_posted += in_file;
    r->stats.bytes_pending -= bytes;
    pthread_mutex_unlock(&c->lock);
    return RMIG_OK;
}

/* Holes keep the kernel from reading ahead by itself. */
static int rmig__reader_announce(void *user, struct rmig__mapped_io *io, const struct rmig__mapped_span *s,
                                 uint64_t first, uint64_t n, bool in_file) {
    const struct rmig_mapped_block *b = &s->source->info;
    (void)user;
    if (in_file && io->direct_fd < 0 && n * b->page_size >= RMIG__MAPPED_ANNOUNCE)
        posix_fadvise(io->fd, (off_t)(b->pages_offset + first * b->page_size), (off_t)(n * b->page_size),
                      POSIX_FADV_WILLNEED);
    return RMIG_OK;
}

/* With the lock: the next span of a block that is to be loaded; false: nothing is left. */
static bool rmig__reader_take(struct rmig_mapped_reader *r, struct rmig__mapped_span *s) {
    for (; r->at_block < r->count; r->at_block++, r->at_page = 0) {
        s->source = &r->source[r->at_block];
        uint64_t pages = s->source->info.length / s->source->info.page_size;
        if (!s->source->added || r->at_page == pages)
            continue;
        s->first = r->at_page;
        uint64_t most = rmig__max(RMIG__MAPPED_SPAN_BYTES / s->source->info.page_size, 1);
        s->n = rmig__min(rmig__min(pages - r->at_page, RMIG__MAPPED_SPAN), most);
        r->at_page += s->n;
        return true;
    }
    return false;
}

/* Takes the span that io fills after the one in hand, and lets the kernel read it meanwhile. */
static int rmig__reader_look_ahead(struct rmig__mapped_crew *c, struct rmig__mapped_io *io) {
    struct rmig__mapped_span span;
    memset(&span, 0, sizeof span);
    pthread_mutex_lock(&c->lock);
    bool some = rmig__reader_take((struct rmig_mapped_reader *)c->job, &span);
    pthread_mutex_unlock(&c->lock);
    io->ahead.source = some ? span.source : NULL;
    io->ahead.first = span.first;
    io->ahead.n = span.n;
    if (!some)
        return RMIG_OK;
    io->block = span.source->name;
    int status = rmig__span_bits(&span, io);
    return status == RMIG_OK ? rmig__span_each(&span, io, rmig__reader_announce, NULL) : status;
}

static int rmig__reader_step(struct rmig__mapped_crew *c, struct rmig__mapped_io *io) {
    struct rmig__mapped_span span;
    memset(&span, 0, sizeof span);
    int status = io->ahead.source != NULL ? RMIG_OK : rmig__reader_look_ahead(c, io);
    if (status != RMIG_OK || io->ahead.source == NULL)
        return status;
    span.source = io->ahead.source;
    span.first = io->ahead.first;
    span.n = io->ahead.n;
    status = rmig__reader_look_ahead(c, io);
    io->block = span.source->name;
    if (status == RMIG_OK)
        status = rmig__span_bits(&span, io);
    if (status == RMIG_OK && io->direct_fd < 0)
        status = rmig__span_each(&span, io, rmig__reader_populate, c->job);
    if (status == RMIG_OK)
        status = rmig__span_each(&span, io, rmig__reader_fill, c);
    return status == RMIG_OK ? RMIG_PENDING : status;
}

/* Are all blocks of the file there to be loaded? */
static int rmig__reader_check_added(struct rmig_mapped_reader *r) {
    int status = rmig__reader_refuse_torn(r);
    if (status != RMIG_OK)
        return status;
    if (r->lazy != NULL)
        return rmig_fail(&r->error, RMIG_ERR_STATE, 0, "rmig_mapped_reader_load_start was called before");
    if (r->refused.status != RMIG_OK) {
        r->error = r->refused;
        return r->error.status;
    }
    r->stats.bytes_pending = 0;
    for (uint32_t i = 0; i < r->count; i++) {
        const struct rmig__mapped_source *s = &r->source[i];
        if (!s->added && !s->info.ignored)
            return rmig_fail(&r->error, RMIG_ERR_STATE, 0,
                             "rmig_mapped_reader_load: block \"%s\" of the file was not added; its memory would stay "
                             "as it is",
                             rmig__mapped_name(s->name).s);
        r->stats.bytes_pending += s->added ? s->info.length : 0;
    }
    return RMIG_OK;
}

RMIG__DEF int rmig_mapped_reader_load(struct rmig_mapped_reader *r) {
    struct rmig__mapped_crew crew;
    int status = r == NULL ? RMIG_ERR_ARGUMENT : rmig__reader_check_added(r);
    if (status != RMIG_OK)
        return status;
    r->at_block = 0;
    r->at_page = 0;
    rmig__mapped_forget(&r->holes);
    memset(&crew, 0, sizeof crew);
    crew.step = rmig__reader_step;
    crew.job = r;
    crew.fd = r->fd;
    crew.direct_fd = r->direct_fd;
    crew.options = &r->opt;
    crew.stats = &r->stats;
    uint64_t began = rmig__mapped_now();
    status = rmig__mapped_run(&crew, r->stats.bytes_pending, &r->error);
    if (status == RMIG_OK)
        status = rmig__mapped_unchanged(r->fd, &r->st, &r->error);
    r->stats.round_bytes = r->stats.bytes_written + r->stats.bytes_zero;
    r->stats.round_ns = rmig__mapped_now() - began;
    return rmig__reader_done(r, status);
}

// --- lazy loading

struct rmig__lazy {
    struct rmig_mapped_reader *r; // of which only what does not change is used
    const struct rmig__mapped_source **source; // by target
    int uffd;
    uint64_t page; // of the host
    uint32_t registered; // targets
    pthread_mutex_t placing; // held while pages are placed; for what follows
    struct rmig_merge *placed; // by whom ever of the two, a bit a page of the host, by target
    uint64_t *bits; // of all placed
    pthread_t server, loader;
    bool served, loaded; // the threads were started
    pthread_mutex_t lock; // for what follows
    pthread_cond_t ended;
    bool stop, finishing, done;
    uint64_t loaded_bytes, placed_bytes; // by the loader; those that are not zero
    struct rmig_error error;
};

enum { RMIG__LAZY_POLL_MS = 50 };

static void rmig__lazy_fail(struct rmig__lazy *l, const struct rmig_error *error) {
    pthread_mutex_lock(&l->lock);
    if (l->error.status == RMIG_OK && !l->finishing) {
        l->error = *error;
        l->error.status = rmig__mapped_final(error->status, RMIG_ERR_SETUP);
    }
    pthread_mutex_unlock(&l->lock);
}

static bool rmig__lazy_goes_on(struct rmig__lazy *l) {
    pthread_mutex_lock(&l->lock);
    bool on = !l->stop && !l->done && l->error.status == RMIG_OK;
    pthread_mutex_unlock(&l->lock);
    return on;
}

/* A part of a block that need not be whole pages of the guest. */
struct rmig__lazy_part {
    uint64_t from, to;
    uint8_t *out; // where `from` goes
};

static int rmig__lazy_copy(void *user, struct rmig__mapped_io *io, const struct rmig__mapped_span *s, uint64_t first,
                           uint64_t n, bool in_file) {
    const struct rmig__lazy_part *part = (const struct rmig__lazy_part *)user;
    const struct rmig_mapped_block *b = &s->source->info;
    uint64_t from = rmig__max(first * b->page_size, part->from);
    uint64_t to = rmig__min((first + n) * b->page_size, part->to);
    if (in_file)
        return rmig__mapped_transfer(io, false, part->out + (from - part->from), to - from, b->pages_offset + from);
    memset(part->out + (from - part->from), 0, (size_t)(to - from));
    return RMIG_OK;
}

/* At most RMIG__MAPPED_UNIT bytes of a block. */
static int rmig__lazy_read(struct rmig__mapped_io *io, const struct rmig__mapped_source *source, uint64_t from,
                           uint64_t to, uint8_t *out) {
    struct rmig__mapped_span span;
    struct rmig__lazy_part part = {from, to, out};
    uint64_t page = source->info.page_size;
    memset(&span, 0, sizeof span);
    span.source = source;
    span.first = from / page;
    span.n = (to - 1) / page + 1 - span.first;
    io->block = source->name;
    int status = rmig__span_bits(&span, io);
    return status == RMIG_OK ? rmig__span_each(&span, io, rmig__lazy_copy, &part) : status;
}

/* A page that is there already was put there by one of the two threads, or by nobody who may. */
static int rmig__lazy_is_there(struct rmig__lazy *l, struct rmig__mapped_io *io, uint32_t target, uint64_t at) {
    uint64_t page = at / l->page;
    struct uffdio_range range = {(uint64_t)(uintptr_t)l->r->targets.block[target].host + at, l->page};
    if ((l->placed[target].bits[page / 64] >> page % 64 & 1) == 0)
        return rmig_fail(&io->error, RMIG_ERR_SETUP, 0,
                         "block \"%s\": somebody else put a page at %llu: until all is loaded its memory may be used "
                         "by the mapping alone that load_start was given",
                         rmig__mapped_name(io->block).s, (unsigned long long)at);
    ioctl(l->uffd, UFFDIO_WAKE, &range);
    return RMIG_OK;
}

/* Puts n bytes where nothing is yet, and wakes who waits for them. What is there already stays. */
static int rmig__lazy_place(struct rmig__lazy *l, struct rmig__mapped_io *io, uint32_t target, uint64_t at,
                            const uint8_t *from, uint64_t n) {
    const uint8_t *host = l->r->targets.block[target].host;
    int status = RMIG_OK;
    pthread_mutex_lock(&l->placing);
    while (n > 0 && status == RMIG_OK) {
        struct uffdio_copy copy;
        memset(&copy, 0, sizeof copy);
        copy.dst = (uint64_t)(uintptr_t)(host + at);
        copy.src = (uint64_t)(uintptr_t)from;
        copy.len = n;
        int code = ioctl(l->uffd, UFFDIO_COPY, &copy) == 0 ? 0 : errno;
        uint64_t done = code == 0 ? n : copy.copy > 0 ? (uint64_t)copy.copy : 0;
        if (done > 0)
            rmig_merge_add(&l->placed[target], at / l->page, done / l->page);
        if (code == EEXIST) {
            status = rmig__lazy_is_there(l, io, target, at);
            done = l->page;
        } else if (code != 0 && code != EAGAIN) {
            status = rmig_fail(&io->error, RMIG_ERR_SETUP, code, "block \"%s\": userfaultfd cannot place a page: %s",
                               rmig__mapped_name(io->block).s, strerror(code));
        }
        at += done;
        from += done;
        n -= done;
    }
    pthread_mutex_unlock(&l->placing);
    return status;
}

/* The page that somebody waits for. */
static int rmig__lazy_serve(struct rmig__lazy *l, struct rmig__mapped_io *io, uint64_t address, uint8_t *buf) {
    const struct rmig_mapped_reader *r = l->r;
    for (uint32_t i = 0; i < r->targets.count; i++) {
        const struct rmig_block *b = &r->targets.block[i];
        uint64_t base = (uint64_t)(uintptr_t)b->host, at = address / l->page * l->page;
        if (at < base || at - base >= b->length)
            continue;
        int status = rmig__lazy_read(io, l->source[i], at - base, at - base + l->page, buf);
        return status == RMIG_OK ? rmig__lazy_place(l, io, i, at - base, buf, l->page) : status;
    }
    return RMIG_OK; // of no block: nothing is registered there
}

static void *rmig__lazy_server(void *user) {
    struct rmig__lazy *l = (struct rmig__lazy *)user;
    struct rmig__mapped_io io;
    rmig__mapped_io_init(&io, l->r->fd, l->r->direct_fd);
    uint8_t *buf = (uint8_t *)rmig__calloc(l->page, 1);
    int status = buf != NULL ? RMIG_OK : rmig_fail(&io.error, RMIG_ERR_NO_MEMORY, 0, "out of memory for a page");
    while (buf != NULL && status == RMIG_OK && rmig__lazy_goes_on(l)) {
        struct pollfd ready = {l->uffd, POLLIN, 0};
        struct uffd_msg message;
        if (poll(&ready, 1, RMIG__LAZY_POLL_MS) <= 0 || read(l->uffd, &message, sizeof message) != sizeof message)
            continue; // nobody waits
        if (message.event == UFFD_EVENT_PAGEFAULT)
            status = rmig__lazy_serve(l, &io, message.arg.pagefault.address, buf);
    }
    if (status != RMIG_OK)
        rmig__lazy_fail(l, &io.error);
    rmig__release(buf);
    rmig__mapped_io_end(&io);
    return NULL;
}

/* Places what is not zero of one piece. */
static int rmig__lazy_load_piece(struct rmig__lazy *l, struct rmig__mapped_io *io, uint32_t target, uint64_t from,
                                 uint64_t to, uint8_t *buf) {
    int status = rmig__lazy_read(io, l->source[target], from, to, buf);
    uint64_t placed = 0;
    for (uint64_t at = from, n; at < to && status == RMIG_OK; at += n) {
        bool zero = rmig_is_zero(buf + (at - from), (size_t)l->page);
        n = l->page;
        while (at + n < to && rmig_is_zero(buf + (at + n - from), (size_t)l->page) == zero)
            n += l->page;
        if (!zero)
            status = rmig__lazy_place(l, io, target, at, buf + (at - from), n);
        placed += zero ? 0 : n;
    }
    pthread_mutex_lock(&l->lock);
    l->loaded_bytes += to - from;
    l->placed_bytes += placed;
    pthread_mutex_unlock(&l->lock);
    return status;
}

static int rmig__lazy_load_all(struct rmig__lazy *l, struct rmig__mapped_io *io, uint8_t *buf) {
    int status = RMIG_OK;
    for (uint32_t i = 0; i < l->r->targets.count; i++) {
        const struct rmig_block *b = &l->r->targets.block[i];
        for (uint64_t at = 0, to; at < b->length && status == RMIG_OK; at = to) {
            if (!rmig__lazy_goes_on(l))
                return rmig_fail(&io->error, RMIG_ERR_CANCELLED, 0, "the reader was closed before all was loaded");
            to = rmig__min(b->length, at + RMIG__MAPPED_UNIT);
            status = rmig__lazy_load_piece(l, io, i, at, to, buf);
        }
    }
    return status;
}

/* No page waits any more: what was not placed is zero, or, after a failure, out of reach. */
static void rmig__lazy_release(struct rmig__lazy *l) {
    pthread_mutex_lock(&l->lock);
    bool failed = l->error.status != RMIG_OK;
    l->finishing = true;
    pthread_mutex_unlock(&l->lock);
    for (uint32_t i = 0; i < l->registered; i++) {
        const struct rmig_block *b = &l->r->targets.block[i];
        struct uffdio_range range = {(uint64_t)(uintptr_t)b->host, b->length};
        if (failed && mprotect(b->host, (size_t)b->length, PROT_NONE) < 0)
            abort(); // zeros in place of what the guest had
        ioctl(l->uffd, UFFDIO_UNREGISTER, &range);
        // The kernel wakes who waits before it stops new ones from waiting (seen with Linux 6.18): once more.
        ioctl(l->uffd, UFFDIO_WAKE, &range);
    }
}

static void *rmig__lazy_loader(void *user) {
    struct rmig__lazy *l = (struct rmig__lazy *)user;
    struct rmig__mapped_io io;
    rmig__mapped_io_init(&io, l->r->fd, l->r->direct_fd);
    uint8_t *buf = (uint8_t *)rmig__calloc(RMIG__MAPPED_UNIT, 1);
    int status = buf != NULL ? rmig__lazy_load_all(l, &io, buf)
                             : rmig_fail(&io.error, RMIG_ERR_NO_MEMORY, 0, "out of memory for a piece of %d bytes",
                                         RMIG__MAPPED_UNIT);
    if (status == RMIG_OK)
        status = rmig__mapped_unchanged(l->r->fd, &l->r->st, &io.error);
    if (status != RMIG_OK)
        rmig__lazy_fail(l, &io.error);
    rmig__lazy_release(l);
    pthread_mutex_lock(&l->lock);
    l->done = true;
    pthread_cond_broadcast(&l->ended);
    pthread_mutex_unlock(&l->lock);
    rmig__release(buf);
    rmig__mapped_io_end(&io);
    return NULL;
}

static void rmig__lazy_close(struct rmig__lazy *l) {
    if (l == NULL)
        return;
    pthread_mutex_lock(&l->lock);
    l->stop = true;
    pthread_mutex_unlock(&l->lock);
    if (l->loaded)
        pthread_join(l->loader, NULL);
    else
        rmig__lazy_release(l);
    if (l->served)
        pthread_join(l->server, NULL);
    if (l->uffd >= 0)
        close(l->uffd);
    pthread_cond_destroy(&l->ended);
    pthread_mutex_destroy(&l->lock);
    pthread_mutex_destroy(&l->placing);
    rmig__release(l->placed);
    rmig__release(l->bits);
    rmig__release((void *)(uintptr_t)l->source);
    RMIG_FREE(l);
}

#ifndef USERFAULTFD_IOC_NEW // Linux 6.1
#define USERFAULTFD_IOC_NEW _IO(0xAA, 0x00)
#endif

/* The device is for those whom the system call refuses. */
static int rmig__lazy_descriptor(int *uffd, struct rmig_error *err) {
    *uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
    if (*uffd >= 0)
        return RMIG_OK;
    int code = errno, device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC), of_device = errno;
    if (device >= 0) {
        *uffd = ioctl(device, USERFAULTFD_IOC_NEW, O_CLOEXEC | O_NONBLOCK);
        of_device = errno;
        close(device);
    }
    if (*uffd >= 0)
        return RMIG_OK;
    return rmig_fail(err, RMIG_ERR_SETUP, code,
                     "no userfaultfd: %s, and /dev/userfaultfd: %s (it needs root, the sysctl "
                     "vm.unprivileged_userfaultfd, or access to /dev/userfaultfd)",
                     strerror(code), strerror(of_device));
}

static int rmig__lazy_open(struct rmig__lazy *l, struct rmig_error *err) {
    struct uffdio_api api;
    memset(&api, 0, sizeof api);
    api.api = UFFD_API;
    int status = rmig__lazy_descriptor(&l->uffd, err);
    if (status != RMIG_OK)
        return status;
    if (ioctl(l->uffd, UFFDIO_API, &api) == 0)
        return RMIG_OK;
    return rmig_fail(err, RMIG_ERR_SETUP, errno, "userfaultfd: %s", strerror(errno));
}

static int rmig__lazy_check(const struct rmig__lazy *l, struct rmig_error *err) {
    for (uint32_t i = 0; i < l->r->targets.count; i++) {
        const struct rmig_block *b = &l->r->targets.block[i];
        struct rmig__qemu_text name = rmig__mapped_name(b->name);
        if ((uint64_t)(uintptr_t)b->host % l->page != 0 || b->length % l->page != 0)
            return rmig_fail(err, RMIG_ERR_ARGUMENT, 0,
                             "block \"%s\": %llu bytes at %p; lazy loading wants whole host pages of %llu bytes",
                             name.s, (unsigned long long)b->length, (void *)b->host, (unsigned long long)l->page);
        if (b->backing != RMIG_BACKING_ANONYMOUS && b->backing != RMIG_BACKING_SHARED_FD)
            return rmig_fail(err, RMIG_ERR_ARGUMENT, 0,
                             "block \"%s\": lazy loading wants backing ANONYMOUS or SHARED_FD", name.s);
    }
    return RMIG_OK;
}

static int rmig__lazy_allocate(struct rmig__lazy *l, struct rmig_error *err) {
    const struct rmig_blocks *targets = &l->r->targets;
    uint64_t words = 0;
    for (uint32_t i = 0; i < targets->count; i++)
        words += rmig__mapped_words(targets->block[i].length / l->page);
    l->placed = (struct rmig_merge *)rmig__calloc(targets->count, sizeof *l->placed);
    l->bits = (uint64_t *)rmig__calloc(words, sizeof *l->bits);
    l->source = (const struct rmig__mapped_source **)rmig__calloc(targets->count, sizeof *l->source);
    if (l->placed == NULL || l->bits == NULL || l->source == NULL)
        return rmig_fail(err, RMIG_ERR_NO_MEMORY, 0, "out of memory for the bitmaps of %u blocks", targets->count);
    for (uint32_t i = 0; i < l->r->count; i++)
        if (l->r->source[i].added)
            l->source[l->r->source[i].target] = &l->r->source[i];
    uint64_t *at = l->bits;
    for (uint32_t i = 0; i < targets->count; i++) {
        l->placed[i].pages = targets->block[i].length / l->page;
        l->placed[i].bits = at;
        at += rmig__mapped_words(l->placed[i].pages);
    }
    return RMIG_OK;
}

static int rmig__lazy_cannot(const struct rmig_block *b, int status, const char *why, int code,
                             struct rmig_error *err) {
    return rmig_fail(err, status, code, "block \"%s\": its memory cannot be loaded lazily: %s",
                     rmig__mapped_name(b->name).s, why);
}

/* Nothing is lost yet: what does not suit is refused, and may be loaded otherwise. */
static int rmig__lazy_register(struct rmig__lazy *l, struct rmig_error *err) {
    for (uint32_t i = 0; i < l->r->targets.count; i++) {
        const struct rmig_block *b = &l->r->targets.block[i];
        struct uffdio_register wanted;
        memset(&wanted, 0, sizeof wanted);
        wanted.range.start = (uint64_t)(uintptr_t)b->host;
        wanted.range.len = b->length;
        wanted.mode = UFFDIO_REGISTER_MODE_MISSING;
        if (ioctl(l->uffd, UFFDIO_REGISTER, &wanted) < 0)
            return rmig__lazy_cannot(b, RMIG_ERR_ARGUMENT, strerror(errno), errno, err);
        l->registered++;
        if ((wanted.ioctls & (uint64_t)1 << _UFFDIO_ZEROPAGE) == 0)
            return rmig__lazy_cannot(b, RMIG_ERR_ARGUMENT, "it is of huge pages of hugetlbfs", 0, err);
    }
    return RMIG_OK;
}

/* MADV_REMOVE takes away what shared memory holds, whatever the block is said to be. It says EINVAL where no file is
   behind the mapping: then, and only then, MADV_DONTNEED does that; of shared memory it only forgets that it was
   mapped. Both say EINVAL of locked memory. */
static int rmig__lazy_empty_mapping(const struct rmig_block *b, uint8_t *at, uint64_t n, struct rmig_error *err) {
    if (madvise(at, (size_t)n, MADV_REMOVE) == 0)
        return RMIG_OK;
    bool shared = b->backing == RMIG_BACKING_SHARED_FD;
    if (errno == EINVAL && !shared && madvise(at, (size_t)n, MADV_DONTNEED) == 0)
        return RMIG_OK;
    int code = errno;
    const char *why = strerror(code);
    if (code == EINVAL)
        why = shared ? "it cannot be emptied: is it locked (mlock, mlockall), or no mapping of its file?"
                     : "it cannot be emptied: is it locked (mlock, mlockall)?";
    else if (code == EPERM)
        why = "it cannot be emptied: its file is sealed against writing (F_SEAL_WRITE, F_SEAL_FUTURE_WRITE)";
    else if (code == EACCES)
        why = "it cannot be emptied: neither private anonymous memory nor a shared mapping that may be written";
    return rmig__lazy_cannot(b, RMIG_ERR_SETUP, why, code, err);
}

/* Each mapping by itself, where the kernel tells of them (Linux 6.11), since the kinds may be mixed. */
static int rmig__lazy_empty(struct rmig__lazy *l, struct rmig_error *err) {
    int status = RMIG_OK;
    for (uint32_t i = 0; i < l->r->targets.count; i++) {
        const struct rmig_block *b = &l->r->targets.block[i];
        for (uint64_t at = 0, n; at < b->length && status == RMIG_OK; at += n) {
            struct rmig__mapping m;
            uint64_t address = (uint64_t)(uintptr_t)b->host + at;
            n = b->length - at;
            if (rmig__mapping_at(&l->r->holes.holes, address, &m))
                n = rmig__min(n, m.end - address);
            status = rmig__lazy_empty_mapping(b, b->host + at, n, err);
        }
    }
    return status;
}

static int rmig__lazy_threads(struct rmig__lazy *l, struct rmig_error *err) {
    sigset_t before;
    rmig__mapped_block_signals(&before);
    int code = pthread_create(&l->server, NULL, rmig__lazy_server, l);
    l->served = code == 0;
    if (code == 0)
        code = pthread_create(&l->loader, NULL, rmig__lazy_loader, l);
    l->loaded = l->served && code == 0;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return code == 0 ? RMIG_OK : rmig_fail(err, RMIG_ERR_SETUP, code, "no thread can be started: %s", strerror(code));
}

static bool rmig__lazy_init(struct rmig__lazy *l) {
    pthread_condattr_t attributes;
    if (pthread_mutex_init(&l->placing, NULL) != 0)
        return false;
    if (pthread_mutex_init(&l->lock, NULL) != 0) {
        pthread_mutex_destroy(&l->placing);
        return false;
    }
    if (pthread_condattr_init(&attributes) == 0) {
        bool ok = pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC) == 0 &&
                  pthread_cond_init(&l->ended, &attributes) == 0;
        pthread_condattr_destroy(&attributes);
        if (ok)
            return true;
    }
    pthread_mutex_destroy(&l->lock);
    pthread_mutex_destroy(&l->placing);
    return false;
}

RMIG__DEF int rmig_mapped_reader_load_start(struct rmig_mapped_reader *r) {
    int status = r == NULL ? RMIG_ERR_ARGUMENT : rmig__reader_check_added(r);
    long page = sysconf(_SC_PAGESIZE);
    if (status != RMIG_OK)
        return status;
    struct rmig__lazy *l = (struct rmig__lazy *)rmig__calloc(1, sizeof *l);
    if (l == NULL || !rmig__lazy_init(l)) {
        rmig__release(l);
        return rmig_fail(&r->error, RMIG_ERR_NO_MEMORY, 0, "out of memory for lazy loading");
    }
    l->r = r;
    l->uffd = -1;
    l->page = page > 0 ? (uint64_t)page : 4096;
    status = rmig__lazy_check(l, &r->error);
    if (status == RMIG_OK)
        status = rmig__lazy_allocate(l, &r->error);
    if (status == RMIG_OK)
        status = rmig__lazy_open(l, &r->error);
    if (status == RMIG_OK)
        status = rmig__lazy_register(l, &r->error);
    if (status == RMIG_OK)
        status = rmig__lazy_empty(l, &r->error);
    if (status == RMIG_OK)
        status = rmig__lazy_threads(l, &r->error);
    if (status == RMIG_OK)
        r->lazy = l;
    else
        rmig__lazy_close(l);
    return rmig__reader_done(r, status);
}

RMIG__DEF int rmig_mapped_reader_load_wait(struct rmig_mapped_reader *r, uint64_t timeout_ns) {
    if (r == NULL)
        return RMIG_ERR_ARGUMENT;
    struct rmig__lazy *l = r->lazy;
    struct timespec until;
    if (r->failed != RMIG_OK)
        return r->failed;
    if (l == NULL)
        return rmig_fail(&r->error, RMIG_ERR_STATE, 0, "rmig_mapped_reader_load_wait: call load_start first");
    uint64_t at = rmig__mapped_now();
    at = timeout_ns > INT64_MAX - at ? INT64_MAX : at + timeout_ns;
    until.tv_sec = (time_t)(at / 1000000000u);
    until.tv_nsec = (long)(at % 1000000000u);
    pthread_mutex_lock(&l->lock);
    while (!l->done && pthread_cond_timedwait(&l->ended, &l->lock, &until) == 0) {
    }
    int status = !l->done ? RMIG_PENDING : l->error.status;
    if (status < 0)
        r->error = l->error;
    pthread_mutex_unlock(&l->lock);
    return rmig__reader_done(r, status);
}

RMIG__DEF void rmig_mapped_reader_stats(const struct rmig_mapped_reader *r, struct rmig_stats *out) {
    if (out == NULL)
        return;
    memset(out, 0, sizeof *out);
    if (r == NULL)
        return;
    struct rmig__lazy *l = r->lazy;
    *out = r->stats;
    if (l == NULL)
        return;
    uint64_t page = r->source[0].info.page_size;
    pthread_mutex_lock(&l->lock);
    out->bytes_pending -= l->loaded_bytes;
    out->bytes_written = l->placed_bytes;
    out->bytes_zero = l->loaded_bytes - l->placed_bytes;
    pthread_mutex_unlock(&l->lock);
    out->pages_written = out->bytes_written / page;
    out->pages_zero = out->bytes_zero / page;
}

// --- device state

RMIG__DEF uint64_t rmig_mapped_reader_state_size(const struct rmig_mapped_reader *r) {
    return r == NULL || r->state_offset == 0 ? 0 : r->end - r->state_offset;
}

RMIG__DEF int64_t rmig_mapped_reader_get(struct rmig_mapped_reader *r, void *out, size_t n) {
    int status = r == NULL ? RMIG_ERR_ARGUMENT : rmig__reader_refuse_torn(r);
    if (status == RMIG_OK && out == NULL && n > 0)
        status = rmig_fail(&r->error, RMIG_ERR_ARGUMENT, 0, "rmig_mapped_reader_get: out is NULL");
    if (status != RMIG_OK)
        return status;
    uint64_t piece = rmig__min(n, rmig_mapped_reader_state_size(r) - r->state_at);
    status = rmig__reader_read(r, out, piece, r->state_offset + r->state_at, NULL);
    if (status == RMIG_OK && r->state_at + piece == rmig_mapped_reader_state_size(r))
        status = rmig__mapped_unchanged(r->fd, &r->st, &r->error);
    if (status != RMIG_OK)
        return rmig__reader_done(r, status);
    r->state_at += piece;
    r->stats.stream_bytes += piece;
    return (int64_t)piece;
}

#ifdef __cplusplus
}
#endif

#endif // RMIG_IMPLEMENTATION
