"""The kernels of `activation.cu` against `reference`, bit for bit, without a GPU: see `emulator`.

`test_kernels` and `test_expert_kernels` are the same on a GPU, and what counts.
"""

from __future__ import annotations

import ctypes
import itertools

import emulator
import pytest
import torch
from generators import assert_same_bits
from gpu_layers import rows_of_trouble
from torch import Tensor

from vllm_intscale import activations, reference
from vllm_intscale.row_kernels import float32_bits, row_kernel

pytestmark = pytest.mark.skipif(emulator.COMPILER is None, reason="needs g++")
HALF = (torch.bfloat16, torch.float16)
EPSILON = 1e-5
ENTRY = """
struct Arguments {
  const void *x0, *x1, *x2, *weight;
  const int* slots;
  int8_t* a8;
  float* token_scale;
  void *y, *sum;
  int64_t k, stride, rows_padded;
};
extern "C" const char* emulate(int what, int grid, int threads, int cluster, uint32_t epsilon,
                               const Arguments* a) {
  static std::string error;
  Machine machine = {grid, threads, cluster, 0};
  kernel = [=] {
    const auto halves = static_cast<const uint16_t*>(a->x0);
    const auto vectors = [](const void* p) { return static_cast<const uint4*>(p); };
    const auto out = [](void* p) { return static_cast<uint4*>(p); };
    if (what == 0)
      quantize_activation(halves, a->a8, a->token_scale, a->k, a->stride, a->rows_padded);
    if (what == 1)
      norm_quantize(vectors(a->x0), vectors(a->x1), vectors(a->x2), vectors(a->weight),
                    bits_as<float>(epsilon), a->a8, a->token_scale, out(a->y), out(a->sum), a->k,
                    a->rows_padded);
    if (what == 2)
      silu_mul_quantize(halves, a->slots, a->a8, a->token_scale, a->k, a->rows_padded);
  };
  error = run(machine);
  return error.c_str();
}
"""
QUANTIZE, NORM, SILU = 0, 1, 2


class Rows:
    """Poisoned outputs of as many rows, with raised flags behind the codes."""

    def __init__(self, rows: int, k: int) -> None:
        self.shape, padded = (rows, k), -(-rows // 8) * 8
        self.memory = torch.full((-(-k // 128) * padded * 128 + 4096,), 77, dtype=torch.int8)
        self.token_scale = torch.full((rows,), torch.nan)

    @property
    def a8(self) -> Tensor:
        padded = -(-self.shape[0] // 8) * 8
        return self.memory[:-4096].view(-1, padded, 128)

    def check(self, a8: Tensor, token_scale: Tensor, rows: slice | Tensor = slice(None)) -> None:
        """That these rows are right, with zeros up to the next 128 columns, and flags clear."""
        m, k = self.shape
        found = activations.unswizzle(self.a8, m, -(-k // 128) * 128)[rows]
        assert_same_bits(found[:, :k].contiguous(), a8, "codes")
        assert not found[:, k:].any(), "padding"
        assert_same_bits(self.token_scale[rows], token_scale, "scales")
        assert not self.memory[-4096:].any(), "flags"


def run(
    what: int,
    inputs: list[Tensor | None],
    out: Rows,
    grid: int,
    threads: int,
    cluster: int = 1,
    slots: Tensor | None = None,
    kept: list[Tensor | None] | None = None,
) -> None:
    x = inputs[0]
    assert x is not None
    pointers = [*inputs, *[None] * (4 - len(inputs)), slots, out.memory, out.token_scale]
    pointers += kept or [None, None]
    numbers = [0 if t is None else t.data_ptr() for t in pointers]
    numbers += [out.shape[1], x.stride(0), out.a8.shape[1]]
    kernel = row_kernel("norm_quantize", x.dtype)  # of all of them: `what` tells which runs
    error = emulator.compiled(kernel, ENTRY).emulate(
        *(what, grid, threads, cluster, float32_bits(EPSILON)),
        (ctypes.c_int64 * len(numbers))(*numbers),
    )
    assert not error, error.decode()


@pytest.mark.parametrize("k", [32, 96, 520, 1048])
@pytest.mark.parametrize("dtype", HALF)
def test_quantize_activation(k: int, dtype: torch.dtype) -> None:
    """With as many threads as hold a row, and with fewer."""
    x = rows_of_trouble(k, dtype)
    for threads in (32, 64):
        out = Rows(len(x), k)
        run(QUANTIZE, [x], out, len(x), threads)
        out.check(*reference.quantize_activation(x))


@pytest.mark.parametrize("k", [32, 96, 520, 4104])
@pytest.mark.parametrize("dtype", HALF)
def test_norm_quantize(k: int, dtype: torch.dtype) -> None:
    x = rows_of_trouble(k, dtype)
    x[0, :8] = -0.0
    weight = (torch.rand(k) + 0.5).to(dtype)
    all_addends = [x, x.flip(0) * 0.5, x.roll(1, 0) * 0.25]
    for number, *keep in itertools.product((1, 2, 3), (False, True), (False, True)):
        addends = all_addends[:number]
        y, added = reference.rms_norm(addends, weight, EPSILON)
        out, kept = Rows(len(x), k), [torch.full_like(x, torch.nan) for _ in keep]
        inputs = [*addends, *[None] * (3 - number), weight]
        run(
            *(NORM, inputs, out, len(x), reference.norm_threads(k)),
            kept=[t if wanted else None for t, wanted in zip(kept, keep, strict=True)],
        )
        out.check(*reference.quantize_activation(y))
        for found, wanted, is_kept in zip(kept, (y, added), keep, strict=True):
            assert_same_bits(found, wanted if is_kept else torch.full_like(x, torch.nan))


@pytest.mark.parametrize("blocks", [1, 2, 4, 8])
@pytest.mark.parametrize("dtype", HALF)
def test_silu_mul_quantize(dtype: torch.dtype, blocks: int) -> None:
    """With and without slots, some of which have no row; parts of a row may be empty."""
    for k in (32, 520, 4504):
        gate_up = rows_of_trouble(2 * k, dtype)
        a8, scale = reference.quantize_activation(reference.silu_mul(gate_up))
        m = len(gate_up)
        for slots in (None, torch.tensor([3, -1, 14, 0, -1, 2], dtype=torch.int32)):
            out, count = Rows(m, k), m if slots is None else len(slots)
            run(SILU, [gate_up], out, count * blocks, 256, blocks, slots)
            rows = torch.arange(m) if slots is None else slots[slots >= 0].long()
            out.check(a8[rows], scale[rows], rows)


def test_defects_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block that counts too few bytes reads maxima that have not come."""
    right = "barrier_expect(arrived, blocks_of_row() * kWarps * sizeof(uint32_t));"
    emulator.put_in_defect(monkeypatch, "activation.cu", right, right.replace("kWarps", "1"))
    with pytest.raises(AssertionError, match="bytes that no barrier expected"):
        test_silu_mul_quantize(torch.bfloat16, 4)
