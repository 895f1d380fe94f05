"""What the commands print: progress, reports, sizes."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from vllm_intscale.format import ACCUMULATOR_MAX

if TYPE_CHECKING:
    from vllm_intscale.inspection import Inspection
    from vllm_intscale.quantize import Progress, Report
    from vllm_intscale.quantize.estimate import Estimate

GIB = 2**30
SECONDS_BETWEEN_LINES = 10.0  # of progress, where there is no terminal to draw a bar on


@contextmanager
def progress_display() -> Iterator[Callable[[Progress], None]]:
    """A bar on a terminal, otherwise a line now and then; on stderr."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    if not console.is_terminal:
        yield LineDisplay()
        return
    columns = (
        TextColumn("quantizing"),
        BarColumn(),
        TextColumn("{task.fields[tensors]} tensors"),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=console) as bar:
        task = bar.add_task("", total=None, tensors="0")

        def show(progress: Progress) -> None:
            bar.update(
                task,
                completed=progress.bytes,
                total=progress.total_bytes,
                tensors=f"{progress.tensors}/{progress.total_tensors}",
            )

        yield show


def print_estimate(found: Estimate) -> None:
    """What `quantize --dry-run` foresees of memory and time."""
    seconds = max(1, round(found.seconds))
    hours, minutes = seconds // 3600, seconds % 3600 // 60
    time_text = f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds % 60} s"
    print(f"Memory      about {size(found.memory_bytes)}")
    print(f"Time        at least {time_text}, by a trial on this machine")


@contextmanager
def status() -> Iterator[Callable[[str], None]]:
    """What is being read, on a terminal; on stderr."""
    from rich.console import Console

    with Console(stderr=True).status("") as status:
        yield status.update


class LineDisplay:
    def __init__(self) -> None:
        self.start = self.shown = time.monotonic()

    def __call__(self, progress: Progress) -> None:
        now = time.monotonic()
        if now - self.shown < SECONDS_BETWEEN_LINES:
            return
        self.shown = now
        left = (now - self.start) * (progress.total_bytes / max(1, progress.bytes) - 1)
        print(
            f"quantizing: {progress.tensors}/{progress.total_tensors} tensors, "
            f"{size(progress.bytes)} of {size(progress.total_bytes)}, {left:.0f} s left",
            file=sys.stderr,
            flush=True,
        )


def print_inspection(found: Inspection) -> None:
    print(f"Model       {found.model_type}, {size(found.stored_bytes)} stored")
    schemes = ", ".join(f"{count} {scheme}" for scheme, count in found.layers.items())
    would = "" if found.quantized else f", {size(found.intscale_bytes)} once quantized"
    print(f"Layers      {schemes}{would}")
    for reason, count in found.left.items():
        print(f"Left        {count} x {reason}")


def print_report(report: Report, seconds: float) -> None:
    bits = 8 * report.quantized_bytes / report.weights
    print(
        f"Quantized   {report.layers} layers, {size(report.quantized_source_bytes)} to "
        f"{size(report.quantized_bytes)}, {bits:.2f} bits per weight"
    )
    for reason, layers in report.left.items():
        names = ", ".join(layers[:2]) + (", ..." if len(layers) > 2 else "")
        print(f"Left        {len(layers)} x {reason}: {names}")
    print(
        f"Model       {size(report.source_bytes)} to {size(report.written_bytes)} in "
        f"{seconds:.0f} s"
    )
    if report.smoothed:
        print(f"Smoothed    the inputs of {report.smoothed} layers, by powers of two")
    if report.uncalibrated:
        names = ", ".join(report.uncalibrated[:2]) + (", ..." if report.uncalibrated[2:] else "")
        print(
            f"Rounded     {len(report.uncalibrated)} layers to nearest, which the text does "
            f"not reach, or too little of it: {names}"
        )
    _print_conversions(report)
    print(f"Scales      {report.lost_groups} rounded to 0, which makes the group's weights 0")
    print(
        f"Overflow    impossible: int32 accumulators are used to at most "
        f"{report.bound / ACCUMULATOR_MAX:.1%} ({report.bound_layer})"
    )


def _print_conversions(report: Report) -> None:
    kept = {n: c.error for n, c in report.conversions.items() if c.kept_groups == c.groups}
    again = {n: c.error for n, c in report.conversions.items() if n not in kept}
    for title, errors, what in (
        ("Kept", kept, "keep all codes; integer scales change"),
        ("Rounded", again, "were rounded again, asymmetric or reordered, which changes"),
    ):
        if errors:
            worst = max(errors, key=errors.__getitem__)
            print(
                f"{title:<11} {len(errors)} layers {what} the weights by "
                f"{sum(errors.values()) / len(errors):.2%}, at most {errors[worst]:.2%} ({worst})"
            )


def size(size: int) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB else f"{size / 2**20:.1f} MiB"
