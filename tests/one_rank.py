"""One tensor-parallel rank at a time, in one process and without an engine.

vLLM's own layers are built as one rank of several would build them: the functions that tell a
layer its rank are replaced, everything else is real. Use with the fixture `one_process_world`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from conftest import quantize_tensor
from reference_model import weight_of
from torch import Tensor
from vllm.config import ParallelConfig, VllmConfig, set_current_vllm_config
from vllm.model_executor import parameter
from vllm.model_executor.layers import linear
from vllm.model_executor.layers.fused_moe import config as moe_config

from vllm_intscale.format import CheckpointConfig, LayerScheme
from vllm_intscale.plugin import IntScaleConfig
from vllm_intscale.reference import Weight

HIDDEN = 256
PREFIX = "model.layers.0"
Tensors = dict[str, Tensor]


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
