"""Text for several prompts at once, by a quantized model whose decoding step is compiled.

    python examples/serve.py "def read(" "class Stack:"
    python examples/serve.py --model out/tiny-4bit --device cuda --batch-size 8 < prompts.txt     # a prompt per line

Without --model, the small language model beside this file is quantized first.

Every batch has the same shape and the same key-value cache, allocated once: one graph, which on a GPU is captured and
replayed (CUDA graphs). The prompts of a batch are padded on the left to the longest, and masked.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, CompileConfig, StaticCache

from gptq_ao import data, gptq_config, load_quantized, quantize_

EMBEDDED = Path(__file__).parent / "tiny_lm"


def load(directory: Path | None, device: str) -> tuple[Any, Any]:
    """Model and tokenizer; the directory is one that `save_quantized(model, directory, tokenizer=tokenizer)` wrote."""
    tokenizer = AutoTokenizer.from_pretrained(directory or EMBEDDED, padding_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # any token: padding is masked
    model: Any
    if directory is not None:
        model = load_quantized(directory, device=device)
    else:
        model = AutoModelForCausalLM.from_pretrained(EMBEDDED)
        text = [path.read_text() for path in sorted(EMBEDDED.glob("*.py"))]
        batches = data.text_batches(tokenizer, text, num_samples=8, seq_len=256)
        quantize_(model, gptq_config(bits=4, group_size=128, effort="fast", calibration=batches))
    return model.to(device).eval(), tokenizer


class Server:
    """Generates for batches of up to `batch_size` prompts; prompt and text together have at most `length` tokens."""

    def __init__(self, model: Any, tokenizer: Any, batch_size: int, length: int) -> None:
        self.model, self.tokenizer, self.batch_size, self.length = model, tokenizer, batch_size, length
        self.cache = StaticCache(config=model.config, max_cache_len=length)
        mode = "reduce-overhead" if model.device.type == "cuda" else "default"
        self.compile_config = CompileConfig(fullgraph=True, mode=mode)
        self.compile_config._compile_all_devices = True  # `generate` leaves it at GPUs otherwise

    def __call__(self, prompts: list[str], max_new_tokens: int) -> tuple[list[str], int]:
        """Texts that follow the prompts, and the number of tokens in them."""
        filled = prompts + prompts[-1:] * (self.batch_size - len(prompts))  # another size would be another graph
        inputs = self.tokenizer(filled, return_tensors="pt", padding=True).to(self.model.device)
        start = inputs["input_ids"].shape[1]
        if start + max_new_tokens > self.length:
            raise ValueError(f"prompts of {start} tokens and {max_new_tokens} new ones exceed --length {self.length}")
        self.cache.reset()
        out = self.model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            past_key_values=self.cache,
            compile_config=self.compile_config,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=self.tokenizer.pad_token_id,
        )[: len(prompts), start:]
        count = int((out != self.tokenizer.pad_token_id).sum())
        return self.tokenizer.batch_decode(out, skip_special_tokens=True), count


def batches(prompts: list[str], size: int) -> Iterator[list[str]]:
    for i in range(0, len(prompts), size):
        yield prompts[i : i + size]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts", nargs="*", help="read from standard input, one a line, if there are none")
    parser.add_argument("--model", type=Path, help="directory of a quantized checkpoint")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch-size", type=int, help="default: all prompts at once")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens per prompt, at most")
    parser.add_argument("--length", type=int, default=512, help="of the cache: tokens of a prompt and of its text")
    args = parser.parse_args()

    prompts = args.prompts or [line for line in sys.stdin.read().splitlines() if line]
    if not prompts:
        parser.error("no prompts")
    size = args.batch_size or len(prompts)
    server = Server(*load(args.model, args.device), size, args.length)
    start = time.perf_counter()
    server(prompts[:1], min(4, args.tokens))  # compiles, and on a GPU captures
    print(f"ready after {time.perf_counter() - start:.1f} s", file=sys.stderr)

    tokens, start = 0, time.perf_counter()
    for batch in batches(prompts, size):
        texts, count = server(batch, args.tokens)
        tokens += count
        for prompt, text in zip(batch, texts, strict=True):
            print(f"--- {prompt}{text}")
    print(f"{tokens / (time.perf_counter() - start):.1f} tokens/s", file=sys.stderr)


if __name__ == "__main__":
    main()
