#!/usr/bin/env bash
# The other scripts source this to make .venv and install the project in it:
#   make_environment EXTRAS      such as: make_environment base
# A second call with the same setup.py and extras installs nothing.

# Where this is set, as in some containers, each start of Python compiles all that
# it imports: 4 of 7.6 CPU-seconds of `import gemma_sft.train`.
unset PYTHONDONTWRITEBYTECODE

find_python() {
  local candidate
  for candidate in "${PYTHON:-}" python3.12 python3.13 python3.14 python3; do
    if [ -n "$candidate" ] && "$candidate" -c \
      'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "gemma_sft needs Python 3.12 or newer, but there is none on the PATH:" \
    "install it from your system's packages, from https://www.python.org or" \
    "with 'uv python install 3.12', or set PYTHON=/path/to/python3.12" >&2
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
  # The pip of Python 3.12.1 backtracks through gemma's dependencies for ten
  # minutes; uv resolves them in seconds.
  [ -x .venv/bin/uv ] || .venv/bin/python -m pip install --quiet uv
  .venv/bin/uv pip install --quiet --python .venv/bin/python -e ".[$extras]"
  touch "$stamp"
}
