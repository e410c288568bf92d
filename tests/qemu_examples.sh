#!/usr/bin/env bash
# qemu_examples.sh QEMU_SINK QEMU_SOURCE: the programs whose peer is a stock QEMU, against each other over libfabric:
# what is in the directory or the snapshot file at the end, what is refused, and what either end says when the other one
# goes wrong. mapped_ram, which looks at snapshot files, lies beside QEMU_SINK.
set -u
cd "$(dirname "$0")/.." || exit 1
. tests/tap.sh
sink_program=$1
source_program=$2
mapped_program=$(dirname "$sink_program")/mapped_ram
tmp=$(mktemp -d)
loop= # a loop device of ours
trap 'umount "$tmp/small" 2>/dev/null; [ -z "$loop" ] || losetup -d "$loop"; rm -rf "$tmp"' EXIT
out=$tmp/out
over=(--fabric ofi --provider tcp)

# >>tools

wait_for() { # CONDITION: at most 10 s
    local i
    for ((i = 0; i < 200 * slack; i++)); do
        eval "$1" && return 0
        sleep 0.05
    done
    echo "waited $((10 * slack)) s in vain for: $1"
    return 1
}

sink_env=()

# No leaks can be looked for under strace.
traced=(env "ASAN_OPTIONS=detect_leaks=0${ASAN_OPTIONS:+:$ASAN_OPTIONS}" strace -f -qq)

# Starts a sink into $out; sets sink and address. Its words go to sink.out and sink.err.
start_sink() { # OPTION...
    rm -rf "$out" "$out.part"
    sink_into "$out" "$@"
}

sink_into() { # DIR OPTION...; in an environment with sink_env
    local dir=$1
    shift
    : >"$tmp/sink.out"
    timeout -k 5 600 env "${sink_env[@]}" "$sink_program" "${over[@]}" --listen 127.0.0.1:0 "$@" "$dir" >"$tmp/sink.out" 2>"$tmp/sink.err" &
    sink=$!
    wait_for "grep -q listening $tmp/sink.out || ! kill -0 $sink 2>/dev/null" || return 1
    address=$(sed -n 's/^listening on //p; s/^{"listening":"\(.*\)"}$/\1/p' "$tmp/sink.out")
}

source_from() { # DIR OPTION...: to $address
    local dir=$1
    shift
    timeout -k 5 600 "$source_program" "${over[@]}" "$@" "$dir" "$address" >"$tmp/source.out" 2>"$tmp/source.err"
}

# both SOURCE-STATUS SINK-STATUS DIR OPTION...: OPTIONs are given to the source, those in the array `sink_options` to the
# sink.
sink_options=()
both() { both_by start_sink "$@"; }
both_by() { # SINK-STARTER, and as both
    local starter=$1 want="$2 $3" sent received
    shift 3
    "$starter" "${sink_options[@]}" || return 1
    source_from "$@"
    sent=$?
    wait "$sink"
    received=$?
    [ "$sent $received" = "$want" ] && return 0
    echo "qemu_source and qemu_sink ended with $sent $received, wanted $want"
    cat "$tmp/source.err" "$tmp/sink.err"
    return 1
}

says() { # FILE WORD...: all words are in it
    local file=$1 word
    shift
    for word in "$@"; do
        grep -qiF -- "$word" "$file" || { echo "\"$word\" is not said:"; cat "$file"; return 1; }
    done
}

nothing_left() {
    [ ! -e "$out" ] && [ ! -e "$out.part" ] && return
    echo "left behind:"
    ls -lAR "$out" "$out.part" 2>/dev/null
    return 1
}

# json FILE EXPRESSION: the last JSON of FILE as $j
json() {
    perl -MJSON::PP -0777 -e 'open my $in, "<", $ARGV[0] or die; my $t = <$in>; my @l = split /\n(?=\{)/, $t;
        my $j = decode_json($l[-1]); exit(eval($ARGV[1]) ? 0 : 1)' "$1" "$2" || { echo "not so: $2"; cat "$1"; return 1; }
}

real_pid() { pgrep -P "$1" | head -1; }

# >>directories

# make_machine DIR NAME=FILE...: as qemu_sink makes one. The state ends as QEMU's does.
make_machine() {
    perl -MJSON::PP -MFile::Copy -e '
        my ($dir, @blocks) = @ARGV;
        mkdir $dir or die "$dir: $!";
        mkdir "$dir/ram" or die;
        my @list;
        for (@blocks) {
            my ($name, $file) = /^(.*)=(.*)$/s or die;
            (my $safe = $name) =~ s/([^A-Za-z0-9_.-])/sprintf "%%%02X", ord $1/ge;
            $safe =~ s/^\./%2E/;
            if (length $safe > 255) { # cut, and a hash instead: FNV-1a of 64 bits
                my $hash = -3750763034362895579;
                { use integer; $hash = ($hash ^ ord $_) * 0x100000001b3 for split //, $name; }
                $safe = substr($safe, 0, 237) =~ s/%.?$//r . sprintf "%%-%016x", $hash;
            }
            utf8::decode($name) or die;
            system("cp", "--sparse=always", $file, "$dir/ram/$safe") == 0 or die;
            push @list, {name => $name, file => "ram/$safe", length => -s $file};
        }
        my $state = join "", map { pack "Cnx", 4, $_ } 1 .. 30000;
        my $vmdesc = "{\"devices\": [" . join(", ", ("{}") x 10000) . "]}";
        $state .= "\0\6" . pack("N", length $vmdesc) . $vmdesc;
        open my $out, ">", "$dir/state" or die;
        print $out $state;
        close $out or die;
        open $out, ">", "$dir/machine.json" or die;
        print $out encode_json({format => "rmig-qemu", version => 1, machine => "pc-q35-7.2", page_bits => undef,
            capabilities => [], uuid => "00010203-0405-0607-0809-0a0b0c0d0e0f", section_id => 2, blocks => \@list,
            state => {file => "state", length => length $state}});
        close $out or die' "$@"
}

make_machines() {
    head -c 33554432 /dev/urandom >"$tmp/big"
    truncate -s 25165824 "$tmp/sparse"
    local at
    for at in 0 1 17 4096 6143; do
        dd if=/dev/urandom of="$tmp/sparse" bs=4096 seek=$at count=1 conv=notrunc status=none
    done
    dd if=/dev/zero of="$tmp/sparse" bs=4096 seek=2000 count=500 conv=notrunc status=none
    head -c 131072 /dev/urandom >"$tmp/tables"
    head -c 4096 /dev/zero >"$tmp/zero"
    make_machine "$tmp/vm" "pc.ram=$tmp/sparse" "/rom@etc/acpi/tables=$tmp/tables" "../up=$tmp/tables" ".hidden=$tmp/zero" \
        "a%41 b=$tmp/zero" || return 1
    make_machine "$tmp/large" "pc.ram=$tmp/big" &&
        make_machine "$tmp/long" "$(printf '/%.0s' {1..200})=$tmp/tables" "$(printf 'n%.0s' {1..255})=$tmp/zero" \
            "$(printf '\xc3\xa4%.0s' {1..100})=$tmp/tables" "$(printf '\xc3\xa4%.0s' {1..99})x=$tmp/zero"
}

# edited MACHINE PERL: a copy of the directory whose machine.json, as $j, went through the expression
edited() {
    rm -rf "$tmp/bad"
    cp -r --sparse=always "$1" "$tmp/bad" && perl -MJSON::PP -e 'my $p = $ARGV[0]; open my $in, "<", $p or die; local $/;
        my $j = decode_json(<$in>); eval($ARGV[1]); die $@ if $@; open my $out, ">", $p or die; print $out encode_json($j)' \
        "$tmp/bad/machine.json" "$2"
}

same_machine() { # DIR: as $out, but for the facts of the stream
    diff -r "$1/ram" "$out/ram" && cmp "$1/state" "$out/state" &&
        perl -MJSON::PP -e 'my @j = map { open my $in, "<", $_ or die; local $/; decode_json(<$in>) } @ARGV;
            delete $_->{stream} for @j; my $c = JSON::PP->new->canonical->pretty; my @t = map { $c->encode($_) } @j;
            print @t if $t[0] ne $t[1]; exit($t[0] ne $t[1])' "$1/machine.json" "$out/machine.json" && [ ! -e "$out.part" ]
}

# >>what is moved

moved() { # DIR OPTION...
    both 0 0 "$@" && same_machine "$1"
}

twice() {
    moved "$tmp/vm" || return 1
    rm -rf "$tmp/copy"
    mv "$out" "$tmp/copy" && moved "$tmp/copy" && same_machine "$tmp/vm"
}

names_are_files() {
    moved "$tmp/vm" || return 1
    local got
    got=$(cd "$out" && find . -type f | sort | tr '\n' ' ')
    [ "$got" = './machine.json ./ram/%2E.%2Fup ./ram/%2Ehidden ./ram/%2From%40etc%2Facpi%2Ftables ./ram/a%2541%20b ./ram/pc.ram ./state ' ] ||
        { echo "files: $got"; return 1; }
}

holes_stay() {
    moved "$tmp/vm" || return 1
    local kib
    kib=$(du -k "$out/ram/pc.ram" | cut -f1)
    [ "$kib" -lt 2048 ] || { echo "24 MiB of which 5 pages are not zero take $kib KiB"; return 1; }
}

# When the source has let the machine go, what looks for holes in its RAM fails.
search_fails() {
    local sink_env=("${traced[@]}" -o "$tmp/calls" -e trace=lseek -e inject=lseek:error=EIO)
    moved "$tmp/vm" && grep -q 'SEEK_DATA.*EIO' "$tmp/calls"
}

# What the user may have on the disk is less than what comes.
over_quota() {
    local sink_env=("${traced[@]}" -o "$tmp/calls" -e trace=fallocate -e inject=fallocate:error=EDQUOT)
    both 5 3 "$tmp/vm" && says "$tmp/sink.err" 'quota exceeded' "$out.part/ram/" && says "$tmp/source.err" 'gave up' &&
        nothing_left && grep -q EDQUOT "$tmp/calls" # version 1 has no words for it
}

facts() {
    both 0 0 "$tmp/vm" --json && json "$out/machine.json" '$j->{stream}{rounds} == 1 && !$j->{stream}{return_path}
        && $j->{stream}{messages} >= 3 && $j->{stream}{bytes} > $j->{state}{length} && $j->{format} eq "rmig-qemu"
        && $j->{version} == 1 && $j->{machine} eq "pc-q35-7.2" && @{$j->{blocks}} == 5' &&
        json "$tmp/source.out" '$j->{ok} && $j->{exit_code} == 0 && !defined $j->{error} && $j->{fabric} eq "ofi"
        && $j->{blocks} == 5 && $j->{stats}{bytes_zero} > 20e6 && $j->{stats}{rounds} == 1'
}

sink_json() {
    sink_options=(--json)
    both 0 0 "$tmp/vm"
    local rc=$?
    sink_options=()
    [ $rc = 0 ] && json "$tmp/sink.out" '$j->{ok} && $j->{ram_bytes} == 25165824 + 262144 + 8192
        && $j->{stats}{registrations} > 0 && $j->{machine} eq "pc-q35-7.2"'
}

all_subsections() {
    edited "$tmp/vm" '$j->{page_bits} = 16; $j->{uuid} = undef; $j->{capabilities} = ["x-ignore-shared"];
        $_->{guest_address} = 4096 * $i++ for @{$j->{blocks}}; $j->{section_id} = 4294967295' && moved "$tmp/bad"
}

# >>bad directories

refused() { # STATUS WORD... -- PROGRAM ARGUMENT...
    local status=$1 words=() got
    shift
    while [ "$1" != -- ]; do
        words+=("$1")
        shift
    done
    shift
    timeout -k 5 600 "$@" >"$tmp/refused.out" 2>"$tmp/refused"
    got=$?
    [ $got = "$status" ] || { echo "exit status $got, $status wanted"; cat "$tmp/refused"; return 1; }
    says "$tmp/refused" "${words[@]}"
}

bad_directory() { # PERL WORD...
    local perl=$1
    shift
    edited "$tmp/vm" "$perl" && refused 3 "$@" -- "$source_program" "${over[@]}" "$tmp/bad" 127.0.0.1:1
}

bad_file() { # SHELL WORD...: the command runs in the directory
    local command=$1
    shift
    edited "$tmp/vm" '1' && (cd "$tmp/bad" && eval "$command") &&
        refused 3 "$@" -- "$source_program" "${over[@]}" "$tmp/bad" 127.0.0.1:1
}

bad_directories() {
    check 'a directory that is none' refused 3 "$tmp/none" 'No such file' -- "$source_program" "${over[@]}" "$tmp/none" 127.0.0.1:1
    check 'machine.json is no JSON' bad_file 'echo "{" >machine.json' machine.json line
    check 'no machine.json' bad_file 'rm machine.json' "$tmp/bad/machine.json" 'cannot be read: No such file'
    check 'machine.json of another program' bad_directory '$j->{format} = "x"' machine.json '"format"'
    check 'machine.json of an unknown version' bad_directory '$j->{version} = 2' '"version" is 2' 'reads version 1'
    check 'machine.json without a machine' bad_directory 'delete $j->{machine}' '"machine" is missing'
    check 'a machine name that is too long' bad_directory '$j->{machine} = "m" x 256' '"machine" has 256 bytes' 255
    check 'machine.json without blocks' bad_directory '$j->{blocks} = []' '"blocks" is missing'
    check 'a block without a name' bad_directory '$j->{blocks}[1]{name} = ""' '"name" is missing'
    check 'a block without a length' bad_directory 'delete $j->{blocks}[1]{length}' '"length" is missing'
    check 'a block of a negative length' bad_directory '$j->{blocks}[1]{length} = -1' '"length" is missing, or no number from 1'
    check 'a block named twice' twice_named
    check 'a capability that is not known' bad_directory '$j->{capabilities} = ["mapped-ram"]' 'capability "mapped-ram" is not known'
    check 'a uuid that is none' bad_directory '$j->{uuid} = "x"' '"uuid" is missing, or neither'
    check 'page bits that are none' bad_directory '$j->{page_bits} = 99' '"page_bits" is missing, or no number from 10 to 30'
    check 'a RAM file of another length' bad_file 'truncate -s 8192 ram/pc.ram' ram/pc.ram '8192 bytes' 25165824
    check 'a RAM file outside the directory' bad_directory '$j->{blocks}[0]{file} = "../vm/ram/pc.ram"' \
        'of pc.ram is "../vm/ram/pc.ram"; must be "ram/pc.ram"'
    check 'a state file outside the directory' bad_directory '$j->{state}{file} = "../vm/state"' 'must be "state"'
    check 'a RAM file that is a link' bad_file 'ln -sf ../../vm/ram/pc.ram ram/pc.ram' ram/pc.ram 'symbolic link'
    check 'a state file that is a link' bad_file 'ln -sf ../vm/state state' "$tmp/bad/state" 'symbolic link'
    check 'a missing RAM file' bad_file 'rm ram/pc.ram' ram/pc.ram 'No such file'
    check 'a RAM file that is a directory' bad_file 'rm ram/pc.ram; mkdir ram/pc.ram' ram/pc.ram
    check 'a missing state file' bad_file 'rm state' "$tmp/bad/state" 'No such file'
    check 'a state file of another length' bad_file 'echo >>state' "$tmp/bad/state" machine.json
    check 'state that was cut' cut_state
}

twice_named() {
    edited "$tmp/vm" '$j->{blocks}[4] = {%{$j->{blocks}[3]}}' &&
        refused 2 '.hidden' -- "$source_program" "${over[@]}" "$tmp/bad" 127.0.0.1:1
}

cut_state() {
    edited "$tmp/vm" '$j->{state}{length} -= 1' && truncate -s -1 "$tmp/bad/state" &&
        refused 3 "$tmp/bad/state" 'not whole' -- "$source_program" "${over[@]}" "$tmp/bad" 127.0.0.1:1
}

# >>usage, and where the sink writes

usage_errors() {
    local to=("$sink_program" "${over[@]}") from=("$source_program" "${over[@]}")
    check 'a sink without --listen' refused 2 --listen -- "${to[@]}" "$out"
    check 'a sink without a directory' refused 2 DIR -- "${to[@]}" --listen 127.0.0.1:0
    check 'a source without an address' refused 2 HOST:PORT -- "${from[@]}" "$tmp/vm"
    check 'a source with too many arguments' refused 2 extra -- "${from[@]}" "$tmp/vm" 127.0.0.1:1 extra
    check 'an unknown fabric' refused 2 sneakernet ofi -- "$source_program" --fabric sneakernet "$tmp/vm" 127.0.0.1:1
    check 'an unknown provider' refused 4 pigeon -- "$source_program" --fabric ofi --provider pigeon "$tmp/vm" 127.0.0.1:1
    check 'the extension of rmig' refused 2 extension 'version 1' -- "${from[@]}" --set extension=on "$tmp/vm" 127.0.0.1:1
    check 'an unknown parameter' refused 2 chunk-zize -- "${to[@]}" --set chunk-zize=1M --listen :0 "$out"
    check '--timeout of no seconds' refused 2 '--timeout 0' -- "${to[@]}" --timeout 0 --listen :0 "$out"
    check '--help of the sink' help_of "$sink_program"
    check '--help of the source' help_of "$source_program"
}

help_of() { "$1" --help >"$tmp/help" && says "$tmp/help" 'Exit status' --set --fabric --timeout; }

existing_directory() {
    mkdir -p "$tmp/precious"
    refused 3 "$tmp/precious" exists -- "$sink_program" "${over[@]}" --listen 127.0.0.1:0 "$tmp/precious" &&
        [ -z "$(ls -A "$tmp/precious")" ] && [ ! -e "$tmp/precious.part" ]
}

# Something comes to the place of what is being received: the source has let the machine go, so it is kept.
name_is_taken() {
    start_sink && mkdir -p "$out/theirs" && source_from "$tmp/vm" || return 1
    ends "$sink" 6 5 qemu_sink && says "$tmp/sink.err" 'cannot become' "$out.part holds the machine" &&
        [ -d "$out/theirs" ] && diff -r "$tmp/vm/ram" "$out.part/ram" && cmp "$tmp/vm/state" "$out.part/state"
}

directory_taken() { # by another sink
    start_sink || return 1
    refused 3 "$out.part" another -- "$sink_program" "${over[@]}" --listen 127.0.0.1:0 "$out/"
    local rc=$?
    [ -d "$out.part" ] && [ $rc = 0 ] && source_from "$tmp/vm" && wait "$sink" && same_machine "$tmp/vm"
}

missing_parent() { refused 3 "$tmp/no/where" 'No such file' -- "$sink_program" "${over[@]}" --listen 127.0.0.1:0 "$tmp/no/where"; }

too_large() {
    sink_options=(--max-size 24M)
    both 5 5 "$tmp/vm"
    local rc=$?
    sink_options=()
    [ $rc = 0 ] && says "$tmp/sink.err" --max-size 131072 && nothing_left
}

too_much_state() {
    sink_options=(--max-size $((25165824 + 262144 + 8192 + 100000)))
    both 5 6 "$tmp/vm"
    local rc=$?
    sink_options=()
    [ $rc = 0 ] && says "$tmp/sink.err" 'device state' --max-size 'no end is recognised' "$out.part is kept" &&
        json "$out.part/machine.json" '$j->{state}{length} < 120000' &&
        refused 3 'not whole' -- "$source_program" "${over[@]}" "$out.part" 127.0.0.1:1
}

# >>peers that go wrong

# A migration slow enough to be hit in the middle: 32 MiB at 4 MiB/s. io-timeout 5 s bounds what the other end may take; a
# silent version 1 source is granted the time of all RAM at 16 MB/s on top.
start_slow() {
    start_sink --set io-timeout=5s || return 1
    timeout -k 5 600 "$source_program" "${over[@]}" --set max-bandwidth=4M --set io-timeout=5s "$tmp/large" "$address" \
        >"$tmp/source.out" 2>"$tmp/source.err" &
    source=$!
    wait_for "[ -e $out.part/ram/pc.ram ]" && sleep 0.7
}

# ends PID STATUS SECONDS WHO: within so many seconds
ends() {
    local begin=$SECONDS status
    wait "$1"
    status=$?
    [ $status = "$2" ] || { echo "$4 ended with $status, $2 wanted"; cat "$tmp/source.err" "$tmp/sink.err"; return 1; }
    [ $((SECONDS - begin)) -le $(($3 * slack)) ] || { echo "$4 took $((SECONDS - begin)) s"; return 1; }
}

stop_sink() { # SIGNAL
    start_slow || return 1
    local victim rc
    victim=$(real_pid "$sink")
    kill "-$1" "$victim"
    ends "$source" 5 6 qemu_source
    rc=$?
    kill -KILL "$victim" 2>/dev/null
    wait "$sink"
    [ $rc = 0 ] && [ -s "$tmp/source.err" ] && [ ! -e "$out" ] &&
        { [ "$1" != STOP ] || says "$tmp/source.err" 'for 5s (io-timeout)'; }
}

stop_source() { # SIGNAL
    start_slow || return 1
    local victim rc
    victim=$(real_pid "$source")
    kill "-$1" "$victim"
    ends "$sink" 5 9 qemu_sink
    rc=$?
    kill -KILL "$victim" 2>/dev/null
    wait "$source"
    [ $rc = 0 ] && [ -s "$tmp/sink.err" ] && nothing_left && { [ "$1" != STOP ] || says "$tmp/sink.err" '(io-timeout)'; }
}

cancel() { # WHO SIGNAL
    start_slow || return 1
    kill "-$2" "$(real_pid "${!1}")"
    if [ "$1" = source ]; then
        ends "$source" 7 6 qemu_source && ends "$sink" 5 6 qemu_sink && nothing_left
    else
        ends "$sink" 7 6 qemu_sink && ends "$source" 5 6 qemu_source && nothing_left
    fi
}

cancel_waiting() {
    start_sink || return 1
    kill -INT "$(real_pid "$sink")"
    ends "$sink" 7 3 qemu_sink && nothing_left
}

nobody_comes() {
    start_sink --timeout 1 && ends "$sink" 4 6 qemu_sink && says "$tmp/sink.err" --timeout 'no source' && nothing_left
}

too_slow() {
    start_sink --timeout 10 || return 1
    source_from "$tmp/large" --set max-bandwidth=128K
    local sent=$?
    ends "$sink" 5 6 qemu_sink && says "$tmp/sink.err" --timeout 'did not end' && nothing_left && [ $sent = 5 ] || return 1
    start_sink || return 1
    source_from "$tmp/large" --set max-bandwidth=128K --timeout 10
    sent=$?
    ends "$sink" 5 6 qemu_sink && [ $sent = 5 ] && says "$tmp/source.err" --timeout && nothing_left
}

# The time of --timeout runs out before anything is connected: in the first look at a file, delayed by more than that.
late_reading() { # FILE: a machine; what is looked at is FILE or below it
    local file=$1
    [ ! -d "$file" ] || file+=/state
    refused 3 "$1 was not loaded within the 2 s of --timeout" -- "${traced[@]}" -o /dev/null -P "$file" \
        -e trace=read,pread64 -e inject=read,pread64:delay_enter=4000000:when=1 \
        "$source_program" "${over[@]}" --timeout 2 "$1" 127.0.0.1:1
}

late_reading_of_both() {
    mapped save "$tmp/vm" "$tmp/saved" && late_reading "$tmp/saved" && late_reading "$tmp/vm"
}

late_copying() {
    cp "$tmp/vm/state" "$snap" && refused 4 'before --offset' 'within the 2 s of --timeout' -- "${traced[@]}" -o /dev/null \
        -e trace=lseek -e inject=lseek:delay_enter=4000000:when=1 \
        "$sink_program" "${over[@]}" --timeout 2 --listen 127.0.0.1:0 --offset 64K --snapshot "$snap" && no_part &&
        cmp "$snap" "$tmp/vm/state"
}

nobody_listens() {
    start_sink || return 1 # a port that is free for sure: its owner leaves
    kill -INT "$(real_pid "$sink")"
    wait "$sink"
    source_from "$tmp/vm"
    [ $? = 4 ] && says "$tmp/source.err" "connecting to $address failed" && ! grep -q handover "$tmp/source.err"
}

after_a_kill() { # what a killed sink left is named, and in nobody's way once it is gone
    start_slow || return 1
    kill -KILL "$(real_pid "$sink")"
    wait "$sink" "$source"
    [ -d "$out.part" ] && refused 3 "$out.part" 'was killed' 'remove it' -- \
        "$sink_program" "${over[@]}" --listen 127.0.0.1:0 "$out" && rm -rf "$out.part" && moved "$tmp/vm"
}

# rmig_migrate is a version 1 source too, but its stream is none of QEMU's.
foreign_source() {
    local other
    other=$(dirname "$source_program")/rmig_migrate
    start_sink || return 1
    timeout -k 5 600 "$other" send --connect "$address" --provider tcp --set extension=off --block "ram=$tmp/tables" \
        >"$tmp/source.out" 2>"$tmp/source.err"
    [ $? = 5 ] || { cat "$tmp/source.err"; return 1; }
    ends "$sink" 5 6 qemu_sink && says "$tmp/sink.err" 'offset 0' 'not a migration stream' && nothing_left
}

# raw ADDRESS [STREAM [round [STATE [SECONDS]]]]: a source of version 1 whose stream is the bytes of a file, sent as one
# message; with "round" it then moves its RAM; STATE follows, and it leaves, with SECONDS so much later. It succeeds when all
# was delivered.
make_raw_source() {
    cat >"$tmp/raw.c" <<'END'
#define RMIG_IMPLEMENTATION
#include "rmig.h"
#include "rmig_fabric_ofi.h"
int main(int argc, char **argv) {
    static uint8_t ram[4096], stream[65536];
    struct rmig_error err;
    struct rmig_config cfg = {.trace = NULL};
    struct rmig_ofi_options ofi = {.provider = "tcp"};
    struct rmig_block_desc block = {.name = "a", .host = ram, .length = sizeof ram};
    struct rmig_source *source = NULL;
    uint32_t index;
    FILE *f = argc > 2 ? fopen(argv[2], "rb") : NULL;
    size_t n = f == NULL ? 0 : fread(stream, 1, sizeof stream, f);
    struct rmig_fabric *fabric = rmig_ofi_open(&ofi, &err);
    rmig_set_extension(&cfg, 0, NULL);
    rmig_set_param(&cfg, "zero-detect", "off", &err);
    rmig_set_io_timeout(&cfg, 3000000000u, NULL);
    int rc = fabric == NULL || (argc > 2 && n == 0) ? -1 : rmig_source_open(fabric, &cfg, &source, &err);
    if (rc == RMIG_OK && (rc = rmig_source_add_block(source, &block, &index)) == RMIG_OK &&
        (rc = rmig_source_connect(source, argv[1])) == RMIG_OK && argc > 2 &&
        (rc = rmig_source_put(source, stream, n)) == RMIG_OK && (rc = rmig_source_flush(source)) == RMIG_OK &&
        argc > 3 && (rc = rmig_source_begin_round(source)) == RMIG_OK &&
        (rc = rmig_source_save_range(source, 0, 0, sizeof ram)) == RMIG_OK)
        rc = rmig_source_end_round(source);
    if (rc == RMIG_OK && argc > 4) {
        n = (f = fopen(argv[4], "rb")) == NULL ? 0 : fread(stream, 1, sizeof stream, f);
        if (n > 0 && (rc = rmig_source_put(source, stream, n)) == RMIG_OK)
            rc = argc > 5 ? rmig_source_flush(source) : rmig_source_finish(source);
    }
    if (rc != RMIG_OK && source != NULL)
        printf("raw: %s\n", rmig_source_error(source)->text);
    if (argc > 5)
        sleep((unsigned)atoi(argv[5]));
    rmig_source_close(source);
    rmig_fabric_close(fabric);
    return rc == RMIG_OK ? 0 : 1;
}
END
    # shellcheck disable=SC2046 # a list of flags
    cc -std=c11 -O1 -I. "$tmp/raw.c" -o "$tmp/raw" $(pkg-config --cflags --libs libfabric) -pthread
}

# Calls that take their time: fsync the first time, and the first send after the state was read a second time.
make_slow_calls() {
    cat >"$tmp/slow.c" <<'END'
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>
static int ends_of_files, fsyncs, sends;
static void *next(const char *name) { return dlsym(RTLD_NEXT, name); }
static void wait_for(const char *variable) {
    const char *seconds = getenv(variable);
    if (seconds != NULL)
        sleep((unsigned)atoi(seconds));
}
static void before_send(void) {
    if (ends_of_files >= 3 && sends++ == 0)
        wait_for("SLOW_SEND");
}
int fsync(int fd) {
    if (fsyncs++ == 0)
        wait_for("SLOW_FSYNC");
    return ((int (*)(int))next("fsync"))(fd);
}
ssize_t read(int fd, void *p, size_t n) {
    ssize_t got = ((ssize_t(*)(int, void *, size_t))next("read"))(fd, p, n);
    ends_of_files += got == 0;
    return got;
}
ssize_t send(int fd, const void *p, size_t n, int flags) {
    before_send();
    return ((ssize_t(*)(int, const void *, size_t, int))next("send"))(fd, p, n, flags);
}
ssize_t sendmsg(int fd, const struct msghdr *m, int flags) {
    before_send();
    return ((ssize_t(*)(int, const struct msghdr *, int))next("sendmsg"))(fd, m, flags);
}
ssize_t writev(int fd, const struct iovec *v, int n) {
    before_send();
    return ((ssize_t(*)(int, const struct iovec *, int))next("writev"))(fd, v, n);
}
END
    cc -std=c11 -O1 -shared -fPIC "$tmp/slow.c" -o "$tmp/slow.so"
}

# ASan wants to be loaded first, but can do without.
slow_env() { # NAME=SECONDS
    printf '%s\n' "LD_PRELOAD=$tmp/slow.so" "ASAN_OPTIONS=verify_asan_link_order=0${ASAN_OPTIONS:+:$ASAN_OPTIONS}" "$1"
}

head='QEVM\0\0\0\3\7\0\0\0\1m'
ram='\1\0\0\0\1\3ram\0\0\0\0\0\0\0\4\0\0\0\0\0\0\20\4\1a\0\0\0\0\0\0\20\0'
hook='\0\0\0\0\0\0\0\200'
eos='\0\0\0\0\0\0\0\20\176\0\0\0\1'
end="$eos"'\3\0\0\0\1'"$eos"
device='\4\0\0\0\7device'
description='\0\6\0\0\0\21{"devices": [{}]}'

stream_refused() { # ROUND STREAM WORD...: ROUND is "round" or nothing; STREAM for printf
    local round=$1
    # shellcheck disable=SC2059 # it is a format on purpose
    printf "$2" >"$tmp/stream"
    shift 2
    start_sink --set io-timeout=3s || return 1
    # shellcheck disable=SC2086 # nothing, or a word
    timeout -k 5 600 "$tmp/raw" "$address" "$tmp/stream" $round
    ends "$sink" 5 9 qemu_sink && says "$tmp/sink.err" "$@" && nothing_left
}

# >>when the source may have completed the migration

slow_disk() { # --timeout strikes while the machine is brought to the disk
    mapfile -t sink_env < <(slow_env SLOW_FSYNC=20)
    sink_options=(--timeout 15)
    moved "$tmp/vm"
    local rc=$?
    sink_options=()
    sink_env=()
    return $rc
}

slow_disk_cancelled() { # and the source has left
    mapfile -t sink_env < <(slow_env SLOW_FSYNC=3)
    start_sink
    local rc=$?
    sink_env=()
    [ $rc = 0 ] && source_from "$tmp/vm" && wait_for "[ -e $out.part/machine.json ]" || return 1
    kill -TERM "$(real_pid "$sink")"
    ends "$sink" 0 5 qemu_sink && same_machine "$tmp/vm"
}

slow_last_send() { # --timeout strikes while the last bytes leave: the sink has the machine, or keeps it
    local ends vars
    edited "$tmp/vm" '$j->{state}{length} = 34' && printf "$device$description" >"$tmp/bad/state" || return 1
    mapfile -t vars < <(slow_env SLOW_SEND=20)
    start_sink || return 1
    timeout -k 5 600 env "${vars[@]}" "$source_program" "${over[@]}" --timeout 15 "$tmp/bad" "$address" \
        >"$tmp/source.out" 2>"$tmp/source.err"
    ends=$?
    wait "$sink"
    ends+=" $?"
    case $ends in
        '0 0' | '6 0') same_machine "$tmp/bad" ;;
        '6 5') says "$tmp/sink.err" 'the source gave up' && nothing_left ;; # it heard so before it read the last bytes
        '6 6') says "$tmp/sink.err" 'holds the machine' && cmp "$tmp/bad/state" "$out.part/state" ;;
        *) echo "qemu_source and qemu_sink ended with $ends"; cat "$tmp/source.err" "$tmp/sink.err"; return 1 ;;
    esac
}

no_machine_json() {
    start_sink && mkdir "$out.part/machine.json" && source_from "$tmp/vm" || return 1
    ends "$sink" 6 5 qemu_sink && says "$tmp/sink.err" machine.json 'File exists' "$out.part is kept" 'is missing' &&
        diff -r "$tmp/vm/ram" "$out.part/ram" && cmp "$tmp/vm/state" "$out.part/state"
}

raw_delivers() { # STATE [SECONDS]
    printf "$head$ram$hook" >"$tmp/stream"
    printf "$1" >"$tmp/state"
    shift
    timeout -k 5 600 "$tmp/raw" "$address" "$tmp/stream" round "$tmp/state" "$@"
}

state_kept() { # STATE: what is in DIR.part
    printf "$1" | cmp - "$out.part/state"
}

no_inodes() {
    local out=$tmp/small/vm # root, vm.part, ram, ram/a, state
    sink_into "$out" && raw_delivers "$end$device$description" || return 1
    ends "$sink" 6 5 qemu_sink && says "$tmp/sink.err" machine.json 'No space left' "$out.part is kept" 'is missing' &&
        state_kept "$device$description" && [ -e "$out.part/ram/a" ]
}

# Either end says so, and the source keeps its machine: QEMU's protocol has no words for the other end.
full_disk() {
    local out=$tmp/small/vm
    sink_into "$out" && source_from "$tmp/large"
    [ $? = 5 ] && says "$tmp/source.err" 'gave up' && ends "$sink" 3 5 qemu_sink &&
        says "$tmp/sink.err" "$out.part/ram/" 'no room for' 'No space left on device' && [ -z "$(ls -A "$tmp/small")" ]
}

on_tmpfs() { # NAME OPTIONS COMMAND...
    mkdir -p "$tmp/small"
    if ! mount -t tmpfs -o "$2" tmpfs "$tmp/small" 2>"$tmp/mount"; then
        skip "$1" "$(cat "$tmp/mount")"
        return
    fi
    check "$1" "${@:3}"
    umount "$tmp/small"
}

cancel_with_all_state() {
    start_sink || return 1
    raw_delivers "$end$device$description" 3 &
    local raw=$!
    wait_for "[ -s $out.part/state ]" && sleep 0.3 || return 1
    kill -TERM "$(real_pid "$sink")"
    ends "$sink" 6 2 qemu_sink && says "$tmp/sink.err" cancelled 'holds the machine' "$out.part is kept" &&
        state_kept "$device$description" && json "$out.part/machine.json" '$j->{state}{length} == 34'
    local rc=$?
    wait "$raw"
    return $rc
}

no_description() {
    start_sink && raw_delivers "$end$device" || return 1
    ends "$sink" 6 5 qemu_sink && says "$tmp/sink.err" suppress-vmdesc 'ends after 11 bytes' "$out.part is kept" &&
        state_kept "$device" && json "$out.part/machine.json" '$j->{state}{length} == 11'
}

forgotten_source() {
    start_sink --timeout 15 && timeout -k 5 600 "$tmp/raw" "$address" || return 1
    ends "$sink" 4 5 qemu_sink && says "$tmp/sink.err" 'let go' --timeout 'no source began' && nothing_left
}

handovers() {
    check 'a source that came and left is not waited for' forgotten_source
    check 'a sink is cancelled when all state has come' cancel_with_all_state
    check 'a source without a description of its devices' no_description
    on_tmpfs 'a file system without inodes' nr_inodes=5,size=16M no_inodes
    on_tmpfs 'the disk is full, a directory' size=5M full_disk
    if ! make_slow_calls 2>"$tmp/cc"; then
        not_ok 'calls that take their time are built' "$(cat "$tmp/cc")"
        return
    fi
    check '--timeout while the machine is brought to the disk' slow_disk
    check 'a sink is cancelled while the machine is brought to the disk' slow_disk_cancelled
    check '--timeout while the last bytes leave' slow_last_send
}

# A directory whose name is as long as a name can be.
longest_directory() {
    local out
    out=$tmp/$(printf 'd%.0s' {1..255})
    moved "$tmp/vm" && [ -z "$(find "$tmp" -maxdepth 1 -name '*.part')" ]
}

# What a link leads to need not be there yet.
directory_by_a_link() {
    mkdir -p "$tmp/disk" && rm -rf "$tmp/disk/vm" "$out" && ln -sfn disk/vm "$tmp/link" || return 1
    sink_into "$tmp/link" && source_from "$tmp/vm" && wait "$sink" && [ -L "$tmp/link" ] && [ ! -e "$tmp/link.part" ] || return 1
    local out=$tmp/disk/vm
    same_machine "$tmp/vm" && refused 3 "$tmp/link" exists -- "$sink_program" "${over[@]}" --listen 127.0.0.1:0 "$tmp/link"
}

streams() {
    if ! make_raw_source 2>"$tmp/cc"; then
        not_ok 'a source of streams is built' "$(cat "$tmp/cc")"
        return
    fi
    check 'a VFIO device is refused' stream_refused '' "$head"'\1\0\0\0\7\6x/vfio' 'offset 14' START x/vfio 'id 7' VFIO
    check 'dirty bitmaps are refused' stream_refused '' "$head"'\1\0\0\0\7\14dirty-bitmap' START dirty-bitmap 'switch'
    check 'a device of early setup is refused' stream_refused '' "$head"'\4\0\0\0\7\12virtio-mem' FULL virtio-mem 'before the END'
    check 'post-copy is refused' stream_refused '' "$head"'\10\0\3\0\20' POSTCOPY_ADVISE postcopy-ram
    check 'a packaged stream is refused' stream_refused '' "$head"'\10\0\7\0\4' PACKAGED
    check 'mapped-ram is refused' stream_refused '' \
        "$head"'\5\32configuration/capabilities\0\0\0\1\0\0\0\1\12mapped-ram' mapped-ram files
    check 'a page in the stream is refused' stream_refused '' "$head$ram"'\0\0\0\0\0\0\0\10' 'offset 49' PAGE
    check 'bytes behind the hook word are refused' stream_refused '' "$head$ram$hook$eos" 'offset 57' 'follow the hook word'
    check 'a machine without a name is refused' stream_refused '' 'QEVM\0\0\0\3'"$ram$hook" 'names no machine'
    check 'a block whose name is not UTF-8 is refused' stream_refused '' \
        "$head"'\1\0\0\0\1\3ram\0\0\0\0\0\0\0\4\0\0\0\0\0\0\20\4\1\377\0\0\0\0\0\0\20\0' 'ram/%FF' UTF-8
    check 'a guest address that JSON cannot hold is refused' stream_refused '' \
        "$head"'\5\32configuration/capabilities\0\0\0\1\0\0\0\1\17x-ignore-shared'"$ram"'\377\0\0\0\0\0\0\0' \
        'block ram/a' 'guest address 0xff00000000000000'
    check 'a round before the list of blocks is refused' stream_refused round "$head" 'before it named its own'
    check 'a round without a hook word is refused' stream_refused round "$head$ram$eos" 'outside a hook'
    check 'a ping without a return path is refused' stream_refused '' "$head"'\10\0\1\0\0\10\0\2\0\4\0\0\0\1' 'no return path'
    check 'a source that leaves too early' stream_refused '' "$head$ram" 'went away'
    check 'a source that leaves after its RAM' stream_refused round "$head$ram$hook" 'offset 57' 'before the end of its stream'
    handovers
}

# >>snapshot files

snap=$tmp/snap

mapped() { timeout -k 5 600 "$mapped_program" "$@"; }

# Starts a sink into the file $snap; sets sink and address.
start_file_sink() { # OPTION...
    rm -f "$snap.part"
    sink_into "--snapshot=$snap" "$@"
}

# both_file SOURCE-STATUS SINK-STATUS DIR OPTION...: as both, into $snap.
both_file() { both_by start_file_sink "$@"; }

no_part() {
    [ ! -e "$snap.part" ] || { echo 'left behind:'; ls -l "$snap.part"; return 1; }
}

# What was at $snap before is there still, and nothing else.
older_stays() { [ "$(cat "$snap")" = older ] && no_part; }

# A machine goes into a file, is in it, and goes from there into a directory.
by_file() { # MACHINE OFFSET OPTION...
    local machine=$1 at="--offset=$2B"
    shift 2
    rm -rf "$snap" "$tmp/loaded" "$tmp/saved" "$tmp/x"
    sink_options=("$at" "$@")
    both_file 0 0 "$machine"
    local rc=$?
    sink_options=()
    [ $rc = 0 ] && no_part && mapped verify "$at" --quiet "$snap" && mapped save "$at" "$machine" "$tmp/saved" &&
        mapped diff "$at" "$tmp/saved" "$snap" && mapped extract "$at" "$snap" pc.ram "$tmp/x" &&
        cmp "$tmp/x" "$machine/ram/pc.ram" && mapped load "$at" "$snap" "$tmp/loaded" &&
        both 0 0 "$snap" "$at" "$@" && same_machine "$machine" && same_machine "$tmp/loaded"
}

other_facts() {
    edited "$tmp/vm" '$j->{page_bits} = 12; $j->{uuid} = undef; $j->{section_id} = 4294967295' && by_file "$tmp/bad" 0
}

holes_stay_in_files() {
    rm -f "$snap"
    both_file 0 0 "$tmp/vm" || return 1
    local kib
    kib=$(du -k "$snap" | cut -f1)
    [ "$kib" -lt 2048 ] || { echo "24 MiB of which 5 pages are not zero take $kib KiB"; return 1; }
}

shared_refused() {
    echo older >"$snap"
    edited "$tmp/vm" '$j->{capabilities} = ["x-ignore-shared"]; $_->{guest_address} = 4096 * $i++ for @{$j->{blocks}}' &&
        both_file 5 5 "$tmp/bad" && says "$tmp/sink.err" x-ignore-shared 'before 11.0' && older_stays
}

page_that_does_not_fit() {
    echo older >"$snap"
    edited "$tmp/vm" '$j->{page_bits} = 16' && both_file 5 5 "$tmp/bad" && says "$tmp/sink.err" .hidden 65536 && older_stays
}

file_options() {
    local to=("$sink_program" "${over[@]}" --listen 127.0.0.1:0) from=("$source_program" "${over[@]}")
    mkdir -p "$tmp/folder"
    refused 2 --threads --snapshot -- "${to[@]}" --threads 2 "$out" &&
        refused 2 --sparse --snapshot -- "${to[@]}" --sparse "$out" &&
        refused 2 DIR --snapshot exclude -- "${to[@]}" --snapshot "$snap" "$out" &&
        refused 2 --threads '1 to 64' -- "${to[@]}" --threads 65 --snapshot "$snap" &&
        refused 3 "$tmp/folder" 'not a regular file' -- "${to[@]}" --snapshot "$tmp/folder" &&
        refused 3 "$tmp/no/where.part" 'No such file' -- "${to[@]}" --snapshot "$tmp/no/where" &&
        refused 2 --offset 'is a directory' -- "${from[@]}" --offset 4K "$tmp/vm" 127.0.0.1:1 && no_part
}

# A file that is edited by PERL, which has its bytes in $f and the place of the first block's header in $at.
bad_file_content() { # PERL WORD...
    local perl=$1
    shift
    mapped info --json "$tmp/good" >"$tmp/info" && perl -MJSON::PP -e 'local $/; open my $in, "<", $ARGV[0] or die;
        my $at = decode_json(<$in>)->{info}{blocks}[0]{bitmap_offset} - 28; open $in, "<", $ARGV[1] or die; my $f = <$in>;
        eval($ARGV[3]); die $@ if $@; open my $out, ">", $ARGV[2] or die; print $out $f' \
        "$tmp/info" "$tmp/good" "$tmp/bad.snap" "$perl" &&
        refused 3 "$tmp/bad.snap" "$@" -- "$source_program" "${over[@]}" "$tmp/bad.snap" 127.0.0.1:1
}

other_page_size() { # of another target: QEMU would load it, and leave pages out
    edited "$tmp/large" '$j->{page_bits} = 13' && rm -f "$tmp/good" && mapped save "$tmp/bad" "$tmp/good" || return 1
    bad_file_content 'substr($f, $at + 4, 8) = pack "Q>", 4096' 'page size 4096' '13 bits'
}

bad_files() {
    rm -f "$tmp/good"
    mapped save "$tmp/vm" "$tmp/good" || { not_ok 'a snapshot to damage' 'it could not be made'; return; }
    check 'a file that was cut off' bad_file_content '$f = substr $f, 0, 20e6' 'cut off'
    check 'a file without its magic' bad_file_content 'substr($f, 0, 8) = "\0" x 8' 'magic'
    check 'a file whose device state was cut off' bad_file_content '$f = substr $f, 0, -5' 'device state' end
    check 'a file that is something else' refused 3 "$tmp/big" -- "$source_program" "${over[@]}" "$tmp/big" 127.0.0.1:1
    check 'a file of an unknown header' bad_file_content 'substr($f, $at, 4) = pack "N", 2' 'version 2'
    check 'a file with pages of two sizes' bad_file_content 'substr($f, $at + 4, 8) = pack "Q>", 8192' 'page size 4096' 8192
    check 'a file with pages of another size than its machine' other_page_size
    mkfifo "$tmp/pipe"
    check 'a pipe' refused 3 "$tmp/pipe" 'is a pipe' -- "$source_program" "${over[@]}" "$tmp/pipe" 127.0.0.1:1
    check 'a file at another offset' refused 3 "$tmp/vm/state" -- "$source_program" "${over[@]}" --offset 8K "$tmp/vm/state" 127.0.0.1:1
}

file_name_is_taken() {
    rm -f "$snap"
    start_file_sink && mkdir "$snap" && source_from "$tmp/vm" || return 1
    ends "$sink" 6 5 qemu_sink && says "$tmp/sink.err" 'cannot become' "$snap.part holds the machine" && [ -d "$snap" ] &&
        mapped verify --quiet "$snap.part"
    local rc=$?
    rm -rf "$snap" "$snap.part"
    return $rc
}

file_taken() { # by another sink
    rm -f "$snap"
    start_file_sink || return 1
    refused 3 "$snap.part" 'another process' -- "$sink_program" "${over[@]}" --listen 127.0.0.1:0 --snapshot "$snap" &&
        source_from "$tmp/vm" && wait "$sink" && mapped verify --quiet "$snap"
}

file_cancelled() { # WHO SIGNAL: in the middle
    echo older >"$snap"
    start_file_sink --set io-timeout=5s || return 1
    timeout -k 5 600 "$source_program" "${over[@]}" --set max-bandwidth=4M --set io-timeout=5s "$tmp/large" "$address" \
        >"$tmp/source.out" 2>"$tmp/source.err" &
    source=$!
    wait_for "[ -s $snap.part ]" && sleep 0.5 || return 1
    kill "-$2" "$(real_pid "${!1}")"
    if [ "$1" = source ]; then
        ends "$source" 7 6 qemu_source && ends "$sink" 5 6 qemu_sink && older_stays
    else
        ends "$sink" 7 6 qemu_sink && ends "$source" 5 6 qemu_source && older_stays
    fi
}

file_cancel_waiting() {
    echo older >"$snap"
    start_file_sink || return 1
    kill -TERM "$(real_pid "$sink")"
    ends "$sink" 7 3 qemu_sink && older_stays
}

too_large_for_max_size() {
    echo older >"$snap"
    sink_options=(--max-size 24M)
    both_file 5 5 "$tmp/vm"
    local rc=$?
    sink_options=()
    [ $rc = 0 ] && says "$tmp/sink.err" --max-size && older_stays
}

file_limit() { # of the process
    echo older >"$snap"
    sink_env=(prlimit --fsize=8388608)
    both_file 5 3 "$tmp/large"
    local rc=$?
    sink_env=()
    [ $rc = 0 ] && says "$tmp/sink.err" 'File too large' 33554432 && older_stays
}

# A file system of 20 MiB at $tmp/small.
no_room() {
    local snap=$tmp/small/s
    echo older >"$snap"
    both_file 5 3 "$tmp/large" && says "$tmp/sink.err" 'has room for 19M' '49M' --sparse && older_stays
}

room_enough() { # for what is not zero
    local snap=$tmp/small/s
    sink_options=(--sparse)
    both_file 0 0 "$tmp/vm"
    local rc=$?
    sink_options=()
    [ $rc = 0 ] && mapped verify --quiet "$snap"
}

full_when_the_source_has_left() { # one whose last section has no round, unlike QEMU's
    local snap=$tmp/small/s
    echo older >"$snap"
    sink_options=(--sparse)
    both_file 0 6 "$tmp/large"
    local rc=$?
    sink_options=()
    [ $rc = 0 ] && says "$tmp/sink.err" 'No space left' "$snap.part is kept" 'not even all pages' &&
        [ "$(cat "$snap")" = older ] && [ -s "$snap.part" ]
}

full_in_the_last_round() { # MIB WORD...
    local snap=$tmp/small/s mib=$1 sent
    shift
    echo older >"$snap"
    start_file_sink --sparse || return 1
    like_qemu "$mib"
    sent=$?
    [ $sent = 1 ] || { echo "the source ended with $sent, wanted 1"; cat "$tmp/like.out" "$tmp/sink.err"; return 1; }
    ends "$sink" 3 5 qemu_sink && says "$tmp/sink.err" "$@" && says "$tmp/like.out" 'the sink gave up' && older_stays
}

# like_qemu ADDRESS MIB: a source as QEMU is one, with a round in its last section too. Its RAM is random, of a fixed seed.
make_like_qemu() {
    cat >"$tmp/like.c" <<'END'
#define RMIG_IMPLEMENTATION
#include "rmig.h"
#include "rmig_fabric_ofi.h"
#include "rmig_qemu.h"
static struct rmig_source *source;
static int put_to(int rc, const uint8_t *p, int n) { return rc != RMIG_OK ? rc : rmig_source_put(source, p, (size_t)n); }
static int round_of(int rc, uint64_t bytes) {
    rc = rc != RMIG_OK ? rc : rmig_source_flush(source);
    rc = rc != RMIG_OK ? rc : rmig_source_begin_round(source);
    rc = rc != RMIG_OK ? rc : rmig_source_save_range(source, 0, 0, bytes);
    return rc != RMIG_OK ? rc : rmig_source_end_round(source);
}
int main(int argc, char **argv) {
    static uint8_t out[4096];
    struct rmig_error err;
    struct rmig_config cfg = {.trace = NULL};
    struct rmig_ofi_options ofi = {.provider = "tcp"};
    struct rmig_qemu_configuration c = {.machine = "pc-q35-10.0"};
    struct rmig_qemu_block block = {.name = "pc.ram", .length = strtoull(argc == 3 ? argv[2] : "1", NULL, 10) << 20};
    uint64_t *ram = malloc(block.length), x = 88172645463325252u;
    struct rmig_block_desc desc = {.name = block.name, .host = ram, .length = block.length};
    uint32_t index;
    struct rmig_fabric *fabric = rmig_ofi_open(&ofi, &err);
    if (argc != 3 || fabric == NULL || ram == NULL)
        return 2;
    for (uint64_t i = 0; i < block.length / 8; i++) {
        x ^= x << 13, x ^= x >> 7, x ^= x << 17;
        ram[i] = x;
    }
    rmig_set_extension(&cfg, 0, NULL);
    rmig_set_io_timeout(&cfg, 60000000000u, NULL);
    if (rmig_source_open(fabric, &cfg, &source, &err) != RMIG_OK)
        return 2;
    int rc = rmig_source_add_block(source, &desc, &index);
    rc = rc != RMIG_OK ? rc : rmig_source_connect(source, argv[1]);
    rc = put_to(rc, out, rmig_qemu_encode_start(out, sizeof out, &c));
    rc = put_to(rc, out, rmig_qemu_encode_section(out, sizeof out, RMIG_QEMU_SECTION_START, 5));
    rc = put_to(rc, out, rmig_qemu_encode_mem_size(out, sizeof out, block.length));
    rc = put_to(rc, out, rmig_qemu_encode_block(out, sizeof out, &block, 0));
    rc = put_to(rc, out, rmig_qemu_encode_word(out, sizeof out, RMIG_QEMU_WORD_HOOK));
    rc = round_of(rc, block.length);
    rc = put_to(rc, out, rmig_qemu_encode_word(out, sizeof out, RMIG_QEMU_WORD_EOS));
    rc = put_to(rc, out, rmig_qemu_encode_footer(out, sizeof out, 5));
    rc = put_to(rc, out, rmig_qemu_encode_command(out, sizeof out, RMIG_QEMU_COMMAND_SWITCHOVER_START, 0));
    rc = put_to(rc, out, rmig_qemu_encode_section(out, sizeof out, RMIG_QEMU_SECTION_END, 5));
    rc = put_to(rc, out, rmig_qemu_encode_word(out, sizeof out, RMIG_QEMU_WORD_HOOK));
    rc = round_of(rc, 4096);
    rc = put_to(rc, out, rmig_qemu_encode_word(out, sizeof out, RMIG_QEMU_WORD_EOS));
    rc = put_to(rc, out, rmig_qemu_encode_footer(out, sizeof out, 5));
    rc = put_to(rc, (const uint8_t *)"\4device", 7);
    rc = put_to(rc, out, rmig_qemu_encode_end(out, sizeof out, "{\"devices\": []}", 15));
    rc = rc != RMIG_OK ? rc : rmig_source_finish(source);
    printf("%s\n", rc == RMIG_OK ? "ok" : rmig_source_error(source)->text);
    rmig_source_close(source);
    rmig_fabric_close(fabric);
    return rc != RMIG_OK;
}
END
    # shellcheck disable=SC2046 # a list of flags
    cc -std=c11 -O1 -I. "$tmp/like.c" -o "$tmp/like" $(pkg-config --cflags --libs libfabric) -pthread
}

like_qemu() { timeout -k 5 600 "$tmp/like" "$address" "$1" >"$tmp/like.out" 2>&1; } # MIB

rounds_like_qemu() { # and what the stream says goes into the file
    rm -f "$snap"
    start_file_sink && like_qemu 8 && ends "$sink" 0 5 qemu_sink && no_part && mapped verify --quiet "$snap" &&
        mapped info --json "$snap" >"$tmp/info" && json "$tmp/info" '$j->{info}{switchover_start} && $j->{info}{section_id} == 5
            && $j->{info}{machine} eq "pc-q35-10.0" && $j->{info}{state_bytes} == 28 && $j->{info}{blocks}[0]{pages_set} == 2048' &&
        both 0 0 "$snap" && cmp "$out/ram/pc.ram" <(mapped extract "$snap" pc.ram "$tmp/x" && cat "$tmp/x")
}

slow_file() { # io-timeout of the sink does not count its own disk
    rm -f "$snap"
    mapfile -t sink_env < <(slow_env SLOW_FSYNC=3)
    start_file_sink --set io-timeout=5s && like_qemu 8 && ends "$sink" 0 5 qemu_sink && mapped verify --quiet "$snap"
    local rc=$?
    sink_env=()
    return $rc
}

slow_file_stopped() { # STATUS WORD OPTION...: by --timeout, or by a signal; the source keeps its machine
    local status=$1 word=$2
    shift 2
    echo older >"$snap"
    mapfile -t sink_env < <(slow_env SLOW_FSYNC=25)
    start_file_sink "$@"
    local rc=$? like
    sink_env=()
    [ $rc = 0 ] || return 1
    timeout -k 5 600 "$tmp/like" "$address" 8 >"$tmp/like.out" 2>&1 &
    like=$!
    wait_for "[ -s $snap.part ]" && sleep 1
    [ "$status" != 7 ] || kill -INT "$(real_pid "$sink")"
    ends "$sink" "$status" 30 qemu_sink || return 1
    wait "$like"
    [ $? = 1 ] && says "$tmp/like.out" 'the sink gave up' && says "$tmp/sink.err" "$word" && older_stays
}

file_without_end() {
    rm -f "$snap"
    start_file_sink && raw_delivers "$end$device" || return 1
    ends "$sink" 6 5 qemu_sink && says "$tmp/sink.err" suppress-vmdesc 'ends after 11 bytes' "$snap.part is kept" &&
        [ ! -e "$snap" ] && cmp <(tail -c 11 "$snap.part") <(printf "$device") || return 1
    mapped info --json "$snap.part" >"$tmp/info"
    json "$tmp/info" '!$j->{info}{whole} && $j->{info}{blocks}[0]{name} eq "a"' &&
        refused 3 "$snap.part" -- "$source_program" "${over[@]}" "$snap.part" 127.0.0.1:1 &&
        refused 3 "$snap.part exists" 'exit status 6' -- \
            "$sink_program" "${over[@]}" --listen 127.0.0.1:0 --snapshot "$snap" && [ -s "$snap.part" ]
}

# A node of its own for the loop device, with a name that is long and has to be quoted.
odd_node() { # DIR
    odd=$1/$(printf '%*s' 210 '' | tr ' ' x)" 'quoted' \$HOME"
    mknod "$odd" b "$((0x$(stat -c %t "$loop")))" "$((0x$(stat -c %T "$loop")))" && : <"$odd"
}

# On a device an older end may follow, so it is no snapshot there; what the message says makes of it what a file holds.
device_without_end() { # DEVICE
    local at command loop=$1
    for at in 0 5000; do
        rm -f "$snap" "$snap.part"
        start_file_sink --offset ${at}B && raw_delivers "$end$device" && ends "$sink" 6 5 qemu_sink && mv "$snap.part" "$tmp/no.end" || return 1
        snap=$loop start_file_sink --in-place --offset ${at}B && raw_delivers "$end$device" && ends "$sink" 6 5 qemu_sink &&
            says "$tmp/sink.err" suppress-vmdesc "$loop is kept" "first 8 bytes, at offset $at, are zeros" || return 1
        [ "$(od -An -tu8 -j$at -N8 "$loop")" -eq 0 ] || { echo 'the magic is there'; return 1; }
        command=$(sed -n 's/.*: \(device=.*\)FILE$/\1/p' "$tmp/sink.err")
        bash -c "$command$tmp/copied" && [ "$(stat -c %s "$tmp/copied")" = "$(stat -c %s "$tmp/no.end")" ] ||
            { echo "the command: $command"; return 1; }
        refused 5 'does not end in a description' -- "$mapped_program" verify --offset ${at}B "$tmp/copied" || return 1
        printf "$description" | tee -a "$tmp/no.end" >>"$tmp/copied"
        mapped diff --offset ${at}B "$tmp/no.end" "$tmp/copied" || return 1
    done
}

devices_without_end() {
    local odd name='a device whose name has to be quoted, of a source without a description of its devices'
    check 'a device, of a source without a description of its devices' device_without_end "$loop"
    if odd_node "$tmp" 2>"$tmp/err"; then
        check "$name" device_without_end "$odd"
    else
        skip "$name" "no device node can be made and opened: $(sed -n "\$s/.*: //p" "$tmp/err")"
    fi
}

file_cancelled_with_all_state() {
    rm -f "$snap"
    start_file_sink --trace || return 1
    raw_delivers "$end$device$description" 3 &
    local raw=$!
    wait_for "grep -q 'REGISTER_FINISHED' $tmp/sink.err" && sleep 0.6 || return 1
    kill -TERM "$(real_pid "$sink")"
    ends "$sink" 6 2 qemu_sink && says "$tmp/sink.err" cancelled 'holds the machine' "$snap.part is kept" &&
        mapped verify --quiet "$snap.part" && [ ! -e "$snap" ]
    local rc=$?
    wait "$raw"
    return $rc
}

# The memory of a sink fails when all has come. In place there is no FILE.part.
memory_fails_in_place() {
    mapped save "$tmp/vm" "$snap" && start_file_sink --in-place --trace || return 1
    raw_delivers "$end$device$description" 3 &
    local raw=$! rc
    wait_for "grep -q 'REGISTER_FINISHED' $tmp/sink.err" && sleep 0.6 || return 1
    kill -BUS "$(real_pid "$sink")"
    ends "$sink" 6 2 qemu_sink && says "$tmp/sink.err" 'disk or a quota is full' 'is kept, but may not be whole' "whole: $snap" && no_part &&
        ! grep -q '\.part' "$tmp/sink.err"
    rc=$?
    wait "$raw"
    return $rc
}

# Whatever the moment, FILE is the older one or the new one, whole, and what is unfinished is refused.
file_killed() { # TIMES
    local i torn=0
    rm -f "$tmp/first" "$snap"
    mapped save "$tmp/vm" "$tmp/first" && start_file_sink && like_qemu 16 && wait "$sink" && mv "$snap" "$tmp/second" || return 1
    for ((i = 0; i < $1; i++)); do
        cp --sparse=always "$tmp/first" "$snap"
        start_file_sink || return 1
        "$tmp/like" "$address" 16 >"$tmp/like.out" 2>&1 &
        wait_for "[ -s $snap.part ] || ! kill -0 $sink 2>/dev/null" && sleep "0.$(printf %03d $((RANDOM % 120)))"
        kill -KILL "$(real_pid "$sink")" 2>/dev/null
        wait "$sink" $! 2>/dev/null
        mapped diff "$snap" "$tmp/first" >/dev/null || mapped diff "$snap" "$tmp/second" >/dev/null ||
            { echo "run $i: FILE is neither the old one nor the new one"; return 1; }
        [ -s "$snap.part" ] || continue
        torn=$((torn + 1))
        if mapped verify --quiet "$snap.part" >/dev/null 2>&1; then # killed right before it got its name
            mapped diff "$snap.part" "$tmp/second" >/dev/null || { echo "run $i: a torn file was taken"; return 1; }
        fi
        refused 3 "$snap.part exists" 'remove it' -- \
            "$sink_program" "${over[@]}" --listen 127.0.0.1:0 --snapshot "$snap" || return 1
    done
    echo "$torn of $1 were torn"
    [ "$torn" -gt 0 ]
}

# What lies before --offset is another's.
keeps_what_lies_before() {
    head -c 300000 /dev/urandom >"$tmp/header" && cp "$tmp/header" "$snap" && echo more >>"$snap" || return 1
    start_file_sink --offset 300000B || return 1
    kill -TERM "$(real_pid "$sink")"
    ends "$sink" 7 3 qemu_sink && no_part && cmp "$snap" <(cat "$tmp/header" && echo more) || return 1
    by_file_at 300000 && cmp -n 300000 "$snap" "$tmp/header"
}

by_file_at() { # OFFSET OPTION...: into what is at $snap
    local at="--offset=$1B"
    shift
    sink_options=("$at" "$@")
    both_file 0 0 "$tmp/vm"
    local rc=$?
    sink_options=()
    rm -f "$tmp/saved"
    [ $rc = 0 ] && no_part && mapped save "$at" "$tmp/vm" "$tmp/saved" && mapped diff "$at" "$tmp/saved" "$snap"
}

file_by_a_link() {
    mkdir -p "$tmp/disk" && rm -f "$snap" && echo older >"$tmp/disk/s" && chmod 640 "$tmp/disk/s" && ln -s disk/s "$snap" || return 1
    by_file_at 0 && [ -L "$snap" ] && mapped verify --quiet "$tmp/disk/s" && [ "$(stat -c %a "$tmp/disk/s")" = 640 ] || return 1
    rm "$tmp/disk/s" && by_file_at 0 && [ -L "$snap" ] && mapped verify --quiet "$tmp/disk/s"
    local rc=$?
    rm -f "$snap"
    return $rc
}

in_place() {
    rm -f "$snap" && refused 3 "$snap" 'must be there' -- "$sink_program" "${over[@]}" --listen 127.0.0.1:0 --in-place --snapshot "$snap" &&
        refused 2 --in-place --snapshot -- "$sink_program" "${over[@]}" --listen 127.0.0.1:0 --in-place "$out" &&
        mapped save "$tmp/large" "$snap" && local inode && inode=$(stat -c %i "$snap") && by_file_at 0 --in-place &&
        [ "$(stat -c %i "$snap")" = "$inode" ] && by_file_at 5000 --in-place && by_file_at 5000 --in-place --direct
}

# Nothing that could be mistaken for a snapshot is left, and what lies before stays.
in_place_cancelled() {
    head -c 5000 /dev/urandom >"$tmp/header" && cp "$tmp/header" "$snap" && mapped save --offset 5000B "$tmp/vm" "$snap" || return 1
    start_file_sink --set io-timeout=2s --in-place --offset 5000B || return 1
    kill -TERM "$(real_pid "$sink")"
    ends "$sink" 7 3 qemu_sink && mapped verify --quiet --offset 5000B "$snap" || return 1 # none had begun
    start_file_sink --set io-timeout=2s --in-place --offset 5000B || return 1
    timeout -k 5 600 "$source_program" "${over[@]}" --set max-bandwidth=4M --set io-timeout=2s "$tmp/large" "$address" \
        >"$tmp/source.out" 2>"$tmp/source.err" &
    source=$!
    wait_for "[ \$(od -An -tu8 -j5000 -N8 $snap) = 0 ]" || return 1 # its magic is gone: it is being written
    refused 3 'another process' -- "$mapped_program" verify --offset 5000B "$snap" || return 1
    kill -HUP "$(real_pid "$sink")"
    ends "$sink" 7 6 qemu_sink && ends "$source" 5 6 qemu_source && no_part && cmp -n 5000 "$snap" "$tmp/header" || return 1
    mapped verify --offset 5000B "$snap" >"$tmp/info" 2>&1
    [ $? = 5 ] || { cat "$tmp/info"; return 1; }
}

on_a_device() {
    local snap=$loop
    by_file_at 0 --in-place && both 0 0 "$loop" && same_machine "$tmp/vm" && by_file_at 4096 --in-place --direct || return 1
    sink_options=(--in-place --offset=48M)
    both_file 5 3 "$tmp/vm"
    local rc=$?
    sink_options=()
    [ $rc = 0 ] && says "$tmp/sink.err" "$loop" 'the device has 67108864 bytes' || return 1
    sink_options=(--in-place --sparse --offset=24M)
    both_file 5 3 "$tmp/large"
    rc=$?
    sink_options=()
    [ $rc = 0 ] && says "$tmp/sink.err" 'the device is too short' 'state of the devices'
}

# Device state without its end is read as far as the device goes: here for a quarter of an hour at least.
endless_device() {
    local size i victim
    truncate -s 1T "$tmp/disk.img" && losetup -c "$loop" && rm -f "$tmp/saved" && mapped save "$tmp/vm" "$tmp/saved" &&
        mapped save --in-place "$tmp/vm" "$loop" && size=$(stat -c %s "$tmp/saved") &&
        dd if=/dev/zero of="$loop" bs=1 seek=$((size - 1)) count=1 conv=notrunc status=none || return 1
    "$source_program" "${over[@]}" "$loop" 127.0.0.1:1 >"$tmp/source.out" 2>"$tmp/source.err" &
    victim=$!
    wait_for "[ \$(sed -n 's/^rchar: //p' /proc/$victim/io) -ge 67108864 ]" || return 1
    kill -INT "$victim"
    for ((i = 0; i < 6000; i++)); do
        kill -0 "$victim" 2>/dev/null || break
        sleep 0.01
    done
    kill -KILL "$victim" 2>/dev/null
    ends "$victim" 7 60 qemu_source && says "$tmp/source.err" cancelled
    i=$?
    truncate -s 64M "$tmp/disk.img" && losetup -c "$loop" && return $i
}

files_and_their_places() {
    check 'what lies before --offset stays' keeps_what_lies_before
    check 'a link to a file is what it leads to' file_by_a_link
    check 'in place' in_place
    check 'in place, and cancelled' in_place_cancelled
    truncate -s 64M "$tmp/disk.img"
    if loop=$(losetup --find --show "$tmp/disk.img" 2>/dev/null); then
        check 'on a block device' on_a_device
        check 'a block device whose device state has no end' endless_device
    else
        loop=
        skip 'on a block device' 'no loop device can be had'
    fi
}

files_of_sources_like_qemu() {
    if ! make_like_qemu 2>"$tmp/cc"; then
        not_ok 'a source like QEMU is built' "$(cat "$tmp/cc")"
        return
    fi
    check 'a file, of a source whose last section has a round' rounds_like_qemu
    on_tmpfs 'the disk is full in the last round: the source keeps its machine' size=20M full_in_the_last_round 30 'No space left'
    on_tmpfs 'no room for the state of the devices' size=20M full_in_the_last_round 8 'for the state of the devices' 'has room for'
    check 'a sink into a file is killed, 20 times' file_killed 20
    [ -e "$tmp/slow.so" ] || return
    check 'a disk that takes its time in the last round' slow_file
    check 'interrupted in the last round' slow_file_stopped 7 cancelled
    check '--timeout in the last round' slow_file_stopped 5 --timeout --timeout 20
}

snapshots() {
    if [ ! -x "$mapped_program" ]; then
        skip 'snapshot files' 'mapped_ram is not built'
        return
    fi
    check 'a machine by way of a file' by_file "$tmp/vm" 0
    check 'a machine by way of a file, by three threads' by_file "$tmp/large" 0 --threads 3
    check 'a machine by way of a file, past the page cache' by_file "$tmp/large" 0 --threads 2 --direct
    check 'a machine by way of a file that begins inside' by_file "$tmp/vm" 5000
    check 'a machine by way of a file, with other facts' other_facts
    check 'holes stay holes in files' holes_stay_in_files
    check 'x-ignore-shared is refused for files' shared_refused
    check 'a block that is no multiple of a page is refused for files' page_that_does_not_fit
    check 'options of files' file_options
    bad_files
    check 'a file that another sink writes' file_taken
    check 'a directory comes to the place of a file' file_name_is_taken
    check 'the source is interrupted, a file' file_cancelled source INT
    check 'the sink is interrupted, a file' file_cancelled sink INT
    check 'the terminal of the sink is closed, a file' file_cancelled sink HUP
    files_and_their_places
    check 'a waiting sink is terminated, a file' file_cancel_waiting
    check 'RAM of more than --max-size, a file' too_large_for_max_size
    check 'a file that may not be so long' file_limit
    on_tmpfs 'no room for all RAM' size=20M no_room
    on_tmpfs 'room for what is not zero' size=20M room_enough
    on_tmpfs 'the disk is full when the source has left' size=20M full_when_the_source_has_left
    [ ! -x "$tmp/raw" ] || {
        check 'a file of a source without a description of its devices' file_without_end
        [ -z "$loop" ] || devices_without_end
        check 'a sink into a file is cancelled when all state has come' file_cancelled_with_all_state
        check 'the memory of a sink in place fails when all state has come' memory_fails_in_place
    }
    files_of_sources_like_qemu
}

# >>the list

make_machines || { not_ok 'machines to move' 'they could not be made'; done_testing; }
check 'a machine on demand' moved "$tmp/vm"
check 'a machine pinned whole' moved "$tmp/vm" --set pin-all=on
check 'a machine one chunk at a time' moved "$tmp/vm" --set register-ahead=0
check 'a machine without zero detection' moved "$tmp/vm" --set zero-detect=off
check 'a machine of one large block' moved "$tmp/large"
check 'what was received is sent again' twice
check 'every part of a configuration' all_subsections
check 'names of blocks become names of files' names_are_files
check 'holes stay holes' holes_stay
if strace -qq -o /dev/null -e trace=none true 2>/dev/null; then
    check 'holes cannot be looked for' search_fails
    check 'a quota is exceeded' over_quota
    check '--timeout while a machine is read' late_reading_of_both
    check '--timeout while what lies before --offset is copied' late_copying
else
    skip 'holes cannot be looked for, slow files' 'not installed: strace'
fi
check 'facts of the stream, and --json of the source' facts
check '--json of the sink' sink_json
bad_directories
usage_errors
check 'a directory that exists' existing_directory
check 'a directory that another sink writes' directory_taken
check 'a directory comes to the place of what is received' name_is_taken
check 'a directory without a parent' missing_parent
check 'RAM of more than --max-size' too_large
check 'device state of more than --max-size' too_much_state
check 'blocks whose names are too long for files' moved "$tmp/long"
check 'a directory of the longest name' longest_directory
check 'a link to a directory is what it leads to' directory_by_a_link
check 'machine.json cannot be created' no_machine_json
check 'the sink is killed' stop_sink KILL
check 'the source is killed' stop_source KILL
check 'the sink is frozen' stop_sink STOP
check 'the source is frozen' stop_source STOP
check 'the source is interrupted' cancel source INT
check 'the sink is interrupted' cancel sink INT
check 'the sink is terminated' cancel sink TERM
check 'the terminal of the sink is closed' cancel sink HUP
check 'the sink uses up its time on the processor' cancel sink XCPU
check 'a waiting sink is interrupted' cancel_waiting
check 'nobody comes' nobody_comes
check '--timeout in mid-migration, at either end' too_slow
check 'nobody listens' nobody_listens
check 'a killed sink leaves what can be named and removed' after_a_kill
streams
snapshots
if [ -x "$(dirname "$source_program")/rmig_migrate" ]; then
    check 'a source that is no QEMU' foreign_source
else
    skip 'a source that is no QEMU' 'rmig_migrate is not built'
fi
done_testing
