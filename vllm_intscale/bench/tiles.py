"""`python -m vllm_intscale.bench.tiles [FORM...]`: every tile and split of the Hopper GEMM.

For whoever tunes `sm90_tiles.TILES` and `choose`: prints, for each form (default: of int4 weights),
shape and number of tokens, the fastest variants and what `choose` takes, and ends with all timings
as one line of JSON.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from itertools import product

import torch
from torch import Tensor

from vllm_intscale import cuda_backend, sm90_gemm, sm90_tiles
from vllm_intscale.bench.gemm import SHAPES, TOKENS
from vllm_intscale.bench.timing import Timer, copies_needed
from vllm_intscale.errors import IntScaleError

GROUP = 128
SHOWN = 4
MAX_TILES = 8  # of tokens: tiles that would need more are left out, unless they are large


def variants(m: int, n: int, k: int, form: str) -> list[tuple[int, int]]:
    """Tiles (by their number) and splits that are worth a try for M tokens."""
    return [
        (number, splits)
        for number, tile in enumerate(sm90_tiles.TILES)
        if tile in sm90_tiles.tiles(form)
        and tile.m <= 2 * max(m, 8)
        and min(m, MAX_TILES * 64) <= MAX_TILES * tile.m
        for splits in tile.splits(k, GROUP, form)
        # More than three waves of clusters never won.
        if splits <= 1 or -(-n // tile.n) * -(-m // tile.m) * splits <= 3 * 132 * tile.blocks
    ]


def _call(
    a8: Tensor,
    token_scale: Tensor,
    copies: list[tuple[Tensor, Tensor, Tensor]],
    tile: sm90_tiles.Tile,
    splits: int,
    copy: int,
) -> Tensor:
    qweight, unit, channel_scale = copies[copy]
    return cuda_backend.gemm(
        a8, token_scale, qweight, unit, channel_scale, None, torch.bfloat16, tile, splits
    )


def time_shape(timer: Timer, n: int, k: int, form: str) -> list[dict[str, int | float | str]]:
    """All variants of one N x K, over TOKENS."""
    rng = torch.Generator("cuda").manual_seed(0)
    codes = torch.randn(n, k, device="cuda", generator=rng).mul_(2.5).round_().clamp_(-8, 7)
    scale = torch.randint(32, 256, (n, k // GROUP), device="cuda", generator=rng)
    channel_scale = torch.rand(n, device="cuda", generator=rng)
    if form == sm90_tiles.INT8:
        qweight, unit = sm90_gemm.prepare_int8(codes.to(torch.int8))
    else:
        qweight, unit, channel_scale = sm90_gemm.prepare_weight(
            codes.to(torch.int8), scale.to(torch.int16), channel_scale, form
        )
    count = copies_needed(qweight.nbytes)
    copies = [(qweight.clone(), unit.clone(), channel_scale.clone()) for _ in range(count)]
    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
    rows: list[dict[str, int | float | str]] = []
    for m in TOKENS:
        x = torch.randn(m, k, device="cuda", generator=rng).to(torch.bfloat16)
        a8, token_scale = cuda_backend.quantize_activation(x)
        times: dict[tuple[int, int], float] = {}
        for number, splits in variants(m, n, k, form):
            tile = sm90_tiles.TILES[number]
            call = partial(_call, a8, token_scale, copies, tile, splits)
            call(0)
            graph = timer.capture(call, len(copies), seconds=5e-6 + n * m * k / 4e14)
            times[number, splits] = graph.time()
        tile, splits = sm90_tiles.choose(m, n, k, GROUP, form, multiprocessors)
        chosen = sm90_tiles.TILES.index(tile), splits
        fastest = sorted(times, key=lambda variant: times[variant])[:SHOWN]
        shown = "  ".join(f"{times[v]:.1f} us tile {v[0]} splits {v[1]}" for v in fastest)
        print(f"{n}x{k} M={m}: chosen {times[chosen]:.1f} us {chosen};  {shown}", flush=True)
        rows += [
            {"form": form, "N": n, "K": k, "M": m, "tile": v[0], "splits": v[1], "us": times[v]}
            for v in times
        ]
    return rows


def main() -> None:
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        raise IntScaleError("the tiles of the Hopper kernel need a Hopper GPU")
    timer = Timer()
    rows = [
        row
        for form, (n, k) in product(sys.argv[1:] or sm90_tiles.FORMS, SHAPES.values())
        for row in time_shape(timer, n, k, form)
    ]
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
