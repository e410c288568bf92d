#!/usr/bin/env bash
# fuzz.sh SECONDS PROGRAM...: each libFuzzer target for so long, from its corpus in tests/corpus.
set -u
cd "$(dirname "$0")/.." || exit 1
. tests/tap.sh
B=${B:-build}
seconds=$1
shift

fuzz() { # PROGRAM
    local name corpus seeds=()
    name=$(basename "$1")
    corpus=$B/corpus/$name
    mkdir -p "$corpus"
    for seed in "tests/corpus/$name" tests/corpus; do
        [ -d "$seed" ] && { seeds=("$seed"); break; }
    done
    timeout -k 10 $((seconds + 60)) "$1" -max_total_time="$seconds" -timeout=10 -rss_limit_mb=2048 -print_final_stats=1 \
        -artifact_prefix="$B/$name-" "$corpus" "${seeds[@]}" >"$B/$name.log" 2>&1 && return
    tail -50 "$B/$name.log"
    echo "replay: $1 the file named above"
    return 1
}

[ $# -gt 0 ] || not_ok 'there is something to fuzz' 'no tests/fuzz_*.c'
for program in "$@"; do
    check "$(basename "$program") for $seconds s" fuzz "$program"
done
done_testing
