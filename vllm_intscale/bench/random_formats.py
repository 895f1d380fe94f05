"""Linear layers of random numbers in the formats that are compared: real tensors, real sizes.

Codes are of all values alike; weights have a standard deviation of about WEIGHT_STD.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vllm_intscale.errors import IntScaleError
from vllm_intscale.format import ACCUMULATOR_MAX, CheckpointConfig

WEIGHT_STD = 0.02
GROUP = 128
IGNORE = ("lm_head", r"re:.*\.gate")
INT4_STD, INT8_STD = 4.6, 73.6  # of codes
FP8_STD = 100.0  # of what is stored
GPTQ_ZEROS = 0x77777777  # 8, less the one that version 1 subtracts, eight times

Linear = Callable[[str, int, int], dict[str, Tensor]]


class Format(NamedTuple):
    """What config.json says as quantization_config, and the tensors of a layer `[N, K]`."""

    config: dict[str, Any] | None
    linear: Linear


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def format_of(name: str) -> Format:
    """Raises IntScaleError for an unknown name."""
    if name not in FORMATS:
        raise IntScaleError(f"format {name!r} is unknown; there are {', '.join(FORMATS)}")
    return FORMATS[name]


def _words(*shape: int) -> Tensor:
    limits = torch.iinfo(torch.int32)
    words = torch.randint(limits.min, limits.max, shape, dtype=torch.int64, device=device())
    return words.to(torch.int32)


def _scales(*shape: int) -> Tensor:
    """From half to one and a half of what gives WEIGHT_STD."""
    return (torch.rand(*shape, device=device()) + 0.5) * (WEIGHT_STD / INT4_STD)


def _bf16(name: str, n: int, k: int) -> dict[str, Tensor]:
    weight = torch.randn(n, k, dtype=torch.bfloat16, device=device())
    return {f"{name}.weight": weight.mul_(WEIGHT_STD)}


def _fp8(name: str, n: int, k: int) -> dict[str, Tensor]:
    weight = torch.randn(n, k, dtype=torch.bfloat16, device=device()).mul_(FP8_STD)
    return {
        f"{name}.weight": weight.clamp_(-448, 448).to(torch.float8_e4m3fn),
        f"{name}.weight_scale": torch.full((n, 1), WEIGHT_STD / FP8_STD),
    }


def _int8(name: str, n: int, k: int) -> dict[str, Tensor]:
    codes = torch.randint(-127, 128, (n, k), dtype=torch.int8, device=device())
    return {
        f"{name}.weight": codes,
        f"{name}.weight_scale": torch.full((n, 1), WEIGHT_STD / INT8_STD),
    }


def _packed(name: str, n: int, k: int) -> dict[str, Tensor]:
    return {
        f"{name}.weight_packed": _words(n, k // 8),
        f"{name}.weight_scale": _scales(n, k // GROUP).to(torch.bfloat16),
        f"{name}.weight_shape": torch.tensor([n, k]),
    }


def _gptq(name: str, n: int, k: int) -> dict[str, Tensor]:
    return {
        f"{name}.qweight": _words(k // 8, n),
        f"{name}.scales": _scales(k // GROUP, n).to(torch.float16),
        f"{name}.qzeros": torch.full((k // GROUP, n // 8), GPTQ_ZEROS, dtype=torch.int32),
        f"{name}.g_idx": torch.arange(k, dtype=torch.int32) // GROUP,
    }


def _intscale(name: str, n: int, k: int) -> dict[str, Tensor]:
    """Group scales from 32 on, so small that no codes and activations overflow an accumulator."""
    scheme = INTSCALE.default_scheme
    largest = min(scheme.max_group_scale, ACCUMULATOR_MAX // (127 * 8 * k))
    specs = scheme.tensor_specs(n, k)
    group_scale = torch.randint(32, largest + 1, specs["group_scale"][1], device=device())
    return {
        f"{name}.qweight": _words(*specs["qweight"][1]),
        f"{name}.group_scale": group_scale.to(torch.int16),
        f"{name}.channel_scale": torch.full((n,), WEIGHT_STD / (INT4_STD * largest * 0.6)),
    }


def _compressed(kind: str, bits: int, number: str, act: str | None) -> dict[str, Any]:
    """compressed-tensors: int4 in groups, 8 bits with one scale a channel."""
    weights = {"num_bits": bits, "type": number, "symmetric": True, "dynamic": False}
    weights |= {"strategy": "group", "group_size": GROUP} if bits == 4 else {"strategy": "channel"}
    token = {"num_bits": 8, "type": act, "symmetric": True, "strategy": "token", "dynamic": True}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": token if act else None}
    return {
        "quant_method": "compressed-tensors",
        "format": kind,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group | {"output_activations": None}},
    }


INTSCALE = CheckpointConfig(group_size=GROUP, ignore=IGNORE)
_GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True}
FORMATS = {
    "intscale": Format(INTSCALE.to_dict(), _intscale),
    "bf16": Format(None, _bf16),
    "fp8": Format(_compressed("float-quantized", 8, "float", "float"), _fp8),
    "w8a8_int8": Format(_compressed("int-quantized", 8, "int", "int"), _int8),
    "w4a16": Format(_compressed("pack-quantized", 4, "int", None), _packed),
    "w4a8_fp8": Format(_compressed("pack-quantized", 4, "int", "float"), _packed),
    "gptq": Format(_GPTQ | {"checkpoint_format": "gptq"}, _gptq),
}
