#!/usr/bin/env bash
# Stock QEMU's multifd TCP migration of a paused VM on loopback, the RAM taken from a file.
#   qemu_multifd.sh RAM_FILE WORK_DIR [touched]     touched: the destination's RAM is populated before
# WORK_DIR (on /dev/shm) holds the destination's RAM. Prints the microseconds from the command to migrate until
# the destination is ready, after the RAM compared equal.
set -euo pipefail
ram=$1 work=$2 prealloc=
[ "${3:-}" != touched ] || prealloc=,prealloc=on
size=$(stat -c %s "$ram")
qemu=(qemu-system-x86_64 -accel tcg -S -display none -nodefaults -no-user-config -m "$((size >> 20))M")
port=$((20000 + RANDOM % 20000))
pids=()
cleanup() {
  kill "${pids[@]}" 2>/dev/null || true
  wait 2>/dev/null || true
  rm -f "$work/qemu-dst.ram"
}
trap cleanup EXIT

start() { # QMP_PORT MEM_PATH BACKEND_OPTIONS [ARGS]: the ROM blocks are small beside the RAM
  local qmp=$1 mem=$2 options=$3
  shift 3
  "${qemu[@]}" -machine q35,memory-backend=pc.ram -qmp "tcp:127.0.0.1:$qmp,server=on,wait=off" \
    -object "memory-backend-file,id=pc.ram,size=$size,mem-path=$mem,share=on$options" "$@" >"$work/qemu.log" 2>&1 &
  pids+=($!)
}

# qmp FD COMMAND: prints the line of the answer, skipping events; every wait ends after 30 s
qmp() {
  local line
  printf '%s\n' "$2" >&"$1"
  while IFS= read -r -t 30 -u "$1" line; do
    case $line in
    *'"return"'*) printf '%s\n' "$line" && return 0 ;;
    *'"error"'*) printf 'qemu_multifd: %s: %s\n' "$2" "$line" >&2 && return 1 ;;
    esac
  done
  printf 'qemu_multifd: no answer to %s\n' "$2" >&2
  return 1
}

connect() { # VARIABLE PORT
  local i
  for ((i = 0; i < 100; i++)); do
    if { eval "exec {$1}<>/dev/tcp/127.0.0.1/$2"; } 2>/dev/null; then
      qmp "${!1}" '{"execute": "qmp_capabilities"}' >/dev/null
      return 0
    fi
    sleep 0.1
  done
  cat "$work/qemu.log" >&2
  return 1
}

start "$port" "$ram" ,prealloc=on # as a guest that has run left it
start "$((port + 1))" "$work/qemu-dst.ram" "$prealloc" -incoming defer
connect src "$port"
connect dst "$((port + 1))"
for fd in "$src" "$dst"; do
  qmp "$fd" '{"execute": "migrate-set-capabilities", "arguments": {"capabilities": [{"capability": "multifd", "state": true}]}}' >/dev/null
  qmp "$fd" '{"execute": "migrate-set-parameters", "arguments": {"multifd-channels": 2, "max-bandwidth": 100000000000}}' >/dev/null
done
uri="tcp:127.0.0.1:$((port + 2))"
qmp "$dst" "{\"execute\": \"migrate-incoming\", \"arguments\": {\"uri\": \"$uri\"}}" >/dev/null
began=${EPOCHREALTIME/./}
qmp "$src" "{\"execute\": \"migrate\", \"arguments\": {\"uri\": \"$uri\"}}" >/dev/null
# Until the destination has all and is ready to run, as rmig's handover: the source's own total-time ends before.
total=
for ((i = 0; i < 6000 && ${#total} == 0; i++)); do
  answer=$(qmp "$dst" '{"execute": "query-migrate"}')
  case $answer in
  *'"status": "completed"'*) total=$((${EPOCHREALTIME/./} - began)) ;;
  *'"status": "failed"'* | *'"status": "cancelled"'*) printf 'qemu_multifd: %s\n' "$answer" >&2 && exit 1 ;;
  *) sleep 0.005 ;;
  esac
done
[ -n "$total" ] || { printf 'qemu_multifd: not completed: %s\n' "$answer" >&2 && exit 1; }
cmp "$ram" "$work/qemu-dst.ram" >&2
echo "$total"
