"""Each architecture in a vLLM engine on a GPU against `reference_model`: log-probabilities.

The engine computes in float16, the reference in float32, so that int8 codes flip (test_engine.py)
everywhere: that alone moves a log-probability by 0.05 to 0.08 (median; the reference in float16),
quantization by 0.7 to 1.2. That the arithmetic is right to the bit is for test_kernels.py to say;
what these tests find is a model put together wrongly.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import IGNORE, MODELS, VOCAB
from gpu_engine import logprobs

reference_model = pytest.importorskip("reference_model")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.e2e,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


def make_prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in (64, 33, 17, 9)]


@pytest.mark.parametrize(
    ("kind", "bits"), [*((kind, 4) for kind in MODELS), ("llama", 8), ("mixtral", 8)]
)
def test_architecture(
    checkpoint: Callable[..., Path], tmp_path: Path, kind: str, bits: int
) -> None:
    folder, prompts = checkpoint(kind, ignore=IGNORE, bits=bits), make_prompts()
    found = logprobs(folder, tmp_path, prompts, dtype="float16")

    def differences(model: torch.nn.Module) -> torch.Tensor:
        wanted = reference_model.prompt_logprobs(model, prompts)
        pairs = zip(found, wanted, strict=True)
        return torch.cat([(torch.tensor(a) - torch.tensor(b)).abs() for a, b in pairs])

    folded = torch.cuda.get_device_capability()[0] == 9 or bits == 8
    own = differences(reference_model.load(folder, torch.float32, folded=folded, bits=bits))
    original = differences(reference_model.load_unquantized(folder.parent / f"{kind}-float32"))
    for name, difference in (("quantized", own), ("unquantized", original)):
        print(f"{kind}, {name}: median {difference.median():.4f}, largest {difference.max():.4f}")
    # Eight bits are nearly the original.
    assert 4 * own.median() < original.median() if bits == 4 else own.median() < 0.15
