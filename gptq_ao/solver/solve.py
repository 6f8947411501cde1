"""GPTQ: round a weight matrix column by column and let the columns to come make up for each rounding error.

Source: Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers" (2022).
With the factor H = A·diag(pivots)·Aᵀ (`factor.py`) the column j that is solved next is rounded from

    x_j = w_j + Σ_{i<j} e_i·A_ij          e_i = w_i − ŵ_i

which is the value GPTQ's updates of the weights give it, and tr(E·H·Eᵀ) = Σ pivots_j·(x_j − ŵ_j)². Earlier blocks of
columns add their part of the sum as matrix products. Within a block (`kernels/columns.py`) all columns are first
brought to the value that is best for them as long as none of the block is rounded,

    X = W + C·A_bb⁻¹          C = Σ_{i before the block} e_i·A_i

and what rounding column j changes, p_j = x_j − ŵ_j, moves the columns after it by −p_j·(A_bb⁻¹)_jk.

Rows are independent of each other: weights that share an activation are solved together by stacking them.

Pure functions of tensors, on any device; the arguments are never changed. N = out_features, K = in_features,
G = groups in a row.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gptq_ao.codes.grid import choose_grid, group_columns, round_to_grid
from gptq_ao.errors import NonFiniteError
from gptq_ao.kernels.columns import MAX_COLUMNS, column_blocks, round_columns
from gptq_ao.kernels.groups import best_grid, round_group
from gptq_ao.recipe import Recipe
from gptq_ao.solver.factor import Factor
from gptq_ao.solver.fp32 import ieee_fp32, product
from gptq_ao.solver.hessian import Hessian
from gptq_ao.solver.solution import Solution

__all__ = ["better_rows", "output_energy", "round_to_nearest", "solve"]


def solve(weight: Tensor, factor: Factor, grid: tuple[Tensor, Tensor] | None = None) -> Solution:
    """GPTQ of `weight` [N, K], floating point, with the recipe that `factor` was made for.

    Grids: with `act_order="static"` groups are runs of neighbouring columns and their grids come from the given
    weights, since a group's columns are met at different times. With the others a group's columns are met together, and
    its grid comes from the weights as updated by all errors before it: the one of `scale_candidates` that rounding the
    group with error feedback likes best.

    Args:
        grid: scale [N, G] fp16 and zero point [N, G] uint8 of runs of neighbouring columns, to be used as they are.
            Not for a recipe that permutes.

    Returns:
        The solution; codes are on the stored (fp16) scales exactly.

    Raises:
        NonFiniteError: a weight is NaN or infinite, or too large for an fp16 scale.
    """
    recipe, order, A = factor.recipe, factor.order, factor.unit
    weight = weight.detach()
    n, k = weight.shape
    columns = group_columns(k, recipe.group_size)
    device = weight.device
    static = recipe.act_order == "static" or grid is not None
    if static:
        chosen = grid or choose_grid(weight, recipe.group_size, recipe.bits, recipe.sym, recipe.signed)
        scale, zero_point = (t.T.contiguous() for t in chosen)
    else:
        scale = torch.empty(k // columns, n, dtype=torch.float16, device=device)
        zero_point = torch.empty(k // columns, n, dtype=torch.uint8, device=device)
    # Where grids are chosen on the way, no block may reach into the next group: its grid is not known yet.
    unit = MAX_COLUMNS if static else columns
    inverses = _inverses(A, unit)
    # Columns are solved one at a time: as rows of the transposed matrix they are contiguous. In solving order:
    W = weight.float().T
    W = W[order] if order is not None else W.clone(memory_format=torch.contiguous_format)
    codes = torch.empty(k, n, dtype=torch.uint8, device=device)
    # The group of each place: groups are runs of places where they follow the solving order, else runs of columns.
    group_of = torch.arange(k, device=device) if order is None or recipe.permutes else order
    group_of = group_of // columns
    groups_met = group_of[::columns].tolist()  # read on the host once: the loop must not wait for the device

    with ieee_fp32():
        for first, last, blocks in column_blocks(k, unit):
            # W holds the errors of all columns before these, and these as they were; C what those errors add, see
            # above. One large product for a range of blocks, small ones within it: a product for each block would read
            # all earlier errors again.
            C = product(A[:first, first:last].T, W[:first]) if first else torch.zeros_like(W[:last])
            for block in blocks:
                inverse, of_block = inverses[block.start], group_of[block]
                ahead = C[block.start - first :]
                if not static and block.start % columns == 0:
                    group = slice(block.start, block.start + columns)
                    x = _unrounded(W[group], ahead[:columns], A[group, group], inverse)
                    g = groups_met[block.start // columns]
                    if columns <= MAX_COLUMNS and recipe.scale_candidates > 1:
                        done = (W[group], codes[group], scale[g], zero_point[g])
                        round_group(x, inverse, factor.pivots[group], *done, **_candidates(recipe))
                        C[block.stop - first :].addmm_(A[block, block.stop : last].T, W[block])
                        continue
                    scale[g], zero_point[g] = _choose(x, inverses, factor.pivots, block.start, recipe)
                    x = x[: len(of_block)]
                else:
                    x = _unrounded(W[block], ahead[: len(of_block)], A[block, block], inverse)
                if static:
                    s, z = scale[of_block].float(), zero_point[of_block].float()
                else:  # the same for all columns, which are of one group
                    s, z = (t[g].float().expand_as(x) for t in (scale, zero_point))
                codes[block] = round_columns(x, inverse, s, z, recipe.bits)
                W[block] -= (codes[block] - z).mul_(s)  # from here on these rows hold errors, not weights
                C[block.stop - first :].addmm_(A[block, block.stop : last].T, W[block])
    del C, W
    # Looked at once, at the end, for the same reason: every look at a value makes the host wait.
    if not torch.isfinite(scale).all():
        raise NonFiniteError(
            f"the weights reach {weight.abs().max().item():.3g}: a scale for them is not a finite fp16 number"
        )

    perm = None
    if order is not None:
        if recipe.permutes:
            perm = order.to(torch.int32)
        else:
            codes = codes[torch.argsort(order)]
    return Solution(codes.T.contiguous(), scale.T.contiguous(), zero_point.T.contiguous(), perm)


def _inverses(A: Tensor, columns: int) -> dict[int, Tensor]:
    """The inverses of the blocks on the diagonal of A, by the blocks' first column."""
    blocks = [b for *_, blocks in column_blocks(len(A), columns) for b in blocks]
    found: dict[int, Tensor] = {}
    for size in {b.stop - b.start for b in blocks}:
        alike = [b for b in blocks if b.stop - b.start == size]
        stacked = torch.stack([A[b, b] for b in alike]).double()
        eye = torch.eye(size, dtype=torch.float64, device=A.device)
        inverted = torch.linalg.solve_triangular(stacked, eye, upper=True, unitriangular=True).float()
        found |= {b.start: m for b, m in zip(alike, inverted, strict=True)}
    return found


def _unrounded(weight: Tensor, carried: Tensor, A: Tensor, inverse: Tensor) -> Tensor:
    """X of some columns [B, N], see above.

    Args:
        weight, carried: [B, N], W and C.
        A: [B, B], the block of A on the diagonal.
        inverse: of A, or only of its first columns if there are more than fit into a block.
    """
    if len(inverse) == len(A):
        return torch.addmm(weight, inverse.T, carried)
    return weight + torch.linalg.solve_triangular(A.T, carried, upper=False, unitriangular=True)


def _choose(
    group: Tensor, inverses: Mapping[int, Tensor], pivots: Tensor, start: int, recipe: Recipe
) -> tuple[Tensor, Tensor]:
    """Scale and zero point [N] of a group [columns, N] that begins at `start`."""
    if recipe.scale_candidates == 1:
        scale, zero_point = choose_grid(group.T, -1, recipe.bits, recipe.sym, recipe.signed)
        return scale.squeeze(1), zero_point.squeeze(1)
    follow = [inverses[start + i] for i in range(0, len(group), MAX_COLUMNS)]
    return best_grid(group, follow, pivots[start:][: len(group)], **_candidates(recipe))


def _candidates(recipe: Recipe) -> dict[str, Any]:
    return {"bits": recipe.bits, "sym": recipe.sym, "signed": recipe.signed, "count": recipe.scale_candidates}


def round_to_nearest(weight: Tensor, recipe: Recipe, grid: tuple[Tensor, Tensor] | None = None) -> Solution:
    """Each weight of `weight` [..., N, K], floating point, to its nearest code: no Hessian, the baseline.

    Of the recipe only the grid counts, and its scales stay positive: a baseline should be the usual one. Or `grid` is
    used as it is: scale [..., N, G] fp16 and zero point [..., N, G] uint8.

    Raises:
        NonFiniteError: see `choose_grid`.
    """
    scale, zero_point = grid or choose_grid(weight, recipe.group_size, recipe.bits, recipe.sym)
    per_column = group_columns(weight.shape[-1], recipe.group_size)
    s, z = (t.float().repeat_interleave(per_column, -1) for t in (scale, zero_point))
    return Solution(round_to_grid(weight.float(), s, z, recipe.bits).to(torch.uint8), scale, zero_point)


def better_rows(one: Solution, other: Solution, target: Tensor, hessian: Hessian) -> Solution:
    """Each row from the solution that has the smaller e·H·eᵀ there, of two for `target` [N, K] without a `perm`; of
    equal ones, from the first."""
    with ieee_fp32():
        errors = (target - s.dequantize() for s in (one, other))
        a, b = (torch.sum((e @ hessian.matrix) * e, dim=1, keepdim=True, dtype=torch.float64) for e in errors)
    names = ("codes", "scale", "zero_point")
    return Solution(*(torch.where(b < a, getattr(other, n), getattr(one, n)) for n in names))


def output_energy(matrix: Tensor, hessian: Hessian) -> float:
    """tr(M·H·Mᵀ): the mean square of the outputs of M [N, K] over the rows of H, summed over the N outputs."""
    matrix = matrix.float()
    with ieee_fp32(cuda="tf32"):
        return torch.sum((matrix @ hessian.matrix) * matrix, dtype=torch.float64).item()
