"""torchtitan: a converter that makes its linear layers quantized, before its LoRA converter adds adapters.

    python examples/training/torchtitan_lora.py        # its debug model, a few steps on a CPU; torchtitan 0.3.0

In a training run the converter goes into the model's config, `converters=[GroupLinearConverter.Config(...),
LoRAConverter.Config(...)]`. The weights come from a model of torchtitan that `quantize_` has quantized before.
"""

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torchtitan.components.lora import LoRAConverter
from torchtitan.components.quantization import QuantizationConverter
from torchtitan.models.common.attention import ScaledDotProductAttention
from torchtitan.models.common.linear import Linear
from torchtitan.models.llama3 import model_registry

from gptq_ao import Int4GroupTensor, gptq_config, quantize_

GROUP_SIZE = 32


def empty_weight(like: Tensor, group_size: int) -> Int4GroupTensor:
    """A quantized weight of zeros, whose codes a checkpoint will bring."""
    n, k = like.shape
    with torch.device("cpu"):
        codes = torch.zeros(n, k, dtype=torch.uint8)
        zero_points = torch.full((n, k // group_size), 8, dtype=torch.uint8)
        scales = torch.ones(n, k // group_size, dtype=torch.float16)
        weight = Int4GroupTensor.from_codes(codes, scales, zero_points, dtype=like.dtype)
    return weight.to(like.device)


class GroupLinear(Linear):
    @dataclass(kw_only=True, slots=True)
    class Config(Linear.Config):
        group_size: int = GROUP_SIZE

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.weight = nn.Parameter(empty_weight(self.weight, config.group_size), requires_grad=False)

    def _init_param(self, name: str, param: nn.Parameter) -> None:
        if name != "weight":
            super()._init_param(name, param)


class GroupLinearConverter(QuantizationConverter):
    @dataclass(kw_only=True, slots=True)
    class Config(QuantizationConverter.Config):
        group_size: int = GROUP_SIZE

    def __init__(self, config: Config, **kwargs: Any) -> None:
        self.config = config

    def convert(self, model_config: Any) -> Any:
        for name, linear, parent, attribute in model_config.traverse(Linear.Config):
            if name.endswith("lm_head"):  # as quantize_ leaves it
                continue
            same = {f.name: getattr(linear, f.name) for f in fields(linear) if f.init}
            new = GroupLinear.Config(**same, group_size=self.config.group_size)
            if isinstance(parent, list):
                parent[attribute] = new
            else:
                setattr(parent, attribute, new)
        return model_config


def build(*converters: Any) -> Any:
    config = model_registry("debugmodel", attn_backend="flex", converters=list(converters)).model
    for layer in config.layers:  # flex attention has no backward on a CPU
        layer.attention.inner_attention = ScaledDotProductAttention.Config()
    model = config.build()
    model.init_states(buffer_device=torch.device("cpu"))
    return model


def main() -> None:
    torch.manual_seed(0)
    tokens, positions = torch.randint(0, 2048, (2, 32)), torch.arange(32).expand(2, 32)
    dense = build()
    batch = {"tokens": tokens, "positions": positions}
    quantize_(dense, gptq_config(bits=4, group_size=GROUP_SIZE, effort="fast", calibration=[batch]))

    model = build(GroupLinearConverter.Config(), LoRAConverter.Config(rank=4, alpha=8.0))
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


if __name__ == "__main__":
    main()
