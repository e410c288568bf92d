#!/usr/bin/env bash
# missing.sh [PROGRAM...]: prints a line for each thing that fetch.sh, run.sh and qemu_pair.sh need and that is missing
# here, and for each of the PROGRAMs (rping, ib_write_bw, ...) that is. Prints nothing when all is there.
set -u
PATH=$PATH:/usr/sbin:/sbin

package_of() {
    case $1 in
    qemu-system-x86_64) echo qemu-system-x86 ;;
    apt-get | apt-cache | apt-config) echo apt ;;
    dpkg | dpkg-deb) echo dpkg ;;
    strip | ld | as | objcopy) echo binutils ;;
    xz) echo xz-utils ;;
    flock) echo util-linux ;;
    ip | tc | rdma) echo iproute2 ;;
    rping) echo rdmacm-utils ;;
    ib_write_bw | ib_read_bw | ib_send_bw) echo perftest ;;
    ibv_devinfo) echo ibverbs-utils ;;
    *) echo "$1" ;;
    esac
}

[ "$(uname -s) $(uname -m)" = "Linux x86_64" ] || echo "an x86-64 Linux machine: this one is $(uname -s) $(uname -m)"
for program in qemu-system-x86_64 apt-get apt-cache apt-config dpkg dpkg-deb perl gcc make strip ld tar xz gzip awk \
    flock timeout ip tc rdma "$@"; do
    command -v "$program" >/dev/null || echo "$program (Debian package $(package_of "$program"))"
done
if command -v perl >/dev/null && ! perl -MJSON::PP -MIO::Socket::UNIX -MTime::HiRes -e 1 2>/dev/null; then
    echo "perl's modules JSON::PP, IO::Socket::UNIX and Time::HiRes (Debian package perl)"
fi
# Userspace drivers are found by libibverbs at run time, by these names.
for driver in rxe siw; do
    ls /usr/lib/*/libibverbs/lib$driver-rdmav*.so >/dev/null 2>&1 || ls /usr/lib*/libibverbs/lib$driver-rdmav*.so \
        >/dev/null 2>&1 || echo "libibverbs' driver for $driver (Debian package ibverbs-providers)"
done
exit 0
