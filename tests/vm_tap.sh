# shellcheck shell=bash
# For tests that run themselves in the small virtual machine of tests/vm, to be sourced behind tap.sh, in the root of
# the tree: in_machine; and what waits there: wait_for.
needs=() vm_options=() prepare=:

# It cannot be done here: skipped, or with CI=true a failure.
no_machine() { # NAME REASONS
    if [ "${CI:-}" = true ]; then
        not_ok "$1" "this cannot run here, which is a failure where CI=true:
$2"
    else
        skip "$1" "$(printf '%s' "$2" | paste -sd ';' | sed 's/;/; /g')"
    fi
    done_testing
}

# Runs COMMAND in the VM, made in BUILD with these parts of fetch.sh; what it says there is the report. needs: programs
# that it needs beside the VM's own. prepare: a command to run first. vm_options: of run.sh.
in_machine() { # NAME BUILD PARTS COMMAND...
    local name=$1 build=$2 parts=$3 missing part text
    shift 3
    missing=$(tests/vm/missing.sh "${needs[@]}")
    [ -z "$missing" ] || no_machine "$name" "missing: $missing"
    for part in $parts; do
        missing=$(timeout -k 5 900 tests/vm/fetch.sh "$build" "$part" 2>&1) || no_machine "$name" "$missing"
    done
    text=$($prepare 2>&1) || {
        not_ok "$name" "$text"
        done_testing
    }
    exec tests/vm/run.sh "$build" "${vm_options[@]}" -- "$@"
}

exec {silent}<> <(:) # a pipe that nobody writes to

# Waits by a read that finds nothing, for in the machine a process that sleeps costs as much as the sleep is long.
wait_for() { # SECONDS CONDITION
    # shellcheck disable=SC2154 # of tap.sh
    local until=$((SECONDS + $1 * slack))
    while ! eval "$2"; do
        [ "$SECONDS" -lt "$until" ] || { echo "waited $(($1 * slack)) s in vain for: $2"; return 1; }
        read -r -t 0.1 -u "$silent" || :
    done
}
