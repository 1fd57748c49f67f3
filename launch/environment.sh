#!/usr/bin/env bash
# Sourced by the other scripts: makes .venv and installs the project in it.
#   make_environment EXTRAS      for example: make_environment base
# A second call with the same setup.py and extras installs nothing.

find_python() {
  local candidate
  for candidate in "${PYTHON:-}" python3.12 python3.13 python3.14 python3; do
    if [ -n "$candidate" ] && "$candidate" -c \
      'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "gemma_sft needs Python 3.12 or newer, and there is none on the PATH:" \
    "install it from your system's packages or https://www.python.org, or" \
    "with 'uv python install 3.12', or name one with PYTHON=/path/to/python3.12" >&2
  return 2
}

make_environment() {
  local extras="$1" python stamp
  stamp=".venv/.installed-$extras"
  if [ -x .venv/bin/python ] && [ "$stamp" -nt setup.py ]; then
    return
  fi
  python="$(find_python)" || return
  [ -x .venv/bin/python ] || "$python" -m venv .venv
  # uv resolves in seconds where the pip that comes with 3.12.1 backtracks
  # through gemma's dependencies for ten minutes.
  [ -x .venv/bin/uv ] || .venv/bin/python -m pip install --quiet uv
  .venv/bin/uv pip install --quiet --python .venv/bin/python -e ".[$extras]"
  touch "$stamp"
}
