#!/usr/bin/env bash
# The other scripts of this folder source this: the slice and how to reach it.
#
#   PROJECT, ZONE  project and zone of Google Cloud; they have no default
#   ACCELERATOR    v5litepod-8 (a v5e), v5p-8, v6e-8, ...
#   TPU_NAME       name of the queued resource and of its one node
#   SPOT           1 for spot, 0 for on demand
#   RUNTIME        software version; the default depends on ACCELERATOR
#   CREATE_FLAGS   further flags of `queued-resources create`
#   POLL           seconds between two checks of the state
#   TPU_SETTINGS   a file of lines NAME=value, which override the environment
#
# DRY_RUN=1 prints every command, ready to be pasted, and runs none.

. launch/messages.sh
if [ -n "${TPU_SETTINGS:-}" ]; then
  # shellcheck source=/dev/null
  . "$TPU_SETTINGS"
fi
: "${ACCELERATOR:=v5litepod-8}" "${TPU_NAME:=gemma-sft}" "${SPOT:=1}"
: "${POLL:=30}" "${DRY_RUN:=}"
# Scripts that are called from here need the values of the file too.
export PROJECT ZONE ACCELERATOR TPU_NAME SPOT RUNTIME CREATE_FLAGS POLL DRY_RUN

[ -n "${PROJECT:-}" ] || refuse "no PROJECT" "the name of a Google Cloud project" \
  "export PROJECT=\$(gcloud config get project)"
[ -n "${ZONE:-}" ] || refuse "no ZONE" "a zone that has $ACCELERATOR" \
  "export ZONE=us-central1-a; 'gcloud compute tpus accelerator-types list \
--zone=ZONE' says what a zone has"
[[ "$TPU_NAME" =~ ^[a-z]([-a-z0-9]{0,61}[a-z0-9])?$ ]] || refuse \
  "TPU_NAME=$TPU_NAME" "lower-case letters, digits and hyphens, first a letter" \
  "export TPU_NAME=gemma-sft"
[[ "$SPOT" =~ ^[01]$ ]] || refuse "SPOT=$SPOT" "1 (spot) or 0 (on demand)" \
  "export SPOT=0"
# Runtimes: https://cloud.google.com/tpu/docs/runtimes. The number counts chips
# for v5e and v6e, but cores, two per chip, for v5p: .../docs/v5e, v6e, v5p.
case "$ACCELERATOR" in
  v5litepod-1 | v5litepod-4 | v5litepod-8 | v5litepod-16 | v5litepod-32 \
    | v5litepod-64 | v5litepod-128 | v5litepod-256)
    : "${RUNTIME:=v2-alpha-tpuv5-lite}" ;;
  v6e-1 | v6e-4 | v6e-8 | v6e-16 | v6e-32 | v6e-64 | v6e-128 | v6e-256)
    : "${RUNTIME:=v2-alpha-tpuv6e}" ;;
  v5p-8 | v5p-[1-9][0-9] | v5p-[1-9][0-9][0-9] | v5p-[1-9][0-9][0-9][0-9])
    : "${RUNTIME:=v2-alpha-tpuv5}" ;;
  *) refuse "ACCELERATOR=$ACCELERATOR" \
    "v5litepod-N (v5e) or v6e-N with N of 1, 4, 8, 16 ... 256, or v5p-N" \
    "export ACCELERATOR=v5litepod-8" ;;
esac

# Runs a command, or prints it if DRY_RUN is set.
run() {
  if [ -n "$DRY_RUN" ]; then
    quoted "$@"
  else
    "$@"
  fi
}

tpus() {
  run gcloud compute tpus "$@" --project="$PROJECT" --zone="$ZONE" --quiet
}

# on WORKER COMMAND: WORKER is a number or all.
on() {
  tpus tpu-vm ssh "$TPU_NAME" --worker="$1" --command="$2"
}

# Sets `state` to that of the queued resource, such as ACTIVE, or to ABSENT. A
# list with a filter may be empty, whereas `describe` would fail.
get_state() {
  local query=(queued-resources list "--format=value(state.state)"
    "--filter=name~/queuedResources/$TPU_NAME\$")
  state=ABSENT
  if [ -n "$DRY_RUN" ]; then
    tpus "${query[@]}"
    return
  fi
  state="$(tpus "${query[@]}")" || return
  state="${state:-ABSENT}"
}
