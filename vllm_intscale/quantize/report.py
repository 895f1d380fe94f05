"""What is told of a checkpoint that is made: how far the work is, what became of the layers."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple


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
    conversion: Conversion | None = None
    calibrated: bool = False

    def add_rows(self, lost_groups: int, bound: int) -> None:
        """Count what happened to some of its rows."""
        self.lost_groups += lost_groups
        self.bound = max(self.bound, bound)

    def to_dict(self) -> dict[str, Any]:
        """For the journal."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> Outcome:
        """What `to_dict` gave, among other keys."""
        conversion = entry["conversion"]
        return cls(
            entry["lost_groups"],
            entry["bound"],
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
    conversions: dict[str, Conversion] = field(default_factory=dict)  # of layers quantized before
    uncalibrated: list[str] = field(default_factory=list)  # layers the calibration did not reach
    smoothed: int = 0  # layers whose inputs have lost outliers to their weights
    lost_groups: int = 0
    bound: int = 0  # largest bound of an int32 accumulator
    bound_layer: str = ""

    def add_quantized(self, layer: str, outcome: Outcome) -> None:
        """Count a quantized layer's outcome."""
        self.layers += 1
        self.lost_groups += outcome.lost_groups
        if outcome.bound > self.bound:
            self.bound, self.bound_layer = outcome.bound, layer
        if outcome.conversion:
            self.conversions[layer] = outcome.conversion
