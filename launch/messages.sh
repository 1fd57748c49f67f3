#!/usr/bin/env bash
# The scripts of the subfolders source this to report mistakes and to print
# commands.

# refuse GOT EXPECTED FIX
refuse() {
  echo "got: $1; expected: $2; fix: $3" >&2
  exit 2
}

# Prints a command so that it can be pasted into a shell.
quoted() {
  local word line='' quote="'\\''"
  for word in "$@"; do
    if [[ ! "$word" =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]]; then
      word="'${word//\'/$quote}'"
    fi
    line+=" $word"
  done
  echo "${line# }"
}
