#!/usr/bin/env bash
# What a migration costs where any machine measures the same: virtual times of the simulator, and instructions that
# callgrind counts. Each has a limit in bench/costs.limits; beyond it this fails.
#   costs.sh BUILD_DIR            writes BUILD_DIR/costs.json; prints name, value, limit and unit in TAP
set -euo pipefail
build=$1
here=$(dirname "$0")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

instructions() { # of the core alone, per dirty page: WAY NAME
    local pages count
    valgrind --tool=callgrind --callgrind-out-file="$work/callgrind" --collect-atstart=no \
        --toggle-collect=measured "$build/costs/core" "$1" >"$work/core" 2>"$work/valgrind"
    pages=$(sed -n 's/^pages //p' "$work/core")
    count=$(sed -n 's/.*Collected : \([0-9]*\).*/\1/p' "$work/valgrind")
    awk "BEGIN {printf \"core.$2_instructions_per_page %.3f instructions\n\", $count / $pages}"
}

{
    "$build/costs/sim" costs
    instructions bitmap bitmap
    instructions range range
    instructions page save_page
    instructions alone alone
} >"$work/lines"
"$build/bench/report" "$build/costs.json" "$here/costs.limits" <"$work/lines"
