#!/usr/bin/env bash
# Requests a slice as a queued resource and waits until it is active:
#
#   PROJECT=p ZONE=us-central1-a bash launch/tpu_vm/create.sh
#
# settings.sh lists the variables. An active slice is kept; a preempted or failed
# one is deleted and requested again. ^C ends the wait but not the request.
set -euo pipefail
cd "$(dirname "$0")/../.."
. launch/tpu_vm/settings.sh

release() {
  echo "$TPU_NAME is $state: it is requested again"
  tpus queued-resources delete "$TPU_NAME" --force
}

request() {
  local command=(queued-resources create "$TPU_NAME" "--node-id=$TPU_NAME"
    "--accelerator-type=$ACCELERATOR" "--runtime-version=$RUNTIME") flag
  [ "$SPOT" = 0 ] || command+=(--spot)
  for flag in ${CREATE_FLAGS:-}; do
    command+=("$flag")
  done
  # Without --async, so that gcloud reports too small a quota here.
  tpus "${command[@]}"
}

get_state
if [ "$state" = FAILED ]; then
  release
  state=ABSENT
fi
[ "$state" != ABSENT ] || request
[ -z "$DRY_RUN" ] || exit 0

# States: https://cloud.google.com/tpu/docs/queued-resources
before=
while get_state && [ "$state" != ACTIVE ]; do
  [ "$state" = "$before" ] || echo "$TPU_NAME is $state"
  before="$state"
  case "$state" in
    SUSPENDED)  # Preempted.
      release
      request ;;
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
