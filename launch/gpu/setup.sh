#!/usr/bin/env bash
# Installs the project with JAX for NVIDIA cards:  bash launch/gpu/setup.sh
# On a cluster, call it once on the login node, which has a network. A second
# call installs nothing. EXTRAS (cuda,base) selects other extras of setup.py.
set -euo pipefail
cd "$(dirname "$0")/../.."
. launch/environment.sh
if [ -n "${DRY_RUN:-}" ]; then
  echo "make_environment ${EXTRAS:-cuda,base}"
  echo "bash launch/blop_compiler.sh"
  exit 0
fi
make_environment "${EXTRAS:-cuda,base}"
bash launch/blop_compiler.sh
