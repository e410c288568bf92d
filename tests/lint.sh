#!/usr/bin/env bash
# Static analysis of the headers, as C and as C++, and of the examples.
set -u
cd "$(dirname "$0")/.." || exit 1
. tests/tap.sh

tidy() { # FILE FLAGS...
    local file=$1 out
    shift
    out=$(clang-tidy --quiet --warnings-as-errors='*' --header-filter='rmig[a-z_]*\.h|examples/.*' \
        --checks='-*,bugprone-*,clang-analyzer-*,cert-err34-c,cert-mem57-cpp,misc-redundant-expression,performance-*,portability-*,-bugprone-easily-swappable-parameters,-bugprone-reserved-identifier,-bugprone-narrowing-conversions,-bugprone-macro-parentheses,-bugprone-assignment-in-if-condition,-clang-analyzer-security.insecureAPI.DeprecatedOrUnsafeBufferHandling,-clang-analyzer-optin.performance.Padding,-performance-no-int-to-ptr' \
        "$file" -- "$@" 2>/dev/null) || { printf '%s\n' "$out"; return 1; }
}

cpp_check() { # FILE FLAGS...
    cppcheck --quiet --error-exitcode=1 --enable=warning,performance,portability --inline-suppr --std=c11 \
        --suppress=missingIncludeSystem --suppress=unknownMacro --max-configs=1 "$@"
}

missing=
for tool in clang-tidy cppcheck; do
    command -v $tool >/dev/null || missing="$missing $tool"
done
if [ -n "$missing" ]; then
    skip 'static analysis' "not installed:$missing"
    done_testing
fi
# shellcheck disable=SC2046 # a list of flags
for header in rmig*.h; do
    check "clang-tidy: $header as C" tidy "$header" -x c -std=c11 -DRMIG_IMPLEMENTATION -I. $(pkg-config --cflags libfabric)
    check "clang-tidy: $header as C++" tidy "$header" -x c++ -std=c++17 -DRMIG_IMPLEMENTATION -I.
    check "cppcheck: $header" cpp_check --language=c -DRMIG_IMPLEMENTATION=1 -D__x86_64__=1 -D__GNUC__=12 "$header"
done
for example in examples/*.c; do
    check "clang-tidy: $example" tidy "$example" -std=c11
    check "cppcheck: $example" cpp_check -D__x86_64__=1 -D__GNUC__=12 "$example"
done
done_testing
