"""The arithmetic of W4A8 with Integer Scale, exactly. This file is the specification.

    y[m, n] = round( float( sum_g S[n, g] * sum_{k in g} a8[m, k] * w[n, k] )     int32, exact
                     * channel_scale[n] * token_scale[m] + bias[n] )              float32

w are int4 (or int8) codes, S the integer group scales, a8 the int8 activations (Integer Scale,
arXiv 2405.14597; here each output channel has its own amplifier and `channel_scale` is its
reciprocal). Kernels must equal these functions bit for bit, on every input:

* Integers are added and multiplied exactly. The checkpoint proves that no int32 accumulator can
  overflow (`format.accumulator_bound`), so order, split and tile of the sum do not matter.
* Each float32 operation written here is rounded once, to nearest even, with subnormals kept;
  nothing is contracted to a fused multiply-add.
* Each row of an output depends on the same row of the input alone.

`fold` is the one other arithmetic: the group scale inside int8 weights. Kernels that run it equal
`gemm` of the folded weight.

Everything is plain torch and runs on any device. Constants are tensors where they are divided
by or divide: torch turns `tensor / number` into a multiplication with a rounded reciprocal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Rows whose largest magnitude is below this become zero, so that no scale is ever subnormal.
SMALLEST_AMAX = 2.0**-100
LOG2_E = 1.4426950408889634
# Of a polynomial near 2**r on |r| <= 1/2, highest power first: relative error below 3e-6, which
# 16-bit results do not see.
EXP2 = (0.009582855, 0.05590643, 0.240241, 0.6931242, 1.0)


class Weight(NamedTuple):
    """One quantized matrix, as int8 codes whatever their width in the checkpoint."""

    codes: Tensor  # int8 [N, K]
    group_scale: Tensor  # int16 [N, K / group_size]
    channel_scale: Tensor  # float32 [N]


def quantize_activation(x: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 quantization with one scale per token.

    x: float `[M, K]`. Returns a8 int8 `[M, K]` in -127..127 and token_scale float32 `[M]`.
    A row that holds NaN or Inf gets codes 0 and scale NaN, so its output row is NaN.
    """
    x = x.float()
    amax = x.abs().amax(dim=-1, keepdim=True)
    finite = amax.isfinite()
    usable = finite & (amax >= SMALLEST_AMAX)
    amax = torch.where(usable, amax, 1.0)
    limit = torch.full_like(amax, 127)
    scale = torch.where(usable, amax / limit, 0.0)
    codes = torch.where(usable, torch.round(x * (limit / amax)), 0.0)
    return codes.to(torch.int8), torch.where(finite, scale, torch.nan).squeeze(-1)


def accumulate(a8: Tensor, codes: Tensor, group_scale: Tensor) -> Tensor:
    """The int32 accumulators `[M, N]` of a8 int8 `[M, K]` against codes `[N, K]` and S `[N, K/g]`.

    Computed in float64, which is exact: every partial sum is an integer below 2**53.
    """
    group_size = codes.shape[-1] // group_scale.shape[-1]
    scaled = codes.double() * group_scale.double().repeat_interleave(group_size, dim=-1)
    return (a8.double() @ scaled.mT).to(torch.int32)


def largest_integer(codes: Tensor, group_scale: Tensor) -> Tensor:
    """m of the fold form: the largest |code * S| of each channel, at least 127; int64 `[N]`."""
    group_size = codes.shape[-1] // group_scale.shape[-1]
    largest_code = codes.unflatten(-1, (-1, group_size)).to(torch.int64).abs().amax(-1)
    largest: Tensor = (largest_code * group_scale.to(torch.int64).abs()).amax(-1).clamp(min=127)
    return largest


def scale_to_int8(integers: Tensor, largest: Tensor) -> Tensor:
    """round_half_even(integers * 127 / largest), exactly; int64."""
    numerator, denominator = 254 * integers.to(torch.int64).abs() + largest, 2 * largest
    rounded = numerator // denominator
    tie_to_odd = (numerator % denominator == 0) & (rounded % 2 == 1)
    return (rounded - tie_to_odd.to(torch.int64)) * integers.sign()


def folded_channel_scale(channel_scale: Tensor, largest: Tensor) -> Tensor:
    """channel_scale * largest / 127 in float32, rounded twice."""
    factor = largest.to(torch.float32)
    return channel_scale * factor / torch.full_like(factor, 127)


def fold(weight: Weight) -> Weight:
    """The fold form of a weight: int8 codes with the group scale in them, one group with S = 1.

    w8 = round_half_even(code * S * 127 / m[n]), m[n] = max(127, max |code * S| of the channel), so
    nothing is rounded where no |code * S| exceeds 127. K runs unbroken through the matrix product
    and no accumulator overflows for K below 133144. Another arithmetic than the weight's own,
    which kernels may run instead; a layer has one of them for every batch size.
    """
    group_size = weight.codes.shape[-1] // weight.group_scale.shape[-1]
    largest = largest_integer(weight.codes, weight.group_scale)
    scale = weight.group_scale.to(torch.int64).repeat_interleave(group_size, dim=-1)
    codes = scale_to_int8(weight.codes.to(torch.int64) * scale, largest.unsqueeze(-1))
    return Weight(
        codes.to(torch.int8),
        torch.ones_like(weight.group_scale[..., :1]),
        folded_channel_scale(weight.channel_scale, largest),
    )


def scale_output(
    acc: Tensor, token_scale: Tensor, channel_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """int32 accumulators `[M, N]` to outputs of `dtype`; the order of operations is fixed."""
    y = acc.float() * channel_scale * token_scale.unsqueeze(-1)
    if bias is not None:
        y = y + bias.float()
    return y.to(dtype)


def gemm(
    a8: Tensor, token_scale: Tensor, weight: Weight, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Quantized activations times a quantized weight: `[M, K] x [N, K] -> [M, N]` of `dtype`."""
    acc = accumulate(a8, weight.codes, weight.group_scale)
    return scale_output(acc, token_scale, weight.channel_scale, bias, dtype)


def linear(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """A whole linear layer, `[M, K] -> [M, N]`, output in the dtype of x."""
    return gemm(*quantize_activation(x), weight, bias, x.dtype)


def exp2(x: Tensor) -> Tensor:
    """float32 2**x for x clamped to -100..100, as exact as EXP2, from what every device has.

    2**x = 2**n * 2**r, with n the nearest integer: it is added to the exponent.
    """
    x = x.clamp(-100.0, 100.0)
    n = torch.round(x)
    r = x - n
    p = torch.full_like(r, EXP2[0])
    for c in EXP2[1:]:
        p = p * r + c
    return (p.view(torch.int32) + (n.to(torch.int32) << 23)).view(torch.float32)


def reciprocal(x: Tensor) -> Tensor:
    """1 / x for float32 x in 1..2**101, to a relative error of 4e-6.

    A division is exact, but on a GPU as long as all else in `silu_mul`. The difference of bit
    patterns is within 7 %; of Newton's two steps the first has a factor that centres its error.
    """
    y = (0x7EF07580 - x.view(torch.int32)).view(torch.float32)
    y = y * (2.0019 - x * y)
    return y * (2.0 - x * y)


def silu_mul(gate_up: Tensor) -> Tensor:
    """`silu(gate) * up` of `[M, 2 I]` (gate first), float32 inside, rounded once to the dtype."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (gate * reciprocal(1 + exp2(gate * -LOG2_E)) * up).to(gate_up.dtype)


def rotary_embedding(
    qkv: Tensor, positions: Tensor, cos_sin_cache: Tensor, q_heads: int, k_heads: int
) -> tuple[Tensor, Tensor]:
    """Queries `[M, q_heads, D]` and keys `[M, k_heads, D]`, rotated (RoFormer, arXiv 2104.09864).

    qkv `[M, >= (q_heads + k_heads) * D]` begins with both; column i of a head is paired with
    i + D / 2. positions int `[M]`; cos_sin_cache `[positions, D]`, cosines first. All of one dtype,
    float32 inside, rounded once.
    """
    head_size = cos_sin_cache.shape[1]
    cos, sin = cos_sin_cache[positions].float().unsqueeze(1).chunk(2, dim=-1)
    heads = qkv.float()[:, : (q_heads + k_heads) * head_size].unflatten(1, (-1, head_size))
    first, second = heads.chunk(2, dim=-1)
    rotated = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    q, k = rotated.to(qkv.dtype).split([q_heads, k_heads], dim=1)
    return q, k


def norm_threads(k: int) -> int:
    """A power of two, of which `rms_norm` adds that many sums: 16 columns for each, if they fit."""
    threads = 32
    while threads * 16 < k and threads < 1024:
        threads *= 2
    return threads


def rms_norm(addends: Sequence[Tensor], weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Their sum, normalized by its root mean square and weighted; and the sum.

    addends `[M, K]`, added in this order, weight `[K]`, all of one dtype. float32 inside, as vLLM's
    graphs compute it: both results are rounded to the dtype once. Squares are added in a fixed
    order: every sum is that of 8 neighbouring columns in each block of 8 * `norm_threads`, one
    after the other; then the second half of each 32 sums is added to the first, until one is left,
    and so for those.
    """
    x = addends[0]
    rows, k = x.shape
    added = x.float()
    for other in addends[1:]:
        added = added + other.float()
    threads = norm_threads(k)
    squares = torch.nn.functional.pad(added.square(), (0, -k % (8 * threads)))
    sums = x.new_zeros(rows, threads, dtype=torch.float32)
    for block in squares.view(rows, -1, threads, 8).unbind(1):
        for column in block.unbind(-1):
            sums = sums + column
    for width in (32, threads // 32):  # inside of warps, then over them
        sums = sums.view(rows, -1, width)
        while sums.shape[-1] > 1:
            first, second = sums.chunk(2, dim=-1)
            sums = first + second
    mean = sums.view(rows, 1) / torch.full((1, 1), float(k), device=x.device)
    # torch.sqrt of float32 may be off by one unit on CPU; rounded from float64 it is not.
    inverse = torch.ones_like(mean) / (mean + epsilon).double().sqrt().float()
    return (added * inverse * weight.float()).to(x.dtype), added.to(x.dtype)


def moe(
    x: Tensor,
    experts: Callable[[int], tuple[Any, Any]],
    topk_weights: Tensor,
    topk_ids: Tensor,
    expert_map: Tensor | None = None,
    router_weight_on_input: bool = False,
    linear: Callable[[Tensor, Any], Tensor] = linear,
) -> Tensor:
    """A mixture-of-experts layer (gate and up, silu_mul, down, weighted sum) over local experts.

    x `[M, H]`; `experts(e)` gives the local expert's w13 `[2 I, H]` (gate first) and w2 `[H, I]`;
    topk_weights float32 and topk_ids int `[M, topk]`; expert_map int32 `[global experts]` to local
    index or -1. Slots whose id is -1 or not local add nothing. Slots are added in order, in
    float32, and rounded once. Another `linear` with the same bits may bring its own weights.
    """
    if router_weight_on_input:  # topk is 1
        x = x * topk_weights.to(x.dtype)
        topk_weights = torch.ones_like(topk_weights)
    local = topk_ids.long()
    if expert_map is not None:
        local = torch.where(local >= 0, expert_map.long()[local], -1)
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for slot in range(topk_ids.shape[1]):
        for expert in local[:, slot].unique().tolist():
            if expert < 0:
                continue
            rows = (local[:, slot] == expert).nonzero().squeeze(-1)
            w13, w2 = experts(expert)
            y = linear(silu_mul(linear(x[rows], w13)), w2)
            out[rows] = out[rows] + topk_weights[rows, slot, None].float() * y.float()
    return out.to(x.dtype)
