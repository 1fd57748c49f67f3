#!/usr/bin/env bash
#SBATCH --job-name=gemma_sft
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@120
# A run on a SLURM cluster, one process a node with all its cards:
#
#   bash launch/gpu/setup.sh                  # once, on the login node
#   sbatch --gpus-per-node=8 launch/gpu/slurm.sh \
#     train --config=configs/blop.py --workdir=workdirs/blop
#
# From the project's folder, which all nodes see, as they see the workdir.
# Options before the script's name go over the lines above. Two minutes before
# the time is up, and when it is preempted, the run saves and the job queues
# again; the same command goes on from there. DRY_RUN=1 with bash instead of
# sbatch prints the step.
set -euo pipefail

# sbatch runs a copy of this file from a folder of its own.
cd "${SLURM_SUBMIT_DIR:-.}"
if [ ! -f launch/gpu/slurm.sh ]; then
  echo "got: the folder $PWD; expected: the project's; fix: cd to it, then" \
    "sbatch launch/gpu/slurm.sh ..." >&2
  exit 2
fi
. launch/messages.sh
[ -f "gemma_sft/${1:-}.py" ] || refuse "entry point '${1:-}'" \
  "train, evaluate or another of python -m gemma_sft.NAME" \
  "sbatch launch/gpu/slurm.sh train --config=configs/blop.py --workdir=W"
# JAX reads the coordinator, the number of processes and this one's from
# SLURM's variables. Of the cards it would take only as many as there are tasks
# on the node (jax/_src/distributed.py), if it were not told which.
gpus="${SLURM_GPUS_ON_NODE:-1}"
JAX_LOCAL_DEVICE_IDS="$(seq -s, 0 $((gpus - 1)))"
export JAX_LOCAL_DEVICE_IDS
# Since SLURM 22.05 srun does not take it from sbatch by itself.
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-8}"
step=(srun --ntasks-per-node=1 --kill-on-bad-exit=1
  .venv/bin/python -m "gemma_sft.$1" "${@:2}")

if [ -n "${DRY_RUN:-}" ]; then
  quoted "JAX_LOCAL_DEVICE_IDS=$JAX_LOCAL_DEVICE_IDS" "${step[@]}"
  exit 0
fi
[ -n "${SLURM_JOB_ID:-}" ] || refuse "no SLURM job" "a script given to sbatch" \
  "sbatch launch/gpu/slurm.sh $*"
[ -x .venv/bin/python ] || refuse "no .venv in $PWD" "the environment" \
  "bash launch/gpu/setup.sh, where there is a network"

# B: this shell alone gets the signal. scancel passes it to the tasks and not
# to this shell; srun, sent a SIGTERM, would kill them.
again=1
trap 'again=1; scancel --signal=TERM "$SLURM_JOB_ID"' TERM
"${step[@]}" &
process=$!
status=0
while [ -n "$again" ]; do  # A signal interrupts `wait`.
  again=
  wait "$process" && status=0 || status=$?
done
if [ "$status" = 75 ]; then  # Saved, and not at its end (stop.py).
  echo "saved; the job queues again"
  scontrol requeue "$SLURM_JOB_ID"
  status=0
fi
exit "$status"
