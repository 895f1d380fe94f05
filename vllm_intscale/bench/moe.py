"""`intscale bench moe`: one layer of W4A8 experts, ours and every peer's, on one GPU.

The layer is what vLLM calls after the router: bf16 in, quantization, both GEMMs, the activation
between them and the weighted sum of a token's experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from vllm_intscale.bench import timing
from vllm_intscale.bench.arguments import parse_names
from vllm_intscale.bench.moe_peers import PEERS, ExpertLayer
from vllm_intscale.bench.problem import FAST_BYTES_PER_S, FAST_OPS_PER_S, WEIGHT_STD, Timed
from vllm_intscale.bench.results import weight_floor_us
from vllm_intscale.errors import IntScaleError


class Size(NamedTuple):
    """Of a layer: inner channels I and hidden size H, experts, and how many of them a token has."""

    inner: int
    hidden: int
    experts: int
    topk: int


SIZES = {
    "mixtral": Size(14336, 4096, 8, 2),  # Mixtral-8x7B
    "qwen3": Size(768, 2048, 128, 8),  # Qwen3-30B-A3B
    "deepseek": Size(1408, 2048, 64, 6),  # DeepSeek-V2-Lite, routed experts
}
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
SKEW = 1.0  # mode skewed: expert i is chosen with a probability that goes with 1 / (i + 1)**SKEW


def parse_sizes(names: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Names of presets to sizes; none means every preset."""
    chosen = parse_names(names) or list(SIZES)
    if unknown := [name for name in chosen if name not in SIZES]:
        raise IntScaleError(f"--shape {', '.join(unknown)}: unknown; use {', '.join(SIZES)}")
    return {name: tuple(SIZES[name]) for name in chosen}


class Routed(NamedTuple):
    """What the router gives: weights float32 and ids int32 `[M, topk]`."""

    weights: Tensor
    ids: Tensor


class PreparedExperts(NamedTuple):
    layer: ExpertLayer
    x: Tensor
    routings: Callable[[int, str], list[Routed]]
    modes: tuple[str, ...]

    @property
    def weight_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.layer.weight)

    def calls(self, m: int) -> dict[str, Timed]:
        calls = {}
        for mode in self.modes:
            routings = self.routings(m, mode)
            calls[mode] = Timed(partial(self._call, self.x[:m], routings), len(routings))
        return calls

    def _call(self, x: Tensor, routings: list[Routed], copy: int) -> Tensor:
        return self.layer.forward(x, *routings[copy])


class Experts:
    """Gaussian weights `[E, 2 I, H]` (gate first) and `[E, H, I]`, activations `[max M, H]`, bf16.

    Mode random: each token chooses its experts evenly. Instead of weights, which are large, calls
    rotate through routings.
    """

    modes: tuple[str, ...] = ("random", "skewed")
    controls: tuple[str, ...] = ("triton_fp8", "triton_bf16")
    limits: Mapping[str, float] = {name: peer.limit for name, peer in PEERS.items()}

    def __init__(
        self, size: Size, w13: Tensor, w2: Tensor, x: Tensor, bytes_per_second: float
    ) -> None:
        self.size, self.w13, self.w2, self.x = size, w13, w2, x
        self.bytes_per_second = bytes_per_second
        self._routings: dict[tuple[int, str], list[Routed]] = {}

    @classmethod
    def gaussian(
        cls,
        size: tuple[int, ...],
        m: int,
        gaussian: Callable[..., Tensor],
        bytes_per_second: float,
    ) -> Experts:
        """size: that of `Size`."""
        inner, hidden, experts, _ = size
        x = gaussian(m, hidden).to(torch.bfloat16)

        def weight(n: int, k: int) -> Tensor:
            stack = x.new_empty(experts, n, k)
            for matrix in stack:  # float32 of all would need twice the memory
                matrix.copy_(gaussian(n, k).mul_(WEIGHT_STD))
            return stack

        w13, w2 = weight(2 * inner, hidden), weight(hidden, inner)
        return cls(Size(*size), w13, w2, x, bytes_per_second)

    def prepare(self, kernel: str) -> PreparedExperts:
        layer = PEERS[kernel].prepare(self.w13, self.w2, self.size.topk)
        return PreparedExperts(layer, self.x, self.routings, self.modes)

    def routings(self, m: int, mode: str) -> list[Routed]:
        """As many as touch more int4 weights than any L2 cache holds; always the same ones."""
        if (m, mode) not in self._routings:
            self._routings = {key: r for key, r in self._routings.items() if key[0] == m}
            copies = timing.copies_needed(int(self._reached(m) * self._expert_numbers() / 2))
            generator = torch.Generator(self.x.device).manual_seed(m)
            made = [self._route(m, mode, generator) for _ in range(copies)]
            self._routings[m, mode] = made
        return self._routings[m, mode]

    def _route(self, m: int, mode: str, generator: torch.Generator) -> Routed:
        experts, topk = self.size.experts, self.size.topk
        share = torch.arange(1.0, experts + 1, device=self.x.device)
        share = share ** -(SKEW if mode == "skewed" else 0.0)
        ids = torch.multinomial(share.expand(m, -1), topk, generator=generator).to(torch.int32)
        logits = torch.randn(m, topk, device=self.x.device, generator=generator)
        return Routed(logits.softmax(-1), ids)

    def reference(self, m: int, mode: str) -> Tensor:
        weights, ids = self.routings(m, mode)[0]
        x, out = self.x[:m], torch.zeros(m, self.size.hidden, device=self.x.device)
        for expert in ids.unique().tolist():
            token, slot = (ids == expert).nonzero(as_tuple=True)
            gate, up = (x[token] @ self.w13[expert].t()).float().chunk(2, dim=-1)
            hidden = (torch.nn.functional.silu(gate) * up).to(x.dtype)
            y = (hidden @ self.w2[expert].t()).float() * weights[token, slot, None]
            out.index_add_(0, token, y)
        return out.to(x.dtype)

    def _expert_numbers(self) -> int:
        return 3 * self.size.inner * self.size.hidden

    def _reached(self, m: int) -> float:
        """How many experts M tokens reach if they choose evenly."""
        experts, topk = self.size.experts, self.size.topk
        return experts * (1 - (1 - topk / experts) ** m)

    def _reached_on_average(self, m: int, mode: str) -> float:
        routings = self.routings(m, mode)
        return float(sum(ids.unique().numel() for _, ids in routings)) / len(routings)

    def operations(self, m: int) -> float:
        return 2.0 * m * self.size.topk * self._expert_numbers()

    def floor_us(self, m: int, mode: str) -> float:
        of_expert = weight_floor_us(1, self._expert_numbers(), self.bytes_per_second)
        return self._reached_on_average(m, mode) * of_expert

    def least_seconds(self, m: int) -> float:
        streaming = self._reached(m) * self._expert_numbers() / 2 / FAST_BYTES_PER_S
        return max(streaming, self.operations(m) / FAST_OPS_PER_S)
