"""Improve a solution, group by group: a better scale for the codes, then better codes for the scale.

GPTQ decides each code and each scale once, without knowing what comes after it. Given everything else in a row,
tr(E·H·Eᵀ) with E = W − Ŵ is quadratic in any one number, and its best value is known:

    scale of a group   s + (b·v) / (b·H_gg·b)         b = the group's codes − zero_point, v = (E·H)_g
    code of column j   the nearest one to ŵ_j + (E·H)_j / H_jj

A sweep passes through all groups and sets the scale, then the codes one after the other. No step makes the loss larger,
as far as E·H is known: on a GPU to the 10 bits of TF32, but for the last sweep. E itself is always exact.

Source: coordinate descent, for codes as in Behdin et al., "QuantEase" (2023) and Nair & Suggala, "CDQuant" (2024).
"""

import torch
from torch import Tensor

from gptq_ao.kernels.columns import column_blocks
from gptq_ao.kernels.refinement import fit_codes, fit_scale
from gptq_ao.recipe import Recipe
from gptq_ao.solver.factor import Factor
from gptq_ao.solver.fp32 import ieee_fp32
from gptq_ao.solver.hessian import Hessian
from gptq_ao.solver.solution import Solution

__all__ = ["refine"]


def refine(solution: Solution, target: Tensor, hessian: Hessian, factor: Factor) -> Solution:
    """Sweep over all columns, as often as the recipe of `factor` says. Groups stay as they are, and so do zero points.

    Args:
        target: [N, K], floating point, the weights that the codes stand for.
        hessian, factor: those that led to the solution.

    Returns:
        A solution whose tr(E·H·Eᵀ), with H damped as in `factor`, is no larger, in any row.
    """
    recipe = factor.recipe
    if not recipe.refine_sweeps:
        return solution
    # The same H as in `factor`: dead columns have the mean as their diagonal, and all have the damping.
    # (A bool times a number would be of torch's default dtype.)
    dead = (hessian.matrix.diagonal() <= 0).to(hessian.matrix.dtype)
    H = hessian.matrix + torch.diag(dead * factor.mean + factor.added)
    W = target.float()
    if solution.perm is not None:
        H, W = H[solution.perm][:, solution.perm], W[:, solution.perm]
    state = _Sweep(W.T.contiguous(), H, solution, recipe)
    for left in reversed(range(recipe.refine_sweeps)):
        # Gradients to three digits lead to codes that are as good (docs/accuracy.md), by much faster products.
        with ieee_fp32(cuda="tf32" if left else "ieee"):
            state.run()
    codes, scale = (t.T.contiguous() for t in (state.codes, state.scale))
    return Solution(codes, scale, solution.zero_point, solution.perm)


class _Sweep:
    """What changes in a sweep. As in `solve.py`, everything is transposed: [K, N], and [G, N] for scales.

    Attributes:
        error: W − Ŵ.
    """

    def __init__(self, target: Tensor, H: Tensor, solution: Solution, recipe: Recipe) -> None:
        self.target, self.H, self.bits, self.signed = target, H, recipe.bits, recipe.signed
        # Always copies: the transpose of a single row or column is contiguous, and would be the argument itself.
        self.codes, self.scale = (
            t.T.clone(memory_format=torch.contiguous_format) for t in (solution.codes, solution.scale)
        )
        self.zero_point = solution.zero_point.T.float().contiguous()
        self.columns = len(target) // len(self.scale)
        self.error = torch.empty_like(target)
        for g in range(len(self.scale)):
            group = slice(g * self.columns, (g + 1) * self.columns)
            self.error[group] = target[group] - (self.codes[group] - self.zero_point[g]) * self.scale[g].float()

    def run(self) -> None:
        # E·H of a range of columns is one large product. What changes while the range is swept is added to it by small
        # ones, for the columns still to come: those before have had their turn.
        for first, last, blocks in column_blocks(len(self.target), self.columns):
            gradient = self.H[first:last] @ self.error
            for start in range(first, last, self.columns):
                group = slice(start, start + self.columns)
                # What nothing follows need not be compared with what it was.
                before = self.error[group].clone() if group.stop < last else None
                self._fit_group(group, [b for b in blocks if start <= b.start < group.stop], gradient[start - first :])
                if before is not None:
                    change = torch.sub(self.error[group], before, out=before)
                    gradient[group.stop - first :].addmm_(self.H[group.stop : last, group], change)

    def _fit_group(self, group: slice, blocks: list[slice], gradient: Tensor) -> None:
        """Its scale, then its codes, block by block. `gradient` begins with the group, and follows within it only."""
        g = group.start // self.columns
        scale, zero_point = self.scale[g], self.zero_point[g]
        mine = gradient[: self.columns]
        fit_scale(self.H[group, group], mine, self.codes[group], scale, zero_point, self.error[group], self.signed)
        for block in blocks:
            before = self.error[block].clone() if block.stop < group.stop else None
            here = slice(block.start - group.start, block.stop - group.start)
            tensors = (self.codes[block], scale, zero_point, self.target[block], self.error[block])
            fit_codes(self.H[block, block], mine[here], *tensors, self.bits)
            if before is not None:
                change = torch.sub(self.error[block], before, out=before)
                mine[here.stop :].addmm_(self.H[block.stop : group.stop, block], change)
