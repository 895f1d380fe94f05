"""Tiny unquantized models on disk, in the layouts that the quantizer must know."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

HIDDEN = 256
INNER = 352  # 11 * 32: no group of 128 or 64 divides it
EXPERTS = 3


def save_model(
    folder: Path, tensors: dict[str, Tensor], shards: int = 1, **config: Any
) -> dict[str, Tensor]:
    """Write a model folder with these tensors; returns them."""
    folder.mkdir(parents=True, exist_ok=True)
    names = sorted(tensors)
    files: dict[str, list[str]] = {"model.safetensors": names}
    if shards > 1:
        files = {
            f"model-{i + 1:05}-of-{shards:05}.safetensors": names[i::shards] for i in range(shards)
        }
        index = {"metadata": {}, "weight_map": {n: f for f, part in files.items() for n in part}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for file, part in files.items():
        save_file({name: tensors[name].contiguous() for name in part}, folder / file)
    config = {"model_type": "llama", "num_hidden_layers": 1, **config}
    (folder / "config.json").write_text(json.dumps(config))
    return tensors


def random_weight(*shape: int, seed: int = 0) -> Tensor:
    """bfloat16, with rows of different magnitude, as in trained models."""
    generator = torch.Generator().manual_seed(seed + 1000 * len(shape) + sum(shape))
    magnitude = torch.rand(*shape[:-1], 1, generator=generator) + 0.01
    return (torch.randn(*shape, generator=generator) * magnitude).to(torch.bfloat16)


def attention(prefix: str = "model.layers.0.") -> dict[str, Tensor]:
    """What all models here share: embedding, attention, norms and head."""
    return {
        "model.embed_tokens.weight": random_weight(64, HIDDEN, seed=1),
        "lm_head.weight": random_weight(64, HIDDEN, seed=2),
        "model.norm.weight": torch.ones(HIDDEN, dtype=torch.bfloat16),
        f"{prefix}input_layernorm.weight": torch.ones(HIDDEN, dtype=torch.bfloat16),
        f"{prefix}self_attn.q_proj.weight": random_weight(HIDDEN, HIDDEN, seed=3),
        f"{prefix}self_attn.q_proj.bias": random_weight(HIDDEN, seed=4),
        f"{prefix}self_attn.k_proj.weight": random_weight(96, HIDDEN, seed=5),
    }


def dense() -> dict[str, Tensor]:
    """Like Llama, with a K that fits only groups of 32."""
    mlp = "model.layers.0.mlp."
    return attention() | {
        f"{mlp}gate_proj.weight": random_weight(INNER, HIDDEN, seed=6),
        f"{mlp}up_proj.weight": random_weight(INNER, HIDDEN, seed=7),
        f"{mlp}down_proj.weight": random_weight(HIDDEN, INNER, seed=8),
    }


def fused_experts(parent: str = "model.layers.0.mlp", suffix: str = "") -> dict[str, Tensor]:
    """The layout of transformers 5: one stack for all experts."""
    return attention() | {
        f"{parent}.gate.weight": random_weight(EXPERTS, HIDDEN, seed=9),
        f"{parent}.experts.gate_up_proj{suffix}": random_weight(EXPERTS, 2 * INNER, HIDDEN),
        f"{parent}.experts.down_proj{suffix}": random_weight(EXPERTS, HIDDEN, INNER),
    }


def separate_experts(
    tensors: dict[str, Tensor], parent: str, names: tuple[str, str, str]
) -> dict[str, Tensor]:
    """The same model as `fused_experts`, with one matrix for each expert's projection."""
    separate: dict[str, Tensor] = {}
    gate_name, up_name, down_name = names
    for name, tensor in tensors.items():
        if name.endswith("experts.gate_up_proj"):
            for e, stack in enumerate(tensor):
                gate, up = stack.chunk(2)
                separate[f"{parent}.experts.{e}.{gate_name}.weight"] = gate
                separate[f"{parent}.experts.{e}.{up_name}.weight"] = up
        elif name.endswith("experts.down_proj"):
            for e, down in enumerate(tensor):
                separate[f"{parent}.experts.{e}.{down_name}.weight"] = down
        elif name.endswith("gate.weight"):
            separate[f"{parent}.gate.weight"] = tensor
        else:
            separate[name] = tensor
    return separate


def read_all(folder: Path) -> dict[str, Tensor]:
    """All tensors of all safetensors files of a folder."""
    return {k: t for f in sorted(folder.glob("*.safetensors")) for k, t in load_file(f).items()}


def change_tensors(folder: Path, changes: dict[str, Tensor | None]) -> None:
    """Replace (None: remove) tensors of a model of one file."""
    path = folder / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    tensors.update(changes)
    save_file({name: t for name, t in tensors.items() if t is not None}, path)


def change_json(path: Path, **changes: Any) -> None:
    """Set top-level keys of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def dequantize(tensors: dict[str, Tensor], layer: str, bits: int = 4) -> np.ndarray:
    """float64 `[N, K]` of a quantized layer, straight from the text of the format."""
    words = tensors[f"{layer}.qweight"].numpy().view(np.uint32)
    mask, zero = (1 << bits) - 1, 1 << (bits - 1)
    parts = [((words >> shift) & mask).astype(np.int64) - zero for shift in range(0, 32, bits)]
    codes = np.stack(parts, axis=-1).reshape(words.shape[0], -1)
    scale = tensors[f"{layer}.group_scale"].numpy().astype(np.float64)
    channel = tensors[f"{layer}.channel_scale"].numpy().astype(np.float64)
    group_size = codes.shape[1] // scale.shape[1]
    return codes * np.repeat(scale, group_size, axis=1) * channel[:, None]
