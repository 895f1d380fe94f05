"""Make intscale checkpoints: `quantize_model` and `convert_model`, what the commands run."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from vllm_intscale import __version__
from vllm_intscale.checkpoint import CONFIG, read_config, read_headers
from vllm_intscale.errors import IntScaleError
from vllm_intscale.format import GROUP_SIZES, CheckpointConfig
from vllm_intscale.quantize.calibration import Calibration
from vllm_intscale.quantize.packed import read_packed, with_weights
from vllm_intscale.quantize.report import Progress, Report
from vllm_intscale.quantize.shards import OpenFiles
from vllm_intscale.quantize.source import QUANTIZATION_KEYS, Plan, decide, make_plan, resolve
from vllm_intscale.quantize.stream import check_output, write_checkpoint

__all__ = ["Calibration", "Progress", "Report", "convert_model", "quantize_model"]


def quantize_model(
    source: str,
    out: str | Path,
    config: CheckpointConfig | None = None,
    revision: str | None = None,
    on_progress: Callable[[Progress], None] = lambda _: None,
    search: bool = False,
    resume: bool = False,
    calibration: Calibration | None = None,
) -> Report:
    """Quantize a model and write it to the new folder `out`.

    source: folder or hub id of an unquantized model in safetensors. config: schemes, amplifier,
    ignore and overrides wanted (default: the format's); what is written names every exception.
    revision: of the hub model. on_progress: called after each tensor. search: choose group scales
    for the least squared error of the weights, instead of the largest weight. resume: go on where a
    run of the same request was killed, if there was one. calibration: a text, for whose activations
    the model is smoothed and codes or scales are chosen; without, weights are rounded to nearest.

    Raises IntScaleError if anything is not as it must be, and leaves nothing behind, or all tensors
    if they are written (`write_checkpoint`).
    """
    check_output(Path(out), resume=resume)  # before a download that may take hours
    folder = resolve(source, revision)
    method = "round to nearest" + (", scales searched" if search else "")
    if calibration:
        name = calibration.method.upper()
        method = f"{name}, {calibration.samples} samples of {calibration.name}"
    config = config or CheckpointConfig()
    origin = {**config.source, **_origin(source, folder), "method": method}
    wanted = dataclasses.replace(config, source=origin)
    plan = make_plan(folder, wanted)
    return write_checkpoint(
        plan, Path(out), on_progress, search or bool(calibration), resume, calibration
    )


def convert_model(
    source: str,
    out: str | Path,
    config: CheckpointConfig | None = None,
    revision: str | None = None,
    on_progress: Callable[[Progress], None] = lambda _: None,
    resume: bool = False,
) -> Report:
    """Convert a checkpoint that is quantized to int4 already and write it to the new folder `out`.

    source: folder or hub id of a GPTQ, AWQ, AutoRound or compressed-tensors checkpoint. config:
    amplifier and max_group_scale wanted. Groups keep their codes, and only their scales become
    integers; those with codes outside of int4 (asymmetric ones), or whose weights are not
    neighbours in k, are rounded again. `Report.conversions` has the loss of each layer. revision,
    on_progress, resume: as for `quantize_model`.

    Raises IntScaleError if anything is not as it must be, and leaves nothing behind, or all tensors
    if they are written (`write_checkpoint`).
    """
    config = config or CheckpointConfig()
    if config.amplifier == "heuristic":
        raise IntScaleError(
            "amplifier heuristic needs unquantized weights; convert with --amplifier channel or a "
            "number"
        )
    check_output(Path(out), resume=resume)
    folder = resolve(source, revision)
    model_config = read_config(folder)
    section = _pop_quantization(model_config)
    if section is None:
        raise IntScaleError(
            f"{folder / CONFIG} has no quantization_config; an unquantized model is quantized "
            f"with: intscale quantize {source} {out}"
        )
    plan = _conversion(source, folder, model_config, section, config)
    return write_checkpoint(plan, Path(out), on_progress, resume=resume)


def plan_live(source: str, revision: str | None = None) -> Plan:
    """What to make of a model that is served without having been quantized or converted before.

    The same as `convert_model` would make of int4 weights, and `quantize_model` of others, by
    default. Raises IntScaleError if that is not possible.
    """
    folder = resolve(source, revision)
    model_config = read_config(folder)
    section = _pop_quantization(model_config)
    if section is None:
        return make_plan(folder, CheckpointConfig(source=_origin(source, folder)))
    return _conversion(source, folder, model_config, section, CheckpointConfig())


def _pop_quantization(model_config: dict[str, Any]) -> dict[str, Any] | None:
    """The quantization_config, removed from the model's config; None if it has none."""
    section = None
    for part in (model_config.get("text_config") or {}, model_config):
        for key in QUANTIZATION_KEYS:
            section = part.pop(key, None) or section
    return section if isinstance(section, dict) else None


def _conversion(
    source: str,
    folder: Path,
    model_config: dict[str, Any],
    section: Mapping[str, Any],
    config: CheckpointConfig,
) -> Plan:
    stored = read_headers(folder)
    with OpenFiles() as files:
        packed = read_packed(folder, stored, section, files.slice)
    group_sizes = Counter(layer.group_size for layer in packed.values() if not layer.reordered)
    wanted = dataclasses.replace(
        config,
        group_size=next((g for g, _ in group_sizes.most_common(1) if g in GROUP_SIZES), 128),
        source={
            **config.source,
            **_origin(source, folder),
            "method": f"converted from {section['quant_method']}",
        },
    )
    return decide(folder, with_weights(stored, packed), model_config, wanted, packed)


def _origin(source: str, folder: Path) -> dict[str, str]:
    origin = {"model": source if folder != Path(source) else folder.resolve().name}
    origin["version"] = f"vllm_intscale {__version__}, torch {torch.__version__}"
    if folder.parent.name == "snapshots":
        origin["revision"] = folder.name
    return origin
