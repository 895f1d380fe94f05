"""Ask the server of serve.sh with the `openai` client, streaming: python client.py [PROMPT]"""

from __future__ import annotations

import os
import sys

from openai import OpenAI


def main() -> None:
    prompt = sys.argv[1] if len(sys.argv) > 1 else "And the LORD said unto Moses,"
    url = f"http://127.0.0.1:{os.environ.get('PORT', 8000)}/v1"
    client = OpenAI(base_url=url, api_key="none")
    stream = client.completions.create(
        model="model", prompt=prompt, max_tokens=40, temperature=0, stream=True
    )
    print(prompt, end="")
    for chunk in stream:
        print(chunk.choices[0].text, end="", flush=True)
    print()


if __name__ == "__main__":
    main()
