"""What GPTQ needs of a Hessian: damped, in solving order, as unit upper triangle and pivots.

    H + damping = A·diag(pivots)·Aᵀ          A unit upper triangular

For an error E = W − Ŵ (rows are outputs) this splits the loss into a sum over columns, each of which depends on the
columns before it and its own:

    tr(E·H·Eᵀ) = Σ_j pivots_j · |e_j + Σ_{i<j} e_i·A_ij|²

The factor comes from one Cholesky decomposition: reversing rows and columns turns a lower factor into an upper one. The
inverse that GPTQ is usually written with, H⁻¹ = UᵀU, is U = (A·√pivots)⁻¹, of which only small blocks on the diagonal
are ever needed (`solve.py`).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from gptq_ao.codes.grid import group_columns
from gptq_ao.errors import NonFiniteError, SolverError
from gptq_ao.recipe import Recipe
from gptq_ao.solver.hessian import Hessian

__all__ = ["Factor", "factor", "solving_order"]

DAMPING_TRIES = 12
LARGEST_FP64 = 8192  # above, an fp64 factor takes more memory (2·8·K² bytes) and time than its accuracy is worth


@dataclass(frozen=True)
class Factor:
    """What a Hessian contributes to the solution, the same for every weight that reads the activation.

    Attributes:
        recipe: it was made for, and that the weights are therefore solved with.
        unit: [K, K] fp32, A above, rows and columns in solving order.
        pivots: [K] fp32.
        order: [K] int64, `order[i]` is the column solved in place i; None for left to right.
        damp: the fraction of the mean diagonal that was finally added.
        added: what that is, to every element of the diagonal.
        dead: number of columns that were zero in all calibration data. They are rounded to nearest.
        mean: average of the diagonal without them, which is also what they get as their diagonal.
    """

    recipe: Recipe
    unit: Tensor
    pivots: Tensor
    order: Tensor | None
    damp: float
    added: float
    dead: int
    mean: float


def factor(hessian: Hessian, recipe: Recipe) -> Factor:
    """Damp, order and factor a Hessian.

    Damping: `recipe.damp_percent` of the mean diagonal (None: K / rows, at least 0.01 and at most 1, since few rows
    determine H poorly), tripled until the Cholesky factor exists. Dead columns (zero diagonal) get the mean as their
    diagonal: they couple to nothing and keep their weight's nearest codes.

    Raises:
        NonFiniteError: H holds NaN or infinity.
        SolverError: no factor after the damping was tripled 12 times.
    """
    k = hessian.matrix.shape[-1]
    diagonal = hessian.matrix.diagonal()
    if not torch.isfinite(hessian.matrix).all():
        raise NonFiniteError(f"the Hessian [{k}, {k}] holds NaN or infinity")
    dead = diagonal <= 0  # zero, or what rounding left of zero
    order = solving_order(diagonal, recipe.act_order, recipe.group_size)
    live = diagonal[~dead]
    mean = live.mean().item() if live.numel() else 1.0

    dtype = torch.float64 if k <= LARGEST_FP64 else torch.float32
    # A Cholesky factor is lower triangular. Of H with rows and columns reversed it is, reversed again, an upper one.
    reverse = torch.arange(k, device=diagonal.device).flip(0) if order is None else order.flip(0)
    H = hessian.matrix[reverse][:, reverse].to(dtype)
    H.diagonal()[dead[reverse]] = mean
    damp = recipe.damp_percent
    if damp is None:
        damp = min(max(k / max(hessian.rows, 1), 0.01), 1.0)
    before = 0.0
    for _ in range(DAMPING_TRIES):
        # Only the difference is added: a second copy of H would double the memory.
        H.diagonal().add_((damp - before) * mean)
        before = damp
        lower, info = torch.linalg.cholesky_ex(H)
        if info.item() == 0:
            del H
            root = lower.diagonal().clone()
            unit = lower.div_(root).float().flip(0, 1)
            return Factor(recipe, unit, root.square().float().flip(0), order, damp, damp * mean, int(dead.sum()), mean)
        damp *= 3
    raise SolverError(
        f"the Hessian [{k}, {k}] of {hessian.rows} rows is not positive definite even with {before:.3g} of its mean "
        "diagonal added: check the calibration data, or leave the layer out with a rule"
    )


def solving_order(diagonal: Tensor, act_order: str, group_size: int) -> Tensor | None:
    """The columns in the order in which they are solved: those that matter most first, while there are still many left
    to make up for them. Equal ones stay in their order.

    "static" and "group": by decreasing diagonal. "group_aware": by decreasing diagonal within each group, and the
    groups by their largest, so that a group's columns stay together. "none": from left to right.

    Args:
        diagonal: [K], floating point, of the Hessian.

    Returns:
        [K] int64; None for "none".
    """
    if act_order == "none":
        return None
    if act_order != "group_aware":
        return torch.argsort(diagonal, descending=True, stable=True)
    groups = diagonal.view(-1, group_columns(len(diagonal), group_size))
    within = torch.argsort(groups, dim=1, descending=True, stable=True)
    among = torch.argsort(groups.amax(1), descending=True, stable=True)
    first = torch.arange(len(groups), device=diagonal.device).unsqueeze(1) * groups.shape[1]
    return (first + within)[among].flatten()
