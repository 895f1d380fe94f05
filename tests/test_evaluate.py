"""Perplexity: its refusals, and its value against transformers in float32."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from vllm_intscale.errors import IntScaleError
from vllm_intscale.evaluate import perplexity

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


def test_vllm_is_missing(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    assert "install vllm" in refusal("model", text, window=10)


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
