"""Run a calibration text through the model, layer by layer, and quantize each for what it gets.

The model runs in transformers. A decoder layer is smoothed (`sites`), then done in stages, in the
order in which its weights are used: what is served as one (q, k and v; gate and up of all experts)
is quantized together, on inputs that the quantized weights before it have made.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial, reduce
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from vllm_intscale.checkpoint import DTYPES
from vllm_intscale.errors import IntScaleError
from vllm_intscale.format import Amplifier, LayerScheme
from vllm_intscale.packing import unpack_codes
from vllm_intscale.quantize import gptq, rtn
from vllm_intscale.quantize.calibration import CHARACTERS, MAX_LENGTH, Calibration
from vllm_intscale.quantize.gptq import Factor, factorize, finite
from vllm_intscale.quantize.loss import Loss, measure
from vllm_intscale.quantize.rtn import QuantizedRows, heuristic_amplifier, smallest_scale
from vllm_intscale.quantize.shards import OpenFiles
from vllm_intscale.quantize.sites import SiteFinder, Smoother
from vllm_intscale.quantize.smooth import Scales
from vllm_intscale.quantize.source import Matrix, Plan
from vllm_intscale.quantize.watch import Watch, first_rows, numbers_of, stages
from vllm_intscale.text import tokenize, tokenize_each

logger = logging.getLogger("vllm.intscale")

MIN_TOKENS = 128  # that a weight has to see; experts that see fewer are rounded to nearest
ROWS = 4096  # of a matrix that are quantized at once
WHOLE = 1 << 22  # characters of a text all of which are tokenized, even for few samples


def calibrate(
    plan: Plan,
    files: OpenFiles,
    calibration: Calibration,
    amplifier: Amplifier,
    write: Callable[[Matrix, int, QuantizedRows, Loss], None],
    written: Callable[[Matrix], list[Tensor] | None] = lambda _: None,
) -> dict[str, Scales]:
    """Smooth the model and quantize every matrix of `plan` that the text reaches.

    write: takes some rows of a matrix, the number of the first, and their loss. written: the three
    tensors of a matrix that a run which was killed has quantized; it is not done again. Returns
    what all other tensors of the checkpoint are to be multiplied with, by name, where smoothing has
    changed them.

    Raises IntScaleError if the text is too short, if transformers cannot run the model, or if no
    weight of a layer is recognized in it.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = _load_model(plan)
    samples = _read_samples(plan.folder, model, calibration)
    list_name, layers = _decoder_layers(plan.folder, model)
    watch = Watch(first_rows(plan, files), files, with_hessians=calibration.method == "gptq")
    smoother = Smoother(plan, files, model)
    matrices = {m.name: m for m in plan.matrices}
    unrecognized: list[str] = []
    scales: dict[str, Scales] = {}

    def run(layer: torch.nn.Module, kwargs: dict[str, Any], inputs: list[Tensor]) -> list[Tensor]:
        outputs = []
        for x in inputs:
            with _one_line_error(plan.folder, "run"), watch:
                out = layer(x.to(device), **kwargs)
            outputs.append((out[0] if isinstance(out, tuple) else out).cpu())
        return outputs

    with torch.no_grad():
        with _one_line_error(plan.folder, "run"):
            hidden, arguments = _inputs_of_layers(model, layers, samples)
        for i, (layer, kwargs) in enumerate(zip(layers, arguments, strict=True)):
            layer.to(device, torch.float32)
            kwargs = _moved(kwargs, device)
            name = f"{list_name}.{i}"
            watch.next_layer(name, layer)
            with SiteFinder(layer) as finder:
                watch.listener = finder.linear
                before = run(layer, kwargs, hidden)[0]  # finds the order of the weights, too
                watch.listener = None
            unrecognized += _unrecognized(plan, name, layer, watch.weights)
            check = partial(_computes, partial(run, layer, kwargs, hidden[:1]), before)
            scales |= smoother.smooth(finder, layer, watch.weights, check)
            for stage in stages(watch.order):
                rest = set(stage)
                for weight in stage:
                    if tensors := written(m := matrices[weight]):
                        watch.weights[weight].copy_(_dequantized(tensors, m.scheme))
                        rest.remove(weight)
                if rest:
                    watch.next_stage(rest)
                    run(layer, kwargs, hidden)
                    _quantize_stage(plan, watch, rest, amplifier, write)
            watch.next_stage(set())
            hidden = run(layer, kwargs, hidden)
            layer.to("meta")  # frees it
    if unrecognized:
        logger.warning(
            "intscale: transformers' model does not hold %d layers as they are stored; they are "
            "rounded to nearest: %s",
            len(unrecognized),
            ", ".join(unrecognized[:2]) + (", ..." if unrecognized[2:] else ""),
        )
    return scales


def _decoder_layers(folder: Path, model: torch.nn.Module) -> tuple[str, torch.nn.ModuleList]:
    """The longest list of the model by parameters, and its name."""
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and len(module)
    ]
    if not lists:
        raise IntScaleError(f"{folder}: the model has no list of layers to calibrate")
    return max(lists, key=lambda named: sum(p.numel() for p in named[1].parameters()))


def _unrecognized(
    plan: Plan, name: str, layer: torch.nn.Module, weights: Mapping[str, Tensor]
) -> list[str]:
    """Layers to quantize that are in a decoder layer, but not among its weights.

    name: of the decoder layer in the model. weights: what was recognized of it, by names in the
    checkpoint. Raises IntScaleError if nothing was.
    """
    if not weights and any(parameter.dim() > 1 for parameter in layer.parameters()):
        raise IntScaleError(
            f"{plan.folder}: {name}, as transformers loads it, has no weight that is in the "
            "checkpoint, so that none can be calibrated; quantize with --method rtn"
        )
    numbers = numbers_of(name)

    def prefix_of(weight: str) -> str:
        return weight.partition(f".{numbers[-1]}.")[0]

    prefixes = {prefix_of(weight) for weight in weights}  # others are of a vision tower, say
    return [
        m.layer
        for m in plan.matrices
        if m.scheme
        and m.name not in weights
        and numbers_of(m.name)[: len(numbers)] == numbers
        and prefix_of(m.name) in prefixes
    ]


def _computes(run: Callable[[], list[Tensor]], wanted: Tensor) -> bool:
    """Whether a run gives the same bits; on a GPU, where experts' sums have no order, nearly."""
    (found,) = run()
    if not torch.cuda.is_available():
        return torch.equal(found, wanted)
    return bool((found - wanted).abs().max() <= 1e-5 * wanted.abs().max())


def _quantize_stage(
    plan: Plan,
    watch: Watch,
    stage: set[str],
    amplifier: Amplifier,
    write: Callable[[Matrix, int, QuantizedRows, Loss], None],
) -> None:
    """Quantize these matrices for the inputs that they got, in the model too."""
    known: dict[int, Factor | Tensor] = {}  # of inputs: for GPTQ, or their energy
    for m in plan.matrices:
        if m.name not in stage or m.scheme is None:
            continue
        seen = watch.inputs[m.name]
        if seen.energy is None or seen.tokens < MIN_TOKENS:
            continue
        if id(seen) not in known:
            hessian = seen.hessian
            known[id(seen)] = finite(seen.energy) if hessian is None else factorize(hessian)
        weight = watch.weights[m.name]
        where = f"{m.stored.file}: {m.name}"
        number = amplifier
        if number == "heuristic":
            number = heuristic_amplifier(smallest_scale(where, weight, m.scheme))
        for row in range(0, m.shape[0], ROWS):
            part = weight[row : row + ROWS]
            rows = _quantize_rows(where, part, m.scheme, number, known[id(seen)])
            loss = measure(part, rows, m.scheme.bits, seen)
            part.copy_(_dequantized(rows[:3], m.scheme))
            write(m, row, rows, loss)


def _quantize_rows(
    where: str,
    weight: Tensor,
    scheme: LayerScheme,
    amplifier: Literal["channel"] | int,
    inputs: Factor | Tensor,
) -> QuantizedRows:
    if isinstance(inputs, Factor):
        return gptq.quantize_rows(where, weight, scheme, amplifier, inputs)
    return rtn.quantize_rows(where, weight, scheme, amplifier, search=True, energy=inputs)


def _dequantized(tensors: Sequence[Tensor], scheme: LayerScheme | None) -> Tensor:
    """float32 `[n, K]` of the three tensors of rows of a layer."""
    assert scheme
    qweight, group_scale, channel_scale = tensors
    step = group_scale.float() * channel_scale[:, None]
    return unpack_codes(qweight, scheme.bits) * step.repeat_interleave(scheme.group_size, dim=1)


# ---- the model and the text ---------------------------------------------------------------------


def _load_model(plan: Plan) -> Any:
    """In the dtype of the weights to quantize, which need not be the config's."""
    try:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging
    except ImportError as error:
        raise IntScaleError(
            f"transformers cannot be imported ({error}); it runs the model for calibration: "
            "pip install transformers"
        ) from None
    logging.disable_progress_bar()
    dtypes = {DTYPES[m.stored.dtype] for m in plan.matrices if m.scheme}
    with _one_line_error(plan.folder, "load"):
        model = AutoModelForCausalLM.from_pretrained(
            plan.folder,
            dtype=reduce(torch.promote_types, dtypes),
            attn_implementation="sdpa",
            experts_implementation="eager",
        )
    return model.eval().requires_grad_(False)


@contextmanager
def _one_line_error(folder: Path, what: str) -> Iterator[None]:
    """What goes wrong in a model's code, as IntScaleError."""
    try:
        yield
    except Exception as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise IntScaleError(
            f"{folder}: transformers cannot {what} the model layer by layer ({reason}); quantize "
            "with --method rtn"
        ) from error


def _read_samples(folder: Path, model: Any, calibration: Calibration) -> list[Tensor]:
    """Token ids `[1, length]` each, spread evenly over the text, of which a part may be enough."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", MAX_LENGTH)
    length = calibration.length or min(MAX_LENGTH, limit)
    content = calibration.content()
    characters = CHARACTERS * length  # of a slice: enough for a window
    if len(content) <= max(WHOLE, 2 * calibration.samples * characters):
        parts = [tokenize(str(folder), content)]
    else:
        step = (len(content) - characters) / max(1, calibration.samples - 1)
        starts = [int(i * step) for i in range(calibration.samples)]
        slices = (content[start : start + characters] for start in starts)
        parts = [ids[:length] for ids in tokenize_each(str(folder), slices)]
    windows = [
        torch.tensor([ids[start : start + length]])
        for ids in parts
        for start in range(0, len(ids) - length + 1, length)
    ]
    whole = len(windows)
    if not whole:
        raise IntScaleError(
            f"{calibration.name} has {sum(map(len, parts))} tokens, fewer than a sample of "
            f"{length}; name a longer --calibration or set --calibration-length"
        )
    count = min(calibration.samples, whole)
    return [windows[i * whole // count] for i in range(count)]


class _Reached(Exception):
    """The first layer has been reached."""


def _inputs_of_layers(
    model: Any, layers: torch.nn.ModuleList, samples: list[Tensor]
) -> tuple[list[Tensor], list[dict[str, Any]]]:
    """What the first layer gets for each sample, and what else each layer gets for any."""
    arguments: list[dict[str, Any]] = []
    hidden: list[Tensor] = []

    def keep_arguments(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        arguments.append({k: v for k, v in kwargs.items() if k != "hidden_states"})

    def keep_hidden(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden.append((args[0] if args else kwargs["hidden_states"]).float())
        raise _Reached

    hooks = [layer.register_forward_pre_hook(keep_arguments, with_kwargs=True) for layer in layers]
    model(samples[0], use_cache=False)
    for hook in hooks:
        hook.remove()
    hook = layers[0].register_forward_pre_hook(keep_hidden, with_kwargs=True)
    for sample in samples:
        with contextlib.suppress(_Reached):
            model(sample, use_cache=False)
    hook.remove()
    return hidden, arguments


def _moved(value: Any, device: torch.device) -> Any:
    """On the device, floats as float32."""
    if isinstance(value, Tensor):
        return value.to(device, torch.float32 if value.is_floating_point() else value.dtype)
    if isinstance(value, list | tuple):
        return type(value)(_moved(v, device) for v in value)
    if isinstance(value, dict):
        return {k: _moved(v, device) for k, v in value.items()}
    return value
