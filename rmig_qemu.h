/*
rmig_qemu.h - the framing of QEMU's migration stream, read and written

    Do this
        #define RMIG_IMPLEMENTATION
        #include "rmig.h"
        #include "rmig_qemu.h"
    in exactly *one* C or C++ file, and include it without the macro elsewhere. Bytes in, events out: no I/O, no clock,
    no allocation, nothing to link with but what rmig.h needs.

WHAT IT IS FOR

    A stock QEMU that migrates by RDMA sends its RAM by RDMA WRITE and everything else as a stream of bytes: the
    configuration of the machine, the list of its RAM blocks, marks where writes begin, and the state of its devices.
    rmig.h carries that stream; this header reads and writes it, so that a program can be the sink of a stock QEMU, or
    its source. A snapshot file of QEMU (mapped-ram) has the same framing.

READING

        struct rmig_qemu_reader reader;
        rmig_qemu_reader_init(&reader, 0);
        ...                                     // for each message of stream bytes, in as many pieces as it comes in
        struct rmig_qemu_event ev;
        do {
            int64_t used = rmig_qemu_reader_feed(&reader, p, n, &ev);
            if (used < 0)
                return fprintf(stderr, "%s\n", reader.error.text), -1;
            p += used;
            n -= (size_t)used;
            if (ev.type == RMIG_QEV_BLOCK)
                add_block(ev.block->name, ev.block->length);
            if (ev.type == RMIG_QEV_STATE)
                fwrite(ev.data, 1, ev.length, state_file);
        } while (ev.type != RMIG_QEV_NONE);
        ...                                     // where the message ends
        rmig_qemu_reader_end_message(&reader, &ev);
        if (ev.type == RMIG_QEV_END)
            all_is_there();

    The events of a migration by RDMA, in order (a command may come between sections):
        CONFIGURATION, SECTION (START), BLOCK..., RAM_LIST, HOOK, EOS, FOOTER,
        any number of times: SECTION (PART), HOOK, EOS, FOOTER,
        SECTION (END), HOOK, EOS, FOOTER, RAM_OVER, STATE..., END

    The state of the devices is opaque: its sections have no length, and only the QEMU that loads them can read them.
Its end is recognised by what QEMU sends last, a description of the devices in JSON with its length before it. That
    works when the length has a zero byte, as all below 16 MiB have, and never by chance in practice; a source without a
    return path confirms it by leaving. A machine that sends no description (suppress-vmdesc) is never at its END here.

WRITING

    Encoders, for a source that moves "RAM plus opaque device state":
        rmig_qemu_encode_start          magic, version, configuration
        rmig_qemu_encode_section        START of ram
        rmig_qemu_encode_mem_size       and for each block rmig_qemu_encode_block
        rmig_qemu_encode_word           HOOK; end the message there, send RAM in one round of rmig
        rmig_qemu_encode_word           EOS, then rmig_qemu_encode_footer
        rmig_qemu_encode_section        END of ram, then EOS and footer again
    then the device state as a reader has handed it out, which ends with the description; rmig_qemu_encode_end writes
    an end for state of one's own.

RETURN PATH

    On its second connection a source waits for messages of the sink: rmig_qemu_encode_return, rmig_qemu_decode_return.

WHAT IT REFUSES

    What has no length cannot be skipped, so a reader says what it is and where, and ends: sections other than ram
before RAM is over (VFIO, dirty bitmaps, devices of early setup), post-copy, packaged streams, COLO, pages inside the
    stream, capabilities that it does not know. Nothing that arrives is trusted: names, lengths and counts are bounded.

LICENCE

    MIT, see the end of rmig.h.
*/
#ifndef RMIG_QEMU_H
#define RMIG_QEMU_H

#include "rmig.h"

#ifdef RMIG_NAMESPACE
#define rmig_qemu_reader_init RMIG__NAME(rmig_qemu_reader_init)
#define rmig_qemu_reader_feed RMIG__NAME(rmig_qemu_reader_feed)
#define rmig_qemu_reader_end_message RMIG__NAME(rmig_qemu_reader_end_message)
#define rmig_qemu_reader_jump RMIG__NAME(rmig_qemu_reader_jump)
#define rmig_qemu_reader_offset RMIG__NAME(rmig_qemu_reader_offset)
#define rmig_qemu_reader_whole RMIG__NAME(rmig_qemu_reader_whole)
#define rmig_qemu_command_name RMIG__NAME(rmig_qemu_command_name)
#define rmig_qemu_encode_start RMIG__NAME(rmig_qemu_encode_start)
#define rmig_qemu_encode_section RMIG__NAME(rmig_qemu_encode_section)
#define rmig_qemu_encode_mem_size RMIG__NAME(rmig_qemu_encode_mem_size)
#define rmig_qemu_encode_block RMIG__NAME(rmig_qemu_encode_block)
#define rmig_qemu_encode_word RMIG__NAME(rmig_qemu_encode_word)
#define rmig_qemu_encode_footer RMIG__NAME(rmig_qemu_encode_footer)
#define rmig_qemu_encode_command RMIG__NAME(rmig_qemu_encode_command)
#define rmig_qemu_encode_end RMIG__NAME(rmig_qemu_encode_end)
#define rmig_qemu_encode_return RMIG__NAME(rmig_qemu_encode_return)
#define rmig_qemu_decode_return RMIG__NAME(rmig_qemu_decode_return)
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define RMIG_QEMU_BLOCKS_MAX 16383 // in one list: what a RAM_BLOCKS_RESULT can carry

/* Capabilities that a configuration lists because they change the stream. */
#define RMIG_QEMU_CAPABILITY_IGNORE_SHARED 1u // "x-ignore-shared": blocks have a guest address
#define RMIG_QEMU_CAPABILITY_MAPPED_RAM 2u // "mapped-ram": blocks have a mapped-ram header. Only in files

struct rmig_qemu_configuration {
    char machine[RMIG_NAME_MAX + 1]; // "pc-q35-7.2"; "": the stream has no configuration
    uint32_t page_bits; // 0: not said, which means the target's usual size (x86: 12)
    uint32_t capabilities; // RMIG_QEMU_CAPABILITY_*
    bool has_uuid;
    uint8_t uuid[16];
};

#define RMIG_QEMU_MAPPED_RAM_SIZE 28
struct rmig_qemu_mapped_ram { // u32 version, u64 page size, u64 bitmap offset, u64 pages offset; offsets in the file
    uint32_t version;
    uint64_t page_size, bitmap_offset, pages_offset;
};

struct rmig_qemu_block {
    char name[RMIG_NAME_MAX + 1]; // any bytes but NUL
    uint64_t length; // used length, bytes
    uint64_t guest_address; // with RMIG_QEMU_CAPABILITY_IGNORE_SHARED, else 0
    struct rmig_qemu_mapped_ram mapped; // with RMIG_QEMU_CAPABILITY_MAPPED_RAM, else 0. Not checked
};

enum rmig_qemu_section {
    RMIG_QEMU_SECTION_START = 1,
    RMIG_QEMU_SECTION_PART = 2,
    RMIG_QEMU_SECTION_END = 3,
    RMIG_QEMU_SECTION_FULL = 4
};

enum rmig_qemu_word { RMIG_QEMU_WORD_MEM_SIZE = 0x04, RMIG_QEMU_WORD_EOS = 0x10, RMIG_QEMU_WORD_HOOK = 0x80 };

#define RMIG_QEMU_COMMAND_LIST(X)                                                                                      \
    X(OPEN_RETURN_PATH, 1)                                                                                             \
    X(PING, 2)                                                                                                         \
    X(POSTCOPY_ADVISE, 3)                                                                                              \
    X(POSTCOPY_LISTEN, 4)                                                                                              \
    X(POSTCOPY_RUN, 5)                                                                                                 \
    X(POSTCOPY_RAM_DISCARD, 6)                                                                                         \
    X(PACKAGED, 7)                                                                                                     \
    X(ENABLE_COLO, 8)                                                                                                  \
    X(POSTCOPY_RESUME, 9)                                                                                              \
    X(RECV_BITMAP, 10)                                                                                                 \
    X(SWITCHOVER_START, 11)

enum rmig_qemu_command {
#define RMIG__X(name, value) RMIG_QEMU_COMMAND_##name = value,
    RMIG_QEMU_COMMAND_LIST(RMIG__X)
#undef RMIG__X
};
RMIG_API const char *rmig_qemu_command_name(uint32_t command); // "PING" ..., "unknown"

// >>qemu: reader

enum rmig_qemu_event_type {
    RMIG_QEV_NONE, // all bytes are used up
    RMIG_QEV_CONFIGURATION, // configuration
    RMIG_QEV_COMMAND, // command; PING: value, to be returned in PONG
    RMIG_QEV_SECTION, // a section of ram begins: section, section_id
    RMIG_QEV_BLOCK, // block: one of the list
    RMIG_QEV_RAM_LIST, // the list is complete: block_count, total
    RMIG_QEV_HOOK, // RAM goes now by messages and writes of its own; the message ends here
    RMIG_QEV_EOS, // the data of the section ends: section, section_id
    RMIG_QEV_FOOTER, // section_id
    RMIG_QEV_RAM_OVER, // the rest is opaque device state
    RMIG_QEV_STATE, // data, length: bytes of it
    RMIG_QEV_END // end_message: the stream is whole
};

struct rmig_qemu_event {
    enum rmig_qemu_event_type type;
    const struct rmig_qemu_configuration *configuration; // pointers: valid until the next call on the reader
    const struct rmig_qemu_block *block;
    uint32_t block_count;
    uint64_t total; // bytes of all blocks
    enum rmig_qemu_section section;
    uint32_t section_id;
    uint32_t command; // enum rmig_qemu_command
    uint32_t value;
    const uint8_t *data; // inside what was fed
    size_t length;
};

enum rmig__qemu_state {
    RMIG__QEMU_MAGIC,
    RMIG__QEMU_ELEMENT, // looks at a byte before it takes it
    RMIG__QEMU_MACHINE_LENGTH,
    RMIG__QEMU_MACHINE,
    RMIG__QEMU_SUBSECTION_LENGTH,
    RMIG__QEMU_SUBSECTION,
    RMIG__QEMU_PAGE_BITS,
    RMIG__QEMU_CAPABILITY_COUNT,
    RMIG__QEMU_CAPABILITY_LENGTH,
    RMIG__QEMU_CAPABILITY,
    RMIG__QEMU_UUID,
    RMIG__QEMU_COMMAND,
    RMIG__QEMU_PING,
    RMIG__QEMU_SECTION_ID,
    RMIG__QEMU_IDSTR_LENGTH,
    RMIG__QEMU_IDSTR,
    RMIG__QEMU_INSTANCE,
    RMIG__QEMU_WORD,
    RMIG__QEMU_LIST, // takes nothing: one more block, or the end of the list
    RMIG__QEMU_BLOCK_NAME_LENGTH,
    RMIG__QEMU_BLOCK_NAME,
    RMIG__QEMU_BLOCK_NUMBERS,
    RMIG__QEMU_FOOTER,
    RMIG__QEMU_STATE
};

/* Of fixed size, owned by the caller; copy it freely. */
struct rmig_qemu_reader {
    struct rmig_error error; // why feed refused
    struct rmig_qemu_configuration configuration; // known from RMIG_QEV_CONFIGURATION on
    /* What follows is private. */
    enum rmig__qemu_state state_;
    unsigned flags_;
    uint64_t offset_; // of the next byte
    uint64_t element_; // of the first byte of what is being read
    size_t have_, want_; // bytes of field_
    uint8_t field_[264];
    bool prologue_; // a configuration, or more of it, may come
    bool closed_; // a section's data has ended, its footer may come
    bool started_, listed_, hook_, whole_;
    uint32_t seen_; // subsections
    uint32_t capabilities_left_;
    enum rmig_qemu_section section_;
    uint32_t id_, ram_id_;
    struct rmig_qemu_block block_;
    uint32_t block_count_;
    uint64_t total_, sum_;
    uint64_t history_; // the last 8 bytes of state
    uint8_t near_[10]; // around the last zero byte of state: 5 before, itself, 4 behind
    uint64_t since_; // bytes behind it
    uint64_t first_end_; // where the first end of a description was; 0: none was yet
};

#define RMIG_QEMU_MAPPED_RAM 1u // flag: the stream is in a file and may have the capability mapped-ram

/* flags: 0, or RMIG_QEMU_MAPPED_RAM. */
RMIG_API void rmig_qemu_reader_init(struct rmig_qemu_reader *r, unsigned flags);
/* Reads p[0 ... n-1] up to the next event. Returns how many bytes were used (0 is possible) with *ev filled in, or
   RMIG_ERR_WIRE with r->error: the stream is malformed or holds what cannot be skipped; the text says what and where.
   The same error comes again from every later call. Call it until the event is RMIG_QEV_NONE: then all bytes are used.
   RMIG_ERR_ARGUMENT: r, ev, or p with n > 0, is NULL; nothing changed. */
RMIG_API int64_t rmig_qemu_reader_feed(struct rmig_qemu_reader *r, const void *p, size_t n, struct rmig_qemu_event *ev);
/* The message of which bytes were fed ends here, or the file: RMIG_QEV_END in *ev if all of the stream may be there.
   What is fed later goes on as device state. Returns RMIG_OK or the reader's error. */
RMIG_API int rmig_qemu_reader_end_message(struct rmig_qemu_reader *r, struct rmig_qemu_event *ev);
/* The last end_message found the stream whole, and nothing has come since. */
RMIG_API bool rmig_qemu_reader_whole(const struct rmig_qemu_reader *r);
/* The offset of the next byte to be fed; jump sets it, where the carrier skips bytes (the pages of mapped-ram). */
RMIG_API uint64_t rmig_qemu_reader_offset(const struct rmig_qemu_reader *r);
RMIG_API void rmig_qemu_reader_jump(struct rmig_qemu_reader *r, uint64_t offset);

// >>qemu: writer

/* Encoders write into out[0 ... cap-1] and return the bytes written, RMIG_ERR_FULL if cap is too small, or
   RMIG_ERR_ARGUMENT for what cannot be written (a name too long, an empty one, a number that is none of its enum,
   NULL). *out is left alone then. */
#define RMIG_QEMU_START_MAX 480 // no encode_start is longer
#define RMIG_QEMU_BLOCK_MAX 300 // no encode_block is longer
#define RMIG_QEMU_SMALL_MAX 20 // no other is longer, but for encode_end

/* Magic, version and configuration; a machine of "" leaves the configuration out. */
RMIG_API int rmig_qemu_encode_start(uint8_t *out, size_t cap, const struct rmig_qemu_configuration *in);
RMIG_API int rmig_qemu_encode_section(uint8_t *out, size_t cap, enum rmig_qemu_section section, uint32_t section_id);
/* total: lengths of all blocks, a multiple of 1024. */
RMIG_API int rmig_qemu_encode_mem_size(uint8_t *out, size_t cap, uint64_t total);
/* capabilities: as in the configuration; they decide what belongs to an entry. */
RMIG_API int rmig_qemu_encode_block(uint8_t *out, size_t cap, const struct rmig_qemu_block *in, uint32_t capabilities);
RMIG_API int rmig_qemu_encode_word(uint8_t *out, size_t cap, enum rmig_qemu_word word); // EOS or HOOK
RMIG_API int rmig_qemu_encode_footer(uint8_t *out, size_t cap, uint32_t section_id);
/* OPEN_RETURN_PATH, PING (with value) or SWITCHOVER_START. */
RMIG_API int rmig_qemu_encode_command(uint8_t *out, size_t cap, enum rmig_qemu_command command, uint32_t value);
/* The end of device state and the description of the devices: n bytes of JSON, "{...}", less than 16 MiB. */
RMIG_API int rmig_qemu_encode_end(uint8_t *out, size_t cap, const char *description, size_t n);

// >>qemu: return path

enum rmig_qemu_return_type {
    RMIG_QEMU_RETURN_SHUT = 1, // value: 0: the sink has all, else its error. The source waits for it
    RMIG_QEMU_RETURN_PONG = 2, // value: of the PING
    RMIG_QEMU_RETURN_SWITCHOVER_ACK = 7 // only if the source has the capability switchover-ack
};
#define RMIG_QEMU_RETURN_MAX 8
struct rmig_qemu_return { // u16 type, u16 length, u32 value (not in SWITCHOVER_ACK)
    uint32_t type; // enum rmig_qemu_return_type
    uint32_t value;
};
RMIG_API int rmig_qemu_encode_return(uint8_t *out, size_t cap, const struct rmig_qemu_return *in);
/* One message off the front of p[0 ... n-1]: the bytes it took, 0 if it is not whole yet, or RMIG_ERR_WIRE: another
   type (they belong to post-copy), or another length than the type's. */
RMIG_API int rmig_qemu_decode_return(const uint8_t *p, size_t n, struct rmig_qemu_return *out);

#ifdef __cplusplus
}
#endif

#endif // RMIG_QEMU_H

#if defined(RMIG_IMPLEMENTATION) && !defined(RMIG_QEMU_IMPLEMENTATION_DONE)
#define RMIG_QEMU_IMPLEMENTATION_DONE

#ifdef __cplusplus
extern "C" {
#endif

// >>qemu: bytes

enum {
    RMIG__QEMU_EOF = 0x00,
    RMIG__QEMU_SUBSECTION_MARK = 0x05,
    RMIG__QEMU_VMDESC_MARK = 0x06,
    RMIG__QEMU_CONFIGURATION_MARK = 0x07,
    RMIG__QEMU_COMMAND_MARK = 0x08,
    RMIG__QEMU_FOOTER_MARK = 0x7e,
    RMIG__QEMU_MAGIC_SIZE = 8,
    RMIG__QEMU_FLAGS = 0x3ff, // of a word of ram; the rest is an address or a size
    RMIG__QEMU_RAM_VERSION = 4,
    RMIG__QEMU_SUBSECTION_VERSION = 1
};

static const uint8_t rmig__qemu_magic[RMIG__QEMU_MAGIC_SIZE] = {0x51, 0x45, 0x56, 0x4d, 0, 0, 0, 3};

#define RMIG__QEMU_PAGE_BITS_NAME "configuration/target-page-bits"
#define RMIG__QEMU_CAPABILITIES_NAME "configuration/capabilities"
#define RMIG__QEMU_UUID_NAME "configuration/uuid"
#define RMIG__QEMU_IGNORE_SHARED_NAME "x-ignore-shared"
#define RMIG__QEMU_MAPPED_RAM_NAME "mapped-ram"

RMIG__DEF const char *rmig_qemu_command_name(uint32_t command) {
    switch (command) {
#define RMIG__X(name, value)                                                                                           \
    case value:                                                                                                        \
        return #name;
        RMIG_QEMU_COMMAND_LIST(RMIG__X)
#undef RMIG__X
    default:
        return "unknown";
    }
}

// >>qemu: reader, implementation

/* Refuses the stream: what is wrong with that which begins at offset element_. */
#if defined(__GNUC__)
__attribute__((format(printf, 2, 3)))
#endif
static void
rmig__qemu_refuse(struct rmig_qemu_reader *r, const char *format, ...) {
    char text[260];
    va_list ap;
    va_start(ap, format);
    vsnprintf(text, sizeof text, format, ap);
    va_end(ap);
    rmig_fail(&r->error, RMIG_ERR_WIRE, 0, "stream offset %llu: %s", (unsigned long long)r->element_, text);
}

static void rmig__qemu_expect(struct rmig_qemu_reader *r, enum rmig__qemu_state state, size_t bytes) {
    r->state_ = state;
    r->want_ = bytes;
    r->have_ = 0;
}

static void rmig__qemu_tell(const struct rmig_qemu_reader *r, struct rmig_qemu_event *ev,
                            enum rmig_qemu_event_type type) {
    ev->type = type;
    ev->section = r->section_;
    ev->section_id = r->id_;
    ev->block_count = r->block_count_;
    ev->total = r->total_;
}

RMIG__DEF void rmig_qemu_reader_init(struct rmig_qemu_reader *r, unsigned flags) {
    if (r == NULL)
        return;
    memset(r, 0, sizeof *r);
    r->flags_ = flags;
    memset(r->near_, 0xff, sizeof r->near_); // no zero byte was seen
    r->history_ = UINT64_MAX;
    rmig__qemu_expect(r, RMIG__QEMU_MAGIC, RMIG__QEMU_MAGIC_SIZE);
}

RMIG__DEF uint64_t rmig_qemu_reader_offset(const struct rmig_qemu_reader *r) { return r == NULL ? 0 : r->offset_; }

RMIG__DEF void rmig_qemu_reader_jump(struct rmig_qemu_reader *r, uint64_t offset) {
    if (r != NULL)
        r->offset_ = offset;
}

RMIG__DEF bool rmig_qemu_reader_whole(const struct rmig_qemu_reader *r) { return r != NULL && r->whole_; }

/* The collected field as text for an error: quoted by the caller, unprintable bytes replaced, cut. */
struct rmig__qemu_text {
    char s[64];
};

static struct rmig__qemu_text rmig__qemu_show(const void *p, size_t n) {
    struct rmig__qemu_text text;
    memset(&text, 0, sizeof text);
    rmig__copy_text(text.s, sizeof text.s, (const uint8_t *)p, n);
    return text;
}

static bool rmig__qemu_is(const struct rmig_qemu_reader *r, const char *name) {
    return r->have_ == strlen(name) && memcmp(r->field_, name, r->have_) == 0;
}

// --- the configuration

static void rmig__qemu_on_magic(struct rmig_qemu_reader *r) {
    if (memcmp(r->field_, rmig__qemu_magic, 4) != 0) {
        rmig__qemu_refuse(r, "bytes %02x %02x %02x %02x: not a migration stream of QEMU, which begins with \"QEVM\"",
                          r->field_[0], r->field_[1], r->field_[2], r->field_[3]);
        return;
    }
    if (memcmp(r->field_, rmig__qemu_magic, sizeof rmig__qemu_magic) != 0) {
        rmig__qemu_refuse(r, "migration stream of version %u; must be 3", rmig__get_be32(r->field_ + 4));
        return;
    }
    r->prologue_ = true;
    rmig__qemu_expect(r, RMIG__QEMU_ELEMENT, 0);
}

static void rmig__qemu_on_machine_length(struct rmig_qemu_reader *r) {
    uint32_t n = rmig__get_be32(r->field_);
    if (n == 0 || n > RMIG_NAME_MAX)
        rmig__qemu_refuse(r, "configuration: a machine name of %u bytes; must be 1 to %d", n, RMIG_NAME_MAX);
    else
        rmig__qemu_expect(r, RMIG__QEMU_MACHINE, n);
}

static void rmig__qemu_on_machine(struct rmig_qemu_reader *r) {
    if (memchr(r->field_, 0, r->have_) != NULL) {
        rmig__qemu_refuse(r, "configuration: the machine name holds a zero byte");
        return;
    }
    memcpy(r->configuration.machine, r->field_, r->have_);
    r->configuration.machine[r->have_] = '\0';
    rmig__qemu_expect(r, RMIG__QEMU_ELEMENT, 0);
}

/* Name and u32 version. */
static void rmig__qemu_on_subsection(struct rmig_qemu_reader *r) {
    static const char *const name[] = {RMIG__QEMU_PAGE_BITS_NAME, RMIG__QEMU_CAPABILITIES_NAME, RMIG__QEMU_UUID_NAME};
    static const enum rmig__qemu_state next[] = {RMIG__QEMU_PAGE_BITS, RMIG__QEMU_CAPABILITY_COUNT, RMIG__QEMU_UUID};
    static const size_t bytes[] = {4, 4, 16};
    r->have_ -= 4;
    struct rmig__qemu_text shown = rmig__qemu_show(r->field_, r->have_);
    uint32_t version = rmig__get_be32(r->field_ + r->have_);
    unsigned i = 0;
    while (i < 3 && !rmig__qemu_is(r, name[i]))
        i++;
    if (i == 3) {
        rmig__qemu_refuse(r, "configuration: subsection \"%s\" is not known, and cannot be skipped", shown.s);
        return;
    }
    if (version != RMIG__QEMU_SUBSECTION_VERSION || (r->seen_ & (1u << i)) != 0) {
        rmig__qemu_refuse(r, "configuration: subsection \"%s\", version %u: must be version 1, and come once", shown.s,
                          version);
        return;
    }
    r->seen_ |= 1u << i;
    rmig__qemu_expect(r, next[i], bytes[i]);
}

static void rmig__qemu_on_page_bits(struct rmig_qemu_reader *r) {
    uint32_t bits = rmig__get_be32(r->field_);
    if (bits < 10 || bits > 30) {
        rmig__qemu_refuse(r, "configuration: target pages of %u bits; must be 10 to 30", bits);
        return;
    }
    r->configuration.page_bits = bits;
    rmig__qemu_expect(r, RMIG__QEMU_ELEMENT, 0);
}

static void rmig__qemu_next_capability(struct rmig_qemu_reader *r) {
    if (r->capabilities_left_ == 0)
        rmig__qemu_expect(r, RMIG__QEMU_ELEMENT, 0);
    else
        rmig__qemu_expect(r, RMIG__QEMU_CAPABILITY_LENGTH, 1);
}

static void rmig__qemu_on_capability_count(struct rmig_qemu_reader *r) {
    r->capabilities_left_ = rmig__get_be32(r->field_);
    if (r->capabilities_left_ > 2) // of those known; one twice is refused too
        rmig__qemu_refuse(r, "configuration: %u capabilities; at most 2 are known", r->capabilities_left_);
    else
        rmig__qemu_next_capability(r);
}

static void rmig__qemu_on_capability(struct rmig_qemu_reader *r) {
    uint32_t bit = rmig__qemu_is(r, RMIG__QEMU_IGNORE_SHARED_NAME) ? RMIG_QEMU_CAPABILITY_IGNORE_SHARED
                   : rmig__qemu_is(r, RMIG__QEMU_MAPPED_RAM_NAME)  ? RMIG_QEMU_CAPABILITY_MAPPED_RAM
                                                                   : 0;
    struct rmig__qemu_text shown = rmig__qemu_show(r->field_, r->have_);
    if (bit == 0 || (r->configuration.capabilities & bit) != 0) {
        rmig__qemu_refuse(r, "configuration: capability \"%s\" %s", shown.s,
                          bit != 0                        ? "is listed twice"
                          : rmig__qemu_is(r, "fixed-ram") ? "is an early form of mapped-ram that no release of QEMU "
                                                            "wrote: save again with QEMU 9.0 or later"
                                                          : "is not known; switch it off at the source");
        return;
    }
    if (bit == RMIG_QEMU_CAPABILITY_MAPPED_RAM && (r->flags_ & RMIG_QEMU_MAPPED_RAM) == 0) {
        rmig__qemu_refuse(r, "configuration: capability \"mapped-ram\" is for files; switch it off at the source");
        return;
    }
    r->configuration.capabilities |= bit;
    r->capabilities_left_--;
    rmig__qemu_next_capability(r);
}

static void rmig__qemu_on_uuid(struct rmig_qemu_reader *r) {
    memcpy(r->configuration.uuid, r->field_, sizeof r->configuration.uuid);
    r->configuration.has_uuid = true;
    rmig__qemu_expect(r, RMIG__QEMU_ELEMENT, 0);
}

// --- commands

/* Why a command cannot be carried out, or NULL. */
static const char *rmig__qemu_command_reason(uint32_t command, uint32_t n) {
    switch (command) {
    case RMIG_QEMU_COMMAND_OPEN_RETURN_PATH:
    case RMIG_QEMU_COMMAND_SWITCHOVER_START:
        return n == 0 ? NULL : "must have no data";
    case RMIG_QEMU_COMMAND_PING:
        return n == 4 ? NULL : "must have 4 bytes of data";
    case RMIG_QEMU_COMMAND_POSTCOPY_ADVISE: // without data it only says that dirty bitmaps may follow
        return n == 0 ? NULL : "post-copy is announced; switch the capability postcopy-ram off at the source";
    case RMIG_QEMU_COMMAND_PACKAGED:
        return "a stream packaged in this one cannot be skipped; migrate without post-copy";
    case RMIG_QEMU_COMMAND_ENABLE_COLO:
        return "COLO has no end; switch the capability x-colo off at the source";
    case RMIG_QEMU_COMMAND_POSTCOPY_LISTEN:
    case RMIG_QEMU_COMMAND_POSTCOPY_RUN:
    case RMIG_QEMU_COMMAND_POSTCOPY_RAM_DISCARD:
    case RMIG_QEMU_COMMAND_POSTCOPY_RESUME:
    case RMIG_QEMU_COMMAND_RECV_BITMAP:
        return "belongs to post-copy; switch the capability postcopy-ram off at the source";
    default:
        return "is not known";
    }
}

static void rmig__qemu_tell_command(struct rmig_qemu_reader *r, struct rmig_qemu_event *ev, uint32_t command,
                                    uint32_t value) {
    rmig__qemu_expect(r, RMIG__QEMU_ELEMENT, 0);
    rmig__qemu_tell(r, ev, RMIG_QEV_COMMAND);
    ev->command = command;
    ev->value = value;
}

static void rmig__qemu_on_command(struct rmig_qemu_reader *r, struct rmig_qemu_event *ev) {
    uint32_t both = rmig__get_be32(r->field_), command = both >> 16, n = both & 0xffff;
    const char *reason = rmig__qemu_command_reason(command, n);
    if (reason != NULL)
        rmig__qemu_refuse(r, "command %s (%u) with %u bytes of data: %s", rmig_qemu_command_name(command), command, n,
                          reason);
    else if (command == RMIG_QEMU_COMMAND_PING)
        rmig__qemu_expect(r, RMIG__QEMU_PING, 4);
    else
        rmig__qemu_tell_command(r, ev, command, 0);
}

// --- sections

static void rmig__qemu_on_section_id(struct rmig_qemu_reader *r, struct rmig_qemu_event *ev) {
    r->id_ = rmig__get_be32(r->field_);
    if (r->section_ == RMIG_QEMU_SECTION_START || r->section_ == RMIG_QEMU_SECTION_FULL) {
        rmig__qemu_expect(r, RMIG__QEMU_IDSTR_LENGTH, 1);
        return;
    }
    const char *kind = r->section_ == RMIG_QEMU_SECTION_PART ? "PART" : "END";
    if (!r->started_) {
        rmig__qemu_refuse(r, "section %s (id %u) before the START of ram", kind, r->id_);
        return;
    }
    if (r->id_ != r->ram_id_) {
        rmig__qemu_refuse(r, "section %s of id %u, which is not ram (id %u): its data cannot be skipped", kind, r->id_,
                          r->ram_id_);
        return;
    }
    rmig__qemu_expect(r, RMIG__QEMU_WORD, 8);
    rmig__qemu_tell(r, ev, RMIG_QEV_SECTION);
}

/* What a user can do about a section that cannot be skipped. */
static const char *rmig__qemu_section_hint(const struct rmig_qemu_reader *r, const char *name) {
    if (r->section_ == RMIG_QEMU_SECTION_FULL)
        return "a device that is set up before RAM, as virtio-mem; unplug it";
    if (strcmp(name, "dirty-bitmap") == 0)
        return "dirty bitmaps; switch the capability dirty-bitmaps off";
    if (strcmp(name, "block") == 0)
        return "block migration; switch the capability block off";
    if (strstr(name, "vfio") != NULL)
        return "a VFIO device; unplug it";
    return "only ram can be taken";
}

static void rmig__qemu_on_idstr(struct rmig_qemu_reader *r) {
    bool full = r->section_ == RMIG_QEMU_SECTION_FULL;
    struct rmig__qemu_text name = rmig__qemu_show(r->field_, r->have_);
    if (full || !rmig__qemu_is(r, "ram")) {
        rmig__qemu_refuse(r, "section %s \"%s\" (id %u)%s cannot be skipped, it has no length: %s",
                          full ? "FULL" : "START", name.s, r->id_, full ? " before the END of ram" : "",
                          rmig__qemu_section_hint(r, name.s));
        return;
    }
    if (r->started_) {
        rmig__qemu_refuse(r, "section START \"ram\" (id %u) comes twice", r->id_);
        return;
    }
    rmig__qemu_expect(r, RMIG__QEMU_INSTANCE, 8);
}

static void rmig__qemu_on_instance(struct rmig_qemu_reader *r, struct rmig_qemu_event *ev) {
    uint32_t instance = rmig__get_be32(r->field_), version = rmig__get_be32(r->field_ + 4);
    if (instance != 0 || version != RMIG__QEMU_RAM_VERSION) {
        rmig__qemu_refuse(r, "section START \"ram\" (id %u): instance %u, version %u; must be instance 0, version 4",
                          r->id_, instance, version);
        return;
    }
    r->started_ = true;
    r->ram_id_ = r->id_;
    rmig__qemu_expect(r, RMIG__QEMU_WORD, 8);
    rmig__qemu_tell(r, ev, RMIG_QEV_SECTION);
}

static void rmig__qemu_on_footer(struct rmig_qemu_reader *r, struct rmig_qemu_event *ev) {
    uint32_t id = rmig__get_be32(r->field_);
    if (id != r->id_) {
        rmig__qemu_refuse(r, "footer of section %u; that of section %u was due", id, r->id_);
        return;
    }
    rmig__qemu_expect(r, RMIG__QEMU_ELEMENT, 0);
    rmig__qemu_tell(r, ev, RMIG_QEV_FOOTER);
}

// --- words of ram

static const char *rmig__qemu_word_reason(uint64_t word) {
    if ((word & 0x008) != 0)
        return "PAGE: a page inside the stream; is this a migration by RDMA?";
    if ((word & 0x002) != 0)
        return "ZERO: a page inside the stream; is this a migration by RDMA?";
    if ((word & 0x040) != 0)
        return "XBZRLE: a page inside the stream; switch the capability xbzrle off";
    if ((word & 0x100) != 0)
        return "COMPRESS_PAGE: a page inside the stream; switch the capability compress off";
    if ((word & 0x200) != 0)
        return "MULTIFD_FLUSH; switch the capability multifd off";
    return "must be MEM_SIZE, HOOK or EOS";
}

static void rmig__qemu_on_list(struct rmig_qemu_reader *r, struct rmig_qemu_event *ev) {
    if (r->sum_ < r->total_) {
        rmig__qemu_expect(r, RMIG__QEMU_BLOCK_NAME_LENGTH, 1);
        return;
    }
    rmig__qemu_expect(r, RMIG__QEMU_WORD, 8);
    rmig__qemu_tell(r, ev, RMIG_QEV_RAM_LIST);
}

static void rmig__qemu_on_mem_size(struct rmig_qemu_reader *r, uint64_t total) {
    if (r->listed_ || r->section_ != RMIG_QEMU_SECTION_START) {
        rmig__qemu_refuse(r, "ram: a second list of blocks, of %llu bytes", (unsigned long long)total);
        return;
    }
    r->listed_ = true;
    r->total_ = total;
    rmig__qemu_expect(r, RMIG__QEMU_LIST, 0);
}

static void rmig__qemu_on_word(struct rmig_qemu_reader *r, struct rmig_qemu_event *ev) {
    uint64_t word = rmig__get_be64(r->field_);
    bool mapped = (r->configuration.capabilities & RMIG_QEMU_CAPABILITY_MAPPED_RAM) != 0;
    if ((word & RMIG__QEMU_FLAGS) == RMIG_QEMU_WORD_MEM_SIZE) {
        rmig__qemu_on_mem_size(r, word - RMIG_QEMU_WORD_MEM_SIZE);
    } else if ((word != RMIG_QEMU_WORD_EOS && word != RMIG_QEMU_WORD_HOOK) || (word == RMIG_QEMU_WORD_HOOK && mapped)) {
        rmig__qemu_refuse(r, "ram: word 0x%llx: %s", (unsigned long long)word,
                          mapped && word == RMIG_QEMU_WORD_HOOK ? "HOOK, which has no place in a mapped-ram file"
                                                                : rmig__qemu_word_reason(word));
    } else if (!r->listed_) {
        rmig__qemu_refuse(r, "ram: word 0x%llx before the list of blocks", (unsigned long long)word);
    } else if (word == RMIG_QEMU_WORD_HOOK) {
        r->hook_ = true;
        rmig__qemu_expect(r, RMIG__QEMU_WORD, 8);
        rmig__qemu_tell(r, ev, RMIG_QEV_HOOK);
    } else {
        r->closed_ = true;
        rmig__qemu_expect(r, RMIG__QEMU_ELEMENT, 0);
        rmig__qemu_tell(r, ev, RMIG_QEV_EOS);
    }
}

static size_t rmig__qemu_block_numbers(uint32_t capabilities) {
    return 8u + ((capabilities & RMIG_QEMU_CAPABILITY_IGNORE_SHARED) != 0 ? 8u : 0) +
           ((capabilities & RMIG_QEMU_CAPABILITY_MAPPED_RAM) != 0 ? RMIG_QEMU_MAPPED_RAM_SIZE : 0u);
}

static void rmig__qemu_on_block_name(struct rmig_qemu_reader *r) {
    if (memchr(r->field_, 0, r->have_) != NULL) {
        rmig__qemu_refuse(r, "ram: the name of block %u holds a zero byte", r->block_count_);
        return;
    }
    memset(&r->block_, 0, sizeof r->block_);
    memcpy(r->block_.name, r->field_, r->have_);
    rmig__qemu_expect(r, RMIG__QEMU_BLOCK_NUMBERS, rmig__qemu_block_numbers(r->configuration.capabilities));
}

static void rmig__qemu_on_block_name_length(struct rmig_qemu_reader *r) {
    if (r->block_count_ == RMIG_QEMU_BLOCKS_MAX)
        rmig__qemu_refuse(r, "ram: more than %d blocks", RMIG_QEMU_BLOCKS_MAX);
    else if (r->field_[0] == 0)
        rmig__qemu_refuse(r, "ram: block %u has no name", r->block_count_);
    else
        rmig__qemu_expect(r, RMIG__QEMU_BLOCK_NAME, r->field_[0]);
}

static void rmig__qemu_on_block_numbers(struct rmig_qemu_reader *r) {
    struct rmig_qemu_block *b = &r->block_;
    const uint8_t *p = r->field_ + 8;
    b->length = rmig__get_be64(r->field_);
    if ((r->configuration.capabilities & RMIG_QEMU_CAPABILITY_IGNORE_SHARED) != 0) {
        b->guest_address = rmig__get_be64(p);
        p += 8;
    }
    if ((r->configuration.capabilities & RMIG_QEMU_CAPABILITY_MAPPED_RAM) != 0) {
        b->mapped.version = rmig__get_be32(p);
        b->mapped.page_size = rmig__get_be64(p + 4);
        b->mapped.bitmap_offset = rmig__get_be64(p + 12);
        b->mapped.pages_offset = rmig__get_be64(p + 20);
    }
}

static void rmig__qemu_on_block(struct rmig_qemu_reader *r, struct rmig_qemu_event *ev) {
    struct rmig__qemu_text name = rmig__qemu_show(r->block_.name, strlen(r->block_.name));
    rmig__qemu_on_block_numbers(r);
    if (r->block_.length == 0 || r->block_.length > r->total_ - r->sum_) {
        rmig__qemu_refuse(r, "ram: block \"%s\" of %llu bytes; 1 to %llu are left of the total of %llu", name.s,
                          (unsigned long long)r->block_.length, (unsigned long long)(r->total_ - r->sum_),
                          (unsigned long long)r->total_);
        return;
    }
    r->sum_ += r->block_.length;
    r->block_count_++;
    rmig__qemu_expect(r, RMIG__QEMU_LIST, 0);
    rmig__qemu_tell(r, ev, RMIG_QEV_BLOCK);
    ev->block = &r->block_;
}

// --- device state

static void rmig__qemu_tail_byte(struct rmig_qemu_reader *r, uint8_t byte) {
    r->history_ = r->history_ << 8 | byte;
    if (byte == 0) {
        for (unsigned i = 0; i < 6; i++)
            r->near_[5 - i] = (uint8_t)(r->history_ >> (8 * i));
        r->since_ = 0;
        return;
    }
    if (r->since_ < 4)
        r->near_[6 + r->since_] = byte;
    r->since_++;
}

/* Does what came so far end with EOF, the mark of the description, its length, and that many bytes of JSON, "{...}"?
   JSON holds no zero byte, so the last one there is lies in the length: its last byte, or up to three before that. */
static bool rmig__qemu_tail_found(const struct rmig_qemu_reader *r) {
    if ((uint8_t)r->history_ != '}')
        return false;
    for (unsigned k = 0; k < 4 && k < r->since_; k++) {
        const uint8_t *p = r->near_ + k;
        if (p[0] == RMIG__QEMU_EOF && p[1] == RMIG__QEMU_VMDESC_MARK && rmig__get_be32(p + 2) == r->since_ - k &&
            p[6] == '{')
            return true;
    }
    return false;
}

static bool rmig__qemu_on_state(struct rmig_qemu_reader *r, const uint8_t **p, size_t *n, struct rmig_qemu_event *ev) {
    if (*n == 0)
        return false;
    r->whole_ = false;
    r->element_ = r->offset_;
    for (size_t i = 0; i < *n; i++) {
        rmig__qemu_tail_byte(r, (*p)[i]);
        if (r->first_end_ == 0 && (*p)[i] == '}' && rmig__qemu_tail_found(r))
            r->first_end_ = r->offset_ + i + 1;
    }
    rmig__qemu_tell(r, ev, RMIG_QEV_STATE);
    ev->data = *p;
    ev->length = *n;
    r->offset_ += *n;
    *p += *n;
    *n = 0;
    return true;
}

// --- elements

static void rmig__qemu_on_element(struct rmig_qemu_reader *r, uint8_t byte) {
    switch (byte) {
    case RMIG_QEMU_SECTION_START:
    case RMIG_QEMU_SECTION_PART:
    case RMIG_QEMU_SECTION_END:
    case RMIG_QEMU_SECTION_FULL:
        r->section_ = (enum rmig_qemu_section)byte;
        rmig__qemu_expect(r, RMIG__QEMU_SECTION_ID, 4);
        return;
    case RMIG__QEMU_COMMAND_MARK:
        rmig__qemu_expect(r, RMIG__QEMU_COMMAND, 4);
        return;
    case RMIG__QEMU_EOF:
        rmig__qemu_refuse(r, "the stream ends (byte 00) before the END of ram");
        return;
    default:
        rmig__qemu_refuse(r, "byte %02x where a section or a command was due", byte);
    }
}

static void rmig__qemu_take_byte(struct rmig_qemu_reader *r, const uint8_t **p, size_t *n) {
    r->element_ = r->offset_++;
    ++*p;
    --*n;
}

static void rmig__qemu_at_prologue(struct rmig_qemu_reader *r, const uint8_t **p, size_t *n,
                                   struct rmig_qemu_event *ev) {
    bool configured = r->configuration.machine[0] != '\0';
    if (**p != (configured ? RMIG__QEMU_SUBSECTION_MARK : RMIG__QEMU_CONFIGURATION_MARK)) {
        r->prologue_ = false;
        rmig__qemu_tell(r, ev, RMIG_QEV_CONFIGURATION);
        ev->configuration = &r->configuration;
        return;
    }
    rmig__qemu_take_byte(r, p, n);
    if (configured)
        rmig__qemu_expect(r, RMIG__QEMU_SUBSECTION_LENGTH, 1);
    else
        rmig__qemu_expect(r, RMIG__QEMU_MACHINE_LENGTH, 4);
}

/* Takes the next byte, unless it only shows that something has ended before it. */
static bool rmig__qemu_at_element(struct rmig_qemu_reader *r, const uint8_t **p, size_t *n,
                                  struct rmig_qemu_event *ev) {
    if (*n == 0)
        return false;
    uint8_t byte = **p;
    bool footer = r->closed_ && byte == RMIG__QEMU_FOOTER_MARK;
    if (r->prologue_) {
        rmig__qemu_at_prologue(r, p, n, ev);
        return true;
    }
    if (r->section_ == RMIG_QEMU_SECTION_END && !footer) {
        rmig__qemu_expect(r, RMIG__QEMU_STATE, 0);
        rmig__qemu_tell(r, ev, RMIG_QEV_RAM_OVER);
        return true;
    }
    rmig__qemu_take_byte(r, p, n);
    r->closed_ = false;
    if (footer)
        rmig__qemu_expect(r, RMIG__QEMU_FOOTER, 4);
    else
        rmig__qemu_on_element(r, byte);
    return true;
}

/* A field is whole. */
static void rmig__qemu_on_field(struct rmig_qemu_reader *r, struct rmig_qemu_event *ev) {
    switch (r->state_) {
    case RMIG__QEMU_MAGIC:
        rmig__qemu_on_magic(r);
        return;
    case RMIG__QEMU_MACHINE_LENGTH:
        rmig__qemu_on_machine_length(r);
        return;
    case RMIG__QEMU_MACHINE:
        rmig__qemu_on_machine(r);
        return;
    case RMIG__QEMU_SUBSECTION_LENGTH:
        rmig__qemu_expect(r, RMIG__QEMU_SUBSECTION, r->field_[0] + 4u);
        return;
    case RMIG__QEMU_SUBSECTION:
        rmig__qemu_on_subsection(r);
        return;
    case RMIG__QEMU_PAGE_BITS:
        rmig__qemu_on_page_bits(r);
        return;
    case RMIG__QEMU_CAPABILITY_COUNT:
        rmig__qemu_on_capability_count(r);
        return;
    case RMIG__QEMU_CAPABILITY_LENGTH:
        rmig__qemu_expect(r, RMIG__QEMU_CAPABILITY, r->field_[0]);
        return;
    case RMIG__QEMU_CAPABILITY:
        rmig__qemu_on_capability(r);
        return;
    case RMIG__QEMU_UUID:
        rmig__qemu_on_uuid(r);
        return;
    case RMIG__QEMU_COMMAND:
        rmig__qemu_on_command(r, ev);
        return;
    case RMIG__QEMU_PING:
        rmig__qemu_tell_command(r, ev, RMIG_QEMU_COMMAND_PING, rmig__get_be32(r->field_));
        return;
    case RMIG__QEMU_SECTION_ID:
        rmig__qemu_on_section_id(r, ev);
        return;
    case RMIG__QEMU_IDSTR_LENGTH:
        rmig__qemu_expect(r, RMIG__QEMU_IDSTR, r->field_[0]);
        return;
    case RMIG__QEMU_IDSTR:
        rmig__qemu_on_idstr(r);
        return;
    case RMIG__QEMU_INSTANCE:
        rmig__qemu_on_instance(r, ev);
        return;
    case RMIG__QEMU_WORD:
        rmig__qemu_on_word(r, ev);
        return;
    case RMIG__QEMU_LIST:
        rmig__qemu_on_list(r, ev);
        return;
    case RMIG__QEMU_BLOCK_NAME_LENGTH:
        rmig__qemu_on_block_name_length(r);
        return;
    case RMIG__QEMU_BLOCK_NAME:
        rmig__qemu_on_block_name(r);
        return;
    case RMIG__QEMU_BLOCK_NUMBERS:
        rmig__qemu_on_block(r, ev);
        return;
    case RMIG__QEMU_FOOTER:
        rmig__qemu_on_footer(r, ev);
        return;
    case RMIG__QEMU_ELEMENT:
    case RMIG__QEMU_STATE:
        return; // these are no fields
    }
}

/* Takes what there is of the field that is due; false: not whole yet. */
static bool rmig__qemu_collect(struct rmig_qemu_reader *r, const uint8_t **p, size_t *n) {
    size_t take = r->want_ - r->have_ < *n ? r->want_ - r->have_ : *n;
    if (r->have_ == 0 && take > 0 &&
        (r->state_ == RMIG__QEMU_MAGIC || r->state_ == RMIG__QEMU_WORD || r->state_ == RMIG__QEMU_BLOCK_NAME_LENGTH))
        r->element_ = r->offset_;
    if (take > 0)
        memcpy(r->field_ + r->have_, *p, take);
    r->have_ += take;
    r->offset_ += take;
    *p += take;
    *n -= take;
    return r->have_ == r->want_;
}

/* One step; false: more bytes are needed. */
static bool rmig__qemu_step(struct rmig_qemu_reader *r, const uint8_t **p, size_t *n, struct rmig_qemu_event *ev) {
    if (r->state_ == RMIG__QEMU_ELEMENT)
        return rmig__qemu_at_element(r, p, n, ev);
    if (r->state_ == RMIG__QEMU_STATE)
        return rmig__qemu_on_state(r, p, n, ev);
    if (!rmig__qemu_collect(r, p, n))
        return false;
    rmig__qemu_on_field(r, ev);
    return true;
}

RMIG__DEF int64_t rmig_qemu_reader_feed(struct rmig_qemu_reader *r, const void *p, size_t n,
                                        struct rmig_qemu_event *ev) {
    const uint8_t *at = (const uint8_t *)p;
    size_t left = n;
    if (r == NULL || ev == NULL || (p == NULL && n > 0))
        return RMIG_ERR_ARGUMENT;
    memset(ev, 0, sizeof *ev);
    if (r->error.status == RMIG_OK && r->hook_ && n > 0) {
        r->element_ = r->offset_;
        rmig__qemu_refuse(r, "ram: %zu bytes follow the hook word in the same message", n);
    }
    while (r->error.status == RMIG_OK && ev->type == RMIG_QEV_NONE && rmig__qemu_step(r, &at, &left, ev)) {
    }
    return r->error.status != RMIG_OK ? r->error.status : (int64_t)(n - left);
}

RMIG__DEF int rmig_qemu_reader_end_message(struct rmig_qemu_reader *r, struct rmig_qemu_event *ev) {
    if (r == NULL || ev == NULL)
        return RMIG_ERR_ARGUMENT;
    memset(ev, 0, sizeof *ev);
    if (r->error.status != RMIG_OK)
        return r->error.status;
    r->hook_ = false;
    r->whole_ = r->state_ == RMIG__QEMU_STATE && rmig__qemu_tail_found(r);
    if (r->whole_)
        rmig__qemu_tell(r, ev, RMIG_QEV_END);
    return RMIG_OK;
}

// >>qemu: writer, implementation

/* What an encoder has made, before it is known to fit. */
struct rmig__qemu_out {
    uint8_t bytes[RMIG_QEMU_START_MAX];
    size_t n;
};

static void rmig__qemu_bytes(struct rmig__qemu_out *o, const void *p, size_t n) {
    RMIG_ASSERT(n <= sizeof o->bytes - o->n);
    memcpy(o->bytes + o->n, p, n);
    o->n += n;
}

static void rmig__qemu_u8(struct rmig__qemu_out *o, unsigned v) { o->bytes[o->n++] = (uint8_t)v; }

static void rmig__qemu_u32(struct rmig__qemu_out *o, uint32_t v) {
    rmig__put_be32(o->bytes + o->n, v);
    o->n += 4;
}

static void rmig__qemu_u64(struct rmig__qemu_out *o, uint64_t v) {
    rmig__put_be64(o->bytes + o->n, v);
    o->n += 8;
}

static void rmig__qemu_string(struct rmig__qemu_out *o, const char *s) {
    rmig__qemu_u8(o, (unsigned)strlen(s));
    rmig__qemu_bytes(o, s, strlen(s));
}

static int rmig__qemu_done(uint8_t *out, size_t cap, const struct rmig__qemu_out *o) {
    if (out == NULL)
        return RMIG_ERR_ARGUMENT;
    if (o->n > cap)
        return RMIG_ERR_FULL;
    memcpy(out, o->bytes, o->n);
    return (int)o->n;
}

/* A name of 1 to RMIG_NAME_MAX bytes in an array of RMIG_NAME_MAX + 1. */
static bool rmig__qemu_name_ok(const char *name) {
    return name[0] != '\0' && memchr(name, '\0', RMIG_NAME_MAX + 1) != NULL;
}

static void rmig__qemu_subsection(struct rmig__qemu_out *o, const char *name) {
    rmig__qemu_u8(o, RMIG__QEMU_SUBSECTION_MARK);
    rmig__qemu_string(o, name);
    rmig__qemu_u32(o, RMIG__QEMU_SUBSECTION_VERSION);
}

static void rmig__qemu_capabilities(struct rmig__qemu_out *o, uint32_t capabilities) {
    bool shared = (capabilities & RMIG_QEMU_CAPABILITY_IGNORE_SHARED) != 0;
    bool mapped = (capabilities & RMIG_QEMU_CAPABILITY_MAPPED_RAM) != 0;
    rmig__qemu_subsection(o, RMIG__QEMU_CAPABILITIES_NAME);
    rmig__qemu_u32(o, (shared ? 1u : 0u) + (mapped ? 1u : 0u));
    if (shared)
        rmig__qemu_string(o, RMIG__QEMU_IGNORE_SHARED_NAME);
    if (mapped)
        rmig__qemu_string(o, RMIG__QEMU_MAPPED_RAM_NAME);
}

RMIG__DEF int rmig_qemu_encode_start(uint8_t *out, size_t cap, const struct rmig_qemu_configuration *in) {
    struct rmig__qemu_out o;
    o.n = 0;
    if (in == NULL)
        return RMIG_ERR_ARGUMENT;
    rmig__qemu_bytes(&o, rmig__qemu_magic, sizeof rmig__qemu_magic);
    if (in->machine[0] == '\0')
        return rmig__qemu_done(out, cap, &o);
    if (!rmig__qemu_name_ok(in->machine))
        return RMIG_ERR_ARGUMENT;
    rmig__qemu_u8(&o, RMIG__QEMU_CONFIGURATION_MARK);
    rmig__qemu_u32(&o, (uint32_t)strlen(in->machine));
    rmig__qemu_bytes(&o, in->machine, strlen(in->machine));
    if (in->page_bits != 0) {
        rmig__qemu_subsection(&o, RMIG__QEMU_PAGE_BITS_NAME);
        rmig__qemu_u32(&o, in->page_bits);
    }
    if (in->capabilities != 0)
        rmig__qemu_capabilities(&o, in->capabilities);
    if (in->has_uuid) {
        rmig__qemu_subsection(&o, RMIG__QEMU_UUID_NAME);
        rmig__qemu_bytes(&o, in->uuid, sizeof in->uuid);
    }
    return rmig__qemu_done(out, cap, &o);
}

RMIG__DEF int rmig_qemu_encode_section(uint8_t *out, size_t cap, enum rmig_qemu_section section, uint32_t section_id) {
    struct rmig__qemu_out o;
    o.n = 0;
    if (section < RMIG_QEMU_SECTION_START || section > RMIG_QEMU_SECTION_END)
        return RMIG_ERR_ARGUMENT;
    rmig__qemu_u8(&o, (unsigned)section);
    rmig__qemu_u32(&o, section_id);
    if (section == RMIG_QEMU_SECTION_START) {
        rmig__qemu_string(&o, "ram");
        rmig__qemu_u32(&o, 0); // instance
        rmig__qemu_u32(&o, RMIG__QEMU_RAM_VERSION);
    }
    return rmig__qemu_done(out, cap, &o);
}

RMIG__DEF int rmig_qemu_encode_mem_size(uint8_t *out, size_t cap, uint64_t total) {
    struct rmig__qemu_out o;
    o.n = 0;
    if ((total & RMIG__QEMU_FLAGS) != 0)
        return RMIG_ERR_ARGUMENT;
    rmig__qemu_u64(&o, total | RMIG_QEMU_WORD_MEM_SIZE);
    return rmig__qemu_done(out, cap, &o);
}

RMIG__DEF int rmig_qemu_encode_block(uint8_t *out, size_t cap, const struct rmig_qemu_block *in,
                                     uint32_t capabilities) {
    struct rmig__qemu_out o;
    o.n = 0;
    if (in == NULL || !rmig__qemu_name_ok(in->name) || in->length == 0)
        return RMIG_ERR_ARGUMENT;
    rmig__qemu_string(&o, in->name);
    rmig__qemu_u64(&o, in->length);
    if ((capabilities & RMIG_QEMU_CAPABILITY_IGNORE_SHARED) != 0)
        rmig__qemu_u64(&o, in->guest_address);
    if ((capabilities & RMIG_QEMU_CAPABILITY_MAPPED_RAM) != 0) {
        rmig__qemu_u32(&o, in->mapped.version);
        rmig__qemu_u64(&o, in->mapped.page_size);
        rmig__qemu_u64(&o, in->mapped.bitmap_offset);
        rmig__qemu_u64(&o, in->mapped.pages_offset);
    }
    return rmig__qemu_done(out, cap, &o);
}

RMIG__DEF int rmig_qemu_encode_word(uint8_t *out, size_t cap, enum rmig_qemu_word word) {
    struct rmig__qemu_out o;
    o.n = 0;
    if (word != RMIG_QEMU_WORD_EOS && word != RMIG_QEMU_WORD_HOOK)
        return RMIG_ERR_ARGUMENT;
    rmig__qemu_u64(&o, (uint64_t)word);
    return rmig__qemu_done(out, cap, &o);
}

RMIG__DEF int rmig_qemu_encode_footer(uint8_t *out, size_t cap, uint32_t section_id) {
    struct rmig__qemu_out o;
    o.n = 0;
    rmig__qemu_u8(&o, RMIG__QEMU_FOOTER_MARK);
    rmig__qemu_u32(&o, section_id);
    return rmig__qemu_done(out, cap, &o);
}

RMIG__DEF int rmig_qemu_encode_command(uint8_t *out, size_t cap, enum rmig_qemu_command command, uint32_t value) {
    struct rmig__qemu_out o;
    uint32_t n = command == RMIG_QEMU_COMMAND_PING ? 4 : 0;
    o.n = 0;
    if (command != RMIG_QEMU_COMMAND_OPEN_RETURN_PATH && command != RMIG_QEMU_COMMAND_PING &&
        command != RMIG_QEMU_COMMAND_SWITCHOVER_START)
        return RMIG_ERR_ARGUMENT;
    rmig__qemu_u8(&o, RMIG__QEMU_COMMAND_MARK);
    rmig__qemu_u32(&o, (uint32_t)command << 16 | n);
    if (n > 0)
        rmig__qemu_u32(&o, value);
    return rmig__qemu_done(out, cap, &o);
}

RMIG__DEF int rmig_qemu_encode_end(uint8_t *out, size_t cap, const char *description, size_t n) {
    if (out == NULL || description == NULL || n == 0 || n > 0xffffff)
        return RMIG_ERR_ARGUMENT;
    if (description[0] != '{' || description[n - 1] != '}' || memchr(description, 0, n) != NULL) // none would find it
        return RMIG_ERR_ARGUMENT;
    if (cap < n + 6)
        return RMIG_ERR_FULL;
    out[0] = RMIG__QEMU_EOF;
    out[1] = RMIG__QEMU_VMDESC_MARK;
    rmig__put_be32(out + 2, (uint32_t)n);
    memcpy(out + 6, description, n);
    return (int)(n + 6);
}

// >>qemu: return path, implementation

/* Bytes of data that a message of this type has, or -1: not one that is taken. */
static int rmig__qemu_return_length(uint32_t type) {
    switch (type) {
    case RMIG_QEMU_RETURN_SHUT:
    case RMIG_QEMU_RETURN_PONG:
        return 4;
    case RMIG_QEMU_RETURN_SWITCHOVER_ACK:
        return 0;
    default:
        return -1;
    }
}

RMIG__DEF int rmig_qemu_encode_return(uint8_t *out, size_t cap, const struct rmig_qemu_return *in) {
    struct rmig__qemu_out o;
    int n = in == NULL ? -1 : rmig__qemu_return_length(in->type);
    o.n = 0;
    if (n < 0)
        return RMIG_ERR_ARGUMENT;
    rmig__qemu_u32(&o, in->type << 16 | (uint32_t)n);
    if (n > 0)
        rmig__qemu_u32(&o, in->value);
    return rmig__qemu_done(out, cap, &o);
}

RMIG__DEF int rmig_qemu_decode_return(const uint8_t *p, size_t n, struct rmig_qemu_return *out) {
    if (out == NULL || (p == NULL && n > 0))
        return RMIG_ERR_ARGUMENT;
    if (n < 4)
        return 0;
    uint32_t both = rmig__get_be32(p), type = both >> 16;
    int length = rmig__qemu_return_length(type);
    if (length < 0 || (both & 0xffff) != (uint32_t)length)
        return RMIG_ERR_WIRE;
    if (n < 4 + (size_t)length)
        return 0;
    out->type = type;
    out->value = length == 0 ? 0 : rmig__get_be32(p + 4);
    return 4 + length;
}

#ifdef __cplusplus
}
#endif

#endif // RMIG_IMPLEMENTATION
