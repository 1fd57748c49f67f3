#!/usr/bin/env bash
# The scripts of this folder source this with their arguments. It sets `name`,
# the notebook or code to send or fetch, and `id`, its name on Kaggle.

. launch/messages.sh
: "${DRY_RUN:=}"
name="${1:-}"
case "$name" in
  code | tpu_v5e8 | gpu_t4x2 | tutorial) ;;
  *) refuse "notebook '$name'" "code, tpu_v5e8, gpu_t4x2 or tutorial" \
    "bash launch/kaggle/push.sh tpu_v5e8" ;;
esac
[[ "${KAGGLE_USERNAME:-}" =~ ^[A-Za-z0-9-]+$ ]] || refuse \
  "KAGGLE_USERNAME=${KAGGLE_USERNAME:-}" "your user name on Kaggle, as in URLs" \
  "export KAGGLE_USERNAME=me"
[ -n "$DRY_RUN" ] || command -v kaggle >/dev/null || refuse \
  "no program kaggle" "Kaggle's client and its login" "pip install kaggle"
# shellcheck disable=SC2034 # The script that sources this uses it.
id="$KAGGLE_USERNAME/gemma-sft-${name//_/-}"

# Runs a command, or prints it if DRY_RUN is set.
run() {
  if [ -n "$DRY_RUN" ]; then
    quoted "$@"
  else
    "$@"
  fi
}

# write FILE TEXT: writes it, or prints the command if DRY_RUN is set.
write() {
  if [ -n "$DRY_RUN" ]; then
    echo "$(quoted echo "$2") >$(quoted "$1")"
  else
    echo "$2" >"$1"
  fi
}
