#!/usr/bin/env bash
# What `make bench-file` measures: a VM's RAM saved to a snapshot file and loaded from it, beside dd and beside stock
# QEMU 10.0's own mapped-ram, with the same RAM, on the same file system. Absolute speeds of a shared machine mean
# little, so what counts is the ratio of neighbours within this run, pair by pair, of which the median is told.
#   file.sh BUILD_DIR       writes BUILD_DIR/bench-file.json, .png, .svg; prints a table
# BENCH_BYTES: of RAM, half of it not zero (4G). BENCH_PAIRS: rounds (3). Needs root for a cold page cache; without,
# loads are of what is in memory already, and file.load_cold says 0. As root it sets vm.percpu_pagelist_high_fraction
# while it runs: see few_single_pages.
#
# How like is compared with like:
# - dd moves what the file holds, without the zeros, in one stretch: between /dev/shm and the disk, 1 MiB at a time.
# - Saves end when the data is on the disk: rmig's own wait, dd's conv=fsync, sync FILE behind QEMU, which does not
#   wait. file.save_*_nosync_over_qemu: neither waits.
# - Loads end in fresh shared memory that is mapped with all its pages, as a guest needs it: dd writes to a new file on
#   /dev/shm, which is mapped then. Without the mapping it is file.load_*_over_dd_unmapped, beside dd to /dev/null,
#   which needs no memory, file.load_*_over_dd_null.
# - rmig and QEMU load one and the same file, which QEMU saved.
# - rmig has 2 threads, QEMU 2 channels; with 1 thread it is *_1thread_*.
# - Buffered beside buffered, direct beside direct. file.save_over_dd, file.save_over_qemu, file.load_over_dd and
#   file.load_over_qemu are the worse of these two.
# shellcheck disable=SC2013,SC2086 # words; an option, or none
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
build=$(cd "$1" && pwd)
pairs=${BENCH_PAIRS:-3}
work=$build/bench-file.tmp
mem=
single_pages=/proc/sys/vm/percpu_pagelist_high_fraction
pages_were= # what it was, if it is to be restored
qemu_pid=
qemu=$build/vm/qemu-10.0/run

say() { printf '%s\n' "$*" >&2; }
die() {
    say "file.sh: $*"
    exit 1
}
tidy() {
    trap '' TERM INT # nothing keeps it from its end
    [ -z "$pages_were" ] || echo "$pages_were" >$single_pages || say "$single_pages was $pages_were"
    [ -z "$qemu_pid" ] || kill "$qemu_pid" 2>/dev/null || true
    wait
    [ -z "$mem" ] || rm -rf "$mem"
    rm -rf "$work"
}
trap tidy EXIT
trap 'exit 143' TERM INT

field() { sed -n "s/.*\"$1\": *\([0-9]*\).*/\1/p"; } # of a line of JSON
median() { sort -g | awk '{v[NR] = $1} END {print v[int((NR + 1) / 2)]}'; }
file() { timeout -k 5 600 "$build/bench/file" "$@"; }

room() { # WHERE BYTES BYTES_WANTED
    [ "$2" -ge "$3" ] || die "$1 has $2 bytes free: $3 are needed for $size bytes of RAM; set BENCH_BYTES"
}

# >>conditions

cold=1
drop_cache() { # cold is 0 from its first call on, if this is not allowed
    sync
    { echo 3 >/proc/sys/vm/drop_caches; } 2>/dev/null || cold=0
}

# Where this machine is virtual itself, memory freed a while ago has gone back to its host, and whoever touches it first
# pays for that: all shall find it given back a moment ago, and more than they need.
warm() {
    head -c $((size * 3 / 2)) /dev/zero >"$mem/warm" || die "$mem/warm cannot be written"
    rm "$mem/warm"
}

# Linux keeps up to an eighth of memory as single free pages of each processor, and hands them out in the reverse of the
# order in which they were freed: then no two that follow adjoin, and each is a segment of its own in a request to the
# disk. How many there are depends on who ran before. While we measure they are few.
few_single_pages() {
    pages_were=$(cat $single_pages 2>/dev/null) || return
    [ "$pages_were" != 10000 ] || pages_were=0 # left by a run that was killed
    { echo 10000 >$single_pages; } 2>/dev/null && return
    pages_were=
    return 1
}

fresh() { # FILE...: none of them, no memory in use, nothing cached, nothing still to be written
    rm -f "$mem/dst.ram" "$mem/dd" "$@"
    drop_cache
}

fresh_save() { # FILE: to be written
    fresh "$1"
    warm
}

# Where the disk is virtual, its host may have a cache of its own, which makes the second to read a file faster: nobody
# shall be the first.
fresh_load() { # FILE
    fresh
    timeout -k 5 600 dd "if=$1" of=/dev/null bs=1M iflag=direct status=none || die "$1 cannot be read with direct I/O"
    warm
}

# >>dd and rmig: each prints nanoseconds

dd_ns() { # ARGUMENT...
    local said seconds
    said=$(LC_ALL=C timeout -k 5 600 dd bs=1M "$@" 2>&1) || die "dd $*: $said"
    seconds=$(sed -n 's/.* copied, \([0-9.e+-]*\) s,.*/\1/p' <<<"$said")
    [ -n "$seconds" ] || die "dd $* tells no time: $said"
    awk "BEGIN {printf \"%.0f\n\", $seconds * 1e9}"
}

dd_save() {
    fresh_save "$work/dd"
    dd_ns "if=$mem/data" "of=$work/dd" conv=fsync "$@"
}
dd_load() { # OF OPTION...
    local of=$1
    shift
    fresh_load "$work/dd"
    dd_ns "if=$work/dd" "of=$of" "$@"
}

rmig_save() {
    fresh_save "$work/rmig"
    file save "$@" "$mem/ram" "$work/rmig" | field ns
}
rmig_load() {
    fresh_load "$work/snapshot"
    file load "$@" "$work/snapshot" "$mem/ram" | field ns
}

# >>QEMU: sets ns, and after a save synced_ns too

start() { # RAM_FILE BACKEND_OPTIONS OPTION...
    local ram=$1 options=$2
    shift 2
    coproc QEMU {
        exec timeout -k 5 600 "$qemu" -machine q35,memory-backend=pc.ram -accel tcg,tb-size=32 \
            -m "$((size >> 20))M" -S -display none -nodefaults -no-user-config -qmp stdio \
            -object "memory-backend-file,id=pc.ram,size=$size,mem-path=$ram,share=on$options" "$@" 2>"$work/qemu.log"
    }
    # shellcheck disable=SC2153 # coproc sets it
    qemu_pid=$QEMU_PID from=${QEMU[0]} to=${QEMU[1]}
    answer QMP
    tell qmp_capabilities
}

answer() { # WORD WORD...: reads up to a message that has one of the words; line is the message
    local word
    while IFS= read -r -t 300 -u "$from" line; do
        for word; do
            case $line in *"\"$word\""*) return ;; esac
        done
    done
    die "QEMU has ended, or says nothing of $1 within 300 s: $(cat "$work/qemu.log")"
}

tell() { # COMMAND [ARGUMENTS]
    printf '{"execute": "%s"%s}\n' "$1" "${2:+, \"arguments\": $2}" >&"$to"
    answer return error
    case $line in *'"error"'*) die "QEMU refuses $1: $line" ;; esac
}

configure() { # false|true: direct I/O. With events the end is told, and need not be polled for.
    local on='"state": true}'
    tell migrate-set-capabilities '{"capabilities": [{"capability": "mapped-ram", '"$on"',
        {"capability": "multifd", '"$on"', {"capability": "events", '"$on"']}'
    tell migrate-set-parameters '{"multifd-channels": 2, "max-bandwidth": 100000000000, "direct-io": '"$1"'}'
}

move() { # migrate|migrate-incoming FILE
    local began=${EPOCHREALTIME/./}
    tell "$1" '{"uri": "file:'"$2"'"}'
    answer completed failed cancelled
    ns=$(((${EPOCHREALTIME/./} - began) * 1000))
    case $line in *'"completed"'*) return ;; esac
    tell query-migrate
    die "QEMU's $1 did not succeed: $line"
}

stop() {
    tell quit
    wait "$qemu_pid" || die "QEMU ended with status $?: $(cat "$work/qemu.log")"
    qemu_pid=
}

qemu_save() { # false|true
    local began
    fresh_save "$work/qemu"
    start "$mem/ram" ,prealloc=on # as a guest that has run left it
    configure "$1"
    move migrate "$work/qemu"
    began=${EPOCHREALTIME/./}
    sync "$work/qemu"
    synced_ns=$((ns + (${EPOCHREALTIME/./} - began) * 1000))
    stop
}

qemu_load() { # false|true
    fresh_load "$work/snapshot"
    start "$mem/dst.ram" '' -incoming defer
    configure "$1"
    move migrate-incoming "$work/snapshot"
    stop
    cmp "$mem/ram" "$mem/dst.ram" >&2 || die 'what QEMU loaded differs'
}

# >>rounds

declare -A option=([eager]='' [lazy]=--lazy)

note() { # SERIES NANOSECONDS
    [ "${2:-0}" -gt 0 ] || die "$1: no time was told"
    echo "$1 $2" >>"$work/times"
}
times() { awk -v s="$1" '$1 == s {print $2}' "$work/times"; } # of a series, in the order of the rounds

# Series are named save.WHO.buffered|direct[...]. Who is compared runs one after the other.
save_round() {
    local how flag io
    for how in buffered direct; do
        flag='' io=false
        [ $how = buffered ] || flag=--direct io=true
        note save.dd.$how "$(dd_save ${flag:+oflag=direct})"
        note save.rmig.$how "$(rmig_save --threads 2 $flag)"
        qemu_save $io
        note save.qemu.$how "$synced_ns"
        note save.qemu_nosync.$how "$ns"
        note save.rmig_nosync.$how "$(rmig_save --threads 2 --no-sync $flag)"
        note save.rmig_1thread.$how "$(rmig_save --threads 1 $flag)"
        file load "$work/rmig" "$mem/ram" >/dev/null
    done
}

load_round() {
    local how flag io unmapped
    for how in buffered direct; do
        flag='' io=false
        [ $how = buffered ] || flag=--direct io=true
        note load.dd_null.$how "$(dd_load /dev/null ${flag:+iflag=direct})"
        unmapped=$(dd_load "$mem/dd" ${flag:+iflag=direct})
        note load.dd_unmapped.$how "$unmapped"
        note load.dd.$how $((unmapped + $(file map "$mem/dd" | field ns)))
        note load.rmig.$how "$(rmig_load --threads 2 $flag)"
        qemu_load $io
        note load.qemu.$how "$ns"
        note load.rmig_1thread.$how "$(rmig_load --threads 1 $flag)"
    done
}

# A guest of our own on KVM: until its first instruction, when all its RAM was loaded before, and when it is loaded
# lazily.
instruction_round() {
    local how ns
    for how in eager lazy; do
        fresh_load "$work/guest"
        rm -f "$work/guest.json"
        timeout -k 5 600 "$build/kvm_live" local --guest kvm --load "$work/guest" ${option[$how]} \
            --json "$work/guest.json" >"$work/guest.log" 2>&1 || die "kvm_live: $(cat "$work/guest.log")"
        ns=$(tr -d '\n' <"$work/guest.json" | field first_step_ns)
        [ "${ns:-0}" -gt 0 ] || die "kvm_live tells no first_step_ns: $(cat "$work/guest.json")"
        note instruction.$how "$ns"
    done
}

save_guest() { # false: it cannot run here
    timeout -k 5 600 "$build/kvm_live" local --guest kvm --save "$work/guest" --ram "$((size >> 20))M" \
        >"$work/guest.log" 2>&1 && return
    say "no file.lazy_first_instruction_over_eager: $(cat "$work/guest.log")"
    return 1
}

# The same in memory that no guest runs in: until a random page can be read.
touch_round() { # SEED
    local how
    for how in eager lazy; do
        fresh_load "$work/snapshot"
        note touch.$how "$(file load ${option[$how]} --seed "$1" "$work/snapshot" "$mem/ram" | field first_touch_ns)"
    done
}

# >>results

ratio() { # SERIES OTHER: time of the second over that of the first, the median
    paste <(times "$1") <(times "$2") | awk '{print $2 / $1}' | median
}

compare() { # NAME SERIES OTHER: with @ for both ways
    local how
    for how in buffered direct; do
        echo "file.${1/@/$how} $(ratio "$2.$how" "$3.$how") ratio of throughputs"
    done
}

compare_both() { # save|load dd|qemu: buffered, direct, and the worse of them
    local lines
    lines=$(compare "$1_@_over_$2" "$1.rmig" "$1.$2")
    printf '%s\n' "$lines"
    echo "file.$1_over_$2 $(awk '{print $2}' <<<"$lines" | sort -g | head -1) ratio of throughputs"
}

speed() { times "$1" | median | awk "{print $bytes * 1e9 / \$1}"; } # SERIES: of what is not zero

results() {
    local series
    compare_both save dd
    compare_both save qemu
    compare_both load dd
    compare_both load qemu
    compare save_@_nosync_over_qemu save.rmig_nosync save.qemu_nosync
    compare save_@_1thread_over_dd save.rmig_1thread save.dd
    compare load_@_1thread_over_dd load.rmig_1thread load.dd
    compare load_@_over_dd_unmapped load.rmig load.dd_unmapped
    compare load_@_over_dd_null load.rmig load.dd_null
    [ -z "$(times instruction.lazy)" ] ||
        echo "file.lazy_first_instruction_over_eager $(ratio instruction.eager instruction.lazy) ratio of times"
    echo "file.lazy_first_touch_over_eager $(ratio touch.eager touch.lazy) ratio of times"
    echo "file.load_cold $cold 1=yes"
    for series in $(awk '$1 ~ /^(save|load)/ {print $1}' "$work/times" | sort -u); do
        echo "file.${series//./_}_throughput $(speed "$series") B/s"
    done
}

bar() { # TITLE SERIES
    printf '"%s" %s %s\n' "$1" "$(speed "save.$2")" "$(speed "load.$2")"
}

bars() { # for plot_file.gp: title, save, load in B/s
    bar 'dd\nbuffered' dd.buffered
    bar 'rmig\nbuffered\n1 thread' rmig_1thread.buffered
    bar 'rmig\nbuffered\n2 threads' rmig.buffered
    bar 'QEMU\nmultifd' qemu.buffered
    bar 'dd\ndirect' dd.direct
    bar 'rmig\ndirect\n1 thread' rmig_1thread.direct
    bar 'rmig\ndirect\n2 threads' rmig.direct
    bar 'QEMU\nmultifd\ndirect-io' qemu.direct
}

# >>main

[ "$pairs" -ge 1 ] 2>/dev/null || die "BENCH_PAIRS $pairs: must be a number from 1 on"
"$here/../tests/vm/fetch.sh" "$build" qemu10
size=$(numfmt --from=iec "${BENCH_BYTES:-4G}") || die "BENCH_BYTES $BENCH_BYTES: must be a size, 4G or 512M"
((size % 2097152 == 0 && size >= 67108864)) || die "BENCH_BYTES $BENCH_BYTES: must be a multiple of 2M from 64M on"
rm -rf "$work"
mkdir "$work"
room memory "$(awk '/^MemAvailable/ {printf "%.0f", $2 * 1024}' /proc/meminfo)" $((size * 7 / 2))
room /dev/shm "$(df --output=avail -B1 /dev/shm | tail -1)" $((size * 25 / 8))
room "$work" "$(df --output=avail -B1 "$work" | tail -1)" $((size * 3))
mem=$(mktemp -d /dev/shm/rmig-bench.XXXXXX)
file image --bytes "${size}B" "$mem/ram" "$mem/data"
bytes=$(stat -c %s "$mem/data")
: >"$work/times"
drop_cache
few_single_pages || say "what ran before can be felt: $single_pages cannot be set here"
guest=no
! save_guest || guest=yes
for ((i = 1; i <= pairs; i++)); do
    say "saving, round $i of $pairs"
    save_round
done
mv "$work/qemu" "$work/snapshot"
for ((i = 1; i <= pairs; i++)); do
    say "loading, round $i of $pairs"
    load_round
    touch_round "$i"
    [ $guest = no ] || instruction_round
done
results >"$work/lines"
"$build/bench/report" "$build/bench-file.json" <"$work/lines"
bars >"$build/bench-file.dat"
gnuplot -e "data='$build/bench-file.dat'; out='$build/bench-file'; ram='$((size >> 20)) MiB'" "$here/plot_file.gp"
say "wrote $build/bench-file.json, $build/bench-file.png and $build/bench-file.svg"
