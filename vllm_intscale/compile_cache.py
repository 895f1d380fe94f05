"""What vLLM's cache of compiled graphs is told: this package's code and the layout of weights.

Both decide what a graph holds. vLLM's key has neither, and it takes graphs from the cache without
looking at shapes again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from vllm.config import get_current_vllm_config_or_none


@cache
def code_digest() -> str:
    """Of this package's modules."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def name_layouts(layouts: Mapping[str, object]) -> None:
    """Keep the graphs of the engine that is being built apart from those of other layouts.

    layouts: by layer; equal ones have equal reprs.
    """
    config = get_current_vllm_config_or_none()
    if config is not None and isinstance(config.additional_config, dict):
        key = code_digest() + repr(sorted(layouts.items()))
        config.additional_config["intscale"] = hashlib.sha256(key.encode()).hexdigest()
