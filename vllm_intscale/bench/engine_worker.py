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
from collections import Counter
from collections.abc import Iterable
from typing import Any

PROMPT = 128  # tokens of a prompt of which a step of decoding is timed
LONG_PROMPT = 2048  # of one of which prefill is timed
STEPS = 64  # of decoding
PROFILED_STEPS = 16
KERNELS_LOGGED = 20
GROUP_SCALES = "INTSCALE_BENCH_GROUP_SCALES"


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
            (less, before), (more, after) = (
                self._profiled(batch, 1 + steps) for steps in (0, PROFILED_STEPS)
            )
            found["gpu_step_ms"] = (more - less) / PROFILED_STEPS / 1e3
            after.subtract(before)
            print(f"Microseconds of each step, batch {batch}:")
            for name, us in after.most_common(KERNELS_LOGGED):
                print(f"{us / PROFILED_STEPS:10.1f}  {name[:120]}")
        return found

    def _profiled(self, batch: int, answer: int) -> tuple[float, Counter[str]]:
        """Microseconds in which the GPU is busy, and those of each kernel."""
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            self.generate(batch, PROMPT, answer)
        kernels = [e for e in profiled.events() if e.device_type.name == "CUDA"]
        each: Counter[str] = Counter()
        for kernel in kernels:
            each[kernel.name] += kernel.time_range.elapsed_us()
        return busy((e.time_range.start, e.time_range.end) for e in kernels), each

    def facts(self) -> dict[str, Any]:
        model = self.llm.apply_model(_size)[0]
        return {"load_seconds": round(self.load_seconds, 1), "weights_gib": model / 2**30}


def _size(model: Any) -> int:
    """Bytes of its parameters and buffers."""
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))


def _apply_group_scales(kind: str) -> None:
    """On the partial sums of each group as "integer" or "float", in one and the same kernel."""
    from vllm_intscale import sm90_gemm

    module: Any = sm90_gemm
    gemm = module.gemm

    def with_group_scales(*args: Any) -> None:
        *operands, _tile, _splits = args
        gemm(*operands, splits=1, float_scale=kind == "float")

    module.gemm = with_group_scales


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print

    def answer(content: dict[str, Any]) -> None:
        print(json.dumps(content), file=answers, flush=True)

    if kind := os.environ.get(GROUP_SCALES):
        _apply_group_scales(kind)
    engine = Engine(json.loads(sys.argv[1]))
    answer(engine.facts())
    for line in sys.stdin:
        ((what, number),) = json.loads(line).items()
        answer(engine.prefill(number) if what == "prefill" else engine.decode(number))


if __name__ == "__main__":
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # for the profiler
    main()
