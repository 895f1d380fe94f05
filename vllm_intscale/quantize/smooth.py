"""Scales that take outliers out of activations before they are quantized (numeric part).

    x W^T = (x / s) (W * s)^T        s: one number for each of the K columns

A column of x that is much larger than the others takes the int8 steps of all of them; a column of W
that is much larger than its group takes their int4 steps. s moves what one has too much into the
other: s_j = max |x_j|^a / max |W_j|^(1 - a) (SmoothQuant, arXiv 2211.10438, equation 4), with the
exponent a for which the quantized product comes nearest to the exact one (AWQ, arXiv 2306.00978,
equation 5). Here s is rounded to powers of two, which scale without rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from vllm_intscale.format import LayerScheme

EXPONENTS = tuple(i / 10 for i in range(11))
SAMPLE_ROWS = 512  # of activations, to compare exponents on
LARGEST = 10  # power of two, of a scale over their geometric mean


class Scales(NamedTuple):
    """What a stored tensor is multiplied with: float32 powers of two of its rows and columns."""

    rows: Tensor | None = None
    columns: Tensor | None = None

    def times(self, other: Scales) -> Scales:
        """Both, one after the other."""
        return Scales(_product(self.rows, other.rows), _product(self.columns, other.columns))

    def apply(self, tensor: Tensor, first_row: int = 0) -> Tensor:
        """Rows of the tensor from `first_row` on, as float32."""
        tensor = tensor.float()
        if self.columns is not None:
            tensor = tensor * self.columns
        if self.rows is not None:
            rows = self.rows[first_row : first_row + tensor.shape[0]]
            tensor = tensor * rows.view(-1, *[1] * (tensor.dim() - 1))
        return tensor


def _product(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return a if b is None else b if a is None else a * b


@dataclass
class Activations:
    """The inputs of weights, as far as scales depend on them."""

    largest: Tensor | None = None  # float32 [K], of each column
    rows: list[Tensor] = field(default_factory=list)  # some, SAMPLE_ROWS together

    def add(self, x: Tensor) -> None:
        """x: float32 `[tokens, K]`."""
        largest = x.abs().amax(0)
        self.largest = largest if self.largest is None else self.largest.maximum(largest)
        missing = SAMPLE_ROWS - sum(len(rows) for rows in self.rows)
        if missing > 0:  # a few of each sample of the text
            step = max(1, len(x) // 16)
            self.rows.append(x[::step][:missing].clone())


def choose_scale(
    x: Activations, weights: Sequence[Tensor], schemes: Sequence[LayerScheme | None]
) -> Tensor | None:
    """s, float32 `[K]`, for all weights, float32 `[n, K]`, that multiply x; None if none is better.

    schemes: of the weights; None for one that is not quantized.
    """
    if x.largest is None or not any(schemes):
        return None
    rows = torch.cat(x.rows)
    in_weights = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0)
    choices = [torch.ones_like(x.largest)]
    choices += [_scale(x.largest, in_weights, exponent) for exponent in EXPONENTS]
    inputs = [_int8(rows / s) for s in choices]
    errors = torch.zeros(len(choices), dtype=torch.float64)
    for weight, scheme in zip(weights, schemes, strict=True):
        if scheme is None:
            continue
        wanted = rows @ weight.t()
        for i, s in enumerate(choices):
            found = inputs[i] @ _rounded(weight * s, scheme).t()
            errors[i] += (found - wanted).square().sum().double().cpu()
    best = int(errors.argmin())
    return choices[best] if best else None


def _scale(largest: Tensor, in_weights: Tensor, exponent: float) -> Tensor:
    exact = largest.double().log2() * exponent - in_weights.double().log2() * (1 - exponent)
    used = (largest > 0) & (in_weights > 0)
    exact = torch.where(used, exact, torch.nan)
    power = (exact - exact.nanmean()).nan_to_num(0.0).round().clamp(-LARGEST, LARGEST)
    return power.exp2().float()


def _int8(x: Tensor) -> Tensor:
    """Rounded to int8 with a scale of each row, as `reference.quantize_activation` does."""
    step = x.abs().amax(1, keepdim=True).clamp_min(1e-30) / 127
    return (x / step).round() * step


def _rounded(weight: Tensor, scheme: LayerScheme) -> Tensor:
    """Rounded to nearest, with a float scale of each group: near enough to compare."""
    limit = 1 << (scheme.bits - 1)
    groups = weight.unflatten(1, (-1, scheme.group_size))
    step = groups.abs().amax(-1, keepdim=True).clamp_min(1e-30) / (limit - 0.5)
    rounded: Tensor = (groups / step).round().clamp(-limit, limit - 1) * step
    return rounded.flatten(1)
