"""Tables, plot and summary of `intscale bench serve`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from vllm_intscale.bench.report import WIDE, import_pyplot
from vllm_intscale.bench.results import OURS
from vllm_intscale.bench.serve import TOLERANCE, Row, agreeing

COUNTED = {"prefill": "prompts at once", "decode": "batch", "serve": "requests at a time"}
# Of an answer: what a table shows, its heading and format, and how many times that is shown.
FIGURES = (
    ("prefill", "tokens_per_second", "Prefill, thousands of tokens a second", 1e-3, "{:.1f}"),
    (
        "decode",
        "gpu_step_ms",
        "A step of decoding, milliseconds that the GPU is busy",
        1.0,
        "{:.3f}",
    ),
    ("decode", "step_ms", "A step of decoding, milliseconds", 1.0, "{:.3f}"),
    ("serve", "output_tokens_per_second", "Served, tokens a second", 1.0, "{:.0f}"),
    ("serve", "tpot_ms", "Served, median milliseconds a token", 1.0, "{:.2f}"),
    ("serve", "p99_tpot_ms", "Served, milliseconds a token, 99 % below", 1.0, "{:.2f}"),
    ("serve", "ttft_ms", "Served, median milliseconds to the first token", 1.0, "{:.0f}"),
)


def print_tables(rows: Sequence[Row], console: Console | None = None) -> None:
    """One for each figure: configurations by batch, then what failed and why."""
    console = console or Console(width=WIDE, highlight=False)
    kept = agreeing(rows)
    doubtful = [r for r in rows if r.control and r not in kept[r.what, r.batch]]
    for what, figure, title, factor, text in FIGURES:
        asked = [row for row in rows if row.what == what and row.found]
        batches = sorted({row.batch for row in asked if (row.found or {}).get(figure)})
        if not batches:
            continue
        table = Table(title=title, title_justify="left", box=SIMPLE)
        table.add_column(COUNTED[what], no_wrap=True)
        for batch in batches:
            table.add_column(str(batch), justify="right", no_wrap=True)
        for name in dict.fromkeys(row.configuration for row in asked):
            cells = []
            for batch in batches:
                row = next((r for r in asked if (r.configuration, r.batch) == (name, batch)), None)
                value = (row.found or {}).get(figure) if row else None
                sure = "?" if row in doubtful else ""
                cells.append(text.format(value * factor) + sure if value else "")
            table.add_row(name, *cells, style="bold" if name == OURS else None)
        console.print(table)
    if doubtful:
        console.print(f"? the control beside it was off by more than {TOLERANCE:.0%}")
    for row in rows:
        if row.error:
            console.print(f"{row.configuration}: {row.error}", markup=False, soft_wrap=True)


def summary(rows: Sequence[Row], **context: Any) -> dict[str, Any]:
    """For the last line on stdout."""
    return {**context, "rows": [row._asdict() for row in rows]}


def plot(rows: Sequence[Row], path: Path) -> None:
    """Milliseconds of a step over the batch, every configuration."""
    pyplot = import_pyplot()
    figure, axes = pyplot.subplots(figsize=(6, 4.5))
    for i, name in enumerate(dict.fromkeys(row.configuration for row in rows)):
        chosen = [r for r in rows if r.configuration == name and r.what == "decode" and r.found]
        points = [(r.batch, _step(r.found)) for r in chosen if r.found]
        if points:
            style = (
                {"color": "black", "linewidth": 2.5} if name == OURS else {"color": f"C{i % 10}"}
            )
            axes.plot(*zip(*points, strict=True), marker="o", label=name, **style)
    axes.set(xlabel="batch", ylabel="milliseconds a step", xscale="log", yscale="log")
    axes.legend(fontsize="small")
    axes.grid(alpha=0.4)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def _step(found: Mapping[str, float | None]) -> float | None:
    return found.get("gpu_step_ms") or found.get("step_ms")
