"""Run by the Python of an environment with mlx-lm: {} PROMPTS STEPS DIRECTORY …

Prints what `run_vllm.py` prints, of mlx-lm. gptq_ao is not there.
"""

import json
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx  # type: ignore[import-not-found]
from mlx_lm.utils import load_model  # type: ignore[import-not-found]


def run(directory: str, prompts: list[list[int]], steps: int) -> dict[str, Any]:
    try:
        model, _ = load_model(Path(directory))
        tokens, logprobs = [], []
        for prompt in prompts:
            whole = list(prompt)
            for _ in range(steps):
                whole.append(int(mx.argmax(model(mx.array([whole]))[0, -1])))
            scores = model(mx.array([whole]))[0, len(prompt) - 1 : -1].astype(mx.float32)
            scores = scores - mx.logsumexp(scores, axis=-1, keepdims=True)
            chosen = whole[len(prompt) :]
            tokens.append(chosen)
            logprobs.append([float(row[token]) for row, token in zip(scores, chosen, strict=True)])
        return {"tokens": tokens, "logprobs": logprobs}
    except Exception as e:  # whatever it says is what is looked at
        return {"error": f"{type(e).__name__}: {e}"}


if __name__ == "__main__":
    _, prompts, steps, *directories = sys.argv[1:]
    for directory in directories:
        print("RESULT" + json.dumps(run(directory, json.loads(prompts), int(steps))), flush=True)
