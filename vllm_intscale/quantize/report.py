"""What is told of a checkpoint that is made: how far the work is, what became of the layers."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from vllm_intscale.format import LayerScheme
from vllm_intscale.quantize.loss import Loss
from vllm_intscale.quantize.rtn import QuantizedRows


class Progress(NamedTuple):
    """How far the work is; bytes are those of the source."""

    tensors: int
    total_tensors: int
    bytes: int
    total_bytes: int


@dataclass
class Conversion:
    """What became of a layer that had been quantized before."""

    groups: int = 0
    kept_groups: int = 0  # whose codes are the same
    squared_error: float = 0.0  # of the weights, against what they were
    squares: float = 0.0

    @property
    def error(self) -> float:
        """Root mean square, relative."""
        return math.sqrt(self.squared_error / self.squares) if self.squares else 0.0


@dataclass
class Outcome:
    """What became of a tensor."""

    lost_groups: int = 0  # groups of nonzero weights whose integer scale is 0
    bound: int = 0  # largest bound of an int32 accumulator
    amplifiers: tuple[float, float] = (math.inf, 0.0)  # least and largest 1 / channel_scale
    loss: Loss | None = None
    conversion: Conversion | None = None
    calibrated: bool = False

    @classmethod
    def of(cls, rows: QuantizedRows, loss: Loss | None = None) -> Outcome:
        """What became of some of its rows."""
        amplifiers = 1 / rows.channel_scale.double()
        spread = float(amplifiers.min()), float(amplifiers.max())
        return cls(rows.lost_groups, rows.bound, spread, loss)

    def add(self, rows: Outcome) -> None:
        """Of more of its rows."""
        self.lost_groups += rows.lost_groups
        self.bound = max(self.bound, rows.bound)
        low, high = zip(self.amplifiers, rows.amplifiers, strict=True)
        self.amplifiers = min(low), max(high)
        if rows.loss:
            self.loss = self.loss or Loss()
            self.loss.add(rows.loss)

    def to_dict(self) -> dict[str, Any]:
        """For the journal."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> Outcome:
        """What `to_dict` gave, among other keys."""
        conversion, loss, (low, high) = entry["conversion"], entry["loss"], entry["amplifiers"]
        return cls(
            entry["lost_groups"],
            entry["bound"],
            (low, high),
            Loss(**loss) if loss else None,
            Conversion(**conversion) if conversion else None,
            entry["calibrated"],
        )


@dataclass
class Report:
    """What was done."""

    layers: int = 0  # quantized
    weights: int = 0  # of the quantized layers
    quantized_source_bytes: int = 0  # of the quantized layers
    quantized_bytes: int = 0
    source_bytes: int = 0  # of all tensors
    written_bytes: int = 0
    left: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))  # by reason
    schemes: dict[str, str] = field(default_factory=dict)  # of quantized layers, in order
    outcomes: dict[str, Outcome] = field(default_factory=dict)  # of the same
    conversions: dict[str, Conversion] = field(default_factory=dict)  # of layers quantized before
    uncalibrated: list[str] = field(default_factory=list)  # layers the calibration did not reach
    smoothed: int = 0  # layers whose inputs have lost outliers to their weights
    lost_groups: int = 0
    bound: int = 0  # largest bound of an int32 accumulator
    bound_layer: str = ""

    def add_quantized(self, layer: str, scheme: LayerScheme, outcome: Outcome) -> None:
        """Count a quantized layer's outcome."""
        self.layers += 1
        self.schemes[layer] = f"W{scheme.bits}A8 g{scheme.group_size}"
        self.outcomes[layer] = outcome
        self.lost_groups += outcome.lost_groups
        if outcome.bound > self.bound:
            self.bound, self.bound_layer = outcome.bound, layer
        if outcome.conversion:
            self.conversions[layer] = outcome.conversion
