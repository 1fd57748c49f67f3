#!/usr/bin/env bash
# Installs the project with JAX for NVIDIA cards:  bash launch/gpu/setup.sh
# On a cluster, once, where the network is (the login node). Done again, it
# installs nothing. EXTRAS (cuda,base) chooses others of setup.py.
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
