"""The pass that lets norms and activations quantize what they make, on graphs of their own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from generators import assert_same_bits
from torch import Tensor
from torch.fx import Graph, GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

pytest.importorskip("vllm")

from torch._inductor.decomposition import select_decomp_table
from torch._inductor.utils import fresh_cache
from vllm import ir
from vllm.config import CompilationMode, VllmConfig, set_current_vllm_config
from vllm.distributed import parallel_state
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding
from vllm.platforms import current_platform

from vllm_intscale import fusion, ops, reference, row_kernels
from vllm_intscale.errors import IntScaleError
from vllm_intscale.quantize import quantize_model

EXAMPLES = Path(__file__).parents[1] / "serving_examples"

EPSILON = 1e-5
NAMES = ("norm_quantize", "silu_mul_quantize", "quantize_activation", "rms_norm")


def fused(function: Callable[..., Any], *args: Tensor) -> tuple[GraphModule, dict[str, int]]:
    """The graph of a function as Inductor sees it, after the pass; how often it calls what."""
    with ir.enable_torch_wrap(True):
        traced = make_fx(function, select_decomp_table(), tracing_mode="symbolic")(*args)
    fusion.QuantizeWhereMade()(traced.graph)
    traced.graph.eliminate_dead_code()
    traced.graph.lint()
    traced.recompile()
    targets = [str(node.target) for node in traced.graph.nodes]
    return traced, {name: sum(name in target for target in targets) for name in NAMES}


def make(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def check(found: Any, wanted: Any) -> None:
    for i, (a, b) in enumerate(zip(found, wanted, strict=True)):
        assert_same_bits(a, b, f"output {i}")


def add_norm(x: Tensor, residual: Tensor, weight: Tensor) -> Any:
    return ir.ops.fused_add_rms_norm(x, residual, weight, EPSILON, None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_norm_of_a_sum(dtype: torch.dtype) -> None:
    x, residual, weight = (make(*s, dtype=dtype) for s in ((5, 264), (5, 264), (264,)))

    def layer(x: Tensor, residual: Tensor, weight: Tensor) -> Any:
        y, residual = add_norm(x, residual, weight)
        return *ops.quantize_activation(y), residual

    graph, counts = fused(layer, x, residual, weight)
    assert counts == {**dict.fromkeys(NAMES, 0), "norm_quantize": 1}
    y, added = reference.rms_norm([residual, x], weight, EPSILON)
    check(graph(x, residual, weight), (*reference.quantize_activation(y), added))


@pytest.mark.parametrize("first_is_quantized", [True, False])
def test_norms_of_one_sum(first_is_quantized: bool) -> None:
    """A sum is in float32 until it leaves the graph; what no more than two norms add up is."""
    start, *xs = (make(5, 264 + 8 * i)[:, :264] for i in range(5))
    weight = make(264)

    def layers(residual: Tensor, weight: Tensor, *xs: Tensor) -> Any:
        results = []
        for i, x in enumerate(xs):
            y, residual = add_norm(x, residual, weight)
            results += ops.quantize_activation(y) if i or first_is_quantized else [y]
        return *results, residual

    graph, counts = fused(layers, start, weight, *xs)
    assert counts["norm_quantize"] == 4 - (not first_is_quantized)
    kept = [n.args[-1] for n in graph.graph.nodes if n.target is ops.norm_quantize.default]
    assert kept == ([False] if first_is_quantized else []) + [True, False, True]
    wanted, residual = [], start
    for pair in (xs[:2], xs[2:]):
        for i in range(2):
            y, added = reference.rms_norm([residual, *pair[: i + 1]], weight, EPSILON)
            wanted += reference.quantize_activation(y)
        residual = added
    found = graph(start, weight, *xs)
    if not first_is_quantized:  # vLLM's own norm
        assert torch.allclose(found[0].float(), wanted.pop(0) * wanted.pop(0)[:, None], atol=0.05)
        found = found[1:]
    check(found, (*wanted, residual))


def test_sums_of_norms_that_stay() -> None:
    """Nothing but the last norm is quantized: it adds up three, not all five."""
    weight, *xs = make(128), *(make(3 + i, 128)[:3] for i in range(5))

    def layers(weight: Tensor, residual: Tensor, *xs: Tensor) -> Any:
        for x in xs:
            y, residual = add_norm(x, residual, weight)
        return *ops.quantize_activation(y), residual

    graph, counts = fused(layers, weight, *xs)
    assert counts["norm_quantize"] == 1
    stored = xs[0]
    for x in xs[1:3]:
        stored = add_norm(x, stored, weight)[1]
    y, added = reference.rms_norm([stored, *xs[3:]], weight, EPSILON)
    check(graph(weight, *xs), (*reference.quantize_activation(y), added))


def test_addend_that_is_quantized_later() -> None:
    """A norm's result is added up twice over before the graph quantizes it, too."""
    h, residual, x, weight = make(2, 128), make(3, 128)[:2], make(4, 128)[:2], make(128)

    def layers(h: Tensor, residual: Tensor, x: Tensor, weight: Tensor) -> Any:
        y = ir.ops.rms_norm(h, weight, EPSILON, None)
        z, residual = add_norm(y, residual, weight)
        quantized = *ops.quantize_activation(z), *ops.quantize_activation(y)
        last, _ = add_norm(x, residual, weight)
        return *quantized, *ops.quantize_activation(last)

    graph, counts = fused(layers, h, residual, x, weight)
    assert counts["norm_quantize"] == 3
    y, _ = reference.rms_norm([h], weight, EPSILON)
    norms = [[residual, y], [h], [residual, y, x]]
    rows = [reference.rms_norm(addends, weight, EPSILON)[0] for addends in norms]
    check(
        graph(h, residual, x, weight), [t for r in rows for t in reference.quantize_activation(r)]
    )


def test_sums_over_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two layers: each is made with the norm after it, and added to the residual of both."""
    start, *parts = (make(5, 264 + 8 * i)[:, :264] for i in range(4))
    weight = make(264)

    class Group:  # of two ranks with the same parts
        def _all_reduce_out_place(self, x: Tensor) -> Tensor:
            return x + x

    monkeypatch.setitem(parallel_state._groups, "ranks", Group)

    def layers(residual: Tensor, weight: Tensor, *parts: Tensor) -> Any:
        results: list[Tensor] = []
        for part in parts:
            x = torch.ops.vllm.all_reduce(part, group_name="ranks")
            y, residual = add_norm(x, residual, weight)
            results += ops.quantize_activation(y)
        return *results, residual

    graph, counts = fused(layers, start, weight, *parts)
    targets = [node.target for node in graph.graph.nodes]
    assert targets.count(ops.all_reduce_norm_quantize.default) == counts["norm_quantize"] == 3
    assert torch.ops.vllm.all_reduce.default not in targets
    wanted, addends = [], [start]
    for i, part in enumerate(parts):
        addends = [*addends, part + part]
        y, added = reference.rms_norm(addends, weight, EPSILON)
        wanted += reference.quantize_activation(y)
        addends = [added] if i == 1 else addends  # two norms add up no more
    check(graph(start, weight, *parts), (*wanted, added))


def test_sum_over_ranks_that_is_needed_before_its_norm() -> None:
    x, weight = make(5, 264), make(264)

    def layer(x: Tensor, weight: Tensor) -> Any:
        x = torch.ops.vllm.all_reduce(x, group_name="ranks")
        y = ops.quantize_activation(ir.ops.rms_norm(x * 2, weight, EPSILON, None))
        return *y, *ops.quantize_activation(ir.ops.rms_norm(x, weight, EPSILON, None))

    graph, counts = fused(layer, x, weight)
    assert counts["norm_quantize"] == 2
    targets = [node.target for node in graph.graph.nodes]
    assert targets.count(torch.ops.vllm.all_reduce.default) == 1


def test_sum_over_ranks_that_is_added_to_itself() -> None:
    x, weight = make(5, 264), make(264)

    def layer(x: Tensor, weight: Tensor) -> Any:
        x = torch.ops.vllm.all_reduce(x, group_name="ranks")
        y, _ = add_norm(x, x, weight)
        return ops.quantize_activation(y)

    graph, counts = fused(layer, x, weight)
    targets = [node.target for node in graph.graph.nodes]
    assert counts["norm_quantize"] == targets.count(torch.ops.vllm.all_reduce.default) == 1


def test_sums_are_those_of_a_compiled_graph() -> None:
    """Inductor, too, rounds a sum that goes from one norm to the next only where it is stored."""
    xs, weight = [make(64 + i, 256)[:64] for i in range(3)], make(256)

    @torch.compile(fullgraph=True)
    def unfused(first: Tensor, second: Tensor, third: Tensor, weight: Tensor) -> Any:
        y, residual = native(second, first, weight, EPSILON)
        a8, token_scale = ops.quantize_activation(y)  # no part of its kernels, as layers are
        return a8, token_scale, *native(third, residual, weight, EPSILON)

    native = ir.ops.fused_add_rms_norm.impls["native"].impl_fn
    *_, found, added = unfused(*xs, weight)
    y, wanted = reference.rms_norm(xs, weight, EPSILON)
    assert_same_bits(added, wanted)
    assert (found != y).float().mean() < 1e-3  # squares are added in another order
    rounded = (xs[0].float() + xs[1].float()).bfloat16()
    assert (reference.rms_norm([rounded, xs[2]], weight, EPSILON)[1] != wanted).float().mean() > 0.1


def test_norm_whose_result_others_need_too() -> None:
    """As a router does; and two layers that read the same norm."""
    x, weight = make(3, 128), make(128)

    def layer(x: Tensor, weight: Tensor) -> Any:
        y = ir.ops.rms_norm(x, weight, EPSILON, None)
        return *ops.quantize_activation(y), *ops.quantize_activation(y), y * 2

    graph, counts = fused(layer, x, weight)
    assert counts["norm_quantize"] == 1 and counts["quantize_activation"] == 0
    y, _ = reference.rms_norm([x], weight, EPSILON)
    quantized = reference.quantize_activation(y)
    check(graph(x, weight), (*quantized, *quantized, y * 2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_silu_mul(dtype: torch.dtype) -> None:
    gate_up = make(5, 2 * 136, dtype=dtype) * 4

    def layer(gate_up: Tensor) -> Any:
        gate, up = gate_up[..., :136], gate_up[..., 136:]
        return ops.quantize_activation(torch.nn.functional.silu(gate) * up)

    graph, counts = fused(layer, gate_up)
    assert counts == {**dict.fromkeys(NAMES, 0), "silu_mul_quantize": 1}
    check(graph(gate_up), reference.quantize_activation(reference.silu_mul(gate_up)))


def compiled(function: Callable[..., Any], *args: Tensor) -> tuple[Any, int]:
    """What a compiled function gives, with any number of rows, and how often it rotates."""
    counts: list[int] = []

    class Pass(fusion.QuantizeWhereMade):
        def __call__(self, graph: Graph) -> None:
            super().__call__(graph)
            targets = [node.target for node in graph.nodes]
            counts.append(targets.count(ops.rotary_embedding.default))

    for rows in args:
        if len(rows) == len(args[0]):
            torch._dynamo.maybe_mark_dynamic(rows, 0)
    options = {current_platform.pass_key: Pass()}
    with fresh_cache():
        results = torch.compile(function, fullgraph=True, options=options)(*args)
    (count,) = counts
    return results, count


def rotate(positions: Tensor, q: Tensor, k: Tensor, cache: Tensor, *, neox: bool = True) -> Any:
    head_size, rotated = 32, cache.shape[1]
    return RotaryEmbedding.forward_static(positions, q, k, head_size, rotated, cache, neox)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rotary_embeddings(dtype: torch.dtype) -> None:
    """Of two layers, in one keys come first; others use their angles, too."""
    qkv, other, cache = (make(*s, dtype=dtype) for s in ((5, 224), (5, 144), (50, 32)))
    positions = torch.tensor([3, 0, 49, 7, 7])

    def layers(positions: Tensor, qkv: Tensor, other: Tensor, cache: Tensor) -> Any:
        q, k, v = qkv.split([128, 64, 32], dim=-1)
        q, k = rotate(positions, q, k, cache)
        first, second, _ = other.split([96, 32, 16], dim=-1)
        second, first = rotate(positions, second, first, cache)
        heads = (t.view(len(t), -1, 32) for t in (q, k, first, second))
        return *heads, v, cache[positions] * 2

    found, count = compiled(layers, positions, qkv, other, cache)
    assert count == 2
    wanted = reference.rotary_embedding(qkv, positions, cache, 4, 2)
    wanted += reference.rotary_embedding(other, positions, cache, 3, 1)
    check(found, (*wanted, qkv[:, 192:], cache[positions] * 2))


def queries_alone(positions: Tensor, qkv: Tensor, cache: Tensor) -> Any:
    q, k, v = qkv.split([128, 64, 32], dim=-1)
    return rotate(positions, q, None, cache)[0], k, v


def half_of_a_head(positions: Tensor, qkv: Tensor, cache: Tensor) -> Any:
    q, k, _ = qkv.split([128, 64, 32], dim=-1)
    return rotate(positions, q, k, cache[:, :16])


def neighbours_are_pairs(positions: Tensor, qkv: Tensor, cache: Tensor) -> Any:
    q, k, _ = qkv.split([128, 64, 32], dim=-1)
    return rotate(positions, q, k, cache, neox=False)


def norms_of_heads(positions: Tensor, qkv: Tensor, cache: Tensor) -> Any:
    parts = qkv.split([128, 64, 32], dim=-1)[:2]
    q, k = (torch.nn.functional.rms_norm(t.view(5, -1, 32), (32,)).view(5, -1) for t in parts)
    return rotate(positions, q, k, cache)


def positions_of_this_graph(positions: Tensor, qkv: Tensor, cache: Tensor) -> Any:
    q, k, _ = qkv.split([128, 64, 32], dim=-1)
    return rotate(positions + 1, q, k, cache)


def angles_of_another_dtype(positions: Tensor, qkv: Tensor, cache: Tensor) -> Any:
    q, k, _ = qkv.float().split([128, 64, 32], dim=-1)
    return rotate(positions, q, k, cache)


def queries_and_values(positions: Tensor, qkv: Tensor, cache: Tensor) -> Any:
    q, _, v = qkv.split([128, 64, 32], dim=-1)
    return rotate(positions, q, v, cache)


def keys_and_values(positions: Tensor, qkv: Tensor, cache: Tensor) -> Any:
    _, k, v = qkv.split([128, 64, 32], dim=-1)
    return rotate(positions, k, v, cache)


@pytest.mark.parametrize(
    "layer",
    [
        *(queries_alone, half_of_a_head, neighbours_are_pairs, norms_of_heads, keys_and_values),
        *(positions_of_this_graph, angles_of_another_dtype, queries_and_values),
    ],
)
def test_rotary_embeddings_that_stay(layer: Callable[..., Any]) -> None:
    args = torch.arange(5), make(5, 224), make(50, 32)
    found, count = compiled(layer, *args)
    assert count == 0
    for result, wanted in zip(found, layer(*args), strict=True):
        assert torch.allclose(result.float(), wanted.float(), rtol=2**-6, atol=2**-6)


def other_variance(x: Tensor) -> Any:
    return ops.quantize_activation(ir.ops.rms_norm(x, x[0], EPSILON, 64))


def no_weight(x: Tensor) -> Any:
    return ops.quantize_activation(ir.ops.rms_norm(x, None, EPSILON, None))


def weight_of_another_dtype(x: Tensor) -> Any:
    return ops.quantize_activation(ir.ops.rms_norm(x, x[0].float(), EPSILON, None))


def residual_of_another_dtype(x: Tensor) -> Any:
    y, residual = add_norm(x, x.float(), x[0])
    return *ops.quantize_activation(y), residual


def halves_of_another_dtype(x: Tensor) -> Any:
    gate_up = x.float()
    gate, up = gate_up[..., :64], gate_up[..., 64:]
    return ops.quantize_activation(torch.nn.functional.silu(gate).bfloat16() * up.bfloat16())


def up_before_gate(x: Tensor) -> Any:
    return ops.quantize_activation(torch.nn.functional.silu(x[..., 64:]) * x[..., :64])


def other_parts(x: Tensor) -> Any:
    return ops.quantize_activation(torch.nn.functional.silu(x[..., :32]) * x[..., 32:64])


def product_needed(x: Tensor) -> Any:
    y = torch.nn.functional.silu(x[..., :64]) * x[..., 64:]
    return *ops.quantize_activation(y), y


@pytest.mark.parametrize(
    "layer",
    [
        *(other_variance, no_weight, weight_of_another_dtype, residual_of_another_dtype),
        *(up_before_gate, other_parts, product_needed, halves_of_another_dtype),
    ],
)
def test_what_is_left_as_it_is(layer: Callable[..., Any]) -> None:
    x = make(5, 128)
    graph, counts = fused(layer, x)
    assert counts["quantize_activation"] == 1
    assert counts["norm_quantize"] == counts["silu_mul_quantize"] == 0
    assert len(graph(x)) == len(layer(x))


def test_rms_norm_reference() -> None:
    """The exact norm of the exact sum, rounded once; and the same for a row alone."""
    for k in (8, 288, 4096, 5120, 14336):
        x, residual, weight = make(7, k), make(7, k) * 3, make(k)
        y, added = reference.rms_norm([x, residual], weight, EPSILON)
        assert torch.equal(added, (x.float() + residual.float()).bfloat16())
        exact = x.double() + residual.double()
        exact = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + EPSILON) * weight
        assert ((y.double() - exact).abs() <= (2**-8 + 1e-6) * exact.abs()).all()
        alone, _ = reference.rms_norm([x[3:4], residual[3:4]], weight, EPSILON)
        assert_same_bits(alone, y[3:4])


def test_addends_that_do_not_fit() -> None:
    x, weight = make(2, 8), make(8)
    for addends, of, error in (
        ([x] * 4, weight, "adds up 3 tensors at most: 4"),
        ([x, x.half()], weight, "norm_quantize of torch.bfloat16 and torch.float16; convert one"),
        ([x], weight.float(), "norm_quantize of torch.bfloat16 and torch.float32; convert one"),
    ):
        with pytest.raises(IntScaleError, match=error):
            row_kernels.norm_quantize(addends, of, EPSILON, False, False)


def test_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """INTSCALE_FUSE=0 adds no pass, 1 or nothing adds it, anything else is refused."""
    config = VllmConfig()
    passes = config.compilation_config.inductor_compile_config
    config.compilation_config.mode = CompilationMode.VLLM_COMPILE
    with set_current_vllm_config(config):
        for value, added in (("0", False), ("1", True)):
            monkeypatch.setenv("INTSCALE_FUSE", value)
            config.compilation_config.pass_config.fuse_allreduce_rms = True  # FlashInfer's
            monkeypatch.setattr(fusion, "_group_to_connect", lambda _: "group")
            fusion.install()
            assert config.compilation_config.pass_config.fuse_allreduce_rms != added
            found = passes.pop(current_platform.pass_key, None)
            assert isinstance(found, fusion.QuantizeWhereMade) == added
        monkeypatch.setenv("INTSCALE_FUSE", "yes")
        with pytest.raises(IntScaleError, match="INTSCALE_FUSE is 'yes'; it must be 0 or 1"):
            fusion.install()


@pytest.mark.e2e
@pytest.mark.timeout(420)
def test_perplexity_is_that_without_fusion(tmp_path: Path) -> None:
    """Within 0.02 %; both compiled, which rounds at other places. Norms are fused on GPUs only."""
    quantize_model(str(EXAMPLES / "tiny-llama"), tmp_path / "quantized")
    text = str(EXAMPLES / "tiny-llama-heldout.txt")
    command = ["-c", "from vllm_intscale.cli import main; main()", "eval"]
    command += [str(tmp_path / "quantized"), "--text", text, "--window", "256", "--limit", "40"]
    command += ["--dtype", "float16", "--compile", "--gpu-memory-utilization", "0.1"]
    found = {}
    for fuse in ("0", "1"):
        run = subprocess.run(
            [sys.executable, *command],
            env={**os.environ, "INTSCALE_FUSE": fuse},
            capture_output=True,
            text=True,
        )
        assert not run.returncode, run.stderr[-3000:]
        assert ("inputs of layers are quantized by" in run.stdout) == (fuse == "1")
        assert bool(re.search(r" [1-9]\d* rotary embeddings", run.stdout)) == (fuse == "1")
        found[fuse] = json.loads(run.stdout.splitlines()[-1])["perplexity"]
    print("perplexity without and with:", found)
    assert found["1"] != found["0"] and found["1"] == pytest.approx(found["0"], rel=2e-4)
