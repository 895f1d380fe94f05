"""Where a layer can be smoothed: norms, and projections up, with the weights behind them.

    norm -> x -> W               norm's weight / s, columns of W * s
    silu(gate) * up -> x -> down       up's rows / s, columns of down * s

They are found by watching the layer at work, not by the names of an architecture. Scales are powers
of two: the model computes the same bits afterwards, which is checked. Where it does not, because
something else uses x, nothing is changed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from vllm_intscale.checkpoint import DTYPES
from vllm_intscale.quantize.shards import OpenFiles
from vllm_intscale.quantize.smooth import Activations, Scales, choose_scale
from vllm_intscale.quantize.source import Plan
from vllm_intscale.quantize.watch import stage_of

_UP_OF = {"down_proj": "up_proj", "w2": "w3"}


class Site(NamedTuple):
    """Weights that multiply the same activations, and the parameters whose rows make these.

    All are the model's, by their names in the checkpoint.
    """

    sources: dict[str, Tensor]
    weights: dict[str, Tensor]
    activations: Activations

    def scale(self, s: Tensor) -> None:
        """Multiply columns of the weights by s, float32 `[K]`, and divide rows of the sources."""
        for source in self.sources.values():
            source.div_(s.view(-1, *[1] * (source.dim() - 1)))
        for weight in self.weights.values():
            weight.mul_(s)


@dataclass
class _Norm:
    module: torch.nn.Module
    activations: Activations = field(default_factory=Activations)
    rows: set[bytes] = field(default_factory=set)  # of its first output
    used_by: dict[str, None] = field(default_factory=dict)
    used_by_others: bool = False


class SiteFinder:
    """Watches a layer's norms while it runs, and what multiplies their outputs.

    Experts get gathered rows of a norm's output, so it is recognized by its rows.
    """

    def __init__(self, layer: torch.nn.Module) -> None:
        self._norms = {
            name: _Norm(module)
            for name, module in layer.named_modules()
            if "norm" in type(module).__name__.lower() and hasattr(module, "weight")
        }
        self._inner: dict[str, Activations] = {}  # of projections down

    def __enter__(self) -> SiteFinder:
        norms = self._norms.values()
        self._hooks = [norm.module.register_forward_hook(self._see(norm)) for norm in norms]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    @staticmethod
    def _see(norm: _Norm) -> Callable[[torch.nn.Module, object, Tensor], None]:
        def see(_: torch.nn.Module, __: object, output: Tensor) -> None:
            x = output.detach().reshape(-1, output.shape[-1]).float()
            norm.activations.add(x)
            norm.rows = norm.rows or {_bytes(row) for row in x}

        return see

    def linear(self, x: Tensor, names: list[str]) -> None:
        """x `[..., K]` is multiplied with these weights; with one that nobody knows, without."""
        x = x.reshape(-1, x.shape[-1]).float()
        if not len(x):
            return
        first = _bytes(x[0])
        for norm in self._norms.values():
            if first in norm.rows:
                norm.used_by.update(dict.fromkeys(names))
                norm.used_by_others |= not names
        for name in names:
            if _split(name)[1] in _UP_OF:
                self._inner.setdefault(name, Activations()).add(x)

    def sites(
        self,
        weights: Mapping[str, Tensor],
        stages: Mapping[str, str],
        name_of: Callable[[str, Tensor], str | None],
    ) -> Iterator[Site]:
        """What can be smoothed.

        weights: the layer's, by their names in the checkpoint. stages: `stage_of` all weights of
        the model; if one of a stage multiplies x, all do. name_of: the name in the checkpoint of a
        parameter of a norm.
        """
        for norm_name, norm in self._norms.items():
            used_as = {stages[name] for name in norm.used_by}
            names = [name for name, stage in stages.items() if stage in used_as]
            sources = {
                name_of(f"{norm_name}.{parameter}", value): value.data
                for parameter, value in norm.module.named_parameters(recurse=False)
            }
            known = not norm.used_by_others and all(name in weights for name in names)
            if names and known and None not in sources:
                found = {name: value for name, value in sources.items() if name}
                yield Site(found, {name: weights[name] for name in names}, norm.activations)
        for name, activations in self._inner.items():
            parent, last = _split(name)
            up = f"{parent}.{_UP_OF[last]}.weight"
            if up in weights:
                yield Site({up: weights[up]}, {name: weights[name]}, activations)


def _split(name: str) -> tuple[str, str]:
    parent, _, last = name.removesuffix(".weight").rpartition(".")
    return parent, last


def _bytes(row: Tensor) -> bytes:
    return row.cpu().numpy().tobytes()


class Smoother:
    """Smooths the layers of a model, `model`, of which `plan` and `files` are the checkpoint."""

    def __init__(self, plan: Plan, files: OpenFiles, model: torch.nn.Module) -> None:
        self._files = files
        self._matrices = {m.name: m for m in plan.matrices}
        self._stages = {m.name: stage_of(m.name) for m in plan.matrices if len(m.shape) == 2}
        self._names = {id(module): name for name, module in model.named_modules()}

    def smooth(
        self,
        finder: SiteFinder,
        layer: torch.nn.Module,
        weights: Mapping[str, Tensor],
        unchanged: Callable[[], bool],
    ) -> dict[str, Scales]:
        """Scale a layer of the model where its quantized outputs gain by it.

        weights: the layer's, by their names in the checkpoint. unchanged: whether the layer still
        computes the same. Returns what the checkpoint's tensors are to be multiplied with, by name.
        """

        def name_of(parameter: str, value: Tensor) -> str | None:
            return self._stored_as(f"{self._names[id(layer)]}.{parameter}", value)

        chosen: list[tuple[Site, Tensor]] = []
        for site in finder.sites(weights, self._stages, name_of):
            schemes = [self._matrices[name].scheme for name in site.weights]
            s = choose_scale(site.activations, list(site.weights.values()), schemes)
            if s is not None and self._scale(site, s):
                chosen.append((site, s))
        if chosen and not unchanged():  # one by one, then
            for site, s in chosen:
                site.scale(1 / s)
            chosen = [(site, s) for site, s in chosen if self._scale(site, s, unchanged)]
        scales: dict[str, Scales] = {}
        for site, s in chosen:
            for name in site.sources:
                scales[name] = scales.get(name, Scales()).times(Scales(rows=1 / s.cpu()))
            for name in site.weights:
                scales[name] = scales.get(name, Scales()).times(Scales(columns=s.cpu()))
        return scales

    def _scale(self, site: Site, s: Tensor, unchanged: Callable[[], bool] = lambda: True) -> bool:
        """Scale a site, if all that stays unquantized fits its dtype and nothing changes."""
        site.scale(s)
        if self._exact(site.sources) and self._exact(site.weights) and unchanged():
            return True
        site.scale(1 / s)
        return False

    def _stored_as(self, name: str, value: Tensor) -> str | None:
        """The checkpoint's name of a parameter: the same, or the same from the layer's number."""
        if name not in self._matrices:
            end = "." + re.sub(r"^.*?(?=\b\d+\.)", "", name)
            found = [n for n in self._matrices if n.endswith(end)]
            if len(found) != 1:
                return None
            name = found[0]
        stored = self._files.slice(self._matrices[name].stored)[:]
        return name if torch.equal(stored.to(value), value) else None

    def _exact(self, tensors: Mapping[str, Tensor]) -> bool:
        """Whether those that stay unquantized fit the checkpoint's dtype."""
        for name, value in tensors.items():
            m = self._matrices[name]
            if m.scheme is None:
                dtype = DTYPES[m.stored.dtype]
                if not torch.equal(value.to(dtype).to(value), value):
                    return False
        return True
