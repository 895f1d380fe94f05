"""`intscale bench serve`: formats of random checkpoints, what is compared, engines on CPU."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from vllm_intscale import cli
from vllm_intscale.bench import engine_worker, random_checkpoint, random_formats, serve, served
from vllm_intscale.bench.serve import Configuration, Row
from vllm_intscale.errors import IntScaleError
from vllm_intscale.packing import unpack_codes

SMALL = random_checkpoint.MODELS["llama-3-8b"] | {
    **{"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "vocab_size": 512},
    **{"num_attention_heads": 4, "num_key_value_heads": 2},
}
STEP = {"tokens_per_second": 100.0, "step_ms": 10.0, "gpu_step_ms": None}


def codes(words: torch.Tensor) -> torch.Tensor:
    """Of compressed-tensors and GPTQ, neighbours in the last dimension: 8 is 0."""
    return unpack_codes(words, 4).float()


def dequantized(name: str, t: dict[str, torch.Tensor]) -> torch.Tensor:
    """The weight `[N, K]` of a layer, by what each format says of itself."""
    if name == "bf16":
        return t["weight"].float()
    if name in ("fp8", "w8a8_int8"):
        return t["weight"].float() * t["weight_scale"]
    if name == "gptq":
        assert t["g_idx"].tolist() == [k // 128 for k in range(len(t["g_idx"]))]
        return codes(t["qweight"].t().contiguous()) * t["scales"].t().repeat_interleave(128, 1)
    if name == "intscale":
        scale = t["group_scale"].repeat_interleave(128, 1) * t["channel_scale"][:, None]
        return codes(t["qweight"]) * scale
    assert t["weight_shape"].tolist() == [256, 512]
    return codes(t["weight_packed"]) * t["weight_scale"].float().repeat_interleave(128, 1)


@pytest.mark.parametrize("name", random_formats.FORMATS)
def test_random_layers(name: str) -> None:
    """Of the size asked for, with weights of the usual size."""
    made = random_formats.FORMATS[name].linear("layer", 256, 512)
    weight = dequantized(name, {key.removeprefix("layer."): t.cpu() for key, t in made.items()})
    assert weight.shape == (256, 512)
    assert weight.std() == pytest.approx(random_formats.WEIGHT_STD, rel=0.2)
    assert abs(weight.mean()) < 0.15 * random_formats.WEIGHT_STD  # int4: half a code


def test_random_checkpoint_of_another_format(tmp_path: Path) -> None:
    random_checkpoint.write_random(SMALL, tmp_path / "fp8", "fp8")
    config = json.loads((tmp_path / "fp8" / "config.json").read_text())
    assert config["quantization_config"]["format"] == "float-quantized"
    tensors = load_file(tmp_path / "fp8" / "model-00000.safetensors")
    assert tensors["model.layers.0.mlp.up_proj.weight"].dtype == torch.float8_e4m3fn
    with pytest.raises(IntScaleError, match="'fp7' is unknown; there are intscale, bf16"):
        random_checkpoint.write_random(SMALL, tmp_path / "fp7", "fp7")


def test_busy_time_counts_overlapping_kernels_once() -> None:
    assert engine_worker.busy([(5, 6), (0, 2), (1, 3), (2.5, 2.75), (6, 7)]) == 5


def test_rows_beside_another_control_are_not_compared() -> None:
    def row(name: str, control: float, **busy: float) -> Row:
        return Row(name, "decode", 1, STEP, {**STEP, "tokens_per_second": control, **busy})

    rows = [row("a", 100), row("b", 101), row("c", 110), Row("d", "decode", 1, None, None, "no")]
    kept = serve.agreeing(rows)
    assert [r.configuration for r in kept["decode", 1]] == ["a", "b"]
    by_gpu = [row("a", 100, gpu_step_ms=2.0), row("b", 150, gpu_step_ms=2.01)]
    assert serve.agreeing(by_gpu)["decode", 1] == by_gpu


@pytest.mark.e2e
@pytest.mark.timeout(420)
def test_engines_on_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a control in bf16; one configuration whose kernel is not the one that is meant."""
    pytest.importorskip("vllm")
    monkeypatch.setattr(serve, "PREFILL_PROMPTS", 2)
    monkeypatch.setitem(random_checkpoint.MODELS, "small", SMALL)
    ours = Configuration("intscale", r"14 on cpu_backend|8 on cpu_backend")
    monkeypatch.setitem(serve.CONFIGURATIONS, "intscale", ours)
    command = ["intscale", "bench", "serve", "--model", "small", "--batches", "1,3", "--out"]
    options = [
        "--configurations",
        "intscale,w8a8_int8",
        "--control",
        "bf16",
        "--plot",
        str(tmp_path / "plot.png"),
    ]
    engine: dict[str, Any] = {"enforce_eager": True, "max_num_seqs": 4}
    options += ["--engine", json.dumps(engine), "--concurrency", "2"]
    monkeypatch.setattr(served, "PROMPT", 16)
    monkeypatch.setattr(served, "ANSWER", 4)
    monkeypatch.setattr(sys, "argv", [*command, str(tmp_path / "out"), *options])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code
    printed = capsys.readouterr().out
    found = json.loads(printed.splitlines()[-1])
    asked = [(r["configuration"], r["what"], r["batch"]) for r in found["rows"]]
    assert asked == [
        ("w8a8_int8", "start", 0),
        *(("intscale", "prefill", 2), ("intscale", "decode", 1), ("intscale", "decode", 3)),
        *(("w8a8_int8", "serve", 0), ("intscale", "serve", 2)),
    ]
    assert "its log does not say" in found["rows"][0]["error"]
    assert all(r["found"]["tokens_per_second"] > 0 for r in found["rows"][1:4])
    assert all(r["control"]["tokens_per_second"] > 0 for r in found["rows"][1:4])
    assert "its log does not say" in found["rows"][4]["error"]
    assert found["rows"][5]["found"]["completed"] == 2 * served.ROUNDS
    assert set(found["engines"]) == {"intscale", "bf16"}  # with the control
    assert all(facts["weights_gib"] > 0 for facts in found["engines"].values())
    assert (tmp_path / "plot.png").stat().st_size > 1000
    assert "A step of decoding" in printed


def test_workers_that_fail_are_one_line(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    log = tmp_path / "client.log"
    with contextlib.closing(serve.Worker("client_worker", {}, {}, log)) as client:
        for request, seconds, message in (
            ({"options": ["--no-such-option"]}, 60, r"^the client failed: SystemExit\(2\); see "),
            ({"options": ["--no-such-option"]}, 0, r"^no answer after 0 s; see "),
        ):
            with pytest.raises(IntScaleError, match=message) as caught:
                client.ask(request, seconds)
            assert str(log) in str(caught.value) and "\n" not in str(caught.value)
        with pytest.raises(IntScaleError, match="its process ended with code -9"):
            client.ask({"options": []})
    with pytest.raises(IntScaleError, match="its process ended with code 1"):
        serve.Worker("no_such_module", {}, {}, log)


def test_unknown_names_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for options, message in (
        (["--model", "gpt-2"], "model 'gpt-2' is unknown"),
        (["--configurations", "fp7"], "fp7: unknown; there are intscale, bf16"),
        (["--engine", "[]"], "it must be an object"),
    ):
        monkeypatch.setattr(sys, "argv", ["intscale", "bench", "serve", *options])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        error = str(stop.value.code)
        assert error.startswith("intscale: error: ") and "\n" not in error and message in error
