"""The CPU side of the operators: `reference`, with its integer product on int8 instructions.

A weight is stored as `code * S`, split into balanced digits of base 128:

    code * S = digit[0] + 128 * digit[1] + ...      each digit in -64..63

so that `torch._int_mm` (int8 x int8 -> int32) does the work, once a digit: two digits up to
|code * S| = 8127, which covers 4-bit codes with |S| <= 1015. Seven bits a digit and not eight,
because without VNNI instructions x86 sums pairs of u8 x s8 products in saturating int16:
2 * 255 * 64 fits, 2 * 255 * 128 would not. Sums of digits may wrap in int32; since the true
result fits (`format.accumulator_bound`), what remains is exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_intscale import reference
from vllm_intscale.packing import unpack_codes

ROWS = 512  # of a weight prepared at a time: bounds the extra memory


def quantize_activation(x: Tensor) -> tuple[Tensor, Tensor]:
    """See `reference.quantize_activation`; rows of a8 have no gaps, whatever those of x."""
    return reference.quantize_activation(x.contiguous())


def norm_quantize(
    addends: list[Tensor], weight: Tensor, epsilon: float, keep_norm: bool, keep_sum: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`reference.rms_norm`, quantized; see `row_kernels.norm_quantize`."""
    addends = [addend.contiguous() for addend in addends]
    y, added = reference.rms_norm(addends, weight, epsilon)
    if added is addends[0]:  # an operator returns none of its inputs
        added = added.clone()
    kept = (t if wanted else t.new_empty(0) for t, wanted in ((y, keep_norm), (added, keep_sum)))
    return (*quantize_activation(y), *kept)  # type: ignore[return-value]


def all_reduce_norm_quantize(
    addends: list[Tensor],
    weight: Tensor,
    epsilon: float,
    keep_norm: bool,
    keep_sum: bool,
    group_name: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """vLLM's sum over ranks, then `norm_quantize`; see `all_reduce.all_reduce_norm_quantize`."""
    reduced = torch.ops.vllm.all_reduce(addends[-1], group_name)
    norm = norm_quantize([*addends[:-1], reduced], weight, epsilon, keep_norm, keep_sum)
    return *norm, reduced


def silu_mul_quantize(gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """`reference.silu_mul` of `[M, 2 K]`, quantized."""
    return quantize_activation(reference.silu_mul(gate_up))


def rotary_embedding(
    qkv: Tensor, positions: Tensor, cos_sin_cache: Tensor, q_heads: int, k_heads: int
) -> tuple[Tensor, Tensor]:
    """See `reference.rotary_embedding`."""
    q, k = reference.rotary_embedding(qkv, positions, cos_sin_cache, q_heads, k_heads)
    return q.contiguous(), k.contiguous()


def describe(qweight: Tensor, group_scale: Tensor) -> str:
    """What runs a prepared weight, for the log."""
    return "cpu_backend (torch._int_mm, exact)"


def prepare_weight(
    qweight: Tensor, group_scale: Tensor, channel_scale: Tensor, bits: int, _agree: object = None
) -> tuple[Tensor, Tensor, Tensor]:
    """qweight int32 `[..., N, K * bits / 32]` to digits int8 `[..., D, N, K]`.

    group_scale, int16 `[..., N, K / g]`, is in the digits now and becomes empty. D need not be the
    same on all ranks: the arithmetic is.
    """
    largest = int(group_scale.to(torch.int32).abs().max()) << (bits - 1)
    digits = 1
    while 63 * (128**digits - 1) // 127 < largest:
        digits += 1
    n, k = qweight.shape[-2], qweight.shape[-1] * 32 // bits
    out = torch.empty(*qweight.shape[:-2], digits, n, k, dtype=torch.int8)
    matrices = (t.reshape(-1, n, t.shape[-1]) for t in (qweight, group_scale))
    for target, words, scale in zip(out.view(-1, digits, n, k), *matrices, strict=True):
        for start in range(0, n, ROWS):
            rows = slice(start, start + ROWS)
            codes = unpack_codes(words[rows], bits).to(torch.int32)
            rest = codes * scale[rows].to(torch.int32).repeat_interleave(k // scale.shape[1], dim=1)
            for digit in target[:, rows]:
                low = ((rest + 64) & 127) - 64
                digit.copy_(low)
                rest = (rest - low) >> 7
    return out, group_scale.new_empty(0), channel_scale


def integer_weight(qweight: Tensor, group_scale: Tensor, n: int, k: int) -> Tensor:
    """`code * S`, int32 `[..., N, K]`, of a prepared weight."""
    base = 128 ** torch.arange(qweight.shape[-3], dtype=torch.int32)
    return (qweight * base[:, None, None]).sum(-3, dtype=torch.int32)


def accumulate(a8: Tensor, qweight: Tensor) -> Tensor:
    """See `reference.accumulate`; int32 `[M, N]`."""
    acc = torch._int_mm(a8, qweight[0].T)
    for i, digit in enumerate(qweight[1:], start=1):
        acc += torch._int_mm(a8, digit.T) << 7 * i
    return acc


def gemm(
    a8: Tensor,
    token_scale: Tensor,
    qweight: Tensor,
    group_scale: Tensor,
    channel_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """See `reference.gemm`; the weight as `prepare_weight` made it. int32 gives accumulators."""
    acc = accumulate(a8, qweight)
    if dtype == torch.int32:
        return acc
    return reference.scale_output(acc, token_scale, channel_scale, bias, dtype)


def moe(
    x: Tensor,
    w13: list[Tensor],
    w2: list[Tensor],
    topk_weights: Tensor,
    topk_ids: Tensor,
    expert_map: Tensor | None,
    router_weight_on_input: bool,
) -> Tensor:
    """See `reference.moe`; weights as `prepare_weight` made them."""

    def experts(e: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        return (w13[0][e], w13[2][e]), (w2[0][e], w2[2][e])

    def linear(x: Tensor, weight: tuple[Tensor, Tensor]) -> Tensor:
        qweight, channel_scale = weight
        a8, token_scale = quantize_activation(x)
        acc = accumulate(a8, qweight)
        return reference.scale_output(acc, token_scale, channel_scale, None, x.dtype)

    return reference.moe(
        x, experts, topk_weights, topk_ids, expert_map, router_weight_on_input, linear
    )
