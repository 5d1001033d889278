#!/usr/bin/env bash
# A recipe as a Slurm job that saves before its time is up, queues again by itself, and ends when the recipe is done.
#   usage, in the checkout: sbatch scripts/slurm.sh RECIPE [key=value ...]
#          sbatch --nodes=4 --time=4:00:00 scripts/slurm.sh RECIPE      options given here replace those below
# Send it from a shell whose `accelerate` has the project, or set up .venv in the checkout. LAUNCH and PROGRAM are those
# of scripts/multi_node.sh. To save and stop for good: scancel --signal=TERM JOBID.
#SBATCH --job-name=distill
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@900
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

set -uo pipefail

# 15 minutes before the end Slurm signals this shell alone (B:). From here the launchers are sent SIGTERM, by scancel:
# srun would make it a SIGKILL.
asked=no
trap 'asked=yes; echo "slurm.sh: time is nearly up, saving"; scancel --signal=TERM "$SLURM_JOB_ID"' USR1

MASTER="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
export MASTER NODES="$SLURM_JOB_NUM_NODES" GPUS="${SLURM_GPUS_ON_NODE:-}" PORT="$((20000 + SLURM_JOB_ID % 10000))"
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}" # srun does not take it from sbatch

# One launcher on each machine; when one ends with an error, srun ends the others.
# shellcheck disable=SC2016  # SLURM_NODEID is for the machine to fill in
srun --kill-on-bad-exit=1 bash -c 'NODE_RANK="$SLURM_NODEID" exec bash scripts/multi_node.sh "$@"' node "$@" &
step=$!
wait "$step"
code=$?
while kill -0 "$step" 2>/dev/null; do # a signal ends `wait`, not srun
    wait "$step"
    code=$?
done

# Launchers end with 1 after saving as after a crash. Asked to stop, the run continues later; otherwise it has failed.
if [ "$asked" = yes ] && [ "$code" -ne 0 ]; then
    exec scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
