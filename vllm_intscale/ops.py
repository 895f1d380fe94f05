"""The torch operators `torch.ops.intscale.*`, on CPU and CUDA, with fakes for torch.compile.

    quantize_activation   x [M, K] -> a8 int8 (CPU: [M, K]; CUDA: tiles), token_scale float32 [M]
    norm_quantize         addends, weight -> a8, token_scale, the normed sum, the sum
    all_reduce_norm_quantize   the same; the last addend is a rank's part of a sum, which is added
    silu_mul_quantize     gate_up [M, 2 K] -> a8, token_scale of silu(gate) * up
    rotary_embedding      qkv, positions, cos_sin_cache -> q, k, rotated
    gemm                  a8, token_scale, weight, bias -> y [M, N]
    moe                   x [M, H], w13, w2, routing -> y [M, H]

All equal `reference` bit for bit, on Hopper that of the folded weight. Weights are stored in the
layout of the device they run on (`prepare_weight`): on CUDA tiles for the tensor cores
(`cuda_backend`), on CPU int8 digits (`cpu_backend`). A stack of experts has one more leading
dimension on every tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from vllm_intscale import cpu_backend


def _backend(tensor: Tensor) -> ModuleType:
    """CUDA's is imported when it is needed: importing CuPy is neither light nor always possible."""
    if not tensor.is_cuda:
        return cpu_backend
    from vllm_intscale import cuda_backend

    return cuda_backend


def describe(qweight: Tensor, group_scale: Tensor) -> str:
    """What runs a prepared weight, for the log."""
    description: str = _backend(qweight).describe(qweight, group_scale)
    return description


def prepare_weight(
    qweight: Tensor,
    group_scale: Tensor,
    channel_scale: Tensor,
    bits: int = 4,
    agree: Callable[[bool], bool] = bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Checkpoint layout to the layout that the operators take on the tensors' device.

    agree: tells whether what holds for this stack of experts holds on all ranks, for a layout that
    they must have in common.
    """
    prepare = _backend(qweight).prepare_weight
    prepared: tuple[Tensor, Tensor, Tensor] = prepare(
        qweight, group_scale, channel_scale, bits, agree
    )
    return prepared


def integer_weight(qweight: Tensor, group_scale: Tensor, n: int, k: int) -> Tensor:
    """The integers that channel_scale multiplies, int32 `[N, K]`, of a prepared weight."""
    weight: Tensor = _backend(qweight).integer_weight(qweight, group_scale, n, k)
    return weight


def _on_cuda(name: str) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        from vllm_intscale import cuda_backend

        return getattr(cuda_backend, name)(*args)

    return call


def _quantize_activation_fake(x: Tensor) -> tuple[Tensor, Tensor]:
    m, k = x.shape
    shape = (-(-k // 128), -(-m // 8) * 8, 128) if x.is_cuda else (m, k)
    return x.new_empty(shape, dtype=torch.int8), x.new_empty(m, dtype=torch.float32)


def _norm_quantize_fake(
    addends: list[Tensor], weight: Tensor, epsilon: float, keep_norm: bool, keep_sum: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = addends[0]
    kept = (x.new_empty(x.shape if wanted else 0) for wanted in (keep_norm, keep_sum))
    return (*_quantize_activation_fake(x), *kept)  # type: ignore[return-value]


def _all_reduce_norm_quantize_fake(
    addends: list[Tensor],
    weight: Tensor,
    epsilon: float,
    keep_norm: bool,
    keep_sum: bool,
    group_name: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    norm = _norm_quantize_fake(addends, weight, epsilon, keep_norm, keep_sum)
    return *norm, torch.empty_like(addends[-1])


def _silu_mul_quantize_fake(gate_up: Tensor) -> tuple[Tensor, Tensor]:
    return _quantize_activation_fake(gate_up[:, : gate_up.shape[1] // 2])


def _rotary_embedding_fake(
    qkv: Tensor, positions: Tensor, cos_sin_cache: Tensor, q_heads: int, k_heads: int
) -> tuple[Tensor, Tensor]:
    m, head_size = qkv.shape[0], cos_sin_cache.shape[1]
    return qkv.new_empty(m, q_heads, head_size), qkv.new_empty(m, k_heads, head_size)


def _gemm_fake(
    a8: Tensor,
    token_scale: Tensor,
    qweight: Tensor,
    group_scale: Tensor,
    channel_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    return a8.new_empty(token_scale.shape[0], channel_scale.shape[0], dtype=dtype)


def _moe_fake(x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x)


_OPERATORS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "quantize_activation(Tensor x) -> (Tensor, Tensor)": (
        cpu_backend.quantize_activation,
        _quantize_activation_fake,
    ),
    "norm_quantize(Tensor[] addends, Tensor weight, float epsilon, bool keep_norm, bool keep_sum) "
    "-> (Tensor, Tensor, Tensor, Tensor)": (cpu_backend.norm_quantize, _norm_quantize_fake),
    "all_reduce_norm_quantize(Tensor[] addends, Tensor weight, float epsilon, bool keep_norm, "
    "bool keep_sum, str group_name) -> (Tensor, Tensor, Tensor, Tensor, Tensor)": (
        cpu_backend.all_reduce_norm_quantize,
        _all_reduce_norm_quantize_fake,
    ),
    "silu_mul_quantize(Tensor gate_up) -> (Tensor, Tensor)": (
        cpu_backend.silu_mul_quantize,
        _silu_mul_quantize_fake,
    ),
    "rotary_embedding(Tensor qkv, Tensor positions, Tensor cos_sin_cache, int q_heads, "
    "int k_heads) -> (Tensor, Tensor)": (cpu_backend.rotary_embedding, _rotary_embedding_fake),
    "gemm(Tensor a8, Tensor token_scale, Tensor qweight, Tensor group_scale, "
    "Tensor channel_scale, Tensor? bias, ScalarType dtype) -> Tensor": (
        cpu_backend.gemm,
        _gemm_fake,
    ),
    "moe(Tensor x, Tensor[] w13, Tensor[] w2, Tensor topk_weights, Tensor topk_ids, "
    "Tensor? expert_map, bool router_weight_on_input) -> Tensor": (cpu_backend.moe, _moe_fake),
}

_library = torch.library.Library("intscale", "DEF")
for _schema, (_cpu, _fake) in _OPERATORS.items():
    _name = _schema.partition("(")[0]
    _library.define(_schema)
    _library.impl(_name, _cpu, "CPU")
    _library.impl(_name, _on_cuda(_name), "CUDA")
    torch.library.register_fake(f"intscale::{_name}", _fake, lib=_library)

quantize_activation = torch.ops.intscale.quantize_activation
norm_quantize = torch.ops.intscale.norm_quantize
all_reduce_norm_quantize = torch.ops.intscale.all_reduce_norm_quantize
silu_mul_quantize = torch.ops.intscale.silu_mul_quantize
rotary_embedding = torch.ops.intscale.rotary_embedding
gemm = torch.ops.intscale.gemm
moe = torch.ops.intscale.moe
