#!/usr/bin/env bash
# kvm_live.sh PROGRAM: the hypervisor example migrates a guest that runs, and notices when a page is lost.
set -u
cd "$(dirname "$0")/.." || exit 1
. tests/tap.sh
program=$1
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT

# json_field FILE NAME: of a JSON object
json_field() {
    perl -MJSON::PP -e 'local $/; open my $in, "<", $ARGV[0] or die "$ARGV[0]: $!"; my $v = decode_json(<$in>)->{$ARGV[1]};
        print defined $v ? $v : "undefined"' "$1" "$2"
}

demo() { # GUEST MORE...
    local guest=$1 name
    shift
    timeout -k 5 100 "$program" demo --guest "$guest" --ram 64M --run-before 500ms --run-after 500ms \
        --json "$tmp/demo.json" "$@" || { echo "exit status $?"; return 1; }
    [ "$(json_field "$tmp/demo.json" verified)" = 1 ] || { cat "$tmp/demo.json"; return 1; }
    [ "$(json_field "$tmp/demo.json" guest)" = "$guest" ] || { cat "$tmp/demo.json"; return 1; }
    [ "$(json_field "$tmp/demo.json" ram_bytes)" = 67108864 ] || { cat "$tmp/demo.json"; return 1; }
    for name in rounds total_ns downtime_ns throughput_bytes_per_s; do
        [ "$(json_field "$tmp/demo.json" $name)" -gt 0 ] || { echo "$name is not above 0"; cat "$tmp/demo.json"; return 1; }
    done
}

sabotage_is_noticed() { # GUEST
    timeout -k 5 100 "$program" demo --guest "$1" --ram 64M --run-before 500ms --run-after 500ms \
        --sabotage lose-page --json "$tmp/lost.json"
    local status=$?
    [ $status = 1 ] || { echo "exit status $status, 1 wanted"; return 1; }
    [ "$(json_field "$tmp/lost.json" verified)" = 0 ] || { cat "$tmp/lost.json"; return 1; }
}

both() { # GUEST
    check "a $1 guest migrates while it runs" demo "$1"
    check "a $1 guest that is hardly throttled migrates" demo "$1" --dirty-rate 400M --downtime 100
    check "a $1 guest migrates in chunks of 16 MiB, pinned whole" demo "$1" --set chunk-size=16M --set pin-all=on
    check "a page lost of a $1 guest is noticed" sabotage_is_noticed "$1"
}

if [ -r /dev/kvm ] && [ -w /dev/kvm ]; then
    both kvm
else
    skip 'a kvm guest migrates while it runs' '/dev/kvm cannot be used here'
fi
both thread
done_testing
