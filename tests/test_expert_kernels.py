"""CUDA kernels of experts against `reference`, bit for bit: see `test_kernels`."""

from __future__ import annotations

import itertools

import pytest
import torch
from generators import CHANNELS, INPUTS, activation, assert_same_bits, routing
from gpu_layers import (
    FAMILIES,
    FAMILIES_AND_GROUPS,
    HALF,
    HOPPER,
    NEEDS_GPU,
    arithmetic,
    expert_stack,
    grouped_variants,
    prepared_stack,
    rows_of_trouble,
)

from vllm_intscale import activations, cuda_backend, ops, reference, sm90_gemm
from vllm_intscale.routing import Routing, group_rows
from vllm_intscale.sm90_tiles import FORMS, INT8

pytestmark = NEEDS_GPU
ROUTINGS = ("random", "skewed", "one", "holes")
# The references of larger stacks do not fit into a GPU beside those of other processes.
STACKS = [(n, k) for n, k in itertools.product(CHANNELS, INPUTS) if n * k < 2**25]


@pytest.mark.parametrize("tile_m", [8, 64, 256])
@pytest.mark.parametrize("kind", ROUTINGS)
def test_group_rows(kind: str, tile_m: int) -> None:
    """Each local slot has a row of its own, inside a tile of its expert; groups are described."""
    expert_map = torch.tensor([3, -1, 0, 7, -1, 1, 2, 6], dtype=torch.int32)
    for (m, topk), mapping in itertools.product(
        ((1, 2), (3, 1), (33, 3), (5000, 2)), (None, expert_map)
    ):
        ids = routing(m, topk, 8, kind)[1]
        local = ids if mapping is None else torch.where(ids >= 0, mapping[ids.long()], -1)
        routes = group_rows(ids.cuda(), mapping if mapping is None else mapping.cuda(), 8, tile_m)
        row, count = routes.slot_row.cpu(), int(routes.tile_count)
        assert ((row >= 0) == (local >= 0)).all()
        owners = dict(zip(row[row >= 0].tolist(), local[row >= 0].tolist(), strict=True))
        assert len(owners) == int((row >= 0).sum()) and all(r < routes.rows for r in owners)
        tiles = routes.tiles[:count].tolist()
        in_tiles = {first + i: expert for expert, first, rows, _ in tiles for i in range(rows)}
        assert in_tiles == owners
        for i, (expert, first, rows, group) in enumerate(tiles):
            start, size = group >> 8, group & 255
            assert first % 8 == 0 and 0 < rows <= tile_m and 0 <= i - start < size <= 16
            assert all(tiles[j][0] == expert for j in range(start, start + size))


@pytest.mark.parametrize("dtype", HALF)
def test_quantize_slots_equals_reference(dtype: torch.dtype) -> None:
    x = rows_of_trouble(1416, dtype)
    ids = routing(x.shape[0], 3, 4, "holes")[1]
    routes = group_rows(ids.cuda(), None, 4, 16)
    a8, scale = cuda_backend.quantize_slots(x.cuda(), routes)
    expected, expected_scale = reference.quantize_activation(x)
    token, slot = (ids >= 0).nonzero(as_tuple=True)
    row = routes.slot_row.cpu()[token, slot].long()
    assert_same_bits(activations.unswizzle(a8, routes.rows, 1416).cpu()[row], expected[token])
    assert_same_bits(scale.cpu()[row], expected_scale[token])


@pytest.mark.parametrize("blocks", [None, *((1, 2, 4, 8) if HOPPER else ())])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_silu_mul_quantize_equals_reference(dtype: torch.dtype, blocks: int | None) -> None:
    """Rows of 704 and 1024 inner channels, and of 14336; blocks share a row as clusters."""
    gate_up = torch.cat([rows_of_trouble(1408, dtype) * 8, rows_of_trouble(1408, dtype)])
    wide = rows_of_trouble(28672, dtype)
    every_bfloat16 = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
    sweep = every_bfloat16.view(-1, 1024).to(dtype)
    for x in (gate_up, torch.cat([sweep, torch.ones_like(sweep)], dim=1), wide):
        a8, scale = reference.quantize_activation(reference.silu_mul(x))
        slot_row = torch.arange(x.shape[0], dtype=torch.int32, device="cuda")[:, None]
        one_to_one = Routing(slot_row, slot_row, slot_row, x.shape[0])  # only slots are read
        a8_gpu, scale_gpu = cuda_backend.silu_mul_quantize(x.cuda(), one_to_one, blocks)
        assert_same_bits(activations.unswizzle(a8_gpu, *a8.shape).cpu(), a8)
        assert_same_bits(scale_gpu.cpu(), scale)


def check_grouped_gemm(n: int, k: int, group_size: int, family: str) -> None:
    """Every slot of every routing, tile and output type against its expert's reference."""
    experts = expert_stack(4, n, k, group_size, family, device="cuda")
    stack = prepared_stack(experts, family)
    a8, token_scale = activation(1024, k, device="cuda")
    exact = [arithmetic(w, family) for w in experts]
    accs = [reference.accumulate(a8, w.codes, w.group_scale) for w in exact]
    expected = {torch.int32: torch.stack(accs)}
    for dtype in HALF:
        outputs = [
            reference.scale_output(acc, token_scale, w.channel_scale, None, dtype)
            for acc, w in zip(accs, exact, strict=True)
        ]
        expected[dtype] = torch.stack(outputs)
    for (m, topk), kind in itertools.product(
        ((1, 2), (3, 1), (16, 2), (33, 3), (129, 2), (1024, 2)), ROUTINGS
    ):
        ids = routing(m, topk, 4, kind)[1].cuda()
        used = ids >= 0
        token = torch.arange(m, device="cuda")[:, None].expand_as(ids)[used]
        for tile_m, same_m in itertools.groupby(
            grouped_variants(family, k, group_size), lambda variant: variant[0].m
        ):
            routes = group_rows(ids, None, 4, tile_m)
            row = routes.slot_row[used].long()
            grouped = torch.full((routes.rows, k), 77, dtype=torch.int8, device="cuda")
            scale = token_scale.new_full((routes.rows,), torch.nan)
            grouped[row], scale[row] = a8[token], token_scale[token]
            blocked = activations.swizzle(grouped)
            wanted = {dtype: every[ids.long()[used], token] for dtype, every in expected.items()}
            for (tile, splits), dtype in itertools.product(same_m, wanted):
                y = cuda_backend.grouped_gemm(blocked, scale, stack, routes, dtype, tile, splits)
                case = f"M={m} topk={topk} N={n} K={k} {kind} {dtype} {tile} splits {splits}"
                assert_same_bits(y[row], wanted[dtype], case)


@pytest.mark.parametrize(("family", "group_size"), FAMILIES_AND_GROUPS)
@pytest.mark.parametrize(("n", "k"), STACKS)
def test_grouped_gemm_equals_reference(n: int, k: int, group_size: int, family: str) -> None:
    check_grouped_gemm(n, k, group_size, family)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("n", "k", "group_size"), [(1, 64, 64), (96, 96, 32), (1408, 704, 64)])
def test_grouped_gemm_odd_shapes(n: int, k: int, group_size: int, family: str) -> None:
    check_grouped_gemm(n, k, group_size, family)


@pytest.mark.skipif(not HOPPER, reason="streams tiles on Hopper only")
@pytest.mark.parametrize("family", [*FORMS, INT8])
@pytest.mark.parametrize("multiprocessors", [2, 7, 16])
def test_streamed_tiles_of_experts(
    multiprocessors: int, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU so small that these tiles are waves, of which it streams all that are ragged."""
    monkeypatch.setattr(sm90_gemm, "multiprocessors_of", lambda _: multiprocessors)
    monkeypatch.setattr(sm90_gemm, "LEAST_IDLE", 0)
    for n, k, group_size in ((1408, 704, 64), (512, 2048, 128)):
        check_grouped_gemm(n, k, group_size, family)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ROUTINGS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_moe_equals_reference(kind: str, dtype: torch.dtype, family: str) -> None:
    hidden, inner, experts = 256, 704, 8
    w13 = expert_stack(experts, 2 * inner, hidden, 128, family)
    w2 = expert_stack(experts, hidden, inner, 64, family)
    stacks = prepared_stack(w13, family), prepared_stack(w2, family)
    exact = [(arithmetic(w13[e], family), arithmetic(w2[e], family)) for e in range(experts)]
    expert_map = torch.tensor([3, -1, 0, 7, -1, 1, 2, 6], dtype=torch.int32)
    plans = itertools.groupby(grouped_variants(family, 256, 64), lambda plan: plan[0].m)
    by_m = [list(same_m) for _, same_m in plans]
    for m, topk in ((0, 2), (1, 2), (1, 1), (5, 4), (33, 1), (64, 2), (300, 2)):
        x = torch.randn(m, hidden, generator=torch.Generator().manual_seed(m)).to(dtype)
        if m > 4:
            x[3, 7] = torch.nan
        weights, ids = routing(m, topk, experts, kind)
        on_input = topk == 1  # where vLLM allows it
        for mapping in (None, expert_map):
            y = reference.moe(x, exact.__getitem__, weights, ids, mapping, on_input)
            device_map = None if mapping is None else mapping.cuda()
            inputs = (x.cuda(), *stacks, weights.cuda(), ids.cuda(), device_map, on_input)
            for plan in (None, *((same_m[0], same_m[-1]) for same_m in by_m)):
                case = f"M={m} topk={topk} {kind} {plan}"
                assert_same_bits(cuda_backend.moe(*inputs, plans=plan).cpu(), y, case)


@pytest.mark.parametrize("family", FAMILIES)
def test_moe_row_alone_equals_row_in_a_batch(family: str) -> None:
    w13 = prepared_stack(expert_stack(8, 512, 384, 128, family), family)
    w2 = prepared_stack(expert_stack(8, 384, 256, 128, family), family)
    x = torch.randn(700, 384, device="cuda", dtype=torch.bfloat16)
    weights, ids = (t.cuda() for t in routing(700, 2, 8, "random"))
    y = ops.moe(x, list(w13), list(w2), weights, ids, None, False)
    for m in (1, 9, 64, 300):
        part = ops.moe(x[:m], list(w13), list(w2), weights[:m], ids[:m], None, False)
        assert_same_bits(part, y[:m], f"M={m}")


def test_moe_router_weight_on_input() -> None:
    w13, w2 = (expert_stack(4, n, 128, 128, FAMILIES[-1]) for n in (256, 128))
    x = torch.randn(9, 128, dtype=torch.bfloat16)
    weights, ids = routing(9, 1, 4, "random")
    exact = [[arithmetic(w, FAMILIES[-1]) for w in pair] for pair in zip(w13, w2, strict=True)]
    y = reference.moe(x, exact.__getitem__, weights, ids, None, True)
    stacks = (prepared_stack(w, FAMILIES[-1]) for w in (w13, w2))
    y_gpu = ops.moe(x.cuda(), *map(list, stacks), weights.cuda(), ids.cuda(), None, True)
    assert_same_bits(y_gpu.cpu(), y)
