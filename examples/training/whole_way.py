"""Quantize, train an adapter, evaluate, merge, quantize again, save for GPTQ engines: two minutes on a CPU.

python examples/training/whole_way.py out/tiny-tuned
"""

import sys
import tempfile
from pathlib import Path

import torch
from embedded import LORA, SOURCE, chunks, quantized
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from gptq_ao import gptq_config, save_quantized
from gptq_ao.evaluate import evaluate
from gptq_ao.training import merge_and_requantize_


def main(out: Path, steps: int = 60) -> None:
    torch.manual_seed(0)
    original = AutoModelForCausalLM.from_pretrained(SOURCE)
    model, tokenizer = quantized()
    ids = chunks(tokenizer, count=300)
    kept = torch.arange(len(ids)) % 5 == 0  # never trained on
    train, held_out = ids[~kept], ids[kept]
    print(f"original      perplexity {evaluate(original, held_out).perplexity:.3f}")
    print(f"quantized     perplexity {evaluate(model, held_out).perplexity:.3f}")

    model = get_peft_model(model, LORA)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-4)
    model.train()
    for step in range(steps):
        batch = train[torch.arange(step * 8, step * 8 + 8) % len(train)]
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"with adapter  perplexity {evaluate(model, held_out).perplexity:.3f}")

    # GPTQ again, on text of the training. (PEFT's own merge rounds to nearest.)
    batches = [{"input_ids": ids} for ids in train[:64].split(8)]
    merged, _ = merge_and_requantize_(model, gptq_config(bits=4, group_size=128, calibration=batches))
    print(f"merged        perplexity {evaluate(merged, held_out).perplexity:.3f}")
    save_quantized(merged, out, format="gptq", tokenizer=tokenizer)
    print(f"{out}: load it with from_pretrained, serve it with vLLM or SGLang")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.mkdtemp()) / "tiny-tuned")
