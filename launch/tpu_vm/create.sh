#!/usr/bin/env bash
# Asks for a slice as a queued resource and waits until it is there:
#
#   PROJECT=p ZONE=us-central1-a bash launch/tpu_vm/create.sh
#
# Variables: settings.sh. What is there already is kept; what was preempted or
# has failed is deleted and asked for again. ^C ends the waiting alone.
set -euo pipefail
cd "$(dirname "$0")/../.."
. launch/tpu_vm/settings.sh

give_back() {
  echo "$TPU_NAME is $state: it is asked for again"
  tpus queued-resources delete "$TPU_NAME" --force
}

ask() {
  local request=(queued-resources create "$TPU_NAME" "--node-id=$TPU_NAME"
    "--accelerator-type=$ACCELERATOR" "--runtime-version=$RUNTIME") flag
  [ "$SPOT" = 0 ] || request+=(--spot)
  for flag in ${CREATE_FLAGS:-}; do
    request+=("$flag")
  done
  # Without --async: a quota that is too small is told here.
  tpus "${request[@]}"
}

look
if [ "$state" = FAILED ]; then
  give_back
  state=ABSENT
fi
[ "$state" != ABSENT ] || ask
[ -z "$DRY_RUN" ] || exit 0

# States: https://cloud.google.com/tpu/docs/queued-resources
before=
while look && [ "$state" != ACTIVE ]; do
  [ "$state" = "$before" ] || echo "$TPU_NAME is $state"
  before="$state"
  case "$state" in
    SUSPENDED)  # Preempted.
      give_back
      ask ;;
    ABSENT | FAILED)
      tpus queued-resources describe "$TPU_NAME" "--format=yaml(state)" >&2 \
        || true
      echo "$TPU_NAME did not become ACTIVE: it is $state" >&2
      exit 1 ;;
  esac
  sleep "$POLL"
done
[ "$state" = ACTIVE ]
echo "$TPU_NAME is $state"
