"""What the linear and the MoE method share: checks, loaders and the start-up report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config_or_none
from vllm.logger import init_logger
from vllm.platforms import current_platform

from vllm_intscale import compile_cache, fusion
from vllm_intscale.errors import IntScaleError
from vllm_intscale.format import LayerScheme, largest_group_size

# A child of "vllm", the only logger that vLLM gives a handler.
logger = init_logger("vllm.intscale")

# What a tensor holds until it is loaded: neither scale passes `format.validate_layer`.
BLANK = {"qweight": 0, "group_scale": torch.iinfo(torch.int16).min, "channel_scale": torch.nan}


@contextmanager
def naming(layer: str) -> Iterator[None]:
    """Errors say which layer it is."""
    try:
        yield
    except IntScaleError as error:
        raise IntScaleError(f"{layer}: {error}") from None


def check_runnable(where: str) -> None:
    """Raise IntScaleError if this platform has no kernels or the load format no weights."""
    config = get_current_vllm_config_or_none()
    if config is not None and config.load_config.load_format == "dummy":
        raise IntScaleError(
            f"{where}: --load-format dummy cannot make up quantized weights; quantize a model with "
            "random weights and serve that"
        )
    if current_platform.is_cpu():
        return
    if not current_platform.is_cuda():
        raise IntScaleError(
            f"{where}: platform {current_platform.device_name!r} is not supported; intscale runs "
            "on NVIDIA GPUs and on CPU"
        )


def partition_scheme(
    where: str, scheme: LayerScheme, k: int, tp_size: int, remedy: str = ""
) -> LayerScheme:
    """The scheme of one tensor-parallel rank of a layer whose K input channels are split.

    A rank's K / tp_size channels may cut a group. Then groups are split, which is exact: an
    integer scale applies to any part of its group. remedy: what else the user may do.

    Raises IntScaleError if the checkpoint's groups do not divide K or no group size divides
    K / tp_size.
    """
    if k % scheme.group_size:
        raise IntScaleError(
            f"{where}: K = {k} is not a multiple of the checkpoint's group size "
            f"{scheme.group_size}; put the layer into ignore or give it a smaller group size"
        )
    group_size = largest_group_size(k // tp_size, scheme.group_size)
    if group_size is None:
        valid = next(tp for tp in range(tp_size, 0, -1) if k % (tp * 32) == 0)
        raise IntScaleError(
            f"{where}: K = {k} over {tp_size} tensor-parallel ranks gives {k // tp_size} input "
            f"channels each, not a multiple of 32; use --tensor-parallel-size {valid}{remedy}"
        )
    return replace(scheme, group_size=group_size)


def blank_tensors(
    scheme: LayerScheme, n: int, k: int, experts: tuple[int, ...] = ()
) -> dict[str, Tensor]:
    """A layer's tensors, not loaded yet, on the default device; for a stack if `experts` = (E,)."""
    return {
        name: torch.full((*experts, *shape), BLANK[name], dtype=dtype)
        for name, (dtype, shape) in scheme.tensor_specs(n, k).items()
    }


def strict_loader(
    loader: MethodType, tensor: str, loads: Counter[str], group_split: int = 1
) -> MethodType:
    """`loader`, a weight loader of a layer, behind a check of the dtype of what is loaded.

    tensor: full name, for the error. loads: counts the calls by that name, for `check_complete`.
    group_split: into how many equal groups each group of the checkpoint is split; above 1 the last
    dimension of what is loaded is repeated accordingly.

    vLLM's own loaders convert any dtype silently. The result is again a method bound to the layer:
    layerwise reload unbinds the loaders it keeps, so that they do not keep a deleted model alive.
    """
    name = loader.__name__
    loads[tensor] = 0

    def load(
        layer: torch.nn.Module, param: Tensor, loaded_weight: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        if loaded_weight.dtype != param.dtype:
            raise IntScaleError(
                f"{tensor} is {loaded_weight.dtype} in the checkpoint; it must be {param.dtype}: "
                "download or quantize the model again"
            )
        if group_split > 1:
            loaded_weight = loaded_weight.repeat_interleave(group_split, dim=-1)
        loads[tensor] += 1
        return getattr(layer, name)(param, loaded_weight, *args, **kwargs)

    return MethodType(load, loader.__self__)


def check_complete(loads: Counter[str]) -> None:
    """Raise IntScaleError if a tensor of a layer was loaded from fewer parts than the others.

    vLLM does not notice a tensor that a checkpoint lacks. One that lacks all tensors of a layer is
    found by `format.validate_layer`: the scales are still `BLANK`.
    """
    parts = max(loads.values(), default=0)
    for tensor, count in loads.items():
        if count != parts:
            raise IntScaleError(
                f"{tensor} is missing in the checkpoint: {count} of {parts} parts were loaded; "
                "download or quantize the model again"
            )
        loads[tensor] = 0  # for a reload


def describe_scheme(scheme: LayerScheme) -> str:
    """As `W4A8 g128`."""
    return f"W{scheme.bits}A8 g{scheme.group_size}"


def warm_up(weight: tuple[Tensor, Tensor], dtype: torch.dtype) -> None:
    """Compile and load the kernels of a layer: they must exist before CUDA graphs are captured.

    weight: qweight and group_scale as `ops.prepare_weight` made them.
    """
    if weight[0].is_cuda:
        from vllm_intscale import cuda_backend

        cuda_backend.warm_up(weight, dtype)


@dataclass
class LoadReport:
    """Collects what a model's layers are and logs it in one line when the last one is ready."""

    layers: dict[str, str] = field(default_factory=dict)
    kernels: dict[str, str] = field(default_factory=dict)
    ignored: set[str] = field(default_factory=set)
    _layouts: dict[str, object] = field(default_factory=dict)
    _waiting: set[str] = field(default_factory=set)

    def created(self, layer: str, description: str) -> None:
        """A layer with this full name has parameters, still to be loaded."""
        self.layers[layer] = description
        self._waiting.add(layer)

    def ready(self, layer: str, kernel: str, weights: Iterable[Tensor]) -> None:
        """These weights of a layer are loaded and in the layout of its kernel."""
        if layer not in self._waiting:  # a reload
            return
        self._waiting.remove(layer)
        self.kernels[layer] = kernel
        self._layouts[layer] = kernel, [(tuple(w.shape), w.dtype) for w in weights]
        if not self._waiting:
            compile_cache.name_layouts(self._layouts)
            fusion.connect_ranks()
            counts = Counter(self.layers.values())
            parts = [f"{count} {description}" for description, count in counts.items()]
            kernels = Counter(self.kernels.values())
            parts += [f"{count} on {name}" for name, count in kernels.items()]
            parts += [f"{len(self.ignored)} ignored"]
            logger.info("intscale: %s", ", ".join(parts))
