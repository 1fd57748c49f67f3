#!/usr/bin/env bash
# Sourced by the scripts of this folder with their arguments: sets `name`, what
# to send or bring, and `id`, what Kaggle calls it.

. launch/messages.sh
: "${DRY_RUN:=}"
name="${1:-}"
case "$name" in
  code | tpu_v5e8 | gpu_t4x2 | tutorial) ;;
  *) refuse "notebook '$name'" "code, tpu_v5e8, gpu_t4x2 or tutorial" \
    "bash launch/kaggle/push.sh tpu_v5e8" ;;
esac
[[ "${KAGGLE_USERNAME:-}" =~ ^[A-Za-z0-9-]+$ ]] || refuse \
  "KAGGLE_USERNAME=${KAGGLE_USERNAME:-}" "your name on Kaggle, as in addresses" \
  "export KAGGLE_USERNAME=me"
[ -n "$DRY_RUN" ] || command -v kaggle >/dev/null || refuse \
  "no program kaggle" "Kaggle's client and its login" "pip install kaggle"
# shellcheck disable=SC2034 # For the script that sources this.
id="$KAGGLE_USERNAME/gemma-sft-${name//_/-}"

# Runs a command, or prints it.
run() {
  if [ -n "$DRY_RUN" ]; then
    quoted "$@"
  else
    "$@"
  fi
}

# write FILE TEXT
write() {
  if [ -n "$DRY_RUN" ]; then
    echo "$(quoted echo "$2") >$(quoted "$1")"
  else
    echo "$2" >"$1"
  fi
}
