"""Seeded inputs and the bitwise comparison of the kernel tests."""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_intscale.format import ACCUMULATOR_MAX, accumulator_bound
from vllm_intscale.packing import pack_codes
from vllm_intscale.reference import Weight

TOKENS = (0, 1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 63, 65, 127, 129, 257, 1024, 4097)
CHANNELS = (64, 512, 1408, 4096, 6144)
INPUTS = (128, 512, 1408, 4096, 14336)


def weight(
    n: int,
    k: int,
    group_size: int,
    *,
    seed: int = 0,
    device: str = "cpu",
    bits: int = 4,
    foldable: bool = False,
) -> Weight:
    """Gaussian codes, group scales of both signs, channel scales over four decades.

    foldable: without the code -8 in groups of a negative scale.
    """
    limit = 1 << (bits - 1)
    rng = torch.Generator(device).manual_seed(seed)
    codes = torch.randn(n, k, generator=rng, device=device) * (limit * 0.375)
    codes = codes.round().clamp(-limit, limit - 1)
    sign = torch.randint(0, 2, (n, k // group_size), generator=rng, device=device) * 2 - 1
    scale = torch.randint(0, 2048 // limit, sign.shape, generator=rng, device=device) * sign
    channel = 10 ** (torch.rand(n, generator=rng, device=device) * 4 - 6)
    if foldable:
        codes = torch.where(
            (scale < 0).repeat_interleave(group_size, 1), codes.clamp(min=-7), codes
        )
    result = Weight(codes.to(torch.int8), scale.to(torch.int16), channel)
    assert int(accumulator_bound(result.codes, result.group_scale).max()) <= ACCUMULATOR_MAX
    return result


def extreme_weight(n: int, k: int, group_size: int, device: str = "cpu") -> Weight:
    """All codes -8 and group scales as large as the overflow proof allows, signs alternating."""
    codes = torch.full((n, k), -8, dtype=torch.int8, device=device)
    largest = min(32767, ACCUMULATOR_MAX // (127 * 8 * k))
    scale = torch.full((n, k // group_size), largest, dtype=torch.int16, device=device)
    scale[1::2, 1::2] *= -1
    channel = torch.full((n,), 1.0 / largest, device=device)
    result = Weight(codes, scale, channel)
    bound = int(accumulator_bound(codes, scale).max())
    assert ACCUMULATOR_MAX * 0.9 < bound <= ACCUMULATOR_MAX or largest == 32767
    return result


def activation(m: int, k: int, *, seed: int = 1, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """int8 codes in -127..127 and token scales over two decades."""
    rng = torch.Generator(device).manual_seed(seed)
    a8 = (torch.randn(m, k, generator=rng, device=device) * 40).round().clamp(-127, 127)
    return a8.to(torch.int8), 10 ** (torch.rand(m, generator=rng, device=device) * 2 - 3)


def packed(weight: Weight, bits: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """The checkpoint's tensors: qweight, group_scale, channel_scale."""
    return pack_codes(weight.codes, bits), weight.group_scale, weight.channel_scale


def routing(m: int, topk: int, experts: int, kind: str, *, seed: int = 2) -> tuple[Tensor, Tensor]:
    """topk_weights float32 and topk_ids int32 `[m, topk]`.

    kind: "random"; "skewed" (half of the experts empty); "one" (all tokens to one expert, other
    choices -1); "holes" (random ids with a third of them -1).
    """
    rng = torch.Generator().manual_seed(seed)
    live = experts if kind != "skewed" else max(topk, experts // 2)
    ids = torch.rand(m, live, generator=rng).argsort(dim=1)[:, :topk].to(torch.int32)
    if kind == "one":
        ids = torch.full((m, topk), -1, dtype=torch.int32)
        ids[:, 0] = experts - 1
    if kind == "holes":
        ids[torch.rand(ids.shape, generator=rng) < 1 / 3] = -1
    return torch.rand(m, topk, generator=rng), ids


def assert_same_bits(actual: Tensor, expected: Tensor, case: str = "") -> None:
    """Equal shape, dtype and bits in every element; any NaN equals any NaN."""
    assert actual.shape == expected.shape and actual.dtype == expected.dtype, case
    ints = {1: torch.int8, 2: torch.int16, 4: torch.int32}[actual.element_size()]
    wrong = actual.contiguous().view(ints) != expected.contiguous().view(ints)
    if actual.is_floating_point():
        wrong &= ~(actual.isnan() & expected.isnan())
    if not wrong.any():
        return
    first = tuple(wrong.nonzero()[0].tolist())
    raise AssertionError(
        f"{case}: {int(wrong.sum())} of {wrong.numel()} elements differ, first at {first}: "
        f"{actual[first].item()!r} instead of {expected[first].item()!r}"
    )
