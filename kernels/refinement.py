"""The two steps of refinement (`solver/refine.py`), for one group of columns: its scale, and its codes.

Shapes as in `columns.py`: B columns of N rows, stored as [B, N]; fp32 but for codes (uint8) and scales (fp16). What is
set is set in place. `gradient` is E·H of the columns, with E = W − Ŵ.
"""

import torch
from torch import Tensor

from gptq_ao.kernels.columns import MAX_COLUMNS, in_gluon, round_columns

__all__ = ["fit_codes", "fit_scale"]


def fit_scale(
    H: Tensor,
    gradient: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    error: Tensor,
    change: Tensor,
    signed: bool,
) -> None:
    """Set the scale of each row where the best one for these codes, rounded to fp16, is better; `error` and `gradient`
    follow, and `change` is set to what the error has grown by.

    A change by δ changes the loss by curvature·δ² − 2·slope·δ.

    Args:
        H: [B, B], of the group.
        codes: [B, N].
        scale, zero_point: [N].
        error, gradient, change: [B, N].
        signed: whether scales may be negative.
    """
    if H.is_cuda and len(H) <= MAX_COLUMNS:
        from gptq_ao.kernels.triton import refinement

        refinement.fit_scale(H, gradient, codes, scale, zero_point, error, change, signed)
        return
    steps, old = codes - zero_point, scale.float()
    product = H @ steps
    # A group whose codes all equal the zero point has no steps: curvature 0, and `new` is NaN, so nothing changes.
    slope, curvature = (steps * gradient).sum(0), (steps * product).sum(0)
    new = (old + slope / curvature).to(torch.float16).float()
    delta = new - old
    better = torch.isfinite(new) & (new != 0) & (2 * slope * delta > curvature * delta * delta)
    if not signed:
        better &= new > 0
    scale.copy_(torch.where(better, new, old))
    smaller = old - scale.float()
    error += torch.mul(steps, smaller, out=change)
    gradient += product.mul_(smaller)


def fit_codes(
    H: Tensor,
    gradient: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    target: Tensor,
    error: Tensor,
    change: Tensor,
    bits: int,
) -> None:
    """Set the codes of a block, one column after the other, each to the best one given all others; `error` follows,
    and what it grows by is added to `change`.

    Args:
        H: [B, B], of the block, with a positive diagonal; B ≤ MAX_COLUMNS.
        gradient: [B, N]. On return what it is for is over.
        codes: [B, N].
        scale, zero_point: [N], of the group that the block is in.
        target, error, change: [B, N].
    """
    if in_gluon(gradient):
        from gptq_ao.kernels.gluon.refinement import fit_codes as fit_in_gluon

        fit_in_gluon(H, gradient, codes, scale, zero_point, target, error, change, bits)
        return
    if H.is_cuda:
        from gptq_ao.kernels.triton import refinement

        refinement.fit_codes(H, gradient, codes, scale, zero_point, target, error, change, bits)
        return
    s, z = (t.float().expand_as(gradient) for t in (scale, zero_point))
    now = target - error
    best = now + gradient / H.diagonal().unsqueeze(1)
    codes.copy_(round_columns(best, -H / H.diagonal(), s, z, bits, before=now))
    change -= error
    torch.sub(target, (codes - z).mul_(s), out=error)
    change += error
