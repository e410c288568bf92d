# Test Anything Protocol for shell scripts, to be sourced: ok, not_ok, skip, check, done_testing.
tap_count=0
tap_failed=0
# Times in the scripts are those of a machine of one's own; a busy one may take so many times as long. Where the time is
# what is tested, what was said tells which limit struck.
slack=10

ok() { # NAME
    tap_count=$((tap_count + 1))
    echo "ok $tap_count - $1"
}

not_ok() { # NAME [TEXT]
    tap_count=$((tap_count + 1))
    tap_failed=$((tap_failed + 1))
    echo "not ok $tap_count - $1"
    printf '%s\n' "${2:-}" | sed 's/^/# /'
}

skip() { # NAME REASON
    tap_count=$((tap_count + 1))
    echo "ok $tap_count - $1 # SKIP $2"
}

# Passes when the command succeeds; shows what it printed when not.
check() { # NAME COMMAND...
    tap_name=$1
    shift
    if tap_output=$("$@" 2>&1); then
        ok "$tap_name"
    else
        not_ok "$tap_name" "$tap_output"
    fi
}

# The lines of a suite as lines of this one, which must be as many as it says.
relay() { # PREFIX OUTPUT [ran]: the prefix is put before each name; ran: leaves out those that were skipped
    local line plan=none results=0
    while IFS= read -r line; do
        case $line in
        'ok '*'# SKIP '*) [ "${3:-}" = ran ] || skip "$1${line#* - }" "${line#*# SKIP }" ;;
        'ok '*) ok "$1${line#* - }" ;;
        'not ok '*) not_ok "$1${line#* - }" ;;
        '1..'*) plan=${line#1..} ;;
        *) printf '%s\n' "$line" ;;
        esac
        case $line in 'ok '* | 'not ok '*) results=$((results + 1)) ;; esac
    done <<<"$2"
    [ "$results" = "$plan" ] || not_ok "$1reports on all its tests" "results: $results, planned: $plan
$2"
}

done_testing() {
    echo "1..$tap_count"
    [ "$tap_failed" = 0 ]
    exit $?
}
