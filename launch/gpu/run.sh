#!/usr/bin/env bash
# Runs an entry point on all cards of this machine, or on those that GPUS lists:
#
#   bash launch/gpu/run.sh train --config=configs/blop.py --workdir=workdirs/b
#   GPUS=0,1 bash launch/gpu/run.sh train ...
#
# DRY_RUN=1 prints the commands without running them. The Dockerfile does the
# same in a container.
set -euo pipefail
cd "$(dirname "$0")/../.."
. launch/messages.sh

[ -f "gemma_sft/${1:-}.py" ] || refuse "entry point '${1:-}'" \
  "train, evaluate or another of python -m gemma_sft.NAME" \
  "bash launch/gpu/run.sh train --config=configs/blop.py --workdir=workdirs/b"
[[ "${GPUS:-0}" =~ ^[0-9]+(,[0-9]+)*$ ]] || refuse "GPUS=$GPUS" \
  "numbers of cards, separated by commas" "GPUS=0,1"
query=(nvidia-smi "--query-gpu=index,driver_version" "--format=csv,noheader")
start=(.venv/bin/python -m "gemma_sft.$1" "${@:2}")
[ -z "${GPUS:-}" ] || start=(env "CUDA_VISIBLE_DEVICES=$GPUS" "${start[@]}")

if [ -n "${DRY_RUN:-}" ]; then
  quoted "${query[@]}"
  bash launch/gpu/setup.sh
  quoted "${start[@]}"
  exit 0
fi
cards="$("${query[@]}")" || refuse "nvidia-smi failed" "a card and its driver" \
  "install NVIDIA's driver; without a card: launch/quickstart.sh"
# CUDA 13 needs this driver: docs.jax.dev/en/latest/installation.html.
driver="${cards%%$'\n'*}"
driver="${driver##* }"
if [ "${driver%%.*}" -lt 580 ] && [[ "${EXTRAS:-cuda}" = *cuda ]]; then
  refuse "NVIDIA driver $driver" "580 or newer, which CUDA 13 needs" \
    "update the driver"
fi
gpus="${GPUS:-}"
for gpu in ${gpus//,/ }; do
  grep -q "^$gpu," <<<"$cards" || refuse "GPUS=$GPUS, and no card $gpu" \
    "of $(cut -d, -f1 <<<"$cards" | paste -sd,)" "choose from these"
done
bash launch/gpu/setup.sh
# The run replaces this process, so that a SIGTERM makes it save and end.
exec "${start[@]}"
