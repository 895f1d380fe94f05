"""What of a checkpoint is written already, so that a run that was killed can go on."""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm_intscale import __version__
from vllm_intscale.errors import IntScaleError
from vllm_intscale.quantize.calibration import Calibration
from vllm_intscale.quantize.source import Plan

JOURNAL = "journal.jsonl"
SYNC_BYTES = 1 << 28  # of the source, between two waits for the disk


class Journal:
    """One line for each tensor that is complete and on the disk, after one with a fingerprint.

    done: the lines of an earlier run. Raises IntScaleError if that was another request, or is
    still running.
    """

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.path = folder / JOURNAL
        self._waiting: list[dict[str, Any]] = []
        self._bytes = 0
        self._file = self.path.open("a+")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise IntScaleError(
                f"{folder} is being written by another run; wait for it or choose another output "
                "folder"
            ) from None
        self._file.seek(0)
        lines = self._file.read().split("\n")[:-1]  # what follows the last newline is torn
        if lines and json.loads(lines[0]) != {"fingerprint": fingerprint}:
            self._file.close()
            raise IntScaleError(
                f"{folder} is of another request: the model, an option or the version of "
                "vllm-intscale differs; repeat the request as it was, or remove the folder"
            )
        self.done: dict[str, dict[str, Any]] = {
            entry["name"]: entry for entry in map(json.loads, lines[1:])
        }
        self._file.truncate(sum(len(line) + 1 for line in lines))
        if not lines:
            self._append({"fingerprint": fingerprint})

    def add(self, name: str, nbytes: int, sync: Callable[[], None], **outcome: Any) -> None:
        """Note that a tensor is complete, which took so many bytes of the source.

        sync: returns when all tensors are on the disk.
        """
        self._waiting.append({"name": name, **outcome})
        self._bytes += nbytes
        if self._bytes >= SYNC_BYTES:
            sync()
            self._append(*self._waiting)
            self._waiting, self._bytes = [], 0

    def _append(self, *entries: dict[str, Any]) -> None:
        self._file.write("".join(json.dumps(entry) + "\n" for entry in entries))
        self._file.flush()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()


def fingerprint(plan: Plan, search: bool, calibration: Calibration | None = None) -> str:
    """Of all that decides about the bytes written; the model counts by its files' sizes and times.

    Raises IntScaleError if the text of the calibration cannot be read.
    """
    text = None
    if calibration:
        content_hash = hashlib.sha256(calibration.content().encode()).hexdigest()
        text = [content_hash, *calibration[1:]]
    config = plan.config.to_dict()
    config["source"].pop("command", None)  # of the same request, it may be spelled otherwise
    files = {m.stored.file for m in plan.matrices}
    files |= {part.file for m in plan.matrices if m.packed for part in m.packed.parts.values()}
    content = {
        "version": __version__,
        "config": config,
        "search": search,
        "calibration": text,
        "matrices": [(m.name, m.shape, str(m.scheme)) for m in plan.matrices],
        "files": [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in sorted(files)],
    }
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
