#!/usr/bin/env bash
# kvm_live.sh PROGRAM: the hypervisor example migrates a guest that runs, snapshots it into a file and loads it from
# there, and notices when a page is lost. mapped_ram, in the same folder, looks at the files.
# shellcheck disable=SC2015,SC2016,SC2317 # a && b || fail; perl in quotes; called by check
set -u
cd "$(dirname "$0")/.." || exit 1
. tests/tap.sh
program=$1
mapped_ram=$(dirname "$program")/mapped_ram
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
    timeout -k 5 600 "$program" demo --guest "$guest" --ram 64M --run-before 500ms --run-after 500ms \
        --json "$tmp/demo.json" "$@" || { echo "exit status $?"; return 1; }
    [ "$(json_field "$tmp/demo.json" verified)" = 1 ] || { cat "$tmp/demo.json"; return 1; }
    [ "$(json_field "$tmp/demo.json" guest)" = "$guest" ] || { cat "$tmp/demo.json"; return 1; }
    [ "$(json_field "$tmp/demo.json" ram_bytes)" = 67108864 ] || { cat "$tmp/demo.json"; return 1; }
    for name in rounds total_ns downtime_ns throughput_bytes_per_s; do
        [ "$(json_field "$tmp/demo.json" "$name")" -gt 0 ] || { echo "$name is not above 0"; cat "$tmp/demo.json"; return 1; }
    done
}

sabotage_is_noticed() { # GUEST
    timeout -k 5 600 "$program" demo --guest "$1" --ram 64M --run-before 500ms --run-after 500ms \
        --sabotage lose-page --json "$tmp/lost.json"
    local status=$?
    [ "$status" = 1 ] || { echo "exit status $status, 1 wanted"; return 1; }
    [ "$(json_field "$tmp/lost.json" verified)" = 0 ] || { cat "$tmp/lost.json"; return 1; }
}

# It passes the signal on: both ends end, and nothing is called a success.
demo_is_told() { # SIGNAL
    : >"$tmp/told.err"
    timeout -k 5 600 "$program" demo --guest thread --ram 64M --run-before 300s 2>"$tmp/told.err" &
    local demo=$! i status
    for ((i = 0; i < 400 * slack; i++)); do
        grep -q 'listening on' "$tmp/told.err" && break
        sleep 0.05
    done
    pkill "-$1" -P "$demo"
    wait "$demo"
    status=$?
    [ "$status" != 0 ] && [ "$status" != 124 ] && grep -q 'cancelled by a signal' "$tmp/told.err" && return
    echo "exit status $status"
    cat "$tmp/told.err"
    return 1
}

start_dest() { # OPTION...: sets dest and address
    local i
    : >"$tmp/dest.err" # the address of an older one is none
    timeout -k 5 600 "$program" dest --listen "${listen-127.0.0.1}:0" --json "$tmp/dest.json" "$@" 2>"$tmp/dest.err" &
    dest=$!
    for ((i = 0; i < 400; i++)); do
        address=$(sed -n 's/^destination: listening on //p' "$tmp/dest.err")
        [ -n "$address" ] && return
        sleep 0.05
    done
    cat "$tmp/dest.err"
    return 1
}

source_to_dest() { # OPTION...
    timeout -k 5 600 "$program" source --connect "$address" --guest thread --ram 64M --run-before 100 --run-after 100 \
        --json "$tmp/source.json" "$@" 2>"$tmp/source.err"
}

# What README says: a port alone at one end, and a name at the other, whichever of its addresses comes first.
by_name() {
    local dest address status i
    cat >"$tmp/in_hosts" <<END
#!/bin/sh
printf '127.0.0.1 localhost\\n::1 localhost\\n' >"$tmp/hosts"
exec unshare -rm sh -c 'mount --bind "\$0" /etc/hosts && exec "\$@"' "$tmp/hosts" "$(realpath "$program")" "\$@"
END
    chmod +x "$tmp/in_hosts"
    local program=$tmp/in_hosts
    for i in '' 127.0.0.1; do
        listen=$i start_dest --run-after 100 || return 1
        address=localhost:${address##*:}
        source_to_dest && wait "$dest" && [ "$(json_field "$tmp/dest.json" verified)" = 1 ] ||
            { cat "$tmp/source.err" "$tmp/dest.err"; kill "$dest"; return 1; }
    done
    source_to_dest
    [ $? = 3 ] && grep -q 'connecting to \[::1\].*; connecting to 127.0.0.1' "$tmp/source.err" && ! grep -q handover "$tmp/source.err"
}

# A source that does not suit is let go, and the next one finds all as it was.
next_source() {
    local dest address status
    start_dest --set chunk-size=2M --run-after 100 --ram-max 64M || return 1
    source_to_dest --set chunk-size=4M
    status=$?
    source_to_dest --set chunk-size=2M --ram 66M
    status+=" $?"
    [ "$status" = '3 3' ] && grep -q 'must be 16M to --ram-max, 64M' "$tmp/source.err" &&
        source_to_dest --set chunk-size=2M && wait "$dest" && grep -q 'let go.*chunk-size' "$tmp/dest.err" &&
        grep -q 'let go.*--ram-max' "$tmp/dest.err" &&
        [ "$(json_field "$tmp/dest.json" verified)" = 1 ] || { cat "$tmp/source.err" "$tmp/dest.err"; return 1; }
}

# The destination cannot make a guest of the state: it refuses to take it, the source hears why, and its guest runs on.
cannot_be_made() {
    local dest address status
    start_dest --guest kvm || return 1
    source_to_dest
    status=$?
    wait "$dest"
    status+=" $?"
    [ "$status" = '3 3' ] || { echo "exit statuses $status, wanted 3 3"; cat "$tmp/source.err" "$tmp/dest.err"; return 1; }
    [[ $(json_field "$tmp/source.json" error) == *'refused'*'--guest here says kvm'* ]] &&
        [ "$(json_field "$tmp/source.json" outcome)" = 'failed, guest runs on' ] &&
        [ "$(json_field "$tmp/source.json" verified)" != 0 ] || { cat "$tmp/source.json"; return 1; }
}

both() { # GUEST
    check "a $1 guest migrates while it runs" demo "$1"
    check "a $1 guest that is hardly throttled migrates" demo "$1" --dirty-rate 400M --downtime 100
    check "a $1 guest migrates in chunks of 16 MiB, pinned whole" demo "$1" --set chunk-size=16M --set pin-all=on
    check "a $1 guest that is not throttled at all migrates" demo "$1" --dirty-rate 0 --downtime 0 --max-rounds 8
    check "a page lost of a $1 guest is noticed" sabotage_is_noticed "$1"
}

# >>snapshot files

ram=67108864

# live STATUS TEXT COMMAND...: the program ends so, and says that; its report is in $tmp/live.json.
live() {
    local wanted=$1 text=$2 status=0
    shift 2
    rm -f "$tmp/live.json"
    timeout -k 5 600 "$program" "$@" --json "$tmp/live.json" >"$tmp/out" 2>&1 || status=$?
    [ "$status" = "$wanted" ] || { echo "exit status $status, wanted $wanted: $*"; cat "$tmp/out"; return 1; }
    grep -qF -- "$text" "$tmp/out" || { echo "wanted \"$text\": $*"; cat "$tmp/out"; return 1; }
}

field() { json_field "$tmp/live.json" "$1"; }

field_is() { # NAME VALUE
    [ "$(field "$1")" = "$2" ] || { echo "$1 is not $2:"; cat "$tmp/live.json"; return 1; }
}

above_zero() { # NAME...
    local name
    for name in "$@"; do
        [ "$(field "$name")" -gt 0 ] || { echo "$name is not above 0:"; cat "$tmp/live.json"; return 1; }
    done
}

# The page region is RAM from 1 MiB on, and the device state is behind it.
length_is_bounded() { # FILE
    local length
    length=$(stat -c %s "$1")
    [ "$length" -ge "$ram" ] && [ "$length" -le $((ram + 1048576 + ram / 4096 / 8 + 16384)) ] || {
        echo "$length bytes"
        return 1
    }
}

saves() { # GUEST OPTION...
    local guest=$1
    shift
    live 0 'is whole' save "$tmp/$guest.snap" --guest "$guest" --ram 64M --run-before 100 --run-after 100 "$@" &&
        field_is outcome saved && field_is verified 1 && field_is guest "$guest" && field_is ram_bytes "$ram" &&
        field_is file_bytes "$(stat -c %s "$tmp/$guest.snap")" && [ ! -e "$tmp/$guest.snap.part" ] &&
        above_zero rounds total_ns downtime_ns bytes_written && length_is_bounded "$tmp/$guest.snap" &&
        timeout 600 "$mapped_ram" verify "$tmp/$guest.snap"
}

loads() { # GUEST OPTION...
    local guest=$1 is_lazy=0
    shift
    [[ " $* " == *' --lazy '* ]] && is_lazy=1
    live 0 'right' load "$tmp/$guest.snap" --run-after 100 "$@" && field_is outcome loaded && field_is verified 1 &&
        field_is guest "$guest" && field_is lazy "$is_lazy" && field_is ram_bytes "$ram" &&
        above_zero first_step_ns loaded_ns steps_at_stop &&
        [ "$(field steps_at_end)" -gt "$(field steps_at_stop)" ] || {
        cat "$tmp/live.json"
        return 1
    }
}

# By a link, into the file that is there.
in_place() { # GUEST
    local inode
    cp "$tmp/$1.snap" "$tmp/place" && ln -sf place "$tmp/place.link" && inode=$(stat -c %i "$tmp/place") &&
        live 0 'is whole' save "$tmp/place.link" --in-place --guest "$1" --ram 16M --run-before 0 --run-after 0 &&
        [ "$(stat -c %i "$tmp/place")" = "$inode" ] && [ -L "$tmp/place.link" ] && timeout 600 "$mapped_ram" verify "$tmp/place" &&
        live 0 'right' load "$tmp/place" --run-after 0 && [ "$(field ram_bytes)" = 16777216 ] || return 1
    live 3 'not done within the --timeout' save "$tmp/place" --in-place --guest "$1" --ram 64M --run-before 0 --run-after 0 \
        --timeout 1 && field_is verified 1 && live 3 'did not finish' load "$tmp/place" &&
        live 3 'what is written in place must be there' save "$tmp/nowhere" --in-place --guest "$1" --ram 16M --run-after 0
}

# The other way to say it.
as_local() { # GUEST
    live 0 'is whole' local --save "$tmp/local.snap" --no-sync --guest "$1" --ram 64M --run-before 0 --run-after 0 &&
        live 0 'right' local --load "$tmp/local.snap" --run-after 100 && field_is verified 1
}

# Of a guest that is never done; a moment without a write ends it early, so more than one try.
twenty_rounds() { # GUEST
    local try direct=(--direct)
    timeout 600 "$program" save "$tmp/d.snap" --ram 16M --run-before 0 --run-after 0 --direct >/dev/null 2>&1 || direct=()
    for try in 1 2 3 4 5; do
        saves "$1" --working-set 32M --fill 16M --dirty-rate 0 --downtime 0 --max-rounds 20 "${direct[@]}" || return 1
        loads "$1" && loads "$1" "${lazy[@]}" --threads 2 || return 1
        [ "$(field rounds)" = 20 ] && return
    done
    echo "no 20 rounds in $try tries"
    return 1
}

lost_page_in_file() { # GUEST
    live 0 'is not sent' save "$tmp/lost.snap" --sabotage lose-page --guest "$1" --ram 64M --run-before 200 \
        --run-after 100 &&
        live 1 'WRONG' load "$tmp/lost.snap" --run-after 100 && field_is verified 0
}

# An older file stays, nothing else is left, and the guest runs on.
snapshot_fails() { # GUEST TEXT OPTION...
    local guest=$1 text=$2
    shift 2
    echo old >"$tmp/old"
    live 3 "$text" save "$tmp/old" --guest "$guest" --ram 64M --run-before 100 --run-after 100 "$@" &&
        field_is outcome 'failed, guest runs on' && field_is verified 1 && [ "$(cat "$tmp/old")" = old ] &&
        [ ! -e "$tmp/old.part" ]
}

signal_while_saving() { # GUEST SIGNAL
    local i status saver
    echo old >"$tmp/old"
    "$program" save "$tmp/old" --guest "$1" --ram 256M --dirty-rate 0 --run-before 0 --run-after 100 \
        --json "$tmp/live.json" >"$tmp/out" 2>&1 &
    saver=$!
    for ((i = 0; i < 2000; i++)); do
        [ -e "$tmp/old.part" ] && break
        sleep 0.005
    done
    kill "-$2" "$saver"
    wait "$saver"
    status=$?
    if [ "$status" = 0 ]; then # it was faster
        timeout 600 "$mapped_ram" verify "$tmp/old"
        return
    fi
    [ "$status" = 3 ] && grep -q 'cancelled by a signal' "$tmp/out" && field_is verified 1 &&
        [ "$(cat "$tmp/old")" = old ] && [ ! -e "$tmp/old.part" ] || {
        echo "exit status $status"
        cat "$tmp/out"
        return 1
    }
}

# Whenever the file is cut, loading says so or was done before; nothing crashes.
cut_while_loading() { # GUEST
    local i delay status
    for delay in 0.001 0.02 0.04; do
        cp "$tmp/$1.snap" "$tmp/cut"
        "$program" load "$tmp/cut" "${lazy[@]}" --run-after 200 >"$tmp/out" 2>&1 &
        for ((i = 0; i < 2000; i++)); do
            [ -n "$(find "/proc/$!/fd" -lname "$tmp/cut" 2>/dev/null)" ] && break
            [ -d "/proc/$!/fd" ] || break
        done
        sleep "$delay"
        truncate -s 8M "$tmp/cut"
        wait $!
        status=$?
        [ "$status" = 0 ] || { [ "$status" = 3 ] && grep -qE 'cut|changed' "$tmp/out"; } || {
            echo "exit status $status"
            cat "$tmp/out"
            return 1
        }
    done
}

not_in_time() { # GUEST
    live 3 'not loaded within the --timeout of 1.0 ms' load "$tmp/$1.snap" --timeout 1 && field_is outcome failed &&
        live 3 'not loaded within the --timeout of 1.0 ms' load "$tmp/$1.snap" "${lazy[@]}" --timeout 1
}

torn() { # GUEST
    local half=$(($(stat -c %s "$tmp/$1.snap") / 2))
    head -c "$half" "$tmp/$1.snap" >"$tmp/torn"
    live 3 'it is cut off, or was not finished' load "$tmp/torn" && field_is guest undefined || return 1
    { head -c 8 /dev/zero; tail -c +9 "$tmp/$1.snap"; } >"$tmp/torn"
    live 3 "$tmp/torn: " load "$tmp/torn" "${lazy[@]}" && live 3 'No such file' load "$tmp/none" &&
        live 3 'is a directory' load "$tmp"
}

# A snapshot with one block of 16 MiB and a device state of other contents.
make_foreign() { # MACHINE BLOCK FILE
    rm -rf "$tmp/foreign" && mkdir -p "$tmp/foreign/ram"
    truncate -s 16M "$tmp/foreign/ram/$2"
    printf '\4state \0\6\0\0\0\16{"devices":[]}' >"$tmp/foreign/state"
    cat >"$tmp/foreign/machine.json" <<END
{"format": "rmig-qemu", "version": 1, "machine": "$1", "page_bits": null, "capabilities": [], "uuid": null,
 "section_id": 7, "blocks": [{"name": "$2", "file": "ram/$2", "length": 16777216}],
 "state": {"file": "state", "length": 27}}
END
    timeout 600 "$mapped_ram" save --quiet "$tmp/foreign" "$3"
}

foreign() {
    make_foreign pc-q35-10.0 pc.ram "$tmp/foreign.snap" &&
        live 3 'a snapshot of a machine "pc-q35-10.0"' load "$tmp/foreign.snap" &&
        make_foreign kvm-live pc.ram "$tmp/foreign.snap" && live 3 '"pc.ram"' load "$tmp/foreign.snap" &&
        make_foreign kvm-live kvm-live.ram "$tmp/foreign.snap" &&
        live 3 "device state is not this program's" load "$tmp/foreign.snap" && field_is guest undefined
}

too_much_ram() { # GUEST
    live 3 'RAM is 64M: must be at most --ram-max, 32M' load "$tmp/$1.snap" --ram-max 32M
}

other_kind() { live 3 'is a thread guest, --guest here says kvm' load "$tmp/thread.snap" --guest kvm; }

# On a file system of 8 MiB.
no_space() {
    cat >"$tmp/full.sh" <<'END'
mount -t tmpfs -o size=8M none "$1/full" && echo old >"$1/full/s" || exit 90
timeout 600 "$2" save "$1/full/s" --guest thread --ram 64M --run-before 100 --run-after 100 --json "$1/live.json"
status=$?
[ "$(cat "$1/full/s")" = old ] && [ ! -e "$1/full/s.part" ] || exit 91
exit $status
END
    local status=0
    mkdir -p "$tmp/full"
    unshare -m sh "$tmp/full.sh" "$tmp" "$program" >"$tmp/out" 2>&1 || status=$?
    [ "$status" = 3 ] && grep -q 'No space left on device' "$tmp/out" && field_is verified 1 || {
        echo "exit status $status"
        cat "$tmp/out"
        return 1
    }
}

usage() {
    live 2 'save needs a FILE' save && live 2 'load needs a FILE' load &&
        live 2 'only one of them' local --save a --load b && live 2 'one word too many' save a b &&
        live 2 'belongs to load' save a --lazy && live 2 'belongs to save' load a --in-place && live 2 'belong to local' demo --save a &&
        live 2 'from 1 to 64' save a --threads 65
}

snapshots() { # GUEST
    check "a $1 guest is saved while it runs" saves "$1"
    check "and loaded" loads "$1"
    if [ ${#lazy[@]} = 1 ]; then
        check "and loaded while it runs" loads "$1" --lazy
        check "the file of a $1 guest is cut while it is loaded" cut_while_loading "$1"
    else
        skip 'and loaded while it runs' 'userfaultfd is not for everyone here'
    fi
    check "a $1 guest by way of local" as_local "$1"
    check "20 rounds of a $1 guest: the file does not grow" twenty_rounds "$1"
    check "a page of a $1 guest that is lost in a file is noticed" lost_page_in_file "$1"
    check "a $1 guest runs on when there is no time for its snapshot" snapshot_fails "$1" 'not done within the --timeout' \
        --timeout 1
    check "a $1 guest runs on when it does not converge" snapshot_fails "$1" 'no convergence' \
        --dirty-rate 0 --working-set 32M --fill 0 --downtime 0 --max-rounds 2 --strict
    check "a $1 guest runs on when a signal ends its snapshot" signal_while_saving "$1" INT
    check "a $1 guest runs on when its terminal is closed" signal_while_saving "$1" HUP
    check "a $1 guest runs on when an alarm ends its snapshot" signal_while_saving "$1" ALRM
    check "a $1 guest is saved in place" in_place "$1"
    check "a $1 guest that is not loaded in time" not_in_time "$1"
}

lazy=()
if [ "$(id -u)" = 0 ] || [ "$(cat /proc/sys/vm/unprivileged_userfaultfd)" = 1 ]; then
    lazy=(--lazy)
fi
if [ -r /dev/kvm ] && [ -w /dev/kvm ]; then
    both kvm
    snapshots kvm
else
    skip 'a kvm guest migrates while it runs' '/dev/kvm cannot be used here'
fi
both thread
snapshots thread
check 'a source that does not suit, and the next one' next_source
check 'a demo is ended' demo_is_told TERM
check 'a demo is ended by an alarm' demo_is_told ALRM
if unshare -rm true 2>/dev/null; then
    check 'a port alone, and a name with several addresses' by_name
else
    skip 'a port alone, and a name with several addresses' 'no process can have an /etc/hosts of its own here'
fi
check 'a guest that cannot be made at the destination runs on' cannot_be_made
check 'a torn file is refused' torn thread
check "another program's file is refused" foreign
check 'more RAM than allowed is refused' too_much_ram thread
check 'another kind of guest is refused' other_kind
if unshare -m true 2>/dev/null; then
    check 'a guest runs on when there is no space for its snapshot' no_space
else
    skip 'a guest runs on when there is no space for its snapshot' 'no small file system can be mounted here'
fi
check 'wrong usage of snapshot files' usage
done_testing
