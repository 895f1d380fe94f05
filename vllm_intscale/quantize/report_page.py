"""`report.json` and `report.html` of a checkpoint: what quantizing has cost in each layer.

The page is one file without anything from elsewhere, for people; `report.json` has all layers.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_intscale.display import size
from vllm_intscale.format import ACCUMULATOR_MAX, CheckpointConfig
from vllm_intscale.quantize.report import Outcome, Report
from vllm_intscale.quantize.watch import stage_of

JSON, PAGE = "report.json", "report.html"
ROWS = 500  # of the page's table, worst first
WORST = 5  # layers that the page proposes to treat otherwise
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#6b6b6b")


def write_report(folder: Path, report: Report, config: CheckpointConfig) -> None:
    """Write both files."""
    content = describe(report, config)
    (folder / JSON).write_text(json.dumps(content, indent=1) + "\n")
    (folder / PAGE).write_text(render(content))


def describe(report: Report, config: CheckpointConfig) -> dict[str, Any]:
    """What `report.json` holds. Errors are relative, root mean square."""
    layers = {
        name: {"scheme": report.schemes[name], **_describe_layer(outcome)}
        for name, outcome in report.outcomes.items()
    }
    return {
        "source": dict(config.source or {}),
        "amplifier": config.amplifier,
        "max_group_scale": config.max_group_scale,
        "source_bytes": report.source_bytes,
        "written_bytes": report.written_bytes,
        "bits_per_weight": 8 * report.quantized_bytes / report.weights if report.weights else None,
        "layers": layers,
        "left": dict(report.left),
    }


def _describe_layer(outcome: Outcome) -> dict[str, Any]:
    """error: of the layer's outputs for the calibration text (measured_on "outputs") or of its
    weights; its square is the sum of the parts' shares.
    """
    described: dict[str, Any] = {
        "amplifier": list(outcome.amplifiers),
        "accumulator_used": outcome.bound / ACCUMULATOR_MAX,
        "lost_groups": outcome.lost_groups,
    }
    if conversion := outcome.conversion:
        described |= {
            "measured_on": "int4 weights",
            "error": conversion.error,
            "groups": conversion.groups,
            "kept_groups": conversion.kept_groups,
        }
    elif loss := outcome.loss:
        squares = loss.squares or 1.0
        parts = {"int4": loss.int4 / squares, "integer_scale": (loss.weights - loss.int4) / squares}
        if loss.activations is not None:
            parts["int8_activations"] = loss.activations / squares
        on = "weights" if loss.activations is None else "outputs"
        described |= {"measured_on": on, "error": loss.relative, "squared_error": parts}
    return described


# ---- the page -----------------------------------------------------------------------------------


def render(content: Mapping[str, Any]) -> str:
    """The page, HTML."""
    from jinja2 import Environment, PackageLoader, select_autoescape

    environment = Environment(
        loader=PackageLoader("vllm_intscale.quantize", "."),
        autoescape=select_autoescape(default=True),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = lambda x: f"{100 * x:.3g} %"
    environment.filters["short"] = lambda x: f"{float(f'{x:.3g}'):,g}"
    environment.filters["size"] = size
    layers = content["layers"]
    ranked = sorted(layers, key=lambda name: _rank(layers[name]))
    page: str = environment.get_template("report.html.jinja").render(
        content=content,
        layers=layers,
        ranked=ranked[:ROWS],
        worst=list(dict.fromkeys(_served_together(name, layers) for name in ranked))[:WORST],
        chart=_chart(layers),
        measured={layer.get("measured_on") for layer in layers.values()} - {None},
    )
    return page


def _rank(layer: Mapping[str, Any]) -> tuple[bool, float]:
    """Worst first; errors of outputs before those of weights, which do not compare."""
    return layer.get("measured_on") != "outputs", -layer.get("error", 0.0)


def _served_together(name: str, layers: Mapping[str, Any]) -> str:
    """The layer, or a pattern of all that vLLM serves as one with it: they need one scheme."""
    experts, found, _ = name.partition(".experts.")
    if found:
        return f"re:{re.escape(experts)}\\.experts\\..*"
    parent, _, own = name.rpartition(".")
    others = [n.rpartition(".")[2] for n in layers if stage_of(n) == stage_of(name)]
    return name if others == [own] else f"re:{re.escape(parent)}\\.({'|'.join(others)})"


def _chart(layers: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Points of a plot, in its units: decoder layers to the right, error upwards, by projection."""
    width, height = 900, 260
    known = [(name, layer["error"]) for name, layer in layers.items() if layer.get("error")]
    places = [_place(name) for name, _ in known]
    last = max((place for place, _ in places), default=0)
    top = _nice_ceiling(max((error for _, error in known), default=1.0))
    kinds = sorted({kind for _, kind in places})
    both = len({layers[name]["measured_on"] for name, _ in known}) > 1

    def x_of(place: float) -> float:
        return 50 + (width - 70) * (place + 0.5) / (last + 1)

    points = [
        {
            "x": x_of(place + (kinds.index(kind) / (len(kinds) - 1 or 1) - 0.5) * 0.6),
            "y": height - 30 - (height - 50) * error / top,
            "color": COLORS[min(kinds.index(kind), len(COLORS) - 1)],
            "title": f"{name}: {100 * error:.3g} %",
            "hollow": both and layers[name]["measured_on"] == "weights",
        }
        for (place, kind), (name, error) in zip(places, known, strict=True)
    ]
    ticks = [
        {"y": height - 30 - (height - 50) * i / 4, "label": f"{100 * top * i / 4:.3g} %"}
        for i in range(5)
    ]
    step = max(1, math.ceil((last + 1) / 16))
    numbers = [{"x": x_of(i), "label": i} for i in range(0, last + 1, step)]
    legend = [
        {"color": COLORS[min(i, len(COLORS) - 1)], "label": kind} for i, kind in enumerate(kinds)
    ]
    return {
        "width": width,
        "height": height,
        "points": points,
        "ticks": ticks,
        "numbers": numbers,
        "legend": legend,
    }


def _place(name: str) -> tuple[int, str]:
    """Number of the decoder layer and kind of projection."""
    number = re.search(r"\.(\d+)\.", name)
    return int(number[1]) if number else 0, name.rpartition(".")[2]


def _nice_ceiling(x: float) -> float:
    """The next number above that is 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(x)) if x > 0 else 1.0
    return next(power * step for step in (1, 2, 5, 10) if power * step >= x)
