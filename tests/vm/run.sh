#!/usr/bin/env bash
# run.sh BUILD [--memory MIB] [--cpus N] [--timeout SECONDS] [--no-siw] [--wire] -- COMMAND [ARG...]
#
# Runs COMMAND in a small virtual machine that has RDMA devices: rxe (RoCE) and siw (iWARP), in software. It is made by
# `fetch.sh BUILD vm`. COMMAND sees this host's files, in the same working directory, as root of the VM; /tmp, /run and
# /dev/shm are the VM's own, but for the folders there that hold the working directory, BUILD or COMMAND. Its output,
# stdout and stderr in one, comes on stdout. The exit status is COMMAND's; 125 says that the VM failed: it did not boot,
# or COMMAND did not end within --timeout.
#
# COMMAND gets PATH, HOME, CI, RMIG_*, CRITERION_*, BENCH_*, and the sanitizers' options; and of the VM:
#   RXE_DEV RXE_ADDR RXE_ADDR6    the device (rxe0), its IPv4 and IPv6 addresses: both ends of a test may use them
#   RXE_NET RXE_PEER_NET          the two ends of its pair of veth interfaces; the addresses are on the first
#   SIW_DEV ... SIW_PEER_NET      likewise, unless --no-siw
#   RXE_WIRE_DEV RXE_WIRE_ADDR    with --wire: a second device at the other end of the pair. What any program sends to
#   SIW_WIRE_DEV SIW_WIRE_ADDR    its IPv4 address crosses the pair: `tc qdisc add dev $RXE_NET root netem loss 1%` and
#                                 `ip link set $RXE_NET down` (for good) do to it what they say. Without, all loops
#                                 inside the device
# Without root on the host, COMMAND can read and write what the caller can: the VM's root is no more there.
set -uo pipefail

boot_seconds=300 # a boot takes 4 to 8, on a busy machine ten times that

say() { echo "run.sh: $*" >&2; }
die() {
    say "$@"
    exit 125
}

# >>arguments

usage() {
    sed -n '2s/^# /usage: /p' "$0" >&2
    exit 125
}

number() { # OPTION VALUE SMALLEST
    [[ $2 =~ ^[0-9]{1,6}$ ]] && [ "$2" -ge "$3" ] && return
    die "$1 is \"$2\", it must be a number from $3 on"
}

memory=1024
cpus=1
limit=300
siw=yes
wire=no
[ $# -ge 1 ] || usage
build=$1
shift
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    case $1 in
    --memory | --cpus | --timeout) [ $# -ge 2 ] || usage ;;&
    --memory) number "$1" "$2" 256 && memory=$2 && shift ;;
    --cpus) number "$1" "$2" 1 && cpus=$2 && shift ;;
    --timeout) number "$1" "$2" 1 && limit=$2 && shift ;;
    --no-siw) siw=no ;;
    --wire) wire=yes ;;
    *) usage ;;
    esac
    shift
done
[ $# -ge 2 ] || usage
shift
if [ ! -e "$build/vm/vmlinux" ] || [ ! -e "$build/vm/initrd" ]; then
    die "there is no VM in $build/vm: run fetch.sh $build vm"
fi
command -v qemu-system-x86_64 >/dev/null || die "qemu-system-x86_64 is not installed (Debian package qemu-system-x86)"
image=$(cd "$build/vm" && pwd -P)

# >>job

job=$(mktemp -d "${TMPDIR:-/tmp}/rmig-vm.XXXXXX") || die "no temporary folder"
vm=
# shellcheck disable=SC2317 # called by the trap
tidy() {
    [ -z "$vm" ] || kill "$vm" 2>/dev/null
    exec 3>&- 4>&-
    wait
    rm -rf "$job"
}
trap tidy EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

# What of PATH lies in a folder that the VM has one of its own of.
hidden_folder() {
    local folder
    for folder in /tmp /run /dev/shm; do
        [[ $1 == "$folder"/?* ]] || continue
        local rest=${1#"$folder"/}
        printf '%s\n' "$folder/${rest%%/*}"
    done
}

write_job() {
    mkdir "$job/in"
    {
        hidden_folder "$(pwd -P)"
        hidden_folder "$image"
        hidden_folder "$(readlink -f "$(command -v -- "$1")")"
    } | sort -u >"$job/in/keep"
    [ $siw = yes ] || : >"$job/in/no-siw"
    [ $wire = no ] || : >"$job/in/wire"
    {
        local name
        for name in $(compgen -e); do
            case $name in
            PATH | HOME | CI | RMIG_* | CRITERION_* | BENCH_* | [ALT]SAN_OPTIONS | UBSAN_OPTIONS)
                printf 'export %s=%q\n' "$name" "${!name}"
                ;;
            esac
        done
        # shellcheck disable=SC2016
        echo 'PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin'
        echo '. /run/rmig-vm.env'
        printf 'cd -- %q || exit 125\n' "$(pwd -P)"
        echo 'ulimit -l unlimited'
        printf 'exec --'
        printf ' %q' "$@"
        echo
    } >"$job/in/script"
}

# >>machine

# In QEMU's options a comma is written twice.
option() { printf '%s' "${1//,/,,}"; }

start() {
    rm -f "$job/output" "$job/status" "$job/console"
    mkfifo "$job/output" "$job/status" || die "no named pipes in $job"
    # shellcheck disable=SC2094
    exec 3<>"$job/status" 4<>"$job/output" 5<"$job/output" # opened so, none of the three waits for the other end
    cat <&5 3>&- 4>&- 5<&- &
    cat=$!
    exec 5<&-
    # The emulator does rep movsb a byte at a time, and pclmul slowly: without those flags rxe is 3 to 5 times faster.
    timeout -k 5 $((boot_seconds + limit + 60)) qemu-system-x86_64 -M q35 -accel tcg \
        -cpu max,-erms,-fsrm,-pclmulqdq -m "$memory" -smp "$cpus" -display none -nodefaults -no-user-config -no-reboot \
        -kernel "$image/vmlinux" -initrd "$image/initrd" -append "console=ttyS0 quiet panic=-1" \
        -chardev "file,id=console,path=$(option "$job/console")" -serial chardev:console \
        -device virtio-serial-pci -device virtio-rng-pci \
        -chardev "file,id=output,path=$(option "$job/output")" -device virtserialport,chardev=output,name=output \
        -chardev "file,id=status,path=$(option "$job/status")" -device virtserialport,chardev=status,name=status \
        -virtfs "local,path=/,mount_tag=host,security_model=none,multidevs=remap" \
        -virtfs "local,path=$(option "$job/in"),mount_tag=job,security_model=none,readonly=on" \
        </dev/null >"$job/qemu" 2>&1 3>&- 4>&- &
    vm=$!
}

# Kills what is left of the VM, after SECONDS; its output has then come whole.
end_vm() {
    local until=$((SECONDS + $1))
    while [ $SECONDS -lt $until ] && kill -0 "$vm" 2>/dev/null; do
        sleep 0.05
    done
    kill "$vm" 2>/dev/null
    wait "$vm" 2>/dev/null
    vm=
    exec 3>&- 4>&-
    wait "$cat"
}

# Waits for a word of the VM, until the second UNTIL; sets word: what the VM said, "gone", "late", or "unread" if nobody
# reads our output any more.
wait_word() {
    local piece said='' # what has come of the word when a read's time is over
    while [ $SECONDS -lt "$1" ]; do
        read -r -t 0.5 -u 3 piece && word=$said$piece && return
        said+=$piece
        word=unread
        kill -0 "$cat" 2>/dev/null || return
        kill -0 "$vm" 2>/dev/null && continue
        word=gone
        read -r -t 0.1 -u 3 piece && word=$said$piece
        return
    done
    word=late
}

show_logs() {
    local log
    for log in "$job/qemu" "$job/console"; do
        [ -s "$log" ] || continue
        say "the last lines of the VM's ${log##*/}:"
        tail -n 40 "$log" | tr -d '\r' >&2
    done
}

# Starts the VM and waits until COMMAND runs.
boot() {
    start
    wait_word $((SECONDS + boot_seconds))
    [ "$word" = ready ] && return
    end_vm 1
    case $word in
    late) say "the VM has not booted within $boot_seconds s" ;;
    gone) say "the VM ended while it booted" ;;
    *) say "the VM: ${word#error }" ;;
    esac
    show_logs
    return 1
}

# >>main

write_job "$@"
if ! boot; then
    [ "$word" = late ] || exit 125
    say "once more"
    boot || exit 125
fi
wait_word $((SECONDS + limit))
case $word in
exit\ *) end_vm 20 ;;
*) end_vm 0 ;;
esac
case $word in
exit\ *)
    exit "${word#exit }"
    ;;
late)
    say "the command did not end within $limit s (--timeout): $*"
    ;;
gone)
    say "the VM ended before the command: $*"
    ;;
unread)
    die "the output is not read to its end: the VM was stopped"
    ;;
*)
    say "the VM said \"$word\""
    ;;
esac
show_logs
exit 125
