"""One engine of `intscale bench serve`, in a process of its own: times what its stdin asks for.

    python -m vllm_intscale.bench.engine_worker '{"model": ..., ...}'      arguments of vllm.LLM

A request is a line of JSON, {"prefill": prompts} or {"decode": batch}; its answer is one, too,
after a first that says the engine is ready. All else that is printed goes to stderr.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Iterable
from typing import Any

PROMPT = 128  # tokens of a prompt of which a step of decoding is timed
LONG_PROMPT = 2048  # of one of which prefill is timed
STEPS = 64  # of decoding
PROFILED_STEPS = 16


def busy(intervals: Iterable[tuple[float, float]]) -> float:
    """The length of the union of intervals (start, end)."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(intervals):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


class Engine:
    def __init__(self, arguments: dict[str, Any]) -> None:
        import torch
        from vllm import LLM, SamplingParams

        self.torch, self.sampling = torch, SamplingParams
        start = time.perf_counter()
        self.llm = LLM(**arguments)
        self.load_seconds = time.perf_counter() - start
        vocabulary = self.llm.llm_engine.model_config.get_vocab_size()
        self.generator, self.largest = random.Random(0), vocabulary - 1

    def generate(self, requests: int, prompt: int, answer: int) -> float:
        """Seconds of answering requests that come all at once, each answer as long as told."""
        prompts = [
            {"prompt_token_ids": [self.generator.randint(3, self.largest) for _ in range(prompt)]}
            for _ in range(requests)
        ]
        sampling = self.sampling(
            max_tokens=answer, ignore_eos=True, temperature=0, detokenize=False
        )
        start = time.perf_counter()
        self.llm.generate(prompts, sampling, use_tqdm=False)
        return time.perf_counter() - start

    def prefill(self, prompts: int) -> dict[str, float | None]:
        seconds = min(self.generate(prompts, LONG_PROMPT, 1) for _ in range(2))
        return {"tokens_per_second": prompts * LONG_PROMPT / seconds}

    def decode(self, batch: int) -> dict[str, float | None]:
        """Milliseconds of a step: of wall time, and those in which the GPU is busy."""
        first = min(self.generate(batch, PROMPT, 1) for _ in range(2))
        whole = min(self.generate(batch, PROMPT, 1 + STEPS) for _ in range(2))
        found: dict[str, float | None] = {"step_ms": 1e3 * (whole - first) / STEPS}
        found["tokens_per_second"] = batch * STEPS / (whole - first)
        found["gpu_step_ms"] = None
        if self.torch.cuda.is_available():
            steps = self._busy_ms(batch, 1 + PROFILED_STEPS) - self._busy_ms(batch, 1)
            found["gpu_step_ms"] = steps / PROFILED_STEPS
        return found

    def _busy_ms(self, batch: int, answer: int) -> float:
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            self.generate(batch, PROMPT, answer)
        kernels = [e for e in profiled.events() if e.device_type.name == "CUDA"]
        return busy((e.time_range.start, e.time_range.end) for e in kernels) / 1e3

    def memory(self) -> dict[str, Any]:
        cache = self.llm.llm_engine.vllm_config.cache_config
        blocks = cache.num_gpu_blocks or 0
        return {"load_seconds": self.load_seconds, "cache_tokens": blocks * cache.block_size}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print

    def answer(content: dict[str, Any]) -> None:
        print(json.dumps(content), file=answers, flush=True)

    engine = Engine(json.loads(sys.argv[1]))
    answer(engine.memory())
    for line in sys.stdin:
        ((what, number),) = json.loads(line).items()
        answer(engine.prefill(number) if what == "prefill" else engine.decode(number))


if __name__ == "__main__":
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # for the profiler
    main()
