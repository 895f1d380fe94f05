#!/usr/bin/env bash
# Ask the server of serve.sh with curl: a completion, then the same streamed.
set -euo pipefail
url="http://127.0.0.1:${PORT:-8000}/v1/completions"
prompt=${1:-And the LORD said unto Moses,}
body() { python3 -c 'import json, sys; print(json.dumps(dict(model="model", prompt=sys.argv[1],
  max_tokens=40, temperature=0, stream=sys.argv[2] == "stream")))' "$prompt" "$1"; }
curl --fail --silent --show-error "$url" -H 'Content-Type: application/json' -d "$(body whole)"
echo
curl --fail --silent --show-error --no-buffer "$url" -H 'Content-Type: application/json' \
  -d "$(body stream)"
