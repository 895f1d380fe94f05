"""Everything that can be wrong with what a user hands in: one line that helps, nothing left."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sources
import torch
from torch import Tensor

from vllm_intscale.checkpoint import validate_checkpoint
from vllm_intscale.errors import IntScaleError
from vllm_intscale.format import CheckpointConfig, LayerScheme, validate_layer
from vllm_intscale.quantize import quantize_model, stream

Q = "model.layers.0.self_attn.q_proj"
DOWN = "model.layers.0.mlp.down_proj"
SHARD = "model-00002-of-00002.safetensors"


def refusal(source: Path | str, out: Path, config: CheckpointConfig | None = None) -> str:
    """The one-line error of quantizing `source`, which must change nothing on disk."""
    before = sorted(out.parent.rglob("*"))
    with pytest.raises(IntScaleError) as caught:
        quantize_model(str(source), out, config)
    assert sorted(out.parent.rglob("*")) == before
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A good model in two shards."""
    sources.save_model(tmp_path / "source", sources.dense(), shards=2)
    return tmp_path / "source"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture(scope="session")
def good_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("checkpoint")
    sources.save_model(root / "source", sources.dense())
    quantize_model(str(root / "source"), root / "out")
    return root / "out"


@pytest.fixture
def checkpoint(good_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of a good checkpoint, to be spoiled."""
    return Path(shutil.copytree(good_checkpoint, tmp_path / "checkpoint"))


# The source


def test_missing_folder(tmp_path: Path, out: Path) -> None:
    assert "is not a folder; name the folder" in refusal(tmp_path / "nowhere", out)


def test_unknown_hub_id(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "cannot be reached" in refusal("nobody/no-such-model-at-all", out)


def test_folder_without_weights(tmp_path: Path, out: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "has no *.safetensors" in refusal(tmp_path / "empty", out)


def test_pickled_weights_only(tmp_path: Path, out: Path) -> None:
    folder = tmp_path / "pickled"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    torch.save({"a": torch.zeros(1)}, folder / "pytorch_model.bin")
    assert "pickled weights are never read" in refusal(folder, out)


@pytest.mark.parametrize(("text", "problem"), [(None, "is missing"), ("{", "is not JSON")])
def test_bad_config(source: Path, out: Path, text: str | None, problem: str) -> None:
    (source / "config.json").unlink()
    if text:
        (source / "config.json").write_text(text)
    assert f"config.json {problem}" in refusal(source, out)


def test_every_k_that_no_group_divides_is_named_at_once(tmp_path: Path, out: Path) -> None:
    tensors = sources.dense()
    bad = ("model.layers.0.mlp.up_proj", "model.layers.0.mlp.gate_proj")
    tensors.update({f"{name}.weight": sources.random_weight(64, 100) for name in bad})
    sources.save_model(tmp_path / "source", tensors)
    message = refusal(tmp_path / "source", out)
    assert all(f"{name}.weight (K = 100)" in message for name in bad)
    assert all(f"--ignore {name}" in message for name in bad)
    quantize_model(str(tmp_path / "source"), out, CheckpointConfig(ignore=bad))  # the remedy works


@pytest.mark.parametrize("size", [0, 4, 100, -10])
def test_truncated_shard(source: Path, out: Path, size: int) -> None:
    path = source / SHARD
    os.truncate(path, size if size >= 0 else path.stat().st_size + size)
    message = refusal(source, out)
    assert str(path) in message and "truncated" in message


def test_shard_of_the_index_is_missing(source: Path, out: Path) -> None:
    (source / SHARD).unlink()
    message = refusal(source, out)
    assert str(source / SHARD) in message and "is missing" in message


def test_tensor_of_the_index_is_missing(source: Path, out: Path) -> None:
    path = source / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["ghost.weight"] = SHARD
    path.write_text(json.dumps(index))
    message = refusal(source, out)
    assert str(source / SHARD) in message and "ghost.weight is missing" in message


@pytest.mark.parametrize("where", ["../elsewhere.safetensors", "sub/x.safetensors", 3])
def test_index_leads_outside(source: Path, out: Path, where: object) -> None:
    path = source / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {f"{Q}.weight": where}}))
    assert "is not the name of a file next to it" in refusal(source, out)


@pytest.mark.parametrize("name", [SHARD, "tokenizer.json"])
def test_link_leads_outside(source: Path, out: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "secret").write_bytes(b"")
    (source / name).unlink(missing_ok=True)
    (source / name).symlink_to(tmp_path / "secret")
    assert "leads outside of the model folder" in refusal(source, out)
    started: list[object] = []
    with pytest.raises(IntScaleError):
        quantize_model(str(source), out, on_progress=started.append)
    assert not started


def test_links_of_the_hub_cache_are_followed(source: Path, out: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123abcd"
    blobs = tmp_path / "models--a--b" / "blobs"
    shutil.copytree(source, blobs)
    snapshot.mkdir(parents=True)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    quantize_model(str(snapshot), out)
    assert validate_checkpoint(out).source["revision"] == "0123abcd"
    assert not any(path.is_symlink() for path in out.iterdir())


def test_tensor_in_two_files(source: Path, out: Path) -> None:
    (source / "model.safetensors.index.json").unlink()
    shutil.copy(source / SHARD, source / "model-copy.safetensors")
    assert "is in " in refusal(source, out)


@pytest.mark.parametrize("amplifier", ["channel", "heuristic", 64])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weight_is_not_finite(tmp_path: Path, out: Path, value: float, amplifier: Any) -> None:
    tensors = sources.dense()
    tensors[f"{DOWN}.weight"][-1, 77] = value
    sources.save_model(tmp_path / "source", tensors)
    message = refusal(tmp_path / "source", out, CheckpointConfig(amplifier=amplifier))
    assert f"model.safetensors: {DOWN}.weight holds NaN or Inf" in message


@pytest.mark.parametrize("place", ["config", "dtype"])
def test_already_quantized(tmp_path: Path, out: Path, place: str) -> None:
    tensors = sources.dense()
    config = {}
    if place == "config":
        config = {"quantization_config": {"quant_method": "gptq"}}
    else:
        tensors[f"{Q}.weight"] = tensors[f"{Q}.weight"].to(torch.float8_e4m3fn)
    sources.save_model(tmp_path / "source", tensors, **config)
    message = refusal(tmp_path / "source", out)
    assert "already quantized" in message and "unquantized original" in message


def test_already_quantized_by_a_tool_that_says_so_elsewhere(tmp_path: Path, out: Path) -> None:
    """As AutoGPTQ and AutoAWQ did: the remedy named is tried in `test_convert`."""
    source = Path(__file__).parent / "packed" / "gptq"
    shutil.copytree(source, tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    section = config.pop("quantization_config")
    (tmp_path / "source/config.json").write_text(json.dumps(config))
    (tmp_path / "source/quantize_config.json").write_text(json.dumps(section))
    message = refusal(tmp_path / "source", out)
    assert "already quantized" in message and "put there what quantize_config.json" in message


def test_depth_is_null(tmp_path: Path, out: Path) -> None:
    sources.save_model(tmp_path / "source", sources.dense(), num_hidden_layers=None)
    assert quantize_model(str(tmp_path / "source"), out).layers == 5


def test_own_output_is_refused_as_source(good_checkpoint: Path, out: Path) -> None:
    assert "method 'intscale'" in refusal(good_checkpoint, out)


@pytest.mark.parametrize("model_type", ["gpt_oss", "llama4", "gpt2"])
def test_transposed_weights(tmp_path: Path, out: Path, model_type: str) -> None:
    sources.save_model(tmp_path / "source", sources.dense(), model_type=model_type)
    message = refusal(tmp_path / "source", out)
    assert model_type in message and "transposed" in message


def test_transposed_experts_of_any_model(tmp_path: Path, out: Path) -> None:
    tensors = sources.fused_experts()
    for name in [name for name in tensors if ".experts." in name]:
        tensors[name] = tensors[name].transpose(1, 2)
    sources.save_model(tmp_path / "source", tensors, model_type="some_moe")
    message = refusal(tmp_path / "source", out)
    assert "some_moe" in message and "layout" in message


def test_unknown_stack_of_experts(tmp_path: Path, out: Path) -> None:
    tensors = sources.dense() | {
        "model.layers.0.moe.input_linear.weight": sources.random_weight(3, 64, 256)
    }
    sources.save_model(tmp_path / "source", tensors)
    assert "--ignore model.layers.0.moe.input_linear" in refusal(tmp_path / "source", out)


@pytest.mark.parametrize(
    ("ignored", "fused"),
    [
        ("mlp.experts.1.up_proj", "mlp.experts"),
        ("self_attn.k_proj", "self_attn.qkv_proj"),
    ],
)
def test_layers_that_are_served_as_one_differ(
    tmp_path: Path, out: Path, ignored: str, fused: str
) -> None:
    sources.save_model(tmp_path / "source", sources.fused_experts(), model_type="qwen3_moe")
    config = CheckpointConfig(ignore=(f"model.layers.0.{ignored}",))
    assert f"model.layers.0.{fused}: its fused parts" in refusal(tmp_path / "source", out, config)


@pytest.mark.parametrize(
    ("parts", "fused"),
    [
        (("q_a_proj", "kv_a_proj_with_mqa"), "fused_qkv_a_proj"),
        (("in_proj_qkv", "in_proj_z"), "in_proj_qkvz"),
        (("in_proj_b", "in_proj_a"), "in_proj_ba"),
        (("w1", "w3"), "gate_up_proj"),
    ],
)
def test_layers_that_some_models_serve_as_one_differ(
    tmp_path: Path, out: Path, parts: tuple[str, str], fused: str
) -> None:
    names = [f"model.layers.0.x.{part}" for part in parts]
    tensors = {f"{name}.weight": sources.random_weight(64, 256) for name in names}
    sources.save_model(tmp_path / "source", sources.dense() | tensors)
    for config in (
        CheckpointConfig(ignore=(names[0],)),
        CheckpointConfig(overrides={names[1]: {"bits": 8}}),
    ):
        message = refusal(tmp_path / "source", out, config)
        assert f"model.layers.0.x.{fused}: its fused parts" in message


def test_nothing_to_quantize(source: Path, out: Path) -> None:
    assert "no layer to quantize" in refusal(source, out, CheckpointConfig(ignore=("re:.*",)))


# The output


@pytest.mark.parametrize("name", ["out", "out.partial"])
def test_output_is_in_the_way(source: Path, out: Path, name: str) -> None:
    out.with_name(name).mkdir()
    message = refusal(source, out)
    assert name in message and "remove it" in message


@pytest.mark.parametrize("name", [".", "..", "/"])
def test_output_without_a_name(source: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(source)
    with pytest.raises(IntScaleError, match="exists; remove it or choose another output folder"):
        quantize_model(str(source), Path(name))


def test_output_inside_of_the_source(source: Path) -> None:
    assert "inside of the source" in refusal(source, source / "out")


def test_parent_of_the_output_is_missing(source: Path, tmp_path: Path) -> None:
    with pytest.raises(IntScaleError, match="create it first"):
        quantize_model(str(source), tmp_path / "no" / "out")


def test_disk_is_too_small(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 0))  # type: ignore[attr-defined]
    assert "GiB free" in refusal(source, out)


@pytest.mark.parametrize(
    ("weight", "amplifier", "problem"),
    [
        (7.0, 40000, "integer group scale 40000, above 32767"),
        (1e30, 1, "above 32767"),
        (7.0 * 30000, 1, "lets the int32 accumulator reach"),
        ([7e5, 7e-5], "heuristic", "above 32767"),
    ],
)
def test_amplifier_is_too_large(
    tmp_path: Path, out: Path, weight: Any, amplifier: Any, problem: str
) -> None:
    values = torch.tensor(weight).reshape(-1, 1).expand(-1, 512)
    tensors = {"lm_head.weight": torch.ones(2, 2), f"{Q}.weight": values}
    sources.save_model(tmp_path / "source", tensors)
    message = refusal(tmp_path / "source", out, CheckpointConfig(amplifier=amplifier))
    assert f"{Q}.weight" in message and problem in message and "--amplifier channel" in message


# The checkpoint


def complaint(folder: Path) -> str:
    """The one-line error of validating a checkpoint."""
    with pytest.raises(IntScaleError) as caught:
        validate_checkpoint(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_good_checkpoint_passes(checkpoint: Path) -> None:
    assert validate_checkpoint(checkpoint).scheme_of(Q) == LayerScheme()


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"format_version": 2}, "format_version is 2"),
        ({"format_version": None}, "format_version is None"),
        ({"colour": "red"}, "colour"),
        ({"bits": 3}, "bits"),
        ({"symmetric": False}, "symmetric"),
        ({"activation": {"bits": 4}}, "activation"),
        ({"input_transform": "hadamard"}, "input_transform"),
        ({"ignore": "lm_head"}, "a list of strings"),
        ({"overrides": ["lm_head"]}, "a dictionary of dictionaries"),
        ({"amplifier": True}, "amplifier is True"),
        ({"quant_method": "gptq"}, "no quantization_config of method intscale"),
    ],
)
def test_config_of_another_format(checkpoint: Path, changes: dict[str, Any], problem: str) -> None:
    path = checkpoint / "config.json"
    section = json.loads(path.read_text())["quantization_config"]
    sources.change_json(path, quantization_config=section | changes)
    message = complaint(checkpoint)
    assert str(path) in message and problem in message


NARROW = torch.zeros(256, 3, dtype=torch.int32)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"qweight": None}, "['qweight'] is missing"),
        ({"group_scale": None}, "['group_scale'] is missing"),
        ({"channel_scale": None}, "['channel_scale'] is missing"),
        ({"qweight": torch.zeros(256, 32, dtype=torch.int64)}, "qweight is I64"),
        ({"qweight": torch.zeros(1, 256, 32, dtype=torch.int32)}, "with 2 dimensions"),
        ({"qweight": torch.zeros(255, 32, dtype=torch.int32)}, "qweight is torch.int32 [255, 32]"),
        ({"qweight": NARROW}, "K = 24"),
        ({"group_scale": torch.zeros(256, 2, dtype=torch.float16)}, "group_scale is F16"),
        ({"group_scale": torch.zeros(256, 3, dtype=torch.int16)}, "group_scale is torch.int16"),
        ({"channel_scale": torch.tensor(1.0)}, "channel_scale is F32 []"),
        ({"channel_scale": torch.ones(255)}, "need torch.int32 [255, 32]"),
        ({"weight": torch.ones(256, 256)}, "both quantized and as"),
        ({"group_shift": torch.zeros(256, 2, dtype=torch.int8)}, "group_shift makes the layer"),
    ],
)
def test_tensor_is_missing_or_of_wrong_shape_or_dtype(
    checkpoint: Path, changes: dict[str, Tensor | None], problem: str
) -> None:
    sources.change_tensors(checkpoint, {f"{Q}.{name}": t for name, t in changes.items()})
    message = complaint(checkpoint)
    assert f"model.safetensors: {Q}" in message and problem in message


def test_orphan_scale(checkpoint: Path) -> None:
    sources.change_tensors(checkpoint, {"model.norm.group_scale": torch.ones(1)})
    assert "model.norm" in complaint(checkpoint)


def test_ignored_layer_is_stored_quantized(checkpoint: Path) -> None:
    path = checkpoint / "config.json"
    section = json.loads(path.read_text())["quantization_config"]
    sources.change_json(path, quantization_config=section | {"ignore": [Q]})
    assert f"{Q} is stored quantized" in complaint(checkpoint)


def test_truncated_checkpoint(checkpoint: Path) -> None:
    os.truncate(checkpoint / "model.safetensors", 20_000)
    assert "model.safetensors is truncated" in complaint(checkpoint)


def _nan(t: dict[str, Tensor]) -> None:
    t["channel_scale"][3] = float("nan")


def _infinite(t: dict[str, Tensor]) -> None:
    t["channel_scale"][3] = float("inf")


def _zero(t: dict[str, Tensor]) -> None:
    t["channel_scale"][3] = 0


def _negative(t: dict[str, Tensor]) -> None:
    t["channel_scale"][3] *= -1


def _beyond_maximum(t: dict[str, Tensor]) -> None:
    t["group_scale"][3, 0] = -256


def _beyond_bound(t: dict[str, Tensor]) -> None:
    t["group_scale"][:] = 32767


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (_nan, "channel_scale"),
        (_infinite, "channel_scale"),
        (_zero, "channel_scale"),
        (_negative, "channel_scale"),
        (_beyond_maximum, "holds 256 in magnitude"),
        (_beyond_bound, "int32 accumulator reach"),
    ],
)
def test_values_of_a_layer(
    good_checkpoint: Path, spoil: Callable[[dict[str, Tensor]], None], problem: str
) -> None:
    stored = sources.read_all(good_checkpoint)
    names = ("qweight", "group_scale", "channel_scale")
    tensors = {name: stored[f"{Q}.{name}"] for name in names}
    scheme = LayerScheme()
    validate_layer(Q, tensors, scheme, sources.HIDDEN)
    spoil(tensors)
    if spoil is _beyond_bound:
        scheme = dataclasses.replace(scheme, max_group_scale=32767)
    with pytest.raises(IntScaleError) as caught:
        validate_layer(Q, tensors, scheme, sources.HIDDEN)
    assert "\n" not in str(caught.value)
    assert Q in str(caught.value) and problem in str(caught.value)
