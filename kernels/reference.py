"""The meaning of every kernel, in plain torch: unpack, dequantize, multiply. Runs on any device."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from gptq_ao.codes.grid import dequantize as dequantize_codes
from gptq_ao.codes.tiles import unpack_codes, unpack_scale_zero

__all__ = ["by_expert", "check_grouped", "dequantize", "grouped_linear", "linear"]


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


def grouped_linear(
    x: Tensor,
    qdata: Tensor,
    scale_zero: Tensor,
    high_plane: Tensor | None,
    perm: Tensor | None,
    bits: int,
    out_features: int,
    in_features: int,
    offsets: Tensor,
) -> Tensor:
    """x·Wᵀ by a stack [E, N, K]: row i of x [rows, K] meets expert e if offsets[e − 1] ≤ i < offsets[e].

    Args:
        offsets: integers [E], not decreasing, where each expert's rows end. Rows beyond the last give zeros. (Those of
            `torch.nn.functional.grouped_mm` are left as they were allocated.)

    Returns:
        [rows, N] in the dtype of x. One expert is dequantized at a time, and only if it has rows.
    """
    check_grouped(x, qdata, in_features, offsets)

    def product(rows: Tensor, expert: int) -> Tensor:
        high = None if high_plane is None else high_plane[expert]
        return linear(rows, qdata[expert], scale_zero[expert], high, perm, bits, out_features, in_features)

    return by_expert(x, offsets, out_features, product)


def by_expert(x: Tensor, offsets: Tensor, columns: int, product: Callable[[Tensor, int], Tensor]) -> Tensor:
    """[rows, columns]: what `product` makes of each expert's rows, and zeros. Waits for `offsets` to be computed."""
    y = x.new_zeros(len(x), columns)
    start = 0
    for expert, end in enumerate(offsets.tolist()):
        if start < end:
            y[start:end] = product(x[start:end], expert)
        start = end
    return y


def check_grouped(x: Tensor, qdata: Tensor, in_features: int, offsets: Tensor) -> None:
    """Raise RuntimeError if shapes or dtypes do not fit."""
    torch._check(
        x.dim() == 2 and x.shape[-1] == in_features,
        lambda: f"x {tuple(x.shape)} is not [rows, {in_features}], as a grouped product takes it",
    )
    torch._check(
        qdata.dim() == 4 and offsets.shape == qdata.shape[:1] and offsets.dtype in (torch.int32, torch.int64),
        lambda: f"offsets {offsets.dtype} {tuple(offsets.shape)} do not give integers for {len(qdata)} experts",
    )
