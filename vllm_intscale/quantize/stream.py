"""Write a quantized checkpoint block by block: memory does not grow with the model.

The shapes of all tensors are known before the first is written, so the header of each shard comes
first and every block of rows goes straight to its place.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from vllm_intscale.checkpoint import (
    CONFIG,
    DTYPES,
    INDEX,
    SINGLE_FILE,
    StoredTensor,
    inside,
    validate_checkpoint,
)
from vllm_intscale.errors import IntScaleError
from vllm_intscale.format import TENSOR_NAMES, Amplifier, LayerScheme
from vllm_intscale.quantize.packed import ROWS, PackedLayer
from vllm_intscale.quantize.rtn import (
    ConvertedRows,
    convert_rows,
    heuristic_amplifier,
    quantize_rows,
    requantize_rows,
    smallest_scale,
)
from vllm_intscale.quantize.source import OTHER_WEIGHTS, Matrix, Plan
from vllm_intscale.verify import write_sums

BLOCK_ELEMENTS = 1 << 18  # all that is computed from a block stays in a core's cache
CONVERTED_ELEMENTS = 1 << 20  # of a block; columns of narrow ones are read bit by bit
SHARD_BYTES = 5_000_000_000
REPORT = "report.json"
# What other tools say of the quantization that is replaced.
QUANTIZATION_CONFIGS = ("quantize_config.json", "quant_config.json", "quantization_config.json")
_SPELLING = {dtype: spelling for spelling, dtype in DTYPES.items()}


class Progress(NamedTuple):
    """How far the work is; bytes are those of the source."""

    tensors: int
    total_tensors: int
    bytes: int
    total_bytes: int


@dataclass
class Conversion:
    """What became of a layer that had been quantized before."""

    groups: int = 0
    kept_groups: int = 0  # whose codes are the same
    squared_error: float = 0.0  # of the weights, against what they were
    squares: float = 0.0

    @property
    def error(self) -> float:
        """Root mean square, relative."""
        return math.sqrt(self.squared_error / self.squares) if self.squares else 0.0

    def to_dict(self) -> dict[str, float]:
        """As `REPORT` has it."""
        return {"groups": self.groups, "kept_groups": self.kept_groups, "error": self.error}


@dataclass
class Report:
    """What was done."""

    layers: int = 0  # quantized
    weights: int = 0  # of the quantized layers
    quantized_source_bytes: int = 0  # of the quantized layers
    quantized_bytes: int = 0
    source_bytes: int = 0  # of all tensors
    written_bytes: int = 0
    left: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))  # by reason
    conversions: dict[str, Conversion] = field(default_factory=dict)  # of layers quantized before
    lost_groups: int = 0
    bound: int = 0  # largest bound of an int32 accumulator
    bound_layer: str = ""

    def add_rows(self, layer: str, lost_groups: int, bound: int) -> None:
        """Count what happened to some rows of a layer."""
        self.lost_groups += lost_groups
        if bound > self.bound:
            self.bound, self.bound_layer = bound, layer


class TensorSpec(NamedTuple):
    """A tensor to write; dtype as safetensors spells it."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        bits = re.search(r"\d+", self.dtype)  # "BF16", "F8_E4M3"; none in "BOOL"
        return int(bits[0]) // 8 if bits else 1

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return math.prod(self.shape) * self.itemsize


def write_checkpoint(
    plan: Plan,
    out: Path,
    on_progress: Callable[[Progress], None] = lambda _: None,
    search: bool = False,
) -> Report:
    """Quantize and write the whole checkpoint to the new folder `out`, or nothing at all.

    Everything goes to `out` + ".partial" first, which is removed on any exception. search: see
    `rtn.quantize_rows`.

    Raises IntScaleError if a folder is in the way, the disk too small, a weight NaN or infinite,
    or the chosen amplifier too large.
    """
    partial = check_output(out, plan.folder)
    specs = [spec for m in plan.matrices for spec in _specs(m)]
    needed, free = sum(s.nbytes for s in specs), shutil.disk_usage(partial.parent).free
    if needed > free:
        raise IntScaleError(
            f"{out} needs {needed / 2**30:.1f} GiB, but its disk has {free / 2**30:.1f} GiB free; "
            "choose another disk"
        )
    partial.mkdir()
    try:
        with ShardWriter(partial, specs) as writer:
            report = _quantize_all(plan, writer, on_progress, search)
        _copy_other_files(plan.folder, partial)
        model_config = {**plan.model_config, "quantization_config": plan.config.to_dict()}
        (partial / CONFIG).write_text(json.dumps(model_config, indent=2) + "\n")
        if report.conversions:
            layers = {name: c.to_dict() for name, c in report.conversions.items()}
            (partial / REPORT).write_text(json.dumps({"layers": layers}, indent=2) + "\n")
        validate_checkpoint(partial)
        write_sums(partial)
        for path in (*partial.rglob("*"), partial):
            _fsync(path)
        partial.rename(out)
        _fsync(out.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return report


def check_output(out: Path, source: Path | None = None) -> Path:
    """The partial folder to write to before it becomes `out`; IntScaleError if one exists."""
    partial = out.with_name(out.name + ".partial")
    unfinished = "belongs to a run that was killed or still runs"
    for path, what in ((out, "exists"), (partial, unfinished)):
        if path.exists() or path.is_symlink():
            raise IntScaleError(f"{path} {what}; remove it or choose another output folder")
    if not out.parent.is_dir():
        raise IntScaleError(f"{out.parent} is not a folder; create it first")
    if source and out.resolve().is_relative_to(source.resolve()):
        raise IntScaleError(f"{out} is inside of the source folder; choose a folder outside of it")
    return partial


def _quantize_all(
    plan: Plan, writer: ShardWriter, on_progress: Callable[[Progress], None], search: bool
) -> Report:
    report = Report(written_bytes=writer.total_bytes)
    total_bytes = sum(_source_bytes(m) for m in plan.matrices)
    tensors = 0
    with _workers() as workers, OpenFiles() as files:
        for m in plan.matrices:
            if m.scheme is None:
                report.left[m.left].append(m.layer)
                for row, block in _blocks(files, m):
                    writer.write(m.name, row, block)
            elif m.packed:
                _convert(
                    files, m, m.packed, m.scheme, plan.config.amplifier, workers, writer, report
                )
            else:
                _quantize(
                    files, m, m.scheme, plan.config.amplifier, search, workers, writer, report
                )
            tensors += 1
            report.source_bytes += _source_bytes(m)
            on_progress(Progress(tensors, len(plan.matrices), report.source_bytes, total_bytes))
    return report


def _workers() -> ThreadPoolExecutor:
    """As many threads as torch would use, each of which works on a block alone.

    That scales better than torch's threads, which wait for each other after every operation.
    """
    return ThreadPoolExecutor(
        torch.get_num_threads(), initializer=torch.set_num_threads, initargs=(1,)
    )


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


def _quantize(
    files: OpenFiles,
    m: Matrix,
    scheme: LayerScheme,
    amplifier: Amplifier,
    search: bool,
    workers: ThreadPoolExecutor,
    writer: ShardWriter,
    report: Report,
) -> None:
    where = f"{m.stored.file}: {m.name}"
    if amplifier == "heuristic":
        scales = workers.map(
            lambda block: smallest_scale(where, block[1], scheme), _blocks(files, m)
        )
        amplifier = heuristic_amplifier(min(scales))

    def quantize_block(block: tuple[int, Tensor]) -> tuple[int, int]:
        row, weight = block
        rows = quantize_rows(where, weight, scheme, amplifier, search)
        for name in TENSOR_NAMES:  # written here: results that wait would fill the memory
            writer.write(f"{m.layer}.{name}", row, getattr(rows, name))
        return rows.lost_groups, rows.bound

    for lost_groups, bound in workers.map(quantize_block, _blocks(files, m)):
        report.add_rows(m.layer, lost_groups, bound)
    _add_layer(report, m)


def _convert(
    files: OpenFiles,
    m: Matrix,
    packed: PackedLayer,
    scheme: LayerScheme,
    amplifier: Amplifier,
    workers: ThreadPoolExecutor,
    writer: ShardWriter,
    report: Report,
) -> None:
    where = f"{m.stored.file}: {m.layer}"
    assert amplifier != "heuristic"  # needs a look at all rows first
    n, k = m.shape
    step = max(ROWS, CONVERTED_ELEMENTS // k // ROWS * ROWS)

    def convert_block(row: int) -> ConvertedRows:
        codes, scale = packed.rows(files.slice, row, min(row + step, n))
        if packed.group_of is None:
            scale = scale.repeat_interleave(packed.group_size // scheme.group_size, dim=1)
            scale = scale[:, : k // scheme.group_size]
            converted = convert_rows(where, codes, scale, scheme, amplifier)
        else:
            weight = codes * scale[:, packed.group_of]
            converted = requantize_rows(where, weight, scheme, amplifier)
        for name in TENSOR_NAMES:
            writer.write(f"{m.layer}.{name}", row, getattr(converted.rows, name))
        return converted

    total = report.conversions[m.layer] = Conversion(groups=n * k // scheme.group_size)
    for rows, kept_groups, squared_error, squares in workers.map(convert_block, range(0, n, step)):
        report.add_rows(m.layer, rows.lost_groups, rows.bound)
        total.kept_groups += kept_groups
        total.squared_error += squared_error
        total.squares += squares
    _add_layer(report, m)


def _add_layer(report: Report, m: Matrix) -> None:
    report.layers += 1
    report.weights += math.prod(m.shape)
    report.quantized_source_bytes += _source_bytes(m)
    report.quantized_bytes += sum(spec.nbytes for spec in _specs(m))


def _blocks(files: OpenFiles, m: Matrix) -> Iterator[tuple[int, Tensor]]:
    """Blocks of whole rows of a matrix, views of its mapped file, with their first row's number."""
    stored = files.slice(m.stored)
    if not m.shape:
        yield 0, stored[...]
        return
    step = max(1, BLOCK_ELEMENTS // max(1, math.prod(m.shape[1:])))
    for row in range(0, m.shape[0], step):
        rows = slice(m.first_row + row, m.first_row + min(row + step, m.shape[0]))
        yield row, stored[rows] if m.expert is None else stored[m.expert, rows]


def _specs(m: Matrix) -> list[TensorSpec]:
    """The tensors that become of a matrix."""
    if m.scheme is None:
        return [TensorSpec(m.name, m.stored.dtype, m.shape)]
    tensors = m.scheme.tensor_specs(m.shape[0], m.shape[1])
    return [
        TensorSpec(f"{m.layer}.{name}", _SPELLING[dtype], shape)
        for name, (dtype, shape) in tensors.items()
    ]


def _source_bytes(m: Matrix) -> int:
    if m.packed:
        return m.packed.nbytes
    return TensorSpec(m.name, m.stored.dtype, m.shape).nbytes


class ShardWriter:
    """safetensors shards of at most `SHARD_BYTES` (or one tensor), and their index.

    All tensors are announced first; then their rows may be written in any order. Leaving the
    context without an error completes the shards.
    """

    def __init__(self, folder: Path, specs: list[TensorSpec]) -> None:
        self.total_bytes = sum(spec.nbytes for spec in specs)
        self._places: dict[str, tuple[int, int, int]] = {}  # file, offset, bytes of a row
        self._files = ExitStack()
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
        path.write_bytes(text)
        file = os.open(path, os.O_WRONLY)
        self._files.callback(os.close, file)
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

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self._files.close()


def _copy_other_files(source: Path, target: Path) -> None:
    """Copy every file that is not a weight: tokenizer, templates, remote code, licence, ..."""
    weights = ("*.safetensors", "*.safetensors.index*.json", "*.bin.index*.json", *OTHER_WEIGHTS)
    weights += QUANTIZATION_CONFIGS
    for path in sorted(source.rglob("*")):
        name = path.relative_to(source)
        hidden = any(part.startswith(".") for part in name.parts)
        if hidden or not path.is_file() or any(fnmatch(path.name, w) for w in weights):
            continue
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(inside(source, str(name)), target / name)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
