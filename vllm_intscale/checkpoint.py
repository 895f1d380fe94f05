"""Checkpoint folders: which tensors they hold, and whether an intscale checkpoint is whole.

Only headers are read here, so that even the largest model is checked in a second, before any work.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from vllm_intscale.errors import IntScaleError
from vllm_intscale.format import (
    QUANT_METHOD,
    RESERVED_TENSOR,
    TENSOR_NAMES,
    CheckpointConfig,
    LayerScheme,
    validate_layer,
)

CONFIG = "config.json"
SINGLE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# The dtypes of quantized layers and of weights that can be quantized, as safetensors spells them.
DTYPES = {
    "I32": torch.int32,
    "I16": torch.int16,
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_EXPECTED = {"qweight": ("I32", 2), "group_scale": ("I16", 2), "channel_scale": ("F32", 1)}


def bits_of(dtype: str) -> int:
    """Bits of an element, of a dtype as safetensors spells it: "BF16", "F8_E4M3", "BOOL"."""
    return next(map(int, re.findall(r"\d+", dtype)), 8)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file; dtype as safetensors spells it ("BF16")."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * bits_of(self.dtype) // 8


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder."""
    if not folder.is_dir():
        raise IntScaleError(f"{folder} is not a folder; name the folder of a model")
    return _read_json(inside(folder, CONFIG))


def read_headers(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a model folder, by name, in the order of files and names.

    Raises IntScaleError if there are no safetensors, if a file is truncated or not safetensors, if
    the index names what is not there, or if two files hold the same tensor.
    """
    index = folder / INDEX
    located: Mapping[str, str] = {}
    if index.exists():
        located = _read_weight_map(index)
        files = sorted(set(located.values()))
    elif (folder / SINGLE_FILE).exists():
        files = [SINGLE_FILE]
    else:
        # `consolidated*` is Mistral's own copy of the same weights under other names.
        found = (p.name for p in folder.glob("*.safetensors"))
        files = sorted(name for name in found if not name.startswith("consolidated"))
    if not files:
        raise IntScaleError(
            f"{folder} has no *.safetensors; convert the weights first, for instance with "
            "transformers' save_pretrained (pickled weights are never read: they can run code)"
        )
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        for tensor in _read_header(inside(folder, file)):
            if (other := tensors.get(tensor.name)) is not None:
                raise IntScaleError(
                    f"{tensor.file}: tensor {tensor.name} is in {other.file.name} too; remove the "
                    "file that does not belong to the model"
                )
            tensors[tensor.name] = tensor
    for name, file in located.items():
        if name not in tensors or tensors[name].file.name != file:
            raise IntScaleError(
                f"{folder / file}: tensor {name} is missing, though {INDEX} places it there; "
                "download or quantize the model again"
            )
    return tensors


def inside(folder: Path, name: str) -> Path:
    """The path of a file of a model folder; IntScaleError if it leads outside or is missing.

    The links of the hub's cache are meant: snapshots/REVISION/FILE leads to blobs/HASH.
    """
    path = folder / name
    root = folder.resolve()
    if root.parent.name == "snapshots":
        root = root.parent.parent
    if not path.resolve().is_relative_to(root):
        raise IntScaleError(
            f"{folder}: {name!r} leads outside of the model folder; replace it by the file itself"
        )
    if not path.is_file():
        raise IntScaleError(f"{path} is missing; download or quantize the model again")
    return path


def validate_checkpoint(folder: Path) -> CheckpointConfig:
    """Check config.json and all shard headers of an intscale checkpoint; return its config.

    Raises IntScaleError naming file, tensor, reason and remedy. Values are not read.
    """
    return validate_headers(folder, read_config(folder), read_headers(folder))


def validate_headers(
    folder: Path, model_config: Mapping[str, Any], tensors: Mapping[str, StoredTensor]
) -> CheckpointConfig:
    """As `validate_checkpoint`, from what was read already; `folder` is only named in errors."""
    section = model_config.get("quantization_config")
    if not isinstance(section, dict) or section.get("quant_method") != QUANT_METHOD:
        raise IntScaleError(
            f"{folder / CONFIG} has no quantization_config of method {QUANT_METHOD}; make the "
            "checkpoint with: intscale quantize SOURCE OUT"
        )
    try:
        config = CheckpointConfig.from_dict(section)
    except IntScaleError as error:
        raise IntScaleError(f"{folder / CONFIG}: {error}") from None
    layers = dict.fromkeys(
        layer for layer, _, part in (t.rpartition(".") for t in tensors) if part in TENSOR_NAMES
    )
    for layer in layers:
        parts = {name: t for name in TENSOR_NAMES if (t := tensors.get(f"{layer}.{name}"))}
        file = next(iter(parts.values())).file
        scheme = config.scheme_of(layer)
        if scheme is None:
            raise IntScaleError(
                f"{file}: {layer} is stored quantized, but quantization_config ignores it; "
                "quantize the model again"
            )
        if f"{layer}.weight" in tensors:
            raise IntScaleError(
                f"{file}: {layer} is stored both quantized and as {layer}.weight; quantize the "
                "model again into a new folder"
            )
        if f"{layer}.{RESERVED_TENSOR}" in tensors:
            raise IntScaleError(
                f"{file}: {layer}.{RESERVED_TENSOR} makes the layer asymmetric, which this release "
                "cannot run; upgrade vllm-intscale, or quantize the model again"
            )
        _validate_layer_headers(f"{file}: {layer}", parts, scheme)
    if not layers:
        raise IntScaleError(f"{folder} holds no quantized layer; quantize the model again")
    return config


def _validate_layer_headers(
    where: str, parts: Mapping[str, StoredTensor], scheme: LayerScheme
) -> None:
    for name, (dtype, ndim) in _EXPECTED.items():
        if name in parts and (parts[name].dtype, len(parts[name].shape)) != (dtype, ndim):
            raise IntScaleError(
                f"{where}.{name} is {parts[name].dtype} {list(parts[name].shape)}; it must be "
                f"{dtype} with {ndim} dimension{'s' * (ndim > 1)}: quantize the model again"
            )
    meta = {
        name: torch.empty(tensor.shape, dtype=DTYPES[tensor.dtype], device="meta")
        for name, tensor in parts.items()
    }
    k = meta["qweight"].shape[1] * 32 // scheme.bits if "qweight" in meta else 0
    if k % scheme.group_size:
        raise IntScaleError(
            f"{where}.qweight has K = {k}, not a multiple of the group size {scheme.group_size}; "
            "quantize the model again"
        )
    validate_layer(where, meta, scheme, k)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise IntScaleError(f"{path} is not JSON ({error}); download the model again") from None
    if not isinstance(content, dict):
        raise IntScaleError(f"{path} is not a JSON object; download the model again")
    return content


def _read_weight_map(index: Path) -> dict[str, str]:
    located = _read_json(inside(index.parent, index.name)).get("weight_map")
    if not isinstance(located, dict):
        raise IntScaleError(f"{index} has no weight_map; download the model again")
    for file in located.values():
        if not isinstance(file, str) or Path(file).name != file:
            raise IntScaleError(
                f"{index}: {file!r} is not the name of a file next to it; download the model again"
            )
    return located


def _read_header(path: Path) -> list[StoredTensor]:
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in sorted(file.keys())}
            return [
                StoredTensor(name, path, s.get_dtype(), tuple(s.get_shape()))
                for name, s in slices.items()
            ]
    except SafetensorError as error:
        raise IntScaleError(
            f"{path} is truncated or not a safetensors file ({error}); download or quantize the "
            "model again"
        ) from None
