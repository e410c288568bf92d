#!/usr/bin/env bash
# soak_tool.sh RANDOM_MIGRATION: what soak.sh does with programs that pass, fail and crash.
set -u
here=$(cd "$(dirname "$0")" && pwd)
. "$here/tap.sh"
program=$1
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT

# A program whose third seed in a slice ends it, by a signal; the file says that it runs.
cat >"$tmp/crashes" <<'END'
#!/bin/sh
seed=$(cat "$RMIG_SOAK" | sed 's/^0*//')
printf '%020d\n' $((seed + 2)) >"$RMIG_SOAK"
kill -SEGV $$
END
chmod +x "$tmp/crashes"

passes() {
    "$here/soak.sh" 1 1 "$tmp/good" "$program" >"$tmp/out" 2>&1 || { cat "$tmp/out"; return 1; }
    grep -Eq '^[1-9][0-9]* migrations in [0-9]+ s, [1-9][0-9]* an hour; 0 failed$' "$tmp/out" && return
    cat "$tmp/out"
    return 1
}

names_what_fails() {
    "$here/soak.sh" 600 1 "$tmp/bad" "$tmp/crashes" >"$tmp/out" 2>&1
    [ $? = 1 ] || { echo 'its status is not 1'; return 1; }
    grep -q '^60 migrations in .*; 20 failed: ' "$tmp/out" || { cat "$tmp/out"; return 1; }
    [ "$(sort -u "$tmp/bad/failed" | grep -Ec "^RMIG_SEED=[0-9]+ RMIG_FAMILY=[a-z_0-9]+ $tmp/crashes$")" = 20 ] &&
        diff "$tmp/bad/failed" <(grep ^RMIG_SEED "$tmp/out") &&
        [ "$(cut -d' ' -f2 "$tmp/bad/failed" | sort -u | wc -l)" = 4 ]
}

refuses() {
    "$here/soak.sh" "$1" 1 "$tmp/none" "$program" >"$tmp/out" 2>&1
    [ $? = 2 ] && grep -q "SECONDS=$1: must be a number from 1" "$tmp/out"
}

check 'migrations that succeed are counted' passes
check 'a seed that crashes is named, kept, and the next ones run' names_what_fails
check 'a time that is no number is refused' refuses 10m
done_testing
