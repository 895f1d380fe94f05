"""Layout and launch of `cuda/sm90_w4a8_gemm.cu`, linear layers and experts on Hopper.

Two forms of the arithmetic (`sm90_tiles.FORMS`): "fold" multiplies by int8 weights with the group
scale in them, "accumulate" scales int32 partial sums. A layer has one form for all batch sizes.
8-bit layers fold, too, when they are loaded, and stay int8 ("int8").
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from vllm_intscale import jit, reference
from vllm_intscale.activations import FLAG_BYTES, check_flags
from vllm_intscale.routing import Routing
from vllm_intscale.sm90_tiles import BLOCK_K, INT8, INT8_BLOCK_BYTES, STREAMED, Tile, choose

# With |S| up to this, m is below 2**13, and no product that is not a tie comes nearer to one than
# 2**-14; float32 is 8 times closer. A field has room for 13 bits.
MAX_FOLD_SCALE = 1023
ROWS = 4096  # of a weight prepared at a time: bounds the extra memory
LEAST_IDLE = 14  # see cuda/sm90_schedule.cuh: 5 us of an H100, which the exchange of sums takes


# ---- weight layout ------------------------------------------------------------------------------


def foldable(codes: Tensor, group_scale: Tensor) -> bool:
    """Whether "fold" can represent the weight: codes `[N, K]`, group_scale `[N, K/g]`.

    A table holds eight numbers >= 0, so a group with a negative scale must not use the code -8,
    whose product would be a ninth; and |S| is limited by what float32 rounds rightly.
    """
    group_size = codes.shape[1] // group_scale.shape[1]
    lowest = codes.unflatten(1, (-1, group_size)).amin(-1)
    ninth = (group_scale < 0) & (lowest == -8)
    return not ninth.any() and int(group_scale.to(torch.int32).abs().max()) <= MAX_FOLD_SCALE


def fold_table(group_scale: Tensor, largest: Tensor) -> Tensor:
    """int8 weights of the codes -8..7, int64 `[N, K/g, 16]`; see `reference.fold`.

    group_scale int16 `[N, K/g]`; largest int64 `[N]`, the channel's m.
    """
    codes = torch.arange(-8, 8, device=group_scale.device)
    integers = codes * group_scale.to(torch.int64)[..., None]
    return reference.scale_to_int8(integers, largest[:, None, None])


def _factor(scale: Tensor, unit: Tensor, correction: Tensor | int) -> Tensor:
    """What `build_table` of `fold.cuh` multiplies codes by: S * unit + correction ulps; float64."""
    product = scale.to(torch.float32) * unit[:, None]
    return (product.view(torch.int32) + correction).view(torch.float32).double()


def _fold_fields(group_scale: Tensor, largest: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Fields int16 `[N, K/g]` and unit float32 `[N]` that give this `fold_table` in `fold.cuh`.

    group_scale is positive here. The kernel computes round(code * (S * unit + d ulps)), unit =
    127 / m rounded, exactly up to the last rounding. Only ties are sensitive to the error of
    S * unit; some d within -4..3 puts them right, and this finds it.
    """
    unit = 127 / largest.to(torch.float32)
    codes = torch.arange(-8, 8, device=table.device)
    scale = group_scale.to(torch.int64)
    unused = (codes.abs() * scale[..., None]) > largest[:, None, None]
    fields = torch.full_like(scale, -1)
    for correction in (0, 1, -1, 2, -2, 3, -3, -4):
        factor = _factor(scale, unit, correction)
        rounded = torch.round(codes * factor[..., None]).to(torch.int64)
        right = ((rounded == table) | unused).all(-1)
        fields = torch.where((fields < 0) & right, scale << 3 | correction & 7, fields)
    assert (fields >= 0).all()
    return fields.to(torch.int16), unit  # 16 bits, as unsigned


def prepare_weight(
    codes: Tensor, group_scale: Tensor, channel_scale: Tensor, form: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes int8 `[N, K]` and scales to blocks uint8 `[N/128, K/128, 2, bytes]`, unit, scale.

    unit is float32 `[N]` ("fold") or empty ("accumulate"); channel_scale is float32 `[N]`, for
    "fold" that of the int8 weights. N is padded to 128 and K to 128 by zeros, unit with them.
    """
    split = (tensor.split(ROWS) for tensor in (codes, group_scale, channel_scale))
    parts = [_prepare_rows(c, s, a, form) for c, s, a in zip(*split, strict=True)]
    blocks, unit, channel_scale = (torch.cat(part) for part in zip(*parts, strict=True))
    return blocks, unit, channel_scale


def prepare_int8(codes: Tensor) -> tuple[Tensor, Tensor]:
    """int8 weights `[N, K]` to blocks uint8 `[N/128, K/128, 2, 8192]` and unit, float32 ones `[N]`.

    N and K are padded to 128 by zeros.
    """
    n, k = codes.shape
    codes = torch.nn.functional.pad(codes, (0, -k % BLOCK_K, 0, -n % 128))
    # [block, warp, channel half, g, k block, step, k half, t, byte] to the order in memory
    parts = codes.view(-1, 4, 2, 8, codes.shape[1] // BLOCK_K, 4, 2, 4, 4)
    parts = parts.permute(0, 4, 5, 1, 3, 7, 6, 2, 8).reshape(parts.shape[0], parts.shape[4], -1)
    blocks = parts.view(torch.uint8).unflatten(0, (-1, 2)).transpose(1, 2).contiguous()
    return blocks, torch.ones(len(codes), device=codes.device)


def _prepare_rows(
    codes: Tensor, group_scale: Tensor, channel_scale: Tensor, form: str
) -> tuple[Tensor, Tensor, Tensor]:
    n, k = codes.shape
    group_size = k // group_scale.shape[1]
    unit = channel_scale.new_empty(0)
    if form == "fold":
        negative = (group_scale < 0).repeat_interleave(group_size, dim=1)
        codes, group_scale = torch.where(negative, -codes, codes), group_scale.abs()
        largest = reference.largest_integer(codes, group_scale)
        channel_scale = reference.folded_channel_scale(channel_scale, largest)
        table = fold_table(group_scale, largest)
        index = (codes.to(torch.int64) + 8).unflatten(1, (-1, group_size))
        zero = table.gather(2, index).flatten(1) == 0
        codes = torch.where(zero, 0, codes)
        group_scale, unit = _fold_fields(group_scale, largest, table)
    n_pad, k_pad = -(-n // 128) * 128, -(-k // BLOCK_K) * BLOCK_K
    codes = torch.nn.functional.pad(codes, (0, k_pad - k, 0, n_pad - n))
    magnitude = torch.where(codes < 0, -1 - codes, codes)
    nibbles = ((codes < 0).to(torch.int8) << 2) | (magnitude & 3) | ((magnitude & 4) << 1)
    # [block, warp, channel half, g, k block, half, step, k half, t, byte] to the order in memory
    nibbles = nibbles.view(-1, 4, 2, 8, k_pad // 128, 2, 2, 2, 4, 4)
    nibbles = nibbles.permute(0, 4, 5, 1, 3, 8, 6, 2, 7, 9).reshape(n_pad // 64, k_pad // 128, -1)
    packed = ((nibbles[..., ::2] & 15) | (nibbles[..., 1::2] << 4)).view(torch.uint8)
    groups = BLOCK_K // group_size
    scales = torch.nn.functional.pad(
        group_scale, (0, k_pad // group_size - group_scale.shape[1], 0, n_pad - n)
    )
    scales = scales.view(-1, 64, k_pad // 128, groups).permute(0, 2, 3, 1).flatten(2)
    blocks = torch.cat((packed, scales.contiguous().view(torch.uint8)), dim=2)
    blocks = blocks.unflatten(0, (-1, 2)).transpose(1, 2).contiguous()
    if form == "fold":
        unit = torch.nn.functional.pad(unit, (0, n_pad - n))
    return blocks, unit, channel_scale


def form_of(blocks: Tensor, unit: Tensor) -> str:
    """Of a prepared weight."""
    if blocks.shape[-1] == INT8_BLOCK_BYTES:
        return INT8
    return "fold" if unit.numel() else "accumulate"


def group_size_of(blocks: Tensor) -> int:
    """Of a prepared weight; int8 ones have no groups, and are taken as one of 128."""
    if blocks.shape[-1] == INT8_BLOCK_BYTES:
        return BLOCK_K
    return BLOCK_K * 128 // (blocks.shape[-1] - 4096)


def integer_weight(blocks: Tensor, unit: Tensor, n: int, k: int) -> Tensor:
    """The integers that channel_scale multiplies, int32 `[N, K]`, of a prepared weight."""
    n_blocks, k_blocks, group_size = blocks.shape[0] * 2, blocks.shape[1], group_size_of(blocks)
    form, blocks = form_of(blocks, unit), blocks.transpose(1, 2).flatten(0, 1)
    if form == INT8:
        parts = blocks.contiguous().view(torch.int8).view(n_blocks, k_blocks, 4, 4, 8, 4, 2, 2, 4)
        codes = parts.permute(0, 3, 7, 4, 1, 2, 6, 5, 8).reshape(n_blocks * 64, -1)
        return codes[:n, :k].to(torch.int32)
    packed = blocks[..., :4096].contiguous()
    nibbles = torch.stack((packed & 15, packed >> 4), dim=-1)
    nibbles = nibbles.view(n_blocks, k_blocks, 2, 4, 8, 4, 2, 2, 2, 4)
    nibbles = nibbles.permute(0, 3, 7, 4, 1, 2, 6, 8, 5, 9).reshape(n_blocks * 64, -1)
    magnitude = ((nibbles & 3) | ((nibbles & 8) >> 1)).to(torch.int32)
    codes = torch.where((nibbles & 4) > 0, -1 - magnitude, magnitude)[:n, :k]
    scales = blocks[..., 4096:].contiguous().view(torch.int16)
    scales = scales.view(n_blocks, k_blocks, -1, 64).permute(0, 3, 1, 2).flatten(0, 1).flatten(1)
    scales = scales[:n, : -(-k // group_size)].to(torch.int32)
    if form == "accumulate":
        return codes * scales.repeat_interleave(group_size, dim=1)[:, :k]
    correction = ((scales & 7) ^ 4) - 4
    factor = _factor((scales & 0xFFFF) >> 3, unit[:n], correction)
    return torch.round(codes * factor.repeat_interleave(group_size, dim=1)[:, :k]).to(torch.int32)


# ---- launch -------------------------------------------------------------------------------------


@cache
def multiprocessors_of(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


class Plan(NamedTuple):
    """How to launch one shape."""

    kernel: jit.Kernel
    grid: tuple[int]
    threads: int
    shared_bytes: int
    cluster: int
    whole_tiles: int
    partials: int  # int32 numbers of scratch


@lru_cache(4096)  # a launch should cost no more of the host than it must
def _plan(
    m: int,
    n: int,
    k_blocks: int,
    group_size: int,
    form: str,
    dtype_code: int,
    multiprocessors: int,
    tile: Tile | None,
    splits: int | None,
    float_scale: bool,
    grouped: bool,
) -> Plan:
    """m: tokens; grouped: the most tiles of tokens that there can be."""
    if tile is None or splits is None:
        assert not grouped
        best, best_splits = choose(m, n, k_blocks * BLOCK_K, group_size, form, multiprocessors)
        tile = tile or best
        if splits is None:
            splits = best_splits if tile == best else 1
    assert not float_scale or (form == "accumulate" and splits == 1)
    tiles = -(-n // tile.n) * (m if grouped else -(-m // tile.m))
    resident = multiprocessors * tile.blocks // tile.share
    clusters, whole_tiles, partials = min(tiles, resident), tiles, 0
    if splits == STREAMED:  # at least a tile each, so that most tiles have one follower at most
        clusters = clusters if grouped else min(tiles * k_blocks, resident)
        whole_tiles = max(0, tiles // clusters - 1) * clusters  # grouped: as the device finds
        partials = clusters * tile.m * tile.n
        assert 4 * clusters * tile.share * tile.warpgroups <= FLAG_BYTES
    elif splits > 1 or tile.slices > 1:
        clusters = tiles
    cluster = tile.share if splits <= 1 else splits
    return Plan(
        tile.kernel(group_size, form, dtype_code, float_scale, grouped),
        (clusters * cluster,),
        tile.threads,
        tile.shared_bytes(group_size, form, max(1, splits)),
        cluster,
        whole_tiles,
        partials,
    )


def gemm(
    a8: Tensor,
    token_scale: Tensor,
    weight: tuple[Tensor, Tensor, Tensor],
    bias: Tensor | None,
    out: Tensor,
    dtype_code: int,
    tile: Tile | None = None,
    splits: int | None = None,
    float_scale: bool = False,
    routing: Routing | None = None,
) -> None:
    """out `[M, N]` of a prepared weight; a8 as `quantize_activation` makes it on CUDA.

    With routing, weight is a stack, tile and splits are given (`choose_grouped`), and rows are
    those of the routing's tiles; others are left unwritten.
    float_scale: group scales applied in float32, as other methods do. For the comparison in
    `intscale bench gemm`; "accumulate" and one split only.
    """
    blocks, unit, channel_scale = weight
    (m, n), (k_blocks, m_pad) = out.shape, a8.shape[:2]
    form, device = form_of(blocks, unit), a8.device.index
    assert device is not None
    most = routing.tiles.shape[0] if routing else m
    shape = (most, n, k_blocks, group_size_of(blocks), form, dtype_code, multiprocessors_of(device))
    plan = _plan(*shape, tile, splits, float_scale, routing is not None)
    scratch = None
    if plan.partials:
        check_flags(a8)
        scratch = out.new_empty(plan.partials, dtype=torch.int32)
    sizes = (m, m_pad, n, k_blocks, plan.whole_tiles)
    tiles = routing[1:3] if routing else (None, None)
    rows = out if n % 8 == 0 else out.new_empty(m, -(-n // 8) * 8)  # written 8 channels at a time
    jit.launch(
        plan.kernel,
        a8.device,
        plan.grid,
        plan.threads,
        (
            *(a8, token_scale, blocks, unit, channel_scale, bias, rows, scratch),
            *(*sizes, *tiles, LEAST_IDLE),
        ),
        shared_bytes=plan.shared_bytes,
        cluster=plan.cluster,
        overlap=True,
    )
    if rows is not out:
        out.copy_(rows[:, :n])
