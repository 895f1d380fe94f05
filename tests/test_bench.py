"""The benchmark as far as it runs without a GPU: what is resumed, joined, printed; the command."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from vllm_intscale import cli
from vllm_intscale.bench import (
    arguments,
    gemm,
    launches,
    peers,
    report,
    timing,
    worker,
)
from vllm_intscale.bench.problem import Linear
from vllm_intscale.bench.results import (
    Control,
    Row,
    ShapeResults,
    set_ratios,
    weight_floor_us,
)
from vllm_intscale.errors import IntScaleError

SHAPE = ("o", 4096, 4096)


def row(kernel: str, us: float | None = 10.0, m: int = 16, run: str = "r1", **other: Any) -> Row:
    fields: dict[str, Any] = {"shape": "o", "N": 4096, "K": 4096, "mode": "gemm", "session": "s1"}
    fields |= {"date": "2026-01-01T00:00:00+00:00", "us": us, "floor_us": 2.9}
    return Row(**(fields | {"kernel": kernel, "M": m, "run": run} | other))


def rows_of(kernel: str, **fields: Any) -> list[Row]:
    return [row(kernel, mode=mode, **fields) for mode in Linear.modes]


class FakeProcess:
    """Stands for a worker: measures at a speed of its own, and remembers what it was asked."""

    def __init__(self, run: str, us: float = 10.0, gpu: str = "H100", broken: str = "") -> None:
        self.run, self.us, self.gpu, self.broken = run, us, gpu, broken
        self.asked: list[tuple[int, list[str]]] = []

    def measure(self, m: int, names: Sequence[str]) -> tuple[list[Row], Control | None]:
        self.asked.append((m, list(names)))
        rows = []
        for name in dict.fromkeys([*names, "control"]):
            failed = {"us": None, "error": "broken"} if name == self.broken else {"us": self.us}
            rows += rows_of(name, m=m, run=self.run, session=self.run, **failed)
        return rows, Control(self.run, m, "control", self.us, self.gpu)

    def complete(self, path: Path, tokens: Sequence[int], kernels: Sequence[str]) -> ShapeResults:
        results = ShapeResults(path, *SHAPE)
        worker.complete(results, tokens, kernels, self.run, self.run, self.measure)
        return ShapeResults(path, *SHAPE)


# ---- resuming and joining -----------------------------------------------------------------------


def test_rows_already_there_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "o.json"
    first = FakeProcess("r1")
    first.complete(path, [1], ["a", "b"])
    second = FakeProcess("r2", us=10.1)
    results = second.complete(path, [1, 8], ["a", "b", "c"])
    assert first.asked == [(1, ["a", "b"])]
    assert second.asked == [(1, ["c"]), (8, ["a", "b", "c"])]
    assert {r.kernel: r.run for r in results.rows if r.M == 1} == {
        "a": "r1",
        "b": "r1",
        "c": "r2",
        "control": "r2",
    }
    third = FakeProcess("r3")
    third.complete(path, [1, 8], ["a", "b", "c"])
    assert third.asked == []


def test_errors_are_tried_again_in_the_next_session(tmp_path: Path) -> None:
    path = tmp_path / "o.json"
    FakeProcess("r1", broken="b").complete(path, [1], ["a", "b"])
    same_session = ShapeResults(path, *SHAPE)
    assert same_session.missing(1, ["a", "b"], "r1") == []
    second = FakeProcess("r2")
    results = second.complete(path, [1], ["a", "b"])
    assert second.asked == [(1, ["b"])]
    assert not any(r.error for r in results.rows)
    assert len(results.rows) == 2 * 3


@pytest.mark.parametrize("change", [{"us": 10.3}, {"us": 9.7}, {"gpu": "H200"}])
def test_rows_that_the_control_does_not_confirm_are_timed_again(
    tmp_path: Path, change: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "o.json"
    FakeProcess("r1").complete(path, [1, 8], ["a", "b"])
    second = FakeProcess("r2", **change)
    results = second.complete(path, [1], ["c"])
    assert second.asked == [(1, ["c"]), (1, ["c", "a", "b", "control"])]
    assert {r.run for r in results.rows if r.M == 1} == {"r2"}
    assert {c.run for c in results.controls if c.M == 1} == {"r2"}
    assert {r.run for r in results.rows if r.M == 8} == {"r1"}
    warning = capsys.readouterr().err
    assert "o M=1: warning" in warning and "a, b, control" in warning


def test_every_earlier_process_must_agree(tmp_path: Path) -> None:
    """r3 is within 2 % of r2 but not of r1."""
    path = tmp_path / "o.json"
    FakeProcess("r1", us=10.0).complete(path, [1], ["a"])
    FakeProcess("r2", us=10.15).complete(path, [1], ["b"])
    third = FakeProcess("r3", us=10.3)
    results = third.complete(path, [1], ["c"])
    assert third.asked == [(1, ["c"]), (1, ["c", "a"])]
    assert {r.kernel: r.run for r in results.rows} == {
        "a": "r3",
        "b": "r2",
        "c": "r3",
        "control": "r3",
    }


def test_without_a_control_nothing_is_joined(tmp_path: Path) -> None:
    path = tmp_path / "o.json"
    FakeProcess("r1").complete(path, [1], ["a"])
    results = ShapeResults(path, *SHAPE)
    assert results.disagreeing(1, "r2", None) == ["a", "control"]
    assert results.disagreeing(1, "r1", None) == []


@pytest.mark.parametrize("content", ["", "{}", '{"shape": "o", "N": 4096, "K": 4096, "rows": [1]}'])
def test_foreign_file(tmp_path: Path, content: str) -> None:
    path = tmp_path / "o.json"
    path.write_text(content)
    with pytest.raises(IntScaleError, match="remove it or choose another --out") as caught:
        ShapeResults(path, *SHAPE)
    assert "\n" not in str(caught.value)


def test_file_of_another_shape(tmp_path: Path) -> None:
    path = tmp_path / "o.json"
    FakeProcess("r1").complete(path, [1], ["a"])
    with pytest.raises(IntScaleError, match="o 4096x4096, not o 4096x8192"):
        ShapeResults(path, "o", 4096, 8192)


# ---- metrics and what is printed ----------------------------------------------------------------


def test_weight_floor() -> None:
    """59.6 MB of gate_up at 3 TB/s."""
    assert weight_floor_us(28672, 4096, 3e12) == pytest.approx(19.88, abs=0.01)


@pytest.mark.parametrize("size", [8_400_000, 59_000_000, 235_000_000])
def test_copies_outgrow_the_cache(size: int) -> None:
    copies = timing.copies_needed(size)
    assert copies >= 2 and copies * size >= 200e6
    for seconds in (1e-6, 30e-6, 3e-3):
        calls = timing.calls_needed(copies, seconds)
        assert calls % copies == 0 and calls < timing.MAX_CALLS + copies


def test_ratio_is_to_the_best_peer_of_the_same_point() -> None:
    rows = [row("intscale", 8.0), row("fast", 10.0), row("slow", 20.0), row("failed", None)]
    rows += [row("fast", 1.0, m=1), row("intscale", 3.0, m=32)]
    set_ratios(rows)
    assert [r.ratio_to_best_peer for r in rows] == [0.8, 1.0, 2.0, None, 1.0, None]


def test_tables() -> None:
    rows = [row("intscale", 8.04), row("fast", 10.0), row("slow", 1234.5)]
    rows += [row("absent", None, m=m, error="ImportError: no") for m in (1, 2, 4, 8, 16)]
    rows += [row("intscale", 5.0, mode="linear"), row("slow", 7.0, mode="linear")]
    set_ratios(rows)
    output = io.StringIO()
    report.print_tables(rows, Console(file=output, width=report.WIDE))
    text = output.getvalue()
    alone, linear = text.split(report.TITLES["linear"])
    lines = (re.split(r"  +", line.strip()) for line in alone.splitlines())
    cells = {name: values for name, *values in lines}
    assert cells["M"] == ["1", "2", "4", "8", "16"]
    assert cells["intscale"] == ["8.0"]
    assert cells["fast"] == ["*10.0"] and cells["slow"] == ["1234"]
    assert cells["absent"] == ["error"] * 5
    assert cells["intscale / best peer"] == ["0.80"]
    assert cells["streaming int4 weights"][-1] == "2.9"
    assert "*7.0" in linear and "0.71" in linear
    error = "error: absent: ImportError: no [o M=1, o M=2, o M=4 and 2 more]"
    assert text.splitlines()[-1] == error


def test_summary_is_json_without_what_only_files_hold() -> None:
    rows = [row("intscale", environment={"gpu": "H100"}, cuda_kernels=["k"]), row("x", run="r2")]
    summary = json.loads(json.dumps(report.summary(rows, tokens=[16])))
    assert summary["metadata"] == {
        "tokens": [16],
        "environments": {"r1": {"gpu": "H100"}, "r2": {}},
    }
    assert {"shape", "N", "K", "M", "kernel", "mode", "us", "error"} <= set(summary["rows"][0])
    assert not {"environment", "cuda_kernels"} & set(summary["rows"][0])


def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [row("intscale", float(m), m=m) for m in (1, 2)] + [row("absent", None, error="no")]
    report.plot(rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_kernels_are_named_by_the_range_they_started_in() -> None:
    host, gpu = torch.autograd.DeviceType.CPU, torch.autograd.DeviceType.CUDA

    def event(name: str, device: Any, start: float, end: float) -> Any:
        span = SimpleNamespace(start=start, end=end)
        return SimpleNamespace(name=name, device_type=device, time_range=span)

    events = [
        event("call_0", host, 0, 10),
        event("call_1", host, 20, 30),
        event("aten::mm", host, 21, 22),
        event("call_1", gpu, 21, 29),
        event("second", gpu, 25, 29),
        event("first", gpu, 21, 24),
        event("between", gpu, 15, 16),
    ]
    assert timing._attribute(events, "call_", ["a", "b"]) == {"a": [], "b": ["first", "second"]}


# ---- the command --------------------------------------------------------------------------------


def run_cli(monkeypatch: pytest.MonkeyPatch, *options: str) -> str:
    """The message it stops with, or an empty string."""
    monkeypatch.setattr(sys, "argv", ["intscale", "bench", "gemm", *options])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return str(stop.value.code or "")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--kernels", "bf16,cuda_magic"], "cuda_magic"),
        (["--shape", "gate"], "gate_up"),
        (["--shape", "4096x"], "4096x"),
        (["--shape", "o,4096x100"], "multiple of 128"),
        (["--tokens", "1,zero"], "zero"),
        (["--tokens", "0"], "0"),
        (["--shape", "o"], "CUDA"),
    ],
)
def test_bad_options_are_one_line(
    monkeypatch: pytest.MonkeyPatch, options: list[str], message: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    error = run_cli(monkeypatch, *options)
    assert error.startswith("intscale: error: ") and "\n" not in error and message in error


def test_plot_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "vllm-intscale[bench]" in run_cli(monkeypatch, "--plot", "plot.png")


def test_options() -> None:
    assert gemm.parse_shapes(["o,128x256", "o"]) == {"o": (4096, 4096), "128x256": (128, 256)}
    assert gemm.parse_shapes([]) == gemm.SHAPES
    assert arguments.parse_numbers("--tokens", ["64,1", "8"], gemm.TOKENS) == [1, 8, 64]
    assert arguments.parse_numbers("--tokens", [], gemm.TOKENS) == sorted(gemm.TOKENS)
    assert arguments.parse_kernels(["bf16,intscale"], peers.PEERS) == ["bf16", "intscale"]
    assert arguments.parse_kernels([], peers.PEERS) == list(peers.PEERS)


def start_fake(request: worker.Request) -> subprocess.Popen[str]:
    """A process that waits to be let run, then ends with a code named in its shape."""
    code = f"import sys; sys.exit({request.size[0]} if sys.stdin.readline() else 99)"
    return subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, text=True)


def test_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Shape 9x128 fails, o is complete, 3x128 loses its context once."""
    FakeProcess("r1").complete(tmp_path / "o.json", [16], ["intscale", "bf16"])
    started: list[str] = []

    def start(request: worker.Request) -> subprocess.Popen[str]:
        started.append(request.shape)
        if started.count("3x128") == 2:  # now nothing is missing
            results = ShapeResults(Path(request.path), "3x128", 3, 128)
            for name in request.kernels:
                results.add(16, rows_of(name, shape="3x128", N=3, K=128), None)
            results.save()
        return start_fake(request)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gemm, "_start", start)
    options = ["--kernels", "intscale,bf16", "--tokens", "16", "--out", str(tmp_path)]
    error = run_cli(monkeypatch, "--shape", "9x128,o,3x128", *options)
    assert started == ["9x128", "3x128", "3x128"]
    assert "9x128: its process ended with code 9" in error and "3x128" not in error

    printed = capsys.readouterr().out
    summary = json.loads(printed.splitlines()[-1])
    places = [(r["shape"], r["kernel"]) for r in summary["rows"] if r["mode"] == "gemm"]
    assert places[:3] == [("o", "intscale"), ("o", "bf16"), ("o", "control")]
    assert places[3:] == [("3x128", "intscale"), ("3x128", "bf16")]
    assert summary["metadata"]["tokens"] == [16]
    assert report.TITLES["linear"] in printed


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_host_time_of_each_operator(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launches, "CALLS", 3)
    launches.main()
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [name for _, name in lines][:2] == [
        "intscale.quantize_activation",
        "intscale.norm_quantize",
    ]
    assert all(float(us) > 0 for us, _ in lines)
