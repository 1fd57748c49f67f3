#!/usr/bin/env bash
# Prints the status of a notebook on Kaggle and downloads the output of its last
# version to workdirs/kaggle/:
#
#   KAGGLE_USERNAME=me bash launch/kaggle/pull.sh tpu_v5e8
#
# DRY_RUN=1 prints the commands without running them.
set -euo pipefail
cd "$(dirname "$0")/../.."
. launch/kaggle/settings.sh

[ "$name" != code ] || refuse "notebook 'code'" "tpu_v5e8, gpu_t4x2 or tutorial" \
  "bash launch/kaggle/pull.sh tpu_v5e8"
run kaggle kernels status "$id"
run mkdir -p "workdirs/kaggle/$name"
run kaggle kernels output "$id" --path="workdirs/kaggle/$name"
