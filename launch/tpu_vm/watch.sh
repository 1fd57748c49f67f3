#!/usr/bin/env bash
# A run from nothing to its end, whatever happens to the slice meanwhile:
#
#   bash launch/tpu_vm/watch.sh train --config=configs/blop.py \
#     --workdir=gs://bucket/blop
#
# Creates the slice, sets it up, starts the command, and looks every POLL
# seconds. A slice that was preempted is asked for again and the same command
# started, which goes on from its last checkpoint in the bucket. So does a
# run that crashed, RESTARTS times (3) at most; a mistake of the user's (status
# 2) ends the watch. DELETE=1 deletes the slice when the run has ended well.
# The watch itself may be ended and started again at any time.
set -euo pipefail
cd "$(dirname "$0")/../.."
. launch/tpu_vm/settings.sh
. launch/tpu_vm/job.sh
limit="${RESTARTS:-3}"

check_job "$@"
[[ "$workdir" = gs://* ]] || refuse "--workdir=$workdir" \
  "--workdir=gs://BUCKET/NAME: a host's disk goes with the host" \
  "choose a bucket, or start without a watch: launch/tpu_vm/run.sh"

ask='[ -f gemma_sft/launch/tpu_vm/host.sh ] || { echo none; exit; }'
ask+='; bash gemma_sft/launch/tpu_vm/host.sh status'

begin() {
  bash launch/tpu_vm/setup.sh && start_job "$@"
}

# What fails more often than that in a row is not the network.
failures=0
failed() {
  failures=$((failures + 1))
  if [ "$failures" -gt "$limit" ]; then
    echo "$1 failed $failures times in a row" >&2
    exit 1
  fi
  echo "$1 failed; again in $POLL s" >&2
}

if [ -n "$DRY_RUN" ]; then
  bash launch/tpu_vm/create.sh
  begin "$@"
  on 0 "$ask"
  exit 0
fi

look  # What is wrong with the login or the project is told at once.
begun=
crashes=0
while true; do
  if ! look; then
    failed "looking at $TPU_NAME"
  elif [ "$state" = FAILED ] && [ -n "$begun" ]; then
    echo "the request for $TPU_NAME has FAILED; see: gcloud compute tpus" \
      "queued-resources describe $TPU_NAME --zone=$ZONE" >&2
    exit 1
  elif [ "$state" != ACTIVE ]; then
    bash launch/tpu_vm/create.sh && continue
    failed "creating $TPU_NAME"
  elif ! answer="$(on 0 "$ask")"; then
    failed "asking $TPU_NAME"
  else
    answer="${answer##*$'\n'}"
    # How an earlier run ended says nothing about this one.
    [ -n "$begun" ] || [ "$answer" = running ] || answer=none
    case "$answer" in
      running) failures=0 ;;
      none) begin "$@" || failed "starting on $TPU_NAME" ;;
      stopped)
        echo "the run was stopped (launch/tpu_vm/stop.sh)"
        exit 0 ;;
      'exit 0' | 'exit 75')  # 75: saved, and not at its end (stop.py).
        if [ "$answer" = 'exit 0' ]; then
          echo "the run has ended; its workdir is $workdir"
        else
          echo "the run has stopped by itself (config.deadline_minutes); the" \
            "same command goes on from $workdir"
        fi
        [ -z "${DELETE:-}" ] || bash launch/tpu_vm/delete.sh
        exit 0 ;;
      exit\ *)
        on 0 'tail -n 20 gemma_sft_job/log' >&2 || true
        echo "the run has ended with status ${answer#exit }" >&2
        [ "$answer" != 'exit 2' ] || exit 2
        crashes=$((crashes + 1))
        [ "$crashes" -le "$limit" ] || exit 1
        # What is left on other hosts goes first.
        on all "bash gemma_sft/launch/tpu_vm/host.sh stop" || true
        begin "$@" || failed "starting on $TPU_NAME" ;;
      *)
        echo "got: '$answer' of host.sh status" >&2
        exit 1 ;;
    esac
  fi
  begun=1
  sleep "$POLL"
done
