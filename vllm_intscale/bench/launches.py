"""`python -m vllm_intscale.bench.launches`: host microseconds of each operator, without graphs.

One token through the layers of LLaMA-3-8B, many times without waiting for the GPU: what a caller
pays before the GPU has begun. CUDA graphs hide it while decoding; elsewhere it bounds a batch that
is small.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from vllm_intscale import ops
from vllm_intscale.packing import pack_codes

HIDDEN, INNER = 4096, 14336
CALLS, ROUNDS = 200, 9  # fewer calls than a stream can hold


def host_us(call: Callable[[], object]) -> float:
    """Of one call, the median of some rounds."""
    for _ in range(10):
        call()
    found = []
    for _ in range(ROUNDS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        found.append((time.perf_counter() - start) / CALLS * 1e6)
        torch.cuda.synchronize()
    return sorted(found)[ROUNDS // 2]


def weight(n: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
    codes = torch.randint(-7, 8, (n, k), dtype=torch.int8, device="cuda")
    scale = torch.randint(16, 200, (n, k // 128), device="cuda").to(torch.int16)
    channel = torch.full((n,), 1e-5, device="cuda")
    return ops.prepare_weight(pack_codes(codes, 4), scale, channel)


def main() -> None:
    x = torch.randn(1, HIDDEN, dtype=torch.bfloat16, device="cuda")
    gate_up = torch.randn(1, 2 * INNER, dtype=torch.bfloat16, device="cuda")
    square, dense = weight(HIDDEN, HIDDEN), torch.randn(HIDDEN, HIDDEN, device="cuda").to(x.dtype)
    a8, scale = ops.quantize_activation(x)
    position = torch.zeros(1, dtype=torch.int64, device="cuda")
    calls: dict[str, Callable[[], object]] = {
        "intscale.quantize_activation": lambda: ops.quantize_activation(x),
        "intscale.norm_quantize": lambda: ops.norm_quantize([x, x], x[0], 1e-5, False, True),
        "intscale.silu_mul_quantize": lambda: ops.silu_mul_quantize(gate_up),
        "intscale.rotary_embedding": lambda: ops.rotary_embedding(
            gate_up[:, : 48 * 128], position, x[:, :128], 32, 8
        ),
        "intscale.gemm": lambda: ops.gemm(a8, scale, *square, None, x.dtype),
        "torch.nn.functional.linear": lambda: torch.nn.functional.linear(x, dense),
        "torch.empty": lambda: torch.empty(1, HIDDEN, dtype=x.dtype, device="cuda"),
    }
    for name, call in calls.items():
        print(f"{host_us(call):8.2f}  {name}")


if __name__ == "__main__":
    main()
