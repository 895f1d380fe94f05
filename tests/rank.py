"""One of two ranks, started by `test_two_gpus.py`: its share of two layers, summed by NCCL; and
sums that are fused with the norm after them.

Row-parallel linear layer: the inputs are cut in half, each rank quantizes its own half of a token
(one scale a rank). Experts: each rank has half of them, and an expert map.
"""

import os
import sys

import test_all_reduce
import torch
import torch.distributed as dist
from cuda.bindings import driver
from generators import packed, routing, weight

from vllm_intscale import all_reduce, cuda_backend, ops, reference
from vllm_intscale.reference import Weight

RANKS, EXPERTS, TOPK, HIDDEN, INNER = 2, 8, 2, 512, 256
TOKENS = (1, 7, 64, 300)


def exact(w: Weight) -> Weight:
    """What the kernel of this GPU computes with."""
    hopper = torch.cuda.get_device_capability()[0] == 9
    return reference.fold(w) if hopper else w


def slice_of(w: Weight, rank: int) -> Weight:
    """Half of the inputs."""
    codes, group_scale = (t.chunk(RANKS, dim=1)[rank].contiguous() for t in w[:2])
    return Weight(codes, group_scale, w.channel_scale)


def expert_map_of(rank: int) -> torch.Tensor:
    local = torch.full((EXPERTS,), -1, dtype=torch.int32)
    half = EXPERTS // RANKS
    local[rank * half : (rank + 1) * half] = torch.arange(half, dtype=torch.int32)
    return local


def rounded_sum(shares: list[torch.Tensor]) -> torch.Tensor:
    """What the ranks' sum is to be: one rounding."""
    return sum(share.float() for share in shares).to(shares[0].dtype)  # type: ignore[union-attr]


def compare(what: str, found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert torch.equal(found.cpu(), wanted), f"{what}: {(found.cpu() != wanted).sum()} differ"


def check_all_reduce(rank: int) -> None:
    """Sums of changing sizes by ranks that are not in step; then graphs of them, replayed."""
    columns, dtype, device = 4096, torch.bfloat16, torch.device("cuda", rank)
    all_reduce.connect("ranks", dist.new_group(backend="gloo"), columns, dtype, device)
    inboxes = all_reduce._inboxes["ranks", columns]
    norm = (torch.rand(columns, generator=torch.Generator().manual_seed(0)) + 0.5).to(dtype)
    sizes = (1, 64, 3, 128, 1, 1, 17, 128)
    cases = [test_all_reduce.inputs_of(i, RANKS, m, columns, dtype) for i, m in enumerate(sizes)]
    wanted = [test_all_reduce.expected(tensors, 1, norm) for tensors in cases]
    inputs = [[tensors[0].cuda(), tensors[2 + rank].cuda()] for tensors in cases]
    weight = norm.cuda()

    def sums(slow: bool) -> list[tuple[torch.Tensor, ...]]:
        found = []
        for i, addends in enumerate(inputs):
            if slow and i % RANKS == rank:
                torch.cuda._sleep(200_000)
            found.append(all_reduce.launch(inboxes, addends, weight, 1e-5, True, True))
        return found

    def check(found: list[tuple[torch.Tensor, ...]], what: str) -> None:
        torch.cuda.synchronize()
        for i, outputs in enumerate(found):
            test_all_reduce.check(outputs, wanted[i], f"rank {rank}, {what}, sum {i}")

    for number in range(20):
        check(sums(slow=number % 2 == 0), f"turn {number}")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = sums(slow=False)
    for number in range(20):
        for tensor in (t for outputs in found for t in outputs):
            tensor.view(torch.uint8).fill_(0x55)
        for _ in range(25):
            graph.replay()
        check(found, f"replay {number}")


def main(rank: int) -> None:
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", rank=rank, world_size=RANKS)
    w = weight(384, 1024, 128, foldable=True)
    parts = [slice_of(w, r) for r in range(RANKS)]
    own = ops.prepare_weight(*(t.cuda() for t in packed(parts[rank])))
    cuda_backend.warm_up(own[:2], torch.bfloat16)
    _, _, active = driver.cuDevicePrimaryCtxGetState(1 - rank)
    assert not active, f"rank {rank} has a context on the other GPU, which takes memory there"
    w13 = [weight(2 * INNER, HIDDEN, 128, seed=e, foldable=True) for e in range(EXPERTS)]
    w2 = [weight(HIDDEN, INNER, 128, seed=e + 99, foldable=True) for e in range(EXPERTS)]
    maps = [expert_map_of(r) for r in range(RANKS)]
    local = [e for e in range(EXPERTS) if maps[rank][e] >= 0]
    stacks = [
        ops.prepare_weight(*(torch.stack(t).cuda() for t in zip(*tensors, strict=True)))
        for tensors in ([packed(w13[e]) for e in local], [packed(w2[e]) for e in local])
    ]
    for m in TOKENS:
        generator = torch.Generator().manual_seed(m)
        x = torch.randn(m, 1024, generator=generator).to(torch.bfloat16)
        halves = [half.contiguous() for half in x.chunk(RANKS, dim=1)]
        y = ops.gemm(*ops.quantize_activation(halves[rank].cuda()), *own, None, x.dtype)
        shares = [reference.linear(h, exact(p)) for h, p in zip(halves, parts, strict=True)]
        compare(f"rank {rank} linear M={m}", y, shares[rank])
        dist.all_reduce(y)
        compare(f"sum linear M={m}", y, rounded_sum(shares))

        x, (weights, ids) = x[:, :HIDDEN].contiguous(), routing(m, TOPK, EXPERTS, "random")
        y = cuda_backend.moe(
            x.cuda(), *stacks, weights.cuda(), ids.cuda(), maps[rank].cuda(), False
        )
        shares = []
        for expert_map in maps:
            there = [e for e in range(EXPERTS) if expert_map[e] >= 0]
            pairs = [(exact(w13[e]), exact(w2[e])) for e in there]
            shares.append(reference.moe(x, pairs.__getitem__, weights, ids, expert_map, False))
        compare(f"rank {rank} experts M={m}", y, shares[rank])
        dist.all_reduce(y)
        compare(f"sum experts M={m}", y, rounded_sum(shares))
    check_all_reduce(rank)
    dist.destroy_process_group()
    print("equal")


if __name__ == "__main__":
    main(int(os.environ["RANK"]))
    sys.exit(0)
