#!/usr/bin/env bash
# Serve over several GPUs (or CPU processes): serving_examples/serve_tensor_parallel.sh [TP [MODEL]]
#
# TP is 2 unless given. Where a rank's share of the input channels cuts a group of 128, the groups
# are split, which is exact; a TP that no split can serve is refused with the largest that can.
set -euo pipefail
tp=${1:-2}
if ! python3 -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  # vLLM on CPU binds each rank to cores: one core a rank.
  export VLLM_CPU_OMP_THREADS_BIND=${VLLM_CPU_OMP_THREADS_BIND:-$(seq -s '|' 0 $((tp - 1)))}
  export VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-1}
fi
model=${2:-/tmp/tiny-llama-W4A8}
if [ $# -lt 2 ] && [ ! -d "$model" ]; then
  python3 -m vllm_intscale quantize "$(dirname "$0")/tiny-llama" "$model"
fi
exec "$(dirname "$0")/serve.sh" "$model" --tensor-parallel-size "$tp"
