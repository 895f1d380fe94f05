"""A run of the quantizer that is killed, and goes on with `--resume`."""

from __future__ import annotations

import fcntl
import json
import signal
import subprocess
import sys
from pathlib import Path

import hard_models
import pytest
import sources
import torch
from conftest import random_model
from test_convert import PACKED

from vllm_intscale.errors import IntScaleError
from vllm_intscale.format import CheckpointConfig
from vllm_intscale.quantize import (
    Calibration,
    calibrate,
    convert_model,
    journal,
    quantize_model,
    stream,
)
from vllm_intscale.verify import SUMS

KILL = """
import os, signal, sys
from pathlib import Path
from vllm_intscale.quantize import Calibration, convert_model, journal, quantize_model
journal.SYNC_BYTES = int(sys.argv[4])
def progress(p):
    if p.tensors == int(sys.argv[5]):
        os.kill(os.getpid(), signal.SIGKILL)
make = {"quantize": quantize_model, "convert": convert_model}[sys.argv[1]]
text = {"calibration": Calibration(Path(sys.argv[6]), 2, 160)} if sys.argv[6:] else {}
make(*sys.argv[2:4], on_progress=progress, **text)
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    sources.save_model(tmp_path / "source", sources.dense(), shards=2)
    return tmp_path / "source"


def kill(
    command: str, source: Path, out: Path, sync_bytes: int = 0, tensors: int = 5, *text: Path
) -> Path:
    """Start a run that is killed after so many tensors; the folder it leaves."""
    arguments = [command, source, out, str(sync_bytes), str(tensors), *text]
    assert subprocess.run([sys.executable, "-c", KILL, *arguments]).returncode == -signal.SIGKILL
    return out.with_name(out.name + ".partial")


@pytest.mark.parametrize("sync_bytes", [0, 1, 1 << 28])
@pytest.mark.parametrize("command", ["quantize", "convert"])
def test_a_killed_run_goes_on_and_writes_the_same_bytes(
    command: str, sync_bytes: int, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = source if command == "quantize" else PACKED / "gptq"
    make = quantize_model if command == "quantize" else convert_model
    whole = make(str(model), tmp_path / "whole")
    partial = kill(command, model, tmp_path / "out", sync_bytes)
    noted = (partial / journal.JOURNAL).read_text().splitlines()[1:]
    assert len(noted) == (5 if sync_bytes < 2 else 0)
    (partial / journal.JOURNAL).open("a").write('{"name": "torn')
    written = []
    write = stream._Work.write
    monkeypatch.setattr(
        stream._Work, "write", lambda self, m: (written.append(m.name), write(self, m))[1]
    )
    report = make(str(model), tmp_path / "out", resume=True)
    assert not {json.loads(line)["name"] for line in noted} & set(written)
    assert report == whole
    assert (tmp_path / "out" / SUMS).read_text() == (tmp_path / "whole" / SUMS).read_text()
    assert not partial.exists() and not (tmp_path / "out" / journal.JOURNAL).exists()


@pytest.mark.parametrize("tensors", [1, 9, 40])
def test_a_killed_calibration_goes_on_and_writes_the_same_bytes(
    tensors: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the first stage of a layer; later; where only experts are left that no token reaches."""
    easy, source = random_model("mixtral", tmp_path / "easy", torch.float32), tmp_path / "source"
    hard_models.make_hard("norm", easy, source)
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"t{3 + i * i % 117}" for i in range(320)))
    calibration = Calibration(text, 2, 160)
    whole = quantize_model(str(source), tmp_path / "whole", calibration=calibration)
    assert whole.smoothed and whole.uncalibrated
    partial = kill("quantize", source, tmp_path / "out", 0, tensors, text)
    assert len((partial / journal.JOURNAL).read_text().splitlines()) == 1 + tensors
    factored = []
    factorize = calibrate.factorize
    monkeypatch.setattr(
        calibrate, "factorize", lambda hessian: (factored.append(1), factorize(hessian))[1]
    )
    seen = []
    report = quantize_model(
        str(source), tmp_path / "out", None, None, seen.append, False, True, calibration
    )
    assert report == whole
    assert [p.tensors for p in seen] == list(range(1, seen[-1].total_tensors + 1))
    assert bool(factored) is (tensors < 40)
    assert (tmp_path / "out" / SUMS).read_text() == (tmp_path / "whole" / SUMS).read_text()


def test_another_text_is_refused(tmp_path: Path) -> None:
    source, text = random_model("llama", tmp_path / "source", torch.float32), tmp_path / "text.txt"
    text.write_text(" ".join(f"t{3 + i * i % 117}" for i in range(320)))
    kill("quantize", source, tmp_path / "out", 0, 1, text)
    text.write_text(text.read_text() + " t4")
    with pytest.raises(IntScaleError, match="of another request"):
        quantize_model(
            str(source), tmp_path / "out", resume=True, calibration=Calibration(text, 2, 160)
        )


def test_what_fails_after_all_tensors_keeps_them(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a disk that is full when the tokenizer comes."""
    monkeypatch.setattr(journal, "SYNC_BYTES", 0)
    (source / "tokenizer.json").write_text("{}")
    whole = quantize_model(str(source), tmp_path / "whole")
    with monkeypatch.context() as broken:
        broken.setattr(stream, "_copy_files", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            quantize_model(str(source), tmp_path / "out")
    written = []
    monkeypatch.setattr(stream._Work, "write", lambda self, m: written.append(m.name))
    assert quantize_model(str(source), tmp_path / "out", resume=True) == whole
    assert not written
    assert (tmp_path / "out" / SUMS).read_text() == (tmp_path / "whole" / SUMS).read_text()


def test_command_line(source: Path, tmp_path: Path) -> None:
    kill("quantize", source, tmp_path / "out")
    command = [sys.executable, "-m", "vllm_intscale", "quantize", source, tmp_path / "out"]
    refused = subprocess.run(command, capture_output=True, text=True)
    assert refused.returncode == 1 and "--resume" in refused.stderr
    done = subprocess.run([*command, "--resume"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_without_anything_to_resume_it_starts(source: Path, tmp_path: Path) -> None:
    quantize_model(str(source), tmp_path / "out", resume=True)
    assert (tmp_path / "out" / SUMS).exists()


def refusal(source: Path, out: Path, config: CheckpointConfig | None = None) -> str:
    with pytest.raises(IntScaleError) as error:
        quantize_model(str(source), out, config, resume=True)
    return str(error.value)


def test_another_request_is_refused_and_nothing_is_lost(source: Path, tmp_path: Path) -> None:
    partial = kill("quantize", source, tmp_path / "out")
    before = {p.name: p.read_bytes() for p in partial.iterdir()}
    assert "another request" in refusal(source, tmp_path / "out", CheckpointConfig(group_size=64))
    shard = next(source.glob("*.safetensors"))
    content = shard.read_bytes()
    shard.unlink()
    shard.write_bytes(content)  # a file of another time
    assert "another request" in refusal(source, tmp_path / "out")
    assert {p.name: p.read_bytes() for p in partial.iterdir()} == before


def test_a_run_that_still_writes_is_left_alone(source: Path, tmp_path: Path) -> None:
    partial = kill("quantize", source, tmp_path / "out")
    with (partial / journal.JOURNAL).open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "another run" in refusal(source, tmp_path / "out")
    quantize_model(str(source), tmp_path / "out", resume=True)


def test_a_folder_that_lacks_its_parts_is_refused(source: Path, tmp_path: Path) -> None:
    partial = kill("quantize", source, tmp_path / "out")
    next(partial.glob("*.safetensors")).unlink()
    assert "lacks files" in refusal(source, tmp_path / "out")
    partial.mkdir()
    assert "has no journal" in refusal(source, tmp_path / "out")
