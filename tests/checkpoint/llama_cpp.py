"""`make conformance`: GGUF files that gptq_ao writes, run by llama.cpp.

    python -m tests.checkpoint.llama_cpp PYTHON      PYTHON: of an environment with xllamacpp, which has llama.cpp in it

llama.cpp runs in a process of its own. It is given a text, splits it itself, and returns the tokens, the
log-probabilities of the next one, and what it would go on with. All are compared with those of the same weights, dense,
in transformers. llama.cpp rounds activations to 8 bits before products with quantized weights, so the numbers differ by
some hundredths; a wrong order of rows, or a number that is missing in the file, moves them by as much as they differ
from each other. Prints a table.
"""

import json
import re
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

from gptq_ao import gptq_config, quantize_, save_quantized

from ..models import seeded, token_batches
from .peers import installed
from .vocabularies import TEXT, TOKENIZERS

SMALL: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "vocab_size": 360}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 256}
SMALL |= {"bos_token_id": None, "eos_token_id": None, "rms_norm_eps": 1e-5, "rope_parameters": {"rope_theta": 1000.0}}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 64}
WINDOWS: dict[str, Any] = {**SMALL, "sliding_window": 16, "query_pre_attn_scalar": 64, "head_dim": 64}
GEMMA3: dict[str, Any] = {**WINDOWS, "num_hidden_layers": 6, "rope_parameters": {
    "full_attention": {"rope_type": "default", "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}}  # fmt: skip
PHI3: dict[str, Any] = {k: v for k, v in SMALL.items() if k != "head_dim"} | {"pad_token_id": None}
PHI3 |= {"hidden_size": 256, "original_max_position_embeddings": 256}
FACTORS = {"short_factor": [1 + i / 32 for i in range(24)], "long_factor": [4.0 + i for i in range(24)]}


def longrope(original: int) -> dict[str, Any]:
    """Of so many tokens, of 1024, and three quarters of each head."""
    rope = {"rope_type": "longrope", "rope_theta": 1000.0, "partial_rotary_factor": 0.75, **FACTORS}
    lengths = {"original_max_position_embeddings": original, "max_position_embeddings": 1024}
    return {**PHI3, **lengths, "rope_parameters": {**rope, "original_max_position_embeddings": original}}


def other_ropes(full: dict[str, Any], sliding: dict[str, Any]) -> dict[str, Any]:
    ropes = {"full_attention": full, "sliding_attention": sliding}
    return {
        **GEMMA3,
        "rope_parameters": {k: {"rope_type": "default", "rope_theta": 1e4, **v} for k, v in ropes.items()},
    }


# name → config
MODELS: dict[str, Any] = {
    "Llama": lambda: transformers.LlamaConfig(**SMALL),
    "Llama, tied": lambda: transformers.LlamaConfig(**SMALL, tie_word_embeddings=True),
    "Llama, biases": lambda: transformers.LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True),
    "Llama 3, scaled frequencies": lambda: transformers.LlamaConfig(**{**SMALL, "rope_parameters": LLAMA3}),
    "Llama, linear scaling": lambda: transformers.LlamaConfig(
        **{**SMALL, "rope_parameters": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 4.0}}
    ),
    "Mistral": lambda: transformers.MistralConfig(**SMALL, sliding_window=None),
    "Qwen2": lambda: transformers.Qwen2Config(**{**SMALL, "head_dim": 32}),
    "Qwen3": lambda: transformers.Qwen3Config(**SMALL),
    "Qwen3, experts": lambda: transformers.Qwen3MoeConfig(
        **SMALL, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=64, norm_topk_prob=True
    ),
    "Gemma 2": lambda: transformers.Gemma2Config(**WINDOWS),
    "Gemma 2, caps": lambda: transformers.Gemma2Config(
        **{**WINDOWS, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 10.0}
    ),
    "Gemma 2, large": lambda: transformers.Gemma2Config(
        **{**WINDOWS, "num_hidden_layers": 46, "query_pre_attn_scalar": 32}
    ),
    "Gemma 3": lambda: transformers.Gemma3TextConfig(**GEMMA3),
    "Gemma 3, linear scaling": lambda: transformers.Gemma3TextConfig(
        **other_ropes({"rope_theta": 100.0, "rope_type": "linear", "factor": 8.0}, {})
    ),
    "Gemma 3, other frequencies": lambda: transformers.Gemma3TextConfig(**other_ropes({}, {"rope_theta": 500})),
    "Phi-3": lambda: transformers.Phi3Config(**PHI3),
    "Phi-3, short factors": lambda: transformers.Phi3Config(**longrope(512)),
    "Phi-3, long factors": lambda: transformers.Phi3Config(**longrope(16)),
}
# name → settings
CASES: dict[str, dict[str, Any]] = {
    "4 bits, symmetric": {"bits": 4, "group_size": 32},
    "4 bits, asymmetric": {"bits": 4, "group_size": 64, "sym": False},
    "8 bits": {"bits": 8, "group_size": 64},
    "8 bits among 4, a quantized head": {
        "bits": 4,
        "group_size": 64,
        "rules": {"re:.*down_proj.*": {"bits": 8}, "re:.*layers.0.self_attn.*": None, "lm_head.weight": {"bits": 8}},
    },
}

RUN = """
import json, sys, urllib.request
import xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.warmup = sys.argv[1], 256, False
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
server = xllamacpp.Server(params)
def post(path, content):
    request = urllib.request.Request(server.listening_address + path, json.dumps(content).encode())
    return json.load(urllib.request.urlopen(request))
text = sys.argv[2]
tokens = post("/tokenize", {"content": text, "add_special": True})["tokens"]
given = {"prompt": tokens, "n_predict": 8, "temperature": 0, "n_probs": 100, "return_tokens": True}
made = post("/completion", given)
first = {p["id"]: p["logprob"] for p in made["completion_probabilities"][0]["top_logprobs"]}
print("FOUND" + json.dumps({"tokens": tokens, "made": made["tokens"], "first": list(first.items())}))
"""


def main(python: str) -> int:
    """The number of files that llama.cpp reads otherwise than meant."""
    version = installed(python, "xllamacpp")
    if version is None:
        print("xllamacpp is not installed, so llama.cpp is not run")
        return 0
    print(f"| model | weights | tokenizer | llama.cpp of xllamacpp {version} | |\n|---|---|---|---|---|")
    small = [(name, case, "Qwen2's") for name in MODELS for case in CASES]
    small += [("Llama", "8 bits", tokenizer) for tokenizer in TOKENIZERS if tokenizer != "Qwen2's"]
    failures = sum(not compare(python, *row) for row in small)
    return failures + sum(not compare(python, "tiny_lm", case, "a token for each byte") for case in CASES)


def compare(python: str, name: str, case: str, kind: str) -> bool:
    """Whether llama.cpp gives what was meant."""
    tokenizer = TOKENIZERS[kind]()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of offsets that are rounded, and settings that engines fuse
        model = built(name, CASES[case])
        text = next(t for t in (TEXT[:n] for n in range(len(TEXT), 0, -1)) if goes_on(model, tokenizer, t))
        save_quantized(model, Path(folder) / "m.gguf", format="gguf", tokenizer=tokenizer)
        done = subprocess.run(
            [python, "-c", RUN, str(Path(folder) / "m.gguf"), text], capture_output=True, text=True, check=False
        )
    line = next((x for x in done.stdout.splitlines() if x.startswith("FOUND")), None)
    if line is None:
        why = [x for x in done.stderr.splitlines() if " E " in x] or done.stderr.strip().splitlines() or ["?"]
        print(f"| {name} | {case} | {kind} | | not read: {why[0][:200]} |", flush=True)
        return False
    found = json.loads(line.removeprefix("FOUND"))
    ids = tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad():
        meant = model(ids).logits[0, -1].double().log_softmax(-1)
        made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    numbers, values = zip(*found["first"], strict=True)
    difference = (meant[list(numbers)] - torch.tensor(values, dtype=torch.float64)).std()
    share = float(difference / meant[list(numbers)].std())
    same = made[0, ids.shape[1] :].tolist() == found["made"]
    # Its GELU is a table in fp16. What would be wrong in a Gemma moves the numbers by .2 at least.
    most = 0.08 if name.startswith("Gemma") and "large" not in name else 0.05
    good = found["tokens"] == ids[0].tolist() and share < most
    words = f"differ by {share:.1e} of their spread, {'the same' if same else 'other'} tokens"
    print(f"| {name} | {case} | {kind} | {words} | {'same' if good else 'DIFFERENT'} |", flush=True)
    if found["tokens"] != ids[0].tolist():
        print(found["tokens"], ids[0].tolist(), sep="\n")
    return good


def goes_on(model: Any, tokenizer: Any, text: str) -> bool:
    """Whether the next token is a character: llama.cpp gives no numbers of one that is a part of a character."""
    ids = tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad():
        return "\ufffd" not in tokenizer.decode(model(ids).logits[0, -1].argmax())


def built(name: str, settings: dict[str, Any]) -> Any:
    if name == "tiny_lm":
        model: Any = AutoModelForCausalLM.from_pretrained("examples/tiny_lm", dtype=torch.float32)
    else:
        model = seeded(AutoModelForCausalLM.from_config(MODELS[name](), dtype=torch.float32))
        for parameter, value in model.named_parameters():
            if re.search(r"[qk]_(proj|norm)\.weight", parameter):
                value.data *= 2  # attention that looks at few places, so that it matters which
            if re.search(r"post_(attention|feedforward)_layernorm", parameter) and "large" in name:
                value.data = value.data / 10 - 0.94  # of 1: else errors of so many layers of random weights grow
    tied = model.config.tie_word_embeddings
    rules = {k: v for k, v in settings.get("rules", {}).items() if not (tied and k == "lm_head.weight")}
    # The data shows where the products of experts are.
    quantize_(model, gptq_config(**{**settings, "rules": rules}, method="rtn", calibration=token_batches(1)))
    return model


if __name__ == "__main__":
    sys.exit(min(1, main(sys.argv[1])))
