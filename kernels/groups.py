"""Round a group of columns to the best of several grids: the step that `solver/solve.py` repeats most often.

Shapes as in `columns.py`: B columns of N rows, stored as [B, N]; fp32 but for codes (uint8) and scales (fp16).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from gptq_ao.codes.grid import candidate_grids
from gptq_ao.kernels.columns import MAX_COLUMNS, in_gluon, round_columns, score_grids

__all__ = ["best_grid", "round_group"]


def best_grid(
    x: Tensor, follow: Sequence[Tensor], importance: Tensor, bits: int, sym: bool, signed: bool, count: int
) -> tuple[Tensor, Tensor]:
    """The grid, of those of `candidate_grids`, with the smallest loss (`score_grids`), for each row; of equal ones the
    first.

    Args:
        x: [B, N], a group.
        follow: of each of its blocks of at most MAX_COLUMNS; a longer group is judged block by block, as if the others
            were not rounded.
        importance: [B].

    Returns:
        scale [N] fp16 and zero_point [N] uint8. The scale may be infinite or NaN, where all are.
    """
    scale, zero_point = candidate_grids(x, bits, sym, signed, count)
    s, z = scale.float(), zero_point.float()
    loss = torch.zeros_like(s)
    blocks = (t.split(MAX_COLUMNS) for t in (x, importance))
    for columns, weights, each in zip(*blocks, follow, strict=True):
        loss += score_grids(columns, each, weights, s, z, bits)
    # A candidate that overflows must not win.
    best = loss.nan_to_num_(torch.inf).argmin(0, keepdim=True)
    return scale.gather(0, best)[0], zero_point.gather(0, best)[0]


def round_group(
    x: Tensor,
    follow: Tensor,
    importance: Tensor,
    weight: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bits: int,
    sym: bool,
    signed: bool,
    count: int,
) -> None:
    """Choose a group's grid, and round it column by column as `round_columns` does.

    Args:
        x, follow, importance: as for `score_grids`; B ≤ MAX_COLUMNS.
        weight: [B, N]. On return it is what the rounding leaves of it, W − Ŵ.
        codes: [B, N], set.
        scale, zero_point: [N], set.
        count: see `candidate_grids`.
    """
    if in_gluon(x):
        from gptq_ao.kernels.gluon import groups

        groups.round_group(x, follow, importance, weight, codes, scale, zero_point, bits, sym, signed, count)
        return
    best = best_grid(x, [follow], importance, bits, sym, signed, count)
    scale.copy_(best[0])
    zero_point.copy_(best[1])
    s, z = (t.float().expand_as(x) for t in (scale, zero_point))
    codes.copy_(round_columns(x, follow, s, z, bits))
    weight -= (codes - z).mul_(s)
