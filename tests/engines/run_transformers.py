"""Run by the Python of an environment with transformers and compressed-tensors: {} PROMPTS STEPS DIRECTORY …

Prints what `run_vllm.py` prints, of transformers' own loader. gptq_ao is not there.
"""

import json
import sys
from typing import Any

import torch


def run(directory: str, prompts: list[list[int]], steps: int) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        tokens, logprobs = [], []
        for prompt in prompts:
            ids, settings = torch.tensor([prompt]), {"max_new_tokens": steps, "eos_token_id": None}
            with torch.no_grad():
                whole = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **settings)
                scores = model(whole).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            tokens.append(whole[0, len(prompt) :].tolist())
            logprobs.append(scores.gather(1, whole[0, len(prompt) :, None])[:, 0].tolist())
        return {"tokens": tokens, "logprobs": logprobs}
    except Exception as e:  # whatever it says is what is looked at
        return {"error": f"{type(e).__name__}: {e}"}


if __name__ == "__main__":
    _, prompts, steps, *directories = sys.argv[1:]
    for directory in directories:
        print("RESULT" + json.dumps(run(directory, json.loads(prompts), int(steps))), flush=True)
