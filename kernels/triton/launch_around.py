"""Launches of `around_products.py`."""

import functools
from typing import Any

import torch
import triton
from torch import Tensor

from gptq_ao.kernels.triton.around_products import gated_kernel, rms_norm_kernel
from gptq_ao.kernels.triton.launch import Kernel

__all__ = ["launch_gated", "launch_rms_norm"]

BLOCK = 1024  # columns of a program of `gated_kernel`


def launch_rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    """[M, K] from x [M, K], whose last dimension is contiguous, and a contiguous weight [K]; on the current device."""
    y = x.new_empty(x.shape)
    kernel = _rms_norm(x.shape[1], x.stride(0), eps, offset, (x.dtype, weight.dtype), x.get_device())
    kernel((len(x), 1, 1), _stream(x), (x, weight, y), ())
    return y


def launch_gated(gate: Tensor, x: Tensor, activation: str) -> Tensor:
    """[M, K] from two of that shape, whose last dimension is contiguous."""
    y = x.new_empty(x.shape)
    rows, columns = x.shape
    kernel = _gated(columns, (gate.stride(0), x.stride(0)), activation, x.dtype, x.get_device())
    kernel((triton.cdiv(columns, BLOCK), rows, 1), _stream(x), (gate, x, y), ())
    return y


def _stream(x: Tensor) -> int:
    return torch._C._cuda_getCurrentRawStream(x.get_device()) if x.is_cuda else 0


def _ahead(device: int) -> bool:
    return device >= 0 and torch.cuda.get_device_capability(device)[0] >= 9


# One for everything that Triton compiles a kernel for, except the alignment of tensors, which `Kernel` looks at.
@functools.cache
def _rms_norm(
    columns: int, stride: int, eps: float, offset: float, dtypes: tuple[torch.dtype, ...], device: int
) -> Kernel:
    block = triton.next_power_of_2(columns)
    values = {"K": columns, "STRIDE": stride, "BLOCK": block, "EPS": eps, "OFFSET": offset, "AHEAD": _ahead(device)}
    return Kernel(rms_norm_kernel, values, _options(min(16, max(1, block // 512)), device))


@functools.cache
def _gated(columns: int, strides: tuple[int, int], activation: str, dtype: torch.dtype, device: int) -> Kernel:
    names = ("K", "GATE", "X", "BLOCK", "ACTIVATION", "AHEAD")
    values = dict(zip(names, (columns, *strides, BLOCK, activation, _ahead(device)), strict=True))
    return Kernel(gated_kernel, values, _options(4, device))


def _options(warps: int, device: int) -> dict[str, Any]:
    return {"num_warps": warps, "enable_fp_fusion": True} | ({"launch_pdl": True} if _ahead(device) else {})
