"""Make intscale checkpoints: `quantize_model`, what `intscale quantize` runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from vllm_intscale.format import CheckpointConfig
from vllm_intscale.quantize.source import make_plan, resolve
from vllm_intscale.quantize.stream import Progress, Report, check_output, write_checkpoint

__all__ = ["Progress", "Report", "quantize_model"]


def quantize_model(
    source: str,
    out: str | Path,
    config: CheckpointConfig | None = None,
    revision: str | None = None,
    on_progress: Callable[[Progress], None] = lambda _: None,
    search: bool = False,
) -> Report:
    """Quantize a model by rounding to nearest and write it to the new folder `out`.

    source: folder or hub id of an unquantized model in safetensors. config: schemes, amplifier,
    ignore and overrides wanted (default: the format's); what is written names every exception.
    revision: of the hub model. on_progress: called after each tensor. search: choose group scales
    for the least squared error of the weights, instead of the largest weight.

    Raises IntScaleError, and leaves nothing behind, if anything is not as it must be.
    """
    check_output(Path(out))  # before a download that may take hours
    folder = resolve(source, revision)
    origin = {"model": source if folder != Path(source) else folder.resolve().name}
    if folder.parent.name == "snapshots":
        origin["revision"] = folder.name
    method = "round to nearest" + (", scales searched" if search else "")
    wanted = dataclasses.replace(config or CheckpointConfig(), source={**origin, "method": method})
    return write_checkpoint(make_plan(folder, wanted), Path(out), on_progress, search)
