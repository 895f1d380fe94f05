"""The mixture-of-experts method: creates, loads, prepares and applies a stack of experts."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter
from vllm.config import get_current_vllm_config_or_none
from vllm.distributed import get_ep_group
from vllm.model_executor.layers.fused_moe import (
    FusedMoEConfig,
    FusedMoEMethodBase,
    FusedMoeWeightScaleSupported,
)
from vllm.model_executor.utils import replace_parameter, set_weight_attrs

from vllm_intscale import loading, ops
from vllm_intscale.errors import IntScaleError
from vllm_intscale.format import TENSOR_NAMES, LayerScheme, validate_layer
from vllm_intscale.sm90_tiles import wanted_form

# What vLLM's expert loader must know of a scale to cut it along the right dimension.
_KINDS = {
    "qweight": {},
    "group_scale": {"quant_method": FusedMoeWeightScaleSupported.GROUP.value},
    "channel_scale": {"quant_method": FusedMoeWeightScaleSupported.CHANNEL.value},
}


class IntScaleMoEMethod(FusedMoEMethodBase):  # type: ignore[misc]
    """The routed experts of one layer, all of one scheme.

    prefix: their full name, as `model.layers.0.mlp.experts`. The parameters, for E local experts,
    hidden size H and I inner channels of this rank, are stacks of `IntScaleLinearMethod`'s:

        w13_qweight, w13_group_scale, w13_channel_scale    N = 2 I (gate first), K = H
        w2_qweight, w2_group_scale, w2_channel_scale       N = H, K = I
    """

    def __init__(
        self, scheme: LayerScheme, prefix: str, report: loading.LoadReport, moe: FusedMoEConfig
    ) -> None:
        super().__init__(moe)
        self.scheme = scheme
        self.prefix = prefix
        self.report = report
        self.loads: dict[str, Counter[str]] = {"w13": Counter(), "w2": Counter()}
        self.local_schemes: dict[str, LayerScheme] = {}
        self.local_sizes: dict[str, tuple[int, int]] = {}

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register the parameters. Raises IntScaleError if this rank's part cannot run."""
        loading.check_runnable(self.prefix)
        self._check_moe()
        self._check_lora()
        hidden, inner, tp_size = hidden_size, intermediate_size_per_partition, self.moe.tp_size
        self.local_sizes = {"w13": (2 * inner, hidden), "w2": (hidden, inner)}
        self.local_schemes = {
            "w13": loading.partition_scheme(f"{self.prefix}.w13", self.scheme, hidden, 1),
            "w2": loading.partition_scheme(
                f"{self.prefix}.w2",
                self.scheme,
                inner * tp_size,
                tp_size,
                " or --enable-expert-parallel",
            ),
        }
        for stack, scheme in self.local_schemes.items():
            group_split = self.scheme.group_size // scheme.group_size
            blanks = loading.blank_tensors(scheme, *self.local_sizes[stack], (num_experts,))
            for name, blank in blanks.items():
                loader = loading.strict_loader(
                    extra_weight_attrs["weight_loader"],
                    f"{self.prefix}.{stack}_{name}",
                    self.loads[stack],
                    group_split if name == "group_scale" else 1,
                )
                parameter = Parameter(blank, requires_grad=False)
                set_weight_attrs(parameter, {"weight_loader": loader, **_KINDS[name]})
                layer.register_parameter(f"{stack}_{name}", parameter)
        schemes = dict.fromkeys(map(loading.describe_scheme, self.local_schemes.values()))
        self.report.created(self.prefix, f"MoE of {num_experts} experts {' + '.join(schemes)}")

    def _check_moe(self) -> None:
        """Raise IntScaleError for a kind of expert that `reference.moe` does not describe."""
        activation = self.moe.activation.value
        for unsupported, what in (
            (activation != "silu", f"the activation {activation!r}"),
            (self.moe.has_bias, "a bias in experts"),
            (self.moe.swiglu_limit is not None, f"swiglu_limit {self.moe.swiglu_limit}"),
        ):
            if unsupported:
                raise IntScaleError(
                    f"{self.prefix}: {what} is not supported, experts must be gated by silu "
                    "without bias or limit; put them into ignore"
                )

    def _check_lora(self) -> None:
        """Raise IntScaleError if vLLM is to give experts adapters."""
        config = get_current_vllm_config_or_none()
        lora = config.lora_config if config else None
        if lora and "experts" in (lora.target_modules or ("experts",)):
            raise IntScaleError(
                f"{self.prefix}: quantized experts take no LoRA adapters; name other layers with "
                "--lora-target-modules, such as q_proj, or serve without --enable-lora"
            )

    def process_weights_after_loading(self, layer: Any) -> None:
        """As `IntScaleLinearMethod.process_weights_after_loading`."""
        if layer.w13_qweight.dim() != 3:
            return
        for stack, scheme in self.local_schemes.items():
            loading.check_complete(self.loads[stack])
            tensors = {name: getattr(layer, f"{stack}_{name}").data for name in TENSOR_NAMES}
            _, k = self.local_sizes[stack]
            validate_layer(f"{self.prefix}.{stack}", tensors, scheme, k)
            with loading.naming(f"{self.prefix}.{stack}"):
                weight = ops.prepare_weight(
                    *(tensors["qweight"], tensors["group_scale"], tensors["channel_scale"]),
                    *(scheme.bits, self._on_all_ranks),
                )
                loading.warm_up(weight[:2], layer.params_dtype)
            self._check_movable(weight)
            for name, tensor in zip(TENSOR_NAMES, weight, strict=True):
                replace_parameter(layer, f"{stack}_{name}", tensor)
        kernel = ops.describe(layer.w13_qweight, layer.w13_group_scale)
        if layer.w13_qweight.is_cuda and self.moe.moe_parallel_config.use_all2all_kernels:
            from vllm_intscale.modular_experts import make_kernel

            self.moe_kernel = make_kernel(self.moe, layer)
            kernel += f", tokens by {type(self.moe_kernel.prepare_finalize).__name__}"
        self.report.ready(self.prefix, kernel, layer.parameters(recurse=False))

    def _on_all_ranks(self, possible: bool) -> bool:
        """Whether it is so for the experts of every rank."""
        if not self.moe.moe_parallel_config.use_ep:
            return possible
        flag = torch.tensor(int(possible))
        dist.all_reduce(flag, dist.ReduceOp.MIN, group=get_ep_group().cpu_group)
        return bool(flag)

    def _check_movable(self, weight: tuple[Tensor, ...]) -> None:
        """Raise IntScaleError if vLLM is to move experts between ranks and could not."""
        if all(map(Tensor.numel, weight)) or not self.moe.moe_parallel_config.enable_eplb:
            return
        why = "group scales above 1023 or negative ones beside the code -8 need the other; serve "
        why += "without it"
        if wanted_form() == "accumulate":
            why = "INTSCALE_FORM is 'accumulate'; unset it"
        raise IntScaleError(
            f"{self.prefix}: --enable-eplb moves experts of the fold form only, and {why}"
        )

    @property
    def supports_eplb(self) -> bool:
        """True: every tensor has a leading dimension of local experts, which vLLM moves."""
        return True

    def apply(
        self,
        layer: Any,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: torch.nn.Module | None,
        shared_experts_input: Tensor | None,
    ) -> Tensor:
        """The local experts' share of the weighted sum, `[M, H]` to `[M, H]`.

        vLLM's runner applies the shared experts and adds the shares of all ranks. Where tokens are
        taken to their experts, it is the whole sum.
        """
        if self.moe_kernel is not None:
            routed: Tensor = self.moe_kernel.apply(
                hidden_states=x,
                w1=layer.w13_qweight,
                w2=layer.w2_qweight,
                topk_weights=topk_weights,
                topk_ids=topk_ids,
                activation=layer.activation,
                global_num_experts=layer.global_num_experts,
                expert_map=layer.expert_map,
                apply_router_weight_on_input=layer.apply_router_weight_on_input,
                shared_experts=shared_experts,
                shared_experts_input=shared_experts_input,
            )
            return routed
        out: Tensor = ops.moe(
            x,
            [layer.w13_qweight, layer.w13_group_scale, layer.w13_channel_scale],
            [layer.w2_qweight, layer.w2_group_scale, layer.w2_channel_scale],
            topk_weights,
            topk_ids,
            layer.expert_map,
            layer.apply_router_weight_on_input,
        )
        return out

    def get_fused_moe_quant_config(self, layer: Any) -> None:
        """None: activations are quantized inside `ops.moe`, not by vLLM."""
        return None

    def maybe_make_prepare_finalize(self, routing_tables: object = None) -> None:
        """None: vLLM 0.26 would ask for a modular kernel otherwise; later versions do not."""
        return None
