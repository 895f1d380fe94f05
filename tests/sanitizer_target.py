"""Runs every kernel on small shapes with ragged edges; started by test_sanitizer.py under
compute-sanitizer. `--remove FILE TEXT` deletes the first occurrence of TEXT from a source: the
proof that racecheck would see a missing barrier."""

from __future__ import annotations

import argparse
import itertools

import torch
from generators import activation, assert_same_bits, packed, routing, weight

from vllm_intscale import (
    activations,
    cuda_backend,
    jit,
    reference,
    sm80_gemm,
    sm90_gemm,
    sm90_tiles,
)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--remove", nargs=2, default=())
    parser.add_argument("--portable", action="store_true", help="leave out the Hopper kernel")
    options = parser.parse_args()
    remove = options.remove
    if remove:
        read = jit.read_source
        assert remove[1] in read(remove[0])
        jit.read_source = lambda file: read(file).replace(
            remove[1] if file == remove[0] else "\0", ""
        )
    hopper = torch.cuda.get_device_capability()[0] == 9 and not options.portable
    for n, k, group_size in ((40, 1056, 32), (132, 384, 128)):
        w = weight(n, k, group_size, foldable=True)
        qweight, group_scale, channel_scale = (t.cuda() for t in packed(w))
        a8, token_scale = activation(35, k)
        runs = [
            (w, (*sm80_gemm.prepare_weight(qweight, group_scale), channel_scale), tile, splits)
            for tile, splits in itertools.product(sm80_gemm.TILES, (1, 2))
        ]
        for form in sm90_tiles.FORMS if hopper else ():
            exact = reference.fold(w) if form == "fold" else w
            ready = sm90_gemm.prepare_weight(w.codes.cuda(), group_scale, channel_scale, form)
            for tile in sm90_tiles.tiles(form):
                runs += [
                    (exact, ready, tile, splits)
                    for splits in (1, 2)
                    if splits in tile.splits(k, group_size, form)
                ]
        for exact, ready, tile, splits in runs:
            blocked = activations.swizzle(a8.cuda())
            y = cuda_backend.gemm(
                blocked, token_scale.cuda(), *ready, None, torch.int32, tile, splits
            )
            if not remove:
                acc = reference.accumulate(a8, exact.codes, exact.group_scale)
                assert_same_bits(y.cpu(), acc)
    if remove:
        return
    experts = [
        [packed(weight(n, 64, 32, seed=e, foldable=True)) for e in range(4)] for n in (128, 64)
    ]
    weights, ids = (t.cuda() for t in routing(35, 2, 4, "holes"))
    x = torch.randn(35, 64, device="cuda", dtype=torch.bfloat16)
    for family in ("sm80", *(sm90_tiles.FORMS if hopper else ())):
        stacks = []
        for stack in experts:
            tensors = [torch.stack(t).cuda() for t in zip(*stack, strict=True)]
            stacks.append(cuda_backend.prepare_stack(*tensors, family))
        tiles = sm80_gemm.TILES if family == "sm80" else sm90_tiles.grouped_tiles(family)
        for tile in tiles:
            cuda_backend.moe(x, *stacks, weights, ids, None, False, plans=[(tile, 1)] * 2)
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
