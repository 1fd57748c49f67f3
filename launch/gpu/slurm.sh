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
# Runs an entry point on a SLURM cluster, one process per node with all cards:
#
#   bash launch/gpu/setup.sh                  # once, on the login node
#   sbatch --gpus-per-node=8 launch/gpu/slurm.sh \
#     train --config=configs/blop.py --workdir=workdirs/blop
#
# Call it in the project's folder. All nodes need access to that folder and to
# the workdir. Options before the script's name override the lines above. Two
# minutes before the time limit, and when the job is preempted, the run saves
# and the job is queued again; it then continues from the checkpoint. DRY_RUN=1
# with bash instead of sbatch prints the command.
set -euo pipefail

# sbatch runs a copy of this file from a folder of its own.
cd "${SLURM_SUBMIT_DIR:-.}"
if [ ! -f launch/gpu/slurm.sh ]; then
  echo "got: the folder $PWD; expected: that of the project; fix: cd to" \
    "it, then sbatch launch/gpu/slurm.sh ..." >&2
  exit 2
fi
. launch/messages.sh
[ -f "gemma_sft/${1:-}.py" ] || refuse "entry point '${1:-}'" \
  "train, evaluate or another of python -m gemma_sft.NAME" \
  "sbatch launch/gpu/slurm.sh train --config=configs/blop.py --workdir=W"
# JAX reads the coordinator, the number of processes and its own number from the
# variables of SLURM. Without this list it would take one card per task of the
# node (jax/_src/distributed.py).
gpus="${SLURM_GPUS_ON_NODE:-1}"
JAX_LOCAL_DEVICE_IDS="$(seq -s, 0 $((gpus - 1)))"
export JAX_LOCAL_DEVICE_IDS
# Since SLURM 22.05 srun does not inherit this from sbatch.
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

# With "B:" only this shell gets the signal. scancel sends it to the tasks but
# not to this shell; srun would kill them on a SIGTERM.
again=1
trap 'again=1; scancel --signal=TERM "$SLURM_JOB_ID"' TERM
"${step[@]}" &
process=$!
status=0
while [ -n "$again" ]; do  # A signal interrupts `wait`.
  again=
  wait "$process" && status=0 || status=$?
done
if [ "$status" = 75 ]; then  # Saved but unfinished (gemma_sft/monitor/stop.py).
  echo "saved; the job is queued again"
  scontrol requeue "$SLURM_JOB_ID"
  status=0
fi
exit "$status"
