#!/usr/bin/env bash
# rmig.h is made of layers, each under a banner: none needs what comes after it. The parts of the engines stand by
# themselves: they know no source, no sink and no session, and none has more fields than can be kept in mind.
# shellcheck disable=SC2317 # functions that check calls
set -u
cd "$(dirname "$0")/.." || exit 1
. tests/tap.sh
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
# The parts of each engine: from this banner to that.
engines=('pacer: implementation,source: implementation' 'grants: implementation,sink: implementation')
fields_max=16

# The line of a banner; more than one of a name, or none, is an error.
line_of() { # NAME
    local line
    line=$(grep -n "^// >>$1\$" rmig.h)
    [ "$(grep -c . <<<"$line")" = 1 ] || { echo "rmig.h has not one banner $1" >&2; return 1; }
    echo "${line%%:*}"
}

# All that stands above a banner, with its open #if closed.
above() { # NAME
    local line
    line=$(line_of "$1") || return 1
    head -n $((line - 1)) rmig.h
    head -n $((line - 1)) rmig.h |
        awk '/^#if/ { open++ } /^#endif/ { open-- } END { while (open-- > 0) print "#endif" }'
}

# As C: in C++ an extern "C" would be open as well. What is not used yet may be there.
compiles() { # FILE FLAGS...
    local file=$1
    shift
    gcc -x c -std=c11 -Wall -Wextra -Werror -Wno-unused-function -Wno-unused-const-variable \
        -DRMIG_IMPLEMENTATION -I. -fsyntax-only "$@" "$file" 2>"$tmp/said" ||
        { grep error "$tmp/said"; return 1; }
}

layer() { # NAME
    above "$1" >"$tmp/layer.h" && compiles "$tmp/layer.h"
}

# The parts with the names of the engines taken away.
parts_alone() { # FIRST ENGINE
    local line
    line=$(line_of "$1") || return 1
    above "$2" | sed "${line}a #pragma GCC poison rmig_source rmig_sink rmig__session" >"$tmp/parts.h"
    compiles "$tmp/parts.h"
}

# struct and number of fields of each part, nested ones counted, those of an array once.
fields() { # FIRST ENGINE
    local first
    first=$(line_of "$1") || return 1
    above "$2" >"$tmp/parts.h" || return 1
    sed -n "$first,\$s/^struct \(rmig__[a-z_0-9]*\) {\$/\1/p" "$tmp/parts.h" >"$tmp/names"
    clang -x c -std=c11 -DRMIG_IMPLEMENTATION -I. -fsyntax-only -w -Xclang -fdump-record-layouts-complete \
        "$tmp/parts.h" >"$tmp/layouts" || return 1
    perl -e '
        my ($layouts, $names) = @ARGV;
        my (%of, $name);
        open my $in, "<", $layouts or die "$layouts: $!\n";
        while (<$in>) {
            if (/^ +0 \| (?:struct|union) (\w+)$/) { $name = exists $of{$1} ? undef : $1; $of{$1} //= []; }
            elsif (/^\*\*\*/) { undef $name; }
            elsif (/^ +[0-9:-]+ \| ( +)(.*)$/ && defined $name) { push @{$of{$name}}, [length $1, $2]; }
        }
        sub count {
            my ($fields) = @_;
            my $n = 0;
            for my $i (0 .. $#$fields) {
                next if $i < $#$fields && $fields->[$i + 1][0] > $fields->[$i][0]; # a struct, spread out behind it
                my ($array) = $fields->[$i][1] =~ /^struct (\w+)\[/;
                $n += defined $array ? count($of{$array}) : 1;
            }
            return $n;
        }
        open my $list, "<", $names or die "$names: $!\n";
        for (<$list>) {
            chomp;
            die "$_: its layout is not known\n" unless $of{$_} && @{$of{$_}};
            printf "%s %d\n", $_, count($of{$_});
        }' "$tmp/layouts" "$tmp/names"
}

small() { # NAME FIELDS
    [ "$2" -le "$fields_max" ] || { echo "struct $1 has $2 fields; must be at most $fields_max: make it two"; return 1; }
}

while IFS= read -r banner; do
    check "what stands above >>$banner compiles" layer "$banner"
done < <(sed -n 's,^// >>,,p' rmig.h)
for engine in "${engines[@]}"; do
    first=${engine%,*} engine=${engine#*,}
    check "the parts before >>$engine know no source, sink or session" parts_alone "$first" "$engine"
    if ! command -v clang >/dev/null; then
        skip "fields of the parts before >>$engine" 'not installed: clang'
        continue
    fi
    counts=$(fields "$first" "$engine" 2>&1) || { not_ok "the fields of the parts before >>$engine are counted" "$counts"; continue; }
    check "there are parts before >>$engine" test -n "$counts"
    while read -r name n; do
        check "$name has at most $fields_max fields" small "$name" "$n"
    done <<<"$counts"
done
done_testing
