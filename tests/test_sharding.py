"""Loading and tensor parallelism, in one process and without an engine.

vLLM's own layers are built as one rank of several would build them: the functions that tell a
layer its rank are replaced, everything else is real. What arrives in the parameters is compared
with slices written down here.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import IGNORE, quantize_tensor
from reference_model import Experts, Linear, weight_of
from safetensors.torch import load_file
from torch import Tensor

pytest.importorskip("vllm")

from vllm.config import LoadConfig, ParallelConfig, VllmConfig, set_current_vllm_config
from vllm.distributed import parallel_state
from vllm.model_executor import parameter
from vllm.model_executor.layers import linear
from vllm.model_executor.layers.fused_moe import FusedMoEFactory, RoutedExperts
from vllm.model_executor.layers.fused_moe import config as moe_config

from vllm_intscale.errors import IntScaleError
from vllm_intscale.format import TENSOR_NAMES, CheckpointConfig, LayerScheme
from vllm_intscale.plugin import IntScaleConfig
from vllm_intscale.reference import Weight

HIDDEN, HEAD = 256, 64
PREFIX = "model.layers.0"
Tensors = dict[str, Tensor]


@pytest.fixture(scope="module", autouse=True)
def one_process_world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store = tmp_path_factory.mktemp("world") / "store"
    with set_current_vllm_config(VllmConfig()):
        parallel_state.init_distributed_environment(1, 0, f"file://{store}", 0, "gloo")
        parallel_state.initialize_model_parallel()
        yield
    parallel_state.cleanup_dist_env_and_memory()


@contextmanager
def rank_of(rank: int, ranks: int, expert_parallel: bool = False) -> Iterator[None]:
    """Layers built inside belong to this tensor-parallel rank."""
    config = VllmConfig(parallel_config=ParallelConfig(enable_expert_parallel=expert_parallel))
    with pytest.MonkeyPatch.context() as patch, set_current_vllm_config(config):
        for module in (linear, parameter, moe_config):
            for name, value in (("rank", rank), ("world_size", ranks)):
                function = f"get_tensor_model_parallel_{name}"
                patch.setattr(module, function, lambda value=value: value, raising=False)
        yield


def config_of(**settings: Any) -> IntScaleConfig:
    config = IntScaleConfig(CheckpointConfig(**settings))
    config.packed_modules_mapping = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }
    return config


def quantized(n: int, k: int, seed: int, bits: int = 4) -> Tensors:
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(seed))
    return quantize_tensor(weight, LayerScheme(bits=bits))


def as_weight(tensors: Tensors) -> Weight:
    return weight_of({f"layer.{name}": tensor for name, tensor in tensors.items()}, "layer")


def load(layer: Any, tensors: Tensors, *shard: Any) -> None:
    for name, tensor in tensors.items():
        param = getattr(layer, name)
        param.weight_loader(param, tensor, *shard)


def assert_loaded(layer: Any, parts: list[Tensors], rows: Callable[[Tensor, int], Tensor]) -> None:
    """Each parameter equals the concatenation of the rows of its parts."""
    for name in TENSOR_NAMES:
        wanted = torch.cat([rows(part[name], i) for i, part in enumerate(parts)])
        assert torch.equal(getattr(layer, name).data, wanted), name


def outputs(layer: Any, x: Tensor) -> Tensor:
    layer.quant_method.process_weights_after_loading(layer)
    return layer.quant_method.apply(layer, x)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_qkv_with_replicated_kv_heads(ranks: int) -> None:
    heads, kv_heads = 8, 2  # at 4 ranks each kv head lives on two
    parts = [
        quantized(n * HEAD, HIDDEN, seed) for seed, n in enumerate((heads, kv_heads, kv_heads))
    ]
    for rank in range(ranks):
        with rank_of(rank, ranks):
            layer = linear.QKVParallelLinear(
                HIDDEN,
                HEAD,
                heads,
                kv_heads,
                bias=False,
                params_dtype=torch.float32,
                quant_config=config_of(),
                prefix=f"{PREFIX}.self_attn.qkv_proj",
            )
        for part, shard in zip(parts, "qkv", strict=True):
            load(layer, part, shard)

        def rows(tensor: Tensor, part: int, rank: int = rank) -> Tensor:
            if part == 0:
                return tensor.chunk(ranks)[rank]
            return tensor.chunk(min(ranks, kv_heads))[rank * min(ranks, kv_heads) // ranks]

        assert_loaded(layer, parts, rows)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_merged_columns(ranks: int) -> None:
    parts = [quantized(384, HIDDEN, seed) for seed in range(2)]
    x = torch.randn(5, HIDDEN)
    for rank in range(ranks):
        with rank_of(rank, ranks):
            layer = linear.MergedColumnParallelLinear(
                HIDDEN,
                [384, 384],
                bias=False,
                params_dtype=torch.float32,
                quant_config=config_of(),
                prefix=f"{PREFIX}.mlp.gate_up_proj",
            )
        for shard, part in enumerate(parts):
            load(layer, part, shard)
        assert_loaded(layer, parts, lambda t, _, rank=rank: t.chunk(ranks)[rank])
        whole = [Linear(as_weight(part), None, 1)(x) for part in parts]
        wanted = torch.cat([y.chunk(ranks, dim=1)[rank] for y in whole], dim=1)
        assert torch.equal(outputs(layer, x), wanted)


# 768 / 2 keeps groups of 128; 384 / 2 = 192 needs groups of 64; 384 / 4 = 96 groups of 32.
@pytest.mark.parametrize(("k", "ranks", "group_size"), [(768, 2, 128), (384, 2, 64), (384, 4, 32)])
def test_rows_split_groups(k: int, ranks: int, group_size: int) -> None:
    whole = quantized(HIDDEN, k, 0)
    x = torch.randn(5, k)
    total = torch.zeros(5, HIDDEN)
    for rank in range(ranks):
        with rank_of(rank, ranks):
            layer = linear.RowParallelLinear(
                k,
                HIDDEN,
                bias=False,
                params_dtype=torch.float32,
                quant_config=config_of(),
                prefix=f"{PREFIX}.mlp.down_proj",
            )
        load(layer, whole)
        assert torch.equal(layer.qweight.data, whole["qweight"].chunk(ranks, dim=1)[rank])
        finer = whole["group_scale"].repeat_interleave(128 // group_size, dim=1)
        assert torch.equal(layer.group_scale.data, finer.chunk(ranks, dim=1)[rank])
        assert torch.equal(layer.channel_scale.data, whole["channel_scale"])
        total += outputs(layer, x.chunk(ranks, dim=1)[rank])
    assert torch.equal(total, Linear(as_weight(whole), None, ranks)(x))


def test_impossible_split_names_layer_values_and_remedy() -> None:
    with rank_of(0, 8), pytest.raises(IntScaleError) as error:
        linear.RowParallelLinear(
            384, HIDDEN, quant_config=config_of(), prefix=f"{PREFIX}.mlp.down_proj"
        )
    assert str(error.value) == (
        "model.layers.0.mlp.down_proj: K = 384 over 8 tensor-parallel ranks gives 48 input "
        "channels each, not a multiple of 32; use --tensor-parallel-size 6"
    )


def test_group_size_that_does_not_divide_k() -> None:
    with rank_of(0, 1), pytest.raises(IntScaleError, match=r"mlp\.up_proj: K = 192 .* 128"):
        linear.ColumnParallelLinear(
            192, HIDDEN, quant_config=config_of(), prefix=f"{PREFIX}.mlp.up_proj"
        )


def replicated(config: IntScaleConfig, prefix: str = "lin", k: int = HIDDEN) -> Any:
    with rank_of(0, 1):
        return linear.ReplicatedLinear(
            k, HIDDEN, bias=False, params_dtype=torch.float32, quant_config=config, prefix=prefix
        )


def test_8_bit_layer_runs_on_cpu_and_is_refused_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = quantized(HIDDEN, HIDDEN, 0, bits=8)
    layer = replicated(config_of(overrides={"lin": {"bits": 8}}))
    load(layer, tensors)
    x = torch.randn(3, HIDDEN)
    y = outputs(layer, x)
    dense = layer.quant_method.dequantize_weight(layer)
    assert (y - x @ dense.T).abs().max() < 0.02 * y.abs().max()

    from vllm_intscale import loading

    monkeypatch.setattr(loading.current_platform, "is_cpu", lambda: False)
    monkeypatch.setattr(loading.current_platform, "is_cuda", lambda: True)
    with pytest.raises(IntScaleError, match="lin: 8-bit weights run on CPU only; quantize again"):
        replicated(config_of(bits=8))


def test_dummy_weights_are_refused() -> None:
    config = VllmConfig(load_config=LoadConfig(load_format="dummy"))
    with set_current_vllm_config(config), pytest.raises(IntScaleError, match="lin: --load-format"):
        linear.ReplicatedLinear(HIDDEN, HIDDEN, quant_config=config_of(), prefix="lin")


def test_dequantized_weight() -> None:
    layer = replicated(config_of())
    tensors = quantized(HIDDEN, HIDDEN, 0)
    load(layer, tensors)
    layer.quant_method.process_weights_after_loading(layer)
    codes = as_weight(tensors).codes
    scale = tensors["group_scale"].repeat_interleave(128, dim=1)
    wanted = codes.int() * scale * tensors["channel_scale"][:, None]
    assert torch.equal(layer.quant_method.dequantize_weight(layer), wanted)


def test_leading_dimensions_and_bias() -> None:
    layer = replicated(config_of())
    load(layer, quantized(HIDDEN, HIDDEN, 0))
    layer.quant_method.process_weights_after_loading(layer)
    x, bias = torch.randn(2, 3, HIDDEN), torch.randn(HIDDEN)
    y = layer.quant_method.apply(layer, x, bias)
    flat = layer.quant_method.apply(layer, x.view(6, HIDDEN))
    assert y.shape == (2, 3, HIDDEN)
    torch.testing.assert_close(y.view(6, -1) - bias, flat, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["group_scale", "channel_scale"])
def test_tensor_that_was_never_loaded(name: str) -> None:
    layer = replicated(config_of())
    tensors = quantized(HIDDEN, HIDDEN, 0)
    del tensors[name]
    load(layer, tensors)
    with pytest.raises(IntScaleError, match=f"lin.{name} holds"):
        layer.quant_method.process_weights_after_loading(layer)


def test_wrong_dtype_is_not_converted() -> None:
    layer = replicated(config_of())
    tensors = quantized(HIDDEN, HIDDEN, 0)
    tensors["group_scale"] = tensors["group_scale"].float()
    with pytest.raises(IntScaleError, match=r"lin\.group_scale is torch\.float32 .* torch\.int16"):
        load(layer, tensors)


def test_processing_twice_changes_nothing() -> None:
    layer = replicated(config_of())
    load(layer, quantized(HIDDEN, HIDDEN, 0))
    x = torch.randn(3, HIDDEN)
    assert torch.equal(outputs(layer, x), outputs(layer, x))


EXPERTS, INNER, TOPK = 4, 384, 2


def expert_weights() -> list[dict[str, Tensors]]:
    shapes = {
        "gate_proj": (INNER, HIDDEN),
        "up_proj": (INNER, HIDDEN),
        "down_proj": (HIDDEN, INNER),
    }
    return [
        {name: quantized(n, k, 10 * e + i) for i, (name, (n, k)) in enumerate(shapes.items())}
        for e in range(EXPERTS)
    ]


def build_experts(config: IntScaleConfig, ranks: int, **settings: Any) -> Any:
    runner = FusedMoEFactory(
        num_experts=EXPERTS,
        top_k=TOPK,
        hidden_size=HIDDEN,
        intermediate_size=settings.pop("intermediate_size", INNER),
        params_dtype=torch.float32,
        quant_config=config,
        prefix=f"{PREFIX}.mlp.experts",
        tp_size=ranks,
        **settings,
    )
    return next(m for m in runner.modules() if isinstance(m, RoutedExperts))


def load_experts(layer: Any, weights: list[dict[str, Tensors]]) -> None:
    stacks = {"gate_proj": ("w13", "w1"), "up_proj": ("w13", "w3"), "down_proj": ("w2", "w2")}
    for expert, projections in enumerate(weights):
        for projection, tensors in projections.items():
            stack, shard = stacks[projection]
            for name, tensor in tensors.items():
                param = getattr(layer, f"{stack}_{name}")
                param.weight_loader(
                    param, tensor, f"{PREFIX}.mlp.experts.{stack}_{name}", shard, expert
                )


@pytest.mark.parametrize(
    ("ranks", "expert_parallel", "group_size"), [(1, False, 128), (2, False, 64), (2, True, 128)]
)
def test_experts(ranks: int, expert_parallel: bool, group_size: int) -> None:
    weights = expert_weights()
    x, shares = torch.randn(6, HIDDEN), torch.rand(6, TOPK)
    chosen = torch.stack([torch.randperm(EXPERTS)[:TOPK] for _ in range(6)]).to(torch.int32)
    total = torch.zeros(6, HIDDEN)
    for rank in range(ranks):
        with rank_of(rank, ranks, expert_parallel):
            layer = build_experts(config_of(), ranks)
        assert layer.w2_group_scale.shape[2] == layer.w2_qweight.shape[2] * 8 // group_size
        load_experts(layer, weights)
        layer.quant_method.process_weights_after_loading(layer)
        total += layer.quant_method.apply(layer, x, shares, chosen, None, None)
    flat = {
        f"{e}.{projection}.{name}": tensor
        for e, projections in enumerate(weights)
        for projection, tensors in projections.items()
        for name, tensor in tensors.items()
    }
    stack = [
        tuple(weight_of(flat, f"{e}.{p}") for p in ("gate_proj", "up_proj", "down_proj"))
        for e in range(EXPERTS)
    ]
    wanted = Experts(stack, 1 if expert_parallel else ranks)(x, chosen, shares)
    torch.testing.assert_close(total, wanted, rtol=1e-6, atol=1e-6)


def test_slots_without_an_expert_add_nothing() -> None:
    with rank_of(0, 1):
        layer = build_experts(config_of(), 1)
    load_experts(layer, expert_weights())
    layer.quant_method.process_weights_after_loading(layer)
    x = torch.randn(2, HIDDEN)
    ids, shares = torch.tensor([[1, -1], [-1, -1]]), torch.rand(2, 2)
    y = layer.quant_method.apply(layer, x, shares, ids, None, None)
    one = layer.quant_method.apply(layer, x[:1], shares[:1, :1], ids[:1, :1], None, None)
    assert torch.equal(y[:1], one)
    assert one.abs().max() > 0
    assert not y[1].any()


@pytest.mark.parametrize(
    ("settings", "ranks", "text"),
    [
        ({"activation": "gelu"}, 1, "the activation 'gelu' is not supported"),
        ({"has_bias": True}, 1, "a bias in experts is not supported"),
        ({"swiglu_limit": 7.0}, 1, "swiglu_limit 7.0 is not supported"),
        (
            {"intermediate_size": 384},
            8,
            "experts.w2: K = 384 over 8 tensor-parallel ranks gives 48 input channels each, not a "
            "multiple of 32; use --tensor-parallel-size 6 or --enable-expert-parallel",
        ),
    ],
)
def test_experts_that_cannot_run(settings: dict[str, Any], ranks: int, text: str) -> None:
    with rank_of(0, ranks), pytest.raises(IntScaleError) as error:
        build_experts(config_of(), ranks, **settings)
    assert f"{PREFIX}.mlp.experts" in str(error.value)
    assert text in str(error.value)


@pytest.fixture(scope="module")
def qwen3_moe(checkpoint: Callable[..., Path]) -> Any:
    """vLLM's model with a router gate that asks for a method, loaded by vLLM's loader."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model

    folder = checkpoint("qwen3_moe", ignore=IGNORE)
    engine = EngineArgs(str(folder), dtype="float32", max_model_len=64, enforce_eager=True)
    config = engine.create_engine_config()
    with pytest.MonkeyPatch.context() as patch, set_current_vllm_config(config):
        patch.setattr(torch.accelerator, "empty_cache", lambda: None)  # vLLM's CPU worker does so
        return get_model(vllm_config=config), config.model_config, folder


def test_router_gate_stays_unquantized(qwen3_moe: Any) -> None:
    model, _, _ = qwen3_moe
    methods = {name: type(getattr(m, "quant_method", None)) for name, m in model.named_modules()}
    names = {n: method.__name__ for n, method in methods.items() if n.startswith("model.layers.0.")}
    assert names["model.layers.0.mlp.gate"] == "UnquantizedLinearMethod"
    assert names["model.layers.0.self_attn.qkv_proj"] == "IntScaleLinearMethod"
    assert "IntScaleMoEMethod" in names.values()
    assert "IntScale" not in methods["lm_head"].__name__


def test_layerwise_reload_restores_the_same_tensors(qwen3_moe: Any) -> None:
    """What vLLM does for weight updates: load again and keep every address (CUDA graphs)."""
    from vllm.model_executor.model_loader.reload import (
        finalize_layerwise_reload,
        initialize_layerwise_reload,
    )

    model, model_config, folder = qwen3_moe
    before = {name: (p.data_ptr(), p.data.clone()) for name, p in model.named_parameters()}
    for name, tensor in model.named_parameters():
        if name.endswith(TENSOR_NAMES):
            tensor.data.zero_()
    with torch.device("cpu"):
        initialize_layerwise_reload(model)
        model.load_weights(load_file(folder / "model.safetensors").items())
        finalize_layerwise_reload(model, model_config)
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    for name, (address, value) in before.items():
        assert after[name].data_ptr() == address, name
        assert torch.equal(after[name].data, value), name


def test_kept_loaders_do_not_keep_the_layer_alive() -> None:
    """vLLM keeps a copy of every parameter, loader included, for as long as the layer lives."""
    from vllm.model_executor.model_loader.reload.meta import capture_layer_to_meta

    layer = replicated(config_of())
    kept = capture_layer_to_meta(layer)
    alive = weakref.ref(layer)
    del layer
    gc.collect()
    assert kept[0].keys() >= set(TENSOR_NAMES)
    assert alive() is None


def test_ignored_experts() -> None:
    with rank_of(0, 1):
        layer = build_experts(config_of(ignore=(r"re:.*\.experts\..*",)), 1)
    assert type(layer.quant_method).__name__ == "UnquantizedFusedMoEMethod"


def test_experts_must_agree() -> None:
    with (
        rank_of(0, 1),
        pytest.raises(IntScaleError, match=f"{PREFIX}.mlp.experts: its fused parts"),
    ):
        build_experts(config_of(ignore=(f"{PREFIX}.mlp.experts.3.down_proj",)), 1)
