"""The sum over ranks that is fused with the norm after it, on one GPU: each rank is a stream.

Two GPUs: `test_two_gpus.py`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from generators import assert_same_bits
from gpu_layers import HALF, NEEDS_GPU, rows_of_trouble
from torch import Tensor

from vllm_intscale import activations, all_reduce, jit, reference
from vllm_intscale.all_reduce import Inboxes
from vllm_intscale.row_kernels import norm_quantize


def on_gpu(test: Any) -> Any:
    for mark in NEEDS_GPU:
        test = mark(test)
    return test


EPSILON, MULTIPROCESSORS = 1e-5, 100  # at least


class Memory(NamedTuple):
    """Of all ranks, on one device; it must outlive their inboxes."""

    inboxes: Tensor
    addresses: Tensor
    turns: Tensor

    def are_empty(self) -> bool:
        return bool((self.inboxes == all_reduce.UNSENT).all())


def inboxes_of(ranks: int, columns: int, rows: int, device: str) -> tuple[list[Inboxes], Memory]:
    size = all_reduce.inbox_bytes(ranks, columns)
    memory = torch.full((ranks, size), all_reduce.UNSENT, dtype=torch.uint8, device=device)
    addresses = torch.tensor([row.data_ptr() for row in memory], device=device)
    turns = torch.zeros(ranks, all_reduce.MAX_ROWS, dtype=torch.int32, device=device)
    inboxes = [
        Inboxes(addresses.data_ptr(), turns[rank].data_ptr(), rank, ranks, columns, rows)
        for rank in range(ranks)
    ]
    return inboxes, Memory(memory, addresses, turns)


def inputs_of(seed: int, ranks: int, rows: int, columns: int, dtype: torch.dtype) -> list[Tensor]:
    """Two addends that all ranks have alike, and the part of each rank; NaNs of all bits, too."""
    generator = torch.Generator().manual_seed(seed)
    found = [torch.randn(rows, columns, generator=generator).to(dtype) for _ in range(2 + ranks)]
    trouble = rows_of_trouble(columns, dtype)[:rows]
    found[2 + seed % ranks][: len(trouble)] = trouble
    found[2].view(torch.int32)[-1, ::3] = -1  # what says that nothing has arrived
    return found


def expected(
    tensors: list[Tensor], number: int, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What `launch` gives every rank, with `number` addends besides the sum."""
    total = tensors[2].float()
    for part in tensors[3:]:
        total = total + part.float()
    reduced = total.to(weight.dtype)
    y, added = reference.rms_norm([*tensors[:number], reduced], weight, EPSILON)
    return *reference.quantize_activation(y), y, added, reduced


def prepare(streams: list[torch.cuda.Stream], rows: int, columns: int, dtype: torch.dtype) -> None:
    """Load and allocate, for each rank, what its launches need.

    Otherwise a kernel that waits for another rank keeps the host from it, and so from that rank:
    CUDA loads kernels when they are launched first, and both may wait for the whole GPU.
    """
    jit.load(all_reduce.kernel(dtype, columns), 0)
    x = torch.zeros(rows, columns, dtype=dtype, device="cuda")
    torch.cuda.synchronize()
    for stream in streams:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(1)
            _kept = [(norm_quantize([x], x[0], EPSILON, True, True), x.clone()) for _ in range(8)]
    torch.cuda.synchronize()


def check(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...], what: str) -> None:
    a8, *others = (t.cpu() for t in found)
    assert_same_bits(activations.unswizzle(a8, *wanted[0].shape), wanted[0], f"{what} a8")
    for name, a, b in zip(("scale", "norm", "sum", "reduced"), others, wanted[1:], strict=True):
        assert_same_bits(a, b, f"{what} {name}")


@on_gpu
@pytest.mark.parametrize("columns", [128, 520, 4096, 8192, 16384])
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("dtype", HALF)
def test_equals_reference(dtype: torch.dtype, ranks: int, columns: int) -> None:
    """One sum after the other, of changing sizes, by ranks that are not in step."""
    inboxes, memory = inboxes_of(ranks, columns, MULTIPROCESSORS, "cuda")
    weight = (torch.rand(columns) + 0.5).to(dtype)
    streams = [torch.cuda.Stream() for _ in range(ranks)]
    # A block of each rank, and one of its next sum, which starts early, must have room at once.
    sizes = [rows for rows in (1, 7, 32, 3, 16, 1, 1, 17) if 2 * ranks * rows <= MULTIPROCESSORS]
    cases = []
    for seed, rows in enumerate(sizes):
        tensors, number = inputs_of(seed, ranks, rows, columns, dtype), seed % 3
        cases.append((number, tensors, [t.cuda() for t in tensors]))
    own_weight = weight.cuda()
    prepare(streams, max(sizes), columns, dtype)
    found = []
    for turn, (number, _, tensors) in enumerate(cases):
        for rank in sorted(range(ranks), key=lambda r: (r + turn) % ranks):
            with torch.cuda.stream(streams[rank]):
                if turn % 2:  # the others start beside the one before
                    torch.cuda._sleep(1000 * (7 * turn + 11 * rank) % 9000)
                addends = [*tensors[:number], tensors[2 + rank]]
                found.append(
                    all_reduce.launch(inboxes[rank], addends, own_weight, EPSILON, True, True)
                )
    torch.cuda.synchronize()
    for i, (number, tensors, _) in enumerate(cases):
        wanted = expected(tensors, number, weight)
        for of_rank in found[i * ranks : (i + 1) * ranks]:
            check(of_rank, wanted, f"sum {i} of {tensors[0].shape[0]} rows")
    assert memory.are_empty()


@on_gpu
@pytest.mark.parametrize(
    ("columns", "dtype"), [(4096, torch.bfloat16), (16384, torch.float16)], ids=str
)
def test_replayed_graphs_equal_reference(columns: int, dtype: torch.dtype) -> None:
    """What one replay leaves in the inboxes is what the next one needs."""
    ranks, sizes = 2, (1, 16, 5)
    inboxes, _memory = inboxes_of(ranks, columns, MULTIPROCESSORS, "cuda")
    weight = (torch.rand(columns) + 0.5).to(dtype)
    own_weight = weight.cuda()
    cases = [inputs_of(rows, ranks, rows, columns, dtype) for rows in sizes]
    inputs = [[t.cuda() for t in tensors] for tensors in cases]
    graphs, streams, found = [], [torch.cuda.Stream() for _ in range(ranks)], []
    prepare(streams, max(sizes), columns, dtype)
    for rank in range(ranks):
        graphs.append(graph := torch.cuda.CUDAGraph())
        with torch.cuda.graph(graph, stream=streams[rank]):
            for tensors in inputs:
                addends = [tensors[0], tensors[2 + rank]]
                found.append(
                    all_reduce.launch(inboxes[rank], addends, own_weight, EPSILON, True, True)
                )
    for _ in range(5):
        for outputs in found:
            for t in outputs:
                t.view(torch.uint8).fill_(0x55)
        torch.cuda.synchronize()
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        torch.cuda.synchronize()
        for i, outputs in enumerate(found):
            wanted = expected(cases[i % len(sizes)], 1, weight)
            check(outputs, wanted, f"sum {i}")


def test_sizes_that_are_taken() -> None:
    small, wide = Inboxes(0, 0, 0, 2, 4096, 100), Inboxes(0, 0, 0, 4, 8192, 100)
    assert small.take(100) and not small.take(101)
    most = all_reduce.MAX_BYTES // (3 * 8192 * 2)
    assert wide.take(most) and not wide.take(most + 1)
