#!/usr/bin/env bash
# This node's part of a run on several nodes, without ssh: for schedulers that start one copy on every node.
#   launch/node.sh NODE_RANK SLOTS MASTER_PORT HOST[,HOST...] launch/SCRIPT.py [ARGUMENTS]
# The first host is where rank 0 runs. On SIGUSR1 or SIGTERM the ranks save and end with status 75.
set -euo pipefail
if [ "$#" -lt 5 ]; then
    sed -n '2,4p' "$0" >&2
    exit 2
fi
node_rank=$1 slots=$2 port=$3
IFS=, read -ra hosts <<<"$4"
shift 4

hostfile=$(mktemp)
trap 'rm -f "$hostfile"' EXIT
for host in "${hosts[@]}"; do
    echo "$host slots=$slots"
done >"$hostfile"

# Ignored signals stay ignored in children, but the ranks install a handler of their own: so SIGUSR1 to the whole process
# group reaches the ranks alone. (On SIGTERM the launcher would kill them 30 s later, finished saving or not.)
trap '' USR1
(
    trap '' TERM
    exec deepspeed --hostfile "$hostfile" --no_ssh --node_rank "$node_rank" \
        --master_addr "${hosts[0]}" --master_port "$port" "$@"
) &
launcher=$!
trap 'signalled=1; kill -USR1 0' TERM
status=127
while :; do
    signalled='' code=0
    wait "$launcher" || code=$?
    [ "$code" = 127 ] || status=$code # 127: it had ended before
    [ -n "$signalled" ] || break      # else a signal ended the wait, not the run
done
exit "$status"
