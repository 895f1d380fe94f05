"""The command line: what it prints, its options, one-line errors."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import sources

from vllm_intscale import cli, display
from vllm_intscale.checkpoint import validate_checkpoint
from vllm_intscale.format import LayerScheme

Q = "model.layers.0.self_attn.q_proj"


def test_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sources.save_model(tmp_path / "source", sources.dense())
    out = tmp_path / "out"
    command = ["intscale", "quantize", str(tmp_path / "source"), str(out)]
    options = ["--ignore", "re:.*[qk]_proj"]
    options += ["--override", "re:.*(gate|up)_proj:bits=8,group_size=64"]
    monkeypatch.setattr(sys, "argv", command + options)
    monkeypatch.setattr(display, "SECONDS_BETWEEN_LINES", 0.0)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code
    printed = capsys.readouterr()
    assert printed.out.splitlines()[-1] == f"Serve it:  vllm serve {out}"
    assert "3 layers" in printed.out and "bits per weight" in printed.out
    assert "quantizing: 10/10 tensors, " in printed.err
    config = validate_checkpoint(out)
    assert config.scheme_of("model.layers.0.mlp.gate_proj") == LayerScheme(8, 64)
    assert config.scheme_of(Q) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--amplifier", "large"], "'large'"),
        (["--amplifier", "0"], "0"),
        (["--group-size", "100"], "100"),
        (["--max-group-scale", "40000"], "40000"),
        (["--override", "down_proj"], "PATTERN:KEY=VALUE"),
        (["--override", "re:.*down_proj:bits=four"], "PATTERN:KEY=VALUE"),
        (["--override", "re:.*down_proj:colour=4"], "colour"),
        (["--override", "re:.*down_proj:bits=5"], "5"),
        (
            ["--override", "re:.*proj:bits=8", "--override", "re:.*proj:group_size=64"],
            "given twice",
        ),
        (
            ["--recipe", "llama3", "--calibration", "x"]
            + ["--override", r"re:.*\.mlp\.down_proj:bits=8"],
            "given twice (--recipe",
        ),
        (["--ignore", "re:("], "regular expression"),
        (["--ignore", "down_proj"], "no layer has such a name"),
    ],
)
def test_bad_options_are_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    message: str,
) -> None:
    sources.save_model(tmp_path / "source", sources.dense())
    command = ["intscale", "quantize", str(tmp_path / "source"), str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", command + options)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    error = str(stop.value.code)
    assert error.startswith("intscale: error: ") and "\n" not in error and message in error
    assert [p.name for p in tmp_path.iterdir()] == ["source"]
