"""`python -m vllm_intscale.bench.expert_tiles`: layers of experts with every tile, as `tiles` does.

For whoever tunes `sm90_tiles.choose_grouped`. A whole layer is timed, since its kernels overlap.
"""

from __future__ import annotations

import itertools
import json
import sys
from functools import partial

import torch
from torch import Tensor

from vllm_intscale import cuda_backend, sm90_gemm, sm90_tiles
from vllm_intscale.bench.moe import SIZES, TOKENS, Experts, Routed, Size
from vllm_intscale.bench.timing import Timer
from vllm_intscale.errors import IntScaleError
from vllm_intscale.sm90_tiles import EXPERT_TILES, STREAMED, TILES, Tile

GROUP = 128
# For memory faster than an H100's, where small tiles wait for their own instructions: more blocks
# on a multiprocessor, or as many tokens over more channels. None of them has been timed.
MORE_TILES = (
    Tile(m=8, warpgroups=1, stages=6, blocks=4, batch=2),
    Tile(m=8, warpgroups=1, stages=5, blocks=5, batch=2),
    Tile(m=8, warpgroups=2, stages=8, blocks=2, batch=2),
    Tile(m=16, warpgroups=1, stages=5, blocks=5, batch=2),
    Tile(m=16, warpgroups=2, stages=6, blocks=2, batch=2),
    Tile(m=16, warpgroups=2, stages=5, blocks=3, batch=2),
    Tile(m=32, warpgroups=1, stages=4, blocks=4, batch=2),
)
CANDIDATES = [
    t for t in (*TILES, *EXPERT_TILES, *MORE_TILES) if t.slices == 1 and not t.few_registers
]
Stack = tuple[Tensor, Tensor, Tensor]
Plan = tuple[tuple[Tile, int], tuple[Tile, int]]


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


def plans(m: int, size: Size) -> list[Plan]:
    """Tiles of as many tokens for both GEMMs; k split in two with few tokens, or streamed.

    The same tile for both if it is one of MORE_TILES, or there would be too many.
    """
    inner, hidden, experts, topk = size
    splits = (1, 2) if m * topk <= 16 * experts else (1, STREAMED)
    return [
        ((first, split1), (second, split2))
        for first, second in itertools.product(CANDIDATES, repeat=2)
        if first.m == second.m <= 8 * max(8, m * topk // experts)
        if first is second or not {first, second} & {*MORE_TILES}
        for split1, split2 in itertools.product(splits, repeat=2)
        if split1 in first.splits(hidden, GROUP, "fold")
        and split2 in second.splits(inner, GROUP, "fold")
    ]


def _call(x: Tensor, w13: Stack, w2: Stack, routed: list[Routed], plan: Plan, copy: int) -> Tensor:
    weights, ids = routed[copy]
    return cuda_backend.moe(x, w13, w2, weights, ids, None, False, plans=plan)


def time_layer(timer: Timer, name: str, size: Size) -> list[dict[str, object]]:
    """One layer, routed evenly and unevenly, over TOKENS."""
    inner, hidden, experts, topk = size
    stacks = _random_stack(experts, 2 * inner, hidden), _random_stack(experts, hidden, inner)
    matrices = tuple(
        sm90_tiles.Matrix(stack[2].shape[1], k, GROUP, "fold")
        for stack, k in zip(stacks, (hidden, inner), strict=True)
    )
    empty = torch.empty(0, device="cuda")
    rows: list[dict[str, object]] = []
    problem = Experts(size, empty, empty, empty, 1.0)
    for m, mode in itertools.product(TOKENS, problem.modes):
        routed = problem.routings(m, mode)
        x = torch.randn(m, hidden, device="cuda").to(torch.bfloat16)
        times: dict[Plan, float] = {}
        for plan in plans(m, size):
            call = partial(_call, x, *stacks, routed, plan)
            call(0)
            graph = timer.capture(call, len(routed), problem.least_seconds(m))
            times[plan] = graph.time(0.1 if m >= 512 else 0.0)
            rows.append({"layer": name, "M": m, "mode": mode, "plan": _short(plan)})
            rows[-1]["us"] = times[plan]
        chip = sm90_gemm.multiprocessors_of(x.device.index)
        first, second = sm90_tiles.choose_grouped(m, topk / experts, experts, matrices, chip)
        chosen = times.get((first, second), float("nan"))
        shown = "  ".join(f"{us:.1f} {_short(p)}" for us, p in _best_of_each_m(times))
        plan_text = f"chosen {chosen:.1f} {_short((first, second))}"
        print(f"{name} M={m} {mode}: {plan_text};  {shown}", flush=True)
    return rows


def _short(plan: Plan) -> str:
    """Tokens x channels of a tile, how many blocks share its tokens, how many its k."""
    parts = [f"{t.m}x{t.n // t.share}s{t.share}k{splits}" for t, splits in plan]
    return parts[0] if parts[0] == parts[1] else "+".join(parts)


def _best_of_each_m(times: dict[Plan, float]) -> list[tuple[float, Plan]]:
    best: dict[int, tuple[float, Plan]] = {}
    for plan, us in times.items():
        m = plan[0][0].m
        if m not in best or us < best[m][0]:
            best[m] = (us, plan)
    return sorted(best.values())


def main() -> None:
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        raise IntScaleError("the tiles of the Hopper kernel need a Hopper GPU")
    timer = Timer()
    names = sys.argv[1:] or list(SIZES)
    print(json.dumps([row for name in names for row in time_layer(timer, name, SIZES[name])]))


if __name__ == "__main__":
    main()
