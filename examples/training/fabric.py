"""Lightning Fabric: python examples/training/fabric.py"""

import torch
from embedded import LORA, chunks, quantized
from lightning_fabric import Fabric
from peft import get_peft_model


def main() -> None:
    fabric = Fabric(accelerator="auto", devices=1, precision="bf16-mixed")
    fabric.launch()
    model, tokenizer = quantized()
    ids = chunks(tokenizer)
    adapted = get_peft_model(model, LORA)
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=2e-3)
    wrapped, optimizer = fabric.setup(adapted, optimizer)
    losses = []
    for batch in ids.split(8):
        batch = fabric.to_device(batch)
        loss = wrapped(input_ids=batch, labels=batch).loss
        fabric.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    # Not `fabric.save`, which pickles the quantized weights too.
    fabric.print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")


if __name__ == "__main__":
    main()
