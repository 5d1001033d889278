#!/usr/bin/env bash
# A recipe on several machines without a scheduler: start this on each of them, in any order, within 15 minutes.
#   usage: NODES=2 NODE_RANK=0 MASTER=host0 bash scripts/multi_node.sh RECIPE [key=value ...]     on host0
#          NODES=2 NODE_RANK=1 MASTER=host0 bash scripts/multi_node.sh RECIPE [key=value ...]     on the other
# The same again resumes. Also from the environment: GPUS (processes on each machine; one for each GPU of this one), PORT
# (29500; the others must reach it on host0), LAUNCH (recipes/launch/multi_node.yaml, or a file beside it), PROGRAM
# (stages.run).

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [ -z "${NODES:-}" ] || [ -z "${NODE_RANK:-}" ] || [ -z "${MASTER:-}" ] || [ $# -eq 0 ]; then
    sed -n '2,7s/^# //p' "${BASH_SOURCE[0]}" >&2
    exit 2
fi
gpus="${GPUS:-$(nvidia-smi --list-gpus 2>/dev/null | grep -c ^GPU || true)}"
[ "$gpus" -gt 0 ] || gpus=1 # a CPU
command -v accelerate >/dev/null || export PATH="$PWD/.venv/bin:$PATH"

# Seconds that a stopped run may take to save. Without this, or with a torch that does not know it yet, they are 30.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}"

# exec: a signal to this script is one to the launcher, which passes it on to the processes and waits for them.
exec accelerate launch --config_file "${LAUNCH:-recipes/launch/multi_node.yaml}" \
    --num_machines "$NODES" --machine_rank "$NODE_RANK" --num_processes "$((NODES * gpus))" \
    --main_process_ip "$MASTER" --main_process_port "${PORT:-29500}" -m "${PROGRAM:-stages.run}" "$@"
