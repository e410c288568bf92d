#!/usr/bin/env bash
# soak.sh SECONDS JOBS DIR PROGRAM...: random migrations of every family, by each program, with seeds that nobody has tried,
# until the time is over. Seeds that fail are told, and added to DIR/failed with the command that replays them; the output
# of their runs is kept beside it. Exit status: 1 if one failed.
set -u
families=(extended version_1 extended_with_faults version_1_with_faults)
worst=20 # failures of one worker: more say nothing new

die() {
    echo "soak.sh: $*" >&2
    exit 2
}

[ $# -ge 4 ] || die "usage: soak.sh SECONDS JOBS DIR PROGRAM..."
[[ $1 =~ ^[1-9][0-9]*$ ]] || die "SECONDS=$1: must be a number from 1"
[[ $2 =~ ^[1-9][0-9]*$ ]] || die "JOBS=$2: must be a number from 1"
seconds=$1 jobs=$2 dir=$3
shift 3
for program in "$@"; do
    [ -x "$program" ] || die "$program: not there, or not a program (make soak builds it)"
done
mkdir -p "$dir" || exit 2
began=$SECONDS
end=$((SECONDS + seconds))
kinds=$((${#families[@]} * $#))
# Each worker comes to each kind at least once; and no slice comes near the limit of 600 s that the suite has.
slice=$((seconds / kinds < 30 ? seconds / kinds : 30))

seed_in() { echo $((10#$(cat "$1"))); }

# One slice of a worker: adds what was tried to its count, and what failed to the list.
run_slice() { # WORKER PROGRAM FAMILY SECONDS
    local at=$dir/at.$1 log=$dir/log.$1 first seed status
    first=$(seed_in "$at")
    RMIG_SOAK=$at RMIG_SECONDS=$4 RMIG_FAMILY=$3 "$2" --filter "random_migration/$3" >"$log" 2>&1
    status=$?
    [ "$stop" = no ] || return
    seed=$(seed_in "$at")
    tried=$((tried + seed - first))
    if [ $status -ne 0 ]; then
        tried=$((tried + 1))
        failed=$((failed + 1))
        mv "$log" "$dir/$3.$seed.log"
        echo "RMIG_SEED=$seed RMIG_FAMILY=$3 $2" | tee -a "$dir/failed"
        printf '%020d\n' $((seed + 1)) >"$at"
    fi
}

worker() { # WORKER PROGRAM...
    local worker=$1 tried=0 failed=0 stop=no turn=$1 left # turn: which slice
    shift
    local programs=("$@")
    trap 'stop=yes' INT TERM
    printf '%020d\n' "$(od -An -N7 -tu8 /dev/urandom)" >"$dir/at.$worker"
    # At least one slice, however long it took to come here.
    while left=$((end - SECONDS)) && [ $stop = no ] && [ $failed -lt $worst ] && { [ $left -gt 0 ] || [ $turn = "$worker" ]; }; do
        run_slice "$worker" "${programs[turn / ${#families[@]} % ${#programs[@]}]}" "${families[turn % ${#families[@]}]}" \
            $((left > slice ? slice : left > 0 ? left : 0))
        turn=$((turn + 1))
    done
    [ $failed -lt $worst ] || echo "worker $worker stops: $failed seeds failed"
    echo "$tried $failed" >"$dir/sum.$worker"
}

trap : INT TERM # the workers end, and what they found is told
rm -f "$dir"/sum.*
for ((i = 0; i < jobs; i++)); do
    worker $i "$@" &
done
while [ -n "$(jobs -r)" ]; do
    wait
done
read -r tried failed < <(cat "$dir"/sum.* | awk '{ t += $1; f += $2 } END { print t + 0, f + 0 }')
took=$((SECONDS - began > 0 ? SECONDS - began : 1))
echo "$tried migrations in $took s, $((tried * 3600 / took)) an hour; $failed failed$([ "$failed" = 0 ] || echo ": $dir/failed")"
[ "$failed" = 0 ] && [ "$tried" -gt 0 ]
