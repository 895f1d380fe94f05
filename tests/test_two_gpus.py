"""Two GPUs: shares of layers and their sums against an explicit two-rank reference, and engines."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import IGNORE
from engine import SCORED, Logprobs, prompt_logprobs, run
from gpu_engine import CACHE, SMALL, logprobs

sys.path.insert(0, str(Path(__file__).parents[1] / "serving_examples"))

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs"),
]

HERE = Path(__file__).parent
FLIPPED = 0.5  # what flipped int8 codes change at most, see test_engine.py
# What experts change besides that are folded in slices, each rounded by itself: 0.30 in float32.
SLICED = 0.3
PROMPTS = [list(range(3, 3 + n)) for n in (40, 17, 9)]


def test_shares_and_sums_equal_an_explicit_reference() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [
        subprocess.Popen(
            [sys.executable, HERE / "rank.py"],
            env=environment | {"RANK": str(rank), "WORLD_SIZE": "2"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    for rank in ranks:
        output = rank.communicate(timeout=300)[0]
        assert rank.returncode == 0 and output.endswith("equal\n"), output[-3000:]


def close(found: Logprobs, wanted: Logprobs, largest: float = FLIPPED) -> bool:
    """Half of them nearer than a quarter of what quantization changes (test_gpu_models.py)."""
    pairs = zip(found, wanted, strict=True)
    differences = torch.cat([(torch.tensor(a) - torch.tensor(b)).abs() for a, b in pairs])
    print(f"median {differences.median():.4f}, largest {differences.max():.4f}")
    return bool(differences.median() < 0.2 and differences.max() < largest)


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_engines(checkpoint: Callable[..., Path], tmp_path: Path, kind: str) -> None:
    """One request at a time: two stages give the same bits as one; two ranks nearly so."""
    folder = checkpoint(kind, ignore=IGNORE)
    one = logprobs(folder, tmp_path, PROMPTS)
    assert logprobs(folder, tmp_path, PROMPTS, pipeline_parallel_size=2) == one
    two = logprobs(folder, tmp_path, PROMPTS, tensor_parallel_size=2)
    if kind == "llama":
        assert close(two, one)
        return
    assert close(two, one, FLIPPED + SLICED)
    experts = {"tensor_parallel_size": 2, "enable_expert_parallel": True}
    apart = logprobs(folder, tmp_path, PROMPTS, **experts)
    assert close(apart, one)
    # Experts move every few steps, some are there twice: other sums over ranks, the same experts.
    balancing = {"window_size": 2, "step_interval": 2, "num_redundant_experts": 2}
    moving = experts | {"enable_eplb": True, "eplb_config": balancing}
    assert close(logprobs(folder, tmp_path, PROMPTS * 4, **moving), apart * 4)


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_sums_fused_with_norms(checkpoint: Callable[..., Path], tmp_path: Path, kind: str) -> None:
    """In compiled graphs; the same bits as by NCCL's sums, which of two ranks are rounded once."""
    folder = checkpoint(kind, ignore=IGNORE)
    found, logs = [], []
    compiled_anew = {
        "VLLM_DISABLE_COMPILE_CACHE": "1",
        "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",  # its graphs are the same, and so found again
    }
    for custom in (True, False):
        engine = {"enforce_eager": False, "tensor_parallel_size": 2}
        engine |= {"disable_custom_all_reduce": not custom}
        arguments = {"model": str(folder), **CACHE, **SMALL, **engine}
        sampling = SCORED | {"max_tokens": 16}
        rounds, _, log = run(tmp_path, arguments, PROMPTS, sampling, environment=compiled_anew)
        found.append(rounds)
        logs.append(log)
    assert "sums over 2 ranks can be fused with norms" in logs[0]
    assert "sums over ranks are vLLM's" in logs[1]
    # In each piece of the graph, which is the same. Mixtral's last has no norm that quantizes.
    fused, again = (re.findall(r"(\d+) sums over ranks are fused", log) for log in logs)
    assert len(fused) > 1 and all(map(int, fused[:-1])) and fused == again, (fused, again)
    assert found[0] == found[1]
    eager = logprobs(folder, tmp_path, PROMPTS, tensor_parallel_size=2)
    assert close(prompt_logprobs(found[0]), eager)


@pytest.mark.e2e
@pytest.mark.slow
def test_data_parallel_server(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """Each GPU has requests of its own and half of the experts, to which vLLM's all2all takes them.

    CUDA graphs and torch.compile are on.
    """
    from openai import OpenAI
    from server import running_server

    folder, log = checkpoint("mixtral", ignore=IGNORE), tmp_path / "server.log"
    one = logprobs(folder, tmp_path, PROMPTS)
    options = ("--data-parallel-size", "2", "--enable-expert-parallel", "--dtype", "bfloat16")
    options += ("--max-model-len", "128", "--gpu-memory-utilization", "0.05")
    options += ("--kv-cache-memory-bytes", "268435456")

    def ask(client: OpenAI, prompt: list[int]) -> list[float]:
        answer = client.completions.create(
            model=str(folder), prompt=prompt, max_tokens=1, extra_body={"prompt_logprobs": 0}
        )
        entries: list[Any] = answer.choices[0].model_extra["prompt_logprobs"][1:]
        pairs = zip(entries, prompt[1:], strict=True)
        return [float(entry[str(token)]["logprob"]) for entry, token in pairs]

    with running_server(str(folder), *options, log=log) as url:
        client = OpenAI(base_url=f"{url}/v1", api_key="none", timeout=120, max_retries=0)
        with ThreadPoolExecutor(12) as pool:  # both ranks at once
            found = list(pool.map(partial(ask, client), PROMPTS * 4))
    assert close(found, one * 4)
    assert "tokens by MoEPrepareAndFinalize" in log.read_text()
