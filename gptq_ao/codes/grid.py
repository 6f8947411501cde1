"""The affine grid of a group of weights: choose scale and zero point, round to a code, and back.

    w ≈ (code − zero_point) · scale          code, zero_point in 0 … 2^bits − 1

One scale and one zero point serve `group_size` neighbouring columns of a row. Scales are rounded to fp16, the type they
are stored in, *before* any code is computed: a code is then the nearest one on the grid that is really used.

Shapes: N = out_features, K = in_features, G = number of groups in a row.
"""

import torch
from torch import Tensor

from gptq_ao.errors import NonFiniteError

__all__ = ["candidate_grids", "choose_grid", "dequantize", "group_columns", "max_code", "round_to_grid"]

SMALLEST_SCALE = 2.0**-24  # the smallest positive fp16: a group of zeros still needs a scale to divide by
# The narrowest candidate, as a share of the full range: at 2 bits most weights should lie within the grid, not all.
NARROWEST = {2: 0.2, 3: 0.3, 4: 0.4, 8: 0.8}


def max_code(bits: int) -> int:
    return 2**bits - 1


def group_columns(in_features: int, group_size: int) -> int:
    """The number of columns in a group: `group_size`, or all of them for −1."""
    return in_features if group_size == -1 else group_size


def choose_grid(weight: Tensor, group_size: int, bits: int, sym: bool, signed: bool = False) -> tuple[Tensor, Tensor]:
    """Scale and zero point from the smallest and the largest weight of each group.

    Symmetric: the zero point is 2^(bits−1) and the scale max|w| / (2^bits − 1) · 2, so that the grid's full width spans
    [−max|w|, max|w|] (at 4 bits: max|w| / 7.5, as GPTQ's authors and their successors do). With `signed` the scale has
    the sign that lets the code −2^(bits−1), which has no positive counterpart, stand for the weight of the largest
    magnitude: max|w| / 2^(bits−1) is enough.
    Asymmetric: the grid spans [min(w, 0), max(w, 0)], so that zero stays representable.

    Args:
        weight: [..., N, K], floating point; K is a multiple of the group's columns.

    Returns:
        scale [..., N, G] fp16 and zero_point [..., N, G] uint8.

    Raises:
        NonFiniteError: a weight is NaN or infinite, or too large for an fp16 scale.
    """
    groups = weight.float().unflatten(-1, (-1, group_columns(weight.shape[-1], group_size)))
    low, high = groups.aminmax(dim=-1)
    levels, half = max_code(bits), 2 ** (bits - 1)
    if sym and signed:
        scale = torch.where(high > -low, -high, -low) / half
    else:
        scale = (2 * torch.maximum(-low, high) if sym else high.clamp(min=0) - low.clamp(max=0)) / levels
    scale = _stored(scale)
    if not torch.isfinite(scale).all():
        largest = weight.abs().max().item()
        raise NonFiniteError(f"the weights reach {largest:.3g}: a scale for them is not a finite fp16 number")
    if sym:
        zero_point = torch.full_like(scale, half, dtype=torch.uint8)
    else:
        zero_point = (-low.clamp(max=0) / scale.float()).round().clamp(0, levels).to(torch.uint8)
    return scale, zero_point


def candidate_grids(group: Tensor, bits: int, sym: bool, signed: bool, count: int) -> tuple[Tensor, Tensor]:
    """`choose_grid` for one group, and narrower grids beside its own: those that cut off the largest weights.

    Args:
        group: [columns, N] fp32, transposed.
        count: number of widths, from the full range down. Each comes with either sign if `signed`, and with both
            integers next to its zero point if not `sym`.

    Returns:
        scale [C, N] fp16 and zero_point [C, N] uint8. A scale may be infinite where weights are too large.
    """
    low, high = group.aminmax(dim=0)
    levels, half = max_code(bits), 2 ** (bits - 1)
    shares = torch.linspace(1, NARROWEST[bits], count, dtype=group.dtype, device=group.device).unsqueeze(1)
    if sym:
        scale = shares * (2 * torch.maximum(-low, high) / levels)
        scale = _stored(torch.cat([scale, -scale]) if signed else scale)
        return scale, torch.full_like(scale, half, dtype=torch.uint8)
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = _stored(shares * ((high - low) / levels))
    # Of a narrower grid it is not known on which side it should cut: either neighbour of the zero point may be better.
    origin = shares * -low / scale.float()
    zero_point = torch.cat([origin.floor(), origin.ceil()]).clamp(0, levels).to(torch.uint8)
    return torch.cat([scale, scale]), zero_point


def _stored(scale: Tensor) -> Tensor:
    """As fp16, no nearer to zero than the smallest one. Zero has no sign: that of a group of zeros is accidental."""
    smallest = torch.where(scale < 0, -SMALLEST_SCALE, SMALLEST_SCALE)
    return torch.where(scale.abs() < SMALLEST_SCALE, smallest, scale).to(torch.float16)


def round_to_grid(weight: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """The code nearest to each weight [..., K], ties to even, as fp32. `scale` and `zero_point`, fp32, broadcast."""
    return (weight / scale).round_().add_(zero_point).clamp_(0, max_code(bits))


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor, dtype: torch.dtype) -> Tensor:
    """(code − zero_point) · scale.

    The difference is an exact small integer; the product is formed in fp32 and rounded once, to `dtype`. (As one
    multiply-add, code·scale − zero_point·scale, it would cost up to half a quantization step in bf16.)

    Args:
        codes: [..., N, K] uint8. scale: [..., N, G] fp16. zero_point: [..., N, G] uint8.

    Returns:
        [..., N, K] of `dtype`.
    """
    groups = codes.unflatten(-1, (scale.shape[-1], -1)).float()
    weight = groups.sub_(zero_point.unsqueeze(-1)).mul_(scale.unsqueeze(-1).float())
    return weight.flatten(-2).to(dtype)
