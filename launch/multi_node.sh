#!/usr/bin/env bash
# One line per node, the same on each but for its own number:
#
#   launch/multi_node.sh FIRST_NODE 4 0 my_run.toml      # on the first of four nodes, FIRST_NODE
#   launch/multi_node.sh FIRST_NODE 4 1 my_run.toml      # on the second, and so on
#
# Nodes that may come and go have no number; a rank that is lost starts all again, ten times at most:
#
#   launch/multi_node.sh FIRST_NODE 2:4 - my_run.toml    # on each; at least two, at most four
#
# More options of `launch run` may follow. Data and runs lie on a file system that all nodes share.
set -euo pipefail
if (($# < 4)); then
    sed -n '2,12s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
host=$1 nodes=$2 number=$3
shift 3
place=(--nodes "$nodes" --host "$host")
if [[ $number == - ]]; then
    place+=(--max-restarts 10)
else
    place+=(--node-rank "$number")
fi
cd "$(dirname "$0")/.."
export PYTHONPATH=$PWD
exec "${PYTHON:-python}" -m launch run "$@" "${place[@]}"
