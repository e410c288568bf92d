#!/usr/bin/env bash
# All measurements of `make bench`; absolute times of a shared machine mean little, so what counts is ratios of neighbours
# within this run. Prints lines "name value unit". BENCH_BYTES: RAM to move over libfabric (2G).
#   bench.sh BUILD_DIR
set -euo pipefail
build=$1
here=$(dirname "$0")
bytes=${BENCH_BYTES:-2G}
pairs=${BENCH_PAIRS:-5}
work=$(mktemp -d /dev/shm/rmig-bench.XXXXXX)
trap 'rm -rf "$work"' EXIT

field() { sed -n "s/.*\"$1\": *\([0-9]*\).*/\1/p"; } # of a line of JSON
median() { sort -g | awk '{v[NR] = $1} END {print v[int((NR + 1) / 2)]}'; }
say() { printf '# %s\n' "$*" >&2; }

head -c "$bytes" /dev/urandom >"$work/ram"
size=$(stat -c %s "$work/ram")

rmig() { timeout 300 "$build/bench_ofi" --file "$work/ram" "$@"; }
raw() { timeout 300 "$build/ofi_raw" --bytes "$size" --write 1M --depth 64 "$@" | field ns; }

# (a) throughput of rmig over that of a raw write loop, pair by pair, the target's memory populated in both
for chunk in 1M 4M 16M 64M 256M 1G; do
  say "over libfabric tcp, chunk size $chunk"
  : >"$work/ratio"
  : >"$work/speed"
  for ((i = 0; i < pairs; i++)); do
    r=$(raw --touched)
    m=$(rmig --touched --set chunk-size=$chunk | field round_ns)
    awk "BEGIN {print $r / $m}" >>"$work/ratio"
    awk "BEGIN {print $size * 1e9 / $m}" >>"$work/speed"
  done
  name=$(printf '%s' "$chunk" | tr MG mg)
  echo "ofi.tcp.chunk${name}_over_raw $(median <"$work/ratio") ratio of throughputs"
  echo "ofi.tcp.chunk${name}_throughput $(median <"$work/speed") B/s"
done

# (b) in the simulator
say "simulator: 8 GiB at 100 Gb/s"
"$build/bench_sim"

# (c) instructions a page
say "instructions per page"
for path in bitmap page range; do
  valgrind --tool=callgrind --callgrind-out-file="$work/callgrind" --collect-atstart=no \
    --toggle-collect=measured "$build/bench_core" "$path" >"$work/core" 2>"$work/valgrind"
  pages=$(sed -n 's/^pages //p' "$work/core")
  instructions=$(sed -n 's/.*Collected : \([0-9]*\).*/\1/p' "$work/valgrind")
  awk "BEGIN {printf \"core.${path}_instructions_per_page %.3f instructions\\n\", $instructions / $pages}"
done

# (d) beside stock QEMU's multifd TCP migration of the same RAM, into fresh memory
say "beside QEMU's multifd TCP"
: >"$work/ratio"
for ((i = 0; i < pairs; i++)); do
  q=$("$here/qemu_multifd.sh" "$work/ram" "$work")
  m=$(rmig | field total_ns)
  awk "BEGIN {print $q * 1e6 / $m}" >>"$work/ratio"
done
echo "ofi.tcp.rmig_over_qemu_multifd $(median <"$work/ratio") ratio of throughputs"
