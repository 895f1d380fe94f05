"""Tiles of `cuda/sm90_w4a8_gemm.cu`, and which of them a problem gets."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

from vllm_intscale import jit

FORMS = ("fold", "accumulate")  # of int4 weights
INT8 = "int8"  # of 8-bit ones: "fold", done when they are loaded
BLOCK_K = 128
INT8_BLOCK_BYTES = 64 * BLOCK_K  # of 64 channels; of int4 ones less
SHARED_BYTES = 227 * 1024  # of a block, at most
MULTIPROCESSOR_BYTES = 228 * 1024  # of its blocks and 1 KB for each
MAX_SPLITS = 8  # blocks of a portable cluster
STREAMED = 0  # instead of a number of splits: see cuda/sm90_schedule.cuh


class Tile(NamedTuple):
    """Tokens x channels of a block, and what it keeps in flight.

    blocks: that share a multiprocessor; batch: k-steps whose multiplications are issued at once;
    block_us: for `choose`, of int4 and of int8 weights; share: neighbouring blocks that load their
    tokens together; slices: warpgroups that multiply the same channels, each some of their k.
    """

    m: int
    warpgroups: int
    stages: int
    blocks: int
    batch: int
    block_us: tuple[float, float] = (0.0, 0.0)
    share: int = 1
    slices: int = 1

    @property
    def n(self) -> int:
        """Channels of what is scheduled as one: of a block, or of blocks that share tokens."""
        return 64 * self.warpgroups // self.slices * self.share

    @property
    def threads(self) -> int:
        return 128 * (self.warpgroups + 1)

    @property
    def few_registers(self) -> bool:
        """FEW_REGISTERS of the kernel; streaming such tiles never won."""
        return self.m * self.warpgroups == 768

    def _bytes(self, group_size: int, form: str) -> tuple[int, int]:
        """Bytes of a stage without its barriers, and of what is there once."""
        groups = BLOCK_K // group_size
        channel_blocks = self.warpgroups // self.slices
        of_block = 4096 + groups * 128
        if form == INT8:
            of_block = INT8_BLOCK_BYTES
        elif form == "fold":
            of_block += groups * 64 * 16
        weights = channel_blocks * of_block
        # Staging, token scales; pieces, a barrier, and what aligning partial sums may skip.
        fixed = self.warpgroups * (2 * min(self.m, 16) * 128 + max(self.m, 16) * 4) + 112
        return self.m * BLOCK_K + -(-weights // 1024) * 1024, fixed

    def stages_of(self, group_size: int, form: str) -> int:
        """As many as measured best for groups of 128, or as fit for smaller groups."""
        stage, fixed = self._bytes(group_size, form)
        return min(
            self.stages,
            (MULTIPROCESSOR_BYTES // self.blocks - 1024 - fixed) // (stage + stage // 128),
        )

    def splits(self, k: int, group_size: int, form: str) -> list[int]:
        """Into how many blocks the K of a tile can be split; or STREAMED."""
        if self.slices > 1 or self.few_registers:
            return [1]
        if self.share > 1:
            return [STREAMED, 1]
        possible = range(1, min(MAX_SPLITS, -(-k // BLOCK_K)) + 1)
        fitting = [s for s in possible if self.shared_bytes(group_size, form, s) <= SHARED_BYTES]
        return [STREAMED, *fitting]

    def shared_bytes(self, group_size: int, form: str, splits: int) -> int:
        stage, fixed = self._bytes(group_size, form)
        stages = self.stages_of(group_size, form)
        unit, units = min(2, self.m // 8), max(1, self.m // 16)  # see Writer of sm90_output.cuh
        partials = (splits - 1) * -(-units // splits) * unit * self.warpgroups * 2048
        if self.m < 128:  # kPartialsInRing
            return stages * (stage + stage // 128) + fixed + partials
        return max(stages * stage, partials) + stages * stage // 128 + fixed

    def kernel(
        self,
        group_size: int,
        form: str,
        dtype_code: int,
        float_scale: bool = False,
        grouped: bool = False,
    ) -> jit.Kernel:
        defines = {
            "TILE_M": self.m,
            "WARPGROUPS": self.warpgroups,
            "STAGES": self.stages_of(group_size, form),
            "MIN_BLOCKS": self.blocks,
            "BATCH": 1 if form == "accumulate" else self.batch,
            "BITS": 8 if form == INT8 else 4,
            "GROUP": group_size,
            "FOLD": int(form != "accumulate"),
            "SHARE": self.share,
            "SLICES": self.slices,
            "GROUPED": int(grouped),
            "FLOAT_SCALE": int(float_scale),
            "DTYPE": dtype_code,
        }
        return jit.Kernel(
            "sm90_w4a8_gemm.cu", "w4a8_gemm", tuple(defines.items()), SHARED_BYTES, "sm_90a"
        )


# block_us: microseconds that 128 k take on an H100 full of such blocks.
TILES = (
    Tile(m=8, warpgroups=1, stages=8, blocks=3, batch=2, block_us=(0.44, 0.64)),
    Tile(m=16, warpgroups=1, stages=6, blocks=4, batch=2, block_us=(0.47, 0.78)),
    Tile(m=32, warpgroups=1, stages=5, blocks=3, batch=2, block_us=(0.47, 0.57)),
    Tile(m=64, warpgroups=1, stages=5, blocks=3, batch=2, block_us=(0.42, 0.45)),
    Tile(m=64, warpgroups=2, stages=5, blocks=2, batch=2, block_us=(0.54, 0.63)),
    Tile(m=128, warpgroups=2, stages=8, blocks=1, batch=2, block_us=(0.22, 0.18), slices=2),
    Tile(m=128, warpgroups=2, stages=7, blocks=1, batch=2, block_us=(0.38, 0.33)),
    Tile(m=128, warpgroups=3, stages=6, blocks=1, batch=2, block_us=(0.55, 0.43)),
    Tile(m=256, warpgroups=1, stages=5, blocks=1, batch=2, block_us=(0.36, 0.32)),
    Tile(m=256, warpgroups=2, stages=5, blocks=1, batch=2, block_us=(0.63, 0.57)),
    Tile(m=256, warpgroups=2, stages=5, blocks=1, batch=2, block_us=(0.55, 0.60), share=2),
    Tile(m=256, warpgroups=3, stages=4, blocks=1, batch=1, block_us=(0.85, 0.85)),
)
# For experts only: their weights come from memory up to more tokens, and fit tiles of other sizes.
EXPERT_TILES = (
    Tile(m=32, warpgroups=2, stages=6, blocks=2, batch=2),
    Tile(m=96, warpgroups=2, stages=4, blocks=2, batch=2),
    Tile(m=160, warpgroups=2, stages=6, blocks=1, batch=2),
    Tile(m=192, warpgroups=2, stages=6, blocks=1, batch=2),
)
# Microseconds in which a multiprocessor of an H100 multiplies 128 x 128 weights of an expert by a
# tile of as many tokens, and in which memory brings it so many weights.
GROUPED_US = {32: 0.245, 64: 0.27, 96: 0.32, 128: 0.33, 160: 0.40, 192: 0.43, 256: 0.55}
WEIGHT_US = 0.28


def tiles(form: str) -> tuple[Tile, ...]:
    """Those that a form can use: accumulating needs a second set of accumulators."""
    if form == INT8:
        return tuple(t for t in TILES if not t.few_registers)
    large = {(64, 2), (128, 3), (256, 1), (256, 2), (256, 3)}
    return tuple(
        t for t in TILES if form == "fold" or ((t.m, t.warpgroups) not in large and t.slices == 1)
    )


def grouped_tiles(form: str) -> tuple[Tile, ...]:
    """Those of experts, by growing m: each the best of as many tokens, or nearly."""
    accumulate = {8: TILES[0], 64: TILES[3], 128: TILES[6]}
    fold = {8: TILES[0], 64: TILES[4], 128: TILES[6], 256: TILES[10]}
    chosen = {t.m: t for t in EXPERT_TILES if form != "accumulate" or t.m <= 32}
    chosen |= accumulate if form == "accumulate" else fold
    return tuple(chosen[m] for m in sorted(chosen))


class Matrix(NamedTuple):
    """A weight `[N, K]`, or one of a stack of experts."""

    n: int
    k: int
    group_size: int
    form: str


def choose(
    m: int, n: int, k: int, group_size: int, form: str, multiprocessors: int
) -> tuple[Tile, int]:
    """Tile and number of blocks that share a tile's k, for M tokens, N channels, K inputs."""
    matrix = Matrix(n, k, group_size, form)
    options = [
        (tile, splits)
        for tile in tiles(form)
        if tile.m <= 2 * max(m, 8)
        for splits in tile.splits(k, group_size, form)
        if splits != STREAMED or form != INT8  # it wins little there, and often loses
    ]

    def cost(option: tuple[Tile, int]) -> float:
        return _microseconds(*option, m, matrix, multiprocessors)

    return min(options, key=cost)


@lru_cache(4096)
def choose_grouped(
    m: int, share: float, experts: int, stacks: tuple[Matrix, ...], multiprocessors: int
) -> tuple[tuple[Tile, int], ...]:
    """For each stack that M tokens pass one after the other: tile and blocks that share its k.

    share: of the tokens that an expert gets; experts: of a stack. All tiles have as many tokens,
    for the stacks share one routing. Fitted to what `bench.expert_tiles` measures.
    """
    common = set.intersection(*({t.m for t in grouped_tiles(s.form)} for s in stacks))
    tile_m = _choose_tile_m(
        m, share, experts, min(s.n for s in stacks), sorted(common), multiprocessors
    )

    def option(stack: Matrix) -> tuple[Tile, int]:
        tile = next(t for t in grouped_tiles(stack.form) if t.m == tile_m)
        long = stack.k >= 48 * BLOCK_K  # a wave of such blocks that ends unevenly costs much
        return tile, 1 if not long else 2 if tile_m == 8 else STREAMED

    return tuple(option(stack) for stack in stacks)


def _choose_tile_m(
    m: int, share: float, experts: int, n: int, possible: list[int], multiprocessors: int
) -> int:
    """Tokens of a tile."""
    rows = m * share  # of an expert, on average
    reached = 1 - (1 - share) ** m  # how probable it is that any token chooses an expert
    blocks = reached * experts * n / 128  # of 128 channels, two on a multiprocessor
    if rows < 1 or (blocks < 1.8 * multiprocessors and rows <= 5 * reached):
        return 8  # whose blocks are the smallest: few weights are spread over the chip
    memory = reached * WEIGHT_US
    others = [tile_m for tile_m in possible if tile_m > 8]
    costs = {t: max(memory, _expected_tiles(m, share, t) * GROUPED_US[t]) for t in others}
    if bound_by_memory := [t for t in others if costs[t] == memory]:
        # Rows are more uneven than chance makes them, and a larger tile costs nothing here.
        return next((t for t in bound_by_memory if t >= 2.5 * rows), bound_by_memory[-1])
    return min(others, key=costs.__getitem__)


def _expected_tiles(m: int, share: float, tile_m: int) -> float:
    """Tiles that an expert needs on average if each of M tokens chooses it with this probability.

    The rows of an expert are taken as normally distributed.
    """
    mean, deviation = m * share, math.sqrt(m * share * (1 - share))

    def more_than(rows: int) -> float:
        if deviation == 0.0:
            return float(mean > rows)
        return 0.5 * math.erfc((rows + 0.5 - mean) / (deviation * math.sqrt(2)))

    return sum(more_than(rows) for rows in range(0, m, tile_m))


def _microseconds(tile: Tile, splits: int, m: int, matrix: Matrix, multiprocessors: int) -> float:
    """A model of the time that M tokens take, fitted to what `bench.tiles` measures.

    Waves of blocks, each as long as its blocks of k take. Where tokens are few, memory is what
    blocks share, and what a started wave leaves idle costs only half; clusters of more than two
    blocks leave some multiprocessors without a whole one; streaming costs no waves, but the
    exchange of partial sums. Tiles that share tokens count for what they save where the chip is at
    its limit of power.
    """
    n, k, group_size, form = matrix
    k_blocks, full_us = -(-k // BLOCK_K), tile.block_us[form == INT8]
    shared_bytes = tile.shared_bytes(group_size, form, max(1, splits))
    resident = min(tile.blocks, MULTIPROCESSOR_BYTES // (shared_bytes + 1024))
    slots = multiprocessors * resident // tile.share
    tiles = -(-m // tile.m) * -(-n // tile.n)
    size = tile.m * tile.warpgroups / 512  # of the largest tile
    # A tile larger than the tokens need has fewer bytes of weights on their way.
    factor = 1.14 if tile.m >= 2 * max(m, 8) else 1.0
    start_us = 2.8 * (tile.share - 1)
    if splits == STREAMED:
        waves = tiles / slots
        if waves > 1 and math.ceil(waves) < 1.06 * waves:
            return math.inf  # little to win
        clusters = min(slots, tiles * k_blocks)
        exchange_us = 5.1 + 1.8 * size * (1 + max(1.0, clusters / tiles))
        return factor * (start_us + tiles * k_blocks / clusters * full_us + exchange_us)
    start_us += 0.1 * (splits - 1)
    waves = tiles * splits / (slots * (1.0 if splits <= 2 else 0.84))
    if splits > 1 and waves > 1:
        return math.inf  # never won
    started = math.ceil(waves) - waves
    waves = max(1.0, waves + (0.44 if tile.m < 64 and splits == 1 else 1.0) * started)
    fill = min(1.0, tiles * splits * tile.share / (multiprocessors * tile.blocks))
    block_us = full_us * (0.38 + 0.62 * fill)
    output_us = (3.0 if splits == 1 else 6.1) * size
    return factor * (start_us + waves * (math.ceil(k_blocks / splits) * block_us + output_us))
