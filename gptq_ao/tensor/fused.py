"""Several linear layers whose weights are one quantized tensor, and so one product."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["FusedProjections", "Projection"]


class FusedProjections(nn.Module):
    """The weights of several linear layers as one, [sum of out_features, in_features].

    The layer that is called first computes all parts, the others take theirs. A layer that is given another tensor than
    the one the waiting parts were computed from computes all anew: what is called, and in which order, decides how much
    is computed, and never what the result is.
    """

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.cat([layer.weight for layer in layers]), requires_grad=False)
        biases = tuple(layer.bias for layer in layers if layer.bias is not None)
        self.bias = nn.Parameter(torch.cat(biases), requires_grad=False) if biases else None
        self.sizes = [layer.out_features for layer in layers]
        # x, and the parts computed from it; None in place of a part that has been taken.
        self._waiting: tuple[Tensor, list[Tensor | None]] | None = None

    def part(self, x: Tensor, index: int) -> Tensor:
        """[..., out_features] from x [..., in_features]: what layer number `index` computes."""
        waiting = self._waiting
        # Compared by identity: equal values would have to be read. A part that was taken is None, so asking twice
        # computes again.
        if waiting is None or waiting[0] is not x or waiting[1][index] is None:
            fresh: list[Tensor | None] = [*F.linear(x, self.weight, self.bias).split(self.sizes, -1)]
            waiting = x, fresh
        parts = waiting[1]
        mine, parts[index] = parts[index], None
        assert mine is not None
        # When the last part is taken, x and the product are let go: they would be kept until the next call.
        self._waiting = None if all(p is None for p in parts) else waiting
        return mine


class Projection(nn.Module):
    """One of the layers, in its place in the model."""

    def __init__(self, fused: FusedProjections, index: int) -> None:
        super().__init__()
        self.fused, self.index = fused, index

    def forward(self, x: Tensor) -> Tensor:
        """[..., out_features] of x [..., in_features]."""
        return self.fused.part(x, self.index)

    def layer(self) -> nn.Linear:
        """The linear layer as it was, with a weight of its own [N, K]: a view of the fused one, where tiles allow."""
        start = sum(self.fused.sizes[: self.index])
        rows = slice(start, start + self.fused.sizes[self.index])
        weight, bias = self.fused.weight, self.fused.bias
        # On meta: the weight that the constructor makes is replaced at once.
        layer = nn.Linear(weight.shape[1], rows.stop - start, bias=bias is not None, device="meta")
        layer.weight = nn.Parameter(weight.detach()[rows], requires_grad=False)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach()[rows], requires_grad=False)
        return layer
