"""A model of Llama-3-8B's shapes with random weights, for benchmarks of speed and memory."""

from typing import Any

import torch
import transformers
from torch import nn

__all__ = ["llama"]


def llama(layers: int, vocabulary: int, device: str = "cpu") -> nn.Module:
    """On `device`, in bf16; the random weights are made on the GPU, which is quicker."""
    config = transformers.LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=vocabulary,
        max_position_embeddings=8192,
    )
    with torch.device("meta"):
        model: Any = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    model = model.to_empty(device=device).eval()
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    generator = torch.Generator("cuda").manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.copy_(torch.randn(p.shape, device="cuda", dtype=p.dtype, generator=generator) * p.shape[1] ** -0.5)
            else:
                p.fill_(1)
    return model
