#!/usr/bin/env bash
# Runs on a host of a slice; the other scripts call it over ssh.
#
#   host.sh install EXTRAS [WEIGHTS]   makes the environment, fetches weights
#   host.sh start ENTRY_POINT FLAGS    in the background, unless one is running
#   host.sh stop                       SIGTERM: the run saves and ends
#   host.sh status                     prints none, running, stopped or exit N
set -euo pipefail
cd "$(dirname "$0")/../.."
. launch/environment.sh
job="${JOB:-$HOME/gemma_sft_job}"
mkdir -p "$job"

install() {
  # The images are Ubuntu 22.04 with Python 3.10; uv installs a newer one.
  if ! find_python >/dev/null 2>&1; then
    python3 -m pip install --user --quiet uv
    "$HOME/.local/bin/uv" python install --quiet 3.12
    PYTHON="$("$HOME/.local/bin/uv" python find 3.12)"
    export PYTHON
  fi
  make_environment "$1"
  bash launch/blop_compiler.sh
  case "${2:-}" in
    gs://*)
      mkdir -p weights
      gcloud storage rsync --recursive "$2" weights ;;
    ?*)
      echo "got: WEIGHTS=$2; expected: gs://...; fix: gcloud storage cp" \
        "--recursive $2 gs://BUCKET/" >&2
      return 2 ;;
  esac
}

# A run and its children hold the lock. Unlike a process id in a file, the lock
# does not outlive a reboot.
running() {
  ! flock --nonblock "$job/lock" true
}

start() {
  exec 9>"$job/lock"
  if ! flock --nonblock 9; then
    echo "a run is in progress already"
    return
  fi
  rm -f "$job/exit" "$job/stop" "$job/process"
  # In a new session, which outlives this connection.
  setsid nohup bash launch/tpu_vm/host.sh work "$@" >>"$job/log" 2>&1 \
    </dev/null &
  echo "started; its log is $job/log"
}

# Only the first host writes to the bucket. jax.distributed reads the same key
# (jax/_src/clusters/cloud_tpu_cluster.py).
is_first() {
  [ "$(curl -sf -H 'Metadata-Flavor: Google' \
    http://metadata.google.internal/computeMetadata/v1/instance/attributes/agent-worker-number \
    || echo 0)" = 0 ]
}

# Unfinished checkpoints are not copied, and files are deleted only after a copy
# that succeeded. So the bucket always has a complete checkpoint, whenever this
# host is taken away; incomplete ones are skipped at the start
# (gemma_sft/run/checkpoint.py). The lock waits for a copy that the loop below
# left running when it was killed.
push() (
  copy=(gcloud storage rsync --recursive
    "--exclude=.*orbax-checkpoint-tmp.*|(.*/)?\.lock\$")
  exec 8>"$job/push"
  flock 8
  "${copy[@]}" "$local_dir" "$url" && "${copy[@]}" \
    --delete-unmatched-destination-objects "$local_dir" "$url"
)

# The marker makes the source exist, which rsync requires, and shows at once
# whether the bucket can be written.
pull() {
  mkdir -p "$local_dir"
  date | gcloud storage cp - "$url/.synchronised" \
    && gcloud storage rsync --recursive "$url" "$local_dir"
}

# work ENTRY_POINT FLAGS: what `start` runs.
work() {
  local url='' local_dir='' arguments=() argument process again=1 status=0
  local syncing='' terminated=''
  trap 'again=1; terminated=1' TERM
  echo "== $(date -u +%FT%TZ) gemma_sft.$*"
  for argument in "${@:2}"; do
    case "$argument" in
      --workdir=gs://*)
        url="${argument#--workdir=}"
        url="${url%/}"
        local_dir="workdirs/${url#gs://}"
        argument="--workdir=$local_dir" ;;
    esac
    arguments+=("$argument")
  done
  if [ -n "$url" ]; then
    if ! pull; then
      echo 1 >"$job/exit"
      return 1
    fi
    if is_first; then
      (while sleep "${SYNC_SECONDS:-300}"; do push || true; done) 9>&- &
      syncing=$!
    fi
  fi
  .venv/bin/python -m "gemma_sft.$1" "${arguments[@]}" &
  process=$!
  echo "$process" >"$job/process"
  # A signal interrupts `wait`. It is not passed on: at a shutdown every process
  # gets its own signal, and a second one would end the run before it has saved.
  while [ -n "$again" ]; do
    again=
    wait "$process" && status=0 || status=$?
  done
  if [ -n "$syncing" ]; then
    kill "$syncing" 2>/dev/null || true
    push || [ "$status" != 0 ] || status=1
  fi
  # When the host is taken away, its run has not ended: leave no status.
  [ -z "$terminated" ] || return 0
  [ ! -e "$job/stop" ] || status=stopped
  echo "$status" >"$job/exit"
  echo "== $(date -u +%FT%TZ) exit $status"
}

# Returns when the run has saved and ended.
stop() {
  running || return 0
  touch "$job/stop"
  [ ! -e "$job/process" ] || kill -TERM "$(cat "$job/process")" || true
  flock --timeout "${STOP_SECONDS:-600}" "$job/lock" true
}

status() {
  if running; then
    echo running
  elif [ ! -e "$job/exit" ]; then
    echo none
  elif [ "$(cat "$job/exit")" = stopped ]; then
    echo stopped
  else
    echo "exit $(cat "$job/exit")"
  fi
}

"$@"
