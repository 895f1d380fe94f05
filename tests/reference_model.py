"""A whole quantized model from transformers' modules and `vllm_intscale.reference`.

It shares with the plugin no code but the reference arithmetic: names, fusion, sharding, sums over
ranks and the order of experts are written down here a second time.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from vllm_intscale import reference
from vllm_intscale.packing import unpack_codes

ROW_PARALLEL = ("o_proj", "down_proj")
Tensors = dict[str, Tensor]


def weight_of(tensors: Tensors, layer: str, bits: int = 4) -> reference.Weight:
    qweight, group_scale, channel_scale = (
        tensors[f"{layer}.{name}"] for name in ("qweight", "group_scale", "channel_scale")
    )
    return reference.Weight(unpack_codes(qweight, bits), group_scale, channel_scale)


def input_slice(weight: reference.Weight, rank: int, ranks: int) -> reference.Weight:
    """The part of a rank that holds a share of the input channels, in groups of 32."""
    k = weight.codes.shape[1]
    share = k // ranks
    group_size = k // weight.group_scale.shape[1]
    scale = weight.group_scale.repeat_interleave(group_size // 32, dim=1)
    part = slice(rank * share, (rank + 1) * share)
    scale_part = slice(rank * share // 32, (rank + 1) * share // 32)
    return reference.Weight(weight.codes[:, part], scale[:, scale_part], weight.channel_scale)


def output_slice(weight: reference.Weight, rank: int, ranks: int) -> reference.Weight:
    share = weight.codes.shape[0] // ranks
    part = slice(rank * share, (rank + 1) * share)
    return reference.Weight(*(tensor[part] for tensor in weight))


def row_parallel(x: Tensor, weight: reference.Weight, ranks: int) -> Tensor:
    """Each rank quantizes its own slice of the activations; the partial outputs are added."""
    slices = x.chunk(ranks, dim=-1)
    parts = [reference.linear(x, input_slice(weight, r, ranks)) for r, x in enumerate(slices)]
    return sum(parts[1:], parts[0])


class Linear(nn.Module):
    def __init__(self, weight: reference.Weight, bias: Tensor | None, ranks: int) -> None:
        super().__init__()
        self.weights, self.bias, self.ranks = weight, bias, ranks

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        if self.ranks > 1:
            y = row_parallel(flat, self.weights, self.ranks)
        else:
            y = reference.linear(flat, self.weights, self.bias)
        return y.view(*x.shape[:-1], -1)


class Experts(nn.Module):
    """Token by token, expert by expert."""

    def __init__(self, weights: list[tuple[reference.Weight, ...]], ranks: int) -> None:
        super().__init__()
        self.weights, self.ranks = weights, ranks

    def forward(self, hidden: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
        rows = zip(hidden.split(1), chosen.tolist(), shares.float(), strict=True)
        return torch.cat([self._token(x, *choice) for x, *choice in rows])

    def _token(self, x: Tensor, chosen: list[int], shares: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for rank in range(self.ranks):
            partial = torch.zeros(x.shape, dtype=torch.float32)
            for expert, share in zip(chosen, shares, strict=True):
                gate, up, down = self.weights[expert]
                parts = [output_slice(weight, rank, self.ranks) for weight in (gate, up)]
                gate_up = torch.cat([reference.linear(x, part) for part in parts], dim=-1)
                inner = reference.silu_mul(gate_up)
                y = reference.linear(inner, input_slice(down, rank, self.ranks))
                partial += share * y.float()
            out += partial.to(x.dtype)
        return out


def load(
    folder: Path, dtype: torch.dtype, ranks: int = 1, folded: bool = False, bits: int = 4
) -> nn.Module:
    """The model of a checkpoint as `ranks` tensor-parallel ranks compute it.

    folded: with `reference.fold` of every weight, as on Hopper. bits: of all layers.
    """

    def weight(layer: str) -> reference.Weight:
        stored = weight_of(tensors, layer, bits)
        return reference.fold(stored) if folded else stored

    config = AutoConfig.from_pretrained(folder)
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    tensors = load_file(folder / "model.safetensors")
    # Mixtral's checkpoints keep names that transformers 5 no longer has.
    for old, new in (("block_sparse_moe", "mlp"), ("w1", "gate_proj"), ("w3", "up_proj")):
        tensors = {name.replace(f".{old}.", f".{new}."): t for name, t in tensors.items()}
    tensors = {name.replace(".w2.", ".down_proj."): t for name, t in tensors.items()}

    missing, unexpected = model.load_state_dict(
        {n: t for n, t in tensors.items() if n in model.state_dict()}, strict=False
    )
    assert not unexpected
    model.tie_weights()
    for name, module in list(model.named_modules()):
        if name.endswith(".experts"):
            projections = ("gate_proj", "up_proj", "down_proj")
            weights = [
                tuple(weight(f"{name}.{expert}.{p}") for p in projections)
                for expert in range(module.num_experts)
            ]
            model.set_submodule(name, Experts(weights, ranks))
        elif f"{name}.qweight" in tensors:
            split = ranks if name.endswith(ROW_PARALLEL) else 1
            model.set_submodule(name, Linear(weight(name), module.bias, split))
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    for name in set(missing) - tied:
        assert "expert" in name or f"{name.removesuffix('.weight')}.qweight" in tensors
    return model


@torch.no_grad()
def prompt_logprobs(model: nn.Module, prompts: list[list[int]]) -> list[list[float]]:
    """The log-probability of each token but the first, given the ones before it."""
    result = []
    for prompt in prompts:
        logits = model(torch.tensor([prompt])).logits[0, :-1].float()
        tokens = torch.tensor(prompt[1:])[:, None]
        result.append(logits.log_softmax(-1).gather(1, tokens).squeeze(1).tolist())
    return result


def load_unquantized(folder: Path) -> nn.Module:
    """The original."""
    return AutoModelForCausalLM.from_pretrained(folder).eval()
