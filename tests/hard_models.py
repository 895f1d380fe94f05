"""Models that compute the same but are hard to quantize: `tests/hard_models.py KIND SRC OUT`.

    norm   a few columns of every norm's output are 30 to 100 times as large, and what multiplies
           them as much smaller
    inner  the same for the input of every down projection, whose rows of up are larger

Llama and Mixtral.
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

COLUMNS = 8  # that are made larger, of each layer's
_AFTER = {
    "input_layernorm": r"self_attn\.[qkv]_proj",
    "post_attention_layernorm": r"(mlp|block_sparse_moe)\."
    r"(gate|(experts\.\d+\.)?(gate_proj|up_proj|w1|w3))",
}
_DOWN = {"up_proj": "down_proj", "w3": "w2"}


def make_hard(kind: str, source: Path, out: Path, seed: int = 0) -> None:
    """Write a variant of the model in `source` to the new folder `out`."""
    tensors = {
        n: t for path in sorted(source.glob("*.safetensors")) for n, t in load_file(path).items()
    }
    rng = torch.Generator().manual_seed(seed)
    shutil.copytree(source, out, ignore=shutil.ignore_patterns("*.safetensors*"))

    def factors(k: int) -> Tensor:
        f = torch.ones(k)
        chosen = torch.randperm(k, generator=rng)[:COLUMNS]
        f[chosen] = 30 + 70 * torch.rand(COLUMNS, generator=rng)
        return f

    for name in sorted(tensors):
        layer, _, rest = name.removesuffix(".weight").rpartition(".")
        if kind == "norm" and rest in _AFTER:
            f = factors(len(tensors[name]))
            after = re.compile(re.escape(layer) + r"\." + _AFTER[rest] + r"\.weight")
            _scale(tensors, name, f)
            for other in filter(after.fullmatch, tensors):
                _scale(tensors, other, 1 / f)
        if kind == "inner" and rest in _DOWN:
            f = factors(len(tensors[name]))
            _scale(tensors, name, f[:, None])
            _scale(tensors, f"{layer}.{_DOWN[rest]}.weight", 1 / f)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})


def _scale(tensors: dict[str, Tensor], name: str, factor: Tensor) -> None:
    tensors[name] = (tensors[name].float() * factor).to(tensors[name].dtype)


if __name__ == "__main__":
    make_hard(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
