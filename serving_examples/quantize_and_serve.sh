#!/usr/bin/env bash
# From a hub id (or a folder) to a served model:
#
#   serving_examples/quantize_and_serve.sh [HUB_ID_OR_FOLDER [VLLM OPTIONS...]]
#
# Without an argument: Qwen/Qwen2.5-7B-Instruct. The quantized model is kept in ./NAME-W4A8.
set -euo pipefail
source=${1:-Qwen/Qwen2.5-7B-Instruct}
out="$(basename "$source")-W4A8-INTSCALE-G128"
[ -d "$out" ] || intscale quantize "$source" "$out"
exec "$(dirname "$0")/serve.sh" "$out" "${@:2}"
