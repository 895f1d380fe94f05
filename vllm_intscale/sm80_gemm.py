"""Layout, tiles and launch of `cuda/sm80_w4a8_gemm.cu`: every GPU from sm_80 on, and experts."""

from __future__ import annotations

import math
from functools import cache, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from vllm_intscale import jit
from vllm_intscale.activations import FLAG_BYTES, check_flags
from vllm_intscale.packing import unpack_codes
from vllm_intscale.routing import Routing

BLOCK_N = BLOCK_K = 128  # what a prepared weight is padded to
SHARED_BYTES = 99 * 1024  # of a block, on a GPU of sm_86, sm_89 or sm_120


class Chip(NamedTuple):
    """What `choose` knows of a GPU."""

    multiprocessors: int
    shared_bytes: int  # of a multiprocessor


class Layout(NamedTuple):
    """Of a prepared weight. 8-bit ones have no groups, and are taken as one of 128."""

    bits: int
    group_size: int


class Tile(NamedTuple):
    """Block tile of `sm80_w4a8_gemm.cu`: channels x tokens, and how its warps share the work.

    blocks: of a multiprocessor, which limits the registers of a thread. stage_us: time of a stage,
    for `choose`.
    """

    n: int
    m: int
    warps_n: int
    warps_m: int
    warps_k: int
    stages: int
    blocks: int
    stage_us: float

    @property
    def threads(self) -> int:
        return 32 * self.warps_n * self.warps_m * self.warps_k

    def can_split(self, m: int, n: int) -> bool:
        """Whether there are flags for all tiles of M x N, with which blocks that share one meet."""
        return 4 * -(-m // self.m) * -(-n // self.n) <= FLAG_BYTES

    def _stage_bytes(self, layout: Layout) -> int:
        stage_k = BLOCK_K * self.warps_k
        scales = 2 * stage_k // layout.group_size if layout.bits == 4 else 0
        return self.n * (stage_k * layout.bits // 8 + scales) + self.m * stage_k

    def stages_of(self, layout: Layout) -> int:
        """As many as measured best for 4 bits, or as fit."""
        return min(self.stages, SHARED_BYTES // self._stage_bytes(layout))

    def shared_bytes(self, layout: Layout) -> int:
        ring = self.stages_of(layout) * self._stage_bytes(layout)
        return max(ring, 4 * self.m * (self.n + 4))

    def blocks_of(self, chip: Chip, layout: Layout) -> int:
        """How many blocks a multiprocessor holds at once."""
        reserved = 1024  # shared memory of a block that CUDA keeps
        return max(1, min(self.blocks, chip.shared_bytes // (self.shared_bytes(layout) + reserved)))

    def kernel(self, layout: Layout, dtype_code: int, grouped: bool) -> jit.Kernel:
        defines = {
            "TILE_N": self.n,
            "TILE_M": self.m,
            "WARPS_N": self.warps_n,
            "WARPS_M": self.warps_m,
            "WARPS_K": self.warps_k,
            "STAGES": self.stages_of(layout),
            "BLOCKS": self.blocks,
            "BITS": layout.bits,
            "GROUP": layout.group_size,
            "GROUPED": int(grouped),
            "DTYPE": dtype_code,
        }
        return jit.Kernel(
            "sm80_w4a8_gemm.cu", "w4a8_gemm", tuple(defines.items()), self.shared_bytes(layout)
        )


# Few tokens: narrow tiles fill the chip with weight streams. Many: wide tiles reuse what they load.
TILES = (
    Tile(n=32, m=8, warps_n=1, warps_m=1, warps_k=4, stages=4, blocks=4, stage_us=0.44),
    Tile(n=64, m=16, warps_n=2, warps_m=1, warps_k=4, stages=3, blocks=2, stage_us=0.60),
    Tile(n=64, m=16, warps_n=2, warps_m=1, warps_k=2, stages=4, blocks=4, stage_us=0.54),
    Tile(n=64, m=32, warps_n=2, warps_m=1, warps_k=2, stages=4, blocks=3, stage_us=0.76),
    Tile(n=64, m=32, warps_n=2, warps_m=1, warps_k=1, stages=4, blocks=6, stage_us=0.72),
    Tile(n=128, m=32, warps_n=2, warps_m=1, warps_k=2, stages=3, blocks=2, stage_us=0.97),
    Tile(n=128, m=64, warps_n=2, warps_m=2, warps_k=1, stages=4, blocks=2, stage_us=0.93),
)
SPLITS = (1, 2, 3, 4, 6, 8)
MAX_M_TILES = 16  # of fewer tokens than the largest tile; more were never faster


@cache
def chip_of(device: int) -> Chip:
    properties = torch.cuda.get_device_properties(device)
    return Chip(properties.multi_processor_count, properties.shared_memory_per_multiprocessor)


@lru_cache(4096)
def choose(
    m: int,
    n: int,
    k_blocks: int,
    layout: Layout,
    chip: Chip,
    splits: tuple[int, ...] = SPLITS,
) -> tuple[Tile, int]:
    """The fastest tile and splits of k for M x N x 128 k_blocks.

    By a model of the time: rounds of resident blocks, each as long as its stages take and its
    output; the blocks of one round meet if they split k. Fitted to four layers of LLaMA-3-8B on an
    H100: 1 % slower than the best of 28 tiles and six splits on average, at most 9 %.
    """

    def cost(option: tuple[Tile, int]) -> float:
        tile, split = option
        tiles = -(-n // tile.n) * -(-m // tile.m)
        resident = tile.blocks_of(chip, layout)
        rounds = tiles * split / (chip.multiprocessors * resident)
        if split > 1 and (rounds > 1 or not tile.can_split(m, n)):
            return math.inf
        if rounds <= 2:  # what a started round leaves idle, more of them blur
            rounds = math.ceil(math.ceil(tiles * split / chip.multiprocessors) / resident)
        stages = -(-k_blocks // (split * tile.warps_k))
        return rounds * (stages * tile.stage_us + 3.5) + (1.3 * split if split > 1 else 0)

    options = [
        (tile, split)
        for tile in TILES
        if tile.m < 2 * max(m, 8) and min(m, MAX_M_TILES * 64) <= MAX_M_TILES * tile.m
        for split in splits
        if split == 1 or split * tile.warps_k <= k_blocks
    ]
    return min(options, key=cost)


def choose_grouped(slots: int, weight: tuple[Tensor, Tensor, Tensor]) -> Tile:
    """The tile for this many slots, spread evenly over the experts of a stack."""
    qweight, group_scale, channel_scale = weight
    assert qweight.device.index is not None
    experts = min(slots, qweight.shape[0])
    m, n = -(-slots // experts), experts * channel_scale.shape[1]
    layout, chip = layout_of(qweight, group_scale), chip_of(qweight.device.index)
    return choose(m, n, qweight.shape[-3], layout, chip, (1,))[0]


# ---- weight layout ------------------------------------------------------------------------------


def prepare_weight(qweight: Tensor, group_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Checkpoint layout to tensor-core tiles (pictured in `sm80_w4a8_gemm.cu`).

    qweight int32 `[N, K/8]` to `[N/16, K/128, 64, 4]`, group_scale int16 `[N, K/g]` to
    `[K/g, N]`, with N and K padded to 128 by zeros.
    """
    codes = unpack_codes(qweight, 4)
    n, k = codes.shape
    pad_n, pad_k = -n % BLOCK_N, -k % BLOCK_K
    pad_groups = (k + pad_k) * group_scale.shape[1] // k - group_scale.shape[1]
    codes = torch.nn.functional.pad(codes, (0, pad_k, 0, pad_n))
    # [tile, nibble, row, k tile, word, t, byte] to [tile, k tile, row, t, word, byte, nibble]
    nibbles = codes.view(-1, 2, 8, codes.shape[1] // 64, 4, 4, 4).permute(0, 3, 2, 5, 4, 6, 1)
    packed = (nibbles[..., 0] & 15) | (nibbles[..., 1] << 4)
    tiles = packed.contiguous().view(torch.int32).view(-1, (k + pad_k) // BLOCK_K, 64, 4)
    return tiles, torch.nn.functional.pad(group_scale.mT, (0, pad_n, 0, pad_groups)).contiguous()


def prepare_int8(codes: Tensor) -> tuple[Tensor, Tensor]:
    """int8 weights `[N, K]` to tiles int32 `[N/16, K/128, 128, 4]`; group scales int16 `[1, N]`: 1.

    N and K are padded to 128 by zeros.
    """
    n, k = codes.shape
    codes = torch.nn.functional.pad(codes, (0, -k % BLOCK_K, 0, -n % BLOCK_N))
    # [tile, row half, row, k tile, step, k half, t, byte] to the order in memory
    parts = codes.view(-1, 2, 8, codes.shape[1] // BLOCK_K, 4, 2, 4, 4)
    parts = parts.permute(0, 3, 4, 2, 6, 5, 1, 7).contiguous()
    tiles = parts.view(torch.int32).reshape(parts.shape[0], parts.shape[1], 128, 4)
    return tiles, torch.ones(1, len(codes), dtype=torch.int16, device=codes.device)


def integer_weight(qweight: Tensor, group_scale: Tensor, n: int, k: int) -> Tensor:
    """`code * S`, int32 `[N, K]`, of a prepared weight of N x K."""
    layout = layout_of(qweight, group_scale)
    if layout.bits == 8:
        parts = qweight.contiguous().view(torch.int8).view(*qweight.shape[:2], 4, 8, 4, 2, 2, 4)
        codes = parts.permute(0, 6, 3, 1, 2, 5, 4, 7).reshape(qweight.shape[0] * 16, -1)
        return codes[:n, :k].to(torch.int32)
    packed = qweight.contiguous().view(torch.int8).view(qweight.shape[0], -1, 8, 4, 4, 4)
    nibbles = torch.stack(((packed << 4) >> 4, packed >> 4), dim=-1)
    codes = nibbles.permute(0, 6, 2, 1, 4, 3, 5).reshape(qweight.shape[0] * 16, -1)[:n, :k]
    scale = group_scale[:, :n].mT.to(torch.int32)
    return codes * scale.repeat_interleave(layout.group_size, dim=1)[:, :k]


# ---- launch -------------------------------------------------------------------------------------


def layout_of(qweight: Tensor, group_scale: Tensor) -> Layout:
    if qweight.shape[-2] == 128:
        return Layout(8, BLOCK_K)
    return Layout(4, qweight.shape[-3] * BLOCK_K // group_scale.shape[-2])


def gemm(
    a8: Tensor,
    token_scale: Tensor,
    weight: tuple[Tensor, Tensor, Tensor],
    bias: Tensor | None,
    out: Tensor,
    dtype_code: int,
    tile: Tile | None = None,
    splits: int | None = None,
    routing: Routing | None = None,
) -> None:
    """out `[M, N]` of a prepared weight; a8 as `cuda_backend.quantize_activation` makes it.

    With routing, weight is a stack, and rows are those of its tiles; others are left unwritten.
    """
    qweight, group_scale, channel_scale = weight
    m, n = token_scale.shape[0], channel_scale.shape[-1]
    k_blocks, layout = qweight.shape[-3], layout_of(qweight, group_scale)
    if tile is None:
        assert a8.device.index is not None and not routing
        chip = chip_of(a8.device.index)
        tile, splits = choose(m, n, k_blocks, layout, chip)
    splits = splits or 1
    kernel = tile.kernel(layout, dtype_code, routing is not None)
    m_tiles = routing.tiles.shape[0] if routing else -(-m // tile.m)
    n_tiles = -(-n // tile.n)
    partials = None
    if splits > 1:
        assert not routing and tile.can_split(m, n)
        check_flags(a8)
        size = m_tiles * n_tiles * splits * tile.m * tile.n
        partials = out.new_empty(size, dtype=torch.int32)
    jit.launch(
        kernel,
        a8.device,
        (m_tiles, n_tiles, splits),
        tile.threads,
        (a8, token_scale, qweight, group_scale, channel_scale, bias, out, partials)
        + (m, a8.shape[1], n, k_blocks, *(routing[1:3] if routing else (None, None))),
        shared_bytes=kernel.shared_bytes,
        overlap=True,
    )
