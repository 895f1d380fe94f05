"""GPTQ: its arithmetic, and the run of a calibration text through real architectures."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import hard_models
import pytest
import reference_model
import torch
from conftest import random_model
from safetensors.torch import load_file, save_file
from sources import dequantize, read_all
from typer.testing import CliRunner

from vllm_intscale import cli
from vllm_intscale.checkpoint import validate_checkpoint
from vllm_intscale.errors import IntScaleError
from vllm_intscale.format import CheckpointConfig, LayerScheme
from vllm_intscale.packing import unpack_codes
from vllm_intscale.quantize import Calibration, calibrate, gptq, quantize_model, rtn, sites
from vllm_intscale.quantize.calibration import CHARACTERS
from vllm_intscale.quantize.shards import OpenFiles
from vllm_intscale.quantize.source import Plan, make_plan
from vllm_intscale.quantize.watch import Watch, first_rows
from vllm_intscale.text import tokenize_each

SHARED = Path(__file__).parents[2] / "shared"
SCHEME = LayerScheme(4, 64)


def correlated_inputs(tokens: int, k: int) -> torch.Tensor:
    """float32 `[tokens, K]` with few directions that matter, and one column that is always 0."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(k, k, generator=generator) * torch.logspace(0, -2, k)[:, None]
    x = torch.randn(tokens, k, generator=generator) @ mixing
    x[:, 5] = 0
    return x


def values(rows: rtn.QuantizedRows, bits: int = 4) -> torch.Tensor:
    step = rows.group_scale.double() * rows.channel_scale.double()[:, None]
    codes = unpack_codes(rows.qweight, bits)
    return codes * step.repeat_interleave(codes.shape[1] // step.shape[1], dim=1)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("amplifier", ["channel", 1024])
def test_gptq_halves_the_error_of_correlated_inputs(amplifier: str, bits: int) -> None:
    x = correlated_inputs(500, 192)
    weight = torch.randn(40, 192, generator=torch.Generator().manual_seed(1))
    weight[3, 64:128] = 0  # a group of zeros
    weight[4] = 0
    scheme = LayerScheme(bits, 64)
    factor = gptq.factorize(x.t() @ x)
    rows = gptq.quantize_rows("w", weight, scheme, amplifier, factor)
    nearest = rtn.quantize_rows("w", weight, scheme, amplifier, search=True)
    wanted = x.double() @ weight.double().t()

    def error(rows: rtn.QuantizedRows) -> float:
        return float((x.double() @ values(rows, bits).t() - wanted).norm() / wanted.norm())

    assert error(rows) < error(nearest) / 2
    assert not values(rows, bits)[3, 64:128].any() and not values(rows, bits)[4].any()
    assert (rows.group_scale[4] == 1).all()


def test_scales_are_searched_for_the_energy_of_inputs() -> None:
    """AWQ: the error of the outputs, as far as columns do not go together, is less in every row."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(40, 192, generator=generator)
    energy = torch.randn(192, generator=generator).mul(2).exp()

    def errors(energy_known: torch.Tensor | float) -> torch.Tensor:
        rows = rtn.quantize_rows("w", weight, SCHEME, "channel", search=True, energy=energy_known)
        return ((values(rows) - weight).square() * energy).sum(1)

    assert (errors(energy) <= errors(1.0)).all() and errors(energy).sum() < 0.9 * errors(1.0).sum()


def test_inputs_of_zeros_round_to_nearest() -> None:
    """A Hessian of zeros says nothing: every column stands for itself."""
    weight = torch.randn(8, 128, generator=torch.Generator().manual_seed(2))
    rows = gptq.quantize_rows("w", weight, SCHEME, "channel", gptq.factorize(torch.zeros(128, 128)))
    step = rows.group_scale.double() * rows.channel_scale.double()[:, None]
    nearest = (weight.double().unflatten(1, (2, 64)) / step[..., None]).round().clamp(-8, 7)
    assert torch.equal(unpack_codes(rows.qweight, 4).double(), nearest.flatten(1))


def test_an_indefinite_hessian_is_damped_until_it_is_not() -> None:
    x = correlated_inputs(3, 128) * 1e4  # of rank 3: float32 leaves small negative eigenvalues
    factor = gptq.factorize(x.t() @ x)
    assert factor.upper.isfinite().all() and (factor.upper.diagonal() > 0).all()


def test_inputs_that_are_not_finite_are_refused() -> None:
    with pytest.raises(IntScaleError, match="NaN or Inf on the calibration text"):
        gptq.factorize(torch.full((64, 64), torch.nan))


# ---- through a model ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        ("llama", "gptq"),
        ("mixtral", "gptq"),
        ("qwen2_moe", "gptq"),
        ("deepseek_v2", "gptq"),
        ("llama", "awq"),
        ("mixtral", "awq"),
    ],
)
def test_every_layer_of_an_architecture_is_reached(
    kind: str, method: Literal["gptq", "awq"], text: Path, tmp_path: Path
) -> None:
    """And the model's output is nearer to the original's than by rounding to nearest."""
    source = random_model(kind, tmp_path / "source", torch.float32)
    calibration = Calibration(text, samples=16, length=128, method=method)
    report = quantize_model(str(source), tmp_path / method, calibration=calibration)
    assert not report.uncalibrated
    quantize_model(str(source), tmp_path / "rtn", search=True)
    validate_checkpoint(tmp_path / method)
    prompt = [[int(t[1:]) for t in text.read_text().split()[:256]]]
    original = reference_model.load_unquantized(source)
    with torch.no_grad():
        wanted = original(torch.tensor(prompt)).logits
        errors = [
            float(
                (
                    reference_model.load(tmp_path / m, torch.float32)(torch.tensor(prompt)).logits
                    - wanted
                ).norm()
            )
            for m in (method, "rtn")
        ]
    assert errors[0] < errors[1]


def logits(model: torch.nn.Module, text: Path) -> torch.Tensor:
    prompt = [int(t[1:]) for t in text.read_text().split()[:256]]
    with torch.no_grad():
        found: torch.Tensor = model(torch.tensor([prompt])).logits
    return found


def loss_of(source: Path, out: Path, text: Path) -> float:
    """Of a quantized model's outputs, relative to the original's."""
    wanted = logits(reference_model.load_unquantized(source), text)
    found = logits(reference_model.load(out, torch.float32), text)
    return float((found - wanted).norm() / wanted.norm())


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, {"format": "pt"})


def copy_first_layer(tensors: dict[str, torch.Tensor]) -> None:
    for name in tensors:
        tensors[name] = tensors[name.replace("layers.1.", "layers.0.")].clone()


def clear_first_rows(tensors: dict[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        if tensor.dim() == 2 and "layers" in name:
            tensor[0] = 0


def copy_first_expert(tensors: dict[str, torch.Tensor]) -> None:
    for name in tensors:
        tensors[name] = tensors[re.sub(r"experts\.\d+", "experts.0", name)].clone()


@pytest.mark.parametrize(
    ("kind", "edit"),
    [
        ("llama", copy_first_layer),
        ("llama", clear_first_rows),
        ("mixtral", copy_first_layer),
        ("mixtral", clear_first_rows),
        ("mixtral", copy_first_expert),
        ("qwen2_moe", copy_first_expert),
    ],
)
def test_weights_that_are_alike_keep_their_names(
    kind: str, edit: Callable[[dict[str, torch.Tensor]], None], text: Path, tmp_path: Path
) -> None:
    """Layers of self-merges and experts of upcycled models are copies; dead channels are zeros."""
    source = random_model(kind, tmp_path / "source", torch.float32)
    change(source, edit)
    calibration = Calibration(text, samples=16, length=128)
    report = quantize_model(str(source), tmp_path / "gptq", calibration=calibration)
    assert not report.uncalibrated
    quantize_model(str(source), tmp_path / "rtn", search=True)
    assert loss_of(source, tmp_path / "gptq", text) < 0.75 * loss_of(source, tmp_path / "rtn", text)


def test_prefixes_of_vision_language_models(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model's layers have other names than the file's, and the vision tower is a copy."""
    source = random_model("llama", tmp_path / "source", torch.float32)
    change(source, copy_first_layer)
    model = reference_model.load_unquantized(source)
    monkeypatch.setattr(calibrate, "_load_model", lambda _: model)

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            if ".layers." in name:
                rest = name.removeprefix("model.")
                tensors[f"vision_tower.{rest}"] = tensors.pop(name)
                tensors[f"language_model.model.{rest}"] = tensors[f"vision_tower.{rest}"].clone()

    change(source, rename)
    report = quantize_model(
        str(source), tmp_path / "out", calibration=Calibration(text, samples=4, length=128)
    )
    assert report.layers == 14 and not report.uncalibrated and report.smoothed


def test_a_weight_belongs_to_one_layer(tmp_path: Path) -> None:
    plan = make_plan(random_model("llama", tmp_path / "m", torch.float32), CheckpointConfig())
    layer = reference_model.load_unquantized(plan.folder).model.layers[0]
    with OpenFiles() as files:
        watch = Watch(first_rows(plan, files), files)
        watch.next_layer("model.layers.1", layer)
        assert not watch.weights
        watch.next_layer("model.layers.0", layer)
        assert len(watch.weights) == 7
        with pytest.raises(IntScaleError, match="in model.layers.0 and again in twin.0") as error:
            watch.next_layer("twin.0", layer)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("stored", "in_config"), [("float32", "bfloat16"), ("bfloat16", "float32")]
)
def test_dtype_of_the_file_is_not_the_configs(
    stored: str, in_config: str, text: Path, tmp_path: Path
) -> None:
    """What is calibrated and smoothed is what is stored."""
    easy = random_model("llama", tmp_path / "easy", getattr(torch, stored))
    source = tmp_path / "source"
    hard_models.make_hard("norm", easy, source)
    calibration = Calibration(text, samples=4, length=128)
    for dtype in (stored, in_config):
        config = json.loads((source / "config.json").read_text())
        (source / "config.json").write_text(json.dumps(config | {"dtype": dtype}))
        report = quantize_model(str(source), tmp_path / dtype, calibration=calibration)
        assert not report.uncalibrated and report.smoothed
    found, wanted = read_all(tmp_path / in_config), read_all(tmp_path / stored)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def load_with(edit: Callable[[str, torch.Tensor], None]) -> Callable[[Plan], Any]:
    """A model whose code changes weights while it loads them."""

    def load(plan: Plan) -> Any:
        model = reference_model.load_unquantized(plan.folder).requires_grad_(False)
        for name, parameter in model.named_parameters():
            edit(name, parameter)
        return model

    return load


def test_a_layer_that_is_not_recognized_leaves_nothing(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = random_model("llama", tmp_path / "source", torch.float32)
    monkeypatch.setattr(calibrate, "_load_model", load_with(lambda _, p: p.mul_(1.5)))
    with pytest.raises(IntScaleError, match=r"layers\.0, as .*--method rtn") as error:
        quantize_model(str(source), tmp_path / "out", calibration=Calibration(text, 4, 64))
    assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("out*"))


def test_weights_that_are_not_recognized_are_told_from_those_that_few_tokens_reach(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def permute(name: str, parameter: torch.Tensor) -> None:
        if "k_proj" in name:  # as for another kind of rotation: the first row stays
            parameter[1:] = parameter[1:].flip(0)

    source = random_model("llama", tmp_path / "source", torch.float32)
    monkeypatch.setattr(calibrate, "_load_model", load_with(permute))
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    report = quantize_model(str(source), tmp_path / "out", calibration=Calibration(text, 4, 64))
    k_projs = [f"model.layers.{i}.self_attn.k_proj" for i in (0, 1)]
    assert report.uncalibrated == k_projs
    (record,) = caplog.records
    assert "does not hold 2 layers as they are stored" in record.getMessage()
    assert record.getMessage().endswith(", ".join(k_projs))
    caplog.clear()
    monkeypatch.setattr(calibrate, "MIN_TOKENS", 1 << 30)
    monkeypatch.setattr(calibrate, "_load_model", load_with(lambda *_: None))
    report = quantize_model(str(source), tmp_path / "few", calibration=Calibration(text, 4, 64))
    assert len(report.uncalibrated) == report.layers and not caplog.records


def test_experts_that_the_text_does_not_reach_are_rounded(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sites.Smoother, "smooth", lambda *_: {})  # else their weights are scaled
    source = random_model("mixtral", tmp_path / "source", torch.float32)
    out = tmp_path / "out"
    report = quantize_model(str(source), out, calibration=Calibration(text, 1, 160))
    assert report.uncalibrated and all(".experts." in layer for layer in report.uncalibrated)
    quantize_model(str(source), tmp_path / "rtn", search=True)
    tensors, rounded = read_all(out), read_all(tmp_path / "rtn")
    for layer in report.uncalibrated:
        assert torch.equal(tensors[f"{layer}.qweight"], rounded[f"{layer}.qweight"])
    assert (dequantize(tensors, "model.layers.1.self_attn.o_proj") != 0).any()


def test_lines_of_json_are_read_as_text(text: Path, tmp_path: Path) -> None:
    source = random_model("llama", tmp_path / "source", torch.float32)
    words = text.read_text().split()
    space = "\u2028"  # JSON may hold it as it is; it ends no line
    texts = [space.join(words[i : i + 64]) for i in range(0, len(words), 64)]
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    (tmp_path / "text.jsonl").write_text("\n".join(lines) + "\n\n")
    quantize_model(str(source), tmp_path / "a", calibration=Calibration(text, 4, 64))
    jsonl = Calibration(tmp_path / "text.jsonl", 4, 64)
    quantize_model(str(source), tmp_path / "b", calibration=jsonl)
    a, b = read_all(tmp_path / "a"), read_all(tmp_path / "b")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_of_a_long_text_slices_are_enough(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Samples come from its whole length, but most of it is not tokenized."""
    source = random_model("llama", tmp_path / "source", torch.float32)
    model = reference_model.load_unquantized(source)
    words = [f"t{i // 100 + 3}" for i in range(40_000)]
    (tmp_path / "long.txt").write_text(" ".join(words))
    seen: list[str] = []

    def tokenized(model: str, texts: Iterable[str]) -> Iterator[list[int]]:
        seen.extend(texts)
        return tokenize_each(model, seen)

    monkeypatch.setattr(calibrate, "WHOLE", 100_000)
    monkeypatch.setattr(calibrate, "tokenize_each", tokenized)
    read = calibrate._read_samples
    samples = read(source, model, Calibration(tmp_path / "long.txt", 8, 64))
    assert [tuple(sample.shape) for sample in samples] == [(1, 64)] * 8
    assert [len(part) for part in seen] == [64 * CHARACTERS] * 8
    firsts = [int(sample[0, 1]) for sample in samples]  # the first may be the end of a word
    assert firsts == sorted(firsts) and firsts[0] == 3 and firsts[-1] >= 395
    seen.clear()
    read(source, model, Calibration(text, 8, 64))
    assert not seen


@pytest.mark.parametrize(
    ("content", "suffix", "wanted"),
    [
        ("t3 t4 t5", ".txt", "has 3 tokens, fewer than a sample of 64; name a longer"),
        ('{"txt": "t3"}', ".jsonl", 'as lines of JSON with "text"'),
        ("t3 t4", ".jsonl", 'as lines of JSON with "text"'),
        (None, ".txt", "cannot be read as text"),
        ('[{"text": "t3 t4"}]', ".json", 'write its texts as "text" of the lines of a .jsonl file'),
    ],
)
def test_bad_text_leaves_nothing(
    content: str | None, suffix: str, wanted: str, tmp_path: Path
) -> None:
    source = random_model("llama", tmp_path / "source", torch.float32)
    file = tmp_path / f"text{suffix}"
    if content is not None:
        file.write_text(content)
    with pytest.raises(IntScaleError, match=re.escape(wanted)) as error:
        quantize_model(str(source), tmp_path / "out", calibration=Calibration(file, 4, 64))
    assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("out*"))


def test_a_model_that_transformers_cannot_load_leaves_nothing(text: Path, tmp_path: Path) -> None:
    source = random_model("llama", tmp_path / "source", torch.float32)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"model_type": "nobody"}))
    with pytest.raises(IntScaleError, match="transformers cannot load the model.*--method rtn"):
        quantize_model(str(source), tmp_path / "out", calibration=Calibration(text, 4, 64))
    assert not list(tmp_path.glob("out*"))


def test_a_model_without_tokenizer_leaves_nothing(text: Path, tmp_path: Path) -> None:
    source = random_model("llama", tmp_path / "source", torch.float32)
    for file in source.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(IntScaleError, match="no usable tokenizer"):
        quantize_model(str(source), tmp_path / "out", calibration=Calibration(text, 4, 64))
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (["--method", "gptq"], "--calibration FILE"),
        (["--method", "awq"], "--method awq needs a text"),
        (["--calibration", "t.txt"], "need --method gptq"),
        (["--calibration-samples", "9"], "need --method gptq"),
        (["--calibration-length", "9"], "need --method gptq"),
        (["--method", "awq", "--calibration", "t.txt", "--scale-search"], "leave out"),
    ],
)
def test_options_that_do_not_go_together(options: list[str], wanted: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(cli.app, ["quantize", "model", str(tmp_path / "out"), *options])
    assert isinstance(result.exception, IntScaleError) and wanted in str(result.exception)


def test_command_line(text: Path, tmp_path: Path) -> None:
    source, out = random_model("llama", tmp_path / "source", torch.float32), tmp_path / "out"
    options = ["--method", "gptq", "--calibration", str(text), "--calibration-samples", "4"]
    command = ["quantize", str(source), str(out), *options, "--calibration-length", "128"]
    result = CliRunner().invoke(cli.app, command)
    assert result.exit_code == 0, result.output
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["source"]["method"] == "GPTQ, 4 samples of text.txt"


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the trained models")
@pytest.mark.parametrize("variant", ["", "norm", "inner"])
@pytest.mark.parametrize(
    ("model", "unquantized", "limit"),
    [("llama-22m", 11.8018, 1.016), ("mixtral-15m", 14.8541, 1.02)],
)
def test_perplexity_of_trained_models(
    model: str, unquantized: float, limit: float, variant: str, tmp_path: Path
) -> None:
    """Against the original's on a CPU, `intscale eval`, over all windows of 512.

    A hard variant may lose 1.5 times as much.
    """
    source = SHARED / "models" / model
    if variant:
        hard_models.make_hard(variant, source, tmp_path / "source")
        source, limit = tmp_path / "source", 1 + 1.5 * (limit - 1)
    calibration = Calibration(SHARED / "data" / "calibration.txt", 64, 512)
    quantize_model(str(source), tmp_path / "out", calibration=calibration)
    command = ["eval", str(tmp_path / "out"), "--text", str(SHARED / "data" / "heldout.txt")]
    main = [sys.executable, "-m", "vllm_intscale"]  # an engine a process
    run = subprocess.run([*main, *command], capture_output=True, text=True, check=True)
    result = json.loads(run.stdout.splitlines()[-1])
    assert result["windows"] == 219 and result["perplexity"] <= limit * unquantized
