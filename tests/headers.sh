#!/usr/bin/env bash
# The headers as an embedder meets them: alone, in each language, under each switch; and what an implementation's
# object defines and needs.
set -u
cd "$(dirname "$0")/.." || exit 1
. tests/tap.sh
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
warn=(-Wall -Wextra -Wpedantic -Wconversion -Wshadow -Werror)

# compile CC STANDARD HEADERS FLAGS...: one file that includes them
compile() {
    local cc=$1 standard=$2 headers=$3
    shift 3
    local language=c
    case $standard in c++*) language=c++ ;; esac
    # shellcheck disable=SC2086 # a list of headers
    printf '#include "%s"\n' $headers |
        "$cc" -x $language -std="$standard" "${warn[@]}" "$@" -I. -c - -o "$tmp/out.o"
}

# Each header is compiled alone where it could lack something that another includes.
declare -A alone=(
    [declarations]=''
    [namespace declarations]='-DRMIG_NAMESPACE=acme_'
    [implementation]='-DRMIG_IMPLEMENTATION'
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

# clang says all that it has to say before it makes code, gcc does not. C17 is C11 with another number.
compile_matrix() {
    local all header cc standard variant only
    all=$(echo rmig*.h)
    for cc in gcc clang; do
        only=
        [ $cc = clang ] && only=-fsyntax-only
        for standard in c11 c17 c++17; do
            # shellcheck disable=SC2086 # a list of flags
            for variant in "${!alone[@]}"; do
                for header in $all; do
                    check "$header, $cc, $standard, $variant" compile $cc $standard "$header" $only ${alone[$variant]}
                done
            done
            [ $standard = c17 ] && continue
            # shellcheck disable=SC2086 # a list of flags
            for variant in "${!together[@]}"; do
                check "all headers, $cc, $standard, $variant" compile $cc $standard "$all" $only ${together[$variant]}
            done
        done
    done
    check 'all headers, g++, C++17 without exceptions and RTTI' compile gcc c++17 "$all" -DRMIG_IMPLEMENTATION \
        -fno-exceptions -fno-rtti
}

# A chunk size that is none must be refused, with the words that say what is right.
refused_chunk_size() {
    local cc=$1 standard=$2 size=$3
    if compile "$cc" "$standard" rmig.h "-DRMIG_CHUNK_SIZE=$size" 2>"$tmp/refusal"; then
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
                check "chunk size $size is taken by $cc as $standard" compile $cc $standard rmig.h \
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
    bytes=$(size -A "$1" | awk '$1 ~ /^\.(t?data|t?bss)(\..*)?$/ && $1 !~ /rel\.ro/ { n += $2 } END { print n + 0 }')
    [ "$bytes" = 0 ] || { echo "$bytes bytes of writable data"; nm "$1" | grep -i ' [bdcBDC] '; return 1; }
}

symbols() {
    local cc standard
    for cc in gcc clang; do
        for standard in c11 c++17; do
            compile $cc $standard rmig.h -O1 -fPIC -DRMIG_IMPLEMENTATION && mv "$tmp/out.o" "$tmp/core.o"
            check "the object of $cc, $standard defines what is declared" same_symbols '' "$tmp/core.o" rmig.h
            check "the object of $cc, $standard needs only libc" only_libc "$tmp/core.o"
            check "the object of $cc, $standard has no writable data" no_variables "$tmp/core.o"
        done
    done
    compile gcc c11 rmig.h -DRMIG_IMPLEMENTATION -DRMIG_NAMESPACE=acme_ && mv "$tmp/out.o" "$tmp/acme.o"
    check 'in a namespace every symbol has its prefix' same_symbols acme_ "$tmp/acme.o" rmig.h
    compile gcc c11 rmig.h -DRMIG_IMPLEMENTATION -DRMIG_STATIC && mv "$tmp/out.o" "$tmp/static.o"
    check 'a private copy defines nothing' no_symbols "$tmp/static.o"
    compile gcc c11 rmig.h && mv "$tmp/out.o" "$tmp/declarations.o"
    check 'declarations define nothing' no_symbols "$tmp/declarations.o"
    fabric_symbols
}

# shellcheck disable=SC2086 # a list of headers
fabric_symbols() {
    local header with
    for header in rmig_*.h; do
        with=$(sed -n 's/^#include "\(rmig_.*\.h\)"$/\1/p' "$header")
        compile gcc c11 "$header" -DRMIG_IMPLEMENTATION && mv "$tmp/out.o" "$tmp/fabric.o"
        check "$header adds what it declares" same_symbols '' "$tmp/fabric.o" rmig.h $with "$header"
        compile gcc c11 "$header" -DRMIG_IMPLEMENTATION -DRMIG_NAMESPACE=acme_ && mv "$tmp/out.o" "$tmp/fabric.o"
        check "$header takes the namespace" same_symbols acme_ "$tmp/fabric.o" rmig.h $with "$header"
        compile gcc c11 "$header" -DRMIG_IMPLEMENTATION -DRMIG_STATIC && mv "$tmp/out.o" "$tmp/fabric.o"
        check "a private copy of $header defines nothing" no_symbols "$tmp/fabric.o"
    done
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
    gcc -std=c11 "${warn[@]}" -I. "$1" -c "$tmp/one.c" -o "$tmp/one.o" &&
        gcc -std=c11 "${warn[@]}" -I. "$2" -DRMIG_CHUNK_SIZE=67108864 -c "$tmp/two.c" -o "$tmp/two.o" &&
        gcc "$tmp/main.c" "$tmp/one.o" "$tmp/two.o" -o "$tmp/both" || return 1
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
