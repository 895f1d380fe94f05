"""safetensors files: parts of tensors read from maps of them, and rows written to their places."""

from __future__ import annotations

import json
import math
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from vllm_intscale.checkpoint import DTYPES, INDEX, SINGLE_FILE, StoredTensor, bits_of

SHARD_BYTES = 5_000_000_000


class OpenFiles(ExitStack):
    """safetensors files, opened when first read: maps of files, which take no memory."""

    def __init__(self) -> None:
        super().__init__()
        self._files: dict[Path, Any] = {}

    def slice(self, tensor: StoredTensor) -> Any:
        """A tensor to take parts of, which are views of the map where they are whole rows."""
        if tensor.file not in self._files:
            opened = safe_open(tensor.file, framework="pt")
            self._files[tensor.file] = self.enter_context(opened)
        return self._files[tensor.file].get_slice(tensor.name)


class TensorSpec(NamedTuple):
    """A tensor to write; dtype as safetensors spells it."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return bits_of(self.dtype) // 8

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return math.prod(self.shape) * self.itemsize


class ShardWriter:
    """safetensors shards of at most `SHARD_BYTES` (or one tensor), and their index.

    All tensors are announced first; then their rows may be written in any order. What is in shards
    that are there already, of the same tensors, stays.
    """

    def __init__(self, folder: Path, specs: list[TensorSpec]) -> None:
        self.total_bytes = sum(spec.nbytes for spec in specs)
        self._specs = {spec.name: spec for spec in specs}
        self._places: dict[str, tuple[int, int, int]] = {}  # file, offset, bytes of a row
        self._files = ExitStack()
        self._descriptors: list[int] = []
        self.created = False  # any shard, which was not there
        shards: list[list[TensorSpec]] = [[]]
        size = 0
        for spec in specs:
            if shards[-1] and size + spec.nbytes > SHARD_BYTES:
                shards.append([])
                size = 0
            shards[-1].append(spec)
            size += spec.nbytes
        weight_map = {}
        for i, shard in enumerate(shards, 1):
            file = SINGLE_FILE
            if len(shards) > 1:
                file = f"model-{i:05}-of-{len(shards):05}.safetensors"
            weight_map.update(dict.fromkeys((spec.name for spec in shard), file))
            self._start_shard(folder / file, shard)
        if len(shards) > 1:
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
            (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")

    def _start_shard(self, path: Path, specs: list[TensorSpec]) -> None:
        """Write the header and note the place of each tensor, wide elements first: aligned."""
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        ends = [0]
        specs = sorted(specs, key=lambda spec: -spec.itemsize)
        for spec in specs:
            offsets = (ends[-1], ends[-1] + spec.nbytes)
            header[spec.name] = {
                "dtype": spec.dtype,
                "shape": spec.shape,
                "data_offsets": offsets,
            }
            ends.append(offsets[1])
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        text = len(text).to_bytes(8, "little") + text
        self.created |= not path.exists()
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        self._descriptors.append(file)
        self._files.callback(os.close, file)
        os.pwrite(file, text, 0)
        os.truncate(file, len(text) + ends[-1])
        for spec, end in zip(specs, ends, strict=False):
            rows = spec.shape[0] if spec.shape else 1
            self._places[spec.name] = (file, len(text) + end, spec.nbytes // max(1, rows))

    def write(self, name: str, row: int, rows: Tensor) -> None:
        """Write consecutive rows of a tensor, the first of which is number `row`; thread-safe."""
        file, offset, row_bytes = self._places[name]
        offset += row * row_bytes
        data = rows.contiguous().reshape(-1).view(torch.uint8).numpy().data
        while data:
            written = os.pwrite(file, data, offset)
            data, offset = data[written:], offset + written

    def read(self, name: str) -> Tensor:
        """A whole tensor that was written."""
        spec, (file, offset, _) = self._specs[name], self._places[name]
        data = bytearray(os.pread(file, spec.nbytes, offset))
        return torch.frombuffer(data, dtype=DTYPES[spec.dtype]).view(spec.shape)

    def sync(self) -> None:
        """Return when all that was written is on the disk."""
        for file in self._descriptors:
            os.fsync(file)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self._files.close()
