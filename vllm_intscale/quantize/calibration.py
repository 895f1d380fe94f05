"""The text of a calibration: from a file, or from a dataset of Hugging Face's `datasets`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

from vllm_intscale.errors import IntScaleError

MAX_LENGTH = 2048  # tokens of a sample
CHARACTERS = 8  # that a token has at most, on average: bounds what is read of a dataset
FILES = (".txt", ".jsonl", ".json", ".md")  # what is named so is no dataset


class Calibration(NamedTuple):
    """What to calibrate with.

    source: a text file; a `.jsonl` file, whose lines have "text"; or DATASET[:CONFIG[:SPLIT]], a
    hub id or a folder, whose rows have "text" or "messages" (split: train). method: "gptq" chooses
    codes and scales for the activations of the text, "awq" scales alone, codes being rounded to
    nearest; both take outliers out of activations first.
    """

    source: str | Path
    samples: int = 128
    length: int | None = None  # tokens of a sample; None: as the model allows, at most MAX_LENGTH
    method: Literal["gptq", "awq"] = "gptq"

    @property
    def name(self) -> str:
        """For people."""
        return Path(self.source).name if Path(self.source).exists() else str(self.source)

    def content(self) -> str:
        """The text; of a dataset as much as the samples may need. Raises IntScaleError."""
        file = Path(self.source)
        if file.is_file() or file.suffix in FILES:
            return _read_file(file)
        return _read_dataset(
            str(self.source), CHARACTERS * self.samples * (self.length or MAX_LENGTH)
        )


def _read_file(file: Path) -> str:
    if file.suffix == ".json":
        raise IntScaleError(
            f'{file} is JSON, which is no text to calibrate with; write its texts as "text" of the '
            "lines of a .jsonl file and name that as --calibration"
        )
    try:
        text = file.read_text(encoding="utf-8")
        if file.suffix == ".jsonl":
            lines = filter(str.strip, text.split("\n"))  # strings of JSON may hold U+2028
            text = "\n".join(json.loads(line)["text"] for line in lines)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise IntScaleError(
            f'{file} cannot be read as text, or as lines of JSON with "text" ({error}); '
            "name another --calibration"
        ) from None
    return text


@lru_cache(1)  # it is asked for more than once
def _read_dataset(source: str, characters: int) -> str:
    try:
        import datasets
    except ImportError:
        raise IntScaleError(
            f"{source} is no file; to read a dataset of that name: pip install datasets"
        ) from None
    name, _, rest = source.partition(":")
    config, _, split = rest.partition(":")
    try:
        rows = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
        return _first(map(_text_of, rows), characters)
    except Exception as error:  # the library raises what its readers and the network raise
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise IntScaleError(
            f"--calibration {source} is no file, and as a dataset cannot be read ({reason}); name "
            "a text file or DATASET:CONFIG:SPLIT"
        ) from error


def _text_of(row: Mapping[str, Any]) -> str:
    if isinstance(row.get("text"), str):
        return str(row["text"])
    if isinstance(row.get("messages"), list):
        return "\n".join(message["content"] for message in row["messages"])
    raise ValueError(f"its rows have {', '.join(row)}, neither text nor messages")


def _first(texts: Iterator[str], characters: int) -> str:
    """Whole texts, until there are so many characters."""
    taken: list[str] = []
    for text in texts:
        taken.append(text)
        characters -= len(text) + 1
        if characters <= 0:
            break
    return "\n".join(taken)
