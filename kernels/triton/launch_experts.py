"""Launches of `linear.py` for rows of x that are sorted by expert."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from gptq_ao.kernels.triton.launch import INTERPRETED, Kernel, constants
from gptq_ao.kernels.triton.linear import linear_kernel
from gptq_ao.kernels.tuning.heuristics import LinearConfig

__all__ = ["launch_experts", "most_blocks"]


def launch_experts(
    x: Tensor,
    qdata: Tensor,
    scale_zero: Tensor,
    high_plane: Tensor | None,
    bits: int,
    group_size: int,
    out_features: int,
    offsets: Tensor,
    c: LinearConfig,
    fast: bool | None = None,
) -> Tensor:
    """[rows, N] from x [rows, K], a stack of E weights and int32 `offsets` [E]; all contiguous.

    Args:
        c: without a split.
        fast: see `launch.py`.
    """
    assert c.split == 1
    rows, in_features = x.shape
    y = x.new_empty(rows, out_features)
    if y.numel() == 0:
        return y
    blocks = most_blocks(rows, len(qdata), c.block_m) * -(-out_features // c.block_n)
    tensors = (x, qdata, high_plane, scale_zero, None, y, None, None, offsets)
    device = x.get_device()
    stream = torch._C._cuda_getCurrentRawStream(device) if device >= 0 else 0
    run = _kernel(c, bits, group_size, out_features, in_features, len(qdata), x.dtype, device, fast)
    run((blocks, 1, 1), stream, tensors, (rows, out_features, in_features, in_features // group_size))
    return y


@functools.cache
def _kernel(
    c: LinearConfig,
    bits: int,
    group_size: int,
    out_features: int,
    in_features: int,
    experts: int,
    dtype: torch.dtype,
    device: int,
    fast: bool | None,
) -> Callable[..., None]:
    """What Triton specializes a kernel for, but for the alignment of tensors. A device of -1 is the interpreter's."""
    capability = torch.cuda.get_device_capability(device)[0] if device >= 0 else 0
    fast = not INTERPRETED if fast is None else fast
    return Kernel(linear_kernel, *constants(c, bits, group_size, in_features, dtype, capability, fast, experts))


def most_blocks(rows: int, experts: int, block_m: int) -> int:
    """See `expert_rows.py`."""
    begun = min(rows, experts + 1)
    return begun + (rows - begun) // block_m
