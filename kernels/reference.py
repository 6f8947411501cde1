"""The meaning of every kernel, in plain torch: unpack, dequantize, multiply. Runs on any device."""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from gptq_ao.codes.grid import dequantize as dequantize_codes
from gptq_ao.codes.tiles import unpack_codes, unpack_scale_zero
from gptq_ao.kernels.packed import Packed

__all__ = [
    "ACTIVATIONS",
    "attend_once",
    "by_expert",
    "check_experts",
    "dequantize",
    "gated",
    "linear",
    "linear_add",
    "linear_experts",
    "rms_norm",
]


def dequantize(packed: Packed, dtype: torch.dtype) -> Tensor:
    """The weight [..., N, K] that packed codes stand for, columns in the order of input features, rounded once, to
    `dtype`."""
    codes = unpack_codes(packed.qdata, packed.high_plane, packed.bits, packed.out_features, packed.in_features)
    scale, zero_point = unpack_scale_zero(packed.scale_zero, packed.out_features)
    weight = dequantize_codes(codes, scale, zero_point, dtype)
    return weight if packed.perm is None else weight[..., torch.argsort(packed.perm)]


def linear(x: Tensor, packed: Packed, bias: Tensor | None = None) -> Tensor:
    """x·Wᵀ + bias in the dtype of x: [..., N] from x [..., K], a matrix and a bias [N]; or, without a bias, [E, M, N]
    from x [E, M, K] and a stack of E matrices."""
    weight = dequantize(packed, x.dtype)
    return F.linear(x, weight, bias) if weight.dim() == 2 else torch.bmm(x, weight.mT)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
}


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    """x / √(mean(x²) + eps) · (offset + weight), over the last dimension (arXiv 1910.07467); computed in fp32 and
    rounded once, to the dtype of x. Gemma has an offset of one, others of zero."""
    v = x.float()
    return (v * torch.rsqrt(v.square().mean(-1, keepdim=True) + eps) * (offset + weight.float())).to(x.dtype)


def gated(gate: Tensor, x: Tensor, activation: str) -> Tensor:
    """activation(gate)·x, the gated unit of SwiGLU and GEGLU (arXiv 2002.05202), activation being one of `ACTIVATIONS`;
    computed in fp32 and rounded once, to the dtype of x."""
    return (ACTIVATIONS[activation](gate.float()) * x.float()).to(x.dtype)


def linear_add(x: Tensor, packed: Packed, bias: Tensor | None, residual: Tensor) -> Tensor:
    """x·Wᵀ + bias + residual: a matrix, and a residual of the shape and dtype of the result."""
    return linear(x, packed, bias) + residual


def attend_once(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """softmax(scale·q·kᵀ + mask)·v [B, H, 1, D] of one new token q [B, H, 1, D] for each sequence, in its dtype.

    Args:
        k, v: [B, heads, S, D], where H is a multiple of `heads`: neighbouring heads of q share one.
        mask: [B or 1, 1, 1, S], bool (what to attend to) or what is added to scores; or None.
    """
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=True)


def linear_experts(x: Tensor, packed: Packed, offsets: Tensor) -> Tensor:
    """x·Wᵀ by a stack [E, N, K]: row i of x [rows, K] meets expert e if offsets[e − 1] ≤ i < offsets[e].

    Args:
        offsets: integers [E], not decreasing, where each expert's rows end. Rows beyond the last give zeros. (Those of
            `torch.nn.functional.grouped_mm` are left as they were allocated.)

    Returns:
        [rows, N] in the dtype of x. One expert is dequantized at a time, and only if it has rows.
    """
    check_experts(x, packed, offsets)
    return by_expert(x, offsets, packed.out_features, lambda rows, expert: linear(rows, packed.expert(expert)))


def by_expert(x: Tensor, offsets: Tensor, columns: int, product: Callable[[Tensor, int], Tensor]) -> Tensor:
    """[rows, columns], zeros but for what `product(rows of x, expert)` makes of each expert's rows: see
    `linear_experts`. The host waits for `offsets` to be computed."""
    y = x.new_zeros(len(x), columns)
    start = 0
    for expert, end in enumerate(offsets.tolist()):
        if start < end:
            y[start:end] = product(x[start:end], expert)
        start = end
    return y


def check_experts(x: Tensor, packed: Packed, offsets: Tensor) -> None:
    """See `linear_experts` for the shapes and dtypes.

    Raises:
        RuntimeError: they do not fit.
    """
    qdata, in_features = packed.qdata, packed.in_features
    torch._check(
        x.dim() == 2 and x.shape[-1] == in_features,
        lambda: f"x {tuple(x.shape)} is not [rows, {in_features}], as a product by experts takes it",
    )
    torch._check(
        qdata.dim() == 4 and offsets.shape == qdata.shape[:1] and offsets.dtype in (torch.int32, torch.int64),
        lambda: f"offsets {offsets.dtype} {tuple(offsets.shape)} do not give integers for {len(qdata)} experts",
    )
