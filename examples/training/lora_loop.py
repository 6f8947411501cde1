"""A loop of plain torch, which trains LoRA adapters (PEFT) on a quantized model.

python examples/training/lora_loop.py
"""

import torch
from embedded import LORA, chunks, quantized
from peft import get_peft_model


def main() -> None:
    model, tokenizer = quantized()
    ids = chunks(tokenizer)
    model = get_peft_model(model, LORA)
    model.print_trainable_parameters()
    # After quantization, and over what trains: the quantized weights never do.
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    losses = []
    for _ in range(2):
        for batch in ids.split(8):
            # bf16 products, adapters and optimizer in fp32.
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")


if __name__ == "__main__":
    main()
