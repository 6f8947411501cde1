"""Launches of `attention.py`."""

import functools
from typing import Any

import torch
import triton
from torch import Tensor

from gptq_ao.kernels.triton.attention import attention_kernel
from gptq_ao.kernels.triton.counters import zeroed_counters
from gptq_ao.kernels.triton.launch import Kernel

__all__ = ["constants", "launch_attention"]

BLOCK = 64  # positions at a time
MOST_SPLIT = 16
PROGRAMS = 264  # two for each multiprocessor of a large GPU

Strides = tuple[int, ...]


def constants(
    heads: int, share: int, dim: int, split: int, scale: float, strides: tuple[Strides, ...], ahead: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The kernel's, and the compiler's options. Strides are those of q, k, v and the mask."""
    values = {
        "HEADS": heads,
        "SHARE": share,
        "G": max(16, triton.next_power_of_2(share)),
        "D": dim,
        "BLOCK": BLOCK,
        "SPLIT": split,
        "SCALE": scale,
        **dict(zip("QKVM", strides, strict=True)),
        "AHEAD": ahead,
    }
    return values, {"num_warps": 4, "enable_fp_fusion": True} | ({"launch_pdl": True} if ahead else {})


def launch_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """[B, H, 1, D] from q of that shape, k and v [B, heads, S, D], whose last dimension is contiguous, and a mask
    [B or 1, S]; on the current device."""
    batch, all_heads, _, dim = q.shape
    heads, positions = k.shape[1:3]
    device = q.get_device()
    stream = torch._C._cuda_getCurrentRawStream(device) if device >= 0 else 0
    split = min(-(-positions // BLOCK), MOST_SPLIT, max(1, PROGRAMS // (batch * heads)))
    counters = partial = None
    if split > 1:
        rows = batch * heads
        counters = zeroed_counters(device, rows, stream) if device >= 0 else torch.zeros(rows, dtype=torch.int32)
        split = 1 if counters is None else split
    of_mask = (0, 0) if mask is None else (mask.stride(0) if len(mask) > 1 else 0, mask.stride(1))
    strides = (q.stride()[:2], k.stride()[:3], v.stride()[:3], of_mask)
    dtypes = (q.dtype, None if mask is None else mask.dtype)
    kernel = _kernel(heads, all_heads // heads, dim, split, scale, strides, dtypes, device)
    if split > 1:
        size = kernel.constants["G"] * (dim + 2)
        partial = q.new_empty(batch * heads * split * size, dtype=torch.float32)
    y = q.new_empty(q.shape)
    kernel((heads, split, batch), stream, (q, k, v, mask, y, partial, counters), (positions,))
    return y


@functools.cache
def _kernel(
    heads: int,
    share: int,
    dim: int,
    split: int,
    scale: float,
    strides: tuple[Strides, ...],
    dtypes: tuple[torch.dtype | None, ...],
    device: int,
) -> Kernel:
    """One for all that Triton compiles a kernel for, except the alignment of tensors, which `Kernel` looks at."""
    ahead = device >= 0 and torch.cuda.get_device_capability(device)[0] >= 9
    return Kernel(attention_kernel, *constants(heads, share, dim, split, scale, strides, ahead))
