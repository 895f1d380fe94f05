"""Is a quantized checkpoint what the quantizer wrote, and can it be served? `intscale verify`."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import safe_open

from vllm_intscale.checkpoint import StoredTensor, inside, read_headers, validate_checkpoint
from vllm_intscale.errors import IntScaleError
from vllm_intscale.format import TENSOR_NAMES, validate_layer

SUMS = "SHA256SUMS"  # as sha256sum of coreutils writes and checks it
BLOCK_ELEMENTS = 1 << 24  # of an unquantized tensor read at a time


class Verified(NamedTuple):
    """What was found in order. files: whose hash agrees, 0 if the checkpoint brings no hashes."""

    layers: int
    tensors: int
    files: int


def write_sums(folder: Path, leave_out: Collection[Path] = ()) -> None:
    """Write the SHA-256 of every file of a checkpoint, subfolders included, to `SUMS`."""
    files = (p for p in folder.rglob("*") if p.is_file() and p not in leave_out)
    names = sorted(str(p.relative_to(folder)) for p in files)
    lines = [f"{_digest(folder / name)}  {name}\n" for name in names if name != SUMS]
    (folder / SUMS).write_text("".join(lines))


def verify(folder: Path, on_progress: Callable[[str], None] = lambda _: None) -> Verified:
    """Check config, headers, hashes and every value of an intscale checkpoint.

    on_progress: called with the name of each file and quantized layer before it is read.

    Raises IntScaleError naming file, tensor, reason and remedy: what `validate_checkpoint` finds
    in the headers, a file whose hash differs or that is missing, a scale out of bounds, an
    accumulator that could overflow (`format.validate_layer`), NaN or infinity anywhere.
    """
    config = validate_checkpoint(folder)
    files = _check_sums(folder, on_progress)
    tensors = read_headers(folder)
    layers: dict[str, dict[str, StoredTensor]] = {}
    with ExitStack() as stack:
        opened: dict[Path, Any] = {}

        def opened_file(stored: StoredTensor) -> Any:
            if stored.file not in opened:
                opened[stored.file] = stack.enter_context(safe_open(stored.file, framework="pt"))
            return opened[stored.file]

        for stored in tensors.values():
            layer, _, part = stored.name.rpartition(".")
            if part in TENSOR_NAMES:
                layers.setdefault(layer, {})[part] = stored
            else:
                _check_finite(opened_file(stored), stored)
        for layer, parts in layers.items():
            on_progress(layer)
            scheme = config.scheme_of(layer)
            assert scheme  # validate_checkpoint has refused it
            values = {part: opened_file(t).get_tensor(t.name) for part, t in parts.items()}
            k = values["qweight"].shape[1] * 32 // scheme.bits
            validate_layer(f"{parts['qweight'].file}: {layer}", values, scheme, k)
    return Verified(len(layers), len(tensors), files)


def _check_sums(folder: Path, on_progress: Callable[[str], None]) -> int:
    if not (folder / SUMS).exists():
        return 0
    lines = inside(folder, SUMS).read_text(errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        digest, _, name = line.partition("  ")
        if len(digest) != 64 or not name:
            raise IntScaleError(
                f"{folder / SUMS}: line {number} is not a hash and a name; download the model again"
            )
        on_progress(name)
        path = inside(folder, name)
        if _digest(path) != digest:
            raise IntScaleError(
                f"{path} is not what was written: its SHA-256 differs from {SUMS}; download or "
                "quantize the model again"
            )
    return len(lines)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_finite(file: Any, stored: StoredTensor) -> None:
    values = file.get_slice(stored.name) if stored.shape else file.get_tensor(stored.name)[None]
    rows = stored.shape[0] if stored.shape else 1
    step = max(1, BLOCK_ELEMENTS // max(1, math.prod(stored.shape[1:])))
    for row in range(0, rows, step):
        block = values[row : row + step]
        if block.is_floating_point() and not block.float().isfinite().all():
            raise IntScaleError(
                f"{stored.file}: tensor {stored.name} holds NaN or infinity; quantize the model "
                "again from a source without them"
            )
