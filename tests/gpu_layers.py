"""Layers for the tests of kernels: in the layout of each kernel family, with what it computes."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from generators import packed, weight

from vllm_intscale import cuda_backend, ops, reference, sm80_gemm, sm90_tiles
from vllm_intscale.reference import Weight
from vllm_intscale.sm80_gemm import TILES
from vllm_intscale.sm90_tiles import FORMS, INT8, STREAMED

NEEDS_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.usefixtures("poison"),
]
HALF = (torch.bfloat16, torch.float16)
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9


def bits_of(family: str) -> int:
    """Of its weights."""
    return 8 if family.endswith(INT8) else 4


# The portable kernel and the Hopper kernel in their forms; of 8-bit weights the last of each.
FAMILIES = ("sm80", "sm80_int8", *((*FORMS, INT8) if HOPPER else ()))
# Kernels of 8-bit weights know no groups.
FAMILIES_AND_GROUPS = [
    (family, group_size)
    for family, group_size in itertools.product(FAMILIES, (32, 64, 128))
    if bits_of(family) == 4 or group_size == 128
]


def weight_for(family: str, n: int, k: int, group_size: int, **options: Any) -> Weight:
    """That a family can run."""
    bits, foldable = bits_of(family), family == "fold"
    return weight(n, k, group_size, bits=bits, foldable=foldable, **options)


def prepared(w: Weight, family: str = "") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """In the layout of a kernel family, or of the one that the operator would choose."""
    tensors = packed(w, bits_of(family))
    return cuda_backend.prepare_matrix(*tensors, family) if family else ops.prepare_weight(*tensors)


def arithmetic(w: Weight, family: str) -> Weight:
    """What the family computes with."""
    return reference.fold(w) if family == "fold" or bits_of(family) == 8 else w


def variants(
    family: str, k: int, group_size: int, splits: tuple[int, ...] = (1, 2, 5, 8)
) -> list[tuple[Any, int | None]]:
    """Tiles of a family with splits of k, on Hopper each streamed, too; last, its own choice."""
    if family.startswith("sm80"):
        blocks = -(-k // sm80_gemm.BLOCK_K)
        return [*itertools.product(TILES, (s for s in splits if s <= blocks)), (None, None)]
    tiles = sm90_tiles.tiles(family)
    every = [
        (tile, s)
        for tile in tiles
        for s in tile.splits(k, group_size, family)
        if s in (STREAMED, *splits)
    ]
    return [*every, (None, None)]


def rows_of_trouble(k: int, dtype: torch.dtype) -> torch.Tensor:
    """Ordinary, zero, NaN, Inf, subnormal, tiny, huge and half-way rows."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(16, k, generator=rng)
    x[1] = 0
    x[2, k // 2] = torch.nan
    x[3, 1] = torch.inf
    x[4, k - 1] = -torch.inf
    x[5, 0], x[5, 1] = torch.inf, torch.nan
    x[6] *= 1e-41
    x[7] *= 2.0**-101
    x[8] = x[8].sign() * 2.0**-100
    x[9] *= 1e37
    x[10] = torch.arange(k) % 255 - 127.0
    x[11] = torch.arange(k) % 255 - 127.5
    x[12] *= 6e-5
    x[13] = torch.finfo(dtype).max
    x[14, 5] = torch.finfo(dtype).smallest_normal / 4
    return x.to(dtype)


def expert_stack(
    e: int, n: int, k: int, group_size: int, family: str = "", device: str = "cpu"
) -> list[Weight]:
    return [weight_for(family, n, k, group_size, seed=i, device=device) for i in range(e)]


def prepared_stack(experts: list[Weight], family: str = "") -> tuple[torch.Tensor, ...]:
    """In the layout of a kernel family, or of the one that the operator would choose."""
    matrices = [packed(w, bits_of(family)) for w in experts]
    stacks = [torch.stack(t).cuda() for t in zip(*matrices, strict=True)]
    if family:
        return cuda_backend.prepare_stack(*stacks, family)
    return ops.prepare_weight(*stacks)


def grouped_variants(family: str, k: int, group_size: int) -> list[tuple[Any, int]]:
    """Tiles of a family and splits of k."""
    if family.startswith("sm80"):
        return [(tile, 1) for tile in TILES]
    return [
        (tile, splits)
        for tile in sm90_tiles.grouped_tiles(family)
        for splits in (STREAMED, 1, 2)
        if splits in tile.splits(k, group_size, family)
    ]
