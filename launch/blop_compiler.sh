#!/usr/bin/env bash
# Installs the Blop compiler from npm into the cache. Needs Node.js and npm.
set -euo pipefail
cd "$(dirname "$0")/.."
target="${GEMMA_SFT_CACHE:-$HOME/.cache/gemma_sft}/blop"
if [ -d "$target/node_modules/blop-language" ]; then
  exit 0
fi
if ! command -v npm >/dev/null; then
  echo "npm is not installed: without it there is no Blop compiler, and Blop" \
    "answers are not judged. Everything else works." >&2
  exit 0
fi
mkdir -p "$target"
cp gemma_sft/tasks/blop/package.json "$target/package.json"
# --ignore-scripts: the compiler's own dependencies need no build step.
npm install --prefix "$target" --ignore-scripts --no-audit --no-fund --silent
