"""Round to nearest, symmetric: the numeric part of the quantizer, one block of rows at a time.

    s[n, g]     = max |w[n, k in g]| / 7               (127 for 8-bit codes)
    S[n, g]     = rint(s[n, g] / c[n])                 c is the channel scale, 1 / amplifier
    code[n, k]  = clamp(rint(w[n, k] / (S[n, g] c[n])), -8, 7)

Codes are chosen against the integer scale that is stored, not against s: so what S loses in
rounding, the codes partly win back. With a search, S is that of the scales s * CLIPS which leaves
the least squared error in the group: clipping few large weights makes the others finer. Rows do not
depend on each other, but for the heuristic amplifier, which the caller makes a number first
(`heuristic_amplifier`). All is computed in float64: weights of bfloat16 often lie halfway between
two codes, and float32 would decide by noise.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from vllm_intscale.errors import IntScaleError
from vllm_intscale.format import ACCUMULATOR_MAX, INT16_MAX, LayerScheme, accumulator_bound
from vllm_intscale.packing import pack_codes

CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
SMALLEST_CHANNEL_SCALE = 2.0**-126  # the smallest normal float32: devices may flush the others


class QuantizedRows(NamedTuple):
    """Rows of the three tensors of a layer, and what happened to them."""

    qweight: Tensor  # int32 [n, K * bits / 32]
    group_scale: Tensor  # int16 [n, K / group_size]
    channel_scale: Tensor  # float32 [n]
    lost_groups: int  # groups of nonzero weights whose S is 0: their weights are now zero
    bound: int  # largest `accumulator_bound` of these rows


def quantize_rows(
    where: str,
    weight: Tensor,
    scheme: LayerScheme,
    amplifier: Literal["channel"] | int,
    search: bool = False,
) -> QuantizedRows:
    """Quantize rows `[n, K]` of a weight of any float dtype.

    where: file and tensor, for errors. amplifier: "channel", or one number for all rows. search:
    whether to look for the scales with the least squared error.

    Raises IntScaleError if a weight is NaN or infinite, or if a fixed amplifier makes a scale
    exceed int16 or lets an accumulator overflow.
    """
    groups = weight.float().unflatten(-1, (-1, scheme.group_size))
    scale = _float_scales(where, groups, scheme.bits)
    if amplifier == "channel":
        channel = (scale.amax(dim=-1) / scheme.max_group_scale).float()
        channel = channel.clamp_min(SMALLEST_CHANNEL_SCALE)
    else:
        channel = torch.full(scale.shape[:1], 1 / amplifier, dtype=torch.float32)
        if (largest := float((scale * amplifier).max())) >= INT16_MAX + 0.5:
            raise IntScaleError(
                f"{where}: amplifier {amplifier} makes an integer group scale {largest:.6g}, above "
                f"{INT16_MAX}; use --amplifier channel or a smaller number"
            )
    if search:
        scale = _least_error(groups, scale, channel, scheme.bits)
    codes, group_scale = _round(groups, scale, channel, scheme.bits)
    bound = accumulator_bound(codes, group_scale)
    while bool((over := bound > ACCUMULATOR_MAX).any()):
        if amplifier != "channel":
            raise IntScaleError(
                f"{where}: amplifier {amplifier} lets the int32 accumulator reach "
                f"{int(bound.max())}, above {ACCUMULATOR_MAX}; use --amplifier channel or a "
                "smaller number"
            )
        # The bound is nearly proportional to 1 / c. The margin covers what rounding adds.
        excess = bound[over].double() / ACCUMULATOR_MAX
        channel[over] = (channel[over].double() * excess * (1 + 2**-10)).float()
        codes[over], group_scale[over] = _round(
            groups[over], scale[over], channel[over], scheme.bits
        )
        bound[over] = accumulator_bound(codes[over], group_scale[over])
    return QuantizedRows(
        pack_codes(codes, scheme.bits),
        group_scale,
        channel,
        int(((group_scale == 0) & (scale > 0)).sum()),
        int(bound.max()),
    )


def smallest_scale(where: str, weight: Tensor, scheme: LayerScheme) -> float:
    """The smallest nonzero float scale of rows `[n, K]`; inf if there is none.

    Raises IntScaleError if a weight is NaN or infinite.
    """
    scale = _float_scales(where, weight.float().unflatten(-1, (-1, scheme.group_size)), scheme.bits)
    return float(torch.where(scale > 0, scale, torch.inf).min())


def heuristic_amplifier(smallest: float) -> int:
    """The smallest power of two, at least 1, that lifts this scale of a tensor to at least 1."""
    return 1 << math.ceil(max(0.0, -math.log2(smallest)))


def _float_scales(where: str, groups: Tensor, bits: int) -> Tensor:
    """Float scale of each group, float64 `[n, G]`, of float32 `[n, G, g]`."""
    amax = groups.abs().amax(dim=-1)
    if not bool(amax.isfinite().all()):
        raise IntScaleError(
            f"{where} holds NaN or Inf; repair or download the source model again, or leave the "
            "layer unquantized with --ignore"
        )
    return amax.double() / ((1 << (bits - 1)) - 1)


def _least_error(groups: Tensor, scale: Tensor, channel: Tensor, bits: int) -> Tensor:
    """Of the scales `scale` * CLIPS, in each group the one with the least squared error."""
    best, least = scale, torch.full_like(scale, torch.inf)
    for clip in CLIPS:
        codes, group_scale = _round(groups, scale * clip, channel, bits)
        step = group_scale.double() * channel.double()[:, None]
        error = (groups - codes.view_as(groups) * step[..., None]).square_().sum(-1)
        best = torch.where(error < least, scale * clip, best)
        least = torch.minimum(error, least)
    return best


def _round(groups: Tensor, scale: Tensor, channel: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """codes int8 `[n, K]` and group_scale int16 `[n, G]` for given channel scales."""
    channel = channel.double()[:, None]
    group_scale = torch.where(scale > 0, torch.round(scale / channel), 1.0)
    step = torch.where(group_scale > 0, group_scale * channel, torch.inf)  # S = 0: codes 0
    limit = 1 << (bits - 1)
    codes = groups.double().div_(step[..., None]).round_().clamp_(-limit, limit - 1)
    return codes.to(torch.int8).flatten(-2), group_scale.to(torch.int16)
