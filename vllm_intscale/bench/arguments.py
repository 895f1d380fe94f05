"""What the commands of `intscale bench` are given: lists, repeated or with commas."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from vllm_intscale.errors import IntScaleError


def parse_kernels(values: Iterable[str], known: Collection[str]) -> list[str]:
    """Names of kernels separated by commas; none means all."""
    names = parse_names(values)
    if unknown := [name for name in names if name not in known]:
        raise IntScaleError(
            f"--kernels {', '.join(unknown)}: unknown; there are {', '.join(known)}"
        )
    return names or list(known)


def parse_numbers(option: str, values: Iterable[str], default: Sequence[int]) -> list[int]:
    """From 1, separated by commas, sorted; none means the default. Errors name the option."""
    names = parse_names(values)
    if wrong := [name for name in names if not name.isdecimal() or int(name) < 1]:
        raise IntScaleError(f"{option} {', '.join(wrong)}: whole numbers from 1 are needed")
    return sorted({int(name) for name in names} or set(default))


def parse_names(values: Iterable[str]) -> list[str]:
    names = (name.strip() for value in values for name in value.split(","))
    return list(dict.fromkeys(name for name in names if name))


def parse_json_object(option: str, text: str) -> dict[str, Any]:
    """An object in JSON. Raises IntScaleError that names the option."""
    try:
        found = json.loads(text)
    except ValueError as error:
        raise IntScaleError(f"{option} {text}: it must be JSON ({error})") from None
    if not isinstance(found, dict):
        raise IntScaleError(f'{option} {text}: it must be an object, such as {{"dtype": "half"}}')
    return found
