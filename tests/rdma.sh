#!/usr/bin/env bash
# rdma.sh BUILD rxe|siw|here GROUP...: rmig over RDMA devices, with the programs of BUILD. Reports as TAP.
#
# rxe (RoCE), siw (iWARP): software devices in a small virtual machine, which tests/vm makes in BUILD; one is started
# for all groups named. Where that cannot be, they are skipped and say why; with CI=true that is a failure.
# here: this host's adapter RMIG_TEST_DEVICE, at its address RMIG_TEST_ADDR and, if it has one, RMIG_TEST_ADDR6.
#
# GROUP:
#   conformance   the contract of struct rmig_fabric_ops over verbs
#   ofi           the same over libfabric's verbs provider, and the examples over that
#   session       what the device holds after a session, and memory behind a dma-buf
#   hostile       peers that break the protocol; in the machine, where all would take minutes, only what depends on the
#                 fabric: how they come, leave, fall silent and write
#   migrate       the examples as processes; either end killed
#   limits        ends that may lock too little memory (rxe, siw)
#   link          a link that loses packets, or all of them, and goes down: must be the last (rxe, siw)
# After each test the devices must hold no more queue pairs, regions and connections than before.
# shellcheck disable=SC2016,SC2034,SC2317 # evaluated later; used by name; called by check
set -u
cd "$(dirname "$0")/.." || exit 1
# shellcheck source=tests/tap.sh
. tests/tap.sh
# shellcheck source=tests/vm_tap.sh
. tests/vm_tap.sh

usage() {
    sed -n '2s/^# \([^:]*\):.*/usage: \1/p' "$0" >&2
    exit 2
}

inside=
[ "${1:-}" != --inside ] || { inside=yes && shift; }
[ $# -ge 3 ] || usage
build=$1
device=$2
shift 2
for group; do
    case $group:$device in
    conformance:* | ofi:* | session:* | hostile:* | migrate:* | limits:rxe | limits:siw | link:rxe | link:siw) ;;
    *) usage ;;
    esac
done
case $device in rxe | siw | here) ;; *) usage ;; esac

# >>outside

if [ -z "$inside" ] && [ "$device" != here ]; then
    vm_options=(--memory 1024 --timeout 1800)
    [ "${*: -1}" != link ] || vm_options+=(--wire)
    [ "$device" != rxe ] || vm_options+=(--no-siw)
    in_machine "$* over $device" "$build" vm tests/rdma.sh --inside "$build" "$device" "$@"
fi

# >>inside

if [ "$device" = rxe ]; then
    export RMIG_TEST_DEVICE=$RXE_DEV RMIG_TEST_ADDR=$RXE_ADDR RMIG_TEST_ADDR6=$RXE_ADDR6
    wire_address=${RXE_WIRE_ADDR:-} wire_ends=("$RXE_NET" "$RXE_PEER_NET")
elif [ "$device" = siw ]; then
    export RMIG_TEST_DEVICE=$SIW_DEV RMIG_TEST_ADDR=$SIW_ADDR RMIG_TEST_ADDR6=$SIW_ADDR6
    wire_address=${SIW_WIRE_ADDR:-} wire_ends=("$SIW_NET" "$SIW_PEER_NET")
elif [ -z "${RMIG_TEST_DEVICE:-}" ] || [ -z "${RMIG_TEST_ADDR:-}" ]; then
    echo "rdma.sh: RMIG_TEST_DEVICE and RMIG_TEST_ADDR must name an RDMA device of this host and its address" >&2
    exit 2
fi
export tmp
tmp=$(mktemp -d /dev/shm/rmig-rdma.XXXXXX) || exit 1 # not a disk's file system: some let nobody pin their pages
trap 'rm -rf "$tmp"' EXIT
chmod 755 "$tmp"
out=$tmp/out
image=$tmp/image
program=$build/rmig_migrate
fabric=(--fabric verbs --provider "$RMIG_TEST_DEVICE")
send_as=() recv_as=() # what runs the program at that end

# What all devices hold, a device a line.
held() { rdma resource show; }
same_held() { [ -s "$tmp/held" ] && held | cmp -s - "$tmp/held"; }

# The test, and afterwards the devices hold what they held before. A connection that was cut takes its time.
check_held() { # NAME COMMAND...
    local name=$1
    shift
    check "$name" leaves_nothing "$@"
}

leaves_nothing() {
    local status
    held >"$tmp/held" || return 1
    "$@"
    status=$?
    wait_for 60 same_held && return "$status"
    echo "before:"
    cat "$tmp/held"
    echo "after:"
    held
    rdma resource show cm_id
    rdma resource show qp
    return 1
}

# >>criterion

# Runs a suite built with tests/arch; its tests become tests of ours, but for those that are not for this fabric.
criterion() { # SECONDS PROGRAM OPTION...
    local status before=$tap_count
    held >"$tmp/held"
    timeout -k 5 "$1" "${@:2}" >"$tmp/tap" 2>"$tmp/log"
    status=$?
    relay '' "$(cat "$tmp/tap")" ran
    check "${2##*/} ends well" program_ended "$status" $((tap_count - before))
    check "${2##*/} leaves nothing on the device" wait_for 60 same_held
}

program_ended() { # STATUS TESTS
    [ "$1" = 0 ] && [ "$2" -gt 0 ] && return
    echo "exit status $1 after $2 tests"
    tail -n 40 "$tmp/log"
    return 1
}

# >>migrations

# 66 MiB and a bit: more than one chunk of 64 MiB; what is not random is zero.
make_image() { # FILE MIB-OF-DATA
    truncate -s $((66 * 1048576 + 4099)) "$1"
    dd if=/dev/urandom of="$1" bs=1M count="$2" conv=notrunc status=none
    dd if=/dev/urandom of="$1" bs=1M count=1 seek=63 conv=notrunc status=none
    head -c 3 /dev/urandom >>"$1"
    chmod 666 "$1"
}

migrate() { # send|recv OPTION...
    local -n as=$1_as
    exec timeout -k 5 600 ${as[@]+"${as[@]}"} "$program" "$@"
}

# Starts a receiver into $out (made empty); sets receiver and address.
start_receiver() { # HOST OPTION...
    local host=$1
    shift
    rm -rf "$out"
    mkdir -p "$out"
    chmod 777 "$out"
    : >"$tmp/recv.out"
    : >"$tmp/send.err"
    migrate recv --listen "$host:0" --out "$out" "${fabric[@]}" "$@" >"$tmp/recv.out" 2>"$tmp/recv.err" &
    receiver=$!
    wait_for 20 'grep -q listening "$tmp/recv.out" || ! kill -0 $receiver 2>/dev/null'
    address=$(sed -n 's/^listening on //p' "$tmp/recv.out")
    [ -n "$address" ] && return
    cat "$tmp/recv.err"
    return 1
}

start_sender() { # OPTION...
    migrate send --connect "$address" --block "ram=$image" "${fabric[@]}" "$@" >"$tmp/send.out" 2>"$tmp/send.err" &
    sender=$!
}

# Both ends have ended, with these statuses.
ended() { # SENDER RECEIVER
    local sent received
    wait "$sender"
    sent=$?
    wait "$receiver"
    received=$?
    [ "$sent $received" = "$1 $2" ] && return
    echo "send ended with $sent, recv with $received; wanted $1 and $2"
    cat "$tmp/send.err" "$tmp/recv.err"
    return 1
}

moves() { # HOST OPTION...: given to the sender
    start_receiver "$1" --set io-timeout=60s && start_sender "${@:2}" && ended 0 0 && cmp "$image" "$out/ram"
}

says() { # FILE WORD...: all words are in it
    local file=$1 word
    shift
    for word in "$@"; do
        grep -qiF -- "$word" "$file" || { echo "\"$word\" is not said:"; cat "$file"; return 1; }
    done
}

nothing_left() {
    [ -z "$(ls -A "$out")" ] || { echo "left behind:"; ls -lA "$out"; return 1; }
}

# kvm_live checks each byte of the guest's memory and tells by its exit status.
guest_moves() { # OPTION...
    timeout -k 5 600 "$build/kvm_live" demo --listen "$RMIG_TEST_ADDR:0" "${fabric[@]}" --guest thread --ram 64M \
        --fill 16M --working-set 4M --dirty-rate 20M --downtime 300ms --run-before 200ms --run-after 200ms \
        --json "$tmp/demo.json" "$@" || { echo "exit status $?"; return 1; }
    perl -MJSON::PP -e 'local $/; my $j = decode_json(<STDIN>); exit($j->{verified} && $j->{rounds} > 1 ? 0 : 1)' \
        <"$tmp/demo.json" || { cat "$tmp/demo.json"; return 1; }
}

# >>ends that are lost

# A migration slow enough to be hit in the middle of its first round, 13 MiB long; returns when some of it has arrived.
start_slow() { # HOST IO-TIMEOUT
    start_receiver "$1" --set io-timeout="$2" || return 1
    start_sender --set io-timeout="$2" --set max-bandwidth=512K
    wait_for 30 'arrived 2 || ! kill -0 $sender 2>/dev/null' || return 1
    kill -0 "$sender" 2>/dev/null && return
    cat "$tmp/send.err" "$tmp/recv.err"
    return 1
}

# The MIB-th MiB of the image begins in the receiver's file as it does in the image.
arrived() { cmp -s -n 4096 -i $(($1 * 1048576)) "$image" "$out/ram.part"; }

now_ms() { echo $((${EPOCHREALTIME/./} / 1000)); }

# An end that has lost the other says so within so many milliseconds from the one that $from holds.
gives_up() { # FILE MS
    wait_for 10 "[ -s '$1' ]" || return 1
    local took=$(($(now_ms) - from))
    [ "$took" -le "$2" ] && return
    echo "${1##*/} came after $took ms, $2 allowed:"
    cat "$1"
    return 1
}

# The program itself, below `timeout`.
below() { pgrep -P "$1" | head -n 1; }

kill_one() { # sender|receiver
    local from victim=${!1} other=recv
    [ "$1" = sender ] || other=send
    kill -KILL "$(below "$victim")"
    from=$(now_ms)
    gives_up "$tmp/$other.err" 60000
    local late=$?
    if [ "$1" = sender ]; then
        ended 137 5 && says "$tmp/recv.err" source && nothing_left
    else
        ended 5 137 && says "$tmp/send.err" sink && [ ! -e "$out/ram" ]
    fi && [ "$late" = 0 ]
}

killed() { # sender|receiver
    start_slow "$RMIG_TEST_ADDR" 20s && kill_one "$1"
}

# >>devices that are removed

# One more of the kind that is tested: gone0, at 10.99.0.1.
add_device() {
    ip link add gone type dummy && ip address add 10.99.0.1/24 dev gone && ip link set gone up &&
        rdma link add gone0 type "$device" netdev gone && wait_for 20 'rdma link show gone0/1 2>/dev/null | grep -q ACTIVE'
}

# A receiver that listens on a name, which has that device's address and others, when that device is removed. The kernel
# lets the device go when the last program that has opened it has ended; meanwhile nobody can connect to it.
listens_when_removed() { # ADDRESS...
    local recv_as
    { cat /etc/hosts && printf '%s several\n' 10.99.0.1 "$@"; } >"$tmp/hosts"
    recv_as=(unshare -m sh -c 'mount --bind "$0" /etc/hosts && exec "$@"' "$tmp/hosts")
    add_device && start_receiver several || return 1
    rdma link delete gone0 &
    deleting=$!
    wait_for 20 '! rdma resource show cm_id | grep -q 10.99.0.1' || return 1
}

goes_on_with_the_others() {
    listens_when_removed "$RMIG_TEST_ADDR" && address=$RMIG_TEST_ADDR:${address##*:} && start_sender && ended 0 0 &&
        cmp "$image" "$out/ram"
}

ends_with_the_last() { # WORD...
    listens_when_removed || return 1
    wait "$receiver"
    [ $? = 5 ] && says "$tmp/recv.err" "$@"
}

removed() { # COMMAND...
    local status deleting=
    "$@"
    status=$?
    kill "$receiver" 2>/dev/null
    wait "$receiver"
    [ -z "$deleting" ] || wait "$deleting" || status=1
    ip link delete gone || status=1
    return "$status"
}

# >>memory that may not be locked

# What runs a program as nobody, who may lock so much memory.
as_user() { # KIB
    user=(setpriv --reuid=65534 --regid=65534 --clear-groups -- bash -c 'ulimit -l "$0" && exec "$@"' "$1")
}

# The source is refused by its own host, before it speaks to the sink, which then waits on until it is told to go.
source_refused() { # NEEDED ALLOWED OPTION...
    local needed=$1 allowed=$2
    start_receiver "$RMIG_TEST_ADDR" && start_sender "${@:3}" || return 1
    wait_for 60 '! kill -0 $sender 2>/dev/null || ! kill -0 $receiver 2>/dev/null'
    kill -INT "$(below "$receiver")"
    ended 4 7 && says "$tmp/send.err" "$needed must be locked" "RLIMIT_MEMLOCK allows $allowed" 'ulimit -l' \
        CAP_IPC_LOCK && nothing_left
}

# The sink is refused by its host and tells the source why.
sink_refused() { # NEEDED ALLOWED OPTION...
    start_receiver "$RMIG_TEST_ADDR" && start_sender "${@:3}" && ended 5 5 &&
        says "$tmp/recv.err" "$1 must be locked" "RLIMIT_MEMLOCK allows $2" 'ulimit -l' CAP_IPC_LOCK &&
        says "$tmp/send.err" "$1 must be locked" "RLIMIT_MEMLOCK allows $2" && nothing_left
}

# What the sink is sure to need may be locked, what it comes to need may not.
sink_fails_midway() { # ALLOWED
    start_receiver "$RMIG_TEST_ADDR" && start_sender && ended 5 5 &&
        says "$tmp/recv.err" 'block "ram"' 'cannot be registered' "RLIMIT_MEMLOCK is $1" 'ulimit -l' CAP_IPC_LOCK &&
        says "$tmp/send.err" 'cannot be registered' "RLIMIT_MEMLOCK is $1" && nothing_left
}

# >>a link that fails

netem() { # tc's words, e.g. loss 1%
    local end
    for end in "${wire_ends[@]}"; do
        tc qdisc replace dev "$end" root netem "$@" || return 1
    done
}

mend() {
    local end
    for end in "${wire_ends[@]}"; do
        tc qdisc del dev "$end" root
    done
}

dropped() { # packets, by both ends
    tc -s qdisc show | sed -n 's/.*(dropped \([0-9]*\),.*/\1/p' | awk '{ n += $1 } END { print n + 0 }'
}

# rxe waits seconds when the last packet of many is lost, or its acknowledgement; hence the io-timeout.
crosses_a_bad_link() { # LOSS OPTION...
    local lost status
    netem loss "$1" limit 100000 || return 1
    moves "$wire_address" --set io-timeout=60s "${@:2}"
    status=$?
    lost=$(dropped)
    mend
    echo "$lost packets were lost"
    [ "$status" = 0 ] && [ "$lost" -gt 0 ]
}

# Both ends give up in time, and say what they waited for.
broken_by() { # COMMAND...: what it does to the link
    local from late=0
    start_slow "$wire_address" 20s || return 1
    "$@" || return 1
    from=$(now_ms)
    gives_up "$tmp/send.err" 60000 || late=1
    gives_up "$tmp/recv.err" 60000 || late=1
    ended 5 5 && says "$tmp/send.err" sink && says "$tmp/recv.err" source && nothing_left && [ "$late" = 0 ]
}

loses_all() {
    broken_by netem loss 100%
    local status=$?
    mend
    return "$status"
}

# >>groups

group_conformance() {
    # Where a connection is cut, the kernel's siw waits for ten seconds: side by side these cost nothing.
    local jobs=1
    [ "$device" != siw ] || jobs=8
    RMIG_TEST_FABRIC=verbs criterion 1500 "$build/devices/fabric_conformance" --jobs "$jobs" --filter 'fabric/*'
}

group_ofi() {
    local fabric
    RMIG_TEST_FABRIC='ofi, verbs' criterion 1500 "$build/devices/fabric_conformance" --jobs 1 --filter 'fabric/*'
    fabric=(--fabric ofi --provider verbs)
    check_held 'rmig_migrate over libfabric' moves "$RMIG_TEST_ADDR"
    check_held 'rmig_migrate over libfabric, pinned whole' moves "$RMIG_TEST_ADDR" --set pin-all=on
    check_held 'kvm_live over libfabric' guest_moves
    [ "$device" = here ] || removals 'No such device'
}

removals() { # WORD...: what is said when no device is left
    local fabric=(--fabric "${fabric[1]}")
    [ "${fabric[1]}" = verbs ] || fabric+=(--provider verbs)
    check_held 'one of the devices that are listened on is removed' removed goes_on_with_the_others
    check_held 'the last device that is listened on is removed' removed ends_with_the_last "$@"
}

group_session() { criterion 1500 "$build/devices/rdma" --jobs 1; }

group_hostile() {
    local filter='*/*'
    [ "$device" = here ] ||
        filter='@(honest_source/@(asks|dynamic|whole|unregister)*|hostile_*/@(private|leaves|vanishes|silent|whoever|write)*)'
    RMIG_HOSTILE_FABRIC=verbs RMIG_HOSTILE_ADDR="$RMIG_TEST_ADDR:0" \
        criterion 1500 "$build/devices/hostile_peer" --jobs 4 --filter "$filter"
}

group_migrate() {
    local chunk pin
    for chunk in 1M 64M; do
        for pin in off on; do
            check_held "IPv4, chunks of $chunk, pin-all $pin" \
                moves "$RMIG_TEST_ADDR" --set "chunk-size=$chunk" --set "pin-all=$pin"
            if [ -n "${RMIG_TEST_ADDR6:-}" ]; then
                check_held "IPv6, chunks of $chunk, pin-all $pin" \
                    moves "[$RMIG_TEST_ADDR6]" --set "chunk-size=$chunk" --set "pin-all=$pin"
            else
                skip "IPv6, chunks of $chunk, pin-all $pin" 'RMIG_TEST_ADDR6 is not set'
            fi
        done
    done
    check_held 'protocol version 1 without the extension' moves "$RMIG_TEST_ADDR" --set extension=off
    check_held 'a guest that runs' guest_moves
    check_held 'a guest that runs, pinned whole' guest_moves --set pin-all=on
    check_held 'the sender is killed' killed sender
    check_held 'the receiver is killed' killed receiver
    [ "$device" = here ] || removals 'the RDMA device was removed'
}

group_limits() {
    local program=$program send_as recv_as user all="$((66 * 1048576 + 4102)) bytes"
    cp "$program" "$tmp/rmig_migrate" # the user need not be let into this folder
    program=$tmp/rmig_migrate
    as_user 16384
    send_as=("${user[@]}")
    check_held 'an ordinary source, pinned whole' source_refused "$all" 16M --set pin-all=on
    check_held 'an ordinary source, on demand' source_refused "$all" 16M
    send_as=() recv_as=("${user[@]}")
    check_held 'an ordinary sink, pinned whole' sink_refused "$all" 16M --set pin-all=on
    check_held 'an ordinary sink, on demand' sink_fails_midway 16M
    as_user 262144
    send_as=("${user[@]}") recv_as=("${user[@]}")
    check_held 'ordinary ends that may lock enough' moves "$RMIG_TEST_ADDR"
    check_held 'ordinary ends that may lock enough, pinned whole' moves "$RMIG_TEST_ADDR" --set pin-all=on
    send_as=() recv_as=()
    if [ "$device" = siw ]; then # which counts what root locks
        ulimit -S -l 16384
        check_held 'root, pinned whole' source_refused "$all" 16M --set pin-all=on
        ulimit -S -l unlimited
    fi
}

group_link() {
    local fabric=(--fabric verbs) # each end has the device of its address
    # Pinned whole, all is written, also what is zero: five times the packets.
    if [ "$device" = rxe ]; then
        check_held '0.3% of the packets are lost' crosses_a_bad_link 0.3%
        check_held '0.1% of the packets are lost, pinned whole' crosses_a_bad_link 0.1% --set pin-all=on
    else
        check_held '5% of the packets are lost' crosses_a_bad_link 5%
        check_held '2% of the packets are lost, pinned whole' crosses_a_bad_link 2% --set pin-all=on
    fi
    check_held 'all packets are lost' loses_all
    check_held 'the link goes down' broken_by ip link set "${wire_ends[0]}" down
}

make_image "$image" 12
for group; do
    "group_$group"
done
done_testing
