"""Rows of the GEMM benchmark: one JSON file per shape, resumed and joined.

Rows of one shape may come from several processes, which may have run at other clocks or beside
other work. A control kernel is timed in each of them at every M; rows are joined into one table
only where it agrees.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_intscale.errors import IntScaleError

OURS = "intscale"  # and what begins so: variants of it, for comparisons
CONTROL_TOLERANCE = 0.02


@dataclass
class Row:
    """One kernel at one shape and M, timed or failed."""

    shape: str
    N: int
    K: int
    M: int
    kernel: str
    mode: str  # of a linear layer: gemm or linear; of experts: how tokens choose them
    run: str  # the process that timed it
    session: str  # the command that started the process
    date: str
    error: str | None = None
    probe_error: float | None = None  # relative, against bf16
    us: float | None = None
    us_min: float | None = None
    us_max: float | None = None
    tops: float | None = None
    weight_GB_per_s: float | None = None
    ratio_to_best_peer: float | None = None
    floor_us: float | None = None
    cuda_kernels: list[str] | None = None
    environment: dict[str, str] = field(default_factory=dict)


@dataclass
class Control:
    """The control kernel's time in one process at one M."""

    run: str
    M: int
    kernel: str
    us: float
    gpu: str

    def agrees(self, other: Control) -> bool:
        same = (self.kernel, self.gpu) == (other.kernel, other.gpu)
        return same and abs(self.us - other.us) <= CONTROL_TOLERANCE * other.us


def weight_floor_us(n: int, k: int, bytes_per_second: float) -> float:
    """Microseconds to stream int4 weights and one byte of scale for each 128 of them."""
    return (n * k / 2 + n * k / 128) / bytes_per_second * 1e6


def set_ratios(rows: Sequence[Row]) -> None:
    """Each time over the best peer's at the same shape, M and mode."""
    best = best_peers(rows)
    for row in rows:
        fastest = best.get((row.shape, row.M, row.mode))
        row.ratio_to_best_peer = row.us / fastest if row.us and fastest else None


def best_peers(rows: Sequence[Row]) -> dict[tuple[str, int, str], float]:
    """The fastest time that is not ours, by shape, M and mode."""
    best: dict[tuple[str, int, str], float] = {}
    for row in rows:
        if row.us is not None and not row.kernel.startswith(OURS):
            key = (row.shape, row.M, row.mode)
            best[key] = min(row.us, best.get(key, row.us))
    return best


class ShapeResults:
    """The rows of one shape and their file, which is replaced whole at every save."""

    def __init__(self, path: Path, shape: str, n: int, k: int) -> None:
        self.path = path
        self.shape, self.n, self.k = shape, n, k
        self.rows: list[Row] = []
        self.controls: list[Control] = []
        if path.exists():
            self._load()

    def _load(self) -> None:
        try:
            content = json.loads(self.path.read_text())
            stored = (content["shape"], content["N"], content["K"])
            self.rows = [Row(**row) for row in content["rows"]]
            self.controls = [Control(**control) for control in content["controls"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise IntScaleError(
                f"{self.path} is not a result of this version of intscale bench ({error!r}); "
                "remove it or choose another --out"
            ) from None
        if stored != (self.shape, self.n, self.k):
            raise IntScaleError(
                f"{self.path} holds {stored[0]} {stored[1]}x{stored[2]}, not {self.shape} "
                f"{self.n}x{self.k}; remove it or choose another --out"
            )

    def save(self) -> None:
        set_ratios(self.rows)
        content: dict[str, Any] = {
            "shape": self.shape,
            "N": self.n,
            "K": self.k,
            "controls": [dataclasses.asdict(control) for control in self.controls],
            "rows": [dataclasses.asdict(row) for row in self.rows],
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(content, indent=1) + "\n")
        os.replace(partial, self.path)

    def missing(self, m: int, kernels: Iterable[str], session: str) -> list[str]:
        """Kernels still to be timed at M. What failed in an earlier session is tried again."""
        again = {row.kernel for row in self._at(m) if row.error and row.session != session}
        done = {row.kernel for row in self._at(m)} - again
        return [name for name in kernels if name not in done]

    def missing_tokens(self, tokens: Iterable[int], kernel: str, session: str) -> list[int]:
        return [m for m in tokens if self.missing(m, [kernel], session)]

    def disagreeing(self, m: int, run: str, control: Control | None) -> list[str]:
        """Kernels at M with times from another process whose control differs, or is not known."""
        known = {c.run for c in self.controls if m == c.M and control and control.agrees(c)}
        others = (row for row in self._at(m) if row.us is not None and row.run != run)
        return list(dict.fromkeys(row.kernel for row in others if row.run not in known))

    def drop(self, m: int, kernels: Iterable[str]) -> None:
        """Forget the rows of these kernels at M, and controls that no row refers to any more."""
        gone = set(kernels)
        self.rows = [row for row in self.rows if m != row.M or row.kernel not in gone]
        runs = {row.run for row in self._at(m)}
        self.controls = [c for c in self.controls if m != c.M or c.run in runs]

    def add(self, m: int, rows: Sequence[Row], control: Control | None) -> None:
        """Add rows at M, in place of earlier ones of the same kernel and mode."""
        new = {(row.kernel, row.mode) for row in rows}
        kept = [row for row in self.rows if m != row.M or (row.kernel, row.mode) not in new]
        self.rows = [*kept, *rows]
        if control:
            others = [c for c in self.controls if (c.run, c.M) != (control.run, m)]
            self.controls = [*others, control]

    def _at(self, m: int) -> list[Row]:
        return [row for row in self.rows if m == row.M]
