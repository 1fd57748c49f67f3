#!/usr/bin/env bash
# Sourced by the scripts of the folders here: how a mistake is told, and how a
# command is printed.

# refuse GOT EXPECTED FIX
refuse() {
  echo "got: $1; expected: $2; fix: $3" >&2
  exit 2
}

# Prints a command so that it can be pasted.
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
