"""`intscale bench gemm`: one W4A8 linear layer, ours and every peer's, on one GPU.

Each shape is timed in a process of its own (`worker`), which prepares every kernel's weight once
and then goes through M. While one runs, the next already imports vLLM and waits.
"""

from __future__ import annotations

import json
import subprocess
import sys
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch

from vllm_intscale.bench.arguments import parse_names
from vllm_intscale.bench.moe_peers import PEERS as EXPERT_PEERS
from vllm_intscale.bench.peers import GROUP, PEERS
from vllm_intscale.bench.results import Row, ShapeResults, set_ratios
from vllm_intscale.bench.worker import CONTEXT_LOST, Request
from vllm_intscale.errors import IntScaleError

# N x K. The layers of LLaMA-3-8B, and the one that the paper on Integer Scale times.
SHAPES = {
    "qkv": (6144, 4096),
    "o": (4096, 4096),
    "gate_up": (28672, 4096),
    "down": (4096, 14336),
    "paper": (22016, 4096),
}
TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)


def parse_shapes(values: Iterable[str]) -> dict[str, tuple[int, int]]:
    """Names of presets or NxK, separated by commas, to N and K; none means every preset."""
    names = parse_names(values)
    shapes = {name: _shape(name) for name in names} or dict(SHAPES)
    for name, (n, k) in shapes.items():
        if n < 1 or k < GROUP or k % GROUP:
            raise IntScaleError(f"--shape {name}: K must be a multiple of {GROUP}, N at least 1")
    return shapes


def _shape(name: str) -> tuple[int, int]:
    if name in SHAPES:
        return SHAPES[name]
    n, _, k = name.partition("x")
    if not (n.isdecimal() and k.isdecimal()):
        raise IntScaleError(
            f"--shape {name}: unknown; use NxK such as 6144x4096, or {', '.join(SHAPES)}"
        )
    return int(n), int(k)


def benchmark(
    shapes: Mapping[str, tuple[int, ...]],
    tokens: Sequence[int],
    kernels: Sequence[str],
    folder: Path,
    kind: str = "gemm",
) -> tuple[list[Row], list[str]]:
    """Time what the result files in `folder` do not hold yet, and return what was asked for.

    Returns rows and, in one line each, the shapes whose process failed. Kernels that fail are
    rows with an error.

    Raises IntScaleError without a CUDA device, or if a file in `folder` is not ours.
    """
    if not torch.cuda.is_available():
        raise IntScaleError(
            "bench needs a CUDA device, and torch finds none; check nvidia-smi and that this torch "
            f"({torch.__version__}) is built for CUDA"
        )
    session = uuid.uuid4().hex[:8]
    requests = [
        Request(
            kind, name, size, list(tokens), list(kernels), str(folder / f"{name}.json"), session
        )
        for name, size in shapes.items()
    ]
    missing = [request for request in requests if _is_missing(request)]
    failures = []
    waiting = _start(missing[0]) if missing else None
    for i, request in enumerate(missing):
        process, waiting = waiting, None
        assert process
        try:
            if i + 1 < len(missing):
                waiting = _start(missing[i + 1])
            code = _let_run(process)
            while code == CONTEXT_LOST and _is_missing(request):
                code = _let_run(_start(request))  # the kernel that failed is left out
        except BaseException:
            for running in filter(None, (process, waiting)):
                running.kill()
            raise
        if code not in (0, CONTEXT_LOST):
            failures.append(
                f"{request.shape}: its process ended with code {code}, see above; rows up to then "
                f"are in {request.path}, and running again goes on from there"
            )
    rows = []
    for request in requests:
        wanted = set(tokens)
        rows += [row for row in _load(request).rows if row.M in wanted]
    set_ratios(rows)
    return _in_order(rows, list(shapes), kernels), failures


def _in_order(rows: Iterable[Row], shapes: Sequence[str], kernels: Sequence[str]) -> list[Row]:
    """As asked for; then the kernels that the files hold besides, which the control confirmed."""
    order = {name: i for i, name in enumerate(dict.fromkeys([*kernels, *PEERS, *EXPERT_PEERS]))}
    last = len(order)  # a kernel of another version of this package

    def key(row: Row) -> tuple[int, str, int, str, int]:
        place = order.get(row.kernel, last)
        return shapes.index(row.shape), row.mode, place, row.kernel, row.M

    return sorted(rows, key=key)


def _load(request: Request) -> ShapeResults:
    return ShapeResults(Path(request.path), request.shape, *request.size[:2])


def _is_missing(request: Request) -> bool:
    results = _load(request)
    return any(results.missing(m, request.kernels, request.session) for m in request.tokens)


def _start(request: Request) -> subprocess.Popen[str]:
    """A worker that imports what it needs, then waits to be let run."""
    return subprocess.Popen(
        [sys.executable, "-m", "vllm_intscale.bench.worker", json.dumps(request._asdict())],
        stdin=subprocess.PIPE,
        stdout=2,  # vLLM logs to stdout; ours ends with JSON
        text=True,
    )


def _let_run(process: subprocess.Popen[str]) -> int:
    process.communicate("go\n")
    return process.returncode
