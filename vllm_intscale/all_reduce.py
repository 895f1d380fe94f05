"""Sums over tensor-parallel ranks that the norm after them reads: `cuda/all_reduce.cu`.

Ranks write to each other's memory, where vLLM's own custom all-reduce does so, too; `connect` is
called by each of them when its model is loaded. What is too large is summed by vLLM.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vllm_intscale import jit, reference
from vllm_intscale.activations import new_activation
from vllm_intscale.errors import IntScaleError
from vllm_intscale.row_kernels import MAX_ADDENDS, aligned, dtype_code, float32_bits, norm_quantize

MAX_ROWS = 128  # kMaxRows of all_reduce.cu
MAX_RANKS = 8  # kMaxRanks
MAX_BYTES = 2 << 20  # that a rank sends; beyond it is time for all-reduces of two phases
UNSENT = 0xFF  # each byte of an inbox


class Inboxes(NamedTuple):
    """Of the ranks of a group, as one of them sees them.

    addresses: of int64 `[ranks]`, those of the inboxes; turns: of int32 `[MAX_ROWS]`, zeros.
    columns: those of the rows they take, a multiple of 8. rows: the most that they take at once, no
    more than multiprocessors of any rank's GPU, nor than MAX_ROWS.
    """

    addresses: int
    turns: int
    rank: int
    ranks: int
    columns: int
    rows: int

    def take(self, rows: int) -> bool:
        """Whether a sum of so many rows goes through them."""
        return rows <= self.rows and 2 * rows * self.columns * (self.ranks - 1) <= MAX_BYTES


_inboxes: dict[tuple[str, int], Inboxes] = {}  # by group and columns


def inbox_bytes(ranks: int, columns: int) -> int:
    """Of one of them, each of which is UNSENT to begin with."""
    return 2 * ranks * MAX_ROWS * columns * 2


def connect(name: str, group: Any, columns: int, dtype: torch.dtype, device: torch.device) -> None:
    """Exchange inboxes with the other ranks of a process group, which all call this.

    name: that of vLLM's group. group: for messages between their hosts, up to 8 on one machine.
    columns: of the rows. The memory is there as long as the process.
    """
    import torch.distributed as dist

    jit.load(kernel(dtype, columns), device.index)
    if (name, columns) in _inboxes:  # by another model of the same engine
        return
    runtime = jit.import_cupy().cuda.runtime
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    with torch.cuda.device(device):
        # Not torch's memory: an allocation is shared as a whole, and must outlive vLLM's sleep.
        size, turns_bytes = inbox_bytes(ranks, columns), 4 * MAX_ROWS
        own = runtime.malloc(size + turns_bytes + 8 * ranks)
        turns, addresses = own + size, own + size + turns_bytes
        runtime.memset(own, UNSENT, size)
        runtime.memset(turns, 0, turns_bytes)
        rows = torch.cuda.get_device_properties(device).multi_processor_count
        of_ranks: list[Any] = [None] * ranks
        dist.all_gather_object(of_ranks, (runtime.ipcGetMemHandle(own), rows), group)
        found = (ctypes.c_int64 * ranks)(
            *(
                own if i == rank else runtime.ipcOpenMemHandle(handle)
                for i, (handle, _) in enumerate(of_ranks)
            )
        )
        to_device = runtime.memcpyHostToDevice
        runtime.memcpy(addresses, ctypes.addressof(found), ctypes.sizeof(found), to_device)
        runtime.deviceSynchronize()
    rows = min(MAX_ROWS, *(rows for _, rows in of_ranks))
    _inboxes[name, columns] = Inboxes(addresses, turns, rank, ranks, columns, rows)
    dist.barrier(group)  # nobody sends before all are ready


@cache
def kernel(dtype: torch.dtype, columns: int) -> jit.Kernel:
    threads = reference.norm_threads(columns)
    defines = (("DTYPE", dtype_code(dtype)), ("THREADS", threads))
    return jit.Kernel("all_reduce.cu", "all_reduce_norm_quantize", defines)


def launch(
    inboxes: Inboxes,
    addends: list[Tensor],
    weight: Tensor,
    epsilon: float,
    keep_norm: bool,
    keep_sum: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`norm_quantize` of these addends, the last of which is this rank's part of a sum.

    Also gives that sum. All ranks must launch the same.
    """
    *others, partial = [aligned(addend).contiguous() for addend in addends]
    for other in (weight, *others):
        if other.dtype is not partial.dtype:
            raise IntScaleError(f"all-reduce of {partial.dtype} and {other.dtype}; convert one")
    (m, k), rows = partial.shape, weight[None]
    weight = aligned(rows)
    a8, token_scale = new_activation(partial, m, k), partial.new_empty(m, dtype=torch.float32)
    y, added = (partial.new_empty((m, k) if wanted else 0) for wanted in (keep_norm, keep_sum))
    reduced = torch.empty_like(partial)
    if m:
        unused = [None] * (MAX_ADDENDS - len(addends))
        outputs = (a8, token_scale, y if keep_norm else None, added if keep_sum else None, reduced)
        args = (
            *(*others, *unused, partial, inboxes.addresses, inboxes.turns, inboxes.rank),
            *(inboxes.ranks, inboxes.columns // 8, weight, float32_bits(epsilon)),
            *(*outputs, k, a8.shape[1]),
        )
        threads = reference.norm_threads(k)
        device = partial.device
        early = weight is rows  # as in norm_quantize
        jit.launch(kernel(partial.dtype, k), device, (m,), threads, args, overlap=early)
    return a8, token_scale, y, added, reduced


def all_reduce_norm_quantize(
    addends: list[Tensor],
    weight: Tensor,
    epsilon: float,
    keep_norm: bool,
    keep_sum: bool,
    group_name: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The operator on GPUs: fused where `Inboxes.take` it, otherwise vLLM's sum and then the norm.

    group_name: of vLLM's group of ranks, all of which call this with as many rows.
    """
    rows, columns = addends[-1].shape
    inboxes = _inboxes.get((group_name, columns))
    if inboxes and inboxes.take(rows):
        return launch(inboxes, addends, weight, epsilon, keep_norm, keep_sum)
    reduced = torch.ops.vllm.all_reduce(addends[-1], group_name)
    norm = norm_quantize([*addends[:-1], reduced], weight, epsilon, keep_norm, keep_sum)
    return *norm, reduced
