/*
rmig.h - move a running VM's memory to another host by RDMA

    Do this
        #define RMIG_IMPLEMENTATION
    before including this file in exactly *one* C or C++ file, and nothing
    special in all others. Then pick a fabric:
        #include "rmig_fabric_ofi.h"      libfabric: tcp on any machine
        #include "rmig_fabric_verbs.h"    libibverbs: InfiniBand, RoCE, iWARP

    The core needs a 64-bit host and libc, nothing else. C11 or C++17.

QUICK START

    The source, in the hypervisor that owns the running guest. Behind open no status is looked at
    but the last: a call that was refused makes finish fail (see ERRORS).

        // 0: the guest runs at the other end. -1: it is still ours. 1: ask the other end before running it here.
        int migrate_out(const char *address, void *mem, uint64_t size, const uint64_t *dirty_log, const void *state,
                        size_t state_size) {
            struct rmig_error err;
            struct rmig_source *src = NULL;
            uint32_t block = 0;
            struct rmig_fabric *fabric = rmig_ofi_open(NULL, &err);
            if (fabric == NULL || rmig_source_open(fabric, NULL, &src, &err) != RMIG_OK) // NULL: all defaults
                return fprintf(stderr, "source: %s\n", err.text), rmig_fabric_close(fabric), -1;
            struct rmig_block_desc ram = {"ram", mem, size, 0, RMIG_BACKING_UNKNOWN, -1, 0};
            rmig_source_add_block(src, &ram, &block);
            rmig_source_connect(src, address);                     // "10.0.0.2:4444"
            rmig_source_begin_round(src);
            rmig_source_save_range(src, block, 0, size);           // first everything,
            rmig_source_end_round(src);
            rmig_source_begin_round(src);                          // then what KVM's dirty log says: again and
            rmig_source_save_bitmap(src, block, dirty_log, 0, (size + 4095) / 4096); // again, at last with it stopped
            rmig_source_end_round(src);
            rmig_source_put(src, state, state_size);
            int rc = rmig_source_finish(src);
            if (rc != RMIG_OK)
                fprintf(stderr, "source: %s\n", rmig_source_error(src)->text);
            rmig_source_close(src);
            rmig_fabric_close(fabric);
            return rc == RMIG_OK ? 0 : rc == RMIG_ERR_HANDOVER ? 1 : -1;
        }

    The sink. It has the last word: before rmig_sink_take it does everything that can fail.

        // The bytes of state that came with the guest, which is ours. -1: it is not. -2: ask the other end.
        int64_t migrate_in(const char *address, void *mem, uint64_t size, void *state, size_t state_max) {
            struct rmig_error err;
            struct rmig_sink *sink = NULL;
            struct rmig_sink_event ev = {RMIG_SINK_NONE, 0, 0, 0};
            size_t have = 0;
            struct rmig_fabric *fabric = rmig_ofi_open(NULL, &err);
            if (fabric == NULL || rmig_sink_open(fabric, NULL, &sink, &err) != RMIG_OK)
                return fprintf(stderr, "sink: %s\n", err.text), rmig_fabric_close(fabric), -1;
            struct rmig_block_desc ram = {"ram", mem, size, 0, RMIG_BACKING_UNKNOWN, -1, 0};
            rmig_sink_add_block(sink, &ram, NULL);
            int rc = rmig_sink_listen(sink, address);              // ":4444"
            while (rc == RMIG_OK && ev.type != RMIG_SINK_FINISHED) {
                rc = rmig_sink_wait(sink, &ev, RMIG_FOREVER);
                if (ev.type == RMIG_SINK_BLOCKS)                   // rmig_sink_peer_block() says what the source has
                    rmig_sink_accept_blocks(sink);
                if (ev.type == RMIG_SINK_FORGOTTEN)                // a source that was none: void is what it has sent
                    have = 0;
                size_t got = rmig_sink_get(sink, (char *)state + have, state_max - have);
                have += got;
                if (got < ev.stream_bytes)
                    rmig_sink_refuse(sink, "the state is too large");
                if (ev.type == RMIG_SINK_TAKE)                     // all is there: make devices of the state, then
                    rmig_sink_take(sink);
            }
            if (rc != RMIG_OK)
                fprintf(stderr, "sink: %s\n", rmig_sink_error(sink)->text);
            rmig_sink_close(sink);
            rmig_fabric_close(fabric);
            return rc == RMIG_OK ? (int64_t)have : rc == RMIG_ERR_HANDOVER ? -2 : -1;
        }

    examples/minimal.c is both ends in one program. docs/embedding.md has the event loop,
    the convergence loop and what to do about errors.

MACROS TO OVERRIDE, before the include (the implementation and all users alike)

    RMIG_CHUNK_SIZE     default of the parameter chunk-size, bytes (1 MiB).
                        A power of two from 1 MiB to 1 GiB, checked by the compiler.
    RMIG_MALLOC(n)      allocation, default malloc/realloc/free of <stdlib.h>.
    RMIG_REALLOC(p,n)   Define all three or none. rmig copes with NULL.
    RMIG_FREE(p)
    RMIG_LOG(text)      called with a line of text for each session error, and for each source
                        that a sink forgets. Default: nothing.
    RMIG_ASSERT(c)      internal invariants, default assert() of <assert.h>.
                        Never fed by a peer, a parameter or an argument.
    RMIG_STATIC         everything static: a private copy inside one file.
    RMIG_NAMESPACE      e.g. acme_: public functions become acme_rmig_..., so that
                        two vendored copies live in one program.

THREADS

    There are no globals. A fabric, with its sources and sinks, is used by one
    thread at a time; different fabrics by different threads at once. The core
    starts no thread; a fabric may, for itself, and says so. The guest may go on writing its RAM at any time.

ERRORS

    Functions return RMIG_OK (0), RMIG_PENDING (1: not finished yet) or a negative
    enum rmig_status. After statuses above RMIG_SESSION_ERRORS (-1 ... -99) the session goes on: this
    call was refused and nothing changed (but for RMIG_ERR_FORGOTTEN: the sink has let a source go).
    Those below (-100 ...) end the session: call close.
    rmig_source_error() and rmig_sink_error() say what happened, in words.

    Nobody has to look at every status. A block, pages or stream bytes that a call refused are
    missing, so the refusal taints the session: from then on end_round and finish at the source,
    accept_blocks, take and complete at the sink return it with its text and do nothing. An
    embedder that has dealt with it calls rmig_source_forgive or rmig_sink_forgive. Where a call
    that begins an operation is refused, process returns that refusal until another has begun.
    Every function takes NULL for its object, and returns RMIG_ERR_ARGUMENT (or 0, or nothing).

MEMORY

    A session allocates when it is opened, when blocks are added and when the
    session is set up; never in a round after the first. A source needs one bit a
    page (1/32768 of RAM) and about 80 bytes a chunk, a sink about 120 bytes a chunk, and each 4.5 MiB of buffers.
    Guest RAM stays the embedder's and must stay mapped until close.

VERSIONING

    RMIG_VERSION is major * 10000 + minor * 100 + patch. Before 1.0 a minor step may change the API;
    the wire is protocol version 1 of QEMU's RDMA migration, and its extension is negotiated.

LICENCE

    MIT, see the end of this file.
*/
#ifndef RMIG_H
#define RMIG_H

/* Under -std=c11 libc hides what the fabrics' implementations need (clocks, addresses). It must be asked for before the
   first header. */
#if defined(RMIG_IMPLEMENTATION) && defined(__STRICT_ANSI__) && !defined(_DEFAULT_SOURCE) && !defined(_GNU_SOURCE) &&  \
    !defined(_POSIX_C_SOURCE)
#define _DEFAULT_SOURCE 1
#endif

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define RMIG_VERSION_MAJOR 0
#define RMIG_VERSION_MINOR 1
#define RMIG_VERSION_PATCH 0
#define RMIG_VERSION (RMIG_VERSION_MAJOR * 10000 + RMIG_VERSION_MINOR * 100 + RMIG_VERSION_PATCH)

// >>config

#define RMIG_KIB ((uint64_t)1 << 10)
#define RMIG_MIB ((uint64_t)1 << 20)
#define RMIG_GIB ((uint64_t)1 << 30)

#define RMIG_CHUNK_SIZE_MIN 0x100000 // 1 MiB
#define RMIG_CHUNK_SIZE_MAX 0x40000000 // 1 GiB

#ifndef RMIG_CHUNK_SIZE
#define RMIG_CHUNK_SIZE RMIG_CHUNK_SIZE_MIN
#endif

#ifdef __cplusplus
#define RMIG__STATIC_ASSERT(c, text) static_assert(c, text)
#else
#define RMIG__STATIC_ASSERT(c, text) _Static_assert(c, text)
#endif

RMIG__STATIC_ASSERT((RMIG_CHUNK_SIZE) >= RMIG_CHUNK_SIZE_MIN && (RMIG_CHUNK_SIZE) <= RMIG_CHUNK_SIZE_MAX &&
                        ((RMIG_CHUNK_SIZE) & ((RMIG_CHUNK_SIZE)-1)) == 0,
                    "RMIG_CHUNK_SIZE must be a power of two from 1 MiB (1048576) to 1 GiB (1073741824)");
RMIG__STATIC_ASSERT(sizeof(size_t) >= 8, "rmig needs a 64-bit host");

#define RMIG_NAME_MAX 255 // bytes in a block's name, without the final NUL
#define RMIG_FOREVER UINT64_MAX // as a timeout or a deadline: none

#ifdef RMIG_STATIC
#define RMIG_API static __attribute__((unused))
#else
#define RMIG_API extern
#endif

#ifdef RMIG_NAMESPACE
#define RMIG__PASTE2(a, b) a##b
#define RMIG__PASTE(a, b) RMIG__PASTE2(a, b)
#define RMIG__NAME(x) RMIG__PASTE(RMIG_NAMESPACE, x)
#define rmig_status_text RMIG__NAME(rmig_status_text)
#define rmig_status_hint RMIG__NAME(rmig_status_hint)
#define rmig_status_name RMIG__NAME(rmig_status_name)
#define rmig_fail RMIG__NAME(rmig_fail)
#define rmig_size_parse RMIG__NAME(rmig_size_parse)
#define rmig_size_format RMIG__NAME(rmig_size_format)
#define rmig_param_list RMIG__NAME(rmig_param_list)
#define rmig_set_param RMIG__NAME(rmig_set_param)
#define rmig_get_param RMIG__NAME(rmig_get_param)
#define rmig_set RMIG__NAME(rmig_set)
#define rmig_get RMIG__NAME(rmig_get)
#define rmig_blocks_init RMIG__NAME(rmig_blocks_init)
#define rmig_blocks_free RMIG__NAME(rmig_blocks_free)
#define rmig_blocks_add RMIG__NAME(rmig_blocks_add)
#define rmig_blocks_by_name RMIG__NAME(rmig_blocks_by_name)
#define rmig_blocks_by_offset RMIG__NAME(rmig_blocks_by_offset)
#define rmig_is_zero RMIG__NAME(rmig_is_zero)
#define rmig_is_zero_portable RMIG__NAME(rmig_is_zero_portable)
#define rmig_holes_open RMIG__NAME(rmig_holes_open)
#define rmig_holes_close RMIG__NAME(rmig_holes_close)
#define rmig_holes_next_data RMIG__NAME(rmig_holes_next_data)
#define rmig_holes_forget RMIG__NAME(rmig_holes_forget)
#define rmig_encode_private_data RMIG__NAME(rmig_encode_private_data)
#define rmig_decode_private_data RMIG__NAME(rmig_decode_private_data)
#define rmig_encode_header RMIG__NAME(rmig_encode_header)
#define rmig_decode_header RMIG__NAME(rmig_decode_header)
#define rmig_encode_ram_block RMIG__NAME(rmig_encode_ram_block)
#define rmig_decode_ram_block RMIG__NAME(rmig_decode_ram_block)
#define rmig_encode_compress RMIG__NAME(rmig_encode_compress)
#define rmig_decode_compress RMIG__NAME(rmig_decode_compress)
#define rmig_encode_register RMIG__NAME(rmig_encode_register)
#define rmig_decode_register RMIG__NAME(rmig_decode_register)
#define rmig_encode_register_result RMIG__NAME(rmig_encode_register_result)
#define rmig_decode_register_result RMIG__NAME(rmig_decode_register_result)
#define rmig_encode_hello RMIG__NAME(rmig_encode_hello)
#define rmig_decode_hello RMIG__NAME(rmig_decode_hello)
#define rmig_encode_block_entry RMIG__NAME(rmig_encode_block_entry)
#define rmig_decode_block_entry RMIG__NAME(rmig_decode_block_entry)
#define rmig_encode_batch RMIG__NAME(rmig_encode_batch)
#define rmig_decode_batch RMIG__NAME(rmig_decode_batch)
#define rmig_encode_batch_result RMIG__NAME(rmig_encode_batch_result)
#define rmig_decode_batch_result RMIG__NAME(rmig_decode_batch_result)
#define rmig_message_name RMIG__NAME(rmig_message_name)
#define rmig_split_address RMIG__NAME(rmig_split_address)
#define rmig_fabric_close RMIG__NAME(rmig_fabric_close)
#define rmig_source_open RMIG__NAME(rmig_source_open)
#define rmig_source_close RMIG__NAME(rmig_source_close)
#define rmig_source_add_block RMIG__NAME(rmig_source_add_block)
#define rmig_source_block_at RMIG__NAME(rmig_source_block_at)
#define rmig_source_connect_start RMIG__NAME(rmig_source_connect_start)
#define rmig_source_connect RMIG__NAME(rmig_source_connect)
#define rmig_source_begin_round RMIG__NAME(rmig_source_begin_round)
#define rmig_source_save_page RMIG__NAME(rmig_source_save_page)
#define rmig_source_save_range RMIG__NAME(rmig_source_save_range)
#define rmig_source_save_bitmap RMIG__NAME(rmig_source_save_bitmap)
#define rmig_source_end_round_start RMIG__NAME(rmig_source_end_round_start)
#define rmig_source_end_round RMIG__NAME(rmig_source_end_round)
#define rmig_source_put_some RMIG__NAME(rmig_source_put_some)
#define rmig_source_put RMIG__NAME(rmig_source_put)
#define rmig_source_flush_start RMIG__NAME(rmig_source_flush_start)
#define rmig_source_flush RMIG__NAME(rmig_source_flush)
#define rmig_source_finish_start RMIG__NAME(rmig_source_finish_start)
#define rmig_source_finish RMIG__NAME(rmig_source_finish)
#define rmig_source_process RMIG__NAME(rmig_source_process)
#define rmig_source_fds RMIG__NAME(rmig_source_fds)
#define rmig_source_next_deadline RMIG__NAME(rmig_source_next_deadline)
#define rmig_source_forgive RMIG__NAME(rmig_source_forgive)
#define rmig_source_cancel RMIG__NAME(rmig_source_cancel)
#define rmig_source_error RMIG__NAME(rmig_source_error)
#define rmig_source_stats RMIG__NAME(rmig_source_stats)
#define rmig_source_extended RMIG__NAME(rmig_source_extended)
#define rmig_sink_open RMIG__NAME(rmig_sink_open)
#define rmig_sink_close RMIG__NAME(rmig_sink_close)
#define rmig_sink_listen RMIG__NAME(rmig_sink_listen)
#define rmig_sink_address RMIG__NAME(rmig_sink_address)
#define rmig_sink_add_block RMIG__NAME(rmig_sink_add_block)
#define rmig_sink_clear_blocks RMIG__NAME(rmig_sink_clear_blocks)
#define rmig_sink_peer_block RMIG__NAME(rmig_sink_peer_block)
#define rmig_sink_accept_blocks RMIG__NAME(rmig_sink_accept_blocks)
#define rmig_sink_refuse RMIG__NAME(rmig_sink_refuse)
#define rmig_sink_get RMIG__NAME(rmig_sink_get)
#define rmig_sink_complete RMIG__NAME(rmig_sink_complete)
#define rmig_sink_has_return_path RMIG__NAME(rmig_sink_has_return_path)
#define rmig_sink_return_put RMIG__NAME(rmig_sink_return_put)
#define rmig_sink_process RMIG__NAME(rmig_sink_process)
#define rmig_sink_wait RMIG__NAME(rmig_sink_wait)
#define rmig_sink_fds RMIG__NAME(rmig_sink_fds)
#define rmig_sink_next_deadline RMIG__NAME(rmig_sink_next_deadline)
#define rmig_sink_take RMIG__NAME(rmig_sink_take)
#define rmig_sink_forgive RMIG__NAME(rmig_sink_forgive)
#define rmig_sink_cancel RMIG__NAME(rmig_sink_cancel)
#define rmig_sink_error RMIG__NAME(rmig_sink_error)
#define rmig_sink_stats RMIG__NAME(rmig_sink_stats)
#define rmig_sink_extended RMIG__NAME(rmig_sink_extended)
#define rmig_expected_downtime_ns RMIG__NAME(rmig_expected_downtime_ns)
#endif

#ifdef __cplusplus
extern "C" {
#endif

// >>status

/* Every status: name, value, what it means, what to do. -1 ... -99: the session goes on; this call was refused and
   nothing changed, but for FORGOTTEN. -100 ...: the session is over. */
#define RMIG_STATUS_LIST(X)                                                                                            \
    X(OK, 0, "ok", "")                                                                                                 \
    X(PENDING, 1, "not finished yet", "call process again when a descriptor is ready or the deadline has come")        \
    X(ERR_ARGUMENT, -1, "bad argument", "")                                                                            \
    X(ERR_PARAM, -2, "bad parameter", "list the parameters with rmig_param_list")                                      \
    X(ERR_STATE, -3, "call out of order", "")                                                                          \
    X(ERR_FULL, -4, "no room now", "let the session make progress and call again")                                     \
    X(ERR_NO_MEMORY, -5, "out of memory", "free memory, or use larger chunks: tables grow with the chunk count")       \
    X(ERR_WIRE, -6, "malformed message", "the bytes do not follow the protocol")                                       \
    X(ERR_FORGOTTEN, -7, "the source was refused and is forgotten", "the sink listens on: another source can come")    \
    X(ERR_TIMEOUT, -100, "the peer is silent", "check the network, or raise io-timeout or connect-timeout")            \
    X(ERR_PEER_GONE, -101, "the peer went away", "look at the other end for the reason")                               \
    X(ERR_PROTOCOL, -102, "the peer broke the protocol", "the other end is not a healthy rmig or QEMU")                \
    X(ERR_REFUSED, -103, "the peer refused", "")                                                                       \
    X(ERR_FABRIC, -104, "the fabric failed", "")                                                                       \
    X(ERR_REGISTRATION, -105, "memory could not be registered",                                                        \
      "raise RLIMIT_MEMLOCK, lower register-ahead, leave pin-all off, or tell a version 1 sink its peer-chunk-size")   \
    X(ERR_UNREACHABLE, -106, "the address cannot be reached",                                                          \
      "check the address, and that a sink listens there: one whose migration has begun does not")                      \
    X(ERR_CANCELLED, -107, "cancelled", "")                                                                            \
    X(ERR_SETUP, -108, "the session could not be set up", "")                                                          \
    X(ERR_HANDOVER, -109, "the link broke during the handover",                                                        \
      "the peer may or may not own the guest now: ask it before running the guest here")                               \
    X(ERR_FILE, -110, "a file failed", "")

enum rmig_status {
#define RMIG__X(name, value, text, hint) RMIG_##name = value,
    RMIG_STATUS_LIST(RMIG__X)
#undef RMIG__X
};
#define RMIG_SESSION_ERRORS (-100) // a status <= this one has ended the session

/* What went wrong, in words. The text is complete: it names the thing, the value and what would be right. */
struct rmig_error {
    int status; // enum rmig_status
    int provider_code; // the fabric's own number (errno, wc.status, prov_errno), 0 if none
    char text[512];
};

/* Text, hint and C name of a status; never NULL, also for a number that is no status. Any thread. */
RMIG_API const char *rmig_status_text(int status);
RMIG_API const char *rmig_status_hint(int status);
RMIG_API const char *rmig_status_name(int status);

/* Fills *err (which may be NULL) and returns status, so that a failure is one return statement. For fabrics and
   embedders too. format as printf; a longer text is cut. Any thread. */
#if defined(__GNUC__)
__attribute__((format(printf, 4, 5)))
#endif
RMIG_API int
rmig_fail(struct rmig_error *err, int status, int provider_code, const char *format, ...);

// >>size

/* Parameters. Each is a row of one table: set by typed value or by text, read back, listed. */
enum rmig_param {
    RMIG_PARAM_CHUNK_SIZE, // unit of registration, bytes; both ends agree on the source's
    RMIG_PARAM_MERGE_MAX, // longest write made of merged pages, bytes; default 2 x chunk size
    RMIG_PARAM_PIN_ALL, // register all blocks whole before the first round
    RMIG_PARAM_SIGNAL_EVERY, // ask for a completion every so many writes
    RMIG_PARAM_WRITE_DEPTH, // writes outstanding at most
    RMIG_PARAM_REGISTER_AHEAD, // bytes registered ahead of the wire, at least two chunks; 0: one chunk at a time, as
                               // stock QEMU
    RMIG_PARAM_ZERO_DETECT, // do not send or pin what is zero
    RMIG_PARAM_MAX_BANDWIDTH, // bytes per second, 0: unlimited
    RMIG_PARAM_CONNECT_TIMEOUT, // ns for resolving, connecting and the first messages
    RMIG_PARAM_IO_TIMEOUT, // ns without any progress
    RMIG_PARAM_PAGE_SIZE, // of the guest: unit of save_page and of dirty bitmaps, bytes
    RMIG_PARAM_PEER_CHUNK_SIZE, // of a plain version 1 peer, 0: unknown
    RMIG_PARAM_EXTENSION, // offer (source) or grant (sink) the rmig extension
    RMIG_PARAM_HANDOVER_TIMEOUT, // ns without a word of the sink on the handover before the source keeps the guest
    RMIG_PARAM_AUTO_TAKE, // the sink takes the guest as soon as everything is there, without RMIG_SINK_TAKE
    RMIG_PARAM_COUNT
};

enum rmig_unit { RMIG_UNIT_BYTES, RMIG_UNIT_BYTES_PER_SECOND, RMIG_UNIT_COUNT, RMIG_UNIT_SWITCH, RMIG_UNIT_NS };

/* Zero-initialise it: then every parameter has its default. */
struct rmig_config {
    uint64_t value_[RMIG_PARAM_COUNT]; // private: use rmig_set, rmig_get
    uint32_t set_; // private: bit p: parameter p was set

    /* One line per event of the session (no newline), or NULL. Called from inside calls on the session; must not
       call back into it. */
    void (*trace)(void *trace_user, const char *line);
    void *trace_user;
};

struct rmig_param_info {
    enum rmig_param param;
    const char *name; // as in rmig_set_param
    enum rmig_unit unit;
    uint64_t min, max; // range, in the unit
    bool zero_allowed; // 0 is allowed beside min ... max
    bool power_of_two;
    char default_text[32]; // default, as text that rmig_set_param takes
    char range_text[128]; // range in words
    const char *help; // one line
};

/* Text to bytes: a decimal number, with an optional fraction, and an optional suffix B K M G T (1024-based, either
   case, as hypervisor monitors take them). The product must be whole. Returns RMIG_OK, or RMIG_ERR_ARGUMENT with a text
   in *err that quotes the input. Any thread. */
RMIG_API int rmig_size_parse(const char *text, uint64_t *bytes, struct rmig_error *err);
/* Bytes to the shortest exact text ("64M", "1536K", "4097"). Returns buf. Any thread. */
RMIG_API const char *rmig_size_format(uint64_t bytes, char *buf, size_t buf_size);

/* Sets a parameter. Checked now: a value out of range is refused with RMIG_ERR_PARAM, *err (may be NULL) names
   parameter, value and range, and the old value stays. Sizes in bytes, times in ns, switches 0 or 1. */
RMIG_API int rmig_set(struct rmig_config *cfg, enum rmig_param param, uint64_t value, struct rmig_error *err);
/* The value in force: what was set, or the default. 0 for a number that is no parameter. */
RMIG_API uint64_t rmig_get(const struct rmig_config *cfg, enum rmig_param param);
/* The same by name and text: sizes as rmig_size_parse, switches on/off (or yes/no, true/false, 1/0), times "500ms",
   "10s" (ns us ms s; a bare number is milliseconds). Unknown names and values are refused with RMIG_ERR_PARAM. */
RMIG_API int rmig_set_param(struct rmig_config *cfg, const char *name, const char *text, struct rmig_error *err);
/* Writes the value in force as text that rmig_set_param takes. */
RMIG_API int rmig_get_param(const struct rmig_config *cfg, const char *name, char *buf, size_t buf_size,
                            struct rmig_error *err);
/* Fills out[0 ... n-1] with the parameters in the order of enum rmig_param; returns how many there are. */
RMIG_API size_t rmig_param_list(struct rmig_param_info *out, size_t n);

/* Typed setters and getters, one pair a parameter: rmig_set_chunk_size(&cfg, bytes, &err), rmig_chunk_size(&cfg). */
#define RMIG__TYPED(name, PARAM)                                                                                       \
    static inline int rmig_set_##name(struct rmig_config *cfg, uint64_t value, struct rmig_error *err) {               \
        return rmig_set(cfg, RMIG_PARAM_##PARAM, value, err);                                                          \
    }                                                                                                                  \
    static inline uint64_t rmig_##name(const struct rmig_config *cfg) { return rmig_get(cfg, RMIG_PARAM_##PARAM); }
RMIG__TYPED(chunk_size, CHUNK_SIZE)
RMIG__TYPED(merge_max, MERGE_MAX)
RMIG__TYPED(pin_all, PIN_ALL)
RMIG__TYPED(signal_every, SIGNAL_EVERY)
RMIG__TYPED(write_depth, WRITE_DEPTH)
RMIG__TYPED(register_ahead, REGISTER_AHEAD)
RMIG__TYPED(zero_detect, ZERO_DETECT)
RMIG__TYPED(max_bandwidth, MAX_BANDWIDTH)
RMIG__TYPED(connect_timeout, CONNECT_TIMEOUT)
RMIG__TYPED(io_timeout, IO_TIMEOUT)
RMIG__TYPED(page_size, PAGE_SIZE)
RMIG__TYPED(peer_chunk_size, PEER_CHUNK_SIZE)
RMIG__TYPED(extension, EXTENSION)
RMIG__TYPED(handover_timeout, HANDOVER_TIMEOUT)
RMIG__TYPED(auto_take, AUTO_TAKE)
#undef RMIG__TYPED

// >>chunk

/* Chunk arithmetic (protocol version 1, section "Chunks"): chunks are relative to their block; the last may be short.
   Pure. length: of the block, bytes. chunk: chunk size, a power of two. offset < length. */
static inline uint64_t rmig_chunk_index(uint64_t offset, uint64_t chunk) { return offset / chunk; }
static inline uint64_t rmig_chunk_start(uint64_t index, uint64_t chunk) { return index * chunk; }
static inline uint64_t rmig_chunk_end(uint64_t index, uint64_t chunk, uint64_t length) {
    uint64_t last = length == 0 ? 0 : (length - 1) / chunk;
    return index >= last ? length : (index + 1) * chunk;
}
/* Chunks that hold data. */
static inline uint64_t rmig_chunk_count(uint64_t length, uint64_t chunk) {
    return length / chunk + (length % chunk != 0);
}
/* Chunks as a stock QEMU counts them: length / chunk + 1, one more than hold data if length is a multiple. */
static inline uint64_t rmig_chunk_count_v1(uint64_t length, uint64_t chunk) { return length / chunk + 1; }
/* The `chunks` field of a registration request for bytes that begin on a chunk's start: chunks after the first. */
static inline uint64_t rmig_chunk_further(uint64_t bytes, uint64_t chunk) {
    return bytes == 0 ? 0 : (bytes - 1) / chunk;
}

// >>block

/* What a block's memory is backed with: decides how holes are found. Reading a never-touched page of a shared memory
   file allocates it, so rmig looks for holes before it looks for zeros. Where this mapping is still being filled in
   from elsewhere (userfaultfd), holes are none: that is noticed, and all of it is read. Where memory is filled in by
   way of another mapping of it, it is not: UNKNOWN. */
enum rmig_backing {
    RMIG_BACKING_UNKNOWN, // read everything
    RMIG_BACKING_ANONYMOUS, // private anonymous mapping: holes by /proc/self/pagemap, not on huge pages of hugetlbfs
    RMIG_BACKING_SHARED_FD, // MAP_SHARED mapping of fd (memfd, tmpfs, hugetlbfs, file): holes by SEEK_DATA
    RMIG_BACKING_DMABUF // MAP_SHARED mapping of fd, a dma-buf of device memory: registered through it, and never looked
                        // at for zeros. The fabric must be able to (verbs, where the device can)
};

/* A RAM block. Zero-initialise, then fill in; name is copied. */
struct rmig_block_desc {
    const char *name; // 1 ... 255 bytes, unique among the session's blocks
    void *host; // where the block is mapped in this process
    uint64_t length; // bytes, more than 0; both ends must agree
    uint64_t guest_offset; // where the block begins in the guest's RAM address space; ranges must not overlap
    enum rmig_backing backing;
    int fd; // SHARED_FD, DMABUF: the file; must stay open until close. Its file position is moved (SHARED_FD)
    uint64_t fd_offset; // SHARED_FD, DMABUF: file offset of the block's first byte
};

struct rmig_block {
    char *name;
    uint8_t *host;
    uint64_t length;
    uint64_t guest_offset;
    enum rmig_backing backing;
    int fd;
    uint64_t fd_offset;
};

/* A block's place in two search trees, the first by guest offset, the second by name: in each what hangs below it,
   lower and higher. A block is its index + 1 there, 0 is none. */
struct rmig_blocks_node {
    uint32_t below[2][2];
};

/* The table of RAM blocks: index = order of addition; addition, search by guest offset and by name in O(log n), in
   whatever order they were added. Zero-initialised works. */
struct rmig_blocks {
    struct rmig_block *block; // by index
    struct rmig_blocks_node *node; // by index
    uint32_t root[2]; // of the trees
    uint32_t count, capacity;
    uint32_t last; // where the last search by offset hit
};

RMIG_API void rmig_blocks_init(struct rmig_blocks *t);
RMIG_API void rmig_blocks_free(struct rmig_blocks *t);
/* Adds a block. Returns RMIG_OK and the index (0, 1, 2 ...), or RMIG_ERR_ARGUMENT (no table, empty or long name, NULL
   host, length 0, wrap-around of host or guest range, duplicate name, overlap of guest ranges: the text names both
   blocks), or RMIG_ERR_NO_MEMORY. */
RMIG_API int rmig_blocks_add(struct rmig_blocks *t, const struct rmig_block_desc *desc, uint32_t *index,
                             struct rmig_error *err);
/* RMIG_OK and the index (may be NULL), or RMIG_ERR_ARGUMENT if there is none (a hole, an unknown name, no table). */
RMIG_API int rmig_blocks_by_name(const struct rmig_blocks *t, const char *name, uint32_t *index);
RMIG_API int rmig_blocks_by_offset(struct rmig_blocks *t, uint64_t guest_offset, uint32_t *index);

// >>zero

/* Is the range all zero? Stops within 128 bytes of the first byte that is not. Any alignment, any length. Any
   thread. NULL is not zero, unless n is 0. */
RMIG_API bool rmig_is_zero(const void *p, size_t n);
RMIG_API bool rmig_is_zero_portable(const void *p,
                                    size_t n); // without SIMD: the fallback, and the tests' second method

/* Finds data without making the memory grow. Each function takes NULL, and then finds nothing but data. */
struct rmig_holes {
    int pagemap_fd, maps_fd, uffd; // of this process; -1: not to be had
    uint64_t page; // of the host, bytes
    uint64_t sure_from, sure_to; // addresses: holes there are believed until rmig_holes_forget
    uint64_t data_from, data_to; // addresses: a file had data for them, without a hole, since then
    int others; // what /proc/self/smaps shows of the whole process, RMIG__SMAPS_* of the implementation; -1: not read
};
/* Opens what tells of this process: a child that fork makes opens its own. Calls userfaultfd: a filter of system calls
   should refuse that, and not kill for it. */
RMIG_API void rmig_holes_open(struct rmig_holes *h);
RMIG_API void rmig_holes_close(struct rmig_holes *h);
/* The next run in [from, to) of the block that may hold something other than zero: [*data, *end). *data == to: none
   left, all of it is holes and reads as zero. Where the backing cannot say, or the block's description is not true of
   what is mapped there, or somebody else's userfaultfd fills the memory in, it is all data. Blocking: a few system
   calls. Where userfaultfd is refused, or tracks writes, one pass over /proc/self/smaps, about 25 ms a GiB of what the
   process has in memory, once between two calls of rmig_holes_forget. */
RMIG_API void rmig_holes_next_data(struct rmig_holes *h, const struct rmig_block *b, uint64_t from, uint64_t to,
                                   uint64_t *data, uint64_t *end);
/* Memory may have come to be filled in from elsewhere, or been mapped anew, since it was looked at: to be called where
   a round begins. */
RMIG_API void rmig_holes_forget(struct rmig_holes *h);

// >>merge

/* Page writes in, maximal contiguous extents out. A set of pages (a bit each); pages may be added in any order and
   more than once, extents come out in ascending order. Pure: the caller owns the bits ((pages + 63) / 64 words). */
struct rmig_merge {
    uint64_t *bits;
    uint64_t pages; // size of the set
    uint64_t pending; // pages now in it
    uint64_t low, high; // all of them are in [low, high): searches go no further
};

/* Bits of words [first / 64, ...) that belong to pages first ... first + n - 1, n in 1 ... 64 - first % 64. */
static inline uint64_t rmig__word_mask(uint64_t first, uint64_t n) {
    return (n >= 64 ? ~(uint64_t)0 : ((uint64_t)1 << n) - 1) << (first % 64);
}

static inline uint64_t rmig__popcount(uint64_t x) {
#if defined(__GNUC__) && (defined(__POPCNT__) || !defined(__x86_64__))
    return (uint64_t)__builtin_popcountll(x);
#else
    x = x - ((x >> 1) & 0x5555555555555555u);
    x = (x & 0x3333333333333333u) + ((x >> 2) & 0x3333333333333333u);
    x = (x + (x >> 4)) & 0x0f0f0f0f0f0f0f0fu;
    return (x * 0x0101010101010101u) >> 56;
#endif
}

static inline uint64_t rmig__ctz(uint64_t x) { // x != 0
#if defined(__GNUC__)
    return (uint64_t)__builtin_ctzll(x);
#else
    return rmig__popcount((x & (~x + 1)) - 1);
#endif
}

static inline void rmig__merge_word(struct rmig_merge *m, uint64_t word, uint64_t bits) {
    uint64_t fresh = bits & ~m->bits[word];
    if (fresh == 0)
        return;
    m->bits[word] |= fresh;
    m->pending += fresh == ~(uint64_t)0 ? 64 : rmig__popcount(fresh);
}

static inline void rmig__merge_widen(struct rmig_merge *m, uint64_t first, uint64_t end) {
    bool empty = m->pending == 0;
    m->low = empty || first < m->low ? first : m->low;
    m->high = empty || end > m->high ? end : m->high;
}

/* Adds pages first ... first + n - 1, all inside the set. */
static inline void rmig_merge_add(struct rmig_merge *m, uint64_t first, uint64_t n) {
    rmig__merge_widen(m, first, first + n);
    while (n > 0) {
        uint64_t here = 64 - first % 64 < n ? 64 - first % 64 : n;
        rmig__merge_word(m, first / 64, rmig__word_mask(first, here));
        first += here;
        n -= here;
    }
}

/* Adds one page of the set; false if it was in it. */
static inline bool rmig_merge_add_page(struct rmig_merge *m, uint64_t page) {
    uint64_t bit = (uint64_t)1 << (page % 64);
    if ((m->bits[page / 64] & bit) != 0)
        return false;
    rmig__merge_widen(m, page, page + 1);
    m->bits[page / 64] |= bit;
    m->pending++;
    return true;
}

/* Adds the pages whose bit is set in a dirty bitmap of KVM's layout: bit i (of word i / 64) is page first + i, i < n.
   Bits at or above n in the last word are ignored. */
static inline void rmig_merge_add_bitmap(struct rmig_merge *m, uint64_t first, const uint64_t *bitmap, uint64_t n) {
    uint64_t shift = first % 64, word = first / 64;
    rmig__merge_widen(m, first, first + n);
    for (uint64_t i = 0; i < n; i += 64, word++) {
        uint64_t bits = bitmap[i / 64];
        if (n - i < 64)
            bits &= rmig__word_mask(0, n - i);
        if (bits == 0)
            continue;
        rmig__merge_word(m, word, bits << shift);
        if (shift != 0 && bits >> (64 - shift) != 0)
            rmig__merge_word(m, word + 1, bits >> (64 - shift));
    }
}

/* The first extent at or after page `from` and below `to` (<= pages): true, and its first page and length, at most
   max pages (> 0). Does not take it out. */
static inline bool rmig_merge_next(const struct rmig_merge *m, uint64_t from, uint64_t to, uint64_t max,
                                   uint64_t *first, uint64_t *n) {
    from = from < m->low ? m->low : from;
    to = to > m->high ? m->high : to;
    if (m->pending == 0 || from >= to)
        return false;
    uint64_t word = from / 64, bits = m->bits[word] >> (from % 64);
    if (bits != 0) {
        from += rmig__ctz(bits);
    } else {
        do {
            word++;
            if (word * 64 >= to)
                return false;
        } while (m->bits[word] == 0);
        from = word * 64 + rmig__ctz(m->bits[word]);
    }
    if (from >= to)
        return false;
    uint64_t end = to - from < max ? to : from + max;
    uint64_t at = from;
    while (at < end) {
        uint64_t clear = ~(m->bits[at / 64] >> (at % 64));
        uint64_t run = 64 - at % 64;
        if (clear != 0 && rmig__ctz(clear) < run) {
            at += rmig__ctz(clear);
            break;
        }
        at += run;
    }
    if (at > end)
        at = end;
    *first = from;
    *n = at - from;
    return true;
}

/* Takes pages first ... first + n - 1 out; all of them are in the set. */
static inline void rmig_merge_take(struct rmig_merge *m, uint64_t first, uint64_t n) {
    m->pending -= n;
    m->low = first == m->low ? first + n : m->low;
    while (n > 0) {
        uint64_t here = 64 - first % 64 < n ? 64 - first % 64 : n;
        m->bits[first / 64] &= ~rmig__word_mask(first, here);
        first += here;
        n -= here;
    }
}

// >>wire

/* Messages: types 0 ... 11 are QEMU's protocol version 1, from 64 on rmig's extension (docs/protocol.md). */
#define RMIG_MESSAGE_LIST(X)                                                                                           \
    X(NONE, 0)                                                                                                         \
    X(ERROR, 1)                                                                                                        \
    X(READY, 2)                                                                                                        \
    X(QEMU_FILE, 3)                                                                                                    \
    X(RAM_BLOCKS_REQUEST, 4)                                                                                           \
    X(RAM_BLOCKS_RESULT, 5)                                                                                            \
    X(COMPRESS, 6)                                                                                                     \
    X(REGISTER_REQUEST, 7)                                                                                             \
    X(REGISTER_RESULT, 8)                                                                                              \
    X(REGISTER_FINISHED, 9)                                                                                            \
    X(UNREGISTER_REQUEST, 10)                                                                                          \
    X(UNREGISTER_FINISHED, 11)                                                                                         \
    X(HELLO, 64)                                                                                                       \
    X(HELLO_RESULT, 65)                                                                                                \
    X(BLOCKS, 66)                                                                                                      \
    X(BLOCKS_RESULT, 67)                                                                                               \
    X(REGISTER_BATCH, 68)                                                                                              \
    X(REGISTER_BATCH_RESULT, 69)                                                                                       \
    X(CLEAR_BATCH, 70)                                                                                                 \
    X(KEEPALIVE, 71)                                                                                                   \
    X(FINISH, 72)                                                                                                      \
    X(FINISH_RESULT, 73)                                                                                               \
    X(GOODBYE, 74)                                                                                                     \
    X(FINISH_PENDING, 75)

enum rmig_message {
#define RMIG__X(name, value) RMIG_MSG_##name = value,
    RMIG_MESSAGE_LIST(RMIG__X)
#undef RMIG__X
};
RMIG_API const char *rmig_message_name(uint32_t type); // "READY" ..., "unknown"

#define RMIG_HEADER_SIZE 16
#define RMIG_CONTROL_SIZE 524288 // header and payload, at most: QEMU's control buffer
#define RMIG_PAYLOAD_MAX (RMIG_CONTROL_SIZE - RMIG_HEADER_SIZE)
#define RMIG_REPEAT_MAX 4096 // commands in one message, at most
#define RMIG_PRIVATE_DATA_SIZE 8
#define RMIG_PROTOCOL_VERSION 1
#define RMIG_FLAG_PIN_ALL 0x00000001u
#define RMIG_FLAG_EXTENSION 0x00010000u // rmig's capability bit; a stock QEMU sink clears it
#define RMIG_STREAM_MESSAGE_MAX 32768 // payload of a QEMU_FILE that a stock source sends, at most

/* Encoders write into out[0 ... cap-1] and return the bytes written; decoders read p[0 ... n-1] and return the bytes
   consumed. All return a negative status (RMIG_ERR_WIRE, RMIG_ERR_FULL when cap is too small) and then leave *out
   alone. No allocation, no state; any thread. Numbers on the wire are big-endian; padding is written as 0 and never
   read. */

struct rmig_private_data { // 8 bytes: u32 version, u32 flags
    uint32_t version, flags;
};
RMIG_API int rmig_encode_private_data(uint8_t *out, size_t cap, const struct rmig_private_data *in);
RMIG_API int rmig_decode_private_data(const uint8_t *p, size_t n, struct rmig_private_data *out);

struct rmig_header { // 16 bytes: u32 len, u32 type, u32 repeat, u32 padding
    uint32_t len, type, repeat;
};
RMIG_API int rmig_encode_header(uint8_t *out, size_t cap, const struct rmig_header *in);
/* n: bytes of the whole message as received; must be exactly 16 + len, len at most RMIG_PAYLOAD_MAX. Consumes 16. */
RMIG_API int rmig_decode_header(const uint8_t *p, size_t n, struct rmig_header *out);

#define RMIG_RAM_BLOCK_SIZE 32
struct rmig_ram_block { // RAM_BLOCKS_RESULT: u64 base, u64 offset, u64 length, u32 rkey, u32 padding
    uint64_t base, offset, length;
    uint32_t rkey;
};
RMIG_API int rmig_encode_ram_block(uint8_t *out, size_t cap, const struct rmig_ram_block *in);
RMIG_API int rmig_decode_ram_block(const uint8_t *p, size_t n, struct rmig_ram_block *out);

#define RMIG_COMPRESS_SIZE 24
struct rmig_compress { // COMPRESS, and each entry of CLEAR_BATCH: u32 value, u32 block, u64 start, u64 length
    uint32_t value, block;
    uint64_t start, length; // start in the sink's RAM address space; in CLEAR_BATCH in the block
};
RMIG_API int rmig_encode_compress(uint8_t *out, size_t cap, const struct rmig_compress *in);
RMIG_API int rmig_decode_compress(const uint8_t *p, size_t n, struct rmig_compress *out);

#define RMIG_REGISTER_SIZE 24
struct rmig_register { // REGISTER_REQUEST, UNREGISTER_REQUEST: u64 key, u32 block, u32 padding, u64 chunks
    uint64_t key; // address in the sink's RAM address space; UNREGISTER: chunk number
    uint32_t block;
    uint64_t chunks; // after the first
};
RMIG_API int rmig_encode_register(uint8_t *out, size_t cap, const struct rmig_register *in);
RMIG_API int rmig_decode_register(const uint8_t *p, size_t n, struct rmig_register *out);

#define RMIG_REGISTER_RESULT_SIZE 16
struct rmig_register_result { // REGISTER_RESULT: u32 rkey, u32 padding, u64 base of the block
    uint32_t rkey;
    uint64_t base;
};
RMIG_API int rmig_encode_register_result(uint8_t *out, size_t cap, const struct rmig_register_result *in);
RMIG_API int rmig_decode_register_result(const uint8_t *p, size_t n, struct rmig_register_result *out);

/* HELLO and HELLO_RESULT: entries of u16 tag, u16 length, value. Unknown tags are skipped; a tag that comes twice, or
   with a wrong length, is an error. */
#define RMIG_HELLO_LIST(X)                                                                                             \
    X(1, chunk_size) /* bytes; the source proposes, the sink repeats what holds */                                     \
    X(2, page_size) /* bytes */                                                                                        \
    X(3, key_bits) /* 32 ... 64: width of the sender's keys */                                                         \
    X(4, payload_max) /* bytes after the header that the sender can receive */                                         \
    X(5, batch_max) /* entries of a batch that the sender takes */                                                     \
    X(6, registration_max) /* bytes of one registration at the sender */                                               \
    X(7, idle_max) /* ns without a message after which the sender gives up; 0: never */                                \
    X(8, status) /* HELLO_RESULT: 0, or 1: refused, with a reason */                                                   \
    X(11, features) /* RMIG_FEATURE_*: what the sender knows; what both know holds */
#define RMIG_HELLO_REASON_TAG 9 // text, not NUL-terminated
#define RMIG_FEATURE_FINISH_PENDING 1u // a sink that needs time to answer FINISH says so again and again
struct rmig_hello {
#define RMIG__X(tag, name) uint64_t name;
    RMIG_HELLO_LIST(RMIG__X)
#undef RMIG__X
    char reason[200];
};
RMIG_API int rmig_encode_hello(uint8_t *out, size_t cap, const struct rmig_hello *in);
RMIG_API int rmig_decode_hello(const uint8_t *p, size_t n, struct rmig_hello *out); // consumes all of p, n

struct rmig_block_entry { // BLOCKS: after u32 total (at most 131072), u32 first, `repeat` times: u64 length, u64 guest
                          // offset, u8 n, name
    uint64_t length, guest_offset;
    char name[RMIG_NAME_MAX + 1];
};
RMIG_API int rmig_encode_block_entry(uint8_t *out, size_t cap, const struct rmig_block_entry *in);
RMIG_API int rmig_decode_block_entry(const uint8_t *p, size_t n, struct rmig_block_entry *out);

#define RMIG_BATCH_SIZE 24
struct rmig_batch { // REGISTER_BATCH: u32 block, u32 padding, u64 offset in the block, u64 length
    uint32_t block;
    uint64_t offset, length; // offset a multiple of the chunk size; length too, or to the block's end
};
RMIG_API int rmig_encode_batch(uint8_t *out, size_t cap, const struct rmig_batch *in);
RMIG_API int rmig_decode_batch(const uint8_t *p, size_t n, struct rmig_batch *out);

#define RMIG_BATCH_RESULT_SIZE 16
struct rmig_batch_result { // REGISTER_BATCH_RESULT: u64 key, u64 remote address of the range's first byte
    uint64_t key, address;
};
RMIG_API int rmig_encode_batch_result(uint8_t *out, size_t cap, const struct rmig_batch_result *in);
RMIG_API int rmig_decode_batch_result(const uint8_t *p, size_t n, struct rmig_batch_result *out);

// >>fabric

/*
The contract between the core and a fabric. Whoever writes a fabric needs nothing else; tests/fabric_conformance.c
holds it to this.

A fabric is a table of functions and an object that begins with struct rmig_fabric. It makes endpoints: objects of its
own that begin with struct rmig_ep. An endpoint is a listener or a connection. No function blocks, except wait (and
reg and dereg, for as long as the system call lasts); all are called by one thread at a time. A fabric never calls
into the core.

The life of a connection on the active side:
    open                resolve the address; poll then yields RMIG_FEV_RESOLVED, or RMIG_FEV_ERROR
    caps, reg, recv     from RESOLVED on
    connect             with private data; poll then yields ESTABLISHED (with the peer's), REJECTED or ERROR
    next                where the name has other addresses, and instead of ESTABLISHED there was REJECTED, ERROR or
                        nothing for too long: goes on from RESOLVED with the next of them
    send, write, ...    from ESTABLISHED on; completions come from poll
    disconnect          optional, orderly: what was posted before is delivered if the peer lives and poll goes on
                        being called; never waits; DISCONNECTED follows at both ends
    cut                 any time: the connection is dead, and nothing of the peer lands any more
    close               any time; frees everything of the endpoint, and cuts what is not delivered yet. The core has
                        cut it and deregistered its regions before.
On the passive side:
    listen              on all addresses of the name that this host has, a host left out meaning all of the host's;
                        poll on the listener yields REQUEST with the source's private data, and again for each request
    reject              refuses a request, or
    open_request        makes the connection's endpoint; caps, reg and recv work at once
    accept              with private data; poll on the new endpoint yields ESTABLISHED or ERROR
A request is used up by reject, and by open_request if that succeeds. Closing a listener leaves accepted connections
alone; requests neither opened nor rejected go with it. Private data arrives whole, and may be padded with zeros.

Order and delivery. Sends arrive in the order of posting, each in the buffer of the oldest receive. A completion of a
SEND or a RECV means that the buffer is the caller's again. A send that finds no receive waits for one, or ends the
connection: the core sends only where a receive is known to be. What differs between fabrics is in struct
rmig_fabric_caps; at least one of sends_after_writes and completion_is_delivery must hold. A write with an id is
complete at the latest when its completion comes; with writes_in_order, a completion covers all writes posted before
it, signalled or not. A fabric may deliver completions that were not asked for.

Who may write. A key is good on its own connection only: whoever else knows it, on whatever connection of the same
fabric, reaches nothing with it. Where the fabric chooses keys, nobody can guess them. dereg alone need not stop a write
that has half arrived; cut does, on every fabric, and so does revoke, which leaves the connection up, where the
endpoint's caps promise it. The core reports memory as this end's only behind one of the two.

Failure. A function that fails returns a negative status and fills *err with text and the provider's code. After
RMIG_FEV_ERROR or RMIG_FEV_DISCONNECTED no further completion is promised; events that arrived before it come before
it. A receive whose data arrived before the peer disconnected is delivered before DISCONNECTED. A write to a bad key
or outside its region never touches the target's memory; the connection fails at one end at least. A peer that
vanishes without a word may stay unnoticed: the core keeps the time.
*/

struct rmig_fabric_ops;
struct rmig_fabric {
    const struct rmig_fabric_ops *ops;
};
struct rmig_ep {
    struct rmig_fabric *fabric;
    uint32_t others; // active side: addresses of the name that next can still go on to
};

enum rmig_access { RMIG_ACCESS_LOCAL_READ = 1, RMIG_ACCESS_LOCAL_WRITE = 2, RMIG_ACCESS_REMOTE_WRITE = 4 };

struct rmig_mr { // a registered region
    void *handle; // the fabric's
    void *desc; // the fabric's, for use in sends, receives and writes
    uint64_t key; // for the peer: never 0 where it may write
    uint64_t remote_address; // for the peer: what addresses the region's first byte
};

struct rmig_write {
    const void *local;
    const struct rmig_mr *mr; // covers local; NULL if caps.local_mr is false
    uint64_t length; // 1 ... caps.write_max
    uint64_t remote_address, key;
    uint64_t id; // comes back in the completion
    bool signal; // a completion is wanted
};

struct rmig_ep_config { // wanted; caps says what was granted, which may be less or more
    uint32_t write_depth, send_depth, recv_depth;
    uint64_t connect_timeout_ns; // for resolving and connecting, each
};

struct rmig_fabric_caps {
    uint64_t write_max; // bytes in one write
    uint64_t registration_max; // bytes in one registration, at least 4 MiB
    uint32_t write_depth, send_depth, recv_depth; // outstanding at most, each at least 1 (recv: 2)
    uint32_t private_data_request, private_data_reply; // bytes, at least 8
    uint32_t key_bits; // 32 ... 64
    bool sends_after_writes; // a send is delivered after all writes posted before it
    bool completion_is_delivery; // a write's completion means that the data is in the target's memory
    bool writes_in_order; // overlapping writes land in order, and completions come in order
    bool local_mr; // local buffers must be registered
    bool offset_addressing; // remote addresses count from each region's start, not from the block's host address
    bool target_must_poll; // data only arrives while the target polls
    bool revokes; // revoke() keeps its promise on this endpoint
};

enum rmig_fabric_event_type {
    RMIG_FEV_REQUEST = 1, // listener: request, private_data
    RMIG_FEV_RESOLVED,
    RMIG_FEV_ESTABLISHED, // private_data (active side)
    RMIG_FEV_REJECTED, // private_data if any, text
    RMIG_FEV_DISCONNECTED, // text
    RMIG_FEV_SEND, // id
    RMIG_FEV_RECV, // id, length
    RMIG_FEV_WRITE, // id
    RMIG_FEV_ERROR // a completion or the connection failed: text, provider_code
};

struct rmig_fabric_event {
    enum rmig_fabric_event_type type;
    uint64_t id;
    uint64_t length; // RECV: bytes received
    const uint8_t *private_data; // valid until the next call on the endpoint
    size_t private_data_length; // as received: may be padded or short
    void *request; // REQUEST: for open_request or reject
    const char *text; // REJECTED, DISCONNECTED, ERROR: in words, never NULL; valid until the next call on the endpoint
    int provider_code;
    bool at_this_end; // ERROR before ESTABLISHED: no other address would do better, as without file descriptors
};

struct rmig_fd { // a descriptor to wait on: readable, or also writable
    int fd;
    bool write;
};

struct rmig_fabric_ops {
    size_t size; // sizeof(struct rmig_fabric_ops) of the header that the fabric was compiled with
    const char *name; // "ofi", "verbs", "sim" ...

    void (*close_fabric)(struct rmig_fabric *f); // after all its endpoints

    /* The clock of this fabric's world, ns, never going back. */
    uint64_t (*now)(struct rmig_fabric *f);
    /* Sleeps until poll on one of the n endpoints may yield something, or the deadline has come. Early return is
       allowed. */
    int (*wait)(struct rmig_fabric *f, struct rmig_ep *const *eps, size_t n, uint64_t deadline, struct rmig_error *err);

    int (*listen)(struct rmig_fabric *f, const char *address, struct rmig_ep **ep, struct rmig_error *err);
    /* The listener's address as the peer would name it ("127.0.0.1:4444": the port that was really bound; the name that
       was given where it has several addresses). Of a connection of the active side: the address at hand.
       NUL-terminated. */
    int (*address)(struct rmig_ep *ep, char *buf, size_t buf_size, struct rmig_error *err);
    int (*open)(struct rmig_fabric *f, const char *address, const struct rmig_ep_config *cfg, struct rmig_ep **ep,
                struct rmig_error *err);
    int (*open_request)(struct rmig_ep *listener, void *request, const struct rmig_ep_config *cfg, struct rmig_ep **ep,
                        struct rmig_error *err);
    int (*reject)(struct rmig_ep *listener, void *request, const uint8_t *private_data, size_t n,
                  struct rmig_error *err);
    int (*connect)(struct rmig_ep *ep, const uint8_t *private_data, size_t n, struct rmig_error *err);
    int (*accept)(struct rmig_ep *ep, const uint8_t *private_data, size_t n, struct rmig_error *err);
    void (*disconnect)(struct rmig_ep *ep);
    void (*close)(struct rmig_ep *ep);
    int (*caps)(struct rmig_ep *ep, struct rmig_fabric_caps *caps, struct rmig_error *err);

    int (*reg)(struct rmig_ep *ep, void *address, uint64_t length, unsigned access, struct rmig_mr *mr,
               struct rmig_error *err);
    int (*dereg)(struct rmig_ep *ep, struct rmig_mr *mr, struct rmig_error *err);

    /* Posting. recv and send: RMIG_OK, RMIG_ERR_FULL (not posted), or an error. mr covers the buffer. */
    int (*recv)(struct rmig_ep *ep, void *buf, uint64_t n, const struct rmig_mr *mr, uint64_t id,
                struct rmig_error *err);
    int (*send)(struct rmig_ep *ep, const void *buf, uint64_t n, const struct rmig_mr *mr, uint64_t id,
                struct rmig_error *err);
    /* Posts writes in order, as one batch where the hardware can; returns how many were taken, 0 ... n (the queue was
       full), or an error. */
    int (*write)(struct rmig_ep *ep, const struct rmig_write *writes, size_t n, struct rmig_error *err);

    /* Up to n events in the order in which they happened; returns how many, or an error of the endpoint itself. */
    int (*poll)(struct rmig_ep *ep, struct rmig_fabric_event *events, size_t n, struct rmig_error *err);
    /* The descriptors to wait on, armed: returns how many were written to fds[0 ... n-1] (at most 4), 0 if the fabric
       has none and wants polling. *ready: poll has something already, do not sleep. */
    int (*fds)(struct rmig_ep *ep, struct rmig_fd *fds, size_t n, bool *ready, struct rmig_error *err);

    /* NULL where a fabric has no such thing. */

    /* As reg, for memory behind a dma-buf (RMIG_BACKING_DMABUF): offset is the region's in the dma-buf, address what
       local and remote addresses count from. */
    int (*reg_dmabuf)(struct rmig_ep *ep, int fd, uint64_t offset, void *address, uint64_t length, unsigned access,
                      struct rmig_mr *mr, struct rmig_error *err);
    /* Whether so many bytes more can be registered, as far as limits tell: RMIG_OK, or an error that says what is
       needed, what is allowed, and how to raise it. charged: of these, what a limit for the process's memory counts too
       (huge pages of hugetlbfs have limits of their own). From RESOLVED on. */
    int (*lockable)(struct rmig_ep *ep, uint64_t bytes, uint64_t charged, struct rmig_error *err);
    /* Takes the peer's right to write away and leaves the connection up: when it returns RMIG_OK no write of the peer
       lands any more, one that has half arrived neither; sends and receives go on. A peer that writes all the same may
       lose the connection. From ESTABLISHED on, if caps.revokes; the keys need not be deregistered. RMIG_ERR_PEER_GONE
       when the connection is over, any other error when it cannot be done: then nothing is promised, and cut does it.
     */
    int (*revoke)(struct rmig_ep *ep, struct rmig_error *err);

    /* Never NULL. */

    /* Ends a connection at once, in any state, without waiting: when it returns no write of the peer lands any more,
       whatever is registered. What was posted and is not delivered may be lost. The peer hears of it as of any end, if
       it was told of the connection before. No event comes here: after it only dereg, cut (which then does nothing) and
       close; poll, fds and wait may not name the endpoint either. Not for listeners. */
    void (*cut)(struct rmig_ep *ep);

    /* NULL where rmig_ep.others is never above 0. */

    /* Active side, before ESTABLISHED, while others is above 0: gives up the address at hand, frees what was made for
       it, and begins with the next; others is then one less. All that was registered has been deregistered before, what
       was posted is forgotten, and all goes as after open. */
    void (*next)(struct rmig_ep *ep);
};

/* Closes a fabric, whatever kind it is, after its sources and sinks. NULL is allowed. */
RMIG_API void rmig_fabric_close(struct rmig_fabric *f);

/* "host:port", "[v6]:port", "host" (port then becomes ""), ":port" (host then becomes ""). For fabrics.
   RMIG_ERR_ARGUMENT when it is none of these, the port is not 0 ... 65535, or a link-local address has no %interface.
   Each buffer holds at least 2 bytes. */
RMIG_API int rmig_split_address(const char *address, char *host, size_t host_size, char *port, size_t port_size,
                                struct rmig_error *err);

// >>source

struct rmig_source;
struct rmig_stats;

/* Makes a source. cfg is copied; NULL means all defaults. Checks parameters against each other: RMIG_ERR_PARAM. *err
   may be NULL. */
RMIG_API int rmig_source_open(struct rmig_fabric *fabric, const struct rmig_config *cfg, struct rmig_source **out,
                              struct rmig_error *err);
/* Frees everything, from any state; NULL is allowed. A connection still up is cut: the sink sees a failure unless
   finish succeeded. May wait up to 100 ms, after a failure of this end, until the peer has been told the reason. */
RMIG_API void rmig_source_close(struct rmig_source *s);

/* Before connect. Indexes count from 0 in the order of addition. Errors as rmig_blocks_add; RMIG_ERR_STATE after
   connect. */
RMIG_API int rmig_source_add_block(struct rmig_source *s, const struct rmig_block_desc *desc, uint32_t *index);

/* Which block holds an offset in the guest's RAM address space, and where in it: for dirty pages known by guest
   address. O(log n), at once for the block of the last hit. RMIG_ERR_ARGUMENT in a hole. Each output may be NULL. */
RMIG_API int rmig_source_block_at(struct rmig_source *s, uint64_t guest_offset, uint32_t *block, uint64_t *offset);

/* Non-blocking calls start an operation; drive it with rmig_source_process until that returns RMIG_OK. The call of the
   same name without _start is the same, waiting. One operation at a time: RMIG_ERR_STATE otherwise. connect resolves,
   connects and agrees on the protocol, within connect-timeout. address: "host:port". All addresses of a name are tried,
   one after the other, each with its share of that time, also when process was called late; an error names each, and
   why it did not do, as far as its text has room (some eight), and counts the others. */
RMIG_API int rmig_source_connect_start(struct rmig_source *s, const char *address);
RMIG_API int rmig_source_connect(struct rmig_source *s, const char *address);

/* A round: begin, save what is dirty, end. Never blocks. In the first round the blocks are exchanged with the sink. */
RMIG_API int rmig_source_begin_round(struct rmig_source *s);

/* What to send, between begin and end of a round. Never blocks and never fails for lack of room: pages are noted in a
   set (a page noted twice before it was sent is sent once), and sending begins at once as far as the fabric takes it.
   What is sent is the memory's content at some time after the call; the embedder's dirty log must catch what the guest
   writes after the call. Offsets and lengths in bytes are widened to whole pages; outside the block:
   RMIG_ERR_ARGUMENT. */
RMIG_API int rmig_source_save_page(struct rmig_source *s, uint32_t block, uint64_t offset);
RMIG_API int rmig_source_save_range(struct rmig_source *s, uint32_t block, uint64_t offset, uint64_t length);
/* A dirty bitmap as KVM_GET_DIRTY_LOG writes it: bit i of word i / 64 is page first_page + i of the block, i < pages.
   Read before the call returns. The fast path. */
RMIG_API int rmig_source_save_bitmap(struct rmig_source *s, uint32_t block, const uint64_t *bitmap, uint64_t first_page,
                                     uint64_t pages);

/* Ends the round: all that was saved is in the sink's memory before the sink hears that the round is over. */
RMIG_API int rmig_source_end_round_start(struct rmig_source *s);
RMIG_API int rmig_source_end_round(struct rmig_source *s);

/* The byte stream for device state: bytes arrive in order, after all pages saved before them. put_some takes what fits
   now and returns how many bytes (0 ... n), or an error; put waits until it has taken all. flush sends what is
   buffered; end_round and finish flush too. */
RMIG_API int64_t rmig_source_put_some(struct rmig_source *s, const void *data, size_t n);
RMIG_API int rmig_source_put(struct rmig_source *s, const void *data, size_t n);
RMIG_API int rmig_source_flush_start(struct rmig_source *s);
RMIG_API int rmig_source_flush(struct rmig_source *s);

/* The handover: RMIG_OK means that the sink has everything and that its embedder has taken the guest. Any other result:
   the guest is still this side's, except RMIG_ERR_HANDOVER (the link broke in the last microseconds: nobody can know).
   A sink that needs time to decide says so again and again; handover-timeout (10 s) without its word ends the session,
   and the guest stays. RMIG_ERR_REFUSED: the sink's embedder did not take it; the text has its reason. With a plain
   version 1 sink there is no answer: RMIG_OK means that everything was delivered, and a failure after the last bytes
   have left is RMIG_ERR_HANDOVER. There, leave the last bytes of device state to finish, or a failure of flush leaves
   the same doubt. */
RMIG_API int rmig_source_finish_start(struct rmig_source *s);
RMIG_API int rmig_source_finish(struct rmig_source *s);

/* Makes all progress possible without waiting. RMIG_PENDING: the operation goes on. RMIG_OK: no operation is under way
   (saved pages may still be). Negative: the session's error, or the refusal of the call that was to begin the last
   operation. Call it when a descriptor is ready and when the deadline
   has come, also between rounds (it keeps the connection alive). */
RMIG_API int rmig_source_process(struct rmig_source *s);
/* Descriptors for the caller's poll/epoll, armed; returns how many (n >= 4 always suffices; 0: the fabric has none, or
   those before are closed and the next call has others; next_deadline then says when to poll). Call it right before
   sleeping, and then next_deadline. */
RMIG_API int rmig_source_fds(struct rmig_source *s, struct rmig_fd *fds, size_t n);
/* When to call process at the latest, in the fabric's ns; 0: at once; RMIG_FOREVER: no time. */
RMIG_API uint64_t rmig_source_next_deadline(struct rmig_source *s);

/* The embedder knows of the call that was refused, and goes on without it: end_round and finish work again. */
RMIG_API void rmig_source_forgive(struct rmig_source *s);

/* Ends the session from any state; the peer is told if it can be. The next process returns RMIG_ERR_CANCELLED, or
   RMIG_ERR_HANDOVER if the last word of finish is on its way already. Not from another thread. */
RMIG_API void rmig_source_cancel(struct rmig_source *s);
/* The last error of a call or of the session; status RMIG_OK if none. Valid until close. */
RMIG_API const struct rmig_error *rmig_source_error(const struct rmig_source *s);
RMIG_API void rmig_source_stats(const struct rmig_source *s, struct rmig_stats *out);
/* True once the peer has agreed to the rmig extension; false: plain version 1. */
RMIG_API bool rmig_source_extended(const struct rmig_source *s);

// >>sink

struct rmig_sink;

enum rmig_sink_event_type {
    RMIG_SINK_NONE,
    RMIG_SINK_CONNECTED, // a source is there; comes again for the next one if this one is forgotten
    RMIG_SINK_FORGOTTEN, // a source was let go before its migration had begun: rmig_sink_error says why, the sink
                         // listens on. Also for one that never came to CONNECTED. What it named and what it put into
                         // the stream is void; the blocks added here stay. An answer that BLOCKS waited for is not
                         // wanted any more
    RMIG_SINK_BLOCKS, // the source asks for the blocks: add those missing, then rmig_sink_accept_blocks or
                      // rmig_sink_refuse; it waits meanwhile, up to its io-timeout: have memory that takes long to make
                      // ready before
    RMIG_SINK_ROUND, // a round ended: memory is as it was at the source at some time in that round
    RMIG_SINK_STREAM, // stream bytes are there: rmig_sink_get until it returns 0; the source waits meanwhile, up to its
                      // io-timeout
    RMIG_SINK_DISCONNECTED, // a plain version 1 source has left: rmig_sink_complete if the stream was whole, else close
    RMIG_SINK_TAKE, // everything has arrived: rmig_sink_take or rmig_sink_refuse
    RMIG_SINK_FINISHED // the guest is this side's, and no peer can write its memory any more
};

struct rmig_sink_event {
    enum rmig_sink_event_type type;
    uint32_t block_count; // BLOCKS: blocks that the source named; 0 from a plain version 1 source, which names them in
                          // the stream
    uint64_t round; // ROUND: 1, 2, ...
    size_t stream_bytes; // STREAM: bytes there now
};

RMIG_API int rmig_sink_open(struct rmig_fabric *fabric, const struct rmig_config *cfg, struct rmig_sink **out,
                            struct rmig_error *err);
/* As rmig_source_close. After a handover it waits until the source, which knows that it is over, has left: up to 100
   ms, after bytes on a return path up to 1 s. */
RMIG_API void rmig_sink_close(struct rmig_sink *s);
/* Listens on "host:port" (port 0: any free one). Requests that are not a migration are rejected, and listening goes
   on. A migration begins when rmig_sink_accept_blocks has returned RMIG_OK; in version 1 with stream bytes or the
   question for the blocks. Whatever a source says or does before, and whatever fails at this end on its account (out of
   memory, no descriptor left, RLIMIT_MEMLOCK), costs that source its connection: it is told why, RMIG_SINK_FORGOTTEN
   comes, and the sink listens on. Nothing can have been written: no memory is registered before the blocks are
   agreed. */
RMIG_API int rmig_sink_listen(struct rmig_sink *s, const char *address);
RMIG_API int rmig_sink_address(struct rmig_sink *s, char *buf, size_t n); // as really bound

/* Any time before accept_blocks. With an extended source blocks are matched by name; with a plain version 1 source by
   order of addition. */
RMIG_API int rmig_sink_add_block(struct rmig_sink *s, const struct rmig_block_desc *desc, uint32_t *index);
/* Takes back all blocks that were added, where each source gets blocks of its own: for the next one, after
   RMIG_SINK_FORGOTTEN. RMIG_ERR_STATE once they are agreed with a source. */
RMIG_API int rmig_sink_clear_blocks(struct rmig_sink *s);
/* What the source said of its block i < block_count. Until close, or until the source is forgotten. */
RMIG_API int rmig_sink_peer_block(struct rmig_sink *s, uint32_t i, struct rmig_block_entry *out);
/* After RMIG_SINK_BLOCKS, which may come again with another source: blocks are added once. RMIG_ERR_FORGOTTEN if a
   block of the source is missing here or has another length, or if the tables cannot be had: both ends say which and
   why, and RMIG_SINK_FORGOTTEN follows. From a version 1 source, whose migration has begun, that ends the session. */
RMIG_API int rmig_sink_accept_blocks(struct rmig_sink *s);

/* After RMIG_SINK_TAKE, which a source of the extension brings about by finish: the guest becomes this end's. The
   source hears so; RMIG_SINK_FINISHED follows when it has confirmed that it lets go. Before the call do all that can
   fail: bring files to the disk, make devices of the state. That may take as long as it needs if rmig_sink_process is
   called meanwhile, at least four times in the source's handover-timeout (10 s): the source then hears that it must
   wait. Until the call the guest is the source's, and any failure leaves it there; from the call on a broken link
   leaves RMIG_ERR_HANDOVER. Where the connection cannot revoke (struct rmig_fabric_caps: libfabric, iWARP) the source
   can write until RMIG_SINK_FINISHED: parse and run nothing that stands in guest memory before. With the parameter
   auto-take the sink takes by itself, and there is no RMIG_SINK_TAKE. RMIG_ERR_STATE at any other time. Does not
   block. */
RMIG_API int rmig_sink_take(struct rmig_sink *s);
/* Refuses the source, from its connection until rmig_sink_take: the guest stays there, and its calls return
   RMIG_ERR_REFUSED with the reason (up to 250 bytes; NULL: none). Before its migration has begun RMIG_SINK_FORGOTTEN
   follows and the sink listens on; afterwards the session is over, and process returns RMIG_ERR_SETUP. RMIG_ERR_STATE
   when there is no source, or the guest is taken. */
RMIG_API int rmig_sink_refuse(struct rmig_sink *s, const char *reason);

/* Copies up to n stream bytes that have arrived; returns how many, 0: none now. */
RMIG_API size_t rmig_sink_get(struct rmig_sink *s, void *buf, size_t n);

/* The return path of a stock QEMU source: a second connection, opened right after the first and before any message,
   for bytes to the source (PONG, SHUT). True while it is up. Whether the source waits for bytes is not said by this but
   by its stream (QEMU's command OPEN_RETURN_PATH). */
RMIG_API bool rmig_sink_has_return_path(const struct rmig_sink *s);
/* Queues all n bytes for it; they are sent as soon as it is up and the source has said READY, each message waiting for
   a READY of its own. RMIG_ERR_FULL when more than 4096 bytes would wait; RMIG_ERR_STATE without a version 1 source,
   before its first message, or if it has opened no return path by then. Bytes that cannot be delivered (the return path
   broke, or stood still for io-timeout) end the session; without bytes a broken return path ends nothing. */
RMIG_API int rmig_sink_return_put(struct rmig_sink *s, const void *data, size_t n);

/* With a plain version 1 source only the reader of the stream knows its end: it says so here. RMIG_SINK_FINISHED
   follows when the bytes put on the return path are delivered and the source cannot write any more: at once where the
   fabric revokes, elsewhere when the source has left, 1 s later at the latest. If that fails, the guest is the
   source's, or nobody can know (RMIG_ERR_HANDOVER): when bytes had gone out on the return path, or when the source has
   left, for a source without a return path does so as soon as its last byte is delivered. What fails in the embedder's
   own hands from that byte on (a disk that is full) leaves the same doubt: keep what there is. */
RMIG_API int rmig_sink_complete(struct rmig_sink *s);

/* Makes progress without waiting and delivers at most one event: RMIG_OK with ev->type (RMIG_SINK_NONE: nothing now),
   or the session's error. After RMIG_SINK_FINISHED each call deregisters some of the guest's memory; rmig_sink_close
   does what is left. Waiting for a source has no deadline; from its request on, silence of io-timeout is an error (a
   plain version 1 source, which is silent while it writes, is granted the time that all of RAM takes at 16 MB/s on
   top). */
RMIG_API int rmig_sink_process(struct rmig_sink *s, struct rmig_sink_event *ev);
/* The same, waiting up to timeout_ns (RMIG_FOREVER allowed) for an event; RMIG_SINK_NONE if none came. */
RMIG_API int rmig_sink_wait(struct rmig_sink *s, struct rmig_sink_event *ev, uint64_t timeout_ns);
RMIG_API int rmig_sink_fds(struct rmig_sink *s, struct rmig_fd *fds, size_t n); // n >= 12 always suffices
RMIG_API uint64_t rmig_sink_next_deadline(struct rmig_sink *s);
/* As rmig_source_forgive. */
RMIG_API void rmig_sink_forgive(struct rmig_sink *s);
/* Ends the session, until the guest is this side's for certain; the source is told if it can be. process then returns
   RMIG_ERR_CANCELLED, or RMIG_ERR_HANDOVER between rmig_sink_take and the source's confirmation. */
RMIG_API void rmig_sink_cancel(struct rmig_sink *s);
/* As rmig_source_error; also why the last source was forgotten. */
RMIG_API const struct rmig_error *rmig_sink_error(const struct rmig_sink *s);
RMIG_API void rmig_sink_stats(const struct rmig_sink *s, struct rmig_stats *out);
RMIG_API bool rmig_sink_extended(const struct rmig_sink *s);

// >>stats

/* Counters of a session, from its opening. Times in ns, sizes in bytes. What a side does not do stays 0. */
struct rmig_stats {
    uint64_t bytes_written; // by RDMA WRITE
    uint64_t pages_written;
    uint64_t bytes_zero; // not written because zero
    uint64_t pages_zero;
    uint64_t bytes_pending; // saved, and not yet known to be in the sink's memory
    uint64_t rounds; // ended
    uint64_t writes_posted, writes_signalled;
    uint64_t registrations, deregistrations; // of guest RAM, at this end
    uint64_t bytes_registered; // now, at this end
    uint64_t registration_ns; // spent registering
    uint64_t control_sent, control_received; // messages
    uint64_t stream_bytes; // device state
    uint64_t setup_ns; // connect to blocks agreed
    uint64_t round_bytes, round_ns; // of the round that runs, or else of the last: written and zero; time since begin
    uint64_t round_saved; // bytes saved in that round
    uint64_t throughput; // bytes per second over the wire: now, while a round writes, or in the last round that did
    uint64_t dirty_rate; // bytes per second: saved in this round over the time from the round before's begin to the
                         // last save; in the first round, what is saved beyond all blocks once
    uint64_t message_rtt_ns; // shortest request to its reply
};

/* How long it takes to move `dirty` more bytes at the measured throughput, with the two messages that end a round: with
   bytes_pending, what is left of the round that runs, or more than that where some of it is zero. RMIG_FOREVER when
   nothing was measured yet. Pure. */
RMIG_API uint64_t rmig_expected_downtime_ns(const struct rmig_stats *stats, uint64_t dirty);

#ifdef __cplusplus
}
#endif

#endif // RMIG_H

#if defined(RMIG_IMPLEMENTATION) && !defined(RMIG_IMPLEMENTATION_DONE)
#define RMIG_IMPLEMENTATION_DONE

// >>config: implementation

#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/types.h>
#ifdef __linux__
#include <linux/userfaultfd.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/vfs.h>
#endif
#include <unistd.h>
#if (defined(__x86_64__) || defined(__i386__)) && defined(__GNUC__)
#include <immintrin.h>
#define RMIG__X86 1
#endif

#ifndef RMIG_MALLOC
#define RMIG_MALLOC(n) malloc(n)
#define RMIG_REALLOC(p, n) realloc(p, n)
#define RMIG_FREE(p) free(p)
#endif
#ifndef RMIG_ASSERT
#include <assert.h>
#define RMIG_ASSERT(c) assert(c)
#endif
#ifndef RMIG_LOG
#define RMIG_LOG(text) ((void)(text))
#endif

#ifdef RMIG_STATIC
#define RMIG__DEF static __attribute__((unused))
#else
#define RMIG__DEF
#endif

#ifdef __cplusplus
extern "C" {
#endif

static void *rmig__calloc(uint64_t n, size_t size) {
    if (n == 0)
        n = 1;
    if (n > SIZE_MAX / 2 / size)
        return NULL;
    void *p = RMIG_MALLOC((size_t)n * size);
    if (p != NULL)
        memset(p, 0, (size_t)n * size);
    return p;
}

static void rmig__release(void *p) { // the override need not take NULL
    if (p != NULL)
        RMIG_FREE(p);
}

static uint64_t rmig__min(uint64_t a, uint64_t b) { return a < b ? a : b; }
static uint64_t rmig__max(uint64_t a, uint64_t b) { return a > b ? a : b; }
static bool rmig__is_power_of_two(uint64_t x) { return x != 0 && (x & (x - 1)) == 0; }

// >>status: implementation

RMIG__DEF const char *rmig_status_text(int status) {
    switch (status) {
#define RMIG__X(name, value, text, hint)                                                                               \
    case value:                                                                                                        \
        return text;
        RMIG_STATUS_LIST(RMIG__X)
#undef RMIG__X
    default:
        return "unknown status";
    }
}

RMIG__DEF const char *rmig_status_hint(int status) {
    switch (status) {
#define RMIG__X(name, value, text, hint)                                                                               \
    case value:                                                                                                        \
        return hint;
        RMIG_STATUS_LIST(RMIG__X)
#undef RMIG__X
    default:
        return "";
    }
}

RMIG__DEF const char *rmig_status_name(int status) {
    switch (status) {
#define RMIG__X(name, value, text, hint)                                                                               \
    case value:                                                                                                        \
        return "RMIG_" #name;
        RMIG_STATUS_LIST(RMIG__X)
#undef RMIG__X
    default:
        return "RMIG_UNKNOWN";
    }
}

RMIG__DEF int rmig_fail(struct rmig_error *err, int status, int provider_code, const char *format, ...) {
    if (err == NULL)
        return status;
    err->status = status;
    err->provider_code = provider_code;
    char text[sizeof err->text]; // an argument may be err->text itself
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    memcpy(err->text, text, sizeof text);
    return status;
}

// >>size: implementation

/* A decimal number as it stands in a text: digits, then perhaps a point and more digits. */
struct rmig__decimal {
    uint64_t integer;
    const char *fraction; // the digits behind the point
    size_t digits; // how many
};

/* Reads one from *text and moves *text behind it. False if there is none, or its integer part does not fit. */
static bool rmig__number(const char **text, struct rmig__decimal *d) {
    const char *p = *text;
    d->integer = 0;
    for (; *p >= '0' && *p <= '9'; p++) {
        uint64_t digit = (uint64_t)(*p - '0');
        if (d->integer > (UINT64_MAX - digit) / 10)
            return false;
        d->integer = d->integer * 10 + digit;
    }
    bool any = p != *text;
    d->fraction = p;
    if (*p == '.') {
        d->fraction = ++p;
        while (*p >= '0' && *p <= '9')
            p++;
    }
    d->digits = (size_t)(p - d->fraction);
    *text = p;
    return any || d->digits > 0;
}

/* The number times unit (below 2^60), if that is a whole number that fits. From the last digit to the first, the
   fraction's tail times unit is whole at each step if it is in the end. */
static bool rmig__scale(const struct rmig__decimal *d, uint64_t unit, uint64_t *out) {
    uint64_t rest = 0;
    for (size_t i = d->digits; i-- > 0;) {
        rest += (uint64_t)(d->fraction[i] - '0') * unit;
        if (rest % 10 != 0)
            return false;
        rest /= 10;
    }
    if (d->integer > (UINT64_MAX - rest) / unit)
        return false;
    *out = d->integer * unit + rest;
    return true;
}

RMIG__DEF int rmig_size_parse(const char *text, uint64_t *bytes, struct rmig_error *err) {
    if (text == NULL || bytes == NULL)
        return rmig_fail(err, RMIG_ERR_ARGUMENT, 0, "size: NULL; give a text such as \"64M\"");
    const char *p = text;
    struct rmig__decimal number;
    uint64_t unit = 1, value;
    bool ok = rmig__number(&p, &number);
    if (ok && *p != '\0') {
        static const char suffixes[] = "BKMGT";
        char upper = (char)(*p >= 'a' && *p <= 'z' ? *p - 'a' + 'A' : *p);
        const char *at = strchr(suffixes, upper);
        ok = at != NULL && p[1] == '\0';
        if (ok)
            unit = (uint64_t)1 << (10 * (at - suffixes));
    }
    if (!ok)
        return rmig_fail(err, RMIG_ERR_ARGUMENT, 0,
                         "size \"%.60s\": expected a number of bytes below 2^64, with an optional suffix B K M G T "
                         "(1024-based), such as 64M",
                         text);
    if (!rmig__scale(&number, unit, &value))
        return rmig_fail(err, RMIG_ERR_ARGUMENT, 0, "size \"%.60s\": must be a whole number of bytes below 2^64", text);
    *bytes = value;
    return RMIG_OK;
}

RMIG__DEF const char *rmig_size_format(uint64_t bytes, char *buf, size_t buf_size) {
    static const char suffixes[] = "\0KMGT";
    unsigned at = 0;
    while (bytes != 0 && bytes % 1024 == 0 && at < 4) {
        bytes /= 1024;
        at++;
    }
    char suffix[2] = {suffixes[at], '\0'};
    snprintf(buf, buf_size, "%llu%s", (unsigned long long)bytes, suffix);
    return buf;
}

struct rmig__param_row {
    const char *name;
    enum rmig_unit unit;
    uint64_t min, max, default_value;
    bool zero_allowed, power_of_two;
    const char *help;
};

#define RMIG__MS ((uint64_t)1000000)
#define RMIG__SECOND ((uint64_t)1000000000)

/* In the order of enum rmig_param. A default of 0 for merge-max stands for 2 x chunk-size. */
static const struct rmig__param_row rmig__params[RMIG_PARAM_COUNT] = {
    {"chunk-size", RMIG_UNIT_BYTES, RMIG_CHUNK_SIZE_MIN, RMIG_CHUNK_SIZE_MAX, RMIG_CHUNK_SIZE, false, true,
     "unit of registration; the source's holds, or a sink set to another refuses"},
    {"merge-max", RMIG_UNIT_BYTES, 4096, (uint64_t)1 << 40, 0, false, false,
     "longest write made of merged pages; 16M is the most on the wire"},
    {"pin-all", RMIG_UNIT_SWITCH, 0, 1, 0, false, false, "register all RAM before the first round"},
    {"signal-every", RMIG_UNIT_COUNT, 1, 65536, 64, false, false, "ask for a completion every so many writes"},
    {"write-depth", RMIG_UNIT_COUNT, 1, 65536, 128, false, false, "writes outstanding at most"},
    {"register-ahead", RMIG_UNIT_BYTES, RMIG_CHUNK_SIZE_MIN, (uint64_t)1 << 40, 128 * RMIG_MIB, true, false,
     "bytes registered ahead of the wire, at least two chunks; 0: one at a time, as stock QEMU"},
    {"zero-detect", RMIG_UNIT_SWITCH, 0, 1, 1, false, false, "neither send nor pin what is all zero"},
    {"max-bandwidth", RMIG_UNIT_BYTES_PER_SECOND, 4096, (uint64_t)1 << 50, 0, true, false,
     "bytes per second; 0: unlimited"},
    {"connect-timeout", RMIG_UNIT_NS, RMIG__MS, 3600 * RMIG__SECOND, 10 * RMIG__SECOND, false, false,
     "for resolving, connecting and agreeing"},
    {"io-timeout", RMIG_UNIT_NS, RMIG__MS, 3600 * RMIG__SECOND, 30 * RMIG__SECOND, false, false,
     "without any progress or word from the peer"},
    {"page-size", RMIG_UNIT_BYTES, 4096, RMIG_CHUNK_SIZE_MIN, 4096, false, true,
     "of the guest: unit of dirty bitmaps and of saved pages"},
    {"peer-chunk-size", RMIG_UNIT_BYTES, RMIG_CHUNK_SIZE_MIN, RMIG_CHUNK_SIZE_MAX, 0, true, true,
     "of a plain version 1 peer; 0: unknown, any is safe"},
    {"extension", RMIG_UNIT_SWITCH, 0, 1, 1, false, false, "use rmig's extension when the peer has it too"},
    {"handover-timeout", RMIG_UNIT_NS, RMIG__MS, 3600 * RMIG__SECOND, 10 * RMIG__SECOND, false, false,
     "of a source: without the sink's word on the handover; the guest then stays"},
    {"auto-take", RMIG_UNIT_SWITCH, 0, 1, 0, false, false, "of a sink: take the guest without asking the embedder"},
};

static bool rmig__param_valid(enum rmig_param param) {
    return (unsigned)param < RMIG_PARAM_COUNT; // a negative number becomes a large one
}

/* A value as text that rmig_set_param takes. */
static void rmig__param_text(const struct rmig__param_row *row, uint64_t value, char *buf, size_t n) {
    switch (row->unit) {
    case RMIG_UNIT_BYTES:
    case RMIG_UNIT_BYTES_PER_SECOND:
        rmig_size_format(value, buf, n);
        break;
    case RMIG_UNIT_COUNT:
        snprintf(buf, n, "%llu", (unsigned long long)value);
        break;
    case RMIG_UNIT_SWITCH:
        snprintf(buf, n, "%s", value ? "on" : "off");
        break;
    case RMIG_UNIT_NS: {
        static const char *const suffix[] = {"ns", "us", "ms", "s"};
        unsigned at = 0;
        while (value != 0 && value % 1000 == 0 && at < 3) {
            value /= 1000;
            at++;
        }
        snprintf(buf, n, "%llu%s", (unsigned long long)value, suffix[at]);
        break;
    }
    }
}

static void rmig__range_text(const struct rmig__param_row *row, char *buf, size_t n) {
    if (row->unit == RMIG_UNIT_SWITCH) {
        snprintf(buf, n, "on, off");
        return;
    }
    char low[32], high[32];
    rmig__param_text(row, row->min, low, sizeof low);
    rmig__param_text(row, row->max, high, sizeof high);
    snprintf(buf, n, "%s%s%s to %s", row->zero_allowed ? "0, or " : "", row->power_of_two ? "a power of two from " : "",
             low, high);
}

RMIG__DEF uint64_t rmig_get(const struct rmig_config *cfg, enum rmig_param param) {
    if (!rmig__param_valid(param))
        return 0;
    if (cfg != NULL && (cfg->set_ & (1u << param)) != 0)
        return cfg->value_[param];
    if (param == RMIG_PARAM_MERGE_MAX)
        return 2 * rmig_get(cfg, RMIG_PARAM_CHUNK_SIZE);
    if (param == RMIG_PARAM_SIGNAL_EVERY)
        return rmig__min(rmig__params[param].default_value, rmig_get(cfg, RMIG_PARAM_WRITE_DEPTH));
    return rmig__params[param].default_value;
}

/* What one row cannot say: rules between two parameters. cfg has the value already. */
static int rmig__param_pairs(const struct rmig_config *cfg, enum rmig_param param, struct rmig_error *err) {
    uint64_t merge = rmig_get(cfg, RMIG_PARAM_MERGE_MAX), page = rmig_get(cfg, RMIG_PARAM_PAGE_SIZE);
    uint64_t every = rmig_get(cfg, RMIG_PARAM_SIGNAL_EVERY), depth = rmig_get(cfg, RMIG_PARAM_WRITE_DEPTH);
    if (merge < page)
        return rmig_fail(err, RMIG_ERR_PARAM, 0, "%s: merge-max %llu would be below page-size %llu; set %s first",
                         rmig__params[param].name, (unsigned long long)merge, (unsigned long long)page,
                         param == RMIG_PARAM_MERGE_MAX ? "a smaller page-size" : "a larger merge-max");
    if (every > depth)
        return rmig_fail(err, RMIG_ERR_PARAM, 0,
                         "%s: signal-every %llu would be above write-depth %llu (range of signal-every: 1 to "
                         "write-depth); set %s first",
                         rmig__params[param].name, (unsigned long long)every, (unsigned long long)depth,
                         param == RMIG_PARAM_SIGNAL_EVERY ? "a larger write-depth" : "a smaller signal-every");
    return RMIG_OK;
}

static int rmig__set(struct rmig_config *cfg, enum rmig_param param, uint64_t value, const char *shown,
                     struct rmig_error *err) {
    const struct rmig__param_row *row = &rmig__params[param];
    bool in_range = (value >= row->min && value <= row->max && (!row->power_of_two || rmig__is_power_of_two(value))) ||
                    (value == 0 && row->zero_allowed);
    if (!in_range) {
        char range[128];
        rmig__range_text(row, range, sizeof range);
        return rmig_fail(err, RMIG_ERR_PARAM, 0, "%s: %.60s is out of range: must be %s", row->name, shown, range);
    }
    struct rmig_config next = *cfg;
    next.value_[param] = value;
    next.set_ |= 1u << param;
    int status = rmig__param_pairs(&next, param, err);
    if (status == RMIG_OK)
        *cfg = next;
    return status;
}

RMIG__DEF int rmig_set(struct rmig_config *cfg, enum rmig_param param, uint64_t value, struct rmig_error *err) {
    if (cfg == NULL)
        return rmig_fail(err, RMIG_ERR_ARGUMENT, 0, "rmig_set: cfg is NULL");
    if (!rmig__param_valid(param))
        return rmig_fail(err, RMIG_ERR_PARAM, 0, "rmig_set: %d is no parameter: must be 0 to %d", (int)param,
                         RMIG_PARAM_COUNT - 1);
    char shown[32];
    snprintf(shown, sizeof shown, "%llu", (unsigned long long)value);
    return rmig__set(cfg, param, value, shown, err);
}

static int rmig__param_find(const char *name, struct rmig_error *err) {
    for (int i = 0; name != NULL && i < RMIG_PARAM_COUNT; i++)
        if (strcmp(rmig__params[i].name, name) == 0)
            return i;
    char known[320] = "";
    for (int i = 0; i < RMIG_PARAM_COUNT; i++) {
        size_t at = strlen(known);
        snprintf(known + at, sizeof known - at, "%s%s", i == 0 ? "" : ", ", rmig__params[i].name);
    }
    return rmig_fail(err, RMIG_ERR_PARAM, 0, "unknown parameter \"%.40s\": must be one of %s", name == NULL ? "" : name,
                     known);
}

static bool rmig__parse_ns(const char *text, uint64_t *ns) {
    static const struct {
        const char *suffix;
        uint64_t unit;
    } units[] = {{"", 1000000}, {"ns", 1}, {"us", 1000}, {"ms", 1000000}, {"s", 1000000000}};
    struct rmig__decimal number;
    if (!rmig__number(&text, &number))
        return false;
    for (size_t i = 0; i < sizeof units / sizeof units[0]; i++)
        if (strcmp(text, units[i].suffix) == 0)
            return rmig__scale(&number, units[i].unit, ns);
    return false;
}

static bool rmig__parse_switch(const char *text, uint64_t *value) {
    static const char *const words[2][4] = {{"off", "no", "false", "0"}, {"on", "yes", "true", "1"}};
    for (unsigned v = 0; v < 2; v++)
        for (unsigned i = 0; i < 4; i++)
            if (strcmp(text, words[v][i]) == 0) {
                *value = v;
                return true;
            }
    return false;
}

static bool rmig__parse_count(const char *text, uint64_t *value) {
    struct rmig__decimal number;
    if (strchr(text, '.') != NULL || !rmig__number(&text, &number) || *text != '\0')
        return false;
    return rmig__scale(&number, 1, value);
}

RMIG__DEF int rmig_set_param(struct rmig_config *cfg, const char *name, const char *text, struct rmig_error *err) {
    if (cfg == NULL)
        return rmig_fail(err, RMIG_ERR_ARGUMENT, 0, "rmig_set_param: cfg is NULL");
    int found = rmig__param_find(name, err);
    if (found < 0)
        return found;
    const struct rmig__param_row *row = &rmig__params[found];
    const char *expected = "";
    uint64_t value = 0;
    bool ok = text != NULL;
    switch (row->unit) {
    case RMIG_UNIT_BYTES:
    case RMIG_UNIT_BYTES_PER_SECOND:
        expected = "a whole number of bytes, with an optional suffix B K M G T";
        ok = ok && rmig_size_parse(text, &value, NULL) == RMIG_OK;
        break;
    case RMIG_UNIT_COUNT:
        expected = "a whole number";
        ok = ok && rmig__parse_count(text, &value);
        break;
    case RMIG_UNIT_SWITCH:
        expected = "a switch";
        ok = ok && rmig__parse_switch(text, &value);
        break;
    case RMIG_UNIT_NS:
        expected = "a time such as 500ms or 10s (ns us ms s; a bare number is milliseconds)";
        ok = ok && rmig__parse_ns(text, &value);
        break;
    }
    if (!ok) {
        char range[128];
        rmig__range_text(row, range, sizeof range);
        return rmig_fail(err, RMIG_ERR_PARAM, 0, "%s: \"%.60s\" is not %s: must be %s", row->name,
                         text == NULL ? "" : text, expected, range);
    }
    return rmig__set(cfg, (enum rmig_param)found, value, text, err);
}

RMIG__DEF int rmig_get_param(const struct rmig_config *cfg, const char *name, char *buf, size_t buf_size,
                             struct rmig_error *err) {
    int found = rmig__param_find(name, err);
    if (found < 0)
        return found;
    char text[32];
    rmig__param_text(&rmig__params[found], rmig_get(cfg, (enum rmig_param)found), text, sizeof text);
    if (buf == NULL || strlen(text) >= buf_size)
        return rmig_fail(err, RMIG_ERR_ARGUMENT, 0, "rmig_get_param: the buffer has %zu bytes, %s needs %zu", buf_size,
                         rmig__params[found].name, strlen(text) + 1);
    memcpy(buf, text, strlen(text) + 1);
    return RMIG_OK;
}

RMIG__DEF size_t rmig_param_list(struct rmig_param_info *out, size_t n) {
    for (size_t i = 0; i < n && i < RMIG_PARAM_COUNT; i++) {
        const struct rmig__param_row *row = &rmig__params[i];
        struct rmig_param_info *info = &out[i];
        memset(info, 0, sizeof *info);
        info->param = (enum rmig_param)i;
        info->name = row->name;
        info->unit = row->unit;
        info->min = row->min;
        info->max = row->max;
        info->zero_allowed = row->zero_allowed;
        info->power_of_two = row->power_of_two;
        info->help = row->help;
        rmig__param_text(row, rmig_get(NULL, info->param), info->default_text, sizeof info->default_text);
        rmig__range_text(row, info->range_text, sizeof info->range_text);
    }
    return RMIG_PARAM_COUNT;
}

// >>block: implementation

RMIG__DEF void rmig_blocks_init(struct rmig_blocks *t) {
    if (t != NULL)
        memset(t, 0, sizeof *t);
}

RMIG__DEF void rmig_blocks_free(struct rmig_blocks *t) {
    if (t == NULL)
        return;
    for (uint32_t i = 0; i < t->count; i++)
        rmig__release(t->block[i].name);
    rmig__release(t->block);
    rmig__release(t->node);
    rmig_blocks_init(t);
}

/* The two orders are treaps: search trees in which no block hangs below one of lower rank. The ranks are as good as
   random whatever the names and offsets are, so the trees are about 2 log2 n deep. */
enum { RMIG__BY_OFFSET, RMIG__BY_NAME };

static uint32_t rmig__blocks_rank(uint32_t i) {
    i = (i ^ i >> 16) * 0x85ebca6bu;
    i = (i ^ i >> 13) * 0xc2b2ae35u;
    return i ^ i >> 16;
}

static bool rmig__blocks_before(const struct rmig_blocks *t, int order, uint32_t a, uint32_t b) {
    if (order == RMIG__BY_OFFSET)
        return t->block[a].guest_offset < t->block[b].guest_offset;
    return strcmp(t->block[a].name, t->block[b].name) < 0;
}

/* Block i takes the place of the first one of lower rank on its way down. What hung there is divided: what is before i
   hangs below it on one side, the rest on the other. */
static void rmig__blocks_insert(struct rmig_blocks *t, int order, uint32_t i) {
    uint32_t *at = &t->root[order];
    while (*at != 0 && rmig__blocks_rank(*at - 1) >= rmig__blocks_rank(i))
        at = &t->node[*at - 1].below[order][rmig__blocks_before(t, order, *at - 1, i)];
    uint32_t rest = *at;
    uint32_t *side[2] = {&t->node[i].below[order][0], &t->node[i].below[order][1]};
    *at = i + 1;
    while (rest != 0) {
        bool before = rmig__blocks_before(t, order, rest - 1, i);
        *side[!before] = rest;
        side[!before] = &t->node[rest - 1].below[order][before];
        rest = *side[!before];
    }
    *side[0] = *side[1] = 0;
}

/* The last block that begins at or before the offset, and the first one that begins behind it: index + 1, 0 is none. */
static void rmig__blocks_around(const struct rmig_blocks *t, uint64_t offset, uint32_t *before, uint32_t *behind) {
    *before = *behind = 0;
    for (uint32_t at = t->root[RMIG__BY_OFFSET]; at != 0;) {
        bool is_before = t->block[at - 1].guest_offset <= offset;
        *(is_before ? before : behind) = at;
        at = t->node[at - 1].below[RMIG__BY_OFFSET][is_before];
    }
}

/* The block of that name: index + 1, 0 is none. */
static uint32_t rmig__blocks_named(const struct rmig_blocks *t, const char *name) {
    uint32_t at = t->root[RMIG__BY_NAME];
    for (int order = 1; at != 0 && order != 0;) {
        order = strcmp(name, t->block[at - 1].name);
        if (order != 0)
            at = t->node[at - 1].below[RMIG__BY_NAME][order > 0];
    }
    return at;
}

static int rmig__blocks_check(const struct rmig_block_desc *d, struct rmig_error *err) {
    if (d->name == NULL || d->name[0] == '\0')
        return rmig_fail(err, RMIG_ERR_ARGUMENT, 0, "block: the name is empty; must be 1 to %d bytes", RMIG_NAME_MAX);
    if (strlen(d->name) > RMIG_NAME_MAX)
        return rmig_fail(err, RMIG_ERR_ARGUMENT, 0, "block \"%.40s...\": the name has %zu bytes; must be 1 to %d",
                         d->name, strlen(d->name), RMIG_NAME_MAX);
    if (d->length == 0)
        return rmig_fail(err, RMIG_ERR_ARGUMENT, 0, "block \"%.100s\": length 0; must be at least 1 byte", d->name);
    if (d->host == NULL)
        return rmig_fail(err, RMIG_ERR_ARGUMENT, 0, "block \"%.100s\": host is NULL; must be where it is mapped",
                         d->name);
    if ((uint64_t)(uintptr_t)d->host > UINT64_MAX - d->length)
        return rmig_fail(err, RMIG_ERR_ARGUMENT, 0, "block \"%.100s\": host %p + length %llu wraps around", d->name,
                         d->host, (unsigned long long)d->length);
    if (d->guest_offset > UINT64_MAX - d->length)
        return rmig_fail(err, RMIG_ERR_ARGUMENT, 0,
                         "block \"%.100s\": guest offset 0x%llx + length 0x%llx wraps around", d->name,
                         (unsigned long long)d->guest_offset, (unsigned long long)d->length);
    if ((unsigned)d->backing > RMIG_BACKING_DMABUF)
        return rmig_fail(err, RMIG_ERR_ARGUMENT, 0, "block \"%.100s\": backing %d is none of enum rmig_backing",
                         d->name, (int)d->backing);
    return RMIG_OK;
}

static int rmig__blocks_overlap(const struct rmig_blocks *t, const struct rmig_block_desc *d, uint32_t other,
                                struct rmig_error *err) {
    const struct rmig_block *b = &t->block[other];
    if (d->guest_offset >= b->guest_offset + b->length || b->guest_offset >= d->guest_offset + d->length)
        return RMIG_OK;
    return rmig_fail(err, RMIG_ERR_ARGUMENT, 0,
                     "block \"%.60s\" at guest offset 0x%llx, length 0x%llx, overlaps block \"%.60s\" at 0x%llx, "
                     "length 0x%llx; ranges must be disjoint",
                     d->name, (unsigned long long)d->guest_offset, (unsigned long long)d->length, b->name,
                     (unsigned long long)b->guest_offset, (unsigned long long)b->length);
}

static bool rmig__blocks_grow(struct rmig_blocks *t) {
    if (t->count < t->capacity)
        return true;
    if (t->capacity > UINT32_MAX / 4)
        return false;
    uint32_t capacity = t->capacity == 0 ? 16 : t->capacity * 2;
    void *block = RMIG_REALLOC(t->block, capacity * sizeof *t->block);
    if (block != NULL)
        t->block = (struct rmig_block *)block;
    void *node = RMIG_REALLOC(t->node, capacity * sizeof *t->node);
    if (node != NULL)
        t->node = (struct rmig_blocks_node *)node;
    if (block == NULL || node == NULL)
        return false;
    t->capacity = capacity;
    return true;
}

RMIG__DEF int rmig_blocks_add(struct rmig_blocks *t, const struct rmig_block_desc *desc, uint32_t *index,
                              struct rmig_error *err) {
    uint32_t before, behind;
    if (t == NULL || desc == NULL)
        return rmig_fail(err, RMIG_ERR_ARGUMENT, 0, "block: the %s is NULL", t == NULL ? "table" : "description");
    int status = rmig__blocks_check(desc, err);
    if (status != RMIG_OK)
        return status;
    uint32_t same = rmig__blocks_named(t, desc->name);
    if (same != 0)
        return rmig_fail(err, RMIG_ERR_ARGUMENT, 0, "block \"%.100s\": there is a block %u of that name already",
                         desc->name, same - 1);
    rmig__blocks_around(t, desc->guest_offset, &before, &behind);
    if (before != 0)
        status = rmig__blocks_overlap(t, desc, before - 1, err);
    if (status == RMIG_OK && behind != 0)
        status = rmig__blocks_overlap(t, desc, behind - 1, err);
    if (status != RMIG_OK)
        return status;
    size_t name_size = strlen(desc->name) + 1;
    char *name = rmig__blocks_grow(t) ? (char *)RMIG_MALLOC(name_size) : NULL;
    if (name == NULL)
        return rmig_fail(err, RMIG_ERR_NO_MEMORY, 0, "block \"%.100s\": out of memory for the table", desc->name);
    memcpy(name, desc->name, name_size);
    struct rmig_block *b = &t->block[t->count];
    b->name = name;
    b->host = (uint8_t *)desc->host;
    b->length = desc->length;
    b->guest_offset = desc->guest_offset;
    b->backing = desc->backing;
    b->fd = desc->fd;
    b->fd_offset = desc->fd_offset;
    rmig__blocks_insert(t, RMIG__BY_OFFSET, t->count);
    rmig__blocks_insert(t, RMIG__BY_NAME, t->count);
    if (index != NULL)
        *index = t->count;
    t->count++;
    return RMIG_OK;
}

RMIG__DEF int rmig_blocks_by_name(const struct rmig_blocks *t, const char *name, uint32_t *index) {
    uint32_t found = t == NULL || name == NULL ? 0 : rmig__blocks_named(t, name);
    if (found == 0)
        return RMIG_ERR_ARGUMENT;
    if (index != NULL)
        *index = found - 1;
    return RMIG_OK;
}

RMIG__DEF int rmig_blocks_by_offset(struct rmig_blocks *t, uint64_t guest_offset, uint32_t *index) {
    uint32_t found, behind;
    if (t == NULL)
        return RMIG_ERR_ARGUMENT;
    if (t->last >= t->count || guest_offset - t->block[t->last].guest_offset >= t->block[t->last].length) {
        rmig__blocks_around(t, guest_offset, &found, &behind);
        if (found == 0 || guest_offset - t->block[found - 1].guest_offset >= t->block[found - 1].length)
            return RMIG_ERR_ARGUMENT;
        t->last = found - 1;
    }
    if (index != NULL)
        *index = t->last;
    return RMIG_OK;
}

// >>zero: implementation

RMIG__DEF bool rmig_is_zero_portable(const void *p, size_t n) {
    if (p == NULL)
        return n == 0;
    const uint8_t *at = (const uint8_t *)p, *end = at + n;
    for (; (size_t)(end - at) >= 64; at += 64) {
        uint64_t w[8];
        memcpy(w, at, sizeof w);
        if ((w[0] | w[1] | w[2] | w[3] | w[4] | w[5] | w[6] | w[7]) != 0)
            return false;
    }
    for (; at < end; at++)
        if (*at != 0)
            return false;
    return true;
}

#ifdef RMIG__X86
__attribute__((target("avx2"))) static bool rmig__is_zero_avx2(const uint8_t *p, size_t n) { // n >= 128
    const uint8_t *end = p + n;
    for (; (size_t)(end - p) >= 128; p += 128) {
        __m256i a = _mm256_loadu_si256((const __m256i *)(const void *)p);
        __m256i b = _mm256_loadu_si256((const __m256i *)(const void *)(p + 32));
        __m256i c = _mm256_loadu_si256((const __m256i *)(const void *)(p + 64));
        __m256i d = _mm256_loadu_si256((const __m256i *)(const void *)(p + 96));
        __m256i all = _mm256_or_si256(_mm256_or_si256(a, b), _mm256_or_si256(c, d));
        if (!_mm256_testz_si256(all, all))
            return false;
    }
    return rmig_is_zero_portable(p, (size_t)(end - p));
}
#endif

RMIG__DEF bool rmig_is_zero(const void *p, size_t n) {
#ifdef RMIG__X86
    if (p != NULL && n >= 128 && __builtin_cpu_supports("avx2"))
        return rmig__is_zero_avx2((const uint8_t *)p, n);
#endif
    return rmig_is_zero_portable(p, n);
}

/* Linux's numbers, and what else libc shows only to who asked for it before the first header, which is the includer's
   to decide. C++ always does. */
#define RMIG__SEEK_DATA 3
#define RMIG__SEEK_HOLE 4
#ifdef O_CLOEXEC
#define RMIG__O_CLOEXEC O_CLOEXEC
#else
#define RMIG__O_CLOEXEC __O_CLOEXEC
#endif
#if defined(__linux__) && !defined(__cplusplus)
long syscall(long number, ...);
#endif

/* A text file read line by line; of a line what fits. */
struct rmig__lines {
    int fd;
    ssize_t at, n; // of piece
    char piece[4096], line[256];
};

static bool rmig__lines_next(struct rmig__lines *l) {
    size_t length = 0;
    for (;;) {
        if (l->at == l->n) {
            l->at = 0;
            l->n = read(l->fd, l->piece, sizeof l->piece);
            if (l->n <= 0) {
                l->n = 0;
                return false;
            }
        }
        char c = l->piece[l->at++];
        if (c == '\n')
            break;
        if (length < sizeof l->line - 1)
            l->line[length++] = c;
    }
    l->line[length] = '\0';
    return true;
}

/* A hole is believed only if it is one. It is none where somebody else's userfaultfd fills the memory in once it is
   touched; where the file or the page map that was asked is not this memory's, since the block was described wrongly;
   and on huge pages of hugetlbfs, of which the page map shows nothing while they are being moved. So before the first
   hole of a mapping is believed, the mapping is looked at, and then no more until rmig_holes_forget:

       rmig__holes_ask         where there is a hole, as the backing says
       rmig__holes_believed    up to where is it in mappings that were looked at? Else they are, one after the other
       rmig__mapping_at        what is mapped there (Linux 6.11 tells; before it each hole is looked at by itself)
       rmig__mapping_suits     is that what the block says it is?
       rmig__pager_at          is there a userfaultfd of somebody else? One of our own is registered for the instant of
                               the question, which is refused with EBUSY then
       rmig__smaps             what cannot be answered so, for the whole process

   After a look the hole is asked for again: a pager that left before the look may have put something there after the
   first question. The question to userfaultfd is of write protection: no access waits for us, since nothing is
   protected. And it is of the hole alone: taking a registration back walks all pages that are there, with the address
   space locked (100 ms a GiB), and KVM drops what it knows of them. */

#ifdef __linux__

/* PROCMAP_QUERY of linux/fs.h, which knows it since 6.11. */
struct rmig__mapping {
    uint64_t size, query_flags, query_address;
    uint64_t start, end, flags, page_size, offset, inode;
    uint32_t device_major, device_minor, name_size, build_id_size;
    uint64_t name_address, build_id_address;
};
#define RMIG__MAPPING_QUERY _IOWR('f', 17, struct rmig__mapping)
#define RMIG__MAPPING_SHARED 8u

static bool rmig__mapping_at(const struct rmig_holes *h, uint64_t address, struct rmig__mapping *m) {
    memset(m, 0, sizeof *m);
    m->size = sizeof *m;
    m->query_address = address;
    return h->maps_fd >= 0 && ioctl(h->maps_fd, RMIG__MAPPING_QUERY, m) == 0;
}

static bool rmig__mapping_suits(const struct rmig_holes *h, const struct rmig_block *b, uint64_t address,
                                const struct rmig__mapping *m) {
    struct stat st;
    bool shared = (m->flags & RMIG__MAPPING_SHARED) != 0;
    if (b->backing == RMIG_BACKING_ANONYMOUS)
        return !shared && m->inode == 0 && m->page_size == h->page;
    uint64_t is = m->offset + (address - m->start);
    uint64_t must = b->fd_offset + (address - (uint64_t)(uintptr_t)b->host);
    return shared && is == must && fstat(b->fd, &st) == 0 && m->inode == (uint64_t)st.st_ino;
}

enum rmig__pager { RMIG__PAGER_NONE, RMIG__PAGER_SOMEBODY, RMIG__PAGER_CANNOT_SAY };

/* On huge pages of hugetlbfs none of the range can be ZEROPAGEd, which is how they show where there is no mapping to
   look at. Memory that cannot be registered at all has no pager; but if it is said to be anonymous it is not. */
static enum rmig__pager rmig__pager_at(const struct rmig_holes *h, const struct rmig_block *b, uint64_t from,
                                       uint64_t to) {
    struct uffdio_register ours;
    bool anonymous = b->backing == RMIG_BACKING_ANONYMOUS;
    memset(&ours, 0, sizeof ours);
    ours.range.start = from;
    ours.range.len = to - from;
    ours.mode = UFFDIO_REGISTER_MODE_WP;
    if (h->uffd < 0)
        return RMIG__PAGER_CANNOT_SAY;
    if (ioctl(h->uffd, UFFDIO_REGISTER, &ours) == 0) {
        ioctl(h->uffd, UFFDIO_UNREGISTER, &ours.range);
        bool small = (ours.ioctls & (uint64_t)1 << _UFFDIO_ZEROPAGE) != 0;
        return small || !anonymous ? RMIG__PAGER_NONE : RMIG__PAGER_SOMEBODY;
    }
    if (errno == EPERM) // a mapping that may never be written: nobody can register it
        return RMIG__PAGER_NONE;
    if (errno == EINVAL)
        return anonymous ? RMIG__PAGER_SOMEBODY : RMIG__PAGER_NONE;
    return RMIG__PAGER_CANNOT_SAY;
}

enum { RMIG__SMAPS_PAGER = 1, RMIG__SMAPS_HUGE = 2 };

/* Of all mappings: does anybody fill one in, and is one on huge pages? Whoever tracks writes alone does not. */
static int rmig__smaps(struct rmig_holes *h) {
    struct rmig__lines lines;
    if (h->others >= 0)
        return h->others;
    lines.at = lines.n = 0;
    lines.fd = open("/proc/self/smaps", O_RDONLY | RMIG__O_CLOEXEC);
    if (lines.fd < 0)
        return RMIG__SMAPS_PAGER | RMIG__SMAPS_HUGE;
    int seen = 0;
    bool whole = false;
    while (rmig__lines_next(&lines)) {
        whole = strncmp(lines.line, "VmFlags:", 8) == 0; // the last line of each mapping
        if (whole && (strstr(lines.line, " um") != NULL || strstr(lines.line, " ui") != NULL))
            seen |= RMIG__SMAPS_PAGER;
        if (whole && strstr(lines.line, " ht") != NULL)
            seen |= RMIG__SMAPS_HUGE;
    }
    close(lines.fd);
    return h->others = whole ? seen : RMIG__SMAPS_PAGER | RMIG__SMAPS_HUGE;
}

/* Looks at what is mapped from `from` on: how far holes are believed there, at most up to `to`, or `from`. */
static uint64_t rmig__holes_look(struct rmig_holes *h, const struct rmig_block *b, uint64_t from, uint64_t to) {
    struct rmig__mapping m;
    bool known = rmig__mapping_at(h, from, &m);
    if (known && !rmig__mapping_suits(h, b, from, &m))
        return from;
    uint64_t end = known ? rmig__min(m.end, to) : to;
    enum rmig__pager pager = rmig__pager_at(h, b, from, end);
    bool small = known || b->backing == RMIG_BACKING_SHARED_FD;
    if (pager == RMIG__PAGER_CANNOT_SAY && (rmig__smaps(h) & (RMIG__SMAPS_PAGER | (small ? 0 : RMIG__SMAPS_HUGE))) == 0)
        pager = RMIG__PAGER_NONE;
    if (pager != RMIG__PAGER_NONE)
        return from;
    return known ? rmig__min(m.end, (uint64_t)(uintptr_t)b->host + b->length) : to;
}

/* Without write protection of all memory that may be asked about it is of no use. */
static int rmig__holes_uffd(void) {
    struct uffdio_api api;
    const uint64_t wanted = UFFD_FEATURE_PAGEFAULT_FLAG_WP | (uint64_t)1 << 12; // UFFD_FEATURE_WP_HUGETLBFS_SHMEM
    int fd = (int)syscall(SYS_userfaultfd, RMIG__O_CLOEXEC | 1); // UFFD_USER_MODE_ONLY, which needs no privilege
    memset(&api, 0, sizeof api);
    api.api = UFFD_API;
    if (fd >= 0 && ioctl(fd, UFFDIO_API, &api) == 0 && (api.features & wanted) == wanted)
        return fd;
    if (fd >= 0)
        close(fd);
    return -1;
}

#else

static int rmig__holes_uffd(void) { return -1; }
static uint64_t rmig__holes_look(struct rmig_holes *h, const struct rmig_block *b, uint64_t from, uint64_t to) {
    (void)h, (void)b, (void)from;
    return to;
}

#endif

/* How far the hole [from, to) is believed. *looked: something was looked at for that. */
static uint64_t rmig__holes_believed(struct rmig_holes *h, const struct rmig_block *b, uint64_t from, uint64_t to,
                                     bool *looked) {
    uint64_t base = (uint64_t)(uintptr_t)b->host, at = (base + from) / h->page * h->page;
    uint64_t stop = (base + to + h->page - 1) / h->page * h->page;
    *looked = false;
    if (at < h->sure_from || at >= h->sure_to)
        h->sure_from = h->sure_to = at;
    while (h->sure_to < stop) {
        uint64_t sure = rmig__holes_look(h, b, h->sure_to, stop);
        if (sure == h->sure_to)
            break;
        h->sure_to = sure;
        *looked = true;
    }
    return rmig__min(rmig__max(h->sure_to, base + from) - base, to);
}

RMIG__DEF void rmig_holes_forget(struct rmig_holes *h) {
    if (h == NULL)
        return;
    h->sure_from = h->sure_to = 0;
    h->data_from = h->data_to = 0;
    h->others = -1;
}

RMIG__DEF void rmig_holes_open(struct rmig_holes *h) {
    if (h == NULL)
        return;
    long page = sysconf(_SC_PAGESIZE);
    h->page = page > 0 ? (uint64_t)page : 4096;
    h->pagemap_fd = open("/proc/self/pagemap", O_RDONLY | RMIG__O_CLOEXEC);
    h->maps_fd = open("/proc/self/maps", O_RDONLY | RMIG__O_CLOEXEC);
    h->uffd = rmig__holes_uffd();
    rmig_holes_forget(h);
}

static void rmig__close(int *fd) {
    if (*fd >= 0)
        close(*fd);
    *fd = -1;
}

RMIG__DEF void rmig_holes_close(struct rmig_holes *h) {
    if (h == NULL)
        return;
    rmig__close(&h->pagemap_fd);
    rmig__close(&h->maps_fd);
    rmig__close(&h->uffd);
}

/* tmpfs and file systems answer for pages that no process has mapped, too, which mincore and pagemap cannot. To find
   the next hole they may walk all data up to it, so it is noted how far there was none: what is data need not be asked
   for again, and if it has become a hole since, it is only read. */
static void rmig__holes_file(struct rmig_holes *h, const struct rmig_block *b, uint64_t from, uint64_t to,
                             uint64_t *data, uint64_t *end) {
    uint64_t host = (uint64_t)(uintptr_t)b->host;
    if (b->fd_offset > (uint64_t)INT64_MAX || to > (uint64_t)INT64_MAX - b->fd_offset)
        return;
    if (host + from >= h->data_from && host + from < h->data_to) {
        *end = rmig__min(to, h->data_to - host);
        return;
    }
    off_t base = (off_t)b->fd_offset;
    off_t at = lseek(b->fd, base + (off_t)from, RMIG__SEEK_DATA);
    if (at < 0) {
        // No data up to the end of the file. Of a file that was cut the rest is no hole: it is lost, which must show.
        if (errno == ENXIO && lseek(b->fd, 0, SEEK_END) >= base + (off_t)to)
            *data = to;
        return;
    }
    if (at < base + (off_t)from) // not a file that knows: all data
        return;
    if (at >= base + (off_t)to) {
        *data = to;
        return;
    }
    *data = rmig__max((uint64_t)(at - base), from);
    if (to - *data <= h->page) // no room for a hole
        return;
    off_t hole = lseek(b->fd, at, RMIG__SEEK_HOLE);
    if (hole <= at)
        return;
    h->data_from = host + *data;
    h->data_to = host + rmig__min((uint64_t)(hole - base), b->length);
    *end = rmig__min(to, h->data_to - host);
}

/* A page of a private anonymous mapping that is neither present nor swapped out was never written. */
static void rmig__holes_pagemap(const struct rmig_holes *h, const struct rmig_block *b, uint64_t from, uint64_t to,
                                uint64_t *data, uint64_t *end) {
    const uint64_t present_or_swapped = (uint64_t)3 << 62;
    uint64_t address = (uint64_t)(uintptr_t)b->host;
    uint64_t first = (address + from) / h->page, last = (address + to - 1) / h->page + 1;
    *data = to;
    *end = to;
    uint64_t entries[512];
    memset(entries, 0, sizeof entries);
    for (uint64_t page = first; page < last;) {
        uint64_t n = rmig__min(last - page, sizeof entries / sizeof entries[0]);
        off_t at = (off_t)(page * sizeof entries[0]);
        ssize_t got =
            lseek(h->pagemap_fd, at, SEEK_SET) == at ? read(h->pagemap_fd, entries, (size_t)n * sizeof entries[0]) : -1;
        bool known = got == (ssize_t)(n * sizeof entries[0]);
        for (uint64_t i = 0; i < n; i++) {
            bool filled = !known || (entries[i] & present_or_swapped) != 0;
            if (filled == (*data != to))
                continue; // still in the hole before the data, or still in the data
            uint64_t edge = page + i == first ? from : (page + i) * h->page - address;
            if (!filled) {
                *end = edge;
                return;
            }
            *data = edge;
        }
        page += n;
    }
}

static void rmig__holes_ask(struct rmig_holes *h, const struct rmig_block *b, uint64_t from, uint64_t to,
                            uint64_t *data, uint64_t *end) {
    *data = from;
    *end = to;
    if (b->backing == RMIG_BACKING_SHARED_FD)
        rmig__holes_file(h, b, from, to, data, end);
    else if (b->backing == RMIG_BACKING_ANONYMOUS && h->pagemap_fd >= 0)
        rmig__holes_pagemap(h, b, from, to, data, end);
}

RMIG__DEF void rmig_holes_next_data(struct rmig_holes *h, const struct rmig_block *b, uint64_t from, uint64_t to,
                                    uint64_t *data, uint64_t *end) {
    if (data == NULL || end == NULL)
        return;
    *data = from < to ? from : to;
    *end = to;
    if (h == NULL || b == NULL || h->page == 0)
        return;
    for (bool looked = true; looked && from < to;) {
        rmig__holes_ask(h, b, from, to, data, end);
        if (*data == from)
            return;
        uint64_t believed = rmig__holes_believed(h, b, from, *data, &looked);
        if (believed == *data)
            continue;
        *data = believed;
        *end = to;
        return;
    }
}

static uint64_t rmig__after(uint64_t time, uint64_t span) {
    return span > UINT64_MAX - time ? UINT64_MAX : time + span;
}

/* What was last learned of a block's holes, so that little of it is asked for again: [from, data) is a hole, and
   [data, end) may hold something. */
struct rmig__hole {
    uint32_t block; // UINT32_MAX: nothing is known
    uint64_t from, data, end;
};

static bool rmig__hole_knows(const struct rmig__hole *h, uint32_t block, uint64_t at) {
    return h->block == block && h->from <= at && at < h->end;
}

/* Learns of [at, reach) of a block. */
static void rmig__hole_look(struct rmig__hole *h, struct rmig_holes *holes, const struct rmig_block *b, uint32_t block,
                            uint64_t at, uint64_t reach) {
    rmig_holes_next_data(holes, b, at, reach, &h->data, &h->end);
    h->block = block;
    h->from = at;
}

/* [from, to) may have been filled since. */
static void rmig__hole_filled(struct rmig__hole *h, uint32_t block, uint64_t from, uint64_t to) {
    if (h->block == block && from < h->data && to > h->from)
        h->block = UINT32_MAX;
}

#define RMIG__HOLE_LOOK RMIG_GIB // how far one look for holes goes; it reads 2 MiB of page map, in 4 ms
#define RMIG__HOLE_SHARE 16 // a byte of a hole costs this part of a byte tested
#define RMIG__HOLE_CALL ((uint64_t)65536) // and each look as many bytes tested

/* Is [from, to) of a block all zero? Never reads a hole, because reading would allocate it. *scanned: bytes read. */
static bool rmig__hole_or_zero(struct rmig__hole *h, struct rmig_holes *holes, const struct rmig_block *b,
                               uint32_t block, uint64_t page_size, uint64_t from, uint64_t to, uint64_t *scanned) {
    /* Most ranges that are not zero show it in the first page: look there before paying for the whole map of holes. */
    uint64_t peek = rmig__min(from + page_size, to);
    if (!rmig__hole_knows(h, block, from)) {
        uint64_t data, end;
        rmig_holes_next_data(holes, b, from, peek, &data, &end);
        if (data == from && !rmig_is_zero(b->host + from, (size_t)(peek - from))) {
            *scanned += peek - from;
            return false;
        }
    }
    while (from < to) {
        if (!rmig__hole_knows(h, block, from)) {
            rmig__hole_look(h, holes, b, block, from, rmig__min(b->length, rmig__after(from, RMIG__HOLE_LOOK)));
            *scanned += (h->data - from) / RMIG__HOLE_SHARE;
        }
        from = rmig__min(rmig__max(from, h->data), to);
        uint64_t stop = rmig__min(h->end, to);
        if (from < stop) {
            *scanned += stop - from;
            if (!rmig_is_zero(b->host + from, (size_t)(stop - from)))
                return false;
        }
        from = stop;
    }
    return true;
}

// >>wire: implementation

static void rmig__put_be32(uint8_t *p, uint32_t v) {
    for (unsigned i = 0; i < 4; i++)
        p[i] = (uint8_t)(v >> (24 - 8 * i));
}
static void rmig__put_be64(uint8_t *p, uint64_t v) {
    rmig__put_be32(p, (uint32_t)(v >> 32));
    rmig__put_be32(p + 4, (uint32_t)v);
}
static uint32_t rmig__get_be32(const uint8_t *p) {
    return (uint32_t)p[0] << 24 | (uint32_t)p[1] << 16 | (uint32_t)p[2] << 8 | (uint32_t)p[3];
}
static uint64_t rmig__get_be64(const uint8_t *p) { return (uint64_t)rmig__get_be32(p) << 32 | rmig__get_be32(p + 4); }

RMIG__DEF const char *rmig_message_name(uint32_t type) {
    switch (type) {
#define RMIG__X(name, value)                                                                                           \
    case value:                                                                                                        \
        return #name;
        RMIG_MESSAGE_LIST(RMIG__X)
#undef RMIG__X
    default:
        return "unknown";
    }
}

/*  private data    0 version   4 flags */
RMIG__DEF int rmig_encode_private_data(uint8_t *out, size_t cap, const struct rmig_private_data *in) {
    if (cap < RMIG_PRIVATE_DATA_SIZE)
        return RMIG_ERR_FULL;
    rmig__put_be32(out, in->version);
    rmig__put_be32(out + 4, in->flags);
    return RMIG_PRIVATE_DATA_SIZE;
}
RMIG__DEF int rmig_decode_private_data(const uint8_t *p, size_t n, struct rmig_private_data *out) {
    if (p == NULL || n < RMIG_PRIVATE_DATA_SIZE)
        return RMIG_ERR_WIRE;
    out->version = rmig__get_be32(p);
    out->flags = rmig__get_be32(p + 4);
    return RMIG_PRIVATE_DATA_SIZE;
}

/*  header          0 len   4 type   8 repeat   12 padding */
RMIG__DEF int rmig_encode_header(uint8_t *out, size_t cap, const struct rmig_header *in) {
    if (cap < RMIG_HEADER_SIZE)
        return RMIG_ERR_FULL;
    if (in->len > RMIG_PAYLOAD_MAX)
        return RMIG_ERR_WIRE;
    rmig__put_be32(out, in->len);
    rmig__put_be32(out + 4, in->type);
    rmig__put_be32(out + 8, in->repeat);
    rmig__put_be32(out + 12, 0);
    return RMIG_HEADER_SIZE;
}
RMIG__DEF int rmig_decode_header(const uint8_t *p, size_t n, struct rmig_header *out) {
    if (n < RMIG_HEADER_SIZE)
        return RMIG_ERR_WIRE;
    uint32_t len = rmig__get_be32(p);
    if (len > RMIG_PAYLOAD_MAX || n != RMIG_HEADER_SIZE + (size_t)len)
        return RMIG_ERR_WIRE;
    out->len = len;
    out->type = rmig__get_be32(p + 4);
    out->repeat = rmig__get_be32(p + 8);
    return RMIG_HEADER_SIZE;
}

/*  RAM_BLOCKS_RESULT entry     0 base   8 offset   16 length   24 rkey   28 padding */
RMIG__DEF int rmig_encode_ram_block(uint8_t *out, size_t cap, const struct rmig_ram_block *in) {
    if (cap < RMIG_RAM_BLOCK_SIZE)
        return RMIG_ERR_FULL;
    rmig__put_be64(out, in->base);
    rmig__put_be64(out + 8, in->offset);
    rmig__put_be64(out + 16, in->length);
    rmig__put_be32(out + 24, in->rkey);
    rmig__put_be32(out + 28, 0);
    return RMIG_RAM_BLOCK_SIZE;
}
RMIG__DEF int rmig_decode_ram_block(const uint8_t *p, size_t n, struct rmig_ram_block *out) {
    if (n < RMIG_RAM_BLOCK_SIZE)
        return RMIG_ERR_WIRE;
    out->base = rmig__get_be64(p);
    out->offset = rmig__get_be64(p + 8);
    out->length = rmig__get_be64(p + 16);
    out->rkey = rmig__get_be32(p + 24);
    return RMIG_RAM_BLOCK_SIZE;
}

/*  COMPRESS        0 value   4 block   8 start   16 length */
RMIG__DEF int rmig_encode_compress(uint8_t *out, size_t cap, const struct rmig_compress *in) {
    if (cap < RMIG_COMPRESS_SIZE)
        return RMIG_ERR_FULL;
    rmig__put_be32(out, in->value);
    rmig__put_be32(out + 4, in->block);
    rmig__put_be64(out + 8, in->start);
    rmig__put_be64(out + 16, in->length);
    return RMIG_COMPRESS_SIZE;
}
RMIG__DEF int rmig_decode_compress(const uint8_t *p, size_t n, struct rmig_compress *out) {
    if (n < RMIG_COMPRESS_SIZE)
        return RMIG_ERR_WIRE;
    out->value = rmig__get_be32(p);
    out->block = rmig__get_be32(p + 4);
    out->start = rmig__get_be64(p + 8);
    out->length = rmig__get_be64(p + 16);
    return RMIG_COMPRESS_SIZE;
}

/*  REGISTER_REQUEST, UNREGISTER_REQUEST    0 key   8 block   12 padding   16 chunks */
RMIG__DEF int rmig_encode_register(uint8_t *out, size_t cap, const struct rmig_register *in) {
    if (cap < RMIG_REGISTER_SIZE)
        return RMIG_ERR_FULL;
    rmig__put_be64(out, in->key);
    rmig__put_be32(out + 8, in->block);
    rmig__put_be32(out + 12, 0);
    rmig__put_be64(out + 16, in->chunks);
    return RMIG_REGISTER_SIZE;
}
RMIG__DEF int rmig_decode_register(const uint8_t *p, size_t n, struct rmig_register *out) {
    if (n < RMIG_REGISTER_SIZE)
        return RMIG_ERR_WIRE;
    out->key = rmig__get_be64(p);
    out->block = rmig__get_be32(p + 8);
    out->chunks = rmig__get_be64(p + 16);
    return RMIG_REGISTER_SIZE;
}

/*  REGISTER_RESULT     0 rkey   4 padding   8 base */
RMIG__DEF int rmig_encode_register_result(uint8_t *out, size_t cap, const struct rmig_register_result *in) {
    if (cap < RMIG_REGISTER_RESULT_SIZE)
        return RMIG_ERR_FULL;
    rmig__put_be32(out, in->rkey);
    rmig__put_be32(out + 4, 0);
    rmig__put_be64(out + 8, in->base);
    return RMIG_REGISTER_RESULT_SIZE;
}
RMIG__DEF int rmig_decode_register_result(const uint8_t *p, size_t n, struct rmig_register_result *out) {
    if (n < RMIG_REGISTER_RESULT_SIZE)
        return RMIG_ERR_WIRE;
    out->rkey = rmig__get_be32(p);
    out->base = rmig__get_be64(p + 8);
    return RMIG_REGISTER_RESULT_SIZE;
}

/*  HELLO, HELLO_RESULT: entries of     0 tag (16 bits)   2 length (16 bits)   4 value */
static size_t rmig__put_tlv(uint8_t *out, uint32_t tag, const void *value, size_t n) {
    rmig__put_be32(out, tag << 16 | (uint32_t)n);
    memcpy(out + 4, value, n);
    return 4 + n;
}
/* Tags of release 0.1.0 are always there; those that came later only if they say something. */
#define RMIG__HELLO_SAYS(tag, value) ((tag) < RMIG_HELLO_REASON_TAG || (value) != 0)
RMIG__DEF int rmig_encode_hello(uint8_t *out, size_t cap, const struct rmig_hello *in) {
    const char *nul = (const char *)memchr(in->reason, '\0', sizeof in->reason);
    size_t reason = nul == NULL ? sizeof in->reason : (size_t)(nul - in->reason);
    size_t need = reason == 0 ? 0 : 4 + reason;
#define RMIG__X(tag, name) need += RMIG__HELLO_SAYS(tag, in->name) ? 4 + 8 : 0;
    RMIG_HELLO_LIST(RMIG__X)
#undef RMIG__X
    if (cap < need)
        return RMIG_ERR_FULL;
    size_t at = 0;
    uint8_t value[8];
#define RMIG__X(tag, name)                                                                                             \
    rmig__put_be64(value, in->name);                                                                                   \
    at += RMIG__HELLO_SAYS(tag, in->name) ? rmig__put_tlv(out + at, tag, value, sizeof value) : 0;
    RMIG_HELLO_LIST(RMIG__X)
#undef RMIG__X
    if (reason != 0)
        at += rmig__put_tlv(out + at, RMIG_HELLO_REASON_TAG, in->reason, reason);
    return (int)at;
}
/* Where the value of a tag belongs, or NULL for a tag that this version does not know. */
static uint64_t *rmig__hello_field(struct rmig_hello *h, uint32_t tag) {
    switch (tag) {
#define RMIG__X(number, name)                                                                                          \
    case number:                                                                                                       \
        return &h->name;
        RMIG_HELLO_LIST(RMIG__X)
#undef RMIG__X
    default:
        return NULL;
    }
}
/* Text from the peer goes to terminals and logs: only printable ASCII passes. */
static void rmig__copy_text(char *out, size_t cap, const uint8_t *p, size_t n) {
    n = n < cap - 1 ? n : cap - 1;
    for (size_t i = 0; i < n; i++)
        out[i] = p[i] >= 0x20 && p[i] < 0x7f ? (char)p[i] : '?';
    out[n] = '\0';
}
RMIG__DEF int rmig_decode_hello(const uint8_t *p, size_t n, struct rmig_hello *out) {
    struct rmig_hello h;
    memset(&h, 0, sizeof h);
    uint32_t seen = 0;
    if (n > RMIG_PAYLOAD_MAX)
        return RMIG_ERR_WIRE;
    for (size_t at = 0; at < n;) {
        if (n - at < 4)
            return RMIG_ERR_WIRE;
        uint32_t tag = rmig__get_be32(p + at) >> 16;
        size_t len = rmig__get_be32(p + at) & 0xffff;
        at += 4;
        if (n - at < len)
            return RMIG_ERR_WIRE;
        uint64_t *field = rmig__hello_field(&h, tag);
        if (field != NULL || tag == RMIG_HELLO_REASON_TAG) {
            if ((seen & (1u << tag)) != 0)
                return RMIG_ERR_WIRE;
            seen |= 1u << tag;
        }
        if (field != NULL) {
            if (len != 8)
                return RMIG_ERR_WIRE;
            *field = rmig__get_be64(p + at);
        } else if (tag == RMIG_HELLO_REASON_TAG) {
            rmig__copy_text(h.reason, sizeof h.reason, p + at, len);
        }
        at += len;
    }
    *out = h;
    return (int)n;
}

/*  BLOCKS entry    0 length   8 guest offset   16 n (8 bits)   17 name */
RMIG__DEF int rmig_encode_block_entry(uint8_t *out, size_t cap, const struct rmig_block_entry *in) {
    const char *nul = (const char *)memchr(in->name, '\0', sizeof in->name);
    size_t n = nul == NULL ? 0 : (size_t)(nul - in->name);
    if (n == 0)
        return RMIG_ERR_WIRE;
    if (cap < 17 + n)
        return RMIG_ERR_FULL;
    rmig__put_be64(out, in->length);
    rmig__put_be64(out + 8, in->guest_offset);
    out[16] = (uint8_t)n;
    memcpy(out + 17, in->name, n);
    return (int)(17 + n);
}
RMIG__DEF int rmig_decode_block_entry(const uint8_t *p, size_t n, struct rmig_block_entry *out) {
    if (n < 17 || p[16] == 0 || n - 17 < p[16] || memchr(p + 17, '\0', p[16]) != NULL)
        return RMIG_ERR_WIRE;
    out->length = rmig__get_be64(p);
    out->guest_offset = rmig__get_be64(p + 8);
    memcpy(out->name, p + 17, p[16]);
    out->name[p[16]] = '\0';
    return 17 + p[16];
}

/*  REGISTER_BATCH entry    0 block   4 padding   8 offset   16 length */
RMIG__DEF int rmig_encode_batch(uint8_t *out, size_t cap, const struct rmig_batch *in) {
    if (cap < RMIG_BATCH_SIZE)
        return RMIG_ERR_FULL;
    rmig__put_be32(out, in->block);
    rmig__put_be32(out + 4, 0);
    rmig__put_be64(out + 8, in->offset);
    rmig__put_be64(out + 16, in->length);
    return RMIG_BATCH_SIZE;
}
RMIG__DEF int rmig_decode_batch(const uint8_t *p, size_t n, struct rmig_batch *out) {
    if (n < RMIG_BATCH_SIZE)
        return RMIG_ERR_WIRE;
    out->block = rmig__get_be32(p);
    out->offset = rmig__get_be64(p + 8);
    out->length = rmig__get_be64(p + 16);
    return RMIG_BATCH_SIZE;
}

/*  REGISTER_BATCH_RESULT entry     0 key   8 address */
RMIG__DEF int rmig_encode_batch_result(uint8_t *out, size_t cap, const struct rmig_batch_result *in) {
    if (cap < RMIG_BATCH_RESULT_SIZE)
        return RMIG_ERR_FULL;
    rmig__put_be64(out, in->key);
    rmig__put_be64(out + 8, in->address);
    return RMIG_BATCH_RESULT_SIZE;
}
RMIG__DEF int rmig_decode_batch_result(const uint8_t *p, size_t n, struct rmig_batch_result *out) {
    if (n < RMIG_BATCH_RESULT_SIZE)
        return RMIG_ERR_WIRE;
    out->key = rmig__get_be64(p);
    out->address = rmig__get_be64(p + 8);
    return RMIG_BATCH_RESULT_SIZE;
}

// >>fabric: implementation

RMIG__DEF void rmig_fabric_close(struct rmig_fabric *f) {
    if (f != NULL)
        f->ops->close_fabric(f);
}

/* What a text lists, each entry with an equal share of the room, but at least some words: a longer one is cut behind a
   word, and those that find no room are counted. */
struct rmig__list {
    char text[472];
    const char *separator;
    size_t room, share;
    size_t used; // but for the count
    unsigned more;
};

#define RMIG__LIST_SHARE 48
#define RMIG__LIST_MORE (sizeof "; and 4294967295 more")

static void rmig__list_begin(struct rmig__list *l, const char *separator, size_t room, size_t entries) {
    memset(l, 0, sizeof *l);
    l->separator = separator;
    l->room = (size_t)rmig__min(room, sizeof l->text);
    l->share = (size_t)rmig__max((l->room - RMIG__LIST_MORE) / rmig__max(entries, 1), RMIG__LIST_SHARE);
}

static void rmig__list_add(struct rmig__list *l, const char *entry) {
    const char *separator = l->used == 0 ? "" : l->separator, *dots = "";
    size_t n = strlen(entry), most = l->share - strlen(l->separator);
    if (n > most) {
        dots = "...";
        for (n = most - strlen(dots); n > most / 2 && entry[n] != ' ';)
            n--;
    }
    char *at = l->text + l->used;
    if (l->more == 0 && l->used + strlen(separator) + n + strlen(dots) + RMIG__LIST_MORE <= l->room)
        l->used += (size_t)snprintf(at, l->room - l->used, "%s%.*s%s", separator, (int)n, entry, dots);
    else
        snprintf(at, l->room - l->used, "%sand %u more", l->separator, ++l->more);
}

static bool rmig__copy_part(char *out, size_t cap, const char *from, size_t n) {
    if (n >= cap)
        return false;
    memcpy(out, from, n);
    out[n] = '\0';
    return true;
}

/* fe80::/10: which of the host's interfaces leads there only a suffix %interface can tell. */
static bool rmig__lacks_interface(const char *host) {
    bool local = (host[0] == 'f' || host[0] == 'F') && (host[1] == 'e' || host[1] == 'E') && host[2] != '\0' &&
                 strchr("89abAB", host[2]) != NULL && host[3] != '\0' && host[3] != ':';
    return local && host[4] == ':' && strchr(host, '%') == NULL;
}

static bool rmig__is_port(const char *text) {
    unsigned value = 0;
    for (; *text != '\0'; text++) {
        if (*text < '0' || *text > '9')
            return false;
        value = value * 10 + (unsigned)(*text - '0');
        if (value > 65535)
            return false;
    }
    return true;
}

RMIG__DEF int rmig_split_address(const char *address, char *host, size_t host_size, char *port, size_t port_size,
                                 struct rmig_error *err) {
    const char *text = address == NULL ? "" : address;
    const char *from = text, *to, *after;
    if (text[0] == '[') {
        from = text + 1;
        to = strchr(from, ']');
        after = to == NULL ? NULL : to + 1;
        if (after != NULL && *after != ':' && *after != '\0')
            after = NULL;
    } else {
        to = strchr(text, ':');
        after = to = to == NULL ? text + strlen(text) : to;
    }
    const char *number = after == NULL ? NULL : *after == ':' ? after + 1 : after;
    if (number == NULL || text[0] == '\0' || !rmig__is_port(number) ||
        !rmig__copy_part(host, host_size, from, (size_t)(to - from)) ||
        !rmig__copy_part(port, port_size, number, strlen(number))) {
        rmig_fail(err, RMIG_ERR_ARGUMENT, 0, "address \"%.80s\": must be HOST:PORT or [IPV6]:PORT, port 0 to 65535",
                  text);
        return RMIG_ERR_ARGUMENT;
    }
    if (rmig__lacks_interface(host))
        return rmig_fail(err, RMIG_ERR_ARGUMENT, 0,
                         "address \"%.80s\" is link-local: it must name the interface too, as in [%.60s%%eth0]:%s",
                         text, host, port[0] == '\0' ? "PORT" : port);
    return RMIG_OK;
}

// >>control: implementation

#define RMIG__RECVS 4 // a source meets a reply and the next READY back to back; the rest is room for an ERROR
#define RMIG__SENDS 4
#define RMIG__CONTROL_BYTES ((uint64_t)(RMIG__RECVS + RMIG__SENDS) * RMIG_CONTROL_SIZE)
#define RMIG__EVENTS 16
#define RMIG__EVENT_TURNS 64 // so often at once: a fabric may have more without end
#define RMIG__ADDRESS_MAX 128
#define RMIG__REASON_MAX 140 // bytes of a rejection's reason: what InfiniBand's rejections carry, less private data
#define RMIG__LINGER (100 * RMIG__MS) // for the last message of a failed session, in close

/* What completions carry back: the kind of operation above, a buffer's index or a write's number below. */
#define RMIG__ID_RECV ((uint64_t)1 << 60)
#define RMIG__ID_SEND ((uint64_t)2 << 60)
#define RMIG__ID_WRITE ((uint64_t)3 << 60)
#define RMIG__ID_NUMBER (((uint64_t)1 << 60) - 1)

/* The failure model: three questions, each with one answer.

   What can the link still do? What is down stays down, as long as it is the same connection. What arrived before still
   counts, it may say why: a session ends with its link when that has been handled. rmig__link_was_up and
   rmig__link_is_down rest on the order. */
enum rmig__link_state {
    RMIG__LINK_OPENING,
    RMIG__LINK_RESOLVED, // it has an address
    RMIG__LINK_REJECTED, // down, and never was up: the peer said no,
    RMIG__LINK_UNREACHED, // or could not be reached, or this end cut it first,
    RMIG__LINK_UNREACHED_HERE, // for a reason for which no other address would do better
    RMIG__LINK_UP,
    RMIG__LINK_LEFT, // it was up, and has been disconnected
    RMIG__LINK_LOST // it was up, and failed
};

struct rmig__link {
    enum rmig__link_state state;
    int code;
    char text[320]; // why it is down
};

static bool rmig__link_was_up(const struct rmig__link *l) { return l->state >= RMIG__LINK_UP; }

static bool rmig__link_is_down(const struct rmig__link *l) {
    return l->state >= RMIG__LINK_REJECTED && l->state != RMIG__LINK_UP;
}

/* The link goes down: `lost` or left if it was up, else as `how`. If it is down, the first reason stands. */
static void rmig__link_down(struct rmig__link *l, enum rmig__link_state how, bool lost, int code, const char *text) {
    if (rmig__link_is_down(l))
        return;
    l->state = l->state != RMIG__LINK_UP ? how : lost ? RMIG__LINK_LOST : RMIG__LINK_LEFT;
    l->code = code;
    snprintf(l->text, sizeof l->text, "%.310s", text == NULL ? "" : text);
}

/* The peer's reason stands behind its private data; one that gives none is most often busy. */
static void rmig__link_rejected(struct rmig__link *l, const struct rmig_fabric_event *e) {
    char why[RMIG__REASON_MAX + 1] = "";
    size_t n = e->private_data == NULL ? 0 : e->private_data_length, at = RMIG_PRIVATE_DATA_SIZE;
    while (at < n && e->private_data[at] != '\0') // it may be padded
        at++;
    if (at > RMIG_PRIVATE_DATA_SIZE)
        rmig__copy_text(why, sizeof why, e->private_data + RMIG_PRIVATE_DATA_SIZE, at - RMIG_PRIVATE_DATA_SIZE);
    rmig__link_down(l, RMIG__LINK_REJECTED, true, e->provider_code, e->text);
    size_t used = strlen(l->text);
    if (n > 0)
        snprintf(l->text + used, sizeof l->text - used, ": %s",
                 why[0] == '\0' ? "it gave no reason; it may be busy with another source" : why);
}

/* An event of the fabric that concerns the link. */
static void rmig__link_event(struct rmig__link *l, const struct rmig_fabric_event *e) {
    bool down = rmig__link_is_down(l);
    if (e->type == RMIG_FEV_RESOLVED && l->state == RMIG__LINK_OPENING)
        l->state = RMIG__LINK_RESOLVED;
    else if (e->type == RMIG_FEV_ESTABLISHED && !down)
        l->state = RMIG__LINK_UP;
    else if (e->type == RMIG_FEV_DISCONNECTED)
        rmig__link_down(l, RMIG__LINK_UNREACHED, false, e->provider_code, e->text);
    else if (e->type == RMIG_FEV_ERROR)
        rmig__link_down(l, e->at_this_end ? RMIG__LINK_UNREACHED_HERE : RMIG__LINK_UNREACHED, true, e->provider_code,
                        e->text);
    else if (e->type == RMIG_FEV_REJECTED && !down)
        rmig__link_rejected(l, e);
}

/* May the peer still be told why a session fails? It is told one reason. */
enum rmig__hearing {
    RMIG__PEER_HEARS,
    RMIG__PEER_TOLD, // the last words to it are on their way: an ERROR or a refusal
    RMIG__PEER_OVER // there is nothing to say
};

/* Is it certain who owns the guest? Where it is not, every failure is RMIG_ERR_HANDOVER. */
enum rmig__owner {
    RMIG__OWNER_CERTAIN, // the source, until its GOODBYE has come; then the sink
    RMIG__OWNER_OPEN, // the sink has everything: at the sink from FINISH_RESULT to GOODBYE, at the source from GOODBYE
                      // on
    RMIG__OWNER_OPEN_V1 // the last bytes are handed over for sending: the sink may have everything, and will not say
};

struct rmig__received {
    unsigned buffer;
    struct rmig_header header;
};

/* What both engines share: the endpoint, the control buffers, time, errors and counters. */
struct rmig__session {
    struct rmig_fabric *fabric;
    struct rmig_ep *ep;
    struct rmig_config cfg;
    struct rmig_holes holes;
    struct rmig_error error; // of the last call or of the session
    struct rmig_error taint; // the first refused call that was not forgiven; status RMIG_OK: none
    int failed; // the session's status once it is over
    bool failure_told; // process has returned it
    struct rmig_fabric_caps caps;
    struct rmig_stats stats;

    uint8_t *control; // RMIG__RECVS buffers to receive into, then RMIG__SENDS to send from
    struct rmig_mr control_mr;
    bool control_registered;
    unsigned sends_free; // bit i: send buffer i is ours
    struct {
        unsigned slot;
        size_t length;
    } unposted[RMIG__SENDS]; // messages that the fabric has not taken yet, oldest first
    unsigned unposted_count;
    struct rmig__received inbox[RMIG__RECVS]; // received and not yet handled, oldest first
    unsigned inbox_count;

    struct rmig__link link;
    enum rmig__hearing hearing;
    enum rmig__owner owner;
    struct rmig_private_data peer;
    bool peer_data_short; // the peer's private data did not hold the 8 bytes

    bool extended;
    uint64_t peer_payload_max, peer_batch_max, peer_registration_max, peer_idle_max, peer_features;

    uint64_t writes_done; // writes whose completion is known, out of stats.writes_posted
    uint64_t last_progress; // when the last event came, or what is waited for began
    uint64_t last_sent; // when the last control message went out
    bool ready; // poll has something: do not sleep
    bool no_fds; // the fabric has no descriptors: poll it now and then
    bool again; // more to do than one call should
};

static uint64_t rmig__now(const struct rmig__session *ss) { return ss->fabric->ops->now(ss->fabric); }

#if defined(__GNUC__)
__attribute__((format(printf, 2, 3)))
#endif
static void
rmig__trace(const struct rmig__session *ss, const char *format, ...) {
    if (ss->cfg.trace == NULL)
        return;
    char line[400];
    va_list args;
    va_start(args, format);
    vsnprintf(line, sizeof line, format, args);
    va_end(args);
    ss->cfg.trace(ss->cfg.trace_user, line);
}

static uint8_t *rmig__control_buffer(const struct rmig__session *ss, unsigned i) {
    return ss->control + (size_t)i * RMIG_CONTROL_SIZE;
}

static bool rmig__all_sent(const struct rmig__session *ss) { return ss->sends_free == (1u << RMIG__SENDS) - 1; }

/* The payload of a free send buffer to fill in, or NULL if all are on their way. */
static uint8_t *rmig__payload(const struct rmig__session *ss) {
    if (ss->control == NULL || ss->sends_free == 0)
        return NULL;
    return rmig__control_buffer(ss, RMIG__RECVS + (unsigned)rmig__ctz(ss->sends_free)) + RMIG_HEADER_SIZE;
}

/* Ends the session with what stands in ss->error, and tells the peer if it can be told. */
static int rmig__session_end(struct rmig__session *ss);

static void rmig__session_lost(struct rmig__session *ss, const struct rmig_error *why) {
    rmig__link_down(&ss->link, RMIG__LINK_UNREACHED, true, why->provider_code, why->text);
}

static void rmig__session_left(struct rmig__session *ss) {
    rmig__link_down(&ss->link, RMIG__LINK_UNREACHED, false, 0, "");
}

/* Hands messages to the fabric, in order; what finds the queue full stays for the next turn. */
static void rmig__post_sends(struct rmig__session *ss) {
    while (ss->unposted_count > 0 && !rmig__link_is_down(&ss->link) && ss->hearing != RMIG__PEER_OVER) {
        unsigned slot = ss->unposted[0].slot;
        struct rmig_error err;
        memset(&err, 0, sizeof err);
        int status = ss->fabric->ops->send(ss->ep, rmig__control_buffer(ss, RMIG__RECVS + slot), ss->unposted[0].length,
                                           &ss->control_mr, RMIG__ID_SEND | slot, &err);
        if (status == RMIG_ERR_FULL)
            return;
        if (status != RMIG_OK)
            rmig__session_lost(ss, &err);
        uint32_t type = rmig__get_be32(rmig__control_buffer(ss, RMIG__RECVS + slot) + 4);
        if (status == RMIG_OK && (type == RMIG_MSG_FINISH_RESULT || type == RMIG_MSG_GOODBYE))
            ss->owner = RMIG__OWNER_OPEN;
        ss->unposted_count--;
        memmove(ss->unposted, ss->unposted + 1, ss->unposted_count * sizeof ss->unposted[0]);
    }
}

/* Sends the buffer that rmig__payload returned. */
static int rmig__send(struct rmig__session *ss, enum rmig_message type, uint32_t repeat, size_t len) {
    unsigned slot = (unsigned)rmig__ctz(ss->sends_free);
    uint8_t *buffer = rmig__control_buffer(ss, RMIG__RECVS + slot);
    struct rmig_header header;
    header.len = (uint32_t)len;
    header.type = (uint32_t)type;
    header.repeat = repeat;
    rmig_encode_header(buffer, RMIG_HEADER_SIZE, &header);
    ss->unposted[ss->unposted_count].slot = slot;
    ss->unposted[ss->unposted_count++].length = RMIG_HEADER_SIZE + len;
    rmig__post_sends(ss);
    ss->last_sent = rmig__now(ss);
    if (rmig__all_sent(ss) && ss->writes_done == ss->stats.writes_posted)
        ss->last_progress = ss->last_sent; // nothing else was waited for: the peer's time to answer begins here
    ss->sends_free &= ~(1u << slot);
    ss->stats.control_sent++;
    rmig__trace(ss, "send %s len %zu repeat %u", rmig_message_name((uint32_t)type), len, repeat);
    return RMIG_OK;
}

static int rmig__session_end(struct rmig__session *ss) {
    if (ss->failed != RMIG_OK)
        return ss->failed;
    if (ss->error.status > RMIG_SESSION_ERRORS) // a call's error has become the session's
        ss->error.status = ss->error.status == RMIG_ERR_NO_MEMORY ? RMIG_ERR_SETUP : RMIG_ERR_FABRIC;
    if (ss->owner != RMIG__OWNER_CERTAIN)
        rmig_fail(&ss->error, RMIG_ERR_HANDOVER, ss->error.provider_code,
                  "the sink %s everything, but the handover was not confirmed: %.230s",
                  ss->owner == RMIG__OWNER_OPEN ? "has" : "may have", ss->error.text);
    ss->failed = ss->error.status;
    RMIG_LOG(ss->error.text);
    rmig__trace(ss, "failed: %s: %s", rmig_status_name(ss->failed), ss->error.text);
    bool hears = ss->link.state == RMIG__LINK_UP && ss->hearing == RMIG__PEER_HEARS;
    uint8_t *payload = hears ? rmig__payload(ss) : NULL;
    if (payload != NULL) {
        size_t len = ss->extended ? strlen(ss->error.text) : 0; // version 1: an ERROR is empty
        memcpy(payload, ss->error.text, len);
        struct rmig_error first = ss->error;
        rmig__send(ss, RMIG_MSG_ERROR, 1, len);
        ss->error = first;
        ss->hearing = RMIG__PEER_TOLD;
    }
    if (ss->ep != NULL && rmig__link_was_up(&ss->link) && ss->link.state != RMIG__LINK_LEFT)
        ss->fabric->ops->disconnect(ss->ep);
    return ss->failed;
}

#define RMIG__END(ss, ...) (rmig_fail(&(ss)->error, __VA_ARGS__), rmig__session_end(ss))

/* Refused calls. RMIG__NO: nothing changes but the error text, and after a failure the failure is what counts.
   RMIG__REFUSE is for calls that bring something: a block, pages, bytes. What was to be brought is missing then, and a
   caller that does not look would go on to a finish that succeeds. So the first such refusal taints the session: what
   ends a round, hands over or takes over returns it, until the embedder has said that it knows (forgive). */
#define RMIG__NO(ss, status, ...)                                                                                      \
    ((ss)->failed != RMIG_OK ? (ss)->failed : (rmig_fail(&(ss)->error, status, __VA_ARGS__), (int)(status)))
#define RMIG__REFUSE(ss, ...) rmig__taint(ss, RMIG__NO(ss, __VA_ARGS__))

static int rmig__taint(struct rmig__session *ss, int status) {
    if (ss->failed == RMIG_OK && ss->taint.status == RMIG_OK && status < RMIG_OK)
        ss->taint = ss->error;
    return status;
}

/* RMIG_OK, or the refusal that was not forgiven. */
static int rmig__untainted(struct rmig__session *ss) {
    if (ss->failed != RMIG_OK)
        return ss->failed;
    if (ss->taint.status != RMIG_OK)
        ss->error = ss->taint;
    return ss->taint.status;
}

/* Every public function takes NULL for its object: a program that does not look whether open has succeeded goes through
   all its calls, and learns at any of them. */
static const struct rmig_error rmig__no_source = {RMIG_ERR_ARGUMENT, 0, "the source is NULL: rmig_source_open failed"};
static const struct rmig_error rmig__no_sink = {RMIG_ERR_ARGUMENT, 0, "the sink is NULL: rmig_sink_open failed"};

/* Makes a source or a sink: an object of `size` bytes that begins with its session. NULL: *status says why, and *err in
   words. */
static void *rmig__session_new(size_t size, struct rmig_fabric *fabric, const struct rmig_config *cfg, int *status,
                               struct rmig_error *err) {
    const struct rmig_fabric_ops *ops = fabric == NULL ? NULL : fabric->ops;
    *status = RMIG_ERR_ARGUMENT;
    if (ops == NULL) {
        rmig_fail(err, *status, 0, "the fabric is NULL; open one first, such as rmig_ofi_open");
        return NULL;
    }
    if (ops->size < sizeof *ops) {
        rmig_fail(err, *status, 0, "fabric %s: its table has %zu bytes, %zu are needed: built with an older rmig.h",
                  ops->name, ops->size, sizeof *ops);
        return NULL;
    }
    struct rmig__session *ss = (struct rmig__session *)rmig__calloc(1, size);
    if (ss == NULL) {
        *status = RMIG_ERR_NO_MEMORY;
        rmig_fail(err, *status, 0, "out of memory for a session (%zu bytes)", size);
        return NULL;
    }
    ss->fabric = fabric;
    if (cfg != NULL)
        ss->cfg = *cfg;
    rmig_holes_open(&ss->holes);
    *status = RMIG_OK;
    return ss;
}

static int rmig__post_recv(struct rmig__session *ss, unsigned buffer) {
    int status = ss->fabric->ops->recv(ss->ep, rmig__control_buffer(ss, buffer), RMIG_CONTROL_SIZE, &ss->control_mr,
                                       RMIG__ID_RECV | buffer, &ss->error);
    return status;
}

static int rmig__check_caps(struct rmig__session *ss) {
    const struct rmig_fabric_caps *c = &ss->caps;
    if (!c->sends_after_writes && !c->completion_is_delivery)
        return RMIG__END(ss, RMIG_ERR_SETUP, 0, "fabric %s: neither orders sends after writes nor reports delivery",
                         ss->fabric->ops->name);
    if (c->recv_depth < RMIG__RECVS || c->send_depth < RMIG__SENDS || c->write_depth < 1 || c->write_max < 1 ||
        c->private_data_request < RMIG_PRIVATE_DATA_SIZE || c->private_data_reply < RMIG_PRIVATE_DATA_SIZE ||
        c->registration_max < RMIG__CONTROL_BYTES)
        return RMIG__END(ss, RMIG_ERR_SETUP, 0,
                         "fabric %s: too small: receives %u (need %d), sends %u (need %d), writes %u (need 1), private "
                         "data %u and %u bytes (need %d), registration %llu bytes (need %llu)",
                         ss->fabric->ops->name, c->recv_depth, RMIG__RECVS, c->send_depth, RMIG__SENDS, c->write_depth,
                         c->private_data_request, c->private_data_reply, RMIG_PRIVATE_DATA_SIZE,
                         (unsigned long long)c->registration_max, (unsigned long long)RMIG__CONTROL_BYTES);
    return RMIG_OK;
}

/* The endpoint can take work: control buffers are registered and receives posted before the peer can send. */
static int rmig__session_setup(struct rmig__session *ss) {
    const struct rmig_fabric_ops *ops = ss->fabric->ops;
    if (ops->caps(ss->ep, &ss->caps, &ss->error) != RMIG_OK)
        return rmig__session_end(ss);
    int status = rmig__check_caps(ss);
    if (status != RMIG_OK)
        return status;
    size_t size = (size_t)RMIG__CONTROL_BYTES;
    if (ss->control == NULL)
        ss->control = (uint8_t *)RMIG_MALLOC(size);
    if (ss->control == NULL)
        return RMIG__END(ss, RMIG_ERR_SETUP, 0, "out of memory for %zu bytes of control buffers", size);
    if (ops->reg(ss->ep, ss->control, size, RMIG_ACCESS_LOCAL_READ | RMIG_ACCESS_LOCAL_WRITE, &ss->control_mr,
                 &ss->error) != RMIG_OK)
        return rmig__session_end(ss);
    ss->control_registered = true;
    ss->sends_free = (1u << RMIG__SENDS) - 1;
    for (unsigned i = 0; i < RMIG__RECVS && status == RMIG_OK; i++)
        status = rmig__post_recv(ss, i);
    return status == RMIG_OK ? RMIG_OK : rmig__session_end(ss);
}

/* Takes what an endpoint still has to say. True once it is at its end: nothing more will be delivered. *sends (may be
   NULL) gets a bit for each send that has completed. */
static bool rmig__ep_ended(struct rmig_ep *ep, unsigned *sends) {
    for (unsigned events = 0; events < RMIG__EVENTS * RMIG__EVENT_TURNS; events++) {
        struct rmig_fabric_event e;
        int n = ep->fabric->ops->poll(ep, &e, 1, NULL);
        if (n <= 0)
            return n < 0;
        if (e.type == RMIG_FEV_DISCONNECTED || e.type == RMIG_FEV_REJECTED || e.type == RMIG_FEV_ERROR)
            return true;
        if (e.type == RMIG_FEV_SEND && sends != NULL)
            *sends |= 1u << (e.id & RMIG__ID_NUMBER);
    }
    return false;
}

/* The peer should learn why: gives the last message a moment to leave. */
static void rmig__session_linger(struct rmig__session *ss) {
    if (ss->hearing != RMIG__PEER_TOLD || ss->ep == NULL)
        return;
    uint64_t until = rmig__after(rmig__now(ss), RMIG__LINGER);
    while (!rmig__all_sent(ss) && rmig__now(ss) < until) {
        rmig__post_sends(ss);
        if (rmig__ep_ended(ss->ep, &ss->sends_free))
            return;
        if (!rmig__all_sent(ss) && ss->fabric->ops->wait(ss->fabric, &ss->ep, 1, until, NULL) != RMIG_OK)
            return;
    }
}

/* The connection is dead: from here on nothing of the peer lands, whatever is registered. */
static void rmig__session_cut(struct rmig__session *ss) {
    if (ss->ep != NULL)
        ss->fabric->ops->cut(ss->ep);
    rmig__session_left(ss);
    if (ss->link.state == RMIG__LINK_LOST)
        ss->link.state = RMIG__LINK_LEFT; // nobody disconnects what is cut
    ss->hearing = RMIG__PEER_OVER;
}

/* The peer is told what can be told, then the connection is cut. Guest memory may be deregistered behind it. */
static void rmig__session_leave(struct rmig__session *ss) {
    rmig__session_linger(ss);
    if (ss->ep != NULL && ss->link.state == RMIG__LINK_UP && ss->hearing == RMIG__PEER_HEARS)
        ss->fabric->ops->disconnect(ss->ep);
    rmig__session_cut(ss);
}

static void rmig__control_deregister(struct rmig__session *ss) {
    if (ss->control_registered)
        ss->fabric->ops->dereg(ss->ep, &ss->control_mr, NULL);
    ss->control_registered = false;
}

/* Gives the endpoint back; the session may set up another. Guest memory has been deregistered before. */
static void rmig__session_drop(struct rmig__session *ss) {
    rmig__session_cut(ss);
    rmig__control_deregister(ss);
    if (ss->ep != NULL)
        ss->fabric->ops->close(ss->ep);
    ss->ep = NULL;
    ss->inbox_count = ss->unposted_count = 0;
    ss->link.state = RMIG__LINK_OPENING;
    ss->hearing = RMIG__PEER_HEARS;
    ss->extended = false;
}

static void rmig__session_close(struct rmig__session *ss) {
    rmig__session_drop(ss);
    rmig_holes_close(&ss->holes);
    rmig__release(ss->control);
    ss->control = NULL;
}

static int rmig__on_recv(struct rmig__session *ss, const struct rmig_fabric_event *e) {
    unsigned buffer = (unsigned)(e->id & RMIG__ID_NUMBER);
    RMIG_ASSERT(buffer < RMIG__RECVS && ss->inbox_count < RMIG__RECVS);
    struct rmig__received *r = &ss->inbox[ss->inbox_count];
    const uint8_t *p = rmig__control_buffer(ss, buffer);
    r->buffer = buffer;
    if (rmig_decode_header(p, (size_t)e->length, &r->header) < 0) {
        uint32_t len = e->length >= 4 ? rmig__get_be32(p) : 0;
        return RMIG__END(ss, RMIG_ERR_PROTOCOL, 0,
                         "a message of %llu bytes says that its payload has %u; must be 16 + len bytes, len at most %d",
                         (unsigned long long)e->length, len, RMIG_PAYLOAD_MAX);
    }
    ss->inbox_count++;
    ss->stats.control_received++;
    rmig__trace(ss, "recv %s len %u repeat %u", rmig_message_name(r->header.type), r->header.len, r->header.repeat);
    return RMIG_OK;
}

static int rmig__on_event(struct rmig__session *ss, const struct rmig_fabric_event *e) {
    switch (e->type) {
    case RMIG_FEV_SEND:
        ss->sends_free |= 1u << (e->id & RMIG__ID_NUMBER);
        break;
    case RMIG_FEV_RECV:
        return rmig__on_recv(ss, e);
    case RMIG_FEV_WRITE:
        /* In order, a completion covers all before it; otherwise every write has its own. */
        if (!ss->caps.writes_in_order)
            ss->writes_done++;
        else if ((e->id & RMIG__ID_NUMBER) > ss->writes_done)
            ss->writes_done = e->id & RMIG__ID_NUMBER;
        break;
    case RMIG_FEV_ESTABLISHED:
        ss->peer_data_short = rmig_decode_private_data(e->private_data, e->private_data_length, &ss->peer) < 0;
        // fall through
    default:
        rmig__link_event(&ss->link, e);
    }
    return RMIG_OK;
}

/* Takes in what has happened. The inbox has room for all receives: each is posted again when its message is handled. */
static int rmig__session_poll(struct rmig__session *ss) {
    ss->ready = false;
    rmig__post_sends(ss);
    for (unsigned turns = 0;; turns++) {
        struct rmig_fabric_event events[RMIG__EVENTS];
        if (turns == RMIG__EVENT_TURNS) {
            ss->again = true;
            return RMIG_OK;
        }
        if (!rmig__link_was_up(&ss->link))
            memset(events, 0, sizeof events); // a fabric of before does not set at_this_end
        int n = ss->fabric->ops->poll(ss->ep, events, RMIG__EVENTS, &ss->error);
        if (n < 0) {
            rmig__session_lost(ss, &ss->error);
            return rmig__session_end(ss);
        }
        if (n > 0)
            ss->last_progress = rmig__now(ss);
        for (int i = 0; i < n; i++) {
            int status = rmig__on_event(ss, &events[i]);
            if (status != RMIG_OK)
                return status;
        }
        if (n < RMIG__EVENTS)
            return RMIG_OK;
    }
}

/* The oldest message has been handled: its buffer may receive again. */
static void rmig__inbox_pop(struct rmig__session *ss) {
    unsigned buffer = ss->inbox[0].buffer;
    ss->inbox_count--;
    memmove(ss->inbox, ss->inbox + 1, ss->inbox_count * sizeof ss->inbox[0]);
    if (!rmig__link_is_down(&ss->link) && rmig__post_recv(ss, buffer) != RMIG_OK)
        rmig__session_lost(ss, &ss->error);
}

/* The peer's ERROR message, in its own words if it has some. */
static int rmig__peer_error(struct rmig__session *ss, const char *peer, const struct rmig__received *r) {
    char text[200];
    rmig__copy_text(text, sizeof text, rmig__control_buffer(ss, r->buffer) + RMIG_HEADER_SIZE, r->header.len);
    ss->hearing = RMIG__PEER_OVER; // no ERROR in answer to an ERROR
    return RMIG__END(ss, RMIG_ERR_REFUSED, 0, "the %s gave up%s%s", peer, text[0] == '\0' ? "" : ": ", text);
}

/* Once all messages that came before it are handled, a link that went down ends the session. */
static int rmig__check_link(struct rmig__session *ss, const char *peer) {
    if (ss->link.state == RMIG__LINK_LOST)
        return RMIG__END(ss, RMIG_ERR_FABRIC, ss->link.code,
                         "the connection to the %s failed before the handover was over: %s", peer, ss->link.text);
    if (ss->link.state == RMIG__LINK_LEFT)
        return RMIG__END(ss, RMIG_ERR_PEER_GONE, ss->link.code, "the %s went away before the handover was over%s%s",
                         peer, ss->link.text[0] == '\0' ? "" : ": ", ss->link.text);
    return RMIG_OK;
}

/* What an end waits for of its peer, and until when: rmig__source_wait, rmig__sink_wait. Beside each stands what wakes
   this end, whatever comes: rmig__source_wake, rmig__sink_wake. These only wake; what is done then is done where it is
   due. Timeouts and deadlines read both. */
struct rmig__wait {
    const char *what; // that the peer, or the fabric, is to do; NULL: nothing is waited for
    enum rmig_param limit; // which parameter bounds that
    uint64_t span; // how long it may take
    uint64_t until; // when it has taken too long, RMIG_FOREVER: never
};

static struct rmig__wait rmig__wait_for(const struct rmig__session *ss, const char *what, enum rmig_param limit,
                                        uint64_t more) {
    struct rmig__wait w = {what, limit, 0, RMIG_FOREVER};
    if (what != NULL) {
        w.span = rmig__after(rmig_get(&ss->cfg, limit), more);
        w.until = rmig__after(ss->last_progress, w.span);
    }
    return w;
}

/* What no event tells is looked for now and then. */
static uint64_t rmig__session_wake(const struct rmig__session *ss) {
    bool unposted = ss->unposted_count > 0 && !rmig__link_is_down(&ss->link);
    return ss->no_fds || unposted ? rmig__now(ss) + RMIG__MS : RMIG_FOREVER;
}

/* Ends the session if the wait is over. */
static int rmig__wait_check(struct rmig__session *ss, const char *peer, const struct rmig__wait *w) {
    char span[32];
    if (w->until == RMIG_FOREVER || rmig__now(ss) < w->until)
        return RMIG_OK;
    rmig__param_text(&rmig__params[RMIG_PARAM_IO_TIMEOUT], w->span, span, sizeof span);
    return RMIG__END(ss, RMIG_ERR_TIMEOUT, 0, "nothing from the %s for %s (%s) while waiting for %s", peer, span,
                     rmig__params[w->limit].name, w->what);
}

static int rmig__session_fds(struct rmig__session *ss, struct rmig_ep *ep, struct rmig_fd *fds, size_t n) {
    bool ready = false;
    int got = ss->fabric->ops->fds(ep, fds, n, &ready, &ss->error);
    if (got < 0)
        return rmig__session_end(ss);
    ss->ready = ss->ready || ready;
    ss->no_fds = ss->no_fds || got == 0;
    return got;
}

/* A private mapping on huge pages of hugetlbfs has a name in the list of mappings, which is read once for all
   blocks. */
struct rmig__span {
    uint64_t from, to; // addresses
};

static int rmig__span_order(const void *a, const void *b) {
    const struct rmig__span *x = (const struct rmig__span *)a, *y = (const struct rmig__span *)b;
    return x->from < y->from ? -1 : x->from > y->from;
}

/* How many bytes of the n spans, which it sorts, are on huge pages: by a list of mappings, in ascending order. */
static uint64_t rmig__anonymous_huge(int maps_fd, struct rmig__span *span, size_t n) {
    struct rmig__lines lines;
    uint64_t huge = 0;
    size_t first = 0;
    lines.fd = maps_fd;
    lines.at = lines.n = 0;
    if (n > 0)
        qsort(span, n, sizeof *span, rmig__span_order);
    while (first < n && rmig__lines_next(&lines)) {
        char *end;
        uint64_t from = strtoull(lines.line, &end, 16), to = *end == '-' ? strtoull(end + 1, NULL, 16) : 0;
        while (first < n && span[first].to <= from)
            first++;
        if (strstr(lines.line, " /anon_hugepage") == NULL)
            continue;
        for (size_t i = first; i < n && span[i].from < to; i++)
            if (span[i].to > from)
                huge += rmig__min(span[i].to, to) - rmig__max(span[i].from, from);
    }
    return huge;
}

#define RMIG__HUGETLBFS_MAGIC 0x958458f6 // linux/magic.h

static bool rmig__on_hugetlbfs(const struct rmig_block *b) {
#ifdef __linux__
    struct statfs fs;
    return b->backing == RMIG_BACKING_SHARED_FD && fstatfs(b->fd, &fs) == 0 &&
           (uint64_t)fs.f_type == RMIG__HUGETLBFS_MAGIC;
#else
    (void)b;
    return false;
#endif
}

/* How much of the blocks counts against a limit of locked memory: neither device memory nor huge pages of hugetlbfs. */
static int rmig__charged(struct rmig__session *ss, const struct rmig_blocks *blocks, uint64_t *charged) {
    struct rmig__span *span = (struct rmig__span *)rmig__calloc(blocks->count, sizeof *span);
    size_t n = 0;
    *charged = 0;
    if (span == NULL && blocks->count > 0)
        return RMIG__END(ss, RMIG_ERR_SETUP, 0, "out of memory for a list of %u blocks", blocks->count);
    for (uint32_t i = 0; i < blocks->count; i++) {
        const struct rmig_block *b = &blocks->block[i];
        if (b->backing == RMIG_BACKING_DMABUF || rmig__on_hugetlbfs(b))
            continue;
        *charged += b->length;
        if (b->backing == RMIG_BACKING_SHARED_FD)
            continue;
        span[n].from = (uint64_t)(uintptr_t)b->host;
        span[n++].to = (uint64_t)(uintptr_t)b->host + b->length;
    }
    int maps_fd = n > 0 ? open("/proc/self/maps", O_RDONLY | RMIG__O_CLOEXEC) : -1; // without it all are charged
    if (maps_fd >= 0) {
        *charged -= rmig__anonymous_huge(maps_fd, span, n);
        close(maps_fd);
    }
    rmig__release(span);
    return RMIG_OK;
}

/* Before anything is moved: may as much be registered as is sure to be? `sure`: of all the blocks' memory, at most.
   What comes after that fails when it comes. */
static int rmig__check_lockable(struct rmig__session *ss, const struct rmig_blocks *blocks, uint64_t sure) {
    uint64_t ram = 0, charged = 0;
    if (ss->fabric->ops->lockable == NULL)
        return RMIG_OK;
    for (uint32_t i = 0; i < blocks->count; i++)
        ram += blocks->block[i].backing == RMIG_BACKING_DMABUF ? 0 : blocks->block[i].length;
    if (ram == 0)
        return RMIG_OK;
    int status = rmig__charged(ss, blocks, &charged);
    if (status != RMIG_OK)
        return status;
    struct rmig_error err;
    memset(&err, 0, sizeof err);
    if (ss->fabric->ops->lockable(ss->ep, rmig__min(ram, sure), rmig__min(charged, sure), &err) == RMIG_OK)
        return RMIG_OK;
    return RMIG__END(ss, RMIG_ERR_SETUP, err.provider_code, "of %llu bytes of guest memory %.230s",
                     (unsigned long long)ram, err.text);
}

/* Guest memory at this end. Registration is the costly call, so it is timed and counted in one place. */
static int rmig__register(struct rmig__session *ss, const struct rmig_block *b, uint64_t offset, uint64_t length,
                          unsigned access, struct rmig_mr *mr, const char *advice) {
    uint64_t begin = rmig__now(ss);
    struct rmig_error err;
    memset(&err, 0, sizeof err);
    const struct rmig_fabric_ops *ops = ss->fabric->ops;
    int status;
    if (b->backing != RMIG_BACKING_DMABUF)
        status = ops->reg(ss->ep, b->host + offset, length, access, mr, &err);
    else if (ops->reg_dmabuf != NULL)
        status = ops->reg_dmabuf(ss->ep, b->fd, b->fd_offset + offset, b->host + offset, length, access, mr, &err);
    else
        status = rmig_fail(&err, RMIG_ERR_REGISTRATION, 0, "the fabric \"%s\" takes no dma-buf", ops->name);
    if (status != RMIG_OK)
        return RMIG__END(ss, RMIG_ERR_REGISTRATION, err.provider_code,
                         "block \"%.40s\": %llu bytes at offset 0x%llx cannot be registered, %llu bytes are: %.230s%s",
                         b->name, (unsigned long long)length, (unsigned long long)offset,
                         (unsigned long long)ss->stats.bytes_registered, err.text, advice);
    ss->stats.registrations++;
    ss->stats.bytes_registered += length;
    ss->stats.registration_ns += rmig__now(ss) - begin;
    rmig__trace(ss, "register %s 0x%llx+0x%llx", b->name, (unsigned long long)offset, (unsigned long long)length);
    return RMIG_OK;
}

static int rmig__deregister(struct rmig__session *ss, struct rmig_mr *mr, uint64_t length, struct rmig_error *err) {
    ss->stats.deregistrations++;
    ss->stats.bytes_registered -= length;
    return ss->fabric->ops->dereg(ss->ep, mr, err);
}

static void rmig__fill_hello(const struct rmig__session *ss, struct rmig_hello *h) {
    memset(h, 0, sizeof *h);
    h->chunk_size = rmig_get(&ss->cfg, RMIG_PARAM_CHUNK_SIZE);
    h->page_size = rmig_get(&ss->cfg, RMIG_PARAM_PAGE_SIZE);
    h->key_bits = ss->caps.key_bits;
    h->payload_max = RMIG_PAYLOAD_MAX;
    h->batch_max = RMIG_REPEAT_MAX;
    h->registration_max = ss->caps.registration_max;
    h->idle_max = rmig_get(&ss->cfg, RMIG_PARAM_IO_TIMEOUT);
    h->features = RMIG_FEATURE_FINISH_PENDING;
}

/* What a peer may name in HELLO or HELLO_RESULT. Less is refused; more is refused too, or counts as the most that this
   end knows, where a later version may have more. */
struct rmig__limit {
    const char *name;
    uint64_t value, min, max;
    bool more_is_good, zero_is_good, power_of_two;
};

/* False, and why not in words. */
static bool rmig__limit_kept(const struct rmig__limit *l, char *why, size_t n) {
    bool in_range = l->value >= l->min && (l->value <= l->max || l->more_is_good) &&
                    (!l->power_of_two || rmig__is_power_of_two(l->value));
    if (in_range || (l->value == 0 && l->zero_is_good))
        return true;
    int at = snprintf(why, n, "%s %llu: must be %s%s%llu", l->name, (unsigned long long)l->value,
                      l->zero_is_good ? "0, or " : "", l->power_of_two ? "a power of two from " : "",
                      (unsigned long long)l->min);
    if (l->more_is_good)
        snprintf(why + at, n - (size_t)at, " or more");
    else
        snprintf(why + at, n - (size_t)at, " to %llu", (unsigned long long)l->max);
    return false;
}

/* Takes over the peer's limits. chunk: what one registration must hold. False if one cannot be: why (of 120 bytes at
   least) names it, its value, and what would be right. */
static bool rmig__take_limits(struct rmig__session *ss, const struct rmig_hello *h, uint64_t chunk, char *why,
                              size_t n) {
    const struct rmig__param_row *idle = &rmig__params[RMIG_PARAM_IO_TIMEOUT];
    const struct rmig__limit limits[] = {
        {"page_size", h->page_size, 4096, RMIG_CHUNK_SIZE_MAX, false, false, true},
        {"key_bits", h->key_bits, 32, 64, false, false, false},
        {"payload_max", h->payload_max, 512, RMIG_PAYLOAD_MAX, true, false, false},
        {"batch_max", h->batch_max, 1, RMIG_REPEAT_MAX, true, false, false},
        {"registration_max", h->registration_max, chunk, UINT64_MAX, true, false, false},
        {"idle_max", h->idle_max, idle->min, idle->max, true, true, false},
    };
    for (size_t i = 0; i < sizeof limits / sizeof limits[0]; i++)
        if (!rmig__limit_kept(&limits[i], why, n))
            return false;
    ss->peer_payload_max = rmig__min(h->payload_max, RMIG_PAYLOAD_MAX);
    ss->peer_batch_max = rmig__min(h->batch_max, RMIG_REPEAT_MAX);
    ss->peer_registration_max = h->registration_max;
    ss->peer_idle_max = rmig__min(h->idle_max, idle->max);
    ss->peer_features = h->features;
    return true;
}

#define RMIG__KEEPALIVE_MIN (4 * RMIG__MS) // between two, however short the peer's patience is

/* When a message is due so that the peer does not take this end for dead. */
static uint64_t rmig__idle_at(const struct rmig__session *ss) {
    if (!ss->extended || ss->peer_idle_max == 0)
        return RMIG_FOREVER;
    return rmig__after(ss->last_sent, rmig__max(ss->peer_idle_max / 4, RMIG__KEEPALIVE_MIN));
}

// >>pacer: implementation

/* Holds writes back so that no more bytes leave in a second than max-bandwidth says: a bucket that fills at that rate
   and holds 20 ms of it. A write takes out its bytes, and empties the bucket if it is longer. Once less than a page is
   left, nothing leaves until half of the bucket is full: the writes that follow are then worth a message.

   Holds always: tokens are at most what the bucket holds, and what was allowed since the round began is at most the
   rate times the time since then. */
struct rmig__pacer {
    uint64_t tokens; // bytes that may leave
    uint64_t filled; // when
    uint64_t until; // who was held back may come again then; 0: nobody was
};

static void rmig__pacer_begin(struct rmig__pacer *p, uint64_t now) {
    p->tokens = 0;
    p->filled = now;
}

/* Bytes that may leave now, whole pages; 0: wait until p->until. */
static uint64_t rmig__pacer_allows(struct rmig__pacer *p, uint64_t rate, uint64_t page_size, uint64_t now) {
    uint64_t burst = rmig__max(rate / 50, page_size); // 20 ms
    uint64_t earned = (uint64_t)((double)rate * (double)(now - p->filled) / 1e9);
    if (earned > 0) {
        p->tokens = rmig__min(p->tokens + earned, burst);
        p->filled = now;
    }
    if (p->tokens >= page_size)
        return p->tokens / page_size * page_size;
    uint64_t missing = rmig__max(burst / 2, page_size) - p->tokens;
    p->until = now + 1 + (uint64_t)((double)missing * 1e9 / (double)rate);
    return 0;
}

static void rmig__pacer_spend(struct rmig__pacer *p, uint64_t bytes) { p->tokens -= rmig__min(p->tokens, bytes); }

// >>outbox: implementation

/* The embedder's stream bytes on their way to the sink: put in at the end, taken out at the front, a message at a time.
   A message holds at most `limit` bytes. When that many are there nothing more is taken, and a message is due; with
   fewer it is due when somebody waits for them: the embedder who flushes, the round that begins behind them, the end of
   a round or of everything.

   Holds always: `first` and `flush` only while bytes are there. */
struct rmig__outbox {
    uint8_t *bytes; // RMIG_PAYLOAD_MAX
    size_t fill, limit;
    bool first; // they are from before the round: nothing of it leaves before them
    bool flush; // the embedder waits until they are gone
};

static size_t rmig__outbox_put(struct rmig__outbox *o, const void *data, size_t n) {
    size_t room = o->limit > o->fill ? o->limit - o->fill : 0;
    n = n < room ? n : room;
    if (n > 0)
        memcpy(o->bytes + o->fill, data, n);
    o->fill += n;
    return n;
}

/* Moves the next message's bytes to `out`: how many. */
static size_t rmig__outbox_take(struct rmig__outbox *o, uint8_t *out) {
    size_t n = o->fill < o->limit ? o->fill : o->limit;
    memcpy(out, o->bytes, n);
    o->fill -= n;
    memmove(o->bytes, o->bytes + n, o->fill);
    if (o->fill == 0)
        o->first = o->flush = false;
    return n;
}

static bool rmig__outbox_due(const struct rmig__outbox *o, bool awaited) {
    return o->fill >= o->limit || (o->fill > 0 && (awaited || o->first || o->flush));
}

// >>flight: implementation

/* How much may be outstanding on the wire. While this end registers memory it posts nothing, so what is posted must
   last until it is back; but messages queue behind writes, and what is posted must be through before the peer takes the
   silence for death, also on a slow link, and on one that has just become slow. So it is what the link gets through at
   the rate that was measured while this end is away, and in two round trips; and never more than a slow link gets
   through in a quarter of the peer's idle_max.

   The rate is measured between two looks at the wire. If it had work all the time in between, the rate is known and is
   taken as it is: a fall counts at once. If it ran dry, the rate is at least that. How long this end is away is the
   longest registration of one piece, a little more for good measure; and if the wire ran dry because no more might be
   posted, this end is away longer than was thought, whatever the reason: twice as much may be outstanding from then.
   Before anything is measured it is half of what a slow link gets through.

   Holds always: from <= done <= bytes; the marks rise in number and in bytes, and lie between done and bytes. */
#define RMIG__SLOW_LINK ((uint64_t)9600000) // bytes a second: 10 MB/s, less what headers take
#define RMIG__FLIGHT_MIN ((uint64_t)4 << 20) // nearly half a second at 10 MB/s, 0.3 ms at 100 Gb/s
#define RMIG__STRIDES 32 // a write, and from one completion to the next: such a part of what may be outstanding,
#define RMIG__STRIDE_MIN ((uint64_t)1 << 20) // if it is that much: longer writes are no faster
#define RMIG__MARKS 64 // two for each stride, while the limit falls or grows

struct rmig__mark {
    uint64_t number; // of the write
    uint64_t bytes; // up to and with it
};

struct rmig__flight {
    uint64_t bytes, done; // of all writes prepared, and of those known to be complete, this or a little less
    struct rmig__mark mark[RMIG__MARKS]; // ring: how far bytes had come at some of the signalled writes
    uint64_t first, last;
    uint64_t rate; // bytes per second, 0: not measured yet
    uint64_t away; // ns
    uint64_t since, from; // when the sample under way began, and `done` then
    bool full; // the limit is what ended the last turn's writes
};

static uint64_t rmig__bytes_in(uint64_t rate, uint64_t ns) { return (uint64_t)((double)rate * (double)ns / 1e9); }

/* This end was away for so long. */
static void rmig__flight_away(struct rmig__flight *f, uint64_t ns) {
    f->away = rmig__max(f->away, rmig__min(ns, RMIG__SECOND));
}

/* Bytes that may be outstanding. idle: for how long one end or the other may see nothing come. */
static uint64_t rmig__flight_limit(const struct rmig__flight *f, uint64_t idle, uint64_t rtt) {
    uint64_t patience = idle / 4, slow = rmig__bytes_in(RMIG__SLOW_LINK, patience);
    if (f->rate == 0)
        return slow / 2;
    uint64_t wanted = rmig__bytes_in(f->rate, rmig__min(f->away + 2 * rtt, patience));
    return rmig__min(rmig__max(wanted, RMIG__FLIGHT_MIN), rmig__min(slow, rmig__bytes_in(f->rate, patience)));
}

/* The write `number` is complete, and all before it; dry: nothing is left on the wire. True if that is news, for
   rmig__flight_sample. */
static bool rmig__flight_done(struct rmig__flight *f, uint64_t number, bool dry) {
    for (; f->first < f->last && f->mark[f->first % RMIG__MARKS].number <= number; f->first++)
        f->done = f->mark[f->first % RMIG__MARKS].bytes;
    f->done = dry ? f->bytes : f->done;
    return f->done != f->from;
}

/* Takes a sample of the rate when enough has completed to tell it. */
static void rmig__flight_sample(struct rmig__flight *f, bool dry, uint64_t now, uint64_t rtt) {
    uint64_t elapsed = now - f->since, span = rmig__max(f->away, rtt);
    bool first = f->rate == 0 && f->from == 0; // its time is that of a round trip more than of the wire
    bool enough = f->rate == 0 ? f->done - f->from >= RMIG__FLIGHT_MIN / 2 : elapsed >= span;
    if (!dry && !first && !enough)
        return;
    double rate = (double)(f->done - f->from) * 1e9 / (double)rmig__max(elapsed, 1);
    if (dry ? rate > (double)f->rate : !first)
        f->rate = (uint64_t)rate + 1;
    if (dry && f->full)
        rmig__flight_away(f, 2 * rmig__max(span, (uint64_t)((double)RMIG__FLIGHT_MIN * 1e9 / (double)f->rate)));
    f->from = f->done;
    f->since += elapsed;
}

/* The write `number` asks for a completion: how far bytes have come is noted, a stride behind the last note at least.
 */
static void rmig__flight_mark(struct rmig__flight *f, uint64_t number, uint64_t stride) {
    uint64_t marked = f->last > f->first ? f->mark[(f->last - 1) % RMIG__MARKS].bytes : f->done;
    if (f->bytes - marked < stride || f->last - f->first == RMIG__MARKS)
        return;
    f->mark[f->last % RMIG__MARKS].number = number;
    f->mark[f->last++ % RMIG__MARKS].bytes = f->bytes;
}

// >>writes: implementation

#define RMIG__WRITE_BATCH 64 // writes handed to the fabric in one call

/* Writes that are prepared and not yet posted. Not each of them asks for a completion: one says of all before it that
   they have arrived, where the fabric keeps their order. It comes every signal_every writes, when half of the queue is
   used, when a stride of bytes has gone by, and at the end of what is posted at once, so that one comes whatever
   follows.

   Holds always: queued <= RMIG__WRITE_BATCH; what is posted and does not complete is less than half of the queue. */
struct rmig__writes {
    struct rmig_write queue[RMIG__WRITE_BATCH];
    unsigned queued;
    uint64_t depth; // of the fabric's queue
    uint64_t signal_every; // 1: each
    uint64_t unsignalled, unsignalled_bytes; // writes since the last that asked for a completion
};

/* The next write joins the queue, to be filled in by the caller but for `signal`, which says whether it completes. */
static struct rmig_write *rmig__writes_add(struct rmig__writes *w, uint64_t length, uint64_t stride) {
    RMIG_ASSERT(w->queued < RMIG__WRITE_BATCH);
    struct rmig_write *write = &w->queue[w->queued++];
    w->unsignalled++;
    w->unsignalled_bytes += length;
    write->length = length;
    write->signal =
        w->unsignalled >= w->signal_every || w->unsignalled >= (w->depth + 1) / 2 || w->unsignalled_bytes >= stride;
    if (write->signal)
        w->unsignalled = w->unsignalled_bytes = 0;
    return write;
}

/* What is queued is about to be posted. */
static void rmig__writes_seal(struct rmig__writes *w) {
    if (w->queue[w->queued - 1].signal)
        return;
    w->queue[w->queued - 1].signal = true;
    w->unsignalled = 0;
}

/* The fabric has taken the first n. */
static void rmig__writes_posted(struct rmig__writes *w, unsigned n) {
    w->queued -= n;
    memmove(w->queue, w->queue + n, w->queued * sizeof w->queue[0]);
}

// >>meter: implementation

struct rmig__meter_mark {
    uint64_t ns, bytes; // of the wire's time, of what had arrived
};

/* What the wire does in a round: how many bytes a second arrive while it has work. Time in which nothing but zero pages
   went by is left out. `arrived`, here and below: bytes of all writes known to be complete, ever.

   Holds always: ns is at most the time since the first write of the round; the marks are in the order in which they
   were made, a second of the wire's time apart at least. */
struct rmig__meter {
    bool began, busy, idle; // idle: nothing was to be done
    uint64_t at; // when it was looked at last
    uint64_t ns; // of the wire's time
    uint64_t zero; // bytes_zero when it was looked at last
    struct rmig__meter_mark begin, mark[2];
};

static void rmig__meter_begin(struct rmig__meter *m, uint64_t arrived) {
    memset(m, 0, sizeof *m);
    m->begin.bytes = m->mark[0].bytes = m->mark[1].bytes = arrived;
}

static bool rmig__meter_stopped(const struct rmig__meter *m) { return !m->began || m->idle; }

/* There is work, after there was none. */
static void rmig__meter_start(struct rmig__meter *m, uint64_t now) {
    m->began = true;
    m->idle = false;
    m->at = now;
}

/* zero: bytes_zero; busy: something is on the wire, or will be as soon as it may; idle: nothing is left to be done. */
static void rmig__meter_look(struct rmig__meter *m, uint64_t now, uint64_t arrived, uint64_t zero, bool busy,
                             bool idle) {
    if (!rmig__meter_stopped(m) && (m->busy || zero == m->zero))
        m->ns += now - m->at;
    m->busy = busy;
    m->idle = idle;
    m->at = now;
    m->zero = zero;
    if (m->ns - m->mark[1].ns < RMIG__SECOND)
        return;
    m->mark[0] = m->mark[1];
    m->mark[1].ns = m->ns;
    m->mark[1].bytes = arrived;
}

/* Bytes per second since a mark; 0: too little to tell, since small rounds measure latency. anything: the least is told
   too. */
static uint64_t rmig__meter_rate(const struct rmig__meter *m, const struct rmig__meter_mark *since, uint64_t arrived,
                                 bool anything) {
    uint64_t busy = m->ns - since->ns, bytes = arrived - since->bytes;
    if (busy == 0 || (bytes < RMIG_MIB && busy < RMIG__SECOND / 10 && !anything))
        return 0;
    return (uint64_t)((double)bytes * 1e9 / (double)busy);
}

// >>round: implementation

/* What the embedder saves at once: pages are saved from its begin on, and at its end all of them are in the sink's
   memory. The guest dirties pages in one round that are saved in the next, so what was saved until now, in the time
   from the begin of the round before to the last page saved, tells how fast it dirties them.

   Holds always: before <= began <= saved_at. */
struct rmig__round {
    bool open; // between begin and end
    uint64_t began, before; // when this one began, or the last, and the one before it; 0: there was none
    uint64_t saved, saved_at; // bytes saved when they were looked at last, and when they last grew
};

static void rmig__round_begin(struct rmig__round *r, uint64_t now) {
    r->open = true;
    r->before = r->began;
    r->began = r->saved_at = now;
    r->saved = 0;
}

/* `saved` bytes were saved by now. What was saved before the first look was saved at the begin. */
static void rmig__round_look(struct rmig__round *r, uint64_t now, uint64_t saved, bool first) {
    if (saved != r->saved)
        r->saved_at = first ? r->began : now;
    r->saved = saved;
}

/* Bytes per second. In the first round all memory is saved, dirtied or not: only what is saved again counts. */
static uint64_t rmig__round_dirty_rate(const struct rmig__round *r, uint64_t saved, uint64_t ram) {
    bool first = r->before == 0;
    uint64_t span = r->saved_at - (first ? r->began : r->before);
    uint64_t dirty = first ? saved - rmig__min(saved, ram) : saved;
    return span == 0 ? 0 : (uint64_t)((double)dirty * 1e9 / (double)span);
}

// >>dialogue: implementation

/* Whose turn it is on the control channel. The sink says READY, which lets the source say one thing; if that is a
   request, the sink's next message is the reply to it, and a READY follows each.

   Holds always: a credit is in hand, or a reply is awaited, or neither; never both. */
struct rmig__dialogue {
    bool credit; // a READY is in hand
    uint32_t await; // type of the reply that is due, 0: none
    uint64_t asked, replied; // when the last thing was said, and when the last reply came
};

static bool rmig__dialogue_may_ask(const struct rmig__dialogue *d) { return d->credit && d->await == 0; }

/* The source says something, and awaits `reply`, if it is not RMIG_MSG_NONE. */
static void rmig__dialogue_ask(struct rmig__dialogue *d, enum rmig_message reply, uint64_t now) {
    d->credit = false;
    d->await = (uint32_t)reply;
    d->asked = now;
}

/* A READY has come. False: none was due. */
static bool rmig__dialogue_ready(struct rmig__dialogue *d) {
    if (d->credit || d->await != 0)
        return false;
    d->credit = true;
    return true;
}

/* The reply has come: how long it took. */
static uint64_t rmig__dialogue_reply(struct rmig__dialogue *d, uint64_t now) {
    d->await = 0;
    d->replied = now;
    return now - d->asked;
}

/* What is due from the sink, in words. */
static const char *rmig__dialogue_due(const struct rmig__dialogue *d) {
    return d->await != 0 ? rmig_message_name(d->await) : d->credit ? "nothing" : "READY";
}

/* Until when what must not queue behind writes had better wait for the READY that comes right after a reply; 0: none is
   to come. */
static uint64_t rmig__dialogue_hold_until(const struct rmig__dialogue *d, uint64_t rtt) {
    return d->await == 0 && !d->credit ? rmig__after(d->replied, rtt) : 0;
}

// >>clears: implementation

/* A place in the guest's memory. */
struct rmig__cursor {
    uint32_t block;
    uint64_t page;
};

static bool rmig__cursor_before(struct rmig__cursor a, struct rmig__cursor b) {
    return a.block < b.block || (a.block == b.block && a.page < b.page);
}

#define RMIG__CLEAR_RUNS 256 // noted before they are sent
#define RMIG__CLEAR_BYTES (8 * RMIG_GIB) // in one message: what a sink clears between two READYs

/* Ranges that are zero here and that the sink is to clear: noted, then sent, then known to be cleared, when the READY
   comes that follows a message. The sink's processor clears; a write does not wait for it and could come first. So when
   a page is saved again that may be among them, the fence goes up: nothing is written, and no more is noted, until all
   is known to be cleared.

   Holds always: every range that is noted, or sent and not known to be cleared, lies between low and high; the fence is
   up only while there is one. */
struct rmig__clears {
    struct rmig_compress run[RMIG__CLEAR_RUNS]; // noted, oldest first
    uint32_t count;
    uint64_t bytes; // of these
    bool sent; // some are under way
    bool fence;
    struct rmig__cursor low, high;
};

/* Notes a range, as one run with the last if it follows it. False if there is no room: `most` runs are too few, or the
   bytes too many for a message. */
static bool rmig__clears_add(struct rmig__clears *c, uint32_t most, uint32_t block, uint64_t offset, uint64_t length,
                             uint64_t page_size) {
    if (c->bytes + length > RMIG__CLEAR_BYTES)
        return false;
    struct rmig_compress *last = c->count > 0 ? &c->run[c->count - 1] : NULL;
    if (last != NULL && last->block == block && last->start + last->length == offset) {
        last->length += length;
    } else {
        if (c->count == rmig__min(most, RMIG__CLEAR_RUNS))
            return false;
        struct rmig_compress *run = &c->run[c->count++];
        run->value = 0;
        run->block = block;
        run->start = offset;
        run->length = length;
    }
    struct rmig__cursor from, to;
    from.block = to.block = block;
    from.page = offset / page_size;
    to.page = (offset + length + page_size - 1) / page_size;
    bool first = c->bytes == 0 && !c->sent;
    c->low = first || rmig__cursor_before(from, c->low) ? from : c->low;
    c->high = first || rmig__cursor_before(c->high, to) ? to : c->high;
    c->bytes += length;
    return true;
}

/* The pages were saved, again or for the first time. */
static void rmig__clears_guard(struct rmig__clears *c, uint32_t block, uint64_t page, uint64_t n) {
    struct rmig__cursor from, to;
    from.block = to.block = block;
    from.page = page;
    to.page = page + n;
    if ((c->count > 0 || c->sent) && rmig__cursor_before(from, c->high) && rmig__cursor_before(c->low, to))
        c->fence = true;
}

/* The n oldest runs have been put into a message. */
static void rmig__clears_send(struct rmig__clears *c, uint32_t n) {
    for (uint32_t i = 0; i < n; i++)
        c->bytes -= c->run[i].length;
    c->count -= n;
    memmove(c->run, c->run + n, c->count * sizeof c->run[0]);
    c->sent = true;
}

/* A READY has come: what was sent is cleared. */
static void rmig__clears_done(struct rmig__clears *c) {
    c->sent = false;
    c->fence = c->fence && c->count > 0;
}

// >>regions: implementation

/* Memory registered for writing, at both ends: one or more chunks of a block. */
struct rmig__region {
    uint32_t block;
    bool ready; // the keys are known and the local side is registered
    uint32_t piece, pieces; // registrations at this end: the first of them in the table, and how many there are
    uint64_t offset, length; // in the block
    uint64_t key, address; // at the sink
};

/* What is registered, and what will be. A region is added when the planner needs keys for it, grows while it is the
   last, and stays until the end. At this end it is registered in pieces, so that no call takes long; those of a region
   lie side by side in the table.

   Holds always: regions do not overlap; a chunk belongs to the region that holds it, or to none; a block's
   `unregistered` counts those that belong to none. There is room for a region for each chunk, and for a chunk's pieces.
 */
struct rmig__regions {
    struct rmig__region *region;
    uint32_t count, capacity;
    struct rmig_mr *piece;
    uint32_t piece_count;
    uint64_t chunk_size, piece_bytes;
};

/* The chunks of a block. */
struct rmig__chunks {
    uint32_t *region; // per chunk: 1 + its region's index, 0: none
    uint64_t count, unregistered;
};

static struct rmig__region *rmig__regions_add(struct rmig__regions *rs, uint32_t block, uint64_t offset,
                                              uint64_t length) {
    RMIG_ASSERT(rs->region != NULL && rs->count < rs->capacity);
    struct rmig__region *r = &rs->region[rs->count++];
    r->block = block;
    r->offset = offset;
    r->length = length;
    return r;
}

/* The chunks from the region's end back to `from` now belong to it. */
static void rmig__regions_claim(struct rmig__regions *rs, struct rmig__chunks *c, const struct rmig__region *r,
                                uint64_t from) {
    for (uint64_t at = from; at < r->offset + r->length; at += rs->chunk_size) {
        c->region[rmig_chunk_index(at, rs->chunk_size)] = (uint32_t)(r - rs->region) + 1;
        c->unregistered--;
    }
}

/* The region that a chunk belongs to, or NULL. */
static struct rmig__region *rmig__regions_of(const struct rmig__regions *rs, const struct rmig__chunks *c,
                                             uint64_t chunk) {
    return c->region[chunk] == 0 ? NULL : &rs->region[c->region[chunk] - 1];
}

/* Bytes of piece i of a region. */
static uint64_t rmig__regions_piece_length(const struct rmig__regions *rs, const struct rmig__region *r, uint32_t i) {
    return rmig__min(r->length - i * rs->piece_bytes, rs->piece_bytes);
}

/* How far a request that begins at `start` may reach in its block. A version 1 sink answers a chunk that was asked for
   before with the range of that time, whatever is asked now, and the size of its chunks is not on the wire. Where an
   earlier request began in the same aligned range of some power of two, the sink's chunk may be that range, so this one
   ends with it: either the sink's chunks are smaller and it registers anew, or the old range covers at least this
   one. */
static uint64_t rmig__regions_reach(const struct rmig__regions *rs, const struct rmig__chunks *c, uint64_t start) {
    uint64_t near = start / RMIG_CHUNK_SIZE_MAX * RMIG_CHUNK_SIZE_MAX;
    uint64_t last = rmig__min((near + RMIG_CHUNK_SIZE_MAX) / rs->chunk_size, c->count);
    uint64_t reach = UINT64_MAX;
    for (uint64_t i = near / rs->chunk_size; i < last; i++) {
        const struct rmig__region *r = rmig__regions_of(rs, c, i);
        uint64_t size = RMIG_CHUNK_SIZE_MIN;
        if (r == NULL)
            continue;
        while (size <= RMIG_CHUNK_SIZE_MAX && r->offset / size != start / size)
            size *= 2;
        if (size <= RMIG_CHUNK_SIZE_MAX)
            reach = rmig__min(reach, (start / size + 1) * size);
    }
    return reach;
}

// >>windows: implementation

enum rmig__window_state {
    RMIG__WINDOW_OPEN, // being filled
    RMIG__WINDOW_CLOSED, // to be asked for
    RMIG__WINDOW_REQUESTED, // the sink registers, and this end too
    RMIG__WINDOW_ANSWERED, // the keys are here
    RMIG__WINDOW_READY // may be written
};

/* Regions asked for in one request: a range of the region table. */
struct rmig__window {
    uint32_t first, count;
    uint32_t local; // of these, so many are registered at this end
    uint64_t bytes;
    uint64_t reach; // offset beyond which the last region must not grow
    enum rmig__window_state state;
    struct rmig__cursor end; // of the last region: beyond it the window is used up
};

/* One half of what is registered ahead is on the wire while the other half is being registered. In lockstep, as a
   version 1 source is, there is one window, of one chunk.

   Holds always: the windows are in the order of their states, the furthest first; only the last may be open. */
struct rmig__windows {
    struct rmig__window window[2]; // oldest first
    unsigned count, max;
    uint64_t bytes, regions, longest; // that one may hold; of one region
    bool version_1; // what may be asked for depends on what was: rmig__regions_reach
    uint64_t page_size;
};

/* The first in a state, or NULL. */
static struct rmig__window *rmig__windows_find(struct rmig__windows *ws, enum rmig__window_state state) {
    for (unsigned i = 0; i < ws->count; i++)
        if (ws->window[i].state == state)
            return &ws->window[i];
    return NULL;
}

/* A new one, whose regions will be `first` and those after it; NULL: there are as many as may be. */
static struct rmig__window *rmig__windows_open(struct rmig__windows *ws, uint32_t first) {
    if (ws->count == ws->max)
        return NULL;
    struct rmig__window *w = &ws->window[ws->count++];
    memset(w, 0, sizeof *w);
    w->first = first;
    return w;
}

/* The chunk at offset of a block of `length` bytes joins the window, in the region before it if that ends there. False
   if the window is full. */
static bool rmig__windows_add(struct rmig__windows *ws, struct rmig__window *w, struct rmig__regions *rs,
                              struct rmig__chunks *c, uint32_t block, uint64_t offset, uint64_t length) {
    uint64_t index = rmig_chunk_index(offset, rs->chunk_size);
    uint64_t start = rmig_chunk_start(index, rs->chunk_size), end = rmig_chunk_end(index, rs->chunk_size, length);
    struct rmig__region *last = w->count > 0 ? &rs->region[w->first + w->count - 1] : NULL;
    if (w->bytes >= ws->bytes)
        return false;
    if (last != NULL && last->block == block && last->offset + last->length == start &&
        end - last->offset <= ws->longest && end <= w->reach) {
        last->length = end - last->offset;
    } else {
        if (w->count == ws->regions)
            return false;
        w->reach = ws->version_1 ? rmig__regions_reach(rs, c, start) : UINT64_MAX;
        last = rmig__regions_add(rs, block, start, end - start);
        w->count++;
    }
    rmig__regions_claim(rs, c, last, start);
    w->bytes += end - start;
    w->end.block = block;
    w->end.page = (end + ws->page_size - 1) / ws->page_size;
    return true;
}

/* Windows that the writer has passed are used up. True if there was one. */
static bool rmig__windows_retire(struct rmig__windows *ws, struct rmig__cursor write, bool at_end) {
    unsigned n = 0;
    while (n < ws->count && ws->window[n].state == RMIG__WINDOW_READY &&
           (at_end || !rmig__cursor_before(write, ws->window[n].end)))
        n++;
    if (n == 0)
        return false;
    ws->count -= n;
    memmove(ws->window, ws->window + n, ws->count * sizeof ws->window[0]);
    return true;
}

/* This end registers its memory of a window while the sink registers its own; in lockstep afterwards. */
static bool rmig__windows_due(const struct rmig__windows *ws, const struct rmig__window *w) {
    return w->state == RMIG__WINDOW_ANSWERED || (w->state == RMIG__WINDOW_REQUESTED && ws->max > 1);
}

/* Those whose keys are here and whose memory is registered at this end may be written. True if there was one. */
static bool rmig__windows_ready(struct rmig__windows *ws, struct rmig__regions *rs) {
    struct rmig__window *w;
    bool any = false;
    while ((w = rmig__windows_find(ws, RMIG__WINDOW_ANSWERED)) != NULL && w->local == w->count) {
        for (uint32_t i = 0; i < w->count; i++)
            rs->region[w->first + i].ready = true;
        w->state = RMIG__WINDOW_READY;
        any = true;
    }
    return any;
}

// >>source: implementation

/* How a source works.

   The embedder saves pages; the source sets bits (rmig_merge, one set for each block) and does nothing else until there
   is enough for a write. Then it runs its engine: rmig__source_step takes turns until nothing moves, and every public
   call that may do work ends there. Nothing blocks in a turn, and a turn is bounded: it scans RMIG__STEP_SCAN bytes at
   most. At the end of a step one piece of memory is registered, so that the wire is looked after between two.

   A turn takes in what the fabric has to say, handles the messages of the sink, plans, says one thing to the sink, and
   writes.

   Planning. A pass goes over all dirty pages once, from the first block to the last, with two cursors: the planner goes
   ahead, the writer follows. The planner looks at pages whose chunk has no keys. If they are zero, they go to the
   clears; the page is not dirty any longer, and no key is needed. If not, the chunk joins the open window. A window
   that is full is closed, asked for in one message, answered with keys, and ready when this end has registered its
   memory too. There are two windows: while one is written, the other is registered at both ends. In lockstep, as with
   register-ahead 0, there is one, of one chunk. Regions and keys stay to the end, so later rounds find most chunks
   registered and plan nothing.

   Writing. The writer takes the next run of dirty pages that lie in one region, up to merge-max, prepares a write, and
   takes the pages out of the set. It stops in front of a region that is not ready, where the pacer lets nothing leave,
   and where as much is outstanding as the flight allows. Pages that are saved again behind the cursors stay dirty: the
   next pass takes them. Within a pass a page is written once at most. So where the fabric does not keep the order of
   writes, a pass begins only when the writes of the pass before have arrived.

   Clearing. The sink's processor clears memory, its adapter writes it, and neither waits for the other. A page that was
   found zero and is saved again before the sink is known to have cleared it must not be written: the clear could come
   last. Then the fence goes up, and no write leaves until the READY has come that follows the clears.

   Talking. The sink sends a READY for each message that it has handled; a READY is the credit for one message. If the
   message was a request, the reply comes first. A READY behind clears means that they are done, and a READY behind
   stream bytes that the embedder at the sink has taken them. rmig__control_out says which of the things that are due
   goes first.

   Rounds and the end. A round ends when all that was saved in it has arrived: no dirty pages, no clears, no window, and
   every write complete. Only then the message goes out that says so. finish asks the sink to take the guest.
   FINISH_RESULT says that it will; GOODBYE lets go, and makes it the owner. A source that fails before it has posted
   GOODBYE keeps the guest. From there until GOODBYE is known to have arrived a failure leaves open who owns it
   (RMIG_ERR_HANDOVER). Version 1 has no such messages: there it is open once the last bytes are handed over for
   sending.

   Failing. Whatever goes wrong ends in rmig__session_end: the first reason stands, the sink is told if it still hears,
   and every later call returns the same. Memory is deregistered in close, after the connection has been cut, since a
   write that is under way may still read it. */

#define RMIG__PIECE_MAX (64 * RMIG_MIB) // registered in one call at this end: 5 ms at 80 us/MiB
#define RMIG__ZERO_TEST RMIG_MIB // longest range tested in one piece
#define RMIG__STEP_SCAN (64 * RMIG_MIB) // bytes tested for zero before the wire is looked after again

struct rmig__source_block {
    struct rmig_merge dirty; // saved and not yet written
    struct rmig__chunks chunks;
    uint64_t sink_offset; // of the block in the sink's RAM address space
};

enum rmig__source_op { RMIG__OP_NONE, RMIG__OP_CONNECT, RMIG__OP_END_ROUND, RMIG__OP_FLUSH, RMIG__OP_FINISH };

enum rmig__source_state { RMIG__SOURCE_NEW, RMIG__SOURCE_CONNECTING, RMIG__SOURCE_UP, RMIG__SOURCE_DONE };
enum rmig__exchange { RMIG__BLOCKS_NONE, RMIG__BLOCKS_SENDING, RMIG__BLOCKS_DONE };
enum rmig__finish { RMIG__FINISH_NONE, RMIG__FINISH_ASKED, RMIG__FINISH_ANSWERED, RMIG__FINISH_SAID };

struct rmig_source {
    struct rmig__session ss;
    struct rmig_blocks blocks;
    struct rmig__source_block *block;
    uint64_t *bits; // all blocks' dirty sets
    uint32_t *chunks; // all blocks' chunk tables
    struct rmig__regions regions;
    struct rmig__windows windows;

    uint64_t chunk_size, page_size, merge_max;
    bool pin_all, zero_detect;

    enum rmig__source_op op;
    int refused; // what the call that last began an operation was refused with; RMIG_OK: it was not
    enum rmig__source_state state;
    bool hello_sent, connect_posted;
    enum rmig__exchange exchange;
    uint32_t blocks_sent;
    uint64_t connect_began;
    uint64_t attempt_began, attempt_until; // with the address at hand; RMIG_FOREVER: the name has no other
    uint32_t addresses; // of the name
    bool rejected; // one of them was there
    bool other_fds; // next has closed descriptors, and the new ones may have their numbers
    struct rmig__list tried; // why those before did not do

    struct rmig__dialogue dialogue;

    struct rmig__cursor plan, write; // this pass over the blocks: the planner goes ahead of the writer
    uint64_t pending; // pages in all dirty sets
    uint64_t unstepped; // bytes saved since the engine last ran
    struct { // pin-all: what is registered next
        uint32_t block;
        uint64_t offset;
    } pin;
    struct rmig__clears clears;
    struct rmig__hole hole;

    struct rmig__writes writes;
    struct rmig__flight flight;
    struct rmig__pacer pacer;

    struct rmig__outbox outbox;
    enum rmig__finish finish;

    struct rmig__round round;
    struct rmig__meter meter;
    uint64_t ram; // bytes of all blocks
};

// --- opening and closing

static void rmig__region_deregister(struct rmig_source *s, struct rmig__region *r) {
    for (uint32_t i = 0; i < r->pieces; i++)
        rmig__deregister(&s->ss, &s->regions.piece[r->piece + i], rmig__regions_piece_length(&s->regions, r, i), NULL);
    r->pieces = 0;
}

RMIG__DEF int rmig_source_open(struct rmig_fabric *fabric, const struct rmig_config *cfg, struct rmig_source **out,
                               struct rmig_error *err) {
    if (out == NULL)
        return rmig_fail(err, RMIG_ERR_ARGUMENT, 0, "rmig_source_open: out is NULL");
    int status;
    *out = (struct rmig_source *)rmig__session_new(sizeof **out, fabric, cfg, &status, err);
    return status;
}

RMIG__DEF void rmig_source_close(struct rmig_source *s) {
    if (s == NULL)
        return;
    rmig__session_leave(&s->ss); // before writes under way lose their memory
    for (uint32_t i = 0; i < s->regions.count; i++)
        rmig__region_deregister(s, &s->regions.region[i]);
    rmig__session_close(&s->ss);
    rmig_blocks_free(&s->blocks);
    rmig__release(s->block);
    rmig__release(s->bits);
    rmig__release(s->chunks);
    rmig__release(s->regions.region);
    rmig__release(s->regions.piece);
    rmig__release(s->outbox.bytes);
    RMIG_FREE(s);
}

RMIG__DEF int rmig_source_add_block(struct rmig_source *s, const struct rmig_block_desc *desc, uint32_t *index) {
    if (index != NULL)
        *index = UINT32_MAX;
    if (s == NULL)
        return RMIG_ERR_ARGUMENT;
    if (s->state != RMIG__SOURCE_NEW || s->ss.failed)
        return RMIG__REFUSE(&s->ss, RMIG_ERR_STATE, 0, "rmig_source_add_block: must come before connect");
    return rmig__taint(&s->ss, rmig_blocks_add(&s->blocks, desc, index, &s->ss.error));
}

RMIG__DEF int rmig_source_block_at(struct rmig_source *s, uint64_t guest_offset, uint32_t *block, uint64_t *offset) {
    uint32_t found;
    if (block != NULL)
        *block = UINT32_MAX; // refused by what comes next, where nobody looks
    if (s == NULL)
        return RMIG_ERR_ARGUMENT;
    if (rmig_blocks_by_offset(&s->blocks, guest_offset, &found) != RMIG_OK)
        return RMIG__NO(&s->ss, RMIG_ERR_ARGUMENT, 0, "rmig_source_block_at: no block holds guest offset 0x%llx",
                        (unsigned long long)guest_offset);
    if (block != NULL)
        *block = found;
    if (offset != NULL)
        *offset = guest_offset - s->blocks.block[found].guest_offset;
    return RMIG_OK;
}

/* Everything that grows with the guest is allocated here, once. */
static int rmig__source_tables(struct rmig_source *s) {
    struct rmig__regions *rs = &s->regions;
    uint64_t words = 0, chunks = 0, pieces = (s->chunk_size + rs->piece_bytes - 1) / rs->piece_bytes; // of a chunk
    uint32_t n = s->blocks.count;
    for (uint32_t i = 0; i < n; i++) {
        uint64_t length = s->blocks.block[i].length;
        words += (length / s->page_size + 1) / 64 + 1;
        chunks += rmig_chunk_count(length, s->chunk_size);
    }
    if (chunks >= UINT32_MAX / pieces)
        return RMIG__NO(&s->ss, RMIG_ERR_PARAM, 0, "chunk-size: %llu chunks are too many: raise chunk-size",
                        (unsigned long long)chunks);
    s->block = (struct rmig__source_block *)rmig__calloc(n, sizeof *s->block);
    s->bits = (uint64_t *)rmig__calloc(words, sizeof *s->bits);
    s->chunks = (uint32_t *)rmig__calloc(chunks, sizeof *s->chunks);
    rs->region = (struct rmig__region *)rmig__calloc(chunks, sizeof *rs->region);
    rs->piece = (struct rmig_mr *)rmig__calloc(chunks * pieces, sizeof *rs->piece);
    s->outbox.bytes = (uint8_t *)RMIG_MALLOC(RMIG_PAYLOAD_MAX);
    if (s->block == NULL || s->bits == NULL || s->chunks == NULL || rs->region == NULL || rs->piece == NULL ||
        s->outbox.bytes == NULL)
        return RMIG__NO(&s->ss, RMIG_ERR_NO_MEMORY, 0, "out of memory for the tables of %u blocks, %llu chunks", n,
                        (unsigned long long)chunks);
    rs->capacity = (uint32_t)chunks;
    uint64_t *bits = s->bits;
    uint32_t *chunk = s->chunks;
    for (uint32_t i = 0; i < n; i++) {
        struct rmig__source_block *b = &s->block[i];
        uint64_t length = s->blocks.block[i].length;
        b->dirty.bits = bits;
        b->dirty.pages = length / s->page_size + (length % s->page_size != 0);
        b->chunks.region = chunk;
        b->chunks.count = b->chunks.unregistered = rmig_chunk_count(length, s->chunk_size);
        s->ram += b->dirty.pages * s->page_size;
        bits += (b->dirty.pages + 63) / 64;
        chunk += b->chunks.count;
    }
    return RMIG_OK;
}

static void rmig__source_free_tables(struct rmig_source *s) {
    rmig__release(s->block);
    rmig__release(s->bits);
    rmig__release(s->chunks);
    rmig__release(s->regions.region);
    rmig__release(s->regions.piece);
    rmig__release(s->outbox.bytes);
    s->block = NULL;
    s->bits = NULL;
    s->chunks = NULL;
    s->regions.region = NULL;
    s->regions.piece = NULL;
    s->outbox.bytes = NULL;
}

static void rmig__source_parameters(struct rmig_source *s) {
    const struct rmig_config *cfg = &s->ss.cfg;
    uint64_t ahead = rmig_get(cfg, RMIG_PARAM_REGISTER_AHEAD);
    s->chunk_size = rmig_get(cfg, RMIG_PARAM_CHUNK_SIZE);
    s->page_size = rmig_get(cfg, RMIG_PARAM_PAGE_SIZE);
    s->merge_max = rmig_get(cfg, RMIG_PARAM_MERGE_MAX) / s->page_size * s->page_size;
    s->zero_detect = rmig_get(cfg, RMIG_PARAM_ZERO_DETECT) != 0;
    s->pin_all = rmig_get(cfg, RMIG_PARAM_PIN_ALL) != 0;
    s->regions.chunk_size = s->chunk_size;
    s->regions.piece_bytes = ahead == 0 ? RMIG_CHUNK_SIZE_MAX : RMIG__PIECE_MAX;
    s->windows.max = ahead == 0 ? 1 : 2;
    s->windows.bytes = rmig__max(ahead / 2 / s->chunk_size, 1) * s->chunk_size;
    s->windows.page_size = s->page_size;
}

/* Each address has an equal share of what is left of the time, and of all of it where an embedder that was away, or a
   fabric that was slow to let go of the one before, has left nothing. */
static void rmig__source_attempt(struct rmig_source *s) {
    struct rmig__session *ss = &s->ss;
    uint64_t now = rmig__now(ss);
    uint64_t all = rmig_get(&ss->cfg, RMIG_PARAM_CONNECT_TIMEOUT), until = rmig__after(s->connect_began, all);
    ss->last_progress = s->attempt_began = now;
    s->attempt_until = RMIG_FOREVER;
    if (s->addresses > 1)
        s->attempt_until = now + rmig__max((until > now ? until - now : 0) / (ss->ep->others + 1), all / s->addresses);
}

static int rmig__connect_start(struct rmig_source *s, const char *address) {
    struct rmig__session *ss = &s->ss;
    if (s->state != RMIG__SOURCE_NEW || ss->failed)
        return RMIG__NO(ss, RMIG_ERR_STATE, 0,
                        "rmig_source_connect: this source has been connected before; open another");
    if (s->blocks.count == 0)
        return RMIG__NO(ss, RMIG_ERR_STATE, 0, "rmig_source_connect: add a block first");
    if (address == NULL)
        return RMIG__NO(ss, RMIG_ERR_ARGUMENT, 0, "rmig_source_connect: address is NULL; must be \"HOST:PORT\"");
    rmig__source_parameters(s);
    int status = rmig__source_tables(s);
    if (status == RMIG_OK) {
        struct rmig_ep_config ep;
        ep.write_depth = (uint32_t)rmig_get(&ss->cfg, RMIG_PARAM_WRITE_DEPTH);
        ep.send_depth = RMIG__SENDS;
        ep.recv_depth = RMIG__RECVS;
        ep.connect_timeout_ns = rmig_get(&ss->cfg, RMIG_PARAM_CONNECT_TIMEOUT);
        status = ss->fabric->ops->open(ss->fabric, address, &ep, &ss->ep, &ss->error);
    }
    if (status != RMIG_OK) {
        rmig__source_free_tables(s);
        ss->ep = NULL;
        return status <= RMIG_SESSION_ERRORS ? rmig__session_end(ss) : status;
    }
    s->state = RMIG__SOURCE_CONNECTING;
    s->op = RMIG__OP_CONNECT;
    s->connect_began = rmig__now(ss);
    s->addresses = ss->ep->others + 1;
    rmig__list_begin(&s->tried, "; ", sizeof s->tried.text, s->addresses);
    rmig__source_attempt(s);
    rmig__trace(ss, "connect %s", address);
    return RMIG_OK;
}

RMIG__DEF int rmig_source_connect_start(struct rmig_source *s, const char *address) {
    if (s == NULL)
        return RMIG_ERR_ARGUMENT;
    s->refused = rmig__connect_start(s, address);
    return s->refused;
}

// --- connecting

/* Why the address at hand did not do goes to what was tried before. */
static void rmig__source_note_tried(struct rmig_source *s) {
    struct rmig__session *ss = &s->ss;
    char address[RMIG__ADDRESS_MAX], text[RMIG__ADDRESS_MAX + 2 + sizeof ss->link.text];
    bool named = s->addresses == 1 || ss->fabric->ops->address(ss->ep, address, sizeof address, NULL) != RMIG_OK ||
                 strstr(ss->link.text, address) != NULL;
    snprintf(text, sizeof text, "%s%s%s", named ? "" : address, named ? "" : ": ", ss->link.text);
    rmig__list_add(&s->tried, text);
    s->rejected = s->rejected || ss->link.state == RMIG__LINK_REJECTED;
}

/* The address at hand cannot be connected to: goes on with the next, or ends the session with what stands against each
   of them. status: what the last one's failure is. */
static int rmig__source_next(struct rmig_source *s, int status) {
    struct rmig__session *ss = &s->ss;
    rmig__source_note_tried(s);
    if (ss->ep->others == 0)
        return RMIG__END(ss, s->rejected ? RMIG_ERR_REFUSED : status, ss->link.code, "%s", s->tried.text);
    rmig__trace(ss, "next address: %s", ss->link.text);
    rmig__control_deregister(ss);
    ss->fabric->ops->next(ss->ep);
    ss->link.state = RMIG__LINK_OPENING;
    s->connect_posted = false;
    ss->again = s->other_fds = true;
    rmig__source_attempt(s);
    return RMIG_OK;
}

/* Longest registration that suits both ends, in whole chunks. */
static void rmig__source_longest(struct rmig_source *s) {
    uint64_t both = rmig__min(s->ss.caps.registration_max, s->ss.peer_registration_max);
    both = rmig__min(both, RMIG_CHUNK_SIZE_MAX); // bounds what one call may take; some adapters count 32 bits
    s->windows.longest = rmig__max(both / s->chunk_size, 1) * s->chunk_size;
}

static int rmig__source_connect_step(struct rmig_source *s) {
    struct rmig__session *ss = &s->ss;
    if (ss->link.state == RMIG__LINK_UNREACHED_HERE)
        return RMIG__END(ss, RMIG_ERR_FABRIC, ss->link.code, "%s", ss->link.text);
    if (!rmig__link_was_up(&ss->link) && rmig__link_is_down(&ss->link))
        return rmig__source_next(s, RMIG_ERR_UNREACHABLE);
    if (ss->link.state == RMIG__LINK_RESOLVED && !s->connect_posted) {
        int status = rmig__session_setup(ss);
        if (status != RMIG_OK)
            return status;
        uint64_t ahead = rmig_get(&ss->cfg, RMIG_PARAM_REGISTER_AHEAD);
        status = rmig__check_lockable(ss, &s->blocks, s->pin_all ? UINT64_MAX : rmig__after(s->chunk_size, ahead));
        if (status != RMIG_OK)
            return status;
        struct rmig_private_data data;
        data.version = RMIG_PROTOCOL_VERSION;
        data.flags =
            (s->pin_all ? RMIG_FLAG_PIN_ALL : 0) | (rmig_get(&ss->cfg, RMIG_PARAM_EXTENSION) ? RMIG_FLAG_EXTENSION : 0);
        uint8_t bytes[RMIG_PRIVATE_DATA_SIZE];
        rmig_encode_private_data(bytes, sizeof bytes, &data);
        if (ss->fabric->ops->connect(ss->ep, bytes, sizeof bytes, &ss->error) != RMIG_OK)
            return rmig__session_end(ss);
        s->connect_posted = true;
        uint64_t now = rmig__now(ss);
        if (now >= s->attempt_until) // nobody called process meanwhile: its time begins here
            s->attempt_until = now + rmig_get(&ss->cfg, RMIG_PARAM_CONNECT_TIMEOUT) / s->addresses;
    }
    if (!rmig__link_was_up(&ss->link))
        return RMIG_OK;
    if (ss->peer_data_short)
        return RMIG__END(ss, RMIG_ERR_PROTOCOL, 0, "the sink's private data is short; must be %d bytes",
                         RMIG_PRIVATE_DATA_SIZE);
    if (ss->caps.write_max < s->page_size)
        return RMIG__END(ss, RMIG_ERR_SETUP, 0, "fabric %s: its longest write of %llu bytes is below page-size %llu",
                         ss->fabric->ops->name, (unsigned long long)ss->caps.write_max,
                         (unsigned long long)s->page_size);
    if (ss->caps.local_mr && ss->caps.registration_max < s->chunk_size)
        return RMIG__END(ss, RMIG_ERR_SETUP, 0,
                         "fabric %s: registers at most %llu bytes at once: use a smaller chunk-size than %llu",
                         ss->fabric->ops->name, (unsigned long long)ss->caps.registration_max,
                         (unsigned long long)s->chunk_size);
    bool offered = rmig_get(&ss->cfg, RMIG_PARAM_EXTENSION) != 0;
    ss->extended = offered && (ss->peer.flags & RMIG_FLAG_EXTENSION) != 0;
    if (!ss->extended)
        s->pin_all = s->pin_all && (ss->peer.flags & RMIG_FLAG_PIN_ALL) != 0;
    s->writes.depth = rmig__min(rmig_get(&ss->cfg, RMIG_PARAM_WRITE_DEPTH), ss->caps.write_depth);
    s->writes.signal_every = ss->caps.writes_in_order ? rmig_get(&ss->cfg, RMIG_PARAM_SIGNAL_EVERY) : 1;
    s->outbox.limit = RMIG_STREAM_MESSAGE_MAX;
    s->windows.version_1 = !ss->extended;
    s->windows.regions = 1;
    ss->peer_registration_max = UINT64_MAX;
    rmig__source_longest(s);
    s->state = RMIG__SOURCE_UP;
    if (!ss->extended)
        s->op = RMIG__OP_NONE;
    rmig__trace(ss, "connected, %s", ss->extended ? "extended" : "version 1");
    return RMIG_OK;
}

// --- what arrives

static int rmig__source_on_hello_result(struct rmig_source *s, const uint8_t *p, uint32_t len) {
    struct rmig__session *ss = &s->ss;
    struct rmig_hello h;
    if (rmig_decode_hello(p, len, &h) < 0)
        return RMIG__END(ss, RMIG_ERR_PROTOCOL, 0, "the sink's HELLO_RESULT of %u bytes is malformed", len);
    if (h.status != 0)
        return RMIG__END(ss, RMIG_ERR_REFUSED, 0, "the sink refused: %s", h.reason);
    if (h.chunk_size != s->chunk_size)
        return RMIG__END(ss, RMIG_ERR_PROTOCOL, 0, "the sink answered chunk-size %llu to %llu",
                         (unsigned long long)h.chunk_size, (unsigned long long)s->chunk_size);
    char why[120];
    if (!rmig__take_limits(ss, &h, s->chunk_size, why, sizeof why))
        return RMIG__END(ss, RMIG_ERR_SETUP, 0, "the sink's limits: %s", why);
    s->outbox.limit = (size_t)ss->peer_payload_max;
    if (s->windows.max > 1)
        s->windows.regions = rmig__min(ss->peer_batch_max, ss->peer_payload_max / RMIG_BATCH_SIZE);
    rmig__source_longest(s);
    if (s->op == RMIG__OP_CONNECT)
        s->op = RMIG__OP_NONE;
    return RMIG_OK;
}

static void rmig__source_blocks_agreed(struct rmig_source *s) {
    s->exchange = RMIG__BLOCKS_DONE;
    s->ss.stats.setup_ns = rmig__now(&s->ss) - s->connect_began;
}

/* All of it is registered at this end, as far as it must be. */
static bool rmig__region_local(const struct rmig_source *s, const struct rmig__region *r) {
    return !s->ss.caps.local_mr || r->pieces * s->regions.piece_bytes >= r->length;
}

/* Registers the next piece of a region at this end; one region is done before the next begins. */
static int rmig__piece_register(struct rmig_source *s, struct rmig__region *r) {
    uint64_t began = rmig__now(&s->ss);
    struct rmig__regions *rs = &s->regions;
    r->piece = r->pieces == 0 ? rs->piece_count : r->piece;
    int status = rmig__register(&s->ss, &s->blocks.block[r->block], r->offset + r->pieces * rs->piece_bytes,
                                rmig__regions_piece_length(rs, r, r->pieces), RMIG_ACCESS_LOCAL_READ,
                                &rs->piece[rs->piece_count], "");
    if (status != RMIG_OK)
        return status;
    rs->piece_count++;
    r->pieces++;
    uint64_t took = rmig__now(&s->ss) - began;
    rmig__flight_away(&s->flight, took + took / 8);
    return RMIG_OK;
}

/* Version 1, pin-all: the reply has the keys of whole blocks; all regions are one window, used up as soon as this end
   has registered them too. */
static int rmig__source_pin_v1(struct rmig_source *s, uint32_t i, const struct rmig_ram_block *remote) {
    uint64_t length = s->blocks.block[i].length;
    struct rmig__regions *rs = &s->regions;
    if (remote->rkey == 0)
        return RMIG__END(&s->ss, RMIG_ERR_PROTOCOL, 0, "the sink granted pin-all but sent rkey 0 for block \"%.60s\"",
                         s->blocks.block[i].name);
    for (uint64_t at = 0; at < length;) {
        struct rmig__region *r = rmig__regions_add(rs, i, at, rmig__min(length - at, s->windows.longest));
        r->key = remote->rkey;
        r->address = remote->base + at;
        rmig__regions_claim(rs, &s->block[i].chunks, r, at);
        at += r->length;
    }
    s->windows.count = 1;
    s->windows.window[0].state = RMIG__WINDOW_ANSWERED;
    s->windows.window[0].count = rs->count;
    return RMIG_OK;
}

static int rmig__source_on_ram_blocks(struct rmig_source *s, const uint8_t *p, uint32_t len) {
    struct rmig__session *ss = &s->ss;
    if (len % RMIG_RAM_BLOCK_SIZE != 0 || len / RMIG_RAM_BLOCK_SIZE < s->blocks.count)
        return RMIG__END(ss, RMIG_ERR_PROTOCOL, 0,
                         "the sink's RAM_BLOCKS_RESULT has %u bytes; must be a multiple of %d for at least %u blocks",
                         len, RMIG_RAM_BLOCK_SIZE, s->blocks.count);
    for (uint32_t i = 0; i < s->blocks.count; i++) {
        struct rmig_ram_block remote;
        rmig_decode_ram_block(p + (size_t)i * RMIG_RAM_BLOCK_SIZE, RMIG_RAM_BLOCK_SIZE, &remote);
        const struct rmig_block *b = &s->blocks.block[i];
        if (remote.length != b->length)
            return RMIG__END(ss, RMIG_ERR_SETUP, 0, "block %u \"%.60s\" has %llu bytes here and %llu at the sink", i,
                             b->name, (unsigned long long)b->length, (unsigned long long)remote.length);
        s->block[i].sink_offset = remote.offset;
        int status = s->pin_all ? rmig__source_pin_v1(s, i, &remote) : RMIG_OK;
        if (status != RMIG_OK)
            return status;
    }
    s->pin.block = s->blocks.count;
    rmig__source_blocks_agreed(s);
    return RMIG_OK;
}

static int rmig__source_on_register_result(struct rmig_source *s, const uint8_t *p, uint32_t len) {
    struct rmig_register_result result;
    struct rmig__window *w = rmig__windows_find(&s->windows, RMIG__WINDOW_REQUESTED);
    RMIG_ASSERT(w != NULL); // a registration reply is awaited only then
    struct rmig__region *r = &s->regions.region[w->first];
    if (len != RMIG_REGISTER_RESULT_SIZE || rmig_decode_register_result(p, len, &result) < 0 || result.rkey == 0)
        return RMIG__END(&s->ss, RMIG_ERR_PROTOCOL, 0,
                         "the sink's REGISTER_RESULT of %u bytes has no key; must be %d bytes and an rkey other than 0",
                         len, RMIG_REGISTER_RESULT_SIZE);
    r->key = result.rkey;
    r->address = result.base + r->offset;
    w->state = RMIG__WINDOW_ANSWERED;
    return RMIG_OK;
}

static int rmig__source_on_batch_result(struct rmig_source *s, const uint8_t *p, const struct rmig_header *h) {
    struct rmig__window *w = rmig__windows_find(&s->windows, RMIG__WINDOW_REQUESTED);
    RMIG_ASSERT(w != NULL);
    if (h->repeat != w->count || h->len != w->count * RMIG_BATCH_RESULT_SIZE)
        return RMIG__END(&s->ss, RMIG_ERR_PROTOCOL, 0,
                         "the sink's REGISTER_BATCH_RESULT has %u results in %u bytes; must be %u in %u", h->repeat,
                         h->len, w->count, w->count * RMIG_BATCH_RESULT_SIZE);
    for (uint32_t i = 0; i < w->count; i++) {
        struct rmig_batch_result result;
        rmig_decode_batch_result(p + (size_t)i * RMIG_BATCH_RESULT_SIZE, RMIG_BATCH_RESULT_SIZE, &result);
        if (result.key == 0)
            return RMIG__END(&s->ss, RMIG_ERR_PROTOCOL, 0, "the sink's REGISTER_BATCH_RESULT has key 0 as result %u",
                             i);
        s->regions.region[w->first + i].key = result.key;
        s->regions.region[w->first + i].address = result.address;
    }
    w->state = RMIG__WINDOW_ANSWERED;
    return RMIG_OK;
}

static int rmig__source_on_reply(struct rmig_source *s, const uint8_t *p, const struct rmig_header *h) {
    uint64_t rtt = rmig__dialogue_reply(&s->dialogue, rmig__now(&s->ss));
    if (s->ss.stats.message_rtt_ns == 0 || rtt < s->ss.stats.message_rtt_ns)
        s->ss.stats.message_rtt_ns = rtt;
    switch (h->type) {
    case RMIG_MSG_HELLO_RESULT:
        return rmig__source_on_hello_result(s, p, h->len);
    case RMIG_MSG_RAM_BLOCKS_RESULT:
        return rmig__source_on_ram_blocks(s, p, h->len);
    case RMIG_MSG_BLOCKS_RESULT:
        if (h->len != 4 || rmig__get_be32(p) != 0)
            return RMIG__END(&s->ss, RMIG_ERR_PROTOCOL, 0,
                             "the sink's BLOCKS_RESULT has %u bytes; must be 4, with value 0", h->len);
        rmig__source_blocks_agreed(s);
        if (!s->pin_all)
            s->pin.block = s->blocks.count;
        return RMIG_OK;
    case RMIG_MSG_REGISTER_RESULT:
        return rmig__source_on_register_result(s, p, h->len);
    case RMIG_MSG_REGISTER_BATCH_RESULT:
        return rmig__source_on_batch_result(s, p, h);
    default: // FINISH_RESULT, the only one left that is ever awaited
        if (h->len != 0)
            return RMIG__END(&s->ss, RMIG_ERR_PROTOCOL, 0, "the sink's FINISH_RESULT has %u bytes; must be empty",
                             h->len);
        s->finish = RMIG__FINISH_ANSWERED;
        return RMIG_OK;
    }
}

static int rmig__source_on_message(struct rmig_source *s, const struct rmig__received *r) {
    const struct rmig_header *h = &r->header;
    if (h->type == RMIG_MSG_ERROR)
        return rmig__peer_error(&s->ss, "sink", r);
    if (h->type == RMIG_MSG_READY && h->len == 0 && rmig__dialogue_ready(&s->dialogue)) {
        rmig__clears_done(&s->clears);
        return RMIG_OK;
    }
    if (h->type == RMIG_MSG_FINISH_PENDING && h->len == 0 && s->dialogue.await == RMIG_MSG_FINISH_RESULT)
        return RMIG_OK; // its coming is what counts
    if (s->dialogue.await != 0 && h->type == s->dialogue.await)
        return rmig__source_on_reply(s, rmig__control_buffer(&s->ss, r->buffer) + RMIG_HEADER_SIZE, h);
    return RMIG__END(&s->ss, RMIG_ERR_PROTOCOL, 0, "the sink sent %s (type %u, len %u) where %s was due",
                     rmig_message_name(h->type), h->type, h->len, rmig__dialogue_due(&s->dialogue));
}

static int rmig__source_inbox(struct rmig_source *s) {
    while (s->ss.inbox_count > 0) {
        int status = rmig__source_on_message(s, &s->ss.inbox[0]);
        if (status != RMIG_OK)
            return status;
        rmig__inbox_pop(&s->ss);
    }
    return RMIG_OK;
}

// --- planning: which chunks need keys, and what is zero

static uint64_t rmig__pages_offset(const struct rmig_source *s, uint32_t block, uint64_t page) {
    return rmig__min(page * s->page_size, s->blocks.block[block].length);
}

static void rmig__take_pages(struct rmig_source *s, uint32_t block, uint64_t page, uint64_t n) {
    rmig_merge_take(&s->block[block].dirty, page, n);
    s->pending -= n;
}

/* The unit in which a REGISTER_REQUEST counts: what the peer calls a chunk, as far as is known. */
static uint64_t rmig__request_unit(const struct rmig_source *s) {
    uint64_t peer = rmig_get(&s->ss.cfg, RMIG_PARAM_PEER_CHUNK_SIZE);
    return peer != 0 ? peer : RMIG_CHUNK_SIZE_MIN;
}

/* Sends the dirty pages [page, page + n), all in one chunk that has no region, to the clears or gets the chunk a
   region. Moves the planner on. False: no room for now. */
static bool rmig__plan_range(struct rmig_source *s, struct rmig__window *w, uint64_t page, uint64_t n,
                             uint64_t *budget) {
    uint32_t block = s->plan.block;
    uint64_t from = page * s->page_size, to = rmig__pages_offset(s, block, page + n);
    bool look = s->zero_detect && s->blocks.block[block].backing != RMIG_BACKING_DMABUF;
    while (look && from < to) {
        uint64_t stop = rmig__min(to, from / RMIG__ZERO_TEST * RMIG__ZERO_TEST + RMIG__ZERO_TEST);
        uint64_t scanned = 0;
        bool zero = rmig__hole_or_zero(&s->hole, &s->ss.holes, &s->blocks.block[block], block, s->page_size, from, stop,
                                       &scanned);
        *budget -= rmig__min(*budget, scanned + s->page_size);
        if (!zero)
            break;
        if (!rmig__clears_add(&s->clears, s->ss.extended ? RMIG__CLEAR_RUNS : 1, block, from, stop - from,
                              s->page_size))
            return false;
        uint64_t pages = (stop - from + s->page_size - 1) / s->page_size;
        rmig__take_pages(s, block, from / s->page_size, pages);
        s->ss.stats.pages_zero += pages;
        s->ss.stats.bytes_zero += stop - from;
        s->ss.stats.round_bytes += stop - from;
        from = stop;
        s->plan.page = (from + s->page_size - 1) / s->page_size;
        if (*budget == 0)
            return true;
    }
    if (from >= to)
        return true;
    if (!rmig__windows_add(&s->windows, w, &s->regions, &s->block[block].chunks, block, from,
                           s->blocks.block[block].length))
        return false;
    uint64_t chunk_pages = s->chunk_size / s->page_size;
    s->plan.page = (page / chunk_pages + 1) * chunk_pages;
    return true;
}

/* Walks the dirty pages ahead of the writer until the window is full, the budget spent or the blocks at an end. */
static void rmig__plan_walk(struct rmig_source *s, struct rmig__window *w, uint64_t *budget) {
    uint64_t chunk_pages = s->chunk_size / s->page_size;
    while (s->plan.block<s->blocks.count && * budget> 0) {
        struct rmig__source_block *b = &s->block[s->plan.block];
        uint64_t page, n;
        if (b->dirty.pending == 0 || b->chunks.unregistered == 0 ||
            !rmig_merge_next(&b->dirty, s->plan.page, b->dirty.pages, chunk_pages, &page, &n)) {
            s->plan.block++;
            s->plan.page = 0;
            continue;
        }
        uint64_t chunk_end = (page / chunk_pages + 1) * chunk_pages;
        if (rmig__regions_of(&s->regions, &b->chunks, page / chunk_pages) != NULL) {
            s->plan.page = chunk_end;
            continue;
        }
        s->plan.page = page;
        if (!rmig__plan_range(s, w, page, rmig__min(n, chunk_end - page), budget))
            return;
    }
}

/* Pin-all: the next window is whole blocks. */
static void rmig__plan_pin(struct rmig_source *s, struct rmig__window *w) {
    const struct rmig__windows *ws = &s->windows;
    while (s->pin.block < s->blocks.count && w->count < ws->regions && w->bytes < ws->bytes) {
        uint64_t length = s->blocks.block[s->pin.block].length;
        struct rmig__region *r =
            rmig__regions_add(&s->regions, s->pin.block, s->pin.offset, rmig__min(length - s->pin.offset, ws->longest));
        rmig__regions_claim(&s->regions, &s->block[s->pin.block].chunks, r, r->offset);
        w->count++;
        w->bytes += r->length;
        s->pin.offset += r->length;
        if (s->pin.offset == length) {
            s->pin.block++;
            s->pin.offset = 0;
        }
    }
    memset(&w->end, 0, sizeof w->end); // used up as soon as it is ready: the writer has not begun
}

static bool rmig__pinned(const struct rmig_source *s) { return s->pin.block >= s->blocks.count; }

/* Opens, fills and closes windows. True if something changed. */
static bool rmig__plan(struct rmig_source *s) {
    if (s->exchange != RMIG__BLOCKS_DONE || s->outbox.first || s->clears.fence)
        return false;
    bool nothing = rmig__pinned(s) && (s->pending == 0 || s->plan.block >= s->blocks.count);
    struct rmig__window *w = rmig__windows_find(&s->windows, RMIG__WINDOW_OPEN);
    if (w == NULL && !nothing)
        w = rmig__windows_open(&s->windows, s->regions.count);
    if (w == NULL)
        return false;
    struct rmig__cursor before = s->plan;
    uint64_t budget = RMIG__STEP_SCAN;
    if (!rmig__pinned(s))
        rmig__plan_pin(s, w);
    else
        rmig__plan_walk(s, w, &budget);
    if (budget == 0 && s->pending > 0) { // the window stays open, to be filled further after a look at the wire
        s->ss.again = true;
        return rmig__cursor_before(before, s->plan);
    }
    if (w->count > 0)
        w->state = RMIG__WINDOW_CLOSED;
    else
        s->windows.count--;
    return w->count > 0 || rmig__cursor_before(before, s->plan);
}

// --- messages out

static int rmig__ask(struct rmig_source *s, enum rmig_message type, uint32_t repeat, size_t len,
                     enum rmig_message reply) {
    rmig__dialogue_ask(&s->dialogue, reply, rmig__now(&s->ss));
    return rmig__send(&s->ss, type, repeat, len);
}

static int rmig__say_hello(struct rmig_source *s, uint8_t *payload) {
    struct rmig_hello h;
    rmig__fill_hello(&s->ss, &h);
    h.idle_max = rmig__min(h.idle_max, rmig_get(&s->ss.cfg, RMIG_PARAM_HANDOVER_TIMEOUT));
    s->hello_sent = true;
    return rmig__ask(s, RMIG_MSG_HELLO, 1, (size_t)rmig_encode_hello(payload, RMIG_PAYLOAD_MAX, &h),
                     RMIG_MSG_HELLO_RESULT);
}

/* Names and lengths of as many blocks as fit a message; the answer comes after the last. */
static int rmig__say_blocks(struct rmig_source *s, uint8_t *payload) {
    if (!s->ss.extended)
        return rmig__ask(s, RMIG_MSG_RAM_BLOCKS_REQUEST, 1, 0, RMIG_MSG_RAM_BLOCKS_RESULT);
    size_t len = 8, cap = (size_t)s->ss.peer_payload_max;
    uint32_t first = s->blocks_sent;
    rmig__put_be32(payload, s->blocks.count);
    rmig__put_be32(payload + 4, first);
    while (s->blocks_sent < s->blocks.count && s->blocks_sent - first < RMIG_REPEAT_MAX) {
        const struct rmig_block *b = &s->blocks.block[s->blocks_sent];
        struct rmig_block_entry entry;
        entry.length = b->length;
        entry.guest_offset = b->guest_offset;
        memcpy(entry.name, b->name, strlen(b->name) + 1);
        int n = rmig_encode_block_entry(payload + len, cap - len, &entry);
        if (n < 0)
            break;
        len += (size_t)n;
        s->blocks_sent++;
    }
    return rmig__ask(s, RMIG_MSG_BLOCKS, s->blocks_sent - first, len,
                     s->blocks_sent == s->blocks.count ? RMIG_MSG_BLOCKS_RESULT : RMIG_MSG_NONE);
}

static int rmig__say_register(struct rmig_source *s, struct rmig__window *w, uint8_t *payload) {
    w->state = RMIG__WINDOW_REQUESTED;
    if (!s->ss.extended) {
        const struct rmig__region *r = &s->regions.region[w->first];
        struct rmig_register request;
        request.key = s->block[r->block].sink_offset + r->offset;
        request.block = r->block;
        uint64_t unit = rmig__request_unit(s);
        request.chunks = (r->offset + r->length - 1) / unit - r->offset / unit;
        return rmig__ask(s, RMIG_MSG_REGISTER_REQUEST, 1,
                         (size_t)rmig_encode_register(payload, RMIG_PAYLOAD_MAX, &request), RMIG_MSG_REGISTER_RESULT);
    }
    for (uint32_t i = 0; i < w->count; i++) {
        const struct rmig__region *r = &s->regions.region[w->first + i];
        struct rmig_batch entry;
        entry.block = r->block;
        entry.offset = r->offset;
        entry.length = r->length;
        rmig_encode_batch(payload + (size_t)i * RMIG_BATCH_SIZE, RMIG_BATCH_SIZE, &entry);
    }
    return rmig__ask(s, RMIG_MSG_REGISTER_BATCH, w->count, (size_t)w->count * RMIG_BATCH_SIZE,
                     RMIG_MSG_REGISTER_BATCH_RESULT);
}

static int rmig__say_clears(struct rmig_source *s, uint8_t *payload) {
    uint64_t fits = s->ss.extended ? rmig__min(s->ss.peer_batch_max, s->ss.peer_payload_max / RMIG_COMPRESS_SIZE) : 1;
    uint32_t n = (uint32_t)rmig__min(fits, s->clears.count);
    for (uint32_t i = 0; i < n; i++) {
        struct rmig_compress run = s->clears.run[i];
        run.start += s->block[run.block].sink_offset;
        rmig_encode_compress(payload + (size_t)i * RMIG_COMPRESS_SIZE, RMIG_COMPRESS_SIZE, &run);
    }
    rmig__clears_send(&s->clears, n);
    return rmig__ask(s, s->ss.extended ? RMIG_MSG_CLEAR_BATCH : RMIG_MSG_COMPRESS, n, (size_t)n * RMIG_COMPRESS_SIZE,
                     RMIG_MSG_NONE);
}

/* Version 1 has no answer to finish: once the last bytes have left, nobody here can know. */
static void rmig__last_bytes(struct rmig_source *s) {
    if (s->op == RMIG__OP_FINISH && s->outbox.fill == 0 && !s->ss.extended)
        s->ss.owner = RMIG__OWNER_OPEN_V1;
}

static int rmig__say_stream(struct rmig_source *s, uint8_t *payload) {
    size_t n = rmig__outbox_take(&s->outbox, payload);
    s->ss.stats.stream_bytes += n;
    rmig__last_bytes(s);
    return rmig__ask(s, RMIG_MSG_QEMU_FILE, 0, n, RMIG_MSG_NONE);
}

static bool rmig__drained(const struct rmig_source *s) {
    return s->writes.queued == 0 && s->ss.writes_done == s->ss.stats.writes_posted;
}

/* All that was saved is in the sink's memory. */
static bool rmig__settled(const struct rmig_source *s) {
    return s->pending == 0 && s->clears.count == 0 && s->windows.count == 0 && rmig__drained(s);
}

/* Bytes written and not known to have arrived. */
static uint64_t rmig__outstanding(const struct rmig_source *s) {
    return rmig__drained(s) ? 0 : s->flight.bytes - s->flight.done;
}

/* Bytes that are known to have arrived. */
static uint64_t rmig__arrived(const struct rmig_source *s) { return s->flight.bytes - rmig__outstanding(s); }

static void rmig__source_meter_look(struct rmig_source *s) {
    uint64_t now = rmig__now(&s->ss);
    bool busy = rmig__outstanding(s) > 0 || s->windows.count > 0 || now < s->pacer.until;
    rmig__meter_look(&s->meter, now, rmig__arrived(s), s->ss.stats.bytes_zero, busy, rmig__settled(s));
}

/* A page that leaves before the pacer holds back the next is no rate. */
static uint64_t rmig__source_rate(const struct rmig_source *s, const struct rmig__meter_mark *since, bool over) {
    uint64_t limit = rmig_get(&s->ss.cfg, RMIG_PARAM_MAX_BANDWIDTH);
    uint64_t rate = rmig__meter_rate(&s->meter, since, rmig__arrived(s), over && s->ss.stats.throughput == 0);
    return limit != 0 ? rmig__min(rate, limit) : rate;
}

static int rmig__round_over(struct rmig_source *s) {
    struct rmig_stats *st = &s->ss.stats;
    st->rounds++;
    st->round_ns = rmig__now(&s->ss) - s->round.began;
    rmig__source_meter_look(s);
    uint64_t rate = rmig__source_rate(s, &s->meter.begin, true);
    st->throughput = rate != 0 ? rate : st->throughput;
    s->round.open = false;
    rmig__trace(&s->ss, "round %llu over, %llu bytes", (unsigned long long)st->rounds,
                (unsigned long long)st->round_bytes);
    return rmig__ask(s, RMIG_MSG_REGISTER_FINISHED, 1, 0, RMIG_MSG_NONE);
}

static bool rmig__stream_due(const struct rmig_source *s) {
    return rmig__outbox_due(&s->outbox, s->op == RMIG__OP_END_ROUND || s->op == RMIG__OP_FINISH);
}

static bool rmig__source_clears_due(struct rmig_source *s) {
    /* Not while the planner may still lengthen the last run. */
    bool open = rmig__windows_find(&s->windows, RMIG__WINDOW_OPEN) != NULL;
    return s->clears.count > 0 && (!open || s->clears.fence);
}

/* When a KEEPALIVE is due, which takes a credit. */
static uint64_t rmig__source_keepalive_at(const struct rmig_source *s) {
    return s->dialogue.credit ? rmig__idle_at(&s->ss) : RMIG_FOREVER;
}

/* At most one message goes out for a READY. Why the cases stand in this order: HELLO opens an extended session, and
   GOODBYE ends one, and neither needs a READY. Stream bytes from before the round go before anything of it, and what is
   put later goes when all that was saved has arrived. Blocks are agreed on before keys are asked for. Keys go before
   clears, because the sink registers while this end writes; but behind the fence only clears help, since it is their
   READY that takes it down. A round ends when nothing is left, and the guest is handed over after that. */
static int rmig__control_out(struct rmig_source *s, bool *moved) {
    uint8_t *payload = rmig__payload(&s->ss);
    if (s->state != RMIG__SOURCE_UP || payload == NULL)
        return RMIG_OK;
    uint64_t before = s->ss.stats.control_sent;
    int status = RMIG_OK;
    struct rmig__window *w;
    if (s->ss.extended && !s->hello_sent)
        status = rmig__say_hello(s, payload);
    else if (s->finish == RMIG__FINISH_ANSWERED) {
        s->finish = RMIG__FINISH_SAID;
        status = rmig__send(&s->ss, RMIG_MSG_GOODBYE, 1, 0);
    } else if (!rmig__dialogue_may_ask(&s->dialogue))
        return RMIG_OK;
    else if (s->outbox.first || (rmig__settled(s) && rmig__stream_due(s)))
        status = rmig__say_stream(s, payload);
    else if (s->exchange == RMIG__BLOCKS_SENDING)
        status = rmig__say_blocks(s, payload);
    else if ((w = rmig__windows_find(&s->windows, RMIG__WINDOW_CLOSED)) != NULL && !s->clears.fence)
        status = rmig__say_register(s, w, payload);
    else if (rmig__source_clears_due(s))
        status = rmig__say_clears(s, payload);
    else if (rmig__settled(s) && s->op == RMIG__OP_END_ROUND && s->round.open && rmig__pinned(s))
        status = rmig__round_over(s);
    else if (s->op == RMIG__OP_FINISH && rmig__settled(s) && s->ss.extended && s->finish == RMIG__FINISH_NONE) {
        s->finish = RMIG__FINISH_ASKED;
        status = rmig__ask(s, RMIG_MSG_FINISH, 1, 0, RMIG_MSG_FINISH_RESULT);
    }
    if (status == RMIG_OK && s->ss.stats.control_sent == before && rmig__now(&s->ss) >= rmig__source_keepalive_at(s))
        status = rmig__ask(s, RMIG_MSG_KEEPALIVE, 1, 0, RMIG_MSG_NONE);
    *moved = *moved || s->ss.stats.control_sent != before;
    return status;
}

// --- writes out

static uint64_t rmig__pace(struct rmig_source *s) {
    uint64_t rate = rmig_get(&s->ss.cfg, RMIG_PARAM_MAX_BANDWIDTH);
    return rate == 0 ? UINT64_MAX : rmig__pacer_allows(&s->pacer, rate, s->page_size, rmig__now(&s->ss));
}

/* Posts what is prepared; what the fabric does not take stays. */
static int rmig__post_writes(struct rmig_source *s, bool *moved) {
    struct rmig__session *ss = &s->ss;
    if (s->writes.queued == 0)
        return RMIG_OK;
    rmig__writes_seal(&s->writes);
    const struct rmig_write *queue = s->writes.queue;
    int taken = ss->fabric->ops->write(ss->ep, queue, s->writes.queued, &ss->error);
    if (taken < 0) {
        rmig__session_lost(ss, &ss->error);
        return rmig__session_end(ss);
    }
    RMIG_ASSERT((unsigned)taken <= s->writes.queued);
    if (ss->writes_done == ss->stats.writes_posted)
        ss->last_progress = rmig__now(ss);
    for (int i = 0; i < taken; i++) {
        ss->stats.writes_signalled += queue[i].signal;
        rmig__trace(ss, "write %llu bytes to 0x%llx", (unsigned long long)queue[i].length,
                    (unsigned long long)queue[i].remote_address);
    }
    ss->stats.writes_posted += (uint64_t)taken;
    rmig__writes_posted(&s->writes, (unsigned)taken);
    *moved = *moved || taken > 0;
    return RMIG_OK;
}

/* Bytes that may be outstanding: completions are what this end waits for, messages what the peer does. */
static uint64_t rmig__outstanding_max(const struct rmig_source *s) {
    uint64_t own = rmig_get(&s->ss.cfg, RMIG_PARAM_IO_TIMEOUT);
    uint64_t idle = s->ss.peer_idle_max != 0 ? rmig__min(s->ss.peer_idle_max, own) : own;
    return rmig__flight_limit(&s->flight, idle, s->ss.stats.message_rtt_ns);
}

static void rmig__queue_write(struct rmig_source *s, const struct rmig__region *r, uint64_t offset, uint64_t length,
                              uint64_t stride) {
    struct rmig__flight *f = &s->flight;
    struct rmig_write *w = rmig__writes_add(&s->writes, length, stride);
    uint64_t number = s->ss.stats.writes_posted + s->writes.queued;
    w->local = s->blocks.block[r->block].host + offset;
    w->mr = r->pieces > 0 ? &s->regions.piece[r->piece + (offset - r->offset) / s->regions.piece_bytes] : NULL;
    w->remote_address = r->address + (offset - r->offset);
    w->key = r->key;
    w->id = RMIG__ID_WRITE | number;
    if (f->bytes == f->done)
        f->since = rmig__now(&s->ss);
    f->bytes += length;
    if (w->signal)
        rmig__flight_mark(f, number, stride);
}

/* The next extent behind the planner that has a ready region: prepares one write. False: none now. */
static bool rmig__next_write(struct rmig_source *s, uint64_t allowed, uint64_t stride) {
    uint64_t chunk_pages = s->chunk_size / s->page_size;
    uint64_t most = rmig__min(rmig__min(s->merge_max, stride), s->ss.caps.write_max);
    most = rmig__max(rmig__min(most, allowed) / s->page_size, 1);
    while (rmig__cursor_before(s->write, s->plan)) {
        uint32_t block = s->write.block;
        struct rmig__source_block *b = &s->block[block];
        uint64_t to = block == s->plan.block ? rmig__min(s->plan.page, b->dirty.pages) : b->dirty.pages;
        uint64_t page, n;
        if (b->dirty.pending == 0 || !rmig_merge_next(&b->dirty, s->write.page, to, most, &page, &n)) {
            if (block == s->plan.block) {
                s->write = s->plan;
            } else {
                s->write.block++;
                s->write.page = 0;
            }
            continue;
        }
        uint64_t chunk_end = (page / chunk_pages + 1) * chunk_pages;
        const struct rmig__region *r = rmig__regions_of(&s->regions, &b->chunks, page / chunk_pages);
        if (r == NULL) { // saved after the planner had passed: the next pass takes it
            s->write.page = chunk_end;
            continue;
        }
        s->write.page = page;
        if (!r->ready)
            return false;
        uint64_t offset = page * s->page_size, into = offset - r->offset;
        uint64_t end = s->pin_all ? (r->offset + r->length + s->page_size - 1) / s->page_size : chunk_end;
        end = rmig__min(end, (r->offset + (into / s->regions.piece_bytes + 1) * s->regions.piece_bytes) / s->page_size);
        n = rmig__min(n, end - page);
        uint64_t length = rmig__pages_offset(s, block, page + n) - offset;
        rmig__queue_write(s, r, offset, length, stride);
        rmig__take_pages(s, block, page, n);
        s->write.page = page + n;
        rmig__pacer_spend(&s->pacer, length);
        s->ss.stats.bytes_written += length;
        s->ss.stats.pages_written += n;
        s->ss.stats.round_bytes += length;
        return true;
    }
    return false;
}

/* Pages saved behind the cursors need another pass. Within one pass a page is written once at most, so where writes may
   overtake each other the pass before must have landed. Zero runs go out first: a page may not be zero any more. */
static bool rmig__next_pass(struct rmig_source *s) {
    bool at_end = s->plan.block >= s->blocks.count && !rmig__cursor_before(s->write, s->plan);
    if (!at_end || s->pending == 0 || s->windows.count > 0 || s->clears.count > 0)
        return false;
    if (!s->ss.caps.writes_in_order && !rmig__drained(s))
        return false;
    memset(&s->plan, 0, sizeof s->plan);
    memset(&s->write, 0, sizeof s->write);
    return true;
}

/* A request for the next keys whose READY comes right after the reply must not queue behind the writes: the sink
   would begin to register when the wire runs idle. */
static uint64_t rmig__hold_until(const struct rmig_source *s) {
    return rmig__dialogue_hold_until(&s->dialogue, s->ss.stats.message_rtt_ns);
}

static bool rmig__source_holds(struct rmig_source *s) {
    return rmig__windows_find(&s->windows, RMIG__WINDOW_CLOSED) != NULL && rmig__now(&s->ss) < rmig__hold_until(s);
}

static int rmig__write_out(struct rmig_source *s, bool *moved) {
    if (s->exchange != RMIG__BLOCKS_DONE || s->outbox.first)
        return RMIG_OK;
    bool dry = rmig__drained(s);
    if (rmig__flight_done(&s->flight, s->ss.writes_done, dry))
        rmig__flight_sample(&s->flight, dry, rmig__now(&s->ss), s->ss.stats.message_rtt_ns);
    uint64_t limit = rmig__outstanding_max(s);
    uint64_t stride = rmig__min(rmig__max(limit / RMIG__STRIDES, RMIG__STRIDE_MIN), limit);
    bool hold = !rmig__pinned(s) || s->clears.fence || rmig__source_holds(s);
    int status = RMIG_OK;
    s->flight.full = false;
    while (!hold && status == RMIG_OK) {
        uint64_t outstanding = s->ss.stats.writes_posted - s->ss.writes_done;
        uint64_t bytes = s->flight.bytes - s->flight.done;
        s->flight.full = bytes > 0 && bytes + stride > limit;
        bool room =
            s->writes.queued < RMIG__WRITE_BATCH && outstanding + s->writes.queued < s->writes.depth && !s->flight.full;
        uint64_t allowed = room && s->pending > 0 ? rmig__pace(s) : 0;
        if (allowed > 0 && rmig__next_write(s, allowed, stride)) {
            if (rmig__meter_stopped(&s->meter))
                rmig__meter_start(&s->meter, rmig__now(&s->ss));
            s->meter.busy = true;
            continue;
        }
        if (s->writes.queued == 0)
            break;
        unsigned before = s->writes.queued;
        status = rmig__post_writes(s, moved);
        if (s->writes.queued == before)
            break; // the fabric takes nothing now
    }
    if (s->pending == 0 && rmig__cursor_before(s->write, s->plan))
        s->write = s->plan;
    *moved = rmig__windows_retire(&s->windows, s->write, s->write.block >= s->blocks.count) || *moved;
    *moved = rmig__next_pass(s) || *moved;
    return status;
}

/* Registers one piece, no more: between two the wire is looked after. */
static int rmig__register_local(struct rmig_source *s) {
    for (unsigned i = 0; i < s->windows.count; i++) {
        struct rmig__window *w = &s->windows.window[i];
        while (rmig__windows_due(&s->windows, w) && w->local < w->count) {
            struct rmig__region *r = &s->regions.region[w->first + w->local];
            bool whole = rmig__region_local(s, r);
            int status = whole ? RMIG_OK : rmig__piece_register(s, r);
            if (status != RMIG_OK)
                return status;
            w->local += rmig__region_local(s, r);
            s->ss.again = true;
            if (!whole)
                return RMIG_OK;
        }
    }
    return RMIG_OK;
}

// --- the engine

static const char *rmig__source_waits_for(const struct rmig_source *s) {
    if (s->state == RMIG__SOURCE_CONNECTING)
        return s->ss.link.state == RMIG__LINK_RESOLVED ? "the connection" : "the address to be resolved";
    if (s->dialogue.await != 0)
        return rmig_message_name(s->dialogue.await);
    if (s->finish == RMIG__FINISH_SAID)
        return "the handover to be delivered";
    if (!rmig__drained(s))
        return "writes to complete";
    if (!rmig__all_sent(&s->ss))
        return "a message to be delivered";
    bool wants = s->op != RMIG__OP_NONE || s->pending > 0 || rmig__now(&s->ss) >= rmig__idle_at(&s->ss);
    return wants && !s->dialogue.credit ? "READY" : NULL;
}

static struct rmig__wait rmig__source_wait(const struct rmig_source *s) {
    const struct rmig__session *ss = &s->ss;
    enum rmig_param limit = RMIG_PARAM_IO_TIMEOUT;
    if (s->state == RMIG__SOURCE_CONNECTING || s->op == RMIG__OP_CONNECT)
        limit = RMIG_PARAM_CONNECT_TIMEOUT;
    else if (s->dialogue.await == RMIG_MSG_FINISH_RESULT && (ss->peer_features & RMIG_FEATURE_FINISH_PENDING) != 0)
        limit = RMIG_PARAM_HANDOVER_TIMEOUT; // another sink is granted io-timeout for its answer
    return rmig__wait_for(ss, rmig__source_waits_for(s), limit, 0);
}

static uint64_t rmig__source_wake(struct rmig_source *s) {
    uint64_t at = rmig__min(rmig__session_wake(&s->ss), rmig__source_keepalive_at(s));
    if (s->state == RMIG__SOURCE_CONNECTING)
        at = rmig__min(at, s->attempt_until);
    if (s->pacer.until != 0)
        at = rmig__min(at, s->pacer.until);
    return rmig__source_holds(s) ? rmig__min(at, rmig__hold_until(s)) : at;
}

/* One of a name's addresses has had its share of the time. */
static int rmig__source_unanswered(struct rmig_source *s) {
    struct rmig__session *ss = &s->ss;
    char address[RMIG__ADDRESS_MAX], span[32];
    if (ss->fabric->ops->address(ss->ep, address, sizeof address, NULL) != RMIG_OK)
        snprintf(address, sizeof address, "an address");
    rmig__param_text(&rmig__params[RMIG_PARAM_CONNECT_TIMEOUT],
                     (rmig__now(ss) - s->attempt_began) / RMIG__MS * RMIG__MS, span, sizeof span);
    snprintf(ss->link.text, sizeof ss->link.text, "%s did not answer for %s, its share of connect-timeout", address,
             span);
    ss->link.code = 0;
    return rmig__source_next(s, RMIG_ERR_TIMEOUT);
}

static int rmig__source_timers(struct rmig_source *s) {
    struct rmig__session *ss = &s->ss;
    if (s->state == RMIG__SOURCE_CONNECTING && !rmig__link_was_up(&ss->link) && rmig__now(ss) >= s->attempt_until)
        return rmig__source_unanswered(s);
    struct rmig__wait w = rmig__source_wait(s);
    return rmig__wait_check(ss, "sink", &w);
}

/* Is the operation under way done? */
static void rmig__source_complete(struct rmig_source *s) {
    bool sent = rmig__all_sent(&s->ss);
    if (s->op == RMIG__OP_END_ROUND && !s->round.open && s->outbox.fill == 0 && sent)
        s->op = RMIG__OP_NONE;
    if (s->op == RMIG__OP_FLUSH && s->outbox.fill == 0 && sent)
        s->op = RMIG__OP_NONE;
    bool told = s->ss.extended ? s->finish == RMIG__FINISH_SAID : rmig__settled(s) && s->outbox.fill == 0;
    if (s->op == RMIG__OP_FINISH && told && sent) {
        s->op = RMIG__OP_NONE;
        s->state = RMIG__SOURCE_DONE;
        s->ss.fabric->ops->disconnect(s->ss.ep);
        rmig__session_left(&s->ss);
        rmig__trace(&s->ss, "finished");
    }
}

/* One turn: all that can be done now. */
static int rmig__source_turn(struct rmig_source *s, bool *moved) {
    int status = rmig__session_poll(&s->ss);
    if (status == RMIG_OK)
        status = rmig__source_inbox(s);
    if (status == RMIG_OK)
        rmig__source_complete(s);
    if (status != RMIG_OK || s->state == RMIG__SOURCE_DONE)
        return status;
    if (s->state == RMIG__SOURCE_UP || rmig__link_was_up(&s->ss.link))
        status = rmig__check_link(&s->ss, "sink");
    if (status == RMIG_OK && s->state == RMIG__SOURCE_CONNECTING)
        status = rmig__source_connect_step(s);
    if (status != RMIG_OK || s->state != RMIG__SOURCE_UP)
        return status;
    *moved = rmig__plan(s);
    status = rmig__control_out(s, moved);
    if (status == RMIG_OK)
        status = rmig__write_out(s, moved);
    *moved = rmig__windows_ready(&s->windows, &s->regions) || *moved;
    return status;
}

static int rmig__source_step(struct rmig_source *s) {
    s->unstepped = 0;
    s->pacer.until = 0;
    if (s->ss.failed || s->state == RMIG__SOURCE_NEW || s->state == RMIG__SOURCE_DONE)
        return s->ss.failed;
    bool moved = true;
    s->ss.again = false;
    for (unsigned turns = 0; moved && !s->ss.again; turns++) {
        if (turns == 16) {
            s->ss.again = true;
            break;
        }
        moved = false;
        int status = rmig__source_turn(s, &moved);
        if (status != RMIG_OK)
            return status;
    }
    int status = s->state == RMIG__SOURCE_UP ? rmig__register_local(s) : RMIG_OK;
    return status == RMIG_OK ? rmig__source_timers(s) : status;
}

static void rmig__source_round_look(struct rmig_source *s) {
    struct rmig_stats *st = &s->ss.stats;
    rmig__source_meter_look(s);
    rmig__round_look(&s->round, s->meter.at, st->round_saved, st->round_ns == 0);
    st->round_ns = s->meter.at - s->round.began;
}

static int rmig__source_progress(struct rmig_source *s) {
    int status = rmig__source_step(s);
    s->ss.failure_told = s->ss.failed != RMIG_OK;
    if (status != RMIG_OK)
        return status;
    if (s->round.open)
        rmig__source_round_look(s);
    return s->op == RMIG__OP_NONE ? RMIG_OK : RMIG_PENDING;
}

RMIG__DEF int rmig_source_process(struct rmig_source *s) {
    if (s == NULL)
        return RMIG_ERR_ARGUMENT;
    int status = rmig__source_progress(s);
    return status == RMIG_OK && s->state != RMIG__SOURCE_DONE ? s->refused : status;
}

RMIG__DEF int rmig_source_fds(struct rmig_source *s, struct rmig_fd *fds, size_t n) {
    if (s == NULL)
        return RMIG_ERR_ARGUMENT;
    if (s->ss.ep == NULL || s->ss.failed || s->state == RMIG__SOURCE_DONE)
        return 0;
    s->ss.no_fds = false;
    if (s->other_fds) { // none once, so that a caller who compares adds the new ones
        s->other_fds = false;
        s->ss.ready = true; // and asks again at once
        return 0;
    }
    return rmig__session_fds(&s->ss, s->ss.ep, fds, n);
}

RMIG__DEF uint64_t rmig_source_next_deadline(struct rmig_source *s) {
    if (s == NULL)
        return RMIG_FOREVER;
    if (s->ss.failed)
        return s->ss.failure_told ? RMIG_FOREVER : 0;
    if (s->state == RMIG__SOURCE_NEW || s->state == RMIG__SOURCE_DONE)
        return RMIG_FOREVER;
    if (s->ss.ready || s->ss.again)
        return 0;
    return rmig__min(rmig__source_wait(s).until, rmig__source_wake(s));
}

/* Waits for an operation that was begun with this status. What a waiting call was refused with its caller has; process
   says no more of it. */
static int rmig__source_drive(struct rmig_source *s, int status) {
    if (status != RMIG_OK) {
        if (s != NULL)
            s->refused = RMIG_OK;
        return status;
    }
    for (;;) {
        status = rmig__source_progress(s);
        if (status != RMIG_PENDING)
            return status;
        s->ss.ready = false;
        uint64_t deadline = rmig_source_next_deadline(s);
        status = deadline == 0 ? RMIG_OK : s->ss.fabric->ops->wait(s->ss.fabric, &s->ss.ep, 1, deadline, &s->ss.error);
        if (status != RMIG_OK)
            return rmig__session_end(&s->ss);
    }
}

RMIG__DEF int rmig_source_connect(struct rmig_source *s, const char *address) {
    return rmig__source_drive(s, rmig_source_connect_start(s, address));
}

/* The session is up and no operation is under way. */
static int rmig__source_idle(struct rmig_source *s, const char *call) {
    if (s == NULL)
        return RMIG_ERR_ARGUMENT;
    if (s->ss.failed)
        return s->ss.failed;
    if (s->state == RMIG__SOURCE_NEW)
        return RMIG__NO(&s->ss, RMIG_ERR_STATE, 0, "%s: connect first", call);
    if (s->state == RMIG__SOURCE_DONE)
        return RMIG__NO(&s->ss, RMIG_ERR_STATE, 0, "%s: the session is finished; open another source", call);
    if (s->op != RMIG__OP_NONE)
        return RMIG__NO(&s->ss, RMIG_ERR_STATE, 0,
                        "%s: an operation is under way; call rmig_source_process until it returns RMIG_OK", call);
    return RMIG_OK;
}

RMIG__DEF int rmig_source_begin_round(struct rmig_source *s) {
    int status = rmig__source_idle(s, "rmig_source_begin_round");
    if (status != RMIG_OK)
        return status;
    if (s->round.open)
        return RMIG__NO(&s->ss, RMIG_ERR_STATE, 0, "rmig_source_begin_round: end the round before");
    if (s->exchange == RMIG__BLOCKS_NONE)
        s->exchange = RMIG__BLOCKS_SENDING;
    rmig__round_begin(&s->round, rmig__now(&s->ss));
    rmig_holes_forget(&s->ss.holes);
    s->hole.block = UINT32_MAX;
    s->outbox.first = s->outbox.fill > 0;
    rmig__meter_begin(&s->meter, s->flight.bytes);
    rmig__pacer_begin(&s->pacer, s->round.began);
    s->ss.stats.round_bytes = s->ss.stats.round_saved = s->ss.stats.round_ns = 0;
    rmig__trace(&s->ss, "round %llu begins", (unsigned long long)s->ss.stats.rounds + 1);
    return RMIG_OK;
}

/* Between begin and end of a round, for a block that exists. */
static inline bool rmig__may_save(const struct rmig_source *s, uint32_t block) {
    return s != NULL && s->round.open && s->op == RMIG__OP_NONE && !s->ss.failed && block < s->blocks.count;
}

/* RMIG_OK, or why not to save now. */
static int rmig__save_check(struct rmig_source *s, const char *call, uint32_t block) {
    if (rmig__may_save(s, block))
        return RMIG_OK;
    bool open = s != NULL && s->round.open && s->op == RMIG__OP_NONE;
    int status = open && !s->ss.failed ? RMIG_OK : rmig__source_idle(s, call);
    if (s == NULL)
        return status;
    if (status != RMIG_OK)
        return rmig__taint(&s->ss, status);
    if (!s->round.open)
        return RMIG__REFUSE(&s->ss, RMIG_ERR_STATE, 0, "%s: call rmig_source_begin_round first", call);
    return RMIG__REFUSE(&s->ss, RMIG_ERR_ARGUMENT, 0, "%s: block %u; must be 0 to %u", call, block,
                        s->blocks.count - 1);
}

/* Pages [first, first + n) were noted, so many of them fresh. Runs the engine when there is enough for a write. */
static int rmig__saved(struct rmig_source *s, uint32_t block, uint64_t first, uint64_t n, uint64_t fresh) {
    s->pending += fresh;
    s->unstepped += fresh * s->page_size;
    s->ss.stats.round_saved += fresh * s->page_size;
    rmig__hole_filled(&s->hole, block, first * s->page_size, (first + n) * s->page_size);
    rmig__clears_guard(&s->clears, block, first, n);
    return s->unstepped >= s->merge_max ? rmig__source_step(s) : RMIG_OK;
}

RMIG__DEF int rmig_source_save_range(struct rmig_source *s, uint32_t block, uint64_t offset, uint64_t length) {
    int status = rmig__save_check(s, "rmig_source_save_range", block);
    if (status != RMIG_OK || length == 0)
        return status;
    uint64_t end = s->blocks.block[block].length;
    if (offset >= end || length > end - offset)
        return RMIG__REFUSE(&s->ss, RMIG_ERR_ARGUMENT, 0,
                            "save: offset 0x%llx, length 0x%llx is outside block \"%.60s\" of 0x%llx bytes",
                            (unsigned long long)offset, (unsigned long long)length, s->blocks.block[block].name,
                            (unsigned long long)end);
    struct rmig_merge *dirty = &s->block[block].dirty;
    uint64_t before = dirty->pending, first = offset / s->page_size;
    uint64_t n = (offset + length - 1) / s->page_size - first + 1;
    rmig_merge_add(dirty, first, n);
    return rmig__saved(s, block, first, n, dirty->pending - before);
}

RMIG__DEF int rmig_source_save_page(struct rmig_source *s, uint32_t block, uint64_t offset) {
    int status = rmig__may_save(s, block) ? RMIG_OK : rmig__save_check(s, "rmig_source_save_page", block);
    if (status != RMIG_OK)
        return status;
    if (offset >= s->blocks.block[block].length)
        return rmig_source_save_range(s, block, offset, 1); // for its error
    uint64_t page = offset / s->page_size;
    return rmig__saved(s, block, page, 1, rmig_merge_add_page(&s->block[block].dirty, page));
}

RMIG__DEF int rmig_source_save_bitmap(struct rmig_source *s, uint32_t block, const uint64_t *bitmap,
                                      uint64_t first_page, uint64_t pages) {
    int status = rmig__save_check(s, "rmig_source_save_bitmap", block);
    if (status != RMIG_OK || pages == 0)
        return status;
    struct rmig_merge *dirty = &s->block[block].dirty;
    if (bitmap == NULL)
        return RMIG__REFUSE(&s->ss, RMIG_ERR_ARGUMENT, 0, "rmig_source_save_bitmap: bitmap is NULL");
    if (first_page >= dirty->pages || pages > dirty->pages - first_page)
        return RMIG__REFUSE(&s->ss, RMIG_ERR_ARGUMENT, 0,
                            "rmig_source_save_bitmap: pages %llu to %llu are outside block \"%.60s\" of %llu pages",
                            (unsigned long long)first_page, (unsigned long long)(first_page + pages - 1),
                            s->blocks.block[block].name, (unsigned long long)dirty->pages);
    uint64_t before = dirty->pending;
    rmig_merge_add_bitmap(dirty, first_page, bitmap, pages);
    return rmig__saved(s, block, first_page, pages, dirty->pending - before);
}

/* Begins an operation, if status lets it. A refusal stands until another operation has begun: who does not look at it
   must not take what process says of the operation before for the success of this one. */
static int rmig__begin_op(struct rmig_source *s, int status, enum rmig__source_op op) {
    if (s == NULL)
        return status;
    s->refused = status;
    if (status == RMIG_OK)
        s->op = op;
    return status;
}

static int rmig__may_end_round(struct rmig_source *s) {
    int status = rmig__source_idle(s, "rmig_source_end_round");
    if (status != RMIG_OK)
        return status;
    if (!s->round.open)
        return RMIG__NO(&s->ss, RMIG_ERR_STATE, 0, "rmig_source_end_round: no round has begun");
    return rmig__untainted(&s->ss);
}

RMIG__DEF int rmig_source_end_round_start(struct rmig_source *s) {
    return rmig__begin_op(s, rmig__may_end_round(s), RMIG__OP_END_ROUND);
}

RMIG__DEF int rmig_source_end_round(struct rmig_source *s) {
    return rmig__source_drive(s, rmig_source_end_round_start(s));
}

RMIG__DEF int64_t rmig_source_put_some(struct rmig_source *s, const void *data, size_t n) {
    int status = rmig__source_idle(s, "rmig_source_put");
    if (s != NULL)
        rmig__taint(&s->ss, status);
    if (status == RMIG_OK && s->round.open && !s->ss.extended)
        status = RMIG__REFUSE(
            &s->ss, RMIG_ERR_STATE, 0,
            "rmig_source_put: a version 1 sink takes stream bytes only between rounds; end the round first");
    if (status != RMIG_OK)
        return status;
    if (data == NULL && n > 0)
        return RMIG__REFUSE(&s->ss, RMIG_ERR_ARGUMENT, 0, "rmig_source_put: data is NULL");
    n = rmig__outbox_put(&s->outbox, data, n);
    if (s->outbox.fill >= s->outbox.limit) {
        status = rmig__source_step(s);
        if (status != RMIG_OK)
            return status;
    }
    return (int64_t)n;
}

RMIG__DEF int rmig_source_put(struct rmig_source *s, const void *data, size_t n) {
    const uint8_t *p = (const uint8_t *)data;
    for (;;) {
        int64_t taken = rmig_source_put_some(s, p, n);
        if (taken < 0)
            return (int)taken;
        p += taken;
        n -= (size_t)taken;
        if (n == 0)
            return RMIG_OK;
        int status = rmig_source_flush(s);
        if (status != RMIG_OK)
            return status;
    }
}

RMIG__DEF int rmig_source_flush_start(struct rmig_source *s) {
    int status = rmig__begin_op(s, rmig__source_idle(s, "rmig_source_flush"), RMIG__OP_FLUSH);
    if (status == RMIG_OK)
        s->outbox.flush = s->outbox.fill > 0;
    return status;
}

RMIG__DEF int rmig_source_flush(struct rmig_source *s) { return rmig__source_drive(s, rmig_source_flush_start(s)); }

static int rmig__may_finish(struct rmig_source *s) {
    int status = rmig__source_idle(s, "rmig_source_finish");
    if (status != RMIG_OK)
        return status;
    if (s->round.open || s->ss.stats.rounds == 0)
        return RMIG__NO(&s->ss, RMIG_ERR_STATE, 0, "rmig_source_finish: %s",
                        s->round.open ? "end the round first" : "no round has sent the memory yet");
    return rmig__untainted(&s->ss);
}

RMIG__DEF int rmig_source_finish_start(struct rmig_source *s) {
    int status = rmig__begin_op(s, rmig__may_finish(s), RMIG__OP_FINISH);
    if (status == RMIG_OK)
        rmig__last_bytes(s);
    return status;
}

RMIG__DEF int rmig_source_finish(struct rmig_source *s) { return rmig__source_drive(s, rmig_source_finish_start(s)); }

RMIG__DEF void rmig_source_forgive(struct rmig_source *s) {
    if (s == NULL)
        return;
    memset(&s->ss.taint, 0, sizeof s->ss.taint);
    s->refused = RMIG_OK;
}

RMIG__DEF void rmig_source_cancel(struct rmig_source *s) {
    if (s != NULL && s->ss.failed == RMIG_OK && s->state != RMIG__SOURCE_DONE)
        RMIG__END(&s->ss, RMIG_ERR_CANCELLED, 0, "cancelled at the source");
}

RMIG__DEF const struct rmig_error *rmig_source_error(const struct rmig_source *s) {
    return s == NULL ? &rmig__no_source : &s->ss.error;
}

RMIG__DEF bool rmig_source_extended(const struct rmig_source *s) { return s != NULL && s->ss.extended; }

RMIG__DEF void rmig_source_stats(const struct rmig_source *s, struct rmig_stats *out) {
    if (out == NULL)
        return;
    memset(out, 0, sizeof *out);
    if (s == NULL)
        return;
    *out = s->ss.stats;
    out->bytes_pending = s->pending * s->page_size + rmig__outstanding(s);
    out->round_bytes -= rmig__min(out->round_bytes, rmig__outstanding(s));
    uint64_t rate = s->round.open ? rmig__source_rate(s, &s->meter.mark[0], false) : 0;
    out->throughput = rate != 0 ? rate : out->throughput;
    out->dirty_rate = rmig__round_dirty_rate(&s->round, out->round_saved, s->ram);
}

// >>grants: implementation

/* What the source may write: memory registered for it, one or more units of a block. */
struct rmig__grant {
    bool used;
    uint64_t offset, length; // in the block
    struct rmig_mr mr;
};

/* All of them, in a table whose size is fixed before the first, so that no source can make it grow. A slot that is
   given back is used again, the lowest first.

   Holds always, until the first is taken away by pop: no slot below `free` is free, and none from `count` on is used; a
   grant begins at a unit; a unit names no grant, or one in use that covers it. Grants of a block overlap only if they
   are added so: then a unit names one that reaches furthest, and none at all once that one is removed. */
struct rmig__grants {
    struct rmig__grant *grant;
    uint32_t count, capacity, free;
    uint32_t *units; // of all blocks
    uint64_t unit; // bytes
};

/* The units of a block. */
struct rmig__units {
    uint32_t *grant; // per unit: 1 + index of the grant that covers it and reaches furthest, 0: none
    uint64_t granted; // bytes of all its grants; where they overlap, more than the block has
};

/* Empty, with room for the units and twice as many grants, and one for each whole block: windows of a version 1 source
   may overlap what it asked for before. False: out of memory. */
static bool rmig__grants_begin(struct rmig__grants *gs, uint64_t units, uint32_t blocks) {
    gs->capacity = (uint32_t)rmig__min(2 * units + blocks, UINT32_MAX - 1);
    gs->units = (uint32_t *)rmig__calloc(units, sizeof *gs->units);
    gs->grant = (struct rmig__grant *)rmig__calloc(gs->capacity, sizeof *gs->grant);
    return gs->units != NULL && gs->grant != NULL;
}

static void rmig__grants_end(struct rmig__grants *gs) {
    rmig__release(gs->units);
    rmig__release(gs->grant);
    gs->units = NULL;
    gs->grant = NULL;
    gs->count = gs->capacity = gs->free = 0;
}

/* The grant that the unit at offset names, or NULL. */
static struct rmig__grant *rmig__grants_of(const struct rmig__grants *gs, const struct rmig__units *u,
                                           uint64_t offset) {
    uint32_t known = u->grant[offset / gs->unit];
    return known == 0 ? NULL : &gs->grant[known - 1];
}

/* The grant that covers [from, to) of a block, or NULL. */
static struct rmig__grant *rmig__grants_covering(const struct rmig__grants *gs, const struct rmig__units *u,
                                                 uint64_t from, uint64_t to) {
    struct rmig__grant *g = rmig__grants_of(gs, u, from);
    return g != NULL && to <= g->offset + g->length ? g : NULL; // it begins no later than the unit
}

/* The first that a unit of [from, to) names, or NULL. */
static struct rmig__grant *rmig__grants_overlapping(const struct rmig__grants *gs, const struct rmig__units *u,
                                                    uint64_t from, uint64_t to) {
    for (uint64_t at = from; at < to; at += gs->unit)
        if (u->grant[at / gs->unit] != 0)
            return rmig__grants_of(gs, u, at);
    return NULL;
}

/* The slot that the next one gets, or NULL: there are as many as may be. */
static struct rmig__grant *rmig__grants_slot(struct rmig__grants *gs) {
    while (gs->free < gs->count && gs->grant[gs->free].used)
        gs->free++;
    return gs->free == gs->capacity ? NULL : &gs->grant[gs->free];
}

/* [from, to) of a block is registered as the slot's mr says. */
static void rmig__grants_add(struct rmig__grants *gs, struct rmig__units *u, struct rmig__grant *slot, uint64_t from,
                             uint64_t to) {
    uint32_t index = (uint32_t)(slot - gs->grant);
    RMIG_ASSERT(from % gs->unit == 0);
    slot->used = true;
    slot->offset = from;
    slot->length = to - from;
    u->granted += slot->length;
    gs->count = (uint32_t)rmig__max(gs->count, index + 1);
    for (uint64_t at = from; at < to; at += gs->unit) {
        const struct rmig__grant *g = rmig__grants_of(gs, u, at);
        if (g == NULL || g->offset + g->length < to)
            u->grant[at / gs->unit] = index + 1;
    }
}

static void rmig__grants_remove(struct rmig__grants *gs, struct rmig__units *u, struct rmig__grant *g) {
    uint32_t index = (uint32_t)(g - gs->grant);
    for (uint64_t at = g->offset; at < g->offset + g->length; at += gs->unit)
        if (u->grant[at / gs->unit] == index + 1)
            u->grant[at / gs->unit] = 0;
    g->used = false;
    u->granted -= g->length;
    gs->free = (uint32_t)rmig__min(gs->free, index);
}

/* Takes the last one away, or gives NULL. The source may write no more: nobody asks the units again. */
static struct rmig__grant *rmig__grants_pop(struct rmig__grants *gs) {
    struct rmig__grant *g = NULL;
    while (g == NULL && gs->count > 0)
        g = gs->grant[--gs->count].used ? &gs->grant[gs->count] : NULL;
    if (g != NULL)
        g->used = false;
    gs->free = (uint32_t)rmig__min(gs->free, gs->count);
    return g;
}

// >>sink: implementation

/* How a sink works.

   A sink listens, and has one source at a time. Its embedder calls rmig_sink_process until it returns an event, acts on
   it, and calls again. An event that the embedder must answer (blocks to accept, a guest to take) holds everything else
   back until it has. The state (RMIG__SINK_*) says how far the source has come; nothing is believed that does not fit
   it.

   Sources come and go. Until a migration has begun, whatever a source does wrong costs the source its connection and
   not the sink: it is told why, has a moment to hear it (PARTING), and is forgotten; the sink listens on. The migration
   begins when the embedder has accepted the blocks; with a version 1 source at its first stream bytes or request. From
   there on a failure is for good, because half of a guest may be here.

   What comes in. Control messages lie in the inbox until they are handled, oldest first; READY goes out when one has
   been, and when there is room for the reply to the next. Writes to memory come without a word: the adapter makes them,
   with the keys that the source was given. So the sink never knows which pages have come, and nothing in it depends on
   that; it knows that a round is over because the source says so, behind its writes.

   Registering. A request names a range of a block. What covers it already answers it. An extended source asks for
   nothing twice in part; a version 1 source may, and its old registration stays. The table has its size from the start,
   so no peer can make it grow, and what is registered for one request in one call has a bound. With pin-all the blocks
   are registered whole. Registrations last until the source can no longer write.

   Clearing. Runs of zeros are cleared in steps, with a budget for each call, and without touching what reads as zero
   already, so that holes in the guest's memory stay holes. READY follows when all are cleared: the source's fence waits
   for it.

   Stream bytes are the embedder's. They are handed out in order, and the READY that follows them is held back until
   they are taken; a source cannot fill the sink with them.

   Handing over. FINISH says that everything has been sent. The embedder is asked whether it takes the guest, and may
   take its time; FINISH_PENDING tells the source that it is alive. Yes goes out as FINISH_RESULT. Until GOODBYE comes
   it is open who owns the guest; with it the guest is this end's. Then the source's right to write is taken away, by
   revoking its keys where the fabric can and by cutting the connection where it cannot, before RMIG_SINK_FINISHED is
   returned: whatever the source still sends, it cannot change the memory of a guest that runs here. A version 1 source
   says none of this: the embedder reads the end in the stream and says rmig_sink_complete.

   The return path is a second connection, which a version 1 source opens. The stream's bytes go back on it, a message
   for each READY. It is not needed for memory: if it breaks before there are bytes for it, nothing is lost. */

#define RMIG__BLOCKS_MAX 131072 // blocks that a source may name
#define RMIG__V1_UNIT RMIG_CHUNK_SIZE_MAX // safe whatever chunk size a version 1 source uses: it is not on the wire
#define RMIG__V1_BYTES_PER_US 16 // slowest link that a silent version 1 source is granted: 16 MB/s
#define RMIG__V1_BLOCKS_MAX (RMIG_PAYLOAD_MAX / RMIG_RAM_BLOCK_SIZE)
#define RMIG__STEP_REQUESTS 16 // to connect, taken or rejected in one call
#define RMIG__SINK_UNSURE (500 * RMIG__MS) // others wait so long for a source that has said nothing
#define RMIG__STEP_REGIONS 64 // registered or deregistered for the source in one call; of bytes no more than ...
#define RMIG__STEP_REGISTER                                                                                            \
    (64 * RMIG_MIB) // ... this, or one region: a window of a source's, so that it waits no longer

struct rmig__sink_block {
    uint32_t local; // index in the table of blocks
    struct rmig__units units;
};

struct rmig__peer_block { // what the source said: the name stands in an arena
    uint64_t length, guest_offset;
    size_t name;
};

enum rmig__sink_state {
    RMIG__SINK_NEW,
    RMIG__SINK_LISTENING,
    RMIG__SINK_PARTING, // a source is forgotten once it has been told why; others wait that long
    RMIG__SINK_ACCEPTING,
    RMIG__SINK_HELLO, // extended: the source's HELLO is due
    RMIG__SINK_UP,
    RMIG__SINK_ASKING, // the embedder's word on the blocks is due
    RMIG__SINK_TABLE, // version 1: RAM_BLOCKS_RESULT is due, and with pin-all what it has keys for
    RMIG__SINK_TAKING, // FINISH came, the embedder's word on the guest is due
    RMIG__SINK_TAKEN, // it took the guest; the source is to hear so
    RMIG__SINK_HANDOVER, // FINISH_RESULT is out, GOODBYE is due
    RMIG__SINK_RETURNING, // complete but for bytes on the return path
    RMIG__SINK_LEAVING, // complete, but the source may write until it has left, or is cut off
    RMIG__SINK_OVER
};

#define RMIG__RETURN_MAX 4096 // bytes that may wait
#define RMIG__RETURN_RECVS 2 // one for the READY in hand, one for the next
#define RMIG__RETURN_RECV 64 // a READY has 16 bytes; what does not fit ends the return path
#define RMIG__LEAVE RMIG__SECOND // for the source to leave by itself
#define RMIG__STEP_RELEASE (64 * RMIG_MIB) // deregistered in one call

/* The second connection of a stock source, for bytes to it. Nothing tells who has opened it, so it must not be able to
   hurt the session: what is wrong on it matters only to bytes that are put on it. */
struct rmig__return {
    struct rmig_ep *ep; // NULL: none
    struct rmig_mr mr;
    bool registered, up;
    bool ready; // a READY has come that no message has used
    bool spoke; // a message was delivered
    size_t waiting, sent; // bytes not known to be delivered; of these in the message under way
    uint64_t since; // when something last happened on it, or the wait began
    struct rmig_error broken; // why there is none any more
    struct {
        uint8_t in[RMIG__RETURN_RECVS][RMIG__RETURN_RECV];
        uint8_t out[RMIG_HEADER_SIZE + RMIG__RETURN_MAX]; // one message, and what waits behind it
    } buf; // registered as one
};

struct rmig_sink {
    struct rmig__session ss;
    struct rmig_ep *listener; // NULL: not yet, or nobody else may come
    char address[RMIG__ADDRESS_MAX]; // where it was, once it is closed
    unsigned requests; // to connect, in this call of process
    struct rmig_blocks blocks;
    enum rmig__sink_state state;
    struct rmig_private_data asked; // by the source
    uint64_t accepted_at; // when its request came
    uint8_t answer[RMIG_PRIVATE_DATA_SIZE];
    bool begun; // the migration: from here on a failure of the source is the session's, and nobody else may come
    uint64_t part_until; // PARTING, LEAVING
    bool barred; // the source's right to write is gone
    bool denied; // accept_blocks or take was refused, for the taint
    struct rmig__return ret;
    bool ready_out; // a READY has gone out and no message has come for it
    bool pin_all;
    uint64_t chunk_size, ram_bytes;

    struct rmig__peer_block *peer;
    uint32_t peer_count, peer_capacity, peer_total;
    char *names;
    size_t names_size, names_capacity;

    struct rmig__sink_block *block; // as the source counts
    uint32_t block_count;
    struct rmig__grants grants;

    uint32_t entry; // next of the message (or table) that is carried out in steps
    uint64_t clear_done, clear_data; // of that entry: bytes cleared; where the data ends that was found last
    size_t stream_at; // bytes taken of the QEMU_FILE in the inbox
    bool stream_told, stream_taken, disconnect_told;
    enum rmig_sink_event_type event; // to be delivered
    struct rmig_error forgotten; // why: other calls may be refused before the event is delivered
};

RMIG__DEF int rmig_sink_open(struct rmig_fabric *fabric, const struct rmig_config *cfg, struct rmig_sink **out,
                             struct rmig_error *err) {
    if (out == NULL)
        return rmig_fail(err, RMIG_ERR_ARGUMENT, 0, "rmig_sink_open: out is NULL");
    int status;
    *out = (struct rmig_sink *)rmig__session_new(sizeof **out, fabric, cfg, &status, err);
    return status;
}

/* Deregisters about so many bytes, newest regions first. The source's right to write is gone before: what fails here is
   memory that stays pinned until the fabric is closed, no danger. */
static void rmig__sink_release(struct rmig_sink *s, uint64_t budget) {
    struct rmig__grant *g;
    while (budget > 0 && (g = rmig__grants_pop(&s->grants)) != NULL) {
        struct rmig_error err;
        memset(&err, 0, sizeof err);
        if (rmig__deregister(&s->ss, &g->mr, g->length, &err) != RMIG_OK)
            rmig__trace(&s->ss, "guest memory cannot be deregistered: %s", err.text);
        budget -= rmig__min(budget, rmig__max(g->length, RMIG_MIB));
    }
}

// --- the return path

static void rmig__return_drop(struct rmig_sink *s) {
    struct rmig__return *r = &s->ret;
    const struct rmig_fabric_ops *ops = s->ss.fabric->ops;
    if (r->up)
        ops->disconnect(r->ep);
    if (r->registered)
        ops->dereg(r->ep, &r->mr, NULL);
    if (r->ep != NULL)
        ops->close(r->ep);
    r->ep = NULL;
    r->registered = r->up = r->ready = false;
    r->waiting = r->sent = 0;
}

/* No return path any more. Another may come before the migration has begun; later that matters to bytes alone. */
static int rmig__return_break(struct rmig_sink *s, int status, int code, const char *why) {
    struct rmig__return *r = &s->ret;
    size_t waiting = r->waiting;
    rmig_fail(&r->broken, status, code, "%.150s", why);
    rmig__trace(&s->ss, "return path: closed: %s", r->broken.text);
    rmig__return_drop(s);
    if (waiting == 0)
        return RMIG_OK;
    return RMIG__END(&s->ss, status, code, "the return path: %zu bytes cannot be delivered: %s", waiting,
                     r->broken.text);
}

static int rmig__return_recv(struct rmig_sink *s, unsigned buffer, struct rmig_error *err) {
    struct rmig__return *r = &s->ret;
    return s->ss.fabric->ops->recv(r->ep, r->buf.in[buffer], RMIG__RETURN_RECV, &r->mr, RMIG__ID_RECV | buffer, err);
}

/* Message n waits for READY n. */
static bool rmig__return_can_send(const struct rmig_sink *s) {
    return s->ret.up && s->ret.ready && s->ret.sent == 0 && s->ret.waiting > 0;
}

/* With all of the last bytes on their way the source may take the migration for complete. */
static void rmig__return_last_word(struct rmig_sink *s) {
    if (s->state == RMIG__SINK_RETURNING && s->ret.sent > 0 && s->ret.sent == s->ret.waiting)
        s->ss.owner = RMIG__OWNER_OPEN;
}

static int rmig__return_send(struct rmig_sink *s) {
    struct rmig__return *r = &s->ret;
    if (!rmig__return_can_send(s))
        return RMIG_OK;
    struct rmig_header header;
    header.len = (uint32_t)r->waiting;
    header.type = RMIG_MSG_QEMU_FILE;
    header.repeat = 0;
    rmig_encode_header(r->buf.out, RMIG_HEADER_SIZE, &header);
    struct rmig_error err;
    memset(&err, 0, sizeof err);
    int status = s->ss.fabric->ops->send(r->ep, r->buf.out, RMIG_HEADER_SIZE + r->waiting, &r->mr, RMIG__ID_SEND, &err);
    if (status == RMIG_ERR_FULL)
        return RMIG_OK;
    if (status != RMIG_OK)
        return rmig__return_break(s, RMIG_ERR_FABRIC, err.provider_code, err.text);
    r->sent = r->waiting;
    r->ready = false;
    r->since = rmig__now(&s->ss);
    s->ss.stats.control_sent++;
    rmig__return_last_word(s);
    rmig__trace(&s->ss, "return path: send QEMU_FILE len %zu", r->sent);
    return RMIG_OK;
}

static int rmig__return_on_message(struct rmig_sink *s, unsigned buffer, uint64_t length) {
    struct rmig__return *r = &s->ret;
    struct rmig_header h;
    struct rmig_error err;
    memset(&err, 0, sizeof err);
    s->ss.stats.control_received++;
    if (rmig_decode_header(r->buf.in[buffer], (size_t)length, &h) < 0)
        rmig_fail(&err, RMIG_ERR_PROTOCOL, 0, "the source sent %llu bytes that are no message; READY was due",
                  (unsigned long long)length);
    else if (h.type != RMIG_MSG_READY || h.len != 0)
        rmig_fail(&err, RMIG_ERR_PROTOCOL, 0, "the source sent %s (type %u, len %u); READY was due",
                  rmig_message_name(h.type), h.type, h.len);
    else if (r->ready)
        rmig_fail(&err, RMIG_ERR_PROTOCOL, 0, "the source sent a READY before the one before it was used");
    else
        rmig__return_recv(s, buffer, &err);
    if (err.status != RMIG_OK)
        return rmig__return_break(s, err.status, err.provider_code, err.text);
    r->ready = true;
    rmig__trace(&s->ss, "return path: recv READY");
    return RMIG_OK;
}

static int rmig__return_on_event(struct rmig_sink *s, const struct rmig_fabric_event *e) {
    struct rmig__return *r = &s->ret;
    r->since = rmig__now(&s->ss);
    switch (e->type) {
    case RMIG_FEV_ESTABLISHED:
        r->up = true;
        rmig__trace(&s->ss, "return path: connected");
        return RMIG_OK;
    case RMIG_FEV_SEND:
        r->waiting -= r->sent;
        memmove(r->buf.out + RMIG_HEADER_SIZE, r->buf.out + RMIG_HEADER_SIZE + r->sent, r->waiting);
        r->sent = 0;
        r->spoke = true;
        return RMIG_OK;
    case RMIG_FEV_RECV:
        return rmig__return_on_message(s, (unsigned)(e->id & RMIG__ID_NUMBER), e->length);
    case RMIG_FEV_DISCONNECTED:
        return rmig__return_break(s, RMIG_ERR_PEER_GONE, e->provider_code, "the source disconnected it");
    case RMIG_FEV_REJECTED:
    case RMIG_FEV_ERROR:
        return rmig__return_break(s, RMIG_ERR_FABRIC, e->provider_code, e->text);
    case RMIG_FEV_REQUEST:
    case RMIG_FEV_RESOLVED:
    case RMIG_FEV_WRITE:
        break;
    }
    return RMIG_OK;
}

static int rmig__return_poll(struct rmig_sink *s) {
    for (unsigned events = 0; s->ret.ep != NULL; events++) {
        struct rmig_fabric_event e;
        if (events == RMIG__EVENTS) {
            s->ss.again = true;
            return RMIG_OK;
        }
        struct rmig_error err;
        memset(&err, 0, sizeof err);
        int n = s->ss.fabric->ops->poll(s->ret.ep, &e, 1, &err);
        if (n < 0)
            return rmig__return_break(s, RMIG_ERR_FABRIC, err.provider_code, err.text);
        if (n == 0)
            return rmig__return_send(s);
        int status = rmig__return_on_event(s, &e);
        if (status != RMIG_OK)
            return status;
    }
    return RMIG_OK;
}

static uint64_t rmig__return_deadline(const struct rmig_sink *s) {
    const struct rmig__return *r = &s->ret;
    if (r->ep == NULL || (r->up && r->waiting == 0))
        return RMIG_FOREVER;
    return rmig__after(r->since, rmig_get(&s->ss.cfg, r->up ? RMIG_PARAM_IO_TIMEOUT : RMIG_PARAM_CONNECT_TIMEOUT));
}

static int rmig__return_timers(struct rmig_sink *s) {
    const struct rmig__return *r = &s->ret;
    if (rmig__now(&s->ss) < rmig__return_deadline(s))
        return RMIG_OK;
    enum rmig_param which = r->up ? RMIG_PARAM_IO_TIMEOUT : RMIG_PARAM_CONNECT_TIMEOUT;
    char span[32], why[120];
    rmig__param_text(&rmig__params[which], rmig_get(&s->ss.cfg, which), span, sizeof span);
    snprintf(why, sizeof why, "no %s for %s (%s)",
             !r->up        ? "connection"
             : r->sent > 0 ? "delivery"
                           : "READY from the source",
             span, rmig__params[which].name);
    return rmig__return_break(s, RMIG_ERR_TIMEOUT, 0, why);
}

/* The source that has read the last bytes, or knows that its last word was delivered, disconnects by itself. If this
   end came first, the source might take that for a failure. */
static void rmig__sink_linger(struct rmig_sink *s) {
    bool returned = s->ret.ep != NULL && s->ret.spoke;
    if (s->state != RMIG__SINK_OVER || s->ss.failed || (!returned && !s->barred))
        return;
    struct rmig_ep *eps[2];
    size_t n = 0;
    if (returned)
        eps[n++] = s->ret.ep;
    if (!rmig__link_is_down(&s->ss.link) && s->ss.hearing != RMIG__PEER_OVER)
        eps[n++] = s->ss.ep;
    uint64_t until = rmig__after(rmig__now(&s->ss), returned ? RMIG__LEAVE : RMIG__LINGER);
    while (rmig__now(&s->ss) < until) {
        size_t left = 0;
        for (size_t i = 0; i < n; i++)
            if (!rmig__ep_ended(eps[i], NULL))
                eps[left++] = eps[i];
        n = left;
        if (n == 0 || s->ss.fabric->ops->wait(s->ss.fabric, eps, n, until, NULL) != RMIG_OK)
            return;
    }
}

RMIG__DEF bool rmig_sink_has_return_path(const struct rmig_sink *s) { return s != NULL && s->ret.up; }

RMIG__DEF int rmig_sink_return_put(struct rmig_sink *s, const void *data, size_t n) {
    if (s == NULL)
        return RMIG_ERR_ARGUMENT;
    struct rmig__session *ss = &s->ss;
    struct rmig__return *r = &s->ret;
    if (ss->failed)
        return ss->failed;
    if (!s->begun || ss->extended || s->state >= RMIG__SINK_RETURNING)
        return RMIG__NO(ss, RMIG_ERR_STATE, 0,
                        "rmig_sink_return_put: only for a version 1 source, after its first message and before "
                        "rmig_sink_complete");
    if (n > RMIG__RETURN_MAX || (data == NULL && n > 0))
        return RMIG__REFUSE(ss, RMIG_ERR_ARGUMENT, 0,
                            "rmig_sink_return_put: %zu bytes at %p: must be at most %d, not at NULL", n, data,
                            RMIG__RETURN_MAX);
    if (r->ep == NULL && r->broken.status == RMIG_OK)
        return RMIG__NO(ss, RMIG_ERR_STATE, 0,
                        "rmig_sink_return_put: the source has opened no return path; it does so before its first "
                        "message, or not at all");
    if (r->ep == NULL)
        return RMIG__END(ss, r->broken.status, r->broken.provider_code,
                         "the return path: %zu bytes cannot be delivered: %s", n, r->broken.text);
    if (n > RMIG__RETURN_MAX - r->waiting)
        return RMIG__NO(ss, RMIG_ERR_FULL, 0, "rmig_sink_return_put: %zu bytes wait, with %zu more than %d would",
                        r->waiting, n, RMIG__RETURN_MAX);
    if (r->waiting == 0 && r->up)
        r->since = rmig__now(ss);
    if (n > 0)
        memcpy(r->buf.out + RMIG_HEADER_SIZE + r->waiting, data, n);
    r->waiting += n;
    ss->again = true; // sent by process: what is put right before complete leaves when nothing is registered any more
    return RMIG_OK;
}

// --- opening and closing

RMIG__DEF void rmig_sink_close(struct rmig_sink *s) {
    if (s == NULL)
        return;
    rmig__sink_linger(s);
    rmig__session_leave(&s->ss);
    rmig__sink_release(s, UINT64_MAX);
    rmig__session_close(&s->ss);
    rmig__return_drop(s);
    if (s->listener != NULL)
        s->ss.fabric->ops->close(s->listener);
    rmig_blocks_free(&s->blocks);
    rmig__release(s->peer);
    rmig__release(s->names);
    rmig__release(s->block);
    rmig__grants_end(&s->grants);
    RMIG_FREE(s);
}

RMIG__DEF int rmig_sink_listen(struct rmig_sink *s, const char *address) {
    if (s == NULL)
        return RMIG_ERR_ARGUMENT;
    if (s->state != RMIG__SINK_NEW || s->ss.failed)
        return RMIG__NO(&s->ss, RMIG_ERR_STATE, 0, "rmig_sink_listen: this sink has listened before; open another");
    if (address == NULL)
        return RMIG__NO(&s->ss, RMIG_ERR_ARGUMENT, 0, "rmig_sink_listen: address is NULL; must be \"HOST:PORT\"");
    int status = s->ss.fabric->ops->listen(s->ss.fabric, address, &s->listener, &s->ss.error);
    if (status != RMIG_OK) {
        s->listener = NULL;
        return status <= RMIG_SESSION_ERRORS ? rmig__session_end(&s->ss) : status;
    }
    s->state = RMIG__SINK_LISTENING;
    return RMIG_OK;
}

RMIG__DEF int rmig_sink_address(struct rmig_sink *s, char *buf, size_t n) {
    if (s == NULL)
        return RMIG_ERR_ARGUMENT;
    if (s->listener == NULL && s->address[0] == '\0')
        return RMIG__NO(&s->ss, RMIG_ERR_STATE, 0, "rmig_sink_address: none is known; listen first");
    if (buf == NULL || n == 0)
        return RMIG__NO(&s->ss, RMIG_ERR_ARGUMENT, 0, "rmig_sink_address: buf is NULL or empty; 64 bytes suffice");
    if (s->listener == NULL && n <= strlen(s->address))
        return RMIG__NO(&s->ss, RMIG_ERR_ARGUMENT, 0, "rmig_sink_address: buf has %zu bytes, \"%s\" needs %zu", n,
                        s->address, strlen(s->address) + 1);
    if (s->listener == NULL) {
        memcpy(buf, s->address, strlen(s->address) + 1);
        return RMIG_OK;
    }
    return s->ss.fabric->ops->address(s->listener, buf, n, &s->ss.error);
}

RMIG__DEF int rmig_sink_add_block(struct rmig_sink *s, const struct rmig_block_desc *desc, uint32_t *index) {
    if (s == NULL)
        return RMIG_ERR_ARGUMENT;
    if (s->block != NULL || s->ss.failed)
        return RMIG__NO(&s->ss, RMIG_ERR_STATE, 0, "rmig_sink_add_block: must come before rmig_sink_accept_blocks");
    return rmig__taint(&s->ss, rmig_blocks_add(&s->blocks, desc, index, &s->ss.error));
}

RMIG__DEF int rmig_sink_clear_blocks(struct rmig_sink *s) {
    if (s == NULL)
        return RMIG_ERR_ARGUMENT;
    if (s->block != NULL || s->ss.failed)
        return RMIG__NO(&s->ss, RMIG_ERR_STATE, 0, "rmig_sink_clear_blocks: the blocks are agreed with a source");
    rmig_blocks_free(&s->blocks);
    return RMIG_OK;
}

RMIG__DEF int rmig_sink_peer_block(struct rmig_sink *s, uint32_t i, struct rmig_block_entry *out) {
    if (s == NULL)
        return RMIG_ERR_ARGUMENT;
    if (out == NULL)
        return RMIG__NO(&s->ss, RMIG_ERR_ARGUMENT, 0, "rmig_sink_peer_block: out is NULL");
    if (i >= s->peer_count)
        return RMIG__NO(&s->ss, RMIG_ERR_ARGUMENT, 0, "rmig_sink_peer_block: %u; the source has named %u blocks", i,
                        s->peer_count);
    const char *name = s->names + s->peer[i].name;
    out->length = s->peer[i].length;
    out->guest_offset = s->peer[i].guest_offset;
    memcpy(out->name, name, strlen(name) + 1);
    return RMIG_OK;
}

// --- a source asks to connect

/* The reason goes behind the private data where it has room; for an rmig, since version 1 has no such thing. */
static void rmig__sink_reject(struct rmig_sink *s, const struct rmig_fabric_event *e, const char *why) {
    struct rmig_private_data data, asked;
    bool words = rmig_decode_private_data(e->private_data, e->private_data_length, &asked) >= 0 &&
                 (asked.flags & RMIG_FLAG_EXTENSION) != 0;
    size_t n = words ? (size_t)rmig__min(strlen(why), RMIG__REASON_MAX) : 0;
    data.version = RMIG_PROTOCOL_VERSION;
    data.flags = 0;
    uint8_t bytes[RMIG_PRIVATE_DATA_SIZE + RMIG__REASON_MAX];
    rmig_encode_private_data(bytes, sizeof bytes, &data);
    for (size_t i = 0; i < n; i++)
        bytes[RMIG_PRIVATE_DATA_SIZE + i] = (uint8_t)why[i];
    const struct rmig_fabric_ops *ops = s->ss.fabric->ops;
    int status = ops->reject(s->listener, e->request, bytes, RMIG_PRIVATE_DATA_SIZE + n, NULL);
    if (status == RMIG_ERR_ARGUMENT && n > 0)
        ops->reject(s->listener, e->request, bytes, RMIG_PRIVATE_DATA_SIZE, NULL);
    rmig__trace(&s->ss, "rejected a request: %s", why);
}

/* What was made for one source goes. What another finds is as after listen, with the blocks that were added. */
static void rmig__sink_forget_tables(struct rmig_sink *s) {
    rmig__release(s->peer);
    rmig__release(s->names);
    rmig__release(s->block);
    rmig__grants_end(&s->grants);
    s->peer = NULL;
    s->names = NULL;
    s->block = NULL;
    s->peer_count = s->peer_capacity = s->peer_total = 0;
    s->names_size = s->names_capacity = 0;
    s->block_count = 0;
    s->ram_bytes = s->ss.stats.stream_bytes = 0;
    s->stream_at = 0;
    s->entry = 0;
    s->ready_out = s->stream_told = s->stream_taken = false;
}

/* Why a source is let go is in ss->error, and the embedder hears of it. Each step delivers one event, so there is none
   that this one could hide: what calls this looks at nothing else afterwards. */
static void rmig__sink_tell_forgotten(struct rmig_sink *s) {
    RMIG_ASSERT(s->event == RMIG_SINK_NONE);
    s->event = RMIG_SINK_FORGOTTEN;
    s->forgotten = s->ss.error;
    rmig__trace(&s->ss, "forgets a source: %s", s->ss.error.text);
}

/* What a source does before its migration has begun, and what this end cannot do for it, costs it its connection, and
   not the sink, which another may be on its way to. Does nothing if the session has not failed, or for good. */
static void rmig__sink_spare(struct rmig_sink *s) {
    struct rmig__session *ss = &s->ss;
    if (s->begun || ss->failed == RMIG_OK || ss->failed == RMIG_ERR_CANCELLED || ss->ep == NULL)
        return;
    ss->failed = RMIG_OK;
    bool telling = ss->hearing == RMIG__PEER_TOLD;
    if (!telling)
        ss->hearing = RMIG__PEER_OVER;
    ss->again = true;
    bool parting = s->state == RMIG__SINK_PARTING;
    s->state = RMIG__SINK_PARTING;
    s->part_until = telling && !parting ? rmig__after(rmig__now(ss), RMIG__LINGER) : 0;
    if (parting)
        return; // that was told before
    rmig__return_drop(s);
    rmig__sink_forget_tables(s);
    rmig__sink_tell_forgotten(s);
}

static void rmig__sink_part(struct rmig_sink *s, bool *moved) {
    if (rmig__now(&s->ss) < s->part_until && !rmig__ep_ended(s->ss.ep, NULL))
        return;
    rmig__session_drop(&s->ss);
    *moved = true;
    if (s->listener == NULL) {
        RMIG__END(&s->ss, RMIG_ERR_FABRIC, 0, "the listener has failed: no other source can come");
        return;
    }
    s->state = RMIG__SINK_LISTENING;
    rmig__trace(&s->ss, "forgot a source, listening again");
}

static void rmig__sink_accept(struct rmig_sink *s, const struct rmig_fabric_event *e) {
    struct rmig__session *ss = &s->ss;
    struct rmig_ep_config cfg;
    cfg.write_depth = 1; // a sink never writes
    cfg.send_depth = RMIG__SENDS;
    cfg.recv_depth = RMIG__RECVS;
    cfg.connect_timeout_ns = rmig_get(&ss->cfg, RMIG_PARAM_CONNECT_TIMEOUT);
    if (ss->fabric->ops->open_request(s->listener, e->request, &cfg, &ss->ep, &ss->error) != RMIG_OK) {
        ss->ep = NULL;
        rmig__sink_reject(s, e, ss->error.text);
        RMIG_LOG(ss->error.text);
        rmig__sink_tell_forgotten(s);
        return;
    }
    s->state = RMIG__SINK_ACCEPTING;
    ss->last_progress = s->accepted_at = rmig__now(ss);
    memset(&s->ret.broken, 0, sizeof s->ret.broken);
    struct rmig_private_data answer;
    answer.version = RMIG_PROTOCOL_VERSION;
    answer.flags = s->asked.flags & RMIG_FLAG_PIN_ALL;
    if (rmig_get(&ss->cfg, RMIG_PARAM_EXTENSION))
        answer.flags |= s->asked.flags & RMIG_FLAG_EXTENSION;
    rmig_encode_private_data(s->answer, sizeof s->answer, &answer);
    int status = rmig__session_setup(ss);
    if (status == RMIG_OK && ss->fabric->ops->accept(ss->ep, s->answer, sizeof s->answer, &ss->error) != RMIG_OK)
        status = rmig__session_end(ss);
    if (status != RMIG_OK) {
        rmig__sink_spare(s);
        return;
    }
    ss->extended = (answer.flags & RMIG_FLAG_EXTENSION) != 0;
    s->pin_all = (answer.flags & RMIG_FLAG_PIN_ALL) != 0 && !ss->extended;
}

/* A stock source waits for its return path before it says anything; on a slow link its request may overtake the news
   that the first connection is there by more than others wait. What comes later is another source, which had better be
   told so. */
static bool rmig__return_wanted(const struct rmig_sink *s, const struct rmig_private_data *asked) {
    return (s->state == RMIG__SINK_ACCEPTING || s->state == RMIG__SINK_UP) && !s->ss.extended && !s->begun &&
           s->ret.ep == NULL && asked->flags == s->asked.flags &&
           rmig__now(&s->ss) < rmig__after(s->accepted_at, rmig_get(&s->ss.cfg, RMIG_PARAM_CONNECT_TIMEOUT));
}

/* The endpoint takes work: registers, posts the receives and accepts. */
static int rmig__return_accept(struct rmig_sink *s, struct rmig_error *err) {
    struct rmig__return *r = &s->ret;
    const struct rmig_fabric_ops *ops = s->ss.fabric->ops;
    int status = ops->reg(r->ep, &r->buf, sizeof r->buf, RMIG_ACCESS_LOCAL_READ | RMIG_ACCESS_LOCAL_WRITE, &r->mr, err);
    r->registered = status == RMIG_OK;
    for (unsigned i = 0; i < RMIG__RETURN_RECVS && status == RMIG_OK; i++)
        status = rmig__return_recv(s, i, err);
    return status == RMIG_OK ? ops->accept(r->ep, s->answer, sizeof s->answer, err) : status;
}

static void rmig__return_open(struct rmig_sink *s, const struct rmig_fabric_event *e) {
    struct rmig__return *r = &s->ret;
    struct rmig_ep_config cfg;
    cfg.write_depth = 1;
    cfg.send_depth = 1;
    cfg.recv_depth = RMIG__RETURN_RECVS;
    cfg.connect_timeout_ns = rmig_get(&s->ss.cfg, RMIG_PARAM_CONNECT_TIMEOUT);
    struct rmig_error err;
    memset(&err, 0, sizeof err);
    if (s->ss.fabric->ops->open_request(s->listener, e->request, &cfg, &r->ep, &err) != RMIG_OK) {
        r->ep = NULL;
        rmig__sink_reject(s, e, err.text);
        rmig__return_break(s, RMIG_ERR_FABRIC, err.provider_code, err.text);
        return;
    }
    memset(&r->broken, 0, sizeof r->broken);
    r->since = rmig__now(&s->ss);
    int status = rmig__return_accept(s, &err);
    if (status != RMIG_OK)
        rmig__return_break(s, RMIG_ERR_FABRIC, err.provider_code, err.text);
    else
        rmig__trace(&s->ss, "return path: accepted");
}

static void rmig__sink_on_request(struct rmig_sink *s, const struct rmig_fabric_event *e) {
    struct rmig_private_data asked;
    if (rmig_decode_private_data(e->private_data, e->private_data_length, &asked) < 0 ||
        asked.version != RMIG_PROTOCOL_VERSION) {
        rmig__sink_reject(s, e, "its private data is short or not of protocol version 1");
    } else if (s->state == RMIG__SINK_LISTENING) {
        s->asked = asked;
        rmig__sink_accept(s, e);
    } else if (rmig__return_wanted(s, &asked)) {
        rmig__return_open(s, e);
    } else {
        rmig__sink_reject(s, e, "it is busy with another source");
    }
}

/* Until when others wait to know whether the source at hand is there at all: it may have given up, and asked again by
   another address of this host. What says nothing for longer keeps nobody waiting: they hear that the sink is busy. */
static uint64_t rmig__sink_unsure_until(const struct rmig_sink *s) {
    bool unsure = s->state == RMIG__SINK_ACCEPTING || s->state == RMIG__SINK_HELLO;
    return unsure ? rmig__after(s->accepted_at, RMIG__SINK_UNSURE) : 0;
}

static bool rmig__sink_listens(const struct rmig_sink *s) {
    return s->listener != NULL && s->state != RMIG__SINK_PARTING && rmig__now(&s->ss) >= rmig__sink_unsure_until(s);
}

/* Takes requests until there is something to tell, and so many in one call of process: strangers may knock without
   end. */
static void rmig__sink_poll_listener(struct rmig_sink *s, bool *moved) {
    while (s->event == RMIG_SINK_NONE && rmig__sink_listens(s)) {
        struct rmig_fabric_event e;
        if (s->requests == RMIG__STEP_REQUESTS) {
            s->ss.again = true;
            return;
        }
        int n = s->ss.fabric->ops->poll(s->listener, &e, 1, &s->ss.error);
        if (n < 0 && s->ss.ep != NULL) { // the source that is there does not need it
            rmig__trace(&s->ss, "listener: %s", s->ss.error.text);
            s->ss.fabric->ops->close(s->listener);
            s->listener = NULL;
            return;
        }
        if (n < 0)
            rmig__session_end(&s->ss);
        if (n <= 0)
            return;
        s->requests++;
        *moved = true;
        if (e.type == RMIG_FEV_REQUEST)
            rmig__sink_on_request(s, &e);
        if (e.type == RMIG_FEV_ERROR) // one request's, not the listener's
            rmig__trace(&s->ss, "listener: %s", e.text);
    }
}

/* The migration has begun: the sink is this source's, which has opened all the connections that it will. */
static void rmig__sink_begin(struct rmig_sink *s) {
    s->begun = true;
    if (s->listener == NULL)
        return;
    if (s->ss.fabric->ops->address(s->listener, s->address, sizeof s->address, NULL) != RMIG_OK)
        s->address[0] = '\0';
    s->ss.fabric->ops->close(s->listener);
    s->listener = NULL;
}

// --- the end

/* Takes the source's right to write away, if that can be done with the connection kept. Otherwise the connection is cut
   before RMIG_SINK_FINISHED. */
static void rmig__sink_bar(struct rmig_sink *s) {
    struct rmig__session *ss = &s->ss;
    if (ss->caps.revokes && !rmig__link_is_down(&ss->link))
        s->barred = ss->fabric->ops->revoke(ss->ep, NULL) == RMIG_OK;
}

/* The guest is this end's. Where the source may still write it is given a moment to leave by itself: if it were cut off
   at once, the acknowledgement of its last message might not get out, and it would take that for a failure. */
static void rmig__sink_leave(struct rmig_sink *s) {
    s->ss.owner = RMIG__OWNER_CERTAIN;
    s->state = RMIG__SINK_LEAVING;
    s->part_until = rmig__after(rmig__now(&s->ss), RMIG__LEAVE);
}

static void rmig__sink_left(struct rmig_sink *s) {
    struct rmig__session *ss = &s->ss;
    bool gone = rmig__link_is_down(&ss->link);
    if (!s->barred && !gone && rmig__now(ss) < s->part_until && !rmig__ep_ended(ss->ep, &ss->sends_free))
        return;
    if (!s->barred)
        rmig__session_cut(ss);
    s->state = RMIG__SINK_OVER;
    s->event = RMIG_SINK_FINISHED;
}

// --- messages

static int rmig__sink_bad(struct rmig_sink *s, const struct rmig_header *h, const char *should) {
    return RMIG__END(&s->ss, RMIG_ERR_PROTOCOL, 0, "the source sent %s (type %u, len %u, repeat %u): %s",
                     rmig_message_name(h->type), h->type, h->len, h->repeat, should);
}

static int rmig__sink_on_hello(struct rmig_sink *s, const uint8_t *p, const struct rmig_header *h, uint8_t *out) {
    struct rmig__session *ss = &s->ss;
    struct rmig_hello hello, answer;
    if (rmig_decode_hello(p, h->len, &hello) < 0)
        return rmig__sink_bad(s, h, "its entries are malformed");
    rmig__fill_hello(ss, &answer);
    answer.features &= hello.features;
    bool fixed = (ss->cfg.set_ & (1u << RMIG_PARAM_CHUNK_SIZE)) != 0;
    uint64_t own = answer.chunk_size, asked = hello.chunk_size;
    bool is_size = rmig__is_power_of_two(asked) && asked >= RMIG_CHUNK_SIZE_MIN && asked <= RMIG_CHUNK_SIZE_MAX;
    bool valid = is_size && rmig__take_limits(ss, &hello, RMIG_CHUNK_SIZE_MIN, answer.reason, sizeof answer.reason);
    if (!is_size)
        snprintf(answer.reason, sizeof answer.reason, "chunk-size %llu: must be a power of two from 1M to 1G",
                 (unsigned long long)asked);
    else if (valid && fixed && own != asked)
        snprintf(answer.reason, sizeof answer.reason,
                 "chunk-size: the source has %llu, the sink is set to %llu; set the same or leave the sink's unset",
                 (unsigned long long)asked, (unsigned long long)own);
    else if (valid && ss->caps.registration_max < asked)
        snprintf(answer.reason, sizeof answer.reason,
                 "chunk-size %llu: the sink's fabric registers at most %llu at once", (unsigned long long)asked,
                 (unsigned long long)ss->caps.registration_max);
    answer.status = answer.reason[0] != '\0';
    answer.chunk_size = asked;
    int status =
        rmig__send(&s->ss, RMIG_MSG_HELLO_RESULT, 1, (size_t)rmig_encode_hello(out, RMIG_PAYLOAD_MAX, &answer));
    if (status == RMIG_OK && answer.status != 0) {
        ss->hearing = RMIG__PEER_TOLD; // the reason is on its way: no ERROR behind it
        return RMIG__END(ss, valid ? RMIG_ERR_SETUP : RMIG_ERR_PROTOCOL, 0, "refused the source: %s", answer.reason);
    }
    s->chunk_size = asked;
    s->grants.unit = asked;
    s->state = RMIG__SINK_UP;
    return status;
}

static bool rmig__peer_room(struct rmig_sink *s, uint32_t blocks, size_t name_bytes) {
    if (s->peer_count + blocks > s->peer_capacity) {
        uint32_t capacity = (s->peer_count + blocks) * 2;
        void *p = RMIG_REALLOC(s->peer, capacity * sizeof *s->peer);
        if (p == NULL)
            return false;
        s->peer = (struct rmig__peer_block *)p;
        s->peer_capacity = capacity;
    }
    if (s->names_size + name_bytes > s->names_capacity) {
        size_t capacity = (s->names_size + name_bytes) * 2;
        void *p = RMIG_REALLOC(s->names, capacity);
        if (p == NULL)
            return false;
        s->names = (char *)p;
        s->names_capacity = capacity;
    }
    return true;
}

static int rmig__sink_on_blocks(struct rmig_sink *s, const uint8_t *p, const struct rmig_header *h) {
    if (h->len < 8 || h->repeat == 0 || h->repeat > RMIG_REPEAT_MAX)
        return rmig__sink_bad(s, h, "must hold 1 to 4096 blocks behind 8 bytes");
    uint32_t total = rmig__get_be32(p), first = rmig__get_be32(p + 4);
    if (s->block != NULL || first != s->peer_count || (first > 0 && total != s->peer_total) ||
        total > RMIG__BLOCKS_MAX || h->repeat > total - first)
        return rmig__sink_bad(s, h, "the blocks must come once, in order, at most 131072");
    if (!rmig__peer_room(s, h->repeat, h->len + h->repeat))
        return RMIG__END(&s->ss, RMIG_ERR_SETUP, 0, "out of memory for the names of %u blocks", total);
    s->peer_total = total;
    size_t at = 8;
    for (uint32_t i = 0; i < h->repeat; i++) {
        struct rmig_block_entry entry;
        int n = rmig_decode_block_entry(p + at, h->len - at, &entry);
        if (n < 0 || entry.length == 0)
            return rmig__sink_bad(s, h, "an entry is cut short, or has no name or no length");
        at += (size_t)n;
        struct rmig__peer_block *b = &s->peer[s->peer_count++];
        b->length = entry.length;
        b->guest_offset = entry.guest_offset;
        b->name = s->names_size;
        memcpy(s->names + s->names_size, entry.name, strlen(entry.name) + 1);
        s->names_size += strlen(entry.name) + 1;
    }
    if (at != h->len)
        return rmig__sink_bad(s, h, "bytes follow the last entry");
    if (s->peer_count == s->peer_total) {
        s->state = RMIG__SINK_ASKING;
        s->event = RMIG_SINK_BLOCKS;
    }
    return RMIG_OK;
}

/* The block that a message names, or NULL: none, or the blocks are not agreed yet. */
static struct rmig__sink_block *rmig__sink_find(struct rmig_sink *s, uint32_t index) {
    return index < s->block_count ? &s->block[index] : NULL;
}

static const struct rmig_block *rmig__sink_local(const struct rmig_sink *s, const struct rmig__sink_block *b) {
    return &s->blocks.block[b->local];
}

static bool rmig__inside(uint64_t offset, uint64_t length, uint64_t end) {
    return offset < end && length > 0 && length <= end - offset;
}

static void rmig__sink_clear_data(const struct rmig_sink *s, const struct rmig_block *b, uint64_t from, uint64_t to) {
    for (uint64_t at = from; at < to; at += s->ss.holes.page) {
        size_t n = (size_t)rmig__min(s->ss.holes.page, to - at);
        if (b->backing == RMIG_BACKING_DMABUF || !rmig_is_zero(b->host + at, n))
            memset(b->host + at, 0, n);
    }
}

/* Clears from `from` on without touching what reads as zero already: holes stay holes. Returns how far it came: up to
   `to`, or less when the budget of bytes looked at is spent. Up to s->clear_data it is known to be data. */
static uint64_t rmig__sink_clear(struct rmig_sink *s, const struct rmig_block *b, uint64_t from, uint64_t to,
                                 uint64_t *budget) {
    while (from<to && * budget> 0) {
        if (from >= s->clear_data) {
            uint64_t data, end, reach = rmig__min(to, rmig__after(from, RMIG__HOLE_LOOK));
            rmig_holes_next_data(&s->ss.holes, b, from, reach, &data, &end);
            *budget -= rmig__min(*budget, RMIG__HOLE_CALL + (data - from) / RMIG__HOLE_SHARE);
            from = data;
            s->clear_data = data < reach ? end : data;
        }
        uint64_t end = rmig__min(rmig__min(s->clear_data, to), rmig__after(from, *budget));
        rmig__sink_clear_data(s, b, from, end);
        *budget -= end - from;
        from = end;
    }
    return from;
}

static int rmig__sink_check_clear(struct rmig_sink *s, const uint8_t *p, const struct rmig_header *h, uint32_t count) {
    if (count == 0 || count > RMIG_REPEAT_MAX || h->len != count * RMIG_COMPRESS_SIZE)
        return rmig__sink_bad(s, h, "must be 24 bytes an entry");
    uint64_t total = 0;
    for (uint32_t i = 0; i < count; i++) {
        struct rmig_compress run;
        rmig_decode_compress(p + (size_t)i * RMIG_COMPRESS_SIZE, RMIG_COMPRESS_SIZE, &run);
        const struct rmig__sink_block *b = rmig__sink_find(s, run.block);
        if (run.value != 0 || b == NULL || !rmig__inside(run.start, run.length, rmig__sink_local(s, b)->length))
            return RMIG__END(
                &s->ss, RMIG_ERR_PROTOCOL, 0,
                "the source sent %s of block %u, start 0x%llx, length 0x%llx, value %u: must be inside one of "
                "%u blocks, value 0",
                rmig_message_name(h->type), run.block, (unsigned long long)run.start, (unsigned long long)run.length,
                run.value, s->block_count);
        total += run.length;
        if (i > 0 && total > RMIG__CLEAR_BYTES)
            return rmig__sink_bad(s, h, "a batch clears at most 8 GiB");
    }
    return RMIG_OK;
}

/* RMIG_PENDING: there is more to clear than one call should; the message stays in the inbox. */
static int rmig__sink_on_clear(struct rmig_sink *s, const uint8_t *p, const struct rmig_header *h, uint32_t count) {
    int status = s->entry == 0 && s->clear_done == 0 ? rmig__sink_check_clear(s, p, h, count) : RMIG_OK;
    uint64_t budget = RMIG__STEP_SCAN;
    while (status == RMIG_OK && s->entry < count) {
        struct rmig_compress run;
        rmig_decode_compress(p + (size_t)s->entry * RMIG_COMPRESS_SIZE, RMIG_COMPRESS_SIZE, &run);
        const struct rmig_block *ram = rmig__sink_local(s, rmig__sink_find(s, run.block));
        uint64_t end = run.start + run.length;
        s->clear_done = rmig__sink_clear(s, ram, run.start + s->clear_done, end, &budget) - run.start;
        if (s->clear_done < run.length)
            return RMIG_PENDING;
        s->ss.stats.bytes_zero += run.length;
        s->clear_done = s->clear_data = 0;
        s->entry++;
    }
    s->entry = 0;
    return status;
}

/* What a source may register, and when.

   A source names ranges, a sink makes them writable, and the bytes that it pins are bounded by the RAM that there is,
   whatever the source asks for. An extended source's registrations do not overlap: what lies inside one is answered
   with it, what overlaps one otherwise is refused. A version 1 source cannot help overlaps, since neither end knows the
   other's chunks: its ranges are registered as asked while all of them together are no more than the block; then the
   whole block is, which covers all that is still to come. So no block is registered more than twice over.

   Registering is slow, and a message may ask for much. So it is done in steps: as many entries a call as the budget
   allows, while the message stays in the inbox (RMIG_PENDING); once the last one is there the reply is made by looking
   all of them up. */

/* This call has registered or deregistered as much as one should; before: the counters at its beginning. */
static bool rmig__sink_spent(const struct rmig_sink *s, const struct rmig_stats *before) {
    const struct rmig_stats *now = &s->ss.stats;
    uint64_t bytes = rmig__max(now->bytes_registered, before->bytes_registered) -
                     rmig__min(now->bytes_registered, before->bytes_registered);
    uint64_t regions = now->registrations - before->registrations + now->deregistrations - before->deregistrations;
    return bytes >= RMIG__STEP_REGISTER || regions >= RMIG__STEP_REGIONS;
}

/* May [from, to) be registered beside what is? A version 1 range may be widened to the whole block. */
static int rmig__sink_admit(struct rmig_sink *s, const struct rmig__sink_block *b, uint64_t *from, uint64_t *to) {
    const struct rmig_block *local = rmig__sink_local(s, b);
    const struct rmig__grant *g = s->ss.extended ? rmig__grants_overlapping(&s->grants, &b->units, *from, *to) : NULL;
    if (g != NULL)
        return RMIG__END(&s->ss, RMIG_ERR_PROTOCOL, 0,
                         "the source asked to register [0x%llx, 0x%llx) of block \"%.60s\", which overlaps [0x%llx, "
                         "0x%llx), registered before: must lie inside it or outside",
                         (unsigned long long)*from, (unsigned long long)*to, local->name, (unsigned long long)g->offset,
                         (unsigned long long)(g->offset + g->length));
    if (b->units.granted + (*to - *from) > local->length && local->length <= s->ss.caps.registration_max) {
        *from = 0;
        *to = local->length;
    }
    if (*to - *from > s->ss.caps.registration_max)
        return RMIG__END(&s->ss, RMIG_ERR_REGISTRATION, 0,
                         "block \"%.60s\": %llu bytes are asked for in one registration; fabric %s takes at most %llu",
                         local->name, (unsigned long long)(*to - *from), s->ss.fabric->ops->name,
                         (unsigned long long)s->ss.caps.registration_max);
    if (rmig__grants_slot(&s->grants) == NULL)
        return RMIG__END(&s->ss, RMIG_ERR_PROTOCOL, 0, "the source asked for more than %u registrations",
                         s->grants.capacity);
    if (b->units.granted + (*to - *from) > 2 * local->length)
        return RMIG__END(&s->ss, RMIG_ERR_PROTOCOL, 0,
                         "the source asked to register [0x%llx, 0x%llx) of block \"%.60s\": with %llu bytes registered "
                         "of it that is more than twice its length, %llu",
                         (unsigned long long)*from, (unsigned long long)*to, local->name,
                         (unsigned long long)b->units.granted, (unsigned long long)local->length);
    return RMIG_OK;
}

/* Makes sure that a registration covers [from, to) of a block. */
static int rmig__sink_register(struct rmig_sink *s, uint32_t index, uint64_t from, uint64_t to) {
    struct rmig__sink_block *b = &s->block[index];
    if (rmig__grants_covering(&s->grants, &b->units, from, to) != NULL)
        return RMIG_OK;
    int status = rmig__sink_admit(s, b, &from, &to);
    if (status != RMIG_OK)
        return status;
    struct rmig__grant *slot = rmig__grants_slot(&s->grants);
    bool unit_unknown = !s->ss.extended && !s->pin_all && !s->ss.caps.offset_addressing &&
                        rmig_get(&s->ss.cfg, RMIG_PARAM_PEER_CHUNK_SIZE) == 0;
    status = rmig__register(
        &s->ss, rmig__sink_local(s, b), from, to - from, RMIG_ACCESS_LOCAL_WRITE | RMIG_ACCESS_REMOTE_WRITE, &slot->mr,
        unit_unknown ? "; to register less at once, set peer-chunk-size to the source's (stock QEMU: 1M)" : "");
    if (status == RMIG_OK)
        rmig__grants_add(&s->grants, &b->units, slot, from, to);
    return status;
}

/* What a REGISTER_REQUEST covers. With a version 1 source neither end knows the other's chunk size, so a request is
   answered with a registration that suits any; where addresses count from each region's start, one region a block,
   because a version 1 source keeps one base address a block. */
static void rmig__sink_request_range(const struct rmig_sink *s, uint64_t length, const struct rmig_register *q,
                                     uint64_t *from, uint64_t *to) {
    *from = q->key / s->grants.unit * s->grants.unit;
    *to = length;
    if (!s->ss.extended && s->ss.caps.offset_addressing)
        *from = 0;
    else if (q->chunks < (length - *from) / s->grants.unit)
        *to = *from + (q->chunks + 1) * s->grants.unit;
}

/* Version 1 has 32 bits for a key. */
static int rmig__sink_check_key(struct rmig_sink *s, const struct rmig__grant *g) {
    if (g->mr.key != 0 && g->mr.key <= UINT32_MAX)
        return RMIG_OK;
    return RMIG__END(&s->ss, RMIG_ERR_SETUP, 0, "fabric %s: key 0x%llx does not fit the 32 bits of version 1",
                     s->ss.fabric->ops->name, (unsigned long long)g->mr.key);
}

/* Entry i of a REGISTER_REQUEST, and what of the block it covers. */
static void rmig__sink_request(const struct rmig_sink *s, const uint8_t *p, uint32_t i, struct rmig_register *q,
                               uint64_t *from, uint64_t *to) {
    rmig_decode_register(p + (size_t)i * RMIG_REGISTER_SIZE, RMIG_REGISTER_SIZE, q);
    rmig__sink_request_range(s, rmig__sink_local(s, &s->block[q->block])->length, q, from, to);
}

static int rmig__sink_check_requests(struct rmig_sink *s, const uint8_t *p, const struct rmig_header *h) {
    if (h->repeat == 0 || h->repeat > RMIG_REPEAT_MAX || h->len != h->repeat * RMIG_REGISTER_SIZE)
        return rmig__sink_bad(s, h, "must be 24 bytes a command, 1 to 4096 commands");
    for (uint32_t i = 0; i < h->repeat; i++) {
        struct rmig_register q;
        rmig_decode_register(p + (size_t)i * RMIG_REGISTER_SIZE, RMIG_REGISTER_SIZE, &q);
        const struct rmig__sink_block *b = rmig__sink_find(s, q.block);
        uint64_t length = b == NULL ? 0 : rmig__sink_local(s, b)->length;
        if (b == NULL || q.key >= length || q.chunks > length / RMIG_CHUNK_SIZE_MIN)
            return RMIG__END(
                &s->ss, RMIG_ERR_PROTOCOL, 0,
                "the source asked to register block %u, offset 0x%llx, %llu more chunks: outside the %u blocks",
                q.block, (unsigned long long)q.key, (unsigned long long)q.chunks, s->block_count);
    }
    return RMIG_OK;
}

/* RMIG_PENDING, as in on_batch: there is more to register than one call should. */
static int rmig__sink_on_register(struct rmig_sink *s, const uint8_t *p, const struct rmig_header *h, uint8_t *out) {
    struct rmig_stats before = s->ss.stats;
    struct rmig_register q;
    uint64_t from, to;
    int status = s->entry == 0 ? rmig__sink_check_requests(s, p, h) : RMIG_OK;
    for (; status == RMIG_OK && s->entry < h->repeat; s->entry++) {
        if (rmig__sink_spent(s, &before))
            return RMIG_PENDING;
        rmig__sink_request(s, p, s->entry, &q, &from, &to);
        status = rmig__sink_register(s, q.block, from, to);
    }
    s->entry = 0;
    for (uint32_t i = 0; status == RMIG_OK && i < h->repeat; i++) {
        rmig__sink_request(s, p, i, &q, &from, &to);
        const struct rmig__grant *g = rmig__grants_covering(&s->grants, &s->block[q.block].units, from, to);
        struct rmig_register_result result;
        result.rkey = (uint32_t)g->mr.key;
        result.base = g->mr.remote_address - g->offset; // wraps on purpose: base + offset in the block is what counts
        status = rmig__sink_check_key(s, g);
        rmig_encode_register_result(out + (size_t)i * RMIG_REGISTER_RESULT_SIZE, RMIG_REGISTER_RESULT_SIZE, &result);
    }
    if (status != RMIG_OK)
        return status;
    return rmig__send(&s->ss, RMIG_MSG_REGISTER_RESULT, h->repeat, (size_t)h->repeat * RMIG_REGISTER_RESULT_SIZE);
}

static int rmig__sink_check_batch(struct rmig_sink *s, const uint8_t *p, const struct rmig_header *h) {
    if (h->repeat == 0 || h->repeat > RMIG_REPEAT_MAX || h->len != h->repeat * RMIG_BATCH_SIZE)
        return rmig__sink_bad(s, h, "must be 24 bytes an entry, 1 to 4096 entries");
    for (uint32_t i = 0; i < h->repeat; i++) {
        struct rmig_batch q;
        rmig_decode_batch(p + (size_t)i * RMIG_BATCH_SIZE, RMIG_BATCH_SIZE, &q);
        const struct rmig__sink_block *b = rmig__sink_find(s, q.block);
        uint64_t length = b == NULL ? 0 : rmig__sink_local(s, b)->length;
        if (b == NULL || q.offset % s->chunk_size != 0 || !rmig__inside(q.offset, q.length, length) ||
            (q.length % s->chunk_size != 0 && q.offset + q.length != length) || q.length > s->ss.caps.registration_max)
            return RMIG__END(
                &s->ss, RMIG_ERR_PROTOCOL, 0,
                "the source asked to register block %u, offset 0x%llx, length 0x%llx: must be whole chunks inside "
                "one of %u blocks, at most %llu bytes",
                q.block, (unsigned long long)q.offset, (unsigned long long)q.length, s->block_count,
                (unsigned long long)s->ss.caps.registration_max);
    }
    return RMIG_OK;
}

static int rmig__sink_on_batch(struct rmig_sink *s, const uint8_t *p, const struct rmig_header *h, uint8_t *out) {
    struct rmig_stats before = s->ss.stats;
    struct rmig_batch q;
    int status = s->entry == 0 ? rmig__sink_check_batch(s, p, h) : RMIG_OK;
    for (; status == RMIG_OK && s->entry < h->repeat; s->entry++) {
        if (rmig__sink_spent(s, &before))
            return RMIG_PENDING;
        rmig_decode_batch(p + (size_t)s->entry * RMIG_BATCH_SIZE, RMIG_BATCH_SIZE, &q);
        status = rmig__sink_register(s, q.block, q.offset, q.offset + q.length);
    }
    s->entry = 0;
    if (status != RMIG_OK)
        return status;
    for (uint32_t i = 0; i < h->repeat; i++) {
        rmig_decode_batch(p + (size_t)i * RMIG_BATCH_SIZE, RMIG_BATCH_SIZE, &q);
        const struct rmig__grant *g =
            rmig__grants_covering(&s->grants, &s->block[q.block].units, q.offset, q.offset + q.length);
        struct rmig_batch_result result;
        result.key = g->mr.key;
        result.address = g->mr.remote_address + (q.offset - g->offset);
        rmig_encode_batch_result(out + (size_t)i * RMIG_BATCH_RESULT_SIZE, RMIG_BATCH_RESULT_SIZE, &result);
    }
    return rmig__send(&s->ss, RMIG_MSG_REGISTER_BATCH_RESULT, h->repeat, (size_t)h->repeat * RMIG_BATCH_RESULT_SIZE);
}

/* What the source calls a chunk; the smallest that it can be where that is unknown. */
static uint64_t rmig__sink_chunk(const struct rmig_sink *s) {
    uint64_t peer = rmig_get(&s->ss.cfg, RMIG_PARAM_PEER_CHUNK_SIZE);
    return s->ss.extended ? s->chunk_size : peer != 0 ? peer : RMIG_CHUNK_SIZE_MIN;
}

static int rmig__sink_on_unregister(struct rmig_sink *s, const uint8_t *p, const struct rmig_header *h) {
    struct rmig_stats before = s->ss.stats;
    if (h->repeat == 0 || h->repeat > RMIG_REPEAT_MAX || h->len != h->repeat * RMIG_REGISTER_SIZE)
        return rmig__sink_bad(s, h, "must be 24 bytes a command, 1 to 4096 commands");
    for (; s->entry < h->repeat; s->entry++) {
        struct rmig_register q;
        if (rmig__sink_spent(s, &before))
            return RMIG_PENDING;
        rmig_decode_register(p + (size_t)s->entry * RMIG_REGISTER_SIZE, RMIG_REGISTER_SIZE, &q);
        struct rmig__sink_block *b = rmig__sink_find(s, q.block);
        uint64_t chunks = b == NULL ? 0 : rmig_chunk_count(rmig__sink_local(s, b)->length, rmig__sink_chunk(s));
        struct rmig__grant *g =
            q.key < chunks ? rmig__grants_of(&s->grants, &b->units, q.key * rmig__sink_chunk(s)) : NULL;
        bool whole_block = g != NULL && !s->ss.extended && g->length > s->grants.unit &&
                           g->length == rmig__sink_local(s, b)->length; // perhaps more than was asked for
        if (g != NULL && (whole_block || s->grants.unit != rmig__sink_chunk(s)))
            continue; // its registration serves other chunks too, so it stays
        if (g == NULL || g->offset != q.key * s->grants.unit)
            return RMIG__END(&s->ss, RMIG_ERR_PROTOCOL, 0,
                             "the source asked to unregister chunk %llu of block %u, where no registration begins",
                             (unsigned long long)q.key, q.block);
        rmig__grants_remove(&s->grants, &b->units, g);
        if (rmig__deregister(&s->ss, &g->mr, g->length, &s->ss.error) != RMIG_OK)
            return rmig__session_end(&s->ss);
    }
    s->entry = 0;
    return rmig__send(&s->ss, RMIG_MSG_UNREGISTER_FINISHED, h->repeat, 0);
}

/* Version 1: the table of blocks, with the keys of whole blocks if they are pinned; RMIG_PENDING while they are being.
 */
static int rmig__sink_say_ram_blocks(struct rmig_sink *s, uint8_t *out) {
    struct rmig_stats before = s->ss.stats;
    int status = RMIG_OK;
    for (; s->pin_all && status == RMIG_OK && s->entry < s->block_count; s->entry++) {
        if (rmig__sink_spent(s, &before))
            return RMIG_PENDING;
        status = rmig__sink_register(s, s->entry, 0, rmig__sink_local(s, &s->block[s->entry])->length);
    }
    s->entry = 0;
    for (uint32_t i = 0; status == RMIG_OK && i < s->block_count; i++) {
        const struct rmig_block *b = rmig__sink_local(s, &s->block[i]);
        struct rmig_ram_block entry;
        memset(&entry, 0, sizeof entry);
        entry.length = b->length; // offset 0: keys and starts then count from the block's beginning
        if (s->pin_all) {
            const struct rmig__grant *g = rmig__grants_covering(&s->grants, &s->block[i].units, 0, b->length);
            entry.base = g->mr.remote_address;
            entry.rkey = (uint32_t)g->mr.key;
            status = rmig__sink_check_key(s, g);
        } else if (!s->ss.caps.offset_addressing) {
            entry.base = (uint64_t)(uintptr_t)b->host;
        }
        rmig_encode_ram_block(out + (size_t)i * RMIG_RAM_BLOCK_SIZE, RMIG_RAM_BLOCK_SIZE, &entry);
    }
    if (status != RMIG_OK)
        return status;
    s->state = RMIG__SINK_UP;
    return rmig__send(&s->ss, RMIG_MSG_RAM_BLOCKS_RESULT, 1, (size_t)s->block_count * RMIG_RAM_BLOCK_SIZE);
}

/* The handover, first half. The source's right to write is taken away where the fabric can; then the embedder has the
   word, for as long as it needs: the source hears FINISH_PENDING meanwhile. Until FINISH_RESULT has left the guest is
   the source's whatever happens. */
static int rmig__sink_on_finish(struct rmig_sink *s) {
    bool take = rmig_get(&s->ss.cfg, RMIG_PARAM_AUTO_TAKE) != 0;
    if (take && s->ss.taint.status != RMIG_OK)
        return RMIG__END(&s->ss, RMIG_ERR_SETUP, 0, "refused: a call at the sink failed: %.230s", s->ss.taint.text);
    rmig__sink_bar(s);
    s->state = take ? RMIG__SINK_TAKEN : RMIG__SINK_TAKING;
    s->event = take ? RMIG_SINK_NONE : RMIG_SINK_TAKE;
    return RMIG_OK;
}

static uint64_t rmig__pending_at(const struct rmig_sink *s) {
    bool due = s->state == RMIG__SINK_TAKING && (s->ss.peer_features & RMIG_FEATURE_FINISH_PENDING) != 0;
    return due ? rmig__idle_at(&s->ss) : RMIG_FOREVER;
}

/* What the source is to hear of the handover now. */
static int rmig__sink_answer(struct rmig_sink *s) {
    struct rmig__session *ss = &s->ss;
    if (rmig__payload(ss) == NULL)
        return RMIG_OK;
    if (s->state == RMIG__SINK_TAKEN) {
        s->state = RMIG__SINK_HANDOVER;
        return rmig__send(ss, RMIG_MSG_FINISH_RESULT, 1, 0);
    }
    return rmig__now(ss) >= rmig__pending_at(s) ? rmig__send(ss, RMIG_MSG_FINISH_PENDING, 1, 0) : RMIG_OK;
}

static int rmig__sink_dispatch(struct rmig_sink *s, const uint8_t *p, const struct rmig_header *h, uint8_t *out) {
    bool empty = h->len == 0, extended = s->ss.extended;
    switch (h->type) {
    case RMIG_MSG_RAM_BLOCKS_REQUEST:
        if (extended || !empty)
            break;
        rmig__sink_begin(s);
        s->state = s->block != NULL ? RMIG__SINK_TABLE : RMIG__SINK_ASKING; // asked again: the same answer
        s->event = s->block != NULL ? RMIG_SINK_NONE : RMIG_SINK_BLOCKS;
        return RMIG_OK;
    case RMIG_MSG_COMPRESS:
        return rmig__sink_on_clear(s, p, h, 1);
    case RMIG_MSG_REGISTER_REQUEST:
        return rmig__sink_on_register(s, p, h, out);
    case RMIG_MSG_UNREGISTER_REQUEST:
        return rmig__sink_on_unregister(s, p, h);
    case RMIG_MSG_REGISTER_FINISHED:
        if (!empty || s->block == NULL)
            break;
        s->ss.stats.rounds++;
        s->event = RMIG_SINK_ROUND;
        return RMIG_OK;
    case RMIG_MSG_BLOCKS:
        if (!extended)
            break;
        return rmig__sink_on_blocks(s, p, h);
    case RMIG_MSG_CLEAR_BATCH:
        if (!extended)
            break;
        return rmig__sink_on_clear(s, p, h, h->repeat);
    case RMIG_MSG_REGISTER_BATCH:
        if (!extended)
            break;
        return rmig__sink_on_batch(s, p, h, out);
    case RMIG_MSG_KEEPALIVE:
        if (!extended || !empty)
            break;
        return RMIG_OK;
    case RMIG_MSG_FINISH:
        if (!extended || !empty || s->block == NULL)
            break;
        return rmig__sink_on_finish(s);
    default:
        break;
    }
    return rmig__sink_bad(s, h, "not a message of a source at this point, or of another length");
}

/* The oldest message: handles it, or leaves it in the inbox while the embedder takes its bytes. */
static int rmig__sink_on_message(struct rmig_sink *s, bool *moved) {
    const struct rmig__received *r = &s->ss.inbox[0];
    const struct rmig_header *h = &r->header;
    uint8_t *out = rmig__payload(&s->ss);
    if (out == NULL)
        return RMIG_OK; // a reply may be due: wait for a free buffer
    const uint8_t *p = rmig__control_buffer(&s->ss, r->buffer) + RMIG_HEADER_SIZE;
    int status = RMIG_OK;
    if (s->state == RMIG__SINK_HELLO && h->type == RMIG_MSG_HELLO) {
        status = rmig__sink_on_hello(s, p, h, out);
    } else if (s->state == RMIG__SINK_HANDOVER && h->type == RMIG_MSG_GOODBYE && h->len == 0) {
        rmig__sink_leave(s);
    } else if (s->state != RMIG__SINK_UP || !s->ready_out) {
        return rmig__sink_bad(s, h,
                              s->state == RMIG__SINK_HELLO      ? "HELLO was due"
                              : s->state == RMIG__SINK_HANDOVER ? "GOODBYE was due"
                              : s->state >= RMIG__SINK_TAKING   ? "nothing was due before FINISH_RESULT"
                                                                : "two messages for one READY");
    } else if (h->type == RMIG_MSG_QEMU_FILE && h->len > 0) {
        /* Told again while bytes are left and some were taken, and when nothing else can come. */
        bool link_down = rmig__link_is_down(&s->ss.link);
        if (!s->ss.extended)
            rmig__sink_begin(s);
        if (!s->stream_told || s->stream_taken || link_down) {
            s->ss.stats.stream_bytes += s->stream_told ? 0 : h->len;
            s->stream_told = true;
            s->stream_taken = false;
            s->event = RMIG_SINK_STREAM;
            *moved = true;
        }
        return RMIG_OK;
    } else {
        status = rmig__sink_dispatch(s, p, h, out);
        s->ready_out = status == RMIG_PENDING;
    }
    if (status == RMIG_PENDING) { // as much as one call should do
        s->ss.again = true;
        return RMIG_OK;
    }
    *moved = true;
    if (status == RMIG_OK)
        rmig__inbox_pop(&s->ss);
    return status;
}

RMIG__DEF size_t rmig_sink_get(struct rmig_sink *s, void *buf, size_t n) {
    if (s == NULL || !s->stream_told || s->ss.inbox_count == 0 || s->ss.failed || buf == NULL)
        return 0;
    const struct rmig__received *r = &s->ss.inbox[0];
    size_t left = r->header.len - s->stream_at;
    n = n < left ? n : left;
    if (n > 0)
        memcpy(buf, rmig__control_buffer(&s->ss, r->buffer) + RMIG_HEADER_SIZE + s->stream_at, n);
    s->stream_at += n;
    s->stream_taken = n > 0;
    s->ss.again = true;
    if (s->stream_at == r->header.len) {
        s->stream_told = s->stream_taken = s->ready_out = false;
        s->stream_at = 0;
        rmig__inbox_pop(&s->ss);
    }
    return n;
}

/* A tainted sink takes nothing. The embedder may forgive, and call again; if it has not done so when it next calls
   process, it did not look, and the source is told. */
static bool rmig__sink_denies(struct rmig_sink *s) {
    s->denied = rmig__untainted(&s->ss) != RMIG_OK;
    return s->denied;
}

static void rmig__sink_deny(struct rmig_sink *s) {
    bool waits = s->state == RMIG__SINK_ASKING || s->state == RMIG__SINK_TAKING;
    if (s->denied && waits && s->ss.failed == RMIG_OK && s->ss.taint.status != RMIG_OK) {
        RMIG__END(&s->ss, RMIG_ERR_SETUP, 0, "refused: a call at the sink failed: %.230s", s->ss.taint.text);
        rmig__sink_spare(s);
    }
    s->denied = false;
}

// --- the blocks are agreed

/* The source's block i is which of ours? taken: a flag for each of ours. */
static int rmig__sink_match(struct rmig_sink *s, uint32_t i, uint8_t *taken, uint32_t *local) {
    if (!s->ss.extended) {
        *local = i;
        return RMIG_OK;
    }
    const char *name = s->names + s->peer[i].name;
    char shown[80];
    rmig__copy_text(shown, sizeof shown, (const uint8_t *)name, strlen(name));
    if (rmig_blocks_by_name(&s->blocks, name, local) != RMIG_OK)
        return RMIG__END(&s->ss, RMIG_ERR_SETUP, 0, "block \"%s\" of the source is not known at the sink", shown);
    if (s->blocks.block[*local].length != s->peer[i].length)
        return RMIG__END(&s->ss, RMIG_ERR_SETUP, 0, "block \"%s\" has %llu bytes at the source and %llu at the sink",
                         shown, (unsigned long long)s->peer[i].length,
                         (unsigned long long)s->blocks.block[*local].length);
    if (taken[*local])
        return RMIG__END(&s->ss, RMIG_ERR_PROTOCOL, 0, "the source named block \"%s\" twice", shown);
    taken[*local] = 1;
    return RMIG_OK;
}

static int rmig__sink_match_all(struct rmig_sink *s, uint32_t count) {
    uint8_t *taken = (uint8_t *)rmig__calloc(s->blocks.count, 1);
    if (taken == NULL)
        return RMIG__END(&s->ss, RMIG_ERR_SETUP, 0, "out of memory for the tables of %u blocks", count);
    int status = RMIG_OK;
    for (uint32_t i = 0; i < count && status == RMIG_OK; i++)
        status = rmig__sink_match(s, i, taken, &s->block[i].local);
    RMIG_FREE(taken);
    return status;
}

static int rmig__sink_tables(struct rmig_sink *s, uint32_t count) {
    struct rmig__session *ss = &s->ss;
    if (!ss->extended) {
        uint64_t peer = rmig_get(&ss->cfg, RMIG_PARAM_PEER_CHUNK_SIZE);
        s->grants.unit = peer != 0 ? peer : RMIG__V1_UNIT;
        while (s->grants.unit > RMIG_CHUNK_SIZE_MIN && s->grants.unit > ss->caps.registration_max)
            s->grants.unit /= 2;
    }
    s->block = (struct rmig__sink_block *)rmig__calloc(count, sizeof *s->block);
    if (s->block == NULL)
        return RMIG__END(ss, RMIG_ERR_SETUP, 0, "out of memory for the tables of %u blocks", count);
    int status = rmig__sink_match_all(s, count);
    if (status != RMIG_OK)
        return status;
    uint64_t units = 0;
    for (uint32_t i = 0; i < count; i++) {
        units += rmig_chunk_count(rmig__sink_local(s, &s->block[i])->length, s->grants.unit);
        s->ram_bytes += rmig__sink_local(s, &s->block[i])->length;
    }
    if (!rmig__grants_begin(&s->grants, units, count))
        return RMIG__END(ss, RMIG_ERR_SETUP, 0, "out of memory for the tables of %llu chunks",
                         (unsigned long long)units);
    uint32_t *unit = s->grants.units;
    for (uint32_t i = 0; i < count; i++) {
        s->block[i].units.grant = unit;
        unit += rmig_chunk_count(rmig__sink_local(s, &s->block[i])->length, s->grants.unit);
    }
    s->block_count = count;
    return RMIG_OK;
}

RMIG__DEF int rmig_sink_accept_blocks(struct rmig_sink *s) {
    if (s == NULL)
        return RMIG_ERR_ARGUMENT;
    struct rmig__session *ss = &s->ss;
    if (s->state != RMIG__SINK_ASKING)
        return RMIG__NO(ss, RMIG_ERR_STATE, 0, "rmig_sink_accept_blocks: wait for RMIG_SINK_BLOCKS first");
    if (rmig__sink_denies(s))
        return ss->taint.status;
    uint32_t count = ss->extended ? s->peer_count : s->blocks.count;
    if (!ss->extended && (count == 0 || count > RMIG__V1_BLOCKS_MAX))
        return RMIG__NO(ss, RMIG_ERR_STATE, 0, "rmig_sink_accept_blocks: %u blocks; a version 1 source takes 1 to %d",
                        count, RMIG__V1_BLOCKS_MAX);
    uint8_t *out = rmig__payload(ss);
    if (out == NULL)
        return RMIG__END(ss, RMIG_ERR_FABRIC, 0, "no send buffer is free although at most two are in use");
    int status = rmig__sink_tables(s, count);
    if (status == RMIG_OK)
        status = rmig__check_lockable(ss, &s->blocks,
                                      (s->asked.flags & RMIG_FLAG_PIN_ALL) != 0 ? UINT64_MAX : s->grants.unit);
    if (status != RMIG_OK) {
        rmig__sink_spare(s);
        return s->begun ? status : RMIG_ERR_FORGOTTEN;
    }
    rmig__sink_begin(s);
    ss->again = true;
    s->state = ss->extended ? RMIG__SINK_UP : RMIG__SINK_TABLE; // process makes the table: it may take long
    if (!ss->extended)
        return RMIG_OK;
    rmig__put_be32(out, 0);
    return rmig__send(&s->ss, RMIG_MSG_BLOCKS_RESULT, 1, 4);
}

RMIG__DEF int rmig_sink_refuse(struct rmig_sink *s, const char *reason) {
    if (s == NULL)
        return RMIG_ERR_ARGUMENT;
    if (s->ss.failed)
        return s->ss.failed;
    if (s->state <= RMIG__SINK_PARTING || s->state >= RMIG__SINK_TAKEN)
        return RMIG__NO(&s->ss, RMIG_ERR_STATE, 0, "rmig_sink_refuse: %s",
                        s->state == RMIG__SINK_TAKEN || s->state == RMIG__SINK_HANDOVER
                            ? "the guest is taken already"
                            : "there is no source to refuse");
    RMIG__END(&s->ss, RMIG_ERR_SETUP, 0, "refused: %.250s", reason == NULL ? "" : reason);
    rmig__sink_spare(s);
    return RMIG_OK;
}

RMIG__DEF int rmig_sink_take(struct rmig_sink *s) {
    if (s == NULL)
        return RMIG_ERR_ARGUMENT;
    if (s->ss.failed == RMIG_OK && s->state != RMIG__SINK_TAKING)
        return RMIG__NO(&s->ss, RMIG_ERR_STATE, 0, "rmig_sink_take: wait for RMIG_SINK_TAKE first, and take once");
    if (s->ss.failed != RMIG_OK || rmig__sink_denies(s))
        return rmig__untainted(&s->ss);
    s->state = RMIG__SINK_TAKEN;
    s->ss.again = true;
    return rmig__sink_answer(s);
}

/* Complete once the source has what was put on the return path. What it says on the first connection changes nothing
   any more. */
static void rmig__sink_returned(struct rmig_sink *s) {
    struct rmig__session *ss = &s->ss;
    if (s->ret.waiting == 0) {
        rmig__sink_leave(s);
        rmig__sink_left(s);
    } else if (!rmig__link_is_down(&ss->link) && rmig__ep_ended(ss->ep, &ss->sends_free)) {
        rmig__session_left(ss);
    }
}

RMIG__DEF int rmig_sink_complete(struct rmig_sink *s) {
    if (s == NULL)
        return RMIG_ERR_ARGUMENT;
    if (s->ss.failed)
        return s->ss.failed;
    if (s->ss.extended || s->block == NULL || s->state != RMIG__SINK_UP)
        return RMIG__NO(&s->ss, RMIG_ERR_STATE, 0,
                        "rmig_sink_complete: only for a version 1 source whose blocks were accepted; others finish by "
                        "themselves");
    if (rmig__untainted(&s->ss) != RMIG_OK)
        return rmig__untainted(&s->ss);
    if (s->disconnect_told || s->ret.sent > 0 || s->ret.spoke) // the source may take it for complete already
        s->ss.owner = RMIG__OWNER_OPEN;
    rmig__sink_bar(s);
    s->state = RMIG__SINK_RETURNING;
    rmig__return_last_word(s);
    rmig__sink_returned(s);
    s->ss.again = true;
    return RMIG_OK;
}

// --- the engine

static const char *rmig__sink_waits_for(const struct rmig_sink *s) {
    if (s->state >= RMIG__SINK_HELLO && s->state < RMIG__SINK_RETURNING && !rmig__all_sent(&s->ss) &&
        !s->disconnect_told)
        return "a message to be delivered";
    switch (s->state) {
    case RMIG__SINK_ACCEPTING:
        return "the connection";
    case RMIG__SINK_HELLO:
        return "HELLO";
    case RMIG__SINK_HANDOVER:
        return "GOODBYE";
    case RMIG__SINK_UP:
        return s->ready_out && s->ss.inbox_count == 0 && !s->disconnect_told ? "the next message" : NULL;
    default:
        return NULL;
    }
}

static struct rmig__wait rmig__sink_wait(const struct rmig_sink *s) {
    bool connecting = s->state <= RMIG__SINK_HELLO;
    /* A version 1 source says nothing while it writes to chunks that it has keys for, and no end sees the other's
       writes. So it is granted, beyond io-timeout, the time that a round over all of RAM takes on a slow link. */
    uint64_t more = connecting || s->ss.extended ? 0 : s->ram_bytes / RMIG__V1_BYTES_PER_US * 1000;
    return rmig__wait_for(&s->ss, rmig__sink_waits_for(s),
                          connecting ? RMIG_PARAM_CONNECT_TIMEOUT : RMIG_PARAM_IO_TIMEOUT, more);
}

static uint64_t rmig__sink_wake(const struct rmig_sink *s) {
    uint64_t at = rmig__min(rmig__session_wake(&s->ss), rmig__return_deadline(s));
    if (s->listener != NULL && !rmig__sink_listens(s))
        at = rmig__min(at, rmig__sink_unsure_until(s));
    if (rmig__payload(&s->ss) != NULL)
        at = rmig__min(at, rmig__pending_at(s));
    return rmig__return_can_send(s) ? rmig__min(at, rmig__now(&s->ss) + RMIG__MS) : at;
}

static int rmig__sink_timers(struct rmig_sink *s) {
    struct rmig__wait w = rmig__sink_wait(s);
    int status = rmig__wait_check(&s->ss, "source", &w);
    return status == RMIG_OK ? rmig__return_timers(s) : status;
}

static int rmig__sink_link(struct rmig_sink *s) {
    struct rmig__session *ss = &s->ss;
    /* What came before comes first; but an extended session cannot end well any more. */
    bool more = ss->inbox_count > 0 && (s->stream_told ? !ss->extended : rmig__payload(ss) != NULL);
    if (!rmig__link_is_down(&ss->link) || more || s->disconnect_told)
        return RMIG_OK;
    if (!ss->extended && s->block != NULL) {
        s->disconnect_told = true; // only the reader of the stream knows whether this is the end
        s->event = RMIG_SINK_DISCONNECTED;
        return RMIG_OK;
    }
    if (!rmig__link_was_up(&ss->link))
        return RMIG__END(ss, RMIG_ERR_FABRIC, ss->link.code, "%s", ss->link.text);
    return rmig__check_link(ss, "source");
}

static int rmig__sink_on_table(struct rmig_sink *s, bool *moved) {
    int status = rmig__sink_say_ram_blocks(s, rmig__payload(&s->ss));
    s->ss.again = s->ss.again || status == RMIG_PENDING;
    *moved = *moved || status == RMIG_OK;
    return status == RMIG_PENDING ? RMIG_OK : status;
}

static int rmig__sink_connection(struct rmig_sink *s, bool *moved) {
    struct rmig__session *ss = &s->ss;
    int status = rmig__session_poll(ss);
    if (status != RMIG_OK)
        return status;
    if (s->state == RMIG__SINK_ACCEPTING && rmig__link_was_up(&ss->link)) {
        s->state = ss->extended ? RMIG__SINK_HELLO : RMIG__SINK_UP;
        s->event = RMIG_SINK_CONNECTED;
        rmig__trace(ss, "connected, %s", ss->extended ? "extended" : "version 1");
        return RMIG_OK;
    }
    bool handed_over = s->state == RMIG__SINK_HANDOVER && ss->inbox_count > 0 &&
                       ss->inbox[0].header.type == RMIG_MSG_GOODBYE; // nothing behind it counts
    for (unsigned i = 0; i < ss->inbox_count && !handed_over; i++) // also behind what the embedder has not taken yet
        if (ss->inbox[i].header.type == RMIG_MSG_ERROR) {
            ss->owner = RMIG__OWNER_CERTAIN; // a source that gives up before GOODBYE keeps the guest
            return rmig__peer_error(ss, "source", &ss->inbox[i]);
        }
    if (ss->inbox_count > 0 && s->state != RMIG__SINK_ACCEPTING)
        status = rmig__sink_on_message(s, moved);
    if (s->state == RMIG__SINK_LEAVING)
        return RMIG_OK;
    if (status == RMIG_OK && s->event == RMIG_SINK_NONE)
        status = rmig__sink_link(s);
    if (status == RMIG_OK && (s->state == RMIG__SINK_TAKING || s->state == RMIG__SINK_TAKEN))
        status = rmig__sink_answer(s);
    if (status == RMIG_OK && s->state == RMIG__SINK_TABLE && rmig__payload(ss) != NULL)
        status = rmig__sink_on_table(s, moved);
    if (status != RMIG_OK || s->event != RMIG_SINK_NONE || s->state != RMIG__SINK_UP)
        return status;
    if (!s->ready_out && ss->inbox_count == 0 && !rmig__link_is_down(&ss->link) && rmig__payload(ss) != NULL) {
        s->ready_out = true;
        *moved = true;
        return rmig__send(ss, RMIG_MSG_READY, 1, 0);
    }
    return RMIG_OK;
}

static void rmig__sink_turn(struct rmig_sink *s, bool *moved) {
    if (s->state == RMIG__SINK_PARTING) {
        rmig__sink_part(s, moved);
        return;
    }
    if (s->state == RMIG__SINK_LEAVING) {
        rmig__sink_left(s);
        return;
    }
    if (s->state == RMIG__SINK_OVER)
        return;
    int status = rmig__return_poll(s);
    if (status == RMIG_OK && s->state == RMIG__SINK_RETURNING)
        rmig__sink_returned(s);
    else if (status == RMIG_OK && s->ss.ep != NULL)
        status = rmig__sink_connection(s, moved);
    if (status != RMIG_OK)
        rmig__sink_spare(s);
    else
        rmig__sink_poll_listener(s, moved);
}

/* Turns until there is an event or nothing moves. */
static int rmig__sink_step(struct rmig_sink *s) {
    bool moved = true;
    s->ss.again = s->ss.ready = false;
    s->requests = 0;
    rmig__sink_deny(s);
    for (unsigned turns = 0; moved && s->event == RMIG_SINK_NONE && s->ss.failed == RMIG_OK; turns++) {
        if (turns == 16) {
            s->ss.again = true;
            break;
        }
        moved = false;
        rmig__sink_turn(s, &moved);
    }
    if (s->ss.failed == RMIG_OK && s->event == RMIG_SINK_NONE && rmig__sink_timers(s) != RMIG_OK)
        rmig__sink_spare(s);
    return s->ss.failed;
}

RMIG__DEF int rmig_sink_process(struct rmig_sink *s, struct rmig_sink_event *ev) {
    if (ev != NULL)
        memset(ev, 0, sizeof *ev);
    if (s == NULL)
        return RMIG_ERR_ARGUMENT;
    if (ev == NULL)
        return RMIG__NO(&s->ss, RMIG_ERR_ARGUMENT, 0, "rmig_sink_process: ev is NULL");
    if (s->state == RMIG__SINK_OVER && s->event == RMIG_SINK_NONE)
        rmig__sink_release(s, RMIG__STEP_RELEASE);
    int status = rmig__sink_step(s);
    s->ss.failure_told = status != RMIG_OK;
    if (status != RMIG_OK)
        return status;
    ev->type = s->event;
    ev->block_count = s->event == RMIG_SINK_BLOCKS ? s->peer_count : 0;
    ev->round = s->event == RMIG_SINK_ROUND ? s->ss.stats.rounds : 0;
    ev->stream_bytes = s->event == RMIG_SINK_STREAM ? s->ss.inbox[0].header.len - s->stream_at : 0;
    s->event = RMIG_SINK_NONE;
    if (ev->type == RMIG_SINK_FORGOTTEN)
        s->ss.error = s->forgotten;
    if (ev->type != RMIG_SINK_NONE)
        s->ss.again = true;
    return RMIG_OK;
}

/* The endpoints that something may come from: at most 3. */
static size_t rmig__sink_eps(const struct rmig_sink *s, struct rmig_ep **eps) {
    size_t n = 0;
    bool leaving = s->state == RMIG__SINK_LEAVING;
    bool ended = s->state >= RMIG__SINK_RETURNING && rmig__link_is_down(&s->ss.link); // and polled no more
    if (rmig__sink_listens(s))
        eps[n++] = s->listener;
    if (s->ss.ep != NULL && !ended)
        eps[n++] = s->ss.ep;
    if (s->ret.ep != NULL && !leaving)
        eps[n++] = s->ret.ep;
    return n;
}

RMIG__DEF int rmig_sink_fds(struct rmig_sink *s, struct rmig_fd *fds, size_t n) {
    struct rmig_ep *eps[3];
    int count = 0;
    if (s == NULL)
        return RMIG_ERR_ARGUMENT;
    if (s->ss.failed || s->state == RMIG__SINK_OVER)
        return 0;
    s->ss.no_fds = false;
    size_t ep_count = rmig__sink_eps(s, eps);
    for (size_t i = 0; i < ep_count; i++) {
        int got = rmig__session_fds(&s->ss, eps[i], fds + count, n - (size_t)count);
        if (got < 0) {
            rmig__sink_spare(s);
            return s->ss.failed != RMIG_OK ? s->ss.failed : count;
        }
        count += got;
    }
    return count;
}

RMIG__DEF uint64_t rmig_sink_next_deadline(struct rmig_sink *s) {
    if (s == NULL)
        return RMIG_FOREVER;
    if (s->ss.failed)
        return s->ss.failure_told ? RMIG_FOREVER : 0;
    if (s->state == RMIG__SINK_OVER)
        return s->event != RMIG_SINK_NONE || s->grants.count > 0 ? 0 : RMIG_FOREVER;
    if (s->ss.ready || s->ss.again)
        return 0;
    if (s->state == RMIG__SINK_PARTING || s->state == RMIG__SINK_LEAVING)
        return s->ss.no_fds ? rmig__min(s->part_until, rmig__now(&s->ss) + RMIG__MS) : s->part_until;
    return rmig__min(rmig__sink_wait(s).until, rmig__sink_wake(s));
}

RMIG__DEF int rmig_sink_wait(struct rmig_sink *s, struct rmig_sink_event *ev, uint64_t timeout_ns) {
    if (s == NULL || ev == NULL)
        return rmig_sink_process(s, ev);
    uint64_t until = rmig__after(rmig__now(&s->ss), timeout_ns);
    for (;;) {
        int status = rmig_sink_process(s, ev);
        if (status != RMIG_OK || ev->type != RMIG_SINK_NONE)
            return status;
        s->ss.ready = false;
        uint64_t deadline = rmig__min(rmig_sink_next_deadline(s), until);
        if (rmig__now(&s->ss) >= until)
            return RMIG_OK;
        if (deadline == 0)
            continue;
        if (s->state == RMIG__SINK_OVER)
            return RMIG__NO(&s->ss, RMIG_ERR_STATE, 0, "rmig_sink_wait: the session is finished, no event will come");
        struct rmig_ep *eps[3];
        size_t n = rmig__sink_eps(s, eps);
        if (n == 0 && s->state == RMIG__SINK_NEW)
            return RMIG__NO(&s->ss, RMIG_ERR_STATE, 0, "rmig_sink_wait: listen first");
        if (n == 0 && deadline == RMIG_FOREVER)
            return RMIG__NO(&s->ss, RMIG_ERR_STATE, 0, "rmig_sink_wait: no connection is left, no event will come");
        if (s->ss.fabric->ops->wait(s->ss.fabric, eps, n, deadline, &s->ss.error) != RMIG_OK) {
            rmig__session_end(&s->ss);
            rmig__sink_spare(s); // it may be the source's connection that cannot be waited for
        }
    }
}

RMIG__DEF void rmig_sink_forgive(struct rmig_sink *s) {
    if (s != NULL)
        memset(&s->ss.taint, 0, sizeof s->ss.taint);
}

RMIG__DEF void rmig_sink_cancel(struct rmig_sink *s) {
    if (s != NULL && s->ss.failed == RMIG_OK && s->state < RMIG__SINK_LEAVING)
        RMIG__END(&s->ss, RMIG_ERR_CANCELLED, 0, "cancelled at the sink");
}

RMIG__DEF const struct rmig_error *rmig_sink_error(const struct rmig_sink *s) {
    return s == NULL ? &rmig__no_sink : &s->ss.error;
}

RMIG__DEF bool rmig_sink_extended(const struct rmig_sink *s) { return s != NULL && s->ss.extended; }

RMIG__DEF void rmig_sink_stats(const struct rmig_sink *s, struct rmig_stats *out) {
    if (out == NULL)
        return;
    memset(out, 0, sizeof *out);
    if (s != NULL)
        *out = s->ss.stats;
}

// >>stats: implementation

RMIG__DEF uint64_t rmig_expected_downtime_ns(const struct rmig_stats *stats, uint64_t dirty) {
    if (stats == NULL || stats->throughput == 0)
        return RMIG_FOREVER;
    double ns = (double)dirty * 1e9 / (double)stats->throughput + 2.0 * (double)stats->message_rtt_ns;
    return ns >= 1.8e19 ? RMIG_FOREVER : (uint64_t)ns;
}

#ifdef __cplusplus
}
#endif

#endif // RMIG_IMPLEMENTATION

/*
MIT License

Copyright (c) 2026 The rmig authors

Permission is hereby granted, free of charge, to any person obtaining a copy
of this software and associated documentation files (the "Software"), to deal
in the Software without restriction, including without limitation the rights
to use, copy, modify, merge, publish, distribute, sublicense, and/or sell
copies of the Software, and to permit persons to whom the Software is
furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all
copies or substantial portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR
IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY,
FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE
AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER
LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM,
OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE
SOFTWARE.
*/
