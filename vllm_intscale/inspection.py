"""`intscale inspect`: what a model weighs and on how many GPUs it can run, from headers alone.

Of a model on the hub only config.json and the headers of its safetensors are fetched.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vllm_intscale.checkpoint import (
    CONFIG,
    StoredTensor,
    read_config,
    read_headers,
    validate_headers,
)
from vllm_intscale.format import (
    GROUP_SIZES,
    QUANT_METHOD,
    TENSOR_NAMES,
    CheckpointConfig,
    LayerScheme,
    largest_group_size,
)
from vllm_intscale.quantize import plan_live
from vllm_intscale.quantize.source import decide, reaching_hub

# How vLLM's models divide the layers of these names among tensor-parallel ranks: by inputs, or not
# at all (latent attention's first projections). All others are divided by outputs.
_BY_INPUTS = re.compile(r"\b(o_proj|out_proj|down_proj|w2|wo|fc2|c_proj|dense_4h_to_h|dense)$")
_WHOLE = re.compile(r"\b(q_a_proj|kv_a_proj_with_mqa|k_proj|v_proj)$")  # k, v: by heads
_EXPERT = re.compile(r"\bexperts\.\d+\.")


class Layer(NamedTuple):
    """A quantized linear layer: N output and K input channels."""

    name: str
    n: int
    k: int
    scheme: LayerScheme


class Ranks(NamedTuple):
    """A number of tensor-parallel ranks: why it does not work, and what is split for it.

    problems: none if it works; remedy: what does instead. split: layers whose groups are cut, which
    is exact, with the group size that a rank has.
    """

    tp_size: int
    problems: list[str]
    remedy: str
    split: list[str]


class Inspection(NamedTuple):
    """What is known of a model. Sizes are in bytes, of all its tensors.

    quantized: whether it is an intscale checkpoint. Otherwise layers and intscale_bytes are what
    `intscale quantize` makes of it, or of int4 layers `intscale convert`.
    """

    model: str
    model_type: str
    quantized: bool
    stored_bytes: int
    intscale_bytes: int
    layers: dict[str, int]  # how many of each scheme
    left: dict[str, int]  # how many of each reason to leave a tensor unquantized
    ranks: list[Ranks]


def inspect_model(
    source: str,
    tp_sizes: Sequence[int],
    revision: str | None = None,
    wanted: CheckpointConfig | None = None,
) -> Inspection:
    """Look at a folder or hub id; see `Inspection`.

    wanted: how it shall be quantized, instead of by default; what is quantized already is refused.

    Raises IntScaleError if the source is neither folder nor hub id, or cannot be quantized.
    """
    stored, config = model_headers(source, revision)
    section = config.get("quantization_config")
    quantized = isinstance(section, dict) and section.get("quant_method") == QUANT_METHOD
    quantized = quantized and wanted is None
    left: Counter[str] = Counter()
    stored_bytes = sum(tensor.nbytes for tensor in stored.values())
    if quantized:
        layers, intscale_bytes = _quantized_layers(Path(source), stored, config), stored_bytes
    else:
        if wanted is None and Path(source).is_dir():
            matrices = plan_live(source).matrices
        else:  # of a hub id there are only headers, which say too little of int4 layers
            matrices = decide(Path(source), stored, config, wanted or CheckpointConfig()).matrices
        layers, intscale_bytes = [], 0
        for matrix in matrices:
            if matrix.scheme is None:
                left[matrix.left] += 1
                intscale_bytes += dataclasses.replace(matrix.stored, shape=matrix.shape).nbytes
            else:
                n, k = matrix.shape
                layers.append(Layer(matrix.layer, n, k, matrix.scheme))
                specs = matrix.scheme.tensor_specs(n, k).values()
                intscale_bytes += sum(dtype.itemsize * math.prod(shape) for dtype, shape in specs)
    text = config.get("text_config") or config
    return Inspection(
        source,
        str(config.get("model_type")),
        quantized,
        stored_bytes,
        intscale_bytes,
        dict(Counter(f"W{x.scheme.bits}A8 g{x.scheme.group_size}" for x in layers)),
        dict(left),
        [_ranks(tp_size, layers, text) for tp_size in tp_sizes],
    )


def model_headers(
    source: str, revision: str | None
) -> tuple[Mapping[str, StoredTensor], dict[str, Any]]:
    """Stored tensors and config.json of a folder or hub id, of which no more is fetched."""
    if (folder := Path(source)).is_dir():
        return read_headers(folder), read_config(folder)
    with reaching_hub(source):
        from huggingface_hub import get_safetensors_metadata, hf_hub_download

        config = json.loads(Path(hf_hub_download(source, CONFIG, revision=revision)).read_bytes())
        files = get_safetensors_metadata(source, revision=revision).files_metadata
    return {
        name: StoredTensor(name, Path(source) / file, info.dtype, tuple(info.shape))
        for file, metadata in files.items()
        for name, info in metadata.tensors.items()
    }, config


def _quantized_layers(
    folder: Path, stored: Mapping[str, StoredTensor], config: Mapping[str, Any]
) -> list[Layer]:
    checkpoint, layers = validate_headers(folder, config, stored), []
    for name, tensor in stored.items():
        layer, _, part = name.rpartition(".")
        if part == TENSOR_NAMES[0] and (scheme := checkpoint.scheme_of(layer)):
            n, words = tensor.shape
            layers.append(Layer(layer, n, words * 32 // scheme.bits, scheme))
    return layers


def _ranks(tp_size: int, layers: Sequence[Layer], config: Mapping[str, Any]) -> Ranks:
    heads = _head_problems(tp_size, config)
    odd = [layer for layer in layers if not _fits(layer, tp_size)]
    problems = heads or list(dict.fromkeys(_problem(layer, tp_size) for layer in odd))
    remedy = ""
    if problems:
        valid = next(
            size
            for size in range(tp_size, 0, -1)
            if not _head_problems(size, config) and all(_fits(layer, size) for layer in layers)
        )
        remedy = f"use --tensor-parallel-size {valid}"
        if not heads and all(_EXPERT.search(layer.name) for layer in odd):
            remedy += " or --enable-expert-parallel"
    split = Counter(filter(None, (_split(layer, tp_size) for layer in layers)))
    shown = [] if problems else [f"{count} x {text}" for text, count in split.items()]
    return Ranks(tp_size, problems, remedy, shown)


def _head_problems(tp_size: int, config: Mapping[str, Any]) -> list[str]:
    heads = config.get("num_attention_heads") or tp_size
    key_heads = config.get("num_key_value_heads") or heads
    if heads % tp_size:
        return [f"{heads} attention heads cannot be divided by {tp_size}"]
    if key_heads % tp_size and tp_size % key_heads:
        return [f"{key_heads} key-value heads can be neither divided nor repeated for {tp_size}"]
    return []


def _fits(layer: Layer, tp_size: int) -> bool:
    if _BY_INPUTS.search(layer.name):
        return layer.k % (tp_size * GROUP_SIZES[-1]) == 0
    return bool(_WHOLE.search(layer.name)) or layer.n % tp_size == 0


def _problem(layer: Layer, tp_size: int) -> str:
    name = layer.name.rpartition(".")[2]
    if _BY_INPUTS.search(layer.name):
        return (
            f"{name}: K = {layer.k} over {tp_size} tensor-parallel ranks gives "
            f"{layer.k / tp_size:g} input channels each, not a multiple of {GROUP_SIZES[-1]}"
        )
    return f"{name}: N = {layer.n} cannot be divided by {tp_size}"


def _split(layer: Layer, tp_size: int) -> str | None:
    """The layer's name and the group size that a rank has, if the checkpoint has another."""
    if not _BY_INPUTS.search(layer.name):
        return None
    group_size = largest_group_size(layer.k // tp_size, layer.scheme.group_size)
    if group_size == layer.scheme.group_size:
        return None
    return f"{layer.name.rpartition('.')[2]} in groups of {group_size}"
