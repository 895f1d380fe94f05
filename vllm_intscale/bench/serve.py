"""`intscale bench serve`: a model of random numbers in vLLM's engine, in every quantization it has.

Each configuration runs in an engine of its own, some of them on the GPU at once, of which only one
works at a time. The control's stays beside all of them: after each timing the same is asked of it,
and rows count only where it answers alike.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vllm_intscale.bench.engine_worker import ANSWER, GROUP_SCALES, PROMPT
from vllm_intscale.bench.random_checkpoint import write_random
from vllm_intscale.errors import IntScaleError

TOLERANCE = 0.02  # of the control's answers, between the rows that are compared
PREFILL_PROMPTS = 16
BATCHES = (1, 16, 64, 256)
MAX_LEN = 4096
CACHE_TOKENS = 5120  # at least, of each engine
AT_ONCE = 2  # beside the control: what has room on a GPU of 80 GB if one of them is 8B in bf16
# Nobody here asks for other batches; users have more of these, which takes longer to start.
GRAPHS = {"cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32, 64, 128, 256]}
ENGINE = {"max_model_len": MAX_LEN, "enable_prefix_caching": False, "compilation_config": GRAPHS}


class Configuration(NamedTuple):
    """How vLLM runs a model: the checkpoint's format, engine options and environment.

    log: what the log says if the kernel that is meant runs, a regular expression.
    """

    format: str
    log: str
    options: Mapping[str, Any] = {}
    environment: Mapping[str, str] = {}


CONFIGURATIONS = {
    "intscale": Configuration("intscale", r"\d+ on sm\d+_w4a8_gemm"),
    "bf16": Configuration("bf16", ""),
    "fp8": Configuration("fp8", "Cutlass\\w*FP8"),
    "machete_w4a16": Configuration("w4a16", "Machete"),
    "w8a8_int8": Configuration("w8a8_int8", "Cutlass\\w*Int8"),
    "marlin_w4a16": Configuration("gptq", "Marlin", {"linear_backend": "marlin"}),
    "marlin_w4a8_int8": Configuration(
        *("gptq", "Marlin", {"linear_backend": "marlin"}, {"VLLM_MARLIN_INPUT_DTYPE": "int8"})
    ),
    "w4a8_fp8": Configuration("w4a8_fp8", "CutlassW4A8"),
    "humming_w4a8_int8": Configuration(
        *("gptq", "(?i)humming", {"quantization": "humming"}),
        {"VLLM_HUMMING_INPUT_QUANT_CONFIG": '{"dtype":"int8"}'},
    ),
    "intscale_unfused": Configuration(
        "intscale", r"\d+ on sm\d+_w4a8_gemm", {}, {"INTSCALE_FUSE": "0"}
    ),
    **{
        f"intscale_{kind}_scale": Configuration(
            *("intscale", "accumulate form", {}),
            {"INTSCALE_FORM": "accumulate", GROUP_SCALES: kind},
        )
        for kind in ("integer", "float")
    },
}


class Row(NamedTuple):
    """One timing: of prefill (batch: prompts) or a step of decoding, beside the control's."""

    configuration: str
    what: str
    batch: int
    found: dict[str, float | None] | None
    control: dict[str, float | None] | None
    error: str = ""


class Worker:
    """An `engine_worker`; its log is a file."""

    def __init__(
        self, engine: Mapping[str, Any], environment: Mapping[str, str], log: Path
    ) -> None:
        self.log = log
        command = [sys.executable, "-m", "vllm_intscale.bench.engine_worker", json.dumps(engine)]
        with log.open("w") as output:
            self.process = subprocess.Popen(
                command,
                env={**os.environ, **environment},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                text=True,
            )
        try:
            self.facts = self._answer()
        except BaseException:
            self.close()
            raise

    def ask(self, what: str, number: int) -> dict[str, float | None]:
        assert self.process.stdin
        with contextlib.suppress(BrokenPipeError):  # it has ended: `_answer` says how
            self.process.stdin.write(json.dumps({what: number}) + "\n")
            self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            raise IntScaleError(
                f"its engine ended with code {code}: {last_line(self.log)}; see {self.log}"
            )
        found: dict[str, Any] = json.loads(line)
        return found

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


def last_line(log: Path) -> str:
    """That is not empty."""
    return next((t for t in reversed(log.read_text().splitlines()) if t.strip()), "")


def checkpoint_of(name: str, model: Mapping[str, Any], folder: Path) -> Path:
    """Of a configuration, written now if it is not there."""
    form = CONFIGURATIONS[name].format
    if not (folder / form).exists():
        write_random(model, folder / form, form)
        torch.cuda.empty_cache()  # it was made there
    return folder / form


def check_names(configurations: Sequence[str]) -> None:
    """Raise IntScaleError for an unknown configuration."""
    if unknown := [c for c in configurations if c not in CONFIGURATIONS]:
        known = ", ".join(CONFIGURATIONS)
        raise IntScaleError(f"--configurations {', '.join(unknown)}: unknown; there are {known}")


def run(
    model: Mapping[str, Any],
    configurations: Sequence[str],
    batches: Sequence[int],
    folder: Path,
    on_row: Callable[[Row], None],
    engine: Mapping[str, Any],
    control_name: str,
) -> dict[str, dict[str, Any]]:
    """Time configurations, one row after the other; checkpoints and logs go to `folder`.

    model: config.json of `random_checkpoint`. engine: arguments of vllm.LLM for all. control_name:
    the configuration that the same is asked of after each of the others. Returns what is known of
    each engine that started: seconds of loading, GiB of weights.

    Raises IntScaleError if the control fails; what fails otherwise is a row's error.
    """
    arguments = {**ENGINE, **memory_of(model, batches), **engine}
    facts: dict[str, dict[str, Any]] = {}
    names = [name for name in configurations if name != control_name]
    groups = [names[i : i + AT_ONCE] for i in range(0, len(names), AT_ONCE)] or [[]]
    wanted = set(configurations)

    with ThreadPoolExecutor(AT_ONCE + 1) as pool:

        def starting(group: Sequence[str]) -> AbstractContextManager[dict[str, Future[Worker]]]:
            folders = [(name, checkpoint_of(name, model, folder)) for name in group]
            return closing_all(
                {n: pool.submit(_start, n, c, arguments, folder) for n, c in folders}
            )

        with starting([control_name]) as controls:
            for group in groups:
                with starting(group) as started:
                    workers = {control_name: controls[control_name].result()}
                    for name, worker in started.items():
                        try:
                            workers[name] = worker.result()
                        except IntScaleError as error:
                            on_row(Row(name, "start", 0, None, None, str(error)))
                    facts |= {name: worker.facts for name, worker in workers.items()}
                    for row in _rows(workers, batches):
                        if row.configuration in wanted:
                            on_row(row)
                wanted.discard(control_name)  # it is asked again beside each group
    return facts


@contextmanager
def closing_all(workers: dict[str, Future[Worker]]) -> Iterator[dict[str, Future[Worker]]]:
    """Once they have started."""
    try:
        yield workers
    finally:
        for worker in workers.values():
            if not worker.exception():
                worker.result().close()


def _rows(workers: dict[str, Worker], batches: Iterable[int]) -> Iterator[Row]:
    """One configuration after the other for each question, after each the first, the control."""
    questions = [("prefill", PREFILL_PROMPTS), *(("decode", batch) for batch in batches)]
    control, failed = next(iter(workers.values())), set()
    for what, number in questions:
        for name, worker in workers.items():
            if name in failed:
                continue
            try:
                found = worker.ask(what, number)
            except IntScaleError as error:
                if worker is control:
                    raise
                failed.add(name)
                yield Row(name, what, number, None, None, str(error))
                continue
            beside = found if worker is control else control.ask(what, number)
            yield Row(name, what, number, found, beside)


def _start(name: str, checkpoint: Path, engine: Mapping[str, Any], folder: Path) -> Worker:
    """Raises IntScaleError if it does not start, or another kernel runs than is meant."""
    configuration, log = CONFIGURATIONS[name], folder / f"{name}.log"
    arguments = {"model": str(checkpoint), **engine, **configuration.options}
    worker = Worker(arguments, configuration.environment, log)
    if not re.search(configuration.log, log.read_text()):
        worker.close()
        raise IntScaleError(
            f"{name}: its log does not say {configuration.log!r}, so that another kernel may run; "
            f"see {log}"
        )
    return worker


def memory_of(model: Mapping[str, Any], batches: Sequence[int]) -> dict[str, Any]:
    """Options of an engine that leaves memory to others: a KV cache for what it is asked."""
    tokens = max(CACHE_TOKENS, max(batches) * (PROMPT + ANSWER))
    heads = model["num_key_value_heads"], model["hidden_size"] // model["num_attention_heads"]
    size = 2 * torch.bfloat16.itemsize * model["num_hidden_layers"] * heads[0] * heads[1]
    return {"gpu_memory_utilization": 0.1, "kv_cache_memory_bytes": tokens * size}


def agreeing(rows: Iterable[Row]) -> dict[tuple[str, int], list[Row]]:
    """Rows by what was asked, those whose control is within TOLERANCE of the median of them."""
    groups: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        if row.found and row.control:
            groups.setdefault((row.what, row.batch), []).append(row)
    for key, group in groups.items():
        speeds = sorted(speed(row.control) for row in group)
        median = speeds[len(speeds) // 2]
        groups[key] = [r for r in group if abs(speed(r.control) / median - 1) <= TOLERANCE]
    return groups


def speed(answer: Mapping[str, float | None] | None) -> float:
    """Tokens a second; by the time that the GPU is busy, where that is known."""
    assert answer
    busy = answer.get("gpu_step_ms")
    return 1 / busy if busy else float(answer["tokens_per_second"] or 0.0)
