"""`intscale doctor`: what it says of this machine, and that it sees what is wrong."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from vllm_intscale import doctor, ops
from vllm_intscale.errors import IntScaleError


def run(**environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vllm_intscale", "doctor"]
    return subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **environment}
    )


def test_a_machine_in_order() -> None:
    pytest.importorskip("vllm")
    done = run()
    assert done.returncode == 0, done.stdout + done.stderr
    findings = {line.split()[1]: line for line in done.stdout.splitlines()}
    assert findings.keys() >= {"Python", "PyTorch", "vLLM", "plugin", "GPU", "kernels"}
    assert all(line.startswith("ok ") for line in findings.values())
    assert "is right to the bit" in findings["kernels"]


def test_a_plugin_that_vllm_may_not_load() -> None:
    done = run(VLLM_PLUGINS="other,another")
    assert done.returncode == 1 and done.stderr == "intscale: error: 1 problem, see above\n"
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("PROBLEM")]
    assert "VLLM_PLUGINS=other,another" in line and "add intscale" in line


@pytest.mark.parametrize(
    ("version", "message"), [("0.25.1", "not supported"), (None, "pip install")]
)
def test_another_vllm(version: str | None, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        doctor, "_version", lambda name: {"vllm": version, doctor.PACKAGE: "0"}.get(name)
    )
    (found,) = [f for f in doctor.examine() if f.about == "vLLM"]
    assert found.problem and message in found.text


def test_a_package_that_is_only_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    def requires(name: str) -> list[str]:
        raise doctor.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor, "_version", lambda name: "0.32.0" if name == "vllm" else None)
    monkeypatch.setattr(doctor.metadata, "requires", requires)
    monkeypatch.setattr(doctor.metadata, "entry_points", lambda **_: ())
    found = {f.about: f for f in doctor.examine()}
    assert not found["vLLM"].problem
    assert found["plugin"].problem and "pip install it" in found["plugin"].text


def test_whatever_is_raised_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(device: str) -> str:
        raise RuntimeError(f"{device} is broken\nin some way")

    monkeypatch.setattr(doctor, "compute", broken)
    found = [f for f in doctor.examine() if f.about == "kernels"]
    assert all(f.problem and f.text.endswith("is broken") for f in found) and found


def test_a_wrong_result_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    gemm = ops.gemm

    def one_bit_off(*args: object) -> torch.Tensor:
        y = gemm(*args)
        y.view(torch.int16)[-1, -1] ^= 1
        return y

    monkeypatch.setattr(ops, "gemm", one_bit_off)
    with pytest.raises(IntScaleError, match="1 of 384 outputs .* on cpu are wrong for 1 tokens"):
        doctor.compute("cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_every_gpu_is_examined() -> None:
    found = [f for f in doctor.examine() if f.about not in ("vLLM", "plugin")]
    assert not any(f.problem for f in found), found
    assert sum(f.about == "kernels" for f in found) == torch.cuda.device_count()
