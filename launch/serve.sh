#!/usr/bin/env bash
# Serves an exported GGUF with llama.cpp, or answers a few prompts with it:
#
#   bash launch/serve.sh exports/blop/gguf/model-q8_0.gguf            # until ^C
#   bash launch/serve.sh exports/blop/gguf/model-q8_0.gguf 'What is Blop?'
#
# Prompts go through the chat template in the file, as from any client of Ollama
# or llama.cpp. PORT (8080) and LLAMA_SERVER change the port and the program.
set -euo pipefail
here="$(cd "$(dirname "$0")/.." && pwd)"
if [ $# -lt 1 ]; then
  echo "got: no file; expected: bash launch/serve.sh FILE.gguf [PROMPT...]" >&2
  exit 2
fi
file="$1"
shift
port="${PORT:-8080}"
server="${LLAMA_SERVER:-$(cd "$here" && .venv/bin/python -c '
from gemma_sft.exports import llama_runtime
print(llama_runtime.find_server(None))')}"
command=("$server" -m "$file" --host 127.0.0.1 --port "$port" --jinja -c 4096)
if [ $# -eq 0 ]; then
  echo "http://127.0.0.1:$port (a page to chat with, and an OpenAI interface)"
  exec "${command[@]}"
fi

log="$(mktemp)"
"${command[@]}" >"$log" 2>&1 &
pid=$!
trap 'kill "$pid" 2>/dev/null || true; rm -f "$log"' EXIT
until curl --noproxy '*' -sf "http://127.0.0.1:$port/health" >/dev/null; do
  if ! kill -0 "$pid" 2>/dev/null; then
    tail -n 20 "$log" >&2
    echo "got: llama-server ended; expected: a GGUF that it can load and a" \
      "free port $port; fix: see the lines above, or set PORT" >&2
    exit 2
  fi
  sleep 0.2
done
for prompt in "$@"; do
  printf '> %s\n' "$prompt"
  "$here/.venv/bin/python" - "$port" "$prompt" <<'PYTHON'
import json
import sys
import urllib.request

port, prompt = sys.argv[1:]
body = {'messages': [{'role': 'user', 'content': prompt}],
        'temperature': 0, 'repeat_penalty': 1.1, 'max_tokens': 256}
request = urllib.request.Request(
    f'http://127.0.0.1:{port}/v1/chat/completions',
    json.dumps(body).encode(), {'Content-Type': 'application/json'})
opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
with opener.open(request) as reply:
  print(json.load(reply)['choices'][0]['message']['content'])
PYTHON
done
