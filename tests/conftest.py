"""Tiny checkpoints with random weights, made from the format's own pieces.

They are deliberately not made by `vllm_intscale.quantize`: a mistake shared by the quantizer and
the plugin would cancel out.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Before vLLM is imported anywhere. Its subprocesses inherit these.
os.environ.update(
    HF_HUB_OFFLINE="1",
    VLLM_NO_USAGE_STATS="1",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
)

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vllm_intscale.format import CheckpointConfig, LayerScheme
from vllm_intscale.packing import pack_codes

VOCAB = 512
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# K = 192 for the down projections at TP = 2: groups of 128 are split into groups of 64.
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"intermediate_size": 384},
    "mixtral": {"intermediate_size": 384, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {
        "intermediate_size": 256,
        "moe_intermediate_size": 128,
        "shared_expert_intermediate_size": 384,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 1,
        "norm_topk_prob": True,
    },
    "qwen3_moe": {
        "intermediate_size": 256,
        "moe_intermediate_size": 128,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 1,
        "norm_topk_prob": True,
        "head_dim": 64,
    },
    "olmoe": {
        "intermediate_size": 128,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "norm_topk_prob": False,
    },
    # As DeepSeek-V2-Lite: a dense layer first, shared experts, latent attention without q_lora.
    "deepseek_v2": {
        "intermediate_size": 384,
        "moe_intermediate_size": 128,
        "n_routed_experts": 4,
        "n_shared_experts": 2,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "num_key_value_heads": 4,
        "kv_lora_rank": 512,
        "q_lora_rank": None,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "topk_method": "greedy",
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.5,
    },
}
IGNORE = ("lm_head", r"re:.*\.gate", r"re:.*\.shared_expert_gate")


def quantize_tensor(weight: Tensor, scheme: LayerScheme) -> dict[str, Tensor]:
    """Round to nearest: weight `[N, K]` to the three tensors of the format."""
    largest = 2 ** (scheme.bits - 1) - 1
    groups = weight.float().unflatten(-1, (-1, scheme.group_size))
    scale = groups.abs().amax(-1) / largest
    channel_scale = scale.amax(-1) / min(scheme.max_group_scale, 255)
    group_scale = (scale / channel_scale[:, None]).round().clamp(min=1)
    codes = (groups / (group_scale * channel_scale[:, None])[..., None]).round()
    codes = codes.clamp(-largest - 1, largest).flatten(-2)
    return {
        "qweight": pack_codes(codes.to(torch.int8), scheme.bits),
        "group_scale": group_scale.to(torch.int16),
        "channel_scale": channel_scale,
    }


def quantize_folder(source: Path, out: Path, config: CheckpointConfig) -> Path:
    """Quantize every linear layer of a saved model that the config does not ignore."""
    out.mkdir(parents=True)
    tensors: dict[str, Tensor] = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        layer = name.removesuffix(".weight")
        linear = tensor.dim() == 2 and name.endswith(".weight") and "embed" not in name
        scheme = config.scheme_of(layer) if linear else None
        if scheme is None:
            tensors[name] = tensor
        else:
            parts = quantize_tensor(tensor, scheme)
            tensors.update({f"{layer}.{part}": value for part, value in parts.items()})
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    for file in source.glob("*.json"):
        content = json.loads(file.read_text())
        if file.name == "config.json":
            content["quantization_config"] = config.to_dict()
        (out / file.name).write_text(json.dumps(content, indent=2))
    return out


def random_model(kind: str, folder: Path, dtype: torch.dtype) -> Path:
    """Save a random model whose logits are far from uniform and whose routers are decided."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **(COMMON | MODELS[kind]))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                gain = 3.0 if "gate.weight" in name or "lm_head" in name else 1.0
                parameter.normal_(0, gain * parameter.shape[-1] ** -0.5)
            elif "bias" in name:
                parameter.normal_(0, 0.1)
    model.to(dtype).save_pretrained(folder)
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"t{i}": i for i in range(3, VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokens of the random models, whose words are t3, t4, ..."""
    ids = torch.randint(3, 120, (2048,), generator=torch.Generator().manual_seed(0))
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(" ".join(f"t{i}" for i in ids.tolist()))
    return file


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`checkpoint(kind, dtype="float32", **config)`: the folder of a quantized random model."""
    root = tmp_path_factory.mktemp("models")
    made: dict[str, Path] = {}

    def make(kind: str, dtype: str = "float32", **config: Any) -> Path:
        key = f"{kind}-{dtype}"
        source = root / key
        if not source.exists():
            random_model(kind, source, getattr(torch, dtype))
        key += "".join(f"-{value}" for value in config.values())
        if key not in made:
            settings = {"ignore": IGNORE, **config}
            out = root / f"quantized-{len(made)}"
            made[key] = quantize_folder(source, out, CheckpointConfig(**settings))
        return made[key]

    return make


@pytest.fixture(scope="module")
def one_process_world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """vLLM's process groups, of this process alone."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import parallel_state

    store = tmp_path_factory.mktemp("world") / "store"
    with set_current_vllm_config(VllmConfig()):
        parallel_state.init_distributed_environment(1, 0, f"file://{store}", 0, "gloo")
        parallel_state.initialize_model_parallel()
        yield
    parallel_state.cleanup_dist_env_and_memory()


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fresh memory of a GPU is filled with NaN or the largest integer."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3, device="cuda").isnan().all()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # of processes side by side: they would wait for each other's
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)
