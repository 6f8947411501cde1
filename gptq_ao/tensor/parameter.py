"""What libraries do with a parameter's class: make the same parameter of a new value."""

import warnings
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["ParameterClass"]


class ParameterClass(type(torch.Tensor)):  # type: ignore[misc]
    """Of classes that are called as `nn.Parameter` is, besides with what they are made of: cls(value, requires_grad=…).

    accelerate does, when it moves a parameter between a GPU, the host and the disk.
    """

    def __call__(cls, *parts: Any, **named: Any) -> Any:
        if "requires_grad" not in named:
            return super().__call__(*parts, **named)
        (value,), requires_grad = parts, named["requires_grad"]
        if isinstance(value, Tensor) and not isinstance(value, cls):
            warnings.warn(
                "a quantized weight was kept as a dense one, and is multiplied as such: files of accelerate's disk "
                "offload hold plain arrays. Values are the same; offload to the host ('cpu') to keep its codes",
                stacklevel=2,
            )
        return nn.Parameter(value, requires_grad)
