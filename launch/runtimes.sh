#!/usr/bin/env bash
# Makes .venv-runtimes, the environment in which exports are proven, and prints
# its interpreter:  bash launch/runtimes.sh
# The packages that read an export are kept apart from those that write it: no
# PyTorch in the training environment, and no help from it in the proof.
# A second call with the same script installs nothing.
set -euo pipefail
cd "$(dirname "$0")/.."
environment="$PWD/.venv-runtimes"
stamp="$environment/.installed"
if [ -x "$environment/bin/python" ] \
  && [ "$stamp" -nt launch/runtimes.sh ]; then
  echo "$environment/bin/python"
  exit 0
fi
# From outside: .python-version chooses the training environment's Python, for
# which there need not be a build of PyTorch.
cd /
python="${RUNTIME_PYTHON:-python3}"
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
  2>/dev/null; then
  echo "the runtimes need Python 3.10 or newer, and '$python' is not: name one" \
    "with RUNTIME_PYTHON=/path/to/python3" >&2
  exit 2
fi
# --clear: what an interrupted installation left, or another Python, goes.
"$python" -m venv --clear "$environment" >&2
pip=("$environment/bin/python" -m pip install --quiet
  --disable-pip-version-check)
# First and alone, so that the others cannot choose another. Only the CPU is
# used; PyPI's build for Linux brings gigabytes for CUDA, which
# PIP_INDEX_URL=https://download.pytorch.org/whl/cpu avoids where it is
# reachable: that index has PyTorch's own dependencies too.
"${pip[@]}" torch==2.13.0 >&2
env -u PIP_INDEX_URL "${pip[@]}" 'transformers>=5.23,<6' 'peft>=0.21,<1' \
  'safetensors>=0.8,<1' >&2
touch "$stamp"
echo "$environment/bin/python"
