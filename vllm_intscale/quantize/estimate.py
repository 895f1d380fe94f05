"""What quantizing a model will take of memory and time, for `--dry-run`: by trial."""

from __future__ import annotations

import math
import resource
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vllm_intscale.format import CheckpointConfig
from vllm_intscale.inspection import model_headers
from vllm_intscale.quantize.calibration import MAX_LENGTH, Calibration
from vllm_intscale.quantize.rtn import quantize_rows
from vllm_intscale.quantize.source import Matrix, decide
from vllm_intscale.quantize.stream import BLOCK_ELEMENTS, make_workers
from vllm_intscale.quantize.watch import stage_of

EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")  # in a model's config
TRIAL_S = 0.5
TRIAL_K = 4096
TRIAL_SIZE = 1024  # of square matrices, which are multiplied


class Estimate(NamedTuple):
    seconds: float
    memory_bytes: int  # of the process, at its peak; without a GPU's


def estimate_quantization(
    source: str,
    revision: str | None,
    config: CheckpointConfig,
    search: bool,
    calibration: Calibration | None,
) -> Estimate:
    """Of `quantize_model` with these arguments on this machine; of a hub id headers are fetched.

    The least time: rounding is tried on random weights, and a calibration counted in
    multiplications, of which this machine's speed is measured. A small model takes several times
    as long. The disk is taken to be faster than either.

    Raises IntScaleError if the source cannot be quantized.
    """
    stored, model_config = model_headers(source, revision)
    matrices = decide(Path(source), stored, model_config, config).matrices
    chosen = [m for m in matrices if m.scheme]
    weights = sum(math.prod(m.shape) for m in chosen)
    seconds, held = weights / _weights_per_s(config, search or bool(calibration)), 0
    if calibration:
        operations, held = _calibrated(chosen, model_config, calibration)
        held += sum(tensor.nbytes for tensor in stored.values())
        seconds += operations / _multiplications_per_s()
    return Estimate(seconds, _peak_bytes() + held)


def _peak_bytes() -> int:
    """Of this process until now, the trial included."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _calibrated(
    matrices: Sequence[Matrix], model_config: Mapping[str, Any], calibration: Calibration
) -> tuple[float, int]:
    """Floating-point operations of `calibrate`, and the bytes that it holds beside the model."""
    text = model_config.get("text_config") or model_config
    limit = min(MAX_LENGTH, text.get("max_position_embeddings") or MAX_LENGTH)
    tokens = calibration.samples * (calibration.length or limit)
    experts = max(text.get(key) or 1 for key in EXPERTS)
    share = (text.get("num_experts_per_tok") or 1) / experts  # of tokens that an expert sees
    layers: dict[str, dict[tuple[str, str, int | None], list[Matrix]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for m in matrices:  # those of one stage and one module or expert have one input
        module = m.layer.rpartition(".")[0]
        layers[_layer_of(m.name)][stage_of(m.name), module, m.expert].append(m)
    operations, held = 0.0, 0
    for inputs in layers.values():
        stages = len({stage for stage, *_ in inputs})
        for same_input in inputs.values():
            k = same_input[0].shape[1]
            seen = tokens * (share if "experts" in same_input[0].name else 1.0)
            n = sum(m.shape[0] for m in same_input)
            operations += (stages + 2) * 2 * n * k * seen  # runs of the layer
            if calibration.method == "gptq":
                operations += 2 * seen * k**2 + 2 * k**3 + 2 * n * k**2
        squares = sum(i[0].shape[1] ** 2 for i in inputs.values())
        numbers = sum(math.prod(m.shape) for i in inputs.values() for m in i)
        held = max(held, 4 * numbers + (8 * squares if calibration.method == "gptq" else 0))
    hidden = 2 * 4 * tokens * int(text.get("hidden_size") or 0)  # before and after a layer
    return operations, held + hidden


def _layer_of(name: str) -> str:
    """As model.layers.3."""
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdecimal()), len(parts) - 1)
    return ".".join(parts[: number + 1])


def _weights_per_s(config: CheckpointConfig, search: bool) -> float:
    scheme = config.default_scheme
    amplifier = 1 << 10 if config.amplifier == "heuristic" else config.amplifier
    weight = torch.randn(BLOCK_ELEMENTS // TRIAL_K, TRIAL_K).to(torch.bfloat16)
    with make_workers() as workers:

        def round_once() -> float:
            for _ in workers.map(
                lambda _: quantize_rows("trial", weight, scheme, amplifier, search), range(8)
            ):
                pass
            return 8.0 * BLOCK_ELEMENTS

        return _per_s(round_once)


def _multiplications_per_s() -> float:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a = torch.randn(TRIAL_SIZE, TRIAL_SIZE, device=device)

    def multiply() -> float:
        (a @ a).sum().item()
        return 2.0 * TRIAL_SIZE**3

    return _per_s(multiply)


def _per_s(work: Callable[[], float]) -> float:
    """What `work` says it has done, a second."""
    work()  # the first is slower
    start, done = time.perf_counter(), 0.0
    while (seconds := time.perf_counter() - start) < TRIAL_S:
        done += work()
    return done / seconds
