"""Which weights of a model are multiplied with what.

Whatever architecture a model has, its linear layers and experts end in
`torch.nn.functional.linear`; that call is watched, and a weight is recognized by its values and by
the numbers of its layer and expert, not by its name, which differs between files and modules. So
fused projections and stacks of experts need no table of names, and layers that are copies of one
another are told apart.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from os.path import commonprefix
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from vllm_intscale import reference
from vllm_intscale.errors import IntScaleError
from vllm_intscale.quantize.shards import OpenFiles
from vllm_intscale.quantize.source import FLOAT_DTYPES, SERVED_AS, Matrix, Plan


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
    files: OpenFiles
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
        self._layer = ""
        self._parameters: dict[str, Tensor] = {}  # of the layer, by their names in the model
        self._layer_of: dict[str, str] = {}  # that each matrix was found in

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
            place = self._place_of(weight)
            parts: list[Matrix] = []
            row = 0
            while place and row < weight.shape[0]:
                m = self._first_of(weight[row:], place, {*self.weights, *(p.name for p in parts)})
                if m is None:
                    parts = []
                    break
                parts.append(m)
                row += m.shape[0]
            row = 0
            for m in parts:
                if self._layer_of.setdefault(m.name, self._layer) != self._layer:
                    raise IntScaleError(
                        f"{m.stored.file}: {m.name} is in {self._layer_of[m.name]} and again in "
                        f"{self._layer} of transformers' model, but can be quantized for one of "
                        "them only; quantize with --method rtn"
                    )
                self.weights[m.name] = weight[row : row + m.shape[0]]
                row += m.shape[0]
            self._parts[key] = parts
        return self._parts[key]

    def _place_of(self, weight: Tensor) -> str:
        """The layer's parameter that a weight lies in, `PARENT.EXPERT.NAME` in a stack; or ""."""
        for name, parameter in self._parameters.items():
            offset = weight.data_ptr() - parameter.data_ptr()
            if not 0 <= offset < parameter.nbytes:
                continue
            if parameter.dim() == 3:
                expert = offset // (parameter.stride(0) * parameter.itemsize)
                parent, dot, last = name.rpartition(".")
                name = f"{parent}{dot}{expert}.{last}"
            return name.removesuffix(".weight")
        return ""

    def _first_of(self, rows: Tensor, place: str, taken: set[str]) -> Matrix | None:
        """The matrix that these rows begin with; of equal ones, whose name ends most as `place`."""
        numbers = numbers_of(place)
        fitting = [
            m
            for m in self.by_first_row.get(fingerprint(rows[0]), [])
            if m.name not in taken
            and numbers_of(m.name)[: len(numbers)] == numbers
            and m.shape[0] <= len(rows)
            and torch.equal(_stored(m, self.files).to(rows), rows[: m.shape[0]])
        ]
        alike = {m.name: len(commonprefix([m.layer[::-1], place[::-1]])) for m in fitting}
        return max(fitting, key=lambda m: alike[m.name], default=None)

    def next_stage(self, names: set[str]) -> None:
        """Collect the inputs of these from now on."""
        self.wanted, self._last = names, None
        self.inputs.clear()

    def next_layer(self, name: str, layer: torch.nn.Module) -> None:
        """Forget the last layer's weights, whose memory another one's may take, and find these.

        All of them, also of experts that no token reaches. name: the layer's in the model. Raises
        IntScaleError if one of its weights was in an earlier layer.
        """
        self.next_stage(set())
        self.order.clear()
        self.weights.clear()
        self._parts.clear()
        self._layer = name
        self._parameters = {f"{name}.{n}": p.detach() for n, p in layer.named_parameters()}
        for parameter in self._parameters.values():
            if parameter.dim() == 2:
                self._parts_of(parameter)
            elif parameter.dim() == 3:
                for weight in parameter:
                    self._parts_of(weight)


def _same(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()


def first_rows(plan: Plan, files: OpenFiles) -> dict[bytes, list[Matrix]]:
    """The matrices of a checkpoint by the `fingerprint` of their first rows."""
    found: dict[bytes, list[Matrix]] = defaultdict(list)
    for m in plan.matrices:
        if m.scheme or (len(m.shape) == 2 and m.stored.dtype in FLOAT_DTYPES):
            found[fingerprint(_stored(m, files, rows=1)[0])].append(m)
    return found


def _stored(m: Matrix, files: OpenFiles, rows: int | None = None) -> Tensor:
    """A matrix as it is in its file, or the first of its rows."""
    wanted = slice(m.first_row, m.first_row + (rows or m.shape[0]))
    stored: Tensor = files.slice(m.stored)[wanted if m.expert is None else (m.expert, wanted)]
    return stored


def fingerprint(row: Tensor) -> bytes:
    return row.float().cpu().numpy().tobytes()


def numbers_of(name: str) -> list[str]:
    """Of the layer and, if it is one of several, the expert that a tensor or module belongs to."""
    return [part for part in name.split(".") if part.isdigit()]


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
    return parent + dot + SERVED_AS.get(last, last)
