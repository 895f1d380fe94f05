"""The torch operators `torch.ops.intscale.*`, on CPU and CUDA, with fakes for torch.compile.

On CPU they evaluate `reference` itself; on CUDA they launch the kernels of `cuda/` through
`cuda_backend`. Weights are stored in the layout of the device they run on (`prepare_weight`):

    CPU    the checkpoint's own: qweight int32 [N, K * bits / 32], group_scale int16 [N, K / g]
    CUDA   tiles for the tensor cores, see `cuda_backend.prepare_weight`

A stack of experts has one more leading dimension on every tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vllm_intscale import reference
from vllm_intscale.packing import unpack_codes

# Rows of a weight that the CPU path unpacks at a time: bounds the memory of its float64 copy.
CPU_BLOCK_ELEMENTS = 1 << 24


def prepare_weight(qweight: Tensor, group_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Checkpoint layout to the layout that the operators take on the tensors' device."""
    if qweight.is_cuda:
        from vllm_intscale import cuda_backend

        return cuda_backend.prepare_weight(qweight, group_scale)
    return qweight, group_scale


def restore_weight(qweight: Tensor, group_scale: Tensor, n: int, k: int) -> tuple[Tensor, Tensor]:
    """Inverse of `prepare_weight` for a weight of N x K."""
    if qweight.is_cuda:
        from vllm_intscale import cuda_backend

        return cuda_backend.restore_weight(qweight, group_scale, n, k)
    return qweight, group_scale


def _gemm_cpu(
    a8: Tensor,
    token_scale: Tensor,
    qweight: Tensor,
    group_scale: Tensor,
    channel_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    k = a8.shape[1]
    bits = 32 * qweight.shape[1] // k
    out = torch.empty(a8.shape[0], qweight.shape[0], dtype=dtype)
    step = max(1, CPU_BLOCK_ELEMENTS // k)
    for start in range(0, qweight.shape[0], step):
        rows = slice(start, start + step)
        weight = reference.Weight(
            unpack_codes(qweight[rows], bits), group_scale[rows], channel_scale[rows]
        )
        part = None if bias is None else bias[rows]
        out[:, rows] = reference.gemm(a8, token_scale, weight, part, dtype)
    return out


def _moe_cpu(
    x: Tensor,
    w13: list[Tensor],
    w2: list[Tensor],
    topk_weights: Tensor,
    topk_ids: Tensor,
    expert_map: Tensor | None,
    router_weight_on_input: bool,
) -> Tensor:
    hidden, inner = x.shape[1], w13[0].shape[1] // 2

    def unpack(weight: list[Tensor], expert: int, k: int) -> reference.Weight:
        qweight, group_scale, channel_scale = (t[expert] for t in weight)
        codes = unpack_codes(qweight, 32 * qweight.shape[1] // k)
        return reference.Weight(codes, group_scale, channel_scale)

    return reference.moe(
        x,
        lambda expert: (unpack(w13, expert, hidden), unpack(w2, expert, inner)),
        topk_weights,
        topk_ids,
        expert_map,
        router_weight_on_input,
    )


def _cuda(name: str) -> Callable[..., Any]:
    """The CUDA implementation, imported at its first call: importing CuPy is neither light nor
    possible everywhere."""

    def call(*args: object) -> Any:
        from vllm_intscale import cuda_backend

        return getattr(cuda_backend, name)(*args)

    return call


def _quantize_activation_fake(x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, dtype=torch.int8), x.new_empty(x.shape[0], dtype=torch.float32)


def _gemm_fake(
    a8: Tensor,
    token_scale: Tensor,
    qweight: Tensor,
    group_scale: Tensor,
    channel_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    return a8.new_empty(a8.shape[0], channel_scale.shape[0], dtype=dtype)


def _moe_fake(x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x)


_OPERATORS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "quantize_activation(Tensor x) -> (Tensor, Tensor)": (
        reference.quantize_activation,
        _quantize_activation_fake,
    ),
    "gemm(Tensor a8, Tensor token_scale, Tensor qweight, Tensor group_scale, "
    "Tensor channel_scale, Tensor? bias, ScalarType dtype) -> Tensor": (_gemm_cpu, _gemm_fake),
    "moe(Tensor x, Tensor[] w13, Tensor[] w2, Tensor topk_weights, Tensor topk_ids, "
    "Tensor? expert_map, bool router_weight_on_input) -> Tensor": (_moe_cpu, _moe_fake),
}

_library = torch.library.Library("intscale", "DEF")
for _schema, (_cpu, _fake) in _OPERATORS.items():
    _name = _schema.partition("(")[0]
    _library.define(_schema)
    _library.impl(_name, _cpu, "CPU")
    _library.impl(_name, _cuda(_name), "CUDA")
    torch.library.register_fake(f"intscale::{_name}", _fake, lib=_library)

quantize_activation = torch.ops.intscale.quantize_activation
gemm = torch.ops.intscale.gemm
moe = torch.ops.intscale.moe
