"""Smoothing: its scales, and models that need it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import hard_models
import pytest
import reference_model
import torch
from conftest import random_model
from safetensors.torch import load_file
from sources import read_all
from torch import Tensor, nn

from vllm_intscale.format import CheckpointConfig, LayerScheme
from vllm_intscale.quantize import Calibration, calibrate, quantize_model
from vllm_intscale.quantize.shards import OpenFiles
from vllm_intscale.quantize.sites import SiteFinder, Smoother
from vllm_intscale.quantize.smooth import Activations, Scales, choose_scale
from vllm_intscale.quantize.source import make_plan

SCHEME = LayerScheme(4, 64)


def activations(x: Tensor) -> Activations:
    found = Activations()
    found.add(x)
    return found


def test_scale_undoes_an_outlier_and_is_a_power_of_two() -> None:
    """A model whose column 7 has moved from W to x is smoothed to the same, up to one factor."""
    rng = torch.Generator().manual_seed(0)
    x, weight = torch.randn(300, 128, generator=rng), torch.randn(64, 128, generator=rng)
    factor = torch.ones(128)
    factor[[7, 70]] = torch.tensor([64.0, 32.0])
    hard = choose_scale(activations(x * factor), [weight / factor], [SCHEME])
    assert hard is not None and torch.equal(hard.log2().round().exp2(), hard)
    easy = choose_scale(activations(x), [weight], [SCHEME])
    relative = hard / factor / (1 if easy is None else easy)
    assert relative.max() <= 2 * relative.min()


def test_columns_of_zeros_stay() -> None:
    x, weight = torch.randn(300, 128), torch.randn(64, 128)
    x[:, 3] = 0
    x[:, 9] *= 1000
    weight[:, 5] = 0
    s = choose_scale(activations(x), [weight], [SCHEME])
    assert s is not None and s.isfinite().all() and s[3] == s[5] == 1


def test_nothing_to_gain_or_nothing_quantized() -> None:
    x, weight = torch.randn(300, 128), torch.randn(64, 128)
    x[:, 9] *= 1000
    assert choose_scale(activations(x), [weight], [None]) is None
    assert choose_scale(Activations(), [weight], [SCHEME]) is None
    flat = torch.full((300, 128), 2.0)
    assert choose_scale(activations(flat), [torch.ones(64, 128)], [SCHEME]) is None


def test_scales_apply_to_rows_from_any_on() -> None:
    tensor = torch.randn(6, 4).bfloat16()
    scales = Scales(rows=torch.arange(6.0)).times(Scales(columns=torch.arange(4.0)))
    wanted = tensor.float() * torch.arange(6.0)[:, None] * torch.arange(4.0)
    assert torch.equal(scales.apply(tensor), wanted)
    assert torch.equal(scales.apply(tensor[2:5], 2), wanted[2:5])
    norm = Scales(rows=torch.arange(6.0)).apply(tensor[:, 0])
    assert torch.equal(norm, tensor[:, 0].float() * torch.arange(6.0))


# ---- in a model ---------------------------------------------------------------------------------


def logits(model: nn.Module, text: Path) -> Tensor:
    prompt = [int(t[1:]) for t in text.read_text().split()[:256]]
    with torch.no_grad():
        found: Tensor = model(torch.tensor([prompt])).logits
    return found


@pytest.mark.parametrize("reached", [True, False])
@pytest.mark.parametrize("variant", ["norm", "inner"])
@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_hard_models_lose_as_little_as_easy_ones(
    kind: str,
    variant: str,
    reached: bool,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where the calibration smooths only, and weights are scaled on their way to the file."""
    if not reached:
        monkeypatch.setattr(calibrate, "MIN_TOKENS", 1 << 30)
    easy = random_model(kind, tmp_path / "easy", torch.float32)
    hard_models.make_hard(variant, easy, tmp_path / "hard")
    wanted = logits(reference_model.load_unquantized(easy), text)
    same = logits(reference_model.load_unquantized(tmp_path / "hard"), text)
    assert (same - wanted).norm() < 1e-4 * wanted.norm()
    losses = {}
    for name in ("easy", "hard"):
        out = tmp_path / f"{name}-int4"
        report = quantize_model(
            str(tmp_path / name), out, calibration=Calibration(text, samples=16, length=128)
        )
        found = logits(reference_model.load(out, torch.float32), text)
        losses[name] = float((found - wanted).norm() / wanted.norm())
    assert report.smoothed > 0
    assert bool(report.uncalibrated) is not reached
    assert losses["hard"] < 1.5 * losses["easy"]


def test_what_is_not_quantized_is_scaled_exactly(text: Path, tmp_path: Path) -> None:
    """Norms are divided by powers of two; the router's columns are multiplied by the same."""
    source = random_model("mixtral", tmp_path / "source", torch.bfloat16)
    hard_models.make_hard("norm", source, tmp_path / "hard")
    quantize_model(str(tmp_path / "hard"), tmp_path / "out", calibration=Calibration(text, 16, 128))
    before, after = load_file(tmp_path / "hard" / "model.safetensors"), read_all(tmp_path / "out")
    changed = 0
    for name in (n for n in before if n.endswith("post_attention_layernorm.weight")):
        s = before[name].float() / after[name].float()
        assert torch.equal(s.log2().round().exp2(), s)
        router = name.replace("post_attention_layernorm", "block_sparse_moe.gate")
        assert torch.equal(after[router].float(), before[router].float() * s)
        changed += not torch.equal(before[name], after[name])
    assert changed


class Layer(nn.Module):
    """A norm and a projection; `tap` may use the norm's output, too."""

    def __init__(self, norm: Tensor, weight: Tensor, tap: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(norm.shape[0])
        self.input_layernorm.weight.data = norm.clone()
        self.weight = nn.Parameter(weight.clone())
        self.tap = tap

    def forward(self, x: Tensor) -> Tensor:
        x = self.input_layernorm(x)
        return nn.functional.linear(x, self.weight) + self.tap(x)


@pytest.mark.parametrize(
    ("tap", "smoothed"), [(lambda x: 0, True), (lambda x: x.sum(-1, keepdim=True), False)]
)
def test_a_norm_that_something_else_uses_stays(
    tap: Callable[[Tensor], Tensor], smoothed: bool, tmp_path: Path
) -> None:
    source = random_model("llama", tmp_path / "source", torch.float32)
    hard_models.make_hard("norm", source, tmp_path / "hard")
    tensors = read_all(tmp_path / "hard")
    prefix = "model.layers.0."
    norm, o_proj = f"{prefix}input_layernorm.weight", f"{prefix}self_attn.o_proj.weight"
    layer = Layer(tensors[norm], tensors[o_proj], tap)
    model = nn.ModuleDict({"model": nn.ModuleDict({"layers": nn.ModuleList([layer])})})
    x = torch.randn(1, 300, len(tensors[norm]))
    plan = make_plan(tmp_path / "hard", CheckpointConfig())
    with torch.no_grad(), OpenFiles() as files:
        with SiteFinder(layer) as finder:
            before = layer(x)
            finder.linear(layer.input_layernorm(x), [o_proj])
        smoother = Smoother(plan, files, model)
        weights = {o_proj: layer.weight.data}
        scales = smoother.smooth(finder, layer, weights, lambda: torch.equal(layer(x), before))
        assert torch.equal(layer(x), before)
    assert set(scales) == ({norm, o_proj} if smoothed else set())
    assert torch.equal(layer.weight.data, tensors[o_proj]) is not smoothed
    assert torch.equal(layer.input_layernorm.weight.data, tensors[norm]) is not smoothed
