"""`intscale bench serve`: a model of random numbers in vLLM's engine, in every quantization it has.

Each configuration runs in an engine of its own, some of them on the GPU at once, of which only one
works at a time. The control's stays beside all of them that leave it room: after each timing the
same is asked of it, and rows count only where it answers alike.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from vllm_intscale.bench.configurations import (
    AT_ONCE,
    Plan,
    check_log,
    configuration_of,
    gpu_bytes,
    groups_of,
    plan_of,
)
from vllm_intscale.bench.engine_worker import ANSWER, LONG_PROMPT, PROMPT
from vllm_intscale.errors import IntScaleError

TOLERANCE = 0.02  # of the control's answers, between the rows that are compared
CLOCKS = "gpu_step_ms", "tokens_per_second"  # by the first that a row has
PREFILL_PROMPTS = 16
BATCHES = (1, 16, 64, 256)
MAX_LEN = 4096
CACHE_TOKENS = 5120  # at least, of each engine
# And of the batches asked for; users have more of these, which takes longer to start.
GRAPHS = 1, 2, 4, 8, 16, 32, 64, 128, 256


class Row(NamedTuple):
    """One timing: of prefill (batch: prompts) or a step of decoding, beside the control's.

    control: None if there was no room for it.
    """

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
            f"its process ended with code {code}: {last_error(self.log)}; see {self.log}"
        )

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


def last_error(log: Path) -> str:
    """The last line of an exception, after which vLLM may go on; or that of the log."""
    lines = [line for line in log.read_text().splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"\w(Error|Exception): ", line)]
    return (errors or lines or [""])[-1]


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
    the configuration that the same is asked of after each of the others, but for those that run
    alone, at the end: they need the room it takes. Returns what is known of each engine that
    started: seconds of loading, GiB of weights.

    Raises IntScaleError if the control fails; what fails otherwise is a row's error.
    """
    tokens = max(CACHE_TOKENS, max(batches) * (PROMPT + ANSWER))
    questions = [("prefill", min(PREFILL_PROMPTS, tokens // LONG_PROMPT))]
    questions += [("decode", batch) for batch in batches]
    arguments = {
        "max_model_len": MAX_LEN,
        "enable_prefix_caching": False,
        "compilation_config": {"cudagraph_capture_sizes": sorted({*GRAPHS, *batches})},
        **engine,
    }
    control = plan_of(control_name, model, folder, tokens, arguments)
    others = [name for name in configurations if name != control_name]
    plans = plans_of(others, model, folder, tokens, arguments, on_row)
    room = gpu_bytes() - control.bytes_needed
    beside = groups_of([p for p in plans if p.bytes_needed <= room], room)
    if not beside and control_name in configurations:
        beside = [[]]
    alone = [p for p in plans if p.bytes_needed > room]
    facts: dict[str, dict[str, Any]] = {}
    wanted = set(configurations)
    with ThreadPoolExecutor(AT_ONCE + 1) as pool:

        def start(plans: Iterable[Plan]) -> dict[str, Future[Worker]]:
            return {plan.name: pool.submit(_start, plan, folder) for plan in plans}

        def time_rows(workers: dict[str, Worker], control: Worker | None) -> None:
            facts.update({name: worker.facts for name, worker in workers.items()})
            for row in _rows(workers, control, questions):
                if row.configuration in wanted:
                    on_row(row)

        with closing_all(start([control] if beside else [])) as controls:
            for group in beside:
                with closing_all(start(group)) as started:
                    first = controls[control_name].result()
                    time_rows({control_name: first, **ready(started, on_row, "start")}, first)
                wanted.discard(control_name)  # it is asked again beside each group
        for large in alone:
            with closing_all(start([large])) as started:
                time_rows(ready(started, on_row, "start"), None)
    return facts


def plans_of(
    names: Iterable[str],
    model: Mapping[str, Any],
    folder: Path,
    tokens: int,
    engine: Mapping[str, Any],
    on_row: Callable[[Row], None],
) -> list[Plan]:
    """`plan_of` each; a row for each of those that cannot be planned."""
    plans = []
    for name in names:
        try:
            plans.append(plan_of(name, model, folder, tokens, engine))
        except IntScaleError as error:
            on_row(Row(name, "start", 0, None, None, str(error)))
    return plans


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


def _rows(
    workers: Mapping[str, Worker], control: Worker | None, questions: Iterable[tuple[str, int]]
) -> Iterator[Row]:
    """One configuration after the other for each question, after each the control."""
    failed = set()
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
            beside = None
            if control:
                beside = found if worker is control else control.ask({what: number})
            yield Row(name, what, number, found, beside)


def _start(plan: Plan, folder: Path) -> Worker:
    """Raises IntScaleError if it does not start, or another kernel runs than is meant."""
    environment, log = configuration_of(plan.name).environment, folder / f"{plan.name}.log"
    worker = Worker("engine_worker", plan.arguments, environment, log)
    try:
        check_log(plan, log)
    except IntScaleError:
        worker.close()
        raise
    return worker


def agreeing(rows: Iterable[Row]) -> dict[tuple[str, int], list[Row]]:
    """Rows by what was asked, those whose control is within TOLERANCE of the median of them.

    By the clock of the row: the time that the GPU is busy, or else wall time.
    """
    groups: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        if row.found and row.control:
            groups.setdefault((row.what, row.batch), []).append(row)
    return {key: [row for row in group if _agrees(row, group)] for key, group in groups.items()}


def _agrees(row: Row, group: Iterable[Row]) -> bool:
    clock = next(c for c in CLOCKS if _figure(row.found, c) and _figure(row.control, c))
    answers = [answer for r in group if (answer := _figure(r.control, clock))]
    return abs(_figure(row.control, clock) / statistics.median_high(answers) - 1) <= TOLERANCE


def _figure(answer: Mapping[str, float | None] | None, name: str) -> float:
    return (answer or {}).get(name) or 0.0
