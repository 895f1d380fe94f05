"""The whole path on a model that comes with the repository: quantize, serve, ask, measure.

    python serving_examples/quickstart.py [--model FOLDER_OR_HUB_ID] [--prompt TEXT]

Every step is a command that you could type; they are printed as they run.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from openai import OpenAI
from server import running_server

HERE = Path(__file__).parent
INTSCALE = [sys.executable, "-m", "vllm_intscale"]


def run(*command: str) -> str:
    """Run a command, show it and what it prints, return its last line.

    vLLM's log, on stderr, is shown only if the command fails.
    """
    print(f"\n$ {shlex.join(command).replace(shlex.join(INTSCALE), 'intscale')}", flush=True)
    result = subprocess.run(command, capture_output=True, text=True)
    print(result.stdout, end="", flush=True)
    if result.returncode:
        print(result.stderr, end="", file=sys.stderr)
        sys.exit(result.returncode)
    return result.stdout.splitlines()[-1]


def perplexity(model: str) -> float:
    options = ("--text", str(HERE / "tiny-llama-heldout.txt"), "--window", "256")
    return float(json.loads(run(*INTSCALE, "eval", model, *options))["perplexity"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(HERE / "tiny-llama"))
    parser.add_argument("--prompt", default="And it came to pass in those days,")
    args = parser.parse_args()
    if not torch.cuda.is_available():  # what vLLM wants to know about a small CPU machine
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

    with tempfile.TemporaryDirectory() as scratch:
        quantized = str(Path(scratch) / "quantized")
        run(*INTSCALE, "quantize", args.model, quantized)
        before, after = perplexity(args.model), perplexity(quantized)

        log = Path(scratch) / "server.log"
        with running_server(quantized, log=log) as url:
            print(*(line for line in log.read_text().splitlines() if "intscale:" in line))
            client = OpenAI(base_url=f"{url}/v1", api_key="none")
            request = {"model": quantized, "prompt": args.prompt, "temperature": 0}
            client.completions.create(**request, max_tokens=8)  # warm up
            start = time.perf_counter()
            answer = client.completions.create(**request, max_tokens=48)
            seconds = time.perf_counter() - start

    assert answer.usage is not None
    print(f"\nprompt       {args.prompt}")
    print(f"answer       {answer.choices[0].text.strip()}")
    print(f"speed        {answer.usage.completion_tokens / seconds:.1f} tokens/s, one request")
    change = 100 * (after / before - 1)
    print(f"perplexity   {before:.3f} unquantized, {after:.3f} W4A8 ({change:+.2f} %)")


if __name__ == "__main__":
    main()
