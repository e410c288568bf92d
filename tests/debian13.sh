#!/usr/bin/env bash
# debian13.sh BUILD: the commands of README in a fresh Debian 13, with its compilers, libfabric, rdma-core and QEMU.
# Reports as TAP. It needs root and debootstrap (make deps-debian13); where that cannot be it is skipped, which with
# CI=true is a failure. `fetch.sh BUILD debian13` makes the root; what runs there has a copy of it, a copy of this tree,
# this host's kernel, devices and network, and processes and mounts of its own that end with it.
# shellcheck disable=SC2016,SC2317 # expanded there; called by check
set -u
cd "$(dirname "$0")/.." || exit 1
# shellcheck source=tests/tap.sh
. tests/tap.sh
[ $# = 1 ] || { echo "usage: debian13.sh BUILD" >&2; exit 2; }
build=$1
root=$build/debian13.root

if ! reason=$(timeout -k 5 1200 tests/vm/fetch.sh "$build" debian13 2>&1); then
    if [ "${CI:-}" = true ]; then not_ok 'Debian 13' "$reason"; else skip 'Debian 13' "${reason//$'\n'/; }"; fi
    done_testing
fi

copy_tree() {
    rm -rf --one-file-system "$root" && cp -a "$build/vm/debian-13" "$root" && mkdir "$root/rmig" || return 1
    cp /etc/resolv.conf "$root/etc/resolv.conf"
    tar -c --exclude=./build --exclude=./.git . | tar -x --no-same-owner -C "$root/rmig"
}

# there SECONDS COMMAND...: in the copy of this tree there
there() {
    timeout -k 30 "$1" unshare --mount --pid --fork --kill-child bash -c '
        mount -t proc proc "$1/proc" && mount --rbind /dev "$1/dev" && mount --rbind /sys "$1/sys" || exit 125
        chroot "$1" sh -c "cd /rmig && exec \"\$@\"" sh "${@:2}"
        exit $? # this shell is process 1 there: it reaps orphans' bash "$root" "${@:2}" </dev/null
}

shown() { # the end of what it prints, which is long
    local output status
    output=$("$@" 2>&1)
    status=$?
    printf '%s\n' "$output" | tail -n 60
    return "$status"
}

is_13() { there 60 sh -c '. /etc/os-release && [ "$VERSION_ID" = 13 ]'; }

trap 'rm -rf --one-file-system "$root"' EXIT
check 'a copy of the root, and of this tree' copy_tree
check 'it is Debian 13' is_13
check 'make deps demo' shown there 1200 make deps demo
check 'make quick' shown there 3600 make quick
check 'make install' shown there 60 make install
done_testing
