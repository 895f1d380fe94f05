"""What integer group scales cost: perplexity of trained models, beside float scales, same codes.

In float32, with int8 activations; `pytest -m slow -s tests/test_integer_scale.py` prints the table.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from vllm_intscale import reference
from vllm_intscale.format import Amplifier, CheckpointConfig, LayerScheme
from vllm_intscale.packing import unpack_codes
from vllm_intscale.quantize import rtn
from vllm_intscale.quantize.shards import OpenFiles
from vllm_intscale.quantize.source import make_plan
from vllm_intscale.quantize.watch import Watch, first_rows
from vllm_intscale.text import tokenize

SHARED = Path(__file__).parents[2] / "shared"
WINDOW = 512


class Int8Inputs(TorchFunctionMode):
    """Rounds what some weights are multiplied with to int8, a scale for each token."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.places = {weight.data_ptr() for weight in weights.values()}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.linear and args[1].data_ptr() in self.places:
            step = args[0].abs().amax(-1, keepdim=True).clamp_min(1e-30) / 127
            args = ((args[0] / step).round() * step, *args[1:])
        return func(*args, **(kwargs or {}))


@contextmanager
def loaded(folder: Path) -> Iterator[tuple[Any, dict[str, Tensor], dict[str, LayerScheme]]]:
    """A model, its quantizable weights by name, and their schemes."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, experts_implementation="eager"
    ).requires_grad_(False)
    plan = make_plan(folder, CheckpointConfig())
    with OpenFiles() as files:
        watch = Watch(first_rows(plan, files))
        watch.find_weights(model.eval())
    schemes = {m.name: m.scheme for m in plan.matrices if m.scheme}
    yield model, {name: watch.weights[name] for name in schemes}, schemes


def perplexity(model: Any, windows: Tensor) -> float:
    loss = 0.0
    with torch.no_grad():
        for ids in windows:
            logits = model(ids[None], use_cache=False).logits[0, :-1]
            loss += float(torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum"))
    return math.exp(loss / (windows.shape[0] * (WINDOW - 1)))


def quantized(
    weight: Tensor, scheme: LayerScheme, amplifier: Amplifier
) -> tuple[Tensor, Tensor, Tensor]:
    """With float scales, with integer scales, and folded: the same codes."""
    number = amplifier
    if number == "heuristic":
        number = rtn.heuristic_amplifier(rtn.smallest_scale("w", weight, scheme))
    rows = rtn.quantize_rows("w", weight, scheme, number)
    codes = unpack_codes(rows.qweight, scheme.bits)
    scale = rtn.float_scales("w", weight.unflatten(-1, (-1, scheme.group_size)), scheme.bits)

    def dequantized(w: reference.Weight) -> Tensor:
        step = w.group_scale.double() * w.channel_scale.double()[:, None]
        group_size = w.codes.shape[1] // step.shape[1]
        return (w.codes * step.repeat_interleave(group_size, dim=1)).float()

    w = reference.Weight(codes, rows.group_scale, rows.channel_scale)
    floats = (codes * scale.repeat_interleave(scheme.group_size, dim=1)).float()
    return floats, dequantized(w), dequantized(reference.fold(w))


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the trained models")
@pytest.mark.parametrize("name", ["llama-22m", "mixtral-15m"])
def test_integer_scales_cost_next_to_nothing(name: str) -> None:
    folder = SHARED / "models" / name
    ids = tokenize(str(folder), (SHARED / "data" / "heldout.txt").read_text())
    windows = torch.tensor(ids[: len(ids) // WINDOW * WINDOW]).view(-1, WINDOW)
    ratios = {}
    with loaded(folder) as (model, weights, schemes):
        print(f"\n{name}: {perplexity(model, windows):.4f} unquantized")
        exact = {n: weight.clone() for n, weight in weights.items()}
        choices: list[tuple[Amplifier, int]] = [("channel", 255), ("channel", 15)]
        choices += [("heuristic", 255), (1024, 255), (4096, 255)]
        for amplifier, largest in choices:
            found = {
                n: quantized(w, replace(schemes[n], max_group_scale=largest), amplifier)
                for n, w in exact.items()
            }
            figures = []
            for form in range(3):
                for n, weight in weights.items():
                    weight.copy_(found[n][form])
                with Int8Inputs(weights):
                    figures.append(perplexity(model, windows))
            what = f"channel {largest}" if amplifier == "channel" else str(amplifier)
            ratios[what] = [figure / figures[0] for figure in figures]
            print(
                f"{what:12} float scales {figures[0]:.4f}  integer {figures[1]:.4f} "
                f"({ratios[what][1]:.5f})  folded {figures[2]:.4f} ({ratios[what][2]:.5f})"
            )
    assert max(ratios["channel 255"]) <= 1.001
