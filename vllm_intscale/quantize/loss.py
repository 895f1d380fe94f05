"""What quantizing changes in a layer, by cause: int4 codes, integer scales, int8 activations."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from vllm_intscale.packing import unpack_codes
from vllm_intscale.quantize.rtn import QuantizedRows
from vllm_intscale.quantize.watch import Input

# Every so manieth row is measured, and of a large layer every so manieth block of rows: enough to
# know its error, and nearly free.
MEASURED = 8


@dataclass
class Loss:
    """Sums of squares over the rows that are measured.

    Of the weights or, where the inputs of a calibration text are known, of the layer's outputs for
    them. int4: what codes change with float group scales. weights: with the integer scales that are
    stored, for the same codes. activations: what int8 activations add, None where unknown.
    """

    squares: float = 0.0
    int4: float = 0.0
    weights: float = 0.0
    activations: float | None = None

    def add(self, other: Loss) -> None:
        """Of other rows of the same layer."""
        self.squares += other.squares
        self.int4 += other.int4
        self.weights += other.weights
        if other.activations is not None:
            self.activations = (self.activations or 0.0) + other.activations

    @property
    def relative(self) -> float:
        """Root mean square of all of it."""
        total = self.weights + (self.activations or 0.0)
        return math.sqrt(total / self.squares) if self.squares else 0.0


def measure(weight: Tensor, rows: QuantizedRows, bits: int, inputs: Input | None = None) -> Loss:
    """Of rows `[n, K]` of any float dtype and what they became; inputs: those of the layer."""
    some = slice(None, None, MEASURED)
    weight = weight[some].float()
    codes = unpack_codes(rows.qweight[some], bits).float()
    group_size = codes.shape[1] // rows.group_scale.shape[1]

    def dequantized(scale: Tensor) -> Tensor:
        groups: Tensor = codes.unflatten(1, (-1, group_size)) * scale.float()[..., None]
        return groups.flatten(1)

    def squared(x: Tensor) -> float:
        if inputs is not None and inputs.hessian is not None:
            return float(((x @ inputs.hessian) * x).sum())
        energy = 1.0 if inputs is None or inputs.energy is None else inputs.energy
        return float((x.square() * energy).sum())  # as if no two columns went together

    stored = dequantized(rows.group_scale[some] * rows.channel_scale[some, None])
    loss = Loss(
        squared(weight),
        squared(dequantized(rows.float_scale[some]) - weight),
        squared(stored - weight),
    )
    if inputs is not None and inputs.rounding is not None:  # independent of each other, nearly
        loss.activations = float(stored.square().sum(0) @ inputs.rounding)
    return loss
