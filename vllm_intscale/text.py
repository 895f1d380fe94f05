"""Texts as a model's tokens."""

from __future__ import annotations

from vllm_intscale.errors import IntScaleError


def tokenize(model: str, content: str) -> list[int]:
    """Token ids, without special tokens, by the tokenizer of a folder or hub id.

    Raises IntScaleError if transformers or the tokenizer is missing.
    """
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise IntScaleError(
            f"transformers cannot be imported ({error}); it reads texts: pip install transformers"
        ) from None
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise IntScaleError(f"{model} has no usable tokenizer ({reason}); check the name") from None
    ids: list[int] = tokenizer(content, add_special_tokens=False, verbose=False)["input_ids"]
    return ids
