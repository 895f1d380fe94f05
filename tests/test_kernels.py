"""CUDA kernels against `reference`, bit for bit: `pytest -m gpu` on a machine with a GPU.

Outputs are poisoned: torch fills every fresh allocation with NaN or the largest integer while a
test runs, so an element that no thread wrote cannot pass.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from generators import (
    CHANNELS,
    INPUTS,
    TOKENS,
    activation,
    assert_same_bits,
    extreme_weight,
    packed,
    routing,
    weight,
)

from vllm_intscale import (
    activations,
    cuda_backend,
    jit,
    ops,
    reference,
    sm80_gemm,
    sm90_gemm,
    sm90_tiles,
)
from vllm_intscale.reference import Weight
from vllm_intscale.routing import Routing, group_rows
from vllm_intscale.sm80_gemm import TILES
from vllm_intscale.sm90_tiles import FORMS, STREAMED

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

HALF = (torch.bfloat16, torch.float16)
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
# Of dense layers: the portable kernel, and both forms of the Hopper kernel.
FAMILIES = ("sm80", *(FORMS if HOPPER else ()))


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3, device="cuda").isnan().all()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # of processes side by side: they would wait for each other's
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


def prepared(w: Weight, family: str = "") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """In the layout of a kernel family, or of the one that the operator would choose."""
    if family in FORMS:
        return sm90_gemm.prepare_weight(*w, family)
    if family == "sm80":
        qweight, group_scale, channel_scale = packed(w)
        return *sm80_gemm.prepare_weight(qweight, group_scale), channel_scale
    return ops.prepare_weight(*packed(w))


def arithmetic(w: Weight, family: str) -> Weight:
    """What the family computes with."""
    return reference.fold(w) if family == "fold" else w


def variants(
    family: str, k: int, group_size: int, splits: tuple[int, ...] = (1, 2, 5, 8)
) -> list[tuple[Any, int | None]]:
    """Tiles of a family with splits of k, on Hopper each streamed, too; last, its own choice."""
    if family == "sm80":
        blocks = -(-k // sm80_gemm.BLOCK_K)
        return [*itertools.product(TILES, (s for s in splits if s <= blocks)), (None, None)]
    tiles = sm90_tiles.tiles(family)
    every = [
        (tile, s)
        for tile in tiles
        for s in tile.splits(k, group_size, family)
        if s in (STREAMED, *splits)
    ]
    return [*every, (None, None)]


def check_gemm(
    w: Weight, tokens: tuple[int, ...], family: str, splits: tuple[int, ...] = (1, 2, 5, 8)
) -> None:
    """Every token count, tile and output type against one reference of the largest token count.

    Rows of the reference do not depend on each other, so this is batch invariance too.
    """
    n, k = w.codes.shape
    a8, token_scale = activation(max(tokens), k, device="cuda")
    bias = torch.randn(n, device="cuda")
    exact = arithmetic(w, family)
    acc = reference.accumulate(a8, exact.codes, exact.group_scale)
    assert acc.any()
    expected = {torch.int32: acc}
    for dtype in HALF:
        part = bias.to(dtype)
        expected[dtype] = reference.scale_output(acc, token_scale, exact.channel_scale, part, dtype)
    ready = prepared(w, family)
    group_size = k // w.group_scale.shape[1]
    for m, (tile, split) in itertools.product(tokens, variants(family, k, group_size, splits)):
        if family == "sm80" and (split or 1) > 1 and not tile.can_split(m, n):
            continue
        blocked = activations.swizzle(a8[:m])
        for dtype in (torch.int32, *HALF):
            part = None if dtype == torch.int32 else bias.to(dtype)
            y = cuda_backend.gemm(blocked, token_scale[:m], *ready, part, dtype, tile, split)
            assert_same_bits(y, expected[dtype][:m], f"M={m} N={n} K={k} {dtype} {tile} {split}")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("k", INPUTS)
@pytest.mark.parametrize("n", CHANNELS)
def test_gemm_equals_reference(n: int, k: int, group_size: int, family: str) -> None:
    tokens = TOKENS if n * k <= 4096 * 4096 else (1, 16, 17, 65, 257, 4097)
    w = weight(n, k, group_size, device="cuda", foldable=family == "fold")
    check_gemm(w, tokens, family, (1, 5))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("n", "k", "group_size"),
    [
        *((8, 32, 32), (1, 64, 64), (17, 96, 32), (250, 160, 32), (1000, 704, 64)),
        *((4640, 512, 128), (192, 1152, 128)),
    ],
)
def test_gemm_odd_shapes(n: int, k: int, group_size: int, family: str) -> None:
    w = weight(n, k, group_size, device="cuda", foldable=family == "fold")
    check_gemm(w, (1, 2, 17, 130), family)


@pytest.mark.parametrize("family", FAMILIES)
def test_gemm_gate_up_layer(family: str) -> None:
    w = weight(28672, 4096, 128, device="cuda", foldable=family == "fold")
    check_gemm(w, (1, 17, 64, 300), family)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("k", [128, 4096, 14336])
def test_gemm_at_the_accumulator_bound(k: int, group_size: int, family: str) -> None:
    w = extreme_weight(64, k, group_size, device="cuda")
    if family == "fold":  # the int8 weights at +-127, which only K limits
        codes = torch.where(torch.arange(k, device="cuda") % 3 > 0, 7, -7).expand(64, -1)
        scale = w.group_scale.clamp(-8191, 8191)
        w = w._replace(codes=codes.to(torch.int8).contiguous(), group_scale=scale)
    a8 = torch.full((5, k), 127, dtype=torch.int8, device="cuda")
    a8[1] *= -1
    a8[2, ::2] *= -1
    a8[3] = 0
    token_scale = torch.ones(5, device="cuda")
    exact = arithmetic(w, family)
    acc = reference.accumulate(a8, exact.codes, exact.group_scale)
    assert int(acc.abs().max()) > 2**31 * 0.9 or k == 128 or family == "fold"
    every = variants(family, k, group_size)
    for (tile, split), dtype in itertools.product(every, (torch.int32, *HALF)):
        ready, blocked = prepared(w, family), activations.swizzle(a8)
        y = cuda_backend.gemm(blocked, token_scale, *ready, None, dtype, tile, split)
        if dtype == torch.int32:
            assert_same_bits(y, acc)
        else:
            y0 = reference.scale_output(acc, token_scale, exact.channel_scale, None, dtype)
            assert_same_bits(y, y0)


@pytest.mark.parametrize("family", FAMILIES)
def test_gemm_sees_every_input(family: str) -> None:
    """One changed code, scale or activation changes exactly the outputs it feeds."""
    w = weight(96, 256, 128, device="cuda", foldable=True)
    w.group_scale[w.group_scale == 0] = 1
    a8, token_scale = activation(40, 256, device="cuda")
    a8[a8 == 0] = 1

    def run(w: Weight, a8: torch.Tensor) -> torch.Tensor:
        blocked = activations.swizzle(a8)
        return cuda_backend.gemm(blocked, token_scale, *prepared(w, family), None, torch.int32)

    base = run(w, a8)
    for n, k in ((0, 0), (95, 255), (33, 130)):
        codes = w.codes.clone()
        codes[n, k] = 5 if codes[n, k] != 5 else -5
        changed = run(w._replace(codes=codes), a8) != base
        assert changed[:, n].any() and int(changed.sum()) == int(changed[:, n].sum())
        assert changed[:, n].all() or family == "fold"  # where small codes may round alike
        scale = w.group_scale.clone()
        scale[n, k // 128] += 40
        changed = run(w._replace(group_scale=scale), a8) != base
        assert changed[:, n].any() and int(changed.sum()) == int(changed[:, n].sum())
    a8b = a8.clone()
    a8b[7, 100] += 1
    changed = run(w, a8b) != base
    assert changed[7].any() and int(changed.sum()) == int(changed[7].sum())


def rows_of_trouble(k: int, dtype: torch.dtype) -> torch.Tensor:
    """Ordinary, zero, NaN, Inf, subnormal, tiny, huge and half-way rows."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(16, k, generator=rng)
    x[1] = 0
    x[2, k // 2] = torch.nan
    x[3, 1] = torch.inf
    x[4, k - 1] = -torch.inf
    x[5, 0], x[5, 1] = torch.inf, torch.nan
    x[6] *= 1e-41
    x[7] *= 2.0**-101
    x[8] = x[8].sign() * 2.0**-100
    x[9] *= 1e37
    x[10] = torch.arange(k) % 255 - 127.0
    x[11] = torch.arange(k) % 255 - 127.5
    x[12] *= 6e-5
    x[13] = torch.finfo(dtype).max
    x[14, 5] = torch.finfo(dtype).smallest_normal / 4
    return x.to(dtype)


@pytest.mark.parametrize("k", [32, 96, 512, 4096, 14336, 20480])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_quantize_activation_equals_reference(k: int, dtype: torch.dtype) -> None:
    x = rows_of_trouble(k, dtype)
    a8, scale = reference.quantize_activation(x)
    for view in (x.cuda(), torch.nn.functional.pad(x, (8, 24)).cuda()[:, 8 : 8 + k], x.cuda()[::2]):
        step = 2 if view.shape[0] < x.shape[0] else 1
        a8_gpu, scale_gpu = cuda_backend.quantize_activation(view)
        rows = view.shape[0]
        assert_same_bits(activations.unswizzle(a8_gpu, rows, k).cpu(), a8[::step])
        assert_same_bits(scale_gpu.cpu(), scale[::step])


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


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_linear_alone_equals_linear_in_a_batch(dtype: torch.dtype, family: str) -> None:
    w = weight(1408, 512, 128, device="cuda", foldable=family == "fold")
    x = torch.cat([rows_of_trouble(512, dtype)] * 5).cuda()[:64]
    ready = prepared(w, family)

    def linear(x: torch.Tensor) -> torch.Tensor:
        return ops.gemm(*ops.quantize_activation(x), *ready, None, dtype)

    y = linear(x)
    assert_same_bits(y, reference.linear(x, arithmetic(w, family)))
    assert y[2:6].isnan().all() and not y[[0, 1, 6, 7, 8]].isnan().any()
    for i in range(64):
        assert_same_bits(linear(x[i : i + 1]), y[i : i + 1], f"row {i}")


def expert_stack(
    e: int, n: int, k: int, group_size: int, family: str = "", device: str = "cpu"
) -> list[Weight]:
    foldable = family == "fold"
    return [weight(n, k, group_size, seed=i, device=device, foldable=foldable) for i in range(e)]


def prepared_stack(experts: list[Weight], family: str = "") -> tuple[torch.Tensor, ...]:
    """In the layout of a kernel family, or of the one that the operator would choose."""
    stacks = [torch.stack(t).cuda() for t in zip(*map(packed, experts), strict=True)]
    if family:
        return cuda_backend.prepare_stack(*stacks, family)
    return ops.prepare_weight(*stacks)


ROUTINGS = ("random", "skewed", "one", "holes")


def grouped_variants(family: str, k: int, group_size: int) -> list[tuple[Any, int]]:
    """Tiles of a family and splits of k."""
    if family == "sm80":
        return [(tile, 1) for tile in TILES]
    return [
        (tile, splits)
        for tile in sm90_tiles.grouped_tiles(family)
        for splits in (1, 2)
        if splits in tile.splits(k, group_size, family)
    ]


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


# The references of larger stacks do not fit into a GPU beside those of other processes.
STACKS = [(n, k) for n, k in itertools.product(CHANNELS, INPUTS) if n * k < 2**25]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize(("n", "k"), STACKS)
def test_grouped_gemm_equals_reference(n: int, k: int, group_size: int, family: str) -> None:
    check_grouped_gemm(n, k, group_size, family)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("n", "k", "group_size"), [(1, 64, 64), (96, 96, 32), (1408, 704, 64)])
def test_grouped_gemm_odd_shapes(n: int, k: int, group_size: int, family: str) -> None:
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
    for m, topk in ((0, 2), (1, 2), (5, 4), (64, 2), (300, 2)):
        x = torch.randn(m, hidden, generator=torch.Generator().manual_seed(m)).to(dtype)
        if m > 4:
            x[3, 7] = torch.nan
        weights, ids = routing(m, topk, experts, kind)
        for mapping, on_input in ((None, False), (expert_map, False), (None, topk == 1)):
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


def test_operators_pass_opcheck() -> None:
    w = prepared(weight(96, 128, 64, device="cuda"))
    x = torch.randn(5, 128, device="cuda", dtype=torch.bfloat16)
    a8, scale = ops.quantize_activation(x)
    stacks = [list(prepared_stack(expert_stack(4, n, 128, 128))) for n in (256, 128)]
    weights, ids = (t.cuda() for t in routing(5, 2, 4, "random"))
    torch.library.opcheck(ops.quantize_activation, (x,))
    torch.library.opcheck(ops.gemm, (a8, scale, *w, None, torch.bfloat16))
    torch.library.opcheck(ops.moe, (x, *stacks, weights, ids, None, False))


def test_graph_replay_and_side_stream_equal_eager() -> None:
    w = prepared(weight(512, 512, 128, device="cuda"))
    stacks = [list(prepared_stack(expert_stack(4, n, k, 128))) for n, k in ((256, 512), (512, 128))]
    weights, ids = (t.cuda() for t in routing(33, 2, 4, "random"))
    x = torch.randn(33, 512, device="cuda", dtype=torch.bfloat16)

    def layer() -> torch.Tensor:
        y = ops.gemm(*ops.quantize_activation(x), *w, None, x.dtype)
        return ops.moe(y, *stacks, weights, ids, None, False)

    first = layer()
    loads = jit.load.cache_info().misses
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        assert_same_bits(layer(), first)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer()
    for seed in range(3):
        x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        torch.cuda.synchronize()
        assert_same_bits(y, layer())
    assert jit.load.cache_info().misses == loads


def test_no_compile_inside_capture() -> None:
    kernel = jit.Kernel("activation.cu", "weighted_sum", (("DTYPE", 0), ("UNSEEN", 1)))
    with pytest.raises(jit.IntScaleError, match="before graph capture"):  # noqa: SIM117
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            jit.load(kernel, 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_reruns_give_the_same_bits(family: str) -> None:
    w = prepared(weight(1408, 4096, 128, device="cuda", foldable=True), family)
    a8, scale = activation(129, 4096, device="cuda")
    a8 = activations.swizzle(a8)
    for tile, split in variants(family, 4096, 128):
        first = cuda_backend.gemm(a8, scale, *w, None, torch.int32, tile, split)
        for _ in range(100):
            again = cuda_backend.gemm(a8, scale, *w, None, torch.int32, tile, split)
            assert_same_bits(again, first)


def test_no_variant_uses_local_memory() -> None:
    for dtype, group_size in itertools.product(HALF, (32, 64, 128)):
        w = weight(128, 128, group_size, device="cuda", foldable=True)
        weights = [prepared(w, family)[:2] for family in FAMILIES]
        weights.append(prepared_stack([w])[:2])
        for kernel in itertools.chain(*(cuda_backend.kernels(each, dtype) for each in weights)):
            assert jit.load(kernel, 0).attributes["local_size_bytes"] == 0, str(kernel)


def test_overlapping_launches_keep_their_order() -> None:
    """Chains of layers, each reading what the one before wrote, over and over in one buffer."""
    w = prepared(weight(512, 512, 128, device="cuda", foldable=True))
    x = torch.randn(64, 512, device="cuda", dtype=torch.bfloat16)

    def chain(synchronize: bool) -> torch.Tensor:
        a8, scale = ops.quantize_activation(x)
        for _ in range(200):
            y = ops.gemm(a8, scale, *w, None, torch.bfloat16)
            y = y / y.abs().amax().clamp(min=1)
            a8_new, scale_new = ops.quantize_activation(y)
            a8.copy_(a8_new)
            scale.copy_(scale_new)
            if synchronize:
                torch.cuda.synchronize()
        return ops.gemm(a8, scale, *w, None, torch.bfloat16)

    assert_same_bits(chain(False), chain(True))


def test_ranks_on_a_cold_cache_compile_once(tmp_path: Path) -> None:
    """Four processes, one empty cache: all end well with one cache entry per kernel."""
    code = (
        "import torch; from vllm_intscale import cuda_backend as b;"
        "w = [torch.ones(128, n, device='cuda', dtype=torch.int32) for n in (16, 1, 1)];"
        "w = b.prepare_weight(w[0], w[1].short(), w[2][:, 0].float());"
        "b.warm_up(w[:2], torch.bfloat16); print(len(b.kernels(w[:2], torch.bfloat16)))"
    )
    env = {**__import__("os").environ, "CUPY_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", code]
    ranks = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE) for _ in range(4)]
    counts = {rank.communicate(timeout=300)[0] for rank in ranks}
    assert [rank.returncode for rank in ranks] == [0] * 4
    assert counts == {f"{len(list(tmp_path.glob('*.cubin')))}\n".encode()}
