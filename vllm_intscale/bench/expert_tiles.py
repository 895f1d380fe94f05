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
from vllm_intscale.sm90_tiles import EXPERT_TILES, STREAMED, Tile

GROUP = 128
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
    """Tiles of as many tokens for both GEMMs, none much too large or small for an expert's rows.

    k is split with few tokens, or streamed.
    """
    inner, hidden, experts, topk = size
    rows = m * topk / experts
    splits = ((1, 2), (1, 2, 4, STREAMED)) if rows <= 16 else ((1, STREAMED), (1, STREAMED))
    return [
        ((first, split1), (second, split2))
        for first, second in itertools.product(EXPERT_TILES, repeat=2)
        if first.m == second.m <= max(64, 8 * rows) and rows <= 8 * first.m
        for split1, split2 in itertools.product(*splits)
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
