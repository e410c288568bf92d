#!/usr/bin/env bash
# qemu_peer.sh BUILD GROUP...: qemu_sink and qemu_source of BUILD with stock QEMUs at the other end: 7.2, the one that
# is installed, 10.0 and 11 (11.1 or later), of Debian's backports. Reports as TAP.
#
# All of it runs in a small virtual machine with RDMA devices, which tests/vm makes in BUILD; one is started for all
# groups named. Where that cannot be, they are skipped and say why; with CI=true that is a failure.
#
# GROUP:
#   moves      a paused guest, QEMU to directory to QEMU to directory: RAM of every block compared. Over RoCE and iWARP
#   runs       a guest that runs, before and after; cancelled; either end killed
#   refuses    what a QEMU may not ask for, and who is no QEMU
#   files      QEMU to snapshot file to QEMU, and a snapshot file of QEMU's to QEMU; a disk that is full
#   libfabric  a QEMU that migrates to qemu_sink over libfabric's verbs provider
#   chunks     QEMU 11, whose chunk size can be set: both ways, paused and running, equal sizes and unequal ones
#   asan       some of the above with the programs of BUILD/asan
# shellcheck disable=SC2016,SC2034,SC2317,SC2319 # evaluated later; used by name; called by check
set -u
cd "$(dirname "$0")/.." || exit 1
# shellcheck source=tests/tap.sh
. tests/tap.sh
# shellcheck source=tests/vm_tap.sh
. tests/vm_tap.sh

usage() {
    sed -n '2s/^# \([^:]*\):.*/usage: \1/p' "$0" >&2
    exit 2
}

inside=
[ "${1:-}" != --inside ] || { inside=yes && shift; }
[ $# -ge 2 ] || usage
build=$1
shift
for group; do
    case $group in moves | runs | refuses | files | libfabric | chunks | asan) ;; *) usage ;; esac
done
made=$build/qemu_peer

# >>outside

# The guest of tests/vm/counter_guest.S, on a disk.
make_guest() { # FOLDER
    gcc -m32 -c tests/vm/counter_guest.S -o "$1/guest.o" &&
        ld -m elf_i386 -Ttext=0x7c00 --oformat=binary "$1/guest.o" -o "$1/guest.img"
}

# A source that connects as a QEMU does and leaves without a word.
make_caller() { # FOLDER
    cat >"$1/caller.c" <<'END'
#define RMIG_IMPLEMENTATION
#include "rmig.h"
#include "rmig_fabric_verbs.h"
int main(int argc, char **argv) {
    static uint8_t ram[4096];
    struct rmig_error err = {0};
    struct rmig_config cfg = {.trace = NULL};
    struct rmig_block_desc block = {.name = "ram", .host = ram, .length = sizeof ram};
    struct rmig_source *source = NULL;
    uint32_t index;
    struct rmig_fabric *fabric = argc == 2 ? rmig_verbs_open(NULL, &err) : NULL;
    rmig_set_extension(&cfg, 0, NULL);
    int rc = fabric == NULL ? -1 : rmig_source_open(fabric, &cfg, &source, &err);
    if (rc == RMIG_OK && (rc = rmig_source_add_block(source, &block, &index)) == RMIG_OK)
        rc = rmig_source_connect(source, argv[1]);
    if (rc != RMIG_OK)
        fprintf(stderr, "caller: %s\n", source == NULL ? err.text : rmig_source_error(source)->text);
    rmig_source_close(source);
    rmig_fabric_close(fabric);
    return rc == RMIG_OK ? 0 : 1;
}
END
    "${CC:-cc}" -std=c11 -O1 -I. "$1/caller.c" -o "$1/caller" -lrdmacm -libverbs
}

make_all() {
    local folder status
    mkdir -p "$made" && folder=$(mktemp -d "$made/XXXXXX") || return 1 # groups may be started side by side
    make_guest "$folder" && make_caller "$folder" && mv "$folder"/guest.img "$folder"/caller "$made"
    status=$?
    rm -r "$folder"
    return "$status"
}

if [ -z "$inside" ]; then
    prepare=make_all
    needs=(rping ib_write_bw)
    vm_options=(--memory 1280 --timeout 1800)
    parts='vm qemu10'
    [[ " $* " != *' chunks '* ]] || parts+=' qemu11'
    in_machine "stock QEMU as the peer: $*" "$build" "$parts" tests/qemu_peer.sh --inside "$build" "$@"
fi

# >>inside

tmp=$(mktemp -d /dev/shm/qemu_peer.XXXXXX) || exit 1 # not a disk's file system: some let nobody pin their pages
trap 'rm -rf "$tmp"' EXIT
image=$tmp/image
size=64
programs=$build
address=$RXE_ADDR
fabric=(--fabric verbs)
out=$tmp/test/vm
snapshot= # a file in place of the directory $out
sink_options=() source_options=() guest=(-S)

says() { # FILE WORD...: all words are in it
    local file=$1 word
    shift
    for word in "$@"; do
        grep -qiF -- "$word" "$file" || { echo "\"$word\" is not said:"; cat "$file"; return 1; }
    done
}

# The program itself, below `timeout`.
below() { pgrep -P "$1" | head -n 1; }

# Runs a test in a folder of its own; nothing of it is left running. What its programs said is shown when it fails.
peer() { # NAME COMMAND...
    check "$1" in_folder "${@:2}"
}

in_folder() {
    local status log
    rm -rf "$tmp/test"
    mkdir "$tmp/test" || return 1
    "$@"
    status=$?
    jobs -p | xargs -r kill 2>/dev/null
    wait
    [ "$status" = 0 ] && return
    for log in "$tmp"/test/*.log; do
        [ -s "$log" ] && echo "--- ${log##*/}" && tail -n 20 "$log"
    done
    return "$status"
}

# >>QEMU

program() { # VERSION
    case $1 in
    7.2) echo qemu-system-x86_64 ;;
    10.0) echo "$build/vm/qemu-10.0/run" ;;
    11) echo "$build/vm/qemu-11/run" ;;
    esac
}

machine() { # VERSION VERSION: one that both know
    [ "$1" = "$2" ] && echo q35 || echo pc-q35-7.2
}

declare -A pid to from # of each QEMU, by the name that a test gives it: its process, QMP to it and from it
declare -A chunk       # of QEMU 11, likewise: its chunk size in MiB, where it is not to be its default
qmp_id=0

# Its RAM is $tmp/test/END.ram, which may be there already.
start_qemu() { # END VERSION MACHINE OPTION...
    local end=$1 version=$2 machine=$3 qmp=$tmp/test/$1.qmp writer reader
    shift 3
    [ -e "$tmp/test/$end.ram" ] || truncate -s "${size}M" "$tmp/test/$end.ram"
    mkfifo "$qmp.in" "$qmp.out" || return 1
    exec {writer}<>"$qmp.in" {reader}<>"$qmp.out" # opened so, neither waits for the other end
    to[$end]=$writer
    from[$end]=$reader
    timeout -k 5 900 "$(program "$version")" -machine "$machine,memory-backend=pc.ram" -accel tcg,tb-size=32 \
        -m "${size}M" -display none -nodefaults -no-user-config \
        -object "memory-backend-file,id=pc.ram,size=${size}M,mem-path=$tmp/test/$end.ram,share=on" \
        -chardev "pipe,id=qmp,path=$qmp" -mon chardev=qmp,mode=control "$@" "${guest[@]/END/$end}" \
        </dev/null >"$tmp/test/$end.log" 2>&1 &
    pid[$end]=$!
    qmp "$end" qmp_capabilities || return 1
    [ -z "${chunk[$end]:-}" ] ||
        qmp "$end" migrate-set-parameters "{\"x-rdma-chunk-size\": $((chunk[$end] * 1048576))}"
}

# Runs a command; sets answer, one line. Returns 1 when QEMU refuses, 2 when it does not answer.
qmp() { # END COMMAND [ARGUMENTS]
    local end=$1 until=$((SECONDS + 60)) piece ours
    [ -n "${3:-}" ] || set -- "$1" "$2" '{}'
    qmp_id=$((qmp_id + 1))
    ours="\"id\": ${qmp_id}[,}]"
    printf '{"execute": "%s", "arguments": %s, "id": %d}\n' "$2" "$3" "$qmp_id" >&"${to[$end]}"
    answer=
    while [ "$SECONDS" -lt "$until" ]; do
        if ! IFS= read -r -t 0.5 -u "${from[$end]}" piece; then
            answer+=$piece
            kill -0 "${pid[$end]}" 2>/dev/null && continue
            echo "$end's QEMU has ended"
            return 2
        fi
        answer+=$piece
        if [[ $answer =~ $ours ]]; then
            [[ $answer != *'"error": {'* ]] && return
            echo "$end's QEMU on $2: $answer"
            return 1
        fi
        answer= # an event, or what it says first
    done
    echo "$end's QEMU did not answer $2 within 60 s"
    return 2
}

field() { # NAME: of the answer, a word or a number
    local pattern="\"$1\": \"?([^\",}]*)"
    [[ $answer =~ $pattern ]] && echo "${BASH_REMATCH[1]}"
}

capabilities() { # END NAMES
    local name list=
    for name in $2; do
        list+="${list:+, }{\"capability\": \"$name\", \"state\": true}"
    done
    [ -z "$list" ] || qmp "$1" migrate-set-capabilities "{\"capabilities\": [$list]}"
}

has_ended() { # END: its migration has; sets status
    local -n status_of=status
    qmp "$1" query-migrate || return 0
    status_of=$(field status)
    [[ $status_of =~ ^(completed|failed|cancelled)$ ]]
}

migration_ends() { # END completed|failed|cancelled...
    local end=$1 status=none word
    shift
    wait_for 60 "has_ended $end" || return 1
    for word; do
        [ "$status" != "$word" ] || return 0
    done
    echo "$end's QEMU says $status, not $*: ${answer:-}"
    return 1
}

is_running() { # END true|false
    qmp "$1" query-status && [ "$(field running)" = "$2" ] && return
    echo "$1's QEMU: $answer"
    return 1
}

# The middle of a migration: so many bytes were moved.
moved_some() { # END BYTES
    qmp "$1" query-migrate && [ "$(field status)" = active ] && [ "$(field transferred)" -gt "$2" ]
}

# >>programs

# Starts qemu_sink into $out, or $snapshot; sets sink and at, its address.
start_sink() { # OPTION...
    local into=("$out")
    [ -z "$snapshot" ] || into=(--snapshot "$snapshot")
    rm -rf "$out" "$out.part"
    : >"$tmp/test/sink.out"
    timeout -k 5 600 "$programs/qemu_sink" "${fabric[@]}" --set io-timeout=30s --json --listen "$address:0" \
        ${sink_options[@]+"${sink_options[@]}"} "$@" "${into[@]}" >"$tmp/test/sink.out" 2>"$tmp/test/sink.log" &
    sink=$!
    wait_for 30 'grep -q listening "$tmp/test/sink.out" || ! kill -0 $sink 2>/dev/null' || return 1
    at=$(sed -n 's/^{"listening":"\(.*\)"}$/\1/p' "$tmp/test/sink.out")
    [ -n "$at" ]
}

start_source() { # ADDRESS OPTION...
    timeout -k 5 600 "$programs/qemu_source" "${fabric[@]}" --set io-timeout=30s --json \
        ${source_options[@]+"${source_options[@]}"} "${@:2}" "${snapshot:-$out}" "$1" \
        >"$tmp/test/source.out" 2>"$tmp/test/source.log" &
    source=$!
}

# ended PID STATUS SECONDS: it ends so, within so many seconds
ended() {
    local begin=$SECONDS status
    wait "$1"
    status=$?
    [ "$status" = "$2" ] || { echo "exit status $status, $2 wanted"; return 1; }
    [ $((SECONDS - begin)) -le $(($3 * slack)) ] || { echo "it took $((SECONDS - begin)) s, $(($3 * slack)) allowed"; return 1; }
}

nothing_left() {
    [ ! -e "$out" ] && [ ! -e "$out.part" ] && return
    echo "left behind:"
    ls -lAR "$out" "$out.part" 2>/dev/null
    return 1
}

figure() { # FILE NAME: of the statistics
    sed -n "s/.*\"$2\": *\([0-9]*\).*/\1/p" "$tmp/test/$1"
}

# >>one migration

# QEMU END into $out.
into_directory() { # END
    start_sink && qmp "$1" migrate "{\"uri\": \"rdma:$at\"}" && migration_ends "$1" completed && ended "$sink" 0 30 &&
        [ ! -e "$out.part" ]
}

# $out into a new QEMU.
into_qemu() { # END VERSION MACHINE
    start_qemu "$@" -incoming defer && listens_at "$1" 4400 && start_source "$address:4400" && ended "$source" 0 60 &&
        migration_ends "$1" completed
}

listens_at() { # END PORT
    qmp "$1" migrate-incoming "{\"uri\": \"rdma:$address:$2\"}" &&
        wait_for 20 "rdma resource show cm_id | grep 'LISTEN' | grep -qw '$2'"
}

# What is known of a directory by other means: RAM is the file that QEMU has it in; the firmware is what QEMU itself
# dumps; devices have said something, and described it.
directory_holds() { # END RAM
    local bios=$tmp/test/bios length
    length=$(stat -c %s "$out/ram/pc.bios") || return 1
    cmp "$2" "$out/ram/pc.ram" && qmp "$1" pmemsave \
        "{\"val\": $((4294967296 - length)), \"size\": $length, \"filename\": \"$bios\"}" &&
        cmp "$bios" "$out/ram/pc.bios" || return 1
    [ "$(stat -c %s "$out/state")" -gt 20000 ] && says "$out/state" '"devices": [' ICH9LPC && says "$out/machine.json" \
        '"name": "pc.ram"' '"name": "/rom@etc/acpi/tables"'
}

# >>moves

asked_for() { # "LEAST MOST": so many registrations, as qemu_sink --trace tells; "" if that does not matter
    local asked
    [ -n "$1" ] || return 0
    asked=$(grep -c 'recv REGISTER_REQUEST' "$tmp/test/sink.log")
    [ "$asked" -ge "${1% *}" ] && [ "$asked" -le "${1#* }" ] && return
    echo "the source asked for $asked registrations, ${1% *} to ${1#* } wanted"
    return 1
}

# Two machine.json say the same of the machine itself.
same_facts() { # DIR DIR
    perl -MJSON::PP -0777 -ne 'my $j = decode_json($_); delete @$j{qw(stream state capabilities section_id)};
        push @facts, JSON::PP->new->canonical->pretty->encode($j);
        END { print "differs:\n", @facts and exit 1 if @facts != 2 || $facts[0] ne $facts[1] }' \
        "$1/machine.json" "$2/machine.json"
}

# Source QEMU, directory, QEMU, and with on_caps another directory. The words in from_caps and on_caps are capabilities
# of the two QEMUs; registrations: of the first sink, at least; requests: what the first QEMU asks for, least and most.
moves() { # VERSION VERSION
    local machine
    machine=$(machine "$1" "$2")
    cp --sparse=always "$image" "$tmp/test/first.ram" && start_qemu first "$1" "$machine" &&
        capabilities first "$from_caps" && into_directory first &&
        [ "$(figure sink.out registrations)" -ge "$registrations" ] && asked_for "${requests:-}" &&
        directory_holds first "$image" && kill "${pid[first]}" && rm "$tmp/test/first.ram" && into_qemu second "$2" "$machine" &&
        cmp "$image" "$tmp/test/second.ram" || return 1
    [ -n "$on_caps" ] || { qmp second cont && is_running second true; return; }
    mv "$out" "$tmp/test/before"
    capabilities second "$on_caps" && into_directory second && diff -r "$tmp/test/before/ram" "$out/ram" &&
        same_facts "$tmp/test/before" "$out"
}

group_moves() {
    local from_caps='' on_caps='' registrations=1
    on_caps=rdma-pin-all peer '7.2 on demand, to 10.0 on demand, from there pinned whole' moves 7.2 10.0
    source_options=(--set pin-all=on)
    from_caps=return-path on_caps='rdma-pin-all return-path' peer \
        '10.0 with a return path, back pinned whole, from there pinned whole with a return path' moves 10.0 10.0
    source_options=(--set peer-chunk-size=1M)
    sink_options=(--set peer-chunk-size=1M)
    registrations=64 on_caps=rdma-pin-all peer \
        '10.0 on demand, to 7.2 on demand, both in chunks of 1 MiB; from there pinned whole' moves 10.0 7.2
    source_options=() sink_options=()
    address=$SIW_ADDR
    peer '7.2 over iWARP, and back' moves 7.2 7.2
    address=$RXE_ADDR
}

# >>runs

counter() { # FILE: the passes that the guest in this RAM has done
    tests/vm/counter_check.pl "$1" >"$tmp/test/pass" && sed 's/pass \([0-9]*\) .*/\1/' "$tmp/test/pass"
}

printed() { # END: lines that the guest wrote to its serial port
    grep -sc . "$tmp/test/$1.serial"
}

counts_on() { # END: the guest there does so
    local lines
    lines=$(printed "$1")
    wait_for 60 "[ \$(printed $1) -gt $lines ]"
}

slowly() { # END: a migration that never ends
    qmp "$1" migrate-set-parameters '{"max-bandwidth": 4000000, "downtime-limit": 1}'
}

# A migration of QEMU END that is in its middle.
in_the_middle() { # END
    start_sink && qmp "$1" migrate "{\"uri\": \"rdma:$at\"}" && wait_for 30 "moved_some $1 2000000"
}

cancelled_by_qemu() { # END
    in_the_middle "$1" && qmp "$1" migrate_cancel && ended "$sink" 5 10 &&
        says "$tmp/test/sink.log" 'the source' 'failed or was cancelled' && nothing_left &&
        migration_ends "$1" cancelled failed && counts_on "$1"
}

loses_the_sink() { # END
    in_the_middle "$1" && kill -KILL "$(below "$sink")" && migration_ends "$1" failed && is_running "$1" true &&
        counts_on "$1"
}

hands_over() { # MACHINE VERSION
    local before there after
    qmp first migrate-set-parameters '{"max-bandwidth": 1000000000, "downtime-limit": 2000}' &&
        into_directory first && is_running first false && before=$(counter "$tmp/test/first.ram") &&
        cmp "$tmp/test/first.ram" "$out/ram/pc.ram" || return 1
    kill "${pid[first]}"
    rm "$tmp/test/first.ram"
    into_qemu second "$2" "$1" -S && there=$(counter "$tmp/test/second.ram") && qmp second cont &&
        counts_on second && qmp second stop && after=$(counter "$tmp/test/second.ram") || return 1
    [ "$before" = "$there" ] && [ "$after" -gt "$there" ] && return
    echo "handed over in pass $before, there in pass $there, later in pass $after"
    return 1
}

# TROUBLE: functions that are called before, in turn.
runs_on() { # VERSION VERSION [TROUBLE...]
    local machine trouble
    machine=$(machine "$1" "$2")
    start_qemu first "$1" "$machine" && wait_for 60 '[ "$(printed first)" -ge 1 ]' && slowly first || return 1
    for trouble in "${@:3}"; do
        "$trouble" first || return 1
        rm -rf "$out.part"
    done
    hands_over "$machine" "$2"
}

qemu_killed() { # VERSION
    cp --sparse=always "$image" "$tmp/test/first.ram"
    start_qemu first "$1" q35 -S && slowly first && in_the_middle first && kill -KILL "$(below "${pid[first]}")" &&
        ended "$sink" 5 10 && says "$tmp/test/sink.log" 'the source' 'before the end of its stream' && nothing_left
}

# The RAM of QEMU END is the image up to that MiB.
arrived() { # END MIB
    cmp -s -n $(($2 * 1048576)) "$image" "$tmp/test/$1.ram"
}

# A machine that both versions know, in $out; moved there once for all tests.
take_machine() {
    out=$tmp/machine
    [ ! -e "$out" ] || return 0
    cp --sparse=always "$image" "$tmp/test/first.ram"
    start_qemu first 7.2 pc-q35-7.2 -S && into_directory first && kill "${pid[first]}"
}

# qemu_source in the middle.
source_in_the_middle() { # VERSION
    take_machine && start_qemu second "$1" pc-q35-7.2 -S -incoming defer && listens_at second 4400 &&
        start_source "$address:4400" --set max-bandwidth=512K && wait_for 30 'arrived second 4'
}

sink_qemu_killed() { # VERSION
    source_in_the_middle "$1" && kill -KILL "$(below "${pid[second]}")" && ended "$source" 5 10 &&
        says "$tmp/test/source.log" 'the sink' && [ -e "$out/machine.json" ]
}

# The stock QEMU's own answer: some releases end, some stay and say failed.
source_killed() { # VERSION
    source_in_the_middle "$1" && kill -KILL "$(below "$source")" || return 1
    wait_for 20 '! kill -0 ${pid[second]} 2>/dev/null || { has_ended second && [ "$status" = failed ]; }' \
        >"$tmp/test/said.log"
}

group_runs() {
    # shellcheck disable=SC2054
    guest=(-serial "file:$tmp/test/END.serial" -drive "file=$made/guest.img,format=raw,if=none,id=disk,readonly=on"
        -device virtio-blk-pci,drive=disk)
    source_options=(--set pin-all=on)
    peer '7.2 cancels, and goes to 7.2, pinned whole there' runs_on 7.2 7.2 cancelled_by_qemu
    source_options=()
    peer '10.0 cancels, loses its sink, and goes to 10.0' runs_on 10.0 10.0 cancelled_by_qemu loses_the_sink
    peer '7.2 goes to 10.0' runs_on 7.2 10.0
    guest=()
    peer '7.2 is killed while it migrates' qemu_killed 7.2
    peer '10.0 is killed while it migrates' qemu_killed 10.0
    peer '7.2 is killed while it is migrated to' sink_qemu_killed 7.2
    peer '10.0 hears that its source was killed' source_killed 10.0
    guest=(-S)
}

# >>refuses

refused() { # VERSION CAPABILITY WORD...
    start_qemu first "$1" q35 && capabilities first "$2" && start_sink &&
        qmp first migrate "{\"uri\": \"rdma:$at\"}" && ended "$sink" 5 15 && says "$tmp/test/sink.log" "${@:3}" &&
        nothing_left && migration_ends first failed && qmp first cont && is_running first true
}

# Each of them is turned away, or leaves, before it has said anything; then a QEMU comes.
strangers() {
    local host port stranger
    cp --sparse=always "$image" "$tmp/test/first.ram"
    start_qemu first 7.2 q35 && start_sink --trace || return 1
    host=${at%:*} port=${at##*:}
    for stranger in "rping -c -a $host -p $port -C 1" "ib_write_bw -R -p $port $host" "$made/caller $at"; do
        # shellcheck disable=SC2086
        timeout -k 2 120 $stranger >"$tmp/test/stranger" 2>&1
        kill -0 "$sink" 2>/dev/null || { echo "qemu_sink has ended after: $stranger"; return 1; }
        cat "$tmp/test/stranger"
    done
    [ "$(grep -c 'rejected a request: its private data' "$tmp/test/sink.log")" = 2 ] &&
        says "$tmp/test/sink.log" 'forgot a source, listening again' &&
        qmp first migrate "{\"uri\": \"rdma:$at\"}" && migration_ends first completed && ended "$sink" 0 30 &&
        cmp "$image" "$out/ram/pc.ram"
}

# A source that is no QEMU, and can do more than one.
foreign() {
    start_sink || return 1
    timeout -k 5 600 "$build/rmig_migrate" send --connect "$at" "${fabric[@]}" --block "ram=$image" \
        >"$tmp/test/source.out" 2>"$tmp/test/source.log"
    [ $? = 5 ] && ended "$sink" 5 10 && says "$tmp/test/sink.log" 'not a migration stream' && nothing_left
}

group_refuses() {
    peer 'dirty-bitmaps of 7.2' refused 7.2 dirty-bitmaps dirty-bitmap 'switch the capability'
    peer 'postcopy-ram of 10.0' refused 10.0 postcopy-ram POSTCOPY_ADVISE postcopy-ram
    peer 'rping, ib_write_bw and one who leaves, then 7.2' strangers
    peer 'a source that is no QEMU' foreign
}

# >>files

# QEMU END by RDMA into $snapshot.
into_file() { # END
    start_sink && qmp "$1" migrate "{\"uri\": \"rdma:$at\"}" && migration_ends "$1" completed && ended "$sink" 0 60 &&
        [ -e "$snapshot" ] && [ ! -e "$snapshot.part" ]
}

# $snapshot into a new QEMU 10.0.
from_file() { # END MACHINE OPTION...
    start_qemu "$1" 10.0 "$2" "${@:3}" -incoming defer && capabilities "$1" mapped-ram &&
        qmp "$1" migrate-incoming "{\"uri\": \"file:$snapshot\"}" && migration_ends "$1" completed
}

paused_by_file() { # VERSION CAPABILITIES
    local machine snapshot=$tmp/test/snapshot
    machine=$(machine "$1" 10.0)
    cp --sparse=always "$image" "$tmp/test/first.ram"
    start_qemu first "$1" "$machine" && capabilities first "$2" && into_file first && kill "${pid[first]}" &&
        from_file second "$machine" && cmp "$image" "$tmp/test/second.ram"
}

# A guest that counts, by way of a file, goes on.
counts_by_file() { # VERSION CAPABILITIES
    local machine before there after snapshot=$tmp/test/snapshot
    machine=$(machine "$1" 10.0)
    start_qemu first "$1" "$machine" && capabilities first "$2" && wait_for 60 '[ "$(printed first)" -ge 1 ]' &&
        qmp first migrate-set-parameters '{"max-bandwidth": 1000000000, "downtime-limit": 2000}' && into_file first &&
        is_running first false && before=$(counter "$tmp/test/first.ram") || return 1
    kill "${pid[first]}"
    from_file second "$machine" -S && there=$(counter "$tmp/test/second.ram") &&
        qmp second cont && counts_on second && qmp second stop && after=$(counter "$tmp/test/second.ram") || return 1
    [ "$before" = "$there" ] && [ "$after" -gt "$there" ] && return
    echo "saved in pass $before, there in pass $there, later in pass $after"
    return 1
}

# What QEMU 10.0 itself saved, by RDMA into another one.
file_of_qemu() { # VERSION
    local machine snapshot=$tmp/test/snapshot
    machine=$(machine 10.0 "$1")
    cp --sparse=always "$image" "$tmp/test/first.ram"
    start_qemu first 10.0 "$machine" && capabilities first mapped-ram &&
        qmp first migrate "{\"uri\": \"file:$snapshot\"}" && migration_ends first completed &&
        kill "${pid[first]}" && into_qemu second "$1" "$machine" && cmp "$image" "$tmp/test/second.ram" &&
        qmp second cont && is_running second true
}

# The QEMU keeps its guest, and neither end leaves anything. SIZE: of the file system.
full_disk() { # SIZE VERSION WORD OPTION...
    local status snapshot=$tmp/small/snapshot
    mkdir -p "$tmp/small" && mount -t tmpfs -o "size=$1" tmpfs "$tmp/small" && echo older >"$snapshot" || return 1
    keeps_its_guest "${@:2}"
    status=$?
    [ "$(cat "$snapshot")" = older ] && [ ! -e "$snapshot.part" ] || status=1
    umount "$tmp/small"
    return "$status"
}

keeps_its_guest() { # VERSION WORD OPTION...
    cp --sparse=always "$image" "$tmp/test/first.ram"
    start_qemu first "$1" q35 && start_sink "${@:3}" && qmp first migrate "{\"uri\": \"rdma:$at\"}" &&
        ended "$sink" 3 30 && says "$tmp/test/sink.log" "$2" && migration_ends first failed &&
        qmp first cont && is_running first true
}

group_files() {
    sink_options=(--threads 2)
    peer 'a file: 7.2 pinned whole, loaded by 10.0' paused_by_file 7.2 rdma-pin-all
    sink_options=()
    source_options=(--threads 2)
    peer "a file of 10.0's, moved to 7.2" file_of_qemu 7.2
    source_options=()
    peer 'a full disk: refused before anything is moved' full_disk 40M 10.0 'has room for'
    peer 'a full disk: refused in the last round of 7.2' full_disk 6M 7.2 'No space left' --sparse
    # shellcheck disable=SC2054
    guest=(-serial "file:$tmp/test/END.serial" -drive "file=$made/guest.img,format=raw,if=none,id=disk,readonly=on"
        -device virtio-blk-pci,drive=disk)
    peer 'a file: 10.0 that runs, with a return path, loaded by 10.0, goes on' counts_by_file 10.0 return-path
    guest=(-S)
}

# >>libfabric

serves() { # VERSION CAPABILITIES
    cp --sparse=always "$image" "$tmp/test/first.ram"
    start_qemu first "$1" q35 && capabilities first "$2" && into_directory first && directory_holds first "$image" &&
        [ "$(figure sink.out registrations)" = "$(figure sink.out blocks)" ] &&
        ! grep 'cannot support' "$tmp/test/first.log"
}

cannot_be_reached() { # VERSION
    take_machine && start_qemu second "$1" pc-q35-7.2 -incoming defer && listens_at second 4400 &&
        start_source "$address:4400" && ended "$source" 4 30 &&
        says "$tmp/test/source.log" "$address:4400" 'stock QEMU' rmig_fabric_verbs.h
}

group_libfabric() {
    fabric=(--fabric ofi --provider verbs)
    peer '7.2 that asks to be pinned whole' serves 7.2 rdma-pin-all
    peer '10.0 that does not, with a return path' serves 10.0 return-path
    peer '7.2 cannot be the sink' cannot_be_reached 7.2
    fabric=(--fabric verbs)
}

# >>chunks

# A QEMU asks for each of its chunks that is not all zero: all of the RAM's 64 at 1 MiB, and beside them a few of
# smaller blocks.
group_chunks() {
    local from_caps='' on_caps='' registrations=1 requests
    sink_options=(--trace)
    chunk=([first]=1024 [second]=1)
    requests='1 8' on_caps=return-path peer '11 at 1 GiB, to 11 at 1 MiB, on from there with a return path' moves 11 11
    chunk=([first]=32 [second]=1024)
    requests='2 9' from_caps=return-path on_caps='rdma-pin-all return-path' peer \
        '11 at 32 MiB with a return path, to 11 at 1 GiB, on from there pinned whole' moves 11 11
    chunk=()
    requests='64 71' peer '11 at its default of 1 MiB, to 10.0' moves 11 10.0
    chunk=([second]=32)
    requests='64 71' peer '7.2, to 11 at 32 MiB' moves 7.2 11
    # shellcheck disable=SC2054
    guest=(-serial "file:$tmp/test/END.serial" -drive "file=$made/guest.img,format=raw,if=none,id=disk,readonly=on"
        -device virtio-blk-pci,drive=disk)
    chunk=([first]=1024 [second]=32)
    peer '11 at 1 GiB that runs cancels, and goes to 11 at 32 MiB' runs_on 11 11 cancelled_by_qemu
    guest=(-S)
    address=$SIW_ADDR
    chunk=([first]=32)
    requests='2 9' peer '11 at 32 MiB over iWARP, and back at its default' moves 11 11
    address=$RXE_ADDR
    chunk=() sink_options=()
}

group_asan() {
    local from_caps='' on_caps='rdma-pin-all return-path' registrations=1
    programs=$build/asan
    peer 'ASan: 7.2 to 10.0, on from there pinned whole with a return path' moves 7.2 10.0
    peer 'ASan: 10.0 is killed while it migrates' qemu_killed 10.0
    peer 'ASan: 7.2 is killed while it is migrated to' sink_qemu_killed 7.2
    fabric=(--fabric ofi --provider verbs)
    peer 'ASan, libfabric: 10.0 with a return path' serves 10.0 'rdma-pin-all return-path'
    fabric=(--fabric verbs)
    programs=$build
}

export LSAN_OPTIONS=${LSAN_OPTIONS:-suppressions=tests/lsan.supp:print_suppressions=0}
tests/vm/ram_image.pl "$image" $size $((size / 8)) || exit 1
for group; do
    "group_$group"
done
done_testing
