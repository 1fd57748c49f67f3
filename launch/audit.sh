#!/usr/bin/env bash
# Looks for what is known to be unsafe:  bash launch/audit.sh
# In the code by bandit (bandit.yaml says what is allowed and why), and in what
# is installed by pip-audit, which asks the database of osv.dev; without a
# network that part is left out with a line that says so.
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
