#!/usr/bin/env bash
# mapped_ram.sh PROGRAM BUILD: the example mapped_ram, alone and both ways with stock QEMU 10.0 and 11 on this host: what
# they wrote is read, and what is written here, in other layouts, is loaded by them and their guest goes on. Reports as
# TAP. Without a network BUILD/vm/qemu-10.0 and qemu-11 (tests/vm/fetch.sh) must be there; else what needs them is
# skipped, which with CI=true is a failure.
# shellcheck disable=SC2015,SC2016,SC2119,SC2120,SC2317 # a && b || fail; perl and sh in quotes; called by check
set -u
cd "$(dirname "$0")/.." || exit 1
# shellcheck source=tests/tap.sh
. tests/tap.sh
[ $# = 2 ] || { echo "usage: mapped_ram.sh PROGRAM BUILD" >&2; exit 2; }
program=$1
build=$2
tmp=$(mktemp -d)
device= # a loop device of ours
tidy() {
    jobs -p | xargs -r kill 2>/dev/null
    wait
    [ -z "$device" ] || losetup -d "$device"
    rm -rf "$tmp"
}
trap tidy EXIT
trap 'exit 143' TERM INT

# >>tools

mapped() { timeout -k 5 600 "$program" "$@"; }

# ends STATUS TEXT COMMAND...: the program ends so, and says that.
ends() {
    local wanted=$1 text=$2 status=0
    shift 2
    "$@" >"$tmp/out" 2>"$tmp/err" || status=$?
    [ "$status" = "$wanted" ] || { echo "exit status $status, wanted $wanted: $*"; cat "$tmp/out" "$tmp/err"; return 1; }
    [ -z "$text" ] || cat "$tmp/out" "$tmp/err" | grep -qF -- "$text" || { echo "wanted \"$text\":"; cat "$tmp/out" "$tmp/err"; return 1; }
}

json_field() { # EXPRESSION: of the object in $tmp/out
    perl -MJSON::PP -0777 -e '$o = decode_json(<STDIN>); print eval($ARGV[0]) // "null"' "$1" <"$tmp/out"
}

# A machine as load leaves one: two blocks, of which one is all zero.
make_machine() { # DIR SEED
    mkdir -p "$1/ram"
    tests/vm/ram_image.pl "$1/ram/pc.ram" 32 8 "$2" || return 1
    truncate -s 65536 "$1/ram/rom"
    printf '\4state %s\0\6\0\0\0\16{"devices":[]}' "$2" >"$1/state"
    cat >"$1/machine.json" <<END
{"format": "rmig-qemu", "version": 1, "machine": "test-1.0", "page_bits": null, "capabilities": [], "uuid": null,
 "section_id": 7, "blocks": [{"name": "pc.ram", "file": "ram/pc.ram", "length": 33554432},
 {"name": "rom", "file": "ram/rom", "length": 65536}], "state": {"file": "state", "length": 28}}
END
}

same_machine() { # DIR DIR
    local file
    for file in ram/pc.ram ram/rom state; do
        cmp "$1/$file" "$2/$file" || return 1
    done
}

# >>alone

saved_and_loaded() { # OPTION...
    rm -rf "$tmp/back" "$tmp/s"
    mapped save "$@" "$tmp/a" "$tmp/s" && mapped verify "$@" "$tmp/s" && mapped load "$@" "$tmp/s" "$tmp/back" &&
        same_machine "$tmp/a" "$tmp/back" && [ ! -e "$tmp/s.part" ] && [ ! -e "$tmp/back.part" ]
}

holes_stay() {
    saved_and_loaded || return 1
    local kib
    kib=$(du -k "$tmp/s" | cut -f1)
    [ "$kib" -lt 9000 ] || { echo "8 MiB of data take $kib KiB"; return 1; }
}

info_tells() {
    ends 0 '"ok":true' mapped info --json "$tmp/s" || return 1
    [ "$(json_field '$o->{info}{whole} . $o->{info}{machine} . $o->{info}{section_id}')" = '1test-1.07' ] &&
        [ "$(json_field '"@{$o->{info}{capabilities}} $o->{info}{state_bytes}"')" = 'mapped-ram 28' ] &&
        [ "$(json_field 'join " ", map { "$_->{name} $_->{pages} $_->{pages_set}" } @{$o->{info}{blocks}}')" = \
            'pc.ram 8192 2048 rom 16 0' ] || { cat "$tmp/out"; return 1; }
}

info_of_a_torn_file() {
    head -c 30000000 "$tmp/s" >"$tmp/torn"
    ends 5 'lie outside the file of 30000000 bytes' mapped info "$tmp/torn" &&
        ends 5 '"whole":false' mapped info --json "$tmp/torn" &&
        ends 5 'lie outside the file' mapped load "$tmp/torn" "$tmp/torn.dir" && [ ! -e "$tmp/torn.dir" ]
}

differences() {
    cp -r "$tmp/a" "$tmp/c"
    printf 'x' | dd of="$tmp/c/ram/pc.ram" bs=1 seek=20479 conv=notrunc status=none
    printf 'x' | dd of="$tmp/c/ram/pc.ram" bs=1 seek=20480 conv=notrunc status=none
    printf 'x' | dd of="$tmp/c/ram/rom" bs=1 seek=65535 conv=notrunc status=none
    mapped save --align 64K "$tmp/c" "$tmp/c.snap" || return 1
    ends 0 '' mapped diff "$tmp/s" "$tmp/s" && [ ! -s "$tmp/out" ] || return 1
    ends 1 '' mapped diff "$tmp/s" "$tmp/c.snap" || return 1
    [ "$(cat "$tmp/out")" = "pc.ram 0x4000-0x6000
rom 0xf000-0x10000" ] || { cat "$tmp/out"; return 1; }
    ends 1 '{"block":"rom","from":61440,"to":65536}' mapped diff --json "$tmp/s" "$tmp/c.snap"
}

extracts() {
    mapped extract "$tmp/s" pc.ram "$tmp/x" && cmp "$tmp/x" "$tmp/a/ram/pc.ram" &&
        mapped extract "$tmp/s" rom "$tmp/x" && cmp "$tmp/x" "$tmp/a/ram/rom" &&
        ends 2 'has no block xyz' mapped extract "$tmp/s" xyz "$tmp/y" && [ ! -e "$tmp/y" ]
}

no_file_for_a_snapshot() {
    mkfifo "$tmp/pipe"
    ends 5 'is a pipe' mapped info "$tmp/pipe" && ends 3 'cannot read' mapped info "$tmp/none" &&
        ends 3 'cannot create' mapped save "$tmp/a" "$tmp/none/s" &&
        ends 3 'machine.json' mapped save "$tmp/none" "$tmp/n" && [ ! -e "$tmp/n.part" ] &&
        ends 5 'not a migration stream' mapped info "$tmp/a/machine.json"
}

written_by_another() {
    : >"$tmp/l.part"
    ends 3 'l.part is in use by another process' flock "$tmp/l.part" timeout 600 "$program" save "$tmp/a" "$tmp/l" &&
        [ -e "$tmp/l.part" ] &&
        ends 3 's is being written by another process' flock "$tmp/s" timeout 600 "$program" verify "$tmp/s"
}

can_mount() { unshare -m true 2>/dev/null; }

# On a file system of 4 MiB, where an older snapshot is already.
no_space() {
    cat >"$tmp/full.sh" <<'END'
mount -t tmpfs -o size=4M none "$1/full" && echo old >"$1/full/s" || exit 90
timeout 600 "$2" save --threads 3 "$1/a" "$1/full/s"
status=$?
[ "$(cat "$1/full/s")" = old ] && [ ! -e "$1/full/s.part" ] || exit 91
exit $status
END
    mkdir -p "$tmp/full"
    ends 3 'No space left on device' unshare -m sh "$tmp/full.sh" "$tmp" "$program"
}

# There the disk is met by way of memory, of which the system only says that it is a bad address.
no_space_for_a_directory() {
    mkdir -p "$tmp/full"
    ends 3 'is the disk of its own file full?' unshare -m sh -c 'mount -t tmpfs -o size=4M none "$1/full" || exit 90
        timeout 600 "$2" load "$1/s" "$1/full/d"
        status=$?
        [ -z "$(ls -A "$1/full")" ] || exit 91
        exit $status' sh "$tmp" "$program"
}

read_only() {
    mkdir -p "$tmp/ro"
    ends 3 'Read-only file system' unshare -m sh -c \
        'mount -t tmpfs none "$1/ro" && : >"$1/ro/s" && mount -o remount,ro "$1/ro" && timeout 600 "$2" save "$1/a" "$1/ro/s"' \
        sh "$tmp" "$program" && ! grep -q in-place "$tmp/err"
}

can_inject() { strace -qq -o /dev/null -e trace=none true 2>/dev/null; }

# With system calls that fail: the older file stays, and nothing else. Without io_uring, whose transfers are no calls.
broken_save() { # MESSAGE CALL:error=CODE:when=N OPTION...
    local text=$1 fault=$2
    shift 2
    echo old >"$tmp/broken"
    ends 3 "$text" timeout 600 strace -f -qq -o "$tmp/calls" -e "trace=io_uring_setup,${fault%%:*}" \
        -e inject=io_uring_setup:error=ENOSYS -e "inject=$fault" "$program" save "$@" "$tmp/a" "$tmp/broken" &&
        [ "$(cat "$tmp/broken")" = old ] && [ ! -e "$tmp/broken.part" ]
}

broken_load() { # MESSAGE CALL:error=CODE:when=N OPTION...
    local text=$1 fault=$2
    shift 2
    ends 3 "$text" timeout 600 strace -f -qq -o "$tmp/calls" -e "trace=io_uring_setup,${fault%%:*}" \
        -e inject=io_uring_setup:error=ENOSYS -e "inject=$fault" "$program" load "$@" "$tmp/s" "$tmp/broken.d" &&
        [ ! -e "$tmp/broken.d" ] && [ ! -e "$tmp/broken.d.part" ]
}

without_io_uring() { # [CALL:error=CODE:when=N]
    rm -rf "$tmp/back"
    timeout 600 strace -f -qq -o "$tmp/calls" -e trace=io_uring_setup,pwrite64 -e inject=io_uring_setup:error=ENOSYS \
        ${1:+-e "inject=$1"} "$program" save --direct --threads 2 "$tmp/a" "$tmp/s" && grep -q ENOSYS "$tmp/calls" &&
        mapped load "$tmp/s" "$tmp/back" && same_machine "$tmp/a" "$tmp/back"
}

# The RAM's file is cut when it has been mapped: the program is held up there.
cut_ram() {
    local i status
    rm -rf "$tmp/cut" && cp -r "$tmp/a" "$tmp/cut" && echo old >"$tmp/old" || return 1
    timeout 600 strace -f -qq -o "$tmp/calls" -e trace=pwrite64,io_uring_setup -e inject=pwrite64:delay_exit=3000000:when=1 \
        -e inject=io_uring_setup:error=ENOSYS "$program" save --threads 3 "$tmp/cut" "$tmp/old" >"$tmp/out" 2>&1 &
    for ((i = 0; i < 2000; i++)); do
        [ -e "$tmp/old.part" ] && break
        sleep 0.005
    done
    sleep 1.5
    truncate -s 4096 "$tmp/cut/ram/pc.ram"
    wait $!
    status=$?
    [ "$status" = 3 ] && grep -q 'it was cut' "$tmp/out" && [ "$(cat "$tmp/old")" = old ] && [ ! -e "$tmp/old.part" ] ||
        { echo "exit status $status"; cat "$tmp/out"; return 1; }
}

without_io_uring_enter() {
    rm -rf "$tmp/back"
    timeout 600 strace -f -qq -o "$tmp/calls" -e trace=io_uring_enter -e inject=io_uring_enter:error=EPERM "$program" \
        save --direct --threads 2 "$tmp/a" "$tmp/s" && grep -q EPERM "$tmp/calls" &&
        mapped load "$tmp/s" "$tmp/back" && same_machine "$tmp/a" "$tmp/back"
}

broken_calls() {
    check 'RAM that is cut while threads save it' cut_ram
    check 'a kernel without io_uring' without_io_uring
    check 'io_uring is there, and may not be entered' without_io_uring_enter
    check 'an I/O error while pages are written' \
        broken_save 'block "pc.ram": cannot write' pwrite64:error=EIO:when=20+
    check 'an I/O error while pages are written past the page cache by threads' \
        broken_save 'Input/output error' pwrite64:error=EIO:when=20+ --direct --threads 3
    check 'an I/O error when the file is brought to the disk' \
        broken_save 'the file cannot be brought to the disk: Input/output error' fsync:error=EIO:when=1
    check 'an I/O error at the last write' broken_save 'Input/output error' fsync:error=EIO:when=2
    check 'interrupted calls are made again' without_io_uring pwrite64:error=EINTR:when=3+7
    check 'an I/O error while pages are read' broken_load 'block "pc.ram": cannot read' pread64:error=EIO:when=30+
    check 'an I/O error while pages are read past the page cache by threads' \
        broken_load 'Input/output error' pread64:error=EIO:when=30+ --direct --threads 3
    check 'a name that cannot be given' broken_save 'cannot become' rename:error=EIO
}

cancelled_by_others() {
    local signal
    for signal in USR1 USR2 ALRM VTALRM PROF XCPU IO PWR STKFLT; do # IO is SIGPOLL
        cancelled "$signal" || { echo "SIG$signal"; return 1; }
    done
}

# It may be faster than the signal, but not always; where strace can, it is held up at its first write.
cancelled() { # SIGNAL
    local i status slowed=()
    # shellcheck disable=SC2054 # commas of strace
    ! can_inject || slowed=(strace -D -f -qq -o /dev/null -e trace=pwrite64,io_uring_setup
        -e inject=io_uring_setup:error=ENOSYS -e inject=pwrite64:delay_exit=300000:when=1)
    for ((i = 0; i < 10; i++)); do
        signalled "$1" "${slowed[@]}" || { echo "exit status $status"; cat "$tmp/out"; return 1; }
        [ "$status" = 0 ] || return 0
    done
    echo "SIG$1 cancelled none of 10"
    return 1
}

# Sets status: 7 and the older file stays, or 0 and it is replaced.
signalled() { # SIGNAL [COMMAND...]: that runs what follows, in the process of its own
    local i signal=$1
    shift
    echo old >"$tmp/old"
    "$@" "$program" save "$tmp/a" "$tmp/old" >"$tmp/out" 2>&1 &
    local saver=$!
    for ((i = 0; i < 2000; i++)); do # the handler is there before the file is
        [ -e "$tmp/old.part" ] && break
        sleep 0.005
    done
    kill -"$signal" "$saver"
    wait "$saver"
    status=$?
    if [ "$status" = 0 ]; then
        mapped verify "$tmp/old"
    else
        [ "$status" = 7 ] && [ "$(cat "$tmp/old")" = old ] && [ ! -e "$tmp/old.part" ]
    fi
}

# Whatever the moment, the name holds one of the two machines, whole, and what is unfinished is refused.
killed() { # TIMES OPTION...
    local times=$1 i k from name=$tmp/k.part torn=0 length idle began
    shift
    mapped save "$tmp/b" "$tmp/sb" && mapped save "$tmp/a" "$tmp/sa" && cp "$tmp/sa" "$tmp/k" || return 1
    [ -p "$tmp/never" ] || mkfifo "$tmp/never"
    exec 9<>"$tmp/never" # a pipe to sleep on
    began=${EPOCHREALTIME/./}
    mapped --version >/dev/null
    idle=$(((${EPOCHREALTIME/./} - began) * 8 / 10)) # until it begins
    began=${EPOCHREALTIME/./}
    mapped save "$@" "$tmp/b" "$tmp/k2" || return 1
    length=$((${EPOCHREALTIME/./} - began - idle))
    [ "$length" -gt 1000 ] || length=1000
    for ((i = 0; i < times; i++)); do
        from=a
        [ $((i % 2)) = 0 ] && from=b
        ln -f "$tmp/k" "$tmp/k.before"
        "$program" save "$@" "$tmp/$from" "$tmp/k" >/dev/null 2>&1 &
        for ((k = 0; k < 2000; k++)); do # most moments are before it begins: skip those
            if [ -e "$name" ] || ! [ "$tmp/k" -ef "$tmp/k.before" ]; then break; fi
            read -rt 0.001 -u 9
        done
        sleep "$(printf '0.%06d' $(((RANDOM * 32768 + RANDOM) % (length / 2) % 1000000)))"
        kill -9 $! 2>/dev/null
        wait $! 2>/dev/null
        mapped diff "$tmp/k" "$tmp/sa" >/dev/null || mapped diff "$tmp/k" "$tmp/sb" >/dev/null ||
            { echo "run $i: the file under the final name is neither the old one nor the new one"; return 1; }
        if [ ! -e "$name" ]; then # too late: the machine was busier when the time was taken
            length=$((length * 3 / 4 > 1000 ? length * 3 / 4 : 1000))
            continue
        fi
        torn=$((torn + 1))
        length=$((length * 5 / 4))
        if mapped verify "$name" >/dev/null 2>&1; then # killed right before it got its name
            mapped diff "$name" "$tmp/s$from" >/dev/null || { echo "run $i: a torn file was taken"; return 1; }
        fi
        rm "$name"
    done
    echo "$torn of $times were torn"
    [ "$torn" -gt 0 ] || { echo "too few to tell"; return 1; }
}

# >>the place of a file

# What lies before --offset is another's: it stays, with its holes, whether the save succeeds or not.
before_the_offset_stays() {
    local at=40000000
    { head -c 5000 /dev/urandom; head -c 20000000 /dev/zero; head -c 19995000 /dev/urandom; } >"$tmp/header" # all of $at
    cp "$tmp/header" "$tmp/h" && echo 'an older image' >>"$tmp/h"
    ends 3 'File too large' prlimit --fsize=50000000 "$program" save --offset ${at}B "$tmp/a" "$tmp/h" &&
        cmp "$tmp/h" <(cat "$tmp/header" && echo 'an older image') && [ ! -e "$tmp/h.part" ] || return 1
    mapped save --offset ${at}B "$tmp/a" "$tmp/h" && cmp -n $at "$tmp/h" "$tmp/header" &&
        mapped verify --offset ${at}B "$tmp/h" || return 1
    rm -f "$tmp/sparse" && truncate -s $((at - 5000)) "$tmp/sparse" && printf 'end' >>"$tmp/sparse"
    mapped save --offset ${at}B "$tmp/a" "$tmp/sparse" && mapped verify --offset ${at}B "$tmp/sparse" &&
        [ "$(tail -c +$((at - 4999)) "$tmp/sparse" | head -c 3)" = end ] || return 1
    [ "$(du -k "$tmp/sparse" | cut -f1)" -lt 9500 ] || { echo "holes took $(du -k "$tmp/sparse")"; return 1; }
}

# Of a descriptor that other file systems do not copy for.
before_the_offset_by_hand() {
    head -c 300000 /dev/urandom >"$tmp/header" && cp "$tmp/header" "$tmp/h" || return 1
    timeout 600 strace -f -qq -o "$tmp/calls" -e trace=copy_file_range -e inject=copy_file_range:error=EXDEV "$program" \
        save --offset 300000B "$tmp/a" "$tmp/h" && grep -q EXDEV "$tmp/calls" && cmp -n 300000 "$tmp/h" "$tmp/header" &&
        mapped verify --offset 300000B "$tmp/h" || return 1
    ends 3 'cannot copy what' timeout 600 strace -f -qq -o "$tmp/calls" -e trace=copy_file_range,pread64 -e \
        inject=copy_file_range:error=EIO "$program" save --offset 300000B "$tmp/b" "$tmp/h" && [ ! -e "$tmp/h.part" ] &&
        mapped verify --offset 300000B "$tmp/h"
}

two_images() {
    local size
    mapped save "$tmp/a" "$tmp/s1" && size=$(stat -c %s "$tmp/s1") && cat "$tmp/s1" "$tmp/s1" >"$tmp/both" || return 1
    ends 5 "ends at file offset $size, and another one begins at file offset $size" mapped verify "$tmp/both" &&
        ends 5 '"whole":false' mapped info --json "$tmp/both" && ends 5 'another one' mapped load "$tmp/both" "$tmp/both.d" &&
        [ ! -e "$tmp/both.d" ] || return 1
    mapped save --offset 64M "$tmp/b" "$tmp/s1" && mapped verify --offset 64M "$tmp/s1" &&
        ends 5 "ends at file offset $size, and another one begins at file offset 67108864" mapped verify "$tmp/s1" || return 1
    mapped save "$tmp/a" "$tmp/s1" && truncate -s +1M "$tmp/s1" &&
        ends 5 "something was appended: a run of zeros begins at file offset $size" mapped verify "$tmp/s1"
}

bad_name() { # PERL WORD...: machine.json, as $j, goes through the expression
    local perl=$1 text=$2
    rm -rf "$tmp/bad" && cp -r "$tmp/a" "$tmp/bad" && perl -MJSON::PP -e 'my $p = $ARGV[0]; open my $in, "<", $p or die;
        local $/; my $j = decode_json(<$in>); eval($ARGV[1]); die $@ if $@; open my $out, ">", $p or die;
        print $out encode_json($j)' "$tmp/bad/machine.json" "$perl" || return 1
    ends 3 "$text" mapped save "$tmp/bad" "$tmp/of.bad" && [ ! -e "$tmp/of.bad" ]
}

# Nothing is read but what load would have made, below the directory.
names_of_a_machine() {
    cp "$tmp/a/ram/rom" "$tmp/secret" && cp "$tmp/a/state" "$tmp/secret.state" || return 1
    bad_name '$j->{blocks}[1]{file} = "../secret"' 'the "file" of rom is "../secret"; must be "ram/rom"' &&
        bad_name '$j->{blocks}[1]{file} = "'"$tmp/secret"'"' 'must be "ram/rom"' &&
        bad_name '$j->{blocks}[1]{file} = "ram/../ram/rom"' 'must be "ram/rom"' &&
        bad_name '$j->{state}{file} = "../secret.state"' 'the "file" of state is "../secret.state"; must be "state"' || return 1
    rm -rf "$tmp/bad" && cp -r "$tmp/a" "$tmp/bad" && ln -sf ../../secret "$tmp/bad/ram/rom" &&
        ends 3 'ram/rom: it is a symbolic link' mapped save "$tmp/bad" "$tmp/of.bad" || return 1
    rm -rf "$tmp/bad" && cp -r "$tmp/a" "$tmp/bad" && ln -sf ../secret.state "$tmp/bad/state" &&
        ends 3 'state: it is a symbolic link' mapped save "$tmp/bad" "$tmp/of.bad" || return 1
    rm -rf "$tmp/bad" "$tmp/bad.ram" && cp -r "$tmp/a" "$tmp/bad" && mv "$tmp/bad/ram" "$tmp/bad.ram" &&
        ln -s ../bad.ram "$tmp/bad/ram" && ends 3 "cannot read $tmp/bad/ram" mapped save "$tmp/bad" "$tmp/of.bad" || return 1
    ln -s a "$tmp/link.to.a" && mapped save "$tmp/link.to.a" "$tmp/of.link" && mapped verify "$tmp/of.link"
}

# A link is what it leads to, also when nothing is there yet.
links_are_followed() {
    mkdir -p "$tmp/disk" "$tmp/names" && echo old >"$tmp/disk/s" && ln -s ../disk/s "$tmp/names/s" || return 1
    mapped save "$tmp/a" "$tmp/names/s" && [ -L "$tmp/names/s" ] && mapped verify "$tmp/disk/s" || return 1
    ln -s "$tmp/disk/new" "$tmp/disk/2" && ln -s ../disk/2 "$tmp/names/2" && mapped save "$tmp/a" "$tmp/names/2" &&
        [ -L "$tmp/names/2" ] && [ -L "$tmp/disk/2" ] && [ ! -L "$tmp/disk/new" ] && mapped verify "$tmp/disk/new" || return 1
    ln -s ../disk/dir "$tmp/names/dir" && mapped load "$tmp/disk/s" "$tmp/names/dir" && [ -L "$tmp/names/dir" ] &&
        same_machine "$tmp/a" "$tmp/disk/dir" || return 1
    ln -s ../disk/ram "$tmp/names/ram" && mapped extract "$tmp/disk/s" pc.ram "$tmp/names/ram" && [ -L "$tmp/names/ram" ] &&
        cmp "$tmp/disk/ram" "$tmp/a/ram/pc.ram" || return 1
    ends 3 '/dev/fd/9 leads to what has no name' bash -c '"$1" save "$2" /dev/fd/9 9> >(cat)' bash "$program" "$tmp/a" &&
        ends 3 '/dev/fd/9 leads to what has no name' bash -c 'exec 9>"$3" && rm "$3" && "$1" save "$2" /dev/fd/9' bash \
            "$program" "$tmp/a" "$tmp/names/removed" && [ -z "$(find "$tmp/names" -name 'removed*')" ] || return 1
    ln -s round "$tmp/names/round" && ends 3 'Too many levels' mapped save "$tmp/a" "$tmp/names/round" &&
        [ -z "$(find "$tmp/disk" "$tmp/names" -name '*.part')" ]
}

mode_stays() {
    mapped save "$tmp/a" "$tmp/m" && [ "$(stat -c %a "$tmp/m")" = 600 ] && chmod 4664 "$tmp/m" &&
        mapped save "$tmp/b" "$tmp/m" && [ "$(stat -c %a "$tmp/m")" = 4664 ] || { stat "$tmp/m"; return 1; }
    rm "$tmp/m" && touch "$tmp/m.part" && chmod 666 "$tmp/m.part" && mapped save "$tmp/b" "$tmp/m" &&
        [ "$(stat -c %a "$tmp/m")" = 600 ] || { stat "$tmp/m"; return 1; }
}

owner_stays() {
    mapped save "$tmp/a" "$tmp/m" && chown 65534:12345 "$tmp/m" && chmod 640 "$tmp/m" && mapped save "$tmp/b" "$tmp/m" &&
        [ "$(stat -c '%u %g %a' "$tmp/m")" = '65534 12345 640' ] || { stat "$tmp/m"; return 1; }
}

# acl WHICH PATH [BYTES]: shows an access list (access or default), or sets it.
make_acl() {
    cat >"$tmp/acl.c" <<'END'
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/xattr.h>
int main(int argc, char **argv) {
    char name[64], list[4096];
    snprintf(name, sizeof name, "system.posix_acl_%s", argv[1]);
    ssize_t n = argc == 3 ? getxattr(argv[2], name, list, sizeof list) : fread(list, 1, sizeof list, stdin);
    if (argc == 3 && n < 0 && errno == ENODATA)
        return 0;
    if (n < 0 || (argc == 4 && setxattr(argv[2], name, list, (size_t)n, 0) < 0))
        return fprintf(stderr, "%s of %s: %s\n", name, argv[2], strerror(errno)), 1;
    return argc == 3 && fwrite(list, 1, (size_t)n, stdout) != (size_t)n;
}
END
    cc "$tmp/acl.c" -o "$tmp/acl"
}

set_acl() { # WHICH PATH UID: who may read
    perl -e 'print pack("V(vvV)5", 2, 1, 6, -1 & 0xffffffff, 2, 4, $ARGV[0], 4, 0, -1 & 0xffffffff, 16, 4, -1 & 0xffffffff,
        32, 0, -1 & 0xffffffff)' "$3" | "$tmp/acl" "$1" "$2" set
}

# Whoever may read the older file may read the new one, and nobody else.
access_list_stays() {
    rm -rf "$tmp/lists" && mkdir "$tmp/lists" && local s=$tmp/lists/s && mapped save "$tmp/a" "$s" && set_acl access "$s" 12345 &&
        "$tmp/acl" access "$s" >"$tmp/list" && [ -s "$tmp/list" ] && mapped save "$tmp/b" "$s" &&
        "$tmp/acl" access "$s" | cmp - "$tmp/list" && [ "$(stat -c %a "$s")" = 640 ] || return 1
    rm "$s" && mapped save "$tmp/a" "$s" && chmod 640 "$s" && set_acl default "$tmp/lists" 12345 && mapped save "$tmp/b" "$s" &&
        [ -z "$("$tmp/acl" access "$s")" ] && [ "$(stat -c %a "$s")" = 640 ]
}

nobody() { # COMMAND...: as a user who may do little; what $tmp/open has is open to all
    rm -rf "$tmp/open" && chmod 711 "$tmp" && mkdir "$tmp/open" && cp -r "$program" "$tmp/a" "$tmp/open" &&
        chmod -R a+rX "$tmp/open"
}

as_nobody() { setpriv --reuid=65534 --regid=65534 --clear-groups -- timeout 600 "$tmp/open/$(basename "$program")" "$@"; }

# A file of another user is not silently taken from that user.
owner_that_cannot_stay() {
    nobody && mkdir -m 777 "$tmp/open/dir" && echo old >"$tmp/open/dir/s" || return 1
    ends 3 'is of user 0 and group 0, and what replaces it cannot be' as_nobody save "$tmp/open/a" "$tmp/open/dir/s" &&
        [ "$(ls -A "$tmp/open/dir")" = s ] && [ "$(cat "$tmp/open/dir/s")" = old ]
}

# What somebody else left, or laid there, under the name of a part: it would be theirs to read and to change.
part_of_another() {
    rm -rf "$tmp/part.of" && mkdir "$tmp/part.of" && local s=$tmp/part.of/s && echo theirs >"$s.part" && chown 12345 "$s.part" || return 1
    ends 3 "s.part is there already, and is of user 12345" mapped save "$tmp/a" "$s" && [ "$(cat "$s.part")" = theirs ] &&
        ends 3 'is of user 12345' mapped extract "$tmp/sa" rom "$s" && [ "$(stat -c '%u %s' "$s.part")" = '12345 7' ] || return 1
    echo older >"$s" && ends 3 'is of user 12345' mapped save "$tmp/a" "$s" && [ "$(cat "$s" "$s.part")" = $'older\ntheirs' ] || return 1
    chown 12345 "$s" && mapped save "$tmp/a" "$s" && mapped verify "$s" && [ ! -e "$s.part" ] || return 1 # a killed save left it
    nobody && mkdir -m 777 "$tmp/open/dir" && echo theirs >"$tmp/open/dir/s.part" && chmod 666 "$tmp/open/dir/s.part" &&
        ends 3 'is of user 0' as_nobody save "$tmp/open/a" "$tmp/open/dir/s" && chmod 600 "$tmp/open/dir/s.part" &&
        ends 3 's.part, which is there already: Permission denied' as_nobody save "$tmp/open/a" "$tmp/open/dir/s" &&
        [ "$(cat "$tmp/open/dir/s.part")" = theirs ] && [ ! -e "$tmp/open/dir/s" ]
}

# A prepared file in a directory that may not be written.
in_a_closed_directory() {
    nobody && mkdir "$tmp/open/dir" && echo old >"$tmp/open/dir/s" && chmod 666 "$tmp/open/dir/s" || return 1
    ends 3 'Permission denied; --in-place writes into' as_nobody save "$tmp/open/a" "$tmp/open/dir/s" &&
        [ "$(cat "$tmp/open/dir/s")" = old ] || return 1
    as_nobody save --in-place "$tmp/open/a" "$tmp/open/dir/s" && mapped verify "$tmp/open/dir/s" &&
        mapped diff "$tmp/open/dir/s" "$tmp/sa" && [ "$(stat -c '%u %a' "$tmp/open/dir/s")" = '0 666' ]
}

# A part that is also another file: that would be emptied, and written.
part_of_two_names() {
    rm -rf "$tmp/part.of" && mkdir "$tmp/part.of" && local s=$tmp/part.of/s && echo mine >"$tmp/part.of/other" &&
        ln "$tmp/part.of/other" "$s.part" && ends 3 's.part is there already, and has 2 names' mapped save "$tmp/a" "$s" &&
        [ "$(cat "$tmp/part.of/other")" = mine ] && rm "$tmp/part.of/other" && mapped save "$tmp/a" "$s" && mapped verify "$s"
}

in_place() {
    local inode
    mapped save "$tmp/b" "$tmp/p" && inode=$(stat -c %i "$tmp/p") && mapped save --in-place "$tmp/a" "$tmp/p" &&
        [ "$(stat -c %i "$tmp/p")" = "$inode" ] && mapped diff "$tmp/p" "$tmp/sa" && [ ! -e "$tmp/p.part" ] &&
        ends 3 'what is written in place must be there' mapped save --in-place "$tmp/a" "$tmp/p2" &&
        [ ! -e "$tmp/p2" ] && ends 3 'neither a regular file nor a block device' mapped save --in-place "$tmp/a" /dev/null &&
        ends 3 'p is in use by another process' flock "$tmp/p" timeout 600 "$program" save --in-place "$tmp/b" "$tmp/p" &&
        ends 3 'p is in use by another process' flock -s "$tmp/p" timeout 600 "$program" save --in-place "$tmp/b" "$tmp/p" &&
        mapped diff "$tmp/p" "$tmp/sa" && ends 2 '--in-place is for save' mapped verify --in-place "$tmp/p"
}

# Until the last moment what is there is no snapshot, and what lies before it stays.
in_place_and_failed() {
    head -c 5000 /dev/urandom >"$tmp/header" && cp "$tmp/header" "$tmp/p" && mapped save --offset 5000B "$tmp/b" "$tmp/p" || return 1
    ends 3 'File too large' prlimit --fsize=9000000 "$program" save --in-place --offset 5000B "$tmp/a" "$tmp/p" &&
        cmp -n 5000 "$tmp/p" "$tmp/header" && ends 5 '' mapped verify --offset 5000B "$tmp/p" || return 1
    mapped save --in-place --offset 5000B "$tmp/a" "$tmp/p" && mapped verify --offset 5000B "$tmp/p" &&
        cmp -n 5000 "$tmp/p" "$tmp/header"
}

# The magic of the older snapshot is gone from the disk before anything else is written.
in_place_the_magic_goes_first() { # FILE
    mapped save ${2:+"$2"} "$tmp/b" "$1" || return 1
    timeout 600 strace -f -qq -o "$tmp/calls" -e trace=pwrite64,fsync,ftruncate,io_uring_setup -e inject=fsync:error=EIO:when=1 \
        "$program" save --in-place "$tmp/a" "$1" >"$tmp/out" 2>&1
    [ $? = 3 ] && grep -q 'brought to the disk: Input/output error' "$tmp/out" &&
        [ "$(grep -v SIG "$tmp/calls" | sed 's/^[0-9]* *\([a-z0-9]*\)(.*/\1/' | tr '\n' ' ')" = 'pwrite64 fsync ' ] &&
        ends 5 'no magic' mapped verify "$1" || { cat "$tmp/out" "$tmp/calls"; return 1; }
}

# Whatever the moment of a kill, the file is no snapshot, or the new one.
in_place_killed() { # TIMES FILE
    local i torn=0
    for ((i = 0; i < $1; i++)); do
        mapped save --in-place "$tmp/b" "$2" || return 1
        "$program" save --in-place "$tmp/a" "$2" >/dev/null 2>&1 &
        sleep "0.0$(printf %02d $((RANDOM % 100)))"
        kill -9 $! 2>/dev/null
        wait $! 2>/dev/null
        if mapped verify "$2" >/dev/null 2>&1; then
            mapped diff "$2" "$tmp/sa" >/dev/null || mapped diff "$2" "$tmp/sb" >/dev/null ||
                { echo "run $i: what is there passes as whole, and is neither"; return 1; }
        else
            torn=$((torn + 1))
        fi
    done
    echo "$torn of $1 were torn"
}

on_a_device() {
    truncate -s 64M "$tmp/disk.img" && head -c 67108864 /dev/urandom >"$tmp/disk.img" || return 1
    ends 3 '--in-place writes into a block device' mapped save "$tmp/a" "$device" &&
        mapped save --in-place "$tmp/a" "$device" && mapped verify "$device" && mapped diff "$device" "$tmp/sa" &&
        ends 0 '"whole":true' mapped info --json "$device" && rm -rf "$tmp/back" && mapped load "$device" "$tmp/back" &&
        same_machine "$tmp/a" "$tmp/back" || return 1
    mapped save --in-place --direct --threads 2 --offset 4096B "$tmp/b" "$device" && mapped diff --offset 4096B "$device" "$device" &&
        ends 3 'the device has 67108864 bytes' mapped save --in-place --offset 60M "$tmp/a" "$device" &&
        mapped verify --offset 4096B "$device" && in_place_the_magic_goes_first "$device" --in-place
}

# A file that is put in its place meanwhile, by a writer who does not write in place.
in_place_and_replaced() {
    local i status
    cp "$tmp/sb" "$tmp/p" && cp "$tmp/sb" "$tmp/p2" || return 1
    timeout 600 strace -f -qq -o "$tmp/calls" -e trace=fsync -e inject=fsync:delay_enter=3000000:when=2 "$program" \
        save --in-place "$tmp/a" "$tmp/p" >"$tmp/out" 2>&1 &
    for ((i = 0; i < 6000; i++)); do # its magic goes first; no program of ours looks, whose lock could refuse the save
        cmp -s -n 4 "$tmp/p" "$tmp/p2" || break
        sleep 0.01
    done
    mv "$tmp/p2" "$tmp/p"
    wait $!
    status=$?
    [ "$status" = 3 ] && grep -q 'removed or replaced' "$tmp/out" && mapped diff "$tmp/p" "$tmp/sb" ||
        { echo "exit status $status"; cat "$tmp/out"; return 1; }
}

# An operator's slips: what is read is named as what is written, or no name at all.
not_over_what_is_read() {
    rm -rf "$tmp/c" "$tmp"/*.part && cp -r "$tmp/a" "$tmp/c" && ends 2 'is what is read (ram/pc.ram)' mapped save "$tmp/c" "$tmp/c/ram/pc.ram" &&
        ends 2 'is what is read (state)' mapped save --in-place "$tmp/c" "$tmp/c/state" && same_machine "$tmp/a" "$tmp/c" &&
        ends 2 'is what is read' mapped extract "$tmp/sa" pc.ram "$tmp/sa" && mapped verify "$tmp/sa" &&
        cp "$tmp/sa" "$tmp/kept.part" && ends 3 'another process' mapped extract "$tmp/kept.part" pc.ram "$tmp/kept" &&
        cmp "$tmp/sa" "$tmp/kept.part" && rm "$tmp/kept.part" &&
        ends 3 'the name of a file is missing' mapped save "$tmp/a" '' &&
        ends 3 'the name of a file is missing' mapped save "$tmp/a" "$tmp/nodir/" && ends 3 'not a regular file' mapped save "$tmp/a" "$tmp/a" &&
        mapped load "$tmp/sa" "$tmp/slash//" && same_machine "$tmp/a" "$tmp/slash" &&
        ends 3 'the name of a directory is missing' mapped load "$tmp/sa" '' && [ -z "$(find "$tmp" . -maxdepth 1 -name '*.part')" ]
}

device_in_use() {
    mkfs.ext4 -q -F "$device" && mkdir -p "$tmp/mnt" && unshare -m sh -c 'mount "$1" "$2" && "$3" save --in-place "$4" "$1"' sh \
        "$device" "$tmp/mnt" "$program" "$tmp/a" >"$tmp/out" 2>&1
    [ $? = 3 ] && grep -q 'Device or resource busy' "$tmp/out" || { cat "$tmp/out"; return 1; }
}

# Device state whose end is missing is read as far as the device goes: here for a quarter of an hour at least.
device_without_an_end() {
    local saver i status command
    truncate -s 1T "$tmp/disk.img" && losetup -c "$device" && mapped save --in-place "$tmp/a" "$device" &&
        i=$(stat -c %s "$tmp/sa") && dd if=/dev/zero of="$device" bs=1 seek=$((i - 1)) count=1 conv=notrunc status=none || return 1
    for command in info verify "load $tmp/endless"; do
        # shellcheck disable=SC2086 # a command and its arguments
        "$program" ${command%% *} "$device" ${command#"${command%% *}"} >"$tmp/out" 2>&1 &
        saver=$!
        for ((i = 0; i < 6000; i++)); do # 64 MiB: it has left the RAM behind
            [ "$(sed -n 's/^rchar: //p' "/proc/$saver/io")" -lt 67108864 ] || break
            sleep 0.01
        done
        kill -INT "$saver"
        for ((i = 0; i < 6000; i++)); do
            kill -0 "$saver" 2>/dev/null || break
            sleep 0.01
        done
        kill -9 "$saver" 2>/dev/null
        wait "$saver"
        status=$?
        [ "$status" = 7 ] && grep -q cancelled "$tmp/out" || { echo "$command: exit status $status"; cat "$tmp/out"; return 1; }
    done
    [ -z "$(find "$tmp" -name 'endless*')" ]
}

long_names() { # of files; a block's are qemu_examples.sh's
    local name letters
    name=$(printf 'n%.0s' {1..255})
    letters=$(printf '\xc3\xa4%.0s' {1..127})
    rm -rf "$tmp"/*.part
    mapped save "$tmp/a" "$tmp/$name" && mapped verify "$tmp/$name" && mapped save "$tmp/b" "$tmp/$name" &&
        mapped save "$tmp/a" "$tmp/$letters" && mapped load "$tmp/$name" "$tmp/${name%n}d" && same_machine "$tmp/b" "$tmp/${name%n}d" &&
        mapped extract "$tmp/$letters" rom "$tmp/${letters}x" && cmp "$tmp/${letters}x" "$tmp/a/ram/rom" &&
        ends 3 'File name too long' mapped save "$tmp/a" "$tmp/${name}n" && [ -z "$(find "$tmp" -name '*.part')" ]
}

hangup_ignored() { # by nohup
    (trap '' HUP; exec "$program" save "$tmp/a" "$tmp/old") >"$tmp/out" 2>&1 &
    local saver=$! i
    for ((i = 0; i < 2000; i++)); do
        [ -e "$tmp/old.part" ] && break
        sleep 0.005
    done
    kill -HUP "$saver"
    wait "$saver" || { cat "$tmp/out"; return 1; }
    mapped verify "$tmp/old"
}

places() {
    mapped save "$tmp/a" "$tmp/sa" && mapped save "$tmp/b" "$tmp/sb" || { not_ok 'snapshots to compare with'; return; }
    check 'what lies before --offset stays' before_the_offset_stays
    check 'a second image behind the first is refused' two_images
    check 'names that load would not have given are refused' names_of_a_machine
    check 'a link is what it leads to' links_are_followed
    check 'the mode of a file that is replaced stays' mode_stays
    if make_acl && : >"$tmp/list" && set_acl access "$tmp/list" 1 2>"$tmp/err"; then
        check 'the access list of a file that is replaced stays' access_list_stays
    else
        skip 'the access list of a file that is replaced stays' "$(tail -n 1 "$tmp/err")"
    fi
    check 'a part with two names is refused' part_of_two_names
    check 'in place' in_place
    check 'in place, and it fails' in_place_and_failed
    cp "$tmp/sb" "$tmp/sp"
    check 'in place, killed 20 times' in_place_killed 20 "$tmp/sp"
    check 'not over what is read' not_over_what_is_read
    check 'long names' long_names
    check 'cancelled by SIGHUP' cancelled HUP
    check 'cancelled by other signals that end a program' cancelled_by_others
    check 'nohup' hangup_ignored
    if can_inject; then
        check 'what lies before --offset is copied by hand' before_the_offset_by_hand
        check 'in place, and replaced meanwhile' in_place_and_replaced
        check 'in place the older magic goes first' in_place_the_magic_goes_first "$tmp/sp"
    fi
    if [ "$(id -u)" = 0 ] && command -v setpriv >/dev/null; then
        check 'the owner of a file that is replaced stays' owner_stays
        check 'a file whose owner cannot stay is not replaced' owner_that_cannot_stay
        check 'a prepared file in a closed directory' in_a_closed_directory
        check 'a part of another user is refused' part_of_another
    else
        skip 'owners' 'not root, or not installed: setpriv'
    fi
    truncate -s 64M "$tmp/disk.img"
    if device=$(losetup --find --show "$tmp/disk.img" 2>/dev/null); then
        check 'a block device' on_a_device
        check 'a block device, killed 10 times' in_place_killed 10 "$device"
        check 'a block device that is in use' device_in_use
        check 'a block device whose device state has no end' device_without_an_end
    else
        device=
        skip 'a block device' 'no loop device can be had'
    fi
}

alone() {
    make_machine "$tmp/a" 1 && make_machine "$tmp/b" 2 || { not_ok 'machines to save' 'they could not be made'; done_testing; }
    check 'saved and loaded' saved_and_loaded
    check 'saved and loaded by three threads' saved_and_loaded --threads 3
    check 'saved and loaded past the page cache' saved_and_loaded --direct --threads 2
    check 'saved and loaded without io_uring' saved_and_loaded --no-uring
    check 'saved and loaded past the page cache without io_uring' saved_and_loaded --no-uring --direct --threads 2
    check 'saved and loaded at an offset' saved_and_loaded --offset 5000
    check 'saved and loaded with other alignments' saved_and_loaded --align 4K
    check 'saved and loaded with pages of zeros' saved_and_loaded --every-page
    check 'holes stay holes' holes_stay
    check 'info' info_tells
    check 'info of a torn file' info_of_a_torn_file
    check 'diff' differences
    check 'extract' extracts
    check 'no command' ends 2 'a command is wanted' mapped
    check 'a command that is none' ends 2 'no command frob' mapped frob
    check 'too few arguments' ends 2 'diff wants 2 arguments' mapped diff x
    check 'threads out of range' ends 2 'a number from 1 to 64' mapped info --threads 65 x
    check 'an alignment that is none' ends 2 'file_align 5000: must be a power of two' \
        mapped save --align 5000B "$tmp/a" "$tmp/n"
    check 'what is no snapshot, and no place for one' no_file_for_a_snapshot
    check 'a directory that exists' ends 3 'exists: name a directory that does not' mapped load "$tmp/s" "$tmp/a"
    check 'a file that another process writes' written_by_another
    check 'cancelled by SIGINT' cancelled INT
    check 'cancelled by SIGTERM' cancelled TERM
    if can_mount; then
        check 'no space left' no_space
        check 'no space left for a directory' no_space_for_a_directory
        check 'a read-only file system' read_only
    else
        skip 'no space left, a read-only file system' 'nothing can be mounted here'
    fi
    if can_inject; then
        broken_calls
    elif command -v strace >/dev/null; then
        skip 'calls that fail' 'strace may not trace here'
    else
        skip 'calls that fail' 'not installed: strace'
    fi
    places
    check 'killed 50 times' killed 50
    check 'killed 50 times, with threads and without waiting for the disk' killed 50 --threads 3 --no-sync
}

# >>QEMU

qemu= # that takes part

start() { # END OPTION...
    local end=$1
    shift
    rm -f "$tmp/$end.qmp"
    timeout -k 5 600 "$qemu" -machine q35,memory-backend=pc.ram -accel tcg,tb-size=32 -m 64M -display none -nodefaults \
        -no-user-config -qmp "unix:$tmp/$end.qmp,server=on,wait=off" -serial "file:$tmp/$end.serial" \
        -object "memory-backend-file,id=pc.ram,size=64M,mem-path=$tmp/$end.ram,share=on" "$@" \
        </dev/null >"$tmp/$end.log" 2>&1 &
    pid=$!
}

qmp() { # END COMMAND...
    local end=$1
    shift
    tests/vm/qmp.pl --timeout 600 "$tmp/$end.qmp" "$@" >"$tmp/$end.answer" && return
    cat "$tmp/$end.answer" "$tmp/$end.log"
    return 1
}

stop() { # END
    qmp "$1" quit && wait "$pid"
}

configure() { # END plain|multifd|direct
    local more='' parameters=
    [ "$2" = plain ] || more=',{"capability":"multifd","state":true}'
    qmp "$1" migrate-set-capabilities '{"capabilities":[{"capability":"mapped-ram","state":true}'"$more"']}' || return 1
    [ "$2" = plain ] || parameters='"multifd-channels":2,'
    [ "$2" = direct ] && parameters+='"direct-io":true,'
    qmp "$1" migrate-set-parameters '{'"$parameters"'"max-bandwidth":10000000000}'
}

qemu_saves() { # MODE FILE [OFFSET]: of a guest that is running or not, in QEMU `src`
    local uri=file:$2${3:+,offset=$3}
    configure src "$1" && qmp src migrate '{"uri":"'"$uri"'"}' && qmp src wait
}

qemu_loads() { # MODE FILE [OFFSET]: into QEMU `dst`
    local uri=file:$2${3:+,offset=$3}
    configure dst "$1" && qmp dst migrate-incoming '{"uri":"'"$uri"'"}' && qmp dst wait
}

# The paused guest, saved by QEMU in a mode: its memory is what it was.
read_from_qemu() { # MODE FILE [OFFSET]
    cp --sparse=always "$tmp/wanted.ram" "$tmp/src.ram"
    start src -S
    qemu_saves "$@" && stop src || return 1
    local at=${3:+--offset=${3}B}
    mapped verify ${at:+"$at"} "$2" && mapped extract ${at:+"$at"} "$2" pc.ram "$tmp/x" && cmp "$tmp/x" "$tmp/wanted.ram"
}

# Two images in one file: each can be had by QEMU alone, and here neither passes for more than it is.
two_of_qemu() {
    read_from_qemu plain "$tmp/two" && read_from_qemu plain "$tmp/two" 134217728 &&
        ends 5 'another one begins at file offset 134217728' mapped verify "$tmp/two" &&
        ends 5 'another one' mapped extract "$tmp/two" pc.ram "$tmp/y" && [ ! -e "$tmp/y" ]
}

# A file of ours behind one of QEMU's leaves that alone, and QEMU loads either.
ours_behind_theirs() {
    rm -rf "$tmp/vm" && mapped load "$tmp/theirs" "$tmp/vm" && cp --sparse=always "$tmp/theirs" "$tmp/two" &&
        mapped save --offset 128M "$tmp/vm" "$tmp/two" && cmp -n "$(stat -c %s "$tmp/theirs")" "$tmp/two" "$tmp/theirs" || return 1
    local at
    for at in '' 134217728; do
        truncate -s 0 "$tmp/dst.ram"
        start dst -S -incoming defer
        qemu_loads plain "$tmp/two" $at && cmp "$tmp/dst.ram" "$tmp/wanted.ram" && stop dst || return 1
    done
}

# What QEMU saved, written again with these options, is loaded by QEMU; saved by it again, no page differs.
loaded_by_qemu() { # MODE OPTION...
    local mode=$1 at='' option
    shift
    rm -rf "$tmp/vm" "$tmp/ours"
    for option; do
        case $option in --offset=*) at=${option#--offset=} && at=${at%B} ;; esac
    done
    mapped load "$tmp/theirs" "$tmp/vm" && mapped save "$@" "$tmp/vm" "$tmp/ours" || return 1
    truncate -s 0 "$tmp/dst.ram"
    start dst -S -incoming defer
    qemu_loads "$mode" "$tmp/ours" "$at" && cmp "$tmp/dst.ram" "$tmp/wanted.ram" || return 1
    configure dst plain && qmp dst migrate '{"uri":"file:'"$tmp/again"'"}' && qmp dst wait && stop dst || return 1
    mapped diff "$tmp/theirs" "$tmp/again" >"$tmp/out"
    if grep -v '^device state' "$tmp/out"; then return 1; fi
}

wait_for_guest() {
    local i
    for ((i = 0; i < 600; i++)); do
        [ "$(grep -sc . "$tmp/src.serial")" -ge 3 ] && return
        sleep 0.1
    done
    echo 'the guest has not counted within 60 s'
    return 1
}

# A guest that counts is saved while it runs, written again, loaded, and goes on.
goes_on() { # MODE OPTION...
    local mode=$1 saved first last disk
    shift
    disk=(-drive "file=$tmp/guest.img,format=raw,if=none,id=disk,readonly=on" -device 'virtio-blk-pci,drive=disk')
    rm -rf "$tmp/vm" "$tmp/live" "$tmp/src.serial"
    truncate -s 0 "$tmp/src.ram" "$tmp/dst.ram"
    start src "${disk[@]}"
    wait_for_guest && qemu_saves "$mode" "$tmp/live" && stop src || return 1
    mapped extract "$tmp/live" pc.ram "$tmp/x" && cmp "$tmp/x" "$tmp/src.ram" || return 1
    read -r _ saved _ < <(tests/vm/counter_check.pl "$tmp/x")
    mapped load "$tmp/live" "$tmp/vm" && mapped save "$@" "$tmp/vm" "$tmp/ours" || return 1
    start dst -S -incoming defer "${disk[@]}"
    qemu_loads "$mode" "$tmp/ours" || return 1
    read -r _ first _ < <(tests/vm/counter_check.pl "$tmp/dst.ram")
    qmp dst cont && sleep 2 && qmp dst stop && stop dst || return 1
    read -r _ last _ < <(tests/vm/counter_check.pl "$tmp/dst.ram")
    echo "saved in pass $saved, loaded in pass $first, then pass $last"
    [ "${saved:-none}" = "${first:-0}" ] && [ "${last:-0}" -gt "$first" ]
}

# QEMU refuses what was not finished.
torn_for_qemu() {
    head -c 60000000 "$tmp/theirs" >"$tmp/torn"
    dd if=/dev/zero of="$tmp/torn" bs=8 count=1 conv=notrunc status=none
    ends 5 'no magic' mapped verify "$tmp/torn" || return 1
    start dst -S -incoming "file:$tmp/torn" -global migration.mapped-ram=on
    if wait "$pid"; then echo 'QEMU loaded a torn file'; return 1; fi
}

# Sets qemu, or says why not.
take_qemu() { # PART FOLDER: of fetch.sh
    local reason
    qemu=$build/vm/$2/run
    reason=$(timeout -k 5 900 tests/vm/fetch.sh "$build" "$1" 2>&1) && return
    if [ "${CI:-}" = true ]; then not_ok "$2" "$reason"; else skip "$2" "${reason//$'\n'/; }"; fi
    return 1
}

make_guests() {
    tests/vm/ram_image.pl "$tmp/wanted.ram" 64 8 && gcc -m32 -c tests/vm/counter_guest.S -o "$tmp/guest.o" &&
        ld -m elf_i386 -Ttext=0x7c00 --oformat=binary "$tmp/guest.o" -o "$tmp/guest.img"
}

with_qemu_10() {
    take_qemu qemu10 qemu-10.0 || return
    check 'a file of QEMU' read_from_qemu plain "$tmp/theirs"
    check 'a file of QEMU with multifd' read_from_qemu multifd "$tmp/theirs.multifd"
    check 'a file of QEMU with multifd and direct-io' read_from_qemu direct "$tmp/theirs.direct"
    check 'a file of QEMU at an offset' read_from_qemu plain "$tmp/theirs.offset" 4608
    check 'two files of QEMU in one' two_of_qemu
    check 'one of ours behind one of QEMU' ours_behind_theirs
    check 'written again, QEMU loads it' loaded_by_qemu plain
    check 'written again by threads with pages of 64 KiB alignment, with multifd' loaded_by_qemu multifd --threads 3 --align 64K
    check 'written again past the page cache, with multifd and direct-io' loaded_by_qemu direct --direct
    check 'written again with 4 KiB alignment, with multifd and direct-io' loaded_by_qemu direct --align 4K
    check 'written again at an offset' loaded_by_qemu plain --offset=70000B
    check 'written again with pages of zeros' loaded_by_qemu plain --every-page
    check 'a guest that runs goes on' goes_on plain
    check 'a guest that runs goes on, with multifd and direct-io' goes_on direct --direct --threads 2
    check 'QEMU refuses what was not finished' torn_for_qemu
}

with_qemu_11() {
    take_qemu qemu11 qemu-11 || return
    check 'a file of QEMU 11' read_from_qemu plain "$tmp/theirs"
    check 'a file of QEMU 11 with multifd and direct-io' read_from_qemu direct "$tmp/theirs.direct"
    check 'written again, QEMU 11 loads it' loaded_by_qemu plain --align 64K
    check 'written again past the page cache, QEMU 11 loads it with multifd and direct-io' loaded_by_qemu direct --direct
    check 'a guest that runs in QEMU 11 goes on' goes_on plain
}

alone
check 'guests for QEMU' make_guests
with_qemu_10
with_qemu_11
done_testing
