#!/usr/bin/env bash
# mapped_ram.sh PROGRAM BUILD: the example mapped_ram, alone and both ways with stock QEMU 10.0 on this host: what it
# wrote is read, and what is written here, in other layouts, is loaded by it and its guest goes on. Reports as TAP.
# Without a network BUILD/vm/qemu-10.0 (tests/vm/fetch.sh) must be there; else the part with QEMU is skipped, which with
# CI=true is a failure.
# shellcheck disable=SC2015,SC2016,SC2119,SC2120,SC2317 # a && b || fail; perl and sh in quotes; called by check
set -u
cd "$(dirname "$0")/.." || exit 1
# shellcheck source=tests/tap.sh
. tests/tap.sh
[ $# = 2 ] || { echo "usage: mapped_ram.sh PROGRAM BUILD" >&2; exit 2; }
program=$1
build=$2
tmp=$(mktemp -d)
tidy() {
    jobs -p | xargs -r kill 2>/dev/null
    wait
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
    ends 3 'is being written by another process' flock "$tmp/l.part" timeout 600 "$program" save "$tmp/a" "$tmp/l" &&
        [ -e "$tmp/l.part" ]
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

read_only() {
    mkdir -p "$tmp/ro"
    ends 3 'Read-only file system' unshare -m sh -c \
        'mount -t tmpfs -o ro none "$1/ro" && timeout 600 "$2" save "$1/a" "$1/ro/s"' sh "$tmp" "$program"
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

cancelled() { # SIGNAL
    local i status
    echo old >"$tmp/old"
    "$program" save "$tmp/a" "$tmp/old" >"$tmp/out" 2>&1 &
    local saver=$!
    for ((i = 0; i < 2000; i++)); do # the handler is there before the file is
        [ -e "$tmp/old.part" ] && break
        sleep 0.005
    done
    kill -"$1" "$saver"
    wait "$saver"
    status=$?
    if [ "$status" = 0 ]; then # it was faster
        mapped verify "$tmp/old"
    else
        [ "$status" = 7 ] && [ "$(cat "$tmp/old")" = old ] && [ ! -e "$tmp/old.part" ]
    fi || { echo "exit status $status"; cat "$tmp/out"; return 1; }
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
        [ -e "$name" ] || continue
        torn=$((torn + 1))
        if mapped verify "$name" >/dev/null 2>&1; then # killed right before it got its name
            mapped diff "$name" "$tmp/s$from" >/dev/null || { echo "run $i: a torn file was taken"; return 1; }
        fi
        rm "$name"
    done
    echo "$torn of $times were torn"
    [ "$torn" -gt 0 ] || { echo "too few to tell"; return 1; }
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
    check 'killed 50 times' killed 50
    check 'killed 50 times, with threads and without waiting for the disk' killed 50 --threads 3 --no-sync
}

# >>QEMU

qemu=$build/vm/qemu-10.0/run

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

with_qemu() {
    local reason
    if ! reason=$(timeout -k 5 900 tests/vm/fetch.sh "$build" qemu10 2>&1); then
        if [ "${CI:-}" = true ]; then not_ok 'QEMU 10.0' "$reason"; else skip 'QEMU 10.0' "${reason//$'\n'/; }"; fi
        return
    fi
    tests/vm/ram_image.pl "$tmp/wanted.ram" 64 8 && gcc -m32 -c tests/vm/counter_guest.S -o "$tmp/guest.o" &&
        ld -m elf_i386 -Ttext=0x7c00 --oformat=binary "$tmp/guest.o" -o "$tmp/guest.img" ||
        { not_ok 'a guest' 'it could not be made'; return; }
    check 'a file of QEMU' read_from_qemu plain "$tmp/theirs"
    check 'a file of QEMU with multifd' read_from_qemu multifd "$tmp/theirs.multifd"
    check 'a file of QEMU with multifd and direct-io' read_from_qemu direct "$tmp/theirs.direct"
    check 'a file of QEMU at an offset' read_from_qemu plain "$tmp/theirs.offset" 4608
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

alone
with_qemu
done_testing
