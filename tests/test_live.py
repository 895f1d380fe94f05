"""Models that are no intscale checkpoints, converted while vLLM loads them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gpu_engine
import pytest
import sources
import torch
from safetensors.torch import load_file, save_file

from vllm_intscale.checkpoint import read_config
from vllm_intscale.errors import IntScaleError
from vllm_intscale.quantize import convert_model, plan_live, quantize_model
from vllm_intscale.quantize.stream import read_quantized

sys.path.insert(0, str(Path(__file__).parents[1] / "serving_examples"))
PACKED = Path(__file__).parent / "packed"
NAMES = sorted(path.name for path in PACKED.iterdir() if path.is_dir())


def written(source: Path, out: Path) -> Path:
    """The checkpoint that the commands make of it."""
    make = convert_model if "quantization_config" in read_config(source) else quantize_model
    make(str(source), out)
    return out


def check(source: Path, out: Path) -> None:
    """Converted at load or before: the same tensors, and the same quantization_config."""
    plan = plan_live(str(source))
    found = dict(read_quantized(plan))
    wanted = load_file(written(source, out) / "model.safetensors")
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(*(t.reshape(-1).view(torch.uint8) for t in (found[name], tensor))), name
    config = read_config(out)["quantization_config"]
    for section in (config, ours := plan.config.to_dict()):
        section.pop("source")  # says how it was made
    assert ours == config


@pytest.mark.parametrize("name", [name for name in NAMES if name != "unquantized"])
def test_converted_tensors(name: str, tmp_path: Path) -> None:
    check(PACKED / name, tmp_path / "out")


def test_rounded_tensors(tmp_path: Path) -> None:
    """Fused experts become separate ones, as vLLM loads quantized ones."""
    sources.save_model(tmp_path / "source", sources.fused_experts(), model_type="qwen3_moe")
    check(tmp_path / "source", tmp_path / "experts")
    check(PACKED / "unquantized", tmp_path / "dense")


def test_what_is_not_quantized_keeps_its_dtype(tmp_path: Path) -> None:
    """Buffers of any dtype and shape, and experts of a tower that is left as it is."""
    tensors = sources.dense() | sources.fused_experts("visual.blocks.0.mlp")
    for dtype in (torch.int64, torch.bool, torch.uint8, torch.int8, torch.float8_e4m3fn):
        for i, shape in enumerate([(), (0, 4), (2, 3)]):
            tensors[f"visual.{str(dtype)[6:]}_{i}"] = torch.ones(shape).to(dtype)
    sources.save_model(tmp_path / "source", tensors)
    check(tmp_path / "source", tmp_path / "out")


def start(folder: Path, **settings: Any) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    arguments = EngineArgs(str(folder), dtype="float32", quantization="intscale", **settings)
    return arguments.create_engine_config()


def test_what_cannot_be_converted_stops_before_the_engine(tmp_path: Path) -> None:
    """With the error of `intscale convert`."""
    pytest.importorskip("vllm")
    wrong = shutil.copytree(PACKED / "gptq", tmp_path / "wrong")
    tensors = load_file(wrong / "model.safetensors")
    zeros = "model.layers.0.mlp.down_proj.qzeros"
    tensors[zeros] = torch.full_like(tensors[zeros], 0x77777777) + torch.tensor(1)
    save_file(tensors, wrong / "model.safetensors")
    with pytest.raises(ValueError, match="qzeros holds .7, 8., which for symmetric codes"):
        start(wrong)
    cut = shutil.copytree(PACKED / "awq", tmp_path / "cut")
    with (cut / "model.safetensors").open("r+b") as file:
        file.truncate(100_000)
    with pytest.raises(ValueError, match="truncated"):
        start(cut)


def test_other_ways_to_read_files_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("vllm")
    from vllm_intscale import live

    loading = SimpleNamespace(load_config=SimpleNamespace(load_format="runai_streamer"))
    monkeypatch.setattr(live, "get_current_vllm_config_or_none", lambda: loading)
    with pytest.raises(IntScaleError, match="--load-format runai_streamer .* intscale convert"):
        live.convert_while_loading("some/model", PACKED)


class Loader:
    """vLLM's, of files as they are."""

    def get_all_weights(self, model_config: Any, model: Any) -> Any:
        return iter([("as it is", torch.ones(1))])


def names_of(model: Path | str, quantization: str | None = "intscale", revision: str = "") -> Any:
    """Of the tensors that vLLM gets."""
    config = SimpleNamespace(model=str(model), quantization=quantization, revision=revision)
    loader: Any = Loader()
    names = {name for name, _ in loader.get_all_weights(config, None)}
    # It is when vLLM thinks that loading began.
    assert (names == {"as it is"}) or loader.counter_before_loading_weights > 0
    return names


@pytest.fixture
def live(monkeypatch: pytest.MonkeyPatch) -> Any:
    pytest.importorskip("vllm")
    from vllm_intscale import live

    monkeypatch.setattr(live, "DefaultModelLoader", Loader)
    monkeypatch.setattr(live, "_sources", {})
    monkeypatch.setattr(Loader, "get_all_weights", Loader.get_all_weights)  # it is replaced
    return live


def test_another_revision_is_refused(live: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM 0.26 tells the plugin no revision: what it planned for may be another one."""
    monkeypatch.setattr(live, "plan_live", lambda model, revision: plan_live(PACKED / revision))
    live.convert_while_loading("some/model", PACKED / "awq")
    assert "lm_head.weight" in names_of("some/model", revision="awq")
    with pytest.raises(IntScaleError, match="--revision gptq of some/model .* serve the fold"):
        names_of("some/model", revision="gptq")


def test_what_is_converted(live: Any, tmp_path: Path) -> None:
    """Not the same files without --quantization; others that are reloaded, unless they are so."""
    source, layer = PACKED / "unquantized", "model.layers.0.self_attn.o_proj"
    live.convert_while_loading(str(source), source)
    out = written(source, tmp_path / "out")
    assert f"{layer}.qweight" in names_of(source)
    assert f"{layer}.qweight" in names_of(PACKED / "gptq")
    assert names_of(source, quantization=None) == names_of(out) == {"as it is"}


@pytest.mark.e2e
@pytest.mark.timeout(420)
@pytest.mark.parametrize(
    ("name", "ranks"),
    [
        *(pytest.param(name, 1, marks=pytest.mark.slow) for name in ("gptq", "awq_asym")),
        *(("gptq", 2), ("unquantized", 1)),
    ],
)
def test_engine(name: str, ranks: int, tmp_path: Path) -> None:
    test_engine = pytest.importorskip("test_engine")
    source = Path(shutil.copytree(PACKED / name, tmp_path / "source"))
    for file in PACKED.glob("gptq/tokenizer*"):
        shutil.copy(file, source)
    engine: dict[str, Any] = {"enforce_eager": True, "quantization": "intscale"}
    if ranks > 1:
        engine |= {"tensor_parallel_size": ranks, **test_engine.MP}
    prompts = [[token % 61 + 3 for token in prompt] for prompt in test_engine.PROMPTS]
    found, output = test_engine.offline(source, tmp_path, prompts, **engine)
    out = written(source, tmp_path / "out")
    assert test_engine.agree(found, test_engine.expected(out, ranks, prompts))
    assert "4 on cpu_backend" in output
    how = (
        "rounded to nearest" if name == "unquantized" else f"converted from {name[:4].rstrip('_')}"
    )
    assert f"intscale: 7 matrices of {source} are {how}" in output


@pytest.mark.gpu
@pytest.mark.e2e
@pytest.mark.timeout(420)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("name", ["gptq", "awq", "compressed_tensors", "unquantized"])
def test_engine_on_a_gpu(name: str, tmp_path: Path) -> None:
    """The same kernels on the same tensors: the same numbers as from the checkpoint."""
    prompts = [[token * 7 % 61 + 3 for token in range(n)] for n in (64, 33, 9)]
    found = [
        gpu_engine.logprobs(folder, tmp_path, prompts, skip_tokenizer_init=True, **options)
        for folder, options in (
            (PACKED / name, {"quantization": "intscale"}),
            (written(PACKED / name, tmp_path / "out"), {}),
        )
    ]
    assert found[0] == found[1] and all(x < 0 for answer in found[0] for x in answer)


@pytest.mark.e2e
@pytest.mark.timeout(420)
def test_server(tmp_path: Path) -> None:
    """Over HTTP, as `vllm serve GPTQ-MODEL --quantization intscale`."""
    test_engine = pytest.importorskip("test_engine")
    from server import running_server

    prompts = [[token % 61 + 3 for token in prompt] for prompt in test_engine.PROMPTS]
    options = ("--quantization", "intscale", "--dtype", "float32", "--enforce-eager")
    options += ("--max-model-len", "128", "--max-num-seqs", "4", "--served-model-name", "model")
    with running_server(str(PACKED / "gptq"), *options, log=tmp_path / "log", timeout=360) as url:
        body = {"model": "model", "prompt": prompts, "max_tokens": 1, "echo": True, "logprobs": 0}
        request = urllib.request.Request(
            f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as response:
            choices = json.load(response)["choices"]
    found = [
        choice["logprobs"]["token_logprobs"][1 : len(prompt)]
        for choice, prompt in zip(choices, prompts, strict=True)
    ]
    out = written(PACKED / "gptq", tmp_path / "out")
    assert test_engine.agree(found, test_engine.expected(out, 1, prompts))
    assert f"matrices of {PACKED / 'gptq'} are converted" in (tmp_path / "log").read_text()


@pytest.mark.e2e
@pytest.mark.timeout(300)
def test_eval_of_a_model_as_it_is(tmp_path: Path) -> None:
    """The perplexity that the converted model has."""
    pytest.importorskip("vllm")
    source = PACKED / "gptq"
    (tmp_path / "text.txt").write_text(" ".join(f"word {i}" for i in range(200)))
    found = []
    for model, options in ((source, ["--quantization", "intscale"]), (tmp_path / "out", [])):
        if not options:
            written(source, model)
        command = [sys.executable, "-m", "vllm_intscale", "eval", str(model), *options]
        command += ["--text", str(tmp_path / "text.txt"), "--window", "32", "--limit", "3"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=250)
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(json.loads(done.stdout.splitlines()[-1])["perplexity"])
    assert found[0] == pytest.approx(found[1], rel=1e-6) and found[0] > 1
