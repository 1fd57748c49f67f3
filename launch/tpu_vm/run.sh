#!/usr/bin/env bash
# Starts an entry point on every host of the slice and returns:
#
#   bash launch/tpu_vm/run.sh train --config=configs/blop.py \
#     --workdir=gs://bucket/blop
#
# The run does not need this machine any more; launch/tpu_vm/logs.sh shows its
# log. A workdir in gs:// is kept on the host's disk, copied to the bucket every
# SYNC_SECONDS (300) and at the end, and copied back before the start, so that
# the same command continues from the last checkpoint on any later slice. If a
# run is in progress already, nothing is started.
set -euo pipefail
cd "$(dirname "$0")/../.."
. launch/tpu_vm/settings.sh
. launch/tpu_vm/job.sh

check_job "$@"
start_job "$@"
