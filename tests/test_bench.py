"""The GEMM benchmark, as far as it runs without a GPU: what is resumed, joined and printed."""

from __future__ import annotations

import functools
import io
import itertools
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
from safetensors import safe_open
from torch import Tensor

from vllm_intscale import cli, sm90_tiles
from vllm_intscale.bench import (
    arguments,
    gemm,
    moe,
    moe_peers,
    peers,
    random_checkpoint,
    report,
    tiles,
    timing,
    worker,
)
from vllm_intscale.bench.moe_peers import ExpertLayer, ExpertPeer
from vllm_intscale.bench.peers import Layer, Peer
from vllm_intscale.bench.problem import Linear
from vllm_intscale.bench.results import (
    Control,
    Row,
    ShapeResults,
    set_ratios,
    weight_floor_us,
)
from vllm_intscale.checkpoint import validate_checkpoint
from vllm_intscale.errors import IntScaleError
from vllm_intscale.format import TENSOR_NAMES
from vllm_intscale.packing import unpack_codes

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


# ---- a worker, on CPU with a timer that does not time -------------------------------------------


class FakeTimer:
    def capture(self, call: timing.Call, copies: int, seconds: float) -> Any:
        assert copies >= 2
        call(copies - 1)
        return SimpleNamespace(time=lambda _: 1e6 * seconds)


def wrong(weight: Tensor) -> Layer:
    return Layer((weight,), lambda a, w: torch.zeros(len(a[0]), len(w[0])))


def absent(weight: Tensor) -> Layer:
    raise ImportError("no module named humming\nsecond line")


def choosy(weight: Tensor) -> Layer:
    """Quantizes activations (to themselves), and refuses more than 8 of them."""

    def quantize(x: Tensor) -> tuple[Tensor]:
        if len(x) > 8:
            raise ValueError("too many")
        return (x,)

    return Layer((weight,), lambda a, w: a[0] @ w[0].t(), quantize)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> worker.Bench:
    fakes = {"wrong": wrong, "absent": absent, "choosy": choosy, "cutlass_fp8": absent}
    for name, prepare in fakes.items():
        monkeypatch.setitem(peers.PEERS, name, Peer(prepare, 0.1))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(timing, "ROTATION_BYTES", 100_000)
    kernels = ["wrong", "absent", "choosy"]
    path = str(tmp_path / "tiny.json")
    request = worker.Request("gemm", "tiny", (64, 256), [4, 16], kernels, path, "s")
    weight, x = (torch.randn(rows, 256, dtype=torch.bfloat16) for rows in (64, 16))
    monkeypatch.setattr(Linear, "limits", {name: 0.1 for name in peers.PEERS})
    problem = Linear(weight, x, bytes_per_second=1e12)
    return worker.Bench(request, "r", problem, FakeTimer(), {"gpu": "none"})  # type: ignore[arg-type]


def test_worker(
    bench: worker.Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        timing, "kernel_names", lambda calls: {key: [f"{key[1]}_kernel"] for key, _ in calls}
    )
    assert worker.run(bench.request, bench) == 0
    results = ShapeResults(Path(bench.request.path), "tiny", 64, 256)
    found = {(r.kernel, r.mode, r.M): r for r in results.rows}
    assert len(found) == 4 * 2 * 2  # the control is bf16, since cutlass_fp8 is absent

    for m in (4, 16):
        for mode in Linear.modes:
            control = found["bf16", mode, m]
            assert control.us and control.us == control.us_min == control.us_max
            assert control.probe_error == 0 and control.cuda_kernels == ["bf16_kernel"]
            assert control.ratio_to_best_peer == 1
            assert control.weight_GB_per_s == pytest.approx(64 * 256 * 2 / control.us / 1e3)
            assert control.tops == pytest.approx(2 * m * 64 * 256 / control.us / 1e6)
            assert found["wrong", mode, m].error == "wrong result: relative error 1, limit 0.1"
            assert found["absent", mode, m].error == "ImportError: no module named humming"
    assert found["choosy", "linear", 4].us and not found["choosy", "linear", 4].error
    assert found["choosy", "gemm", 16].error == "ValueError: too many"
    assert [c.kernel for c in results.controls] == ["bf16", "bf16"]
    assert "tiny M=16: 4 kernels in" in capsys.readouterr().err


def test_lost_context(bench: worker.Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel that did it is not tried again in this session, at no M; the others are."""

    def lose() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def capture(call: timing.Call, copies: int, seconds: float) -> Any:
        monkeypatch.setattr(torch.cuda, "synchronize", lose)
        lose()

    monkeypatch.setattr(bench.timer, "capture", capture)
    request = bench.request._replace(kernels=["choosy", "bf16"])
    assert worker.run(request, bench) == worker.CONTEXT_LOST
    results = ShapeResults(Path(request.path), "tiny", 64, 256)
    for m in request.tokens:
        assert results.missing(m, request.kernels, "s") == ["bf16"]
        assert results.missing(m, request.kernels, "next") == ["choosy", "bf16"]
    assert all("illegal memory access" in (r.error or "") for r in results.rows)


# ---- experts ------------------------------------------------------------------------------------


@pytest.fixture
def experts(monkeypatch: pytest.MonkeyPatch) -> moe.Experts:
    """A small layer, whose peer "fake" is the reference and "wrong" is not."""
    monkeypatch.setattr(timing, "ROTATION_BYTES", 3_000_000)
    problem = moe.Experts.gaussian((64, 128, 16, 4), 32, torch.randn, 1e12)

    def fake(w13: Tensor, w2: Tensor, topk: int, factor: float = 1.0) -> ExpertLayer:
        def forward(x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
            assert (weights.shape, ids.dtype) == ((len(x), topk), torch.int32)
            y = torch.zeros(len(x), w2.shape[1])
            for token, slot in itertools.product(range(len(x)), range(topk)):
                expert = int(ids[token, slot])
                gate, up = (w13[expert].float() @ x[token].float()).chunk(2)
                hidden = torch.nn.functional.silu(gate) * up
                y[token] += weights[token, slot] * (w2[expert].float() @ hidden)
            return (factor * y).to(x.dtype)

        return ExpertLayer((w13, w2), forward)

    peers = {"fake": fake, "wrong": functools.partial(fake, factor=1.1)}
    for name, prepare in peers.items():
        monkeypatch.setitem(moe_peers.PEERS, name, ExpertPeer(prepare, 0.02))
    monkeypatch.setattr(moe.Experts, "limits", dict.fromkeys(peers, 0.02))
    monkeypatch.setattr(moe.Experts, "controls", ("fake",))
    return problem


def test_routings(experts: moe.Experts) -> None:
    even, skewed = (experts.routings(32, mode) for mode in experts.modes)
    assert len(even) == len(skewed) >= 2 and experts.routings(32, "random") is even
    for weights, ids in (*even, *skewed):
        assert all(len(set(token)) == 4 for token in ids.tolist())
        assert torch.allclose(weights.sum(-1), torch.ones(32))
    first = [torch.cat([ids for _, ids in r]).eq(0).float().mean() for r in (even, skewed)]
    assert 0.2 / 4 < first[0] < 0.3 / 4 * 1.2 and first[1] > 2 * first[0]
    assert len(experts.routings(1, "random")) > len(even)
    floors = [experts.floor_us(m, "random") for m in (1, 8, 32)]
    assert floors == sorted(floors) and experts.floor_us(8, "skewed") < floors[1]
    per_expert = 3 * 64 * 128 * (1 / 2 + 1 / 128) / 1e12 * 1e6
    assert floors[0] == pytest.approx(4 * per_expert)


def test_experts_are_measured(experts: moe.Experts, tmp_path: Path) -> None:
    path = str(tmp_path / "tiny.json")
    request = worker.Request("moe", "tiny", tuple(experts.size), [3], ["fake", "wrong"], path, "s")
    bench = worker.Bench(request, "r", experts, FakeTimer(), {"gpu": "none"})  # type: ignore[arg-type]
    rows, control = bench.measure(3, request.kernels)
    assert control and control.kernel == "fake"
    found = {(row.kernel, row.mode): row for row in rows}
    assert len(found) == len(rows) == 4
    for mode in experts.modes:
        assert found["fake", mode].us and (found["fake", mode].probe_error or 1) < 0.02
        assert (found["wrong", mode].error or "").startswith("wrong result: relative error")


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
    assert arguments.parse_tokens(["64,1", "8"], gemm.TOKENS) == [1, 8, 64]
    assert arguments.parse_tokens([], gemm.TOKENS) == sorted(gemm.TOKENS)
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


# ---- weights of peers ---------------------------------------------------------------------------


def test_int4_weights_of_vllm_are_the_weight() -> None:
    """Packed along K, lowest bits first, groups of 128: what the kernels' repacking takes."""
    pytest.importorskip("vllm")
    from vllm.scalar_type import scalar_types

    weight = (torch.randn(32, 512) * 0.02).to(torch.bfloat16)
    for code_type, offset in ((scalar_types.uint4b8, 8), (scalar_types.int4, 0)):
        packed, scale = peers.int4_weight(weight, code_type)
        assert packed.shape == (64, 32) and packed.t().is_contiguous()
        codes = torch.stack([(packed >> (4 * i)) & 15 for i in range(8)], 1).flatten(0, 1) - offset
        codes = torch.where(codes > 7, codes - 16, codes)
        restored = codes * scale.float().repeat_interleave(128, 0)
        assert scale.dtype == torch.bfloat16
        assert peers.probe_error(restored.t(), weight) < 0.13


def test_our_weight_is_below_the_limit_of_the_probe() -> None:
    from vllm_intscale import reference
    from vllm_intscale.format import LayerScheme
    from vllm_intscale.packing import unpack_codes
    from vllm_intscale.quantize.rtn import quantize_rows

    weight, x = (torch.randn(rows, 1024).to(torch.bfloat16) for rows in (64, 16))
    rows = quantize_rows("test", weight, LayerScheme(), "channel")
    codes = unpack_codes(rows.qweight, 4)
    y = reference.linear(x, reference.Weight(codes, rows.group_scale, rows.channel_scale))
    assert peers.probe_error(y, x @ weight.t()) < peers.PEERS["intscale"].limit


def test_tiles_to_time_hold_the_one_that_would_be_chosen() -> None:
    for form, (n, k), m in itertools.product(sm90_tiles.FORMS, gemm.SHAPES.values(), gemm.TOKENS):
        tile, splits = sm90_tiles.choose(m, n, k, 128, form, 132)
        assert (sm90_tiles.TILES.index(tile), splits) in tiles.variants(m, n, k, form)


# ---- random checkpoints -------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(random_checkpoint.MODELS))
def test_random_checkpoint(name: str, tmp_path: Path) -> None:
    """A smaller one of each kind is valid, and what it dequantizes to is of the usual size."""
    small = {"hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 2}
    small |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64}
    out = tmp_path / name
    random_checkpoint.write_random({**random_checkpoint.MODELS[name], **small}, out)
    validate_checkpoint(out)
    with safe_open(out / "model-00001.safetensors", "pt") as file:
        q, s, c = (file.get_tensor(f"model.layers.1.self_attn.k_proj.{n}") for n in TENSOR_NAMES)
    w = unpack_codes(q, 4) * s.repeat_interleave(128, dim=1) * c[:, None]
    assert w.shape == (128, 256) and w.std() == pytest.approx(0.02, rel=0.2)
    with pytest.raises(IntScaleError, match="exists"):
        random_checkpoint.write_random(small, out)
