"""Real models on a real GPU: layers row by row, then `vllm serve` under concurrent requests.

The models are the one that comes with the repository and, where the environment variable
INTSCALE_MODELS names a folder, every model in it.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from generators import assert_same_bits
from safetensors.torch import load_file

from vllm_intscale import ops, reference
from vllm_intscale.bench.random_checkpoint import model_of, write_random
from vllm_intscale.packing import unpack_codes
from vllm_intscale.quantize import quantize_model

EXAMPLES = Path(__file__).parents[1] / "serving_examples"
sys.path.insert(0, str(EXAMPLES))

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

MODELS = [EXAMPLES / "tiny-llama", *sorted(Path(os.environ.get("INTSCALE_MODELS", "-")).glob("*"))]
CONCURRENT = 64


@pytest.fixture(scope="module", params=MODELS, ids=lambda path: path.name)
def quantized(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("quantized") / request.param.name
    quantize_model(str(request.param), out)
    return out


def test_every_layer_gives_a_row_the_same_bits_alone_and_in_a_batch(quantized: Path) -> None:
    layers = 0
    for shard in quantized.glob("*.safetensors"):
        tensors = load_file(shard)
        for name in tensors:
            prefix, _, kind = name.rpartition(".")
            if kind != "qweight":
                continue
            qweight, group_scale, channel_scale = (
                tensors[f"{prefix}.{part}"] for part in ("qweight", "group_scale", "channel_scale")
            )
            codes = unpack_codes(qweight, 4)
            x = torch.randn(64, codes.shape[1]).to(torch.bfloat16)
            ready = ops.prepare_weight(qweight.cuda(), group_scale.cuda(), channel_scale.cuda())

            def linear(x: torch.Tensor, ready: tuple[torch.Tensor, ...] = ready) -> torch.Tensor:
                return ops.gemm(*ops.quantize_activation(x), *ready, None, x.dtype).cpu()

            y = linear(x.cuda())
            weight = reference.Weight(codes, group_scale, channel_scale)
            if "fold form" in ops.describe(*ready[:2]):
                weight = reference.fold(weight)
            assert_same_bits(y, reference.linear(x, weight), prefix)
            for row in range(64):
                alone = linear(x[row : row + 1].cuda())
                assert_same_bits(alone, y[row : row + 1], f"{prefix} row {row}")
            layers += 1
    assert layers


@pytest.mark.e2e
@pytest.mark.slow
def test_loading_takes_no_more_than_the_model_and_a_layer(tmp_path: Path) -> None:
    """Mixtral-8x7B's layers, three of them: what loading takes beside weights does not add up."""
    folder, script = tmp_path / "model", Path(__file__).parent / "loading_memory.py"
    write_random(model_of("mixtral-8x7b") | {"num_hidden_layers": 3}, folder)
    loaded = subprocess.run([sys.executable, script, folder], stdout=subprocess.PIPE, text=True)
    assert loaded.returncode == 0
    found = json.loads(loaded.stdout.splitlines()[-1])
    print(found)
    assert 0 < found["layer"] < found["weights"] <= found["peak"]
    assert found["peak"] <= found["weights"] + found["layer"]


@pytest.mark.e2e
@pytest.mark.slow
def test_vllm_serve_answers_concurrent_requests(quantized: Path, tmp_path: Path) -> None:
    """CUDA graphs and torch.compile on, as `vllm serve` runs by default."""
    from openai import AsyncOpenAI
    from server import running_server

    # A fixed cache: what vLLM measures for one is disturbed by servers beside it.
    options = ("--max-model-len", "512", "--gpu-memory-utilization", "0.1")
    options += ("--kv-cache-memory-bytes", str(2**30))

    async def ask_all(url: str) -> list[str]:
        client = AsyncOpenAI(base_url=f"{url}/v1", api_key="none", timeout=120, max_retries=0)
        answers = await asyncio.gather(
            *(
                client.completions.create(
                    model=str(quantized), prompt=f"{i}: and then", max_tokens=32, temperature=0
                )
                for i in range(CONCURRENT)
            )
        )
        assert all(a.usage and a.usage.completion_tokens for a in answers)
        return [a.choices[0].text for a in answers]

    log_file = tmp_path / "server.log"
    with running_server(str(quantized), *options, log=log_file) as url:
        texts = asyncio.run(ask_all(url))
    assert len(texts) == CONCURRENT and any(texts)
    log = log_file.read_text()
    print(*(line for line in log.splitlines() if "intscale:" in line), sep="\n")
    print(quantized.name, repr(texts[0]))
    assert re.search(r"\d+ on sm(80|90)_w4a8_gemm", log)
    assert "Graph capturing finished" in log
