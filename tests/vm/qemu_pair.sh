#!/usr/bin/env bash
# qemu_pair.sh [--build BUILD] [--device rxe|siw] [--size MIB] [--data MIB] [--chunk MIB] [--running]
#     SOURCE DESTINATION [pin-all]
#
# To be run by run.sh: stock QEMU migrates to stock QEMU by RDMA; SOURCE and DESTINATION are versions, 7.2 (the one that
# is installed), 10.0 (BUILD/vm/qemu-10.0) or 11 (BUILD/vm/qemu-11), of which --chunk sets the chunk size. The RAM of
# both is compared byte by byte; --data of it are not zero, an eighth if it is not said. With --running the guest is
# counter_guest.S and runs on: each of its pages is checked at either end, and that it goes on at the destination.
# Prints what was measured; exit status 1 when anything is not as it must be.
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)

die() {
    echo "qemu_pair.sh: $*" >&2
    exit 1
}

build=build
device=rxe
size=64
data=
chunk=
running=
while [ $# -gt 0 ]; do
    case $1 in
    --build) build=$2 && shift ;;
    --device) device=$2 && shift ;;
    --size) size=$2 && shift ;;
    --data) data=$2 && shift ;;
    --chunk) chunk=$2 && shift ;;
    --running) running=yes ;;
    *) break ;;
    esac
    shift
done
[ $# = 2 ] || [ "$*" = "$1 $2 pin-all" ] || die "usage: qemu_pair.sh [OPTION...] SOURCE DESTINATION [pin-all]"
pin_all=${3:-}
case $device in
rxe) address=${RXE_ADDR:-} ;;
siw) address=${SIW_ADDR:-} ;;
*) die "--device is \"$device\", it must be rxe or siw" ;;
esac
[ -n "$address" ] || die "there is no $device device here: this runs inside the VM, by run.sh"
[[ $size =~ ^(6[4-9]|[7-9][0-9]|[1-9][0-9]{2,4})$ ]] || die "--size is \"$size\", it must be a number of MiB from 64 on"
[[ $data =~ ^[0-9]{0,5}$ ]] || die "--data is \"$data\", it must be a number of MiB"
[[ $chunk =~ ^[0-9]{0,4}$ ]] || die "--chunk is \"$chunk\", it must be a number of MiB, a power of two up to 1024"
[ -z "$chunk" ] || [ "$1 $2" = '11 11' ] || die "--chunk is for QEMU 11 at both ends, not $1 and $2"

program() { # VERSION
    case $1 in
    7.2) echo qemu-system-x86_64 ;;
    10.0) echo "$build/vm/qemu-10.0/run" ;;
    11) echo "$build/vm/qemu-11/run" ;;
    *) die "no QEMU \"$1\": there are 7.2, 10.0 and 11" ;;
    esac
}
src_program=$(program "$1") || exit 1
dst_program=$(program "$2") || exit 1
machine=pc-q35-7.2 # what all versions know
[ "$1" = "$2" ] && machine=q35

tmp=$(mktemp -d /dev/shm/pair.XXXXXX)
# shellcheck disable=SC2317 # called by the trap
tidy() {
    jobs -p | xargs -r kill 2>/dev/null
    wait
    rm -rf "$tmp"
}
trap tidy EXIT
trap 'exit 143' TERM INT

disk=()
if [ -n "$running" ]; then
    gcc -m32 -c "$here/counter_guest.S" -o "$tmp/guest.o" || die "no guest"
    ld -m elf_i386 -Ttext=0x7c00 --oformat=binary "$tmp/guest.o" -o "$tmp/guest.img" || die "no guest"
    # shellcheck disable=SC2054
    disk=(-drive "file=$tmp/guest.img,format=raw,if=none,id=disk,readonly=on" -device virtio-blk-pci,drive=disk)
fi

start() { # END PROGRAM OPTION...
    local end=$1 program=$2
    shift 2
    timeout -k 5 280 "$program" -machine "$machine,memory-backend=pc.ram" -accel tcg,tb-size=32 -m "${size}M" \
        -display none -nodefaults -no-user-config -qmp "unix:$tmp/$end.qmp,server=on,wait=off" \
        -object "memory-backend-file,id=pc.ram,size=${size}M,mem-path=$tmp/$end.ram,share=on" \
        -serial "file:$tmp/$end.serial" "${disk[@]}" "$@" </dev/null >"$tmp/$end.log" 2>&1 &
}

qmp() { # END COMMAND...
    local end=$1
    shift
    "$here/qmp.pl" --timeout 120 "$tmp/$end.qmp" "$@" && return
    echo "qemu_pair.sh: the $end's QEMU said:" >&2
    cat "$tmp/$end.log" >&2
    return 1
}
quietly() { qmp "$@" >/dev/null || exit 1; }

check_counters() { # END
    "$here/counter_check.pl" "$tmp/$1.ram" || die "the RAM of the $1 is wrong"
}

# >>migration

if [ -n "$running" ]; then
    truncate -s "${size}M" "$tmp/src.ram"
    start src "$src_program"
else
    "$here/ram_image.pl" "$tmp/src.ram" "$size" "${data:-$((size / 8))}" || die "no image"
    cp --sparse=always "$tmp/src.ram" "$tmp/wanted.ram"
    start src "$src_program" -S
fi
truncate -s "${size}M" "$tmp/dst.ram"
start dst "$dst_program" -S -incoming defer
if [ -n "$running" ]; then
    for ((i = 0; i < 600; i++)); do
        lines=$(grep -sc . "$tmp/src.serial")
        [ "${lines:-0}" -ge 3 ] && break
        sleep 0.1
    done
    [ $i -lt 600 ] || die "the guest has not counted within 60 s"
fi
if [ -n "$pin_all" ]; then
    for end in src dst; do
        quietly $end migrate-set-capabilities '{"capabilities": [{"capability": "rdma-pin-all", "state": true}]}'
    done
fi
if [ -n "$chunk" ]; then
    for end in src dst; do
        quietly $end migrate-set-parameters "{\"x-rdma-chunk-size\": $((chunk * 1048576))}"
    done
fi
quietly src migrate-set-parameters '{"max-bandwidth": 10000000000, "downtime-limit": 2000}'
quietly dst migrate-incoming "{\"uri\": \"rdma:$address:4444\"}"
quietly src migrate "{\"uri\": \"rdma:$address:4444\"}"
for end in src dst; do
    quietly $end wait
done
figures=$(qmp src query-migrate | perl -MJSON::PP -e '$m = decode_json(<>); printf "%d ms, downtime %d ms, %d rounds",
    @$m{qw(total-time downtime)}, $m->{ram}{"dirty-sync-count"}') || exit 1

# >>checks

if [ -z "$running" ]; then
    cmp "$tmp/wanted.ram" "$tmp/dst.ram" || die "the destination's RAM differs from the source's"
else
    read -r _ handed_over _ < <(check_counters src) || exit 1
    read -r _ first _ < <(check_counters dst) || exit 1
    cmp "$tmp/src.ram" "$tmp/dst.ram" || die "the destination's RAM differs from the source's"
    quietly dst cont
    sleep 2
    quietly dst stop
    read -r _ last _ < <(check_counters dst) || exit 1
    [[ $handed_over = "$first" && $last -gt $first ]] ||
        die "handed over in pass $handed_over, then pass $first, after two seconds pass $last"
    figures+=", guest at pass $first, $last two seconds later"
fi
for end in src dst; do
    quietly $end quit
done
echo "QEMU $1 to $2 over $device${pin_all:+, $pin_all}: $size MiB of RAM identical, $figures"
