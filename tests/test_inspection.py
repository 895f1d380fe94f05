"""`intscale inspect`: sizes and tensor parallelism from headers, against what is really done."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import sources
import torch

from vllm_intscale import cli
from vllm_intscale.checkpoint import read_headers
from vllm_intscale.errors import IntScaleError
from vllm_intscale.format import CheckpointConfig, LayerScheme
from vllm_intscale.inspection import Inspection, inspect_model
from vllm_intscale.quantize import convert_model, quantize_model

MOE = "model.layers.0.mlp"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    names = ("gate_proj", "up_proj", "down_proj")
    tensors = sources.separate_experts(sources.fused_experts(), MOE, names)
    sources.save_model(
        tmp_path / "source", tensors, shards=2, num_attention_heads=4, num_key_value_heads=2
    )
    return tmp_path / "source"


def test_sizes_are_those_that_quantizing_gives(source: Path, tmp_path: Path) -> None:
    before = inspect_model(str(source), [1])
    quantize_model(str(source), tmp_path / "out", CheckpointConfig())
    after = inspect_model(str(tmp_path / "out"), [1])
    files = (tmp_path / "out").glob("*.safetensors")
    headers = read_headers(tmp_path / "out").values()
    assert after.stored_bytes == sum(tensor.nbytes for tensor in headers)
    assert 0 < sum(f.stat().st_size for f in files) - after.stored_bytes < 20_000  # headers
    assert before.intscale_bytes == after.stored_bytes == after.intscale_bytes
    assert before.stored_bytes == sum(t.nbytes for t in read_headers(source).values())
    assert before.layers == after.layers == {"W4A8 g128": 2, "W4A8 g32": 9}
    assert (before.quantized, after.quantized) == (False, True)
    assert before.left == {"embedding": 1, "output head": 1, "not a linear layer": 3} | {
        "router gate": 1
    }


@pytest.mark.parametrize("tp_size", [1, 2, 4, 8, 11, 16])
def test_splits_agree_with_the_loader(source: Path, tp_size: int) -> None:
    loading = pytest.importorskip("vllm_intscale.loading")
    (ranks,) = inspect_model(str(source), [tp_size]).ranks
    k = sources.INNER  # of the experts' down_proj, in groups of 32
    try:
        scheme = loading.partition_scheme("x", LayerScheme(group_size=32), k, tp_size)
    except IntScaleError as error:
        assert ranks.problems and not ranks.split
        if 4 % tp_size == 0:  # otherwise the heads are what is named
            (problem,) = (line for line in ranks.problems if line.startswith("down_proj"))
            assert problem.removeprefix("down_proj: ") in str(error)
            assert ranks.remedy == "use --tensor-parallel-size 1 or --enable-expert-parallel"
    else:
        assert scheme.group_size == 32
        assert bool(ranks.problems) == (4 % tp_size > 0)


def test_groups_that_ranks_cut(tmp_path: Path) -> None:
    tensors = {
        "model.layers.0.mlp.down_proj.weight": sources.random_weight(256, 384),
        "model.layers.0.self_attn.o_proj.weight": sources.random_weight(256, 256),
    }
    sources.save_model(tmp_path, tensors, num_attention_heads=8, num_key_value_heads=3)
    one, two, eight = inspect_model(str(tmp_path), [1, 2, 8]).ranks
    assert (one.problems, one.split) == ([], [])
    assert two.problems == ["3 key-value heads can be neither divided nor repeated for 2"]
    sources.change_json(tmp_path / "config.json", num_key_value_heads=8)
    one, two, eight = inspect_model(str(tmp_path), [1, 2, 8]).ranks
    assert two.split == ["1 x down_proj in groups of 64"]
    assert eight.problems == [
        "down_proj: K = 384 over 8 tensor-parallel ranks gives 48 input channels each, "
        "not a multiple of 32"
    ]
    assert eight.remedy == "use --tensor-parallel-size 4"


def test_nothing_but_headers_comes_from_the_hub(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def metadata(repo: str, revision: str | None) -> SimpleNamespace:
        assert (repo, revision) == ("org/model", "main")
        files: dict[str, SimpleNamespace] = {}
        for tensor in read_headers(source).values():
            file = files.setdefault(tensor.file.name, SimpleNamespace(tensors={}))
            file.tensors[tensor.name] = SimpleNamespace(
                dtype=tensor.dtype, shape=list(tensor.shape)
            )
        return SimpleNamespace(files_metadata=files)

    def download(repo: str, file: str, revision: str | None) -> str:
        assert (repo, file, revision) == ("org/model", "config.json", "main")
        return str(source / file)

    monkeypatch.setattr("huggingface_hub.get_safetensors_metadata", metadata)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    found = inspect_model("org/model", [1, 2], "main")
    assert found == inspect_model(str(source), [1, 2])._replace(model="org/model")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: 1 / 0)
    with pytest.raises(IntScaleError, match="org/model is not a folder, and the hub has no such"):
        inspect_model("org/model", [1])


@pytest.mark.parametrize("name", ["gptq", "awq_asym", "compressed_tensors"])
def test_int4_of_other_tools(name: str, tmp_path: Path) -> None:
    source = Path(__file__).parent / "packed" / name
    found = inspect_model(str(source), [1])
    convert_model(str(source), tmp_path / "out")
    after = inspect_model(str(tmp_path / "out"), [1])
    assert (found.intscale_bytes, found.layers) == (after.stored_bytes, after.layers)
    assert found.stored_bytes == sum(t.nbytes for t in read_headers(source).values())
    assert not found.quantized
    with pytest.raises(IntScaleError, match="intscale convert"):  # by `quantize --dry-run`
        inspect_model(str(source), [1], wanted=CheckpointConfig())


def test_an_empty_tensor(tmp_path: Path) -> None:
    sources.save_model(tmp_path, sources.dense())
    without = inspect_model(str(tmp_path), [1])
    sources.change_tensors(tmp_path, {"empty": torch.empty(0, 4)})
    found = inspect_model(str(tmp_path), [1])
    assert found.intscale_bytes == without.intscale_bytes
    assert found.left["not a linear layer"] == without.left["not a linear layer"] + 1


def test_broken_checkpoint(source: Path, tmp_path: Path) -> None:
    quantize_model(str(source), tmp_path / "out", CheckpointConfig())
    sources.change_json(tmp_path / "out" / "config.json", quantization_config={"bits": 3})
    with pytest.raises(IntScaleError, match="quant_method '' cannot be converted"):
        inspect_model(str(tmp_path / "out"), [1])
    broken = {"quant_method": "intscale", "format_version": 1, "bits": 3}
    sources.change_json(tmp_path / "out" / "config.json", quantization_config=broken)
    with pytest.raises(IntScaleError, match=r"config\.json: quantization_config"):
        inspect_model(str(tmp_path / "out"), [1])


def test_command(
    source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["intscale", "inspect", str(source), "--tp", "1,3"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code
    *lines, summary = capsys.readouterr().out.splitlines()
    assert sorted(lines[1].split()[1:7]) == sorted(["2", "W4A8", "g128,", "9", "W4A8", "g32,"])
    assert lines[-1] == (
        "--tp 3      4 attention heads cannot be divided by 3; use --tensor-parallel-size 1"
    )
    assert Inspection(**json.loads(summary)).layers == {"W4A8 g128": 2, "W4A8 g32": 9}

    monkeypatch.setattr(sys, "argv", ["intscale", "inspect", str(source), "--tp", "1,two"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert str(stop.value.code).startswith("intscale: error: --tp 1,two: whole numbers")


def test_dry_run(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It says what quantizing then does, with the same options, and writes nothing."""
    out = tmp_path / "out"
    options = [str(source), str(out), "--group-size", "32", "--ignore", "re:.*[qk]_proj"]
    for extra in (["--dry-run"], []):
        monkeypatch.setattr(sys, "argv", ["intscale", "quantize", *options, *extra])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert not stop.value.code
        assert out.exists() == (not extra)
        if extra:
            printed = capsys.readouterr().out
            assert "Layers      9 W4A8 g32, " in printed and "Disk        " in printed
            (size,) = (line.split(", ")[1] for line in printed.splitlines() if "once" in line)
    found = inspect_model(str(out), [1])
    assert found.layers == {"W4A8 g32": 9}
    assert size == f"{found.stored_bytes / 2**20:.1f} MiB once quantized"

    monkeypatch.setattr(sys, "argv", ["intscale", "quantize", *options, "--dry-run"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert f"{out} exists; remove it" in str(stop.value.code)
