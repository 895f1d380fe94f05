"""Two GPUs: shares of layers and their sums against an explicit two-rank reference, and engines."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import IGNORE

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs"),
]

HERE = Path(__file__).parent
FLIPPED = 0.5  # what flipped int8 codes change at most, see test_engine.py


def test_shares_and_sums_equal_an_explicit_reference() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [
        subprocess.Popen(
            [sys.executable, HERE / "rank.py"],
            env=environment | {"RANK": str(rank), "WORLD_SIZE": "2"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    for rank in ranks:
        output = rank.communicate(timeout=300)[0]
        assert rank.returncode == 0 and output.endswith("equal\n"), output[-3000:]


def logprobs(folder: Path, tmp_path: Path, prompts: list[list[int]], **engine: Any) -> Any:
    job, result = tmp_path / "job.json", tmp_path / "result.json"
    arguments = {"model": str(folder), "dtype": "bfloat16", "max_model_len": 128, **engine}
    arguments |= {"gpu_memory_utilization": 0.2, "max_num_seqs": 1, "enforce_eager": True}
    job.write_text(json.dumps({"engine": arguments, "prompts": prompts}))
    process = subprocess.run(
        [sys.executable, HERE / "offline.py", job, result],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=400,
    )
    assert process.returncode == 0, process.stdout[-5000:]
    return json.loads(result.read_text())


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_engines(checkpoint: Callable[..., Path], tmp_path: Path, kind: str) -> None:
    """One request at a time: two stages give the same bits as one; two ranks nearly so."""
    folder = checkpoint(kind, ignore=IGNORE)
    prompts = [list(range(3, 3 + n)) for n in (40, 17, 9)]
    one = logprobs(folder, tmp_path, prompts)
    assert logprobs(folder, tmp_path, prompts, pipeline_parallel_size=2) == one
    options: list[dict[str, Any]] = [{"tensor_parallel_size": 2}]
    if kind == "mixtral":
        options.append({"tensor_parallel_size": 2, "enable_expert_parallel": True})
    for engine in options:
        found = logprobs(folder, tmp_path, prompts, **engine)
        for a, b in zip(found, one, strict=True):
            assert (torch.tensor(a) - torch.tensor(b)).abs().max() < FLIPPED, engine
