"""`python -m vllm_intscale.bench.random_checkpoint MODEL OUT [FORMAT]`: of random numbers.

For measuring speed and memory at the size of a real model, without its weights: real files, real
shapes, values of the usual size, in this package's format or another's (`random_formats`). vLLM's
`--load-format dummy` leaves integers as they lie in memory; it does for models of floats.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from vllm_intscale.bench.random_formats import INTSCALE, WEIGHT_STD, device, format_of
from vllm_intscale.checkpoint import CONFIG
from vllm_intscale.errors import IntScaleError


def _shape(
    kind: str,
    hidden: int,
    inner: int,
    layers: int,
    heads: tuple[int, int],
    vocab: int,
    theta: float,
) -> dict[str, Any]:
    """Of config.json. heads: those of queries, those of keys and values."""
    return {
        "architectures": [f"{kind}ForCausalLM"],
        "model_type": kind.lower(),
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "vocab_size": vocab,
        "rope_theta": theta,
    }


MODELS: dict[str, dict[str, Any]] = {
    "llama-3-8b": _shape("Llama", 4096, 14336, 32, (32, 8), 128256, 5e5),
    "llama-3-70b": _shape("Llama", 8192, 28672, 80, (64, 8), 128256, 5e5),
    "llama-2-7b": _shape("Llama", 4096, 11008, 32, (32, 32), 32000, 1e4),
    "llama-2-13b": _shape("Llama", 5120, 13824, 40, (40, 40), 32000, 1e4),
    "qwen2.5-7b": _shape("Qwen2", 3584, 18944, 28, (28, 4), 152064, 1e6),
    "mixtral-8x7b": _shape("Mixtral", 4096, 14336, 32, (32, 8), 32000, 1e6)
    | {"num_local_experts": 8, "num_experts_per_tok": 2},
}
COMMON = {
    "hidden_act": "silu",
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def write_random(model: Mapping[str, Any], out: Path, format_name: str = "intscale") -> None:
    """Write a checkpoint for this config.json of a Llama, Qwen2 or Mixtral, one file a layer.

    Raises IntScaleError if `out` exists or the format is unknown.
    """
    linear = format_of(format_name).linear
    write_config(model, out, format_name)
    names: dict[str, str] = {}
    for number, shapes in enumerate(_files({**COMMON, **model})):
        tensors: dict[str, Tensor] = {}
        file = f"model-{number:05d}.safetensors"
        for name, shape in shapes.items():
            if len(shape) == 2 and ".layers." in name and INTSCALE.scheme_of(name):
                tensors |= linear(name, shape[0], shape[1])
            else:
                tensors[name if name.endswith(".bias") else f"{name}.weight"] = _other(name, shape)
        save_file({name: tensor.cpu() for name, tensor in tensors.items()}, out / file)
        names |= dict.fromkeys(tensors, file)
    index = {"metadata": {}, "weight_map": names}
    (out / "model.safetensors.index.json").write_text(json.dumps(index))


def write_config(model: Mapping[str, Any], out: Path, format_name: str) -> None:
    """All of it but the weights: what `--load-format dummy` needs. Raises as `write_random`."""
    config = {**COMMON, **model}
    if quantization := format_of(format_name).config:
        config["quantization_config"] = quantization
    if out.exists():
        raise IntScaleError(f"{out} exists; remove it or choose another folder")
    out.mkdir(parents=True)
    (out / CONFIG).write_text(json.dumps(config, indent=1))
    _write_tokenizer(config["vocab_size"], out)


def weights_of(model: Mapping[str, Any]) -> int:
    """How many numbers it has."""
    files = _files({**COMMON, **model})
    return sum(math.prod(shape) for shapes in files for shape in shapes.values())


def model_of(name: str) -> dict[str, Any]:
    """What config.json says of it. Raises IntScaleError for an unknown name."""
    if name not in MODELS:
        raise IntScaleError(f"model {name!r} is unknown; there are {', '.join(MODELS)}")
    return MODELS[name]


def _files(config: Mapping[str, Any]) -> Iterator[dict[str, tuple[int, ...]]]:
    """Shapes of the weights by module, and of biases, file by file."""
    hidden, inner, vocab = (config[f"{n}_size"] for n in ("hidden", "intermediate", "vocab"))
    head = hidden // config["num_attention_heads"]
    q, kv = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    gated = {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
    experts = config.get("num_local_experts", 0)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        sizes = {"q": (q, hidden), "k": (kv, hidden), "v": (kv, hidden), "o": (hidden, q)}
        shapes: dict[str, tuple[int, ...]] = {
            f"{layer}.self_attn.{name}_proj": size for name, size in sizes.items()
        }
        if config["model_type"] == "qwen2":
            shapes |= {f"{layer}.self_attn.{n}_proj.bias": sizes[n][:1] for n in "qkv"}
        shapes |= {f"{layer}.input_layernorm": (hidden,)}
        shapes |= {f"{layer}.post_attention_layernorm": (hidden,)}
        if experts:
            moe = f"{layer}.block_sparse_moe"
            shapes[f"{moe}.gate"] = (experts, hidden)
            mixtral = {"gate": "w1", "up": "w3", "down": "w2"}
            for e in range(experts):
                shapes |= {f"{moe}.experts.{e}.{mixtral[n]}": gated[n] for n in gated}
        else:
            shapes |= {f"{layer}.mlp.{name}_proj": size for name, size in gated.items()}
        yield shapes
    yield {
        "model.embed_tokens": (vocab, hidden),
        "model.norm": (hidden,),
        "lm_head": (vocab, hidden),
    }


def _other(name: str, shape: tuple[int, ...]) -> Tensor:
    if name.endswith("norm"):
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.randn(shape, dtype=torch.bfloat16, device=device()).mul_(WEIGHT_STD)


def _write_tokenizer(vocab: int, out: Path) -> None:
    """One word for each token."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"t{i}": i for i in range(vocab)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(out / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "t2", "bos_token": "t1"}
    (out / "tokenizer_config.json").write_text(json.dumps(settings))


def main() -> None:
    name, out, *format_name = sys.argv[1:]
    write_random(model_of(name), Path(out), *format_name)


if __name__ == "__main__":
    main()
