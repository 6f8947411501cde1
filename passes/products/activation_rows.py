"""Bring the rows that a product multiplies into the form [..., in_features] (or [experts, ..., in_features]).

A matrix product contracts the last axis of its activation, and then there is nothing to do. These are the other cases.
Pure functions of any dtype, which stays; K = in_features.
"""

import torch.nn.functional as F
from torch import Tensor

__all__ = ["channels_last", "columns", "experts_first", "patches", "permuted"]


def columns(x: Tensor) -> Tensor:
    """The columns of x [..., K, T] or [K], which W·x multiplies: [..., T, K] or [K]."""
    return x.mT if x.dim() > 1 else x


def experts_first(x: Tensor) -> Tensor:
    """What x·W multiplies, with x [..., E, T, K] and a stack W of E matrices: [E, ..., T, K]."""
    return x.movedim(-3, 0)


def channels_last(x: Tensor, spatial: int) -> Tensor:
    """A transposed convolution over `spatial` axes multiplies each position's channels: [B, T, C] of [B, C, …] or
    [C, …]."""
    return (x if x.dim() == spatial + 2 else x.unsqueeze(0)).flatten(2).mT


def permuted(x: Tensor, axes: tuple[int, ...], batch: int, contracted: int) -> Tensor:
    """An operand of einsum, of any shape: its axes in the order batch, others, contracted; the first `batch` of them
    flattened to one (if there are any), and the last `contracted`."""
    x = x.permute(axes)
    x = x.flatten(x.dim() - contracted) if contracted > 1 else x
    return x.flatten(0, batch - 1) if batch > 1 else x


def patches(
    x: Tensor,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...] | str,
    dilation: tuple[int, ...],
    groups: int,
) -> Tensor:
    """What a convolution's filters multiply: [groups, B, T, C/groups·prod(kernel)] of x [B, C, …] or [C, …]; without
    the first axis for one group. T counts output positions."""
    spatial = len(kernel)
    x = x if x.dim() == spatial + 2 else x.unsqueeze(0)
    # Distance between the first and the last element that the kernel touches along each axis.
    reach = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    if padding == "same":
        # As torch does it: if the sum is odd, the end gets one more.
        pads = [(r // 2, r - r // 2) for r in reach]
    else:
        pads = [(0, 0)] * spatial if padding == "valid" else [(int(p), int(p)) for p in padding]
    # F.pad takes the last axis first.
    x = F.pad(x, [p for pair in reversed(pads) for p in pair])
    # Windows as wide as the kernel reaches, one for each output position; of each, every d-th element.
    for axis, (r, s, d) in enumerate(zip(reach, stride, dilation, strict=True)):
        x = x.unfold(2 + axis, r + 1, s)
        x = x[..., ::d]  # the kernel's axis, which comes last
    # [B, C, *positions, *kernel]
    x = x.flatten(2, 1 + spatial).unflatten(1, (groups, -1))  # [B, groups, C/groups, T, *kernel]
    x = x.transpose(2, 3).flatten(3).movedim(1, 0)  # [groups, B, T, C/groups·prod(kernel)]
    return x[0] if groups == 1 else x
