"""Layout, tiles and launch of `cuda/sm80_w4a8_gemm.cu`: every GPU from sm_80 on, and experts."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vllm_intscale import jit
from vllm_intscale.packing import unpack_codes


class Tile(NamedTuple):
    """Block tile of `sm80_w4a8_gemm.cu`: channels x tokens, and how its warps share the work."""

    n: int
    m: int
    warps_n: int
    warps_m: int
    warps_k: int
    stages: int

    @property
    def threads(self) -> int:
        return 32 * self.warps_n * self.warps_m * self.warps_k

    def kernel(self, group_size: int, dtype_code: int, grouped: bool) -> jit.Kernel:
        stage_k = 128 * self.warps_k
        stage_bytes = self.n * stage_k // 2 + self.m * stage_k + stage_k // group_size * self.n * 2
        names = ("TILE_N", "TILE_M", "WARPS_N", "WARPS_M", "WARPS_K", "STAGES")
        return jit.Kernel(
            "sm80_w4a8_gemm.cu",
            "w4a8_gemm",
            (
                *zip(names, self, strict=True),
                ("GROUP", group_size),
                ("GROUPED", int(grouped)),
                ("DTYPE", dtype_code),
            ),
            self.stages * stage_bytes,
        )


# Few tokens: narrow tiles fill the chip with weight streams. Many: wide tiles reuse what they load.
TILES = (
    Tile(n=32, m=16, warps_n=1, warps_m=1, warps_k=4, stages=4),
    Tile(n=64, m=64, warps_n=2, warps_m=2, warps_k=2, stages=3),
    Tile(n=128, m=128, warps_n=2, warps_m=4, warps_k=1, stages=3),
)


def tile_for(tokens: int) -> Tile:
    """The tile for this many tokens (per expert, on average, if grouped).

    Measured on an H100 over the layers of LLaMA-3-8B: twice its tokens is where a tile stops
    being the fastest or close to it (32 tokens, down_proj: 31 us against 60 us of the next).
    """
    return next((tile for tile in TILES if tokens <= 2 * tile.m), TILES[-1])


# ---- weight layout ------------------------------------------------------------------------------


def _padded(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def prepare_weight(qweight: Tensor, group_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Checkpoint layout to tensor-core tiles (pictured in `sm80_w4a8_gemm.cu`).

    qweight int32 `[N, K/8]` to `[N/16, K/64, 32, 4]`, group_scale int16 `[N, K/g]` to
    `[K/g, N]`, with N padded to 16 and K to 64 by zeros; `[E, ...]` one expert at a time, which
    bounds the extra memory to one matrix.
    """
    if qweight.dim() == 3:
        matrices = (prepare_weight(q, s) for q, s in zip(qweight, group_scale, strict=True))
        for expert, matrix in enumerate(matrices):
            if expert == 0:
                stack = tuple(t.new_empty(len(qweight), *t.shape) for t in matrix)
            for target, tensor in zip(stack, matrix, strict=True):
                target[expert] = tensor
        return stack[0], stack[1]
    codes = unpack_codes(qweight, 4)
    n, k = codes.shape
    pad_n = _padded(n, 16) - n
    codes = torch.nn.functional.pad(codes, (0, _padded(k, 64) - k, 0, pad_n))
    # [tile, nibble, row, k_tile, word, t, byte] to [tile, k_tile, row, t, word, byte, nibble]
    nibbles = codes.view(-1, 2, 8, codes.shape[1] // 64, 4, 4, 4).permute(0, 3, 2, 5, 4, 6, 1)
    packed = (nibbles[..., 0] & 15) | (nibbles[..., 1] << 4)
    tiles = packed.contiguous().view(torch.int32).view(packed.shape[0], packed.shape[1], 32, 4)
    return tiles, torch.nn.functional.pad(group_scale.mT, (0, pad_n)).contiguous()


def integer_weight(qweight: Tensor, group_scale: Tensor, n: int, k: int) -> Tensor:
    """`code * S`, int32 `[N, K]`, of a prepared weight of N x K."""
    packed = qweight.contiguous().view(torch.int8).view(*qweight.shape[:2], 8, 4, 4, 4)
    nibbles = torch.stack(((packed << 4) >> 4, packed >> 4), dim=-1)
    codes = nibbles.permute(0, 6, 2, 1, 4, 3, 5).reshape(qweight.shape[0] * 16, -1)[:n, :k]
    scale = group_scale[:, :n].mT.to(torch.int32)
    return codes * scale.repeat_interleave(k // scale.shape[1], dim=1)


# ---- launch -------------------------------------------------------------------------------------


class Routing(NamedTuple):
    """Slots grouped by expert, as `moe_routing.cu` describes them."""

    sorted_slots: Tensor
    tile_expert: Tensor
    slot_expert: Tensor
    tile_count: Tensor
    slots_per_row: int


def group_size_of(qweight: Tensor, group_scale: Tensor) -> int:
    """Of a prepared weight. K = 32 counts as one group of 64, half of it zeros."""
    groups, k_tiles = group_scale.shape[-2], qweight.shape[-3]
    return next(g for g in (128, 64, 32) if -(-groups * g // 64) == k_tiles)


def gemm(
    a8: Tensor,
    token_scale: Tensor,
    weight: tuple[Tensor, Tensor, Tensor],
    bias: Tensor | None,
    out: Tensor,
    dtype_code: int,
    tile: Tile,
    routing: Routing | None = None,
) -> None:
    """out `[M, N]` of a prepared weight; a8 as `cuda_backend.quantize_activation` makes it.

    With routing, out is `[slots, N]`, weight is a stack, and each slot's row goes to its expert.
    """
    qweight, group_scale, channel_scale = weight
    m, n = token_scale.shape[0], channel_scale.shape[-1]
    group_size = group_size_of(qweight, group_scale)
    kernel = tile.kernel(group_size, dtype_code, grouped=routing is not None)
    m_tiles = routing.tile_expert.shape[0] if routing else -(-m // tile.m)
    routing_args = (*routing[:2], routing[3], np.int32(routing[4])) if routing else ()
    sizes = (m, a8.shape[1], n, group_scale.shape[-2] * group_size)
    args = (
        *(a8, token_scale, qweight, group_scale, channel_scale, bias, out),
        *map(np.int32, sizes),
        *(routing_args or (None, None, None, np.int32(1))),
    )
    grid = (m_tiles, -(-n // tile.n))
    jit.launch(kernel, a8.device, grid, tile.threads, args, kernel.shared_bytes)
