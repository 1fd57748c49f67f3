#!/usr/bin/env bash
# run.sh and watch.sh source this to check the arguments of a run and start it.

# check_job ENTRY_POINT FLAGS: refuses invalid arguments and sets `workdir`.
check_job() {
  local argument
  [ -f "gemma_sft/${1:-}.py" ] || refuse "entry point '${1:-}'" \
    "train, evaluate or another of python -m gemma_sft.NAME" \
    "bash $0 train --config=configs/blop.py --workdir=gs://bucket/blop"
  workdir=
  for argument in "$@"; do
    case "$argument" in
      --workdir=?*) workdir="${argument#--workdir=}" ;;
    esac
  done
  [ -n "$workdir" ] || refuse "no --workdir" "--workdir=gs://BUCKET/NAME" \
    "add it; 'gcloud storage buckets create gs://BUCKET' makes a bucket"
}

start_job() {
  on all "SYNC_SECONDS=$(quoted "${SYNC_SECONDS:-300}") bash \
gemma_sft/launch/tpu_vm/host.sh start $(quoted "$@")"
}
