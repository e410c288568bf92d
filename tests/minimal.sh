#!/usr/bin/env bash
# minimal.sh PROGRAM: the example moves its memory and says that it is the same.
set -u
cd "$(dirname "$0")/.." || exit 1
. tests/tap.sh

moves_and_verifies() {
    local said
    said=$(timeout -k 5 600 "$1") || { echo "exit status $?: $said"; return 1; }
    [ "$said" = 'arrived at tick 42, memory verified' ] || { echo "said: $said"; return 1; }
}

short_enough() {
    local lines
    lines=$(wc -l <examples/minimal.c)
    [ "$lines" -lt 100 ] || { echo "$lines lines"; return 1; }
}

check 'minimal moves its memory' moves_and_verifies "$1"
check 'minimal moves its memory again' moves_and_verifies "$1"
check 'minimal has fewer than 100 lines' short_enough
done_testing
