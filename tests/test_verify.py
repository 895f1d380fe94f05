"""`intscale verify`: every kind of damage is found and named; what the quantizer wrote passes."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import sources
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vllm_intscale import cli
from vllm_intscale.errors import IntScaleError
from vllm_intscale.quantize import quantize_model, shards
from vllm_intscale.verify import SUMS, verify, write_sums

Q = "model.layers.0.self_attn.q_proj"
SHARD = "model.safetensors"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify")
    sources.save_model(folder / "source", sources.dense())
    (folder / "source" / "code").mkdir()
    (folder / "source" / "code" / "tokenizer.py").write_text("# other files count, too\n")
    quantize_model(str(folder / "source"), folder / "out")
    return folder / "out"


@pytest.fixture
def checkpoint(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "checkpoint"))


def complaint(folder: Path) -> str:
    with pytest.raises(IntScaleError) as error:
        verify(folder)
    message = str(error.value)
    assert message and "\n" not in message
    return message


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Change tensors of a checkpoint, with hashes that agree."""
    tensors = load_file(folder / SHARD)
    change(tensors)
    save_file(tensors, folder / SHARD)
    write_sums(folder)


def test_what_was_written_is_in_order(checkpoint: Path) -> None:
    seen: list[str] = []
    found = verify(checkpoint, seen.append)
    tensors = load_file(checkpoint / SHARD)
    layers = {name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")}
    assert Q in layers
    files = [str(p.relative_to(checkpoint)) for p in checkpoint.rglob("*") if p.is_file()]
    assert found == (len(layers), len(tensors), len(files) - 1)  # the hashes have none
    assert set(seen) == layers | set(files) - {SUMS}
    assert "code/tokenizer.py" in seen


def test_hashes_are_those_of_coreutils(checkpoint: Path) -> None:
    if not shutil.which("sha256sum"):
        pytest.skip("needs sha256sum")
    subprocess.run(
        ["sha256sum", "--check", "--strict", "--quiet", SUMS], cwd=checkpoint, check=True
    )


def test_several_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of one layer may lie in two files."""
    monkeypatch.setattr(shards, "SHARD_BYTES", 20_000)
    sources.save_model(tmp_path / "source", sources.dense())
    quantize_model(str(tmp_path / "source"), tmp_path / "out")
    parts = [load_file(path) for path in (tmp_path / "out").glob("*.safetensors")]
    assert any(f"{Q}.qweight" in part and f"{Q}.group_scale" not in part for part in parts)
    assert verify(tmp_path / "out").tensors == sum(map(len, parts))


@pytest.mark.parametrize("name", [SHARD, "config.json", "code/tokenizer.py"])
def test_a_change_is_found(checkpoint: Path, name: str) -> None:
    content = (checkpoint / name).read_bytes()
    changed = content[:-1] + bytes([content[-1] ^ 1]) if name == SHARD else content + b" "
    (checkpoint / name).write_bytes(changed)
    message = complaint(checkpoint)
    assert name in message and "SHA-256 differs" in message


def test_a_missing_file_is_found(checkpoint: Path) -> None:
    (checkpoint / "code" / "tokenizer.py").unlink()
    assert "code/tokenizer.py is missing" in complaint(checkpoint)


@pytest.mark.parametrize("line", ["abc  config.json", "0" * 64, f"{'0' * 64} config.json"])
def test_bad_line_of_hashes(checkpoint: Path, line: str) -> None:
    (checkpoint / SUMS).write_text(f"{line}\n")
    assert f"{SUMS}: line 1" in complaint(checkpoint)


def test_hashes_that_lead_outside(checkpoint: Path) -> None:
    digest = hashlib.sha256(b"").hexdigest()
    (checkpoint / SUMS).write_text(f"{digest}  ../outside\n")
    assert "leads outside" in complaint(checkpoint)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["model.norm.weight", f"{Q}.bias", "lm_head.weight"])
def test_unquantized_values_are_finite(checkpoint: Path, name: str, value: float) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name].view(-1)[-1] = value

    rewrite(checkpoint, change)
    message = complaint(checkpoint)
    assert SHARD in message and name in message and "NaN or infinity" in message


@pytest.mark.parametrize(
    ("part", "value", "problem"),
    [
        ("channel_scale", 0.0, "finite and positive"),
        ("channel_scale", torch.nan, "finite and positive"),
        ("group_scale", 30000, "above max_group_scale 255"),
    ],
)
def test_values_of_a_layer(checkpoint: Path, part: str, value: float, problem: str) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[f"{Q}.{part}"].view(-1)[3] = value

    rewrite(checkpoint, change)
    message = complaint(checkpoint)
    assert SHARD in message and f"{Q}.{part}" in message and problem in message


def test_checkpoint_without_hashes(checkpoint: Path) -> None:
    (checkpoint / SUMS).unlink()
    assert verify(checkpoint).files == 0


def test_command(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["intscale", "verify", str(checkpoint)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code
    printed = capsys.readouterr().out
    assert "In order" in printed and f"agree with {SUMS}" in printed
    (checkpoint / "config.json").unlink()
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert str(stop.value.code).startswith("intscale: error: ")


def test_hashes_that_are_no_text(checkpoint: Path) -> None:
    (checkpoint / SUMS).write_bytes(b"\xff\xfe\n")
    assert f"{SUMS}: line 1 is not a hash and a name" in complaint(checkpoint)
