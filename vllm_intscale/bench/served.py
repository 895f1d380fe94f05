"""The served part of `intscale bench serve`: vLLM's server and its own client."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from vllm_intscale.bench.configurations import (
    AT_ONCE,
    Plan,
    check_log,
    configuration_of,
    gpu_bytes,
    groups_of,
)
from vllm_intscale.bench.engine_worker import GROUP_SCALES
from vllm_intscale.bench.serve import Row, Worker, closing_all, last_error, plans_of, ready
from vllm_intscale.errors import IntScaleError

PROMPT, ANSWER = 512, 128  # tokens
ROUNDS = 4  # requests, for each that runs at a time
START_S, STOP_S, CLIENT_S = 900.0, 60.0, 1200.0
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

    Some servers are on the GPU at once, and asked in turn. Arguments as for `serve.run`. What fails
    is a row's error.
    """
    most = 2 * (PROMPT + ANSWER)  # tokens of a request: the client's prompts are not quite exact
    cache = max(most, (PROMPT + ANSWER + 32) * max(concurrencies))
    # `engine_worker` alone can run the others.
    names = [n for n in configurations if GROUP_SCALES not in configuration_of(n).environment]
    plans = plans_of(names, model, folder, cache, {"max_model_len": most, **engine}, on_row)
    with ThreadPoolExecutor(AT_ONCE + 1) as pool:
        client_log = folder / "client.log"
        clients = {"client": pool.submit(Worker, "client_worker", {}, {}, client_log)}
        with closing_all(clients):
            for group in groups_of(plans, gpu_bytes()):
                starting = {plan.name: pool.submit(Server, plan, folder) for plan in group}
                with closing_all(starting):
                    servers = ready(starting, on_row, "serve")
                    for client in ready(clients, on_row, "serve").values():
                        for row in _rows(servers, concurrencies, client):
                            on_row(row)


def _rows(
    servers: dict[str, Server], concurrencies: Sequence[int], client: Worker
) -> Iterator[Row]:
    for concurrency in concurrencies:
        for name, server in list(servers.items()):
            try:
                yield Row(name, "serve", concurrency, _ask(client, server, concurrency), None)
            except IntScaleError as error:
                del servers[name]
                yield Row(name, "serve", concurrency, None, None, str(error))


class Server:
    """One configuration's, ready. Raises IntScaleError as `check_log`, or if it ends."""

    def __init__(self, plan: Plan, folder: Path) -> None:
        self.checkpoint = plan.arguments["model"]
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        options = {"host": "127.0.0.1", "port": port, **plan.arguments}
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
        command += ["--no-enable-prefix-caching", *_as_options(options)]
        log = folder / f"{plan.name}-server.log"
        with log.open("w") as output:
            environment = {**os.environ, **configuration_of(plan.name).environment}
            self.process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
        self.url = f"http://127.0.0.1:{port}"
        try:
            self._wait(log)
            check_log(plan, log)
        except BaseException:
            self.close()
            raise

    def _wait(self, log: Path) -> None:
        end = time.monotonic() + START_S
        while True:
            if self.process.poll() is not None:
                raise IntScaleError(
                    f"the server ended with code {self.process.returncode}: {last_error(log)}; "
                    f"see {log}"
                )
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=2):
                    return
            except (urllib.error.URLError, OSError):
                pass
            if time.monotonic() > end:
                raise IntScaleError(f"the server was not ready after {START_S:.0f} s; see {log}")
            time.sleep(0.5)

    def close(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def _as_options(arguments: Mapping[str, Any]) -> list[str]:
    """Arguments of vllm.LLM as options of the server."""
    options = []
    for key, value in arguments.items():
        name = "--" + key.replace("_", "-")
        if isinstance(value, bool):
            options.append(name if value else f"--no-{name[2:]}")
        elif isinstance(value, list):
            options += [name, *map(str, value)]
        elif value is not None:
            options += [name, json.dumps(value) if isinstance(value, dict) else str(value)]
    return options


def _ask(client: Worker, server: Server, concurrency: int) -> dict[str, float | None]:
    options: dict[str, Any] = {
        **{"backend": "vllm", "base-url": server.url, "model": server.checkpoint},
        **{"random-input-len": PROMPT, "random-output-len": ANSWER, "max-concurrency": concurrency},
        **{"num-prompts": ROUNDS * concurrency, "dataset-name": "random", "seed": 0},
        **{"percentile-metrics": "ttft,tpot", "ignore-eos": True, "disable-tqdm": True},
    }
    said = client.ask({"options": _as_options(options)}, CLIENT_S)
    if said["completed"] != ROUNDS * concurrency:
        raise IntScaleError(
            f"{said['completed']} of {ROUNDS * concurrency} answers; see {client.log}"
        )
    return {figure: float(said[name]) for figure, name in FIGURES.items()}
