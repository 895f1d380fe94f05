"""Conversion of checkpoints that other tools wrote (`tests/packed`), and of damaged ones."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vllm_intscale import sm90_gemm
from vllm_intscale.checkpoint import validate_checkpoint
from vllm_intscale.errors import IntScaleError
from vllm_intscale.format import CheckpointConfig
from vllm_intscale.packing import unpack_codes
from vllm_intscale.quantize import convert_model

PACKED = Path(__file__).parent / "packed"
SYMMETRIC = ("gptq", "awq", "compressed_tensors", "gptqmodel", "gptqmodel_v2")
ASYMMETRIC = ("gptq_asym", "awq_asym", "auto_round_asym", "compressed_tensors_asym")
LAYER = "model.layers.0.mlp.gate_proj"
LAYERS = [f"model.layers.0.self_attn.{p}_proj" for p in "qkvo"]
LAYERS += [f"model.layers.0.mlp.{p}_proj" for p in ("gate", "up", "down")]


def nibbles(words: Tensor, axis: int) -> np.ndarray:
    """Eight numbers 0..15 for each word, along `axis`, lowest bits first."""
    bits = words.numpy().astype(np.int64) & 0xFFFFFFFF
    parts = np.stack([(bits >> (4 * i)) & 15 for i in range(8)], axis=axis + 1)
    shape = list(bits.shape)
    shape[axis] *= 8
    return parts.reshape(shape)


def source_weight(source: str, tensors: dict[str, Tensor], layer: str) -> tuple[np.ndarray, ...]:
    """codes less zero point, and scales, [N, K] each, of a layer as its tool stored it."""
    t = {n.removeprefix(f"{layer}."): v for n, v in tensors.items() if n.startswith(f"{layer}.")}
    if source.startswith("compressed"):
        codes, scale = nibbles(t["weight_packed"], 1), t["weight_scale"].double().numpy()
        zero = np.full(scale.shape, 8)
        if "weight_zero_point" in t:
            zero = nibbles(t["weight_zero_point"], 0)[: len(scale)]
    elif source.startswith("awq"):
        order = np.argsort(
            [0, 2, 4, 6, 1, 3, 5, 7]
        )  # a word's nibbles are its columns 0, 2, 4, ...
        codes, zero = (
            nibbles(t[name], 1).reshape(t[name].shape[0], -1, 8)[..., order] for name in PARTS
        )
        codes, zero = codes.reshape(len(codes), -1).T, zero.reshape(len(zero), -1).T
        scale = t["scales"].double().numpy().T
    else:
        codes, zero = nibbles(t["qweight"], 0).T, nibbles(t["qzeros"], 1).T
        zero = zero if source in ("auto_round_asym", "gptqmodel_v2") else zero + 1
        scale = t["scales"].double().numpy().T
    group_of = np.arange(codes.shape[1]) // 128
    if "g_idx" in t:
        group_of = t["g_idx"].numpy()
    return codes - zero[:, group_of], scale[:, group_of]


PARTS = ("qweight", "qzeros")


def converted_weight(tensors: dict[str, Tensor], layer: str) -> tuple[np.ndarray, ...]:
    """codes and what they are multiplied by, [N, K] each."""
    codes = unpack_codes(tensors[f"{layer}.qweight"], 4).numpy()
    step = tensors[f"{layer}.group_scale"].double() * tensors[f"{layer}.channel_scale"][:, None]
    return codes, step.repeat_interleave(codes.shape[1] // step.shape[1], dim=1).numpy()


def relative(error: np.ndarray, of: np.ndarray) -> float:
    return float(np.linalg.norm(error) / np.linalg.norm(of))


@pytest.mark.parametrize("source", SYMMETRIC)
def test_symmetric_layers_keep_their_codes(source: str, tmp_path: Path) -> None:
    report = convert_model(str(PACKED / source), tmp_path / "out")
    assert validate_checkpoint(tmp_path / "out").group_size == 128
    tensors, original = load_file(tmp_path / "out/model.safetensors"), unquantized()
    packed = load_file(PACKED / source / "model.safetensors")
    for layer in LAYERS:
        codes, scale = source_weight(source, packed, layer)
        found, step = converted_weight(tensors, layer)
        assert (found == codes).all()
        assert (
            np.abs(step - scale) <= 0.51 * tensors[f"{layer}.channel_scale"].numpy()[:, None]
        ).all()
        conversion = report.conversions[layer]
        assert conversion.kept_groups == conversion.groups == codes.size // 128
        assert conversion.error == pytest.approx(relative(codes * (step - scale), codes * scale))
        limit = 0.17 if "gptqmodel" in source else 0.13  # GPTQ moves weights to keep outputs
        assert relative(found * step - original[layer], original[layer]) < limit
    assert {"model.embed_tokens", "lm_head"} < {n for names in report.left.values() for n in names}


def test_order_of_activation_is_rounded_again(tmp_path: Path) -> None:
    """Where its groups are really scattered over k: with one group there is nothing to scatter."""
    report = convert_model(str(PACKED / "gptqmodel_act_order"), tmp_path / "out")
    tensors = load_file(tmp_path / "out/model.safetensors")
    packed = load_file(PACKED / "gptqmodel_act_order/model.safetensors")
    for layer in LAYERS:
        codes, scale = source_weight("gptq", packed, layer)
        found, step = converted_weight(tensors, layer)
        conversion = report.conversions[layer]
        kept = layer != "model.layers.0.mlp.down_proj"
        assert (found == codes).all() == kept
        assert conversion.kept_groups == (conversion.groups if kept else 0)
        error = relative(found * step - codes * scale, codes * scale)
        assert conversion.error == pytest.approx(error, rel=1e-6) and error < 0.06


@pytest.mark.parametrize("source", ASYMMETRIC)
def test_asymmetric_layers_are_rounded_again(source: str, tmp_path: Path) -> None:
    report = convert_model(str(PACKED / source), tmp_path / "out")
    tensors = load_file(tmp_path / "out/model.safetensors")
    packed = load_file(PACKED / source / "model.safetensors")
    for layer in LAYERS:
        codes, scale = source_weight(source, packed, layer)
        found, step = converted_weight(tensors, layer)
        groups = codes.reshape(len(codes), -1, 128)
        fit = ((groups >= -8) & (groups <= 7)).all(-1)
        kept = np.repeat(fit, 128, axis=1)
        assert (found[kept] == codes[kept]).all()
        negated = ((groups >= -7) & (groups <= 8)).all(-1) & ~fit
        assert negated.any()
        negated = np.repeat(negated, 128, axis=1)
        assert (found[negated] == -codes[negated]).all()
        assert np.allclose(step[negated], -scale[negated], rtol=0.02)
        conversion = report.conversions[layer]
        assert conversion.kept_groups == fit.sum() < conversion.groups
        weight = codes * scale
        assert conversion.error == pytest.approx(relative(found * step - weight, weight), rel=1e-6)
        assert relative(weight - unquantized()[layer], weight) < 0.12
        assert conversion.error < 0.03


@pytest.mark.parametrize("sources", [SYMMETRIC[:2], ("gptq_asym", "awq_asym", ASYMMETRIC[-1])])
def test_layouts_of_the_same_weights_give_the_same_tensors(
    sources: tuple[str, ...], tmp_path: Path
) -> None:
    tensors = []
    for source in sources:
        convert_model(str(PACKED / source), tmp_path / source)
        tensors.append(load_file(tmp_path / source / "model.safetensors"))
    for others in tensors[1:]:
        assert others.keys() == tensors[0].keys()
        assert all(torch.equal(others[name], tensors[0][name]) for name in others)


def unquantized() -> dict[str, np.ndarray]:
    tensors = load_file(PACKED / "unquantized/model.safetensors")
    return {name.removesuffix(".weight"): t.double().numpy() for name, t in tensors.items()}


Change = Callable[[dict[str, Tensor], dict[str, Any]], object]


def changed(source: str, tmp_path: Path, change: Change) -> Path:
    """A copy of a packed checkpoint with other tensors or another quantization_config."""
    folder = tmp_path / "changed"
    shutil.copytree(PACKED / source, folder)
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    change(tensors, config["quantization_config"])
    save_file(
        {name: t.clone(memory_format=torch.contiguous_format) for name, t in tensors.items()},
        folder / "model.safetensors",
    )
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_negative_scales_and_empty_groups(tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor], _: dict[str, Any]) -> None:
        tensors[f"{LAYER}.scales"][0, :4] *= torch.tensor([1, -1, 1, -1])
        tensors[f"{LAYER}.scales"][0, 4] = 0

    folder = changed("gptq", tmp_path, change)
    report = convert_model(str(folder), tmp_path / "out")
    tensors = load_file(tmp_path / "out/model.safetensors")
    codes, scale = source_weight("gptq", load_file(folder / "model.safetensors"), LAYER)
    found, step = converted_weight(tensors, LAYER)
    assert (found[:4] == codes[:4]).all() and (np.sign(step[:4]) == np.sign(scale[:4])).all()
    assert set(np.sign(scale[:4, 0])) == {-1, 1}
    assert (found[4, :128] == 0).all() and tensors[f"{LAYER}.group_scale"][4, 0] == 1
    assert report.conversions[LAYER].error == pytest.approx(
        relative(found * step - codes * scale, codes * scale)
    )


def test_auto_rounds_negative_scales_cannot_be_folded(tmp_path: Path) -> None:
    """As README says: its symmetric groups that have the code -8 may have a negative scale."""
    convert_model(str(PACKED / "gptq"), tmp_path / "out")
    tensors = load_file(tmp_path / "out/model.safetensors")
    for layer in LAYERS:
        codes, group_scale = converted_weight(tensors, layer)[0], tensors[f"{layer}.group_scale"]
        assert not sm90_gemm.foldable(torch.from_numpy(codes), group_scale)
        assert sm90_gemm.foldable(torch.from_numpy(codes), group_scale.abs())


def test_a_section_inside_of_the_text_config(tmp_path: Path) -> None:
    folder = tmp_path / "nested"
    shutil.copytree(PACKED / "gptq", folder)
    config = json.loads((folder / "config.json").read_text())
    nested = {"text_config": {"quantization_config": config.pop("quantization_config")}}
    (folder / "config.json").write_text(json.dumps(config | nested))
    convert_model(str(folder), tmp_path / "out")
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert written["text_config"] == {}
    assert written["quantization_config"]["quant_method"] == "intscale"


def test_version_2_of_gptq_is_seen_in_its_zero_points(tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor], _: dict[str, Any]) -> None:
        for layer in LAYERS:
            tensors[f"{layer}.qzeros"] += 0x11111111

    convert_model(str(PACKED / "gptq"), tmp_path / "v1")
    convert_model(str(changed("gptq", tmp_path, change)), tmp_path / "v2")
    v1, v2 = (load_file(tmp_path / v / "model.safetensors") for v in ("v1", "v2"))
    assert all(torch.equal(v1[name], v2[name]) for name in v1)


def test_activation_order_is_rounded_again(tmp_path: Path) -> None:
    down = LAYERS[-1]
    order = torch.randperm(256, generator=torch.Generator().manual_seed(0)) // 128

    def change(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
        tensors[f"{down}.g_idx"] = order.to(torch.int32)
        config["desc_act"] = True

    folder = changed("gptq", tmp_path, change)
    report = convert_model(str(folder), tmp_path / "out")
    codes, scale = source_weight("gptq", load_file(folder / "model.safetensors"), down)
    found, step = converted_weight(load_file(tmp_path / "out/model.safetensors"), down)
    conversion = report.conversions[down]
    assert conversion.kept_groups == 0 and report.conversions[LAYER].kept_groups > 0
    assert conversion.error == pytest.approx(
        relative(found * step - codes * scale, codes * scale), rel=1e-6
    )
    assert 0 < conversion.error < 0.12


def test_plain_int8_codes_of_compressed_tensors(tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
        config["format"] = "int-quantized"
        for layer in LAYERS:
            codes = unpack_codes(tensors.pop(f"{layer}.weight_packed"), 4)
            tensors[f"{layer}.weight"] = codes

    convert_model(str(PACKED / "compressed_tensors"), tmp_path / "packed")
    convert_model(str(changed("compressed_tensors", tmp_path, change)), tmp_path / "plain")
    packed, plain = (load_file(tmp_path / n / "model.safetensors") for n in ("packed", "plain"))
    assert all(torch.equal(packed[name], plain[name]) for name in packed)


@pytest.mark.parametrize("form", ["pack-quantized", "int-quantized"])
def test_int8_zero_points_of_compressed_tensors(form: str, tmp_path: Path) -> None:
    """Signed, as its int8 codes are: against the library's own arithmetic."""
    library = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
    weights: dict[str, np.ndarray] = {}

    def change(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
        config["format"] = form
        for layer in LAYERS:
            codes = unpack_codes(tensors[f"{layer}.weight_packed"], 4)
            zero = nibbles(tensors[f"{layer}.weight_zero_point"], 0)[: len(codes)] - 8
            tensors[f"{layer}.weight_zero_point"] = torch.from_numpy(zero).to(torch.int8)
            if form == "int-quantized":
                tensors[f"{layer}.weight"] = codes
                del tensors[f"{layer}.weight_packed"]
            scale = tensors[f"{layer}.weight_scale"].double()
            zeros = tensors[f"{layer}.weight_zero_point"]
            weights[layer] = library.dequantize(codes, scale, zeros, dtype=torch.float64).numpy()

    convert_model(str(PACKED / "compressed_tensors_asym"), tmp_path / "packed")
    folder = changed("compressed_tensors_asym", tmp_path, change)
    report = convert_model(str(folder), tmp_path / "plain")
    packed, plain = (load_file(tmp_path / n / "model.safetensors") for n in ("packed", "plain"))
    assert all(torch.equal(packed[name], plain[name]) for name in packed)
    for layer, weight in weights.items():
        found, step = converted_weight(plain, layer)
        error = relative(found * step - weight, weight)
        assert report.conversions[layer].error == pytest.approx(error, rel=1e-6) and error < 0.03


def test_keys_that_say_nothing(tmp_path: Path) -> None:
    """As compressed-tensors of all versions writes them."""
    dense = {"format": "dense", "global_sparsity": 0.1, "sparsity_structure": "unstructured"}
    said = {
        **{"transform_config": {"config_groups": {}}, "sparsity_config": dense},
        **{"kv_cache_scheme": None, "global_compression_ratio": 1.5, "provider": "auto-round"},
    }
    folder = changed("compressed_tensors", tmp_path, replace(**said))
    assert convert_model(str(folder), tmp_path / "out").layers == len(LAYERS)


def test_group_size_is_null(tmp_path: Path) -> None:
    folder = changed("gptq", tmp_path, replace(group_size=None))
    assert convert_model(str(folder), tmp_path / "out").layers == len(LAYERS)


@pytest.mark.parametrize("source", ["gptq", "awq"])
def test_a_section_that_was_put_into_the_config(source: str, tmp_path: Path) -> None:
    """What AutoGPTQ and AutoAWQ say in a file of its own lacks the method."""

    def change(_: dict[str, Tensor], config: dict[str, Any]) -> None:
        kept = {k: config[k] for k in ("bits", "group_size", "sym", "version") if k in config}
        config.clear()
        config.update(kept, quant_method=source)

    folder = changed(source, tmp_path, change)
    assert convert_model(str(folder), tmp_path / "out").layers == len(LAYERS)


def test_fixed_amplifier(tmp_path: Path) -> None:
    convert_model(str(PACKED / "gptq"), tmp_path / "out", CheckpointConfig(amplifier=4096))
    tensors = load_file(tmp_path / "out/model.safetensors")
    assert (tensors[f"{LAYER}.channel_scale"] == 1 / 4096).all()


def replace(**fields: Any) -> Change:
    return lambda _, config: config.update(fields)


def without(part: str) -> Change:
    return lambda tensors, _: tensors.pop(f"{LAYER}.{part}")


def put(part: str, value: float, index: Any = 0) -> Change:
    return lambda tensors, _: tensors[f"{LAYER}.{part}"].__setitem__(index, value)


def as_head(tensors: dict[str, Tensor], _: dict[str, Any]) -> None:
    del tensors["lm_head.weight"]
    for name in [n for n in tensors if LAYER in n]:
        tensors[name.replace(LAYER, "lm_head")] = tensors[name]


@pytest.mark.parametrize(
    ("source", "change", "message"),
    [
        ("gptq", replace(checkpoint_format="gptq_v2"), r"holds \[7\].* is gptq, but .*gptq_v2"),
        ("gptq_asym", replace(sym=True), r"neither gptq nor gptq_v2, but .* says sym"),
        ("gptq", replace(checkpoint_format="marlin"), "checkpoint_format 'marlin' is not"),
        ("gptq", replace(bits=8), "have 8 bits, only 4"),
        ("gptq", replace(quant_method="fp8"), "method 'fp8' cannot be converted"),
        ("awq", replace(version="gemv"), "version 'gemv' has another layout"),
        ("compressed_tensors", replace(format="float-quantized"), "holds no int4 codes"),
        (
            "compressed_tensors",
            replace(transform_config={"config_groups": {"R4": {"type": "hadamard"}}}),
            "config.json: transform_config of compressed-tensors is {'config_groups': .* without",
        ),
        (
            "compressed_tensors",
            replace(kv_cache_scheme={"num_bits": 8, "type": "float"}),
            "kv_cache_scheme of compressed-tensors is",
        ),
        (
            "compressed_tensors",
            replace(sparsity_config={"format": "sparse-24-bitmask"}),
            "sparsity_config of compressed-tensors is",
        ),
        (
            "compressed_tensors",
            lambda _, config: config["config_groups"]["group_0"].update(
                output_activations={"num_bits": 8, "type": "float"}
            ),
            "output_activations of group_0 of compressed-tensors is {'num_bits': 8",
        ),
        ("compressed_tensors", replace(newer_key=True), "newer_key of compressed-tensors is True"),
        (
            "compressed_tensors_asym",
            lambda t, _: t.update({f"{LAYER}.weight_zero_point": torch.ones(1, 256).char()}),
            r"weight_zero_point is I8 \[1, 256\]; beside scales \[256, 1\] .* I32 \[32, 1\]",
        ),
        (
            "compressed_tensors_asym",
            lambda t, _: t.update({f"{LAYER}.weight_zero_point": torch.ones(256, 1)}),
            r"weight_zero_point is F32 \[256, 1\]; .* or I8 \[256, 1\]",
        ),
        ("gptq", replace(group_size=64), "groups of 128, but .* says 64"),
        ("gptq", without("scales"), f"{LAYER}.scales is missing"),
        ("gptq", put("scales", float("nan")), "has a scale that is NaN or Inf"),
        ("gptq", put("g_idx", 9), "does not name one of 1 groups"),
        ("gptq_asym", put("scales", float("inf")), "has a scale that is NaN or Inf"),
        (
            "awq",
            lambda t, _: t.update({f"{LAYER}.qzeros": t[f"{LAYER}.qzeros"][:, 1:]}),
            "tensors do not fit each other",
        ),
        ("gptq", as_head, r"lm_head \(output head\)"),
        ("gptq", lambda t, _: t.update({f"{LAYER}.weight": torch.ones(1)}), "quantized and as"),
        ("gptq", lambda t, _: [t.pop(n) for n in list(t) if "qweight" in n], "no layer of int4"),
    ],
)
def test_what_cannot_be_converted_is_refused(
    source: str, change: Change, message: str, tmp_path: Path
) -> None:
    folder = changed(source, tmp_path, change)
    with pytest.raises(IntScaleError, match=message) as error:
        convert_model(str(folder), tmp_path / "out")
    assert "\n" not in str(error.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["changed"]


def test_an_unquantized_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(IntScaleError, match="intscale quantize"):
        convert_model(str(PACKED / "unquantized"), tmp_path / "out")


def test_command_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "vllm_intscale", "convert", PACKED / "awq_asym", "out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Rounded     7 layers were rounded again" in done.stdout
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["layers"].keys() == set(LAYERS)
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "intscale"
    source = config["source"]
    assert (source["model"], source["method"]) == ("awq_asym", "converted from awq")
    assert source["command"] == "intscale convert awq_asym out"
    assert source["version"].startswith("vllm_intscale ")
    assert (tmp_path / "out/tokenizer.json").exists()
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert again.returncode == 1 and "out exists" in again.stderr
