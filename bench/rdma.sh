#!/usr/bin/env bash
# What `make bench-rdma` measures: rmig beside ib_write_bw and beside stock QEMU over RoCE and iWARP in software, in the
# VM of tests/vm. Absolute figures of an emulated machine mean nothing, so what counts is the ratio of neighbours, pair
# by pair, of which the median is told.
#   rdma.sh BUILD_DIR            writes BUILD_DIR/bench-rdma.json; prints a table
#   rdma.sh BUILD_DIR chunks     only beside QEMU 11, at three chunk sizes over RoCE; prints README's table of them too
# BENCH_PAIRS: pairs of runs (3). BENCH_RAM: MiB of RAM beside QEMU (128), an eighth of it not zero, beside QEMU 11 half.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
export BENCH_PAIRS=${BENCH_PAIRS:-3} BENCH_RAM=${BENCH_RAM:-128}
say() { printf '%s\n' "$*" >&2; }

# README's table, of lines "name value unit".
chunk_table() {
    awk '
        { value[$1] = $2 }
        function row(size, name) {
            if (value["rxe.qemu11_" name "_time"] != "")
                printf "| %s | %.1f s | %.1f s |\n", size, value["rxe.qemu11_" name "_time"], value["rxe." name "_time"]
        }
        END {
            print "| chunk size | QEMU 11.1 to QEMU 11.1 | rmig to rmig |\n|---|---|---|"
            row("1 MiB", "chunk1m")
            row("32 MiB", "chunk32m")
            row("1 GiB", "chunk1g")
        }'
}

if [ "${2:-}" != inside ]; then
    build=$1
    "$here/../tests/vm/fetch.sh" "$build" vm
    "$here/../tests/vm/fetch.sh" "$build" qemu11
    # shellcheck disable=SC2094 # lines is a name for both, one after the other
    "$here/../tests/vm/run.sh" "$build" --memory 3072 --timeout 3000 -- "$here/rdma.sh" "$build" inside "${@:2}" |
        tee "$build/bench-rdma.log" | sed -n '/^[a-z0-9]*\.[a-z0-9_]* /!p' >&2
    grep -E '^[a-z0-9]+\.[a-z0-9_]+ ' "$build/bench-rdma.log" >"$build/bench-rdma.lines"
    "$build/bench/report" "$build/bench-rdma.json" <"$build/bench-rdma.lines"
    chunk_table <"$build/bench-rdma.lines"
    say "wrote $build/bench-rdma.json"
    exit
fi

# >>inside the VM

build=$1
vm=$here/../tests/vm
tmp=$(mktemp -d /dev/shm/bench.XXXXXX)
trap 'jobs -p | xargs -r kill 2>/dev/null; rm -rf "$tmp"' EXIT
port=20000
die() {
    say "rdma.sh: $*"
    exit 1
}
field() { sed -n "s/.*\"$1\":\([0-9]*\).*/\1/p"; }
median() { sort -g "$1" | awk '{v[NR] = $1} END {print v[int((NR + 1) / 2)]}'; }
ratio() { awk "BEGIN {print ($1) / ($2)}"; }

# Bytes a second of writes of 1 MiB. (It polls where rmig sleeps: it has no other way for writes.)
write_bw() { # DEVICE ADDRESS
    local i speed
    port=$((port + 1))
    timeout 120 ib_write_bw -d "$1" -R -s 1048576 -n 128 -p $port >"$tmp/server" 2>&1 &
    for ((i = 0; i < 300; i++)); do
        rdma resource show cm_id | grep -q LISTEN && break
        sleep 0.1
    done
    speed=$(timeout 120 ib_write_bw -d "$1" -R -s 1048576 -n 128 -p $port "$2" 2>&1 |
        awk '$1 == 1048576 {print $4 * 1048576}')
    wait $!
    [ -n "$speed" ] || die "ib_write_bw over $1 told nothing: $(cat "$tmp/server")"
    echo "$speed"
}

# Moves the image IMAGE; prints the sender's JSON, after the RAM compared equal.
move() { # DEVICE ADDRESS IMAGE OPTION...
    local device=$1 address=$2 image=$3 i to=
    shift 3
    rm -rf "$tmp/out"
    mkdir "$tmp/out"
    : >"$tmp/recv"
    timeout 120 "$build/rmig_migrate" recv --fabric verbs --provider "$device" --listen "$address:0" --out "$tmp/out" \
        --sparse --json --quiet >"$tmp/recv" 2>&1 &
    for ((i = 0; i < 300 && ${#to} == 0; i++)); do
        to=$(sed -n 's/.*"listening":"\([^"]*\)".*/\1/p' "$tmp/recv")
        sleep 0.1
    done
    timeout 120 "$build/rmig_migrate" send --fabric verbs --provider "$device" --connect "$to" --block "ram=$image" \
        --json --quiet "$@" >"$tmp/send" || die "send: $(cat "$tmp/send")"
    wait $! || die "recv: $(cat "$tmp/recv")"
    cmp "$image" "$tmp/out/ram" >&2 || die 'the RAM that arrived differs'
    cat "$tmp/send"
}

# The last of three rounds, in which all is registered: as it is with ib_write_bw.
beside_write_bw() { # NAME DEVICE ADDRESS
    local i bw ns
    head -c 64M /dev/urandom >"$tmp/image"
    : >"$tmp/$1"
    for ((i = 0; i < BENCH_PAIRS; i++)); do
        bw=$(write_bw "$2" "$3")
        ns=$(move "$2" "$3" "$tmp/image" --rounds 3 --set chunk-size=1M | field round_ns)
        ratio "67108864 * 1e9 / $ns" "$bw" | tee -a "$tmp/$1"
    done
    echo "$1.chunk1m_over_ib_write_bw $(median "$tmp/$1") ratio of throughputs"
}

# The same RAM, from connecting to the end.
beside_qemu() { # NAME DEVICE ADDRESS KIND [pin-all]
    local i ms ns option=()
    [ $# = 4 ] || option=(--set pin-all=on)
    "$vm/ram_image.pl" "$tmp/image" "$BENCH_RAM" $((BENCH_RAM / 8))
    : >"$tmp/$1"
    for ((i = 0; i < BENCH_PAIRS; i++)); do
        ms=$("$vm/qemu_pair.sh" --build "$build" --device "$1" --size "$BENCH_RAM" 7.2 7.2 ${5:+"$5"} |
            sed -n 's/.*identical, \([0-9]*\) ms.*/\1/p')
        [ -n "$ms" ] || die 'no migration from QEMU to QEMU'
        ns=$(move "$2" "$3" "$tmp/image" "${option[@]}" | field total_ns)
        ratio "$ns" "$ms * 1e6" | tee -a "$tmp/$1"
    done
    echo "$1.$4_time_over_qemu $(median "$tmp/$1") ratio of times"
}

# Both at QEMU 11's chunk sizes: the same RAM, half of it not zero. A pair is one run of each at each size.
beside_qemu11() {
    local i size ms ns chunk option best
    "$vm/ram_image.pl" "$tmp/image" "$BENCH_RAM" $((BENCH_RAM / 2))
    for ((i = 0; i < BENCH_PAIRS; i++)); do
        best=
        for chunk in 1:1m 32:32m 1024:1g; do
            size=${chunk%:*} chunk=${chunk#*:}
            ms=$("$vm/qemu_pair.sh" --build "$build" --device rxe --size "$BENCH_RAM" --data $((BENCH_RAM / 2)) \
                --chunk "$size" 11 11 | sed -n 's/.*identical, \([0-9]*\) ms.*/\1/p')
            [ -n "$ms" ] || die "no migration from QEMU 11 to QEMU 11 at $size MiB"
            ns=$(move "$RXE_DEV" "$RXE_ADDR" "$tmp/image" --set "chunk-size=${size}M" | field total_ns)
            ratio "$ms" 1e3 >>"$tmp/qemu11.$chunk"
            ratio "$ns" 1e9 >>"$tmp/rmig.$chunk"
            say "chunks of $size MiB: QEMU 11 $ms ms, rmig $((ns / 1000000)) ms"
            if [ -z "$best" ] || [ "$ms" -lt "$best" ]; then best=$ms; fi
        done
        ratio "$(tail -n 1 "$tmp/rmig.1m")" "$best / 1e3" >>"$tmp/over_best"
        ratio "$(tail -n 1 "$tmp/rmig.1m")" "$(tail -n 1 "$tmp/qemu11.1m")" >>"$tmp/over_1m"
    done
    for chunk in 1m 32m 1g; do
        echo "rxe.qemu11_chunk${chunk}_time $(median "$tmp/qemu11.$chunk") s"
        echo "rxe.chunk${chunk}_time $(median "$tmp/rmig.$chunk") s"
    done
    echo "rxe.chunk1m_time_over_qemu11_best $(median "$tmp/over_best") ratio of times"
    echo "rxe.chunk1m_time_over_qemu11_chunk1m $(median "$tmp/over_1m") ratio of times"
}

beside_qemu11
[ "${3:-}" != chunks ] || exit 0
for name in rxe siw; do
    device=$RXE_DEV address=$RXE_ADDR
    [ $name = rxe ] || { device=$SIW_DEV address=$SIW_ADDR; }
    beside_write_bw $name "$device" "$address"
    beside_qemu $name "$device" "$address" ondemand
    beside_qemu $name "$device" "$address" pinall pin-all
done
