"""The commands of `intscale bench`. What they run is imported when they run: torch is heavy."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from vllm_intscale.bench.arguments import parse_kernels, parse_tokens
from vllm_intscale.errors import IntScaleError

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
    chosen, sizes = parse_kernels(kernels or (), PEERS), parse_tokens(tokens or (), gemm.TOKENS)
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
    sizes = parse_tokens(tokens or (), moe.TOKENS)
    _run_benchmark("moe", shapes, sizes, chosen, out, plot)


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
