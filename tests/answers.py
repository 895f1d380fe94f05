"""Run vLLM offline in a process of its own: `python answers.py JOB.json RESULT.json`.

The job holds `engine`, the arguments of `vllm.LLM`, `prompts` (token ids) and `adapters`: the
prompts are answered once with each of these LoRA folders, or without where it is null. The result
holds, for each of these rounds, the tokens of each answer, their log-probabilities and how many
tokens of the prompt were cached; and what vLLM counted.
"""

import json
import sys
from pathlib import Path

from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest


def main(job: str, result: str) -> None:
    settings = json.loads(Path(job).read_text())
    llm = LLM(disable_log_stats=False, **settings["engine"])
    sampling = SamplingParams(max_tokens=24, temperature=0, logprobs=0, ignore_eos=True)
    rounds = []
    for number, adapter in enumerate(settings["adapters"], start=1):
        answers = llm.generate(
            [{"prompt_token_ids": prompt} for prompt in settings["prompts"]],
            sampling,
            use_tqdm=False,
            lora_request=LoRARequest(f"adapter {number}", number, adapter) if adapter else None,
        )
        rounds.append(
            [
                {
                    "tokens": list(a.outputs[0].token_ids),
                    "logprobs": [
                        entry[token].logprob
                        for entry, token in zip(
                            a.outputs[0].logprobs, a.outputs[0].token_ids, strict=True
                        )
                    ],
                    "cached": a.num_cached_tokens,
                }
                for a in answers
            ]
        )
    counted = {m.name: m.value for m in llm.get_metrics() if hasattr(m, "value")}
    Path(result).write_text(json.dumps({"rounds": rounds, "counted": counted}))


if __name__ == "__main__":
    main(*sys.argv[1:])
