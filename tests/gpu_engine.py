"""A whole vLLM engine on GPUs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import engine

# A fixed cache: what vLLM measures for one is disturbed by engines beside it.
CACHE = {"gpu_memory_utilization": 0.05, "kv_cache_memory_bytes": 2**28}
SMALL = {"dtype": "bfloat16", "max_model_len": 128, "max_num_seqs": 1, "enforce_eager": True}


def logprobs(
    folder: Path, tmp_path: Path, prompts: list[list[int]], **arguments: Any
) -> engine.Logprobs:
    """Log-probabilities of each prompt's tokens but the first, one prompt at a time."""
    arguments = {"model": str(folder), **CACHE, **SMALL, **arguments}
    return engine.prompt_logprobs(engine.run(tmp_path, arguments, prompts)[0])
