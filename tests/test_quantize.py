"""The quantizer: its arithmetic, the tensors and files it writes, its memory, its command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import sources
import torch

from vllm_intscale.checkpoint import validate_checkpoint
from vllm_intscale.format import (
    ACCUMULATOR_MAX,
    CheckpointConfig,
    LayerScheme,
    accumulator_bound,
    validate_layer,
)
from vllm_intscale.packing import unpack_codes
from vllm_intscale.quantize import Progress, quantize_model, shards, stream
from vllm_intscale.quantize.rtn import heuristic_amplifier, quantize_rows, smallest_scale

DOWN = "model.layers.0.mlp.down_proj"
GATE_UP = ("model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj")
Q = "model.layers.0.self_attn.q_proj"
QWEN_NAMES = ("gate_proj", "up_proj", "down_proj")


def naive_rtn(
    weight: torch.Tensor, group_size: int, bits: int, amplifier: str | int, max_scale: int
) -> np.ndarray:
    """Round to nearest, spelled out in float64: what the checkpoint must stand for."""
    w = weight.double().numpy()
    largest = 2 ** (bits - 1) - 1
    scale = np.abs(w.reshape(len(w), -1, group_size)).max(axis=2) / largest
    if amplifier == "channel":
        channel = (scale.max(axis=1) / max_scale).astype(np.float32).astype(np.float64)
    elif amplifier == "heuristic":
        power = 1.0
        while scale.min() * power < 1:
            power *= 2
        channel = np.full(len(w), 1 / power)
    else:
        channel = np.full(len(w), np.float64(np.float32(1 / int(amplifier))))
        scale = scale * int(amplifier) * channel[:, None]
    whole = np.where(scale > 0, np.maximum(np.rint(scale / channel[:, None]), 1), 0)
    step = whole * channel[:, None]
    step = np.repeat(step, group_size, axis=1)
    codes = np.clip(np.rint(w / np.where(step > 0, step, np.inf)), -largest - 1, largest)
    return codes * step


@pytest.mark.parametrize("amplifier", ["channel", "heuristic", 1024])
@pytest.mark.parametrize("bits", [4, 8])
def test_written_weights_equal_a_naive_computation(
    tmp_path: Path, amplifier: str | int, bits: int
) -> None:
    tensors = sources.save_model(tmp_path / "source", sources.dense(), shards=2)
    config = CheckpointConfig(bits=bits, amplifier=amplifier)  # type: ignore[arg-type]
    quantize_model(str(tmp_path / "source"), tmp_path / "out", config)
    written = sources.read_all(tmp_path / "out")
    for name, group_size in (
        ("self_attn.q_proj", 128),
        ("mlp.up_proj", 128),
        ("mlp.down_proj", 32),
    ):
        layer = f"model.layers.0.{name}"
        expected = naive_rtn(tensors[f"{layer}.weight"], group_size, bits, amplifier, 255)
        assert np.array_equal(sources.dequantize(written, layer, bits), expected), layer


def test_one_nibble_counts(tmp_path: Path) -> None:
    sources.save_model(tmp_path / "source", sources.dense())
    quantize_model(str(tmp_path / "source"), tmp_path / "out")
    written = sources.read_all(tmp_path / "out")
    before = sources.dequantize(written, Q)
    written[f"{Q}.qweight"][5, 3] ^= 1 << 8  # the third code of a word
    changed = np.argwhere(sources.dequantize(written, Q) != before)
    assert changed.tolist() == [[5, 3 * 8 + 2]]


def test_what_patterns_match_is_spelled_out(tmp_path: Path) -> None:
    """The first that matches counts, as for the patterns; and none is written."""
    sources.save_model(tmp_path / "source", sources.dense(), hidden_size=256)
    eight, coarse = {"bits": 8, "max_group_scale": 1}, {"max_group_scale": 15}
    patterns = {r"re:model\.layers\.0\.self_attn\..*": eight, "re:.*_proj": coarse}
    config = CheckpointConfig(overrides={**patterns, DOWN: eight})
    quantize_model(str(tmp_path / "source"), tmp_path / "out", config)
    written = validate_checkpoint(tmp_path / "out").overrides
    assert written == {
        **dict.fromkeys((Q, Q.replace("q_proj", "k_proj")), eight),
        **dict.fromkeys(GATE_UP, coarse),
        DOWN: {**eight, "group_size": 32},
    }


@pytest.mark.parametrize(
    "pattern",
    [r"re:.*language_model\.layers\.0\.mlp\.down_proj", r"re:.*\.mlp\.down_proj", "re:.*down_proj"],
)
def test_overrides_survive_the_names_of_vllm(tmp_path: Path, pattern: str) -> None:
    """Where it renames the first parts of a model's layers, as of Qwen2.5-VL's."""
    plugin = pytest.importorskip("vllm_intscale.plugin")
    from vllm.model_executor.models.utils import WeightsMapper

    prefixes = {"model.language_model.": "language_model.model."}
    tensors = sources.dense() | {f"{DOWN}.weight": sources.random_weight(256, 384)}
    tensors = {
        n.replace("model.layers", "model.language_model.layers"): tensors[n] for n in tensors
    }
    sources.save_model(tmp_path / "source", tensors)
    config = CheckpointConfig(overrides={pattern: {"bits": 8, "max_group_scale": 1}})
    quantize_model(str(tmp_path / "source"), tmp_path / "out", config)
    written = validate_checkpoint(tmp_path / "out")
    served = plugin.IntScaleConfig(written)
    served.apply_vllm_mapper(WeightsMapper(orig_to_new_prefix=prefixes))
    for name, bits in (("down_proj", 8), ("up_proj", 4)):
        stored = written.scheme_of(f"model.language_model.layers.0.mlp.{name}")
        assert stored and stored.bits == bits
        assert served.checkpoint.scheme_of(f"language_model.model.layers.0.mlp.{name}") == stored


@pytest.mark.parametrize("pattern", ["re:.*down_proj", DOWN])
def test_config_names_every_exception(tmp_path: Path, pattern: str) -> None:
    tensors = sources.save_model(tmp_path / "source", sources.dense(), hidden_size=256)
    config = CheckpointConfig(
        ignore=("re:.*(gate|up)_proj",), overrides={pattern: {"max_group_scale": 1000}}
    )
    report = quantize_model(str(tmp_path / "source"), tmp_path / "out", config)
    written = validate_checkpoint(tmp_path / "out")
    assert written.ignore == ("lm_head", *GATE_UP)
    assert set(written.overrides) == {DOWN}
    assert written.scheme_of(DOWN) == LayerScheme(group_size=32, max_group_scale=1000)
    assert written.scheme_of(Q) == LayerScheme()
    assert written.source.keys() == {"model", "version", "method"}
    assert written.source["method"] == "round to nearest"
    assert json.loads((tmp_path / "out/config.json").read_text())["hidden_size"] == 256
    assert dict(report.left) == {
        "output head": ["lm_head"],
        "embedding": ["model.embed_tokens"],
        "not a linear layer": [
            "model.layers.0.input_layernorm",
            f"{Q}.bias",
            "model.norm",
        ],
        "--ignore": list(GATE_UP),
    }
    stored = sources.read_all(tmp_path / "out")
    for layers in report.left.values():
        for layer in layers:
            name = layer if layer in tensors else f"{layer}.weight"
            assert torch.equal(stored[name], tensors[name])
    assert report.layers == 3
    assert report.written_bytes == sum(t.numel() * t.element_size() for t in stored.values())


def test_every_other_file_is_copied(tmp_path: Path) -> None:
    source = tmp_path / "source"
    sources.save_model(source, sources.dense(), shards=2)
    kept = ["tokenizer.json", "chat_template.jinja", "LICENSE", "modeling_x.py", "sub/deep/a.txt"]
    dropped = [
        *("pytorch_model.bin", "x.pt", "x.pth", "x.gguf", "sub/x.onnx", "consolidated.safetensors"),
        *(".git/config", ".cache/x", "sub/.hidden", "pytorch_model.bin.index.json"),
    ]
    for name in kept + dropped:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)
    quantize_model(str(source), tmp_path / "out")
    found = {
        str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file()
    }
    own = {"config.json", "model.safetensors", "SHA256SUMS", "report.json", "report.html"}
    assert found == {*kept, *own}
    assert all((tmp_path / "out" / name).read_text() == name for name in kept)


def test_neither_blocks_nor_shards_change_a_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source"
    tensors = sources.dense()
    tensors["scalar"] = torch.tensor(3.0)
    tensors["empty"] = torch.empty(0, 4)
    tensors["odd"] = torch.arange(3, dtype=torch.int8)
    tensors["model.conv.weight"] = torch.randn(5, 3, 2)
    sources.save_model(source, tensors, shards=3)
    quantize_model(str(source), tmp_path / "out")
    monkeypatch.setattr(stream, "BLOCK_ELEMENTS", 7 * sources.HIDDEN)
    quantize_model(str(source), tmp_path / "blocks")
    single = (tmp_path / "out/model.safetensors").read_bytes()
    assert (tmp_path / "blocks/model.safetensors").read_bytes() == single

    monkeypatch.setattr(shards, "SHARD_BYTES", 30_000)
    quantize_model(str(source), tmp_path / "shards")
    whole, sharded = sources.read_all(tmp_path / "out"), sources.read_all(tmp_path / "shards")
    assert whole.keys() == sharded.keys()
    assert all(torch.equal(whole[name], sharded[name]) for name in whole)
    assert all(torch.equal(whole[name], tensors[name]) for name in ("scalar", "empty", "odd"))
    index = json.loads((tmp_path / "shards/model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == whole.keys()
    assert len(set(index["weight_map"].values())) > 3
    sizes = sum(t.numel() * t.element_size() for t in whole.values())
    assert index["metadata"]["total_size"] == sizes
    validate_checkpoint(tmp_path / "shards")


@pytest.mark.parametrize("suffix", ["", ".weight"])
def test_fused_experts_equal_separate_ones(tmp_path: Path, suffix: str) -> None:
    mlp = "model.layers.0.mlp"
    fused = sources.fused_experts(mlp)
    sources.save_model(
        tmp_path / "separate",
        sources.separate_experts(fused, mlp, QWEN_NAMES),
        model_type="qwen3_moe",
    )
    renamed = {name + suffix if ".experts." in name else name: t for name, t in fused.items()}
    sources.save_model(tmp_path / "fused", renamed, model_type="qwen3_moe")
    for kind in ("separate", "fused"):
        quantize_model(str(tmp_path / kind), tmp_path / f"q-{kind}")
    separate, fused = (
        sources.read_all(tmp_path / "q-separate"),
        sources.read_all(tmp_path / "q-fused"),
    )
    assert f"{mlp}.experts.2.up_proj.qweight" in fused
    assert separate.keys() == fused.keys()
    assert all(torch.equal(separate[name], fused[name]) for name in fused)
    config = validate_checkpoint(tmp_path / "q-fused")
    assert config.ignore == ("lm_head", f"{mlp}.gate")
    # The experts are served as one: down_proj's K allows 32 only, so all of them have 32.
    for projection in QWEN_NAMES:
        assert config.scheme_of(f"{mlp}.experts.1.{projection}") == LayerScheme(group_size=32)


def test_fused_mixtral_gets_its_usual_names(tmp_path: Path) -> None:
    fused = sources.fused_experts()
    sources.save_model(tmp_path / "fused", fused, model_type="mixtral")
    moe = "model.layers.0.block_sparse_moe"
    separate = sources.separate_experts(fused, moe, ("w1", "w3", "w2"))
    sources.save_model(tmp_path / "separate", separate, model_type="mixtral")
    for kind in ("separate", "fused"):
        quantize_model(str(tmp_path / kind), tmp_path / f"q-{kind}")
    left, right = sources.read_all(tmp_path / "q-separate"), sources.read_all(tmp_path / "q-fused")
    assert {f"{moe}.experts.0.w1.qweight", f"{moe}.gate.weight"} < right.keys()
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_ignored_fused_experts_stay_float_under_usual_names(tmp_path: Path) -> None:
    fused = sources.save_model(tmp_path / "s", sources.fused_experts(), model_type="qwen3_moe")
    quantize_model(
        str(tmp_path / "s"), tmp_path / "out", CheckpointConfig(ignore=(r"re:.*\.experts\..*",))
    )
    stored = sources.read_all(tmp_path / "out")
    experts = "model.layers.0.mlp.experts"
    stack = fused[f"{experts}.gate_up_proj"]
    assert torch.equal(stored[f"{experts}.1.up_proj.weight"], stack[1, sources.INNER :])
    assert f"{experts}.2.down_proj" in validate_checkpoint(tmp_path / "out").ignore


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("visual.blocks.0.attn.qkv", "vision or audio"),
        ("model.vision_tower.layers.0.q_proj", "vision or audio"),
        ("audio_tower.layers.0.fc1", "vision or audio"),
        ("model.multi_modal_projector.linear_1", "vision or audio"),
        ("mtp.layers.0.mlp.up_proj", "multi-token prediction"),
        ("model.layers.1.mlp.up_proj", "multi-token prediction"),  # num_hidden_layers is 1
        ("model.layers.1.eh_proj", "multi-token prediction"),
        ("transformer.wte", "embedding"),
        ("language_model.lm_head", "output head"),
        ("output", "output head"),
        ("score", "output head"),
        ("model.layers.0.mlp.gate", "router gate"),
        ("model.layers.0.mlp.shared_expert_gate", "router gate"),
        ("model.layers.0.block_sparse_moe.router.layer", "router gate"),
        ("model.layers.0.mlp.gate_proj", None),
        ("model.layers.0.mlp.shared_expert.gate_proj", None),
        ("model.layers.0.attention.output.dense", None),
        ("model.language_model.layers.0.linear_attn.in_proj_qkvz", None),
    ],
)
def test_what_is_left_unquantized(tmp_path: Path, name: str, reason: str | None) -> None:
    tensors = {
        f"{name}.weight": sources.random_weight(32, 64),
        f"{Q}.weight": sources.dense()[f"{Q}.weight"],
    }
    sources.save_model(tmp_path / "source", tensors)
    report = quantize_model(str(tmp_path / "source"), tmp_path / "out")
    assert dict(report.left) == ({reason: [name]} if reason else {})
    assert report.layers == 2 - len(report.left)
    config = validate_checkpoint(tmp_path / "out")
    assert config.ignore == ((name,) if reason and reason != "embedding" else ())


def test_prediction_layers_are_ignored_under_the_names_that_vllm_gives_them(tmp_path: Path) -> None:
    """MiMo's, which are decoder layers there, behind the last."""
    name = "model.mtp_layers.1.mlp.down_proj"
    tensors = sources.dense() | {f"{name}.weight": sources.random_weight(32, 64)}
    sources.save_model(tmp_path / "source", tensors)
    quantize_model(str(tmp_path / "source"), tmp_path / "out")
    config = validate_checkpoint(tmp_path / "out")
    assert name in config.ignore
    assert config.scheme_of("model.layers.2.mlp.down_proj") is None
    assert config.scheme_of("model.layers.0.mlp.down_proj")


def test_channel_amplifier_is_lowered_until_no_accumulator_overflows() -> None:
    weight = torch.where(torch.randn(6, 4096) > 0, 1.0, -1.0)
    weight[3] = torch.randn(4096) * 0.01
    scheme = LayerScheme(max_group_scale=32767)
    rows = quantize_rows("w", weight, scheme, "channel")
    tensors = {name: getattr(rows, name) for name in ("qweight", "group_scale", "channel_scale")}
    validate_layer("w", tensors, scheme, 4096)
    bound = accumulator_bound(unpack_codes(rows.qweight, 4), rows.group_scale)
    assert rows.bound == bound.max() <= ACCUMULATOR_MAX
    assert bound.min() > 0.95 * ACCUMULATOR_MAX  # and no further than that
    back = unpack_codes(rows.qweight, 4) * rows.group_scale.repeat_interleave(128, 1).double()
    assert (back * rows.channel_scale[:, None] - weight)[0].abs().max() < 2e-3
    alone = quantize_rows("w", weight[3:4], scheme, "channel")
    assert torch.equal(alone.qweight, rows.qweight[3:4])  # rows do not depend on each other


def test_zero_groups_and_small_groups() -> None:
    weight = torch.randn(4, 512)
    weight[1] = 0
    weight[2, 128:256] = 0
    weight[3, :128] *= 1e-6
    rows = quantize_rows("w", weight, LayerScheme(), "channel")
    codes = unpack_codes(rows.qweight, 4)
    assert rows.lost_groups == 0
    assert rows.group_scale[1].tolist() == [1, 1, 1, 1]
    assert rows.group_scale[2, 1] == 1
    assert rows.group_scale[3, 0] == 1
    assert not codes[1].any() and not codes[2, 128:256].any() and not codes[3, :128].any()
    assert torch.equal(
        rows.qweight[1], torch.full((64,), 0x88888888 - (1 << 32), dtype=torch.int32)
    )
    assert bool((rows.channel_scale >= 2.0**-126).all())


def test_one_scale_a_channel() -> None:
    """8 bits and group scales of 1: what W8A8 per channel is elsewhere."""
    weight = torch.randn(6, 512)
    weight[:, :128] *= 0.01
    rows = quantize_rows("w", weight, LayerScheme(bits=8, max_group_scale=1), "channel")
    assert (rows.group_scale == 1).all()
    step = weight.abs().amax(1, keepdim=True) / 127
    error = (unpack_codes(rows.qweight, 8) * rows.channel_scale[:, None] - weight).abs()
    assert (error <= 0.51 * step).all()


@pytest.mark.parametrize("magnitude", [1e-45, 1e-38, 1e-30, 1e30, 3e38])
def test_extreme_magnitudes(magnitude: float) -> None:
    weight = torch.randn(8, 256).clamp(-1, 1) * magnitude
    rows = quantize_rows("w", weight, LayerScheme(), "channel")
    tensors = {name: getattr(rows, name) for name in ("qweight", "group_scale", "channel_scale")}
    validate_layer("w", tensors, LayerScheme(), 256)


def test_heuristic_amplifier_lifts_the_smallest_scale_to_one() -> None:
    weight = torch.full((4, 256), 7.0 * 0.3)
    weight[2, :128] = 7.0 * 0.01
    weight[3, 128:] = 0
    for factor, expected in ((1, 128), (1000, 1), (0, 1)):  # 0.01 * 128 >= 1 > 0.01 * 64
        smallest = smallest_scale("w", weight * factor, LayerScheme())
        assert heuristic_amplifier(smallest) == expected


def test_nothing_is_left_after_an_interrupt(tmp_path: Path) -> None:
    sources.save_model(tmp_path / "source", sources.dense())

    def interrupt(progress: Progress) -> None:
        assert (tmp_path / "out.partial/model.safetensors").exists()
        if progress.tensors == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_model(str(tmp_path / "source"), tmp_path / "out", on_progress=interrupt)
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


@pytest.mark.slow
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """3.5 GiB in one tensor of 2 GiB and smaller ones, in at most 1 GiB of anonymous memory."""
    shapes = {"model.layers.0.mlp.up_proj.weight": (1 << 18, 4096)}  # 2 GiB
    shapes |= {f"model.layers.0.self_attn.{p}_proj.weight": (1 << 15, 4096) for p in "qkvo"}
    shapes["model.embed_tokens.weight"] = (1 << 16, 4096)
    source = tmp_path / "source"
    source.mkdir()
    header, end = {}, 0
    for name, (n, k) in shapes.items():
        header[name] = {"dtype": "BF16", "shape": [n, k], "data_offsets": [end, end + 2 * n * k]}
        end += 2 * n * k
    text = json.dumps(header).encode()
    random = np.random.default_rng(0).integers(0x3C00, 0x3F00, 1 << 22, dtype=np.uint16).tobytes()
    with (source / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        start = file.tell()
        file.write(random)  # the rest is a hole: zeros that cost no disk
        file.truncate(start + end)
    (source / "config.json").write_text('{"model_type": "llama"}')
    arguments = ["quantize", str(source), str(tmp_path / "out")]
    main = "from vllm_intscale.cli import main; main()"
    process = subprocess.Popen([sys.executable, "-c", main, *arguments])
    peak = 0
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text()
        anonymous = [line.split()[1] for line in status.splitlines() if line.startswith("RssAnon")]
        peak = max(peak, *(int(kib) << 10 for kib in anonymous), 0)
        time.sleep(0.02)
    assert process.returncode == 0
    assert os.path.getsize(tmp_path / "out/model.safetensors") > 1 << 30
    assert peak < 1 << 30, f"{peak / 2**20:.0f} MiB"


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [32, 128])
def test_scale_search_leaves_less_error_in_every_group(bits: int, group_size: int) -> None:
    weight = sources.random_weight(40, 256, seed=8)
    weight[7] = 0
    weight[8, :group_size] = 0
    scheme = LayerScheme(bits, group_size)

    def error(search: bool) -> torch.Tensor:
        rows = quantize_rows("w", weight, scheme, "channel", search)
        codes = unpack_codes(rows.qweight, bits).unflatten(-1, (-1, group_size)).double()
        step = rows.group_scale.double() * rows.channel_scale.double()[:, None]
        groups = weight.double().unflatten(-1, (-1, group_size))
        return (groups - codes * step[..., None]).square().sum(-1)

    plain, searched = error(search=False), error(search=True)
    assert (searched <= plain).all() and not searched[7].any()
    if bits == 4:  # few large weights are worth a finer step for the others
        assert searched.sum() < 0.97 * plain.sum()


def test_scale_search_is_in_the_config(tmp_path: Path) -> None:
    sources.save_model(tmp_path / "source", sources.dense())
    quantize_model(str(tmp_path / "source"), tmp_path / "out", search=True)
    method = validate_checkpoint(tmp_path / "out").source["method"]
    assert method == "round to nearest, scales searched"
