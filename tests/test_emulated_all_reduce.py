"""The sum over ranks with the norm after it, without a GPU: see `emulator`.

Ranks run side by side, and so do their kernels, until one waits for that before it; what they send
arrives word by word, some time. `test_all_reduce` and `test_two_gpus` are the same on GPUs, and
what counts.
"""

from __future__ import annotations

import ctypes

import emulator
import pytest
import torch
from generators import assert_same_bits
from test_all_reduce import EPSILON, expected, inboxes_of, inputs_of
from torch import Tensor

from vllm_intscale import activations, all_reduce
from vllm_intscale.row_kernels import float32_bits

pytestmark = pytest.mark.skipif(emulator.COMPILER is None, reason="needs g++")
BLOCKS = 3  # of a rank's kernel
ENTRY = f"""
struct Launch {{
  int64_t rows, rows_padded;
  const uint4 *x0, *x1, *partial;
  uint4 *const *inboxes;
  uint32_t* turns;
  const uint4* weight;
  int8_t* a8;
  float* token_scale;
  uint4 *y, *sum, *reduced;
}};
extern "C" const char* emulate(int ranks, int threads, uint32_t seed, const char* inboxes,
                               int64_t bytes, const Launch* launches, int sums, int64_t k,
                               uint32_t epsilon) {{
  static std::string error;
  Machine of_all = {{sums * ranks * {BLOCKS}, threads, 1, seed}};
  of_all.writable = {{{{inboxes, bytes}}}}, of_all.kernels = sums, of_all.ranks = ranks;
  kernel = [=] {{
    const Launch& l = launches[own_kernel()];
    if (int(blockIdx.x) >= l.rows) return;
    all_reduce_norm_quantize(l.x0, l.x1, l.partial, l.inboxes, l.turns, own_kernel() % ranks, ranks,
                             k / 8, l.weight, bits_as<float>(epsilon), l.a8, l.token_scale, l.y,
                             l.sum, l.reduced, k, l.rows_padded);
  }};
  error = run(of_all);
  return error.c_str();
}}
"""


def pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def run(ranks: int, columns: int, dtype: torch.dtype, sizes: tuple[int, ...], seed: int) -> None:
    """One sum after the other on all ranks. Raises AssertionError if anything is wrong."""
    kernel = all_reduce.kernel(dtype, columns)
    weight = (torch.rand(columns) + 0.5).to(dtype)
    inboxes, memory = inboxes_of(ranks, columns, BLOCKS, "cpu")
    cases, launches = [], []
    for i, rows in enumerate(sizes):
        tensors, number = inputs_of(seed + i, ranks, rows, columns, dtype), i % 3
        padded = -(-rows // 8) * 8
        for rank in range(ranks):
            a8 = torch.full((-(-columns // 128), padded, 128), 77, dtype=torch.int8)
            a8 = activations.swizzle(a8.transpose(0, 1).flatten(1))  # flags behind them
            scale = torch.full((rows,), torch.nan)
            kept = [torch.full((rows, columns), torch.nan, dtype=dtype) for _ in range(3)]
            cases.append((number, tensors, (a8, scale, *kept)))
            read: list[Tensor | None] = [None, None]
            read[:number] = tensors[:number]
            launches += [rows, padded, *map(pointer, (*read, tensors[2 + rank]))]
            launches += [inboxes[rank].addresses, inboxes[rank].turns]
            launches += map(pointer, (weight, a8, scale, *kept))
    error = emulator.compiled(kernel, ENTRY).emulate(
        *(ranks, dict(kernel.defines)["THREADS"], seed, ctypes.c_void_p(pointer(memory.inboxes))),
        *(
            ctypes.c_int64(memory.inboxes.nbytes),
            (ctypes.c_int64 * len(launches))(*launches),
            len(sizes),
        ),
        *(ctypes.c_int64(columns), float32_bits(EPSILON)),
    )
    assert not error, error.decode()
    for i, (number, tensors, (a8, *others)) in enumerate(cases):
        codes, *wanted = expected(tensors, number, weight)
        assert_same_bits(activations.unswizzle(a8, *codes.shape), codes, f"sum {i // ranks}")
        for a, b in zip(others, wanted, strict=True):
            assert_same_bits(a, b, f"sum {i // ranks}")
    assert memory.are_empty(), "an inbox is not empty"


SIZES, FINDINGS = (1, 3, 2, 2, 1, 3), "differ|deadlock|not empty"


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("columns", [96, 520, pytest.param(1032, marks=pytest.mark.slow)])
def test_equals_reference(ranks: int, columns: int) -> None:
    for dtype, seed in ((torch.bfloat16, 0), (torch.bfloat16, 1), (torch.float16, 2)):
        run(ranks, columns, dtype, SIZES, seed)


@pytest.mark.slow
def test_rows_of_as_many_threads_as_there_are() -> None:
    run(2, 16384, torch.bfloat16, (2, 1, 2), 0)


@pytest.mark.parametrize(
    ("right", "wrong", "finding"),
    [
        ("pair == kUnsent ? kOtherNaNs : pair", "pair", "deadlock"),
        ("turns[row] = turn ^ 1", "turns[row] = turn", FINDINGS),
        ("complete = complete && arrived(v[j]);", "", FINDINGS),
        ("make_unsent(from + j * blockDim.x);", "", "differ"),
        ("  wait_for_previous_kernel();\n  const uint32_t turn", "  const uint32_t turn", FINDINGS),
    ],
    ids=[
        *("sends its own signal", "one turn only", "does not wait", "does not clear"),
        "starts before the kernel before it has ended",
    ],
)
def test_defects_are_found(
    right: str, wrong: str, finding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    emulator.put_in_defect(monkeypatch, "all_reduce.cu", right, wrong)
    with pytest.raises(AssertionError, match=finding):
        for seed in range(20):
            run(2, 96, torch.bfloat16, SIZES, seed)
