#!/usr/bin/env bash
# devices.sh: to be run by run.sh --wire: the VM's devices do what the tests rely on, seen with rping and ib_write_bw.
# shellcheck disable=SC2317 # functions are called by check
set -u
cd "$(dirname "$0")/../.." || exit 1
# shellcheck source=tests/tap.sh
. tests/tap.sh

if [ -z "${RXE_DEV:-}" ] || [ -z "${RXE_WIRE_DEV:-}" ]; then
    echo "Bail out! there are no RDMA devices here: tests/vm/run.sh --wire runs this"
    exit 1
fi

listening() {
    local i
    for ((i = 0; i < 200; i++)); do
        rdma resource show cm_id | grep -q LISTEN && return
        sleep 0.05
    done
    echo "no server within 10 s"
    return 1
}

# both SERVER-COMMAND... -- CLIENT-COMMAND...: both must succeed
both() {
    local server=() pid served ended
    while [ "$1" != -- ]; do
        server+=("$1")
        shift
    done
    shift
    timeout -k 5 600 "${server[@]}" >/tmp/server.log 2>&1 &
    pid=$!
    listening && timeout -k 5 600 "$@"
    ended=$?
    [ "$ended" = 0 ] || kill "$pid"
    wait "$pid"
    served=$?
    [ "$ended $served" = "0 0" ] && return
    echo "the client ended with $ended, the server with $served; the server said:"
    cat /tmp/server.log
    return 1
}

pings() { # ADDRESS
    both rping -s -a "$1" -C 10 -S 4096 -- rping -c -a "$1" -C 10 -S 4096 -V
}

writes() { # DEVICE ADDRESS
    both ib_write_bw -R -d "$1" -s 1048576 -n 20 -F -- ib_write_bw -R -d "$1" -s 1048576 -n 20 -F "$2"
}

# What goes to the wire's address must be felt by its first end: at least as many packets as writes of 1 MiB need.
crosses() { # DEVICE ADDRESS NET
    local before after
    before=$(cat "/sys/class/net/$3/statistics/tx_packets")
    both ib_write_bw -R -s 1048576 -n 5 -F -- ib_write_bw -R -d "$1" -s 1048576 -n 5 -F "$2" || return 1
    after=$(cat "/sys/class/net/$3/statistics/tx_packets")
    # siw's packets are segments of up to 64 KiB
    [ $((after - before)) -ge 80 ] && return
    echo "$((after - before)) packets left $3"
    return 1
}

delayed() { # ADDRESS NET
    local from
    tc qdisc add dev "$2" root netem delay 50ms || return 1
    from=${EPOCHREALTIME/./}
    pings "$1" || return 1
    from=$((${EPOCHREALTIME/./} - from))
    tc qdisc del dev "$2" root
    [ "$from" -ge 500000 ] && return
    echo "ten turns took $from us over a link that delays by 50 ms"
    return 1
}

check "rping over rxe, IPv4" pings "$RXE_ADDR"
check "rping over rxe, IPv6" pings "$RXE_ADDR6"
check "rping over siw, IPv4" pings "$SIW_ADDR"
check "rping over siw, IPv6" pings "$SIW_ADDR6"
check "writes of 1 MiB over rxe" writes "$RXE_DEV" "$RXE_ADDR"
check "writes of 1 MiB over siw" writes "$SIW_DEV" "$SIW_ADDR"
check "writes to rxe's second device cross the link" crosses "$RXE_DEV" "$RXE_WIRE_ADDR" "$RXE_NET"
check "writes to siw's second device cross the link" crosses "$SIW_DEV" "$SIW_WIRE_ADDR" "$SIW_NET"
check "a link that delays is felt by rxe" delayed "$RXE_WIRE_ADDR" "$RXE_NET"
check "a link that delays is felt by siw" delayed "$SIW_WIRE_ADDR" "$SIW_NET"
check "network namespaces" sh -c 'ip netns add other && ip netns exec other true && ip netns del other'
# shellcheck disable=SC2016
check "huge pages can be had" sh -c 'echo 4 >/proc/sys/vm/nr_hugepages && mkdir -p /tmp/huge &&
    mount -t hugetlbfs none /tmp/huge && umount /tmp/huge && [ "$(cat /proc/sys/vm/nr_hugepages)" = 4 ]'
check "the host has a name" getent hosts "$(uname -n)"
check "memory may be locked without limit" sh -c 'ulimit -a | grep -q "locked.*unlimited"'
done_testing
