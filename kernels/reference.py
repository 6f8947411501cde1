"""The meaning of every kernel, in plain torch: unpack, dequantize, multiply. Runs on any device."""

import torch
import torch.nn.functional as F
from torch import Tensor

from gptq_ao.grid import dequantize as dequantize_codes
from gptq_ao.packing import unpack_codes, unpack_scale_zero

__all__ = ["dequantize", "linear"]


def dequantize(
    qdata: Tensor,
    scale_zero: Tensor,
    high_plane: Tensor | None,
    perm: Tensor | None,
    bits: int,
    out_features: int,
    in_features: int,
    dtype: torch.dtype,
) -> Tensor:
    """The weight [..., out_features, in_features] that packed codes stand for, rounded once, to `dtype`."""
    codes = unpack_codes(qdata, high_plane, bits, out_features, in_features)
    scale, zero_point = unpack_scale_zero(scale_zero, out_features)
    weight = dequantize_codes(codes, scale, zero_point, dtype)
    return weight if perm is None else weight[..., torch.argsort(perm)]


def linear(
    x: Tensor,
    qdata: Tensor,
    scale_zero: Tensor,
    high_plane: Tensor | None,
    perm: Tensor | None,
    bits: int,
    out_features: int,
    in_features: int,
    bias: Tensor | None = None,
) -> Tensor:
    """x·Wᵀ + bias in the dtype of x: [..., K] by [N, K]; or without a bias a batch [E, M, K] by [E, N, K]."""
    weight = dequantize(qdata, scale_zero, high_plane, perm, bits, out_features, in_features, x.dtype)
    return F.linear(x, weight, bias) if weight.dim() == 2 else torch.bmm(x, weight.mT)
