#!/usr/bin/env bash
# Makes the run save and end:  bash launch/tpu_vm/stop.sh
# The slice stays and still costs money until launch/tpu_vm/delete.sh.
set -euo pipefail
cd "$(dirname "$0")/../.."
. launch/tpu_vm/settings.sh
on all "bash gemma_sft/launch/tpu_vm/host.sh stop"
