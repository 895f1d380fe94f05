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
import select
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

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
    """A module of this folder in a process of its own, which answers in JSON; its log is a file."""

    def __init__(
        self, module: str, arguments: Mapping[str, Any], environment: Mapping[str, str], log: Path
    ) -> None:
        self.log = log
        name = f"vllm_intscale.bench.{module}"
        with log.open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", name, json.dumps(arguments)],
                env={**os.environ, **environment},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                text=True,
            )
        try:
            self.facts = self._answer(None)
        except BaseException:
            self.close()
            raise

    def ask(self, request: Mapping[str, Any], seconds: float | None = None) -> dict[str, Any]:
        """Its answer. Raises IntScaleError if it fails, ended or takes longer, which ends it."""
        assert self.process.stdin
        if self.process.poll() is None:
            with contextlib.suppress(BrokenPipeError):  # it has ended: `_answer` says how
                self.process.stdin.write(json.dumps(request) + "\n")
                self.process.stdin.flush()
            return self._answer(seconds)
        raise self._ended()

    def _answer(self, seconds: float | None) -> dict[str, Any]:
        assert self.process.stdout
        if not select.select([self.process.stdout], [], [], seconds)[0]:
            self.process.kill()  # nobody is to take a late answer for that to another question
            self.process.wait()
            raise IntScaleError(f"no answer after {seconds:.0f} s; see {self.log}")
        line = self.process.stdout.readline()
        if not line:
            raise self._ended()
        found: dict[str, Any] = json.loads(line)
        if error := found.get("error"):
            raise IntScaleError(f"{error}; see {self.log}")
        return found

    def _ended(self) -> IntScaleError:
        code = self.process.wait()
        return IntScaleError(
            f"its process ended with code {code}: {last_line(self.log)}; see {self.log}"
        )

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
    tokens = max(CACHE_TOKENS, max(batches) * (PROMPT + ANSWER))
    arguments = {**ENGINE, **memory_of(model, tokens), **engine}
    facts: dict[str, dict[str, Any]] = {}
    wanted = set(configurations)
    with ThreadPoolExecutor(AT_ONCE + 1) as pool:

        def start(name: str) -> Future[Worker]:
            return pool.submit(_start, name, checkpoint_of(name, model, folder), arguments, folder)

        with closing_all({control_name: start(control_name)}) as controls:
            for group in groups_of([name for name in configurations if name != control_name]):
                with closing_all({name: start(name) for name in group}) as started:
                    workers = {control_name: controls[control_name].result()}
                    workers |= ready(started, on_row, "start")
                    facts |= {name: worker.facts for name, worker in workers.items()}
                    for row in _rows(workers, batches):
                        if row.configuration in wanted:
                            on_row(row)
                wanted.discard(control_name)  # it is asked again beside each group
    return facts


def groups_of(names: Sequence[str]) -> list[Sequence[str]]:
    """Those that are on the GPU at once; one group at least."""
    return [names[i : i + AT_ONCE] for i in range(0, len(names), AT_ONCE)] or [[]]


class Closable(Protocol):
    def close(self) -> None: ...


Started = TypeVar("Started", bound=Closable)


@contextmanager
def closing_all(starting: dict[str, Future[Started]]) -> Iterator[dict[str, Future[Started]]]:
    """Once they have started."""
    try:
        yield starting
    finally:
        for future in starting.values():
            if not future.exception():
                future.result().close()


def ready(
    starting: Mapping[str, Future[Started]], on_row: Callable[[Row], None], what: str
) -> dict[str, Started]:
    """Those that have started; a row for each of the others."""
    found = {}
    for name, future in starting.items():
        try:
            found[name] = future.result()
        except IntScaleError as error:
            on_row(Row(name, what, 0, None, None, str(error)))
    return found


def _rows(workers: dict[str, Worker], batches: Iterable[int]) -> Iterator[Row]:
    """One configuration after the other for each question, after each the first, the control."""
    questions = [("prefill", PREFILL_PROMPTS), *(("decode", batch) for batch in batches)]
    control, failed = next(iter(workers.values())), set()
    for what, number in questions:
        for name, worker in workers.items():
            if name in failed:
                continue
            try:
                found = worker.ask({what: number})
            except IntScaleError as error:
                if worker is control:
                    raise
                failed.add(name)
                yield Row(name, what, number, None, None, str(error))
                continue
            beside = found if worker is control else control.ask({what: number})
            yield Row(name, what, number, found, beside)


def _start(name: str, checkpoint: Path, engine: Mapping[str, Any], folder: Path) -> Worker:
    """Raises IntScaleError if it does not start, or another kernel runs than is meant."""
    configuration, log = CONFIGURATIONS[name], folder / f"{name}.log"
    arguments = {"model": str(checkpoint), **engine, **configuration.options}
    worker = Worker("engine_worker", arguments, configuration.environment, log)
    try:
        check_log(name, log)
    except IntScaleError:
        worker.close()
        raise
    return worker


def check_log(name: str, log: Path) -> None:
    """Raise IntScaleError if it does not show that the configuration's kernel runs."""
    pattern = CONFIGURATIONS[name].log
    if not re.search(pattern, log.read_text()):
        raise IntScaleError(
            f"{name}: its log does not say {pattern!r}, so that another kernel may run; see {log}"
        )


def memory_of(model: Mapping[str, Any], tokens: int) -> dict[str, Any]:
    """Options of an engine that leaves memory to others: a KV cache for so many tokens."""
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
