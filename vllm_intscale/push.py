"""Upload a quantized checkpoint to the Hugging Face hub, with a model card: `intscale push`."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vllm_intscale import __version__
from vllm_intscale.checkpoint import CONFIG, read_config
from vllm_intscale.errors import IntScaleError
from vllm_intscale.format import CheckpointConfig
from vllm_intscale.verify import SUMS, verify, write_sums

CARD = "README.md"
PROJECT = "vllm_intscale"


class Score(NamedTuple):
    """A line that `intscale eval` has printed."""

    model: str
    text: str
    tokens: int
    perplexity: float


def read_scores(files: Sequence[Path]) -> list[Score]:
    """The last line of each file, as `intscale eval` prints it.

    Raises IntScaleError for one that is something else.
    """
    scores = []
    for file in files:
        try:
            found = json.loads(file.read_text().strip().splitlines()[-1])
            scores.append(Score(*(found[name] for name in Score._fields)))
        except (OSError, ValueError, IndexError, KeyError, TypeError) as error:
            raise IntScaleError(
                f"{file} is no result of intscale eval ({error!r}); make one with: intscale eval "
                f"MODEL --text TEXT > {file}"
            ) from None
    return scores


def push(
    folder: Path,
    repository: str,
    private: bool = False,
    scores: Sequence[Score] = (),
    on_progress: Callable[[str], None] = lambda _: None,
) -> str:
    """Verify a checkpoint, write its model card, upload it as one commit; returns the address.

    repository: NAMESPACE/NAME, created if it does not exist. scores: for the card's table, the
    unquantized model's first.

    Raises IntScaleError if the checkpoint is not in order, or if the hub refuses.
    """
    from huggingface_hub import HfApi

    verify(folder, on_progress)
    (folder / CARD).write_text(model_card(folder, repository, scores))
    write_sums(folder)
    api = HfApi(library_name=PROJECT, library_version=__version__)
    try:
        address = api.create_repo(repository, private=private, exist_ok=True)
        on_progress("upload")
        api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message=f"W4A8 with integer scales, {PROJECT} {__version__}",
        )
    except Exception as error:  # any of a dozen types of three libraries
        reason = " ".join(str(error).split()) or repr(error)
        raise IntScaleError(
            f"{repository} cannot be uploaded: {reason}; check the network and log in with a token "
            "that may write there: hf auth login"
        ) from error
    return str(address)


def model_card(folder: Path, repository: str, scores: Sequence[Score] = ()) -> str:
    """The README of the checkpoint on the hub; the licence is that of the card it had."""
    from huggingface_hub import ModelCardData

    config = CheckpointConfig.from_dict(read_config(folder)["quantization_config"])
    base = str(config.source.get("model", ""))
    data = ModelCardData(
        base_model=base if base.count("/") == 1 else None,
        license=_license(folder),
        library_name="vllm",
        pipeline_tag="text-generation",
        tags=["w4a8", "int4", "int8", "integer-scale", "intscale", "vllm"],
    )
    name = repository.rpartition("/")[2]
    parts = [
        f"---\n{data.to_yaml()}\n---\n\n# {name}",
        f"{_origin(config)}, quantized with {PROJECT} to W4A8 with integer scales: int4 weights in "
        f"groups of {config.group_size} with integer group scales, int8 activations with one scale "
        "a token, int32 accumulation ([arXiv 2405.14597](https://arxiv.org/abs/2405.14597)).",
        f"## Serve it\n\n    vllm serve {repository}",
        _how(config),
    ]
    if scores:
        parts.append(_table(scores))
    parts.append(
        "What each layer lost: `report.html`; hashes of all files: `SHA256SUMS`, which "
        "`intscale verify` checks together with every value."
    )
    return "\n\n".join(parts) + "\n"


def _license(folder: Path) -> str | None:
    from huggingface_hub import ModelCard

    if not (folder / CARD).is_file():
        return None
    try:
        data: Any = ModelCard.load(folder / CARD).data
    except Exception as error:  # the parser's, or that there is no mapping
        reason = " ".join(str(error).split())
        raise IntScaleError(
            f"{folder / CARD}: its metadata, which name the licence, are not YAML ({reason}); "
            f"correct them and remove {SUMS}, which push writes again"
        ) from None
    found: str | None = data.license
    return found


def _origin(config: CheckpointConfig) -> str:
    base, revision = config.source.get("model", "?"), config.source.get("revision")
    named = f"[{base}](https://huggingface.co/{base})" if base.count("/") == 1 else base
    return f"{named}, revision `{revision}`" if revision else str(named)


def _how(config: CheckpointConfig) -> str:
    lines = [f"## How it was made\n\n{config.source.get('method', '')}."]
    if command := config.source.get("command"):
        lines.append(f"    {command}")
    lines.append(
        f"Amplifier {config.amplifier}; {len(config.ignore)} layers were left as they were "
        f"(`ignore` in `{CONFIG}`). Made with {config.source.get('version', PROJECT)}."
    )
    return "\n\n".join(lines)


def _table(scores: Sequence[Score]) -> str:
    lines = [
        "## What it costs\n",
        "| model | text | tokens scored | perplexity | |",
        "|---|---|---|---|---|",
    ]
    first = scores[0].perplexity
    for i, score in enumerate(scores):
        change = f"{score.perplexity / first - 1:+.2%}" if i else ""
        model, text = (Path(p).name if Path(p).exists() else p for p in (score.model, score.text))
        lines.append(f"| {model} | {text} | {score.tokens} | {score.perplexity:.4f} | {change} |")
    return "\n".join(lines)
