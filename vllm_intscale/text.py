"""Texts as a model's tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from vllm_intscale.errors import IntScaleError

PIECE = 1 << 20  # characters that are tokenized at once, which takes 170 bytes of memory for each


def tokenize(model: str, content: str, limit: int | None = None) -> list[int]:
    """Token ids, without special tokens, by the tokenizer of a folder or hub id.

    Texts of more than PIECE characters are cut behind lines. limit: the first so many are enough.

    Raises IntScaleError if transformers or the tokenizer is missing.
    """
    ids: list[int] = []
    for part in tokenize_each(model, _pieces(content)):
        ids += part
        if limit is not None and len(ids) >= limit:
            break
    return ids[:limit]


def tokenize_each(model: str, texts: Iterable[str]) -> Iterator[list[int]]:
    """As `tokenize`, of several texts, each of them at once."""
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise IntScaleError(
            f"transformers cannot be imported ({error}); it reads texts: pip install transformers"
        ) from None
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except Exception as error:  # readers of broken files raise KeyError, TypeError, ...
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise IntScaleError(
            f"{model} has no usable tokenizer ({reason}); check the name, and in a folder "
            "tokenizer.json"
        ) from None
    for text in texts:
        yield tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _pieces(content: str) -> Iterator[str]:
    """Of at most PIECE characters, whole lines where lines are shorter."""
    start = 0
    while start < len(content):
        end = start + PIECE
        if end < len(content):
            end = content.rfind("\n", start, end) + 1 or end
        yield content[start:end]
        start = end
