"""Runs every kernel on small shapes with ragged edges; started by test_sanitizer.py under
compute-sanitizer. `--remove FILE TEXT` deletes the first occurrence of TEXT from a source: the
proof that racecheck would see a missing barrier."""

from __future__ import annotations

import argparse

import torch
from generators import activation, assert_same_bits, routing
from gpu_layers import (
    FAMILIES,
    arithmetic,
    expert_stack,
    grouped_variants,
    prepared,
    prepared_stack,
    variants,
    weight_for,
)

from vllm_intscale import activations, cuda_backend, jit, ops, reference


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
    families = [f for f in FAMILIES if f.startswith("sm80") or not options.portable]
    for n, k, group_size in ((40, 1056, 32), (132, 384, 128)):
        a8, token_scale = activation(35, k)  # references on CPU: only our kernels are looked at
        blocked = activations.swizzle(a8.cuda())
        for family in families:
            w = weight_for(family, n, k, group_size)
            ready, exact = [t.cuda() for t in prepared(w, family)], arithmetic(w, family)
            acc = reference.accumulate(a8, exact.codes, exact.group_scale)
            for tile, splits in variants(family, k, group_size, (1, 2)):
                if splits in (1, 2):
                    y = cuda_backend.gemm(
                        blocked, token_scale.cuda(), *ready, None, torch.int32, tile, splits
                    )
                    if not remove:
                        assert_same_bits(y.cpu(), acc)
    if remove:
        return
    weights, ids = (t.cuda() for t in routing(35, 2, 4, "holes"))
    positions = torch.arange(35, device="cuda")
    for k in (1056, 24):
        rows = torch.randn(35, k, device="cuda", dtype=torch.bfloat16)
        ops.rotary_embedding(rows, positions, rows[:, :16], 1, k // 1056)
        ops.quantize_activation(rows)
        ops.norm_quantize([rows] * 3, rows[0], 1e-5, True, True)
        ops.silu_mul_quantize(rows[:, : k // 16 * 16])
    x = torch.randn(35, 64, device="cuda", dtype=torch.bfloat16)
    for family in families:
        stacks = [prepared_stack(expert_stack(4, n, 64, 32, family), family) for n in (128, 64)]
        for tile, splits in grouped_variants(family, 64, 32):
            if splits == 1:
                cuda_backend.moe(x, *stacks, weights, ids, None, False, plans=[(tile, 1)] * 2)
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
