"""`intscale push` over HTTP, to a hub on this machine; its model card."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fake_hub import Hub, running_hub
from huggingface_hub import ModelCard

from vllm_intscale.errors import IntScaleError
from vllm_intscale.push import model_card
from vllm_intscale.quantize import quantize_model
from vllm_intscale.verify import SUMS, verify

SOURCE = Path(__file__).parents[1] / "serving_examples" / "tiny-llama"
TOKEN = "hf_of_the_test"


def intscale(hub: Hub, cwd: Path, *arguments: str, token: str = TOKEN) -> tuple[int, str, str]:
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_TOKEN": token, "HF_HUB_OFFLINE": "0"}
    environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HOME": str(cwd / "hf")}
    command = [sys.executable, "-m", "vllm_intscale", *arguments]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def test_push(tmp_path: Path) -> None:
    scores = []
    for name, perplexity in (("base", 10.0), ("out", 10.15)):
        line = {"model": name, "text": "t.txt", "windows": 2, "window": 9, "tokens": 16}
        file = tmp_path / f"{name}.json"
        file.write_text("windows 2\n" + json.dumps(line | {"perplexity": perplexity}) + "\n")
        scores += ["--score", str(file)]
    with running_hub(TOKEN) as hub:
        made = intscale(hub, tmp_path, "quantize", str(SOURCE), "out", "--ignore", "re:.*o_proj")
        assert made[0] == 0, made[2]
        code, printed, error = intscale(hub, tmp_path, "push", "out", "me/tiny-W4A8", *scores)
        assert code == 0, error
        assert hub.url in printed and printed.endswith("vllm serve me/tiny-W4A8\n")
        (created,) = hub.created
        assert (created["organization"], created["name"]) == ("me", "tiny-W4A8")
        assert len(hub.messages) == 1
    for path in (tmp_path / "out").rglob("*"):
        assert hub.files.pop(str(path.relative_to(tmp_path / "out"))) == path.read_bytes()
    assert not hub.files
    assert verify(tmp_path / "out").files  # the card's hash, too
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.library_name == "vllm" and "w4a8" in card.data.tags
    assert "intscale quantize tiny-llama out --ignore 're:.*o_proj'" in card.text
    assert "vllm serve me/tiny-W4A8" in card.text and "vllm_intscale 0.1.0" in card.text
    assert "| out | t.txt | 16 | 10.1500 | +1.50% |" in card.text


@pytest.fixture
def out(tmp_path: Path) -> Path:
    quantize_model(str(SOURCE), tmp_path / "out")
    return tmp_path / "out"


def test_licence_of_the_source_stays(out: Path) -> None:
    (out / "README.md").write_text("---\nlicense: llama3\n---\n# Some model\n")
    card = ModelCard(model_card(out, "me/other"))
    assert card.data.license == "llama3" and card.text.strip().startswith("# other")


def test_what_the_hub_refuses_is_one_line(out: Path, tmp_path: Path) -> None:
    with running_hub(TOKEN) as hub:
        code, _, error = intscale(hub, tmp_path, "push", "out", "me/tiny", token="hf_another")
        assert code == 1 and "hf auth login" in error and len(error.splitlines()) == 1
        code, _, error = intscale(hub, tmp_path, "push", "out", "no such/name")
        assert code == 1 and len(error.splitlines()) == 1
        assert not hub.files


def test_a_hub_out_of_reach_is_one_line(out: Path, tmp_path: Path) -> None:
    with running_hub(TOKEN) as hub:
        pass
    code, _, error = intscale(hub, tmp_path, "push", "out", "me/tiny")
    assert code == 1 and "check the network" in error and len(error.splitlines()) == 1


def test_a_card_that_is_broken_is_one_line(out: Path) -> None:
    """And the remedy works."""
    for head in ("license: [a", "just text"):
        (out / "README.md").write_text(f"---\n{head}\n---\n# Some model\n")
        with pytest.raises(
            IntScaleError, match="which name the licence, .* remove SHA256SUMS"
        ) as e:
            model_card(out, "me/other")
        assert "\n" not in str(e.value)
    (out / "README.md").write_text("---\nlicense: llama3\n---\n# Some model\n")
    (out / SUMS).unlink()
    verify(out)
    assert "license: llama3" in model_card(out, "me/other")


def test_what_is_not_in_order_is_not_uploaded(out: Path, tmp_path: Path) -> None:
    with (out / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x7f")
    (tmp_path / "wrong.json").write_text("no result\n")
    with running_hub(TOKEN) as hub:
        code, _, error = intscale(hub, tmp_path, "push", "out", "me/tiny")
        assert code == 1 and "model.safetensors" in error
        code, _, error = intscale(hub, tmp_path, "push", "out", "me/tiny", "--score", "wrong.json")
        assert code == 1 and "intscale eval" in error
        assert not hub.created
