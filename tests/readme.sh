#!/usr/bin/env bash
# readme.sh RMIG_MIGRATE: what the documents say is so.
set -u
cd "$(dirname "$0")/.." || exit 1
. tests/tap.sh
program=$1
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT

parameter_table() {
    "$program" --list-params --json | perl -MJSON::PP -e 'local $/;
        print "| `$_->{name}` | $_->{default} | $_->{range} | $_->{help} |\n" for @{decode_json(<STDIN>)}' >"$tmp/listed"
    awk '/^\| parameter/ { table = 1; next } table && /^\|---/ { next } table && !/^\|/ { exit } table' README.md >"$tmp/table"
    [ -s "$tmp/listed" ] && diff "$tmp/listed" "$tmp/table"
}

exit_statuses() {
    "$program" --help | sed -n '/^Exit status:/,/^$/p' | sed -n 's/^ *\([0-9]\)  */\1 /p' >"$tmp/help"
    sed -n '/^| status/,/^$/p' README.md | sed -n 's/^| \([0-9]\) | \(.*\) |$/\1 \2/p' >"$tmp/table"
    [ -s "$tmp/help" ] && diff "$tmp/help" "$tmp/table"
}

targets_exist() {
    local target
    for target in $(grep -ohE '^ {4}make [a-z0-9 -]+' README.md docs/*.md | sed 's/^ *make //; s/  .*//'); do
        make -n "$target" >/dev/null 2>"$tmp/make" || { echo "make $target:"; cat "$tmp/make"; return 1; }
    done
}

links_exist() {
    local file link missing=0
    for file in README.md docs/*.md; do
        for link in $(grep -oE '\]\([^)#]+' "$file" | sed 's/^](//' | grep -v '^http'); do
            [ -e "$(dirname "$file")/$link" ] || { echo "$file: $link is not there"; missing=1; }
        done
    done
    return $missing
}

# Every block of C in the documents, compiled as an embedder would.
code_compiles() {
    local file=$1
    {
        printf '%s\n' '#include <poll.h>' '#include <stdio.h>' '#include "rmig.h"' '#include "rmig_fabric_ofi.h"'
        awk '/^```c$/ { code = 1; next } /^```$/ { code = 0 } code' "$file"
    } >"$tmp/code.c"
    [ "$(wc -l <"$tmp/code.c")" -gt 10 ] || { echo "no code in $file"; return 1; }
    gcc -std=c11 -D_GNU_SOURCE -Wall -Wextra -Wconversion -Wshadow -Werror -I. -c "$tmp/code.c" -o "$tmp/code.o"
}

check 'the parameter table of README.md is what --list-params prints' parameter_table
check 'the exit statuses of README.md are those of --help' exit_statuses
check 'the make targets in the documents exist' targets_exist
check 'the files that the documents link to exist' links_exist
for file in README.md docs/embedding.md; do
    check "the code in $file compiles" code_compiles "$file"
done
done_testing
