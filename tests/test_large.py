"""A checkpoint of the size people have: memory, speed, and a killed run that goes on.

Slow, and it needs disk: INTSCALE_LARGE_GB=20 pytest -s -m slow tests/test_large.py writes models of
that many gigabytes, beside what they become. Not run without the variable.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from vllm_intscale.verify import SUMS

SIZE = int(float(os.environ.get("INTSCALE_LARGE_GB", "0")) * 1e9)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(not SIZE, reason="INTSCALE_LARGE_GB is not set"),
]

HIDDEN, INNER = 4096, 14336  # of Llama-3-8B; one file a layer, as many layers as make the size
PROJECTIONS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN // 4, HIDDEN),
    "self_attn.v_proj": (HIDDEN // 4, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}
MOST_MEMORY = 4e9
BF16_PER_S, INT4_PER_S = 150e6, 80e6  # bytes read on two cores


def bf16(n: int, k: int) -> dict[str, Tensor]:
    return {"weight": torch.randn(n, k, dtype=torch.bfloat16).mul_(0.02)}


def gptq(n: int, k: int) -> dict[str, Tensor]:
    return {
        "qweight": torch.randint(-(2**31), 2**31, (k // 8, n), dtype=torch.int64).to(torch.int32),
        "qzeros": torch.full((k // 128, n // 8), 0x77777777, dtype=torch.int32),
        "scales": torch.rand(k // 128, n).mul_(0.01).add_(0.001).half(),
    }


def write_model(folder: Path, kind: str) -> int:
    """The bytes of its weights. Every layer is the first one's file again, under its names."""
    make = bf16 if kind == "bf16" else gptq
    layer = {
        f"{name}.{part}": tensor
        for name, size in PROJECTIONS.items()
        for part, tensor in make(*size).items()
    }
    layer_bytes = sum(tensor.nbytes for tensor in layer.values())
    layers = -(-SIZE // layer_bytes)
    folder.mkdir()
    weight_map = {}
    for i in range(layers):
        file = f"model-{i:05d}.safetensors"
        tensors = {f"model.layers.{i}.{name}": tensor for name, tensor in layer.items()}
        save_file(tensors, folder / file)
        weight_map |= dict.fromkeys(tensors, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config: dict[str, object] = {"model_type": "llama", "num_hidden_layers": layers}
    if kind == "gptq":
        section = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True}
        config["quantization_config"] = section
    (folder / "config.json").write_text(json.dumps(config))
    return layers * layer_bytes


def run(command: str, source: Path, out: Path, *options: str, kill_at: int = 0) -> tuple[int, int]:
    """Exit code and most anonymous memory; kill_at: bytes of output after which it is killed."""
    process = subprocess.Popen(
        [sys.executable, "-m", "vllm_intscale", command, source, out, *options],
        stdout=subprocess.DEVNULL,
    )
    partial, most = out.with_name(out.name + ".partial"), 0
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text()
        anonymous = [line.split()[1] for line in status.splitlines() if line.startswith("RssAnon")]
        most = max(most, *(int(kib) << 10 for kib in anonymous), 0)
        if kill_at and sum(f.stat().st_blocks for f in partial.glob("*")) * 512 > kill_at:
            process.kill()
        time.sleep(0.05)
    return process.returncode, most


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Emptied afterwards: pytest would keep what fills a disk."""
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.mark.parametrize(
    ("command", "kind", "rate"), [("quantize", "bf16", BF16_PER_S), ("convert", "gptq", INT4_PER_S)]
)
def test_large_checkpoint(command: str, kind: str, rate: float, folder: Path) -> None:
    source, out = folder / "source", folder / "out"
    size = write_model(source, kind)
    start = time.monotonic()
    shutil.copytree(source, folder / "copy")
    print(f"\nplain copy: {size / (time.monotonic() - start) / 1e6:.0f} MB/s")
    shutil.rmtree(folder / "copy")
    start = time.monotonic()
    code, memory = run(command, source, out)
    seconds = time.monotonic() - start
    print(
        f"{command}: {size / 1e9:.1f} GB in {seconds:.0f} s, {size / seconds / 1e6:.0f} MB/s, "
        f"anonymous memory {memory / 1e9:.2f} GB"
    )
    assert code == 0 and memory < MOST_MEMORY and size / seconds > rate
    sums = (out / SUMS).read_text()
    written = sum(file.stat().st_size for file in out.iterdir())
    shutil.rmtree(out)
    assert run(command, source, out, kill_at=written // 2)[0] == -signal.SIGKILL
    assert not out.exists()
    start = time.monotonic()
    code, memory = run(command, source, out, "--resume")
    print(f"{command}: killed half-way, resumed in {time.monotonic() - start:.0f} s")
    assert code == 0 and memory < MOST_MEMORY and (out / SUMS).read_text() == sums
