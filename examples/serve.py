"""Text for several prompts at once, by a quantized model whose decoding step is compiled.

    python examples/serve.py "def read(" "class Stack:"
    python examples/serve.py --model out/tiny-4bit --batch-size 8 "def read(" ...

Without --model, the model in tiny_lm/ is quantized first. Every batch has the same size and the same key-value cache,
so there is one graph; prompts are padded on the left to the longest, and masked.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, CompileConfig, StaticCache

from gptq_ao import data, gptq_config, load_quantized, quantize_

EMBEDDED = Path(__file__).parent / "tiny_lm"


def quantized(tokenizer: Any) -> Any:
    model, text = AutoModelForCausalLM.from_pretrained(EMBEDDED), [p.read_text() for p in sorted(EMBEDDED.glob("*.py"))]
    batches = data.text_batches(tokenizer, text, num_samples=8, seq_len=256)
    quantize_(model, gptq_config(4, 128, effort="fast", calibration=batches))
    return model.eval()


def generate(model: Any, tokenizer: Any, cache: StaticCache, prompts: list[str], tokens: int) -> list[str]:
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False).to(model.device)
    start, length = inputs["input_ids"].shape[1], cache.layers[0].max_cache_len
    if start + tokens > length:
        raise ValueError(f"prompts of {start} tokens and {tokens} new ones exceed --length {length}")
    cache.reset()
    step = CompileConfig(fullgraph=True, mode="reduce-overhead" if model.device.type == "cuda" else "default")
    step._compile_all_devices = True  # `generate` leaves it at GPUs otherwise
    settings = {"max_new_tokens": tokens, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
    out = model.generate(**inputs, past_key_values=cache, compile_config=step, **settings)
    return tokenizer.batch_decode(out[:, start:], skip_special_tokens=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("prompts", nargs="+")
    parser.add_argument("--model", type=Path, help="what `save_quantized(model, directory, tokenizer=tokenizer)` wrote")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=64, help="new tokens per prompt, at most")
    parser.add_argument("--length", type=int, default=512, help="of the cache: tokens of a prompt and of its text")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model or EMBEDDED, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # any token: padding is masked
    model = load_quantized(args.model, device=args.device) if args.model else quantized(tokenizer).to(args.device)
    cache = StaticCache(config=model.config, max_cache_len=args.length)
    for i in range(0, len(args.prompts), args.batch_size):
        batch = args.prompts[i : i + args.batch_size]
        filled = batch + batch[-1:] * (args.batch_size - len(batch))  # another size would be another graph
        for prompt, text in zip(batch, generate(model, tokenizer, cache, filled, args.tokens), strict=False):
            print(f"--- {prompt}{text}")
