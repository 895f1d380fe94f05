"""A whole vLLM engine on GPUs, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
Logprobs = list[list[float]]


def logprobs(folder: Path, tmp_path: Path, prompts: list[list[int]], **engine: Any) -> Logprobs:
    """Log-probabilities of each prompt's tokens but the first, one prompt at a time."""
    job, result = tmp_path / "job.json", tmp_path / "result.json"
    # A fixed cache: what vLLM measures for one is disturbed by engines beside it.
    defaults = {"gpu_memory_utilization": 0.05, "kv_cache_memory_bytes": 2**28}
    defaults |= {"dtype": "bfloat16", "max_model_len": 128}
    defaults |= {"max_num_seqs": 1, "enforce_eager": True}
    job.write_text(
        json.dumps({"engine": {"model": str(folder), **defaults, **engine}, "prompts": prompts})
    )
    process = subprocess.run(
        [sys.executable, HERE / "offline.py", job, result],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=400,
    )
    assert process.returncode == 0, process.stdout[-5000:]
    found: Logprobs = json.loads(result.read_text())
    return found
