#!/usr/bin/env bash
# Shows a host's log and follows it until ^C:  bash launch/tpu_vm/logs.sh
# WORKER (0) selects the host, TAIL (50) the number of lines.
set -euo pipefail
cd "$(dirname "$0")/../.."
. launch/tpu_vm/settings.sh
on "${WORKER:-0}" "tail -n $(quoted "${TAIL:-50}") -F gemma_sft_job/log"
