"""What is timed: a linear layer (`Linear`) or a layer of experts (`moe.Experts`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from vllm_intscale.bench import timing
from vllm_intscale.bench.peers import PEERS, Layer, Tensors
from vllm_intscale.bench.results import weight_floor_us

# Lower bounds of what hardware does today, to choose how many calls make a graph long enough.
FAST_BYTES_PER_S = 3e12
FAST_OPS_PER_S = 1.4e15
WEIGHT_STD = 0.02


class Timed(NamedTuple):
    """A call that takes a number below `copies`, which together touch more than any L2 holds."""

    call: Callable[[int], Tensor]
    copies: int


class Prepared(Protocol):
    """A kernel and its weights."""

    @property
    def weight_bytes(self) -> int: ...

    def calls(self, m: int) -> dict[str, Timed]:
        """By mode, for M tokens; a mode that is left out is the same as the first."""


class Problem(Protocol):
    """Weights and activations that all kernels get."""

    modes: tuple[str, ...]
    controls: tuple[str, ...]  # the first that works is timed beside everything
    limits: Mapping[str, float]  # of a kernel's relative error against bf16

    def prepare(self, kernel: str) -> Prepared: ...
    def reference(self, m: int, mode: str) -> Tensor:
        """What the first call is to give, in bf16."""

    def operations(self, m: int) -> float: ...
    def floor_us(self, m: int, mode: str) -> float:
        """Microseconds to stream the int4 weights that M tokens touch."""

    def least_seconds(self, m: int) -> float: ...


class PreparedLinear(NamedTuple):
    """A layer and the copies of its weight that calls rotate through; x `[M, K]`."""

    layer: Layer
    copies: list[Tensors]
    weight_bytes: int
    x: Tensor

    def calls(self, m: int) -> dict[str, Timed]:
        x, layer = self.x[:m], self.layer
        alone = partial(self._gemm, layer.operands(x))
        calls = {"gemm": Timed(alone, len(self.copies))}
        if layer.quantize:
            calls["linear"] = Timed(partial(self._linear, x), len(self.copies))
        return calls

    def _gemm(self, operands: Tensors, copy: int) -> Tensor:
        return self.layer.gemm(operands, self.copies[copy])

    def _linear(self, x: Tensor, copy: int) -> Tensor:
        return self.layer.gemm(self.layer.operands(x), self.copies[copy])


class Linear:
    """A Gaussian weight `[N, K]` and activations `[max M, K]`, bf16."""

    modes: tuple[str, ...] = ("gemm", "linear")
    controls: tuple[str, ...] = ("cutlass_fp8", "bf16")
    limits: Mapping[str, float] = {name: peer.limit for name, peer in PEERS.items()}

    def __init__(self, weight: Tensor, x: Tensor, bytes_per_second: float) -> None:
        self.weight, self.x = weight, x
        n, k = weight.shape
        self._floor_us = weight_floor_us(n, k, bytes_per_second)

    @classmethod
    def gaussian(
        cls,
        size: tuple[int, ...],
        m: int,
        gaussian: Callable[..., Tensor],
        bytes_per_second: float,
    ) -> Linear:
        """size: N, K."""
        n, k = size
        weight = gaussian(n, k).mul_(WEIGHT_STD).to(torch.bfloat16)
        return cls(weight, gaussian(m, k).to(torch.bfloat16), bytes_per_second)

    def prepare(self, kernel: str) -> PreparedLinear:
        layer = PEERS[kernel].prepare(self.weight)
        size = sum(tensor.nbytes for tensor in layer.weight)
        copies = [layer.weight]
        while len(copies) < timing.copies_needed(size):
            copies.append(tuple(tensor.clone() for tensor in layer.weight))
        return PreparedLinear(layer, copies, size, self.x)

    def reference(self, m: int, mode: str) -> Tensor:
        return self.x[:m] @ self.weight.t()

    def operations(self, m: int) -> float:
        return 2.0 * m * self.weight.numel()

    def floor_us(self, m: int, mode: str) -> float:
        return self._floor_us

    def least_seconds(self, m: int) -> float:
        streaming = self.weight.numel() / 2 / FAST_BYTES_PER_S
        return max(streaming, self.operations(m) / FAST_OPS_PER_S)
