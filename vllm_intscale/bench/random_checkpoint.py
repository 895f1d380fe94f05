"""`python -m vllm_intscale.bench.random_checkpoint MODEL OUT [FORMAT]`: of random numbers.

For measuring speed and memory at the size of a real model, without its weights: real files, real
shapes, values of the usual size, in this package's format or another's (`random_formats`). Not
`--load-format dummy`, which knows no integers.
"""

from __future__ import annotations

import json
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

MODELS: dict[str, dict[str, Any]] = {
    "llama-3-8b": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "rope_theta": 500000.0,
    },
    "llama-2-7b": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
        "rope_theta": 10000.0,
    },
    "llama-2-13b": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 40,
        "vocab_size": 32000,
        "rope_theta": 10000.0,
    },
    "mixtral-8x7b": {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "vocab_size": 32000,
        "rope_theta": 1000000.0,
    },
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
    """Write a checkpoint for this config.json of a Llama or a Mixtral, one file a layer.

    Raises IntScaleError if `out` exists or the format is unknown.
    """
    quantization, linear = format_of(format_name)
    if out.exists():
        raise IntScaleError(f"{out} exists; remove it or choose another folder")
    config = {**COMMON, **model}
    out.mkdir(parents=True)
    names: dict[str, str] = {}
    for number, shapes in enumerate(_files(config)):
        tensors: dict[str, Tensor] = {}
        file = f"model-{number:05d}.safetensors"
        for name, shape in shapes.items():
            if len(shape) == 2 and ".layers." in name and INTSCALE.scheme_of(name):
                tensors |= linear(name, shape[0], shape[1])
            else:
                tensors[f"{name}.weight"] = _other(shape)
        save_file({name: tensor.cpu() for name, tensor in tensors.items()}, out / file)
        names |= dict.fromkeys(tensors, file)
    index = {"metadata": {}, "weight_map": names}
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    if quantization:
        config |= {"quantization_config": quantization}
    (out / CONFIG).write_text(json.dumps(config, indent=1))
    _write_tokenizer(config["vocab_size"], out)


def model_of(name: str) -> dict[str, Any]:
    """What config.json says of it. Raises IntScaleError for an unknown name."""
    if name not in MODELS:
        raise IntScaleError(f"model {name!r} is unknown; there are {', '.join(MODELS)}")
    return MODELS[name]


def _files(config: Mapping[str, Any]) -> Iterator[dict[str, tuple[int, ...]]]:
    """Shapes of the weights by module, file by file."""
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


def _other(shape: tuple[int, ...]) -> Tensor:
    if len(shape) == 1:
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
