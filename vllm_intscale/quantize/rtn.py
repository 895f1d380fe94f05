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
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from vllm_intscale.errors import IntScaleError
from vllm_intscale.format import ACCUMULATOR_MAX, INT16_MAX, LayerScheme, accumulator_bound
from vllm_intscale.packing import pack_codes, unpack_codes

CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
Rows = Tensor | slice  # a mask, or a slice
SMALLEST_CHANNEL_SCALE = 2.0**-126  # the smallest normal float32: devices may flush the others


class QuantizedRows(NamedTuple):
    """Rows of the three tensors of a layer, and what happened to them."""

    qweight: Tensor  # int32 [n, K * bits / 32]
    group_scale: Tensor  # int16 [n, K / group_size]
    channel_scale: Tensor  # float32 [n]
    float_scale: Tensor  # float64 [n, K / group_size], what S * channel_scale is to be
    lost_groups: int  # groups of nonzero weights whose S is 0: their weights are now zero
    bound: int  # largest `accumulator_bound` of these rows


class ConvertedRows(NamedTuple):
    """Rows that were quantized before, and what that changed."""

    rows: QuantizedRows
    kept_groups: int  # whose codes are the same
    squared_error: float  # of the weights, against the codes and scales they had
    squares: float  # of the weights


def quantize_rows(
    where: str,
    weight: Tensor,
    scheme: LayerScheme,
    amplifier: Literal["channel"] | int,
    search: bool = False,
    energy: Tensor | float = 1.0,
) -> QuantizedRows:
    """Quantize rows `[n, K]` of a weight of any float dtype.

    where: file and tensor, for errors. amplifier: "channel", or one number for all rows. search:
    whether to look for the scales with the least squared error. energy: `[K]`, what the error of a
    weight counts in that: its inputs' squares.

    Raises IntScaleError if a weight is NaN or infinite, or if a fixed amplifier makes a scale
    exceed int16 or lets an accumulator overflow.
    """
    groups = weight.float().unflatten(-1, (-1, scheme.group_size))
    scale = float_scales(where, groups, scheme.bits)
    channel = channel_scale(where, scale, scheme, amplifier)
    if search:
        if isinstance(energy, Tensor):
            energy = energy.view(-1, scheme.group_size)
        scale, _ = least_error(groups, clipped(scale), channel, scheme.bits, energy)

    def round_rows(rows: Rows, channel: Tensor) -> tuple[Tensor, Tensor]:
        return _round(groups[rows], scale[rows], channel, scheme.bits)

    return within_bound(where, scale, channel, scheme, amplifier, round_rows)


def convert_rows(
    where: str,
    codes: Tensor,
    scale: Tensor,
    scheme: LayerScheme,
    amplifier: Literal["channel"] | int,
) -> ConvertedRows:
    """Give integer scales to rows that are quantized already, to code * scale.

    codes: int8 `[n, K]`, zero points subtracted. scale: float64 `[n, K / g]`, of either sign.
    Groups whose codes fit int4 keep them; the others are rounded again, with the scale that leaves
    the least squared error. That is mostly the one they had, or its negative, which has room for
    codes of -7 to 8: then only codes beyond are changed.

    Raises IntScaleError as `quantize_rows`, if a scale is NaN or infinite too.
    """
    if not bool(scale.isfinite().all()):
        raise IntScaleError(f"{where} has a scale that is NaN or Inf; download the model again")
    groups = codes.unflatten(-1, (-1, scheme.group_size))
    energy = groups.float().square_().sum(-1).double()  # exact: below 2**24
    zero = (energy == 0) | (scale == 0)
    if bool(zero.any()):
        groups = torch.where(zero[..., None], 0, groups)
    limit = 1 << (scheme.bits - 1)
    kept = torch.ones_like(zero)
    if int(codes.min()) < -limit or int(codes.max()) >= limit:
        kept = ((groups >= -limit) & (groups < limit)).all(-1)
    negative, scale = scale < 0, torch.where(zero, 0.0, scale.abs())
    weight = None
    given = scale
    if not bool(kept.all()):
        weight = groups * torch.where(negative, -scale, scale)[..., None]
        scale = torch.where(kept, scale, weight.abs().amax(-1) / (limit - 1))
    channel = channel_scale(where, scale, scheme, amplifier)
    if weight is not None:
        again, error = least_error(weight, [*clipped(scale), given], channel, scheme.bits)
        _, mirrored_error = least_error(-weight, [given], channel, scheme.bits)
        mirrored = ~kept & (mirrored_error < error)
        scale = torch.where(kept, scale, torch.where(mirrored, given, again))
        negative = torch.where(kept, negative, mirrored)
        mirrored_weight = torch.where(mirrored[..., None], -weight, weight)

    def round_rows(rows: Rows, channel: Tensor) -> tuple[Tensor, Tensor]:
        new, group_scale = groups[rows], integer_scale(scale[rows], channel)
        if weight is not None:
            group_scale = torch.where(kept[rows], group_scale, at_least_one(group_scale))
            step = step_of(group_scale, channel)
            codes = _codes(mirrored_weight[rows], step, scheme.bits)
            new = torch.where(kept[rows][..., None], new, codes)
        group_scale = torch.where(negative[rows], -group_scale, group_scale)
        return new.to(torch.int8).flatten(-2), group_scale.to(torch.int16)

    quantized = within_bound(where, scale, channel, scheme, amplifier, round_rows)
    step = quantized.group_scale.double() * quantized.channel_scale.double()[:, None]
    if weight is not None:
        return _converted(quantized, weight, kept)
    squared_error = (energy * (step.abs() - given).square()).sum()
    return ConvertedRows(
        quantized, kept.numel(), float(squared_error), float((energy * given.square()).sum())
    )


def requantize_rows(
    where: str, weight: Tensor, scheme: LayerScheme, amplifier: Literal["channel"] | int
) -> ConvertedRows:
    """As `convert_rows` for weights float64 `[n, K]` whose groups are not neighbours in k."""
    quantized = quantize_rows(where, weight, scheme, amplifier, search=True)
    groups = weight.unflatten(-1, (-1, scheme.group_size))
    return _converted(quantized, groups, torch.zeros(1, dtype=torch.bool))


def _converted(quantized: QuantizedRows, weight: Tensor, kept: Tensor) -> ConvertedRows:
    """With its error against the weight it was made from, float64 `[n, G, g]`."""
    step = quantized.group_scale.double() * quantized.channel_scale.double()[:, None]
    stored = unpack_codes(quantized.qweight, 4).view_as(weight)
    squared_error = (weight - stored * step[..., None]).square_().sum()
    return ConvertedRows(
        quantized, int(kept.sum()), float(squared_error), float(weight.square().sum())
    )


def channel_scale(
    where: str, scale: Tensor, scheme: LayerScheme, amplifier: Literal["channel"] | int
) -> Tensor:
    """Channel scales, float32 `[n]`, for the float scales float64 `[n, G]`, all >= 0."""
    if amplifier == "channel":
        channel = (scale.amax(dim=-1) / scheme.max_group_scale).float()
        return channel.clamp_min(SMALLEST_CHANNEL_SCALE)
    if (largest := float((scale * amplifier).max())) >= INT16_MAX + 0.5:
        raise IntScaleError(
            f"{where}: amplifier {amplifier} makes an integer group scale {largest:.6g}, above "
            f"{INT16_MAX}; use --amplifier channel or a smaller number"
        )
    return torch.full(scale.shape[:1], 1 / amplifier, dtype=torch.float32)


def within_bound(
    where: str,
    scale: Tensor,
    channel: Tensor,
    scheme: LayerScheme,
    amplifier: Literal["channel"] | int,
    round_rows: Callable[[Rows, Tensor], tuple[Tensor, Tensor]],
) -> QuantizedRows:
    """Rows as `round_rows` makes them, with channel scales raised until no accumulator overflows.

    round_rows: from rows and their channel scales to codes and group scales.
    """
    codes, group_scale = round_rows(slice(None), channel)
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
        codes[over], group_scale[over] = round_rows(over, channel[over])
        bound[over] = accumulator_bound(codes[over], group_scale[over])
    return QuantizedRows(
        pack_codes(codes, scheme.bits),
        group_scale,
        channel,
        scale,
        int(((group_scale == 0) & (scale > 0)).sum()),
        int(bound.max()),
    )


def smallest_scale(where: str, weight: Tensor, scheme: LayerScheme) -> float:
    """The smallest nonzero float scale of rows `[n, K]`; inf if there is none.

    Raises IntScaleError if a weight is NaN or infinite.
    """
    scale = float_scales(where, weight.float().unflatten(-1, (-1, scheme.group_size)), scheme.bits)
    return float(torch.where(scale > 0, scale, torch.inf).min())


def heuristic_amplifier(smallest: float) -> int:
    """The smallest power of two, at least 1, that lifts this scale of a tensor to at least 1."""
    return 1 << math.ceil(max(0.0, -math.log2(smallest)))


def float_scales(where: str, groups: Tensor, bits: int) -> Tensor:
    """Float scale of each group, float64 `[n, G]`, of float32 `[n, G, g]`."""
    amax = groups.abs().amax(dim=-1)
    if not bool(amax.isfinite().all()):
        raise IntScaleError(
            f"{where} holds NaN or Inf; repair or download the source model again, or leave the "
            "layer unquantized with --ignore"
        )
    return amax.double() / ((1 << (bits - 1)) - 1)


def clipped(scale: Tensor) -> list[Tensor]:
    """Scales to choose from."""
    return [scale * clip for clip in CLIPS]


def least_error(
    groups: Tensor,
    scales: Sequence[Tensor],
    channel: Tensor,
    bits: int,
    energy: Tensor | float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Of these scales, in each group the one with the least squared error, and that error.

    groups `[n, G, g]`, scales float64 `[n, G]`; energy `[G, g]`: what the error of a weight counts.
    """
    best, least = scales[0], torch.full_like(scales[0], torch.inf)
    for scale in scales:
        codes, group_scale = _round(groups, scale, channel, bits)
        step = group_scale.double() * channel.double()[:, None]
        error = (groups - codes.view_as(groups) * step[..., None]).square_().mul_(energy).sum(-1)
        best = torch.where(error < least, scale, best)
        least = torch.minimum(error, least)
    return best, least


def _round(groups: Tensor, scale: Tensor, channel: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """codes int8 `[n, K]` and group_scale int16 `[n, G]` for given channel scales."""
    group_scale = at_least_one(integer_scale(scale, channel))
    codes = _codes(groups, step_of(group_scale, channel), bits)
    return codes.flatten(-2), group_scale.to(torch.int16)


def integer_scale(scale: Tensor, channel: Tensor) -> Tensor:
    """S, float64 `[n, G]`; 1 for groups of zeros."""
    return torch.where(scale > 0, torch.round(scale / channel.double()[:, None]), 1.0)


def at_least_one(group_scale: Tensor) -> Tensor:
    """For weights that are yet to be rounded: 0 would lose them, 1 is only coarse."""
    return group_scale.clamp(min=1)


def step_of(group_scale: Tensor, channel: Tensor) -> Tensor:
    """What a code is worth, float64 `[n, G]`; infinite where S is 0, for codes 0."""
    return torch.where(group_scale > 0, group_scale * channel.double()[:, None], torch.inf)


def _codes(groups: Tensor, step: Tensor, bits: int) -> Tensor:
    """int8 `[n, G, g]`."""
    limit = 1 << (bits - 1)
    codes = torch.div(groups, step[..., None]).round_().clamp_(-limit, limit - 1)  # float64
    return codes.to(torch.int8)
