#!/bin/sh
# `convoy bulk` on a Ray cluster of a Job's pods: bulk.sh WHAT `convoy bulk` TAKES
# The first (INDEX) runs the command and decides how the Job ends; the others lend it their cores.
# HEAD is its address, HOST:PORT; CORES are those that this pod lends, by default its limit.
set -eu

start() {
    ray start --node-ip-address="$IP" --object-store-memory="${OBJECT_STORE:-200000000}" \
        --disable-usage-stats ${CORES:+--num-cpus="$CORES"} "$@"
}
if [ "$INDEX" = 0 ]; then
    start --head --port="${HEAD##*:}" --include-dashboard=false >&2
    exec convoy bulk "$@" --ray-address "$IP:${HEAD##*:}"
fi
# It may not be there yet, or be another after a restart.
until start --address="$HEAD" --block >&2; do
    sleep 2
done
