"""Runs every kernel on small shapes with ragged edges; started by test_sanitizer.py under
compute-sanitizer. `--remove TEXT` deletes the first occurrence of TEXT from the GEMM source: the
proof that racecheck would see a missing barrier."""

from __future__ import annotations

import argparse

import torch
from generators import activation, assert_same_bits, packed, routing, weight

from vllm_intscale import cuda_backend, jit, ops, reference


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--remove", default="")
    remove = parser.parse_args().remove
    if remove:
        read = jit.read_source
        assert remove in read("sm80_w4a8_gemm.cu")
        jit.read_source = lambda file: read(file).replace(remove, "", 1)
    for n, k, group_size in ((40, 1056, 32), (132, 384, 128)):
        w = weight(n, k, group_size)
        qweight, group_scale, channel_scale = (t.cuda() for t in packed(w))
        ready = (*ops.prepare_weight(qweight, group_scale), channel_scale)
        a8, token_scale = activation(35, k)
        acc = reference.accumulate(a8, w.codes, w.group_scale)
        for tile in cuda_backend.TILES:
            y = cuda_backend.gemm(a8.cuda(), token_scale.cuda(), *ready, None, torch.int32, tile)
            if not remove:
                assert_same_bits(y.cpu(), acc)
    if remove:
        return
    stacks = []
    w13 = [packed(weight(128, 64, 32, seed=e)) for e in range(4)]
    w2 = [packed(weight(64, 64, 32, seed=e)) for e in range(4)]
    for experts in (w13, w2):
        q, s, c = (torch.stack(t).cuda() for t in zip(*experts, strict=True))
        stacks.append([*ops.prepare_weight(q, s), c])
    weights, ids = (t.cuda() for t in routing(35, 2, 4, "holes"))
    x = torch.randn(35, 64, device="cuda", dtype=torch.bfloat16)
    for tile in cuda_backend.TILES:
        cuda_backend.moe(x, *stacks, weights, ids, None, False, tile=tile)
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
