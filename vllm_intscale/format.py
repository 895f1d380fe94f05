"""The checkpoint format, version 1: what the quantizer writes and the plugin reads.

`config.json` holds `quantization_config` (`CheckpointConfig`), the safetensors hold for each
quantized linear layer `P` with N output and K input channels:

    P.qweight        int32   [N, K / 8]   eight int4 codes a word (`packing`); [N, K / 4] if 8-bit
    P.group_scale    int16   [N, K / g]   integer group scale S, signed
    P.channel_scale  float32 [N]          1 / amplifier, finite, > 0

    weight[n, k] = code[n, k] * group_scale[n, k // g] * channel_scale[n]

Overflow is excluded by proof: activations are int8 in -127..127, so for every output channel
`accumulator_bound(codes, group_scale) <= 2**31 - 1` means that no int32 accumulator can wrap,
whatever the input (see method in README).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from vllm_intscale.errors import IntScaleError
from vllm_intscale.packing import unpack_codes

QUANT_METHOD = "intscale"
FORMAT_VERSION = 1
GROUP_SIZES = (128, 64, 32)
WEIGHT_BITS = (4, 8)
INT16_MAX = 32767  # -32768 never occurs, so that negating a scale is always possible
ACCUMULATOR_MAX = 2**31 - 1
ACTIVATION_MAX = 127
ACTIVATION = {"bits": 8, "granularity": "token", "dynamic": True}
TENSOR_NAMES = ("qweight", "group_scale", "channel_scale")
RESERVED_TENSOR = "group_shift"  # int8 [N, K / g], for asymmetric sources

Amplifier = Literal["channel", "heuristic"] | int


@dataclass(frozen=True)
class LayerScheme:
    """How one linear layer is quantized."""

    bits: int = 4
    group_size: int = 128
    max_group_scale: int = 255

    def tensor_specs(self, n: int, k: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of each tensor of a layer with N output and K input channels."""
        return {
            "qweight": (torch.int32, (n, k * self.bits // 32)),
            "group_scale": (torch.int16, (n, k // self.group_size)),
            "channel_scale": (torch.float32, (n,)),
        }


def largest_group_size(k: int, group_size: int) -> int | None:
    """The largest supported group size that divides both K and `group_size`, or None.

    Splitting a group is exact: its integer scale is repeated.
    """
    return next((g for g in GROUP_SIZES if g <= group_size and k % g == 0), None)


@dataclass(frozen=True)
class CheckpointConfig:
    """`quantization_config` of config.json.

    bits, group_size, max_group_scale: the scheme of every quantized layer but the overridden.
    amplifier: "channel" (one per output channel, lifting its largest |S| to max_group_scale, or
        as far as the overflow proof allows), a fixed number, or "heuristic" (one power of two per
        tensor, the smallest that lifts every scale to at least 1).
    ignore: layers left unquantized, full names or `re:` patterns that match the whole name.
    overrides: name or pattern to the fields of `LayerScheme` it changes; a full name counts before
        patterns, and of these the first that matches.
    source: what the checkpoint was made from; free-form, for people.
    """

    bits: int = 4
    group_size: int = 128
    amplifier: Amplifier = "channel"
    max_group_scale: int = 255
    ignore: tuple[str, ...] = ()
    overrides: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    source: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_scheme("quantization_config", dataclasses.asdict(self.default_scheme))
        if not (
            self.amplifier in ("channel", "heuristic")
            or (type(self.amplifier) is int and 1 <= self.amplifier <= 2**24)
        ):
            _reject("amplifier", self.amplifier, "channel, heuristic or a number from 1 to 2**24")
        for pattern, fields in self.overrides.items():
            unknown = sorted(set(fields) - set(_SCHEME_LIMITS))
            if unknown:
                _reject(f"overrides[{pattern!r}]", unknown, f"only {sorted(_SCHEME_LIMITS)}")
            _check_scheme(f"overrides[{pattern!r}]", fields)
        _ = self._ignore_patterns, self._override_patterns  # refuse a bad pattern now

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> CheckpointConfig:
        """Parse and validate; unknown keys, versions and values are an IntScaleError."""
        config = dict(config)
        for key, wanted in (
            ("quant_method", QUANT_METHOD),
            ("format_version", FORMAT_VERSION),
            ("symmetric", True),
            ("activation", ACTIVATION),
        ):
            found = config.pop(key, None)
            if found != wanted:
                _reject(key, found, f"{wanted!r}; a newer format needs a newer vllm-intscale")
        if (transform := config.pop("input_transform", None)) is not None:
            _reject("input_transform", transform, "null: the key is reserved in format version 1")
        names = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(config) - names)
        if unknown:
            _reject("unknown key", unknown, f"one of {sorted(names)}")
        if not _is_list_of_str(ignore := config.pop("ignore", [])):
            _reject("ignore", ignore, "a list of strings")
        overrides = config.get("overrides", {})
        if not (
            isinstance(overrides, dict) and all(isinstance(f, dict) for f in overrides.values())
        ):
            _reject("overrides", overrides, "a dictionary of dictionaries")
        return cls(ignore=tuple(ignore), **config)

    def to_dict(self) -> dict[str, Any]:
        """The dictionary to write into config.json."""
        return {
            "quant_method": QUANT_METHOD,
            "format_version": FORMAT_VERSION,
            "bits": self.bits,
            "group_size": self.group_size,
            "symmetric": True,
            "amplifier": self.amplifier,
            "max_group_scale": self.max_group_scale,
            "activation": ACTIVATION,
            "ignore": list(self.ignore),
            "overrides": {k: dict(v) for k, v in self.overrides.items()},
            "source": dict(self.source),
        }

    @property
    def default_scheme(self) -> LayerScheme:
        """The scheme of a layer that no pattern names."""
        return LayerScheme(self.bits, self.group_size, self.max_group_scale)

    def scheme_of(self, layer: str) -> LayerScheme | None:
        """The scheme of the layer with this full name, or None if it is ignored."""
        if layer in self._ignore_names or any(p.fullmatch(layer) for p in self._ignore_patterns):
            return None
        scheme = dataclasses.replace(self.default_scheme, **self.override_of(layer))
        if self.amplifier != "channel":  # only the per-channel amplifier aims at max_group_scale
            scheme = dataclasses.replace(scheme, max_group_scale=INT16_MAX)
        return scheme

    def override_of(self, layer: str) -> Mapping[str, int]:
        """The fields that `overrides` changes for the layer with this full name."""
        if layer in self.overrides:
            return self.overrides[layer]
        return next((f for p, f in self._override_patterns if p.fullmatch(layer)), {})

    # Full names are looked up, not searched: a large mixture of experts may list thousands.

    @cached_property
    def _ignore_names(self) -> frozenset[str]:
        return frozenset(self.ignore)

    @cached_property
    def _ignore_patterns(self) -> list[re.Pattern[str]]:
        return [_compile(p) for p in self.ignore if is_pattern(p)]

    @cached_property
    def _override_patterns(self) -> list[tuple[re.Pattern[str], Mapping[str, int]]]:
        return [(_compile(p), fields) for p, fields in self.overrides.items() if is_pattern(p)]


def is_pattern(name: str) -> bool:
    """Whether an entry of `ignore` or `overrides` is a `re:` pattern and not a full name."""
    return name.startswith("re:")


def matches(pattern: str, layer: str) -> bool:
    """Whether a full name or `re:` pattern of the config names this layer."""
    if is_pattern(pattern):
        return _compile(pattern).fullmatch(layer) is not None
    return pattern == layer


def _compile(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern.removeprefix("re:"))
    except re.error as error:
        raise IntScaleError(
            f"quantization_config: {pattern!r} is not a regular expression: {error}"
        ) from None


def _is_list_of_str(value: object) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(item, str) for item in value)


_SCHEME_LIMITS = {"bits": WEIGHT_BITS, "group_size": GROUP_SIZES, "max_group_scale": None}


def _check_scheme(where: str, fields: Mapping[str, Any]) -> None:
    for name, value in fields.items():
        allowed = _SCHEME_LIMITS[name] or range(1, INT16_MAX + 1)
        if not isinstance(value, int) or value not in allowed:
            limit = allowed if isinstance(allowed, tuple) else f"1 to {INT16_MAX}"
            _reject(f"{where}.{name}", value, f"one of {limit}")


def _reject(key: str, value: object, wanted: str) -> None:
    raise IntScaleError(f"quantization_config: {key} is {value!r}; it must be {wanted}")


def accumulator_bound(codes: Tensor, group_scale: Tensor) -> Tensor:
    """Largest |int32 accumulator| that any int8 activation can reach, per output channel.

    `127 * sum_g |S[n, g]| * sum_{k in g} |code[n, k]|`, int64 `[..., N]`, from codes `[..., N, K]`
    and group_scale `[..., N, K / g]`.
    """
    groups = codes.unflatten(-1, (group_scale.shape[-1], -1))
    sums = groups.to(torch.int16).abs().sum(-1, dtype=torch.int32)
    bound: Tensor = ACTIVATION_MAX * (group_scale.to(torch.int64).abs() * sums).sum(-1)
    return bound


def validate_layer(where: str, tensors: Mapping[str, Tensor], scheme: LayerScheme, k: int) -> None:
    """Check dtype, shape and values of one layer's tensors; raise IntScaleError naming `where`.

    tensors: the three of `TENSOR_NAMES`; on the meta device only dtype and shape are checked.
    Leading dimensions (experts) are allowed.
    """
    missing = [name for name in TENSOR_NAMES if name not in tensors]
    if missing:
        raise IntScaleError(f"{where}: tensor {missing} is missing; quantize the model again")
    n = tensors["channel_scale"].shape[-1]
    for name, (dtype, shape) in scheme.tensor_specs(n, k).items():
        tensor = tensors[name]
        if tensor.dtype != dtype or tuple(tensor.shape[-len(shape) :]) != shape:
            raise IntScaleError(
                f"{where}.{name} is {tensor.dtype} {list(tensor.shape)}; {scheme.bits}-bit weights "
                f"in groups of {scheme.group_size} need {dtype} {list(shape)}"
            )
    qweight, group_scale, channel_scale = (tensors[name] for name in TENSOR_NAMES)
    if qweight.is_meta:
        return
    if not bool((channel_scale.isfinite() & (channel_scale > 0)).all()):
        raise IntScaleError(
            f"{where}.channel_scale holds a value that is not finite and positive (a tensor that "
            "was not loaded reads as NaN); download or quantize the model again"
        )
    largest = int(group_scale.to(torch.int32).abs().max())
    if largest > scheme.max_group_scale:
        raise IntScaleError(
            f"{where}.group_scale holds {largest} in magnitude, above max_group_scale "
            f"{scheme.max_group_scale}; download or quantize the model again"
        )
    flat_weight, flat_scale = qweight.flatten(0, -2), group_scale.flatten(0, -2)
    for rows in range(0, flat_weight.shape[0], 4096):  # bounds the memory of the unpacked codes
        codes = unpack_codes(flat_weight[rows : rows + 4096], scheme.bits)
        bound = int(accumulator_bound(codes, flat_scale[rows : rows + 4096]).max())
        if bound > ACCUMULATOR_MAX:
            raise IntScaleError(
                f"{where}.group_scale lets the int32 accumulator reach {bound}, above "
                f"{ACCUMULATOR_MAX}; quantize again with a smaller amplifier"
            )


def check_agreement(layer: str, schemes: Iterable[LayerScheme | None]) -> LayerScheme | None:
    """The one scheme that all parts of a fused layer share, or an IntScaleError."""
    distinct = set(schemes)
    if len(distinct) != 1:
        raise IntScaleError(
            f"{layer}: its fused parts are quantized differently ({distinct}); give all parts the "
            "same ignore and overrides entries"
        )
    return distinct.pop()
