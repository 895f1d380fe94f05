"""Offline batch generation with vLLM's `LLM()`.

    python serving_examples/offline_batch.py [MODEL]

MODEL is a checkpoint made by `intscale quantize`; without it, the tiny model is quantized first.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from vllm import LLM, SamplingParams

PROMPTS = [
    "In the beginning",
    "And the LORD said unto Moses,",
    "Blessed are they that",
    "And it came to pass in those days,",
]


def generate(model: str) -> None:
    llm = LLM(model, max_model_len=512)  # the checkpoint itself names its quantization
    outputs = llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=40))
    for output in outputs:
        print(f"{output.prompt!r} ->{output.outputs[0].text!r}")


def main() -> None:
    if len(sys.argv) > 1:
        return generate(sys.argv[1])
    tiny = Path(__file__).parent / "tiny-llama"
    with tempfile.TemporaryDirectory() as scratch:
        model = f"{scratch}/tiny-llama-W4A8"
        quantize = [sys.executable, "-m", "vllm_intscale", "quantize", str(tiny), model]
        subprocess.run(quantize, check=True)
        generate(model)


if __name__ == "__main__":  # vLLM starts worker processes that import this file
    main()
