#!/usr/bin/env bash
# Gives the slice back, with all that is on its disks:
#
#   bash launch/tpu_vm/delete.sh
#
# A workdir in gs:// stays. It is no error if there is nothing to delete.
set -euo pipefail
cd "$(dirname "$0")/../.."
. launch/tpu_vm/settings.sh

look
if [ "$state" = ABSENT ] && [ -z "$DRY_RUN" ]; then
  echo "there is no $TPU_NAME in $ZONE of $PROJECT"
  exit 0
fi
# --force: with its node.
tpus queued-resources delete "$TPU_NAME" --force
