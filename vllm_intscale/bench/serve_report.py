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


def print_tables(rows: Sequence[Row], engines: Mapping[str, Mapping[str, float]]) -> None:
    """One for each figure: configurations by batch; of `engines`, facts of each engine; errors."""
    console = Console(width=WIDE, highlight=False)
    kept = agreeing(rows)
    alone = [r for r in rows if r.found and not r.control and r.what != "serve"]
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
                mark = "?" if row in doubtful else "*" if row in alone else ""
                cells.append(text.format(value * factor) + mark if value else "")
            table.add_row(name, *cells, style=_style(name))
        console.print(table)
    table = Table("", "GiB of weights", "seconds to start", box=SIMPLE)
    for name, facts in engines.items():
        weights, seconds = facts["weights_gib"], facts["load_seconds"]
        table.add_row(name, f"{weights:.1f}", f"{seconds:.0f}", style=_style(name))
    console.print(table)
    if doubtful:
        console.print(f"? the control beside it was off by more than {TOLERANCE:.0%}")
    if alone:
        console.print("* alone: there was no room for the control beside it")
    for row in rows:
        if row.error:
            console.print(f"{row.configuration}: {row.error}", markup=False, soft_wrap=True)


def _style(name: str) -> str | None:
    return "bold" if name == OURS else None


def summary(rows: Sequence[Row], **context: Any) -> dict[str, Any]:
    """For the last line on stdout."""
    return {**context, "rows": [row._asdict() for row in rows]}


def plot(rows: Sequence[Row], path: Path) -> None:
    """Of every configuration: a step over the batch; what is served over requests at a time.

    The time that the GPU is busy if it is known of all, else wall time. Rows beside a control that
    was off are left out. Writes nothing if there are no others.
    """
    kept = agreeing(rows)
    rows = [r for r in rows if r.found and (not r.control or r in kept[r.what, r.batch])]
    steps = [r.found for r in rows if r.what == "decode" and r.found]
    step = "gpu_step_ms" if all(found["gpu_step_ms"] for found in steps) else "step_ms"
    label = "milliseconds of a step" + (" that the GPU is busy" if step != "step_ms" else "")
    panels = [
        ("decode", step, label),
        ("serve", "output_tokens_per_second", "tokens a second"),
        ("serve", "p99_tpot_ms", "milliseconds a token, 99 % below"),
    ]
    panels = [panel for panel in panels if any(r.what == panel[0] for r in rows)]
    if not panels:
        return
    pyplot = import_pyplot()
    figure, grid = pyplot.subplots(
        1, len(panels), figsize=(2 + 4.5 * len(panels), 5), squeeze=False, layout="constrained"
    )
    names = list(dict.fromkeys(row.configuration for row in rows))
    for axes, (what, quantity, label) in zip(grid[0], panels, strict=True):
        for i, name in enumerate(names):
            chosen = [r for r in rows if r.configuration == name and r.what == what]
            points = sorted((r.batch, (r.found or {}).get(quantity)) for r in chosen)
            if points:
                ours = {"color": "black", "linewidth": 2.5, "zorder": 3}
                other = {"color": f"C{i % 10}", "linestyle": "-" if i < 10 else "--"}
                style = ours if name == OURS else other
                axes.plot(*zip(*points, strict=True), marker="o", label=name, **style)
        counts = sorted({r.batch for r in rows if r.what == what})
        axes.set(xlabel=COUNTED[what], ylabel=label, xscale="log")
        axes.set_xticks(counts, counts, minor=False)
        axes.set_xticks([], minor=True)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.4)
    drawn = {line.get_label(): line for axes in grid[0] for line in axes.get_lines()}
    figure.legend(
        handles=drawn.values(), fontsize="small", ncols=2 + len(panels), loc="outside lower center"
    )
    figure.savefig(path, dpi=120)
