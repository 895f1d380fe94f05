"""Linear layers: what arrives in the parameters of each rank, and what the ranks compute.

Compared with slices written down here.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from reference_model import Linear
from torch import Tensor

pytest.importorskip("vllm")

from one_rank import HIDDEN, PREFIX, Tensors, as_weight, config_of, quantized, rank_of
from vllm.config import LoadConfig, VllmConfig, set_current_vllm_config
from vllm.model_executor.layers import linear

from vllm_intscale.errors import IntScaleError
from vllm_intscale.format import TENSOR_NAMES
from vllm_intscale.plugin import IntScaleConfig

pytestmark = pytest.mark.usefixtures("one_process_world")
HEAD = 64


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


def gate_up() -> Any:
    return linear.MergedColumnParallelLinear(
        HIDDEN,
        [384, 384],
        bias=False,
        params_dtype=torch.float32,
        quant_config=config_of(),
        prefix=f"{PREFIX}.mlp.gate_up_proj",
    )


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_merged_columns(ranks: int) -> None:
    parts = [quantized(384, HIDDEN, seed) for seed in range(2)]
    x = torch.randn(5, HIDDEN)
    for rank in range(ranks):
        with rank_of(rank, ranks):
            layer = gate_up()
        for shard, part in enumerate(parts):
            load(layer, part, shard)
        assert_loaded(layer, parts, lambda t, _, rank=rank: t.chunk(ranks)[rank])
        whole = [Linear(as_weight(part), None, 1)(x) for part in parts]
        wanted = torch.cat([y.chunk(ranks, dim=1)[rank] for y in whole], dim=1)
        assert torch.equal(outputs(layer, x), wanted)


@pytest.mark.parametrize("name", TENSOR_NAMES)
def test_a_missing_part_of_a_fused_layer_is_named(name: str) -> None:
    with rank_of(0, 1):
        layer = gate_up()
    whole, part = quantized(384, HIDDEN, 0), quantized(384, HIDDEN, 1)
    load(layer, whole, 0)
    load(layer, {n: t for n, t in part.items() if n != name}, 1)
    with pytest.raises(IntScaleError, match=rf"gate_up_proj\.{name} is missing .* 1 of 2 parts"):
        layer.quant_method.process_weights_after_loading(layer)


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


def test_8_bit_layer() -> None:
    tensors = quantized(HIDDEN, HIDDEN, 0, bits=8)
    layer = replicated(config_of(overrides={"lin": {"bits": 8}}))
    load(layer, tensors)
    x = torch.randn(3, HIDDEN)
    y = outputs(layer, x)
    dense = layer.quant_method.dequantize_weight(layer)
    assert (y - x @ dense.T).abs().max() < 0.02 * y.abs().max()


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


@pytest.mark.parametrize("name", TENSOR_NAMES)
def test_tensor_that_was_never_loaded(name: str) -> None:
    layer = replicated(config_of())
    tensors = quantized(HIDDEN, HIDDEN, 0)
    del tensors[name]
    load(layer, tensors)
    with pytest.raises(IntScaleError, match=rf"lin\.{name} is missing in the checkpoint"):
        layer.quant_method.process_weights_after_loading(layer)


def test_layer_that_was_never_loaded() -> None:
    layer = replicated(config_of())
    with pytest.raises(IntScaleError, match=r"lin\.channel_scale holds a value that is not finite"):
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
