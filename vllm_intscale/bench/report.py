"""Tables, plot and summary of the GEMM benchmark's rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from vllm_intscale.bench.results import OURS, Row, best_peers
from vllm_intscale.errors import IntScaleError

TITLES = {  # by mode
    "gemm": "GEMM alone: quantized activations in, bf16 out",
    "linear": "Linear layer: bf16 in, activations quantized, bf16 out",
    "random": "Experts chosen evenly",
    "skewed": "Experts chosen unevenly, the i-th with a probability that goes with 1 / i",
}
WIDE = 200  # columns; a table that is cut at 80 is of no use in a log
LEFT_OUT = ("environment", "cuda_kernels")  # of a row in the summary: long, and in the files


def print_tables(rows: Sequence[Row], console: Console | None = None) -> None:
    """For each mode a table per shape: microseconds by kernel and M, then what failed and why."""
    console = console or Console(width=WIDE, highlight=False)
    for mode in dict.fromkeys(row.mode for row in rows):
        console.print(f"\n{TITLES[mode]} (microseconds, * best peer)", style="bold")
        for shape in dict.fromkeys(row.shape for row in rows):
            chosen = [row for row in rows if (row.mode, row.shape) == (mode, shape)]
            if chosen:
                console.print(_table(chosen))
    for line in error_lines(rows):
        console.print(line, markup=False, soft_wrap=True)


def _table(rows: Sequence[Row]) -> Table:
    """Of the rows of one shape and mode."""
    first = rows[0]
    tokens = sorted({row.M for row in rows})
    best = best_peers(rows)
    table = Table(title=f"{first.shape} {first.N}x{first.K}", title_justify="left", box=SIMPLE)
    table.add_column("M", no_wrap=True)
    for m in tokens:
        table.add_column(str(m), justify="right", no_wrap=True)
    by_place = {(row.kernel, row.M): row for row in rows}
    for kernel in dict.fromkeys(row.kernel for row in rows):
        cells = (_cell(by_place.get((kernel, m)), best) for m in tokens)
        table.add_row(kernel, *cells, style="bold" if kernel == OURS else None)
    table.add_section()
    ours = [by_place.get((OURS, m)) for m in tokens]
    if any(ours):
        ratios = (row.ratio_to_best_peer if row else None for row in ours)
        table.add_row(f"{OURS} / best peer", *(f"{r:.2f}" if r else "" for r in ratios))
    floors = _floors(rows)
    if floors:
        cells = (f"{floors[m]:.1f}" if m in floors else "" for m in tokens)
        table.add_row("streaming int4 weights", *cells)
    return table


def _floors(rows: Iterable[Row]) -> dict[int, float]:
    """By M: the least that any process measured."""
    floors: dict[int, float] = {}
    for row in rows:
        if row.floor_us:
            floors[row.M] = min(row.floor_us, floors.get(row.M, row.floor_us))
    return floors


def _cell(row: Row | None, best: dict[tuple[str, int, str], float]) -> str:
    if row is None:
        return ""
    if row.us is None:
        return "error"
    is_best = not row.kernel.startswith(OURS) and row.us == best[row.shape, row.M, row.mode]
    return f"{'*' if is_best else ''}{row.us:.1f}" if row.us < 1000 else f"{row.us:.0f}"


def error_lines(rows: Iterable[Row]) -> list[str]:
    """What failed, one line for each kernel and reason."""
    places: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row.error is not None:
            places.setdefault((row.kernel, row.error), []).append(f"{row.shape} M={row.M}")
    return [
        f"error: {kernel}: {error} [{_abridged(list(dict.fromkeys(where)))}]"
        for (kernel, error), where in places.items()
    ]


def _abridged(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def summary(rows: Sequence[Row], **metadata: Any) -> dict[str, Any]:
    """All rows, and what they ran on by process; without what only the files hold."""
    environments = {row.run: row.environment for row in rows}
    fields = [f.name for f in dataclasses.fields(Row) if f.name not in LEFT_OUT]
    return {
        "rows": [{name: _short(getattr(row, name)) for name in fields} for row in rows],
        "metadata": {**metadata, "environments": environments},
    }


def _short(value: object) -> object:
    return float(f"{value:.5g}") if isinstance(value, float) else value


def import_pyplot() -> Any:
    """matplotlib, drawing to files; IntScaleError if it is not installed."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise IntScaleError(
            f"--plot needs matplotlib, which cannot be imported ({error}); "
            "pip install 'vllm-intscale[bench]'"
        ) from None
    return pyplot


def plot(rows: Sequence[Row], path: Path) -> None:
    """Microseconds over M, both logarithmic: a panel for each shape (columns) and mode (rows)."""
    pyplot = import_pyplot()
    shapes = list(dict.fromkeys(row.shape for row in rows))
    kernels = list(dict.fromkeys(row.kernel for row in rows))
    modes = list(dict.fromkeys(row.mode for row in rows))
    size = (5 * len(shapes), 4.5 * len(modes))
    figure, panels = pyplot.subplots(len(modes), len(shapes), figsize=size, squeeze=False)
    for panel_row, mode in zip(panels, modes, strict=True):
        for panel, shape in zip(panel_row, shapes, strict=True):
            chosen = [row for row in rows if (row.mode, row.shape) == (mode, shape)]
            _plot_panel(panel, chosen, kernels)
            panel.set_title(f"{shape} {chosen[0].N}x{chosen[0].K}, {mode}" if chosen else shape)
    legends = (panel.get_legend_handles_labels() for panel in panels.flat)
    lines = {label: handle for legend in legends for handle, label in zip(*legend, strict=True)}
    figure.tight_layout()
    figure.legend(
        lines.values(),
        lines.keys(),
        loc="upper center",
        bbox_to_anchor=(0.5, 0),  # below the panels
        ncols=min(5, 2 * len(shapes)),
        fontsize="small",
    )
    figure.savefig(path, dpi=90, bbox_inches="tight")
    pyplot.close(figure)


def _plot_panel(panel: Any, rows: Sequence[Row], kernels: Sequence[str]) -> None:
    timed = [(row.kernel, row.M, row.us) for row in rows if row.us is not None]
    if not timed:
        panel.set_axis_off()  # nothing to scale logarithmically
        return
    for i, kernel in enumerate(kernels):
        points = sorted((m, us) for name, m, us in timed if name == kernel)
        style = {"color": "black", "linewidth": 2.5} if kernel == OURS else {"color": f"C{i % 10}"}
        style["linestyle"] = "--" if i > 10 else "-"  # there are ten colours
        if points:
            panel.plot(*zip(*points, strict=True), label=kernel, marker=".", **style)
    if floors := sorted(_floors(rows).items()):
        panel.plot(*zip(*floors, strict=True), ":", color="gray", label="streaming int4 weights")
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.xaxis.set_major_formatter("{x:.0f}")
    panel.set_xlabel("M (tokens)")
    panel.set_ylabel("microseconds")
    panel.grid(alpha=0.3, which="both")
