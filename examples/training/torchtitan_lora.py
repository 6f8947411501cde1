"""torchtitan: LoRA on a quantized model, by a converter that comes before torchtitan's own.

    python examples/training/torchtitan_lora.py        # its debug model, a few steps on a CPU; torchtitan 0.3.0

In a training run the converters go into the model's config, as here. The weights come from a model of torchtitan that
`quantize_` has quantized before.
"""

from typing import Any

import torch
from torch import nn
from torchtitan.components.lora import LoRAConverter
from torchtitan.models.common.attention import ScaledDotProductAttention
from torchtitan.models.llama3 import model_registry

from gptq_ao import gptq_config, quantize_
from gptq_ao.integrations.torchtitan import GroupLinearConverter


def build(*converters: Any) -> Any:
    config = model_registry("debugmodel", attn_backend="flex", converters=list(converters)).model
    for layer in config.layers:  # flex attention has no backward on a CPU
        layer.attention.inner_attention = ScaledDotProductAttention.Config()
    model = config.build()
    model.init_states(buffer_device=torch.device("cpu"))
    return model


torch.manual_seed(0)
tokens, positions = torch.randint(0, 2048, (2, 32)), torch.arange(32).expand(2, 32)
dense = build()
batch = {"tokens": tokens, "positions": positions}
quantize_(dense, gptq_config(bits=4, group_size=32, effort="fast", calibration=[batch]))

model = build(GroupLinearConverter.Config(bits=4, group_size=32), LoRAConverter.Config(rank=4, alpha=8.0))
loaded = model.load_state_dict(dense.state_dict(), strict=False)
assert not loaded.unexpected_keys
assert all("lora" in name for name in loaded.missing_keys)

optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
losses = []
for _ in range(6):
    logits = model(tokens, positions=positions)
    loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
