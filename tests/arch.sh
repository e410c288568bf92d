#!/usr/bin/env bash
# arch.sh BUILD SUITE...: suites that need no device, and random migrations, on machines of other kinds under qemu-user:
# s390x has the other order of bytes, aarch64 runs with a page size of 64 KiB.
set -u
build=$1
shift
# shellcheck source=tests/tap.sh
. "$(dirname "$0")/tap.sh"
log=$(mktemp)
trap 'rm -f "$log"' EXIT

# What only takes long there, and what asks the kernel below about memory.
left_out() { # SUITE
    case $1 in
    unit_blocks) echo '!blocks/a_hundred_thousand_*' ;;
    unit_qemu) echo '!qemu/descriptions_of_all_kinds_of_length_are_found !qemu/the_end_is_found_as_by_looking_backwards' ;;
    unit_zero) echo '!holes/* !lockable/* !zero/large_ranges' ;;
    esac
}

# Its standard error is kept apart: what is no whole line there would make the result behind it one that nobody knows.
run_suite() { # ARCH SUITE OPTION_OF_QEMU...
    local arch=$1 suite=$2 pattern filters=() output status failed=$tap_failed
    shift 2
    set -f
    for pattern in $(left_out "$suite"); do
        filters+=(--filter "$pattern")
    done
    set +f
    output=$(timeout -k 10 300 "qemu-$arch" "$@" "$build/$arch/$suite" "${filters[@]}" 2>"$log")
    status=$?
    awk '{ print "# " $0 }' "$log"
    relay "$arch $suite " "$output"
    [ $status = 0 ] || [ "$tap_failed" != "$failed" ] || not_ok "$arch $suite ends well" "exit status $status"
}

run_arch() { # ARCH SEEDS OPTION_OF_QEMU...
    local arch=$1 seeds=$2 program
    shift 2
    for program in "$arch-linux-gnu-gcc" "qemu-$arch"; do
        if ! command -v "$program" >/dev/null; then
            skip "$arch" "not installed: $program (make deps)"
            return
        fi
    done
    for suite in "${suites[@]}"; do
        RMIG_SEEDS=$seeds run_suite "$arch" "$suite" "$@"
    done
}

suites=("$@")
run_arch s390x 30

# QEMU before 9.0 gives the emulated program the page size that it is told; later ones only know the target's own.
large='aarch64 has pages of 64 KiB'
large_pages=()
if ! command -v qemu-aarch64 >/dev/null || [ ! -x "$build/aarch64/unit_wire" ]; then
    : # run_arch says what is missing
elif [ "$(qemu-aarch64 -p 65536 "$build/aarch64/unit_wire" --page-size 2>/dev/null)" = 65536 ]; then
    large_pages=(-p 65536)
    ok "$large"
else
    skip "$large" "this qemu-aarch64 has no page size of 64 KiB"
fi
run_arch aarch64 20 "${large_pages[@]}"
done_testing
