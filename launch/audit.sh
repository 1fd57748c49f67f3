#!/usr/bin/env bash
# Looks for known security problems:  bash launch/audit.sh
# bandit checks the code (bandit.yaml says what is allowed and why), and
# pip-audit looks up the installed packages in the database of osv.dev. Without
# a network the script skips the second part and says so.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh
make_environment test
.venv/bin/bandit -q -c bandit.yaml -r gemma_sft configs launch
echo "bandit: nothing found"
if ! .venv/bin/python -c 'import socket
socket.create_connection(("api.osv.dev", 443), timeout=10)' 2>/dev/null; then
  echo "NO NETWORK: the dependencies were not audited (pip-audit asks" \
    "api.osv.dev)" >&2
  exit 0
fi
timeout 900 .venv/bin/pip-audit --vulnerability-service osv --skip-editable \
  --progress-spinner off
