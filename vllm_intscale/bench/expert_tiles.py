"""`python -m vllm_intscale.bench.expert_tiles`: every tile of the grouped GEMMs, as `tiles` does.

For whoever tunes `sm90_tiles.choose_grouped`. Both GEMMs of a layer are timed with each number of
tokens a tile, at each its own best (tile, splits); what counts is their sum, which comes last.
"""

from __future__ import annotations

import json
import sys
from functools import partial

import torch
from torch import Tensor

from vllm_intscale import cuda_backend, sm90_gemm, sm90_tiles
from vllm_intscale.bench.moe import SIZES, TOKENS, Experts, Size
from vllm_intscale.bench.timing import Timer
from vllm_intscale.errors import IntScaleError
from vllm_intscale.routing import Routing, group_rows

GROUP = 128
MAX_SPLITS = 4
CANDIDATES = [t for t in sm90_tiles.TILES if t.slices == 1 and not t.few_registers]
Stack = tuple[Tensor, Tensor, Tensor]


def _random_stack(experts: int, n: int, k: int) -> Stack:
    def codes() -> Tensor:
        return torch.randn(n, k, device="cuda").mul_(2.5).round_().clamp_(-8, 7).to(torch.int8)

    def scale() -> Tensor:
        return torch.randint(32, 256, (n, k // GROUP), device="cuda").to(torch.int16)

    matrices = [
        sm90_gemm.prepare_weight(codes(), scale(), torch.rand(n, device="cuda"), "fold")
        for _ in range(experts)
    ]
    blocks, unit, channel_scale = (torch.stack(part) for part in zip(*matrices, strict=True))
    return blocks, unit, channel_scale


def _call(
    operands: list[tuple[Tensor, Tensor, Routing]],
    stack: Stack,
    tile: sm90_tiles.Tile,
    splits: int,
    copy: int,
) -> Tensor:
    a8, token_scale, routing = operands[copy]
    return cuda_backend.grouped_gemm(a8, token_scale, stack, routing, torch.bfloat16, tile, splits)


def time_layer(timer: Timer, name: str, size: Size) -> list[dict[str, int | float | str]]:
    """Both GEMMs of one layer, routed evenly, over TOKENS."""
    inner, hidden, experts, topk = size
    stacks = {
        "w13": _random_stack(experts, 2 * inner, hidden),
        "w2": _random_stack(experts, hidden, inner),
    }
    matrices = tuple(
        sm90_tiles.Matrix(stack[2].shape[1], k, GROUP, "fold")
        for stack, k in zip(stacks.values(), (hidden, inner), strict=True)
    )
    empty = torch.empty(0, device="cuda")
    rows: list[dict[str, int | float | str]] = []
    for m in TOKENS:
        problem = Experts(size, empty, empty, empty, 1.0)
        routed = problem.routings(m, "random")
        times: dict[str, dict[tuple[int, int], float]] = {which: {} for which in stacks}
        for tile_m in sorted({tile.m for tile in CANDIDATES}):
            if tile_m > 8 * max(8, m * topk // experts):
                continue
            routings = [group_rows(ids, None, experts, tile_m) for _, ids in routed]
            for which, k in (("w13", hidden), ("w2", inner)):
                x = torch.randn(m * topk, k, device="cuda").to(torch.bfloat16)
                operands = [
                    (*cuda_backend.quantize_slots(x, _each_slot(routing)), routing)
                    for routing in routings
                ]
                for number, tile in enumerate(sm90_tiles.TILES):
                    if tile.m != tile_m or tile not in CANDIDATES:
                        continue
                    for splits in tile.splits(k, GROUP, "fold"):
                        if not 0 < splits <= MAX_SPLITS or (splits > 1 and m > 64):
                            continue
                        call = partial(_call, operands, stacks[which], tile, splits)
                        call(0)
                        graph = timer.capture(call, len(operands), problem.least_seconds(m) / 3)
                        us = graph.time(0.1 if m >= 512 else 0.0)
                        times[which][number, splits] = us
                        rows.append({"layer": name, "M": m, "gemm": which, "tile": number})
                        rows[-1] |= {"splits": splits, "us": us}
        plan = sm90_tiles.choose_grouped(m, topk / experts, matrices)
        _print_place(name, m, times, [(sm90_tiles.TILES.index(t), s) for t, s in plan])
    return rows


def _each_slot(routing: Routing) -> Routing:
    """The same rows, for activations that already have a row for each slot."""
    return routing._replace(slot_row=routing.slot_row.view(-1, 1))


def _print_place(
    name: str,
    m: int,
    times: dict[str, dict[tuple[int, int], float]],
    chosen: list[tuple[int, int]],
) -> None:
    sums: dict[int, list[tuple[float, tuple[int, int]]]] = {}
    for of_gemm in times.values():
        for tile_m in {sm90_tiles.TILES[number].m for number, _ in of_gemm}:
            options = [(us, v) for v, us in of_gemm.items() if sm90_tiles.TILES[v[0]].m == tile_m]
            sums.setdefault(tile_m, []).append(min(options))
    totals = sorted((sum(us for us, _ in best), m, best) for m, best in sums.items())
    shown = "  ".join(
        f"{total:.1f} us tokens {tile_m} {[v for _, v in best]}"
        for total, tile_m, best in totals[:3]
    )
    taken = [times[which].get(v, float("nan")) for which, v in zip(times, chosen, strict=True)]
    print(f"{name} M={m}: chosen {sum(taken):.1f} us {chosen};  {shown}", flush=True)


def main() -> None:
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        raise IntScaleError("the tiles of the Hopper kernel need a Hopper GPU")
    timer = Timer()
    names = sys.argv[1:] or list(SIZES)
    print(json.dumps([row for name in names for row in time_layer(timer, name, SIZES[name])]))


if __name__ == "__main__":
    main()
