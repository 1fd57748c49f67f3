#!/usr/bin/env bash
# Sends a notebook to Kaggle, which starts it at once. First, and after every
# change of the project, send its code as a private data set:
#
#   export KAGGLE_USERNAME=me
#   bash launch/kaggle/push.sh code
#   bash launch/kaggle/push.sh tpu_v5e8            # or gpu_t4x2, tutorial
#   CONTINUE=1 bash launch/kaggle/push.sh tpu_v5e8 # with its own output attached
#
# It needs Kaggle's client (pip install kaggle) and a login, which the client
# reads from KAGGLE_API_TOKEN or ~/.kaggle. DRY_RUN=1 prints the commands
# without running them.
set -euo pipefail
cd "$(dirname "$0")/../.."
. launch/kaggle/settings.sh

folder="build/kaggle/$name"
if [ "$name" = code ]; then
  archive="$folder/gemma_sft.zip"
  run mkdir -p "$folder"
  run rm -f "$archive"
  # The committed files only: no weights, runs or environments.
  run git archive --format=zip --output="$archive" HEAD
  metadata='{"id": "'"$id"'", "title": "gemma-sft-code",'
  metadata+=' "licenses": [{"name": "apache-2.0"}]}'
  write "$folder/dataset-metadata.json" "$metadata"
  if [ -z "$DRY_RUN" ] && kaggle datasets status "$id" >/dev/null 2>&1; then
    run kaggle datasets version --path="$folder" --message="$(git rev-parse \
      --short HEAD)" --keep-tabular
  else
    run kaggle datasets create --path="$folder" --keep-tabular
  fi
  exit 0
fi
metadata="$(<"launch/kaggle/$name/kernel-metadata.json")"
metadata="${metadata//OWNER\//$KAGGLE_USERNAME/}"
if [ -n "${CONTINUE:-}" ]; then
  metadata="${metadata/\"kernel_sources\": []/\"kernel_sources\": [\"$id\"]}"
fi
run mkdir -p "$folder"
run cp "launch/kaggle/$name/notebook.ipynb" "$folder/notebook.ipynb"
write "$folder/kernel-metadata.json" "$metadata"
run kaggle kernels push --path="$folder"
