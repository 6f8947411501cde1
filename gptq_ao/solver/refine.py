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
from gptq_ao.solver.fp32 import ieee_fp32, product
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
        change: [columns, N], what the error of the group that is being fitted has grown by.
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
        self.change = torch.empty_like(target[: self.columns])
        for g in range(len(self.scale)):
            group = slice(g * self.columns, (g + 1) * self.columns)
            self.error[group] = target[group] - (self.codes[group] - self.zero_point[g]) * self.scale[g].float()

    def run(self) -> None:
        # E·H of a range of columns is one large product. What changes while the range is swept is added to it by small
        # ones, for the columns still to come: those before have had their turn.
        for first, last, blocks in column_blocks(len(self.target), self.columns):
            gradient = product(self.H[first:last], self.error)
            for start in range(first, last, self.columns):
                group = slice(start, start + self.columns)
                self._fit_group(group, [b for b in blocks if start <= b.start < group.stop], gradient[start - first :])
                gradient[group.stop - first :].addmm_(self.H[group.stop : last, group], self.change)

    def _fit_group(self, group: slice, blocks: list[slice], gradient: Tensor) -> None:
        """Its scale, then its codes, block by block. `gradient` begins with the group, and follows within it only."""
        g = group.start // self.columns
        scale, zero_point = self.scale[g], self.zero_point[g]
        mine, codes, error = gradient[: self.columns], self.codes[group], self.error[group]
        fit_scale(self.H[group, group], mine, codes, scale, zero_point, error, self.change, self.signed)
        for block in blocks:
            here = slice(block.start - group.start, block.stop - group.start)
            of_scale = self.change[here].clone() if block.stop < group.stop else None
            tensors = (self.codes[block], scale, zero_point, self.target[block], self.error[block], self.change[here])
            fit_codes(self.H[block, block], mine[here], *tensors, self.bits)
            if of_scale is not None:  # which `mine` knows already
                of_codes = torch.sub(self.change[here], of_scale, out=of_scale)
                mine[here.stop :].addmm_(self.H[block.stop : group.stop, block], of_codes)
