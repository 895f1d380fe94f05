"""`python -m vllm_intscale.bench.throughput MODEL LAYOUT...`: tokens a second over one GPU or more.

LAYOUT is `one`, or a kind of parallelism and GPUs: `tp2`, `pp2`, `ep2` (tensor, pipeline, expert).
Each runs in an engine of its own, with CUDA graphs but without torch.compile; its requests come all
at once. The last line is JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from vllm_intscale.errors import IntScaleError

CODE = (  # of the process of an engine
    "import json, pathlib, sys; from vllm_intscale.bench.throughput import measure; "
    "pathlib.Path(sys.argv[3]).write_text(json.dumps(measure(*sys.argv[1:3])))"
)
BATCHES = (64, 256)  # requests
PROMPT, ANSWER = 128, 128  # tokens of each


def engine_options(layout: str) -> dict[str, Any]:
    """What vLLM is told of a layout. Raises IntScaleError for an unknown one."""
    kind, count = layout[:2], layout[2:]
    if layout == "one":
        return {}
    if kind not in ("tp", "pp", "ep") or not count.isdecimal():
        raise IntScaleError(f"layout {layout!r} is unknown; use one, tp2, pp2, ep2 or the like")
    if kind == "pp":
        return {"pipeline_parallel_size": int(count)}
    return {"tensor_parallel_size": int(count), "enable_expert_parallel": kind == "ep"}


def measure(model: str, layout: str) -> list[dict[str, Any]]:
    """Rows of batch, seconds and generated tokens a second; the second of two runs counts."""
    from vllm import LLM, SamplingParams

    graphs = {"mode": 0, "cudagraph_capture_sizes": list(BATCHES)}
    engine = LLM(
        model=model,
        max_model_len=PROMPT + ANSWER,
        max_num_seqs=max(BATCHES),
        enable_prefix_caching=False,
        compilation_config=graphs,
        **engine_options(layout),
    )
    sampling = SamplingParams(max_tokens=ANSWER, temperature=0, ignore_eos=True)
    rows = []
    for batch in BATCHES:
        prompts = [
            {"prompt_token_ids": [3 + (7 * i + 11 * j) % 30_000 for j in range(PROMPT)]}
            for i in range(batch)
        ]
        for _ in range(2):
            start = time.perf_counter()
            engine.generate(prompts, sampling, use_tqdm=False)
            seconds = time.perf_counter() - start
        rows.append({"layout": layout, "batch": batch, "seconds": seconds})
        rows[-1]["tokens_per_second"] = batch * ANSWER / seconds
    return rows


def main(model: str, *layouts: str) -> None:
    for layout in layouts:
        engine_options(layout)
    rows: list[dict[str, Any]] = []
    with TemporaryDirectory() as folder:
        result = Path(folder) / "rows.json"
        for layout in layouts:
            command = [sys.executable, "-c", CODE, model, layout, str(result)]
            subprocess.run(command, check=True, stdout=sys.stderr)
            found = json.loads(result.read_text())
            for row in found:
                speed = f"{row['tokens_per_second']:.0f} tokens/s"
                print(f"{layout} batch {row['batch']}: {speed}", flush=True)
            rows += found
    print(json.dumps(rows))


if __name__ == "__main__":
    main(*sys.argv[1:])
