"""CUDA kernels against `reference`, bit for bit: `pytest -m gpu` on a machine with a GPU.

Outputs are poisoned: torch fills every fresh allocation with NaN or the largest integer while a
test runs, so an element that no thread wrote cannot pass. Experts: `test_expert_kernels`.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from generators import (
    CHANNELS,
    INPUTS,
    TOKENS,
    activation,
    assert_same_bits,
    extreme_weight,
    routing,
    weight,
)
from gpu_layers import (
    FAMILIES,
    FAMILIES_AND_GROUPS,
    HALF,
    NEEDS_GPU,
    arithmetic,
    bits_of,
    expert_stack,
    prepared,
    prepared_stack,
    rows_of_trouble,
    variants,
    weight_for,
)
from torch.library import opcheck

from vllm_intscale import activations, cuda_backend, jit, ops, reference
from vllm_intscale.reference import Weight

pytestmark = NEEDS_GPU


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
        if family.startswith("sm80") and (split or 1) > 1 and not tile.can_split(m, n):
            continue
        blocked = activations.swizzle(a8[:m])
        for dtype in (torch.int32, *HALF):
            part = None if dtype == torch.int32 else bias.to(dtype)
            y = cuda_backend.gemm(blocked, token_scale[:m], *ready, part, dtype, tile, split)
            assert_same_bits(y, expected[dtype][:m], f"M={m} N={n} K={k} {dtype} {tile} {split}")


@pytest.mark.parametrize(("family", "group_size"), FAMILIES_AND_GROUPS)
@pytest.mark.parametrize("k", INPUTS)
@pytest.mark.parametrize("n", CHANNELS)
def test_gemm_equals_reference(n: int, k: int, group_size: int, family: str) -> None:
    tokens = TOKENS if n * k <= 4096 * 4096 else (1, 16, 17, 65, 257, 4097)
    w = weight_for(family, n, k, group_size, device="cuda")
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
    w = weight_for(family, n, k, group_size, device="cuda")
    check_gemm(w, (1, 2, 17, 130), family)


@pytest.mark.parametrize("family", FAMILIES)
def test_gemm_gate_up_layer(family: str) -> None:
    w = weight_for(family, 28672, 4096, 128, device="cuda")
    check_gemm(w, (1, 17, 64, 300), family)


@pytest.mark.parametrize(("family", "group_size"), FAMILIES_AND_GROUPS)
@pytest.mark.parametrize("k", [128, 4096, 14336])
def test_gemm_at_the_accumulator_bound(k: int, group_size: int, family: str) -> None:
    w = extreme_weight(64, k, group_size, device="cuda")
    folded = family == "fold" or bits_of(family) == 8
    if folded:  # the int8 weights at +-127, which only K limits
        largest = 7 if family == "fold" else 127
        sign = torch.where(torch.arange(k, device="cuda") % 3 > 0, 1, -1).expand(64, -1)
        codes = sign * largest
        scale = w.group_scale.clamp(-8191, 8191)
        w = w._replace(codes=codes.to(torch.int8).contiguous(), group_scale=scale)
    a8 = torch.full((5, k), 127, dtype=torch.int8, device="cuda")
    a8[1] *= -1
    a8[2, ::2] *= -1
    a8[3] = 0
    token_scale = torch.ones(5, device="cuda")
    exact = arithmetic(w, family)
    acc = reference.accumulate(a8, exact.codes, exact.group_scale)
    assert int(acc.abs().max()) > 2**31 * 0.9 or k == 128 or folded
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
    w = weight(96, 256, 128, device="cuda", bits=bits_of(family), foldable=True)
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
        folded = family == "fold" or bits_of(family) == 8  # then small codes may round alike
        assert changed[:, n].all() or folded
        scale = w.group_scale.clone()
        scale[n, k // 128] += 40
        changed = run(w._replace(group_scale=scale), a8) != base
        assert changed[:, n].any() and int(changed.sum()) == int(changed[:, n].sum())
    a8b = a8.clone()
    a8b[7, 100] += 1
    changed = run(w, a8b) != base
    assert changed[7].any() and int(changed.sum()) == int(changed[7].sum())


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


@pytest.mark.parametrize("k", [32, 96, 520, 4096, 5120, 14336, 16384])
@pytest.mark.parametrize("dtype", HALF)
def test_norm_quantize_equals_reference(k: int, dtype: torch.dtype) -> None:
    x = torch.cat([rows_of_trouble(k, dtype), torch.randn(40, k).to(dtype)])
    weight, nothing = (torch.rand(k) + 0.5).to(dtype), x.new_empty(0)
    all_addends = [x, x.flip(0) * 0.5, x.roll(1, 0) * 0.25]
    for number, *kept in itertools.product((1, 2, 3), (False, True), (False, True)):
        addends = all_addends[:number]
        y, added = reference.rms_norm(addends, weight, 1e-5)
        a8, scale = reference.quantize_activation(y)
        inputs = [t.cuda() for t in addends], weight.cuda()
        found = [t.cpu() for t in ops.norm_quantize(*inputs, 1e-5, *kept)]
        assert_same_bits(activations.unswizzle(found[0], *x.shape), a8)
        assert_same_bits(found[1], scale)
        assert_same_bits(found[2], y if kept[0] else nothing)
        assert_same_bits(found[3], added if kept[1] else nothing)


@pytest.mark.parametrize("dtype", HALF)
def test_silu_mul_quantize_of_a_dense_layer(dtype: torch.dtype) -> None:
    for k in (96, 704, 14336):
        gate_up = torch.cat([rows_of_trouble(2 * k, dtype), torch.randn(700, 2 * k).to(dtype)])
        a8, scale = reference.quantize_activation(reference.silu_mul(gate_up))
        for view in (gate_up.cuda(), gate_up.cuda()[:1], gate_up.cuda()[::2]):
            step = 2 if 1 < len(view) < len(gate_up) else 1
            a8_gpu, scale_gpu = (t.cpu() for t in ops.silu_mul_quantize(view))
            rows = len(view)
            assert_same_bits(activations.unswizzle(a8_gpu, rows, k), a8[::step][:rows])
            assert_same_bits(scale_gpu, scale[::step][:rows])


@pytest.mark.parametrize(
    ("q_heads", "k_heads", "head_size"),
    [(32, 8, 128), (8, 1, 128), (4, 2, 64), (3, 1, 16), (5, 5, 96), (2, 2, 256), (1, 1, 80)],
)
@pytest.mark.parametrize("dtype", HALF)
def test_rotary_embedding_equals_reference(
    q_heads: int, k_heads: int, head_size: int, dtype: torch.dtype
) -> None:
    columns = (q_heads + 2 * k_heads) * head_size
    trouble = rows_of_trouble(columns, dtype)
    qkv = torch.cat([trouble, torch.randn(700, columns).to(dtype)])
    angles = torch.rand(1000, head_size // 2) * 7
    cache = torch.cat([angles.cos(), angles.sin()], dim=1).to(dtype)
    positions = torch.randint(0, 1000, (len(qkv),))
    for rows in (slice(0), slice(1), slice(0, 33), slice(0, None, 2), slice(None)):
        for view in (qkv.cuda()[rows], torch.nn.functional.pad(qkv[rows], (8, 24)).cuda()[:, 8:]):
            args = positions.cuda()[rows], cache.cuda(), q_heads, k_heads
            wanted = reference.rotary_embedding(qkv[rows], positions[rows], cache, q_heads, k_heads)
            for found, part in zip(ops.rotary_embedding(view, *args), wanted, strict=True):
                assert_same_bits(found.cpu(), part)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_linear_alone_equals_linear_in_a_batch(dtype: torch.dtype, family: str) -> None:
    w = weight_for(family, 1408, 512, 128, device="cuda")
    x = torch.cat([rows_of_trouble(512, dtype)] * 5).cuda()[:64]
    ready = prepared(w, family)

    def linear(x: torch.Tensor) -> torch.Tensor:
        return ops.gemm(*ops.quantize_activation(x), *ready, None, dtype)

    y = linear(x)
    assert_same_bits(y, reference.linear(x, arithmetic(w, family)))
    assert y[2:6].isnan().all() and not y[[0, 1, 6, 7, 8]].isnan().any()
    for i in range(64):
        assert_same_bits(linear(x[i : i + 1]), y[i : i + 1], f"row {i}")


def test_operators_pass_opcheck() -> None:
    w = prepared(weight(96, 128, 64, device="cuda"))
    x = torch.randn(5, 128, device="cuda", dtype=torch.bfloat16)
    a8, scale = ops.quantize_activation(x)
    stacks = [list(prepared_stack(expert_stack(4, n, 128, 128))) for n in (256, 128)]
    weights, ids = (t.cuda() for t in routing(5, 2, 4, "random"))
    opcheck(ops.quantize_activation, (x,))
    opcheck(ops.norm_quantize, ([x, x * 2, x + 1], x[0], 1e-5, True, True))
    opcheck(ops.silu_mul_quantize, (x,))
    positions = torch.arange(5, device="cuda")
    opcheck(ops.rotary_embedding, (x, positions, x[:, :32], 2, 1))
    opcheck(ops.gemm, (a8, scale, *w, None, torch.bfloat16))
    opcheck(ops.moe, (x, *stacks, weights, ids, None, False))


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
    w = prepared(weight_for(family, 1408, 4096, 128, device="cuda"), family)
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
        weights += [prepared_stack([w], family)[:2] for family in FAMILIES]
        for each in weights:
            cuda_backend.warm_up(each, dtype)  # side by side: minutes one by one, if none is cached
            for kernel in cuda_backend.kernels(each, dtype):
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
    """Four processes, one empty cache: all end well with one cache entry per compiled source."""
    code = (
        "import torch; from vllm_intscale import cuda_backend as b;"
        "w = [torch.ones(128, n, device='cuda', dtype=torch.int32) for n in (16, 1, 1)];"
        "w = b.prepare_weight(w[0], w[1].short(), w[2][:, 0].float());"
        "b.warm_up(w[:2], torch.bfloat16);"
        "print(len({(k.file, k.defines) for k in b.kernels(w[:2], torch.bfloat16)}))"
    )
    env = {**__import__("os").environ, "CUPY_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", code]
    ranks = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE) for _ in range(4)]
    counts = {rank.communicate(timeout=300)[0] for rank in ranks}
    assert [rank.returncode for rank in ranks] == [0] * 4
    assert counts == {f"{len(list(tmp_path.glob('*.cubin')))}\n".encode()}
