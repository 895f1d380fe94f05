"""The commands of `intscale bench`. What they run is imported when they run: torch is heavy."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import TYPE_CHECKING, Annotated

import typer

from vllm_intscale.bench.arguments import (
    parse_json_object,
    parse_kernels,
    parse_names,
    parse_numbers,
)
from vllm_intscale.errors import IntScaleError

if TYPE_CHECKING:
    from vllm_intscale.bench.serve import Row

bench = typer.Typer(help="Time kernels on this machine's GPU.", no_args_is_help=True)
BenchKernels = Annotated[
    list[str] | None, typer.Option(metavar="NAME,NAME", help="Default: all; a control, too.")
]
BenchOut = Annotated[
    Path | None,
    typer.Option(help="Folder of results, a JSON file per shape; what is there is not rerun."),
]
BenchPlot = Annotated[Path | None, typer.Option(help="Image to draw; needs matplotlib.")]


@bench.command("gemm")
def bench_gemm(
    shape: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME|NxK",
            help="qkv, o, gate_up, down (LLaMA-3-8B), paper, or any N x K. Repeatable, or with "
            "commas. Default: the named ones.",
        ),
    ] = None,
    tokens: Annotated[
        list[str] | None, typer.Option(metavar="M,M", help="Rows of activations. Default: 1..8192.")
    ] = None,
    kernels: BenchKernels = None,
    out: BenchOut = None,
    plot: BenchPlot = None,
) -> None:
    """One W4A8 linear layer beside every kernel of PyTorch, vLLM and humming that is installed.

    Every output is checked against bf16. Microseconds are medians of calls in CUDA graphs over
    rotating weights; each kernel first runs until the GPU's clock is its own. The last line on
    stdout is JSON.
    """
    from vllm_intscale.bench import gemm
    from vllm_intscale.bench.peers import PEERS

    shapes = gemm.parse_shapes(shape or ())
    chosen = parse_kernels(kernels or (), PEERS)
    sizes = parse_numbers("--tokens", tokens or (), gemm.TOKENS)
    _run_benchmark("gemm", shapes, sizes, chosen, out, plot)


@bench.command("moe")
def bench_moe(
    shape: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="mixtral (8x7B), qwen3 (30B-A3B), deepseek (V2-Lite). Repeatable, or with commas. "
            "Default: all.",
        ),
    ] = None,
    tokens: Annotated[
        list[str] | None, typer.Option(metavar="M,M", help="Tokens. Default: 1..8192.")
    ] = None,
    kernels: BenchKernels = None,
    out: BenchOut = None,
    plot: BenchPlot = None,
) -> None:
    """One layer of W4A8 experts beside every one of vLLM and humming that is installed.

    As `bench gemm`, from bf16 tokens and the router's choice to bf16; calls rotate through choices,
    even and skewed ones.
    """
    from vllm_intscale.bench import moe
    from vllm_intscale.bench.moe_peers import PEERS

    shapes = moe.parse_sizes(shape or ())
    chosen = parse_kernels(kernels or (), PEERS)
    sizes = parse_numbers("--tokens", tokens or (), moe.TOKENS)
    _run_benchmark("moe", shapes, sizes, chosen, out, plot)


@bench.command("serve")
def bench_serve(
    model: Annotated[
        str,
        typer.Option(
            help="Shape: llama-3-8b, llama-3-70b, llama-2-7b, llama-2-13b, qwen2.5-7b or "
            "mixtral-8x7b; weights are random."
        ),
    ] = "llama-3-8b",
    configurations: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME,NAME",
            help="On N GPUs: NAME_tpN, NAME_ppN or NAME_epN. Default: all, on one.",
        ),
    ] = None,
    control: Annotated[
        str, typer.Option(help="The configuration that runs beside the others.")
    ] = "fp8",
    batches: Annotated[
        list[str] | None, typer.Option(metavar="M,M", help="Requests. Default: 1,16,64,256.")
    ] = None,
    concurrency: Annotated[
        list[str] | None,
        typer.Option(
            metavar="N,N", help="Serve, too, and send so many requests at a time. Default: do not."
        ),
    ] = None,
    engine: Annotated[
        str, typer.Option(metavar="JSON", help="More arguments of vllm.LLM, for all.")
    ] = "{}",
    out: Annotated[
        Path | None, typer.Option(help="Checkpoints and logs go to OUT/MODEL, and stay.")
    ] = None,
    plot: BenchPlot = None,
) -> None:
    """A whole model in vLLM's engine, in every quantization that vLLM offers.

    Prefill, and steps of decoding by wall time and by the time that the GPU is busy; which kernel
    runs is read in the log. The control's engine answers the same questions beside those that leave
    it room, and rows count where it answers alike. With --concurrency, vLLM's server under vLLM's
    own client, too.
    The last line on stdout is JSON.
    """
    from vllm_intscale.bench import report, serve, serve_report, served
    from vllm_intscale.bench.configurations import CONFIGURATIONS, configuration_of
    from vllm_intscale.bench.random_checkpoint import model_of

    if plot:
        report.import_pyplot()  # an error now, not after the work
    names = parse_names(configurations or ()) or list(CONFIGURATIONS)
    sizes, shape = parse_numbers("--batches", batches or (), serve.BATCHES), model_of(model)
    concurrencies = parse_numbers("--concurrency", concurrency or (), ())
    arguments = parse_json_object("--engine", engine)
    for name in (*names, control):
        configuration_of(name)  # an error now if it is unknown
    rows: list[serve.Row] = []

    def on_row(row: serve.Row) -> None:
        rows.append(row)
        beside = f", beside it {row.control}" if row.control else ""
        said = row.error or f"{row.found}{beside}"
        typer.echo(f"{row.configuration} {row.what} {row.batch}: {said}", err=True)

    with _folder_of(model, out, rows) as folder:
        facts = serve.run(shape, names, sizes, folder, on_row, arguments, control)
        if concurrencies:
            started = [name for name in names if name in facts]  # others would fail again
            served.run(shape, started, concurrencies, folder, on_row, arguments)
    serve_report.print_tables(rows, facts)
    if plot:
        serve_report.plot(rows, plot)
    print(json.dumps(serve_report.summary(rows, model=model, engines=facts)))


@contextmanager
def _folder_of(model: str, out: Path | None, rows: Sequence[Row]) -> Iterator[Path]:
    """Of a model's checkpoints and logs; without `out` what stays is the logs, if errors name them.

    rows: those found, at the end.
    """
    folder = (out or Path(mkdtemp(prefix="intscale-bench-"))) / model
    folder.mkdir(parents=True, exist_ok=True)
    failed = True
    try:
        yield folder
        failed = any(row.error for row in rows)
    finally:
        if not out:
            for checkpoint in (path for path in folder.iterdir() if path.is_dir()):
                shutil.rmtree(checkpoint)
            if not failed:
                shutil.rmtree(folder.parent)


def _run_benchmark(
    kind: str,
    shapes: Mapping[str, tuple[int, ...]],
    tokens: list[int],
    kernels: list[str],
    out: Path | None,
    plot: Path | None,
) -> None:
    from vllm_intscale.bench import gemm, report

    if plot:
        report.import_pyplot()  # an error now, not after the work
    with TemporaryDirectory() as temporary:
        rows, failures = gemm.benchmark(shapes, tokens, kernels, out or Path(temporary), kind)
    report.print_tables(rows)
    if plot:
        report.plot(rows, plot)
    print(json.dumps(report.summary(rows, shapes=shapes, tokens=tokens, kernels=kernels)))
    if failures:
        raise IntScaleError("; ".join(failures))
