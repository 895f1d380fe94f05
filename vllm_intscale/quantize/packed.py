"""Layers that other tools have quantized to int4: where their codes, scales and zero points are.

    layout               codes                    scale         zero point         group of k
    gptq                 qweight [K/8, N]         scales        qzeros             g_idx [K]
                                                  [G, N]        [G, N/8]
    awq                  qweight [K, N/8]         scales        qzeros
                                                  [G, N]        [G, N/8]
    compressed-tensors   weight_packed [N, K/8],  weight_scale  weight_zero_point  weight_g_idx [K]
                         or weight [N, K] int8    [N, G]        [N/8, G], or
                                                                [N, G] int8

    weight[n, k] = (code - zero)[n, k] * scale[n, group of k]

Words are int32 and hold eight codes 0..15 along the divided dimension, lowest bits first, AWQ's in
the order of `AWQ_ORDER`; compressed-tensors stores its signed codes and zero points plus 8, those
that are int8 as they are. GPTQ has two versions: the first stores zero points less 1. AutoRound
writes all of these.
"""

from __future__ import annotations

import dataclasses
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vllm_intscale.checkpoint import CONFIG, StoredTensor
from vllm_intscale.errors import IntScaleError
from vllm_intscale.packing import unpack_unsigned

AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # the nibble of a word that holds its column 0, 1, ...
AWQ, GPTQ, COMPRESSED = "awq", "gptq", "compressed-tensors"
_CODES = {AWQ: "qweight", GPTQ: "qweight", COMPRESSED: "weight_packed"}
_PARTS = {
    AWQ: ("qweight", "scales", "qzeros"),
    GPTQ: ("qweight", "scales", "qzeros", "g_idx"),
    COMPRESSED: (
        *("weight_packed", "weight", "weight_scale", "weight_zero_point", "weight_g_idx"),
        "weight_shape",
    ),
}
# Of compressed-tensors' config: read here, or without influence on what a layer computes.
_COMPRESSED_KEYS = {
    *("quant_method", "format", "config_groups", "ignore", "version", "quantization_status"),
    *("global_compression_ratio", "provider", "run_compressed", "dequantize"),
    *("use_optimized_inference", "total_num_heads", "total_num_kv_heads"),
}
CENTER = 8  # the zero point of symmetric codes
ROWS = 8  # are read in multiples of a word's codes

Read = Callable[[StoredTensor], Any]  # the safetensors slice of a tensor


class PackedRows(NamedTuple):
    """Rows of a layer."""

    codes: Tensor  # int8 [n, K], zero points subtracted: -15..15
    scale: Tensor  # float64 [n, G]


@dataclass(frozen=True)
class PackedLayer:
    """A linear layer `[N, K]` as it is stored.

    group_size: weights of a scale; group_of: int64 `[K]`, the group of each k, if the groups are
    not its neighbours in order (activation order). version: of GPTQ's zero points.
    """

    layout: str
    parts: Mapping[str, StoredTensor]
    shape: tuple[int, int]
    group_size: int
    group_of: Tensor | None = None
    version: int = 2

    @property
    def reordered(self) -> bool:
        return self.group_of is not None

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts.values())

    def rows(self, read: Read, first: int, end: int) -> PackedRows:
        """Output channels first..end, multiples of `ROWS` unless end is N."""
        zero: Tensor | int = CENTER
        if self.layout == COMPRESSED:
            scale = read(self.parts["weight_scale"])[first:end]
            if (plain := self.parts.get("weight")) is not None:
                codes = read(plain)[first:end] + CENTER
            else:
                codes = _unsigned(read(self.parts["weight_packed"])[first:end])[:, : self.shape[1]]
            if (zeros := self.parts.get("weight_zero_point")) is not None:
                if zeros.dtype == "I8":
                    zero = read(zeros)[first:end] + CENTER
                else:
                    words = read(zeros)[first // ROWS : -(-end // ROWS)]
                    zero = _unsigned(words.t().contiguous()).t()[: end - first]
        elif self.layout == GPTQ:
            scale = read(self.parts["scales"])[:, first:end].t()
            codes = _unsigned(read(self.parts["qweight"])[:, first:end].t())
            zero = _unsigned(read(self.parts["qzeros"])[:, first // ROWS : end // ROWS]).t()
            if self.version == 1:
                zero = (zero + 1) & 15
        else:
            words = slice(first // ROWS, end // ROWS)
            scale = read(self.parts["scales"])[:, first:end].t()
            codes = _awq(read(self.parts["qweight"])[:, words]).t()
            if (stored := self.parts.get("qzeros")) is not None:
                zero = _awq(read(stored)[:, words]).t()
        if isinstance(zero, Tensor):
            if self.group_of is None and self.shape[1] % self.group_size == 0:
                groups = codes.unflatten(1, (-1, self.group_size))
                codes = groups.sub_(zero.to(torch.int8)[..., None]).flatten(1)
            else:
                group_of = self.group_of
                if group_of is None:
                    group_of = torch.arange(self.shape[1]) // self.group_size
                codes = codes - zero[:, group_of]
        else:
            codes = codes - zero
        return PackedRows(codes.to(torch.int8), scale.double())


def _unsigned(words: Tensor) -> Tensor:
    """Codes 0..15, int8 `[..., 8 W]`, of int32 `[..., W]`."""
    return unpack_unsigned(words, 4).view(torch.int8)


def _awq(words: Tensor) -> Tensor:
    codes = _unsigned(words).unflatten(-1, (-1, 8))
    ordered: Tensor = codes[..., list(AWQ_ORDER)]
    return ordered.flatten(-2)


def read_packed(
    folder: Path, stored: Mapping[str, StoredTensor], config: Mapping[str, Any], read: Read
) -> dict[str, PackedLayer]:
    """The int4 layers of a checkpoint by name, from headers, `g_idx` and some zero points.

    config: its quantization_config. Raises IntScaleError, naming layer, value and remedy, for a
    method or layout that is not supported and for parts that do not fit each other.
    """
    layout = _layout(folder, config)
    names = [name for name in stored if _is_code(layout, stored[name])]
    layers = {}
    for name in names:
        layer = name.rpartition(".")[0]
        parts = {p: t for p in _PARTS[layout] if (t := stored.get(f"{layer}.{p}"))}
        if name != f"{layer}.weight" and f"{layer}.weight" in stored:
            raise IntScaleError(
                f"{stored[name].file}: {layer} is stored both quantized and as {layer}.weight; "
                "download the model again"
            )
        layers[layer] = _packed_layer(layer, layout, parts, read)
    said = config.get("group_size") or config.get("q_group_size") or -1
    for name, p in layers.items():
        if p.group_size != said and 0 < said < p.shape[1]:  # or words of other than 4 bits
            raise IntScaleError(
                f"{next(iter(p.parts.values())).file}: {name} has {p.shape[1]} inputs in groups of "
                f"{p.group_size}, but {folder / CONFIG} says {said}; layers with settings of their "
                "own (GPTQModel's `dynamic`) cannot be converted"
            )
    if not layers:
        raise IntScaleError(
            f"{folder} holds no layer of int4 codes, though {CONFIG} names method {layout}; "
            "download the model again"
        )
    return _with_version(folder, layers, config, read) if layout == GPTQ else layers


def with_weights(
    stored: Mapping[str, StoredTensor], packed: Mapping[str, PackedLayer]
) -> dict[str, StoredTensor]:
    """The tensors of a checkpoint with one weight `[N, K]` in place of the parts of each layer."""
    weights: dict[str, StoredTensor | None] = {}
    for name, layer in packed.items():
        first, *others = (part.name for part in layer.parts.values())
        codes = stored[first]
        weights[first] = StoredTensor(f"{name}.weight", codes.file, "I4", layer.shape)
        weights |= dict.fromkeys(others)
    changed = (weights.get(name, tensor) for name, tensor in stored.items())
    return {tensor.name: tensor for tensor in changed if tensor}


def _layout(folder: Path, config: Mapping[str, Any]) -> str:
    where, method = folder / CONFIG, str(config.get("quant_method", "")).replace("_", "-")
    bits = config.get("bits", config.get("w_bit", 4))
    layout = method
    if method == "auto-round":
        layout = AWQ if "awq" in str(config.get("packing_format")) else GPTQ
    elif method == COMPRESSED:
        if config.get("format") not in ("pack-quantized", "int-quantized"):
            raise IntScaleError(
                f"{where}: format {config.get('format')!r} of compressed-tensors holds no int4 "
                "codes; supported are pack-quantized and int-quantized"
            )
        _refuse_other_arithmetic(where, config)
        groups = config.get("config_groups") or {}
        widths = {g["weights"]["num_bits"] for g in groups.values() if g.get("weights")}
        bits = 4 if widths == {4} else sorted(widths)
    if layout not in _PARTS:
        raise IntScaleError(
            f"{where}: checkpoints of quant_method {method!r} cannot be converted; supported are "
            "gptq, awq, auto-round and compressed-tensors"
        )
    if bits != 4:
        raise IntScaleError(
            f"{where}: the weights have {bits} bits, only 4 can be converted; quantize the "
            "unquantized model with: intscale quantize"
        )
    if layout == AWQ and str(config.get("version", "gemm")).lower() != "gemm":
        raise IntScaleError(
            f"{where}: AWQ's version {config['version']!r} has another layout; supported is gemm"
        )
    return layout


def _refuse_other_arithmetic(where: Path, config: Mapping[str, Any]) -> None:
    """Raise for what compressed-tensors can say of a model beyond its int4 weights.

    Rotations at run time (`transform_config`) would be lost without a trace: every shape fits.
    """
    groups = config.get("config_groups") or {}
    outputs = {
        f"output_activations of {name}": group.get("output_activations")
        for name, group in groups.items()
    }
    for key, value in {**config, **outputs}.items():
        if isinstance(value, dict) and (value.get("format") == "dense" or not any(value.values())):
            continue  # neither sparse nor transformed, spelled out
        if value and key not in _COMPRESSED_KEYS:
            raise IntScaleError(
                f"{where}: {key} of compressed-tensors is {reprlib.repr(value)}; only int4 weights "
                "can be converted, not what else changes the layers' outputs: start from a "
                "checkpoint without it"
            )


def _is_code(layout: str, tensor: StoredTensor) -> bool:
    part = tensor.name.rpartition(".")[2]
    return part == _CODES[layout] or (
        layout == COMPRESSED and part == "weight" and tensor.dtype == "I8"
    )


def _packed_layer(
    layer: str, layout: str, parts: dict[str, StoredTensor], read: Read
) -> PackedLayer:
    first = next(iter(parts.values()))
    where = f"{first.file}: {layer}"
    needed = {AWQ: ("scales",), GPTQ: ("scales", "qzeros"), COMPRESSED: ("weight_scale",)}[layout]
    if missing := [part for part in needed if part not in parts]:
        raise IntScaleError(f"{where}.{missing[0]} is missing; download the model again")
    scale = parts[needed[0]]
    shapes = ", ".join(f"{name} {list(part.shape)}" for name, part in parts.items())
    misfit = IntScaleError(
        f"{where}: its tensors do not fit each other ({shapes}); download the model again"
    )
    if len(first.shape) != 2 or len(scale.shape) != 2:
        raise misfit
    n, groups = scale.shape if layout == COMPRESSED else scale.shape[::-1]
    rows, columns = first.shape
    if layout == COMPRESSED and "weight_packed" in parts:
        rows, columns = rows, columns * 8
        if "weight_shape" in parts:
            columns = int(read(parts["weight_shape"])[:][1])
    elif layout == GPTQ:
        rows, columns = columns, rows * 8
    elif layout == AWQ:
        rows, columns = columns * 8, rows
    group_size = -(-columns // groups)
    zeros = parts.get("qzeros")
    if rows != n or (zeros and zeros.shape != (groups, n // 8)):
        raise misfit
    zeros = parts.get("weight_zero_point")
    expected = {"I32": (-(-n // ROWS), groups), "I8": (n, groups)}
    if zeros and zeros.shape != expected.get(zeros.dtype):
        raise IntScaleError(
            f"{where}.weight_zero_point is {zeros.dtype} {list(zeros.shape)}; beside scales "
            f"{list(scale.shape)} it must be I32 {list(expected['I32'])} or I8 "
            f"{list(expected['I8'])}: download the model again"
        )
    group_of = None
    order = parts.get("g_idx") or parts.get("weight_g_idx")
    if order is not None:
        group_of = read(order)[:].long()
        if (
            group_of.shape != (columns,)
            or not 0 <= int(group_of.min()) <= int(group_of.max()) < groups
        ):
            raise IntScaleError(
                f"{where}: {order.name} {list(order.shape)} does not name one of {groups} groups "
                f"for each of K = {columns}; download the model again"
            )
        if torch.equal(group_of, torch.arange(columns) // group_size):
            group_of = None
    return PackedLayer(layout, parts, (rows, columns), group_size, group_of)


def _with_version(
    folder: Path, layers: dict[str, PackedLayer], config: Mapping[str, Any], read: Read
) -> dict[str, PackedLayer]:
    """The layers with the version of GPTQ's zero points, seen where they are symmetric.

    Raises IntScaleError if the config says otherwise: one of the two is wrong, and with it every
    weight.
    """
    said = _declared_version(folder, config)
    version = said or 1
    if config.get("sym", True):
        name, layer = next(iter(layers.items()))
        stored = _unsigned(read(layer.parts["qzeros"])[:]).unique().tolist()
        seen = {(CENTER - 1,): 1, (CENTER,): 2}.get(tuple(stored))
        if seen is None or said not in (None, seen):
            meant = {1: "gptq", 2: "gptq_v2", None: "neither gptq nor gptq_v2"}[seen]
            raise IntScaleError(
                f"{layer.parts['qzeros'].file}: {name}.qzeros holds {stored}, which for symmetric "
                f"codes is {meant}, but {folder / CONFIG} says sym and "
                f"{'nothing else' if said is None else 'gptq' if said == 1 else 'gptq_v2'}; "
                "correct checkpoint_format or sym there"
            )
        version = seen
    return {name: dataclasses.replace(p, version=version) for name, p in layers.items()}


def _declared_version(folder: Path, config: Mapping[str, Any]) -> int | None:
    if "packing_format" in config:  # AutoRound's
        return 1 if "auto_gptq" in str(config["packing_format"]) else 2
    label = config.get("checkpoint_format")
    if label not in (None, "gptq", "gptq_v2"):
        raise IntScaleError(
            f"{folder / CONFIG}: checkpoint_format {label!r} is not supported; supported are gptq "
            "and gptq_v2"
        )
    return {"gptq": 1, "gptq_v2": 2}.get(str(label))
