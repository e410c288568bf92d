#!/usr/bin/env bash
# record.sh BUILD DIR [SEEDS]: what can be seen of rmig from outside goes into DIR, so that `diff -r` of two such folders
# tells whether a change that should not be noticed is. 2,500 seeds of each family if SEEDS does not say another number.
#
#   seeds        a line for each random migration: what the fabric did, what was said, how each end ended, all counters
#   costs.json   make costs, exact
#   symbols      the functions that an implementation defines
#   types        public structs with the offsets of their fields (gdb)
#   lines        lines of code of each header, without comments and blank ones
set -eu
cd "$(dirname "$0")/.."
[ $# -ge 2 ] || { echo "usage: record.sh BUILD DIR [SEEDS]" >&2; exit 2; }
for tool in gdb setarch valgrind; do
    command -v $tool >/dev/null || { echo "record.sh: not installed: $tool" >&2; exit 2; }
done
build=$1
dir=$2
seeds=${3:-2500}
mkdir -p "$dir"
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT

# Traces tell addresses: without ASLR they are the same in every run.
rm -f "$dir/seeds"
RMIG_RECORD=$(realpath "$dir")/seeds RMIG_SEEDS=$seeds setarch -R "$build/plain/random_migration" --jobs 1 >"$tmp/out" 2>&1 ||
    { tail -n 20 "$tmp/out"; exit 1; }
[ "$(wc -l <"$dir/seeds")" = $((4 * seeds)) ] || { echo "record.sh: $dir/seeds has not a line for each of 4 * $seeds seeds" >&2; exit 1; }

bench/costs.sh "$build" >"$tmp/out" 2>&1 || { tail -n 20 "$tmp/out"; exit 1; }
cp "$build/costs.json" "$dir/costs.json"

printf '#include "%s"\n' rmig*.h >"$tmp/all.c"
# shellcheck disable=SC2046 # a list of flags
gcc -std=c11 -g -I. -DRMIG_IMPLEMENTATION $(pkg-config --cflags libfabric) -c "$tmp/all.c" -o "$tmp/all.o"
nm -g --defined-only "$tmp/all.o" | awk '{ print $3 }' | sort >"$dir/symbols"

# Of the public half of each header: what stands before its implementation.
for header in rmig*.h; do
    awk '/^#if defined.RMIG_IMPLEMENTATION. && !defined.RMIG.*DONE/ { exit } /^(struct|enum|union) rmig_[a-z0-9][a-z0-9_]* \{/ { print $1, $2 }' "$header"
done | sort -u | sed 's,^,ptype/o ,' >"$tmp/ask"
gdb -batch -x "$tmp/ask" "$tmp/all.o" >"$dir/types" 2>&1

for header in rmig*.h; do
    printf '%s %s\n' "$header" "$(gcc -fpreprocessed -dD -E -P -x c "$header" 2>/dev/null | grep -c '[^[:space:]]')"
done >"$dir/lines"
