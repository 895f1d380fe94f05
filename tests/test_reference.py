"""The reference against naive arithmetic written out in Python integers and float64, and the CPU
operators against the reference, bit for bit."""

from __future__ import annotations

import itertools
import math
import struct

import pytest
import torch
from generators import (
    activation,
    assert_same_bits,
    extreme_weight,
    packed,
    routing,
    weight,
)

from vllm_intscale import ops, reference
from vllm_intscale.packing import pack_codes


def f32(x: float) -> float:
    """Round a float64 to float32."""
    try:
        return float(struct.unpack("f", struct.pack("f", x))[0])
    except OverflowError:
        return math.copysign(math.inf, x)


def test_accumulate_is_exact_integer_arithmetic() -> None:
    w = weight(6, 96, 32)
    a8, _ = activation(4, 96)
    acc = reference.accumulate(a8, w.codes, w.group_scale)
    for m, n in itertools.product(range(4), range(6)):
        total = 0
        for g in range(3):
            ks = range(32 * g, 32 * g + 32)
            total += int(w.group_scale[n, g]) * sum(int(a8[m, k]) * int(w.codes[n, k]) for k in ks)
        assert int(acc[m, n]) == total


def test_accumulate_reaches_the_bound_without_wrapping() -> None:
    w = extreme_weight(4, 14336, 128)
    a8 = torch.full((1, 14336), 127, dtype=torch.int8)
    w.group_scale.abs_()
    acc = reference.accumulate(a8, w.codes, w.group_scale)
    assert (acc == -127 * 8 * 14336 * int(w.group_scale[0, 0])).all()
    assert int(acc.min()) < -0.9 * 2**31


def test_quantize_activation_rounds_each_operation_once() -> None:
    x = torch.randn(50, 64) * 10 ** torch.linspace(-20, 20, 50)[:, None]
    a8, scale = reference.quantize_activation(x)
    for row in range(50):
        values = [float(v) for v in x[row]]
        amax = max(map(abs, values))
        inverse = f32(127 / amax)
        assert float(scale[row]) == f32(amax / 127)
        # Python's round is half to even; a float64 product of two float32 is exact
        assert a8[row].tolist() == [round(f32(v * inverse)) for v in values]


def test_quantize_activation_of_special_rows() -> None:
    x = torch.randn(7, 64)
    x[0] = 0
    x[1] = 2.0**-101
    x[2] = 2.0**-100
    x[3, 5] = torch.nan
    x[4, 6] = torch.inf
    x[5] = torch.finfo(torch.float32).max
    a8, scale = reference.quantize_activation(x)
    assert (a8[[0, 1, 3, 4]] == 0).all() and (scale[[0, 1]] == 0).all()
    assert scale[[3, 4]].isnan().all()
    assert (a8[[2, 5]] == 127).all() and (scale[[2, 5, 6]] > 0).all()
    assert int(a8.min()) >= -127
    y = reference.linear(x, weight(8, 64, 32))
    assert y[[3, 4]].isnan().all() and not y[[0, 1, 2, 6]].isnan().any()


def test_scale_output_rounds_each_operation_once() -> None:
    acc = torch.randint(-(2**31) + 1, 2**31 - 1, (20, 30), dtype=torch.int64).to(torch.int32)
    channel, token = torch.rand(30) * 1e-4, torch.rand(20)
    bias = torch.randn(30).to(torch.bfloat16)
    y = reference.scale_output(acc, token, channel, bias, torch.float32)
    for m, n in itertools.product(range(20), range(30)):
        product = f32(f32(f32(int(acc[m, n])) * float(channel[n])) * float(token[m]))
        assert float(y[m, n]) == f32(product + float(bias[n]))


def test_linear_is_close_to_the_float_product() -> None:
    """The arithmetic means what it should: W4A8 differs from float64 by the int8 rounding only."""
    w = weight(64, 1024, 128)
    x = torch.randn(16, 1024)
    groups = w.group_scale.double().repeat_interleave(128, dim=1)
    dense = w.codes.double() * groups * w.channel_scale.double()[:, None]
    exact = x.double() @ dense.T
    y = reference.linear(x, w).double()
    # each activation is off by at most half a step of amax / 127
    step = x.abs().amax(dim=1, keepdim=True).double() / 127
    assert ((y - exact).abs() <= 0.501 * step * dense.abs().sum(dim=1)).all()
    assert (y - exact).norm() / exact.norm() < 0.02


def test_exp_is_within_one_ulp() -> None:
    x = torch.linspace(-87, 88, 1_000_001)
    exact = x.double().exp()
    assert ((reference.exp(x).double() - exact).abs() / exact).max() < 2**-23
    assert reference.exp(torch.tensor(torch.nan)).isnan()


def test_silu_mul_is_close_to_torch() -> None:
    gate_up = torch.randn(64, 512) * 8
    gate, up = gate_up.double().chunk(2, dim=1)
    exact = torch.nn.functional.silu(gate) * up
    error = (reference.silu_mul(gate_up).double() - exact).abs()
    assert (error <= exact.abs() * 2**-21).all()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("n", "k", "group_size"), [(17, 96, 32), (250, 704, 64), (96, 4096, 128)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cpu_gemm_equals_reference(
    n: int, k: int, group_size: int, bits: int, dtype: torch.dtype
) -> None:
    w = weight(n, k, group_size)
    if bits == 8:
        w = w._replace(codes=(w.codes.int() * 16 + 5).to(torch.int8), group_scale=w.group_scale % 9)
    ready = ops.prepare_weight(pack_codes(w.codes, bits), w.group_scale, bits)
    whole = w.codes.int() * w.group_scale.int().repeat_interleave(group_size, dim=1)
    assert_same_bits(ops.integer_weight(*ready, n, k), whole)
    bias = torch.randn(n).to(dtype)
    for m in (0, 1, 2, 7, 33, 130):
        a8, token_scale = activation(m, k)
        acc = reference.accumulate(a8, w.codes, w.group_scale)
        y = ops.gemm(a8, token_scale, *ready, w.channel_scale, bias, dtype)
        expected = reference.scale_output(acc, token_scale, w.channel_scale, bias, dtype)
        assert_same_bits(y, expected, f"M={m}")
        assert_same_bits(ops.gemm(a8, token_scale, *ready, w.channel_scale, None, torch.int32), acc)


@pytest.mark.parametrize(("k", "group_size"), [(32, 32), (4096, 128), (14336, 64)])
def test_cpu_gemm_at_the_accumulator_bound(k: int, group_size: int) -> None:
    w = extreme_weight(8, k, group_size)
    a8 = torch.full((3, k), 127, dtype=torch.int8)
    a8[1] *= -1
    a8[2, ::2] *= -1
    qweight, group_scale, channel_scale = packed(w)
    ready = (*ops.prepare_weight(qweight, group_scale), channel_scale)
    acc = ops.gemm(a8, torch.ones(3), *ready, None, torch.int32)
    assert_same_bits(acc, reference.accumulate(a8, w.codes, w.group_scale))


@pytest.mark.parametrize("kind", ["random", "skewed", "one", "holes"])
def test_cpu_moe_equals_reference(kind: str) -> None:
    w13 = [weight(192, 128, 64, seed=i) for i in range(6)]
    w2 = [weight(128, 96, 32, seed=i) for i in range(6)]
    stacks = []
    for experts in (w13, w2):
        qweight, group_scale, channel_scale = (
            torch.stack(t) for t in zip(*map(packed, experts), strict=True)
        )
        stacks.append([*ops.prepare_weight(qweight, group_scale), channel_scale])
    expert_map = torch.tensor([3, -1, 0, -1, 1, 5], dtype=torch.int32)
    for m, topk in ((0, 2), (1, 1), (9, 3)):
        x = torch.randn(m, 128, dtype=torch.bfloat16)
        weights, ids = routing(m, topk, 6, kind)
        for mapping, on_input in ((None, topk == 1), (expert_map, False)):
            expected = reference.moe(x, lambda e: (w13[e], w2[e]), weights, ids, mapping, on_input)
            actual = ops.moe(x, *stacks, weights, ids, mapping, on_input)
            assert_same_bits(actual, expected, f"M={m} {kind}")


def test_operators_pass_opcheck() -> None:
    qweight, group_scale, channel_scale = packed(weight(96, 128, 64))
    ready = (*ops.prepare_weight(qweight, group_scale), channel_scale)
    x = torch.randn(5, 128, dtype=torch.bfloat16)
    a8, scale = ops.quantize_activation(x)
    torch.library.opcheck(ops.quantize_activation, (x,))
    torch.library.opcheck(ops.gemm, (a8, scale, *ready, None, torch.bfloat16))
    weights, ids = routing(5, 1, 1, "random")
    square = packed(weight(256, 128, 64)), packed(weight(128, 128, 64))
    stacks = [[t[None] for t in (*ops.prepare_weight(q, s), c)] for q, s, c in square]
    torch.library.opcheck(ops.moe, (x, *stacks, weights, ids, None, False))
