# mypy: disable-error-code="misc,has-type"
"""torchtitan: linear layers whose weights are quantized.

torchtitan makes a model from a tree of configs, in which converters replace some by others. `GroupLinearConverter` goes
before torchtitan's `LoRAConverter`, which then adds adapters to what this one made. The weights themselves come from
the state dict of a model of torchtitan that `quantize_` has quantized.
"""

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torchtitan.components.quantization import QuantizationConverter
from torchtitan.models.common.linear import Linear

from gptq_ao.codes.grid import group_columns
from gptq_ao.tensor import GroupTensor, tensor_class

__all__ = ["GroupLinear", "GroupLinearConverter"]


def _zeros(like: Tensor, bits: int, group_size: int) -> GroupTensor:
    """A quantized weight [N, K] of zeros, whose codes a checkpoint will bring."""
    n, k = like.shape
    with torch.device("cpu"):  # torchtitan makes models on the meta device
        codes = torch.full((n, k), 2 ** (bits - 1), dtype=torch.uint8)
        scales = torch.ones(n, k // group_columns(k, group_size), dtype=torch.float16)
        zero_points = torch.full_like(scales, 2 ** (bits - 1), dtype=torch.uint8)
        weight = tensor_class(bits).from_codes(codes, scales, zero_points, dtype=like.dtype)
    return weight.to(like.device)


class GroupLinear(Linear):
    """A linear layer of torchtitan whose weight is quantized and not trained."""

    @dataclass(kw_only=True, slots=True)
    class Config(Linear.Config):
        bits: int = 4
        group_size: int = 128

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.weight = nn.Parameter(_zeros(self.weight, config.bits, config.group_size), requires_grad=False)

    def _init_param(self, name: str, param: nn.Parameter) -> None:
        if name != "weight":  # a quantized weight has no random numbers
            super()._init_param(name, param)


class GroupLinearConverter(QuantizationConverter):
    """Replaces all linear layers but the output head, as `quantize_` does; with the same bits and group size, or else
    `load_state_dict` refuses its weights."""

    @dataclass(kw_only=True, slots=True)
    class Config(QuantizationConverter.Config):
        bits: int = 4
        group_size: int = 128

    def __init__(self, config: Config, **kwargs: Any) -> None:
        self.config = config

    def convert(self, model_config: Any) -> Any:
        for name, linear, parent, attribute in model_config.traverse(Linear.Config):
            if name.endswith("lm_head"):
                continue
            same = {f.name: getattr(linear, f.name) for f in fields(linear) if f.init}
            new = GroupLinear.Config(**same, bits=self.config.bits, group_size=self.config.group_size)
            if isinstance(parent, list):
                parent[attribute] = new
            else:
                setattr(parent, attribute, new)
        return model_config
