"""Tiles of `cuda/sm90_w4a8_gemm.cu`, and which of them a problem gets."""

from __future__ import annotations

import math
import os
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

from vllm_intscale import jit
from vllm_intscale.errors import IntScaleError

FORMS = ("fold", "accumulate")  # of int4 weights
INT8 = "int8"  # of 8-bit ones: "fold", done when they are loaded
BLOCK_K = 128
INT8_BLOCK_BYTES = 64 * BLOCK_K  # of 64 channels; of int4 ones less
SHARED_BYTES = 227 * 1024  # of a block, at most
MULTIPROCESSOR_BYTES = 228 * 1024  # of its blocks and 1 KB for each
MAX_SPLITS = 8  # blocks of a portable cluster
STREAMED = 0  # instead of a number of splits: see cuda/sm90_schedule.cuh


def wanted_form() -> str:
    """Of int4 weights, INTSCALE_FORM; empty: "fold" where scales allow it.

    Raises IntScaleError for what is none of FORMS.
    """
    form = os.environ.get("INTSCALE_FORM", "")
    if form not in ("", *FORMS):
        raise IntScaleError(f"INTSCALE_FORM is {form!r}; it must be one of {', '.join(FORMS)}")
    return form


class Tile(NamedTuple):
    """Tokens x channels of a block, and what it keeps in flight.

    blocks: that share a multiprocessor; batch: k-steps whose wgmma are issued at once (8 tokens
    have none); block_us: for `choose`, of int4 and of int8 weights; share: neighbouring blocks that
    load their tokens together; slices: warpgroups that multiply the same channels, each some of
    their k; narrower: of experts' tiles, the widths in tokens, in equal steps up to m, of which the
    first that holds a tile's rows is multiplied.
    """

    m: int
    warpgroups: int
    stages: int
    blocks: int
    batch: int
    block_us: tuple[float, float] = (0.0, 0.0)
    share: int = 1
    slices: int = 1
    narrower: tuple[int, ...] = ()

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

    def widths(self, form: str) -> tuple[int, ...]:
        """Of experts' tiles, in tokens. Accumulating leaves no registers for more than one."""
        return (self.m,) if form == "accumulate" else (*self.narrower, self.m)

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
        widths = self.widths(form) if grouped else (self.m,)
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
            "NARROWEST": widths[0],
            "STEP": widths[-1] - widths[-2] if len(widths) > 1 else 0,
            "GROUPED": int(grouped),
            "FLOAT_SCALE": int(float_scale),
            "DTYPE": dtype_code,
        }
        return jit.Kernel(
            "sm90_w4a8_gemm.cu", "w4a8_gemm", tuple(defines.items()), SHARED_BYTES, "sm_90a"
        )


# block_us: about what 128 k take on a GPU full of such blocks, as `choose` fits best (with up to 48
# tokens of int4 an H200, else an H100), in microseconds; 0: not for int8 weights.
TILES = (
    Tile(m=8, warpgroups=1, stages=8, blocks=3, batch=2, block_us=(0.333, 0.64)),
    Tile(m=8, warpgroups=2, stages=8, blocks=2, batch=2, block_us=(0.429, 0.0)),
    Tile(m=16, warpgroups=1, stages=6, blocks=4, batch=2, block_us=(0.495, 0.78)),
    Tile(m=16, warpgroups=2, stages=7, blocks=2, batch=2, block_us=(0.479, 0.0)),
    Tile(m=32, warpgroups=1, stages=5, blocks=3, batch=2, block_us=(0.378, 0.57)),
    Tile(m=32, warpgroups=2, stages=6, blocks=2, batch=2, block_us=(0.526, 0.0)),
    Tile(m=48, warpgroups=2, stages=6, blocks=2, batch=2, block_us=(0.353, 0.0)),
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
# Which of them experts use, by tokens and channels, and their narrower widths: as many as ptxas has
# registers for.
NARROWER: dict[tuple[int, int], tuple[int, ...]] = {
    (8, 64): (),
    (8, 128): (),
    (16, 128): (8,),
    (32, 128): (8, 16, 24),
    (48, 128): (16, 32),
    (64, 128): (32, 48),
    (128, 128): (32, 64, 96),
    (256, 256): (64, 128, 192),
}
_FOR_EXPERTS = Tile(m=160, warpgroups=2, stages=6, blocks=1, batch=2, narrower=(80,))
EXPERT_TILES = tuple(
    sorted(
        (
            _FOR_EXPERTS,
            *(t._replace(narrower=NARROWER[t.m, t.n]) for t in TILES if (t.m, t.n) in NARROWER),
        ),
        key=lambda tile: (tile.m, tile.n),
    )
)
# Microseconds in which a multiprocessor of an H200 multiplies 128 x 128 weights of an expert by a
# tile of as many tokens, the least it takes for any, and in which memory brings it so many weights.
GROUPED_US = {16: 0.235, 32: 0.249, 48: 0.251, 64: 0.27, 128: 0.307, 160: 0.353, 256: 0.536}
UNPACK_US = 0.221
WEIGHT_US = 0.197


def tiles(form: str) -> tuple[Tile, ...]:
    """Those that a form can use: accumulating needs a second set of accumulators."""
    if form == "fold":
        return TILES
    others = tuple(t for t in TILES if t.block_us[1] and not t.few_registers)
    if form == INT8:
        return others
    large = {(64, 2), (128, 3), (256, 1), (256, 2)}
    return tuple(t for t in others if (t.m, t.warpgroups) not in large and t.slices == 1)


def grouped_tiles(form: str) -> tuple[Tile, ...]:
    """Those of experts, by growing m. Accumulating needs registers, and other tiles from 64 on."""
    if form == "accumulate":
        large = (t for t in TILES if (t.m, t.n) in {(64, 64), (128, 128)})
        return (*(t for t in EXPERT_TILES if t.m < 48), *large)
    return EXPERT_TILES


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
    reached = experts * (1 - (1 - share) ** m)  # probably
    blocks = [reached * stack.n / 128 for stack in stacks]  # of 128 channels
    rows = m * share  # of an expert, on average
    if rows < 1 or (min(blocks) < 1.8 * multiprocessors and rows * experts <= 5 * reached):
        tile_m = 8  # whose blocks are the smallest: few weights are spread over the chip
    else:
        tile_m = _choose_tile_m(m, share, {stack.form for stack in stacks})

    def option(stack: Matrix, blocks: float) -> tuple[Tile, int]:
        narrow, *wide = (t for t in grouped_tiles(stack.form) if t.m == tile_m)
        tile = wide[0] if wide and blocks >= 4 * multiprocessors else narrow
        long = stack.k >= 48 * BLOCK_K  # a wave of such blocks that ends unevenly costs much
        return tile, 1 if not long else 2 if tile_m == 8 else STREAMED

    return tuple(map(option, stacks, blocks))


def _choose_tile_m(m: int, share: float, forms: set[str]) -> int:
    """Tokens of a tile, more than 8, that tiles of all these forms can have.

    The largest of those that take about the shortest time, with room for three times the rows that
    an expert gets on average: some get more than by chance, and narrower widths make that cheap.
    """
    widths = [{t.m: t.widths(form) for t in grouped_tiles(form)} for form in forms]
    common = set.intersection(*map(set, widths)) - {8}
    memory = (1 - (1 - share) ** m) * WEIGHT_US
    costs = {
        tile_m: max(memory, _expected_us(m, share, min((w[tile_m] for w in widths), key=len)))
        for tile_m in common
    }
    best, rows = min(costs.values()), m * share
    return max(
        tile_m
        for tile_m, cost in costs.items()
        if cost == best or (cost <= 1.025 * best and tile_m <= 3 * rows)
    )


def _expected_us(m: int, share: float, widths: tuple[int, ...]) -> float:
    """What an expert's tiles take on average if each of M tokens chooses it with this probability.

    widths: of a tile, narrower ones first. The rows of an expert are taken as normally distributed.
    """
    mean, deviation = m * share, math.sqrt(m * share * (1 - share))

    def more_than(rows: int) -> float:
        if deviation == 0.0:
            return float(mean > rows)
        return 0.5 * math.erfc((rows + 0.5 - mean) / (deviation * math.sqrt(2)))

    tile_m = widths[-1]
    token_us = (GROUPED_US[tile_m] - UNPACK_US) / tile_m
    most = min(m, int(mean + 6 * deviation) + 1)
    us = 0.0
    for first in range(0, most, tile_m):  # row of each tile
        us += more_than(first) * (UNPACK_US + widths[0] * token_us)
        us += sum(more_than(first + a) * (b - a) * token_us for a, b in pairwise(widths))
    return us


def _microseconds(tile: Tile, splits: int, m: int, matrix: Matrix, multiprocessors: int) -> float:
    """A model of the time that M tokens take, fitted to what `bench.tiles` measures.

    Waves of blocks, each as long as its blocks of k take. Where tokens are few, memory is what
    blocks share, and the few of a ragged wave cannot keep it busy; clusters of more than two
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
    ragged = 0.44 if form == INT8 else 2.28  # int8 as an H100 has it
    waves = max(1.0, waves + (ragged if tile.m < 64 and splits == 1 else 1.0) * started)
    fill = min(1.0, tiles * splits * tile.share / (multiprocessors * tile.blocks))
    block_us = full_us * (0.38 + 0.62 * fill)
    output_us = (3.0 if splits == 1 else 6.1) * size
    return factor * (start_us + waves * (math.ceil(k_blocks / splits) * block_us + output_us))
