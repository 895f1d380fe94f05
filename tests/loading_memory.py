"""`python tests/loading_memory.py MODEL`: bytes on the GPU while vLLM's worker loads it, as JSON.

    weights    what parameters and buffers take in the end
    peak       the most that tensors took on the way
    layer      what the largest of the decoder's layers takes

In a process of its own, on one GPU.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from gpu_engine import CACHE, SMALL

from vllm_intscale.bench.engine_worker import size_of


def main(model: str) -> None:
    import torch
    from vllm import LLM
    from vllm.v1.worker.gpu_worker import Worker

    load, found = Worker.load_model, {}

    def measured(worker: Worker, *args: Any, **kwargs: Any) -> None:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        load(worker, *args, **kwargs)
        found["peak"] = torch.cuda.max_memory_allocated() - before

    Worker.load_model = measured  # type: ignore[method-assign]
    llm = LLM(model, **CACHE, **SMALL)
    (found["weights"],) = llm.apply_model(size_of)
    (found["layer"],) = llm.apply_model(lambda m: max(map(size_of, m.model.layers)))
    print(json.dumps(found))


if __name__ == "__main__":
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    main(*sys.argv[1:])
