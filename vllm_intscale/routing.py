"""Where the rows of experts lie for the grouped GEMMs, as `cuda/moe_routing.cu` describes it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vllm_intscale import jit

KERNEL = jit.Kernel("moe_routing.cu", "group_rows")


class Routing(NamedTuple):
    """slot_row int32 `[M, topk]`, tiles int32 `[most there can be, 4]`, tile_count int32 `[1]`.

    rows: of the grouped activations, as many as any routing needs.
    """

    slot_row: Tensor
    tiles: Tensor
    tile_count: Tensor
    rows: int


def grouped_rows(slots: int, experts: int) -> int:
    """How many rows any routing of so many slots to so many local experts needs."""
    return (slots + min(experts, slots) * 7 + 7) // 8 * 8  # those of an expert begin at a multiple


def group_rows(topk_ids: Tensor, expert_map: Tensor | None, experts: int, tile_m: int) -> Routing:
    """Group the slots of topk_ids int `[M, topk]` by local expert, in tiles of `tile_m` rows.

    expert_map int `[global experts]`: local index or -1. tile_m is a multiple of 8.
    """
    slots = topk_ids.numel()
    most_tiles = (slots + min(experts, slots) * (tile_m - 1)) // tile_m
    slot_row, tiles, tile_count = (
        topk_ids.new_empty(size, dtype=torch.int32)
        for size in (tuple(topk_ids.shape), (most_tiles, 4), (1,))
    )
    ids = topk_ids.to(torch.int32).contiguous()
    expert_map = None if expert_map is None else expert_map.to(torch.int32)
    args = (ids, expert_map, slot_row, tiles, tile_count, slots, experts, tile_m)
    jit.launch(KERNEL, topk_ids.device, (1,), 1024, args, 12 * experts, overlap=True)
    return Routing(slot_row, tiles, tile_count, grouped_rows(slots, experts))
