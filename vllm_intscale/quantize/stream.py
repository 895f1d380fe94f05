"""Write a quantized checkpoint block by block: memory does not grow with the model.

The shapes of all tensors are known before the first is written, so the header of each shard comes
first and every block of rows goes straight to its place. A journal names the tensors that are
complete, with which a run that was killed can go on.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from vllm_intscale.checkpoint import CONFIG, DTYPES, inside, validate_checkpoint
from vllm_intscale.errors import IntScaleError
from vllm_intscale.format import TENSOR_NAMES, Amplifier, LayerScheme
from vllm_intscale.quantize.calibrate import calibrate
from vllm_intscale.quantize.calibration import Calibration
from vllm_intscale.quantize.journal import JOURNAL, Journal, fingerprint
from vllm_intscale.quantize.loss import MEASURED, Loss, measure
from vllm_intscale.quantize.packed import ROWS, PackedLayer
from vllm_intscale.quantize.report import Conversion, Outcome, Progress, Report
from vllm_intscale.quantize.report_page import write_report
from vllm_intscale.quantize.rtn import (
    ConvertedRows,
    QuantizedRows,
    convert_rows,
    heuristic_amplifier,
    quantize_rows,
    requantize_rows,
    smallest_scale,
)
from vllm_intscale.quantize.shards import OpenFiles, ShardWriter, TensorSpec
from vllm_intscale.quantize.smooth import Scales
from vllm_intscale.quantize.source import OTHER_WEIGHTS, Matrix, Plan
from vllm_intscale.verify import write_sums

BLOCK_ELEMENTS = 1 << 18  # all that is computed from a block stays in a core's cache
CONVERTED_ELEMENTS = 1 << 20  # of a block; columns of narrow ones are read bit by bit
# What other tools say of the quantization that is replaced.
QUANTIZATION_CONFIGS = ("quantize_config.json", "quant_config.json", "quantization_config.json")
_SPELLING = {dtype: spelling for spelling, dtype in DTYPES.items()}


def write_checkpoint(
    plan: Plan,
    out: Path,
    on_progress: Callable[[Progress], None] = lambda _: None,
    search: bool = False,
    resume: bool = False,
    calibration: Calibration | None = None,
) -> Report:
    """Quantize and write the whole checkpoint to the new folder `out`, or nothing at all.

    Everything goes to `out` + ".partial" first. An exception removes it, unless all tensors are
    written: then it stays, to be resumed. search: see `rtn.quantize_rows`. resume: go on with such
    a folder of the same request, whose run was killed. calibration: quantize what it reaches by its
    method.

    Raises IntScaleError if a folder is in the way, the disk too small, a link leads outside of the
    model folder, a weight is NaN or infinite, or the chosen amplifier too large.
    """
    partial = check_output(out, plan.folder, resume)
    other_files = _other_files(plan.folder)
    specs = [spec for m in plan.matrices for spec in _specs(m)]
    needed, free = sum(s.nbytes for s in specs), shutil.disk_usage(partial.parent).free
    if partial.exists():
        free += sum(path.stat().st_blocks * 512 for path in partial.rglob("*"))
    if needed > free:
        raise IntScaleError(
            f"{out} needs {needed / 2**30:.1f} GiB, but its disk has {free / 2**30:.1f} GiB free; "
            "choose another disk"
        )
    request = fingerprint(plan, search, calibration)
    partial.mkdir(exist_ok=resume)
    with Journal(partial, request) as journal:
        try:
            with ShardWriter(partial, specs) as writer:
                if journal.done and writer.created:
                    raise IntScaleError(
                        f"{partial} lacks files that {JOURNAL} says were written; start again"
                    )
                report = _write_all(plan, writer, journal, on_progress, search, calibration)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        _copy_files(other_files, partial)
        model_config = {**plan.model_config, "quantization_config": plan.config.to_dict()}
        (partial / CONFIG).write_text(json.dumps(model_config, indent=2) + "\n")
        write_report(partial, report, plan.config)
        validate_checkpoint(partial)
        write_sums(partial, {journal.path})
        for path in (*partial.rglob("*"), partial):
            _fsync(path)
        journal.path.unlink()
        partial.rename(out)
        _fsync(out.parent)
    return report


def check_output(out: Path, source: Path | None = None, resume: bool = False) -> Path:
    """The partial folder to write to before it becomes `out`; IntScaleError if it is in the way."""
    if out.exists() or out.is_symlink():
        raise IntScaleError(f"{out} exists; remove it or choose another output folder")
    partial = out.with_name(out.name + ".partial")
    if not resume and (partial.exists() or partial.is_symlink()):
        raise IntScaleError(
            f"{partial} belongs to a run that was killed or still runs; go on with it by --resume, "
            "remove it or choose another output folder"
        )
    if resume and partial.exists() and not (partial / JOURNAL).is_file():
        raise IntScaleError(f"{partial} has no {JOURNAL} to resume from; remove it")
    if not out.parent.is_dir():
        raise IntScaleError(f"{out.parent} is not a folder; create it first")
    if source and out.resolve().is_relative_to(source.resolve()):
        raise IntScaleError(f"{out} is inside of the source folder; choose a folder outside of it")
    return partial


def _write_all(
    plan: Plan,
    writer: ShardWriter,
    journal: Journal,
    on_progress: Callable[[Progress], None],
    search: bool,
    calibration: Calibration | None,
) -> Report:
    report = Report(written_bytes=writer.total_bytes)
    total_bytes = sum(_source_bytes(m) for m in plan.matrices)
    finished = Progress(0, len(plan.matrices), 0, total_bytes)

    def finish(m: Matrix, outcome: Outcome | None = None) -> None:
        """Count a tensor, and note what became of it if it was written now."""
        nonlocal finished
        if outcome:
            journal.add(m.name, _source_bytes(m), writer.sync, **outcome.to_dict())
        tensors, done_bytes = finished.tensors + 1, finished.bytes + _source_bytes(m)
        finished = finished._replace(tensors=tensors, bytes=done_bytes)
        on_progress(finished)

    with make_workers() as workers, OpenFiles() as files:
        work = _Work(files, workers, writer, plan.config.amplifier, search)
        outcomes = {name: Outcome.from_dict(entry) for name, entry in journal.done.items()}
        now: dict[str, Outcome] = {}
        if calibration:
            now, work.scales = work.calibrate(plan, calibration, outcomes, finish)
            report.smoothed = sum(scales.columns is not None for scales in work.scales.values())
        for m in plan.matrices:
            outcome = now.get(m.name)
            if outcome is None and (outcome := outcomes.get(m.name)):
                finish(m)
            if outcome is None:
                outcome = work.write(m)
                finish(m, outcome)
            if m.scheme is None:
                report.left[m.left].append(m.layer)
            else:
                report.add_quantized(m.layer, m.scheme, outcome)
                if calibration and not outcome.calibrated:
                    report.uncalibrated.append(m.layer)
                report.weights += math.prod(m.shape)
                report.quantized_source_bytes += _source_bytes(m)
                report.quantized_bytes += sum(spec.nbytes for spec in _specs(m))
            report.source_bytes += _source_bytes(m)
    return report


def read_quantized(plan: Plan) -> Iterator[tuple[str, Tensor]]:
    """The tensors that `write_checkpoint` would write, one matrix in memory at a time."""
    with make_workers() as workers, OpenFiles() as files:
        for m in plan.matrices:
            if m.scheme is None:
                stored = files.slice(m.stored)
                if m.expert is not None:
                    stored = stored[m.expert, m.first_row : m.first_row + m.shape[0]]
                yield m.name, stored[...]
            else:
                held = _Held(_specs(m))
                _Work(files, workers, held, plan.config.amplifier, search=False).write(m)
                yield from held.tensors.items()


class _Held:
    """Instead of files: the tensors of a quantized matrix in memory."""

    def __init__(self, specs: list[TensorSpec]) -> None:
        self.tensors = {
            spec.name: torch.empty(spec.shape, dtype=DTYPES[spec.dtype]) for spec in specs
        }

    def write(self, name: str, row: int, rows: Tensor) -> None:
        self.tensors[name][row : row + rows.shape[0]] = rows

    def read(self, name: str) -> Tensor:
        return self.tensors[name]


class _Writer(Protocol):
    def write(self, name: str, row: int, rows: Tensor) -> None: ...
    def read(self, name: str) -> Tensor: ...


def make_workers() -> ThreadPoolExecutor:
    """As many threads as torch would use, each of which works on a block alone.

    That scales better than torch's threads, which wait for each other after every operation.
    """
    return ThreadPoolExecutor(
        torch.get_num_threads(), initializer=torch.set_num_threads, initargs=(1,)
    )


@dataclass
class _Work:
    """What writing a tensor takes. scales: of tensors that smoothing has changed."""

    files: OpenFiles
    workers: ThreadPoolExecutor
    writer: _Writer
    amplifier: Amplifier
    search: bool
    scales: dict[str, Scales] = field(default_factory=dict)

    def write(self, m: Matrix) -> Outcome:
        """Copy, quantize or convert a matrix."""
        if m.scheme is None:
            for row, block in self._blocks(m):
                self.writer.write(m.name, row, block)
            return Outcome()
        if m.packed:
            return self._convert(m, m.packed, m.scheme)
        return self._quantize(m, m.scheme)

    def calibrate(
        self,
        plan: Plan,
        calibration: Calibration,
        before: Mapping[str, Outcome],
        finish: Callable[[Matrix, Outcome], None],
    ) -> tuple[dict[str, Outcome], dict[str, Scales]]:
        """Quantize what the calibration reaches: outcomes, and scales of the rest.

        before: outcomes of a run that was killed.
        """
        outcomes: dict[str, Outcome] = defaultdict(lambda: Outcome(calibrated=True))

        def write(m: Matrix, row: int, rows: QuantizedRows, loss: Loss) -> None:
            self.write_rows(m, row, rows)
            outcomes[m.name].add(Outcome.of(rows, loss))
            if row + rows.qweight.shape[0] == m.shape[0]:
                finish(m, outcomes[m.name])

        def written(m: Matrix) -> list[Tensor] | None:
            outcome = before.get(m.name)
            if outcome is None or not outcome.calibrated:
                return None
            return [self.writer.read(f"{m.layer}.{name}") for name in TENSOR_NAMES]

        scales = calibrate(plan, self.files, calibration, self.amplifier, write, written)
        return outcomes, scales

    def _blocks(self, m: Matrix) -> Iterator[tuple[int, Tensor]]:
        """Blocks of whole rows of a matrix, with their first row's number; as stored unless scaled.

        They are views of its mapped file if nothing has to be computed.
        """
        stored = self.files.slice(m.stored)
        if not m.shape:
            yield 0, stored[...]
            return
        scales = self.scales.get(m.name)
        step = max(1, BLOCK_ELEMENTS // max(1, math.prod(m.shape[1:])))
        for row in range(0, m.shape[0], step):
            rows = slice(m.first_row + row, m.first_row + min(row + step, m.shape[0]))
            block = stored[rows] if m.expert is None else stored[m.expert, rows]
            if scales:
                scaled = scales.apply(block, row)
                block = scaled if m.scheme else scaled.to(block.dtype)
            yield row, block

    def _quantize(self, m: Matrix, scheme: LayerScheme) -> Outcome:
        where, amplifier = f"{m.stored.file}: {m.name}", self.amplifier
        if amplifier == "heuristic":
            scales = self.workers.map(
                lambda block: smallest_scale(where, block[1], scheme), self._blocks(m)
            )
            amplifier = heuristic_amplifier(min(scales))

        def quantize_block(number: int, block: tuple[int, Tensor]) -> Outcome:
            row, weight = block
            rows = quantize_rows(where, weight, scheme, amplifier, self.search)
            self.write_rows(m, row, rows)
            measured = number % MEASURED == 0
            return Outcome.of(rows, measure(weight, rows, scheme.bits) if measured else None)

        outcome = Outcome()
        for part in self.workers.map(quantize_block, itertools.count(), self._blocks(m)):
            outcome.add(part)
        return outcome

    def _convert(self, m: Matrix, packed: PackedLayer, scheme: LayerScheme) -> Outcome:
        where, amplifier = f"{m.stored.file}: {m.layer}", self.amplifier
        assert amplifier != "heuristic"  # refused before
        n, k = m.shape
        step = max(ROWS, CONVERTED_ELEMENTS // k // ROWS * ROWS)
        total = Conversion(groups=n * k // scheme.group_size)

        def convert_block(row: int) -> ConvertedRows:
            codes, scale = packed.rows(self.files.slice, row, min(row + step, n))
            if packed.group_of is None:
                scale = scale.repeat_interleave(packed.group_size // scheme.group_size, dim=1)
                scale = scale[:, : k // scheme.group_size]
                converted = convert_rows(where, codes, scale, scheme, amplifier)
            else:
                weight = codes * scale[:, packed.group_of]
                converted = requantize_rows(where, weight, scheme, amplifier)
            self.write_rows(m, row, converted.rows)
            return converted

        outcome = Outcome(conversion=total)
        for rows, kept_groups, squared_error, squares in self.workers.map(
            convert_block, range(0, n, step)
        ):
            outcome.add(Outcome.of(rows))
            total.kept_groups += kept_groups
            total.squared_error += squared_error
            total.squares += squares
        return outcome

    def write_rows(self, m: Matrix, row: int, rows: QuantizedRows) -> None:
        """Where they belong. In the worker: results that wait would fill the memory."""
        for name in TENSOR_NAMES:
            self.writer.write(f"{m.layer}.{name}", row, getattr(rows, name).cpu())


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


def _other_files(source: Path) -> dict[Path, Path]:
    """Every file that is not a weight (tokenizer, templates, remote code, licence), by its name.

    Raises IntScaleError for a link that leads outside of the model folder.
    """
    weights = ("*.safetensors", "*.safetensors.index*.json", "*.bin.index*.json", *OTHER_WEIGHTS)
    weights += QUANTIZATION_CONFIGS
    found = {}
    for path in sorted(source.rglob("*")):
        name = path.relative_to(source)
        hidden = any(part.startswith(".") for part in name.parts)
        if hidden or not path.is_file() or any(fnmatch(path.name, w) for w in weights):
            continue
        found[name] = inside(source, str(name))
    return found


def _copy_files(files: Mapping[Path, Path], target: Path) -> None:
    for name, path in files.items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target / name)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
