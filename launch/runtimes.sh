#!/usr/bin/env bash
# Makes .venv-runtimes, the environment in which exports are verified, and
# prints its interpreter:  bash launch/runtimes.sh
# It is separate from the training environment, which thus needs no PyTorch, and
# the packages that read an export are independent of those that write it. A
# second call with the same script installs nothing.
set -euo pipefail
cd "$(dirname "$0")/.."
environment="$PWD/.venv-runtimes"
stamp="$environment/.installed"
if [ -x "$environment/bin/python" ] \
  && [ "$stamp" -nt launch/runtimes.sh ]; then
  echo "$environment/bin/python"
  exit 0
fi
# Leave the project: its .python-version selects the Python of training, for
# which PyTorch may have no build.
cd /
python="${RUNTIME_PYTHON:-python3}"
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
  2>/dev/null; then
  echo "the runtimes need Python 3.10 or newer, but '$python' is not: set" \
    "RUNTIME_PYTHON=/path/to/python3" >&2
  exit 2
fi
# --clear removes another Python, or what an interrupted installation left.
"$python" -m venv --clear "$environment" >&2
pip=("$environment/bin/python" -m pip install --quiet
  --disable-pip-version-check)
# PyTorch is installed first and alone, so that the other packages cannot choose
# another version. It runs on the CPU only, but PyPI's build for Linux includes
# gigabytes for CUDA. PIP_INDEX_URL=https://download.pytorch.org/whl/cpu avoids
# these; that index also has PyTorch's own dependencies.
"${pip[@]}" torch==2.13.0 >&2
env -u PIP_INDEX_URL "${pip[@]}" 'transformers>=5.23,<6' 'peft>=0.21,<1' \
  'safetensors>=0.8,<1' >&2
touch "$stamp"
echo "$environment/bin/python"
