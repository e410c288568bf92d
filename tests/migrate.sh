#!/usr/bin/env bash
# migrate.sh PROGRAM: rmig_migrate between two processes on the loopback device: images, parameters, protocols, and
# what either end says when the other one dies, lies, or is told nonsense.
set -u
cd "$(dirname "$0")/.." || exit 1
. tests/tap.sh
program=$1
export tmp
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT

# >>tools

rmig() { timeout -k 5 600 "$program" "$@"; }

under=() # what the receiver is run by

# Starts a receiver into $out (made empty); sets receiver and address. Its words go to recv.out and recv.err.
start_recv() { # HOST OPTION...
    local host=$1
    shift
    rm -rf "$out"
    mkdir -p "$out"
    : >"$tmp/recv.out"
    timeout -k 5 600 "${under[@]}" "$program" recv --listen "$host:0" --out "$out" "$@" >"$tmp/recv.out" 2>"$tmp/recv.err" &
    receiver=$!
    listens || return 1
    address=$(sed -n 's/^listening on //p; s/^{"listening":"\(.*\)"}$/\1/p' "$tmp/recv.out")
}

wait_for() { # CONDITION: at most 10 s
    local i
    for ((i = 0; i < 200 * slack; i++)); do
        eval "$1" && return 0
        sleep 0.05
    done
    echo "waited $((10 * slack)) s in vain for: $1"
    return 1
}

# The receiver has said where it listens, or has given up.
listens() {
    wait_for "grep -q listening $tmp/recv.out || ! kill -0 $receiver 2>/dev/null" &&
        grep -q listening "$tmp/recv.out" && return
    cat "$tmp/recv.err"
    return 1
}

# The real process under `timeout`, to be hit by signals.
real_pid() { pgrep -P "$1" | head -1; }

# both SEND-STATUS RECV-STATUS: runs send with the array `send` against a receiver with the array `recv`.
both() {
    local sent received
    start_recv "${host:-127.0.0.1}" "${recv[@]}" || return 1
    rmig send --connect "$address" "${send[@]}" >"$tmp/send.out" 2>"$tmp/send.err"
    sent=$?
    wait "$receiver"
    received=$?
    [ "$sent $received" = "$1 $2" ] && return 0
    echo "send ended with $sent, recv with $received; wanted $1 and $2"
    cat "$tmp/send.err" "$tmp/recv.err"
    return 1
}

same() { # FILE NAME-IN-OUT
    cmp "$1" "$out/$2"
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

# json FILE EXPRESSION: the last line of FILE as $j
json() {
    perl -MJSON::PP -e 'open my $in, "<", $ARGV[0] or die; my @l = <$in>; my $j = decode_json($l[-1]);
        exit(eval($ARGV[1]) ? 0 : 1)' "$1" "$2" || { echo "not so: $2"; cat "$1"; return 1; }
}

# >>images

make_images() {
    head -c 12345678 /dev/urandom >"$tmp/odd"
    head -c 1 /dev/urandom >"$tmp/byte"
    head -c 4096 /dev/urandom >"$tmp/page"
    head -c 33554432 /dev/urandom >"$tmp/big"
    head -c 100001 /dev/urandom >"$tmp/device"
    # 80 MiB + 3 bytes: holes, zeros and data, more than one chunk of 64 MiB
    truncate -s $((80 * 1048576 + 3)) "$tmp/holes"
    local at
    for at in 0 1 17 4096 16384 20479; do
        dd if=/dev/urandom of="$tmp/holes" bs=4096 seek=$at count=1 conv=notrunc status=none
    done
    dd if=/dev/zero of="$tmp/holes" bs=4096 seek=8000 count=500 conv=notrunc status=none
    head -c 3 /dev/urandom >>"$tmp/holes"
    : >"$tmp/empty"
}

# >>what is moved

one_block() {
    send=(--block "ram=$tmp/odd")
    recv=("$@")
    both 0 0 && same "$tmp/odd" ram && [ ! -e "$out/state" ]
}

one_block_with() { # OPTION...: given to the sender
    send=(--block "ram=$tmp/odd" --block "holes=$tmp/holes" "$@")
    recv=()
    both 0 0 && same "$tmp/odd" ram && same "$tmp/holes" holes
}

many_blocks() {
    local i
    send=()
    recv=(--block "block 7=$out.seven")
    rm -f "$out.seven"
    for ((i = 1; i <= 40; i++)); do
        head -c $((i * i * 4099)) "$tmp/big" | tail -c $((i * 2000 + i)) >"$tmp/block$i"
        send+=(--block "block $i=$tmp/block$i")
    done
    both 0 0 || return 1
    for ((i = 1; i <= 40; i++)); do
        [ $i = 7 ] || same "$tmp/block$i" "block%20$i" || return 1
    done
    cmp "$tmp/block7" "$out.seven"
}

sizes() {
    send=(--block "byte=$tmp/byte" --block "page=$tmp/page" --block "odd=$tmp/odd" --block "holes=$tmp/holes")
    recv=()
    both 0 0 && same "$tmp/byte" byte && same "$tmp/page" page && same "$tmp/odd" odd && same "$tmp/holes" holes
}

state_goes_along() {
    send=(--block "ram=$tmp/page" --state "$tmp/device")
    recv=()
    both 0 0 && same "$tmp/page" ram && same "$tmp/device" state || return 1
    recv=(--state "$tmp/given")
    rm -f "$tmp/given"
    both 0 0 && cmp "$tmp/device" "$tmp/given" && [ ! -e "$out/state" ]
}

rounds_repeat() {
    send=(--block "ram=$tmp/odd" --rounds 3 --json)
    recv=()
    both 0 0 && same "$tmp/odd" ram && json "$tmp/send.out" '$j->{stats}{rounds} == 3'
}

holes_stay() {
    send=(--block "holes=$tmp/holes")
    recv=(--sparse)
    both 0 0 && same "$tmp/holes" holes || return 1
    [ "$(du -k "$out/holes" | cut -f1)" -lt 8192 ] || { echo "81920 KiB with holes took $(du -k "$out/holes") KiB"; return 1; }
}

two_at_once() {
    local first first_address
    out=$tmp/out1
    start_recv 127.0.0.1 || return 1
    first=$receiver first_address=$address
    out=$tmp/out2
    start_recv 127.0.0.1 || return 1
    rmig send --connect "$first_address" --block "ram=$tmp/odd" --quiet &
    local sender=$!
    rmig send --connect "$address" --block "ram=$tmp/holes" --quiet && wait $sender && wait "$first" &&
        wait "$receiver" && cmp "$tmp/odd" "$tmp/out1/ram" && cmp "$tmp/holes" "$tmp/out2/ram"
}

over_ipv6() {
    local host='[::1]'
    one_block
}

plain_version_1() { # SEND-VALUE RECV-VALUE
    send=(--block "ram=$tmp/odd" --block "holes=$tmp/holes" --state "$tmp/device" --set "extension=$1" --json)
    recv=(--set "extension=$2")
    both 0 0 && same "$tmp/odd" ram && same "$tmp/holes" holes && same "$tmp/device" state &&
        json "$tmp/send.out" '!$j->{extension}'
}

plain_version_1_pinned() {
    send=(--block "ram=$tmp/odd" --set extension=off --set pin-all=on)
    recv=()
    both 0 0 && same "$tmp/odd" ram
}

the_source_chunk_size_holds() { # SOURCE
    send=(--block "holes=$tmp/holes" --block "ram=$tmp/odd" --set "chunk-size=$1")
    recv=(--trace)
    both 0 0 && same "$tmp/holes" holes && same "$tmp/odd" ram
}

# A sink that was told a chunk size does not take another one, and both ends say which two they are. It listens on.
chunk_sizes_differ() { # SOURCE SINK SOURCE-BYTES SINK-BYTES
    start_recv 127.0.0.1 --set "chunk-size=$2" --json || return 1
    refused 4 chunk-size "$3" "$4" -- send --connect "$address" --block "ram=$tmp/odd" --set "chunk-size=$1" || return 1
    wait_for "grep -q 'let go' $tmp/recv.err" && says "$tmp/recv.err" chunk-size "$3" "$4" && nothing_left &&
        says "$tmp/recv.out" '{"forgotten":"' || return 1
    rmig send --connect "$address" --block "ram=$tmp/odd" --set "chunk-size=$2" >"$tmp/send.out" 2>"$tmp/send.err" &&
        wait "$receiver" && same "$tmp/odd" ram && json "$tmp/recv.out" '$j->{ok} && @{$j->{blocks}} == 1'
}

# A source that is another program is refused, and the next one served.
a_stranger_comes_first() {
    start_recv 127.0.0.1 --json || return 1
    "$(dirname "$program")/kvm_live" source --connect "$address" --guest=thread --ram=16M >"$tmp/stranger" 2>&1 &&
        { echo 'the stranger got through'; cat "$tmp/stranger"; return 1; }
    wait_for "grep -q 'let go.*did not announce' $tmp/recv.err" || { cat "$tmp/recv.err" "$tmp/stranger"; return 1; }
    rmig send --connect "$address" --block "ram=$tmp/odd" >"$tmp/send.out" 2>"$tmp/send.err" && wait "$receiver" &&
        same "$tmp/odd" ram
}

# Whatever of the fabric does not get its descriptor, the receiver says so.
few_descriptors() {
    local n seen=0
    for n in 9 10 11 12 13 14 15; do
        under=(prlimit "--nofile=$n:$n")
        start_recv 127.0.0.1 --wait 30
        local rc=$?
        under=()
        if [ $rc = 0 ] && ! rmig send --connect "$address" --block "ram=$tmp/page" --set connect-timeout=2s >"$tmp/send.out" \
            2>"$tmp/send.err" && grep -q rejected "$tmp/send.err"; then
            wait_for "grep -q 'let go.*Too many open files' $tmp/recv.err" || { cat "$tmp/send.err" "$tmp/recv.err"; return 1; }
            seen=$((seen + 1))
        fi
        kill -INT "$(real_pid "$receiver")" 2>/dev/null
        wait "$receiver"
    done
    [ $seen -gt 0 ] || { echo "no number of descriptors let it listen and reject"; cat "$tmp/recv.err"; return 1; }
}

# >>parameters

# A value that is not the default, for each parameter there is.
declare -A value=(
    [chunk-size]=4M [merge-max]=1M [pin-all]=on [signal-every]=3 [write-depth]=8 [register-ahead]=0 [zero-detect]=off
    [max-bandwidth]=200M [connect-timeout]=7s [io-timeout]=9s [page-size]=16K [peer-chunk-size]=2M [extension]=off
    [handover-timeout]=20s [auto-take]=on
)

set_of_each() {
    local name names
    names=$(rmig --list-params | awk 'NR > 1 { print $1 }')
    for name in $names; do
        if [ -z "${value[$name]:-}" ]; then
            not_ok "--set $name" "the test has no value for the parameter $name"
            continue
        fi
        local set=(--set "$name=${value[$name]}")
        [ "$name" = signal-every ] || [ "$name" = write-depth ] && set+=(--set signal-every=3)
        check "--set $name=${value[$name]}" one_block_with "${set[@]}"
        check "--set $name=${value[$name]} is listed" listed "$name" "${value[$name]}"
    done
}

listed() {
    rmig --list-params --json --set "$1=$2" >"$tmp/params" || return 1
    NAME=$1 VALUE=$2 json "$tmp/params" 'grep { $_->{name} eq $ENV{NAME} && $_->{value} eq $ENV{VALUE} } @$j'
}

refused() { # STATUS WORDS... -- ARGUMENT...: exit status and what must be said
    local status=$1 words=() got
    shift
    while [ "$1" != -- ]; do
        words+=("$1")
        shift
    done
    shift
    rmig "$@" >"$tmp/refused.out" 2>"$tmp/refused"
    got=$?
    [ $got = "$status" ] || { echo "exit status $got, $status wanted"; cat "$tmp/refused"; return 1; }
    says "$tmp/refused" "${words[@]}"
}

usage_errors() {
    local to=(--connect 127.0.0.1:1) ram=(--block "ram=$tmp/page")
    check 'no command is refused' refused 2 'send or recv' --
    check 'an unknown command is refused' refused 2 'copy' 'send or recv' -- copy
    check 'send without --connect is refused' refused 2 '--connect' -- send "${ram[@]}"
    check 'send without --block is refused' refused 2 '--block' -- send "${to[@]}"
    check 'recv without --out is refused' refused 2 '--out' -- recv --listen 127.0.0.1:0
    check 'an option of the other command is refused' refused 2 '--force' recv -- send "${to[@]}" "${ram[@]}" --force
    check '--block without = is refused' refused 2 'NAME=FILE' "$tmp/page" -- send "${to[@]}" --block "$tmp/page"
    check 'a block named twice is refused' refused 2 ram before -- send "${to[@]}" "${ram[@]}" "${ram[@]}"
    check 'a long block name is refused' refused 2 255 -- send "${to[@]}" --block "$(printf 'x%.0s' {1..256})=$tmp/page"
    check 'an unknown parameter is refused' refused 2 'chunk-zize' -- send "${to[@]}" "${ram[@]}" --set chunk-zize=1M
    check 'a chunk size that is no power of two' refused 2 chunk-size 3M 'power of two' -- \
        send "${to[@]}" "${ram[@]}" --set chunk-size=3M
    check 'a chunk size out of range' refused 2 chunk-size 512K 1M 1G -- send "${to[@]}" "${ram[@]}" --set chunk-size=512K
    check 'a switch that is no switch' refused 2 pin-all perhaps on off -- send "${to[@]}" "${ram[@]}" --set pin-all=perhaps
    check '--set without a value' refused 2 'NAME=VALUE' -- send "${to[@]}" "${ram[@]}" --set pin-all
    check 'parameters that contradict each other' refused 2 signal-every write-depth -- \
        send "${to[@]}" "${ram[@]}" --set write-depth=4 --set signal-every=100
    check '--rounds 0 is refused' refused 2 '--rounds 0' 1000000 -- send "${to[@]}" "${ram[@]}" --rounds 0
    check '--rounds x is refused' refused 2 '--rounds 2x' -- send "${to[@]}" "${ram[@]}" --rounds 2x
    check '--max-size nonsense is refused' refused 2 '--max-size' '1Q' -- recv --listen :0 --out "$tmp" --max-size 1Q
    check 'an address without a port number is refused' refused 2 'abc' -- send --connect 127.0.0.1:abc "${ram[@]}"
    check 'a link-local address without its interface' refused 2 link-local '[fe80::1%eth0]:1' -- \
        send --connect '[fe80::1]:1' "${ram[@]}"
    check 'a port above 65535 is refused' refused 2 '65536' -- recv --listen 127.0.0.1:65536 --out "$tmp"
}

# >>files

file_errors() {
    local to=(--connect 127.0.0.1:1)
    check 'a missing image' refused 3 ram "$tmp/none" 'No such file' -- send "${to[@]}" --block "ram=$tmp/none"
    check 'an empty image' refused 3 ram "$tmp/empty" 'empty' -- send "${to[@]}" --block "ram=$tmp/empty"
    check 'an image that is a folder' refused 3 "$tmp" -- send "${to[@]}" --block "ram=$tmp"
    check 'an image that is a device' refused 3 /dev/null 'regular file' -- send "${to[@]}" --block ram=/dev/null
    check 'a missing state file' refused 3 "$tmp/none" -- send "${to[@]}" --block "ram=$tmp/page" --state "$tmp/none"
    check 'a missing folder' refused 3 "$tmp/no/where" -- recv --listen 127.0.0.1:0 --out "$tmp/no/where"
    check 'a folder that is a file' refused 3 "$tmp/page" -- recv --listen 127.0.0.1:0 --out "$tmp/page"
    check 'a block in a missing folder' refused 3 "$tmp/no" -- recv --listen 127.0.0.1:0 --out "$tmp" --block "a=$tmp/no/a"
    check 'a block into a device' refused 3 /dev/null 'not a regular file' -- recv --listen 127.0.0.1:0 --out "$tmp" --force \
        --block a=/dev/null
    check 'state into a folder' refused 3 "$tmp" 'not a regular file' -- recv --listen 127.0.0.1:0 --out "$tmp" --state "$tmp"
    check 'state without a name' refused 3 'the name of a file is missing' -- recv --listen 127.0.0.1:0 --out "$tmp" --state ''
    check 'a file that exists is not replaced' existing_stays
    check '--force replaces a file that exists' existing_is_replaced
    check 'one file for two blocks is refused' one_file_twice
    check 'a file that is the .part of another is refused' file_is_a_part
    check 'standard descriptors that are closed' closed_descriptors
    check 'a link is what it leads to' links_are_followed
    check 'a block that the source has not is refused' unknown_block
    check 'more than --max-size is refused' too_large
    check 'more state than --max-size leaves is refused' too_much_state
    check 'state beyond a limit of the system, and the source is told' state_beyond_a_limit
    if [ "$(id -u)" = 0 ]; then
        skip 'an unreadable image' 'root reads everything'
        skip 'a read-only folder' 'root writes everywhere'
    else
        check 'an unreadable image' unreadable
        check 'a read-only folder' read_only_folder
    fi
    if unshare -rm true 2>/dev/null; then
        check 'no space left' no_space
        check 'no space left, reserved nothing' no_space --sparse
    else
        skip 'no space left' 'no small file system can be mounted here'
    fi
}

unreadable() {
    cp "$tmp/page" "$tmp/secret" && chmod 000 "$tmp/secret" &&
        refused 3 "$tmp/secret" 'Permission denied' -- send --connect 127.0.0.1:1 --block "ram=$tmp/secret"
}

read_only_folder() {
    mkdir -p "$tmp/closed" && chmod 555 "$tmp/closed" &&
        refused 3 "$tmp/closed" 'Permission denied' -- recv --listen 127.0.0.1:0 --out "$tmp/closed"
}

existing_stays() {
    echo precious >"$tmp/precious"
    send=(--block "ram=$tmp/odd")
    recv=(--block "ram=$tmp/precious")
    both 5 3 && says "$tmp/send.err" precious exists && says "$tmp/recv.err" precious --force &&
        [ "$(cat "$tmp/precious")" = precious ] && nothing_left
}

existing_is_replaced() {
    send=(--block "ram=$tmp/odd")
    recv=(--block "ram=$tmp/precious" --force)
    both 0 0 && cmp "$tmp/odd" "$tmp/precious"
}

# A link is what it leads to, and what is there keeps its owner and mode.
links_are_followed() {
    local mine
    mkdir -p "$tmp/disk" && rm -rf "$tmp/disk/"* && echo older >"$tmp/disk/ram" && chmod 4664 "$tmp/disk/ram" || return 1
    [ "$(id -u)" != 0 ] || chown 65534:12345 "$tmp/disk/ram" && chmod 4664 "$tmp/disk/ram" || return 1
    mine=$(stat -c '%u %g %a' "$tmp/disk/ram")
    rm -f "$tmp/link" "$tmp/link2" "$tmp/state.link" && ln -s disk/ram "$tmp/link" && ln -s "$tmp/disk/new" "$tmp/link2" &&
        ln -s disk/state "$tmp/state.link" || return 1
    send=(--block "ram=$tmp/odd" --block "new=$tmp/page" --state "$tmp/device")
    recv=(--block "ram=$tmp/link" --block "new=$tmp/link2" --state "$tmp/state.link")
    both 5 3 && says "$tmp/recv.err" exists --force && [ "$(cat "$tmp/disk/ram")" = older ] || return 1
    recv+=(--force)
    both 0 0 && [ -L "$tmp/link" ] && [ -L "$tmp/link2" ] && [ -L "$tmp/state.link" ] && cmp "$tmp/odd" "$tmp/disk/ram" &&
        cmp "$tmp/page" "$tmp/disk/new" && cmp "$tmp/device" "$tmp/disk/state" &&
        [ "$(stat -c '%u %g %a' "$tmp/disk/ram")" = "$mine" ] && [ "$(stat -c %a "$tmp/disk/new")" = 600 ] &&
        [ "$(find "$tmp/disk" "$tmp" -maxdepth 1 -name '*.part')" = '' ] || { ls -l "$tmp" "$tmp/disk"; return 1; }
}

# The images stay with the source, and what another has put in the place of FILE.part is left alone.
part_is_replaced() {
    start_recv 127.0.0.1 || return 1
    timeout -k 5 600 "$program" send --connect "$address" --block "ram=$tmp/odd" --set max-bandwidth=6M >"$tmp/send.out" \
        2>"$tmp/send.err" &
    local sender=$!
    wait_for "[ -e $out/ram.part ]" && mv "$out/ram.part" "$tmp/moved" && cp "$tmp/page" "$out/ram.part" || return 1
    ends "$sender" 5 20 send && ends "$receiver" 3 20 recv && says "$tmp/send.err" ram.part 'removed or replaced' &&
        says "$tmp/recv.err" ram.part 'removed or replaced' && cmp "$tmp/page" "$out/ram.part" && [ ! -e "$out/ram" ]
}

# One that has opened FILE.part, and waits, while it becomes another's FILE.
second_receiver() {
    start_recv 127.0.0.1 || return 1
    local first=$receiver to=$address second
    timeout -k 5 600 "$program" send --connect "$to" --block "ram=$tmp/odd" --set max-bandwidth=6M >"$tmp/first" 2>&1 &
    local sender=$!
    wait_for "[ -e $out/ram.part ]" && kill -STOP "$(real_pid "$sender")" || return 1
    : >"$tmp/recv.out"
    ASAN_OPTIONS=detect_leaks=0 timeout -k 5 600 strace -f -qq -o "$tmp/calls" -e trace=flock -e inject=flock:delay_enter=12000000 \
        "$program" recv --listen 127.0.0.1:0 --out "$out" >"$tmp/recv.out" 2>"$tmp/recv.err" &
    receiver=$!
    listens || return 1
    timeout -k 5 600 "$program" send --connect "$(sed -n 's/^listening on //p' "$tmp/recv.out")" --block "ram=$tmp/page" >"$tmp/send.out" \
        2>"$tmp/send.err" &
    second=$!
    wait_for "ls -l /proc/\$(real_pid \$(real_pid $receiver))/fd | grep -q ram.part" && kill -CONT "$(real_pid "$sender")" || return 1
    wait "$sender" && wait "$first" && same "$tmp/odd" ram || { cat "$tmp/first"; return 1; }
    ends "$second" 5 20 send && ends "$receiver" 3 20 recv && says "$tmp/recv.err" ram.part 'another process' && same "$tmp/odd" ram &&
        names_are ram
}

one_file_twice() {
    send=(--block "a=$tmp/odd" --block "b=$tmp/page")
    recv=(--block "a=$tmp/target" --block "b=$tmp/target")
    both 5 3 && says "$tmp/recv.err" "block b: $tmp/target is already the file of another block" && [ ! -e "$tmp/target" ]
}

# One of the files has, until it is whole, the name of the other. The way to it does not matter, nor the order.
file_is_a_part() {
    local order
    mkdir -p "$tmp/there" && ln -sfn "$tmp/there" "$tmp/way"
    for order in "a b" "b a"; do
        # shellcheck disable=SC2086 # two words
        set -- $order
        send=(--block "$1=$tmp/odd" --block "$2=$tmp/page")
        recv=(--block "a=$tmp/there/x" --block "b=$tmp/way/x.part")
        both 5 3 && says "$tmp/recv.err" "/x.part, and the other" && says "$tmp/send.err" /x.part &&
            [ -z "$(ls -A "$tmp/there")" ] || return 1
    done
    send=(--block "a=$tmp/odd" --state "$tmp/device")
    recv=(--block "a=$tmp/there/x" --state "$tmp/there/x.part")
    both 5 3 && says "$tmp/recv.err" 'block a:' "/x.part, and the other" && [ -z "$(ls -A "$tmp/there")" ]
}

# What is printed must not land in an image that has got the number of a closed descriptor. Which one has depends on what
# the system opens before.
closed_descriptors() {
    local image=$tmp/closed.image
    cp "$tmp/odd" "$image" && send=(--block "ram=$image") recv=() || return 1
    timeout -k 5 600 "$program" send --connect 127.0.0.1:1 --block "ram=$image" 2>&-
    [ $? = 4 ] && cmp "$tmp/odd" "$image" || return 1
    timeout -k 5 600 "$program" send --json --connect 127.0.0.1:1 --block "ram=$image" >&- 2>"$tmp/send.err"
    [ $? = 4 ] && cmp "$tmp/odd" "$image" || return 1
    timeout -k 5 600 "$program" send --json --connect 127.0.0.1:1 --block "ram=$image" <&- >&- 2>&-
    [ $? = 4 ] && cmp "$tmp/odd" "$image" || return 1
    start_recv 127.0.0.1 && timeout -k 5 600 "$program" send --trace --connect "$address" --block "ram=$image" <&- 2>&- >"$tmp/send.out" &&
        wait "$receiver" && cmp "$tmp/odd" "$image" && same "$image" ram
}

unknown_block() {
    send=(--block "ram=$tmp/odd")
    recv=(--block "rom=$tmp/rom")
    both 5 2 && says "$tmp/recv.err" rom && says "$tmp/send.err" rom && nothing_left
}

# It costs the source its connection; the next one is let in.
too_large() {
    recv=(--max-size 11M)
    start_recv 127.0.0.1 "${recv[@]}" || return 1
    rmig send --connect "$address" --block "ram=$tmp/odd" >"$tmp/send.out" 2>"$tmp/send.err"
    [ $? = 5 ] && says "$tmp/send.err" --max-size && [ ! -e "$out/ram.part" ] || return 1
    rmig send --connect "$address" --block "ram=$tmp/page" >"$tmp/send.out" 2>"$tmp/send.err" || return 1
    wait "$receiver" && says "$tmp/recv.err" --max-size && same "$tmp/page" ram
}

too_much_state() {
    send=(--block "ram=$tmp/odd" --state "$tmp/big")
    recv=(--max-size 13M --wait 10)
    ! both 0 0 >"$tmp/both.out" && says "$tmp/recv.err" --max-size && says "$tmp/send.err" 'of state' && nothing_left
}

# What the user may have on the disk is less than what comes: each end names the quota.
over_quota() {
    local how
    for how in '' --sparse; do
        send=(--block "ram=$tmp/odd") recv=($how) # nothing, or a word
        under=(env "ASAN_OPTIONS=detect_leaks=0${ASAN_OPTIONS:+:$ASAN_OPTIONS}" strace -f -qq -o "$tmp/calls"
            -e trace=fallocate -e inject=fallocate:error=EDQUOT)
        both 5 3
        local rc=$?
        under=()
        [ $rc = 0 ] && says "$tmp/recv.err" 'quota exceeded' ram.part && says "$tmp/send.err" 'quota exceeded' ram.part &&
            nothing_left && { [ -n "$how" ] || says "$tmp/recv.err" 'give --sparse'; } || return 1
    done
    grep -q EDQUOT "$tmp/calls"
}

# The receiver runs in a namespace of its own with 4 MiB for files; the sender wants to send 32 MiB.
no_space() {
    rm -rf "$out"
    mkdir -p "$out"
    : >"$tmp/recv.out"
    timeout -k 5 600 unshare -rm sh -c 'mount -t tmpfs -o size=4m none "$1" && shift && exec "$@"' sh "$out" \
        "$program" recv --listen 127.0.0.1:0 --out "$out" "$@" >"$tmp/recv.out" 2>"$tmp/recv.err" &
    receiver=$!
    listens || return 1
    rmig send --connect "$(sed -n 's/^listening on //p' "$tmp/recv.out")" --set io-timeout=5s --block "ram=$tmp/big" \
        >"$tmp/send.out" 2>"$tmp/send.err"
    local sent=$?
    wait "$receiver"
    local received=$?
    [ $sent = 5 ] || { echo "send ended with $sent, 5 wanted"; cat "$tmp/send.err"; return 1; }
    [ $received = 3 ] || { echo "recv ended with $received, 3 wanted"; cat "$tmp/recv.err"; return 1; }
    says "$tmp/recv.err" 'No space left' 33554432 && says "$tmp/send.err" 'No space left' ram.part
}

state_beyond_a_limit() {
    send=(--block "ram=$tmp/page" --state "$tmp/device")
    recv=()
    under=(prlimit --fsize=50000)
    both 5 3 && says "$tmp/recv.err" 'File too large' && says "$tmp/send.err" refused 'File too large' && nothing_left
    local rc=$?
    under=()
    return $rc
}

# >>names

# The program with an /etc/hosts of its own.
make_hosts() {
    printf '%s\n' '127.0.0.1 localhost' '::1 localhost ip6-localhost' '192.0.2.1 elsewhere' '2001:db8::1 elsewhere' >"$tmp/hosts"
    cat >"$tmp/in_hosts" <<END
#!/bin/sh
exec unshare -rm sh -c 'mount --bind "\$0" /etc/hosts && exec "\$@"' "$tmp/hosts" "$(realpath "$program")" "\$@"
END
    chmod +x "$tmp/in_hosts"
}

by_name() { # LISTEN NAME...: each name gets a receiver of its own
    local host=$1 name
    shift
    for name in "$@"; do
        start_recv "$host" || return 1
        timeout -k 5 600 "$program" send --connect "$name:${address##*:}" --block "ram=$tmp/page" >"$tmp/send.out" 2>"$tmp/send.err" ||
            { echo "$name at $address"; cat "$tmp/send.err"; kill "$receiver"; return 1; }
        wait "$receiver" && same "$tmp/page" ram || return 1
    done
}

all_are_named() {
    refused 4 '[::1]:1' '127.0.0.1:1' 'Connection refused' 'localhost:1' -- send --connect localhost:1 --block "ram=$tmp/page" &&
        ! grep -q handover "$tmp/refused"
}

none_is_here() {
    refused 4 'elsewhere:0' '192.0.2.1' '[2001:db8::1]' 'Cannot assign' -- recv --listen elsewhere:0 --out "$tmp"
}

# Both addresses lead to a receiver that is silent until the source has given up the first of them.
silent_for_the_first_address() {
    local status
    start_recv '' || return 1
    kill -STOP "$(real_pid "$receiver")"
    : >"$tmp/send.err"
    timeout -k 5 600 "$program" send --connect "localhost:${address##*:}" --block "ram=$tmp/page" --trace --set connect-timeout=12s \
        >"$tmp/send.out" 2>"$tmp/send.err" &
    sender=$!
    wait_for 'grep -q "next address" "$tmp/send.err" || ! kill -0 $sender 2>/dev/null'
    status=$?
    kill -CONT "$(real_pid "$receiver")"
    [ "$status" = 0 ] && wait "$sender" && wait "$receiver" && same "$tmp/page" ram && return
    cat "$tmp/send.err" "$tmp/recv.err"
    return 1
}

names() {
    make_hosts
    local program=$tmp/in_hosts
    check 'localhost has two addresses, IPv4 is listened on' by_name 127.0.0.1 localhost
    check 'localhost has two addresses, IPv6 is listened on' by_name '[::1]' localhost
    check 'a port alone is listened on by both families' by_name '' 127.0.0.1 '[::1]' localhost
    check 'a name is listened on at all its addresses' by_name localhost 127.0.0.1 '[::1]' localhost
    check 'a receiver that was silent while its first address was tried' silent_for_the_first_address
    check 'each address that was tried is named' all_are_named
    check 'a name of which no address is here' none_is_here
}

# What is wrong at the receiver is not blamed on a receiver.
unknown_name_to_listen_on() {
    refused 4 'nowhere.invalid:1' -- recv --listen nowhere.invalid:1 --out "$tmp" && ! grep -q 'sink listens' "$tmp/refused"
}

filtered_providers() { # OPTION...
    FI_PROVIDER='^tcp,net' refused 4 'FI_PROVIDER=^tcp,net' 'unset it' -- send --connect 127.0.0.1:1 --block "ram=$tmp/page" "$@"
}

# Names come from the peer: none may lead out of the folder, hide, or pose as an unfinished file.
hostile_names() {
    local newline=$'a\nb'
    send=(--block "../up=$tmp/page" --block "/abs/olute=$tmp/byte" --block ".hidden=$tmp/page" --block "..=$tmp/byte"
        --block "$newline=$tmp/page" --block "x=$tmp/byte" --block "x.part=$tmp/page" --block "%2E=$tmp/byte")
    recv=()
    both 0 0 || return 1
    printf '%s\n' %252E %2E. %2E.%2Fup %2Ehidden %2Fabs%2Folute a%0Ab x x%2Epart | sort >"$tmp/wanted"
    ls -A "$out" | sort | diff "$tmp/wanted" - || return 1
    [ ! -e "$tmp/up" ] && same "$tmp/byte" x && same "$tmp/page" x%2Epart
}

# 255 bytes, 100 letters of two bytes, and two that differ where they are cut.
long_names() {
    local n letters slashes
    n=$(printf 'n%.0s' {1..255})
    letters=$(printf '\xc3\xa4%.0s' {1..100})
    slashes=$(printf '/%.0s' {1..200})
    send=(--block "$n=$tmp/page" --block "$letters=$tmp/odd" --block "${letters}x=$tmp/byte" --block "$slashes=$tmp/device"
        --state "$tmp/byte")
    recv=(--json)
    both 0 0 && [ "$(find "$out" -type f | wc -l)" = 5 ] && same "$tmp/page" "$n" && same "$tmp/byte" state || return 1
    N=$(printf '%%2F%.0s' {1..79})%- json "$tmp/recv.out" '$j->{blocks}[3]{file} =~ m{/\Q$ENV{N}\E[0-9a-f]{16}$}' || return 1
    local i wanted=("$tmp/page" "$tmp/odd" "$tmp/byte" "$tmp/device")
    for i in 0 1 2 3; do
        cmp "${wanted[$i]}" "$(tail -1 "$tmp/recv.out" |
            perl -MJSON::PP -e 'print decode_json(<STDIN>)->{blocks}[$ARGV[0]]{file}' $i)" || return 1
    done
    refused 3 'File name too long' -- recv --listen 127.0.0.1:0 --out "$out" --block "x=$out/$n$n"
}

state_poses_as_block() {
    send=(--block "state=$tmp/page" --state "$tmp/device")
    recv=()
    both 5 3 && says "$tmp/recv.err" "block state: $out/state is already the file of another block" && nothing_left || return 1
    send=(--block "a=$tmp/page" --state "$tmp/device")
    recv=(--block "a=$out/../out/x" --state "$out/x")
    both 5 3 && says "$tmp/recv.err" 'block a:' 'is already the file of another block'
}

# What the receiver asks of the file system for one block must not grow with their number, which the source chooses.
names_cost_the_same() {
    local i n calls=()
    for n in 50 100 200; do
        send=() recv=()
        for ((i = 0; i < n; i++)); do
            send+=(--block "b$i=$tmp/byte")
        done
        under=(env "ASAN_OPTIONS=detect_leaks=0${ASAN_OPTIONS:+:$ASAN_OPTIONS}" strace -f -qq -o "$tmp/calls" -e trace=%file)
        both 0 0 || return 1
        under=()
        calls+=("$(wc -l <"$tmp/calls")")
    done
    [ "$((calls[2] - calls[1]))" -le "$(((calls[1] - calls[0]) * 5 / 2))" ] && return
    echo "for 50, 100 and 200 blocks: ${calls[*]} calls"
    return 1
}

# >>the disk of the receiver

# The receiver's system calls fail or take their time, as strace is told. No leaks can be looked for under strace.
traced() { # "CALL:INJECTION ..." COMMAND...
    local fault
    under=(env "ASAN_OPTIONS=detect_leaks=0${ASAN_OPTIONS:+:$ASAN_OPTIONS}" strace -f -qq -o "$tmp/calls"
        -e "trace=fsync,rename,renameat2")
    for fault in $1; do
        under+=(-e "inject=$fault")
    done
    shift
    "$@"
    local rc=$?
    under=()
    return $rc
}

three() { # what is sent in most of these
    send=(--block "a=$tmp/odd" --block "b=$tmp/page" --block "c=$tmp/byte" --state "$tmp/device")
}

names_are() { # NAME...: in $out, exactly
    printf '%s\n' "$@" | sort | diff - <(ls -A "$out" | sort)
}

whole_parts() { same "$tmp/odd" a.part && same "$tmp/page" b.part && same "$tmp/byte" c.part && same "$tmp/device" state.part; }

# A failure before the answer: the source hears it and keeps its images.
disk_fails() { # CALL:error=...
    three
    recv=()
    traced "$1" both 5 3 && says "$tmp/recv.err" 'Input/output error' && says "$tmp/send.err" refused 'Input/output error' &&
        nothing_left
}

# The file system promises space that the disk below it has not.
full_disk() {
    local no_exchange=renameat2:error=EINVAL
    cat >"$tmp/full.sh" <<'END'
mount -t tmpfs -o size=12m none "$1" && truncate -s 64M "$1/disk" && mkfs.ext4 -q -F "$1/disk" && mkdir "$1/m" &&
    mount -o loop "$1/disk" "$1/m" || exit 90
shift
exec "$@"
END
    rm -rf "$out"
    mkdir -p "$out"
    : >"$tmp/recv.out"
    timeout -k 5 600 unshare -m sh "$tmp/full.sh" "$out" sh -c 'dir=$1; shift; "$@"; rc=$?; ls "$dir"; exit $rc' sh "$out/m" \
        "$program" recv --listen 127.0.0.1:0 --out "$out/m" >"$tmp/recv.out" 2>"$tmp/recv.err" &
    receiver=$!
    listens || return 1
    rmig send --connect "$(sed -n 's/^listening on //p' "$tmp/recv.out")" --block "ram=$tmp/big" >"$tmp/send.out" 2>"$tmp/send.err"
    local sent=$? received
    wait "$receiver"
    received=$?
    [ "$sent $received" = '5 3' ] || { echo "send and recv ended with $sent $received"; cat "$tmp/send.err" "$tmp/recv.err"; return 1; }
    says "$tmp/recv.err" ram.part && says "$tmp/send.err" refused ram.part && ! grep -q ram "$tmp/recv.out"
}

can_mount_disks() {
    mkdir -p "$tmp/try" && truncate -s 8M "$tmp/try.disk" && mkfs.ext4 -q -F "$tmp/try.disk" &&
        unshare -m mount -o loop "$tmp/try.disk" "$tmp/try"
}

# Longer than the source would wait for a receiver that says nothing.
slow_disk() {
    local no_exchange=renameat2:error=EINVAL
    three
    send+=(--set handover-timeout=3s)
    recv=()
    traced fsync:delay_enter=7000000:when=1 both 0 0 && same "$tmp/odd" a && names_are a b c state
}

too_slow_disk() {
    local no_exchange=renameat2:error=EINVAL
    three
    recv=(--disk-timeout 1)
    traced fsync:delay_enter=5000000:when=1 both 5 3 && says "$tmp/recv.err" '1 s of --disk-timeout' &&
        says "$tmp/send.err" refused --disk-timeout && nothing_left
}

# Sets sender; the receiver is busy with its disk for some seconds.
start_slow_disk() {
    local no_exchange=renameat2:error=EINVAL
    three
    traced fsync:delay_enter=4000000:when=1 start_recv 127.0.0.1 || return 1
    timeout -k 5 600 "$program" send --connect "$address" "${send[@]}" >"$tmp/send.out" 2>"$tmp/send.err" &
    sender=$!
    wait_for "[ -s $out/state.part ]" && sleep 0.7
}

cancel_at_the_disk() {
    local no_exchange=renameat2:error=EINVAL
    start_slow_disk || return 1
    kill -INT "$(real_pid "$(real_pid "$receiver")")"
    ends "$receiver" 7 20 recv && ends "$sender" 5 20 send && nothing_left
}

sender_gone_at_the_disk() {
    local no_exchange=renameat2:error=EINVAL
    start_slow_disk || return 1
    kill -KILL "$(real_pid "$sender")"
    wait "$sender"
    ends "$receiver" 5 20 recv && nothing_left
}

# A failure behind the answer: all is kept, and no file has its name if one cannot have it.
no_name() { # CALL:error=...
    three
    recv=()
    traced "$1" both 0 6 && says "$tmp/recv.err" 'cannot become' 'Input/output error' FILE.part &&
        names_are a.part b.part c.part state.part && whole_parts
}

older_files() {
    local name
    for name in a b c state; do
        echo "older $name" >"$out/$name"
    done
}

older_stay() {
    local name
    for name in a b c state; do
        [ "$(cat "$out/$name")" = "older $name" ] || { echo "$name is another"; return 1; }
    done
}

# both_over SEND-STATUS RECV-STATUS: as both, where files of the names are
both_over() {
    local sent received
    start_recv 127.0.0.1 --force || return 1
    older_files
    rmig send --connect "$address" "${send[@]}" >"$tmp/send.out" 2>"$tmp/send.err"
    sent=$?
    wait "$receiver"
    received=$?
    [ "$sent $received" = "$1 $2" ] && return
    echo "send ended with $sent, recv with $received; wanted $1 and $2"
    cat "$tmp/send.err" "$tmp/recv.err"
    return 1
}

replaced_together() {
    three
    both_over 0 0 && names_are a b c state && same "$tmp/odd" a && same "$tmp/page" b && same "$tmp/device" state
}

not_replaced() { # INJECTION
    three
    traced "$1" both_over 0 6 && says "$tmp/recv.err" 'cannot become' FILE.part && older_stay && whole_parts &&
        names_are a b c state a.part b.part c.part state.part
}

# As on NFS, which cannot exchange names.
replaced_by_three() { traced renameat2:error=EINVAL replaced_together && grep -q EINVAL "$tmp/calls"; }

# Whatever comes to the place of a file while it is received stays.
place_is_taken() { # MAKE WORD OPTION...
    local make=$1 word=$2
    shift 2
    start_recv 127.0.0.1 "$@" || return 1
    [ $# = 0 ] || echo "older a" >"$out/a"
    timeout -k 5 600 "$program" send --connect "$address" --block "a=$tmp/page" --block "b=$tmp/odd" --set max-bandwidth=6M \
        >"$tmp/send.out" 2>"$tmp/send.err" &
    sender=$!
    wait_for "[ -e $out/b.part ]" && $make "$out/b" || return 1
    ends "$sender" 0 40 send && ends "$receiver" 6 20 recv && says "$tmp/recv.err" "$out/b" "$word" FILE.part &&
        same "$tmp/page" a.part && same "$tmp/odd" b.part || return 1
    [ $# = 0 ] || [ "$(cat "$out/a")" = 'older a' ]
}

make_file() { echo theirs >"$1"; }

place_stays() { place_is_taken make_file 'File exists' && [ "$(cat "$out/b")" = theirs ] && [ ! -e "$out/a" ]; }

# What was kept is not written over, --force or not.
kept_is_safe() {
    no_name renameat2:error=EIO:when=1 || return 1
    local receiver address host=127.0.0.1
    : >"$tmp/recv.out"
    timeout -k 5 600 "$program" recv --listen 127.0.0.1:0 --out "$out" --force >"$tmp/recv.out" 2>"$tmp/recv.err" &
    receiver=$!
    listens || return 1
    rmig send --connect "$(sed -n 's/^listening on //p' "$tmp/recv.out")" "${send[@]}" >"$tmp/send.out" 2>"$tmp/send.err"
    wait "$receiver"
    [ $? = 3 ] && says "$tmp/recv.err" a.part 'only copy' && says "$tmp/send.err" 'only copy' && whole_parts
}

# A source of version 1 has gone when the disk fails: what is here is all there is.
disk_fails_behind_version_1() {
    three
    send+=(--set extension=off)
    recv=()
    traced fsync:error=EIO:when=1 both 0 6 && says "$tmp/recv.err" 'Input/output error' FILE.part &&
        names_are a.part b.part c.part state.part && whole_parts
}

disk() {
    local no_exchange=renameat2:error=EINVAL
    if command -v mkfs.ext4 >/dev/null && can_mount_disks >"$tmp/try.out" 2>&1; then
        check 'a disk that is full below its file system' full_disk
    else
        skip 'a disk that is full below its file system' 'no file system can be mounted from a file here'
    fi
    check 'a directory comes to the place of a file' place_is_taken mkdir 'Is a directory' --force
    check 'a file comes to the place of a file' place_stays
    check 'several files are replaced' replaced_together
    if ! strace -qq -o /dev/null -e trace=none true 2>/dev/null; then
        skip 'disks that fail' "$(command -v strace >/dev/null && echo 'strace may not trace here' || echo 'not installed: strace')"
        return
    fi
    check 'the names of many blocks cost the same for each' names_cost_the_same
    check 'a second receiver does not empty what is whole' second_receiver
    check 'a part that is replaced gets no name' part_is_replaced
    check 'a quota is exceeded' over_quota
    check 'the disk fails' disk_fails fsync:error=EIO:when=1
    check 'the disk fails at the last file' disk_fails fsync:error=EIO:when=7
    check 'the disk takes longer than the source would wait' slow_disk
    check 'the disk takes too long' too_slow_disk
    check 'the receiver is interrupted while the disk takes its time' cancel_at_the_disk
    check 'the sender is killed while the disk takes its time' sender_gone_at_the_disk
    check 'the first file cannot get its name' no_name renameat2:error=EIO:when=1
    check 'the last file cannot get its name' no_name renameat2:error=EIO:when=4
    check 'what was kept is not written over' kept_is_safe
    check 'the first of several files is not replaced' not_replaced renameat2:error=EIO:when=2
    check 'the last of several files is not replaced' not_replaced renameat2:error=EIO:when=8
    check 'several files are replaced where names cannot be exchanged' replaced_by_three
    check 'one of several files is not, first step' not_replaced "$no_exchange rename:error=EIO:when=4"
    check 'one of several files is not, second step' not_replaced "$no_exchange rename:error=EIO:when=5"
    check 'one of several files is not, third step' not_replaced "$no_exchange rename:error=EIO:when=6"
    check 'the disk fails behind a source of version 1' disk_fails_behind_version_1
}

# >>peers that go wrong

# A migration slow enough to be hit in the middle: 32 MiB at 4 MiB/s. io-timeout 5 s bounds what the other end may take.
start_slow() {
    start_recv 127.0.0.1 --set io-timeout=5s || return 1
    timeout -k 5 600 "$program" send --connect "$address" --block "ram=$tmp/big" --set max-bandwidth=4M \
        --set io-timeout=5s >"$tmp/send.out" 2>"$tmp/send.err" &
    sender=$!
    wait_for "[ -e $out/ram.part ]" && sleep 0.7
}

# ends PID STATUS SECONDS WHO: within so many seconds
ends() {
    local begin=$SECONDS status
    wait "$1"
    status=$?
    [ $status = "$2" ] || { echo "$4 ended with $status, $2 wanted"; cat "$tmp/send.err" "$tmp/recv.err"; return 1; }
    [ $((SECONDS - begin)) -le $(($3 * slack)) ] || { echo "$4 took $((SECONDS - begin)) s"; return 1; }
}

# An end that was stopped is silent, one that was killed is gone.
silence_told() { # SIGNAL FILE
    [ -s "$2" ] && { [ "$1" != STOP ] || says "$2" 'for 5s (io-timeout)'; }
}

kill_receiver() { # SIGNAL
    start_slow || return 1
    local victim
    victim=$(real_pid "$receiver")
    kill "-$1" "$victim"
    ends "$sender" 5 6 send
    local rc=$?
    kill -KILL "$victim" 2>/dev/null
    wait "$receiver"
    [ $rc = 0 ] && silence_told "$1" "$tmp/send.err" && [ ! -e "$out/ram" ]
}

kill_sender() { # SIGNAL
    start_slow || return 1
    local victim
    victim=$(real_pid "$sender")
    kill "-$1" "$victim"
    ends "$receiver" 5 6 recv
    local rc=$?
    kill -KILL "$victim" 2>/dev/null
    wait "$sender"
    [ $rc = 0 ] && silence_told "$1" "$tmp/recv.err" && nothing_left
}

cancel() { # WHO SIGNAL
    start_slow || return 1
    kill "-$2" "$(real_pid "${!1}")"
    if [ "$1" = sender ]; then
        ends "$sender" 7 6 send && ends "$receiver" 5 6 recv && nothing_left
    else
        ends "$receiver" 7 6 recv && ends "$sender" 5 6 send && nothing_left
    fi
}

cancel_waiting() {
    start_recv 127.0.0.1 || return 1
    kill -INT "$(real_pid "$receiver")"
    ends "$receiver" 7 3 recv
}

nobody_listens() {
    start_recv 127.0.0.1 || return 1 # a port that is free for sure: its owner leaves
    kill -INT "$(real_pid "$receiver")"
    wait "$receiver"
    local begin=$SECONDS
    refused 4 "connecting to $address failed" -- send --connect "$address" --block "ram=$tmp/page" || return 1
    grep -q handover "$tmp/refused" && { cat "$tmp/refused"; return 1; }
    [ $((SECONDS - begin)) -le $((12 * slack)) ] || { echo "took $((SECONDS - begin)) s"; return 1; }
}

nobody_comes() { refused 4 '--wait' 1 -- recv --listen 127.0.0.1:0 --out "$tmp" --wait 1; }

# A listener that takes the connection and never says a word.
deaf_listener() {
    perl -MIO::Socket::INET -e 'my $s = IO::Socket::INET->new(Listen => 5, LocalAddr => "127.0.0.1:0") or die;
        $| = 1; print $s->sockport, "\n"; my $c = $s->accept; sleep 30' >"$tmp/port" &
    local deaf=$!
    wait_for "[ -s $tmp/port ]" || return 1
    refused 4 "127.0.0.1:$(cat "$tmp/port")" -- send --connect "127.0.0.1:$(cat "$tmp/port")" \
        --set connect-timeout=1s --block "ram=$tmp/page"
    local rc=$?
    kill $deaf
    wait $deaf 2>/dev/null
    return $rc
}

# Noise on the port must neither end nor crash the receiver: a real source that comes later succeeds.
noise_before_a_source() {
    start_recv 127.0.0.1 || return 1
    local port=${address##*:} i
    for i in 1 2 3; do
        head -c $((i * 1000)) "$tmp/big" >"/dev/tcp/127.0.0.1/$port"
    done
    rmig send --connect "$address" --block "ram=$tmp/odd" --quiet 2>"$tmp/send.err" || { cat "$tmp/send.err" "$tmp/recv.err"; return 1; }
    wait "$receiver" && same "$tmp/odd" ram
}

port_in_use() {
    start_recv 127.0.0.1 || return 1
    refused 4 "$address" -- recv --listen "$address" --out "$out"
    local rc=$?
    kill -INT "$(real_pid "$receiver")"
    wait "$receiver"
    return $rc
}

# >>output

json_of_both() {
    send=(--block "ram=$tmp/odd" --block "holes=$tmp/holes" --state "$tmp/device" --json)
    recv=(--json)
    both 0 0 || return 1
    local total=$((12345678 + $(stat -c %s "$tmp/holes")))
    TOTAL=$total json "$tmp/send.out" '$j->{ok} && $j->{exit_code} == 0 && $j->{status} =~ /OK$/ && !defined $j->{error}
        && $j->{mode} eq "send" && $j->{bytes} == $ENV{TOTAL} && $j->{state_bytes} == 100001 && $j->{extension}
        && @{$j->{blocks}} == 2 && $j->{stats}{bytes_written} + $j->{stats}{bytes_zero} >= $ENV{TOTAL}
        && $j->{stats}{bytes_zero} > 60e6 && $j->{total_ns} > 0' || return 1
    TOTAL=$total json "$tmp/recv.out" '$j->{ok} && $j->{mode} eq "recv" && $j->{bytes} == $ENV{TOTAL}
        && $j->{state_bytes} == 100001 && $j->{stats}{registrations} > 0'
}

json_of_failure() {
    rmig recv --listen 127.0.0.1:0 --out "$tmp/no/where" --json >"$tmp/recv.out" 2>"$tmp/recv.err"
    json "$tmp/recv.out" '!$j->{ok} && $j->{exit_code} == 3 && length $j->{error} && !defined $j->{status}' || return 1
    rmig send --connect 127.0.0.1:1 --block "ram=$tmp/page" --json >"$tmp/send.out" 2>"$tmp/send.err"
    json "$tmp/send.out" '!$j->{ok} && $j->{exit_code} == 4 && length $j->{error} && $j->{status} =~ /ERR/'
}

quiet_is_quiet() {
    send=(--block "ram=$tmp/page" --quiet)
    recv=(--quiet)
    both 0 0 && [ ! -s "$tmp/send.out" ] && [ ! -s "$tmp/send.err" ] && [ "$(wc -l <"$tmp/recv.out")" = 1 ]
}

trace_is_told() {
    send=(--block "ram=$tmp/page" --trace)
    recv=(--trace)
    both 0 0 && says "$tmp/send.err" trace: && says "$tmp/recv.err" trace:
}

help_names_exit_status() { rmig --help >"$tmp/help" && says "$tmp/help" 'Exit status' '--set' '--list-params' && rmig --version; }

# >>the list

out=$tmp/out
make_images
# What a sender draws on a terminal, a line each time, into draws.
watched_send() { # FILE LIMIT
    start_recv 127.0.0.1 || return 1
    timeout -k 5 600 script -qec "stty cols 200; '$program' send --connect $address --block 'ram=$1' --set max-bandwidth=$2" \
        /dev/null </dev/null >"$tmp/typescript" 2>&1 || { cat "$tmp/typescript"; return 1; }
    wait "$receiver" || return 1
    tr '\r' '\n' <"$tmp/typescript" | grep '^\[' >"$tmp/draws"
}

# As pv and rsync have it: what is done agrees with the percentage, and the rate is there, and never above the limit.
draws_agree() { # TOTAL_KIB LIMIT_KIB
    perl -ne 'BEGIN { ($total, $limit) = splice @ARGV, 0, 2; %of = (B => 1 / 1024, KiB => 1, MiB => 1024) }
        /\] +(\d+)%  ([\d.]+) (\w+) of .*  ([\d.]+) (\w+)\/s  round 1 of 1  (\d+ s left|time left unknown)/ or die "drawn: $_";
        my ($percent, $done, $rate, $left) = ($1, $2 * $of{$3}, $4 * $of{$5}, $6);
        abs($done * 100 / $total - $percent) <= 1.5 or die "$percent % are not $done KiB of $total: $_";
        $rate <= 1.01 * $limit or die "$rate KiB/s is above the limit: $_";
        $seen{$percent}++; $rates++ if $rate > 0; $known++ if $left =~ /(\d+)/ && $1 * $limit > 0.7 * ($total - $done);
        $short++ if $left =~ /(\d+)/ && $1 * $limit < 0.7 * ($total - $done) - $limit;
        END { $? ||= 1, print "rates $rates, left $known, too little left $short, ", join(" ", sort keys %seen), "\n"
            if !$rates || !$known || $short || keys %seen < 4 }' "$@" "$tmp/draws" 2>&1
}

small_image_moves() {
    head -c 100K /dev/urandom >"$tmp/small"
    watched_send "$tmp/small" 48K && draws_agree 100 48
}

limit_and_zero_pages() {
    truncate -s 24M "$tmp/mostly"
    head -c 8M /dev/urandom >>"$tmp/mostly"
    watched_send "$tmp/mostly" 4M && draws_agree $((32 * 1024)) 4096
}

check 'one block' one_block
check 'sizes that are no multiple of anything' sizes
check 'forty blocks, one of them with its own file' many_blocks
check 'device state goes along' state_goes_along
check 'three rounds' rounds_repeat
check 'holes stay holes' holes_stay
check 'two migrations at once' two_at_once
if grep -q '00000000000000000000000000000001' /proc/net/if_inet6 2>/dev/null; then
    check 'IPv6' over_ipv6
else
    skip 'IPv6' 'the loopback device has no IPv6 address'
fi
check 'no extension at the source' plain_version_1 off on
check 'no extension at the sink' plain_version_1 on off
check 'no extension at either end' plain_version_1 off off
check 'no extension, pinned whole' plain_version_1_pinned
for chunk in 1M 64M 1G; do
    check "chunks of $chunk" one_block_with --set chunk-size=$chunk
    check "chunks of $chunk, pinned whole" one_block_with --set chunk-size=$chunk --set pin-all=on
    check "chunks of $chunk, one at a time" one_block_with --set chunk-size=$chunk --set register-ahead=0
    check "chunks of $chunk without the extension" one_block_with --set chunk-size=$chunk --set extension=off
done
check 'the source chooses the chunk size' the_source_chunk_size_holds 256M
check 'a larger chunk size than the sink is told' chunk_sizes_differ 64M 1M 67108864 1048576
check 'a stranger comes first' a_stranger_comes_first
check 'a smaller chunk size than the sink is told' chunk_sizes_differ 1M 64M 1048576 67108864
set_of_each
usage_errors
if ! grep -q '00000000000000000000000000000001' /proc/net/if_inet6 2>/dev/null; then
    skip 'names with several addresses' 'the loopback device has no IPv6 address'
elif ! unshare -rm true 2>/dev/null; then
    skip 'names with several addresses' 'no process can have an /etc/hosts of its own here'
else
    names
fi
check 'a name to listen on that does not exist' unknown_name_to_listen_on
check 'FI_PROVIDER in the environment' filtered_providers
check 'FI_PROVIDER in the environment, and --provider' filtered_providers --provider tcp
file_errors
disk
check 'hostile block names stay in the folder' hostile_names
check 'block names that are too long for files' long_names
check 'a block named as the state is refused' state_poses_as_block
check 'the receiver is killed' kill_receiver KILL
check 'the sender is killed' kill_sender KILL
check 'the receiver is frozen' kill_receiver STOP
check 'the sender is frozen' kill_sender STOP
check 'the sender is interrupted' cancel sender INT
check 'the receiver is interrupted' cancel receiver INT
check 'the sender is terminated' cancel sender TERM
check 'the terminal of the receiver is closed' cancel receiver HUP
check 'a waiting receiver is interrupted' cancel_waiting
check 'nobody listens' nobody_listens
check 'nobody comes' nobody_comes
check 'a listener that says nothing' deaf_listener
check 'noise before a source' noise_before_a_source
if command -v prlimit >/dev/null; then
    check 'too few descriptors for a source' few_descriptors
else
    skip 'too few descriptors for a source' 'not installed: prlimit'
fi
check 'a port in use' port_in_use
if command -v script >/dev/null; then
    check 'progress of a small image moves' small_image_moves
    check 'progress under a limit, most of it zero' limit_and_zero_pages
else
    skip 'progress on a terminal' 'not installed: script'
fi
check '--json at both ends' json_of_both
check '--json of a failure' json_of_failure
check '--quiet' quiet_is_quiet
check '--trace' trace_is_told
check '--help' help_names_exit_status
done_testing
