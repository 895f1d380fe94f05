"""Run vLLM offline in a process of its own: `python offline.py JOB.json RESULT.json`.

The job holds `engine`, the arguments of `vllm.LLM`, and `prompts`, lists of token ids. The result
holds, for each prompt, the log-probability of each of its tokens but the first.
"""

import json
import sys
from pathlib import Path

from vllm import LLM, SamplingParams


def main(job: str, result: str) -> None:
    settings = json.loads(Path(job).read_text())
    llm = LLM(**settings["engine"])
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in settings["prompts"]],
        SamplingParams(max_tokens=2, temperature=0, prompt_logprobs=0, ignore_eos=True),
        use_tqdm=False,
    )
    logprobs = [
        [entry[token].logprob for entry, token in zip(o.prompt_logprobs, ids, strict=True) if entry]
        for o, ids in zip(outputs, settings["prompts"], strict=True)
    ]
    Path(result).write_text(json.dumps(logprobs))


if __name__ == "__main__":
    main(*sys.argv[1:])
