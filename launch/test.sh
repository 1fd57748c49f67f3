#!/usr/bin/env bash
# Runs the fast tests:  bash launch/test.sh [pytest arguments]
# Runs the slow ones (real model and runtimes):  bash launch/test.sh -m slow
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh
make_environment test
bash launch/blop_compiler.sh
.venv/bin/ruff check .
.venv/bin/mypy
.venv/bin/python -m pytest -n "${TEST_PROCESSES:-2}" \
  --dist loadfile "$@" tests
