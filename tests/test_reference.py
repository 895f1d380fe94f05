"""The reference against naive arithmetic written out in Python integers and float64, and the CPU
operators against the reference, bit for bit."""

from __future__ import annotations

import itertools
import math
import struct
from fractions import Fraction

import numpy as np
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
from torch.library import opcheck

from vllm_intscale import (
    activations,
    cuda_backend,
    ops,
    reference,
    sm80_gemm,
    sm90_gemm,
    sm90_tiles,
)
from vllm_intscale.errors import IntScaleError
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


def test_exp2_and_reciprocal_are_as_exact_as_they_say() -> None:
    x = torch.linspace(-100, 100, 1_000_001)
    exact = x.double().exp2()
    assert ((reference.exp2(x).double() - exact).abs() / exact).max() < 3e-6
    whole = torch.arange(-100.0, 101.0)
    assert torch.equal(reference.exp2(whole), whole.exp2())
    beyond = torch.tensor([-torch.inf, -101.0, 101.0, torch.inf])
    assert torch.equal(reference.exp2(beyond), torch.tensor([-100.0, -100.0, 100.0, 100.0]).exp2())
    x = 1 + exact.float()
    assert (reference.reciprocal(x).double() * x.double() - 1).abs().max() < 4e-6


def test_silu_mul_is_close_to_torch() -> None:
    gate_up = torch.randn(64, 512) * 8
    gate, up = gate_up.double().chunk(2, dim=1)
    exact = torch.nn.functional.silu(gate) * up
    error = (reference.silu_mul(gate_up).double() - exact).abs()
    assert (error <= exact.abs() * 2**-17).all()
    assert reference.silu_mul(torch.tensor([[torch.nan, 1.0]])).isnan().all()


def test_rotary_embedding_turns_complex_numbers() -> None:
    q_heads, k_heads, half, m = 3, 2, 8, 7
    qkv = torch.randn(m, (q_heads + k_heads) * 2 * half + 24)
    positions = torch.randint(0, 50, (m,))
    angles = torch.arange(50.0)[:, None] / 100.0 ** (torch.arange(half) / half)
    cache = torch.cat([angles.cos(), angles.sin()], dim=1)
    found = reference.rotary_embedding(qkv, positions, cache, q_heads, k_heads)
    turn = torch.polar(torch.ones(m, 1, half).double(), angles[positions, None].double())
    heads = qkv[:, : (q_heads + k_heads) * 2 * half].double().view(m, -1, 2, half)
    turned = torch.view_as_real(torch.complex(heads[:, :, 0], heads[:, :, 1]) * turn)
    exact = turned.movedim(3, 2).flatten(2).split([q_heads, k_heads], dim=1)
    for part, wanted in zip(found, exact, strict=True):
        assert torch.allclose(part.double(), wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("n", "k", "group_size"), [(17, 96, 32), (250, 704, 64), (96, 4096, 128)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cpu_gemm_equals_reference(
    n: int, k: int, group_size: int, bits: int, dtype: torch.dtype
) -> None:
    w = weight(n, k, group_size)
    if bits == 8:
        w = w._replace(codes=(w.codes.int() * 16 + 5).to(torch.int8), group_scale=w.group_scale % 9)
    ready = ops.prepare_weight(pack_codes(w.codes, bits), w.group_scale, w.channel_scale, bits)
    whole = w.codes.int() * w.group_scale.int().repeat_interleave(group_size, dim=1)
    assert_same_bits(ops.integer_weight(*ready[:2], n, k), whole)
    bias = torch.randn(n).to(dtype)
    for m in (0, 1, 2, 7, 33, 130):
        a8, token_scale = activation(m, k)
        acc = reference.accumulate(a8, w.codes, w.group_scale)
        y = ops.gemm(a8, token_scale, *ready, bias, dtype)
        expected = reference.scale_output(acc, token_scale, w.channel_scale, bias, dtype)
        assert_same_bits(y, expected, f"M={m}")
        assert_same_bits(ops.gemm(a8, token_scale, *ready, None, torch.int32), acc)


@pytest.mark.parametrize(("k", "group_size"), [(32, 32), (4096, 128), (14336, 64)])
def test_cpu_gemm_at_the_accumulator_bound(k: int, group_size: int) -> None:
    w = extreme_weight(8, k, group_size)
    a8 = torch.full((3, k), 127, dtype=torch.int8)
    a8[1] *= -1
    a8[2, ::2] *= -1
    ready = ops.prepare_weight(*packed(w))
    acc = ops.gemm(a8, torch.ones(3), *ready, None, torch.int32)
    assert_same_bits(acc, reference.accumulate(a8, w.codes, w.group_scale))


@pytest.mark.parametrize("kind", ["random", "skewed", "one", "holes"])
def test_cpu_moe_equals_reference(kind: str) -> None:
    w13 = [weight(192, 128, 64, seed=i) for i in range(6)]
    w2 = [weight(128, 96, 32, seed=i) for i in range(6)]
    stacks = []
    for experts in (w13, w2):
        stack = [torch.stack(t) for t in zip(*map(packed, experts), strict=True)]
        stacks.append(list(ops.prepare_weight(*stack)))
    expert_map = torch.tensor([3, -1, 0, -1, 1, 5], dtype=torch.int32)
    for m, topk in ((0, 2), (1, 1), (9, 3)):
        x = torch.randn(m, 128, dtype=torch.bfloat16)
        weights, ids = routing(m, topk, 6, kind)
        for mapping, on_input in ((None, topk == 1), (expert_map, False)):
            expected = reference.moe(x, lambda e: (w13[e], w2[e]), weights, ids, mapping, on_input)
            actual = ops.moe(x, *stacks, weights, ids, mapping, on_input)
            assert_same_bits(actual, expected, f"M={m} {kind}")


def test_operators_pass_opcheck() -> None:
    ready = ops.prepare_weight(*packed(weight(96, 128, 64)))
    x = torch.randn(5, 128, dtype=torch.bfloat16)
    a8, scale = ops.quantize_activation(x)
    column_major = torch.randn(128, 5).t()
    for rows in (x, column_major):
        opcheck(ops.quantize_activation, (rows,))
        opcheck(ops.silu_mul_quantize, (rows,))
        for number, *kept in itertools.product((1, 2), (False, True), (False, True)):
            args = [rows] * number, torch.ones(128, dtype=rows.dtype), 1e-5, *kept
            opcheck(ops.norm_quantize, args)
    opcheck(ops.rotary_embedding, (x, torch.arange(5), x[:, :32], 2, 1))
    opcheck(ops.gemm, (a8, scale, *ready, None, torch.bfloat16))
    weights, ids = routing(5, 1, 1, "random")
    square = packed(weight(256, 128, 64)), packed(weight(128, 128, 64))
    stacks = [[t[None] for t in ops.prepare_weight(*each)] for each in square]
    opcheck(ops.moe, (x, *stacks, weights, ids, None, False))


def test_fold_is_the_rational_number_rounded_half_to_even() -> None:
    """In Python's fractions, which round half to even, over channels made of ties."""
    w = weight(64, 96, 32, foldable=True)
    w.group_scale[::4, 0] = 254  # m = 127 * 2 * largest code: ties everywhere
    w.group_scale[1::4] %= 16
    folded = reference.fold(w)
    assert folded.group_scale.shape == (64, 1) and (folded.group_scale == 1).all()
    ties = 0
    for n in range(64):
        integers = (w.codes[n].int() * w.group_scale[n].int().repeat_interleave(32)).tolist()
        m = max(127, *map(abs, integers))
        exact = [Fraction(127 * i, m) for i in integers]
        ties += sum(x.denominator == 2 for x in exact)
        assert folded.codes[n].tolist() == [round(x) for x in exact]
        c = f32(f32(w.channel_scale[n].item() * f32(m)) / 127)
        assert folded.channel_scale[n].item() == c
        if m == 127:
            assert folded.codes[n].tolist() == integers
    assert ties > 100


@pytest.mark.parametrize(("n", "k", "group_size"), [(17, 96, 32), (250, 704, 64), (384, 1024, 128)])
@pytest.mark.parametrize("largest", [15, 127, 254, 255, 8191])
def test_hopper_layout_holds_the_fold_exactly(
    n: int, k: int, group_size: int, largest: int
) -> None:
    """What the kernel looks up, decoded from the fields by the kernel's own arithmetic."""
    w = weight(n, k, group_size, foldable=True)
    scale = (w.group_scale.int() * largest // 255).to(torch.int16)
    scale[:, 0] = largest
    w = w._replace(group_scale=scale)
    folded = reference.fold(w)
    blocks, unit, channel_scale = sm90_gemm.prepare_weight(*w, "fold")
    assert_same_bits(sm90_gemm.integer_weight(blocks, unit, n, k), folded.codes.int())
    assert_same_bits(channel_scale, folded.channel_scale)
    blocks, unit, channel_scale = sm90_gemm.prepare_weight(*w, "accumulate")
    whole = w.codes.int() * w.group_scale.int().repeat_interleave(group_size, dim=1)
    assert_same_bits(sm90_gemm.integer_weight(blocks, unit, n, k), whole)
    assert_same_bits(channel_scale, w.channel_scale)


@pytest.mark.parametrize(("n", "k"), [(17, 96), (250, 704), (1100, 128)])
def test_8_bit_layers_are_folded_when_they_are_loaded(n: int, k: int) -> None:
    """In the layouts of both kernels, which have nothing but int8 weights then."""
    w = weight(n, k, 32, bits=8)
    folded = reference.fold(w)
    for family, module in ((sm90_tiles.INT8, sm90_gemm), ("sm80_int8", sm80_gemm)):
        ready = cuda_backend.prepare_matrix(*packed(w, 8), family)
        assert_same_bits(module.integer_weight(*ready[:2], n, k), folded.codes.int())
        assert_same_bits(ready[2], folded.channel_scale)
        assert f"{sm90_tiles.INT8} form" in cuda_backend.describe(*ready[:2])


def test_every_tie_that_a_scale_of_eight_bits_can_make_is_folded_exactly() -> None:
    """Ties are where a product in float32 could round the wrong way: every S at every m up to
    8 * 255 that is a multiple of 127 or even, the only ones with a tie."""
    for code in range(1, 9):
        scale = torch.arange(1, 256, dtype=torch.int16)
        largest = code * scale.to(torch.int64)
        usable = largest >= 127
        scale, largest = scale[usable], largest[usable]
        every = torch.arange(1, 256, dtype=torch.int16).expand(len(scale), -1).clone()
        table = sm90_gemm.fold_table(every, largest)
        sm90_gemm._fold_fields(every, largest, table)  # asserts that each field is exact


def test_what_a_table_cannot_hold_is_not_folded() -> None:
    w = weight(64, 128, 64, foldable=True)
    assert sm90_gemm.foldable(w.codes, w.group_scale)
    w.group_scale[3, 1], w.codes[3, 70] = -1, -8
    assert not sm90_gemm.foldable(w.codes, w.group_scale)
    w.codes[3, 70] = -7
    assert sm90_gemm.foldable(w.codes, w.group_scale)
    w.group_scale[5, 0] = 8192
    assert not sm90_gemm.foldable(w.codes, w.group_scale)
    w.group_scale[5, 0] = 1023
    assert sm90_gemm.foldable(w.codes, w.group_scale)


def test_form_of_a_layer_on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:

    w = weight(64, 128, 64, foldable=True)
    negative = w.group_scale.clone()
    negative[0, 0], w.codes[0, 0] = -1, -8
    qweight = pack_codes(w.codes, 4)
    foldable, not_foldable = (qweight, w.group_scale.abs()), (qweight, negative)
    choose = cuda_backend._hopper_form
    assert choose([foldable, foldable]) == "fold"
    assert choose([foldable, not_foldable]) == "accumulate"
    monkeypatch.setenv("INTSCALE_FORM", "accumulate")
    assert choose([foldable]) == "accumulate"
    monkeypatch.setenv("INTSCALE_FORM", "fold")
    with pytest.raises(IntScaleError, match="unset it"):
        choose([not_foldable])
    monkeypatch.setenv("INTSCALE_FORM", "folded")
    with pytest.raises(IntScaleError, match="must be one of fold, accumulate"):
        choose([not_foldable])


def test_choice_of_tile_covers_every_shape() -> None:
    """Any shape gets a tile and a split that fit; the same on 132 multiprocessors as on 114."""
    for m, n, k, group_size, form, multiprocessors in itertools.product(
        (1, 9, 64, 65, 1000, 100_000),
        (1, 64, 1000, 152_064),
        (32, 128, 1408, 29_568),
        (32, 64, 128),
        (*sm90_tiles.FORMS, sm90_tiles.INT8),
        (114, 132),
    ):
        tile, splits = sm90_tiles.choose(m, n, k, group_size, form, multiprocessors)
        assert tile in sm90_tiles.tiles(form) and 0 <= splits <= -(-k // 128)
        assert tile.shared_bytes(group_size, form, max(1, splits)) <= sm90_tiles.SHARED_BYTES
        assert tile.stages_of(group_size, form) >= 2
        shape = m, n, -(-k // 128), group_size, form, 0, multiprocessors
        plan = sm90_gemm._plan(*shape, None, None, float_scale=False, grouped=False)
        clusters, rest = divmod(plan.grid[0], plan.cluster)
        tiles = -(-n // tile.n) * -(-m // tile.m)
        assert clusters and not rest and 0 <= plan.whole_tiles <= tiles
        assert (plan.whole_tiles < tiles) == (splits == sm90_tiles.STREAMED) == (plan.partials > 0)
        assert tile.warpgroups * plan.grid[0] * 4 <= activations.FLAG_BYTES or not plan.partials


def test_choice_of_grouped_tiles() -> None:
    """Stacks of any shapes and forms get tiles of as many tokens, and splits that fit."""
    for m, share, experts, n, k, form in itertools.product(
        (1, 9, 64, 1000, 8192),
        (1.0, 0.25, 1 / 16),
        (1, 64),
        (64, 28_672),
        (128, 14_336),
        sm90_tiles.FORMS,
    ):
        stacks = sm90_tiles.Matrix(n, k, 128, form), sm90_tiles.Matrix(k, n, 32, "fold")
        plans = sm90_tiles.choose_grouped(m, share, experts, stacks, 132)
        assert len({tile.m for tile, _ in plans}) == 1
        for (tile, splits), stack in zip(plans, stacks, strict=True):
            assert tile in sm90_tiles.grouped_tiles(stack.form)
            assert splits in tile.splits(stack.k, stack.group_size, stack.form)
            assert splits > 0 or (splits == sm90_tiles.STREAMED and tile.m > 8 and stack.k > 4096)


def test_portable_choice_of_tile_covers_every_shape() -> None:
    """On an A100, an L40S and an H100; and every tile can be launched on all of them."""
    chips = [sm80_gemm.Chip(108, 167_936), sm80_gemm.Chip(142, 102_400)]
    chips.append(sm80_gemm.Chip(132, 233_472))
    layouts = [sm80_gemm.Layout(4, group_size) for group_size in (32, 64, 128)]
    layouts.append(sm80_gemm.Layout(8, 128))
    for m, n, k, layout, chip in itertools.product(
        (1, 9, 64, 65, 1000, 100_000),
        (1, 64, 1000, 152_064),
        (32, 128, 1408, 29_568),
        layouts,
        chips,
    ):
        k_blocks = -(-k // sm80_gemm.BLOCK_K)
        tile, splits = sm80_gemm.choose(m, n, k_blocks, layout, chip)
        assert 1 <= splits <= k_blocks and (splits == 1 or tile.can_split(m, n))
        assert sm80_gemm.choose(m, n, k_blocks, layout, chip, (1,))[1] == 1
    limit = 99 * 1024  # of a block on sm_86, sm_89 and sm_120
    for tile, layout in itertools.product(sm80_gemm.TILES, layouts):
        assert tile.shared_bytes(layout) <= limit and tile.stages_of(layout) >= 2


def test_activations_without_flags_are_refused() -> None:
    """Blocks of the Hopper GEMM meet in memory behind the activations, which a copy lacks."""
    for a8 in (
        activations.swizzle(torch.ones(5, 96, dtype=torch.int8)),
        activations.new_activation(torch.empty(0), 9, 200),
    ):
        activations.check_flags(a8)
        with pytest.raises(IntScaleError, match="4096 bytes of flags"):
            activations.check_flags(a8.clone())


def test_rms_norm_is_rounded_as_ieee_754_wants() -> None:
    """NumPy's roots are; those of torch on CPU are off by one unit in 6 of 1000."""
    x = torch.randn(4000, 32, generator=torch.Generator().manual_seed(0))
    sums = np.zeros((4000, 4), dtype=np.float32)  # the other 28 add nothing
    for column in np.square(x.numpy()).reshape(4000, 4, 8).transpose(2, 0, 1):
        sums += column
    mean = ((sums[:, 0] + sums[:, 2]) + (sums[:, 1] + sums[:, 3])) / np.float32(32)
    inverse = np.float32(1) / np.sqrt(mean + np.float32(1e-5))
    y, added = reference.rms_norm([x], torch.ones(32), 1e-5)
    assert_same_bits(y, torch.from_numpy(x.numpy() * inverse[:, None]))
    assert added is x
