"""Serving what is no intscale checkpoint: it becomes one while vLLM loads it, in memory.

int4 weights of other tools are converted, unquantized ones rounded to nearest: what the model gets
equals the tensors that `intscale convert` or `intscale quantize` writes, and everything behind that
point is the same, sharding over ranks included.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor
from vllm.config import get_current_vllm_config_or_none
from vllm.logger import init_logger
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from vllm_intscale.checkpoint import read_config
from vllm_intscale.errors import IntScaleError
from vllm_intscale.format import QUANT_METHOD
from vllm_intscale.quantize import plan_live
from vllm_intscale.quantize.source import Plan
from vllm_intscale.quantize.stream import read_quantized

logger = init_logger("vllm.intscale")

LOAD_FORMATS = ("auto", "hf", "safetensors")
_sources: dict[str, Path] = {}  # of the models of this process that are converted, by their name


def convert_while_loading(model: str, folder: Path) -> None:
    """From now on this process gives vLLM's loader the converted tensors of this model.

    vLLM has no hook between the files and a model's `load_weights`; so the method of its default
    loader that reads a model's files is replaced, and works as before for all other models.

    Raises IntScaleError for a --load-format that reads files in another way.
    """
    config = get_current_vllm_config_or_none()
    found = config.load_config.load_format if config else "auto"
    load_format = str(getattr(found, "value", found))  # a string, or an enum of them
    if load_format not in LOAD_FORMATS:
        raise IntScaleError(
            f"--load-format {load_format} cannot convert {model} while it is loaded; use "
            f"{', '.join(LOAD_FORMATS)}, or convert it before: intscale convert {model} OUT"
        )
    if not _sources:
        read_files = DefaultModelLoader.get_all_weights

        def get_all_weights(
            self: Any, model_config: Any, model: Any
        ) -> Iterable[tuple[str, Tensor]]:
            plan = _plan_of(model_config)  # now: an error later would find old weights gone
            if plan is None:
                files: Iterable[tuple[str, Tensor]] = read_files(self, model_config, model)
                return files
            return _converted(self, plan, model)

        DefaultModelLoader.get_all_weights = get_all_weights
    _sources[model] = folder


def _plan_of(model_config: Any) -> Plan | None:
    """How these files become an intscale checkpoint; None if they are to stay, or are one.

    They may be others than when the engine started: weights can be reloaded from another folder.
    """
    name = model_config.model
    if model_config.quantization != QUANT_METHOD:
        return None
    source = _sources.get(name)
    if source is None:
        if not Path(name).is_dir():
            return None
        section = read_config(Path(name)).get("quantization_config") or {}
        if section.get("quant_method") == QUANT_METHOD:
            return None
    plan = plan_live(name, model_config.revision)
    if source not in (None, plan.folder):  # vLLM 0.26 does not tell the plugin the revision
        raise IntScaleError(
            f"--revision {model_config.revision} of {name} cannot be converted while it is loaded "
            f"by this vLLM; serve the folder {plan.folder}"
        )
    return plan


def _converted(loader: Any, plan: Plan, model: Any) -> Iterator[tuple[str, Tensor]]:
    quantized = sum(m.scheme is not None for m in plan.matrices)
    method = plan.config.source.get("method", "rounded to nearest")
    logger.info("intscale: %d matrices of %s are %s", quantized, plan.folder, method)
    loader.counter_before_loading_weights = time.perf_counter()  # vLLM logs how long it took
    yield from read_quantized(plan)
    for other in getattr(model, "secondary_weights", ()):
        yield from loader._get_weights_iterator(other)
