"""The linear layers that are compared: ours, and those of PyTorch, vLLM and humming.

Each peer takes the same bf16 weight `[N, K]`, quantizes it to its own scheme with its own helpers
(int4 in groups of 128, 8-bit with one scale per channel, rounded to nearest) and gives a `Layer`.
Activations are quantized by what vLLM runs in front of that kernel.

Written for vLLM 0.26 to 0.33 and humming 0.1.10 to 0.1.19. Everything foreign is imported where it
is used: a peer that is not installed is an error of that peer alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

GROUP = 128
BF16 = torch.bfloat16

Tensors = tuple[Tensor, ...]


class Layer(NamedTuple):
    """A weight in its kernel's layout, and how to multiply with it.

    quantize(x) and gemm(operands, weight) together are the layer: bf16 `[M, K]` to bf16 `[M, N]`.
    """

    weight: Tensors  # what one call reads; timing rotates through copies of it
    gemm: Callable[[Tensors, Tensors], Tensor]
    quantize: Callable[[Tensor], Tensors] | None = None  # None: the GEMM takes bf16 itself

    def operands(self, x: Tensor) -> Tensors:
        return self.quantize(x) if self.quantize else (x,)


class Peer(NamedTuple):
    prepare: Callable[[Tensor], Layer]
    limit: float  # of the relative error against bf16; a wrong layout or scale is far above


# ---- this package -------------------------------------------------------------------------------


def _accumulate(weight: Tensor, float_scale: bool) -> Layer:
    """Our kernel with the group scale on the partial sums, as integer or as float32 number.

    The paper's comparison: same tile, same everything else, K not split. Hopper only.
    """
    from vllm_intscale import cuda_backend, sm90_gemm
    from vllm_intscale.errors import IntScaleError
    from vllm_intscale.format import LayerScheme
    from vllm_intscale.packing import unpack_codes
    from vllm_intscale.quantize.rtn import quantize_rows

    if torch.cuda.get_device_capability()[0] != 9:
        raise IntScaleError("the kernel with a float scale exists for Hopper GPUs only")
    rows = quantize_rows("benchmark", weight, LayerScheme(4, GROUP), "channel")
    codes = unpack_codes(rows.qweight, 4)
    prepared = sm90_gemm.prepare_weight(codes, rows.group_scale, rows.channel_scale, "accumulate")

    def gemm(a: Tensors, w: Tensors) -> Tensor:
        blocks, unit, channel_scale = w
        out = a[0].new_empty(a[1].shape[0], channel_scale.shape[0], dtype=BF16)
        weight = (blocks, unit, channel_scale)
        a8, token_scale = a
        sm90_gemm.gemm(a8, token_scale, weight, None, out, 0, splits=1, float_scale=float_scale)
        return out

    return Layer(prepared, gemm, cuda_backend.quantize_activation)


def intscale(weight: Tensor, portable: bool = False, bits: int = 4) -> Layer:
    """What a linear layer runs on this GPU, or would on one that is not a Hopper ("portable")."""
    from vllm_intscale import cuda_backend
    from vllm_intscale.format import LayerScheme
    from vllm_intscale.quantize.rtn import quantize_rows

    rows = quantize_rows("benchmark", weight, LayerScheme(bits, GROUP), "channel")
    tensors = rows.qweight, rows.group_scale, rows.channel_scale
    if portable:
        prepared = cuda_backend.prepare_matrix(*tensors, "sm80")
    else:
        prepared = cuda_backend.prepare_weight(*tensors, bits)

    def gemm(a: Tensors, w: Tensors) -> Tensor:
        a8, token_scale = a
        qweight, group_scale, channel_scale = w
        return cuda_backend.gemm(a8, token_scale, qweight, group_scale, channel_scale, None, BF16)

    return Layer(prepared, gemm, cuda_backend.quantize_activation)


# ---- bf16 and 8-bit weights ---------------------------------------------------------------------


def bf16(weight: Tensor) -> Layer:
    return Layer((weight,), lambda a, w: torch.mm(a[0], w[0].t()))


def _cutlass_8bit(weight: Tensor, quantize: Callable[[Tensor], Tensors]) -> Layer:
    from vllm import _custom_ops as ops

    def gemm(a: Tensors, w: Tensors) -> Tensor:
        y: Tensor = ops.cutlass_scaled_mm(a[0], w[0].t(), a[1], w[1], BF16)
        return y

    return Layer(quantize(weight), gemm, quantize)  # a channel of weights is a row, as a token is


def int8_rows(x: Tensor) -> Tensors:
    from vllm import _custom_ops as ops

    codes, scale, _ = ops.scaled_int8_quant(x)
    return codes, scale


def fp8_rows(x: Tensor) -> Tensors:
    from vllm import _custom_ops as ops

    codes, scale = ops.scaled_fp8_quant(x, use_per_token_if_dynamic=True)
    return codes, scale


# ---- int4 weights in vLLM -----------------------------------------------------------------------


def int4_weight(weight: Tensor, code_type: Any) -> tuple[Tensor, Tensor]:
    """vLLM's rounding to nearest, and its packing of eight codes along K into a word.

    Returns int32 `[K/8, N]`, column-major, and bf16 scales `[K/128, N]`.
    """
    from vllm.model_executor.layers.quantization.utils.quant_utils import (
        pack_quantized_values_into_int32,
        quantize_weights,
    )

    _, codes, scale, _ = quantize_weights(weight.t(), code_type, GROUP)
    packed = pack_quantized_values_into_int32(codes, code_type, packed_dim=0)
    return packed.t().contiguous().t(), scale


def accepted(function: Callable[..., Any], **arguments: Any) -> dict[str, Any]:
    """Those of the arguments that this version of the function has."""
    names = inspect.signature(function).parameters
    return {name: value for name, value in arguments.items() if name in names}


def _marlin(weight: Tensor, int8: bool) -> Layer:
    from vllm import _custom_ops as ops
    from vllm.model_executor.layers.quantization.utils import marlin_utils
    from vllm.scalar_type import scalar_types

    n, k = weight.shape
    packed, scale = int4_weight(weight, scalar_types.uint4b8)
    empty = torch.empty(0, dtype=torch.int32, device=weight.device)
    packed = ops.gptq_marlin_repack(
        packed.contiguous(),
        size_k=k,
        size_n=n,
        num_bits=4,
        is_a_8bit=int8,
        **accepted(ops.gptq_marlin_repack, perm=empty),
    )
    scale = marlin_utils.marlin_permute_scales(scale, k, n, GROUP, int8)
    if int8:  # integer scales, and one factor for the whole tensor
        scale, factor = marlin_utils.marlin_act_int8_process_scales(scale)
    workspace = marlin_utils.marlin_make_workspace_new(weight.device)
    # The order of activations is gone from newer versions.
    order = accepted(ops.marlin_gemm, g_idx=empty, perm=empty, is_k_full=True)

    def quantize(x: Tensor) -> Tensors:
        codes, token_scale = marlin_utils.marlin_quant_input(x, torch.int8)
        return codes, token_scale * factor

    def gemm(a: Tensors, w: Tensors) -> Tensor:
        y: Tensor = ops.marlin_gemm(
            a=a[0],
            c=None,
            b_q_weight=w[0],
            b_bias=None,
            b_scales=w[1],
            a_scales=a[1] if int8 else None,
            global_scale=None,
            b_zeros=None,
            workspace=workspace,
            b_q_type=scalar_types.uint4b8,
            size_m=a[0].shape[0],
            size_n=n,
            size_k=k,
            use_atomic_add=False,
            use_fp32_reduce=True,
            is_zp_float=False,
            **order,
        )
        return y

    return Layer((packed, scale), gemm, quantize if int8 else None)


def machete_w4a16(weight: Tensor) -> Layer:
    from vllm import _custom_ops as ops
    from vllm.scalar_type import scalar_types

    packed, scale = int4_weight(weight, scalar_types.uint4b8)
    packed = ops.machete_prepack_B(packed, BF16, scalar_types.uint4b8, BF16)

    def gemm(a: Tensors, w: Tensors) -> Tensor:
        y: Tensor = ops.machete_mm(a[0], w[0], scalar_types.uint4b8, BF16, w[1], None, GROUP)
        return y

    return Layer((packed, scale), gemm)


def cutlass_w4a8_fp8(weight: Tensor) -> Layer:
    from vllm import _custom_ops as ops
    from vllm.model_executor.layers.quantization.utils.quant_utils import convert_bf16_scales_to_fp8
    from vllm.scalar_type import scalar_types

    packed, scale = int4_weight(weight, scalar_types.int4)
    packed = ops.cutlass_encode_and_reorder_int4b(packed)
    fp8_scale, channel_scale = convert_bf16_scales_to_fp8(fp8_rows, scale.t().contiguous())
    fp8_scale = ops.cutlass_pack_scale_fp8(fp8_scale.t().contiguous())

    def gemm(a: Tensors, w: Tensors) -> Tensor:
        y: Tensor = ops.cutlass_w4a8_mm(a[0], w[0], w[1], GROUP, w[2], a[1])
        return y

    return Layer((packed, fp8_scale, channel_scale), gemm, fp8_rows)


# ---- humming ------------------------------------------------------------------------------------


def _humming(weight: Tensor, activation: str | None, integer_scale: bool = False) -> Layer:
    from humming.layer import HummingLayer, HummingMethod

    n, k = weight.shape
    # humming itself rounds the scales to integers for int8 activations and groups of one channel;
    # where the latter is left to its default, scales stay bf16.
    scheme: dict[str, Any] = {"dtype": "uint4", "group_size": GROUP}
    if integer_scale:
        scheme["group_size_n"] = 1
    layer = HummingLayer(
        shape_n=n,
        shape_k=k,
        weight_config=scheme,
        input_config={"dtype": activation} if activation else None,
        torch_dtype=BF16,
    ).to(weight.device)
    layer.load_from_unquantized(weight)
    layer.transform()
    if bool(layer.humming_metas[""].use_int_weight_scale) != integer_scale:
        raise RuntimeError(f"this humming cannot be asked for {integer_scale=}")
    tensors = {name: parameter.data for name, parameter in layer.named_parameters()}
    for name in tensors:
        delattr(layer, name)  # a parameter could not be replaced by a tensor

    def quantize(x: Tensor) -> Tensors:
        codes, token_scale = HummingMethod.may_quant_input(layer, x)
        return codes, token_scale

    def gemm(a: Tensors, w: Tensors) -> Tensor:
        # The layer looks its tensors up at each call, so that one layer serves all copies.
        for name, tensor in zip(tensors, w, strict=True):
            setattr(layer, name, tensor)
        y: Tensor = layer(a[0], input_scale=a[1]) if activation else layer(a[0])
        return y

    return Layer(tuple(tensors.values()), gemm, quantize if activation else None)


# A relative error of 8-bit weights and activations is 0.013 (int8) or 0.038 (fp8) on Gaussian
# values, of int4 weights 0.11 to 0.12.
PEERS: dict[str, Peer] = {
    "intscale": Peer(intscale, 0.2),
    "intscale_w8a8": Peer(partial(intscale, bits=8), 0.03),
    "intscale_portable": Peer(partial(intscale, portable=True), 0.2),
    "intscale_integer_scale": Peer(partial(_accumulate, float_scale=False), 0.2),
    "intscale_float_scale": Peer(partial(_accumulate, float_scale=True), 0.2),
    "bf16": Peer(bf16, 0.005),
    "cutlass_int8": Peer(partial(_cutlass_8bit, quantize=int8_rows), 0.02),
    "cutlass_fp8": Peer(partial(_cutlass_8bit, quantize=fp8_rows), 0.05),
    "marlin_w4a16": Peer(partial(_marlin, int8=False), 0.2),
    "marlin_w4a8_int8": Peer(partial(_marlin, int8=True), 0.2),
    "machete_w4a16": Peer(machete_w4a16, 0.2),
    "cutlass_w4a8_fp8": Peer(cutlass_w4a8_fp8, 0.2),
    "humming_w4a8_int8": Peer(partial(_humming, activation="int8", integer_scale=True), 0.2),
    "humming_w4a8_int8_float_scale": Peer(partial(_humming, activation="int8"), 0.2),
    "humming_w4a8_fp8": Peer(partial(_humming, activation="float8e4m3"), 0.2),
    "humming_w4a16": Peer(partial(_humming, activation=None), 0.2),
}


def probe_error(y: Tensor, reference: Tensor) -> float:
    """||y - reference|| / ||reference||; NaN if y holds one."""
    wanted = reference.float()
    return float(torch.linalg.vector_norm(y.float() - wanted) / torch.linalg.vector_norm(wanted))
