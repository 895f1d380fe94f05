"""`report.json` and `report.html`: errors against sums made here, and what the page proposes."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import sources
import torch
from safetensors.torch import load_file

from vllm_intscale import reference
from vllm_intscale.format import CheckpointConfig, LayerScheme
from vllm_intscale.packing import unpack_codes
from vllm_intscale.quantize import Calibration, quantize_model
from vllm_intscale.quantize.loss import MEASURED, measure
from vllm_intscale.quantize.rtn import quantize_rows
from vllm_intscale.quantize.watch import Input

SOURCE = Path(__file__).parents[1] / "serving_examples" / "tiny-llama"


def dequantized(tensors: dict[str, torch.Tensor], layer: str) -> torch.Tensor:
    scale = tensors[f"{layer}.group_scale"].double()
    step = scale * tensors[f"{layer}.channel_scale"].double()[:, None]
    codes = unpack_codes(tensors[f"{layer}.qweight"], 4).double()
    return codes * step.repeat_interleave(codes.shape[1] // scale.shape[1], dim=1)


def test_errors_are_those_of_the_files(tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = quantize_model(str(SOURCE), out)
    content = json.loads((out / "report.json").read_text())
    source, stored = load_file(SOURCE / "model.safetensors"), load_file(out / "model.safetensors")
    assert (
        list(content["layers"]) == list(report.outcomes) and len(report.outcomes) == report.layers
    )
    for name, layer in content["layers"].items():
        weight = source[f"{name}.weight"][::MEASURED].double()
        error = (dequantized(stored, name)[::MEASURED] - weight).norm() / weight.norm()
        assert layer["error"] == pytest.approx(float(error), rel=1e-5)
        assert layer["measured_on"] == "weights" and layer["scheme"] == "W4A8 g128"
        assert sum(layer["squared_error"].values()) == pytest.approx(layer["error"] ** 2)
        amplifier = 1 / stored[f"{name}.channel_scale"].double()
        assert layer["amplifier"] == [float(amplifier.min()), float(amplifier.max())]
        assert 0 < layer["accumulator_used"] <= 1


def test_calibrated_errors_are_those_of_outputs() -> None:
    rng = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 256, generator=rng) * 0.02
    x = torch.randn(2000, 256, generator=rng) * torch.linspace(0.1, 3, 256)
    x[:, 1] = x[:, 0]  # inputs that go together, which squares of weights would not see
    inputs = Input()
    for part in x.split(700):
        inputs.add(part)
    assert inputs.tokens == 2000
    scheme = LayerScheme(4, 128)
    rows = quantize_rows("here", weight, scheme, "channel")
    loss = measure(weight, rows, 4, inputs)
    tensors = {f"l.{n}": getattr(rows, n) for n in ("qweight", "group_scale", "channel_scale")}
    stored, exact = dequantized(tensors, "l")[::MEASURED], weight[::MEASURED].double()
    assert loss.squares == pytest.approx(float((x.double() @ exact.T).square().sum()), rel=1e-4)
    changed = (x.double() @ (stored - exact).T).square().sum()
    assert loss.weights == pytest.approx(float(changed), rel=1e-3)
    a8, token_scale = reference.quantize_activation(x)
    rounding = a8.double() * token_scale.double()[:, None] - x.double()
    assert loss.activations == pytest.approx(float((rounding @ stored.T).square().sum()), rel=0.1)
    assert loss.int4 == pytest.approx(loss.weights, rel=0.05)


class Text(HTMLParser):
    """The text of a page, and what it would load from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.loads = "", []

    def handle_data(self, data: str) -> None:
        self.text += data

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [value for name, value in attrs if name in ("src", "href")]


def test_page_proposes_what_works(tmp_path: Path) -> None:
    calibration = Calibration(SOURCE / "README.md", 4, 64)
    quantize_model(str(SOURCE), tmp_path / "gptq", calibration=calibration)
    content = json.loads((tmp_path / "gptq/report.json").read_text())
    page = Text()
    page.feed((tmp_path / "gptq/report.html").read_text())
    assert not page.loads
    for name, layer in content["layers"].items():
        assert name in page.text
        assert layer["measured_on"] == "outputs" and "int8_activations" in layer["squared_error"]
    overrides = re.findall(r"--override '(.*):group_size=32'", page.text)
    ignored = re.findall(r"--ignore '(.*)'", page.text)
    assert overrides == ignored and overrides
    worst = max(content["layers"], key=lambda name: content["layers"][name]["error"])
    config = CheckpointConfig(overrides={pattern: {"group_size": 32} for pattern in overrides})
    quantize_model(str(SOURCE), tmp_path / "finer", config)
    finer = json.loads((tmp_path / "finer/report.json").read_text())["layers"]
    assert finer[worst]["scheme"] == "W4A8 g32"
    quantize_model(str(SOURCE), tmp_path / "less", CheckpointConfig(ignore=tuple(ignored)))
    assert worst not in json.loads((tmp_path / "less/report.json").read_text())["layers"]


def test_what_is_served_as_one_is_proposed_as_one(tmp_path: Path) -> None:
    """Of latent attention, and of linear attention beside it."""
    parts = ("q_a_proj", "kv_a_proj_with_mqa", "in_proj_qkv", "in_proj_z", "o_proj")
    names = [f"model.layers.0.self_attn.{part}" for part in parts]
    tensors = {f"{name}.weight": sources.random_weight(64, 256) for name in names}
    sources.save_model(tmp_path / "source", tensors)
    quantize_model(str(tmp_path / "source"), tmp_path / "out")
    page = Text()
    page.feed((tmp_path / "out/report.html").read_text())
    attention = r"re:model\.layers\.0\.self_attn\."
    assert set(re.findall(r"--ignore '(.*)'", page.text)) == {
        f"{attention}(kv_a_proj_with_mqa|q_a_proj)",
        f"{attention}(in_proj_qkv|in_proj_z)",
        names[-1],
    }
