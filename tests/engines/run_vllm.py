"""Run by the Python of an environment with vLLM: OPTIONS (JSON, of vLLM) PROMPTS (lists of token ids) STEPS DIRECTORY …

Prints a line of JSON for each directory: the tokens that vLLM chose greedily and their log-probabilities, or why it did
not load the checkpoint.
"""

import gc
import json
import os
import sys
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # an error is then raised here, with its own words
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def run(directory: str, options: dict[str, Any], prompts: list[list[int]], steps: int) -> dict[str, Any]:
    import vllm
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = None
    try:
        # fp16: scales are fp16, and bf16 would round them.
        usual = {"dtype": "float16", "max_model_len": 128, "enforce_eager": True, "skip_tokenizer_init": True}
        llm = vllm.LLM(directory, **{**usual, **options})
        settings = vllm.SamplingParams(temperature=0, max_tokens=steps, ignore_eos=True, logprobs=1, detokenize=False)
        done = llm.generate([{"prompt_token_ids": p} for p in prompts], settings, use_tqdm=False)
        answers = [d.outputs[0] for d in done]
        tokens = [list(a.token_ids) for a in answers]
        logprobs = [[step[t].logprob for step, t in zip(a.logprobs, a.token_ids, strict=True)] for a in answers]
        return {"tokens": tokens, "logprobs": logprobs}
    except Exception as e:  # whatever it says is what is looked at
        return {"error": f"{type(e).__name__}: {e}"}
    finally:
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


if __name__ == "__main__":
    options, prompts, steps, *directories = sys.argv[1:]
    for directory in directories:
        print("RESULT" + json.dumps(run(directory, json.loads(options), json.loads(prompts), int(steps))), flush=True)
