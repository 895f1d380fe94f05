"""`intscale bench serve`: formats of random checkpoints, what is compared, engines on CPU."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from vllm_intscale import cli
from vllm_intscale.bench import (
    configurations,
    engine_worker,
    random_checkpoint,
    random_formats,
    serve,
    serve_report,
    served,
)
from vllm_intscale.bench.configurations import Configuration, Plan, groups_of
from vllm_intscale.bench.serve import Row
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
    """By the time that the GPU is busy, where it is known of a row, too."""

    def row(name: str, wall: float, busy: float | None = None, own: float | None = None) -> Row:
        control = {**STEP, "tokens_per_second": wall, "gpu_step_ms": busy}
        return Row(name, "decode", 1, {**STEP, "gpu_step_ms": own}, control)

    def kept(*rows: Row) -> str:
        return "".join(r.configuration for r in serve.agreeing(rows)["decode", 1])

    failed = Row("d", "decode", 1, None, None, "no")
    assert kept(row("a", 100), row("b", 101), row("c", 110), failed) == "ab"
    assert kept(row("a", 100, 2.0, 3.0), row("b", 150, 2.01, 3.0), row("c", 100, 2.1, 3.0)) == "ab"
    assert kept(row("a", 100, 2.0, 3.0), row("b", 101, 2.0), row("c", 150, 2.0)) == "ab"


def test_configurations_on_several_gpus(tmp_path: Path) -> None:
    """Options of each; a GPU holds its part of the weights and of the cache."""
    options = {
        name: dict(configurations.configuration_of(name).options)
        for name in ("marlin_w4a16_tp2", "w4a8_fp8_pp4", "intscale_ep2", "w4a8_fp8")
    }
    assert options == {
        "marlin_w4a16_tp2": {**configurations.MARLIN_ONLY, "tensor_parallel_size": 2},
        "w4a8_fp8_pp4": {"pipeline_parallel_size": 4},
        "intscale_ep2": {"tensor_parallel_size": 2, "enable_expert_parallel": True},
        "w4a8_fp8": {},
    }
    for name in ("intscale_tp0", "intscale_dp2", "fp7_tp2"):
        with pytest.raises(IntScaleError, match=f"'{name}' is unknown; .* on N GPUs as NAME_tpN"):
            configurations.configuration_of(name)

    with pytest.raises(IntScaleError, match="intscale_float_scale runs in one process, on one GPU"):
        configurations.configuration_of("intscale_float_scale_tp2")

    one, two = (configurations.plan_of(n, SMALL, tmp_path, 100, {}) for n in ("bf16", "bf16_tp2"))
    assert one.arguments["kv_cache_memory_bytes"] == 100 * 2 * 2 * 2 * (2 * 64)  # bf16, k and v
    own = [plan.bytes_needed - configurations.OTHER_BYTES for plan in (one, two)]
    assert own[0] == 2 * own[1] > 1e6


def test_floats_need_no_files(tmp_path: Path) -> None:
    """vLLM makes the weights of bf16 itself, as large as those that `write_random` writes."""
    plan = configurations.plan_of("bf16", SMALL, tmp_path, 100, {})
    assert plan.arguments["load_format"] == "dummy"
    assert not list((tmp_path / "bf16").glob("*.safetensors"))
    random_checkpoint.write_random(SMALL, tmp_path / "written", "bf16")
    files = [load_file(file) for file in (tmp_path / "written").glob("*.safetensors")]
    written = [tensor for tensors in files for tensor in tensors.values()]
    assert plan.weight_bytes == sum(tensor.nbytes for tensor in written)


def test_an_unfinished_checkpoint_is_written_again(tmp_path: Path) -> None:
    """And a finished one is not."""
    (tmp_path / "fp8.partial").mkdir()
    for _ in range(2):
        configurations.plan_of("fp8", SMALL, tmp_path, 100, {})
        assert [path.name for path in tmp_path.iterdir()] == ["fp8"]
        (tmp_path / "fp8" / "config.json").unlink(missing_ok=True)
    assert not (tmp_path / "fp8" / "config.json").exists()


def test_logs_stay_if_there_are_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Which say where they are; checkpoints do not stay, nor a plot of nothing."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    experts = SMALL | {"num_local_experts": 2, "model_type": "mixtral"}
    monkeypatch.setitem(random_checkpoint.MODELS, "small", experts)
    monkeypatch.setattr(serve, "_start", FakeWorker)
    command = ["intscale", "bench", "serve", "--model", "small", "--control", "bf16"]
    command += ["--plot", str(tmp_path / "plot.png"), "--configurations"]
    for names, errors in (("machete_w4a16,intscale_float_scale", 2), ("bf16", 0)):
        monkeypatch.setattr(sys, "argv", [*command, names])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert not stop.value.code
        rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
        found = [row["error"] for row in rows if row["error"]]
        assert all("it has no kernel for experts" in error for error in found)
        assert len(found) == errors
        assert [p.name for p in tmp_path.glob("intscale-bench-*/*")] == (
            ["small"] if errors else []
        )
        assert not list(tmp_path.glob("intscale-bench-*/small/*"))
        assert (tmp_path / "plot.png").exists() == (not errors)
        for folder in tmp_path.glob("intscale-bench-*"):
            shutil.rmtree(folder)


def test_what_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps by the same clock; nothing whose control was off; who is only served is named, too."""
    drawn: dict[str, Any] = {}

    def savefig(figure: Any, path: Path, dpi: int) -> None:
        (legend,) = figure.legends
        drawn["legend"] = sorted(text.get_text() for text in legend.get_texts())
        for axes in figure.axes:
            lines = {line.get_label(): list(line.get_ydata()) for line in axes.get_lines()}
            drawn[axes.get_ylabel()] = lines

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", savefig)
    wall, busy = {**STEP, "step_ms": 5.0}, {**STEP, "step_ms": 5.0, "gpu_step_ms": 4.0}
    off = {**STEP, "tokens_per_second": 50.0}
    rows = [Row("a", "decode", 1, busy, STEP), Row("c", "decode", 1, busy, off)]
    rows += [Row("a", "decode", 16, busy, None), Row("b", "serve", 1, {"p99_tpot_ms": 3.0}, None)]
    serve_report.plot(rows, tmp_path / "plot.png")
    assert drawn["legend"] == ["a", "b"]
    assert drawn["milliseconds of a step that the GPU is busy"] == {"a": [4.0, 4.0]}
    serve_report.plot([*rows, Row("d", "decode", 1, wall, STEP)], tmp_path / "plot.png")
    assert drawn["milliseconds of a step"] == {"a": [5.0, 5.0], "d": [5.0]}


def test_options_of_the_server() -> None:
    arguments = {"a_b": True, "c_d": False, "e": None, "f": [1, 2], "g": {"h": 1}, "i": "j"}
    options = ["--a-b", "--no-c-d", "--f", "1", "2", "--g", '{"h": 1}', "--i", "j"]
    assert served._as_options(arguments) == options


def test_configurations_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as there is room for, two at most; one that is too large is not left out."""
    monkeypatch.setattr(configurations, "AT_ONCE", 2)

    def plan(name: str, gib: float) -> Plan:
        cache = int(gib * 2**30) - configurations.OTHER_BYTES
        return Plan(name, 0, {"kv_cache_memory_bytes": cache})

    plans = [plan("a", 10), plan("b", 10), plan("c", 10), plan("d", 31), plan("e", 15)]
    plans += [plan("f", 15), plan("g", 15.1)]
    names = [[p.name for p in group] for group in groups_of(plans, 30 * 2**30)]
    assert names == [["a", "b"], ["c"], ["d"], ["e", "f"], ["g"]]
    assert groups_of([], 1.0) == []


class FakeWorker:
    """Says which of them were running when it was asked."""

    running: set[str] = set()
    facts = {"weights_gib": 1.25, "load_seconds": 30.4}

    def __init__(self, plan: Plan, folder: Path) -> None:
        self.name = plan.name
        self.running.add(self.name)

    def ask(self, request: dict[str, int]) -> dict[str, Any]:
        return {**STEP, "running": sorted(self.running)}

    def close(self) -> None:
        self.running.remove(self.name)


@pytest.mark.parametrize(
    ("name", "dense", "experts"),
    [
        (
            "intscale",
            "intscale: 8 linear W4A8 g128, 8 on sm90_w4a8_gemm (wgmma, fold form), 1 ignored",
            "intscale: 8 linear W4A8 g128, 4 MoE of 8 experts W4A8 g128, 12 on sm90_w4a8_gemm "
            "(wgmma, fold form), 5 ignored",
        ),
        ("bf16", "", "Using TRITON Unquantized MoE backend out of potential backends: ..."),
        (
            "fp8",
            "Selected CutlassFP8ScaledMMLinearKernel for CompressedTensorsW8A8Fp8",
            "Using VLLM_CUTLASS Fp8 MoE backend out of potential backends: ...",
        ),
        (
            "marlin_w4a8_int8",
            "Using MarlinLinearKernel for AutoGPTQLinearMethod",
            "Using 'MARLIN' WNA16 MoE backend.",
        ),
        (
            "w8a8_int8",
            "Selected CutlassInt8ScaledMMLinearKernel for CompressedTensorsW8A8Int8",
            "Using TRITON Int8 MoE backend out of potential backends: ...",
        ),
        (
            "w4a8_fp8",
            "Using CutlassW4A8LinearKernel for CompressedTensorsW4A8Fp8",
            "Using CUTLASS W4A8 MoE backend.",
        ),
        (
            "humming_w4a8_int8",
            "Initializing a V1 LLM engine (v0.26.0) with config: ..., quantization=humming, ...",
            "Using HummingIndexedExperts Humming MoE backend.",
        ),
    ],
)
def test_kernels_are_looked_for_in_logs(
    tmp_path: Path, name: str, dense: str, experts: str
) -> None:
    """As vLLM 0.26.0 names them; those of experts if the model has some."""
    plan, log = Plan(name, 0, {"model": str(tmp_path)}), tmp_path / "log"
    for config, text, wrong in (
        ({}, dense, ""),
        ({}, "none", "sm|Cutlass|Marlin|humming" if dense else ""),
        ({"num_local_experts": 8}, dense, "MoE"),
        ({"num_local_experts": 8}, f"{dense}\n{experts}", ""),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config))
        log.write_text(text)
        expected = pytest.raises(IntScaleError, match=f"does not say .*({wrong})")
        with expected if wrong else contextlib.nullcontext():
            configurations.check_log(plan, log)


def test_a_control_runs_where_it_has_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Beside all but the largest, which runs alone, after the control has ended, and is marked."""
    monkeypatch.setattr(serve, "_start", FakeWorker)
    sizes = {
        name: configurations.plan_of(name, SMALL, tmp_path, 5120, {}).bytes_needed
        for name in ("intscale", "fp8", "bf16")
    }
    monkeypatch.setattr(serve, "gpu_bytes", lambda: sizes["intscale"] + sizes["fp8"])
    rows: list[Row] = []
    names = ["bf16", "fp8", "intscale"]
    facts = serve.run(SMALL, names, [1], tmp_path, rows.append, {}, "intscale")
    assert not FakeWorker.running
    together = ["fp8", "intscale"]
    assert [(r.configuration, r.what, (r.found or {})["running"]) for r in rows] == [
        *(("intscale", "prefill", together), ("fp8", "prefill", together)),
        *(("intscale", "decode", together), ("fp8", "decode", together)),
        *(("bf16", "prefill", ["bf16"]), ("bf16", "decode", ["bf16"])),
    ]
    assert [bool(row.control) for row in rows] == [True] * 4 + [False] * 2
    serve_report.print_tables(rows, facts)
    printed = capsys.readouterr().out
    assert re.search(r"bf16 +10.000\*", printed) and re.search(r"fp8 +10.000 *\n", printed)
    assert all(re.search(rf"{name} +1.2 +30 ", printed) for name in names)
    assert "* alone: there was no room for the control beside it" in printed


@pytest.mark.e2e
@pytest.mark.timeout(600)
def test_engines_on_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On two "GPUs" beside one; a configuration whose kernel is not the one that is meant."""
    pytest.importorskip("vllm")
    monkeypatch.setattr(serve, "PREFILL_PROMPTS", 2)
    monkeypatch.setitem(random_checkpoint.MODELS, "small", SMALL)
    ours = Configuration("intscale", r"14 on cpu_backend|8 on cpu_backend", None)
    monkeypatch.setitem(configurations.CONFIGURATIONS, "intscale", ours)
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # two ranks may be on one core
    command = ["intscale", "bench", "serve", "--model", "small", "--batches", "1,3", "--out"]
    options = [
        "--configurations",
        "intscale_tp2,w8a8_int8",
        "--control",
        "intscale",
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
    rows = {(r["configuration"], r["what"], r["batch"]): r for r in found["rows"]}
    asked = [("prefill", 2), ("decode", 1), ("decode", 3)]
    timed = [("intscale_tp2", *question) for question in asked]
    failed = ("w8a8_int8", "start", 0)  # and so it is not served
    answered = ("intscale_tp2", "serve", 2)
    assert list(rows) == [failed, *timed, answered]
    for which in ("found", "control"):
        assert all(rows[key][which]["tokens_per_second"] > 0 for key in timed)
    assert "its log does not say" in rows[failed]["error"]
    assert rows[answered]["found"]["completed"] == 2 * served.ROUNDS
    weights = {name: facts["weights_gib"] for name, facts in found["engines"].items()}
    assert set(weights) == {"intscale", "intscale_tp2"}  # with the control
    assert all(size > 0 for size in weights.values())
    assert (tmp_path / "plot.png").stat().st_size > 1000
    assert "A step of decoding" in printed


def test_workers_that_fail_are_one_line(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    log = tmp_path / "client.log"
    with contextlib.closing(serve.Worker("client_worker", {}, {}, log)) as client:
        for seconds, message in (
            (60, r"^the client failed: SystemExit\(2\); see "),
            (0, r"^no answer after 0 s; see "),
        ):
            if not seconds:
                client.process.send_signal(signal.SIGSTOP)
            with pytest.raises(IntScaleError, match=message) as caught:
                client.ask({"options": ["--no-such-option"]}, seconds)
            assert str(log) in str(caught.value) and "\n" not in str(caught.value)
        with pytest.raises(IntScaleError, match="its process ended with code -9"):
            client.ask({"options": []})
    with pytest.raises(IntScaleError, match="its process ended with code 1"):
        serve.Worker("no_such_module", {}, {}, log)


def test_unknown_names_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for options, message in (
        (["--model", "gpt-2"], "model 'gpt-2' is unknown"),
        (["--configurations", "fp7"], "'fp7' is unknown; there are intscale, bf16"),
        (["--engine", "[]"], "it must be an object"),
    ):
        monkeypatch.setattr(sys, "argv", ["intscale", "bench", "serve", *options])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        error = str(stop.value.code)
        assert error.startswith("intscale: error: ") and "\n" not in error and message in error
