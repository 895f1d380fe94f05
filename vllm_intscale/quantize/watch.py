"""Which weights of a model are multiplied with what.

Whatever architecture a model has, its linear layers and experts end in
`torch.nn.functional.linear`; that call is watched, and a weight is recognized by its first row, not
by its name, which differs between files and modules. So fused projections and stacks of experts
need no table of names.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from vllm_intscale import reference
from vllm_intscale.quantize.shards import OpenFiles
from vllm_intscale.quantize.source import FLOAT_DTYPES, SERVED_AS, Matrix, Plan

_STAGE = {**SERVED_AS, "w1": "gate_up_proj", "w3": "gate_up_proj"}


@dataclass
class Input:
    """What a weight has been multiplied with."""

    hessian: Tensor | None = None  # sum of x x^T, float32 [K, K]; if it is wanted
    energy: Tensor | None = None  # its diagonal, float32 [K]
    rounding: Tensor | None = None  # sum of what int8 changes in x, squared, float32 [K]
    tokens: int = 0

    def add(self, x: Tensor, with_hessian: bool = True) -> None:
        """Rows `[M, K]`, float32."""
        if self.energy is None or self.rounding is None:
            self.energy, self.rounding = x.new_zeros(2, x.shape[1])
        if with_hessian:
            if self.hessian is None:
                self.hessian = x.new_zeros(x.shape[1], x.shape[1])
            self.hessian.addmm_(x.t(), x)
        self.energy += x.square().sum(0)
        a8, token_scale = reference.quantize_activation(x)
        self.rounding += (a8 * token_scale[:, None] - x).square_().sum(0)
        self.tokens += x.shape[0]


@dataclass
class Watch(TorchFunctionMode):
    """Collects the inputs of the weights in `wanted`, by matrix; `order`: as they are met."""

    by_first_row: Mapping[bytes, list[Matrix]]
    with_hessians: bool = True
    wanted: set[str] = field(default_factory=set)
    order: dict[str, None] = field(default_factory=dict)
    inputs: dict[str, Input] = field(default_factory=lambda: defaultdict(Input))
    weights: dict[str, Tensor] = field(default_factory=dict)  # views of the model's
    listener: Callable[[Tensor, list[str]], None] | None = None  # also told of each, with names

    def __post_init__(self) -> None:
        super().__init__()
        self._parts: dict[tuple[int, torch.Size], list[Matrix]] = {}
        self._last: tuple[Tensor, Input] | None = None

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.linear:
            x, weight = (*args, kwargs.get("input"), kwargs.get("weight"))[:2]
            self._see(x.detach(), weight.detach())
        return func(*args, **kwargs)

    def _see(self, x: Tensor, weight: Tensor) -> None:
        matrices = self._parts_of(weight)
        if self.listener:
            self.listener(x, [m.name for m in matrices])
        matrices = [m for m in matrices if m.scheme]
        if not matrices:
            return
        self.order.update(dict.fromkeys(m.name for m in matrices))
        if not any(m.name in self.wanted for m in matrices):
            return
        if self._last is None or self._last[0] is not x and not _same(self._last[0], x):
            seen = self.inputs[matrices[0].name]
            seen.add(x.reshape(-1, x.shape[-1]).float(), self.with_hessians)
            self._last = x, seen
        for m in matrices:  # those that always get the same input share its sum
            self.inputs[m.name] = self._last[1]

    def _parts_of(self, weight: Tensor) -> list[Matrix]:
        """The matrices whose rows a weight consists of, none if there is another among them."""
        key = weight.data_ptr(), weight.shape
        if key not in self._parts:
            parts: list[Matrix] = []
            row = 0
            while row < weight.shape[0]:
                candidates = self.by_first_row.get(fingerprint(weight[row]), [])
                fitting = [m for m in candidates if m.name not in self.weights]
                if not fitting or row + fitting[0].shape[0] > weight.shape[0]:
                    parts = []
                    break
                parts.append(fitting[0])
                row += fitting[0].shape[0]
            row = 0
            for m in parts:
                self.weights[m.name] = weight[row : row + m.shape[0]]
                row += m.shape[0]
            self._parts[key] = parts
        return self._parts[key]

    def find_weights(self, layer: torch.nn.Module) -> None:
        """All of a layer's, also of experts that no token reaches."""
        for parameter in layer.parameters():
            if parameter.dim() == 2:
                self._parts_of(parameter.detach())
            elif parameter.dim() == 3:
                for weight in parameter.detach():
                    self._parts_of(weight)

    def next_stage(self, names: set[str]) -> None:
        """Collect the inputs of these from now on."""
        self.wanted, self._last = names, None
        self.inputs.clear()

    def next_layer(self) -> None:
        """Forget the last layer's weights, whose memory another one's may take."""
        self.next_stage(set())
        self.order.clear()
        self.weights.clear()
        self._parts.clear()


def _same(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()


def first_rows(plan: Plan, files: OpenFiles) -> dict[bytes, list[Matrix]]:
    """The matrices of a checkpoint by the `fingerprint` of their first rows."""
    found: dict[bytes, list[Matrix]] = defaultdict(list)
    for m in plan.matrices:
        if m.scheme or (len(m.shape) == 2 and m.stored.dtype in FLOAT_DTYPES):
            stored = files.slice(m.stored)
            row = stored[m.first_row] if m.expert is None else stored[m.expert, m.first_row]
            found[fingerprint(row)].append(m)
    return found


def fingerprint(row: Tensor) -> bytes:
    return row.float().cpu().numpy().tobytes()


def stages(order: dict[str, None]) -> list[set[str]]:
    """Names that are quantized together, in order."""
    stages: dict[str, set[str]] = defaultdict(set)
    for name in order:
        stages[stage_of(name)].add(name)
    return list(stages.values())


def stage_of(name: str) -> str:
    """What a weight is served as, with others; all experts of a layer together."""
    layer = re.sub(r"\bexperts\.\d+\.", "experts.", name.removesuffix(".weight"))
    parent, dot, last = layer.rpartition(".")
    return parent + dot + _STAGE.get(last, last)
