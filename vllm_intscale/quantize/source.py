"""The model to quantize: where it is, and the plan of what becomes of each of its tensors.

All that can be wrong with a request is found here, from headers, before any work.
"""

from __future__ import annotations

import dataclasses
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import gcd
from pathlib import Path
from types import MappingProxyType
from typing import Any

from vllm_intscale.checkpoint import CONFIG, StoredTensor, read_config, read_headers
from vllm_intscale.errors import IntScaleError
from vllm_intscale.format import (
    GROUP_SIZES,
    CheckpointConfig,
    LayerScheme,
    check_agreement,
    largest_group_size,
    matches,
)
from vllm_intscale.quantize.packed import PackedLayer

# Weights of any format, other than the safetensors that are read: neither downloaded nor copied.
OTHER_WEIGHTS = ["*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.onnx", "*.h5", "*.msgpack"]
FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")
QUANTIZATION_KEYS = ("quantization_config", "compression_config")  # of config.json or text_config

# Models that store their matrices (or experts) as [K, N].
TRANSPOSED_MODELS = ("gpt2", "openai-gpt", "jais", "gpt_oss", "llama4", "llama4_text")

# Why a layer stays unquantized, by what its name contains; the first match counts.
_LEFT = {
    reason: re.compile(pattern)
    for reason, pattern in {
        "vision or audio": r"\b(visual|vision|audio|image|speech)"
        r"|projector|connector|resampler|aligner|\bmlp1\b",
        "multi-token prediction": r"\b(mtp|nextn|eh_proj)",
        "embedding": r"embed|\b(wte|wpe)\b",
        "output head": r"\b(lm_head|score|classifier)\b|^(\w+\.)?output(_layer)?\.weight$",
        "router gate": r"\b(gate|router|shared_expert_gate)\b",
    }.items()
}
NOT_LINEAR = "not a linear layer"
_LAYER_NUMBER = re.compile(r"\blayers\.(\d+)\.")
_PREDICTING = re.compile(r"\bmtp_(?:layers|block)\.(\d+)\.")
_EXPERT = re.compile(r"(.*\bexperts)\.\d+\.")
_FUSED_EXPERTS = re.compile(r"(.*\bexperts)\.(gate_up_proj|down_proj)(\.weight)?")
# Projections that vLLM fuses, in nearly all of its models; so it does all experts of a layer.
SERVED_AS = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv_proj"),
    **dict.fromkeys(("gate_proj", "up_proj", "w1", "w3"), "gate_up_proj"),
    **dict.fromkeys(("q_a_proj", "kv_a_proj_with_mqa"), "fused_qkv_a_proj"),
    **dict.fromkeys(("in_proj_qkv", "in_proj_z"), "in_proj_qkvz"),
    **dict.fromkeys(("in_proj_b", "in_proj_a"), "in_proj_ba"),
}
_PACKED_EXPERTS = re.compile(r"expert|\bmoe\b|_moe\b")


@dataclass(frozen=True)
class Matrix:
    """A tensor to write: a stored one, or a part of a stored stack of fused experts.

    name: what it is called in the checkpoint written, with `.weight`.
    expert, first_row: where in the stack `stored` its rows are (None: `stored` is no stack).
    scheme: how it is quantized; None if it is copied, for the reason `left`.
    packed: the int4 codes it is made from, if the source is quantized; `stored` is one of them.
    """

    name: str
    stored: StoredTensor
    shape: tuple[int, ...]
    expert: int | None = None
    first_row: int = 0
    scheme: LayerScheme | None = None
    left: str = ""
    packed: PackedLayer | None = None

    @property
    def layer(self) -> str:
        """Full name of the layer, as patterns and the config name it."""
        return self.name.removesuffix(".weight")

    @property
    def period(self) -> int:
        """What a group size must divide: K, and the groups that the source has."""
        k = self.shape[1]
        return k if not self.packed or self.packed.reordered else gcd(k, self.packed.group_size)


@dataclass(frozen=True)
class Plan:
    """What to write: the tensors in the order of the source's files, and both configs."""

    folder: Path
    matrices: list[Matrix]
    model_config: dict[str, Any]
    config: CheckpointConfig


@contextmanager
def reaching_hub(source: str) -> Iterator[None]:
    """What goes wrong with a hub id, as one IntScaleError; also if `source` cannot be one."""
    if Path(source).exists() or not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", source):
        raise IntScaleError(f"{source} is not a folder; name the folder of a model or a hub id")
    try:
        yield
    except Exception as error:  # any of a dozen types of three libraries
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise IntScaleError(
            f"{source} is not a folder, and the hub has no such model or cannot be reached "
            f"({reason}); check the name, the network and, for a gated model, the login"
        ) from None


def resolve(source: str, revision: str | None = None) -> Path:
    """The folder of a model: `source` itself, or the snapshot of this hub id, downloaded."""
    if (folder := Path(source)).is_dir():
        return folder
    with reaching_hub(source):
        from huggingface_hub import snapshot_download

        # The last two are further copies of the weights, by Mistral and Meta.
        unused = [*OTHER_WEIGHTS, "consolidated*", "original/*"]
        return Path(snapshot_download(source, revision=revision, ignore_patterns=unused))


def make_plan(folder: Path, wanted: CheckpointConfig) -> Plan:
    """Decide about every tensor of the model in `folder`.

    wanted: the user's choices; the plan's config names every layer that deviates from them, and
    every layer left unquantized.

    Raises IntScaleError if the source or the choices do not allow a checkpoint, naming every
    offending layer at once.
    """
    return decide(folder, read_headers(folder), read_config(folder), wanted)


def decide(
    folder: Path,
    stored: Mapping[str, StoredTensor],
    model_config: dict[str, Any],
    wanted: CheckpointConfig,
    packed: Mapping[str, PackedLayer] = MappingProxyType({}),
) -> Plan:
    """As `make_plan`, from headers and config; `folder` is only named in errors.

    packed: layers that are quantized already; then only these are, again or still.
    """
    if not packed:
        _refuse_quantized(folder, stored, model_config)
    text_config = model_config.get("text_config") or model_config
    model_type = str(text_config.get("model_type", model_config.get("model_type")))
    if model_type in TRANSPOSED_MODELS:
        raise IntScaleError(
            f"{folder / CONFIG}: models of model_type {model_type} are not supported, they store "
            "weights transposed; choose a model of another type"
        )
    depth = int(text_config.get("num_hidden_layers") or 1 << 30)

    matrices = []
    for matrix in (m for t in stored.values() for m in _unstack(t, stored, model_type)):
        left = _left_because(matrix, wanted, depth)
        layer = packed.get(matrix.stored.name.removesuffix(".weight"))
        if packed and not layer:
            left = left or "unquantized in the source"
        scheme = None if left else wanted.scheme_of(matrix.layer)
        matrices.append(dataclasses.replace(matrix, scheme=scheme, left=left, packed=layer))
    if odd := [m for m in matrices if m.packed and m.left]:
        raise IntScaleError(
            f"{folder}: quantized layers of a kind that vLLM cannot run with intscale: "
            + ", ".join(f"{m.layer} ({m.left})" for m in odd)
            + "; start from a checkpoint in which they are not quantized"
        )
    _check_patterns(wanted, matrices)
    _check_quantizable(folder, matrices)
    matrices = _fit_group_sizes(matrices)

    ignore = [m.layer for m in matrices if m.left and _looks_linear(m)]
    ignore += _as_decoder_layers(ignore, depth)
    overrides = _overrides(wanted, matrices)
    config = dataclasses.replace(wanted, ignore=tuple(ignore), overrides=overrides)
    return Plan(folder, matrices, model_config, config)


def _as_decoder_layers(left: Iterable[str], depth: int) -> list[str]:
    """Patterns of vLLM's names for MiMo's and ERNIE's layers for multi-token prediction.

    It builds those as decoder layers behind the last.
    """
    found = {int(match[1]) for name in left if (match := _PREDICTING.search(name))}
    return [rf"re:.*\blayers\.{depth + number}\..*" for number in sorted(found)]


def _refuse_quantized(
    folder: Path, stored: Mapping[str, StoredTensor], model_config: Mapping[str, Any]
) -> None:
    for section in (model_config, model_config.get("text_config") or {}):
        for key in QUANTIZATION_KEYS:
            if found := section.get(key):
                method = found.get("quant_method") if isinstance(found, dict) else found
                raise IntScaleError(
                    f"{folder / CONFIG}: the model is already quantized ({key} is of method "
                    f"{method!r}); start from its unquantized original, or, if its weights are "
                    "int4, use: intscale convert"
                )
    for tensor in stored.values():
        if tensor.name.endswith(".qzeros"):  # of AutoGPTQ or AutoAWQ, which had files of their own
            raise IntScaleError(
                f"{tensor.file}: the model is already quantized, it has {tensor.name}, but "
                f"{CONFIG} has no quantization_config; put there what quantize_config.json (with "
                "quant_method gptq) or quant_config.json (awq) says, then use: intscale convert"
            )


def _unstack(
    tensor: StoredTensor, stored: Mapping[str, StoredTensor], model_type: str
) -> Iterator[Matrix]:
    """The tensor itself, or the matrices of its experts under their usual names."""
    fused = _FUSED_EXPERTS.fullmatch(tensor.name)
    if fused is None or len(tensor.shape) != 3:
        yield Matrix(_usual_name(tensor.name, model_type), tensor, tensor.shape)
        return
    prefix, part, suffix = fused[1], fused[2], fused[3] or ""
    gate_up, down = (stored.get(f"{prefix}.{p}{suffix}") for p in ("gate_up_proj", "down_proj"))
    if (
        gate_up is None
        or down is None
        or gate_up.shape != (down.shape[0], 2 * down.shape[2], down.shape[1])
    ):
        raise IntScaleError(
            f"{tensor.file}: {tensor.name} {list(tensor.shape)} holds experts of model_type "
            f"{model_type} in a layout that is not supported (supported: gate_up_proj [E, 2I, H] "
            "with down_proj [E, H, I]); use a checkpoint with one tensor for each expert"
        )
    names = ["w1", "w3", "w2"] if model_type == "mixtral" else ["gate_proj", "up_proj", "down_proj"]
    names = names[2:] if part == "down_proj" else names[:2]
    experts, rows, k = tensor.shape
    rows //= len(names)
    for expert in range(experts):
        for i, name in enumerate(names):
            full_name = _usual_name(f"{prefix}.{expert}.{name}.weight", model_type)
            yield Matrix(full_name, tensor, (rows, k), expert, i * rows)


def _usual_name(name: str, model_type: str) -> str:
    """Mixtral's experts and gates have another parent on the hub than in transformers 5."""
    return name.replace(".mlp.", ".block_sparse_moe.") if model_type == "mixtral" else name


def _left_because(matrix: Matrix, wanted: CheckpointConfig, depth: int) -> str:
    """Why this tensor is not to be quantized; empty if it is."""
    for reason, pattern in _LEFT.items():
        if pattern.search(matrix.name):
            return reason
    if (number := _LAYER_NUMBER.search(matrix.name)) and int(number[1]) >= depth:
        return "multi-token prediction"
    if any(matches(pattern, matrix.layer) for pattern in wanted.ignore):
        return "--ignore"
    if not matrix.name.endswith(".weight") or len(matrix.shape) != 2:
        return NOT_LINEAR
    return ""


def _looks_linear(matrix: Matrix) -> bool:
    """Whether a layer left unquantized could be taken for a linear layer by its name."""
    return matrix.name.endswith(".weight") and len(matrix.shape) > 1 and matrix.left != "embedding"


def _check_patterns(wanted: CheckpointConfig, matrices: Iterable[Matrix]) -> None:
    """A pattern that names no layer is a typing error, better found now than after an hour."""
    layers = [m.layer for m in matrices]
    for option, patterns in (("--ignore", wanted.ignore), ("--override", wanted.overrides)):
        unused = [p for p in patterns if not any(matches(p, layer) for layer in layers)]
        if unused:
            raise IntScaleError(
                f"{option} {', '.join(unused)}: no layer has such a name; give full names, such as "
                f"{layers[-1]}, or patterns that match full names, such as re:.*down_proj"
            )


def _check_quantizable(folder: Path, matrices: Iterable[Matrix]) -> None:
    """Raise for layers that no scheme fits, all of them in one error."""
    chosen = [m for m in matrices if m.scheme]
    if not chosen:
        raise IntScaleError(f"{folder} has no layer to quantize; check the model and --ignore")
    for m in matrices:
        if m.left == NOT_LINEAR and len(m.shape) == 3 and _PACKED_EXPERTS.search(m.name):
            raise IntScaleError(
                f"{m.stored.file}: {m.name} {list(m.shape)} looks like experts in a layout that is "
                f"not supported; leave it unquantized with --ignore {m.layer}"
            )
    if odd := [m for m in chosen if not m.packed and m.stored.dtype not in FLOAT_DTYPES]:
        raise IntScaleError(
            f"{folder}: the model is already quantized, no float dtype have "
            + ", ".join(f"{m.name} ({m.stored.dtype})" for m in odd)
            + "; start from its unquantized original"
        )
    if odd := [m for m in chosen if m.packed and m.period % GROUP_SIZES[-1]]:
        raise IntScaleError(
            f"{folder}: K and groups must be multiples of {GROUP_SIZES[-1]}, they are not for "
            + ", ".join(f"{m.layer} ({m.shape[1]}, {m.packed.group_size})" for m in odd if m.packed)
            + "; start from a checkpoint with larger groups"
        )
    if odd := [m for m in chosen if m.shape[1] % GROUP_SIZES[-1]]:
        raise IntScaleError(
            f"{folder}: K must be a multiple of {GROUP_SIZES[-1]}, it is not for "
            + ", ".join(f"{m.name} (K = {m.shape[1]})" for m in odd)
            + "; leave them unquantized with: "
            + " ".join(f"--ignore {m.layer}" for m in odd)
        )


def _fit_group_sizes(matrices: list[Matrix]) -> list[Matrix]:
    """Lower group sizes until they divide K.

    Layers that are served as one share the size that fits all; IntScaleError if the user wants
    them to differ.
    """

    def unit(m: Matrix) -> str:
        if expert := _EXPERT.match(m.name):
            return expert[1]
        parent, dot, name = m.layer.rpartition(".")
        return parent + dot + SERVED_AS.get(name, name)

    sizes: dict[str, int] = {}
    for m in matrices:
        if m.scheme and (size := largest_group_size(m.period, m.scheme.group_size)):
            sizes[unit(m)] = min(size, sizes.get(unit(m), size))
    schemes: dict[str, list[LayerScheme | None]] = defaultdict(list)
    fitted = []
    for m in matrices:
        if m.scheme:
            scheme = dataclasses.replace(m.scheme, group_size=sizes[unit(m)])
            m = dataclasses.replace(m, scheme=scheme)
        fitted.append(m)
        schemes[unit(m)].append(m.scheme)
    for name, parts in schemes.items():
        check_agreement(name, parts)
    return fitted


def _overrides(wanted: CheckpointConfig, matrices: Iterable[Matrix]) -> dict[str, dict[str, int]]:
    """An entry for each layer that deviates, as wanted or for the group size that fits it.

    By full names only: vLLM renames layers, and what a pattern matches would change with that.
    """
    overrides = {}
    for m in matrices:
        if m.scheme:
            fields = dict(wanted.override_of(m.layer))
            if m.scheme != wanted.scheme_of(m.layer):
                fields["group_size"] = m.scheme.group_size
            if fields:
                overrides[m.layer] = fields
    return overrides
