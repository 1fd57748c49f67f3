#!/usr/bin/env bash
# Downloads libtpu, the compiler with which `gemma_sft.plan` computes on any
# machine what a run needs on a TPU:  bash launch/libtpu.sh
# It goes to the cache and not into .venv: if libtpu is importable on a machine
# without a TPU, JAX looks for a TPU at every start and complains on stderr. On
# a TPU VM the extra `tpu` has installed it already.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh
[ -x .venv/bin/uv ] || make_environment base
folder="${GEMMA_SFT_CACHE:-$HOME/.cache/gemma_sft}/libtpu"
requirement="$(sed -n "s/^PLAN = \['\(.*\)'\]$/\1/p" setup.py)"
stamp="$folder/.${requirement//[^a-z0-9.]/_}"
if [ ! -e "$stamp" ]; then
  rm -rf "$folder"
  .venv/bin/uv pip install --quiet --python .venv/bin/python --no-deps \
    --target "$folder" "$requirement"
  touch "$stamp"
fi
echo "$folder/libtpu/libtpu.so"
