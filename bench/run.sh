#!/usr/bin/env bash
# All measurements of `make bench`, by the wall clock. Absolute times of a shared machine mean little, so what counts is
# the ratio of neighbours within this run, pair by pair, of which the median is told.
#   run.sh BUILD_DIR            writes BUILD_DIR/bench.json; prints a table
# BENCH_BYTES: RAM to move over libfabric (2G). BENCH_PAIRS: pairs of runs (5).
set -euo pipefail
build=$1
here=$(dirname "$0")
bytes=${BENCH_BYTES:-2G}
pairs=${BENCH_PAIRS:-5}
work=$(mktemp -d /dev/shm/rmig-bench.XXXXXX)
trap 'rm -rf "$work"' EXIT

field() { sed -n "s/.*\"$1\": *\([0-9]*\).*/\1/p"; } # of a line of JSON
median() { sort -g | awk '{v[NR] = $1} END {print v[int((NR + 1) / 2)]}'; }
say() { printf '%s\n' "$*" >&2; }
rmig() { timeout 300 "$build/bench/ofi" "$@"; }
raw() { timeout 300 "$build/bench/ofi_raw" --bytes "$size" --write 1M --depth 64 --touched | field ns; }

over_libfabric() { # throughput over that of a raw write loop, the target's memory populated in both
    local chunk r m i name
    for chunk in 1M 4M 16M 64M 256M 1G; do
        say "over libfabric tcp, chunk size $chunk"
        : >"$work/ratio" >"$work/speed"
        for ((i = 0; i < pairs; i++)); do
            r=$(raw)
            m=$(rmig --bytes "$size" --touched --set chunk-size=$chunk | field round_ns)
            awk "BEGIN {print $r / $m}" >>"$work/ratio"
            awk "BEGIN {print $size * 1e9 / $m}" >>"$work/speed"
        done
        name=$(printf '%s' "$chunk" | tr MG mg)
        echo "ofi.tcp.chunk${name}_over_raw $(median <"$work/ratio") ratio of throughputs"
        echo "ofi.tcp.chunk${name}_throughput $(median <"$work/speed") B/s"
    done
}

# Where this machine is virtual itself, memory freed a while ago has gone back to its host, and whoever touches it first
# pays for that: both sides shall find it given back a moment ago.
warm() {
    head -c "$((size + size / 2))" /dev/zero >"$work/warm"
    rm "$work/warm"
}

beside_qemu() { # the same RAM, from connect to handover: STATE (fresh or touched memory at the destination) NAME
    local i q m touched=()
    [ "$1" = fresh ] || touched=(--touched)
    : >"$work/ratio"
    for ((i = 0; i < pairs; i++)); do
        say "beside QEMU's multifd TCP, $1 memory, pair $((i + 1)) of $pairs"
        warm
        q=$("$here/qemu_multifd.sh" "$work/ram" "$work" "$1")
        warm
        m=$(rmig --file "$work/ram" "${touched[@]}" | field total_ns)
        awk "BEGIN {print $q * 1e3 / $m}" >>"$work/ratio"
    done
    echo "$2 $(median <"$work/ratio") ratio of throughputs"
}

head -c "$bytes" /dev/urandom >"$work/ram"
size=$(stat -c %s "$work/ram")
{
    over_libfabric
    beside_qemu fresh ofi.tcp.rmig_over_qemu_multifd
    beside_qemu touched ofi.tcp.touched.rmig_over_qemu_multifd
} >"$work/lines"
"$build/bench/report" "$build/bench.json" <"$work/lines"
say "wrote $build/bench.json"
