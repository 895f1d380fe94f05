"""The layers of experts that are compared: ours, and those of vLLM and humming.

Each peer takes the same bf16 weights w13 `[E, 2 I, H]` (gate first) and w2 `[E, H, I]` and
quantizes them to its own scheme with its own helpers, as `peers` does for linear layers. Written
for vLLM 0.26 to 0.33; what a version does not have is an error of that peer alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vllm_intscale.bench.peers import (
    BF16,
    GROUP,
    Tensors,
    accepted,
    fp8_rows,
    int4_weight,
    int8_rows,
)


class ExpertLayer(NamedTuple):
    """forward(x `[M, H]`, topk_weights float32 `[M, topk]`, topk_ids int32) to `[M, H]`."""

    weight: Tensors
    forward: Callable[[Tensor, Tensor, Tensor], Tensor]


class ExpertPeer(NamedTuple):
    prepare: Callable[[Tensor, Tensor, int], ExpertLayer]  # w13, w2, topk
    limit: float  # of the relative error against bf16


def each_expert(stack: Tensor, prepare: Callable[[Tensor], Tensors]) -> Tensors:
    """`prepare` of each matrix, stacked."""
    return tuple(torch.stack(parts) for parts in zip(*map(prepare, stack), strict=True))


# ---- this package -------------------------------------------------------------------------------


def intscale(w13: Tensor, w2: Tensor, topk: int, portable: bool = False) -> ExpertLayer:
    """What experts run on this GPU, or would on one that is not a Hopper ("portable")."""
    from vllm_intscale import cuda_backend
    from vllm_intscale.format import LayerScheme
    from vllm_intscale.quantize.rtn import quantize_rows

    def quantize(weight: Tensor) -> Tensors:
        rows = quantize_rows("benchmark", weight, LayerScheme(4, GROUP), "channel")
        return rows.qweight, rows.group_scale, rows.channel_scale

    def prepare(stack: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        qweight, group_scale, channel_scale = each_expert(stack, quantize)
        if portable:
            return cuda_backend.prepare_stack(qweight, group_scale, channel_scale, "sm80")
        return cuda_backend.prepare_weight(qweight, group_scale, channel_scale)

    first, second = prepare(w13), prepare(w2)

    def forward(x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        return cuda_backend.moe(x, first, second, weights, ids, None, False)

    return ExpertLayer((*first, *second), forward)


# ---- Triton -------------------------------------------------------------------------------------


def _triton(w13: Tensor, w2: Tensor, topk: int, scheme: str) -> ExpertLayer:
    from vllm.model_executor.layers.fused_moe import config
    from vllm.model_executor.layers.fused_moe.fused_moe import fused_experts

    quant_config, weight = None, (w13, w2)
    if scheme != "bf16":
        quantize = int8_rows if scheme == "int8" else fp8_rows
        (first, scale1), (second, scale2) = (each_expert(w, quantize) for w in weight)
        weight = (first, second)
        scales = {"w1_scale": scale1, "w2_scale": scale2, "a1_scale": None, "a2_scale": None}
        make = getattr(config, f"{scheme}_w8a8_moe_quant_config")
        quant_config = make(**scales, per_act_token_quant=True)

    def forward(x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        y: Tensor = fused_experts(x, *weight, weights, ids, quant_config=quant_config)
        return y

    return ExpertLayer(weight, forward)


# ---- Marlin -------------------------------------------------------------------------------------


def _marlin(w13: Tensor, w2: Tensor, topk: int, int8: bool) -> ExpertLayer:
    from vllm import _custom_ops as ops
    from vllm.model_executor.layers.fused_moe.experts.marlin_moe import fused_marlin_moe
    from vllm.model_executor.layers.quantization.utils import marlin_utils
    from vllm.scalar_type import scalar_types

    def repack(weight: Tensor) -> Tensors:
        n, k = weight.shape
        packed, scale = int4_weight(weight, scalar_types.uint4b8)
        empty = torch.empty(0, dtype=torch.int32, device=weight.device)
        options = accepted(ops.gptq_marlin_repack, perm=empty)
        packed = ops.gptq_marlin_repack(
            packed.contiguous(), size_k=k, size_n=n, num_bits=4, is_a_8bit=int8, **options
        )
        return packed, marlin_utils.marlin_permute_scales(scale, k, n, GROUP, int8)

    (first, scale1), (second, scale2) = (each_expert(w, repack) for w in (w13, w2))
    options: dict[str, Any] = {}
    if int8:  # integer scales, and one factor for each stack
        scale1, factor1 = marlin_utils.marlin_act_int8_process_scales(scale1)
        scale2, factor2 = marlin_utils.marlin_act_int8_process_scales(scale2)
        options = {"input_global_scale1": factor1, "input_global_scale2": factor2}
        options["input_dtype"] = torch.int8
    workspace = marlin_utils.marlin_make_workspace_new(w13.device, 4)

    def forward(x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        y: Tensor = fused_marlin_moe(
            hidden_states=x,
            w1=first,
            w2=second,
            bias1=None,
            bias2=None,
            w1_scale=scale1,
            w2_scale=scale2,
            topk_weights=weights,
            topk_ids=ids,
            quant_type_id=scalar_types.uint4b8.id,
            workspace=workspace,
            **options,
        )
        return y

    return ExpertLayer((first, scale1, second, scale2), forward)


# ---- CUTLASS ------------------------------------------------------------------------------------


def _modular(
    w13: Tensor, w2: Tensor, topk: int, make_experts: Callable[[Any], Any], quant_config: Any
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """vLLM's kernel of one GPU around these experts, for weights as they take them."""
    from vllm.model_executor.layers.fused_moe import all2all_utils, config, modular_kernel
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.v1.worker import workspace

    experts, hidden, inner = w2.shape
    sizes = {
        "num_experts": experts,
        "experts_per_token": topk,
        "hidden_dim": hidden,
        "intermediate_size": inner,
        "num_local_experts": experts,
        "num_logical_experts": experts,
    }
    moe_config = config.FusedMoEConfig(
        **sizes,
        activation=MoEActivation.SILU,
        device="cuda",
        routing_method=config.RoutingMethodType.Renormalize,
        moe_parallel_config=config.FusedMoEParallelConfig.make_no_parallel(),
        in_dtype=BF16,
        max_num_tokens=8192,
    )
    if not workspace.is_workspace_manager_initialized():
        workspace.init_workspace_manager(w13.device)
    finalize = all2all_utils.maybe_make_prepare_finalize(
        moe=moe_config, quant_config=quant_config, routing_tables=None, allow_new_interface=True
    )
    kernel = modular_kernel.FusedMoEKernel(finalize, make_experts(moe_config))

    def forward(first: Tensor, second: Tensor, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        y: Tensor = kernel.apply(
            hidden_states=x,
            w1=first,
            w2=second,
            topk_weights=weights,
            topk_ids=ids,
            activation=MoEActivation.SILU,
            global_num_experts=experts,
            expert_map=None,
            apply_router_weight_on_input=False,
        )
        return y

    return forward  # type: ignore[return-value]


def cutlass_fp8(w13: Tensor, w2: Tensor, topk: int) -> ExpertLayer:
    from vllm.model_executor.layers.fused_moe import config
    from vllm.model_executor.layers.fused_moe.experts.cutlass_moe import CutlassExpertsFp8

    (first, scale1), (second, scale2) = (each_expert(w, fp8_rows) for w in (w13, w2))
    quant_config = config.fp8_w8a8_moe_quant_config(
        w1_scale=scale1, w2_scale=scale2, per_act_token_quant=True, per_out_ch_quant=True
    )

    def make(moe_config: Any) -> Any:
        return CutlassExpertsFp8(moe_config=moe_config, quant_config=quant_config)

    forward = _modular(w13, w2, topk, make, quant_config)
    return ExpertLayer((first, scale1, second, scale2), partial(forward, first, second))


def cutlass_w4a8_fp8(w13: Tensor, w2: Tensor, topk: int) -> ExpertLayer:
    from vllm import _custom_ops as ops
    from vllm.model_executor.layers.fused_moe import config
    from vllm.model_executor.layers.fused_moe.experts.cutlass_moe import CutlassExpertsW4A8Fp8
    from vllm.model_executor.layers.quantization.utils.quant_utils import convert_bf16_scales_to_fp8
    from vllm.scalar_type import scalar_types

    def pack(weight: Tensor) -> Tensors:  # [N, K / 8], fp8 [K / 128, N], float32 [N, 1]
        packed, scale = int4_weight(weight, scalar_types.int4)
        scale, channel = convert_bf16_scales_to_fp8(fp8_rows, scale.t().contiguous())
        return packed.t().contiguous(), scale.t().contiguous(), channel

    def prepare(stack: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        packed, scale, channel = each_expert(stack, pack)
        packed, strides = ops.cutlass_encode_and_reorder_int4b_grouped(packed)
        return packed, ops.cutlass_pack_scale_fp8(scale), channel, strides

    first, scale1, channel1, strides1 = prepare(w13)
    second, scale2, channel2, strides2 = prepare(w2)
    quant_config = config.int4_w4afp8_moe_quant_config(
        w1_scale=scale1,
        w2_scale=scale2,
        g1_alphas=channel1,
        g2_alphas=channel2,
        per_act_token_quant=True,
        per_out_ch_quant=True,
    )

    def make(moe_config: Any) -> Any:
        return CutlassExpertsW4A8Fp8(moe_config, quant_config, strides1, strides2, GROUP)

    forward = _modular(w13, w2, topk, make, quant_config)
    weight = (first, scale1, channel1, second, scale2, channel2)
    return ExpertLayer(weight, partial(forward, first, second))


# ---- humming ------------------------------------------------------------------------------------


def _humming(
    w13: Tensor, w2: Tensor, topk: int, activation: str | None, integer_scale: bool = False
) -> ExpertLayer:
    """As vLLM's `HummingIndexedExperts` calls it, but rows are aligned for each GEMM.

    vLLM 0.26 aligns once, and the second GEMM goes wrong where its blocks have another size.
    """
    from humming.config import GemmType
    from humming.layer import HummingLayer, HummingMethod
    from vllm.model_executor.layers.fused_moe.moe_align_block_size import moe_align_block_size
    from vllm.model_executor.layers.fused_moe.moe_fused_mul_sum import moe_fused_mul_sum

    experts, hidden, inner = w2.shape
    compute = {"use_batch_invariant": False, "use_f16_accum": False}
    compute["gemm_type"] = GemmType.INDEXED.value

    def load(weight: Tensor) -> tuple[Any, list[Any]]:
        scheme: dict[str, Any] = {"dtype": "uint4", "group_size": GROUP}
        if integer_scale:
            scheme["group_size_n"] = 1
        layer = HummingLayer(
            shape_n=weight.shape[1],
            shape_k=weight.shape[2],
            weight_config=scheme,
            input_config={"dtype": activation} if activation else None,
            num_experts=experts,
            torch_dtype=BF16,
        ).to(weight.device)
        layer.load_from_unquantized(weight)
        layer.transform()
        if bool(layer.humming_metas[""].use_int_weight_scale) != integer_scale:
            raise RuntimeError(f"this humming cannot be asked for {integer_scale=}")
        tuning = HummingMethod.get_default_tuning_configs(layer, gemm_type=GemmType.INDEXED)
        return layer, tuning

    (first, tuning1), (second, tuning2) = load(w13), load(w2)
    compute_text, texts = json.dumps(compute), (json.dumps(tuning1), json.dumps(tuning2))

    def align(ids: Tensor, block: int) -> dict[str, Tensor]:
        aligned = moe_align_block_size(ids, block, experts, None, ignore_invalid_experts=True)
        return dict(zip(("sorted_ids", "expert_ids", "num_tokens_padded"), aligned, strict=True))

    def forward(x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        m, slots = x.shape[0], ids.numel()
        block1, block2 = (
            next(c["block_shape"][0] for low, high, c in tuning if low < slots <= high)
            for tuning in (tuning1, tuning2)
        )
        aligned = align(ids, block1)
        common = {"compute_config": compute_text, "valid_shape_m": slots}
        gate_up, y = x.new_empty(slots, 2 * inner), x.new_empty(slots, hidden)
        inputs, scale = HummingMethod.may_quant_input(first, x)
        options = {"input_scale": scale, "top_k": topk, "tuning_config": texts[0]} | common
        options |= aligned
        first(inputs, outputs=gate_up, **options)
        hidden_states = x.new_empty(slots, inner)
        torch.ops._C.silu_and_mul(hidden_states, gate_up)
        inputs, scale = HummingMethod.may_quant_input(second, hidden_states)
        options = {"input_scale": scale, "top_k": 1, "tuning_config": texts[1]} | common
        options |= aligned if block1 == block2 else align(ids, block2)
        second(inputs, outputs=y, **options)
        out = torch.empty_like(x)
        y = y.view(m, topk, hidden)
        moe_fused_mul_sum(
            inputs=y, topk_weights=weights, topk_ids=ids, expert_map=None, outputs=out
        )
        return out

    tensors = (p.data for layer in (first, second) for _, p in layer.named_parameters())
    return ExpertLayer(tuple(tensors), forward)


# Both GEMMs of a layer add to the error: sqrt(2) times that of a linear layer, about.
PEERS: dict[str, ExpertPeer] = {
    "intscale": ExpertPeer(intscale, 0.3),
    "intscale_portable": ExpertPeer(partial(intscale, portable=True), 0.3),
    "triton_bf16": ExpertPeer(partial(_triton, scheme="bf16"), 0.01),
    "triton_int8": ExpertPeer(partial(_triton, scheme="int8"), 0.05),
    "triton_fp8": ExpertPeer(partial(_triton, scheme="fp8"), 0.1),
    "cutlass_fp8": ExpertPeer(cutlass_fp8, 0.1),
    "cutlass_w4a8_fp8": ExpertPeer(cutlass_w4a8_fp8, 0.3),
    "marlin_w4a16": ExpertPeer(partial(_marlin, int8=False), 0.3),
    "marlin_w4a8_int8": ExpertPeer(partial(_marlin, int8=True), 0.3),
    "humming_w4a16": ExpertPeer(partial(_humming, activation=None), 0.3),
    "humming_w4a8_int8": ExpertPeer(partial(_humming, activation="int8", integer_scale=True), 0.3),
    "humming_w4a8_fp8": ExpertPeer(partial(_humming, activation="float8e4m3"), 0.3),
}
