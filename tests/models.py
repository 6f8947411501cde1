"""Small models that the tests share. Seeds are local: no test depends on another's."""

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def tiny_llama(
    *, layers: int = 2, tied: bool = False, dtype: torch.dtype = torch.float32, seed: int = 0, width: int = 64
) -> Any:
    """A random Llama of hidden size `width` with biases in none, 4 heads, 2 key-value heads, vocabulary 96."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=96,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM._from_config(config, dtype=dtype).eval()


def token_batches(count: int = 4, rows: int = 2, length: int = 40, vocabulary: int = 96) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(0, vocabulary, (rows, length), generator=generator)} for _ in range(count)]


def seeded(module: ModuleT, seed: int = 0) -> ModuleT:
    """`module` with reproducible random parameters, in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            fan_in = p.shape[-1] if p.dim() > 1 else 16
            p.copy_(torch.randn(p.shape, generator=generator) / fan_in**0.5)
    return module.eval()


class Attention(nn.Module):
    """Plain torch self-attention with separate projections."""

    def __init__(self, width: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).flatten(2))
