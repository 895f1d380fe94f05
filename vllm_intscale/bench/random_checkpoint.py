"""`python -m vllm_intscale.bench.random_checkpoint MODEL OUT`: a W4A8 checkpoint of random numbers.

For measuring speed and memory at the size of a real model, without its weights: real files, real
shapes, values of the usual size. Not `--load-format dummy`, which knows no integers.
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

from vllm_intscale.checkpoint import CONFIG
from vllm_intscale.errors import IntScaleError
from vllm_intscale.format import CheckpointConfig

IGNORE = ("lm_head", r"re:.*\.gate")
WEIGHT_STD = 0.02
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


def write_random(model: Mapping[str, Any], out: Path, group_size: int = 128) -> None:
    """Write a checkpoint for this config.json of a Llama or a Mixtral, one file a layer.

    Raises IntScaleError if `out` exists.
    """
    if out.exists():
        raise IntScaleError(f"{out} exists; remove it or choose another folder")
    config = {**COMMON, **model}
    quantization = CheckpointConfig(group_size=group_size, ignore=IGNORE)
    out.mkdir(parents=True)
    names: dict[str, str] = {}
    for number, shapes in enumerate(_files(config)):
        tensors: dict[str, Tensor] = {}
        file = f"model-{number:05d}.safetensors"
        for name, shape in shapes.items():
            if quantization.scheme_of(name) and len(shape) == 2 and ".layers." in name:
                tensors |= _linear(name, quantization, *shape)
            else:
                tensors[f"{name}.weight"] = _other(shape)
        save_file({name: tensor.cpu() for name, tensor in tensors.items()}, out / file)
        names |= dict.fromkeys(tensors, file)
    index = {"metadata": {}, "weight_map": names}
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    config |= {"quantization_config": quantization.to_dict()}
    (out / CONFIG).write_text(json.dumps(config, indent=1))
    _write_tokenizer(config["vocab_size"], out)


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


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _linear(name: str, quantization: CheckpointConfig, n: int, k: int) -> dict[str, Tensor]:
    """Codes of all values alike, scales from 32 on."""
    scheme = quantization.scheme_of(name)
    assert scheme
    specs = scheme.tensor_specs(n, k)
    largest = scheme.max_group_scale
    shape = specs["qweight"][1]
    limits = torch.iinfo(torch.int32)
    qweight = torch.randint(limits.min, limits.max, shape, dtype=torch.int64, device=_device())
    group_scale = torch.randint(32, largest + 1, specs["group_scale"][1], device=_device())
    spread = (16**2 / 12) ** 0.5 * largest * 0.6  # of code times scale
    channel_scale = torch.full(specs["channel_scale"][1], WEIGHT_STD / spread)
    return {
        f"{name}.qweight": qweight.to(torch.int32),
        f"{name}.group_scale": group_scale.to(torch.int16),
        f"{name}.channel_scale": channel_scale,
    }


def _other(shape: tuple[int, ...]) -> Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.randn(shape, dtype=torch.bfloat16, device=_device()).mul_(WEIGHT_STD)


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
    name, out = sys.argv[1:]
    if name not in MODELS:
        raise SystemExit(f"{name}: unknown; there are {', '.join(MODELS)}")
    write_random(MODELS[name], Path(out))


if __name__ == "__main__":
    main()
