"""Texts for calibration from datasets: the real library, reading folders."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from vllm_intscale.errors import IntScaleError
from vllm_intscale.quantize import Calibration
from vllm_intscale.quantize.calibration import CHARACTERS

pytest.importorskip("datasets")


def save(folder: Path, split: str, rows: list[dict[str, Any]]) -> str:
    folder.mkdir(exist_ok=True)
    (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def test_rows_are_read_until_they_are_enough(tmp_path: Path) -> None:
    texts = [f"row {i} " * 50 for i in range(100)]
    source = save(tmp_path / "data", "train", [{"text": text, "id": 1} for text in texts])
    save(tmp_path / "data", "test", [{"text": "of the test", "id": 2}])
    content = Calibration(source, samples=2, length=100).content()
    assert content == "\n".join(texts[: content.count("\n") + 1])
    assert len(content) >= CHARACTERS * 200 > len(content) - len(texts[0]) - 1
    assert Calibration(source, 128).content() == "\n".join(texts)
    assert Calibration(f"{source}::test", 1).content() == "of the test"
    assert Calibration(source).name == "data" and Calibration("some/data:x").name == "some/data:x"


def test_conversations(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}]
    source = save(tmp_path / "chat", "train", [{"messages": messages}] * 2)
    assert Calibration(source, 1).content() == "Who?\nMe.\nWho?\nMe."


@pytest.mark.parametrize(
    ("split", "wanted"),
    [("", "its rows have question, answer, neither text"), ("::dev", "dev")],
)
def test_what_is_no_text_is_one_line(split: str, wanted: str, tmp_path: Path) -> None:
    source = save(tmp_path / "data", "train", [{"question": "?", "answer": "!"}])
    with pytest.raises(IntScaleError, match=re.escape(wanted)) as error:
        Calibration(source + split, 1).content()
    assert "\n" not in str(error.value) and "--calibration" in str(error.value)


def test_hub_that_cannot_be_reached_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(IntScaleError, match="is no file, and as a dataset cannot be read") as error:
        Calibration("nobody/nothing", 1).content()
    assert "\n" not in str(error.value)


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(IntScaleError, match="pip install datasets"):
        Calibration("some/data", 7).content()
