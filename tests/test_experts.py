"""Mixtures of experts: loading, sharding, and a whole model through vLLM's loader and reload."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import IGNORE
from reference_model import Experts, weight_of
from safetensors.torch import load_file

pytest.importorskip("vllm")

from one_rank import HIDDEN, PREFIX, Tensors, config_of, quantized, rank_of
from vllm.config import get_current_vllm_config, set_current_vllm_config
from vllm.model_executor.layers.fused_moe import RoutedExperts

from vllm_intscale import loading, ops
from vllm_intscale.errors import IntScaleError
from vllm_intscale.format import TENSOR_NAMES
from vllm_intscale.plugin import IntScaleConfig

try:
    from vllm.model_executor.layers.fused_moe import FusedMoEFactory
except ImportError:  # vLLM 0.26
    from vllm.model_executor.layers.fused_moe import FusedMoE as FusedMoEFactory

pytestmark = pytest.mark.usefixtures("one_process_world")
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


@pytest.mark.parametrize("name", TENSOR_NAMES)
def test_a_missing_tensor_of_an_expert_is_named(name: str) -> None:
    with rank_of(0, 1):
        layer = build_experts(config_of(), 1)
    weights = expert_weights()
    del weights[2]["up_proj"][name]
    load_experts(layer, weights)
    with pytest.raises(IntScaleError, match=rf"experts\.w13_{name} is missing"):
        layer.quant_method.process_weights_after_loading(layer)


@pytest.mark.parametrize("step", [(ops, "prepare_weight"), (loading, "warm_up")])
def test_errors_of_kernels_name_the_layer(
    step: tuple[Any, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise IntScaleError("no kernel")

    monkeypatch.setattr(*step, fail)
    with rank_of(0, 1):
        layer = build_experts(config_of(), 1)
    load_experts(layer, expert_weights())
    with pytest.raises(IntScaleError, match=rf"^{PREFIX}\.mlp\.experts\.w13: no kernel$"):
        layer.quant_method.process_weights_after_loading(layer)


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


@pytest.mark.parametrize("targets", [None, ["q_proj", "experts"], ["q_proj"]])
def test_experts_take_no_adapters(targets: list[str] | None) -> None:
    """vLLM would give them some, with an error that names nothing."""
    with rank_of(0, 1):
        get_current_vllm_config().lora_config = SimpleNamespace(target_modules=targets)
        refused = pytest.raises(IntScaleError, match=f"{PREFIX}.mlp.experts.*--lora-target-modules")
        with nullcontext() if targets == ["q_proj"] else refused:
            build_experts(config_of(), 1)


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
