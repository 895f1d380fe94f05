"""The process that times all kernels at one shape; `gemm` starts one for each shape."""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import json
import math
import os
import subprocess
import sys
import time
import traceback
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vllm_intscale.bench import timing
from vllm_intscale.bench.moe import Experts
from vllm_intscale.bench.peers import probe_error
from vllm_intscale.bench.problem import Linear, Prepared, Problem, Timed
from vllm_intscale.bench.results import Control, Row, ShapeResults

CONTEXT_LOST = 3  # exit code: a kernel left the CUDA context unusable
SEED = 0
POWER_TOKENS = 256  # fewer are bound by memory, and stay below the GPU's limit of power
# Slow to import; done before the GPU is needed, while another shape is still being timed.
IMPORTS = (
    "vllm._custom_ops",
    "vllm.model_executor.layers.quantization.utils.marlin_utils",
    "vllm.model_executor.layers.fused_moe.experts.marlin_moe",
    "humming.layer",
    "cupy",
)
PACKAGES = ("vllm", "humming-kernels", "cupy-cuda12x", "cupy-cuda13x", "vllm-intscale")

Measure = Callable[[int, Sequence[str]], tuple[list[Row], Control | None]]


class Request(NamedTuple):
    """What the process is asked for, as JSON in its argument."""

    kind: str  # "gemm" or "moe"
    shape: str
    size: tuple[int, ...]  # N, K; or those of moe.Size
    tokens: list[int]
    kernels: list[str]
    path: str
    session: str


class ContextLost(Exception):
    """A kernel failed and nothing can run on the GPU any more in this process."""

    def __init__(self, kernel: str, error: str) -> None:
        super().__init__(f"{kernel}: {error}")
        self.kernel, self.error = kernel, error


def first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def complete(
    results: ShapeResults,
    tokens: Iterable[int],
    kernels: Sequence[str],
    session: str,
    run: str,
    measure: Measure,
) -> None:
    """Time what is missing, M by M, and save after each.

    Rows of other processes that the control does not confirm are dropped and timed again, together
    with those that were missing.
    """
    for m in tokens:
        names = results.missing(m, kernels, session)
        if not names:
            continue
        rows, control = measure(m, names)
        if dropped := results.disagreeing(m, run, control):
            log(
                f"{results.shape} M={m}: warning: the control kernel ran at another speed than "
                f"before; dropped and timed again: {', '.join(dropped)}"
            )
            results.drop(m, dropped)
            rows, control = measure(m, list(dict.fromkeys([*names, *dropped])))
        results.add(m, rows, control)
        results.save()


@dataclass
class Bench:
    """All kernels at one problem."""

    request: Request
    run: str
    problem: Problem
    timer: timing.Timer
    environment: dict[str, str]
    prepared_kernels: dict[str, Prepared | str] = field(default_factory=dict)  # or an error
    seen: set[tuple[str, str]] = field(default_factory=set)  # errors whose traceback is printed

    def prepared(self, kernel: str) -> Prepared | str:
        """The kernel with its weights, made at its first use, or the error it made instead."""
        if kernel not in self.prepared_kernels:
            try:
                self.prepared_kernels[kernel] = self.problem.prepare(kernel)
            except Exception as error:
                self.prepared_kernels[kernel] = self._failure(kernel, error)
            torch.cuda.empty_cache()
        return self.prepared_kernels[kernel]

    def measure(self, m: int, names: Sequence[str]) -> tuple[list[Row], Control | None]:
        """Time these kernels and the control at M, interleaved, in all modes."""
        start = time.monotonic()
        modes = self.problem.modes
        works = (c for c in self.problem.controls if not isinstance(self.prepared(c), str))
        control = next(works, None)
        kernels = list(dict.fromkeys([*names, control] if control else names))
        rows = {(name, mode): self._row(m, name, mode) for name in kernels for mode in modes}
        references = {mode: self.problem.reference(m, mode) for mode in modes}
        settle_seconds = timing.SETTLE_SECONDS if m >= POWER_TOKENS else 0.0
        rounds: dict[tuple[str, str], Callable[[], float]] = {}
        for name, mode, timed in self._calls(kernels, m, rows):
            row = rows[name, mode]
            try:
                probe = probe_error(timed.call(0), references[mode])
                limit = self.problem.limits[name]
                row.probe_error = probe if math.isfinite(probe) else None  # JSON has no NaN
                if not probe < limit:
                    row.error = f"wrong result: relative error {probe:.3g}, limit {limit}"
                    continue
                captured = self.timer.capture(*timed, self.problem.least_seconds(m))
                rounds[name, mode] = functools.partial(captured.time, settle_seconds)
            except Exception as error:
                row.error = self._failure(name, error)
        del references

        def failed(key: tuple[str, str], error: Exception) -> None:
            rows[key].error = self._failure(key[0], error)

        for (name, mode), result in timing.interleave(rounds, failed).items():
            self._fill(rows[name, mode], result)
        for name in kernels:
            self._share(m, name, rows)
        rounds.clear()
        torch.cuda.empty_cache()  # of the graphs
        log(_progress(list(rows.values()), time.monotonic() - start))
        us = rows[control, modes[0]].us if control else None
        if control is None or us is None:
            return list(rows.values()), None
        return list(rows.values()), Control(self.run, m, control, us, self.environment["gpu"])

    def record_kernel_names(self, results: ShapeResults) -> None:
        """Add to the rows of this process what their calls launch.

        At the end: a profiler that has run may leave launches slower.
        """
        modes = self.problem.modes
        by_key = {
            (row.M, row.kernel, row.mode): row
            for row in results.rows
            if row.run == self.run and row.us is not None
        }

        def calls() -> Iterator[tuple[tuple[int, str, str], Callable[[], object]]]:
            for m in sorted({m for m, _, _ in by_key}):
                names = [name for mm, name, mode in by_key if mm == m and mode == modes[0]]
                rows = {(name, mode): self._row(m, name, mode) for name in names for mode in modes}
                for name, mode, timed in self._calls(names, m, rows):
                    if (m, name, mode) in by_key:
                        yield (m, name, mode), functools.partial(timed.call, 0)

        try:
            names = timing.kernel_names(calls())
        except Exception as error:
            log(f"{self.request.shape}: kernel names are not recorded: {first_line(error)}")
            return
        for key, launched in names.items():
            by_key[key].cuda_kernels = launched
        for m, name, mode in by_key:
            if (m, name, mode) not in names:  # the same calls
                by_key[m, name, mode].cuda_kernels = names.get((m, name, modes[0]))
        results.save()

    def _calls(
        self, kernels: Sequence[str], m: int, rows: dict[tuple[str, str], Row]
    ) -> Iterator[tuple[str, str, Timed]]:
        """Kernel, mode and call; what cannot be made is an error in its row."""
        for name in kernels:
            prepared = self.prepared(name)
            try:
                calls = {} if isinstance(prepared, str) else prepared.calls(m)
            except Exception as error:
                calls, prepared = {}, self._failure(name, error)
            if isinstance(prepared, str):
                for mode in self.problem.modes:
                    rows[name, mode].error = prepared
            for mode, timed in calls.items():
                yield name, mode, timed

    def _share(self, m: int, name: str, rows: dict[tuple[str, str], Row]) -> None:
        """A mode that the kernel does not tell from the first: what that was."""
        first, *others = (rows[name, mode] for mode in self.problem.modes)
        for row in others:
            if row.us is None and row.error is None:
                rows[name, row.mode] = Row(**{**vars(first), "mode": row.mode})

    def failed_rows(self, m: int, kernel: str, error: str) -> list[Row]:
        rows = [self._row(m, kernel, mode) for mode in self.problem.modes]
        for row in rows:
            row.error = error
        return rows

    def _row(self, m: int, kernel: str, mode: str) -> Row:
        return Row(
            shape=self.request.shape,
            N=self.request.size[0],
            K=self.request.size[1],
            M=m,
            kernel=kernel,
            mode=mode,
            run=self.run,
            session=self.request.session,
            date=datetime.now(UTC).isoformat(timespec="seconds"),
            floor_us=self.problem.floor_us(m, mode),
            environment=self.environment,
        )

    def _fill(self, row: Row, result: timing.Timing) -> None:
        row.us, row.us_min, row.us_max = result
        row.tops = self.problem.operations(row.M) / row.us / 1e6
        prepared = self.prepared(row.kernel)
        if not isinstance(prepared, str):
            row.weight_GB_per_s = prepared.weight_bytes / row.us / 1e3

    def _failure(self, kernel: str, error: Exception) -> str:
        """The error as a row holds it; ContextLost if the GPU is lost with it."""
        text = first_line(error)
        if (kernel, text) not in self.seen:
            self.seen.add((kernel, text))
            traceback.print_exception(error)
        try:
            torch.cuda.synchronize()
        except Exception:
            raise ContextLost(kernel, text) from error
        return text


def _progress(rows: list[Row], seconds: float) -> str:
    first = rows[0]
    timed = [row for row in rows if row.us is not None and row.mode == first.mode]
    times = [(row.us or 0.0, row.kernel) for row in timed]
    best = f"best {min(times)[1]} {min(times)[0]:.1f} us" if times else "nothing ran"
    errors = len({row.kernel for row in rows if row.error})
    failed = f", {errors} failed" if errors else ""
    count = len({row.kernel for row in rows})
    return f"{first.shape} M={first.M}: {count} kernels in {seconds:.1f} s, {best}{failed}"


def environment() -> dict[str, str]:
    """GPU, driver, clocks, the versions of what is compared, and our own variables."""
    query = "driver_version,clocks.max.sm,power.limit"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", "--id=0"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        smi = [value.strip() for value in output.split(",")]
    except (OSError, subprocess.CalledProcessError):
        smi = []
    found = {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda or "none"}
    found["torch"] = torch.__version__
    if len(smi) == 3:
        found |= dict(zip(("driver", "max_sm_clock", "power_limit"), smi, strict=True))
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found | {name: os.environ[name] for name in os.environ if name.startswith("INTSCALE_")}


def make_bench(request: Request, run: str) -> Bench:
    """On the current GPU, with Gaussian weights and activations from a fixed seed."""
    timer = timing.Timer()
    generator = torch.Generator("cuda").manual_seed(SEED)
    gaussian = functools.partial(torch.randn, generator=generator, device="cuda")
    arguments = request.size, max(request.tokens), gaussian, timing.memory_bandwidth()
    problem: Problem
    if request.kind == "gemm":
        problem = Linear.gaussian(*arguments)
    else:
        problem = Experts.gaussian(*arguments)
    return Bench(request, run, problem, timer, environment())


def run(request: Request, bench: Bench) -> int:
    """Time what the request names and is missing; returns the exit code."""
    results = ShapeResults(Path(request.path), request.shape, *request.size[:2])
    kernels, session = request.kernels, request.session
    try:
        complete(results, request.tokens, kernels, session, bench.run, bench.measure)
    except ContextLost as lost:
        log(f"{request.shape}: the CUDA context is lost: {lost}")
        for m in results.missing_tokens(request.tokens, lost.kernel, session):
            results.add(m, bench.failed_rows(m, lost.kernel, f"{lost.error}; CUDA was lost"), None)
        results.save()
        return CONTEXT_LOST
    bench.record_kernel_names(results)
    return 0


def main() -> None:
    fields: dict[str, Any] = json.loads(sys.argv[1])
    for name in IMPORTS:
        with contextlib.suppress(Exception):  # shows up as the error of those who need it
            importlib.import_module(name)
    if sys.stdin.readline():  # the GPU is free now; nothing to read: the parent is gone
        request = Request(**fields)
        bench = make_bench(request, uuid.uuid4().hex[:8])
        gc.freeze()  # torch may collect garbage at each capture, over all that the imports left
        code = run(request, bench)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # vLLM may abort in C++ while the interpreter shuts down


if __name__ == "__main__":
    main()
