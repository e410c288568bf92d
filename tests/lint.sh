#!/usr/bin/env bash
# Static analysis of the headers and of the examples.
set -u
cd "$(dirname "$0")/.." || exit 1
. tests/tap.sh

# Left out: what concerns taste, names that begin with an underscore, and the layout of structures.
checks='-*,clang-analyzer-*,bugprone-*,performance-*,portability-*,cert-err34-c,misc-redundant-expression'
for left_out in bugprone-easily-swappable-parameters bugprone-reserved-identifier bugprone-narrowing-conversions \
    bugprone-macro-parentheses bugprone-assignment-in-if-condition bugprone-sizeof-expression bugprone-branch-clone \
    performance-no-int-to-ptr clang-analyzer-optin.performance.Padding \
    clang-analyzer-security.insecureAPI.DeprecatedOrUnsafeBufferHandling; do
    checks+=",-$left_out"
done
# Nor what looks at other languages and systems: it says nothing about C and follows every call.
for other in osx cplusplus nullability fuchsia webkit optin.osx optin.cplusplus optin.mpi; do
    checks+=",-clang-analyzer-$other.*"
done

tidy() { # FILE CHECKS FLAGS...
    local file=$1 checks=$2 out
    shift 2
    out=$(clang-tidy --quiet --warnings-as-errors='*' --checks="$checks" \
        --header-filter='examples/[a-z_]*\.h$' "$file" -- "$@" 2>/dev/null) || { printf '%s\n' "$out"; return 1; }
}

# cppcheck does not read system headers: what ours ask of them is told. Labels of an
# assembly are the two ends of one object.
posix=(-D__x86_64__=1 -D__GNUC__=12 -DCLOCK_MONOTONIC=1 -DFI_MAJOR_VERSION=1 -DFI_MINOR_VERSION=17)

cpp_check() { # FILE FLAGS...
    cppcheck --quiet --error-exitcode=1 --enable=warning,performance,portability --inline-suppr --std=c11 \
        --suppress=missingIncludeSystem --suppress=unknownMacro --suppress=comparePointers:examples/kvm_guest.h \
        --max-configs=1 "$@"
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
    check "clang-tidy: $header" tidy "$header" "$checks" -x c -std=c11 -DRMIG_IMPLEMENTATION -I. \
        $(pkg-config --cflags libfabric)
    check "cppcheck: $header" cpp_check --language=c -DRMIG_IMPLEMENTATION=1 "${posix[@]}" "$header"
done
# It does not see through the variadic rmig_fail that a failure is not RMIG_OK.
unseen=,-clang-analyzer-core.NullDereference,-clang-analyzer-core.NonNullParamChecker
for example in examples/*.c; do
    check "clang-tidy: $example" tidy "$example" "$checks$unseen" -std=c11
    check "cppcheck: $example" cpp_check "${posix[@]}" "$example"
done
done_testing
