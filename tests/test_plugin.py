"""What the plugin promises vLLM before any weight is loaded."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import IGNORE

pytest.importorskip("vllm")

from vllm.config import VllmConfig, set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers import quantization
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.fused_moe.router.gate_linear import GateLinear
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.models.utils import WeightsMapper

import vllm_intscale
from vllm_intscale import compile_cache, loading
from vllm_intscale.errors import IntScaleError
from vllm_intscale.format import CheckpointConfig, LayerScheme
from vllm_intscale.plugin import IntScaleConfig


def run_python(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_register_twice() -> None:
    vllm_intscale.register()
    vllm_intscale.register()
    assert quantization.QUANTIZATION_METHODS.count("intscale") == 1
    assert quantization.get_quantization_config("intscale") is IntScaleConfig


def test_import_is_light() -> None:
    run_python("import sys, vllm_intscale; assert not {'torch', 'vllm'} & set(sys.modules)")


def test_register_is_light() -> None:
    run_python(
        "import sys, torch, vllm_intscale as plugin; plugin.register(); plugin.register();"
        "assert 'cupy' not in sys.modules and not torch.cuda.is_initialized();"
        "assert 'vllm_intscale.plugin' in sys.modules;"
        "assert not {'vllm_intscale.ops', 'vllm_intscale.linear'} & set(sys.modules)"
    )


def test_register_never_raises(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "vllm.model_executor.layers.quantization", None)
    logger = logging.getLogger("vllm.intscale")
    logger.addHandler(caplog.handler)
    vllm_intscale.register()
    logger.removeHandler(caplog.handler)
    assert "intscale: not available in this vLLM" in caplog.text


def test_entry_point_is_installed() -> None:
    from importlib.metadata import entry_points

    (entry,) = entry_points(group="vllm.general_plugins", name="intscale")
    assert entry.load() is vllm_intscale.register


@pytest.mark.parametrize(
    ("found", "wanted", "result"),
    [
        ("intscale", None, "intscale"),
        ("intscale", "intscale", "intscale"),
        ("intscale", "fp8", None),  # vLLM then reports the contradiction
        ("gptq", None, None),
        ("gptq", "gptq_marlin", None),
        ("compressed-tensors", None, None),
        (None, None, None),
    ],
)
def test_claims_its_own_checkpoints_only(
    found: str | None, wanted: str | None, result: str | None
) -> None:
    config = {} if found is None else {"quant_method": found}
    assert IntScaleConfig.override_quantization_method(config, wanted, hf_config=None) == result


def test_other_method_asked_for_by_name() -> None:
    claim = IntScaleConfig.override_quantization_method
    assert claim({"quant_method": "gptq"}, None) is None
    assert claim({"quant_method": "gptq"}, "intscale") == "intscale"
    with pytest.raises(IntScaleError, match="'fp8'; unquantized models .* gptq, awq"):
        claim({"quant_method": "fp8"}, "intscale")


def test_config_is_strict() -> None:
    good = CheckpointConfig().to_dict()
    assert IntScaleConfig.from_config(good).checkpoint == CheckpointConfig()
    with pytest.raises(IntScaleError, match="unknown key is .'colour'."):
        IntScaleConfig.from_config({**good, "colour": "red"})


def linear_layer(kind: type = LinearBase) -> Any:
    return object.__new__(kind)  # what get_quant_method looks at is the class


def config_of(**settings: Any) -> IntScaleConfig:
    config = IntScaleConfig(CheckpointConfig(**settings))
    config.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    return config


def scheme_of(config: IntScaleConfig, prefix: str) -> LayerScheme | None:
    method = config.get_quant_method(linear_layer(), prefix)
    return None if isinstance(method, UnquantizedLinearMethod) else method.scheme


def test_schemes_of_layers() -> None:
    config = config_of(
        ignore=("a.o_proj", r"re:b\..*"),
        overrides={r"re:a\.[qkv]_proj": {"group_size": 64}, "a.down_proj": {"bits": 8}},
    )
    assert scheme_of(config, "a.up_proj") == LayerScheme()
    assert scheme_of(config, "a.o_proj") is None
    assert scheme_of(config, "a.o_proj2") == LayerScheme()
    assert scheme_of(config, "b.qkv_proj") is None
    assert scheme_of(config, "a.qkv_proj") == LayerScheme(group_size=64)
    assert scheme_of(config, "a.down_proj") == LayerScheme(bits=8)
    assert config.report.ignored == {"a.o_proj", "b.qkv_proj"}


def test_parts_of_models_that_do_not_tell() -> None:
    config = config_of(
        ignore=(*(f"a.{part}_proj" for part in ("gate", "up")), "c.gate_up_proj"),
        overrides={"b.gate_proj": {"group_size": 64}, "b.up_proj": {"group_size": 64}},
    )
    assert scheme_of(config, "a.gate_up_proj") is None
    assert scheme_of(config, "b.gate_up_proj") == LayerScheme(group_size=64)
    assert scheme_of(config, "c.gate_up_proj") is None  # the checkpoint has it fused
    assert scheme_of(config, "d.gate_up_proj") == LayerScheme()


def test_fused_parts_must_agree() -> None:
    config = config_of(ignore=("a.k_proj",))
    with pytest.raises(IntScaleError, match="a.qkv_proj: its fused parts"):
        scheme_of(config, "a.qkv_proj")


@pytest.mark.parametrize("prefix", ["m.mlp.gate", "m.mlp.shared_expert_gate", "m.mlp.router"])
def test_gates_by_name(prefix: str) -> None:
    assert scheme_of(config_of(), prefix) is None


def test_gates_by_class() -> None:
    method = config_of().get_quant_method(linear_layer(GateLinear), "m.mlp.any_name")
    assert isinstance(method, UnquantizedLinearMethod)
    assert scheme_of(config_of(), "m.mlp.gate_proj") == LayerScheme()


def test_other_layers_keep_their_default() -> None:
    assert config_of().get_quant_method(torch.nn.Embedding(2, 2), "lm_head") is None


def test_compiled_graphs_are_those_of_one_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the weights, by this code: vLLM's cache of them is told when all layers are ready."""

    def key(kernel: str, *shape: int) -> str:
        config, report = VllmConfig(), loading.LoadReport()
        with set_current_vllm_config(config):
            for layer in "ab":
                report.created(layer, "linear")
            for layer in "ab":
                report.ready(layer, kernel, [torch.empty(shape, dtype=torch.int8)])
        return str(config.compute_hash())

    assert key("fold", 2, 8) == key("fold", 2, 8)
    assert len({key("fold", 2, 8), key("accumulate", 2, 8), key("fold", 3, 8)}) == 3
    before = key("fold", 2, 8)
    monkeypatch.setattr(compile_cache, "code_digest", lambda: "of other code")
    assert key("fold", 2, 8) != before


def test_names_are_mapped_and_patterns_are_not() -> None:
    config = config_of(
        ignore=("model.a.o_proj", r"re:.*\.b\..*", "vision.c"),
        overrides={"model.a.up_proj": {"group_size": 32}},
    )
    config.apply_vllm_mapper(
        WeightsMapper(orig_to_new_prefix={"model.": "language_model.model.", "vision.": None})
    )
    assert config.checkpoint.ignore == ("language_model.model.a.o_proj", r"re:.*\.b\..*")
    assert scheme_of(config, "language_model.model.a.up_proj") == LayerScheme(group_size=32)
    assert scheme_of(config, "language_model.model.a.o_proj") is None


def test_expert_names() -> None:
    layer = object.__new__(RoutedExperts)
    layer.__dict__ |= {
        "moe_config": type("Moe", (), {"num_logical_experts": 2}),
        "ckpt_gate_proj_name": "w1",
        "ckpt_down_proj_name": "w2",
        "ckpt_up_proj_name": "w3",
    }
    config = config_of(ignore=("m.experts.1.w2",))
    with pytest.raises(IntScaleError, match="m.experts: its fused parts"):
        config.get_quant_method(layer, "m.experts")


def test_report_is_one_line_when_the_last_layer_is_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(loading.logger, "info", lambda text, *args: lines.append(text % args))
    report = loading.LoadReport()
    for name, what in (
        ("a", "linear W4A8 g128"),
        ("b", "linear W4A8 g64"),
        ("c", "linear W4A8 g128"),
    ):
        report.created(name, what)
    report.ignored.add("d")
    for name in "abca":
        report.ready(name, "K", ())
    assert lines == ["intscale: 2 linear W4A8 g128, 1 linear W4A8 g64, 3 on K, 1 ignored"]


# From here on through vLLM's own configuration, up to where it would start an engine.


def start(folder: Path, **settings: Any) -> Any:
    return EngineArgs(str(folder), dtype="float32", **settings).create_engine_config()


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.fixture
def folder(checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint("llama", ignore=IGNORE), tmp_path / "model"))


def test_method_is_detected(folder: Path) -> None:
    config = start(folder)
    assert config.model_config.quantization == "intscale"
    assert isinstance(config.quant_config, IntScaleConfig)


def test_unquantized_checkpoint(folder: Path) -> None:
    edit_config(folder, quantization_config=None)
    assert start(folder).model_config.quantization is None
    with pytest.raises(ValueError, match="model has no layer to quantize"):  # all is int4
        start(folder, quantization="intscale")


def test_checkpoint_of_another_method(folder: Path) -> None:
    edit_config(folder, quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 128})
    with pytest.raises(ValueError, match="down_proj.scales is missing"):  # it says so only
        start(folder, quantization="intscale")


def test_broken_file_is_refused_before_the_engine(folder: Path) -> None:
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(100_000)
    with pytest.raises(ValueError, match="model.safetensors is truncated"):
        start(folder)


def test_folder_without_weights_is_left_to_vllm(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert start(folder).model_config.quantization == "intscale"
