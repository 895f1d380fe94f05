"""The kernels under compute-sanitizer: memcheck, initcheck, synccheck clean; racecheck clean and
shown to see a barrier that was removed on purpose, for all but the Hopper kernel."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.skipif(not shutil.which("compute-sanitizer"), reason="needs compute-sanitizer"),
]

# Barriers of the portable GEMM: after the copies of a stage, and between two warps' sums.
BARRIERS = (
    "__syncthreads();  // stage s has arrived for all, and stage s - 1 is free for all",
    "__syncthreads();  // one warp's sum is complete",
)


def sanitize(tool: str, *args: str) -> subprocess.CompletedProcess[str]:
    target = Path(__file__).with_name("sanitizer_target.py")
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
    if tool == "memcheck":  # cuda-bindings asks for driver functions that may not be there
        command += ["--report-api-errors", "no"]
    command += [sys.executable, str(target), *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=550)


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck", "initcheck"])
def test_clean(tool: str) -> None:
    # racecheck does not see that mbarriers order accesses, which is how the Hopper kernel works.
    result = sanitize(tool, *(("--portable",) if tool == "racecheck" else ()))
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert "SUMMARY: 0 " in result.stdout


@pytest.mark.parametrize("barrier", BARRIERS)
def test_racecheck_sees_a_removed_barrier(barrier: str) -> None:
    result = sanitize("racecheck", "--portable", "--remove", "sm80_w4a8_gemm.cu", barrier)
    assert result.returncode == 9, result.stdout[-3000:] + result.stderr[-3000:]
    assert "hazard" in result.stdout
