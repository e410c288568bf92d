#!/usr/bin/env bash
# The numbers in README.md, between its two marks, and docs/bench.svg: from what the simulator takes and from
# bench/costs.limits, so that any machine makes the same.
#   figures.sh BUILD_DIR           rewrites both
#   figures.sh BUILD_DIR check     tells in TAP whether they are what would be written
set -euo pipefail
build=$1
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

seconds() { awk -v chunk="$1" -v column="$2" '$1 == chunk {printf "%.3f", $column}' "$work/table"; }
lockstep() { awk -v column="$1" '$1 == 1 {printf "%.1f", $column}' "$work/table"; }
limit() { awk -v name="$1" '$1 == name {print $3}' bench/costs.limits; }

paragraph() {
    tr '\n' ' ' <<END | fold -s -w 118 | sed 's/ *$//'; echo
8 GiB at 100 Gb/s and 5 us round trip in the simulator, one registering thread a side: with 1 MiB chunks one at a time,
as stock QEMU does it, $(lockstep 2) s at 100 us + 80 us/MiB a registration and $(lockstep 4) s at 2 ms + 40 us/MiB; with
rmig $(seconds 1 3) s and $(seconds 1 5) s, at 64 MiB chunks $(seconds 64 3) s and $(seconds 64 5) s, where the wire alone
takes 0.687 s. Chunks of 1 GiB take $(seconds 1024 3) s and $(seconds 1024 5) s: the wire waits for the first registration.
The handover, from the last byte to the word that the guest is the other end's, takes at most
$(($(limit sim.handover_ns_1tib) / 1000000)) ms, with 1 TiB registered too. The core spends at most
$(limit core.bitmap_instructions_per_page) instructions on a dirty page in runs of 64 by bitmap,
$(limit core.alone_instructions_per_page) on one that stands alone.
END
}

readme() { # README.md with the numbers of now
    awk -v text="$work/paragraph" '
        /^<!-- made by make figures -->$/ { print; while ((getline line < text) > 0) print line; inside = 1; next }
        /^<!-- end -->$/ { inside = 0 }
        !inside' README.md
}

"$build/costs/sim" "$work/table"
paragraph >"$work/paragraph"
readme >"$work/README.md"
awk -f bench/figure.awk "$work/table" >"$work/bench.svg"
if [ "${2:-}" = check ]; then
    . tests/tap.sh
    numbers() { grep -q '^<!-- made by make figures -->$' README.md && diff README.md "$work/README.md"; }
    check 'the numbers in README.md are those that make figures writes' numbers
    check 'docs/bench.svg is the figure that make figures draws' diff -q docs/bench.svg "$work/bench.svg"
    done_testing
else
    cp "$work/README.md" README.md
    cp "$work/bench.svg" docs/bench.svg
fi
