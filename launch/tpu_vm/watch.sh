#!/usr/bin/env bash
# Takes a run from its start to its end, through preemptions and crashes:
#
#   bash launch/tpu_vm/watch.sh train --config=configs/blop.py \
#     --workdir=gs://bucket/blop
#
# Creates the slice, sets it up, starts the command and checks its status every
# POLL seconds. If the slice is preempted, the script requests it again and
# starts the same command, which continues from its last checkpoint in the
# bucket. It restarts a crashed run at most RESTARTS times (3), but not after a
# user's mistake (status 2). DELETE=1 deletes the slice when the run has ended
# without an error. This script may be ended and started again at any time.
set -euo pipefail
cd "$(dirname "$0")/../.."
. launch/tpu_vm/settings.sh
. launch/tpu_vm/job.sh
limit="${RESTARTS:-3}"

check_job "$@"
[[ "$workdir" = gs://* ]] || refuse "--workdir=$workdir" \
  "--workdir=gs://BUCKET/NAME, as the disk of a host is lost with the host" \
  "choose a bucket, or start the run with launch/tpu_vm/run.sh"

ask='[ -f gemma_sft/launch/tpu_vm/host.sh ] || { echo none; exit; }'
ask+='; bash gemma_sft/launch/tpu_vm/host.sh status'

begin() {
  bash launch/tpu_vm/setup.sh && start_job "$@"
}

# After more failures than this in a row, the network is not the cause.
failures=0
failed() {
  failures=$((failures + 1))
  if [ "$failures" -gt "$limit" ]; then
    echo "$1 failed $failures times in a row" >&2
    exit 1
  fi
  echo "$1 failed; trying again in $POLL s" >&2
}

if [ -n "$DRY_RUN" ]; then
  bash launch/tpu_vm/create.sh
  begin "$@"
  on 0 "$ask"
  exit 0
fi

get_state  # Fails at once if the login or the project is wrong.
begun=
crashes=0
while true; do
  if ! get_state; then
    failed "reading the state of $TPU_NAME"
  elif [ "$state" = FAILED ] && [ -n "$begun" ]; then
    echo "the request for $TPU_NAME has FAILED; see: gcloud compute tpus" \
      "queued-resources describe $TPU_NAME --zone=$ZONE" >&2
    exit 1
  elif [ "$state" != ACTIVE ]; then
    bash launch/tpu_vm/create.sh && continue
    failed "creating $TPU_NAME"
  elif ! answer="$(on 0 "$ask")"; then
    failed "reading the status of the run on $TPU_NAME"
  else
    answer="${answer##*$'\n'}"
    # The end of an earlier run says nothing about this one.
    [ -n "$begun" ] || [ "$answer" = running ] || answer=none
    case "$answer" in
      running) failures=0 ;;
      none) begin "$@" || failed "starting on $TPU_NAME" ;;
      stopped)
        echo "the run was stopped (launch/tpu_vm/stop.sh)"
        exit 0 ;;
      # 75 means saved but unfinished (gemma_sft/monitor/stop.py).
      'exit 0' | 'exit 75')
        if [ "$answer" = 'exit 0' ]; then
          echo "the run has ended; its workdir is $workdir"
        else
          echo "the run has stopped at config.deadline_minutes; the same" \
            "command continues from $workdir"
        fi
        [ -z "${DELETE:-}" ] || bash launch/tpu_vm/delete.sh
        exit 0 ;;
      exit\ *)
        on 0 'tail -n 20 gemma_sft_job/log' >&2 || true
        echo "the run has ended with status ${answer#exit }" >&2
        [ "$answer" != 'exit 2' ] || exit 2
        crashes=$((crashes + 1))
        [ "$crashes" -le "$limit" ] || exit 1
        # First end what still runs on other hosts.
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
