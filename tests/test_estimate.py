"""What `quantize --dry-run` foresees."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import sources

from vllm_intscale import cli
from vllm_intscale.format import CheckpointConfig
from vllm_intscale.quantize import Calibration, estimate
from vllm_intscale.quantize.source import make_plan

HIDDEN, INNER = sources.HIDDEN, sources.INNER


def test_calibration_is_counted(tmp_path: Path) -> None:
    """By hand for q and k, gate and up, down; o and v are not in this model."""
    sources.save_model(tmp_path, sources.dense(), hidden_size=HIDDEN)
    plan = make_plan(tmp_path, CheckpointConfig(ignore=("lm_head",)))
    matrices = [m for m in plan.matrices if m.scheme]
    tokens, stages = 5 * 64, 3
    attention, gate_up, down = (HIDDEN + 96, HIDDEN), (2 * INNER, HIDDEN), (HIDDEN, INNER)
    runs = sum(2 * tokens * n * k for n, k in (attention, gate_up, down)) * (stages + 2)
    solved = sum(2 * k * k * (tokens + k + n) for n, k in (attention, gate_up, down))
    weights = attention[0] * HIDDEN + gate_up[0] * HIDDEN + down[0] * INNER
    held = {
        "gptq": 8 * (2 * HIDDEN**2 + INNER**2),
        "awq": 0,
    }
    for method, operations in (("gptq", runs + solved), ("awq", runs)):
        calibration = Calibration("text.txt", 5, 64, method)  # type: ignore[arg-type]
        found = estimate._calibrated(matrices, plan.model_config, calibration)
        assert found == (operations, held[method] + 4 * weights + 8 * tokens * HIDDEN)


@pytest.mark.parametrize("suffix", ["", ".weight"])
def test_experts_see_their_share(tmp_path: Path, suffix: str) -> None:
    tensors = sources.fused_experts(suffix=suffix)
    sources.save_model(tmp_path, tensors, num_experts=sources.EXPERTS, num_experts_per_tok=1)
    plan = make_plan(tmp_path, CheckpointConfig(ignore=("re:.*(lm_head|self_attn.*)",)))
    matrices = [m for m in plan.matrices if m.scheme]
    tokens, stages = 6 * 64, 2
    operations, _ = estimate._calibrated(
        matrices, plan.model_config, Calibration("text.txt", 6, 64, "awq")
    )
    one_expert = 2 * tokens // sources.EXPERTS * 3 * INNER * HIDDEN
    assert operations == pytest.approx((stages + 2) * sources.EXPERTS * one_expert)


def test_dry_run_says_what_it_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sources.save_model(tmp_path / "source", sources.dense())
    monkeypatch.setattr(estimate, "TRIAL_S", 0.01)
    command = ["intscale", "quantize", str(tmp_path / "source"), str(tmp_path / "out")]
    text = ["--calibration", "text.txt", "--calibration-samples", "1"]
    for options in ([], ["--recipe", "llama3", *text]):
        monkeypatch.setattr(sys, "argv", [*command, *options, "--dry-run"])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert not stop.value.code
        printed = capsys.readouterr().out
        assert "Memory      about " in printed and "Time        at least " in printed
        assert ("W8A8" in printed) == bool(options)
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_recipe_that_matches_no_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources.save_model(tmp_path / "source", sources.fused_experts())
    command = ["intscale", "quantize", str(tmp_path / "source"), str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", [*command, "--recipe", "llama3", "--calibration", "t.txt"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    error = str(stop.value.code)
    assert error.startswith("intscale: error: ") and "\n" not in error and "down_proj" in error
    assert [p.name for p in tmp_path.iterdir()] == ["source"]
