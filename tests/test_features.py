"""What vLLM does besides: each feature with an intscale model, on the device that is here.

An answer is compared with the same engine's without the feature. Both compute the same but for the
order of additions in attention; where that flips an int8 code (test_engine.py), the rest of an
answer can be another, so that one of three must agree and the first token of none be far off.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import engine
import pytest
import torch
from gpu_engine import CACHE
from safetensors.torch import save_file

from vllm_intscale.quantize import quantize_model
from vllm_intscale.text import tokenize

pytest.importorskip("vllm")

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(420)]

ON_GPU = torch.cuda.is_available()
CLOSE, FLIPPED = (0.2, 0.5) if ON_GPU else (0.002, 0.5)  # float16, in which codes flip, and float32
MODEL = Path(__file__).parents[1] / "serving_examples" / "tiny-llama"
SAMPLING = {"max_tokens": 24, "temperature": 0, "logprobs": 0, "ignore_eos": True}
Answers = list[engine.Answer]
Run = Callable[..., tuple[list[Answers], dict[str, float]]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained model: one of random weights answers anything."""
    out = tmp_path_factory.mktemp("quantized") / MODEL.name
    quantize_model(str(MODEL), out)
    return out


@pytest.fixture
def run(folder: Path, tmp_path: Path) -> Run:
    return lambda **options: answers(folder, tmp_path, **options)


@pytest.fixture(scope="module")
def plain(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Answers:
    """Answers without any feature."""
    return answers(folder, tmp_path_factory.mktemp("plain"))[0][0]


def make_prompts() -> list[list[int]]:
    """Said twice, so that what comes next can be guessed; of 96, 80 and 66 tokens."""
    ids = tokenize(str(MODEL), (MODEL.parent / "tiny-llama-heldout.txt").read_text())
    return [ids[start : start + n] * 2 for start, n in ((0, 48), (500, 40), (1000, 33))]


def answers(
    folder: Path, tmp_path: Path, adapters: Sequence[Path | None] = (None,), **options: Any
) -> tuple[list[Answers], dict[str, float]]:
    """One round for each adapter, and what vLLM counted."""
    dtype = "float16" if ON_GPU else "float32"
    arguments = {"model": str(folder), "dtype": dtype, "max_model_len": 256, "max_num_seqs": 4}
    arguments |= {"enforce_eager": True, "enable_prefix_caching": False}
    arguments |= {**(CACHE if ON_GPU else {}), **options}
    rounds, counted, _ = engine.run(tmp_path, arguments, make_prompts(), SAMPLING, adapters)
    return rounds, counted


def largest_differences(found: Answers, wanted: Answers) -> list[tuple[float, float]]:
    """Of each answer's first log-probability, and of all, infinite where tokens differ."""
    pairs = []
    for a, b in zip(found, wanted, strict=True):
        between = (torch.tensor(a["logprobs"]) - torch.tensor(b["logprobs"])).abs()
        same = a["tokens"] == b["tokens"]
        pairs.append((float(between[0]), float(between.max()) if same else float("inf")))
    print("difference of the first token, and the largest:", pairs)
    return pairs


def agree(found: Answers, wanted: Answers, close: float = CLOSE) -> bool:
    pairs = largest_differences(found, wanted)
    return min(b for _, b in pairs) < close and max(a for a, _ in pairs) < FLIPPED


def test_prefix_caching(run: Run, plain: Answers) -> None:
    (first, second), _ = run(adapters=(None, None), enable_prefix_caching=True, block_size=32)
    assert all(a["cached"] == 0 for a in first) and all(a["cached"] >= 64 for a in second)
    assert agree(first, plain) and agree(second, plain)


def test_chunked_prefill(run: Run, plain: Answers) -> None:
    """Each prompt is longer than what a step takes."""
    (chunked,), _ = run(max_num_batched_tokens=32, enable_chunked_prefill=True)
    assert agree(chunked, plain)


def test_speculative_decoding(run: Run, plain: Answers) -> None:
    ngram = {"method": "ngram", "num_speculative_tokens": 3}
    ngram |= {"prompt_lookup_min": 1, "prompt_lookup_max": 3}
    (speculative,), counted = run(speculative_config=ngram)
    assert counted["vllm:spec_decode_num_draft_tokens"] > 0
    assert agree(speculative, plain)


def write_adapter(folder: Path, out: Path, size: float) -> Path:
    """For q and down of all layers, rank 8, with B of this standard deviation."""
    config = json.loads((folder / "config.json").read_text())
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    generator, rank, tensors = torch.Generator().manual_seed(0), 8, {}
    shapes = {"self_attn.q_proj": (hidden, hidden), "mlp.down_proj": (hidden, inner)}
    for layer in range(config["num_hidden_layers"]):
        for name, (n, k) in shapes.items():
            prefix = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(rank, k, generator=generator) * 0.05
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(n, rank, generator=generator) * size
    out.mkdir()
    save_file(tensors, out / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "bias": "none"}
    settings |= {"target_modules": ["q_proj", "down_proj"]}
    (out / "adapter_config.json").write_text(json.dumps(settings))
    return out


def test_lora(run: Run, plain: Answers, folder: Path, tmp_path: Path) -> None:
    """An adapter of zeros changes nothing, another does."""
    options = {"enable_lora": True, "max_lora_rank": 8, "max_loras": 1}
    sizes = {"zero": 0.0, "other": 0.5}
    adapters = [write_adapter(folder, tmp_path / name, size) for name, size in sizes.items()]
    (zero, other), _ = run(adapters=adapters, **options)
    assert agree(zero, plain)
    assert min(first for first, _ in largest_differences(other, plain)) > FLIPPED / 10


@pytest.mark.skipif(not ON_GPU, reason="an fp8 cache needs a GPU here")
def test_fp8_cache(run: Run) -> None:
    """Its rounding is seen, and small; vLLM's attention with one gives bfloat16 only."""
    fp8, plain = (run(dtype="bfloat16", kv_cache_dtype=dtype)[0][0] for dtype in ("fp8", "auto"))
    pairs = largest_differences(fp8, plain)
    assert 0 < max(first for first, _ in pairs) < FLIPPED
