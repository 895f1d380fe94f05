"""The command line: `intscale quantize`, `convert`, `inspect`, `verify`, `doctor`, `eval`, ..."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal

import typer

from vllm_intscale.bench.arguments import parse_names
from vllm_intscale.bench.cli import bench
from vllm_intscale.display import (
    print_estimate,
    print_inspection,
    print_report,
    progress_display,
    size,
    status,
)
from vllm_intscale.errors import IntScaleError
from vllm_intscale.format import Amplifier, CheckpointConfig

RESUME = "Go on where the same command was killed, if it was."

app = typer.Typer(
    help="W4A8 LLM quantization with Integer Scale, for vLLM.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(bench, name="bench")


def main() -> None:
    """Entry point of the console script: errors are one line on stderr and exit code 1."""
    try:
        app()
    except IntScaleError as error:
        sys.exit(f"intscale: error: {error}")
    except OSError as error:  # a full disk, a missing permission
        sys.exit(f"intscale: error: {error}; free space or fix permissions, then run again")


class Method(StrEnum):
    """Of `quantize`."""

    RTN = "rtn"
    GPTQ = "gptq"
    AWQ = "awq"


class Recipe(StrEnum):
    """Of `quantize`: options for a kind of models."""

    LLAMA3 = "llama3"


# Per channel (S = 1), so that the integers are the same however a GPU folds group scales.
RECIPES = {Recipe.LLAMA3: {r"re:.*\.mlp\.down_proj": {"bits": 8, "max_group_scale": 1}}}


@app.command()
def quantize(
    source: Annotated[
        str, typer.Argument(metavar="SRC", help="Model folder or Hugging Face hub id.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to create.")],
    group_size: Annotated[int, typer.Option(help="Weights that share a scale: 128, 64, 32.")] = 128,
    amplifier: Annotated[
        str, typer.Option(help="channel (best), heuristic, or one number for all layers.")
    ] = "channel",
    max_group_scale: Annotated[
        int, typer.Option(help="Largest integer scale that amplifier channel aims at.")
    ] = 255,
    ignore: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            help="Layer to leave unquantized: full name, or re: and a regular expression that "
            "matches it. Repeatable.",
        ),
    ] = None,
    override: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN:KEY=VALUE[,KEY=VALUE]",
            help="Scheme of some layers: bits, group_size, max_group_scale. Repeatable, the first "
            "match counts. Example: re:.*down_proj:group_size=64",
        ),
    ] = None,
    method: Annotated[
        Method | None,
        typer.Option(
            help="rtn (default): round to nearest. gptq: choose codes for the activations of a "
            "text. awq: only scales, which needs less memory."
        ),
    ] = None,
    recipe: Annotated[
        Recipe | None,
        typer.Option(
            help="llama3: method gptq, and 8 bits, one scale a channel, for the down projections "
            "of dense layers."
        ),
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|DATASET",
            help='That text, for gptq and awq: a file, plain or .jsonl with "text"; or '
            "ID[:CONFIG[:SPLIT]] of a dataset on the hub, or a folder of one.",
        ),
    ] = None,
    calibration_samples: Annotated[
        int | None, typer.Option(min=1, help="Samples taken from it; default: 128.")
    ] = None,
    calibration_length: Annotated[
        int | None,
        typer.Option(min=2, help="Tokens of a sample; default: as the model allows, at most 2048."),
    ] = None,
    scale_search: Annotated[
        bool,
        typer.Option(
            "--scale-search", help="Group scales with the least squared error; takes longer."
        ),
    ] = False,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help=RESUME)] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Only say what would be done; of a hub id read headers."),
    ] = False,
) -> None:
    """Quantize a model: int4 weights, integer group scales, for int8 activations.

    Weights are rounded to nearest, without data or a GPU. GPTQ and AWQ run a text through the
    model, which they need in memory, and take outliers out of activations first.
    """
    from vllm_intscale.inspection import inspect_model
    from vllm_intscale.quantize import Calibration, quantize_model
    from vllm_intscale.quantize.estimate import estimate_quantization
    from vllm_intscale.quantize.stream import check_output

    text = None
    method = method or (Method.GPTQ if recipe else Method.RTN)
    if method != Method.RTN:
        if calibration is None:
            raise IntScaleError(f"--method {method} needs a text: --calibration FILE or DATASET")
        if scale_search:
            raise IntScaleError(
                f"--method {method} searches scales already; leave out --scale-search"
            )
        name: Literal["awq", "gptq"] = "awq" if method == Method.AWQ else "gptq"
        text = Calibration(calibration, calibration_samples or 128, calibration_length, name)
    elif calibration or calibration_samples or calibration_length:
        raise IntScaleError("--calibration and its samples and length need --method gptq or awq")
    config = CheckpointConfig(
        group_size=group_size,
        amplifier=_parse_amplifier(amplifier),
        max_group_scale=max_group_scale,
        ignore=tuple(ignore or ()),
        overrides=_overrides(override or (), recipe),
        source={"command": _command()},
    )
    if dry_run:
        check_output(out, Path(source), resume)
        print_inspection(inspect_model(source, (), revision, config))
        print(f"Disk        {size(shutil.disk_usage(out.parent).free)} free in {out.parent}")
        print_estimate(estimate_quantization(source, revision, config, scale_search, text))
        return
    start = time.monotonic()
    with progress_display() as on_progress:
        report = quantize_model(
            source, out, config, revision, on_progress, scale_search, resume, text
        )
    print_report(report, time.monotonic() - start)
    print(f"Details     {out}/report.html\n\nServe it:  vllm serve {out}")


@app.command()
def convert(
    source: Annotated[
        str, typer.Argument(metavar="SRC", help="Folder or hub id of an int4 checkpoint.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to create.")],
    amplifier: Annotated[
        str, typer.Option(help="channel (best), or one number for all layers.")
    ] = "channel",
    max_group_scale: Annotated[
        int, typer.Option(help="Largest integer scale that amplifier channel aims at.")
    ] = 255,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help=RESUME)] = False,
) -> None:
    """Convert a GPTQ, AWQ, AutoRound or compressed-tensors int4 checkpoint.

    Codes stay as they are and scales become integers. What int4 codes with integer scales cannot
    hold (asymmetric groups, activation order) is rounded again. OUT/report.html shows the loss of
    each layer. No calibration data and no GPU are needed.
    """
    from vllm_intscale.quantize import convert_model

    config = CheckpointConfig(
        amplifier=_parse_amplifier(amplifier),
        max_group_scale=max_group_scale,
        source={"command": _command()},
    )
    start = time.monotonic()
    with progress_display() as on_progress:
        report = convert_model(source, out, config, revision, on_progress, resume)
    print_report(report, time.monotonic() - start)
    print(f"Details     {out}/report.html\n\nServe it:  vllm serve {out}")


@app.command("inspect")
def inspect_command(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Model folder or hub id, quantized or not.")
    ],
    tp: Annotated[
        str, typer.Option(metavar="N,N", help="Numbers of tensor-parallel ranks to check.")
    ] = "1,2,4,8",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")] = None,
) -> None:
    """What a model weighs and on how many GPUs it can run, before anything is downloaded.

    Of a model that is not quantized, what `quantize` would make of it; of one that other tools have
    quantized to int4, in a folder, what `convert` would. The last line on stdout is JSON.
    """
    from vllm_intscale.inspection import inspect_model

    if not all(part.isdecimal() and int(part) for part in tp.split(",")):
        raise IntScaleError(f"--tp {tp}: whole numbers from 1 are needed, separated by commas")
    found = inspect_model(model, [int(part) for part in tp.split(",")], revision)
    print_inspection(found)
    for ranks in found.ranks:
        share = f"{size(found.intscale_bytes // ranks.tp_size)} of weights a rank"
        lines = [*ranks.problems, ranks.remedy] if ranks.problems else [share, *ranks.split]
        print(f"--tp {ranks.tp_size:<6} " + "; ".join(lines))
    print(json.dumps(found._asdict() | {"ranks": [ranks._asdict() for ranks in found.ranks]}))


@app.command("verify")
def verify_checkpoint(
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of a quantized model.")],
) -> None:
    """Check a quantized model: hashes, shapes, bounds, NaN. Nothing is loaded onto a GPU."""
    from vllm_intscale.verify import SUMS, verify

    with status() as show:
        found = verify(folder, show)
    hashes = f"{found.files} files agree with {SUMS}" if found.files else f"there is no {SUMS}"
    print(f"In order    {found.layers} quantized layers, {found.tensors} tensors; {hashes}")


@app.command()
def doctor() -> None:
    """Check this machine: versions, plugin, GPUs, and a layer computed on each of them."""
    from vllm_intscale.doctor import examine

    problems = 0
    for finding in examine():
        print(f"{'PROBLEM' if finding.problem else 'ok':<9}{finding.about:<9}{finding.text}")
        problems += finding.problem
    if problems:
        raise IntScaleError(f"{problems} problem{'s' * (problems > 1)}, see above")


@app.command("eval")
def evaluate(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Model folder or hub id, quantized or not.")
    ],
    text: Annotated[
        Path | None, typer.Option(help="Text file to measure perplexity on, UTF-8.")
    ] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option(metavar="TASK,TASK", help="Tasks of lm-eval (extra lm-eval), instead."),
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option(help="Folder of more tasks, as YAML files.")
    ] = None,
    window: Annotated[int, typer.Option(help="Tokens in a window of the text.")] = 512,
    limit: Annotated[
        int | None, typer.Option(help="Use only the first windows, or examples of each task.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of activations: bfloat16, float16, float32.")] = (
        "bfloat16"
    ),
    gpu_memory_utilization: Annotated[
        float, typer.Option(help="Share of the GPU's memory that vLLM may take.")
    ] = 0.9,
    quantization: Annotated[
        str | None,
        typer.Option(help="As for vllm serve: intscale quantizes or converts while loading."),
    ] = None,
    compile: Annotated[
        bool, typer.Option("--compile", help="With torch.compile, as vllm serve has it.")
    ] = False,
) -> None:
    """Perplexity of a model on a text, or lm-eval's tasks, through vLLM's engine.

    Each whole window of tokens is scored alone, without a start token, on all but its first token.
    The last line on stdout is JSON.
    """
    from vllm_intscale.evaluate import perplexity, task_results

    names = parse_names(tasks or ())
    if text and not names:
        found = perplexity(
            model, text, window, limit, dtype, gpu_memory_utilization, quantization, compile
        )
        print(f"windows     {found.windows} of {found.window} tokens")
        print(f"tokens      {found.tokens} scored")
        print(f"perplexity  {found.perplexity:.4f}")
        print(json.dumps(found._asdict()))
    elif names and not text:
        table, results = task_results(
            *(model, names, include_path, limit),
            dtype=dtype,
            gpu_memory_utilization=gpu_memory_utilization,
            quantization=quantization,
            enforce_eager=not compile,
        )
        print(table)
        print(json.dumps({"model": model, "results": results}))
    else:
        raise IntScaleError("eval needs --text or --tasks, one of them")
    # With the result complete and the engine stopped, vLLM 0.26 on CUDA often aborts in C++ while
    # the interpreter shuts down, and an exit code of 134 would say that the run failed.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


@app.command("push")
def push_checkpoint(
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of a quantized model.")],
    repository: Annotated[
        str, typer.Argument(metavar="REPO", help="NAMESPACE/NAME on the Hugging Face hub.")
    ],
    private: Annotated[bool, typer.Option("--private", help="If it has to be created.")] = False,
    score: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="What intscale eval printed, for the card's table; the unquantized model's first. "
            "Repeatable.",
        ),
    ] = None,
) -> None:
    """Upload a quantized model to the hub, once it is verified, with a model card.

    The card, written to OUT/README.md, says what was made from what, by which command, and how to
    serve it.
    """
    from vllm_intscale.push import push, read_scores

    scores = read_scores(score or ())
    with status() as show:
        address = push(folder, repository, private, scores, show)
    print(f"Uploaded    {address}\n\nServe it:  vllm serve {repository}")


def _command() -> str:
    """As it was called, for the model's config: without --resume, and without where folders lie."""
    arguments = (a for a in sys.argv[1:] if a != "--resume")
    return shlex.join(["intscale", *(Path(a).name if a.startswith("/") else a for a in arguments)])


def _parse_amplifier(value: str) -> Amplifier:
    # What is neither a name nor a number is refused by the config, as every other value.
    return int(value) if value.isdecimal() else value  # type: ignore[return-value]


def _overrides(given: Sequence[str], recipe: Recipe | None) -> dict[str, dict[str, int]]:
    """The user's, then the recipe's: the first match counts."""
    overrides: dict[str, dict[str, int]] = {}
    of_recipe = RECIPES[recipe].items() if recipe else ()
    for pattern, fields in (*map(_parse_override, given), *of_recipe):
        if pattern in overrides:
            raise IntScaleError(
                f"--override {pattern} is given twice (--recipe gives some, too); give it once, "
                "with all of its settings: PATTERN:KEY=VALUE,KEY=VALUE"
            )
        overrides[pattern] = fields
    return overrides


def _parse_override(value: str) -> tuple[str, dict[str, int]]:
    pattern, _, fields = value.rpartition(":")
    try:
        parsed = {key: int(number) for key, number in (f.split("=") for f in fields.split(","))}
    except ValueError:
        parsed = {}
    if not (pattern and parsed):
        raise IntScaleError(
            f"--override {value}: it must be PATTERN:KEY=VALUE with whole numbers, for instance "
            "re:.*down_proj:group_size=64"
        )
    return pattern, parsed
