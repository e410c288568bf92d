#!/usr/bin/env bash
# The headers as an embedder meets them: alone, in each language, under each switch; and what an implementation's
# object defines and needs.
set -u
cd "$(dirname "$0")/.." || exit 1
. tests/tap.sh
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
warn=(-Wall -Wextra -Wpedantic -Wconversion -Wshadow -Werror)
all=$(echo rmig*.h)

# compile CC STANDARD HEADERS OBJECT FLAGS...: one file that includes them. Without an object's name no code is made.
compile() {
    local cc=$1 standard=$2 headers=$3 to=(-fsyntax-only)
    [ -n "$4" ] && to=(-c -o "$tmp/$4.o")
    shift 4
    local language=c
    case $standard in c++*) language=c++ ;; esac
    # shellcheck disable=SC2086 # a list of headers
    printf '#include "%s"\n' $headers | "$cc" -x $language -std="$standard" "${warn[@]}" "$@" -I. "${to[@]}" -
}

# Each header is compiled alone where it could lack something that another includes.
declare -A alone=(
    [declarations]=''
    [namespace declarations]='-DRMIG_NAMESPACE=acme_'
    [implementation]='-DRMIG_IMPLEMENTATION -fPIC'
)
# The other switches change no header's needs: all headers share a compilation. -O2 finds more to warn about.
declare -A together=(
    [optimised]='-O2 -fPIC -DRMIG_IMPLEMENTATION'
    [private copy]='-DRMIG_IMPLEMENTATION -DRMIG_STATIC'
    [namespace]='-DRMIG_IMPLEMENTATION -DRMIG_NAMESPACE=acme_'
    [64 MiB chunks]='-DRMIG_IMPLEMENTATION -DRMIG_CHUNK_SIZE=67108864'
    [overrides]='-DRMIG_IMPLEMENTATION -include tests/override.h'
    [no assertions]='-DRMIG_IMPLEMENTATION -DNDEBUG -O1'
    [io_uring]='-DRMIG_IMPLEMENTATION -DRMIG_MAPPED_URING -D_GNU_SOURCE'
)

# The object to make of a compilation, if any: those whose symbols are looked at, and those for what gcc says only when it
# makes code, where it optimises. clang says all that it has to say before.
object_of() { # CC STANDARD HEADERS VARIANT
    case "$1 $2 $3 $4" in
    *' rmig.h implementation' | 'gcc c11 '*' implementation' | 'gcc c11 rmig.h declarations') ;;
    'gcc c11 '*' private copy' | 'gcc c11 '*' namespace' | 'gcc '*' optimised' | 'gcc c11 '*' no assertions') ;;
    *) return ;;
    esac
    [ "$3" = "$all" ] && echo "all $4 $1 $2" || echo "$3 $4 $1 $2"
}

compile_matrix() {
    local header cc standard variant
    for cc in gcc clang; do
        # shellcheck disable=SC2086 # a list of flags
        for standard in c11 c++17; do
            for variant in "${!alone[@]}"; do
                for header in $all; do
                    check "$header, $cc, $standard, $variant" compile $cc $standard "$header" \
                        "$(object_of $cc $standard "$header" "$variant")" ${alone[$variant]}
                done
            done
            for variant in "${!together[@]}"; do
                check "all headers, $cc, $standard, $variant" compile $cc $standard "$all" \
                    "$(object_of $cc $standard "$all" "$variant")" ${together[$variant]}
            done
        done
        # C17 is C11 with another number: what a header lacks alone it lacks in both.
        # shellcheck disable=SC2086 # a list of flags
        for variant in "${!alone[@]}"; do
            check "all headers, $cc, c17, $variant" compile $cc c17 "$all" '' ${alone[$variant]}
        done
    done
    check 'all headers, g++, C++17 without exceptions and RTTI' compile gcc c++17 "$all" '' -DRMIG_IMPLEMENTATION \
        -fno-exceptions -fno-rtti
}

# A chunk size that is none must be refused, with the words that say what is right.
refused_chunk_size() {
    local cc=$1 standard=$2 size=$3
    if compile "$cc" "$standard" rmig.h '' "-DRMIG_CHUNK_SIZE=$size" 2>"$tmp/refusal"; then
        echo "RMIG_CHUNK_SIZE=$size compiled"
        return 1
    fi
    grep -q 'RMIG_CHUNK_SIZE must be a power of two from 1 MiB' "$tmp/refusal" || { cat "$tmp/refusal"; return 1; }
}

chunk_sizes() {
    local cc standard size
    for cc in gcc clang; do
        for standard in c11 c++17; do
            for size in 0 1 4096 524288 1048575 1048577 3145728 2147483648 -1048576; do
                check "chunk size $size is refused by $cc as $standard" refused_chunk_size $cc $standard "$size"
            done
            for size in 1048576 '(1<<20)' 0x4000000 1073741824; do
                check "chunk size $size is taken by $cc as $standard" compile $cc $standard rmig.h '' \
                    "-DRMIG_CHUNK_SIZE=$size"
            done
        done
    done
}

# Public functions, read from the text of a header's declarations.
declared() {
    perl -0777 -ne 's{/\*.*?\*/}{}gs; s{//[^\n]*}{}g; s{\\\n}{ }g; s{^\s*#[^\n]*}{}gm; s{__attribute__\(\(.*?\)\)}{}gs;
        print "$1\n" while /\bRMIG_API\b[^;{}]*?\b(rmig_\w+)\s*\(/g' "$@" | sort -u
}

defined() { nm -g --defined-only "$1" | awk '{ print $3 }' | sort; }

# symbols PREFIX HEADER... : the object's global symbols are the declared functions, no more and no fewer.
same_symbols() {
    local prefix=$1 object=$2
    shift 2
    declared "$@" | sed "s/^/$prefix/" | sort >"$tmp/declared"
    [ "$(wc -l <"$tmp/declared")" -ge 50 ] || { echo "found only $(wc -l <"$tmp/declared") declarations"; return 1; }
    defined "$object" >"$tmp/defined"
    diff "$tmp/declared" "$tmp/defined"
}

no_symbols() {
    [ -s "$1" ] || { echo "$1 was not made"; return 1; }
    defined "$1" >"$tmp/defined"
    [ ! -s "$tmp/defined" ] || { cat "$tmp/defined"; return 1; }
}

# The core has no socket, thread, clock or child, reads no environment, and keeps no variable between calls.
only_libc() {
    cc -shared -Wl,-z,defs "$1" -o "$tmp/core.so" || return 1
    local forbidden='(sock|connect|bind|listen|accept|recv|sendto|sendmsg|p?poll|select|epoll|pthread|thrd_|mtx_|sem_|'
    forbidden+='clock|time|gettimeofday|n?usleep|nanosleep|fork|v?fork|exec|system|getenv|signal|sigaction|exit|f?printf|puts|putchar|fopen|rand)'
    if nm -u "$1" | awk '{ print $2 }' | sed 's/@.*//' | grep -E "^_*$forbidden"; then
        return 1
    fi
}

no_variables() {
    local bytes
    [ -s "$1" ] || { echo "$1 was not made"; return 1; }
    bytes=$(size -A "$1" | awk '$1 ~ /^\.(t?data|t?bss)(\..*)?$/ && $1 !~ /rel\.ro/ { n += $2 } END { print n + 0 }')
    [ "$bytes" = 0 ] || { echo "$bytes bytes of writable data"; nm "$1" | grep -i ' [bdcBDC] '; return 1; }
}

# shellcheck disable=SC2086 # a list of headers
symbols() {
    local cc standard header with
    for cc in gcc clang; do
        for standard in c11 c++17; do
            local core="$tmp/rmig.h implementation $cc $standard.o"
            check "the object of $cc, $standard defines what is declared" same_symbols '' "$core" rmig.h
            check "the object of $cc, $standard needs only libc" only_libc "$core"
            check "the object of $cc, $standard has no writable data" no_variables "$core"
        done
    done
    for header in rmig_*.h; do
        with=$(sed -n 's/^#include "\(rmig_.*\.h\)"$/\1/p' "$header")
        check "$header adds what it declares" same_symbols '' "$tmp/$header implementation gcc c11.o" rmig.h $with "$header"
    done
    check 'in a namespace every symbol of every header has its prefix' same_symbols acme_ \
        "$tmp/all namespace gcc c11.o" $all
    check 'a private copy of all headers defines nothing' no_symbols "$tmp/all private copy gcc c11.o"
    check 'declarations define nothing' no_symbols "$tmp/rmig.h declarations gcc c11.o"
}

# The same copy serves several programs.
make_copy() { # NAME HOW FLAGS...
    local object="$tmp/$1$2.o"
    [ -e "$object" ] || gcc -std=c11 "${warn[@]}" -I. "${@:2}" -c "$tmp/$1.c" -o "$object"
}

# Two copies with different defaults in one program: each user gets its own. And two private copies.
two_copies() {
    local name
    for name in one two; do
        cat >"$tmp/$name.c" <<END
#define RMIG_IMPLEMENTATION
#include "rmig.h"
unsigned long chunk_size_of_$name(void);
unsigned long chunk_size_of_$name(void) {
    struct rmig_config cfg;
    memset(&cfg, 0, sizeof cfg);
    return rmig_get(&cfg, RMIG_PARAM_CHUNK_SIZE);
}
END
    done
    cat >"$tmp/main.c" <<END
#include <stdio.h>
unsigned long chunk_size_of_one(void), chunk_size_of_two(void);
int main(void) {
    printf("%lu %lu\n", chunk_size_of_one(), chunk_size_of_two());
    return 0;
}
END
    make_copy one "$1" && make_copy two "$2" -DRMIG_CHUNK_SIZE=67108864 &&
        gcc "$tmp/main.c" "$tmp/one$1.o" "$tmp/two$2.o" -o "$tmp/both" || return 1
    local said
    said=$("$tmp/both")
    [ "$said" = "1048576 67108864" ] || { echo "chunk sizes 1048576 and 67108864 wanted, not: $said"; return 1; }
}

compile_matrix
chunk_sizes
symbols
check 'two namespaces live in one program' two_copies -DRMIG_NAMESPACE=one_ -DRMIG_NAMESPACE=two_
check 'two private copies live in one program' two_copies -DRMIG_STATIC -DRMIG_STATIC
check 'a private copy lives beside a public one' two_copies -DRMIG_STATIC -DRMIG_NAMESPACE=two_
done_testing
