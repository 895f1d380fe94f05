"""Experts for vLLM's modular kernel, which takes tokens to the ranks of their experts (all2all).

Without data parallelism tokens stay where they are, and `IntScaleMoEMethod` calls `ops.moe`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from vllm.model_executor.layers.fused_moe import (
    FusedMoEActivationFormat,
    FusedMoEConfig,
    FusedMoEExpertsModular,
)
from vllm.model_executor.layers.fused_moe.all2all_utils import maybe_make_prepare_finalize
from vllm.model_executor.layers.fused_moe.config import FUSED_MOE_UNQUANTIZED_CONFIG
from vllm.model_executor.layers.fused_moe.modular_kernel import FusedMoEKernel
from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import TopKWeightAndReduceNoOP

from vllm_intscale import cuda_backend
from vllm_intscale.errors import IntScaleError
from vllm_intscale.routing import grouped_rows


def make_kernel(moe: FusedMoEConfig, layer: Any) -> FusedMoEKernel:
    """The experts of a `RoutedExperts` layer behind the all2all that vLLM was started with.

    Raises IntScaleError for one that vLLM does not know, or that batches tokens by expert.
    """
    prepare_finalize = maybe_make_prepare_finalize(
        moe=moe,
        quant_config=FUSED_MOE_UNQUANTIZED_CONFIG,
        routing_tables=layer._expert_routing_tables(),
        allow_new_interface=True,
    )
    wanted = IntScaleExperts.activation_format()
    if prepare_finalize is None or prepare_finalize.activation_format != wanted:
        raise IntScaleError(
            f"--all2all-backend {moe.moe_parallel_config.all2all_backend} does not leave tokens in "
            "their order, which intscale needs; use allgather_reducescatter or "
            "deepep_high_throughput"
        )
    return FusedMoEKernel(prepare_finalize, IntScaleExperts(moe, layer))


class IntScaleExperts(FusedMoEExpertsModular):  # type: ignore[misc]
    """`cuda_backend.moe` of a layer in vLLM's workspaces, on tokens that are not quantized yet."""

    def __init__(self, moe: FusedMoEConfig, layer: Any) -> None:
        super().__init__(moe, FUSED_MOE_UNQUANTIZED_CONFIG)
        self.layer = layer

    @staticmethod
    def activation_format() -> FusedMoEActivationFormat:
        return FusedMoEActivationFormat.Standard

    # What vLLM asks before it chooses one of several implementations; here there is one.

    @staticmethod
    def _supports_current_device() -> bool:
        return True

    @staticmethod
    def _supports_no_act_and_mul() -> bool:
        return False

    @staticmethod
    def _supports_quant_scheme(weight_key: object, activation_key: object) -> bool:
        return True

    @staticmethod
    def _supports_activation(activation: Any) -> bool:
        return bool(activation.value == "silu")

    @staticmethod
    def _supports_parallel_config(moe_parallel_config: object) -> bool:
        return True

    @property
    def expects_unquantized_inputs(self) -> bool:
        return True

    def moe_problem_size(
        self, a1: Tensor, w1: Tensor, w2: Tensor, topk_ids: Tensor
    ) -> tuple[int, int, int, int, int]:
        """E, M, N = 2 I, K = H, topk; prepared weights do not show them."""
        (m, k), (experts, n) = a1.shape, self.layer.w13_channel_scale.shape
        return experts, m, n, k, topk_ids.shape[1]

    def workspace_shapes(
        self,
        M: int,
        N: int,
        K: int,
        topk: int,
        global_num_experts: int,
        local_num_experts: int,
        expert_tokens_meta: object,
        activation: object,
    ) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Of the first GEMM's output, of the second one's, and of the sum, [M, K].

        The sum lies where the first one did.
        """
        rows = grouped_rows(M * topk, local_num_experts)
        return (rows, N), (rows, K), (M, K)

    def finalize_weight_and_reduce_impl(self) -> TopKWeightAndReduceNoOP:
        return TopKWeightAndReduceNoOP()

    def apply(
        self,
        output: Tensor,
        hidden_states: Tensor,
        w1: Tensor,
        w2: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        activation: object,
        global_num_experts: int,
        expert_map: Tensor | None,
        a1q_scale: Tensor | None,
        a2_scale: Tensor | None,
        workspace13: Tensor,
        workspace2: Tensor,
        expert_tokens_meta: object,
        apply_router_weight_on_input: bool,
    ) -> None:
        """The local experts' share of the weighted sum, `[M, H]`, to output."""
        if apply_router_weight_on_input:  # the preparation has done so
            topk_weights = topk_weights.new_ones(topk_weights.shape)
        layer = self.layer
        cuda_backend.moe(
            hidden_states,
            (layer.w13_qweight, layer.w13_group_scale, layer.w13_channel_scale),
            (layer.w2_qweight, layer.w2_group_scale, layer.w2_channel_scale),
            topk_weights,
            topk_ids,
            expert_map,
            False,
            buffers=cuda_backend.Buffers(output, workspace13, workspace2),
        )
