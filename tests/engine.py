"""A whole vLLM engine in a process of its own: an engine leaves its process changed.

As a script, `python engine.py JOB.json RESULT.json`, it is that process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Answer = dict[str, Any]  # tokens, their logprobs, those of the prompt but its first, cached tokens
Logprobs = list[list[float]]
SCORED = {"max_tokens": 2, "temperature": 0, "prompt_logprobs": 0, "ignore_eos": True}


def run(
    tmp_path: Path,
    engine: Mapping[str, Any],
    prompts: Sequence[list[int]],
    sampling: Mapping[str, Any] = SCORED,
    adapters: Sequence[Path | None] = (None,),
    environment: Mapping[str, str] | None = None,
) -> tuple[list[list[Answer]], dict[str, float], str]:
    """What the engine answers, counts and prints.

    engine: arguments of vllm.LLM. prompts: token ids. adapters: LoRA folders; the prompts are
    answered once with each of them, or without where it is None.
    """
    job, result = tmp_path / "job.json", tmp_path / "result.json"
    content = {"engine": dict(engine), "prompts": list(prompts), "sampling": dict(sampling)}
    job.write_text(json.dumps(content | {"adapters": [a and str(a) for a in adapters]}))
    process = subprocess.run(
        [sys.executable, __file__, job, result],
        env={**os.environ, **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=400,
    )
    assert process.returncode == 0, process.stdout[-5000:]
    found = json.loads(result.read_text())
    return found["rounds"], found["counted"], process.stdout


def prompt_logprobs(rounds: list[list[Answer]]) -> Logprobs:
    """Of the only round."""
    (answers,) = rounds
    return [answer["prompt_logprobs"] for answer in answers]


def main(job: str, result: str) -> None:
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    def logprobs_of(entries: Any, tokens: Sequence[int]) -> list[float]:
        pairs = zip(entries or (), tokens, strict=bool(entries))
        return [entry[token].logprob for entry, token in pairs if entry]

    settings = json.loads(Path(job).read_text())
    llm = LLM(disable_log_stats=False, **settings["engine"])
    rounds = []
    for number, adapter in enumerate(settings["adapters"], start=1):
        outputs = llm.generate(
            [{"prompt_token_ids": prompt} for prompt in settings["prompts"]],
            SamplingParams(**settings["sampling"]),
            use_tqdm=False,
            lora_request=LoRARequest(f"adapter {number}", number, adapter) if adapter else None,
        )
        rounds.append(
            [
                {
                    "tokens": list(output.outputs[0].token_ids),
                    "logprobs": logprobs_of(
                        output.outputs[0].logprobs, output.outputs[0].token_ids
                    ),
                    "prompt_logprobs": logprobs_of(output.prompt_logprobs, prompt),
                    "cached": output.num_cached_tokens,
                }
                for output, prompt in zip(outputs, settings["prompts"], strict=True)
            ]
        )
    counted = {m.name: m.value for m in llm.get_metrics() if hasattr(m, "value")}
    Path(result).write_text(json.dumps({"rounds": rounds, "counted": counted}))


if __name__ == "__main__":
    main(*sys.argv[1:])
