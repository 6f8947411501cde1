"""Run by the Python of an environment with GPTQModel: {} PROMPTS STEPS DIRECTORY …

Prints what `run_vllm.py` prints, of GPTQModel's own loader and its products in PyTorch. gptq_ao is not there. All
weights are unpacked for each token, so there are few.
"""

import json
import sys
from typing import Any

import torch

MOST = 4  # tokens after each prompt


def run(directory: str, prompts: list[list[int]], steps: int) -> dict[str, Any]:
    from gptqmodel import BACKEND, GPTQModel  # type: ignore[import-not-found]

    try:
        model = GPTQModel.load(directory, device="cpu", dtype=torch.float16, backend=BACKEND.GPTQ_TORCH).model
        tokens, logprobs = [], []
        for prompt in prompts:
            ids, settings = torch.tensor([prompt]), {"max_new_tokens": steps, "eos_token_id": None}
            with torch.no_grad():
                whole = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **settings)
                scores = model(whole).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
            tokens.append(whole[0, len(prompt) :].tolist())
            logprobs.append(scores.gather(1, whole[0, len(prompt) :, None])[:, 0].tolist())
        return {"tokens": tokens, "logprobs": logprobs}
    except Exception as e:  # whatever it says is what is looked at
        return {"error": f"{type(e).__name__}: {e}"}


if __name__ == "__main__":
    _, prompts, steps, *directories = sys.argv[1:]
    for directory in directories:
        print("RESULT" + json.dumps(run(directory, json.loads(prompts), min(int(steps), MOST))), flush=True)
