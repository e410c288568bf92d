#!/usr/bin/env bash
# valgrind.sh MINIMAL FOLDER: no leak and no bad access, neither in a whole migration nor in the suites of the core.
set -u
cd "$(dirname "$0")/.." || exit 1
. tests/tap.sh
minimal=$1
suites=$2

clean() {
    timeout -k 10 2000 valgrind --quiet --error-exitcode=9 --leak-check=full --errors-for-leak-kinds=definite \
        --track-origins=no --suppressions=tests/valgrind.supp "$@"
}

if ! command -v valgrind >/dev/null; then
    skip 'valgrind' 'not installed: valgrind'
    done_testing
fi
check 'minimal is clean, at both ends' clean "$minimal"
for suite in unit_params unit_blocks unit_wire; do
    if [ -x "$suites/$suite" ]; then
        check "$suite is clean" clean "$suites/$suite" --quiet --timeout 1800
    else
        not_ok "$suite is clean" "$suites/$suite was not built"
    fi
done
done_testing
