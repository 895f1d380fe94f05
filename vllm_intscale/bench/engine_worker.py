"""One engine of `intscale bench serve`, in a process of its own: times what its stdin asks for.

    python -m vllm_intscale.bench.engine_worker '{"model": ..., ...}'      arguments of vllm.LLM

A request is a line of JSON, {"prefill": prompts} or {"decode": batch}; its answer is one, too,
after a first that says the engine is ready. All else that is printed goes to stderr.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterable
from typing import Any

PROMPT = 128  # tokens of a prompt of which a step of decoding is timed
LONG_PROMPT = 2048  # of one of which prefill is timed
ROUNDS, STEPS = 16, 4  # of decoding; the median of rounds counts
PROFILED_STEPS = 32
SPARE = 16  # tokens that the first request may be ahead of the last, before and after these
ANSWER = 2 * SPARE + ROUNDS * STEPS + PROFILED_STEPS
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
        from vllm import LLM, SamplingParams
        from vllm.sampling_params import RequestOutputKind

        self.sampling, self.every_token = SamplingParams, RequestOutputKind.DELTA
        start = time.perf_counter()
        self.llm = LLM(**arguments)
        self.load_seconds = time.perf_counter() - start
        self.engine = self.llm.llm_engine
        vocabulary = self.engine.model_config.get_vocab_size()
        self.generator, self.largest = random.Random(0), vocabulary - 1
        self.requests = 0

    def prefill(self, prompts: int) -> dict[str, float | None]:
        sampling = self.sampling(max_tokens=1, temperature=0, detokenize=False)
        seconds = min(self._prefill(prompts, sampling) for _ in range(2))
        return {"tokens_per_second": prompts * LONG_PROMPT / seconds}

    def _prefill(self, prompts: int, sampling: Any) -> float:
        made = self._prompts(prompts, LONG_PROMPT)
        start = time.perf_counter()
        self.llm.generate(made, sampling, use_tqdm=False)
        return time.perf_counter() - start

    def decode(self, batch: int) -> dict[str, float | None]:
        """Milliseconds of a step: of wall time, and those in which the GPU is busy.

        Raises ValueError for more requests than the engine takes at once.
        """
        if batch > (most := self.engine.vllm_config.scheduler_config.max_num_seqs):
            raise ValueError(f"a batch of {batch} is more than max_num_seqs, which is {most}")
        sampling = self.sampling(
            max_tokens=ANSWER, ignore_eos=True, temperature=0, detokenize=False
        )
        sampling.output_kind = self.every_token
        for prompt in self._prompts(batch, PROMPT):
            self.requests += 1
            self.engine.add_request(str(self.requests), prompt, sampling)
        answering: set[str] = set()
        while len(answering) < batch:
            answering |= {output.request_id for output in self.engine.step()}
        self._steps(batch, 1)  # no prompt is among those that follow
        rounds = [self._steps(batch, STEPS) for _ in range(ROUNDS)]
        print(f"Milliseconds of a step, batch {batch}:", *(f"{1e3 * r:.3f}" for r in rounds))
        seconds = statistics.median(rounds)  # hardly moved by what happens only once
        found: dict[str, float | None] = {"step_ms": 1e3 * seconds}
        found["tokens_per_second"] = batch / seconds
        found["gpu_step_ms"] = self._busy_ms(batch)
        while self.engine.has_unfinished_requests():
            self.engine.step()
        return found

    def _prompts(self, requests: int, tokens: int) -> list[dict[str, list[int]]]:
        return [
            {"prompt_token_ids": [self.generator.randint(3, self.largest) for _ in range(tokens)]}
            for _ in range(requests)
        ]

    def _steps(self, batch: int, steps: int) -> float:
        """Seconds of a step, of so many."""
        start, tokens = time.perf_counter(), 0
        while tokens < steps * batch:
            assert self.engine.has_unfinished_requests()
            tokens += sum(len(output.outputs[0].token_ids) for output in self.engine.step())
        return (time.perf_counter() - start) * batch / tokens

    def _busy_ms(self, batch: int) -> float | None:
        """Of a step, in which the GPU is busy; the log gets the time of each kernel.

        None without a GPU, and on several: there a kernel that waits for another GPU counts as
        busy, and the profiler makes them wait longer (Mixtral-8x7B on two: 3.6 ms of 2.8).
        """
        import torch
        from torch.profiler import ProfilerActivity, profile

        several = self.engine.vllm_config.parallel_config.world_size > 1
        if several or not torch.cuda.is_available():
            return None
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            self._steps(batch, PROFILED_STEPS)
            torch.cuda.synchronize()
        kernels = [e for e in profiled.events() if e.device_type.name == "CUDA"]
        each: Counter[str] = Counter()
        for kernel in kernels:
            each[kernel.name] += kernel.time_range.elapsed_us()
        print(f"Microseconds of each step, batch {batch}:")
        for name, us in each.most_common(KERNELS_LOGGED):
            print(f"{us / PROFILED_STEPS:10.1f}  {name[:120]}")
        total = busy((e.time_range.start, e.time_range.end) for e in kernels)
        return total / PROFILED_STEPS / 1e3

    def facts(self) -> dict[str, Any]:
        weights = sum(self.llm.apply_model(size_of))
        return {"load_seconds": round(self.load_seconds, 1), "weights_gib": weights / 2**30}


def size_of(model: Any) -> int:
    """Bytes of its parameters and buffers."""
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))


def _apply_group_scales(kind: str) -> None:
    """On the partial sums of each group as "integer" or "float", in one and the same kernel."""
    from vllm_intscale import sm90_gemm

    print(f"group scales: {kind}", flush=True)
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
