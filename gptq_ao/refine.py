"""Improve a solution: better scales for the codes, better codes for the scales, in turn.

GPTQ decides each code once, without knowing those that come after it. Afterwards

    scales   given the codes, tr(E·H·Eᵀ) is quadratic in the scales of a row: the best ones are the solution of G linear
             equations, then rounded to fp16;
    codes    given the scales and all other codes of a row, the best code of one column is the nearest one to
             ŵ_j + (E·H)_j / H_jj. Column after column, this never makes the loss larger (coordinate descent).

Sources: the first is least squares; the second is that of Behdin et al., "QuantEase" (2023) and Nair & Suggala,
"CDQuant" (2024).

Everything is transposed, as in `solver.py`: K = in_features, N = out_features, G = groups, runs of K / G columns.
"""

import torch
from torch import Tensor

from gptq_ao.hessian import ieee_fp32
from gptq_ao.kernels.columns import MAX_COLUMNS, round_columns

__all__ = ["refine"]

SWEEPS = 2  # of coordinate descent between two fits of the scales
OUTER = 1024  # columns between two products with all of H
RIDGE = 1e-6  # of the mean diagonal of the equations for the scales: the codes of a group may all be zero
EQUATIONS_BYTES = 2**29  # of the rows that are fitted at once


def refine(
    target: Tensor,
    H: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    *,
    bits: int,
    signed: bool,
    rounds: int,
) -> tuple[Tensor, Tensor]:
    """Fit the scales and the codes in turn, `rounds` times, and the scales once more.

    Args:
        target: [K, N] fp32, what the codes stand for.
        H: [K, K] fp32, damped: positive definite.
        codes: [K, N] uint8.
        scale, zero_point: [G, N], fp16 and uint8.
        signed: whether a scale may change its sign.

    Returns:
        codes and scale; tr(E·H·Eᵀ) is no larger than before, in any row.
    """
    codes = codes.clone()
    origin = zero_point.float()
    with ieee_fp32():
        for _ in range(rounds):
            scale = _fit_scales(target, H, codes, scale, origin, signed)
            for _ in range(SWEEPS):
                _descend(target, H, codes, scale.float(), origin, bits)
        return codes, _fit_scales(target, H, codes, scale, origin, signed)


def _steps(codes: Tensor, zero_point: Tensor) -> Tensor:
    """code − zero_point, [K, N] fp32."""
    return codes.unflatten(0, (len(zero_point), -1)).float().sub_(zero_point.unsqueeze(1)).flatten(0, 1)


def _group_sums(x: Tensor, groups: int) -> Tensor:
    return x.unflatten(0, (groups, -1)).sum(1)


def _fit_scales(
    target: Tensor, H: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor, signed: bool
) -> Tensor:
    """[G, N] fp16: the best scales, in the rows that are better off with them."""
    groups = len(scale)
    step = max(1, EQUATIONS_BYTES // (8 * groups * groups))
    fitted = []
    for i in range(0, target.shape[1], step):
        steps = _steps(codes[:, i : i + step], zero_point[:, i : i + step])
        old = scale[:, i : i + step].float()
        error = target[:, i : i + step] - steps * old.repeat_interleave(len(steps) // groups, 0)
        fitted.append(_fit_rows(error, H, steps, old, signed))
    return torch.cat(fitted, 1)


def _fit_rows(error: Tensor, H: Tensor, steps: Tensor, scale: Tensor, signed: bool) -> Tensor:
    """Changing the scales by δ changes the loss by δᵀ·M·δ − 2·δ·v, with M and v as below."""
    groups = len(scale)
    size = len(steps) // groups
    v = _group_sums((H @ error).mul_(steps), groups).T.double()  # [N, G]
    M = torch.empty(steps.shape[1], groups, groups, dtype=torch.float64, device=steps.device)
    for g in range(groups):
        of_group = slice(g * size, (g + 1) * size)
        M[:, g] = _group_sums((H[:, of_group] @ steps[of_group]).mul_(steps), groups).T
    diagonal = M.diagonal(dim1=1, dim2=2)
    ridged = M.clone()
    ridged.diagonal(dim1=1, dim2=2).add_(RIDGE * diagonal.mean(1, keepdim=True) + 1e-30)
    lower, _ = torch.linalg.cholesky_ex(ridged)
    delta = torch.cholesky_solve(v.unsqueeze(-1), lower).squeeze(-1)
    new = (scale + delta.T).to(torch.float16).float()
    usable = torch.isfinite(new) & (new != 0)
    if not signed:
        usable &= new > 0
    new = torch.where(usable, new, scale)
    delta = (new - scale).T.double()
    gain = 2 * (delta * v).sum(1) - (delta.unsqueeze(1) @ M @ delta.unsqueeze(2)).flatten()
    return torch.where(gain > 0, new, scale).to(torch.float16)


def _descend(target: Tensor, H: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> None:
    """One sweep over all columns; `codes` is changed."""
    k = len(target)
    size = k // len(scale)
    diagonal = H.diagonal().unsqueeze(1)
    group_of = torch.arange(k, device=target.device) // size
    error = target - _steps(codes, zero_point).mul_(scale.repeat_interleave(size, 0))
    for first in range(0, k, OUTER):
        last = min(first + OUTER, k)
        gradient = H[first:last] @ error
        for start in range(first, last, MAX_COLUMNS):
            block = slice(start, min(start + MAX_COLUMNS, last))
            s, z = scale[group_of[block]], zero_point[group_of[block]]
            before = target[block] - error[block]
            best = before + gradient[block.start - first : block.stop - first] / diagonal[block]
            follow = -H[block, block] / diagonal[block].T
            codes[block] = round_columns(best, follow, s, z, bits, before)
            now = target[block] - (codes[block] - z).mul_(s)
            change = now - error[block]
            error[block] = now
            gradient[block.stop - first :].addmm_(H[block.stop : last, block], change)
