#!/usr/bin/env bash
# Deletes the slice and its disks:
#
#   bash launch/tpu_vm/delete.sh
#
# A workdir in gs:// stays. If there is no slice, this does nothing.
set -euo pipefail
cd "$(dirname "$0")/../.."
. launch/tpu_vm/settings.sh

get_state
if [ "$state" = ABSENT ] && [ -z "$DRY_RUN" ]; then
  echo "there is no $TPU_NAME in zone $ZONE of project $PROJECT"
  exit 0
fi
# --force deletes its node too.
tpus queued-resources delete "$TPU_NAME" --force
