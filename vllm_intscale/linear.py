"""The linear method: creates, loads, prepares and applies one quantized linear layer."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.linear import (
    LinearMethodBase,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.parameter import (
    ChannelQuantScaleParameter,
    GroupQuantScaleParameter,
    PackedvLLMParameter,
)
from vllm.model_executor.utils import replace_parameter

from vllm_intscale import loading, ops
from vllm_intscale.format import TENSOR_NAMES, LayerScheme, validate_layer


@register_weight_loader_v2_supported_method
class IntScaleLinearMethod(LinearMethodBase):  # type: ignore[misc]
    """One quantized linear layer, with fused parts or without.

    prefix: its full name. Its parameters, for the N output and K input channels of this rank:

        qweight        int32   [N, K * bits / 32]
        group_scale    int16   [N, K / group_size]
        channel_scale  float32 [N]

    Once loaded they take the layout of the device's kernels (`ops`).
    """

    def __init__(self, scheme: LayerScheme, prefix: str, report: loading.LoadReport) -> None:
        self.scheme = scheme
        # Of this rank's part, once create_weights knows it.
        self.local_scheme = scheme
        self.local_k = 0
        self.prefix = prefix
        self.report = report
        self.loads: Counter[str] = Counter()

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register the parameters. Raises IntScaleError if this rank's part cannot run."""
        n, k = sum(output_partition_sizes), input_size_per_partition
        loading.check_runnable(self.prefix)
        scheme = loading.partition_scheme(self.prefix, self.scheme, input_size, input_size // k)
        group_split = self.scheme.group_size // scheme.group_size
        self.local_scheme, self.local_k = scheme, k

        def loader(name: str, group_split: int = 1) -> Any:
            original = extra_weight_attrs["weight_loader"]
            tensor = f"{self.prefix}.{name}"
            return loading.strict_loader(original, tensor, self.loads, group_split)

        blank = loading.blank_tensors(scheme, n, k)
        layer.qweight = PackedvLLMParameter(
            data=blank["qweight"],
            input_dim=1,
            output_dim=0,
            packed_dim=1,
            packed_factor=32 // scheme.bits,
            weight_loader=loader("qweight"),
        )
        layer.group_scale = GroupQuantScaleParameter(
            data=blank["group_scale"],
            input_dim=1,
            output_dim=0,
            weight_loader=loader("group_scale", group_split),
        )
        layer.channel_scale = ChannelQuantScaleParameter(
            data=blank["channel_scale"],
            output_dim=0,
            weight_loader=loader("channel_scale"),
        )
        self.report.created(self.prefix, f"linear {loading.describe_scheme(scheme)}")

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check what was loaded and bring it into the layout of the device's kernels.

        Runs again after every reload, then on parameters in the checkpoint's layout. In the
        kernels' layout, which has more dimensions, nothing is left to do.
        """
        if layer.qweight.dim() != 2:
            return
        loading.check_complete(self.loads)
        tensors = {name: getattr(layer, name).data for name in TENSOR_NAMES}
        validate_layer(self.prefix, tensors, self.local_scheme, self.local_k)
        with loading.naming(self.prefix):
            weight = ops.prepare_weight(
                tensors["qweight"],
                tensors["group_scale"],
                tensors["channel_scale"],
                self.local_scheme.bits,
            )
            loading.warm_up(weight[:2], layer.params_dtype)
        # Always plain parameters: torch.compile does not trace vLLM's parameter classes.
        for name, tensor in zip(TENSOR_NAMES, weight, strict=True):
            replace_parameter(layer, name, tensor)
        self.report.ready(self.prefix, ops.describe(*weight[:2]), weight)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x `[..., K]` to `[..., N]` of the same dtype."""
        a8, token_scale = ops.quantize_activation(x.reshape(-1, x.shape[-1]))
        y: Tensor = ops.gemm(
            a8, token_scale, layer.qweight, layer.group_scale, layer.channel_scale, bias, x.dtype
        )
        return y.view(*x.shape[:-1], y.shape[-1])

    def dequantize_weight(self, layer: Any) -> Tensor:
        """The weight `[N, K]` in the model's dtype, for vLLM's online requantization."""
        n, k = layer.channel_scale.shape[0], self.local_k
        integers = ops.integer_weight(layer.qweight, layer.group_scale, n, k)
        weight: Tensor = integers * layer.channel_scale.unsqueeze(-1)
        return weight.to(layer.params_dtype)
