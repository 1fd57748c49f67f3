#!/usr/bin/env bash
# Starts an entry point on every host of the slice, and returns:
#
#   bash launch/tpu_vm/run.sh train --config=configs/blop.py \
#     --workdir=gs://bucket/blop
#
# It goes on without this machine; launch/tpu_vm/logs.sh shows how. A workdir
# in gs:// is kept on the host's disk and copied there every SYNC_SECONDS (300)
# and at the end; it is copied back before the start, so that the same command
# goes on from the last checkpoint on any later slice. Where a run is under way
# already, nothing is started.
set -euo pipefail
cd "$(dirname "$0")/../.."
. launch/tpu_vm/settings.sh
. launch/tpu_vm/job.sh

check_job "$@"
start_job "$@"
