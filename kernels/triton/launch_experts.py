"""Launches of `linear.py` for rows of x that are sorted by expert."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from gptq_ao.kernels.packed import Packed
from gptq_ao.kernels.triton.launch import INTERPRETED, Kernel, constants
from gptq_ao.kernels.triton.linear import linear_kernel
from gptq_ao.kernels.tuning.heuristics import LinearConfig

__all__ = ["launch_experts", "most_blocks"]


def launch_experts(x: Tensor, packed: Packed, offsets: Tensor, c: LinearConfig, fast: bool | None = None) -> Tensor:
    """[rows, N] from x [rows, K], in its dtype, a stack of E weights and int32 `offsets` [E]; all contiguous.

    Args:
        c: a configuration without a split.
        fast: see `launch.py`.
    """
    # A split would need partial sums and counters, for which None is passed below.
    assert c.split == 1
    qdata, scale_zero, high_plane, _, bits, group_size, n, k = packed
    rows, experts = len(x), len(qdata)
    y = x.new_empty(rows, n)
    if y.numel() == 0:
        return y
    blocks = most_blocks(rows, experts, c.block_m) * -(-n // c.block_n)
    tensors = (x, qdata, high_plane, scale_zero, None, y, None, None, offsets, None)
    device = x.get_device()
    stream = torch._C._cuda_getCurrentRawStream(device) if device >= 0 else 0
    run = _kernel(c, bits, group_size, n, k, experts, x.dtype, device, fast)
    run((blocks, 1, 1), stream, tensors, (rows, n, k, k // group_size))
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
    """One for everything that Triton compiles a kernel for, except the alignment of tensors, which `Kernel` looks at. A
    device of -1 is the interpreter's."""
    capability = torch.cuda.get_device_capability(device)[0] if device >= 0 else 0
    fast = not INTERPRETED if fast is None else fast
    return Kernel(linear_kernel, *constants(c, bits, group_size, in_features, dtype, capability, fast, experts))


def most_blocks(rows: int, experts: int, block_m: int) -> int:
    """See `expert_rows.py`."""
    begun = min(rows, experts + 1)
    return begun + (rows - begun) // block_m
