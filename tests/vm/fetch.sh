#!/usr/bin/env bash
# fetch.sh BUILD [vm] [qemu10] [qemu11] [debian13]: makes BUILD/vm whole; without a part, the first three.
#   vm        vmlinux and initrd: Debian's kernel, its modules for RDMA in software, siw built from its source, busybox
#   qemu10    qemu-10.0/run: QEMU 10.0 of Debian 13, or of Debian 12's backports, beside the one that is installed
#   qemu11    qemu-11/run: QEMU 11.1 or a later 11 of Debian 13's backports, with all libraries that it needs, C's too
#   debian13  debian-13: a root of Debian 13's with what a checkout needs to begin with, by debootstrap, as root
# Packages are downloaded with apt-get and unpacked in BUILD, nothing is installed. A part that is there is left alone.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)

say() { echo "fetch.sh: $*" >&2; }
die() {
    say "$@"
    exit 1
}

# Raise a number when what the part holds has changed: what is there is then made again.
kernel_recipe=3
qemu_recipe=2
qemu11_recipe=1
debian13_recipe=1

# >>packages

# download FOLDER PACKAGE[=VERSION]...
download() {
    local into=$1 output
    shift
    mkdir -p "$into"
    output=$(cd "$into" && apt-get -qq "${apt_options[@]}" -o APT::Sandbox::User=root download "$@" 2>&1) && return
    printf '%s\n' "$output" >&2
    say "these packages could not be downloaded (is there a network? is the list of packages old? then run" \
        "apt-get update): $*"
    return 1
}
apt_options=()

# All versions of a package that can be downloaded, newest first.
versions() { apt-cache "${apt_options[@]}" madison "$1" | awk '{ print $3 }' | uniq; }

has_version() { versions "$1" | grep -qxF -- "$2"; }

# unpack FOLDER INTO: all packages there
unpack() {
    local deb
    for deb in "$1"/*.deb; do
        dpkg -x "$deb" "$2"
    done
}

# >>kernel

# Sets version, abi (6.1.0-56-amd64), series (6.1): the newest kernel of which everything is to be had.
choose_kernel() {
    [ -n "$(versions linux-image-amd64)" ] ||
        die "apt knows no package linux-image-amd64: its list of packages is empty (run apt-get update, or \`make" \
            "deps\`), or this is not Debian on amd64"
    local tried=
    for version in $(versions linux-image-amd64); do
        abi=$(apt-cache show "linux-image-amd64=$version" |
            sed -n 's/^Depends: linux-image-\([^ ]*\) .*/\1/p' | head -1)
        series=$(printf '%s' "$abi" | sed -E 's/^([0-9]+\.[0-9]+)\..*/\1/')
        has_version "linux-image-$abi" "$version" && has_version "linux-source-$series" "$version" &&
            has_version "linux-headers-$abi" "$version" && has_version "linux-kbuild-$series" "$version" &&
            has_version "linux-headers-${abi%-amd64}-common" "$version" && return
        tried="$tried $version"
    done
    die "linux-image, -source, -headers and -kbuild do not have one version in common; versions of linux-image:$tried"
}

# build_siw PACKAGES OUT, in the folder scratch: kbuild takes no path with a space.
build_siw() {
    local headers=$scratch/root/usr/src/linux-headers-$abi source=$scratch/siw log=$scratch/log
    mkdir -p "$source"
    dpkg -x "$1/linux-headers-$abi"_*.deb "$scratch/root"
    dpkg -x "$1/linux-headers-${abi%-amd64}-common"_*.deb "$scratch/root"
    dpkg -x "$1/linux-kbuild-$series"_*.deb "$scratch/root"
    dpkg-deb --fsys-tarfile "$1/linux-source-$series"_*.deb | tar -xO "./usr/src/linux-source-$series.tar.xz" | xz -dc |
        tar -x -C "$source" --strip-components=5 "linux-source-$series/drivers/infiniband/sw/siw"
    sed -i "s|/usr/src/|$scratch/root/usr/src/|" "$headers/Makefile"
    local cc=gcc
    command -v gcc-12 >/dev/null && cc=gcc-12
    make -C "$headers" M="$source" CC="$cc" CONFIG_RDMA_SIW=m modules >"$log" 2>&1 || {
        tail -30 "$log" >&2
        die "siw of linux $version could not be built"
    }
    strip -g -o "$2" "$source/siw.ko"
}

# What the VM can load; its init loads some, the rest is loaded when asked for.
wanted_modules() { # MODULES.DEP
    local names='virtio_pci|virtio_console|virtio-rng|9p|9pnet_virtio|crc32_generic|crc32c_generic|libcrc32c'
    names+='|veth|dummy|ifb|bridge|vrf|macvlan|tun|tcp_diag|udp_diag|siw'
    sed 's/://' "$1" | grep -E "^kernel/(drivers/infiniband/(core|sw/rxe)|net/sched)/|/($names)\.ko( |$)" |
        tr ' ' '\n' | grep . | sort -u
}

# A number of BYTES bytes at OFFSET of FILE.
number_at() { # FILE OFFSET BYTES
    od -An -t "u$3" -j "$2" -N "$3" "$1" | tr -d ' '
}

# The kernel unpacked, for which the emulated machine takes half of its boot; as it is, if xz did not pack it. The packed
# kernel lies where Linux's x86 boot protocol says: setup_sects, payload_offset, payload_length; its last 4 bytes are the
# unpacked size.
unpack_kernel() { # VMLINUZ VMLINUX
    local begin=$((($(number_at "$1" 0x1f1 1) + 1) * 512 + $(number_at "$1" 0x248 4)))
    local length=$(($(number_at "$1" 0x24c 4) - 4))
    dd if="$1" bs=64K iflag=skip_bytes,count_bytes skip=$begin count=$length status=none | xz -dcq >"$2" || cp "$1" "$2"
}

make_kernel() {
    local new=$vm/new.kernel packages=$vm/new.packages-kernel tree=$vm/new.tree modules module
    choose_kernel
    say "linux $version ($abi)"
    download "$packages" "linux-image-$abi=$version" "linux-headers-$abi=$version" "linux-kbuild-$series=$version" \
        "linux-headers-${abi%-amd64}-common=$version" "linux-source-$series=$version" busybox-static || exit 1
    dpkg -x "$packages/linux-image-$abi"_*.deb "$tree"
    dpkg -x "$packages"/busybox-static_*.deb "$tree"
    modules=$tree/lib/modules/$abi
    mkdir -p "$modules/kernel/drivers/infiniband/sw/siw" "$new/root/bin"
    build_siw "$packages" "$modules/kernel/drivers/infiniband/sw/siw/siw.ko"
    cp "$tree/bin/busybox" "$new/root/bin"
    unpack_kernel "$tree/boot/vmlinuz-$abi" "$new/vmlinux"
    "$tree/bin/busybox" depmod -b "$tree" "$abi"
    for module in $(wanted_modules "$modules/modules.dep"); do
        install -D -m 644 "$modules/$module" "$new/root/lib/modules/$abi/$module"
    done
    "$tree/bin/busybox" depmod -b "$new/root" "$abi"
    echo "$kernel_recipe $version" >"$new/stamp"
    rm -rf "$vm/kernel"
    mv "$new" "$vm/kernel"
    rm -rf "$packages" "$tree" "$scratch"
}

make_initrd() {
    local root=$vm/new.root
    cp -r "$vm/kernel/root" "$root"
    install -m 755 "$here/init" "$root/init"
    (cd "$root" && find . | sort | ./bin/busybox cpio -o -H newc -R 0:0 2>/dev/null) >"$vm/new.initrd"
    rm -rf "$root"
    rm -f "$vm/vmlinuz" "$vm/initrd.gz" # of before
    ln -sfn kernel/vmlinux "$vm/vmlinux"
    mv "$vm/new.initrd" "$vm/initrd"
}

part_vm() {
    if ! grep -qs "^$kernel_recipe " "$vm/kernel/stamp"; then
        make_kernel
        rm -f "$vm/initrd"
    fi
    if [ ! -e "$vm/initrd" ] || [ "$here/init" -nt "$vm/initrd" ]; then
        make_initrd
    fi
}

# >>qemu

# Debian's name for this machine's release.
own_codename() {
    # shellcheck source=/dev/null
    (. /etc/os-release && [ -n "${VERSION_CODENAME:-}" ] && echo "$VERSION_CODENAME") ||
        die "/etc/os-release has no VERSION_CODENAME: this is not Debian"
}

# A private configuration of apt: these suites of the machine's own sources, and nothing of the machine's state, so that
# for apt nothing is installed.
private_apt() { # FOLDER SUITE...
    local apt=$1 codename sourcelist='' sourceparts='' file
    shift
    codename=$(own_codename)
    mkdir -p "$apt/sources" "$apt/lists/partial" "$apt/cache/archives/partial" "$apt/empty"
    : >"$apt/status"
    eval "$(apt-config shell sourcelist Dir::Etc::sourcelist/f sourceparts Dir::Etc::sourceparts/d)"
    local files=()
    for file in "$sourcelist" "$sourceparts"/*.list "$sourceparts"/*.sources; do
        [ -r "$file" ] && files+=("$file")
    done
    perl "$here/suites.pl" "$codename" "$*" "$apt/sources" "${files[@]}" || exit 1
    cat >"$apt/conf" <<END
Dir::Etc::sourcelist "$apt/empty/none";
Dir::Etc::sourceparts "$apt/sources";
Dir::Etc::preferences "$apt/empty/none";
Dir::Etc::preferencesparts "$apt/empty";
Dir::State::lists "$apt/lists";
Dir::State::status "$apt/status";
Dir::Cache "$apt/cache";
APT::Sandbox::User "root";
Acquire::Languages "none";
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
END
    apt_options=(-c "$apt/conf")
    local output
    output=$(apt-get -qq "${apt_options[@]}" --error-on=any update 2>&1) || {
        printf '%s\n' "$output" >&2
        die "the lists of packages of $* could not be downloaded (is there a network?)"
    }
}

# Sets version: the newest QEMU that matches, of the suites that private_apt was given.
choose_qemu() { # PATTERN NAME SUITES
    version=$(versions qemu-system-x86 | grep -E "^1:$1" | head -1) || true
    [ -n "$version" ] || die "$3: no qemu-system-x86 $2 there, only: $(versions qemu-system-x86 | tr '\n' ' ')"
    say "qemu $version"
}

# Puts vm/new.qemu in its place, when it starts and says that it is VERSION.
keep_qemu() { # NAME PATTERN VERSION RECIPE
    local new=$vm/new.qemu
    chmod 755 "$new/run"
    "$new/run" --version 2>"$vm/new.error" | grep -Eq "version $2" ||
        die "qemu $3 does not start here: $(cat "$vm/new.error")"
    echo "$4 $3" >"$new/stamp"
    rm -rf "${vm:?}/$1"
    mv "$new" "$vm/$1"
}

make_qemu10() {
    local new=$vm/new.qemu packages=$vm/new.packages-qemu version codename
    codename=$(own_codename)
    private_apt "$vm/new.apt" "$codename" "$codename-backports"
    choose_qemu '10\.0\.' 10.0 "$codename, $codename-backports"
    download "$packages" "qemu-system-x86=$version" "qemu-system-common=$version" "qemu-system-data=$version" || exit 1
    apt_options=()
    download "$packages" seabios ipxe-qemu || exit 1
    unpack "$packages" "$new"
    rm -rf "$new/usr/share/doc" "$new/usr/share/man" "$new/usr/share/icons" "$new/usr/share/applications"
    cat >"$new/run" <<'END'
#!/bin/sh
# This QEMU with its own modules, firmware and ROMs.
here=$(dirname "$(readlink -f "$0")")
export QEMU_MODULE_DIR="$here/usr/lib/x86_64-linux-gnu/qemu"
exec "$here/usr/bin/qemu-system-x86_64" -L "$here/usr/share/qemu" -L "$here/usr/share/seabios" \
    -L "$here/usr/lib/ipxe/qemu" "$@"
END
    keep_qemu qemu-10.0 '10\.0\.' "$version" "$qemu_recipe"
}

part_qemu10() { grep -qs "^$qemu_recipe " "$vm/qemu-10.0/stamp" || make_qemu10; }

# It needs newer libraries than this machine may have. It is started by its own loader, without a chroot, so that it sees
# the files that its peers see.
make_qemu11() {
    local new=$vm/new.qemu version output
    private_apt "$vm/new.apt" trixie trixie-backports
    choose_qemu '11\.([1-9]|[1-9][0-9])\.' '11.1 or a later 11' 'trixie, trixie-backports'
    output=$(apt-get -qq "${apt_options[@]}" -t trixie-backports --no-install-recommends --download-only -y install \
        "qemu-system-x86=$version" ibverbs-providers 2>&1) || {
        printf '%s\n' "$output" >&2
        die "qemu $version, or a library that it needs, could not be downloaded (is there a network?)"
    }
    apt_options=()
    unpack "$vm/new.apt/cache/archives" "$new"
    rm -rf "${new:?}"/{etc,var} "$new"/usr/share/{doc,man,locale,icons,applications,perl5,alsa,lintian}
    cat >"$new/run" <<'END'
#!/bin/sh
# This QEMU with its own loader, libraries, RDMA drivers, modules, firmware and ROMs.
here=$(dirname "$(readlink -f "$0")")
lib=$here/usr/lib/x86_64-linux-gnu
export QEMU_MODULE_DIR="$lib/qemu" RDMAV_DRIVERS="$lib/libibverbs/librxe:$lib/libibverbs/libsiw"
exec "$here/usr/lib64/ld-linux-x86-64.so.2" --library-path "$lib" "$here/usr/bin/qemu-system-x86_64" \
    -L "$here/usr/share/qemu" -L "$here/usr/share/seabios" -L "$here/usr/lib/ipxe/qemu" "$@"
END
    keep_qemu qemu-11 '11\.[1-9]' "$version" "$qemu11_recipe"
}

part_qemu11() { grep -qs "^$qemu11_recipe " "$vm/qemu-11/stamp" || make_qemu11; }

# >>debian

# What debootstrap mounts is gone when it ends, however it does.
make_debian13() {
    local new=$vm/new.debian mirror output
    command -v debootstrap >/dev/null || die "debootstrap is not installed (Debian package debootstrap)"
    [ "$(id -u)" = 0 ] || die "only root can make a root of Debian 13's"
    private_apt "$vm/new.apt" trixie
    mirror=$(sed -nE 's/^(URIs:|deb( \[[^]]*\])?) +([^ ]+).*/\3/p' "$vm/new.apt/sources"/derived.* | head -1)
    output=$(unshare --mount --pid --fork --kill-child debootstrap --variant=minbase \
        --include=git,make,gcc,ca-certificates trixie "$new" "$mirror" 2>&1) || {
        printf '%s\n' "$output" | tail -20 >&2
        die "debootstrap could not make a root of Debian 13's (is there a network?)"
    }
    echo "$debian13_recipe" >"$new.stamp"
    rm -rf "$vm/debian-13"
    mv "$new" "$vm/debian-13"
    mv "$new.stamp" "$vm/debian-13.stamp"
}

part_debian13() { grep -qsx "$debian13_recipe" "$vm/debian-13.stamp" || make_debian13; }

# >>main

[ $# -ge 1 ] || die "usage: fetch.sh BUILD [vm] [qemu10] [qemu11] [debian13]"
mkdir -p "$1/vm"
vm=$(cd "$1/vm" && pwd)
shift
[ $# -gt 0 ] || set -- vm qemu10 qemu11
for part in "$@"; do
    case $part in
    vm | qemu10 | qemu11 | debian13) ;;
    *) die "\"$part\" is no part; there are: vm, qemu10, qemu11, debian13" ;;
    esac
done

exec 9>"$vm/lock"
flock -w 1200 9 || die "another fetch.sh has been at work in $vm for 20 minutes"
scratch=
# shellcheck disable=SC2317 # called by the trap
tidy() {
    rm -rf "$vm"/new.*
    [ -z "$scratch" ] || rm -rf "$scratch"
}
trap tidy EXIT
trap 'exit 130' INT TERM HUP
tidy
if [[ $vm =~ ^[A-Za-z0-9_./+-]+$ ]]; then
    scratch=$vm/new.scratch
else
    scratch=$(mktemp -d /tmp/rmig-fetch.XXXXXX)
fi
for part in "$@"; do
    part_"$part"
done
