"""The benchmark's process: kernels prepared, probed and timed, on a GPU that is not there."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from vllm_intscale.bench import (
    moe,
    moe_peers,
    peers,
    timing,
    worker,
)
from vllm_intscale.bench.moe_peers import ExpertLayer, ExpertPeer
from vllm_intscale.bench.peers import Layer, Peer
from vllm_intscale.bench.problem import Linear
from vllm_intscale.bench.results import (
    ShapeResults,
)

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
