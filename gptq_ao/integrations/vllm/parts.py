"""Weights on their way into vLLM's layers: what a rank has of them, and what is one product."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptq_ao.errors import ConfigError
from gptq_ao.kernels import ops
from gptq_ao.tensor import GroupTensor
from gptq_ao.tensor.sharding import why_uncut

__all__ = ["ExpertsProduct", "Product", "joined", "narrowed", "share"]


def share(weight: Tensor, dim: int, size: int, rank: int, ranks: int) -> Tensor:
    """The part of `weight`, of `size` along `dim`, that one of `ranks` has. Where there are fewer parts than ranks, as
    of key and value heads, several have the same.

    Raises:
        ConfigError: a quantized weight cannot be cut so.
    """
    return narrowed(weight, dim, rank * (weight.shape[dim] // size) // ranks * size, size)


def narrowed(weight: Tensor, dim: int, start: int, size: int) -> Tensor:
    """`weight[start : start + size]` along `dim`; packed codes stay packed.

    Raises:
        ConfigError: they cannot.
    """
    if weight.shape[dim] == size:
        return weight
    part = weight.narrow(dim, start, size)
    if isinstance(weight, GroupTensor) and not isinstance(part, GroupTensor):
        parts = weight.shape[dim] // size
        why = (
            why_uncut(weight, dim, parts) or f"[{start}:{start + size}] does not begin and end with a tile and a group"
        )
        raise ConfigError(
            f"{weight!r} cannot be cut into {parts} parts for tensor parallelism: {why}. Serve with fewer GPUs for a "
            "model, or quantize with groups of which each GPU has whole ones"
        )
    return part.clone()  # not a view, which would keep the whole weight


def joined(weights: Sequence[Tensor]) -> list[Tensor]:
    """The rows of all weights, in as few tensors as can be: neighbours of one kind are one product."""
    made = [weights[0]]
    for weight in weights[1:]:
        if isinstance(weight, GroupTensor) != isinstance(made[-1], GroupTensor):
            made.append(weight)
            continue
        try:
            made[-1] = torch.cat([made[-1], weight])
        except ValueError:  # other bits, groups or order of columns
            made.append(weight)
    return made


class Product(nn.Module):
    """x·Wᵀ by a weight [N, K]. Its parts are plain buffers, which what compiles and captures vLLM's graphs knows."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        parts = weight.packed() if isinstance(weight, GroupTensor) else (weight,)
        self.numbers = parts[4:]
        self.names = [f"part{i}" for i in range(len(parts) - len(self.numbers))]
        for name, part in zip(self.names, parts, strict=False):
            self.register_buffer(name, part, persistent=False)

    def parts(self) -> tuple[Any, ...]:
        """What `GroupTensor.packed` gives; or the dense weight."""
        return (*(getattr(self, name) for name in self.names), *self.numbers)

    def forward(self, x: Tensor) -> Tensor:
        """[..., N] from x [..., K]."""
        return ops.linear(x, *self.parts()) if self.numbers else F.linear(x, *self.parts())


class ExpertsProduct(Product):
    """The same by a stack [E, N, K], each row of x by one of its matrices."""

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:  # type: ignore[override]
        """[rows, N] from x [rows, K], sorted by expert, whose rows end at `offsets` [E]; zeros beyond the last one."""
        return ops.grouped_linear(x, *self.parts(), offsets)
